//! The OpenAPI document.

use serde_json::{Map, Value, json};

fn text() -> Value {
    json!({ "type": "string" })
}

fn object(fields: &[(&str, Value)], required: &[&str]) -> Value {
    let properties: Map<String, Value> =
        fields.iter().map(|(name, schema)| (name.to_string(), schema.clone())).collect();
    json!({ "type": "object", "properties": properties, "required": required })
}

fn with(base: &[(&'static str, Value)], more: &[(&'static str, Value)]) -> Vec<(&'static str, Value)> {
    base.iter().chain(more).cloned().collect()
}

/// OpenAPI 3.1 for every route.
pub fn document() -> Value {
    let (number, whole, flag) =
        (json!({ "type": "number" }), json!({ "type": "integer" }), json!({ "type": "boolean" }));
    let one_or_more = json!({ "oneOf": [text(), { "type": "array", "items": text() }] });
    let messages = json!({ "type": "array", "items": object(&[("role", text()), ("content", json!({}))], &["role"]) });
    let variables =
        ("chat_template_kwargs", json!({ "type": "object", "description": "Variables of the chat template" }));
    let sampling = [
        ("max_tokens", whole.clone()),
        ("temperature", number.clone()),
        ("top_p", number.clone()),
        ("top_k", whole.clone()),
        ("typical_p", number.clone()),
        ("min_p", number.clone()),
        ("repetition_penalty", number.clone()),
        ("frequency_penalty", number.clone()),
        ("presence_penalty", number.clone()),
        ("seed", whole.clone()),
        ("stop", one_or_more.clone()),
        ("stop_token_ids", json!({ "type": "array", "items": whole.clone() })),
        ("logit_bias", json!({ "type": "object", "additionalProperties": number.clone() })),
        ("include_stop_str_in_output", flag.clone()),
        ("ignore_eos", flag.clone()),
        ("min_tokens", whole.clone()),
        ("stream", flag.clone()),
    ];
    let any_schema = json!({ "type": ["object", "boolean", "string"], "description": "A JSON schema, or its text" });
    let texts = json!({ "type": "array", "items": text() });
    let format_types = ["text", "json_object", "json_schema", "regex", "choice", "grammar", "json"];
    let named = object(&[("name", text()), ("schema", any_schema.clone()), ("strict", flag.clone())], &["schema"]);
    let constraints = [
        (
            "response_format",
            object(
                &[
                    ("type", json!({ "enum": format_types })),
                    ("json_schema", named),
                    ("schema", any_schema.clone()),
                    ("regex", text()),
                    ("choice", texts.clone()),
                    ("grammar", text()),
                    ("value", json!({ "description": "TGI's: the schema or the regular expression" })),
                ],
                &["type"],
            ),
        ),
        ("guided_json", any_schema.clone()),
        ("guided_regex", text()),
        ("guided_choice", texts.clone()),
        ("guided_grammar", text()),
        (
            "structured_outputs",
            object(
                &[
                    ("json", any_schema),
                    ("regex", text()),
                    ("choice", texts),
                    ("grammar", text()),
                    ("json_object", flag.clone()),
                ],
                &[],
            ),
        ),
        (
            "grammar",
            object(
                &[("type", json!({ "enum": ["json", "json_object", "json_schema", "regex"] })), ("value", json!({}))],
                &["type", "value"],
            ),
        ),
    ];
    let adapter = ("adapter", text());
    let part = object(&[("name", text()), ("weight", number.clone())], &["name"]);
    let parts = ("adapters", json!({ "type": "array", "items": part }));
    let merged = object(
        &[
            ("ids", json!({ "type": "array", "items": text() })),
            ("weights", json!({ "type": "array", "items": number.clone() })),
            (
                "merge_strategy",
                json!({ "enum": ["cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] }),
            ),
            ("density", number.clone()),
            ("majority_sign_method", json!({ "enum": ["total", "frequency"] })),
        ],
        &["ids"],
    );
    let blend = [parts, ("merged_adapters", merged)];
    let generate = object(
        &with(
            &with(&with(&sampling, &blend), &constraints),
            &[
                adapter.clone(),
                ("prompt", text()),
                ("messages", messages.clone()),
                variables.clone(),
                ("logprobs", whole.clone()),
            ],
        ),
        &[],
    );
    let labels = ("labels", json!({ "type": "array", "items": text() }));
    let classify =
        object(&with(&blend, &[adapter, ("input", one_or_more), ("top_k", whole.clone()), labels]), &["input"]);
    let openai = with(
        &with(&with(&sampling, &blend), &constraints),
        &[("model", text()), ("n", whole.clone()), ("stream_options", json!({ "type": "object" }))],
    );
    let completion = object(
        &with(
            &openai,
            &[
                ("prompt", json!({})),
                ("logprobs", whole.clone()),
                ("echo", flag.clone()),
                ("add_special_tokens", flag.clone()),
            ],
        ),
        &["prompt"],
    );
    let chat = object(
        &with(
            &openai,
            &[
                ("messages", messages.clone()),
                ("logprobs", flag.clone()),
                ("top_logprobs", whole.clone()),
                ("max_completion_tokens", whole.clone()),
                variables.clone(),
                ("add_generation_prompt", flag.clone()),
            ],
        ),
        &["messages"],
    );
    let parameters = object(
        &with(
            &with(&blend, &constraints),
            &[
                ("adapter_id", text()),
                ("max_new_tokens", whole.clone()),
                ("do_sample", flag.clone()),
                ("temperature", number.clone()),
                ("top_p", number.clone()),
                ("typical_p", number.clone()),
                ("top_k", whole.clone()),
                ("repetition_penalty", number.clone()),
                ("frequency_penalty", number.clone()),
                ("seed", whole.clone()),
                ("stop", json!({ "type": "array", "items": text() })),
                ("truncate", whole.clone()),
                ("ignore_eos_token", flag.clone()),
                ("return_full_text", flag.clone()),
                ("details", flag.clone()),
                ("decoder_input_details", flag.clone()),
            ],
        ),
        &[],
    );
    let lorax = object(&[("inputs", text()), ("parameters", parameters), ("stream", flag.clone())], &["inputs"]);
    let file = json!({ "type": "string", "format": "binary" });
    let upload = object(
        &[
            ("name", text()),
            ("config", file.clone()),
            ("weights", file.clone()),
            ("labels", file.clone()),
            ("file", json!({ "type": "array", "items": file })),
            ("archive", file),
        ],
        &[],
    );
    let load = object(
        &[("lora_name", text()), ("lora_path", text()), ("load_inplace", flag.clone())],
        &["lora_name", "lora_path"],
    );
    let unload = object(&[("lora_name", text())], &["lora_name"]);
    let tokenize = object(
        &[
            ("model", text()),
            ("prompt", text()),
            ("messages", messages),
            variables,
            ("add_special_tokens", flag.clone()),
            ("add_generation_prompt", flag.clone()),
            ("return_token_strs", flag),
        ],
        &[],
    );
    let detokenize = object(&[("model", text()), ("tokens", json!({ "type": "array", "items": whole }))], &["tokens"]);

    let error = json!({ "description": "What was found and what was expected",
        "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } } });
    let operation = |summary: &str, body: Option<(&str, Value)>, parameters: Vec<Value>| {
        let mut operation = json!({ "summary": summary, "parameters": parameters,
            "responses": { "200": { "description": "OK" }, "default": error.clone() } });
        if let Some((kind, schema)) = body {
            let mut content = Map::new();
            content.insert(kind.into(), json!({ "schema": schema }));
            operation["requestBody"] = json!({ "required": true, "content": content });
        }
        operation
    };
    let json_body = |summary: &str, schema: Value| operation(summary, Some(("application/json", schema)), vec![]);
    let plain = |summary: &str| operation(summary, None, vec![]);
    let name = json!({ "name": "name", "in": "path", "required": true, "schema": text() });
    let asset = json!({ "name": "file", "in": "path", "required": true, "schema": text() });
    let id = json!({ "name": "id", "in": "path", "required": true, "schema": text() });
    let header = |name: &str| json!({ "name": name, "in": "header", "required": false, "schema": text() });
    let query = json!({ "name": "adapter", "in": "query", "required": false, "schema": text() });
    let form =
        |summary: &str, parameters| operation(summary, Some(("multipart/form-data", upload.clone())), parameters);
    let mut post_adapter = form("Upload a new adapter", vec![]);
    let mut put_adapter =
        form("Upload or replace an adapter", vec![name.clone(), header("If-Match"), header("If-None-Match")]);
    for operation in [&mut post_adapter, &mut put_adapter] {
        operation["responses"]["201"] = json!({ "description": "The name is new" });
        operation["responses"]["200"]["description"] = json!("The name was there already");
    }
    let health = |summary: &str| {
        let mut operation = plain(summary);
        operation["responses"]["503"] = json!({ "description": "Not so" });
        operation
    };
    let mut native_generate = json_body("Continue a prompt or a chat", generate);
    native_generate["parameters"] = json!([query]);
    let mut native_classify = json_body("Classify texts", classify);
    native_classify["parameters"] = json!([query]);
    json!({
        "openapi": "3.1.0",
        "info": { "title": "loramux", "version": env!("CARGO_PKG_VERSION"),
            "description": "One base model, many LoRA adapters, every batch shared." },
        "paths": {
            "/v1/generate": { "post": native_generate },
            "/v1/classify": { "post": native_classify },
            "/v1/adapters": { "get": plain("List adapters; one that a source offers has its URL as `source`, and an empty \
                `generation` in the tier `remote` until it is fetched"), "post": post_adapter },
            "/v1/adapters/{name}": {
                "get": operation("One adapter", None, vec![name.clone()]),
                "put": put_adapter,
                "delete": operation("Remove an uploaded adapter; one of a folder or a source cannot be", None, vec![name.clone(), header("If-Match")]),
            },
            "/v1/adapters/{name}/pin": {
                "put": operation("Keep an adapter in memory until the server ends", None, vec![name.clone()]),
                "delete": operation("Let an adapter be evicted again", None, vec![name.clone()]),
            },
            "/v1/adapters/{name}/unload": {
                "post": operation("Free an adapter's memory; its files stay", None, vec![name]),
            },
            "/v1/models": { "get": plain("The base and the adapters as OpenAI's models") },
            "/v1/models/{id}": { "get": operation("One model", None, vec![id]) },
            "/v1/completions": { "post": json_body("OpenAI's completions", completion) },
            "/v1/chat/completions": { "post": json_body("OpenAI's chat completions", chat) },
            "/v1/load_lora_adapter": { "post": json_body("vLLM: load an adapter from a local directory", load) },
            "/v1/unload_lora_adapter": { "post": json_body("vLLM: unload an adapter", unload) },
            "/tokenize": { "post": json_body("vLLM: token ids of a text", tokenize) },
            "/detokenize": { "post": json_body("vLLM: text of token ids", detokenize) },
            "/version": { "get": plain("Version") },
            "/generate": { "post": json_body("LoRAX and TGI: continue a prompt", lorax.clone()) },
            "/generate_stream": { "post": json_body("LoRAX and TGI: continue a prompt, as events", lorax.clone()) },
            "/": { "get": plain("The web page"), "post": json_body("LoRAX and TGI: either of the two", lorax) },
            "/assets/{file}": { "get": operation("Script, style and icon of the web page", None, vec![asset]) },
            "/info": { "get": plain("LoRAX and TGI: about the model") },
            "/metrics": { "get": plain("Prometheus metrics") },
            "/health": { "get": health("As /health/ready") },
            "/ping": { "get": health("As /health/ready") },
            "/health/live": { "get": health("The process is alive") },
            "/health/ready": { "get": health("The server takes requests") },
            "/openapi.json": { "get": plain("This document") },
        },
        // A key is asked for where the server has keys.
        "security": [{}, { "key": [] }, { "keyHeader": [] }],
        "components": { "securitySchemes": {
            "key": { "type": "http", "scheme": "bearer" },
            "keyHeader": { "type": "apiKey", "in": "header", "name": "x-api-key" },
        }, "schemas": { "Error": object(&[("error", object(
            &[("message", text()), ("type", text()), ("param", json!({ "type": ["string", "null"] })),
                ("code", json!({ "type": ["string", "null"] }))],
            &["message", "type"],
        ))], &["error"]) } },
    })
}
