//! Bad input: every one gets an error that says what is wrong, and the server goes on.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

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
        ("an alpha beyond numbers", with("lora_alpha", json!(1e300)), weights.clone(), &["alpha"]),
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
    assert!(message(&body).contains("layer 10") && message(&body).contains("SmolLM2"), "{body}");
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
    server.left_nothing().await;
    server.still_answers().await;
}

fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(server.url.trim_start_matches("http://")).unwrap()
}

/// The start of the answer; nothing if the server closes the connection. It must do one of the two in time.
fn answer_to(mut stream: TcpStream, limit: Duration) -> String {
    let start = Instant::now();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.windows(4).any(|w| w == b"\r\n\r\n") {
        let left = limit.checked_sub(start.elapsed()).filter(|left| !left.is_zero());
        let left = left.unwrap_or_else(|| panic!("the server neither answers nor closes after {limit:?}"));
        stream.set_read_timeout(Some(left)).unwrap();
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&buffer[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// Sends a request whose body comes in chunks, as many as the server takes; its answer.
fn chunked<'a>(server: &Server, head: &str, chunks: impl Iterator<Item = &'a [u8]>) -> String {
    let mut stream = connect(server);
    stream.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes()).unwrap();
    let start = Instant::now();
    for chunk in chunks {
        let framed = [format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat();
        // The server may have answered and closed the connection; the answer is there to be read all the same.
        if stream.write_all(&framed).is_err() {
            return answer_to(stream, Duration::from_secs(20));
        }
        assert!(start.elapsed() < Duration::from_secs(40), "the server reads on and on");
    }
    let _ = stream.write_all(b"0\r\n\r\n");
    answer_to(stream, Duration::from_secs(20))
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_never_fit() {
    let server = tiny().await;
    let put = "PUT /v1/adapters/big HTTP/1.1\r\nhost: localhost\r\n";
    let head = format!("{put}content-type: multipart/form-data; boundary=b\r\n");
    let part = "--b\r\ncontent-disposition: form-data; name=\"weights\"; filename=\"w\"\r\n\r\n";
    let zeros = vec![0; 1 << 16];
    let megabytes = |n: usize| std::iter::repeat_n(&zeros[..], 16 * n);
    tokio::task::block_in_place(|| {
        let mut stream = connect(&server);
        stream.write_all(format!("{head}content-length: 3221225472\r\n\r\n").as_bytes()).unwrap();
        let text = answer_to(stream, Duration::from_secs(10));
        assert!(text.starts_with("HTTP/1.1 413"), "3 GB announced: {text}");
        // Nothing is announced, so that the bytes must be counted.
        let text = chunked(&server, &head, std::iter::once(part.as_bytes()).chain(megabytes(12)));
        assert!(text.starts_with("HTTP/1.1 413"), "a form of 12 MB where 8 are allowed: {text}");
        let text = chunked(&server, put, megabytes(12));
        assert!(text.starts_with("HTTP/1.1 413"), "an archive of 12 MB where 8 are allowed: {text}");
        let end = "\r\n--b--\r\n".as_bytes();
        let fits = [part.as_bytes()].into_iter().chain(megabytes(7)).chain([end]);
        let text = chunked(&server, &head, fits);
        assert!(text.starts_with("HTTP/1.1 422"), "a form that fits, of no use: {text}");
    });
    // A client that stops in the middle leaves nothing behind.
    let mut stream = connect(&server);
    stream.write_all(format!("{head}content-length: 100000\r\n\r\n{part}abc").as_bytes()).unwrap();
    let start = Instant::now();
    while std::fs::read_dir(server.store.join("incoming")).unwrap().count() == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the upload does not begin");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(stream);
    server.left_nothing().await;
    assert_eq!(server.get("/v1/adapters/big").await.unwrap().0, 404);
    server.still_answers().await;
}

/// A form's name is looked at as soon as it is there: no file is taken for one that is none.
#[tokio::test(flavor = "multi_thread")]
async fn forms_that_contradict_themselves() {
    let server = tiny().await;
    let field =
        |name: &str, text: &str| format!("--b\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n");
    let head = "content-type: multipart/form-data; boundary=b\r\n";
    tokio::task::block_in_place(|| {
        for (path, name) in [("POST /v1/adapters", "a/b"), ("PUT /v1/adapters/x", "y")] {
            let start = field("name", name) + &field("config", "{}").replace("{}\r\n", "");
            let mut stream = connect(&server);
            let text = format!("{path} HTTP/1.1\r\nhost: localhost\r\n{head}content-length: 100000\r\n\r\n{start}");
            stream.write_all(text.as_bytes()).unwrap();
            let answer = answer_to(stream, Duration::from_secs(10));
            assert!(answer.starts_with("HTTP/1.1 400"), "{path} {name}: {answer}");
        }
    });
    let part = |bytes: &str| Part::bytes(bytes.as_bytes().to_vec()).file_name("f");
    let form = Form::new().part("config", part("{}")).part("config", part("{}"));
    let (status, body) = answer(server.http.put(server.at("/v1/adapters/x")).multipart(form)).await.unwrap();
    assert!(status == 400 && message(&body).contains("twice"), "{status} {body}");
    // What the server cannot write is its own fault, and said so.
    let incoming = server.store.join("incoming");
    std::fs::rename(&incoming, server.store.join("elsewhere")).unwrap();
    let (config, weights) = good();
    let (status, body) = server.put("x", config.to_string().into(), weights.clone()).await;
    assert_eq!(status, 500, "{body}");
    std::fs::rename(server.store.join("elsewhere"), &incoming).unwrap();
    assert_eq!(server.put("x", config.to_string().into(), weights).await.0, 201);
    server.left_nothing().await;
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
        ("typical_p", json!(-0.1)),
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
    let chat = |role: &str| json!([{ "role": role, "content": "x" }]);
    let inputs = |parameters: Value| json!({ "inputs": "t5", "parameters": parameters });
    // Unknown values of enums, fields that would change the answer: refused, with the field and what was found.
    for (path, body, words) in [
        ("/v1/chat/completions", json!({ "messages": chat("robot") }), ["messages[0].role", "robot"]),
        ("/v1/generate", json!({ "messages": chat("User") }), ["messages[0].role", "User"]),
        (
            "/v1/completions",
            json!({ "prompt": "t5", "response_format": { "type": "yaml" } }),
            ["response_format", "yaml"],
        ),
        ("/generate", inputs(json!({ "adapter_id": "kept", "adapter_source": "moon" })), ["adapter_source", "moon"]),
        ("/generate", inputs(json!({ "top_n_tokens": 2 })), ["parameters.top_n_tokens", "not supported"]),
        (
            "/v1/completions",
            json!({ "prompt": "t5", "skip_special_tokens": false }),
            ["skip_special_tokens", "not supported"],
        ),
        ("/v1/completions", json!({ "prompt": "t5", "truncate_prompt_tokens": 3 }), ["truncate_prompt_tokens", "not"]),
        ("/v1/chat/completions", json!({ "messages": chat("user"), "echo": true }), ["echo", "not supported"]),
        (
            "/v1/chat/completions",
            json!({ "messages": chat("user"), "documents": [{}] }),
            ["documents", "not supported"],
        ),
        ("/v1/chat/completions", json!({ "messages": chat("user"), "chat_template": "x" }), ["chat_template", "not"]),
        (
            "/v1/chat/completions",
            json!({ "messages": chat("user"), "chat_template_kwargs": "a" }),
            ["chat_template_kwargs", "an object"],
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": chat("user"), "continue_final_message": true }),
            ["continue", "not"],
        ),
        (
            "/v1/completions",
            json!({ "prompt": vec!["t5"; 1024], "n": 128, "max_tokens": 250, "logprobs": 20 }),
            ["limit is 128 MiB", "max_tokens"],
        ),
        ("/v1/classify", json!({ "input": vec!["t5"; 1000], "labels": vec!["t6"; 66] }), ["66000", "65536"]),
    ] {
        let (status, answer) = server.post(path, body.clone()).await;
        assert_eq!(status, 400, "{path} {body}: {answer}");
        assert!(words.iter().all(|w| message(&answer).contains(w)), "{path} {words:?}: {answer}");
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
    for (path, status, allowed) in
        [("/v1/models", 405, "GET, HEAD"), ("/", 405, "GET, HEAD, POST"), ("/health", 405, "GET, HEAD")]
    {
        let response = server.http.patch(server.at(path)).send().await.unwrap();
        assert_eq!((response.status().as_u16(), response.headers()["allow"].to_str().unwrap()), (status, allowed));
    }
    // As GET, without the body.
    let (get, head) = (server.http.get(server.at("/v1/models")), server.http.head(server.at("/v1/models")));
    let (get, head) = (get.send().await.unwrap(), head.send().await.unwrap());
    assert_eq!(
        (head.status(), head.headers()["content-type"].clone()),
        (get.status(), get.headers()["content-type"].clone())
    );
    assert!(!get.text().await.unwrap().is_empty() && head.text().await.unwrap().is_empty());
    server.still_answers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_hang_up() {
    let model = loramux::base::DEFAULT_MODEL;
    let server = Server::start(model, &[]).await;
    for stream in [true, false] {
        let body =
            json!({ "prompt": "A long story:", "max_tokens": 8000, "ignore_eos": true, "stream": stream }).to_string();
        let head = format!("POST /v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
        let mut sockets = Vec::new();
        for _ in 0..4 {
            let mut socket = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
            socket.write_all(format!("{head}{body}").as_bytes()).unwrap();
            sockets.push(socket);
        }
        let wait = async |running: f64| {
            for _ in 0..200 {
                if server.metric("vllm:num_requests_running").await == running {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            panic!("stream {stream}: {running} requests were expected to run");
        };
        wait(4.0).await;
        // Of a stream, in the middle: each has read some of its answer.
        for socket in sockets.iter_mut().filter(|_| stream) {
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let (mut seen, mut piece) = (Vec::new(), [0; 512]);
            while !String::from_utf8_lossy(&seen).contains("data: ") {
                let n = socket.read(&mut piece).unwrap();
                assert!(n > 0, "the stream ended: {}", String::from_utf8_lossy(&seen));
                seen.extend_from_slice(&piece[..n]);
            }
        }
        drop(sockets);
        wait(0.0).await;
        assert_eq!(server.metric("loramux_kv_blocks{state=\"used\"}").await, 0.0);
    }
}

/// Bodies that stop, crawl or never end are given up, and nobody waits for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends() {
    let server = tiny().await;
    let head = "POST /v1/generate HTTP/1.1\r\nhost: localhost\r\n";
    let stops = || {
        let mut stream = connect(&server);
        stream.write_all(format!("{head}content-length: 1000\r\n\r\n{{\"prompt\": ").as_bytes()).unwrap();
        answer_to(stream, Duration::from_secs(40))
    };
    let crawls = || {
        let mut stream = connect(&server);
        stream.write_all(format!("{head}content-length: 1000\r\n\r\n{{\"prompt\": \"").as_bytes()).unwrap();
        let mut drip = stream.try_clone().unwrap();
        std::thread::spawn(move || {
            while drip.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_secs(2));
            }
        });
        answer_to(stream, Duration::from_secs(40))
    };
    let goes_on = || chunked(&server, head, std::iter::repeat(&[b' '; 1 << 16][..]));
    let answers = std::thread::scope(|threads| {
        let tasks = [threads.spawn(stops), threads.spawn(crawls), threads.spawn(goes_on)];
        tasks.map(|task| task.join().unwrap())
    });
    for (answer, status) in answers.iter().zip(["408", "408", "413"]) {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{status} was expected: {answers:?}");
    }
    server.still_answers().await;
}
