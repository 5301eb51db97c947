//! Errors as every dialect answers them: OpenAI's shape, one status for each kind.

use actix_web::http::StatusCode;
use actix_web::{HttpResponse, ResponseError};
use serde_json::{Value, json};

use crate::{Error, ErrorKind};

/// An error on its way to the client.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct ApiError {
    error: Error,
    /// OpenAI's machine-readable code, where there is one.
    code: Option<&'static str>,
    status: Option<StatusCode>,
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        ApiError { error, code: None, status: None }
    }
}

impl ApiError {
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// A status that is the protocol's affair alone.
    pub fn with_status(status: StatusCode, message: &str) -> Self {
        ApiError { error: Error::bad_request(message), code: None, status: Some(status) }
    }

    pub fn body(&self) -> Value {
        let (_, kind) = of(self.error.kind);
        json!({ "error": {
            "message": self.error.message,
            "type": kind,
            "param": self.error.param,
            "code": self.code,
        }, "error_type": lorax_type(self.error.kind) })
    }
}

/// Status and OpenAI's `type`.
fn of(kind: ErrorKind) -> (StatusCode, &'static str) {
    match kind {
        ErrorKind::BadRequest => (StatusCode::BAD_REQUEST, "invalid_request_error"),
        ErrorKind::Unauthorized => (StatusCode::UNAUTHORIZED, "authentication_error"),
        ErrorKind::Forbidden => (StatusCode::FORBIDDEN, "permission_error"),
        ErrorKind::NotFound => (StatusCode::NOT_FOUND, "not_found_error"),
        ErrorKind::Conflict => (StatusCode::CONFLICT, "conflict_error"),
        ErrorKind::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error"),
        ErrorKind::Unprocessable => (StatusCode::UNPROCESSABLE_ENTITY, "unprocessable_error"),
        ErrorKind::QueueFull => (StatusCode::TOO_MANY_REQUESTS, "overloaded_error"),
        ErrorKind::RateLimited => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
        ErrorKind::Timeout => (StatusCode::GATEWAY_TIMEOUT, "timeout_error"),
        ErrorKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "unavailable_error"),
        ErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error"),
    }
}

/// The word by which LoRAX's client tells errors apart; it adds to the status, which it reads otherwise.
fn lorax_type(kind: ErrorKind) -> Option<&'static str> {
    match kind {
        ErrorKind::BadRequest | ErrorKind::TooLarge => Some("validation"),
        ErrorKind::QueueFull | ErrorKind::RateLimited => Some("overloaded"),
        ErrorKind::Internal => Some("generation"),
        _ => None,
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status.unwrap_or(of(self.error.kind).0)
    }

    fn error_response(&self) -> HttpResponse {
        if self.error.kind == ErrorKind::Internal {
            tracing::error!("{}", self.error.message);
        }
        let mut response = HttpResponse::build(self.status_code());
        match self.error.kind {
            ErrorKind::QueueFull | ErrorKind::RateLimited | ErrorKind::Unavailable => {
                response.insert_header(("Retry-After", self.error.retry_after.unwrap_or(1)));
            }
            ErrorKind::Unauthorized => {
                response.insert_header(("WWW-Authenticate", "Bearer"));
            }
            // OpenAI's clients would ask for the same twice more.
            ErrorKind::Timeout => {
                response.insert_header(("x-should-retry", "false"));
            }
            _ => {}
        }
        response.json(self.body())
    }
}
