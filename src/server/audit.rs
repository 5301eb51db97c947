//! Who changed what: a line of JSON for each change of adapters, done or refused.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use actix_web::ResponseError;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};

use super::access::Caller;
use super::error::ApiError;
use crate::{Error, Result};

fn now() -> String {
    DateTime::<Utc>::from(SystemTime::now()).to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// A file that is only written to at its end; without one, lines go to the log.
pub struct Audit(Option<Mutex<File>>);

impl Audit {
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map(Mutex::new).map_err(|e| Error::bad_request(format!("--audit-log {}: {e}", path.display())))
        };
        Ok(Audit(path.map(open).transpose()?))
    }

    /// Notes that `action` was asked for on the adapter of this whole name. `outcome` is the generation that it was about.
    pub fn note(&self, caller: &Caller, action: &str, adapter: &str, outcome: Result<&str, &ApiError>) {
        self.write(&json!({
            "time": now(),
            "request_id": &*caller.request_id,
            "key": caller.key.as_ref().map(|key| &key.id),
            "tenant": caller.tenant(),
            "peer": caller.peer,
            "action": action,
            "adapter": crate::error::shorten(adapter, 200),
            "generation": outcome.ok(),
            "status": outcome.map_or_else(|e| e.status_code().as_u16(), |_| 200),
            "error": outcome.err().map(|e| e.to_string()),
        }));
    }

    /// Notes a request for a change that was not let in.
    pub fn refused(&self, request_id: &str, peer: Option<IpAddr>, method: &str, path: &str, error: &ApiError) {
        self.write(&json!({
            "time": now(),
            "request_id": request_id,
            "peer": peer,
            "action": "refused",
            "request": crate::error::shorten(&format!("{method} {path}"), 300),
            "status": error.status_code().as_u16(),
            "error": error.to_string(),
        }));
    }

    fn write(&self, line: &Value) {
        let Some(file) = &self.0 else {
            tracing::info!(audit = %line, "adapters");
            return;
        };
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        // In one piece and on the disk: the change is durable too.
        if let Err(e) = file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_data()) {
            tracing::error!(audit = %line, "the audit log cannot be written: {e}");
        }
    }
}
