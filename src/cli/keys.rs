//! `loramux keys`: the file of API keys.

use super::args::KeysCommand;
use crate::Result;
use crate::server::{Entry, create_key};

pub fn run(command: KeysCommand) -> Result<()> {
    let KeysCommand::New { file, id, scopes, tenant, requests_per_minute, tokens_per_minute, max_concurrent, expires } =
        command;
    let entry = |sha256| Entry {
        sha256,
        scopes: scopes.into_iter().collect(),
        tenant,
        requests_per_minute,
        tokens_per_minute,
        max_concurrent,
        expires,
    };
    println!("{}", create_key(&file, &id, entry)?);
    Ok(())
}
