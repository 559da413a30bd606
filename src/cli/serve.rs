//! `polylora serve`: settings → model files → tokenizer → engine → adapters → routes, until a signal; then drain.

use std::{
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use polylora_engine::{
    FileSource, InferenceEngine, LoadRequest,
    weights::{Dtype as StoredDtype, ModelWeights},
};
use tokio::net::TcpListener;

use super::{
    engine::{BuiltEngine, EngineInputs, build},
    kept::{RegisteredNames, changed_paths, restore_adapters, restore_aliases, restore_pins},
    lora_dirs::LoraDirs,
};
use crate::{
    aliases::Aliases,
    app::{Gateway, app},
    auth::{AdapterSources, Auth},
    config::{Config, Dtype, LoadFormat, LoraPath, ModelSource},
    demo,
    hub::{Hub, HubId},
    lifecycle::NameLocks,
    metrics::{Metrics, MetricsConfig},
    prompt::PromptProcessor,
    pushed::{PushLimits, PushedAdapters, remove_abandoned},
    routing::ServedModel,
    server::{ServerSettings, bind, load_tls, runtime, serve},
    state_dir::{Changes, RuntimeState},
    telemetry,
    text_side::{BaseText, OwnSides},
};

/// More than any machine has loader threads: none of them is idle at the start.
const LOADS_AT_ONCE: usize = 16;
/// How long connections may take to send their last bytes once every request has ended.
const LAST_BYTES: Duration = Duration::from_secs(5);
/// How long a server goes on after its device has failed: requests are told, and whoever looks every few seconds finds /health red. Then it
/// ends, so that whoever watches over it starts another.
const RED: Duration = Duration::from_secs(10);

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What stopped the start; after it, that the device failed.
pub fn run(config: Config) -> anyhow::Result<()> {
    // Dropped last: what was traced to the very end is sent then.
    let telemetry = telemetry::start(&config.log_level, config.log_format, config.otlp.as_ref())?;
    let server = run_server(config, telemetry.exports_traces());
    // On a thread of the runtime: from outside, who connects would wait behind every stream that has a token to send.
    runtime()?.block_on(async { tokio::spawn(server).await? })
}

async fn run_server(config: Config, traces: bool) -> anyhow::Result<()> {
    let began = Instant::now();
    // Whatever can't be had is found out before minutes go into loading.
    let socket = bind(&config.http.host, config.http.port).await.map_err(|error| anyhow!(error))?;
    let tls = config.http.tls.as_ref().map(load_tls).transpose().map_err(|error| anyhow!(error))?;
    // From here on a signal ends the start, too.
    let mut signals = Signals::listen()?;
    let start = load(config, traces);
    let loaded = tokio::select! {
        loaded = start => loaded?,
        () = signals.next() => return Ok(()),
    };
    let (listener, address) = socket.listen().map_err(|error| anyhow!(error))?;
    announce(&loaded, address, tls.is_some(), began.elapsed())?;

    let settings = ServerSettings {
        tls,
        read_timeout: loaded.http.read_timeout,
        write_timeout: loaded.http.write_timeout,
    };
    serve_until_signal(loaded, listener, settings, signals, RED).await
}

/// Everything that serving needs.
struct Loaded {
    gateway: Arc<Gateway>,
    http: crate::config::HttpConfig,
    /// What is served, for people.
    model: String,
    adapters: Vec<String>,
    /// Where more adapters may turn up.
    lora_dirs: Option<LoraDirs>,
    is_demo: bool,
}

async fn load(config: Config, traces: bool) -> anyhow::Result<Loaded> {
    let sources = Arc::new(AdapterSources::new(Hub::new(config.hub.clone()), config.source_policy.clone()));
    let runtime = open_state(config.state_dir.clone()).await?;
    let pushed = open_pushed(runtime.pushed_adapters(), config.push_limits).await?;
    let changes = runtime.changes();
    let hub = Hub::new(config.hub.clone());
    let model = config.model.clone();
    let files = blocking(move || model_files(&model, &hub)).await?;
    let chat_template = config.chat_template.as_ref().map(std::fs::read_to_string).transpose();
    let chat_template = chat_template.context("--chat-template")?;
    let is_dummy = config.load_format == LoadFormat::Dummy;
    let prompt_files = if is_dummy { tokenizer_files(&files) } else { files.clone() };
    let own_sides = Arc::new(OwnSides::default());
    let own = Arc::clone(&own_sides);
    let (prompt, base_text) = blocking(move || {
        let prompt = PromptProcessor::from_files(&prompt_files, chat_template.as_deref())?;
        let base_text = BaseText::new(&prompt_files, chat_template.as_deref(), prompt.clone(), own)?;
        Ok((prompt, base_text))
    })
    .await?;

    let lora_paths = config.lora.as_ref().map(|lora| lora.paths.clone()).unwrap_or_default();
    let lora_paths = changed_paths(lora_paths, &changes);
    let directories = config.lora.as_ref().map(|lora| lora.directories.clone()).unwrap_or_default();
    let (paths, by) = (lora_paths.clone(), Arc::clone(&sources));
    // Before the model is loaded, which may take minutes.
    let adapters = blocking(move || {
        let find = |path: LoraPath| {
            let began = Instant::now();
            let files = by.resolve_trusted(&path.path).with_context(|| path.flag())?;
            Ok(AdapterAtStart {
                path,
                files,
                finding: began.elapsed(),
            })
        };
        paths.into_iter().map(find).collect::<anyhow::Result<Vec<_>>>()
    })
    .await?;
    let Config {
        served_model_name,
        model,
        http,
        ..
    } = &config;
    let served = ServedModel {
        names: vec![served_model_name.clone()],
        path: match model {
            ModelSource::Demo => "demo".to_owned(),
            ModelSource::Path(path) => path.clone(),
        },
    };
    let (is_demo, http) = (*model == ModelSource::Demo, http.clone());
    let (cors_origins, owned_by) = (http.cors_origins.clone(), config.owned_by.clone());
    let max_adapter_labels = config.metrics_max_adapters;
    let given = adapters
        .iter()
        .map(|adapter| (adapter.path.clone(), adapter.files.clone()))
        .collect::<Vec<_>>();
    // A model of random weights has the demo's tokenizer, with which no adapter's agrees.
    let text = (!is_dummy).then(|| Arc::new(base_text));
    let (auth, built) = blocking(move || start_engine(config, &files, &given, text)).await?;
    let description = built.engine.describe();
    tracing::info!(
        architecture = description.architecture,
        device = description.device,
        dtype = description.dtype,
        weight_bytes = built.weight_bytes,
        kv_bytes = built.memory.kv_bytes,
        kv_tokens = description.num_blocks * description.block_size,
        min_kv_tokens = description.min_blocks * description.block_size,
        adapter_bytes = built.memory.adapter_bytes,
        context_length = description.context_length,
        "the model is loaded"
    );
    let loads = load_adapters(built.engine.as_ref(), adapters).await?;
    let mut names: Vec<String> = lora_paths.into_iter().map(|path| path.name).collect();
    let aliases = Arc::new(Aliases::default());
    let name_locks = Arc::new(NameLocks::default());
    let lora_dirs = match built.engine.adapters() {
        Some(registry) => {
            let mut dirs = LoraDirs::new(Arc::clone(registry), Arc::clone(&aliases), Arc::clone(&name_locks), directories);
            let (registry, sources, runtime) = (Arc::clone(registry), Arc::clone(&sources), Arc::clone(&runtime));
            let (aliases, base_names) = (Arc::clone(&aliases), served.names.clone());
            let (dirs, added) = blocking(move || {
                let mut added = restore_adapters(&registry, &changes, &sources, runtime.pushed_adapters().as_deref());
                added.extend(dirs.scan().added);
                restore_pins(&registry, &changes);
                let names = RegisteredNames {
                    registry: &registry,
                    base_names: &base_names,
                };
                restore_aliases(&aliases, &changes, &names);
                Ok((dirs, added))
            })
            .await?;
            names.extend(added);
            Some(dirs)
        }
        None => {
            if changes != Changes::default() {
                tracing::warn!("LoRA is off: the adapters of --state-dir are not served");
            }
            None
        }
    };

    let engine: Arc<dyn InferenceEngine> = built.engine;
    let bounds = MetricsConfig {
        max_adapter_labels,
        ..MetricsConfig::default()
    };
    let metrics = Metrics::new(served.name(), engine.describe(), bounds);
    for finding in loads {
        metrics.adapter_fetched(finding);
    }
    let model = if is_demo {
        format!("{} (the embedded demo model)", served.name())
    } else {
        format!("{} ({})", served.name(), served.path)
    };
    let mut gateway = Gateway::new(engine, prompt, served, sources);
    gateway.own_sides = own_sides;
    gateway.metrics = Arc::new(metrics);
    gateway.traces = traces;
    gateway.auth = auth;
    gateway.aliases = aliases;
    gateway.name_locks = name_locks;
    gateway.runtime = runtime;
    gateway.pushed = Arc::new(pushed);
    gateway.cors_origins = cors_origins;
    gateway.owned_by = owned_by;
    gateway.limits.max_body_bytes = http.max_body_bytes;
    gateway.limits.body_timeout = http.read_timeout;
    Ok(Loaded {
        gateway: Arc::new(gateway),
        http,
        model,
        adapters: names,
        lora_dirs,
        is_demo,
    })
}

/// What was changed at run time before.
async fn open_state(directory: Option<PathBuf>) -> anyhow::Result<Arc<RuntimeState>> {
    let Some(directory) = directory else {
        return Ok(Arc::default());
    };
    let (state, damage) = blocking(move || Ok(RuntimeState::open(&directory)?)).await?;
    if let Some(damage) = damage {
        tracing::warn!(damage, "the state is damaged: nothing of it is used");
    }
    Ok(Arc::new(state))
}

/// Where pushed adapters are kept: in the state folder, if there is one.
async fn open_pushed(folder: Option<PathBuf>, limits: PushLimits) -> anyhow::Result<PushedAdapters> {
    blocking(move || {
        remove_abandoned();
        Ok(match folder {
            Some(folder) => PushedAdapters::in_folder(folder, limits),
            None => PushedAdapters::temporary(limits),
        })
    })
    .await
}

/// Runs what blocks where it may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a panic while starting")?
}

/// A folder, the Hub, or the binary.
fn model_files(model: &ModelSource, hub: &Hub) -> anyhow::Result<FileSource> {
    let path = match model {
        ModelSource::Demo => {
            anyhow::ensure!(
                !demo::BASE.is_empty(),
                "this binary was built without the demo model; name one with --model-path"
            );
            return Ok(FileSource::Embedded(demo::BASE));
        }
        ModelSource::Path(path) => path,
    };
    if std::path::Path::new(path).is_dir() {
        return Ok(FileSource::Directory(path.into()));
    }
    let id: HubId = path
        .parse()
        .map_err(|_| anyhow!("--model-path {path:?} is neither a folder nor org/name[@revision] on the Hub"))?;
    let folder = hub.fetch_model(&id).with_context(|| format!("--model-path {path}"))?;
    Ok(FileSource::Directory(folder))
}

/// The demo model's tokenizer for a folder that has none: what a model of random weights says means nothing anyway.
fn tokenizer_files(files: &FileSource) -> FileSource {
    if files.contains("tokenizer.json") || demo::BASE.is_empty() {
        return files.clone();
    }
    tracing::info!("--load-format dummy: no tokenizer.json in --model-path, so the demo model's tokenizer is used");
    FileSource::Embedded(demo::BASE)
}

fn start_engine(
    config: Config,
    files: &FileSource,
    given: &[(LoraPath, FileSource)],
    text: Option<Arc<BaseText>>,
) -> anyhow::Result<(Auth, BuiltEngine)> {
    let what = |what: &'static str| move || what;
    let decoder = super::adapters::read_decoder_config(files).with_context(what("--model-path"))?;
    let weights = match config.load_format {
        LoadFormat::Auto => ModelWeights::open(files).with_context(what("--model-path"))?,
        LoadFormat::Dummy if config.dtype == Dtype::Float32 => ModelWeights::random(0, StoredDtype::F32),
        LoadFormat::Dummy => ModelWeights::random(0, StoredDtype::Bf16),
    };
    weights.check(&decoder).with_context(what("--model-path"))?;
    let lora = config.lora.as_ref().map(|lora| lora.engine_config(given, &decoder)).transpose()?;
    let built = build(EngineInputs {
        weights: &weights,
        files: (config.load_format == LoadFormat::Auto).then(|| files.clone()),
        decoder,
        dtype: config.dtype,
        context_length: config.context_length,
        settings: &config.engine,
        lora,
        base_names: vec![config.served_model_name.clone()],
        text,
    })?;
    Ok((config.auth, built))
}

/// One of `--lora-paths` and its files.
struct AdapterAtStart {
    path: LoraPath,
    files: FileSource,
    /// How long it took to find them, which may have been a download.
    finding: Duration,
}

/// Loads the adapters, several at a time, and says how long each took to be found. The first that can't be loaded stops the start.
async fn load_adapters(engine: &dyn InferenceEngine, adapters: Vec<AdapterAtStart>) -> anyhow::Result<Vec<Duration>> {
    let loads = adapters.into_iter().map(|AdapterAtStart { path, files, finding }| async move {
        let began = Instant::now();
        let request = LoadRequest {
            name: path.name.clone(),
            files,
            source: path.path.clone(),
            pinned: path.pinned,
            replace: false,
            expected_version: None,
        };
        let info = engine.load_adapter(request).await.with_context(|| path.flag())?;
        tracing::info!(
            name = path.name,
            from = path.path,
            lora_rank = info.max_lora_rank,
            bytes = info.bytes,
            pinned = path.pinned,
            seconds = (finding + began.elapsed()).as_secs_f64(),
            "loaded an adapter"
        );
        anyhow::Ok(finding)
    });
    stream::iter(loads).buffered(LOADS_AT_ONCE).try_collect().await
}

/// Serves; after the first signal drains, after the second gives up at once. When the device fails it goes on for `red`.
///
/// # Errors
/// The device failed.
async fn serve_until_signal(
    loaded: Loaded,
    listener: TcpListener,
    settings: ServerSettings,
    mut signals: Signals,
    red: Duration,
) -> anyhow::Result<()> {
    let engine = Arc::clone(&loaded.gateway.engine);
    let drain_timeout = loaded.http.drain_timeout;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (drained, is_drained) = tokio::sync::oneshot::channel::<()>();
    let wait = |receiver: tokio::sync::oneshot::Receiver<()>| async {
        // Sent or dropped: both mean that it is time.
        let _ = receiver.await;
    };
    let server = serve(listener, app(loaded.gateway), settings, wait(stopped), wait(is_drained));
    let drain = async {
        signals.next().await;
        tracing::info!(
            seconds = drain_timeout.as_secs_f64(),
            "stopping: no new requests; those that run may finish"
        );
        drop(stop);
        tokio::select! {
            () = engine.shutdown(drain_timeout) => tokio::time::sleep(LAST_BYTES).await,
            () = signals.next() => tracing::info!("a second signal: stopping at once"),
        }
        drop(drained);
    };
    let watch = async {
        match loaded.lora_dirs {
            Some(dirs) => dirs.watch().await,
            None => std::future::pending().await,
        }
    };
    let failure = async {
        let reason = engine.failed().await;
        tracing::error!(
            reason,
            seconds = red.as_secs_f64(),
            "the device has failed: /health is red, and the server ends"
        );
        tokio::time::sleep(red).await;
    };
    let mut server = std::pin::pin!(server);
    tokio::select! {
        () = &mut server => {}
        () = drain => server.await,
        () = watch => {}
        () = failure => {}
    }
    // Also if it failed while the last requests were waited for.
    if let Some(reason) = engine.failed().now_or_never() {
        bail!("the device has failed: {reason}");
    }
    tracing::info!("stopped");
    Ok(())
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Says on standard output what is served, with a line to paste.
fn announce(loaded: &Loaded, address: SocketAddr, is_tls: bool, took: Duration) -> anyhow::Result<()> {
    let url = base_url(address, is_tls);
    tracing::info!(%url, model = loaded.model, adapters = loaded.adapters.len(), seconds = took.as_secs_f64(), "ready");
    let mut out = std::io::stdout().lock();
    write!(out, "{}", greeting(loaded, &url, took))?;
    out.flush()?;
    Ok(())
}

/// The URL that reaches the server from this machine.
fn base_url(address: SocketAddr, is_tls: bool) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        std::net::IpAddr::V6(ip) => format!("[{ip}]"),
        ip => ip.to_string(),
    };
    format!("{}://{host}:{}", if is_tls { "https" } else { "http" }, address.port())
}

fn greeting(loaded: &Loaded, url: &str, took: Duration) -> String {
    const MOST_NAMES: usize = 16;
    let names = &loaded.adapters;
    let mut text = format!(
        "polylora {} serves {} on {url} after {:.2} s\n",
        env!("CARGO_PKG_VERSION"),
        loaded.model,
        took.as_secs_f64()
    );
    if !names.is_empty() {
        let more = if names.len() > MOST_NAMES {
            format!(", and {} more", names.len() - MOST_NAMES)
        } else {
            String::new()
        };
        let shown = &names[..names.len().min(MOST_NAMES)];
        text.push_str(&format!("{} adapters: {}{more}\n", names.len(), shown.join(", ")));
    }
    let base = loaded.gateway.served.name();
    let model = names.first().map_or_else(|| base.to_owned(), |name| format!("{base}:{name}"));
    let question = if loaded.is_demo {
        "List 3 countries and their capitals."
    } else {
        "Hello!"
    };
    let key = if loaded.gateway.auth.is_enabled() {
        " -H 'Authorization: Bearer YOUR_KEY'"
    } else {
        ""
    };
    let insecure = if url.starts_with("https") { " --insecure" } else { "" };
    let body = serde_json::json!({"model": model, "messages": [{"role": "user", "content": question}]});
    // Names are free text: a quote must not end the shell's.
    let body = body.to_string().replace('\'', "'\\''");
    text.push_str(&format!(
        "\n  curl{insecure} {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n\n"
    ));
    text
}

#[cfg(test)]
mod tests {
    use polylora_engine::MockEngine;

    use super::*;
    use crate::config::{Command, Environment};

    /// The demo's server on a free port, over an engine that fails when it is told to.
    async fn start(red: Duration) -> (Arc<MockEngine>, String, tokio::task::JoinHandle<anyhow::Result<()>>) {
        let flags = ["polylora", "serve", "--port", "0", "--num-threads", "1"].map(Into::into);
        let Ok(Command::Serve(config)) = crate::config::parse(flags, &Environment::default()) else {
            panic!("not serve")
        };
        let mut loaded = load(*config, false).await.unwrap();
        let engine = Arc::new(MockEngine::default());
        Arc::get_mut(&mut loaded.gateway).unwrap().engine = engine.clone();
        let settings = ServerSettings {
            tls: None,
            read_timeout: loaded.http.read_timeout,
            write_timeout: loaded.http.write_timeout,
        };
        let (listener, address) = bind("127.0.0.1", 0).await.unwrap().listen().unwrap();
        let signals = Signals::listen().unwrap();
        let server = tokio::spawn(serve_until_signal(loaded, listener, settings, signals, red));
        (engine, format!("http://{address}/health"), server)
    }

    #[tokio::test]
    async fn a_failed_device_turns_health_red_and_ends_the_server_with_an_error() {
        let (engine, health, server) = start(Duration::from_secs(3600)).await;
        assert_eq!(reqwest::get(&health).await.unwrap().status(), 200);
        engine.set_healthy(false);
        for _ in 0..3 {
            let answer = reqwest::get(&health).await.unwrap();
            assert_eq!(answer.status(), 503);
            assert!(answer.text().await.unwrap().contains("the engine has failed"));
        }
        assert!(!server.is_finished(), "it is red for a while");
        server.abort();

        let (engine, health, server) = start(Duration::ZERO).await;
        assert_eq!(reqwest::get(&health).await.unwrap().status(), 200);
        engine.set_healthy(false);
        let error = server.await.unwrap().unwrap_err().to_string();
        assert!(error.starts_with("the device has failed: "), "{error}");
    }
}
