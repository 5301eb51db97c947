//! The server's application over a small base, in this process and without a socket.

use std::fs;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use actix_web::body::to_bytes;
use actix_web::dev::Service;
use actix_web::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use actix_web::http::{Method, Uri};
use actix_web::rt::{System, SystemRunner};
use actix_web::test::{TestRequest, init_service};
use candle_core::{DType, Device};
use loramux::adapter::{Condition, Registry, RegistryOptions, Source};
use loramux::base::simd::Simd;
use loramux::base::{Base, Decoder, DecoderOptions, Kernels};
use loramux::engine::{Engine, EngineOptions, Grammars, Runner};
use loramux::metrics::Metrics;
use loramux::server::{self, Access, Audit, State};
use serde_json::Value;
use tokio::sync::Semaphore;

/// Spells any text, byte by byte.
const BASE: &[u8] = include_bytes!("host/base.gguf");
/// One with a pair of matrices, and one with a head beside them.
const ADAPTERS: [(&str, &[u8], &[u8]); 2] = [
    (
        "lora",
        include_bytes!("host/adapters/lora/adapter_config.json"),
        include_bytes!("host/adapters/lora/adapter_model.safetensors"),
    ),
    (
        "head",
        include_bytes!("host/adapters/head/adapter_config.json"),
        include_bytes!("host/adapters/head/adapter_model.safetensors"),
    ),
];
/// The key of requests that bring none is `operator`; `tenant` is one too.
const KEYS: &str = "
[keys.operator]
sha256 = '06e55b633481f7bb072957eabcf110c972e86691c3cfedabe088024bffe42f23'
scopes = ['infer', 'admin', 'metrics']
[keys.tenant]
sha256 = 'e9da86d351cf9a7642d8c50195c3f466220911a15c177809bd1161a51e8c5f24'
scopes = ['infer', 'admin', 'metrics']
tenant = 'acme'
";
/// Of a request. What it did not get done then is given up, as a server does it.
const TIME: Duration = Duration::from_secs(2);
/// A request that takes longer hangs: compiling what it wants of its answer has 20 s, and is not given up.
const HANGS: Duration = Duration::from_secs(60);

pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

type Answering = Pin<Box<dyn Future<Output = (u16, bool, Vec<u8>)>>>;

struct Host {
    system: SystemRunner,
    call: Box<dyn Fn(TestRequest) -> Answering>,
    state: Arc<State>,
    _folder: tempfile::TempDir,
}

impl Host {
    fn start() -> Self {
        let folder = super::folder(&[("base.gguf", BASE), ("keys.toml", KEYS.as_bytes())]);
        let at = |name: &str| folder.path().join(name);
        for (name, config, weights) in ADAPTERS {
            let adapter = at("adapters").join(name);
            fs::create_dir_all(&adapter).expect("room for a folder");
            fs::write(adapter.join("adapter_config.json"), config).expect("room for a file");
            fs::write(adapter.join("adapter_model.safetensors"), weights).expect("room for a file");
        }
        let base = Base::open(&at("base.gguf").to_string_lossy()).expect("a base");
        let kernels = Kernels::Packed(Simd::detect());
        let options = DecoderOptions { device: Device::Cpu, kernels, format: None, dtype: DType::F32 };
        let decoder = Arc::new(Decoder::load(&base.config, &base.weights, options).expect("a base that can be run"));
        let system = System::new();
        let (call, state) = system.block_on(async {
            let metrics = Arc::new(Metrics::new());
            let options = RegistryOptions {
                decoder: decoder.clone(),
                language: base.language(),
                base: base.id.clone(),
                directories: vec![at("adapters")],
                store: at("store"),
                memory: 1 << 20,
                pool: None,
                max_upload: 1 << 20,
                uploaded_templates: false,
                sources: vec![],
                source_refresh: TIME,
                source_cache: 0,
            };
            let registry = Registry::open(options, metrics.clone()).expect("a store");
            let runner = Runner::new(decoder.clone(), 1 << 20).expect("memory");
            let options = EngineOptions {
                max_sequences: 8,
                max_batch_tokens: 64,
                max_prefill_tokens: 64,
                max_queue: 64,
                tenant_slowdown: 1.0,
                eos_tokens: base.config.eos_tokens.clone(),
            };
            let engine = Engine::start(Box::new(runner), base.tokenizer.clone(), options, metrics.clone());
            let state = Arc::new(State {
                engine: engine.expect("a thread"),
                registry,
                language: base.language(),
                metrics,
                base_id: "base".into(),
                base_names: vec![],
                labels: None,
                context: decoder.config().context,
                dtype: "q8".into(),
                device: "cpu",
                allow_local_paths: true,
                grammars: Grammars::default(),
                draining: false.into(),
                uploads: Semaphore::new(server::UPLOADS),
                access: Arc::new(Access::open(Some(at("keys.toml")), Some(TIME)).expect("keys")),
                audit: Audit::open(None).expect("no file"),
            });
            let service = init_service(server::application(state.clone())).await;
            let call = move |request: TestRequest| -> Answering {
                let answer = service.call(request.to_request());
                Box::pin(async move {
                    let response = match answer.await {
                        Ok(response) => response.map_into_boxed_body().into_parts().1,
                        Err(e) => e.error_response(),
                    };
                    let kind = response.headers().get(CONTENT_TYPE);
                    let is_json = kind.is_some_and(|kind| kind.as_bytes() == b"application/json");
                    let status = response.status().as_u16();
                    let body = to_bytes(response.into_body()).await.expect("a body to its end");
                    (status, is_json, body.to_vec())
                })
            };
            (call, state)
        });
        Host { system, call: Box::new(call), state, _folder: folder }
    }

    fn ask(&self, request: TestRequest) -> Answer {
        let (status, is_json, body) = self.system.block_on(async {
            let answer = tokio::time::timeout(HANGS, (self.call)(request)).await.expect("an answer in time");
            // The next one finds what this one found.
            let published = self.state.registry.list().into_iter().filter(|info| info.source == Source::Store);
            for info in published {
                let _ = self.state.registry.remove(&info.name, Condition::Always).await;
            }
            answer
        });
        let text = String::from_utf8_lossy(&body).into_owned();
        assert!(self.state.engine.is_alive(), "the engine has stopped");
        // The server's own fault, also where the answer had begun. Nothing here is full, or away.
        let waits = text.contains("other grammars are being compiled");
        assert!(status < 500 || status == 504 || waits, "{status} {text}");
        assert!(!text.contains(r#""type":"server_error""#), "{status} {text}");
        if is_json {
            let answer: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {status} {text}"));
            let told = answer["error"]["message"].as_str().is_some_and(|message| !message.is_empty());
            // What is not ready says so elsewhere.
            assert!(status < 400 || told, "{status} {text}");
        }
        Answer { status, body }
    }
}

/// What the server answers; `None` where the bytes are no request that HTTP would let through.
pub fn ask(data: &[u8]) -> Option<Answer> {
    thread_local! {
        // Never dropped: its threads go on until the process ends.
        static HOST: &'static Host = Box::leak(Box::new(Host::start()));
    }
    let request = read(data)?;
    Some(HOST.with(|host| host.ask(request)))
}

fn read(data: &[u8]) -> Option<TestRequest> {
    let (mut lines, mut body) = (vec![], data);
    while let Some(end) = body.iter().position(|byte| *byte == b'\n') {
        let line = &body[..end];
        body = &body[end + 1..];
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let (first, headers) = lines.split_first()?;
    let space = first.iter().position(|byte| *byte == b' ')?;
    let method = Method::from_bytes(&first[..space]).ok()?;
    let uri = std::str::from_utf8(&first[space + 1..]).ok()?;
    uri.parse::<Uri>().ok()?;
    let mut request = TestRequest::with_uri(uri).method(method).set_payload(body.to_vec());
    let mut has_key = false;
    for header in headers {
        let colon = header.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&header[..colon]).ok()?;
        has_key |= name == "authorization" || name == "x-api-key";
        request = request.append_header((name, HeaderValue::from_bytes(header[colon + 1..].trim_ascii()).ok()?));
    }
    Some(if has_key { request } else { request.insert_header(("x-api-key", "operator")) })
}
