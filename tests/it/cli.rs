//! The program's commands, as a user types them.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::fixtures;
use crate::host::Server;

/// Runs `loramux`; its standard output, and whether it succeeded with its standard error.
fn loramux(arguments: &[&str], url: &str) -> (String, Result<(), String>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loramux"));
    let output = command.args(arguments).env("LORAMUX_URL", url).env("LORAMUX_LOG", "warn").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let failed = (!output.status.success()).then(|| text(&output.stderr));
    (text(&output.stdout), failed.map_or(Ok(()), Err))
}

fn succeeds(arguments: &[&str], url: &str) -> String {
    let (out, result) = loramux(arguments, url);
    assert_eq!(result, Ok(()), "{arguments:?}");
    out
}

fn fails(arguments: &[&str], url: &str) -> String {
    let (out, result) = loramux(arguments, url);
    result.expect_err(&format!("{arguments:?} succeeds: {out}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_shot_commands_answer_as_the_server_does() {
    let tiny = fixtures().join("tiny/llama");
    let (base, causal, head) = (tiny.join("base"), tiny.join("adapter_qv_r4"), tiny.join("adapter_seqcls"));
    let path = |p: &Path| p.display().to_string();
    let (base, causal, head) = (path(&base), path(&causal), path(&head));
    let server = Server::start(&base, &[]).await;
    assert!(server.put_directory("causal", Path::new(&causal)).await.0 == 201);
    assert!(server.put_directory("head", Path::new(&head)).await.0 == 201);
    let body = serde_json::json!({ "adapter": "causal", "prompt": "t5 t6 t7", "max_tokens": 6 });
    let (_, said) = server.post("/v1/generate", body).await;
    let generate = ["generate", "--model", &base, "--adapter", &causal, "--max-tokens", "6", "t5 t6 t7"];
    let out = succeeds(&generate, "");
    assert_eq!(out.trim_end_matches('\n'), said["text"].as_str().unwrap());
    assert!(!out.trim().is_empty());

    let body = serde_json::json!({ "adapter": "head", "input": ["t5 t6", "t9"] });
    let (_, said) = server.post("/v1/classify", body).await;
    let out = succeeds(&["classify", "--model", &base, "--adapter", &head, "t5 t6", "t9"], "");
    let lines: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (line, result) in lines.iter().zip(said["results"].as_array().unwrap()) {
        assert_eq!(line["label"], result["label"]);
    }
    let error = fails(&["classify", "--model", &base, "--adapter", &causal, "t5"], "");
    assert!(error.contains("no classification head"), "{error}");
    let error = fails(&["generate", "--model", &base, "--adapter", "none", "t5"], "");
    assert!(error.contains("none"), "{error}");
}

/// Options that are wrong stay wrong: who starts programs again need not do so after them.
#[test]
fn wrong_options_have_a_status_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("loramux.toml");
    std::fs::write(&config, "drain-time = 3\n").unwrap();
    let (config, model) = (config.display().to_string(), fixtures().join("tiny/llama/base").display().to_string());
    let status = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_loramux")).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let wrong: [&[&str]; 3] = [
        &["serve", "--drain-timeout", "x"],
        &["serve", "--config", &config],
        &["serve", "--model", &model, "--listen", "0.0.0.0:0"],
    ];
    for arguments in wrong {
        let (code, error) = status(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {error}");
    }
    let (code, error) = status(&["adapters", "list", "--url", "http://127.0.0.1:1"]);
    assert!(code == Some(1) && error.contains("onnection refused"), "{code:?} {error}");
}

/// As behind `| head`. But a key is nowhere else.
#[test]
fn what_is_no_longer_read_is_no_error() {
    let tiny = fixtures().join("tiny/llama");
    let (base, adapter) = (tiny.join("base").display().to_string(), tiny.join("adapter_qv_r4").display().to_string());
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.toml").display().to_string();
    let unread = |arguments: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_loramux"));
        let output = command.args(arguments).env("LORAMUX_LOG", "warn").stdout(writer).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let said_nothing = (Some(0), String::new());
    assert_eq!(unread(&["adapters", "verify", &adapter, "--model", &base]), said_nothing);
    assert_eq!(unread(&["generate", "--model", &base, "--max-tokens", "3", "t5"]), said_nothing);
    let (code, error) = unread(&["keys", "new", &keys, "ops", "--scopes", "infer"]);
    assert!(code == Some(1) && error.contains("its key is lost"), "{code:?} {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_from_the_shell() {
    let tiny = fixtures().join("tiny/llama");
    let (base, adapter) = (tiny.join("base").display().to_string(), tiny.join("adapter_qv_r4").display().to_string());
    let other = fixtures().join("smollm2/adapter_causal_r8").display().to_string();
    let server = Server::start(&base, &[]).await;
    let url = &server.url;
    let inspection: Value = serde_json::from_str(&succeeds(&["adapters", "inspect", &adapter], url)).unwrap();
    assert!(inspection.to_string().contains("q_proj"), "{inspection}");
    let out = succeeds(&["adapters", "verify", &adapter, "--model", &base], url);
    assert!(out.contains(&format!("{adapter} fits")), "{out}");
    let error = fails(&["adapters", "verify", &other, "--model", &base], url);
    assert!(error.contains("layer"), "{error}");

    let out = succeeds(&["adapters", "push", "mine", &adapter], url);
    let generation = out.trim().strip_prefix("mine ").unwrap();
    assert_eq!(server.get("/v1/adapters/mine").await.unwrap().1["generation"], generation);
    let error = fails(&["adapters", "push", "mine", &adapter, "--if-match", "0123"], url);
    assert!(error.contains("409") && error.contains(generation), "{error}");
    let list = succeeds(&["adapters", "list"], url);
    let rows: Vec<&str> = list.lines().collect();
    assert_eq!(rows.len(), 2, "{list}");
    assert!(rows[1].starts_with("mine ") && rows[1].contains(&generation[..12]), "{list}");
    // Columns of numbers end where their titles end.
    for title in ["RANK", "BYTES", "IN FLIGHT"] {
        let end = rows[0].find(title).unwrap() + title.len();
        let last = rows[1].as_bytes()[end - 1];
        assert!(last.is_ascii_digit() && rows[1].as_bytes().get(end).is_none_or(|b| *b == b' '), "{title}\n{list}");
    }
    // What would be cut off a URL is no name.
    let error = fails(&["adapters", "rm", "mine#v2"], url);
    assert!(error.contains("mine#v2"), "{error}");
    assert_eq!(server.get("/v1/adapters/mine").await.unwrap().0, 200);
    succeeds(&["adapters", "rm", "mine"], url);
    assert_eq!(server.get("/v1/adapters/mine").await.unwrap().0, 404);
    let error = fails(&["adapters", "rm", "mine"], url);
    assert!(error.contains("404"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_ask_a_server_and_an_engine_alike() {
    let tiny = fixtures().join("tiny/llama");
    let base = tiny.join("base").display().to_string();
    let folder = tempfile::tempdir().unwrap();
    for name in ["adapter_qv_r4", "adapter_all_r8"] {
        let to = folder.path().join(name);
        std::fs::create_dir(&to).unwrap();
        for file in std::fs::read_dir(tiny.join(name)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    let adapters = folder.path().display().to_string();
    let server = Server::start(&base, &["--adapters", &adapters]).await;
    let load = ["--json", "--clients", "3", "--requests", "2", "--prompt-tokens", "3", "--max-tokens", "4"];
    let served = [&["bench", "serve"][..], &load].concat();
    let alone = [&["bench", "engine", "--model", &base, "--adapters", &adapters][..], &load].concat();
    for command in [served, alone] {
        for (options, asked) in
            [(&[][..], 0), (&["--ask", "adapter_qv_r4"], 1), (&["--ask-all", "--spread", "zipf"], 2)]
        {
            let report = succeeds(&[&command[..], options].concat(), &server.url);
            let report: Value = serde_json::from_str(&report).unwrap();
            assert_eq!((&report["requests"], &report["generated_tokens"]), (&6.into(), &24.into()), "{report}");
            assert_eq!(report["adapters"], asked, "{report}");
            let quantiles = ["p50", "p95", "p99", "max"].map(|q| report["request_ms"][q].as_f64().unwrap());
            assert!(quantiles[0] > 0.0 && quantiles.is_sorted(), "{report}");
        }
        let error = fails(&[&command[..], &["--ask", "nobody"]].concat(), &server.url);
        assert!(error.contains("nobody"), "{error}");
    }
}
