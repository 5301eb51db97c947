//! Bodies as they come: none may stall, crawl, or grow without end.

use std::future::Future;
use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::web::{self, Bytes};
use futures::StreamExt;
use tokio::time::Instant;

use super::error::ApiError;
use crate::{Error, Result};

/// Longest body of a request that is no upload.
const MAX_BODY: usize = 16 << 20;
/// Longest pause between two pieces.
pub const PAUSE: Duration = Duration::from_secs(20);
/// What a body may take in all, beside a second for each [`RATE`] bytes of it.
const GRACE: Duration = Duration::from_secs(30);
const RATE: u64 = 64 << 10;

/// Times the pieces of a body.
pub struct Pace {
    start: Instant,
    bytes: u64,
}

impl Pace {
    pub fn start() -> Self {
        Pace { start: Instant::now(), bytes: 0 }
    }

    /// Waits for the next piece or the next part.
    pub async fn wait<T>(&self, next: impl Future<Output = T>) -> Result<T, ApiError> {
        let late = |what: &str| ApiError::with_status(StatusCode::REQUEST_TIMEOUT, what);
        let due = self.start + GRACE + Duration::from_secs(self.bytes / RATE);
        let now = Instant::now();
        let slow = || late(&format!("the body came at less than {RATE} bytes a second; it was given up"));
        if now > due {
            return Err(slow());
        }
        tokio::time::timeout_at(due.min(now + PAUSE), next).await.map_err(|_| match Instant::now() < due {
            true => late(&format!("the body stopped for {} seconds; it was given up", PAUSE.as_secs())),
            false => slow(),
        })
    }

    pub fn count(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// The next piece of a body, or `None` at its end.
    pub async fn piece(&mut self, payload: &mut web::Payload) -> Result<Option<Bytes>, ApiError> {
        match self.wait(payload.next()).await? {
            None => Ok(None),
            Some(Ok(piece)) => {
                self.count(piece.len());
                Ok(Some(piece))
            }
            Some(Err(e)) => Err(Error::bad_request(format!("the body broke off: {e}")).into()),
        }
    }
}

/// Reads a body whatever its Content-Type says.
pub async fn read(mut payload: web::Payload) -> Result<Vec<u8>, ApiError> {
    let mut pace = Pace::start();
    let mut body = Vec::new();
    while let Some(piece) = pace.piece(&mut payload).await? {
        if body.len() + piece.len() > MAX_BODY {
            return Err(Error::too_large(format!("the body is longer than {MAX_BODY} bytes")).into());
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(result: Result<(), ApiError>) -> Option<(u16, String)> {
        use actix_web::ResponseError;
        result.err().map(|e| (e.status_code().as_u16(), e.to_string()))
    }

    #[tokio::test]
    async fn a_body_may_take_its_time_but_not_crawl() {
        let ago = |seconds| Instant::now() - Duration::from_secs(seconds);
        let ready = |pace: Pace| async move { status(pace.wait(std::future::ready(())).await) };
        assert_eq!(ready(Pace { start: ago(29), bytes: 0 }).await, None);
        let (code, message) = ready(Pace { start: ago(31), bytes: 65535 }).await.unwrap();
        assert!(code == 408 && message.contains("less than 65536 bytes a second"), "{message}");
        assert_eq!(ready(Pace { start: ago(99), bytes: 70 << 16 }).await, None);
        let almost = Pace { start: Instant::now() + Duration::from_millis(50) - GRACE, bytes: 0 };
        let (code, message) = status(almost.wait(std::future::pending()).await).unwrap();
        assert!(code == 408 && message.contains("less than"), "{message}");
    }
}
