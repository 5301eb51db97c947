//! The real model behind the engine: the base decoder, the KV cache, and the adapters of each step.

use std::ops::Range;
use std::sync::Arc;

use crate::base::simd::Simd;
use crate::base::{BLOCK, Decoder, Head, Kernels, KvCache, SequenceRows};
use crate::engine::{Model, Output, Work};
use crate::lora::{BatchDelta, Segment};
use crate::{Error, Result};

/// A decoder with its KV cache.
pub struct Runner {
    decoder: Arc<Decoder>,
    cache: KvCache,
    simd: Simd,
    /// The base's own.
    head: Option<Arc<Head>>,
}

impl Runner {
    /// With a KV cache of `kv_bytes`.
    pub fn new(decoder: impl Into<Arc<Decoder>>, kv_bytes: usize) -> Result<Self> {
        let decoder = decoder.into();
        let cache = decoder.cache(kv_bytes)?;
        let simd = match decoder.options().kernels {
            Kernels::Packed(simd) => simd,
            Kernels::Tensor => Simd::detect(),
        };
        Ok(Runner { decoder, cache, simd, head: None })
    }

    /// With the head of a base that is itself a classification.
    pub fn with_head(self, head: Option<Arc<Head>>) -> Self {
        Runner { head, ..self }
    }
}

impl Model for Runner {
    fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    fn classes(&self) -> usize {
        self.head.as_ref().map_or(0, |head| head.labels.len())
    }

    fn predicts(&self) -> bool {
        self.decoder.config().predicts
    }

    fn is_encoder(&self) -> bool {
        self.decoder.config().family.is_encoder()
    }

    fn context(&self) -> usize {
        self.decoder.config().context
    }

    fn block_size(&self) -> usize {
        BLOCK
    }

    fn blocks(&self) -> usize {
        self.cache.blocks()
    }

    fn step(&mut self, work: &[Work]) -> Result<Vec<Vec<f32>>> {
        let hidden = self.decoder.config().hidden_size;
        let base_vocab = self.vocab_size();
        let vocab = |w: &Work| w.adapter.as_ref().map_or(base_vocab, |a| a.vocab_size);
        // Rows of one adapter side by side, so that they are one segment of the delta.
        let mut order: Vec<usize> = (0..work.len()).collect();
        order.sort_by_key(|&i| work[i].adapter.as_ref().map(|a| &a.generation));

        let mut tokens = Vec::new();
        let mut sequences = Vec::with_capacity(work.len());
        let mut segments: Vec<Segment> = Vec::new();
        // Rows whose final state is wanted, and each work's share of them.
        let mut wanted = Vec::new();
        let mut share: Vec<Range<usize>> = vec![0..0; work.len()];
        for &i in &order {
            let w = &work[i];
            let rows = tokens.len()..tokens.len() + w.tokens.len();
            if let Some(token) = w.tokens.iter().find(|&&t| t as usize >= vocab(w)) {
                return Err(Error::internal(format!("token {token} is outside the vocabulary of {}", vocab(w))));
            }
            tokens.extend_from_slice(&w.tokens);
            append(&mut segments, rows.clone(), w);
            let count = match w.output {
                Output::None => 0,
                Output::LastLogits | Output::Head => 1,
                Output::Logits(n) => n.min(rows.len()),
            };
            share[i] = wanted.len()..wanted.len() + count;
            match w.output {
                // An encoder's first token stands for the sequence.
                Output::Head if self.is_encoder() => wanted.push(rows.start),
                _ => wanted.extend(rows.end - count..rows.end),
            }
            sequences.push(SequenceRows { rows, start: w.start, blocks: &w.blocks });
        }

        let delta = BatchDelta::new(self.simd, segments);
        let states = self.decoder.forward(&tokens, &sequences, &mut self.cache, &delta, &wanted)?;

        // States of rows for the output layer or for the heads, in the same order; where each work's begin; their adapters.
        let gather = |wanted: &dyn Fn(Output) -> bool| {
            let (mut gathered, mut segments, mut places) = (Vec::new(), Vec::new(), vec![0; work.len()]);
            for &i in order.iter().filter(|&&i| wanted(work[i].output)) {
                places[i] = gathered.len() / hidden;
                gathered.extend_from_slice(&states[share[i].start * hidden..share[i].end * hidden]);
                append(&mut segments, places[i]..gathered.len() / hidden, &work[i]);
            }
            (gathered, places, BatchDelta::new(self.simd, segments))
        };
        let (gathered, places, delta) = gather(&|o| matches!(o, Output::LastLogits | Output::Logits(_)));
        let rows = gathered.len() / hidden;
        let logits = if rows == 0 { vec![] } else { self.decoder.logits(&gathered, &delta)? };
        let (gathered, heads, delta) = gather(&|o| o == Output::Head);
        let pooled = if gathered.is_empty() { gathered } else { self.decoder.pooled(gathered, &delta)? };
        let width = logits.len() / rows.max(1);
        let outputs = work.iter().enumerate().map(|(i, w)| match w.output {
            Output::None => Ok(vec![]),
            Output::LastLogits | Output::Logits(_) => {
                let rows = logits[places[i] * width..][..share[i].len() * width].chunks_exact(width.max(1));
                let mut own = Vec::with_capacity(share[i].len() * vocab(w));
                rows.for_each(|row| own.extend_from_slice(&row[..vocab(w)]));
                Ok(own)
            }
            Output::Head => {
                let head = w.adapter.as_ref().and_then(|a| a.head()).or(self.head.as_deref());
                let head = head.ok_or_else(|| Error::internal("classification without a head"))?;
                Ok(head.logits(&pooled[heads[i] * hidden..][..hidden]))
            }
        });
        outputs.collect()
    }
}

/// Adds the rows of a work to its adapter's segment, or begins one.
fn append<'a>(segments: &mut Vec<Segment<'a>>, rows: Range<usize>, work: &'a Work) {
    let Some(adapter) = &work.adapter else { return };
    match segments.last_mut() {
        Some(s) if s.rows.end == rows.start && s.adapter.generation == adapter.generation => s.rows.end = rows.end,
        _ if rows.is_empty() => {}
        _ => segments.push(Segment { rows, adapter }),
    }
}
