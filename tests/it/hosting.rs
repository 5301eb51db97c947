//! `loramux bench hosting`, with models that are small enough to host a few of.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::fixtures;

/// Runs it on three tasks of two adapters; what it wrote as JSON, or its error.
fn measure(out: &Path, more: &[&str]) -> Result<Value, String> {
    let tiny = fixtures().join("tiny/llama");
    let adapters = out.join("adapters");
    for name in ["adapter_qv_r4", "adapter_seqcls"] {
        fs::create_dir_all(adapters.join(name)).unwrap();
        for file in fs::read_dir(tiny.join(name)).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), adapters.join(name).join(file.file_name())).unwrap();
        }
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_loramux"));
    command.args(["bench", "hosting", "--tasks", "1,3", "--seconds", "0.4", "--repetitions", "2", "--clients", "3"]);
    command.args(["--prompt-words", "6", "--max-tokens", "4", "--memory-budget", "1GiB", "--budget-tasks", "3"]);
    command.args(["--rates", "20,40", "--model"]).arg(tiny.join("base")).arg("--adapters").arg(adapters);
    let output = command.arg("--out").arg(out.join("out")).args(more).env("LORAMUX_LOG", "warn").output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&fs::read(out.join("out/report.json")).unwrap()).unwrap())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * a.abs().max(b.abs()), "{a} {b}");
}

/// The middle one of two is their mean.
fn mean(cells: &[&Value], of: impl Fn(&Value) -> f64) -> f64 {
    cells.iter().map(|c| of(c)).sum::<f64>() / cells.len() as f64
}

#[test]
fn hosting_is_measured_and_adds_up() {
    let folder = tempfile::tempdir().unwrap();
    let report = measure(folder.path(), &[]).unwrap();
    let cells: Vec<&Value> = report["cells"].as_array().unwrap().iter().collect();
    assert_eq!(cells.len(), 2 * 2 * 2);
    for cell in &cells {
        let (fleet, tasks) = (&cell["fleet"], number(&cell["tasks"]));
        assert_eq!(number(&cell["processes"]), if fleet == "copies" { tasks } else { 1.0 });
        // Of one task there is one popularity, of three there are two; two rates each.
        assert_eq!(cell["open"].as_array().unwrap().len(), if tasks == 1.0 { 2 } else { 4 });
        let open = cell["open"].as_array().unwrap().iter().map(|o| &o["load"]);
        for sample in open.chain([&cell["saturated"]]).flat_map(|l| l["samples"].as_array().unwrap()) {
            assert!(sample.get("error").is_none(), "{sample}");
            assert!(number(&sample["task"]) < tasks && number(&sample["prompt_tokens"]) > 0.0, "{sample}");
            let (late, first, whole) = (number(&sample["late"]), number(&sample["first"]), number(&sample["whole"]));
            assert!(late <= first && first <= whole, "{sample}");
            let generates = sample["work"] == "generate";
            assert_eq!(generates, number(&sample["task"]) % 2.0 == 0.0, "{sample}");
            assert!(if generates { number(&sample["generated"]) >= 2.0 } else { sample["generated"] == 0 }, "{sample}");
        }
    }
    let findings = &report["findings"];
    let prices = &report["prices"];
    for tasks in [1.0, 3.0] {
        let of = |fleet: &str| -> (Vec<&Value>, &Value) {
            let is = |c: &Value| c["fleet"] == fleet && number(&c["tasks"]) == tasks;
            let cells = cells.iter().copied().filter(|c| is(c)).collect();
            (cells, findings["rows"].as_array().unwrap().iter().find(|r| is(r)).unwrap())
        };
        let ratio = findings["ratios"].as_array().unwrap().iter().find(|r| number(&r["tasks"]) == tasks).unwrap();
        let mut months = vec![];
        for (cells, row) in ["shared", "copies"].map(of) {
            let tokens = |cell: &Value| {
                let window = number(&cell["saturated"]["seconds"]);
                let samples = cell["saturated"]["samples"].as_array().unwrap();
                let share = |s: &Value| ((window * 1e3 - number(&s["at"])) / number(&s["whole"])).clamp(0.0, 1.0);
                let tokens = |s: &Value| number(&s["prompt_tokens"]) + number(&s["generated"]);
                samples.iter().map(|s| tokens(s) * share(s)).sum::<f64>() / window
            };
            let rate = mean(&cells, tokens);
            assert!(rate > 0.0);
            close(number(&row["tokens_per_second"]["median"]), rate);
            close(number(&row["million_tokens"]), number(&prices["machine"]["hour"]) / 3600.0 / rate * 1e6);
            let memory = mean(&cells, |c| number(&c["loaded"]["pss"]));
            close(number(&row["loaded_bytes"]["median"]), memory);
            assert!(cells.iter().all(|c| number(&c["kv_free"]) > 0.0 && c["origin"] == cells[0]["origin"]));
            let full = mean(&cells, |c| number(&c["loaded"]["pss"]) + number(&c["kv_free"]));
            close(number(&row["full_bytes"]["median"]), full);
            let share = memory / (number(&prices["machine"]["memory_gib"]) * 1024f64.powi(3));
            let machine = share * number(&prices["machine"]["hour"]) * number(&prices["hours_per_month"]);
            let disk = number(&cells[0]["disk"]) / 1e9 * number(&prices["disk_gb_month"]);
            close(number(&row["task_month"]), (machine + disk) / tasks);
            months.push((memory, (machine + disk) / tasks));
        }
        close(number(&ratio["memory"]), months[1].0 / months[0].0);
        close(number(&ratio["task_month"]), months[1].1 / months[0].1);
    }
    // Three full models take more than one; a base with three adapters takes less than three full models.
    let ratio = &findings["ratios"][1];
    assert!(number(&ratio["memory"]) > 1.5 && number(&ratio["disk"]) > 1.0, "{ratio}");
    // What a process takes beside its weights is what these, as the server tells, leave of its memory; and a driver, by
    // assumption.
    let shared = findings["rows"].as_array().unwrap().iter().filter(|r| r["fleet"] == "shared");
    let beside = shared.map(|r| number(&r["idle_bytes"]["median"]) - number(&r["weights_bytes"]["median"]));
    let beside = beside.fold(f64::INFINITY, f64::min);
    assert!(beside > 0.0, "{beside}");
    close(number(&findings["assumptions"]["overhead"]), beside + 0.5e9);
    for budget in report["budgets"].as_array().unwrap() {
        assert_eq!((budget["end"].as_str(), budget["tried"].as_array().unwrap().len()), (Some("tried"), 3), "{budget}");
    }
    let html = fs::read_to_string(folder.path().join("out/report.html")).unwrap();
    assert!(html.matches("<svg").count() >= 4 && !html.contains("http-equiv") && !html.contains("src="), "{html}");
    let markdown = fs::read_to_string(folder.path().join("out/report.md")).unwrap();
    assert!(markdown.contains("Extrapolated") && markdown.contains("extrapolated by the line"), "{markdown}");
    assert!(!folder.path().join("out/work").exists());

    // Nothing is measured again.

    let again = measure(folder.path(), &[]).unwrap();
    assert_eq!((&again["cells"], &again["budgets"]), (&report["cells"], &report["budgets"]));
    let refused = measure(folder.path(), &["--seed", "5"]).unwrap_err();
    assert!(refused.contains("seed: 0 there, 5 asked for"), "{refused}");
}
