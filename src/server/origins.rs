//! Which other sites' pages may use the server from a browser (CORS).

use actix_cors::Cors;
use reqwest::Url;

use crate::{Error, Result};

/// Headers of answers that pages may read beside those that they always may.
const EXPOSED: [&str; 3] = ["etag", "retry-after", "x-request-id"];
/// Seconds for which a browser need not ask again.
const MAX_AGE: usize = 3600;

#[derive(Debug, Clone, Default)]
pub struct Origins(Vec<String>);

impl Origins {
    /// Each is `scheme://host[:port]` as browsers send it, or `*` for any.
    pub fn new(origins: Vec<String>) -> Result<Self> {
        let is_origin = |text: &str| Url::parse(text).is_ok_and(|url| url.origin().ascii_serialization() == text);
        match origins.iter().find(|text| *text != "*" && !is_origin(text)) {
            None => Ok(Origins(origins)),
            Some(text) => Err(Error::bad_request(format!(
                "--allow-origin {text:?} is no origin; expected scheme://host[:port] in small letters, e.g. \
                 https://app.example, or *"
            ))),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn allow(&self, origin: &str) -> bool {
        self.0.iter().any(|one| one == "*" || one == origin)
    }

    /// Answers browsers that ask what pages may, and marks the answers that pages may read.
    pub fn middleware(&self) -> Cors {
        let own = self.clone();
        Cors::default()
            .allowed_origin_fn(move |origin, _| origin.to_str().is_ok_and(|origin| own.allow(origin)))
            .allow_any_method()
            .allow_any_header()
            .expose_headers(EXPOSED)
            .max_age(MAX_AGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_as_browsers_send_them() {
        let of = |text: &str| Origins::new(vec![text.into()]);
        let origins = of("https://app.example:8443").unwrap();
        assert!(origins.allow("https://app.example:8443"));
        for other in ["https://app.example", "http://app.example:8443", "https://app.example:8443.evil.example", "null"]
        {
            assert!(!origins.allow(other), "{other}");
        }
        assert!(of("*").unwrap().allow("null") && of("http://localhost:3000").is_ok());
        assert!(Origins::default().is_empty() && !Origins::default().allow("https://app.example"));
        for text in
            ["app.example", "https://app.example/", "https://App.example", "https://app.example:443", "null", ""]
        {
            assert!(of(text).unwrap_err().message.contains("no origin"), "{text}");
        }
    }
}
