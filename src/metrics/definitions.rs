//! Every metric once: name, kind, labels, help, buckets.

use ::metrics::{Key, Label};
use polylora_engine::stats::LOAD_SECONDS_BOUNDS;

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

impl Definition {
    /// The series with these label values, in the order of the label names.
    pub(super) fn key(&self, values: &[&str]) -> Key {
        assert_eq!(self.labels.len(), values.len(), "{}: label names and values", self.name);
        let labels = self.labels.iter().zip(values);
        Key::from_parts(
            self.name,
            labels.map(|(&name, &value)| Label::new(name, value.to_owned())).collect::<Vec<_>>(),
        )
    }
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
pub(super) const ADAPTER_TTFT_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
const DETOKENIZE_BUCKETS: &[f64] = &[
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
];

const VLLM: &[&str] = &["model_name", "engine"];

macro_rules! definitions {
    ($($ident:ident = $name:literal, $kind:expr, $labels:expr, $help:literal;)*) => {
        $(pub(super) const $ident: Definition = Definition { name: $name, kind: $kind, labels: $labels, help: $help };)*
        /// Every metric that can appear on `/metrics`, grouped by who reads them.
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
    VLLM_PREFILL_TIME = "vllm:request_prefill_time_seconds", Kind::Histogram(REQUEST_BUCKETS), VLLM, "From a request's admission to the batch to the end of its prompt's computation.";
    VLLM_DECODE_TIME = "vllm:request_decode_time_seconds", Kind::Histogram(REQUEST_BUCKETS), VLLM, "From a request's first token to its end.";
    DETOKENIZE_SECONDS = "polylora_request_detokenize_seconds", Kind::Histogram(DETOKENIZE_BUCKETS), &[], "Time spent on a request's tokens to make text of them and look for stop texts.";
    VLLM_REQUEST_PROMPT = "vllm:request_prompt_tokens", Kind::Histogram(TOKEN_BUCKETS), VLLM, "Prompt tokens of a request.";
    VLLM_REQUEST_GENERATION = "vllm:request_generation_tokens", Kind::Histogram(TOKEN_BUCKETS), VLLM, "Tokens generated for a request.";
    VLLM_PARAM_N = "vllm:request_params_n", Kind::Histogram(N_BUCKETS), VLLM, "The n of requests.";
    VLLM_PARAM_MAX_TOKENS = "vllm:request_params_max_tokens", Kind::Histogram(TOKEN_BUCKETS), VLLM, "The max_tokens of requests.";
    VLLM_CACHE_CONFIG = "vllm:cache_config_info", Kind::Gauge, &["block_size", "num_gpu_blocks", "engine"], "Always 1; the KV cache's shape is in the labels. Adapters may have the memory of some of the blocks: polylora_kv_blocks counts those that there are.";
    VLLM_LORA_INFO = "vllm:lora_requests_info", Kind::Gauge, &["max_lora", "running_lora_adapters", "waiting_lora_adapters"], "Unix time of the scrape; adapters that run, and that only wait, are in the labels.";
    VLLM_LORA_LOADED = "vllm:lora_adapter_loaded", Kind::Gauge, &["engine", "adapter_name", "level", "pinned"], "1 for each adapter in memory that has a label, by where it is (gpu is the device tier, cpu host memory).";
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
    CONFIG_INFO = "polylora_config_info", Kind::Gauge, &["context_length", "max_running_requests", "max_queued_requests", "max_loras_per_batch", "max_loaded_loras", "num_blocks", "block_size"], "Always 1; the engine's bounds are in the labels.";
    HEALTHY = "polylora_engine_healthy", Kind::Gauge, &[], "1 until the device has failed.";
    HTTP_REQUESTS = "polylora_http_requests_total", Kind::Counter, &["route", "model", "adapter", "status"], "HTTP requests answered, by route, the model and adapter that they ran on (empty if they named none that there is; see polylora_requests_total), and status.";
    REQUESTS = "polylora_requests_total", Kind::Counter, &["adapter", "outcome"], "Sequences that ended, by adapter and outcome (stop, length, abort, error). The adapters with most traffic have a label each; (other) are those without, (former) is what labels that were lost had counted: leave it out of rates.";
    PROMPT_TOKENS = "polylora_prompt_tokens_total", Kind::Counter, &["adapter"], "Prompt tokens of started sequences, by adapter.";
    CACHED_TOKENS = "polylora_cached_prompt_tokens_total", Kind::Counter, &["adapter"], "Of those, tokens whose KV was in the prefix cache.";
    OUTPUT_TOKENS = "polylora_output_tokens_total", Kind::Counter, &["adapter"], "Tokens generated, by adapter.";
    ADAPTER_TTFT = "polylora_adapter_time_to_first_token_seconds", Kind::Histogram(ADAPTER_TTFT_BUCKETS), &["adapter"], "From a sequence's arrival to its first token, by adapter.";
    CACHE_HITS = "polylora_adapter_cache_hits_total", Kind::Counter, &["adapter", "tier"], "Requests that found their adapter in this tier (device, host, disk) on arrival.";
    CACHE_MISSES = "polylora_adapter_cache_misses_total", Kind::Counter, &["adapter", "tier"], "Requests that did not find their adapter in this tier on arrival.";
    ADAPTER_RUNNING = "polylora_adapter_running_requests", Kind::Gauge, &["adapter"], "Requests in the batch, by adapter with a label; the rest together.";
    ADAPTER_WAITING = "polylora_adapter_waiting_requests", Kind::Gauge, &["adapter"], "Requests waiting, by adapter with a label; the rest together.";
    ADAPTER_WAITED = "polylora_adapter_waiting_seconds_total", Kind::Counter, &["adapter"], "From the arrival of requests to their admission to the batch, by adapter: a load of the adapter and the prompt's tokenization included.";
    LOADS = "polylora_adapter_loads_total", Kind::Counter, &["adapter", "outcome"], "Times that an adapter was read, checked and packed into host memory, by outcome (ok, error).";
    UNLOADS = "polylora_adapter_unloads_total", Kind::Counter, &[], "Adapters unloaded by an operator.";
    LOAD_SECONDS = "polylora_adapter_load_seconds", Kind::Histogram(LOAD_SECONDS_BOUNDS), &["stage"], "Time that loads of adapters took, by stage: fetch (find or download the files), pack (read, check, pack into host memory), upload (copy to the device).";
    ADAPTER_UPLOADS = "polylora_adapter_uploads_total", Kind::Counter, &["adapter"], "Times that an adapter was copied to the device.";
    EVICTIONS = "polylora_adapter_evictions_total", Kind::Counter, &["adapter", "tier"], "Times that an adapter left a tier (device, host) for others.";
    HOST_EVICTIONS = "polylora_host_adapter_evictions_total", Kind::Counter, &[], "Adapters that left host memory for others.";
    DEVICE_HITS = "polylora_device_adapter_hits_total", Kind::Counter, &[], "Requests that found their adapter on the device when they were first scheduled.";
    DEVICE_UPLOADS = "polylora_device_adapter_uploads_total", Kind::Counter, &[], "Times that an adapter had to be copied to the device.";
    DEVICE_EVICTIONS = "polylora_device_adapter_evictions_total", Kind::Counter, &[], "Adapters that left the device for others.";
    ADAPTER_BYTES = "polylora_adapter_resident_bytes", Kind::Gauge, &["tier"], "Bytes of adapters in each tier.";
    ADAPTER_CAPACITY = "polylora_adapter_capacity_bytes", Kind::Gauge, &["tier"], "Bytes that adapters may take on the device.";
    ADAPTERS = "polylora_adapters", Kind::Gauge, &["state"], "Adapters by state: registered (known by name), host, device.";
    ADAPTER_LEASES = "polylora_adapter_leases", Kind::Gauge, &["adapter"], "Requests in flight that hold the adapter, by adapter with a label; the rest together.";
    ALIAS_REQUESTS = "polylora_alias_requests_total", Kind::Counter, &["alias", "adapter"], "Requests that named an alias, by the adapter that it chose, if that has a label.";
    ALIAS_SHARE = "polylora_alias_share", Kind::Gauge, &["alias", "adapter"], "Part of an alias's callers that an adapter with a label answers, or the rest together; the parts of an alias sum to 1.";
    STEPS = "polylora_steps_total", Kind::Counter, &[], "Batches run.";
    STEP_SECONDS = "polylora_step_seconds", Kind::Histogram(ITL_BUCKETS), &[], "From the scheduling of a batch to the commit of its output.";
    STEP_ROWS = "polylora_step_rows", Kind::Histogram(TOKEN_BUCKETS), &[], "Rows of a batch: a prompt's chunk has many, a decoding sequence one.";
    STEP_SEQUENCES = "polylora_step_sequences", Kind::Histogram(TOKEN_BUCKETS), &[], "Sequences of a batch.";
    KV_BLOCKS = "polylora_kv_blocks", Kind::Gauge, &["state"], "KV blocks: used by running requests, cached for later ones, free.";
    RESIDENT = "process_resident_memory_bytes", Kind::Gauge, &[], "Resident memory of the process.";
    CPU_SECONDS = "process_cpu_seconds_total", Kind::Counter, &[], "CPU time of the process, user and system.";
    START_TIME = "process_start_time_seconds", Kind::Gauge, &[], "Unix time of the process's start.";
}
