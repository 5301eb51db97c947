//! HTTP: several dialects into one internal request, events back out. No tensor in here.

mod access;
mod adapters;
mod audit;
mod blend;
mod body;
mod bucket;
mod error;
mod fields;
mod grammar;
mod keys;
mod lorax;
mod native;
mod observe;
mod openai;
mod openapi;
mod origins;
mod page;
mod run;
mod stamp;
mod tenancy;
mod tls;
mod trace;
mod vllm;

use std::future::Ready;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use actix_web::body::MessageBody;
use actix_web::dev::{Payload, ServiceFactory, ServiceRequest, ServiceResponse};
use actix_web::guard::{self, Guard};
use actix_web::http::header::{ALLOW, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::middleware::Condition;
use actix_web::web::{self, Data};
use actix_web::{App, FromRequest, HttpRequest, HttpResponse, HttpServer, ResponseError};
use serde_json::json;
use tokio::sync::Semaphore;

use crate::adapter::Registry;
use crate::base::Language;
use crate::engine::{Engine, Grammars};
use crate::metrics::Metrics;
use crate::signals::Signals;
use crate::{Error, Result};
use access::{Caller, Need};
use error::ApiError;
use trace::Tracing;

pub use access::Access;
pub use audit::Audit;
pub use keys::{Entry, Scope, create as create_key};
pub use origins::Origins;
pub use tls::Certificate;

/// Uploads received at the same time; each has its files on the disk.
pub const UPLOADS: usize = 16;
/// Time for the last bytes of answers to go out, once the engine has nothing more to do and no upload is coming in.
const LAST_BYTES: u64 = 5;
/// How often the files of keys and certificates are looked at.
const REFRESH: Duration = Duration::from_secs(2);

/// What the handlers work with.
pub struct State {
    pub engine: Engine,
    pub registry: Arc<Registry>,
    /// The base's.
    pub language: Language,
    pub metrics: Arc<Metrics>,
    /// What clients call the base model.
    pub base_id: String,
    /// What else they call it.
    pub base_names: Vec<String>,
    /// Classes of the base's own head.
    pub labels: Option<Vec<String>>,
    /// Longest sequence in tokens.
    pub context: usize,
    /// How the weights are held, for people.
    pub dtype: String,
    /// `cpu` or `cuda`.
    pub device: &'static str,
    /// Whether clients may name directories of this machine.
    pub allow_local_paths: bool,
    /// Compiles what answers must be like.
    pub grammars: Grammars,
    /// Set when the server is about to stop.
    pub draining: AtomicBool,
    /// Places for uploads, [`UPLOADS`] of them.
    pub uploads: Semaphore,
    pub access: Arc<Access>,
    pub audit: Audit,
}

impl State {
    /// Whether the base is meant by this name.
    fn is_base(&self, name: &str) -> bool {
        name == "base" || name == self.base_id || self.base_names.iter().any(|other| other == name)
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

/// Where the state will be once it is loaded.
type Door = OnceLock<Arc<State>>;
/// Where spans go, if anywhere.
type Tracer = OnceLock<Tracing>;

fn enter(door: Option<&Data<Door>>) -> Result<Arc<State>, ApiError> {
    let state = door.and_then(|door| door.get());
    Ok(state.cloned().ok_or_else(|| Error::unavailable("the model is being loaded; try again soon"))?)
}

/// The state as the handlers take it.
#[derive(Clone)]
pub struct Shared(Arc<State>);

impl Deref for Shared {
    type Target = State;
    fn deref(&self) -> &State {
        &self.0
    }
}

impl FromRequest for Shared {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(http: &HttpRequest, _: &mut Payload) -> Self::Future {
        std::future::ready(enter(http.app_data()).map(Shared))
    }
}

/// Runs what takes a core for long on a thread of its own, so that other requests do not wait for it.
async fn beside<T: Send + 'static>(long: bool, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match long {
        true => web::block(work).await.map_err(Error::internal)?,
        false => work(),
    }
}

fn health(healthy: bool, status: &str) -> HttpResponse {
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    HttpResponse::build(code).json(json!({ "status": status }))
}

async fn live(state: Shared) -> HttpResponse {
    let alive = state.engine.is_alive();
    health(alive, if alive { "live" } else { "the engine has stopped" })
}

async fn ready(state: Shared) -> HttpResponse {
    match (state.engine.is_alive(), state.is_draining()) {
        (false, _) => health(false, "the engine has stopped"),
        (true, true) => health(false, "draining"),
        (true, false) => health(true, "ready"),
    }
}

async fn metrics(state: Shared, caller: Caller) -> HttpResponse {
    state.registry.update_metrics();
    state.metrics.queue_length.set(state.engine.load().0 as i64);
    let text = match caller.tenant() {
        None => state.metrics.render(),
        Some(_) => state.metrics.render_of(|adapter| caller.called(adapter).filter(|name| *name != adapter)),
    };
    HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text)
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
    let mut response = ApiError::with_status(StatusCode::METHOD_NOT_ALLOWED, &what).error_response();
    if let Ok(allowed) = HeaderValue::from_str(&allowed(http.match_pattern().as_deref()).join(", ")) {
        response.headers_mut().insert(ALLOW, allowed);
    }
    response
}

/// One table for the routes themselves, for what each asks of its callers, and for the check that the OpenAPI document has them
/// all.
macro_rules! routes {
    ($($path:literal: $($method:ident $need:ident => $handler:expr),+;)+) => {
        fn routes(config: &mut web::ServiceConfig) {
            $(config.service(
                web::resource($path)
                    $(.route(web::route().guard(answers(stringify!($method))).to($handler)))+
                    .default_service(web::to(no_method)),
            );)+
            config.default_service(web::to(no_route));
        }

        const ROUTES: &[(&str, &[(&str, Need)])] = &[$(($path, &[$((stringify!($method), Need::$need)),+])),+];
    };
}

routes! {
    "/v1/generate": post Infer => native::generate;
    "/v1/classify": post Infer => native::classify;
    "/v1/adapters": get Any => adapters::list, post Admin => adapters::post;
    "/v1/adapters/{name}": get Any => adapters::get, put Admin => adapters::put, delete Admin => adapters::delete;
    "/v1/adapters/{name}/pin": put Admin => adapters::pin, delete Admin => adapters::unpin;
    "/v1/adapters/{name}/unload": post Admin => adapters::unload;
    "/v1/models": get Any => openai::models;
    "/v1/models/{id:.+}": get Any => openai::model;
    "/v1/completions": post Infer => openai::completions;
    "/v1/chat/completions": post Infer => openai::chat;
    "/v1/load_lora_adapter": post Admin => vllm::load;
    "/v1/unload_lora_adapter": post Admin => vllm::unload;
    "/tokenize": post Infer => vllm::tokenize;
    "/detokenize": post Infer => vllm::detokenize;
    "/version": get Open => vllm::version;
    "/generate": post Infer => lorax::generate;
    "/generate_stream": post Infer => lorax::generate_stream;
    "/info": get Any => lorax::info;
    "/metrics": get Metrics => metrics;
    "/health": get Open => ready;
    "/ping": get Open => ready;
    "/health/live": get Open => live;
    "/health/ready": get Open => ready;
    "/openapi.json": get Open => openapi_document;
    "/assets/{file}": get Open => page::asset;
    "/": get Open => page::page, post Infer => lorax::either;
}

/// Whether a method of the table is asked for. HEAD is GET without the body, which actix leaves out.
fn is_asked_for(name: &str, method: &Method) -> bool {
    name.eq_ignore_ascii_case(if *method == Method::HEAD { "GET" } else { method.as_str() })
}

fn answers(name: &'static str) -> impl Guard {
    guard::fn_guard(move |context| is_asked_for(name, &context.head().method))
}

fn methods(route: Option<&str>) -> &'static [(&'static str, Need)] {
    ROUTES.iter().find(|(path, _)| Some(*path) == route).map_or(&[], |(_, methods)| methods)
}

/// For the header of that name.
fn allowed(route: Option<&str>) -> Vec<String> {
    let names = methods(route).iter().map(|(name, _)| name.to_uppercase());
    names.flat_map(|name| if name == "GET" { vec![name, "HEAD".into()] } else { vec![name] }).collect()
}

/// What a request asks of its caller: of a route that is not there, any key.
fn need(route: Option<&str>, method: &Method) -> Need {
    methods(route).iter().find(|(name, _)| is_asked_for(name, method)).map_or(Need::Any, |(_, need)| *need)
}

/// The application as [`serve`] has it, over a state that is there, for requests that come over no socket.
#[doc(hidden)]
pub fn application(
    state: Arc<State>,
) -> App<
    impl ServiceFactory<
        ServiceRequest,
        Config = (),
        Response = ServiceResponse<impl MessageBody>,
        Error = actix_web::Error,
        InitError = (),
    >,
> {
    let origins = state.access.origins().clone();
    app(Data::new(OnceLock::from(state)), Data::new(OnceLock::new()), origins)
}

fn app(
    door: Data<Door>,
    tracer: Data<Tracer>,
    origins: Origins,
) -> App<
    impl ServiceFactory<
        ServiceRequest,
        Config = (),
        Response = ServiceResponse<impl MessageBody>,
        Error = actix_web::Error,
        InitError = (),
    >,
> {
    let observe = actix_web::middleware::from_fn(observe::observe);
    // Before all else, as browsers ask for what pages may do without a key.
    let cors = Condition::new(!origins.is_empty(), origins.middleware());
    App::new().app_data(door).app_data(tracer).wrap(observe).wrap(cors).configure(routes)
}

/// Where and how the server is reached.
pub struct Entrance {
    /// Address and port.
    pub listen: String,
    /// For HTTPS.
    pub certificate: Option<Arc<Certificate>>,
    /// How long requests in flight may go on at the end.
    pub drain_timeout: Duration,
}

/// Listens, then loads the state, then serves until SIGTERM or SIGINT and finishes what is in flight, for
/// the entrance's `drain_timeout` at most. Before the state is there only `/health/live` is answered, all else is 503, and a
/// signal ends it at once.
///
/// Errors: that the address is taken; what `load` fails with.
pub fn serve(
    entrance: Entrance,
    access: Arc<Access>,
    load: impl FnOnce() -> Result<State> + Send + 'static,
) -> Result<()> {
    let Entrance { listen, certificate, drain_timeout } = entrance;
    let door: Data<Door> = Data::new(OnceLock::new());
    let tracer: Data<Tracer> = Data::new(OnceLock::new());
    let (shared, own, origins) = (door.clone(), tracer.clone(), access.origins().clone());
    let server = HttpServer::new(move || app(shared.clone(), own.clone(), origins.clone()))
        .workers(2)
        // A client that closes its side has hung up: its handler is dropped, and with it the request.
        .h1_allow_half_closed(false)
        .client_request_timeout(Duration::from_secs(20))
        .keep_alive(Duration::from_secs(75))
        .tcp_nodelay(true)
        .disable_signals()
        .shutdown_timeout(LAST_BYTES);
    let server = match &certificate {
        None => server.bind(&listen),
        Some(certificate) => server.bind_rustls_0_23(&listen, certificate.config()?),
    };
    let server = server.map_err(|e| Error::unavailable(format!("cannot listen on {listen}: {e}")))?;
    for (address, scheme) in server.addrs_with_scheme() {
        tracing::info!("listening on {scheme}://{address}");
    }
    std::thread::Builder::new().name("refresh".into()).spawn(move || {
        loop {
            std::thread::sleep(REFRESH);
            access.refresh();
            certificate.iter().for_each(|certificate| certificate.refresh());
        }
    })?;
    actix_web::rt::System::new().block_on(async move {
        let mut signals = Signals::new()?;
        if let Some(tracing) = Tracing::from_environment()? {
            let _ = tracer.set(tracing);
        }
        let server = server.run();
        let handle = server.handle();
        let server = actix_web::rt::spawn(server);
        let (sender, loaded) = tokio::sync::oneshot::channel();
        // No thread of the runtime's: that would be waited for when the load is cut short.
        std::thread::Builder::new().name("load".into()).spawn(move || {
            let _ = sender.send(load());
        })?;
        let state = tokio::select! {
            loaded = loaded => loaded.unwrap_or_else(|_| Err(Error::internal("loading panicked"))).map(Some),
            () = signals.next() => Ok(None),
        };
        let state = match state {
            Ok(Some(state)) => door.get_or_init(|| Arc::new(state)).clone(),
            unloaded => {
                handle.stop(false).await;
                return unloaded.map(|_| tracing::info!("stopped before the model was loaded"));
            }
        };
        tracing::info!("ready");
        signals.next().await;
        tracing::info!("stopping: requests in flight are finished first");
        state.draining.store(true, Ordering::Relaxed);
        tokio::select! {
            () = drain(&state, drain_timeout) => {}
            () = signals.next() => {
                tracing::warn!("a second signal: stopping at once");
                // Whatever runs, also what could not be told to stop.
                std::process::exit(1);
            }
        }
        tokio::select! {
            () = handle.stop(true) => {}
            () = signals.next() => std::process::exit(1),
        }
        if tracer.get().is_some() {
            let _ = web::block(move || tracer.get().map(Tracing::shutdown)).await;
        }
        server.await.map_err(Error::internal)?.map_err(Error::from)
    })
}

/// Waits for the engine to finish what it has, and for uploads to be received. What is not done in time fails.
async fn drain(state: &State, limit: Duration) {
    let engine = &state.engine;
    let received = state.uploads.acquire_many(UPLOADS as u32);
    if tokio::time::timeout(limit, async { tokio::join!(engine.drain(), received) }).await.is_ok() {
        return;
    }
    tracing::warn!("requests still run after {} s; they are given up", limit.as_secs());
    engine.give_up();
    if tokio::time::timeout(Duration::from_secs(LAST_BYTES), engine.drain()).await.is_err() {
        tracing::error!("the engine does not stop");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_changes_adapters_needs_admin() {
        let needed = |route, method| need(Some(route), &method);
        assert_eq!(needed("/v1/adapters/{name}", Method::DELETE), Need::Admin);
        assert_eq!(needed("/v1/adapters/{name}", Method::GET), Need::Any);
        assert_eq!((needed("/", Method::GET), needed("/", Method::POST)), (Need::Open, Need::Infer));
        assert_eq!(needed("/metrics", Method::HEAD), Need::Metrics);
        // What is not served is no way in.
        assert_eq!((needed("/", Method::PUT), need(None, &Method::GET)), (Need::Any, Need::Any));
        for (path, methods) in ROUTES {
            for (method, need) in *methods {
                let changes = path.contains("adapter") && *method != "get";
                assert_eq!(*need == Need::Admin, changes, "{method} {path}");
            }
        }
    }

    #[test]
    fn the_openapi_document_has_every_route() {
        let document = openapi::document();
        let paths = document["paths"].as_object().unwrap();
        let documented = paths.iter().flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(move |method| (path.clone(), method.clone()))
        });
        let served = ROUTES.iter().flat_map(|(path, methods)| {
            let path = path.replace(":.+}", "}");
            methods.iter().map(move |(method, _)| (path.clone(), method.to_string()))
        });
        assert_eq!(documented.collect::<BTreeSet<_>>(), served.collect::<BTreeSet<_>>());
    }
}
