//! Prometheus metrics: every metric once, with its name, labels, help and buckets.
//!
//! The registry is a value, not a global, so that each app (and each test) has its own. Samples are atomics: a histogram takes the
//! same memory after a billion observations, and a scrape (every 50 ms from some routers) is one pass over them that takes no lock
//! of the engine. What the engine knows is read from [`EngineStats`] at scrape time; what only the gateway sees is counted as it
//! happens, through [`RequestMetrics`].
//!
//! Labels come from bounded sets. Adapter names are client-made, so the first [`MetricsConfig::max_adapter_labels`] names get a
//! series of their own and later ones share `(other)`; the base model is `(base)`.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::{Mutex, RwLock};
use polylora_engine::{AdapterInfo, AdapterStats, EngineDescription, EngineStats, InferenceEngine, adapter::AdapterState};

/// Media type of [`Metrics::render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Label value of the base model where adapters have their name.
pub const BASE_LABEL: &str = "(base)";
/// Label value shared by adapters beyond the bound.
pub const OTHER_LABEL: &str = "(other)";

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations counted into buckets with these upper bounds.
    Histogram(&'static [f64]),
}

/// The definition of one metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Definition {
    /// Full name.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// Label names, in the order of their values.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
}

/// vLLM's buckets for the time to the first token, seconds.
const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's buckets for the time between tokens, seconds; the ones below 10 ms are ours, since steps here are often faster than that.
const ITL_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// vLLM's buckets for whole requests, seconds.
const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// The 1-2-5 series for lengths in tokens.
const TOKEN_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0, 200000.0,
];
const N_BUCKETS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const ADAPTER_TTFT_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
const LOAD_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

const VLLM: &[&str] = &["model_name", "engine"];

macro_rules! definitions {
    ($($ident:ident = $name:literal, $kind:expr, $labels:expr, $help:literal;)*) => {
        $(const $ident: Definition = Definition { name: $name, kind: $kind, labels: $labels, help: $help };)*
        /// Every metric that can appear on `/metrics`, in the order in which they are written.
        pub const ALL: &[Definition] = &[$($ident),*];
    };
}

definitions! {
    // vLLM's names: what Kubernetes' inference gateway, llm-d, smg and the usual dashboards read.
    VLLM_RUNNING = "vllm:num_requests_running", Kind::Gauge, VLLM, "Requests in the batch.";
    VLLM_WAITING = "vllm:num_requests_waiting", Kind::Gauge, VLLM, "Requests waiting to be scheduled.";
    VLLM_KV_USAGE = "vllm:kv_cache_usage_perc", Kind::Gauge, VLLM, "Share of the KV blocks held by running requests; 1 is all.";
    VLLM_GPU_CACHE_USAGE = "vllm:gpu_cache_usage_perc", Kind::Gauge, VLLM, "The older name of vllm:kv_cache_usage_perc.";
    VLLM_PREFIX_QUERIES = "vllm:prefix_cache_queries_total", Kind::Counter, VLLM, "Prompt tokens looked up in the prefix cache.";
    VLLM_PREFIX_HITS = "vllm:prefix_cache_hits_total", Kind::Counter, VLLM, "Prompt tokens found in the prefix cache.";
    VLLM_PROMPT_TOKENS = "vllm:prompt_tokens_total", Kind::Counter, VLLM, "Prompt tokens processed.";
    VLLM_GENERATION_TOKENS = "vllm:generation_tokens_total", Kind::Counter, VLLM, "Tokens generated.";
    VLLM_PREEMPTIONS = "vllm:num_preemptions_total", Kind::Counter, VLLM, "Requests pushed back for want of KV blocks.";
    VLLM_SUCCESS = "vllm:request_success_total", Kind::Counter, &["model_name", "engine", "finished_reason"], "Requests that ended, by reason.";
    VLLM_TTFT = "vllm:time_to_first_token_seconds", Kind::Histogram(TTFT_BUCKETS), VLLM, "From a request's arrival to its first token.";
    VLLM_ITL = "vllm:inter_token_latency_seconds", Kind::Histogram(ITL_BUCKETS), VLLM, "Between one token of a request and the next.";
    VLLM_TPOT = "vllm:request_time_per_output_token_seconds", Kind::Histogram(ITL_BUCKETS), VLLM, "A request's mean time per token after the first.";
    VLLM_E2E = "vllm:e2e_request_latency_seconds", Kind::Histogram(REQUEST_BUCKETS), VLLM, "From a request's arrival to its end.";
    VLLM_QUEUE_TIME = "vllm:request_queue_time_seconds", Kind::Histogram(REQUEST_BUCKETS), VLLM, "From a request's arrival at the engine to its admission to the batch.";
    VLLM_DECODE_TIME = "vllm:request_decode_time_seconds", Kind::Histogram(REQUEST_BUCKETS), VLLM, "From a request's first token to its end.";
    VLLM_REQUEST_PROMPT = "vllm:request_prompt_tokens", Kind::Histogram(TOKEN_BUCKETS), VLLM, "Prompt tokens of a request.";
    VLLM_REQUEST_GENERATION = "vllm:request_generation_tokens", Kind::Histogram(TOKEN_BUCKETS), VLLM, "Tokens generated for a request.";
    VLLM_PARAM_N = "vllm:request_params_n", Kind::Histogram(N_BUCKETS), VLLM, "The n of requests.";
    VLLM_PARAM_MAX_TOKENS = "vllm:request_params_max_tokens", Kind::Histogram(TOKEN_BUCKETS), VLLM, "The max_tokens of requests.";
    VLLM_CACHE_CONFIG = "vllm:cache_config_info", Kind::Gauge, &["block_size", "num_gpu_blocks", "engine"], "Always 1; the KV cache's shape is in the labels.";
    VLLM_LORA_INFO = "vllm:lora_requests_info", Kind::Gauge, &["max_lora", "running_lora_adapters", "waiting_lora_adapters"], "Unix time of the scrape; adapters that run, and that only wait, are in the labels.";
    VLLM_LORA_LOADED = "vllm:lora_adapter_loaded", Kind::Gauge, &["engine", "adapter_name", "level", "pinned"], "1 for each adapter in memory, by where it is (gpu is the device tier, cpu host memory).";
    VLLM_LORA_GPU = "vllm:num_gpu_loaded_lora_adapters", Kind::Gauge, &["engine"], "Adapters on the device.";
    VLLM_LORA_CPU = "vllm:num_cpu_loaded_lora_adapters", Kind::Gauge, &["engine"], "Adapters in host memory, those on the device included.";
    // SGLang's names.
    SGLANG_RUNNING = "sglang:num_running_reqs", Kind::Gauge, &["model_name"], "Requests in the batch.";
    SGLANG_QUEUE = "sglang:num_queue_reqs", Kind::Gauge, &["model_name"], "Requests waiting to be scheduled.";
    SGLANG_TOKEN_USAGE = "sglang:token_usage", Kind::Gauge, &["model_name"], "Share of the KV cache held by running requests; 1 is all.";
    SGLANG_SLOTS_USED = "sglang:lora_pool_slots_used", Kind::Gauge, &["model_name"], "Distinct adapters of the running requests.";
    SGLANG_SLOTS_TOTAL = "sglang:lora_pool_slots_total", Kind::Gauge, &["model_name"], "Distinct adapters that one batch may have.";
    SGLANG_SLOTS_UTILIZATION = "sglang:lora_pool_utilization", Kind::Gauge, &["model_name"], "sglang:lora_pool_slots_used / sglang:lora_pool_slots_total.";
    // polylora's own.
    BUILD_INFO = "polylora_build_info", Kind::Gauge, &["version", "model", "architecture", "device", "dtype"], "Always 1; what runs is in the labels.";
    HEALTHY = "polylora_engine_healthy", Kind::Gauge, &[], "1 until the device has failed.";
    HTTP_REQUESTS = "polylora_http_requests_total", Kind::Counter, &["route", "status"], "HTTP requests answered, by route and status.";
    REQUESTS = "polylora_requests_total", Kind::Counter, &["adapter", "outcome"], "Sequences that ended, by adapter and outcome (stop, length, abort, error).";
    PROMPT_TOKENS = "polylora_prompt_tokens_total", Kind::Counter, &["adapter"], "Prompt tokens of started sequences, by adapter.";
    CACHED_TOKENS = "polylora_cached_prompt_tokens_total", Kind::Counter, &["adapter"], "Of those, tokens whose KV was in the prefix cache.";
    OUTPUT_TOKENS = "polylora_output_tokens_total", Kind::Counter, &["adapter"], "Tokens generated, by adapter.";
    ADAPTER_TTFT = "polylora_adapter_time_to_first_token_seconds", Kind::Histogram(ADAPTER_TTFT_BUCKETS), &["adapter"], "From a sequence's arrival to its first token, by adapter.";
    CACHE_HITS = "polylora_adapter_cache_hits_total", Kind::Counter, &["adapter", "tier"], "Requests that found their adapter in this tier (device, host) on arrival.";
    CACHE_MISSES = "polylora_adapter_cache_misses_total", Kind::Counter, &["adapter", "tier"], "Requests that did not find their adapter in this tier (device, host) on arrival.";
    ADAPTER_RUNNING = "polylora_adapter_running_requests", Kind::Gauge, &["adapter"], "Requests in the batch, by adapter.";
    ADAPTER_WAITING = "polylora_adapter_waiting_requests", Kind::Gauge, &["adapter"], "Requests waiting, by adapter.";
    ADAPTER_WAITED = "polylora_adapter_waiting_seconds_total", Kind::Counter, &["adapter"], "Time that admitted requests had waited, by adapter.";
    LOADS = "polylora_adapter_loads_total", Kind::Counter, &["outcome"], "Times that an adapter was read, checked and packed into host memory, by outcome (ok, error).";
    UNLOADS = "polylora_adapter_unloads_total", Kind::Counter, &[], "Adapters unloaded by an operator.";
    LOAD_SECONDS = "polylora_adapter_load_seconds", Kind::Histogram(LOAD_BUCKETS), &[], "Time of the loads at start and of those that clients asked for, downloads included.";
    HOST_EVICTIONS = "polylora_host_adapter_evictions_total", Kind::Counter, &[], "Adapters that left host memory for others.";
    DEVICE_HITS = "polylora_device_adapter_hits_total", Kind::Counter, &[], "Requests that found their adapter on the device when they were first scheduled.";
    DEVICE_UPLOADS = "polylora_device_adapter_uploads_total", Kind::Counter, &[], "Times that an adapter had to be copied to the device.";
    DEVICE_EVICTIONS = "polylora_device_adapter_evictions_total", Kind::Counter, &[], "Adapters that left the device for others.";
    ADAPTER_BYTES = "polylora_adapter_resident_bytes", Kind::Gauge, &["tier"], "Bytes of adapters in each tier.";
    ADAPTER_CAPACITY = "polylora_adapter_capacity_bytes", Kind::Gauge, &["tier"], "Bytes that adapters may take on the device.";
    ADAPTERS = "polylora_adapters", Kind::Gauge, &["state"], "Adapters by state: registered (known by name), host, device.";
    ADAPTER_LEASES = "polylora_adapter_leases", Kind::Gauge, &["adapter"], "Requests in flight that hold the adapter.";
    STEPS = "polylora_steps_total", Kind::Counter, &[], "Batches run.";
    STEP_SECONDS = "polylora_step_seconds", Kind::Histogram(ITL_BUCKETS), &[], "From the scheduling of a batch to the commit of its output.";
    KV_BLOCKS = "polylora_kv_blocks", Kind::Gauge, &["state"], "KV blocks: used by running requests, cached for later ones, free.";
    RESIDENT = "process_resident_memory_bytes", Kind::Gauge, &[], "Resident memory of the process.";
    CPU_SECONDS = "process_cpu_seconds_total", Kind::Counter, &[], "CPU time of the process, user and system.";
    START_TIME = "process_start_time_seconds", Kind::Gauge, &[], "Unix time of the process's start.";
}

/// Bounds of the metrics.
#[derive(Clone, Copy, Debug)]
pub struct MetricsConfig {
    /// Adapters with a series of their own.
    pub max_adapter_labels: usize,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { max_adapter_labels: 64 }
    }
}

/// How a sequence ended, as far as metrics tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// End of sequence, stop token, stop string, complete constraint.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// Aborted, or the client went away.
    Abort,
    /// Failed.
    Error,
}

impl Outcome {
    const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// All metrics of one app.
pub struct Metrics {
    config: MetricsConfig,
    model: String,
    block_size: usize,
    total_slots: usize,
    started_at: f64,
    latency: Latency,
    successes: [AtomicU64; 4],
    unloads: AtomicU64,
    load_seconds: Histogram,
    http: RwLock<BTreeMap<(String, u16), AtomicU64>>,
    adapters: RwLock<BTreeMap<Arc<str>, Arc<AdapterSeries>>>,
    listing: Mutex<Listing>,
    /// `polylora_build_info`'s labels, rendered once.
    build_labels: String,
}

struct Latency {
    ttft: Histogram,
    itl: Histogram,
    tpot: Histogram,
    e2e: Histogram,
    decode: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    n: Histogram,
    max_tokens: Histogram,
}

/// The series of one adapter (or of the base model, or of all others).
struct AdapterSeries {
    label: String,
    outcomes: [AtomicU64; 4],
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    output_tokens: AtomicU64,
    ttft: Histogram,
    /// device, host
    hits: [AtomicU64; 2],
    misses: [AtomicU64; 2],
}

/// What the list of adapters gave, refreshed at most once a second: with ten thousand registered it is too long for every scrape.
#[derive(Default)]
struct Listing {
    read_at: Option<Instant>,
    by_state: [usize; 3],
    resident: Vec<(Arc<str>, AdapterState, bool, usize)>,
    busy: Vec<AdapterStats>,
}

struct Histogram {
    bounds: &'static [f64],
    buckets: Box<[AtomicU64]>,
    /// Bits of an f64.
    sum: AtomicU64,
}

impl Histogram {
    fn new(definition: &Definition) -> Self {
        let Kind::Histogram(bounds) = definition.kind else {
            unreachable!("{} is a histogram by its definition", definition.name)
        };
        Self {
            bounds,
            buckets: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0f64.to_bits()),
        }
    }

    fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.buckets[bucket].fetch_add(1, Relaxed);
        let _ = self
            .sum
            .fetch_update(Relaxed, Relaxed, |bits| Some((f64::from_bits(bits) + value).to_bits()));
    }
}

impl Metrics {
    /// Metrics of a server that serves `served_model_name` from an engine described by `description`.
    pub fn new(served_model_name: &str, description: &EngineDescription, config: MetricsConfig) -> Self {
        let build_labels = labels(
            BUILD_INFO.labels,
            &[
                env!("CARGO_PKG_VERSION"),
                served_model_name,
                &description.architecture,
                &description.device,
                &description.dtype,
            ],
        );
        let metrics = Self {
            config,
            model: served_model_name.to_owned(),
            block_size: description.block_size,
            total_slots: if description.lora_enabled { description.max_loras_per_batch } else { 0 },
            started_at: unix_seconds(),
            latency: Latency {
                ttft: Histogram::new(&VLLM_TTFT),
                itl: Histogram::new(&VLLM_ITL),
                tpot: Histogram::new(&VLLM_TPOT),
                e2e: Histogram::new(&VLLM_E2E),
                decode: Histogram::new(&VLLM_DECODE_TIME),
                prompt_tokens: Histogram::new(&VLLM_REQUEST_PROMPT),
                generation_tokens: Histogram::new(&VLLM_REQUEST_GENERATION),
                n: Histogram::new(&VLLM_PARAM_N),
                max_tokens: Histogram::new(&VLLM_PARAM_MAX_TOKENS),
            },
            successes: Default::default(),
            unloads: AtomicU64::new(0),
            load_seconds: Histogram::new(&LOAD_SECONDS),
            http: RwLock::default(),
            adapters: RwLock::default(),
            listing: Mutex::default(),
            build_labels,
        };
        // The base model's series are there before any traffic: a missing series makes alerts and routers blind.
        metrics.adapter(None);
        metrics
    }

    /// Counts an HTTP request by its route's pattern (never the raw path, which clients choose) and status.
    pub fn http_request(&self, route: &str, status: u16) {
        // The map is keyed by String; a lookup without an allocation would need a raw entry, and a request makes hundreds anyway.
        let key = (route.to_owned(), status);
        if let Some(count) = self.http.read().get(&key) {
            count.fetch_add(1, Relaxed);
            return;
        }
        self.http.write().entry(key).or_default().fetch_add(1, Relaxed);
    }

    /// Starts measuring one sequence, at its arrival. To be finished, or dropped (which counts as an abort).
    pub fn begin_request(self: &Arc<Self>, adapter: Option<&str>, prompt_tokens: usize) -> RequestMetrics {
        RequestMetrics {
            metrics: self.clone(),
            adapter: self.adapter(adapter),
            arrived: Instant::now(),
            first_token: None,
            last_token: None,
            prompt_tokens: prompt_tokens as u64,
            output_tokens: 0,
            finished: false,
        }
    }

    /// Records the settings of one API call, once for all its sequences.
    pub fn request_params(&self, n: u32, max_tokens: u32) {
        self.latency.n.observe(f64::from(n));
        self.latency.max_tokens.observe(f64::from(max_tokens));
    }

    /// Records in which tier a request's adapter was when the request came.
    pub fn adapter_acquired(&self, adapter: &str, state_on_arrival: AdapterState) {
        let series = self.adapter(Some(adapter));
        let in_tier = match state_on_arrival {
            AdapterState::Device => [true, true],
            AdapterState::Host => [false, true],
            AdapterState::Registered => [false, false],
        };
        for (tier, hit) in in_tier.into_iter().enumerate() {
            // One that was on the device was not looked for in host memory.
            if tier == 1 && in_tier[0] {
                break;
            }
            let counter = if hit { &series.hits[tier] } else { &series.misses[tier] };
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Records an adapter load, of the start or that a client asked for: how long it took and whether it worked.
    pub fn adapter_loaded(&self, took: std::time::Duration, ok: bool) {
        if ok {
            self.load_seconds.observe(took.as_secs_f64());
        }
    }

    /// Records an unload.
    pub fn adapter_unloaded(&self) {
        self.unloads.fetch_add(1, Relaxed);
    }

    fn adapter(&self, name: Option<&str>) -> Arc<AdapterSeries> {
        let name = name.unwrap_or(BASE_LABEL);
        if let Some(series) = self.adapters.read().get(name) {
            return series.clone();
        }
        let mut adapters = self.adapters.write();
        // `(base)` is always there, `(other)` comes on top of the bound.
        let name = if adapters.len() > self.config.max_adapter_labels && !adapters.contains_key(name) {
            OTHER_LABEL
        } else {
            name
        };
        adapters
            .entry(Arc::from(name))
            .or_insert_with(|| Arc::new(AdapterSeries::new(name)))
            .clone()
    }

    /// The text of `/metrics`.
    pub fn render(&self, engine: &dyn InferenceEngine) -> String {
        self.render_from(&engine.stats(), || (engine.list_adapters(), engine.adapter_stats()))
    }

    fn render_from(&self, stats: &EngineStats, list_adapters: impl FnOnce() -> (Vec<AdapterInfo>, Vec<AdapterStats>)) -> String {
        let mut out = Writer::default();
        self.write_vllm(&mut out, stats);
        self.write_residency(&mut out, list_adapters);
        self.write_sglang(&mut out, stats);
        self.write_own(&mut out, stats);
        write_process(&mut out, self.started_at);
        out.text
    }

    fn write_vllm(&self, out: &mut Writer, stats: &EngineStats) {
        let model = labels(VLLM, &[&self.model, "0"]);
        let usage = ratio(stats.used_blocks, stats.total_blocks);
        out.one(&VLLM_RUNNING, &model, stats.running as f64);
        out.one(&VLLM_WAITING, &model, stats.waiting as f64);
        out.one(&VLLM_KV_USAGE, &model, usage);
        out.one(&VLLM_GPU_CACHE_USAGE, &model, usage);
        out.one(&VLLM_PREFIX_QUERIES, &model, stats.prompt_tokens_total as f64);
        out.one(&VLLM_PREFIX_HITS, &model, stats.cached_tokens_total as f64);
        out.one(&VLLM_PROMPT_TOKENS, &model, stats.prompt_tokens_total as f64);
        out.one(&VLLM_GENERATION_TOKENS, &model, stats.output_tokens_total as f64);
        out.one(&VLLM_PREEMPTIONS, &model, stats.preemptions_total as f64);
        out.head(&VLLM_SUCCESS);
        for (outcome, count) in Outcome::ALL.iter().zip(&self.successes) {
            let labels = labels(VLLM_SUCCESS.labels, &[&self.model, "0", outcome.as_str()]);
            out.sample(VLLM_SUCCESS.name, &labels, count.load(Relaxed) as f64);
        }
        for (definition, histogram) in [
            (&VLLM_TTFT, &self.latency.ttft),
            (&VLLM_ITL, &self.latency.itl),
            (&VLLM_TPOT, &self.latency.tpot),
            (&VLLM_E2E, &self.latency.e2e),
            (&VLLM_DECODE_TIME, &self.latency.decode),
            (&VLLM_REQUEST_PROMPT, &self.latency.prompt_tokens),
            (&VLLM_REQUEST_GENERATION, &self.latency.generation_tokens),
            (&VLLM_PARAM_N, &self.latency.n),
            (&VLLM_PARAM_MAX_TOKENS, &self.latency.max_tokens),
        ] {
            out.head(definition);
            out.histogram(definition.name, &model, histogram);
        }
        out.engine_histogram(&VLLM_QUEUE_TIME, &model, &stats.queue_seconds);
        let cache = labels(
            VLLM_CACHE_CONFIG.labels,
            &[&self.block_size.to_string(), &stats.total_blocks.to_string(), "0"],
        );
        out.one(&VLLM_CACHE_CONFIG, &cache, 1.0);
        let lora = labels(
            VLLM_LORA_INFO.labels,
            &[
                &self.total_slots.to_string(),
                &stats.running_adapters.join(","),
                &stats.waiting_adapters.join(","),
            ],
        );
        out.one(&VLLM_LORA_INFO, &lora, unix_seconds());
    }

    fn write_residency(&self, out: &mut Writer, list_adapters: impl FnOnce() -> (Vec<AdapterInfo>, Vec<AdapterStats>)) {
        let mut listing = self.listing.lock();
        if listing.read_at.is_none_or(|at| at.elapsed().as_secs() >= 1) {
            let (adapters, busy) = list_adapters();
            *listing = Listing::of(&adapters, busy, self.config.max_adapter_labels);
        }
        out.head(&VLLM_LORA_LOADED);
        for (name, state, pinned, _) in &listing.resident {
            let level = if *state == AdapterState::Device { "gpu" } else { "cpu" };
            let labels = labels(VLLM_LORA_LOADED.labels, &["0", name, level, if *pinned { "true" } else { "false" }]);
            out.sample(VLLM_LORA_LOADED.name, &labels, 1.0);
        }
        let [registered, host, device] = listing.by_state.map(|count| count as f64);
        let engine_label = labels(&["engine"], &["0"]);
        out.one(&VLLM_LORA_GPU, &engine_label, device);
        out.one(&VLLM_LORA_CPU, &engine_label, host + device);
        out.head(&ADAPTERS);
        for (state, count) in [("registered", registered), ("host", host), ("device", device)] {
            out.sample(ADAPTERS.name, &labels(ADAPTERS.labels, &[state]), count);
        }
        out.head(&ADAPTER_LEASES);
        for (name, _, _, leases) in &listing.resident {
            out.sample(ADAPTER_LEASES.name, &labels(ADAPTER_LEASES.labels, &[name]), *leases as f64);
        }
        self.write_waiting(out, &listing.busy);
    }

    /// What runs and waits, by adapter; those without a label of their own together.
    fn write_waiting(&self, out: &mut Writer, busy: &[AdapterStats]) {
        let known = self.adapters.read();
        let mut by_label: BTreeMap<&str, (u64, u64, f64)> = BTreeMap::new();
        for stats in busy {
            let label = if known.contains_key(&stats.name) { &*stats.name } else { OTHER_LABEL };
            let sums = by_label.entry(label).or_default();
            *sums = (sums.0 + stats.running, sums.1 + stats.waiting, sums.2 + stats.waiting_seconds_total);
        }
        for (index, definition) in [&ADAPTER_RUNNING, &ADAPTER_WAITING, &ADAPTER_WAITED].into_iter().enumerate() {
            out.head(definition);
            for (label, sums) in &by_label {
                let value = [sums.0 as f64, sums.1 as f64, sums.2][index];
                out.sample(definition.name, &labels(definition.labels, &[label]), value);
            }
        }
    }

    fn write_sglang(&self, out: &mut Writer, stats: &EngineStats) {
        let model = labels(&["model_name"], &[&self.model]);
        out.one(&SGLANG_RUNNING, &model, stats.running as f64);
        out.one(&SGLANG_QUEUE, &model, stats.waiting as f64);
        out.one(&SGLANG_TOKEN_USAGE, &model, ratio(stats.used_blocks, stats.total_blocks));
        out.one(&SGLANG_SLOTS_USED, &model, stats.running_adapters.len() as f64);
        out.one(&SGLANG_SLOTS_TOTAL, &model, self.total_slots as f64);
        out.one(&SGLANG_SLOTS_UTILIZATION, &model, ratio(stats.running_adapters.len(), self.total_slots));
    }

    fn write_own(&self, out: &mut Writer, stats: &EngineStats) {
        out.one(&BUILD_INFO, &self.build_labels, 1.0);
        out.one(&HEALTHY, "", f64::from(u8::from(stats.healthy)));
        out.head(&HTTP_REQUESTS);
        for ((route, status), count) in self.http.read().iter() {
            let labels = labels(HTTP_REQUESTS.labels, &[route, &status.to_string()]);
            out.sample(HTTP_REQUESTS.name, &labels, count.load(Relaxed) as f64);
        }
        self.write_adapters(out);
        out.head(&LOADS);
        for (outcome, count) in [("ok", stats.registry.loads_total), ("error", stats.registry.load_failures_total)] {
            out.sample(LOADS.name, &labels(LOADS.labels, &[outcome]), count as f64);
        }
        out.one(&UNLOADS, "", self.unloads.load(Relaxed) as f64);
        out.head(&LOAD_SECONDS);
        out.histogram(LOAD_SECONDS.name, "", &self.load_seconds);
        out.one(&HOST_EVICTIONS, "", stats.registry.evictions_total as f64);
        out.one(&DEVICE_HITS, "", stats.device_hits_total as f64);
        out.one(&DEVICE_UPLOADS, "", stats.device_uploads_total as f64);
        out.one(&DEVICE_EVICTIONS, "", stats.device_evictions_total as f64);
        out.head(&ADAPTER_BYTES);
        for (tier, bytes) in [("device", stats.device_adapter_bytes), ("host", stats.host_adapter_bytes)] {
            out.sample(ADAPTER_BYTES.name, &labels(ADAPTER_BYTES.labels, &[tier]), bytes as f64);
        }
        out.one(
            &ADAPTER_CAPACITY,
            &labels(ADAPTER_CAPACITY.labels, &["device"]),
            stats.device_adapter_capacity_bytes as f64,
        );
        out.one(&STEPS, "", stats.steps_total as f64);
        out.engine_histogram(&STEP_SECONDS, "", &stats.step_seconds);
        out.head(&KV_BLOCKS);
        let free = stats.total_blocks.saturating_sub(stats.used_blocks + stats.cached_blocks);
        for (state, blocks) in [("used", stats.used_blocks), ("cached", stats.cached_blocks), ("free", free)] {
            out.sample(KV_BLOCKS.name, &labels(KV_BLOCKS.labels, &[state]), blocks as f64);
        }
    }

    fn write_adapters(&self, out: &mut Writer) {
        let adapters: Vec<Arc<AdapterSeries>> = self.adapters.read().values().cloned().collect();
        out.head(&REQUESTS);
        for series in &adapters {
            for (outcome, count) in Outcome::ALL.iter().zip(&series.outcomes) {
                let _ = writeln!(
                    out.text,
                    "{}{{{},outcome=\"{}\"}} {}",
                    REQUESTS.name,
                    series.label,
                    outcome.as_str(),
                    count.load(Relaxed)
                );
            }
        }
        for (index, definition) in [&PROMPT_TOKENS, &CACHED_TOKENS, &OUTPUT_TOKENS].into_iter().enumerate() {
            out.head(definition);
            for series in &adapters {
                let counter = [&series.prompt_tokens, &series.cached_tokens, &series.output_tokens][index];
                out.sample(definition.name, &series.label, counter.load(Relaxed) as f64);
            }
        }
        out.head(&ADAPTER_TTFT);
        for series in &adapters {
            out.histogram(ADAPTER_TTFT.name, &series.label, &series.ttft);
        }
        for (index, definition) in [&CACHE_HITS, &CACHE_MISSES].into_iter().enumerate() {
            out.head(definition);
            for series in adapters.iter().filter(|series| !series.is_base()) {
                let counters = [&series.hits, &series.misses][index];
                for (tier, count) in ["device", "host"].iter().zip(counters) {
                    let _ = writeln!(
                        out.text,
                        "{}{{{},tier=\"{tier}\"}} {}",
                        definition.name,
                        series.label,
                        count.load(Relaxed)
                    );
                }
            }
        }
    }
}

impl AdapterSeries {
    fn new(name: &str) -> Self {
        Self {
            label: labels(&["adapter"], &[name]),
            outcomes: Default::default(),
            prompt_tokens: AtomicU64::new(0),
            cached_tokens: AtomicU64::new(0),
            output_tokens: AtomicU64::new(0),
            ttft: Histogram::new(&ADAPTER_TTFT),
            hits: Default::default(),
            misses: Default::default(),
        }
    }

    fn is_base(&self) -> bool {
        self.label == labels(&["adapter"], &[BASE_LABEL])
    }
}

impl Listing {
    fn of(adapters: &[AdapterInfo], busy: Vec<AdapterStats>, most: usize) -> Self {
        let mut by_state = [0; 3];
        for adapter in adapters {
            by_state[adapter.state as usize] += 1;
        }
        // The list is least recently used first: the last ones are the ones that matter.
        let mut resident: Vec<_> = adapters
            .iter()
            .rev()
            .filter(|adapter| adapter.state != AdapterState::Registered)
            .take(most)
            .map(|adapter| (adapter.name.clone(), adapter.state, adapter.pinned, adapter.leases))
            .collect();
        resident.sort_by(|left, right| left.0.cmp(&right.0));
        Self {
            read_at: Some(Instant::now()),
            by_state,
            resident,
            busy,
        }
    }
}

/// The measures of one sequence. Finish it with how it ended; dropped without that it counts as aborted (the client went away).
pub struct RequestMetrics {
    metrics: Arc<Metrics>,
    adapter: Arc<AdapterSeries>,
    arrived: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    prompt_tokens: u64,
    output_tokens: u64,
    finished: bool,
}

impl RequestMetrics {
    /// The prompt is computed, with so many tokens from the prefix cache.
    pub fn started(&mut self, cached_tokens: u32) {
        self.adapter.prompt_tokens.fetch_add(self.prompt_tokens, Relaxed);
        self.adapter.cached_tokens.fetch_add(u64::from(cached_tokens), Relaxed);
    }

    /// A token came.
    pub fn token(&mut self) {
        let now = Instant::now();
        self.output_tokens += 1;
        self.adapter.output_tokens.fetch_add(1, Relaxed);
        match self.last_token.replace(now) {
            Some(last) => self.metrics.latency.itl.observe((now - last).as_secs_f64()),
            None => {
                self.first_token = Some(now);
                let seconds = (now - self.arrived).as_secs_f64();
                self.metrics.latency.ttft.observe(seconds);
                self.adapter.ttft.observe(seconds);
            }
        }
    }

    /// The end.
    pub fn finish(mut self, outcome: Outcome) {
        self.record_end(outcome);
    }

    fn record_end(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let now = Instant::now();
        let latency = &self.metrics.latency;
        self.metrics.successes[outcome as usize].fetch_add(1, Relaxed);
        self.adapter.outcomes[outcome as usize].fetch_add(1, Relaxed);
        latency.e2e.observe((now - self.arrived).as_secs_f64());
        latency.prompt_tokens.observe(self.prompt_tokens as f64);
        latency.generation_tokens.observe(self.output_tokens as f64);
        if let Some(first) = self.first_token {
            let decode = (now - first).as_secs_f64();
            latency.decode.observe(decode);
            if self.output_tokens > 1 {
                latency.tpot.observe(decode / (self.output_tokens - 1) as f64);
            }
        }
    }
}

impl Drop for RequestMetrics {
    fn drop(&mut self) {
        self.record_end(Outcome::Abort);
    }
}

#[derive(Default)]
struct Writer {
    text: String,
}

impl Writer {
    fn head(&mut self, definition: &Definition) {
        let kind = match definition.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        let (name, help) = (definition.name, definition.help);
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// `labels` as [`labels`] writes them, without braces.
    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let _ = if labels.is_empty() {
            writeln!(self.text, "{name} {value}")
        } else {
            writeln!(self.text, "{name}{{{labels}}} {value}")
        };
    }

    fn one(&mut self, definition: &Definition, labels: &str, value: f64) {
        self.head(definition);
        self.sample(definition.name, labels, value);
    }

    fn histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let counts = histogram.buckets.iter().map(|bucket| bucket.load(Relaxed));
        self.buckets(name, labels, histogram.bounds, counts, f64::from_bits(histogram.sum.load(Relaxed)));
    }

    /// One that the engine keeps, with bounds of its own; an engine that keeps none has an empty one.
    fn engine_histogram(&mut self, definition: &Definition, labels: &str, histogram: &polylora_engine::Histogram) {
        self.head(definition);
        self.buckets(definition.name, labels, histogram.bounds, histogram.counts.iter().copied(), histogram.sum);
    }

    fn buckets(&mut self, name: &str, labels: &str, bounds: &[f64], counts: impl Iterator<Item = u64>, sum: f64) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut count = 0;
        let mut bounds = bounds.iter();
        for bucket in counts {
            count += bucket;
            let _ = match bounds.next() {
                Some(bound) => writeln!(self.text, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}"),
                None => writeln!(self.text, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}"),
            };
        }
        let braced = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let _ = write!(self.text, "{name}_sum{braced} {sum}\n{name}_count{braced} {count}\n");
    }
}

/// `a="x",b="y"`, values escaped as the text format asks.
fn labels(names: &[&str], values: &[&str]) -> String {
    assert_eq!(names.len(), values.len(), "label names and values");
    let mut text = String::new();
    for (name, value) in names.iter().zip(values) {
        if !text.is_empty() {
            text.push(',');
        }
        let _ = write!(text, "{name}=\"");
        for character in value.chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
    }
    text
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The process's own figures, where the system has `/proc`.
fn write_process(out: &mut Writer, started_at: f64) {
    out.one(&START_TIME, "", started_at);
    if let Some(bytes) = resident_bytes() {
        out.one(&RESIDENT, "", bytes as f64);
    }
    if let Some(seconds) = cpu_seconds() {
        out.one(&CPU_SECONDS, "", seconds);
    }
}

/// Resident memory of this process, where the system has `/proc`.
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, the program's name, may hold anything; what follows it starts after the last parenthesis.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    // USER_HZ is 100 on every Linux that user space sees.
    Some(ticks as f64 / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> EngineDescription {
        EngineDescription {
            architecture: "LlamaForCausalLM".into(),
            device: "cpu".into(),
            dtype: "float32".into(),
            vocab_size: 512,
            context_length: 1024,
            eos_token_ids: vec![2],
            num_blocks: 100,
            block_size: 16,
            lora_enabled: true,
            max_loras_per_batch: 8,
            max_loaded_loras: None,
            max_lora_rank: None,
            lora_target_modules: None,
            max_running_requests: 32,
            max_queued_requests: 64,
        }
    }

    fn metrics(max_adapter_labels: usize) -> Arc<Metrics> {
        Arc::new(Metrics::new("demo", &description(), MetricsConfig { max_adapter_labels }))
    }

    fn stats() -> EngineStats {
        EngineStats {
            healthy: true,
            running: 3,
            waiting: 5,
            used_blocks: 25,
            cached_blocks: 15,
            total_blocks: 100,
            prompt_tokens_total: 70,
            cached_tokens_total: 32,
            running_adapters: vec!["json".into(), "table".into()],
            waiting_adapters: vec!["sql".into()],
            registry: polylora_engine::adapter::registry::RegistryStats {
                load_failures_total: 1,
                ..Default::default()
            },
            step_seconds: polylora_engine::Histogram {
                bounds: &[0.01, 0.1],
                counts: vec![3, 2, 1],
                sum: 0.5,
            },
            ..EngineStats::default()
        }
    }

    fn adapter(name: &str, state: AdapterState, pinned: bool) -> AdapterInfo {
        AdapterInfo {
            name: name.into(),
            source: format!("/adapters/{name}"),
            state,
            version: None,
            max_lora_rank: 16,
            target_modules: vec!["q_proj".into()],
            bytes: 1024,
            pinned,
            leases: 2,
            requests_total: 0,
            hits_total: 0,
            last_used: None,
            report: None,
            parts: Vec::new(),
        }
    }

    /// The value of the one line that starts with `series` and a space.
    fn value(text: &str, series: &str) -> f64 {
        let lines: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(series)?.strip_prefix(' ')).collect();
        let [value] = lines[..] else {
            panic!("{series}: {} lines in\n{text}", lines.len())
        };
        value.parse().unwrap()
    }

    #[test]
    fn names_are_unique_and_follow_the_conventions() {
        let mut names: Vec<_> = ALL.iter().map(|definition| definition.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        for definition in ALL {
            let is_counter = definition.kind == Kind::Counter;
            // SGLang's name for a gauge of all slots is the one exception.
            let is_total = definition.name.ends_with("_total") && *definition != SGLANG_SLOTS_TOTAL;
            assert_eq!(is_total, is_counter, "{}", definition.name);
            assert!(definition.help.ends_with('.'), "{}", definition.name);
            if let Kind::Histogram(bounds) = definition.kind {
                assert!(bounds.is_sorted(), "{}", definition.name);
            }
        }
    }

    #[test]
    fn every_metric_but_those_without_a_label_value_is_there_before_traffic() {
        let text = metrics(8).render_from(&stats(), Default::default);
        for definition in ALL {
            assert!(text.contains(&format!("# TYPE {} ", definition.name)), "{}", definition.name);
            let by_traffic = [
                HTTP_REQUESTS,
                VLLM_LORA_LOADED,
                ADAPTER_LEASES,
                ADAPTER_RUNNING,
                ADAPTER_WAITING,
                ADAPTER_WAITED,
                CACHE_HITS,
                CACHE_MISSES,
            ]
            .contains(definition);
            let series = text.lines().filter(|line| line.starts_with(definition.name)).count();
            assert_eq!(series == 0, by_traffic, "{}", definition.name);
        }
    }

    #[test]
    fn what_routers_read_is_written_as_they_expect_it() {
        let text = metrics(8).render_from(&stats(), Default::default);
        assert_eq!(value(&text, "vllm:num_requests_running{model_name=\"demo\",engine=\"0\"}"), 3.0);
        assert_eq!(value(&text, "vllm:num_requests_waiting{model_name=\"demo\",engine=\"0\"}"), 5.0);
        assert_eq!(value(&text, "vllm:kv_cache_usage_perc{model_name=\"demo\",engine=\"0\"}"), 0.25);
        assert_eq!(
            value(&text, "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"100\",engine=\"0\"}"),
            1.0
        );
        let info = "vllm:lora_requests_info{max_lora=\"8\",running_lora_adapters=\"json,table\",waiting_lora_adapters=\"sql\"}";
        assert!(value(&text, info) > 1.7e9, "a time stamp");
        assert_eq!(value(&text, "polylora_kv_blocks{state=\"free\"}"), 60.0);
        assert_eq!(value(&text, "polylora_step_seconds_bucket{le=\"0.1\"}"), 5.0);
        assert_eq!(value(&text, "polylora_step_seconds_bucket{le=\"+Inf\"}"), 6.0);
        assert_eq!(value(&text, "polylora_step_seconds_sum"), 0.5);
    }

    #[test]
    fn a_request_is_counted_under_its_adapter_and_its_outcome() {
        let metrics = metrics(8);
        let mut request = metrics.begin_request(Some("json"), 12);
        request.started(4);
        request.token();
        request.token();
        request.finish(Outcome::Length);
        drop(metrics.begin_request(None, 5));

        let text = metrics.render_from(&stats(), Default::default);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"json\",outcome=\"length\"}"), 1.0);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"json\",outcome=\"abort\"}"), 0.0);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"(base)\",outcome=\"abort\"}"), 1.0);
        assert_eq!(value(&text, "polylora_prompt_tokens_total{adapter=\"json\"}"), 12.0);
        assert_eq!(value(&text, "polylora_cached_prompt_tokens_total{adapter=\"json\"}"), 4.0);
        assert_eq!(value(&text, "polylora_output_tokens_total{adapter=\"json\"}"), 2.0);
        let model = "{model_name=\"demo\",engine=\"0\"}";
        assert_eq!(value(&text, &format!("vllm:time_to_first_token_seconds_count{model}")), 1.0);
        assert_eq!(value(&text, &format!("vllm:inter_token_latency_seconds_count{model}")), 1.0);
        assert_eq!(value(&text, &format!("vllm:e2e_request_latency_seconds_count{model}")), 2.0);
        assert_eq!(value(&text, &format!("vllm:request_prompt_tokens_sum{model}")), 17.0);
    }

    #[test]
    fn adapters_beyond_the_bound_share_one_label() {
        let metrics = metrics(2);
        for name in ["a", "b", "c", "d", "a"] {
            metrics.begin_request(Some(name), 1).finish(Outcome::Stop);
        }
        let text = metrics.render_from(&stats(), Default::default);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"a\",outcome=\"stop\"}"), 2.0);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"(other)\",outcome=\"stop\"}"), 2.0);
        assert!(!text.contains("adapter=\"c\""));
    }

    #[test]
    fn tiers_and_loads_are_counted() {
        let metrics = metrics(8);
        metrics.adapter_acquired("a", AdapterState::Registered);
        metrics.adapter_acquired("a", AdapterState::Host);
        metrics.adapter_acquired("a", AdapterState::Device);
        metrics.adapter_loaded(std::time::Duration::from_millis(20), true);
        metrics.adapter_loaded(std::time::Duration::from_millis(20), false);
        let adapters = vec![adapter("a", AdapterState::Device, true), adapter("b", AdapterState::Registered, false)];
        let busy = [("a", 1, 2), ("c", 3, 4), ("d", 5, 6)].map(|(name, running, waiting)| AdapterStats {
            name: name.into(),
            running,
            waiting,
            waiting_seconds_total: 0.5,
            ..AdapterStats::default()
        });
        let text = metrics.render_from(&stats(), || (adapters, busy.into()));
        assert_eq!(value(&text, "polylora_adapter_waiting_requests{adapter=\"a\"}"), 2.0);
        assert_eq!(value(&text, "polylora_adapter_running_requests{adapter=\"(other)\"}"), 8.0);
        assert_eq!(value(&text, "polylora_adapter_waiting_seconds_total{adapter=\"(other)\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_cache_hits_total{adapter=\"a\",tier=\"device\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_cache_misses_total{adapter=\"a\",tier=\"device\"}"), 2.0);
        assert_eq!(value(&text, "polylora_adapter_cache_hits_total{adapter=\"a\",tier=\"host\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_cache_misses_total{adapter=\"a\",tier=\"host\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_load_seconds_bucket{le=\"0.025\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_load_seconds_bucket{le=\"0.01\"}"), 0.0);
        assert_eq!(value(&text, "polylora_adapter_loads_total{outcome=\"error\"}"), 1.0);
        let loaded = "vllm:lora_adapter_loaded{engine=\"0\",adapter_name=\"a\",level=\"gpu\",pinned=\"true\"}";
        assert_eq!(value(&text, loaded), 1.0);
        assert!(!text.contains("adapter_name=\"b\""), "only those in memory are listed");
        assert_eq!(value(&text, "polylora_adapters{state=\"registered\"}"), 1.0);
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(labels(&["a"], &["x\"y\\z\nw"]), "a=\"x\\\"y\\\\z\\nw\"");
    }
}
