//! [`Weights::multiply`] for one row, by VNNI: weights are multiplied in the registers where they become bytes, without
//! tiles.

use std::arch::x86_64::*;
use std::ops::Range;

use super::nibbles::Nibbles;
use super::{Codes, GROUP, LOW, Planes, Weights, chunk};
use crate::base::int8::CACHE_LINE;
use crate::base::simd::{Ahead, LANES, Target};

/// Bytes of codes that are fetched ahead; panels follow each other.
const AHEAD: usize = 2048;
/// Weights of a feature that an instruction multiplies.
const STEP: usize = 4;
/// Lines of codes of 4 bits in a group.
const LINES: usize = GROUP * LANES / 2 / CACHE_LINE;

impl Weights {
    /// For one row.
    ///
    /// # Safety
    /// The CPU has avx512f, avx512bw and avx512vnni; there are such a row and panels; `y` is as for [`Self::multiply`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn vnni(
        &self,
        x: &Planes,
        row: usize,
        panels: Range<usize>,
        mut ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        let (chunk, chunks) = (chunk(self.k), self.chunks());
        let planes: [&[i8]; 2] = x.row(row).into();
        // What weights have too much counts once for each number of the row.
        let zero = if let Codes::Nibbles { lines: None, .. } = self.codes { 8 } else { 128 };
        let excess = |c: usize| -> i32 {
            let range = c * chunk..self.k.min((c + 1) * chunk);
            let [high, low] = planes.map(|plane| plane[range.clone()].iter().map(|&x| i32::from(x)).sum::<i32>());
            zero * ((high << LOW) + low)
        };
        let excess: Vec<i32> = (0..chunks).map(excess).collect();
        let nibbles = Nibbles::new();
        for panel in panels.clone() {
            let mut acc = _mm512_setzero_ps();
            for (c, excess) in excess.iter().enumerate() {
                let range = c * chunk..self.k.min((c + 1) * chunk);
                // Of the planes, each in two parts so that additions need not wait for each other.
                let mut sums = [[_mm512_setzero_si512(); 2]; 2];
                // The products of weights from `k` on.
                let mut add = |bytes: __m512i, k: usize, part: usize| {
                    for (sums, plane) in sums.iter_mut().zip(planes) {
                        // SAFETY: planes are of `self.k` numbers, a multiple of a step's.
                        let x = unsafe { plane.as_ptr().add(k).cast::<i32>().read_unaligned() };
                        sums[part] = _mm512_dpbusd_epi32(sums[part], bytes, _mm512_set1_epi32(x));
                    }
                };
                match &self.codes {
                    Codes::Bytes(codes) => {
                        let codes = &codes[(panel * self.k + range.start) * LANES..][..range.len() * LANES];
                        let sign = _mm512_set1_epi8(-128);
                        let pairs = codes.as_chunks::<CACHE_LINE>().0.as_chunks::<2>().0;
                        for (i, pair) in pairs.iter().enumerate() {
                            for (part, codes) in pair.iter().enumerate() {
                                _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
                                ahead.fetch(1);
                                // SAFETY: the load is of the array.
                                let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
                                add(_mm512_xor_si512(codes, sign), range.start + (2 * i + part) * STEP, part);
                            }
                        }
                    }
                    Codes::Nibbles { codes, lines: None } => {
                        let place = (panel * self.k + range.start) / 2;
                        let codes = codes[place * LANES..][..range.len() / 2 * LANES].as_chunks::<CACHE_LINE>().0;
                        let mask = _mm512_set1_epi8(15);
                        for (i, codes) in codes.iter().enumerate() {
                            ahead.fetch(1);
                            // SAFETY: the load is of the array.
                            let both = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
                            let k = range.start + 2 * i * STEP;
                            add(_mm512_and_si512(both, mask), k, 0);
                            add(_mm512_and_si512(_mm512_srli_epi16::<4>(both), mask), k + STEP, 1);
                        }
                    }
                    Codes::Nibbles { codes, lines: Some(lines) } => {
                        let place = panel * self.k + range.start;
                        let codes = &codes[place / 2 * LANES..][..range.len() / 2 * LANES];
                        let codes = codes.as_chunks::<CACHE_LINE>().0.as_chunks::<LINES>().0;
                        let lines = &lines[place / GROUP..][..range.len() / GROUP];
                        for (g, (codes, line)) in codes.iter().zip(lines).enumerate() {
                            _mm_prefetch::<_MM_HINT_T0>(
                                line.as_ptr().wrapping_add(AHEAD / (LINES * CACHE_LINE) * 2 * LANES).cast(),
                            );
                            let line = nibbles.line(line).unsigned();
                            for (i, codes) in codes.iter().enumerate() {
                                _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
                                let k = range.start + g * GROUP + 2 * i * STEP;
                                let [low, high] = nibbles.bytes(codes, line);
                                add(low, k, 0);
                                add(high, k + STEP, 1);
                            }
                        }
                    }
                }
                // SAFETY: the load is of the array.
                let scales = unsafe { _mm512_loadu_ps(self.scales[panel * chunks + c].as_ptr()) };
                let [high, low] = sums.map(|[a, b]| _mm512_add_epi32(a, b));
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<{ LOW }>(high), low);
                let sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(*excess));
                acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales, acc);
            }
            let mut sums = [0.0; LANES];
            // SAFETY: the store is of the array; the caller's promise.
            unsafe {
                _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_mul_ps(acc, _mm512_set1_ps(x.scales[row])));
                y.at(0, (panel - panels.start) * LANES).put(&sums, self.features(panel), scale);
            }
        }
    }
}
