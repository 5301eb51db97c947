//! [`super::multiply`] for AMX.
//!
//! The tiles multiply numbers of 16 bits, `bf16`, which have the range of f32 and 8 of its 24 binary digits, and add up in
//! f32 (Intel's Software Developer's Manual, `TDPBF16PS`). Each number is split in two of them: `x = high + low`, but for a
//! part of 2⁻¹⁷ at most. Of the product of two such sums three products are made, and the fourth, of both low parts, is left
//! out. A product is off by 2⁻¹⁵ of itself at worst and by an eighth of that as a rule, to either side, so that the errors of
//! a sum cancel: between f32 and the TF32 of GPUs, 2⁻¹¹. That is three tiles for one, which is still quicker than vectors of
//! f32. (The idea is of Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
//! Higher-Precision Computations", 2019.)

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;
use std::sync::OnceLock;
use std::thread::LocalKey;

use rayon::prelude::*;

use super::{Matrix, Target};
use crate::base::tiles::{self, BYTES, Numbers, ROWS};

/// Terms of the sums that a tile takes at once: pairs of numbers lie together.
const TERMS: usize = 2 * ROWS;
/// Lines and terms of the factor with fewer lines that are split at once: so many stay in a near cache while all lines of the
/// other one, split a few blocks at a time, are multiplied with them.
const MAX_LINES: usize = 256;
const MAX_TERMS: usize = 768;
/// Blocks of the other factor that are split at a time, an even number.
const GROUP: usize = 8;
// Two blocks are multiplied with two.
const _: () = assert!(MAX_LINES.is_multiple_of(2 * ROWS) && GROUP.is_multiple_of(2) && MAX_TERMS.is_multiple_of(TERMS));
/// Terms after those that are split, whose numbers are fetched meanwhile.
const AHEAD: usize = TERMS;
/// Fewer rows, columns or terms leave too much of the tiles empty.
const MIN_SIDE: usize = 24;
/// Fewer products are not worth waking other threads for.
const MIN_SHARED: usize = 1 << 24;

/// 16 rows of 16 pairs of bf16, the first of a pair in the low half.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Pairs([[u32; ROWS]; ROWS]);

/// [`TERMS`] terms of 16 rows, or of 16 columns, split.
#[derive(Clone, Copy)]
#[repr(C)]
struct Split {
    high: Pairs,
    low: Pairs,
}

/// Sums of 16 rows and 16 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; ROWS]; ROWS]);

/// A matrix as lines of terms: the rows of the left factor, the columns of the right one.
#[derive(Clone, Copy)]
struct Lines<'a> {
    data: &'a [f32],
    /// Numbers from a line to the next, and from a term to the next; one of them is 1.
    line: usize,
    term: usize,
    lines: usize,
    terms: usize,
    /// Whether a tile has a line in each row; else a pair of terms.
    by_line: bool,
}

/// Whether the CPU has what this takes, and the product is worth it.
pub fn suits((m, n, k): (usize, usize, usize), a: &Matrix, b: &Matrix) -> bool {
    m.min(n).min(k) >= MIN_SIDE && is_there() && (a.row == 1 || a.column == 1) && (b.row == 1 || b.column == 1)
}

fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") && tiles::multiply(Numbers::Bf16)
    })
}

thread_local! {
    /// Room for splits of either factor, kept from product to product.
    static NEAR: Cell<Vec<Split>> = const { Cell::new(Vec::new()) };
    static FAR: Cell<Vec<Split>> = const { Cell::new(Vec::new()) };
}

/// Takes room for so many splits, with anything in them. Taken, and not borrowed: a thread that waits for others may be given
/// another product meanwhile.
fn room(of: &'static LocalKey<Cell<Vec<Split>>>, count: usize) -> Vec<Split> {
    let mut room = of.take();
    if room.len() < count {
        room.resize(count, Split { high: Pairs([[0; ROWS]; ROWS]), low: Pairs([[0; ROWS]; ROWS]) });
    }
    room
}

/// The same as [`super::multiply`], whose asserts hold.
///
/// # Panics
/// If the CPU has not what it takes, or numbers of a matrix do not lie side by side in rows or in columns.
pub fn multiply((m, n, k): (usize, usize, usize), a: Matrix, b: Matrix, alpha: f32, out: Target, parallel: bool) {
    let left = Lines { data: a.data, line: a.row, term: a.column, lines: m, terms: k, by_line: true };
    let right = Lines { data: b.data, line: b.column, term: b.row, lines: n, terms: k, by_line: false };
    assert!(is_there() && [left, right].iter().all(|lines| lines.line == 1 || lines.term == 1));
    let Target { data, stride, add } = out;
    assert!(m > 0 && n > 0 && (m - 1) * stride + n <= data.len());
    let out = Out { first: data.as_mut_ptr(), stride, rows: m, columns: n, alpha };
    let parallel = parallel && m * n * k >= MIN_SHARED && rayon::current_num_threads() > 1;
    let (near, far) = if m < n { (left, right) } else { (right, left) };
    let blocks = far.lines.div_ceil(ROWS);
    let share =
        if parallel { blocks.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(GROUP) } else { blocks };
    for terms in parts(k, MAX_TERMS) {
        let steps = terms.len().div_ceil(TERMS);
        let add = add || terms.start > 0;
        for lines in parts(near.lines, MAX_LINES) {
            let count = lines.len().div_ceil(ROWS) * steps;
            let mut splits = room(&NEAR, count);
            // SAFETY of what follows: the CPU has it, by the assert; the shares are of different places of `out`.
            let split = |(block, out): (usize, &mut [Split])| unsafe {
                let block = lines.start / ROWS + block;
                near.split(block..block + 1, &terms, out);
            };
            if parallel {
                splits[..count].par_chunks_exact_mut(steps).enumerate().for_each(split);
            } else {
                splits[..count].chunks_exact_mut(steps).enumerate().for_each(split);
            }
            let product =
                Product { near: &splits[..count], first: lines.start / ROWS, far, terms: terms.clone(), out, add };
            if parallel {
                let shares: Vec<_> = parts(blocks, share).collect();
                shares.into_par_iter().for_each(|share| unsafe { product.blocks(share) });
            } else {
                unsafe { product.blocks(0..blocks) };
            }
            NEAR.set(splits);
        }
    }
}

fn parts(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(most).map(move |start| start..count.min(start + most))
}

impl Lines<'_> {
    /// Splits the lines of blocks, [`TERMS`] terms at a time, into `[blocks][steps]`; what is read goes through the memory in
    /// one direction, as far as it can.
    ///
    /// # Safety
    /// [`is_there`]; there are such blocks and such terms.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn split(&self, blocks: Range<usize>, terms: &Range<usize>, out: &mut [Split]) {
        let steps = terms.len().div_ceil(TERMS);
        let mut step = |block: usize, step: usize| {
            let lines = block * ROWS..self.lines.min((block + 1) * ROWS);
            let first = terms.start + step * TERMS;
            let out = &mut out[(block - blocks.start) * steps + step];
            // SAFETY: the caller's promise.
            unsafe { self.split_step(lines, first..terms.end.min(first + TERMS), out) };
        };
        if self.term == 1 {
            blocks.clone().for_each(|block| (0..steps).for_each(|s| step(block, s)));
        } else {
            (0..steps).for_each(|s| blocks.clone().for_each(|block| step(block, s)));
        }
    }

    /// Splits at most 16 lines and [`TERMS`] terms; what is missing of a tile is 0.
    ///
    /// # Safety
    /// [`is_there`]; there are such lines and terms.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn split_step(&self, lines: Range<usize>, terms: Range<usize>, out: &mut Split) {
        debug_assert!(lines.end <= self.lines && terms.end <= self.terms);
        let at = |line: usize, term: usize| {
            self.data.as_ptr().wrapping_add((lines.start + line) * self.line + (terms.start + term) * self.term)
        };
        let mask = |count: usize| ((1u32 << count.min(ROWS)) - 1) as __mmask16;
        let Split { high, low } = out;
        // Rows of pairs, or of single lines, as they lie in memory.
        let filled = if self.term == 1 { lines.len() } else { terms.len().div_ceil(2) };
        // SAFETY: what a mask leaves out is not read; the rest is in the matrix, by the caller's promise.
        unsafe {
            if self.term == 1 {
                let masks = (mask(terms.len()), mask(terms.len().saturating_sub(ROWS)));
                for line in 0..filled {
                    _mm_prefetch::<_MM_HINT_T0>(at(line, AHEAD).cast());
                    _mm_prefetch::<_MM_HINT_T0>(at(line, AHEAD + ROWS).cast());
                    let first = _mm512_maskz_loadu_ps(masks.0, at(line, 0));
                    let second = _mm512_maskz_loadu_ps(masks.1, at(line, ROWS));
                    let both = pairs(_mm512_cvtne2ps_pbh(second, first));
                    let half =
                        |half: __m256i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
                    let first = _mm512_sub_ps(first, half(_mm512_castsi512_si256(both)));
                    let second = _mm512_sub_ps(second, half(_mm512_extracti64x4_epi64::<1>(both)));
                    high.set(line, both);
                    low.set(line, pairs(_mm512_cvtne2ps_pbh(second, first)));
                }
            } else {
                let mask = mask(lines.len());
                for pair in 0..filled {
                    _mm_prefetch::<_MM_HINT_T0>(at(0, AHEAD + 2 * pair).cast());
                    _mm_prefetch::<_MM_HINT_T0>(at(0, AHEAD + 2 * pair + 1).cast());
                    let first = _mm512_maskz_loadu_ps(mask, at(0, 2 * pair));
                    let there = if 2 * pair + 1 < terms.len() { mask } else { 0 };
                    let second = _mm512_maskz_loadu_ps(there, at(0, 2 * pair + 1));
                    let (first_high, second_high) = (rounded(first), rounded(second));
                    let first_low = rounded(_mm512_sub_ps(first, _mm512_castsi512_ps(first_high)));
                    let second_low = rounded(_mm512_sub_ps(second, _mm512_castsi512_ps(second_high)));
                    high.set(pair, _mm512_or_si512(_mm512_srli_epi32::<16>(first_high), second_high));
                    low.set(pair, _mm512_or_si512(_mm512_srli_epi32::<16>(first_low), second_low));
                }
            }
        }
        for row in filled..ROWS {
            high.set(row, _mm512_setzero_si512());
            low.set(row, _mm512_setzero_si512());
        }
        if (self.term == 1) != self.by_line {
            high.transpose();
            low.transpose();
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(numbers: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes of numbers.
    unsafe { std::mem::transmute(numbers) }
}

/// The nearest bf16, as f32.
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(x: __m512) -> __m512i {
    // SAFETY: both are 32 bytes of numbers.
    let bf16: __m256i = unsafe { std::mem::transmute(_mm512_cvtneps_pbh(x)) };
    _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bf16))
}

impl Pairs {
    #[target_feature(enable = "avx512f")]
    fn get(&self, row: usize) -> __m512i {
        // SAFETY: a row is a register.
        unsafe { _mm512_load_si512(self.0[row].as_ptr().cast()) }
    }

    #[target_feature(enable = "avx512f")]
    fn set(&mut self, row: usize, pairs: __m512i) {
        // SAFETY: a row is a register.
        unsafe { _mm512_store_si512(self.0[row].as_mut_ptr().cast(), pairs) }
    }

    #[target_feature(enable = "avx512f")]
    fn transpose(&mut self) {
        // Squares of two rows and two columns, then of four.
        let (mut r, mut t) = ([_mm512_setzero_si512(); ROWS], [_mm512_setzero_si512(); ROWS]);
        for i in 0..8 {
            let (even, odd) = (self.get(2 * i), self.get(2 * i + 1));
            t[2 * i] = _mm512_unpacklo_epi32(even, odd);
            t[2 * i + 1] = _mm512_unpackhi_epi32(even, odd);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        // `r[4 i + c]` has columns c, 4 + c, 8 + c and 12 + c of rows 4 i to 4 i + 3, a quarter each.
        for c in 0..4 {
            let even =
                [_mm512_shuffle_i32x4::<0x88>(r[c], r[4 + c]), _mm512_shuffle_i32x4::<0x88>(r[8 + c], r[12 + c])];
            let odd = [_mm512_shuffle_i32x4::<0xdd>(r[c], r[4 + c]), _mm512_shuffle_i32x4::<0xdd>(r[8 + c], r[12 + c])];
            self.set(c, _mm512_shuffle_i32x4::<0x88>(even[0], even[1]));
            self.set(4 + c, _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]));
            self.set(8 + c, _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]));
            self.set(12 + c, _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]));
        }
    }
}

/// Where the results go.
#[derive(Clone, Copy)]
struct Out {
    first: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
    alpha: f32,
}

/// A product of lines that are split, from a block on, and all lines of the other factor.
struct Product<'a> {
    /// `[blocks][steps]`.
    near: &'a [Split],
    first: usize,
    far: Lines<'a>,
    terms: Range<usize>,
    out: Out,
    add: bool,
}

// SAFETY: threads write to different places of `out`, as `blocks` demands.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Multiplies some of the blocks of the far factor.
    ///
    /// # Safety
    /// [`is_there`]; there are such blocks, `out` has room for all results, and no other thread writes those of these blocks.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn blocks(&self, blocks: Range<usize>) {
        let steps = self.terms.len().div_ceil(TERMS);
        let near = self.near.len() / steps;
        let mut far = room(&FAR, GROUP * steps);
        let mut sums = [Sums([[0.0; ROWS]; ROWS]); 4];
        // SAFETY: the caller's promise.
        unsafe {
            tiles::shape(&[(ROWS, BYTES); 8]);
            for first in blocks.clone().step_by(GROUP) {
                let group = first..blocks.end.min(first + GROUP);
                self.far.split(group.clone(), &self.terms, &mut far);
                for block in group.clone().step_by(2) {
                    // Of an odd number the last block is multiplied twice, and put once.
                    let far = pair(&far, block - first, group.len(), steps);
                    for i in (0..near).step_by(2) {
                        let (near, near_block) = (pair(self.near, i, near, steps), self.first + i);
                        if self.far.by_line {
                            block_of_sums(far, near, steps, &mut sums);
                            self.put(&sums, (block * ROWS, near_block * ROWS));
                        } else {
                            block_of_sums(near, far, steps, &mut sums);
                            self.put(&sums, (near_block * ROWS, block * ROWS));
                        }
                    }
                }
            }
            tiles::release();
        }
        FAR.set(far);
    }

    /// Puts the sums of 2 × 2 tiles into their places, from this row and column on.
    ///
    /// # Safety
    /// `out` has room for all results.
    #[target_feature(enable = "avx512f")]
    unsafe fn put(&self, sums: &[Sums; 4], (row, column): (usize, usize)) {
        let Out { first, stride, rows, columns, alpha } = self.out;
        let alpha = _mm512_set1_ps(alpha);
        for (i, sums) in sums.iter().enumerate() {
            let (row, column) = (row + i / 2 * ROWS, column + i % 2 * ROWS);
            let mask = ((1u32 << columns.saturating_sub(column).min(ROWS)) - 1) as __mmask16;
            for (sums, row) in sums.0.iter().zip(row..rows) {
                // SAFETY: inside the rows; what the mask leaves out is neither read nor written.
                unsafe {
                    let place = first.wrapping_add(row * stride + column);
                    let sums = _mm512_load_ps(sums.as_ptr());
                    let before = if self.add { _mm512_maskz_loadu_ps(mask, place) } else { _mm512_setzero_ps() };
                    _mm512_mask_storeu_ps(place, mask, _mm512_fmadd_ps(alpha, sums, before));
                }
            }
        }
    }
}

/// A block and the next, or the last twice.
fn pair(splits: &[Split], block: usize, blocks: usize, steps: usize) -> [*const Split; 2] {
    [block, (block + 1).min(blocks - 1)].map(|i| std::ptr::from_ref(&splits[i * steps]))
}

/// The sums of 2 × 16 rows and 2 × 16 columns, row by row of blocks.
///
/// # Safety
/// All tiles have their full shape; there are so many steps, at least one.
unsafe fn block_of_sums(left: [*const Split; 2], right: [*const Split; 2], steps: usize, sums: &mut [Sums; 4]) {
    const { assert!(size_of::<Split>() == 2048 && size_of::<Pairs>() == 1024 && size_of::<Sums>() == 1024) };
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{left0} + {line} + 1024]",
            "tileloadd tmm6, [{right0} + {line}]",
            "tileloadd tmm5, [{left1} + {line} + 1024]",
            "tileloadd tmm7, [{right1} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{left0} + {line}]",
            "tileloadd tmm5, [{left1} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{right0} + {line} + 1024]",
            "tileloadd tmm7, [{right1} + {line} + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {left0}, 2048",
            "add {left1}, 2048",
            "add {right0}, 2048",
            "add {right1}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 1024], tmm1",
            "tilestored [{sums} + {line} + 2048], tmm2",
            "tilestored [{sums} + {line} + 3072], tmm3",
            left0 = inout(reg) left[0] => _,
            left1 = inout(reg) left[1] => _,
            right0 = inout(reg) right[0] => _,
            right1 = inout(reg) right[1] => _,
            steps = inout(reg) steps => _,
            sums = in(reg) sums,
            line = in(reg) BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::numbers;
    use super::*;

    /// Compares the product with that in f64, by what the factors' sizes allow.
    fn check((m, n, k): (usize, usize, usize), by_rows: [bool; 2], (alpha, add, parallel): (f32, bool, bool)) {
        if !is_there() {
            return;
        }
        let (gap, width) = (3, n + 2);
        let matrix = |seed: u64, by_rows: bool, rows: usize, columns: usize| {
            let (lines, stride) = if by_rows { (rows, columns + gap) } else { (columns, rows + gap) };
            let data = numbers(seed, lines * stride);
            (data, if by_rows { (stride, 1) } else { (1, stride) })
        };
        let ((a, a_strides), (b, b_strides)) = (matrix(1, by_rows[0], m, k), matrix(2, by_rows[1], k, n));
        let before = numbers(3, m * width);
        let mut out = before.clone();
        let of = |data, (row, column)| Matrix { data, row, column };
        multiply(
            (m, n, k),
            of(&a, a_strides),
            of(&b, b_strides),
            alpha,
            Target { data: &mut out, stride: width, add },
            parallel,
        );
        for (at, (got, before)) in out.iter().zip(before).enumerate() {
            let (i, j) = (at / width, at % width);
            let before = if add || j >= n { f64::from(before) } else { 0.0 };
            let (mut want, mut size) = (before, before.abs());
            for t in 0..if j < n { k } else { 0 } {
                let a = a[i * a_strides.0 + t * a_strides.1];
                let product = f64::from(alpha) * f64::from(a) * f64::from(b[t * b_strides.0 + j * b_strides.1]);
                (want, size) = (want + product, size + product.abs());
            }
            let off = (f64::from(*got) - want).abs();
            assert!(off <= size * 2f64.powi(-15) && (j < n || off == 0.0), "{m} {n} {k}, {i} {j}: {got}, not {want}");
        }
    }

    #[test]
    fn equals_the_plain_product_beyond_what_is_split_at_once() {
        for (m, n, k) in
            [(MAX_LINES + 17, MAX_LINES + 35, 5), (40, 50, 2 * MAX_TERMS + 33), (300, 260, 300), (260, 300, 270)]
        {
            check((m, n, k), [true, false], (0.5, false, true));
            check((m, n, k), [false, true], (-1.0, true, true));
        }
    }

    proptest! {
        #[test]
        fn equals_the_plain_product(
            shape in (1usize..70, 1usize..70, 1usize..140),
            by_rows in any::<[bool; 2]>(),
            how in (prop_oneof![Just(1.0f32), Just(-0.3)], any::<bool>(), any::<bool>()),
        ) {
            check(shape, by_rows, how);
        }
    }
}
