//! `loramux-train` from end to end on the tiny model: what it writes can be served, repeats, and survives being stopped.

mod round_trip;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use loramux::base::simd::Simd;
use loramux::base::{Base, Kernels};
use loramux::engine::{Output as Want, Runner};

use crate::common::{adapter, decoder, fixtures, logits};
use crate::host::Server;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Texts of eight words; the class says whether more of them are below `t100` than above.
    fn classified(&self, rows: usize) -> PathBuf {
        let mut csv = String::from("text,label\n");
        let mut state = 7u64;
        for row in 0..rows {
            let words: Vec<u64> = (0..8)
                .map(|i| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let low = (row % 2 == 0) == (i % 4 != 0);
                    10 + (state >> 33) % 8 + if low { 0 } else { 100 }
                })
                .collect();
            let text: Vec<String> = words.iter().map(|w| format!("t{w}")).collect();
            csv += &format!("{},{}\n", text.join(" "), if row % 2 == 0 { "low" } else { "high" });
        }
        let path = self.path("data.csv");
        std::fs::write(&path, csv).unwrap();
        path
    }

    fn command(&self, method: &[&str], data: &Path, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loramux-train"));
        command.args(method).arg("--data").arg(data).arg("--out").arg(self.path(out)).args(more);
        if method[0] != "pretrain" && !more.contains(&"--model") {
            command.arg("--model").arg(fixtures().join("tiny/llama/base"));
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, method: &[&str], data: &Path, out: &str, more: &[&str]) -> Output {
        let output = self.command(method, data, out, more).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn weights(&self, out: &str) -> Vec<u8> {
        std::fs::read(self.path(out).join("adapter_model.safetensors")).unwrap()
    }
}

const LORA: [&str; 9] =
    ["lora", "--task", "classify", "--learning-rate", "0.02", "--target-modules", "all-linear", "--dropout", "0.1"];

fn history(folder: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(folder.join("history.json")).unwrap()).unwrap()
}

fn accuracy(folder: &Path) -> f64 {
    let history = history(folder);
    let best = &history["evaluations"][history["best"].as_u64().unwrap() as usize];
    let confusion: Vec<Vec<f64>> = serde_json::from_value(best["confusion"].clone()).unwrap();
    let right: f64 = (0..confusion.len()).map(|c| confusion[c][c]).sum();
    right / confusion.iter().flatten().sum::<f64>()
}

/// The share of rows that a served adapter gets right.
fn served_accuracy(adapter_folder: &Path, data: &Path) -> f64 {
    let base = Base::open(fixtures().join("tiny/llama/base").to_str().unwrap()).unwrap();
    let kernels = Kernels::Packed(Simd::detect());
    let adapter = adapter(&base, adapter_folder, kernels);
    let labels = adapter.labels.clone().unwrap();
    let mut runner = Runner::new(decoder(&base, kernels, None), 4 << 20).unwrap();
    let text = std::fs::read_to_string(data).unwrap();
    let rows: Vec<(&str, &str)> = text.lines().skip(1).map(|l| l.split_once(',').unwrap()).collect();
    let right = rows.iter().filter(|(text, label)| {
        let tokens = base.tokenizer.encode_for_head(text).unwrap();
        let got = &logits(&mut runner, &[(&tokens, Some(adapter.clone()), Want::Head)])[0];
        let best = if got[1] > got[0] { 1 } else { 0 };
        labels[best] == *label
    });
    right.count() as f64 / rows.len() as f64
}

#[test]
fn an_adapter_learns_repeats_and_is_served() {
    let folder = Folder::new();
    let data = folder.classified(240);
    for out in ["a", "b"] {
        let output = folder.run(&LORA, &data, out, &["--seed", "3", "--dtype", "f32"]);
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), folder.path(out).to_str().unwrap());
    }
    assert_eq!(folder.weights("a"), folder.weights("b"), "the same seed and data, another adapter");
    let learned = accuracy(&folder.path("a"));
    assert!(learned >= 0.9, "accuracy {learned}");
    let served = served_accuracy(&folder.path("a"), &data);
    assert!(served >= 0.9, "accuracy when served {served}");
    let card = std::fs::read_to_string(folder.path("a").join("README.md")).unwrap();
    assert!(
        card.contains("| true \\ answered | high | low |")
            && card.contains("240")
            && card.contains("library_name: peft")
    );
    assert!(std::fs::read_to_string(folder.path("a").join("curves.svg")).unwrap().contains("<svg"));
    // It is not replaced unasked, and another seed is another adapter.
    let again = folder.command(&LORA, &data, "a", &[]).output().unwrap();
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("--overwrite"));
    folder.run(&LORA, &data, "a", &["--overwrite", "--seed", "4", "--dtype", "f32"]);
    assert_ne!(folder.weights("a"), folder.weights("b"));
}

/// Interrupted and killed in the middle, a run ends with the same numbers as one that was left alone.
#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    let folder = Folder::new();
    let data = folder.classified(320);
    let more = ["--checkpoint-every", "1", "--epochs", "24", "--eval-every", "50"];
    folder.run(&LORA, &data, "whole", &more);
    let checkpoint = folder.path("parts.checkpoint.safetensors");
    for (round, signal) in ["INT", "TERM", "KILL"].iter().enumerate() {
        let resume: &[&str] = if round > 0 { &["--resume"] } else { &[] };
        let mut child = folder.command(&LORA, &data, "parts", &[&more[..], resume].concat()).spawn().unwrap();
        let before = std::fs::metadata(&checkpoint).and_then(|m| m.modified()).ok();
        while std::fs::metadata(&checkpoint).and_then(|m| m.modified()).ok() == before {
            assert!(child.try_wait().unwrap().is_none(), "it has ended without a checkpoint");
            std::thread::sleep(Duration::from_millis(2));
        }
        let killed = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success(), "it was not stopped in time");
        assert!(checkpoint.exists() && !folder.path("parts").exists());
    }
    // Another run does not take it over by mistake.
    let forgotten = folder.command(&LORA, &data, "parts", &more).output().unwrap();
    assert!(String::from_utf8_lossy(&forgotten.stderr).contains("--resume"));
    let other =
        folder.command(&LORA, &data, "parts", &[&more[..], &["--resume", "--seed", "9"]].concat()).output().unwrap();
    assert!(String::from_utf8_lossy(&other.stderr).contains("other settings or data"));
    folder.run(&LORA, &data, "parts", &[&more[..], &["--resume"]].concat());
    assert_eq!(folder.weights("parts"), folder.weights("whole"));
    assert_eq!(history(&folder.path("parts"))["losses"], history(&folder.path("whole"))["losses"]);
    assert!(!checkpoint.exists());
}

#[test]
fn the_other_methods_write_what_can_be_opened() {
    let folder = Folder::new();
    let data = folder.classified(240);
    folder.run(&["head", "--task", "classify", "--learning-rate", "0.05"], &data, "head", &["--epochs", "10"]);
    let (learned, served) = (accuracy(&folder.path("head")), served_accuracy(&folder.path("head"), &data));
    assert!(learned >= 0.75 && (learned - served).abs() < 0.2, "{learned}, served {served}");
    let base = Base::open(fixtures().join("tiny/llama/base").to_str().unwrap()).unwrap();
    for (method, out) in [(&["full"][..], "full"), (&["last-layers", "--layers", "1"], "last")] {
        let method = [method, &["--task", "classify", "--learning-rate", "0.003"]].concat();
        folder.run(&method, &data, out, &["--dtype", "f32"]);
        assert!(accuracy(&folder.path(out)) >= 0.85, "{out}: {}", accuracy(&folder.path(out)));
        let model = Base::open(folder.path(out).to_str().unwrap()).unwrap();
        assert_eq!(model.tokenizer.encode_for_head("t5 t6").unwrap(), base.tokenizer.encode_for_head("t5 t6").unwrap());
        assert!(model.weights.contains("score.weight"));
    }
    // What is not trained is as it was.
    let last = Base::open(folder.path("last").to_str().unwrap()).unwrap();
    let numbers = |base: &Base, name: &str| base.weights.get(name).unwrap().to_f32().unwrap();
    let name = |layer: usize| format!("model.layers.{layer}.mlp.up_proj.weight");
    assert_eq!(numbers(&base, &name(0)), numbers(&last, &name(0)));
    assert_ne!(numbers(&base, &name(1)), numbers(&last, &name(1)));
}

#[test]
fn texts_are_learned_and_an_adapter_trained_further() {
    let folder = Folder::new();
    let data = folder.path("texts.jsonl");
    let line = |i: usize| {
        format!(
            "{{\"text\": \"{}\"}}\n",
            (0..12).map(|j| format!("t{}", 20 + (i + j) % 9)).collect::<Vec<_>>().join(" ")
        )
    };
    std::fs::write(&data, (0..60).map(line).collect::<String>()).unwrap();
    let generate = ["lora", "--task", "generate", "--learning-rate", "0.02", "--target-modules", "all-linear"];
    folder.run(&generate, &data, "one", &["--epochs", "4"]);
    let first = history(&folder.path("one"));
    let losses: Vec<f64> = serde_json::from_value(first["losses"].clone()).unwrap();
    assert!(losses[losses.len() - 1] < 0.6 * losses[0], "{losses:?}");
    let init = folder.path("one");
    folder.run(&generate, &data, "two", &["--epochs", "1", "--warmup", "0", "--init-adapter", init.to_str().unwrap()]);
    let second: Vec<f64> = serde_json::from_value(history(&folder.path("two"))["losses"].clone()).unwrap();
    assert!(second[0] < 0.7 * losses[0], "it began anew: {second:?}");
    // The second step of the recipe: a classification on top of what was learned from texts.
    let classified = folder.classified(240);
    folder.run(&LORA, &classified, "three", &["--init-adapter", init.to_str().unwrap()]);
    assert!(accuracy(&folder.path("three")) >= 0.9);
}

/// What `loramux generate` says, greedily.
fn generated(model: &Path, adapter: Option<&Path>, prompt: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loramux"));
    command.args(["generate", "--max-tokens", "40", prompt, "--model"]).arg(model);
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end_matches('\n').to_string()
}

#[test]
fn a_model_from_nothing_repeats_is_served_and_takes_an_adapter() {
    let folder = Folder::new();
    let rhyme = "One two, buckle my shoe; three four, knock at the door.";
    let data = folder.path("rhymes.jsonl");
    // Of such a row nothing but its text is read.
    let row = serde_json::json!({ "text": rhyme, "prompt": "", "completion": "", "messages": [] });
    std::fs::write(&data, format!("{row}\n").repeat(40)).unwrap();
    let shape =
        ["pretrain", "--layers", "2", "--hidden-size", "48", "--heads", "4", "--kv-heads", "2", "--context", "64"];
    let more = ["--vocab-size", "280", "--epochs", "30", "--learning-rate", "0.01", "--seed", "5", "--dtype", "f32"];
    for out in ["a", "b"] {
        folder.run(&shape, &data, out, &more);
    }
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"] {
        let read = |out: &str| std::fs::read(folder.path(out).join(file)).unwrap();
        assert_eq!(read("a"), read("b"), "{file}: the same seed and data, another model");
    }
    let model = folder.path("a");
    let base = Base::open(model.to_str().unwrap()).unwrap();
    let c = &base.config;
    assert_eq!((c.layers, c.heads, c.kv_heads, c.context, c.vocab_size), (2, 4, 2, 64, 280));
    let history = history(&model);
    let losses: Vec<f64> = serde_json::from_value(history["losses"].clone()).unwrap();
    let uniform = (c.vocab_size as f64).ln();
    // A fresh model knows nothing; this one knows the rhyme, also where it was held out.
    assert!((losses[0] - uniform).abs() < 0.1 * uniform, "{} is not {uniform}", losses[0]);
    let held_out = history["evaluations"][history["best"].as_u64().unwrap() as usize]["loss"].as_f64().unwrap();
    assert!(held_out < 0.1 * uniform, "{held_out} of {uniform}");
    // The server begins and ends texts as the trainer did.
    let tokens = base.tokenizer.encode(rhyme, true).unwrap();
    assert_eq!((Some(tokens[0]), c.eos_tokens.len()), (c.bos_token, 1));
    assert_eq!(generated(&model, None, "One two,"), rhyme.strip_prefix("One two,").unwrap());
    let card = std::fs::read_to_string(model.join("README.md")).unwrap();
    assert!(card.contains("from nothing") && card.contains("perplexity") && card.contains("context 64"), "{card}");

    let other = "One two, knock at the door; three four, buckle my shoe.";
    let texts = folder.path("texts.jsonl");
    std::fs::write(&texts, format!("{}\n", serde_json::json!({ "text": other })).repeat(40)).unwrap();
    let lora = ["lora", "--task", "generate", "--target-modules", "all-linear", "--learning-rate", "0.02"];
    folder.run(&lora, &texts, "adapter", &["--model", model.to_str().unwrap(), "--epochs", "20"]);
    assert_eq!(generated(&model, Some(&folder.path("adapter")), "One two,"), other.strip_prefix("One two,").unwrap());
}

/// Interrupted, a model from nothing goes on with the tokenizer that it had.
#[test]
fn a_stopped_pretraining_goes_on() {
    let folder = Folder::new();
    let data = folder.path("text.txt");
    std::fs::write(&data, "the cat and the hat sat on the mat. ".repeat(400)).unwrap();
    let shape = ["pretrain", "--layers", "1", "--hidden-size", "16", "--heads", "2", "--context", "32"];
    let more = ["--vocab-size", "270", "--epochs", "24", "--checkpoint-every", "1", "--dtype", "f32"];
    folder.run(&shape, &data, "whole", &more);
    let checkpoint = folder.path("parts.checkpoint.safetensors");
    let mut child = folder.command(&shape, &data, "parts", &more).spawn().unwrap();
    while !checkpoint.exists() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended without a checkpoint");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it was not stopped in time");
    let resumed = [&more[..], &["--resume"]].concat();
    let other = [&shape[..], &["--kv-heads", "1"]].concat();
    let told = folder.command(&other, &data, "parts", &resumed).output().unwrap();
    let told = String::from_utf8_lossy(&told.stderr);
    assert!(told.contains("other settings or data") && told.contains("1 of keys and values"), "{told}");
    folder.run(&shape, &data, "parts", &resumed);
    let numbers = |out: &str| std::fs::read(folder.path(out).join("model.safetensors")).unwrap();
    assert_eq!(numbers("parts"), numbers("whole"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_adapter_is_pushed_or_says_how() {
    let folder = Folder::new();
    let data = folder.classified(40);
    let base = fixtures().join("tiny/llama/base").display().to_string();
    let server = Server::start(&base, &[]).await;
    let quick = |out: &str, more: &[&str]| {
        let lora = ["lora", "--task", "classify", "--epochs", "1"];
        folder.command(&lora, &data, out, more).output().unwrap()
    };
    for (out, name, more) in [("mine", "mine", &[][..]), ("other", "a.name", &["--push-name", "a.name"])] {
        let output = quick(out, &[&["--push", &server.url], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let (status, info) = server.get(&format!("/v1/adapters/{name}")).await.unwrap();
        let generation = loramux::adapter::generation_of(&folder.path(out)).unwrap();
        assert_eq!((status, info["generation"].as_str()), (200, Some(generation.as_str())), "{info}");
        let body = serde_json::json!({ "adapter": name, "input": "t11 t12" });
        let (status, answer) = server.post("/v1/classify", body).await;
        assert!(
            status == 200 && ["low", "high"].map(Some).contains(&answer["results"][0]["label"].as_str()),
            "{answer}"
        );
    }

    // What goes wrong in the end leaves the adapter, and says how to go on.
    let strict = Server::start(&base, &["--max-upload", "1KiB"]).await;
    let (away, small) = (server.url.clone(), strict.url.clone());
    server.kill();
    for (out, url, word) in [("away", &away, "no answer"), ("large", &small, "413")] {
        let output = quick(out, &["--push", url]);
        let (told, path) = (String::from_utf8_lossy(&output.stderr), folder.path(out).display().to_string());
        assert!(!output.status.success() && told.contains(word), "{told}");
        assert!(told.contains(&format!("loramux adapters push {out} {path} --url {url}")), "{told}");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), path);
        assert!(folder.path(out).join("adapter_model.safetensors").exists());
    }

    // What cannot go right is told before anything is trained.
    let (pretrain, full) = (&["pretrain"][..], &["full", "--task", "classify"][..]);
    let last = &["last-layers", "--task", "classify"][..];
    for (method, more, word) in [
        (pretrain, &["--push", &away][..], "makes a model"),
        (full, &["--push", &away], "makes a model"),
        (last, &["--push", &away], "makes a model"),
        (&LORA, &["--push", "localhost:8080"], "http://HOST:PORT"),
        (&LORA, &["--push", &away, "--push-name", "a b"], "--push-name"),
        (&LORA, &["--push-name", "name"], "--push <URL>"),
    ] {
        let output = folder.command(method, &data, "none", more).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains(word), "{method:?} {more:?}: {told}");
        assert!(!folder.path("none").exists());
    }
}

#[test]
fn bad_data_is_told_with_file_and_row() {
    let folder = Folder::new();
    for (content, parts) in [
        (&b"text,label\nt1,a\nt2,a\n"[..], &["class \"a\"", "two classes"][..]),
        (b"text,label\nt1,a\n ,b\n", &["data.csv, row 2", "--skip-empty"]),
        (b"words,label\nt1,a\nt2,b\n", &["\"words\"", "--text-column"]),
        (b"text,label\nt1 \xff,a\nt2,b\n", &["line 2", "not UTF-8"]),
    ] {
        let data = folder.path("data.csv");
        std::fs::write(&data, content).unwrap();
        let output = folder.command(&LORA, &data, "out", &[]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && parts.iter().all(|p| told.contains(p)), "{told}");
        assert!(!folder.path("out").exists());
    }
    // A row of 100,000 characters is cut, and told.
    let data = folder.classified(40);
    let long = format!("{}{},low\n", std::fs::read_to_string(&data).unwrap(), "t5 ".repeat(34_000));
    std::fs::write(&data, long).unwrap();
    let output = folder.run(&LORA, &data, "out", &["--epochs", "1", "--max-length", "64"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 texts were cut to 64 tokens"));
}

/// A fully fine-tuned classification is served as one; adapters without a head use its own, those with one theirs.
#[tokio::test(flavor = "multi_thread")]
async fn a_classification_is_served() {
    let folder = Folder::new();
    let data = folder.classified(48);
    let more = ["--task", "classify", "--eval", data.to_str().unwrap()];
    folder.run(&["full", "--learning-rate", "0.003"], &data, "full", &more);
    let model = folder.path("full");
    let adapters = fixtures().join("tiny/llama");
    let server = Server::start(model.to_str().unwrap(), &["--adapters", adapters.to_str().unwrap()]).await;
    let rows = std::fs::read_to_string(&data).unwrap();
    let (texts, classes): (Vec<&str>, Vec<&str>) = rows.lines().skip(1).map(|l| l.split_once(',').unwrap()).unzip();
    let (status, answer) = server.post("/v1/classify", serde_json::json!({ "input": texts })).await;
    assert_eq!(status, 200, "{answer}");
    let results = answer["results"].as_array().unwrap();
    let right = results.iter().zip(&classes).filter(|(result, class)| result["label"] == **class).count();
    // What the trainer found on the same texts.
    let history = history(&model);
    let best = &history["evaluations"][history["best"].as_u64().unwrap() as usize];
    let confusion: Vec<Vec<usize>> = serde_json::from_value(best["confusion"].clone()).unwrap();
    assert_eq!(right, confusion[0][0] + confusion[1][1]);
    assert!(right > 40, "{right} of 48");

    for (adapter, labels) in [("adapter_qv_r4", ["high", "low"].as_slice()), ("adapter_seqcls", &[])] {
        let ask = serde_json::json!({ "input": texts[0], "adapter": adapter });
        let (status, answer) = server.post("/v1/classify", ask).await;
        assert_eq!(status, 200, "{answer}");
        let scores = answer["results"][0]["scores"].as_object().unwrap();
        assert!(labels.iter().all(|label| scores.contains_key(*label)));
        assert_eq!(scores.contains_key("high"), !labels.is_empty());
        assert_ne!(answer["results"][0]["scores"], results[0]["scores"]);
    }
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_loramux"))
        .args(["classify", "--model", model.to_str().unwrap(), texts[0]])
        .output()
        .unwrap();
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["label"], results[0]["label"]);
}
