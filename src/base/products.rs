//! Products of a batch of rows with packed matrices: the base's, and those of adapters.

use std::ops::Range;

use super::buffer::Buffer;
use super::int8::Rounded;
use super::matmul::{Input, PackedMatrix, Rounding};
use super::parallel;
use super::simd::{Ahead, LANES, Rows, Simd, Target};
use super::tiled::Planes;

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

/// Rounded rows.
enum Whole {
    Groups(Rounded),
    Planes(Planes),
}

/// Rounds what the matrices of products read in whole numbers, once for all that read the same columns. Returns for each
/// product which of the rounded rows it reads, and these with the first row that they are of.
fn round<'a>(
    simd: Simd,
    products: impl Iterator<Item = &'a Product<'a>>,
    x: &[f32],
    x_stride: usize,
) -> (Vec<Option<usize>>, Vec<(usize, Whole)>) {
    // Column, input features, how; the rows that are read there.
    let mut places: Vec<((usize, usize, Rounding), Range<usize>)> = vec![];
    let mut of = |p: &Product| {
        let place = (p.x_column, p.matrix.k(), p.matrix.rounding()?);
        match places.iter().rposition(|(other, _)| *other == place) {
            Some(found) => {
                let rows = &mut places[found].1;
                *rows = rows.start.min(p.rows.start)..rows.end.max(p.rows.end);
                Some(found)
            }
            None => {
                places.push((place, p.rows.clone()));
                Some(places.len() - 1)
            }
        }
    };
    let read = products.map(&mut of).collect();
    let rounded = places.into_iter().map(|((column, k, rounding), rows)| {
        let (first, count) = (rows.start, rows.len());
        let x = &x[(first * x_stride + column).min(x.len())..];
        let whole = match rounding {
            Rounding::Groups(group) => Whole::Groups(Rounded::new(simd, x, x_stride, count, k, group)),
            Rounding::Planes => Whole::Planes(Planes::new(simd, x, x_stride, count, k)),
        };
        (first, whole)
    });
    (read, rounded.collect())
}

impl<'a> Input<'a> {
    /// What a product reads from its row `first` on.
    fn of(product: &Product, x: &'a [f32], x_stride: usize, place: Option<&'a (usize, Whole)>, first: usize) -> Self {
        let row = product.rows.start + first;
        match place {
            Some((start, Whole::Groups(rows))) => Input::Rounded(rows, row - start),
            Some((start, Whole::Planes(rows))) => Input::Planes(rows, row - start),
            None => Input::Plain(Rows { data: &x[row * x_stride + product.x_column..], stride: x_stride }),
        }
    }
}

/// A matrix, and panels of it.
type Part = (usize, Range<usize>);

/// Panels of matrices, and which of these are one task: several of small matrices, a part of a large one's.
struct Plan {
    // In small numbers: the allocator is quickest with what is below a kilobyte.
    parts: Vec<(u32, Range<u32>)>,
    tasks: Vec<Range<u32>>,
    /// The first task of each thread's share.
    shares: Vec<usize>,
    /// Multiply-adds, and as many as what else it costs.
    total: usize,
}

impl Plan {
    /// Multiply-adds worth handing to another thread.
    const GRAIN: usize = 1 << 16;

    /// What a panel costs.
    fn of_panel(product: &Product) -> usize {
        /// As many as take the time that a panel takes however small it is.
        const PER_PANEL: usize = 1 << 10;
        /// As many as take the time that a weight takes to come from memory.
        const PER_WEIGHT: usize = 8;
        (product.rows.len() + PER_WEIGHT) * LANES * product.matrix.k() + PER_PANEL
    }

    /// For so many panels of each matrix, those side by side, and what one costs. The tasks of a thread's share become smaller
    /// towards its end, so that no thread has a long one left when the others are done.
    fn new(matrices: impl ExactSizeIterator<Item = (usize, usize, usize)> + Clone) -> Self {
        /// Tasks of a thread's share of the largest products, and a few more.
        const MOST: usize = 24;
        let threads = parallel::threads();
        let total: usize = matrices.clone().map(|(panels, _, per_panel)| panels * per_panel).sum();
        let mut parts: Vec<(u32, Range<u32>)> = Vec::with_capacity(matrices.len() + MOST * threads);
        let (mut tasks, mut left, mut of_task): (Vec<Range<u32>>, _, _) =
            (Vec::with_capacity(MOST * threads), total, 0);
        let mut shares = Vec::with_capacity(threads);
        for (i, (panels, side, per_panel)) in matrices.enumerate() {
            let mut start = 0;
            while start < panels {
                if of_task == 0 {
                    let share = (total - left) * threads / total;
                    shares.resize((share + 1).max(shares.len()), tasks.len());
                    tasks.push(parts.len() as u32..0);
                    let done = total - left;
                    let end_of_share = (done * threads / total + 1) * total / threads;
                    of_task = ((end_of_share - done) / 3).max(Self::GRAIN);
                }
                let end = panels.min(start + (of_task / per_panel).max(1).next_multiple_of(side));
                let taken = per_panel * (end - start);
                (left, of_task) = (left - taken, of_task.saturating_sub(taken));
                parts.push((i as u32, start as u32..end as u32));
                tasks.last_mut().expect("one was begun").end = parts.len() as u32;
                start = end;
            }
        }
        shares.resize(threads, tasks.len());
        Plan { parts, tasks, shares, total }
    }

    /// Calls `run((matrix, panels), next)` for all parts, on all threads where that is worth it. `next` is the part that the
    /// thread most likely gets then. The caller does `meanwhile` first.
    fn run(&self, meanwhile: impl FnOnce(), run: impl Fn(Part, Option<Part>) + Sync) {
        let part = |(i, panels): &(u32, Range<u32>)| (*i as usize, panels.start as usize..panels.end as usize);
        let run = |at: usize| run(part(&self.parts[at]), self.parts.get(at + 1).map(part));
        if self.total < 2 * Self::GRAIN {
            meanwhile();
            (0..self.parts.len()).for_each(run);
        } else {
            parallel::run_shares(
                self.tasks.len(),
                |thread| self.shares[thread],
                meanwhile,
                |i| {
                    let Range { start, end } = self.tasks[i];
                    (start as usize..end as usize).for_each(run)
                },
            );
        }
    }
}

/// Checks what [`multiply`] relies on, for an `x` and a `y` of so many numbers, in rows of so many.
///
/// # Panics
/// If a product lies outside `x` or `y`, or they are not in ascending order of rows and, for the same
/// rows, of columns, without overlap.
fn check(products: &[Product], (x, x_stride): (usize, usize), (y, y_stride): (usize, usize)) {
    let mut last: Option<&Product> = None;
    for p in products {
        assert!(p.rows.end * x_stride <= x && p.x_column + p.matrix.k() <= x_stride);
        assert!(p.rows.end * y_stride <= y && p.y_column + p.matrix.n() <= y_stride);
        assert!(last.is_none_or(|q| match q.rows == p.rows {
            true => q.y_column + q.matrix.n() <= p.y_column,
            false => q.rows.end <= p.rows.start,
        }));
        last = Some(p);
    }
}

/// Products of rows of one input, and where they go: rows of `y_stride` numbers.
pub struct Batch<'a> {
    pub products: &'a [Product<'a>],
    pub y: &'a mut [f32],
    pub y_stride: usize,
    /// Whether they are added to `y`, or replace what is there.
    pub add: bool,
}

/// `y[rows, columns] += scale * x[rows, ..k] Wᵀ`, or `=`, for each product of a batch, all in one parallel region. `x` has
/// rows of `x_stride` numbers.
///
/// # Panics
/// If a product lies outside `x` or `y`, or they are not in ascending order of rows and, for the same rows, of columns, without
/// overlap.
pub fn multiply(simd: Simd, x: &[f32], x_stride: usize, batch: Batch) {
    let Batch { products, y, y_stride, add } = batch;
    check(products, (x.len(), x_stride), (y.len(), y_stride));
    let (places, rounded) = round(simd, products.iter(), x, x_stride);
    let target = Target { start: y.as_mut_ptr(), stride: y_stride, add };
    // SAFETY: the products lie inside `y`.
    unsafe { multiply_parts(simd, (x, x_stride), to(products, &places, target).collect(), &rounded, || {}) }
}

/// A product, where its rows are, and where it goes.
type Placed<'a> = (Product<'a>, Option<usize>, Target);

/// Products that go to one place.
fn to<'a, 'b>(
    products: &'b [Product<'a>],
    places: &'b [Option<usize>],
    target: Target,
) -> impl Iterator<Item = Placed<'a>> + 'b {
    products.iter().zip(places).map(move |(p, &place)| (Product { rows: p.rows.clone(), ..*p }, place, target))
}

/// [`multiply`] of products that were checked and rounded, in the order in which they are begun; this thread does `meanwhile`
/// before its part. Targets begin with the first row of all.
///
/// # Safety
/// Targets are good for writing what the products give, and nobody else touches it meanwhile.
unsafe fn multiply_parts(
    simd: Simd,
    (x, x_stride): (&[f32], usize),
    products: Vec<Placed>,
    rounded: &[(usize, Whole)],
    meanwhile: impl FnOnce(),
) {
    let plan = Plan::new(products.iter().map(|(p, ..)| (p.matrix.panels(), p.matrix.side(), Plan::of_panel(p))));
    plan.run(meanwhile, |(i, panels), next| {
        let ahead = next.map_or(Ahead::nothing(), |(i, panels)| products[i].0.matrix.ahead(panels));
        let (p, place, y) = &products[i];
        let x = Input::of(p, x, x_stride, place.map(|place| &rounded[place]), 0);
        // SAFETY: the caller's promise; panels of one product are disjoint, and so are products.
        unsafe {
            let y = y.at(p.rows.start, p.y_column + panels.start * LANES);
            p.matrix.multiply_panels(simd, panels, p.rows.len(), x, ahead, p.scale, y);
        }
    });
}

/// Rows that are worth a part.
const PART_ROWS: usize = 16;

/// A product in parts of some rows: an adapter's A has no more panels than one.
fn in_parts<'a>((p, place, target): Placed<'a>) -> impl Iterator<Item = Placed<'a>> {
    /// For each thread.
    const PARTS: usize = 2;
    let size = p.rows.len().div_ceil(PARTS * parallel::threads()).max(1).next_multiple_of(PART_ROWS);
    p.rows.clone().step_by(size).map(move |row| {
        let rows = row..p.rows.end.min(row + size);
        (Product { rows, ..p }, place, target)
    })
}

/// A layer's products: of its input with matrices whose outputs lie side by side, and with the factors of adapters.
pub struct Layer<'a, U> {
    /// Input features of a row.
    pub k: usize,
    pub matrices: &'a [PackedMatrix],
    /// Products of the input, rows of `width` numbers.
    pub down: Vec<Product<'a>>,
    pub width: usize,
    /// Gives the products of what comes of `down`, which are added to the outputs: those of each are those of a matrix. It is
    /// called while the other threads compute, and there are such products only where there are some `down`.
    pub up: U,
}

/// What a layer's products read.
struct Read<'a> {
    /// `[rows, k]`.
    x: &'a [f32],
    /// The products with the layer's own matrices.
    base: &'a [Product<'a>],
    /// Of these, then of those that the adapters begin with: where their rows are.
    places: &'a [Option<usize>],
    rounded: &'a [(usize, Whole)],
}

/// `gate(first, second, out)`, number by number.
pub type Gate<'a> = &'a (dyn Fn(&[f32], &[f32], &mut [f32]) + Sync);

/// What the outputs of some rows lack yet: the last products of adapters. Whoever goes on with a row adds them to it first, so
/// that threads need not wait for each other in between.
pub struct Rest<'a> {
    simd: Simd,
    /// What the products read, rows of `width` numbers.
    h: Buffer,
    width: usize,
    /// Outputs of a row, and numbers from one to the next.
    n: usize,
    stride: usize,
    up: Vec<Product<'a>>,
    /// Of each of `up`: where its rows are.
    places: Vec<Option<usize>>,
    rounded: Vec<(usize, Whole)>,
}

impl Rest<'_> {
    /// Adds it to some rows' outputs, `[rows, stride]`.
    ///
    /// # Panics
    /// If there are not so many rows.
    pub fn add(&self, rows: Range<usize>, y: &mut [f32]) {
        assert!(y.len() == rows.len() * self.stride && rows.end * self.width <= self.h.len());
        let y = Target { start: y.as_mut_ptr(), stride: self.stride, add: true };
        // SAFETY: `y` has these rows.
        unsafe { self.add_columns(rows, 0..self.n, y) }
    }

    /// The same for some of the outputs, in whole panels; `y` begins with the first of them.
    ///
    /// # Safety
    /// `y` is good for writing and adding to them, and nobody else touches them meanwhile.
    pub unsafe fn add_columns(&self, rows: Range<usize>, columns: Range<usize>, y: Target) {
        let first = self.up.partition_point(|p| p.rows.end <= rows.start);
        let parts = self.up.iter().enumerate().skip(first).take_while(|(_, p)| p.rows.start < rows.end);
        let mut parts = parts
            .map(|(i, p)| (i, p, columns.start.max(p.y_column)..columns.end.min(p.y_column + p.matrix.n())))
            .filter(|(.., columns)| !columns.is_empty())
            .map(|(i, p, columns)| {
                let panels = (columns.start - p.y_column) / LANES..(columns.end - p.y_column).div_ceil(LANES);
                debug_assert!((columns.start - p.y_column).is_multiple_of(LANES));
                (i, p, columns, panels)
            })
            .peekable();
        while let Some((i, p, of_part, panels)) = parts.next() {
            let own = p.rows.start.max(rows.start)..p.rows.end.min(rows.end);
            let place = self.places[i].map(|place| &self.rounded[place]);
            let input = Input::of(p, &self.h, self.width, place, own.start - p.rows.start);
            let ahead = match (parts.peek(), self.up.get(i + 1)) {
                (Some((_, p, _, panels)), _) => p.matrix.ahead(panels.clone()),
                // The next rows', which this thread most likely gets then.
                (None, Some(p)) if columns.len() == self.n => p.matrix.ahead(0..p.matrix.panels()),
                _ => Ahead::nothing(),
            };
            // SAFETY: the caller's promise.
            unsafe {
                let y = y.at(own.start - rows.start, of_part.start - columns.start);
                p.matrix.multiply_panels(self.simd, panels, own.len(), input, ahead, p.scale, y);
            }
        }
    }

    /// Adds it to all rows' outputs.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn add_all(&self, y: &mut [f32]) {
        assert_eq!(y.len() * self.width, self.h.len() * self.stride);
        let target = Target { start: y.as_mut_ptr(), stride: self.stride, add: true };
        let up = to(&self.up, &self.places, target).collect();
        // SAFETY: `y` has all rows.
        unsafe { multiply_parts(self.simd, (&self.h, self.width), up, &self.rounded, || {}) }
    }
}

/// Calls `task(rows, theirs)` for ranges that make up all rows, on all threads where that is worth it: `theirs` are these rows
/// of each of `data`, whose rows are of so many numbers. What the task does with a row takes as long as `each` multiply-adds,
/// beside adding the rest.
///
/// # Panics
/// If `data` are not of as many rows.
pub fn by_rows<const N: usize>(
    rest: Option<&Rest>,
    each: usize,
    data: [(&mut [f32], usize); N],
    task: impl Fn(Range<usize>, [&mut [f32]; N]) + Sync,
) {
    let rows = data.first().map_or(0, |(data, width)| data.len() / width);
    assert!(data.iter().all(|(data, width)| data.len() == rows * width));
    let data = data.map(|(data, width)| Target { start: data.as_mut_ptr(), stride: width, add: false });
    let task = |rows: Range<usize>| {
        let theirs = data.each_ref().map(|data| {
            // SAFETY: there are these rows, and each is in one range.
            unsafe { std::slice::from_raw_parts_mut(data.at(rows.start, 0).start, rows.len() * data.stride) }
        });
        task(rows, theirs);
    };
    let of_rest = rest.map_or(0, |rest| rest.up.iter().map(|p| p.matrix.panels() * Plan::of_panel(p)).sum());
    // As if each row were a panel of a matrix.
    let plan = Plan::new(std::iter::once((rows, 1, each + of_rest / rows.max(1))));
    plan.run(|| {}, |(_, rows), _| task(rows));
}

impl<'a, U: FnOnce() -> Vec<Product<'a>>> Layer<'a, U> {
    /// Outputs.
    fn n(&self) -> usize {
        self.matrices.iter().map(PackedMatrix::n).sum()
    }

    /// Numbers from a row of outputs to the next: whoever adds to the same columns of one row after the other would read
    /// from memory that has a written line's place in a page, for which the processor first waits until that is written (Intel's
    /// Optimization Reference Manual, "4-KByte aliasing").
    pub fn stride(&self) -> usize {
        /// Rows as far apart meet in a page, or two of them do.
        const HALF_PAGE: usize = 2048 / size_of::<f32>();
        let n = self.n();
        if n.is_multiple_of(HALF_PAGE) && !self.down.is_empty() { n + LANES } else { n }
    }

    /// The outputs of `x`, `[rows, k]`, to `y`, `[rows, n]`.
    ///
    /// # Panics
    /// If there are not such matrices, rows or products.
    pub fn multiply(self, simd: Simd, x: &[f32], y: &mut [f32]) {
        let n = self.n();
        if let Some(rest) = self.begin_at(simd, x, y, n) {
            rest.add_all(y);
        }
    }

    /// [`Self::multiply`], but for what it returns; rows are [`Self::stride`] apart.
    ///
    /// # Panics
    /// As there.
    pub fn begin(self, simd: Simd, x: &[f32], y: &mut [f32]) -> Option<Rest<'a>> {
        let stride = self.stride();
        self.begin_at(simd, x, y, stride)
    }

    fn begin_at(self, simd: Simd, x: &[f32], y: &mut [f32], stride: usize) -> Option<Rest<'a>> {
        assert_eq!(y.len(), x.len() / self.k * stride);
        self.with_read(simd, x, |layer, read| match layer.is_together(x) {
            true => {
                layer.together(simd, read, (y, stride), None);
                None
            }
            false => layer.apart(simd, read, (y, stride)),
        })
    }

    /// What the gate makes of the outputs of two matrices to `y`, `[rows, n / 2]`.
    ///
    /// # Panics
    /// As [`Self::multiply`].
    pub fn gated(self, simd: Simd, x: &[f32], y: &mut [f32], gate: Gate) {
        /// What takes as long as an output in multiply-adds.
        const GATE: usize = 16;
        let (rows, n) = (x.len() / self.k, self.n());
        assert!(matches!(self.matrices, [a, b] if a.n() == b.n()) && y.len() == rows * n / 2);
        self.with_read(simd, x, |layer, read| {
            if layer.is_together(x) {
                return layer.together(simd, read, (y, n / 2), Some(gate));
            }
            let stride = layer.stride();
            let mut outputs = Buffer::new(rows * stride);
            let rest = layer.apart(simd, read, (&mut outputs, stride));
            by_rows(rest.as_ref(), GATE * n, [(y, n / 2), (&mut outputs, stride)], |rows, [y, outputs]| {
                if let Some(rest) = &rest {
                    rest.add(rows, outputs);
                }
                for (outputs, out) in outputs.chunks_exact(stride).zip(y.chunks_exact_mut(n / 2)) {
                    let (first, second) = outputs[..n].split_at(n / 2);
                    gate(first, second, out);
                }
            });
        })
    }

    /// Calls `then` with what the products read.
    fn with_read<T>(self, simd: Simd, x: &[f32], then: impl FnOnce(Self, &Read) -> T) -> T {
        let (k, rows, n) = (self.k, x.len() / self.k, self.n());
        let mut base: Vec<Product> = Vec::with_capacity(self.matrices.len());
        for matrix in self.matrices {
            let y_column = base.last().map_or(0, |last| last.y_column + last.matrix.n());
            base.push(Product { matrix, rows: 0..rows, x_column: 0, y_column, scale: 1.0 });
        }
        check(&base, (x.len(), k), (rows * n, n));
        check(&self.down, (x.len(), k), (rows * self.width, self.width));
        let (places, rounded) = round(simd, base.iter().chain(&self.down), x, k);
        then(self, &Read { x, base: &base, places: &places, rounded: &rounded })
    }

    /// How to go about it: [`Self::together`] or [`Self::apart`].
    fn is_together(&self, x: &[f32]) -> bool {
        /// Of fewer rows, all outputs stay in a near cache.
        const FEW_ROWS: usize = 64;
        /// For fewer rows of an adapter it counts more to read its factors in their order than where the outputs are.
        const FEW_ROWS_OF_ADAPTER: usize = 16;
        let of_adapters = self.down.iter().map(|p| p.rows.len()).sum::<usize>();
        x.len() / self.k >= FEW_ROWS && of_adapters >= FEW_ROWS_OF_ADAPTER * self.down.len()
    }

    /// The base's products with those that the adapters begin with, and where it is worth a parallel region of its own, the rest.
    /// Each matrix is read from front to back.
    fn apart(
        self,
        simd: Simd,
        &Read { x, base, places, rounded }: &Read,
        (y, stride): (&mut [f32], usize),
    ) -> Option<Rest<'a>> {
        /// Rows for each thread, of which one more or less is little.
        const ROWS: usize = 4;
        let (rows, n, width) = (x.len() / self.k, self.n(), self.width);
        let mut h = Buffer::new(rows * width);
        let of_base = Target { start: y.as_mut_ptr(), stride, add: false };
        let of_down = Target { start: h.as_mut_ptr(), stride: width, add: false };
        let (of_first, places) = places.split_at(base.len());
        let products = to(base, of_first, of_base).chain(to(&self.down, places, of_down)).collect();
        let mut up = vec![];
        // SAFETY: `y` and `h` have all rows.
        unsafe { multiply_parts(simd, (x, self.k), products, rounded, || up = (self.up)()) };
        if up.is_empty() {
            return None;
        }
        check(&up, (h.len(), width), (rows * n, n));
        let (places, rounded) = round(simd, up.iter(), &h, width);
        let rest = Rest { simd, h, width, n, stride, up, places, rounded };
        if rows < ROWS * parallel::threads() {
            rest.add_all(y);
            return None;
        }
        Some(rest)
    }

    /// The products that the adapters begin with; then all that concerns some outputs as one task, which finds in a near cache
    /// what it wrote before.
    fn together(
        self,
        simd: Simd,
        &Read { x, base, places, rounded }: &Read,
        (y, stride): (&mut [f32], usize),
        gate: Option<Gate>,
    ) {
        /// Rows whose outputs of both matrices stay in a near cache.
        const NEAR_ROWS: usize = 256;
        let (k, width, rows, n) = (self.k, self.width, x.len() / self.k, self.n());
        let (places, of_down) = places.split_at(base.len());
        let mut h = Buffer::new(rows * width);
        let target = Target { start: h.as_mut_ptr(), stride: width, add: false };
        let (mut up, down) = (vec![], to(&self.down, of_down, target).flat_map(in_parts).collect());
        // SAFETY: `h` has all rows.
        unsafe { multiply_parts(simd, (x, k), down, rounded, || up = (self.up)()) };
        check(&up, (h.len(), width), (rows * n, n));
        let (of_up, rounded_h) = round(simd, up.iter(), &h, width);
        // Of each matrix.
        let is_of = |up: &Product, base: &Product| (up.y_column, up.matrix.n()) == (base.y_column, base.matrix.n());
        let adds: Vec<Vec<usize>> =
            base.iter().map(|base| (0..up.len()).filter(|&i| is_of(&up[i], base)).collect()).collect();
        assert!(adds.iter().map(Vec::len).sum::<usize>() == up.len());

        // The outputs of a matrix's panels for some rows; `y` begins with them.
        // SAFETY: as for `multiply_panels`.
        let outputs = |i: usize, panels: Range<usize>, rows: Range<usize>, y: Target| unsafe {
            let input = Input::of(&base[i], x, k, places[i].map(|place| &rounded[place]), rows.start);
            base[i].matrix.multiply_panels(simd, panels.clone(), rows.len(), input, Ahead::nothing(), 1.0, y);
            for &i in &adds[i] {
                let p = &up[i];
                let own = p.rows.start.max(rows.start)..p.rows.end.min(rows.end);
                if !own.is_empty() {
                    let place = of_up[i].map(|place| &rounded_h[place]);
                    let input = Input::of(p, &h, width, place, own.start - p.rows.start);
                    let y = Target { add: true, ..y.at(own.start - rows.start, 0) };
                    p.matrix.multiply_panels(simd, panels.clone(), own.len(), input, Ahead::nothing(), p.scale, y);
                }
            }
        };
        let of_panel =
            |i: usize| Plan::of_panel(&base[i]) + adds[i].iter().map(|&i| Plan::of_panel(&up[i])).sum::<usize>();
        let Some(gate) = gate else {
            let y = Target { start: y.as_mut_ptr(), stride, add: false };
            let matrices = base.iter().enumerate().map(|(i, p)| (p.matrix.panels(), p.matrix.side(), of_panel(i)));
            Plan::new(matrices).run(
                || {},
                |(i, panels), _| {
                    // SAFETY: the outputs lie inside `y`, and those of panels are disjoint.
                    unsafe { outputs(i, panels.clone(), 0..rows, y.at(0, base[i].y_column + panels.start * LANES)) }
                },
            );
            return;
        };
        let half = n / 2;
        let y = Target { start: y.as_mut_ptr(), stride, add: false };
        let near = rows.div_ceil(rows.div_ceil(NEAR_ROWS).max(1)).max(1);
        let (panels, side) = (base[0].matrix.panels(), base[0].matrix.side());
        Plan::new(std::iter::once((panels, side, of_panel(0) + of_panel(1)))).run(
            || {},
            |(_, panels), _| {
                let (column, width) = (panels.start * LANES, panels.len() * LANES);
                let count = width.min(half - column);
                let apart = 2 * width + LANES;
                let mut both = Buffer::new(near * apart);
                for start in (0..rows).step_by(near) {
                    let of_block = start..rows.min(start + near);
                    let target = Target { start: both.as_mut_ptr(), stride: apart, add: false };
                    for side in [0, 1] {
                        // SAFETY: `both` has room for so many rows of both.
                        unsafe { outputs(side, panels.clone(), of_block.clone(), target.at(0, side * width)) };
                    }
                    for (row, both) in of_block.zip(both.chunks_exact(apart)) {
                        let (first, second) = both.split_at(width);
                        // SAFETY: these outputs lie inside `y`, and are this task's alone.
                        let out = unsafe { std::slice::from_raw_parts_mut(y.at(row, column).start, count) };
                        gate(&first[..count], &second[..count], out);
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::matmul::Format;
    use crate::base::testing::noise;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Bit by bit, and with a gate as well.
        #[test]
        fn a_layer_equals_its_products_one_after_the_other(
            rows in prop_oneof![1usize..40, 250usize..600],
            // Of 256, rows of both outputs are not where they would be one behind the other.
            (n, groups) in (prop_oneof![8 => 1usize..150, 1 => Just(256)], 1usize..4),
            // Rows without an adapter before each adapter's, its rows, its ranks for both matrices.
            adapters in prop::collection::vec((0usize..4, 1usize..300, 0usize..3, 1usize..3), 0..5),
            format in prop::sample::select(vec![Format::F32, Format::Q4, Format::Int8]),
            (like_base, seed) in any::<(bool, u64)>(),
        ) {
            let (mut next, k) = (noise(seed), 64 * groups);
            let mut pack = |n: usize, k: usize| {
                let weights: Vec<f32> = (0..n * k).map(|_| next()).collect();
                match format {
                    Format::Int8 if like_base => PackedMatrix::pack_int8(&weights, n, k),
                    format if format.fits(k) => PackedMatrix::pack(&weights, n, k, format),
                    _ => PackedMatrix::pack(&weights, n, k, Format::Bf16),
                }
            };
            let matrices = [pack(n, k), pack(n, k)];
            let (mut first, mut own) = (0, vec![]);
            for &(gap, count, one, other) in &adapters {
                let range = (first + gap).min(rows)..(first + gap + count).min(rows);
                first = range.end;
                let ranks = [16 * one, 16 * other];
                let b: Vec<_> = ranks.iter().map(|&rank| (rank > 0).then(|| pack(n, rank))).collect();
                own.push((range, pack(ranks[0] + ranks[1], k), b, ranks));
            }
            own.retain(|(range, ..)| !range.is_empty());
            let width = own.iter().map(|(_, a, ..)| a.n()).max().unwrap_or(0);
            let of = |matrix, rows: &Range<usize>, x_column, y_column| {
                Product { matrix, rows: rows.clone(), x_column, y_column, scale: 1.5 }
            };
            let down: Vec<_> = own.iter().map(|(rows, a, ..)| of(a, rows, 0, 0)).collect();
            let up: Vec<_> = own.iter().flat_map(|(rows, _, b, ranks)| {
                let places = b.iter().zip([(0, 0), (ranks[0], n)]);
                places.filter_map(move |(b, (x, y))| Some(of(b.as_ref()?, rows, x, y)))
            }).collect();
            let x: Vec<f32> = (0..rows * k).map(|_| next()).collect();
            let layer = || Layer {
                k,
                matrices: &matrices,
                down: down.iter().map(|p| Product { rows: p.rows.clone(), ..*p }).collect(),
                width,
                up: || up.iter().map(|p| Product { rows: p.rows.clone(), ..*p }).collect(),
            };
            let gate = |first: &[f32], second: &[f32], out: &mut [f32]| {
                out.iter_mut().zip(first.iter().zip(second)).for_each(|(out, (a, b))| *out = a.max(0.0) * b);
            };
            for simd in Simd::all() {
                let (mut want, mut h) = (vec![f32::NAN; rows * 2 * n], vec![0.0; rows * width]);
                let base = [0, 1].map(|i| Product { scale: 1.0, ..of(&matrices[i], &(0..rows), 0, i * n) });
                multiply(simd, &x, k, Batch { products: &base, y: &mut want, y_stride: 2 * n, add: false });
                multiply(simd, &x, k, Batch { products: &down, y: &mut h, y_stride: width, add: false });
                multiply(simd, &h, width, Batch { products: &up, y: &mut want, y_stride: 2 * n, add: true });
                let mut got = vec![f32::NAN; rows * 2 * n];
                layer().multiply(simd, &x, &mut got);
                prop_assert!(got == want, "{simd:?}");
                let stride = layer().stride();
                let mut got = vec![f32::NAN; rows * stride];
                if let Some(rest) = layer().begin(simd, &x, &mut got) {
                    // Some rows, panel by panel, then the others.
                    let some = rows / 3;
                    let (first, last) = got.split_at_mut(some * stride);
                    for panel in 0..n.div_ceil(LANES) {
                        for matrix in [0, n] {
                            let columns = matrix + panel * LANES..matrix + n.min((panel + 1) * LANES);
                            let y = Target { start: first.as_mut_ptr(), stride, add: true };
                            // SAFETY: these columns are in all rows.
                            unsafe { rest.add_columns(0..some, columns.clone(), y.at(0, columns.start)) };
                        }
                    }
                    rest.add(some..rows, last);
                }
                let got: Vec<f32> = got.chunks_exact(stride).flat_map(|row| &row[..2 * n]).copied().collect();
                prop_assert!(got == want, "{simd:?} with the rest by rows");
                let mut gated = vec![f32::NAN; rows * n];
                layer().gated(simd, &x, &mut gated, &gate);
                let mut of_all = vec![f32::NAN; rows * n];
                of_all.chunks_exact_mut(n).zip(want.chunks_exact(2 * n)).for_each(|(out, both)| gate(&both[..n], &both[n..], out));
                prop_assert!(gated == of_all, "{simd:?} with a gate");
            }
        }
    }
}
