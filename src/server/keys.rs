//! API keys: the file that holds them, hashed, and what each may do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io::Write;
use std::num::NonZeroU32;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Instant, SystemTime};

use chrono::DateTime;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::bucket::Bucket;
use crate::adapter::{check_tenant, hex};
use crate::engine::Client;
use crate::{Error, ErrorKind, Result};

/// By which people and scanners know a key of loramux.
const PREFIX: &str = "lmx-";
/// Random bytes of a key: so many that its plain SHA-256 cannot be searched for.
const KEY_BYTES: usize = 24;

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Asking: generate, classify, tokenize
    Infer,
    /// Changing adapters: upload, replace, delete, pin, unload
    Admin,
    /// Reading /metrics
    Metrics,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Scope::Infer => "infer",
            Scope::Admin => "admin",
            Scope::Metrics => "metrics",
        })
    }
}

/// A key as the file has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entry {
    /// Hexadecimal.
    pub sha256: String,
    pub scopes: BTreeSet<Scope>,
    /// Whose adapters it sees beside those of all; without one it sees everybody's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<NonZeroU32>,
    /// Of prompts and answers together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_concurrent: Option<NonZeroU32>,
    /// The key is good until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<toml::value::Datetime>,
}

/// What the file says of a tenant.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct TenantEntry {
    share: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    keys: BTreeMap<String, Entry>,
    #[serde(default)]
    tenants: BTreeMap<String, TenantEntry>,
}

/// What was done with a key, whatever the file says of it now.
#[derive(Debug, Default)]
struct Usage {
    requests: Bucket,
    tokens: Bucket,
    in_flight: AtomicU32,
}

/// A key that is known.
#[derive(Debug)]
pub struct Key {
    /// Its name in the file.
    pub id: String,
    /// For the engine.
    pub client: Client,
    entry: Entry,
    expires: Option<SystemTime>,
    usage: Arc<Usage>,
}

/// A request of a key with a limit to those at the same time, until dropped.
#[derive(Debug)]
pub struct Permit(Arc<Usage>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Key {
    pub fn tenant(&self) -> Option<&str> {
        self.client.tenant.as_deref()
    }

    pub fn check_expiry(&self, now: SystemTime) -> Result<()> {
        match self.entry.expires.filter(|_| self.expires.is_some_and(|end| end <= now)) {
            Some(end) => Err(Error::new(ErrorKind::Unauthorized, format!("key {} has expired at {end}", self.id))),
            None => Ok(()),
        }
    }

    pub fn check_scope(&self, scope: Scope) -> Result<()> {
        if self.entry.scopes.contains(&scope) {
            return Ok(());
        }
        let scopes: Vec<String> = self.entry.scopes.iter().map(Scope::to_string).collect();
        let what = format!("key {} is for {}; this needs the scope {scope}", self.id, scopes.join(" and "));
        Err(Error::new(ErrorKind::Forbidden, what))
    }

    /// Counts a request. Errors: `RateLimited` where one more would be too many.
    pub fn enter(&self, now: Instant) -> Result<Permit> {
        let refuse = |what: String, wait| {
            let message = format!("key {}: {what}; try again in {wait} s", self.id);
            Error::new(ErrorKind::RateLimited, message).retry_after(wait)
        };
        if let Some(limit) = self.entry.tokens_per_minute {
            let spent = self.usage.tokens.spend(0, limit.get(), now);
            spent.map_err(|wait| refuse(format!("its {limit} tokens a minute are used up"), wait))?;
        }
        let most = self.entry.max_concurrent.map_or(u32::MAX, NonZeroU32::get);
        let more = |count: u32| (count < most).then_some(count + 1);
        let entered = self.usage.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        entered.map_err(|count| refuse(format!("{count} of its requests are in flight, as many as it may have"), 1))?;
        let permit = Permit(self.usage.clone());
        if let Some(limit) = self.entry.requests_per_minute {
            let spent = self.usage.requests.spend(1, limit.get(), now);
            spent.map_err(|wait| refuse(format!("its {limit} requests a minute are used up"), wait))?;
        }
        Ok(permit)
    }

    /// Counts tokens.
    pub fn charge(&self, tokens: usize) {
        if self.entry.tokens_per_minute.is_some() {
            self.usage.tokens.charge(tokens);
        }
    }
}

/// All keys of the file.
#[derive(Debug, Default)]
pub struct Keys {
    by_hash: HashMap<[u8; 32], Arc<Key>>,
}

impl Keys {
    /// Reads the file; what was done with a key of `before` counts on for the key of the same name.
    ///
    /// Errors: it cannot be read, is no such file, or says what cannot be; the message tells where.
    pub fn read(path: &Path, before: &Keys) -> Result<Keys> {
        let wrong = |what: String| Error::bad_request(format!("{}: {what}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
        let File { keys, tenants } = toml::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        for (name, tenant) in &tenants {
            check_tenant(name).map_err(|e| wrong(e.message))?;
            // So large that nobody means it, and sums stay exact enough.
            if !(tenant.share > 1e-6 && tenant.share < 1e6) {
                return Err(wrong(format!("tenants.{name}: share is {}; expected more than 0", tenant.share)));
            }
        }
        let usages: HashMap<&str, &Arc<Usage>> =
            before.by_hash.values().map(|key| (key.id.as_str(), &key.usage)).collect();
        let mut by_hash = HashMap::new();
        for (id, entry) in keys {
            let wrong = |what: &str| wrong(format!("keys.{id}: {what}"));
            let hash = parse_hash(&entry.sha256).ok_or_else(|| wrong("sha256 is not 64 hexadecimal digits"))?;
            if entry.scopes.is_empty() {
                return Err(wrong("scopes is empty; expected one or more of infer, admin, metrics"));
            }
            let mut client = Client::default();
            if let Some(tenant) = &entry.tenant {
                check_tenant(tenant).map_err(|e| wrong(&e.message))?;
                client.tenant = Some(tenant.as_str().into());
                client.share = tenants.get(tenant).map_or(1.0, |tenant| tenant.share);
            }
            let parse = |end: toml::value::Datetime| {
                let time = DateTime::parse_from_rfc3339(&end.to_string()).map(SystemTime::from);
                time.map_err(|_| wrong("expires needs a date, a time and an offset, e.g. 2030-01-31T00:00:00Z"))
            };
            let expires = entry.expires.map(parse).transpose()?;
            let usage = usages.get(id.as_str()).map_or_else(Arc::default, |usage| (*usage).clone());
            let key = Arc::new(Key { id: id.clone(), client, entry, expires, usage });
            if let Some(other) = by_hash.insert(hash, key) {
                return Err(wrong(&format!("has the same sha256 as keys.{}", other.id)));
            }
        }
        Ok(Keys { by_hash })
    }

    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// The key that `secret` is.
    pub fn find(&self, secret: &str) -> Option<&Arc<Key>> {
        self.by_hash.get(&hash(secret))
    }
}

fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

fn parse_hash(text: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    let digits = text.is_ascii() && text.len() == 2 * hash.len();
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks(2).filter(|_| digits)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    digits.then_some(hash)
}

/// Makes a key, puts its hash into the file, which is made where it is not there, and returns the key. It is nowhere else.
///
/// Errors: the file has the name already, or is none of keys.
pub fn create(path: &Path, id: &str, entry: impl FnOnce(String) -> Entry) -> Result<String> {
    check_tenant(id)
        .map_err(|_| Error::bad_request(format!("{id:?} is no name of a key; give it letters and digits")))?;
    let wrong = |what: String| Error::bad_request(format!("{}: {what}", path.display()));
    let before = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(wrong(e.to_string())),
    };
    let file: File = toml::from_str(&before).map_err(|e| wrong(e.to_string()))?;
    if file.keys.contains_key(id) {
        return Err(wrong(format!("there is a key {id} already; delete its lines first")));
    }
    let secret = format!("{PREFIX}{}", hex(&rand::random::<[u8; KEY_BYTES]>()));
    let entry = entry(hex(&hash(&secret)));
    let lines = toml::to_string(&BTreeMap::from([("keys", BTreeMap::from([(id, entry)]))])).map_err(Error::internal)?;
    let gap = if before.is_empty() { "" } else { "\n" };
    // Beside the file and then in its place, so that a server that reads it sees all or nothing; a new one is for its owner alone.
    // A link stays one.
    let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut new = tempfile::NamedTempFile::new_in(folder).map_err(|e| wrong(e.to_string()))?;
    new.write_all(format!("{}{gap}{lines}", before).as_bytes())?;
    // Its owner may have let the server's user read it.
    if let Ok(old) = std::fs::metadata(path) {
        // What only root may do fails for others, whose files these are anyway.
        let _ = fchown(new.as_file(), None, Some(old.gid()));
        let _ = fchown(new.as_file(), Some(old.uid()), None);
        new.as_file().set_permissions(old.permissions())?;
    }
    new.as_file().sync_all()?;
    // As a whole once more: what would not be read must not be written.
    Keys::read(new.path(), &Keys::default())?;
    new.persist(path).map_err(|e| wrong(e.to_string()))?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(text: &str) -> Result<Keys> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        std::fs::write(&path, text).unwrap();
        Keys::read(&path, &Keys::default())
    }

    fn entry(sha256: String) -> Entry {
        Entry {
            sha256,
            scopes: BTreeSet::from([Scope::Infer]),
            tenant: Some("acme".into()),
            requests_per_minute: NonZeroU32::new(2),
            tokens_per_minute: NonZeroU32::new(100),
            max_concurrent: NonZeroU32::new(3),
            expires: Some("2030-01-31T00:00:00Z".parse().unwrap()),
        }
    }

    #[test]
    fn a_key_that_was_made_is_found_and_stands_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let one = create(&path, "one", entry).unwrap();
        let two = create(&path, "two", |sha256| Entry { tenant: None, ..entry(sha256) }).unwrap();
        assert!(create(&path, "two", entry).unwrap_err().message.contains("a key two already"));
        assert!(create(&path, "a b", entry).is_err());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&one) && !text.contains(&one[PREFIX.len()..]) && one != two);
        let keys = Keys::read(&path, &Keys::default()).unwrap();
        let key = keys.find(&one).unwrap();
        assert_eq!((key.id.as_str(), key.tenant(), keys.len()), ("one", Some("acme"), 2));
        assert_eq!(keys.find(&two).unwrap().tenant(), None);
        assert!(keys.find("").is_none() && keys.find(&one.to_uppercase()).is_none());
        // As it stands in the file it is no key.
        assert!(keys.find(&hex(&hash(&one))).is_none());
        key.check_scope(Scope::Infer).unwrap();
        let refused = key.check_scope(Scope::Admin).unwrap_err();
        assert!(refused.kind == ErrorKind::Forbidden && refused.message.contains("for infer;"), "{refused}");
        let at = |text: &str| SystemTime::from(DateTime::parse_from_rfc3339(text).unwrap());
        key.check_expiry(at("2030-01-30T23:59:59Z")).unwrap();
        assert_eq!(key.check_expiry(at("2030-01-31T00:00:00Z")).unwrap_err().kind, ErrorKind::Unauthorized);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(), 0o600);
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
            create(&path, "three", entry).unwrap();
            assert_eq!(mode(), 0o640);
            let link = folder.path().join("link.toml");
            std::os::unix::fs::symlink("keys.toml", &link).unwrap();
            // As root, of a service's user.
            let is_root = std::os::unix::fs::chown(&path, Some(4711), Some(4712)).is_ok();
            create(&link, "four", entry).unwrap();
            assert!(link.symlink_metadata().unwrap().is_symlink());
            assert_eq!((Keys::read(&path, &Keys::default()).unwrap().len(), mode()), (4, 0o640));
            let owner = std::fs::metadata(&path).unwrap();
            assert!(!is_root || (owner.uid(), owner.gid()) == (4711, 4712));
        }
    }

    #[test]
    fn limits_hold_and_survive_a_new_reading() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let secret = create(&path, "one", entry).unwrap();
        let keys = Keys::read(&path, &Keys::default()).unwrap();
        let (key, now) = (keys.find(&secret).unwrap(), Instant::now());
        let first = key.enter(now).unwrap();
        let again = Keys::read(&path, &keys).unwrap();
        let key = again.find(&secret).unwrap();
        let second = key.enter(now).unwrap();
        let limited = key.enter(now).unwrap_err();
        assert!(limited.kind == ErrorKind::RateLimited && limited.message.contains("2 requests a minute"), "{limited}");
        assert_eq!(limited.retry_after, Some(30));
        let later = now + Duration::from_secs(30);
        let third = key.enter(later).unwrap();
        let limited = key.enter(later + Duration::from_secs(30)).unwrap_err();
        assert!(limited.message.contains("3 of its requests are in flight"), "{limited}");
        drop((first, second, third));
        key.charge(150);
        let limited = key.enter(later).unwrap_err();
        assert!(limited.message.contains("100 tokens a minute"), "{limited}");
        assert_eq!(limited.retry_after, Some(31));
        assert!(key.enter(later + Duration::from_secs(31)).is_ok());
        assert_eq!(key.usage.in_flight.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_is_wrong_in_the_file_is_told() {
        let hash = "0".repeat(64);
        let with = |more: &str| format!("[keys.a]\nsha256 = \"{hash}\"\n{more}\n");
        read("").unwrap();
        read(&with("scopes = ['infer']\n[tenants.acme]\nshare = 2")).unwrap();
        let twice = with("scopes = ['infer']") + &with("scopes = ['infer']").replace("keys.a", "keys.b");
        for (text, what) in [
            (with(""), "scopes"),
            (with("scopes = []"), "keys.a: scopes is empty"),
            (with("scopes = ['root']"), "root"),
            (with("scopes = ['infer']\ntenant = 'a b'"), "keys.a: tenant \"a b\""),
            (with("scopes = ['infer']\ncolour = 1"), "colour"),
            (with("scopes = ['infer']\nrequests-per-minute = 0"), "nonzero"),
            (with("scopes = ['infer']\nexpires = 2030-01-31"), "keys.a: expires needs"),
            (with("scopes = ['infer']\n[tenants.acme]\nshare = 0"), "tenants.acme: share is 0"),
            (with("scopes = ['infer']\n[tenants.'a@b']\nshare = 1"), "tenant \"a@b\""),
            (with("scopes = ['infer']").replace("00", "0g"), "keys.a: sha256"),
            (twice, "keys.b: has the same sha256 as keys.a"),
            ("[".into(), "keys.toml"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.message.contains(what), "{text}\n{error}");
        }
    }
}
