//! The innermost loops on the CPU, each in a portable form and in AVX2 and AVX-512 forms chosen at run time.
//!
//! Every output element is one chain of multiply-adds in ascending `k`, whatever the tile it was computed in. That is
//! what makes a row's result independent of the rows that share its batch.

use std::ops::Range;

use std::sync::OnceLock;

use candle_core::cpu::erf::erf_f32;

use crate::base::Activation;

/// Output features in a panel of packed weights, slots in a block of the KV cache: two AVX2 vectors of f32, or one of
/// AVX-512.
pub const LANES: usize = 16;

/// Rows of the largest tile: 12 accumulators, 2 weight vectors and a broadcast fit the 16 registers of AVX2.
#[cfg(target_arch = "x86_64")]
const MAX_TILE_AVX2: usize = 6;
/// The same for the 32 registers of AVX-512; more rows would need more addresses than there are registers for.
#[cfg(target_arch = "x86_64")]
const MAX_TILE_AVX512: usize = 12;
/// Terms whose code is written out at once with AVX2: how fast a shorter loop runs depends on where it lies, and may be half.
#[cfg(target_arch = "x86_64")]
pub const UNROLLED: usize = 4;
/// Up to this many rows, weights are unpacked in registers, for each tile anew, rather than once into memory.
#[cfg(target_arch = "x86_64")]
const MAX_DIRECT: usize = 4;

/// Weights that share a scale in the quantised formats.
pub const GROUP: usize = 32;

/// Which instructions the loops use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Simd {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Simd {
    /// The best that this CPU has.
    pub fn detect() -> Self {
        static BEST: OnceLock<Simd> = OnceLock::new();
        *BEST.get_or_init(|| Simd::all().pop().unwrap_or(Simd::Portable))
    }

    /// All that this CPU has, the best last.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Simd::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            all.push(Simd::Avx2);
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                all.push(Simd::Avx512);
            }
        }
        all
    }
}

/// A group of packed weights: `GROUP` or fewer values of `k`, [`LANES`] output features each.
#[derive(Clone, Copy)]
pub enum Group<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
    F16(&'a [u16]),
    /// `scale[lane] * q`, `q` is `[GROUP][LANES]`.
    Q8 {
        scale: &'a [f32; LANES],
        q: &'a [i8],
    },
    /// `scale[lane] * q + min[lane]`, `q` is `[GROUP][LANES]`.
    Q5 {
        scale: &'a [f32; LANES],
        min: &'a [f32; LANES],
        q: &'a [u8],
    },
    /// `scale[lane] * q + min[lane]`; byte `[i][lane]` holds `k = i` in its low and `k = i + 16` in its high half.
    Q4 {
        scale: &'a [f32; LANES],
        min: &'a [f32; LANES],
        q: &'a [u8],
    },
}

impl Group<'_> {
    /// How many values of `k` it holds.
    fn terms(&self) -> usize {
        match self {
            Group::F32(w) => w.len() / LANES,
            Group::Bf16(w) | Group::F16(w) => w.len() / LANES,
            Group::Q8 { q, .. } => q.len() / LANES,
            Group::Q5 { q, .. } => q.len() / LANES,
            Group::Q4 { q, .. } => 2 * q.len() / LANES,
        }
    }
}

/// Writes a group's weights as f32 `[k][LANES]` to the front of `out`.
pub fn unpack(simd: Simd, group: Group, out: &mut [f32; GROUP * LANES]) {
    match simd {
        Simd::Portable => {
            if let Group::F16(h) = group {
                for (o, &h) in out.iter_mut().zip(h) {
                    *o = half::f16::from_bits(h).to_f32();
                }
            } else {
                unpack_body(group, out)
            }
        }
        // SAFETY: `Avx2` is only made where the CPU has avx2, fma and f16c.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { unpack_avx2(group, out) },
        // SAFETY: `Avx512` is only made where the CPU has avx512f and avx512bw.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { unpack_avx512(group, out) },
    }
}

#[inline(always)]
fn unpack_body(group: Group, out: &mut [f32; GROUP * LANES]) {
    match group {
        Group::F32(w) => out[..w.len()].copy_from_slice(w),
        Group::Bf16(w) => {
            for (o, &w) in out.iter_mut().zip(w) {
                *o = f32::from_bits((w as u32) << 16);
            }
        }
        Group::F16(_) => unreachable!("f16 is unpacked by each form on its own"),
        Group::Q8 { scale, q } => {
            for (o, q) in out.chunks_exact_mut(LANES).zip(q.chunks_exact(LANES)) {
                for lane in 0..LANES {
                    o[lane] = q[lane] as f32 * scale[lane];
                }
            }
        }
        Group::Q5 { scale, min, q } => {
            for (o, q) in out.chunks_exact_mut(LANES).zip(q.chunks_exact(LANES)) {
                for lane in 0..LANES {
                    o[lane] = q[lane] as f32 * scale[lane] + min[lane];
                }
            }
        }
        Group::Q4 { scale, min, q } => {
            let (low, high) = out.split_at_mut(GROUP / 2 * LANES);
            for ((low, high), q) in
                low.chunks_exact_mut(LANES).zip(high.chunks_exact_mut(LANES)).zip(q.chunks_exact(LANES))
            {
                for lane in 0..LANES {
                    low[lane] = (q[lane] & 15) as f32 * scale[lane] + min[lane];
                    high[lane] = (q[lane] >> 4) as f32 * scale[lane] + min[lane];
                }
            }
        }
    }
}

/// The compiler does not make vector code of the loops above, so it is written out for the formats that are unpacked here:
/// products with others have their own way.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack_avx2(group: Group, out: &mut [f32; GROUP * LANES]) {
    use std::arch::x86_64::*;
    // SAFETY (all loads and stores below): chunks have the length that each access needs; unaligned forms are used.
    let store = |out: &mut [f32], v: __m256| unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) };
    let bytes = |b: *const u8| unsafe { _mm_loadu_si128(b.cast()) };
    match group {
        Group::Bf16(w) => {
            for (o, w) in out.chunks_exact_mut(8).zip(w.chunks_exact(8)) {
                let wide = _mm256_cvtepu16_epi32(bytes(w.as_ptr().cast()));
                store(o, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)));
            }
        }
        Group::F16(h) => {
            for (o, h) in out.chunks_exact_mut(8).zip(h.chunks_exact(8)) {
                store(o, _mm256_cvtph_ps(bytes(h.as_ptr().cast())));
            }
        }
        _ => unpack_body(group, out),
    }
}

/// What turns the stored form of [`LANES`] weights of one `k` into f32; the same numbers in all forms.
#[cfg(target_arch = "x86_64")]
mod lanes512 {
    use super::{GROUP, LANES};
    use std::arch::x86_64::*;

    /// # Safety
    /// `i` is below the number of `k` that the group holds.
    pub trait Weights {
        unsafe fn lanes(&self, i: usize) -> __m512;
    }

    pub struct F32<'a>(pub &'a [f32]);
    pub struct Bf16<'a>(pub &'a [u16]);
    pub struct F16<'a>(pub &'a [u16]);
    pub struct Q8<'a> {
        pub scale: __m512,
        pub q: &'a [i8],
    }
    pub struct Q5<'a> {
        pub scale: __m512,
        pub min: __m512,
        pub q: &'a [u8],
    }
    pub struct Q4<'a> {
        pub scale: __m512,
        pub min: __m512,
        pub q: &'a [u8],
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn load(v: &[f32; LANES]) -> __m512 {
        // SAFETY: the array has LANES numbers.
        unsafe { _mm512_loadu_ps(v.as_ptr()) }
    }

    impl Weights for F32<'_> {
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn lanes(&self, i: usize) -> __m512 {
            debug_assert!((i + 1) * LANES <= self.0.len());
            // SAFETY: the caller's promise.
            unsafe { _mm512_loadu_ps(self.0.as_ptr().add(i * LANES)) }
        }
    }

    impl Weights for Bf16<'_> {
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn lanes(&self, i: usize) -> __m512 {
            debug_assert!((i + 1) * LANES <= self.0.len());
            // SAFETY: the caller's promise.
            let bits = unsafe { _mm256_loadu_si256(self.0.as_ptr().add(i * LANES).cast()) };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }
    }

    impl Weights for F16<'_> {
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn lanes(&self, i: usize) -> __m512 {
            debug_assert!((i + 1) * LANES <= self.0.len());
            // SAFETY: the caller's promise.
            _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(self.0.as_ptr().add(i * LANES).cast()) })
        }
    }

    impl Weights for Q8<'_> {
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn lanes(&self, i: usize) -> __m512 {
            debug_assert!((i + 1) * LANES <= self.q.len());
            // SAFETY: the caller's promise.
            let q = unsafe { _mm_loadu_si128(self.q.as_ptr().add(i * LANES).cast()) };
            _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), self.scale)
        }
    }

    impl Weights for Q5<'_> {
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn lanes(&self, i: usize) -> __m512 {
            debug_assert!((i + 1) * LANES <= self.q.len());
            // SAFETY: the caller's promise.
            let q = unsafe { _mm_loadu_si128(self.q.as_ptr().add(i * LANES).cast()) };
            // Not fused, as below.
            _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q)), self.scale), self.min)
        }
    }

    impl Weights for Q4<'_> {
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn lanes(&self, i: usize) -> __m512 {
            let half = GROUP / 2;
            debug_assert!((i % half + 1) * LANES <= self.q.len());
            // SAFETY: the caller's promise.
            let q = unsafe { _mm_loadu_si128(self.q.as_ptr().add(i % half * LANES).cast()) };
            let q = _mm512_cvtepu8_epi32(q);
            let q = if i < half { _mm512_and_si512(q, _mm512_set1_epi32(15)) } else { _mm512_srli_epi32::<4>(q) };
            // Not fused: the other forms and ggml round the product too.
            _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(q), self.scale), self.min)
        }
    }
}

/// Calls `$body` with `$weights` bound to the group's form.
#[cfg(target_arch = "x86_64")]
macro_rules! with_lanes512 {
    ($group:expr, |$weights:ident| $body:expr, F32($w:ident) => $f32:expr) => {{
        match $group {
            Group::F32($w) => $f32,
            Group::Bf16(w) => {
                let $weights = lanes512::Bf16(w);
                $body
            }
            Group::F16(w) => {
                let $weights = lanes512::F16(w);
                $body
            }
            Group::Q8 { scale, q } => {
                let $weights = lanes512::Q8 { scale: lanes512::load(scale), q };
                $body
            }
            Group::Q5 { scale, min, q } => {
                let $weights = lanes512::Q5 { scale: lanes512::load(scale), min: lanes512::load(min), q };
                $body
            }
            Group::Q4 { scale, min, q } => {
                let $weights = lanes512::Q4 { scale: lanes512::load(scale), min: lanes512::load(min), q };
                $body
            }
        }
    }};
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
fn unpack_avx512(group: Group, out: &mut [f32; GROUP * LANES]) {
    use lanes512::Weights;
    use std::arch::x86_64::*;
    let terms = group.terms();
    with_lanes512!(group, |weights| for (i, out) in out.chunks_exact_mut(LANES).take(terms).enumerate() {
        // SAFETY: `i` is below the group's number of terms; `out` has LANES numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), weights.lanes(i)) };
    }, F32(_w) => unpack_body(group, out))
}

/// What is read next, to be fetched line by line while something else is read: short parts of memory that lie apart have ended
/// before the processor has seen where they go on.
pub struct Ahead {
    now: Range<*const u8>,
    /// After that, one after the other.
    then: [Range<*const u8>; 2],
}

impl Ahead {
    const LINE: usize = 64;

    pub fn nothing() -> Self {
        Ahead::new([const { std::ptr::null()..std::ptr::null() }; 3])
    }

    /// Parts one after the other. Nothing where they are long: the processor fetches that by itself, and fetched as a whole it
    /// would push out what is read before it.
    pub fn new([now, first, second]: [Range<*const u8>; 3]) -> Self {
        const LONG: usize = 64 << 10;
        let all = Ahead { now, then: [first, second] };
        if all.lines() * Self::LINE > LONG { Ahead::nothing() } else { all }
    }

    pub fn lines(&self) -> usize {
        let of_part = |part: &Range<*const u8>| part.end.addr().saturating_sub(part.start.addr()).div_ceil(Self::LINE);
        of_part(&self.now) + self.then.iter().map(of_part).sum::<usize>()
    }

    /// Has the next lines on their way to a near cache, if there are any, and maybe a few behind the last one of a part.
    #[inline(always)]
    pub fn fetch(&mut self, lines: usize) {
        while self.now.start >= self.now.end {
            let [first, second] = &mut self.then;
            if first.is_empty() && second.is_empty() {
                return;
            }
            self.now = std::mem::replace(first, std::mem::replace(second, second.end..second.end));
        }
        #[cfg(target_arch = "x86_64")]
        for line in 0..lines {
            use std::arch::x86_64::*;
            // SAFETY: every x86-64 has it, and it does nothing but that.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.now.start.wrapping_add(line * Self::LINE).cast()) };
        }
        self.now.start = self.now.start.wrapping_add(lines * Self::LINE);
    }
}

/// Where something lies.
pub fn place<T>(of: &[T]) -> Range<*const u8> {
    let Range { start, end } = of.as_ptr_range();
    start.cast()..end.cast()
}

/// Has the memory of something on its way to a near cache.
pub fn fetch<T>(of: *const [T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..of.len() * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::*;
        // SAFETY: every x86-64 has it, and it does nothing but that.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(of.cast::<i8>().wrapping_add(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = of;
}

/// Writes `x` as bits of f16; what is larger than f16's numbers becomes the largest. Two slices of one length.
pub fn to_f16(simd: Simd, x: &[f32], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if simd != Simd::Portable {
        // SAFETY: `Avx2` and `Avx512` are only made where the CPU has avx2 and f16c.
        return unsafe { to_f16_avx2(x, out) };
    }
    let _ = simd;
    x.iter().zip(out).for_each(|(x, out)| *out = nearest_f16(*x));
}

fn nearest_f16(x: f32) -> u16 {
    half::f16::from_f32(x.clamp(-LARGEST_F16, LARGEST_F16)).to_bits()
}

const LARGEST_F16: f32 = 65504.0;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn to_f16_avx2(x: &[f32], out: &mut [u16]) {
    use std::arch::x86_64::*;
    let ((chunks, rest), (outs, rest_out)) = (x.as_chunks::<8>(), out.as_chunks_mut::<8>());
    let (least, most) = (_mm256_set1_ps(-LARGEST_F16), _mm256_set1_ps(LARGEST_F16));
    for (x, out) in chunks.iter().zip(outs) {
        // SAFETY: loads and stores are of 8 numbers. NaN, the second operand, stays.
        unsafe {
            let x = _mm256_min_ps(most, _mm256_max_ps(least, _mm256_loadu_ps(x.as_ptr())));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        }
    }
    rest.iter().zip(rest_out).for_each(|(x, out)| *out = nearest_f16(*x));
}

/// A view of rows: row `r` starts at `r * stride`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// Rows of results, `stride` numbers apart.
#[derive(Clone, Copy)]
pub struct Target {
    pub start: *mut f32,
    pub stride: usize,
    /// Whether sums are added to what is there, or replace it.
    pub add: bool,
}

// SAFETY: whoever writes through one promises that nobody else touches those numbers.
unsafe impl Send for Target {}
unsafe impl Sync for Target {}

impl Target {
    /// The same rows from the number `column` of row `row` on.
    ///
    /// # Safety
    /// It lies inside the results.
    pub unsafe fn at(self, row: usize, column: usize) -> Self {
        // SAFETY: the caller's promise.
        Target { start: unsafe { self.start.add(row * self.stride + column) }, ..self }
    }

    /// Puts `scale * sums` into the first `count` numbers.
    ///
    /// # Safety
    /// They are good for writing, and nobody else touches them meanwhile.
    #[inline(always)]
    pub unsafe fn put(self, sums: &[f32; LANES], count: usize, scale: f32) {
        // SAFETY: the caller's promise.
        let y = unsafe { std::slice::from_raw_parts_mut(self.start, count) };
        match (y.as_chunks_mut::<LANES>(), self.add) {
            // Whole panels are the rule, and their length known to the compiler.
            (([y], []), true) => {
                // Read as a whole before it is written: for the compiler, the sums may lie in it.
                let old = *y;
                *y = std::array::from_fn(|lane| old[lane] + scale * sums[lane]);
            }
            (([y], []), false) => *y = sums.map(|sum| scale * sum),
            (_, true) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += scale * sum),
            (_, false) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y = scale * sum),
        }
    }
}

/// `acc[r][lane] += Σ_k x[r][k] * w[k][lane]` for `rows` rows, [`LANES`] lanes and `k` terms in ascending order.
///
/// `x` row `r` starts at `r * x.stride`, `w` row `k` at `k * w.stride`, `acc` row `r` at `r * acc_stride`.
///
/// # Panics
/// If a slice is too short for these.
pub fn multiply(simd: Simd, rows: usize, k: usize, x: Rows, w: Rows, acc: &mut [f32], acc_stride: usize) {
    if rows == 0 || k == 0 {
        return;
    }
    assert!(x.data.len() >= (rows - 1) * x.stride + k);
    assert!(w.data.len() >= (k - 1) * w.stride + LANES);
    assert!(acc.len() >= (rows - 1) * acc_stride + LANES);
    match simd {
        Simd::Portable => {
            for r in 0..rows {
                let acc = &mut acc[r * acc_stride..][..LANES];
                for (i, &x) in x.data[r * x.stride..][..k].iter().enumerate() {
                    for (a, &w) in acc.iter_mut().zip(&w.data[i * w.stride..][..LANES]) {
                        *a += x * w;
                    }
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => {
            const TILES: [Tile; MAX_TILE_AVX2] =
                [tile_avx2::<1>, tile_avx2::<2>, tile_avx2::<3>, tile_avx2::<4>, tile_avx2::<5>, tile_avx2::<6>];
            // SAFETY: the asserts above bound every access; `Avx2` is only made where the CPU has the features.
            unsafe { multiply_tiles(&TILES, rows, k, x, w, acc, acc_stride) }
        }
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => {
            const TILES: [Tile; MAX_TILE_AVX512] = [
                tile_avx512::<1>,
                tile_avx512::<2>,
                tile_avx512::<3>,
                tile_avx512::<4>,
                tile_avx512::<5>,
                tile_avx512::<6>,
                tile_avx512::<7>,
                tile_avx512::<8>,
                tile_avx512::<9>,
                tile_avx512::<10>,
                tile_avx512::<11>,
                tile_avx512::<12>,
            ];
            // SAFETY: the asserts above bound every access; `Avx512` is only made where the CPU has the features.
            unsafe { multiply_tiles(&TILES, rows, k, x, w, acc, acc_stride) }
        }
    }
}

/// Goes through the rows in tiles; `tiles[r - 1]` is the one of `r` rows.
///
/// # Safety
/// The CPU has what the tiles need; the slices are long enough for [`multiply`].
#[cfg(target_arch = "x86_64")]
unsafe fn multiply_tiles(tiles: &[Tile], rows: usize, k: usize, x: Rows, w: Rows, acc: &mut [f32], acc_stride: usize) {
    let (max, mut row) = (tiles.len(), 0);
    while row < rows {
        let left = rows - row;
        // Two even tiles rather than a full and a thin one: a thin tile has too few chains in flight.
        let take = if left > max && left < 2 * max { left.div_ceil(2) } else { left.min(max) };
        // SAFETY: the caller's promise.
        unsafe {
            let (x_start, acc) = (x.data.as_ptr().add(row * x.stride), acc.as_mut_ptr().add(row * acc_stride));
            tiles[take - 1](k, x_start, x.stride, w.data.as_ptr(), w.stride, acc, acc_stride);
        }
        row += take;
    }
}

/// `acc += x W` as [`multiply`], for a group of packed weights. `scratch` is room for them unpacked.
pub fn multiply_group(
    simd: Simd,
    rows: usize,
    x: Rows,
    group: Group,
    acc: &mut [f32],
    acc_stride: usize,
    scratch: &mut [f32; GROUP * LANES],
) {
    let k = group.terms();
    if let Group::F32(w) = group {
        return multiply(simd, rows, k, x, Rows { data: w, stride: LANES }, acc, acc_stride);
    }
    #[cfg(target_arch = "x86_64")]
    if simd == Simd::Avx512 && (1..=MAX_DIRECT).contains(&rows) && k > 0 {
        assert!(x.data.len() >= (rows - 1) * x.stride + k);
        assert!(acc.len() >= (rows - 1) * acc_stride + LANES);
        let tile = [direct_avx512::<1>, direct_avx512::<2>, direct_avx512::<3>, direct_avx512::<4>][rows - 1];
        // SAFETY: the asserts bound every access; `Avx512` is only made where the CPU has the features.
        return unsafe { tile(x.data.as_ptr(), x.stride, group, acc.as_mut_ptr(), acc_stride) };
    }
    #[cfg(target_arch = "x86_64")]
    if let (Simd::Avx2, Group::F16(w), 1..=MAX_DIRECT) = (simd, group, rows) {
        assert!(x.data.len() >= (rows - 1) * x.stride + k);
        assert!(acc.len() >= (rows - 1) * acc_stride + LANES);
        let tile = [direct_avx2::<1>, direct_avx2::<2>, direct_avx2::<3>, direct_avx2::<4>][rows - 1];
        // SAFETY: the asserts bound every access; `Avx2` is only made where the CPU has the features.
        return unsafe { tile(x.data.as_ptr(), x.stride, w, acc.as_mut_ptr(), acc_stride) };
    }
    unpack(simd, group, scratch);
    multiply(simd, rows, k, x, Rows { data: scratch, stride: LANES }, acc, acc_stride)
}

/// For weights in f16.
///
/// # Safety
/// The CPU has avx2, fma and f16c; `x` is good for `R` rows of the weights' terms, `acc` for `R` rows of [`LANES`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn direct_avx2<const R: usize>(x: *const f32, x_stride: usize, w: &[u16], acc: *mut f32, acc_stride: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = [[_mm256_setzero_ps(); 2]; R];
        for (r, sum) in sum.iter_mut().enumerate() {
            *sum = [_mm256_loadu_ps(acc.add(r * acc_stride)), _mm256_loadu_ps(acc.add(r * acc_stride + 8))];
        }
        for (i, w) in w.as_chunks::<LANES>().0.iter().enumerate() {
            let half = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(w.as_ptr().add(at).cast()));
            let w = [half(0), half(8)];
            for (r, sum) in sum.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*x.add(r * x_stride + i));
                sum[0] = _mm256_fmadd_ps(x, w[0], sum[0]);
                sum[1] = _mm256_fmadd_ps(x, w[1], sum[1]);
            }
        }
        for (r, sum) in sum.iter().enumerate() {
            _mm256_storeu_ps(acc.add(r * acc_stride), sum[0]);
            _mm256_storeu_ps(acc.add(r * acc_stride + 8), sum[1]);
        }
    }
}

/// # Safety
/// The CPU has avx512f and avx512bw; `x` is good for `R` rows of the group's terms, `acc` for `R` rows of [`LANES`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn direct_avx512<const R: usize>(
    x: *const f32,
    x_stride: usize,
    group: Group,
    acc: *mut f32,
    acc_stride: usize,
) {
    let (x, terms, acc) = ((x, x_stride), group.terms(), (acc, acc_stride, 0));
    // SAFETY: the caller's promise.
    unsafe {
        with_lanes512!(group, |weights| add_avx512::<R, 1, _>(x, [weights], terms, acc),
            F32(_w) => unreachable!("f32 needs no unpacking"));
    }
}

/// `acc += x W` for `R` rows and `S` groups: `x` and the distance of its rows, and `acc`, that of its rows and of the groups'
/// sums.
///
/// # Safety
/// The CPU has avx512f and avx512bw; each group has so many terms; `x` is good for `R` rows of these, `acc` for `R` rows of
/// [`LANES`] of each group.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn add_avx512<const R: usize, const S: usize, W: lanes512::Weights>(
    (x, x_stride): (*const f32, usize),
    weights: [W; S],
    terms: usize,
    (acc, acc_stride, step): (*mut f32, usize, usize),
) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise; every `i` is below the groups' number of terms.
    unsafe {
        let mut sums: [[__m512; S]; R] =
            std::array::from_fn(|r| std::array::from_fn(|s| _mm512_loadu_ps(acc.add(r * acc_stride + s * step))));
        for i in 0..terms {
            let w: [__m512; S] = std::array::from_fn(|s| weights[s].lanes(i));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*x.add(r * x_stride + i));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = _mm512_fmadd_ps(x, w, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (s, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(acc.add(r * acc_stride + s * step), *sum);
            }
        }
    }
}

/// Groups that are multiplied side by side.
pub const SIDE: usize = 4;

/// [`multiply_group`] for groups of as many terms each, whose sums lie `step` numbers after those of the group before: a CPU
/// that waits for one chain of additions then has others to go on with.
///
/// # Panics
/// As [`multiply_group`].
#[expect(clippy::too_many_arguments)]
pub fn multiply_groups(
    simd: Simd,
    rows: usize,
    x: Rows,
    groups: &[Group],
    acc: &mut [f32],
    acc_stride: usize,
    step: usize,
    scratch: &mut [f32; GROUP * LANES],
) {
    #[cfg(target_arch = "x86_64")]
    if let ([first @ (Group::F16(_) | Group::F32(_)), ..], Simd::Avx512, 1..=MAX_DIRECT) = (groups, simd, rows) {
        let k = first.terms();
        assert!(groups.iter().all(|group| std::mem::discriminant(group) == std::mem::discriminant(first)));
        assert!(k > 0 && groups.iter().all(|group| group.terms() == k));
        assert!(x.data.len() >= (rows - 1) * x.stride + k);
        assert!(acc.len() >= (groups.len() - 1) * step + (rows - 1) * acc_stride + LANES);
        macro_rules! sides {
            ($($rows:literal)*) => {
                [$([side_avx512::<$rows, 1>, side_avx512::<$rows, 2>, side_avx512::<$rows, 3>, side_avx512::<$rows, 4>]),*]
            };
        }
        let sides = sides!(1 2 3 4)[rows - 1];
        for (i, groups) in groups.chunks(SIDE).enumerate() {
            let acc = acc[i * SIDE * step..].as_mut_ptr();
            // SAFETY: the asserts bound every access; `Avx512` is only made where the CPU has the features.
            unsafe { sides[groups.len() - 1](x.data.as_ptr(), x.stride, groups, acc, acc_stride, step) };
        }
        return;
    }
    for (i, &group) in groups.iter().enumerate() {
        multiply_group(simd, rows, x, group, &mut acc[i * step..], acc_stride, scratch);
    }
}

/// For `R` rows and `S` groups.
///
/// # Safety
/// The CPU has avx512f and avx512bw; there are `S` groups, all of f16 or all of f32, of as many terms each; `x` is good for `R` rows of these, `acc` for
/// `R` rows of [`LANES`] of each group.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn side_avx512<const R: usize, const S: usize>(
    x: *const f32,
    x_stride: usize,
    groups: &[Group],
    acc: *mut f32,
    acc_stride: usize,
    step: usize,
) {
    let terms = groups[0].terms();
    let (x, out) = ((x, x_stride), (acc, acc_stride, step));
    let f16 = |s: usize| lanes512::F16(if let Group::F16(w) = groups[s] { w } else { &[] });
    let f32 = |s: usize| lanes512::F32(if let Group::F32(w) = groups[s] { w } else { &[] });
    // SAFETY: the caller's promise.
    unsafe {
        match groups[0] {
            Group::F16(_) => add_avx512::<R, S, _>(x, std::array::from_fn(f16), terms, out),
            _ => add_avx512::<R, S, _>(x, std::array::from_fn(f32), terms, out),
        }
    }
}

/// A tile of some number of rows: `k`, `x` and its stride, `w` and its stride, `acc` and its stride.
#[cfg(target_arch = "x86_64")]
type Tile = unsafe fn(usize, *const f32, usize, *const f32, usize, *mut f32, usize);

/// # Safety
/// The CPU has avx512f; the pointers are good for `R` rows and `k` terms as [`multiply`] describes them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512<const R: usize>(
    k: usize,
    x: *const f32,
    x_stride: usize,
    w: *const f32,
    w_stride: usize,
    acc: *mut f32,
    acc_stride: usize,
) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum: [__m512; R] = std::array::from_fn(|r| _mm512_loadu_ps(acc.add(r * acc_stride)));
        for i in 0..k {
            let w = _mm512_loadu_ps(w.add(i * w_stride));
            for (r, sum) in sum.iter_mut().enumerate() {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(*x.add(r * x_stride + i)), w, *sum);
            }
        }
        for (r, sum) in sum.iter().enumerate() {
            _mm512_storeu_ps(acc.add(r * acc_stride), *sum);
        }
    }
}

/// # Safety
/// The CPU has avx2 and fma; the pointers are good for `R` rows and `k` terms as [`multiply`] describes them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const R: usize>(
    k: usize,
    x: *const f32,
    x_stride: usize,
    w: *const f32,
    w_stride: usize,
    acc: *mut f32,
    acc_stride: usize,
) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = [[_mm256_setzero_ps(); 2]; R];
        for (r, sum) in sum.iter_mut().enumerate() {
            *sum = [_mm256_loadu_ps(acc.add(r * acc_stride)), _mm256_loadu_ps(acc.add(r * acc_stride + 8))];
        }
        macro_rules! add_term {
            ($i:expr) => {{
                let i = $i;
                let w = w.add(i * w_stride);
                let (w0, w1) = (_mm256_loadu_ps(w), _mm256_loadu_ps(w.add(8)));
                for (r, sum) in sum.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*x.add(r * x_stride + i));
                    sum[0] = _mm256_fmadd_ps(x, w0, sum[0]);
                    sum[1] = _mm256_fmadd_ps(x, w1, sum[1]);
                }
            }};
        }
        let whole = k - k % UNROLLED;
        for i in (0..whole).step_by(UNROLLED) {
            unrolled!(u < UNROLLED, { add_term!(i + u) });
        }
        for i in whole..k {
            add_term!(i);
        }
        for (r, sum) in sum.iter().enumerate() {
            _mm256_storeu_ps(acc.add(r * acc_stride), sum[0]);
            _mm256_storeu_ps(acc.add(r * acc_stride + 8), sum[1]);
        }
    }
}

/// `e^x` for `x <= 88`, to about 2 units in the last place: `2^n` by the exponent bits, the rest of the argument
/// (at most `ln 2 / 2`) by its Taylor polynomial of degree 7. Below -87 the result is 0.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    // No argument can make an exponent that is out of range. Adding 1.5 * 2^23 leaves a whole number in the low bits; of a cast,
    // which saturates, the compiler makes 16 single ones.
    let whole = (n.clamp(-127.0, 127.0) + 12_582_912.0).to_bits().wrapping_sub(0x4B40_0000);
    let power = f32::from_bits(whole.wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

/// Makes of a body, which the compiler turns into vector code, one form for each kind of CPU.
macro_rules! forms {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?, $body:ident, $avx2:ident, $avx512:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn $avx2($($arg: $type),*) $(-> $out)? {
            $body($($arg),*)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx2,fma")]
        fn $avx512($($arg: $type),*) $(-> $out)? {
            $body($($arg),*)
        }

        $(#[$doc])*
        pub fn $name(simd: Simd, $($arg: $type),*) $(-> $out)? {
            match simd {
                Simd::Portable => $body($($arg),*),
                // SAFETY: `Avx2` is only made where the CPU has the features.
                #[cfg(target_arch = "x86_64")]
                Simd::Avx2 => unsafe { $avx2($($arg),*) },
                // SAFETY: likewise.
                #[cfg(target_arch = "x86_64")]
                Simd::Avx512 => unsafe { $avx512($($arg),*) },
            }
        }
    };
}

#[inline(always)]
fn silu_mul_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + exp((-g).min(88.0))) * u;
    }
}

forms! {
    /// `out = silu(gate) * up`, `silu(g) = g / (1 + e^-g)`; three slices of one length.
    silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]), silu_mul_body, silu_mul_avx2, silu_mul_avx512
}

#[inline(always)]
fn silu_body(x: &[f32], out: &mut [f32]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = x / (1.0 + exp((-x).min(88.0)));
    }
}

forms! {
    /// `x / (1 + e^-x)`; two slices of one length.
    silu(x: &[f32], out: &mut [f32]), silu_body, silu_avx2, silu_avx512
}

#[inline(always)]
fn gelu_tanh_body(x: &[f32], out: &mut [f32]) {
    const ROOT: f32 = 0.797_884_6; // sqrt(2 / pi)
    for (o, &x) in out.iter_mut().zip(x) {
        // (1 + tanh(z)) / 2 = 1 / (1 + e^-2z)
        let z = ROOT * (x + 0.044715 * x * x * x);
        *o = x / (1.0 + exp((-2.0 * z).min(88.0)));
    }
}

forms! {
    /// GELU approximated by a hyperbolic tangent (arXiv 1606.08415); two slices of one length.
    gelu_tanh(x: &[f32], out: &mut [f32]), gelu_tanh_body, gelu_tanh_avx2, gelu_tanh_avx512
}

/// `out = activation(x)`; two slices of one length.
pub fn activate(simd: Simd, activation: Activation, x: &[f32], out: &mut [f32]) {
    let each = |f: fn(f32) -> f32, out: &mut [f32]| out.iter_mut().zip(x).for_each(|(o, &x)| *o = f(x));
    match activation {
        Activation::Silu => silu(simd, x, out),
        Activation::GeluTanh => gelu_tanh(simd, x, out),
        Activation::Gelu => each(|x| x * 0.5 * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2)), out),
        Activation::Relu => each(|x| x.max(0.0), out),
    }
}

#[inline(always)]
fn add_body(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

forms! {
    /// Adds `y`, as many numbers, to `x`.
    add(x: &mut [f32], y: &[f32]), add_body, add_rows_avx2, add_rows_avx512
}

#[inline(always)]
fn turn_body(x: &[f32], cos: &[f32], sin: &[f32], scale: f32, out: &mut [f32]) {
    let ((x1, x2), (out1, out2)) = (x.split_at(cos.len()), out.split_at_mut(cos.len()));
    let pairs = x1.iter().zip(x2).zip(cos.iter().zip(sin));
    for (((x1, x2), (cos, sin)), (out1, out2)) in pairs.zip(out1.iter_mut().zip(out2.iter_mut())) {
        *out1 = (x1 * cos - x2 * sin) * scale;
        *out2 = (x2 * cos + x1 * sin) * scale;
    }
    out2[cos.len()..].iter_mut().zip(&x2[cos.len()..]).for_each(|(out, x)| *out = x * scale);
}

forms! {
    /// Turns each pair `(x[i], x[i + half])` by an angle, `half` being how many there are, and scales all numbers; slices `x` and
    /// `out` are of one length.
    turn(x: &[f32], cos: &[f32], sin: &[f32], scale: f32, out: &mut [f32]), turn_body, turn_avx2, turn_avx512
}

#[inline(always)]
fn softcap_body(x: &mut [f32], cap: f32) {
    for x in x {
        // tanh(z) = 1 - 2 / (1 + e^2z)
        let z = (*x / cap).clamp(-44.0, 44.0);
        *x = cap - 2.0 * cap / (1.0 + exp(2.0 * z));
    }
}

forms! {
    /// Replaces each number by `cap * tanh(x / cap)`.
    softcap(x: &mut [f32], cap: f32), softcap_body, softcap_avx2, softcap_avx512
}

#[inline(always)]
fn silu_mul_backward_body(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let inputs = gate.iter().zip(up).zip(dy);
    for ((dg, du), ((&g, &u), &dy)) in dgate.iter_mut().zip(dup).zip(inputs) {
        let sigmoid = 1.0 / (1.0 + exp((-g).min(88.0)));
        *du = dy * g * sigmoid;
        *dg = dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
    }
}

forms! {
    /// The gradients of [`silu_mul`]'s inputs for the gradient `dy` of its output; slices of one length.
    silu_mul_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]),
    silu_mul_backward_body, silu_mul_backward_avx2, silu_mul_backward_avx512
}

#[inline(always)]
fn softmax_body(scores: &mut [f32]) -> f32 {
    // Lanes apart so that the loops are vector loops; their order is fixed, so the sum is too.
    let larger = |m: f32, s: f32| if s > m { s } else { m };
    let mut most = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = scores.as_chunks::<LANES>();
    whole.iter().for_each(|chunk| most.iter_mut().zip(chunk).for_each(|(m, &s)| *m = larger(*m, s)));
    let max = rest.iter().chain(&most).fold(f32::NEG_INFINITY, |m, &s| larger(m, s));
    let mut sums = [0.0f32; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (s, sum) in chunk.iter_mut().zip(&mut sums) {
            *s = exp(*s - max);
            *sum += *s;
        }
    }
    // Those left over are the beginning of a whole chunk, whose other numbers become 0: number by number they would take as
    // long as many chunks.
    let rest = chunks.into_remainder();
    let mut last = [f32::NEG_INFINITY; LANES];
    last[..rest.len()].copy_from_slice(rest);
    for (s, sum) in last.iter_mut().zip(&mut sums) {
        *s = exp(*s - max);
        *sum += *s;
    }
    rest.copy_from_slice(&last[..rest.len()]);
    sums.iter().sum()
}

forms! {
    /// Replaces each score by `e^(score - max)` and returns their sum.
    softmax(scores: &mut [f32]) -> f32, softmax_body, softmax_avx2, softmax_avx512
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum(x, |x| x * x) / x.len() as f32 + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * w;
    }
}

forms! {
    /// `out = x / sqrt(mean(x²) + eps) * weight` (arXiv 1910.07467); three slices of one length.
    rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]), rms_norm_body, rms_norm_avx2, rms_norm_avx512
}

/// The sum of `f(x)`, lanes summed apart as in the softmax.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (&x, sum) in chunk.iter().zip(&mut sums) {
            *sum += f(x);
        }
    }
    for (&x, sum) in chunks.remainder().iter().zip(&mut sums) {
        *sum += f(x);
    }
    sums.iter().sum()
}

#[inline(always)]
fn layer_norm_body(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum(x, |x| x) / x.len() as f32;
    let variance = sum(x, |x| (x - mean) * (x - mean)) / x.len() as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = (x - mean) * scale * w + b;
    }
}

forms! {
    /// `out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` (arXiv 1607.06450); four slices of one length.
    layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]),
    layer_norm_body, layer_norm_avx2, layer_norm_avx512
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: f32, b: f32, scale: f32) -> bool {
        (a - b).abs() <= 1e-5 * scale.max(1.0)
    }

    #[test]
    fn what_is_ahead_is_fetched_part_by_part() {
        let (long, short) = ([0u8; 200], [0u8; 64]);
        let mut ahead = Ahead::new([place(&long), place::<u8>(&[]), place(&short)]);
        let left = [2, 2, 1, 1].map(|lines| {
            ahead.fetch(lines);
            ahead.lines()
        });
        assert_eq!(left, [2 + 1, 1, 0, 0]);
        assert_eq!(Ahead::new([place(&[0u8; 1 << 18]), place(&short), place(&short)]).lines(), 0);
    }

    #[test]
    fn exp_is_accurate() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (exp(x), (x as f64).exp());
            assert!(((got as f64 - want) / want).abs() < 5e-7, "exp({x}) = {got}, not {want}");
        }
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    proptest! {
        #[test]
        fn tiles_equal_the_plain_sum_and_do_not_depend_on_their_size(
            rows in 1usize..20, k in 1usize..70, seed in any::<u64>()
        ) {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            let x: Vec<f32> = (0..rows * k).map(|_| next()).collect();
            let w: Vec<f32> = (0..k * LANES).map(|_| next()).collect();
            for simd in Simd::all() {
                let run = |x: &[f32], rows: usize| {
                    let mut acc = vec![0.5f32; rows * LANES];
                    let (x, w) = (Rows { data: x, stride: k }, Rows { data: &w, stride: LANES });
                    multiply(simd, rows, k, x, w, &mut acc, LANES);
                    acc
                };
                let all = run(&x, rows);
                for r in 0..rows {
                    let alone = run(&x[r * k..][..k], 1);
                    prop_assert_eq!(&all[r * LANES..][..LANES], &alone[..]);
                    for lane in 0..LANES {
                        let want: f64 =
                            0.5 + (0..k).map(|i| x[r * k + i] as f64 * w[i * LANES + lane] as f64).sum::<f64>();
                        prop_assert!(close(alone[lane], want as f32, k as f32));
                    }
                }
            }
        }

        /// Packed weights give the same product whether they are unpacked once or for each tile, to the last bit.
        #[test]
        fn groups_equal_their_unpacked_weights(
            rows in 1usize..20, terms in 1usize..=GROUP, bytes in prop::collection::vec(any::<u8>(), GROUP * LANES)
        ) {
            let halves: Vec<u16> = bytes.iter().map(|&b| half::f16::from_f32(b as f32 / 64.0 - 2.0).to_bits()).collect();
            let signed: Vec<i8> = bytes.iter().map(|&b| b as i8).collect();
            let scale: [f32; LANES] = std::array::from_fn(|i| 0.01 + i as f32 / 300.0);
            let min: [f32; LANES] = std::array::from_fn(|i| -0.3 + i as f32 / 70.0);
            let x: Vec<f32> = (0..rows * GROUP).map(|i| (bytes[i % bytes.len()] as f32 - 100.0) / 50.0).collect();
            let x = Rows { data: &x, stride: GROUP };
            let groups = [
                Group::Bf16(&halves[..terms * LANES]),
                Group::F16(&halves[..terms * LANES]),
                Group::Q8 { scale: &scale, q: &signed[..terms * LANES] },
                Group::Q5 { scale: &scale, min: &min, q: &bytes[..terms * LANES] },
                Group::Q4 { scale: &scale, min: &min, q: &bytes[..GROUP / 2 * LANES] },
            ];
            for group in groups {
                let mut plain = [0.0; GROUP * LANES];
                unpack(Simd::Portable, group, &mut plain);
                for simd in Simd::all() {
                    let (mut unpacked, mut scratch) = ([0.0; GROUP * LANES], [0.0; GROUP * LANES]);
                    unpack(simd, group, &mut unpacked);
                    prop_assert_eq!(&unpacked[..], &plain[..], "{:?}", simd);
                    let (mut want, mut got) = (vec![0.5; rows * LANES], vec![0.5; rows * LANES]);
                    multiply(simd, rows, group.terms(), x, Rows { data: &plain, stride: LANES }, &mut want, LANES);
                    multiply_group(simd, rows, x, group, &mut got, LANES, &mut scratch);
                    prop_assert_eq!(&got, &want, "{:?}", simd);
                }
            }
        }

        #[test]
        fn softmax_forms_agree(scores in prop::collection::vec(-30f32..30.0, 1..100)) {
            for simd in Simd::all() {
                let mut got = scores.clone();
                let sum = softmax(simd, &mut got);
                let max = scores.iter().cloned().fold(f32::MIN, f32::max);
                let want: Vec<f64> = scores.iter().map(|&s| ((s - max) as f64).exp()).collect();
                let total: f64 = want.iter().sum();
                for (g, w) in got.iter().zip(&want) {
                    prop_assert!(close(g / sum, (w / total) as f32, 1.0));
                }
            }
        }

        #[test]
        fn groups_side_by_side_equal_groups_alone(
            (rows, count, terms) in (1usize..8, 1usize..10, 1usize..=GROUP), in_f16 in any::<bool>(), seed in any::<u64>(),
        ) {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            let weights: Vec<f32> = (0..count * terms * LANES).map(|_| next()).collect();
            let bits: Vec<u16> = weights.iter().map(|&w| half::f16::from_f32(w).to_bits()).collect();
            let x: Vec<f32> = (0..rows * (terms + 1)).map(|_| next()).collect();
            let x = Rows { data: &x, stride: terms + 1 };
            let group = |i: usize| match in_f16 {
                true => Group::F16(&bits[i * terms * LANES..][..terms * LANES]),
                false => Group::F32(&weights[i * terms * LANES..][..terms * LANES]),
            };
            let groups: Vec<Group> = (0..count).map(group).collect();
            let before: Vec<f32> = (0..count * rows * LANES).map(|_| next()).collect();
            let mut scratch = [0.0; GROUP * LANES];
            // Sums of a row side by side, as of keys, and those of a group, as of values.
            for (stride, step) in [(count * LANES, LANES), (LANES, rows * LANES)] {
                for simd in Simd::all() {
                    let (mut got, mut want) = (before.clone(), before.clone());
                    multiply_groups(simd, rows, x, &groups, &mut got, stride, step, &mut scratch);
                    for (i, &group) in groups.iter().enumerate() {
                        multiply_group(simd, rows, x, group, &mut want[i * step..], stride, &mut scratch);
                    }
                    prop_assert_eq!(got, want, "{:?}", simd);
                }
            }
        }

        #[test]
        fn f16_forms_agree(x in prop::collection::vec(prop::num::f32::ANY, 0..40)) {
            let mut want = vec![0; x.len()];
            to_f16(Simd::Portable, &x, &mut want);
            for (x, &bits) in x.iter().zip(&want) {
                let (got, want) = (half::f16::from_bits(bits).to_f32(), x.clamp(-65504.0, 65504.0));
                let is_nearest = got == half::f16::from_f32(want).to_f32();
                prop_assert!(is_nearest || x.is_nan() && got.is_nan(), "{got}, not {want}");
            }
            for simd in Simd::all() {
                let mut got = vec![0; x.len()];
                to_f16(simd, &x, &mut got);
                for ((got, want), x) in got.iter().zip(&want).zip(&x) {
                    prop_assert!(got == want || x.is_nan() && half::f16::from_bits(*got).is_nan(), "{simd:?}: {x}");
                }
            }
        }

        #[test]
        fn rms_norm_forms_agree(x in prop::collection::vec(-9f32..9.0, 1..100)) {
            let weight: Vec<f32> = (0..x.len()).map(|i| i as f32 / 7.0 - 2.0).collect();
            let squares: f64 = x.iter().map(|&x| x as f64 * x as f64).sum();
            let scale = 1.0 / (squares / x.len() as f64 + 1e-5).sqrt();
            for simd in Simd::all() {
                let mut got = vec![0.0; x.len()];
                rms_norm(simd, &x, &weight, 1e-5, &mut got);
                for ((&got, &x), &w) in got.iter().zip(&x).zip(&weight) {
                    prop_assert!(close(got, (x as f64 * scale * w as f64) as f32, w.abs()));
                }
            }
        }

        #[test]
        fn layer_norm_forms_agree(x in prop::collection::vec(-9f32..9.0, 1..100)) {
            let weight: Vec<f32> = (0..x.len()).map(|i| i as f32 / 7.0 - 2.0).collect();
            let bias: Vec<f32> = weight.iter().map(|w| 1.0 - w).collect();
            let n = x.len() as f64;
            let mean = x.iter().map(|&x| x as f64).sum::<f64>() / n;
            let variance = x.iter().map(|&x| (x as f64 - mean).powi(2)).sum::<f64>() / n;
            for simd in Simd::all() {
                let mut got = vec![0.0; x.len()];
                layer_norm(simd, &x, &weight, &bias, 1e-2, &mut got);
                for (((&got, &x), &w), &b) in got.iter().zip(&x).zip(&weight).zip(&bias) {
                    let want = (x as f64 - mean) / (variance + 1e-2).sqrt() * w as f64 + b as f64;
                    prop_assert!(close(got, want as f32, 10.0 * w.abs()), "{got} {want}");
                }
            }
        }

        #[test]
        fn activation_forms_agree(x in prop::collection::vec(prop_oneof![-100f32..100.0, -4f32..4.0], 1..50)) {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let formulas: [(Activation, &dyn Fn(f64) -> f64); 4] = [
                (Activation::Silu, &|x| x / (1.0 + (-x).exp())),
                (Activation::GeluTanh, &|x| 0.5 * x * (1.0 + (root * (x + 0.044715 * x.powi(3))).tanh())),
                (Activation::Gelu, &|x| 0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / 2f64.sqrt()))),
                (Activation::Relu, &|x| x.max(0.0)),
            ];
            for simd in Simd::all() {
                for (activation, formula) in formulas {
                    let mut got = vec![0.0; x.len()];
                    activate(simd, activation, &x, &mut got);
                    for (&got, &x) in got.iter().zip(&x) {
                        let want = formula(x as f64) as f32;
                        prop_assert!(close(got, want, want.abs()), "{activation:?}({x}) = {got}, not {want}");
                    }
                }
                let mut got = x.clone();
                softcap(simd, &mut got, 5.0);
                for (&got, &x) in got.iter().zip(&x) {
                    prop_assert!(close(got, (5.0 * (x as f64 / 5.0).tanh()) as f32, 1.0), "softcap({x}) = {got}");
                }
            }
        }

        #[test]
        fn silu_mul_forms_agree(gate in prop::collection::vec(-100f32..100.0, 1..50)) {
            let up: Vec<f32> = gate.iter().map(|g| g * 0.5 - 1.0).collect();
            for simd in Simd::all() {
                let mut got = vec![0.0; gate.len()];
                silu_mul(simd, &gate, &up, &mut got);
                for ((&got, &g), &u) in got.iter().zip(&gate).zip(&up) {
                    let want = g as f64 / (1.0 + (-g as f64).exp()) * u as f64;
                    prop_assert!(close(got, want as f32, want.abs() as f32), "{got} {want}");
                }
            }
        }
    }
}
