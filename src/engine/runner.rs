//! The real model behind the engine: the base decoder, the KV cache, and the adapters of each step.

use std::ops::Range;
use std::sync::Arc;

use crate::base::buffer::Buffer;
use crate::base::parallel;
use crate::base::simd::Simd;
use crate::base::{Decoder, Head, Kernels, KvCache, Rows, SequenceRows};
use crate::engine::draws::{self, Row};
use crate::engine::{Computed, Draw, Model, Output, Work};
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
        self.decoder.kv_block_size()
    }

    fn blocks(&self) -> usize {
        self.cache.blocks()
    }

    fn step(&mut self, work: &[Work]) -> Result<Vec<Vec<f32>>> {
        self.step_and_draw(work, &vec![None; work.len()])?.into_iter().map(Computed::into_numbers).collect()
    }

    fn draws(&self) -> bool {
        true
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
            let of_logits = order.iter().copied().filter(|&i| wants_logits(work[i].output));
            let wanted = of_logits.map(|i| Wanted {
                work: i,
                rows: places[i]..places[i] + share[i].len(),
                vocab: vocab(&work[i]),
                draw: draws[i].as_ref(),
            });
            answer(logits, &wanted.collect::<Vec<_>>(), &mut computed)?;
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

/// What a work wants of a step's logits.
struct Wanted<'a> {
    work: usize,
    /// As many as there are in `Output`, one for a draw.
    rows: Range<usize>,
    /// The first numbers of a row, those of tokens.
    vocab: usize,
    draw: Option<&'a Draw>,
}

/// Writes to each work what it wants of `logits`, whose rows are those of all of them, in order.
fn answer(mut logits: Rows, wanted: &[Wanted], computed: &mut [Computed]) -> Result<()> {
    let row = |(w, draw): (&Wanted, _)| (w.work, Row { row: w.rows.start, vocab: w.vocab, draw });
    let (drawn, rows): (Vec<usize>, Vec<Row>) = wanted.iter().filter_map(|w| Some((w, w.draw?))).map(row).unzip();
    let asked: Vec<&Wanted> = wanted.iter().filter(|w| w.draw.is_none()).collect();
    if drawn.is_empty() {
        copy(logits, &asked, computed)?;
    } else {
        if !asked.is_empty() {
            let rows: Vec<usize> = asked.iter().flat_map(|w| w.rows.clone()).collect();
            copy(logits.select(&rows)?, &asked, computed)?;
        }
        let tokens = draws::draw_tokens(&mut logits, &rows)?;
        if let Rows::Host { data, .. } = logits {
            release(data);
        }
        drawn.into_iter().zip(tokens).for_each(|(i, token)| computed[i] = Computed::Token(token));
    }
    Ok(())
}

/// The logits themselves, whose rows are those of `asked`.
fn copy(logits: Rows, asked: &[&Wanted], computed: &mut [Computed]) -> Result<()> {
    let numbers = logits.into_buffer()?;
    let width = numbers.len() / asked.iter().map(|w| w.rows.len()).sum::<usize>().max(1);
    let mut rows = numbers.chunks_exact(width.max(1));
    // Memory from this thread, whose allocator keeps it for the next step; written by all.
    let copies = asked.iter().map(|w| {
        (rows.by_ref().take(w.rows.len()).collect::<Vec<_>>(), w.vocab, Vec::with_capacity(w.rows.len() * w.vocab))
    });
    let copies = parallel::map(copies.collect(), |(rows, vocab, mut own): (Vec<&[f32]>, usize, Vec<f32>)| {
        rows.into_iter().for_each(|row| own.extend_from_slice(&row[..vocab]));
        own
    });
    asked.iter().zip(copies).for_each(|(w, own)| computed[w.work] = Computed::Numbers(own));
    release(numbers);
    Ok(())
}

/// Keeps memory for the next step, if it is not of a whole prompt's logits, which few ask for.
fn release(numbers: Buffer) {
    const KEPT: usize = 1 << 23;
    if numbers.len() > KEPT {
        drop(Vec::<f32>::from(numbers));
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
