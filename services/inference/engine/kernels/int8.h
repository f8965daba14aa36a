/* Products of bytes, exact in int32: the screen of the output matrix and, where asked for, the layers.
 *
 * A row of weights is scale * q, q in int8. A row of activations is unit * (256 high + low): the unit is SPREAD times its root mean square
 * over 127, so most values fit the low byte; the few others have a high byte as well, in a list. vpdpbusd wants one unsigned operand: low is
 * offset by 128, which the weights' `offset` takes back. Integers add up the same in any order, and each row has its own unit.
 */
#define SPREAD 3.0f

/* high bytes of one sign in one step of four inputs */
typedef struct {
    int32_t step, negative;
    uint32_t sizes; /* four unsigned bytes */
} Outlier;

/* rows of activations */
typedef struct {
    uint8_t *low;      /* [rows][inputs], offset by 128 */
    Outlier *outliers; /* [rows][outlier_room(inputs)] */
    int32_t *outlying; /* [rows]: how many */
    float *unit;       /* [rows] */
    long inputs;
} Bytes;

/* Fewer than n / SPREAD^2 values can be SPREAD times the root mean square; one sixteen may add eight before it is noticed. */
static INLINE long outlier_room(long inputs) { return inputs / 8 + 8; }

static INLINE size_t bytes_size(long rows, long inputs) {
    return (size_t)rows * ((size_t)inputs + (size_t)outlier_room(inputs) * sizeof(Outlier) + 4 + 4) + 4 * 64;
}

static INLINE Bytes take_bytes(char **at, long rows, long inputs) {
    uint8_t *low = take_room(at, (size_t)(rows * inputs));
    Outlier *outliers = take_room(at, (size_t)(rows * outlier_room(inputs)) * sizeof *outliers);
    int32_t *outlying = take_room(at, (size_t)rows * sizeof *outlying);
    return (Bytes){low, outliers, outlying, take_room(at, (size_t)rows * sizeof(float)), inputs};
}

/* The list ends early only where the unit is not a number or rounds to none: such a row's results and bounds are not numbers either. */
static void note_outliers(const Bytes *to, long row, long at, __m512i high) {
    const __m512i zero = _mm512_setzero_si512();
    uint32_t above[4], below[4];
    _mm_storeu_si128((__m128i *)above, _mm512_cvtusepi32_epi8(_mm512_max_epi32(high, zero)));
    _mm_storeu_si128((__m128i *)below, _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_sub_epi32(zero, high), zero)));
    Outlier *list = to->outliers + row * outlier_room(to->inputs);
    int32_t found = to->outlying[row];
    if (found + 8 > outlier_room(to->inputs)) return;
    for (int k = 0; k < 4; k++) {
        if (above[k]) list[found++] = (Outlier){(int32_t)(at / 4 + k), 0, above[k]};
        if (below[k]) list[found++] = (Outlier){(int32_t)(at / 4 + k), 1, below[k]};
    }
    to->outlying[row] = found;
}

/* Sixteen values in units; adds to the squares of what was kept and of what was lost. */
static INLINE void shrink16(const Bytes *to, long row, long at, __m512 v, __m512 *lengths, __m512 *rests) {
    const __m512i offset = _mm512_set1_epi32(128), p = _mm512_cvtps_epi32(v);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(p, offset), 8), low = _mm512_sub_epi32(p, _mm512_slli_epi32(high, 8));
    const __m512 back = _mm512_cvtepi32_ps(p), lost = _mm512_sub_ps(v, back);
    *lengths = _mm512_fmadd_ps(back, back, *lengths);
    *rests = _mm512_fmadd_ps(lost, lost, *rests);
    _mm_storeu_si128((__m128i *)(to->low + row * to->inputs + at), _mm512_cvtepi32_epi8(_mm512_add_epi32(low, offset)));
    if (_mm512_test_epi32_mask(high, high)) note_outliers(to, row, at, high);
}

#ifdef __AVX512VNNI__
/* sum += 256 * (high . w): the unsigned operand is the size of the byte, its sign moves to the weights */
static INLINE void add_high(const Bytes *x, long row, const int32_t *w, int32_t sum[GROUP]) {
    const Outlier *each = x->outliers + row * outlier_room(x->inputs), *end = each + x->outlying[row];
    const __m512i zero = _mm512_setzero_si512();
    __m512i product[4] = {zero, zero, zero, zero};
    for (; each < end; each++) {
        const __m512i size = _mm512_set1_epi32((int)each->sizes);
        UNROLL for (int n = 0; n < 4; n++) {
            __m512i part = _mm512_load_si512(w + (long)each->step * GROUP + 16 * n);
            if (each->negative) part = _mm512_sub_epi8(zero, part);
            product[n] = _mm512_dpbusd_epi32(product[n], size, part);
        }
    }
    UNROLL for (int n = 0; n < 4; n++)
        _mm512_storeu_si512(sum + 16 * n, _mm512_add_epi32(_mm512_loadu_si512(sum + 16 * n), _mm512_slli_epi32(product[n], 8)));
}

static INLINE void byte_tile(const int R, const Bytes *x, long row, const int32_t *w, const int32_t *offset, int32_t out[TILE_ROWS][GROUP]) {
    const long steps = x->inputs / 4;
    const int32_t *low = (const int32_t *)(x->low + row * x->inputs);
    __m512i sum[TILE_ROWS][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < 4; n++) sum[r][n] = _mm512_loadu_si512(offset + 16 * n);
    for (long k = 0; k < steps; k++, w += GROUP) {
        __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 16), w2 = _mm512_load_si512(w + 32), w3 = _mm512_load_si512(w + 48);
        UNROLL for (int r = 0; r < R; r++) {
            __m512i four = _mm512_set1_epi32(low[r * steps + k]);
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], four, w0);
            sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], four, w1);
            sum[r][2] = _mm512_dpbusd_epi32(sum[r][2], four, w2);
            sum[r][3] = _mm512_dpbusd_epi32(sum[r][3], four, w3);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < 4; n++) _mm512_storeu_si512(out[r] + 16 * n, sum[r][n]);
}

/* out[r][n] = q[n] . p[row + r] for the 64 weight rows of a group and as many activations as a tile holds; returns how many */
static int byte_products(const Matrix *m, long group, const Bytes *x, long row, long rows, int32_t out[TILE_ROWS][GROUP]) {
    const int32_t *w = (const int32_t *)m->packed + (size_t)group * (size_t)(x->inputs / 4) * GROUP, *offset = m->offset + group * GROUP;
    const int R = (int)(rows - row >= TILE_ROWS ? TILE_ROWS : rows - row);
    switch (R) {
        case 1: byte_tile(1, x, row, w, offset, out); break;
        case 2: byte_tile(2, x, row, w, offset, out); break;
        case 3: byte_tile(3, x, row, w, offset, out); break;
        case 4: byte_tile(4, x, row, w, offset, out); break;
        case 5: byte_tile(5, x, row, w, offset, out); break;
        default: byte_tile(6, x, row, w, offset, out);
    }
    for (int r = 0; r < R; r++)
        if (x->outlying[row + r]) add_high(x, row + r, w, out[r]);
    return R;
}
#endif
