//! Counts every request, and times it to the last byte of its answer.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use actix_web::body::{BodySize, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::middleware::Next;
use actix_web::web::Bytes;
use actix_web::{Error, HttpMessage};

use super::Shared;
use super::run::Counted;

pub async fn observe(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<Observed>, Error> {
    let start = Instant::now();
    let state = request.app_data::<Shared>().cloned();
    let response = next.call(request).await?;
    let http = response.request();
    let route = http.match_pattern().unwrap_or_else(|| "other".into());
    let adapter = http.extensions().get::<Counted>().map(|c| c.0.clone());
    let status = response.status().as_u16().to_string();
    let end = End { start, state, route, adapter, status };
    Ok(response.map_body(|_, body| Observed { body: body.boxed(), _end: end }))
}

/// Counts when it is dropped: at the end of the body, or when the client has hung up.
struct End {
    start: Instant,
    state: Option<Shared>,
    route: String,
    /// `None` where the request never came to name an adapter or the base.
    adapter: Option<Option<String>>,
    status: String,
}

impl Drop for End {
    fn drop(&mut self) {
        let Some(state) = &self.state else { return };
        let adapter = match &self.adapter {
            None => "-",
            Some(name) => state.metrics.adapter_label(name.as_deref()),
        };
        let metrics = &state.metrics;
        metrics.requests.with_label_values(&[self.route.as_str(), adapter, self.status.as_str()]).inc();
        metrics.request_seconds.with_label_values(&[self.route.as_str()]).observe(self.start.elapsed().as_secs_f64());
    }
}

pub struct Observed {
    body: actix_web::body::BoxBody,
    _end: End,
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
