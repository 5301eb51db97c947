//! Rotary position embeddings (RoFormer, arXiv 2104.09864) and what stretches them to longer contexts.

use std::f64::consts::PI;

/// By how much positions turn the pairs of numbers of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    /// Angle of one position for each pair of the first `2 * frequencies.len()` numbers of a head; the rest is not turned.
    pub frequencies: Vec<f32>,
    /// Factor of all cosines and sines.
    pub attention_factor: f32,
    /// Whether the frequencies are other than [`Rope::plain`]'s.
    pub scaled: bool,
}

/// Parameters of [`Rope::llama3`].
#[derive(Debug, Clone, Copy)]
pub struct Llama3 {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_context: f64,
}

/// Parameters of [`Rope::yarn`].
#[derive(Debug, Clone, Copy)]
pub struct Yarn {
    pub factor: f64,
    pub original_context: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    /// Whether the bounds between which frequencies are mixed are whole numbers.
    pub truncate: bool,
    pub attention_factor: f64,
}

impl Rope {
    /// `theta^(-2i / rotated)` for the pairs of the first `rotated` numbers of a head.
    pub fn plain(theta: f64, rotated: usize) -> Self {
        // In f32 as in transformers, so that the angles of late positions are the same.
        let angle = |i: usize| 1.0 / (theta as f32).powf(2.0 * i as f32 / rotated as f32);
        Rope { theta, frequencies: (0..rotated / 2).map(angle).collect(), attention_factor: 1.0, scaled: false }
    }

    fn scale(mut self, f: impl Fn(usize, f32) -> f32) -> Self {
        self.frequencies.iter_mut().enumerate().for_each(|(i, frequency)| *frequency = f(i, *frequency));
        self.scaled = true;
        self
    }

    /// Positions `factor` times as close.
    pub fn linear(self, factor: f64) -> Self {
        self.scale(|_, f| f / factor as f32)
    }

    /// Each frequency divided by a number of its own.
    ///
    /// # Panics
    /// If there are not as many numbers as frequencies.
    pub fn divided(self, by: &[f32], attention_factor: f64) -> Self {
        assert_eq!(by.len(), self.frequencies.len());
        Rope { attention_factor: attention_factor as f32, ..self.scale(|i, f| f / by[i]) }
    }

    /// Low frequencies divided by the factor, high ones kept, those between mixed: as Llama 3.1 does.
    pub fn llama3(self, p: Llama3) -> Self {
        let (longest, shortest) = (p.original_context / p.low_freq_factor, p.original_context / p.high_freq_factor);
        self.scale(|_, frequency| {
            let f = f64::from(frequency);
            let wave = 2.0 * PI / f;
            if wave < shortest {
                return frequency;
            }
            if wave > longest {
                return (f / p.factor) as f32;
            }
            let smooth = (p.original_context / wave - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor);
            ((1.0 - smooth) * f / p.factor + smooth * f) as f32
        })
    }

    /// The default of YaRN's `attention_factor`.
    pub fn yarn_attention_factor(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }

    /// YaRN (arXiv 2309.00071): pairs that turn often within the original context keep their frequency, those that turn
    /// seldom are divided by the factor, those between are mixed.
    pub fn yarn(self, p: Yarn) -> Self {
        let (dim, theta) = (2.0 * self.frequencies.len() as f64, self.theta);
        let pair_that_turns = |times: f64| dim * (p.original_context / (times * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair_that_turns(p.beta_fast), pair_that_turns(p.beta_slow));
        if p.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let scaled = self.scale(|i, f| {
            let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
            f / p.factor as f32 * divided + f * (1.0 - divided)
        });
        Rope { attention_factor: p.attention_factor as f32, ..scaled }
    }

    /// The default of LongRoPE's `attention_factor` (arXiv 2402.13753).
    pub fn longrope_attention_factor(factor: f64, original_context: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original_context.ln()).sqrt() }
    }
}
