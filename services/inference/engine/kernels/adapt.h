/* Many adapters in one step: which rows are whose, and which part of a packed matrix an output belongs to.
 *
 * A row's low-rank side is computed once a product, by adapter, so that each `down` is read once however its rows are strewn; its `up` is
 * added where the base's outputs are still in registers. A row without an adapter takes no other path than in a step without any.
 */

/* rows of one adapter that are multiplied together */
typedef struct {
    int32_t slot, first, count; /* order[first .. first + count) */
} Stretch;

typedef struct {
    const Model *model;
    const Step *step;
    int32_t *order; /* rows with an adapter, by slot */
    Stretch *stretches;
    long count; /* of stretches */
    void *low;  /* [rows][stride] elements */
    long stride, layer, which, parts;
    long second, third; /* 16-output panels at which the second and third part begin */
} Adapting;

static void arrange(Adapting *a) {
    int32_t n = 0;
    for (int32_t slot = 1; slot <= a->step->adapter_slots; slot++) {
        if (!a->step->adapter[slot].layer) continue;
        int32_t first = n;
        for (int32_t t = 0; t < a->step->count; t++)
            if (a->step->adapters[t] == slot) a->order[n++] = t;
        for (; first < n; first += STRETCH_ROWS)
            a->stretches[a->count++] = (Stretch){slot, first, n - first < STRETCH_ROWS ? n - first : STRETCH_ROWS};
    }
}

static void place_parts(Adapting *a, long which) {
    const Model *m = a->model;
    a->which = which;
    a->parts = which == QKV ? 3 : which == GATE_UP ? 2 : 1;
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
