//! HTTP: several dialects into one internal request, events back out. No tensor in here.

mod adapters;
mod error;
mod fields;
mod lorax;
mod native;
mod observe;
mod openai;
mod openapi;
mod run;
mod vllm;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::web::{self, Data};
use actix_web::{App, HttpResponse, HttpServer, ResponseError};
use serde_json::json;

use crate::adapter::Registry;
use crate::base::{ChatTemplate, Tokenizer};
use crate::engine::Engine;
use crate::metrics::Metrics;
use crate::{Error, Result};
use error::ApiError;

/// What the handlers work with.
pub struct State {
    pub engine: Engine,
    pub registry: Arc<Registry>,
    pub tokenizer: Arc<Tokenizer>,
    pub chat: Option<Arc<ChatTemplate>>,
    pub metrics: Arc<Metrics>,
    /// What clients call the base model.
    pub base_id: String,
    /// Longest sequence in tokens.
    pub context: usize,
    /// How the weights are held, for people.
    pub dtype: String,
    /// `cpu` or `cuda`.
    pub device: &'static str,
    /// Whether clients may name directories of this machine.
    pub allow_local_paths: bool,
    /// Set when the server is about to stop.
    pub draining: AtomicBool,
}

type Shared = Data<State>;

async fn live() -> HttpResponse {
    HttpResponse::Ok().json(json!({ "status": "live" }))
}

async fn ready(state: Shared) -> HttpResponse {
    match state.draining.load(Ordering::Relaxed) {
        true => HttpResponse::ServiceUnavailable().json(json!({ "status": "draining" })),
        false => HttpResponse::Ok().json(json!({ "status": "ready" })),
    }
}

async fn metrics(state: Shared) -> HttpResponse {
    state.registry.update_metrics();
    HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(state.metrics.render())
}

async fn page() -> HttpResponse {
    HttpResponse::Ok().content_type("text/html; charset=utf-8").body(include_str!("page.html"))
}

async fn openapi_document() -> HttpResponse {
    HttpResponse::Ok().json(openapi::document())
}

async fn no_route(http: actix_web::HttpRequest) -> HttpResponse {
    let what = format!("there is no route {} {}; see /openapi.json", http.method(), http.path());
    ApiError::from(Error::not_found(what)).error_response()
}

async fn no_method(http: actix_web::HttpRequest) -> HttpResponse {
    let what = format!("{} does not go with {}; see /openapi.json", http.method(), http.path());
    ApiError::with_status(StatusCode::METHOD_NOT_ALLOWED, &what).error_response()
}

fn routes(config: &mut web::ServiceConfig) {
    macro_rules! route {
        ($path:expr, $($method:ident => $handler:expr),+) => {
            config.service(web::resource($path)$(.route(web::$method().to($handler)))+.default_service(web::to(no_method)));
        };
    }
    route!("/v1/generate", post => native::generate);
    route!("/v1/classify", post => native::classify);
    route!("/v1/adapters", get => adapters::list, post => adapters::post);
    route!("/v1/adapters/{name}", get => adapters::get, put => adapters::put, delete => adapters::delete);
    route!("/v1/models", get => openai::models);
    route!("/v1/models/{id:.+}", get => openai::model);
    route!("/v1/completions", post => openai::completions);
    route!("/v1/chat/completions", post => openai::chat);
    route!("/v1/load_lora_adapter", post => vllm::load);
    route!("/v1/unload_lora_adapter", post => vllm::unload);
    route!("/tokenize", post => vllm::tokenize);
    route!("/detokenize", post => vllm::detokenize);
    route!("/version", get => vllm::version);
    route!("/generate", post => lorax::generate);
    route!("/generate_stream", post => lorax::generate_stream);
    route!("/info", get => lorax::info);
    route!("/metrics", get => metrics);
    route!("/health", get => ready);
    route!("/ping", get => ready);
    route!("/health/live", get => live);
    route!("/health/ready", get => ready);
    route!("/openapi.json", get => openapi_document);
    route!("/", get => page, post => lorax::either);
    config.default_service(web::to(no_route));
}

/// Serves until SIGTERM or SIGINT, then finishes what is in flight.
pub fn serve(state: State, listen: &str) -> Result<()> {
    let state = Data::new(state);
    let shared = state.clone();
    let server = HttpServer::new(move || {
        App::new().app_data(shared.clone()).wrap(actix_web::middleware::from_fn(observe::observe)).configure(routes)
    })
    .workers(2)
    // A client that closes its side has hung up: its handler is dropped, and with it the request.
    .h1_allow_half_closed(false)
    .client_request_timeout(Duration::from_secs(20))
    .keep_alive(Duration::from_secs(75))
    .tcp_nodelay(true)
    .disable_signals()
    .shutdown_timeout(600)
    .bind(listen)
    .map_err(|e| Error::unavailable(format!("cannot listen on {listen}: {e}")))?;
    for address in server.addrs() {
        tracing::info!("listening on http://{address}");
    }
    actix_web::rt::System::new().block_on(async move {
        let server = server.run();
        let handle = server.handle();
        actix_web::rt::spawn(async move {
            stop_signal().await;
            tracing::info!("stopping: requests in flight are finished first");
            state.draining.store(true, Ordering::Relaxed);
            state.engine.drain().await;
            handle.stop(true).await;
        });
        server.await.map_err(Error::from)
    })
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = match signal(SignalKind::terminate()) {
        Ok(signal) => signal,
        Err(e) => return tracing::error!("SIGTERM cannot be waited for: {e}"),
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
