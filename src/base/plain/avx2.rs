//! [`super::multiply`] for AVX2: few rows are multiplied with weights as they become f32 in registers, more with a block of a
//! panel that is unpacked first.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::Task;
use crate::base::matmul::{Data, Format};
use crate::base::simd::{self, Ahead, GROUP, LANES, Rows, Simd, UNROLLED, place};

/// Weights of one term.
type Lanes = [__m256; 2];

/// Rows of the largest tile: 12 accumulators, 2 weight vectors and a broadcast fit the 16 registers.
const TILE: usize = 6;
/// Rows that share one unpacking of the weights; their accumulators stay in the first-level cache.
const ROWS: usize = 128;
/// Terms that are unpacked at once: as f32 they leave room in the first-level cache for the rows.
const BLOCK: usize = 128;
/// How a matrix's weights become f32. Terms are counted from its first panel's first on through all panels.
trait Weights: Copy {
    /// Terms that share a scale.
    const GROUP: usize = GROUP;
    /// Whether the terms of a group's second half lie beside those of the first.
    const HALVES: bool = false;
    /// A group, ready to be read.
    type Group: Copy;

    /// The group that begins with a term.
    ///
    /// # Safety
    /// The CPU has avx2, fma and f16c; the term is the first of a group.
    unsafe fn group(self, term: usize) -> Self::Group;

    /// Term `i` of a group, or of its second half.
    ///
    /// # Safety
    /// The CPU has avx2, fma and f16c; the group, or half of it, has more than `i` terms.
    unsafe fn lanes<const SECOND: bool>(group: Self::Group, i: usize) -> Lanes;

    /// Some terms' memory.
    fn ahead(self, terms: Range<usize>) -> Ahead;

    /// Where the terms lie that need no unpacking.
    fn unpacked(self, _term: usize) -> Option<*const f32> {
        None
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(numbers: &[f32; LANES]) -> Lanes {
    // SAFETY: there are LANES numbers.
    unsafe { [_mm256_loadu_ps(numbers.as_ptr()), _mm256_loadu_ps(numbers[LANES / 2..].as_ptr())] }
}

/// # Safety
/// There are LANES numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves(numbers: *const u16) -> [__m128i; 2] {
    // SAFETY: the caller's promise.
    unsafe { [_mm_loadu_si128(numbers.cast()), _mm_loadu_si128(numbers.add(LANES / 2).cast())] }
}

/// Bytes without a sign as wide numbers.
///
/// # Safety
/// There are LANES bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn codes(bytes: *const u8) -> [__m256i; 2] {
    let (low, high);
    // SAFETY: the caller's promise. Of the intrinsic and a mask after it, the compiler makes three instructions of these two:
    // it loads, masks and only then widens.
    unsafe {
        asm!(
            "vpmovzxbd {low}, qword ptr [{bytes}]",
            "vpmovzxbd {high}, qword ptr [{bytes} + 8]",
            bytes = in(reg) bytes,
            low = out(ymm_reg) low,
            high = out(ymm_reg) high,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    [low, high]
}

/// `scale * q + min`. It makes no difference that the product is not rounded: with scales of so few bits it is exact.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled(q: [__m256i; 2], scale: Lanes, min: Lanes) -> Lanes {
    let lanes = |half: usize| _mm256_fmadd_ps(_mm256_cvtepi32_ps(q[half]), scale[half], min[half]);
    [lanes(0), lanes(1)]
}

/// Where the numbers of some terms lie, one for `apart` of them; nowhere past the end.
fn part<T>(of: &[T], terms: Range<usize>, apart: usize) -> Range<*const u8> {
    place(of.get(terms.start / apart..terms.end / apart).unwrap_or(&[]))
}

#[derive(Clone, Copy)]
struct F32<'a>(&'a [f32]);

impl Weights for F32<'_> {
    type Group = *const f32;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn group(self, term: usize) -> Self::Group {
        self.0[term * LANES..].as_ptr()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn lanes<const SECOND: bool>(w: Self::Group, i: usize) -> Lanes {
        // SAFETY: the caller's promise.
        load(unsafe { &*w.add(i * LANES).cast() })
    }

    fn ahead(self, terms: Range<usize>) -> Ahead {
        Ahead::new([part(self.0.as_chunks::<LANES>().0, terms, 1), place::<u8>(&[]), place::<u8>(&[])])
    }

    fn unpacked(self, term: usize) -> Option<*const f32> {
        Some(self.0[term * LANES..].as_ptr())
    }
}

/// bf16, or f16.
#[derive(Clone, Copy)]
struct Half<'a, const BF16: bool>(&'a [u16]);

impl<const BF16: bool> Weights for Half<'_, BF16> {
    type Group = *const u16;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn group(self, term: usize) -> Self::Group {
        self.0[term * LANES..].as_ptr()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn lanes<const SECOND: bool>(w: Self::Group, i: usize) -> Lanes {
        // SAFETY: the caller's promise.
        unsafe { halves(w.add(i * LANES)) }.map(|bits| match BF16 {
            true => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))),
            false => _mm256_cvtph_ps(bits),
        })
    }

    fn ahead(self, terms: Range<usize>) -> Ahead {
        Ahead::new([part(self.0.as_chunks::<LANES>().0, terms, 1), place::<u8>(&[]), place::<u8>(&[])])
    }
}

#[derive(Clone, Copy)]
struct Q8<'a, const GROUP: usize> {
    scales: &'a [[f32; LANES]],
    q: &'a [i8],
}

impl<const G: usize> Weights for Q8<'_, G> {
    const GROUP: usize = G;
    type Group = (Lanes, *const i8);

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn group(self, term: usize) -> Self::Group {
        (load(&self.scales[term / G]), self.q[term * LANES..].as_ptr())
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn lanes<const SECOND: bool>((scale, q): Self::Group, i: usize) -> Lanes {
        let lanes = |half: usize| {
            // SAFETY: the caller's promise.
            let q = unsafe { _mm_loadl_epi64(q.add(i * LANES + half * LANES / 2).cast()) };
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), scale[half])
        };
        [lanes(0), lanes(1)]
    }

    fn ahead(self, terms: Range<usize>) -> Ahead {
        let (scales, q) = (part(self.scales, terms.clone(), G), part(self.q.as_chunks::<LANES>().0, terms, 1));
        Ahead::new([scales, q, place::<u8>(&[])])
    }
}

#[derive(Clone, Copy)]
struct Q5<'a> {
    scales: &'a [[f32; LANES]],
    mins: &'a [[f32; LANES]],
    q: &'a [u8],
}

impl Weights for Q5<'_> {
    type Group = (Lanes, Lanes, *const u8);

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn group(self, term: usize) -> Self::Group {
        (load(&self.scales[term / GROUP]), load(&self.mins[term / GROUP]), self.q[term * LANES..].as_ptr())
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn lanes<const SECOND: bool>((scale, min, q): Self::Group, i: usize) -> Lanes {
        // SAFETY: the caller's promise.
        scaled(unsafe { codes(q.add(i * LANES)) }, scale, min)
    }

    fn ahead(self, terms: Range<usize>) -> Ahead {
        let [scales, mins] = [self.scales, self.mins].map(|numbers| part(numbers, terms.clone(), GROUP));
        Ahead::new([scales, mins, part(self.q.as_chunks::<LANES>().0, terms, 1)])
    }
}

#[derive(Clone, Copy)]
struct Q4<'a> {
    scales: &'a [[f32; LANES]],
    mins: &'a [[f32; LANES]],
    q: &'a [u8],
}

impl Weights for Q4<'_> {
    const HALVES: bool = true;
    type Group = (Lanes, Lanes, *const u8);

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn group(self, term: usize) -> Self::Group {
        (load(&self.scales[term / GROUP]), load(&self.mins[term / GROUP]), self.q[term / 2 * LANES..].as_ptr())
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn lanes<const SECOND: bool>((scale, min, q): Self::Group, i: usize) -> Lanes {
        // SAFETY: the caller's promise.
        let codes = unsafe { codes(q.add(i * LANES)) };
        let half =
            |codes| if SECOND { _mm256_srli_epi32::<4>(codes) } else { _mm256_and_si256(codes, _mm256_set1_epi32(15)) };
        scaled(codes.map(half), scale, min)
    }

    fn ahead(self, terms: Range<usize>) -> Ahead {
        let [scales, mins] = [self.scales, self.mins].map(|numbers| part(numbers, terms.clone(), GROUP));
        Ahead::new([scales, mins, part(self.q.as_chunks::<LANES>().0, terms, 2)])
    }
}

/// [`super::multiply`].
///
/// # Safety
/// As there; the CPU has avx2, fma and f16c, `x` is long enough, and the matrix has the panels.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn multiply(task: &Task) {
    // SAFETY: the caller's promise.
    unsafe {
        match task.matrix.data() {
            Data::F32(w) => with(task, F32(w)),
            Data::Half(w) if task.matrix.format() == Format::F16 => with(task, Half::<false>(w)),
            Data::Half(w) => with(task, Half::<true>(w)),
            Data::Q8 { group: GROUP, scales, q } => with(task, Q8::<GROUP> { scales, q }),
            Data::Q8 { group: 16, scales, q } => with(task, Q8::<16> { scales, q }),
            Data::Q5 { scales, mins, q } => with(task, Q5 { scales, mins, q }),
            Data::Q4 { scales, mins, q } => with(task, Q4 { scales, mins, q }),
            Data::Q8 { group, .. } => unreachable!("{group} weights that share a scale"),
            Data::Whole(_) | Data::Tiled(_) => unreachable!("these weights are not unpacked"),
        }
    }
}

/// # Safety
/// As [`multiply`]; `w` are the matrix's weights.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn with<W: Weights>(task: &Task, w: W) {
    // SAFETY: the caller's promise.
    unsafe {
        match task.rows {
            0 => {}
            // With one or two rows a panel has too few chains.
            1 => direct::<1, 2, W>(task, w),
            2 => direct::<2, 2, W>(task, w),
            3 => direct::<3, 1, W>(task, w),
            4 => direct::<4, 1, W>(task, w),
            5 => direct::<5, 1, W>(task, w),
            _ => blocks(task, w),
        }
    }
}

/// For `R` rows, with `S` panels side by side.
///
/// # Safety
/// As [`with`], for so many rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn direct<const R: usize, const S: usize, W: Weights>(task: &Task, w: W) {
    let mut panel = task.panels.start;
    // SAFETY: the caller's promise.
    unsafe {
        while panel + S <= task.panels.end {
            side::<R, S, W>(task, w, panel);
            panel += S;
        }
        (panel..task.panels.end).for_each(|panel| side::<R, 1, W>(task, w, panel));
    }
}

/// For `R` rows and the `S` panels from `panel` on.
///
/// # Safety
/// As [`direct`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn side<const R: usize, const S: usize, W: Weights>(task: &Task, w: W, panel: usize) {
    let (k, stride) = (task.matrix.k(), task.x.stride);
    let mut sums = [[[_mm256_setzero_ps(); 2]; S]; R];
    // Macros: a function that is not inlined would have the sums in memory.
    macro_rules! add_term {
        ($second:literal, $groups:ident, $x:ident, $i:expr) => {{
            let i = $i;
            let mut w = [[_mm256_setzero_ps(); 2]; S];
            unrolled!(s < S, { w[s] = W::lanes::<$second>($groups[s], i) });
            unrolled!(r < R, {
                let x = _mm256_broadcast_ss(&*$x.add(r * stride + i));
                unrolled!(s < S, {
                    sums[r][s][0] = _mm256_fmadd_ps(x, w[s][0], sums[r][s][0]);
                    sums[r][s][1] = _mm256_fmadd_ps(x, w[s][1], sums[r][s][1]);
                });
            });
        }};
    }
    macro_rules! add {
        ($second:literal, $groups:ident, $terms:expr, $x:expr) => {{
            let (terms, x) = ($terms, $x);
            let whole = terms - terms % UNROLLED;
            for i in (0..whole).step_by(UNROLLED) {
                unrolled!(u < UNROLLED, { add_term!($second, $groups, x, i + u) });
            }
            for i in whole..terms {
                add_term!($second, $groups, x, i);
            }
        }};
    }
    // SAFETY: the caller's promise; where the terms are no whole groups, they are none with halves.
    unsafe {
        for k0 in (0..k).step_by(W::GROUP) {
            let (x, terms) = (task.x.data.as_ptr().add(k0), W::GROUP.min(k - k0));
            let groups: [W::Group; S] = std::array::from_fn(|s| w.group((panel + s) * k + k0));
            if W::HALVES {
                add!(false, groups, W::GROUP / 2, x);
                add!(true, groups, W::GROUP / 2, x.add(W::GROUP / 2));
            } else {
                add!(false, groups, terms, x);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (s, sums) in sums.iter().enumerate() {
                let mut out = [0.0; LANES];
                _mm256_storeu_ps(out.as_mut_ptr(), sums[0]);
                _mm256_storeu_ps(out[LANES / 2..].as_mut_ptr(), sums[1]);
                task.put(r..r + 1, panel + s, &out);
            }
        }
    }
}

/// For any number of rows, which share what is unpacked.
///
/// # Safety
/// As [`with`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blocks<W: Weights>(task: &Task, w: W) {
    let (k, x) = (task.matrix.k(), task.x);
    let (mut acc, mut room) = ([0.0f32; ROWS * LANES], [0.0f32; BLOCK * LANES]);
    for row in (0..task.rows).step_by(ROWS) {
        let rows = ROWS.min(task.rows - row);
        let tile = rows.div_ceil(rows.div_ceil(TILE));
        for panel in task.panels.clone() {
            acc[..rows * LANES].fill(0.0);
            for k0 in (0..k).step_by(BLOCK) {
                let (term, terms) = (panel * k + k0, BLOCK.min(k - k0));
                // SAFETY: the caller's promise; the panel has these terms, LANES numbers each.
                let weights = unsafe {
                    let unpacked = match w.unpacked(term) {
                        Some(unpacked) => unpacked,
                        None => {
                            unpack(w, term, &mut room[..terms * LANES]);
                            room.as_ptr()
                        }
                    };
                    Rows { data: std::slice::from_raw_parts(unpacked, terms * LANES), stride: LANES }
                };
                // What follows comes while this is multiplied.
                let next = term + terms;
                let mut ahead = w.ahead(next..next + BLOCK.min(k));
                let lines = ahead.lines().div_ceil(rows.div_ceil(tile));
                for first in (0..rows).step_by(tile) {
                    ahead.fetch(lines);
                    let x = Rows { data: &x.data[(row + first) * x.stride + k0..], stride: x.stride };
                    let acc = &mut acc[first * LANES..];
                    simd::multiply(Simd::Avx2, tile.min(rows - first), terms, x, weights, acc, LANES);
                }
            }
            // SAFETY: the caller's promise.
            unsafe { task.put(row..row + rows, panel, &acc) };
        }
    }
}

/// Unpacks the terms from `term` on, `[terms, LANES]`.
///
/// # Safety
/// The CPU has avx2, fma and f16c; the panel has so many terms, which begin with a group.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<W: Weights>(w: W, term: usize, out: &mut [f32]) {
    for (g, out) in out.chunks_mut(W::GROUP * LANES).enumerate() {
        // SAFETY: the caller's promise; only a group without halves is not whole.
        unsafe {
            let group = w.group(term + g * W::GROUP);
            let (first, second) = out.split_at_mut(if W::HALVES { out.len() / 2 } else { out.len() });
            put::<false, W>(group, first);
            put::<true, W>(group, second);
        }
    }
}

/// # Safety
/// As [`unpack`], of a group or of its second half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn put<const SECOND: bool, W: Weights>(group: W::Group, out: &mut [f32]) {
    for (i, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        // SAFETY: the caller's promise, and there are LANES numbers.
        unsafe {
            let w = W::lanes::<SECOND>(group, i);
            _mm256_storeu_ps(out.as_mut_ptr(), w[0]);
            _mm256_storeu_ps(out[LANES / 2..].as_mut_ptr(), w[1]);
        }
    }
}
