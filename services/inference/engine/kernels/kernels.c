/* The fused forward pass of a decoder-only model on AVX-512: one call a step. Plain C, no dependency but POSIX threads. */
#include "lanes.h"

#include "crew.h"
#include "model.h"

#include <string.h>

enum { TILE_ROWS = 6, THIN_ROWS = 4, STRETCH_ROWS = 32, MAX_HEAD = 512, SPAN_ROWS = 64, SHORTLIST = 32768, SCREEN_GROUPS = 8 };

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

/* rows of one matrix on their way to int8 */
typedef struct {
    Matrix matrix;
    float *rest, *norm;
    const void *from;
    long rows, inputs, group_rows, first_group, lane;
} Quantising;

static INLINE long most_inputs(const Model *m) {
    const long most = m->heads * m->head_dim > m->inner ? m->heads * m->head_dim : m->inner;
    return most > m->hidden ? most : m->hidden;
}

#include "adapt.h"
#include "int8.h"

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
    const long low = s->adapters ? 3 * s->adapter_rank : 0; /* of a row */
    size_t bytes = (size_t)T * ((m->hidden + padded + width) * 4 + (m->hidden + 2 * m->heads * d + m->inner) * element) + span_bytes +
                   (size_t)engine->crew->threads * SPAN_ROWS * d * 4 + (size_t)T + 16 * 64 + (m->int8 ? bytes_size(T, most_inputs(m)) : 0) +
                   (s->adapters ? (size_t)T * (low * element + sizeof(Stretch) + 4) : 0);
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
    Adapting adapting = {.model = m, .step = s, .stride = low}, *adapted = s->adapters ? &adapting : NULL;
    if (adapted) {
        adapting.order = take_room(&at, (size_t)T * sizeof(int32_t));
        adapting.stretches = take_room(&at, (size_t)T * sizeof(Stretch));
        arrange(&adapting);
    }
    if (m->wide) run_float(engine->crew, m, s, spans, span_count, fresh, adapted, at);
    else run_bfloat(engine->crew, m, s, spans, span_count, fresh, adapted, at);
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

/* ---- int8 ---- */

/* Fill rows of an int8 matrix, placed as by argosy_pack; `inputs` is a multiple of 16. `rest` and `norm` of a Screen, or NULL. */
void argosy_quantise(Engine *engine, const Matrix *to, float *rest, float *norm, const void *from, int64_t wide, int64_t rows, int64_t inputs,
                     int64_t group_rows, int64_t first_group, int64_t lane) {
    Quantising p = {.matrix = *to, .rest = rest, .norm = norm, .from = from, .rows = rows, .inputs = inputs, .group_rows = group_rows,
                    .first_group = first_group, .lane = lane};
    share(engine->crew, (rows + group_rows - 1) / group_rows, wide ? quantise_float : quantise_bfloat, &p);
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
    if (reserve(engine, lists + heaps + entries + bytes_size(rows, n) + (size_t)rows * 8 + 16 * 64)) return -1;
    char *at = engine->room;
    Shortlist *list = take_room(&at, lists);
    float *heap = take_room(&at, heaps);
    Candidate *entry = take_room(&at, entries);
    const Bytes bytes = take_bytes(&at, rows, n);
    float *length = take_room(&at, (size_t)rows * 4), *rest = take_room(&at, (size_t)rows * 4);
    for (long i = 0; i < workers * rows; i++) list[i] = (Shortlist){.best = heap + i * count, .list = entry + i * room};
    for (long row = 0; row < rows; row++) {
        if (m->wide) shrink_row_float(&bytes, row, (const float *)from + row * n, length + row, rest + row);
        else shrink_row_bfloat(&bytes, row, (const uint16_t *)from + row * n, length + row, rest + row);
    }
    Search search = {screen, m, bytes, length, rest, from, rows, count, room, cap, list, (int)workers, logits, ids, examined};
    share(engine->crew, (m->vocabulary + SCREEN_GROUPS * GROUP - 1) / (SCREEN_GROUPS * GROUP), screen_groups, &search);
    share(engine->crew, rows, decide, &search);
    return 0;
#endif
}
