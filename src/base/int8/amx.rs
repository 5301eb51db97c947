//! [`Weights::multiply`] for AMX.
//!
//! The instruction multiplies a tile of 16 rows of 64 bytes by one of 64 rows of 16, all bytes with a sign, and adds each four
//! products up to 32 bits (Intel's Software Developer's Manual, `TDPBSSD`). A tile takes one group of the weights, whose sums
//! vector instructions then scale.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::{AHEAD, CACHE_LINE, Codes, Rounded, RowGroup, STEP, Weights, has_vnni};
use crate::base::simd::{LANES, Target};
use crate::base::tiles::{self, Numbers, ROWS};

/// Groups whose sums are made before they are scaled: tiles and vectors take turns, since a vector that waits for the sums of
/// a tile keeps the next tile waiting too. So many stay in the nearest cache.
const CHUNK: usize = 12;
/// Fewer rows, or fewer weights that share a scale, are multiplied sooner by vector instructions.
pub const MIN_ROWS: usize = 12;
pub const MIN_GROUP: usize = 32;

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

/// A step of a panel, a byte with a sign for each number.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Step([u8; STEP_BYTES]);

/// Rows that are multiplied with a panel at once.
struct Tile<'a> {
    /// Of [`Rounded::q`] and [`Rounded::groups`], what belongs to the first row and those after it.
    q: &'a [i8],
    groups: &'a [RowGroup],
    rows: usize,
    /// Of these, how many at the beginning are another tile's too.
    done: usize,
    /// Whether the next panel is to be fetched meanwhile.
    next: bool,
}

/// Room for a panel and for the sums of a tile.
struct Room {
    steps: Vec<Step>,
    sums: [Sums; CHUNK],
}

impl Weights {
    /// # Safety
    /// [`is_there`]; there are such rows, at least one, and panels; `y` is as for [`Self::multiply`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) unsafe fn amx(&self, x: &Rounded, rows: Range<usize>, panels: Range<usize>, scale: f32, y: Target) {
        // All tiles have as many rows, so the last one may begin before the one before ends.
        let tiles = rows.len().div_ceil(ROWS);
        let height = rows.len().div_ceil(tiles);
        // Sums, numbers of so many rows, weights.
        let shapes = [(height, STEP_BYTES), (height, self.group), (self.group / STEP, STEP_BYTES)];
        // SAFETY: the caller's promise.
        unsafe { tiles::shape(&shapes) };
        let steps = vec![Step([0; STEP_BYTES]); self.k / STEP];
        let mut room = Room { steps, sums: [Sums([[0; LANES]; ROWS]); CHUNK] };
        for p in panels.clone() {
            self.prepare(p, &mut room.steps);
            for i in 0..tiles {
                let next = rows.start + i * height;
                let row = next.min(rows.end - height);
                let (q, groups) = (&x.q[row * self.k..], &x.groups[row * x.groups_per_row..]);
                let tile = Tile { q, groups, rows: height, done: next - row, next: i == 0 && p + 1 < panels.end };
                // SAFETY: the caller's promise.
                unsafe {
                    let y = y.at(row - rows.start, (p - panels.start) * LANES);
                    match self.mins {
                        None => self.amx_tile::<false>(&tile, p, &mut room, scale, y),
                        Some(_) => self.amx_tile::<true>(&tile, p, &mut room, scale, y),
                    }
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { tiles::release() };
    }

    /// # Safety
    /// [`is_there`], and tiles have the shapes of this one; there are minima or not; `y` is as for [`Self::multiply`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn amx_tile<const MINS: bool>(&self, tile: &Tile, panel: usize, room: &mut Room, scale: f32, y: Target) {
        let groups = self.k / self.group;
        assert!(tile.rows <= ROWS && room.steps.len() * STEP == self.k);
        assert!(tile.q.len() >= tile.rows * self.k && tile.groups.len() >= tile.rows * groups);
        let mut acc = [_mm512_setzero_ps(); ROWS];
        for first in (0..groups).step_by(CHUNK) {
            let chunk = first..groups.min(first + CHUNK);
            for (g, sums) in chunk.clone().zip(&mut room.sums) {
                if tile.next {
                    self.fetch(panel + 1, g);
                }
                // SAFETY: the asserts; the tiles' shapes.
                unsafe {
                    let steps = room.steps.as_ptr().add(g * self.group / STEP);
                    product(tile.q.as_ptr().add(g * self.group), self.k, steps, sums);
                }
            }
            let mut row = tile.done;
            while row < tile.rows {
                let sums = &room.sums[..chunk.len()];
                // SAFETY: the asserts; the panel has so many groups.
                row += unsafe {
                    match tile.rows - row {
                        8.. => self.scaled::<MINS, 8>(sums, tile, row, panel, first, &mut acc),
                        4.. => self.scaled::<MINS, 4>(sums, tile, row, panel, first, &mut acc),
                        2.. => self.scaled::<MINS, 2>(sums, tile, row, panel, first, &mut acc),
                        _ => self.scaled::<MINS, 1>(sums, tile, row, panel, first, &mut acc),
                    }
                };
            }
        }
        for (r, acc) in acc[..tile.rows].iter().enumerate().skip(tile.done) {
            let mut sums = [0.0f32; LANES];
            // SAFETY: the caller's promise.
            unsafe {
                _mm512_storeu_ps(sums.as_mut_ptr(), *acc);
                y.at(r, 0).put(&sums, self.features(panel), scale);
            }
        }
    }

    /// Adds the sums of groups from `first` on, scaled, to `R` rows from `row` on, and returns `R`.
    ///
    /// # Safety
    /// There are such rows and groups.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn scaled<const MINS: bool, const R: usize>(
        &self,
        sums: &[Sums],
        tile: &Tile,
        row: usize,
        panel: usize,
        first: usize,
        out: &mut [__m512; ROWS],
    ) -> usize {
        let groups = self.k / self.group;
        let mut acc: [__m512; R] = std::array::from_fn(|r| out[row + r]);
        // SAFETY: the caller's promise.
        unsafe {
            let mut common = tile.groups.as_ptr().add(row * groups + first);
            for (g, sums) in sums.iter().enumerate() {
                let index = panel * groups + first + g;
                let scales = self.scales.lanes(index);
                let mins = if MINS && let Some(mins) = &self.mins { mins.lanes(index) } else { _mm512_setzero_ps() };
                unrolled!(r < R, {
                    let common = &*common.add(r * groups);
                    let sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.0[row + r].as_ptr().cast()));
                    acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(sum, scales), _mm512_set1_ps(common.scale), acc[r]);
                    if MINS {
                        acc[r] = _mm512_fmadd_ps(mins, _mm512_set1_ps(common.total), acc[r]);
                    }
                });
                common = common.add(1);
            }
        }
        out[row..row + R].copy_from_slice(&acc);
        R
    }

    /// Has the codes of a panel's group on their way.
    #[target_feature(enable = "avx512f")]
    fn fetch(&self, panel: usize, group: usize) {
        let (codes, bytes) = match &self.codes {
            Codes::Bytes(codes) => (codes, LANES),
            Codes::Nibbles(codes) => (codes, LANES / 2),
        };
        let first = (panel * self.k + group * self.group) * bytes;
        for line in (first..first + self.group * bytes).step_by(CACHE_LINE) {
            _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(line).cast());
        }
    }

    /// Lays a panel out in bytes with a sign.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn prepare(&self, panel: usize, steps: &mut [Step]) {
        let all = panel * steps.len()..(panel + 1) * steps.len();
        // SAFETY of what follows: loads and stores are of a whole step.
        match &self.codes {
            Codes::Bytes(codes) => {
                // From 0 to 255 to -128 to 127.
                let sign = _mm512_set1_epi8(-128);
                for (codes, step) in codes.as_chunks::<STEP_BYTES>().0[all].iter().zip(steps) {
                    _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
                    unsafe {
                        let codes = _mm512_loadu_si512(codes.as_ptr().cast());
                        _mm512_store_si512(step.0.as_mut_ptr().cast(), _mm512_xor_si512(codes, sign));
                    }
                }
            }
            Codes::Nibbles(codes) => {
                let mask = _mm256_set1_epi8(15);
                for (codes, step) in codes.as_chunks::<{ STEP_BYTES / 2 }>().0[all].iter().zip(steps) {
                    _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
                    unsafe {
                        let both = _mm256_loadu_si256(codes.as_ptr().cast());
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask);
                        let low = _mm512_castsi256_si512(_mm256_and_si256(both, mask));
                        _mm512_store_si512(step.0.as_mut_ptr().cast(), _mm512_inserti64x4::<1>(low, high));
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
unsafe fn product(q: *const i8, k: usize, steps: *const Step, sums: &mut Sums) {
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
