//! What goes wrong beneath a running server: a disk that is full, or takes nothing more; files that change, or may not be read
//! any more; a source that hangs; a clock that jumps.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::common::fixtures;
use crate::host::{Server, answer};
use crate::sources::until;

/// Something mounted on a folder, until dropped.
struct Mount(PathBuf);

impl Mount {
    /// A file system in memory, of so many KiB. `None` where nobody may mount one.
    fn memory(folder: &Path, size: usize) -> Option<Self> {
        mount(&["-t", "tmpfs", "-o", &format!("size={size}k"), "none"], folder)
    }

    /// The folder itself, where nothing can be written.
    fn read_only(folder: &Path) -> Option<Self> {
        let mounted = mount(&["--bind", &folder.display().to_string()], folder)?;
        run(&["-o", "remount,bind,ro"], folder).then_some(mounted)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l".as_ref(), self.0.as_os_str()]).status();
    }
}

fn run(options: &[&str], at: &Path) -> bool {
    Command::new("mount").args(options).arg(at).output().is_ok_and(|output| output.status.success())
}

fn mount(options: &[&str], at: &Path) -> Option<Mount> {
    let mounted = run(options, at);
    if !mounted {
        eprintln!("nothing was tested: a file system cannot be mounted here");
    }
    mounted.then(|| Mount(at.into()))
}

async fn says(server: &Server, adapter: &str) -> (u16, Value) {
    server.post("/v1/generate", json!({ "adapter": adapter, "prompt": "t5 t6", "max_tokens": 2 })).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_uploads_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_disk) = Mount::memory(folder.path(), 256) else { return };
    let store = folder.path().join("s/store");
    let tiny = fixtures().join("tiny/llama");
    let base = tiny.join("base").display().to_string();
    let server = Server::start_on(&base, &store, &[]).await;
    let (status, kept) = server.put_directory("kept", &tiny.join("adapter_qv_r4")).await;
    assert_eq!(status, 201, "{kept}");
    let weights = std::fs::read(tiny.join("adapter_all_r8/adapter_model.safetensors")).unwrap();
    let config = std::fs::read_to_string(tiny.join("adapter_all_r8/adapter_config.json")).unwrap();
    // Each is another adapter, so that the disk holds them all.
    let numbered = |i: usize| config.replacen('{', &format!("{{\"revision\": \"{i}\","), 1).into_bytes();
    let mut published = vec![];
    let refused = loop {
        let name = format!("n{}", published.len());
        let (status, body) = server.put(&name, numbered(published.len()), weights.clone()).await;
        if status != 201 {
            break (status, body);
        }
        published.push(name);
        assert!(published.len() < 100, "the disk is never full");
    };
    let message = refused.1["error"]["message"].as_str().unwrap_or_default();
    assert!(refused.0 == 503 && message.contains("disk is full"), "{refused:?}");
    for name in published.iter().map(String::as_str).chain(["kept"]) {
        assert_eq!(says(&server, name).await.0, 200, "{name}");
    }
    assert_eq!(says(&server, &format!("n{}", published.len())).await.0, 404);
    // Room for one more, where one goes.
    let (status, body) = delete(&server, &published[0]).await;
    assert_eq!(status, 200, "{body}");
    let (status, body) = server.put("again", numbered(1000), weights).await;
    assert_eq!(status, 201, "{body}");
    server.kill();
    let server = Server::start_on(&base, &store, &[]).await;
    for name in published[1..].iter().map(String::as_str).chain(["kept", "again"]) {
        assert_eq!(says(&server, name).await.0, 200, "{name}");
    }
    server.left_nothing().await;
}

async fn delete(server: &Server, name: &str) -> (u16, Value) {
    crate::host::answer(server.http.delete(server.at(&format!("/v1/adapters/{name}")))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_nothing_more_fails_changes_and_nothing_else() {
    let tiny = fixtures().join("tiny/llama");
    let server = Server::start(&tiny.join("base").display().to_string(), &[]).await;
    assert_eq!(server.put_directory("kept", &tiny.join("adapter_qv_r4")).await.0, 201);
    let Some(names) = Mount::read_only(&server.store.join("names")) else { return };
    let incoming = Mount::read_only(&server.store.join("incoming")).unwrap();
    for outcome in [server.put_directory("new", &tiny.join("adapter_all_r8")).await, delete(&server, "kept").await] {
        let message = outcome.1["error"]["message"].as_str().unwrap_or_default();
        assert!(outcome.0 >= 500 && message.to_lowercase().contains("read-only"), "{outcome:?}");
    }
    // Where files can come in, but get no name.
    drop(incoming);
    let (status, body) = server.put_directory("new", &tiny.join("adapter_all_r8")).await;
    assert!(status >= 500 && body["error"]["message"].as_str().unwrap().contains("names"), "{status} {body}");
    assert_eq!((says(&server, "kept").await.0, says(&server, "new").await.0), (200, 404));
    drop(names);
    assert_eq!(server.put_directory("new", &tiny.join("adapter_all_r8")).await.0, 201);
    assert_eq!(delete(&server, "kept").await.0, 200);
    assert_eq!((says(&server, "kept").await.0, says(&server, "new").await.0), (404, 200));
    server.left_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_cut_short_under_the_server_fails_its_adapter_alone() {
    let tiny = fixtures().join("tiny/llama");
    let server = Server::start(&tiny.join("base").display().to_string(), &[]).await;
    let (_, broken) = server.put_directory("broken", &tiny.join("adapter_all_r8")).await;
    assert_eq!(server.put_directory("whole", &tiny.join("adapter_qv_r4")).await.0, 201);
    let weights =
        server.store.join("objects").join(broken["generation"].as_str().unwrap()).join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let asking = says(&server, "broken").await;
    assert_eq!(asking.0, 200);
    std::fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(bytes.len() as u64 / 2).unwrap();
    // In memory it is whole.
    assert_eq!(says(&server, "broken").await.1["text"], asking.1["text"]);
    // Unloaded, it stays in memory for as long as the request before holds it, which may be a moment longer than its answer.
    let (mut status, mut body) = (200, Value::Null);
    for _ in 0..100 {
        assert_eq!(server.post("/v1/adapters/broken/unload", json!({})).await.0, 200);
        tokio::time::sleep(Duration::from_millis(10)).await;
        (status, body) = says(&server, "broken").await;
        if status != 200 {
            break;
        }
    }
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert!(status >= 400 && message.contains("broken"), "{status} {body}");
    assert_eq!(says(&server, "whole").await.0, 200);
    server.still_answers().await;
    std::fs::write(&weights, bytes).unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(says(&server, "broken").await.1["text"], asking.1["text"]);
}

/// The program without the right to read what its files' permissions forbid, which root has.
fn without_privileges(folder: &Path) -> Option<Command> {
    let program = env!("CARGO_BIN_EXE_loramux");
    if std::fs::metadata(folder).unwrap().uid() != 0 {
        return Some(Command::new(program));
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-dac_override,-dac_read_search"]);
    if !Command::new("setpriv").args(["--bounding-set", "-dac_override", "true"]).status().is_ok_and(|s| s.success()) {
        eprintln!("SKIPPED: root cannot give up its rights here, so nothing was tested");
        return None;
    }
    command.arg(program);
    Some(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_may_not_be_read_fail_their_adapter_alone() {
    let folder = tempfile::tempdir().unwrap();
    let Some(program) = without_privileges(folder.path()) else { return };
    let (tiny, keys) = (fixtures().join("tiny/llama"), folder.path().join("keys.toml"));
    std::fs::write(&keys, key_file(&[("root", "infer', 'admin", "")])).unwrap();
    let options = ["--keys", &keys.display().to_string()];
    let store = folder.path().join("store");
    let mut server = Server::listening_as(program, &tiny.join("base").display().to_string(), &store, &options, &[]);
    server.http = bearing("root");
    let server = server.ready().await;
    let (_, lost) = server.put_directory("lost", &tiny.join("adapter_all_r8")).await;
    assert_eq!(server.put_directory("kept", &tiny.join("adapter_qv_r4")).await.0, 201);
    let text = says(&server, "lost").await.1["text"].clone();
    let object = store.join("objects").join(lost["generation"].as_str().unwrap());
    let allow = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    let before = std::fs::metadata(&object).unwrap().mode();
    allow(&object, 0);
    allow(&keys, 0);
    // In memory it is there.
    assert_eq!(says(&server, "lost").await.1["text"], text);
    // What the engine still holds for an instant after its answer would be found again.
    until("an answered request is still in flight", async || {
        server.get("/v1/adapters/lost").await.unwrap().1["in_flight"] == 0
    })
    .await;
    assert_eq!(server.post("/v1/adapters/lost/unload", json!({})).await.0, 200);
    let (status, body) = says(&server, "lost").await;
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert!(status >= 400 && message.contains("lost") && message.contains("ermission denied"), "{status} {body}");
    assert_eq!(says(&server, "kept").await.0, 200);
    server.still_answers().await;
    allow(&object, before);
    assert_eq!(says(&server, "lost").await.1["text"], text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_hangs_fails_what_it_may_have_and_nothing_else() {
    let tiny = fixtures().join("tiny/llama");
    // It takes connections, and never says anything.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/adapters", silent.local_addr().unwrap());
    let server = Server::start(&tiny.join("base").display().to_string(), &["--source", &url]).await;
    assert_eq!(server.put_directory("kept", &tiny.join("adapter_qv_r4")).await.0, 201);
    let body = json!({ "adapter": "far", "prompt": "t5", "max_tokens": 1 });
    let impatient = server.http.post(server.at("/v1/generate")).header("x-request-timeout", "1").json(&body);
    assert_eq!(answer(impatient).await.unwrap().0, 504);
    let far = tokio::spawn(answer(server.http.post(server.at("/v1/generate")).json(&body)));
    let mut others = 0;
    while !far.is_finished() {
        assert_eq!(says(&server, "kept").await.0, 200);
        server.still_answers().await;
        others += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (status, body) = far.await.unwrap().unwrap();
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert!(status == 503 && message.contains(&url) && message.contains("nothing came"), "{status} {body}");
    assert!(others > 10, "only {others} others were answered meanwhile");
}

/// A file of keys that are their own names, each with scopes and limits.
fn key_file(keys: &[(&str, &str, &str)]) -> String {
    use sha2::{Digest, Sha256};
    let hash = |name: &str| Sha256::digest(name).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let lines = keys.iter().map(|(name, scopes, limits)| {
        format!("[keys.{name}]\nsha256 = '{}'\nscopes = ['{scopes}']\n{limits}\n", hash(name))
    });
    lines.collect()
}

/// A client with a key.
fn bearing(key: &str) -> reqwest::Client {
    let header = (reqwest::header::AUTHORIZATION, format!("Bearer {key}").parse().unwrap());
    reqwest::Client::builder().default_headers([header].into_iter().collect()).build().unwrap()
}

/// A wall clock that can be set.
struct Clock {
    library: String,
    offset: PathBuf,
}

impl Clock {
    /// `None` where there is no libfaketime.
    fn new(folder: &Path) -> Option<Self> {
        let library = std::env::var("LORAMUX_TEST_FAKETIME").ok().filter(|library| Path::new(library).exists());
        if library.is_none() {
            eprintln!("SKIPPED: there is no libfaketime, so no clock jumped");
        }
        let clock = Clock { library: library?, offset: folder.join("offset") };
        clock.jump(0);
        Some(clock)
    }

    /// Only the wall clock, as when somebody sets it: files keep the times that they have, and no waiting is cut short.
    fn variables(&self) -> [(&str, &str); 5] {
        [
            ("LD_PRELOAD", &*self.library),
            ("FAKETIME_TIMESTAMP_FILE", self.offset.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ]
    }

    /// Sets it to so many days from now.
    fn jump(&self, days: i64) {
        let new = self.offset.with_extension("new");
        std::fs::write(&new, format!("{:+}", days * DAY as i64)).unwrap();
        std::fs::rename(new, &self.offset).unwrap();
    }
}

const DAY: u64 = 86_400;

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_is_nothing_to_requests() {
    let folder = tempfile::tempdir().unwrap();
    let Some(clock) = Clock::new(folder.path()) else { return };
    let (tiny, store, keys) =
        (fixtures().join("tiny/llama"), folder.path().join("s/store"), folder.path().join("keys.toml"));
    let limits = [("root", "infer', 'admin', 'metrics", ""), ("once", "infer", "requests-per-minute = 1")];
    std::fs::write(&keys, key_file(&limits)).unwrap();
    let (collector, spans) = crate::traces::collector();
    let mut variables = clock.variables().to_vec();
    variables.extend([("OTEL_EXPORTER_OTLP_ENDPOINT", collector.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "100")]);
    let (base, options) = (tiny.join("base").display().to_string(), ["--keys", &keys.display().to_string()]);
    let start = async || {
        let mut server = Server::listening_with(&base, &store, &options, &variables);
        server.http = bearing("root");
        server.ready().await
    };
    let mut server = start().await;
    let unix = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();

    // What runs over jumps ends as without.
    let prompts: Vec<String> = (0..32).map(|i| format!("t{} t6", 5 + i)).collect();
    let body = json!({ "prompt": prompts, "n": 2, "max_tokens": 200, "temperature": 0, "ignore_eos": true });
    let long = || {
        let request = server.http.post(server.at("/v1/completions")).header("x-request-timeout", "300").json(&body);
        answer(request)
    };
    let (status, expected) = long().await.unwrap();
    assert_eq!(status, 200, "{expected}");
    let running = tokio::spawn(long());
    let mut jumps = 0;
    while !running.is_finished() {
        clock.jump([1, 0, -1, 0][jumps % 4]);
        jumps += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (status, found) = running.await.unwrap().unwrap();
    assert_eq!((status, &found["choices"]), (200, &expected["choices"]), "{found}");
    assert!(jumps > 4, "{jumps} jumps only");

    // A limit is no tighter and no wider.
    clock.jump(0);
    let once = bearing("once");
    let ask = || {
        let body = json!({ "prompt": "t5", "max_tokens": 1 });
        once.post(server.at("/v1/generate")).json(&body).send()
    };
    let first = Instant::now();
    assert_eq!(ask().await.unwrap().status(), 200);
    for days in [1, 0, -1] {
        clock.jump(days);
        let refused = ask().await.unwrap();
        if first.elapsed() > Duration::from_secs(55) {
            break;
        }
        assert_eq!(refused.status(), 429, "{days}");
        let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=60).contains(&wait), "{wait}");
    }

    // The last that was put stands, though the clock says that it came first.
    clock.jump(1);
    let (status, newer) = server.put_directory("a", &tiny.join("adapter_all_r8")).await;
    assert_eq!(status, 201, "{newer}");
    assert!(newer["created"].as_u64().unwrap() > unix() + DAY - 600, "the clock has not jumped: {newer}");
    assert_eq!(says(&server, "a").await.0, 200);
    clock.jump(-1);
    let (status, older) = server.put_directory("a", &tiny.join("adapter_qv_r4")).await;
    assert_eq!(status, 200, "{older}");
    assert!(older["created"].as_u64() < newer["created"].as_u64(), "{older}");
    assert_eq!(says(&server, "a").await.1["generation"], older["generation"]);
    let used = server.get("/v1/adapters/a").await.unwrap().1["last_used"].as_u64().unwrap();
    assert!(used < unix(), "it was last used in the future: {used}");

    // New keys are seen, also with a file that is older than the one before.
    std::fs::write(&keys, key_file(&[limits[0], limits[1], ("late", "infer", "")])).unwrap();
    let file = std::fs::File::options().write(true).open(&keys).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(DAY)).unwrap();
    let (late, start_of_wait) = (bearing("late"), Instant::now());
    while late.get(server.at("/v1/models")).send().await.unwrap().status() != 200 {
        assert!(start_of_wait.elapsed() < Duration::from_secs(30), "the new key is not known");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let (_, metrics) = server.get("/metrics").await.unwrap();
    for line in metrics.as_str().unwrap().lines().filter(|line| !line.starts_with('#')) {
        let value: f64 = line.rsplit_once(' ').unwrap().1.parse().unwrap();
        assert!(value >= 0.0, "{line}");
        assert!(!line.contains("seconds_sum") || value < DAY as f64 / 2.0, "{line}");
    }
    server.signal("TERM");
    assert!(server.ended(Duration::from_secs(20)).await.success());
    let mut told = 0;
    while let Ok(request) = spans.recv_timeout(Duration::from_millis(500)) {
        let scopes = request.resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
        for span in scopes.flat_map(|scope| scope.spans) {
            let seconds =
                span.end_time_unix_nano.checked_sub(span.start_time_unix_nano).map(|nanos| nanos / 1_000_000_000);
            assert!(seconds.is_some_and(|seconds| seconds < DAY / 2), "{span:?}");
            told += 1;
        }
    }
    assert!(told > 8, "{told} spans");
    let server = start().await;
    assert_eq!(says(&server, "a").await.1["generation"], older["generation"]);
}
