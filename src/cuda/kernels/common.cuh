// Numbers, eight at a time, and what the threads of a warp do together: for nvcc, and for the emulator of the tests.
//
// A kernel reads 16 bytes a thread where the addresses allow it (`Vector`), and counts in f32.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

// A kernel and the name by which Rust launches it. Without the 1 the compiler may spill so that two large blocks fit.
#define KERNEL(name, threads, parameters, body) \
  extern "C" __global__ void __launch_bounds__(threads, 1) name parameters { body; }
#define SHARED(type, name, count) __shared__ type name[count]

// c += a b, for a 16 x 16 and b 16 x 8 spread over the warp (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exponential(float x) { return __expf(x); }
#else
#include "emulator.hpp"
#endif

using f32 = float;

constexpr unsigned WARP = 32;
constexpr unsigned ALL = 0xffffffff;
// Numbers of a load or a store of one thread.
constexpr unsigned EIGHT = 8;

__device__ __forceinline__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float(float x) { return __float2half_rn(x); }

// Eight numbers as they lie in memory.
template <class T> struct alignas(16) Eight {
  T numbers[EIGHT];
};

// `count` numbers from `p` on, zeros after them. With `Vector` there are eight and `p` is a multiple of 16 bytes.
template <bool Vector, class T>
__device__ __forceinline__ void load(const T* p, unsigned count, float (&out)[EIGHT]) {
  if constexpr (Vector) {
    const Eight<T> eight = *reinterpret_cast<const Eight<T>*>(p);
#pragma unroll
    for (unsigned i = 0; i < EIGHT; i++) out[i] = to_float(eight.numbers[i]);
  } else {
#pragma unroll
    for (unsigned i = 0; i < EIGHT; i++) out[i] = i < count ? to_float(p[i]) : 0.0f;
  }
}

template <bool Vector, class T>
__device__ __forceinline__ void store(T* p, unsigned count, const float (&x)[EIGHT]) {
  if constexpr (Vector) {
    Eight<T> eight;
#pragma unroll
    for (unsigned i = 0; i < EIGHT; i++) eight.numbers[i] = from_float<T>(x[i]);
    *reinterpret_cast<Eight<T>*>(p) = eight;
  } else {
#pragma unroll
    for (unsigned i = 0; i < EIGHT; i++)
      if (i < count) p[i] = from_float<T>(x[i]);
  }
}

// 16 bytes, or zeros.
__device__ __forceinline__ uint4 load_raw(const void* p, bool there) {
  return there ? *static_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
}

// The sum over the lanes whose numbers differ in the bits below `lanes`.
__device__ __forceinline__ float sum_of(float x, unsigned lanes) {
  for (unsigned other = lanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(ALL, x, other);
  return x;
}

__device__ __forceinline__ unsigned pair_of(float first, float second) {
  const unsigned one = __bfloat16_as_ushort(from_float<bf16>(first));
  return one | static_cast<unsigned>(__bfloat16_as_ushort(from_float<bf16>(second))) << 16;
}

// Number `i` of two vectors of eight bf16, side by side.
__device__ __forceinline__ unsigned pair_at(const uint4& first, const uint4& second, unsigned i) {
  const unsigned* one = &first.x;
  const unsigned* other = &second.x;
  const unsigned a = one[i / 2], b = other[i / 2];
  return i % 2 == 0 ? (a & 0xffffu) | b << 16 : a >> 16 | (b & 0xffff0000u);
}
