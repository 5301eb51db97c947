//! The real clients against a real server with the real model.

use std::path::Path;
use std::process::Command;

use loramux::base::DEFAULT_MODEL;

use crate::common::fixtures;
use crate::host::Server;

fn run(script: &str, arguments: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script);
    let python = std::env::var("LORAMUX_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let output = Command::new(python).arg(&script).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} (`make test` installs what it imports): {text}", script.display());
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn real_clients() {
    let adapters = tempfile::tempdir().unwrap();
    for (from, name) in [("adapter_causal_r16", "fairy"), ("adapter_causal_r8", "plain")] {
        std::os::unix::fs::symlink(fixtures().join("smollm2").join(from), adapters.path().join(name)).unwrap();
    }
    let folder = adapters.path().to_str().unwrap();
    let server = Server::start(DEFAULT_MODEL, &["--adapters", folder, "--allow-local-paths"]).await;
    let (r8, r16) = (fixtures().join("smollm2/adapter_causal_r8"), fixtures().join("smollm2/adapter_causal_r16"));
    let prometheus = std::env::var("LORAMUX_TEST_PROMETHEUS").unwrap_or_else(|_| "prometheus".into());
    tokio::task::block_in_place(|| {
        run("openai_client.py", &[&server.url, "fairy"]);
        run("lorax_client.py", &[&server.url, "fairy"]);
        run("tgi_client.py", &[&server.url]);
        run("vllm_calls.py", &[&server.url, r8.to_str().unwrap(), r16.to_str().unwrap()]);
        run("metrics.py", &[&server.url, "fairy", &prometheus]);
    });
}

/// Whatever the OpenAPI document allows, and much that it does not, is answered without a failure of the server.
#[tokio::test(flavor = "multi_thread")]
async fn no_request_of_the_document_breaks_the_server() {
    let adapters = tempfile::tempdir().unwrap();
    let tiny = fixtures().join("tiny/llama");
    std::os::unix::fs::symlink(tiny.join("adapter_qv_r4"), adapters.path().join("a")).unwrap();
    let base = tiny.join("base").display().to_string();
    let server = Server::start(&base, &["--adapters", adapters.path().to_str().unwrap()]).await;
    let python = std::env::var("LORAMUX_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let output = Command::new(python)
        .args(["-m", "schemathesis.cli", "run", &server.at("/openapi.json"), "--checks", "not_a_server_error"])
        .args(["--max-examples", "12", "--seed", "1", "--no-color", "--phases", "coverage,fuzzing"])
        .current_dir(adapters.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    // Every operation was tried.
    assert!(text.contains("Test cases:") && text.contains("Selected: "), "{text}");
    server.still_answers().await;
}
