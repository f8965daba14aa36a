/* The largest logits without reading the whole output matrix in full precision, and exact all the same.
 *
 * Weights w and activations x are held as w = s q + e and x = u p + f, with q and p as in int8.h. Then
 *     w.x = s u q.p + e.(u p) + w.f   and so   |w.x - s u q.p| <= |e| |u p| + |w| |f|
 * and every logit has a lower and an upper bound. Rows whose upper bound misses the count-th best lower bound cannot be among the count
 * best; the others are computed exactly with the real weights. All is done for each row alone.
 */
typedef struct {
    float upper;
    int32_t id;
} Candidate;

typedef struct {
    float *best; /* min-heap of the `count` best lower bounds */
    long have, kept;
    int overflown;
    Candidate *list;
} Shortlist;

typedef struct {
    const Screen *screen;
    const Model *model;
    Bytes bytes;
    const float *length, *rest; /* |u p| / u and |f| / u of each row */
    const void *from;           /* [rows][hidden] elements */
    long rows, count, room;
    float cap;
    Shortlist *lists; /* [worker][rows] */
    int workers;
    float *logits;
    int64_t *ids, *examined; /* [rows][count] both; [rows]: how many were computed exactly */
} Search;

static void sink(float *heap, long n, long at) {
    for (;;) {
        long least = at, left = 2 * at + 1;
        if (left < n && heap[left] < heap[least]) least = left;
        if (left + 1 < n && heap[left + 1] < heap[least]) least = left + 1;
        if (least == at) return;
        float swap = heap[at];
        heap[at] = heap[least];
        heap[least] = swap;
        at = least;
    }
}

static void offer(float *heap, long *have, long count, float value) {
    if (*have < count) {
        long at = (*have)++;
        heap[at] = value;
        while (at && heap[(at - 1) / 2] > heap[at]) {
            float swap = heap[at];
            heap[at] = heap[(at - 1) / 2];
            heap[(at - 1) / 2] = swap;
            at = (at - 1) / 2;
        }
    } else if (value > heap[0]) {
        heap[0] = value;
        sink(heap, count, 0);
    }
}

static void admit(Shortlist *list, const Search *p, long id, float lower, float upper) {
    offer(list->best, &list->have, p->count, lower);
    if (list->kept == p->room) {
        float bar = list->have == p->count ? list->best[0] : -INFINITY;
        long kept = 0;
        for (long i = 0; i < list->kept; i++)
            if (!(list->list[i].upper < bar)) list->list[kept++] = list->list[i];
        list->kept = kept;
        if (kept == p->room) {
            list->overflown = 1;
            return;
        }
    }
    list->list[list->kept++] = (Candidate){upper, (int32_t)id};
}

static void admit_all(Shortlist *list, const Search *p, long id, unsigned in, __m512 upper, __m512 lower) {
    float above[16], below[16];
    _mm512_storeu_ps(above, upper);
    _mm512_storeu_ps(below, lower);
    for (; in && !list->overflown; in &= in - 1) {
        const int lane = __builtin_ctz(in);
        admit(list, p, id + lane, below[lane], above[lane]);
    }
}

#ifdef __AVX512VNNI__
static void screen_groups(void *with, long item, int worker) {
    const Search *p = with;
    const Screen *s = p->screen;
    const long groups = (p->model->vocabulary + GROUP - 1) / GROUP;
    int32_t sums[TILE_ROWS][GROUP];
    for (long group = item * SCREEN_GROUPS; group < groups && group < (item + 1) * SCREEN_GROUPS; group++)
        for (long row = 0; row < p->rows;) {
            const int R = byte_products(&s->matrix, group, &p->bytes, row, p->rows, sums);
            for (int r = 0; r < R; r++, row++) {
                Shortlist *list = p->lists + (long)worker * p->rows + row;
                UNROLL for (int n = 0; n < 4; n++) {
                    const long id = group * GROUP + 16 * n;
                    const __mmask16 on = lanes_between(0, p->model->vocabulary - id - 1);
                    const __m512 whole = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[r] + 16 * n));
                    __m512 score = _mm512_mul_ps(whole, _mm512_maskz_loadu_ps(on, s->matrix.scale + id));
                    __m512 bound = _mm512_mul_ps(_mm512_maskz_loadu_ps(on, s->norm + id), _mm512_set1_ps(p->rest[row]));
                    bound = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(on, s->rest + id), _mm512_set1_ps(p->length[row]), bound);
                    __m512 upper = _mm512_add_ps(score, bound);
                    __m512 bar = _mm512_set1_ps(list->have == p->count ? list->best[0] : -INFINITY);
                    unsigned in = _mm512_mask_cmp_ps_mask(on, upper, bar, _CMP_NLT_UQ); /* NaN stays in */
                    if (in) admit_all(list, p, id, in, upper, _mm512_sub_ps(score, bound));
                }
            }
        }
}
#endif

/* best first, ties to the lower id */
static void insert(float *logits, int64_t *ids, long *have, long count, float logit, int64_t id) {
    long at = *have;
    if (at == count) {
        if (!(logit > logits[at - 1] || (logit == logits[at - 1] && id < ids[at - 1]))) return;
        at--;
    } else (*have)++;
    for (; at && (logit > logits[at - 1] || (logit == logits[at - 1] && id < ids[at - 1])); at--) {
        logits[at] = logits[at - 1];
        ids[at] = ids[at - 1];
    }
    logits[at] = logit;
    ids[at] = id;
}

static INLINE float exact(const Search *p, long row, long id) {
    const long n = p->model->hidden;
    if (p->model->wide) return dot_float((const float *)p->model->head + (size_t)id * n, (const float *)p->from + row * n, n, p->cap);
    return dot_bfloat((const uint16_t *)p->model->head + (size_t)id * n, (const uint16_t *)p->from + row * n, n, p->cap);
}

static void decide(void *with, long row, int worker) {
    const Search *p = with;
    (void)worker;
    float *logits = p->logits + row * p->count;
    int64_t *ids = p->ids + row * p->count;
    long have = 0, all = 0;
    int overflown = 0;
    p->examined[row] = 0;
    float *heap = p->lists[row].best; /* the first worker's, grown by the others' */
    for (int w = 0; w < p->workers; w++) overflown |= p->lists[w * p->rows + row].overflown;
    if (overflown) { /* the bounds told too little apart: every row, exactly */
        for (long id = 0; id < p->model->vocabulary; id++) insert(logits, ids, &have, p->count, exact(p, row, id), id);
        p->examined[row] = p->model->vocabulary;
        return;
    }
    all = p->lists[row].have;
    for (int w = 1; w < p->workers; w++) {
        const Shortlist *list = p->lists + w * p->rows + row;
        for (long i = 0; i < list->have; i++) offer(heap, &all, p->count, list->best[i]);
    }
    const float bar = all == p->count ? heap[0] : -INFINITY;
    for (int w = 0; w < p->workers; w++) {
        const Shortlist *list = p->lists + w * p->rows + row;
        for (long i = 0; i < list->kept; i++)
            if (!(list->list[i].upper < bar)) {
                insert(logits, ids, &have, p->count, exact(p, row, list->list[i].id), list->list[i].id);
                p->examined[row]++;
            }
    }
}
