//! A real `loramux serve` for a test, and what it takes to talk to it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What the store's folder has in it.
const STORE: [&str; 4] = ["incoming", "lock", "names", "objects"];

pub struct Server {
    child: Child,
    pub url: String,
    pub http: reqwest::Client,
    pub store: PathBuf,
    _folder: Option<tempfile::TempDir>,
}

impl Server {
    /// With a store of its own.
    pub async fn start(model: &str, extra: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        let mut server = Self::start_on(model, &store, extra).await;
        server._folder = Some(folder);
        server
    }

    /// With a store and variables of its own.
    pub async fn start_with(model: &str, extra: &[&str], variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        let mut server = Self::listening_with(model, &store, extra, variables).ready().await;
        server._folder = Some(folder);
        server
    }

    /// On a store that outlives it.
    pub async fn start_on(model: &str, store: &Path, extra: &[&str]) -> Self {
        Self::listening(model, store, extra).ready().await
    }

    /// Waits until it answers.
    pub async fn ready(mut self) -> Self {
        let server = &mut self;
        let start = Instant::now();
        while !server.get("/health/ready").await.is_ok_and(|(status, _)| status == 200) {
            assert!(server.child.try_wait().unwrap().is_none(), "the server has stopped");
            assert!(start.elapsed() < Duration::from_secs(120), "the server does not become ready");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self
    }

    /// One that has a port, and loads its model still.
    pub fn listening(model: &str, store: &Path, extra: &[&str]) -> Self {
        Self::listening_with(model, store, extra, &[])
    }

    /// The same with more environment.
    pub fn listening_with(model: &str, store: &Path, extra: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::listening_as(Command::new(env!("CARGO_BIN_EXE_loramux")), model, store, extra, variables)
    }

    /// The same of a command that becomes the program.
    pub fn listening_as(
        mut command: Command,
        model: &str,
        store: &Path,
        extra: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut child = command
            .args(["serve", "--model", model, "--listen", "127.0.0.1:0", "--store"])
            .arg(store)
            .args(extra)
            .env("LORAMUX_LOG", "warn,loramux::server=info")
            .envs(variables.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, address) = mpsc::channel();
        let log = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                match line.split_once("listening on ") {
                    Some((_, url)) => sender.send(url.trim().to_string()).unwrap_or_default(),
                    None => eprintln!("{line}"),
                }
            }
        });
        let url = address.recv_timeout(Duration::from_secs(20));
        let mut server = Server {
            child,
            url: url.clone().unwrap_or_default(),
            http: reqwest::Client::new(),
            store: store.into(),
            _folder: None,
        };
        assert!(url.is_ok(), "the server does not listen: {:?}", server.child.try_wait());
        server
    }

    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    pub async fn get(&self, path: &str) -> reqwest::Result<(u16, Value)> {
        answer(self.http.get(self.at(path))).await
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        answer(self.http.post(self.at(path)).json(&body)).await.unwrap()
    }

    /// Puts an adapter's files under a name.
    pub async fn put(&self, name: &str, config: Vec<u8>, weights: Vec<u8>) -> (u16, Value) {
        let part = |bytes| reqwest::multipart::Part::bytes(bytes).file_name("f");
        let form = reqwest::multipart::Form::new().part("config", part(config)).part("weights", part(weights));
        answer(self.http.put(self.at(&format!("/v1/adapters/{name}"))).multipart(form)).await.unwrap()
    }

    pub async fn put_directory(&self, name: &str, directory: &Path) -> (u16, Value) {
        let read = |file: &str| std::fs::read(directory.join(file)).unwrap();
        self.put(name, read("adapter_config.json"), read("adapter_model.safetensors")).await
    }

    /// What the base says, to see that the server goes on.
    pub async fn still_answers(&self) {
        let (status, body) = self.post("/v1/generate", json!({ "prompt": "t5 t6 t7", "max_tokens": 3 })).await;
        assert_eq!(status, 200, "{body}");
        assert_eq!(body["usage"]["completion_tokens"], 3, "{body}");
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in bytes.
    pub fn memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
    }

    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status().unwrap().success());
    }

    /// Waits for the process to end.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < limit, "the server still runs after {limit:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A value in the metrics: the first whose line begins so.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics").await.unwrap();
        let text = text.as_str().unwrap();
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until no upload is half done, and looks for files outside of where they belong.
    pub async fn left_nothing(&self) {
        let names = |folder: &Path| -> Vec<String> {
            let entries = std::fs::read_dir(folder).unwrap();
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
        };
        let start = Instant::now();
        while let Some(name) = names(&self.store.join("incoming")).first() {
            assert!(start.elapsed() < Duration::from_secs(10), "incoming/{name} stays");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut there = names(&self.store);
        there.sort();
        assert_eq!(there, STORE, "in the store");
        // The store's own folder is a temporary one with nothing else in it.
        assert_eq!(names(self.store.parent().unwrap()), ["store"]);
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status and body; a body that is not JSON becomes a text.
pub async fn answer(request: reqwest::RequestBuilder) -> reqwest::Result<(u16, Value)> {
    let response = request.send().await?;
    let status = response.status().as_u16();
    let text = response.text().await?;
    Ok((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
}
