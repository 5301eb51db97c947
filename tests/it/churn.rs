//! Traffic while adapters come, change and go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{fixtures, packaged};
use crate::host::Server;

const PROMPT: &str = "The review said the novel was";
const TOKENS: usize = 8;

async fn ask(server: &Server, adapter: &str) -> (u16, Value) {
    let body =
        json!({ "adapter": adapter, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true });
    server.post("/v1/generate", body).await
}

/// 16 clients on 8 adapters, 200 changes meanwhile. Names 0 to 3 always stand for something and change what; names 4 to 7
/// come and go.
#[tokio::test(flavor = "multi_thread")]
async fn traffic_goes_on_while_adapters_change() {
    let server = Server::start(&packaged(), &[]).await;
    let folder = fixtures().join("smollm2");
    let kinds = ["adapter_causal_r8", "adapter_causal_r16", "adapter_seqcls"].map(|k| folder.join(k));

    // What each generation says, asked for in peace.
    let mut says: HashMap<String, String> = HashMap::new();
    for kind in &kinds {
        let (status, info) = server.put_directory("probe", kind).await;
        assert!(status == 200 || status == 201, "{info}");
        let (status, body) = ask(&server, "probe").await;
        assert_eq!(status, 200, "{body}");
        assert_eq!(body["generation"], info["generation"]);
        says.insert(info["generation"].as_str().unwrap().into(), body["text"].as_str().unwrap().into());
    }
    assert_eq!(says.len(), 3);
    assert_eq!(says.values().collect::<std::collections::HashSet<_>>().len(), 3, "the adapters say the same: {says:?}");
    for i in 0..8 {
        let (status, body) = server.put_directory(&format!("a{i}"), &kinds[i % 3]).await;
        assert_eq!(status, 201, "{body}");
    }
    let before = server.memory();

    let (done, answered, gone) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let (server, says, done, answered, gone) = (&server, &says, &done, &answered, &gone);
    let clients = (0..16).map(|c| async move {
        let mut i = c;
        while !done.load(Ordering::Relaxed) {
            let name = i % 8;
            i += 3;
            let (status, body) = ask(server, &format!("a{name}")).await;
            if status == 404 && name >= 4 {
                gone.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            assert_eq!(status, 200, "a{name}: {body}");
            let generation = body["generation"].as_str().unwrap();
            assert_eq!(body["text"].as_str(), says.get(generation).map(String::as_str), "a{name}: wrong generation");
            answered.fetch_add(1, Ordering::Relaxed);
        }
    });
    let changes = async {
        for i in 0..200 {
            let name = format!("a{}", (i * 5) % 8);
            let (status, body) = match (i * 5) % 8 {
                4.. if (i / 8) % 2 == 0 => {
                    let request = server.http.delete(server.at(&format!("/v1/adapters/{name}")));
                    crate::host::answer(request).await.unwrap()
                }
                _ => server.put_directory(&name, &kinds[(i / 3) % 3]).await,
            };
            assert!([200, 201, 204].contains(&status), "{name}: {status} {body}");
            // Every change meets traffic.
            let seen = answered.load(Ordering::Relaxed);
            while answered.load(Ordering::Relaxed) == seen {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        done.store(true, Ordering::Relaxed);
    };
    tokio::join!(futures::future::join_all(clients), changes);
    println!("{} answers, {} times gone", answered.load(Ordering::Relaxed), gone.load(Ordering::Relaxed));
    assert!(answered.load(Ordering::Relaxed) >= 200);

    let (_, list) = server.get("/v1/adapters").await.unwrap();
    for adapter in list["adapters"].as_array().unwrap() {
        assert_eq!(adapter["in_flight"], 0, "{adapter}");
    }
    let grown = server.memory() as i64 - before as i64;
    assert!(grown < 64 << 20, "memory grew by {grown} bytes");
    let objects = walk(&server.store);
    assert!(objects < 40 << 20, "the store holds {objects} bytes, three adapters have 13 MB");
}

fn walk(folder: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    entries.map(|e| if e.path().is_dir() { walk(&e.path()) } else { e.metadata().unwrap().len() }).sum()
}

/// Uploads are killed in the middle, again and again; what was published before stays, and is never half new.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_survives_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let tiny = fixtures().join("tiny/llama");
    let base = tiny.join("base");
    let kinds = ["adapter_qv_r4", "adapter_all_r8"].map(|k| tiny.join(k));
    let mut generations: Vec<String> = Vec::new();
    for round in 0..12u64 {
        let server = Server::start_on(base.to_str().unwrap(), &store, &[]).await;
        if round == 0 {
            for kind in &kinds {
                let (status, info) = server.put_directory("kept", kind).await;
                assert!(status < 300, "{info}");
                generations.push(info["generation"].as_str().unwrap().into());
            }
        }
        let (status, info) = server.get("/v1/adapters/kept").await.unwrap();
        assert_eq!(status, 200, "{info}");
        assert!(generations.iter().any(|g| info["generation"] == **g), "{info}");
        let body = json!({ "adapter": "kept", "prompt": "t5 t6", "max_tokens": 2 });
        assert_eq!(server.post("/v1/generate", body).await.0, 200);
        let uploads = async {
            for i in 0.. {
                let request = server.put_directory("kept", &kinds[i % 2]);
                tokio::time::timeout(Duration::from_secs(5), request).await.ok();
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(20 + 7 * round), uploads).await;
        server.kill();
    }
}
