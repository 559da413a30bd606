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
    app::{Gateway, app},
    auth::{AdapterSources, SourcePolicy},
    chat_template::ChatInput,
    demo,
    hub::{Hub, HubConfig},
    prompt::PromptProcessor,
    protocol::chat::{ChatChunk, ChatChunkChoice, ChatDelta, ChatRequest},
    routing::ServedModel,
    stream::sse_event,
    tokenizer::Detokenizer,
};
use polylora_engine::{FileSource, MockEngine, decoder::DecoderConfig, mock::Script};
use serde_json::{Value, json};
use tower::ServiceExt;

const ANSWER: &str = "1. France: Paris\n2. Peru: Lima\n3. Japan: Tokyo\n";

fn prompt_processor() -> PromptProcessor {
    PromptProcessor::from_files(&FileSource::Embedded(demo::BASE), None).expect("the demo's files")
}

fn request(max_tokens: usize, stream: bool) -> Value {
    json!({"model": "demo:json", "messages": [{"role": "user", "content": "List 3 countries and their capitals."}],
        "temperature": 0, "max_tokens": max_tokens, "ignore_eos": true, "stream": stream})
}

fn parts(criterion: &mut Criterion) {
    let prompt = prompt_processor();
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
    group.bench_function("write an event", |bencher| bencher.iter(|| sse_event(black_box(&chunk))));
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

fn router() -> Router {
    let files = FileSource::Embedded(demo::BASE);
    let config = DecoderConfig::from_json(&files.open("config.json").expect("a config"), None).expect("a config");
    let prompt = prompt_processor();
    let answer = prompt.tokenizer().encode(ANSWER, false).expect("text");
    let engine = MockEngine::builder()
        .describe(|description| {
            description.vocab_size = config.vocab_size;
            description.eos_token_ids.clone_from(&config.eos_token_ids);
            description.context_length = 2048;
        })
        .reply(move |request| {
            let tokens = request.sampling.max_tokens as usize;
            Script::tokens(answer.iter().copied().cycle().take(tokens))
        })
        .forget_ended()
        .build();
    engine.add_adapter("json");
    let hub = Hub::new(HubConfig {
        endpoint: None,
        cache_dir: std::env::temp_dir().join("polylora-bench"),
        token: None,
        offline: true,
        progress: false,
    });
    let sources = Arc::new(AdapterSources::new(hub, SourcePolicy::Any));
    let served = ServedModel {
        names: vec!["demo".to_owned()],
        path: "mock".to_owned(),
    };
    app(Arc::new(Gateway::new(Arc::new(engine), prompt, served, sources)))
}

fn whole(criterion: &mut Criterion) {
    let router = router();
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
