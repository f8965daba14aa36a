/* One step of a decoder-only model. Included twice: WIDE 0 for bfloat16 elements, WIDE 1 for float32.
 *
 * Every output is accumulated in float32 in one order that depends on nothing but its own row: a token's numbers are the same bits alone,
 * in any batch, in any chunk of its prompt and on any number of threads.
 */
#if WIDE
#define NAME(x) x##_float
typedef float NAME(Element);
#define PAIR 1
#define DOT(sum, a, b) _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
#else
#define NAME(x) x##_bfloat
typedef uint16_t NAME(Element);
#define PAIR 2
#ifdef __AVX512BF16__
#define DOT(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#else
#define DOT(sum, a, b) \
    _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), \
                    _mm512_fmadd_ps(high_halves(a), high_halves(b), sum))
#endif
#endif
#define Element NAME(Element)
#define WORDS(elements) ((elements) / PAIR)

static INLINE void NAME(put16)(Element *to, __m512 v) {
#if WIDE
    _mm512_storeu_ps(to, v);
#else
    _mm256_storeu_si256((__m256i *)to, narrow16(v));
#endif
}

static INLINE __m512 NAME(get16)(const Element *from) {
#if WIDE
    return _mm512_loadu_ps(from);
#else
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
#endif
}

/* to[16 * n] = from / rms(from) * weight */
static void NAME(normalise)(Element *to, const float *from, const float *weight, long n, float epsilon) {
    __m512 factor = _mm512_set1_ps(inverse_rms(from, n, epsilon));
    for (long i = 0; i < n; i += 16)
        NAME(put16)(to + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(from + i), factor), _mm512_loadu_ps(weight + i)));
}

/* One row of activations to bytes; gives |u p| / u and |f| / u of screen.h. */
static void NAME(shrink_row)(const Bytes *to, long row, const Element *from, float *length, float *rest) {
    const long n = to->inputs;
    __m512 squares = _mm512_setzero_ps(), lengths = squares, rests = squares;
    for (long i = 0; i < n; i += 16) {
        __m512 v = NAME(get16)(from + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float size = sqrtf(sum16(squares)), unit = size / sqrtf((float)n) * (SPREAD / 127), inverse = unit > 0 ? 1 / unit : 0;
    to->unit[row] = unit;
    to->outlying[row] = 0;
    for (long i = 0; i < n; i += 16) shrink16(to, row, i, _mm512_mul_ps(NAME(get16)(from + i), _mm512_set1_ps(inverse)), &lengths, &rests);
    /* The last term covers the float32 rounding of the exact logit: at most n * 2^-24 * |w| |x|, and as much again for this sum's own. */
    *length = sqrtf(sum16(lengths)) * 1.0001f;
    *rest = sqrtf(sum16(rests)) * 1.0001f + 2 * (float)n * 0x1p-24f * size * inverse;
}

/* One group of an int8 matrix: lanes `lane`.. of group first_group + item take group_rows rows. */
static void NAME(quantise)(void *with, long item, int worker) {
    const Quantising *p = with;
    const long n = p->inputs, group = p->first_group + item, first = item * p->group_rows;
    (void)worker;
    for (long i = first; i < first + p->group_rows && i < p->rows; i++) {
        const Element *row = (const Element *)p->from + (size_t)i * n;
        const long lane = p->lane + i - first, id = group * GROUP + lane;
        __m512 high = _mm512_setzero_ps(), squares = high, rests = high;
        for (long k = 0; k < n; k += 16) {
            __m512 v = NAME(get16)(row + k);
            high = _mm512_max_ps(high, _mm512_abs_ps(v));
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        const float scale = _mm512_reduce_max_ps(high) / 127, inverse = scale > 0 ? 1 / scale : 0;
        int32_t *to = (int32_t *)p->matrix.packed + (size_t)group * (size_t)(n / 4) * GROUP + lane;
        __m512i sum = _mm512_setzero_si512();
        for (long k = 0; k < n; k += 16) {
            __m512 v = NAME(get16)(row + k);
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
            sum = _mm512_add_epi32(sum, q);
            __m512 e = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale), v);
            rests = _mm512_fmadd_ps(e, e, rests);
            int32_t four[4];
            _mm_storeu_si128((__m128i *)four, _mm512_cvtsepi32_epi8(q));
            for (int j = 0; j < 4; j++) to[(k / 4 + j) * GROUP] = four[j];
        }
        ((int32_t *)p->matrix.offset)[id] = -128 * _mm512_reduce_add_epi32(sum);
        ((float *)p->matrix.scale)[id] = scale;
        if (p->rest) p->rest[id] = sqrtf(sum16(rests)) * 1.0001f; /* float32 rounding of the sums themselves */
        if (p->norm) p->norm[id] = sqrtf(sum16(squares)) * 1.0001f;
    }
}

/* ---- packed matrix products ---- */

typedef struct {
    const Matrix *matrix;
    const Element *from; /* [rows][inputs] */
    long rows, inputs;
    Bytes bytes; /* room for what an int8 matrix is multiplied with */
    const float *bias;
    float *to; /* [rows][to_stride]; or NULL: activated into `inner` */
    long to_stride;
    Element *inner;
    long activation;
    long groups;
    Adapting *adapting; /* NULL: the base alone */
} NAME(Product);

static INLINE void NAME(tile)(const int R, const uint32_t *w, const uint32_t *x, long words, float out[TILE_ROWS][GROUP], Ahead *ahead) {
    __m512 sum[TILE_ROWS][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < 4; n++) sum[r][n] = _mm512_setzero_ps();
    for (long k = 0; k < words; k++, w += GROUP) {
        __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 16), w2 = _mm512_load_si512(w + 32), w3 = _mm512_load_si512(w + 48);
        if (ahead) look_ahead(ahead);
        UNROLL for (int r = 0; r < R; r++) {
            __m512i both = _mm512_set1_epi32((int)x[r * words + k]);
            sum[r][0] = DOT(sum[r][0], w0, both);
            sum[r][1] = DOT(sum[r][1], w1, both);
            sum[r][2] = DOT(sum[r][2], w2, both);
            sum[r][3] = DOT(sum[r][3], w3, both);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < 4; n++) _mm512_storeu_ps(out[r] + 16 * n, sum[r][n]);
}

/* One row's 64 outputs with what its adapter adds: after the base's own sum, in one order, so company changes no bit. */
static INLINE void NAME(adapt)(const NAME(Product) *p, long row, long group, float out[GROUP]) {
    const Adapting *a = p->adapting;
    const int32_t slot = a->step->adapters[row];
    if (!slot) return;
    const Adapter *adapter = a->step->adapter + slot;
    if (!adapter->layer) return; /* an empty slot */
    const LowRank *added = adapter->layer[a->layer] + a->which;
    if (!added->down) return;
    const long words = WORDS(adapter->rank);
    const uint32_t *w = (const uint32_t *)added->up + (size_t)group * words * GROUP;
    const uint32_t *low = (const uint32_t *)((const Element *)a->low + row * a->stride), *x[4];
    __m512 sum[4];
    UNROLL for (int n = 0; n < 4; n++) {
        x[n] = low + part_of(a, group, n) * words;
        sum[n] = _mm512_loadu_ps(out + 16 * n);
    }
    for (long k = 0; k < words; k++, w += GROUP)
        UNROLL for (int n = 0; n < 4; n++) sum[n] = DOT(sum[n], _mm512_load_si512(w + 16 * n), _mm512_set1_epi32((int)x[n][k]));
    UNROLL for (int n = 0; n < 4; n++) {
        if (added->gain) sum[n] = _mm512_mul_ps(sum[n], _mm512_loadu_ps(added->gain + group * GROUP + 16 * n));
        _mm512_storeu_ps(out + 16 * n, sum[n]);
    }
}

/* R rows times N panels of 16, each sum split S ways so that few sums still keep the unit busy; N and S follow from the adapter alone */
static INLINE void NAME(thin)(const int R, const int N, const int S, const uint32_t *w, const uint32_t *const *x, long words, Element *const *to) {
    __m512 sum[THIN_ROWS][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N * S; n++) sum[r][n] = _mm512_setzero_ps();
    for (long k = 0; k < words; k += S)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int j = 0; j < S; j++) {
                __m512i part = _mm512_load_si512(w + (n * words + k + j) * 16);
                UNROLL for (int r = 0; r < R; r++) sum[r][n * S + j] = DOT(sum[r][n * S + j], part, _mm512_set1_epi32((int)x[r][k + j]));
            }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) {
            __m512 *of = sum[r] + n * S;
            NAME(put16)(to[r] + 16 * n, S == 4 ? _mm512_add_ps(_mm512_add_ps(of[0], of[1]), _mm512_add_ps(of[2], of[3])) : S == 2 ? _mm512_add_ps(of[0], of[1]) : of[0]);
        }
}

#define THIN(R)     switch (N) {         case 1: NAME(thin)(R, 1, 4, w, x, words, to); break;         case 2: NAME(thin)(R, 2, 2, w, x, words, to); break;         case 3: NAME(thin)(R, 3, 1, w, x, words, to); break;         default: NAME(thin)(R, 4, 1, w, x, words, to);     }

/* the low-rank side of R rows of one adapter, for matrix `which` of a layer */
static void NAME(lower_rows)(const Adapting *a, const Adapter *adapter, long layer, long which, const Element *from, long inputs, const int32_t *rows, int R) {
    const LowRank *added = adapter->layer[layer] + which;
    const long words = WORDS(inputs), panels = parts_of(which) * adapter->rank / 16;
    if (!added->down) return;
    for (long panel = 0; panel < panels; panel += 4) {
        const int N = (int)(panels - panel < 4 ? panels - panel : 4);
        const uint32_t *w = (const uint32_t *)added->down + (size_t)panel * words * 16, *x[THIN_ROWS];
        Element *to[THIN_ROWS];
        for (int r = 0; r < R; r++) {
            x[r] = (const uint32_t *)(from + rows[r] * inputs);
            to[r] = (Element *)a->low + rows[r] * a->stride + panel * 16;
        }
        switch (R) {
            case 1: THIN(1) break;
            case 2: THIN(2) break;
            case 3: THIN(3) break;
            default: THIN(4)
        }
    }
}

/* of one stretch, where the input was not made row by row */
static void NAME(lower)(void *with, long item, int worker) {
    const NAME(Product) *p = with;
    const Adapting *a = p->adapting;
    const Stretch *stretch = a->stretches + item;
    (void)worker;
    for (long i = 0; i < stretch->count; i += THIN_ROWS) {
        const int R = (int)(stretch->count - i < THIN_ROWS ? stretch->count - i : THIN_ROWS);
        NAME(lower_rows)(a, a->step->adapter + stretch->slot, a->layer, a->which, p->from, p->inputs, a->order + stretch->first + i, R);
    }
}

/* of rows [first, end), at most THIN_ROWS, as soon as their input is made */
static void NAME(lower_here)(const Adapting *a, long layer, long which, const Element *from, long inputs, long first, long end) {
    int32_t rows[THIN_ROWS];
    for (long t = first; t < end;) {
        const int32_t slot = a->step->adapters[t];
        int R = 0;
        for (; t < end && a->step->adapters[t] == slot; t++) rows[R++] = (int32_t)t;
        if (slot && a->step->adapter[slot].layer) NAME(lower_rows)(a, a->step->adapter + slot, layer, which, from, inputs, rows, R);
    }
}
#undef THIN

/* one row's 64 outputs to where they belong */
static INLINE void NAME(deliver)(const NAME(Product) *p, long row, long group, const float out[GROUP]) {
    if (p->to) {
        float *to = p->to + row * p->to_stride + group * GROUP;
        for (int n = 0; n < GROUP; n += 16) {
            __m512 v = _mm512_loadu_ps(out + n);
            if (p->bias) v = _mm512_add_ps(v, _mm512_loadu_ps(p->bias + group * GROUP + n));
            _mm512_storeu_ps(to + n, v);
        }
    } else {
        Element *to = p->inner + row * p->to_stride + group * (GROUP / 2);
        for (int n = 0; n < GROUP / 2; n += 16) {
            __m512 gate = _mm512_loadu_ps(out + n), up = _mm512_loadu_ps(out + GROUP / 2 + n);
            NAME(put16)(to + n, _mm512_mul_ps(p->activation ? gelu(gate) : silu(gate), up));
        }
    }
}

#define TILES(AHEAD_OR_NULL) \
    switch (R) { \
        case 1: NAME(tile)(1, w, x, words, out, AHEAD_OR_NULL); break; \
        case 2: NAME(tile)(2, w, x, words, out, AHEAD_OR_NULL); break; \
        case 3: NAME(tile)(3, w, x, words, out, AHEAD_OR_NULL); break; \
        case 4: NAME(tile)(4, w, x, words, out, AHEAD_OR_NULL); break; \
        case 5: NAME(tile)(5, w, x, words, out, AHEAD_OR_NULL); break; \
        default: NAME(tile)(6, w, x, words, out, AHEAD_OR_NULL); \
    }

/* 64 outputs of every row */
static void NAME(multiply)(void *with, long group, int worker) {
    const NAME(Product) *p = with;
    const long words = WORDS(p->inputs);
    const uint32_t *w = (const uint32_t *)p->matrix->packed + (size_t)group * words * GROUP;
    (void)worker;
    float out[TILE_ROWS][GROUP];
    Ahead ahead = {.of = p->adapting, .group = group, .groups = p->groups};
    if (p->adapting) look_further(&ahead);
    for (long row = 0; row < p->rows;) {
        long left = p->rows - row;
        int R = (int)(left >= TILE_ROWS ? TILE_ROWS : left);
        const uint32_t *x = (const uint32_t *)(p->from + row * p->inputs);
        if (ahead.left) TILES(&ahead) else TILES(NULL)
        if (p->adapting)
            for (int r = 0; r < R; r++) NAME(adapt)(p, row + r, group, out[r]);
        for (int r = 0; r < R; r++) NAME(deliver)(p, row + r, group, out[r]);
        row += R;
    }
}
#undef TILES

#define ROWS_AT_ONCE 4 /* an item of the row-wise phases */

static void NAME(shrink)(void *with, long item, int worker) {
    const NAME(Product) *p = with;
    float length, rest;
    (void)worker;
    for (long row = item * ROWS_AT_ONCE; row < p->rows && row < (item + 1) * ROWS_AT_ONCE; row++)
        NAME(shrink_row)(&p->bytes, row, p->from + row * p->inputs, &length, &rest);
}

static void NAME(multiply_bytes)(void *with, long group, int worker) {
#ifdef __AVX512VNNI__
    const NAME(Product) *p = with;
    (void)worker;
    int32_t sums[TILE_ROWS][GROUP];
    float out[GROUP];
    for (long row = 0; row < p->rows;) {
        const int R = byte_products(p->matrix, group, &p->bytes, row, p->rows, sums);
        for (int r = 0; r < R; r++, row++) {
            const __m512 unit = _mm512_set1_ps(p->bytes.unit[row]);
            UNROLL for (int n = 0; n < GROUP; n += 16) {
                const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(p->matrix->scale + group * GROUP + n), unit);
                _mm512_storeu_ps(out + n, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums[r] + n)), scale));
            }
            if (p->adapting) NAME(adapt)(p, row, group, out);
            NAME(deliver)(p, row, group, out);
        }
    }
#else
    (void)with, (void)group, (void)worker; /* no int8 matrix is made without VNNI */
#endif
}

/* `groups` times 64 outputs of every row */
static void NAME(product)(Crew *crew, long groups, long which, NAME(Product) p) {
    p.groups = groups;
    if (p.adapting) {
        place_parts(p.adapting, which);
        if (which == O || which == DOWN) share(crew, p.adapting->count, NAME(lower), &p);
    }
    if (p.matrix->scale) {
        p.bytes.inputs = p.inputs;
        share(crew, (p.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, NAME(shrink), &p);
        share(crew, groups, NAME(multiply_bytes), &p);
    } else share(crew, groups, NAME(multiply), &p);
}

/* ---- the step ---- */

typedef struct {
    const Model *model;
    const Layer *layer, *next;
    const Step *step;
    long width;   /* of a row of qkv */
    long padded;  /* hidden, padded to 64 */
    float *x;     /* residual [count][hidden] */
    float *y;     /* [count][max(padded)] */
    float *qkv;   /* [count][width] */
    Element *in;  /* normalised input [count][hidden] */
    Element *q, *attended; /* [count][heads * head_dim] */
    Element *inner;        /* [count][inner] */
    const Span *spans;
    const uint8_t *fresh; /* [count]: the last token of its row, in a block that this step began */
    Adapting *adapting;   /* NULL: the base alone */
    float *own;   /* scratch of each worker */
    long own_size;
} NAME(Pass);

static INLINE void NAME(lower_item)(const NAME(Pass) *p, long item, long layer, long which) {
    const long first = item * ROWS_AT_ONCE, end = first + ROWS_AT_ONCE < p->step->count ? first + ROWS_AT_ONCE : p->step->count;
    NAME(lower_here)(p->adapting, layer, which, p->in, p->model->hidden, first, end);
}

static void NAME(enter)(void *with, long item, int worker) {
    const NAME(Pass) *p = with;
    const Model *m = p->model;
    (void)worker;
    for (long t = item * ROWS_AT_ONCE; t < p->step->count && t < (item + 1) * ROWS_AT_ONCE; t++) {
        const Element *row = (const Element *)m->embedding + (size_t)p->step->tokens[t] * m->hidden;
        float *x = p->x + t * m->hidden;
        for (long i = 0; i < m->hidden; i += 16)
            _mm512_storeu_ps(x + i, _mm512_mul_ps(NAME(get16)(row + i), _mm512_set1_ps(m->embedding_scale)));
        NAME(normalise)(p->in + t * m->hidden, x, p->layer->input_norm, m->hidden, m->epsilon);
    }
    if (p->adapting) NAME(lower_item)(p, item, 0, QKV);
}

/* x += y, normalised first where the layer has a norm there */
static INLINE void NAME(add)(float *x, const float *y, const float *weight, long n, float epsilon) {
    __m512 factor = weight ? _mm512_set1_ps(inverse_rms(y, n, epsilon)) : _mm512_setzero_ps();
    for (long i = 0; i < n; i += 16) {
        __m512 v = _mm512_loadu_ps(y + i);
        if (weight) v = _mm512_mul_ps(_mm512_mul_ps(v, factor), _mm512_loadu_ps(weight + i));
        _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(x + i), v));
    }
}

static void NAME(after_attention)(void *with, long item, int worker) {
    const NAME(Pass) *p = with;
    const Model *m = p->model;
    (void)worker;
    for (long t = item * ROWS_AT_ONCE; t < p->step->count && t < (item + 1) * ROWS_AT_ONCE; t++) {
        float *x = p->x + t * m->hidden;
        NAME(add)(x, p->y + t * p->padded, p->layer->attention_norm, m->hidden, m->epsilon);
        NAME(normalise)(p->in + t * m->hidden, x, p->layer->feed_norm, m->hidden, m->epsilon);
    }
    if (p->adapting) NAME(lower_item)(p, item, p->layer - m->layer, GATE_UP);
}

static void NAME(after_feed)(void *with, long item, int worker) {
    const NAME(Pass) *p = with;
    const Model *m = p->model;
    (void)worker;
    for (long t = item * ROWS_AT_ONCE; t < p->step->count && t < (item + 1) * ROWS_AT_ONCE; t++) {
        float *x = p->x + t * m->hidden;
        NAME(add)(x, p->y + t * p->padded, p->layer->after_norm, m->hidden, m->epsilon);
        if (p->next) NAME(normalise)(p->in + t * m->hidden, x, p->next->input_norm, m->hidden, m->epsilon);
    }
    if (p->adapting && p->next) NAME(lower_item)(p, item, p->next - m->layer, QKV);
}

/* head norm and rotation of one head, in place */
static INLINE void NAME(turn)(float *head, const float *weight, const float *cosine, const float *sine, long n, float epsilon) {
    if (weight) {
        __m512 factor = _mm512_set1_ps(inverse_rms(head, n, epsilon));
        for (long i = 0; i < n; i += 16)
            _mm512_storeu_ps(head + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(head + i), factor), _mm512_loadu_ps(weight + i)));
    }
    long half = n / 2;
    for (long i = 0; i < half; i += 16) {
        __mmask16 on = half - i >= 16 ? 0xffff : (__mmask16)((1u << (half - i)) - 1);
        __m512 a = _mm512_maskz_loadu_ps(on, head + i), b = _mm512_maskz_loadu_ps(on, head + half + i);
        __m512 c = _mm512_maskz_loadu_ps(on, cosine + i), s = _mm512_maskz_loadu_ps(on, sine + i);
        _mm512_mask_storeu_ps(head + i, on, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)));
        _mm512_mask_storeu_ps(head + half + i, on, _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s)));
    }
}

/* one token's heads: normalise, rotate, and write keys and values to their slot */
static void NAME(place)(void *with, long t, int worker) {
    const NAME(Pass) *p = with;
    const Model *m = p->model;
    const Step *s = p->step;
    const long d = m->head_dim;
    (void)worker;
    const float *cosine = s->cosines[p->layer->rope] + s->positions[t] * (d / 2), *sine = s->sines[p->layer->rope] + s->positions[t] * (d / 2);
    float *row = p->qkv + t * p->width;
    for (long h = 0; h < m->heads; h++) {
        NAME(turn)(row + h * d, p->layer->q_norm, cosine, sine, d, m->epsilon);
        for (long i = 0; i < d; i += 16) NAME(put16)(p->q + (t * m->heads + h) * d + i, _mm512_loadu_ps(row + h * d + i));
    }
    const long block = s->slots[t] / BLOCK, offset = s->slots[t] % BLOCK;
    Element narrow[MAX_HEAD];
    for (long h = 0; h < m->kv_heads; h++) {
        float *key = row + (m->heads + h) * d, *value = row + (m->heads + m->kv_heads + h) * d;
        NAME(turn)(key, p->layer->k_norm, cosine, sine, d, m->epsilon);
        for (long i = 0; i < d; i += 16) NAME(put16)(narrow + i, _mm512_loadu_ps(key + i));
        uint32_t *keys = (uint32_t *)p->layer->keys + (size_t)(block * m->kv_heads + h) * WORDS(d) * BLOCK + offset;
        for (long w = 0; w < WORDS(d); w++) keys[w * BLOCK] = ((const uint32_t *)narrow)[w];
        for (long i = 0; i < d; i += 16) NAME(put16)(narrow + i, _mm512_loadu_ps(value + i));
        Element *values = (Element *)p->layer->values + (size_t)(block * m->kv_heads + h) * d * BLOCK;
        Element *at = values + (offset / PAIR) * d * PAIR + offset % PAIR;
        for (long i = 0; i < d; i++) at[i * PAIR] = narrow[i];
        /* What an earlier owner left behind the last token may be NaN, and 0 * NaN is NaN: a fresh block is cleared behind it. */
        if (p->fresh[t])
            for (long o = offset + 1; o < BLOCK; o++)
                for (long i = 0; i < d; i++) values[(o / PAIR) * d * PAIR + i * PAIR + o % PAIR] = 0;
    }
}

static INLINE void NAME(scores)(const int R, float (*out)[2 * BLOCK], const uint32_t *const *q, const uint32_t *keys, long words) {
    __m512 sum[8];
    UNROLL for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
    for (long w = 0; w < words; w++) {
        __m512i k = _mm512_loadu_si512(keys + w * BLOCK);
        UNROLL for (int r = 0; r < R; r++) sum[r] = DOT(sum[r], k, _mm512_set1_epi32((int)q[r][w]));
    }
    UNROLL for (int r = 0; r < R; r++) _mm512_storeu_ps(out[r], sum[r]);
}

/* out[r][0..16*N) = out * alpha + weights of 16 or 32 keys times their values */
static INLINE void NAME(mix)(const int R, const int N, float *out, long d, const float *alpha, const uint32_t (*weights)[2 * BLOCK],
                             const uint32_t *const *values) {
    __m512 sum[4][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) sum[r][n] = _mm512_mul_ps(_mm512_loadu_ps(out + r * d + 16 * n), _mm512_set1_ps(alpha[r]));
    for (int half = 0; half < 2; half++) {
        if (!values[half]) continue;
        for (int k = 0; k < BLOCK / PAIR; k++) {
            const uint32_t *v = values[half] + k * d;
            __m512i part[4];
            UNROLL for (int n = 0; n < N; n++) part[n] = _mm512_loadu_si512(v + 16 * n);
            UNROLL for (int r = 0; r < R; r++) {
                __m512i weight = _mm512_set1_epi32((int)weights[r][half * (BLOCK / PAIR) + k]);
                UNROLL for (int n = 0; n < N; n++) sum[r][n] = DOT(sum[r][n], part[n], weight);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) _mm512_storeu_ps(out + r * d + 16 * n, sum[r][n]);
}

/* A few neighbouring queries of one sequence against all their keys, 32 at a time from a multiple of 32: the same steps for every tiling. */
static void NAME(attend)(void *with, long item, int worker) {
    const NAME(Pass) *p = with;
    const Model *m = p->model;
    const Step *s = p->step;
    const Span span = p->spans[item / m->kv_heads];
    const long kv_head = item % m->kv_heads, d = m->head_dim, group = m->heads / m->kv_heads, rows = span.count * group;
    const long window = p->layer->window, last = span.position + span.count - 1;
    const long first = window && span.position >= window ? span.position - window + 1 : 0;
    const int32_t *table = s->tables + span.sequence * s->table_width;
    const size_t stride = (size_t)d * BLOCK / PAIR; /* words of one block and head */
    float *out = p->own + worker * p->own_size;
    float top[SPAN_ROWS], total[SPAN_ROWS], alpha[SPAN_ROWS], score[SPAN_ROWS][2][2 * BLOCK];
    uint32_t weight[SPAN_ROWS][2 * BLOCK];
    const uint32_t *q[SPAN_ROWS];
    for (long r = 0; r < rows; r++) {
        q[r] = (const uint32_t *)(p->q + ((span.token + r / group) * m->heads + kv_head * group + r % group) * d);
        top[r] = -INFINITY;
        total[r] = 0;
    }
    memset(out, 0, (size_t)(rows * d) * sizeof *out);
    for (long base = first / (2 * BLOCK) * (2 * BLOCK); base <= last; base += 2 * BLOCK) {
        const uint32_t *values[2] = {NULL, NULL};
        for (int half = 0; half < 2; half++) {
            const long from = base + half * BLOCK;
            if (from > last || from + BLOCK <= first) continue;
            const size_t at = ((size_t)table[from / BLOCK] * m->kv_heads + kv_head) * stride;
            const uint32_t *keys = (const uint32_t *)p->layer->keys + at;
            values[half] = (const uint32_t *)p->layer->values + at;
            long r = 0;
            float got[8][2 * BLOCK];
            while (r < rows) {
                long left = rows - r;
                int R = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                if (R == 8) NAME(scores)(8, got, q + r, keys, WORDS(d));
                else if (R == 4) NAME(scores)(4, got, q + r, keys, WORDS(d));
                else if (R == 2) NAME(scores)(2, got, q + r, keys, WORDS(d));
                else NAME(scores)(1, got, q + r, keys, WORDS(d));
                for (int i = 0; i < R; i++) memcpy(score[r + i][half], got[i], BLOCK * sizeof(float));
                r += R;
            }
        }
        for (long r = 0; r < rows; r++) {
            const long position = span.position + r / group, oldest = window ? position - window + 1 : 0;
            __m512 v[2];
            __mmask16 seen[2];
            float best = top[r];
            for (int half = 0; half < 2; half++) {
                const long from = base + half * BLOCK;
                seen[half] = values[half] ? lanes_between(oldest - from, position - from) : 0;
                v[half] = _mm512_setzero_ps();
                if (!seen[half]) continue;
                v[half] = _mm512_mul_ps(_mm512_loadu_ps(score[r][half]), _mm512_set1_ps(m->score_scale));
                if (m->score_cap > 0)
                    v[half] = _mm512_mul_ps(tanh16(_mm512_div_ps(v[half], _mm512_set1_ps(m->score_cap))), _mm512_set1_ps(m->score_cap));
                float high = _mm512_mask_reduce_max_ps(seen[half], v[half]);
                best = high > best ? high : best;
            }
            if (!(seen[0] | seen[1])) {
                alpha[r] = 1;
                memset(weight[r], 0, sizeof weight[r]);
                continue;
            }
            alpha[r] = top[r] == -INFINITY ? 0 : first_lane(exp16(_mm512_set1_ps(top[r] - best)));
            Element narrow[2 * BLOCK];
            float sum = 0;
            for (int half = 0; half < 2; half++) {
                __m512 e = _mm512_maskz_mov_ps(seen[half], exp16(_mm512_sub_ps(v[half], _mm512_set1_ps(best))));
                sum += sum16(e);
                NAME(put16)(narrow + half * BLOCK, e);
            }
            memcpy(weight[r], narrow, sizeof narrow);
            total[r] = total[r] * alpha[r] + sum;
            top[r] = best;
        }
        for (long r = 0; r < rows;) {
            int R = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
            long i = 0;
            float *at = out + r * d;
            const uint32_t(*w)[2 * BLOCK] = (const uint32_t(*)[2 * BLOCK])weight + r;
            for (; i + 64 <= d; i += 64) {
                const uint32_t *v[2] = {values[0] ? values[0] + i : NULL, values[1] ? values[1] + i : NULL};
                if (R == 4) NAME(mix)(4, 4, at + i, d, alpha + r, w, v);
                else if (R == 2) NAME(mix)(2, 4, at + i, d, alpha + r, w, v);
                else NAME(mix)(1, 4, at + i, d, alpha + r, w, v);
            }
            for (; i < d; i += 16) {
                const uint32_t *v[2] = {values[0] ? values[0] + i : NULL, values[1] ? values[1] + i : NULL};
                if (R == 4) NAME(mix)(4, 1, at + i, d, alpha + r, w, v);
                else if (R == 2) NAME(mix)(2, 1, at + i, d, alpha + r, w, v);
                else NAME(mix)(1, 1, at + i, d, alpha + r, w, v);
            }
            r += R;
        }
    }
    for (long r = 0; r < rows; r++) {
        Element *to = p->attended + ((span.token + r / group) * m->heads + kv_head * group + r % group) * d;
        for (long i = 0; i < d; i += 16) NAME(put16)(to + i, _mm512_div_ps(_mm512_loadu_ps(out + r * d + i), _mm512_set1_ps(total[r])));
    }
}

static void NAME(run)(Crew *crew, const Model *m, const Step *s, const Span *spans, long span_count, const uint8_t *fresh, Adapting *adapting, char *at) {
    const long T = s->count, rows = T, d = m->head_dim, in_rows = (T + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    NAME(Pass) p = {.model = m, .step = s, .spans = spans, .fresh = fresh, .adapting = adapting};
    p.width = padded_to(GROUP, (m->heads + 2 * m->kv_heads) * d);
    p.padded = padded_to(GROUP, m->hidden);
    p.own_size = SPAN_ROWS * d;
    p.x = take_room(&at, rows * m->hidden * sizeof(float));
    p.y = take_room(&at, rows * p.padded * sizeof(float));
    p.qkv = take_room(&at, rows * p.width * sizeof(float));
    p.in = take_room(&at, rows * m->hidden * sizeof(Element));
    p.q = take_room(&at, rows * m->heads * d * sizeof(Element));
    p.attended = take_room(&at, rows * m->heads * d * sizeof(Element));
    p.inner = take_room(&at, rows * m->inner * sizeof(Element));
    p.own = take_room(&at, crew->threads * p.own_size * sizeof(float));
    const Bytes bytes = m->int8 ? take_bytes(&at, T, most_inputs(m)) : (Bytes){0};
    if (adapting) adapting->low = take_room(&at, (size_t)(rows * adapting->stride) * sizeof(Element));
    p.layer = m->layer;
    share(crew, in_rows, NAME(enter), &p);
    for (long l = 0; l < m->layers; l++) {
        const Layer *layer = p.layer = m->layer + l;
        p.next = l + 1 < m->layers ? layer + 1 : NULL;
        if (adapting) adapting->layer = l;
        NAME(product)(crew, p.width / GROUP, QKV, (NAME(Product)){.matrix = &layer->qkv, .from = p.in, .rows = T, .inputs = m->hidden, .bytes = bytes, .adapting = adapting,
                                                             .bias = layer->qkv_bias, .to = p.qkv, .to_stride = p.width});
        share(crew, T, NAME(place), &p);
        share(crew, span_count * m->kv_heads, NAME(attend), &p);
        NAME(product)(crew, p.padded / GROUP, O, (NAME(Product)){.matrix = &layer->o, .from = p.attended, .rows = T, .inputs = m->heads * d, .bytes = bytes, .adapting = adapting,
                                                              .bias = layer->o_bias, .to = p.y, .to_stride = p.padded});
        share(crew, in_rows, NAME(after_attention), &p);
        NAME(product)(crew, m->inner / (GROUP / 2), GATE_UP, (NAME(Product)){.matrix = &layer->gate_up, .from = p.in, .rows = T, .inputs = m->hidden, .bytes = bytes, .adapting = adapting,
                                                                    .inner = p.inner, .to_stride = m->inner, .activation = m->activation});
        NAME(product)(crew, p.padded / GROUP, DOWN, (NAME(Product)){.matrix = &layer->down, .from = p.inner, .rows = T, .inputs = m->inner, .bytes = bytes, .adapting = adapting,
                                                              .to = p.y, .to_stride = p.padded});
        share(crew, in_rows, NAME(after_feed), &p);
    }
    for (long i = 0; i < s->selected; i++) {
        const float *x = p.x + s->select[i] * m->hidden;
        __m512 factor = _mm512_set1_ps(inverse_rms(x, m->hidden, m->epsilon));
        for (long j = 0; j < m->hidden; j += 16)
            _mm512_storeu_ps(s->out + i * m->hidden + j, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + j), factor), _mm512_loadu_ps(m->final_norm + j)));
    }
}

/* ---- the output matrix, row-major: logits[row][n] ---- */

typedef struct {
    const Element *weights, *from; /* [vocabulary][hidden]; [rows][hidden] */
    long rows, hidden, vocabulary;
    float cap, *to;
} NAME(Head);

/* R rows by 4 outputs; the tail past a multiple of 16 words is masked */
static INLINE void NAME(dots)(const int R, const int N, const uint32_t *w, const uint32_t *x, long words, float out[TILE_ROWS][4]) {
    __m512 sum[TILE_ROWS][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) sum[r][n] = _mm512_setzero_ps();
    for (long k = 0; k < words; k += 16) {
        __mmask16 on = words - k >= 16 ? 0xffff : (__mmask16)((1u << (words - k)) - 1);
        __m512i part[4];
        UNROLL for (int n = 0; n < N; n++) part[n] = _mm512_maskz_loadu_epi32(on, w + n * words + k);
        UNROLL for (int r = 0; r < R; r++) {
            __m512i row = _mm512_maskz_loadu_epi32(on, x + r * words + k);
            UNROLL for (int n = 0; n < N; n++) sum[r][n] = DOT(sum[r][n], part[n], row);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) out[r][n] = sum16(sum[r][n]);
}

static float NAME(dot)(const Element *w, const Element *x, long elements, float cap) {
    float out[TILE_ROWS][4];
    NAME(dots)(1, 1, (const uint32_t *)w, (const uint32_t *)x, WORDS(elements), out);
    return capped(out[0][0], cap);
}

static void NAME(head)(void *with, long item, int worker) {
    const NAME(Head) *p = with;
    (void)worker;
    const long words = WORDS(p->hidden), end = (item + 1) * GROUP < p->vocabulary ? (item + 1) * GROUP : p->vocabulary;
    float out[TILE_ROWS][4];
    for (long row = 0; row < p->rows;) {
        int R = p->rows - row >= TILE_ROWS ? TILE_ROWS : p->rows - row >= 2 ? 2 : 1;
        const uint32_t *x = (const uint32_t *)(p->from + row * p->hidden);
        for (long n = item * GROUP; n < end;) {
            int N = end - n >= 4 ? 4 : 1;
            const uint32_t *w = (const uint32_t *)(p->weights + n * p->hidden);
            if (N == 4) {
                if (R == TILE_ROWS) NAME(dots)(TILE_ROWS, 4, w, x, words, out);
                else if (R == 2) NAME(dots)(2, 4, w, x, words, out);
                else NAME(dots)(1, 4, w, x, words, out);
            } else {
                if (R == TILE_ROWS) NAME(dots)(TILE_ROWS, 1, w, x, words, out);
                else if (R == 2) NAME(dots)(2, 1, w, x, words, out);
                else NAME(dots)(1, 1, w, x, words, out);
            }
            for (int r = 0; r < R; r++)
                for (int i = 0; i < N; i++) p->to[(row + r) * p->vocabulary + n + i] = capped(out[r][i], p->cap);
            n += N;
        }
        row += R;
    }
}

#undef NAME
#undef PAIR
#undef DOT
#undef Element
#undef WORDS
#undef ROWS_AT_ONCE
