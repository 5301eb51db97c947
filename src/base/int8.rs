//! Products in whole numbers: weights of at most 8 bits and activations rounded to 8 bits, group by group along `k`.
//!
//! The whole-number sum of a group is exact, and the sums of groups are added in ascending order: as with floating point, a
//! row's result depends neither on the rows beside it nor on the kind of CPU.

use std::ops::{Deref, DerefMut, Range};

use half::f16;
use rayon::prelude::*;

use super::buffer::Buffer;
use super::parallel;
use super::simd::{Ahead, LANES, Simd, Target, place};
use crate::large_pages::{Large, collected, repeated};

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod vnni;

/// Most weights that share a scale. Outliers of activations spoil the numbers that share theirs, so few; each group costs a
/// conversion to floating point, so many.
const MAX_GROUP: usize = 64;
/// Fewer are not worth a scale of our choice; blocks of files have as few as [`STEP`].
const MIN_GROUP: usize = 32;
/// Most weights of 4 bits that share a scale: their products with a row, two and two, fit 16 bits without a sign.
const MAX_NIBBLE_GROUP: usize = 32;
/// Weights of one output feature that an instruction multiplies and adds up.
const STEP: usize = 4;
/// Bytes of rows that stay in a near cache until all panels are multiplied with them.
#[cfg(target_arch = "x86_64")]
const NEAR: usize = 48 << 10;
pub const CACHE_LINE: usize = 64;
/// Bytes of codes that are fetched ahead: the processor's own prefetching ends with the page.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;

/// How many weights along `k` share a scale: all where there are few, as in an adapter's B; `None` where `k` has no fit
/// divisor.
pub fn group(k: usize) -> Option<usize> {
    if k < MIN_GROUP {
        return (k > 0 && k.is_multiple_of(STEP)).then_some(k);
    }
    (MIN_GROUP..=MAX_GROUP).rev().find(|group| group.is_multiple_of(STEP) && k.is_multiple_of(*group))
}

/// The same for weights that are rounded to 4 bits.
pub fn nibble_group(k: usize) -> Option<usize> {
    (2 * STEP..=MAX_NIBBLE_GROUP)
        .rev()
        .find(|group| group.is_multiple_of(2 * STEP) && k > 0 && k.is_multiple_of(*group))
}

/// The scale with which 4 bits with a sign hold numbers: the largest becomes the one whose negative they lack. As ggml's Q4_0.
/// NaN if one of them is.
pub fn nibble_scale(numbers: impl Iterator<Item = f32>) -> f32 {
    let largest = |max: f32, x: f32| if x.abs() > max.abs() || x.is_nan() { x } else { max };
    numbers.fold(0.0, largest) / -8.0
}

/// The whole number of 4 bits with a sign that is nearest to `x`, and 8 more.
pub fn nibble(x: f32) -> u8 {
    (whole(x.clamp(-8.0, 7.0)) + 8) as u8
}

/// What the numbers of a row's group have in common: `x = scale * q`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
struct RowGroup {
    scale: f32,
    /// Of `q`.
    sum: i32,
    /// Of `x`.
    total: f32,
}

/// Bytes from the start of a cache line on: of rows that are whole lines, none lies in one more than it has to. What they are
/// at first means nothing.
pub struct Lines {
    memory: Buffer,
    first: usize,
    len: usize,
}

impl Lines {
    pub fn new(len: usize) -> Self {
        let memory = Buffer::new(len.div_ceil(4) + CACHE_LINE / 4);
        Lines { first: memory.as_ptr().cast::<u8>().align_offset(CACHE_LINE), memory, len }
    }
}

impl Deref for Lines {
    type Target = [i8];

    fn deref(&self) -> &[i8] {
        // SAFETY: numbers are nothing but their bytes, and there are at least so many after the first line's start.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast::<i8>().add(self.first), self.len) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [i8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast::<i8>().add(self.first), self.len) }
    }
}

/// [`RowGroup`]s, in memory of earlier ones.
struct Groups {
    memory: Buffer,
    len: usize,
}

const _: () = assert!(size_of::<RowGroup>() == 3 * size_of::<f32>() && align_of::<RowGroup>() == align_of::<f32>());

impl Groups {
    fn new(len: usize) -> Self {
        Groups { memory: Buffer::new(3 * len), len }
    }
}

impl Deref for Groups {
    type Target = [RowGroup];

    fn deref(&self) -> &[RowGroup] {
        // SAFETY: each is three numbers of any bits, and there are at least so many.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Groups {
    fn deref_mut(&mut self) -> &mut [RowGroup] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.len) }
    }
}

/// Rows of activations in 8 bits: `x = scale * q`, rounded.
pub struct Rounded {
    k: usize,
    group: usize,
    groups_per_row: usize,
    /// `[rows, k]`.
    q: Lines,
    /// `[rows, k / group]`.
    groups: Groups,
}

impl Rounded {
    fn rows(&self) -> usize {
        self.q.len().checked_div(self.k).unwrap_or(0)
    }

    /// Rounds `rows` rows of `k` numbers, `stride` apart, in groups of `group`. Where a number is not finite, neither are its
    /// group's products.
    ///
    /// # Panics
    /// If `k` is not in whole groups, or `x` is too short.
    pub fn new(simd: Simd, x: &[f32], stride: usize, rows: usize, k: usize, group: usize) -> Self {
        /// Numbers worth handing to another thread.
        const GRAIN: usize = 1 << 12;
        assert!(k.is_multiple_of(group));
        let groups = k / group;
        let mut rounded =
            Rounded { k, group, groups_per_row: groups, q: Lines::new(rows * k), groups: Groups::new(rows * groups) };
        let row = |row: usize, q: &mut [i8], groups: &mut [RowGroup]| {
            round(simd, &x[row * stride..][..k], group, q, groups);
        };
        if rows * k < 2 * GRAIN {
            let parts = rounded.q.chunks_exact_mut(k).zip(rounded.groups.chunks_exact_mut(groups)).enumerate();
            parts.for_each(|(i, (q, groups))| row(i, q, groups));
        } else {
            let q = (&mut rounded.q[..], k);
            parallel::chunk_pairs(q, (&mut rounded.groups[..], groups), row);
        }
        rounded
    }
}

/// The nearest whole number of one below 2^22, ties to even: adding 1.5 * 2^23 leaves it in the low bits.
#[inline(always)]
pub fn whole(x: f32) -> i32 {
    (x + 12_582_912.0).to_bits().wrapping_sub(0x4B40_0000) as i32
}

/// Rounds a row, whose groups are of `group` numbers.
#[inline(always)]
fn round_body(x: &[f32], group: usize, q: &mut [i8], groups: &mut [RowGroup]) {
    for ((x, q), out) in x.chunks_exact(group).zip(q.chunks_exact_mut(group)).zip(groups) {
        // As bits, an absolute value that is NaN is larger than all others.
        let max = x.iter().fold(0u32, |max, x| max.max(x.abs().to_bits()));
        let scale = f32::from_bits(max) / 127.0;
        let factor = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let mut sum = 0;
        for (q, x) in q.iter_mut().zip(x) {
            *q = whole(x * factor) as i8;
            sum += i32::from(*q);
        }
        *out = RowGroup { scale, sum, total: scale * sum as f32 };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_avx2(x: &[f32], group: usize, q: &mut [i8], groups: &mut [RowGroup]) {
    match group {
        32 => round_blocks::<1>(x, q, groups),
        64 => round_blocks::<2>(x, q, groups),
        _ => round_body(x, group, q, groups),
    }
}

/// [`round_body`] for groups of `B` times 32 numbers, in which the compiler sees too little to do.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_blocks<const B: usize>(x: &[f32], q: &mut [i8], groups: &mut [RowGroup]) {
    use std::arch::x86_64::*;
    const HALF: usize = LANES / 2;
    let (xs, qs) = (x.as_chunks::<32>().0.as_chunks::<B>().0, q.as_chunks_mut::<32>().0.as_chunks_mut::<B>().0);
    // As in `whole`.
    let (shift, bits) = (_mm256_set1_ps(12_582_912.0), _mm256_set1_epi32(0x4B40_0000));
    let (positive, ones) = (_mm256_set1_epi32(i32::MAX), _mm256_set1_epi16(1));
    // The packing works on halves of vectors: fours of one after fours of the next.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for ((x, q), out) in xs.iter().zip(qs).zip(groups) {
        // SAFETY: loads are of HALF numbers, of which a block has four times as many.
        let x: [[__m256; 4]; B] =
            std::array::from_fn(|b| std::array::from_fn(|v| unsafe { _mm256_loadu_ps(x[b][v * HALF..].as_ptr()) }));
        let sizes = x.as_flattened().iter().map(|&x| _mm256_and_si256(_mm256_castps_si256(x), positive));
        let max = sizes.fold(_mm256_setzero_si256(), |max, size| _mm256_max_epu32(max, size));
        let max = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
        let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
        let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
        let scale = f32::from_bits(_mm_cvtsi128_si32(max) as u32) / 127.0;
        let factor = _mm256_set1_ps(if scale == 0.0 { 0.0 } else { 1.0 / scale });
        let mut sums = _mm256_setzero_si256();
        for (x, q) in x.iter().zip(q) {
            let number = |x: __m256| {
                let moved = _mm256_add_ps(_mm256_mul_ps(x, factor), shift);
                _mm256_sub_epi32(_mm256_castps_si256(moved), bits)
            };
            let pairs = [[x[0], x[1]], [x[2], x[3]]].map(|[a, b]| _mm256_packs_epi32(number(a), number(b)));
            for pair in pairs {
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pair, ones));
            }
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(pairs[0], pairs[1]), order);
            // SAFETY: a block has 32 bytes.
            unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes) };
        }
        let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b01_00_11_10>(sums));
        let sum = _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32::<0b10_11_00_01>(sums)));
        *out = RowGroup { scale, sum, total: scale * sum as f32 };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn round_avx512(x: &[f32], group: usize, q: &mut [i8], groups: &mut [RowGroup]) {
    match group {
        16 => round_vectors::<1>(x, q, groups),
        32 => round_vectors::<2>(x, q, groups),
        64 => round_vectors::<4>(x, q, groups),
        _ => round_body(x, group, q, groups),
    }
}

/// [`round_body`] for groups of `V` vectors, in which the compiler sees too little to do.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn round_vectors<const V: usize>(x: &[f32], q: &mut [i8], groups: &mut [RowGroup]) {
    use std::arch::x86_64::*;
    let (xs, qs) = (x.as_chunks::<LANES>().0.as_chunks::<V>().0, q.as_chunks_mut::<LANES>().0.as_chunks_mut::<V>().0);
    // As in `whole`.
    let (shift, bits) = (_mm512_set1_ps(12_582_912.0), _mm512_set1_epi32(0x4B40_0000));
    for ((x, q), out) in xs.iter().zip(qs).zip(groups) {
        // SAFETY: loads and stores are of LANES numbers.
        let x: [__m512; V] = std::array::from_fn(|v| unsafe { _mm512_loadu_ps(x[v].as_ptr()) });
        let size = |v: usize| _mm512_castps_si512(_mm512_abs_ps(x[v]));
        let max = (1..V).fold(size(0), |max, v| _mm512_max_epu32(max, size(v)));
        let scale = f32::from_bits(_mm512_reduce_max_epu32(max)) / 127.0;
        let factor = _mm512_set1_ps(if scale == 0.0 { 0.0 } else { 1.0 / scale });
        let mut sums = _mm512_setzero_si512();
        for v in 0..V {
            let moved = _mm512_add_ps(_mm512_mul_ps(x[v], factor), shift);
            let number = _mm512_sub_epi32(_mm512_castps_si512(moved), bits);
            let bytes = _mm512_cvtepi32_epi8(number);
            sums = _mm512_add_epi32(sums, _mm512_cvtepi8_epi32(bytes));
            unsafe { _mm_storeu_si128(q[v].as_mut_ptr().cast(), bytes) };
        }
        let sum = _mm512_reduce_add_epi32(sums);
        *out = RowGroup { scale, sum, total: scale * sum as f32 };
    }
}

fn round(simd: Simd, x: &[f32], group: usize, q: &mut [i8], groups: &mut [RowGroup]) {
    match simd {
        Simd::Portable => round_body(x, group, q, groups),
        // SAFETY: `Avx2` is only made where the CPU has avx2.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { round_avx2(x, group, q, groups) },
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 if !has_vnni() => unsafe { round_avx2(x, group, q, groups) },
        // SAFETY: `has_vnni` asks for all of these.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { round_avx512(x, group, q, groups) },
    }
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl")
}

/// How a product is computed. All forms give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Form {
    /// The quickest that `simd` allows for so many rows and weights that share a scale.
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
    fn of(simd: Simd, rows: usize, group: usize) -> Self {
        match simd {
            Simd::Portable => Form::Portable,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => Form::Avx2,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 if rows >= amx::MIN_ROWS && group >= amx::MIN_GROUP && amx::is_there() => Form::Amx,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 if has_vnni() => Form::Vnni,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => Form::Avx2,
        }
    }

    /// All that this CPU has.
    #[cfg(test)]
    fn all() -> Vec<Self> {
        let all = Simd::all().into_iter().map(|simd| Form::of(simd, 1, 0));
        #[cfg(target_arch = "x86_64")]
        let all = all.chain(amx::is_there().then_some(Form::Amx));
        all.collect()
    }
}

/// The whole numbers of weights, in panels of [`LANES`] output features.
#[derive(Debug)]
enum Codes {
    /// `q + 128` of 8 bits, `[panels][k / STEP][LANES][STEP]`: the instruction multiplies numbers without a sign by ones with.
    Bytes(Large<u8>),
    /// 4 bits, `q + zero`, `[panels][k / (2 * STEP)][LANES][STEP]`: the low half of a byte belongs to the first of two steps, the
    /// high half to the same place of the second.
    Nibbles { codes: Large<u8>, zero: i32 },
}

/// A number for each feature and group, `[panels][k / group]`, in f16 where that keeps them all.
#[derive(Debug)]
enum Scales {
    F16(Large<[u16; LANES]>),
    F32(Large<[f32; LANES]>),
}

impl Scales {
    fn new(numbers: Vec<[f32; LANES]>) -> Self {
        let half = |x: f32| f16::from_f32(x);
        match numbers.as_flattened().iter().all(|&x| half(x).to_f32() == x) {
            true => Scales::F16(collected(numbers.iter().map(|group| group.map(|x| half(x).to_bits())))),
            false => Scales::F32(collected(numbers.into_iter())),
        }
    }

    fn len(&self) -> usize {
        match self {
            Scales::F16(numbers) => numbers.len(),
            Scales::F32(numbers) => numbers.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Scales::F16(numbers) => 2 * LANES * numbers.len(),
            Scales::F32(numbers) => 4 * LANES * numbers.len(),
        }
    }

    fn place(&self, of: Range<usize>) -> Range<*const u8> {
        match self {
            Scales::F16(numbers) => place(&numbers[of]),
            Scales::F32(numbers) => place(&numbers[of]),
        }
    }

    fn get(&self, index: usize) -> [f32; LANES] {
        match self {
            Scales::F32(numbers) => numbers[index],
            Scales::F16(numbers) => numbers[index].map(|bits| f16::from_bits(bits).to_f32()),
        }
    }
}

/// Weights in whole numbers: `w = scale * q + min`.
#[derive(Debug)]
pub struct Weights {
    n: usize,
    k: usize,
    group: usize,
    codes: Codes,
    scales: Scales,
    /// `None` where all are 0.
    mins: Option<Scales>,
}

impl Weights {
    /// Rounds `rows`, `[n, k]`, to 8 bits.
    ///
    /// # Panics
    /// If [`group`] has none for `k`, or there are not so many numbers.
    pub fn round(rows: &[f32], n: usize, k: usize) -> Self {
        assert_eq!(rows.len(), n * k);
        let group = group(k).expect("k has groups");
        let (panels, groups) = (n.div_ceil(LANES), k / group);
        let mut codes = repeated(128u8, panels * k * LANES);
        let mut scales = vec![[0.0; LANES]; panels * groups];
        let parts = codes.par_chunks_mut(k * LANES).zip(scales.par_chunks_mut(groups));
        parts.zip(rows.par_chunks(k * LANES)).for_each(|((codes, scales), rows)| {
            for (lane, row) in rows.chunks_exact(k).enumerate() {
                for (g, weights) in row.chunks_exact(group).enumerate() {
                    let scale = weights.iter().fold(0.0, |max: f32, w| max.max(w.abs())) / 127.0;
                    // The next f16 above, where there is one, so that no number exceeds 127.
                    let half = f16::from_f32(scale * (1.0 + f16::EPSILON.to_f32()));
                    let scale = if half.is_normal() { half.to_f32() } else { scale };
                    if !scale.is_normal() {
                        continue; // So small that its reciprocal may be infinite; 0.
                    }
                    scales[g][lane] = scale;
                    let steps = codes[g * group * LANES..].chunks_exact_mut(LANES * STEP);
                    for (step, weights) in steps.zip(weights.as_chunks::<STEP>().0) {
                        let code = |w: f32| whole(w * (1.0 / scale)).wrapping_add(128) as u8;
                        step[lane * STEP..][..STEP].copy_from_slice(&weights.map(code));
                    }
                }
            }
        });
        Weights { n, k, group, codes: Codes::Bytes(codes), scales: Scales::new(scales), mins: None }
    }

    /// Rounds weights `w(row, i)`, `[n, k]`, to 4 bits.
    ///
    /// # Panics
    /// If [`nibble_group`] has none for `k`.
    pub fn round_to_nibbles(n: usize, k: usize, w: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let group = nibble_group(k).expect("k has groups");
        let groups = k / group;
        let scales = per_group(n, groups, |row, g| {
            let scale = nibble_scale((g * group..(g + 1) * group).map(|i| w(row, i)));
            let half = f16::from_f32(scale);
            if half.is_normal() || scale.is_nan() { half.to_f32() } else { scale }
        });
        let codes = nibbles(n, k, |row, i| {
            let scale = scales[row / LANES * groups + i / group][row % LANES];
            // Of a scale so small its reciprocal may be infinite; 0.
            if scale.is_normal() { nibble(w(row, i) * (1.0 / scale)) } else { 8 }
        });
        Weights { n, k, group, codes: Codes::Nibbles { codes, zero: 8 }, scales: Scales::new(scales), mins: None }
    }

    /// Weights that are whole numbers already: `q(row, i)` of weight `i` of output feature `row`, `scale(row, group)` and
    /// `min(row, group)`. `bits` is 4 where the whole numbers are 0 to 15, else 8.
    ///
    /// # Panics
    /// If `k` is not in whole groups, or groups are too long or not in whole steps of 4, of 4 bits in pairs of steps.
    pub fn exact(
        (n, k, group, bits): (usize, usize, usize, u32),
        q: impl Fn(usize, usize) -> i8 + Sync,
        scale: impl Fn(usize, usize) -> f32 + Sync,
        min: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Self {
        assert!(k.is_multiple_of(group) && group.is_multiple_of(STEP) && group <= MAX_GROUP);
        let codes = if bits == 4 {
            assert!(group <= MAX_NIBBLE_GROUP && group.is_multiple_of(2 * STEP));
            Codes::Nibbles { codes: nibbles(n, k, |row, i| q(row, i) as u8 & 15), zero: 0 }
        } else {
            bytes(n, k, q)
        };
        let mins = per_group(n, k / group, min);
        let any = mins.as_flattened().iter().any(|&min| min != 0.0);
        let scales = Scales::new(per_group(n, k / group, scale));
        Weights { n, k, group, codes, scales, mins: any.then(|| Scales::new(mins)) }
    }

    /// How many weights along `k` share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    fn codes(&self) -> &[u8] {
        match &self.codes {
            Codes::Bytes(codes) | Codes::Nibbles { codes, .. } => codes,
        }
    }

    /// Some panels, as they are read: the first ones of long panels.
    pub fn ahead(&self, panels: Range<usize>) -> Ahead {
        /// Bytes of codes that are worth it: while they are multiplied, the others come.
        const ENOUGH: usize = 16 << 10;
        let (codes, groups) = (self.codes(), self.k / self.group);
        let bytes = codes.len() / self.n.div_ceil(LANES);
        // Short ones are over before what comes behind them is there.
        let most = if groups == 1 { panels.len() } else { (ENOUGH / bytes).max(1) };
        let panels = panels.start..panels.end.min(panels.start + most);
        let of_groups = panels.start * groups..panels.end * groups;
        let codes = place(&codes[panels.start * bytes..panels.end * bytes]);
        let none = || place::<u8>(&[]);
        let mins = self.mins.as_ref().map_or(none(), |mins| mins.place(of_groups.clone()));
        Ahead::new([self.scales.place(of_groups), mins, codes])
    }

    pub fn bytes(&self) -> usize {
        self.codes().len() + self.scales.bytes() + self.mins.as_ref().map_or(0, Scales::bytes)
    }

    /// Writes the weights of output feature `row` to `out`, `[k]`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane, groups) = (row / LANES, row % LANES, self.k / self.group);
        for (g, out) in out.chunks_mut(self.group).enumerate() {
            let at = |scales: &Scales| scales.get(panel * groups + g)[lane];
            let (scale, min) = (at(&self.scales), self.mins.as_ref().map_or(0.0, at));
            // Rounded after the product, as ggml does.
            let code = |i: usize| self.code(panel, lane, g * self.group + i) as f32;
            out.iter_mut().enumerate().for_each(|(i, out)| *out = scale * code(i) + min);
        }
    }

    /// `scale * x wᵀ` for some rows of `x` and some panels; `y` begins with the first feature of the first row. What is read next
    /// is fetched meanwhile.
    ///
    /// # Safety
    /// `y` is good for writing those features of as many rows, and nobody else touches them meanwhile.
    ///
    /// # Panics
    /// If there are not so many rows or panels, or `x` was rounded for another `k` or in other groups.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn multiply(
        &self,
        simd: Simd,
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.multiply_as(Form::of(simd, rows.len(), self.group), x, rows, panels, ahead, scale, y) }
    }

    /// [`Self::multiply`] in a form that this CPU has.
    ///
    /// # Safety
    /// As there.
    #[allow(clippy::too_many_arguments)]
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
    unsafe fn multiply_as(
        &self,
        form: Form,
        x: &Rounded,
        rows: Range<usize>,
        panels: Range<usize>,
        ahead: Ahead,
        scale: f32,
        y: Target,
    ) {
        let groups = self.k / self.group;
        assert_eq!((x.k, x.group), (self.k, self.group));
        assert!(panels.end * groups <= self.scales.len() && rows.end <= x.rows());
        match form {
            // SAFETY: the CPU has what the form needs, and the caller's promise.
            #[cfg(target_arch = "x86_64")]
            Form::Amx => unsafe { self.amx(x, rows, panels, scale, y) },
            #[cfg(target_arch = "x86_64")]
            Form::Vnni => unsafe { self.vnni(x, rows, panels, ahead, scale, y) },
            #[cfg(target_arch = "x86_64")]
            Form::Avx2 => unsafe { self.avx2(x, rows, panels, ahead, scale, y) },
            Form::Portable => {
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

    /// The code of 0.
    fn zero(&self) -> i32 {
        match self.codes {
            Codes::Bytes(_) => 128,
            Codes::Nibbles { zero, .. } => zero,
        }
    }

    /// The whole number of weight `i` of a panel's output feature `lane`.
    fn code(&self, panel: usize, lane: usize, i: usize) -> i32 {
        let code = match &self.codes {
            Codes::Bytes(codes) => codes[(panel * self.k + i / STEP * STEP) * LANES + lane * STEP + i % STEP],
            Codes::Nibbles { codes, .. } => {
                let byte = codes[(panel * self.k / 2 + i / (2 * STEP) * STEP) * LANES + lane * STEP + i % STEP];
                if (i / STEP).is_multiple_of(2) { byte & 15 } else { byte >> 4 }
            }
        };
        i32::from(code) - self.zero()
    }

    fn portable(&self, x: &Rounded, row: usize, panel: usize) -> [f32; LANES] {
        let (mut acc, groups) = ([0.0f32; LANES], self.k / self.group);
        for g in 0..groups {
            let (common, q) = (x.groups[row * groups + g], &x.q[row * self.k + g * self.group..][..self.group]);
            let scales = self.scales.get(panel * groups + g);
            let mins = self.mins.as_ref().map(|mins| mins.get(panel * groups + g));
            for (lane, acc) in acc.iter_mut().enumerate() {
                let products =
                    q.iter().enumerate().map(|(i, &q)| self.code(panel, lane, g * self.group + i) * i32::from(q));
                *acc = (products.sum::<i32>() as f32 * scales[lane]).mul_add(common.scale, *acc);
                if let Some(mins) = &mins {
                    *acc = mins[lane].mul_add(common.total, *acc);
                }
            }
        }
        acc
    }
}

/// `f(row, group)` for every group of `n` features; 0 beyond them.
pub fn per_group(n: usize, groups: usize, f: impl Fn(usize, usize) -> f32 + Sync) -> Vec<[f32; LANES]> {
    let of = |index: usize| {
        std::array::from_fn(|lane| {
            let row = index / groups * LANES + lane;
            if row < n { f(row, index % groups) } else { 0.0 }
        })
    };
    (0..n.div_ceil(LANES) * groups).into_par_iter().map(of).collect()
}

/// Has the compiler leave sums in memory, which it would take into registers and put back around each group.
#[cfg(target_arch = "x86_64")]
fn in_memory(sums: *mut f32) -> *mut f32 {
    let mut sums = sums;
    // SAFETY: there are no instructions.
    unsafe { std::arch::asm!("/* {} */", inout(reg) sums, options(nostack, preserves_flags)) };
    sums
}

/// Lays out `q(row, i)` for `n` features; 0 beyond them.
fn bytes(n: usize, k: usize, q: impl Fn(usize, usize) -> i8 + Sync) -> Codes {
    Codes::Bytes(in_steps(n, k, 128, |row, i| (i16::from(q(row, i)) + 128) as u8))
}

/// The same for codes from 0 to 15.
pub fn nibbles(n: usize, k: usize, code: impl Fn(usize, usize) -> u8 + Sync) -> Large<u8> {
    in_steps(n, k / 2, 0, |row, i| {
        let first = i / STEP * 2 * STEP + i % STEP;
        code(row, first) | code(row, first + STEP) << 4
    })
}

/// `code(row, i)` for `n` features of `k` codes, `[panels][k / STEP][LANES][STEP]`; `other` beyond them.
pub fn in_steps(n: usize, k: usize, other: u8, code: impl Fn(usize, usize) -> u8 + Sync) -> Large<u8> {
    let mut codes = repeated(other, n.div_ceil(LANES) * k * LANES);
    codes.par_chunks_mut((k * LANES).max(1)).enumerate().for_each(|(panel, codes)| {
        for (index, out) in codes.iter_mut().enumerate() {
            let (row, i) = (panel * LANES + index / STEP % LANES, index / (STEP * LANES) * STEP + index % STEP);
            if row < n {
                *out = code(row, i);
            }
        }
    });
    codes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn groups_divide_what_models_have() {
        let found = [576, 1536, 2048, 5632, 11008, 14336, 64, 32, 16, 4].map(group);
        assert_eq!(found, [64, 64, 64, 64, 64, 64, 64, 32, 16, 4].map(Some));
        assert_eq!([0, 3, 31, 33, 62, 1009].map(group), [None; 6]);
    }

    #[test]
    fn numbers_that_are_not_finite_stay_so() {
        for number in [f32::NAN, f32::INFINITY, -f32::INFINITY] {
            for form in Form::all() {
                let (mut x, mut acc) = ([1.0; 32], [0.0; LANES]);
                x[7] = number;
                let weights = Weights::round(&[0.5; 32], 1, 32);
                let y = Target { start: acc.as_mut_ptr(), stride: LANES, add: false };
                for simd in Simd::all() {
                    let x = Rounded::new(simd, &x, 32, 1, 32, 32);
                    // SAFETY: that many features.
                    unsafe { weights.multiply_as(form, &x, 0..1, 0..1, Ahead::nothing(), 1.0, y) };
                    assert!(!acc[0].is_finite(), "{number}, rounded by {simd:?}, by {form:?}: {}", acc[0]);
                }
            }
        }
    }

    fn noise(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

    proptest! {
        /// All forms give the same bits, whatever the tile, and the sum of the rounded numbers.
        #[test]
        fn tiles_equal_the_plain_sum(
            rows in 1usize..40, panels in 1usize..7, steps in 1usize..=16, groups in 1usize..16,
            seed in any::<u64>(),
        ) {
            let groups = if steps < 8 { 1 } else { groups };
            let (n, k) = (panels * LANES - seed as usize % 5, steps * STEP * groups);
            let mut next = noise(seed);
            let w: Vec<f32> = (0..n * k).map(|_| next() * next()).collect();
            let x: Vec<f32> = (0..rows * (k + 1)).map(|_| next() * 9.0).collect();
            let weights = Weights::round(&w, n, k);
            let mut kept = vec![0.0; n * k];
            kept.chunks_exact_mut(k).enumerate().for_each(|(row, out)| weights.row(row, out));
            for (w, kept) in w.iter().zip(&kept) {
                prop_assert!((w - kept).abs() <= 0.5 / 127.0 + 1e-6);
            }
            check(&weights, &kept, &x, rows, panels)?;
        }

        /// Of 4 bits, the largest keeps its number, and of the other sign it is at most a code off.
        #[test]
        fn nibbles_equal_the_plain_sum(
            rows in 1usize..40, panels in 1usize..7, pairs in 1usize..40, seed in any::<u64>(),
        ) {
            let (n, k, mut next) = (panels * LANES - seed as usize % 5, 2 * STEP * pairs, noise(seed));
            let w: Vec<f32> = (0..n * k).map(|_| next() * next()).collect();
            let x: Vec<f32> = (0..rows * (k + 1)).map(|_| next() * 9.0).collect();
            let weights = Weights::round_to_nibbles(n, k, |row, i| w[row * k + i]);
            let mut kept = vec![0.0; n * k];
            kept.chunks_exact_mut(k).enumerate().for_each(|(row, out)| weights.row(row, out));
            for (w, kept) in w.chunks_exact(weights.group).zip(kept.chunks_exact(weights.group)) {
                let max = w.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                for (w, kept) in w.iter().zip(kept) {
                    // A scale is an f16.
                    let off = if w.abs() == max { 1e-3 } else { 1.01 / 8.0 };
                    prop_assert!((w - kept).abs() <= off * max + 1e-7, "{w} became {kept} beside {max}");
                }
            }
            check(&weights, &kept, &x, rows, panels)?;
        }

        /// Weights that are whole numbers already stay what they are, of 4 bits and of 8, with minima and without.
        #[test]
        fn whole_numbers_stay_what_they_are(
            rows in 1usize..40, panels in 1usize..7, steps in 1usize..=8, groups in 1usize..16,
            four in any::<bool>(), has_min in any::<bool>(), in_f16 in any::<bool>(), seed in any::<u64>(),
        ) {
            let group = if four { steps.next_multiple_of(2) } else { steps } * STEP;
            let (n, k) = (panels * LANES - seed as usize % 5, group * groups);
            let mut next = noise(seed);
            // Also the largest ones, all over, so that sums are the largest there can be.
            let extreme = seed % 4 == 0;
            let code = |x: f32| match (four, extreme) {
                (true, true) => 15,
                (false, true) => if x < 0.0 { -128 } else { 127 },
                (true, false) => ((x + 1.0) * 7.99) as i8,
                (false, false) => (x * 127.9) as i8,
            };
            let q: Vec<i8> = (0..n * k).map(|_| code(next())).collect();
            let number = |x: f32| if in_f16 { f16::from_f32(x).to_f32() } else { x };
            let scales: Vec<f32> = (0..n * groups).map(|_| number(next() / 15.0)).collect();
            let mins: Vec<f32> = (0..n * groups).map(|_| if has_min { number(next()) } else { 0.0 }).collect();
            let x: Vec<f32> = (0..rows * (k + 1)).map(|_| if extreme { 9.0 } else { next() * 9.0 }).collect();
            let of = |numbers: &'_ [f32], row: usize, g: usize| numbers[row * groups + g];
            let weights = Weights::exact(
                (n, k, group, if four { 4 } else { 8 }),
                |row, i| q[row * k + i],
                |row, g| of(&scales, row, g),
                |row, g| of(&mins, row, g),
            );
            let mut kept = vec![0.0; n * k];
            kept.chunks_exact_mut(k).enumerate().for_each(|(row, out)| weights.row(row, out));
            for (i, kept) in kept.iter().enumerate() {
                let (row, g) = (i / k, i % k / group);
                prop_assert_eq!(*kept, of(&scales, row, g) * f32::from(q[i]) + of(&mins, row, g));
            }
            check(&weights, &kept, &x, rows, panels)?;
        }
    }

    /// That the product with `x`, rows of one number more than there are features, is that of the weights `kept`.
    fn check(weights: &Weights, kept: &[f32], x: &[f32], rows: usize, panels: usize) -> Result<(), TestCaseError> {
        let (n, k, group) = (weights.n, weights.k, weights.group);
        let mut all: Vec<Vec<f32>> = vec![];
        let rounded = Rounded::new(Simd::Portable, x, k + 1, rows, k, group);
        for simd in Simd::all() {
            let other = Rounded::new(simd, x, k + 1, rows, k, group);
            prop_assert!(*other.q == *rounded.q && *other.groups == *rounded.groups, "{simd:?} rounds otherwise");
        }
        for form in Form::all() {
            // A number more than features, which nothing is added to.
            let product = |rows: Range<usize>, panels: Range<usize>, add: bool| {
                let width = n.min(panels.end * LANES) - panels.start * LANES;
                let mut y = vec![1.0f32; rows.len() * (width + 1)];
                let target = Target { start: y.as_mut_ptr(), stride: width + 1, add };
                // SAFETY: there are as many rows and features.
                unsafe { weights.multiply_as(form, &rounded, rows, panels, Ahead::nothing(), 0.5, target) };
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
                prop_assert!((f64::from(got) - want).abs() <= size / 254.0 + 1e-5 * size + 1e-3, "{got}, not {want}");
            }
        }
        Ok(())
    }
}
