//! The whole gateway over a [`MockEngine`]: real HTTP, JSON, templates and tokenizer (the demo model's), and an engine that costs nothing.
//!
//!     cargo run --example mock_server -- --port 30001 --output-tokens 64
//!
//! What is checked or measured against it is the gateway alone: schemathesis, generated clients, load tests. Its models are named as the
//! demo's. Every answer is the same text, cut or repeated to `--output-tokens` (or as a grammar allows), all of it at once; adapters load
//! from anywhere, nothing of them is read.
//!
//! `POST /floor` is what no gateway can do without: the same engine's events, each written as the bytes of a chunk that was made long
//! before, by the same axum and hyper on the same sockets. What an answer costs above that is the gateway's own work.

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::poll_fn,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use anyhow::anyhow;
use axum::{Json, Router, body::Body, http::StatusCode, response::Response, routing::post};
use bytes::Bytes;
use clap::Parser;
use polylora::{
    app::{Gateway, app},
    auth::{Auth, SourcePolicy},
    demo,
    server::{ServerSettings, bind, runtime, serve},
    sse::sse_response,
};
use polylora_engine::{
    GenerationRequest, InferenceEngine, LogprobsParams, SamplingParams, TokenEvent, TokenStream,
    mock::{Gate, Script, Step},
};

/// The server's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ANSWER: &str = "1. France: Paris\n2. Peru: Lima\n3. Japan: Tokyo\n";
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(about = "Serves the OpenAI API over an engine without a model")]
struct Args {
    /// Where to listen; 0 is a free port, printed at the start.
    #[arg(long, default_value_t = 30001)]
    port: u16,
    /// Tokens of an answer, before the one that ends it; a request's own bound still cuts it.
    #[arg(long, default_value_t = 16)]
    output_tokens: usize,
    /// Time between the tokens of every answer, as an engine takes it; all at once if not given. The first comes at once.
    #[arg(long)]
    token_interval_ms: Option<u64>,
    /// Prompt and output together.
    #[arg(long, default_value_t = 2048)]
    context_length: usize,
    /// Asked for as a bearer token, if given.
    #[arg(long)]
    api_key: Option<String>,
}

fn main() -> anyhow::Result<()> {
    runtime()?.block_on(async { tokio::spawn(run()).await? })
}

async fn run() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .init();
    let args = Args::parse();
    let (engine, gateway) = gateway(&args)?;
    let (listener, address) = bind("127.0.0.1", args.port)
        .await
        .and_then(|socket| socket.listen())
        .map_err(|error| anyhow!(error))?;
    println!("polylora's gateway over a mock engine on http://{address}");

    let settings = ServerSettings {
        tls: None,
        read_timeout: TIMEOUT,
        write_timeout: TIMEOUT,
    };
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let stopped = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    let router = app(Arc::new(gateway)).merge(floor(engine));
    serve(listener, router, settings, stopped, async {}).await;
    Ok(())
}

fn gateway(args: &Args) -> anyhow::Result<(Arc<dyn InferenceEngine>, Gateway)> {
    let answer = demo::prompt_processor().tokenizer().encode(ANSWER, false)?;
    let answer: Vec<u32> = answer.iter().copied().cycle().take(args.output_tokens).collect();
    let context_length = args.context_length;
    let clock = args.token_interval_ms.map(|interval| Clock::start(Duration::from_millis(interval)));
    let engine = demo::mock_engine()
        .describe(|description| description.context_length = context_length)
        .reply(move |request| {
            let tokens = &answer[..answer.len().min(request.sampling.max_tokens as usize)];
            match &clock {
                Some(clock) => clock.paced(tokens),
                None => Script::tokens(tokens.iter().copied()),
            }
        })
        .forget_ended()
        .build();
    for adapter in demo::ADAPTERS {
        engine.add_adapter(adapter.name);
    }
    let engine: Arc<dyn InferenceEngine> = Arc::new(engine);
    let mut gateway = demo::gateway(Arc::clone(&engine), SourcePolicy::Any);
    if let Some(key) = &args.api_key {
        gateway.auth = Auth::new(Some(key), None, Vec::new());
    }
    Ok((engine, gateway))
}

/// All that the floor reads of a request.
#[derive(serde::Deserialize)]
struct FloorRequest {
    max_tokens: u32,
}

fn floor(engine: Arc<dyn InferenceEngine>) -> Router {
    let answer = move |Json(request): Json<FloorRequest>| async move {
        let tokens = engine.submit(GenerationRequest {
            prompt_tokens: vec![1; 40],
            sampling: SamplingParams {
                max_tokens: request.max_tokens,
                ..SamplingParams::default()
            },
            adapter: None,
            logprobs: LogprobsParams::default(),
            constraint: None,
            fairness_key: "".into(),
        });
        let events = |tokens| {
            futures::stream::unfold(tokens, |mut tokens| async {
                ready_events(&mut tokens).await.map(|bytes| (bytes, tokens))
            })
        };
        match tokens {
            Ok(tokens) => sse_response(Body::from_stream(events(tokens))),
            Err(error) => {
                let mut refused = Response::new(Body::from(error.to_string()));
                *refused.status_mut() = StatusCode::BAD_REQUEST;
                refused
            }
        }
    };
    Router::new().route("/floor", post(answer))
}

/// The bytes of all events that are there: as many as the gateway's.
async fn ready_events(tokens: &mut TokenStream) -> Option<Result<Bytes, Infallible>> {
    const CHUNK: &[u8] = b"data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\
        \"model\":\"demo:json\",\"system_fingerprint\":\"fp_0123abcd-4567cdef\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Tokyo\"},\
        \"logprobs\":null,\"finish_reason\":null}]}\n\n";
    let mut bytes = Vec::new();
    poll_fn(|context| {
        loop {
            match tokens.poll_next(context) {
                Poll::Ready(Some(event)) => {
                    bytes.extend_from_slice(CHUNK);
                    if matches!(event, TokenEvent::Finished { .. }) {
                        bytes.extend_from_slice(b"data: [DONE]\n\n");
                    }
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending if bytes.is_empty() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(()),
            }
        }
    })
    .await;
    (!bytes.is_empty()).then(|| Ok(bytes.into()))
}

/// Steps of an engine: one token of every answer at each tick.
struct Clock {
    /// The gates of the coming ticks.
    coming: Arc<Mutex<VecDeque<Gate>>>,
}

impl Clock {
    fn start(interval: Duration) -> Self {
        let coming: Arc<Mutex<VecDeque<Gate>>> = Arc::default();
        let gates = Arc::clone(&coming);
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(interval);
                let due = gates.lock().expect("nothing panics with it").pop_front();
                due.iter().for_each(Gate::open);
            }
        });
        Self { coming }
    }

    fn paced(&self, answer: &[u32]) -> Script {
        let mut coming = self.coming.lock().expect("nothing panics with it");
        while coming.len() < answer.len() {
            coming.push_back(Gate::new());
        }
        let mut script = Script::default();
        for (index, &token) in answer.iter().enumerate() {
            if index > 0 {
                script = script.then(Step::Wait(coming[index - 1].clone()));
            }
            script = script.then(Step::Token(token));
        }
        script
    }
}
