//! Who may do what: each request's caller, by its API key.

use std::future::{Ready, ready};
use std::net::{IpAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use actix_web::dev::{Payload, ServiceRequest};
use actix_web::http::Method;
use actix_web::http::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, ORIGIN};
use actix_web::{FromRequest, HttpMessage, HttpRequest};

use super::error::ApiError;
use super::keys::{Key, Keys, Permit, Scope};
use super::origins::Origins;
use super::stamp::Stamp;
use super::trace::Marks;
use crate::engine::Client;
use crate::{Error, ErrorKind, Result};

/// Where clients of other services put their key.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Seconds that the client will wait.
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout");
/// What browsers say of where a request comes from.
const SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// Longest time that a client may give.
const MAX_TIMEOUT: f64 = 86_400.0;

/// What a route asks of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Open,
    /// A key, whatever it is for.
    Any,
    Infer,
    Admin,
    Metrics,
}

/// On whose behalf a request is answered.
#[derive(Debug, Clone)]
pub struct Caller {
    /// `None` where the server has no keys, or the route asks for none.
    pub key: Option<Arc<Key>>,
    /// By which the logs know the request.
    pub request_id: Arc<str>,
    /// Of the connection: a proxy's where there is one.
    pub peer: Option<IpAddr>,
    /// By when the answer has to be out.
    pub deadline: Option<Instant>,
    pub marks: Arc<Marks>,
    /// The place among the key's requests at the same time.
    _permit: Option<Arc<Permit>>,
}

impl Caller {
    /// The caller of a request that [`Access::admit`] let in.
    pub fn of(http: &HttpRequest) -> Result<Caller> {
        let caller = http.extensions().get::<Caller>().cloned();
        caller.ok_or_else(|| Error::internal("the request was let in without a look at its key"))
    }

    pub fn client(&self) -> Client {
        self.key.as_ref().map(|key| key.client.clone()).unwrap_or_default()
    }

    pub fn tenant(&self) -> Option<&str> {
        self.key.as_ref().and_then(|key| key.tenant())
    }

    /// Has a key of no tenant, which goes for all of them.
    pub fn is_operator(&self) -> bool {
        self.key.as_ref().is_some_and(|key| key.tenant().is_none())
    }

    /// Counts what goes to the engine.
    pub fn submitted(&self, prompt_tokens: usize) {
        self.marks.submitted.get_or_init(Instant::now);
        self.marks.prompt_tokens.fetch_add(prompt_tokens as u64, Ordering::Relaxed);
        self.charge(prompt_tokens);
    }

    /// Counts what comes from it.
    pub fn answered(&self, tokens: usize) {
        self.marks.answered.get_or_init(Instant::now);
        self.marks.generated_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
        self.charge(tokens);
    }

    fn charge(&self, tokens: usize) {
        if let Some(key) = &self.key {
            key.charge(tokens);
        }
    }

    /// Waits for `work` until the request's time is over.
    pub async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        match self.deadline {
            None => Ok(work.await),
            Some(deadline) => tokio::time::timeout_at(deadline.into(), work).await.map_err(|_| late()),
        }
    }
}

/// What a request is answered whose time is over.
pub fn late() -> Error {
    Error::new(
        ErrorKind::Timeout,
        "the request's time, of x-request-timeout or --request-timeout, is over; it was given up",
    )
}

impl FromRequest for Caller {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(http: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Caller::of(http).map_err(ApiError::from))
    }
}

/// The keys, and what goes for all callers.
pub struct Access {
    keys: Option<File>,
    /// Most time that a request may take.
    timeout: Option<Duration>,
    origins: Origins,
    /// Whether nothing but the address that it listens on keeps strangers out.
    only_here: bool,
}

/// Keys, and the file that they were read from.
struct File {
    path: PathBuf,
    stamp: RwLock<Stamp>,
    keys: RwLock<Arc<Keys>>,
}

impl Access {
    /// Without `keys` everybody may do everything.
    pub fn open(keys: Option<PathBuf>, timeout: Option<Duration>) -> Result<Self> {
        let open = |path: PathBuf| -> Result<File> {
            let stamp = Stamp::of([&path]);
            let keys = Keys::read(&path, &Keys::default())?;
            tracing::info!("{} API keys", keys.len());
            Ok(File { path, stamp: RwLock::new(stamp), keys: RwLock::new(Arc::new(keys)) })
        };
        Ok(Access { keys: keys.map(open).transpose()?, timeout, origins: Origins::default(), only_here: false })
    }

    /// Lets pages of these other sites in.
    pub fn allowing(self, origins: Origins) -> Self {
        Access { origins, ..self }
    }

    pub fn origins(&self) -> &Origins {
        &self.origins
    }

    /// Where it listens. Errors: others than this machine could come in, and nothing would ask them for a key.
    pub fn listening(self, listen: &str, allow_anonymous: bool) -> Result<Self> {
        if self.keys.is_some() || allow_anonymous {
            return Ok(self);
        }
        // A name that cannot be found may be found later.
        let wrong = |e: std::io::Error| {
            let kind =
                if e.kind() == std::io::ErrorKind::InvalidInput { Error::bad_request } else { Error::unavailable };
            kind(format!("--listen {listen}: {e}"))
        };
        match listen.to_socket_addrs().map_err(wrong)?.all(|address| address.ip().is_loopback()) {
            true => Ok(Access { only_here: true, ..self }),
            false => Err(Error::bad_request(format!(
                "--listen {listen} lets in others than this machine, and there are no API keys; give --keys FILE (`loramux keys \
                 new` makes keys), or --allow-anonymous where something else keeps strangers out"
            ))),
        }
    }

    /// Reads the keys again if the file has changed. A file that is wrong changes nothing.
    pub fn refresh(&self) {
        let Some(file) = &self.keys else { return };
        let now = Stamp::of([&file.path]);
        if *file.stamp.read().unwrap_or_else(PoisonError::into_inner) == now {
            return;
        }
        *file.stamp.write().unwrap_or_else(PoisonError::into_inner) = now;
        let before = file.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        match Keys::read(&file.path, &before) {
            Ok(keys) => {
                tracing::info!("{} API keys, read again", keys.len());
                *file.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
            }
            Err(e) => tracing::error!("the keys stay as they are: {e}"),
        }
    }

    /// Looks at a request's key and limits. Errors: `Unauthorized`, `Forbidden`, `RateLimited`, `BadRequest`.
    pub fn admit(&self, request: &ServiceRequest, need: Need, request_id: &str) -> Result<Caller> {
        let headers = request.headers();
        let mut caller = Caller {
            key: None,
            request_id: request_id.into(),
            peer: request.peer_addr().map(|address| address.ip()),
            deadline: self.deadline(headers)?,
            marks: Arc::default(),
            _permit: None,
        };
        let Some(file) = &self.keys else {
            let origin = headers.get(ORIGIN).and_then(|origin| origin.to_str().ok());
            let is_allowed = origin.is_some_and(|origin| self.origins.allow(origin));
            if self.only_here && need != Need::Open && !is_this_machine(headers) {
                // A page whose site's name leads here by now (DNS rebinding) is of the same site, to a browser.
                let what = "the header Host has a name that is not this machine's; a server without keys answers to localhost \
                    and to addresses, or with --allow-anonymous to all names";
                return Err(Error::new(ErrorKind::Forbidden, what));
            }
            return match is_foreign(request) && !is_allowed {
                // Any page that a browser shows could ask this machine's servers; with keys it would not have one.
                true => Err(Error::new(ErrorKind::Forbidden, "a page of another site asks; this server has no keys")),
                false => Ok(caller),
            };
        };
        if need == Need::Open {
            return Ok(caller);
        }
        let keys = file.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        let unauthorized = |what: &str| Error::new(ErrorKind::Unauthorized, what);
        let Some(secret) = secret(headers) else {
            return Err(unauthorized("an API key is needed: send the header Authorization: Bearer KEY"));
        };
        let key = keys.find(secret).ok_or_else(|| unauthorized("the API key is none of this server's"))?;
        key.check_expiry(SystemTime::now())?;
        match need {
            Need::Open | Need::Any => {}
            Need::Infer => key.check_scope(Scope::Infer)?,
            Need::Admin => key.check_scope(Scope::Admin)?,
            Need::Metrics => key.check_scope(Scope::Metrics)?,
        }
        if need == Need::Infer {
            caller._permit = Some(Arc::new(key.enter(Instant::now())?));
        }
        caller.key = Some(key.clone());
        Ok(caller)
    }

    fn deadline(&self, headers: &HeaderMap) -> Result<Option<Instant>> {
        let asked = match headers.get(TIMEOUT) {
            None => None,
            Some(value) => {
                let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
                let seconds = seconds.filter(|seconds| *seconds > 0.0 && *seconds <= MAX_TIMEOUT);
                Some(Duration::from_secs_f64(seconds.ok_or_else(|| {
                    let what = format!("{TIMEOUT} is {value:?}; expected seconds, more than 0, at most {MAX_TIMEOUT}");
                    Error::bad_request(what)
                })?))
            }
        };
        let least = asked.into_iter().chain(self.timeout).min();
        Ok(least.map(|time| Instant::now() + time))
    }
}

/// The key that a request shows.
fn secret(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| {
        let (scheme, secret) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(secret.trim())
    });
    bearer.or_else(|| headers.get(API_KEY)?.to_str().ok().map(str::trim)).filter(|secret| !secret.is_empty())
}

/// A host without its port, which proxies leave out and sites do not differ by.
fn name_of(host: &str) -> &str {
    host.trim_end_matches(|c: char| c.is_ascii_digit()).strip_suffix(':').unwrap_or(host)
}

/// Whether who asks has reached the server by an address, by `localhost`, or by a name that the internet has not (containers
/// call the machine that they run on `host.docker.internal`). Without a host it was no browser.
fn is_this_machine(headers: &HeaderMap) -> bool {
    headers.get(HOST).is_none_or(|host| {
        let name = name_of(host.to_str().unwrap_or_default()).trim_end_matches('.').to_ascii_lowercase();
        let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(&name);
        let is_own = name == "localhost" || [".localhost", ".internal"].iter().any(|end| name.ends_with(end));
        is_own || address.parse::<IpAddr>().is_ok()
    })
}

/// Whether a browser says that another site's page is behind a request that could change or cost something.
fn is_foreign(request: &ServiceRequest) -> bool {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    let header = |name: HeaderName| request.headers().get(name).map(|value| value.to_str().unwrap_or_default());
    !reads
        && match (header(SITE), header(ORIGIN)) {
            (Some(site), _) => site == "cross-site",
            // Of a server that is not on this machine and has no TLS browsers do not say that, but where the page is from.
            (None, Some(origin)) => {
                let from = origin.split_once("://").map(|(_, from)| from);
                !from.zip(header(HOST)).is_some_and(|(from, host)| name_of(from).eq_ignore_ascii_case(name_of(host)))
            }
            (None, None) => false,
        }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    fn access(text: Option<&str>) -> Access {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        std::fs::write(&path, text.unwrap_or_default()).unwrap();
        Access::open(text.map(|_| path), Some(Duration::from_secs(100))).unwrap()
    }

    #[test]
    fn keys_come_in_two_headers() {
        // sha256 of "secret".
        let hash = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
        let access = access(Some(&format!("[keys.a]\nsha256 = '{hash}'\nscopes = ['infer']\ntenant = 't'")));
        let admit = |header: Option<(&str, &str)>, need| {
            let request = header.into_iter().fold(TestRequest::post(), |request, header| request.insert_header(header));
            access.admit(&request.to_srv_request(), need, "id").map_err(|e| e.kind)
        };
        for header in [("Authorization", "Bearer secret"), ("authorization", "bearer  secret"), ("X-API-Key", "secret")]
        {
            let caller = admit(Some(header), Need::Infer).unwrap();
            assert_eq!((caller.tenant(), caller.is_operator()), (Some("t"), false));
        }
        for header in [
            None,
            Some(("Authorization", "secret")),
            Some(("Authorization", "Basic secret")),
            Some(("Authorization", "Bearer ")),
            Some(("x-api-key", "Secret")),
            Some(("x-api-key", hash)),
        ] {
            assert_eq!(admit(header, Need::Any).unwrap_err(), ErrorKind::Unauthorized, "{header:?}");
            assert!(admit(header, Need::Open).is_ok());
        }
        for need in [Need::Admin, Need::Metrics] {
            assert_eq!(admit(Some(("x-api-key", "secret")), need).unwrap_err(), ErrorKind::Forbidden);
        }
    }

    #[test]
    fn the_shorter_time_counts() {
        let access = access(None);
        let left = |header: Option<&str>| {
            let request = header
                .into_iter()
                .fold(TestRequest::post(), |request, seconds| request.insert_header(("x-request-timeout", seconds)));
            let caller = access.admit(&request.to_srv_request(), Need::Infer, "id").map_err(|e| e.kind)?;
            Ok(caller.deadline.unwrap().duration_since(Instant::now()).as_secs_f64().round())
        };
        assert_eq!((left(None), left(Some("12.5e0")), left(Some("7000"))), (Ok(100.0), Ok(12.0), Ok(100.0)));
        for wrong in ["", "0", "-1", "NaN", "inf", "1e9", "soon"] {
            assert_eq!(left(Some(wrong)), Err(ErrorKind::BadRequest), "{wrong}");
        }
    }

    #[test]
    fn without_keys_only_this_machine_comes_in_and_no_other_sites_page() {
        let open = access(None);
        for listen in ["127.0.0.1:0", "[::1]:80", "localhost:1"] {
            access(None).listening(listen, false).unwrap();
        }
        for listen in ["0.0.0.0:80", "[::]:80"] {
            let refused = access(None).listening(listen, false).err().unwrap();
            assert!(refused.message.contains("--keys FILE"), "{refused}");
            access(None).listening(listen, true).unwrap();
            access(Some("")).listening(listen, false).unwrap();
        }
        let foreign = |request: TestRequest| {
            let request = request.insert_header(("Sec-Fetch-Site", "cross-site")).to_srv_request();
            open.admit(&request, Need::Infer, "id").is_err()
        };
        assert!(foreign(TestRequest::post()) && foreign(TestRequest::delete()) && !foreign(TestRequest::get()));
        let from = |origin: &str, site: Option<&str>| {
            let request = TestRequest::post().insert_header(("Host", "10.0.0.7:8080"));
            let request = request.insert_header(("Origin", origin));
            let request = site.into_iter().fold(request, |request, s| request.insert_header(("Sec-Fetch-Site", s)));
            open.admit(&request.to_srv_request(), Need::Admin, "id").is_ok()
        };
        let allowing = access(None).allowing(Origins::new(vec!["http://app.example".into()]).unwrap());
        let page = |origin: &str| {
            let request =
                TestRequest::post().insert_header(("Origin", origin)).insert_header(("Sec-Fetch-Site", "cross-site"));
            allowing.admit(&request.to_srv_request(), Need::Admin, "id").is_ok()
        };
        assert!(page("http://app.example") && !page("http://evil.example"));
        assert!(from("http://10.0.0.7:8080", None) && !from("http://evil.example", None) && !from("null", None));
        let names = ["10.0.0.7", "10.0.0.7:80", "[::1]", "[::1]:80", "a.example:443"].map(name_of);
        assert_eq!(names, ["10.0.0.7", "10.0.0.7", "[::1]", "[::1]", "a.example"]);
        // Behind a proxy that has another name.
        assert!(from("https://llm.example", Some("same-origin")) && !from("https://llm.example", Some("cross-site")));
        assert!(open.admit(&TestRequest::post().to_srv_request(), Need::Admin, "id").is_ok());
    }

    #[test]
    fn without_keys_the_name_of_another_site_does_not_lead_here() {
        let asked = |access: &Access, host: &str, need| {
            let request = TestRequest::get().insert_header(("Host", host)).to_srv_request();
            access.admit(&request, need, "id").is_ok()
        };
        let here = access(None).listening("127.0.0.1:0", false).unwrap();
        for host in [
            "127.0.0.1:8080",
            "[::1]:80",
            "[::1]",
            "10.0.0.7",
            "localhost",
            "LOCALHOST:8080",
            "a.localhost:1",
            "host.docker.internal",
        ] {
            assert!(asked(&here, host, Need::Infer), "{host}");
        }
        let anyone = access(None).listening("127.0.0.1:0", true).unwrap();
        for host in [
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "notlocalhost",
            "",
        ] {
            assert!(!asked(&here, host, Need::Infer) && !asked(&here, host, Need::Any), "{host}");
            assert!(asked(&here, host, Need::Open) && asked(&anyone, host, Need::Infer), "{host}");
        }
        assert!(here.admit(&TestRequest::get().to_srv_request(), Need::Infer, "id").is_ok());
    }
}
