//! The real model behind the engine: the base decoder, the KV cache, and the adapters of each step.

use std::ops::Range;
use std::sync::Arc;

use candle_core::DType;

use crate::base::parallel;
use crate::base::simd::Simd;
use crate::base::{Decoder, Head, Kernels, KvCache, Rows, SequenceRows};
use crate::engine::draws::{self, Row};
use crate::engine::{Computed, Draw, Model, Output, Work};
use crate::lora::{BatchDelta, Segment};
use crate::{Error, Result};

/// Logits whose memory is kept for the next step. More are of a whole prompt, which few ask for.
const KEPT_LOGITS: usize = 1 << 23;

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
        self.decoder.kv_block_size()
    }

    fn blocks(&self) -> usize {
        self.cache.blocks()
    }

    fn step(&mut self, work: &[Work]) -> Result<Vec<Vec<f32>>> {
        self.step_and_draw(work, &vec![None; work.len()])?.into_iter().map(Computed::into_numbers).collect()
    }

    /// Packed kernels have the logits where the engine wants them.
    fn draws(&self) -> bool {
        self.decoder.options().kernels == Kernels::Tensor
    }

    fn step_and_draw(&mut self, work: &[Work], draws: &[Option<Draw>]) -> Result<Vec<Computed>> {
        let hidden = self.decoder.config().hidden_size;
        let base_vocab = self.vocab_size();
        let vocab = |w: &Work| w.adapter.as_ref().map_or(base_vocab, |a| a.vocab_size);
        // Rows of one adapter side by side, so that they are one segment of the delta.
        let mut order: Vec<usize> = (0..work.len()).collect();
        order.sort_by_key(|&i| work[i].adapter.as_ref().map(|a| &a.generation));

        let blocks: Vec<_> = work.iter().map(|w| self.decoder.blocks(&w.blocks)).collect();
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
            sequences.push(SequenceRows { rows, start: w.start, blocks: &blocks[i] });
        }

        let delta = BatchDelta::new(self.simd, segments);
        let states = self.decoder.forward(&tokens, &sequences, &mut self.cache, &delta, &wanted)?;

        // Rows of states of some works, in the order of the segments; where each work's begin; their adapters.
        let gather = |wanted: &dyn Fn(Output) -> bool| {
            let (mut rows, mut segments, mut places) = (Vec::new(), Vec::new(), vec![0; work.len()]);
            for &i in order.iter().filter(|&&i| wanted(work[i].output)) {
                places[i] = rows.len();
                rows.extend(share[i].clone());
                append(&mut segments, places[i]..rows.len(), &work[i]);
            }
            (rows, places, BatchDelta::new(self.simd, segments))
        };
        let mut computed: Vec<Computed> = work.iter().map(|_| Computed::Numbers(vec![])).collect();
        let wants_logits = |o| matches!(o, Output::LastLogits | Output::Logits(_));
        let (rows, places, delta) = gather(&wants_logits);
        if !rows.is_empty() {
            let logits = self.decoder.logits(&states.select(&rows)?, &delta)?;
            let own = |i: usize| places[i]..places[i] + share[i].len();
            let of_logits = order.iter().copied().filter(|&i| wants_logits(work[i].output));
            let (drawn, asked): (Vec<usize>, Vec<usize>) = of_logits.partition(|&i| draws[i].is_some());
            let row = |&i: &usize| Some(Row { row: places[i], vocab: vocab(&work[i]), draw: draws[i].as_ref()? });
            let wanted: Vec<Row> = drawn.iter().filter_map(row).collect();
            let device = match &logits {
                Rows::Device(logits) => Some(logits.clone()),
                Rows::Host { .. } => None,
            };
            let numbers = match (wanted.is_empty(), asked.is_empty()) {
                (true, _) => logits.into_buffer()?,
                (false, true) => vec![].into(),
                (false, false) => {
                    logits.select(&asked.iter().flat_map(|&i| own(i)).collect::<Vec<_>>())?.into_buffer()?
                }
            };
            let width = numbers.len() / asked.iter().map(|&i| share[i].len()).sum::<usize>().max(1);
            let mut rows = numbers.chunks_exact(width.max(1));
            // Memory from this thread, whose allocator keeps it for the next step; written by all.
            let copies = asked.iter().map(|&i| {
                let (count, vocab) = (share[i].len(), vocab(&work[i]));
                (rows.by_ref().take(count).collect::<Vec<_>>(), vocab, Vec::with_capacity(count * vocab))
            });
            let copies = parallel::map(copies.collect(), |(rows, vocab, mut own): (Vec<&[f32]>, usize, Vec<f32>)| {
                rows.into_iter().for_each(|row| own.extend_from_slice(&row[..vocab]));
                own
            });
            for (&i, own) in asked.iter().zip(copies) {
                computed[i] = Computed::Numbers(own);
            }
            if numbers.len() > KEPT_LOGITS {
                drop(Vec::<f32>::from(numbers));
            }
            if !wanted.is_empty() {
                let logits = device.ok_or_else(|| Error::internal("a draw that the model cannot make"))?;
                // A copy, or memory of nobody else by now: drawing overwrites it.
                let tokens = draws::draw_tokens(&logits.to_dtype(DType::F32)?.contiguous()?, &wanted)?;
                drawn.into_iter().zip(tokens).for_each(|(i, token)| computed[i] = Computed::Token(token));
            }
        }
        let (rows, places, delta) = gather(&|o| o == Output::Head);
        if !rows.is_empty() {
            let pooled = self.decoder.pooled(states.select(&rows)?, &delta)?;
            for (i, w) in work.iter().enumerate().filter(|(_, w)| w.output == Output::Head) {
                let head = w.adapter.as_ref().and_then(|a| a.head()).or(self.head.as_deref());
                let head = head.ok_or_else(|| Error::internal("classification without a head"))?;
                computed[i] = Computed::Numbers(head.logits(&pooled[places[i] * hidden..][..hidden]));
            }
        }
        Ok(computed)
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
