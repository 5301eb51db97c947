//! Weight matrices repacked for the CPU.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::base::int8::{self, Rounded};
use crate::base::plain::{self, Task};
use crate::base::simd::{Ahead, GROUP, Group, LANES, Rows, Simd, Target};
use crate::base::tiled::{self, Planes};
use crate::base::{RawTensor, Stored};
use crate::large_pages::{Large, repeated};
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;

/// How packed weights are stored. Products are computed in f32 but for [`Format::Int8`] and [`Format::Int4`], whose weights
/// are multiplied in whole numbers with activations that are rounded to 8 bits ([`int8`]), or on a CPU with AMX to 15
/// ([`tiled`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    F32,
    Bf16,
    F16,
    /// 8 bits a weight, a scale for [`GROUP`] of them along `k`.
    Q8,
    /// 5 bits a weight, held in 8, a scale and a minimum for [`GROUP`] of them along `k`.
    Q5,
    /// 4 bits a weight, a scale and a minimum for [`GROUP`] of them along `k`.
    Q4,
    /// 8 bits a weight, a scale for a group of them along `k`.
    Int8,
    /// 4 bits a weight, a scale for a group of them along `k`, and a minimum or not.
    Int4,
}

impl Format {
    /// Whether a matrix of `k` input features can have it.
    pub fn fits(self, k: usize) -> bool {
        match self {
            Format::Q8 | Format::Q5 | Format::Q4 | Format::Int4 => k.is_multiple_of(GROUP),
            Format::Int8 => int8::group(k).is_some(),
            Format::F32 | Format::Bf16 | Format::F16 => true,
        }
    }
}

/// The weights. Products of scales with codes that have a minimum added are exact in f32 ([`short`]).
#[derive(Debug)]
pub(super) enum Data {
    F32(Large<f32>),
    /// bf16 or f16 bits.
    Half(Large<u16>),
    Q8 {
        /// Weights along `k` that share a scale.
        group: usize,
        scales: Large<[f32; LANES]>,
        q: Large<i8>,
    },
    Q5 {
        scales: Large<[f32; LANES]>,
        mins: Large<[f32; LANES]>,
        q: Large<u8>,
    },
    Q4 {
        scales: Large<[f32; LANES]>,
        mins: Large<[f32; LANES]>,
        q: Large<u8>,
    },
    Whole(int8::Weights),
    Tiled(tiled::Weights),
}

/// A matrix `[n, k]` of `n` output features in panels of [`LANES`]: `[n / LANES][k][LANES]`, the last panel filled up
/// with zeros. A panel is read from front to back once per product, whatever the number of rows.
#[derive(Debug)]
pub struct PackedMatrix {
    n: usize,
    k: usize,
    format: Format,
    data: Data,
}

impl PackedMatrix {
    /// Packs `rows`, `n` rows of `k` weights, as `format`.
    ///
    /// # Panics
    /// If `rows` is not `n * k` long, or the format does not fit `k`.
    pub fn pack(rows: &[f32], n: usize, k: usize, format: Format) -> Self {
        assert_eq!(rows.len(), n * k);
        let at = |panel: usize, i: usize, lane: usize| {
            let row = panel * LANES + lane;
            if row < n { rows[row * k + i] } else { 0.0 }
        };
        let panels = n.div_ceil(LANES);
        let data = match format {
            Format::Int8 => Data::Whole(int8::Weights::round(rows, n, k)),
            Format::F32 => Data::F32(fill(panels, k, at)),
            Format::Bf16 => Data::Half(fill(panels, k, |p, i, l| bf16::from_f32(at(p, i, l)).to_bits())),
            Format::F16 => Data::Half(fill(panels, k, |p, i, l| f16::from_f32(at(p, i, l)).to_bits())),
            Format::Q8 => {
                let scales = per_group(panels, k, GROUP, |panel, group, lane| {
                    let max = (0..GROUP).map(|i| at(panel, group * GROUP + i, lane).abs()).fold(0.0, f32::max);
                    max / 127.0
                });
                let groups = k / GROUP;
                let q = fill(panels, k, |panel, i, lane| {
                    let scale = scales[panel * groups + i / GROUP][lane];
                    if scale == 0.0 { 0 } else { (at(panel, i, lane) / scale).round() as i8 }
                });
                Data::Q8 { group: GROUP, scales, q }
            }
            Format::Q5 | Format::Q4 | Format::Int4 => {
                let steps = if format == Format::Q5 { 31.0 } else { 15.0 };
                let range = |panel: usize, group: usize, lane: usize| {
                    let values = (0..GROUP).map(|i| at(panel, group * GROUP + i, lane));
                    values.fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(v), high.max(v)))
                };
                let mins = per_group(panels, k, GROUP, |p, g, l| range(p, g, l).0);
                let scales =
                    per_group(panels, k, GROUP, |p, g, l| short((range(p, g, l).1 - range(p, g, l).0) / steps));
                let groups = k / GROUP;
                let q = |panel: usize, i: usize, lane: usize| {
                    let group = panel * groups + i / GROUP;
                    let scale = scales[group][lane];
                    if scale == 0.0 { 0 } else { ((at(panel, i, lane) - mins[group][lane]) / scale).round() as u8 }
                };
                match format {
                    Format::Q5 => {
                        let q = fill(panels, k, q);
                        Data::Q5 { scales, mins, q }
                    }
                    Format::Int4 => {
                        let of = |numbers: &[[f32; LANES]], row: usize, g: usize| {
                            numbers[row / LANES * groups + g][row % LANES]
                        };
                        let q = |row: usize, i: usize| q(row / LANES, i, row % LANES) as i8;
                        let (scale, min) = (|row, g| of(&scales, row, g), |row, g| of(&mins, row, g));
                        Data::Whole(int8::Weights::exact((n, k, GROUP, 4), q, scale, min))
                    }
                    _ => {
                        let q = fill_nibbles(panels, k, q);
                        Data::Q4 { scales, mins, q }
                    }
                }
            }
        };
        PackedMatrix { n, k, format, data }
    }

    /// Packs `rows` as [`Format::Int4`] without minima, or [`Format::Int8`] where that does not fit `k`; in [`tiled`]'s numbers
    /// where products are quickest in these.
    ///
    /// # Panics
    /// As [`Self::pack`] with [`Format::Int8`].
    pub fn pack_int4(rows: &[f32], n: usize, k: usize) -> Self {
        let (tiled, w) = (tiled::is_there() && tiled::fits(k), |row: usize, i: usize| rows[row * k + i]);
        let data = match int8::nibble_group(k) {
            _ if tiled => Data::Tiled(tiled::Weights::round_to_nibbles(n, k, w)),
            Some(_) => Data::Whole(int8::Weights::round_to_nibbles(n, k, w)),
            None => return Self::pack(rows, n, k, Format::Int8),
        };
        assert_eq!(rows.len(), n * k);
        PackedMatrix { n, k, format: Format::Int4, data }
    }

    /// Packs `rows` as [`Format::Int8`], in [`tiled`]'s numbers where products are quickest in these.
    ///
    /// # Panics
    /// As [`Self::pack`].
    pub fn pack_int8(rows: &[f32], n: usize, k: usize) -> Self {
        if !(tiled::is_there() && tiled::fits(k)) {
            return Self::pack(rows, n, k, Format::Int8);
        }
        assert_eq!(rows.len(), n * k);
        let weights = tiled::Weights::round(n, k, |row, i| rows[row * k + i]);
        PackedMatrix { n, k, format: Format::Int8, data: Data::Tiled(weights) }
    }

    /// Packs `rows` in the narrowest of f32, bf16 and f16 that keeps every number: an adapter that was saved in bf16
    /// takes half the memory and bandwidth.
    pub fn pack_exactly(rows: &[f32], n: usize, k: usize) -> Self {
        let format = if rows.iter().all(|&w| bf16::from_f32(w).to_f32() == w) {
            Format::Bf16
        } else if rows.iter().all(|&w| f16::from_f32(w).to_f32() == w) {
            Format::F16
        } else {
            Format::F32
        };
        Self::pack(rows, n, k, format)
    }

    /// Packs a tensor `[n, k]`. Without a `format`, f32, bf16 and f16 stay what they are, and so do the numbers of the block
    /// formats of 4 to 8 bits, though some take more memory than in the file; those of fewer bits become f16.
    ///
    /// A matrix that the format does not fit becomes bf16. With [`Format::Int8`], block formats of 4 to 8 bits keep their
    /// numbers but for [`tiled`] ones: only the activations are rounded.
    pub fn from_raw(raw: &RawTensor, format: Option<Format>) -> Result<Self> {
        let &[n, k] = raw.shape.as_slice() else {
            return Err(Error::unprocessable(format!("shape {:?}, where a matrix was expected", raw.shape)));
        };
        match (format, raw.stored) {
            (None, Stored::Ggml(dtype)) => match Blocks::new(&raw.bytes, n, k, dtype) {
                Some(blocks) => Ok(blocks.pack()),
                None => Ok(Self::pack(&raw.to_f32()?, n, k, Format::F16)),
            },
            (Some(Format::Int8), Stored::Ggml(dtype)) if let Some(blocks) = Blocks::new(&raw.bytes, n, k, dtype) => {
                Ok(blocks.pack_whole(tiled::is_there()))
            }
            (Some(f), _) if !f.fits(k) => Ok(Self::pack(&raw.to_f32()?, n, k, Format::Bf16)),
            (Some(Format::Int8), _) => Ok(Self::pack_int8(&raw.to_f32()?, n, k)),
            (Some(f), _) => Ok(Self::pack(&raw.to_f32()?, n, k, f)),
            (None, Stored::F32) => Ok(Self::pack(&raw.to_f32()?, n, k, Format::F32)),
            (None, Stored::Bf16) => Ok(Self::pack(&raw.to_f32()?, n, k, Format::Bf16)),
            (None, Stored::F16) => Ok(Self::pack(&raw.to_f32()?, n, k, Format::F16)),
        }
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// Memory it takes.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(w) => 4 * w.len(),
            Data::Half(w) => 2 * w.len(),
            Data::Q8 { scales, q, .. } => 4 * LANES * scales.len() + q.len(),
            Data::Q5 { scales, mins, q } | Data::Q4 { scales, mins, q } => {
                4 * LANES * (scales.len() + mins.len()) + q.len()
            }
            Data::Whole(weights) => weights.bytes(),
            Data::Tiled(weights) => weights.bytes(),
        }
    }

    /// Some panels, as they are read.
    pub(super) fn ahead(&self, panels: Range<usize>) -> Ahead {
        match &self.data {
            Data::Whole(weights) => weights.ahead(panels),
            Data::Tiled(weights) => weights.ahead(panels),
            _ => Ahead::nothing(),
        }
    }

    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    /// Panels that are multiplied side by side: a task of others takes longer for each.
    pub(super) fn side(&self) -> usize {
        if let Data::Tiled(_) = &self.data { tiled::SIDE } else { plain::SIDE }
    }

    /// How the rows that it is multiplied with are rounded.
    pub(super) fn rounding(&self) -> Option<Rounding> {
        match &self.data {
            Data::Whole(weights) => Some(Rounding::Groups(weights.group())),
            Data::Tiled(_) => Some(Rounding::Planes),
            _ => None,
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn data(&self) -> &Data {
        &self.data
    }

    /// Weights along `k` that are unpacked and multiplied at once.
    pub(super) fn group_len(&self) -> usize {
        if let Data::Q8 { group, .. } = &self.data { *group } else { GROUP }
    }

    /// The weights `[k0..k0 + len][LANES]` of a panel; `k0` in whole groups, `len` at most a group.
    pub(super) fn group(&self, panel: usize, k0: usize, len: usize) -> Group<'_> {
        let (start, len) = ((panel * self.k + k0) * LANES, len * LANES);
        let index = start / (self.group_len() * LANES);
        match &self.data {
            Data::F32(w) => Group::F32(&w[start..][..len]),
            Data::Half(w) if self.format == Format::F16 => Group::F16(&w[start..][..len]),
            Data::Half(w) => Group::Bf16(&w[start..][..len]),
            Data::Q8 { scales, q, .. } => Group::Q8 { scale: &scales[index], q: &q[start..][..len] },
            Data::Q5 { scales, mins, q } => {
                Group::Q5 { scale: &scales[index], min: &mins[index], q: &q[start..][..len] }
            }
            Data::Q4 { scales, mins, q } => {
                Group::Q4 { scale: &scales[index], min: &mins[index], q: &q[start / 2..][..len / 2] }
            }
            Data::Whole(_) | Data::Tiled(_) => unreachable!("these weights are not unpacked"),
        }
    }

    /// All rows, `[n, k]`.
    pub fn rows(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        out.par_chunks_mut(self.k.max(1)).enumerate().for_each(|(row, out)| self.row(row, out));
        out
    }

    /// Writes row `row` (`[k]`) to `out`: what an embedding looks up.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / LANES, row % LANES);
        let at = |i: usize| (panel * self.k + i) * LANES + lane;
        let number = |numbers: &[[f32; LANES]], group: usize, i: usize| numbers[(panel * self.k + i) / group][lane];
        let fill = |out: &mut [f32], weight: &dyn Fn(usize) -> f32| {
            out.iter_mut().enumerate().for_each(|(i, out)| *out = weight(i));
        };
        match &self.data {
            Data::Whole(weights) => weights.row(row, out),
            Data::Tiled(weights) => weights.row(row, out),
            Data::F32(w) => fill(out, &|i| w[at(i)]),
            Data::Half(w) if self.format == Format::F16 => fill(out, &|i| f16::from_bits(w[at(i)]).to_f32()),
            Data::Half(w) => fill(out, &|i| bf16::from_bits(w[at(i)]).to_f32()),
            Data::Q8 { group, scales, q } => fill(out, &|i| f32::from(q[at(i)]) * number(scales, *group, i)),
            Data::Q5 { scales, mins, q } => {
                fill(out, &|i| f32::from(q[at(i)]) * number(scales, GROUP, i) + number(mins, GROUP, i));
            }
            Data::Q4 { scales, mins, q } => fill(out, &|i| {
                let half = GROUP / 2;
                let byte = q[(panel * self.k / 2 + i / GROUP * half + i % half) * LANES + lane];
                let q = if i % GROUP < half { byte & 15 } else { byte >> 4 };
                f32::from(q) * number(scales, GROUP, i) + number(mins, GROUP, i)
            }),
        }
    }

    /// `scale * x Wᵀ` for the output features of some panels. `x` holds `m` rows; row `r` of the result starts at
    /// `r * y.stride` of `y`, its first number belongs to the first feature of the first panel.
    ///
    /// # Safety
    /// `y` is good for writing those elements, and nobody else touches them meanwhile.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn multiply_panels(
        &self,
        simd: Simd,
        panels: Range<usize>,
        m: usize,
        x: Input,
        ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        let x = match x {
            Input::Plain(x) => x,
            Input::Rounded(x, first) => {
                let Data::Whole(weights) = &self.data else {
                    unreachable!("only whole numbers are multiplied with rounded rows")
                };
                // SAFETY: the caller's promise.
                return unsafe { weights.multiply(simd, x, first..first + m, panels, ahead, scale, y) };
            }
            Input::Planes(x, first) => {
                let Data::Tiled(weights) = &self.data else {
                    unreachable!("only these weights are multiplied with planes")
                };
                // SAFETY: the caller's promise.
                return unsafe { weights.multiply(simd, x, first..first + m, panels, ahead, scale, y) };
            }
        };
        // SAFETY: the caller's promise.
        unsafe { plain::multiply(simd, &Task { matrix: self, panels, rows: m, x, scale, y }) }
    }
}

/// The nearest number of 16 significant bits: its products with codes are exact in f32, as are those of ggml's scales, so that
/// it makes no difference whether they are rounded before a minimum is added.
fn short(scale: f32) -> f32 {
    f32::from_bits((scale.to_bits() + 0x80) & !0xFF)
}

/// `f(panel, i, lane)` for every weight, in the order of the packed layout. Panels are filled in parallel.
fn fill<T: Copy + Default + Send>(panels: usize, k: usize, f: impl Fn(usize, usize, usize) -> T + Sync) -> Large<T> {
    let mut out = repeated(T::default(), panels * k * LANES);
    out.par_chunks_mut((k * LANES).max(1)).enumerate().for_each(|(panel, out)| {
        for (i, out) in out.chunks_exact_mut(LANES).enumerate() {
            for (lane, out) in out.iter_mut().enumerate() {
                *out = f(panel, i, lane);
            }
        }
    });
    out
}

/// The same for weights of 4 bits: a byte `[i][lane]` of a group holds `k = i` and `k = i + GROUP / 2`.
fn fill_nibbles(panels: usize, k: usize, f: impl Fn(usize, usize, usize) -> u8 + Sync) -> Large<u8> {
    let half = GROUP / 2;
    fill(panels, k / 2, |panel, i, lane| {
        let k = i / half * GROUP + i % half;
        f(panel, k, lane) | f(panel, k + half, lane) << 4
    })
}

/// `f(panel, group, lane)` for every group of weights.
fn per_group(
    panels: usize,
    k: usize,
    group: usize,
    f: impl Fn(usize, usize, usize) -> f32 + Sync,
) -> Large<[f32; LANES]> {
    assert_eq!(k % group, 0);
    let groups = k / group;
    let mut out = repeated([0.0; LANES], panels * groups);
    out.par_iter_mut()
        .enumerate()
        .for_each(|(i, out)| *out = std::array::from_fn(|lane| f(i / groups, i % groups, lane)));
    out
}

/// A matrix in one of ggml's block formats whose numbers are a small integer times a scale, plus a minimum or not.
struct Blocks<'a> {
    bytes: &'a [u8],
    n: usize,
    k: usize,
    dtype: GgmlDType,
}

impl<'a> Blocks<'a> {
    /// `None` for a format whose numbers are made in another way.
    fn new(bytes: &'a [u8], n: usize, k: usize, dtype: GgmlDType) -> Option<Self> {
        use GgmlDType::*;
        matches!(dtype, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4K | Q5K | Q6K).then_some(Blocks { bytes, n, k, dtype })
    }

    /// The block that holds weight `i` of a row, and the weight's place in it.
    fn block(&self, row: usize, i: usize) -> (&'a [u8], usize) {
        let (length, size) = (self.dtype.block_size(), self.dtype.type_size());
        let index = row * (self.k / length) + i / length;
        (&self.bytes[index * size..][..size], i % length)
    }

    /// Scale and minimum of weight `i`.
    fn scale(&self, row: usize, i: usize) -> (f32, f32) {
        let (b, i) = self.block(row, i);
        let number = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        match self.dtype {
            GgmlDType::Q4_0 => (number(0), -8.0 * number(0)),
            GgmlDType::Q4_1 | GgmlDType::Q5_1 => (number(0), number(2)),
            GgmlDType::Q4K | GgmlDType::Q5K => {
                // Eight groups have 6 bits of scale and of minimum each: the first four in the low bits of bytes 0 to 3 and
                // 4 to 7, the others in the halves of bytes 8 to 11 and the high bits of those before.
                let (s, group) = (&b[4..16], i / GROUP);
                let (scale, min) = match group {
                    0..4 => (s[group] & 63, s[group + 4] & 63),
                    _ => (s[group + 4] & 15 | s[group - 4] >> 6 << 4, s[group + 4] >> 4 | s[group] >> 6 << 4),
                };
                (number(0) * f32::from(scale), -(number(2) * f32::from(min)))
            }
            GgmlDType::Q6K => (number(208) * f32::from(b[192 + i / 16] as i8), 0.0),
            _ => (number(0), 0.0),
        }
    }

    /// The integer of weight `i`: not negative where there is a minimum.
    fn q(&self, row: usize, i: usize) -> i8 {
        let (b, i) = self.block(row, i);
        // Weights that lie `half` apart share a byte.
        let nibble = |bytes: &[u8], i: usize, half: usize| {
            let byte = bytes[i / (2 * half) * half + i % half];
            if i % (2 * half) < half { byte & 15 } else { byte >> 4 }
        };
        let q = match self.dtype {
            GgmlDType::Q4_0 => nibble(&b[2..], i, 16),
            GgmlDType::Q4_1 => nibble(&b[4..], i, 16),
            GgmlDType::Q5_0 => (nibble(&b[6..], i, 16) | (b[2 + i / 8] >> (i % 8) & 1) << 4).wrapping_sub(16),
            GgmlDType::Q5_1 => nibble(&b[8..], i, 16) | (b[4 + i / 8] >> (i % 8) & 1) << 4,
            GgmlDType::Q4K => nibble(&b[16..], i, 32),
            GgmlDType::Q5K => nibble(&b[48..], i, 32) | (b[16 + i % 32] >> (i / 32) & 1) << 4,
            GgmlDType::Q6K => {
                let high = b[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
                (nibble(b, i, 64) | high << 4).wrapping_sub(32)
            }
            _ => b[2 + i],
        };
        q as i8
    }

    /// Weights that share a scale.
    fn group(&self) -> usize {
        if self.dtype == GgmlDType::Q6K { 16 } else { GROUP }
    }

    /// For products in whole numbers: the same numbers, or for `tiles` those with so few scales that are nearest.
    fn pack_whole(&self, tiles: bool) -> PackedMatrix {
        use GgmlDType::*;
        let (n, k, group) = (self.n, self.k, self.group());
        let (format, bits) =
            if matches!(self.dtype, Q4_0 | Q4_1 | Q4K) { (Format::Int4, 4) } else { (Format::Int8, 8) };
        let q = |row: usize, i: usize| self.q(row, i);
        let of_group = |row: usize, g: usize| self.scale(row, g * group);
        let data = if !tiles || !tiled::fits(k) {
            let (scale, min) = (|row, g| of_group(row, g).0, |row, g| of_group(row, g).1);
            Data::Whole(int8::Weights::exact((n, k, group, bits), q, scale, min))
        } else if bits == 4 {
            Data::Tiled(tiled::Weights::spread(n, k, q, of_group))
        } else {
            Data::Tiled(tiled::Weights::round(n, k, |row, i| {
                let (scale, min) = of_group(row, i / group);
                scale * f32::from(q(row, i)) + min
            }))
        };
        PackedMatrix { n, k, format, data }
    }

    /// Lays the blocks out in panels, number by number the same.
    fn pack(&self) -> PackedMatrix {
        let (n, k, panels) = (self.n, self.k, self.n.div_ceil(LANES));
        let scale = |group: usize| {
            move |p: usize, g: usize, l: usize| {
                let row = p * LANES + l;
                if row < n { self.scale(row, g * group) } else { (0.0, 0.0) }
            }
        };
        let q = |p: usize, i: usize, l: usize| if p * LANES + l < n { self.q(p * LANES + l, i) } else { 0 };
        let per_group = |group: usize, which: fn((f32, f32)) -> f32| {
            let scale = scale(group);
            per_group(panels, k, group, move |p, g, l| which(scale(p, g, l)))
        };
        let (format, data) = match self.dtype {
            GgmlDType::Q5_0 | GgmlDType::Q8_0 | GgmlDType::Q6K => {
                let group = self.group();
                let (scales, q) = (per_group(group, |s| s.0), fill(panels, k, q));
                (Format::Q8, Data::Q8 { group, scales, q })
            }
            GgmlDType::Q5_1 | GgmlDType::Q5K => {
                let (scales, mins) = (per_group(GROUP, |s| s.0), per_group(GROUP, |s| s.1));
                (Format::Q5, Data::Q5 { scales, mins, q: fill(panels, k, |p, i, l| q(p, i, l) as u8) })
            }
            _ => {
                let (scales, mins) = (per_group(GROUP, |s| s.0), per_group(GROUP, |s| s.1));
                (Format::Q4, Data::Q4 { scales, mins, q: fill_nibbles(panels, k, |p, i, l| q(p, i, l) as u8) })
            }
        };
        PackedMatrix { n, k, format, data }
    }
}

/// How rows are rounded for products in whole numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rounding {
    /// Numbers that share a scale.
    Groups(usize),
    Planes,
}

/// Rows to be multiplied.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Plain(Rows<'a>),
    /// From this row on.
    Rounded(&'a Rounded, usize),
    /// From this row on.
    Planes(&'a Planes, usize),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::products::{Batch, Product, multiply};
    use crate::base::testing::noise;
    use proptest::prelude::*;

    fn unpacked(matrix: &PackedMatrix) -> Vec<f32> {
        let mut rows = vec![0.0; matrix.n * matrix.k];
        rows.chunks_exact_mut(matrix.k).enumerate().for_each(|(i, row)| matrix.row(i, row));
        assert_eq!(rows, matrix.rows());
        rows
    }

    const FORMATS: [Format; 8] =
        [Format::F32, Format::Bf16, Format::F16, Format::Q8, Format::Q5, Format::Q4, Format::Int8, Format::Int4];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn products_equal_the_plain_sum_and_rows_do_not_depend_on_each_other(
            m in 1usize..70, n in 1usize..90, groups in 1usize..7, odd in 0usize..31, seed in any::<u64>()
        ) {
            let mut next = noise(seed);
            for format in FORMATS {
                let k = groups * GROUP + odd;
                let k = if format.fits(k) { k } else { groups * GROUP };
                let weights: Vec<f32> = (0..n * k).map(|_| next()).collect();
                let matrix = PackedMatrix::pack(&weights, n, k, format);
                let kept = unpacked(&matrix);
                let loss = match format { Format::F32 => 0.0, Format::Bf16 => 4e-3, Format::F16 => 5e-4, Format::Q8 | Format::Int8 => 4e-3, Format::Q5 => 4e-2, Format::Q4 | Format::Int4 => 7e-2 };
                for (a, b) in weights.iter().zip(&kept) {
                    prop_assert!((a - b).abs() <= loss, "{format:?}: {a} became {b}");
                }
                let x: Vec<f32> = (0..m * k).map(|_| next()).collect();
                let product = |rows| [Product { matrix: &matrix, rows, x_column: 0, y_column: 1, scale: 2.0 }];
                for simd in Simd::all() {
                    let mut y = vec![1.0; m * (n + 2)];
                    multiply(simd, &x, k, Batch { products: &product(0..m), y: &mut y, y_stride: n + 2, add: true });
                    for r in 0..m {
                        let mut alone = vec![1.0; n + 2];
                        let batch = Batch { products: &product(0..1), y: &mut alone, y_stride: n + 2, add: true };
                        multiply(simd, &x[r * k..][..k], k, batch);
                        prop_assert_eq!(&alone[..], &y[r * (n + 2)..][..n + 2]);
                        prop_assert_eq!((alone[0], alone[n + 1]), (1.0, 1.0));
                        for j in 0..n {
                            let sum: f64 = (0..k).map(|i| x[r * k + i] as f64 * kept[j * k + i] as f64).sum();
                            // Activations of at most 1 are off by half a step of 127.
                            let off = if matches!(format, Format::Int8 | Format::Int4) { 4.1e-3 } else { 1e-4 };
                            prop_assert!((alone[j + 1] as f64 - 1.0 - 2.0 * sum).abs() < 2.0 * off * k as f64);
                        }
                    }
                }
            }
        }
    }

    /// Also where a product goes through them: tiles begin at whole groups, which have 16 weights for one of the formats. How
    /// they do depends on the number of rows.
    #[test]
    fn ggml_blocks_keep_their_numbers() {
        use candle_core::quantized::QTensor;
        use candle_core::{Device, Tensor};
        let (n, k, m) = (21, 512, 15);
        let mut next = noise(7);
        let weights: Vec<f32> = (0..n * k).map(|_| next()).collect();
        let x: Vec<f32> = (0..m * k).map(|_| next()).collect();
        let weights = Tensor::from_vec(weights, (n, k), &Device::Cpu).unwrap();
        use GgmlDType::*;
        let formats = [
            (Q4_0, Format::Q4),
            (Q4_1, Format::Q4),
            (Q5_0, Format::Q8),
            (Q5_1, Format::Q5),
            (Q8_0, Format::Q8),
            (Q4K, Format::Q4),
            (Q5K, Format::Q5),
            (Q6K, Format::Q8),
        ];
        for (dtype, format) in formats {
            let quantised = QTensor::quantize(&weights, dtype).unwrap();
            let want: Vec<f32> = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let raw = RawTensor { shape: vec![n, k], stored: Stored::Ggml(dtype), bytes: quantised.data().unwrap() };
            let packed = PackedMatrix::from_raw(&raw, None).unwrap();
            assert_eq!(packed.format(), format);
            assert_eq!(unpacked(&packed), want, "{dtype:?}");
            let product = |matrix| {
                let product = |rows| Product { matrix, rows, x_column: 0, y_column: 0, scale: 1.0 };
                [0..1, 1..3, 3..8, 8..m].map(product)
            };
            let plain = PackedMatrix::pack(&want, n, k, Format::F32);
            for simd in Simd::all() {
                let (mut got, mut same) = (vec![0.0; m * n], vec![0.0; m * n]);
                for (matrix, y) in [(&packed, &mut got), (&plain, &mut same)] {
                    multiply(simd, &x, k, Batch { products: &product(matrix), y, y_stride: n, add: false });
                }
                assert_eq!(got, same, "{dtype:?} by {simd:?}");
            }
            // In whole numbers: the same, and those with few scales, which a code's half may part from them.
            let blocks = Blocks::new(&raw.bytes, n, k, dtype).unwrap();
            for tiles in [false, true] {
                let whole = blocks.pack_whole(tiles);
                assert_eq!(whole.format(), if format == Format::Q4 { Format::Int4 } else { Format::Int8 });
                let kept = unpacked(&whole);
                let off = want.iter().zip(&kept).map(|(want, kept)| (want - kept).abs()).fold(0.0, f32::max);
                assert!(off <= if tiles { 0.54 / 120.0 } else { 0.0 }, "{dtype:?} in whole numbers is {off} off");
                let product = [
                    Product { matrix: &whole, rows: 0..2, x_column: 0, y_column: 0, scale: 1.0 },
                    Product { matrix: &whole, rows: 2..m, x_column: 0, y_column: 0, scale: 1.0 },
                ];
                let all: Vec<Vec<f32>> = Simd::all()
                    .into_iter()
                    .map(|simd| {
                        let mut y = vec![0.0; m * n];
                        multiply(simd, &x, k, Batch { products: &product, y: &mut y, y_stride: n, add: false });
                        y
                    })
                    .collect();
                assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{dtype:?} in whole numbers");
                for (i, got) in all[0].iter().enumerate() {
                    let (row, feature) = (i / n, i % n);
                    let pairs = x[row * k..][..k].iter().zip(&kept[feature * k..][..k]);
                    let sum: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    assert!((f64::from(*got) - sum).abs() < 4.1e-3 * k as f64, "{dtype:?}: {got}, not {sum}");
                }
            }
        }
    }
}
