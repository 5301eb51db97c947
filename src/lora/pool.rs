//! The adapters' memory on a GPU: fixed pages of one allocation, so that loading and evicting thousands of adapters of any
//! rank neither cuts the memory to pieces nor asks the driver for any.
//!
//! An adapter takes whole pages, any that are free. What the kernels read of it is in *blocks* that never go beyond a page:
//! some ranks of an A factor, some columns of a B factor, a vector. A tile of the kernels reads no more than a block
//! ([`super::tiles`]), so they are told addresses as ever and need no page tables, and pages of an adapter need not be
//! neighbours. A page is as large as 64 ranks of the widest layer ([`page_bytes`]), one tile of the tensor cores' kernel.
//! So of rank 8 on q and v of a model of 135 million numbers (0.92 MB in bf16, pages of 256 KiB) 0.13 MB of its pages are
//! empty, of one of 8 billion (6.8 MB, 2 MiB) 1.6 MB, and at rank 64 on all its layers (336 MB) hardly anything, because the
//! largest blocks are placed first and small ones fill what they leave.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::DType;
#[cfg(feature = "cuda")]
use candle_core::Device;
use half::{bf16, f16};

use super::tiles::{EXPAND_COLUMNS, MANY_RANKS};
use crate::base::Decoder;
use crate::cuda::Uploads;
use crate::{Error, Result};

/// Where a block may begin: the kernels read 16 bytes at a time.
const ALIGNMENT: usize = 16;
/// The smallest page.
#[cfg(any(feature = "cuda", test))]
const LEAST: usize = 256 << 10;
/// Of the adapters' memory what is not for pages but for what candle's operations read: norms, embeddings and `lm_head`.
#[cfg(any(feature = "cuda", test))]
const OUTSIDE: u64 = 8;

/// Bytes of a page for adapters of such a model, in numbers of `dtype`.
#[cfg(any(feature = "cuda", test))]
fn page_bytes(config: &crate::base::ModelConfig, dtype: DType) -> usize {
    let linears = config.target_modules();
    let ranks = linears.iter().map(|m| MANY_RANKS * m.in_features).max().unwrap_or(0);
    let vector = linears.iter().map(|m| m.out_features).max().unwrap_or(0);
    (ranks.max(vector) * dtype.size_in_bytes()).max(LEAST).next_power_of_two()
}

/// A part of a matrix that lies in one piece: `[outputs, k]` of an A factor, `[k, outputs]` of a B factor.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// Output features.
    pub range: Range<usize>,
    /// The address, or until there is one the number among the adapter's blocks.
    pub at: u64,
}

/// The blocks of an adapter before they are on the GPU.
#[derive(Debug)]
pub(super) struct Blocks {
    dtype: DType,
    page: usize,
    bytes: Vec<Vec<u8>>,
}

impl Blocks {
    pub fn new(dtype: DType, page: usize) -> Self {
        Blocks { dtype, page, bytes: vec![] }
    }

    /// An A factor `[n, k]`, cut into ranks.
    pub fn by_rows(&mut self, rows: &[f32], n: usize, k: usize) -> Result<Vec<Block>> {
        let fit = self.fit(k)?;
        let size = if fit < 16 { fit } else { (fit - fit % 16).min(MANY_RANKS) };
        let ranges = super::tiles::cut(0..n, size);
        Ok(ranges.map(|range| self.push(range.clone(), rows[range.start * k..range.end * k].iter().copied())).collect())
    }

    /// A B factor `[n, k]`, cut into columns, of which each block has those of one rank side by side.
    pub fn by_columns(&mut self, rows: &[f32], n: usize, k: usize) -> Result<Vec<Block>> {
        let fit = self.fit(k)?;
        let size = if fit < 8 { fit } else { (fit - fit % 8).min(EXPAND_COLUMNS) };
        if size < 8 && n.is_multiple_of(8) {
            return Err(self.too_large(8 * k));
        }
        let block = |range: Range<usize>| {
            let numbers = (0..k).flat_map(|i| range.clone().map(move |j| rows[j * k + i]));
            self.push(range.clone(), numbers)
        };
        Ok(super::tiles::cut(0..n, size).map(block).collect())
    }

    pub fn vector(&mut self, numbers: &[f32]) -> Result<Block> {
        if self.fit(1)? < numbers.len() {
            return Err(self.too_large(numbers.len()));
        }
        Ok(self.push(0..numbers.len(), numbers.iter().copied()))
    }

    /// How many times so many numbers fit into a page.
    fn fit(&self, numbers: usize) -> Result<usize> {
        match self.page / (numbers.max(1) * self.dtype.size_in_bytes()) {
            0 => Err(self.too_large(numbers)),
            fit => Ok(fit),
        }
    }

    fn too_large(&self, numbers: usize) -> Error {
        let page = self.page / self.dtype.size_in_bytes();
        Error::unprocessable(format!("{numbers} numbers that have to lie side by side; a page on the GPU has {page}"))
    }

    pub fn page(&self) -> usize {
        self.page
    }

    fn push(&mut self, range: Range<usize>, numbers: impl Iterator<Item = f32>) -> Block {
        let bytes: Vec<u8> = match self.dtype {
            DType::BF16 => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
            DType::F16 => numbers.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
            _ => numbers.flat_map(f32::to_le_bytes).collect(),
        };
        self.bytes.push(bytes);
        Block { range, at: self.bytes.len() as u64 - 1 }
    }

    pub fn into_layout(self) -> Layout {
        let sizes: Vec<usize> = self.bytes.iter().map(Vec::len).collect();
        let (places, used) = lay_out(&sizes, self.page);
        Layout { blocks: self.bytes, places, used }
    }
}

/// Blocks and their places on pages.
#[derive(Debug)]
pub(super) struct Layout {
    blocks: Vec<Vec<u8>>,
    /// Of each block the page, among the adapter's, and the first byte there.
    places: Vec<(usize, usize)>,
    /// Bytes of each page up to the end of its last block.
    used: Vec<usize>,
}

impl Layout {
    pub fn pages(&self) -> usize {
        self.used.len()
    }
}

/// Places blocks on pages of `page` bytes, none of them larger: the largest first, each on the first page that has room.
/// Returns their places, and what is used of each page.
fn lay_out(sizes: &[usize], page: usize) -> (Vec<(usize, usize)>, Vec<usize>) {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sizes[i]));
    let (mut places, mut used) = (vec![(0, 0); sizes.len()], Vec::<usize>::new());
    // Pages before this one have no room for what comes: blocks do not grow.
    let (mut first, mut last_size) = (0, usize::MAX);
    for i in order {
        if sizes[i] < last_size {
            (first, last_size) = (0, sizes[i]);
        }
        let start = |used: &usize| used.next_multiple_of(ALIGNMENT);
        let found = used[first..].iter().position(|used| start(used) + sizes[i] <= page);
        first = found.map_or(used.len(), |found| first + found);
        if first == used.len() {
            used.push(0);
        }
        places[i] = (first, start(&used[first]));
        used[first] = places[i].1 + sizes[i];
    }
    (places, used)
}

/// All pages.
pub struct Pool {
    /// Bytes.
    page: usize,
    pages: usize,
    /// Bytes that all adapters may take outside of pages.
    outside: u64,
    /// The first one's address.
    start: u64,
    state: Mutex<State>,
    uploads: Mutex<Box<dyn Uploads + Send>>,
}

struct State {
    free: Vec<u32>,
    /// Bytes that adapters may still take outside of pages.
    outside: u64,
}

/// Pages of one adapter, and what it has outside of them. They are free again when this is dropped.
///
/// Launches that read a page may not have ended then: who holds an adapter in a step holds it only until all of the step is
/// launched. See [`Pool::upload`].
pub(super) struct Pages {
    pool: Arc<Pool>,
    numbers: Vec<u32>,
    outside: u64,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.numbers.fmt(f)
    }
}

impl Pool {
    /// Of the memory that adapters may take on a GPU; `None` on a CPU.
    pub fn open(base: &Decoder, memory: u64) -> Result<Option<Arc<Self>>> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &base.options().device {
            let page = page_bytes(base.config(), base.options().dtype);
            let (pages, outside) = Self::divide(memory, page);
            let uploads = crate::cuda::gpu::PinnedUploads::new(device, pages * page, page)?;
            tracing::info!("adapters have {pages} pages of {} KiB", page >> 10);
            return Ok(Some(Self::new(Box::new(uploads), page, pages, outside)));
        }
        let _ = (base, memory);
        Ok(None)
    }

    /// How many pages of so many bytes go into the adapters' memory, and the bytes that it has for what is on no page.
    #[cfg(any(feature = "cuda", test))]
    fn divide(memory: u64, page: usize) -> (usize, u64) {
        let pages = (memory - memory / OUTSIDE) / page as u64;
        (pages as usize, memory - pages * page as u64)
    }

    /// `uploads` has memory for so many pages.
    pub fn new(uploads: Box<dyn Uploads + Send>, page: usize, pages: usize, outside: u64) -> Arc<Self> {
        // The last one is taken first.
        let free = (0..pages as u32).rev().collect();
        let (start, state) = (uploads.start(), Mutex::new(State { free, outside }));
        Arc::new(Pool { page, pages, outside, start, state, uploads: Mutex::new(uploads) })
    }

    /// Bytes of a page.
    pub fn page(&self) -> usize {
        self.page
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many pages, and bytes outside; `None` where they are not free.
    fn take(self: &Arc<Self>, count: usize, outside: u64) -> Option<Pages> {
        let mut state = self.state();
        let left = state.outside.checked_sub(outside)?;
        let keep = state.free.len().checked_sub(count)?;
        state.outside = left;
        let numbers = state.free.split_off(keep);
        Some(Pages { pool: self.clone(), numbers, outside })
    }

    /// Puts an adapter on pages, and gives the addresses of its blocks. Returns when they can be read. `None` where too few
    /// pages are free.
    ///
    /// Errors: `TooLarge` where it would not fit if all were.
    pub(super) fn place(self: &Arc<Self>, layout: &Layout, outside: u64) -> Result<Option<(Pages, Vec<u64>)>> {
        if layout.pages() > self.pages {
            return Err(Error::too_large(format!(
                "it takes {} pages of {} bytes on the GPU; --adapter-memory has room for {}",
                layout.pages(),
                self.page,
                self.pages
            )));
        }
        if outside > self.outside {
            return Err(Error::too_large(format!(
                "its norms, embeddings and lm_head take {outside} bytes on the GPU; --adapter-memory has {} for those",
                self.outside
            )));
        }
        let Some(pages) = self.take(layout.pages(), outside) else { return Ok(None) };
        self.upload(&pages, layout)?;
        let address = |&(page, start): &(usize, usize)| self.address(pages.numbers[page]) + start as u64;
        let addresses = layout.places.iter().map(address).collect();
        Ok(Some((pages, addresses)))
    }

    fn address(&self, page: u32) -> u64 {
        self.start + u64::from(page) * self.page as u64
    }

    /// Writes blocks to pages. Steps go on meanwhile.
    ///
    /// *What a page held may still be read* by launches that have not ended. Whoever launched them held the adapter until
    /// they were in the stream, and this page became free later and was taken later still: so they are among the launches so
    /// far, after which, as [`Uploads::after_launches`] says, all that follows here is written. An upload that failed on the
    /// way has its pages written in the same stream, before any later one. Which launches those are in
    /// particular need not be known: the host waits for the results of every step or two, so they end soon.
    ///
    /// *What is written can be read when this returns*, since it waits for it; and no launch knows the addresses earlier.
    /// A thread that loads adapters waits here, and neither the steps nor the thread that launches them.
    fn upload(&self, pages: &Pages, layout: &Layout) -> Result<()> {
        let mut on_page = vec![vec![]; layout.pages()];
        layout.places.iter().zip(&layout.blocks).for_each(|(&(page, start), block)| on_page[page].push((start, block)));
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        uploads.after_launches()?;
        for ((&page, &used), blocks) in pages.numbers.iter().zip(&layout.used).zip(on_page) {
            let mut fill = |bytes: &mut [u8]| {
                for (start, block) in &blocks {
                    bytes[*start..][..block.len()].copy_from_slice(block);
                }
            };
            // SAFETY: the page is nobody else's, and of launches see above.
            unsafe { uploads.write(self.address(page), used, &mut fill) }?;
        }
        Ok(uploads.finish()?)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        state.free.append(&mut self.numbers);
        state.outside += self.outside;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{HashMap, HashSet, VecDeque};

    use proptest::prelude::*;

    use super::*;
    use crate::adapter::testing::tiny;
    use crate::base::ModelConfig;
    use crate::base::testing::noise;

    /// Pages in the host's memory, which begin as NaN, for kernels in the emulator.
    pub struct HostUploads(Vec<u128>);

    impl HostUploads {
        pub fn pool(page: usize, pages: usize) -> Arc<Pool> {
            Pool::new(Box::new(HostUploads(vec![u128::MAX; page * pages / 16])), page, pages, u64::MAX)
        }
    }

    impl Uploads for HostUploads {
        fn start(&self) -> u64 {
            self.0.as_ptr() as u64
        }
        fn after_launches(&mut self) -> candle_core::Result<()> {
            Ok(())
        }
        unsafe fn write(&mut self, to: u64, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> candle_core::Result<()> {
            let at = (to - self.start()) as usize;
            // SAFETY: any bytes are u128.
            let (_, all, _) = unsafe { self.0.align_to_mut::<u8>() };
            fill(&mut all[at..at + bytes]);
            Ok(())
        }
        fn finish(&mut self) -> candle_core::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn blocks_lie_on_pages_without_overlap(
            sizes in prop::collection::vec(prop_oneof![1usize..=1024, 1usize..40, Just(512usize), Just(16usize)], 0..200),
        ) {
            let page = 1024;
            let (places, used) = lay_out(&sizes, page);
            let mut on_page: Vec<Vec<Range<usize>>> = vec![vec![]; used.len()];
            for (&(at, start), &size) in places.iter().zip(&sizes) {
                prop_assert!(start.is_multiple_of(ALIGNMENT) && start + size <= used[at] && used[at] <= page);
                on_page[at].push(start..start + size);
            }
            for (blocks, used) in on_page.iter_mut().zip(&used) {
                blocks.sort_by_key(|block| block.start);
                prop_assert!(blocks.windows(2).all(|b| b[0].end <= b[1].start));
                prop_assert_eq!(blocks.last().map(|block| block.end), Some(*used));
            }
            // What lies on a page had no room on any before it, so no two pages would go into one.
            for (i, blocks) in on_page.iter().enumerate() {
                let least = blocks.iter().map(|block| block.len()).min().unwrap_or(page);
                prop_assert!(used[..i].iter().all(|used| used.next_multiple_of(ALIGNMENT) + least > page));
            }
        }

        #[test]
        fn pages_have_one_owner_and_never_go_to_pieces(
            pages in 1usize..40,
            steps in prop::collection::vec((any::<bool>(), 0usize..12, 0u64..20), 0..100),
        ) {
            let pool = Pool::new(Box::new(HostUploads(vec![])), 16, pages, 50);
            let (mut held, mut outside): (Vec<Pages>, u64) = (vec![], 0);
            for (takes, number, more) in steps {
                if takes {
                    let there: usize = held.iter().map(|pages| pages.numbers.len()).sum();
                    let fits = there + number <= pages && outside + more <= 50;
                    let taken = pool.take(number, more);
                    prop_assert_eq!(taken.is_some(), fits);
                    outside += if fits { more } else { 0 };
                    held.extend(taken);
                } else if !held.is_empty() {
                    outside -= held.swap_remove(number % held.len()).outside;
                }
                let all: Vec<u32> = held.iter().flat_map(|pages| pages.numbers.clone()).collect();
                prop_assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
                prop_assert!(all.iter().all(|&page| (page as usize) < pages));
            }
            held.clear();
            prop_assert!(pool.take(pages, 50).is_some());
        }
    }

    #[test]
    fn pages_of_real_models_are_well_filled() {
        // Layers, hidden size, heads of queries and of keys times their size, and the width of the MLP.
        let filled = |[layers, hidden, q, kv, ffn]: [usize; 5], rank: usize, all: bool| {
            let (heads, kv_heads) = (q / 64, kv / 64);
            let sizes = ModelConfig { layers, hidden_size: hidden, heads, kv_heads, head_dim: 64, ..tiny() };
            let page = page_bytes(&ModelConfig { intermediate_size: ffn, ..sizes }, DType::BF16);
            let mut blocks = Blocks::new(DType::BF16, page);
            // Inputs of a fused layer, and outputs of its projections.
            let qv: &[(usize, &[usize])] = &[(hidden, &[q, kv])];
            let every: &[(usize, &[usize])] =
                &[(hidden, &[q, kv, kv]), (q, &[hidden]), (hidden, &[ffn, ffn]), (ffn, &[hidden])];
            for _ in 0..layers {
                for (k, outputs) in if all { every } else { qv } {
                    let ranks = rank * outputs.len();
                    blocks.by_rows(&vec![0.0; ranks * k], ranks, *k).unwrap();
                    for n in *outputs {
                        blocks.by_columns(&vec![0.0; n * rank], *n, rank).unwrap();
                    }
                }
            }
            let bytes: usize = blocks.bytes.iter().map(Vec::len).sum();
            (page, bytes, blocks.into_layout().pages())
        };
        let small = [30, 576, 576, 192, 1536];
        assert_eq!(filled(small, 8, false), (256 << 10, 921_600, 4));
        let large = |layers: usize| [layers, 4096, 4096, 1024, 14336];
        assert_eq!(filled(large(32), 8, false), (2 << 20, 6_815_744, 4));
        // One layer of 32, each of which fills pages to the last byte.
        assert_eq!(filled(large(1), 64, true), (2 << 20, 5 << 21, 5));
    }

    #[test]
    fn memory_is_divided_into_pages_and_what_is_on_none() {
        for (memory, page) in [(0, 64), (63, 64), (1 << 20, 1 << 12), ((1 << 20) + 5, 1 << 12)] {
            let (pages, outside) = Pool::divide(memory, page);
            assert_eq!((pages * page) as u64 + outside, memory);
            assert!(outside >= memory / OUTSIDE && outside < memory / OUTSIDE + page as u64 + 1, "{outside}");
        }
    }

    #[test]
    fn what_does_not_fit_is_told_apart_from_what_does_not_fit_now() {
        let pool = HostUploads::pool(64, 4);
        let adapter = |pages: usize| {
            let mut blocks = Blocks::new(DType::F32, 64);
            blocks.by_rows(&vec![1.0; 16 * pages], pages, 16).unwrap();
            blocks.into_layout()
        };
        let (three, addresses) = pool.place(&adapter(3), 0).unwrap().unwrap();
        assert_eq!(addresses.len(), 3);
        assert!(pool.place(&adapter(2), 0).unwrap().is_none());
        drop(three);
        assert!(pool.place(&adapter(4), 0).unwrap().is_some());
        let error = pool.place(&adapter(5), 0).unwrap_err();
        assert!(error.message.contains("it takes 5 pages of 64 bytes"), "{error}");
        // A rank of more numbers than a page has.
        assert!(Blocks::new(DType::F32, 64).by_rows(&[0.0; 17], 1, 17).is_err());
        assert!(Blocks::new(DType::F32, 64).vector(&[0.0; 17]).is_err());
        let some = Pool::new(Box::new(HostUploads(vec![])), 64, 4, 10);
        assert!(some.place(&adapter(0), 11).unwrap_err().message.contains("take 11 bytes"));
    }

    /// A GPU with two streams, of which each does what it was given in order, whenever it likes.
    #[derive(Default)]
    struct Streams {
        launches: VecDeque<Work>,
        copies: VecDeque<Work>,
        /// Events that have happened.
        happened: HashSet<u64>,
        events: u64,
        /// What each page holds.
        held: HashMap<u64, Vec<u8>>,
        /// Reads that found something else than they should.
        wrong: usize,
        ended: usize,
    }

    enum Work {
        Read(u64, Vec<u8>),
        Write(u64, Vec<u8>),
        Record(u64),
        Wait(u64),
    }

    impl Streams {
        /// Lets a stream do its next piece of work. Whether it did.
        fn go_on(&mut self, copies: bool) -> bool {
            let stream = if copies { &mut self.copies } else { &mut self.launches };
            match stream.front() {
                None => return false,
                Some(Work::Wait(event)) if !self.happened.contains(event) => return false,
                Some(_) => {}
            }
            match stream.pop_front() {
                Some(Work::Read(page, what)) => {
                    self.wrong += usize::from(self.held.get(&page) != Some(&what));
                    self.ended += 1;
                }
                Some(Work::Write(page, what)) => drop(self.held.insert(page, what)),
                Some(Work::Record(event)) => drop(self.happened.insert(event)),
                Some(Work::Wait(_)) | None => {}
            }
            true
        }
    }

    struct FakeUploads {
        gpu: Arc<Mutex<Streams>>,
        /// A mistake: copies do not wait for launches.
        hasty: bool,
    }

    impl Uploads for FakeUploads {
        fn start(&self) -> u64 {
            1 << 40
        }
        fn after_launches(&mut self) -> candle_core::Result<()> {
            let mut gpu = self.gpu.lock().unwrap();
            if !self.hasty {
                gpu.events += 1;
                let event = gpu.events;
                gpu.launches.push_back(Work::Record(event));
                gpu.copies.push_back(Work::Wait(event));
            }
            Ok(())
        }
        unsafe fn write(&mut self, to: u64, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> candle_core::Result<()> {
            let mut page = vec![0; bytes];
            fill(&mut page);
            self.gpu.lock().unwrap().copies.push_back(Work::Write(to, page));
            Ok(())
        }
        fn finish(&mut self) -> candle_core::Result<()> {
            let mut gpu = self.gpu.lock().unwrap();
            while !gpu.copies.is_empty() {
                // As far as they have to, launches go on.
                let moved = gpu.go_on(true) || gpu.go_on(false);
                assert!(moved, "both streams wait");
            }
            Ok(())
        }
    }

    /// An adapter that was placed, and what its pages hold.
    type Adapter = (Pages, Vec<(u64, Vec<u8>)>);

    fn load(pool: &Arc<Pool>, gpu: &Mutex<Streams>, pages: usize, next: &mut impl FnMut() -> f32) -> Option<Adapter> {
        let mut blocks = Blocks::new(DType::F32, 64);
        let numbers: Vec<f32> = (0..16 * pages).map(|_| next()).collect();
        blocks.by_rows(&numbers, pages, 16).unwrap();
        let layout = blocks.into_layout();
        let (taken, addresses) = pool.place(&layout, 0).unwrap()?;
        let holds: Vec<_> = addresses.into_iter().zip(layout.blocks).collect();
        let gpu = gpu.lock().unwrap();
        assert!(holds.iter().all(|(page, what)| gpu.held.get(page) == Some(what)), "it is there when `place` returns");
        Some((taken, holds))
    }

    fn launch(gpu: &Mutex<Streams>, adapter: &Adapter) {
        let reads = adapter.1.iter().map(|(page, what)| Work::Read(*page, what.clone()));
        gpu.lock().unwrap().launches.extend(reads);
    }

    proptest! {
        #[test]
        fn no_launch_finds_its_adapter_overwritten(
            steps in prop::collection::vec((0u8..8, any::<prop::sample::Index>(), 1usize..5), 1..150),
            seed in any::<u64>(),
        ) {
            let gpu = Arc::new(Mutex::new(Streams::default()));
            let pool = Pool::new(Box::new(FakeUploads { gpu: gpu.clone(), hasty: false }), 64, 6, 0);
            let (mut adapters, mut next): (Vec<Adapter>, _) = (vec![], noise(seed));
            for (what, which, pages) in steps {
                match what {
                    0..=1 => adapters.extend(load(&pool, &gpu, pages, &mut next)),
                    2..=3 if !adapters.is_empty() => drop(adapters.swap_remove(which.index(adapters.len()))),
                    4..=5 if !adapters.is_empty() => launch(&gpu, &adapters[which.index(adapters.len())]),
                    _ => drop(gpu.lock().unwrap().go_on(pages > 3)),
                }
            }
            let mut gpu = gpu.lock().unwrap();
            while gpu.go_on(false) {}
            prop_assert!(gpu.launches.is_empty());
            prop_assert_eq!(gpu.wrong, 0);
        }
    }

    #[test]
    fn copies_that_do_not_wait_are_found_and_those_that_do_hold_nobody_up() {
        let wrong = |hasty: bool| {
            let gpu = Arc::new(Mutex::new(Streams::default()));
            let pool = Pool::new(Box::new(FakeUploads { gpu: gpu.clone(), hasty }), 64, 3, 0);
            let mut next = noise(1);
            let first = load(&pool, &gpu, 2, &mut next).unwrap();
            let stays = load(&pool, &gpu, 1, &mut next).unwrap();
            launch(&gpu, &first);
            drop(first);
            // The host has launched more than the GPU has done, and goes on while the copy is under way.
            load(&pool, &gpu, 2, &mut next).unwrap();
            let ended = gpu.lock().unwrap().ended;
            launch(&gpu, &stays);
            let mut gpu = gpu.lock().unwrap();
            while gpu.go_on(false) {}
            assert_eq!(gpu.ended, 3);
            // Launches from before, and no others, had to end for it.
            assert_eq!(ended, if hasty { 0 } else { 2 });
            gpu.wrong
        };
        assert_eq!((wrong(false), wrong(true)), (0, 2));
    }
}
