//! What goes wrong beneath a running server: a disk that is full, or takes nothing more; files that change.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::fixtures;
use crate::host::Server;

/// Something mounted on a folder, until dropped.
struct Mount(PathBuf);

impl Mount {
    /// A file system in memory, of so many KiB. `None` where nobody may mount one.
    fn memory(folder: &Path, size: usize) -> Option<Self> {
        mount(&["-t", "tmpfs", "-o", &format!("size={size}k"), "none"], folder)
    }

    /// The folder itself, where nothing can be written.
    fn read_only(folder: &Path) -> Option<Self> {
        let mounted = mount(&["--bind", &folder.display().to_string()], folder)?;
        run(&["-o", "remount,bind,ro"], folder).then_some(mounted)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l".as_ref(), self.0.as_os_str()]).status();
    }
}

fn run(options: &[&str], at: &Path) -> bool {
    Command::new("mount").args(options).arg(at).output().is_ok_and(|output| output.status.success())
}

fn mount(options: &[&str], at: &Path) -> Option<Mount> {
    let mounted = run(options, at);
    if !mounted {
        eprintln!("nothing was tested: a file system cannot be mounted here");
    }
    mounted.then(|| Mount(at.into()))
}

async fn says(server: &Server, adapter: &str) -> (u16, Value) {
    server.post("/v1/generate", json!({ "adapter": adapter, "prompt": "t5 t6", "max_tokens": 2 })).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_uploads_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_disk) = Mount::memory(folder.path(), 256) else { return };
    let store = folder.path().join("s/store");
    let tiny = fixtures().join("tiny/llama");
    let base = tiny.join("base").display().to_string();
    let server = Server::start_on(&base, &store, &[]).await;
    let (status, kept) = server.put_directory("kept", &tiny.join("adapter_qv_r4")).await;
    assert_eq!(status, 201, "{kept}");
    let weights = std::fs::read(tiny.join("adapter_all_r8/adapter_model.safetensors")).unwrap();
    let config = std::fs::read_to_string(tiny.join("adapter_all_r8/adapter_config.json")).unwrap();
    // Each is another adapter, so that the disk holds them all.
    let numbered = |i: usize| config.replacen('{', &format!("{{\"revision\": \"{i}\","), 1).into_bytes();
    let mut published = vec![];
    let refused = loop {
        let name = format!("n{}", published.len());
        let (status, body) = server.put(&name, numbered(published.len()), weights.clone()).await;
        if status != 201 {
            break (status, body);
        }
        published.push(name);
        assert!(published.len() < 100, "the disk is never full");
    };
    let message = refused.1["error"]["message"].as_str().unwrap_or_default();
    assert!(refused.0 == 503 && message.contains("disk is full"), "{refused:?}");
    for name in published.iter().map(String::as_str).chain(["kept"]) {
        assert_eq!(says(&server, name).await.0, 200, "{name}");
    }
    assert_eq!(says(&server, &format!("n{}", published.len())).await.0, 404);
    // Room for one more, where one goes.
    let (status, body) = delete(&server, &published[0]).await;
    assert_eq!(status, 200, "{body}");
    let (status, body) = server.put("again", numbered(1000), weights).await;
    assert_eq!(status, 201, "{body}");
    server.kill();
    let server = Server::start_on(&base, &store, &[]).await;
    for name in published[1..].iter().map(String::as_str).chain(["kept", "again"]) {
        assert_eq!(says(&server, name).await.0, 200, "{name}");
    }
    server.left_nothing().await;
}

async fn delete(server: &Server, name: &str) -> (u16, Value) {
    crate::host::answer(server.http.delete(server.at(&format!("/v1/adapters/{name}")))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_nothing_more_fails_changes_and_nothing_else() {
    let tiny = fixtures().join("tiny/llama");
    let server = Server::start(&tiny.join("base").display().to_string(), &[]).await;
    assert_eq!(server.put_directory("kept", &tiny.join("adapter_qv_r4")).await.0, 201);
    let Some(names) = Mount::read_only(&server.store.join("names")) else { return };
    let incoming = Mount::read_only(&server.store.join("incoming")).unwrap();
    for outcome in [server.put_directory("new", &tiny.join("adapter_all_r8")).await, delete(&server, "kept").await] {
        let message = outcome.1["error"]["message"].as_str().unwrap_or_default();
        assert!(outcome.0 >= 500 && message.to_lowercase().contains("read-only"), "{outcome:?}");
    }
    // Where files can come in, but get no name.
    drop(incoming);
    let (status, body) = server.put_directory("new", &tiny.join("adapter_all_r8")).await;
    assert!(status >= 500 && body["error"]["message"].as_str().unwrap().contains("names"), "{status} {body}");
    assert_eq!((says(&server, "kept").await.0, says(&server, "new").await.0), (200, 404));
    drop(names);
    assert_eq!(server.put_directory("new", &tiny.join("adapter_all_r8")).await.0, 201);
    assert_eq!(delete(&server, "kept").await.0, 200);
    assert_eq!((says(&server, "kept").await.0, says(&server, "new").await.0), (404, 200));
    server.left_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_cut_short_under_the_server_fails_its_adapter_alone() {
    let tiny = fixtures().join("tiny/llama");
    let server = Server::start(&tiny.join("base").display().to_string(), &[]).await;
    let (_, broken) = server.put_directory("broken", &tiny.join("adapter_all_r8")).await;
    assert_eq!(server.put_directory("whole", &tiny.join("adapter_qv_r4")).await.0, 201);
    let weights =
        server.store.join("objects").join(broken["generation"].as_str().unwrap()).join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let asking = says(&server, "broken").await;
    assert_eq!(asking.0, 200);
    std::fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(bytes.len() as u64 / 2).unwrap();
    // In memory it is whole.
    assert_eq!(says(&server, "broken").await.1["text"], asking.1["text"]);
    assert_eq!(server.post("/v1/adapters/broken/unload", json!({})).await.0, 200);
    let (status, body) = says(&server, "broken").await;
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert!(status >= 400 && message.contains("broken"), "{status} {body}");
    assert_eq!(says(&server, "whole").await.0, 200);
    server.still_answers().await;
    std::fs::write(&weights, bytes).unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(says(&server, "broken").await.1["text"], asking.1["text"]);
}
