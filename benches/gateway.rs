//! What the gateway costs, in parts and as a whole, over an engine that costs nothing.
//!
//!     cargo bench --bench gateway
//!
//! The whole is the router without sockets, on one thread: the difference between its two cases, by 256, is the cost of a token; the
//! first, less `encode`, that of a request. `examples/load_test.rs` measures with sockets, streams and other servers.

use std::{hint::black_box, sync::Arc};

use axum::{Router, body::Body, http::Request};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures::StreamExt;
use polylora::{
    app::app,
    auth::SourcePolicy,
    chat_template::ChatInput,
    demo,
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
fn router(adapters: usize) -> Router {
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
    app(Arc::new(demo::gateway(Arc::new(engine), SourcePolicy::Any)))
}

fn whole(criterion: &mut Criterion) {
    let router = router(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("whole");
    for (name, max_tokens, stream) in [
        ("1 token, streamed", 1, true),
        ("257 tokens, streamed", 257, true),
        ("1 token", 1, false),
        ("257 tokens", 257, false),
    ] {
        let body = request(max_tokens, stream).to_string();
        let ask = || async {
            let request = Request::post("/v1/chat/completions").header("content-type", "application/json");
            let request = request.body(Body::from(body.clone())).expect("a request");
            let Ok(response) = router.clone().oneshot(request).await;
            assert_eq!(response.status(), 200);
            let mut body = response.into_body().into_data_stream();
            let mut bytes = 0;
            while let Some(piece) = body.next().await {
                bytes += piece.expect("a piece").len();
            }
            bytes
        };
        group.bench_function(name, |bencher| bencher.iter(|| runtime.block_on(ask())));
    }
    group.finish();
}

criterion_group!(benches, parts, whole);
criterion_main!(benches);
