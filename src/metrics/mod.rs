//! Prometheus metrics, kept and written by `metrics-exporter-prometheus`; [`definitions`] has every metric once.
//!
//! Recorders are values, none is global: each app (and each test) has its own. Series differ by how long they live:
//!
//! - what the gateway counts as it happens lives as long as the server;
//! - what is counted by adapter lives as long as the adapter has a label: names are client-made, and [`adapter_series`] says who has one;
//! - what the engine counts is read at a scrape, from statistics that it publishes (no lock of its own is taken), and written at once:
//!   an adapter that has left the device, or yesterday's list of waiting adapters, leaves nothing behind. So it is with two kinds of
//!   samples that the library can't take: histograms that the engine has counted already, and counters of seconds, which the library has
//!   as whole numbers only.
//!
//! Routers scrape many times a second, for what the engine says: that is written for each scrape. All the rest is long and for
//! dashboards: it is written once in [`MetricsConfig::refresh`], and scrapes share its bytes.

use std::{
    collections::BTreeMap,
    fmt::{Display, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ::metrics::{Counter, Histogram, Level, Metadata, Recorder};
use bytes::Bytes;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder, formatting};
use parking_lot::Mutex;
use polylora_engine::{
    AdapterInfo, AdapterMoves, AdapterStats, EngineDescription, EngineStats, InferenceEngine, Stages,
    adapter::{AdapterState, registry::COMBINATION_LABEL},
};

use crate::aliases::{Alias, Aliases};

pub mod adapter_series;
pub mod definitions;
mod heavy_hitters;

use adapter_series::{AdapterCounters, AdapterSeries, alias_counts, write_counts};
pub use adapter_series::{BASE_LABEL, FORMER_LABEL, OTHER_LABEL, Outcome, SEVERAL_LABEL};
use definitions::*;
pub use definitions::{ALL, Definition, Kind};

/// Media type of [`Metrics::render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The library keeps observations one by one until a scrape puts them into buckets; without scrapes, this many do.
const OBSERVATIONS_PER_UPKEEP: u64 = 8192;

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// Bounds of the metrics.
#[derive(Clone, Copy, Debug)]
pub struct MetricsConfig {
    /// Adapters with series of their own.
    pub max_adapter_labels: usize,
    /// How old the long part of an answer may be, which is all but what the engine says.
    pub refresh: Duration,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self {
            max_adapter_labels: 64,
            refresh: Duration::from_secs(1),
        }
    }
}

/// A recorder, and what its text is got by.
struct Registry {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl Registry {
    /// For metrics that are counted as things happen.
    fn lasting(definitions: &[Definition]) -> Self {
        let mut builder = PrometheusBuilder::new();
        for definition in definitions {
            if let Kind::Histogram(bounds) = definition.kind {
                let name = Matcher::Full(definition.name.to_owned());
                builder = builder.set_buckets_for_metric(name, bounds).expect("a histogram's definition has bounds");
            }
        }
        let recorder = builder.build_recorder();
        let registry = Self {
            handle: recorder.handle(),
            recorder,
        };
        definitions.iter().for_each(|definition| registry.describe(definition));
        // Publishes the descriptions: until then each further one of a metric would be kept beside the first.
        registry.handle.run_upkeep();
        registry
    }

    fn describe(&self, definition: &Definition) {
        // The library has one table for all kinds.
        self.recorder.describe_gauge(definition.name.into(), None, definition.help.into());
    }

    fn counter(&self, definition: &Definition, labels: &[&str]) -> Counter {
        self.recorder.register_counter(&definition.key(labels), &METADATA)
    }

    fn histogram(&self, definition: &Definition, labels: &[&str]) -> Histogram {
        self.recorder.register_histogram(&definition.key(labels), &METADATA)
    }
}

/// Metrics whose values are known at a scrape, as text, in the order in which they were first named.
#[derive(Default)]
struct ScrapeText {
    metrics: Vec<(&'static str, String)>,
}

impl ScrapeText {
    fn set(&mut self, definition: &Definition, labels: &[&str], value: f64) {
        self.line(definition, "gauge", labels, value);
    }

    fn count(&mut self, definition: &Definition, labels: &[&str], total: u64) {
        self.line(definition, "counter", labels, total);
    }

    fn line(&mut self, definition: &Definition, kind: &str, labels: &[&str], value: impl Display) {
        let name = definition.name;
        let index = match self.metrics.iter().rposition(|(other, _)| *other == name) {
            Some(index) => index,
            None => {
                let mut text = String::new();
                write_head(&mut text, definition, kind);
                self.metrics.push((name, text));
                self.metrics.len() - 1
            }
        };
        let text = &mut self.metrics[index].1;
        write_line(text, definition, "", labels, None, value);
    }

    fn render(self) -> String {
        self.metrics.into_iter().map(|(_, text)| text).collect()
    }
}

/// All metrics of one app.
pub struct Metrics {
    config: MetricsConfig,
    model: String,
    description: EngineDescription,
    total_slots: usize,
    started_at: f64,
    server: Registry,
    latency: Latency,
    successes: [Counter; 4],
    unloads: Counter,
    fetch_seconds: Mutex<polylora_engine::Histogram>,
    adapters: AdapterCounters,
    output_rate: Mutex<OutputRate>,
    /// The long part, and when writing it began.
    long_part: Mutex<Option<(Instant, Bytes)>>,
    is_renewing: AtomicBool,
    observations: AtomicU64,
}

/// How many tokens were generated when this was looked at, and how fast since the time before.
struct OutputRate {
    measured_at: Instant,
    output_tokens: u64,
    tokens_per_second: f64,
}

struct Latency {
    ttft: Histogram,
    itl: Histogram,
    tpot: Histogram,
    e2e: Histogram,
    decode: Histogram,
    detokenize: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    n: Histogram,
    max_tokens: Histogram,
}

/// The adapters at a scrape, as the engine tells of them.
#[derive(Default)]
struct AdapterReport {
    list: Vec<AdapterInfo>,
    busy: Vec<AdapterStats>,
    /// Since the last such report.
    moves: Vec<AdapterMoves>,
    /// By name.
    aliases: Vec<Arc<Alias>>,
}

impl AdapterReport {
    fn of(engine: &dyn InferenceEngine, aliases: &Aliases) -> Self {
        Self {
            list: engine.list_adapters(),
            busy: engine.adapter_stats(),
            moves: engine.take_adapter_moves(),
            aliases: aliases.list(),
        }
    }
}

/// On what a request runs, as far as it is known by now. Shared between the layer that counts requests and the routes.
#[derive(Clone, Debug, Default)]
pub struct RunsOn(Arc<Mutex<Option<Arc<str>>>>);

impl RunsOn {
    /// It runs on this adapter (or [`BASE_LABEL`]); if on another, too, then on several.
    pub fn add(&self, name: &str) {
        let mut runs_on = self.0.lock();
        match &*runs_on {
            Some(other) if **other == *name => {}
            Some(_) => *runs_on = Some(SEVERAL_LABEL.into()),
            None => *runs_on = Some(name.into()),
        }
    }

    /// What is known.
    pub fn name(&self) -> Option<Arc<str>> {
        self.0.lock().clone()
    }
}

impl Metrics {
    /// Metrics of a server that serves `served_model_name` from an engine described by `description`.
    pub fn new(served_model_name: &str, description: &EngineDescription, config: MetricsConfig) -> Self {
        let server = Registry::lasting(ALL);
        let histogram = |definition| server.histogram(definition, &[served_model_name, "0"]);
        Self {
            config,
            model: served_model_name.to_owned(),
            description: description.clone(),
            total_slots: if description.lora_enabled { description.max_loras_per_batch } else { 0 },
            started_at: unix_seconds(),
            latency: Latency {
                ttft: histogram(&VLLM_TTFT),
                itl: histogram(&VLLM_ITL),
                tpot: histogram(&VLLM_TPOT),
                e2e: histogram(&VLLM_E2E),
                decode: histogram(&VLLM_DECODE_TIME),
                detokenize: server.histogram(&DETOKENIZE_SECONDS, &[]),
                prompt_tokens: histogram(&VLLM_REQUEST_PROMPT),
                generation_tokens: histogram(&VLLM_REQUEST_GENERATION),
                n: histogram(&VLLM_PARAM_N),
                max_tokens: histogram(&VLLM_PARAM_MAX_TOKENS),
            },
            successes: Outcome::ALL.map(|outcome| server.counter(&VLLM_SUCCESS, &[served_model_name, "0", outcome.as_str()])),
            unloads: server.counter(&UNLOADS, &[]),
            server,
            adapters: AdapterCounters::new(config.max_adapter_labels),
            fetch_seconds: Mutex::new(polylora_engine::Histogram::new(polylora_engine::stats::LOAD_SECONDS_BOUNDS)),
            output_rate: Mutex::new(OutputRate {
                measured_at: Instant::now(),
                output_tokens: 0,
                tokens_per_second: 0.0,
            }),
            long_part: Mutex::default(),
            is_renewing: AtomicBool::new(false),
            observations: AtomicU64::new(0),
        }
    }

    /// Counts an HTTP request by its route's pattern (never the raw path, which clients choose), what it ran on, and status.
    pub fn http_request(&self, route: &str, runs_on: &RunsOn, status: u16) {
        let counted = self.adapters.asked(runs_on.name().as_deref(), Instant::now());
        counted.series.answered(route, status);
    }

    /// Starts measuring one sequence that the engine has taken; `arrived` is when its request came, before its adapter was looked for. To be
    /// finished, or dropped (which counts as an abort).
    pub fn begin_request(self: &Arc<Self>, adapter: Option<&str>, prompt_tokens: usize, arrived: Instant) -> RequestMetrics {
        let now = Instant::now();
        let name = adapter.unwrap_or(BASE_LABEL);
        let counted = self.adapters.asked(Some(name), now);
        RequestMetrics {
            metrics: self.clone(),
            contender: counted.is_other.then(|| name.into()),
            series: counted.series,
            arrived,
            before_engine: now.saturating_duration_since(arrived),
            stages: None,
            is_started: false,
            has_waited: false,
            first_token: None,
            last_token: None,
            prompt_tokens: prompt_tokens as u64,
            output_tokens: 0,
            detokenizing: Duration::ZERO,
            finished: false,
        }
    }

    /// Tokens generated a second: since this was asked the last time, or if that was just now, then what it was.
    pub fn gen_throughput(&self, output_tokens: u64, now: Instant) -> f64 {
        let mut rate = self.output_rate.lock();
        let seconds = now.saturating_duration_since(rate.measured_at).as_secs_f64();
        if seconds >= 1.0 {
            rate.tokens_per_second = output_tokens.saturating_sub(rate.output_tokens) as f64 / seconds;
            rate.output_tokens = output_tokens;
            rate.measured_at = now;
        }
        rate.tokens_per_second
    }

    /// Records the settings of one API call, once for all its sequences.
    pub fn request_params(&self, n: u32, max_tokens: u32) {
        self.latency.n.record(f64::from(n));
        self.latency.max_tokens.record(f64::from(max_tokens));
        self.observed(2);
    }

    /// Records in which tier a request's adapter was when the request came: it was not in the faster ones.
    pub fn adapter_acquired(&self, adapter: &str, state_on_arrival: AdapterState) {
        let found_in = match state_on_arrival {
            AdapterState::Device => 0,
            AdapterState::Host => 1,
            AdapterState::Registered => 2,
        };
        self.adapters.asked(Some(adapter), Instant::now()).series.found_in(found_in);
    }

    /// Records how long it took to find an adapter's files, downloading them if need be. The engine measures the stages after that.
    pub fn adapter_fetched(&self, took: Duration) {
        self.fetch_seconds.lock().observe(took.as_secs_f64());
    }

    /// Records an unload.
    pub fn adapter_unloaded(&self) {
        self.unloads.increment(1);
    }

    /// So many observations were made; now and then somebody has to put them into buckets.
    fn observed(&self, count: u64) {
        let before = self.observations.fetch_add(count, Relaxed);
        if before / OBSERVATIONS_PER_UPKEEP != (before + count) / OBSERVATIONS_PER_UPKEEP {
            self.server.handle.run_upkeep();
        }
    }

    /// The text of `/metrics`, in two pieces: what the engine says now, and all else as it was at most `refresh` ago.
    pub fn render(&self, engine: &dyn InferenceEngine, aliases: &Aliases) -> [Bytes; 2] {
        let (text, long_part) = self.render_from(&engine.stats(), || AdapterReport::of(engine, aliases));
        [text.into(), long_part]
    }

    /// Whether the next scrape writes the long part itself, which takes long where there are many adapters.
    pub fn is_stale(&self) -> bool {
        self.fresh(&self.long_part.lock()).is_none()
    }

    fn fresh(&self, long_part: &Option<(Instant, Bytes)>) -> Option<Bytes> {
        let (written_at, bytes) = long_part.as_ref()?;
        (written_at.elapsed() < self.config.refresh).then(|| bytes.clone())
    }

    /// Whether somebody should call [`Self::renew`] now: whoever scrapes often then finds the long part written, before it is too old.
    /// True once for each time that it is.
    pub fn should_renew(&self) -> bool {
        let is_aging = |(written, _): &(Instant, Bytes)| 2 * written.elapsed() >= self.config.refresh;
        self.long_part.lock().as_ref().is_some_and(is_aging) && !self.is_renewing.swap(true, Relaxed)
    }

    /// Writes the long part anew, while scrapes go on with the old one.
    pub fn renew(&self, engine: &dyn InferenceEngine, aliases: &Aliases) {
        self.renew_from(|| AdapterReport::of(engine, aliases));
    }

    fn renew_from(&self, report: impl FnOnce() -> AdapterReport) {
        let asked_at = Instant::now();
        let written = self.write_long_part(&report(), asked_at);
        let mut long_part = self.long_part.lock();
        // A scrape may have written it since, if this took long: counters must not fall.
        if long_part.as_ref().is_none_or(|(written_at, _)| *written_at < asked_at) {
            *long_part = Some((asked_at, written));
        }
        drop(long_part);
        self.is_renewing.store(false, Relaxed);
    }

    fn render_from(&self, stats: &EngineStats, report: impl FnOnce() -> AdapterReport) -> (String, Bytes) {
        let text = self.engine_text(stats);
        let mut long_part = self.long_part.lock();
        let bytes = self.fresh(&long_part).unwrap_or_else(|| {
            let asked_at = Instant::now();
            let bytes = self.write_long_part(&report(), asked_at);
            *long_part = Some((asked_at, bytes.clone()));
            bytes
        });
        (text, bytes)
    }

    fn write_long_part(&self, report: &AdapterReport, now: Instant) -> Bytes {
        let mut text = self.server.handle.render();
        text.push_str(&self.process_text());
        text.push_str(&self.write_adapters(report, now));
        text.into()
    }

    /// What the system says of the process: to ask it takes longer than to write all that the engine says.
    fn process_text(&self) -> String {
        let mut scrape = ScrapeText::default();
        scrape.set(&START_TIME, &[], self.started_at);
        if let Some(bytes) = resident_bytes() {
            scrape.set(&RESIDENT, &[], bytes as f64);
        }
        let mut text = scrape.render();
        if let Some(seconds) = cpu_seconds() {
            write_seconds(&mut text, &CPU_SECONDS, &[(&[], seconds)]);
        }
        text
    }

    /// What the engine's statistics say.
    fn engine_text(&self, stats: &EngineStats) -> String {
        let mut scrape = ScrapeText::default();
        self.set_vllm(&mut scrape, stats);
        self.set_sglang(&mut scrape, stats);
        self.set_own(&mut scrape, stats);
        let mut text = scrape.render();
        let model = [self.model.as_str(), "0"];
        write_histogram(&mut text, &VLLM_QUEUE_TIME, &model, &stats.queue_seconds);
        write_histogram(&mut text, &VLLM_PREFILL_TIME, &model, &stats.prefill_seconds);
        let stages: [(&[&str], &polylora_engine::Histogram); 3] = [
            (&["fetch"], &self.fetch_seconds.lock().clone()),
            (&["pack"], &stats.registry.pack_seconds),
            (&["upload"], &stats.upload_seconds),
        ];
        write_histograms(&mut text, &LOAD_SECONDS, &stages);
        write_histogram(&mut text, &STEP_SECONDS, &[], &stats.step_seconds);
        write_histogram(&mut text, &STEP_ROWS, &[], &stats.step_rows);
        write_histogram(&mut text, &STEP_SEQUENCES, &[], &stats.step_sequences);
        text
    }

    fn set_vllm(&self, scrape: &mut ScrapeText, stats: &EngineStats) {
        let model = [self.model.as_str(), "0"];
        let usage = ratio(stats.used_blocks, stats.total_blocks);
        scrape.set(&VLLM_RUNNING, &model, stats.running as f64);
        scrape.set(&VLLM_WAITING, &model, stats.waiting as f64);
        scrape.set(&VLLM_KV_USAGE, &model, usage);
        scrape.set(&VLLM_GPU_CACHE_USAGE, &model, usage);
        scrape.count(&VLLM_PREFIX_QUERIES, &model, stats.prompt_tokens_total);
        scrape.count(&VLLM_PREFIX_HITS, &model, stats.cached_tokens_total);
        scrape.count(&VLLM_PROMPT_TOKENS, &model, stats.prompt_tokens_total);
        scrape.count(&VLLM_GENERATION_TOKENS, &model, stats.output_tokens_total);
        scrape.count(&VLLM_PREEMPTIONS, &model, stats.preemptions_total);
        let (block_size, blocks) = (self.description.block_size.to_string(), self.description.num_blocks.to_string());
        scrape.set(&VLLM_CACHE_CONFIG, &[&block_size, &blocks, "0"], 1.0);
        let slots = self.total_slots.to_string();
        let adapters = [stats.running_adapters.join(","), stats.waiting_adapters.join(",")];
        scrape.set(&VLLM_LORA_INFO, &[&slots, &adapters[0], &adapters[1]], unix_seconds());
    }

    fn set_sglang(&self, scrape: &mut ScrapeText, stats: &EngineStats) {
        let model = [self.model.as_str()];
        scrape.set(&SGLANG_RUNNING, &model, stats.running as f64);
        scrape.set(&SGLANG_QUEUE, &model, stats.waiting as f64);
        scrape.set(&SGLANG_TOKEN_USAGE, &model, ratio(stats.used_blocks, stats.total_blocks));
        scrape.set(&SGLANG_SLOTS_USED, &model, stats.running_adapters.len() as f64);
        scrape.set(&SGLANG_SLOTS_TOTAL, &model, self.total_slots as f64);
        scrape.set(&SGLANG_SLOTS_UTILIZATION, &model, ratio(stats.running_adapters.len(), self.total_slots));
    }

    fn set_own(&self, scrape: &mut ScrapeText, stats: &EngineStats) {
        let built = &self.description;
        let info = [env!("CARGO_PKG_VERSION"), &self.model, &built.architecture, &built.device, &built.dtype];
        scrape.set(&BUILD_INFO, &info, 1.0);
        let most = |bound: Option<usize>| bound.map_or_else(|| "none".to_owned(), |bound| bound.to_string());
        let config = [
            built.context_length,
            built.max_running_requests,
            built.max_queued_requests,
            self.total_slots,
            built.num_blocks,
            built.block_size,
        ];
        let [context, running, queued, slots, blocks, block_size] = config.map(|number| number.to_string());
        let loaded = most(built.max_loaded_loras);
        scrape.set(&CONFIG_INFO, &[&context, &running, &queued, &slots, &loaded, &blocks, &block_size], 1.0);
        scrape.set(&HEALTHY, &[], f64::from(u8::from(stats.healthy)));
        scrape.count(&HOST_EVICTIONS, &[], stats.registry.evictions_total);
        scrape.count(&DEVICE_HITS, &[], stats.device_hits_total);
        scrape.count(&DEVICE_UPLOADS, &[], stats.device_uploads_total);
        scrape.count(&DEVICE_EVICTIONS, &[], stats.device_evictions_total);
        scrape.set(&ADAPTER_BYTES, &["device"], stats.device_adapter_bytes as f64);
        scrape.set(&ADAPTER_BYTES, &["host"], stats.host_adapter_bytes as f64);
        scrape.set(&ADAPTER_CAPACITY, &["device"], stats.device_adapter_capacity_bytes as f64);
        scrape.count(&STEPS, &[], stats.steps_total);
        let free = stats.total_blocks.saturating_sub(stats.used_blocks + stats.cached_blocks);
        for (state, blocks) in [("used", stats.used_blocks), ("cached", stats.cached_blocks), ("free", free)] {
            scrape.set(&KV_BLOCKS, &[state], blocks as f64);
        }
    }

    /// Everything by adapter. With ten thousand registered their list is too long for every scrape, too.
    fn write_adapters(&self, report: &AdapterReport, now: Instant) -> String {
        let AdapterReport { list, busy, moves, aliases } = report;
        self.adapters.settle(now);
        for moves in moves {
            self.adapters.unasked(&moves.name, now).moved(moves);
        }
        let targets = || aliases.iter().flat_map(|alias| alias.targets().iter().map(move |target| (alias, target)));
        for (alias, target) in targets() {
            self.adapters
                .unasked(target.adapter(), now)
                .chosen_by(alias.name(), target.take_new_requests());
        }
        self.adapters
            .retain_aliases(|name| aliases.binary_search_by(|alias| (**alias.name()).cmp(name)).is_ok());
        let all = self.adapters.read();
        let mut text = String::new();
        write_counts(&mut text, &all, &self.model);

        let names = list.iter().map(|info| &*info.name).chain(busy.iter().map(|stats| &*stats.name));
        let labelled = self.adapters.labelled(names.chain(targets().map(|(_, target)| &**target.adapter())));
        let label = |name| if labelled.contains(name) { name } else { OTHER_LABEL };
        let mut scrape = ScrapeText::default();
        self.set_residency(&mut scrape, list, &label);
        // What runs and waits.
        let mut by_label: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for stats in busy {
            let sums = by_label.entry(label(&stats.name)).or_default();
            *sums = (sums.0 + stats.running, sums.1 + stats.waiting);
        }
        for (label, (running, waiting)) in &by_label {
            scrape.set(&ADAPTER_RUNNING, &[label], *running as f64);
            scrape.set(&ADAPTER_WAITING, &[label], *waiting as f64);
        }
        let mut shares: BTreeMap<(Arc<str>, Arc<str>), f64> = BTreeMap::new();
        for (alias, target) in targets() {
            let labels = (Arc::clone(alias.name()), label(target.adapter()).into());
            *shares.entry(labels).or_default() += alias.share(target);
        }
        for ((alias, adapter), requests) in alias_counts(&all, shares.keys().cloned()) {
            scrape.count(&ALIAS_REQUESTS, &[&alias, &adapter], requests);
        }
        for ((alias, adapter), share) in &shares {
            scrape.set(&ALIAS_SHARE, &[alias, adapter], *share);
        }
        text.push_str(&scrape.render());
        text
    }

    fn set_residency<'n>(&self, scrape: &mut ScrapeText, list: &'n [AdapterInfo], label: &dyn Fn(&'n str) -> &'n str) {
        let mut by_state = [0; 3];
        for adapter in list {
            by_state[adapter.state as usize] += 1;
        }
        let [registered, host, device] = by_state.map(f64::from);
        scrape.set(&VLLM_LORA_GPU, &["0"], device);
        scrape.set(&VLLM_LORA_CPU, &["0"], host + device);
        for (state, count) in [("registered", registered), ("host", host), ("device", device)] {
            scrape.set(&ADAPTERS, &[state], count);
        }
        let mut leases: BTreeMap<&str, usize> = BTreeMap::new();
        for adapter in list.iter().filter(|adapter| adapter.state != AdapterState::Registered) {
            let label = if adapter.parts.is_empty() {
                label(&adapter.name)
            } else {
                COMBINATION_LABEL
            };
            *leases.entry(label).or_default() += adapter.leases;
            if *label == *adapter.name {
                let level = if adapter.state == AdapterState::Device { "gpu" } else { "cpu" };
                let pinned = if adapter.pinned { "true" } else { "false" };
                scrape.set(&VLLM_LORA_LOADED, &["0", &adapter.name, level, pinned], 1.0);
            }
        }
        for (label, leases) in leases {
            scrape.set(&ADAPTER_LEASES, &[label], leases as f64);
        }
    }
}

/// The measures of one sequence. Finish it with how it ended; dropped without that it counts as aborted (the client went away).
pub struct RequestMetrics {
    metrics: Arc<Metrics>,
    series: Arc<AdapterSeries>,
    /// The adapter's name, if it had no label.
    contender: Option<Arc<str>>,
    arrived: Instant,
    /// From its arrival until the engine had it: the load of its adapter, its prompt's tokenization.
    before_engine: Duration,
    /// As the engine has them, once it has the sequence.
    stages: Option<Arc<Stages>>,
    is_started: bool,
    has_waited: bool,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    prompt_tokens: u64,
    output_tokens: u64,
    detokenizing: Duration,
    finished: bool,
}

impl RequestMetrics {
    /// The engine has it.
    pub fn submitted(&mut self, stages: &Arc<Stages>) {
        self.stages = Some(Arc::clone(stages));
    }

    /// The prompt is computed, with so many tokens from the prefix cache.
    pub fn started(&mut self, cached_tokens: u32) {
        self.is_started = true;
        self.series.started(self.prompt_tokens, u64::from(cached_tokens));
        self.count_waiting();
    }

    /// Once, as soon as it is known: one that fails in its prefill has waited, too.
    fn count_waiting(&mut self) {
        let queued = self.stages.as_ref().and_then(|stages| stages.queued());
        if let (false, Some(queued)) = (self.has_waited, queued) {
            self.has_waited = true;
            self.series.waited(self.before_engine + queued);
        }
    }

    /// A token came.
    pub fn token(&mut self) {
        let now = Instant::now();
        self.output_tokens += 1;
        self.series.token();
        match self.last_token.replace(now) {
            Some(last) => self.metrics.latency.itl.record((now - last).as_secs_f64()),
            None => {
                self.first_token = Some(now);
                self.metrics.latency.ttft.record((now - self.arrived).as_secs_f64());
                self.series.first_token(now - self.arrived);
            }
        }
        self.metrics.observed(1);
    }

    /// The last token's text is made.
    pub fn detokenized(&mut self) {
        if let Some(began) = self.last_token {
            self.detokenizing += began.elapsed();
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
        self.count_waiting();
        if let Some(stages) = self.stages.take() {
            stages.end(self.output_tokens, outcome.as_str());
        }
        let now = Instant::now();
        let latency = &self.metrics.latency;
        self.metrics.successes[outcome as usize].increment(1);
        self.series.ended(outcome);
        if let Some(name) = &self.contender {
            let prompt_tokens = if self.is_started { self.prompt_tokens } else { 0 };
            self.metrics.adapters.weigh(name, 1 + prompt_tokens + self.output_tokens);
        }
        latency.e2e.record((now - self.arrived).as_secs_f64());
        latency.prompt_tokens.record(self.prompt_tokens as f64);
        latency.generation_tokens.record(self.output_tokens as f64);
        latency.detokenize.record(self.detokenizing.as_secs_f64());
        if let Some(first) = self.first_token {
            let decode = (now - first).as_secs_f64();
            latency.decode.record(decode);
            if self.output_tokens > 1 {
                latency.tpot.record(decode / (self.output_tokens - 1) as f64);
            }
        }
        self.metrics.observed(6);
    }
}

impl Drop for RequestMetrics {
    fn drop(&mut self) {
        self.record_end(Outcome::Abort);
    }
}

fn write_head(text: &mut String, definition: &Definition, kind: &str) {
    formatting::write_help_line(text, definition.name, None, None, definition.help);
    formatting::write_type_line(text, definition.name, None, None, kind);
}

/// `name_suffix{label="value",le="bound"} value`, without an allocation: the library makes several for each line.
fn write_line(text: &mut String, definition: &Definition, suffix: &str, labels: &[&str], bound: Option<f64>, value: impl Display) {
    assert_eq!(definition.labels.len(), labels.len(), "{}: label names and values", definition.name);
    text.push_str(definition.name);
    text.push_str(suffix);
    let mut before = '{';
    let mut begin_label = |text: &mut String, name: &str| {
        text.push(std::mem::replace(&mut before, ','));
        text.push_str(name);
        text.push_str("=\"");
    };
    for (name, value) in definition.labels.iter().zip(labels) {
        begin_label(text, name);
        push_escaped(text, value);
        text.push('"');
    }
    if let Some(bound) = bound {
        begin_label(text, "le");
        let written = if bound == f64::INFINITY {
            write!(text, "+Inf\"")
        } else {
            write!(text, "{bound}\"")
        };
        written.expect("a string takes all text");
    }
    if before == ',' {
        text.push('}');
    }
    writeln!(text, " {value}").expect("a string takes all text");
}

/// Label values are free text.
fn push_escaped(text: &mut String, value: &str) {
    let mut rest = value;
    while let Some(index) = rest.find(['\\', '"', '\n']) {
        text.push_str(&rest[..index]);
        text.push_str(match rest.as_bytes()[index] {
            b'\\' => "\\\\",
            b'"' => "\\\"",
            _ => "\\n",
        });
        rest = &rest[index + 1..];
    }
    text.push_str(rest);
}

/// One that the engine keeps, with bounds of its own; an engine that keeps none has an empty one.
fn write_histogram(text: &mut String, definition: &Definition, labels: &[&str], histogram: &polylora_engine::Histogram) {
    write_histograms(text, definition, &[(labels, histogram)]);
}

/// Several, by the values of their labels.
fn write_histograms(text: &mut String, definition: &Definition, series: &[(&[&str], &polylora_engine::Histogram)]) {
    write_head(text, definition, "histogram");
    for (labels, histogram) in series {
        write_buckets(text, definition, labels, histogram);
    }
}

fn write_buckets(text: &mut String, definition: &Definition, labels: &[&str], histogram: &polylora_engine::Histogram) {
    let mut count = 0;
    let mut bounds = histogram.bounds.iter();
    for bucket in &histogram.counts {
        count += bucket;
        let bound = bounds.next().copied().unwrap_or(f64::INFINITY);
        write_line(text, definition, "_bucket", labels, Some(bound), count);
    }
    write_line(text, definition, "_sum", labels, None, histogram.sum);
    write_line(text, definition, "_count", labels, None, count);
}

/// A counter of seconds, by the values of its labels.
fn write_seconds(text: &mut String, definition: &Definition, series: &[(&[&str], f64)]) {
    write_head(text, definition, "counter");
    for (labels, seconds) in series {
        write_line(text, definition, "", labels, None, *seconds);
    }
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
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
    use crate::aliases::{AliasDefinition, Names, TargetDefinition};

    /// Whatever is named is an adapter, but for the alias.
    struct AnyName;

    impl Names for AnyName {
        fn base_names(&self) -> &[String] {
            &[]
        }

        fn is_adapter(&self, name: &str) -> bool {
            name != "alias"
        }
    }

    fn description() -> EngineDescription {
        EngineDescription {
            architecture: "LlamaForCausalLM".into(),
            device: "cpu".into(),
            dtype: "float32".into(),
            vocab_size: 512,
            context_length: 1024,
            eos_token_ids: vec![2],
            num_blocks: 100,
            min_blocks: 100,
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
        Arc::new(Metrics::new(
            "demo",
            &description(),
            MetricsConfig {
                max_adapter_labels,
                refresh: Duration::ZERO,
            },
        ))
    }

    impl Metrics {
        fn text_from(&self, stats: &EngineStats, report: impl FnOnce() -> AdapterReport) -> String {
            let (text, long_part) = self.render_from(stats, report);
            text + std::str::from_utf8(&long_part).unwrap()
        }
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
            companion_bytes: 0,
            pinned,
            leases: 2,
            requests_total: 0,
            hits_total: 0,
            last_used: None,
            last_error: None,
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
        let text = metrics(8).text_from(&stats(), Default::default);
        for definition in ALL {
            let by_traffic = [
                HTTP_REQUESTS,
                VLLM_LORA_LOADED,
                ADAPTER_LEASES,
                ADAPTER_RUNNING,
                ADAPTER_WAITING,
                ALIAS_REQUESTS,
                ALIAS_SHARE,
            ]
            .contains(definition);
            let series = text.lines().filter(|line| line.starts_with(definition.name)).count();
            assert_eq!(series == 0, by_traffic, "{}", definition.name);
            if !by_traffic {
                let kind = match definition.kind {
                    Kind::Counter => "counter",
                    Kind::Gauge => "gauge",
                    Kind::Histogram(_) => "histogram",
                };
                for line in [
                    format!("# TYPE {} {kind}", definition.name),
                    format!("# HELP {} {}", definition.name, definition.help),
                ] {
                    assert_eq!(text.lines().filter(|given| **given == line).count(), 1, "{line}");
                }
            }
        }
    }

    #[test]
    fn what_routers_read_is_written_as_they_expect_it() {
        let text = metrics(8).text_from(&stats(), Default::default);
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
        let mut request = metrics.begin_request(Some("json"), 12, Instant::now() - Duration::from_secs(3));
        request.started(4);
        request.token();
        request.token();
        request.finish(Outcome::Length);
        drop(metrics.begin_request(None, 5, Instant::now()));

        let text = metrics.text_from(&stats(), Default::default);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"json\",outcome=\"length\"}"), 1.0);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"json\",outcome=\"abort\"}"), 0.0);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"(base)\",outcome=\"abort\"}"), 1.0);
        assert_eq!(value(&text, "polylora_prompt_tokens_total{adapter=\"json\"}"), 12.0);
        assert_eq!(value(&text, "polylora_cached_prompt_tokens_total{adapter=\"json\"}"), 4.0);
        assert_eq!(value(&text, "polylora_output_tokens_total{adapter=\"json\"}"), 2.0);
        let model = "{model_name=\"demo\",engine=\"0\"}";
        assert_eq!(value(&text, &format!("vllm:time_to_first_token_seconds_count{model}")), 1.0);
        let ttft = value(&text, &format!("vllm:time_to_first_token_seconds_sum{model}"));
        assert!(ttft >= 3.0, "from its arrival, got {ttft}");
        assert_eq!(value(&text, &format!("vllm:inter_token_latency_seconds_count{model}")), 1.0);
        assert_eq!(value(&text, &format!("vllm:e2e_request_latency_seconds_count{model}")), 2.0);
        assert_eq!(value(&text, &format!("vllm:request_prompt_tokens_sum{model}")), 17.0);
    }

    #[test]
    fn adapters_beyond_the_bound_share_one_label() {
        let metrics = metrics(2);
        let loaded = AdapterMoves {
            name: "loaded".into(),
            loads: 1,
            ..AdapterMoves::default()
        };
        // One that was only loaded gives way to those that are asked for.
        let report = || AdapterReport {
            moves: vec![loaded],
            ..AdapterReport::default()
        };
        let text = metrics.text_from(&stats(), report);
        assert_eq!(value(&text, "polylora_adapter_loads_total{adapter=\"loaded\",outcome=\"ok\"}"), 1.0);
        for name in ["a", "b", "c", "d", "a"] {
            metrics.begin_request(Some(name), 1, Instant::now()).finish(Outcome::Stop);
        }
        let text = metrics.text_from(&stats(), Default::default);
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
        metrics.adapter_fetched(Duration::from_millis(20));
        let adapters = vec![adapter("a", AdapterState::Device, true), adapter("b", AdapterState::Registered, false)];
        let busy = [("a", 1, 2), ("c", 3, 4), ("d", 5, 6)].map(|(name, running, waiting)| AdapterStats {
            name: name.into(),
            running,
            waiting,
            ..AdapterStats::default()
        });
        let moves = |name: &str, loads, load_failures| AdapterMoves {
            name: name.into(),
            loads,
            load_failures,
            host_evictions: 3,
            device_uploads: 4,
            device_evictions: 5,
        };
        let report = || AdapterReport {
            list: adapters,
            busy: busy.into(),
            moves: vec![moves("a", 1, 2)],
            ..AdapterReport::default()
        };
        let first = || AdapterReport {
            moves: vec![moves("a", 6, 0)],
            ..AdapterReport::default()
        };
        metrics.text_from(&stats(), first);
        let text = metrics.text_from(&stats(), report);
        assert_eq!(value(&text, "polylora_adapter_loads_total{adapter=\"a\",outcome=\"ok\"}"), 7.0);
        assert_eq!(value(&text, "polylora_adapter_loads_total{adapter=\"(other)\",outcome=\"ok\"}"), 0.0);
        assert_eq!(value(&text, "polylora_adapter_uploads_total{adapter=\"a\"}"), 8.0);
        assert_eq!(value(&text, "polylora_adapter_evictions_total{adapter=\"a\",tier=\"host\"}"), 6.0);
        assert_eq!(value(&text, "polylora_adapter_evictions_total{adapter=\"a\",tier=\"device\"}"), 10.0);
        assert_eq!(value(&text, "polylora_adapter_waiting_requests{adapter=\"a\"}"), 2.0);
        assert_eq!(value(&text, "polylora_adapter_running_requests{adapter=\"(other)\"}"), 8.0);
        assert_eq!(value(&text, "polylora_adapter_cache_hits_total{adapter=\"a\",tier=\"device\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_cache_misses_total{adapter=\"a\",tier=\"device\"}"), 2.0);
        assert_eq!(value(&text, "polylora_adapter_cache_hits_total{adapter=\"a\",tier=\"host\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_cache_misses_total{adapter=\"a\",tier=\"host\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_load_seconds_bucket{stage=\"fetch\",le=\"0.025\"}"), 1.0);
        assert_eq!(value(&text, "polylora_adapter_load_seconds_bucket{stage=\"fetch\",le=\"0.01\"}"), 0.0);
        assert_eq!(value(&text, "polylora_adapter_loads_total{adapter=\"a\",outcome=\"error\"}"), 2.0);
        let loaded = "vllm:lora_adapter_loaded{engine=\"0\",adapter_name=\"a\",level=\"gpu\",pinned=\"true\"}";
        assert_eq!(value(&text, loaded), 1.0);
        assert!(!text.contains("adapter_name=\"b\""), "only those in memory are listed");
        assert_eq!(value(&text, "polylora_adapters{state=\"registered\"}"), 1.0);
    }

    #[test]
    fn a_busy_adapter_takes_the_label_of_an_idle_one_and_what_that_had_counted_is_still_in_the_sum() {
        let metrics = metrics(1);
        let begin = Instant::now();
        let aliases = Aliases::default();
        let alias = AliasDefinition {
            name: "alias".into(),
            targets: ["idle", "busy"]
                .map(|adapter| TargetDefinition {
                    adapter: adapter.into(),
                    weight: 1.0,
                })
                .into(),
        };
        let alias = aliases.set(&alias, &AnyName).unwrap();
        let report = || AdapterReport {
            list: vec![adapter("idle", AdapterState::Host, false), adapter("busy", AdapterState::Device, true)],
            aliases: aliases.list(),
            ..AdapterReport::default()
        };
        let write = |seconds| metrics.write_adapters(&report(), begin + Duration::from_secs(seconds));
        let requests = |text: &str, adapter: &str| value(text, &format!("polylora_requests_total{{adapter=\"{adapter}\",outcome=\"stop\"}}"));
        let ask = |name: &str| {
            let runs_on = RunsOn::default();
            runs_on.add(name);
            metrics.http_request("/generate", &runs_on, 200);
            metrics.begin_request(Some(name), 1, Instant::now()).finish(Outcome::Stop);
            // The first key that it is chosen for: a request by the alias.
            let key = (0..)
                .map(|key| key.to_string())
                .find(|key| **alias.choose(key).adapter() == *name)
                .unwrap();
            assert_eq!(aliases.resolve("alias", &key, &AnyName).unwrap(), name);
        };
        ask("idle");
        (0..9).for_each(|_| ask("busy"));
        let text = write(1);
        assert_eq!((requests(&text, "idle"), requests(&text, "(other)")), (1.0, 9.0));
        assert!(!text.contains("adapter=\"busy\""), "labels are not taken at once: {text}");
        assert_eq!(value(&text, "polylora_alias_share{alias=\"alias\",adapter=\"(other)\"}"), 0.5);
        assert_eq!(value(&text, "polylora_adapter_leases{adapter=\"(other)\"}"), 2.0);

        write(600);
        ask("busy");
        let text = write(601);
        assert!(!text.contains("\"idle\""), "{text}");
        let counted = ["busy", "(other)", "(former)"].map(|label| requests(&text, label));
        assert_eq!(counted, [1.0, 9.0, 1.0]);
        for (adapter, count) in [("busy", 1.0), ("(other)", 9.0), ("(former)", 1.0)] {
            let http = format!("polylora_http_requests_total{{route=\"/generate\",model=\"demo\",adapter=\"{adapter}\",status=\"200\"}}");
            assert_eq!(value(&text, &http), count);
            let alias = format!("polylora_alias_requests_total{{alias=\"alias\",adapter=\"{adapter}\"}}");
            assert_eq!(value(&text, &alias), count);
        }
        assert_eq!(value(&text, "polylora_adapter_leases{adapter=\"busy\"}"), 2.0);
        let loaded = "vllm:lora_adapter_loaded{engine=\"0\",adapter_name=\"busy\",level=\"gpu\",pinned=\"true\"}";
        assert_eq!(value(&text, loaded), 1.0);

        aliases.remove("alias").unwrap();
        assert!(!write(602).contains("alias=\"alias\""), "the series of an alias end with it");
    }

    #[test]
    fn observations_are_put_into_buckets_without_scrapes() {
        let metrics = metrics(1);
        for _ in 0..OBSERVATIONS_PER_UPKEEP {
            metrics.request_params(1, 100);
        }
        // What is left for the scrape is less than one upkeep; all were counted once.
        let text = metrics.text_from(&stats(), Default::default);
        let model = "{model_name=\"demo\",engine=\"0\"}";
        assert_eq!(
            value(&text, &format!("vllm:request_params_n_count{model}")),
            OBSERVATIONS_PER_UPKEEP as f64
        );
        assert_eq!(
            value(&text, &format!("vllm:request_params_max_tokens_sum{model}")),
            100.0 * OBSERVATIONS_PER_UPKEEP as f64
        );
    }

    #[test]
    fn the_part_about_adapters_is_written_at_most_so_often() {
        let refresh = |refresh| {
            let config = MetricsConfig {
                refresh,
                ..MetricsConfig::default()
            };
            let metrics = Arc::new(Metrics::new("demo", &description(), config));
            let mut lists = 0;
            for _ in 0..3 {
                metrics.text_from(&stats(), || {
                    lists += 1;
                    Default::default()
                });
            }
            lists
        };
        assert_eq!((refresh(Duration::from_secs(3600)), refresh(Duration::ZERO)), (1, 3));
    }

    #[test]
    fn the_part_about_adapters_is_written_ahead_for_those_who_scrape_often() {
        let config = MetricsConfig {
            refresh: Duration::from_secs(3600),
            ..MetricsConfig::default()
        };
        let metrics = Metrics::new("demo", &description(), config);
        assert!(!metrics.should_renew(), "nobody has asked");
        metrics.text_from(&stats(), AdapterReport::default);
        assert!(!metrics.should_renew(), "it is new");
        let long_ago = Instant::now().checked_sub(Duration::from_secs(1800)).expect("the clock runs for longer");
        metrics.long_part.lock().as_mut().expect("it was written").0 = long_ago;
        assert!(metrics.should_renew());
        assert!(!metrics.should_renew(), "somebody is at it");
        let list = vec![adapter("a", AdapterState::Host, false)];
        metrics.renew_from(|| AdapterReport {
            list,
            ..AdapterReport::default()
        });
        assert!(!metrics.should_renew(), "it is new again");
        let text = metrics.text_from(&stats(), || panic!("it was written ahead"));
        assert_eq!(value(&text, "polylora_adapters{state=\"host\"}"), 1.0);
    }

    #[test]
    fn throughput_is_of_the_time_since_it_was_asked_for() {
        let metrics = metrics(8);
        let begin = metrics.output_rate.lock().measured_at;
        let ask = |seconds, tokens| metrics.gen_throughput(tokens, begin + Duration::from_secs_f64(seconds));
        let first = ask(10.0, 500);
        assert!((first - 50.0).abs() < 1.0, "{first}");
        assert_eq!(ask(10.1, 600), first, "too early for another");
        let second = ask(12.0, 700);
        assert!((second - 100.0).abs() < 1.0, "{second}");
        assert_eq!(ask(14.0, 700), 0.0);
    }

    #[test]
    fn label_values_are_escaped() {
        let metrics = metrics(8);
        metrics.begin_request(Some("x\"y\\z\nw"), 1, Instant::now()).finish(Outcome::Stop);
        let mut stats = stats();
        stats.running_adapters = vec!["x\"y\\z\nw".into(), "\\\\".into()];
        let text = metrics.text_from(&stats, Default::default);
        assert_eq!(value(&text, "polylora_requests_total{adapter=\"x\\\"y\\\\z\\nw\",outcome=\"stop\"}"), 1.0);
        assert!(text.contains("running_lora_adapters=\"x\\\"y\\\\z\\nw,\\\\\\\\\""), "{text}");
    }
}
