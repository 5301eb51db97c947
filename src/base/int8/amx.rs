//! [`Weights::multiply`] for AMX.
//!
//! The instruction multiplies a tile of 16 rows of 64 bytes by one of 64 rows of 16, all bytes with a sign, and adds each four
//! products up to 32 bits (Intel's Software Developer's Manual, `TDPBSSD`). A tile takes one group of the weights, whose sums
//! vector instructions then scale.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::{AHEAD, CACHE_LINE, Codes, Lines, Rounded, STEP, Weights, has_vnni};
use crate::base::buffer::Buffer;
use crate::base::simd::{LANES, Target};
use crate::base::tiles::{self, Numbers, ROWS};

/// Fewer rows, or fewer weights that share a scale, are multiplied sooner by vector instructions.
pub const MIN_ROWS: usize = 12;
pub const MIN_GROUP: usize = 32;
/// Rows that stay in a near cache until all panels are multiplied with them.
const NEAR_ROWS: usize = 128;
/// Sums of tiles between the instruction that stores them and those that scale them: so many that these need not wait.
const RING: usize = 4;

/// Bytes of a panel's step: a row of a tile of weights, which has 64.
const STEP_BYTES: usize = STEP * LANES;
const _: () = assert!(STEP_BYTES == tiles::BYTES && LANES == ROWS);

/// Whether the CPU has it and the system lets this process use it.
pub fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| has_vnni() && tiles::multiply(Numbers::Int8))
}

/// The sums of a tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[i32; LANES]; ROWS]);

/// [`unrolled`] for the rows of a tile.
macro_rules! each_row {
    ($r:ident < $n:expr, $body:block) => {
        unrolled!($r < $n, $body, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    };
}

/// Rows that are multiplied with a panel at once.
struct Tile<'a> {
    /// Their numbers, rows of `k`.
    q: &'a [i8],
    /// What the rows of each group have in common, 0 for rows that are not there.
    scales: &'a [[f32; ROWS]],
    totals: &'a [[f32; ROWS]],
    rows: Range<usize>,
    /// Whether the next panel is to be fetched meanwhile.
    next: bool,
}

impl Weights {
    /// # Safety
    /// [`is_there`]; there are such rows, at least one, and panels; `y` is as for [`Self::multiply`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) unsafe fn amx(&self, x: &Rounded, rows: Range<usize>, panels: Range<usize>, scale: f32, y: Target) {
        let near = rows.len().div_ceil(rows.len().div_ceil(NEAR_ROWS));
        for start in rows.clone().step_by(near) {
            // SAFETY: the caller's promise.
            unsafe {
                self.amx_rows(x, start..rows.end.min(start + near), panels.clone(), scale, y.at(start - rows.start, 0))
            };
        }
    }

    /// # Safety
    /// As for [`Self::amx`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn amx_rows(&self, x: &Rounded, rows: Range<usize>, panels: Range<usize>, scale: f32, y: Target) {
        // All tiles have as many rows, so the last one may begin before the one before ends.
        let (tiles, groups) = (rows.len().div_ceil(ROWS), self.k / self.group);
        let height = rows.len().div_ceil(tiles);
        let start = |tile: usize| rows.start + (tile * height).min(rows.len() - height);
        // Sums, numbers of so many rows, weights.
        let shapes = [(height, STEP_BYTES), (height, self.group), (self.group / STEP, STEP_BYTES)];
        // SAFETY: the caller's promise.
        unsafe { tiles::shape(&shapes) };
        let (mut scales, mut totals) = (Buffer::new(tiles * groups * ROWS), Buffer::new(tiles * groups * ROWS));
        let (scales, totals) = (scales.as_chunks_mut::<ROWS>().0, totals.as_chunks_mut::<ROWS>().0);
        for (tile, (scales, totals)) in scales.chunks_mut(groups).zip(totals.chunks_mut(groups)).enumerate() {
            for (g, (scales, totals)) in scales.iter_mut().zip(totals).enumerate() {
                (*scales, *totals) = ([0.0; ROWS], [0.0; ROWS]);
                let common = x.groups[start(tile) * groups + g..].iter().step_by(groups);
                for ((scale, total), common) in scales.iter_mut().zip(totals).zip(common).take(height) {
                    (*scale, *total) = (common.scale, common.total);
                }
            }
        }
        let mut steps = Lines::new(self.k * LANES);
        for p in panels.clone() {
            self.prepare(p, &mut steps);
            for tile in 0..tiles {
                let (first, of_tile) = (start(tile), tile * groups..(tile + 1) * groups);
                let tile = Tile {
                    q: &x.q[first * self.k..][..height * self.k],
                    scales: &scales[of_tile.clone()],
                    totals: &totals[of_tile],
                    // Those before are another tile's too.
                    rows: rows.start + tile * height - first..height,
                    next: tile == 0 && p + 1 < panels.end,
                };
                // SAFETY: the caller's promise.
                unsafe {
                    let y = y.at(first - rows.start, (p - panels.start) * LANES);
                    match (self.mins.is_some(), height > ROWS / 2) {
                        (false, false) => self.amx_tile::<false, { ROWS / 2 }>(&tile, p, &steps, scale, y),
                        (false, true) => self.amx_tile::<false, ROWS>(&tile, p, &steps, scale, y),
                        (true, false) => self.amx_tile::<true, { ROWS / 2 }>(&tile, p, &steps, scale, y),
                        (true, true) => self.amx_tile::<true, ROWS>(&tile, p, &steps, scale, y),
                    }
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { tiles::release() };
    }

    /// For `R` rows or fewer.
    ///
    /// # Safety
    /// [`is_there`], and tiles have the shapes of this one; there are minima or not; `y` is as for [`Self::multiply`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn amx_tile<const MINS: bool, const R: usize>(
        &self,
        tile: &Tile,
        panel: usize,
        steps: &[i8],
        scale: f32,
        y: Target,
    ) {
        let groups = self.k / self.group;
        assert!(tile.rows.end <= R && steps.len() == self.k * LANES && tile.q.len() >= tile.rows.end * self.k);
        assert!(tile.scales.len() == groups && tile.totals.len() == groups);
        let mut ring = [Sums([[0; LANES]; ROWS]); RING];
        let mut acc = [_mm512_setzero_ps(); R];
        for g in 0..groups + RING - 1 {
            if g < groups {
                if tile.next {
                    self.fetch(panel + 1, g);
                }
                // SAFETY: the asserts; the tiles' shapes.
                unsafe {
                    let (q, steps) = (tile.q.as_ptr().add(g * self.group), steps.as_ptr().add(g * self.group * LANES));
                    product(q, self.k, steps, &mut ring[g % RING]);
                }
            }
            let Some(g) = g.checked_sub(RING - 1) else { continue };
            // SAFETY: the asserts; the panel has so many groups.
            unsafe {
                let sums = &ring[g % RING];
                let scales = self.scales.lanes(panel * groups + g);
                let mins = match &self.mins {
                    Some(mins) if MINS => mins.lanes(panel * groups + g),
                    _ => _mm512_setzero_ps(),
                };
                let (of_rows, totals) = (tile.scales.get_unchecked(g), tile.totals.get_unchecked(g));
                each_row!(r < R, {
                    let sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.0[r].as_ptr().cast()));
                    acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(sum, scales), _mm512_set1_ps(of_rows[r]), acc[r]);
                    if MINS {
                        acc[r] = _mm512_fmadd_ps(mins, _mm512_set1_ps(totals[r]), acc[r]);
                    }
                });
            }
        }
        let (factor, features) = (_mm512_set1_ps(scale), self.features(panel));
        let mut sums = [[0.0f32; LANES]; R];
        // SAFETY: the caller's promise.
        unsafe {
            each_row!(r < R, { _mm512_storeu_ps(sums[r].as_mut_ptr(), acc[r]) });
            for r in tile.rows.clone() {
                let y = y.at(r, 0);
                if features < LANES {
                    y.put(&sums[r], features, scale);
                    continue;
                }
                let product = _mm512_mul_ps(factor, _mm512_loadu_ps(sums[r].as_ptr()));
                let sum = if y.add { _mm512_add_ps(_mm512_loadu_ps(y.start), product) } else { product };
                _mm512_storeu_ps(y.start, sum);
            }
        }
    }

    /// Has the codes of a panel's group on their way.
    #[target_feature(enable = "avx512f")]
    fn fetch(&self, panel: usize, group: usize) {
        let (codes, bytes) = match &self.codes {
            Codes::Bytes(codes) => (codes, LANES),
            Codes::Nibbles { codes, .. } => (codes, LANES / 2),
        };
        let first = (panel * self.k + group * self.group) * bytes;
        for line in (first..first + self.group * bytes).step_by(CACHE_LINE) {
            _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(line).cast());
        }
    }

    /// Lays a panel out in bytes with a sign, `[k / STEP][LANES][STEP]`.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn prepare(&self, panel: usize, steps: &mut [i8]) {
        // SAFETY of what follows: loads and stores are of a whole step, which may begin anywhere.
        match &self.codes {
            Codes::Bytes(codes) => {
                // From 0 to 255 to -128 to 127.
                let sign = _mm512_set1_epi8(-128);
                let codes = codes[panel * steps.len()..].as_chunks::<STEP_BYTES>().0;
                for (codes, step) in codes.iter().zip(steps.as_chunks_mut::<STEP_BYTES>().0) {
                    _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
                    unsafe {
                        let codes = _mm512_loadu_si512(codes.as_ptr().cast());
                        _mm512_storeu_si512(step.as_mut_ptr().cast(), _mm512_xor_si512(codes, sign));
                    }
                }
            }
            Codes::Nibbles { codes, zero } => {
                let (mask, zero) = (_mm512_set1_epi8(15), _mm512_set1_epi8(*zero as i8));
                let codes = codes[panel * steps.len() / 2..].as_chunks::<STEP_BYTES>().0;
                for (both, steps) in codes.iter().zip(steps.as_chunks_mut::<{ 2 * STEP_BYTES }>().0) {
                    _mm_prefetch::<_MM_HINT_T0>(both.as_ptr().wrapping_add(AHEAD).cast());
                    unsafe {
                        let both = _mm512_loadu_si512(both.as_ptr().cast());
                        for (i, both) in [both, _mm512_srli_epi16::<4>(both)].into_iter().enumerate() {
                            let step = _mm512_sub_epi8(_mm512_and_si512(both, mask), zero);
                            _mm512_storeu_si512(steps[i * STEP_BYTES..].as_mut_ptr().cast(), step);
                        }
                    }
                }
            }
        }
    }
}

/// Multiplies rows that are `k` bytes apart with a group of weights.
///
/// # Safety
/// [`tiles::shape`] was called; there are as many rows and steps as it was told.
#[inline]
unsafe fn product(q: *const i8, k: usize, steps: *const i8, sums: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm1, [{q} + {k}]",
            "tileloadd tmm2, [{steps} + {line}]",
            "tilezero tmm0",
            "tdpbssd tmm0, tmm1, tmm2",
            "tilestored [{sums} + {line}], tmm0",
            q = in(reg) q,
            k = in(reg) k,
            steps = in(reg) steps,
            sums = in(reg) sums,
            line = in(reg) STEP_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _,
            options(nostack),
        )
    }
}
