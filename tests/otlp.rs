//! Traces of a real server, as a collector gets them. Nothing waits for the exporter's clock: it sends the rest when the server ends.
#![cfg(feature = "otlp")]

use std::{
    collections::BTreeMap,
    io::Read,
    sync::{Arc, Mutex},
};

use axum::{Router, body::Bytes, http::HeaderMap, routing::post};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::any_value::Value,
    trace::v1::{Span, span::SpanKind},
};
use process::{LIST_3, Server};
use prost::Message;
use serde_json::json;

mod process;

/// What a collector was sent: spans, with the service that they are of.
type Received = Arc<Mutex<Vec<(String, Span)>>>;

/// A collector on a free port: its URL and what it gets.
async fn collector() -> (String, Received) {
    let received = Received::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let into = Arc::clone(&received);
    let receive = move |headers: HeaderMap, body: Bytes| async move {
        assert_eq!(headers["content-type"], "application/x-protobuf");
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        for resource in request.resource_spans {
            let service = resource
                .resource
                .unwrap()
                .attributes
                .into_iter()
                .find(|attribute| attribute.key == "service.name");
            let Some(Value::StringValue(service)) = service.unwrap().value.unwrap().value else {
                panic!("a service's name is a text")
            };
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            into.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
    };
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/v1/traces", post(receive))).await });
    (url, received)
}

fn attributes(span: &Span) -> BTreeMap<&str, String> {
    let texts = span.attributes.iter().map(|attribute| {
        let value = match attribute.value.as_ref().unwrap().value.as_ref().unwrap() {
            Value::StringValue(text) => text.clone(),
            Value::IntValue(number) => number.to_string(),
            other => format!("{other:?}"),
        };
        (attribute.key.as_str(), value)
    });
    texts.collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `POST` with the headers of a gateway in front; the whole body.
fn post_in_trace(server: &Server, path: &str, traceparent: &str, body: &serde_json::Value) -> String {
    let request = ureq::post(format!("{}{path}", server.url)).header("traceparent", traceparent);
    let mut response = request.header("x-request-id", "req-1").send_json(body).unwrap();
    let mut text = String::new();
    response.body_mut().as_reader().read_to_string(&mut text).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_span_of_the_client_s_trace_and_its_stages_are_spans_in_it() {
    let (url, received) = collector().await;
    let (trace, client_span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let unrecorded = "1af7651916cd43dd8448eb211c80319c";
    let calls = move || {
        let server = Server::start(&["--otlp-endpoint", &url]);
        let chat = |stream: bool| json!({"model": "demo:json", "stream": stream, "messages": [{"role": "user", "content": LIST_3}]});
        let text = post_in_trace(&server, "/v1/chat/completions", &format!("00-{trace}-{client_span}-01"), &chat(true));
        assert!(text.ends_with("[DONE]\n\n"), "{text}");
        post_in_trace(
            &server,
            "/v1/chat/completions",
            &format!("00-{unrecorded}-{client_span}-00"),
            &chat(false),
        );
        // Without a trace it begins one.
        assert_eq!(server.post("/v1/completions", &json!({"model": "nope", "prompt": "a"})).0, 404);
        server.stop();
    };
    tokio::task::spawn_blocking(calls).await.unwrap();

    let received = received.lock().unwrap();
    assert!(received.iter().all(|(service, _)| service == "polylora"));
    let of_trace: Vec<&Span> = received
        .iter()
        .map(|(_, span)| span)
        .filter(|span| hex(&span.trace_id) == trace)
        .collect();
    let named = |name: &str| {
        let found: Vec<&Span> = of_trace.iter().copied().filter(|span| span.name == name).collect();
        let [span] = found[..] else {
            panic!(
                "{name}: {} spans of {:?}",
                found.len(),
                of_trace.iter().map(|span| &span.name).collect::<Vec<_>>()
            )
        };
        span
    };
    let request = named("POST /v1/chat/completions");
    assert_eq!(
        (hex(&request.parent_span_id).as_str(), request.kind),
        (client_span, SpanKind::Server as i32)
    );
    let facts = attributes(request);
    for (key, value) in [
        ("http.route", "/v1/chat/completions"),
        ("http.response.status_code", "200"),
        ("request_id", "req-1"),
        ("polylora.adapter", "json"),
    ] {
        assert_eq!(facts.get(key).map(String::as_str), Some(value), "{key}: {facts:?}");
    }
    let mut began = request.start_time_unix_nano;
    for stage in ["adapter", "render", "tokenize", "queue", "prefill", "decode"] {
        let span = named(stage);
        assert_eq!(hex(&span.parent_span_id), hex(&request.span_id), "{stage}");
        assert!(
            began <= span.start_time_unix_nano && span.end_time_unix_nano <= request.end_time_unix_nano,
            "{stage} is in order"
        );
        began = span.end_time_unix_nano;
    }
    assert_eq!(attributes(named("prefill"))["adapter"], "json");
    let decode = attributes(named("decode"));
    assert_eq!(decode["outcome"], "stop");
    assert!(decode["output_tokens"].parse::<u32>().unwrap() > 10, "{decode:?}");
    assert!(
        received.iter().all(|(_, span)| hex(&span.trace_id) != unrecorded),
        "the client does not record it"
    );
    let refused = received
        .iter()
        .map(|(_, span)| span)
        .find(|span| span.name == "POST /v1/completions")
        .unwrap();
    assert!(refused.parent_span_id.is_empty());
    assert_eq!(attributes(refused)["http.response.status_code"], "404");
}

#[test]
fn a_collector_that_is_not_there_does_not_stop_the_server() {
    // Nobody listens there, and nobody gets it who asks for any free port.
    let port = 1;
    let mut server = Server::start(&["--otlp-endpoint", &format!("http://127.0.0.1:{port}")]);
    server.generate(&[LIST_3], &[Some("json")]);
    server.signal("TERM");
    assert!(server.wait().success());
}
