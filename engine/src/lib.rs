//! The engine of polylora: token ids in, token ids out; no text and no HTTP.
//!
//! Read this file first: [`InferenceEngine`] is all that the gateway sees.

use std::{future::Future, pin::Pin, sync::Arc};

pub mod adapter;
pub mod backend;
pub mod batch;
pub mod block_pool;
pub mod decoder;
pub mod fairness;
pub mod files;
pub mod llm;
mod masks;
pub mod mock;
pub mod request;
pub mod residency;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
pub mod stages;
pub mod stats;
#[cfg(test)]
mod testing;
pub mod weights;
pub mod worker;

pub use adapter::{AdapterError, AdapterInfo, AdapterLease, LoadRequest, UnloadMode, UnloadReport, Unloading};
pub use files::{EmbeddedFile, FileSource, MemoryFile};
pub use llm::{EngineConfig, EngineParts, EvictionPolicy, LlmEngine, LoraConfig, StartError};
pub use mock::MockEngine;
pub use request::{
    Constraint, FinishReason, GenerationRequest, LogprobsParams, PromptLogprobsParams, RequestError, RequestId, SamplingParams, SubmitError,
    TokenEvent, TokenLogprobs,
};
pub use stages::Stages;
pub use stats::{AdapterMoves, AdapterStats, Histogram};

/// A boxed future, so that the trait stays object-safe.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What the gateway sees: token ids in, events out. Object-safe; no HTTP, no tensors, no text.
pub trait InferenceEngine: Send + Sync + 'static {
    /// The model and the limits; fixed.
    fn describe(&self) -> &EngineDescription;

    /// Admits the request or refuses at once; never waits for room.
    /// The stream ends with exactly one `Finished` or `Failed`. Dropping it cancels: blocks and lease are free at the next step.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was queued.
    fn submit(&self, request: GenerationRequest) -> Result<TokenStream, SubmitError>;

    /// Gives a lease on an adapter by name, after bringing it to the host if it is only registered. Does not block the thread;
    /// other requests go on.
    fn acquire_adapter<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<AdapterLease, AdapterError>>;
    /// Reads, checks, packs and registers an adapter; nothing is registered on an error.
    fn load_adapter(&self, request: LoadRequest) -> BoxFuture<'_, Result<AdapterInfo, AdapterError>>;
    /// Leases on several adapters, all of them or none: a series of `acquire_adapter` could wait for room that it has itself.
    fn acquire_adapters<'a>(&'a self, names: &'a [&'a str]) -> BoxFuture<'a, Result<Vec<AdapterLease>, AdapterError>>;
    /// Forgets a name at once: it is unknown from here on. What is given says how many requests still run on it, and when they have
    /// ended: of themselves, or with [`UnloadMode::Abort`] at the next step, each with `FinishReason::AdapterUnloaded`.
    ///
    /// # Errors
    /// `Unknown`, `NotEnabled`.
    fn unload_adapter(&self, name: &str, mode: UnloadMode) -> Result<Unloading, AdapterError>;
    /// Pins or unpins.
    ///
    /// # Errors
    /// `Unknown`, `TooManyPinned`.
    fn pin_adapter(&self, name: &str, pinned: bool) -> Result<(), AdapterError>;
    /// Every registered adapter, least recently used first.
    fn list_adapters(&self) -> Vec<AdapterInfo>;
    /// Their names alone, in the same order.
    fn adapter_names(&self) -> Vec<Arc<str>> {
        self.list_adapters().into_iter().map(|info| info.name).collect()
    }
    /// The first of their names in alphabetical order, at most `most`: cheap, however many there are.
    fn first_adapter_names(&self, most: usize) -> Vec<Arc<str>> {
        let mut names = self.adapter_names();
        names.sort_unstable();
        names.truncate(most);
        names
    }
    /// One registered adapter.
    fn adapter_info(&self, name: &str) -> Option<AdapterInfo>;

    /// A snapshot; takes no lock that a step holds.
    fn stats(&self) -> EngineStats;
    /// Counters of every adapter that was asked for since the start, by name. As cheap as `stats`, but one entry an adapter.
    fn adapter_stats(&self) -> Vec<AdapterStats> {
        Vec::new()
    }
    /// The adapters that came or went since this was asked last: for one asker.
    fn take_adapter_moves(&self) -> Vec<AdapterMoves> {
        Vec::new()
    }
    /// Drops every cached prefix that no running sequence uses. False (and nothing done) while requests run or wait.
    fn flush_cache(&self) -> BoxFuture<'_, bool>;
    /// Ends every request with `FinishReason::Aborted`.
    fn abort_all(&self);
    /// Resolves when the device has failed, with the reason; never while the engine is well. Every request has ended, or is about to, with an
    /// error.
    fn failed(&self) -> BoxFuture<'_, String>;
    /// Stops taking requests, waits for the running ones up to `timeout`, then ends the rest with `ShuttingDown`.
    fn shutdown(&self, timeout: std::time::Duration) -> BoxFuture<'_, ()>;
}

/// Facts about an engine.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct EngineDescription {
    /// `LlamaForCausalLM`, …
    pub architecture: String,
    /// `cpu`, `cuda:0 (NVIDIA H100 80GB HBM3)`, `mock`.
    pub device: String,
    /// What is computed in: `float32`, `bfloat16`.
    pub dtype: String,
    /// Width of the logits of the base model, and of adapters that have no tokens of their own.
    pub vocab_size: usize,
    /// Most tokens of prompt and output together.
    pub context_length: usize,
    /// Tokens that end generation unless `ignore_eos`.
    pub eos_token_ids: Vec<u32>,
    /// KV blocks, at most; [`EngineStats::total_blocks`] says how many there are while adapters have some of their memory.
    pub num_blocks: usize,
    /// KV blocks that adapters never take: a sequence may have as many.
    pub min_blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Whether adapters may be used.
    pub lora_enabled: bool,
    /// Distinct adapters of one step.
    pub max_loras_per_batch: usize,
    /// Adapters in host memory, if bounded.
    pub max_loaded_loras: Option<usize>,
    /// Largest rank that an adapter may have, if bounded.
    pub max_lora_rank: Option<u32>,
    /// Modules that adapters may change, sorted, if not all.
    pub lora_target_modules: Option<Vec<String>>,
    /// Sequences running at once.
    pub max_running_requests: usize,
    /// Requests waiting at once.
    pub max_queued_requests: usize,
}

/// A snapshot of an engine's counters and gauges. Counters only grow.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct EngineStats {
    /// False once the device failed.
    pub healthy: bool,
    /// Sequences in the batch.
    pub running: usize,
    /// Requests waiting, preempted ones included.
    pub waiting: usize,
    /// KV blocks held by running sequences.
    pub used_blocks: usize,
    /// KV blocks holding cached prefixes that nobody uses.
    pub cached_blocks: usize,
    /// All KV blocks that there are now: those that adapters have the memory of are not among them.
    pub total_blocks: usize,
    /// Steps run.
    pub steps_total: u64,
    /// Prompt tokens computed or found cached.
    pub prompt_tokens_total: u64,
    /// Of those, found in the prefix cache.
    pub cached_tokens_total: u64,
    /// Output tokens.
    pub output_tokens_total: u64,
    /// Sequences pushed back for want of blocks.
    pub preemptions_total: u64,
    /// Requests that ended in any way.
    pub finished_total: u64,
    /// Bytes of adapters on the device.
    pub device_adapter_bytes: usize,
    /// Bytes that adapters on the device may take.
    pub device_adapter_capacity_bytes: usize,
    /// Bytes of adapters in host memory.
    pub host_adapter_bytes: usize,
    /// Names of adapters with running sequences, sorted.
    pub running_adapters: Vec<Arc<str>>,
    /// Names of adapters with only waiting requests, sorted.
    pub waiting_adapters: Vec<Arc<str>>,
    /// Requests that found their adapter on the device when they were first looked at.
    pub device_hits_total: u64,
    /// Requests that did not, and waited for it.
    pub device_misses_total: u64,
    /// Uploads begun.
    pub device_uploads_total: u64,
    /// Adapters that left the device for others, or for KV blocks.
    pub device_evictions_total: u64,
    /// Names, host memory, loads.
    pub registry: adapter::registry::RegistryStats,
    /// From the scheduling of a step to the commit of its output.
    pub step_seconds: Histogram,
    /// Rows of a step: a prompt's chunk has many, a decoding sequence one.
    pub step_rows: Histogram,
    /// Sequences of a step.
    pub step_sequences: Histogram,
    /// From `submit` to the first admission of a request.
    pub queue_seconds: Histogram,
    /// From the first admission of a request to the end of its prompt's computation.
    pub prefill_seconds: Histogram,
    /// From the begin of an adapter's copy to the device until a batch may use it.
    pub upload_seconds: Histogram,
}

/// The events of one request. Dropping it cancels the request.
pub struct TokenStream {
    /// Identity of the request.
    pub request_id: RequestId,
    events: tokio::sync::mpsc::UnboundedReceiver<TokenEvent>,
    stages: Arc<Stages>,
}

impl TokenStream {
    /// A stream, and the end that the engine writes to. The channel holds at most `max_tokens + 2` events, since that is all
    /// that a request makes: a slow reader can't grow it without bound. The engine sees a dropped stream by `is_closed`.
    pub fn channel(request_id: RequestId, stages: Arc<Stages>) -> (tokio::sync::mpsc::UnboundedSender<TokenEvent>, Self) {
        let (sender, events) = tokio::sync::mpsc::unbounded_channel();
        let stream = Self { request_id, events, stages };
        (sender, stream)
    }

    /// How far the request is.
    pub fn stages(&self) -> &Arc<Stages> {
        &self.stages
    }

    /// The next event; `None` after the terminal one.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        self.events.recv().await
    }

    /// The same, for use in `Stream` implementations.
    pub fn poll_next(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<TokenEvent>> {
        self.events.poll_recv(context)
    }

    /// The same, blocking the thread; not to be called in async code.
    pub fn blocking_next(&mut self) -> Option<TokenEvent> {
        self.events.blocking_recv()
    }
}
