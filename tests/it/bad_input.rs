//! Bad input: every one gets an error that says what is wrong, and the server goes on.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use crate::common::fixtures;
use crate::host::{Server, answer};

fn good() -> (Value, Vec<u8>) {
    let folder = fixtures().join("tiny/llama/adapter_qv_r4");
    let config = serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    (config, std::fs::read(folder.join("adapter_model.safetensors")).unwrap())
}

async fn tiny() -> Server {
    let base = fixtures().join("tiny/llama/base");
    let server = Server::start(base.to_str().unwrap(), &["--max-upload", "8MiB", "--max-queue", "64"]).await;
    let (config, weights) = good();
    let (status, body) = server.put("kept", config.to_string().into(), weights).await;
    assert_eq!(status, 201, "{body}");
    server
}

/// The error's message; its shape is OpenAI's.
fn message(body: &Value) -> &str {
    assert!(body["error"]["type"].is_string(), "{body}");
    body["error"]["message"].as_str().unwrap_or_else(|| panic!("no message in {body}"))
}

/// The header and the data of a safetensors file.
fn split(file: &[u8]) -> (Value, Vec<u8>) {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + n]).unwrap(), file[8 + n..].to_vec())
}

fn join(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

const Q0: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

#[tokio::test]
async fn adapters_that_lie() {
    let server = tiny().await;
    let (config, weights) = good();
    let (header, data) = split(&weights);
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut header = header.clone();
        edit(&mut header);
        join(&header, &data)
    };
    let with = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        config
    };
    let number = |at: usize, value: f32| {
        let mut data = data.clone();
        data[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes());
        join(&header, &data)
    };
    let renamed = |from: &str, to: &str| {
        let text = header.to_string().replace(from, to);
        join(&serde_json::from_str(&text).unwrap(), &data)
    };
    let mut huge = weights.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let cases: Vec<(&str, Value, Vec<u8>, &[&str])> = vec![
        ("cut in the data", config.clone(), weights[..weights.len() - 9].to_vec(), &[]),
        ("cut in the header", config.clone(), weights[..40].to_vec(), &[]),
        ("empty", config.clone(), vec![], &[]),
        ("a header of 2^64 bytes", config.clone(), huge, &[]),
        ("overlapping offsets", config.clone(), edited(&|h| h[Q0]["data_offsets"] = json!([4, 1028])), &[]),
        ("offsets past the end", config.clone(), edited(&|h| h[Q0]["data_offsets"] = json!([0, 1u64 << 40])), &[]),
        ("a shape that is not its bytes", config.clone(), edited(&|h| h[Q0]["shape"] = json!([4, 65])), &[]),
        ("NaN", config.clone(), number(5, f32::NAN), &["lora_A"]),
        ("infinity", config.clone(), number(data.len() / 4 - 1, f32::INFINITY), &["lora_"]),
        ("a rank that disagrees", with("r", json!(8)), weights.clone(), &["lora_A", "[4, 64]", "[8, 64]"]),
        ("a layer that the base lacks", config.clone(), renamed("layers.1.", "layers.7."), &["layers.7"]),
        ("another module", config.clone(), renamed("self_attn.v_proj", "self_attn.w_proj"), &["w_proj"]),
        ("a rank of zero", with("r", json!(0)), weights.clone(), &["r"]),
        ("a rank that is a text", with("r", json!("4")), weights.clone(), &["r"]),
        ("an alpha beyond numbers", with("lora_alpha", json!(1e300)), weights.clone(), &["lora_alpha"]),
        ("another method", with("peft_type", json!("IA3")), weights.clone(), &["IA3"]),
        ("an option that is not supported", with("use_dora", json!(true)), weights.clone(), &["use_dora"]),
        ("an unknown option", with("frobnicate", json!(3)), weights.clone(), &["frobnicate"]),
        ("a regex that does not compile", with("target_modules", json!("(")), weights.clone(), &["target_modules"]),
        ("no target", with("target_modules", json!(["nothing"])), weights.clone(), &["nothing"]),
        ("a config that is a list", json!([]), weights.clone(), &["adapter_config.json"]),
        ("a pickle", config.clone(), b"\x80\x02}q\x00X\x04\x00\x00\x00loraq\x01K\x01s.".to_vec(), &["safetensors"]),
        ("a torch file", config.clone(), [b"PK\x03\x04", &weights[..500]].concat(), &["safetensors"]),
    ];
    for (what, config, weights, words) in cases {
        for name in ["kept", "new"] {
            let (status, body) = server.put(name, config.to_string().into(), weights.clone()).await;
            assert_eq!(status, 422, "{what}: {body}");
            assert!(words.iter().all(|w| message(&body).contains(w)), "{what}: {words:?} not in {body}");
        }
        assert_eq!(server.get("/v1/adapters/new").await.unwrap().0, 404, "{what}");
    }
    let other = fixtures().join("smollm2/adapter_causal_r8");
    let (status, body) = server.put_directory("new", &other).await;
    assert_eq!(status, 422, "an adapter for another base: {body}");
    assert!(message(&body).contains("layers") && message(&body).contains("576"), "{body}");
    let (status, body) = server.put("new", b"\xff\xfe{".to_vec(), weights.clone()).await;
    assert_eq!(status, 422, "a config that is no text: {body}");
    let deep = "[".repeat(10_000) + &"]".repeat(10_000);
    let (status, body) = server.put("new", deep.into(), weights).await;
    assert_eq!(status, 422, "a config nested 10,000 deep: {body}");
    let body = json!({ "adapter": "kept", "prompt": "t5", "max_tokens": 2 });
    assert_eq!(server.post("/v1/generate", body).await.0, 200);
    server.still_answers().await;
}

fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        // Written by hand: the library refuses to make what the server must refuse to read.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append(&header, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

#[tokio::test]
async fn archives_that_attack() {
    let server = tiny().await;
    let (config, weights) = good();
    let config = config.to_string();
    let both: [(&str, &[u8]); 2] =
        [("x/adapter_config.json", config.as_bytes()), ("x/adapter_model.safetensors", weights.as_slice())];
    let upload = async |name: &str, bytes: Vec<u8>| {
        let form = Form::new().part("archive", Part::bytes(bytes).file_name("a"));
        answer(server.http.put(server.at(&format!("/v1/adapters/{name}"))).multipart(form)).await.unwrap()
    };
    let (status, body) = upload("good", tar(&both)).await;
    assert_eq!(status, 201, "{body}");

    let mut link = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    link.append_link(&mut header, "adapter_config.json", "/etc/passwd").unwrap();
    let names: Vec<String> = (0..1000).map(|i| format!("x/file{i}")).collect();
    let thousand: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b"x"[..])).collect();
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    bomb.write_all(&tar(&[("adapter_config.json", config.as_bytes())])[..1024]).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_path("adapter_model.safetensors").unwrap();
    header.set_size(1 << 30);
    header.set_cksum();
    bomb.write_all(header.as_bytes()).unwrap();
    for _ in 0..256 {
        bomb.write_all(&[0; 1 << 20]).unwrap();
    }
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file("../../escape", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(b"x").unwrap();
    let zip = zip.finish().unwrap().into_inner();
    let cases: Vec<(&str, Vec<u8>, &[u16])> = vec![
        ("`..` in a tar", tar(&[("../adapter_config.json", config.as_bytes()), both[1]]), &[422]),
        ("an absolute path", tar(&[("/adapter_config.json", config.as_bytes()), both[1]]), &[422]),
        ("`..` in a zip", zip, &[422]),
        ("a link", link.into_inner().unwrap(), &[422]),
        ("a thousand files", tar(&thousand), &[422]),
        ("a bomb", bomb.finish().unwrap(), &[413]),
        ("a file missing", tar(&both[..1]), &[422]),
        ("no archive", b"hello".to_vec(), &[422]),
        ("half an archive", tar(&both)[..900].to_vec(), &[422]),
    ];
    for (what, bytes, statuses) in cases {
        let (status, body) = upload("new", bytes).await;
        assert!(statuses.contains(&status), "{what}: {status} {body}");
        assert!(!message(&body).is_empty());
        assert_eq!(server.get("/v1/adapters/new").await.unwrap().0, 404, "{what}");
    }
    assert!(!server.store.join("../escape").exists() && !server.store.join("../../escape").exists());
    server.still_answers().await;
}

/// Sends bytes as they are and returns the start of the answer.
fn raw(server: &Server, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n) = stream.read(&mut buffer) {
        answer.extend_from_slice(&buffer[..n]);
        if n == 0 || answer.windows(4).any(|w| w == b"\r\n\r\n") {
            break;
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_never_fit() {
    let server = tiny().await;
    let head = "PUT /v1/adapters/big HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n";
    let start = std::time::Instant::now();
    let text = raw(&server, format!("{head}content-length: 3221225472\r\n\r\n").as_bytes());
    assert!(text.starts_with("HTTP/1.1 413"), "3 GB announced: {text}");
    assert!(start.elapsed() < Duration::from_secs(10));
    let big = Part::bytes(vec![0; 9 << 20]).file_name("w");
    let chunked = Form::new().part("weights", big);
    let request = server.http.put(server.at("/v1/adapters/big")).multipart(chunked);
    // The server may close the connection while the client still writes.
    if let Ok((status, body)) = answer(request).await {
        assert_eq!(status, 413, "9 MB where 8 are allowed: {body}");
    }
    // A client that stops in the middle leaves nothing behind.
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    let part = "--b\r\ncontent-disposition: form-data; name=\"weights\"; filename=\"w\"\r\n\r\nabc";
    stream.write_all(format!("{head}content-length: 100000\r\n\r\n{part}").as_bytes()).unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(stream);
    assert_eq!(server.get("/v1/adapters/big").await.unwrap().0, 404);
    server.still_answers().await;
}

#[tokio::test]
async fn names_that_are_none() {
    let server = tiny().await;
    let (config, weights) = good();
    let long = "a".repeat(129);
    for name in ["..%2f..%2fx", "a%2fb", ".hidden", "-dash", "a%00b", "a%0ab", "a%20b", &long, "base", "%e4%b8%ad"] {
        let (status, body) = server.put(name, config.to_string().into(), weights.clone()).await;
        assert!(status == 400 || status == 404, "{name}: {status} {body}");
        message(&body);
    }
    for name in ["../x", "a/b", "", "a\nb", "a\0b", "a b"] {
        let form = Form::new()
            .text("name", name.to_string())
            .part("config", Part::bytes(config.to_string().into_bytes()).file_name("c"))
            .part("weights", Part::bytes(weights.clone()).file_name("w"));
        let (status, body) = answer(server.http.post(server.at("/v1/adapters")).multipart(form)).await.unwrap();
        assert_eq!(status, 400, "{name:?}: {body}");
        message(&body);
    }
    let (_, list) = server.get("/v1/adapters").await.unwrap();
    assert_eq!(list["adapters"].as_array().unwrap().len(), 1, "{list}");
    server.still_answers().await;
}

#[tokio::test]
async fn requests_that_make_no_sense() {
    let server = tiny().await;
    let send = async |path: &str, body: Vec<u8>| answer(server.http.post(server.at(path)).body(body)).await.unwrap();
    let deep = "[".repeat(10_000) + &"]".repeat(10_000);
    let texts: Vec<Vec<u8>> = vec![
        deep.clone().into(),
        format!(r#"{{"prompt": {deep}}}"#).into(),
        b"{\"prompt\": \"\xff\xfe\"}".to_vec(),
        b"{".to_vec(),
        b"".to_vec(),
        b"null".to_vec(),
        b"[1]".to_vec(),
        br#"{"prompt": 3}"#.to_vec(),
        br#"{"prompt": {"a": 1}}"#.to_vec(),
    ];
    for path in ["/v1/generate", "/v1/completions", "/v1/chat/completions", "/v1/classify", "/generate", "/tokenize"] {
        for text in &texts {
            let (status, body) = send(path, text.clone()).await;
            let shown: String = String::from_utf8_lossy(text).chars().take(40).collect();
            assert_eq!(status, 400, "{path} {shown}: {body}");
            message(&body);
        }
    }
    for (field, value) in [
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1e30)),
        ("max_tokens", json!("many")),
        ("temperature", json!(-0.5)),
        ("temperature", json!("hot")),
        ("top_p", json!(1.5)),
        ("top_p", json!(-1)),
        ("top_k", json!(-7)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(1_000_000)),
        ("stop", json!(5)),
        ("stop", json!([""])),
        ("seed", json!("x")),
        ("logprobs", json!(100_000)),
        ("stream", json!("yes")),
    ] {
        for path in ["/v1/generate", "/v1/completions"] {
            let mut body = json!({ "prompt": "t5", "model": "base" });
            body[field] = value.clone();
            let (status, body) = server.post(path, body).await;
            assert_eq!(status, 400, "{path} {field} {value}: {body}");
            assert!(body.to_string().contains(field), "{path} {field} {value}: {body}");
        }
    }
    let (status, body) = server.post("/v1/generate", json!({ "prompt": "t5 ".repeat(300) })).await;
    assert_eq!(status, 400, "{body}");
    assert!(message(&body).contains("300") && message(&body).contains("256"), "{body}");
    let (status, body) = server.post("/v1/generate", json!({ "prompt": "t5", "adapter": "none" })).await;
    assert_eq!(status, 404, "{body}");
    assert!(message(&body).contains("none"));
    let (status, body) = server.post("/v1/classify", json!({ "input": "t5", "adapter": "kept" })).await;
    assert_eq!(status, 400, "no head and no labels: {body}");
    assert!(message(&body).contains("labels"), "{body}");
    let (status, body) = server.get("/no/such/route").await.unwrap();
    assert_eq!(status, 404);
    message(&body);
    let (status, body) = answer(server.http.delete(server.at("/v1/generate"))).await.unwrap();
    assert_eq!(status, 405);
    message(&body);
    let huge = vec![b' '; 40 << 20];
    if let Ok((status, body)) = answer(server.http.post(server.at("/v1/generate")).body(huge)).await {
        assert_eq!(status, 413, "{body}");
    }
    server.still_answers().await;
}

/// A value in the metrics.
async fn gauge(server: &Server, name: &str) -> f64 {
    let (_, text) = server.get("/metrics").await.unwrap();
    let text = text.as_str().unwrap();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_hang_up() {
    let model = loramux::base::DEFAULT_MODEL;
    let server = Server::start(model, &[]).await;
    for stream in [true, false] {
        let body =
            json!({ "prompt": "A long story:", "max_tokens": 8000, "ignore_eos": true, "stream": stream }).to_string();
        let head = format!("POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        let mut sockets = Vec::new();
        for _ in 0..4 {
            let mut socket = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
            socket.write_all(format!("{head}{body}").as_bytes()).unwrap();
            sockets.push(socket);
        }
        let wait = async |running: f64| {
            for _ in 0..200 {
                if gauge(&server, "vllm:num_requests_running").await == running {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            panic!("stream {stream}: {running} requests were expected to run");
        };
        wait(4.0).await;
        drop(sockets);
        wait(0.0).await;
        assert_eq!(gauge(&server, "loramux_kv_blocks{state=\"used\"}").await, 0.0);
    }
}

/// A body that never ends is given up, and nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends() {
    let server = tiny().await;
    let head = b"POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{\"prompt\": ";
    let slow = tokio::task::block_in_place(|| raw(&server, head));
    let status = slow.split_whitespace().nth(1).unwrap_or("closed").to_string();
    assert!(["400", "408", "closed"].contains(&status.as_str()), "{slow}");
    server.still_answers().await;
}
