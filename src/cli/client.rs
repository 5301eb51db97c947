//! The HTTP client of the commands that talk to a running server.

use std::path::Path;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde_json::Value;

use crate::error::innermost;
use crate::{Error, ErrorKind, Result};

pub struct Client {
    pub http: reqwest::Client,
    url: String,
}

impl Client {
    /// Of the server at `url`; with the API key `key`, and the certificates in the PEM file `trusted` beside the well-known ones.
    pub fn new(url: &str, key: Option<&str>, trusted: Option<&Path>) -> Result<Self> {
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(Error::bad_request(format!("{url:?} is not a URL; expected http://HOST:PORT")));
        }
        let mut headers = HeaderMap::new();
        if let Some(key) = key {
            let value = HeaderValue::from_str(&format!("Bearer {key}"));
            let mut value = value.map_err(|_| Error::bad_request("the API key has characters that no key has"))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let mut http = reqwest::Client::builder().connect_timeout(Duration::from_secs(10)).default_headers(headers);
        if let Some(path) = trusted {
            let wrong = |e: String| Error::bad_request(format!("{}: {e}", path.display()));
            let pem = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| wrong(e.to_string()))?;
            http = certificates.into_iter().fold(http, |http, certificate| http.add_root_certificate(certificate));
        }
        Ok(Client { http: http.build().map_err(Error::internal)?, url: url.trim_end_matches('/').to_string() })
    }

    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response> {
        request.send().await.map_err(|e| Error::unavailable(format!("no answer from {}: {}", self.url, innermost(&e))))
    }

    /// The JSON that answers `request`; an error status becomes an error with the server's message.
    pub async fn json(&self, request: reqwest::RequestBuilder) -> Result<Value> {
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(read_error(response).await);
        }
        response.json().await.map_err(|e| Error::internal(format!("{} did not answer with JSON: {e}", self.url)))
    }

    /// Reads the server-sent events that answer `request`, to their end, and gives each one's JSON to `event`. An error status or
    /// an event that tells an error becomes an error with the server's message; so does a stream without an end.
    pub async fn events(&self, request: reqwest::RequestBuilder, mut event: impl FnMut(&Value)) -> Result<()> {
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(read_error(response).await);
        }
        // To the end also after the last event, so that the connection can be used again.
        let (mut stream, mut buffer, mut done) = (response.bytes_stream(), Vec::new(), false);
        while let Some(chunk) = stream.next().await {
            buffer.extend_from_slice(&chunk.map_err(|e| Error::unavailable(format!("the stream broke off: {e}")))?);
            while let Some(end) = buffer.windows(2).position(|w| w == b"\n\n") {
                let text: Vec<u8> = buffer.drain(..end + 2).collect();
                let text = String::from_utf8_lossy(&text);
                let Some(data) = text.trim().strip_prefix("data:").map(str::trim) else { continue };
                if data == "[DONE]" {
                    done = true;
                    continue;
                }
                let json: Value =
                    serde_json::from_str(data).map_err(|e| Error::internal(format!("bad event {data:?}: {e}")))?;
                if let Some(message) = json["error"]["message"].as_str() {
                    return Err(Error::internal(message));
                }
                event(&json);
            }
        }
        if done { Ok(()) } else { Err(Error::internal("the answer ended early")) }
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.json(self.http.post(self.at(path)).json(body)).await
    }
}

/// The message of an error answer.
pub async fn read_error(response: reqwest::Response) -> Error {
    let status = response.status();
    let body = response.text().await.unwrap_or_default();
    let parsed: Option<Value> = serde_json::from_str(&body).ok();
    let message = parsed.as_ref().and_then(|v| v["error"]["message"].as_str()).unwrap_or(body.trim());
    Error::new(ErrorKind::BadRequest, format!("{status}: {message}"))
}
