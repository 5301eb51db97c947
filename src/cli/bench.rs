//! `loramux bench serve`: closed-loop load on a running server, measured at the client.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};

use super::args::BenchServeArgs;
use super::client::{Client, read_error};
use crate::{Error, Result};

/// What one request saw.
struct Sample {
    first_token: Duration,
    whole: Duration,
    /// Time between chunks after the first.
    gaps: Vec<Duration>,
    tokens: u64,
}

/// Prompts as token ids of the server's own tokenizer, so that their length is what was asked for. Each starts with a
/// word of its own: prompts that repeat would measure the prefix cache.
async fn prompts(client: &Client, count: usize, length: usize) -> Result<Vec<Vec<u64>>> {
    let mut all = Vec::with_capacity(count);
    for i in 0..count {
        let words = (0..length).map(|j| format!("{} house", (i * 7919 + j * 104_729) % 9973));
        let text = words.collect::<Vec<_>>().join(" ");
        let answer = client.post("/tokenize", &json!({ "prompt": text, "add_special_tokens": false })).await?;
        let ids: Vec<u64> = answer["tokens"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        if ids.len() < length {
            return Err(Error::internal(format!("/tokenize gave {} tokens, {length} were needed", ids.len())));
        }
        all.push(ids[..length].to_vec());
    }
    Ok(all)
}

async fn request(client: &Client, body: Value) -> Result<Sample> {
    let start = Instant::now();
    let response = client.send(client.http.post(client.at("/v1/completions")).json(&body)).await?;
    if !response.status().is_success() {
        return Err(read_error(response).await);
    }
    let mut stream = response.bytes_stream();
    let (mut buffer, mut last, mut first_token) = (Vec::new(), start, None);
    let (mut gaps, mut tokens, mut done) = (Vec::new(), 0, false);
    while let Some(chunk) = stream.next().await {
        buffer.extend_from_slice(&chunk.map_err(|e| Error::unavailable(format!("the stream broke off: {e}")))?);
        while let Some(end) = buffer.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&event);
            let Some(data) = text.trim().strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                done = true;
                continue;
            }
            let event: Value =
                serde_json::from_str(data).map_err(|e| Error::internal(format!("bad event {data:?}: {e}")))?;
            if let Some(message) = event["error"]["message"].as_str() {
                return Err(Error::internal(message));
            }
            if let Some(n) = event["usage"]["completion_tokens"].as_u64() {
                tokens = n;
            }
            if event["choices"].as_array().is_some_and(|c| !c.is_empty()) {
                let now = Instant::now();
                match first_token {
                    None => first_token = Some(now - start),
                    Some(_) => gaps.push(now - last),
                }
                last = now;
            }
        }
    }
    match first_token.filter(|_| done && tokens > 0) {
        Some(first_token) => Ok(Sample { first_token, whole: start.elapsed(), gaps, tokens }),
        None => Err(Error::internal("the stream ended early")),
    }
}

/// The value below which a share `q` of `sorted` lies, in milliseconds.
fn quantile(sorted: &[Duration], q: f64) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        n => sorted[((n - 1) as f64 * q).round() as usize].as_secs_f64() * 1e3,
    }
}

pub async fn serve(args: BenchServeArgs) -> Result<()> {
    if args.clients == 0 || args.requests == 0 || args.max_tokens == 0 || args.prompt_tokens == 0 {
        return Err(Error::bad_request("--clients, --requests, --max-tokens and --prompt-tokens must be 1 or more"));
    }
    let client = Client::new(&args.server.url)?;
    let prompts = prompts(&client, args.clients * args.requests, args.prompt_tokens).await?;
    let model = |c: usize| match args.adapters.len() {
        0 => "base".to_string(),
        n => args.adapters[c % n].clone(),
    };
    let body = |c: usize, prompt: &[u64], max_tokens: usize| {
        json!({ "model": model(c), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": { "include_usage": true } })
    };
    // Adapters are loaded and pages touched before the clock starts.
    for c in 0..args.clients.min(args.adapters.len().max(1)) {
        request(&client, body(c, &[prompts[0][0]], 1)).await?;
    }
    let start = Instant::now();
    let run = |c: usize| {
        let (client, prompts, body) = (&client, &prompts, &body);
        async move {
            let mut samples = Vec::with_capacity(args.requests);
            for r in 0..args.requests {
                samples.push(request(client, body(c, &prompts[c * args.requests + r], args.max_tokens)).await?);
            }
            Ok::<_, Error>(samples)
        }
    };
    let samples = futures::future::try_join_all((0..args.clients).map(run)).await?;
    let seconds = start.elapsed().as_secs_f64();
    let samples: Vec<Sample> = samples.into_iter().flatten().collect();
    let tokens: u64 = samples.iter().map(|s| s.tokens).sum();
    let sorted = |mut d: Vec<Duration>| {
        d.sort();
        d
    };
    let first = sorted(samples.iter().map(|s| s.first_token).collect());
    let whole = sorted(samples.iter().map(|s| s.whole).collect());
    let gaps = sorted(samples.iter().flat_map(|s| s.gaps.iter().copied()).collect());
    let rate = tokens as f64 / seconds;
    if args.json {
        let quantiles =
            |d: &[Duration]| json!({ "p50": quantile(d, 0.5), "p95": quantile(d, 0.95), "max": quantile(d, 1.0) });
        let report = json!({ "clients": args.clients, "requests": samples.len(), "adapters": args.adapters,
            "prompt_tokens": args.prompt_tokens, "generated_tokens": tokens, "seconds": seconds, "tokens_per_second": rate,
            "ttft_ms": quantiles(&first), "token_ms": quantiles(&gaps), "request_ms": quantiles(&whole) });
        println!("{report}");
        return Ok(());
    }
    println!(
        "{} clients, {} requests, {} prompt tokens each, {} adapters: {tokens} tokens in {seconds:.2} s, {rate:.1} tok/s",
        args.clients,
        samples.len(),
        args.prompt_tokens,
        args.adapters.len()
    );
    for (name, d) in [("first token", &first), ("between tokens", &gaps), ("whole request", &whole)] {
        let (p50, p95, max) = (quantile(d, 0.5), quantile(d, 0.95), quantile(d, 1.0));
        println!("{name:>15}: p50 {p50:8.1} ms  p95 {p95:8.1} ms  max {max:8.1} ms");
    }
    Ok(())
}
