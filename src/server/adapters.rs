//! `/v1/adapters`: list, look, upload, replace, remove, pin, unload.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use actix_multipart::Multipart;
use actix_web::http::StatusCode;
use actix_web::http::header::{self, HeaderMap};
use actix_web::{FromRequest, HttpRequest, HttpResponse, web};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::access::Caller;
use super::body::{PAUSE, Pace};
use super::error::ApiError;
use super::{Shared, UPLOADS};
use crate::adapter::{AdapterInfo, Condition, Generation, Published, Registry, Upload};
use crate::{Error, ErrorKind, Result};

/// Longest value of the form's text field.
const MAX_NAME: usize = 1024;
/// Where an archive lies until it is unpacked.
const ARCHIVE: &str = ".archive";

pub async fn list(state: Shared, caller: Caller) -> HttpResponse {
    let seen = state.seen(&caller);
    let adapters: Vec<Value> = seen.into_iter().filter_map(|info| caller.told(info)).collect();
    let mut answer = json!({ "base": state.base_id, "adapters": adapters });
    if caller.tenant().is_none() {
        let (used, limit) = state.registry.memory();
        answer["memory"] = json!({ "used": used, "limit": limit });
    }
    HttpResponse::Ok().json(answer)
}

fn info_response(status: StatusCode, caller: &Caller, info: AdapterInfo) -> HttpResponse {
    let tag = format!("\"{}\"", info.generation);
    HttpResponse::build(status).insert_header((header::ETAG, tag)).json(caller.told(info))
}

pub async fn get(state: Shared, caller: Caller, name: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let info = state.registry.get(&state.meant(&caller, &name)?)?;
    Ok(info_response(StatusCode::OK, &caller, info))
}

/// What `If-Match` and `If-None-Match` ask for.
fn condition(headers: &HeaderMap) -> Result<Option<Condition>> {
    let text = |name| headers.get(name).map(|v| v.to_str().unwrap_or("").trim().to_string());
    let wrong = |name: &str, value: &str, expected: &str| {
        Err(Error::bad_request(format!("{name} is {value:?}; expected {expected}")))
    };
    match (text(header::IF_MATCH), text(header::IF_NONE_MATCH)) {
        (None, None) => Ok(None),
        (None, Some(value)) if value == "*" => Ok(Some(Condition::Absent)),
        (None, Some(value)) => wrong("If-None-Match", &value, "*"),
        (Some(value), None) => {
            let generation = value.trim_matches('"');
            match !generation.is_empty() && generation.chars().all(|c| c.is_ascii_alphanumeric()) {
                true => Ok(Some(Condition::Is(Generation::new(generation)))),
                false => wrong("If-Match", &value, "a generation"),
            }
        }
        (Some(_), Some(_)) => Err(Error::bad_request("If-Match and If-None-Match exclude each other")),
    }
}

/// The body's files in a private folder, and the form's `name`, which must be `expected` where that is given.
async fn receive(
    state: &Shared,
    caller: &Caller,
    http: &HttpRequest,
    payload: web::Payload,
    expected: Option<&str>,
) -> Result<(Upload, Option<String>), ApiError> {
    let limit = state.registry.max_upload();
    let too_large = || Error::too_large(format!("the upload is larger than {limit} bytes"));
    let announced = http.headers().get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
    // Room for the form's own lines.
    if announced.is_some_and(|n| n > limit.saturating_add(1 << 16)) {
        return Err(too_large().into());
    }
    if state.is_draining() {
        return Err(Error::unavailable("the server is stopping").into());
    }
    let full = || Error::unavailable(format!("{UPLOADS} uploads are being received already; try again later"));
    // The semaphore is never closed, so an error can only be that nobody made room.
    let Ok(Ok(_place)) = tokio::time::timeout(PAUSE, state.uploads.acquire()).await else { return Err(full().into()) };
    let upload = state.registry.upload()?;
    let mut pace = Pace::start();
    let mut left = limit;
    let mut name = None;
    let content_type = http.headers().get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok()).unwrap_or("");
    if !content_type.starts_with("multipart/form-data") {
        let mut payload = payload;
        let path = upload.path().join(ARCHIVE);
        let mut file = tokio::fs::File::create_new(&path).await.map_err(Error::from)?;
        while let Some(piece) = pace.piece(&mut payload).await? {
            left = left.checked_sub(piece.len() as u64).ok_or_else(too_large)?;
            file.write_all(&piece).await.map_err(Error::from)?;
        }
        file.flush().await.map_err(Error::from)?;
        return Ok((unpacked(upload, path).await?, None));
    }
    let mut inner = payload.into_inner();
    let mut form =
        Multipart::from_request(http, &mut inner).await.map_err(|e| Error::bad_request(format!("the form: {e}")))?;
    let mut archive = None;
    while let Some(field) = pace.wait(form.next()).await? {
        let broken = |e: actix_multipart::MultipartError| Error::bad_request(format!("the form: {e}"));
        let mut field = field.map_err(broken)?;
        let disposition = field.content_disposition();
        let key = disposition.and_then(|d| d.get_name()).unwrap_or("").to_string();
        let file_name = disposition.and_then(|d| d.get_filename()).unwrap_or("");
        let target = match key.as_str() {
            "name" => None,
            "config" => Some("adapter_config.json"),
            "weights" if file_name.ends_with(".gguf") => Some("adapter_model.gguf"),
            "weights" => Some("adapter_model.safetensors"),
            "file" => match crate::adapter::kept_name(file_name) {
                Some(kept) => Some(kept),
                None => {
                    let what = format!("the form's file is named {file_name:?}, which is no file of an adapter");
                    return Err(Error::bad_request(what).into());
                }
            },
            "labels" if file_name.ends_with(".txt") => Some("labels.txt"),
            "labels" => Some("labels.json"),
            "archive" => Some(ARCHIVE),
            other => {
                let what = "expected name, config, weights, labels, file or archive";
                return Err(Error::bad_request(format!("the form has a field {other:?}; {what}")).into());
            }
        };
        let mut file = match target {
            None => None,
            Some(target) => {
                let path = upload.path().join(target);
                let file = tokio::fs::File::create_new(&path).await;
                if target == ARCHIVE {
                    archive = Some(path);
                }
                Some(file.map_err(|e| match e.kind() {
                    io::ErrorKind::AlreadyExists => Error::bad_request(format!("the form has the field {key} twice")),
                    _ => Error::from(e),
                })?)
            }
        };
        let mut text = Vec::new();
        while let Some(piece) = pace.wait(field.next()).await? {
            let piece = piece.map_err(broken)?;
            pace.count(piece.len());
            left = left.checked_sub(piece.len() as u64).ok_or_else(too_large)?;
            match &mut file {
                Some(file) => file.write_all(&piece).await.map_err(Error::from)?,
                None if text.len() + piece.len() > MAX_NAME => {
                    return Err(Error::bad_request(format!("name is longer than {MAX_NAME} bytes"))
                        .param("name")
                        .into());
                }
                None => text.extend_from_slice(&piece),
            }
        }
        match file {
            Some(mut file) => file.flush().await.map_err(Error::from)?,
            None => name = Some(form_name(text, expected, caller)?),
        }
    }
    match archive {
        Some(path) => Ok((unpacked(upload, path).await?, name)),
        None => Ok((upload, name)),
    }
}

/// The form's name, looked at before the files come.
fn form_name(text: Vec<u8>, expected: Option<&str>, caller: &Caller) -> Result<String> {
    let name = String::from_utf8(text).map_err(|_| Error::bad_request("name is not UTF-8").param("name"))?;
    caller.own(&name)?;
    match expected.filter(|expected| *expected != name) {
        None => Ok(name),
        Some(path) => {
            Err(Error::bad_request(format!("name is {name:?} in the form and {path:?} in the path")).param("name"))
        }
    }
}

async fn unpacked(upload: Upload, archive: PathBuf) -> Result<Upload> {
    let unpack = web::block(move || upload.unpack(&archive).map(|()| upload));
    unpack.await.map_err(|e| Error::unavailable(e.to_string()))?
}

/// Notes where what was to be published under `name` did not get so far.
pub fn noted<T>(state: &Shared, caller: &Caller, name: &str, received: Result<T, ApiError>) -> Result<T, ApiError> {
    let whole = || caller.own(name).unwrap_or_else(|_| name.to_string());
    received.inspect_err(|e| state.audit.note(caller, "publish", &whole(), Err(e)))
}

/// Publishes under the whole name, and notes it.
pub async fn publish(
    state: &Shared,
    caller: &Caller,
    whole: &str,
    upload: Upload,
    when: Condition,
) -> Result<(AdapterInfo, Published), ApiError> {
    let (state, caller, whole) = (state.clone(), caller.clone(), whole.to_string());
    to_its_end(async move {
        let outcome = state.registry.publish(&whole, upload, when).await.map_err(ApiError::from);
        let noted = outcome.as_ref().map(|(info, _)| info.generation.as_str());
        state.audit.note(&caller, "publish", &whole, noted);
        outcome
    })
    .await
}

/// What a change does and what is noted of it belong together, also where the client has hung up.
async fn to_its_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::spawn(change).await.unwrap_or_else(|e| Err(Error::internal(e).into()))
}

/// Makes a change of what the caller calls `name`, and notes it.
async fn change<F: Future<Output = Result<AdapterInfo>> + Send + 'static>(
    state: &Shared,
    caller: &Caller,
    action: &'static str,
    name: &str,
    change: impl FnOnce(Arc<Registry>, String) -> F,
) -> Result<AdapterInfo, ApiError> {
    let whole = state.changed(caller, name);
    let noted = whole.clone().unwrap_or_else(|_| name.to_string());
    let work = whole.map(|whole| change(state.registry.clone(), whole));
    let (state, caller) = (state.clone(), caller.clone());
    to_its_end(async move {
        let outcome = match work {
            Ok(work) => work.await,
            Err(e) => Err(e),
        };
        let outcome = outcome.map_err(ApiError::from);
        state.audit.note(&caller, action, &noted, outcome.as_ref().map(|info| info.generation.as_str()));
        outcome
    })
    .await
}

pub async fn remove(state: &Shared, caller: &Caller, name: &str, when: Condition) -> Result<AdapterInfo, ApiError> {
    let work = |registry: Arc<Registry>, whole: String| async move { registry.remove(&whole, when).await };
    change(state, caller, "delete", name, work).await
}

async fn published(
    state: &Shared,
    caller: &Caller,
    whole: &str,
    upload: Upload,
    when: Condition,
) -> Result<HttpResponse, ApiError> {
    let (info, published) = publish(state, caller, whole, upload, when).await?;
    let status = if published == Published::Created { StatusCode::CREATED } else { StatusCode::OK };
    Ok(info_response(status, caller, info))
}

/// `POST /v1/adapters`: a new name.
pub async fn post(
    state: Shared,
    caller: Caller,
    http: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    let received = async {
        let when = condition(http.headers())?.unwrap_or(Condition::Absent);
        let (upload, name) = receive(&state, &caller, &http, payload, None).await?;
        let name = name.ok_or_else(|| Error::bad_request("the form has no field name").param("name"))?;
        Ok::<_, ApiError>((caller.own(&name)?, upload, when))
    };
    let (whole, upload, when) = noted(&state, &caller, "", received.await)?;
    published(&state, &caller, &whole, upload, when).await
}

/// `PUT /v1/adapters/{name}`: new or replaced.
pub async fn put(
    state: Shared,
    caller: Caller,
    http: HttpRequest,
    name: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    let received = async {
        let when = condition(http.headers())?.unwrap_or(Condition::Always);
        let whole = caller.own(&name)?;
        let (upload, _) = receive(&state, &caller, &http, payload, Some(&name)).await?;
        Ok::<_, ApiError>((whole, upload, when))
    };
    let (whole, upload, when) = noted(&state, &caller, &name, received.await)?;
    published(&state, &caller, &whole, upload, when).await
}

pub async fn delete(
    state: Shared,
    caller: Caller,
    http: HttpRequest,
    name: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let when = condition(http.headers())?.unwrap_or(Condition::Always);
    let info = remove(&state, &caller, &name, when).await?;
    Ok(HttpResponse::Ok().json(caller.told(info)))
}

/// Refuses a tenant: what it pinned, others would lack.
fn check_pinning(caller: &Caller) -> Result<()> {
    match caller.tenant() {
        None => Ok(()),
        Some(tenant) => {
            let what = format!("a key of tenant {tenant} pins nothing: memory is everybody's; ask the operator");
            Err(Error::new(ErrorKind::Forbidden, what))
        }
    }
}

/// `PUT /v1/adapters/{name}/pin`.
pub async fn pin(state: Shared, caller: Caller, name: web::Path<String>) -> Result<HttpResponse, ApiError> {
    check_pinning(&caller)?;
    let work = |registry: Arc<Registry>, whole: String| async move { registry.pin(&whole).await };
    let info = change(&state, &caller, "pin", &name, work).await?;
    Ok(info_response(StatusCode::OK, &caller, info))
}

/// `DELETE /v1/adapters/{name}/pin`.
pub async fn unpin(state: Shared, caller: Caller, name: web::Path<String>) -> Result<HttpResponse, ApiError> {
    check_pinning(&caller)?;
    let work = |registry: Arc<Registry>, whole: String| async move { registry.unpin(&whole).await };
    let info = change(&state, &caller, "unpin", &name, work).await?;
    Ok(info_response(StatusCode::OK, &caller, info))
}

/// `POST /v1/adapters/{name}/unload`.
pub async fn unload(state: Shared, caller: Caller, name: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let work = |registry: Arc<Registry>, whole: String| async move { registry.unload(&whole) };
    let info = change(&state, &caller, "unload", &name, work).await?;
    Ok(info_response(StatusCode::OK, &caller, info))
}
