/* What the kernels are told: plain C structures, mirrored field by field in layout.py. All pointers are borrowed.
 *
 * A "word" is 4 bytes: two bfloat16 or one float32. Every layout below is in words, so one source serves both element types:
 *   packed matrix  [outputs / 64][inputs in words][64] words: 64 outputs of one pair of inputs lie side by side
 *   key pool       [blocks][kv_heads][head_dim in words][16] words: 16 keys side by side
 *   value pool     [blocks][kv_heads][16 keys in words][head_dim] words
 */
#include <stdint.h>

enum { BLOCK = 16, GROUP = 64 };

/* Packed in words; or, with a scale, in int8: row n is scale[n] * q[n], and `inputs in words` above becomes `inputs / 4`. */
typedef struct {
    const void *packed;
    const int32_t *offset; /* -128 * sum of q[n]: takes back the unsigned activations' offset */
    const float *scale;    /* NULL: words */
} Matrix;

typedef struct {
    Matrix qkv, o, gate_up, down;         /* gate_up: 32 gates, their 32 ups, and so on */
    const float *qkv_bias, *o_bias;       /* NULL: none */
    const float *input_norm, *attention_norm, *feed_norm, *after_norm; /* attention_norm, after_norm: of a sandwich, else NULL */
    const float *q_norm, *k_norm;         /* over a head; NULL: none */
    void *keys, *values;
    int64_t window; /* tokens a query sees, itself included; 0: all */
    int64_t rope;   /* which table */
} Layer;

typedef struct {
    int64_t hidden, heads, kv_heads, head_dim, inner, layers, vocabulary; /* inner: padded to 32 */
    int64_t activation; /* 0: SiLU; 1: GELU by tanh */
    int64_t wide;       /* 1: float32 elements; 0: bfloat16 */
    int64_t int8;       /* 1: the layers' matrices are */
    float epsilon, score_scale, score_cap, embedding_scale; /* score_cap 0: none */
    const void *embedding, *head; /* row-major [vocabulary][hidden] */
    const float *final_norm;
    const Layer *layer;
} Model;

/* What an adapter adds to one packed matrix of a layer: its rows become gain * (W x + up (down x)). A packed matrix of several parts (q, k
 * and v; gate and up) has a `down` for each; outputs of part i take rank elements from i * rank on. All ranks of an adapter are one, padded
 * to 16 with zeros; the scaling is in `up`. */
typedef struct {
    const void *down;  /* [parts * rank / 16][inputs in words][16] words; NULL: nothing is added */
    const void *up;    /* [outputs / 64][rank in words][64] words, outputs as in the packed matrix */
    const float *gain; /* [outputs padded to 64] of a DoRA; NULL: 1 */
} LowRank;

enum { QKV, O, GATE_UP, DOWN, ADAPTED };

typedef struct {
    int64_t rank;
    const LowRank (*layer)[ADAPTED];
} Adapter;

typedef struct {
    int64_t count, sequences, table_width, selected;
    const int64_t *tokens, *slots, *select;
    const int64_t *positions;
    const int32_t *rows, *lengths, *tables;
    const float *cosines[2], *sines[2]; /* [position][head_dim / 2] */
    float *out;                         /* [selected][hidden] */
    const int32_t *adapters;            /* [count] slot of each token, 0: the base alone; NULL: all of them */
    const Adapter *adapter;             /* [adapter_slots + 1], from slot 1 on */
    int64_t adapter_slots, adapter_rank; /* the largest rank among the step's */
} Step;

/* int8 screening of the output matrix; see screen.h for the bound. */
typedef struct {
    Matrix matrix;            /* in int8 */
    const float *rest, *norm; /* [vocabulary] length of the quantisation's rest; of the row */
} Screen;
