//! Makes a hub model local: from the cache, the hub, or (the default model alone) a package on PyPI.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hf_hub::api::tokio::ApiError;
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// `models/default.toml`.
#[derive(Deserialize)]
struct Default {
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

fn default() -> Default {
    toml::from_str(include_str!("../../models/default.toml")).expect("models/default.toml is checked by a test")
}

/// How folders begin in which a download is prepared.
const WORK: &str = ".fetch-";

/// Where the hub is and where copies of it lie.
struct Hub {
    endpoint: String,
    cache: Cache,
    token: Option<String>,
}

/// Why the hub gave nothing.
enum Missing {
    /// Nobody answered.
    OutOfReach(String),
    /// The hub answered, and the answer is final.
    Refused(Error),
}

/// Makes a hub model local and returns the directory or `.gguf` file. Shows progress on stderr. The hub (`HF_ENDPOINT`,
/// `HF_HOME`, `HF_TOKEN` honoured) comes first; for the default model, where the hub is out of reach, the wheel on PyPI.
pub fn fetch(id: &str) -> Result<PathBuf> {
    let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
    let parts: Vec<&str> = name.split('/').collect();
    let plain = |s: &&str| {
        !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    if parts.len() != 2 || !parts.iter().all(plain) || revision.is_empty() || revision.contains("..") {
        let what = "expected a directory, a .gguf file or a hub id org/name[@revision]";
        return Err(Error::bad_request(format!("model {id:?} is nothing that exists here; {what}")));
    }
    let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty());
    let cache = Cache::from_env();
    let token = std::env::var("HF_TOKEN").ok().filter(|t| !t.is_empty()).or_else(|| cache.token());
    let hub = Hub { endpoint: endpoint.unwrap_or_else(|| "https://huggingface.co".into()), cache, token };
    let default = default();
    let kept = cache_directory()?.join(Path::new(&default.wheel.file).file_name().unwrap_or_default());
    fetch_from(
        &hub,
        name,
        revision,
        |reason| {
            if name != default.hub || revision != "main" {
                let what = format!("the hub at {} is out of reach ({reason}) and {id} is not here yet", hub.endpoint);
                return Err(Error::unavailable(what));
            }
            if is_kept(&default.wheel, &kept) {
                return Ok(kept.clone());
            }
            eprintln!(
                "The hub is out of reach ({reason}); taking {name} from the Python package {} {}.",
                default.wheel.package, default.wheel.version
            );
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip"]);
            from_pip(pip, &default.wheel, &kept)?;
            Ok(kept.clone())
        },
        is_kept(&default.wheel, &kept) && name == default.hub && revision == "main",
    )
}

/// Whether the wheel's model is at `target`. It is renamed to there only when whole and checked, so its size is enough.
fn is_kept(wheel: &Wheel, target: &Path) -> bool {
    fs::metadata(target).is_ok_and(|m| m.is_file() && m.len() == wheel.file_bytes)
}

/// The cached copy, else the hub's, else what `otherwise` finds. With `kept`, a copy from elsewhere makes the hub needless.
fn fetch_from(
    hub: &Hub,
    name: &str,
    revision: &str,
    otherwise: impl FnOnce(&str) -> Result<PathBuf>,
    kept: bool,
) -> Result<PathBuf> {
    let repo = Repo::with_revision(name.into(), RepoType::Model, revision.into());
    if let Some(directory) = cached(&hub.cache, &repo) {
        return Ok(directory);
    }
    if kept {
        return otherwise("not asked");
    }
    // A thread of its own, so that callers inside and outside an async runtime are served alike.
    let answer = std::thread::scope(|scope| {
        let run = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map_err(|e| Missing::Refused(e.into()))?.block_on(from_hub(hub, &repo))
        };
        scope.spawn(run).join()
    });
    match answer {
        Ok(Ok(directory)) => Ok(directory),
        Ok(Err(Missing::Refused(e))) => Err(e),
        Ok(Err(Missing::OutOfReach(reason))) => otherwise(&reason),
        Err(_) => Err(Error::internal("fetching from the hub panicked")),
    }
}

/// The snapshot directory, if everything that a model needs is in it.
fn cached(cache: &Cache, repo: &Repo) -> Option<PathBuf> {
    let files = cache.repo(repo.clone());
    let directory = files.get("config.json")?.parent()?.to_path_buf();
    let whole = || match files.get("model.safetensors.index.json") {
        None => false,
        Some(index) => fs::read(index)
            .is_ok_and(|bytes| shards(&bytes).is_some_and(|names| names.iter().all(|s| directory.join(s).exists()))),
    };
    let whole = directory.join("model.safetensors").exists() || whole();
    (whole && directory.join("tokenizer.json").exists()).then_some(directory)
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

async fn from_hub(hub: &Hub, repo: &Repo) -> Result<PathBuf, Missing> {
    let refused = |what: String| Missing::Refused(Error::unavailable(what));
    let http = reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).read_timeout(Duration::from_secs(20));
    let http = http.build().map_err(|e| refused(e.to_string()))?;
    let mut request = http.get(format!("{}/api/{}", hub.endpoint.trim_end_matches('/'), repo.api_url()));
    if let Some(token) = &hub.token {
        request = request.bearer_auth(token);
    }
    let answer = request.send().await.map_err(|e| Missing::OutOfReach(innermost(&e)))?;
    let status = answer.status();
    // A proxy or gateway in between says that it cannot reach the hub.
    if matches!(status.as_u16(), 502..=504) {
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
    let info: Value = answer.json().await.map_err(|e| refused(format!("the hub's answer is not JSON: {e}")))?;
    let listed: Vec<&str> =
        info["siblings"].as_array().into_iter().flatten().filter_map(|s| s["rfilename"].as_str()).collect();
    let needed = ["config.json", "tokenizer.json"];
    let optional = ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"];
    let index = "model.safetensors.index.json";
    let single = "model.safetensors";
    let weights = if !listed.contains(&single) && listed.contains(&index) { index } else { single };
    if let Some(missing) = needed.iter().chain([&weights]).find(|f| !listed.contains(f)) {
        return Err(refused(format!("{} on the hub has no file {missing}, which serving needs", repo.url())));
    }
    eprintln!("Fetching {} from the hub.", repo.url());
    let api = hf_hub::api::tokio::ApiBuilder::from_cache(hub.cache.clone())
        .with_endpoint(hub.endpoint.trim_end_matches('/').to_string())
        .with_token(hub.token.clone())
        .with_progress(true)
        .build()
        .map_err(|e| refused(e.to_string()))?;
    let api = api.repo(repo.clone());
    let get = async |file: &str| {
        let path = match api.get(file).await {
            Ok(path) => path,
            // No answer at all: the hub's page may be in reach and its file store not.
            Err(ApiError::RequestError(e)) if e.status().is_none() => {
                return Err(Missing::OutOfReach(format!("{file}: {}", innermost(&e))));
            }
            Err(e) => return Err(refused(format!("{file} from the hub: {e}"))),
        };
        verify(&path).map_err(|e| Missing::Refused(e.context(format!("{file} from the hub"))))?;
        Ok(path)
    };
    // The configuration comes last, so that a directory left by a fetch that was cut short is not taken for whole.
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
    for file in optional.iter().filter(|f| listed.contains(f)) {
        get(file).await?;
    }
    for file in needed.iter().rev() {
        get(file).await?;
    }
    cached(&hub.cache, repo).ok_or_else(|| refused("the hub's files are not whole in the cache".into()))
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

/// The cause at the bottom: "connection refused" rather than "error sending request".
fn innermost(e: &dyn std::error::Error) -> String {
    let mut e = e;
    while let Some(source) = e.source() {
        e = source;
    }
    e.to_string()
}

fn cache_directory() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let directory = variable("LORAMUX_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("loramux")))
        .or_else(|| Some(variable("HOME")?.join(".cache/loramux")));
    directory
        .ok_or_else(|| Error::bad_request("none of LORAMUX_CACHE, XDG_CACHE_HOME and HOME says where models are kept"))
}

/// Downloads the wheel with `pip` and puts its model file at `target`, whole or not at all. One process at a time: a
/// second one waits and finds the file there.
fn from_pip(mut pip: Command, wheel: &Wheel, target: &Path) -> Result<()> {
    let folder = target.parent().ok_or_else(|| Error::internal("a target without a folder"))?;
    let unwritable = |e: std::io::Error| Error::unavailable(format!("{}: {e}", folder.display()));
    fs::create_dir_all(folder).map_err(unwritable)?;
    let lock = File::create(folder.join(".fetch.lock")).map_err(unwritable)?;
    lock.lock().map_err(unwritable)?;
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
    use std::net::TcpListener;

    use super::*;

    /// A stand-in for the hub: serves the files of a folder under any revision, by the routes and headers that clients use.
    fn stand_in(folder: PathBuf, private: bool) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, folder) = (stream.unwrap(), folder.clone());
                std::thread::spawn(move || {
                    let mut request = Vec::new();
                    let mut byte = [0];
                    while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
                        request.push(byte[0]);
                    }
                    let request = String::from_utf8_lossy(&request).to_lowercase();
                    let raw_path = request.split_whitespace().nth(1).unwrap_or("").to_string();
                    let answer = |stream: &mut std::net::TcpStream, status: &str, headers: &str, body: &[u8]| {
                        let length = body.len();
                        let head = format!(
                            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
                        );
                        let _ = stream.write_all(head.as_bytes()).and_then(|_| stream.write_all(body));
                    };
                    if private && !request.contains("authorization: bearer secret") {
                        return answer(&mut stream, "401 Unauthorized", "", b"");
                    }
                    if raw_path.starts_with("/api/models/org/tiny") {
                        let names =
                            fs::read_dir(&folder).unwrap().flatten().map(|e| e.file_name().into_string().unwrap());
                        let siblings: Vec<Value> = names.map(|n| serde_json::json!({ "rfilename": n })).collect();
                        let body = serde_json::json!({ "sha": "abc", "siblings": siblings }).to_string();
                        return answer(&mut stream, "200 OK", "", body.as_bytes());
                    }
                    let file = raw_path.rsplit('/').next().unwrap_or("");
                    let Ok(bytes) = fs::read(folder.join(file)) else {
                        return answer(&mut stream, "404 Not Found", "", b"");
                    };
                    let range = request.split("range: bytes=").nth(1).and_then(|r| r.split_whitespace().next());
                    let (from, to) = range.and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
                    let from: usize = from.parse().unwrap_or(0);
                    let to = to.parse().unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
                    // Beside each file may lie the checksum by which the hub names it.
                    let etag = fs::read_to_string(folder.join(format!("{file}.etag"))).unwrap_or_else(|_| file.into());
                    let size = bytes.len();
                    let headers = format!(
                        "content-range: bytes {from}-{to}/{size}\r\netag: \"{etag}\"\r\nx-repo-commit: abc\r\n"
                    );
                    answer(&mut stream, "206 Partial Content", &headers, &bytes[from..=to]);
                });
            }
        });
        address
    }

    fn tiny() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama/base")
    }

    fn hub(endpoint: String, cache: &Path, token: Option<&str>) -> Hub {
        Hub { endpoint, cache: Cache::new(cache.into()), token: token.map(str::to_string) }
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
            fetch_from(&hub(here.endpoint, &cache.path().join("other"), None), "org/tiny", "main", never, false);
        assert!(directory.unwrap().join("model-1.safetensors").exists());
    }

    #[test]
    fn a_hub_whose_answers_break_off_is_out_of_reach() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0; 4096];
                let n = stream.read(&mut request).unwrap_or(0);
                // The page answers, the files do not.
                if String::from_utf8_lossy(&request[..n]).contains("/api/") {
                    let names = ["config.json", "tokenizer.json", "model.safetensors"];
                    let body = serde_json::json!({ "siblings": names.map(|n| serde_json::json!({ "rfilename": n })) });
                    let body = body.to_string();
                    let head =
                        format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
                    let _ = stream.write_all((head + &body).as_bytes());
                }
            }
        });
        let cache = tempfile::tempdir().unwrap();
        let here = hub(address, cache.path(), None);
        let fallen = fetch_from(&here, "org/tiny", "main", |reason| Ok(reason.into()), false).unwrap();
        assert!(fallen.to_string_lossy().starts_with("model.safetensors: "), "{fallen:?}");
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
