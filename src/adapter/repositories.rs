//! Repositories of adapters on the hub, read as a store is in which `NAME/FILE` is a file of an adapter.
//!
//! `hf://OWNER` has each model repository of an owner under its name; the hub is asked for one when its name is.
//! `hf://OWNER/REPOSITORY` has one: under its name, if it is an adapter itself, and each folder in it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{Error, GetResult, GetResultPayload, ObjectMeta, Result};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use tokio::sync::OnceCell;

use crate::base::hub::{Hub, is_plain};

/// How long a connection may take to be there.
const CONNECT: Duration = Duration::from_secs(5);
/// Characters of a commit's name, by which nothing changes any more.
const COMMIT: usize = 40;

#[derive(Debug)]
pub(super) struct Repositories {
    hub: Hub,
    http: Client,
    owner: String,
    /// The only one; without it, all of the owner's.
    repository: Option<String>,
    revision: String,
    /// What is in the only one at a commit.
    fixed: OnceCell<Vec<File>>,
}

/// A file of a repository.
#[derive(Debug, Clone)]
struct File {
    /// From the repository's root.
    path: String,
    bytes: u64,
    /// Of its content.
    hash: String,
    /// When the repository was last written.
    modified: DateTime<Utc>,
}

/// What the hub tells of a repository.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    #[serde(default)]
    last_modified: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Large>,
}

#[derive(Deserialize)]
struct Large {
    sha256: String,
}

impl Repositories {
    /// What follows `hf://`: `OWNER[/REPOSITORY][@REVISION]`. `None`: it is something else. Nothing is asked yet.
    pub fn open(text: &str, hub: Hub) -> Option<reqwest::Result<Self>> {
        let (name, revision) = text.split_once('@').unwrap_or((text.trim_end_matches('/'), "main"));
        let (owner, repository) = match name.split_once('/') {
            Some((owner, repository)) => (owner, Some(repository)),
            None => (name, None),
        };
        let is_revision = revision.split('/').all(is_plain) && !revision.contains("..");
        if !is_plain(owner) || !repository.is_none_or(is_plain) || !is_revision {
            return None;
        }
        let (owner, repository) = (owner.to_string(), repository.map(str::to_string));
        let http = Client::builder().connect_timeout(CONNECT).build();
        let (revision, fixed) = (revision.to_string(), OnceCell::new());
        Some(http.map(|http| Repositories { hub, http, owner, repository, revision, fixed }))
    }

    /// Whether it tells all that there is.
    pub fn lists(&self) -> bool {
        self.repository.is_some()
    }

    fn repo(&self, repository: &str) -> hf_hub::Repo {
        let name = format!("{}/{repository}", self.owner);
        hf_hub::Repo::with_revision(name, hf_hub::RepoType::Model, self.revision.clone())
    }

    /// `path` begins with a slash.
    async fn ask(&self, path: &str) -> Result<Response> {
        if self.hub.offline {
            return Err(failed("HF_HUB_OFFLINE is set"));
        }
        let answer = self.hub.ask(&self.http, path).await.map_err(failed)?;
        let status = answer.status();
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let reason = match header("x-error-message") {
            "" => format!("the hub answers {status}"),
            message => format!("the hub answers {status}: {message}"),
        };
        let is_gated = header("x-error-code") == "GatedRepo";
        let is_token_wrong = header("x-error-message").starts_with("Invalid credentials");
        match status {
            _ if status.is_success() => Ok(answer),
            StatusCode::NOT_FOUND => Err(Error::NotFound { path: path.into(), source: reason.into() }),
            // So it answers those whom it does not know for what is not there, too.
            StatusCode::UNAUTHORIZED if !is_gated && !is_token_wrong => {
                Err(Error::NotFound { path: path.into(), source: reason.into() })
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let source = format!("{reason}; HF_TOKEN has to be a token that may read it").into();
                Err(Error::PermissionDenied { path: path.into(), source })
            }
            _ => Err(failed(reason)),
        }
    }

    /// The files of adapters: of the only repository, or of the owner's with this name.
    pub fn list(&self, name: &str) -> BoxStream<'_, Result<ObjectMeta>> {
        let name = name.to_string();
        let objects = async move { self.adapters(&name).await };
        futures::stream::once(objects)
            .map_ok(|all| futures::stream::iter(all.into_iter().map(Ok)))
            .try_flatten()
            .boxed()
    }

    /// A file that [`Self::list`] told.
    pub async fn get(&self, location: &Path) -> Result<GetResult> {
        let answer = self.ask(&self.url(location)).await?;
        let size = answer.content_length().ok_or_else(|| failed("the hub does not tell the file's size"))?;
        let (location, last_modified) = (location.clone(), DateTime::default());
        let meta = ObjectMeta { location, last_modified, size, e_tag: None, version: None };
        let payload = GetResultPayload::Stream(answer.bytes_stream().map_err(failed).boxed());
        Ok(GetResult { payload, meta, range: 0..size, attributes: Default::default(), extensions: Default::default() })
    }

    /// All files of a repository.
    async fn files(&self, repository: &str) -> Result<Vec<File>> {
        let page = self.ask(&format!("/api/{}?blobs=true", self.repo(repository).api_url())).await?;
        let page: Page = page.json().await.map_err(failed)?;
        let modified = DateTime::parse_from_rfc3339(&page.last_modified).unwrap_or_default().to_utc();
        let file = |sibling: Sibling| {
            let hash = sibling.lfs.map(|large| large.sha256).or(sibling.blob_id);
            let (Some(bytes), Some(hash)) = (sibling.size, hash) else {
                return Err(failed(format!("the hub does not tell size and hash of {}", sibling.rfilename)));
            };
            Ok(File { path: sibling.rfilename, bytes, hash, modified })
        };
        page.siblings.into_iter().map(file).collect()
    }

    async fn adapters(&self, name: &str) -> Result<Vec<ObjectMeta>> {
        let Some(repository) = &self.repository else {
            let files = match self.files(name).await {
                Err(Error::NotFound { .. }) => vec![],
                other => other?,
            };
            let files = files.into_iter().filter(|file| !file.path.contains('/'));
            return Ok(files.filter_map(|file| file.named(name)).collect());
        };
        let is_fixed = self.revision.len() == COMMIT && self.revision.bytes().all(|c| c.is_ascii_hexdigit());
        let files = match is_fixed {
            true => self.fixed.get_or_try_init(|| self.files(repository)).await.cloned(),
            false => self.files(repository).await,
        };
        // Here, where there is nothing else to be found, it is a failure.
        let files = files.map_err(|e| match e {
            Error::NotFound { source, .. } => {
                failed(format!("{source}; it has no such repository or revision, or HF_TOKEN may not read it"))
            }
            other => other,
        })?;
        Ok(files.into_iter().filter_map(|file| file.named(repository)).collect())
    }

    /// Where the hub has the file of an adapter.
    fn url(&self, location: &Path) -> String {
        let location = location.as_ref();
        let (name, file) = location.split_once('/').unwrap_or((location, ""));
        let (repository, path) = match &self.repository {
            Some(only) if only != name => (only.as_str(), location),
            _ => (name, file),
        };
        format!("/{}/{repository}/resolve/{}/{path}", self.owner, self.repo(repository).url_revision())
    }
}

impl File {
    /// As a file of the adapter that is the whole repository, or of the one that is its folder. `None`: it is of neither, or
    /// of a folder that is called like the repository, which is what the name stands for.
    fn named(self, repository: &str) -> Option<ObjectMeta> {
        let location = match self.path.split('/').collect::<Vec<_>>()[..] {
            [file] => Path::from_iter([repository, file]),
            [folder, file] if folder != repository => Path::from_iter([folder, file]),
            _ => return None,
        };
        let (size, last_modified, e_tag) = (self.bytes, self.modified, Some(self.hash));
        Some(ObjectMeta { location, last_modified, size, e_tag, version: None })
    }
}

fn failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Generic { store: "hub", source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(text: &str) -> Option<Repositories> {
        let hub = Hub { endpoint: "http://hub".into(), token: None, offline: true };
        Some(Repositories::open(text, hub)?.unwrap())
    }

    #[test]
    fn an_owner_a_repository_and_a_revision_are_told_apart() {
        for (text, owner, repository, revision) in [
            ("org", "org", None, "main"),
            ("org/", "org", None, "main"),
            ("org@v1", "org", None, "v1"),
            ("org/adapter", "org", Some("adapter"), "main"),
            ("org/adapter/", "org", Some("adapter"), "main"),
            ("Org_1/a.b-c@refs/pr/1", "Org_1", Some("a.b-c"), "refs/pr/1"),
        ] {
            let found = open(text).unwrap_or_else(|| panic!("{text}"));
            let told = (&*found.owner, found.repository.as_deref(), &*found.revision);
            assert_eq!((told, found.lists()), ((owner, repository, revision), repository.is_some()), "{text}");
        }
        for text in
            ["", "/", "@v1", "org@", "org/a/b", "../a", "org/..", "org/a@../b", "org/a@b..c", "o:p/a", "org/a?b"]
        {
            assert!(open(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_location_is_found_where_it_was_listed() {
        let urls = |text: &str, repository: &str, paths: &[&str]| {
            let repositories = open(text).unwrap();
            let file = |path: &&str| File {
                path: path.to_string(),
                bytes: 1,
                hash: "h".into(),
                modified: DateTime::default(),
            };
            let named = paths.iter().filter_map(|path| file(path).named(repository));
            named.map(|meta| (meta.location.to_string(), repositories.url(&meta.location))).collect::<Vec<_>>()
        };
        let paths = ["adapter_config.json", "a/adapter_config.json", "b/c/d.json", "org/x.json", "r/x.json"];
        let expected = [
            ("r/adapter_config.json", "/org/r/resolve/refs%2Fpr%2F1/adapter_config.json"),
            ("a/adapter_config.json", "/org/r/resolve/refs%2Fpr%2F1/a/adapter_config.json"),
            ("org/x.json", "/org/r/resolve/refs%2Fpr%2F1/org/x.json"),
        ];
        let expected = expected.map(|(location, url)| (location.to_string(), url.to_string()));
        assert_eq!(urls("org/r@refs/pr/1", "r", &paths), expected);
        let expected = [("s/adapter_config.json".to_string(), "/org/s/resolve/main/adapter_config.json".to_string())];
        assert_eq!(urls("org", "s", &paths[..1]), expected);
    }
}
