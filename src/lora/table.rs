//! What adapters change of the embedding and of `lm_head`: rows of their own, more tokens, low-rank pairs.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::dora;
use super::packed::{Factor, Vector};
use crate::Result;
use crate::adapter::{LoraPair, OwnRows, TableChange};
use crate::base::products::{self, Batch, Product};
use crate::base::simd::Simd;
use crate::base::{Decoder, DecoderOptions, Module};

/// Rows that take the place of the base's. The embedding and `lm_head` share them where they are the same.
#[derive(Debug, Clone)]
struct Rows {
    /// Whose rows these are, in ascending order; `None` for all tokens.
    tokens: Option<Arc<Vec<u32>>>,
    /// `[tokens, hidden_size]`.
    matrix: Arc<Factor>,
}

impl Rows {
    fn new(own: &OwnRows, width: usize, options: &DecoderOptions) -> Result<Self> {
        let matrix = Factor::new(&own.rows, own.rows.len() / width, width, options, options.format)?;
        Ok(Rows { tokens: own.tokens.clone().map(Arc::new), matrix: Arc::new(matrix) })
    }

    /// The row of a token.
    fn find(&self, token: u32) -> Option<usize> {
        match &self.tokens {
            None => Some(token as usize),
            Some(tokens) => tokens.binary_search(&token).ok(),
        }
    }

    fn bytes(&self) -> usize {
        self.matrix.bytes() + self.tokens.as_ref().map_or(0, |t| 4 * t.len())
    }
}

#[derive(Debug)]
struct Pair {
    a: Factor,
    b: Factor,
    scale: f32,
    gain: Option<Vector>,
    shift: Option<Vector>,
}

impl Pair {
    fn rank(&self) -> usize {
        self.b.packed().k()
    }

    fn bytes(&self) -> usize {
        let vector = |v: &Option<Vector>| v.as_ref().map_or(0, Vector::bytes);
        self.a.bytes() + self.b.bytes() + vector(&self.gain) + vector(&self.shift)
    }

    /// `gain * y + shift` for rows of `width` numbers.
    fn finish(&self, y: &mut [f32], width: usize) {
        finish(&self.gain, &self.shift, y, width, 0);
    }
}

/// `y = gain * y + shift` for the columns from `column` on of rows of `width` numbers.
pub(super) fn finish(gain: &Option<Vector>, shift: &Option<Vector>, y: &mut [f32], width: usize, column: usize) {
    for row in y.chunks_exact_mut(width) {
        let row = &mut row[column..];
        if let Some(gain) = gain {
            row.iter_mut().zip(gain.host()).for_each(|(y, g)| *y *= g);
        }
        if let Some(shift) = shift {
            row.iter_mut().zip(shift.host()).for_each(|(y, s)| *y += s);
        }
    }
}

/// The same for a tensor of just these columns.
pub(super) fn finish_tensor(gain: &Option<Vector>, shift: &Option<Vector>, mut y: Tensor) -> Result<Tensor> {
    if let Some(gain) = gain {
        y = y.broadcast_mul(gain.tensor())?;
    }
    if let Some(shift) = shift {
        y = y.broadcast_add(shift.tensor())?;
    }
    Ok(y)
}

/// The pair's A is `[vocab_size, rank]`: a row a token.
#[derive(Debug)]
pub(super) struct Embedding {
    rows: Option<Rows>,
    pair: Option<Pair>,
}

#[derive(Debug)]
pub(super) struct LmHead {
    rows: Option<Rows>,
    pair: Option<Pair>,
}

/// Memory of both.
pub(super) fn bytes(embedding: &Option<Embedding>, lm_head: &Option<LmHead>) -> usize {
    let embedding_rows = embedding.as_ref().and_then(|e| e.rows.as_ref());
    let head_rows = lm_head.as_ref().and_then(|h| h.rows.as_ref());
    let shared = |rows: &&Rows| embedding_rows.is_some_and(|e| Arc::ptr_eq(&e.matrix, &rows.matrix));
    let rows = embedding_rows.into_iter().chain(head_rows.filter(|rows| !shared(rows))).map(Rows::bytes);
    let pairs = [embedding.as_ref().and_then(|e| e.pair.as_ref()), lm_head.as_ref().and_then(|h| h.pair.as_ref())];
    rows.sum::<usize>() + pairs.into_iter().flatten().map(Pair::bytes).sum::<usize>()
}

/// Packs the changes of both tables for a vocabulary of `vocab_size` tokens.
pub(super) fn pack(
    embedding: TableChange,
    lm_head: TableChange,
    vocab_size: usize,
    base: &Decoder,
) -> Result<(Option<Embedding>, Option<LmHead>)> {
    let (width, options) = (base.config().hidden_size, base.options());
    let vector = |numbers: Option<Vec<f32>>| numbers.map(|v| Vector::new(v, options)).transpose();

    let factor = |rows: &[f32], n: usize, k: usize| Factor::new(rows, n, k, options, options.format);
    // The base's tables are large: one is in memory at a time.
    let (own, gain) = {
        let weights = Served::new(&embedding, Module::Embedding, base)?;
        let own = embedding.rows.and_then(|rows| weights.differing(rows, width));
        let gain = match &embedding.pair {
            Some(pair) => dora::embedding_gains(&weights.changed(&own, vocab_size, width), pair)
                .map_err(|e| e.context("model.embed_tokens"))?,
            None => None,
        };
        (own, gain)
    };
    let rows = own.as_ref().map(|own| Rows::new(own, width, options)).transpose()?;
    let pair = |LoraPair { rank, scale, a, b, .. }: LoraPair| -> Result<Pair> {
        let by_token: Vec<f32> =
            (0..vocab_size).flat_map(|t| (0..rank).map(move |r| (t, r))).map(|(t, r)| a[r * vocab_size + t]).collect();
        let (a, b) = (factor(&by_token, vocab_size, rank)?, factor(&b, width, rank)?);
        Ok(Pair { a, b, scale, gain: vector(gain)?, shift: None })
    };
    let pair = embedding.pair.map(pair).transpose()?;
    let embedding = (rows.is_some() || pair.is_some()).then_some(Embedding { rows, pair });

    let (own_head, gain) = {
        let weights = Served::new(&lm_head, Module::LmHead, base)?;
        let own_head = lm_head.rows.and_then(|rows| weights.differing(rows, width));
        let gain = match &lm_head.pair {
            Some(pair) => {
                dora::gains(&weights.changed(&own_head, vocab_size, width), pair).map_err(|e| e.context("lm_head"))?
            }
            None => None,
        };
        (own_head, gain)
    };
    let rows = match (&own_head, &embedding) {
        (Some(head), Some(Embedding { rows: Some(rows), .. })) if own.as_ref() == Some(head) => Some(rows.clone()),
        (Some(head), _) => Some(Rows::new(head, width, options)?),
        (None, _) => None,
    };
    let pair = |LoraPair { rank, scale, a, b, bias, .. }: LoraPair| -> Result<Pair> {
        let (a, b) = (factor(&a, rank, width)?, factor(&b, vocab_size, rank)?);
        let shift = bias.map(|bias| bias.iter().map(|b| scale * b).collect());
        Ok(Pair { a, b, scale, gain: vector(gain)?, shift: vector(shift)? })
    };
    let pair = lm_head.pair.map(pair).transpose()?;
    let lm_head = (rows.is_some() || pair.is_some()).then_some(LmHead { rows, pair });
    Ok((embedding, lm_head))
}

/// The base's rows of a table, read only where something depends on them.
struct Served(Vec<f32>);

impl Served {
    fn new(change: &TableChange, module: Module, base: &Decoder) -> Result<Self> {
        let needed = change.rows.is_some() || change.pair.as_ref().is_some_and(|p| p.magnitude.is_some());
        Ok(Served(if needed { base.weights(module)? } else { vec![] }))
    }

    /// The rows that are not the base's anyway: PEFT saves a whole embedding for one new token. All of them where most
    /// differ.
    fn differing(&self, own: OwnRows, width: usize) -> Option<OwnRows> {
        let token = |i: usize| own.tokens.as_ref().map_or(i as u32, |tokens| tokens[i]);
        let rows = own.rows.chunks_exact(width).enumerate().map(|(i, row)| (token(i), row));
        let kept: Vec<(u32, &[f32])> =
            rows.filter(|&(t, row)| self.0.get(t as usize * width..(t as usize + 1) * width) != Some(row)).collect();
        if kept.is_empty() {
            return None;
        }
        if own.tokens.is_none() && 2 * kept.len() > own.rows.len() / width {
            return Some(own);
        }
        let (tokens, rows): (Vec<u32>, Vec<&[f32]>) = kept.into_iter().unzip();
        Some(OwnRows { tokens: Some(tokens), rows: rows.concat() })
    }

    /// All rows with the adapter's own in place.
    fn changed(self, own: &Option<OwnRows>, vocab_size: usize, width: usize) -> Vec<f32> {
        let mut all = self.0;
        all.resize(vocab_size * width, 0.0);
        if let Some(own) = own {
            for (i, row) in own.rows.chunks_exact(width).enumerate() {
                let token = own.tokens.as_ref().map_or(i, |tokens| tokens[i] as usize);
                all[token * width..][..width].copy_from_slice(row);
            }
        }
        all
    }
}

/// Embeddings `x`, `[rows, width]`, of all `tokens`; the base's are there already.
pub(super) fn embed(simd: Simd, changes: &[(&Range<usize>, &Embedding)], tokens: &[u32], x: &mut [f32]) {
    let width = x.len() / tokens.len();
    for (rows, change) in changes {
        let Some(own) = &change.rows else { continue };
        for row in (*rows).clone() {
            if let Some(found) = own.find(tokens[row]) {
                own.matrix.packed().row(found, &mut x[row * width..][..width]);
            }
        }
    }
    let pairs: Vec<_> = changes.iter().filter_map(|(rows, change)| Some((*rows, change.pair.as_ref()?))).collect();
    let Some(rank) = pairs.iter().map(|(_, pair)| pair.rank()).max() else { return };
    let mut h = vec![0.0; tokens.len() * rank];
    for (rows, pair) in &pairs {
        for row in (*rows).clone() {
            pair.a.packed().row(tokens[row] as usize, &mut h[row * rank..][..pair.rank()]);
        }
    }
    add(simd, (&h, rank), (x, width), pairs.iter().map(|&(rows, pair)| (rows, &pair.b, pair.scale)));
    for (rows, pair) in pairs {
        pair.finish(&mut x[rows.start * width..rows.end * width], width);
    }
}

pub(super) fn embed_tensor(changes: &[(&Range<usize>, &Embedding)], tokens: &[u32], mut x: Tensor) -> Result<Tensor> {
    let (width, device) = (x.dims()[1], x.device().clone());
    let index = |numbers: Vec<u32>| Tensor::new(numbers, &device);
    for (rows, change) in changes {
        if let Some(own) = &change.rows {
            let found = (*rows).clone().filter_map(|row| Some((row as u32, own.find(tokens[row])? as u32)));
            let (places, found): (Vec<u32>, Vec<u32>) = found.unzip();
            if !places.is_empty() {
                let places = index(places)?.unsqueeze(1)?.broadcast_as((found.len(), width))?.contiguous()?;
                x = x.scatter(&places, &own.matrix.tensor().index_select(&index(found)?, 0)?, 0)?;
            }
        }
        if let Some(pair) = &change.pair {
            let h = pair.a.tensor().index_select(&index(tokens[(*rows).clone()].to_vec())?, 0)?;
            let delta = (h.matmul(&pair.b.tensor().t()?)? * pair.scale as f64)?;
            let changed = finish_tensor(&pair.gain, &pair.shift, (x.narrow(0, rows.start, rows.len())? + delta)?)?;
            x = x.slice_assign(&[(*rows).clone(), 0..width], &changed)?;
        }
    }
    Ok(x)
}

impl LmHead {
    /// Whether no row of the base is left.
    pub fn is_whole(&self) -> bool {
        self.rows.as_ref().is_some_and(|rows| rows.tokens.is_none())
    }
}

/// Logits `y`, `[rows, width]`, of final states `x`, `[rows, hidden_size]`. Those of a whole head begin with 0, the
/// others' with the base's.
pub(super) fn logits(simd: Simd, changes: &[(&Range<usize>, &LmHead)], x: &[f32], y: &mut [f32], rows: usize) {
    let (k, width) = (x.len() / rows, y.len() / rows);
    let own: Vec<_> = changes.iter().filter_map(|(rows, change)| Some((*rows, change.rows.as_ref()?))).collect();
    let (part, whole): (Vec<_>, Vec<_>) = own.into_iter().partition(|(_, own)| own.tokens.is_some());
    add(simd, (x, k), (y, width), whole.iter().map(|&(rows, own)| (rows, &*own.matrix, 1.0)));

    if let Some(most) = part.iter().map(|(_, own)| own.matrix.n()).max() {
        let mut some = vec![0.0; rows * most];
        add(simd, (x, k), (&mut some, most), part.iter().map(|&(rows, own)| (rows, &*own.matrix, 1.0)));
        for (rows, own) in part {
            for row in rows.clone() {
                for (i, &token) in own.tokens.iter().flat_map(|tokens| tokens.iter().enumerate()) {
                    y[row * width + token as usize] = some[row * most + i];
                }
            }
        }
    }

    let pairs: Vec<_> = changes.iter().filter_map(|(rows, change)| Some((*rows, change.pair.as_ref()?))).collect();
    let Some(rank) = pairs.iter().map(|(_, pair)| pair.rank()).max() else { return };
    let mut h = vec![0.0; rows * rank];
    add(simd, (x, k), (&mut h, rank), pairs.iter().map(|&(rows, pair)| (rows, &pair.a, 1.0)));
    add(simd, (&h, rank), (y, width), pairs.iter().map(|&(rows, pair)| (rows, &pair.b, pair.scale)));
    for (rows, pair) in pairs {
        pair.finish(&mut y[rows.start * width..rows.end * width], width);
    }
}

pub(super) fn logits_tensor(changes: &[(&Range<usize>, &LmHead)], x: &Tensor, mut y: Tensor) -> Result<Tensor> {
    for (rows, change) in changes {
        let (x, mut part) = (x.narrow(0, rows.start, rows.len())?, y.narrow(0, rows.start, rows.len())?);
        if let Some(own) = &change.rows {
            let own_logits = x.matmul(&own.matrix.tensor().t()?)?;
            part = match &own.tokens {
                None => part.slice_assign(&[0..rows.len(), 0..own.matrix.n()], &own_logits)?,
                Some(tokens) => {
                    let index = Tensor::new(tokens.as_slice(), x.device())?.unsqueeze(0)?;
                    let index = index.broadcast_as((rows.len(), tokens.len()))?.contiguous()?;
                    part.contiguous()?.scatter(&index, &own_logits, 1)?
                }
            };
        }
        if let Some(pair) = &change.pair {
            let h = x.matmul(&pair.a.tensor().t()?)?;
            let delta = (h.matmul(&pair.b.tensor().t()?)? * pair.scale as f64)?;
            let n = pair.b.n();
            let changed = finish_tensor(&pair.gain, &pair.shift, (part.narrow(1, 0, n)? + delta)?)?;
            part = part.slice_assign(&[0..rows.len(), 0..n], &changed)?;
        }
        let width = y.dims()[1];
        y = y.slice_assign(&[(*rows).clone(), 0..width], &part)?;
    }
    Ok(y)
}

/// `y += scale * x Wᵀ` for the rows of each matrix; `x` and `y` with the width of their rows.
fn add<'a>(
    simd: Simd,
    (x, width): (&[f32], usize),
    (y, y_stride): (&mut [f32], usize),
    list: impl Iterator<Item = (&'a Range<usize>, &'a Factor, f32)>,
) {
    let product = |(rows, factor, scale): (&Range<usize>, &'a Factor, f32)| Product {
        matrix: factor.packed(),
        rows: rows.clone(),
        x_column: 0,
        y_column: 0,
        scale,
    };
    let products: Vec<_> = list.map(product).collect();
    products::multiply(simd, x, width, Batch { products: &products, y, y_stride, add: true });
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::adapter::{Adapter, Generation};
    use crate::base::testing::{decoder, noise, options};
    use crate::base::{Delta, Kernels, ModelConfig};
    use crate::lora::{BatchDelta, PackedAdapter, Segment};

    fn config(vocab_size: usize, hidden_size: usize, tied: bool) -> ModelConfig {
        ModelConfig {
            vocab_size,
            hidden_size,
            tie_word_embeddings: tied,
            predicts: true,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            intermediate_size: 1,
            ..crate::adapter::testing::tiny()
        }
    }

    /// What a table of an adapter is to have.
    #[derive(Debug, Clone)]
    struct Wish {
        /// Rows of its own: none, all, or those of some tokens.
        rows: u8,
        rank: Option<usize>,
        magnitude: bool,
        bias: bool,
    }

    fn wish() -> impl Strategy<Value = Wish> {
        let fields = (0u8..3, prop::option::of(1usize..20), any::<bool>(), any::<bool>());
        fields.prop_map(|(rows, rank, magnitude, bias)| Wish { rows, rank, magnitude, bias })
    }

    /// All rows of a changed table, `[vocab][width]`, before the pair.
    fn changed(base: &[f32], change: &TableChange, vocab: usize, width: usize) -> Vec<Vec<f64>> {
        let mut all: Vec<Vec<f64>> = base.chunks(width).map(|r| r.iter().map(|&x| x as f64).collect()).collect();
        all.resize(vocab, vec![0.0; width]);
        if let Some(own) = &change.rows {
            for (i, row) in own.rows.chunks(width).enumerate() {
                let token = own.tokens.as_ref().map_or(i, |t| t[i] as usize);
                all[token] = row.iter().map(|&x| x as f64).collect();
            }
        }
        all
    }

    /// `scale * B A` at an output and an input.
    fn product(pair: &LoraPair, inputs: usize, j: usize, i: usize) -> f64 {
        let terms = (0..pair.rank).map(|r| pair.b[j * pair.rank + r] as f64 * pair.a[r * inputs + i] as f64);
        pair.scale as f64 * terms.sum::<f64>()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn equals_the_plain_formula(
            (vocab, width, tied) in (2usize..50, 1usize..50, any::<bool>()),
            // Rows without an adapter before each segment, rows of the segment, its vocabulary against the base's, and
            // both tables.
            segments in prop::collection::vec((0usize..3, 1usize..5, -1isize..4, wish(), wish()), 1..5),
            seed in any::<u64>(),
        ) {
            let config = config(vocab, width, tied);
            let mut next = noise(seed);
            let mut numbers = |n: usize| -> Vec<f32> { (0..n).map(|_| next()).collect() };
            let mut adapters = vec![];
            for (number, (_, _, more, embedding, lm_head)) in segments.iter().enumerate() {
                let own = vocab.saturating_add_signed(*more);
                let mut change = |wish: &Wish, outputs: usize, inputs: usize, bias: bool| {
                    // Every second row of the base's, and all that the base has not.
                    let tokens: Vec<u32> = (0..own as u32).filter(|t| t % 2 == 0 || *t as usize >= vocab).collect();
                    let rows = match wish.rows {
                        0 if own <= vocab => None,
                        1 => Some(OwnRows { tokens: None, rows: numbers(own * width) }),
                        _ => Some(OwnRows { rows: numbers(tokens.len() * width), tokens: Some(tokens) }),
                    };
                    let pair = wish.rank.map(|rank| LoraPair {
                        rank,
                        scale: 1.5,
                        a: numbers(rank * inputs),
                        b: numbers(rank * outputs),
                        bias: (bias && wish.bias).then(|| numbers(outputs)),
                        // A sum of few squares may be almost nothing, and a quotient by that is noise in f32.
                        magnitude: (wish.magnitude && inputs >= 8).then(|| numbers(outputs)),
                    });
                    TableChange { rows, pair }
                };
                let (embedding, lm_head) = (change(embedding, width, own, false), change(lm_head, own, width, true));
                let generation = Generation::new(number.to_string());
                adapters.push(Adapter { vocab_size: Some(own), embedding, lm_head, ..Adapter::new(generation) });
            }
            let (mut rows, mut ranges) = (0, vec![]);
            for &(gap, len, ..) in &segments {
                ranges.push(rows + gap..rows + gap + len);
                rows += gap + len;
            }
            let of_row = |row: usize| ranges.iter().position(|r| r.contains(&row)).map(|i| &adapters[i]);
            let known = |row: usize| of_row(row).and_then(|a| a.vocab_size).unwrap_or(vocab);
            let tokens: Vec<u32> = (0..rows).map(|row| ((row * 7 + seed as usize % 11) % known(row)) as u32).collect();
            let x = numbers(rows * width);
            for kernels in Simd::all().into_iter().map(Kernels::Packed).chain([Kernels::Tensor]) {
                let base = decoder(&config, options(kernels), seed);
                let packed: Vec<_> = adapters.iter().map(|a| PackedAdapter::new(a.clone(), &base).unwrap()).collect();
                let simd = if let Kernels::Packed(simd) = kernels { simd } else { Simd::Portable };
                let parts = ranges.iter().zip(&packed).map(|(r, adapter)| Segment { rows: r.clone(), adapter });
                let delta = BatchDelta::new(simd, parts.collect());
                let close = |got: f32, want: f64| (got as f64 - want).abs() <= 3e-4 * (1.0 + want.abs());

                let served = base.weights(Module::Embedding).unwrap();
                let mut embedded = vec![0.0; rows * width];
                for (row, &token) in tokens.iter().enumerate().filter(|(_, t)| (**t as usize) < vocab) {
                    embedded[row * width..][..width].copy_from_slice(&served[token as usize * width..][..width]);
                }
                match kernels {
                    Kernels::Packed(_) => delta.embed(&tokens, &mut embedded),
                    Kernels::Tensor => {
                        let x = Tensor::from_slice(&embedded, (rows, width), &Device::Cpu).unwrap();
                        embedded = delta.embed_tensor(&tokens, x).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                    }
                }
                for row in 0..rows {
                    let token = tokens[row] as usize;
                    let none = TableChange::default();
                    let change = of_row(row).map_or(&none, |a| &a.embedding);
                    let all = changed(&served, change, known(row), width);
                    for j in 0..width {
                        let pair = change.pair.as_ref();
                        let at = |t: usize| all[t][j] + pair.map_or(0.0, |p| product(p, known(row), j, t));
                        let gain = pair.and_then(|p| p.magnitude.as_ref()).map_or(1.0, |m| {
                            m[j] as f64 / (0..known(row)).map(|t| at(t) * at(t)).sum::<f64>().sqrt()
                        });
                        let (got, want) = (embedded[row * width + j], gain * at(token));
                        prop_assert!(close(got, want), "{kernels:?} embedding of row {row}: {got} {want}");
                    }
                }

                let served = base.weights(Module::LmHead).unwrap();
                let states = crate::base::Rows::from_f32(&x, width, base.options()).unwrap();
                let logits = base.logits(&states, &delta).unwrap().into_f32().unwrap();
                let stride = logits.len() / rows;
                for row in 0..rows {
                    let none = TableChange::default();
                    let change = of_row(row).map_or(&none, |a| &a.lm_head);
                    let all = changed(&served, change, known(row), width);
                    for (t, own) in all.iter().enumerate().take(known(row)) {
                        let pair = change.pair.as_ref();
                        let weight = |i: usize| own[i] + pair.map_or(0.0, |p| product(p, width, t, i));
                        let gain = pair.and_then(|p| p.magnitude.as_ref()).map_or(1.0, |m| {
                            m[t] as f64 / (0..width).map(|i| weight(i) * weight(i)).sum::<f64>().sqrt()
                        });
                        let shift = pair.and_then(|p| p.bias.as_ref()).map_or(0.0, |b| 1.5 * b[t] as f64);
                        let sum: f64 = (0..width).map(|i| weight(i) * x[row * width + i] as f64).sum();
                        let (got, want) = (logits[row * stride + t], gain * sum + shift);
                        prop_assert!(close(got, want), "{kernels:?} logit {t} of row {row}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_are_the_bases_take_no_memory_and_equal_tables_are_held_once() {
        let (vocab, width) = (20, 16);
        for kernels in [Kernels::for_device(&Device::Cpu), Kernels::Tensor] {
            let base = decoder(&config(vocab, width, true), options(kernels), 3);
            let mut rows = base.weights(Module::Embedding).unwrap();
            let bytes = |rows: &[f32], both: bool| {
                let table = || TableChange { rows: Some(OwnRows { tokens: None, rows: rows.to_vec() }), pair: None };
                let lm_head = if both { table() } else { TableChange::default() };
                let own = Some(rows.len() / width);
                let adapter =
                    Adapter { vocab_size: own, embedding: table(), lm_head, ..Adapter::new(Generation::new("g")) };
                PackedAdapter::new(adapter, &base).unwrap().bytes
            };
            assert_eq!(bytes(&rows, true), 0);
            rows[5] += 1.0;
            rows.extend_from_slice(&[0.1; 16]);
            let some = bytes(&rows, false);
            // In f32, in whole panels on the CPU.
            assert!((1..=16 * width * 4 + 8).contains(&some), "{some}");
            assert_eq!(bytes(&rows, true), some);
            rows.iter_mut().for_each(|x| *x += 0.1);
            assert!(bytes(&rows, true) >= 21 * width * 4);
        }
    }
}
