// What of a layer is neither a product nor attention: a sum and its norm, the rotation of heads on their way to the cache, the
// activation. Each is one launch, for in decoding a launch takes longer than what it computes (src/base/fused.rs).
//
// Numbers are rounded where they are stored, and nowhere between.
#include "common.cuh"

constexpr unsigned NORM_THREADS = 256;
constexpr unsigned ROTATE_THREADS = 128;
constexpr unsigned ACTIVATE_THREADS = 256;
constexpr unsigned MAX_HEAD_DIM = 256;

// The sum over a block's threads.
__device__ __forceinline__ float sum_of_block(float x, float* shared) {
  constexpr unsigned Warps = NORM_THREADS / WARP;
  x = sum_of(x, WARP);
  __syncthreads();  // All have read the sums before.
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();  // All warps' are there.
  float sum = 0;
  for (unsigned warp = 0; warp < Warps; warp++) sum += shared[warp];
  return sum;
}

// Blocks: rows. sums = x + h, and y is its norm; without h of x. With a bias it is a layer norm, else a root mean square's.
template <class T, class W, bool Vector>
__device__ __forceinline__ void add_norm(
    T* sums, T* y, const T* x, const T* h, const W* weight, const W* bias, unsigned width, float eps) {
  SHARED(float, shared, NORM_THREADS / WARP);
  constexpr unsigned Step = NORM_THREADS * EIGHT;
  const size_t start = static_cast<size_t>(blockIdx.x) * width;
  const unsigned first = threadIdx.x * EIGHT;
  if (h) {
    for (unsigned i = first; i < width; i += Step) {
      const unsigned count = min(EIGHT, width - i);
      float a[EIGHT], b[EIGHT];
      load<Vector>(x + start + i, count, a);
      load<Vector>(h + start + i, count, b);
#pragma unroll
      for (unsigned e = 0; e < EIGHT; e++) a[e] += b[e];
      store<Vector>(sums + start + i, count, a);
    }
    // Each thread reads what it has written itself.
    x = sums;
  }
  float mean = 0;
  if (bias) {
    float sum = 0;
    for (unsigned i = first; i < width; i += Step) {
      float a[EIGHT];
      load<Vector>(x + start + i, min(EIGHT, width - i), a);
#pragma unroll
      for (unsigned e = 0; e < EIGHT; e++) sum += a[e];
    }
    mean = sum_of_block(sum, shared) / width;
  }
  float squares = 0;
  for (unsigned i = first; i < width; i += Step) {
    const unsigned count = min(EIGHT, width - i);
    float a[EIGHT];
    load<Vector>(x + start + i, count, a);
#pragma unroll
    for (unsigned e = 0; e < EIGHT; e++)
      if (e < count) squares += (a[e] - mean) * (a[e] - mean);
  }
  const float scale = 1.0f / sqrtf(sum_of_block(squares, shared) / width + eps);
  for (unsigned i = first; i < width; i += Step) {
    const unsigned count = min(EIGHT, width - i);
    float a[EIGHT], w[EIGHT], b[EIGHT] = {};
    load<Vector>(x + start + i, count, a);
    load<Vector>(weight + i, count, w);
    if (bias) load<Vector>(bias + i, count, b);
#pragma unroll
    for (unsigned e = 0; e < EIGHT; e++) a[e] = (a[e] - mean) * scale * w[e] + b[e];
    store<Vector>(y + start + i, count, a);
  }
}

// Blocks: rows, runs of heads, a warp each: those of q, of k and of v, side by side in a row of `qkv`. Those of q and k are
// normed, where there are weights, and turned by the row's `half` cosines and sines; then those of q go to `q`, the others
// to the row's slot in the cache.
template <class T>
__device__ __forceinline__ void rotate(
    T* q, T* keys, T* values, const T* qkv, const T* cosines, const T* sines, const unsigned* slots, const T* q_norm,
    const T* k_norm, unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned half, float eps) {
  constexpr unsigned Warps = ROTATE_THREADS / WARP, Most = MAX_HEAD_DIM / WARP;
  SHARED(float, shared, Warps * MAX_HEAD_DIM);
  const unsigned row = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const unsigned all = heads + 2 * kv_heads, head = blockIdx.y * Warps + warp;
  const bool there = head < all, turns = head < heads + kv_heads;
  float* own = shared + warp * MAX_HEAD_DIM;
  float x[Most] = {};
  if (there) {
    const T* from = qkv + (static_cast<size_t>(row) * all + head) * head_dim;
    const T* norm = head < heads ? q_norm : turns ? k_norm : nullptr;
#pragma unroll
    for (unsigned j = 0; j < Most; j++)
      if (lane + j * WARP < head_dim) x[j] = to_float(from[lane + j * WARP]);
    if (norm) {
      float squares = 0;
#pragma unroll
      for (unsigned j = 0; j < Most; j++) squares += x[j] * x[j];
      const float scale = 1.0f / sqrtf(sum_of(squares, WARP) / head_dim + eps);
#pragma unroll
      for (unsigned j = 0; j < Most; j++)
        if (lane + j * WARP < head_dim) x[j] *= scale * to_float(norm[lane + j * WARP]);
    }
#pragma unroll
    for (unsigned j = 0; j < Most; j++) own[lane + j * WARP] = x[j];
  }
  __syncthreads();  // The other half of each pair is there.
  if (!there) return;
  const size_t slot = slots[row];
  T* to = head < heads ? q + (static_cast<size_t>(row) * heads + head) * head_dim
          : turns      ? keys + (slot * kv_heads + head - heads) * head_dim
                       : values + (slot * kv_heads + head - heads - kv_heads) * head_dim;
  const T* cosine = cosines + static_cast<size_t>(row) * half;
  const T* sine = sines + static_cast<size_t>(row) * half;
#pragma unroll
  for (unsigned j = 0; j < Most; j++) {
    const unsigned i = lane + j * WARP;
    if (i >= head_dim) break;
    float out = x[j];
    if (turns && i < half)
      out = out * to_float(cosine[i]) - own[i + half] * to_float(sine[i]);
    else if (turns && i < 2 * half)
      out = out * to_float(cosine[i - half]) + own[i - half] * to_float(sine[i - half]);
    to[i] = from_float<T>(out);
  }
}

enum Activation { SILU, GELU, GELU_TANH, RELU };

__device__ __forceinline__ float activated(float x, unsigned activation) {
  switch (activation) {
    case SILU: return x / (1.0f + exponential(-x));
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456f * x * (1.0f + 0.044715f * x * x)));
    default: return x > 0 ? x : 0;
  }
}

// Blocks: rows, runs of columns. y = activation(x), `width` numbers a row; where they are gated, as many follow in a row of x,
// and y is multiplied by them.
template <class T, bool Vector>
__device__ __forceinline__ void activate(T* y, const T* x, unsigned width, unsigned gated, unsigned activation) {
  const unsigned i = (blockIdx.y * ACTIVATE_THREADS + threadIdx.x) * EIGHT;
  if (i >= width) return;
  const unsigned count = min(EIGHT, width - i);
  const T* from = x + static_cast<size_t>(blockIdx.x) * width * (1 + gated) + i;
  float a[EIGHT], b[EIGHT];
  load<Vector>(from, count, a);
  if (gated) load<Vector>(from + width, count, b);
#pragma unroll
  for (unsigned e = 0; e < EIGHT; e++) a[e] = activated(a[e], activation) * (gated ? b[e] : 1.0f);
  store<Vector>(y + static_cast<size_t>(blockIdx.x) * width + i, count, a);
}

#define ADD_NORM(T, W, name, vector)                                                                                   \
  KERNEL(add_norm_##T##_##W##_##name, NORM_THREADS,                                                                    \
         (T* sums, T* y, const T* x, const T* h, const W* weight, const W* bias, unsigned width, float eps),           \
         (add_norm<T, W, vector>(sums, y, x, h, weight, bias, width, eps)))
#define ADD_NORMS(T, W) ADD_NORM(T, W, vector, true) ADD_NORM(T, W, scalar, false)

ADD_NORMS(f32, f32)
ADD_NORMS(f16, f16)
ADD_NORMS(f16, f32)
ADD_NORMS(bf16, bf16)
ADD_NORMS(bf16, f32)

#define ACTIVATE(T, name, vector)                                                                                 \
  KERNEL(activate_##T##_##name, ACTIVATE_THREADS,                                                                 \
         (T* y, const T* x, unsigned width, unsigned gated, unsigned activation),                                 \
         (activate<T, vector>(y, x, width, gated, activation)))
#define OTHERS(T)                                                                                                 \
  ACTIVATE(T, vector, true)                                                                                       \
  ACTIVATE(T, scalar, false)                                                                                      \
  KERNEL(rotate_##T, ROTATE_THREADS,                                                                              \
         (T* q, T* keys, T* values, const T* qkv, const T* cosines, const T* sines, const unsigned* slots,        \
          const T* q_norm, const T* k_norm, unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned half,  \
          float eps),                                                                                             \
         (rotate<T>(q, keys, values, qkv, cosines, sines, slots, q_norm, k_norm, heads, kv_heads, head_dim, half, \
                    eps)))

OTHERS(f32)
OTHERS(f16)
OTHERS(bf16)
