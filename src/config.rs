//! Every setting, and the only code that reads flags, the environment and settings files.
//!
//! [`parse`] gives a [`Command`] whose settings are typed and checked; an error names the flag. A flag wins over its environment
//! variable (`POLYLORA_` and the flag's name), which wins over the settings file (`--config`), which wins over the default.
//! Names and meanings are SGLang's where it has the setting.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, parser::ValueSource};
use polylora_engine::EvictionPolicy;

use crate::{
    auth::{Auth, SourcePolicy, read_keys_file},
    cli::{adapters::AdaptersArgs, bench::BenchArgs},
    hub::HubConfig,
    pushed::PushLimits,
};

/// One base model in memory, thousands of LoRA adapters beside it, any mix of them in one batch, behind the OpenAI API.
///
/// Without a command it serves; without a model it serves the small demo model that it carries.
#[derive(Debug, Parser)]
#[command(name = "polylora", version, arg_required_else_help = false)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Serve a model and its adapters over HTTP (the default).
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Box<ServeArgs>),
    /// Measure the engine itself, without HTTP: throughput and step times over a mix of adapters.
    Bench(Box<BenchArgs>),
    /// List, load, unload, pin and alias the adapters of a running server; inspect adapter files without one.
    Adapters(AdaptersArgs),
    /// Print the SHA-256 of an API key read from standard input, for the keys file.
    HashKey,
}

const SERVE_EXAMPLES: &str = "\
Examples:
  polylora serve
      The demo model and its adapters on 127.0.0.1:30000.
  polylora serve --model-path ./Llama-3.1-8B-Instruct --lora-paths sql=./adapters/sql json=./adapters/json
      A model and two adapters; clients say model=\"Llama-3.1-8B-Instruct:sql\", or just \"sql\".
  polylora serve --model-path org/model@v1 --lora-paths '{\"lora_name\":\"a\",\"lora_path\":\"org/adapter\",\"pinned\":true}'
      From the Hub; adapter a is pinned.
  polylora serve --config polylora.toml
      Settings from a file: keys are the flags' names, with - or _.";

/// What the program was asked to do.
#[derive(Debug)]
pub enum Command {
    /// Serve.
    Serve(Box<Config>),
    /// Measure.
    Bench(Box<BenchArgs>),
    /// Manage adapters.
    Adapters(AdaptersArgs),
    /// Hash a key.
    HashKey,
}

#[derive(Args, Debug)]
struct ServeArgs {
    /// Settings from a TOML file; its keys are the names of these flags. A key that is no flag is an error.
    #[arg(long, value_name = "FILE", help_heading = "General")]
    config: Option<PathBuf>,
    /// What is logged: error, warn (or warning), info, debug, trace, or a filter such as `polylora=debug,info`.
    #[arg(long, default_value = "info", value_name = "FILTER", help_heading = "General")]
    log_level: String,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT", help_heading = "General")]
    log_format: LogFormat,
    /// An OpenTelemetry collector that traces are sent to (OTLP over HTTP, protobuf; /v1/traces is added): a span for each request and each
    /// of its stages, in the trace that a request's `traceparent` names. Unset: OTEL_EXPORTER_OTLP_ENDPOINT, else none.
    #[arg(long, value_name = "URL", help_heading = "General")]
    otlp_endpoint: Option<String>,

    /// The base model: a folder in Hugging Face layout, or org/name[@revision] on the Hub. Unset: the demo model in the binary.
    #[arg(long, alias = "model", value_name = "PATH", help_heading = "Model")]
    model_path: Option<String>,
    /// The name that clients use for the base model. Unset: the last part of --model-path (`demo` for the demo model).
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    served_model_name: Option<String>,
    /// What the weights are read from. `dummy` needs no more of --model-path than its config.json: random weights, made on the device, to
    /// measure a size without its files. Without a tokenizer there, the demo model's serves.
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto, value_name = "FORMAT", help_heading = "Model")]
    load_format: LoadFormat,
    /// `owned_by` of the models that /v1/models lists. Some routers tell by it what they speak to: `vllm` and `sglang` make them use these
    /// engines' routes.
    #[arg(long, default_value = "polylora", value_name = "NAME", help_heading = "Model")]
    owned_by: String,
    /// What is computed and stored in. `auto`: the model's own type, where the device is fast in it.
    #[arg(long, value_enum, default_value_t = Dtype::Auto, value_name = "DTYPE", help_heading = "Model")]
    dtype: Dtype,
    /// Most tokens of prompt and output together. Unset: what the model was made for.
    #[arg(long, alias = "max-model-len", value_name = "TOKENS", help_heading = "Model")]
    context_length: Option<usize>,
    /// A chat template (Jinja) in place of the model's own.
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    chat_template: Option<PathBuf>,

    /// The address to listen on.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS", help_heading = "Network")]
    host: String,
    /// The port to listen on; 0 takes a free one and prints it.
    #[arg(long, default_value_t = 30000, value_name = "PORT", help_heading = "Network")]
    port: u16,
    /// A certificate chain (PEM): serve HTTPS. Needs --ssl-keyfile.
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    ssl_certfile: Option<PathBuf>,
    /// The private key (PEM) of --ssl-certfile.
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    ssl_keyfile: Option<PathBuf>,
    /// Browser origins that may call the API (CORS); repeatable, `*` for all. Unset: none.
    #[arg(long, value_name = "ORIGIN", help_heading = "Network")]
    cors_origin: Vec<String>,
    /// Largest request body accepted.
    #[arg(long, default_value = "32MiB", value_name = "SIZE", help_heading = "Network")]
    max_body_size: ByteSize,
    /// A client must have sent its request's head within this time, and its body within this time after; an idle connection
    /// is closed after it.
    #[arg(long, default_value = "60", value_name = "SECONDS", value_parser = parse_seconds, help_heading = "Network")]
    read_timeout: Duration,
    /// A client that takes none of the bytes sent to it for this time is cut off, and its request ends.
    #[arg(long, default_value = "60", value_name = "SECONDS", value_parser = parse_seconds, help_heading = "Network")]
    write_timeout: Duration,
    /// After SIGTERM or SIGINT no request is taken; those that run have this time to finish.
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = parse_seconds, help_heading = "Network")]
    drain_timeout: Duration,

    /// Ask clients for this key (`Authorization: Bearer KEY`). Alone it also allows the admin routes.
    #[arg(long, value_name = "KEY", help_heading = "Access")]
    api_key: Option<String>,
    /// The key of the admin routes (load, unload, pin, flush, abort); --api-key then no longer allows them.
    #[arg(long, value_name = "KEY", help_heading = "Access")]
    admin_api_key: Option<String>,
    /// A TOML file of keys, each `[[keys]]` with name, sha256, role (user, admin), adapters (globs), base_model,
    /// requests_per_minute, tokens_per_minute, concurrent_requests. `polylora hash-key` makes the sha256.
    #[arg(long, value_name = "FILE", help_heading = "Access")]
    api_keys_file: Option<PathBuf>,
    /// A folder from which clients may load adapters; repeatable. With neither this nor --lora-hub-org, clients may name any path
    /// if the server listens on the loopback interface or asks for keys, else none.
    #[arg(long, value_name = "DIR", help_heading = "Access")]
    lora_root: Vec<PathBuf>,
    /// An organisation of the Hub from which clients may load adapters; repeatable, `*` for all.
    #[arg(long, value_name = "ORG", help_heading = "Access")]
    lora_hub_org: Vec<String>,

    /// Serve LoRA adapters. Unset: on if --lora-paths or --lora-dir is given, or with the demo model.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "LoRA")]
    enable_lora: Option<bool>,
    /// Adapters to load at start, mixed as needed: NAME=PATH, PATH (which is then also its name), or
    /// JSON {"lora_name":…,"lora_path":…,"pinned":true}. PATH is a folder or org/name[@revision] on the Hub.
    /// An adapter that can't be loaded stops the start.
    #[arg(long, num_args = 1.., value_name = "ADAPTER", help_heading = "LoRA")]
    lora_paths: Vec<LoraPath>,
    /// A folder of adapters; repeatable. Each subfolder is one, under its own name, read at its first use; what comes and goes is noticed
    /// while serving, within seconds. Of two with the same name, the one in the folder given first counts.
    #[arg(long, value_name = "DIR", help_heading = "LoRA")]
    lora_dir: Vec<PathBuf>,
    /// A folder that keeps what is changed at run time: adapters that were loaded or pushed, pins, aliases. They are there again after a
    /// restart, in place of what --lora-paths and --lora-dir say of the same names. Unset: they are forgotten.
    #[arg(long, value_name = "DIR", help_heading = "LoRA")]
    state_dir: Option<PathBuf>,
    /// Largest weights of an adapter that a client may push (POST /v1/adapters/NAME), all shards together.
    #[arg(long, default_value = "2GiB", value_name = "SIZE", help_heading = "LoRA")]
    max_push_size: ByteSize,
    /// Disk space of all pushed adapters together, in --state-dir or in a temporary folder; a push past it is refused (507).
    #[arg(long, default_value = "64GiB", value_name = "SIZE", help_heading = "LoRA")]
    max_pushed_size: ByteSize,
    /// Distinct adapters that one batch may have; the base model takes no place. At most one less may be pinned.
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "LoRA")]
    max_loras_per_batch: usize,
    /// Adapters kept in host memory; the least recently used unpinned one leaves. Unset: as many as are loaded. At least
    /// --max-loras-per-batch.
    #[arg(long, value_name = "N", help_heading = "LoRA")]
    max_loaded_loras: Option<usize>,
    /// Bytes of adapters kept in host memory, beside --max-loaded-loras: the least recently used unpinned ones leave. Combinations of
    /// adapters are included, and so is an estimate of what adapters' own tokenizers take; not the buffers that files are read into, of which
    /// eight are kept, of 1 GiB together at most. Unset: half of the memory that is free once the model is loaded; no bound on a system that does not
    /// tell it.
    #[arg(long, value_name = "SIZE", help_heading = "LoRA")]
    max_loaded_lora_bytes: Option<ByteSize>,
    /// Host memory that is kept page-locked for adapters still to be read, beyond what loaded ones have (CUDA only). Unset: room for 96 of rank 16 on
    /// every projection, at most a sixteenth of the memory.
    #[arg(long, value_name = "SIZE", value_parser = parse_size_or_zero, help_heading = "LoRA")]
    lora_host_reserve_bytes: Option<ByteSize>,
    /// Which adapter leaves device memory first: the one used longest ago, or the one that came first.
    #[arg(long, value_enum, default_value_t = LoraEviction::Lru, value_name = "POLICY", help_heading = "LoRA")]
    lora_eviction_policy: LoraEviction,
    /// Largest adapter rank accepted. Unset: the largest of the adapters of --lora-paths; without these, or with --lora-dir, any that
    /// the device takes (CUDA: 256), since memory is taken by an adapter's own rank.
    #[arg(long, value_name = "RANK", help_heading = "LoRA")]
    max_lora_rank: Option<u32>,
    /// Modules that adapters may change: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head
    /// (qkv_proj and gate_up_proj stand for their parts), or `all`. Unset: those of the adapters of --lora-paths; without these, or with
    /// --lora-dir, all.
    #[arg(long, num_args = 1.., value_name = "MODULE", help_heading = "LoRA")]
    lora_target_modules: Vec<String>,

    /// Where the model runs. `auto`: the first CUDA device if there is one and this binary was built with the `cuda` feature.
    #[arg(long, value_enum, default_value_t = Device::Auto, value_name = "DEVICE", help_heading = "Engine")]
    device: Device,
    /// CPU threads that compute. Unset: one per core.
    #[arg(long, value_name = "N", help_heading = "Engine")]
    num_threads: Option<usize>,
    /// Memory for the KV cache and for adapters on the device: a fraction of the device's memory, weights included (0.85), or a
    /// size (8GiB) without them. On CUDA they share it: adapters take what the cache does not need, all but one sequence of
    /// --context-length. Unset: 0.85 on CUDA; on the CPU what --max-running-requests can use, at most a quarter of the free
    /// memory and 4GiB.
    #[arg(long, value_name = "FRACTION|SIZE", help_heading = "Engine")]
    mem_fraction_static: Option<MemoryBudget>,
    /// Most sequences in the batch. Unset: 64 on the CPU, 256 on CUDA.
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_running_requests: Option<usize>,
    /// Most requests waiting; one more is answered 503 with Retry-After at once.
    #[arg(long, default_value_t = 1024, value_name = "N", help_heading = "Engine")]
    max_queued_requests: usize,
    /// Most tokens computed in one step; longer prompts are prefilled in chunks, mixed with decoding. Unset: 512 on the CPU,
    /// 2048 on CUDA.
    #[arg(long, value_name = "TOKENS", help_heading = "Engine")]
    chunked_prefill_size: Option<usize>,
    /// Most prompt tokens in a step that also decodes: larger brings the first token of long prompts sooner, smaller keeps others' tokens
    /// coming evenly. Unset: 128 on the CPU, 1024 on CUDA.
    #[arg(long, value_name = "TOKENS", help_heading = "Engine")]
    mixed_prefill_size: Option<usize>,
    /// Where the GEMM algorithms are kept that a start on a CUDA device picked by measuring, so that the next start need not; `none`:
    /// nowhere. Unset: `polylora` in `$XDG_CACHE_HOME` or `~/.cache`.
    #[arg(long, value_name = "DIR", help_heading = "Engine")]
    gemm_tuning_dir: Option<PathBuf>,
    /// Positions per KV block.
    #[arg(long, alias = "page-size", default_value_t = 16, value_name = "TOKENS", help_heading = "Engine")]
    block_size: usize,
    /// Do not keep the KV of finished prompts for later ones that begin alike.
    #[arg(long, alias = "no-enable-prefix-caching", help_heading = "Engine")]
    disable_radix_cache: bool,
    /// Adapters with series of their own on /metrics: those with most traffic; the others share the label `(other)`.
    #[arg(long, default_value_t = 64, value_name = "N", help_heading = "Engine")]
    metrics_max_adapters: usize,

    /// For SGLang's command lines: which LoRA kernels. Here they are chosen by shape; the value has no effect.
    #[arg(long, value_enum, value_name = "BACKEND", help_heading = "Accepted for compatibility")]
    lora_backend: Option<LoraBackend>,
    /// For SGLang's command lines: chunk of its csgmv kernels (16 to 128, a power of two). Chosen by shape here; no effect.
    #[arg(long, value_name = "TOKENS", help_heading = "Accepted for compatibility")]
    max_lora_chunk_size: Option<u32>,
    /// Largest batch decoded through a CUDA graph. No effect on the CPU.
    #[arg(long, value_name = "N", help_heading = "Accepted for compatibility")]
    cuda_graph_max_bs: Option<usize>,
    /// GPUs that share one copy of the model. Only 1 is built so far; more is refused.
    #[arg(
        long,
        alias = "tensor-parallel-size",
        default_value_t = 1,
        value_name = "N",
        help_heading = "Accepted for compatibility"
    )]
    tp_size: usize,
    /// For SGLang's command lines: /metrics is always there; no effect.
    #[arg(long, help_heading = "Accepted for compatibility")]
    enable_metrics: bool,
    /// For SGLang's command lines: no model brings code here; no effect.
    #[arg(long, help_heading = "Accepted for compatibility")]
    trust_remote_code: bool,
}

/// The checked settings of `polylora serve`.
#[derive(Debug)]
pub struct Config {
    /// What is logged, as a `tracing` filter.
    pub log_level: String,
    /// How.
    pub log_format: LogFormat,
    /// Traces, if they are wanted.
    pub otlp: Option<OtlpSettings>,
    /// The base model.
    pub model: ModelSource,
    /// The base model's name for clients.
    pub served_model_name: String,
    /// Whose the models are said to be.
    pub owned_by: String,
    /// Where its weights come from.
    pub load_format: LoadFormat,
    /// What is computed in.
    pub dtype: Dtype,
    /// Bound on prompt and output together, if not the model's own.
    pub context_length: Option<usize>,
    /// A template in place of the model's.
    pub chat_template: Option<PathBuf>,
    /// HTTP.
    pub http: HttpConfig,
    /// Keys.
    pub auth: Auth,
    /// Which adapters clients may load.
    pub source_policy: SourcePolicy,
    /// Adapters; `None` is off.
    pub lora: Option<LoraSettings>,
    /// Keeps what is changed at run time.
    pub state_dir: Option<PathBuf>,
    /// How much may be pushed.
    pub push_limits: PushLimits,
    /// The engine.
    pub engine: EngineSettings,
    /// The Hub.
    pub hub: HubConfig,
    /// Adapters with metrics of their own.
    pub metrics_max_adapters: usize,
}

/// An OpenTelemetry collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpSettings {
    /// Its URL, without the path for traces.
    pub endpoint: String,
    /// What this server is called there.
    pub service_name: String,
}

/// Where the base model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// In the binary.
    Demo,
    /// A folder, or a Hub id.
    Path(String),
}

/// Settings of the HTTP server.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Address.
    pub host: String,
    /// Port; 0 is any.
    pub port: u16,
    /// Certificate chain and key, if HTTPS.
    pub tls: Option<TlsFiles>,
    /// Origins that browsers may call from.
    pub cors_origins: Vec<String>,
    /// Largest body.
    pub max_body_bytes: usize,
    /// To send a head, a body; and of an idle connection.
    pub read_timeout: Duration,
    /// Of a client that takes nothing.
    pub write_timeout: Duration,
    /// From the signal to the end of what still runs.
    pub drain_timeout: Duration,
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
}

/// Settings of adapters.
#[derive(Clone, Debug)]
pub struct LoraSettings {
    /// To load at start.
    pub paths: Vec<LoraPath>,
    /// Folders whose subfolders are adapters.
    pub directories: Vec<PathBuf>,
    /// Distinct adapters of one batch.
    pub max_loras_per_batch: usize,
    /// Adapters in host memory.
    pub max_loaded_loras: Option<usize>,
    /// Bytes of adapters in host memory.
    pub max_loaded_bytes: Option<usize>,
    /// Bytes kept ready for those still to be read.
    pub host_reserve_bytes: Option<usize>,
    /// Which leaves first.
    pub eviction: EvictionPolicy,
    /// Largest rank; `None` is to be inferred from the adapters of the start.
    pub max_lora_rank: Option<u32>,
    /// Modules.
    pub target_modules: TargetModules,
}

/// Modules that adapters may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// Those that the adapters of the start change.
    Inferred,
    /// All.
    All,
    /// These.
    Only(BTreeSet<String>),
}

/// Settings of the engine; what is unset depends on the device and the model.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Where.
    pub device: Device,
    /// CPU threads.
    pub num_threads: Option<usize>,
    /// For KV and adapters.
    pub memory: Option<MemoryBudget>,
    /// Sequences at once.
    pub max_running_requests: Option<usize>,
    /// Requests waiting.
    pub max_queued_requests: usize,
    /// Tokens of one step.
    pub chunked_prefill_size: Option<usize>,
    /// Of those, prompt tokens in a step that also decodes.
    pub mixed_prefill_size: Option<usize>,
    /// Positions of a block.
    pub block_size: usize,
    /// Whether prefixes are kept.
    pub prefix_caching: bool,
    /// Largest batch decoded through a graph.
    pub cuda_graph_max_bs: Option<usize>,
    /// Where GEMM algorithms that were measured are kept.
    pub gemm_tuning_dir: Option<PathBuf>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The model's safetensors files.
    #[value(alias = "safetensors")]
    Auto,
    /// Random numbers.
    Dummy,
}

/// What is computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// The model's own, where the device is fast in it.
    Auto,
    /// 32-bit.
    #[value(alias = "float")]
    Float32,
    /// 16-bit, 8 of them exponent.
    #[value(alias = "bf16")]
    Bfloat16,
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// CUDA if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The first CUDA device.
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LoraEviction {
    Lru,
    Fifo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LoraBackend {
    Auto,
    Triton,
    Csgmv,
    TorchNative,
}

/// One adapter to load at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraPath {
    /// Its name.
    pub name: String,
    /// A folder, a Hub id or `demo:NAME`.
    pub path: String,
    /// Whether it is pinned.
    pub pinned: bool,
}

impl LoraPath {
    /// The setting that it came from, for errors.
    pub fn flag(&self) -> String {
        format!("--lora-paths {}={}", self.name, self.path)
    }
}

impl FromStr for LoraPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Json {
            lora_name: String,
            lora_path: String,
            #[serde(default)]
            pinned: bool,
        }
        let path = if text.trim_start().starts_with('{') {
            let json: Json = serde_json::from_str(text).map_err(|error| error.to_string())?;
            Self {
                name: json.lora_name,
                path: json.lora_path,
                pinned: json.pinned,
            }
        } else {
            let (name, path) = text.split_once('=').unwrap_or((text, text));
            Self {
                name: name.to_owned(),
                path: path.to_owned(),
                pinned: false,
            }
        };
        if path.name.is_empty() || path.path.is_empty() {
            return Err("name and path must not be empty (NAME=PATH, PATH, or JSON)".to_owned());
        }
        Ok(path)
    }
}

/// A size in bytes: a number with an optional unit (`KB`, `MB`, `GB`, `TB` by 1000; `KiB`, `MiB`, `GiB`, `TiB` by 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// The same as the machine counts bytes of memory.
    fn in_memory(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

/// A size, or 0 for none.
fn parse_size_or_zero(text: &str) -> Result<ByteSize, String> {
    if text.trim() == "0" { Ok(ByteSize(0)) } else { text.parse() }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a size such as 512MB, 8GiB or 1073741824");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kb" => 1000,
            "m" | "mb" => 1000_u64.pow(2),
            "g" | "gb" => 1000_u64.pow(3),
            "t" | "tb" => 1000_u64.pow(4),
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "tib" => 1 << 40,
            _ => return Err(bad()),
        };
        let number: f64 = digits.trim().parse().map_err(|_| bad())?;
        let bytes = number * unit as f64;
        if bytes >= 1.0 && bytes < u64::MAX as f64 {
            Ok(Self(bytes as u64))
        } else {
            Err(bad())
        }
    }
}

/// Memory for the KV cache and adapters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MemoryBudget {
    /// Of the device's memory, weights included; in (0, 1].
    Fraction(f64),
    /// Without the weights.
    Bytes(u64),
}

impl FromStr for MemoryBudget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<f64>() {
            Ok(fraction) if fraction > 0.0 && fraction <= 1.0 => Ok(Self::Fraction(fraction)),
            Ok(number) if number <= 0.0 || number.is_nan() => Err(format!("{text} is neither a fraction in (0, 1] nor a size")),
            _ => Ok(Self::Bytes(text.parse::<ByteSize>()?.0)),
        }
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// Most rows of one step.
const MAX_STEP_ROWS: usize = 1 << 20;

/// The modules that an adapter can change.
const TARGET_MODULES: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "lm_head",
];

/// Reads the command line, the environment and the settings file.
///
/// # Errors
/// A clap error, also for `--help` and `--version`; `exit` prints it and ends with the right status.
pub fn parse(args: impl IntoIterator<Item = OsString>, environment: &Environment) -> Result<Command, clap::Error> {
    let args = with_default_command(args.into_iter().collect());
    let mut command = command_with_environment(environment);
    let mut matches = command.try_get_matches_from_mut(args.iter().cloned())?;
    if let Some(serve) = matches.subcommand_matches("serve")
        && let Some(file) = serve.get_one::<PathBuf>("config").cloned()
    {
        let from_file = settings_from_file(&mut command, environment, serve, &file)?;
        matches = command
            .try_get_matches_from_mut(args.into_iter().chain(from_file))
            .map_err(|error| command.error(error.kind(), format!("{} (with --config {})", plain(&error), file.display())))?;
    }
    match Cli::from_arg_matches(&matches)?.command {
        CliCommand::Serve(args) => Config::from_args(*args, environment)
            .map(|config| Command::Serve(Box::new(config)))
            .map_err(|error| command.error(clap::error::ErrorKind::ValueValidation, error)),
        CliCommand::Bench(args) => Ok(Command::Bench(args)),
        CliCommand::Adapters(args) => Ok(Command::Adapters(args)),
        CliCommand::HashKey => Ok(Command::HashKey),
    }
}

/// A clap error without its `error: ` and usage.
fn plain(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    text.split("\n\n").next().unwrap_or(text).trim().to_owned()
}

/// `polylora --port 1` means `polylora serve --port 1`.
fn with_default_command(mut args: Vec<OsString>) -> Vec<OsString> {
    let first = args.get(1).map(|arg| arg.to_string_lossy().into_owned());
    let is_for_the_program = |arg: &str| matches!(arg, "-h" | "--help" | "-V" | "--version") || !arg.starts_with('-');
    if !first.is_some_and(|arg| is_for_the_program(&arg)) {
        args.insert(args.len().min(1), "serve".into());
    }
    args
}

/// The environment, taken once, so that tests can give their own.
#[derive(Clone, Debug, Default)]
pub struct Environment(std::collections::BTreeMap<String, String>);

impl Environment {
    /// The process's own. Variables that are not UTF-8 are left out.
    pub fn from_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
        )
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Where programs keep what they could make again.
    fn cache_dir(&self) -> Option<PathBuf> {
        let cache = self.get("XDG_CACHE_HOME").map(PathBuf::from);
        cache.or_else(|| self.get("HOME").map(|home| Path::new(home).join(".cache")))
    }

    /// `HF_HUB_OFFLINE=1` and the like.
    fn is_on(&self, name: &str) -> bool {
        self.get(name)
            .is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true"))
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(variables: [(&str, &str); N]) -> Self {
        Self(variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into())
    }
}

/// The name of a flag's variable.
fn variable_of(flag: &str) -> String {
    format!("POLYLORA_{}", flag.to_ascii_uppercase().replace('-', "_"))
}

/// The command with each `serve` flag's variable as its default: below the flag, above the file and the built-in default.
fn command_with_environment(environment: &Environment) -> clap::Command {
    Cli::command().mut_subcommand("serve", |serve| {
        serve.mut_args(|arg| {
            let Some(flag) = arg.get_long().map(str::to_owned) else {
                return arg;
            };
            match environment.get(&variable_of(&flag)) {
                // A key from the environment is not shown by --help.
                Some(value) if arg.get_action().takes_values() => arg.default_value(value.to_owned()).hide_default_value(flag.ends_with("api-key")),
                // A switch has no value to default to; `POLYLORA_X=1` turns it on.
                Some(_) if matches!(arg.get_action(), ArgAction::SetTrue) && environment.is_on(&variable_of(&flag)) => arg.default_value("true"),
                _ => arg,
            }
        })
    })
}

/// The settings of a file as arguments; without those that the command line gives.
fn settings_from_file(
    command: &mut clap::Command,
    environment: &Environment,
    given: &clap::ArgMatches,
    path: &Path,
) -> Result<Vec<OsString>, clap::Error> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
    let arguments = text.and_then(|text| settings_from_text(&text, environment, given));
    arguments.map_err(|reason| command.error(clap::error::ErrorKind::Io, format!("--config {}: {reason}", path.display())))
}

fn settings_from_text(text: &str, environment: &Environment, given: &clap::ArgMatches) -> Result<Vec<OsString>, String> {
    let table: toml::Table = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    let serve = Cli::command();
    let serve = serve.find_subcommand("serve").expect("it is one of Cli's");
    let mut arguments = Vec::new();
    for (key, value) in &table {
        let flag = key.replace('_', "-");
        let Some(arg) = serve.get_arguments().find(|arg| arg.get_long() == Some(&flag)) else {
            return Err(format!(
                "unknown setting {key:?}; settings are named like the flags of `polylora serve --help`"
            ));
        };
        if flag == "config" {
            return Err("a settings file can't name another".to_owned());
        }
        let id = arg.get_id().as_str();
        let from_environment = environment.get(&variable_of(&flag)).is_some();
        if given.value_source(id) == Some(ValueSource::CommandLine) || from_environment {
            continue;
        }
        let values = setting_values(value).ok_or_else(|| format!("{key}: a setting is a string, a number, a boolean or a list of these"))?;
        match (arg.get_action().takes_values(), value) {
            (true, _) => arguments.extend(values.iter().map(|value| format!("--{flag}={value}").into())),
            (false, toml::Value::Boolean(true)) => arguments.push(format!("--{flag}").into()),
            (false, toml::Value::Boolean(false)) => {}
            (false, _) => return Err(format!("{key}: must be true or false")),
        }
    }
    Ok(arguments)
}

/// Reads the text of a settings file as `--config` does, down to typed flags; files that it names are not looked at.
///
/// # Errors
/// What is wrong, by the setting's name.
pub fn parse_settings(text: &str) -> Result<(), String> {
    let mut command = Cli::command();
    let serve = ["polylora", "serve"].map(OsString::from);
    let matches = command.try_get_matches_from_mut(serve.clone()).map_err(|error| error.to_string())?;
    let given = matches.subcommand_matches("serve").expect("it was given");
    let arguments = settings_from_text(text, &Environment::default(), given)?;
    let matches = command.try_get_matches_from_mut(serve.into_iter().chain(arguments));
    Cli::from_arg_matches(&matches.map_err(|error| plain(&error))?)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// A TOML value as the flag's values; a table (an adapter) as JSON.
fn setting_values(value: &toml::Value) -> Option<Vec<String>> {
    let one = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Table(_) => serde_json::to_string(value).ok(),
        toml::Value::Array(_) | toml::Value::Datetime(_) => None,
    };
    match value {
        toml::Value::Array(values) => values.iter().map(one).collect(),
        other => one(other).map(|value| vec![value]),
    }
}

impl Config {
    /// Checks what clap can't: relations between settings, files, ranges.
    fn from_args(args: ServeArgs, environment: &Environment) -> Result<Self, String> {
        let model = args.model_path.clone().map_or(ModelSource::Demo, ModelSource::Path);
        require(args.model_path.as_deref() != Some(""), || "--model-path must not be empty".to_owned())?;
        let served_model_name = served_model_name(&args, &model)?;
        let keys = args.api_keys_file.as_deref().map_or(Ok(Vec::new()), read_keys_file);
        let keys = keys.map_err(|error| format!("--api-keys-file {error}"))?;
        for (flag, key) in [("--api-key", &args.api_key), ("--admin-api-key", &args.admin_api_key)] {
            require(key.as_deref() != Some(""), || format!("{flag} must not be empty"))?;
        }
        let auth = Auth::new(args.api_key.as_deref(), args.admin_api_key.as_deref(), keys);
        let is_loopback = args.host == "localhost" || args.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        let source_policy = SourcePolicy::new(&args.lora_root, &args.lora_hub_org, is_loopback || auth.is_enabled())?;
        let lora = LoraSettings::from_args(&args, &model, &served_model_name)?;
        let engine = EngineSettings::from_args(&args, environment)?;
        require(args.context_length != Some(0), || "--context-length must be at least 1".to_owned())?;
        require(args.load_format == LoadFormat::Auto || model != ModelSource::Demo, || {
            "--load-format dummy needs --model-path, a folder with a config.json".to_owned()
        })?;
        if let Some(file) = args.chat_template.as_deref().filter(|file| !file.is_file()) {
            return Err(format!("--chat-template {}: no such file", file.display()));
        }
        Ok(Self {
            log_level: log_filter(&args.log_level)?,
            log_format: args.log_format,
            otlp: OtlpSettings::from_args(&args, environment)?,
            model,
            served_model_name,
            owned_by: args.owned_by.clone(),
            load_format: args.load_format,
            dtype: args.dtype,
            context_length: args.context_length,
            chat_template: args.chat_template.clone(),
            state_dir: args.state_dir.clone(),
            push_limits: PushLimits {
                max_bytes: args.max_push_size.0,
                max_total_bytes: args.max_pushed_size.0,
            },
            http: HttpConfig::from_args(args)?,
            auth,
            source_policy,
            lora,
            engine: engine.0,
            hub: HubConfig::from_environment(environment),
            metrics_max_adapters: engine.1,
        })
    }
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(message()) }
}

/// A filter's parts are levels, or targets with a level: a word that is neither would silence the log. Python's names of levels, which other
/// servers' command lines have, are understood.
fn log_filter(filter: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let parts = filter.split(',').map(|part| {
        let level = part.trim().to_ascii_lowercase();
        match level.as_str() {
            "warning" => Ok("warn".to_owned()),
            "critical" => Ok("error".to_owned()),
            level if LEVELS.contains(&level) || part.contains(['=', '[', ']', '}']) => Ok(part.to_owned()),
            _ => Err(format!(
                "--log-level: {part:?} is none of {}, and no filter such as polylora=debug",
                LEVELS.join(", ")
            )),
        }
    });
    Ok(parts.collect::<Result<Vec<_>, _>>()?.join(","))
}

fn served_model_name(args: &ServeArgs, model: &ModelSource) -> Result<String, String> {
    let name = match (&args.served_model_name, model) {
        (Some(name), _) => name.clone(),
        (None, ModelSource::Demo) => "demo".to_owned(),
        // `org/name@revision` and `/models/name/` alike are served as `name`.
        (None, ModelSource::Path(path)) => {
            let path = if Path::new(path).exists() {
                path
            } else {
                path.split('@').next().unwrap_or(path)
            };
            let canonical = Path::new(path).canonicalize();
            let canonical = canonical.as_deref().unwrap_or(Path::new(path));
            canonical
                .file_name()
                .map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned())
        }
    };
    let is_fine = !name.trim().is_empty() && !name.chars().any(|c| c.is_control() || c == ',');
    require(is_fine, || {
        format!("--served-model-name {name:?} must not be empty nor hold a comma or a control character")
    })?;
    Ok(name)
}

impl OtlpSettings {
    fn from_args(args: &ServeArgs, environment: &Environment) -> Result<Option<Self>, String> {
        let (name, endpoint) = match &args.otlp_endpoint {
            Some(endpoint) => ("--otlp-endpoint", endpoint.as_str()),
            None => match environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") {
                Some(endpoint) => ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
                None => return Ok(None),
            },
        };
        let is_url = ["http://", "https://"]
            .iter()
            .any(|scheme| endpoint.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty()));
        require(is_url, || format!("{name} {endpoint:?} is no URL such as http://127.0.0.1:4318"))?;
        Ok(Some(Self {
            endpoint: endpoint.to_owned(),
            service_name: environment.get("OTEL_SERVICE_NAME").unwrap_or("polylora").to_owned(),
        }))
    }
}

impl HttpConfig {
    fn from_args(args: ServeArgs) -> Result<Self, String> {
        let tls = match (args.ssl_certfile, args.ssl_keyfile) {
            (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key }),
            (None, None) => None,
            (Some(_), None) => return Err("--ssl-certfile needs --ssl-keyfile".to_owned()),
            (None, Some(_)) => return Err("--ssl-keyfile needs --ssl-certfile".to_owned()),
        };
        for (flag, timeout) in [("--read-timeout", args.read_timeout), ("--write-timeout", args.write_timeout)] {
            require(!timeout.is_zero(), || format!("{flag} must be more than 0 seconds"))?;
        }
        Ok(Self {
            host: args.host,
            port: args.port,
            tls,
            cors_origins: args.cors_origin,
            max_body_bytes: usize::try_from(args.max_body_size.0).map_err(|_| "--max-body-size is beyond this machine's addresses")?,
            read_timeout: args.read_timeout,
            write_timeout: args.write_timeout,
            drain_timeout: args.drain_timeout,
        })
    }
}

impl LoraSettings {
    fn from_args(args: &ServeArgs, model: &ModelSource, served_model_name: &str) -> Result<Option<Self>, String> {
        let is_demo = *model == ModelSource::Demo;
        if args.enable_lora == Some(false) {
            require(args.lora_paths.is_empty(), || "--lora-paths is given, but --enable-lora=false".to_owned())?;
            require(args.lora_dir.is_empty(), || "--lora-dir is given, but --enable-lora=false".to_owned())?;
            return Ok(None);
        }
        if let Some(directory) = args.lora_dir.iter().find(|directory| !directory.is_dir()) {
            return Err(format!("--lora-dir {}: no such folder", directory.display()));
        }
        if args.enable_lora.is_none() && args.lora_paths.is_empty() && args.lora_dir.is_empty() && !is_demo {
            return Ok(None);
        }
        require(args.max_loras_per_batch > 0, || "--max-loras-per-batch must be at least 1".to_owned())?;
        if let Some(max_loaded) = args.max_loaded_loras {
            let per_batch = args.max_loras_per_batch;
            require(max_loaded >= per_batch, || {
                format!("--max-loaded-loras ({max_loaded}) must be at least --max-loras-per-batch ({per_batch})")
            })?;
            let given = args.lora_paths.len();
            require(given <= max_loaded, || {
                format!("--lora-paths gives {given} adapters, --max-loaded-loras allows {max_loaded}")
            })?;
        }
        require(args.max_lora_rank != Some(0), || "--max-lora-rank must be at least 1".to_owned())?;
        let paths = if args.lora_paths.is_empty() && args.lora_dir.is_empty() && is_demo {
            demo_paths()
        } else {
            args.lora_paths.clone()
        };
        check_names(&paths, served_model_name)?;
        let pinned = paths.iter().filter(|path| path.pinned).count();
        require(pinned < args.max_loras_per_batch, || {
            format!(
                "--lora-paths pins {pinned} adapters, at most {} may be (--max-loras-per-batch - 1): more would cause starvation of the others",
                args.max_loras_per_batch - 1
            )
        })?;
        Ok(Some(Self {
            paths,
            directories: args.lora_dir.clone(),
            max_loras_per_batch: args.max_loras_per_batch,
            max_loaded_loras: args.max_loaded_loras,
            max_loaded_bytes: args.max_loaded_lora_bytes.map(ByteSize::in_memory),
            host_reserve_bytes: args.lora_host_reserve_bytes.map(ByteSize::in_memory),
            eviction: match args.lora_eviction_policy {
                LoraEviction::Lru => EvictionPolicy::Lru,
                LoraEviction::Fifo => EvictionPolicy::Fifo,
            },
            max_lora_rank: args.max_lora_rank,
            target_modules: target_modules(&args.lora_target_modules)?,
        }))
    }
}

/// All adapters of the demo.
fn demo_paths() -> Vec<LoraPath> {
    crate::demo::ADAPTERS
        .iter()
        .map(|adapter| LoraPath {
            name: adapter.name.to_owned(),
            path: format!("{}{}", crate::auth::EMBEDDED_PREFIX, adapter.name),
            pinned: false,
        })
        .collect()
}

fn check_names(paths: &[LoraPath], served_model_name: &str) -> Result<(), String> {
    let mut names = BTreeSet::new();
    for LoraPath { name, .. } in paths {
        require(names.insert(name), || format!("--lora-paths names {name:?} twice"))?;
        require(name != served_model_name, || {
            format!("--lora-paths: {name:?} is the base model's own name; give the adapter another (NAME=PATH)")
        })?;
        let is_fine = !name.contains([',', ':']) && !name.chars().any(char::is_control);
        require(is_fine, || {
            format!("--lora-paths: the name {name:?} must not hold a comma, a colon or a control character; give another (NAME=PATH)")
        })?;
    }
    Ok(())
}

fn target_modules(given: &[String]) -> Result<TargetModules, String> {
    if given.is_empty() {
        return Ok(TargetModules::Inferred);
    }
    if given.iter().any(|module| module == "all") {
        require(given.len() == 1, || "--lora-target-modules: `all` must stand alone".to_owned())?;
        return Ok(TargetModules::All);
    }
    let mut modules = BTreeSet::new();
    for module in given {
        let parts: &[&str] = match module.as_str() {
            "qkv_proj" => &["q_proj", "k_proj", "v_proj"],
            "gate_up_proj" => &["gate_proj", "up_proj"],
            other => {
                let known = TARGET_MODULES.iter().position(|known| *known == other);
                let index = known.ok_or_else(|| {
                    format!(
                        "--lora-target-modules: {other:?} is none of {}, qkv_proj, gate_up_proj, all",
                        TARGET_MODULES.join(", ")
                    )
                })?;
                &TARGET_MODULES[index..=index]
            }
        };
        modules.extend(parts.iter().map(|part| (*part).to_owned()));
    }
    Ok(TargetModules::Only(modules))
}

impl EngineSettings {
    /// With the bound on metrics, which is checked alike.
    fn from_args(args: &ServeArgs, environment: &Environment) -> Result<(Self, usize), String> {
        require(args.tp_size == 1, || {
            format!(
                "--tp-size {}: a model over several GPUs is not built yet, only 1 is possible; run one server per GPU behind a router",
                args.tp_size
            )
        })?;
        if let Some(chunk) = args.max_lora_chunk_size {
            let is_fine = (16..=128).contains(&chunk) && chunk.is_power_of_two();
            require(is_fine, || format!("--max-lora-chunk-size {chunk} must be 16, 32, 64 or 128"))?;
        }
        for (flag, value) in [
            ("--num-threads", args.num_threads),
            ("--max-running-requests", args.max_running_requests),
            ("--max-queued-requests", Some(args.max_queued_requests)),
            ("--chunked-prefill-size", args.chunked_prefill_size),
            ("--mixed-prefill-size", args.mixed_prefill_size),
            ("--metrics-max-adapters", Some(args.metrics_max_adapters)),
            ("--cuda-graph-max-bs", args.cuda_graph_max_bs),
        ] {
            require(value != Some(0), || format!("{flag} must be at least 1"))?;
        }
        for (flag, value) in [
            ("--max-running-requests", args.max_running_requests),
            ("--chunked-prefill-size", args.chunked_prefill_size),
        ] {
            require(value.is_none_or(|value| value <= MAX_STEP_ROWS), || {
                format!("{flag} must be at most {MAX_STEP_ROWS}, got {}", value.unwrap_or_default())
            })?;
        }
        if let (Some(running), Some(chunk)) = (args.max_running_requests, args.chunked_prefill_size) {
            require(running <= chunk, || {
                format!("--chunked-prefill-size ({chunk}) must be at least --max-running-requests ({running}): each has a row in a step")
            })?;
        }
        let block_size = args.block_size;
        require(block_size.is_power_of_two() && block_size <= 256, || {
            format!("--block-size {block_size} must be a power of two, at most 256")
        })?;
        let settings = Self {
            device: args.device,
            num_threads: args.num_threads,
            memory: args.mem_fraction_static,
            max_running_requests: args.max_running_requests,
            max_queued_requests: args.max_queued_requests,
            chunked_prefill_size: args.chunked_prefill_size,
            mixed_prefill_size: args.mixed_prefill_size,
            block_size,
            prefix_caching: !args.disable_radix_cache,
            cuda_graph_max_bs: args.cuda_graph_max_bs,
            gemm_tuning_dir: match &args.gemm_tuning_dir {
                None => environment.cache_dir().map(|cache| cache.join("polylora")),
                Some(directory) => Some(directory.clone()).filter(|directory| directory != Path::new("none")),
            },
        };
        Ok((settings, args.metrics_max_adapters))
    }
}

impl HubConfig {
    /// From the variables that every tool of the Hub reads.
    pub fn from_environment(environment: &Environment) -> Self {
        let home = environment.get("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = environment.cache_dir();
            cache.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface")
        });
        let token = environment.get("HF_TOKEN").map(str::to_owned);
        Self {
            endpoint: environment.get("HF_ENDPOINT").map(|endpoint| endpoint.trim_end_matches('/').to_owned()),
            cache_dir: environment.get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: token.or_else(|| {
                let text = std::fs::read_to_string(home.join("token")).ok()?;
                Some(text.trim().to_owned()).filter(|token| !token.is_empty())
            }),
            offline: environment.is_on("HF_HUB_OFFLINE"),
            progress: !environment.is_on("HF_HUB_DISABLE_PROGRESS_BARS"),
        }
    }
}

/// The table of all settings of `serve`, as Markdown: what `docs/settings.md` holds.
pub fn settings_table() -> String {
    let command = Cli::command();
    let serve = command.find_subcommand("serve").expect("it is one of Cli's");
    let mut text = String::from(
        "# Settings of `polylora serve`\n\nMade from the program's own `--help`; a test compares. A flag `--some-name` is `some-name` (or `some_name`) in the\nfile of `--config`, and `POLYLORA_SOME_NAME` in the environment. Flag before environment before file before default.\n",
    );
    let mut heading = None;
    for arg in serve.get_arguments() {
        let Some(flag) = arg.get_long().filter(|flag| *flag != "help") else {
            continue;
        };
        if arg.get_help_heading() != heading {
            heading = arg.get_help_heading();
            let _ = fmt::Write::write_fmt(
                &mut text,
                format_args!(
                    "\n## {}\n\n| flag | default | meaning |\n| --- | --- | --- |\n",
                    heading.unwrap_or("Other")
                ),
            );
        }
        let value = match arg.get_value_names() {
            Some([name]) if arg.get_action().takes_values() => format!(" {name}"),
            _ => String::new(),
        };
        let is_switch = !arg.get_action().takes_values();
        let default = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect::<Vec<_>>();
        let default = if default.is_empty() || is_switch {
            String::new()
        } else {
            format!("`{}`", default.join(" "))
        };
        let choices: Vec<_> = arg.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
        let choices = if choices.is_empty() || is_switch || choices == ["`true`", "`false`"] {
            String::new()
        } else {
            format!(" One of {}.", choices.join(", "))
        };
        let help = arg
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default()
            .replace('\n', " ")
            .replace('|', "\\|");
        let flag = format!("--{flag}{value}").replace('|', "\\|");
        let _ = fmt::Write::write_fmt(&mut text, format_args!("| `{flag}` | {default} | {help}.{choices} |\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_with(environment: &Environment, args: &[&str]) -> Result<Command, String> {
        let args = std::iter::once("polylora").chain(args.iter().copied()).map(OsString::from);
        parse(args, environment).map_err(|error| error.to_string())
    }

    fn serve(args: &[&str]) -> Result<Config, String> {
        serve_with(&Environment::default(), args)
    }

    fn serve_with(environment: &Environment, args: &[&str]) -> Result<Config, String> {
        parse_with(environment, args).map(|command| match command {
            Command::Serve(config) => *config,
            other => panic!("not serve: {other:?}"),
        })
    }

    fn file(text: &str) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("polylora.toml");
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap().to_owned();
        (folder, path)
    }

    #[test]
    fn without_arguments_the_demo_is_served() {
        for args in [&[][..], &["serve"], &["--port", "30000"]] {
            let config = serve(args).unwrap();
            assert_eq!(config.model, ModelSource::Demo);
            assert_eq!(config.served_model_name, "demo");
            assert_eq!((config.http.host.as_str(), config.http.port), ("127.0.0.1", 30000));
            let lora = config.lora.expect("the demo has adapters");
            assert_eq!(lora.max_loras_per_batch, 8);
            assert!(lora.paths.iter().all(|path| path.path == format!("demo:{}", path.name)));
            assert!(!config.auth.is_enabled());
        }
    }

    #[test]
    fn lora_paths_take_sglangs_three_forms_mixed() {
        let config = serve(&[
            "--model-path",
            "/models/base",
            "--lora-paths",
            "sql=/adapters/sql=v1",
            "/adapters/plain",
            r#"{"lora_name":"json","lora_path":"org/json@v2","pinned":true}"#,
            "--port",
            "1",
        ])
        .unwrap();
        let path = |name: &str, path: &str, pinned| LoraPath {
            name: name.into(),
            path: path.into(),
            pinned,
        };
        assert_eq!(
            config.lora.unwrap().paths,
            [
                path("sql", "/adapters/sql=v1", false),
                path("/adapters/plain", "/adapters/plain", false),
                path("json", "org/json@v2", true)
            ]
        );
        assert_eq!(config.served_model_name, "base");
    }

    #[test]
    fn lora_is_on_when_asked_for_or_needed() {
        let lora = |args: &[&str]| serve(&[&["--model-path", "/m"], args].concat()).unwrap().lora.is_some();
        assert!(!lora(&[]));
        assert!(lora(&["--enable-lora"]));
        assert!(lora(&["--enable-lora=true"]));
        assert!(!lora(&["--enable-lora=false"]));
        assert!(lora(&["--lora-paths", "a=b"]));
        assert!(serve(&["--enable-lora=false"]).unwrap().lora.is_none(), "the demo without its adapters");
    }

    #[test]
    fn the_served_name_is_the_last_part_of_the_path() {
        let name = |path: &str| serve(&["--model-path", path]).unwrap().served_model_name;
        assert_eq!(name("/models/Llama-3.1-8B"), "Llama-3.1-8B");
        assert_eq!(name("/models/name/"), "name");
        assert_eq!(name("org/name@v1"), "name");
        assert_eq!(serve(&["--served-model-name", "gpt-oss:120b"]).unwrap().served_model_name, "gpt-oss:120b");
    }

    #[test]
    fn a_flag_wins_over_the_environment_which_wins_over_the_file() {
        let (_folder, path) = file("port = 1\nhost = \"0.0.0.1\"\ndrain_timeout = 2.5\nenable-lora = true\ndisable_radix_cache = true\n");
        let environment = Environment::from([("POLYLORA_PORT", "2"), ("POLYLORA_HOST", "0.0.0.2"), ("POLYLORA_CONFIG", &path)]);
        let config = serve_with(&environment, &["--port", "3", "--model-path", "/m"]).unwrap();
        assert_eq!((config.http.port, config.http.host.as_str()), (3, "0.0.0.2"));
        assert_eq!(config.http.drain_timeout, Duration::from_millis(2500));
        assert!(config.lora.is_some() && !config.engine.prefix_caching);
    }

    #[test]
    fn lists_and_adapters_in_the_file() {
        let text = "model-path = \"/m\"\nlora_paths = [\"a=/a\", { lora_name = \"b\", lora_path = \"/b\", pinned = true }]\nmax_loras_per_batch = 2\nlora-target-modules = [\"qkv_proj\", \"down_proj\"]\nmem_fraction_static = 0.5\n";
        let (_folder, path) = file(text);
        let config = serve(&["--config", &path]).unwrap();
        let lora = config.lora.unwrap();
        let names: Vec<_> = lora.paths.iter().map(|path| (path.name.as_str(), path.pinned)).collect();
        assert_eq!(names, [("a", false), ("b", true)]);
        let modules = ["down_proj", "k_proj", "q_proj", "v_proj"].map(String::from);
        assert_eq!(lora.target_modules, TargetModules::Only(modules.into()));
        assert_eq!(config.engine.memory, Some(MemoryBudget::Fraction(0.5)));
        // What the command line gives takes the place of the file's list.
        let lora = serve(&["--config", &path, "--lora-paths", "c=/c"]).unwrap().lora.unwrap();
        assert_eq!(lora.paths.len(), 1);
    }

    #[test]
    fn a_bad_settings_file_is_refused_by_the_settings_name() {
        for (text, reason) in [
            ("prot = 1", "unknown setting \"prot\""),
            ("port = \"x\"", "invalid value 'x' for '--port <PORT>'"),
            ("port = 70000", "--port"),
            ("max_loras_per_batch = [[1]]", "max_loras_per_batch: a setting is"),
            ("disable_radix_cache = 1", "disable_radix_cache: must be true or false"),
            ("config = \"x\"", "can't name another"),
            ("port = ", "--config"),
        ] {
            let (_folder, path) = file(text);
            let error = serve(&["--config", &path]).unwrap_err();
            assert!(error.contains(reason) && error.contains(&path), "{text}: {error}");
        }
        assert!(serve(&["--config", "/does/not/exist"]).unwrap_err().contains("/does/not/exist"));
    }

    #[test]
    fn levels_of_the_log_have_their_python_names_too() {
        for (given, filter) in [
            ("warning", "warn"),
            ("CRITICAL", "error"),
            ("warning,polylora=debug", "warn,polylora=debug"),
            ("Info", "Info"),
        ] {
            assert_eq!(serve(&["--log-level", given]).unwrap().log_level, filter);
        }
    }

    #[test]
    fn every_bad_value_is_refused_by_its_flags_name() {
        let key = ["--ssl-keyfile", "k"];
        for (args, reason) in [
            (&["--max-loras-per-batch", "0"][..], "--max-loras-per-batch must be at least 1"),
            (
                &["--max-loaded-loras", "7"],
                "--max-loaded-loras (7) must be at least --max-loras-per-batch (8)",
            ),
            (
                &["--max-loras-per-batch", "1", "--max-loaded-loras", "1", "--lora-paths", "a=a", "b=b"],
                "--lora-paths gives 2 adapters",
            ),
            (
                &[
                    "--max-loras-per-batch",
                    "1",
                    "--lora-paths",
                    r#"{"lora_name":"a","lora_path":"b","pinned":true}"#,
                ],
                "starvation",
            ),
            (&["--lora-paths", "a=b", "a=c"], "\"a\" twice"),
            (&["--lora-paths", "=b"], "'--lora-paths <ADAPTER>...'"),
            (&["--lora-paths", r#"{"lora_name":"a"}"#], "missing field `lora_path`"),
            (
                &["--lora-paths", r#"{"lora_name":"a","lora_path":"b","pin":true}"#],
                "unknown field `pin`",
            ),
            (&["--lora-paths", "a,b=c"], "must not hold a comma"),
            (&["--lora-paths", "a:b=c"], "must not hold a comma, a colon"),
            (&["--served-model-name", "x", "--lora-paths", "x=y"], "the base model's own name"),
            (&["--enable-lora=false", "--lora-paths", "a=b"], "--enable-lora=false"),
            (&["--enable-lora=maybe"], "--enable-lora"),
            (&["--lora-dir", "/does/not/exist"], "--lora-dir /does/not/exist"),
            (&["--max-lora-rank", "0"], "--max-lora-rank"),
            (&["--lora-target-modules", "q_proj", "all"], "`all` must stand alone"),
            (&["--lora-target-modules", "qproj"], "--lora-target-modules: \"qproj\""),
            (&["--max-lora-chunk-size", "24"], "--max-lora-chunk-size 24"),
            (&["--lora-backend", "flashinfer"], "--lora-backend"),
            (&["--max-loaded-lora-bytes", "0"], "--max-loaded-lora-bytes"),
            (&["--max-loaded-lora-bytes", "4MiBs"], "--max-loaded-lora-bytes"),
            (&["--lora-eviction-policy", "mru"], "--lora-eviction-policy"),
            (&["--tp-size", "2"], "--tp-size 2"),
            (&["--port", "65536"], "--port"),
            (&["--mem-fraction-static", "0"], "--mem-fraction-static"),
            (&["--mem-fraction-static", "8GiBs"], "--mem-fraction-static"),
            (&["--dtype", "int4"], "--dtype"),
            (&["--load-format", "gguf"], "--load-format"),
            (&["--load-format", "dummy"], "--load-format"),
            (&["--context-length", "0"], "--context-length"),
            (&["--max-running-requests", "0"], "--max-running-requests"),
            (&["--max-running-requests", "2000000"], "--max-running-requests must be at most 1048576"),
            (
                &["--max-running-requests", "9", "--chunked-prefill-size", "8"],
                "--chunked-prefill-size (8) must be at least --max-running-requests (9)",
            ),
            (&["--model-path", ""], "--model-path must not be empty"),
            (&["--log-level", "verbose"], "--log-level: \"verbose\" is none of off"),
            (&["--log-level", "info,polylora"], "--log-level: \"polylora\""),
            (&["--chunked-prefill-size", "0"], "--chunked-prefill-size"),
            (&["--mixed-prefill-size", "0"], "--mixed-prefill-size"),
            (&["--block-size", "24"], "--block-size 24"),
            (&["--ssl-certfile", "c"], "--ssl-certfile needs --ssl-keyfile"),
            (&key, "--ssl-keyfile needs --ssl-certfile"),
            (&["--drain-timeout=-1"], "--drain-timeout"),
            (&["--read-timeout", "0"], "--read-timeout"),
            (&["--api-key", ""], "--api-key must not be empty"),
            (&["--api-keys-file", "/does/not/exist"], "--api-keys-file /does/not/exist"),
            (&["--lora-root", "/does/not/exist"], "--lora-root /does/not/exist"),
            (&["--chat-template", "/does/not/exist"], "--chat-template"),
            (&["--served-model-name", "a,b"], "--served-model-name"),
            (&["--unknown"], "--unknown"),
            (&["surplus"], "surplus"),
        ] {
            let error = serve(args).expect_err(&args.join(" "));
            assert!(error.contains(reason), "{args:?}: {error}");
        }
    }

    #[test]
    fn sizes_and_budgets() {
        for (text, bytes) in [
            ("1", 1),
            ("512MB", 512_000_000),
            ("1.5KiB", 1536),
            ("8 GiB", 8 << 30),
            ("2g", 2_000_000_000),
            ("7b", 7),
        ] {
            assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "0", "1PB", "nan", "1e300GB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!("0.85".parse(), Ok(MemoryBudget::Fraction(0.85)));
        assert_eq!("1".parse(), Ok(MemoryBudget::Fraction(1.0)));
        assert_eq!("8589934592".parse(), Ok(MemoryBudget::Bytes(8 << 30)));
        assert_eq!("8GiB".parse(), Ok(MemoryBudget::Bytes(8 << 30)));
    }

    #[test]
    fn the_hubs_usual_variables_are_read() {
        let hub = HubConfig::from_environment(&Environment::from([
            ("HF_HOME", "/hf"),
            ("HF_TOKEN", "secret"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "1"),
        ]));
        assert_eq!(hub.cache_dir, Path::new("/hf/hub"));
        assert_eq!((hub.token.as_deref(), hub.endpoint.as_deref()), (Some("secret"), Some("http://mirror")));
        assert!(hub.offline);
        let hub = HubConfig::from_environment(&Environment::from([("HOME", "/home/a"), ("HF_HUB_OFFLINE", "0")]));
        assert_eq!(hub.cache_dir, Path::new("/home/a/.cache/huggingface/hub"));
        assert!(hub.token.is_none() && hub.endpoint.is_none() && !hub.offline);
    }

    #[test]
    fn a_key_from_the_environment_is_used_but_not_shown() {
        let environment = Environment::from([("POLYLORA_API_KEY", "sk-secret")]);
        assert!(serve_with(&environment, &[]).unwrap().auth.is_enabled());
        let help = parse_with(&environment, &["serve", "--help"]).unwrap_err();
        assert!(help.contains("--api-key") && !help.contains("sk-secret"));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn traces_go_where_the_flag_or_the_usual_variable_says() {
        let otlp = |flags: &[&str], environment: Environment| {
            let config = serve_with(&environment, flags);
            config.map(|config| config.otlp.map(|otlp| (otlp.endpoint, otlp.service_name)))
        };
        let to = |endpoint: &str, name: &str| Ok(Some((endpoint.to_owned(), name.to_owned())));
        let variables = || Environment::from([("OTEL_EXPORTER_OTLP_ENDPOINT", "https://b"), ("OTEL_SERVICE_NAME", "mine")]);
        assert_eq!(otlp(&[], Environment::default()), Ok(None));
        assert_eq!(
            otlp(&["--otlp-endpoint", "http://a:4318"], Environment::default()),
            to("http://a:4318", "polylora")
        );
        assert_eq!(otlp(&[], variables()), to("https://b", "mine"));
        assert_eq!(otlp(&["--otlp-endpoint", "http://a"], variables()), to("http://a", "mine"));
        for bad in ["a:4317", "http://", "grpc://a"] {
            let error = otlp(&["--otlp-endpoint", bad], Environment::default()).unwrap_err();
            assert!(error.contains("--otlp-endpoint") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn the_settings_table_is_up_to_date() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/settings.md");
        if Environment::from_process().is_on("UPDATE_GOLDEN") {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, settings_table()).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        let table = settings_table();
        for (written, now) in written.lines().zip(table.lines()) {
            assert_eq!(written, now, "UPDATE_GOLDEN=1 cargo test settings_table writes it anew");
        }
        assert_eq!(written.len(), table.len(), "UPDATE_GOLDEN=1 cargo test settings_table writes it anew");
    }
}
