//! `loramux adapters`: adapter directories, and the adapters of a running server.

use std::path::Path;

use serde_json::Value;

use super::args::AdaptersCommand;
use super::client::Client;
use crate::base::Base;
use crate::{Error, Result, adapter, output};

pub async fn run(command: AdaptersCommand) -> Result<()> {
    match command {
        AdaptersCommand::List { server } => {
            let client = server.client()?;
            let answer = client.json(client.http.get(client.at("/v1/adapters"))).await?;
            let rows = answer["adapters"].as_array().map(Vec::as_slice).unwrap_or_default();
            output::line(format_args!(
                "{:<32} {:<12} {:<6} {:>5} {:>12} {:>10}",
                "NAME", "GENERATION", "TIER", "RANK", "BYTES", "IN FLIGHT"
            ))?;
            for a in rows {
                let text = |key: &str| a[key].as_str().unwrap_or("-").to_string();
                // As texts: a JSON value does not take a width.
                let number = |key: &str| if a[key].is_null() { "-".to_string() } else { a[key].to_string() };
                let generation: String = text("generation").chars().take(12).collect();
                output::line(format_args!(
                    "{:<32} {generation:<12} {:<6} {:>5} {:>12} {:>10}",
                    text("name"),
                    text("tier"),
                    number("rank"),
                    number("bytes"),
                    number("in_flight")
                ))?;
            }
            Ok(())
        }
        AdaptersCommand::Inspect { directory } => print(&adapter::inspect(&directory, None)?),
        AdaptersCommand::Verify { directory, model } => {
            let base = Base::open(&model)?;
            print(&adapter::inspect(&directory, Some(&base.config))?)?;
            adapter::language(&directory)?.map_or(Ok(None), |own| own.over(&base.language()))?;
            output::line(format_args!("{} fits {}", directory.display(), base.id))
        }
        AdaptersCommand::Push { name, directory, if_match, server } => {
            let client = server.client()?;
            let generation = push(&client, &name, &directory, if_match.as_deref()).await?;
            output::line(format_args!("{name} {generation}"))
        }
        AdaptersCommand::Rm { name, server } => {
            adapter::check_whole_name(&name)?;
            let client = server.client()?;
            let request = client.http.delete(client.at(&format!("/v1/adapters/{name}")));
            let _: Value = client.json(request).await?;
            output::line(format_args!("{name} removed"))
        }
    }
}

/// Uploads an adapter directory, in place of what has the name now, if that is the generation `if_match`. Returns the new
/// generation.
pub async fn push(client: &Client, name: &str, directory: &Path, if_match: Option<&str>) -> Result<String> {
    // Before it becomes part of a URL, where `x#y` would be `x`.
    adapter::check_whole_name(name)?;
    let mut request = client.http.put(client.at(&format!("/v1/adapters/{name}"))).multipart(form(directory)?);
    if let Some(generation) = if_match {
        request = request.header("If-Match", format!("\"{generation}\""));
    }
    let info = client.json(request).await?;
    Ok(info["generation"].as_str().unwrap_or("-").to_string())
}

fn print(inspection: &adapter::Inspection) -> Result<()> {
    output::line(serde_json::to_string_pretty(inspection).map_err(Error::internal)?)
}

/// The files of an adapter directory as the upload's form.
fn form(directory: &Path) -> Result<reqwest::multipart::Form> {
    let mut form = reqwest::multipart::Form::new();
    let files = adapter::adapter_files(directory)?;
    if files.is_empty() {
        return Err(Error::bad_request(format!("{} holds no file of an adapter", directory.display())));
    }
    for (name, path) in files {
        let bytes = std::fs::read(&path).map_err(|e| Error::bad_request(format!("{}: {e}", path.display())))?;
        form = form.part("file", reqwest::multipart::Part::bytes(bytes).file_name(name));
    }
    Ok(form)
}
