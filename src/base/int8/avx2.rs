//! [`Weights::multiply`] for AVX2.
//!
//! The instruction multiplies bytes without a sign by bytes with one and adds two products up in 16 bits.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::{AHEAD, CACHE_LINE, Codes, NEAR, Rounded, STEP, Scales, Weights};
use crate::base::simd::{LANES, Target};

const HALF: usize = LANES / 2;
/// Rows of the largest tile: 16 registers hold their sums beside weights, numbers and constants.
const ROWS: usize = 4;

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
                Scales::F32(numbers) => {
                    let numbers = numbers.as_ptr().add(index).cast::<f32>();
                    [_mm256_loadu_ps(numbers), _mm256_loadu_ps(numbers.add(HALF))]
                }
                Scales::F16(numbers) => {
                    let numbers = numbers.as_ptr().add(index).cast::<u16>();
                    [numbers, numbers.add(HALF)].map(|half| _mm256_cvtph_ps(_mm_loadu_si128(half.cast())))
                }
            }
        }
    }
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
    pub(super) unsafe fn avx2(&self, x: &Rounded, rows: Range<usize>, panels: Range<usize>, scale: f32, y: Target) {
        // SAFETY: the caller's promise.
        unsafe {
            match (&self.codes, self.group / STEP) {
                (Codes::Nibbles(codes), 8) => self.avx2_tiles::<true, 8>(codes, x, rows, panels, scale, y),
                (Codes::Nibbles(codes), _) => self.avx2_tiles::<true, 0>(codes, x, rows, panels, scale, y),
                (Codes::Bytes(codes), 4) => self.avx2_tiles::<false, 4>(codes, x, rows, panels, scale, y),
                (Codes::Bytes(codes), 16) => self.avx2_tiles::<false, 16>(codes, x, rows, panels, scale, y),
                (Codes::Bytes(codes), _) => self.avx2_tiles::<false, 0>(codes, x, rows, panels, scale, y),
            }
        }
    }

    /// For groups of `STEPS` steps, of any number if it is 0.
    ///
    /// # Safety
    /// As for [`Self::avx2`].
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2_tiles<const NIBBLES: bool, const STEPS: usize>(
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
            for p in panels.clone() {
                let end = rows.end.min(start + near);
                for r in (start..end).step_by(ROWS) {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let y = y.at(r - row, (p - panel) * LANES);
                        match end - r {
                            1 => self.avx2_tile::<NIBBLES, 1, STEPS>(codes, x, r, p, scale, y),
                            2 => self.avx2_tile::<NIBBLES, 2, STEPS>(codes, x, r, p, scale, y),
                            3 => self.avx2_tile::<NIBBLES, 3, STEPS>(codes, x, r, p, scale, y),
                            _ => self.avx2_tile::<NIBBLES, ROWS, STEPS>(codes, x, r, p, scale, y),
                        }
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
    unsafe fn avx2_tile<const NIBBLES: bool, const R: usize, const STEPS: usize>(
        &self,
        codes: &[u8],
        x: &Rounded,
        row: usize,
        panel: usize,
        scale: f32,
        y: Target,
    ) {
        let groups = x.groups_per_row;
        let (steps, unroll) = if STEPS == 0 { (self.group / STEP, 1) } else { (STEPS, 4) };
        let bytes = if NIBBLES { STEP * HALF } else { STEP * LANES };
        debug_assert!(codes.len() >= (panel + 1) * (self.k / STEP * bytes) && row + R <= x.rows());
        let (ones, flip, mask) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128), _mm256_set1_epi8(15));
        // SAFETY: the caller's promise.
        let (mut w, mut q, mut common) = unsafe {
            let w = codes.as_ptr().add(panel * (self.k / STEP * bytes));
            (w, x.q.as_ptr().add(row * self.k), x.groups.as_ptr().add(row * groups))
        };
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        for r in 0..R {
            _mm_prefetch::<_MM_HINT_T0>(y.start.wrapping_add(r * y.stride).cast());
        }
        for g in 0..groups {
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            // SAFETY: there are as many codes and numbers as `k` asks for, and as many groups' scales.
            unsafe {
                for line in (0..steps * bytes).step_by(CACHE_LINE) {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + line).cast());
                }
                for _ in 0..steps / unroll {
                    for _ in 0..unroll {
                        let codes = if NIBBLES {
                            let both = _mm256_loadu_si256(w.cast());
                            [_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask)]
                        } else {
                            [0, 1].map(|h| _mm256_xor_si256(_mm256_loadu_si256(w.add(h * STEP * HALF).cast()), flip))
                        };
                        let sizes = if NIBBLES { codes } else { codes.map(|codes| _mm256_abs_epi8(codes)) };
                        unrolled!(r < R, {
                            let x = _mm256_set1_epi32(q.add(r * self.k).cast::<i32>().read_unaligned());
                            unrolled!(h < 2, {
                                sums[r][h] = if NIBBLES {
                                    // Two products are 2 * 15 * 127 at most: those of eight steps fit 16 bits.
                                    _mm256_add_epi16(sums[r][h], _mm256_maddubs_epi16(codes[h], x))
                                } else {
                                    // Without its sign a code is at most 128, a number 127: two products fit 16 bits.
                                    let pairs = _mm256_maddubs_epi16(sizes[h], _mm256_sign_epi8(x, codes[h]));
                                    _mm256_add_epi32(sums[r][h], _mm256_madd_epi16(pairs, ones))
                                };
                                in_order(&mut sums[r][h]);
                            });
                        });
                        (w, q) = (w.add(bytes), q.add(STEP));
                    }
                }
                let scales = self.scales.halves(panel * groups + g);
                let mins = self.mins.as_ref().map(|mins| mins.halves(panel * groups + g));
                unrolled!(r < R, {
                    let common = &*common.add(r * groups);
                    let (scale, total) = (_mm256_set1_ps(common.scale), _mm256_set1_ps(common.total));
                    unrolled!(h < 2, {
                        let sum = if NIBBLES { _mm256_madd_epi16(sums[r][h], ones) } else { sums[r][h] };
                        let product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scales[h]);
                        acc[r][h] = _mm256_fmadd_ps(product, scale, acc[r][h]);
                        if let Some(mins) = mins {
                            acc[r][h] = _mm256_fmadd_ps(mins[h], total, acc[r][h]);
                        }
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
                if self.features(panel) == LANES {
                    for (h, acc) in acc[r].iter().enumerate() {
                        let (start, product) = (y.start.add(h * HALF), _mm256_mul_ps(factor, *acc));
                        let sum = if y.add { _mm256_add_ps(_mm256_loadu_ps(start), product) } else { product };
                        _mm256_storeu_ps(start, sum);
                    }
                } else {
                    let mut sums = [0.0; LANES];
                    acc[r]
                        .iter()
                        .enumerate()
                        .for_each(|(h, acc)| _mm256_storeu_ps(sums[h * HALF..].as_mut_ptr(), *acc));
                    y.put(&sums, self.features(panel), scale);
                }
            }
        });
    }
}
