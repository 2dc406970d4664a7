/* CPU kernels for bf16 models. The server's: attention over the page pool, norms, rotary, gated units, sampling. The
 * trainer's: the same element-wise functions with their gradients, and logprobs from logits.
 *
 * Compiled and called by kernels.py. They exist to save memory traffic and calls, not to change results: each rounds to
 * bf16 where the PyTorch operations of the trainer do, adds in the order in which those add, and takes exp by the same
 * polynomials, so that a logprob made here is bit for bit the trainer's. Needs AVX512-BF16.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 16, ROWS = 4, MAX_PAGES_AT_ONCE = 4, BLOCK = 256 };
typedef uint16_t bf16;
typedef __m512 vec;
typedef __m512bh pairs; /* 16 pairs of bf16 */
#define INLINE static inline __attribute__((always_inline))

INLINE vec widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m256i narrow(vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE vec rounded(vec x) { return widen(narrow(x)); }
INLINE vec load16(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store16(bf16 *p, vec x) { _mm256_storeu_si256((__m256i *)p, narrow(x)); }
INLINE pairs load_pairs(const bf16 *p) { return (pairs)_mm512_loadu_si512(p); }
INLINE pairs both_of(const bf16 *p) { return (pairs)_mm512_set1_epi32(*(const int32_t *)p); }
INLINE __mmask16 first_lanes(long n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }

/* oneDNN adds the products of a sum one after the other, but blocks of so many of them by themselves. */
INLINE int64_t summed_at_once(int64_t k) { return k > 1024 ? 1024 : 512; }

/* exp with the reduction and the polynomial that torch's exp, softmax and SiLU use (Sleef's expf, 1.0 ulp). */
INLINE vec exp_of(vec x)
{
    vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693145751953125f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-1.428606765330187045e-06f), r);
    vec y = _mm512_fmadd_ps(_mm512_set1_ps(0.000198527617612853646f), r, _mm512_set1_ps(0.00139304355252534151f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.00833336077630519867f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.0416664853692054749f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.166666671633720398f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
    y = _mm512_add_ps(_mm512_set1_ps(1.f), _mm512_fmadd_ps(_mm512_mul_ps(r, r), y, r));
    y = _mm512_scalef_ps(y, n);
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.f), _CMP_NLT_UQ), y);
}

/* The lanes' sum in torch's order for a row: halves, quarters, ... */
INLINE float sum_lanes(vec v)
{
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4E));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0x4E));
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0xB1));
    return _mm512_cvtss_f32(v);
}

/* ---- attention ---------------------------------------------------------------------------------------------------
 * A page holds 16 tokens of one key head. Keys lie as [dim / 2][token][2] and values as [token / 2][dim][2]: what one
 * vdpbf16ps takes, 16 pairs, lies side by side. It adds the pairs of a sum one after the other, as oneDNN does. */

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
        const int32_t *key = (const int32_t *)row_of(k, head, p->first + i);
        const bf16 *value = row_of(v, head, p->first + i);
        int32_t *to = (int32_t *)(keys + page) + slot;
        for (int64_t d = 0; d < a->dim / 2; d++)
            to[d * PAGE] = key[d];
        bf16 *row = values + page + slot / 2 * 2 * a->dim;
        for (int64_t d = 0; d < a->dim; d += 16) {
            __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(value + d)));
            wide = slot % 2 ? _mm512_slli_epi32(wide, 16) : wide;
            __m512i old = _mm512_loadu_si512(row + 2 * d); /* the neighbour's; masked stores would be slow */
            _mm512_storeu_si512(row + 2 * d, _mm512_mask_mov_epi16(old, slot % 2 ? 0xAAAAAAAA : 0x55555555, wide));
        }
    }
}

/* Scores of `rows` queries with `num` pages of keys, rounded to bf16 as the product's result, then scaled. Meanwhile the
 * pages of values, `ahead` elements further on, are asked for: pages lie anywhere, which no hardware foresees. */
INLINE void scores_of(const int rows, const int num, const bf16 *const *q, const bf16 *const *pages, int64_t dim,
                      vec scale, float *out, int64_t stride, int64_t ahead)
{
    vec sum[ROWS][MAX_PAGES_AT_ONCE];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < num; n++)
            sum[r][n] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 2) {
        pairs key[MAX_PAGES_AT_ONCE];
        for (int n = 0; n < num; n++) {
            key[n] = load_pairs(pages[n] + d * PAGE);
            _mm_prefetch((const char *)(pages[n] + d * PAGE + ahead), _MM_HINT_T0);
        }
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < num; n++)
                sum[r][n] = _mm512_dpbf16_ps(sum[r][n], both_of(q[r] + d), key[n]);
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < num; n++)
            _mm512_storeu_ps(out + r * stride + n * PAGE, _mm512_mul_ps(rounded(sum[r][n]), scale));
}

/* Dims [16 * at, 16 * (at + num)) of the sums of values weighted by bf16 probabilities. Blocks of keys are
 * counted from the sequence's begin. Meanwhile the next keys are asked for. */
INLINE void values_of(const int rows, const int num, const bf16 *probs, int64_t stride, const bf16 *values,
                      const int32_t *table, int64_t from_page, int64_t num_pages, int64_t dim, int64_t at,
                      bf16 *const *out, const struct pages *next)
{
    vec total[ROWS][4] = {{{0}}}, sum[ROWS][4];
    const int64_t block = summed_at_once((from_page + num_pages) * PAGE) / PAGE;
    for (int64_t page = 0, stop; page < num_pages; page = stop) {
        stop = (from_page + page) / block * block + block - from_page;
        stop = stop < num_pages ? stop : num_pages;
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < num; n++)
                sum[r][n] = _mm512_setzero_ps();
        for (int64_t i = page; i < stop; i++) {
            const bf16 *from = values + table[i] * PAGE * dim + 32 * at, *weight = probs + i * PAGE;
            const bf16 *ahead = i < next->num ? next->base + next->table[i] * PAGE * dim + 32 * at : from;
            for (int64_t t = 0; t < PAGE; t += 2, from += 2 * dim, ahead += 2 * dim) {
                for (int n = 0; n < num; n++)
                    _mm_prefetch((const char *)(ahead + 32 * n), _MM_HINT_T0);
                for (int r = 0; r < rows; r++)
                    for (int n = 0; n < num; n++)
                        sum[r][n] = _mm512_dpbf16_ps(sum[r][n], both_of(weight + r * stride + t), load_pairs(from + 32 * n));
            }
        }
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < num; n++)
                total[r][n] = _mm512_add_ps(total[r][n], sum[r][n]);
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < num; n++)
            store16(out[r] + 16 * (at + n), total[r][n]);
}

/* Softmax over the keys [low, high) of `num_pages` pages, in place; then rounded into `probs`. */
static void softmax(float *scores, bf16 *probs, int64_t num_pages, int64_t low, int64_t high)
{
    const vec hidden = _mm512_set1_ps(-INFINITY);
    vec top = hidden, sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < num_pages * PAGE; at += 16) {
        __mmask16 seen = first_lanes(high - at) & ~first_lanes(low - at);
        vec x = _mm512_mask_loadu_ps(hidden, seen, scores + at);
        _mm512_storeu_ps(scores + at, x);
        top = _mm512_max_ps(top, x);
    }
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t at = 0; at < num_pages * PAGE; at += 16) {
        vec x = exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + at), top));
        _mm512_storeu_ps(scores + at, x);
        sum = _mm512_add_ps(sum, x);
    }
    vec share = _mm512_set1_ps(1.f / sum_lanes(sum));
    for (int64_t at = 0; at < num_pages * PAGE; at += 16)
        store16(probs + at, _mm512_mul_ps(_mm512_loadu_ps(scores + at), share));
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
    const bf16 *query[ROWS], *page[MAX_PAGES_AT_ONCE];
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
    const int64_t stride = k.num * PAGE;
    bf16 *probs = (bf16 *)(scores + rows * stride);
    vec scale = _mm512_set1_ps(a->scale);
    int64_t n = 0, at = 0;
    for (; n + MAX_PAGES_AT_ONCE <= k.num; n += MAX_PAGES_AT_ONCE) {
        for (int i = 0; i < MAX_PAGES_AT_ONCE; i++)
            page[i] = k.base + k.table[n + i] * PAGE * a->dim;
        scores_of(rows, MAX_PAGES_AT_ONCE, query, page, a->dim, scale, scores + n * PAGE, stride, v.base - k.base);
    }
    for (; n < k.num; n++) {
        page[0] = k.base + k.table[n] * PAGE * a->dim;
        scores_of(rows, 1, query, page, a->dim, scale, scores + n * PAGE, stride, v.base - k.base);
    }
    for (int r = 0; r < rows; r++) {
        int64_t low = a->window && seen[r] > a->window ? seen[r] - a->window : 0, before = k.first * PAGE;
        softmax(scores + r * stride, probs + r * stride, k.num, low - before, seen[r] - before);
    }
    for (; at + 4 <= a->dim / 16; at += 4)
        values_of(rows, 4, probs, stride, v.base, v.table, v.first, v.num, a->dim, at, to, next);
    for (; at < a->dim / 16; at++)
        values_of(rows, 1, probs, stride, v.base, v.table, v.first, v.num, a->dim, at, to, next);
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

/* The sum of squares of x[0 .. n), n a multiple of 32, in torch's order: four sums of eight lanes side by side (here two
 * vectors), in chunks of 16 such steps; then the four, then the lanes. */
INLINE float sum_of_squares(const bf16 *x, int64_t n)
{
    vec sum[2], chunk[2];
    for (int i = 0; i < 2; i++)
        sum[i] = chunk[i] = _mm512_setzero_ps();
    for (int64_t at = 0; at < n; at += 32) {
        for (int i = 0; i < 2; i++) {
            vec y = load16(x + at + 16 * i);
            chunk[i] = _mm512_add_ps(chunk[i], _mm512_mul_ps(y, y));
        }
        if (at % 512 == 480)
            for (int i = 0; i < 2; i++)
                sum[i] = _mm512_add_ps(sum[i], chunk[i]), chunk[i] = _mm512_setzero_ps();
    }
    float part[2][16], result = 0;
    for (int i = 0; i < 2; i++)
        _mm512_storeu_ps(part[i], _mm512_add_ps(chunk[i], sum[i]));
    for (int i = 0; i < 8; i++)
        result += ((part[0][i] + part[0][i + 8]) + part[1][i]) + part[1][i + 8];
    return result;
}

/* RMSNorm of rows [num][n]. `offset` 0: the normed row is rounded, then multiplied by the weight
 * (Llama); 1: multiplied by 1 + weight in float32, then rounded (Gemma). */
void rms_norm(const bf16 *x, int64_t stride, const bf16 *weight, bf16 *out, int64_t num, int64_t n, float eps,
              int32_t offset, int32_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && num * n > 1 << 16)
    for (int64_t i = 0; i < num; i++) {
        const bf16 *row = x + i * stride;
        vec scale = _mm512_set1_ps(1.f / sqrtf(sum_of_squares(row, n) / (float)n + eps)), one = _mm512_set1_ps(1.f);
        for (int64_t at = 0; at < n; at += 16) {
            vec y = _mm512_mul_ps(load16(row + at), scale), w = load16(weight + at);
            y = offset ? _mm512_mul_ps(y, _mm512_add_ps(one, w)) : _mm512_mul_ps(rounded(y), w);
            store16(out + i * n + at, y);
        }
    }
}

/* out = silu(gate) * up, each rounded; rows [num][n] with strides. */
void silu_times(const bf16 *gate, const bf16 *up, int64_t stride, bf16 *out, int64_t num, int64_t n, int32_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && num * n > 1 << 16)
    for (int64_t i = 0; i < num; i++)
        for (int64_t at = 0; at < n; at += 16) {
            vec x = load16(gate + i * stride + at), one = _mm512_set1_ps(1.f);
            vec e = exp_of(_mm512_sub_ps(_mm512_setzero_ps(), x));
            x = rounded(_mm512_div_ps(x, _mm512_add_ps(one, e)));
            store16(out + i * n + at, _mm512_mul_ps(x, load16(up + i * stride + at)));
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
            for (int64_t i = 0, j = dim / 2; i < dim / 2; i += 16, j += 16) {
                vec a = load16(row + i), b = load16(row + j), sign = _mm512_set1_ps(-0.f);
                vec left = _mm512_mul_ps(back ? b : _mm512_xor_ps(b, sign), load16(s + (back ? j : i)));
                vec right = _mm512_mul_ps(back ? _mm512_xor_ps(a, sign) : a, load16(s + (back ? i : j)));
                store16(to + i, _mm512_add_ps(rounded(_mm512_mul_ps(a, load16(c + i))), rounded(left)));
                store16(to + j, _mm512_add_ps(rounded(_mm512_mul_ps(b, load16(c + j))), rounded(right)));
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
        const float scale = 1.f / sqrtf(sum_of_squares(row, n) / (float)n + eps);
        const vec s = _mm512_set1_ps(scale), one = _mm512_set1_ps(offset ? 1.f : 0.f);
        vec sum = _mm512_setzero_ps();
        for (int64_t at = 0; at < n; at += 16) {
            vec y = _mm512_mul_ps(load16(row + at), s), dy = load16(g + at);
            vec through = _mm512_mul_ps(dy, _mm512_add_ps(load16(weight + at), one));
            sum = _mm512_fmadd_ps(through, y, sum);
            y = offset ? y : rounded(y);
            _mm512_storeu_ps(own + at, _mm512_fmadd_ps(dy, y, _mm512_loadu_ps(own + at)));
        }
        const vec mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)n);
        for (int64_t at = 0; at < n; at += 16) {
            vec y = _mm512_mul_ps(load16(row + at), s);
            vec through = _mm512_mul_ps(load16(g + at), _mm512_add_ps(load16(weight + at), one));
            store16(dx + i * n + at, _mm512_mul_ps(s, _mm512_fnmadd_ps(y, mean, through)));
        }
    }
}

/* Of silu_times; all rows [num][n] without gaps. */
void silu_times_grad(const bf16 *gate, const bf16 *up, const bf16 *grad, bf16 *dgate, bf16 *dup, int64_t num,
                     int32_t threads)
{
    const vec one = _mm512_set1_ps(1.f);
#pragma omp parallel for num_threads(threads) if (threads > 1 && num > 1 << 16)
    for (int64_t at = 0; at < num; at += 16) {
        vec x = load16(gate + at), dy = load16(grad + at);
        vec sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), x))));
        vec slope = _mm512_mul_ps(sigmoid, _mm512_fmadd_ps(x, _mm512_sub_ps(one, sigmoid), one));
        store16(dup + at, _mm512_mul_ps(dy, rounded(_mm512_mul_ps(x, sigmoid))));
        store16(dgate + at, _mm512_mul_ps(_mm512_mul_ps(dy, load16(up + at)), slope));
    }
}

/* ---- products with a packed weight ---------------------------------------------------------------------------------
 * out [rows][n] = x [rows][k] times the transpose of a weight [n][k], k even. The packed weight stands in panels of 64
 * columns, [k / 2][64][2], the last one padded; pairs of k are added one after the other, as in oneDNN. */

enum { PANEL = 64, ROWS_AT_ONCE = 6, ROWS_KEPT = 128 /* rows whose inputs stay in a core's cache */ };

/* Puts a weight [n][k] into the panels from column `first` on. */
void pack(const bf16 *weight, bf16 *packed, int64_t n, int64_t k, int64_t first, int32_t threads)
{
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i down = _mm512_mullo_epi32(lane, _mm512_set1_epi32(k / 2));
#pragma omp parallel for num_threads(threads) if (threads > 1 && n * k > 1 << 16)
    for (int64_t c = 0; c < n; c += 16) {
        int64_t whole = n - c >= 16 && (first + c) % 16 == 0;
        for (int64_t i = 0; i < k / 2; i++) {
            const int32_t *from = (const int32_t *)weight + c * k / 2 + i;
            for (int64_t j = 0, num = n - c < 16 ? n - c : 16; j < num; j += whole ? 16 : 1) {
                int64_t column = first + c + j;
                int32_t *to = (int32_t *)packed + (column / PANEL * k / 2 + i) * PANEL + column % PANEL;
                if (whole)
                    _mm512_storeu_si512(to, _mm512_i32gather_epi32(down, from, 4));
                else
                    *to = from[j * k / 2];
            }
        }
    }
}

/* `ahead`: where to begin asking for the next panel, `lines` cache lines per step. */
INLINE void product_rows(const int rows, const int lines, const bf16 *ahead, const bf16 *x, const bf16 *panel,
                         const bf16 *bias, bf16 *out, int64_t n, int64_t k, int64_t columns)
{
    vec total[ROWS_AT_ONCE][4] = {{{0}}}, sum[ROWS_AT_ONCE][4];
    for (int64_t i = 0, stop; i < k;) {
        stop = i + summed_at_once(k) < k ? i + summed_at_once(k) : k;
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 4; j++)
                sum[r][j] = _mm512_setzero_ps();
        for (; i < stop; i += 2, panel += 2 * PANEL) {
            pairs w[4];
            for (int j = 0; j < 4; j++)
                w[j] = load_pairs(panel + 32 * j);
            for (int j = 0; j < lines; j++, ahead += 32)
                _mm_prefetch((const char *)ahead, _MM_HINT_T1);
            for (int r = 0; r < rows; r++)
                for (int j = 0; j < 4; j++)
                    sum[r][j] = _mm512_dpbf16_ps(sum[r][j], both_of(x + r * k + i), w[j]);
        }
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 4; j++)
                total[r][j] = _mm512_add_ps(total[r][j], sum[r][j]);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) {
            __mmask16 real = first_lanes(columns - 16 * j);
            if (bias)
                total[r][j] = _mm512_add_ps(total[r][j], widen(_mm256_maskz_loadu_epi16(real, bias + 16 * j)));
            if (real == 0xFFFF)
                store16(out + r * n + 16 * j, total[r][j]);
            else
                _mm256_mask_storeu_epi16(out + r * n + 16 * j, real, narrow(total[r][j]));
        }
}

/* Columns [0, columns) of one panel for `num` rows; rows of `out` are n apart. */
static void product_panel(const bf16 *x, const bf16 *panel, const bf16 *shift, bf16 *out, int64_t num, int64_t n,
                          int64_t k, int64_t columns)
{
    int64_t blocks = (num + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const int64_t lines = blocks >= 4 ? 1 : blocks >= 2 ? 2 : 4; /* four blocks, two or one fetch the next panel */
    const bf16 *ahead = panel + PANEL * k;
    for (int64_t row = 0, rows; row < num; row += rows, blocks--, ahead += lines * 16 * k) {
        rows = (num - row + blocks - 1) / blocks;
        const bf16 *from = x + row * k;
        bf16 *to = out + row * n;
#define RUN(r, l) product_rows(r, l, ahead, from, panel, shift, to, n, k, columns)
#define CASE(r)                                                                        \
    case r: {                                                                          \
        if (ahead >= panel + 2 * PANEL * k) RUN(r, 0);                                 \
        else if (lines == 1) RUN(r, 1);                                                \
        else if (lines == 2) RUN(r, 2);                                                \
        else RUN(r, 4);                                                                \
        break;                                                                         \
    }
        switch (rows) { CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); }
    }
}

void product(const bf16 *x, const bf16 *packed, const bf16 *bias, bf16 *out, int64_t num, int64_t n, int64_t k,
             int32_t threads)
{
    const int64_t num_panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && num * n * k > 1 << 20)
    for (int64_t p = 0; p < num_panels * ((num + ROWS_KEPT - 1) / ROWS_KEPT); p++) {
        const int64_t at = p % num_panels * PANEL, first = p / num_panels * ROWS_KEPT;
        const int64_t rows = num - first < ROWS_KEPT ? num - first : ROWS_KEPT;
        product_panel(x + first * k, packed + at * k, bias ? bias + at : 0, out + first * n + at, rows, n, k, n - at);
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

/* Rows of one head at the nodes, as `pack` puts them; zeros behind them. */
static void pack_nodes(const struct rows *x, int64_t head, const int32_t *node, int64_t num, int64_t dim, bf16 *packed)
{
    for (int64_t c = 0; c < padded(num); c++) {
        const int32_t *from = (const int32_t *)row_of(x, head, node[c < num ? c : 0]);
        int32_t *to = (int32_t *)packed + c / PANEL * dim / 2 * PANEL + c % PANEL;
        for (int64_t i = 0; i < dim / 2; i++)
            to[i * PANEL] = c < num ? from[i] : 0;
    }
}

/* [rows][dim] packed as the transpose of a weight: pairs of rows side by side. Behind `num` rows come zeros up to
 * `all`, which is even. With `node`, rows of a head at the nodes. */
static void pack_pairs(const struct rows *x, int64_t head, const int32_t *node, int64_t num, int64_t all, int64_t dim,
                       bf16 *packed)
{
    for (int64_t t = 0; t < all; t += 2)
        for (int64_t d = 0; d < dim; d += 16) {
            __m512i pair = _mm512_setzero_si512();
            for (int64_t i = 0; i < 2 && t + i < num; i++) {
                const bf16 *from = row_of(x, head, node ? node[t + i] : t + i) + d;
                __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
                pair = _mm512_or_si512(pair, i ? _mm512_slli_epi32(wide, 16) : wide);
            }
            _mm512_storeu_si512(packed + (d / PANEL * all + t) * PANEL + d % PANEL * 2, pair);
        }
}

/* In place: pairs of rows of n side by side. */
static void interleave(bf16 *x, int64_t rows, int64_t n, float *scratch)
{
    bf16 *copy = (bf16 *)scratch;
    for (int64_t r = 0; r < rows; r += 2, x += 2 * n) {
        memcpy(copy, x, 2 * n * sizeof(bf16));
        for (int64_t i = 0; i < n; i += 16) {
            __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(copy + i)));
            __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(copy + n + i)));
            _mm512_storeu_si512(x + 2 * i, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
    }
}

/* The float32 rows `to` += the transpose of x times a panel, both in pairs of rows; x has `step` columns. */
INLINE void transposed_rows(const int rows, const bf16 *x, int64_t step, const bf16 *panel, int64_t num,
                            float *const *to, int64_t columns)
{
    vec sum[ROWS_AT_ONCE][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++)
            sum[r][j] = _mm512_maskz_loadu_ps(first_lanes(columns - 16 * j), to[r] + 16 * j);
    for (int64_t t = 0; t < num; t += 2, x += 2 * step, panel += 2 * PANEL) {
        pairs w[4];
        for (int j = 0; j < 4; j++)
            w[j] = load_pairs(panel + 32 * j);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 4; j++)
                sum[r][j] = _mm512_dpbf16_ps(sum[r][j], both_of(x + 2 * r), w[j]);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++)
            _mm512_mask_storeu_ps(to[r] + 16 * j, first_lanes(columns - 16 * j), sum[r][j]);
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
            switch (count) { ADD(1); ADD(2); ADD(3); ADD(4); ADD(5); ADD(6); }
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
    const vec scale = _mm512_set1_ps(a->scale);
    take_rows(a, b, q, head, a->path + run->first + run->keys - run->queries + b->begin, s->queries);
    against_keys(a, b, s->queries, s->keys, s->probs);
    for (int64_t r = 0; r < b->rows; r++) {
        bf16 *row = s->probs + r * width;
        int64_t end = run->keys - run->queries + b->begin + r / group + 1 - b->low;
        int64_t begin = a->window && end + b->low > a->window ? end - a->window : 0;
        for (int64_t i = 0; i < width; i += 16)
            _mm512_storeu_ps(s->scores + i, _mm512_mul_ps(load16(row + i), scale));
        softmax(s->scores, row, width / PAGE, begin, end);
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
                const vec scale = _mm512_set1_ps(a->scale);
                probabilities(a, run, &b, q, head, &s);
                take_rows(a, &b, up, head, asking, s.grads);
                against_keys(a, &b, s.grads, s.values, s.slopes);
                for (int64_t r = 0; r < b.rows; r++) {
                    bf16 *slope = s.slopes + r * width;
                    const bf16 *prob = s.probs + r * width;
                    vec dot = _mm512_setzero_ps();
                    for (int64_t n = 0; n < width; n += 16)
                        dot = _mm512_fmadd_ps(load16(prob + n), load16(slope + n), dot);
                    dot = _mm512_set1_ps(_mm512_reduce_add_ps(dot));
                    for (int64_t n = 0; n < width; n += 16) {
                        vec x = _mm512_mul_ps(load16(prob + n), _mm512_sub_ps(load16(slope + n), dot));
                        store16(slope + n, _mm512_mul_ps(x, scale));
                    }
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

INLINE vec score_at(const struct scoring *s, const bf16 *row, int64_t at, vec temperature)
{
    __mmask16 real = first_lanes(s->vocab - at);
    vec x = _mm512_div_ps(widen(_mm256_maskz_loadu_epi16(real, row + at)), temperature);
    return _mm512_mask_blend_ps(real, _mm512_set1_ps(-INFINITY), x);
}

/* Logprobs of the targets, logsumexp and entropy of the rows. */
void score(const struct scoring *s)
{
    const vec temperature = _mm512_set1_ps(s->temperature);
#pragma omp parallel for num_threads(s->threads) schedule(static) if (s->threads > 1 && s->rows > 1)
    for (int64_t r = 0; r < s->rows; r++) {
        const bf16 *row = s->logits + r * s->vocab;
        vec top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), dot = _mm512_setzero_ps();
        for (int64_t at = 0; at < s->vocab; at += 16)
            top = _mm512_max_ps(top, score_at(s, row, at, temperature));
        const float best = _mm512_reduce_max_ps(top);
        top = _mm512_set1_ps(best);
        for (int64_t block = 0; block < s->vocab; block += BLOCK) { /* sums of sums: short chains of rounding */
            vec sum = _mm512_setzero_ps(), weighed = _mm512_setzero_ps();
            for (int64_t at = block; at < block + BLOCK && at < s->vocab; at += 16) {
                vec x = _mm512_sub_ps(score_at(s, row, at, temperature), top), e = exp_of(x);
                sum = _mm512_add_ps(sum, e);
                weighed = _mm512_mask_add_ps(weighed, _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.f), _CMP_NLT_UQ),
                                             weighed, _mm512_mul_ps(x, e));
            }
            total = _mm512_add_ps(total, sum);
            dot = _mm512_add_ps(dot, weighed);
        }
        const float sum = _mm512_reduce_add_ps(total);
        s->logsum[r] = logf(sum) + best;
        s->entropy[r] = logf(sum) - _mm512_reduce_add_ps(dot) / sum;
        for (int64_t t = s->edges[r]; t < s->edges[r + 1]; t++) {
            float lanes[16];
            _mm512_storeu_ps(lanes, score_at(s, row, s->targets[t] / 16 * 16, temperature));
            s->logp[t] = lanes[s->targets[t] % 16] - s->logsum[r];
        }
    }
}

/* dL/dz_j = sum of the gradients of target j - p_j (sum of all targets' gradients + dL/dH (log p_j + H)) */
void score_grad(const struct scoring *s)
{
    const vec temperature = _mm512_set1_ps(s->temperature);
#pragma omp parallel for num_threads(s->threads) schedule(static) if (s->threads > 1 && s->rows > 1)
    for (int64_t r = 0; r < s->rows; r++) {
        bf16 *row = s->logits + r * s->vocab;
        float all = 0;
        for (int64_t t = s->edges[r]; t < s->edges[r + 1]; t++)
            all += s->logp_grad[t];
        const float slope = s->entropy_grad[r], start = all + slope * s->entropy[r];
        const vec logsum = _mm512_set1_ps(s->logsum[r]), by_logp = _mm512_set1_ps(slope), base = _mm512_set1_ps(start);
        for (int64_t at = 0; at < s->vocab; at += 16) {
            vec logp = _mm512_sub_ps(score_at(s, row, at, temperature), logsum);
            vec scale = slope ? _mm512_fmadd_ps(_mm512_max_ps(logp, _mm512_set1_ps(-104.f)), by_logp, base) : base;
            vec x = _mm512_div_ps(_mm512_mul_ps(exp_of(logp), scale), temperature);
            x = _mm512_sub_ps(_mm512_setzero_ps(), x);
            _mm256_mask_storeu_epi16(row + at, first_lanes(s->vocab - at), narrow(x));
        }
        for (int64_t t = s->edges[r]; t < s->edges[r + 1]; t++) {
            const int64_t own = s->targets[t];
            if (own < 0 || own >= s->vocab)
                continue;
            float sum = -expf(s->logp[t]) * (start + slope * s->logp[t]);
            for (int64_t same = s->edges[r]; same < s->edges[r + 1]; same++)
                sum += s->targets[same] == s->targets[t] ? s->logp_grad[same] : 0;
            row[own] = (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(sum / s->temperature)), 0);
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

/* 16 logits from `at` on, divided by the temperature; -inf past the end. */
INLINE vec logits_at(const struct sampling *s, int64_t row, int64_t at, vec temperature)
{
    __mmask16 real = first_lanes(s->vocab - at);
    vec x;
    if (s->is_float)
        x = _mm512_maskz_loadu_ps(real, (const float *)s->logits + row * s->vocab + at);
    else
        x = widen(_mm256_maskz_loadu_epi16(real, (const bf16 *)s->logits + row * s->vocab + at));
    return _mm512_mask_blend_ps(real, _mm512_set1_ps(-INFINITY), _mm512_div_ps(x, temperature));
}

static void sample_row(const struct sampling *s, int64_t row, double *sums)
{
    const vec temperature = _mm512_set1_ps(s->temperature[row] > 0 ? s->temperature[row] : 1.f);
    const vec none = _mm512_set1_ps(-INFINITY);
    vec top = none, score;
    __mmask16 odd = 0;
    int64_t num = (s->vocab + BLOCK - 1) / BLOCK, token = -1, block = 0;
    for (int64_t at = 0; at < s->vocab; at += 16) {
        score = logits_at(s, row, at, temperature);
        odd |= _mm512_cmp_ps_mask(score, score, _CMP_UNORD_Q);
        top = _mm512_max_ps(top, score);
    }
    const float best = _mm512_reduce_max_ps(top);
    s->ok[row] = !odd && isfinite(best);
    if (!s->ok[row])
        return;
    top = _mm512_set1_ps(best);
    double total = 0, upto = 0;
    for (int64_t b = 0; b < num; total += sums[b++]) {
        vec sum = _mm512_setzero_ps();
        for (int64_t at = b * BLOCK; at < (b + 1) * BLOCK; at += 16) {
            score = logits_at(s, row, at, temperature);
            __mmask16 equal = token < 0 ? _mm512_cmp_ps_mask(score, top, _CMP_EQ_OQ) : 0;
            token = equal ? at + __builtin_ctz(equal) : token;
            sum = _mm512_add_ps(sum, exp_of(_mm512_sub_ps(score, top)));
        }
        sums[b] = (double)_mm512_reduce_add_ps(sum);
    }
    double target = s->uniform[row] * total, logit = best;
    if (s->temperature[row] > 0) {
        while (block < num - 1 && upto + sums[block] <= target)
            upto += sums[block++];
        float weights[BLOCK];
        for (int i = 0; i < BLOCK; i += 16)
            _mm512_storeu_ps(weights + i, exp_of(_mm512_sub_ps(logits_at(s, row, block * BLOCK + i, temperature), top)));
        /* Rounding may leave the target at or past the block's end: the last token that has weight is meant then. */
        for (int i = 0; i < BLOCK; i++) {
            upto += weights[i];
            token = weights[i] > 0 ? block * BLOCK + i : token;
            if (upto > target)
                break;
        }
        float lanes[16];
        _mm512_storeu_ps(lanes, logits_at(s, row, token / 16 * 16, temperature));
        logit = lanes[token % 16];
    }
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
