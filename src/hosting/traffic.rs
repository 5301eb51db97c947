//! Requests for many tasks: when they arrive, and what they see.

use std::time::{Duration, Instant};

use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::Exp;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::fleet::Work;
use super::statistics::zipf;
use crate::cli::Client;
use crate::{Error, Result};

/// A client whose request failed asks again after so long: one that is refused at once would do nothing else.
const PAUSE: Duration = Duration::from_millis(100);
/// After the last arrival, unanswered requests are given up after so long, and count as such.
const GRACE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Popularity {
    /// All tasks are asked alike.
    Uniform,
    /// The nth task is asked n times less often than the first.
    Zipf,
}

impl Popularity {
    fn weights(self, tasks: usize) -> Vec<f64> {
        match self {
            Popularity::Uniform => vec![1.0; tasks],
            Popularity::Zipf => zipf(tasks).collect(),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Popularity::Uniform => "uniform",
            Popularity::Zipf => "Zipf",
        }
    }
}

/// Lengths of requests: each is between half and one and a half times these.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Lengths {
    /// Words of a prompt or of a text to classify.
    pub words: usize,
    /// Tokens to generate.
    pub tokens: usize,
}

#[derive(Debug, Clone)]
pub struct Request {
    pub task: usize,
    words: usize,
    tokens: usize,
    /// Makes its text one that no other has.
    seed: u64,
}

impl Request {
    /// The least there is to ask.
    pub fn shortest(task: usize) -> Self {
        Request { task, words: 1, tokens: 1, seed: 0 }
    }

    fn text(&self) -> String {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let words = (0..self.words).map(|_| WORDS[random.random_range(0..WORDS.len())]);
        words.collect::<Vec<_>>().join(" ")
    }
}

const WORDS: [&str; 32] = [
    "the", "a", "of", "and", "it", "was", "old", "slow", "film", "story", "house", "people", "year", "market", "story",
    "in", "on", "with", "never", "good", "bad", "found", "went", "said", "long", "time", "river", "king", "play",
    "team", "one", "day",
];

/// Requests at random, the same ones for the same seed.
pub struct Source {
    random: ChaCha8Rng,
    tasks: WeightedIndex<f64>,
    lengths: Lengths,
}

impl Source {
    pub fn new(seed: u64, popularity: Popularity, tasks: usize, lengths: Lengths) -> Result<Self> {
        let tasks = WeightedIndex::new(popularity.weights(tasks)).map_err(Error::internal)?;
        Ok(Source { random: ChaCha8Rng::seed_from_u64(seed), tasks, lengths })
    }

    fn next(&mut self) -> Request {
        let mut around = |n: usize| self.random.random_range(n.div_ceil(2).max(1)..=(n + n / 2).max(1));
        let (words, tokens) = (around(self.lengths.words), around(self.lengths.tokens));
        Request { task: self.tasks.sample(&mut self.random), words, tokens, seed: self.random.random() }
    }

    /// Requests that arrive within `window` at `rate` a second, as a Poisson process does, each with its time.
    fn arrivals(&mut self, rate: f64, window: Duration) -> Result<Vec<(Duration, Request)>> {
        let gap = Exp::new(rate).map_err(|e| Error::bad_request(format!("a rate of {rate} requests a second: {e}")))?;
        let mut all = vec![];
        let mut at = gap.sample(&mut self.random);
        while at < window.as_secs_f64() {
            all.push((Duration::from_secs_f64(at), self.next()));
            at += gap.sample(&mut self.random);
        }
        Ok(all)
    }
}

/// What one request saw. Times are milliseconds from when it was to be sent, not from when it was.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sample {
    pub task: usize,
    pub work: Work,
    /// When it was to be sent, from the start of the load.
    pub at: f64,
    /// By how much later it was sent.
    pub late: f64,
    /// Until the first token; of a classification, until its answer.
    pub first: f64,
    /// Until the whole answer; of a request that was given up, until then.
    pub whole: f64,
    pub prompt_tokens: u64,
    pub generated: u64,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A load and what came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Load {
    /// For how long requests were sent.
    pub seconds: f64,
    pub samples: Vec<Sample>,
    /// Seconds of processor time that the program that sent them took.
    pub sender_cpu: f64,
}

impl Load {
    /// Requests answered while requests were sent. One that this end cuts counts by the share of its time before it: without
    /// these each client's last one would be lost, which is more the longer an answer takes.
    pub fn answered(&self) -> f64 {
        self.good().map(|s| self.share(s)).sum()
    }

    /// Tokens of these, read and generated.
    pub fn tokens(&self) -> f64 {
        self.good().map(|s| (s.prompt_tokens + s.generated) as f64 * self.share(s)).sum()
    }

    /// Seconds until the last answer.
    pub fn span(&self) -> f64 {
        self.samples.iter().map(|s| (s.at + s.whole) / 1e3).fold(self.seconds, f64::max)
    }

    fn good(&self) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(|s| s.error.is_none())
    }

    fn share(&self, sample: &Sample) -> f64 {
        let left = self.seconds * 1e3 - sample.at;
        if left >= sample.whole { 1.0 } else { left.max(0.0) / sample.whole }
    }
}

/// Who answers requests.
pub trait Hosts {
    /// Who answers for a task, and under which adapter's name.
    fn target(&self, task: usize) -> (&Client, Option<String>);
    fn work(&self, task: usize) -> Work;
}

/// Tokens of an answer and when the first came.
pub struct Answer {
    pub first: Duration,
    pub prompt_tokens: u64,
    pub generated: u64,
}

/// Sends a request and reads its answer.
pub async fn ask(hosts: &impl Hosts, request: &Request) -> Result<Answer> {
    let (client, adapter) = hosts.target(request.task);
    let start = Instant::now();
    let usage = |value: &serde_json::Value, key: &str| value["usage"][key].as_u64();
    match hosts.work(request.task) {
        Work::Classify => {
            let answer = client.post("/v1/classify", &json!({ "adapter": adapter, "input": request.text() })).await?;
            let prompt_tokens = usage(&answer, "prompt_tokens").unwrap_or(0);
            Ok(Answer { first: start.elapsed(), prompt_tokens, generated: 0 })
        }
        Work::Generate => {
            let body = json!({ "adapter": adapter, "prompt": request.text(), "max_tokens": request.tokens,
                "ignore_eos": true, "stream": true });
            let (mut first, mut used) = (None, None);
            let events = client.events(client.http.post(client.at("/v1/generate")).json(&body), |event| {
                first.get_or_insert_with(|| start.elapsed());
                used = usage(event, "prompt_tokens").zip(usage(event, "completion_tokens")).or(used);
            });
            events.await?;
            match first.zip(used) {
                Some((first, (prompt_tokens, generated))) => Ok(Answer { first, prompt_tokens, generated }),
                None => Err(Error::internal("the answer ended early")),
            }
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    // To a hundredth: there are many.
    (time.as_secs_f64() * 1e5).round() / 100.0
}

/// Asks for `request`, which was to be sent `at` after `start`, and waits until `end` at most.
async fn sample(hosts: &impl Hosts, request: Request, start: Instant, at: Duration, end: Instant) -> Sample {
    let sent = start.elapsed();
    let late = sent.saturating_sub(at);
    let answer = tokio::time::timeout_at(end.into(), ask(hosts, &request)).await;
    let whole = start.elapsed().saturating_sub(at);
    let answer = answer.unwrap_or_else(|_| Err(Error::unavailable("no answer in time")));
    let (first, prompt_tokens, generated, error) = match answer {
        Ok(a) => (late + a.first, a.prompt_tokens, a.generated, None),
        Err(e) => (whole, 0, 0, Some(e.message)),
    };
    Sample {
        task: request.task,
        work: hosts.work(request.task),
        at: milliseconds(at),
        late: milliseconds(late),
        first: milliseconds(first),
        whole: milliseconds(whole),
        prompt_tokens,
        generated,
        error,
    }
}

/// An open load: requests are sent when they arrive, whatever became of those before.
pub async fn open(hosts: &impl Hosts, source: &mut Source, rate: f64, window: Duration) -> Result<Load> {
    let arrivals = source.arrivals(rate, window)?;
    let before = processor_time();
    let start = Instant::now();
    let each = arrivals.into_iter().map(|(at, request)| async move {
        tokio::time::sleep_until((start + at).into()).await;
        sample(hosts, request, start, at, start + window + GRACE).await
    });
    let samples = futures::future::join_all(each).await;
    Ok(Load { seconds: window.as_secs_f64(), samples, sender_cpu: processor_time() - before })
}

/// A closed load: each of `clients` asks again as soon as it has its answer, for as long as the window is.
pub async fn closed(hosts: &impl Hosts, source: &mut Source, clients: usize, window: Duration) -> Load {
    let before = processor_time();
    let start = Instant::now();
    let source = std::cell::RefCell::new(source);
    let each = (0..clients).map(|_| async {
        let mut samples = vec![];
        while start.elapsed() < window {
            let request = source.borrow_mut().next();
            let sample = sample(hosts, request, start, start.elapsed(), start + window + GRACE).await;
            if sample.error.is_some() {
                tokio::time::sleep(PAUSE).await;
            }
            samples.push(sample);
        }
        samples
    });
    let samples = futures::future::join_all(each).await.into_iter().flatten().collect();
    Load { seconds: window.as_secs_f64(), samples, sender_cpu: processor_time() - before }
}

/// Seconds of processor time that this process has taken, in the kernel and outside of it; 0 where nothing tells.
fn processor_time() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name before them, in brackets, may hold anything. Times are the 14th and 15th field, in hundredths of a second.
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: Lengths = Lengths { words: 40, tokens: 20 };

    #[test]
    fn arrivals_are_a_poisson_process() {
        let mut source = Source::new(3, Popularity::Uniform, 4, LENGTHS).unwrap();
        let arrivals = source.arrivals(50.0, Duration::from_secs(200)).unwrap();
        // The count's deviation is 100, and of exponential gaps mean and deviation are alike.
        assert!((9_600..10_400).contains(&arrivals.len()), "{}", arrivals.len());
        let gaps: Vec<f64> = arrivals.windows(2).map(|w| (w[1].0 - w[0].0).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((deviation / mean - 1.0).abs() < 0.05, "{deviation} {mean}");
    }

    #[test]
    fn what_the_windows_end_cuts_counts_by_its_share() {
        let sample = |at, whole, error: Option<&str>| Sample {
            task: 0,
            work: Work::Generate,
            at,
            late: 0.0,
            first: 1.0,
            whole,
            prompt_tokens: 6,
            generated: 4,
            error: error.map(str::to_string),
        };
        let samples = vec![
            sample(0.0, 1000.0, None),
            sample(1500.0, 1000.0, None),
            sample(1999.0, 0.0, None),
            sample(2500.0, 100.0, None),
            sample(100.0, 1.0, Some("refused")),
        ];
        let load = Load { seconds: 2.0, samples, sender_cpu: 0.0 };
        assert_eq!((load.answered(), load.tokens(), load.span()), (2.5, 25.0, 2.6));
    }

    #[test]
    fn tasks_are_as_popular_as_is_said() {
        for (popularity, expected) in [(Popularity::Uniform, [0.25; 4]), (Popularity::Zipf, [0.48, 0.24, 0.16, 0.12])] {
            let mut source = Source::new(5, popularity, 4, LENGTHS).unwrap();
            let mut counts = [0.0; 4];
            for _ in 0..10_000 {
                let request = source.next();
                assert!((20..=60).contains(&request.words) && (10..=30).contains(&request.tokens), "{request:?}");
                counts[request.task] += 1e-4;
            }
            assert!(counts.iter().zip(expected).all(|(a, b): (&f64, f64)| (a - b).abs() < 0.02), "{counts:?}");
        }
    }

    #[test]
    fn texts_differ_and_come_again_with_the_seed() {
        let texts = |seed| {
            let mut source = Source::new(seed, Popularity::Zipf, 4, LENGTHS).unwrap();
            (0..50).map(|_| source.next().text()).collect::<Vec<_>>()
        };
        let mut all = texts(1);
        assert_eq!(all, texts(1));
        all.extend(texts(2));
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 100);
    }
}
