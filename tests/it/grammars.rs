//! Structured output over HTTP, with the real model: every field that asks for it, streams, and what is refused.

use futures::future::join_all;
use loramux::base::DEFAULT_MODEL;
use serde_json::{Value, json};

use crate::common::fixtures;
use crate::host::Server;

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 20 },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "likes": { "type": "array", "items": { "enum": ["tea", "coffee"] }, "maxItems": 2 },
        },
        "required": ["name", "age", "likes"],
        "additionalProperties": false,
    })
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Person {
    name: String,
    age: u8,
    likes: Vec<String>,
}

fn is_person(text: &str) -> bool {
    let person: Result<Person, _> = serde_json::from_str(text);
    let likes = |likes: &[String]| likes.len() < 3 && likes.iter().all(|l| ["tea", "coffee"].contains(&l.as_str()));
    person.is_ok_and(|p| p.age <= 150 && p.name.chars().count() <= 20 && likes(&p.likes))
}

fn is_object(text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|v| v.is_object())
}

fn is_year(text: &str) -> bool {
    text.len() == 4 && text.starts_with("19") && text.bytes().all(|b| b.is_ascii_digit())
}

fn is_colour(text: &str) -> bool {
    ["red", "green", "blue-green"].contains(&text)
}

const PAIR: &str =
    "start: \"(\" name \", \" rest \")\"\nrest: name | \"(\" name \", \" name \")\"\nname: \"a\" | \"b\"\n";

fn is_pair(text: &str) -> bool {
    let inner = text.strip_prefix('(').and_then(|t| t.strip_suffix(')'));
    match inner.and_then(|inner| inner.split_once(", ")) {
        Some((first, rest)) => ["a", "b"].contains(&first) && (["a", "b"].contains(&rest) || is_pair(rest)),
        None => false,
    }
}

/// Tells whether a text is what was asked for.
type Check = fn(&str) -> bool;

/// Every way to ask, and what the answer then is.
fn ways() -> Vec<(Value, Check)> {
    let (colours, year) = (json!(["red", "green", "blue-green"]), json!("19[0-9]{2}"));
    let named = json!({ "name": "person", "schema": schema(), "strict": true });
    let is_person: Check = is_person;
    vec![
        (json!({ "response_format": { "type": "json_schema", "json_schema": named } }), is_person),
        (json!({ "response_format": { "type": "json_object", "schema": schema() } }), is_person),
        (json!({ "response_format": { "type": "json_object" } }), is_object),
        (json!({ "response_format": { "type": "regex", "regex": year } }), is_year),
        (json!({ "response_format": { "type": "choice", "choice": colours } }), is_colour),
        (json!({ "response_format": { "type": "grammar", "grammar": PAIR } }), is_pair),
        (json!({ "guided_json": schema() }), is_person),
        (json!({ "guided_regex": "^19\\d\\d$" }), is_year),
        (json!({ "guided_choice": colours }), is_colour),
        (json!({ "guided_grammar": PAIR }), is_pair),
        (json!({ "structured_outputs": { "json": schema().to_string() } }), is_person),
        (json!({ "structured_outputs": { "json_object": true } }), is_object),
        (json!({ "structured_outputs": { "regex": year } }), is_year),
        (json!({ "structured_outputs": { "choice": colours } }), is_colour),
        (json!({ "structured_outputs": { "grammar": PAIR } }), is_pair),
        (json!({ "grammar": { "type": "json", "value": schema() } }), is_person),
        (json!({ "grammar": { "type": "regex", "value": year } }), is_year),
        (json!({ "response_format": { "type": "json_object", "value": schema() } }), is_person),
    ]
}

const PROMPT: &str = "Question: who was it, and when?\nAnswer: ";
const ROUTES: [&str; 4] = ["/v1/generate", "/v1/completions", "/v1/chat/completions", "/generate"];

/// A request to a route, sampled, with more fields.
fn request(route: &str, seed: usize, more: &Value) -> Value {
    // The penalty keeps a small model from writing blanks without an end, as JSON allows.
    let mut fields = json!({ "temperature": 1.1, "top_p": 0.95, "seed": seed, "frequency_penalty": 0.5 });
    fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    match route {
        "/generate" => {
            fields["max_new_tokens"] = json!(400);
            fields["details"] = json!(true);
            return json!({ "inputs": PROMPT, "parameters": fields });
        }
        "/v1/chat/completions" => fields["messages"] = json!([{ "role": "user", "content": PROMPT }]),
        _ => fields["prompt"] = json!(PROMPT),
    }
    fields["max_tokens"] = json!(400);
    fields
}

/// Text and finish reason of a route's answer.
fn read<'a>(route: &str, body: &'a Value) -> (&'a str, &'a str) {
    let choice = &body["choices"][0];
    let (text, finish) = match route {
        "/v1/generate" => (&body["text"], &body["finish_reason"]),
        "/v1/completions" => (&choice["text"], &choice["finish_reason"]),
        "/v1/chat/completions" => (&choice["message"]["content"], &choice["finish_reason"]),
        _ => (&body["generated_text"], &body["details"]["finish_reason"]),
    };
    (text.as_str().unwrap(), finish.as_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_dialect_gives_what_every_field_asks_for() {
    let server = &Server::start(DEFAULT_MODEL, &[]).await;
    let ways = ways();
    let asked = ROUTES.iter().flat_map(|route| ways.iter().enumerate().map(move |(seed, way)| (*route, seed, way)));
    let answers = asked.map(|(route, seed, (fields, is_right))| async move {
        let (status, body) = server.post(route, request(route, seed, fields)).await;
        assert_eq!(status, 200, "{route} {fields}: {body}");
        let (text, finish) = read(route, &body);
        match finish {
            // An object of which nothing is said may go on for as long as it likes.
            "length" => assert!(is_right("{}") && text.starts_with('{'), "{route} {fields}: {body}"),
            _ => assert!(is_right(text) && ["stop", "eos_token"].contains(&finish), "{route} {fields}: {body}"),
        }
    });
    join_all(answers).await;
}

/// The texts of a stream's events together.
fn streamed(events: &Value) -> String {
    let events = events.as_str().unwrap().lines().filter_map(|l| l.strip_prefix("data: {"));
    let text = |event: &str| {
        let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        let places = ["/text", "/choices/0/text", "/choices/0/delta/content", "/token/text"];
        let text = places.iter().find_map(|place| event.pointer(place)?.as_str().map(str::to_string));
        if event["token"]["special"] == true { String::new() } else { text.unwrap_or_default() }
    };
    events.map(text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_streams_nor_neighbours_nor_choices_change_an_answer() {
    let folder = fixtures().join("smollm2/adapter_causal_r16");
    let server = &Server::start(DEFAULT_MODEL, &[]).await;
    assert_eq!(server.put_directory("fairy", &folder).await.0, 201);
    let way = json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": schema() } } });
    let free = json!({ "prompt": PROMPT, "max_tokens": 40, "ignore_eos": true, "temperature": 1, "seed": 4 });
    let alone = server.post("/v1/generate", free.clone()).await.1;
    let mut adapted = request("/v1/generate", 3, &way);
    adapted["adapter"] = json!("fairy");
    let whole = join_all(ROUTES.map(|route| server.post(route, request(route, 3, &way)))).await;
    let parts = join_all(ROUTES.map(|route| {
        let mut body = request(route, 3, &way);
        body["stream"] = json!(true);
        server.post(if route == "/generate" { "/generate_stream" } else { route }, body)
    }));
    let mut several = request("/v1/completions", 3, &way);
    several["n"] = json!(3);
    let (parts, beside, adapted, several) = tokio::join!(
        parts,
        server.post("/v1/generate", free),
        server.post("/v1/generate", adapted),
        server.post("/v1/completions", several)
    );
    assert_eq!(beside.1["text"], alone["text"]);
    assert!(is_person(read("/v1/generate", &adapted.1).0), "{}", adapted.1);
    for ((route, (_, whole)), (status, parts)) in ROUTES.iter().zip(&whole).zip(&parts) {
        assert_eq!(*status, 200, "{parts}");
        assert_eq!(read(route, whole).0, streamed(parts), "{route}");
        assert!(parts.as_str().unwrap().contains("\"stop\"") || *route == "/generate", "{parts}");
    }
    let texts: Vec<&str> = (0..3).map(|i| several.1["choices"][i]["text"].as_str().unwrap()).collect();
    assert!(texts.iter().all(|text| is_person(text)), "{texts:?}");
    assert_eq!(texts[0], read("/v1/completions", &whole[1].1).0);
    assert!(texts[0] != texts[1] || texts[0] != texts[2], "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn constraints_that_cannot_be_met_are_refused() {
    let server = Server::start(DEFAULT_MODEL, &[]).await;
    let remote = json!({ "type": "array", "items": { "$ref": "https://example.com/schema.json" } });
    let cases = [
        (json!({ "response_format": { "type": "json_schema" } }), "response_format.json_schema.schema", "needed"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "a", "schema": remote } } }),
            "response_format.json_schema.schema",
            "https://example.com/schema.json",
        ),
        (json!({ "response_format": { "type": "xml" } }), "response_format.type", "xml"),
        (json!({ "guided_json": { "type": "strnig" } }), "guided_json", "strnig"),
        (json!({ "guided_json": { "not": { "type": "null" } } }), "guided_json", "not"),
        (json!({ "guided_regex": "a(b" }), "guided_regex", "a(b"),
        (json!({ "guided_regex": "x".repeat(200_000) }), "guided_regex", "200000 bytes"),
        (json!({ "guided_choice": [] }), "guided_choice", "one text or more"),
        (json!({ "guided_choice": "red" }), "guided_choice", "a list"),
        (json!({ "guided_grammar": "start: nowhere" }), "guided_grammar", "nowhere"),
        (json!({ "structured_outputs": { "structural_tag": "{}" } }), "structured_outputs.structural_tag", "supported"),
        (
            json!({ "structured_outputs": { "grammar": "(" } }),
            "structured_outputs.grammar",
            "structured_outputs.grammar",
        ),
        (json!({ "guided_regex": "a", "response_format": { "type": "json_object" } }), "guided_regex", "exclude"),
        (json!({ "grammar": { "type": "json", "value": 3 } }), "grammar.value", "schema"),
    ];
    for (fields, param, words) in cases {
        for route in ROUTES {
            let (status, body) = server.post(route, request(route, 0, &fields)).await;
            assert_eq!(status, 400, "{route} {fields}: {body}");
            let param = if route == "/generate" { format!("parameters.{param}") } else { param.to_string() };
            assert_eq!(body["error"]["param"], param, "{route} {fields}: {body}");
            let message = body["error"]["message"].as_str().unwrap();
            assert!(message.contains(words) && message.starts_with(&param), "{route} {fields}: {body}");
        }
    }
    let (status, body) =
        server.post("/v1/generate", request("/v1/generate", 0, &json!({ "guided_choice": ["a"] }))).await;
    assert_eq!((status, body["text"].as_str()), (200, Some("a")), "{body}");
}
