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
