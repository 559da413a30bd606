//! What the gateway costs, in parts and as a whole, over an engine that costs nothing.
//!
//!     cargo bench --bench gateway
//!
//! The whole is the router without sockets, on one thread: the difference between its two cases, by 256, is the cost of a token; the
//! first, less `encode`, that of a request. `examples/load_test.rs` measures with sockets, streams and other servers.

use std::{hint::black_box, sync::Arc, time::Duration};

use axum::{Router, body::Body, http::Request};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures::StreamExt;
use polylora::{
    app::app,
    auth::SourcePolicy,
    chat_template::ChatInput,
    demo,
    metrics::{Metrics, MetricsConfig},
    protocol::chat::{ChatChunk, ChatChunkChoice, ChatDelta, ChatRequest},
    sse::SseEvents,
    tokenizer::Detokenizer,
};
use polylora_engine::mock::Script;
use serde_json::{Value, json};
use tower::ServiceExt;

const ANSWER: &str = "1. France: Paris\n2. Peru: Lima\n3. Japan: Tokyo\n";

fn request(max_tokens: usize, stream: bool) -> Value {
    json!({"model": "demo:json", "messages": [{"role": "user", "content": "List 3 countries and their capitals."}],
        "temperature": 0, "max_tokens": max_tokens, "ignore_eos": true, "stream": stream})
}

fn parts(criterion: &mut Criterion) {
    let prompt = demo::prompt_processor();
    let tokenizer = Arc::clone(prompt.tokenizer());
    let tokens: Vec<u32> = tokenizer.encode(ANSWER, false).expect("text").into_iter().cycle().take(1024).collect();

    let mut group = criterion.benchmark_group("parts");
    group.throughput(Throughput::Elements(tokens.len() as u64));
    group.bench_function("detokenize 1024 tokens", |bencher| {
        let mut text = String::new();
        bencher.iter(|| {
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), true, Vec::new());
            for &token in &tokens {
                text.clear();
                detokenizer.push(token, &mut text);
                black_box(&text);
            }
        });
    });
    group.throughput(Throughput::Elements(1));
    let chunk = ChatChunk {
        id: "chatcmpl-0123456789abcdef0123456789abcdef".into(),
        object: "chat.completion.chunk".into(),
        created: 1_700_000_000,
        model: "demo:json".into(),
        system_fingerprint: "fp_0123abcd".into(),
        choices: vec![ChatChunkChoice {
            index: 0,
            delta: ChatDelta {
                content: Some(" Paris".into()),
                ..ChatDelta::default()
            },
            logprobs: None,
            finish_reason: None,
            matched_stop: None,
        }],
        usage: None,
    };
    group.bench_function("write an event", |bencher| {
        bencher.iter(|| {
            let mut events = SseEvents::default();
            events.push(black_box(&chunk));
            events.take()
        });
    });
    let body = request(64, true).to_string();
    group.bench_function("read a request", |bencher| {
        bencher.iter(|| serde_json::from_str::<ChatRequest>(black_box(&body)).expect("a request"));
    });
    let messages = request(64, true)["messages"].as_array().expect("messages").clone();
    let render = || {
        prompt.render_chat(&ChatInput {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: None,
        })
    };
    let Ok(text) = render() else { panic!("the template does not render") };
    group.bench_function("render the template", |bencher| bencher.iter(render));
    group.bench_function("encode the prompt", |bencher| bencher.iter(|| tokenizer.encode(black_box(&text), false)));
    group.finish();
}

/// The gateway over an engine that answers at once, with `adapters` adapters.
fn router(adapters: usize, metrics: MetricsConfig) -> Router {
    let answer = demo::prompt_processor().tokenizer().encode(ANSWER, false).expect("text");
    let engine = demo::mock_engine()
        .reply(move |request| {
            let tokens = request.sampling.max_tokens as usize;
            Script::tokens(answer.iter().copied().cycle().take(tokens))
        })
        .forget_ended()
        .build();
    engine.add_adapter("json");
    (1..adapters).for_each(|number| engine.add_adapter(&format!("adapter-{number}")));
    let mut gateway = demo::gateway(Arc::new(engine), SourcePolicy::Any);
    gateway.metrics = Arc::new(Metrics::new(gateway.served.name(), gateway.engine.describe(), metrics));
    app(Arc::new(gateway))
}

/// Asks (with a body, if there is one), checks that it is answered well, and reads the answer to its end.
async fn ask(router: &Router, path: &str, body: &str) -> Vec<u8> {
    let method = if body.is_empty() { "GET" } else { "POST" };
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let request = request.body(Body::from(body.to_owned())).expect("a request");
    let Ok(response) = router.clone().oneshot(request).await;
    assert_eq!(response.status(), 200, "{path}");
    let mut pieces = response.into_body().into_data_stream();
    let mut answer = Vec::new();
    while let Some(piece) = pieces.next().await {
        answer.extend_from_slice(&piece.expect("a piece"));
    }
    answer
}

fn whole(criterion: &mut Criterion) {
    let router = router(1, MetricsConfig::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("whole");
    for (name, tokens, stream) in [
        ("1 token, streamed", 1, true),
        ("257 tokens, streamed", 257, true),
        ("1 token", 1, false),
        ("257 tokens", 257, false),
    ] {
        let body = request(tokens, stream).to_string();
        let ask = || runtime.block_on(ask(&router, "/v1/chat/completions", &body));
        let answer = String::from_utf8(ask()).expect("text");
        if stream {
            // One for the role, one for the end.
            assert_eq!(answer.matches("data: {").count(), tokens + 2, "{answer}");
            assert!(answer.ends_with("data: [DONE]\n\n"), "{answer}");
        } else {
            assert!(answer.contains(&format!("\"completion_tokens\":{tokens},")), "{answer}");
        }
        group.bench_function(name, |bencher| bencher.iter(ask));
    }
    group.finish();
}

/// `/metrics` of a server on which a hundred adapters have been asked for: with the long part as old as it may be, and written anew.
fn scrape(criterion: &mut Criterion) {
    const ADAPTERS: usize = 100;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("scrape");
    for (name, refresh) in [("long part cached", Duration::from_secs(3600)), ("all anew", Duration::ZERO)] {
        let config = MetricsConfig {
            max_adapter_labels: ADAPTERS,
            refresh,
        };
        let router = router(ADAPTERS, config);
        let text = runtime.block_on(async {
            for number in 0..ADAPTERS {
                let mut body = request(8, true);
                if number > 0 {
                    body["model"] = json!(format!("demo:adapter-{number}"));
                }
                ask(&router, "/v1/chat/completions", &body.to_string()).await;
            }
            ask(&router, "/metrics", "").await
        });
        let text = String::from_utf8(text).expect("text");
        for number in 1..ADAPTERS {
            let series = format!("polylora_requests_total{{adapter=\"adapter-{number}\"");
            assert!(text.contains(&series), "no {series} in {text}");
        }
        println!("scrape/{name}: {} lines, {} bytes", text.lines().count(), text.len());
        group.bench_function(name, |bencher| bencher.iter(|| runtime.block_on(ask(&router, "/metrics", ""))));
    }
    group.finish();
}

criterion_group!(benches, parts, whole, scrape);
criterion_main!(benches);
