//! Traffic while adapters come, change and go.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::common::{fixtures, packaged};
use crate::host::{Server, answer};

const PROMPT: &str = "The review said the novel was";
const TOKENS: usize = 4;
/// Tasks that change names. Number `t` owns the name `t`, which always stands for something, and `4 + t`, which comes
/// and goes.
const CHANGERS: usize = 4;
const NAMES: usize = 2 * CHANGERS;
/// Longest growth of the resident memory from one churn to the next, equal one. Each of its generations has 1 MiB or
/// more, so that it would show if one in seven stayed.
const GROWTH: i64 = 32 << 20;

/// What adapters are made of here: what one says depends on its kind alone.
struct Kind {
    config: Value,
    weights: Vec<u8>,
    says: String,
}

impl Kind {
    fn new(folder: &str, scale: f64) -> Self {
        let folder = fixtures().join("smollm2").join(folder);
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
        config["lora_alpha"] = json!(config["lora_alpha"].as_f64().unwrap() * scale);
        let weights = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
        Kind { config, weights, says: String::new() }
    }

    /// Uploads it. `number` goes into a field that changes nothing but the generation.
    async fn put(&self, server: &Server, name: &str, number: usize) -> String {
        let mut config = self.config.clone();
        config["revision"] = json!(format!("number {number}"));
        let (status, info) = server.put(name, config.to_string().into(), self.weights.clone()).await;
        assert!(status == 200 || status == 201, "{name}: {status} {info}");
        info["generation"].as_str().unwrap().to_string()
    }
}

/// A name was made to stand for something else. Which of the two holds between `sent` and `done` is open.
struct Change {
    name: usize,
    sent: Instant,
    done: Instant,
    /// The generation and its kind; `None`: the name was removed.
    to: Option<(String, usize)>,
}

/// A request of a client.
struct Asked {
    name: usize,
    start: Instant,
    end: Instant,
    status: u16,
    body: Value,
}

async fn ask(server: &Server, adapter: &str, tokens: usize) -> (u16, Value) {
    let body =
        json!({ "adapter": adapter, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": true });
    server.post("/v1/generate", body).await
}

/// Changes names `count` times in each task while 16 clients ask, and checks every answer. Uploads count from `first`.
async fn churn(server: &Server, kinds: &[Kind], first: usize, count: usize) {
    let (done, changes, answers) = (AtomicBool::new(false), Mutex::new(vec![]), Mutex::new(vec![]));
    let (done, changes, answers) = (&done, &changes, &answers);
    let upload = async |name: usize, number: usize| {
        let (kind, sent) = (number % kinds.len(), Instant::now());
        let generation = kinds[kind].put(server, &format!("a{name}"), number).await;
        let to = Some((generation.clone(), kind));
        changes.lock().unwrap().push(Change { name, sent, done: Instant::now(), to });
        generation
    };
    for name in 0..NAMES {
        upload(name, first + name).await;
    }
    let client = async |c: usize| {
        let mut i = c;
        while !done.load(Ordering::Relaxed) {
            let (name, start) = (i % NAMES, Instant::now());
            i += 3;
            let (status, body) = ask(server, &format!("a{name}"), TOKENS).await;
            answers.lock().unwrap().push(Asked { name, start, end: Instant::now(), status, body });
        }
    };
    let changer = async |t: usize| {
        let mut there = true;
        for i in 0..count {
            let number = first + NAMES + t * count + i;
            let name = if i % 2 == 0 { t } else { CHANGERS + t };
            let url = format!("a{name}");
            if name < CHANGERS || !there {
                let generation = upload(name, number).await;
                there |= name >= CHANGERS;
                let (status, body) = ask(server, &url, 1).await;
                assert_eq!((status, body["generation"].as_str()), (200, Some(&*generation)), "{url} after its upload");
            } else {
                let sent = Instant::now();
                let request = server.http.delete(server.at(&format!("/v1/adapters/{url}")));
                let (status, body) = answer(request).await.unwrap();
                assert_eq!(status, 200, "{url}: {body}");
                there = false;
                changes.lock().unwrap().push(Change { name, sent, done: Instant::now(), to: None });
                assert_eq!(ask(server, &url, 1).await.0, 404, "{url} after its removal");
            }
        }
    };
    let change = async {
        futures::future::join_all((0..CHANGERS).map(changer)).await;
        done.store(true, Ordering::Relaxed);
    };
    tokio::join!(futures::future::join_all((0..16).map(client)), change);

    check(kinds, &changes.lock().unwrap(), &answers.lock().unwrap());
    let start = Instant::now();
    loop {
        let (_, list) = server.get("/v1/adapters").await.unwrap();
        if list["adapters"].as_array().unwrap().iter().all(|adapter| adapter["in_flight"] == 0) {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "held by nobody's requests: {list}");
    }
}

/// Every answer is of a generation that its name stood for at some time of the request, and says what that one says.
fn check(kinds: &[Kind], changes: &[Change], answers: &[Asked]) {
    let (mut gone, mut old) = (0, 0);
    for Asked { name, start, end, status, body } in answers {
        let history: Vec<&Change> = changes.iter().filter(|c| c.name == *name).collect();
        let held = |i: usize| history[i].sent <= *end && history.get(i + 1).is_none_or(|next| next.done >= *start);
        let told = match status {
            200 => body["generation"].as_str(),
            404 => None,
            _ => panic!("a{name}: {status} {body}"),
        };
        let which = (0..history.len()).find(|&i| history[i].to.as_ref().map(|(g, _)| &**g) == told && held(i));
        let which = which.unwrap_or_else(|| panic!("a{name} stood for {told:?} at no time of a request: {body}"));
        gone += usize::from(told.is_none());
        old += usize::from(which + 1 < history.len());
        if let Some((_, kind)) = history[which].to {
            assert_eq!(body["text"], kinds[kind].says, "a{name}: {body}");
        }
    }
    println!("{} changes, {} answers, {gone} of a name that was gone", changes.len(), answers.len());
    assert!(gone > 0 && old > answers.len() / 2, "{gone} gone, {old} later replaced: the traffic met few changes");
    assert!(answers.len() >= 200, "{} answers", answers.len());
}

/// 16 clients on 8 adapters, 200 changes meanwhile, most requests with a load from the disk, since the adapters do not
/// fit the memory together.
#[tokio::test(flavor = "multi_thread")]
async fn traffic_goes_on_while_adapters_change() {
    // A KV cache so small that the first round touches all of it.
    let server = Server::start(&packaged(), &["--kv-memory", "48MiB", "--adapter-memory", "3MiB"]).await;
    let plain =
        [("adapter_causal_r8", 1.0), ("adapter_causal_r8", 12.0), ("adapter_seqcls", 1.0), ("adapter_seqcls", 12.0)];
    let mut kinds = plain.map(|(folder, scale)| Kind::new(folder, scale));
    // What each kind says, asked for in peace.
    for kind in &mut kinds {
        kind.put(&server, "probe", 0).await;
        let (status, body) = ask(&server, "probe", TOKENS).await;
        assert_eq!(status, 200, "{body}");
        kind.says = body["text"].as_str().unwrap().into();
    }
    let texts: HashSet<&str> = kinds.iter().map(|k| k.says.as_str()).collect();
    assert_eq!(texts.len(), kinds.len(), "the kinds do not differ: {texts:?}");

    churn(&server, &kinds, 1000, 50).await;
    let before = server.memory() as i64;
    churn(&server, &kinds, 2000, 50).await;
    let grown = server.memory() as i64 - before;
    println!("{} MiB before, {} KiB more after", before >> 20, grown >> 10);
    assert!(grown < GROWTH, "memory grew by {grown} bytes, from {before}");

    let (_, metrics) = server.get("/metrics").await.unwrap();
    let loads = metrics
        .as_str()
        .unwrap()
        .lines()
        .find_map(|l| l.strip_prefix("loramux_adapter_load_seconds_count{from=\"disk\"} ")?.parse::<f64>().ok());
    assert!(loads.is_some_and(|n| n > 100.0), "{loads:?} loads from the disk");
    let objects = walk(&server.store);
    assert!(objects < 24 << 20, "the store holds {objects} bytes; nine adapters have less than 2 MiB each");
    server.left_nothing().await;
}

/// Those who wait for adapters have places in the queue, and those for whom there is none are refused at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_for_cold_adapters_is_no_longer_than_the_queue() {
    // Memory for one adapter.
    let server = Server::start(&packaged(), &["--max-queue", "2", "--adapter-memory", "1MiB"]).await;
    let kind = Kind::new("adapter_causal_r8", 1.0);
    let names: Vec<String> = (0..6).map(|i| format!("a{i}")).collect();
    for (number, name) in names.iter().enumerate() {
        kind.put(&server, name, number).await;
    }
    let crowd = async {
        while server.metric("vllm:num_requests_running").await < 1.0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let asked = names[1..].iter().map(async |name| {
            let (start, (status, body)) = (Instant::now(), ask(&server, name, TOKENS).await);
            (status, body, start.elapsed())
        });
        let waiting = async {
            while server.metric("loramux_queue_length").await < 2.0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            server.metric("vllm:num_requests_waiting").await
        };
        futures::join!(futures::future::join_all(asked), waiting)
    };
    // It holds the memory while the others come.
    let ((status, body), (answers, waiting)) = futures::join!(ask(&server, &names[0], 400), crowd);
    assert_eq!((status, waiting), (200, 2.0), "{body}");
    let refused: Vec<_> = answers.iter().filter(|(status, ..)| *status == 429).collect();
    assert_eq!(refused.len(), 3, "{answers:?}");
    let first_answered = answers.iter().filter(|(status, ..)| *status == 200).map(|(.., took)| *took).min();
    for (_, body, took) in refused {
        assert!(body["error"]["message"].as_str().unwrap().contains("2 requests wait already"), "{body}");
        assert!(Some(*took) < first_answered, "{answers:?}");
    }
    let full = "loramux_requests_total{adapter=\"other\",route=\"/v1/generate\",status=\"429\"}";
    assert_eq!(server.metric(full).await, 3.0);
    server.left_nothing().await;
}

fn walk(folder: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    entries.map(|e| if e.path().is_dir() { walk(&e.path()) } else { e.metadata().unwrap().len() }).sum()
}

/// A name and what its client, which alone changes it, knows that it stands for: a kind, or no adapter.
#[derive(Debug, Clone)]
struct Known {
    name: String,
    /// After the last change that was answered.
    answered: Option<usize>,
    /// By the change that was not, when the server was killed.
    asked: Option<Option<usize>>,
}

impl Known {
    /// Changes the name again and again until nobody answers; returns how many changes were answered, too.
    async fn change(
        mut self,
        http: reqwest::Client,
        url: String,
        kinds: Arc<Vec<[Vec<u8>; 2]>>,
        seed: u64,
    ) -> (Self, usize) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let url = format!("{url}/v1/adapters/{}", self.name);
        for count in 0.. {
            let to = Some(random.random_range(0..=kinds.len())).filter(|kind| *kind < kinds.len());
            self.asked = Some(to);
            let request = match to {
                None => http.delete(&url),
                Some(kind) => {
                    let part = |bytes: &Vec<u8>| reqwest::multipart::Part::bytes(bytes.clone()).file_name("f");
                    let [config, weights] = &kinds[kind];
                    let form = reqwest::multipart::Form::new();
                    http.put(&url).multipart(form.part("config", part(config)).part("weights", part(weights)))
                }
            };
            let Ok((status, body)) = answer(request).await else { return (self, count) };
            let nothing = to.is_none() && self.answered.is_none();
            assert!(if nothing { status == 404 } else { status < 300 }, "{self:?}: {status} {body}");
            (self.answered, self.asked) = (to, None);
        }
        unreachable!("it ends by an error")
    }
}

/// Killed at random instants during uploads, replacements and deletions, the server has after each start what was answered, or
/// what was asked last; each adapter is whole, and there is nothing else. `LORAMUX_TEST_KILLS` says how often.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_survives_kill_9() {
    let kills: usize = std::env::var("LORAMUX_TEST_KILLS").ok().map_or(12, |kills| kills.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("s/store");
    let tiny = fixtures().join("tiny/llama");
    let base = tiny.join("base").display().to_string();
    let kinds = ["adapter_qv_r4", "adapter_all_r8", "adapter_dora_r4"].map(|kind| {
        ["adapter_config.json", "adapter_model.safetensors"]
            .map(|file| std::fs::read(tiny.join(kind).join(file)).unwrap())
    });
    let mut generations = vec![];
    let server = Server::start(&base, &[]).await;
    for [config, weights] in &kinds {
        let (status, info) = server.put("x", config.clone(), weights.clone()).await;
        assert!(status < 300, "{info}");
        generations.push(info["generation"].as_str().unwrap().to_string());
    }
    server.kill();
    let kinds = Arc::new(kinds.to_vec());
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut names: Vec<Known> = (0..3).map(|i| Known { name: format!("n{i}"), answered: None, asked: None }).collect();
    let (mut open, mut answers) = (0, 0);
    for kill in 0..=kills {
        let server = Server::start_on(&base, &store, &[]).await;
        let (_, list) = server.get("/v1/adapters").await.unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_string();
        let adapters = list["adapters"].as_array().unwrap().iter();
        let list: HashMap<String, String> = adapters.map(|a| (text(&a["name"]), text(&a["generation"]))).collect();
        for known in &mut names {
            let now = list.get(&known.name).map(|now| generations.iter().position(|one| one == now).unwrap());
            assert!(
                [Some(known.answered), known.asked].contains(&Some(now)),
                "after kill {kill}: {now:?} is not {known:?}"
            );
            open += usize::from(known.asked.take().is_some());
            known.answered = now;
            let body = json!({ "adapter": known.name, "prompt": "t5 t6", "max_tokens": 2 });
            let (status, body) = server.post("/v1/generate", body).await;
            assert_eq!(status, if now.is_some() { 200 } else { 404 }, "after kill {kill}: {body}");
        }
        server.left_nothing().await;
        let objects = std::fs::read_dir(store.join("objects")).unwrap();
        let objects: HashSet<String> = objects.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(objects, list.into_values().collect::<HashSet<_>>(), "after kill {kill}");
        if kill == kills {
            break;
        }
        let clients: Vec<_> = names
            .drain(..)
            .map(|known| {
                tokio::spawn(known.change(server.http.clone(), server.url.clone(), kinds.clone(), random.random()))
            })
            .collect();
        tokio::time::sleep(Duration::from_micros(random.random_range(0..150_000))).await;
        server.kill();
        for client in clients {
            let (known, count) = client.await.unwrap();
            names.push(known);
            answers += count;
        }
    }
    assert!(open > kills && answers > kills, "{open} changes were open at {kills} kills, {answers} were answered");
}
