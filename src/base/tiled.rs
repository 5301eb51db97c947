//! Products in whole numbers for CPUs with AMX: weights of 8 bits, activations of 15.
//!
//! A tile adds up the products of a [`chunk`] of weights before anything has to be scaled, and its weights share a scale;
//! [`super::int8`]'s groups, of which one is half a tile, would leave most of the time to the scaling. Weights that a file
//! holds in 4 bits stay 4 bits in memory, and become 8 where they are multiplied: `(q * slope + offset) >> 8`, the slope and
//! the offset in place of their own scale and minimum.
//!
//! So few scales would not do for activations of 8 bits, whose outliers spoil the numbers that share theirs: they have 15, in
//! two planes of 8, one scale for a row. All sums are exact, so a row's result does not depend on the rows beside it.

use std::ops::Range;

use super::buffer::Buffer;
use super::int8::{Lines, in_steps, nibble, nibble_scale, nibbles, per_group, whole};
use super::parallel;
use super::simd::{Ahead, LANES, Simd, Target, place};
use crate::large_pages::{Large, collected};

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod nibbles;
#[cfg(target_arch = "x86_64")]
mod vnni;

/// Weights along `k` that a tile takes.
const TILE: usize = 64;
/// Panels that are multiplied side by side.
pub const SIDE: usize = 2;
/// Most weights that share a scale: the more, the fewer sums have to be scaled. Those of the largest numbers fit 32 bits.
const MAX_CHUNK: usize = 9 * TILE;
const _: () = assert!((127 << LOW) * 128 * MAX_CHUNK < 1 << 31);
/// Weights of 4 bits that share a slope and an offset.
const GROUP: usize = 32;
/// Largest whole number of a weight: where it falls with rounded slopes and offsets, it still fits 8 bits.
const MAX_CODE: f32 = 120.0;
/// Bits of a slope and an offset behind the point.
const FRACTION: u32 = 8;
/// Bits of the lower plane.
const LOW: u32 = 7;
/// Largest whole number of an activation: `127 << LOW`, so that its upper plane fits 8 bits with a sign.
const MAX_NUMBER: f32 = 16256.0;

/// Whether products are quickest so on this CPU.
pub fn is_there() -> bool {
    #[cfg(target_arch = "x86_64")]
    return amx::is_there();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether a matrix of `k` input features can be multiplied so.
pub fn fits(k: usize) -> bool {
    k > 0 && k.is_multiple_of(TILE)
}

/// How many weights along `k` share a scale. The last ones may be fewer.
fn chunk(k: usize) -> usize {
    k.div_ceil(TILE).div_ceil(k.div_ceil(MAX_CHUNK)) * TILE
}

/// Rows of activations in 15 bits: `x = scale * (high << LOW | low)`, rounded.
pub struct Planes {
    k: usize,
    /// Bytes of a line.
    stride: usize,
    /// `[rows][2][stride]`: the upper plane of a row, then the lower one.
    lines: Lines,
    /// `[rows]`.
    scales: Buffer,
}

impl Planes {
    fn rows(&self) -> usize {
        self.scales.len()
    }

    /// Rounds `rows` rows of `k` numbers, `stride` apart. Where a number is not finite, neither are its row's products.
    ///
    /// # Panics
    /// If `x` is too short.
    pub fn new(simd: Simd, x: &[f32], stride: usize, rows: usize, k: usize) -> Self {
        /// Numbers worth handing to another thread.
        const GRAIN: usize = 1 << 12;
        // Lines an odd number of cache lines apart do not meet in few places of the cache.
        let line = k.next_multiple_of(TILE) + if (k / TILE).is_multiple_of(2) { TILE } else { 0 };
        let mut planes = Planes { k, stride: line, lines: Lines::new(2 * rows * line), scales: Buffer::new(rows) };
        let round = |row: usize, lines: &mut [i8], scale: &mut [f32]| {
            let (high, low) = lines.split_at_mut(line);
            scale[0] = round(simd, &x[row * stride..][..k], &mut high[..k], &mut low[..k]);
        };
        if rows * k < 2 * GRAIN {
            let parts = planes.lines.chunks_exact_mut(2 * line).zip(planes.scales.chunks_exact_mut(1)).enumerate();
            parts.for_each(|(row, (lines, scale))| round(row, lines, scale));
        } else {
            parallel::chunk_pairs((&mut planes.lines[..], 2 * line), (&mut planes.scales[..], 1), round);
        }
        planes
    }

    /// The planes of a row.
    fn row(&self, row: usize) -> (&[i8], &[i8]) {
        let lines = &self.lines[2 * row * self.stride..][..2 * self.stride];
        (&lines[..self.k], &lines[self.stride..][..self.k])
    }
}

/// Rounds a row; returns its scale.
#[inline(always)]
fn round_body(x: &[f32], high: &mut [i8], low: &mut [i8]) -> f32 {
    // As bits, an absolute value that is NaN is larger than all others.
    let max = x.iter().fold(0u32, |max, x| max.max(x.abs().to_bits()));
    let scale = f32::from_bits(max) / MAX_NUMBER;
    let factor = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    for ((x, high), low) in x.iter().zip(high).zip(low) {
        let number = whole(x * factor);
        let upper = number.wrapping_add(1 << (LOW - 1)) >> LOW;
        *high = upper as i8;
        *low = number.wrapping_sub(upper << LOW) as i8;
    }
    scale
}

/// [`round_body`], in which the compiler sees too little to do. Rows are whole vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn round_avx512(x: &[f32], high: &mut [i8], low: &mut [i8]) -> f32 {
    use std::arch::x86_64::*;
    let x = x.as_chunks::<LANES>().0;
    let mut max = _mm512_setzero_si512();
    for x in x {
        // SAFETY: each is of LANES numbers.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        max = _mm512_max_epu32(max, _mm512_castps_si512(_mm512_abs_ps(x)));
    }
    let scale = f32::from_bits(_mm512_reduce_max_epu32(max)) / MAX_NUMBER;
    let factor = _mm512_set1_ps(if scale == 0.0 { 0.0 } else { 1.0 / scale });
    // As in `whole`; the bits of its number, and half of the lower plane more.
    let (shift, bits, half) =
        (_mm512_set1_ps(12_582_912.0), _mm512_set1_epi32(0x4B40_0000), _mm512_set1_epi32(1 << (LOW - 1)));
    let planes = high.as_chunks_mut::<LANES>().0.iter_mut().zip(low.as_chunks_mut::<LANES>().0);
    for (x, (high, low)) in x.iter().zip(planes) {
        // SAFETY: loads and stores are of LANES numbers.
        unsafe {
            let moved = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(x.as_ptr()), factor), shift);
            let number = _mm512_sub_epi32(_mm512_castps_si512(moved), bits);
            let upper = _mm512_srai_epi32::<LOW>(_mm512_add_epi32(number, half));
            let lower = _mm512_sub_epi32(number, _mm512_slli_epi32::<LOW>(upper));
            _mm_storeu_si128(high.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(upper));
            _mm_storeu_si128(low.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(lower));
        }
    }
    scale
}

fn round(simd: Simd, x: &[f32], high: &mut [i8], low: &mut [i8]) -> f32 {
    match simd {
        // SAFETY: `Avx512` is only made where the CPU has avx512f.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { round_avx512(x, high, low) },
        _ => round_body(x, high, low),
    }
}

/// The whole numbers of weights, in panels of [`LANES`] output features.
#[derive(Debug)]
enum Codes {
    /// 8 bits with a sign, `[panels][k / 4][LANES][4]`.
    Bytes(Large<u8>),
    /// 4 bits, as in [`super::int8`].
    Nibbles {
        codes: Large<u8>,
        /// `[panels][k / GROUP]`: the slopes of the features, then their offsets. Without these, a code is the whole number and 8
        /// more.
        lines: Option<Large<[i16; 2 * LANES]>>,
    },
}

/// Weights in whole numbers of 8 bits, `w = scale * code`.
#[derive(Debug)]
pub struct Weights {
    n: usize,
    k: usize,
    codes: Codes,
    /// `[panels][chunks]`.
    scales: Large<[f32; LANES]>,
}

/// The scale of weights of which these are the least and the greatest. NaN where one is not finite.
fn scale(range: (f32, f32)) -> f32 {
    let max = range.0.abs().max(range.1.abs()) / MAX_CODE;
    if range.0.is_finite() && range.1.is_finite() { max } else { f32::NAN }
}

/// The least and the greatest of numbers; NaN if one of them is.
fn range(numbers: impl Iterator<Item = f32>) -> (f32, f32) {
    numbers.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), w| {
        if w.is_nan() { (w, w) } else { (if w < low { w } else { low }, if w > high { w } else { high }) }
    })
}

impl Weights {
    /// Rounds weights `w(row, i)`, `[n, k]`, to 8 bits.
    ///
    /// # Panics
    /// If `k` does not [fit](fits).
    pub fn round(n: usize, k: usize, w: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        assert!(fits(k));
        let (chunk, chunks) = (chunk(k), k.div_ceil(chunk(k)));
        let of_chunk = |c: usize| c * chunk..k.min((c + 1) * chunk);
        let scales = per_group(n, chunks, |row, c| scale(range(of_chunk(c).map(|i| w(row, i)))));
        let codes = in_steps(n, k, 0, |row, i| {
            let scale = scales[row / LANES * chunks + i / chunk][row % LANES];
            let code = w(row, i) / scale;
            if code.is_finite() { whole(code) as i8 as u8 } else { 0 }
        });
        Weights { n, k, codes: Codes::Bytes(codes), scales: collected(scales.into_iter()) }
    }

    /// Rounds weights to 4 bits.
    ///
    /// # Panics
    /// If `k` does not [fit](fits).
    pub fn round_to_nibbles(n: usize, k: usize, w: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        assert!(fits(k));
        let (chunk, chunks) = (chunk(k), k.div_ceil(chunk(k)));
        let scales =
            per_group(n, chunks, |row, c| nibble_scale((c * chunk..k.min((c + 1) * chunk)).map(|i| w(row, i))));
        let codes = nibbles(n, k, |row, i| {
            let code = w(row, i) / scales[row / LANES * chunks + i / chunk][row % LANES];
            if code.is_finite() { nibble(code) } else { 8 }
        });
        Weights { n, k, codes: Codes::Nibbles { codes, lines: None }, scales: collected(scales.into_iter()) }
    }

    /// Weights that are whole numbers from 0 to 15 already: `scale * q(row, i) + min`, with `(scale, min)` by row and group of
    /// 32 weights. They keep their 4 bits.
    ///
    /// # Panics
    /// If `k` does not [fit](fits).
    pub fn spread(
        n: usize,
        k: usize,
        q: impl Fn(usize, usize) -> i8 + Sync,
        group: impl Fn(usize, usize) -> (f32, f32) + Sync,
    ) -> Self {
        assert!(fits(k));
        let (chunk, chunks, groups) = (chunk(k), k.div_ceil(chunk(k)), k / GROUP);
        let scales = per_group(n, chunks, |row, c| {
            let groups = c * chunk / GROUP..k.min((c + 1) * chunk) / GROUP;
            scale(range(groups.flat_map(|g| {
                let (scale, min) = group(row, g);
                let codes = (g * GROUP..(g + 1) * GROUP).map(|i| q(row, i));
                let (low, high) = codes.fold((i8::MAX, i8::MIN), |(low, high), q| (low.min(q), high.max(q)));
                [low, high].map(|q| scale * f32::from(q) + min)
            })))
        });
        let point = (1 << FRACTION) as f32;
        // Those of codes that no weight has may overflow: what counts is right modulo 2^16.
        let bits = |x: f32| x.round_ties_even() as i64 as i16;
        let lines = (0..n.div_ceil(LANES) * groups).map(|index| {
            let (panel, g) = (index / groups, index % groups);
            let mut line = [0; 2 * LANES];
            for lane in 0..LANES.min(n - panel * LANES) {
                let unit = scales[panel * chunks + g * GROUP / chunk][lane];
                if unit > 0.0 {
                    let (scale, min) = group(panel * LANES + lane, g);
                    line[lane] = bits(scale / unit * point);
                    // Half a code more, to round.
                    line[LANES + lane] = bits(min / unit * point + point / 2.0);
                }
            }
            line
        });
        let lines = collected(lines);
        let codes = Codes::Nibbles { codes: nibbles(n, k, |row, i| q(row, i) as u8 & 15), lines: Some(lines) };
        Weights { n, k, codes, scales: collected(scales.into_iter()) }
    }

    /// Some panels, as they are read.
    pub fn ahead(&self, panels: Range<usize>) -> Ahead {
        let (codes, bytes) = match &self.codes {
            Codes::Bytes(codes) => (codes, self.k * LANES),
            Codes::Nibbles { codes, .. } => (codes, self.k * LANES / 2),
        };
        let scales = &self.scales[panels.start * self.chunks()..panels.end * self.chunks()];
        Ahead::new([place(scales), place(&codes[panels.start * bytes..panels.end * bytes]), place::<u8>(&[])])
    }

    pub fn bytes(&self) -> usize {
        let codes = match &self.codes {
            Codes::Bytes(codes) => codes.len(),
            Codes::Nibbles { codes, lines } => codes.len() + lines.as_ref().map_or(0, |lines| size_of_val(&lines[..])),
        };
        codes + size_of_val(&self.scales[..])
    }

    fn chunks(&self) -> usize {
        self.k.div_ceil(chunk(self.k))
    }

    /// Writes the weights of output feature `row` to `out`, `[k]`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane, chunk) = (row / LANES, row % LANES, chunk(self.k));
        for (c, out) in out.chunks_mut(chunk).enumerate() {
            let scale = self.scales[panel * self.chunks() + c][lane];
            let code = |i: usize| self.code(panel, lane, c * chunk + i) as f32;
            out.iter_mut().enumerate().for_each(|(i, out)| *out = scale * code(i));
        }
    }

    /// `scale * x wᵀ` for some rows of `x` and some panels; `y` begins with the first feature of the first row. What is read next
    /// is fetched meanwhile.
    ///
    /// # Safety
    /// `y` is good for writing those features of as many rows, and nobody else touches them meanwhile.
    ///
    /// # Panics
    /// If there are not so many rows or panels, or `x` was rounded for another `k`.
    #[allow(clippy::too_many_arguments)]
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
    pub unsafe fn multiply(
        &self,
        simd: Simd,
        x: &Planes,
        rows: Range<usize>,
        panels: Range<usize>,
        ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        assert!(x.k == self.k && rows.end <= x.rows() && panels.end * self.chunks() <= self.scales.len());
        match simd {
            // SAFETY: the CPU has what they need, and the caller's promise.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 if is_there() => unsafe {
                // Tiles of one row would be laid out and read for next to nothing.
                match rows.len() {
                    1 => self.vnni(x, rows.start, panels, ahead, scale, y),
                    _ => self.amx(x, rows, panels, scale, y),
                }
            },
            _ => {
                let first = (rows.start, panels.start);
                for (panel, row) in panels.flat_map(|p| rows.clone().map(move |r| (p, r))) {
                    let sums = self.portable(x, row, panel);
                    // SAFETY: the caller's promise.
                    unsafe { y.at(row - first.0, (panel - first.1) * LANES).put(&sums, self.features(panel), scale) };
                }
            }
        }
    }

    /// Output features of a panel: fewer than [`LANES`] in the last one.
    fn features(&self, panel: usize) -> usize {
        LANES.min(self.n - panel * LANES)
    }

    /// The whole number of weight `i` of a panel's output feature `lane`.
    fn code(&self, panel: usize, lane: usize, i: usize) -> i32 {
        /// Weights of a feature that lie together.
        const STEP: usize = 4;
        match &self.codes {
            Codes::Bytes(codes) => {
                i32::from(codes[(panel * self.k + i / STEP * STEP) * LANES + lane * STEP + i % STEP] as i8)
            }
            Codes::Nibbles { codes, lines } => {
                let byte = codes[(panel * self.k / 2 + i / (2 * STEP) * STEP) * LANES + lane * STEP + i % STEP];
                let nibble = i16::from(if (i / STEP).is_multiple_of(2) { byte & 15 } else { byte >> 4 });
                let Some(lines) = lines else { return i32::from(nibble) - 8 };
                let line = &lines[(panel * self.k + i) / GROUP];
                i32::from((nibble.wrapping_mul(line[lane]).wrapping_add(line[LANES + lane]) >> FRACTION) as i8)
            }
        }
    }

    /// The plain form, which decides what the others give.
    fn portable(&self, x: &Planes, row: usize, panel: usize) -> [f32; LANES] {
        let ((high, low), chunk, chunks) = (x.row(row), chunk(self.k), self.chunks());
        let mut acc = [0.0f32; LANES];
        for c in 0..chunks {
            for (lane, acc) in acc.iter_mut().enumerate() {
                let sum = |plane: &[i8]| -> i32 {
                    let all = c * chunk..self.k.min((c + 1) * chunk);
                    all.map(|i| self.code(panel, lane, i) * i32::from(plane[i])).sum()
                };
                let sum = (sum(high) << LOW) + sum(low);
                *acc = (sum as f32).mul_add(self.scales[panel * chunks + c][lane], *acc);
            }
        }
        acc.map(|acc| acc * x.scales[row])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::testing::noise;

    #[test]
    fn chunks_are_even_and_short() {
        assert_eq!([64, 320, 576, 704, 1536, 2048, 5632].map(chunk), [64, 320, 576, 384, 512, 512, 576]);
        assert!([64, 576, 1536].into_iter().all(fits) && ![0, 32, 96, 100].into_iter().any(fits));
    }

    /// The weights as they are multiplied, row by row.
    fn kept(weights: &Weights) -> Vec<f32> {
        let mut kept = vec![0.0; weights.n * weights.k];
        kept.chunks_exact_mut(weights.k).enumerate().for_each(|(row, out)| weights.row(row, out));
        kept
    }

    #[test]
    fn numbers_that_are_not_finite_stay_so() {
        for number in [f32::NAN, f32::INFINITY, -f32::INFINITY] {
            for simd in Simd::all() {
                let product = |x: &[f32], weights: &Weights| {
                    let mut y = [1.0f32; 2];
                    let target = Target { start: y.as_mut_ptr(), stride: 1, add: false };
                    let x = Planes::new(simd, x, 64, 2, 64);
                    // SAFETY: that many features.
                    unsafe { weights.multiply(simd, &x, 0..2, 0..1, Ahead::nothing(), 1.0, target) };
                    y
                };
                let good = Weights::round(1, 64, |_, _| 0.5);
                let mut x = [1.0; 128];
                x[7] = number;
                let y = product(&x, &good);
                assert!(!y[0].is_finite() && (y[1] - 32.0).abs() < 0.2, "{number} by {simd:?}: {y:?}");
                let at = |i: usize| if i == 9 { number } else { 0.5 };
                let group = |_, g: usize| if g == 1 { (number, 0.5) } else { (0.1, 0.5) };
                let rounded = [Weights::round(1, 64, |_, i| at(i)), Weights::round_to_nibbles(1, 64, |_, i| at(i))];
                for bad in rounded.into_iter().chain([Weights::spread(1, 64, |_, _| 3, group)]) {
                    assert!(product(&[1.0; 128], &bad).iter().all(|y| !y.is_finite()), "{number} by {simd:?}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn rows_keep_15_bits(k in 1usize..8, rows in 1usize..5, size in -30i32..30, seed in any::<u64>()) {
            let (k, mut next) = (k * TILE, noise(seed));
            let x: Vec<f32> = (0..rows * (k + 1)).map(|_| next() * (size as f32).exp2()).collect();
            for simd in Simd::all() {
                let planes = Planes::new(simd, &x, k + 1, rows, k);
                for row in 0..rows {
                    let x = &x[row * (k + 1)..][..k];
                    let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    let (high, low) = planes.row(row);
                    for ((x, high), low) in x.iter().zip(high).zip(low) {
                        let got = planes.scales[row] * ((i32::from(*high) << LOW) + i32::from(*low)) as f32;
                        prop_assert!((got - x).abs() <= 0.51 * max / MAX_NUMBER, "{x} became {got} by {simd:?}");
                    }
                }
            }
        }

        /// Weights of 4 bits are what rounding their numbers gives, but for a code's half at most.
        #[test]
        fn products_equal_the_plain_sum(
            rows in prop_oneof![1usize..40, 40usize..300], panels in 1usize..7, tiles in 1usize..14, form in 0..3,
            extreme in any::<bool>(), seed in any::<u64>(),
        ) {
            let (n, k, mut next) = (panels * LANES - seed as usize % 5, tiles * TILE, noise(seed));
            // Also the largest ones, all over, so that sums are the largest there can be.
            let x: Vec<f32> = (0..rows * (k + 1)).map(|_| if extreme { 9.0 } else { next() * 9.0 }).collect();
            let q: Vec<i8> = (0..n * k).map(|_| if extreme { 15 } else { ((next() + 1.0) * 7.99) as i8 }).collect();
            let of_group: Vec<(f32, f32)> = (0..n * k / GROUP).map(|_| (next() * next() / 15.0, next())).collect();
            let group = |row: usize, g: usize| of_group[row * k / GROUP + g];
            let w = |row: usize, i: usize| {
                let (scale, min) = group(row, i / GROUP);
                scale * f32::from(q[row * k + i]) + min
            };
            let (weights, codes) = match form {
                0 => (Weights::spread(n, k, |row, i| q[row * k + i], group), MAX_CODE),
                1 => (Weights::round(n, k, w), MAX_CODE),
                // The largest of the other sign is a whole code off.
                _ => (Weights::round_to_nibbles(n, k, w), 4.0),
            };
            let kept = kept(&weights);
            for (i, kept) in kept.iter().enumerate() {
                let (row, c) = (i / k, i % k / chunk(k) * chunk(k));
                let max = (c..k.min(c + chunk(k))).map(|i| w(row, i).abs()).fold(0.0, f32::max);
                prop_assert!((w(row, i % k) - kept).abs() <= 0.54 * max / codes, "{} became {kept}", w(row, i % k));
            }
            let mut all: Vec<Vec<f32>> = vec![];
            for simd in Simd::all() {
                let planes = Planes::new(simd, &x, k + 1, rows, k);
                // A number more than features, which nothing is added to.
                let product = |rows: Range<usize>, panels: Range<usize>, add: bool| {
                    let width = n.min(panels.end * LANES) - panels.start * LANES;
                    let mut y = vec![1.0f32; rows.len() * (width + 1)];
                    let target = Target { start: y.as_mut_ptr(), stride: width + 1, add };
                    // SAFETY: there are as many rows and features.
                    unsafe { weights.multiply(simd, &planes, rows, panels, Ahead::nothing(), 0.5, target) };
                    assert!(y.iter().skip(width).step_by(width + 1).all(|&one| one == 1.0));
                    y
                };
                let y = product(0..rows, 0..panels, true);
                let set = product(0..rows, 0..panels, false);
                prop_assert!(y.iter().zip(&set).enumerate().all(|(i, (y, set))| i % (n + 1) == n || *y == 1.0 + set));
                for (row, panel) in (0..rows).flat_map(|row| (0..panels).map(move |panel| (row, panel))) {
                    let alone = product(row..row + 1, panel..panel + 1, true);
                    prop_assert_eq!(&y[row * (n + 1) + panel * LANES..][..alone.len() - 1], &alone[..alone.len() - 1]);
                }
                all.push(y);
            }
            prop_assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
            for (feature, kept) in kept.chunks_exact(k).enumerate() {
                for row in 0..rows {
                    let got = (all[0][row * (n + 1) + feature] - 1.0) / 0.5;
                    let x = &x[row * (k + 1)..][..k];
                    let want: f64 = x.iter().zip(kept).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    // Each activation is off by half a step at most.
                    let size: f64 = kept.iter().map(|w| f64::from(w.abs()) * 9.0).sum();
                    prop_assert!((f64::from(got) - want).abs() <= 4e-5 * size + 1e-5, "{got}, not {want}");
                }
            }
        }
    }
}
