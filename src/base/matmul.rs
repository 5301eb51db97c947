//! Weight matrices repacked for the CPU, and the product of a batch of rows with them.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::base::simd::{self, GROUP, Group, LANES, Rows, Simd};
use crate::base::{RawTensor, Stored};
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;

/// How packed weights are stored. Products are computed in f32 whatever the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    F32,
    Bf16,
    F16,
    /// 8 bits a weight, a scale for [`GROUP`] of them along `k`.
    Q8,
    /// 4 bits a weight, a scale and a minimum for [`GROUP`] of them along `k`.
    Q4,
}

#[derive(Debug)]
enum Data {
    F32(Vec<f32>),
    /// bf16 or f16 bits.
    Half(Vec<u16>),
    Q8 {
        scales: Vec<[f32; LANES]>,
        q: Vec<i8>,
    },
    Q4 {
        scales: Vec<[f32; LANES]>,
        mins: Vec<[f32; LANES]>,
        q: Vec<u8>,
    },
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
    /// Packs `rows`, `n` rows of `k` weights, as `format`. The quantised formats need `k` in whole groups.
    ///
    /// # Panics
    /// If `rows` is not `n * k` long, or `k` not in whole groups for a quantised format.
    pub fn pack(rows: &[f32], n: usize, k: usize, format: Format) -> Self {
        assert_eq!(rows.len(), n * k);
        let at = |panel: usize, i: usize, lane: usize| {
            let row = panel * LANES + lane;
            if row < n { rows[row * k + i] } else { 0.0 }
        };
        let panels = n.div_ceil(LANES);
        let data = match format {
            Format::F32 => Data::F32(fill(panels, k, at)),
            Format::Bf16 => Data::Half(fill(panels, k, |p, i, l| bf16::from_f32(at(p, i, l)).to_bits())),
            Format::F16 => Data::Half(fill(panels, k, |p, i, l| f16::from_f32(at(p, i, l)).to_bits())),
            Format::Q8 => {
                let scales = per_group(panels, k, |panel, group, lane| {
                    let max = (0..GROUP).map(|i| at(panel, group * GROUP + i, lane).abs()).fold(0.0, f32::max);
                    max / 127.0
                });
                let groups = k / GROUP;
                let q = fill(panels, k, |panel, i, lane| {
                    let scale = scales[panel * groups + i / GROUP][lane];
                    if scale == 0.0 { 0 } else { (at(panel, i, lane) / scale).round() as i8 }
                });
                Data::Q8 { scales, q }
            }
            Format::Q4 => {
                let range = |panel: usize, group: usize, lane: usize| {
                    let values = (0..GROUP).map(|i| at(panel, group * GROUP + i, lane));
                    values.fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(v), high.max(v)))
                };
                let mins = per_group(panels, k, |p, g, l| range(p, g, l).0);
                let scales = per_group(panels, k, |p, g, l| (range(p, g, l).1 - range(p, g, l).0) / 15.0);
                let groups = k / GROUP;
                let nibble = |panel: usize, i: usize, lane: usize| {
                    let group = panel * groups + i / GROUP;
                    let scale = scales[group][lane];
                    if scale == 0.0 { 0 } else { ((at(panel, i, lane) - mins[group][lane]) / scale).round() as u8 }
                };
                let q = fill(panels, k / 2, |panel, i, lane| {
                    let k = i / (GROUP / 2) * GROUP + i % (GROUP / 2);
                    nibble(panel, k, lane) | nibble(panel, k + GROUP / 2, lane) << 4
                });
                Data::Q4 { scales, mins, q }
            }
        };
        PackedMatrix { n, k, format, data }
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

    /// Packs a tensor `[n, k]`. Without a `format`, f32, bf16 and f16 stay what they are, the block formats Q4_0, Q4_1 and
    /// Q8_0 keep their numbers, and other block formats are rounded to f16, which takes more memory than they do.
    ///
    /// A `k` that is not in whole groups cannot be quantised and becomes bf16.
    pub fn from_raw(raw: &RawTensor, format: Option<Format>) -> Result<Self> {
        let &[n, k] = raw.shape.as_slice() else {
            return Err(Error::unprocessable(format!("shape {:?}, where a matrix was expected", raw.shape)));
        };
        let quantised = |f| matches!(f, Format::Q8 | Format::Q4);
        match (format, raw.stored) {
            (None, Stored::Ggml(dtype @ (GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q8_0))) => {
                Ok(Self::from_blocks(&raw.bytes, n, k, dtype))
            }
            (Some(f), _) if quantised(f) && k % GROUP != 0 => Ok(Self::pack(&raw.to_f32()?, n, k, Format::Bf16)),
            (Some(f), _) => Ok(Self::pack(&raw.to_f32()?, n, k, f)),
            (None, Stored::F32) => Ok(Self::pack(&raw.to_f32()?, n, k, Format::F32)),
            (None, Stored::Bf16) => Ok(Self::pack(&raw.to_f32()?, n, k, Format::Bf16)),
            (None, _) => Ok(Self::pack(&raw.to_f32()?, n, k, Format::F16)),
        }
    }

    /// Lays ggml blocks of 32 out in panels, number by number the same.
    fn from_blocks(bytes: &[u8], n: usize, k: usize, dtype: GgmlDType) -> Self {
        let (panels, groups, size) = (n.div_ceil(LANES), k / GROUP, dtype.type_size());
        let block = |panel: usize, group: usize, lane: usize| {
            let row = panel * LANES + lane;
            (row < n).then(|| &bytes[(row * groups + group) * size..][..size])
        };
        let number = |b: &[u8], at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        let scales = per_group(panels, k, |p, g, l| block(p, g, l).map_or(0.0, |b| number(b, 0)));
        if dtype == GgmlDType::Q8_0 {
            let q = fill(panels, k, |p, i, l| block(p, i / GROUP, l).map_or(0, |b| b[2 + i % GROUP] as i8));
            return PackedMatrix { n, k, format: Format::Q8, data: Data::Q8 { scales, q } };
        }
        // Q4_0 is `d * (q - 8)`, Q4_1 is `d * q + m`. In both, byte i of a block holds weights i and i + 16.
        let first = if dtype == GgmlDType::Q4_0 { 2 } else { 4 };
        let mins = per_group(panels, k, |p, g, l| match block(p, g, l) {
            None => 0.0,
            Some(b) if dtype == GgmlDType::Q4_0 => -8.0 * number(b, 0),
            Some(b) => number(b, 2),
        });
        let half = GROUP / 2;
        let q = fill(panels, k / 2, |p, i, l| block(p, i / half, l).map_or(0, |b| b[first + i % half]));
        PackedMatrix { n, k, format: Format::Q4, data: Data::Q4 { scales, mins, q } }
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
            Data::Q8 { scales, q } => 4 * LANES * scales.len() + q.len(),
            Data::Q4 { scales, mins, q } => 4 * LANES * (scales.len() + mins.len()) + q.len(),
        }
    }

    fn panels(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    /// The weights `[k0..k0 + len][LANES]` of a panel; `k0` in whole groups, `len` at most a group.
    fn group(&self, panel: usize, k0: usize, len: usize) -> Group<'_> {
        let (start, len) = ((panel * self.k + k0) * LANES, len * LANES);
        let index = start / (GROUP * LANES);
        match &self.data {
            Data::F32(w) => Group::F32(&w[start..][..len]),
            Data::Half(w) if self.format == Format::F16 => Group::F16(&w[start..][..len]),
            Data::Half(w) => Group::Bf16(&w[start..][..len]),
            Data::Q8 { scales, q } => Group::Q8 { scale: &scales[index], q: &q[start..][..len] },
            Data::Q4 { scales, mins, q } => {
                Group::Q4 { scale: &scales[index], min: &mins[index], q: &q[start / 2..][..len / 2] }
            }
        }
    }

    /// Writes row `row` (`[k]`) to `out`: what an embedding looks up.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / LANES, row % LANES);
        let mut scratch = [0.0; GROUP * LANES];
        for (i, out) in out.chunks_mut(GROUP).enumerate() {
            simd::unpack(Simd::detect(), self.group(panel, i * GROUP, out.len()), &mut scratch);
            for (j, out) in out.iter_mut().enumerate() {
                *out = scratch[j * LANES + lane];
            }
        }
    }

    /// `y += scale * x Wᵀ` for the output features of some panels. `x` holds `m` rows; row `r` of the result starts at
    /// `r * y.stride` of `y`, its first number belongs to the first feature of the first panel.
    ///
    /// # Safety
    /// `y` is good for writing those elements, and nobody else touches them meanwhile.
    unsafe fn multiply_panels(&self, simd: Simd, panels: Range<usize>, m: usize, x: Rows, scale: f32, y: Target) {
        /// Panels computed side by side, so that a CPU that waits for one chain of additions has others to go on with.
        const SIDE: usize = 4;
        /// Rows that share one unpacking of the weights; their accumulators stay in the first-level cache.
        const ROWS: usize = 48;
        let mut acc = [[0.0f32; ROWS * LANES]; SIDE];
        let mut scratch = [0.0f32; GROUP * LANES];
        let first = panels.start;
        for row in (0..m).step_by(ROWS) {
            let rows = ROWS.min(m - row);
            let mut panel = first;
            while panel < panels.end {
                let side = SIDE.min(panels.end - panel);
                for acc in &mut acc[..side] {
                    acc[..rows * LANES].fill(0.0);
                }
                for k0 in (0..self.k).step_by(GROUP) {
                    let len = GROUP.min(self.k - k0);
                    let x = Rows { data: &x.data[row * x.stride + k0..], stride: x.stride };
                    for (p, acc) in acc[..side].iter_mut().enumerate() {
                        let group = self.group(panel + p, k0, len);
                        simd::multiply_group(simd, rows, x, group, acc, LANES, &mut scratch);
                    }
                }
                for (p, acc) in acc[..side].iter().enumerate() {
                    let feature = (panel + p) * LANES;
                    let lanes = LANES.min(self.n - feature);
                    for r in 0..rows {
                        // SAFETY: the caller's promise; the features of one panel are `lanes` numbers of one row.
                        unsafe {
                            let y = y.start.add((row + r) * y.stride + feature - first * LANES);
                            let y = std::slice::from_raw_parts_mut(y, lanes);
                            for (y, a) in y.iter_mut().zip(&acc[r * LANES..]) {
                                *y += scale * a;
                            }
                        }
                    }
                }
                panel += side;
            }
        }
    }
}

/// `f(panel, i, lane)` for every weight, in the order of the packed layout. Panels are filled in parallel.
fn fill<T: Copy + Default + Send>(panels: usize, k: usize, f: impl Fn(usize, usize, usize) -> T + Sync) -> Vec<T> {
    let mut out = vec![T::default(); panels * k * LANES];
    out.par_chunks_mut((k * LANES).max(1)).enumerate().for_each(|(panel, out)| {
        for (i, out) in out.chunks_exact_mut(LANES).enumerate() {
            for (lane, out) in out.iter_mut().enumerate() {
                *out = f(panel, i, lane);
            }
        }
    });
    out
}

/// `f(panel, group, lane)` for every group of weights.
fn per_group(panels: usize, k: usize, f: impl Fn(usize, usize, usize) -> f32 + Sync) -> Vec<[f32; LANES]> {
    assert_eq!(k % GROUP, 0);
    let groups = k / GROUP;
    (0..panels * groups).into_par_iter().map(|i| std::array::from_fn(|lane| f(i / groups, i % groups, lane))).collect()
}

/// Where a matrix's product goes: some rows of a batch, a range of columns of the result.
pub struct Product<'a> {
    pub matrix: &'a PackedMatrix,
    /// Rows of `x` and of `y`.
    pub rows: Range<usize>,
    /// First input feature in a row of `x`.
    pub x_column: usize,
    /// First output feature in a row of `y`.
    pub y_column: usize,
    pub scale: f32,
}

/// Rows of results, `stride` numbers apart.
#[derive(Clone, Copy)]
struct Target {
    start: *mut f32,
    stride: usize,
}
// SAFETY: tasks write disjoint elements, see `multiply`.
unsafe impl Send for Target {}
unsafe impl Sync for Target {}

/// `y[rows, columns] += scale * x[rows, ..k] Wᵀ` for each product, all in one parallel region. `x` has rows of
/// `x_stride` numbers, `y` of `y_stride`.
///
/// # Panics
/// If a product lies outside `x` or `y`, or they are not in ascending order of rows and, for the same rows, of columns,
/// without overlap.
pub fn multiply(simd: Simd, products: &[Product], x: &[f32], x_stride: usize, y: &mut [f32], y_stride: usize) {
    /// Multiply-adds worth handing to another thread.
    const GRAIN: usize = 1 << 16;
    let mut last: Option<&Product> = None;
    for p in products {
        assert!(p.rows.end * x_stride <= x.len() && p.x_column + p.matrix.k <= x_stride);
        assert!(p.rows.end * y_stride <= y.len() && p.y_column + p.matrix.n <= y_stride);
        assert!(last.is_none_or(|q| match q.rows == p.rows {
            true => q.y_column + q.matrix.n <= p.y_column,
            false => q.rows.end <= p.rows.start,
        }));
        last = Some(p);
    }
    let threads = rayon::current_num_threads();
    let total: usize = products.iter().map(|p| p.rows.len() * p.matrix.n * p.matrix.k).sum();
    // A few tasks a thread even out what other programs take of the cores; more would cost more than they save.
    let task = (total / (4 * threads)).max(GRAIN);
    let mut tasks = Vec::with_capacity(6 * threads);
    for (i, p) in products.iter().enumerate() {
        let per_panel = (p.rows.len() * LANES * p.matrix.k).max(1);
        let step = (task / per_panel).max(1).next_multiple_of(4);
        let panels = p.matrix.panels();
        tasks.extend((0..panels).step_by(step).map(|start| (i, start..(start + step).min(panels))));
    }
    let y = Target { start: y.as_mut_ptr(), stride: y_stride };
    let run = |(i, panels): &(usize, Range<usize>)| {
        let p = &products[*i];
        let (x, m) = (&x[p.rows.start * x_stride + p.x_column..], p.rows.len());
        let target = y;
        // SAFETY: the asserts above keep the elements inside `y`; panels of one product are disjoint, and so are products.
        unsafe {
            let start = target.start.add(p.rows.start * y_stride + p.y_column + panels.start * LANES);
            let y = Target { start, stride: y_stride };
            p.matrix.multiply_panels(simd, panels.clone(), m, Rows { data: x, stride: x_stride }, p.scale, y);
        }
    };
    if tasks.len() <= 1 || total < 2 * GRAIN {
        tasks.iter().for_each(run);
    } else {
        tasks.par_iter().with_max_len(1).for_each(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed | 1;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

    fn unpacked(matrix: &PackedMatrix) -> Vec<f32> {
        let mut rows = vec![0.0; matrix.n * matrix.k];
        rows.chunks_exact_mut(matrix.k).enumerate().for_each(|(i, row)| matrix.row(i, row));
        rows
    }

    const FORMATS: [Format; 5] = [Format::F32, Format::Bf16, Format::F16, Format::Q8, Format::Q4];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn products_equal_the_plain_sum_and_rows_do_not_depend_on_each_other(
            m in 1usize..70, n in 1usize..90, groups in 1usize..4, odd in 0usize..31, seed in any::<u64>()
        ) {
            let mut next = numbers(seed);
            for format in FORMATS {
                let k = if matches!(format, Format::Q8 | Format::Q4) { groups * GROUP } else { groups * GROUP + odd };
                let weights: Vec<f32> = (0..n * k).map(|_| next()).collect();
                let matrix = PackedMatrix::pack(&weights, n, k, format);
                let kept = unpacked(&matrix);
                let loss = match format { Format::F32 => 0.0, Format::Bf16 => 4e-3, Format::F16 => 5e-4, Format::Q8 => 4e-3, Format::Q4 => 7e-2 };
                for (a, b) in weights.iter().zip(&kept) {
                    prop_assert!((a - b).abs() <= loss, "{format:?}: {a} became {b}");
                }
                let x: Vec<f32> = (0..m * k).map(|_| next()).collect();
                let product = |rows| [Product { matrix: &matrix, rows, x_column: 0, y_column: 1, scale: 2.0 }];
                for simd in Simd::all() {
                    let mut y = vec![1.0; m * (n + 2)];
                    multiply(simd, &product(0..m), &x, k, &mut y, n + 2);
                    for r in 0..m {
                        let mut alone = vec![1.0; n + 2];
                        multiply(simd, &product(0..1), &x[r * k..][..k], k, &mut alone, n + 2);
                        prop_assert_eq!(&alone[..], &y[r * (n + 2)..][..n + 2]);
                        prop_assert_eq!((alone[0], alone[n + 1]), (1.0, 1.0));
                        for j in 0..n {
                            let sum: f64 = (0..k).map(|i| x[r * k + i] as f64 * kept[j * k + i] as f64).sum();
                            prop_assert!((alone[j + 1] as f64 - 1.0 - 2.0 * sum).abs() < 1e-4 * k as f64);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn ggml_blocks_keep_their_numbers() {
        use candle_core::quantized::{k_quants, k_quants::GgmlType};
        let (n, k) = (21, 96);
        let mut next = numbers(7);
        let weights: Vec<f32> = (0..n * k).map(|_| next()).collect();
        fn check<T: GgmlType + Clone>(weights: &[f32], n: usize, k: usize, dtype: GgmlDType) {
            let mut blocks = vec![T::zeros(); n * k / GROUP];
            T::from_float(weights, &mut blocks);
            let mut want = vec![0.0; n * k];
            T::to_float(&blocks, &mut want);
            // SAFETY: the block types are plain data without padding.
            let bytes =
                unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast::<u8>(), std::mem::size_of_val(&blocks[..])) };
            assert_eq!(unpacked(&PackedMatrix::from_blocks(bytes, n, k, dtype)), want);
        }
        check::<k_quants::BlockQ4_0>(&weights, n, k, GgmlDType::Q4_0);
        check::<k_quants::BlockQ4_1>(&weights, n, k, GgmlDType::Q4_1);
        check::<k_quants::BlockQ8_0>(&weights, n, k, GgmlDType::Q8_0);
    }
}
