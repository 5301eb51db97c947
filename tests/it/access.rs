//! Keys, tenants, limits, deadlines, HTTPS and the audit log, over HTTP.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use loramux::base::DEFAULT_MODEL;
use serde_json::{Value, json};

use crate::common::fixtures;
use crate::host::{Server, answer};

/// What asks for no key.
const OPEN: [(&str, &str); 8] = [
    ("get", "/"),
    ("get", "/assets/{file}"),
    ("get", "/health"),
    ("get", "/health/live"),
    ("get", "/health/ready"),
    ("get", "/openapi.json"),
    ("get", "/ping"),
    ("get", "/version"),
];

fn tiny(name: &str) -> PathBuf {
    fixtures().join("tiny/llama").join(name)
}

fn base() -> String {
    tiny("base").display().to_string()
}

/// Runs the program for what it prints.
fn loramux(args: &[&str]) -> Result<String, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_loramux")).args(args).output().unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap().trim().to_string()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

/// A new key in the file.
fn key(file: &Path, id: &str, more: &[&str]) -> String {
    loramux(&[&["keys", "new", &file.display().to_string(), id], more].concat()).unwrap()
}

/// A client with a key.
struct Holder<'a> {
    server: &'a Server,
    key: String,
}

impl Holder<'_> {
    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
        self.server.http.request(method, self.server.at(path)).bearer_auth(&self.key)
    }

    async fn ask(&self, method: &str, path: &str) -> (u16, Value) {
        answer(self.request(method, path)).await.unwrap()
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        answer(self.request("post", path).json(&body)).await.unwrap()
    }

    async fn put(&self, name: &str, adapter: &str) -> (u16, Value) {
        let read = |file: &str| {
            let bytes = std::fs::read(tiny(adapter).join(file)).unwrap();
            reqwest::multipart::Part::bytes(bytes).file_name(file.to_string())
        };
        let form = reqwest::multipart::Form::new()
            .part("config", read("adapter_config.json"))
            .part("weights", read("adapter_model.safetensors"));
        answer(self.request("put", &format!("/v1/adapters/{name}")).multipart(form)).await.unwrap()
    }

    /// Status, and the generation that answered.
    async fn generate(&self, adapter: &str) -> (u16, Value) {
        let body = json!({ "adapter": adapter, "prompt": "t5 t6 t7", "max_tokens": 3 });
        let (status, body) = self.post("/v1/generate", body).await;
        if status == 200 {
            assert_eq!(body["adapter"], adapter);
        }
        (status, body["generation"].clone())
    }

    async fn names(&self) -> Vec<String> {
        let (status, list) = self.ask("get", "/v1/adapters").await;
        assert_eq!(status, 200, "{list}");
        list["adapters"].as_array().unwrap().iter().map(|a| a["name"].as_str().unwrap().to_string()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_asks_for_its_scope() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let keys = ["infer", "admin", "metrics"].map(|scope| (scope, key(&file, scope, &["--scopes", scope])));
    let server = Server::start(&base(), &["--keys", &file.display().to_string()]).await;
    let (_, document) = server.get("/openapi.json").await.unwrap();
    let mut open = vec![];
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let place = path.replace("{name}", "no").replace("{file}", "app.js").replace("{id}", "base");
            let send = |key: &str| {
                let holder = Holder { server: &server, key: key.into() };
                let request = holder.request(method, &place);
                async move { request.body("{}").send().await.unwrap() }
            };
            let nobody = send("nobody").await;
            if nobody.status() != 401 {
                open.push((method.clone(), path.clone()));
                continue;
            }
            assert_eq!(nobody.headers()["www-authenticate"], "Bearer", "{method} {path}");
            let needed = match (method.as_str(), path.as_str()) {
                ("get", "/metrics") => "metrics",
                ("get", _) => "",
                (_, path) if path.contains("adapter") => "admin",
                _ => "infer",
            };
            for (scope, key) in &keys {
                let status = send(key).await.status().as_u16();
                let forbidden = !needed.is_empty() && needed != *scope;
                // Not allowed paths are forbidden too, to any key.
                let expected = forbidden || path == "/v1/load_lora_adapter";
                assert_eq!(status == 403, expected, "{method} {path} with {scope}: {status}");
                assert_ne!(status, 401, "{method} {path} with {scope}");
            }
        }
    }
    open.sort();
    assert_eq!(open, OPEN.map(|(method, path)| (method.to_string(), path.to_string())));
    let (status, body) = server.post("/v1/generate", json!({ "prompt": "t5" })).await;
    assert_eq!((status, body["error"]["type"].as_str()), (401, Some("authentication_error")), "{body}");
    // No way to learn which routes there are.
    assert_eq!(server.get("/no/such").await.unwrap().0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_see_and_use_their_own_and_what_is_everybodys() {
    let folder = tempfile::tempdir().unwrap();
    let (file, store) = (folder.path().join("keys.toml"), folder.path().join("store/s"));
    let all = ["--scopes", "infer,admin,metrics"];
    let root = key(&file, "root", &all);
    let [a, b] = ["a", "b"].map(|tenant| key(&file, tenant, &[&all[..], &["--tenant", tenant]].concat()));
    let options = ["--keys", &file.display().to_string()];
    let server = Server::start_on(&base(), &store, &options).await;
    let holders = [&root, &a, &b].map(|key| Holder { server: &server, key: key.clone() });
    let [root, a, b] = &holders;
    let (status, shared) = root.put("shared", "adapter_qv_r4").await;
    assert_eq!(status, 201, "{shared}");
    let (status, of_a) = a.put("mine", "adapter_all_r8").await;
    assert_eq!((status, of_a["name"].as_str()), (201, Some("mine")), "{of_a}");
    let (status, of_b) = b.put("mine", "adapter_rslora_r8").await;
    assert_eq!(status, 201, "{of_b}");
    let (of_a, of_b) = (of_a["generation"].clone(), of_b["generation"].clone());
    assert_ne!(of_a, of_b);
    // The same name, another adapter.
    assert_eq!((a.generate("mine").await, b.generate("mine").await), ((200, of_a.clone()), (200, of_b.clone())));
    assert_eq!(a.generate("shared").await, (200, shared["generation"].clone()));
    assert_eq!(root.generate("mine@a").await, (200, of_a.clone()));
    for (holder, name) in [(a, "mine@b"), (a, "mine@a"), (root, "mine"), (b, "nothing")] {
        assert!(matches!(holder.generate(name).await.0, 400 | 404), "{name}");
        let (status, _) = holder.ask("get", &format!("/v1/adapters/{name}")).await;
        assert!(matches!(status, 400 | 404), "{name}: {status}");
        let (status, body) = holder.ask("get", &format!("/v1/models/{name}")).await;
        assert_eq!((status, body["error"]["code"].as_str()), (404, Some("model_not_found")), "{body}");
    }
    assert_eq!(a.names().await, ["mine", "shared"]);
    assert_eq!(root.names().await, ["mine@a", "mine@b", "shared"]);
    let (_, models) = b.ask("get", "/v1/models").await;
    let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids[1..], ["mine", "shared"], "{models}");
    assert_eq!(a.ask("get", "/v1/models/mine").await.1["id"], "mine");
    // All dialects, and blends.
    let (status, body) = a.post("/v1/completions", json!({ "model": "mine", "prompt": "t5", "max_tokens": 1 })).await;
    assert_eq!((status, body["model"].as_str()), (200, Some("mine")), "{body}");
    let lorax = |name| json!({ "inputs": "t5", "parameters": { "adapter_id": name, "max_new_tokens": 1 } });
    assert_eq!(a.post("/generate", lorax("mine")).await.0, 200);
    assert_eq!(root.post("/generate", lorax("mine")).await.0, 404);
    let blend = |parts: &[&str]| {
        let parts: Vec<Value> = parts.iter().map(|name| json!({ "name": name, "weight": 0.5 })).collect();
        json!({ "adapters": parts, "prompt": "t5 t6", "max_tokens": 2 })
    };
    let [(status, of_a_blend), (other, of_b_blend)] = [
        a.post("/v1/generate", blend(&["mine", "shared"])).await,
        b.post("/v1/generate", blend(&["mine", "shared"])).await,
    ];
    assert_eq!((status, other), (200, 200), "{of_a_blend} {of_b_blend}");
    assert_ne!(of_a_blend["generation"], of_b_blend["generation"]);
    assert!(!of_a_blend["adapter"].as_str().unwrap().contains('@'), "{of_a_blend}");
    assert!(matches!(a.post("/v1/generate", blend(&["mine@b"])).await.0, 400 | 404));
    // What is everybody's stays so, and memory too.
    for (method, path) in [("delete", "/v1/adapters/shared"), ("post", "/v1/adapters/shared/unload")] {
        let (status, body) = a.ask(method, path).await;
        assert_eq!((status, body["error"]["type"].as_str()), (403, Some("permission_error")), "{method} {path}");
    }
    assert_eq!(a.ask("put", "/v1/adapters/mine/pin").await.0, 403);
    assert_eq!(root.ask("put", "/v1/adapters/mine@a/pin").await.0, 200);
    assert_eq!(a.ask("post", "/v1/adapters/nothing/unload").await.0, 404);
    assert_eq!(a.put("mine@b", "adapter_qv_r4").await.0, 400);
    // Its own of the same name hides everybody's.
    assert_eq!(b.put("shared", "adapter_dora_r4").await.0, 201);
    assert_eq!(b.names().await, ["mine", "shared"]);
    assert_ne!(b.generate("shared").await.1, shared["generation"]);
    assert_eq!(b.ask("delete", "/v1/adapters/shared").await.0, 200);
    assert_eq!(b.generate("shared").await, (200, shared["generation"].clone()));
    // Of everybody's adapters a tenant is not told what others do with them.
    let (_, told) = a.ask("get", "/v1/adapters/shared").await;
    assert!(told["requests"].is_null() && told["in_flight"].is_null() && told["rank"] == 4, "{told}");
    // Alone four times, and once in a blend.
    assert_eq!(a.ask("get", "/v1/adapters/mine").await.1["requests"], 5);
    assert!(a.ask("get", "/v1/adapters").await.1["memory"].is_null());
    let series = |text: Value| -> Vec<String> {
        let text = text.as_str().unwrap_or_default().to_string();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_string).collect()
    };
    let of_a_only = series(a.ask("get", "/metrics").await.1);
    assert!(of_a_only.iter().any(|line| line.starts_with("loramux_generated_tokens_total{adapter=\"mine\"}")));
    assert!(of_a_only.iter().all(|line| line.contains("adapter=\"mine\"")), "{of_a_only:?}");
    assert!(series(root.ask("get", "/metrics").await.1).iter().any(|line| line.contains("adapter=\"mine@b\"")));
    // It lasts.
    let keys = holders.map(|holder| holder.key);
    server.kill();
    let server = Server::start_on(&base(), &store, &options).await;
    let holders = keys.map(|key| Holder { server: &server, key });
    assert_eq!((holders[1].generate("mine").await, holders[2].generate("mine").await), ((200, of_a), (200, of_b)));
    // Without keys there are no tenants, and their adapters are out of reach.
    drop(holders);
    server.kill();
    let server = Server::start_on(&base(), &store, &[]).await;
    assert_eq!(server.put_directory("x@a", &tiny("adapter_qv_r4")).await.0, 400);
    assert!(matches!(server.post("/v1/generate", json!({ "adapter": "mine@a", "prompt": "t5" })).await.0, 400 | 404));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_everybodys_meanwhile_is_no_tenants_to_delete() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let root = key(&file, "root", &["--scopes", "admin"]);
    let tenant = key(&file, "tenant", &["--scopes", "admin", "--tenant", "a"]);
    let server = Server::start(&base(), &["--keys", &file.display().to_string()]).await;
    let [root, tenant] = [root, tenant].map(|key| Holder { server: &server, key });
    for round in 0..20 {
        let mut uploading = std::pin::pin!(root.put("late", "adapter_qv_r4"));
        loop {
            tokio::select! {
                (status, body) = &mut uploading => {
                    assert_eq!(status, 201, "{round}: {body}");
                    break;
                }
                (status, body) = tenant.ask("delete", "/v1/adapters/late") => {
                    assert!(matches!(status, 403 | 404), "{round}: {status} {body}");
                }
            }
        }
        assert_eq!(root.ask("delete", "/v1/adapters/late").await.0, 200, "{round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tenant_finds_what_another_left_in_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let [a, b] = ["a", "b"].map(|tenant| key(&file, tenant, &["--scopes", "infer", "--tenant", tenant]));
    let c = key(&file, "c", &["--scopes", "infer", "--tenant", "a"]);
    let server = Server::start(&base(), &["--keys", &file.display().to_string()]).await;
    let prompt: Vec<String> = (0..60).map(|i| format!("t{}", 5 + i % 7)).collect();
    let body = json!({ "prompt": prompt.join(" "), "max_tokens": 1 });
    let mut cached = vec![];
    for key in [&a, &b, &b, &c] {
        let holder = Holder { server: &server, key: key.clone() };
        let (status, body) = holder.post("/v1/generate", body.clone()).await;
        assert_eq!(status, 200, "{body}");
        cached.push(body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    }
    assert_eq!(cached, [false, false, true, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_its_limits_and_the_file_may_change() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let few = key(&file, "few", &["--scopes", "infer", "--requests-per-minute", "2"]);
    let short = key(&file, "short", &["--scopes", "infer", "--tokens-per-minute", "5"]);
    let old = key(&file, "old", &["--scopes", "infer", "--expires", "2020-01-01T00:00:00Z"]);
    let server = Server::start(&base(), &["--keys", &file.display().to_string()]).await;
    let holder = |key: &str| Holder { server: &server, key: key.into() };
    let body = json!({ "prompt": "t5 t6 t7", "max_tokens": 4, "ignore_eos": true });
    for expected in [200, 200, 429] {
        let response = holder(&few).request("post", "/v1/generate").json(&body).send().await.unwrap();
        assert_eq!(response.status(), expected);
        if expected == 429 {
            let wait: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert!((1..=30).contains(&wait), "{wait}");
            let body: Value = response.json().await.unwrap();
            assert_eq!(body["error"]["type"], "rate_limit_error", "{body}");
        }
    }
    // Looking is not asking.
    assert_eq!(holder(&few).ask("get", "/v1/adapters").await.0, 200);
    assert_eq!(holder(&short).post("/v1/generate", body.clone()).await.0, 200);
    let (status, refused) = holder(&short).post("/v1/generate", body.clone()).await;
    assert!(status == 429 && refused["error"]["message"].as_str().unwrap().contains("5 tokens a minute"), "{refused}");
    let (status, refused) = holder(&old).post("/v1/generate", body.clone()).await;
    assert!(status == 401 && refused["error"]["message"].as_str().unwrap().contains("expired"), "{refused}");
    let becomes = |key: String, expected: u16| {
        let (holder, start) = (Holder { server: &server, key }, Instant::now());
        async move {
            loop {
                let status = holder.ask("get", "/v1/adapters").await.0;
                if status == expected {
                    return;
                }
                assert!(start.elapsed() < Duration::from_secs(20), "{status} stays, {expected} is expected");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    };
    let before = std::fs::read(&file).unwrap();
    let new = key(&file, "new", &["--scopes", "infer"]);
    becomes(new.clone(), 200).await;
    std::fs::write(&file, "not TOML at all").unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    becomes(new.clone(), 200).await;
    std::fs::write(&file, before).unwrap();
    becomes(new, 401).await;
    // What was used up stays used up.
    assert_eq!(holder(&few).post("/v1/generate", body).await.0, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_one_tenant_does_not_hold_up_another() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let [a, b] = ["a", "b"].map(|tenant| key(&file, tenant, &["--scopes", "infer", "--tenant", tenant]));
    let options = ["--keys", &file.display().to_string(), "--max-sequences", "2", "--quantize", "q8"];
    let server = std::sync::Arc::new(Server::start(DEFAULT_MODEL, &options).await);
    let ask = |key: &str, tokens: usize| {
        let (server, key) = (server.clone(), key.to_string());
        tokio::spawn(async move {
            let holder = Holder { server: &server, key };
            let body = json!({ "prompt": "A story:", "max_tokens": tokens, "ignore_eos": true });
            assert_eq!(holder.post("/v1/generate", body).await.0, 200);
        })
    };
    let flood: Vec<_> = (0..24).map(|_| ask(&a, 24)).collect();
    // All of them wait before the other comes.
    let start = Instant::now();
    while server.http.get(server.at("/health/ready")).send().await.unwrap().status() != 200
        || start.elapsed().as_millis() < 300
    {}
    ask(&b, 24).await.unwrap();
    let done = flood.iter().filter(|asked| asked.is_finished()).count();
    assert!(done < 14, "{done} of the flood's 24 requests were answered first");
    for asked in flood {
        asked.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_until_its_deadline() {
    let server = Server::start(DEFAULT_MODEL, &["--request-timeout", "60"]).await;
    let body = json!({ "prompt": "A long story:", "max_tokens": 8000, "ignore_eos": true });
    let ask = |body: &Value, seconds: &str| {
        server.http.post(server.at("/v1/generate")).header("x-request-timeout", seconds).json(body)
    };
    let start = Instant::now();
    let (status, answered) = answer(ask(&body, "0.5")).await.unwrap();
    assert_eq!((status, answered["error"]["type"].as_str()), (504, Some("timeout_error")), "{answered}");
    assert_eq!(ask(&body, "0.1").send().await.unwrap().headers()["x-should-retry"], "false");
    assert!(start.elapsed() < Duration::from_secs(30));
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let (status, events) = answer(ask(&streamed, "0.5")).await.unwrap();
    let events = events.as_str().unwrap();
    let last = events.trim().rsplit("data: ").next().unwrap();
    assert!(status == 200 && last.contains("timeout_error") && !events.contains("[DONE]"), "{last}");
    // Those who count errors count it as one, though it began well.
    let late = server.metric("loramux_requests_total{adapter=\"base\",route=\"/v1/generate\",status=\"504\"}").await;
    assert_eq!(late, 3.0);
    assert_eq!(answer(ask(&body, "soon")).await.unwrap().0, 400);
    let short = json!({ "prompt": "A", "max_tokens": 2 });
    assert_eq!(answer(ask(&short, "50")).await.unwrap().0, 200);
    // What was given up runs no more.
    let start = Instant::now();
    loop {
        let (_, text) = server.get("/metrics").await.unwrap();
        if text.as_str().unwrap().contains("\nvllm:num_requests_running 0\n") {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "it still runs");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_noted_with_who_made_them() {
    let folder = tempfile::tempdir().unwrap();
    let (file, log) = (folder.path().join("keys.toml"), folder.path().join("audit.jsonl"));
    let admin = key(&file, "boss", &["--scopes", "admin", "--tenant", "acme"]);
    let infer = key(&file, "app", &["--scopes", "infer"]);
    let options = ["--keys", &file.display().to_string(), "--audit-log", &log.display().to_string()];
    let server = Server::start(&base(), &options).await;
    let holder = |key: &str| Holder { server: &server, key: key.into() };
    let (_, info) = holder(&admin).put("mine", "adapter_qv_r4").await;
    assert_eq!(holder(&infer).put("mine", "adapter_qv_r4").await.0, 403);
    assert_eq!(holder("nobody").ask("delete", "/v1/adapters/mine").await.0, 401);
    assert_eq!(holder(&admin).ask("get", "/v1/adapters/mine").await.0, 200);
    let request = holder(&admin).request("delete", "/v1/adapters/mine").header("x-request-id", "number-7");
    assert_eq!(answer(request).await.unwrap().0, 200);
    assert_eq!(holder(&admin).ask("delete", "/v1/adapters/mine").await.0, 404);
    let damaged = holder(&admin).request("put", "/v1/adapters/mine").body("no archive");
    assert_eq!(answer(damaged).await.unwrap().0, 422);
    let path = json!({ "lora_name": "theirs", "lora_path": "/etc" });
    assert_eq!(holder(&admin).post("/v1/load_lora_adapter", path).await.0, 403);
    let text = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<Value> = lines
        .iter()
        .map(|l| json!([l["action"], l["key"], l["tenant"], l["adapter"], l["generation"], l["status"]]))
        .collect();
    let generation = info["generation"].clone();
    let expected = [
        json!(["publish", "boss", "acme", "mine@acme", generation, 200]),
        json!(["refused", null, null, null, null, 403]),
        json!(["refused", null, null, null, null, 401]),
        json!(["delete", "boss", "acme", "mine@acme", generation, 200]),
        json!(["delete", "boss", "acme", "mine", null, 404]),
        json!(["publish", "boss", "acme", "mine@acme", null, 422]),
        json!(["publish", "boss", "acme", "theirs@acme", null, 403]),
    ];
    assert_eq!(told, expected);
    assert_eq!(lines[3]["request_id"], "number-7");
    assert!(lines.iter().all(|line| line["peer"] == "127.0.0.1" && line["time"].as_str().unwrap().ends_with('Z')));
    assert!(!text.contains(&admin) && !text.contains(&infer));
}

/// As a browser asks on behalf of a page: first without a key whether it may, then with it.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_sites_that_are_named_may_ask() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let infer = key(&file, "asker", &["--scopes", "infer"]);
    let options = ["--keys", &file.display().to_string(), "--allow-origin", "https://app.example,https://b.example"];
    let server = Server::start(&base(), &options).await;
    let header = |response: &reqwest::Response, name: &str| {
        response.headers().get(name).map(|value| value.to_str().unwrap().to_lowercase())
    };
    for (origin, is_let_in) in [("https://b.example", true), ("https://evil.example", false)] {
        let expected = is_let_in.then(|| origin.to_string());
        let request = server.http.request(reqwest::Method::OPTIONS, server.at("/v1/generate"));
        let request = request.header("origin", origin).header("access-control-request-method", "POST");
        let asked =
            request.header("access-control-request-headers", "authorization,content-type").send().await.unwrap();
        assert_eq!(
            (asked.status().is_success(), header(&asked, "access-control-allow-origin")),
            (is_let_in, expected.clone())
        );
        assert_eq!(
            header(&asked, "access-control-allow-headers").is_some_and(|h| h.contains("authorization")),
            is_let_in
        );
        let request = server.http.post(server.at("/v1/generate")).header("origin", origin).bearer_auth(&infer);
        let answered = request.json(&json!({ "prompt": "t5", "max_tokens": 1 })).send().await.unwrap();
        assert_eq!(
            (answered.status().as_u16(), header(&answered, "access-control-allow-origin")),
            (200, expected.clone())
        );
        let exposed = header(&answered, "access-control-expose-headers");
        assert!(!is_let_in || exposed.is_some_and(|names| names.contains("x-request-id")));
        // Why it is refused a page may read too.
        let refused = server.http.get(server.at("/v1/adapters")).header("origin", origin).send().await.unwrap();
        assert_eq!((refused.status().as_u16(), header(&refused, "access-control-allow-origin")), (401, expected));
    }
    // Without such sites a browser is told nothing.
    let plain = Server::start(&base(), &[]).await;
    let answered = plain.http.get(plain.at("/v1/models")).header("origin", "https://app.example").send().await.unwrap();
    assert_eq!((answered.status().as_u16(), header(&answered, "access-control-allow-origin")), (200, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_is_noted_though_the_client_has_hung_up() {
    let folder = tempfile::tempdir().unwrap();
    let (file, log) = (folder.path().join("keys.toml"), folder.path().join("audit.jsonl"));
    let admin = key(&file, "boss", &["--scopes", "admin"]);
    let options = ["--keys", &file.display().to_string(), "--audit-log", &log.display().to_string()];
    let server = Server::start(&base(), &options).await;
    let holder = Holder { server: &server, key: admin.clone() };
    let names: Vec<String> = (0..20).map(|i| format!("a{i}")).collect();
    for name in &names {
        assert_eq!(holder.put(name, "adapter_qv_r4").await.0, 201);
    }
    let host = server.url.strip_prefix("http://").unwrap();
    for (i, name) in names.iter().enumerate() {
        let mut stream = std::net::TcpStream::connect(host).unwrap();
        let head = format!("DELETE /v1/adapters/{name} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {admin}");
        stream.write_all(format!("{head}\r\n\r\n").as_bytes()).unwrap();
        tokio::time::sleep(Duration::from_micros(i as u64 * 200)).await;
    }
    // Whatever is to come has come.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (left, text) = (holder.names().await, std::fs::read_to_string(&log).unwrap());
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for name in names {
        let noted = lines.iter().any(|line| line["action"] == "delete" && line["adapter"] == *name);
        assert_eq!(left.contains(&name), !noted, "{name}: {text}");
    }
}

/// A certificate for localhost, signed by itself, and its key.
fn certificate(folder: &Path) -> Vec<u8> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_string(), "127.0.0.1".to_string()]).unwrap();
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.pem().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn https_with_a_certificate_that_changes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let trusting = |pem: &[u8]| {
        let certificate = reqwest::Certificate::from_pem(pem).unwrap();
        reqwest::Client::builder().tls_built_in_root_certs(false).add_root_certificate(certificate).build().unwrap()
    };
    let first = certificate(folder.path());
    let secret = key(&folder.path().join("keys.toml"), "root", &["--scopes", "infer,admin"]);
    let (cert, secret_file, keys) = (at("cert.pem"), at("key.pem"), at("keys.toml"));
    let options = ["--tls-cert", &cert, "--tls-key", &secret_file, "--keys", &keys];
    let mut server = Server::listening(&base(), &folder.path().join("store/s"), &options);
    assert!(server.url.starts_with("https://127.0.0.1:"), "{}", server.url);
    server.http = trusting(&first);
    let start = Instant::now();
    while server.get("/health/ready").await.unwrap().0 != 200 {
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    assert!(reqwest::get(server.at("/health/ready")).await.is_err(), "an unknown certificate was trusted");
    let url = server.url.clone();
    let list = |key: &str| loramux(&["adapters", "list", "--url", &url, "--ca-cert", &cert, "--api-key", key]);
    assert!(list(&secret).unwrap().starts_with("NAME"));
    assert!(list("wrong").unwrap_err().contains("401"));
    let second = certificate(folder.path());
    let start = Instant::now();
    while trusting(&second).get(server.at("/health/ready")).send().await.is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "the new certificate is not shown");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // A key that does not go with it changes nothing.
    std::fs::write(folder.path().join("key.pem"), "nothing").unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(trusting(&second).get(server.at("/health/ready")).send().await.is_ok());
}

#[test]
fn without_keys_only_this_machine_is_let_in() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().display().to_string();
    let (model, wrong) = (base(), folder.path().join("none.toml").display().to_string());
    let serve = |more: &[&str]| {
        let error = loramux(&[&["serve", "--model", &model, "--store", &store], more].concat()).unwrap_err();
        error.lines().last().unwrap_or_default().to_string()
    };
    let refused = serve(&["--listen", "0.0.0.0:0"]);
    assert!(refused.contains("0.0.0.0:0 lets in others") && refused.contains("--keys FILE"), "{refused}");
    assert!(serve(&["--listen", "127.0.0.1:0", "--keys", &wrong]).contains("none.toml"));
    assert!(serve(&["--listen", "127.0.0.1:0", "--tls-cert", &wrong, "--tls-key", &wrong]).contains("none.toml"));
    // Half of HTTPS is no HTTP, wherever it stands.
    let config = folder.path().join("loramux.toml");
    std::fs::write(&config, format!("listen = \"127.0.0.1:0\"\ntls-cert = {wrong:?}\n")).unwrap();
    let config = config.display().to_string();
    assert!(serve(&["--config", &config]).contains("go together"));
    assert!(serve(&["--listen", "127.0.0.1:0", "--tls-key", &wrong]).contains("go together"));
    assert!(serve(&["--config", &config, "--tls-key", &wrong]).contains("none.toml"));
}
