//! A real `loramux serve` for a test, and what it takes to talk to it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub struct Server {
    child: Child,
    pub url: String,
    pub http: reqwest::Client,
    pub store: PathBuf,
    _folder: Option<tempfile::TempDir>,
}

/// A port that nobody listens on now.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
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

    /// On a store that outlives it.
    pub async fn start_on(model: &str, store: &Path, extra: &[&str]) -> Self {
        let listen = format!("127.0.0.1:{}", free_port());
        let child = Command::new(env!("CARGO_BIN_EXE_loramux"))
            .args(["serve", "--model", model, "--listen", &listen, "--store"])
            .arg(store)
            .args(extra)
            .env("LORAMUX_LOG", "warn")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Server {
            child,
            url: format!("http://{listen}"),
            http: reqwest::Client::new(),
            store: store.into(),
            _folder: None,
        };
        let start = Instant::now();
        while !server.get("/health/ready").await.is_ok_and(|(status, _)| status == 200) {
            assert!(start.elapsed() < Duration::from_secs(120), "the server does not become ready");
            assert!(server.child.try_wait().unwrap().is_none(), "the server has stopped");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
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
