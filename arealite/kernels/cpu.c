/* CPU kernels for bf16 models. The server's: products with packed weights, attention over the page pool, norms, rotary,
 * gated units, sampling. The trainer's: the same with gradients, attention over a prefix tree, logprobs from logits.
 *
 * Compiled and called by cpu.py, for one of these instruction sets: AMX tiles (products; the rest as the next),
 * AVX512-BF16, AVX512, and whatever vectors the compiler has (AVX2, NEON, SSE). The rule that all keep: an element of a
 * result is one sum in one order, whatever is computed beside it. So a row has the same bits alone and among thousands,
 * in decode, in prefill and in the trainer's packed pass. Results are rounded to bf16 where PyTorch's operations do.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* LANES floats are a vector; WIDE vectors of a row stay in registers together, and are a panel of a packed weight. */
#if defined(__AVX512F__)
enum { LANES = 16, WIDE = 4 };
#elif defined(__AVX__)
enum { LANES = 8, WIDE = 2 };
#else
enum { LANES = 4, WIDE = 4 };
#endif
enum { PANEL = LANES * WIDE, ROWS_AT_ONCE = LANES == 8 ? 4 : 6 /* as many sums as the registers hold */ };
enum { PAGE = 16, ROWS = 4, PAGES_AT_ONCE = PANEL / PAGE, BLOCK = 256 };

typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t words __attribute__((vector_size(4 * LANES)));
typedef uint32_t naturals __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t loose_words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int32_t loose_word __attribute__((aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

/* ---- vectors ----------------------------------------------------------------------------------------------------- */

INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec load(const float *p) { return *(const loose_vec *)p; }
INLINE void store(float *p, vec x) { *(loose_vec *)p = x; }
INLINE words load_words(const void *p) { return *(const loose_words *)p; }
INLINE void store_words(void *p, words x) { *(loose_words *)p = x; }
INLINE vec choose(words mask, vec yes, vec no) { return (vec)((mask & (words)yes) | (~mask & (words)no)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

INLINE vec fma_of(vec a, vec b, vec c)
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vec widen(halves x) { return (vec)(__builtin_convertvector(x, naturals) << 16); }

INLINE halves narrow(vec x)
{
#if defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    naturals bits = (naturals)x;
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16; /* to the nearest, ties to even */
    words is_nan = x != x;
    return __builtin_convertvector((naturals)((words)bits & ~is_nan) | ((naturals)is_nan & 0x7FC0), halves);
#endif
}

INLINE vec rounded(vec x) { return widen(narrow(x)); }
INLINE vec get(const bf16 *p) { return widen(*(const loose_halves *)p); }
INLINE void put(bf16 *p, vec x) { *(loose_halves *)p = narrow(x); }

/* The first n of LANES elements, n > 0; `rest` in the others. */
INLINE vec load_first(const float *p, int64_t n, float rest)
{
    if (n >= LANES)
        return load(p);
    vec x = splat(rest);
    memcpy(&x, p, n * sizeof(float));
    return x;
}

INLINE vec get_first(const bf16 *p, int64_t n, float rest)
{
    if (n >= LANES)
        return get(p);
    halves x = narrow(splat(rest));
    memcpy(&x, p, n * sizeof(bf16));
    return widen(x);
}

INLINE void store_first(float *p, int64_t n, vec x)
{
    if (n >= LANES)
        store(p, x);
    else if (n > 0)
        memcpy(p, &x, n * sizeof(float));
}

INLINE void put_first(bf16 *p, int64_t n, vec x)
{
    halves y = narrow(x);
    if (n >= LANES)
        *(loose_halves *)p = y;
    else if (n > 0)
        memcpy(p, &y, n * sizeof(bf16));
}

INLINE float sum_of(vec x)
{
    float sum[LANES];
    store(sum, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            sum[i] += sum[i + n];
    return sum[0];
}

INLINE float max_of(vec x)
{
    float top = x[0];
    for (int i = 1; i < LANES; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

/* exp to about 1 ulp: 2^n times a polynomial (Cephes' coefficients) of what is left; 0 below -104, where floats end. */
INLINE vec exp_of(vec x)
{
    const float magic = 0x1.8p23f; /* adding it rounds to an integer, which then stands in the low bits */
    vec y = choose(x < -105.f, splat(-105.f), x);
    y = choose(y > 104.f, splat(104.f), y);
    vec shifted = fma_of(y, splat(0x1.715476p+0f), splat(magic)), n = shifted - magic;
    vec r = fma_of(n, splat(-0x1.62e400p-1f), y);
    r = fma_of(n, splat(-0x1.7f7d1cp-20f), r);
    vec p = fma_of(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = fma_of(p, r, splat(8.3334519073e-3f));
    p = fma_of(p, r, splat(4.1665795894e-2f));
    p = fma_of(p, r, splat(1.6666665459e-1f));
    p = fma_of(p, r, splat(5.0000001201e-1f));
    p = fma_of(r * r, p, r) + 1.f;
    words power = (words)shifted - (words)splat(magic), half = power >> 1; /* in two steps: one may be out of range */
    p = p * (vec)((half + 127) << 23) * (vec)((power - half + 127) << 23);
    return (vec)((words)p & ~(x < -104.f));
}

/* Pairs of bf16, LANES of them, and the sum of their products: both elements of a pair one after the other. */
INLINE words both_of(const bf16 *p)
{
    words x = *(const loose_word *)p - (words){0};
    /* A broadcast load, and what follows on vectors: GCC would shift before it, one by one. */
#if defined(__AVX512F__) && !defined(__AVX512BF16__)
    __asm__("" : "+v"(x));
#elif defined(__x86_64__) && !defined(__AVX512F__)
    __asm__("" : "+x"(x));
#elif defined(__ARM_NEON)
    __asm__("" : "+w"(x));
#endif
    return x;
}
INLINE vec low_of(words x) { return (vec)(x << 16); }
INLINE vec high_of(words x) { return (vec)(x & (words)((naturals){0} + 0xFFFF0000u)); }

/* sum[r][j] += x[r] * w[j]: a pair of each of `rows` rows, and `num` vectors of pairs. */
INLINE void add_pairs(const int rows, const int num, vec (*sum)[WIDE], const bf16 *const *x, const bf16 *const *w)
{
#if defined(__AVX512BF16__)
    __m512bh pairs[WIDE];
    for (int j = 0; j < num; j++)
        pairs[j] = (__m512bh)load_words(w[j]);
    for (int r = 0; r < rows; r++) {
        __m512bh own = (__m512bh)both_of(x[r]);
        for (int j = 0; j < num; j++)
            sum[r][j] = (vec)_mm512_dpbf16_ps((__m512)sum[r][j], own, pairs[j]);
    }
#else
    for (int half = 0; half < 2; half++) {
        vec part[WIDE];
        for (int j = 0; j < num; j++)
            part[j] = half ? high_of(load_words(w[j])) : low_of(load_words(w[j]));
        for (int r = 0; r < rows; r++) {
            vec own = half ? high_of(both_of(x[r])) : low_of(both_of(x[r]));
            for (int j = 0; j < num; j++)
                sum[r][j] = fma_of(own, part[j], sum[r][j]);
        }
    }
#endif
}

/* ---- products with a packed weight ---------------------------------------------------------------------------------
 * out [rows][n] = x [rows][k] times the transpose of a weight [n][k], k even. A packed weight stands in panels of columns,
 * [depth / 2][columns][2]; behind the last column and the last k come zeros, up to a whole panel and to `depth_of`. */

#if defined(__AMX_BF16__)
enum { COLUMNS = 32 }; /* two tiles side by side */
#else
enum { COLUMNS = PANEL };
#endif

INLINE int64_t depth_of(int64_t k) { return (k + 31) / 32 * 32; }

/* Puts a weight [n][k] into the panels from column `first` on. */
void pack(const bf16 *weight, bf16 *packed, int64_t n, int64_t k, int64_t first, int32_t threads)
{
    enum { AT_ONCE = 16 }; /* pairs of a column, a cache line: each line is read once */
#pragma omp parallel for num_threads(threads) if (threads > 1 && n * k > 1 << 16)
    for (int64_t c = 0; c < n; c += AT_ONCE) {
        int32_t part[AT_ONCE][AT_ONCE], *to[AT_ONCE];
        const int64_t num = n - c < AT_ONCE ? n - c : AT_ONCE;
        for (int64_t j = 0; j < num; j++) {
            const int64_t column = first + c + j;
            to[j] = (int32_t *)packed + column / COLUMNS * (depth_of(k) / 2) * COLUMNS + column % COLUMNS;
        }
        const int is_row = num == AT_ONCE && to[AT_ONCE - 1] == to[0] + AT_ONCE - 1;
        for (int64_t i = 0; i < k / 2; i += AT_ONCE) {
            const int64_t pairs = k / 2 - i < AT_ONCE ? k / 2 - i : AT_ONCE;
            for (int64_t j = 0; j < num; j++)
                memcpy(part[j], weight + (c + j) * k + 2 * i, pairs * sizeof(int32_t));
            for (int64_t p = 0; p < pairs; p++)
                if (is_row)
                    for (int64_t j = 0; j < AT_ONCE; j++)
                        to[0][(i + p) * COLUMNS + j] = part[j][p];
                else
                    for (int64_t j = 0; j < num; j++)
                        to[j][(i + p) * COLUMNS] = part[j][p];
        }
    }
}

/* `ahead`: where to begin asking for the next panel, `lines` cache lines per step. */
INLINE void product_rows(const int rows, const int lines, const bf16 *ahead, const bf16 *x, const bf16 *panel,
                         const bf16 *bias, bf16 *out, int64_t n, int64_t k, int64_t columns)
{
    vec sum[ROWS_AT_ONCE][WIDE];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < WIDE; j++)
            sum[r][j] = splat(0);
    for (int64_t i = 0; i < k; i += 2, panel += 2 * PANEL) {
        const bf16 *own[ROWS_AT_ONCE], *pairs[WIDE];
        for (int r = 0; r < rows; r++)
            own[r] = x + r * k + i;
        for (int j = 0; j < WIDE; j++)
            pairs[j] = panel + 2 * LANES * j;
        for (int j = 0; j < lines; j++, ahead += 32)
            __builtin_prefetch(ahead, 0, 2);
        add_pairs(rows, WIDE, sum, own, pairs);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < WIDE && LANES * j < columns; j++) {
            if (bias)
                sum[r][j] += get_first(bias + LANES * j, columns - LANES * j, 0);
            put_first(out + r * n + LANES * j, columns - LANES * j, sum[r][j]);
        }
}

/* Columns [0, columns) of one panel for `num` rows; rows of `out` are n apart. */
static void product_panel(const bf16 *x, const bf16 *panel, const bf16 *bias, bf16 *out, int64_t num, int64_t n,
                          int64_t k, int64_t columns)
{
    enum { LINES = PANEL / 16 }; /* of a step of the panel: four blocks of rows, two or one fetch the next panel */
    int64_t blocks = (num + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const int64_t lines = blocks >= 4 || LINES < 4 ? 1 : blocks >= 2 ? 2 : 4;
    const bf16 *ahead = panel + PANEL * k;
    for (int64_t row = 0, rows; row < num; row += rows, blocks--, ahead += lines * 16 * k) {
        rows = (num - row + blocks - 1) / blocks;
        const bf16 *from = x + row * k;
        bf16 *to = out + row * n;
#define RUN(r, l) product_rows(r, l, ahead, from, panel, bias, to, n, k, columns)
#define CASE(r)                                                                        \
    case r: {                                                                          \
        if (ahead >= panel + 2 * PANEL * k) RUN(r, 0);                                 \
        else if (lines == 1) RUN(r, 1);                                                \
        else if (lines == 2) RUN(r, 2);                                                \
        else RUN(r, 4);                                                                \
        break;                                                                         \
    }
        switch (rows) {
            CASE(1); CASE(2); CASE(3); CASE(4);
#if defined(__AVX512F__) || !defined(__AVX__)
            CASE(5); CASE(6);
#endif
        }
    }
}

#if defined(__AMX_BF16__)

struct __attribute__((packed)) tile_shapes { uint8_t palette, start, zero[14]; uint16_t width[16]; uint8_t rows[16]; };

/* Rows [0, rows) of x [32][depth], in lines of 32 elements one below the other, times 32 columns. Tiles are 16 rows of
 * 64 bytes: 0 to 3 add up, 4 and 5 are rows of x, 6 and 7 columns of the panel. */
static void product_tiles(const bf16 *x, const bf16 *panel, const bf16 *bias, bf16 *out, int64_t rows, int64_t n,
                          int64_t depth, int64_t columns)
{
    enum { LINE = 32, UPPER = 16 * LINE, STEP = 32 * LINE };
    float sums[32][32] __attribute__((aligned(64)));
    _tile_zero(0); _tile_zero(1);
    if (rows > 16) {
        _tile_zero(2); _tile_zero(3);
        for (int64_t i = 0; i < depth; i += LINE, x += STEP, panel += LINE * COLUMNS) {
            _tile_loadd(4, x, 64); _tile_loadd(6, panel, 128); _tile_loadd(7, panel + 32, 128);
            _tile_loadd(5, x + UPPER, 64);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, sums[16], 128); _tile_stored(3, sums[16] + 16, 128);
    } else
        for (int64_t i = 0; i < depth; i += LINE, x += STEP, panel += LINE * COLUMNS) {
            _tile_loadd(4, x, 64); _tile_loadd(6, panel, 128); _tile_loadd(7, panel + 32, 128);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        }
    _tile_stored(0, sums[0], 128); _tile_stored(1, sums[0] + 16, 128);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < 32 && j < columns; j += LANES) {
            vec sum = load(sums[r] + j);
            put_first(out + r * n + j, columns - j, bias ? sum + get_first(bias + j, columns - j, 0) : sum);
        }
}

/* x [num][k] as product_tiles reads it: blocks of 32 rows, [depth / 32][32][32], zeros where there is nothing. */
static void pack_rows(const bf16 *x, bf16 *packed, int64_t num, int64_t k)
{
    for (int64_t first = 0; first < num; first += 32, packed += 32 * depth_of(k))
        for (int64_t i = 0; i < k; i += 32)
            for (int64_t r = 0; r < 32; r++) {
                const int64_t real = first + r >= num ? 0 : k - i < 32 ? k - i : 32;
                bf16 line[32] = {0};
                if (real == 32)
                    memcpy(line, x + (first + r) * k + i, sizeof line);
                else
                    memcpy(line, x + (first + r) * k + i, real * sizeof(bf16));
                memcpy(packed + (i + r) * 32, line, sizeof line);
            }
}

static bf16 *own_rows(int64_t size)
{
    static _Thread_local bf16 *kept;
    static _Thread_local int64_t kept_size;
    if (size > kept_size) {
        free(kept);
        kept = aligned_alloc(64, size * sizeof(bf16));
        kept_size = size;
    }
    return kept;
}

void product(const bf16 *x, const bf16 *packed, const bf16 *bias, bf16 *out, int64_t num, int64_t n, int64_t k,
             int32_t threads)
{
    enum { ROWS_KEPT = 256 }; /* rows whose inputs stay in a core's second cache, while panels pass by */
    const int64_t panels = (n + COLUMNS - 1) / COLUMNS, depth = depth_of(k);
#pragma omp parallel num_threads(threads) if (threads > 1 && num * n * k > 1 << 20)
    {
        struct tile_shapes shapes;
        memset(&shapes, 0, sizeof shapes);
        shapes.palette = 1;
        for (int i = 0; i < 8; i++)
            shapes.width[i] = 64, shapes.rows[i] = 16;
        __asm__ volatile("" : : "r"(&shapes) : "memory"); /* the compiler does not know what tile instructions read */
        _tile_loadconfig(&shapes);
        bf16 *rows = own_rows(ROWS_KEPT * depth);
        for (int64_t first = 0; first < num; first += ROWS_KEPT) {
            const int64_t last = num - first < ROWS_KEPT ? num - first : ROWS_KEPT;
            pack_rows(x + first * k, rows, last, k);
            __asm__ volatile("" : : : "memory");
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < panels; p++)
                for (int64_t r = 0, at = p * COLUMNS; r < last; r += 32)
                    product_tiles(rows + r * depth, packed + at * depth, bias ? bias + at : 0,
                                  out + (first + r) * n + at, last - r < 32 ? last - r : 32, n, depth, n - at);
        }
        _tile_release();
    }
}

#else

void product(const bf16 *x, const bf16 *packed, const bf16 *bias, bf16 *out, int64_t num, int64_t n, int64_t k,
             int32_t threads)
{
    enum { ROWS_KEPT = 128 }; /* rows whose inputs stay in a core's second cache, while panels pass by */
    const int64_t panels = (n + COLUMNS - 1) / COLUMNS, depth = depth_of(k);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && num * n * k > 1 << 20)
    for (int64_t p = 0; p < panels * ((num + ROWS_KEPT - 1) / ROWS_KEPT); p++) {
        const int64_t at = p % panels * COLUMNS, first = p / panels * ROWS_KEPT;
        const int64_t rows = num - first < ROWS_KEPT ? num - first : ROWS_KEPT;
        product_panel(x + first * k, packed + at * depth, bias ? bias + at : 0, out + first * n + at, rows, n, k,
                      n - at);
    }
}

#endif

/* Whether the operating system lets this process use what the library was compiled for. */
int32_t is_allowed(void)
{
#if defined(__AMX_BF16__) && defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
#else
    return 1;
#endif
}

/* ---- attention over pages -------------------------------------------------------------------------------------------
 * A page holds 16 tokens of one key head. Keys lie as [dim / 2][token][2] and values as [token / 2][dim][2]: pairs that are
 * added up together lie side by side. */

struct piece { int32_t first, start, count, table; }; /* tokens [first, first + count) of the pass, at positions
    start ... of a sequence whose page numbers begin at tables[table] */

struct attention {
    const struct piece *pieces;
    const int32_t *tables;
    int64_t num_pieces, max_keys, heads, kv_heads, dim, pool_pages, window; /* window: keys seen at most; 0 for all */
    float scale;
    int32_t threads;
};

struct pages { const bf16 *base; const int32_t *table; int64_t first, num; }; /* those that a query reads */

struct rows { const bf16 *base; int64_t head, token; }; /* [heads][tokens][dim] with these strides */

INLINE const bf16 *row_of(const struct rows *x, int64_t head, int64_t token)
{
    return x->base + head * x->head + token * x->token;
}

static void store_piece(const struct attention *a, const struct piece *p, int64_t head, const struct rows *k,
                        const struct rows *v, bf16 *keys, bf16 *values)
{
    for (int64_t i = 0; i < p->count; i++) {
        int64_t position = p->start + i, slot = position % PAGE;
        int64_t page = (head * a->pool_pages + a->tables[p->table + position / PAGE]) * PAGE * a->dim;
        const bf16 *key = row_of(k, head, p->first + i), *value = row_of(v, head, p->first + i);
        bf16 *to = keys + page + 2 * slot, *row = values + page + slot / 2 * 2 * a->dim + slot % 2;
        for (int64_t d = 0; d < a->dim; d += 2)
            memcpy(to + d * PAGE, key + d, 2 * sizeof(bf16));
        for (int64_t d = 0; d < a->dim; d++)
            row[2 * d] = value[d];
    }
}

/* Scores of `rows` queries with `num` pages of keys, rounded to bf16 as the product's result, then scaled. Meanwhile the
 * pages of values, `ahead` elements further on, are asked for: pages lie anywhere, which no hardware foresees. */
INLINE void scores_of(const int rows, const int num, const bf16 *const *q, const bf16 *const *pages, int64_t dim,
                      float scale, float *out, int64_t stride, int64_t ahead)
{
    enum { VECS = PAGE / LANES }; /* of a page */
    vec sum[ROWS][WIDE];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < num * VECS; j++)
            sum[r][j] = splat(0);
    for (int64_t d = 0; d < dim; d += 2) {
        const bf16 *own[ROWS], *pairs[WIDE];
        for (int r = 0; r < rows; r++)
            own[r] = q[r] + d;
        for (int j = 0; j < num * VECS; j++)
            pairs[j] = pages[j / VECS] + d * PAGE + j % VECS * 2 * LANES;
        for (int n = 0; n < num; n++)
            __builtin_prefetch(pages[n] + d * PAGE + ahead, 0, 3);
        add_pairs(rows, num * VECS, sum, own, pairs);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < num * VECS; j++)
            store(out + r * stride + j * LANES, rounded(sum[r][j]) * scale);
}

/* Dims [LANES * at, LANES * (at + num)) of the sums of values weighted by bf16 probabilities. Meanwhile the next keys are
 * asked for. */
INLINE void values_of(const int rows, const int num, const bf16 *probs, int64_t stride, const bf16 *values,
                      const int32_t *table, int64_t num_pages, int64_t dim, int64_t at, bf16 *const *out,
                      const struct pages *next)
{
    vec sum[ROWS][WIDE];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < num; j++)
            sum[r][j] = splat(0);
    for (int64_t i = 0; i < num_pages; i++) {
        const bf16 *from = values + table[i] * PAGE * dim + 2 * LANES * at, *weight = probs + i * PAGE;
        const bf16 *ahead = i < next->num ? next->base + next->table[i] * PAGE * dim + 2 * LANES * at : from;
        for (int64_t t = 0; t < PAGE; t += 2, from += 2 * dim, ahead += 2 * dim) {
            const bf16 *own[ROWS], *pairs[WIDE];
            for (int r = 0; r < rows; r++)
                own[r] = weight + r * stride + t;
            for (int j = 0; j < num; j++)
                pairs[j] = from + 2 * LANES * j;
            for (int j = 0; j < num * LANES; j += 16)
                __builtin_prefetch(ahead + 2 * j, 0, 3);
            add_pairs(rows, num, sum, own, pairs);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < num; j++)
            put(out[r] + LANES * (at + j), sum[r][j]);
}

/* Softmax over the scores [low, high) of `num`, a multiple of 16, in place; then rounded into `probs`. */
static void softmax(float *scores, bf16 *probs, int64_t num, int64_t low, int64_t high)
{
    vec top = splat(-INFINITY), sum = splat(0);
    for (int64_t i = 0; i < low; i++)
        scores[i] = -INFINITY;
    for (int64_t i = high; i < num; i++)
        scores[i] = -INFINITY;
    for (int64_t at = 0; at < num; at += LANES)
        top = larger(top, load(scores + at));
    top = splat(max_of(top));
    for (int64_t at = 0; at < num; at += LANES) {
        vec x = exp_of(load(scores + at) - top);
        store(scores + at, x);
        sum += x;
    }
    const float share = 1.f / sum_of(sum);
    for (int64_t at = 0; at < num; at += LANES)
        put(probs + at, load(scores + at) * share);
}

/* The pages of `from`, one layer's keys or values, that hold what queries see whose sequences have so many keys. */
INLINE struct pages pages_of(const struct attention *a, const struct piece *p, int64_t head, const bf16 *from,
                             int64_t fewest, int64_t most)
{
    int64_t first = a->window && fewest > a->window ? (fewest - a->window) / PAGE : 0;
    return (struct pages){from + head * a->pool_pages * PAGE * a->dim, a->tables + p->table + first, first,
                          (most + PAGE - 1) / PAGE - first};
}

/* `rows` (a constant) neighbouring rows of one key head: row i is query i / group of the piece, head i % group. */
INLINE void attend_rows(const int rows, const struct attention *a, const struct piece *p, int64_t head, int64_t row,
                        const struct rows *q, const bf16 *keys, const bf16 *values, bf16 *out, float *scores,
                        const struct pages *next)
{
    const int64_t group = a->heads / a->kv_heads;
    const bf16 *query[ROWS], *page[PAGES_AT_ONCE];
    bf16 *to[ROWS];
    int64_t seen[ROWS]; /* keys up to and with the query's own */
    for (int r = 0; r < rows; r++) {
        int64_t token = p->first + (row + r) / group, h = head * group + (row + r) % group;
        query[r] = row_of(q, h, token);
        to[r] = out + (token * a->heads + h) * a->dim;
        seen[r] = p->start + (row + r) / group + 1;
    }
    const struct pages k = pages_of(a, p, head, keys, seen[0], seen[rows - 1]);
    const struct pages v = pages_of(a, p, head, values, seen[0], seen[rows - 1]);
    const int64_t stride = k.num * PAGE, ahead = v.base - k.base;
    bf16 *probs = (bf16 *)(scores + rows * stride);
    int64_t n = 0, at = 0;
    for (; n + PAGES_AT_ONCE <= k.num; n += PAGES_AT_ONCE) {
        for (int i = 0; i < PAGES_AT_ONCE; i++)
            page[i] = k.base + k.table[n + i] * PAGE * a->dim;
        scores_of(rows, PAGES_AT_ONCE, query, page, a->dim, a->scale, scores + n * PAGE, stride, ahead);
    }
    for (; n < k.num; n++) {
        page[0] = k.base + k.table[n] * PAGE * a->dim;
        scores_of(rows, 1, query, page, a->dim, a->scale, scores + n * PAGE, stride, ahead);
    }
    for (int r = 0; r < rows; r++) {
        int64_t low = a->window && seen[r] > a->window ? seen[r] - a->window : 0, before = k.first * PAGE;
        softmax(scores + r * stride, probs + r * stride, stride, low - before, seen[r] - before);
    }
    for (; at + WIDE <= a->dim / LANES; at += WIDE)
        values_of(rows, WIDE, probs, stride, v.base, v.table, v.num, a->dim, at, to, next);
    for (; at < a->dim / LANES; at++)
        values_of(rows, 1, probs, stride, v.base, v.table, v.num, a->dim, at, to, next);
}

/* Stores the pass's keys and values, then lets each query see all keys of its sequence up to its own.
 * `keys` and `values`: one layer of the pool, [kv heads][pages][PAGE * dim]; `out` [tokens][heads][dim]. */
void attention(const struct attention *a, const struct rows *q, const struct rows *k, const struct rows *v, bf16 *keys,
               bf16 *values, bf16 *out)
{
    const int64_t num = a->num_pieces * a->kv_heads, group = a->heads / a->kv_heads;
#pragma omp parallel num_threads(a->threads) if (a->threads > 1)
    {
        float *scores = malloc(ROWS * (a->max_keys + PAGE) * (sizeof(float) + sizeof(bf16)));
#pragma omp for
        for (int64_t i = 0; i < num; i++)
            store_piece(a, a->pieces + i / a->kv_heads, i % a->kv_heads, k, v, keys, values);
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < num; i++) {
            const struct piece *p = a->pieces + i / a->kv_heads;
            const struct piece *after = a->pieces + (i + 1 < num ? i + 1 : i) / a->kv_heads;
            const struct pages next = pages_of(a, after, (i + 1) % a->kv_heads, keys, after->start + 1, after->start + 1);
            int64_t head = i % a->kv_heads, row = 0, end = p->count * group;
            for (; row + 4 <= end; row += 4)
                attend_rows(4, a, p, head, row, q, keys, values, out, scores, &next);
            switch (end - row) {
            case 3: attend_rows(3, a, p, head, row, q, keys, values, out, scores, &next); break;
            case 2: attend_rows(2, a, p, head, row, q, keys, values, out, scores, &next); break;
            case 1: attend_rows(1, a, p, head, row, q, keys, values, out, scores, &next); break;
            }
        }
        free(scores);
    }
}

/* ---- norms and element-wise ------------------------------------------------------------------------------------ */

/* 1 / sqrt(mean of squares + eps) of x[0 .. n), n a multiple of 32. */
INLINE float inverse_rms(const bf16 *x, int64_t n, float eps)
{
    vec sum[2] = {splat(0), splat(0)};
    for (int64_t at = 0; at < n; at += 2 * LANES)
        for (int i = 0; i < 2; i++) {
            vec y = get(x + at + LANES * i);
            sum[i] = fma_of(y, y, sum[i]);
        }
    return 1.f / sqrtf(sum_of(sum[0] + sum[1]) / (float)n + eps);
}

/* RMSNorm of rows [num][n]. `offset` 0: the normed row is rounded, then multiplied by the weight
 * (Llama); 1: multiplied by 1 + weight in float32, then rounded (Gemma). */
void rms_norm(const bf16 *x, int64_t stride, const bf16 *weight, bf16 *out, int64_t num, int64_t n, float eps,
              int32_t offset, int32_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && num * n > 1 << 16)
    for (int64_t i = 0; i < num; i++) {
        const bf16 *row = x + i * stride;
        const float scale = inverse_rms(row, n, eps);
        for (int64_t at = 0; at < n; at += LANES) {
            vec y = get(row + at) * scale, w = get(weight + at);
            put(out + i * n + at, offset ? y * (w + 1.f) : rounded(y) * w);
        }
    }
}

INLINE vec sigmoid_of(vec x) { return 1.f / (exp_of(-x) + 1.f); }

/* out = silu(gate) * up, each rounded; rows [num][n] with strides. */
void silu_times(const bf16 *gate, const bf16 *up, int64_t stride, bf16 *out, int64_t num, int64_t n, int32_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && num * n > 1 << 16)
    for (int64_t i = 0; i < num; i++)
        for (int64_t at = 0; at < n; at += LANES) {
            vec x = get(gate + i * stride + at);
            put(out + i * n + at, rounded(x * sigmoid_of(x)) * get(up + i * stride + at));
        }
}

/* out = x * cos + rotate_half(x) * sin, each product and the sum rounded; or, `back`, the gradient of x from that of the
 * result. Both [heads][tokens][dim], the same or apart; `cos` and `sin` [tokens][dim]. */
void rotate(const struct rows *x, const struct rows *out, const bf16 *cos, const bf16 *sin, int64_t heads,
            int64_t tokens, int64_t dim, int32_t back, int32_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && heads * tokens * dim > 1 << 18)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const bf16 *row = row_of(x, h, t), *c = cos + t * dim, *s = sin + t * dim;
            bf16 *to = (bf16 *)row_of(out, h, t);
            for (int64_t i = 0, j = dim / 2; i < dim / 2; i += LANES, j += LANES) {
                vec a = get(row + i), b = get(row + j);
                vec left = (back ? b : -b) * get(s + (back ? j : i)), right = (back ? -a : a) * get(s + (back ? i : j));
                put(to + i, rounded(a * get(c + i)) + rounded(left));
                put(to + j, rounded(b * get(c + j)) + rounded(right));
            }
        }
}

/* ---- gradients -----------------------------------------------------------------------------------------------------
 * In float32, rounded once at the end. */

/* Of rms_norm: `dx` [num][n], and `dw` [threads][n], of which the caller takes the sum; it brings zeros. */
void rms_norm_grad(const bf16 *x, const bf16 *weight, const bf16 *grad, bf16 *dx, float *dw, int64_t num, int64_t n,
                   float eps, int32_t offset, int32_t threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && num * n > 1 << 16)
    for (int64_t i = 0; i < num; i++) {
        const bf16 *row = x + i * n, *g = grad + i * n;
        float *own = dw + omp_get_thread_num() * n;
        const float scale = inverse_rms(row, n, eps), one = offset ? 1.f : 0.f;
        vec sum = splat(0);
        for (int64_t at = 0; at < n; at += LANES) {
            vec y = get(row + at) * scale, dy = get(g + at);
            sum = fma_of(dy * (get(weight + at) + one), y, sum);
            store(own + at, fma_of(dy, offset ? y : rounded(y), load(own + at)));
        }
        const float mean = sum_of(sum) / (float)n;
        for (int64_t at = 0; at < n; at += LANES) {
            vec y = get(row + at) * scale, through = get(g + at) * (get(weight + at) + one);
            put(dx + i * n + at, (through - y * mean) * scale);
        }
    }
}

/* Of silu_times; all rows [num][n] without gaps. */
void silu_times_grad(const bf16 *gate, const bf16 *up, const bf16 *grad, bf16 *dgate, bf16 *dup, int64_t num,
                     int32_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && num > 1 << 16)
    for (int64_t at = 0; at < num; at += LANES) {
        vec x = get(gate + at), dy = get(grad + at), sigmoid = sigmoid_of(x);
        put(dup + at, dy * rounded(x * sigmoid));
        put(dgate + at, dy * get(up + at) * (sigmoid * fma_of(x, 1.f - sigmoid, splat(1))));
    }
}

/* ---- attention over a prefix tree, for training ---------------------------------------------------------------------
 * A run: some neighbouring queries of one path, and the keys that they see. Scores, probabilities and the sums weighed
 * by them are products of bf16 rounded where PyTorch's are; a block of queries has all its scores at one time. The
 * gradients of keys and values add up in float32, for each thread by itself. */

enum { BLOCK_ROWS = 192 }; /* queries times heads of one key head that are computed together */

struct run { int32_t first, keys, queries; }; /* it sees the nodes path[first .. first + keys); the last ones ask */

struct tree {
    const struct run *runs; /* the largest ones first */
    const int32_t *path;
    int64_t num_runs, max_keys, nodes, heads, kv_heads, dim, window; /* window: keys seen at most; 0 for all */
    float scale;
    int32_t threads;
};

struct scratch { bf16 *keys, *values, *more, *queries, *grads, *probs, *slopes, *panel; float *scores; };

INLINE int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

/* Rows of one head at the nodes, as the columns of panels; zeros behind them. */
static void pack_nodes(const struct rows *x, int64_t head, const int32_t *node, int64_t num, int64_t dim, bf16 *packed)
{
    for (int64_t c = 0; c < padded(num); c++) {
        const bf16 *from = row_of(x, head, node[c < num ? c : 0]);
        bf16 *to = packed + c / PANEL * dim * PANEL + c % PANEL * 2;
        for (int64_t i = 0; i < dim; i += 2)
            if (c < num)
                memcpy(to + i * PANEL, from + i, 2 * sizeof(bf16));
            else
                memset(to + i * PANEL, 0, 2 * sizeof(bf16));
    }
}

INLINE naturals wide_halves(const bf16 *p) { return __builtin_convertvector(*(const loose_halves *)p, naturals); }

/* [rows][dim] packed as the transpose of a weight: pairs of rows side by side. Behind `num` rows come zeros up to
 * `all`, which is even. With `node`, rows of a head at the nodes. */
static void pack_pairs(const struct rows *x, int64_t head, const int32_t *node, int64_t num, int64_t all, int64_t dim,
                       bf16 *packed)
{
    for (int64_t t = 0; t < all; t += 2)
        for (int64_t d = 0; d < dim; d += LANES) {
            naturals pair = {0};
            for (int64_t i = 0; i < 2 && t + i < num; i++)
                pair |= wide_halves(row_of(x, head, node ? node[t + i] : t + i) + d) << (16 * i);
            store_words(packed + (d / PANEL * all + t) * PANEL + d % PANEL * 2, (words)pair);
        }
}

/* In place: pairs of rows of n side by side. */
static void interleave(bf16 *x, int64_t rows, int64_t n, float *scratch)
{
    bf16 *copy = (bf16 *)scratch;
    for (int64_t r = 0; r < rows; r += 2, x += 2 * n) {
        memcpy(copy, x, 2 * n * sizeof(bf16));
        for (int64_t i = 0; i < n; i += LANES)
            store_words(x + 2 * i, (words)(wide_halves(copy + i) | wide_halves(copy + n + i) << 16));
    }
}

/* The float32 rows `to` += the transpose of x times a panel, both in pairs of rows; x has `step` columns. */
INLINE void transposed_rows(const int rows, const bf16 *x, int64_t step, const bf16 *panel, int64_t num,
                            float *const *to, int64_t columns)
{
    vec sum[ROWS_AT_ONCE][WIDE];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < WIDE; j++)
            sum[r][j] = LANES * j < columns ? load_first(to[r] + LANES * j, columns - LANES * j, 0) : splat(0);
    for (int64_t t = 0; t < num; t += 2, x += 2 * step, panel += 2 * PANEL) {
        const bf16 *own[ROWS_AT_ONCE], *pairs[WIDE];
        for (int r = 0; r < rows; r++)
            own[r] = x + 2 * r;
        for (int j = 0; j < WIDE; j++)
            pairs[j] = panel + 2 * LANES * j;
        add_pairs(rows, WIDE, sum, own, pairs);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < WIDE; j++)
            store_first(to[r] + LANES * j, columns - LANES * j, sum[r][j]);
}

/* Adds to the rows of one key head at the nodes [num] the transpose of x [rows][num] times y [rows][dim]. */
static void add_transposed(const bf16 *x, int64_t step, const bf16 *packed, int64_t rows, const struct tree *a,
                           const int32_t *node, int64_t num, int64_t head, float *grad)
{
    for (int64_t at = 0; at < a->dim; at += PANEL)
        for (int64_t c = 0, count; c < num; c += count) {
            float *to[ROWS_AT_ONCE];
            count = num - c < ROWS_AT_ONCE ? num - c : ROWS_AT_ONCE;
            for (int64_t i = 0; i < count; i++)
                to[i] = grad + (node[c + i] * a->kv_heads + head) * a->dim + at;
#define ADD(r) case r: transposed_rows(r, x + 2 * c, step, packed + at * rows, rows, to, a->dim - at); break
            switch (count) {
                ADD(1); ADD(2); ADD(3); ADD(4);
#if defined(__AVX512F__) || !defined(__AVX__)
                ADD(5); ADD(6);
#endif
            }
        }
}

/* A block of queries [begin, begin + count) of a run, and its keys [low, high). */
struct block { int64_t begin, count, low, high, rows; };

INLINE struct block block_of(const struct tree *a, const struct run *run, int64_t begin)
{
    const int64_t group = a->heads / a->kv_heads, most = group < BLOCK_ROWS ? BLOCK_ROWS / group : 1;
    const int64_t count = run->queries - begin < most ? run->queries - begin : most;
    const int64_t own = run->keys - run->queries + begin; /* the first query's own key */
    const int64_t low = a->window && own >= a->window ? (own - a->window + 1) / PANEL * PANEL : 0;
    return (struct block){begin, count, low, padded(own + count), count * group};
}

/* Rows [queries][heads of the key head][dim] of the block, one below the other. */
static void take_rows(const struct tree *a, const struct block *b, const struct rows *x, int64_t head,
                      const int32_t *node, bf16 *out)
{
    const int64_t group = a->heads / a->kv_heads;
    for (int64_t r = 0; r < b->rows; r++)
        memcpy(out + r * a->dim, row_of(x, head * group + r % group, node[r / group]), a->dim * sizeof(bf16));
}

static void put_rows(const struct tree *a, const struct block *b, const bf16 *x, int64_t head, const int32_t *node,
                     bf16 *out)
{
    const int64_t group = a->heads / a->kv_heads;
    for (int64_t r = 0; r < b->rows; r++)
        memcpy(out + (node[r / group] * a->heads + head * group + r % group) * a->dim, x + r * a->dim,
               a->dim * sizeof(bf16));
}

/* out [rows][high - low] = x [rows][dim] times packed keys or values. */
static void against_keys(const struct tree *a, const struct block *b, const bf16 *x, const bf16 *packed, bf16 *out)
{
    const int64_t width = b->high - b->low;
    for (int64_t at = 0; at < width; at += PANEL)
        product_panel(x, packed + (b->low + at) * a->dim, 0, out + at, b->rows, width, a->dim, PANEL);
}

/* out [rows][dim] = x [rows][high - low] times keys or values packed in pairs, of which the run has `all`. */
static void over_keys(const struct tree *a, const struct block *b, const bf16 *x, const bf16 *packed, int64_t all,
                      bf16 *out)
{
    for (int64_t at = 0; at < a->dim; at += PANEL)
        product_panel(x, packed + at * all + b->low * PANEL, 0, out + at, b->rows, a->dim, b->high - b->low,
                      a->dim - at);
}

/* Probabilities of the block in s->probs. */
static void probabilities(const struct tree *a, const struct run *run, const struct block *b, const struct rows *q,
                          int64_t head, struct scratch *s)
{
    const int64_t group = a->heads / a->kv_heads, width = b->high - b->low;
    take_rows(a, b, q, head, a->path + run->first + run->keys - run->queries + b->begin, s->queries);
    against_keys(a, b, s->queries, s->keys, s->probs);
    for (int64_t r = 0; r < b->rows; r++) {
        bf16 *row = s->probs + r * width;
        int64_t end = run->keys - run->queries + b->begin + r / group + 1 - b->low;
        int64_t begin = a->window && end + b->low > a->window ? end - a->window : 0;
        for (int64_t i = 0; i < width; i += LANES)
            store(s->scores + i, get(row + i) * a->scale);
        softmax(s->scores, row, width, begin, end);
    }
}

static struct scratch new_scratch(const struct tree *a)
{
    const int64_t group = a->heads / a->kv_heads, rows = (group < BLOCK_ROWS ? BLOCK_ROWS : group) + 1;
    const int64_t keys = padded(a->max_keys), dim = padded(a->dim);
    bf16 *at = aligned_alloc(64, (3 * keys * dim + 3 * rows * dim + 2 * (rows + 1) * keys + 4 * keys + 64) / 32 * 64);
    struct scratch s = {at, at + keys * dim, at + 2 * keys * dim};
    s.queries = s.more + keys * dim;
    s.grads = s.queries + rows * dim;
    s.panel = s.grads + rows * dim;
    s.probs = s.panel + rows * dim;
    s.slopes = s.probs + (rows + 1) * keys;
    s.scores = (float *)(s.slopes + (rows + 1) * keys);
    return s;
}

/* `out` [nodes][heads][dim] */
void tree_attention(const struct tree *a, const struct rows *q, const struct rows *k, const struct rows *v, bf16 *out)
{
#pragma omp parallel num_threads(a->threads) if (a->threads > 1)
    {
        struct scratch s = new_scratch(a);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a->num_runs * a->kv_heads; i++) {
            const struct run *run = a->runs + i / a->kv_heads;
            const int32_t *node = a->path + run->first;
            const int64_t head = i % a->kv_heads, all = padded(run->keys);
            pack_nodes(k, head, node, run->keys, a->dim, s.keys);
            pack_pairs(v, head, node, run->keys, all, a->dim, s.values);
            for (int64_t begin = 0; begin < run->queries;) {
                const struct block b = block_of(a, run, begin);
                probabilities(a, run, &b, q, head, &s);
                over_keys(a, &b, s.probs, s.values, all, s.queries);
                put_rows(a, &b, s.queries, head, node + run->keys - run->queries + begin, out);
                begin += b.count;
            }
        }
        free(s.keys);
    }
}

/* From the gradient `up` of the result those of q, [nodes][heads][dim], and of k and v, [threads][nodes][kv heads][dim],
 * whose sum the caller takes; it brings zeros. */
void tree_attention_grad(const struct tree *a, const struct rows *q, const struct rows *k, const struct rows *v,
                         const struct rows *up, bf16 *dq, float *dk, float *dv)
{
#pragma omp parallel num_threads(a->threads) if (a->threads > 1)
    {
        struct scratch s = new_scratch(a);
        const int64_t mine = omp_get_thread_num() * a->nodes * a->kv_heads * a->dim;
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < a->num_runs * a->kv_heads; i++) {
            const struct run *run = a->runs + i / a->kv_heads;
            const int32_t *node = a->path + run->first;
            const int64_t head = i % a->kv_heads, all = padded(run->keys);
            pack_nodes(k, head, node, run->keys, a->dim, s.keys);
            pack_nodes(v, head, node, run->keys, a->dim, s.values);
            pack_pairs(k, head, node, run->keys, all, a->dim, s.more);
            for (int64_t begin = 0; begin < run->queries;) {
                const struct block b = block_of(a, run, begin);
                const int32_t *asking = node + run->keys - run->queries + begin;
                const int64_t width = b.high - b.low, rows = b.rows + b.rows % 2;
                const int64_t num = run->keys - b.low < width ? run->keys - b.low : width;
                probabilities(a, run, &b, q, head, &s);
                take_rows(a, &b, up, head, asking, s.grads);
                against_keys(a, &b, s.grads, s.values, s.slopes);
                for (int64_t r = 0; r < b.rows; r++) {
                    bf16 *slope = s.slopes + r * width;
                    const bf16 *prob = s.probs + r * width;
                    vec dot = splat(0);
                    for (int64_t n = 0; n < width; n += LANES)
                        dot = fma_of(get(prob + n), get(slope + n), dot);
                    const float mean = sum_of(dot);
                    for (int64_t n = 0; n < width; n += LANES)
                        put(slope + n, get(prob + n) * (get(slope + n) - mean) * a->scale);
                }
                /* An odd last row gets one of zeros beside it. */
                memset(s.probs + b.rows * width, 0, (rows - b.rows) * width * sizeof(bf16));
                memset(s.slopes + b.rows * width, 0, (rows - b.rows) * width * sizeof(bf16));
                interleave(s.probs, rows, width, s.scores);
                pack_pairs(&(struct rows){s.grads, 0, a->dim}, 0, 0, b.rows, rows, a->dim, s.panel);
                add_transposed(s.probs, width, s.panel, rows, a, node + b.low, num, head, dv + mine);
                over_keys(a, &b, s.slopes, s.more, all, s.grads);
                put_rows(a, &b, s.grads, head, asking, dq);
                interleave(s.slopes, rows, width, s.scores);
                pack_pairs(&(struct rows){s.queries, 0, a->dim}, 0, 0, b.rows, rows, a->dim, s.panel);
                add_transposed(s.slopes, width, s.panel, rows, a, node + b.low, num, head, dk + mine);
                begin += b.count;
            }
        }
        free(s.keys);
    }
}

/* ---- logprobs -------------------------------------------------------------------------------------------------- */

struct scoring {
    bf16 *logits; /* [rows][vocab]; score_grad puts their gradient in their place */
    const int64_t *edges, *targets; /* row r is asked for targets [edges[r], edges[r + 1]) */
    float *logsum, *entropy; /* [rows], of logits / temperature */
    float *logp; /* [targets] */
    const float *logp_grad, *entropy_grad; /* as logp and entropy */
    int64_t rows, vocab;
    float temperature;
    int32_t threads;
};

INLINE vec score_at(const struct scoring *s, const bf16 *row, int64_t at)
{
    return get_first(row + at, s->vocab - at, -INFINITY) / s->temperature;
}

/* Logprobs of the targets, logsumexp and entropy of the rows. */
void score(const struct scoring *s)
{
#pragma omp parallel for num_threads(s->threads) schedule(static) if (s->threads > 1 && s->rows > 1)
    for (int64_t r = 0; r < s->rows; r++) {
        const bf16 *row = s->logits + r * s->vocab;
        vec top = splat(-INFINITY), total = splat(0), dot = splat(0);
        for (int64_t at = 0; at < s->vocab; at += LANES)
            top = larger(top, score_at(s, row, at));
        const float best = max_of(top);
        for (int64_t block = 0; block < s->vocab; block += BLOCK) { /* sums of sums: short chains of rounding */
            vec sum = splat(0), weighed = splat(0);
            for (int64_t at = block; at < block + BLOCK && at < s->vocab; at += LANES) {
                vec x = score_at(s, row, at) - best, e = exp_of(x);
                sum += e;
                weighed += choose(x < -104.f, splat(0), x * e); /* not -inf * 0 */
            }
            total += sum;
            dot += weighed;
        }
        const float sum = sum_of(total);
        s->logsum[r] = logf(sum) + best;
        s->entropy[r] = logf(sum) - sum_of(dot) / sum;
        for (int64_t t = s->edges[r]; t < s->edges[r + 1]; t++)
            s->logp[t] = score_at(s, row, s->targets[t])[0] - s->logsum[r];
    }
}

/* dL/dz_j = sum of the gradients of target j - p_j (sum of all targets' gradients + dL/dH (log p_j + H)) */
void score_grad(const struct scoring *s)
{
#pragma omp parallel for num_threads(s->threads) schedule(static) if (s->threads > 1 && s->rows > 1)
    for (int64_t r = 0; r < s->rows; r++) {
        bf16 *row = s->logits + r * s->vocab;
        float all = 0;
        for (int64_t t = s->edges[r]; t < s->edges[r + 1]; t++)
            all += s->logp_grad[t];
        const float slope = s->entropy_grad[r], base = all + slope * s->entropy[r];
        for (int64_t at = 0; at < s->vocab; at += LANES) {
            vec logp = score_at(s, row, at) - s->logsum[r];
            vec scale = slope != 0 ? fma_of(larger(logp, splat(-104.f)), splat(slope), splat(base)) : splat(base);
            put_first(row + at, s->vocab - at, -(exp_of(logp) * scale / s->temperature));
        }
        for (int64_t t = s->edges[r]; t < s->edges[r + 1]; t++) {
            const int64_t own = s->targets[t];
            if (own < 0 || own >= s->vocab)
                continue;
            float sum = -expf(s->logp[t]) * (base + slope * s->logp[t]);
            for (int64_t same = s->edges[r]; same < s->edges[r + 1]; same++)
                sum += s->targets[same] == s->targets[t] ? s->logp_grad[same] : 0;
            row[own] = narrow(splat(sum / s->temperature))[0];
        }
    }
}

/* ---- sampling -------------------------------------------------------------------------------------------------- */

struct sampling {
    const void *logits; /* [rows][vocab], bf16 or float32 */
    const float *temperature; /* 0: the likeliest token */
    const double *uniform;
    int64_t *token;
    double *logprob;
    uint8_t *ok; /* 0: the row has a NaN, an infinity, or nothing to choose */
    int64_t rows, vocab;
    int32_t is_float, threads;
};

/* LANES logits from `at` on, divided by the temperature; -inf past the end. */
INLINE vec logits_at(const struct sampling *s, int64_t row, int64_t at, float temperature)
{
    const int64_t place = row * s->vocab + at;
    if (at >= s->vocab)
        return splat(-INFINITY);
    if (s->is_float)
        return load_first((const float *)s->logits + place, s->vocab - at, -INFINITY) / temperature;
    return get_first((const bf16 *)s->logits + place, s->vocab - at, -INFINITY) / temperature;
}

static void sample_row(const struct sampling *s, int64_t row, double *sums)
{
    const float temperature = s->temperature[row] > 0 ? s->temperature[row] : 1.f;
    const int64_t num = (s->vocab + BLOCK - 1) / BLOCK;
    int64_t token = -1, block = 0, first = 0; /* first: block of the likeliest token */
    words is_nan = {0};
    float best = -INFINITY, lanes[BLOCK];
    for (int64_t b = 0; b < num; b++) {
        vec top = splat(-INFINITY);
        for (int64_t at = b * BLOCK; at < (b + 1) * BLOCK; at += LANES) {
            vec score = logits_at(s, row, at, temperature);
            is_nan |= score != score;
            top = larger(top, score);
        }
        const float highest = max_of(top);
        first = highest > best ? b : first;
        best = highest > best ? highest : best;
    }
    s->ok[row] = isfinite(best) != 0;
    for (int i = 0; i < LANES; i++)
        s->ok[row] &= !is_nan[i];
    if (!s->ok[row])
        return;
    double total = 0, upto = 0;
    for (int64_t b = 0; b < num; total += sums[b++]) {
        vec sum = splat(0);
        for (int64_t at = b * BLOCK; at < (b + 1) * BLOCK; at += LANES)
            sum += exp_of(logits_at(s, row, at, temperature) - best);
        sums[b] = (double)sum_of(sum);
    }
    double target = s->uniform[row] * total, logit = best;
    if (s->temperature[row] > 0) {
        while (block < num - 1 && upto + sums[block] <= target)
            upto += sums[block++];
        for (int i = 0; i < BLOCK; i += LANES)
            store(lanes + i, exp_of(logits_at(s, row, block * BLOCK + i, temperature) - best));
        /* Rounding may leave the target at or past the block's end: the last token that has weight is meant then. */
        for (int i = 0; i < BLOCK; i++) {
            upto += lanes[i];
            token = lanes[i] > 0 ? block * BLOCK + i : token;
            if (upto > target)
                break;
        }
        logit = logits_at(s, row, token, temperature)[0];
    } else
        for (token = first * BLOCK; logits_at(s, row, token, temperature)[0] != best; token++)
            ;
    s->token[row] = token;
    s->logprob[row] = logit - best - log(total);
}

/* One token per row from softmax(logits / temperature), by the inverse of its cumulative sum, and the logprob. */
void sample(const struct sampling *s)
{
#pragma omp parallel num_threads(s->threads) if (s->threads > 1 && s->rows > 1)
    {
        double *sums = malloc((s->vocab / BLOCK + 1) * sizeof(double)); /* of the weights, per block */
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < s->rows; row++)
            sample_row(s, row, sums);
        free(sums);
    }
}
