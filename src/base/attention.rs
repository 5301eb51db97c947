//! Attention with grouped queries over the paged KV cache: causal, or an encoder's.

use std::ops::{Deref, Range};
#[cfg(feature = "cuda")]
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::base::ModelConfig;
use crate::base::buffer::Buffer;
use crate::base::decoder::RowNorm;
#[cfg(feature = "flash-attn")]
use crate::base::flash;
#[cfg(feature = "cuda")]
use crate::base::fused;
use crate::base::kv::{BLOCK, KvCache, LayerCache, value_width};
#[cfg(feature = "cuda")]
use crate::base::paged::tiles::AttentionTiles;
use crate::base::paged::{Heads, PagedAttention};
use crate::base::parallel;
use crate::base::products::Rest;
use crate::base::simd::{self, GROUP, Group, LANES, Rows, SIDE, Simd};

/// The rows of a step that belong to one sequence.
#[derive(Debug, Clone)]
pub struct SequenceRows<'a> {
    /// Rows of the step, in the order of their positions.
    pub rows: Range<usize>,
    /// Position of the first row.
    pub start: usize,
    /// Block table; position `p` lives in slot `p % BLOCK` of `blocks[p / BLOCK]`.
    pub blocks: &'a [u32],
}

impl SequenceRows<'_> {
    /// Positions that the token at `position` sees, from 0 on.
    fn seen(&self, config: &ModelConfig, position: usize) -> usize {
        if config.family.is_encoder() { self.start + self.rows.len() } else { position + 1 }
    }

    pub(super) fn slot(&self, position: usize) -> usize {
        self.blocks[position / BLOCK] as usize * BLOCK + position % BLOCK
    }
}

/// Rotation of each row's heads by its position (RoFormer, arXiv 2104.09864), halves split as in Hugging Face's Llama.
pub struct Rotation {
    /// Pairs of numbers of a head that are turned; the numbers after them stay as they are.
    half: usize,
    /// `[rows, half]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    pub fn new(config: &ModelConfig, sequences: &[SequenceRows]) -> Self {
        let rows = sequences.iter().map(|s| s.rows.end).max().unwrap_or(0);
        let Some(rope) = &config.rope else { return Rotation { half: 0, cos: vec![], sin: vec![] } };
        let half = rope.frequencies.len();
        let (mut cos, mut sin) = (vec![0.0; rows * half], vec![0.0; rows * half]);
        for s in sequences {
            for (i, row) in s.rows.clone().enumerate() {
                for (j, f) in rope.frequencies.iter().enumerate() {
                    let (s, c) = ((s.start + i) as f32 * f).sin_cos();
                    (sin[row * half + j], cos[row * half + j]) = (s * rope.attention_factor, c * rope.attention_factor);
                }
            }
        }
        Rotation { half, cos, sin }
    }

    /// Rotates one head `x` of `row` into `out` and scales it.
    fn rotate(&self, simd: Simd, row: usize, x: &[f32], scale: f32, out: &mut [f32]) {
        let of_row = row * self.half..(row + 1) * self.half;
        simd::turn(simd, x, &self.cos[of_row.clone()], &self.sin[of_row], scale, out);
    }
}

/// What the layers' attention over tensors has in common: put on the device once a step.
pub(super) struct StepTensors {
    /// Of the rotation, `[rows, half]`; `None` where nothing is turned.
    rotation: Option<[Tensor; 2]>,
    /// Slot of each row: `[rows, 1]`.
    slots: Tensor,
    #[cfg(feature = "cuda")]
    tiles: OnceLock<(AttentionTiles, crate::cuda::gpu::GpuMemory)>,
    #[cfg(feature = "flash-attn")]
    flash: OnceLock<flash::tensors::Lengths>,
}

impl StepTensors {
    pub fn new(rotation: &Rotation, sequences: &[SequenceRows], dtype: DType, device: &Device) -> Result<Self> {
        let (rows, half) = (sequences.iter().map(|s| s.rows.end).max().unwrap_or(0), rotation.half);
        let table = |t: &[f32]| Tensor::from_slice(t, (rows, half), device)?.to_dtype(dtype);
        let rotation = match half {
            0 => None,
            _ => Some([table(&rotation.cos)?, table(&rotation.sin)?]),
        };
        let mut slots = vec![0u32; rows];
        for s in sequences {
            s.rows.clone().enumerate().for_each(|(i, row)| slots[row] = s.slot(s.start + i) as u32);
        }
        let slots = Tensor::from_vec(slots, (rows, 1), device)?;
        Ok(StepTensors {
            rotation,
            slots,
            #[cfg(feature = "cuda")]
            tiles: OnceLock::new(),
            #[cfg(feature = "flash-attn")]
            flash: OnceLock::new(),
        })
    }

    #[cfg(feature = "flash-attn")]
    fn flash(&self, sequences: &[SequenceRows], device: &Device) -> Result<&flash::tensors::Lengths> {
        if let Some(there) = self.flash.get() {
            return Ok(there);
        }
        let lengths = flash::tensors::Lengths::new(sequences, device)?;
        Ok(self.flash.get_or_init(|| lengths))
    }

    /// The launches, and the address of their words.
    #[cfg(feature = "cuda")]
    fn tiles(
        &self,
        heads: &Heads,
        sequences: &[SequenceRows],
        queries: &Tensor,
    ) -> Result<Option<(&AttentionTiles, u64)>> {
        use crate::cuda::{Machine, Memory};
        let Device::Cuda(device) = queries.device() else { return Ok(None) };
        if self.tiles.get().is_none() {
            let tiles = AttentionTiles::new(heads, queries.dtype(), sequences);
            let words = device.upload(&tiles.words)?;
            self.tiles.get_or_init(|| (tiles, words));
        }
        Ok(self.tiles.get().map(|(tiles, words)| (tiles, words.address())))
    }
}

/// What one layer's attention needs beside its rows and its cache.
pub(super) struct Attention<'a> {
    pub config: &'a ModelConfig,
    pub layer: usize,
    /// Norms of each head of q and of k, before they are rotated.
    pub head_norms: Option<[RowNorm<'a>; 2]>,
    pub rotation: &'a Rotation,
    pub sequences: &'a [SequenceRows<'a>],
}

/// Writes the step's keys and values into the cache and returns the attention's output `[rows, heads * head_dim]`.
/// `qkv` is `[rows, (heads + 2 * kv_heads) * head_dim]`, rows `stride` apart, but for the rest of it, which is added.
///
/// Each row's sums are over blocks in ascending order, whatever the tile: its result does not depend on the other rows.
pub(super) fn packed(
    attention: &Attention,
    simd: Simd,
    (qkv, stride): (&mut [f32], usize),
    rest: Option<Rest>,
    cache: &mut LayerCache,
) -> Buffer {
    let &Attention { config, layer, ref head_norms, rotation, sequences } = attention;
    let LayerCache::Cpu { keys, values } = cache else { unreachable!("the decoder made its own cache") };
    let (hd, kv_heads, vw) = (config.head_dim, config.kv_heads, value_width(config));
    let (group, q_width) = (config.heads / kv_heads, config.heads * hd);
    let width = q_width + 2 * kv_heads * hd;
    let rows = qkv.len() / stride;
    let (scale, softcap) = (config.attention_scale(layer), config.architecture.attention_softcap);
    let window = config.window(layer).unwrap_or(usize::MAX);

    // Where a sequence's rows are one tile, the task that reads what a head has seen is the only one, and writes it too.
    let is_one = |s: &SequenceRows| s.rows.len() <= ROWS;
    // What the outputs lack is added where they are read first, where heads are whole panels.
    let (rest, all) = if hd.is_multiple_of(LANES) { (rest, None) } else { (None, rest) };
    if let Some(all) = all {
        all.add_all(qkv);
    }
    // What follows reads and writes rows without looking where they end.
    assert!(width <= stride && qkv.len() == rows * stride && sequences.iter().all(|s| s.rows.end <= rows));
    let qkv = Target(qkv.as_mut_ptr());
    // SAFETY: the assert; each head of a row is one task's alone while it is written to.
    let head_of = |row: usize, index: usize| -> &[f32] { unsafe { qkv.part(row * stride + index * hd, hd) } };

    let turn = |which: usize, row: usize, x: &[f32], scale: f32, normed: &mut [f32], out: &mut [f32]| match head_norms {
        None => rotation.rotate(simd, row, x, scale, out),
        Some(norms) => {
            norms[which].of_row(row).row(simd, x, normed);
            rotation.rotate(simd, row, normed, scale, out);
        }
    };
    let (keys, values) = (keys.split(), values.split());
    // Writes the key and the value of a row's head.
    let store = |s: &SequenceRows, row: usize, head: usize, scratch: &mut [f32]| {
        let (key, normed) = scratch.split_at_mut(hd);
        let slot = s.slot(s.start + row - s.rows.start);
        let (at, slot) = (slot / BLOCK * kv_heads + head, slot % BLOCK);
        turn(1, row, head_of(row, config.heads + head), 1.0, normed, key);
        // SAFETY: the blocks of a step's rows are theirs alone, and each position has its slot.
        unsafe { keys.write(simd, at * hd * BLOCK + slot, BLOCK, key) };
        let value = head_of(row, config.heads + kv_heads + head);
        for (panel, value) in value.chunks(LANES).enumerate() {
            // SAFETY: likewise.
            unsafe { values.write(simd, (at * vw + panel * LANES) * BLOCK + slot * LANES, 1, value) };
        }
    };
    // Heads that share keys and values, of neighbouring rows of a sequence, share the reading of them.
    let tiles: Vec<(&SequenceRows, Range<usize>)> = sequences
        .iter()
        .flat_map(|s| s.rows.clone().step_by(ROWS).map(move |row| (s, row..(row + ROWS).min(s.rows.end))))
        .collect();
    // Adds to so many heads of some rows what they lack.
    let complete = |rows: &Range<usize>, first: usize, count: usize| {
        if let Some(rest) = &rest {
            // SAFETY: there are these rows, and a task completes only what is its own.
            unsafe {
                let y = simd::Target { start: qkv.at(rows.start * stride + first * hd), stride, add: true };
                rest.add_columns(rows.clone(), first * hd..(first + count) * hd, y);
            }
        }
    };
    let before: Vec<&(&SequenceRows, Range<usize>)> = tiles.iter().filter(|(s, _)| !is_one(s)).collect();
    parallel::run(before.len(), |task| {
        let (s, rows) = before[task];
        complete(rows, config.heads, 2 * kv_heads);
        let mut scratch = Buffer::new(2 * hd);
        for row in rows.clone() {
            (0..kv_heads).for_each(|head| store(s, row, head, &mut scratch));
        }
    });

    let seen = |s: &SequenceRows, row: usize| {
        let end = s.seen(config, s.start + row - s.rows.start);
        end.saturating_sub(window)..end
    };
    // The positions that some of a sequence's rows see, and their blocks.
    let seen_blocks = |s: &&SequenceRows, rows: &Range<usize>| {
        let (first, end) = (seen(s, rows.start).start, seen(s, rows.end - 1).end);
        (first..end, first / BLOCK..end.div_ceil(BLOCK))
    };
    let mut out = Buffer::new(rows * q_width);
    let target = Target(out.as_mut_ptr());
    parallel::run(tiles.len() * kv_heads, |task| {
        let (&(s, ref rows), head) = (&tiles[task / kv_heads], task % kv_heads);
        complete(rows, head * group, group);
        if is_one(s) {
            complete(rows, config.heads + head, 1);
            complete(rows, config.heads + kv_heads + head, 1);
            let mut scratch = Buffer::new(2 * hd);
            rows.clone().for_each(|row| store(s, row, head, &mut scratch));
        }
        let (Range { start: first, end }, blocks) = seen_blocks(&s, rows);
        let blocks = &s.blocks[blocks];
        // Positions are counted from the start of the first block from here on.
        let (zero, span) = (first / BLOCK * BLOCK, blocks.len() * BLOCK);
        let (first, end) = (first - zero, end - zero);
        let mut queries = Buffer::new(rows.len() * group * hd);
        let mut normed = Buffer::new(hd);
        for (row, queries) in rows.clone().zip(queries.chunks_exact_mut(group * hd)) {
            for (i, out) in queries.chunks_exact_mut(hd).enumerate() {
                turn(0, row, head_of(row, head * group + i), scale, &mut normed, out);
            }
        }
        let heads = rows.len() * group;
        let mut scores = Buffer::new(heads * span);
        scores.fill(0.0);
        let mut scratch = [0.0; GROUP * LANES];
        let at = |block: u32| block as usize * kv_heads + head;
        for (i, side) in blocks.chunks(SIDE).enumerate() {
            for d in (0..hd).step_by(GROUP) {
                // The values of these blocks come meanwhile.
                for &block in side {
                    values.fetch((at(block) * vw + d) * BLOCK, GROUP.min(vw - d) * BLOCK);
                }
                let q = Rows { data: &queries[d..], stride: hd };
                let mut k = [Group::F32(&[]); SIDE];
                for (k, &block) in k.iter_mut().zip(side) {
                    // SAFETY: what a sequence has seen is written by now, or by this task.
                    *k = unsafe { keys.group((at(block) * hd + d) * BLOCK, GROUP.min(hd - d)) };
                }
                let scores = &mut scores[i * SIDE * BLOCK..];
                simd::multiply_groups(simd, heads, q, &k[..side.len()], scores, span, BLOCK, &mut scratch);
            }
        }
        let softmax = |(h, scores): (usize, &mut [f32])| {
            let seen = seen(s, rows.start + h / group);
            let seen = seen.start - zero..seen.end - zero;
            // What this row does not see, another one of the tile does.
            scores[..seen.start].fill(0.0);
            scores[seen.end..].fill(0.0);
            let scores = &mut scores[seen];
            if let Some(cap) = softcap {
                simd::softcap(simd, scores, cap as f32);
            }
            simd::softmax(simd, scores)
        };
        let sums: Vec<f32> = scores.chunks_exact_mut(span).enumerate().map(softmax).collect();
        // `[panels][heads][LANES]`
        let (panels, of_panel) = (vw / LANES, heads * LANES);
        let mut acc = Buffer::new(panels * of_panel);
        acc.fill(0.0);
        // What the thread most likely does next.
        let next = tiles.get((task + 1) / kv_heads).map(|(s, rows)| &s.blocks[seen_blocks(s, rows).1]);
        for (i, &block) in blocks.iter().enumerate() {
            // Its keys come meanwhile.
            if let Some(next) = next.and_then(|next| next.get(i)) {
                let at = *next as usize * kv_heads + (task + 1) % kv_heads;
                keys.fetch(at * hd * BLOCK, hd * BLOCK);
            }
            // Slots past the last row's position may hold anything, so they are left out, not multiplied by 0.
            let (from, to) = (first.saturating_sub(i * BLOCK), BLOCK.min(end - i * BLOCK));
            let p = Rows { data: &scores[i * BLOCK + from..], stride: span };
            for panel in (0..panels).step_by(SIDE) {
                let mut v = [Group::F32(&[]); SIDE];
                let side = SIDE.min(panels - panel);
                for (s, v) in v[..side].iter_mut().enumerate() {
                    let first = (at(block) * vw + (panel + s) * LANES) * BLOCK + from * LANES;
                    // SAFETY: likewise.
                    *v = unsafe { values.group(first, to - from) };
                }
                let acc = &mut acc[panel * of_panel..];
                simd::multiply_groups(simd, heads, p, &v[..side], acc, LANES, of_panel, &mut scratch);
            }
        }
        for (panel, acc) in acc.chunks_exact(of_panel).enumerate() {
            for (h, (acc, sum)) in acc.chunks_exact(LANES).zip(&sums).enumerate() {
                let (row, column) = (rows.start + h / group, (head * group + h % group) * hd + panel * LANES);
                // SAFETY: these numbers lie inside the output, and are this task's alone.
                let out = unsafe { target.part(row * q_width + column, LANES.min(hd - panel * LANES)) };
                out.iter_mut().zip(acc).for_each(|(out, acc)| *out = acc / sum);
            }
        }
    });
    out
}

/// [`packed`] for the first layer of a decoder without norms of heads, apart from the decoder: what `benches/kernels.rs` times.
#[doc(hidden)]
pub fn alone(
    config: &ModelConfig,
    simd: Simd,
    rotation: &Rotation,
    sequences: &[SequenceRows],
    qkv: &mut [f32],
    cache: &mut KvCache,
) -> impl Deref<Target = [f32]> + use<> {
    let attention = Attention { config, layer: 0, head_norms: None, rotation, sequences };
    let width = (config.heads + 2 * config.kv_heads) * config.head_dim;
    packed(&attention, simd, (qkv, width), None, &mut cache.layers[0])
}

/// Rows of a sequence that are computed together.
const ROWS: usize = 12;

/// Where tasks write.
struct Target(*mut f32);

// SAFETY: tasks write disjoint parts.
unsafe impl Sync for Target {}

impl Target {
    /// # Safety
    /// There are so many numbers.
    unsafe fn at(&self, first: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(first) }
    }

    /// # Safety
    /// The part lies inside the output, which is alive, and nobody else reads or writes it meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, first: usize, length: usize) -> &mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), length) }
    }
}

/// The same for tensors, on any device.
pub(super) fn tensors(
    attention: &Attention,
    qkv: &Tensor,
    step: &StepTensors,
    cache: &mut LayerCache,
) -> Result<Tensor> {
    let &Attention { config, layer, sequences, .. } = attention;
    let LayerCache::Tensor { keys, values } = cache else { unreachable!("the decoder made its own cache") };
    let (hd, heads, kv_heads) = (config.head_dim, config.heads, config.kv_heads);
    let q = rotated(attention, qkv, step, [keys, values])?;
    let heads = Heads {
        kv_heads,
        group: heads / kv_heads,
        head_dim: hd,
        causal: !config.family.is_encoder(),
        window: config.window(layer),
        scale: config.attention_scale(layer),
        softcap: config.architecture.attention_softcap.map(|cap| cap as f32),
    };
    #[cfg(feature = "flash-attn")]
    if flash::attends(config, q.device(), q.dtype()) {
        return step.flash(sequences, q.device())?.attend(&heads, &q, [keys, values]);
    }
    let op = PagedAttention {
        heads,
        sequences,
        #[cfg(feature = "cuda")]
        tiles: step.tiles(&heads, sequences, &q)?,
    };
    Ok(q.apply_op3_no_bwd(keys, values, &op)?)
}

/// Writes keys and values of the step into the cache and returns the queries, `[rows, heads * head_dim]`: with the norms of
/// heads, and rotated.
fn rotated(attention: &Attention, qkv: &Tensor, step: &StepTensors, [keys, values]: [&Tensor; 2]) -> Result<Tensor> {
    let &Attention { config, ref head_norms, .. } = attention;
    let (hd, heads, kv_heads) = (config.head_dim, config.heads, config.kv_heads);
    let (rows, _) = qkv.dims2()?;
    #[cfg(feature = "cuda")]
    if let Some(device) = fused::tensors::device(qkv) {
        let dtype = qkv.dtype();
        let norms = head_norms.as_ref().map(|[q, k]| Some([q.plain(dtype)?, k.plain(dtype)?]));
        if !matches!(norms, Some(None)) {
            let (norms, half) = (norms.flatten(), attention.rotation.half);
            let eps = norms.map_or(0.0, |[(_, eps), _]| eps);
            let sizes = fused::HeadSizes { heads, kv_heads, head_dim: hd, half, eps };
            let norms = norms.map(|norms| norms.map(|(weight, _)| weight));
            let (rotation, slots) = (step.rotation.as_ref(), &step.slots);
            return Ok(fused::tensors::rotate(device, sizes, qkv, [keys, values], rotation, slots, norms)?);
        }
    }
    let turn = |which: usize, x: Tensor, heads: usize| -> Result<Tensor> {
        let mut x = x.reshape((rows * heads, hd))?;
        if let Some(norms) = head_norms {
            x = norms[which].tensor(&x, heads)?;
        }
        let x = x.reshape((rows, heads, hd))?;
        let Some([cos, sin]) = &step.rotation else { return Ok(x) };
        let turned = 2 * cos.dims()[1];
        let first = x.narrow(2, 0, turned)?.transpose(0, 1)?.unsqueeze(0)?.contiguous()?;
        let first = candle_nn::rotary_emb::rope(&first, cos, sin)?;
        let first = first.squeeze(0)?.transpose(0, 1)?;
        match turned == hd {
            true => Ok(first.contiguous()?),
            false => Ok(Tensor::cat(&[first, x.narrow(2, turned, hd - turned)?], 2)?),
        }
    };
    let q = turn(0, qkv.narrow(1, 0, heads * hd)?, heads)?.reshape((rows, heads * hd))?.contiguous()?;
    let k = turn(1, qkv.narrow(1, heads * hd, kv_heads * hd)?, kv_heads)?.reshape((rows, kv_heads * hd))?;
    let v = qkv.narrow(1, (heads + kv_heads) * hd, kv_heads * hd)?.contiguous()?;
    let slots = step.slots.broadcast_as((rows, kv_heads * hd))?.contiguous()?;
    keys.scatter_set(&slots, &k, 0)?;
    values.scatter_set(&slots, &v, 0)?;
    Ok(q)
}

/// `cap * tanh(x / cap)`.
pub(super) fn softcap(x: &Tensor, cap: f64) -> Result<Tensor> {
    Ok(((x / cap)?.tanh()? * cap)?)
}
