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
/// Of so few units, each step of the products is followed by a part of the next weights' laying out, which the processor then
/// works at while it waits for tiles.
const FEW_UNITS: usize = 4;
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
        let is_laid_out = matches!(self.codes, Codes::Nibbles { .. });
        let spread = spread.as_mut_ptr();
        // Where a block's weights are, or will be laid out.
        let weights_of = |block: usize| -> [*const i8; SIDE] {
            let (side, range, _) = place(block);
            std::array::from_fn(|i| match &self.codes {
                Codes::Bytes(codes) => codes[(side[i] * self.k + range.start) * LANES..].as_ptr().cast(),
                Codes::Nibbles { .. } => spread.wrapping_add((block % 2 * SIDE + i) * MAX_CHUNK * LANES).cast_const(),
            })
        };
        // A block's laying out, in parts: a tile of each panel, one after the other.
        let lay_out = |block: usize| {
            let ((side, range, _), ahead, weights) = (place(block), ahead(block), weights_of(block));
            let parts = if is_laid_out && block < blocks { SIDE * range.len() / TILE } else { 0 };
            (0..parts).map(move |part| {
                let (i, step) = (part % SIDE, part / SIDE);
                // SAFETY: there is room for so many tiles, which nobody reads or writes meanwhile.
                let out =
                    unsafe { std::slice::from_raw_parts_mut(weights[i].add(step * PANEL_TILE).cast_mut(), PANEL_TILE) };
                self.lay_out(side[i], range.start + step * TILE, ahead[i], out);
            })
        };
        let units = tiles.div_ceil(2);
        let mut turn = 0;
        lay_out(0).for_each(drop);
        for block in 0..blocks {
            let (side, range, c) = place(block);
            let weights = weights_of(block);
            // Long before it is read: tiles are not loaded from stores that are under way.
            let mut next_parts = lay_out(block + 1);
            if units > FEW_UNITS {
                next_parts.by_ref().for_each(drop);
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
                        _ if is_laid_out && units <= FEW_UNITS => {
                            let tiles = [at(tile), at(tile + unit.count - 1)];
                            zero();
                            for step in 0..steps {
                                let tiles = tiles.map(|tile| tile.add(step * BYTES));
                                let weights = weights.map(|weights| weights.add(step * PANEL_TILE));
                                if unit.count == 1 {
                                    step_of_one(tiles[0], stride, weights)
                                } else {
                                    step_of_two(tiles, stride, weights)
                                }
                                next_parts.by_ref().take(SIDE.div_ceil(units)).for_each(drop);
                            }
                            store(quad);
                        }
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
                    fold(&quads[turn], unit, height, c == 0, acc);
                }
            }
            if let Some(unit) = before {
                fold(&quads[turn ^ 1], unit, height, c == 0, acc);
            }
            // A longer block has more parts than this one has steps.
            next_parts.for_each(drop);
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

    /// Lays out a tile of a panel's weights of 4 bits, from `start` along `k`, in bytes, `[TILE / 4][LANES][4]`; those that are
    /// `ahead` along `k` are fetched.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn lay_out(&self, panel: usize, start: usize, ahead: isize, out: &mut [i8]) {
        let Codes::Nibbles { codes, lines } = &self.codes else { unreachable!("others are laid out as they are") };
        let first = panel * self.k + start;
        let codes = codes[first / 2 * LANES..][..TILE / 2 * LANES].as_chunks::<CACHE_LINE>().0;
        let out = out.as_chunks_mut::<{ 2 * CACHE_LINE }>().0;
        let fetch = |codes: &[u8; CACHE_LINE]| {
            _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_offset(ahead * (LANES / 2) as isize).cast());
        };
        let store = |out: &mut [i8; 2 * CACHE_LINE], steps: [__m512i; 2]| {
            for (i, step) in steps.into_iter().enumerate() {
                // SAFETY: the store is of a line.
                unsafe { _mm512_storeu_si512(out[i * CACHE_LINE..].as_mut_ptr().cast(), step) };
            }
        };
        let Some(lines) = lines else {
            let (mask, zero) = (_mm512_set1_epi8(15), _mm512_set1_epi8(8));
            for (codes, out) in codes.iter().zip(out) {
                fetch(codes);
                // SAFETY: the load is of a line.
                let both = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
                let code = |step| _mm512_sub_epi8(_mm512_and_si512(step, mask), zero);
                store(out, [code(both), code(_mm512_srli_epi16::<4>(both))]);
            }
            return;
        };
        const OF_GROUP: usize = GROUP * LANES / 2 / CACHE_LINE;
        let (codes, out) = (codes.as_chunks::<OF_GROUP>().0, out.as_chunks_mut::<OF_GROUP>().0);
        let lines = &lines[first / GROUP..][..TILE / GROUP];
        let nibbles = Nibbles::new();
        for ((codes, line), out) in codes.iter().zip(lines).zip(out) {
            let next = line.as_ptr().wrapping_offset(ahead / GROUP as isize * 2 * LANES as isize);
            _mm_prefetch::<_MM_HINT_T0>(next.cast());
            let line = nibbles.line(line);
            for (codes, out) in codes.iter().zip(out) {
                fetch(codes);
                store(out, nibbles.bytes(codes, line));
            }
        }
    }
}

/// Adds a unit's sums to `acc`, `[tiles][height]`, which means nothing before the first of them.
#[target_feature(enable = "avx512f")]
fn fold(quad: &Quad, unit: Unit, height: usize, is_first: bool, acc: &mut [Acc]) {
    let acc = &mut acc[unit.tile * height..][..unit.count * height];
    match is_first {
        true => fold_to::<true>(quad, unit, height, acc),
        false => fold_to::<false>(quad, unit, height, acc),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn fold_to<const FIRST: bool>(quad: &Quad, unit: Unit, height: usize, acc: &mut [Acc]) {
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
                    let before = if FIRST { _mm512_setzero_ps() } else { _mm512_loadu_ps(acc) };
                    _mm512_storeu_ps(acc, _mm512_fmadd_ps(sum, scales[side], before));
                }
            }
        }
    }
}

/// Makes the sums of a unit 0. Between this and [`store`] they are in tiles 0 to 3, which nothing else uses: the compiler knows
/// of no tiles.
///
/// # Safety
/// [`tiles::shape`] was called.
#[inline]
unsafe fn zero() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem)) }
}

/// Adds the products of a tile of lines, `stride` apart, with one of each panel.
///
/// # Safety
/// After [`zero`]; there are such lines and tiles.
#[inline]
unsafe fn step_of_one(lines: *const i8, stride: usize, weights: [*const i8; SIDE]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm4, [{lines} + {stride}]",
            "tileloadd tmm6, [{first} + {line}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{second} + {line}]",
            "tdpbssd tmm1, tmm4, tmm7",
            lines = in(reg) lines,
            stride = in(reg) stride,
            first = in(reg) weights[0],
            second = in(reg) weights[1],
            line = in(reg) BYTES,
            options(nostack, readonly),
        )
    }
}

/// The same for two tiles of lines.
///
/// # Safety
/// As for one.
#[inline]
unsafe fn step_of_two(lines: [*const i8; 2], stride: usize, weights: [*const i8; SIDE]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm4, [{upper} + {stride}]",
            "tileloadd tmm6, [{first} + {line}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{second} + {line}]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{lower} + {stride}]",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            upper = in(reg) lines[0],
            lower = in(reg) lines[1],
            stride = in(reg) stride,
            first = in(reg) weights[0],
            second = in(reg) weights[1],
            line = in(reg) BYTES,
            options(nostack, readonly),
        )
    }
}

/// Stores the sums of a unit.
///
/// # Safety
/// After [`zero`].
#[inline]
unsafe fn store(quad: &mut Quad) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + {tile}], tmm1",
            "tilestored [{sums} + {line} + 2 * {tile}], tmm2",
            "tilestored [{sums} + {line} + 3 * {tile}], tmm3",
            sums = in(reg) quad,
            line = in(reg) BYTES,
            tile = const PANEL_TILE,
            options(nostack),
        )
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
