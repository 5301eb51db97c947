//! [`Weights::multiply`] for AMX.
//!
//! The instruction multiplies a tile of 16 rows of 64 bytes by one of 64 rows of 16, all bytes with a sign, and adds each four
//! products up to 32 bits (Intel's Software Developer's Manual, `TDPBSSD`). The 16 rows are both planes of 8 rows. Two such
//! tiles are multiplied with two panels at once, so that each tile that is loaded takes part in two products.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::nibbles::Nibbles;
use super::{Codes, GROUP, LOW, MAX_CHUNK, Planes, SIDE, TILE, Weights, chunk};
use crate::base::buffer::Buffer;
use crate::base::int8::{CACHE_LINE, Lines};
use crate::base::simd::{LANES, Target};
use crate::base::tiles::{self, BYTES, Numbers, ROWS};

/// Rows of activations that a tile takes.
const HEIGHT: usize = ROWS / 2;
/// Of more tiles, each fetches a part of the weights that are multiplied next; of fewer, the first ones fetch all of them.
const FEW_TILES: usize = 16;
/// Rows whose sums stay in a near cache until they are whole.
const NEAR_ROWS: usize = 256;
/// Bytes of a tile of weights.
const PANEL_TILE: usize = TILE * LANES;
const _: () = assert!(TILE == BYTES && LANES == ROWS && PANEL_TILE == ROWS * BYTES);

/// Whether the CPU has it, and VNNI for one row, and the system lets this process use it.
pub fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| {
        is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && tiles::multiply(Numbers::Int8)
    })
}

/// The sums of a tile: a row of the upper plane's, then of the lower one's, and so on.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[[i32; LANES]; 2]; HEIGHT]);

/// Of two tiles of rows with two panels.
type Quad = [[Sums; SIDE]; 2];

/// The sums so far of two panels' features for a row.
type Acc = [[f32; LANES]; SIDE];

/// Tiles of rows that are multiplied at once, and where.
#[derive(Clone, Copy)]
struct Unit<'a> {
    /// The first one, and how many: 1 or 2.
    tile: usize,
    count: usize,
    /// Where the chunk's scales of each panel are.
    scales: [&'a [f32; LANES]; SIDE],
}

/// Where weights of each panel are in memory.
type Next = [*const i8; SIDE];

/// Weights that a unit's products fetch meanwhile: bunched, the processor would have no place for them all.
enum Fetch {
    Nothing,
    /// A line of each panel for every step.
    Lines(Next),
    /// As many as it multiplies.
    All(Next),
}

impl Weights {
    /// # Safety
    /// [`is_there`]; there are such rows and panels; `y` is as for [`Self::multiply`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn amx(&self, x: &Planes, rows: Range<usize>, panels: Range<usize>, scale: f32, y: Target) {
        if rows.is_empty() {
            return;
        }
        let near = rows.len().div_ceil(rows.len().div_ceil(NEAR_ROWS));
        for start in rows.clone().step_by(near) {
            // SAFETY: the caller's promise.
            unsafe {
                self.amx_rows(x, start..rows.end.min(start + near), panels.clone(), scale, y.at(start - rows.start, 0))
            };
        }
    }

    /// For rows of which there is at least one.
    ///
    /// # Safety
    /// As for [`Self::amx`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn amx_rows(&self, x: &Planes, rows: Range<usize>, panels: Range<usize>, scale: f32, y: Target) {
        // All tiles have as many rows, so the last one may begin before the one before ends.
        let tiles = rows.len().div_ceil(HEIGHT);
        let height = rows.len().div_ceil(tiles);
        let start = |tile: usize| rows.start + (tile * height).min(rows.len() - height);
        let (lines, weights) = ((2 * height, BYTES), (ROWS, BYTES));
        // SAFETY: the caller's promise.
        unsafe { tiles::shape(&[lines, lines, lines, lines, lines, lines, weights, weights]) };
        let (chunk, chunks) = (chunk(self.k), self.chunks());
        // Two chunks of two panels: one may still be read while the next is written.
        let mut spread = Lines::new(2 * SIDE * MAX_CHUNK * LANES);
        let mut acc = Buffer::new(tiles * height * SIDE * LANES);
        let acc: &mut [Acc] = acc.as_chunks_mut::<LANES>().0.as_chunks_mut::<SIDE>().0;
        let mut quads = [[[Sums([[[0; LANES]; 2]; HEIGHT]); SIDE]; 2]; 2];
        // Two panels' chunks, one after the other.
        let (blocks, all) = (panels.len().div_ceil(SIDE) * chunks, self.n.div_ceil(LANES));
        let place = |block: usize| {
            let (p, c) = (panels.start + block / chunks * SIDE, block % chunks);
            // The last of an odd number is multiplied twice. Beyond the last is what this thread may be given next.
            let end = if block < blocks { panels.end } else { all };
            ([p, p + 1].map(|p| p.min(end - 1)), c * chunk..self.k.min((c + 1) * chunk), c)
        };
        // Weights from a block's to those of the next one.
        let ahead = |block: usize| -> [isize; SIDE] {
            let first = |(side, range, _): ([usize; SIDE], Range<usize>, usize)| side.map(|p| p * self.k + range.start);
            let (these, next) = (first(place(block)), first(place(block + 1)));
            std::array::from_fn(|i| next[i] as isize - these[i] as isize)
        };
        let mut lay_out = |block: usize| {
            let ((side, range, _), ahead) = (place(block), ahead(block));
            let mut weights = [std::ptr::null::<i8>(); SIDE];
            for (i, weights) in weights.iter_mut().enumerate() {
                let out = &mut spread[(block % 2 * SIDE + i) * MAX_CHUNK * LANES..][..range.len() * LANES];
                *weights = self.laid_out(side[i], range.clone(), ahead[i], out);
            }
            weights
        };
        let mut turn = 0;
        let mut laid_out = lay_out(0);
        for block in 0..blocks {
            let (side, range, c) = place(block);
            // Before it is read: tiles are not loaded from stores that are under way.
            let weights = laid_out;
            if block + 1 < blocks {
                laid_out = lay_out(block + 1);
            }
            if c == 0 {
                acc.as_flattened_mut().as_flattened_mut().fill(0.0);
            }
            let scales = side.map(|panel| &self.scales[panel * chunks + c]);
            let next: Option<Next> = matches!(self.codes, Codes::Bytes(_)).then(|| {
                let ahead = ahead(block);
                std::array::from_fn(|i| weights[i].wrapping_offset(ahead[i] * LANES as isize))
            });
            let steps = range.len() / TILE;
            let fetch = |tile: usize| match next {
                None => Fetch::Nothing,
                Some(next) if tiles > FEW_TILES => {
                    Fetch::Lines(next.map(|weights| weights.wrapping_add(tile / 2 * steps * CACHE_LINE)))
                }
                Some(next) if tile == 0 => Fetch::All(next),
                Some(_) => Fetch::Nothing,
            };
            let mut before: Option<Unit> = None;
            for tile in (0..tiles).step_by(2) {
                let unit = Unit { tile, count: (tiles - tile).min(2), scales };
                let at = |tile: usize| {
                    let line = 2 * start(tile) * x.stride + range.start;
                    x.lines[line..][..(2 * height - 1) * x.stride + range.len()].as_ptr()
                };
                // SAFETY: there are such lines and weights; the tiles' shapes.
                unsafe {
                    let (quad, stride) = (&mut quads[turn], x.stride);
                    match (unit.count, fetch(tile)) {
                        (1, Fetch::Nothing) => one(at(tile), stride, weights, weights, steps, quad),
                        (1, Fetch::Lines(next)) => one_and_lines(at(tile), stride, weights, next, steps, quad),
                        (1, Fetch::All(next)) => one_and_all(at(tile), stride, weights, next, steps, quad),
                        (_, fetch) => {
                            let tiles = [at(tile), at(tile + 1)];
                            match fetch {
                                Fetch::Nothing => two(tiles, stride, weights, weights, steps, quad),
                                Fetch::Lines(next) => two_and_lines(tiles, stride, weights, next, steps, quad),
                                Fetch::All(next) => two_and_all(tiles, stride, weights, next, steps, quad),
                            }
                        }
                    }
                }
                // Those before, so that the processor need not wait for these.
                turn ^= 1;
                if let Some(unit) = before.replace(unit) {
                    fold(&quads[turn], unit, height, acc);
                }
            }
            if let Some(unit) = before {
                fold(&quads[turn ^ 1], unit, height, acc);
            }
            if c + 1 < chunks {
                continue;
            }
            let p = side[0];
            for tile in 0..tiles {
                let first = start(tile);
                // Those before are another tile's too.
                for row in rows.start + tile * height - first..height {
                    let factor = x.scales[first + row];
                    for (&panel, acc) in side.iter().zip(&acc[tile * height + row]).take(panels.end - p) {
                        // SAFETY: the caller's promise.
                        unsafe {
                            let y = y.at(first + row - rows.start, (panel - panels.start) * LANES);
                            let sums = _mm512_mul_ps(_mm512_loadu_ps(acc.as_ptr()), _mm512_set1_ps(factor));
                            let features = self.features(panel);
                            if features < LANES {
                                let mut acc = [0.0; LANES];
                                _mm512_storeu_ps(acc.as_mut_ptr(), sums);
                                y.put(&acc, features, scale);
                                continue;
                            }
                            let product = _mm512_mul_ps(_mm512_set1_ps(scale), sums);
                            let sum = if y.add { _mm512_add_ps(_mm512_loadu_ps(y.start), product) } else { product };
                            _mm512_storeu_ps(y.start, sum);
                        }
                    }
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { tiles::release() };
    }

    /// Weights of a panel in bytes, `[len / 4][LANES][4]`: where they are, or laid out in `out`; then those that are `ahead`
    /// along `k` are fetched.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn laid_out(&self, panel: usize, range: Range<usize>, ahead: isize, out: &mut [i8]) -> *const i8 {
        match &self.codes {
            Codes::Bytes(codes) => {
                codes[(panel * self.k + range.start) * LANES..][..range.len() * LANES].as_ptr().cast()
            }
            Codes::Nibbles { codes, lines: None } => {
                let first = (panel * self.k + range.start) / 2 * LANES;
                let codes = codes[first..][..range.len() / 2 * LANES].as_chunks::<CACHE_LINE>().0;
                let bytes = out.as_ptr();
                let (mask, zero) = (_mm512_set1_epi8(15), _mm512_set1_epi8(8));
                for (codes, out) in codes.iter().zip(out.as_chunks_mut::<{ 2 * CACHE_LINE }>().0) {
                    _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_offset(ahead * (LANES / 2) as isize).cast());
                    // SAFETY: loads and stores are of 64 bytes each.
                    unsafe {
                        let both = _mm512_loadu_si512(codes.as_ptr().cast());
                        for (i, both) in [both, _mm512_srli_epi16::<4>(both)].into_iter().enumerate() {
                            let step = _mm512_sub_epi8(_mm512_and_si512(both, mask), zero);
                            _mm512_storeu_si512(out[i * CACHE_LINE..].as_mut_ptr().cast(), step);
                        }
                    }
                }
                bytes
            }
            Codes::Nibbles { codes, lines: Some(lines) } => {
                let first = panel * self.k + range.start;
                let codes = codes[first / 2 * LANES..][..range.len() / 2 * LANES].as_chunks::<CACHE_LINE>().0;
                let codes = codes.as_chunks::<{ GROUP * LANES / 2 / CACHE_LINE }>().0;
                let bytes = out.as_ptr();
                let out = out.as_chunks_mut::<{ 2 * CACHE_LINE }>().0;
                let out = out.as_chunks_mut::<{ GROUP * LANES / 2 / CACHE_LINE }>().0;
                let lines = &lines[first / GROUP..][..range.len() / GROUP];
                let nibbles = Nibbles::new();
                for ((codes, line), out) in codes.iter().zip(lines).zip(out) {
                    _mm_prefetch::<_MM_HINT_T0>(
                        (line as *const [i16; 2 * LANES]).cast::<i8>().wrapping_offset(ahead / GROUP as isize * 64),
                    );
                    let line = nibbles.line(line);
                    for (codes, out) in codes.iter().zip(out) {
                        _mm_prefetch::<_MM_HINT_T0>(
                            codes.as_ptr().wrapping_offset(ahead * (LANES / 2) as isize).cast(),
                        );
                        let [low, high] = nibbles.bytes(codes, line);
                        // SAFETY: the stores are of 64 bytes each.
                        unsafe {
                            _mm512_storeu_si512(out.as_mut_ptr().cast(), low);
                            _mm512_storeu_si512(out[CACHE_LINE..].as_mut_ptr().cast(), high);
                        }
                    }
                }
                bytes
            }
        }
    }
}

/// Adds a unit's sums to `acc`, `[tiles][height]`.
#[target_feature(enable = "avx512f")]
fn fold(quad: &Quad, unit: Unit, height: usize, acc: &mut [Acc]) {
    let acc = &mut acc[unit.tile * height..][..unit.count * height];
    for (sums, acc) in quad.iter().zip(acc.chunks_exact_mut(height)) {
        // SAFETY: loads and stores are of LANES numbers.
        unsafe {
            let scales = unit.scales.map(|scales| _mm512_loadu_ps(scales.as_ptr()));
            for (r, acc) in acc.iter_mut().enumerate() {
                for side in 0..SIDE {
                    let [high, low] = &sums[side].0[r];
                    let high = _mm512_slli_epi32::<{ LOW }>(_mm512_load_si512(high.as_ptr().cast()));
                    let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(high, _mm512_load_si512(low.as_ptr().cast())));
                    let acc = acc[side].as_mut_ptr();
                    _mm512_storeu_ps(acc, _mm512_fmadd_ps(sum, scales[side], _mm512_loadu_ps(acc)));
                }
            }
        }
    }
}

/// The products of a unit. After each step of [`TILE`] weights comes `$fetch`, and what it fetches moves on by `$advance` bytes.
macro_rules! products {
    ($one:ident, $two:ident, $advance:expr $(, $fetch:literal)*) => {
        /// The sums of a tile of lines, `stride` apart, and two panels.
        ///
        /// # Safety
        /// [`tiles::shape`] was called for these; there are as many lines, and steps of 64 bytes of them and of tiles of
        /// weights.
        #[inline]
        unsafe fn $one(
            lines: *const i8,
            stride: usize,
            weights: [*const i8; SIDE],
            next: Next,
            steps: usize,
            quad: &mut Quad,
        ) {
            // SAFETY: the caller's promise; what is not there is not fetched.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    "tileloadd tmm4, [{lines} + {stride}]",
                    "tileloadd tmm6, [{first} + {line}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{second} + {line}]",
                    "tdpbssd tmm1, tmm4, tmm7",
                    $($fetch,)*
                    "add {lines}, {line}",
                    "add {first}, {tile}",
                    "add {second}, {tile}",
                    "add {first_next}, {advance}",
                    "add {second_next}, {advance}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {line}], tmm0",
                    "tilestored [{sums} + {line} + {tile}], tmm1",
                    lines = inout(reg) lines => _,
                    stride = in(reg) stride,
                    first = inout(reg) weights[0] => _,
                    second = inout(reg) weights[1] => _,
                    first_next = inout(reg) next[0] => _,
                    second_next = inout(reg) next[1] => _,
                    steps = inout(reg) steps => _,
                    sums = in(reg) quad,
                    line = in(reg) BYTES,
                    tile = const PANEL_TILE,
                    advance = const $advance,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            }
        }

        /// The same for two tiles of lines.
        ///
        /// # Safety
        /// As for one.
        #[inline]
        unsafe fn $two(
            lines: [*const i8; 2],
            stride: usize,
            weights: [*const i8; SIDE],
            next: Next,
            steps: usize,
            quad: &mut Quad,
        ) {
            // SAFETY: as above.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm4, [{upper} + {stride}]",
                    "tileloadd tmm6, [{first} + {line}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{second} + {line}]",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{lower} + {stride}]",
                    "tdpbssd tmm2, tmm5, tmm6",
                    "tdpbssd tmm3, tmm5, tmm7",
                    $($fetch,)*
                    "add {upper}, {line}",
                    "add {lower}, {line}",
                    "add {first}, {tile}",
                    "add {second}, {tile}",
                    "add {first_next}, {advance}",
                    "add {second_next}, {advance}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {line}], tmm0",
                    "tilestored [{sums} + {line} + {tile}], tmm1",
                    "tilestored [{sums} + {line} + 2 * {tile}], tmm2",
                    "tilestored [{sums} + {line} + 3 * {tile}], tmm3",
                    upper = inout(reg) lines[0] => _,
                    lower = inout(reg) lines[1] => _,
                    stride = in(reg) stride,
                    first = inout(reg) weights[0] => _,
                    second = inout(reg) weights[1] => _,
                    first_next = inout(reg) next[0] => _,
                    second_next = inout(reg) next[1] => _,
                    steps = inout(reg) steps => _,
                    sums = in(reg) quad,
                    line = in(reg) BYTES,
                    tile = const PANEL_TILE,
                    advance = const $advance,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            }
        }
    };
}

products!(one, two, 0);
products!(one_and_lines, two_and_lines, CACHE_LINE, "prefetcht0 [{first_next}]", "prefetcht0 [{second_next}]");
products!(
    one_and_all,
    two_and_all,
    PANEL_TILE,
    ".irp place, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960",
    "prefetcht1 [{first_next} + \\place]",
    "prefetcht1 [{second_next} + \\place]",
    ".endr"
);
