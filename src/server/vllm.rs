//! vLLM's own calls: adapters by server-local path, tokens of a text and back.

use std::path::Path;

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::json;

use super::access::Caller;
use super::error::ApiError;
use super::fields::Fields;
use super::{Shared, State, adapters, run};
use crate::adapter::Condition;
use crate::{Error, ErrorKind, Result};

fn needed(f: &Fields, name: &str) -> Result<String> {
    f.text(name)?.filter(|t| !t.is_empty()).ok_or_else(|| f.wrong(name, "is needed"))
}

fn check_allowed(state: &State, caller: &Caller) -> Result<()> {
    if let Some(tenant) = caller.tenant() {
        let what = format!("a key of tenant {tenant} names no paths of the server's machine; upload the adapter");
        return Err(Error::new(ErrorKind::Forbidden, what));
    }
    match state.allow_local_paths {
        true => Ok(()),
        false => {
            let what = "this server takes no paths of its own machine; start it with --allow-local-paths, or upload";
            Err(Error::new(ErrorKind::Forbidden, what))
        }
    }
}

/// `POST /v1/load_lora_adapter`: publishes a copy of a directory.
pub async fn load(state: Shared, caller: Caller, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let name = f.text("lora_name")?.unwrap_or_default();
    let received = async {
        check_allowed(&state, &caller)?;
        let (whole, path) = (caller.own(&needed(&f, "lora_name")?)?, needed(&f, "lora_path")?);
        let when = if f.flag("load_inplace")?.unwrap_or(false) { Condition::Always } else { Condition::Absent };
        let registry = state.registry.clone();
        let upload = web::block(move || registry.upload_from(Path::new(&path)));
        let upload = upload.await.map_err(|e| Error::unavailable(e.to_string()))??;
        Ok::<_, ApiError>((whole, upload, when))
    };
    let (whole, upload, when) = adapters::noted(&state, &caller, &name, received.await)?;
    adapters::publish(&state, &caller, &whole, upload, when).await?;
    Ok(HttpResponse::Ok().body(format!("Success: LoRA adapter '{name}' added successfully.")))
}

/// `POST /v1/unload_lora_adapter`.
pub async fn unload(state: Shared, caller: Caller, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let name = needed(&f, "lora_name")?;
    adapters::remove(&state, &caller, &name, Condition::Always).await?;
    Ok(HttpResponse::Ok().body(format!("Success: LoRA adapter '{name}' removed successfully.")))
}

pub async fn tokenize(state: Shared, http: HttpRequest, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let target = state.target(&http, &f, f.text("model")?.as_deref()).await?;
    let tokens = match (f.text("prompt")?, f.list("messages")?) {
        (Some(prompt), None) => {
            let special = f.flag("add_special_tokens")?.unwrap_or(true);
            state.encode(&target, prompt, if special { run::prompt } else { run::plain }).await?
        }
        (None, Some(_)) => state.chat_prompt(&target, &f, f.flag("add_generation_prompt")?.unwrap_or(true)).await?,
        _ => return Err(f.wrong("prompt", "or messages is needed").into()),
    };
    let texts = f.flag("return_token_strs")?.unwrap_or(false);
    let texts =
        texts.then(|| tokens.iter().map(|&t| run::token_text(&target.language.tokenizer, t)).collect::<Vec<_>>());
    Ok(HttpResponse::Ok().json(json!({ "count": tokens.len(), "max_model_len": state.context, "tokens": tokens,
        "token_strs": texts })))
}

pub async fn detokenize(state: Shared, http: HttpRequest, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let target = state.target(&http, &f, f.text("model")?.as_deref()).await?;
    let tokens = f.tokens("tokens")?.ok_or_else(|| f.wrong("tokens", "is needed"))?;
    Ok(HttpResponse::Ok().json(json!({ "prompt": target.language.tokenizer.decode(&tokens, false) })))
}

pub async fn version() -> HttpResponse {
    HttpResponse::Ok().json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}
