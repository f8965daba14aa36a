/* Sixteen floats at a time: the few functions that a model needs, written out so that every compiler gives the same bits. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

static INLINE float first_lane(__m512 v) { return _mm_cvtss_f32(_mm512_castps512_ps128(v)); }

/* one fixed tree */
static INLINE float sum16(__m512 v) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}

/* e^x within 2 ulp; 1 at 0; below -87 it is 0 */
static INLINE __m512 exp16(__m512 x) {
    const __mmask16 small = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
    x = _mm512_min_ps(x, _mm512_set1_ps(88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_mask_blend_ps(small, _mm512_scalef_ps(p, n), _mm512_setzero_ps());
}

/* Near zero the odd series, since 1 - 2 / (1 + e^2x) would lose the small result. */
static INLINE __m512 tanh16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
    __m512 far = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(one, exp16(_mm512_mul_ps(x, two)))));
    __m512 s = _mm512_mul_ps(x, x);
    __m512 p = _mm512_set1_ps(-17.0f / 315);
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(2.0f / 15));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-1.0f / 3));
    __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(p, s), x, x);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(s, _mm512_set1_ps(0.01f), _CMP_LT_OQ), far, near);
}

static INLINE __m512 silu(__m512 x) {
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

static INLINE __m512 gelu(__m512 x) {
    __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    __m512 inside = _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x), _mm512_set1_ps(0.797884561f));
    __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    return _mm512_mul_ps(half, _mm512_add_ps(_mm512_set1_ps(1.0f), tanh16(inside)));
}

/* to bfloat16, to the nearest even; NaN stays NaN */
static INLINE __m256i narrow16(__m512 v) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    up = _mm512_mask_blend_epi32(nan, up, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}

static INLINE __m512i high_halves(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)); }

static INLINE float inverse_rms(const float *x, long n, float epsilon) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.0f / sqrtf(sum16(sum) / (float)n + epsilon);
}

/* lanes low..high of 0..15, both included */
static INLINE __mmask16 lanes_between(long low, long high) {
    if (high < 0 || low > 15 || low > high) return 0;
    unsigned mask = high >= 15 ? 0xffffu : (1u << (high + 1)) - 1;
    return (__mmask16)(low > 0 ? mask & ~((1u << low) - 1) : mask);
}

static INLINE float capped(float logit, float cap) { return cap > 0 ? cap * first_lane(tanh16(_mm512_set1_ps(logit / cap))) : logit; }
