//! Spans as an OpenTelemetry collector gets them.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use actix_web::web::{self, Bytes, Data};
use actix_web::{App, HttpResponse, HttpServer};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::json;

use crate::common::fixtures;
use crate::host::Server;

/// A collector's address, and what comes in there.
pub fn collector() -> (String, Receiver<ExportTraceServiceRequest>) {
    let (sender, received) = channel();
    let sender = Data::new(std::sync::Mutex::new(sender));
    let take = |body: Bytes, sender: Data<std::sync::Mutex<std::sync::mpsc::Sender<ExportTraceServiceRequest>>>| async move {
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        sender.lock().unwrap().send(request).unwrap();
        HttpResponse::Ok().content_type("application/x-protobuf").finish()
    };
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let server =
            HttpServer::new(move || App::new().app_data(sender.clone()).route("/v1/traces", web::post().to(take)));
        let server = server.workers(1).disable_signals().bind("127.0.0.1:0").unwrap();
        tell.send(format!("http://{}", server.addrs()[0])).unwrap();
        actix_web::rt::System::new().block_on(server.run())
    });
    let url = told.recv().unwrap();
    (url, received)
}

fn attribute(span: &Span, key: &str) -> Option<String> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == key)?;
    Some(match attribute.value.as_ref()?.value.as_ref()? {
        Any::StringValue(text) => text.clone(),
        Any::IntValue(number) => number.to_string(),
        other => panic!("{key} is {other:?}"),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_span_in_the_clients_trace() {
    let (url, received) = collector();
    let folder = tempfile::tempdir().unwrap();
    let tiny = fixtures().join("tiny/llama");
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "100")];
    let base = tiny.join("base").display().to_string();
    let mut server = Server::listening_with(&base, &folder.path().join("s/store"), &[], &environment).ready().await;
    assert_eq!(server.put_directory("a", &tiny.join("adapter_qv_r4")).await.0, 201);
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let ask = |adapter: &str| {
        let body = json!({ "adapter": adapter, "prompt": "t5 t6 t7", "max_tokens": 4, "ignore_eos": true });
        let parent = format!("00-{trace}-00f067aa0ba902b7-01");
        server
            .http
            .post(server.at("/v1/generate"))
            .header("traceparent", parent)
            .header("x-request-id", "r1")
            .json(&body)
    };
    assert_eq!(ask("a").send().await.unwrap().status(), 200);
    assert_eq!(ask("nothing").send().await.unwrap().status(), 404);
    // What is not sent yet goes out at the end.
    server.signal("TERM");
    assert!(server.ended(Duration::from_secs(20)).await.success());
    let mut spans = vec![];
    while let Ok(request) = received.recv_timeout(Duration::from_millis(500)) {
        for resource in request.resource_spans {
            let attributes = &resource.resource.as_ref().unwrap().attributes;
            let service = attributes.iter().find(|attribute| attribute.key == "service.name").unwrap();
            assert_eq!(service.value.as_ref().unwrap().value, Some(Any::StringValue("loramux".into())));
            spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
    }
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let ours: Vec<&Span> = spans.iter().filter(|span| hex(&span.trace_id) == trace).collect();
    let asked = |status: &str| {
        let with = |span: &&&Span| attribute(span, "http.response.status_code").as_deref() == Some(status);
        *ours.iter().find(with).unwrap_or_else(|| panic!("no span with status {status} in {ours:?}"))
    };
    let good = asked("200");
    assert_eq!((good.name.as_str(), hex(&good.parent_span_id)), ("POST /v1/generate", "00f067aa0ba902b7".to_string()));
    for (key, value) in [
        ("http.route", "/v1/generate"),
        ("loramux.adapter", "a"),
        ("loramux.request_id", "r1"),
        ("gen_ai.usage.input_tokens", "3"),
        ("gen_ai.usage.output_tokens", "4"),
    ] {
        assert_eq!(attribute(good, key).as_deref(), Some(value), "{key}");
    }
    let parts: Vec<&&Span> = ours.iter().filter(|span| span.parent_span_id == good.span_id).collect();
    let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
    assert_eq!(names, ["queue and prompt", "answer"]);
    assert_eq!(parts[0].end_time_unix_nano, parts[1].start_time_unix_nano);
    let within = |span: &Span| {
        good.start_time_unix_nano <= span.start_time_unix_nano
            && span.start_time_unix_nano <= span.end_time_unix_nano
            && span.end_time_unix_nano <= good.end_time_unix_nano
    };
    assert!(parts.iter().all(|part| within(part)), "{parts:?} {good:?}");
    assert_eq!(attribute(asked("404"), "gen_ai.usage.input_tokens"), None);
    // A request of no trace begins one.
    let upload = spans.iter().find(|span| span.name == "PUT /v1/adapters/{name}").unwrap();
    assert!(upload.parent_span_id.is_empty() && hex(&upload.trace_id) != trace);
}
