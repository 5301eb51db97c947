//! Products in whole numbers: weights of 8 bits and activations rounded to 8 bits, group by group along `k`.
//!
//! The whole-number sum of a group is exact, and the sums of groups are added in ascending order: as with floating point, a
//! row's result depends neither on the rows beside it nor on the kind of CPU.

use rayon::prelude::*;

use super::simd::{LANES, Simd};

/// Most weights that share a scale. Outliers of activations spoil the numbers that share theirs, so few; each group costs a
/// conversion to floating point, so many.
const MAX_GROUP: usize = 64;
/// Fewer are not worth a scale.
const MIN_GROUP: usize = 32;
/// Weights of one output feature that an instruction multiplies and adds up.
const STEP: usize = 4;
/// Rows of the largest tile.
pub const TILE_ROWS: usize = 8;
/// Panels of the widest tile.
pub const TILE_PANELS: usize = 4;

/// How many weights along `k` share a scale; `None` where `k` has no such divisor.
pub fn group(k: usize) -> Option<usize> {
    (MIN_GROUP..=MAX_GROUP).rev().find(|group| group.is_multiple_of(STEP) && k.is_multiple_of(*group))
}

/// Rows of activations in 8 bits: `x = scale * q`, rounded.
pub struct Rounded {
    k: usize,
    /// `[rows, k]`.
    q: Vec<i8>,
    /// Scale and sum of `q` of each group: `[rows, k / group]`.
    groups: Vec<(f32, i32)>,
}

impl Rounded {
    /// Rounds `rows` rows of `k` numbers, `stride` apart. Where a number is not finite, neither are its group's products.
    ///
    /// # Panics
    /// If [`group`] has none for `k`, or `x` is too short.
    pub fn new(simd: Simd, x: &[f32], stride: usize, rows: usize, k: usize) -> Self {
        /// Numbers worth handing to another thread.
        const GRAIN: usize = 1 << 15;
        let group = group(k).expect("the matrix has groups");
        let mut rounded = Rounded { k, q: vec![0; rows * k], groups: vec![(0.0, 0); rows * (k / group)] };
        let row = |row: usize, q: &mut [i8], groups: &mut [(f32, i32)]| {
            let x = &x[row * stride..][..k];
            for ((x, q), out) in x.chunks_exact(group).zip(q.chunks_exact_mut(group)).zip(groups) {
                *out = round(simd, x, q);
            }
        };
        let groups = k / group;
        let parts = rounded.q.par_chunks_exact_mut(k).zip(rounded.groups.par_chunks_exact_mut(groups)).enumerate();
        parts.with_min_len((GRAIN / k).max(1)).for_each(|(i, (q, groups))| row(i, q, groups));
        rounded
    }
}

#[inline(always)]
fn round_body(x: &[f32], q: &mut [i8]) -> (f32, i32) {
    // As bits, an absolute value that is NaN is larger than all others.
    let max = x.iter().fold(0u32, |max, x| max.max(x.abs().to_bits()));
    let scale = f32::from_bits(max) / 127.0;
    let factor = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut sum = 0;
    for (q, x) in q.iter_mut().zip(x) {
        // Adding 1.5 * 2^23 leaves the nearest whole number, ties to even, in the low bits.
        let whole = (x * factor + 12_582_912.0).to_bits().wrapping_sub(0x4B40_0000) as i32;
        *q = whole as i8;
        sum += i32::from(*q);
    }
    (scale, sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_avx2(x: &[f32], q: &mut [i8]) -> (f32, i32) {
    round_body(x, q)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn round_avx512(x: &[f32], q: &mut [i8]) -> (f32, i32) {
    round_body(x, q)
}

fn round(simd: Simd, x: &[f32], q: &mut [i8]) -> (f32, i32) {
    match simd {
        Simd::Portable => round_body(x, q),
        // SAFETY: `Avx2` is only made where the CPU has avx2.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { round_avx2(x, q) },
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 if !has_vnni() => unsafe { round_avx2(x, q) },
        // SAFETY: `has_vnni` asks for all of these.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { round_avx512(x, q) },
    }
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl")
}

/// Weights of 8 bits, `w = scale * q`, in panels of [`LANES`] output features: `[panels][k / STEP][LANES][STEP]`.
#[derive(Debug)]
pub struct Weights {
    k: usize,
    group: usize,
    /// `q + 128`: the instruction multiplies numbers without a sign by ones with.
    q: Vec<u8>,
    /// `[panels][k / group]`.
    scales: Vec<[f32; LANES]>,
}

impl Weights {
    /// Rounds `at(row, i)`, the weight `i` of output feature `row`, for `n` features; what is beyond them is 0.
    ///
    /// # Panics
    /// If [`group`] has none for `k`.
    pub fn new(n: usize, k: usize, at: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let (group, panels) = (group(k).expect("k has groups"), n.div_ceil(LANES));
        let at = |row: usize, i: usize| if row < n { at(row, i) } else { 0.0 };
        let scale = |index: usize| {
            let (panel, first) = (index / (k / group), index % (k / group) * group);
            std::array::from_fn(|lane| {
                let numbers = (first..first + group).map(|i| at(panel * LANES + lane, i).abs());
                numbers.fold(0.0, f32::max) / 127.0
            })
        };
        let scales: Vec<[f32; LANES]> = (0..panels * (k / group)).into_par_iter().map(scale).collect();
        let mut q = vec![128u8; panels * k * LANES];
        q.par_chunks_mut((k * LANES).max(1)).enumerate().for_each(|(panel, q)| {
            for (index, q) in q.iter_mut().enumerate() {
                let (lane, i) = (index / STEP % LANES, index / (STEP * LANES) * STEP + index % STEP);
                let scale = scales[panel * (k / group) + i / group][lane];
                let whole = if scale == 0.0 { 0.0 } else { (at(panel * LANES + lane, i) / scale).round() };
                *q = (whole + 128.0) as u8;
            }
        });
        Weights { k, group, q, scales }
    }

    pub fn bytes(&self) -> usize {
        self.q.len() + 4 * LANES * self.scales.len()
    }

    /// Writes the weights of output feature `row` to `out`, `[k]`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane, groups) = (row / LANES, row % LANES, self.k / self.group);
        for (i, out) in out.iter_mut().enumerate() {
            let q = self.q[(panel * self.k + i / STEP * STEP) * LANES + lane * STEP + i % STEP];
            *out = self.scales[panel * groups + i / self.group][lane] * (f32::from(q) - 128.0);
        }
    }

    /// `acc[row][panel][lane] += x wᵀ` for the rows from `row` on and the panels from `panel` on, as many as `acc` has
    /// room for; at most [`TILE_ROWS`] and [`TILE_PANELS`].
    ///
    /// # Panics
    /// If there are not so many rows or panels, or `x` was rounded for another `k`.
    pub fn multiply(&self, simd: Simd, x: &Rounded, row: usize, rows: usize, panel: usize, acc: &mut [f32]) {
        let (groups, panels) = (self.k / self.group, acc.len() / (rows * LANES));
        assert_eq!((x.k, acc.len()), (self.k, rows * panels * LANES));
        assert!((1..=TILE_ROWS).contains(&rows) && (1..=TILE_PANELS).contains(&panels));
        assert!((row + rows) * self.k <= x.q.len() && (panel + panels) * groups <= self.scales.len());
        for g in 0..groups {
            let tile = Tile {
                steps: self.group / STEP,
                w: &self.q[(panel * self.k + g * self.group) * LANES..],
                w_stride: self.k * LANES,
                w_scales: &self.scales[panel * groups + g..],
                x: &x.q[row * self.k + g * self.group..],
                x_stride: self.k,
                x_groups: &x.groups[row * groups + g..],
                groups,
            };
            match simd {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the CPU was asked for what it needs.
                Simd::Avx512 if has_vnni() => unsafe { tile.vnni(rows, panels, acc) },
                #[cfg(target_arch = "x86_64")]
                Simd::Avx2 | Simd::Avx512 => {
                    for (p, r) in (0..panels).flat_map(|p| (0..rows).map(move |r| (p, r))) {
                        // SAFETY: both are only made where the CPU has avx2.
                        unsafe { tile.avx2(r, p, &mut acc[(r * panels + p) * LANES..][..LANES]) };
                    }
                }
                Simd::Portable => {
                    for (p, r) in (0..panels).flat_map(|p| (0..rows).map(move |r| (p, r))) {
                        tile.portable(r, p, &mut acc[(r * panels + p) * LANES..][..LANES]);
                    }
                }
            }
        }
    }
}

/// One group of some rows and panels.
struct Tile<'a> {
    /// Of [`STEP`] weights.
    steps: usize,
    /// Panels are `w_stride` apart.
    w: &'a [u8],
    w_stride: usize,
    /// Panels are `groups` apart.
    w_scales: &'a [[f32; LANES]],
    /// Rows are `x_stride` apart.
    x: &'a [i8],
    x_stride: usize,
    /// Rows are `groups` apart.
    x_groups: &'a [(f32, i32)],
    groups: usize,
}

impl Tile<'_> {
    /// Weights of a panel and numbers of a row.
    fn of(&self, row: usize, panel: usize) -> (&[u8], &[i8]) {
        (
            &self.w[panel * self.w_stride..][..self.steps * STEP * LANES],
            &self.x[row * self.x_stride..][..self.steps * STEP],
        )
    }

    /// Adds the sums in whole numbers, scaled.
    #[inline(always)]
    fn finish(&self, row: usize, panel: usize, sums: [i32; LANES], acc: &mut [f32]) {
        let (x_scale, w_scales) = (self.x_groups[row * self.groups].0, &self.w_scales[panel * self.groups]);
        for ((acc, sum), w_scale) in acc.iter_mut().zip(sums).zip(w_scales) {
            *acc = (sum as f32 * w_scale).mul_add(x_scale, *acc);
        }
    }

    fn portable(&self, row: usize, panel: usize, acc: &mut [f32]) {
        let ((w, x), mut sums) = (self.of(row, panel), [0i32; LANES]);
        for (w, x) in w.chunks_exact(STEP * LANES).zip(x.chunks_exact(STEP)) {
            for (sum, w) in sums.iter_mut().zip(w.chunks_exact(STEP)) {
                *sum += w.iter().zip(x).map(|(&w, &x)| (i32::from(w) - 128) * i32::from(x)).sum::<i32>();
            }
        }
        self.finish(row, panel, sums, acc);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2(&self, row: usize, panel: usize, acc: &mut [f32]) {
        use std::arch::x86_64::*;
        let (w, x) = self.of(row, panel);
        let (mut sums, ones, flip) = ([_mm256_setzero_si256(); 2], _mm256_set1_epi16(1), _mm256_set1_epi8(-128));
        for (w, x) in w.chunks_exact(STEP * LANES).zip(x.chunks_exact(STEP)) {
            let x = _mm256_set1_epi32(i32::from_ne_bytes(std::array::from_fn(|i| x[i] as u8)));
            for (half, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a chunk has 64 bytes.
                let w = unsafe { _mm256_loadu_si256(w.as_ptr().add(32 * half).cast()) };
                let w = _mm256_xor_si256(w, flip);
                // Without its sign a weight is at most 127, so that two products fit 16 bits.
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        let mut whole = [0i32; LANES];
        // SAFETY: each half has 8 numbers.
        unsafe {
            _mm256_storeu_si256(whole.as_mut_ptr().cast(), sums[0]);
            _mm256_storeu_si256(whole.as_mut_ptr().add(8).cast(), sums[1]);
        }
        self.finish(row, panel, whole, acc);
    }

    /// # Safety
    /// The CPU has avx512f and avx512bw, and what [`has_vnni`] asks for.
    #[cfg(target_arch = "x86_64")]
    unsafe fn vnni(&self, rows: usize, panels: usize, acc: &mut [f32]) {
        macro_rules! tiles {
            ($($rows:literal),*) => {
                match (rows, panels) {
                    $(
                        ($rows, 1) => self.vnni_tile::<$rows, 1>(acc),
                        ($rows, 2) => self.vnni_tile::<$rows, 2>(acc),
                        ($rows, 3) => self.vnni_tile::<$rows, 3>(acc),
                        ($rows, 4) => self.vnni_tile::<$rows, 4>(acc),
                    )*
                    _ => unreachable!("a tile has 1 to 8 rows and 1 to 4 panels"),
                }
            };
        }
        // SAFETY: the caller's promise.
        unsafe { tiles!(1, 2, 3, 4, 5, 6, 7, 8) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn vnni_tile<const R: usize, const P: usize>(&self, acc: &mut [f32]) {
        use std::arch::x86_64::*;
        for (r, p) in (0..R).flat_map(|r| (0..P).map(move |p| (r, p))) {
            let _ = self.of(r, p);
        }
        assert_eq!(acc.len(), R * P * LANES);
        // The weights have 128 too much, which counts once for each number of the row.
        let mut sums: [[__m512i; P]; R] =
            std::array::from_fn(|r| [_mm512_set1_epi32(-128 * self.x_groups[r * self.groups].1); P]);
        let (w, x) = (self.w.as_ptr(), self.x.as_ptr());
        for step in 0..self.steps {
            // SAFETY: `of` has looked at all of the weights and the numbers.
            unsafe {
                let w: [__m512i; P] =
                    std::array::from_fn(|p| _mm512_loadu_si512(w.add(p * self.w_stride + step * STEP * LANES).cast()));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(x.add(r * self.x_stride + step * STEP).cast::<i32>().read_unaligned());
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = _mm512_dpbusd_epi32(*sum, w, x);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let x_scale = _mm512_set1_ps(self.x_groups[r * self.groups].0);
            for (p, sum) in sums.iter().enumerate() {
                let acc = &mut acc[(r * P + p) * LANES..][..LANES];
                // SAFETY: both have LANES numbers.
                unsafe {
                    let w_scales = _mm512_loadu_ps(self.w_scales[p * self.groups].as_ptr());
                    let product = _mm512_mul_ps(_mm512_cvtepi32_ps(*sum), w_scales);
                    let added = _mm512_fmadd_ps(product, x_scale, _mm512_loadu_ps(acc.as_ptr()));
                    _mm512_storeu_ps(acc.as_mut_ptr(), added);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn groups_divide_what_models_have() {
        let found = [576, 1536, 2048, 5632, 11008, 14336, 64, 32].map(group);
        assert_eq!(found, [64, 64, 64, 64, 64, 64, 64, 32].map(Some));
        assert_eq!([31, 33, 62, 1009].map(group), [None; 4]);
    }

    #[test]
    fn numbers_that_are_not_finite_stay_so() {
        for number in [f32::NAN, f32::INFINITY, -f32::INFINITY] {
            for simd in Simd::all() {
                let (mut x, mut acc) = ([1.0; 32], [0.0; LANES]);
                x[7] = number;
                let weights = Weights::new(1, 32, |_, _| 0.5);
                weights.multiply(simd, &Rounded::new(simd, &x, 32, 1, 32), 0, 1, 0, &mut acc);
                assert!(!acc[0].is_finite(), "{number} by {simd:?}: {}", acc[0]);
            }
        }
    }

    proptest! {
        /// All forms give the same bits, whatever the tile, and the sum of the rounded numbers.
        #[test]
        fn tiles_equal_the_plain_sum(
            rows in 1usize..=TILE_ROWS, panels in 1usize..=TILE_PANELS, steps in 8usize..=16, groups in 1usize..7,
            seed in any::<u64>(),
        ) {
            let (n, k) = (panels * LANES - seed as usize % 5, steps * STEP * groups);
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            let w: Vec<f32> = (0..n * k).map(|_| next() * next()).collect();
            let x: Vec<f32> = (0..rows * (k + 1)).map(|_| next() * 9.0).collect();
            let weights = Weights::new(n, k, |row, i| w[row * k + i]);
            let kept = |row: usize| {
                let mut out = vec![0.0; k];
                weights.row(row, &mut out);
                out
            };
            let mut all = vec![];
            for simd in Simd::all() {
                let rounded = Rounded::new(simd, &x, k + 1, rows, k);
                let mut acc = vec![0.0; rows * panels * LANES];
                weights.multiply(simd, &rounded, 0, rows, 0, &mut acc);
                for (row, panel) in (0..rows).flat_map(|row| (0..panels).map(move |panel| (row, panel))) {
                    let mut alone = vec![0.0; LANES];
                    weights.multiply(simd, &rounded, row, 1, panel, &mut alone);
                    prop_assert_eq!(&alone[..], &acc[(row * panels + panel) * LANES..][..LANES]);
                }
                all.push(acc);
            }
            prop_assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
            for feature in 0..n {
                let kept = kept(feature);
                for (w, kept) in w[feature * k..][..k].iter().zip(&kept) {
                    prop_assert!((w - kept).abs() <= 0.5 / 127.0 + 1e-6);
                }
                for row in 0..rows {
                    let got = all[0][(row * panels + feature / LANES) * LANES + feature % LANES];
                    let x = &x[row * (k + 1)..][..k];
                    let want: f64 = x.iter().zip(&kept).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    // Each activation is off by half a step at most.
                    let off: f64 = kept.iter().map(|w| f64::from(w.abs()) * 9.0 / 254.0).sum();
                    prop_assert!((f64::from(got) - want).abs() <= off + 1e-3, "{got}, not {want}");
                }
            }
        }
    }
}
