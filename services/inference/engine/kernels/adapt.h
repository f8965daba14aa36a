/* Many adapters in one step: which rows are whose, and which part of a packed matrix an output belongs to.
 *
 * A row's low-rank side is computed where its input is: at once in the row-wise phases before qkv and gate_up, and by adapter before o and
 * down, so that each `down` is read once however its rows are strewn. Its `up` is added where the base's outputs are still in registers. A
 * row without an adapter takes no other path than in a step without any.
 *
 * A small batch leaves memory idle while it multiplies the base: what the adapters' next products read is asked for meanwhile.
 */

/* rows of one adapter that are multiplied together */
typedef struct {
    int32_t slot, first, count; /* order[first .. first + count) */
} Stretch;

enum { AHEAD = 32 }; /* adapters whose weights are asked for ahead: more would push each other out of the cache */

typedef struct {
    const Model *model;
    const Step *step;
    int32_t *order; /* rows with an adapter, by slot */
    Stretch *stretches;
    long count; /* of stretches */
    const Adapter *distinct[AHEAD];
    long distinct_count;
    void *low;  /* [rows][stride] elements */
    long stride, layer, which, parts;
    long second, third; /* 16-output panels at which the second and third part begin */
} Adapting;

static void arrange(Adapting *a) {
    int32_t n = 0;
    for (int32_t slot = 1; slot <= a->step->adapter_slots; slot++) {
        if (!a->step->adapter[slot].layer) continue;
        int32_t first = n;
        const int32_t before = n;
        for (int32_t t = 0; t < a->step->count; t++)
            if (a->step->adapters[t] == slot) a->order[n++] = t;
        for (; first < n; first += STRETCH_ROWS)
            a->stretches[a->count++] = (Stretch){slot, first, n - first < STRETCH_ROWS ? n - first : STRETCH_ROWS};
        if (n > before && a->distinct_count < AHEAD) a->distinct[a->distinct_count++] = a->step->adapter + slot;
    }
}

static INLINE long parts_of(long which) { return which == QKV ? 3 : which == GATE_UP ? 2 : 1; }

static void place_parts(Adapting *a, long which) {
    const Model *m = a->model;
    a->which = which;
    a->parts = parts_of(which);
    a->second = m->heads * m->head_dim / 16;
    a->third = a->second + m->kv_heads * m->head_dim / 16;
}

/* of panel n of a group */
static INLINE long part_of(const Adapting *a, long group, long n) {
    if (a->which == GATE_UP) return n / 2;
    if (a->which != QKV) return 0;
    const long panel = group * (GROUP / 16) + n;
    return (panel >= a->second) + (panel >= a->third);
}

/* cache lines to ask for while a group of outputs is computed: of each adapter this group's `up`, then a share of the next product's `down` */
typedef struct {
    const Adapting *of;
    const char *at;
    long left, turn, group, groups;
} Ahead;

static void look_further(Ahead *ahead) {
    const Adapting *a = ahead->of;
    const Model *m = a->model;
    const long element = m->wide ? 4 : 2, count = a->distinct_count;
    ahead->left = 0;
    while (!ahead->left && ahead->turn < 2 * count) {
        const long turn = ahead->turn++;
        const Adapter *adapter = a->distinct[turn < count ? turn : turn - count];
        if (turn < count) {
            const LowRank *own = adapter->layer[a->layer] + a->which;
            const long bytes = adapter->rank * element * GROUP;
            if (!own->down) continue;
            ahead->at = (const char *)own->up + ahead->group * bytes;
            ahead->left = bytes / 64;
        } else {
            const long which = (a->which + 1) % ADAPTED, layer = a->layer + (a->which == DOWN);
            if (layer == m->layers) return;
            const LowRank *next = adapter->layer[layer] + which;
            const long inputs = which == O ? m->heads * m->head_dim : which == DOWN ? m->inner : m->hidden;
            const long lines = parts_of(which) * adapter->rank * inputs * element / 64;
            if (!next->down) continue;
            const long first = lines * ahead->group / ahead->groups;
            ahead->at = (const char *)next->down + first * 64;
            ahead->left = lines * (ahead->group + 1) / ahead->groups - first;
        }
    }
}

static INLINE void look_ahead(Ahead *ahead) {
    if (!ahead->left) return;
    _mm_prefetch(ahead->at, _MM_HINT_T1);
    ahead->at += 64;
    if (!--ahead->left) look_further(ahead);
}
