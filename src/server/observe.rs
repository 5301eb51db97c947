//! Lets requests in, or not; counts every one, and times it to the last byte of its answer; gives it an id and logs its end.
//! Answers for the server where it is not there yet.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::error::PayloadError;
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::http::{ConnectionType, Method};
use actix_web::middleware::Next;
use actix_web::web::{Bytes, Data};
use actix_web::{Error, HttpMessage, ResponseError};
use futures::{Stream, StreamExt};
use opentelemetry::Context as Trace;

use super::access::{Caller, Need};
use super::error::ApiError;
use super::trace::{Marks, Told, Tracing};
use super::{State, Tracer, enter, health, need};

/// The name under which the metrics count a request, put down where it is known to be an adapter's or the base's.
#[derive(Clone, Default)]
pub struct Counted(Rc<RefCell<Option<Option<String>>>>);

impl Counted {
    pub fn set(&self, adapter: Option<&str>) {
        *self.0.borrow_mut() = Some(adapter.map(str::to_string));
    }
}

/// By which a request is found in the logs of all that it went through.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client's id may have so many characters.
const MAX_ID: usize = 128;

/// The id that the client or a proxy gave the request, if it is one to log, else a new one.
fn request_id(request: &ServiceRequest) -> String {
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let fits = |id: &&str| (1..=MAX_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    given.filter(fits).map_or_else(|| format!("{:032x}", rand::random::<u128>()), str::to_string)
}

fn identified(mut response: ServiceResponse<Observed>, id: &str) -> ServiceResponse<Observed> {
    // It is of visible ASCII, so it is a header's value.
    if let Ok(value) = HeaderValue::from_str(id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

pub async fn observe(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<Observed>, Error> {
    let id = request_id(&request);
    let payload = Held(Rc::new(RefCell::new(request.take_payload())));
    request.set_payload(Payload::Stream { payload: Box::pin(payload.clone()) });
    let state = match enter(request.app_data()) {
        Ok(state) => state,
        Err(e) => return Ok(identified(alone(request, e, payload), &id)),
    };
    let counted = Counted::default();
    request.extensions_mut().insert(counted.clone());
    let mut end = End {
        start: Instant::now(),
        span: request
            .app_data::<Data<Tracer>>()
            .filter(|tracer| tracer.get().is_some())
            .map(|tracer| (SystemTime::now(), Tracing::parent(request.headers()), tracer.clone())),
        method: request.method().clone(),
        caller: None,
        id: id.clone(),
        state,
        route: request.match_pattern().unwrap_or_else(|| "other".into()),
        counted,
        // nginx's code for a client that hung up: it stands if `next` is dropped before there is an answer.
        status: 499,
    };
    let need = need(request.match_pattern().as_deref(), request.method());
    let mut response = match end.state.access.admit(&request, need, &id) {
        Ok(caller) => {
            end.caller = Some(caller.clone());
            request.extensions_mut().insert(caller);
            let answer = next.call(request).await;
            answer.inspect_err(|e| end.status = e.as_response_error().status_code().as_u16())?.map_into_boxed_body()
        }
        Err(e) => {
            let refused = ApiError::from(e);
            if need == Need::Admin {
                let peer = request.peer_addr().map(|address| address.ip());
                end.state.audit.refused(&id, peer, request.method().as_str(), request.path(), &refused);
            }
            request.into_response(refused.error_response())
        }
    };
    end.status = response.status().as_u16();
    if end.state.is_draining() {
        response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
    }
    Ok(identified(response.map_body(|_, body| Observed { body, _payload: payload, _end: Some(end) }), &id))
}

/// The answer of a server that is still loading: it is alive, and nothing else.
fn alone(request: ServiceRequest, loading: ApiError, payload: Held) -> ServiceResponse<Observed> {
    let response = match request.path() {
        "/health/live" => health(true, "live"),
        _ => loading.error_response(),
    };
    request.into_response(response).map_body(|_, body| Observed { body, _payload: payload, _end: None })
}

/// A request's body, kept until the answer is out. Of a chunked body that nobody holds actix reads on, be it endless;
/// with one that is there and not read to its end it closes the connection.
#[derive(Clone)]
struct Held(Rc<RefCell<Payload>>);

impl Stream for Held {
    type Item = Result<Bytes, PayloadError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Self::Item>> {
        self.0.borrow_mut().poll_next_unpin(cx)
    }
}

/// Counts when it is dropped: at the end of the body, or when the client has hung up.
struct End {
    start: Instant,
    /// The same on the clock, and the trace that it belongs to, where spans are made.
    span: Option<(SystemTime, Trace, Data<Tracer>)>,
    method: Method,
    id: String,
    caller: Option<Caller>,
    state: Arc<State>,
    route: String,
    counted: Counted,
    status: u16,
}

impl Drop for End {
    fn drop(&mut self) {
        let metrics = &self.state.metrics;
        let counted = self.counted.0.take();
        let adapter = match &counted {
            // The request never came to name an adapter or the base.
            None => "-",
            Some(name) => metrics.adapter_label(name.as_deref()),
        };
        let failed = self.caller.as_ref().and_then(|caller| caller.marks.failed.get().copied());
        let status = failed.unwrap_or(self.status);
        metrics.requests.with_label_values(&[&self.route, adapter, &status.to_string()]).inc();
        let seconds = self.start.elapsed().as_secs_f64();
        metrics.request_seconds.with_label_values(&[&self.route]).observe(seconds);
        // Below what is logged by default: a busy server has thousands a second.
        let route = &*self.route;
        if let Some((start, parent, tracer)) = &self.span
            && let Some(tracing) = tracer.get()
        {
            let nothing = Marks::default();
            let marks = self.caller.as_ref().map_or(&nothing, |caller| &*caller.marks);
            let tenant = self.caller.as_ref().and_then(Caller::tenant);
            let (start, method, request_id) = ((self.start, *start), self.method.as_str(), &*self.id);
            tracing.tell(&Told { start, method, route, status, request_id, adapter, tenant, parent, marks });
        }
        tracing::debug!(request_id = self.id, route, adapter, status, seconds, "answered");
    }
}

pub struct Observed {
    body: BoxBody,
    _payload: Held,
    _end: Option<End>,
}

impl MessageBody for Observed {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.body).poll_next(cx)
    }
}
