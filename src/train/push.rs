//! A finished adapter's way to a running server.

use std::path::Path;

use crate::cli::{self, Client};
use crate::{Error, Result, adapter};

/// Where an adapter is to go.
pub struct Push {
    client: Client,
    url: String,
    name: String,
}

impl Push {
    /// Refuses what no server could take, without asking this one: it may be away until the training is done.
    pub fn new(url: &str, name: &str, key: Option<&str>, trusted: Option<&Path>) -> Result<Self> {
        adapter::check_whole_name(name).map_err(|e| e.context("--push takes its name from --push-name or --out"))?;
        let client = Client::new(url, key, trusted).map_err(|e| e.context("--push"))?;
        Ok(Push { client, url: url.into(), name: name.into() })
    }

    /// Uploads the adapter's directory. An error says how to do so later.
    pub fn upload(&self, directory: &Path) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let upload = async {
            let generation = cli::push(&self.client, &self.name, directory, None).await?;
            tracing::info!("pushed to {} as {}, generation {generation}", self.url, self.name);
            Ok(())
        };
        runtime.block_on(cli::interruptible(upload)).map_err(|e| {
            let (directory, Push { url, name, .. }) = (directory.display(), self);
            let later = format!("loramux adapters push {name} {directory} --url {url}");
            let message = format!("{e}\nthe adapter is written, but not pushed; to push it later:\n  {later}");
            Error { message, ..e }
        })
    }
}
