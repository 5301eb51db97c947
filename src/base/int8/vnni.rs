//! [`Weights::multiply`] for AVX-512 with VNNI.
//!
//! The instruction multiplies bytes without a sign by bytes with one and adds four products up to 32 bits.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::{AHEAD, CACHE_LINE, Codes, NEAR, Rounded, STEP, Scales, Weights, in_memory};
use crate::base::simd::{Ahead, LANES, Target};

/// Rows of the largest tile.
const ROWS: usize = 8;
/// Panels of the widest one.
const PANELS: usize = 4;
/// Bytes of panels side by side whose successors fit a near cache beside them.
const NEXT: usize = 20 << 10;

impl Scales {
    /// A panel's.
    ///
    /// # Safety
    /// There are more than `index`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) unsafe fn lanes(&self, index: usize) -> __m512 {
        // SAFETY: the caller's promise; each holds LANES numbers.
        unsafe {
            match self {
                Scales::F32(numbers) => _mm512_loadu_ps(numbers.as_ptr().add(index).cast()),
                Scales::F16(numbers) => _mm512_cvtph_ps(_mm256_loadu_si256(numbers.as_ptr().add(index).cast())),
            }
        }
    }
}

/// Has the compiler work out `sum` here, as in AVX2's form.
#[target_feature(enable = "avx512f")]
#[inline]
fn in_order(sum: &mut __m512i) {
    // SAFETY: there are no instructions.
    unsafe { asm!("/* {} */", inout(zmm_reg) * sum, options(nostack, preserves_flags)) };
}

impl Weights {
    /// # Safety
    /// The CPU has avx512f, avx512bw, avx512vl and avx512vnni; there are such rows and panels; `y` is as for
    /// [`Self::multiply`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) unsafe fn vnni(
        &self,
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        mut ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.group == self.k && self.mins.is_none() {
                macro_rules! short {
                    ($nibbles:literal, $steps:literal, $panels:literal) => {
                        return self.vnni_short::<$nibbles, $steps, $panels>(x, rows, panels, &mut ahead, scale, y)
                    };
                }
                match (&self.codes, self.k / STEP) {
                    (Codes::Bytes(_), 1) => short!(false, 1, 4),
                    (Codes::Bytes(_), 2) => short!(false, 2, 4),
                    (Codes::Bytes(_), 3) => short!(false, 3, 4),
                    (Codes::Bytes(_), 4) => short!(false, 4, 4),
                    (Codes::Bytes(_), 6) => short!(false, 6, 2),
                    (Codes::Bytes(_), 8) => short!(false, 8, 2),
                    (Codes::Bytes(_), 16) => short!(false, 16, 1),
                    (Codes::Nibbles { .. }, 2) => short!(true, 2, 4),
                    (Codes::Nibbles { .. }, 4) => short!(true, 4, 4),
                    (Codes::Nibbles { .. }, 6) => short!(true, 6, 2),
                    (Codes::Nibbles { .. }, 8) => short!(true, 8, 2),
                    _ => {}
                }
            }
            match (&self.codes, self.group / STEP) {
                (Codes::Nibbles { codes, .. }, 8) => self.vnni_tiles::<true, 8>(codes, x, rows, panels, scale, y),
                (Codes::Nibbles { codes, .. }, _) => self.vnni_tiles::<true, 0>(codes, x, rows, panels, scale, y),
                (Codes::Bytes(codes), 4) => self.vnni_tiles::<false, 4>(codes, x, rows, panels, scale, y),
                (Codes::Bytes(codes), 16) => self.vnni_tiles::<false, 16>(codes, x, rows, panels, scale, y),
                (Codes::Bytes(codes), _) => self.vnni_tiles::<false, 0>(codes, x, rows, panels, scale, y),
            }
        }
    }

    /// For panels of one group of `STEPS` steps, as in an adapter's B: the weights of `P` of them stay in registers for all
    /// rows.
    ///
    /// # Safety
    /// As for [`Self::vnni`]; the group is such a one, and has no minima.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn vnni_short<const NIBBLES: bool, const STEPS: usize, const P: usize>(
        &self,
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        ahead: &mut Ahead,
        scale: f32,
        y: Target,
    ) {
        let bytes = if NIBBLES { STEP * LANES / 2 } else { STEP * LANES };
        debug_assert!(self.k == STEPS * STEP && self.codes().len() >= panels.end * STEPS * bytes);
        let mut panel = panels.start;
        while panel < panels.end {
            // SAFETY: the caller's promise.
            unsafe {
                let y = y.at(0, (panel - panels.start) * LANES);
                macro_rules! side {
                    ($panels:expr) => {{
                        self.vnni_short_panels::<NIBBLES, STEPS, { $panels }>(x, rows.clone(), panel, ahead, scale, y);
                        panel += $panels;
                    }};
                }
                match panels.end - panel {
                    left if left >= P => side!(P),
                    2.. => side!(2),
                    _ => side!(1),
                }
            }
        }
    }

    /// For `P` panels from `panel` on.
    ///
    /// # Safety
    /// As for [`Self::vnni_short`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn vnni_short_panels<const NIBBLES: bool, const STEPS: usize, const P: usize>(
        &self,
        x: &Rounded,
        rows: Range<usize>,
        panel: usize,
        ahead: &mut Ahead,
        scale: f32,
        y: Target,
    ) {
        let (bytes, mask) = (if NIBBLES { STEP * LANES / 2 } else { STEP * LANES }, _mm512_set1_epi8(15));
        // The codes and the scales of as many panels.
        ahead.fetch(P * STEPS * bytes / CACHE_LINE + P / 2);
        // SAFETY: the caller's promise.
        let of_panels = unsafe { self.codes().as_ptr().add(panel * STEPS * bytes) };
        // By steps.
        let weights: [[__m512i; P]; STEPS] = std::array::from_fn(|s| {
            std::array::from_fn(|p| {
                // Two steps of nibbles lie together. SAFETY: panels have so many steps.
                let line = p * STEPS * bytes + if NIBBLES { s / 2 } else { s } * CACHE_LINE;
                let codes = unsafe { _mm512_loadu_si512(of_panels.add(line).cast()) };
                match (NIBBLES, s % 2) {
                    (false, _) => codes,
                    (true, 0) => _mm512_and_si512(codes, mask),
                    (true, _) => _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask),
                }
            })
        });
        // SAFETY: there are such panels.
        let scales: [__m512; P] = std::array::from_fn(|p| unsafe { self.scales.lanes(panel + p) });
        let (factor, zero) = (_mm512_set1_ps(scale), if NIBBLES { self.zero() } else { 128 });
        let is_full = self.features(panel + P - 1) == LANES;
        debug_assert!(rows.end <= x.rows());
        for (r, row) in rows.enumerate() {
            // SAFETY: there is such a row, and the caller's promise.
            unsafe {
                let (common, q) = (&*x.groups.as_ptr().add(row), x.q.as_ptr().add(row * STEPS * STEP).cast::<i32>());
                // What codes have too much counts once for each number of the row.
                let mut sums = [_mm512_set1_epi32(-zero * common.sum); P];
                for (s, weights) in weights.iter().enumerate() {
                    let q = _mm512_set1_epi32(q.add(s).read_unaligned());
                    sums.iter_mut().zip(weights).for_each(|(sum, &w)| *sum = _mm512_dpbusd_epi32(*sum, w, q));
                }
                let common = _mm512_set1_ps(common.scale);
                // To 0, as others add it to the sum of the groups before.
                let sum = |p: usize| {
                    let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[p]), scales[p]);
                    _mm512_fmadd_ps(product, common, _mm512_setzero_ps())
                };
                let y = y.at(r, 0);
                match (is_full, y.add) {
                    (true, true) => (0..P).for_each(|p| {
                        let y = y.start.add(p * LANES);
                        _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), _mm512_mul_ps(factor, sum(p))));
                    }),
                    (true, false) => (0..P).for_each(|p| {
                        _mm512_storeu_ps(y.start.add(p * LANES), _mm512_mul_ps(factor, sum(p)));
                    }),
                    (false, _) => (0..P).for_each(|p| {
                        let mut sums = [0.0; LANES];
                        _mm512_storeu_ps(sums.as_mut_ptr(), sum(p));
                        y.at(0, p * LANES).put(&sums, self.features(panel + p), scale);
                    }),
                }
            }
        }
    }

    /// For groups of `STEPS` steps, of any number if it is 0.
    ///
    /// # Safety
    /// As for [`Self::vnni`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn vnni_tiles<const NIBBLES: bool, const STEPS: usize>(
        &self,
        codes: &[u8],
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        scale: f32,
        y: Target,
    ) {
        let (row, panel) = (rows.start, panels.start);
        let near = (NEAR / self.k / ROWS).max(1) * ROWS;
        for start in rows.clone().step_by(near) {
            let end = rows.end.min(start + near);
            let mut p = panel;
            while p < panels.end {
                let side = match panels.end - p {
                    PANELS.. => PANELS,
                    // An adapter's A, which has few.
                    left if rows.len() == 1 => left,
                    _ => 1,
                };
                let mut r = start;
                while r < end {
                    let take = if end - r >= ROWS { ROWS } else { (end - r).min(ROWS / 2) };
                    // SAFETY: the caller's promise.
                    unsafe {
                        let y = y.at(r - row, (p - panel) * LANES);
                        macro_rules! tile {
                            ($rows:literal, $panels:literal, $first:literal) => {
                                self.vnni_tile::<NIBBLES, $rows, $panels, STEPS>(
                                    codes,
                                    x,
                                    r,
                                    p + $first,
                                    scale,
                                    y.at(0, $first * LANES),
                                )
                            };
                        }
                        // 16 chains of additions keep the multipliers busy: those of few rows are of more panels.
                        match (take, side) {
                            (1, 1) => tile!(1, 1, 0),
                            (2, 1) => tile!(2, 1, 0),
                            (3, 1) => tile!(3, 1, 0),
                            (4, 1) => tile!(4, 1, 0),
                            (_, 1) => tile!(8, 1, 0),
                            (1, 2) => tile!(1, 2, 0),
                            (1, 3) => tile!(1, 3, 0),
                            (1, _) => tile!(1, 4, 0),
                            (2, _) => tile!(2, 4, 0),
                            (3, _) => tile!(3, 4, 0),
                            (4, _) => tile!(4, 4, 0),
                            (_, _) => {
                                tile!(8, 2, 0);
                                tile!(8, 2, 2);
                            }
                        }
                    }
                    r += take;
                }
                p += side;
            }
        }
    }

    /// For `R` rows and `P` panels.
    ///
    /// # Safety
    /// As for [`Self::vnni`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn vnni_tile<const NIBBLES: bool, const R: usize, const P: usize, const STEPS: usize>(
        &self,
        codes: &[u8],
        x: &Rounded,
        row: usize,
        panel: usize,
        scale: f32,
        y: Target,
    ) {
        let groups = x.groups_per_row;
        let (steps, unroll) = if STEPS == 0 { (self.group / STEP, if NIBBLES { 2 } else { 1 }) } else { (STEPS, 4) };
        let bytes = if NIBBLES { STEP * LANES / 2 } else { STEP * LANES };
        // Panels are so many codes apart.
        let apart = self.k / STEP * bytes;
        // Short panels end before what is ahead in them: the same place of the next ones, then, if there are any.
        let is_last = codes.len() <= (panel + P) * apart;
        let ahead = if P * apart <= NEXT && !is_last { P * apart } else { AHEAD };
        debug_assert!(codes.len() >= (panel + P) * apart && row + R <= x.rows());
        let (mask, zero) = (_mm512_set1_epi8(15), if NIBBLES { self.zero() } else { 128 });
        // SAFETY: the caller's promise.
        let (mut w, mut q, mut common) = unsafe {
            let w = codes.as_ptr().add(panel * apart);
            (w, x.q.as_ptr().add(row * self.k), x.groups.as_ptr().add(row * groups))
        };
        let mut acc = [[[0.0f32; LANES]; P]; R];
        let acc = match R * P {
            // Adding to memory takes longer than a group of few rows.
            0..=4 => acc.as_mut_ptr().cast(),
            _ => in_memory(acc.as_mut_ptr().cast()),
        };
        for r in 0..R {
            for p in 0..P {
                _mm_prefetch::<_MM_HINT_T0>(y.start.wrapping_add(r * y.stride + p * LANES).cast());
            }
        }
        for g in 0..groups {
            let mut sums = [[_mm512_setzero_si512(); P]; R];
            // SAFETY: there are as many codes and numbers as `k` asks for, and as many groups' scales.
            unsafe {
                if zero != 0 {
                    // What codes have too much counts once for each number of the row.
                    unrolled!(r < R, { sums[r] = [_mm512_set1_epi32(-zero * (*common.add(r * groups)).sum); P] });
                }
                for line in (0..steps * bytes).step_by(CACHE_LINE) {
                    for p in 0..P {
                        _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(p * apart + ahead + line).cast());
                    }
                }
                for _ in 0..steps / unroll {
                    for turn in 0..unroll {
                        let mut codes = [_mm512_setzero_si512(); P];
                        unrolled!(p < P, {
                            let w = w.add(p * apart);
                            codes[p] = match (NIBBLES, turn % 2) {
                                (false, _) => _mm512_loadu_si512(w.cast()),
                                (true, 0) => _mm512_and_si512(_mm512_loadu_si512(w.cast()), mask),
                                (true, _) => {
                                    let both = _mm512_loadu_si512(w.cast());
                                    _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask)
                                }
                            };
                        });
                        unrolled!(r < R, {
                            let x = _mm512_set1_epi32(q.add(r * self.k).cast::<i32>().read_unaligned());
                            unrolled!(p < P, {
                                sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], codes[p], x);
                                in_order(&mut sums[r][p]);
                            });
                        });
                        // Two steps of nibbles lie together.
                        w = w.add(if NIBBLES && turn % 2 == 0 { 0 } else { STEP * LANES });
                        q = q.add(STEP);
                    }
                }
                let mut scales = [_mm512_setzero_ps(); P];
                let mut mins = scales;
                unrolled!(p < P, {
                    scales[p] = self.scales.lanes((panel + p) * groups + g);
                    if let Some(numbers) = &self.mins {
                        mins[p] = numbers.lanes((panel + p) * groups + g);
                    }
                });
                unrolled!(r < R, {
                    let common = &*common.add(r * groups);
                    let (scale, total) = (_mm512_set1_ps(common.scale), _mm512_set1_ps(common.total));
                    unrolled!(p < P, {
                        let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][p]), scales[p]);
                        let acc = acc.add((r * P + p) * LANES);
                        let mut sum = _mm512_fmadd_ps(product, scale, _mm512_loadu_ps(acc));
                        if self.mins.is_some() {
                            sum = _mm512_fmadd_ps(mins[p], total, sum);
                        }
                        _mm512_storeu_ps(acc, sum);
                    });
                });
                common = common.add(1);
            }
        }
        let factor = _mm512_set1_ps(scale);
        unrolled!(r < R, {
            unrolled!(p < P, {
                // SAFETY: the caller's promise.
                unsafe {
                    let y = y.at(r, p * LANES);
                    let sums = acc.add((r * P + p) * LANES);
                    if self.features(panel + p) == LANES {
                        let product = _mm512_mul_ps(factor, _mm512_loadu_ps(sums));
                        let sum = if y.add { _mm512_add_ps(_mm512_loadu_ps(y.start), product) } else { product };
                        _mm512_storeu_ps(y.start, sum);
                    } else {
                        y.put(&*sums.cast(), self.features(panel + p), scale);
                    }
                }
            });
        });
    }
}
