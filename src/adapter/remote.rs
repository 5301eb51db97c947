//! A place elsewhere that adapters are fetched from: a bucket, a folder of a web server, or the hub.
//!
//! Each folder in it is an adapter, named after it. Owns what goes over the network: which files are there, in which
//! version, and copies of them. Knows nothing of what they hold, and keeps nothing.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path as Folder;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientConfigKey, ClientOptions, GetOptions, GetResult, HeaderMap, HeaderValue, ObjectMeta,
    ObjectStore, ObjectStoreScheme, RetryConfig,
};
use percent_encoding::percent_decode_str;
use regex::Regex;
use reqwest::Url;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::adapter::connector::Connector;
use crate::adapter::files::{CONFIG, FILES, GGUF, INDEX, WEIGHTS, choose, is_shard, kept_name};
use crate::adapter::repositories::Repositories;
use crate::base::hub::Hub;
use crate::error::{innermost, shorten};
use crate::{Error, Result};

/// What `sha256sum` writes of an adapter's files, where their owner wants them checked.
pub(super) const SUMS: &str = "SHA256SUMS";
/// Largest [`SUMS`] and largest index of shards that is read into memory.
const MAX_TEXT: u64 = 1 << 20;
/// How long a connection may take to be there.
const CONNECT: &str = "5s";
/// No limit of a request's own: an answer's beginning and each of its pieces have [`PATIENCE`].
const REQUEST: &str = "1day";
/// How long an answer, with what is tried again for it, or the next piece of one may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often a request that failed for a passing reason is sent again, and until when.
const RETRIES: usize = 3;
const RETRY_FOR: Duration = Duration::from_secs(10);
/// Bytes a second that files must come with, after a start.
const SLOWEST: u64 = 64 << 10;
/// Adapters fetched at the same time, and files of one.
const PARALLEL: usize = 4;
/// Longest reason of an error that is told.
const MAX_REASON: usize = 300;

/// A place that adapters are fetched from.
pub struct Remote {
    /// Without what is secret in it.
    url: Arc<str>,
    place: Place,
    /// Where in `place` the adapters' folders lie.
    prefix: Path,
    patience: Duration,
    /// [`PARALLEL`] of them.
    places: Semaphore,
}

enum Place {
    Bucket(Arc<dyn ObjectStore>),
    /// It only answers to names of files.
    Web(Arc<dyn ObjectStore>),
    Hub(Repositories),
}

/// What lies under a name.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// The adapter's files, by the names that they are kept under.
    files: BTreeMap<String, ObjectMeta>,
    sums: Option<ObjectMeta>,
    /// Differs for different content, as far as the source's ETags, or times of writing, and sizes tell.
    pub version: Arc<str>,
    /// What is missing of an adapter. It may be on its way.
    pub lack: Option<String>,
}

/// Why nothing was brought.
#[derive(Debug)]
pub(super) enum Failure {
    /// It is not there.
    Absent,
    /// It is not what it was when it was found.
    Changed,
    /// It may not be read.
    Denied(Error),
    /// The source is out of reach, or fails.
    Trouble(Error),
    /// It is there and not to be had, now or later.
    Refused(Error),
}

type Objects = BTreeMap<String, ObjectMeta>;

impl Remote {
    /// The place at a URL: `s3://bucket/prefix`, `gs://…`, `az://…`, `hf://owner[/repository][@revision]`, or
    /// `http(s)://host/path`, which may hold a user and password; others take theirs, and an endpoint, from the environment,
    /// as `object_store` does or the hub's programs. Nothing is asked yet.
    pub fn open(url: &str) -> Result<Self> {
        const EXPECTED: &str = "expected s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, \
            https://host/path or hf://owner/repository@revision";
        if let Some(text) = url.strip_prefix("hf://") {
            let what = || Error::bad_request(format!("--source has a hf:// that is no repository's; {EXPECTED}"));
            let repositories = Repositories::open(text, Hub::from_env()).ok_or_else(what)?;
            let place = Place::Hub(repositories.map_err(Error::internal)?);
            return Ok(Self::at(place, url.trim_end_matches('/'), Path::default()));
        }
        // Not the text itself, in which there may be a password.
        let mut parsed =
            Url::parse(url).map_err(|e| Error::bad_request(format!("--source is no URL ({e}); {EXPECTED}")))?;
        let known = ObjectStoreScheme::parse(&parsed);
        let is_http = matches!(&known, Ok((ObjectStoreScheme::Http, _)));
        let secret = (parsed.username().to_string(), parsed.password().map(str::to_string));
        // Both fail only for URLs that have neither.
        let _ = parsed.set_password(None);
        if is_http {
            let _ = parsed.set_username("");
        }
        let shown = shown(&parsed);
        let wrong = |what: String| Error::bad_request(format!("--source {shown}: {what}"));
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(wrong(format!("has a query or a fragment; {EXPECTED}")));
        }
        let (scheme, prefix) = known.map_err(|_| wrong(EXPECTED.into()))?;
        if !is_http && secret.1.is_some() {
            return Err(wrong("has a password; keys of a bucket are taken from the environment".into()));
        }
        // Whole, since the bottom does not tell which variable or file is wrong.
        let failed = |e: object_store::Error| wrong(cleaned(&e.to_string()));
        let (bucket, retry) = (parsed.to_string(), retry());
        let store: Arc<dyn ObjectStore> = match scheme {
            ObjectStoreScheme::AmazonS3 => {
                let builder =
                    AmazonS3Builder::from_env().with_url(bucket).with_retry(retry).with_http_connector(Connector);
                let limits = limits().map(|(key, value)| (AmazonS3ConfigKey::Client(key), value));
                let builder = limits.into_iter().fold(builder, |builder, (key, value)| builder.with_config(key, value));
                Arc::new(builder.build().map_err(failed)?)
            }
            ObjectStoreScheme::GoogleCloudStorage => {
                let builder = GoogleCloudStorageBuilder::from_env()
                    .with_url(bucket)
                    .with_retry(retry)
                    .with_http_connector(Connector);
                let limits = limits().map(|(key, value)| (GoogleConfigKey::Client(key), value));
                let builder = limits.into_iter().fold(builder, |builder, (key, value)| builder.with_config(key, value));
                Arc::new(builder.build().map_err(failed)?)
            }
            ObjectStoreScheme::MicrosoftAzure => {
                let builder =
                    MicrosoftAzureBuilder::from_env().with_url(bucket).with_retry(retry).with_http_connector(Connector);
                let limits = limits().map(|(key, value)| (AzureConfigKey::Client(key), value));
                let builder = limits.into_iter().fold(builder, |builder, (key, value)| builder.with_config(key, value));
                Arc::new(builder.build().map_err(failed)?)
            }
            ObjectStoreScheme::Http => {
                let mut options = ClientOptions::new().with_allow_http(true);
                if let Some(header) = basic_authorization(&secret.0, secret.1.as_deref()) {
                    options =
                        options.with_default_headers(HeaderMap::from_iter([(reqwest::header::AUTHORIZATION, header)]));
                }
                let options = limits().into_iter().fold(options, |o, (key, value)| o.with_config(key, value));
                parsed.set_path("");
                let builder = HttpBuilder::new()
                    .with_url(parsed.as_str())
                    .with_client_options(options)
                    .with_retry(retry)
                    .with_http_connector(Connector);
                Arc::new(builder.build().map_err(failed)?)
            }
            _ => return Err(wrong(EXPECTED.into())),
        };
        Ok(Self::over(store, &shown, prefix, !is_http))
    }

    /// The folder `prefix` of a store. One that does not list is asked for files by their names.
    pub(super) fn over(store: Arc<dyn ObjectStore>, url: &str, prefix: Path, lists: bool) -> Self {
        Self::at(if lists { Place::Bucket(store) } else { Place::Web(store) }, url, prefix)
    }

    fn at(place: Place, url: &str, prefix: Path) -> Self {
        Remote { url: url.into(), place, prefix, patience: PATIENCE, places: Semaphore::new(PARALLEL) }
    }

    #[cfg(test)]
    pub(super) fn with_patience(self, patience: Duration) -> Self {
        Remote { patience, ..self }
    }

    /// Without what is secret in it.
    pub(super) fn url(&self) -> &Arc<str> {
        &self.url
    }

    /// Whether it tells of all that is there.
    pub(super) fn lists(&self) -> bool {
        match &self.place {
            Place::Bucket(_) => true,
            Place::Web(_) => false,
            Place::Hub(repositories) => repositories.lists(),
        }
    }

    /// A turn to fetch an adapter, as long as it is held.
    pub(super) async fn place(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.places.acquire().await.ok()
    }

    /// What lies under all names, also those that are none of adapters.
    pub(super) async fn list(&self) -> Result<BTreeMap<String, Found>, Failure> {
        let folders = self.folders(&self.prefix).await?;
        Ok(folders.into_iter().map(|(name, objects)| (name, Found::new(&self.url, objects))).collect())
    }

    /// What lies under a name; `None` is nothing.
    pub(super) async fn probe(&self, name: &str) -> Result<Option<Found>, Failure> {
        let folder = self.prefix.clone().join(name);
        let objects = match &self.place {
            Place::Web(store) => self.by_names(store, &folder).await?,
            _ => self.folders(&folder).await?.remove(name).unwrap_or_default(),
        };
        Ok((!objects.is_empty()).then(|| Found::new(&self.url, objects)))
    }

    /// The files in the folders below `under`, which is `prefix` or lies in it.
    async fn folders(&self, under: &Path) -> Result<BTreeMap<String, Objects>, Failure> {
        let mut folders = BTreeMap::<String, Objects>::new();
        let mut objects = match &self.place {
            Place::Bucket(store) | Place::Web(store) => store.list(Some(under)),
            Place::Hub(repositories) => repositories.list(under.as_ref()),
        };
        loop {
            let meta = match self.within(objects.try_next()).await {
                Ok(Some(meta)) => meta,
                Ok(None) => return Ok(folders),
                // Of a bucket: a folder that is not there has no objects.
                Err(Failure::Absent) => return Err(Failure::Trouble(self.unreadable("there is no such bucket"))),
                Err(e) => return Err(e),
            };
            let Some(mut parts) = meta.location.prefix_match(&self.prefix) else { continue };
            let (Some(name), Some(file), None) = (parts.next(), parts.next(), parts.next()) else { continue };
            if kept_name(file.as_ref()).is_some() || file.as_ref() == SUMS {
                let (name, file) = (name.as_ref().to_string(), file.as_ref().to_string());
                drop(parts);
                folders.entry(name).or_default().insert(file, meta);
            }
        }
    }

    /// The files of a folder that cannot be listed. It is an adapter's only with [`CONFIG`] or [`GGUF`], so that more requests
    /// than for these two are made only where there is an adapter.
    async fn by_names(&self, store: &dyn ObjectStore, folder: &Path) -> Result<Objects, Failure> {
        let Some(config) = self.head(store, folder, CONFIG).await? else {
            let gguf = self.head(store, folder, GGUF).await?;
            return Ok(gguf.into_iter().map(|meta| (GGUF.to_string(), meta)).collect());
        };
        let names = FILES.into_iter().filter(|name| *name != CONFIG).chain([SUMS]);
        let others = names.map(async |name| Ok::<_, Failure>((name, self.head(store, folder, name).await?)));
        let others = futures::future::try_join_all(others).await?;
        let others = others.into_iter().filter_map(|(name, meta)| Some((name.to_string(), meta?)));
        let mut objects: Objects = others.chain([(CONFIG.to_string(), config)]).collect();
        if let (Some(index), false) = (objects.get(INDEX), objects.contains_key(WEIGHTS)) {
            let index: serde_json::Value = serde_json::from_str(&self.text(index).await?).unwrap_or_default();
            let named = index["weight_map"].as_object().into_iter().flat_map(|map| map.values());
            let shards = named.filter_map(|name| name.as_str()).filter(|name| is_shard(name));
            for shard in shards.collect::<std::collections::BTreeSet<_>>() {
                objects.extend(self.head(store, folder, shard).await?.map(|meta| (shard.to_string(), meta)));
            }
        }
        Ok(objects)
    }

    async fn head(&self, store: &dyn ObjectStore, folder: &Path, file: &str) -> Result<Option<ObjectMeta>, Failure> {
        let location = folder.clone().join(file);
        match self.within(store.get_opts(&location, GetOptions::new().with_head(true))).await {
            Ok(answer) => Ok(Some(answer.meta)),
            Err(Failure::Absent) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Copies the files of `found`, of at most `limit` bytes together, into `folder` and compares them with their sums.
    /// They are of one version only if that is what [`Self::probe`] finds afterwards.
    pub(super) async fn download(&self, found: &Found, folder: &Folder, limit: u64) -> Result<(), Failure> {
        let bytes = found.bytes();
        if bytes > limit {
            let what = format!("its files have {bytes} bytes together; --max-upload allows {limit}");
            return Err(Failure::Refused(Error::too_large(what)));
        }
        let all = async {
            let expected = match &found.sums {
                Some(sums) => read_sums(&self.text(sums).await?).map_err(Failure::Refused)?,
                None => BTreeMap::new(),
            };
            let mut copies = vec![];
            for (kept, meta) in &found.files {
                let copy = async move {
                    let sum = self.copy(meta, &folder.join(kept)).await?;
                    Ok::<_, Failure>((meta.location.filename().unwrap_or(kept).to_string(), sum))
                };
                copies.push(copy);
            }
            let copied: BTreeMap<String, String> =
                futures::stream::iter(copies).buffer_unordered(PARALLEL).try_collect().await?;
            check_sums(&expected, &copied).map_err(Failure::Refused)
        };
        let limit = 3 * self.patience + Duration::from_secs(bytes / SLOWEST);
        let late = |_| Failure::Trouble(self.unreadable(format!("{bytes} bytes did not come within {limit:?}")));
        tokio::time::timeout(limit, all).await.map_err(late)?
    }

    /// Copies one file and tells its SHA-256 in hex.
    async fn copy(&self, meta: &ObjectMeta, to: &Folder) -> Result<String, Failure> {
        let unwritable = |e: std::io::Error| Failure::Refused(Error::internal(format!("{}: {e}", to.display())));
        let mut pieces = self.get(meta).await?.into_stream();
        let mut file = tokio::fs::File::create(to).await.map_err(unwritable)?;
        let (mut left, mut hasher) = (meta.size, Sha256::new());
        while let Some(piece) = self.within(pieces.try_next()).await.map_err(moved)? {
            left = left.checked_sub(piece.len() as u64).ok_or(Failure::Changed)?;
            hasher.update(&piece);
            file.write_all(&piece).await.map_err(unwritable)?;
        }
        file.flush().await.map_err(unwritable)?;
        if left > 0 {
            return Err(Failure::Changed);
        }
        Ok(crate::adapter::hex(&hasher.finalize()))
    }

    /// A small file whole.
    async fn text(&self, meta: &ObjectMeta) -> Result<String, Failure> {
        if meta.size > MAX_TEXT {
            let what = format!("{} has {} bytes; at most {MAX_TEXT} are read", meta.location, meta.size);
            return Err(Failure::Refused(Error::unprocessable(what)));
        }
        let (mut pieces, mut text) = (self.get(meta).await?.into_stream(), vec![]);
        while let Some(piece) = self.within(pieces.try_next()).await.map_err(moved)? {
            text.extend_from_slice(&piece);
            if text.len() as u64 > meta.size {
                return Err(Failure::Changed);
            }
        }
        let what = |_| Failure::Refused(Error::unprocessable(format!("{} is not UTF-8", meta.location)));
        String::from_utf8(text).map_err(what)
    }

    async fn get(&self, meta: &ObjectMeta) -> Result<GetResult, Failure> {
        let asked = async {
            match &self.place {
                Place::Bucket(store) | Place::Web(store) => store.get_opts(&meta.location, GetOptions::new()).await,
                Place::Hub(repositories) => repositories.get(&meta.location).await,
            }
        };
        let answer = self.within(asked).await.map_err(moved)?;
        if answer.meta.size == meta.size { Ok(answer) } else { Err(Failure::Changed) }
    }

    async fn within<T>(&self, work: impl Future<Output = object_store::Result<T>>) -> Result<T, Failure> {
        let Ok(done) = tokio::time::timeout(self.patience, work).await else {
            return Err(Failure::Trouble(self.unreadable(format!("nothing came for {:?}", self.patience))));
        };
        done.map_err(|e| match e {
            object_store::Error::NotFound { .. } => Failure::Absent,
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                Failure::Denied(self.unreadable(reason(&e)))
            }
            e => Failure::Trouble(self.unreadable(reason(&e))),
        })
    }

    fn unreadable(&self, why: impl std::fmt::Display) -> Error {
        Error::unavailable(format!("the source {} cannot be read: {why}", self.url))
    }
}

/// What was found and is not there when it is read.
fn moved(failure: Failure) -> Failure {
    match failure {
        Failure::Absent => Failure::Changed,
        other => other,
    }
}

impl Found {
    fn new(url: &str, mut objects: Objects) -> Self {
        let sums = objects.remove(SUMS);
        let (files, wrong) = match choose(objects.keys().cloned()) {
            Ok(chosen) => {
                let meta = |(kept, name): (String, String)| Some((kept, objects.get(&name)?.clone()));
                (chosen.into_iter().filter_map(meta).collect(), None)
            }
            Err(e) => (objects, Some(e.message)),
        };
        let mut version = format!("{url}\n");
        let named = files.iter().map(|(name, meta)| (name.as_str(), meta));
        for (name, meta) in named.chain(sums.iter().map(|meta| (SUMS, meta))) {
            let written = || meta.last_modified.to_rfc3339();
            let mark = meta.e_tag.clone().unwrap_or_else(written);
            // Writing to a String cannot fail.
            let _ = writeln!(version, "{name} {} {mark}", meta.size);
        }
        let lack = wrong.or_else(|| lack(&files));
        Found { files, sums, version: version.into(), lack }
    }

    pub fn bytes(&self) -> u64 {
        self.files.values().map(|meta| meta.size).sum()
    }

    /// When it was last written, in Unix seconds, as far as the source tells.
    pub fn modified(&self) -> u64 {
        self.files.values().map(|meta| meta.last_modified.timestamp().max(0) as u64).max().unwrap_or(0)
    }
}

/// What is missing for an adapter.
fn lack(files: &Objects) -> Option<String> {
    if files.contains_key(GGUF) {
        return None;
    }
    if !files.contains_key(CONFIG) {
        return Some(format!("it has no {CONFIG}"));
    }
    if files.contains_key(WEIGHTS) {
        return None;
    }
    let Some(first) = files.keys().find(|name| is_shard(name)).filter(|_| files.contains_key(INDEX)) else {
        return Some(format!("it has no {WEIGHTS}, and no {INDEX} with shards"));
    };
    // `adapter_model-00001-of-00002.safetensors`
    let (start, end) = (&first[..first.len() - "00001-of-00002.safetensors".len()], &first[first.len() - 17..]);
    let count: usize = end[..5].parse().unwrap_or(0);
    let missing = (1..=count).map(|i| format!("{start}{i:05}-of-{end}")).find(|name| !files.contains_key(name));
    missing.map(|name| format!("it has no {name}"))
}

/// SHA-256 in hex by file name, of lines such as `sha256sum` writes.
fn read_sums(text: &str) -> Result<BTreeMap<String, String>> {
    let line = |line: &str| {
        let (sum, name) = line.split_at_checked(64)?;
        let name = name.strip_prefix("  ").or_else(|| name.strip_prefix(" *"))?;
        let is_hex = sum.bytes().all(|c| c.is_ascii_hexdigit());
        is_hex.then(|| (name.strip_prefix("./").unwrap_or(name).to_string(), sum.to_lowercase()))
    };
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|text| {
            line(text).ok_or_else(|| {
                let shown = shorten(text, 100);
                Error::unprocessable(format!("{SUMS} has the line {shown:?}; expected what sha256sum writes"))
            })
        })
        .collect()
}

fn check_sums(expected: &BTreeMap<String, String>, found: &BTreeMap<String, String>) -> Result<()> {
    // Not what is no part of the adapter, such as its export to GGUF.
    let names: std::collections::BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    let chosen = choose(names.into_iter().cloned())?.into_values();
    for (name, expected) in chosen.filter_map(|name| expected.get_key_value(&name)) {
        match found.get(name) {
            Some(found) if found == expected => {}
            Some(found) => {
                let what = format!("{name} has the SHA-256 {found}; {SUMS} says {expected}");
                return Err(Error::unprocessable(what));
            }
            None => return Err(Error::unprocessable(format!("{SUMS} has {name}, which is not there"))),
        }
    }
    Ok(())
}

fn retry() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(2), base: 2.0 };
    RetryConfig { backoff, max_retries: RETRIES, retry_timeout: RETRY_FOR }
}

fn limits() -> [(ClientConfigKey, &'static str); 2] {
    [(ClientConfigKey::ConnectTimeout, CONNECT), (ClientConfigKey::Timeout, REQUEST)]
}

fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.as_str().trim_end_matches('/').to_string()
}

/// Of what a URL has, which is percent-encoded there.
fn basic_authorization(user: &str, password: Option<&str>) -> Option<HeaderValue> {
    if user.is_empty() && password.is_none() {
        return None;
    }
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let pair = format!("{}:{}", decoded(user), decoded(password.unwrap_or("")));
    let mut header = HeaderValue::from_str(&format!("Basic {}", BASE64_STANDARD.encode(pair))).ok()?;
    header.set_sensitive(true);
    Some(header)
}

/// Why a store failed: the cause at the bottom rather than the chain to it, as [`cleaned`].
fn reason(error: &dyn std::error::Error) -> String {
    cleaned(&innermost(error))
}

/// What an error says, on one line, without what may be secret: of an answer in XML its code and the first line of its
/// message, since a store may echo what was signed, and Azure ends its messages with lines that differ each time; and not
/// what serde quotes, such as a key where the JSON of a service account belongs.
fn cleaned(text: &str) -> String {
    static QUOTED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r#"string "(?:[^"\\]|\\.)*""#).expect("a valid pattern"));
    let text = QUOTED.replace_all(text, "a string");
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once('<')?.0.trim().lines().next()
    };
    let start = text.split('<').next().unwrap_or("").trim().trim_end_matches(':');
    let told = match (element("Code"), element("Message")) {
        (Some(code), Some(message)) => format!("{start}: {code}: {message}"),
        (Some(code), None) => format!("{start}: {code}"),
        _ => start.to_string(),
    };
    static QUERY: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(\w+://)(?:[^\s/@]*@)?([^\s?]*)(?:\?[^\s)]*)?").expect("a valid pattern"));
    let told = QUERY.replace_all(&told, "$1$2");
    shorten(&told.split_whitespace().collect::<Vec<_>>().join(" "), MAX_REASON)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::ErrorKind;
    use crate::adapter::generation_of;
    use crate::adapter::testing::{Bucket, Net, Network, adapter};

    fn remote(bucket: &Arc<Bucket>, lists: bool) -> Remote {
        let store = Arc::new(Net(bucket.clone()));
        Remote::over(store, "memory://bucket/prefix", Path::from("prefix"), lists)
            .with_patience(Duration::from_millis(200))
    }

    async fn found(remote: &Remote, name: &str) -> Found {
        remote.probe(name).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn folders_with_an_adapter_s_files_are_found() {
        let bucket = Arc::new(Bucket::default());
        let remote = remote(&bucket, true);
        assert!(remote.list().await.unwrap().is_empty());
        assert!(remote.probe("a").await.unwrap().is_none());
        bucket.put("a", &adapter(1)).await;
        bucket.put_file("a", "README.md", vec![0; 100]).await;
        bucket.put_file("a/checkpoint-1", "adapter_config.json", vec![]).await;
        bucket.put_file("half", "adapter_config.json", vec![]).await;
        bucket.put_file("ab", "adapter_model.safetensors", vec![]).await;
        bucket.put_file("..", "adapter_config.json", vec![]).await;
        bucket.put_file("none", "notes.txt", vec![]).await;
        let all = remote.list().await.unwrap();
        assert_eq!(all.keys().collect::<Vec<_>>(), ["%2E%2E", "a", "ab", "half"]);
        assert_eq!((all["a"].lack.as_deref(), all["a"].bytes()), (None, all["a"].files.values().map(|m| m.size).sum()));
        assert!(all["half"].lack.as_ref().unwrap().contains("no adapter_model.safetensors"), "{:?}", all["half"]);
        assert!(all["ab"].lack.as_ref().unwrap().contains("no adapter_config.json"));
        // Nothing of `ab`, whose name begins alike.
        let one = found(&remote, "a").await;
        assert_eq!((&one.version, one.files.len()), (&all["a"].version, 2));
        assert!(remote.probe("none").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn shards_are_whole_when_all_are_there() {
        let bucket = Arc::new(Bucket::default());
        let folder = adapter(1).sharded();
        let mut names: Vec<String> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        for name in &names {
            for lists in [true, false] {
                let early = remote(&bucket, lists).probe("a").await.unwrap();
                assert!(early.is_none_or(|found| found.lack.is_some()), "before {name}");
            }
            bucket.put_file("a", name, std::fs::read(folder.path().join(name)).unwrap()).await;
        }
        for lists in [true, false] {
            let remote = remote(&bucket, lists);
            let (found, copy) = (found(&remote, "a").await, tempfile::tempdir().unwrap());
            assert_eq!((found.lack.as_deref(), found.files.len()), (None, 4), "{found:?}");
            remote.download(&found, copy.path(), 1 << 20).await.unwrap();
            assert_eq!(generation_of(copy.path()).unwrap(), generation_of(folder.path()).unwrap());
        }
    }

    #[tokio::test]
    async fn a_gguf_file_is_found_by_its_name_or_in_a_list() {
        let bucket = Arc::new(Bucket::default());
        bucket.put_file("a", GGUF, vec![1]).await;
        bucket.put_file("b", "other.gguf", vec![1]).await;
        for lists in [true, false] {
            let remote = remote(&bucket, lists);
            let found = found(&remote, "a").await;
            assert!(found.lack.is_none() && found.files.keys().eq([GGUF]), "{found:?}");
            assert_eq!(remote.probe("b").await.unwrap().is_some(), lists);
        }
    }

    #[tokio::test]
    async fn a_version_is_new_when_a_file_is() {
        let bucket = Arc::new(Bucket::default());
        for lists in [true, false] {
            let remote = remote(&bucket, lists);
            bucket.put("a", &adapter(1)).await;
            let first = found(&remote, "a").await.version;
            assert_eq!(found(&remote, "a").await.version, first);
            bucket.put_file("a", WEIGHTS, adapter(2).weights()).await;
            let second = found(&remote, "a").await.version;
            bucket.put_file("a", "labels.txt", b"x".to_vec()).await;
            let third = found(&remote, "a").await.version;
            assert!(first != second && second != third, "{lists}");
            bucket.remove("a").await;
        }
    }

    #[tokio::test]
    async fn sums_are_compared() {
        let bucket = Arc::new(Bucket::default());
        let remote = remote(&bucket, true);
        bucket.put("a", &adapter(1)).await;
        let hex = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (config, weights) = (hex(adapter(1).config.to_string().as_bytes()), hex(&adapter(1).weights()));
        let other = hex(b"other");
        let download = async |sums: &str| {
            bucket.put_file("a", SUMS, sums.as_bytes().to_vec()).await;
            let copy = tempfile::tempdir().unwrap();
            match remote.download(&found(&remote, "a").await, copy.path(), 1 << 20).await {
                Ok(()) => String::new(),
                Err(Failure::Refused(e)) if e.kind == ErrorKind::Unprocessable => e.message,
                Err(e) => panic!("{e:?}"),
            }
        };
        let all = format!("{config}  {CONFIG}\n{} *./{WEIGHTS}\n{other}  README.md\n", weights.to_uppercase());
        assert_eq!(download(&all).await, "");
        assert_eq!(download("").await, "");
        assert_eq!(download(&format!("{all}{other}  a-f16.gguf\n{other}  a-q8.gguf\n")).await, "");
        let error = download(&format!("{config}  {CONFIG}\n{other}  {WEIGHTS}")).await;
        assert!([WEIGHTS, &weights, &other].iter().all(|part| error.contains(part)), "{error}");
        let error = download(&format!("{other}  labels.json")).await;
        assert!(error.contains("labels.json, which is not there"), "{error}");
        let error = download("{}").await;
        assert!(error.contains("sha256sum"), "{error}");
    }

    #[tokio::test]
    async fn a_broken_network_is_told_apart_from_broken_files() {
        let bucket = Arc::new(Bucket::default());
        let remote = remote(&bucket, true);
        bucket.put("a", &adapter(1)).await;
        let found = found(&remote, "a").await;
        let copy = tempfile::tempdir().unwrap();
        let meet = async |network| {
            bucket.set(network);
            let outcome = remote.download(&found, copy.path(), 1 << 20).await;
            let listed = remote.list().await;
            bucket.set(Network::Well);
            (outcome.unwrap_err(), listed.err())
        };
        let (get, list) = meet(Network::Down).await;
        for failure in [get, list.unwrap()] {
            let Failure::Trouble(e) = failure else { panic!("{failure:?}") };
            assert!(e.kind == ErrorKind::Unavailable && e.message.contains("memory://bucket/prefix"), "{e}");
            assert!(e.message.contains("connection refused") && !e.message.contains("secret"), "{e}");
        }
        let (get, list) = meet(Network::Silent).await;
        for failure in [get, list.unwrap()] {
            assert!(matches!(&failure, Failure::Trouble(e) if e.message.contains("nothing came")), "{failure:?}");
        }
        assert!(matches!(meet(Network::Cut).await, (Failure::Changed, None)));
        assert!(matches!(meet(Network::Private).await, (Failure::Denied(_), None)));
        assert!(matches!(remote.download(&found, copy.path(), 10).await, Err(Failure::Refused(e)) if
            e.kind == ErrorKind::TooLarge));
        bucket.remove("a").await;
        assert!(matches!(remote.download(&found, copy.path(), 1 << 20).await, Err(Failure::Changed)));
    }

    #[tokio::test]
    async fn one_request_tells_that_a_name_is_nowhere() {
        let bucket = Arc::new(Bucket::default());
        bucket.put("a", &adapter(1)).await;
        for (lists, asked) in [(true, 1), (false, 0)] {
            bucket.lists.store(0, Ordering::Relaxed);
            assert!(remote(&bucket, lists).probe("b").await.unwrap().is_none());
            assert_eq!(bucket.lists.load(Ordering::Relaxed), asked);
        }
    }

    #[test]
    fn urls_are_shown_without_secrets() {
        for (url, shown, lists) in [
            ("s3://bucket", "s3://bucket", true),
            ("s3://bucket/some/prefix/", "s3://bucket/some/prefix", true),
            ("http://me:secret@host:81/base/", "http://host:81/base", false),
            ("https://me:secret@host", "https://host", false),
        ] {
            let remote = Remote::open(url).unwrap_or_else(|e| panic!("{url}: {e}"));
            assert_eq!((&**remote.url(), remote.lists()), (shown, lists));
        }
        let remote = Remote::open("hf://org/adapter@v1").unwrap();
        assert_eq!((&**remote.url(), remote.lists()), ("hf://org/adapter@v1", true));
        assert!(!Remote::open("hf://org/").unwrap().lists());
        for url in ["hf://", "hf://a/b/c"] {
            let error = Remote::open(url).map(|_| ()).unwrap_err();
            assert!(error.kind == ErrorKind::BadRequest && error.message.contains("hf://owner/repository"), "{error}");
        }
        for url in ["s3://key:secret@bucket/x", "https://host/x?sig=secret", "ftp://me:secret@host", "//me:secret@host"]
        {
            let error = Remote::open(url).map(|_| ()).unwrap_err();
            assert!(error.kind == ErrorKind::BadRequest && !error.message.contains("secret"), "{error}");
        }
        let header = basic_authorization("me", Some("p%40ss")).unwrap();
        assert_eq!(header.to_str().unwrap(), format!("Basic {}", BASE64_STANDARD.encode("me:p@ss")));
        assert!(basic_authorization("", None).is_none());
    }

    #[test]
    fn reasons_are_short_and_without_secrets() {
        let told = |text: &str| reason(&std::io::Error::other(text.to_string()));
        let answer = "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?>\n<Error><Code>\
            SignatureDoesNotMatch</Code><Message>It does not match.</Message><AWSAccessKeyId>AKIA1</AWSAccessKeyId></Error>";
        let expected = "Server returned non-2xx status code: 403 Forbidden: SignatureDoesNotMatch: It does not match.";
        assert_eq!(told(answer), expected);
        let answer = "403 Forbidden: <Error><Code>AuthenticationFailed</Code><Message>It failed.\nRequestId:1\nTime:2026\
            </Message><AuthenticationErrorDetail>signed was GET</AuthenticationErrorDetail></Error>";
        assert_eq!(told(answer), "403 Forbidden: AuthenticationFailed: It failed.");
        let error = serde_json::from_str::<BTreeMap<String, String>>(r#""secret \"key\"""#).unwrap_err();
        assert!(reason(&error).starts_with("invalid type: a string, expected a map at line 1"), "{}", reason(&error));
        assert_eq!(told("GET https://u:p@h/c?sv=1&sig=s3 (failed)"), "GET https://h/c (failed)");
        assert!(told(&"x".repeat(10_000)).chars().count() <= MAX_REASON + 1);
    }
}
