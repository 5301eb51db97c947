//! `loramux keys`: the file of API keys.

use std::io::Write;

use super::args::KeysCommand;
use crate::server::{Entry, create_key};
use crate::{Error, Result};

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
    let key = create_key(&file, &id, entry)?;
    // It is nowhere else, so that nobody reads it is an error here.
    writeln!(std::io::stdout(), "{key}").map_err(|e| Error::internal(format!("{id} is made, and its key is lost: {e}")))
}
