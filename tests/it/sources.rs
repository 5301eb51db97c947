//! Adapters from real servers of buckets (S3, Google Cloud Storage, Azure) and of files, to real servers behind a real
//! nginx.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::fixtures;
use crate::host::{Server, answer};

pub fn tiny(folder: &str) -> PathBuf {
    fixtures().join("tiny/llama").join(folder)
}

pub fn base() -> String {
    tiny("base").to_str().unwrap().into()
}

fn python() -> Command {
    Command::new(std::env::var("LORAMUX_TEST_PYTHON").unwrap_or_else(|_| "python3".into()))
}

/// Waits for what a look at the source brings about.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A script in `tests/clients/` that does what it is told line by line, and ends with its input.
pub struct Script {
    process: Child,
    output: BufReader<ChildStdout>,
}

impl Script {
    /// Started, and what it tells first.
    pub fn start(name: &str, arguments: &[&str]) -> (Self, Value) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(name);
        let mut python = python();
        let python = python.arg(script).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = python.spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut script = Script { process, output };
        let told = serde_json::from_str(&script.line()).expect("`make test` installs what the script imports");
        (script, told)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    pub fn say(&mut self, what: &str) {
        writeln!(self.process.stdin.as_mut().unwrap(), "{what}").unwrap();
        assert_eq!(self.line(), "ok\n", "{what}");
    }

    pub fn stop(&mut self) {
        // This closes its input first.
        let _ = self.process.wait();
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.stop();
    }
}

/// `tests/clients/bucket_server.py`.
struct Bucket {
    script: Script,
    /// As `--source` names it.
    source: String,
    /// Variables with which a server may read it, and with which it may not.
    environment: Vec<(String, String)>,
    wrong: Vec<(String, String)>,
    /// What nobody may be told.
    secrets: Vec<String>,
}

impl Bucket {
    /// One on a server of its own of a kind, `s3`, `gs` or `az`. `None` where there is no such server.
    fn start(kind: &str) -> Option<Self> {
        let (script, told) = Script::start("bucket_server.py", &[kind]);
        if let Some(lack) = told["lack"].as_str() {
            eprintln!("SKIPPED: there is no {lack}, so nothing was tested with a bucket at {kind}://");
            return None;
        }
        let text = |value: &Value| value.as_str().unwrap().to_string();
        let variables = |key: &str| -> Vec<(String, String)> {
            told[key].as_object().unwrap().iter().map(|(name, value)| (name.clone(), text(value))).collect()
        };
        let (environment, wrong) = (variables("environment"), variables("wrong"));
        let secrets = told["secrets"].as_array().unwrap().iter().map(text).collect();
        Some(Bucket { script, source: format!("{kind}://adapters/prod"), environment, wrong, secrets })
    }

    fn put(&mut self, name: &str, folder: &str) {
        self.script.say(&format!("put {name} {}", tiny(folder).display()));
    }

    /// A server with these variables and the bucket as its source.
    async fn server(&self, variables: &[(String, String)]) -> Server {
        let variables: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (&**name, &**value)).collect();
        Server::start_with(&base(), &["--source", &self.source, "--source-refresh", "1"], &variables).await
    }

    /// Of what a server says that cannot read the bucket.
    fn is_named_without_secrets(&self, error: &str) {
        assert!(error.contains(&self.source) && self.secrets.iter().all(|secret| !error.contains(secret)), "{error}");
    }
}

pub async fn ask(http: &reqwest::Client, url: &str, adapter: &str) -> (u16, Value) {
    let body = json!({ "prompt": "t5 t6 t7", "max_tokens": 4, "temperature": 0, "ignore_eos": true });
    answer(http.post(format!("{url}/v1/generate?adapter={adapter}")).json(&body)).await.unwrap()
}

/// Names of a server's adapters, those in the tier `remote` or the others.
async fn names(server: &Server, remote: bool) -> HashSet<String> {
    let (status, list) = server.get("/v1/adapters").await.unwrap();
    assert_eq!(status, 200, "{list}");
    let all = list["adapters"].as_array().unwrap().iter();
    all.filter(|a| (a["tier"] == "remote") == remote).map(|a| a["name"].as_str().unwrap().to_string()).collect()
}

/// Waits until a server has failed to look at the bucket, which has stopped, and asks for what only that has.
async fn come_later(server: &Server, url: &str, bucket: &Bucket, names: &[&str]) {
    until("that the bucket is gone is not noticed", async || {
        let (_, metrics) = server.get("/metrics").await.unwrap();
        let errors = format!("loramux_source_errors_total{{source=\"{}\"}} ", bucket.source);
        metrics.as_str().unwrap().lines().any(|line| line.strip_prefix(&errors).is_some_and(|n| n != "0"))
    })
    .await;
    for name in names {
        let body = json!({ "adapter": name, "prompt": "t5" });
        let response = server.http.post(format!("{url}/v1/generate")).json(&body).send().await.unwrap();
        assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (503, "1"));
        bucket.is_named_without_secrets(&response.text().await.unwrap());
    }
}

/// nginx with the configuration in `deploy/`, before these servers. `None` where there is no nginx.
async fn nginx(folder: &Path, servers: &[&Server]) -> Option<(Process, String)> {
    let program = std::env::var("LORAMUX_TEST_NGINX").unwrap_or_else(|_| "nginx".into());
    if Command::new(&program).arg("-v").output().is_err() {
        eprintln!("SKIPPED: there is no {program}, so nothing was tested behind nginx");
        return None;
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/nginx/loramux.conf");
    let mut config = std::fs::read_to_string(file).unwrap();
    for (i, server) in servers.iter().enumerate() {
        let (from, to) = (format!("loramux-{i}:8080"), server.url.trim_start_matches("http://"));
        assert!(config.contains(&from));
        config = config.replace(&from, to);
    }
    config = config.replace("listen 8000", &format!("listen 127.0.0.1:{port}"));
    let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|name| format!("{name}_temp_path {name};\n"));
    // One process, which ends with the test: a worker would outlive its killed master.
    let main = format!(
        "daemon off; master_process off; pid nginx.pid; error_log stderr warn;\nevents {{}}\nhttp {{\naccess_log off;\n{}{config}}}",
        temp.concat()
    );
    std::fs::write(folder.join("nginx.conf"), main).unwrap();
    let child =
        Command::new(&program).arg("-p").arg(folder).args(["-c", "nginx.conf", "-e", "stderr"]).spawn().unwrap();
    let (process, url) = (Process(child), format!("http://127.0.0.1:{port}"));
    until("nginx does not listen", async || reqwest::get(format!("{url}/health/ready")).await.is_ok()).await;
    Some((process, url))
}

/// Two replicas with one bucket: each adapter is served by one of them, what comes into the bucket by both, and without
/// the bucket all that they have.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_a_bucket_behind_nginx() {
    let Some(mut bucket) = Bucket::start("s3") else { return };
    let adapters: Vec<String> = (0..12).map(|i| format!("a{i}")).collect();
    for (i, name) in adapters.iter().enumerate() {
        bucket.put(name, ["adapter_qv_r4", "adapter_all_r8", "adapter_dora_r4"][i % 3]);
    }
    let (first, second) = tokio::join!(bucket.server(&bucket.environment), bucket.server(&bucket.environment));
    let replicas = [&first, &second];
    for replica in replicas {
        until("a replica does not look at the bucket", async || names(replica, true).await.len() == adapters.len())
            .await;
        let (_, models) = replica.get("/v1/models").await.unwrap();
        assert!(models["data"].as_array().unwrap().iter().any(|model| model["id"] == "a11"), "{models}");
        let (_, info) = replica.get("/v1/adapters/a0").await.unwrap();
        assert_eq!((&info["source"], &info["tier"]), (&json!("s3://adapters/prod"), &json!("remote")), "{info}");
        let (status, error) = answer(replica.http.delete(replica.at("/v1/adapters/a0"))).await.unwrap();
        assert!(status == 409 && error.to_string().contains("s3://adapters/prod"), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let Some((_nginx, url)) = nginx(folder.path(), &replicas).await else { return };
    let http = reqwest::Client::new();

    // What a server says that has the adapter as a folder.
    let local = Server::start(&base(), &["--adapters", tiny("").to_str().unwrap()]).await;
    for (i, name) in adapters.iter().enumerate().chain(adapters.iter().enumerate()) {
        let (status, body) = ask(&http, &url, name).await;
        assert_eq!(status, 200, "{name}: {body}");
        let folder = ["adapter_qv_r4", "adapter_all_r8", "adapter_dora_r4"][i % 3];
        let (_, expected) = ask(&http, &local.url, folder).await;
        assert_eq!((&body["text"], &body["generation"]), (&expected["text"], &expected["generation"]), "{name}");
    }
    let (here, there) = (names(&first, false).await, names(&second, false).await);
    assert!(here.is_disjoint(&there) && here.len() + there.len() == adapters.len(), "{here:?} {there:?}");
    assert!(!here.is_empty() && !there.is_empty(), "{here:?} {there:?}");

    // A new one, one that is replaced, and one that goes, while others ask.
    bucket.put("late", "adapter_qv_r4");
    let (status, body) = ask(&http, &url, "late").await;
    assert_eq!(status, 200, "{body}");
    for replica in replicas {
        until("a replica does not see the new adapter", async || {
            replica.get("/v1/adapters/late").await.unwrap().0 == 200
        })
        .await;
    }
    let (_, before) = ask(&http, &url, "a0").await;
    bucket.put("a0", "adapter_rslora_r8");
    let (_, expected) = ask(&http, &local.url, "adapter_rslora_r8").await;
    until("the replaced adapter stays", async || {
        let (status, body) = ask(&http, &url, "a0").await;
        assert_eq!(status, 200, "{body}");
        assert!([&before, &expected].iter().any(|known| known["generation"] == body["generation"]), "{body}");
        body["generation"] == expected["generation"]
    })
    .await;
    bucket.script.say("remove late");
    until("the removed adapter stays", async || ask(&http, &url, "late").await.0 == 404).await;

    // A replica that dies: the other one answers for it.
    second.kill();
    for name in &adapters {
        let (status, body) = ask(&http, &url, name).await;
        assert_eq!(status, 200, "{name}: {body}");
    }

    // The bucket that goes: what was fetched is served, and the base; the rest is told to come later.
    bucket.put("cold", "adapter_qv_r4");
    until("the last one is not seen", async || names(&first, true).await.contains("cold")).await;
    bucket.script.stop();
    come_later(&first, &url, &bucket, &["cold", "unknown"]).await;
    for name in adapters.iter().map(String::as_str).chain(["base"]) {
        assert_eq!(ask(&http, &url, name).await.0, 200, "{name}");
    }
}

/// A server with a bucket of its own: what is in it is listed and served, what comes, changes and goes is noticed, and
/// without the bucket it serves what it has.
async fn is_a_source(kind: &str) {
    const NAME: &str = "a.b_c-1";
    let Some(mut bucket) = Bucket::start(kind) else { return };
    bucket.put(NAME, "adapter_qv_r4");
    let server = bucket.server(&bucket.environment).await;
    let says = async |name: &str| ask(&server.http, &server.url, name).await;
    until("the bucket is not listed", async || names(&server, true).await.contains(NAME)).await;

    // What a server says that has the adapters as folders.
    let local = Server::start(&base(), &["--adapters", tiny("").to_str().unwrap()]).await;
    let (_, old) = ask(&local.http, &local.url, "adapter_qv_r4").await;
    let (_, new) = ask(&local.http, &local.url, "adapter_all_r8").await;
    let is = |body: &Value, known: &Value| ["text", "generation"].iter().all(|key| body[key] == known[key]);
    assert!(!is(&old, &new), "{old}");

    let (status, body) = says(NAME).await;
    assert!(status == 200 && is(&body, &old), "{status} {body}");
    let (_, info) = server.get(&format!("/v1/adapters/{NAME}")).await.unwrap();
    assert_eq!((&info["source"], &info["tier"]), (&json!(bucket.source), &json!("device")), "{info}");
    assert_eq!(says("late").await.0, 404);
    bucket.put("late", "adapter_qv_r4");
    until("a new adapter is not found", async || says("late").await.0 == 200).await;
    bucket.put(NAME, "adapter_all_r8");
    until("the replaced adapter stays", async || {
        let (status, body) = says(NAME).await;
        assert!(status == 200 && (is(&body, &old) || is(&body, &new)), "{status} {body}");
        is(&body, &new)
    })
    .await;
    bucket.script.say(&format!("remove {NAME}"));
    until("the removed adapter stays", async || says(NAME).await.0 == 404).await;

    bucket.put("cold", "adapter_qv_r4");
    until("the last one is not seen", async || names(&server, true).await.contains("cold")).await;
    bucket.script.stop();
    come_later(&server, &server.url, &bucket, &["cold", "unknown"]).await;
    for name in ["late", "base"] {
        assert_eq!(says(name).await.0, 200, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_in_s3_is_a_source() {
    is_a_source("s3").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_in_google_cloud_storage_is_a_source() {
    is_a_source("gs").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_in_azure_is_a_source() {
    is_a_source("az").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_told_without_the_key() {
    for (kind, refusal) in [("s3", "403"), ("gs", "401"), ("az", "403")] {
        let Some(mut bucket) = Bucket::start(kind) else { continue };
        bucket.put("a", "adapter_qv_r4");
        let server = bucket.server(&bucket.wrong).await;
        let (status, error) = ask(&server.http, &server.url, "a").await;
        assert!(status == 503 && error.to_string().contains(refusal), "{kind}: {status} {error}");
        bucket.is_named_without_secrets(&error.to_string());
        assert_eq!(ask(&server.http, &server.url, "base").await.0, 200);
    }
}

#[test]
fn a_malformed_key_is_told_without_the_key() {
    for (kind, key, value, expected) in [
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", "\"the-secret\"", "service account"),
        ("gs", "GOOGLE_SERVICE_ACCOUNT", "no-such-account.json", "no-such-account.json"),
        ("az", "AZURE_STORAGE_ACCOUNT_KEY", "the-secret", "Access Key"),
    ] {
        let (folder, source) = (tempfile::tempdir().unwrap(), format!("{kind}://adapters/prod"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_loramux"));
        // Without a model it stops in any case.
        command.args(["serve", "--model", "nowhere", "--listen", "127.0.0.1:0", "--source", &source, "--store"]);
        command.arg(folder.path()).env("AZURE_STORAGE_ACCOUNT_NAME", "me").env(key, value);
        let output = command.output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(&source) && error.contains(expected), "{error}");
        assert!(!error.contains("the-secret"), "{error}");
    }
}

/// A folder of files that a web server hands out, asked for by name alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_web_server_is_a_source() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        std::fs::create_dir_all(folder.path().join(to)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            // As those who publish do: a file is there whole, or not at all.
            let part = folder.path().join("part");
            std::fs::copy(tiny(from).join(file), &part).unwrap();
            std::fs::rename(part, folder.path().join(to).join(file)).unwrap();
        }
    };
    copy("adapter_qv_r4", "sub/a");
    copy("adapter_qv_r4", "sub/bad");
    let sums = format!("{}  adapter_model.safetensors\n", "0".repeat(64));
    std::fs::write(folder.path().join("sub/bad/SHA256SUMS"), sums).unwrap();
    let mut web = python();
    web.args(["-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory"]).arg(folder.path());
    let mut child = web.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let _web = Process(child);
    // Serving HTTP on 127.0.0.1 port 12345 (http://127.0.0.1:12345/) ...
    let url = line.split(['(', ')']).nth(1).unwrap();
    let source = format!("{}sub", url.replace("http://", "http://me:secret@"));
    // As in a container that has no certificates.
    let none = [("SSL_CERT_FILE", "/dev/null"), ("SSL_CERT_DIR", "/dev/null")];
    let server = Server::start_with(&base(), &["--source", &source, "--source-refresh", "1"], &none).await;
    let (status, body) = ask(&server.http, &server.url, "a").await;
    assert_eq!(status, 200, "{body}");
    let (_, info) = server.get("/v1/adapters/a").await.unwrap();
    assert_eq!((&info["source"], &info["tier"]), (&json!(format!("{url}sub")), &json!("device")), "{info}");
    let (status, error) = ask(&server.http, &server.url, "absent").await;
    assert_eq!(status, 404, "{error}");
    let (status, error) = ask(&server.http, &server.url, "bad").await;
    assert!(status == 422 && error.to_string().contains(&"0".repeat(64)), "{status} {error}");
    assert!(!error.to_string().contains("secret"), "{error}");
    copy("adapter_all_r8", "sub/a");
    until("the replaced adapter stays", async || {
        let (status, now) = ask(&server.http, &server.url, "a").await;
        assert_eq!(status, 200, "{now}");
        now["generation"] != body["generation"]
    })
    .await;
}
