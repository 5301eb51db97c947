//! The hub that models and adapters are published on: where it is, and who asks it.

use std::time::Duration;

use reqwest::{Client, RequestBuilder, Response, StatusCode};

/// How often a request that failed for a passing reason is sent again.
const RETRIES: u32 = 3;
/// How long after the first failure; twice as long after each one more.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Clone)]
pub struct Hub {
    /// Without a slash at its end.
    pub endpoint: String,
    pub token: Option<String>,
    /// The user wants it left alone.
    pub offline: bool,
}

impl Hub {
    /// As the hub's own programs take it from `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let offline = variable("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
        Hub {
            endpoint: endpoint.trim_end_matches('/').into(),
            token: variable("HF_TOKEN").or_else(|| hf_hub::Cache::from_env().token()),
            offline: ["1", "on", "yes", "true"].contains(&offline.as_str()),
        }
    }

    /// `path` begins with a slash.
    pub fn get(&self, http: &Client, path: &str) -> RequestBuilder {
        let request = http.get(format!("{}{path}", self.endpoint));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// The answer to [`Self::get`], which is sent again while the hub says "not now".
    pub async fn ask(&self, http: &Client, path: &str) -> reqwest::Result<Response> {
        let mut pause = PAUSE;
        for _ in 0..RETRIES {
            match self.get(http, path).send().await {
                Ok(answer) if is_passing(answer.status()) => {}
                Err(e) if e.is_connect() || e.is_timeout() => {}
                other => return other,
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        self.get(http, path).send().await
    }
}

/// Whether a status says "not now" rather than "no": from the hub, or from a proxy that cannot reach it.
pub fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

/// Whether text can be the name of an owner or a repository: neither a path nor a hidden file's.
pub fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}
