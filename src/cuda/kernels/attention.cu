// Attention with grouped queries over the paged KV cache, causal or an encoder's, with an online softmax in f32.
//
// Keys and values are [slots, kv_heads, head_dim]; position p of a sequence is in slot p % BLOCK of its block p / BLOCK. A
// tile (src/base/paged.rs) is some rows of one sequence and a range of keys; the queries of its rows that share a head of
// keys are computed together. `attend` is for few rows: where these look back far, several tiles share the keys, and
// `merge` puts their results together. `attend_many` is for prompts, on tensor cores.
#include "common.cuh"

struct AttendTile {
  unsigned row;    // first row of q and of the output
  unsigned rows;   // rows * group is at most QUERIES, or MANY_QUERIES, but there is at least one row
  unsigned seen;   // positions that the first row sees, counted from 0; the next sees `step` more
  unsigned table;  // the sequence's first block in the table
  unsigned from;   // positions of the keys
  unsigned to;
  unsigned part;  // first row of its partial results; WHOLE where it has all keys
  unsigned unused;
};

struct MergeTile {
  unsigned row;     // of the output
  unsigned part;    // row of the first partial result
  unsigned stride;  // rows to the next one
  unsigned parts;
};

// Positions of a block.
constexpr unsigned BLOCK = 16;
constexpr unsigned WHOLE = 0xffffffff;
constexpr unsigned ATTEND_THREADS = 128;
constexpr unsigned QUERIES = 8;
constexpr unsigned MANY_QUERIES = 64;
constexpr unsigned MAX_HEAD_DIM = 256;
constexpr unsigned MERGE_THREADS = 128;

// What is the same for all tiles.
struct Shape {
  unsigned kv_heads;
  unsigned group;  // queries that share a head of keys
  unsigned head_dim;
  unsigned step;    // 1 where attention is causal, else 0
  unsigned window;  // positions that a row sees at most
  float scale;
  float softcap;  // 0 for none

  __device__ __forceinline__ unsigned heads() const { return kv_heads * group; }
  // Place of a query's head in q and in the output.
  __device__ __forceinline__ size_t query(const AttendTile& tile, unsigned query, unsigned kv_head) const {
    const size_t row = tile.row + query / group;
    return (row * heads() + kv_head * group + query % group) * head_dim;
  }
  __device__ __forceinline__ unsigned seen(const AttendTile& tile, unsigned query) const {
    return tile.seen + query / group * step;
  }
  __device__ __forceinline__ float capped(float score) const {
    return softcap > 0 ? softcap * tanhf(score / softcap) : score;
  }
  // The first of the positions that end at `seen`.
  __device__ __forceinline__ unsigned first(unsigned seen) const { return seen > window ? seen - window : 0; }
};

__device__ __forceinline__ size_t slot_of(const unsigned* table, const AttendTile& tile, unsigned position) {
  return static_cast<size_t>(table[tile.table + position / BLOCK]) * BLOCK + position % BLOCK;
}

// What is left of a result when the largest score rises to `max`; of nothing, nothing.
__device__ __forceinline__ float weight(float own, float max) {
  return own == -INFINITY ? 0.0f : exponential(own - max);
}

// Blocks: tiles, heads of keys, runs of QUERIES queries. As many lanes as a head takes share a key, eight numbers each; the
// keys of a tile go round the warps.
template <class T, bool Vector>
__device__ __forceinline__ void attend(
    const AttendTile* tiles, const unsigned* table, const T* q, const T* keys, const T* values, T* out, float* parts,
    float* states, const Shape shape) {
  constexpr unsigned Warps = ATTEND_THREADS / WARP;
  SHARED(float, sums_of_warps, Warps * QUERIES * MAX_HEAD_DIM);
  SHARED(float, states_of_warps, Warps * QUERIES * 2);
  const AttendTile tile = tiles[blockIdx.x];
  const unsigned kv_head = blockIdx.y, first = blockIdx.z * QUERIES, head_dim = shape.head_dim;
  if (first >= tile.rows * shape.group) return;
  const unsigned queries = min(QUERIES, tile.rows * shape.group - first);
  unsigned lanes = 1;
  while (lanes * EIGHT < head_dim) lanes *= 2;
  const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const unsigned at = lane % lanes * EIGHT, count = at < head_dim ? min(EIGHT, head_dim - at) : 0;

  float qs[QUERIES][EIGHT] = {}, sums[QUERIES][EIGHT] = {}, totals[QUERIES] = {}, maxima[QUERIES];
#pragma unroll
  for (unsigned j = 0; j < QUERIES; j++) {
    maxima[j] = -INFINITY;
    if (j >= queries || count == 0) continue;
    load<Vector>(q + shape.query(tile, first + j, kv_head) + at, count, qs[j]);
#pragma unroll
    for (unsigned e = 0; e < EIGHT; e++) qs[j][e] *= shape.scale;
  }
  const unsigned from = max(tile.from, shape.first(shape.seen(tile, first)));
  const unsigned to = min(tile.to, shape.seen(tile, first + queries - 1));
  const unsigned together = WARP / lanes;
  for (unsigned base = from + warp * together; base < to; base += Warps * together) {
    const unsigned position = base + lane / lanes;
    const bool there = position < to;
    float key[EIGHT] = {}, value[EIGHT] = {};
    if (there && count > 0) {
      const size_t place = (slot_of(table, tile, position) * shape.kv_heads + kv_head) * head_dim + at;
      load<Vector>(keys + place, count, key);
      load<Vector>(values + place, count, value);
    }
#pragma unroll
    for (unsigned j = 0; j < QUERIES; j++) {
      if (j >= queries) break;
      float score = 0;
#pragma unroll
      for (unsigned e = 0; e < EIGHT; e++) score = fmaf(qs[j][e], key[e], score);
      score = shape.capped(sum_of(score, lanes));
      const unsigned seen = shape.seen(tile, first + j);
      if (!there || position >= seen || position < shape.first(seen)) score = -INFINITY;
      if (score > maxima[j]) {
        const float left = weight(maxima[j], score);
        totals[j] *= left;
#pragma unroll
        for (unsigned e = 0; e < EIGHT; e++) sums[j][e] *= left;
        maxima[j] = score;
      }
      const float own = weight(score, maxima[j]);
      totals[j] += own;
#pragma unroll
      for (unsigned e = 0; e < EIGHT; e++) sums[j][e] = fmaf(own, value[e], sums[j][e]);
    }
  }

#pragma unroll
  for (unsigned j = 0; j < QUERIES; j++) {
    if (j >= queries) break;
    for (unsigned other = lanes; other < WARP; other *= 2) {
      const float theirs = __shfl_xor_sync(ALL, maxima[j], other), max = fmaxf(maxima[j], theirs);
      const float left = weight(maxima[j], max), right = weight(theirs, max);
      totals[j] = totals[j] * left + __shfl_xor_sync(ALL, totals[j], other) * right;
#pragma unroll
      for (unsigned e = 0; e < EIGHT; e++)
        sums[j][e] = sums[j][e] * left + __shfl_xor_sync(ALL, sums[j][e], other) * right;
      maxima[j] = max;
    }
    if (lane >= lanes) continue;
    const unsigned place = warp * QUERIES + j;
    if (lane == 0) states_of_warps[2 * place] = maxima[j], states_of_warps[2 * place + 1] = totals[j];
#pragma unroll
    for (unsigned e = 0; e < EIGHT; e++)
      if (e < count) sums_of_warps[place * MAX_HEAD_DIM + at + e] = sums[j][e];
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < queries * head_dim; i += ATTEND_THREADS) {
    const unsigned j = i / head_dim, d = i % head_dim;
    float max = -INFINITY, total = 0, sum = 0;
    for (unsigned w = 0; w < Warps; w++) max = fmaxf(max, states_of_warps[2 * (w * QUERIES + j)]);
    for (unsigned w = 0; w < Warps; w++) {
      const unsigned place = w * QUERIES + j;
      const float left = weight(states_of_warps[2 * place], max);
      total += left * states_of_warps[2 * place + 1];
      sum += left * sums_of_warps[place * MAX_HEAD_DIM + d];
    }
    if (tile.part == WHOLE) {
      out[shape.query(tile, first + j, kv_head) + d] = from_float<T>(sum / total);
    } else {
      const unsigned row = tile.part + (first + j) / shape.group;
      const size_t place = static_cast<size_t>(row) * shape.heads() + kv_head * shape.group + (first + j) % shape.group;
      parts[place * head_dim + d] = sum;
      if (d == 0) states[2 * place] = max, states[2 * place + 1] = total;
    }
  }
}

// Blocks: tiles, heads.
template <class T>
__device__ __forceinline__ void merge(
    const MergeTile* tiles, const float* parts, const float* states, T* out, unsigned heads, unsigned head_dim) {
  const MergeTile tile = tiles[blockIdx.x];
  const unsigned head = blockIdx.y;
  for (unsigned d = threadIdx.x; d < head_dim; d += MERGE_THREADS) {
    float max = -INFINITY, total = 0, sum = 0;
    for (unsigned part = 0; part < tile.parts; part++) {
      const size_t place = static_cast<size_t>(tile.part + part * tile.stride) * heads + head;
      max = fmaxf(max, states[2 * place]);
    }
    for (unsigned part = 0; part < tile.parts; part++) {
      const size_t place = static_cast<size_t>(tile.part + part * tile.stride) * heads + head;
      const float left = weight(states[2 * place], max);
      total += left * states[2 * place + 1];
      sum += left * parts[place * head_dim + d];
    }
    out[(static_cast<size_t>(tile.row) * heads + head) * head_dim + d] = from_float<T>(sum / total);
  }
}

// Blocks: tiles, heads of keys, runs of MANY_QUERIES queries. A warp has 16 queries, and takes 16 keys at a time; a head
// has at most 64 * `Parts` numbers. How fragments lie in memory is as in lora.cu.
template <unsigned Parts>
__device__ __forceinline__ void attend_many(
    const AttendTile* tiles, const unsigned* table, const bf16* q, const bf16* keys, const bf16* values, bf16* out,
    const Shape shape) {
  const AttendTile tile = tiles[blockIdx.x];
  const unsigned kv_head = blockIdx.y, head_dim = shape.head_dim, queries = tile.rows * shape.group;
  const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const unsigned first = blockIdx.z * MANY_QUERIES + threadIdx.x / WARP * 16;
  if (first >= queries) return;
  const unsigned own[2] = {first + g, first + 8 + g};
  uint4 qs[2 * Parts][2];
#pragma unroll
  for (unsigned d = 0; d < 2 * Parts; d++)
#pragma unroll
    for (unsigned half = 0; half < 2; half++) {
      const unsigned at = d * 32 + t * EIGHT;
      const bool there = own[half] < queries && at < head_dim;
      qs[d][half] = load_raw(q + (there ? shape.query(tile, own[half], kv_head) + at : 0), there);
    }
  float sums[Parts][8][4] = {}, totals[2] = {}, maxima[2] = {-INFINITY, -INFINITY};
  const unsigned start = max(tile.from, shape.first(shape.seen(tile, first)));
  const unsigned to = min(tile.to, shape.seen(tile, min(first + 15, queries - 1)));
  const size_t stride = static_cast<size_t>(shape.kv_heads) * head_dim;
  for (unsigned base = start / BLOCK * BLOCK; base < to; base += BLOCK) {
    const size_t block = (slot_of(table, tile, base) * shape.kv_heads + kv_head) * head_dim;
    float scores[2][4] = {};
#pragma unroll
    for (unsigned n = 0; n < 2; n++) {
      const unsigned slot = n * 8 + g;
#pragma unroll
      for (unsigned d = 0; d < 2 * Parts; d++) {
        const unsigned at = d * 32 + t * EIGHT;
        const uint4 key = load_raw(keys + block + slot * stride + at, base + slot < to && at < head_dim);
        multiply_16x8x16(scores[n], {qs[d][0].x, qs[d][1].x, qs[d][0].y, qs[d][1].y}, key.x, key.y);
        multiply_16x8x16(scores[n], {qs[d][0].z, qs[d][1].z, qs[d][0].w, qs[d][1].w}, key.z, key.w);
      }
    }
#pragma unroll
    for (unsigned half = 0; half < 2; half++) {
      const unsigned seen = own[half] < queries ? shape.seen(tile, own[half]) : 0;
      float max = maxima[half];
#pragma unroll
      for (unsigned i = 0; i < 4; i++) {
        const unsigned position = base + i / 2 * 8 + 2 * t + i % 2;
        float& score = scores[i / 2][2 * half + i % 2];
        score = shape.capped(score * shape.scale);
        if (position >= min(seen, to) || position < shape.first(seen)) score = -INFINITY;
        max = fmaxf(max, score);
      }
      max = fmaxf(max, __shfl_xor_sync(ALL, max, 1));
      max = fmaxf(max, __shfl_xor_sync(ALL, max, 2));
      const float left = weight(maxima[half], max);
      maxima[half] = max;
      totals[half] *= left;
#pragma unroll
      for (unsigned i = 0; i < 4; i++) {
        float& score = scores[i / 2][2 * half + i % 2];
        score = weight(score, max);
        totals[half] += score;
      }
#pragma unroll
      for (unsigned part = 0; part < Parts; part++)
#pragma unroll
        for (unsigned i = 0; i < 8; i++) sums[part][i][2 * half] *= left, sums[part][i][2 * half + 1] *= left;
    }
    const unsigned weights[4] = {
        pair_of(scores[0][0], scores[0][1]), pair_of(scores[0][2], scores[0][3]),
        pair_of(scores[1][0], scores[1][1]), pair_of(scores[1][2], scores[1][3])};
#pragma unroll
    for (unsigned part = 0; part < Parts; part++) {
      const unsigned at = part * 64 + g * EIGHT;
      uint4 value[4];
#pragma unroll
      for (unsigned i = 0; i < 4; i++) {
        const unsigned slot = i / 2 * 8 + 2 * t + i % 2;
        value[i] = load_raw(values + block + slot * stride + at, base + slot < to && at < head_dim);
      }
#pragma unroll
      for (unsigned i = 0; i < 8; i++)
        multiply_16x8x16(sums[part][i], weights, pair_at(value[0], value[1], i), pair_at(value[2], value[3], i));
    }
  }
#pragma unroll
  for (unsigned half = 0; half < 2; half++) {
    totals[half] = sum_of(totals[half], 4);
    if (own[half] >= queries) continue;
#pragma unroll
    for (unsigned part = 0; part < Parts; part++)
#pragma unroll
      for (unsigned which = 0; which < 2; which++) {
        const unsigned at = part * 64 + 16 * t + 8 * which;
        if (at >= head_dim) continue;
        float numbers[EIGHT];
#pragma unroll
        for (unsigned i = 0; i < EIGHT; i++) numbers[i] = sums[part][i][2 * half + which] / totals[half];
        store<true>(out + shape.query(tile, own[half], kv_head) + at, EIGHT, numbers);
      }
  }
}

#define SHAPE                                                                                                     \
  unsigned kv_heads, unsigned group, unsigned head_dim, unsigned step, unsigned window, float scale, float softcap
#define ATTEND(T, load, Vector)                                                                                    \
  KERNEL(attend_##T##_##load, ATTEND_THREADS,                                                                      \
         (const AttendTile* tiles, const unsigned* table, const T* q, const T* keys, const T* values, T* out,      \
          float* parts, float* states, SHAPE),                                                                     \
         (attend<T, Vector>(tiles, table, q, keys, values, out, parts, states,                                     \
                            Shape{kv_heads, group, head_dim, step, window, scale, softcap})))
#define ATTENTION(T)                                                                                               \
  ATTEND(T, vector, true)                                                                                          \
  ATTEND(T, scalar, false)                                                                                         \
  KERNEL(merge_##T, MERGE_THREADS,                                                                                 \
         (const MergeTile* tiles, const float* parts, const float* states, T* out, unsigned heads,                 \
          unsigned head_dim),                                                                                      \
         (merge<T>(tiles, parts, states, out, heads, head_dim)))
#define ATTEND_MANY(width, Parts)                                                                                  \
  KERNEL(attend_many_##width, ATTEND_THREADS,                                                                      \
         (const AttendTile* tiles, const unsigned* table, const bf16* q, const bf16* keys, const bf16* values,     \
          bf16* out, SHAPE),                                                                                       \
         (attend_many<Parts>(tiles, table, q, keys, values, out,                                                   \
                             Shape{kv_heads, group, head_dim, step, window, scale, softcap})))

ATTENTION(f32)
ATTENTION(f16)
ATTENTION(bf16)
ATTEND_MANY(64, 1)
ATTEND_MANY(128, 2)
