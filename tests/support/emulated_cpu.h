/* The AVX512 and AMX instructions that cpu.c uses, in plain C: its paths for CPUs that this machine is not, so that their
 * layouts, tails and strides are tested everywhere. Put before cpu.c by the compiler's -include. What real instructions do
 * otherwise (subnormal numbers become 0) does not matter to the tests. */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __AVX512F__ 1
#define __asm__(...) /* registers that are not there */
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps(a, b, c) emulated_fma(a, b, c)
static inline __m512 emulated_fma(__m512 a, __m512 b, __m512 c)
{
    for (int i = 0; i < 16; i++)
        c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}

static inline float emulated_wide(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

#ifdef EMULATE_BF16
#define __AVX512BF16__ 1
typedef uint16_t emulated_halves __attribute__((vector_size(32)));
typedef uint16_t emulated_pairs __attribute__((vector_size(64)));
#define __m512bh emulated_pairs
#define _mm512_cvtneps_pbh(x) emulated_narrow(x)
#define _mm512_dpbf16_ps(c, a, b) emulated_dot(c, a, b)
static inline emulated_halves emulated_narrow(__m512 x)
{
    emulated_halves y;
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        float one = x[i];
        memcpy(&bits, &one, sizeof bits);
        y[i] = one != one ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    return y;
}

static inline __m512 emulated_dot(__m512 c, emulated_pairs a, emulated_pairs b)
{
    for (int i = 0; i < 16; i++)
        for (int half = 1; half >= 0; half--)
            c[i] = fmaf(emulated_wide(a[2 * i + half]), emulated_wide(b[2 * i + half]), c[i]);
    return c;
}
#endif

#ifdef EMULATE_AMX
#define __AMX_BF16__ 1
static _Thread_local uint8_t emulated_tiles[8][16][64];
static _Thread_local int emulated_is_configured;
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) (emulated_is_configured = *(const uint8_t *)(p) == 1)
#define _tile_release() (emulated_is_configured = 0)
#define _tile_zero(t) memset(emulated_tiles[t], emulated_is_configured ? 0 : 0xFF, sizeof emulated_tiles[t])
#define _tile_loadd(t, p, step) emulated_copy(t, (void *)(p), step, 0)
#define _tile_stored(t, p, step) emulated_copy(t, p, step, 1)
#define _tile_dpbf16ps(c, a, b) emulated_product(c, a, b)
#define syscall(...) 0
static inline void emulated_copy(int tile, void *place, int64_t step, int is_out)
{
    for (int r = 0; r < 16; r++) {
        uint8_t *row = (uint8_t *)place + r * step;
        memcpy(is_out ? row : emulated_tiles[tile][r], is_out ? emulated_tiles[tile][r] : row, 64);
    }
}

static inline void emulated_product(int c, int a, int b)
{
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            memcpy(&sum, emulated_tiles[c][m] + 4 * n, sizeof sum);
            for (int k = 0; k < 16; k++)
                for (int half = 0; half < 2; half++) {
                    uint16_t left, right;
                    memcpy(&left, emulated_tiles[a][m] + 4 * k + 2 * half, sizeof left);
                    memcpy(&right, emulated_tiles[b][k] + 4 * n + 2 * half, sizeof right);
                    sum = fmaf(emulated_wide(left), emulated_wide(right), sum);
                }
            memcpy(emulated_tiles[c][m] + 4 * n, &sum, sizeof sum);
        }
}
#endif
