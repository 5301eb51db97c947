//! [`Weights::multiply`] for AVX2.
//!
//! The instruction multiplies bytes without a sign by bytes with one and adds two products up in 16 bits.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::{AHEAD, CACHE_LINE, Codes, Lines, NEAR, Rounded, STEP, Scales, Weights, in_memory};
use crate::base::buffer::Buffer;
use crate::base::simd::{Ahead, LANES, Target};

const HALF: usize = LANES / 2;
/// Rows of the largest tile: 16 registers hold their sums beside weights, numbers and constants.
const ROWS: usize = 4;
/// The same of codes that were taken apart, which need no constants meanwhile.
const MOST_ROWS: usize = 6;
/// Rows for which codes of 4 bits are taken apart once for all, and their scales made f32.
const MANY: usize = 2 * MOST_ROWS;

/// How a panel's codes lie in memory: as in [`Codes::Nibbles`], a byte each in the same order of steps, or as in
/// [`Codes::Bytes`].
const NIBBLES: u8 = 0;
const APART: u8 = 1;
const BYTES: u8 = 2;

/// A panel's weights.
struct Panel<'a> {
    codes: *const u8,
    numbers: Numbers<'a>,
    features: usize,
    /// What nibbles have too much.
    zero: i32,
}

/// The scales and minima of a panel's groups.
enum Numbers<'a> {
    /// From this index on.
    Packed(&'a Weights, usize),
    /// A scale and a minimum for each group.
    Apart(*const [[f32; LANES]; 2]),
}

/// A panel whose codes of 4 bits are bytes, and its scales and minima f32. Room for one after the other.
struct Apart {
    codes: Lines,
    numbers: Buffer,
}

impl Apart {
    fn new(weights: &Weights) -> Self {
        let groups = weights.k / weights.group;
        let mut apart = Apart { codes: Lines::new(weights.k * LANES), numbers: Buffer::new(groups * 2 * LANES) };
        // Where there are no minima, they are 0.
        apart.numbers.fill(0.0);
        apart
    }

    /// The scales and the minima of each group.
    fn numbers(&mut self) -> &mut [[[f32; LANES]; 2]] {
        self.numbers.as_chunks_mut().0.as_chunks_mut().0
    }

    #[target_feature(enable = "avx2,f16c")]
    fn take(&mut self, weights: &Weights, codes: &[u8], panel: usize) {
        let mask = _mm256_set1_epi8(15);
        let length = weights.k * HALF;
        let pairs = codes[panel * length..][..length].as_chunks::<{ STEP * LANES }>().0;
        for (pair, out) in pairs.iter().zip(self.codes.as_chunks_mut::<{ 2 * STEP * LANES }>().0) {
            for at in [0, STEP * HALF] {
                // SAFETY: half a step has so many bytes.
                unsafe {
                    let both = _mm256_loadu_si256(pair[at..].as_ptr().cast());
                    let steps = [both, _mm256_srli_epi16::<4>(both)].map(|step| _mm256_and_si256(step, mask));
                    _mm256_storeu_si256(out[at..].as_mut_ptr().cast(), steps[0]);
                    _mm256_storeu_si256(out[STEP * LANES + at..].as_mut_ptr().cast(), steps[1]);
                }
            }
        }
        let groups = self.numbers().len();
        let scales = [Some(&weights.scales), weights.mins.as_ref()];
        for (which, scales) in scales.into_iter().enumerate().filter_map(|(i, scales)| Some((i, scales?))) {
            assert!(scales.len() >= (panel + 1) * groups);
            for (g, numbers) in self.numbers().iter_mut().enumerate() {
                // SAFETY: the assert; there are two halves.
                unsafe {
                    for (h, half) in scales.halves(panel * groups + g).into_iter().enumerate() {
                        _mm256_storeu_ps(numbers[which][h * HALF..].as_mut_ptr(), half);
                    }
                }
            }
        }
    }
}

impl Scales {
    /// The first and the second half of a panel's.
    ///
    /// # Safety
    /// There are more than `index`.
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn halves(&self, index: usize) -> [__m256; 2] {
        // SAFETY: the caller's promise; each holds LANES numbers.
        unsafe {
            match self {
                Scales::F32(numbers) => halves(numbers.get_unchecked(index)),
                Scales::F16(numbers) => {
                    let numbers = numbers.as_ptr().add(index).cast::<u16>();
                    [numbers, numbers.add(HALF)].map(|half| _mm256_cvtph_ps(_mm_loadu_si128(half.cast())))
                }
            }
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn halves(numbers: &[f32; LANES]) -> [__m256; 2] {
    // SAFETY: there are two.
    unsafe { [_mm256_loadu_ps(numbers.as_ptr()), _mm256_loadu_ps(numbers[HALF..].as_ptr())] }
}

/// Has the compiler work out `sum` here: it would do one half of a panel after the other, and keep the numbers of a whole
/// group in memory in between.
#[target_feature(enable = "avx2")]
#[inline]
fn in_order(sum: &mut __m256i) {
    // SAFETY: there are no instructions.
    unsafe { asm!("/* {} */", inout(ymm_reg) * sum, options(nostack, preserves_flags)) };
}

impl Weights {
    /// # Safety
    /// The CPU has avx2, fma and f16c; there are such rows and panels; `y` is as for [`Self::multiply`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn avx2(
        &self,
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            macro_rules! short {
                ($layout:ident, $steps:literal) => {
                    self.avx2_short::<$layout, $steps>(x, rows, panels, ahead, scale, y)
                };
            }
            macro_rules! tiles {
                ($layout:ident, $steps:literal, $from_zero:literal) => {
                    self.avx2_tiles::<$layout, $steps, $from_zero>(x, rows, panels, ahead, scale, y)
                };
            }
            let (steps, is_many) = (self.group / STEP, rows.len() >= MANY);
            let is_short = self.group == self.k && self.mins.is_none();
            match (&self.codes, steps) {
                (Codes::Nibbles { .. }, 2) if is_short => short!(NIBBLES, 2),
                (Codes::Nibbles { .. }, 4) if is_short => short!(NIBBLES, 4),
                (Codes::Nibbles { .. }, 8) if is_short => short!(NIBBLES, 8),
                (Codes::Nibbles { zero: 0, .. }, 8) if is_many => tiles!(APART, 8, true),
                (Codes::Nibbles { .. }, 8) if is_many => tiles!(APART, 8, false),
                (Codes::Nibbles { zero: 0, .. }, 8) => tiles!(NIBBLES, 8, true),
                (Codes::Nibbles { .. }, 8) => tiles!(NIBBLES, 8, false),
                (Codes::Nibbles { .. }, _) => tiles!(NIBBLES, 0, false),
                (Codes::Bytes(_), 1) if is_short => short!(BYTES, 1),
                (Codes::Bytes(_), 2) if is_short => short!(BYTES, 2),
                (Codes::Bytes(_), 4) if is_short => short!(BYTES, 4),
                (Codes::Bytes(_), 4) => tiles!(BYTES, 4, true),
                (Codes::Bytes(_), 8) => tiles!(BYTES, 8, true),
                (Codes::Bytes(_), 16) => tiles!(BYTES, 16, true),
                (Codes::Bytes(_), _) => tiles!(BYTES, 0, true),
            }
        }
    }

    /// For panels of one group of `STEPS` steps, as in an adapter's B: so short that it counts what else there is to do for each.
    ///
    /// # Safety
    /// As for [`Self::avx2`]; the group is such a one, and has no minima.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2_short<const LAYOUT: u8, const STEPS: usize>(
        &self,
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        mut ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        let bytes = if LAYOUT == NIBBLES { STEP * HALF } else { STEP * LANES };
        debug_assert!(self.k == STEPS * STEP && self.codes().len() >= panels.end * STEPS * bytes);
        debug_assert!(rows.end <= x.rows());
        let (ones, flip, mask) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128), _mm256_set1_epi8(15));
        let (factor, zero) = (_mm256_set1_ps(scale), self.zero());
        for (i, panel) in panels.enumerate() {
            // The codes and the scales of as much.
            ahead.fetch((STEPS * bytes).div_ceil(CACHE_LINE) + i % 2);
            let is_full = self.features(panel) == LANES;
            // SAFETY: there are such panels and rows, and the caller's promise.
            unsafe {
                let codes = self.codes().as_ptr().add(panel * STEPS * bytes);
                let weights: [[__m256i; 2]; STEPS] = std::array::from_fn(|s| {
                    // Two steps of nibbles lie together.
                    let line = codes.add(if LAYOUT == NIBBLES { s / 2 } else { s } * STEP * LANES);
                    [line, line.add(STEP * HALF)].map(|half| {
                        let codes = _mm256_loadu_si256(half.cast());
                        match (LAYOUT, s % 2) {
                            (NIBBLES, 0) => _mm256_and_si256(codes, mask),
                            (NIBBLES, _) => _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask),
                            _ => _mm256_xor_si256(codes, flip),
                        }
                    })
                });
                let scales = self.scales.halves(panel);
                for (r, row) in rows.clone().enumerate() {
                    let (common, q) =
                        (&*x.groups.as_ptr().add(row), x.q.as_ptr().add(row * STEPS * STEP).cast::<i32>());
                    let mut sums = [_mm256_setzero_si256(); 2];
                    for (s, weights) in weights.iter().enumerate() {
                        let x = _mm256_set1_epi32(q.add(s).read_unaligned());
                        for (sum, &weights) in sums.iter_mut().zip(weights) {
                            // As in a tile.
                            *sum = if LAYOUT == NIBBLES {
                                _mm256_add_epi16(*sum, _mm256_maddubs_epi16(weights, x))
                            } else {
                                let pairs =
                                    _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
                                _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones))
                            };
                        }
                    }
                    if LAYOUT == NIBBLES {
                        let excess = _mm256_set1_epi32(zero * common.sum);
                        sums = sums.map(|sum| _mm256_sub_epi32(_mm256_madd_epi16(sum, ones), excess));
                    }
                    let common = _mm256_set1_ps(common.scale);
                    let sum = |h: usize| {
                        let product = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[h]), scales[h]);
                        // To 0, as others add it to the sum of the groups before.
                        _mm256_fmadd_ps(product, common, _mm256_setzero_ps())
                    };
                    let y = y.at(r, i * LANES);
                    if is_full {
                        for h in 0..2 {
                            let (start, product) = (y.start.add(h * HALF), _mm256_mul_ps(factor, sum(h)));
                            let sum = if y.add { _mm256_add_ps(_mm256_loadu_ps(start), product) } else { product };
                            _mm256_storeu_ps(start, sum);
                        }
                    } else {
                        let mut both = [0.0; LANES];
                        (0..2).for_each(|h| _mm256_storeu_ps(both[h * HALF..].as_mut_ptr(), sum(h)));
                        y.put(&both, self.features(panel), scale);
                    }
                }
            }
        }
    }

    /// For groups of `STEPS` steps, of any number if it is 0; `FROM_ZERO` if codes are the whole numbers.
    ///
    /// # Safety
    /// As for [`Self::avx2`].
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2_tiles<const LAYOUT: u8, const STEPS: usize, const FROM_ZERO: bool>(
        &self,
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        mut ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        let (row, panel, groups, codes) = (rows.start, panels.start, x.groups_per_row, self.codes());
        let length = self.k * if LAYOUT == NIBBLES { HALF } else { LANES };
        let zero = if let Codes::Nibbles { zero, .. } = self.codes { zero } else { 0 };
        let mut apart = (LAYOUT == APART).then(|| Apart::new(self));
        let most = if LAYOUT == APART { MOST_ROWS } else { ROWS };
        let near = (NEAR / self.k / most).max(1) * most;
        let of_one = rows.len() == 1;
        for start in rows.clone().step_by(near) {
            let end = rows.end.min(start + near);
            for p in panels.clone() {
                let features = self.features(p);
                // What follows comes from memory while this panel's tiles are computed.
                // For one row, a panel takes hardly longer than to work out where the next one is.
                let mut of_next = (!of_one && p + 1 < panels.end).then(|| self.ahead(p + 1..p + 2));
                let left = if of_one { panels.end - p } else { 1 };
                let next = of_next.as_mut().unwrap_or(&mut ahead);
                let tiles = (end - start).div_ceil(most);
                let lines = next.lines().div_ceil(tiles * groups * left);
                let weights = match &mut apart {
                    Some(apart) => {
                        apart.take(self, codes, p);
                        let numbers = Numbers::Apart(apart.numbers().as_ptr());
                        Panel { codes: apart.codes.as_ptr().cast(), numbers, features, zero }
                    }
                    None => {
                        let codes = codes[p * length..][..length].as_ptr();
                        Panel { codes, numbers: Numbers::Packed(self, p * groups), features, zero }
                    }
                };
                let mut r = start;
                for tile in 0..tiles {
                    // As many in each, or one more.
                    let take = (end - r).div_ceil(tiles - tile);
                    // SAFETY: the caller's promise.
                    unsafe {
                        let y = y.at(r - row, (p - panel) * LANES);
                        macro_rules! tile {
                            ($rows:expr) => {
                                avx2_tile::<LAYOUT, { $rows }, STEPS, FROM_ZERO>(&weights, x, r, next, lines, scale, y)
                            };
                        }
                        match take {
                            1 => tile!(1),
                            2 => tile!(2),
                            3 => tile!(3),
                            5 if LAYOUT == APART => tile!(5),
                            6 if LAYOUT == APART => tile!(6),
                            _ => tile!(4),
                        }
                    }
                    r += take;
                }
            }
        }
    }
}

/// For `R` rows and a panel.
///
/// # Safety
/// As for [`Self::avx2`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
unsafe fn avx2_tile<const LAYOUT: u8, const R: usize, const STEPS: usize, const FROM_ZERO: bool>(
    weights: &Panel,
    x: &Rounded,
    row: usize,
    next: &mut Ahead,
    lines: usize,
    scale: f32,
    y: Target,
) {
    let groups = x.groups_per_row;
    let (steps, unroll) = match (STEPS, LAYOUT) {
        (0, NIBBLES) => (x.group / STEP, 2),
        (0, _) => (x.group / STEP, 1),
        _ => (STEPS, 4),
    };
    let bytes = if LAYOUT == NIBBLES { STEP * HALF } else { STEP * LANES };
    let (ones, flip, mask) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128), _mm256_set1_epi8(15));
    // SAFETY: the caller's promise.
    let (mut q, mut common) = unsafe { (x.q.as_ptr().add(row * x.k), x.groups.as_ptr().add(row * groups)) };
    let mut w = weights.codes;
    let mut acc = [[0.0f32; LANES]; R];
    let acc = match R {
        // Adding to memory takes longer than a group of few rows.
        0..=2 => acc.as_mut_ptr().cast(),
        _ => in_memory(acc.as_mut_ptr().cast()),
    };
    for r in 0..R {
        _mm_prefetch::<_MM_HINT_T0>(y.start.wrapping_add(r * y.stride).cast());
    }
    for g in 0..groups {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        // SAFETY: there are as many codes and numbers as `k` asks for, and as many groups' scales.
        unsafe {
            // Of long panels and at a product's end nothing else is known to come.
            if LAYOUT != APART && (R == 1 || lines == 0) {
                for line in (0..steps * bytes).step_by(CACHE_LINE) {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + line).cast());
                }
            }
            next.fetch(lines);
            for _ in 0..steps / unroll {
                for turn in 0..unroll {
                    let codes = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(STEP * HALF).cast())];
                    let codes = match (LAYOUT, turn % 2) {
                        (NIBBLES, 0) => codes.map(|both| _mm256_and_si256(both, mask)),
                        (NIBBLES, _) => codes.map(|both| _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask)),
                        _ => codes,
                    };
                    let signed = codes.map(|codes| _mm256_xor_si256(codes, flip));
                    let sizes = signed.map(|codes| _mm256_abs_epi8(codes));
                    unrolled!(r < R, {
                        let numbers = q.add(r * x.k).cast::<i32>().read_unaligned();
                        let x = _mm256_set1_epi32(numbers);
                        unrolled!(h < 2, {
                            sums[r][h] = if LAYOUT != BYTES {
                                // Two products are 2 * 15 * 127 at most: those of eight steps fit 16 bits.
                                _mm256_add_epi16(sums[r][h], _mm256_maddubs_epi16(codes[h], x))
                            } else {
                                // Without its sign a code is at most 128, a number 127: two products fit 16 bits.
                                let pairs = _mm256_maddubs_epi16(sizes[h], _mm256_sign_epi8(x, signed[h]));
                                _mm256_add_epi32(sums[r][h], _mm256_madd_epi16(pairs, ones))
                            };
                            in_order(&mut sums[r][h]);
                        });
                    });
                    // Two steps of nibbles lie together.
                    w = w.add(if LAYOUT == NIBBLES && turn % 2 == 0 { 0 } else { STEP * LANES });
                    q = q.add(STEP);
                }
            }
            let (scales, mins) = match weights.numbers {
                Numbers::Apart(numbers) if LAYOUT == APART => {
                    let [scales, mins] = &*numbers.add(g);
                    (halves(scales), Some(halves(mins)))
                }
                Numbers::Packed(weights, first) if LAYOUT != APART => {
                    (weights.scales.halves(first + g), weights.mins.as_ref().map(|mins| mins.halves(first + g)))
                }
                _ => std::hint::unreachable_unchecked(),
            };
            unrolled!(r < R, {
                let common = &*common.add(r * groups);
                let (scale, total) = (_mm256_set1_ps(common.scale), _mm256_set1_ps(common.total));
                unrolled!(h < 2, {
                    let mut sum = match LAYOUT {
                        BYTES => sums[r][h],
                        _ => _mm256_madd_epi16(sums[r][h], ones),
                    };
                    if !FROM_ZERO {
                        // Once for each number of the row.
                        sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(weights.zero * common.sum));
                    }
                    let product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scales[h]);
                    let acc = acc.add(r * LANES + h * HALF);
                    let mut sum = _mm256_fmadd_ps(product, scale, _mm256_loadu_ps(acc));
                    if let Some(mins) = mins {
                        sum = _mm256_fmadd_ps(mins[h], total, sum);
                    }
                    _mm256_storeu_ps(acc, sum);
                });
            });
            common = common.add(1);
        }
    }
    let factor = _mm256_set1_ps(scale);
    unrolled!(r < R, {
        // SAFETY: the caller's promise; a panel's sums have two halves.
        unsafe {
            let y = y.at(r, 0);
            let sums = acc.add(r * LANES);
            if weights.features == LANES {
                for h in 0..2 {
                    let (start, sum) = (y.start.add(h * HALF), _mm256_loadu_ps(sums.add(h * HALF)));
                    let product = _mm256_mul_ps(factor, sum);
                    let sum = if y.add { _mm256_add_ps(_mm256_loadu_ps(start), product) } else { product };
                    _mm256_storeu_ps(start, sum);
                }
            } else {
                y.put(&*sums.cast(), weights.features, scale);
            }
        }
    });
}
