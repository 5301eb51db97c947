//! How a step's delta is dealt out to the blocks of the CUDA kernels (`src/cuda/kernels/lora.cu`).

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};

use super::packed::{Factor, PackedSite, Vector};
use crate::base::Site;
use crate::cuda::{self, Argument, Launch, Machine, Memory, Module, Tiles};

const SHRINK_THREADS: u32 = 128;
const SHRINK_ROWS: usize = 4;
const SHRINK_RANKS: usize = 16;
const SHRINK_K: usize = 512;
const EXPAND_THREADS: u32 = 64;
const EXPAND_ROWS: usize = 4;
pub(super) const EXPAND_COLUMNS: usize = EXPAND_THREADS as usize * 8;
const MANY_THREADS: u32 = 128;
const MANY_ROWS: usize = 32;
pub(super) const MANY_RANKS: usize = 64;
const MANY_K: usize = 2048;
const MANY_COLUMNS: usize = 256;

/// Rows of a segment from which on tensor cores compute it, in bf16.
const MANY: usize = 16;

/// The launches for one fused layer.
#[derive(Debug)]
pub(super) struct SiteTiles {
    shrink: Tiles,
    shrink_many: Tiles,
    expand: Tiles,
    expand_many: Tiles,
    /// Input features.
    k: usize,
    /// Numbers of h: for each segment `[splits, rows, ranks]`.
    h: usize,
    /// Whether eight numbers are read at a time.
    vector: bool,
    dtype: DType,
}

/// The launches of a step. Their tiles are uploaded together.
#[derive(Debug, Default)]
pub(super) struct StepTiles {
    pub words: Vec<u32>,
    pub sites: HashMap<(usize, Site), SiteTiles>,
}

/// Where a kernel finds what is told about a projection: its part, its gain and its shift.
struct Projection<'a> {
    columns: Range<usize>,
    /// B, its first rank among those of h, and the scale.
    pair: Option<(&'a Factor, usize, f32)>,
    gain: Option<&'a Vector>,
    shift: Option<&'a Vector>,
}

fn projections(site: &PackedSite) -> Vec<Projection<'_>> {
    let mut all = vec![];
    for part in &site.parts {
        let columns = part.column..part.column + part.b.n();
        let pair = Some((&part.b, part.rank_start, part.scale));
        all.push(Projection { columns, pair, gain: None, shift: None });
    }
    for finish in &site.finishes {
        let at = all.iter().position(|p| p.columns == finish.columns).unwrap_or_else(|| {
            all.push(Projection { columns: finish.columns.clone(), pair: None, gain: None, shift: None });
            all.len() - 1
        });
        (all[at].gain, all[at].shift) = (finish.gain.as_ref(), finish.shift.as_ref());
    }
    all
}

/// Which output features of a factor lie in one piece, and where: by rows as `[features, k]`, by columns as `[k, features]`.
fn pieces(
    factor: &Factor,
    by_columns: bool,
    address: &mut impl FnMut(&Tensor) -> Result<u64>,
) -> Result<Vec<(Range<usize>, u64)>> {
    Ok(match factor {
        Factor::Paged { blocks, .. } => blocks.iter().map(|block| (block.range.clone(), block.at)).collect(),
        Factor::Tensor(t) if by_columns => vec![(0..factor.n(), address(&t.t()?)?)],
        _ => vec![(0..factor.n(), address(factor.tensor())?)],
    })
}

/// Parts of at most `size`.
pub(super) fn cut(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(size).map(move |start| start..(start + size).min(range.end))
}

impl StepTiles {
    /// Adds the launches for a fused layer: rows of the step and what their adapters change, in numbers of `dtype`.
    /// `address` gives the address of a tensor without gaps.
    pub fn add(
        &mut self,
        place: (usize, Site),
        segments: &[(&Range<usize>, &PackedSite)],
        dtype: DType,
        address: &mut impl FnMut(&Tensor) -> Result<u64>,
    ) -> Result<()> {
        let (mut shrink, mut shrink_many, mut expand, mut expand_many) = (vec![], vec![], vec![], vec![]);
        let (mut k, mut h, mut width) = (0, 0, 0);
        let mut vector = true;
        let eights = |range: &Range<usize>| range.start.is_multiple_of(8) && range.end.is_multiple_of(8);
        for (_, site) in segments {
            width = site.width;
            if let Some(a) = &site.a {
                k = a.k();
            }
            vector &= site.parts.iter().all(|p| eights(&(p.column..p.column + p.b.n())));
            vector &= site.finishes.iter().all(|f| eights(&f.columns));
        }
        vector &= k.is_multiple_of(8) && width.is_multiple_of(8);
        let number = dtype.size_in_bytes();
        for &(rows, site) in segments {
            let many = dtype == DType::BF16 && vector && rows.len() >= MANY;
            let (tile_rows, split) = if many { (MANY_ROWS, MANY_K) } else { (SHRINK_ROWS, SHRINK_K) };
            let (ranks, splits) = (site.a.as_ref().map_or(0, |a| a.n()), k.div_ceil(split));
            let (own, h_split) = (h, rows.len() * ranks);
            h += splits * h_split;
            if let Some(a) = &site.a {
                let pieces = pieces(a, false, address)?;
                let (tiles, size) = if many { (&mut shrink_many, MANY_RANKS) } else { (&mut shrink, SHRINK_RANKS) };
                for part in cut(rows.clone(), tile_rows) {
                    let some = pieces.iter().flat_map(|(piece, a)| {
                        cut(piece.clone(), size)
                            .map(move |some| (a + ((some.start - piece.start) * k * number) as u64, some))
                    });
                    for (a, some) in some {
                        let [low, high] = cuda::words(a);
                        let h = own + (part.start - rows.start) * ranks + some.start;
                        let sizes = [part.start, part.len(), some.len(), h, ranks, h_split].map(|x| x as u32);
                        let [row, rows, ranks, h, stride, split] = sizes;
                        tiles.push([low, high, row, rows, ranks, h, stride, split]);
                    }
                }
            }
            let (tiles, tile_rows, size) = match many {
                true => (&mut expand_many, MANY_ROWS, MANY_COLUMNS),
                false => (&mut expand, EXPAND_ROWS, EXPAND_COLUMNS),
            };
            for Projection { columns, pair, gain, shift } in projections(site) {
                let (pieces, rank, first, scale) = match pair {
                    Some((b, first, scale)) => (pieces(b, true, address)?, b.k(), first, scale),
                    None => (vec![(0..columns.len(), 0)], 0, 0, 0.0),
                };
                let mut vector = |v: Option<&Vector>| match v {
                    None => Ok(0),
                    Some(Vector::Paged(block)) => Ok(block.at),
                    Some(v) => address(v.tensor()),
                };
                let (gain, shift) = (vector(gain)?, vector(shift)?);
                for part in cut(rows.clone(), tile_rows) {
                    let some =
                        pieces.iter().flat_map(|(piece, b)| cut(piece.clone(), size).map(move |s| (piece, *b, s)));
                    for (piece, b, some) in some {
                        let from = |start: u64, before: usize| match start {
                            0 => [0, 0],
                            start => cuda::words(start + ((some.start - before) * number) as u64),
                        };
                        let [b0, b1] = from(b, piece.start);
                        let ([gain0, gain1], [shift0, shift1]) = (from(gain, 0), from(shift, 0));
                        let h = own + (part.start - rows.start) * ranks + first;
                        let sizes = [part.start, part.len(), columns.start + some.start, some.len(), rank, piece.len()];
                        let [row, rows, column, columns, rank, b_stride] = sizes.map(|x| x as u32);
                        let [h, h_stride, h_split, splits] = [h, ranks, h_split, splits].map(|x| x as u32);
                        tiles.push([
                            b0,
                            b1,
                            gain0,
                            gain1,
                            shift0,
                            shift1,
                            row,
                            rows,
                            column,
                            columns,
                            rank,
                            b_stride,
                            h,
                            h_stride,
                            h_split,
                            splits,
                            scale.to_bits(),
                            0,
                        ]);
                    }
                }
            }
        }
        if u32::try_from(h).is_err() {
            bail!("{h} sums of a step's low-rank products; the kernels count to 2^32");
        }
        let words = &mut self.words;
        let (shrink, shrink_many) = (Tiles::append(words, &shrink), Tiles::append(words, &shrink_many));
        let (expand, expand_many) = (Tiles::append(words, &expand), Tiles::append(words, &expand_many));
        self.sites.insert(place, SiteTiles { shrink, shrink_many, expand, expand_many, k, h, vector, dtype });
        Ok(())
    }
}

impl SiteTiles {
    /// Adds the delta. `words` is where the step's words lie, `x` where the rows of k numbers, `y` where the rows of `y_stride`
    /// numbers.
    ///
    /// # Safety
    /// `x` and `y` have all rows of the step, and the step's tensors are there.
    pub unsafe fn launch<M: Machine>(&self, machine: &M, words: u64, x: u64, y: u64, y_stride: usize) -> Result<()> {
        let Some(suffix) = cuda::suffix(self.dtype, self.vector) else { bail!("no kernels for {:?}", self.dtype) };
        if self.vector && !(x.is_multiple_of(16) && y.is_multiple_of(16)) {
            bail!("rows are not at multiples of 16 bytes");
        }
        let h = machine.reserve(self.h)?;
        let (x, h, y) = (Argument::Address(x), Argument::Address(h.address()), Argument::Address(y));
        let (k, y_stride) = (Argument::Word(self.k as u32), Argument::Word(y_stride as u32));
        let run = |kernel: &str, tiles: Tiles, splits: usize, threads: u32, rest: [Argument; 3]| {
            if tiles.count == 0 {
                return Ok(());
            }
            let [a, b, c] = rest;
            let (grid, arguments) = ([tiles.count, splits, 1], &[tiles.address(words), a, b, c]);
            // SAFETY: these are the parameters of the kernels in lora.cu; the rest is the caller's promise.
            unsafe { machine.launch(&Launch { module: Module::Lora, kernel, grid, threads, arguments }) }
        };
        run(&format!("shrink_{suffix}"), self.shrink, self.k.div_ceil(SHRINK_K), SHRINK_THREADS, [x, h, k])?;
        run("shrink_many", self.shrink_many, self.k.div_ceil(MANY_K), MANY_THREADS, [x, h, k])?;
        run(&format!("expand_{suffix}"), self.expand, 1, EXPAND_THREADS, [h, y, y_stride])?;
        run("expand_many", self.expand_many, 1, MANY_THREADS, [h, y, y_stride])
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::base::testing::noise;
    use crate::cuda::emulator::{Emulator, LORA};
    use crate::lora::op::AddDelta;
    use crate::lora::packed::{Finish, Part};
    use crate::lora::pool::tests::HostUploads;
    use crate::lora::pool::{Blocks, Pages};

    /// A segment: rows without an adapter before it, its rows, and for each projection the rank (0 for no pair), whether there
    /// is a gain, and a shift.
    type Rows = (usize, usize, Vec<(usize, bool, bool)>);

    struct Case {
        dtype: DType,
        k: usize,
        /// Output features of each projection.
        n: Vec<usize>,
        segments: Vec<Rows>,
        seed: u64,
        /// Bytes of a page of a pool that the adapters are on.
        page: Option<usize>,
    }

    impl Case {
        /// Numbers such that a sum of `terms` of them is about 1.
        fn tensor(&self, next: &mut impl FnMut() -> f32, shape: (usize, usize), terms: usize) -> Tensor {
            let size = 1.0 / (terms as f32).sqrt();
            let numbers: Vec<f32> = (0..shape.0 * shape.1).map(|_| size * next()).collect();
            Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap().to_dtype(self.dtype).unwrap()
        }

        fn site(&self, own: &[(usize, bool, bool)], next: &mut impl FnMut() -> f32) -> PackedSite {
            let (mut parts, mut finishes, mut rank_start, mut column) = (vec![], vec![], 0, 0);
            for (&n, &(rank, gain, shift)) in self.n.iter().zip(own) {
                if rank > 0 {
                    let scale = 0.5 + parts.len() as f32;
                    let b = Factor::Tensor(self.tensor(next, (rank, n), rank).t().unwrap());
                    parts.push(Part { b, rank_start, column, scale });
                    rank_start += rank;
                }
                if gain || shift {
                    let mut vector = |there: bool| there.then(|| Vector::Tensor(self.tensor(next, (1, n), 1)));
                    finishes.push(Finish { columns: column..column + n, gain: vector(gain), shift: vector(shift) });
                }
                column += n;
            }
            let a = (rank_start > 0).then(|| Factor::Tensor(self.tensor(next, (rank_start, self.k), self.k)));
            PackedSite { a, parts, finishes, width: column }
        }

        /// The same on pages.
        fn paged(&self, site: &PackedSite, page: usize) -> (PackedSite, Pages) {
            let numbers = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut blocks = Blocks::new(self.dtype, page);
            let a = site.a.as_ref().map(|a| {
                let (n, k) = (a.n(), a.k());
                Factor::Paged { blocks: blocks.by_rows(&numbers(a.tensor()), n, k).unwrap(), n, k }
            });
            let part = |part: &Part| {
                let (n, k) = (part.b.n(), part.b.k());
                let b = Factor::Paged { blocks: blocks.by_columns(&numbers(part.b.tensor()), n, k).unwrap(), n, k };
                Part { b, ..*part }
            };
            let parts = site.parts.iter().map(part).collect();
            let finish = |finish: &Finish| {
                let mut vector = |v: &Option<Vector>| {
                    v.as_ref().map(|v| Vector::Paged(blocks.vector(&numbers(v.tensor())).unwrap()))
                };
                Finish { columns: finish.columns.clone(), gain: vector(&finish.gain), shift: vector(&finish.shift) }
            };
            let finishes = site.finishes.iter().map(finish).collect();
            let mut paged = PackedSite { a, parts, finishes, width: site.width };
            let layout = blocks.into_layout();
            let pool = HostUploads::pool(page, layout.pages());
            let (pages, addresses) = pool.place(&layout, 0).unwrap().unwrap();
            paged.blocks().for_each(|block| block.at = addresses[block.at as usize]);
            (paged, pages)
        }

        /// The largest difference between the emulated kernels and the plain formula, over what rounding allows.
        fn worst(&self, machine: &Emulator) -> Result<f32> {
            let mut next = noise(self.seed);
            let (mut rows, mut segments) = (0, vec![]);
            for (gap, count, own) in &self.segments {
                segments.push((rows + gap..rows + gap + count, self.site(own, &mut next)));
                rows += gap + count;
            }
            let segments: Vec<_> = segments.iter().map(|(rows, site)| (rows, site)).collect();
            let width: usize = self.n.iter().sum();
            let (x, y) = (self.tensor(&mut next, (rows, self.k), 1), self.tensor(&mut next, (rows, width), 1));
            let paged: Option<Vec<_>> =
                self.page.map(|page| segments.iter().map(|(rows, site)| (*rows, self.paged(site, page))).collect());
            let on_gpu = match &paged {
                Some(paged) => paged.iter().map(|(rows, (site, _))| (*rows, site)).collect(),
                None => segments.clone(),
            };
            let mut step = StepTiles::default();
            step.add((0, Site::Qkv), &on_gpu, self.dtype, &mut |t| machine.copy(t))?;
            let (words, copied) = (machine.upload(&step.words)?, machine.copy(&y)?);
            // SAFETY: these are the step's rows.
            unsafe {
                step.sites[&(0, Site::Qkv)].launch(machine, words.address(), machine.copy(&x)?, copied, width)?;
            }
            y.inplace_op2(&x, &AddDelta::plain(segments))?;
            let want = y.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            // Half a unit of the last place by each, and what the order of a sum makes.
            let unit = match self.dtype {
                DType::BF16 => 2f32.powi(-7),
                DType::F16 => 2f32.powi(-10),
                _ => 0.0,
            };
            let of = |(got, want): (&f32, &f32)| match got.is_finite() {
                true => (got - want).abs() / (unit * want.abs() + 1e-4),
                false => f32::INFINITY,
            };
            Ok(machine.read(copied, &y).iter().zip(&want).map(of).fold(0.0, f32::max))
        }
    }

    fn segments() -> impl Strategy<Value = Vec<Rows>> {
        let rank = prop::sample::select(vec![0usize, 0, 1, 3, 8, 16, 33, 64, 128, 136]);
        let own = prop::collection::vec((rank, any::<bool>(), any::<bool>()), 3);
        let rows = prop_oneof![Just(0usize), Just(1), 2usize..6, 6usize..70];
        prop::collection::vec((0usize..3, rows, own), 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn emulated_kernels_equal_the_plain_formula(
            dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16, DType::BF16]),
            k in prop_oneof![1usize..600, (1usize..80).prop_map(|k| 8 * k), Just(2056usize)],
            n in prop_oneof![
                prop::collection::vec(1usize..40, 3),
                prop::collection::vec((1usize..90).prop_map(|n| 8 * n), 3)],
            segments in segments(),
            // At the smallest a few ranks of A, and a few columns of B, go into one.
            page in prop::option::of(prop::sample::select(vec![16usize << 10, 64 << 10])),
            seed in any::<u64>(),
        ) {
            let case = Case { dtype, k, n, segments, seed, page };
            let worst = case.worst(&Emulator::new(LORA, seed)).unwrap();
            prop_assert!(worst <= 1.0, "off by {worst} times what rounding allows");
        }
    }

    #[test]
    fn mistakes_in_kernels_are_found() {
        let case = |rows: usize, rank: usize| {
            let segments = vec![(1, rows, vec![(rank, true, false), (8, false, true)])];
            Case { dtype: DType::BF16, k: 1024, n: vec![64, 24], segments, seed: 7, page: None }
        };
        let right = Emulator::new(LORA, 1);
        // Of two barriers in `expand` each, sums of ranks that are not there are read, or are overwritten too early.
        for (rows, rank, from, to) in [
            (3, 16, "__syncthreads();  // All are written.", ""),
            (3, 160, "__syncthreads();  // All have read the ranks before.", ""),
            (20, 16, "__syncthreads();\n  float* out", "float* out"),
            (3, 16, "tile.row + min(r, tile.rows - 1)", "tile.row + min(r + 1, tile.rows - 1)"),
            (
                3,
                16,
                "sum += p[static_cast<size_t>(split) * tile.h_split]",
                "sum = p[static_cast<size_t>(split) * tile.h_split]",
            ),
            (
                20,
                16,
                "coarse[m][2 + half] = pair_of(sums[2], sums[3])",
                "coarse[m][2 + half] = pair_of(sums[3], sums[2])",
            ),
        ] {
            let case = case(rows, rank);
            assert!(case.worst(&right).unwrap() <= 1.0);
            let worst = case.worst(&Emulator::mistaken(LORA, &[(from, to)]));
            assert!(
                worst.as_ref().map_or(true, |&worst| worst > 1.0),
                "{from:?} became {to:?}, and nobody noticed: {worst:?}"
            );
        }
    }

    #[test]
    fn sizes_are_those_of_the_kernels() {
        for (name, size) in [
            ("SHRINK_THREADS", SHRINK_THREADS as usize),
            ("SHRINK_ROWS", SHRINK_ROWS),
            ("SHRINK_RANKS", SHRINK_RANKS),
            ("SHRINK_K", SHRINK_K),
            ("EXPAND_THREADS", EXPAND_THREADS as usize),
            ("EXPAND_ROWS", EXPAND_ROWS),
            ("MANY_THREADS", MANY_THREADS as usize),
            ("MANY_ROWS", MANY_ROWS),
            ("MANY_RANKS", MANY_RANKS),
            ("MANY_K", MANY_K),
            ("MANY_COLUMNS", MANY_COLUMNS),
        ] {
            assert!(LORA.contains(&format!("constexpr unsigned {name} = {size};")), "{name}");
        }
    }
}
