//! The innermost loops on the CPU, each in a portable form and an AVX2 form chosen at run time.
//!
//! Every output element is one chain of multiply-adds in ascending `k`, whatever the tile it was computed in. That is
//! what makes a row's result independent of the rows that share its batch.

use std::sync::OnceLock;

/// Output features in a panel of packed weights, slots in a block of the KV cache: two AVX2 vectors of f32.
pub const LANES: usize = 16;

/// Rows of the largest tile: 12 accumulators, 2 weight vectors and a broadcast fit the 16 registers of AVX2.
pub const MAX_TILE: usize = 6;

/// Weights that share a scale in the quantised formats.
pub const GROUP: usize = 32;

/// Which instructions the loops use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Simd {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Simd {
    /// The best that this CPU has.
    pub fn detect() -> Self {
        static BEST: OnceLock<Simd> = OnceLock::new();
        *BEST.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                return Simd::Avx2;
            }
            Simd::Portable
        })
    }
}

/// A group of packed weights: `GROUP` or fewer values of `k`, [`LANES`] output features each.
#[derive(Clone, Copy)]
pub enum Group<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
    F16(&'a [u16]),
    /// `scale[lane] * q`, `q` is `[GROUP][LANES]`.
    Q8 {
        scale: &'a [f32; LANES],
        q: &'a [i8],
    },
    /// `scale[lane] * q + min[lane]`; byte `[i][lane]` holds `k = i` in its low and `k = i + 16` in its high half.
    Q4 {
        scale: &'a [f32; LANES],
        min: &'a [f32; LANES],
        q: &'a [u8],
    },
}

/// Writes a group's weights as f32 `[k][LANES]` to the front of `out`.
pub fn unpack(simd: Simd, group: Group, out: &mut [f32; GROUP * LANES]) {
    match simd {
        Simd::Portable => {
            if let Group::F16(h) = group {
                for (o, &h) in out.iter_mut().zip(h) {
                    *o = half::f16::from_bits(h).to_f32();
                }
            } else {
                unpack_body(group, out)
            }
        }
        // SAFETY: `Avx2` is only made where the CPU has avx2, fma and f16c.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { unpack_avx2(group, out) },
    }
}

#[inline(always)]
fn unpack_body(group: Group, out: &mut [f32; GROUP * LANES]) {
    match group {
        Group::F32(w) => out[..w.len()].copy_from_slice(w),
        Group::Bf16(w) => {
            for (o, &w) in out.iter_mut().zip(w) {
                *o = f32::from_bits((w as u32) << 16);
            }
        }
        Group::F16(_) => unreachable!("f16 is unpacked by each form on its own"),
        Group::Q8 { scale, q } => {
            for (o, q) in out.chunks_exact_mut(LANES).zip(q.chunks_exact(LANES)) {
                for lane in 0..LANES {
                    o[lane] = q[lane] as f32 * scale[lane];
                }
            }
        }
        Group::Q4 { scale, min, q } => {
            let (low, high) = out.split_at_mut(GROUP / 2 * LANES);
            for ((low, high), q) in
                low.chunks_exact_mut(LANES).zip(high.chunks_exact_mut(LANES)).zip(q.chunks_exact(LANES))
            {
                for lane in 0..LANES {
                    low[lane] = (q[lane] & 15) as f32 * scale[lane] + min[lane];
                    high[lane] = (q[lane] >> 4) as f32 * scale[lane] + min[lane];
                }
            }
        }
    }
}

/// The compiler does not make vector code of the loops above, so it is written out.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack_avx2(group: Group, out: &mut [f32; GROUP * LANES]) {
    use std::arch::x86_64::*;
    // SAFETY (all loads and stores below): chunks have the length that each access needs; unaligned forms are used.
    let store = |out: &mut [f32], v: __m256| unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) };
    let bytes = |b: *const u8| unsafe { _mm_loadu_si128(b.cast()) };
    let pair = |v: &[f32; LANES]| unsafe { [_mm256_loadu_ps(v.as_ptr()), _mm256_loadu_ps(v[8..].as_ptr())] };
    match group {
        Group::F32(_) => unpack_body(group, out),
        Group::Bf16(w) => {
            for (o, w) in out.chunks_exact_mut(8).zip(w.chunks_exact(8)) {
                let wide = _mm256_cvtepu16_epi32(bytes(w.as_ptr().cast()));
                store(o, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)));
            }
        }
        Group::F16(h) => {
            for (o, h) in out.chunks_exact_mut(8).zip(h.chunks_exact(8)) {
                store(o, _mm256_cvtph_ps(bytes(h.as_ptr().cast())));
            }
        }
        Group::Q8 { scale, q } => {
            let scale = pair(scale);
            for (o, q) in out.chunks_exact_mut(LANES).zip(q.chunks_exact(LANES)) {
                let q = bytes(q.as_ptr().cast());
                let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
                let high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(q)));
                store(&mut o[..8], _mm256_mul_ps(low, scale[0]));
                store(&mut o[8..], _mm256_mul_ps(high, scale[1]));
            }
        }
        Group::Q4 { scale, min, q } => {
            let (scale, min, mask) = (pair(scale), pair(min), _mm_set1_epi8(15));
            let (first, second) = out.split_at_mut(GROUP / 2 * LANES);
            let rows = first.chunks_exact_mut(LANES).zip(second.chunks_exact_mut(LANES)).zip(q.chunks_exact(LANES));
            for ((first, second), q) in rows {
                let q = bytes(q.as_ptr());
                let halves = [_mm_and_si128(q, mask), _mm_and_si128(_mm_srli_epi16::<4>(q), mask)];
                for (o, q) in [first, second].into_iter().zip(halves) {
                    let low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q));
                    let high = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(q)));
                    // Not fused: the portable form and ggml round the product too.
                    store(&mut o[..8], _mm256_add_ps(_mm256_mul_ps(low, scale[0]), min[0]));
                    store(&mut o[8..], _mm256_add_ps(_mm256_mul_ps(high, scale[1]), min[1]));
                }
            }
        }
    }
}

/// A view of rows: row `r` starts at `r * stride`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// `acc[r][lane] += Σ_k x[r][k] * w[k][lane]` for `rows` rows, [`LANES`] lanes and `k` terms in ascending order.
///
/// `x` row `r` starts at `r * x.stride`, `w` row `k` at `k * w.stride`, `acc` row `r` at `r * acc_stride`.
///
/// # Panics
/// If a slice is too short for these.
pub fn multiply(simd: Simd, rows: usize, k: usize, x: Rows, w: Rows, acc: &mut [f32], acc_stride: usize) {
    if rows == 0 || k == 0 {
        return;
    }
    assert!(x.data.len() >= (rows - 1) * x.stride + k);
    assert!(w.data.len() >= (k - 1) * w.stride + LANES);
    assert!(acc.len() >= (rows - 1) * acc_stride + LANES);
    match simd {
        Simd::Portable => {
            for r in 0..rows {
                let acc = &mut acc[r * acc_stride..][..LANES];
                for (i, &x) in x.data[r * x.stride..][..k].iter().enumerate() {
                    for (a, &w) in acc.iter_mut().zip(&w.data[i * w.stride..][..LANES]) {
                        *a += x * w;
                    }
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => {
            let (x_stride, mut row) = (x.stride, 0);
            while row < rows {
                let left = rows - row;
                // Two even tiles rather than a full and a thin one: a thin tile has too few chains in flight.
                let take = if left > MAX_TILE && left < 2 * MAX_TILE { left.div_ceil(2) } else { left.min(MAX_TILE) };
                // SAFETY: the asserts above bound every access; `Avx2` is only made where the CPU has the features.
                unsafe {
                    let x = x.data.as_ptr().add(row * x.stride);
                    let acc = acc.as_mut_ptr().add(row * acc_stride);
                    let tile = match take {
                        1 => tile_avx2::<1>,
                        2 => tile_avx2::<2>,
                        3 => tile_avx2::<3>,
                        4 => tile_avx2::<4>,
                        5 => tile_avx2::<5>,
                        _ => tile_avx2::<MAX_TILE>,
                    };
                    tile(k, x, x_stride, w.data.as_ptr(), w.stride, acc, acc_stride);
                }
                row += take;
            }
        }
    }
}

/// # Safety
/// The CPU has avx2 and fma; the pointers are good for `R` rows and `k` terms as [`multiply`] describes them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const R: usize>(
    k: usize,
    x: *const f32,
    x_stride: usize,
    w: *const f32,
    w_stride: usize,
    acc: *mut f32,
    acc_stride: usize,
) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = [[_mm256_setzero_ps(); 2]; R];
        for (r, sum) in sum.iter_mut().enumerate() {
            *sum = [_mm256_loadu_ps(acc.add(r * acc_stride)), _mm256_loadu_ps(acc.add(r * acc_stride + 8))];
        }
        for i in 0..k {
            let w = w.add(i * w_stride);
            let (w0, w1) = (_mm256_loadu_ps(w), _mm256_loadu_ps(w.add(8)));
            for (r, sum) in sum.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*x.add(r * x_stride + i));
                sum[0] = _mm256_fmadd_ps(x, w0, sum[0]);
                sum[1] = _mm256_fmadd_ps(x, w1, sum[1]);
            }
        }
        for (r, sum) in sum.iter().enumerate() {
            _mm256_storeu_ps(acc.add(r * acc_stride), sum[0]);
            _mm256_storeu_ps(acc.add(r * acc_stride + 8), sum[1]);
        }
    }
}

/// `e^x` for `x <= 88`, to about 2 units in the last place: `2^n` by the exponent bits, the rest of the argument
/// (at most `ln 2 / 2`) by its Taylor polynomial of degree 7. Below -87 the result is 0.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    // A cast saturates, so no argument can make an exponent that is out of range.
    let power = f32::from_bits((((n as i32).clamp(-127, 127) + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

#[inline(always)]
fn silu_mul_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + exp((-g).min(88.0))) * u;
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn silu_mul_avx2(gate: &[f32], up: &[f32], out: &mut [f32]) {
    silu_mul_body(gate, up, out)
}

/// `out = silu(gate) * up`, `silu(g) = g / (1 + e^-g)`; three slices of one length.
pub fn silu_mul(simd: Simd, gate: &[f32], up: &[f32], out: &mut [f32]) {
    match simd {
        Simd::Portable => silu_mul_body(gate, up, out),
        // SAFETY: `Avx2` is only made where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { silu_mul_avx2(gate, up, out) },
    }
}

#[inline(always)]
fn softmax_body(scores: &mut [f32]) -> f32 {
    let max = scores.iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
    // Lanes summed apart so that the loop is a vector loop; their order is fixed, so the sum is too.
    let mut sums = [0.0f32; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (s, sum) in chunk.iter_mut().zip(&mut sums) {
            *s = exp(*s - max);
            *sum += *s;
        }
    }
    for (s, sum) in chunks.into_remainder().iter_mut().zip(&mut sums) {
        *s = exp(*s - max);
        *sum += *s;
    }
    sums.iter().sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn softmax_avx2(scores: &mut [f32]) -> f32 {
    softmax_body(scores)
}

/// Replaces each score by `e^(score - max)` and returns their sum.
pub fn softmax(simd: Simd, scores: &mut [f32]) -> f32 {
    match simd {
        Simd::Portable => softmax_body(scores),
        // SAFETY: `Avx2` is only made where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { softmax_avx2(scores) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: f32, b: f32, scale: f32) -> bool {
        (a - b).abs() <= 1e-5 * scale.max(1.0)
    }

    #[test]
    fn exp_is_accurate() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (exp(x), (x as f64).exp());
            assert!(((got as f64 - want) / want).abs() < 5e-7, "exp({x}) = {got}, not {want}");
        }
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    proptest! {
        #[test]
        fn tiles_equal_the_plain_sum_and_do_not_depend_on_their_size(
            rows in 1usize..20, k in 1usize..70, seed in any::<u64>()
        ) {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            let x: Vec<f32> = (0..rows * k).map(|_| next()).collect();
            let w: Vec<f32> = (0..k * LANES).map(|_| next()).collect();
            for simd in [Simd::Portable, Simd::detect()] {
                let run = |x: &[f32], rows: usize| {
                    let mut acc = vec![0.5f32; rows * LANES];
                    let (x, w) = (Rows { data: x, stride: k }, Rows { data: &w, stride: LANES });
                    multiply(simd, rows, k, x, w, &mut acc, LANES);
                    acc
                };
                let all = run(&x, rows);
                for r in 0..rows {
                    let alone = run(&x[r * k..][..k], 1);
                    prop_assert_eq!(&all[r * LANES..][..LANES], &alone[..]);
                    for lane in 0..LANES {
                        let want: f64 =
                            0.5 + (0..k).map(|i| x[r * k + i] as f64 * w[i * LANES + lane] as f64).sum::<f64>();
                        prop_assert!(close(alone[lane], want as f32, k as f32));
                    }
                }
            }
        }

        #[test]
        fn softmax_forms_agree(scores in prop::collection::vec(-30f32..30.0, 1..100)) {
            for simd in [Simd::Portable, Simd::detect()] {
                let mut got = scores.clone();
                let sum = softmax(simd, &mut got);
                let max = scores.iter().cloned().fold(f32::MIN, f32::max);
                let want: Vec<f64> = scores.iter().map(|&s| ((s - max) as f64).exp()).collect();
                let total: f64 = want.iter().sum();
                for (g, w) in got.iter().zip(&want) {
                    prop_assert!(close(g / sum, (w / total) as f32, 1.0));
                }
            }
        }

        #[test]
        fn silu_mul_forms_agree(gate in prop::collection::vec(-100f32..100.0, 1..50)) {
            let up: Vec<f32> = gate.iter().map(|g| g * 0.5 - 1.0).collect();
            for simd in [Simd::Portable, Simd::detect()] {
                let mut got = vec![0.0; gate.len()];
                silu_mul(simd, &gate, &up, &mut got);
                for ((&got, &g), &u) in got.iter().zip(&gate).zip(&up) {
                    let want = g as f64 / (1.0 + (-g as f64).exp()) * u as f64;
                    prop_assert!(close(got, want as f32, want.abs() as f32), "{got} {want}");
                }
            }
        }
    }
}
