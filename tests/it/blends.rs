//! Blends of adapters over HTTP, against PEFT's `add_weighted_adapter`.

use std::process::Command;

use loramux::base::Base;
use serde_json::{Value, json};

use crate::common::fixtures;
use crate::host::Server;

const PROMPT: &str = "t5 t60 t77 t9 t120 t33";
/// Two of rank 8, one of rank 4 on q and v alone, one of rank 4 on some projections of some layers.
const ADAPTERS: [&str; 4] = ["all_r8", "rslora_r8", "qv_r4", "all_linear"];

/// Merges by LoRAX's names and PEFT's. DARE is random but where nothing is dropped.
fn cases() -> Vec<Value> {
    let case = |adapters: [&str; 2], weights: [f64; 2], merge: &str, density: Option<f64>, election: Option<&str>| {
        json!({ "adapters": adapters, "weights": weights, "combination_type": merge, "density": density,
            "majority_sign_method": election })
    };
    let (same, few) = (["all_r8", "rslora_r8"], ["qv_r4", "all_linear"]);
    vec![
        case(same, [0.7, 0.4], "linear", None, None),
        case(same, [1.0, -0.6], "linear", None, None),
        case(few, [0.5, 1.5], "linear", None, None),
        case(same, [0.7, 0.4], "ties", Some(0.4), None),
        case(same, [0.7, 0.4], "ties", Some(0.7), Some("frequency")),
        case(few, [1.0, 1.0], "ties", Some(0.5), Some("total")),
        case(same, [0.7, 0.4], "magnitude_prune", Some(0.3), None),
        case(same, [0.7, 0.4], "dare_linear", Some(1.0), None),
        case(same, [0.7, 0.4], "dare_ties", Some(1.0), None),
        case(["qv_r4", "all_r8"], [0.7, -0.4], "cat", None, None),
    ]
}

/// What PEFT says follows the prompt, for each case.
fn by_peft(base: &Base, cases: &[Value]) -> Vec<Vec<f32>> {
    let tiny = fixtures().join("tiny/llama");
    let adapters: serde_json::Map<String, Value> =
        ADAPTERS.iter().map(|name| (name.to_string(), json!(tiny.join(format!("adapter_{name}"))))).collect();
    let prompt = base.tokenizer.encode(PROMPT, true).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cases.json");
    let asked = json!({ "base": tiny.join("base"), "adapters": adapters, "cases": cases, "prompt": prompt });
    std::fs::write(&file, asked.to_string()).unwrap();
    let mut python = Command::new(std::env::var("LORAMUX_TEST_PYTHON").unwrap_or_else(|_| "python3".into()));
    if let Ok(installed) = std::env::var("LORAMUX_TEST_PEFT") {
        python.env("PYTHONPATH", installed);
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peft/blends.py");
    let output = python.arg(script).arg(&file).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} (`make test` installs what it imports): {told}");
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn server() -> Server {
    let tiny = fixtures().join("tiny/llama");
    Server::start(tiny.join("base").to_str().unwrap(), &["--adapters", tiny.to_str().unwrap()]).await
}

/// The answer to the prompt with the likeliest tokens that may follow.
async fn ask(server: &Server, more: Value) -> Value {
    let mut body = json!({ "prompt": PROMPT, "max_tokens": 1, "logprobs": 20 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let (status, answer) = server.post("/v1/generate", body).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

/// Tokens and their log-probabilities.
fn likeliest(base: &Base, answer: &Value) -> Vec<(u32, f32)> {
    let top = answer["logprobs"][0]["top_logprobs"].as_array().unwrap().iter();
    let one = |t: &Value| {
        (base.tokenizer.encode(t["token"].as_str().unwrap(), false).unwrap()[0], t["logprob"].as_f64().unwrap() as f32)
    };
    top.map(one).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn are_those_of_peft() {
    let tiny = fixtures().join("tiny/llama");
    let base = Base::open(tiny.join("base").to_str().unwrap()).unwrap();
    let cases = cases();
    let by_peft = by_peft(&base, &cases);
    let server = server().await;
    let alone = likeliest(&base, &ask(&server, json!({})).await);
    for (case, want) in cases.iter().zip(&by_peft) {
        let names: Vec<String> =
            case["adapters"].as_array().unwrap().iter().map(|a| format!("adapter_{}", a.as_str().unwrap())).collect();
        let merged = json!({ "ids": names, "weights": case["weights"], "merge_strategy": case["combination_type"],
            "density": case["density"].as_f64().unwrap_or(0.0), "majority_sign_method": case["majority_sign_method"] });
        let mut ways = vec![json!({ "merged_adapters": merged })];
        if case["combination_type"] == "cat" {
            let parts = names.iter().zip(case["weights"].as_array().unwrap());
            let parts: Vec<Value> = parts.map(|(name, weight)| json!({ "name": name, "weight": weight })).collect();
            ways.push(json!({ "adapters": parts }));
        }
        for way in ways {
            let found = likeliest(&base, &ask(&server, way.clone()).await);
            assert_eq!(found.len(), 20);
            for &(token, logprob) in &found {
                let want = want[token as usize];
                assert!((logprob - want).abs() < 1e-3, "{way}: token {token} has {logprob}, not {want}");
            }
            let far = found.iter().zip(&alone).any(|(f, a)| f.0 != a.0 || (f.1 - a.1).abs() > 1e-2);
            assert!(far, "{way}: it is the base");
        }
    }
}

/// LoRAX's route, OpenAI's and a classification take blends; they are kept, and a part that is replaced counts at once.
#[tokio::test(flavor = "multi_thread")]
async fn in_every_dialect() {
    let tiny = fixtures().join("tiny/llama");
    let base = Base::open(tiny.join("base").to_str().unwrap()).unwrap();
    let server = server().await;
    // An adapter with the weight 1 is itself, with 0 nothing.
    let own = ask(&server, json!({ "adapter": "adapter_all_r8" })).await;
    let one = ask(&server, json!({ "adapters": [{ "name": "adapter_all_r8" }] })).await;
    assert_eq!(one["logprobs"], own["logprobs"]);
    assert_eq!(one["adapter"], "1*adapter_all_r8");
    assert_ne!(one["generation"], own["generation"]);
    let nothing = ask(&server, json!({ "adapters": [{ "name": "adapter_all_r8", "weight": 0 }] })).await;
    assert_eq!(likeliest(&base, &nothing), likeliest(&base, &ask(&server, json!({})).await));

    let merged = json!({ "ids": ["adapter_all_r8", "adapter_rslora_r8"], "weights": [0.7, 0.4],
        "merge_strategy": "linear", "density": 0.0 });
    let native = ask(&server, json!({ "merged_adapters": merged, "max_tokens": 8 })).await;
    assert_eq!(native["adapter"], "0.7*adapter_all_r8+0.4*adapter_rslora_r8");
    let ask_lorax = json!({ "inputs": PROMPT, "parameters": { "max_new_tokens": 8, "merged_adapters": merged } });
    let (status, lorax) = server.post("/generate", ask_lorax).await;
    assert_eq!((status, &lorax["generated_text"]), (200, &native["text"]), "{lorax}");
    let ask_openai =
        json!({ "model": "base", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "merged_adapters": merged });
    let (status, openai) = server.post("/v1/completions", ask_openai).await;
    assert_eq!((status, &openai["choices"][0]["text"]), (200, &native["text"]), "{openai}");

    // A head is taken over; two heads would be too many.
    let headed = json!([{ "name": "adapter_seqcls" }, { "name": "adapter_qv_r4", "weight": 0.5 }]);
    let (status, body) = server.post("/v1/classify", json!({ "input": PROMPT, "adapters": headed })).await;
    assert_eq!(status, 200, "{body}");
    let (_, plain) = server.post("/v1/classify", json!({ "input": PROMPT, "adapter": "adapter_seqcls" })).await;
    assert_ne!(body["results"][0]["scores"], plain["results"][0]["scores"]);
    let twice = json!([{ "name": "adapter_seqcls" }, { "name": "adapter_seqcls" }]);
    let (status, body) = server.post("/v1/classify", json!({ "input": PROMPT, "adapters": twice })).await;
    assert_eq!(status, 422, "{body}");

    for (more, status, what) in [
        (json!({ "adapters": [{ "name": "nobody" }] }), 404, "nobody"),
        (json!({ "adapters": [{ "name": "adapter_dora_r4", "weight": 0.5 }] }), 422, "DoRA"),
        (json!({ "adapter": "adapter_qv_r4", "adapters": [{ "name": "adapter_qv_r4" }] }), 400, "exclude"),
        (json!({ "merged_adapters": { "ids": ["adapter_qv_r4", "adapter_all_r8"] } }), 422, "ranks are 4 and 8"),
    ] {
        let mut body = json!({ "prompt": PROMPT });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (found, answer) = server.post("/v1/generate", body).await;
        assert_eq!(found, status, "{answer}");
        assert!(answer.to_string().contains(what), "{answer}");
    }

    // The name of a part stands for other weights from now on.
    let blend = json!({ "adapters": [{ "name": "part" }, { "name": "adapter_rslora_r8", "weight": 0.4 }] });
    assert_eq!(server.put_directory("part", &tiny.join("adapter_all_r8")).await.0, 201);
    let before = ask(&server, blend.clone()).await;
    assert_eq!(ask(&server, blend.clone()).await["generation"], before["generation"]);
    assert_eq!(server.put_directory("part", &tiny.join("adapter_qv_r4")).await.0, 200);
    let after = ask(&server, blend).await;
    assert_ne!(after["generation"], before["generation"]);
    assert_ne!(likeliest(&base, &after), likeliest(&base, &before));
    let metrics = server.http.get(server.at("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("adapter=\"(blend)\"") && !metrics.contains("0.7*"), "{metrics}");
    server.still_answers().await;
}
