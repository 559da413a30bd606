//! The whole gateway over a [`MockEngine`]: real HTTP, JSON, templates and tokenizer (the demo model's), and an engine that costs nothing.
//!
//!     cargo run --example mock_server -- --port 30001 --output-tokens 64
//!
//! What is checked or measured against it is the gateway alone: schemathesis, generated clients, load tests. Its models are named as the
//! demo's. Every answer is the same text, cut or repeated to `--output-tokens` (or as a grammar allows), all of it at once; adapters load
//! from anywhere, nothing of them is read.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::anyhow;
use clap::Parser;
use polylora::{
    app::{Gateway, app},
    auth::{AdapterSources, Auth, SourcePolicy},
    demo,
    hub::{Hub, HubConfig},
    prompt::PromptProcessor,
    routing::ServedModel,
    server::{ServerSettings, bind, serve},
};
use polylora_engine::{
    FileSource, InferenceEngine, MockEngine,
    decoder::DecoderConfig,
    mock::{Gate, Script, Step},
};

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

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .init();
    let args = Args::parse();
    let gateway = gateway(&args).await?;
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
    serve(listener, app(Arc::new(gateway)), settings, stopped, async {}).await;
    Ok(())
}

async fn gateway(args: &Args) -> anyhow::Result<Gateway> {
    let files = FileSource::Embedded(demo::BASE);
    let config = DecoderConfig::from_json(&files.open("config.json")?, None)?;
    let prompt = PromptProcessor::from_files(&files, None)?;
    let answer = prompt
        .encode(ANSWER.to_owned(), false)
        .await
        .map_err(|error| anyhow!("{}", error.message().to_owned()))?;
    let answer: Vec<u32> = answer.iter().copied().cycle().take(args.output_tokens).collect();

    let context_length = args.context_length;
    let clock = args.token_interval_ms.map(|interval| Clock::start(Duration::from_millis(interval)));
    let engine = MockEngine::builder()
        .describe(|description| {
            description.vocab_size = config.vocab_size;
            description.eos_token_ids.clone_from(&config.eos_token_ids);
            description.context_length = context_length;
        })
        .reply(move |_| match &clock {
            Some(clock) => clock.paced(&answer),
            None => Script::tokens(answer.iter().copied()),
        })
        .forget_ended()
        .build();
    for adapter in demo::ADAPTERS {
        engine.add_adapter(adapter.name);
    }
    let engine: Arc<dyn InferenceEngine> = Arc::new(engine);

    let cache_dir = std::env::temp_dir().join("polylora-mock-server");
    let hub = Hub::new(HubConfig {
        endpoint: None,
        cache_dir,
        token: None,
        offline: true,
        progress: false,
    });
    let sources = Arc::new(AdapterSources::new(hub, SourcePolicy::Any));
    let served = ServedModel {
        names: vec!["demo".to_owned()],
        path: "mock".to_owned(),
    };
    let mut gateway = Gateway::new(engine, prompt, served, sources);
    if let Some(key) = &args.api_key {
        gateway.auth = Auth::new(Some(key), None, Vec::new());
    }
    Ok(gateway)
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
