//! The server as a process: while it loads, under a full queue, when it is told to stop; and bytes that clients count.

use std::time::{Duration, Instant};

use loramux::base::DEFAULT_MODEL;
use reqwest::Body;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use crate::common::fixtures;
use crate::host::{Server, answer};
use crate::sources::until;

fn tiny() -> String {
    fixtures().join("tiny/llama/base").display().to_string()
}

/// A request that goes on for as long as the context lets it.
fn long() -> Value {
    json!({ "prompt": "A long story:", "max_tokens": 8000, "ignore_eos": true })
}

#[tokio::test]
async fn a_server_that_loads_is_alive_and_not_ready() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::listening(DEFAULT_MODEL, &folder.path().join("store"), &[]);
    let response = server.http.get(server.at("/health/ready")).send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers().get("retry-after").is_some()), (503, true));
    let (status, body) = server.post("/v1/generate", json!({ "prompt": "x" })).await;
    assert_eq!((status, body["error"]["type"].as_str()), (503, Some("unavailable_error")), "{body}");
    assert_eq!(server.get("/health/live").await.unwrap().0, 200);
    let start = Instant::now();
    while server.get("/health/ready").await.unwrap().0 != 200 {
        assert_eq!(server.get("/health/live").await.unwrap().0, 200);
        assert!(start.elapsed() < Duration::from_secs(120), "the server does not become ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(server.post("/v1/generate", json!({ "prompt": "x", "max_tokens": 1 })).await.0, 200);
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_ends_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::listening("/no/such/model", &folder.path().join("store"), &[]);
    assert!(!server.ended(Duration::from_secs(20)).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_many_parts_waits_for_its_own() {
    let server = Server::start(&tiny(), &["--max-queue", "3"]).await;
    let inputs: Vec<String> = (0..20).map(|i| format!("t{} t6", i + 5)).collect();
    let body = json!({ "input": inputs, "labels": ["t9", "t10", "t11 t12"] });
    let (status, whole) = server.post("/v1/classify", body).await;
    assert_eq!(status, 200, "{whole}");
    // Each part is what it is alone.
    for (input, result) in inputs.iter().zip(whole["results"].as_array().unwrap()) {
        let body = json!({ "input": input, "labels": ["t9", "t10", "t11 t12"] });
        assert_eq!(server.post("/v1/classify", body).await.1["results"][0], *result, "{input}");
    }
    let ask = |prompt: Value, stream: bool| {
        json!({ "model": "base", "prompt": prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": true,
            "stream": stream, "stream_options": if stream { json!({ "include_usage": true }) } else { Value::Null } })
    };
    let (status, whole) = server.post("/v1/completions", ask(json!(inputs), false)).await;
    assert_eq!(status, 200, "{whole}");
    let (status, events) = server.post("/v1/completions", ask(json!(inputs), true)).await;
    assert_eq!(status, 200, "{events}");
    let mut streamed = vec![String::new(); inputs.len()];
    let events = events.as_str().unwrap();
    assert!(events.ends_with("data: [DONE]\n\n"), "{events}");
    let mut tokens = 0;
    for event in events.lines().filter_map(|l| l.strip_prefix("data: {")) {
        let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        for choice in event["choices"].as_array().unwrap() {
            streamed[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
        }
        tokens += event["usage"]["completion_tokens"].as_u64().unwrap_or(0);
    }
    assert_eq!(tokens, 60);
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], i);
        assert_eq!(choice["text"], streamed[i], "{i}");
        let (_, alone) = server.post("/v1/completions", ask(json!(inputs[i]), false)).await;
        assert_eq!(alone["choices"][0]["text"], streamed[i], "{i}");
    }
}

/// Waits until something runs.
async fn busy(server: &Server) {
    let start = Instant::now();
    loop {
        let (_, text) = server.get("/metrics").await.unwrap();
        if text.as_str().unwrap().contains("\nvllm:num_requests_running 1\n") {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "nothing runs");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_told_to_stop_finishes_what_it_has() {
    let mut server = Server::start(DEFAULT_MODEL, &["--drain-timeout", "120"]).await;
    let body = json!({ "prompt": "A story:", "max_tokens": 60, "ignore_eos": true });
    let asked = tokio::spawn(answer(server.http.post(server.at("/v1/generate")).json(&body)));
    busy(&server).await;
    server.signal("TERM");
    let (status, body) = asked.await.unwrap().unwrap();
    assert_eq!((status, body["usage"]["completion_tokens"].as_u64()), (200, Some(60)), "{body}");
    // Clients that keep their connections hold nothing up.
    assert!(server.ended(Duration::from_secs(15)).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_has_an_end() {
    let mut server = Server::start(DEFAULT_MODEL, &["--drain-timeout", "2"]).await;
    let asked = tokio::spawn(answer(server.http.post(server.at("/v1/generate")).json(&long())));
    busy(&server).await;
    server.signal("TERM");
    let start = Instant::now();
    while server.get("/health/ready").await.unwrap().0 != 503 {
        assert!(start.elapsed() < Duration::from_secs(2), "a draining server says that it is ready");
    }
    assert_eq!(server.post("/v1/generate", json!({ "prompt": "x" })).await.0, 503);
    let (status, body) = asked.await.unwrap().unwrap();
    assert_eq!((status, body["error"]["type"].as_str()), (503, Some("unavailable_error")), "{body}");
    assert!(start.elapsed() > Duration::from_millis(1500), "given up after {:?}", start.elapsed());
    assert!(server.ended(Duration::from_secs(15)).await.success());
}

/// An upload has the time that requests have, and not that of the last bytes alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_told_to_stop_receives_what_is_coming_in() {
    let adapter = fixtures().join("tiny/llama/adapter_qv_r4");
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start_on(&tiny(), folder.path(), &[]).await;
    let read = |file: &str| std::fs::read(adapter.join(file)).unwrap();
    let (first, last) = {
        let weights = read("adapter_model.safetensors");
        (weights[..500].to_vec(), weights[500..].to_vec())
    };
    let (sender, mut pieces) = tokio::sync::mpsc::channel::<std::io::Result<Vec<u8>>>(2);
    sender.send(Ok(first)).await.unwrap();
    let weights = Part::stream(Body::wrap_stream(futures::stream::poll_fn(move |context| pieces.poll_recv(context))));
    let config = Part::bytes(read("adapter_config.json")).file_name("f");
    let form = Form::new().part("config", config).part("weights", weights.file_name("f"));
    let sent = tokio::spawn(answer(server.http.put(server.at("/v1/adapters/late")).multipart(form)));
    let incoming = folder.path().join("incoming");
    until("the upload does not begin", async || std::fs::read_dir(&incoming).unwrap().next().is_some()).await;
    server.signal("TERM");
    until("the server goes on", async || server.get("/health/ready").await.unwrap().0 == 503).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let (status, body) = server.put_directory("other", &adapter).await;
    assert_eq!(status, 503, "{body}");
    sender.send(Ok(last)).await.unwrap();
    drop(sender);
    let (status, body) = sent.await.unwrap().unwrap();
    assert_eq!(status, 201, "{body}");
    assert!(server.ended(Duration::from_secs(15)).await.success());
    let server = Server::start_on(&tiny(), folder.path(), &[]).await;
    assert_eq!(server.get("/v1/adapters/late").await.unwrap().1["generation"], body["generation"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_server_that_loads() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::listening(DEFAULT_MODEL, folder.path(), &[]);
    server.signal("TERM");
    assert!(server.ended(Duration::from_secs(15)).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_stops_at_once() {
    let mut server = Server::start(DEFAULT_MODEL, &[]).await;
    let asked = tokio::spawn(answer(server.http.post(server.at("/v1/generate")).json(&long())));
    busy(&server).await;
    server.signal("TERM");
    while server.get("/health/ready").await.unwrap().0 != 503 {}
    server.signal("INT");
    assert!(!server.ended(Duration::from_secs(5)).await.success());
    assert!(asked.await.unwrap().is_err());
}

/// Token texts of LoRAX's dialect add up to the text, also where a character has several tokens, or is cut short.
#[tokio::test(flavor = "multi_thread")]
async fn token_texts_add_up_to_the_text() {
    let server = Server::start(DEFAULT_MODEL, &[]).await;
    let (_, body) = server.post("/tokenize", json!({ "prompt": "🎉", "add_special_tokens": false })).await;
    let party: Vec<u64> = body["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
    assert!(party.len() > 1, "one token: {party:?}");
    let (mut parts, mut whole, mut cut) = (0, 0, 0);
    for max in 1..=2 * party.len() {
        let bias: serde_json::Map<String, Value> = party.iter().map(|t| (t.to_string(), json!(100))).collect();
        let parameters = json!({ "max_new_tokens": max, "details": true, "logit_bias": bias });
        let body = json!({ "inputs": "🎉🎉🎉🎉🎉🎉", "parameters": parameters });
        let (status, answer) = server.post("/generate", body.clone()).await;
        assert_eq!(status, 200, "{answer}");
        let text = answer["generated_text"].as_str().unwrap();
        let tokens = answer["details"]["tokens"].as_array().unwrap();
        let texts = |tokens: &[Value]| tokens.iter().map(|t| t["text"].as_str().unwrap()).collect::<String>();
        assert_eq!(texts(tokens), text);
        let (_, events) = server.post("/generate_stream", body).await;
        let events = events.as_str().unwrap().lines().filter_map(|l| l.strip_prefix("data: "));
        let events: Vec<Value> = events.map(|e| serde_json::from_str(e).unwrap()).collect();
        let streamed: Vec<Value> = events.iter().map(|e| e["token"].clone()).collect();
        assert_eq!(streamed, *tokens);
        assert!(events.iter().enumerate().all(|(i, e)| e["index"] == i + 1), "{events:?}");
        assert_eq!(events.last().unwrap()["generated_text"], text);
        parts += tokens.iter().filter(|t| t["text"] == "").count();
        whole += text.matches('🎉').count();
        cut += text.matches('\u{fffd}').count();
    }
    assert!(parts > 0 && whole > 0 && cut > 0, "{parts} parts, {whole} whole, {cut} cut");
}

/// LoRAX's and TGI's clients see the end token, and the seed that was used.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_token_is_told() {
    let server = Server::start(DEFAULT_MODEL, &[]).await;
    let (_, body) = server.post("/tokenize", json!({ "prompt": "<|im_end|>", "add_special_tokens": false })).await;
    let end = body["tokens"][0].as_u64().unwrap();
    let parameters = json!({ "details": true, "logit_bias": { end.to_string(): 100 }, "do_sample": true, "seed": 7 });
    let body = json!({ "inputs": "x", "parameters": parameters });
    let (_, answer) = server.post("/generate", body.clone()).await;
    let details = &answer["details"];
    assert_eq!((answer["generated_text"].as_str(), details["finish_reason"].as_str()), (Some(""), Some("eos_token")));
    assert_eq!((&details["seed"], &details["generated_tokens"]), (&json!(7), &json!(1)));
    let token = &details["tokens"][0];
    assert_eq!((&token["id"], &token["special"], &token["text"]), (&json!(end), &json!(true), &json!("<|im_end|>")));
    assert!(token["logprob"].as_f64().unwrap() < 0.0, "{token}");
    let (_, events) = server.post("/generate_stream", body).await;
    let event: Value = serde_json::from_str(events.as_str().unwrap().trim().strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!((&event["token"], &event["index"], &event["details"]["seed"]), (token, &json!(1), &json!(7)));
}

/// In LoRAX's dialect an answer that has no limit goes on to an end token, or to the end of the context.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_a_limit_ends_with_the_context() {
    let server = Server::start(&tiny(), &[]).await;
    let body = json!({ "inputs": "t5 t6", "parameters": { "ignore_eos_token": true, "details": true } });
    let (status, answer) = server.post("/generate", body).await;
    assert_eq!((status, &answer["details"]["finish_reason"]), (200, &json!("length")), "{answer}");
    assert!(answer["details"]["generated_tokens"].as_u64().unwrap() > 250, "{answer}");
}

/// Clients of other servers have the base's name there in their code.
#[tokio::test(flavor = "multi_thread")]
async fn the_base_may_have_other_names() {
    let server = Server::start(&tiny(), &["--served-model-name", "tgi,org/small", "--served-model-name", "gpt"]).await;
    for name in ["tgi", "org/small", "gpt", "base"] {
        let body = json!({ "model": name, "prompt": "t5", "max_tokens": 1 });
        let (status, answer) = server.post("/v1/completions", body).await;
        assert_eq!((status, &answer["model"]), (200, &json!(name)), "{answer}");
        let (status, model) = server.get(&format!("/v1/models/{name}")).await.unwrap();
        assert_eq!((status, &model["parent"]), (200, &Value::Null), "{model}");
    }
    let (_, models) = server.get("/v1/models").await.unwrap();
    let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids[1..], ["tgi", "org/small", "gpt"], "{models}");
    assert!(models["data"].as_array().unwrap().iter().all(|m| m["root"] == ids[0]), "{models}");
    let body = json!({ "model": "llama", "prompt": "t5" });
    assert_eq!(server.post("/v1/completions", body).await.0, 404);
}

/// Clients that hang up while they wait are counted too.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_is_counted() {
    let server = Server::start(DEFAULT_MODEL, &[]).await;
    let asked = tokio::spawn(answer(server.http.post(server.at("/v1/generate")).json(&long())));
    busy(&server).await;
    asked.abort();
    let start = Instant::now();
    let line = "loramux_requests_total{adapter=\"base\",route=\"/v1/generate\",status=\"499\"} 1\n";
    while !server.get("/metrics").await.unwrap().1.as_str().unwrap().contains(line) {
        assert!(start.elapsed() < Duration::from_secs(20), "no {line}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_its_requests_id() {
    let server = Server::start(&tiny(), &[]).await;
    let ask = async |path: &str, id: Option<&str>| {
        let request = server.http.get(server.at(path));
        let request = id.into_iter().fold(request, |request, id| request.header("X-Request-Id", id));
        let response = request.send().await.unwrap();
        response.headers().get("x-request-id").unwrap().to_str().unwrap().to_string()
    };
    assert_eq!(ask("/health/ready", Some("trace-7/a")).await, "trace-7/a");
    assert_eq!(ask("/no/such/route", Some("b")).await, "b");
    let fresh = [ask("/health/ready", None).await, ask("/health/ready", None).await];
    assert!(fresh[0] != fresh[1] && fresh.iter().all(|id| id.len() == 32), "{fresh:?}");
    for id in ["two words", "", &"x".repeat(129)] {
        assert_eq!(ask("/health/ready", Some(id)).await.len(), 32, "{id}");
    }
}

/// An adapter that knows four more tokens, with a tokenizer that spells them, a chat template and an end token.
#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_with_a_language_of_its_own() {
    let server = Server::start(&tiny(), &["--allow-uploaded-templates"]).await;
    let folder = fixtures().join("tiny/variants/llama");
    let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let prompts: Value =
        serde_json::from_slice(&std::fs::read(fixtures().join("tiny/llama/expected.json")).unwrap()).unwrap();
    let spelled = |ids: &[u64]| ids.iter().map(|id| format!("t{id}")).collect::<Vec<_>>().join(" ");
    // As `variants.py` makes them.
    let ids: Vec<u64> = serde_json::from_value(prompts["prompts"][0].clone()).unwrap();
    let ids: Vec<u64> = ids.iter().enumerate().map(|(j, &t)| if j % 3 == 0 { 256 + j as u64 % 4 } else { t }).collect();
    let greedy: Vec<u64> = serde_json::from_value(expected["greedy"]["resized"][0].clone()).unwrap();
    let (prompt, want) = (spelled(&ids), spelled(&greedy));

    let base = std::fs::read(fixtures().join("tiny/llama/base/tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_slice(&base).unwrap();
    for id in 256..260 {
        tokenizer["model"]["vocab"][format!("t{id}")] = json!(id);
    }
    let upload = async |server: &Server, name: &str, end: Option<u64>| {
        let mut settings = json!({ "chat_template": "{{ messages[0].content }}" });
        if let Some(end) = end {
            settings["eos_token"] = json!(format!("t{end}"));
        }
        let mut form = reqwest::multipart::Form::new();
        for (name, bytes) in [
            ("adapter_config.json", std::fs::read(folder.join("adapter_resized/adapter_config.json")).unwrap()),
            (
                "adapter_model.safetensors",
                std::fs::read(folder.join("adapter_resized/adapter_model.safetensors")).unwrap(),
            ),
            ("tokenizer.json", tokenizer.to_string().into_bytes()),
            ("tokenizer_config.json", settings.to_string().into_bytes()),
        ] {
            form = form.part("file", reqwest::multipart::Part::bytes(bytes).file_name(name));
        }
        answer(server.http.put(server.at(&format!("/v1/adapters/{name}"))).multipart(form)).await.unwrap()
    };
    for (name, end) in [("more", None), ("ends", Some(greedy[2]))] {
        let (status, body) = upload(&server, name, end).await;
        assert_eq!(status, 201, "{body}");
    }
    let (status, body) = upload(&Server::start(&tiny(), &[]).await, "more", None).await;
    assert_eq!(status, 422);
    assert!(body["error"]["message"].as_str().unwrap().contains("--allow-uploaded-templates"), "{body}");

    let (_, body) = server.post("/tokenize", json!({ "model": "more", "prompt": prompt })).await;
    assert_eq!(body["tokens"], json!(ids), "{body}");
    let (_, body) = server.post("/detokenize", json!({ "model": "more", "tokens": ids })).await;
    assert_eq!(body["prompt"], prompt, "{body}");
    let (_, body) = server.post("/tokenize", json!({ "prompt": "t255 t256" })).await;
    assert_eq!(body["tokens"], json!([255, 3]), "the base does not know it");

    let ask = json!({ "adapter": "more", "prompt": prompt, "max_tokens": 12, "logprobs": 1 });
    let (status, body) = server.post("/v1/generate", ask).await;
    assert_eq!((status, body["text"].as_str().map(str::trim)), (200, Some(want.as_str())), "{body}");
    let texts: String = body["logprobs"].as_array().unwrap().iter().map(|l| l["token"].as_str().unwrap()).collect();
    assert_eq!(texts.trim(), want);
    let message = json!([{ "role": "user", "content": prompt }]);
    let chat = |model: &str| json!({ "model": model, "messages": message, "max_tokens": 12, "temperature": 0 });
    let (_, body) = server.post("/v1/chat/completions", chat("more")).await;
    assert_eq!(body["choices"][0]["message"]["content"].as_str().unwrap().trim(), want, "{body}");
    assert_eq!(server.post("/v1/chat/completions", chat("base")).await.0, 400, "the base has no template");
    let (_, body) =
        server.post("/v1/completions", json!({ "model": "ends", "prompt": prompt, "temperature": 0 })).await;
    let first = greedy.iter().position(|t| *t == greedy[2]).unwrap();
    assert_eq!(body["choices"][0]["text"].as_str().unwrap().trim(), spelled(&greedy[..first]), "{body}");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let ask = |model: &str| json!({ "model": model, "prompt": [256], "max_tokens": 1, "logit_bias": { "259": 100 } });
    let (_, body) = server.post("/v1/completions", ask("more")).await;
    assert_eq!(body["choices"][0]["text"].as_str().map(str::trim), Some("t259"), "{body}");
    let (status, body) = server.post("/v1/completions", ask("base")).await;
    assert_eq!(status, 400, "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains("the vocabulary ends at 255"), "{body}");
}

/// Pins, unloads and what the list tells of adapters, over HTTP.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_are_pinned_unloaded_and_counted() {
    let server = Server::start(&tiny(), &[]).await;
    assert_eq!(server.put_directory("mine", &fixtures().join("tiny/llama/adapter_qv_r4")).await.0, 201);
    let ask = json!({ "adapter": "mine", "prompt": "t5 t6", "max_tokens": 1 });
    for _ in 0..2 {
        assert_eq!(server.post("/v1/generate", ask.clone()).await.0, 200);
    }
    let route = |what: &str| server.at(&format!("/v1/adapters/mine/{what}"));
    let (status, info) = answer(server.http.put(route("pin"))).await.unwrap();
    assert_eq!((status, &info["pinned"], &info["requests"]), (200, &json!(true), &json!(2)), "{info}");
    assert!(info["last_used"].as_u64().is_some() && info["memory_bytes"].as_u64().is_some(), "{info}");
    let (status, body) = answer(server.http.post(route("unload"))).await.unwrap();
    assert_eq!((status, body["error"]["type"].as_str()), (409, Some("conflict_error")), "{body}");
    let (_, list) = server.get("/v1/adapters").await.unwrap();
    assert_eq!((&list["adapters"][0], &list["memory"]["used"]), (&info, &info["memory_bytes"]), "{list}");
    let (status, info) = answer(server.http.delete(route("pin"))).await.unwrap();
    assert_eq!((status, &info["pinned"], &info["tier"]), (200, &json!(false), &json!("device")), "{info}");
    let (status, info) = answer(server.http.post(route("unload"))).await.unwrap();
    assert_eq!((status, &info["tier"], &info["memory_bytes"]), (200, &json!("disk"), &Value::Null), "{info}");
    let (_, list) = server.get("/v1/adapters").await.unwrap();
    assert_eq!(list["memory"], json!({ "used": 0, "limit": 1 << 30 }));
    assert_eq!(server.post("/v1/generate", ask).await.0, 200);
    for request in
        [server.http.put(server.at("/v1/adapters/none/pin")), server.http.post(server.at("/v1/adapters/none/unload"))]
    {
        assert_eq!(answer(request).await.unwrap().0, 404);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_may_load_and_ask_this_server_alone() {
    let server = Server::start(&tiny(), &[]).await;
    for (path, kind) in [
        ("/", "text/html"),
        ("/assets/app.js", "text/javascript"),
        ("/assets/app.css", "text/css"),
        ("/assets/icon.svg", "image/svg+xml"),
    ] {
        let response = server.http.get(server.at(path)).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_string();
        assert!(header("content-type").starts_with(kind), "{path}: {}", header("content-type"));
        assert_eq!(header("x-content-type-options"), "nosniff");
        let policy = header("content-security-policy");
        for part in policy.split("; ") {
            let (name, sources) = part.split_once(' ').unwrap();
            let nothing_else = sources == "'none'" || sources == "'self'" || name == "require-trusted-types-for";
            assert!(nothing_else, "{path}: {part}");
        }
        assert!(policy.starts_with("default-src 'none'; "), "{policy}");
    }
    for path in ["/assets/", "/assets/app.ts", "/assets/..%2fpage.rs", "/assets/%2e%2e/index.html"] {
        assert_eq!(server.get(path).await.unwrap().0, 404, "{path}");
    }
    let (_, metrics) = server.get("/metrics").await.unwrap();
    let block = metrics.as_str().unwrap().lines().find_map(|l| l.strip_prefix("loramux_kv_block_bytes ")).unwrap();
    assert!(block.parse::<u64>().unwrap() > 0);
}
