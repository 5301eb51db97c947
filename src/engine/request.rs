//! The one internal request that every HTTP dialect maps to, and the events that answer it.

use std::collections::HashMap;
use std::sync::Arc;

use crate::Error;
use crate::engine::Grammar;
use crate::lora::PackedAdapter;

/// How the next token is drawn. The order of the steps is that of vLLM's sampler: the grammar's mask, bias, penalties,
/// temperature, then min-p, top-k, top-p; and last, TGI's typical-p.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all tokens.
    pub top_k: usize,
    /// 1 keeps all tokens.
    pub top_p: f32,
    /// Keeps the tokens whose surprise is nearest to what is expected of one, up to this probability together (typical
    /// sampling, arXiv 2202.00666); 1 keeps all.
    pub typical_p: f32,
    /// Drops tokens less likely than `min_p` times the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Over 1 discourages tokens of the prompt and the text so far (CTRL, arXiv 1909.05858); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once per earlier occurrence in the generated text.
    pub frequency_penalty: f32,
    /// Subtracted once if the token occurs in the generated text.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: HashMap<u32, f32>,
    /// Same seed, same request, same tokens. `None` draws one from the system.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            typical_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: HashMap::new(),
            seed: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Generate {
    pub max_tokens: usize,
    /// Before so many tokens neither an end token nor one of [`Generate::stop_tokens`] is drawn, and no stop string counts
    /// that is complete by then. A grammar's end still is one.
    pub min_tokens: usize,
    pub sampling: Sampling,
    /// Generation ends before the first of these appears in the text.
    pub stop: Vec<String>,
    /// Token ids that end the generation, beside the model's own end tokens.
    pub stop_tokens: Vec<u32>,
    /// Leaves the matched stop string in the text.
    pub include_stop: bool,
    /// Goes on past the model's end tokens. With a grammar: they are not drawn, and the text ends where it is complete and
    /// nothing else can follow.
    pub ignore_eos: bool,
    /// Log-probabilities of the drawn token and of this many likeliest tokens.
    pub logprobs: Option<usize>,
    /// Independent continuations of the one prompt. Choice `i` samples with `seed + i`.
    pub n: usize,
    /// What the text must be like. It ends where it is complete and nothing can follow, or with an end token where it is
    /// complete; stop strings and `max_tokens` end it anywhere.
    pub grammar: Option<Grammar>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Task {
    Generate(Generate),
    /// The adapter's classification head at the last prompt token.
    Classify,
    /// Log-probability of each prompt token from index `from` (at least 1) on, given those before it, and of the `top` likeliest
    /// in its place.
    Score {
        from: usize,
        top: usize,
    },
}

/// On whose behalf a request runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Client {
    /// `None` for all who are of no tenant. Cached prefixes are shared within a tenant alone: how soon an answer begins tells
    /// what was asked before.
    pub tenant: Option<Arc<str>>,
    /// How much of the engine's time the tenant gets beside the others that wait, in proportion; more than 0.
    pub share: f64,
}

impl Default for Client {
    fn default() -> Self {
        Client { tenant: None, share: 1.0 }
    }
}

/// One piece of work for the engine.
#[derive(Debug, Clone)]
pub struct Request {
    pub client: Client,
    /// The adapter's name for metrics, and the generation it runs on. Holding it keeps the generation in memory.
    pub adapter: Option<(Arc<str>, Arc<PackedAdapter>)>,
    pub prompt: Vec<u32>,
    pub task: Task,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    pub logprob: f32,
    /// The likeliest tokens and their log-probabilities, likeliest first.
    pub top: Vec<(u32, f32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, a stop token or a stop string; or the grammar's end.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values were already cached.
    pub cached_tokens: usize,
    pub completion_tokens: usize,
}

/// What one step added to one choice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// Which of the `n` continuations.
    pub index: usize,
    /// Tokens drawn. End tokens are counted in the usage but are not here.
    pub tokens: Vec<u32>,
    /// New text. Whole UTF-8 characters, and nothing that could still become a stop string.
    pub text: String,
    /// One per token of `tokens`, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    pub finish: Option<FinishReason>,
    /// The end or stop token that ended it and is not in `tokens`, if log-probabilities were asked for.
    pub end: Option<TokenLogprob>,
    /// The stop string or stop token id that matched, if one did.
    pub matched_stop: Option<String>,
}

/// Answers to a request, in order. The last is `Done`, `Classified`, `Scored` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    Progress(Choice),
    /// All choices have finished.
    Done(Usage),
    /// Logits of the head, one per label.
    Classified {
        logits: Vec<f32>,
        usage: Usage,
    },
    Scored {
        logprobs: Vec<TokenLogprob>,
        usage: Usage,
    },
    Failed(Error),
}
