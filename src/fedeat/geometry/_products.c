/* Inner products and weighted sums of a few long float32 vectors that lie anywhere in memory.
 *
 * A BLAS multiplies large square matrices well, and n x d by d x n with n of tens badly: it packs and pads what is read
 * once, forms both triangles, and wants one matrix where clients send many tensors. Here tiles of T x T rows run over
 * short columns that stay in the cache, with all T*T sums in registers. Sums run in float32 over one chunk, each vector
 * lane by itself, and in float64 over chunks.
 *
 * The module is optional: `products.py` does the same with torch where it was not built.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#if __GNUC__ >= 12 || __clang_major__ >= 14
#define HALF_PRECISION /* the compiler knows AVX512-BF16; whether the processor does is asked at run time */
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define CACHED_BYTES (512 << 10) /* that stay in the second cache between being written or read and being used */
#define SHORT 256                /* columns of which the first cache holds the rows of three tiles */
#define FEW 12                   /* rows that are added up side by side where there are no more */
#define GROUP 8                  /* rows that are added up side by side */
#define AHEAD 2048               /* columns that a row is fetched ahead where it is read twice, chunk by chunk */
#define LONG_BYTES (1 << 20)     /* of a sum that will not be found in the second cache by who uses it next */

typedef float lanes4 __attribute__((vector_size(16)));
typedef float lanes8 __attribute__((vector_size(32)));

INLINE float sum4(lanes4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }

/* Sum of the lanes of a vector of 16, 32 or 64 bytes. */
INLINE float lane_sum(const void *vector, size_t bytes)
{
    lanes8 half[2];
    lanes4 quarter[2];
    if (bytes == 64) {
        memcpy(half, vector, 64);
        half[0] += half[1];
        memcpy(quarter, half, 32);
    } else if (bytes == 32) {
        memcpy(quarter, vector, 32);
    } else {
        memcpy(quarter, vector, 16);
        return sum4(quarter[0]);
    }
    return sum4(quarter[0] + quarter[1]);
}

/* Defines NAME(rows, n, columns, chunk, total): adds <rows[i], rows[j]>, i <= j, to total[i * n + j].
 *
 * WIDTH: bytes of a vector. T: rows of a tile, such that T * T sums and T + 1 operands fit into the registers.
 *
 * Rows of three tiles are read by short columns that the first cache holds until all have passed: the processor fetches
 * them by itself, and sums wait in memory from one column to the next. All others have columns as long as a sum in
 * float32 may be, of which the next are fetched to the second cache while a tile is worked on.
 */
#define DEFINE_PRODUCTS(NAME, TARGET, WIDTH, T)                                                                        \
    typedef float NAME##_vector __attribute__((vector_size(WIDTH), aligned(4), may_alias));                            \
                                                                                                                       \
    /* Adds to sums, or begins them. A tile on the diagonal, where a is b, has no use for what lies below. */          \
    TARGET INLINE void NAME##_tile(int diagonal, const float *const a[T], const float *const b[T], size_t begin,       \
                                   size_t end, const float *const *ahead, size_t aheads, int first,                    \
                                   NAME##_vector sums[T][T])                                                           \
    {                                                                                                                  \
        const size_t lanes = WIDTH / sizeof(float);                                                                    \
        NAME##_vector sum[T][T]; /* no pointer to any of it is taken, or it would not stay in registers */             \
        UNROLL for (int i = 0; i < T; i++)                                                                             \
            UNROLL for (int j = 0; j < T; j++) sum[i][j] = first ? (NAME##_vector){0} : sums[i][j];                    \
        for (size_t k = begin; k < end; k += lanes) {                                                                  \
            for (size_t p = 0; p < aheads; p++) __builtin_prefetch(ahead[p] + k, 0, 2);                                \
            NAME##_vector left[T];                                                                                     \
            UNROLL for (int i = 0; i < T; i++) left[i] = *(const NAME##_vector *)(a[i] + k);                           \
            UNROLL for (int j = 0; j < T; j++) {                                                                       \
                NAME##_vector right = diagonal ? left[j] : *(const NAME##_vector *)(b[j] + k);                         \
                UNROLL for (int i = 0; i < T; i++) if (!diagonal || i <= j) sum[i][j] += left[i] * right;              \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int i = 0; i < T; i++)                                                                             \
            UNROLL for (int j = 0; j < T; j++) if (!diagonal || i <= j) sums[i][j] = sum[i][j];                        \
    }                                                                                                                  \
                                                                                                                       \
    /* Adds a tile's sums, and products of coordinates begin to end, which fill no vector, to its place in total. */   \
    TARGET INLINE void NAME##_settle(NAME##_vector sums[T][T], const float *const a[T], const float *const b[T],       \
                                     size_t begin, size_t end, size_t i, size_t j, size_t n, double *total)            \
    {                                                                                                                  \
        for (size_t s = 0; s < T && i + s < n; s++) {                                                                  \
            for (size_t t = i == j ? s : 0; t < T && j + t < n; t++) {                                                 \
                float part = lane_sum(&sums[s][t], WIDTH);                                                             \
                for (size_t k = begin; k < end; k++) part += a[s][k] * b[t][k];                                        \
                total[(i + s) * n + j + t] += part;                                                                    \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    TARGET static void NAME(const float *const *rows, size_t n, size_t columns, size_t chunk, double *total)           \
    {                                                                                                                  \
        const size_t lanes = WIDTH / sizeof(float), strips = (n + T - 1) / T, tiles = strips * (strips + 1) / 2;       \
        const size_t three = strips == 2, column = three ? SHORT : chunk, most = three ? 0 : (n + tiles - 1) / tiles;  \
        for (size_t begin = 0; begin < columns; begin += chunk) {                                                      \
            size_t end = columns - begin < chunk ? columns : begin + chunk, next = end < columns ? 0 : n;              \
            size_t whole = begin + (end - begin) / lanes * lanes;                                                      \
            NAME##_vector sums[3][T][T]; /* of three tiles, or of the one that is worked on */                         \
            for (size_t from = begin; from == begin || from < whole; from += column) {                                 \
                size_t to = whole - from < column ? whole : from + column, tile = 0;                                   \
                for (size_t i = 0; i < n; i += T) {                                                                    \
                    for (size_t j = i; j < n; j += T, tile += three) {                                                 \
                        const float *a[T], *b[T], *ahead[T];                                                           \
                        size_t aheads = 0;                                                                             \
                        for (size_t t = 0; t < T; t++) { /* one that sticks out repeats a row, and is cut off later */ \
                            a[t] = rows[i + t < n ? i + t : i];                                                        \
                            b[t] = rows[j + t < n ? j + t : j];                                                        \
                        }                                                                                              \
                        while (aheads < most && next < n) ahead[aheads++] = rows[next++] + chunk; /* may miss */       \
                        if (i == j)                                                                                    \
                            NAME##_tile(1, a, a, from, to, ahead, aheads, from == begin, sums[tile]);                  \
                        else                                                                                           \
                            NAME##_tile(0, a, b, from, to, ahead, aheads, from == begin, sums[tile]);                  \
                        if (to == whole) NAME##_settle(sums[tile], a, b, whole, end, i, j, n, total);                  \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

/* Defines NAME(rows, weights, n, columns, stream, out): out = sum_i weights[i] * rows[i], in float32.
 *
 * A few rows are read side by side, each for a while: the processor foresees that better than it can be told, but loses
 * track of many. What they add to is a part of the sum that stays in the second cache.
 *
 * STREAM(to, vector): writes past the caches, to an address that is a multiple of WIDTH. Of use to a sum so long that
 * nobody will find it there: its lines would be read only to be overwritten.
 */
#define DEFINE_COMBINATION(NAME, TARGET, WIDTH, STREAM)                                                                \
    typedef float NAME##_vector __attribute__((vector_size(WIDTH), aligned(4), may_alias));                            \
                                                                                                                       \
    /* vectors: at most eight of the sum at a time. ahead: how far on a row is fetched to the second cache, or 0. */   \
    TARGET INLINE void NAME##_group(const float *const *rows, const float *weights, size_t n, int first, int stream,   \
                                    size_t vectors, size_t ahead, size_t begin, size_t end, float *out)                \
    {                                                                                                                  \
        const size_t lanes = WIDTH / sizeof(float), line = vectors * lanes;                                            \
        size_t k = begin;                                                                                              \
        for (; k + line <= end; k += line) {                                                                           \
            NAME##_vector sum[8];                                                                                      \
            UNROLL for (size_t l = 0; l < vectors; l++)                                                                \
                sum[l] = first ? (NAME##_vector){0} : *(const NAME##_vector *)(out + k + l * lanes);                   \
            for (size_t i = 0; i < n; i++) {                                                                           \
                const float *row = rows[i] + k;                                                                        \
                UNROLL for (size_t l = 0; ahead && l < line; l += 16) __builtin_prefetch(row + l + ahead, 0, 2);       \
                UNROLL for (size_t l = 0; l < vectors; l++)                                                            \
                    sum[l] += weights[i] * *(const NAME##_vector *)(row + l * lanes);                                  \
            }                                                                                                          \
            UNROLL for (size_t l = 0; l < vectors; l++) {                                                              \
                if (stream)                                                                                            \
                    STREAM(out + k + l * lanes, sum[l]);                                                               \
                else                                                                                                   \
                    *(NAME##_vector *)(out + k + l * lanes) = sum[l];                                                  \
            }                                                                                                          \
        }                                                                                                              \
        for (; k < end; k++) {                                                                                         \
            float rest = first ? 0 : out[k];                                                                           \
            for (size_t i = 0; i < n; i++) rest += weights[i] * rows[i][k];                                            \
            out[k] = rest;                                                                                             \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    TARGET static void NAME##_ahead(const float *const *rows, const float *weights, size_t n, size_t columns,          \
                                    float *out)                                                                        \
    {                                                                                                                  \
        size_t i = GROUP;                                                                                              \
        if (n <= FEW) {                                                                                                \
            NAME##_group(rows, weights, n, 1, 0, 4, 0, 0, columns, out);                                               \
            return;                                                                                                    \
        }                                                                                                              \
        NAME##_group(rows, weights, GROUP, 1, 0, 4, AHEAD, 0, columns, out);                                           \
        for (; i < n; i += GROUP)                                                                                      \
            NAME##_group(rows + i, weights + i, n - i < GROUP ? n - i : GROUP, 0, 0, 4, AHEAD, 0, columns, out);       \
    }                                                                                                                  \
                                                                                                                       \
    TARGET static void NAME(const float *const *rows, const float *weights, size_t n, size_t columns, int stream,      \
                            float *out)                                                                                \
    {                                                                                                                  \
        const size_t chunk = 32768;                                                                                    \
        if (n <= FEW) {                                                                                                \
            size_t ragged = (WIDTH - (uintptr_t)out % WIDTH) % WIDTH / sizeof(float);                                  \
            size_t plain = stream && ragged < columns ? ragged : columns;                                              \
            NAME##_group(rows, weights, n, 1, 0, 8, 0, 0, plain, out);                                                 \
            NAME##_group(rows, weights, n, 1, 1, 8, 0, plain, columns, out);                                           \
            return;                                                                                                    \
        }                                                                                                              \
        for (size_t begin = 0; begin < columns; begin += chunk) {                                                      \
            size_t end = columns - begin < chunk ? columns : begin + chunk, i = GROUP;                                 \
            NAME##_group(rows, weights, GROUP, 1, 0, 8, 0, begin, end, out);                                           \
            for (; i < n; i += GROUP)                                                                                  \
                NAME##_group(rows + i, weights + i, n - i < GROUP ? n - i : GROUP, 0, 0, 8, 0, begin, end, out);       \
        }                                                                                                              \
    }

/* Defines NAME(rows, weights, n, columns, chunk, moved, out, squares): out as COMBINATION forms it, and the squared
 * distances of all rows from it added to squares; a chunk is still in the cache when it is read again.
 *
 * moved: room for n pointers.
 */
#define DEFINE_DISTANCES(NAME, COMBINATION, TARGET, WIDTH)                                                             \
    typedef float NAME##_vector __attribute__((vector_size(WIDTH), aligned(4), may_alias));                            \
                                                                                                                       \
    TARGET static float NAME##_square(const float *x, const float *z, size_t size)                                     \
    {                                                                                                                  \
        const size_t lanes = WIDTH / sizeof(float);                                                                    \
        NAME##_vector sum[4];                                                                                          \
        float total = 0;                                                                                               \
        size_t k = 0;                                                                                                  \
        memset(sum, 0, sizeof sum);                                                                                    \
        for (; k + 4 * lanes <= size; k += 4 * lanes) {                                                                \
            UNROLL for (size_t l = 0; l < 4; l++) {                                                                    \
                NAME##_vector away = *(const NAME##_vector *)(x + k + l * lanes) -                                     \
                                     *(const NAME##_vector *)(z + k + l * lanes);                                      \
                sum[l] += away * away;                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
        sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);                                                                \
        for (; k < size; k++) total += (x[k] - z[k]) * (x[k] - z[k]);                                                  \
        return total + lane_sum(&sum[0], WIDTH);                                                                       \
    }                                                                                                                  \
                                                                                                                       \
    TARGET static void NAME(const float *const *rows, const float *weights, size_t n, size_t columns, size_t chunk,    \
                            const float **moved, float *out, double *squares)                                          \
    {                                                                                                                  \
        for (size_t begin = 0; begin < columns; begin += chunk) {                                                      \
            size_t size = columns - begin < chunk ? columns - begin : chunk;                                           \
            for (size_t i = 0; i < n; i++) moved[i] = rows[i] + begin;                                                 \
            COMBINATION##_ahead(moved, weights, n, size, out + begin);                                                 \
            for (size_t i = 0; i < n; i++) squares[i] += NAME##_square(moved[i], out + begin, size);                   \
        }                                                                                                              \
    }

typedef void (*products_fn)(const float *const *, size_t, size_t, size_t, double *);
typedef void (*combination_fn)(const float *const *, const float *, size_t, size_t, int, float *);
typedef void (*distances_fn)(const float *const *, const float *, size_t, size_t, size_t, const float **, float *,
                             double *);

#if defined(__x86_64__)
DEFINE_PRODUCTS(products_avx512, __attribute__((target("avx512f,fma"))), 64, 5)
DEFINE_PRODUCTS(products_avx2, __attribute__((target("avx2,fma"))), 32, 3)
DEFINE_PRODUCTS(products_plain, , 16, 3)
#define STREAM_32(to, vector) _mm256_stream_ps(to, (__m256)(vector))
#define STREAM_16(to, vector) _mm_stream_ps(to, (__m128)(vector))
DEFINE_COMBINATION(combination_avx2, __attribute__((target("avx2,fma"))), 32, STREAM_32)
DEFINE_COMBINATION(combination_plain, , 16, STREAM_16)
DEFINE_DISTANCES(distances_avx2, combination_avx2, __attribute__((target("avx2,fma"))), 32)
DEFINE_DISTANCES(distances_plain, combination_plain, , 16)

INLINE int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static products_fn best_products(void)
{
    if (__builtin_cpu_supports("avx512f")) return products_avx512;
    return has_avx2() ? products_avx2 : products_plain;
}

static combination_fn best_combination(void) { return has_avx2() ? combination_avx2 : combination_plain; }
static distances_fn best_distances(void) { return has_avx2() ? distances_avx2 : distances_plain; }
#else
DEFINE_PRODUCTS(products_plain, , 16, 5)
#define STREAM_16(to, vector) (void)(*(combination_plain_vector *)(to) = (vector))
DEFINE_COMBINATION(combination_plain, , 16, STREAM_16)
DEFINE_DISTANCES(distances_plain, combination_plain, , 16)

static products_fn best_products(void) { return products_plain; }
static combination_fn best_combination(void) { return combination_plain; }
static distances_fn best_distances(void) { return distances_plain; }
#endif

/* Columns of n rows that stay in the second cache, at most as many as a sum in float32 may have. */
static size_t fitting(size_t n, size_t most)
{
    size_t columns = CACHED_BYTES / sizeof(float) / (n ? n : 1) / 64 * 64;
    return columns > most ? most : columns < 256 ? 256 : columns;
}

/* The same of the differences rows[i] - reference, which are formed chunk by chunk in space. */
static void products_about(products_fn products, const float *const *rows, const float *reference, size_t n,
                           size_t columns, size_t chunk, float *space, const float **shifted, double *total)
{
    for (size_t begin = 0; begin < columns; begin += chunk) {
        size_t size = columns - begin < chunk ? columns - begin : chunk;
        for (size_t i = 0; i < n; i++) {
            float *row = space + i * (chunk + 16); /* no power of two: such rows would share few sets of the cache */
            for (size_t k = 0; k < size; k++) row[k] = rows[i][begin + k] - reference[begin + k];
            shifted[i] = row;
        }
        products(shifted, n, size, chunk, total);
    }
}

#ifdef HALF_PRECISION
#define HALF_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#define HALF_T 5
#define HALF_COLUMNS 1536 /* of which one chunk in bfloat16 and the next in float32 share the second cache */

INLINE int has_half_precision(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16");
}

/* Rounds up to 16 coordinates to bfloat16, filled up with zeros; adds to sum[0..2] their products with themselves, with
 * themselves rounded, and with those of another row. */
HALF_TARGET INLINE void halve_some(__mmask16 some, const float *row, const float *other, uint16_t *out, __m512 sum[3])
{
    __m512 x = _mm512_maskz_loadu_ps(some, row);
    __m256i half = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256((__m256i *)out, half);
    sum[0] = _mm512_fmadd_ps(x, x, sum[0]);
    sum[1] = _mm512_fmadd_ps(x, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16), sum[1]);
    sum[2] = _mm512_fmadd_ps(x, _mm512_maskz_loadu_ps(some, other), sum[2]);
}

/* The same of a row, which is filled up to whole vectors of 32. */
HALF_TARGET static void halve(const float *row, const float *other, size_t size, uint16_t *out, double sums[3])
{
    __m512 sum[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    size_t k = 0;
    for (; k + 16 <= size; k += 16) halve_some(0xffff, row + k, other + k, out + k, sum);
    for (; k % 32 || k < size; k += 16)
        halve_some(k < size ? (__mmask16)((1u << (size - k)) - 1) : 0, row + k, other + k, out + k, sum);
    UNROLL for (size_t l = 0; l < 3; l++) sums[l] += _mm512_reduce_add_ps(sum[l]);
}

/* As a tile of float32, of the pairs that one instruction multiplies and adds; of one on the diagonal above it only. */
HALF_TARGET INLINE void half_tile(int diagonal, const uint16_t *const a[HALF_T], const uint16_t *const b[HALF_T],
                                  size_t size, const float *const *ahead, size_t aheads, float out[HALF_T][HALF_T])
{
    __m512 sum[HALF_T][HALF_T];
    UNROLL for (int i = 0; i < HALF_T; i++) UNROLL for (int j = 0; j < HALF_T; j++) sum[i][j] = _mm512_setzero_ps();
    for (size_t k = 0; k < size; k += 32) {
        for (size_t p = 0; p < aheads; p++) {
            __builtin_prefetch(ahead[p] + k, 0, 2);
            __builtin_prefetch(ahead[p] + k + 16, 0, 2);
        }
        __m512bh left[HALF_T];
        UNROLL for (int i = 0; i < HALF_T; i++) left[i] = (__m512bh)_mm512_loadu_si512(a[i] + k);
        UNROLL for (int j = 0; j < HALF_T; j++) {
            __m512bh right = diagonal ? left[j] : (__m512bh)_mm512_loadu_si512(b[j] + k);
            UNROLL for (int i = 0; i < HALF_T; i++)
                if (!diagonal || i < j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left[i], right);
        }
    }
    UNROLL for (int i = 0; i < HALF_T; i++)
        UNROLL for (int j = 0; j < HALF_T; j++)
            if (!diagonal || i < j) out[i][j] = _mm512_reduce_add_ps(sum[i][j]);
}

/* Adds <rows[i], rows[j]>, i < j, of rows rounded to bfloat16, to total, and to sums what `halve` says of each row, the
 * other being the row `whole`.
 *
 * halved: room for n rows of HALF_COLUMNS + 32.
 */
HALF_TARGET static void half_products(const float *const *rows, size_t whole, size_t n, size_t columns,
                                      uint16_t *halved, double *total, double *sums)
{
    const size_t T = HALF_T, width = HALF_COLUMNS + 32; /* no power of two, as above */
    size_t tiles = ((n + T - 1) / T) * ((n + T - 1) / T + 1) / 2, most = (n + tiles - 1) / tiles;
    for (size_t begin = 0; begin < columns; begin += HALF_COLUMNS) {
        size_t size = columns - begin < HALF_COLUMNS ? columns - begin : HALF_COLUMNS;
        size_t next = begin + size < columns ? 0 : n;
        for (size_t i = 0; i < n; i++)
            halve(rows[i] + begin, rows[whole] + begin, size, halved + i * width, sums + 3 * i);
        for (size_t i = 0; i < n; i += T) {
            for (size_t j = i; j < n; j += T) {
                const uint16_t *a[HALF_T], *b[HALF_T];
                const float *ahead[HALF_T];
                float part[HALF_T][HALF_T];
                size_t aheads = 0;
                for (size_t t = 0; t < T; t++) {
                    a[t] = halved + (i + t < n ? i + t : i) * width;
                    b[t] = halved + (j + t < n ? j + t : j) * width;
                }
                while (aheads < most && next < n) ahead[aheads++] = rows[next++] + begin + HALF_COLUMNS;
                if (i == j)
                    half_tile(1, a, a, size, ahead, aheads, part);
                else
                    half_tile(0, a, b, size, ahead, aheads, part);
                for (size_t s = 0; s < T && i + s < n; s++)
                    for (size_t t = i == j ? s + 1 : 0; t < T && j + t < n; t++)
                        total[(i + s) * n + j + t] += part[s][t];
            }
        }
    }
}
#endif

/* Stretches of vectors: count times `width` addresses, and the coordinates of each. */
typedef struct {
    Py_buffer addresses, lengths;
    size_t count, width;
} stretches;

INLINE const float *const *vectors(const stretches *all, size_t which)
{
    return (const float *const *)all->addresses.buf + which * all->width;
}

INLINE size_t length(const stretches *all, size_t which) { return (size_t)((const int64_t *)all->lengths.buf)[which]; }

INLINE void measure(stretches *all)
{
    all->count = (size_t)all->lengths.len / sizeof(int64_t);
    all->width = all->count ? (size_t)all->addresses.len / sizeof(int64_t) / all->count : 0;
}

INLINE void release(stretches *all)
{
    PyBuffer_Release(&all->addresses);
    PyBuffer_Release(&all->lengths);
}

/* Asks for large pages where a sum will be written that may never have been: ordinary ones, touched for the first time,
 * cost the kernel half as long as reading a few updates takes. */
static void expect_writing(float *out, size_t columns)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2 << 20;
    uintptr_t begin = ((uintptr_t)out + page - 1) / page * page, end = (uintptr_t)(out + columns) / page * page;
    if (end > begin) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* advice: no harm where it is refused */
#else
    (void)out;
    (void)columns;
#endif
}

static PyObject *accumulate(PyObject *module, PyObject *arguments)
{
    stretches all;
    Py_ssize_t centre, longest;
    unsigned long long total;
    float *space = NULL;
    const float **shifted = NULL;
    int done;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*nnK", &all.addresses, &all.lengths, &centre, &longest, &total)) return NULL;
    measure(&all);
    {
        size_t n = all.width, chunk = centre < 0 ? (size_t)longest : fitting(n, (size_t)longest);
        products_fn products = best_products();
        if (centre >= 0) {
            space = malloc(n * (chunk + 16) * sizeof(float));
            shifted = malloc(n * sizeof(float *));
        }
        done = centre < 0 || (space && shifted);
        if (done) {
            Py_BEGIN_ALLOW_THREADS;
            for (size_t k = 0; k < all.count; k++) {
                const float *const *rows = vectors(&all, k);
                double *sums = (double *)(uintptr_t)total;
                if (centre < 0)
                    products(rows, n, length(&all, k), chunk, sums);
                else
                    products_about(products, rows, rows[centre], n, length(&all, k), chunk, space, shifted, sums);
            }
            Py_END_ALLOW_THREADS;
        }
    }
    free(shifted);
    free(space);
    release(&all);
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

#ifdef HALF_PRECISION
static PyObject *accumulate_half(PyObject *module, PyObject *arguments)
{
    stretches all;
    Py_ssize_t whole;
    unsigned long long total, sums;
    uint16_t *halved;
    (void)module;
    if (!has_half_precision()) {
        PyErr_SetString(PyExc_RuntimeError, "this processor multiplies no pairs of bfloat16");
        return NULL;
    }
    if (!PyArg_ParseTuple(arguments, "y*y*nKK", &all.addresses, &all.lengths, &whole, &total, &sums)) return NULL;
    measure(&all);
    halved = malloc(all.width * (HALF_COLUMNS + 32) * sizeof(uint16_t));
    if (halved) {
        Py_BEGIN_ALLOW_THREADS;
        for (size_t k = 0; k < all.count; k++) {
            half_products(vectors(&all, k), (size_t)whole, all.width, length(&all, k), halved,
                          (double *)(uintptr_t)total, (double *)(uintptr_t)sums);
        }
        Py_END_ALLOW_THREADS;
        free(halved);
    }
    release(&all);
    if (!halved) return PyErr_NoMemory();
    Py_RETURN_NONE;
}
#endif

static PyObject *half_precision(PyObject *module, PyObject *nothing)
{
    (void)module;
    (void)nothing;
#ifdef HALF_PRECISION
    return PyBool_FromLong(has_half_precision());
#else
    Py_RETURN_FALSE;
#endif
}

static PyObject *combine(PyObject *module, PyObject *arguments)
{
    stretches all;
    unsigned long long weights;
    size_t columns = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*K", &all.addresses, &all.lengths, &weights)) return NULL;
    measure(&all);
    Py_BEGIN_ALLOW_THREADS;
    for (size_t k = 0; k < all.count; k++) columns += length(&all, k);
    for (size_t k = 0; k < all.count; k++) {
        const float *const *rows = vectors(&all, k);
        expect_writing((float *)(uintptr_t)rows[all.width - 1], length(&all, k));
        best_combination()(rows, (const float *)(uintptr_t)weights, all.width - 1, length(&all, k),
                           columns >= LONG_BYTES / sizeof(float), (float *)(uintptr_t)rows[all.width - 1]);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what was written past the caches is seen by all from here on */
    Py_END_ALLOW_THREADS;
    release(&all);
    Py_RETURN_NONE;
}

static PyObject *distances(PyObject *module, PyObject *arguments)
{
    stretches all;
    unsigned long long weights, squares;
    Py_ssize_t longest;
    const float **moved;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*KnK", &all.addresses, &all.lengths, &weights, &longest, &squares))
        return NULL;
    measure(&all);
    moved = malloc((all.width + 1) * sizeof(float *));
    if (moved) {
        Py_BEGIN_ALLOW_THREADS;
        for (size_t k = 0; k < all.count; k++) {
            const float *const *rows = vectors(&all, k);
            size_t n = all.width - 1;
            expect_writing((float *)(uintptr_t)rows[n], length(&all, k));
            best_distances()(rows, (const float *)(uintptr_t)weights, n, length(&all, k), fitting(n, (size_t)longest),
                             moved, (float *)(uintptr_t)rows[n], (double *)(uintptr_t)squares);
        }
        Py_END_ALLOW_THREADS;
        free(moved);
    }
    release(&all);
    if (!moved) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"accumulate", accumulate, METH_VARARGS,
     "accumulate(addresses, lengths, centre, chunk, total): adds <x_i - z, x_j - z>, i <= j, to total (n, n) float64."
     "\n\nAddresses (k, n) and lengths (k,) of contiguous float32 vectors as buffers of int64; centre is the client "
     "that is z, or -1."},
#ifdef HALF_PRECISION
    {"accumulate_half", accumulate_half, METH_VARARGS,
     "accumulate_half(addresses, lengths, whole, total, sums): as accumulate, for i < j, of vectors x rounded to bfloat16 "
     "r; and adds <x_i, x_i>, <x_i, r_i> and <x_i, x_whole> to sums (n, 3) float64."},
#endif
    {"half_precision", half_precision, METH_NOARGS, "half_precision(): whether accumulate_half can be called."},
    {"combine", combine, METH_VARARGS,
     "combine(addresses, lengths, weights): writes sum_i weights_i x_i, all float32, to the last of n + 1 addresses."},
    {"distances", distances, METH_VARARGS,
     "distances(addresses, lengths, weights, chunk, squares): as combine, and adds |x_i - sum|^2 to squares (n,) "
     "float64."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_products", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__products(void) { return PyModule_Create(&definition); }
