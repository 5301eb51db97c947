//! Attention over the paged KV cache as an operation of candle's, with the plain formula for a CPU beside the kernels for a
//! GPU (`src/cuda/kernels/attention.cu`).

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, WithDType, bail};

use crate::base::SequenceRows;

/// Heads of the keys, and what a row sees.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub kv_heads: usize,
    /// Queries that share a head of keys.
    pub group: usize,
    pub head_dim: usize,
    /// Whether a row sees no later one.
    pub causal: bool,
    /// Positions that a row sees at most, up to its own.
    pub window: Option<usize>,
    pub scale: f32,
    pub softcap: Option<f32>,
}

impl Heads {
    fn count(&self) -> usize {
        self.kv_heads * self.group
    }
}

/// Softmax over the scores of what a row sees, times the values. The queries are `[rows, heads * head_dim]`, as is the result;
/// keys and values are `[slots, kv_heads * head_dim]`, all in the same numbers. Sums are in f32.
pub(super) struct PagedAttention<'a> {
    pub heads: Heads,
    pub sequences: &'a [SequenceRows<'a>],
    /// The launches, and the address of the step's words.
    #[cfg(feature = "cuda")]
    pub tiles: Option<(&'a tiles::AttentionTiles, u64)>,
}

impl PagedAttention<'_> {
    fn attend<T: WithDType>(&self, [q, keys, values]: [&[T]; 3]) -> Vec<T> {
        let Heads { kv_heads, group, head_dim, causal, window, scale, softcap } = self.heads;
        let (width, kv_width) = (self.heads.count() * head_dim, kv_heads * head_dim);
        let floats = |x: &[T]| x.iter().map(|x| x.to_f64() as f32).collect::<Vec<f32>>();
        let mut out = vec![T::from_f64(0.0); q.len()];
        for s in self.sequences {
            let length = s.start + s.rows.len();
            let fetch = |t: &[T]| -> Vec<Vec<f32>> {
                (0..length).map(|p| floats(&t[s.slot(p) * kv_width..][..kv_width])).collect()
            };
            let (keys, values) = (fetch(keys), fetch(values));
            for (i, row) in s.rows.clone().enumerate() {
                let end = if causal { s.start + i + 1 } else { length };
                let seen = end.saturating_sub(window.unwrap_or(end))..end;
                for head in 0..kv_heads * group {
                    let at = head / group * head_dim;
                    let q = floats(&q[row * width + head * head_dim..][..head_dim]);
                    let score = |key: &Vec<f32>| {
                        let score = scale * q.iter().zip(&key[at..]).map(|(q, k)| q * k).sum::<f32>();
                        softcap.map_or(score, |cap| cap * (score / cap).tanh())
                    };
                    let scores: Vec<f32> = keys[seen.clone()].iter().map(score).collect();
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let (mut total, mut sums) = (0.0, vec![0.0; head_dim]);
                    for (score, value) in scores.iter().zip(&values[seen.clone()]) {
                        let weight = (score - max).exp();
                        total += weight;
                        sums.iter_mut().zip(&value[at..]).for_each(|(sum, v)| *sum += weight * v);
                    }
                    let out = &mut out[row * width + head * head_dim..][..head_dim];
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = T::from_f64(f64::from(sum / total)));
                }
            }
        }
        out
    }
}

impl CustomOp3 for PagedAttention<'_> {
    fn name(&self) -> &'static str {
        "paged-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let layouts = [q_layout, keys_layout, values_layout];
        let [Some(of_q), Some(of_keys), Some(of_values)] = layouts.map(Layout::contiguous_offsets) else {
            bail!("queries, keys or values have gaps")
        };
        macro_rules! attend {
            ($($numbers:ident),*) => {
                match (q, keys, values) {
                    $((CpuStorage::$numbers(q), CpuStorage::$numbers(k), CpuStorage::$numbers(v)) => {
                        let parts = [&q[of_q.0..of_q.1], &k[of_keys.0..of_keys.1], &v[of_values.0..of_values.1]];
                        CpuStorage::$numbers(self.attend(parts))
                    })*
                    _ => bail!("attention is in f32, f16 or bf16, all of it"),
                }
            };
        }
        Ok((attend!(F32, F16, BF16), q_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &candle_core::CudaStorage,
        q_layout: &Layout,
        keys: &candle_core::CudaStorage,
        keys_layout: &Layout,
        values: &candle_core::CudaStorage,
        values_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};

        use crate::cuda::gpu::storage_address;
        let Some((tiles, words)) = self.tiles else { bail!("attention is laid out for a CPU") };
        let layouts = [q_layout, keys_layout, values_layout];
        if !layouts.into_iter().all(Layout::is_contiguous) {
            bail!("queries, keys or values have gaps");
        }
        let (device, shape) = (q.device(), q_layout.shape());
        // SAFETY: the kernels write all of it.
        let out = unsafe { device.alloc_uninit(shape, q.dtype()) }?;
        let [q, keys, values] = [(q, q_layout), (keys, keys_layout), (values, values_layout)];
        let addresses = [
            storage_address(q.0, q.1)?,
            storage_address(keys.0, keys.1)?,
            storage_address(values.0, values.1)?,
            storage_address(&out, &Layout::contiguous(shape))?,
        ];
        // SAFETY: the tiles are of these rows, and the block tables of this cache.
        unsafe { tiles.launch(device, words, &self.heads, q.0.dtype(), addresses) }?;
        Ok((out, shape.clone()))
    }
}

/// How the attention of a step is dealt out to blocks.
#[cfg(any(feature = "cuda", test))]
pub(super) mod tiles {
    use candle_core::{DType, Result, bail};

    use super::Heads;
    use crate::base::{BLOCK, SequenceRows};
    use crate::cuda::{self, Argument, Launch, Machine, Memory, Module, Tiles};

    const ATTEND_THREADS: u32 = 128;
    const QUERIES: usize = 8;
    const MANY_QUERIES: usize = 64;
    pub(in crate::base) const MAX_HEAD_DIM: usize = 256;
    const MERGE_THREADS: u32 = 128;
    const WHOLE: u32 = u32::MAX;

    /// Rows of a sequence up to which several tiles share its keys.
    const FEW_ROWS: usize = 8;
    /// Keys of a tile then.
    const KEYS: usize = 512;
    /// Queries of a sequence, for a head of keys, from which on tensor cores compute it, in bf16.
    const MANY: usize = 32;

    /// The launches of a step; those of all layers are the same.
    #[derive(Debug, Default)]
    pub struct AttentionTiles {
        pub words: Vec<u32>,
        few: Tiles,
        many: Tiles,
        merge: Tiles,
        /// Block tables, one after the other.
        table: Tiles,
        /// Rows of partial results.
        parts: usize,
    }

    /// Whether the tensor cores' kernel is for such heads.
    fn suits_tensor_cores(heads: &Heads, dtype: DType) -> bool {
        dtype == DType::BF16 && heads.head_dim.is_multiple_of(8) && heads.head_dim <= 128
    }

    impl AttentionTiles {
        pub fn new(heads: &Heads, dtype: DType, sequences: &[SequenceRows]) -> Self {
            let (mut few, mut many, mut merge, mut table, mut parts) = (vec![], vec![], vec![], vec![], 0);
            for s in sequences {
                let (count, length) = (s.rows.len(), s.start + s.rows.len());
                let first_block = table.len();
                table.extend_from_slice(&s.blocks[..length.div_ceil(BLOCK)]);
                let on_tensor_cores = suits_tensor_cores(heads, dtype) && count * heads.group >= MANY;
                let queries = if on_tensor_cores { MANY_QUERIES } else { QUERIES };
                let step = (queries / heads.group).max(1);
                for start in (0..count).step_by(step) {
                    let rows = step.min(count - start);
                    let seen = |row: usize| if heads.causal { s.start + row + 1 } else { length };
                    let (row, end) = (s.rows.start + start, seen(start + rows - 1));
                    let shares = if count <= FEW_ROWS { end.div_ceil(KEYS) } else { 1 };
                    let keys = if shares == 1 { end } else { KEYS };
                    for share in 0..shares {
                        let part = if shares == 1 { WHOLE } else { (parts + share * rows) as u32 };
                        let sizes = [row, rows, seen(start), first_block, share * keys, end.min((share + 1) * keys)];
                        let [row, rows, seen, table, from, to] = sizes.map(|x| x as u32);
                        let tiles = if on_tensor_cores { &mut many } else { &mut few };
                        tiles.push([row, rows, seen, table, from, to, part, 0]);
                    }
                    if shares > 1 {
                        merge.extend((0..rows).map(|i| [row + i, parts + i, rows, shares].map(|x| x as u32)));
                        parts += shares * rows;
                    }
                }
            }
            if table.len() % 2 == 1 {
                table.push(0);
            }
            let mut words = vec![];
            let (few, many) = (Tiles::append(&mut words, &few), Tiles::append(&mut words, &many));
            let (merge, table) =
                (Tiles::append(&mut words, &merge), Tiles::append(&mut words, table.as_chunks::<2>().0));
            AttentionTiles { words, few, many, merge, table, parts }
        }

        /// Attends: `addresses` are those of the queries, keys, values and the result.
        ///
        /// # Safety
        /// There are as many numbers as the sequences, with which this was made, and their blocks say.
        pub unsafe fn launch<M: Machine>(
            &self,
            machine: &M,
            words: u64,
            heads: &Heads,
            dtype: DType,
            addresses: [u64; 4],
        ) -> Result<()> {
            let &Heads { kv_heads, group, head_dim, causal, window, scale, softcap } = heads;
            let vector = head_dim.is_multiple_of(8) && addresses.iter().all(|a| a.is_multiple_of(16));
            let (Some(suffix), Some(number)) = (cuda::suffix(dtype, vector), cuda::number(dtype)) else {
                bail!("no kernels for {dtype:?}")
            };
            if head_dim > MAX_HEAD_DIM {
                bail!("heads of {head_dim} numbers; the kernels take up to {MAX_HEAD_DIM}");
            }
            if self.many.count > 0 && !vector {
                bail!("rows are not at multiples of 16 bytes");
            }
            let [q, keys, values, out] = addresses.map(Argument::Address);
            // No position is as far away.
            let window = window.map_or(u32::MAX, |w| u32::try_from(w).unwrap_or(u32::MAX));
            let sizes = [kv_heads, group, head_dim, usize::from(causal)].map(|x| Argument::Word(x as u32));
            let floats = [scale, softcap.unwrap_or(0.0)].map(Argument::Float);
            let shape: Vec<_> = sizes.into_iter().chain([Argument::Word(window)]).chain(floats).collect();
            let parts = machine.reserve(self.parts * kv_heads * group * head_dim)?;
            let states = machine.reserve(self.parts * kv_heads * group * 2)?;
            let (parts, states) = (Argument::Address(parts.address()), Argument::Address(states.address()));
            let run = |kernel: &str, count: usize, grid: [usize; 2], threads: u32, arguments: &[Argument]| {
                if count == 0 {
                    return Ok(());
                }
                let launch =
                    Launch { module: Module::Attention, kernel, grid: [count, grid[0], grid[1]], threads, arguments };
                // SAFETY: these are the parameters of the kernels in attention.cu; the rest is the caller's promise.
                unsafe { machine.launch(&launch) }
            };
            let all = |tiles: Tiles, rest: &[Argument]| {
                let first = [tiles.address(words), self.table.address(words), q, keys, values, out];
                first.iter().chain(rest).chain(&shape).copied().collect::<Vec<_>>()
            };
            let runs = |queries: usize| [kv_heads, group.div_ceil(queries)];
            let few = all(self.few, &[parts, states]);
            run(&format!("attend_{suffix}"), self.few.count, runs(QUERIES), ATTEND_THREADS, &few)?;
            let width = if head_dim <= 64 { 64 } else { 128 };
            let many = all(self.many, &[]);
            run(&format!("attend_many_{width}"), self.many.count, runs(MANY_QUERIES), ATTEND_THREADS, &many)?;
            let [of_heads, _, of_head_dim, _] = [kv_heads * group, 0, head_dim, 0].map(|x| Argument::Word(x as u32));
            let merge = [self.merge.address(words), parts, states, out, of_heads, of_head_dim];
            run(&format!("merge_{number}"), self.merge.count, [kv_heads * group, 1], MERGE_THREADS, &merge)
        }
    }

    #[cfg(all(test, target_os = "linux", target_env = "gnu"))]
    mod tests {
        use candle_core::{Device, Tensor};
        use proptest::prelude::*;

        use super::*;
        use crate::base::paged::PagedAttention;
        use crate::base::testing::noise;
        use crate::cuda::emulator::{ATTENTION, Emulator};

        struct Case {
            heads: Heads,
            dtype: DType,
            /// Of each sequence the positions that are in the cache, and the rows.
            sequences: Vec<(usize, usize)>,
            seed: u64,
        }

        impl Case {
            /// The largest difference between the emulated kernels and the plain formula, over what rounding allows.
            fn worst(&self, machine: &Emulator) -> Result<f32> {
                let mut next = noise(self.seed);
                let Heads { kv_heads, group, head_dim, .. } = self.heads;
                // Every sequence has blocks of its own, in an order of theirs, among some that are nobody's.
                let lengths = self.sequences.iter().map(|(start, rows)| (start + rows).div_ceil(BLOCK));
                let blocks = 2 * lengths.clone().sum::<usize>() + 1;
                let mut order: Vec<(u32, u32)> = (0..blocks as u32).map(|b| (next().to_bits(), b)).collect();
                order.sort_unstable();
                let mut order = order.into_iter().map(|(_, b)| b);
                let tables: Vec<Vec<u32>> = lengths.map(|count| order.by_ref().take(count).collect()).collect();
                let (mut rows, mut sequences) = (0, vec![]);
                for (&(start, count), blocks) in self.sequences.iter().zip(&tables) {
                    sequences.push(SequenceRows { rows: rows..rows + count, start, blocks });
                    rows += count;
                }
                // Slots that no position has hold what would spoil any sum.
                let width = kv_heads * head_dim;
                let mut used = vec![false; blocks * BLOCK];
                for s in &sequences {
                    (0..s.start + s.rows.len()).for_each(|p| used[s.slot(p)] = true);
                }
                let mut cache = || -> Result<Tensor> {
                    let numbers = used.iter().flat_map(|&used| std::iter::repeat_n(used, width));
                    let numbers: Vec<f32> = numbers.map(|used| if used { next() } else { f32::NAN }).collect();
                    Tensor::from_vec(numbers, (blocks * BLOCK, width), &Device::Cpu)?.to_dtype(self.dtype)
                };
                let (keys, values) = (cache()?, cache()?);
                let numbers: Vec<f32> = (0..rows * group * width).map(|_| 3.0 * next()).collect();
                let q = Tensor::from_vec(numbers, (rows, group * width), &Device::Cpu)?.to_dtype(self.dtype)?;

                let tiles = AttentionTiles::new(&self.heads, self.dtype, &sequences);
                let words = machine.upload(&tiles.words)?;
                let out = machine.copy(&(&q * f64::NAN)?)?;
                let addresses = [machine.copy(&q)?, machine.copy(&keys)?, machine.copy(&values)?, out];
                // SAFETY: these are the sequences' rows and blocks.
                unsafe { tiles.launch(machine, words.address(), &self.heads, self.dtype, addresses) }?;
                let op = PagedAttention {
                    heads: self.heads,
                    sequences: &sequences,
                    #[cfg(feature = "cuda")]
                    tiles: None,
                };
                let want = q.apply_op3_no_bwd(&keys, &values, &op)?;
                let want = want.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                // Both round the result; tensor cores also each weight to bf16, and values are up to 1.
                let (unit, sum) = match self.dtype {
                    DType::BF16 if tiles.many.count > 0 => (2f32.powi(-7), 2f32.powi(-8)),
                    DType::BF16 => (2f32.powi(-7), 0.0),
                    DType::F16 => (2f32.powi(-10), 0.0),
                    _ => (0.0, 0.0),
                };
                let of = |(got, want): (&f32, &f32)| match got.is_finite() {
                    true => (got - want).abs() / (unit * want.abs() + sum + 1e-5),
                    false => f32::INFINITY,
                };
                Ok(machine.read(out, &q).iter().zip(&want).map(of).fold(0.0, f32::max))
            }
        }

        fn sequences() -> impl Strategy<Value = Vec<(usize, usize)>> {
            let short = (0usize..40, prop_oneof![Just(1usize), 1usize..9, 9usize..70]);
            let long = (prop_oneof![Just(511usize), 480usize..1100], 1usize..4);
            prop::collection::vec(prop_oneof![short, long], 1..4)
        }

        proptest! {
            #![proptest_config(ProptestConfig::with_cases(32))]
            #[test]
            fn emulated_kernels_equal_the_plain_formula(
                kv_heads in 1usize..3,
                group in prop::sample::select(vec![1usize, 2, 3, 4, 7, 9]),
                head_dim in prop::sample::select(vec![1usize, 6, 8, 24, 33, 64, 80, 128, 136, 256]),
                causal in any::<bool>(),
                window in prop::option::of(1usize..600),
                softcap in prop::option::of(1f32..4.0),
                dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16, DType::BF16]),
                sequences in sequences(),
                seed in any::<u64>(),
            ) {
                // Encoders have no windows.
                let window = window.filter(|_| causal);
                let scale = 1.0 / (head_dim as f32).sqrt();
                let heads = Heads { kv_heads, group, head_dim, causal, window, scale, softcap };
                let case = Case { heads, dtype, sequences, seed };
                let worst = case.worst(&Emulator::new(ATTENTION, seed)).unwrap();
                prop_assert!(worst <= 1.0, "off by {worst} times what rounding allows");
            }
        }

        #[test]
        fn mistakes_in_kernels_are_found() {
            let case = |start: usize, rows: usize| {
                let (window, softcap) = (Some(700), Some(3.0));
                let heads = Heads { kv_heads: 1, group: 4, head_dim: 64, causal: true, window, scale: 0.2, softcap };
                Case { heads, dtype: DType::BF16, sequences: vec![(start, rows)], seed: 3 }
            };
            let right = Emulator::new(ATTENTION, 1);
            for (start, rows, from, to) in [
                (40, 2, "__syncthreads();", ""),
                (40, 2, "if (!there || position >= seen ||", "if (!there ||"),
                (1000, 1, "total += left * states[2 * place + 1];", "total += states[2 * place + 1];"),
                (1000, 1, "parts[place * head_dim + d] = sum;", "parts[place * head_dim + d] = sum / total;"),
                (40, 20, "position >= min(seen, to)", "position > min(seen, to)"),
                (40, 20, "float left = weight(maxima[half], max);", "float left = 1;"),
                (
                    40,
                    20,
                    "pair_at(value[0], value[1], i), pair_at(value[2], value[3], i)",
                    "pair_at(value[1], value[0], i), pair_at(value[2], value[3], i)",
                ),
            ] {
                let case = case(start, rows);
                assert!(case.worst(&right).unwrap() <= 1.0);
                let worst = case.worst(&Emulator::mistaken(ATTENTION, &[(from, to)]));
                let found = worst.as_ref().map_or(true, |&worst| worst > 1.0);
                assert!(found, "{from:?} became {to:?}, and nobody noticed: {worst:?}");
            }
        }

        #[test]
        fn sizes_are_those_of_the_kernels() {
            for (name, size) in [
                ("BLOCK", BLOCK),
                ("ATTEND_THREADS", ATTEND_THREADS as usize),
                ("QUERIES", QUERIES),
                ("MANY_QUERIES", MANY_QUERIES),
                ("MAX_HEAD_DIM", MAX_HEAD_DIM),
                ("MERGE_THREADS", MERGE_THREADS as usize),
            ] {
                assert!(ATTENTION.contains(&format!("constexpr unsigned {name} = {size};")), "{name}");
            }
        }
    }
}
