// Draws tokens from logits, a block a row: src/engine/draw.rs says what is drawn, src/engine/draws.rs lays it out.
//
// What top-k and top-p keep is found without sorting: by bisection over the bits of what a logit lies below the largest one.
// Probabilities are summed as whole numbers, so that the order of a sum is of no matter and the same row gives the same
// token. All passes over the row but the first find it in the GPU's cache.
#include "common.cuh"

struct DrawTile {
  unsigned row;         // of the logits
  unsigned vocab;       // tokens that may be drawn; what the row has after them means nothing
  unsigned edits;       // the first of its changes
  unsigned edit_count;
  float repetition_penalty;
  float temperature;    // 0 takes the likeliest token
  float floor;          // what (logit - largest) / temperature is at least of a token that is kept
  unsigned top_k;       // 0 keeps all
  float top_p;          // 1 keeps all
  unsigned place_low;   // of 2^53: where among the probabilities the token lies
  unsigned place_high;
  unsigned unused;
};

// At most one a token.
struct Edit {
  unsigned token;
  float bias;
  unsigned seen;  // whether the repetition penalty is for it
  float penalty;
};

using u64 = unsigned long long;

constexpr unsigned DRAW_THREADS = 1024;
constexpr unsigned DRAW_WARPS = DRAW_THREADS / WARP;
static_assert(DRAW_WARPS == WARP, "a warp adds up what all warps have");
// In place of a token, where a logit is not a number or the largest is infinite.
constexpr unsigned NO_TOKEN = ALL;
// The likeliest token's share of a sum, as a whole number: 2^17 of them are 2^57.
constexpr float MASS = 1099511627776.0f;
constexpr unsigned INFINITE = 0x7f800000;
// All bits of a number but its sign.
constexpr unsigned MAGNITUDE = 0x7fffffff;

// Tokens that are kept: those of smaller keys, and of this key those up to `last`.
struct Kept {
  unsigned key;
  unsigned last;
};

// The smaller the likelier: `logit` is at most 0.
__device__ __forceinline__ unsigned key_of(float logit) { return __float_as_uint(logit) & MAGNITUDE; }
__device__ __forceinline__ u64 mass_of(float logit) { return static_cast<u64>(exponential(logit) * MASS); }
__device__ __forceinline__ bool keeps(const Kept& kept, unsigned key, unsigned token) {
  return key < kept.key || (key == kept.key && token <= kept.last);
}

// Larger for larger numbers; the largest for what is none.
__device__ __forceinline__ unsigned order_of(float x) {
  if (x != x) return ALL;
  const unsigned bits = x == 0 ? 0 : __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | ~MAGNITUDE;
}

template <unsigned Count, class Join>
__device__ __forceinline__ void join_in_block(u64 (&x)[Count], u64* shared, Join join) {
  const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (unsigned i = 0; i < Count; i++)
    for (unsigned other = WARP / 2; other > 0; other /= 2) x[i] = join(x[i], __shfl_xor_sync(ALL, x[i], other));
  __syncthreads();  // All have read what was there before.
#pragma unroll
  for (unsigned i = 0; i < Count; i++)
    if (lane == 0) shared[i * WARP + warp] = x[i];
  __syncthreads();  // All warps' are there.
#pragma unroll
  for (unsigned i = 0; i < Count; i++) {
    x[i] = shared[i * WARP + lane];
    for (unsigned other = WARP / 2; other > 0; other /= 2) x[i] = join(x[i], __shfl_xor_sync(ALL, x[i], other));
  }
}

struct Add {
  __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a + b; }
};
struct Larger {
  __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};

// The smallest key up to which tokens measure `wanted` or more; `before` is what those of smaller keys measure.
template <class Measure>
__device__ __forceinline__ unsigned find_key(
    const float* logits, unsigned vocab, u64 wanted, u64& before, u64* shared, Measure measure) {
  unsigned key = 0;
  before = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    u64 below[3] = {};
    for (unsigned token = threadIdx.x; token < vocab; token += DRAW_THREADS) {
      const float logit = logits[token];
      const unsigned own = key_of(logit);
      if (own >= key + (3u << shift)) continue;
      const u64 size = measure(token, own, logit);
      below[2] += size;
      if (own < key + (2u << shift)) below[1] += size;
      if (own < key + (1u << shift)) below[0] += size;
    }
    join_in_block(below, shared, Add());
#pragma unroll
    for (int i = 2; i >= 0; i--)
      if (below[i] < wanted) {
        key += (i + 1u) << shift;
        before = below[i];
        break;
      }
  }
  return key;
}

// The first token up to which tokens, in their order, measure `wanted` or more.
template <class Measure>
__device__ __forceinline__ unsigned find_token(
    const float* logits, unsigned vocab, u64 wanted, u64* shared, Measure measure) {
  const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  // Tokens of a warp, in whole rounds of its lanes.
  const unsigned share = (vocab + DRAW_THREADS - 1) / DRAW_THREADS * WARP;
  const auto size = [&](unsigned token) { return token < vocab ? measure(token, key_of(logits[token]), logits[token]) : 0; };
  u64 sum = 0;
  for (unsigned token = warp * share + lane; token < (warp + 1) * share; token += WARP) sum += size(token);
  for (unsigned other = WARP / 2; other > 0; other /= 2) sum += __shfl_xor_sync(ALL, sum, other);
  __syncthreads();  // All have read what was there before.
  if (lane == 0) shared[warp] = sum;
  __syncthreads();  // All warps' are there.
  u64 before = 0;
  unsigned found = 0;
  while (found + 1 < DRAW_WARPS && before + shared[found] < wanted) before += shared[found++];
  __syncthreads();  // All know the warp that has the token.
  if (warp == found) {
    unsigned first = found * share, token = vocab - 1;
    for (; first < vocab; first += WARP) {
      u64 upto = size(first + lane);
      for (unsigned step = 1; step < WARP; step *= 2) {
        const u64 other = __shfl_up_sync(ALL, upto, step);
        if (lane >= step) upto += other;
      }
      const unsigned reached = __ballot_sync(ALL, before + upto >= wanted);
      if (reached) {
        token = first + __ffs(reached) - 1;
        break;
      }
      before += __shfl_sync(ALL, upto, WARP - 1);
    }
    if (lane == 0) shared[0] = token;
  }
  __syncthreads();  // The token is there.
  return static_cast<unsigned>(shared[0]);
}

// Blocks: tiles. Overwrites the rows.
__device__ __forceinline__ void draw(const DrawTile* tiles, const Edit* edits, float* rows, unsigned* tokens, unsigned width) {
  SHARED(u64, shared, 3 * WARP);
  const DrawTile tile = tiles[blockIdx.x];
  const unsigned vocab = tile.vocab;
  float* logits = rows + static_cast<size_t>(tile.row) * width;
  for (unsigned i = threadIdx.x; i < tile.edit_count; i += DRAW_THREADS) {
    const Edit edit = edits[tile.edits + i];
    if (edit.token >= vocab) continue;
    float logit = logits[edit.token] + edit.bias;
    if (edit.seen) logit = logit > 0 ? logit / tile.repetition_penalty : logit * tile.repetition_penalty;
    logits[edit.token] = logit - edit.penalty;
  }
  __syncthreads();  // All changes are made.

  // The likeliest token, the lowest of several.
  u64 best[1] = {};
  for (unsigned token = threadIdx.x; token < vocab; token += DRAW_THREADS) {
    const u64 own = static_cast<u64>(order_of(logits[token])) << 32 | (ALL - token);
    best[0] = Larger()(best[0], own);
  }
  join_in_block(best, shared, Larger());
  const unsigned order = static_cast<unsigned>(best[0] >> 32), likeliest = ALL - static_cast<unsigned>(best[0]);
  const bool is_number = order < order_of(INFINITY) && order > order_of(-INFINITY);
  if (!is_number || tile.temperature == 0) {
    if (threadIdx.x == 0) tokens[blockIdx.x] = is_number ? likeliest : NO_TOKEN;
    return;
  }
  const float largest = logits[likeliest];
  __syncthreads();  // All have read it.
  for (unsigned token = threadIdx.x; token < vocab; token += DRAW_THREADS) {
    const float logit = (logits[token] - largest) / tile.temperature;
    logits[token] = logit >= tile.floor ? logit : -INFINITY;
  }
  // Until all have waited for a sum, each thread reads what it has written itself.

  Kept kept = {INFINITE, vocab};
  u64 before;
  if (tile.top_k > 0 && tile.top_k < vocab) {
    const auto one = [](unsigned, unsigned, float) { return u64{1}; };
    const unsigned key = find_key(logits, vocab, tile.top_k, before, shared, one);
    const auto ties = [=](unsigned, unsigned own, float) { return u64{own == key}; };
    kept = {key, find_token(logits, vocab, tile.top_k - before, shared, ties)};
  }
  const auto total = [&] {
    u64 sum[1] = {};
    for (unsigned token = threadIdx.x; token < vocab; token += DRAW_THREADS)
      if (keeps(kept, key_of(logits[token]), token)) sum[0] += mass_of(logits[token]);
    join_in_block(sum, shared, Add());
    return sum[0];
  };
  const auto mass = [&](unsigned token, unsigned own, float logit) {
    return keeps(kept, own, token) ? mass_of(logit) : u64{0};
  };
  if (tile.top_p < 1) {
    const u64 some = static_cast<u64>(ceil(static_cast<double>(tile.top_p) * static_cast<double>(total())));
    const u64 wanted = some > 0 ? some : 1;
    const unsigned key = find_key(logits, vocab, wanted, before, shared, mass);
    const u64 each = mass_of(-__uint_as_float(key));
    const auto ties = [&](unsigned token, unsigned own, float) { return u64{own == key && keeps(kept, own, token)}; };
    const unsigned last = find_token(logits, vocab, (wanted - before + each - 1) / each, shared, ties);
    kept = {key, last};
  }
  const u64 place = static_cast<u64>(tile.place_high) << 32 | tile.place_low, sum = total();
  // sum * place / 2^53, below the sum.
  const u64 at = __umul64hi(sum, place) << 11 | sum * place >> 53;
  const unsigned token = find_token(logits, vocab, at + 1, shared, mass);
  if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

KERNEL(draw_tokens, DRAW_THREADS, (const DrawTile* tiles, const Edit* edits, float* rows, unsigned* tokens, unsigned width),
       (draw(tiles, edits, rows, tokens, width)))
