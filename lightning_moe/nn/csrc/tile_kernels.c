/* What torch has no single operation for, each in one pass over memory: gathering rows into a buffer, and SwiGLU between
 * an expert's two products, with all that its backward needs. Optional: tile_operations.py calls it where it was compiled,
 * and torch's operations do the same elsewhere. C without Python or torch, so that a build outlives their versions.
 *
 * R rows of a tile, of which the first `size` are real and the others padding; F expert width. All arrays are contiguous
 * and none overlap; bf16 is computed in fp32 and rounded once.
 */
#include <stdint.h>
#include <string.h>

/* To be raised with every change of what is exported, here and in tile_operations.py: a library that was built for other
 * code would write where it should not. */
int32_t tile_kernels_version(void) { return 1; }

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

typedef union {
  float value;
  uint32_t bits;
} Float;

INLINE float load_fp32(float x) { return x; }

INLINE float store_fp32(float x) { return x; }

INLINE float load_bf16(uint16_t x) {
  Float wide;
  wide.bits = (uint32_t)x << 16;
  return wide.value;
}

/* To the nearest, ties to even, as torch rounds; NaN must not become infinity. */
INLINE uint16_t store_bf16(float x) {
  Float wide;
  wide.value = x;
  uint32_t rounded = (wide.bits + 0x7fffu + ((wide.bits >> 16) & 1u)) >> 16;
  return (uint16_t)((wide.bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* 1 / (1 + exp(-x)): exp by Cody and Waite's reduction to |r| <= log(2) / 2 and the polynomial of Cephes' expf. Within
 * +-87 fp32 holds exp; beyond, the result differs from 0 and 1 by less than 1e-37. */
INLINE float sigmoid(float x) {
  float y = -x > -87.0f ? -x : -87.0f; /* of NaN a number, too, since NaN has no k; what it is multiplied by is NaN */
  y = y < 87.0f ? y : 87.0f;
  float k = __builtin_rintf(y * 1.44269504088896341f);
  float r = (y - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Float power; /* 2^k */
  power.bits = (uint32_t)((int32_t)k + 127) << 23;
  return 1.0f / (1.0f + p * power.value);
}

/* act = silu(gate) * up, `count` elements of each. */
#define FORWARD(type) (const type *restrict gate, const type *restrict up, type *restrict act, int64_t count)

/* Of rows with weights w and the gradient g of their unweighted activation:
 *   act = w * silu(gate) * up, [R, F]                                what the second weight's gradient is made of
 *   grad_h = (w * g * up * silu'(gate), w * g * silu(gate)), [R, 2F]
 *   grad_weights = sum over f of g * silu(gate) * up, [size]
 * Padding of act and grad_h becomes 0, so that it adds nothing to the gradients of the weights. */
#define BACKWARD(type)                                                                                                 \
  (const type *restrict gate, const type *restrict up, const type *restrict grad, const float *restrict weights,       \
   type *restrict act, type *restrict grad_h, float *restrict grad_weights, int64_t rows, int64_t size, int64_t F)

/* The same of `count` elements of one row; returns the weight's gradient. */
#define BACKWARD_ROW(type, out)                                                                                        \
  (const type *restrict gate, const type *restrict up, const type *restrict grad, float weight, out *restrict act,     \
   out *restrict grad_gate, out *restrict grad_up, int64_t count)

#define DEFINE_FORWARD(dtype, type, suffix, attribute)                                                                 \
  attribute static void forward_##dtype##suffix FORWARD(type) {                                                        \
    for (int64_t i = 0; i < count; i++) {                                                                              \
      float x = load_##dtype(gate[i]);                                                                                 \
      act[i] = store_##dtype(x * sigmoid(x) * load_##dtype(up[i]));                                                    \
    }                                                                                                                  \
  }

#define DEFINE_BACKWARD_ROW(name, dtype, type, attribute)                                                              \
  attribute static float name BACKWARD_ROW(type, float) {                                                              \
    float sum = 0.0f;                                                                                                  \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < count; i++) {                                       \
      float x = load_##dtype(gate[i]), y = load_##dtype(up[i]), g = load_##dtype(grad[i]);                             \
      float s = sigmoid(x), silu = x * s, product = silu * y;                                                          \
      sum += product * g;                                                                                              \
      act[i] = product * weight;                                                                                       \
      g *= weight;                                                                                                     \
      grad_gate[i] = g * y * s * (1.0f + x * (1.0f - s));                                                              \
      grad_up[i] = g * silu;                                                                                           \
    }                                                                                                                  \
    return sum;                                                                                                        \
  }

/* Elements that are rounded to bf16 at once: one by one, backward takes 1.15 times as long. */
enum { BLOCK = 512 };

#define DEFINE_BACKWARD_ROW_BF16(name, block, attribute)                                                               \
  attribute static float name BACKWARD_ROW(uint16_t, uint16_t) {                                                       \
    float sum = 0.0f, for_act[BLOCK], for_gate[BLOCK], for_up[BLOCK];                                                  \
    for (int64_t at = 0; at < count; at += BLOCK) {                                                                    \
      const int64_t n = count - at < BLOCK ? count - at : BLOCK;                                                       \
      sum += block(gate + at, up + at, grad + at, weight, for_act, for_gate, for_up, n);                               \
      for (int64_t i = 0; i < n; i++) act[at + i] = store_bf16(for_act[i]);                                            \
      for (int64_t i = 0; i < n; i++) grad_gate[at + i] = store_bf16(for_gate[i]);                                     \
      for (int64_t i = 0; i < n; i++) grad_up[at + i] = store_bf16(for_up[i]);                                         \
    }                                                                                                                  \
    return sum;                                                                                                        \
  }

#define DEFINE_BACKWARD(dtype, type, suffix, attribute)                                                                \
  attribute static void backward_##dtype##suffix BACKWARD(type) {                                                      \
    for (int64_t row = 0; row < size; row++, gate += F, up += F, grad += F, act += F, grad_h += 2 * F)                 \
      grad_weights[row] = row_##dtype##suffix(gate, up, grad, weights[row], act, grad_h, grad_h + F, F);               \
    memset(act, 0, sizeof(type) * (size_t)(F * (rows - size)));                                                        \
    memset(grad_h, 0, sizeof(type) * (size_t)(2 * F * (rows - size)));                                                 \
  }

#define DEFINE(suffix, attribute)                                                                                      \
  DEFINE_FORWARD(fp32, float, suffix, attribute)                                                                       \
  DEFINE_FORWARD(bf16, uint16_t, suffix, attribute)                                                                    \
  DEFINE_BACKWARD_ROW(row_fp32##suffix, fp32, float, attribute)                                                        \
  DEFINE_BACKWARD_ROW(block_bf16##suffix, bf16, uint16_t, attribute)                                                   \
  DEFINE_BACKWARD_ROW_BF16(row_bf16##suffix, block_bf16##suffix, attribute)                                            \
  DEFINE_BACKWARD(fp32, float, suffix, attribute)                                                                      \
  DEFINE_BACKWARD(bf16, uint16_t, suffix, attribute)

DEFINE(_plain, )

/* The same for newer instructions, chosen when it is called: what was compiled here may run on another processor. Written
 * out for each, since target_clones (which musl and macOS lack, too) and a body inlined into each took 1.5 times as long
 * in bf16: GCC settles how wide a reduction may be before it knows for which processor. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
DEFINE(_avx2, __attribute__((target("avx2,fma"))))

#define HAS_AVX512                                                                                                   \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&  \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
DEFINE(_avx512, __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma"))))

#define CALL(name, arguments) \
  (HAS_AVX512 ? name##_avx512 arguments : HAS_AVX2 ? name##_avx2 arguments : name##_plain arguments)
#else
#define CALL(name, arguments) name##_plain arguments
#endif

#define EXPORT(dtype, type)                                                                                            \
  void swiglu_##dtype FORWARD(type) { CALL(forward_##dtype, (gate, up, act, count)); }                                 \
  void swiglu_backward_##dtype BACKWARD(type) {                                                                        \
    CALL(backward_##dtype, (gate, up, grad, weights, act, grad_h, grad_weights, rows, size, F));                       \
  }

EXPORT(fp32, float)
EXPORT(bf16, uint16_t)

/* out[r] = table[index[r]], rows of `bytes` bytes; padding becomes 0. Rows are asked for before they are needed, because
 * the processor can't guess where the next one is. */
void gather_rows(const char *restrict table, const int64_t *restrict index, char *restrict out, int64_t rows,
                 int64_t size, int64_t bytes) {
#ifdef __GNUC__
  enum { AHEAD = 8, CACHE_LINE = 64 };
#endif
  for (int64_t row = 0; row < size; row++) {
#ifdef __GNUC__
    if (row + AHEAD < size)
      for (int64_t at = 0; at < bytes; at += CACHE_LINE) __builtin_prefetch(table + index[row + AHEAD] * bytes + at);
#endif
    memcpy(out + row * bytes, table + index[row] * bytes, (size_t)bytes);
  }
  memset(out + size * bytes, 0, (size_t)((rows - size) * bytes));
}
