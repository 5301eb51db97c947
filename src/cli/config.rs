//! The TOML file of `loramux serve --config`.

use std::path::Path;

use clap::{ArgMatches, Command, CommandFactory, FromArgMatches, parser::ValueSource};

use super::args::Cli;
use crate::{Error, Result};

/// Parses the command line; `serve --config FILE` fills in what neither flags nor environment say.
pub fn parse() -> Result<Cli> {
    let first = Cli::command().get_matches();
    let matches = match first.subcommand() {
        Some(("serve", serve)) => match serve.get_one::<std::path::PathBuf>("config") {
            Some(path) => with_file(path, serve)?.get_matches(),
            None => first,
        },
        _ => first,
    };
    Cli::from_arg_matches(&matches).map_err(|e| e.exit())
}

/// The command with the file's values as its defaults.
fn with_file(path: &Path, given: &ArgMatches) -> Result<Command> {
    let wrong = |what: String| Error::bad_request(format!("{}: {what}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;
    let mut command = Cli::command();
    for (key, value) in table {
        let id = key.replace('-', "_");
        let known =
            Cli::command().find_subcommand("serve").is_some_and(|s| s.get_arguments().any(|a| a.get_id() == &*id));
        if !known || id == "config" {
            return Err(wrong(format!("{key} is no option of `loramux serve`")));
        }
        if matches!(given.value_source(&id), Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            continue;
        }
        let plain = |v: &toml::Value| match v {
            toml::Value::String(s) => Ok(s.clone()),
            toml::Value::Integer(i) => Ok(i.to_string()),
            toml::Value::Float(f) => Ok(f.to_string()),
            toml::Value::Boolean(b) => Ok(b.to_string()),
            other => Err(wrong(format!("{key} is {other}; expected a string, a number, true or false"))),
        };
        let values = match &value {
            toml::Value::Array(list) => list.iter().map(plain).collect::<Result<Vec<_>>>()?,
            one => vec![plain(one)?],
        };
        command = command.mut_subcommand("serve", |c| c.mut_arg(&id, |a| a.default_values(values)));
    }
    Ok(command)
}
