//! [`LlmEngine`]: the engine over a [`Backend`].

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
        mpsc::{Sender, channel},
    },
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::{
    AdapterMoves, AdapterStats, BoxFuture, EngineDescription, EngineStats, InferenceEngine, TokenStream,
    adapter::{
        AdapterError, AdapterInfo, AdapterLease, LoadRequest, UnloadMode, Unloading,
        load::LoraLimits,
        registry::{AdapterRegistry, RegistryConfig},
    },
    backend::{Backend, Capacity},
    decoder::DecoderConfig,
    request::{GenerationRequest, RequestId, SubmitError},
    residency::DeviceResidency,
    scheduler::{Scheduler, SchedulerConfig},
    stages::Stages,
    worker::{Command, EventSender, NewRequest, Permit, Shared, Worker},
};

/// Limits and policies of an engine. Built by the gateway from its flags, validated by `LlmEngine::start`.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most tokens of prompt and output together; at most the model's own.
    pub context_length: usize,
    /// Sequences running at once.
    pub max_running_requests: usize,
    /// Requests waiting at once.
    pub max_queued_requests: usize,
    /// Most rows of one step (the token budget); a longer prompt is prefilled in chunks.
    pub chunked_prefill_tokens: usize,
    /// Most prompt tokens of a step that also decodes: what bounds the time between others' tokens while prompts come in.
    pub mixed_prefill_tokens: usize,
    /// Whether prefixes are cached.
    pub prefix_caching: bool,
    /// `None`: adapters are refused.
    pub lora: Option<LoraConfig>,
}

/// Limits on adapters.
#[derive(Clone, Debug)]
pub struct LoraConfig {
    /// Distinct adapters of one step.
    pub max_loras_per_batch: usize,
    /// Adapters in host memory; `None` is unbounded.
    pub max_loaded_loras: Option<usize>,
    /// Bytes of adapters in host memory; `None` is unbounded.
    pub max_loaded_bytes: Option<usize>,
    /// Bytes of host memory that are kept ready for adapters still to be read, by devices that need it made ready; `None` leaves it to them.
    pub host_reserve_bytes: Option<usize>,
    /// Which adapter leaves the device first.
    pub eviction: EvictionPolicy,
    /// Largest rank accepted; `None` accepts every rank.
    pub max_lora_rank: Option<u32>,
    /// Modules accepted (`q_proj`, …, `embed_tokens`, `lm_head`); `None` accepts all that the decoder has.
    pub target_modules: Option<BTreeSet<String>>,
}

/// Which adapter leaves the device first. (Host memory is always left by the one used longest ago.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// The one used longest ago.
    #[default]
    Lru,
    /// The one that came first.
    Fifo,
}

impl LoraConfig {
    /// The registry that goes with these limits; `limits` says what the backend can apply. Names and folders are the caller's to add.
    pub fn registry_config(&self, limits: LoraLimits) -> RegistryConfig {
        RegistryConfig {
            max_loaded_loras: self.max_loaded_loras,
            max_loaded_bytes: self.max_loaded_bytes,
            max_pinned: self.max_loras_per_batch.saturating_sub(1),
            ..RegistryConfig::new(LoraLimits {
                max_lora_rank: self.max_lora_rank,
                target_modules: self.target_modules.clone(),
                ..limits
            })
        }
    }
}

/// What an engine is made of.
pub struct EngineParts {
    /// The device, with the base model in it.
    pub backend: Box<dyn Backend>,
    /// The base model.
    pub decoder: Arc<DecoderConfig>,
    /// For [`EngineDescription::device`].
    pub device: String,
    /// For [`EngineDescription::dtype`].
    pub dtype: String,
    /// Limits and policies.
    pub config: EngineConfig,
    /// Every adapter by name, for this base model; `Some` exactly when `config.lora` is.
    pub adapters: Option<Arc<AdapterRegistry>>,
}

/// Why an engine does not start.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum StartError {
    /// A limit that does not go with the model, the backend or another limit.
    #[error("{field} must be {expected}, got {got}")]
    Invalid {
        /// Field of [`EngineConfig`] or [`LoraConfig`].
        field: &'static str,
        /// What is possible.
        expected: String,
        /// What was given.
        got: usize,
    },
    /// `lora` without a registry, or the reverse.
    #[error("`lora` and `adapters` go together: limits {limits}, registry {registry}")]
    AdaptersMismatch {
        /// Whether there are limits.
        limits: bool,
        /// Whether there is a registry.
        registry: bool,
    },
    /// The system gives no thread.
    #[error("the engine thread could not be started: {0}")]
    Thread(String),
}

/// After how many admissions of others a waiting flow is overdue; see [`FairQueue`](crate::fairness::FairQueue).
const OVERTAKE_LIMIT: u64 = 1024;

/// Fewer prompt tokens are computed twice rather than waited for: a step's length is not worth them.
const MIN_AWAITED_TOKENS: usize = 64;

/// The engine over a backend: checks requests, hands them to the engine thread, and knows the adapters by name.
/// Dropping it ends every request with `ShuttingDown`.
pub struct LlmEngine {
    description: EngineDescription,
    kv_capacity_tokens: usize,
    adapters: Option<Arc<AdapterRegistry>>,
    shared: Arc<Shared>,
    commands: Arc<Sender<Command>>,
    next_request_id: AtomicU64,
}

impl LlmEngine {
    /// Starts the engine thread.
    ///
    /// # Errors
    /// `Invalid`, naming the limit; `Thread`.
    pub fn start(parts: EngineParts) -> Result<Arc<Self>, StartError> {
        let EngineParts {
            backend,
            decoder,
            device,
            dtype,
            config,
            adapters,
        } = parts;
        let capacity = backend.capacity().clone();
        check_limits(&config, &decoder, &capacity)?;
        if config.lora.is_some() != adapters.is_some() {
            return Err(StartError::AdaptersMismatch {
                limits: config.lora.is_some(),
                registry: adapters.is_some(),
            });
        }
        let description = describe(&config, &decoder, &capacity, device, dtype);
        let scheduler = Scheduler::new(SchedulerConfig {
            num_blocks: capacity.num_blocks,
            min_blocks: capacity.min_blocks,
            block_size: capacity.block_size,
            token_budget: config.chunked_prefill_tokens,
            mixed_prefill_tokens: config.mixed_prefill_tokens,
            max_running_requests: config.max_running_requests,
            max_loras_per_batch: config.lora.as_ref().map_or(1, |lora| lora.max_loras_per_batch),
            prefix_caching: config.prefix_caching,
            min_awaited_tokens: MIN_AWAITED_TOKENS,
            eos_token_ids: description.eos_token_ids.clone(),
            overtake_limit: OVERTAKE_LIMIT,
        });
        let residents = adapters.as_ref().map_or_else(Arc::default, |registry| registry.residents().clone());
        let eviction = config.lora.as_ref().map_or_else(EvictionPolicy::default, |lora| lora.eviction);
        let residency = DeviceResidency::new(capacity.clone(), eviction, residents);
        let shared = Arc::new(Shared::new());
        let (commands, inbox) = channel();
        let commands = Arc::new(commands);
        if let Some(registry) = &adapters {
            let commands = Arc::downgrade(&commands);
            registry.on_pins_changed(Box::new(move || {
                if let Some(commands) = commands.upgrade() {
                    commands.send(Command::Wake).ok();
                }
            }));
        }
        // What was pinned before.
        commands.send(Command::Wake).ok();
        let worker = Worker::new(
            backend,
            scheduler,
            residency,
            (Arc::downgrade(&commands), inbox),
            shared.clone(),
            adapters.clone(),
            description.vocab_size,
        );
        std::thread::Builder::new()
            .name("polylora-engine".to_owned())
            .spawn(move || worker.run())
            .map_err(|error| StartError::Thread(error.to_string()))?;
        Ok(Arc::new(Self {
            kv_capacity_tokens: capacity.min_blocks * capacity.block_size,
            description,
            adapters,
            shared,
            commands,
            next_request_id: AtomicU64::new(0),
        }))
    }

    /// Every adapter by name; `None` when LoRA is off.
    pub fn adapters(&self) -> Option<&Arc<AdapterRegistry>> {
        self.adapters.as_ref()
    }

    fn registry(&self) -> Result<&AdapterRegistry, AdapterError> {
        self.adapters.as_deref().ok_or(AdapterError::NotEnabled)
    }

    /// Checks a request and clips its `max_tokens` to what the context and the KV cache have room for beside the prompt.
    fn check(&self, request: &mut GenerationRequest) -> Result<(), SubmitError> {
        let description = &self.description;
        let prompt_len = request.prompt_tokens.len();
        if prompt_len == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        let vocab_size = request.vocab_size(description.vocab_size);
        if let Some(token_id) = request.prompt_tokens.iter().find(|token_id| **token_id as usize >= vocab_size) {
            return Err(SubmitError::TokenOutOfRange { got: *token_id, vocab_size });
        }
        request.sampling.validate(vocab_size)?;
        check_logprobs(request, vocab_size)?;
        if request.adapter.is_some() && self.adapters.is_none() {
            return Err(SubmitError::InvalidParam {
                field: "adapter",
                expected: "absent, since LoRA is not enabled",
                got: "an adapter".to_owned(),
            });
        }
        // The last output token is never an input, so its KV needs no room; with none wanted the prompt may fill the context.
        let wanted = request.sampling.max_tokens.min(1) as usize;
        if prompt_len + wanted > description.context_length {
            return Err(SubmitError::PromptTooLong {
                got: prompt_len,
                context_length: description.context_length,
            });
        }
        if prompt_len > self.kv_capacity_tokens {
            return Err(SubmitError::KvCapacity {
                needed_tokens: prompt_len,
                capacity_tokens: self.kv_capacity_tokens,
            });
        }
        let room = (description.context_length - prompt_len).min(self.kv_capacity_tokens + 1 - prompt_len);
        let max_tokens = request.sampling.max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX));
        request.sampling.max_tokens = max_tokens;
        request.sampling.min_tokens = request.sampling.min_tokens.min(max_tokens);
        Ok(())
    }
}

impl InferenceEngine for LlmEngine {
    fn describe(&self) -> &EngineDescription {
        &self.description
    }

    fn submit(&self, mut request: GenerationRequest) -> Result<TokenStream, SubmitError> {
        if let Some(reason) = &*self.shared.failure.borrow() {
            return Err(SubmitError::Unhealthy(reason.clone()));
        }
        if !self.shared.accepting.load(SeqCst) {
            return Err(SubmitError::ShuttingDown);
        }
        self.check(&mut request)?;
        let (running, waiting) = (self.description.max_running_requests, self.description.max_queued_requests);
        let permit = Permit::try_take(&self.shared, running + waiting).map_err(|in_flight| SubmitError::QueueFull {
            waiting: in_flight - running,
            limit: waiting,
        })?;
        let request_id = RequestId(self.next_request_id.fetch_add(1, SeqCst));
        let stages = Arc::new(Stages::begin(&request));
        let (sender, stream) = TokenStream::channel(request_id, Arc::clone(&stages));
        let new = NewRequest {
            request_id,
            request,
            events: EventSender::new(sender),
            permit,
            stages,
        };
        match self.commands.send(Command::Submit(Box::new(new))) {
            Ok(()) => Ok(stream),
            Err(_) => Err(SubmitError::ShuttingDown),
        }
    }

    fn acquire_adapter<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<AdapterLease, AdapterError>> {
        Box::pin(async move { self.registry()?.acquire(name).await })
    }

    fn load_adapter(&self, request: LoadRequest) -> BoxFuture<'_, Result<AdapterInfo, AdapterError>> {
        Box::pin(async move { self.registry()?.load(request).await })
    }

    fn acquire_adapters<'a>(&'a self, names: &'a [&'a str]) -> BoxFuture<'a, Result<Vec<AdapterLease>, AdapterError>> {
        Box::pin(async move { self.registry()?.acquire_all(names).await })
    }

    fn unload_adapter(&self, name: &str, mode: UnloadMode) -> Result<Unloading, AdapterError> {
        let unloading = self.registry()?.unload(name, mode)?;
        if mode == UnloadMode::Abort {
            self.commands.send(Command::EndRevoked).ok();
        }
        Ok(unloading)
    }

    fn pin_adapter(&self, name: &str, pinned: bool) -> Result<(), AdapterError> {
        self.registry()?.pin(name, pinned)
    }

    fn list_adapters(&self) -> Vec<AdapterInfo> {
        self.adapters.as_ref().map_or_else(Vec::new, |registry| registry.list())
    }

    fn adapter_names(&self) -> Vec<Arc<str>> {
        self.adapters.as_ref().map_or_else(Vec::new, |registry| registry.names())
    }

    fn first_adapter_names(&self, most: usize) -> Vec<Arc<str>> {
        self.adapters.as_ref().map_or_else(Vec::new, |registry| registry.first_names(most))
    }

    fn adapter_info(&self, name: &str) -> Option<AdapterInfo> {
        self.adapters.as_ref()?.info(name)
    }

    fn stats(&self) -> EngineStats {
        let in_flight = self.shared.in_flight.load(SeqCst);
        let published = self.shared.stats.lock().clone();
        let mut stats = EngineStats::clone(&published);
        // Those that the engine thread has not taken yet wait, too.
        stats.waiting = in_flight.saturating_sub(stats.running);
        (stats.running_adapters, stats.waiting_adapters) = self.shared.adapters.busy();
        if let Some(registry) = &self.adapters {
            stats.registry = registry.stats();
            stats.host_adapter_bytes = stats.registry.host_bytes;
        }
        stats
    }

    fn adapter_stats(&self) -> Vec<AdapterStats> {
        self.shared.adapters.read()
    }

    fn take_adapter_moves(&self) -> Vec<AdapterMoves> {
        self.adapters.as_ref().map(|registry| registry.take_moves()).unwrap_or_default()
    }

    fn flush_cache(&self) -> BoxFuture<'_, bool> {
        let (answer, flushed) = oneshot::channel();
        self.commands.send(Command::FlushCache(answer)).ok();
        Box::pin(async move { flushed.await.unwrap_or(false) })
    }

    fn abort_all(&self) {
        self.commands.send(Command::AbortAll).ok();
    }

    fn failed(&self) -> BoxFuture<'_, String> {
        let mut failure = self.shared.failure.subscribe();
        Box::pin(async move {
            let reason = failure.wait_for(Option::is_some).await.expect("`self` keeps the sender");
            reason.clone().unwrap_or_default()
        })
    }

    fn shutdown(&self, timeout: Duration) -> BoxFuture<'_, ()> {
        self.shared.accepting.store(false, SeqCst);
        let (done, drained) = oneshot::channel();
        let now = Instant::now();
        // A time beyond what the clock can hold is as good as none.
        let deadline = now.checked_add(timeout);
        self.commands.send(Command::Shutdown { deadline, done }).ok();
        // The thread has ended already if nobody answers.
        Box::pin(async move { drained.await.unwrap_or(()) })
    }
}

fn check_limits(config: &EngineConfig, decoder: &DecoderConfig, capacity: &Capacity) -> Result<(), StartError> {
    let check = |field, min: usize, max: usize, why: &str, got: usize| {
        if (min..=max).contains(&got) {
            return Ok(());
        }
        let expected = match max {
            usize::MAX => format!("at least {min}{why}"),
            _ => format!("from {min} to {max}{why}"),
        };
        Err(StartError::Invalid { field, expected, got })
    };
    check(
        "context_length",
        1,
        decoder.max_position_embeddings,
        ", the model's own",
        config.context_length,
    )?;
    check("max_running_requests", 1, usize::MAX, "", config.max_running_requests)?;
    check(
        "chunked_prefill_tokens",
        config.max_running_requests,
        capacity.max_batch_tokens,
        ": each of max_running_requests has a row in a step, and the device takes no more",
        config.chunked_prefill_tokens,
    )?;
    check("mixed_prefill_tokens", 1, usize::MAX, "", config.mixed_prefill_tokens)?;
    if let Some(lora) = &config.lora {
        check(
            "max_loras_per_batch",
            1,
            capacity.max_adapters_per_batch,
            ", what the device takes",
            lora.max_loras_per_batch,
        )?;
        if let Some(max_loaded_loras) = lora.max_loaded_loras {
            let why = ", max_loras_per_batch";
            check("max_loaded_loras", lora.max_loras_per_batch, usize::MAX, why, max_loaded_loras)?;
        }
    }
    Ok(())
}

fn check_logprobs(request: &GenerationRequest, vocab_size: usize) -> Result<(), SubmitError> {
    let prompt = request.logprobs.prompt;
    for top_k in [request.logprobs.output_top_k, prompt.map(|prompt| prompt.top_k)].into_iter().flatten() {
        if top_k as usize > vocab_size {
            return Err(SubmitError::InvalidParam {
                field: "top_logprobs",
                expected: "at most the vocabulary size",
                got: top_k.to_string(),
            });
        }
    }
    match prompt {
        Some(prompt) if prompt.start as usize > request.prompt_tokens.len() => Err(SubmitError::InvalidParam {
            field: "logprob_start",
            expected: "at most the prompt's length",
            got: prompt.start.to_string(),
        }),
        _ => Ok(()),
    }
}

fn describe(config: &EngineConfig, decoder: &DecoderConfig, capacity: &Capacity, device: String, dtype: String) -> EngineDescription {
    EngineDescription {
        architecture: decoder.architecture.clone(),
        device,
        dtype,
        vocab_size: decoder.vocab_size,
        context_length: config.context_length,
        eos_token_ids: decoder.eos_token_ids.clone(),
        num_blocks: capacity.num_blocks,
        min_blocks: capacity.min_blocks,
        block_size: capacity.block_size,
        lora_enabled: config.lora.is_some(),
        max_loras_per_batch: config.lora.as_ref().map_or(0, |lora| lora.max_loras_per_batch),
        max_loaded_loras: config.lora.as_ref().and_then(|lora| lora.max_loaded_loras),
        max_lora_rank: config.lora.as_ref().and_then(|lora| lora.max_lora_rank),
        lora_target_modules: config
            .lora
            .as_ref()
            .and_then(|lora| Some(lora.target_modules.as_ref()?.iter().cloned().collect())),
        max_running_requests: config.max_running_requests,
        max_queued_requests: config.max_queued_requests,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::AtomicBool,
        mpsc::{SyncSender, channel, sync_channel},
    };

    use futures::executor::block_on;

    use super::*;
    use crate::{
        FileSource,
        adapter::{HostAdapter, PackedDtype, testing::AdapterFiles},
        backend::conformance,
        request::{Constraint, FinishReason, PromptLogprobsParams, RequestError, TokenEvent},
        testing::{
            EOS, Failure, FakeBackend, LeaseCount, Rng, VOCAB_SIZE, expected_events, host_adapter, random_request, request, tokens,
            without_cached_tokens,
        },
    };

    /// Long enough for any machine.
    const PATIENCE: Duration = Duration::from_secs(120);

    fn config() -> EngineConfig {
        EngineConfig {
            context_length: 64,
            max_running_requests: 4,
            max_queued_requests: 2,
            chunked_prefill_tokens: 16,
            mixed_prefill_tokens: 16,
            prefix_caching: true,
            lora: Some(LoraConfig {
                max_loras_per_batch: 2,
                max_loaded_loras: None,
                max_loaded_bytes: None,
                host_reserve_bytes: None,
                eviction: EvictionPolicy::Lru,
                max_lora_rank: None,
                target_modules: None,
            }),
        }
    }

    fn capacity() -> Capacity {
        Capacity {
            num_blocks: 40,
            min_blocks: 40,
            block_size: 4,
            kv_block_bytes: 0,
            shared_bytes: 0,
            max_batch_tokens: 16,
            adapter_bytes: 1000,
            max_adapters_per_batch: 2,
        }
    }

    fn decoder() -> Arc<DecoderConfig> {
        Arc::new(DecoderConfig {
            vocab_size: VOCAB_SIZE as usize,
            eos_token_ids: vec![EOS],
            max_position_embeddings: 64,
            ..conformance::config()
        })
    }

    fn try_start(backend: Box<dyn Backend>, config: EngineConfig, decoder: Arc<DecoderConfig>) -> Result<Arc<LlmEngine>, StartError> {
        let limits = LoraLimits::new(PackedDtype::F32);
        let adapters = config
            .lora
            .as_ref()
            .map(|lora| Arc::new(AdapterRegistry::new(lora.registry_config(limits), decoder.clone())));
        LlmEngine::start(EngineParts {
            backend,
            decoder,
            device: "fake".to_owned(),
            dtype: "none".to_owned(),
            config,
            adapters,
        })
    }

    fn start_with(set_up: impl FnOnce(&mut FakeBackend)) -> Arc<LlmEngine> {
        let mut backend = FakeBackend::new(capacity());
        set_up(&mut backend);
        try_start(Box::new(backend), config(), decoder()).expect("limits that fit")
    }

    /// An engine whose every step waits for a `send`; dropping the sender lets it run.
    fn start_gated() -> (Arc<LlmEngine>, SyncSender<()>) {
        let (open, gate) = sync_channel(0);
        (start_with(|backend| backend.gate = Some(gate)), open)
    }

    fn collect(mut stream: TokenStream) -> Vec<TokenEvent> {
        let mut events = Vec::new();
        while let Some(event) = stream.blocking_next() {
            events.push(event);
        }
        let terminal: Vec<_> = events.iter().filter(|event| event.is_terminal()).collect();
        assert_eq!(terminal.len(), 1, "{events:?}");
        assert!(events.last().is_some_and(TokenEvent::is_terminal), "{events:?}");
        events
    }

    fn ask(max_tokens: u32) -> GenerationRequest {
        request(vec![1, 2, 3, 4, 5], max_tokens, None)
    }

    fn assert_empty(engine: &LlmEngine) {
        let stats = engine.stats();
        assert_eq!((stats.running, stats.waiting, stats.used_blocks), (0, 0, 0));
        assert_eq!(engine.shared.in_flight.load(SeqCst), 0);
    }

    #[test]
    fn requests_get_their_own_output_in_any_company() {
        check_any_company(false, capacity());
    }

    #[test]
    fn requests_get_their_own_output_when_steps_are_launched_ahead() {
        check_any_company(true, capacity());
    }

    #[test]
    fn requests_get_their_own_output_when_blocks_and_adapters_share_memory() {
        for is_pipelined in [false, true] {
            let shared = Capacity {
                min_blocks: 16,
                kv_block_bytes: 50,
                shared_bytes: 2000,
                adapter_bytes: 1200,
                ..capacity()
            };
            let stats = check_any_company(is_pipelined, shared);
            assert!(stats.total_blocks * 50 + stats.device_adapter_bytes <= 2000, "{stats:?}");
            assert!(stats.total_blocks < 40, "the last adapters are still there");
        }
    }

    fn check_any_company(is_pipelined: bool, capacity: Capacity) -> EngineStats {
        let mut backend = FakeBackend::new(capacity);
        backend.upload_polls = 2;
        backend.is_pipelined = is_pipelined;
        // So that requests come while a step is waited for, too.
        backend.busy_looks = 100;
        // Cancelled requests keep their places until the next step.
        let roomy = EngineConfig {
            max_queued_requests: 360,
            ..config()
        };
        let engine = try_start(Box::new(backend), roomy, decoder()).expect("limits that fit");
        let leases = LeaseCount::default();
        let adapters: Vec<_> = (0..4).map(|number| host_adapter(number, 300)).collect();
        std::thread::scope(|scope| {
            for client in 0..6 {
                let (engine, leases, adapters) = (&engine, &leases, &adapters);
                scope.spawn(move || {
                    let mut rng = Rng(client);
                    for _ in 0..60 {
                        let lease = adapters
                            .get(rng.below(5))
                            .map(|adapter: &Arc<HostAdapter>| leases.lease("an adapter", adapter));
                        let request = random_request(&mut rng, 24, 24, lease);
                        let expected = expected_events(&request);
                        let stream = engine.submit(request).expect("there is room");
                        if rng.one_in(8) {
                            continue;
                        }
                        assert_eq!(without_cached_tokens(collect(stream)), expected, "client {client}");
                    }
                });
            }
        });
        assert!(block_on(engine.flush_cache()), "nothing is left");
        assert_empty(&engine);
        assert_eq!(leases.get(), 0);
        let stats = engine.stats();
        assert_eq!(stats.finished_total, 360);
        assert_eq!(stats.cached_blocks, 0);
        assert!(stats.device_evictions_total > 0 && stats.cached_tokens_total > 0);
        assert_eq!(stats.step_seconds.count(), stats.steps_total);
        assert_eq!(stats.step_rows.count(), stats.steps_total);
        assert_eq!(stats.step_sequences.count(), stats.steps_total);
        // A request that is cancelled during its first step has waited, and was never prefilled.
        assert!(stats.prefill_seconds.count() <= stats.queue_seconds.count());
        let adapter_stats = engine.adapter_stats();
        let hits_and_misses: u64 = adapter_stats
            .iter()
            .map(|stats| stats.device_hits_total + stats.device_misses_total)
            .sum();
        assert_eq!(hits_and_misses, stats.device_hits_total + stats.device_misses_total);
        assert!(adapter_stats.iter().all(|stats| (stats.running, stats.waiting) == (0, 0)));
        stats
    }

    #[test]
    fn an_adapter_is_on_its_way_before_the_step_is_over_in_which_its_request_came() {
        let (begun, uploads_begun) = channel();
        let is_busy = Arc::new(AtomicBool::new(false));
        let engine = start_with(|backend| {
            backend.is_pipelined = true;
            backend.upload_polls = 2;
            backend.is_busy = is_busy.clone();
            backend.uploads_begun = Some(begun);
        });
        let leases = LeaseCount::default();
        let adapter = host_adapter(1, 300);
        is_busy.store(true, SeqCst);
        let base = ask(4);
        let expected_base = expected_events(&base);
        let base = engine.submit(base).expect("there is room");
        let second = request(vec![5, 4, 3], 4, Some(leases.lease("a", &adapter)));
        let expected = expected_events(&second);
        let second = engine.submit(second).expect("there is room");
        // Until it is told otherwise, no step ends: who waited for that would wait for ever.
        let version = uploads_begun.recv_timeout(PATIENCE);
        assert_eq!(version, Ok(adapter.version));
        is_busy.store(false, SeqCst);
        assert_eq!(collect(base), expected_base);
        assert_eq!(collect(second), expected);
        let stats = engine.stats();
        assert_eq!(
            (stats.device_hits_total, stats.device_misses_total, stats.device_uploads_total),
            (0, 1, 1)
        );
    }

    #[test]
    fn what_cannot_be_served_is_refused_at_once() {
        let engine = start_with(|_| {});
        let refusal = |change: fn(&mut GenerationRequest)| {
            let mut request = ask(4);
            change(&mut request);
            engine.submit(request).err().expect("a refusal")
        };
        assert_eq!(refusal(|request| request.prompt_tokens.clear()), SubmitError::EmptyPrompt);
        assert_eq!(
            refusal(|request| request.prompt_tokens[2] = VOCAB_SIZE),
            SubmitError::TokenOutOfRange {
                got: VOCAB_SIZE,
                vocab_size: VOCAB_SIZE as usize
            }
        );
        assert_eq!(
            refusal(|request| request.prompt_tokens = vec![1; 64]),
            SubmitError::PromptTooLong { got: 64, context_length: 64 }
        );
        let field = |error| match error {
            SubmitError::InvalidParam { field, .. } => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(refusal(|request| request.sampling.top_p = 0.0)), "top_p");
        assert_eq!(
            field(refusal(|request| request.logprobs.output_top_k = Some(VOCAB_SIZE + 1))),
            "top_logprobs"
        );
        let start_past_the_end = |request: &mut GenerationRequest| request.logprobs.prompt = Some(PromptLogprobsParams { start: 6, top_k: 0 });
        assert_eq!(field(refusal(start_past_the_end)), "logprob_start");
        assert_empty(&engine);
    }

    #[test]
    fn output_is_clipped_to_the_context_and_to_the_kv_cache() {
        let engine = start_with(|_| {});
        let events = collect(engine.submit(ask(1000)).expect("it starts"));
        assert_eq!(tokens(&events).len(), 59, "5 and 59 fill the context");
        assert_eq!(
            events.last(),
            Some(&TokenEvent::Finished {
                reason: FinishReason::Length
            })
        );
        let small = Capacity {
            num_blocks: 5,
            min_blocks: 5,
            ..capacity()
        };
        let engine = try_start(Box::new(FakeBackend::new(small)), config(), decoder()).expect("limits that fit");
        let events = collect(engine.submit(ask(1000)).expect("it starts"));
        assert_eq!(tokens(&events).len(), 16, "20 tokens have KV, the last output needs none");
        let error = engine.submit(request(vec![1; 21], 1, None)).err().expect("a refusal");
        assert_eq!(
            error,
            SubmitError::KvCapacity {
                needed_tokens: 21,
                capacity_tokens: 20
            }
        );
    }

    #[test]
    fn limits_that_cannot_be_kept_stop_the_start_and_name_themselves() {
        let refused = |change: fn(&mut EngineConfig)| {
            let mut config = config();
            change(&mut config);
            match try_start(Box::new(FakeBackend::new(capacity())), config, decoder()).err() {
                Some(StartError::Invalid { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        let lora = |config: &mut EngineConfig, change: fn(&mut LoraConfig)| config.lora.as_mut().into_iter().for_each(change);
        assert_eq!(refused(|config| config.context_length = 65), "context_length");
        assert_eq!(refused(|config| config.context_length = 0), "context_length");
        assert_eq!(refused(|config| config.max_running_requests = 0), "max_running_requests");
        assert_eq!(refused(|config| config.max_running_requests = 17), "chunked_prefill_tokens");
        assert_eq!(refused(|config| config.chunked_prefill_tokens = 17), "chunked_prefill_tokens");
        for (got, refused) in [(0, true), (1, false), (2, false), (3, true)] {
            let mut config = config();
            config.lora.as_mut().expect("it is on").max_loras_per_batch = got;
            let started = try_start(Box::new(FakeBackend::new(capacity())), config, decoder());
            assert_eq!(started.is_err(), refused, "max_loras_per_batch {got}");
        }
        let mut too_few_loaded = config();
        lora(&mut too_few_loaded, |lora| lora.max_loaded_loras = Some(1));
        let error = try_start(Box::new(FakeBackend::new(capacity())), too_few_loaded, decoder())
            .err()
            .expect("a refusal");
        assert_eq!(error.to_string(), "max_loaded_loras must be at least 2, max_loras_per_batch, got 1");
    }

    #[test]
    fn a_full_queue_refuses_and_takes_requests_again_afterwards() {
        let (engine, open) = start_gated();
        let streams: Vec<TokenStream> = (0..6).map(|_| engine.submit(ask(3)).expect("4 may run, 2 may wait")).collect();
        let refused = engine.submit(ask(3)).err();
        assert_eq!(refused, Some(SubmitError::QueueFull { waiting: 2, limit: 2 }));
        assert_eq!(engine.stats().waiting + engine.stats().running, 6);
        drop(open);
        for stream in streams {
            assert_eq!(tokens(&collect(stream)).len(), 3);
            assert!(engine.submit(ask(1)).is_ok(), "who has seen an end finds a free place");
        }
    }

    #[test]
    fn a_dropped_stream_frees_its_blocks_and_its_lease() {
        let (engine, open) = start_gated();
        let leases = LeaseCount::default();
        let adapter = host_adapter(1, 100);
        let cancelled = engine
            .submit(request(vec![1; 20], 30, Some(leases.lease("a", &adapter))))
            .expect("it starts");
        open.send(()).expect("the first step runs");
        assert_eq!(leases.get(), 1);
        drop(cancelled);
        drop(open);
        while !block_on(engine.flush_cache()) {}
        assert_empty(&engine);
        assert_eq!(leases.get(), 0);
        assert_eq!(engine.stats().finished_total, 1);
        assert!(engine.stats().output_tokens_total < 3, "it did not run on");
    }

    #[test]
    fn aborting_ends_what_runs_and_what_waits() {
        let (engine, open) = start_gated();
        let streams: Vec<TokenStream> = (0..6).map(|_| engine.submit(ask(50)).expect("4 may run, 2 may wait")).collect();
        open.send(()).expect("the first step runs");
        engine.abort_all();
        drop(open);
        for stream in streams {
            let end = collect(stream).pop();
            let reason = FinishReason::Aborted;
            assert_eq!(end, Some(TokenEvent::Finished { reason }));
        }
        assert_empty(&engine);
        assert_eq!(tokens(&collect(engine.submit(ask(2)).expect("it goes on"))).len(), 2);
    }

    /// An engine with an adapter `a`, whose leases its registry counts.
    fn start_with_adapter(capacity: Capacity, set_up: impl FnOnce(&mut FakeBackend)) -> Arc<LlmEngine> {
        let mut backend = FakeBackend::new(Capacity {
            adapter_bytes: capacity.adapter_bytes.max(1 << 20),
            ..capacity
        });
        set_up(&mut backend);
        let engine = try_start(Box::new(backend), config(), decoder()).expect("limits that fit");
        load_as(&engine, "a");
        engine
    }

    fn load_as(engine: &LlmEngine, name: &str) {
        let folder = AdapterFiles::simple(&decoder(), 1).write();
        let request = LoadRequest {
            name: name.into(),
            files: FileSource::Directory(folder.path().to_owned()),
            source: "a test's".into(),
            pinned: false,
            replace: false,
            expected_version: None,
        };
        block_on(engine.load_adapter(request)).expect("a good adapter");
    }

    fn lease_a(engine: &LlmEngine) -> AdapterLease {
        block_on(engine.acquire_adapter("a")).expect("it is loaded")
    }

    #[test]
    fn what_is_asked_beside_the_last_step_is_done_without_another_command() {
        let (looked, looks) = channel();
        let (begun, uploads_begun) = channel();
        let is_busy = Arc::new(AtomicBool::new(true));
        let engine = start_with_adapter(capacity(), |backend| {
            backend.is_pipelined = true;
            backend.looked = Some(looked);
            backend.is_busy = is_busy.clone();
            backend.uploads_begun = Some(begun);
        });
        // A command is taken between two looks at a step.
        let have_taken = |num_commands| {
            looks.try_iter().for_each(drop);
            (0..num_commands + 2).for_each(|_| looks.recv_timeout(PATIENCE).expect("it looks for the step's end"));
        };
        let first = engine.submit(ask(1)).expect("there is room");
        have_taken(0);
        let (tell, told) = channel();
        let flusher = engine.clone();
        std::thread::spawn(move || {
            let flushed = flusher.flush_cache();
            tell.send(None).ok();
            tell.send(Some(block_on(flushed))).ok();
        });
        assert_eq!(told.recv_timeout(PATIENCE), Ok(None), "asked");
        have_taken(1);
        is_busy.store(false, SeqCst);
        collect(first);
        assert_eq!(told.recv_timeout(PATIENCE), Ok(Some(true)));

        is_busy.store(true, SeqCst);
        let second = engine.submit(ask(1)).expect("there is room");
        have_taken(0);
        engine.pin_adapter("a", true).expect("one may be pinned");
        have_taken(1);
        is_busy.store(false, SeqCst);
        collect(second);
        assert!(uploads_begun.recv_timeout(PATIENCE).is_ok(), "a pinned adapter is uploaded at once");
    }

    /// `max_tokens` of output on `a`.
    fn ask_a(engine: &LlmEngine, max_tokens: u32) -> GenerationRequest {
        request(vec![1, 2, 3, 4, 5, 6], max_tokens, Some(lease_a(engine)))
    }

    /// Runs one way for requests to end, and then looks for leases.
    fn check_end(way: &str, engine: &Arc<LlmEngine>, run: impl FnOnce(&LlmEngine)) {
        assert_eq!(engine.stats().registry.leases, 0, "{way}: before");
        run(engine);
        // The engine thread sees a dropped stream at its next step.
        while engine.stats().healthy && engine.shared.accepting.load(SeqCst) && !block_on(engine.flush_cache()) {
            std::thread::yield_now();
        }
        assert_eq!(engine.stats().registry.leases, 0, "{way}: a lease is left");
        assert_eq!(engine.adapter_info("a").map_or(0, |info| info.leases), 0, "{way}");
        assert_empty(engine);
    }

    #[test]
    fn every_end_of_a_request_gives_its_lease_back() {
        for is_pipelined in [false, true] {
            let engine = start_with_adapter(capacity(), |backend| backend.is_pipelined = is_pipelined);
            let submit = |request| engine.submit(request).expect("there is room");
            let end_of = |request| collect(submit(request)).pop().expect("an end");
            check_end("max_tokens", &engine, |engine| {
                let reason = FinishReason::Length;
                assert_eq!(end_of(ask_a(engine, 9)), TokenEvent::Finished { reason });
            });
            check_end("a stop token", &engine, |engine| {
                let mut request = ask_a(engine, 9);
                request.sampling.stop_token_ids = (0..VOCAB_SIZE).collect();
                let end = end_of(request);
                assert!(
                    matches!(
                        end,
                        TokenEvent::Finished {
                            reason: FinishReason::Stop { .. }
                        }
                    ),
                    "{end:?}"
                );
            });
            check_end("refused by submit", &engine, |engine| {
                let mut request = ask_a(engine, 9);
                request.sampling.top_p = 7.0;
                assert!(matches!(engine.submit(request), Err(SubmitError::InvalidParam { .. })));
            });
            check_end("a lease that was never used", &engine, |engine| drop(lease_a(engine)));
            check_end("several answers to one prompt, one of them not read", &engine, |engine| {
                let lease = lease_a(engine);
                let mut streams: Vec<_> = (0..4).map(|_| submit(request(vec![1, 2, 3], 20, Some(lease.clone())))).collect();
                assert_eq!(engine.stats().registry.leases, 1, "one, however many share it");
                drop((streams.pop(), lease));
                streams.into_iter().for_each(|stream| drop(collect(stream)));
            });
            check_end("a full queue", &engine, |engine| {
                let mut streams = Vec::new();
                let refused = loop {
                    match engine.submit(ask_a(engine, 40)) {
                        Ok(stream) => streams.push(stream),
                        Err(error) => break error,
                    }
                };
                assert!(matches!(refused, SubmitError::QueueFull { .. }));
                streams.into_iter().for_each(|stream| drop(collect(stream)));
            });
            check_end("a constraint that fails", &engine, |engine| {
                let request = GenerationRequest {
                    adapter: Some(lease_a(engine)),
                    ..constrained(&[&[7], &[40], &[8]], Some((1, Fault::Panic)))
                };
                assert!(matches!(end_of(request), TokenEvent::Failed(RequestError::Constraint(_))));
            });
            check_end("a combination", &engine, |engine| {
                let sum = block_on(engine.acquire_adapter("a*0.5")).expect("it is loaded");
                assert_eq!(engine.stats().registry.leases, 2, "its own and its part's");
                drop(collect(submit(request(vec![1, 2, 3], 5, Some(sum)))));
            });
            check_end("aborted", &engine, |engine| {
                let streams: Vec<_> = (0..5).map(|_| submit(ask_a(engine, 50))).collect();
                engine.abort_all();
                streams.into_iter().for_each(|stream| drop(collect(stream)));
            });
            check_end("disconnected", &engine, |engine| {
                let mut begun = submit(ask_a(engine, 50));
                let waiting = submit(ask_a(engine, 50));
                assert!(begun.blocking_next().is_some());
                drop((begun, waiting));
            });
            check_end("unloaded by force", &engine, |engine| {
                let stream = submit(ask_a(engine, 50));
                let unloading = engine.unload_adapter("a", UnloadMode::Abort).expect("it is loaded");
                assert_eq!(block_on(unloading.drained()).still_running, 0);
                drop(collect(stream));
            });
            let engine = start_with_adapter(capacity(), |backend| backend.is_pipelined = is_pipelined);
            check_end("shut down", &engine, |engine| {
                let streams: Vec<_> = (0..3).map(|_| engine.submit(ask_a(engine, 50)).expect("there is room")).collect();
                block_on(engine.shutdown(Duration::ZERO));
                streams.into_iter().for_each(|stream| drop(collect(stream)));
            });
        }
    }

    #[test]
    fn preemption_and_a_dead_device_give_leases_back_too() {
        for is_pipelined in [false, true] {
            let few = Capacity {
                num_blocks: 12,
                min_blocks: 12,
                ..capacity()
            };
            let (open, gate) = sync_channel(0);
            let engine = start_with_adapter(few, |backend| {
                backend.gate = Some(gate);
                backend.is_pipelined = is_pipelined;
            });
            check_end("preempted", &engine, |engine| {
                let streams: Vec<_> = (0..6).map(|_| engine.submit(ask_a(engine, 30)).expect("there is room")).collect();
                // Not before all are there, so that they meet.
                drop(open);
                streams.into_iter().for_each(|stream| assert_eq!(tokens(&collect(stream)).len(), 30));
                assert!(engine.stats().preemptions_total > 0);
            });
            for failure in [Failure::Error, Failure::Panic, Failure::TooFewSamples] {
                let engine = start_with_adapter(capacity(), |backend| {
                    backend.fail_at = Some((3, failure));
                    backend.is_pipelined = is_pipelined;
                });
                check_end("the device failed", &engine, |engine| {
                    let streams: Vec<_> = (0..6).filter_map(|_| engine.submit(ask_a(engine, 30)).ok()).collect();
                    streams.into_iter().for_each(|stream| drop(collect(stream)));
                    while engine.stats().healthy {
                        std::thread::yield_now();
                    }
                });
            }
        }
    }

    #[test]
    fn an_adapter_unloaded_by_force_ends_its_requests_and_no_others() {
        for is_pipelined in [false, true] {
            let (open, gate) = sync_channel(0);
            let engine = start_with_adapter(capacity(), |backend| {
                backend.gate = Some(gate);
                backend.is_pipelined = is_pipelined;
            });
            load_as(&engine, "b");
            let lease = |name: &str| block_on(engine.acquire_adapter(name)).expect("it is loaded");
            let submit = |lease| engine.submit(request(vec![1; 6], 30, Some(lease))).expect("4 may run, 2 may wait");
            let late = lease("a");
            let of_a: Vec<TokenStream> = ["a", "a*0.5", "a"].map(|name| submit(lease(name))).into();
            let others = [submit(lease("b")), engine.submit(ask(30)).expect("there is room")];
            (0..3).for_each(|_| open.send(()).expect("a step runs"));
            let unloading = engine.unload_adapter("a", UnloadMode::Abort).expect("it is loaded");
            assert_eq!(unloading.report().waited_for, 4);
            assert!(matches!(block_on(engine.acquire_adapter("a")), Err(AdapterError::Unknown { .. })));
            let late = submit(late);
            drop(open);
            for stream in of_a.into_iter().chain([late]) {
                let reason = FinishReason::AdapterUnloaded;
                assert_eq!(collect(stream).pop(), Some(TokenEvent::Finished { reason }));
            }
            let report = block_on(unloading.drained());
            assert_eq!((report.waited_for, report.still_running, report.aborted), (4, 0, true));
            for stream in others {
                assert_eq!(tokens(&collect(stream)).len(), 30);
            }
            assert_empty(&engine);
            assert_eq!(engine.stats().registry.leases, 0);
        }
    }

    #[test]
    fn a_failed_device_ends_every_request_once_and_the_engine_for_good() {
        let failures = [Failure::Error, Failure::Panic, Failure::TooFewSamples];
        for (failure, is_pipelined) in failures.into_iter().flat_map(|failure| [(failure, false), (failure, true)]) {
            let engine = start_with(|backend| {
                backend.fail_at = Some((3, failure));
                backend.is_pipelined = is_pipelined;
            });
            let leases = LeaseCount::default();
            let adapter = host_adapter(1, 100);
            let submitted: Vec<_> = (0..6)
                .map(|_| engine.submit(request(vec![1; 20], 30, Some(leases.lease("a", &adapter)))))
                .collect();
            for stream in submitted {
                match stream {
                    Ok(stream) => {
                        let end = collect(stream).pop();
                        assert!(matches!(end, Some(TokenEvent::Failed(RequestError::Engine(_)))), "{failure:?}: {end:?}");
                    }
                    Err(error) => assert!(matches!(error, SubmitError::Unhealthy(_)), "{failure:?}: {error:?}"),
                }
            }
            assert!(!engine.stats().healthy);
            assert!(!block_on(engine.failed()).is_empty());
            assert_eq!(leases.get(), 0);
            assert_empty(&engine);
            assert!(matches!(engine.submit(ask(1)), Err(SubmitError::Unhealthy(_))));
            assert!(!block_on(engine.flush_cache()));
            block_on(engine.shutdown(Duration::ZERO));
        }
    }

    #[test]
    fn shutting_down_lets_requests_end_in_time_and_ends_the_rest() {
        let engine = start_with(|_| {});
        let stream = engine.submit(ask(20)).expect("it starts");
        block_on(engine.shutdown(Duration::MAX));
        assert_eq!(tokens(&collect(stream)).len(), 20);
        assert_eq!(engine.submit(ask(1)).err(), Some(SubmitError::ShuttingDown));

        let (engine, open) = start_gated();
        let streams: Vec<TokenStream> = (0..6).map(|_| engine.submit(ask(50)).expect("4 may run, 2 may wait")).collect();
        open.send(()).expect("the first step runs");
        let done = engine.shutdown(Duration::ZERO);
        drop(open);
        block_on(done);
        for stream in streams {
            assert_eq!(collect(stream).pop(), Some(TokenEvent::Failed(RequestError::ShuttingDown)));
        }
        block_on(engine.shutdown(Duration::ZERO));
    }

    #[test]
    fn dropping_the_engine_ends_its_requests() {
        let (engine, open) = start_gated();
        let stream = engine.submit(ask(50)).expect("it starts");
        open.send(()).expect("the first step runs");
        drop(engine);
        drop(open);
        assert_eq!(collect(stream).pop(), Some(TokenEvent::Failed(RequestError::ShuttingDown)));
    }

    /// Allows a few given sequences of tokens, position by position.
    struct Script {
        allowed: Vec<Vec<u32>>,
        taken: Vec<u32>,
        fault: Option<(usize, Fault)>,
    }

    #[derive(Clone, Copy)]
    enum Fault {
        Error,
        Panic,
    }

    impl Constraint for Script {
        fn fill_mask(&mut self, mask: &mut [u32]) -> Result<bool, String> {
            match self.fault.filter(|(position, _)| *position == self.taken.len()) {
                Some((_, Fault::Error)) => return Err("a rule that nobody understands".to_owned()),
                Some((_, Fault::Panic)) => panic!("a bug in a grammar"),
                None => {}
            }
            let Some(allowed) = self.allowed.get(self.taken.len()) else {
                return Ok(false);
            };
            mask.fill(0);
            allowed.iter().for_each(|token_id| mask[*token_id as usize / 32] |= 1 << (token_id % 32));
            Ok(true)
        }

        fn commit(&mut self, token_id: u32) -> Result<(), String> {
            assert!(self.allowed[self.taken.len()].contains(&token_id), "only an allowed token is chosen");
            self.taken.push(token_id);
            Ok(())
        }
    }

    fn constrained(allowed: &[&[u32]], fault: Option<(usize, Fault)>) -> GenerationRequest {
        GenerationRequest {
            constraint: Some(Box::new(Script {
                allowed: allowed.iter().map(|tokens| tokens.to_vec()).collect(),
                taken: Vec::new(),
                fault,
            })),
            ..ask(20)
        }
    }

    #[test]
    fn a_constraint_is_kept_to_and_its_faults_are_its_requests_alone() {
        check_constraints(&start_with(|_| {}));
    }

    #[test]
    fn a_constraint_sees_every_token_when_steps_are_launched_ahead() {
        check_constraints(&start_with(|backend| backend.is_pipelined = true));
    }

    fn check_constraints(engine: &LlmEngine) {
        let neighbour_request = ask(40);
        let expected = expected_events(&neighbour_request);
        let neighbour = engine.submit(neighbour_request).expect("it starts");
        let run = |request| {
            let mut events = collect(engine.submit(request).expect("it starts"));
            (tokens(&events), events.pop().expect("an end"))
        };
        let rules: &[&[u32]] = &[&[7], &[40], &[8, 9]];
        let (output, end) = run(constrained(rules, None));
        assert!(output[..2] == [7, 40] && [8, 9].contains(&output[2]) && output.len() == 3, "{output:?}");
        let reason = FinishReason::ConstraintDone;
        assert_eq!(end, TokenEvent::Finished { reason });
        for (position, fault, message) in [
            (2, Fault::Error, "a rule that nobody understands"),
            (0, Fault::Error, "a rule that nobody understands"),
            (1, Fault::Panic, "it panicked: a bug in a grammar"),
        ] {
            let (output, end) = run(constrained(rules, Some((position, fault))));
            assert_eq!(output.len(), position);
            assert_eq!(end, TokenEvent::Failed(RequestError::Constraint(message.to_owned())));
        }
        let (output, end) = run(constrained(&[&[7], &[]], None));
        assert_eq!(output, [7]);
        assert!(matches!(end, TokenEvent::Failed(RequestError::Constraint(_))));
        let (output, end) = run(constrained(&[], None));
        assert_eq!(
            (output, end),
            (
                vec![],
                TokenEvent::Finished {
                    reason: FinishReason::ConstraintDone
                }
            )
        );
        assert_eq!(without_cached_tokens(collect(neighbour)), expected);
        assert_empty(engine);
    }

    /// Allows everything, once its gate is opened for each mask.
    struct Gated(std::sync::mpsc::Receiver<()>);

    impl Constraint for Gated {
        fn fill_mask(&mut self, _: &mut [u32]) -> Result<bool, String> {
            self.0.recv().map_err(|_| "the gate is gone".to_owned())?;
            Ok(true)
        }

        fn commit(&mut self, _: u32) -> Result<(), String> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_constraint_holds_up_its_own_request_alone() {
        for is_pipelined in [false, true] {
            let engine = start_with(|backend| backend.is_pipelined = is_pipelined);
            let slow = |prompt_request: GenerationRequest| {
                let (open, gate) = sync_channel::<()>(64);
                let request = GenerationRequest {
                    constraint: Some(Box::new(Gated(gate))),
                    ..prompt_request
                };
                (open, engine.submit(request).expect("it starts"))
            };
            let expected = expected_events(&ask(20));
            let (open, stream) = slow(ask(20));
            // Whole answers while the mask is not there.
            for _ in 0..2 {
                let events = collect(engine.submit(ask(20)).expect("it starts"));
                assert_eq!(without_cached_tokens(events), expected);
            }
            assert_eq!((engine.stats().finished_total, engine.stats().running + engine.stats().waiting), (2, 1));
            (0..20).for_each(|_| open.send(()).expect("a mask is waited for"));
            assert_eq!(tokens(&collect(stream)), tokens(&expected));
            // One that is given up while its mask is worked out leaves nothing behind.
            let (open, stream) = slow(ask(20));
            drop(stream);
            assert_eq!(without_cached_tokens(collect(engine.submit(ask(20)).expect("it starts"))), expected);
            drop(open);
            assert_empty(&engine);
        }
    }

    /// Submits from the flood before every step, so that its queue never empties, and gives the steps until the last of `few` has ended.
    fn steps_beside_a_flood(is_pipelined: bool, adapter_bytes: usize, flood: impl Fn() -> GenerationRequest, few: Vec<GenerationRequest>) -> usize {
        let (open, gate) = sync_channel(0);
        let mut backend = FakeBackend::new(Capacity { adapter_bytes, ..capacity() });
        backend.gate = Some(gate);
        backend.is_pipelined = is_pipelined;
        let config = EngineConfig {
            max_queued_requests: 1000,
            ..config()
        };
        let engine = try_start(Box::new(backend), config, decoder()).expect("limits that fit");
        let submit = |request| engine.submit(request).expect("there is room");
        let mut flooding: Vec<TokenStream> = (0..100).map(|_| submit(flood())).collect();
        (0..3).for_each(|_| open.send(()).expect("a step runs"));
        let names = few
            .iter()
            .filter_map(|request| request.adapter.as_ref())
            .map(|lease| lease.name().clone());
        let names: Vec<Arc<str>> = names.filter(|name| **name != *"hot").collect();
        let mut few: Vec<TokenStream> = few.into_iter().map(submit).collect();
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let mut steps = 0;
        while !few.is_empty() {
            flooding.push(submit(flood()));
            open.send(()).expect("a step runs");
            steps += 1;
            assert!(steps < 500, "{} still wait", few.len());
            few.retain_mut(|stream| {
                let mut events = std::iter::from_fn(|| match stream.poll_next(&mut context) {
                    std::task::Poll::Ready(event) => event,
                    std::task::Poll::Pending => None,
                });
                !events.any(|event| event.is_terminal())
            });
        }
        // Each has waited, and is counted under its own name.
        for stats in engine.adapter_stats().into_iter().filter(|stats| names.contains(&stats.name)) {
            assert_eq!((stats.requests_total, stats.admitted_total, stats.waiting, stats.running), (1, 1, 0, 0));
            assert!(stats.waiting_seconds_total > 0.0);
        }
        let hot = engine
            .adapter_stats()
            .into_iter()
            .find(|stats| &*stats.name == "hot")
            .expect("it is counted");
        assert!(hot.waiting >= 50, "the flood has not ended: {hot:?}");
        assert!(hot.output_tokens_total > 0, "and is served beside them");
        drop((open, flooding));
        while !block_on(engine.flush_cache()) {
            std::thread::yield_now();
        }
        assert_empty(&engine);
        steps
    }

    /// Twelve requests of others, each on an adapter of its own, more than a batch may have and, at last, than there is room for. Alone they
    /// take 27 steps and more: 96 tokens, at most four a step and two adapters a step, and their prompts.
    #[test]
    fn an_adapter_that_floods_lets_the_others_have_their_turns() {
        let leases = LeaseCount::default();
        for (is_pipelined, adapter_bytes) in [(false, 2000), (true, 2000), (false, 200), (true, 200)] {
            let ask = |name: &str, number| request(vec![1, 2, 3], 8, Some(leases.lease(name, &host_adapter(number, 100))));
            let few = (1..13).map(|number| ask(&format!("cold-{number}"), number)).collect();
            let steps = steps_beside_a_flood(is_pipelined, adapter_bytes, || ask("hot", 0), few);
            // First come, first served would be 100 requests of the flood's before the first of theirs: 200 steps and more.
            assert!(steps <= 130, "{steps} steps with {adapter_bytes} bytes");
        }
        assert_eq!(leases.get(), 0);
    }

    /// The same of tenants that share an adapter.
    #[test]
    fn a_tenant_that_floods_lets_the_others_have_their_turns() {
        let leases = LeaseCount::default();
        for is_pipelined in [false, true] {
            let ask = |tenant: &str| GenerationRequest {
                fairness_key: tenant.into(),
                ..request(vec![1, 2, 3], 8, Some(leases.lease("hot", &host_adapter(0, 100))))
            };
            let few = (0..12).map(|tenant| ask(&tenant.to_string())).collect();
            let steps = steps_beside_a_flood(is_pipelined, 2000, || ask("flood"), few);
            assert!(steps <= 130, "{steps} steps");
        }
    }

    #[test]
    fn statistics_say_who_runs_and_who_waits() {
        let (engine, open) = start_gated();
        let leases = LeaseCount::default();
        let streams: Vec<TokenStream> = [("b", 1), ("a", 2), ("b", 1), ("b", 1), ("c", 3)]
            .into_iter()
            .map(|(name, number)| {
                let lease = leases.lease(name, &host_adapter(number, 100));
                engine.submit(request(vec![1; 6], 10, Some(lease))).expect("4 may run, 2 may wait")
            })
            .collect();
        // Two steps are over when a third begins.
        (0..3).for_each(|_| open.send(()).expect("a step runs"));
        let stats = engine.stats();
        let names = |names: &[Arc<str>]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert_eq!((stats.running, stats.waiting), (4, 1));
        // Three of b's are a quantum, a came before c.
        assert_eq!(names(&stats.running_adapters), ["a", "b"]);
        assert_eq!(names(&stats.waiting_adapters), ["c"]);
        assert_eq!(stats.device_adapter_bytes, 300);
        assert_eq!(stats.device_uploads_total, 3);
        assert!(stats.healthy && stats.total_blocks == 40 && stats.used_blocks > 0);
        drop(open);
        streams.into_iter().for_each(|stream| drop(collect(stream)));
        let adapters = engine.adapter_stats();
        assert_eq!(adapters.iter().map(|stats| stats.output_tokens_total).collect::<Vec<_>>(), [10, 30, 10]);
        assert_eq!(adapters.iter().map(|stats| stats.prompt_tokens_total).collect::<Vec<_>>(), [6, 18, 6]);
        assert_eq!(adapters.iter().map(|stats| stats.admitted_total).collect::<Vec<_>>(), [1, 3, 1]);
    }
}
