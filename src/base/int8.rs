//! Products in whole numbers: weights of at most 8 bits and activations rounded to 8 bits, group by group along `k`.
//!
//! The whole-number sum of a group is exact, and the sums of groups are added in ascending order: as with floating point, a
//! row's result depends neither on the rows beside it nor on the kind of CPU.

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::parallel;
use super::simd::{LANES, Simd};

/// Most weights that share a scale. Outliers of activations spoil the numbers that share theirs, so few; each group costs a
/// conversion to floating point, so many.
const MAX_GROUP: usize = 64;
/// Fewer are not worth a scale of our choice; blocks of files have as few as [`STEP`].
const MIN_GROUP: usize = 32;
/// Most weights of 4 bits that share a scale: their products with a row, two and two, fit 16 bits without a sign.
const MAX_NIBBLE_GROUP: usize = 32;
/// Weights of one output feature that an instruction multiplies and adds up.
const STEP: usize = 4;
/// Rows of the largest tile.
#[cfg(target_arch = "x86_64")]
const TILE_ROWS: usize = 8;
/// Bytes of codes that are fetched ahead.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;
/// Panels of the widest tile of AVX-512.
#[cfg(target_arch = "x86_64")]
const VNNI_PANELS: usize = 4;

/// How many weights along `k` share a scale: all where there are few, as in an adapter's B; `None` where `k` has no fit
/// divisor.
pub fn group(k: usize) -> Option<usize> {
    if k < MIN_GROUP {
        return (k > 0 && k.is_multiple_of(STEP)).then_some(k);
    }
    (MIN_GROUP..=MAX_GROUP).rev().find(|group| group.is_multiple_of(STEP) && k.is_multiple_of(*group))
}

/// What the numbers of a row's group have in common: `x = scale * q`.
#[derive(Debug, Clone, Copy, Default)]
struct RowGroup {
    scale: f32,
    /// Of `q`.
    sum: i32,
    /// Of `x`.
    total: f32,
}

/// Rows of activations in 8 bits: `x = scale * q`, rounded.
pub struct Rounded {
    k: usize,
    group: usize,
    /// `[rows, k]`.
    q: Vec<i8>,
    /// `[rows, k / group]`.
    groups: Vec<RowGroup>,
}

impl Rounded {
    fn rows(&self) -> usize {
        self.q.len().checked_div(self.k).unwrap_or(0)
    }

    /// Rounds `rows` rows of `k` numbers, `stride` apart, in groups of `group`. Where a number is not finite, neither are its
    /// group's products.
    ///
    /// # Panics
    /// If `k` is not in whole groups, or `x` is too short.
    pub fn new(simd: Simd, x: &[f32], stride: usize, rows: usize, k: usize, group: usize) -> Self {
        /// Numbers worth handing to another thread.
        const GRAIN: usize = 1 << 12;
        assert!(k.is_multiple_of(group));
        let groups = k / group;
        let mut rounded = Rounded { k, group, q: vec![0; rows * k], groups: vec![RowGroup::default(); rows * groups] };
        let row = |row: usize, q: &mut [i8], groups: &mut [RowGroup]| {
            let x = &x[row * stride..][..k];
            for ((x, q), out) in x.chunks_exact(group).zip(q.chunks_exact_mut(group)).zip(groups) {
                *out = round(simd, x, q);
            }
        };
        if rows * k < 2 * GRAIN {
            let parts = rounded.q.chunks_exact_mut(k).zip(rounded.groups.chunks_exact_mut(groups)).enumerate();
            parts.for_each(|(i, (q, groups))| row(i, q, groups));
        } else {
            let q = (&mut rounded.q[..], k);
            parallel::chunk_pairs(q, (&mut rounded.groups[..], groups), row);
        }
        rounded
    }
}

#[inline(always)]
fn round_body(x: &[f32], q: &mut [i8]) -> RowGroup {
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
    RowGroup { scale, sum, total: scale * sum as f32 }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_avx2(x: &[f32], q: &mut [i8]) -> RowGroup {
    round_body(x, q)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn round_avx512(x: &[f32], q: &mut [i8]) -> RowGroup {
    round_body(x, q)
}

fn round(simd: Simd, x: &[f32], q: &mut [i8]) -> RowGroup {
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

/// The whole numbers of weights, in panels of [`LANES`] output features.
#[derive(Debug)]
enum Codes {
    /// `q + 128` of 8 bits, `[panels][k / STEP][LANES][STEP]`: the instruction multiplies numbers without a sign by ones with.
    Bytes(Vec<u8>),
    /// 4 bits without a sign, `[panels][k / STEP][LANES / 2][STEP]`: the low half of a byte belongs to a lane of the first
    /// half of the panel, the high half to the same lane of the second half.
    Nibbles(Vec<u8>),
}

/// A number for each feature and group, `[panels][k / group]`, in f16 where that keeps them all.
#[derive(Debug)]
enum Scales {
    F16(Vec<[u16; LANES]>),
    F32(Vec<[f32; LANES]>),
}

impl Scales {
    fn new(numbers: Vec<[f32; LANES]>) -> Self {
        let half = |x: f32| f16::from_f32(x);
        match numbers.as_flattened().iter().all(|&x| half(x).to_f32() == x) {
            true => Scales::F16(numbers.iter().map(|group| group.map(|x| half(x).to_bits())).collect()),
            false => Scales::F32(numbers),
        }
    }

    fn len(&self) -> usize {
        match self {
            Scales::F16(numbers) => numbers.len(),
            Scales::F32(numbers) => numbers.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Scales::F16(numbers) => 2 * LANES * numbers.len(),
            Scales::F32(numbers) => 4 * LANES * numbers.len(),
        }
    }

    fn get(&self, index: usize) -> [f32; LANES] {
        match self {
            Scales::F32(numbers) => numbers[index],
            Scales::F16(numbers) => numbers[index].map(|bits| f16::from_bits(bits).to_f32()),
        }
    }

    /// The first or the second half of a panel's.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn avx2(&self, index: usize, half: usize) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: each holds LANES numbers, half of them from there on.
        unsafe {
            match self {
                Scales::F32(numbers) => _mm256_loadu_ps(numbers[index].as_ptr().add(LANES / 2 * half)),
                Scales::F16(numbers) => {
                    _mm256_cvtph_ps(_mm_loadu_si128(numbers[index].as_ptr().add(LANES / 2 * half).cast()))
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn avx512(&self, index: usize) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: each holds LANES numbers.
        unsafe {
            match self {
                Scales::F32(numbers) => _mm512_loadu_ps(numbers[index].as_ptr()),
                Scales::F16(numbers) => _mm512_cvtph_ps(_mm256_loadu_si256(numbers[index].as_ptr().cast())),
            }
        }
    }
}

/// Weights in whole numbers: `w = scale * q + min`.
#[derive(Debug)]
pub struct Weights {
    k: usize,
    group: usize,
    codes: Codes,
    scales: Scales,
    /// `None` where all are 0.
    mins: Option<Scales>,
}

impl Weights {
    /// Rounds `at(row, i)`, the weight `i` of output feature `row`, to 8 bits for `n` features.
    ///
    /// # Panics
    /// If [`group`] has none for `k`.
    pub fn round(n: usize, k: usize, at: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let group = group(k).expect("k has groups");
        let max = |row: usize, g: usize| (g * group..(g + 1) * group).map(|i| at(row, i).abs()).fold(0.0, f32::max);
        // The next f16 above, where there is one, so that no number exceeds 127.
        let scales = per_group(n, k / group, |row, g| {
            let scale = max(row, g) / 127.0;
            let half = f16::from_f32(scale * (1.0 + f16::EPSILON.to_f32()));
            if half.is_normal() { half.to_f32() } else { scale }
        });
        let codes = bytes(n, k, |row, i| {
            let scale = scales[row / LANES * (k / group) + i / group][row % LANES];
            if scale == 0.0 { 0 } else { (at(row, i) / scale).round() as i8 }
        });
        Weights { k, group, codes, scales: Scales::new(scales), mins: None }
    }

    /// Weights that are whole numbers already: `q(row, i)` of weight `i` of output feature `row`, `scale(row, group)` and
    /// `min(row, group)`. `bits` is 4 where the whole numbers are 0 to 15, else 8.
    ///
    /// # Panics
    /// If `k` is not in whole groups, or groups are not in whole steps of 4 or too long.
    pub fn exact(
        (n, k, group, bits): (usize, usize, usize, u32),
        q: impl Fn(usize, usize) -> i8 + Sync,
        scale: impl Fn(usize, usize) -> f32 + Sync,
        min: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Self {
        assert!(k.is_multiple_of(group) && group.is_multiple_of(STEP) && group <= MAX_GROUP);
        let codes = if bits == 4 {
            assert!(group <= MAX_NIBBLE_GROUP);
            nibbles(n, k, q)
        } else {
            bytes(n, k, q)
        };
        let mins = per_group(n, k / group, min);
        let any = mins.as_flattened().iter().any(|&min| min != 0.0);
        let scales = Scales::new(per_group(n, k / group, scale));
        Weights { k, group, codes, scales, mins: any.then(|| Scales::new(mins)) }
    }

    /// How many weights along `k` share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    pub fn bytes(&self) -> usize {
        let codes = match &self.codes {
            Codes::Bytes(codes) | Codes::Nibbles(codes) => codes.len(),
        };
        codes + self.scales.bytes() + self.mins.as_ref().map_or(0, Scales::bytes)
    }

    /// Writes the weights of output feature `row` to `out`, `[k]`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane, groups) = (row / LANES, row % LANES, self.k / self.group);
        for (g, out) in out.chunks_mut(self.group).enumerate() {
            let at = |scales: &Scales| scales.get(panel * groups + g)[lane];
            let (scale, min) = (at(&self.scales), self.mins.as_ref().map_or(0.0, at));
            // Rounded after the product, as ggml does.
            let code = |i: usize| self.code(panel, lane, g * self.group + i) as f32;
            out.iter_mut().enumerate().for_each(|(i, out)| *out = scale * code(i) + min);
        }
    }

    /// `x wᵀ` for some rows of `x` and some panels: calls `done(row, panel, sums)` once for each of them.
    ///
    /// # Panics
    /// If there are not so many rows or panels, or `x` was rounded for another `k` or in other groups.
    #[inline]
    pub fn multiply(
        &self,
        simd: Simd,
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        mut done: impl FnMut(usize, usize, &[f32; LANES]),
    ) {
        let groups = self.k / self.group;
        assert_eq!((x.k, x.group), (self.k, self.group));
        assert!(panels.end * groups <= self.scales.len() && rows.end <= x.rows());
        match simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 if has_vnni() => {
                let mut acc = [0.0f32; TILE_ROWS * VNNI_PANELS * LANES];
                // Few rows leave registers for more chains of additions.
                let side = if rows.len() <= TILE_ROWS / 2 { VNNI_PANELS } else { VNNI_PANELS / 2 };
                for panel in panels.clone().step_by(side) {
                    let side = side.min(panels.end - panel);
                    for row in rows.clone().step_by(TILE_ROWS) {
                        let rows = TILE_ROWS.min(rows.end - row);
                        let acc = &mut acc[..rows * side * LANES];
                        acc.fill(0.0);
                        // SAFETY: the CPU was asked for what it needs.
                        unsafe { self.vnni((rows, side), x, row, panel, acc) };
                        for (i, acc) in acc.as_chunks().0.iter().enumerate() {
                            done(row + i / side, panel + i % side, acc);
                        }
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 | Simd::Avx512 => {
                let mut acc = [[0.0; LANES]; TILE_ROWS];
                for (panel, row) in panels.flat_map(|p| rows.clone().step_by(TILE_ROWS).map(move |r| (p, r))) {
                    let acc = &mut acc[..TILE_ROWS.min(rows.end - row)];
                    acc.fill([0.0; LANES]);
                    // SAFETY: both are only made where the CPU has avx2, fma and f16c.
                    unsafe { self.avx2(x, row, panel, acc) };
                    acc.iter().enumerate().for_each(|(r, acc)| done(row + r, panel, acc));
                }
            }
            Simd::Portable => {
                for panel in panels {
                    rows.clone().for_each(|row| done(row, panel, &self.portable(x, row, panel)));
                }
            }
        }
    }

    /// The whole number of weight `i` of a panel's output feature `lane`.
    fn code(&self, panel: usize, lane: usize, i: usize) -> i32 {
        match &self.codes {
            Codes::Bytes(codes) => {
                i32::from(codes[(panel * self.k + i / STEP * STEP) * LANES + lane * STEP + i % STEP]) - 128
            }
            Codes::Nibbles(codes) => {
                let half = LANES / 2;
                let byte = codes[(panel * self.k + i / STEP * STEP) * half + lane % half * STEP + i % STEP];
                i32::from(if lane < half { byte & 15 } else { byte >> 4 })
            }
        }
    }

    fn portable(&self, x: &Rounded, row: usize, panel: usize) -> [f32; LANES] {
        let (mut acc, groups) = ([0.0f32; LANES], self.k / self.group);
        for g in 0..groups {
            let (common, q) = (x.groups[row * groups + g], &x.q[row * self.k + g * self.group..][..self.group]);
            let scales = self.scales.get(panel * groups + g);
            let mins = self.mins.as_ref().map(|mins| mins.get(panel * groups + g));
            for (lane, acc) in acc.iter_mut().enumerate() {
                let products =
                    q.iter().enumerate().map(|(i, &q)| self.code(panel, lane, g * self.group + i) * i32::from(q));
                *acc = (products.sum::<i32>() as f32 * scales[lane]).mul_add(common.scale, *acc);
                if let Some(mins) = &mins {
                    *acc = mins[lane].mul_add(common.total, *acc);
                }
            }
        }
        acc
    }
}

/// `f(row, group)` for every group of `n` features; 0 beyond them.
fn per_group(n: usize, groups: usize, f: impl Fn(usize, usize) -> f32 + Sync) -> Vec<[f32; LANES]> {
    let of = |index: usize| {
        std::array::from_fn(|lane| {
            let row = index / groups * LANES + lane;
            if row < n { f(row, index % groups) } else { 0.0 }
        })
    };
    (0..n.div_ceil(LANES) * groups).into_par_iter().map(of).collect()
}

/// Lays out `q(row, i)` for `n` features; 0 beyond them.
fn bytes(n: usize, k: usize, q: impl Fn(usize, usize) -> i8 + Sync) -> Codes {
    let mut codes = vec![128u8; n.div_ceil(LANES) * k * LANES];
    codes.par_chunks_mut((k * LANES).max(1)).enumerate().for_each(|(panel, codes)| {
        for (index, code) in codes.iter_mut().enumerate() {
            let (row, i) = (panel * LANES + index / STEP % LANES, index / (STEP * LANES) * STEP + index % STEP);
            if row < n {
                *code = (i16::from(q(row, i)) + 128) as u8;
            }
        }
    });
    Codes::Bytes(codes)
}

/// The same for whole numbers from 0 to 15.
fn nibbles(n: usize, k: usize, q: impl Fn(usize, usize) -> i8 + Sync) -> Codes {
    let half = LANES / 2;
    let mut codes = vec![0u8; n.div_ceil(LANES) * k * half];
    codes.par_chunks_mut((k * half).max(1)).enumerate().for_each(|(panel, codes)| {
        for (index, code) in codes.iter_mut().enumerate() {
            let (row, i) = (panel * LANES + index / STEP % half, index / (STEP * half) * STEP + index % STEP);
            let nibble = |row: usize| if row < n { q(row, i) as u8 & 15 } else { 0 };
            *code = nibble(row) | nibble(row + half) << 4;
        }
    });
    Codes::Nibbles(codes)
}

// Plain loops over arrays: with closures, even those of the standard library, vectors go through memory.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
impl Weights {
    /// `acc[r] += x wᵀ` for as many rows and a panel.
    ///
    /// # Safety
    /// The CPU has avx2, fma and f16c.
    unsafe fn avx2(&self, x: &Rounded, row: usize, panel: usize, acc: &mut [[f32; LANES]]) {
        // 16 registers hold the sums of four rows and both halves of a panel, or of eight rows and one half, beside those of
        // weights, numbers and constants.
        macro_rules! tiles {
            ($nibbles:literal, $codes:expr) => {
                match acc.len() {
                    1 => self.avx2_tile::<$nibbles, 1, 0, 2>($codes, x, row, panel, acc),
                    2 => self.avx2_tile::<$nibbles, 2, 0, 2>($codes, x, row, panel, acc),
                    3 => self.avx2_tile::<$nibbles, 3, 0, 2>($codes, x, row, panel, acc),
                    4 => self.avx2_tile::<$nibbles, 4, 0, 2>($codes, x, row, panel, acc),
                    5 => tiles!($nibbles, $codes, 5),
                    6 => tiles!($nibbles, $codes, 6),
                    7 => tiles!($nibbles, $codes, 7),
                    8 => tiles!($nibbles, $codes, 8),
                    _ => unreachable!("a tile has 1 to 8 rows"),
                }
            };
            ($nibbles:literal, $codes:expr, $rows:literal) => {{
                self.avx2_tile::<$nibbles, $rows, 0, 1>($codes, x, row, panel, acc);
                self.avx2_tile::<$nibbles, $rows, 1, 1>($codes, x, row, panel, acc);
            }};
        }
        // SAFETY: the caller's promise.
        unsafe {
            match &self.codes {
                Codes::Bytes(codes) => tiles!(false, codes),
                Codes::Nibbles(codes) => tiles!(true, codes),
            }
        }
    }

    /// For `R` rows and `HALVES` halves of a panel from `FIRST` on.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2_tile<const NIBBLES: bool, const R: usize, const FIRST: usize, const HALVES: usize>(
        &self,
        codes: &[u8],
        x: &Rounded,
        row: usize,
        panel: usize,
        acc: &mut [[f32; LANES]],
    ) {
        use std::arch::x86_64::*;
        const HALF: usize = LANES / 2;
        let (groups, steps) = (self.k / self.group, self.group / STEP);
        let bytes = if NIBBLES { STEP * HALF } else { STEP * LANES };
        let length = self.k / STEP * bytes;
        assert!(codes.len() >= (panel + 1) * length && acc.len() >= R && row + R <= x.rows());
        let (ones, flip, mask) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128), _mm256_set1_epi8(15));
        let (mut w, mut step) = (codes[panel * length..].as_ptr(), 0);
        let mut q = [x.q.as_ptr(); R];
        for r in 0..R {
            q[r] = x.q[(row + r) * self.k..].as_ptr();
        }
        for g in 0..groups {
            let mut sums = [[_mm256_setzero_si256(); HALVES]; R];
            for _ in 0..steps {
                // SAFETY: there are as many codes and numbers as `k` asks for.
                unsafe {
                    let (mut codes, mut sizes) = ([ones; HALVES], [ones; HALVES]);
                    for h in 0..HALVES {
                        if NIBBLES {
                            let both = _mm256_loadu_si256(w.cast());
                            let both = if FIRST + h == 0 { both } else { _mm256_srli_epi16::<4>(both) };
                            codes[h] = _mm256_and_si256(both, mask);
                        } else {
                            let half = w.add((FIRST + h) * STEP * HALF);
                            codes[h] = _mm256_xor_si256(_mm256_loadu_si256(half.cast()), flip);
                            sizes[h] = _mm256_abs_epi8(codes[h]);
                        }
                    }
                    for r in 0..R {
                        let x = _mm256_set1_epi32(q[r].cast::<i32>().add(step).read_unaligned());
                        for h in 0..HALVES {
                            sums[r][h] = if NIBBLES {
                                // Two products are 2 * 15 * 127 at most: those of eight steps fit 16 bits.
                                _mm256_add_epi16(sums[r][h], _mm256_maddubs_epi16(codes[h], x))
                            } else {
                                // Without its sign a code is at most 128, a number 127: two products fit 16 bits.
                                let pairs = _mm256_maddubs_epi16(sizes[h], _mm256_sign_epi8(x, codes[h]));
                                _mm256_add_epi32(sums[r][h], _mm256_madd_epi16(pairs, ones))
                            };
                        }
                    }
                    // The processor's own prefetching ends with the page.
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD).cast());
                    (w, step) = (w.add(bytes), step + 1);
                }
            }
            for h in 0..HALVES {
                let scales = self.scales.avx2(panel * groups + g, FIRST + h);
                let mins = self.mins.as_ref().map(|mins| mins.avx2(panel * groups + g, FIRST + h));
                for r in 0..R {
                    let sum = if NIBBLES { _mm256_madd_epi16(sums[r][h], ones) } else { sums[r][h] };
                    let common = &x.groups[(row + r) * groups + g];
                    let product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scales);
                    // SAFETY: a row has LANES numbers, half of them from here on.
                    unsafe {
                        let acc = acc[r].as_mut_ptr().add(HALF * (FIRST + h));
                        let mut added = _mm256_fmadd_ps(product, _mm256_set1_ps(common.scale), _mm256_loadu_ps(acc));
                        if let Some(mins) = mins {
                            added = _mm256_fmadd_ps(mins, _mm256_set1_ps(common.total), added);
                        }
                        _mm256_storeu_ps(acc, added);
                    }
                }
            }
        }
    }

    /// `acc[r][p] += x wᵀ` for some rows and panels, `acc` being `[rows][panels][LANES]`.
    ///
    /// # Safety
    /// The CPU has avx512f, avx512bw and what [`has_vnni`] asks for.
    unsafe fn vnni(&self, tile: (usize, usize), x: &Rounded, row: usize, panel: usize, acc: &mut [f32]) {
        macro_rules! tiles {
            ($nibbles:literal, $codes:expr, $($rows:literal),*) => {
                match tile {
                    $(
                        ($rows, 1) => self.vnni_tile::<$nibbles, $rows, 1>($codes, x, row, panel, acc),
                        ($rows, 2) => self.vnni_tile::<$nibbles, $rows, 2>($codes, x, row, panel, acc),
                        ($rows, 3) => self.vnni_tile::<$nibbles, $rows, 3>($codes, x, row, panel, acc),
                        ($rows, 4) => self.vnni_tile::<$nibbles, $rows, 4>($codes, x, row, panel, acc),
                    )*
                    _ => unreachable!("a tile has 1 to 8 rows and 1 to 4 panels"),
                }
            };
        }
        // SAFETY: the caller's promise.
        unsafe {
            match &self.codes {
                Codes::Bytes(codes) => tiles!(false, codes, 1, 2, 3, 4, 5, 6, 7, 8),
                Codes::Nibbles(codes) => tiles!(true, codes, 1, 2, 3, 4, 5, 6, 7, 8),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn vnni_tile<const NIBBLES: bool, const R: usize, const P: usize>(
        &self,
        codes: &[u8],
        x: &Rounded,
        row: usize,
        panel: usize,
        acc: &mut [f32],
    ) {
        use std::arch::x86_64::*;
        let (groups, steps) = (self.k / self.group, self.group / STEP);
        let bytes = if NIBBLES { STEP * LANES / 2 } else { STEP * LANES };
        // Panels are so many codes apart.
        let apart = self.k / STEP * bytes;
        assert!(codes.len() >= (panel + P) * apart && acc.len() == R * P * LANES && row + R <= x.rows());
        let (mut w, mut q) = (codes[panel * apart..].as_ptr(), x.q[row * self.k..].as_ptr());
        for g in 0..groups {
            let mut sums = [[_mm512_setzero_si512(); P]; R];
            if !NIBBLES {
                // Codes have 128 too much, which counts once for each number of the row.
                for r in 0..R {
                    sums[r] = [_mm512_set1_epi32(-128 * x.groups[(row + r) * groups + g].sum); P];
                }
            }
            for _ in 0..steps {
                // SAFETY: there are as many codes and numbers as `k` asks for.
                unsafe {
                    let mut codes = [_mm512_setzero_si512(); P];
                    for p in 0..P {
                        codes[p] = if NIBBLES {
                            let both = _mm256_loadu_si256(w.add(p * apart).cast());
                            let mask = _mm256_set1_epi8(15);
                            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask);
                            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_and_si256(both, mask)), high)
                        } else {
                            _mm512_loadu_si512(w.add(p * apart).cast())
                        };
                    }
                    for r in 0..R {
                        let x = _mm512_set1_epi32(q.add(r * self.k).cast::<i32>().read_unaligned());
                        for p in 0..P {
                            sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], codes[p], x);
                        }
                    }
                    (w, q) = (w.add(bytes), q.add(STEP));
                }
            }
            for p in 0..P {
                let index = (panel + p) * groups + g;
                let scales = self.scales.avx512(index);
                let mins = self.mins.as_ref().map(|mins| mins.avx512(index));
                for r in 0..R {
                    let common = x.groups[(row + r) * groups + g];
                    let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][p]), scales);
                    // SAFETY: the accumulator has LANES numbers from there on.
                    unsafe {
                        let acc = acc.as_mut_ptr().add((r * P + p) * LANES);
                        let mut added = _mm512_fmadd_ps(product, _mm512_set1_ps(common.scale), _mm512_loadu_ps(acc));
                        if let Some(mins) = mins {
                            added = _mm512_fmadd_ps(mins, _mm512_set1_ps(common.total), added);
                        }
                        _mm512_storeu_ps(acc, added);
                    }
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
        let found = [576, 1536, 2048, 5632, 11008, 14336, 64, 32, 16, 4].map(group);
        assert_eq!(found, [64, 64, 64, 64, 64, 64, 64, 32, 16, 4].map(Some));
        assert_eq!([0, 3, 31, 33, 62, 1009].map(group), [None; 6]);
    }

    #[test]
    fn numbers_that_are_not_finite_stay_so() {
        for number in [f32::NAN, f32::INFINITY, -f32::INFINITY] {
            for simd in Simd::all() {
                let (mut x, mut acc) = ([1.0; 32], [0.0; LANES]);
                x[7] = number;
                let weights = Weights::round(1, 32, |_, _| 0.5);
                weights.multiply(simd, &Rounded::new(simd, &x, 32, 1, 32, 32), 0..1, 0..1, |_, _, sums| acc = *sums);
                assert!(!acc[0].is_finite(), "{number} by {simd:?}: {}", acc[0]);
            }
        }
    }

    fn noise(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

    proptest! {
        /// All forms give the same bits, whatever the tile, and the sum of the rounded numbers.
        #[test]
        fn tiles_equal_the_plain_sum(
            rows in 1usize..20, panels in 1usize..7, steps in 1usize..=16, groups in 1usize..7,
            seed in any::<u64>(),
        ) {
            let groups = if steps < 8 { 1 } else { groups };
            let (n, k) = (panels * LANES - seed as usize % 5, steps * STEP * groups);
            let mut next = noise(seed);
            let w: Vec<f32> = (0..n * k).map(|_| next() * next()).collect();
            let x: Vec<f32> = (0..rows * (k + 1)).map(|_| next() * 9.0).collect();
            let weights = Weights::round(n, k, |row, i| w[row * k + i]);
            let mut kept = vec![0.0; n * k];
            kept.chunks_exact_mut(k).enumerate().for_each(|(row, out)| weights.row(row, out));
            for (w, kept) in w.iter().zip(&kept) {
                prop_assert!((w - kept).abs() <= 0.5 / 127.0 + 1e-6);
            }
            check(&weights, &kept, &x, rows, panels)?;
        }

        /// Weights that are whole numbers already stay what they are, of 4 bits and of 8, with minima and without.
        #[test]
        fn whole_numbers_stay_what_they_are(
            rows in 1usize..20, panels in 1usize..7, steps in 1usize..=8, groups in 1usize..7,
            four in any::<bool>(), has_min in any::<bool>(), in_f16 in any::<bool>(), seed in any::<u64>(),
        ) {
            let group = steps * STEP;
            let (n, k) = (panels * LANES - seed as usize % 5, group * groups);
            let mut next = noise(seed);
            // Also the largest ones, all over, so that sums are the largest there can be.
            let extreme = seed % 4 == 0;
            let code = |x: f32| match (four, extreme) {
                (true, true) => 15,
                (false, true) => if x < 0.0 { -128 } else { 127 },
                (true, false) => ((x + 1.0) * 7.99) as i8,
                (false, false) => (x * 127.9) as i8,
            };
            let q: Vec<i8> = (0..n * k).map(|_| code(next())).collect();
            let number = |x: f32| if in_f16 { f16::from_f32(x).to_f32() } else { x };
            let scales: Vec<f32> = (0..n * groups).map(|_| number(next() / 15.0)).collect();
            let mins: Vec<f32> = (0..n * groups).map(|_| if has_min { number(next()) } else { 0.0 }).collect();
            let x: Vec<f32> = (0..rows * (k + 1)).map(|_| if extreme { 9.0 } else { next() * 9.0 }).collect();
            let of = |numbers: &'_ [f32], row: usize, g: usize| numbers[row * groups + g];
            let weights = Weights::exact(
                (n, k, group, if four { 4 } else { 8 }),
                |row, i| q[row * k + i],
                |row, g| of(&scales, row, g),
                |row, g| of(&mins, row, g),
            );
            let mut kept = vec![0.0; n * k];
            kept.chunks_exact_mut(k).enumerate().for_each(|(row, out)| weights.row(row, out));
            for (i, kept) in kept.iter().enumerate() {
                let (row, g) = (i / k, i % k / group);
                prop_assert_eq!(*kept, of(&scales, row, g) * f32::from(q[i]) + of(&mins, row, g));
            }
            check(&weights, &kept, &x, rows, panels)?;
        }
    }

    /// That the product with `x`, rows of one number more than there are features, is that of the weights `kept`.
    fn check(weights: &Weights, kept: &[f32], x: &[f32], rows: usize, panels: usize) -> Result<(), TestCaseError> {
        let (k, group) = (weights.k, weights.group);
        let mut all = vec![];
        for simd in Simd::all() {
            let rounded = Rounded::new(simd, x, k + 1, rows, k, group);
            let mut acc = vec![[f32::NAN; LANES]; rows * panels];
            weights.multiply(simd, &rounded, 0..rows, 0..panels, |row, panel, sums| acc[row * panels + panel] = *sums);
            for (row, panel) in (0..rows).flat_map(|row| (0..panels).map(move |panel| (row, panel))) {
                let mut same = [f32::NAN; LANES];
                weights.multiply(simd, &rounded, row..row + 1, panel..panel + 1, |_, _, sums| same = *sums);
                prop_assert_eq!(same, acc[row * panels + panel]);
            }
            all.push(acc);
        }
        prop_assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        for (feature, kept) in kept.chunks_exact(k).enumerate() {
            for row in 0..rows {
                let got = all[0][row * panels + feature / LANES][feature % LANES];
                let x = &x[row * (k + 1)..][..k];
                let want: f64 = x.iter().zip(kept).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                // Each activation is off by half a step at most.
                let size: f64 = kept.iter().map(|w| f64::from(w.abs()) * 9.0).sum();
                prop_assert!((f64::from(got) - want).abs() <= size / 254.0 + 1e-5 * size + 1e-3, "{got}, not {want}");
            }
        }
        Ok(())
    }
}
