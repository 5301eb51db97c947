//! `loramux bench`: closed-loop load on a running server, measured at the client, or on an engine alone.

use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::args::{BenchEngineArgs, BenchServeArgs, LoadArgs, Spread};
use super::client::Client;
use super::host::Host;
use super::oneshot;
use crate::engine::{Event, Generate, Request, Sampling, Task};
use crate::hosting::statistics::{quantile, zipf};
use crate::{Error, Result, output};

/// What one request saw.
struct Sample {
    first_token: Duration,
    whole: Duration,
    /// Time between chunks after the first.
    gaps: Vec<Duration>,
    tokens: u64,
}

/// When a request's chunks came.
struct Clock {
    start: Instant,
    last: Instant,
    first_token: Option<Duration>,
    gaps: Vec<Duration>,
}

impl Clock {
    fn start() -> Self {
        let start = Instant::now();
        Clock { start, last: start, first_token: None, gaps: vec![] }
    }

    fn chunk(&mut self) {
        let now = Instant::now();
        match self.first_token {
            None => self.first_token = Some(now - self.start),
            Some(_) => self.gaps.push(now - self.last),
        }
        self.last = now;
    }

    fn end(self, tokens: u64) -> Result<Sample> {
        match self.first_token.filter(|_| tokens > 0) {
            Some(first_token) => Ok(Sample { first_token, whole: self.start.elapsed(), gaps: self.gaps, tokens }),
            None => Err(Error::internal("the answer ended early")),
        }
    }
}

/// What the load goes to.
enum System {
    Server(Client),
    Engine(Box<Host>),
}

impl System {
    async fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            System::Engine(host) => host.language.tokenizer.encode(text, false),
            System::Server(client) => {
                let answer = client.post("/tokenize", &json!({ "prompt": text, "add_special_tokens": false })).await?;
                let ids = answer["tokens"].as_array().into_iter().flatten();
                Ok(ids.filter_map(Value::as_u64).map(|id| id as u32).collect())
            }
        }
    }

    /// The names of all adapters.
    async fn adapters(&self) -> Result<Vec<String>> {
        match self {
            System::Engine(host) => Ok(host.registry.list().into_iter().map(|info| info.name).collect()),
            System::Server(client) => {
                let list = client.json(client.http.get(client.at("/v1/adapters"))).await?;
                let names = list["adapters"].as_array().into_iter().flatten().filter_map(|a| a["name"].as_str());
                Ok(names.map(str::to_string).collect())
            }
        }
    }

    async fn generate(&self, model: &str, prompt: &[u32], max_tokens: usize) -> Result<Sample> {
        match self {
            System::Engine(host) => ask_engine(host, model, prompt, max_tokens).await,
            System::Server(client) => ask_server(client, model, prompt, max_tokens).await,
        }
    }
}

async fn ask_engine(host: &Host, model: &str, prompt: &[u32], max_tokens: usize) -> Result<Sample> {
    let mut clock = Clock::start();
    let adapter = match model {
        BASE => None,
        name => Some((name.into(), host.registry.acquire(name).await?)),
    };
    let task = Task::Generate(Generate {
        max_tokens,
        min_tokens: 0,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stop: vec![],
        stop_tokens: vec![],
        include_stop: false,
        ignore_eos: true,
        logprobs: None,
        n: 1,
        grammar: None,
    });
    let mut events =
        host.engine.submit(Request { client: Default::default(), adapter, prompt: prompt.to_vec(), task })?;
    while let Some(event) = events.recv().await {
        match event {
            Event::Progress(_) => clock.chunk(),
            Event::Done(usage) => return clock.end(usage.completion_tokens as u64),
            Event::Failed(e) => return Err(e),
            Event::Classified { .. } | Event::Scored { .. } => {}
        }
    }
    clock.end(0)
}

async fn ask_server(client: &Client, model: &str, prompt: &[u32], max_tokens: usize) -> Result<Sample> {
    let body = json!({ "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": { "include_usage": true } });
    let mut clock = Clock::start();
    let mut tokens = 0;
    let request = client.http.post(client.at("/v1/completions")).json(&body);
    let events = client.events(request, |event| {
        tokens = event["usage"]["completion_tokens"].as_u64().unwrap_or(tokens);
        if event["choices"].as_array().is_some_and(|c| !c.is_empty()) {
            clock.chunk();
        }
    });
    events.await?;
    clock.end(tokens)
}

/// Asks for no adapter.
const BASE: &str = "base";

/// Prompts as token ids of the model's own tokenizer, so that their length is what was asked for. Each starts with words of
/// its own, also those of another seed: prompts that repeat would measure the prefix cache.
async fn prompts(system: &System, seed: u64, count: usize, length: usize) -> Result<Vec<Vec<u32>>> {
    let mut all = Vec::with_capacity(count);
    for i in 0..count {
        let words = (0..length).map(|j| match j {
            0 => format!("{seed} house"),
            _ => format!("{} house", (i * 7919 + (j - 1) * 104_729) % 9973),
        });
        let text = words.collect::<Vec<_>>().join(" ");
        let ids = system.tokenize(&text).await?;
        if ids.len() < length {
            return Err(Error::internal(format!("the tokenizer gave {} tokens, {length} were needed", ids.len())));
        }
        all.push(ids[..length].to_vec());
    }
    Ok(all)
}

/// For each client the models of its requests.
fn models(args: &LoadArgs, adapters: &[String]) -> Vec<Vec<String>> {
    let mut random = ChaCha8Rng::seed_from_u64(args.seed);
    let weights: Vec<f64> = match args.spread {
        Spread::Zipf => zipf(adapters.len()).collect(),
        Spread::Turns | Spread::Uniform => vec![1.0; adapters.len()],
    };
    let index = WeightedIndex::new(weights).ok();
    let mut model = |client: usize| match (&index, args.spread) {
        (None, _) => BASE.to_string(),
        (_, Spread::Turns) => adapters[client % adapters.len()].clone(),
        (Some(index), _) => adapters[index.sample(&mut random)].clone(),
    };
    (0..args.clients).map(|client| (0..args.requests).map(|_| model(client)).collect()).collect()
}

/// What a report tells of each time: medians, tails and the longest.
const QUANTILES: [f64; 4] = [0.5, 0.95, 0.99, 1.0];

/// These of `times`, in milliseconds.
fn quantiles(times: &[f64]) -> [f64; 4] {
    QUANTILES.map(|q| quantile(times, q).unwrap_or(f64::NAN))
}

pub async fn serve(args: BenchServeArgs) -> Result<()> {
    let client = args.server.client()?;
    load(System::Server(client), args.load).await
}

pub async fn engine(args: BenchEngineArgs) -> Result<()> {
    let (host, _, _store) = oneshot::start(&args.model, None).await?;
    load(System::Engine(Box::new(host)), args.load).await
}

async fn load(system: System, args: LoadArgs) -> Result<()> {
    if args.clients == 0 || args.requests == 0 || args.max_tokens == 0 || args.prompt_tokens == 0 {
        return Err(Error::bad_request("--clients, --requests, --max-tokens and --prompt-tokens must be 1 or more"));
    }
    let prompts = prompts(&system, args.seed, args.clients * args.requests, args.prompt_tokens).await?;
    let adapters = if args.ask_all { system.adapters().await? } else { args.ask.clone() };
    if args.ask_all && adapters.is_empty() {
        return Err(Error::bad_request("--ask-all: there are no adapters"));
    }
    let models = models(&args, &adapters);
    // Each client's first adapter is loaded and pages are touched before the clock starts.
    for models in &models {
        system.generate(&models[0], &prompts[0][..1], 1).await?;
    }
    let start = Instant::now();
    let run = |c: usize| {
        let (system, prompts, models) = (&system, &prompts, &models[c]);
        async move {
            let mut samples = Vec::with_capacity(args.requests);
            for (r, model) in models.iter().enumerate() {
                samples.push(system.generate(model, &prompts[c * args.requests + r], args.max_tokens).await?);
            }
            Ok::<_, Error>(samples)
        }
    };
    let samples = futures::future::try_join_all((0..args.clients).map(run)).await?;
    let seconds = start.elapsed().as_secs_f64();
    let samples: Vec<Sample> = samples.into_iter().flatten().collect();
    let tokens: u64 = samples.iter().map(|s| s.tokens).sum();
    let milliseconds = |d: Duration| d.as_secs_f64() * 1e3;
    let first: Vec<f64> = samples.iter().map(|s| milliseconds(s.first_token)).collect();
    let whole: Vec<f64> = samples.iter().map(|s| milliseconds(s.whole)).collect();
    let gaps: Vec<f64> = samples.iter().flat_map(|s| s.gaps.iter().copied().map(milliseconds)).collect();
    let rate = tokens as f64 / seconds;
    if args.json {
        let told = |times: &[f64]| {
            let [p50, p95, p99, max] = quantiles(times);
            json!({ "p50": p50, "p95": p95, "p99": p99, "max": max })
        };
        let report = json!({ "clients": args.clients, "requests": samples.len(), "adapters": adapters.len(),
            "prompt_tokens": args.prompt_tokens, "generated_tokens": tokens, "seconds": seconds, "tokens_per_second": rate,
            "ttft_ms": told(&first), "token_ms": told(&gaps), "request_ms": told(&whole) });
        return output::line(report);
    }
    output::line(format_args!(
        "{} clients, {} requests, {} prompt tokens each, {} adapters: {tokens} tokens in {seconds:.2} s, {rate:.1} tok/s",
        args.clients,
        samples.len(),
        args.prompt_tokens,
        adapters.len()
    ))?;
    for (name, times) in [("first token", &first), ("between tokens", &gaps), ("whole request", &whole)] {
        let [p50, p95, p99, max] = quantiles(times);
        output::line(format_args!(
            "{name:>15}: p50 {p50:8.1} ms  p95 {p95:8.1} ms  p99 {p99:8.1} ms  max {max:8.1} ms"
        ))?;
    }
    Ok(())
}
