// The batched low-rank delta: y = gain * (y + scale * (x A^T) B^T) + shift, for rows grouped by adapter.
//
// Two steps, each one launch for all adapters of a step, whatever their ranks. `shrink` makes h = x A^T in f32: a sum over
// many input features, so these are cut into splits that different blocks add up, each into its own part of h. `expand`
// adds up the splits in order, multiplies with B and writes y once. What a block does is told by its tile, which the host
// lays out (src/lora/tiles.rs); sizes here and there are the same.
//
// A lies as [rank, k] and B as [rank, n]: in both, neighbouring threads read neighbouring memory. Decoding reads each
// factor once for up to four rows; `_many` are for longer runs of rows, on tensor cores.
#include "common.cuh"

struct ShrinkTile {
  const void* a;      // [ranks, k]
  unsigned row;       // first row of x
  unsigned rows;      // at most SHRINK_ROWS, or MANY_ROWS
  unsigned ranks;     // at most SHRINK_RANKS, or MANY_RANKS
  unsigned h;         // place of the first sum in h
  unsigned h_stride;  // from a row to the next
  unsigned h_split;   // from a split to the next
};

struct ExpandTile {
  const void* b;      // [rank, b_stride], from the tile's first column on
  const void* gain;   // likewise; may be null
  const void* shift;  // likewise
  unsigned row;       // first row of y
  unsigned rows;      // at most EXPAND_ROWS, or MANY_ROWS
  unsigned column;    // first column of y
  unsigned columns;   // at most eight a thread of `expand`, or MANY_COLUMNS
  unsigned rank;      // 0 where there is only a gain or a shift
  unsigned b_stride;
  unsigned h;
  unsigned h_stride;
  unsigned h_split;
  unsigned splits;
  float scale;
  unsigned unused;
};

constexpr unsigned SHRINK_THREADS = 128;
constexpr unsigned SHRINK_ROWS = 4;
constexpr unsigned SHRINK_RANKS = 16;
// Input features of a split.
constexpr unsigned SHRINK_K = 512;
constexpr unsigned EXPAND_THREADS = 64;
constexpr unsigned EXPAND_ROWS = 4;
// Ranks whose sums are in shared memory at a time.
constexpr unsigned EXPAND_RANKS = 128;
constexpr unsigned MANY_THREADS = 128;
constexpr unsigned MANY_ROWS = 32;
constexpr unsigned MANY_RANKS = 64;
constexpr unsigned MANY_K = 2048;
constexpr unsigned MANY_COLUMNS = 256;
static_assert(MANY_COLUMNS == MANY_THREADS / WARP * 64, "a warp has 64");

// One warp: four ranks of `Rows` rows.
template <class T, bool Vector, unsigned Rows>
__device__ __forceinline__ void shrink_rows(const ShrinkTile& tile, const T* x, float* h, unsigned k) {
  constexpr unsigned Ranks = SHRINK_RANKS / (SHRINK_THREADS / WARP);
  const unsigned lane = threadIdx.x % WARP, first = threadIdx.x / WARP * Ranks;
  if (first >= tile.ranks) return;
  const T* a = static_cast<const T*>(tile.a) + static_cast<size_t>(first) * k;
  const unsigned from = blockIdx.y * SHRINK_K, to = min(k, from + SHRINK_K);
  float sums[Rows][Ranks] = {};
#pragma unroll 2
  for (unsigned i = from + lane * EIGHT; i < to; i += WARP * EIGHT) {
    const unsigned count = min(EIGHT, to - i);
    float xs[Rows][EIGHT];
#pragma unroll
    for (unsigned r = 0; r < Rows; r++) {
      const size_t row = tile.row + min(r, tile.rows - 1);
      load<Vector>(x + row * k + i, count, xs[r]);
    }
#pragma unroll
    for (unsigned j = 0; j < Ranks; j++) {
      if (first + j >= tile.ranks) continue;
      float as[EIGHT];
      load<Vector>(a + static_cast<size_t>(j) * k + i, count, as);
#pragma unroll
      for (unsigned r = 0; r < Rows; r++)
#pragma unroll
        for (unsigned e = 0; e < EIGHT; e++) sums[r][j] = fmaf(xs[r][e], as[e], sums[r][j]);
    }
  }
  float* out = h + tile.h + static_cast<size_t>(blockIdx.y) * tile.h_split + first;
#pragma unroll
  for (unsigned r = 0; r < Rows; r++)
#pragma unroll
    for (unsigned j = 0; j < Ranks; j++) {
      const float sum = sum_of(sums[r][j], WARP);
      if (lane == 0 && r < tile.rows && first + j < tile.ranks) out[static_cast<size_t>(r) * tile.h_stride + j] = sum;
    }
}

// Blocks: tiles, splits of k.
template <class T, bool Vector>
__device__ __forceinline__ void shrink(const ShrinkTile* tiles, const T* x, float* h, unsigned k) {
  const ShrinkTile tile = tiles[blockIdx.x];
  if (tile.rows == 1)
    shrink_rows<T, Vector, 1>(tile, x, h, k);
  else
    shrink_rows<T, Vector, SHRINK_ROWS>(tile, x, h, k);
}

// The sum of a row and a rank over all splits.
__device__ __forceinline__ float all_splits(const ExpandTile& tile, const float* h, unsigned row, unsigned rank) {
  const float* p = h + tile.h + static_cast<size_t>(row) * tile.h_stride + rank;
  float sum = 0;
  for (unsigned split = 0; split < tile.splits; split++) sum += p[static_cast<size_t>(split) * tile.h_split];
  return sum;
}

// Adds to eight columns of a row of y, from column `at` of the tile on.
template <class T, bool Vector>
__device__ __forceinline__ void finish(
    const ExpandTile& tile, T* y, unsigned y_stride, unsigned row, unsigned at, const float (&sums)[EIGHT]) {
  const unsigned count = min(EIGHT, tile.columns - at);
  T* p = y + static_cast<size_t>(tile.row + row) * y_stride + tile.column + at;
  float out[EIGHT], gain[EIGHT], shift[EIGHT];
  load<Vector>(p, count, out);
#pragma unroll
  for (unsigned e = 0; e < EIGHT; e++) out[e] = fmaf(tile.scale, sums[e], out[e]);
  if (tile.gain) {
    load<Vector>(static_cast<const T*>(tile.gain) + at, count, gain);
#pragma unroll
    for (unsigned e = 0; e < EIGHT; e++) out[e] *= gain[e];
  }
  if (tile.shift) {
    load<Vector>(static_cast<const T*>(tile.shift) + at, count, shift);
#pragma unroll
    for (unsigned e = 0; e < EIGHT; e++) out[e] += shift[e];
  }
  store<Vector>(p, count, out);
}

// Blocks: tiles. A thread has eight columns of all rows of the tile.
template <class T, bool Vector>
__device__ __forceinline__ void expand(const ExpandTile* tiles, const float* h, T* y, unsigned y_stride) {
  SHARED(float, sums_of_h, EXPAND_ROWS * EXPAND_RANKS);
  const ExpandTile tile = tiles[blockIdx.x];
  const unsigned at = threadIdx.x * EIGHT;
  const bool has_columns = at < tile.columns;
  const unsigned count = has_columns ? min(EIGHT, tile.columns - at) : 0;
  float sums[EXPAND_ROWS][EIGHT] = {};
  for (unsigned first = 0; first < tile.rank; first += EXPAND_RANKS) {
    const unsigned ranks = min(EXPAND_RANKS, tile.rank - first);
    __syncthreads();  // All have read the ranks before.
    for (unsigned i = threadIdx.x; i < tile.rows * ranks; i += EXPAND_THREADS)
      sums_of_h[i / ranks * EXPAND_RANKS + i % ranks] = all_splits(tile, h, i / ranks, first + i % ranks);
    __syncthreads();  // All are written.
    if (!has_columns) continue;
    const T* b = static_cast<const T*>(tile.b) + static_cast<size_t>(first) * tile.b_stride + at;
#pragma unroll 4
    for (unsigned r = 0; r < ranks; r++) {
      float bs[EIGHT];
      load<Vector>(b + static_cast<size_t>(r) * tile.b_stride, count, bs);
#pragma unroll
      for (unsigned row = 0; row < EXPAND_ROWS; row++) {
        if (row >= tile.rows) break;
        const float sum = sums_of_h[row * EXPAND_RANKS + r];
#pragma unroll
        for (unsigned e = 0; e < EIGHT; e++) sums[row][e] = fmaf(sum, bs[e], sums[row][e]);
      }
    }
  }
  if (!has_columns) return;
#pragma unroll
  for (unsigned row = 0; row < EXPAND_ROWS; row++)
    if (row < tile.rows) finish<T, Vector>(tile, y, y_stride, row, at, sums[row]);
}

// In the `_many` kernels a lane is in group `g` of 8 and has place `t` of 4 in it. An operand's fragments are the bytes that
// one load of 16 gives: the order in which k is summed is free, as long as both operands have the same.

// Blocks: tiles, splits of k. The warps of a block have windows of 32 input features in turn.
__device__ __forceinline__ void shrink_on_tensor_cores(const ShrinkTile* tiles, const bf16* x, float* h, unsigned k) {
  constexpr unsigned Warps = MANY_THREADS / WARP;
  SHARED(float, sums_of_warps, Warps * MANY_ROWS * MANY_RANKS);
  const ShrinkTile tile = tiles[blockIdx.x];
  const unsigned warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const unsigned from = blockIdx.y * MANY_K, to = min(k, from + MANY_K);
  float c[2][MANY_RANKS / 8][4] = {};
  for (unsigned window = from + warp * 32; window < to; window += Warps * 32) {
    const unsigned i = window + t * EIGHT;
    uint4 xs[2][2];
#pragma unroll
    for (unsigned m = 0; m < 2; m++)
#pragma unroll
      for (unsigned half = 0; half < 2; half++) {
        const unsigned row = m * 16 + half * 8 + g;
        xs[m][half] = load_raw(x + static_cast<size_t>(tile.row + row) * k + i, row < tile.rows && i < to);
      }
#pragma unroll
    for (unsigned n = 0; n < MANY_RANKS / 8; n++) {
      if (n * 8 >= tile.ranks) break;
      const unsigned rank = n * 8 + g;
      const bf16* p = static_cast<const bf16*>(tile.a) + static_cast<size_t>(rank) * k + i;
      const uint4 a = load_raw(p, rank < tile.ranks && i < to);
#pragma unroll
      for (unsigned m = 0; m < 2; m++) {
        multiply_16x8x16(c[m][n], {xs[m][0].x, xs[m][1].x, xs[m][0].y, xs[m][1].y}, a.x, a.y);
        multiply_16x8x16(c[m][n], {xs[m][0].z, xs[m][1].z, xs[m][0].w, xs[m][1].w}, a.z, a.w);
      }
    }
  }
#pragma unroll
  for (unsigned m = 0; m < 2; m++)
#pragma unroll
    for (unsigned n = 0; n < MANY_RANKS / 8; n++)
#pragma unroll
      for (unsigned e = 0; e < 4; e++) {
        const unsigned row = m * 16 + e / 2 * 8 + g, rank = n * 8 + 2 * t + e % 2;
        sums_of_warps[(warp * MANY_ROWS + row) * MANY_RANKS + rank] = c[m][n][e];
      }
  __syncthreads();
  float* out = h + tile.h + static_cast<size_t>(blockIdx.y) * tile.h_split;
  for (unsigned i = threadIdx.x; i < tile.rows * tile.ranks; i += MANY_THREADS) {
    const unsigned row = i / tile.ranks, rank = i % tile.ranks;
    float sum = 0;
    for (unsigned w = 0; w < Warps; w++) sum += sums_of_warps[(w * MANY_ROWS + row) * MANY_RANKS + rank];
    out[static_cast<size_t>(row) * tile.h_stride + rank] = sum;
  }
}

// Blocks: tiles. A warp has 64 columns. The sums of h are split in two bf16, so that they lose no more than 2^-16.
__device__ __forceinline__ void expand_on_tensor_cores(const ExpandTile* tiles, const float* h, bf16* y, unsigned y_stride) {
  const ExpandTile tile = tiles[blockIdx.x];
  const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const unsigned first = threadIdx.x / WARP * 64, mine = first + g * EIGHT;
  if (first >= tile.columns) return;
  float c[2][8][4] = {};
  for (unsigned window = 0; window < tile.rank; window += 16) {
    const unsigned r = window + 4 * t;
    unsigned coarse[2][4], fine[2][4];
#pragma unroll
    for (unsigned m = 0; m < 2; m++)
#pragma unroll
      for (unsigned half = 0; half < 2; half++) {
        const unsigned row = m * 16 + half * 8 + g;
        float sums[4], rests[4];
#pragma unroll
        for (unsigned q = 0; q < 4; q++) {
          sums[q] = row < tile.rows && r + q < tile.rank ? all_splits(tile, h, row, r + q) : 0.0f;
          rests[q] = sums[q] - to_float(from_float<bf16>(sums[q]));
        }
        coarse[m][half] = pair_of(sums[0], sums[1]), coarse[m][2 + half] = pair_of(sums[2], sums[3]);
        fine[m][half] = pair_of(rests[0], rests[1]), fine[m][2 + half] = pair_of(rests[2], rests[3]);
      }
    uint4 b[4];
#pragma unroll
    for (unsigned q = 0; q < 4; q++) {
      const bf16* p = static_cast<const bf16*>(tile.b) + static_cast<size_t>(r + q) * tile.b_stride + mine;
      b[q] = load_raw(p, r + q < tile.rank && mine < tile.columns);
    }
#pragma unroll
    for (unsigned i = 0; i < 8; i++) {
      const unsigned b0 = pair_at(b[0], b[1], i), b1 = pair_at(b[2], b[3], i);
#pragma unroll
      for (unsigned m = 0; m < 2; m++) {
        multiply_16x8x16(c[m][i], coarse[m], b0, b1);
        multiply_16x8x16(c[m][i], fine[m], b0, b1);
      }
    }
  }
  // Column 8 j + i of the warp's 64 is column j of product i.
#pragma unroll
  for (unsigned m = 0; m < 2; m++)
#pragma unroll
    for (unsigned half = 0; half < 2; half++)
#pragma unroll
      for (unsigned which = 0; which < 2; which++) {
        const unsigned row = m * 16 + half * 8 + g, at = first + 16 * t + 8 * which;
        if (row >= tile.rows || at >= tile.columns) continue;
        float sums[EIGHT];
#pragma unroll
        for (unsigned i = 0; i < EIGHT; i++) sums[i] = c[m][i][2 * half + which];
        finish<bf16, true>(tile, y, y_stride, row, at, sums);
      }
}

#define LORA(T)                                                                                                     \
  KERNEL(shrink_##T##_vector, SHRINK_THREADS, (const ShrinkTile* tiles, const T* x, float* h, unsigned k),          \
         (shrink<T, true>(tiles, x, h, k)))                                                                         \
  KERNEL(shrink_##T##_scalar, SHRINK_THREADS, (const ShrinkTile* tiles, const T* x, float* h, unsigned k),          \
         (shrink<T, false>(tiles, x, h, k)))                                                                        \
  KERNEL(expand_##T##_vector, EXPAND_THREADS, (const ExpandTile* tiles, const float* h, T* y, unsigned y_stride),   \
         (expand<T, true>(tiles, h, y, y_stride)))                                                                  \
  KERNEL(expand_##T##_scalar, EXPAND_THREADS, (const ExpandTile* tiles, const float* h, T* y, unsigned y_stride),   \
         (expand<T, false>(tiles, h, y, y_stride)))

LORA(f32)
LORA(f16)
LORA(bf16)
KERNEL(shrink_many, MANY_THREADS, (const ShrinkTile* tiles, const bf16* x, float* h, unsigned k),
       (shrink_on_tensor_cores(tiles, x, h, k)))
KERNEL(expand_many, MANY_THREADS, (const ExpandTile* tiles, const float* h, bf16* y, unsigned y_stride),
       (expand_on_tensor_cores(tiles, h, y, y_stride)))
