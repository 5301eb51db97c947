//! What `loramux-train` writes, opened by the real transformers and PEFT: they must give the numbers that loramux gives
//! when it serves that, and those that the trainer found when it evaluated.

use std::path::Path;
use std::process::Command;

use loramux::base::simd::Simd;
use loramux::base::{Base, Kernels};
use loramux::engine::{Output as Want, Runner};
use serde_json::{Value, json};

use super::{Folder, history};
use crate::common::{adapter, decoder, fixtures, logits};

/// What loramux says to each prompt, serving `model` with or without an adapter.
fn served(model: &Path, adapter_folder: Option<&Path>, prompts: &[Vec<u32>], head: bool) -> Vec<Vec<f32>> {
    let base = Base::open(model.to_str().unwrap()).unwrap();
    let kernels = Kernels::Packed(Simd::detect());
    let adapter = adapter_folder.map(|folder| adapter(&base, folder, kernels));
    let mut runner = Runner::new(decoder(&base, kernels, None), 4 << 20).unwrap().with_head(base.head);
    let want = |prompt: &Vec<u32>| if head { Want::Head } else { Want::Logits(prompt.len()) };
    let all: Vec<_> = prompts.iter().map(|p| (p.as_slice(), adapter.clone(), want(p))).collect();
    logits(&mut runner, &all)
}

#[test]
fn peft_and_transformers_give_the_same_numbers() {
    let tiny = fixtures().join("tiny/llama");
    let (base_folder, pefts) = (tiny.join("base"), tiny.join("adapter_all_linear"));
    let base = Base::open(base_folder.to_str().unwrap()).unwrap();
    let end = base.config.eos_tokens[0];

    let folder = Folder::new();
    let data = folder.classified(48);
    let rows = std::fs::read_to_string(&data).unwrap();
    let (texts, classes): (Vec<&str>, Vec<&str>) = rows.lines().skip(1).map(|l| l.split_once(',').unwrap()).unzip();
    let classes: Vec<usize> = classes.iter().map(|&c| usize::from(c == "low")).collect();
    let headed: Vec<Vec<u32>> = texts.iter().map(|t| base.tokenizer.encode_for_head(t).unwrap()).collect();
    let ended: Vec<Vec<u32>> =
        texts.iter().map(|t| [base.tokenizer.encode(t, true).unwrap(), vec![end]].concat()).collect();
    // transformers finds the names of the special tokens, t1 and t2, also in longer words.
    let text = "t5 t60 t77";

    let lora = &["lora", "--learning-rate", "0.02"][..];
    let all_linear = &[lora, &["--target-modules", "all-linear", "--rslora", "--dropout", "0.1"]].concat()[..];
    // Saved by PEFT, trained further here, with another scale.
    let further =
        &["lora", "--learning-rate", "0.0001", "--target-modules", "all-linear", "--rank", "4", "--alpha", "16"];
    let further = &[&further[..], &["--init-adapter", pefts.to_str().unwrap()]].concat()[..];
    let dora = &["lora", "--learning-rate", "0.02", "--dora", "--target-modules", "all-linear"][..];
    let head = &["head", "--learning-rate", "0.02"][..];
    let full = &["full", "--learning-rate", "0.003"][..];
    let last = &["last-layers", "--layers", "1", "--learning-rate", "0.003"][..];
    let mut cases: Vec<Value> = Vec::new();
    for (name, method, task) in [
        ("lora-generate", all_linear, "generate"),
        ("lora-classify", lora, "classify"),
        ("dora-generate", dora, "generate"),
        ("head", head, "classify"),
        ("lora-further", further, "generate"),
        ("full-generate", full, "generate"),
        ("full-classify", full, "classify"),
        ("last-layers-generate", last, "generate"),
        ("last-layers-classify", last, "classify"),
    ] {
        let (classify, out) = (task == "classify", folder.path(name));
        let sequences = if classify { &headed } else { &ended };
        let more = ["--task", task, "--dtype", "f32", "--eval", data.to_str().unwrap()];
        folder.run(method, &data, name, &more);
        let adapter = ["lora", "head"].contains(&method[0]);
        let logits = match adapter {
            true => served(&base_folder, Some(&out), sequences, classify),
            false => served(&out, None, sequences, classify),
        };
        let history = history(&out);
        let best = &history["evaluations"][history["best"].as_u64().unwrap() as usize];
        cases.push(json!({
            "name": name,
            "directory": out,
            "adapter": adapter,
            "start": (method == further).then_some(&pefts),
            "labels": classify.then_some(["high", "low"]),
            "sequences": sequences,
            "logits": logits,
            "classes": classes,
            "loss": best["loss"],
            "confusion": best["confusion"],
            "text": text,
            "tokens": base.tokenizer.encode(text, true).unwrap(),
        }));
    }

    let file = folder.path("cases.json");
    std::fs::write(&file, json!({ "base": base_folder, "cases": cases }).to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft/round_trip.py");
    let mut python = Command::new(std::env::var("LORAMUX_TEST_PYTHON").unwrap_or_else(|_| "python3".into()));
    if let Ok(installed) = std::env::var("LORAMUX_TEST_PEFT") {
        python.env("PYTHONPATH", installed);
    }
    let output = python.arg(&script).arg(&file).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    eprintln!("{told}");
    assert!(output.status.success(), "{} (`make test` installs what it imports): {told}", script.display());
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), format!("ok {}", cases.len()));
}
