//! The one error type: what went wrong, in words a caller can act on, and whose turn it is to act.

use std::fmt::Display;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who can do something about an error. The HTTP layer maps each kind to one status code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// 400: the request itself is wrong.
    BadRequest,
    /// 401: a key is missing or wrong.
    Unauthorized,
    /// 403: the key is good but may not do this.
    Forbidden,
    /// 404: no such adapter, model or route.
    NotFound,
    /// 409: the name is taken, or the generation is not the expected one.
    Conflict,
    /// 413: more bytes than the limit.
    TooLarge,
    /// 422: an adapter that is malformed or does not fit the base.
    Unprocessable,
    /// 429: the queue is full.
    QueueFull,
    /// 429: the key has used up what it may in this time.
    RateLimited,
    /// 503: loading, draining or stopped.
    Unavailable,
    /// 504: the request's time is over.
    Timeout,
    /// 500: our fault.
    Internal,
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub kind: ErrorKind,
    /// What was found and what was expected.
    pub message: String,
    /// The request field at fault, where there is one.
    pub param: Option<String>,
    /// Seconds after which it makes sense to try again, where that is known.
    pub retry_after: Option<u64>,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Display) -> Self {
        Error { kind, message: message.to_string(), param: None, retry_after: None }
    }
    pub fn bad_request(message: impl Display) -> Self {
        Self::new(ErrorKind::BadRequest, message)
    }
    pub fn not_found(message: impl Display) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }
    pub fn conflict(message: impl Display) -> Self {
        Self::new(ErrorKind::Conflict, message)
    }
    pub fn too_large(message: impl Display) -> Self {
        Self::new(ErrorKind::TooLarge, message)
    }
    pub fn unprocessable(message: impl Display) -> Self {
        Self::new(ErrorKind::Unprocessable, message)
    }
    pub fn unavailable(message: impl Display) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }
    pub fn internal(message: impl Display) -> Self {
        Self::new(ErrorKind::Internal, message)
    }
    /// Names the request field at fault.
    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }
    /// Says when to try again.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }
    /// Puts where it happened in front of the message.
    pub fn context(mut self, context: impl Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        let message = e.to_string();
        match cuda_advice(&message) {
            // What candle says has a backtrace in it where one is asked for.
            Some(advice) => Error::internal(format!("{advice} ({})", message.lines().next().unwrap_or_default())),
            None => Error::internal(message),
        }
    }
}

/// What to do about an error of CUDA's, which is known by its name in the driver's interface.
fn cuda_advice(message: &str) -> Option<&'static str> {
    const ADVICE: [(&str, &str); 7] = [
        ("CUDA_ERROR_NO_DEVICE", "there is no NVIDIA GPU here; see nvidia-smi, and in a container --gpus all"),
        ("CUDA_ERROR_INVALID_DEVICE", "there is no GPU of that number; nvidia-smi -L lists them, from 0 on"),
        ("CUDA_ERROR_STUB_LIBRARY", "libcuda is the toolkit's stub; the NVIDIA driver's own has to come first"),
        (
            "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            "the NVIDIA driver's parts are of different versions; restart the machine",
        ),
        (
            "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
            "the NVIDIA driver is older than the CUDA that this program was built with",
        ),
        ("CUDA_ERROR_INSUFFICIENT_DRIVER", "the NVIDIA driver is older than the CUDA that this program was built with"),
        (
            "CUDA_ERROR_OUT_OF_MEMORY",
            "the GPU's memory is full; less of --gpu-memory-utilization, --kv-memory or --max-batch-tokens leaves room",
        ),
    ];
    ADVICE.into_iter().find(|(name, _)| message.contains(name)).map(|(_, advice)| advice)
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        match e.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Error::unavailable(format!("the server's disk is full: {e}"))
            }
            _ => Error::internal(e),
        }
    }
}

/// The cause at the bottom: "connection refused" rather than "error sending request".
pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// Keeps messages readable whatever a file holds: at most `length` characters.
pub(crate) fn shorten(text: &str, length: usize) -> String {
    match text.char_indices().nth(length) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_cuda_say_what_to_do() {
        let of = |text: &str| Error::from(candle_core::Error::Msg(text.into())).message;
        let error = of("DriverError(CUDA_ERROR_NO_DEVICE, \"no CUDA-capable device is detected\")\n   0: a backtrace");
        assert!(error.starts_with("there is no NVIDIA GPU here") && error.contains("CUDA_ERROR_NO_DEVICE"), "{error}");
        assert!(!error.contains("backtrace"), "{error}");
        assert!(of("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")").contains("--kv-memory"));
        assert_eq!(of("shapes differ"), "shapes differ");
    }
}
