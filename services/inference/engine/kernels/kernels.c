/* The fused forward pass of a decoder-only model on AVX-512: one call a step. Plain C, no dependency but POSIX threads. */
#include "lanes.h"

#include "crew.h"
#include "model.h"

#include <string.h>

enum { TILE_ROWS = 6, MAX_HEAD = 512, SPAN_ROWS = 64, SHORTLIST = 32768, SCREEN_GROUPS = 8 };

#define SPREAD 3.0f /* times its root mean square: where an activation starts to need a second byte */

/* neighbouring queries of one sequence */
typedef struct {
    int32_t sequence, count;
    int64_t token, position; /* of the first */
} Span;

typedef struct {
    Crew *crew;
    char *room; /* scratch, kept between steps */
    size_t size;
} Engine;

static INLINE long padded_to(long unit, long n) { return (n + unit - 1) / unit * unit; }

static INLINE void *take_room(char **at, size_t bytes) {
    void *here = *at;
    *at += padded_to(64, (long)bytes);
    return here;
}

#define WIDE 0
#include "step.h"
#undef WIDE
#define WIDE 1
#include "step.h"
#undef WIDE

#include "screen.h"

static int reserve(Engine *engine, size_t size) {
    if (size <= engine->size) return 0;
    free(engine->room);
    engine->size = 0;
    engine->room = aligned_alloc(4096, (size_t)padded_to(4096, (long)size));
    if (!engine->room) return -1;
    engine->size = size;
    return 0;
}

Engine *argosy_open(int64_t threads) {
    Engine *engine = calloc(1, sizeof *engine);
    if (engine && !(engine->crew = muster((int)threads))) {
        free(engine);
        return NULL;
    }
    return engine;
}

void argosy_close(Engine *engine) {
    disband(engine->crew, engine->crew->threads - 1);
    free(engine->room);
    free(engine);
}

/* 0, or -1 when memory is short: nothing was written then. */
int64_t argosy_step(Engine *engine, const Model *m, const Step *s) {
    const long element = m->wide ? 4 : 2, T = s->count, d = m->head_dim, group = m->heads / m->kv_heads;
    const long width = padded_to(GROUP, (m->heads + 2 * m->kv_heads) * d), padded = padded_to(GROUP, m->hidden);
    long per_span = 16 / group < 1 ? 1 : 16 / group;
    size_t span_bytes = (size_t)padded_to(64, T * (long)sizeof(Span));
    size_t bytes = (size_t)T * ((m->hidden + padded + width) * 4 + (m->hidden + 2 * m->heads * d + m->inner) * element) + span_bytes +
                   (size_t)engine->crew->threads * SPAN_ROWS * d * 4 + (size_t)T + 16 * 64;
    if (reserve(engine, bytes)) return -1;
    char *at = engine->room;
    Span *spans = take_room(&at, span_bytes);
    uint8_t *fresh = take_room(&at, (size_t)T);
    long span_count = 0;
    memset(fresh, 0, (size_t)T);
    for (long b = 0; b < s->sequences; b++) {
        const long from = s->rows[b], to = s->rows[b + 1], start = s->lengths[b] - (to - from);
        for (long t = from; t < to; t += per_span)
            spans[span_count++] = (Span){(int32_t)b, (int32_t)(to - t < per_span ? to - t : per_span), t, start + t - from};
        if (to > from) fresh[to - 1] = (s->lengths[b] - 1) / BLOCK * BLOCK >= start;
    }
    if (m->wide) run_float(engine->crew, m, s, spans, span_count, fresh, at);
    else run_bfloat(engine->crew, m, s, spans, span_count, fresh, at);
    return 0;
}

/* out[row][n] = capped(head[n] . from[row]); from: elements of the model's type, made of hidden by argosy_narrow */
void argosy_logits(Engine *engine, const Model *m, const void *from, int64_t rows, float cap, float *out) {
    const long items = (m->vocabulary + GROUP - 1) / GROUP;
    if (m->wide) {
        Head_float head = {m->head, from, rows, m->hidden, m->vocabulary, cap, out};
        share(engine->crew, items, head_float, &head);
    } else {
        Head_bfloat head = {m->head, from, rows, m->hidden, m->vocabulary, cap, out};
        share(engine->crew, items, head_bfloat, &head);
    }
}

typedef struct {
    uint32_t *to;
    const uint32_t *from;
    long rows, words, padded_words, group_rows, first_group, stride_groups, lane;
} Packing;

/* 64 outputs: lanes lane.. of group first_group + item * stride_groups take group_rows rows */
static void pack_group(void *with, long item, int worker) {
    const Packing *p = with;
    (void)worker;
    uint32_t *base = p->to + (size_t)(p->first_group + item) * p->padded_words * GROUP + p->lane;
    long from_row = item * p->group_rows;
    for (long k = 0; k < p->words; k++)
        for (long lane = 0; lane < p->group_rows && from_row + lane < p->rows; lane++)
            base[k * GROUP + lane] = p->from[(size_t)(from_row + lane) * p->words + k];
}

/* Put the rows of one matrix into a zeroed packed one, `group_rows` to each group from `first_group`, starting at `lane`. */
void argosy_pack(Engine *engine, void *to, const void *from, int64_t rows, int64_t words, int64_t padded_words, int64_t group_rows,
                 int64_t first_group, int64_t lane) {
    Packing p = {.to = to, .from = from, .rows = rows, .words = words, .padded_words = padded_words, .group_rows = group_rows,
                 .first_group = first_group, .lane = lane};
    share(engine->crew, (rows + group_rows - 1) / group_rows, pack_group, &p);
}

/* ---- screening ---- */

typedef struct {
    const Model *model;
    int8_t *packed;
    int32_t *offset;
    float *scale, *rest, *norm;
    float *rows; /* [worker][hidden] */
} Quantising;

/* one group of 64 rows of the output matrix; rows past the vocabulary stay zero */
static void quantise_group(void *with, long group, int worker) {
    const Quantising *p = with;
    const long n = p->model->hidden, end = (group + 1) * GROUP < p->model->vocabulary ? (group + 1) * GROUP : p->model->vocabulary;
    float *row = p->rows + worker * n;
    for (long id = group * GROUP; id < end; id++) {
        __m512 high = _mm512_setzero_ps(), squares = high, rests = high;
        for (long i = 0; i < n; i += 16) {
            __m512 v = p->model->wide ? get16_float((const float *)p->model->head + (size_t)id * n + i)
                                      : get16_bfloat((const uint16_t *)p->model->head + (size_t)id * n + i);
            _mm512_storeu_ps(row + i, v);
            high = _mm512_max_ps(high, _mm512_abs_ps(v));
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        const float scale = _mm512_reduce_max_ps(high) / 127, inverse = scale > 0 ? 1 / scale : 0;
        int32_t *to = (int32_t *)(p->packed + (size_t)group * n * GROUP) + id % GROUP;
        __m512i sum = _mm512_setzero_si512();
        for (long i = 0; i < n; i += 16) {
            __m512 v = _mm512_loadu_ps(row + i);
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
            sum = _mm512_add_epi32(sum, q);
            __m512 e = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale), v);
            rests = _mm512_fmadd_ps(e, e, rests);
            int32_t four[4];
            _mm_storeu_si128((__m128i *)four, _mm512_cvtsepi32_epi8(q));
            for (int k = 0; k < 4; k++) to[(i / 4 + k) * GROUP] = four[k];
        }
        p->offset[id] = -128 * _mm512_reduce_add_epi32(sum);
        p->scale[id] = scale;
        p->rest[id] = sqrtf(sum16(rests)) * 1.0001f; /* float32 rounding of the sums themselves */
        p->norm[id] = sqrtf(sum16(squares)) * 1.0001f;
    }
}

/* Fill the int8 form of the output matrix. 0, or -1 when memory is short. `packed` and the vectors are padded to 64 rows and zeroed. */
int64_t argosy_quantise(Engine *engine, const Model *m, int8_t *packed, int32_t *offset, float *scale, float *rest, float *norm) {
    Quantising p = {m, packed, offset, scale, rest, norm, malloc((size_t)engine->crew->threads * m->hidden * sizeof(float))};
    if (!p.rows) return -1;
    share(engine->crew, (m->vocabulary + GROUP - 1) / GROUP, quantise_group, &p);
    free(p.rows);
    return 0;
}

/* One row of activations to u * (256 high + low); returns |u p| / u and |f| / u. */
static void quantise_activation(const Model *m, const void *from, float *room, uint8_t *low, int8_t *high, float *length, float *rest) {
    const long n = m->hidden;
    __m512 squares = _mm512_setzero_ps(), lengths = squares, rests = squares;
    for (long i = 0; i < n; i += 16) {
        __m512 v = m->wide ? get16_float((const float *)from + i) : get16_bfloat((const uint16_t *)from + i);
        _mm512_storeu_ps(room + i, v);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float size = sqrtf(sum16(squares)), unit = size / sqrtf((float)n) * (SPREAD / 127), inverse = unit > 0 ? 1 / unit : 0;
    for (long i = 0; i < n; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(room + i), _mm512_set1_ps(inverse));
        __m512i p = _mm512_cvtps_epi32(v);
        __m512i h = _mm512_srai_epi32(_mm512_add_epi32(p, _mm512_set1_epi32(128)), 8), l = _mm512_sub_epi32(p, _mm512_slli_epi32(h, 8));
        __m512 back = _mm512_cvtepi32_ps(p), f = _mm512_sub_ps(v, back);
        lengths = _mm512_fmadd_ps(back, back, lengths);
        rests = _mm512_fmadd_ps(f, f, rests);
        _mm_storeu_si128((__m128i *)(low + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(l, _mm512_set1_epi32(128))));
        _mm_storeu_si128((__m128i *)(high + i), _mm512_cvtsepi32_epi8(h));
    }
    /* The last term covers the float32 rounding of the exact logit: at most n * 2^-24 * |w| |x|, and as much again for this sum's own. */
    *length = sqrtf(sum16(lengths)) * 1.0001f;
    *rest = sqrtf(sum16(rests)) * 1.0001f + 2 * (float)n * 0x1p-24f * size * inverse;
}

static long collect_outliers(const int8_t *high, long n, Outlier *to) {
    long found = 0;
    for (long step = 0; step < n / 4; step++)
        for (int negative = 0; negative < 2; negative++) {
            uint32_t sizes = 0;
            for (int i = 0; i < 4; i++) {
                const int value = negative ? -high[step * 4 + i] : high[step * 4 + i];
                if (value > 0) sizes |= (uint32_t)value << (8 * i);
            }
            if (sizes) to[found++] = (Outlier){(int32_t)step, negative, sizes};
        }
    return found;
}

/* The `count` largest logits of each row, exact, best first, ties to the lower id. 0; -1 when memory is short; -2 without AVX512-VNNI. */
int64_t argosy_candidates(Engine *engine, const Model *m, const Screen *screen, const void *from, int64_t rows, int64_t count, float cap,
                          float *logits, int64_t *ids, int64_t *examined) {
#ifndef __AVX512VNNI__
    (void)engine, (void)m, (void)screen, (void)from, (void)rows, (void)count, (void)cap, (void)logits, (void)ids, (void)examined;
    return -2;
#else
    const long n = m->hidden, workers = engine->crew->threads, room = SHORTLIST + 4 * count;
    const size_t lists = (size_t)(workers * rows) * sizeof(Shortlist), heaps = (size_t)(workers * rows * count) * sizeof(float);
    const size_t entries = (size_t)(workers * rows * room) * sizeof(Candidate);
    const size_t per_row = (size_t)(n + n / 2 * (long)sizeof(Outlier) + 2 * 4 + 8);
    if (reserve(engine, lists + heaps + entries + (size_t)rows * per_row + (size_t)n * 5 + 16 * 64)) return -1;
    char *at = engine->room;
    Shortlist *list = take_room(&at, lists);
    float *heap = take_room(&at, heaps);
    Candidate *entry = take_room(&at, entries);
    uint8_t *low = take_room(&at, (size_t)(rows * n));
    int8_t *high = take_room(&at, (size_t)n);
    Outlier *outliers = take_room(&at, (size_t)(rows * n / 2) * sizeof *outliers);
    long *first = take_room(&at, (size_t)(rows + 1) * sizeof *first);
    float *length = take_room(&at, (size_t)rows * 4), *rest = take_room(&at, (size_t)rows * 4), *room_row = take_room(&at, (size_t)n * 4);
    for (long i = 0; i < workers * rows; i++) list[i] = (Shortlist){.best = heap + i * count, .list = entry + i * room};
    const size_t element = m->wide ? 4 : 2;
    long found = 0;
    for (long row = 0; row < rows; row++) {
        quantise_activation(m, (const char *)from + (size_t)(row * n) * element, room_row, low + row * n, high, length + row, rest + row);
        first[row] = found;
        found += collect_outliers(high, n, outliers + found);
    }
    first[rows] = found;
    Search search = {screen, m, low, outliers, first, length, rest, from, rows, count, room, cap, list, (int)workers, logits, ids, examined};
    share(engine->crew, (m->vocabulary + SCREEN_GROUPS * GROUP - 1) / (SCREEN_GROUPS * GROUP), screen_groups, &search);
    share(engine->crew, rows, decide, &search);
    return 0;
#endif
}
