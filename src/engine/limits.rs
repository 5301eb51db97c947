//! What a request may ask for.

use crate::engine::{Generate, Request, Sampling, Task};
use crate::{Error, Result};

const MAX_CHOICES: usize = 128;
/// As in vLLM.
const MAX_LOGPROBS: usize = 20;
const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 1024;

/// What bounds every request: the model and its KV cache.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Tokens of the base, and of adapters that bring none of their own.
    pub vocab_size: usize,
    /// Whether the base has a classification head of its own.
    pub classifies: bool,
    /// Whether the base predicts tokens.
    pub predicts: bool,
    /// Longest sequence that the model computes.
    pub context: usize,
    /// Tokens that the whole KV cache holds.
    pub cache: usize,
}

impl Limits {
    /// Longest sequence, prompt and generated tokens together.
    pub fn tokens(&self) -> usize {
        self.context.min(self.cache)
    }

    /// Errors: `BadRequest` naming the field, what it is and what it may be.
    pub fn check(&self, request: &Request) -> Result<()> {
        self.check_prompt(request)?;
        if !self.predicts && request.task != Task::Classify {
            return Err(Error::bad_request(
                "the base model has no output layer that predicts tokens: it classifies only",
            ));
        }
        match &request.task {
            Task::Generate(generate) => self.check_generate(generate, self.vocab_size(request)),
            Task::Classify => match &request.adapter {
                _ if self.classifies => Ok(()),
                Some((_, adapter)) if adapter.head().is_some() => Ok(()),
                Some((name, _)) => Err(Error::bad_request(format!("adapter {name:?} has no classification head"))),
                None => {
                    Err(Error::bad_request("the base model has no classification head; name an adapter that has one"))
                }
            }
            .map_err(|e| e.param("adapter")),
            Task::Score { from, top } => {
                within("logprobs", *top, 0, MAX_LOGPROBS)?;
                within("from", *from, 1, request.prompt.len())
            }
        }
    }

    fn vocab_size(&self, request: &Request) -> usize {
        request.adapter.as_ref().map_or(self.vocab_size, |(_, adapter)| adapter.vocab_size)
    }

    fn check_prompt(&self, request: &Request) -> Result<()> {
        let bad = |message: String| Err(Error::bad_request(message).param("prompt"));
        let length = request.prompt.len();
        if length == 0 {
            return bad("the prompt is empty; it must have at least one token".into());
        }
        let (growth, and) = match &request.task {
            Task::Generate(generate) if generate.max_tokens > 0 => (1, " and at least one new token"),
            _ => (0, ""),
        };
        if length + growth > self.context {
            let context = self.context;
            return bad(format!("the prompt has {length} tokens; the model's context holds {context}, prompt{and}"));
        }
        if length + growth > self.cache {
            let cache = self.cache;
            return bad(format!("the prompt has {length} tokens; the server's KV cache holds {cache}, prompt{and}"));
        }
        let vocab_size = self.vocab_size(request);
        if let Some(token) = request.prompt.iter().find(|&&t| t as usize >= vocab_size) {
            return bad(format!("the prompt has token {token}; the vocabulary ends at {}", vocab_size - 1));
        }
        Ok(())
    }

    fn check_generate(&self, generate: &Generate, vocab_size: usize) -> Result<()> {
        within("n", generate.n, 1, MAX_CHOICES)?;
        within("min_tokens", generate.min_tokens, 0, generate.max_tokens)?;
        if let Some(logprobs) = generate.logprobs {
            within("logprobs", logprobs, 0, MAX_LOGPROBS)?;
        }
        let stop = |message: String| Err(Error::bad_request(message).param("stop"));
        if generate.stop.len() > MAX_STOP_STRINGS {
            return stop(format!("stop has {} strings; at most {MAX_STOP_STRINGS} are allowed", generate.stop.len()));
        }
        for text in &generate.stop {
            if text.is_empty() || text.len() > MAX_STOP_BYTES {
                let length = text.len();
                return stop(format!("a stop string has {length} bytes; it must have 1 to {MAX_STOP_BYTES}"));
            }
        }
        if generate.stop_tokens.len() > MAX_STOP_TOKENS {
            let count = generate.stop_tokens.len();
            let message = format!("stop_token_ids has {count} tokens; at most {MAX_STOP_TOKENS} are allowed");
            return Err(Error::bad_request(message).param("stop_token_ids"));
        }
        check_sampling(&generate.sampling, vocab_size)
    }
}

fn check_sampling(s: &Sampling, vocab_size: usize) -> Result<()> {
    let range = |name: &str, value: f32, fits: bool, range: &str| match fits {
        true => Ok(()),
        // NaN fits no range.
        false => Err(Error::bad_request(format!("{name} is {value}; it must be {range}")).param(name)),
    };
    let finite = f32::is_finite;
    let t = s.temperature;
    range("temperature", t, finite(t) && t >= 0.0, "a finite number, at least 0")?;
    range("top_p", s.top_p, (0.0..=1.0).contains(&s.top_p), "0 to 1")?;
    range("typical_p", s.typical_p, (0.0..=1.0).contains(&s.typical_p), "0 to 1")?;
    range("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "0 to 1")?;
    let r = s.repetition_penalty;
    range("repetition_penalty", r, (0.01..=100.0).contains(&r), "0.01 to 100")?;
    for (name, value) in [("frequency_penalty", s.frequency_penalty), ("presence_penalty", s.presence_penalty)] {
        range(name, value, (-2.0..=2.0).contains(&value), "-2 to 2")?;
    }
    for (&token, &bias) in &s.logit_bias {
        range("logit_bias", bias, (-100.0..=100.0).contains(&bias), "-100 to 100")?;
        if token as usize >= vocab_size {
            let message = format!("logit_bias names token {token}; the vocabulary ends at {}", vocab_size - 1);
            return Err(Error::bad_request(message).param("logit_bias"));
        }
    }
    Ok(())
}

fn within(name: &str, value: usize, min: usize, max: usize) -> Result<()> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::bad_request(format!("{name} is {value}; it must be {min} to {max}")).param(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Client;

    const LIMITS: Limits = Limits { vocab_size: 10, classifies: false, predicts: true, context: 8, cache: 6 };

    fn generate() -> Generate {
        Generate {
            max_tokens: 4,
            min_tokens: 0,
            sampling: Sampling::default(),
            stop: vec![],
            stop_tokens: vec![],
            include_stop: false,
            ignore_eos: false,
            logprobs: None,
            n: 1,
            grammar: None,
        }
    }

    fn check(prompt: &[u32], task: Task) -> Result<()> {
        LIMITS.check(&Request { client: Client::default(), adapter: None, prompt: prompt.to_vec(), task })
    }

    #[test]
    fn a_classification_classifies_only() {
        let request = |task| Request { client: Client::default(), adapter: None, prompt: vec![1], task };
        let limits = Limits { classifies: true, predicts: false, ..LIMITS };
        assert!(limits.check(&request(Task::Classify)).is_ok());
        for task in [Task::Generate(generate()), Task::Score { from: 1, top: 0 }] {
            assert!(limits.check(&request(task)).unwrap_err().message.contains("classifies only"));
        }
        assert!(LIMITS.check(&request(Task::Classify)).unwrap_err().message.contains("no classification head"));
    }

    #[test]
    fn a_value_out_of_range_is_refused_by_name() {
        assert!(check(&[1], Task::Generate(generate())).is_ok());
        type Change = fn(&mut Generate);
        let cases: [(&str, Change); 23] = [
            ("temperature", |g| g.sampling.temperature = -0.1),
            ("temperature", |g| g.sampling.temperature = f32::NAN),
            ("temperature", |g| g.sampling.temperature = f32::INFINITY),
            ("top_p", |g| g.sampling.top_p = 1.1),
            ("top_p", |g| g.sampling.top_p = f32::NAN),
            ("min_p", |g| g.sampling.min_p = -0.1),
            ("min_p", |g| g.sampling.min_p = 2.0),
            ("repetition_penalty", |g| g.sampling.repetition_penalty = 0.0),
            ("repetition_penalty", |g| g.sampling.repetition_penalty = f32::NAN),
            ("frequency_penalty", |g| g.sampling.frequency_penalty = 2.5),
            ("presence_penalty", |g| g.sampling.presence_penalty = f32::NEG_INFINITY),
            ("logit_bias", |g| g.sampling.logit_bias = [(3, f32::NAN)].into()),
            ("logit_bias", |g| g.sampling.logit_bias = [(3, 101.0)].into()),
            ("logit_bias", |g| g.sampling.logit_bias = [(10, 1.0)].into()),
            ("n", |g| g.n = 0),
            ("n", |g| g.n = 129),
            ("logprobs", |g| g.logprobs = Some(21)),
            ("stop", |g| g.stop = vec!["".into()]),
            ("stop", |g| g.stop = vec!["x".repeat(1025)]),
            ("stop", |g| g.stop = vec!["x".into(); 65]),
            ("stop_token_ids", |g| g.stop_tokens = vec![1; 1025]),
            ("min_tokens", |g| g.min_tokens = 5),
            ("top_p", |g| g.sampling.top_p = -1.0),
        ];
        for (param, change) in cases {
            let mut g = generate();
            change(&mut g);
            let e = check(&[1], Task::Generate(g)).unwrap_err();
            assert_eq!((e.kind, e.param.as_deref()), (crate::ErrorKind::BadRequest, Some(param)), "{e}");
        }
    }

    #[test]
    fn a_prompt_must_fit_with_what_it_asks_for() {
        let message = |limits: Limits, length: usize, task: Task| {
            let request = Request { client: Client::default(), adapter: None, prompt: vec![1; length], task };
            limits.check(&request).err().map(|e| e.message)
        };
        let wide = Limits { cache: 100, ..LIMITS };
        assert_eq!(message(wide, 7, Task::Generate(generate())), None);
        let e = message(wide, 8, Task::Generate(generate())).unwrap();
        assert!(e.contains("8 tokens") && e.contains("context holds 8"), "{e}");
        assert_eq!(message(wide, 8, Task::Score { from: 1, top: 0 }), None);
        assert!(message(wide, 9, Task::Score { from: 1, top: 0 }).is_some());
        let e = message(LIMITS, 6, Task::Generate(generate())).unwrap();
        assert!(e.contains("KV cache holds 6"), "{e}");
        assert!(message(LIMITS, 0, Task::Score { from: 1, top: 0 }).is_some());
        assert!(message(LIMITS, 3, Task::Score { from: 0, top: 0 }).is_some());
        assert!(message(LIMITS, 3, Task::Score { from: 4, top: 0 }).is_some());
        assert!(check(&[1, 10], Task::Score { from: 1, top: 0 }).unwrap_err().message.contains("token 10"));
        assert!(check(&[1], Task::Classify).unwrap_err().message.contains("no classification head"));
    }
}
