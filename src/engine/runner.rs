//! The real model behind the engine: the base decoder, the KV cache, and the adapters of each step.

use std::ops::Range;

use crate::base::simd::Simd;
use crate::base::{BLOCK, Decoder, Kernels, KvCache, SequenceRows};
use crate::engine::{Model, Output, Work};
use crate::lora::{BatchDelta, Segment};
use crate::{Error, Result};

/// A decoder with its KV cache.
pub struct Runner {
    decoder: Decoder,
    cache: KvCache,
    simd: Simd,
}

impl Runner {
    /// With a KV cache of `kv_bytes`.
    pub fn new(decoder: Decoder, kv_bytes: usize) -> Result<Self> {
        let cache = decoder.cache(kv_bytes)?;
        let simd = match decoder.options().kernels {
            Kernels::Packed(simd) => simd,
            Kernels::Tensor => Simd::detect(),
        };
        Ok(Runner { decoder, cache, simd })
    }
}

impl Model for Runner {
    fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
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
        // On a thread of the pool: its parallel regions then start without waking another thread for each.
        rayon::scope(|_| self.compute(work))
    }
}

impl Runner {
    fn compute(&mut self, work: &[Work]) -> Result<Vec<Vec<f32>>> {
        let (vocab, hidden) = (self.vocab_size(), self.decoder.config().hidden_size);
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
            if let Some(token) = w.tokens.iter().find(|&&t| t as usize >= vocab) {
                return Err(Error::internal(format!("token {token} is outside the vocabulary of {vocab}")));
            }
            tokens.extend_from_slice(&w.tokens);
            if let Some(adapter) = &w.adapter {
                match segments.last_mut() {
                    Some(s) if s.rows.end == rows.start && s.adapter.generation == adapter.generation => {
                        s.rows.end = rows.end
                    }
                    _ => segments.push(Segment { rows: rows.clone(), adapter }),
                }
            }
            let count = match w.output {
                Output::None => 0,
                Output::LastLogits | Output::Head => 1,
                Output::Logits(n) => n.min(rows.len()),
            };
            share[i] = wanted.len()..wanted.len() + count;
            wanted.extend(rows.end - count..rows.end);
            sequences.push(SequenceRows { rows, start: w.start, blocks: &w.blocks });
        }

        let delta = BatchDelta::new(self.simd, segments);
        let states = self.decoder.forward(&tokens, &sequences, &mut self.cache, &delta, &wanted)?;
        let state = |row: usize| &states[row * hidden..][..hidden];

        let is_logits = |w: &Work| matches!(w.output, Output::LastLogits | Output::Logits(_));
        let rows: Vec<usize> =
            (0..work.len()).filter(|&i| is_logits(&work[i])).flat_map(|i| share[i].clone()).collect();
        let gathered: Vec<f32> = rows.iter().flat_map(|&row| state(row)).copied().collect();
        let logits = if rows.is_empty() { vec![] } else { self.decoder.logits(&gathered)? };
        let mut logits = logits.as_slice();
        let outputs = work.iter().zip(&share).map(|(w, share)| match w.output {
            Output::None => Ok(vec![]),
            Output::LastLogits | Output::Logits(_) => {
                let (own, rest) = logits.split_at(share.len() * vocab);
                logits = rest;
                Ok(own.to_vec())
            }
            Output::Head => {
                let adapter = w.adapter.as_ref();
                let head = adapter.and_then(|a| a.classify(state(share.start)));
                head.ok_or_else(|| Error::internal("classification without a head"))
            }
        });
        outputs.collect()
    }
}
