//! The real model against transformers + PEFT: SmolLM2-135M-Instruct, two adapters and a classification head.

use std::path::Path;
use std::sync::Arc;

use loramux::base::matmul::Format;
use loramux::base::simd::Simd;
use loramux::base::{Base, Kernels};
use loramux::engine::{Output, Runner, Task};
use loramux::lora::PackedAdapter;
use serde_json::Value;

use crate::common::*;

/// Of a format of the weights: the least share of positions with the same likeliest token, and the largest mean KL.
const BUDGETS: [(Format, f64, f64); 5] = [
    (Format::F16, 0.99, 2e-5),
    (Format::Bf16, 0.99, 2e-4),
    (Format::Q8, 0.96, 3e-3),
    // `--quantize q8`
    (Format::Int8, 0.95, 5e-3),
    // The file's layers have 4 bits already; its embedding, which is the output layer too, has 8.
    (Format::Q4, 0.75, 0.1),
];

struct Case {
    name: String,
    prompt: Vec<u32>,
    adapter: Option<Arc<PackedAdapter>>,
    task: Task,
    want: Value,
}

fn numbers(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn cases(base: &Base, kernels: Kernels) -> Vec<Case> {
    let folder = fixtures().join("smollm2");
    let e: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let load = |name: &str| adapter(base, &folder.join(format!("adapter_{name}")), kernels);
    let generate = |want: &Value| {
        let tokens = want["greedy_ids"].as_array().unwrap().len();
        let mut task = greedy(tokens);
        task.logprobs = Some(10);
        Task::Generate(task)
    };
    let mut cases = Vec::new();
    for (name, adapter) in
        [("base", None), ("causal_r8", Some(load("causal_r8"))), ("causal_r16", Some(load("causal_r16")))]
    {
        for (i, prompt) in e["prompts"].as_array().unwrap().iter().enumerate() {
            let encoded = base.tokenizer.encode(prompt["text"].as_str().unwrap(), true).unwrap();
            assert_eq!(encoded, ids(&prompt["ids"]));
            let want = e["adapters"][name][i].clone();
            let (adapter, task) = (adapter.clone(), generate(&want));
            cases.push(Case { name: format!("{name} {i}"), prompt: encoded, adapter, task, want });
        }
    }
    let chat = &e["chat"];
    let messages: Vec<Value> = serde_json::from_value(chat["messages"].clone()).unwrap();
    let rendered = base.chat.as_ref().unwrap().render(&messages, true).unwrap();
    assert_eq!(rendered, chat["rendered"].as_str().unwrap());
    let prompt = base.tokenizer.encode(&rendered, false).unwrap();
    assert_eq!(prompt, ids(&chat["ids"]));
    cases.push(Case { name: "chat".into(), prompt, adapter: None, task: generate(chat), want: chat.clone() });
    let head = load("seqcls");
    for text in e["classify"].as_array().unwrap() {
        let prompt = base.tokenizer.encode_for_head(text["text"].as_str().unwrap()).unwrap();
        let name = text["text"].to_string();
        cases.push(Case { name, prompt, adapter: Some(head.clone()), task: Task::Classify, want: text.clone() });
    }
    cases
}

fn check(case: &Case, answer: &Answer, how: &str) {
    let name = format!("{} {how}", case.name);
    if case.task == Task::Classify {
        let difference = largest_difference(&answer.logits, &numbers(&case.want["logits"]));
        assert!(difference < 1e-2, "{name}: logits differ by {difference}");
        return;
    }
    assert_eq!(answer.tokens(), ids(&case.want["greedy_ids"]), "{name}");
    if let Some(text) = case.want["greedy_text"].as_str() {
        assert_eq!(answer.choices[0].text, text, "{name}");
    }
    let (want_ids, want) = (ids(&case.want["top_ids"]), numbers(&case.want["top_logprobs"]));
    let top = &answer.choices[0].logprobs[0].top;
    assert_eq!(top.len(), want.len(), "{name}");
    for (id, want) in want_ids.iter().zip(want) {
        // Two tokens closer than the tolerance may change places, also over the edge of the list.
        let got = top.iter().find(|(t, _)| t == id).or(top.last()).unwrap().1;
        assert!((got - want).abs() < 5e-3, "{name}: token {id} has log-probability {got}, not {want}");
    }
}

fn requests(cases: &[Case]) -> Vec<(Vec<u32>, Option<Arc<PackedAdapter>>, Task)> {
    cases.iter().map(|c| (c.prompt.clone(), c.adapter.clone(), c.task.clone())).collect()
}

fn runner(base: &Base, kernels: Kernels, format: Option<Format>) -> SharedRunner {
    SharedRunner::new(decoder(base, kernels, format), 256 << 20)
}

#[tokio::test]
async fn equals_the_reference_alone_and_mixed() {
    let base = Base::open(&packaged()).unwrap();
    let kernels = Kernels::Packed(Simd::detect());
    let cases = cases(&base, kernels);
    // Kept in the file's 4 bits or unpacked to f32: the same numbers, so the same results.
    for format in [None, Some(Format::F32)] {
        let runner = runner(&base, kernels, format);
        let mixed = answers(&engine(&base, &runner, 512), requests(&cases)).await;
        for (case, (answer, request)) in cases.iter().zip(mixed.iter().zip(requests(&cases))) {
            check(case, answer, "mixed");
            let alone = answer_alone(&base, &runner, request).await;
            check(case, &alone, "alone");
            assert_eq!(alone.content(), answer.content(), "{} depends on what shares its batch", case.name);
        }
    }
}

#[tokio::test]
async fn candle_operations_equal_the_reference() {
    let base = Base::open(&packaged()).unwrap();
    let cases = cases(&base, Kernels::Tensor);
    let engine = engine(&base, &runner(&base, Kernels::Tensor, None), 512);
    for (case, answer) in cases.iter().zip(answers(&engine, requests(&cases)).await) {
        check(case, &answer, "mixed");
    }
}

/// 32 requests, all their own adapter and sampling, together and one by one.
#[tokio::test]
async fn a_request_does_not_see_the_others() {
    let base = Base::open(&packaged()).unwrap();
    let kernels = Kernels::Packed(Simd::detect());
    let folder = fixtures().join("smollm2");
    let adapters = [
        None,
        Some(adapter(&base, &folder.join("adapter_causal_r8"), kernels)),
        Some(adapter(&base, &folder.join("adapter_causal_r16"), kernels)),
        Some(adapter(&base, &folder.join("adapter_seqcls"), kernels)),
    ];
    let requests: Vec<_> = (0..32usize)
        .map(|i| {
            let text = "A story about a house, a river and some mice. ".repeat(1 + i % 5) + &format!("Part {i}.");
            let mut task = greedy(8 + i % 9);
            if i % 2 == 1 {
                task.sampling.temperature = 0.9;
                task.sampling.top_p = 0.95;
                task.sampling.seed = Some(i as u64);
            }
            (base.tokenizer.encode(&text, true).unwrap(), adapters[i % 4].clone(), Task::Generate(task))
        })
        .collect();
    let runner = runner(&base, kernels, None);
    let together = answers(&engine(&base, &runner, 512), requests.clone()).await;
    assert!(together.iter().any(|answer| answer.cached > 0), "none shared a prefix");
    for (i, (request, together)) in requests.into_iter().zip(&together).enumerate() {
        assert_eq!(answer_alone(&base, &runner, request).await.content(), together.content(), "request {i}");
    }
}

/// Rows of logits as log-probabilities.
fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x)) as f64;
    let sum: f64 = row.iter().map(|&x| (x as f64 - max).exp()).sum();
    row.iter().map(|&x| x as f64 - max - sum.ln()).collect()
}

fn best(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |b, i| if row[i] > row[b] { i } else { b })
}

/// The texts and labels of one of the files that `book-reviews` comes from.
fn reviews(which: &str) -> Vec<(String, String)> {
    let file = format!("{}/recipes/book-reviews-{which}.csv", env!("CARGO_MANIFEST_DIR"));
    let rows = csv::Reader::from_path(file).unwrap().into_records().map(Result::unwrap);
    rows.map(|row| (row[0].to_string(), row[1].to_string())).collect()
}

/// Whole numbers cost half a percentage point of accuracy at most.
#[test]
fn whole_numbers_classify_as_well() {
    let base = Base::open(&packaged()).unwrap();
    let kernels = Kernels::Packed(Simd::detect());
    let reviews: Vec<_> = reviews("test").into_iter().chain(reviews("train").into_iter().take(140)).collect();
    let right = |format: Option<Format>| {
        let decoder = decoder(&base, kernels, format);
        let adapter =
            adapter_for(&base, &Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/book-reviews"), &decoder);
        let labels = adapter.labels.clone().unwrap();
        let mut runner = Runner::new(decoder, 64 << 20).unwrap();
        let mut right = 0;
        for reviews in reviews.chunks(8) {
            let prompts: Vec<_> =
                reviews.iter().map(|(text, _)| base.tokenizer.encode_for_head(text).unwrap()).collect();
            let work: Vec<_> = prompts.iter().map(|p| (&p[..], Some(adapter.clone()), Output::Head)).collect();
            let answers = logits(&mut runner, &work);
            right += answers.iter().zip(reviews).filter(|(logits, (_, label))| labels[best(logits)] == *label).count();
        }
        right as f64 / reviews.len() as f64
    };
    let (exact, whole) = (right(None), right(Some(Format::Int8)));
    println!("of {} reviews right: {exact:.4}, in whole numbers {whole:.4}", reviews.len());
    assert!(exact > 0.7 && whole >= exact - 0.005, "{exact} right, in whole numbers {whole}");
}

/// What coarser weights cost, over every position of reviews, half of them with an adapter: the share of positions with the
/// likeliest token of f32, and the mean of KL(f32 ‖ coarser) in nats. README states these budgets.
#[test]
fn coarser_weights_stay_in_their_budgets() {
    let base = Base::open(&packaged()).unwrap();
    let kernels = Kernels::Packed(Simd::detect());
    let reviews = reviews("test").into_iter().take(10);
    let prompts: Vec<Vec<u32>> = reviews.map(|(text, _)| base.tokenizer.encode(&text, true).unwrap()).collect();
    let all = |format: Option<Format>| {
        let decoder = decoder(&base, kernels, format);
        let adapter = adapter_for(&base, &fixtures().join("smollm2/adapter_causal_r16"), &decoder);
        let mut runner = Runner::new(decoder, 64 << 20).unwrap();
        let mut found: Vec<Vec<f32>> = vec![];
        for (i, prompt) in prompts.iter().enumerate() {
            let adapter = (i % 2 == 1).then(|| adapter.clone());
            let flat = logits(&mut runner, &[(prompt, adapter, Output::Logits(prompt.len()))]).remove(0);
            found.extend(flat.chunks_exact(base.config.vocab_size).map(<[f32]>::to_vec));
        }
        found
    };
    // What follows each position, in the same order; nothing follows a text's last.
    let next: Vec<Option<u32>> = prompts.iter().flat_map(|p| p[1..].iter().copied().map(Some).chain([None])).collect();
    let perplexity = |logits: &[Vec<f32>]| {
        let known = logits
            .iter()
            .zip(&next)
            .filter_map(|(row, next)| Some(-log_softmax(row)[next.as_ref()?.to_owned() as usize]));
        let losses: Vec<f64> = known.collect();
        (losses.iter().sum::<f64>() / losses.len() as f64).exp()
    };
    let exact = all(Some(Format::F32));
    assert!(exact.len() > 500);
    for (format, agreement, divergence) in BUDGETS {
        let (mut same, mut sum) = (0, 0.0);
        let coarse = all(Some(format));
        let ratio = perplexity(&coarse) / perplexity(&exact);
        for (exact, coarse) in exact.iter().zip(&coarse) {
            same += usize::from(best(exact) == best(coarse));
            let (p, q) = (log_softmax(exact), log_softmax(coarse));
            sum += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        }
        let (same, mean) = (same as f64 / exact.len() as f64, sum / exact.len() as f64);
        println!("{format:?}: the same token at {:.2} %, KL {mean:.6} nats, perplexity times {ratio:.5}", 100.0 * same);
        assert!(same >= agreement, "{format:?}: the same token at {same} of the positions; the budget is {agreement}");
        assert!(mean <= divergence, "{format:?}: KL {mean}; the budget is {divergence}");
        if format != Format::Q4 {
            assert!((ratio - 1.0).abs() < 0.01, "{format:?}: perplexity times {ratio}; the budget is 1 %");
        }
    }
}
