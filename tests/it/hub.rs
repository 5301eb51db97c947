//! Adapters from a stand-in for the hub that the hub's own client takes for it.

use std::path::Path;

use serde_json::json;

use crate::host::Server;
use crate::sources::{Script, ask, base, tiny, until};

struct Hub {
    script: Script,
    url: String,
    token: String,
}

impl Hub {
    fn start() -> Self {
        let (script, told) = Script::start("hub_server.py", &[]);
        let text = |key: &str| told[key].as_str().unwrap().to_string();
        Hub { script, url: text("url"), token: text("token") }
    }

    fn put(&mut self, repository: &str, folder: &Path) {
        self.script.say(&format!("put {repository} {}", folder.display()));
    }

    /// A server with these sources.
    async fn server(&self, sources: &[&str], token: &str) -> Server {
        let variables = [("HF_ENDPOINT", &*self.url), ("HF_TOKEN", token), ("HF_HUB_OFFLINE", "")];
        let source = sources.iter().flat_map(|source| ["--source", source]);
        let options: Vec<&str> = source.chain(["--source-refresh", "1"]).collect();
        Server::start_with(&base(), &options, &variables).await
    }
}

async fn generation(server: &Server, adapter: &str) -> String {
    let (status, body) = ask(&server.http, &server.url, adapter).await;
    assert_eq!(status, 200, "{adapter}: {body}");
    body["generation"].as_str().unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn repositories_are_adapters_and_folders_of_adapters() {
    let mut hub = Hub::start();
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        let to = folder.path().join(to);
        std::fs::create_dir_all(&to).unwrap();
        for file in std::fs::read_dir(tiny(from)).unwrap().flatten() {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    };
    let two = "adapter_qv_r4";
    let eight = "adapter_all_r8";
    hub.put("org/one", &tiny(two));
    hub.put("org/one", &tiny(eight));
    copy(two, "many/first");
    copy("adapter_dora_r4", "many/second");
    hub.put("org/many", &folder.path().join("many"));
    hub.put("else/other", &tiny(two));
    hub.script.say("gate org/many");
    let local = Server::start(&base(), &["--adapters", tiny("").to_str().unwrap()]).await;
    let (old, new) = (generation(&local, two).await, generation(&local, eight).await);

    // By its name, of an owner; what the owner does not have is nowhere.
    let server = hub.server(&["hf://org"], "").await;
    assert_eq!(generation(&server, "one").await, new);
    let (_, info) = server.get("/v1/adapters/one").await.unwrap();
    assert_eq!((&info["source"], &info["tier"]), (&json!("hf://org"), &json!("device")), "{info}");
    let (status, error) = ask(&server.http, &server.url, "other").await;
    assert_eq!(status, 404, "{error}");
    // A private one says what it takes.
    let (status, error) = ask(&server.http, &server.url, "many").await;
    assert!(status == 503 && error.to_string().contains("HF_TOKEN"), "{status} {error}");
    // A commit that comes is served by itself.
    hub.put("org/one", &tiny(two));
    until("the new commit is not served", async || generation(&server, "one").await == old).await;
    drop(server);

    // A commit of one repository stays what it is, and another one's folders are its adapters.
    let second = format!("hf://org/one@{:040}", 2);
    let server = hub.server(&[&second, "hf://org/many"], &hub.token).await;
    until("the sources are not looked at", async || {
        let (_, list) = server.get("/v1/adapters").await.unwrap();
        list["adapters"].as_array().unwrap().len() == 3
    })
    .await;
    assert_eq!(generation(&server, "one").await, new);
    assert_eq!(generation(&server, "first").await, old);
    assert_eq!(generation(&server, "second").await, generation(&local, "adapter_dora_r4").await);
    copy(eight, "many/first");
    hub.put("org/one", &tiny("adapter_rslora_r8"));
    hub.put("org/many", &folder.path().join("many"));
    until("the new commit is not served", async || generation(&server, "first").await == new).await;
    assert_eq!(generation(&server, "one").await, new);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_hub_refuses_is_told_without_the_token() {
    let mut hub = Hub::start();
    hub.put("org/one", &tiny("adapter_qv_r4"));
    for (source, token, reason) in [
        ("hf://org/one", "not-the-token", "Invalid credentials"),
        ("hf://org/absent", &*hub.token, "no such repository"),
        ("hf://org/one@absent", &*hub.token, "Invalid rev id"),
    ] {
        let server = hub.server(&[source], token).await;
        let (status, error) = ask(&server.http, &server.url, "one").await;
        let text = error.to_string();
        assert!(status == 503 && text.contains(source) && text.contains(reason), "{status} {error}");
        assert!(!text.contains(token), "{error}");
        assert_eq!(ask(&server.http, &server.url, "base").await.0, 200);
    }
    // The hub that goes: what was fetched is served.
    let server = hub.server(&["hf://org"], "").await;
    generation(&server, "one").await;
    drop(hub);
    generation(&server, "one").await;
    let (status, error) = ask(&server.http, &server.url, "two").await;
    assert!(status == 503 && error.to_string().contains("hf://org"), "{status} {error}");
}
