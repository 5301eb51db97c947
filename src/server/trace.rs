//! OpenTelemetry: a span for each request, and one for each part of its way, to where `OTEL_EXPORTER_OTLP_ENDPOINT` says. A trace
//! that a client or a proxy began (W3C's `traceparent`) goes on. The other variables of the OpenTelemetry SDK hold too.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use actix_web::http::header::HeaderMap;
use actix_web::web::Bytes;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::runtime::Handle;

use crate::{Error, Result};

/// Longest that an export may take.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Marks on a request's way, set once each.
#[derive(Debug, Default)]
pub struct Marks {
    /// When a wait for its adapter began and ended, where there was one.
    pub adapter: OnceLock<(Instant, Instant)>,
    /// When it first went to the engine.
    pub submitted: OnceLock<Instant>,
    /// When the engine first answered.
    pub answered: OnceLock<Instant>,
    /// Status of the error that ended an answer which had begun with another.
    pub failed: OnceLock<u16>,
    pub prompt_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
}

/// What is told of a request at its end.
pub struct Told<'a> {
    /// When it came in, also on the clock, which is only looked at once: it may jump.
    pub start: (Instant, SystemTime),
    pub method: &'a str,
    pub route: &'a str,
    pub status: u16,
    pub request_id: &'a str,
    /// As metrics name it.
    pub adapter: &'a str,
    pub tenant: Option<&'a str>,
    /// The trace that it is a part of.
    pub parent: &'a Context,
    pub marks: &'a Marks,
}

/// Makes spans and sends them off.
pub struct Tracing {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Tracing {
    /// `None` where the environment names no place to send spans to. They are sent by tasks of the current runtime.
    pub fn from_environment() -> Result<Option<Self>> {
        let set = |name: &str| std::env::var(name).is_ok_and(|value| !value.is_empty());
        let named = set("OTEL_EXPORTER_OTLP_ENDPOINT") || set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
        let disabled = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|value| value.eq_ignore_ascii_case("true"));
        if !named || disabled {
            return Ok(None);
        }
        let wrong = |e: &dyn std::fmt::Display| Error::bad_request(format!("OpenTelemetry: {e}"));
        let http = reqwest::Client::builder().timeout(EXPORT_TIMEOUT).build().map_err(|e| wrong(&e))?;
        let client = Client { http, runtime: Handle::current() };
        let exporter = SpanExporter::builder().with_http().with_http_client(client).build().map_err(|e| wrong(&e))?;
        let mut resource = Resource::builder();
        if !set("OTEL_SERVICE_NAME") {
            resource = resource.with_service_name("loramux");
        }
        resource = resource.with_attributes([KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))]);
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
        tracing::info!("spans go to an OpenTelemetry collector");
        Ok(Some(Tracing { tracer: provider.tracer("loramux"), provider }))
    }

    /// The trace that a request's headers name, if any.
    pub fn parent(headers: &HeaderMap) -> Context {
        TraceContextPropagator::new().extract(&Headers(headers))
    }

    /// Sends the spans of a request that is over.
    pub fn tell(&self, told: &Told) {
        let end = Instant::now();
        let Told { start: (start, on_clock), method, route, marks, .. } = told;
        let at = |moment: Instant| *on_clock + moment.saturating_duration_since(*start);
        let count = |tokens: &AtomicU64| tokens.load(Ordering::Relaxed) as i64;
        let mut attributes = vec![
            KeyValue::new("http.request.method", method.to_string()),
            KeyValue::new("http.route", route.to_string()),
            KeyValue::new("http.response.status_code", i64::from(told.status)),
            KeyValue::new("loramux.request_id", told.request_id.to_string()),
            KeyValue::new("loramux.adapter", told.adapter.to_string()),
        ];
        attributes.extend(told.tenant.map(|tenant| KeyValue::new("loramux.tenant", tenant.to_string())));
        if marks.submitted.get().is_some() {
            attributes.push(KeyValue::new("gen_ai.usage.input_tokens", count(&marks.prompt_tokens)));
            attributes.push(KeyValue::new("gen_ai.usage.output_tokens", count(&marks.generated_tokens)));
        }
        let request = self.tracer.span_builder(format!("{method} {route}")).with_kind(SpanKind::Server);
        let request = request.with_start_time(*on_clock).with_attributes(attributes);
        let mut request = request.start_with_context(&self.tracer, told.parent);
        if told.status >= 500 {
            request.set_status(Status::error(format!("status {}", told.status)));
        }
        let within = told.parent.with_remote_span_context(request.span_context().clone());
        let part = |name: &'static str, start: Instant, end: Instant| {
            let part = self.tracer.span_builder(name).with_start_time(at(start));
            part.start_with_context(&self.tracer, &within).end_with_timestamp(at(end));
        };
        if let Some(&(start, end)) = marks.adapter.get() {
            part("load adapter", start, end);
        }
        if let Some(&submitted) = marks.submitted.get() {
            let answered = marks.answered.get().copied();
            part("queue and prompt", submitted, answered.unwrap_or(end));
            answered.into_iter().for_each(|answered| part("answer", answered, end));
        }
        request.end_with_timestamp(at(end));
    }

    /// Sends what is left. It waits for the runtime's tasks, so it must not be one of them.
    pub fn shutdown(&self) {
        if let Err(e) = self.provider.shutdown_with_timeout(EXPORT_TIMEOUT) {
            tracing::warn!("the last spans were not sent: {e}");
        }
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|key| key.as_str()).collect()
    }
}

/// The program's HTTP client as the exporter calls it, from a thread outside the runtime.
#[derive(Debug)]
struct Client {
    http: reqwest::Client,
    runtime: Handle,
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        let (http, request) = (self.http.clone(), reqwest::Request::try_from(request)?);
        let sent = self.runtime.spawn(async move {
            let response = http.execute(request).await?;
            let status = response.status();
            Ok::<_, reqwest::Error>((status, response.bytes().await?))
        });
        let (status, body) = sent.await??;
        Ok(http::Response::builder().status(status).body(body)?)
    }
}
