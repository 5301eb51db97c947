//! `loramux bench methods` on the tiny model: what it reports follows from what it measured.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::common::fixtures;

fn bench(folder: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loramux"));
    command.args([
        "bench",
        "methods",
        "--held-out",
        "30",
        "--evaluations",
        "2",
        "--epochs",
        "2",
        "--seeds",
        "2",
        "--jobs",
        "2",
    ]);
    command.arg("--task").arg(format!("words={}", folder.join("words.csv").display()));
    if !more.contains(&"--out") {
        command.arg("--out").arg(folder.join("out"));
    }
    command.arg("--trainer").arg(env!("CARGO_BIN_EXE_loramux-train"));
    command.arg("--model").arg(fixtures().join("tiny/llama/base")).args(["--options", "last-layers=--layers 1"]);
    command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(folder: &Path, more: &[&str]) -> Result<(), String> {
    let output = bench(folder, more).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    (numbers[(numbers.len() - 1) / 2] + numbers[numbers.len() / 2]) / 2.0
}

fn near(found: &Value, expected: f64) {
    let found = number(found);
    assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1e-3), "{found} is not {expected}");
}

fn accuracy(evaluation: &Value) -> f64 {
    let confusion: Vec<Vec<f64>> = serde_json::from_value(evaluation["confusion"].clone()).unwrap();
    let right: f64 = (0..confusion.len()).map(|c| confusion[c][c]).sum();
    right / confusion.iter().flatten().sum::<f64>()
}

fn flops(run: &Value, tokens: f64) -> f64 {
    let m = |name: &str| number(&run["account"]["multiplied"][name]);
    match run["method"].as_str().unwrap() {
        "head" => 2.0 * m("forward") * number(&run["account"]["example_tokens"]),
        _ => 2.0 * (m("forward") + m("backward") + m("gradients")) * tokens,
    }
}

fn written(folder: &Path) -> Vec<(String, Vec<u8>)> {
    // Others are on their way to their names.
    let files = std::fs::read_dir(folder.join("out/runs")).unwrap().map(|file| file.unwrap());
    let files = files.filter(|file| file.path().extension().is_some_and(|e| e == "json"));
    let mut all: Vec<_> =
        files.map(|f| (f.file_name().to_string_lossy().into_owned(), std::fs::read(f.path()).unwrap())).collect();
    all.sort();
    all
}

#[test]
fn methods_are_measured_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let row = |i: usize| {
        let (first, label) = if i.is_multiple_of(2) { (10, "low") } else { (110, "high") };
        let words: Vec<String> = (0..8).map(|j| format!("t{}", first + (i * 7 + j * 3) % 8)).collect();
        format!("{},{label}\n", words.join(" "))
    };
    std::fs::write(folder.join("words.csv"), format!("text,label\n{}", (0..160).map(row).collect::<String>())).unwrap();

    // Interrupted, it keeps what is finished and leaves nothing else.
    let mut child = bench(folder, &["--sizes", "16,all"]).spawn().unwrap();
    let settings = folder.join("out/settings.json");
    while !settings.exists() || written(folder).is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended without a run");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap().success());
    assert!(!child.wait().unwrap().success(), "it was not stopped in time");
    let before = written(folder);
    assert!(!folder.join("out/report.json").exists());
    let hidden = std::fs::read_dir(folder.join("out")).unwrap().map(|f| f.unwrap().file_name());
    assert_eq!(hidden.filter(|name| name.to_string_lossy().starts_with('.')).count(), 0);

    run(folder, &["--sizes", "16,all"]).unwrap();
    let after = written(folder);
    assert_eq!(after.len(), 2 * 2 * 4);
    assert!(before.iter().all(|file| after.contains(file)), "a finished run was run again");
    let report: Value = serde_json::from_slice(&std::fs::read(folder.join("out/report.json")).unwrap()).unwrap();
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 16);
    assert!(runs.iter().all(|run| run["examples"] == if run["size"] == "all" { 130 } else { 16 }));

    // Each group is what its runs say.
    let groups = report["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 8);
    for group in groups {
        let own: Vec<&Value> =
            runs.iter().filter(|run| run["method"] == group["method"] && run["size"] == group["size"]).collect();
        assert_eq!(own.len(), 2);
        let of = |number: &dyn Fn(&Value) -> f64| median(own.iter().map(|run| number(run)).collect());
        let last = |run: &Value| run["account"]["evaluations"].as_array().unwrap().last().unwrap().clone();
        near(&group["accuracy"]["median"], of(&|run| accuracy(&last(run))));
        near(&group["train_seconds"]["median"], of(&|run| number(&run["account"]["seconds"])));
        near(&group["wall_seconds"]["median"], of(&|run| number(&run["wall_seconds"])));
        near(&group["flops"]["median"], of(&|run| flops(run, number(&run["account"]["tokens"]))));
        near(&group["weights_bytes"]["median"], of(&|run| number(&run["weights_bytes"])));
        near(&group["share"], number(&own[0]["account"]["trained"]) / number(&own[0]["account"]["parameters"]));
        let target = number(&group["target"]);
        let reached: Vec<f64> = own
            .iter()
            .filter_map(|run| {
                let evaluations = run["account"]["evaluations"].as_array().unwrap();
                evaluations.iter().find(|e| accuracy(e) >= target).map(|e| number(&e["seconds"]))
            })
            .collect();
        assert_eq!(group["reached"], reached.len());
        match reached.is_empty() {
            true => assert!(group["seconds_to_target"].is_null()),
            false => near(&group["seconds_to_target"]["median"], median(reached)),
        }
    }

    // Each ratio is that of two groups.
    let comparisons = report["comparisons"].as_array().unwrap();
    assert_eq!(comparisons.len(), 6);
    for c in comparisons {
        let find = |method: &Value| groups.iter().find(|g| g["size"] == c["size"] && g["method"] == *method).unwrap();
        let (group, full) = (find(&c["method"]), find(&"full".into()));
        for (ratio, of) in [
            ("train_seconds_ratio", "train_seconds"),
            ("cpu_seconds_ratio", "cpu_seconds"),
            ("flops_ratio", "flops"),
            ("peak_memory_ratio", "peak_memory_bytes"),
            ("weights_ratio", "weights_bytes"),
        ] {
            if !c[ratio].is_null() {
                near(&c[ratio], number(&group[of]["median"]) / number(&full[of]["median"]));
            }
        }
        near(&c["accuracy_difference"], number(&group["accuracy"]["median"]) - number(&full["accuracy"]["median"]));
        near(&c["trained_ratio"], number(&group["trained"]) / number(&full["trained"]));
        // Less is trained, less is computed, less is stored than of everything.
        assert!(number(&c["flops_ratio"]) < 1.0 && number(&c["trained_ratio"]) < 1.0);
        assert!(number(&c["weights_ratio"]) < if c["method"] == "last-layers" { 1.1 } else { 0.5 });
        let (a, b) = (&group["accuracy"], &full["accuracy"]);
        let said = match (number(&a["min"]) > number(&b["max"]), number(&b["min"]) > number(&a["max"])) {
            (true, _) => "method-more",
            (_, true) => "full-more",
            _ => "no-difference",
        };
        assert_eq!(c["accuracy"], said);
    }

    let markdown = std::fs::read_to_string(folder.join("out/report.md")).unwrap();
    assert!(markdown.contains("## Task words") && markdown.contains("| lora, 16 |"), "{markdown}");
    let html = std::fs::read_to_string(folder.join("out/report.html")).unwrap();
    assert_eq!(html.matches("<figure>").count(), 3);
    assert!(!html.contains("no points"), "a plot is empty");

    // More of the same is added; other settings are not mixed in.
    run(folder, &["--sizes", "8", "--methods", "last-layers,head"]).unwrap();
    assert_eq!(written(folder).len(), 20);
    let refused = run(folder, &["--sizes", "16", "--batch-size", "4"]).unwrap_err();
    assert!(refused.contains("other settings") && refused.contains("batch_size was 16 and is now 4"), "{refused}");
    // What the trainer says is not lost.
    let other = folder.join("other");
    let failed = run(folder, &["--sizes", "16", "--out", other.to_str().unwrap(), "--", "--no-such"]).unwrap_err();
    assert!(failed.contains("unexpected argument '--no-such'"), "{failed}");
}
