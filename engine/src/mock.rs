//! [`MockEngine`]: scripted, gated, deterministic; for tests of the API.
//!
//! Nothing here runs by itself: events are written when a request is submitted or a [`Gate`] is opened, on the caller's thread.
//! A test that holds a gate therefore knows exactly how far a request has come, without a sleep.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::{mpsc::UnboundedSender, watch};

use crate::{
    AdapterError, AdapterInfo, AdapterLease, BoxFuture, EngineDescription, EngineStats, FinishReason, GenerationRequest, InferenceEngine,
    LoadRequest, LogprobsParams, RequestError, RequestId, SamplingParams, SubmitError, TokenEvent, TokenLogprobs, TokenStream, UnloadMode, Unloading,
    adapter::{
        AdapterState, AlignedBytes, HostAdapter, PackedDtype, VersionId,
        lease::{Hold, LeaseGuard},
        registry::check_adapter_name,
    },
    request::Constraint,
    stages::Stages,
};

/// Why the mock has failed.
const TOLD_TO_FAIL: &str = "the mock was told to be unhealthy";

/// One instruction of a script.
#[derive(Clone, Debug)]
pub enum Step {
    /// Emit this token.
    Token(u32),
    /// Emit nothing more until the gate is open.
    Wait(Gate),
    /// End with this reason. A script that runs out ends with an end-of-sequence token.
    Finish(FinishReason),
    /// End badly.
    Fail(RequestError),
}

/// What one request answers with.
#[derive(Clone, Debug, Default)]
pub struct Script {
    /// Prompt tokens reported as found in the prefix cache.
    pub cached_tokens: u32,
    /// Held before `Started`.
    pub before_start: Option<Gate>,
    /// After `Started`, in order.
    pub steps: VecDeque<Step>,
}

impl Script {
    /// These tokens, then an end-of-sequence token.
    pub fn tokens(tokens: impl IntoIterator<Item = u32>) -> Self {
        Self {
            steps: tokens.into_iter().map(Step::Token).collect(),
            ..Self::default()
        }
    }

    /// Adds an instruction.
    #[must_use]
    pub fn then(mut self, step: Step) -> Self {
        self.steps.push_back(step);
        self
    }

    /// Adds tokens.
    #[must_use]
    pub fn then_tokens(mut self, tokens: impl IntoIterator<Item = u32>) -> Self {
        self.steps.extend(tokens.into_iter().map(Step::Token));
        self
    }

    /// Waits for `gate` before the prompt counts as computed.
    #[must_use]
    pub fn held_by(mut self, gate: &Gate) -> Self {
        self.before_start = Some(gate.clone());
        self
    }
}

type Held = Box<dyn FnOnce() + Send>;

/// Holds what waits for it until it is opened; stays open.
#[derive(Clone, Default)]
pub struct Gate(Arc<Mutex<GateState>>);

#[derive(Default)]
struct GateState {
    open: bool,
    held: Vec<Held>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("open", &self.0.lock().open).finish_non_exhaustive()
    }
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets everything that waits go on, now and later; events are written before this returns.
    pub fn open(&self) {
        let held = {
            let mut state = self.0.lock();
            state.open = true;
            std::mem::take(&mut state.held)
        };
        held.into_iter().for_each(|resume| resume());
    }

    /// How many wait.
    pub fn num_held(&self) -> usize {
        self.0.lock().held.len()
    }

    /// Waits in async code.
    async fn passed(&self) {
        let (opened, wait) = tokio::sync::oneshot::channel();
        self.pass(Box::new(move || {
            let _ = opened.send(());
        }));
        // A gate that was dropped holds nobody.
        let _ = wait.await;
    }

    fn pass(&self, resume: Held) {
        let mut state = self.0.lock();
        if state.open {
            drop(state);
            resume();
        } else {
            state.held.push(resume);
        }
    }
}

/// A request as the engine got it.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Prompt token ids.
    pub prompt_tokens: Vec<u32>,
    /// Sampling settings.
    pub sampling: SamplingParams,
    /// Name and version of the adapter.
    pub adapter: Option<(Arc<str>, VersionId)>,
    /// Which log-probabilities were asked for.
    pub logprobs: LogprobsParams,
    /// Whether it came with a constraint.
    pub has_constraint: bool,
    /// Whom it is counted under.
    pub fairness_key: Arc<str>,
}

type Reply = dyn Fn(&Recorded) -> Script + Send + Sync;

/// Builds a [`MockEngine`].
pub struct MockEngineBuilder {
    description: EngineDescription,
    reply: Box<Reply>,
    max_pinned: usize,
    forgets: bool,
}

impl MockEngineBuilder {
    /// Changes the description.
    #[must_use]
    pub fn describe(mut self, change: impl FnOnce(&mut EngineDescription)) -> Self {
        change(&mut self.description);
        self
    }

    /// What a request answers with, unless [`MockEngine::script_next`] said. By default the prompt, then an end-of-sequence token.
    #[must_use]
    pub fn reply(mut self, reply: impl Fn(&Recorded) -> Script + Send + Sync + 'static) -> Self {
        self.reply = Box::new(reply);
        self
    }

    /// Forgets requests that have ended, for runs of many: [`MockEngine::recorded`] and [`MockEngine::ended`] then know only those that live.
    #[must_use]
    pub fn forget_ended(mut self) -> Self {
        self.forgets = true;
        self
    }

    /// The engine.
    pub fn build(self) -> MockEngine {
        MockEngine {
            description: self.description,
            reply: self.reply,
            max_pinned: self.max_pinned,
            scripts: Mutex::default(),
            submit_errors: Mutex::default(),
            requests: Mutex::default(),
            forgets: self.forgets,
            prune_at: AtomicUsize::new(0),
            adapters: Mutex::default(),
            load_errors: Mutex::default(),
            load_gate: Mutex::default(),
            acquire_gate: Mutex::default(),
            acquire_errors: Mutex::default(),
            healthy: watch::Sender::new(true),
            shutting_down: AtomicBool::new(false),
            next_version: AtomicU64::new(1),
        }
    }
}

/// An engine without a model.
pub struct MockEngine {
    description: EngineDescription,
    reply: Box<Reply>,
    max_pinned: usize,
    scripts: Mutex<VecDeque<Script>>,
    submit_errors: Mutex<VecDeque<Option<SubmitError>>>,
    requests: Mutex<Vec<Live>>,
    forgets: bool,
    /// How many requests there may be before those that ended are forgotten.
    prune_at: AtomicUsize,
    adapters: Mutex<Vec<MockAdapter>>,
    load_errors: Mutex<VecDeque<AdapterError>>,
    load_gate: Mutex<Option<Gate>>,
    acquire_gate: Mutex<Option<Gate>>,
    acquire_errors: Mutex<VecDeque<AdapterError>>,
    healthy: watch::Sender<bool>,
    shutting_down: AtomicBool,
    next_version: AtomicU64,
}

struct Live {
    recorded: Recorded,
    run: Arc<Mutex<Run>>,
}

/// One adapter, with what counts its leases.
struct MockAdapter {
    info: AdapterInfo,
    weights: Arc<HostAdapter>,
    hold: Arc<Hold>,
}

impl MockAdapter {
    fn info(&self) -> AdapterInfo {
        AdapterInfo {
            leases: self.hold.count(),
            ..self.info.clone()
        }
    }
}

impl Default for MockEngine {
    fn default() -> Self {
        Self::builder().build()
    }
}

impl MockEngine {
    /// An engine with a vocabulary of 512 tokens, a context of 256, end-of-sequence token 0 and LoRA on.
    pub fn builder() -> MockEngineBuilder {
        MockEngineBuilder {
            description: EngineDescription {
                architecture: "MockForCausalLM".into(),
                device: "mock".into(),
                dtype: "float32".into(),
                vocab_size: 512,
                context_length: 256,
                eos_token_ids: vec![0],
                num_blocks: 1024,
                min_blocks: 1024,
                block_size: 16,
                lora_enabled: true,
                max_loras_per_batch: 8,
                max_loaded_loras: None,
                max_lora_rank: None,
                lora_target_modules: None,
                max_running_requests: 64,
                max_queued_requests: 64,
            },
            reply: Box::new(|request| Script::tokens(request.prompt_tokens.iter().copied())),
            max_pinned: 7,
            forgets: false,
        }
    }

    /// What the next request without a script answers with; several calls queue up.
    pub fn script_next(&self, script: Script) {
        self.scripts.lock().push_back(script);
    }

    /// Refuses the next submission; several calls queue up.
    pub fn fail_next_submit(&self, error: SubmitError) {
        self.submit_errors.lock().push_back(Some(error));
    }

    /// Lets `accepted` submissions pass, then refuses one.
    pub fn fail_after_submits(&self, accepted: usize, error: SubmitError) {
        let mut errors = self.submit_errors.lock();
        errors.extend(std::iter::repeat_n(None, accepted));
        errors.push_back(Some(error));
    }

    /// Fails the next load; several calls queue up.
    pub fn fail_next_load(&self, error: AdapterError) {
        self.load_errors.lock().push_back(error);
    }

    /// Fails the next acquisition; several calls queue up.
    pub fn fail_next_acquire(&self, error: AdapterError) {
        self.acquire_errors.lock().push_back(error);
    }

    /// Requests wait for their adapters at this gate from now on, as for ones that are not in memory.
    pub fn hold_acquisitions(&self, gate: &Gate) {
        *self.acquire_gate.lock() = Some(gate.clone());
    }

    /// Loads wait for this gate from now on.
    pub fn hold_loads(&self, gate: &Gate) {
        *self.load_gate.lock() = Some(gate.clone());
    }

    /// Registers an adapter as loaded. Panics if the name is taken.
    pub fn add_adapter(&self, name: &str) {
        self.register(&LoadRequest {
            name: name.into(),
            files: crate::FileSource::Embedded(&[]),
            source: format!("mock:{name}"),
            pinned: false,
            replace: false,
            expected_version: None,
        })
        .expect("the name is free");
    }

    /// Marks the device as failed, or well again.
    pub fn set_healthy(&self, healthy: bool) {
        self.healthy.send_replace(healthy);
    }

    /// Every request so far, in order of submission.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.requests.lock().iter().map(|live| live.recorded.clone()).collect()
    }

    /// Requests that have not ended and whose stream is still held.
    pub fn live_requests(&self) -> usize {
        self.prune();
        self.requests.lock().iter().filter(|live| live.run.lock().sender.is_some()).count()
    }

    /// Leases held on an adapter; 0 for an unknown name.
    pub fn leases(&self, name: &str) -> usize {
        self.prune();
        let adapters = self.adapters.lock();
        adapters
            .iter()
            .find(|adapter| &*adapter.info.name == name)
            .map_or(0, |adapter| adapter.hold.count())
    }

    /// Resolves when the stream of request `index` (in order of submission) was dropped or has ended.
    pub async fn ended(&self, index: usize) {
        let sender = self.requests.lock()[index].run.lock().sender.clone();
        if let Some(sender) = sender {
            sender.closed().await;
        }
    }

    /// Frees what requests with a dropped stream held, as the real engine does at its next step.
    fn prune(&self) {
        let mut requests = self.requests.lock();
        if self.forgets && requests.len() < self.prune_at.load(Ordering::Relaxed) {
            return;
        }
        for live in requests.iter() {
            let mut run = live.run.lock();
            if run.sender.as_ref().is_some_and(UnboundedSender::is_closed) {
                run.end(None);
            }
        }
        if self.forgets {
            requests.retain(|live| live.run.lock().sender.is_some());
            // Twice as many as live: each request is looked at a bounded number of times, on average.
            self.prune_at.store(2 * requests.len() + 64, Ordering::Relaxed);
        }
    }

    fn register(&self, request: &LoadRequest) -> Result<AdapterInfo, AdapterError> {
        check_adapter_name(&request.name, &[])?;
        let mut adapters = self.adapters.lock();
        let taken = adapters.iter().position(|adapter| *adapter.info.name == *request.name);
        if taken.is_some() && !request.replace {
            return Err(AdapterError::AlreadyLoaded { name: request.name.clone() });
        }
        self.check_pins(&adapters, &request.name, request.pinned)?;
        let mut version = [0; 32];
        version[..8].copy_from_slice(&self.next_version.fetch_add(1, Ordering::SeqCst).to_le_bytes());
        let version = VersionId(version);
        let adapter = MockAdapter {
            info: AdapterInfo {
                name: request.name.as_str().into(),
                source: request.source.clone(),
                state: AdapterState::Host,
                version: Some(version.to_string()),
                max_lora_rank: 8,
                target_modules: vec!["q_proj".into(), "v_proj".into()],
                bytes: 4096,
                companion_bytes: 0,
                pinned: request.pinned,
                leases: 0,
                requests_total: 0,
                hits_total: 0,
                last_used: None,
                last_error: None,
                report: None,
                parts: Vec::new(),
            },
            weights: Arc::new(HostAdapter {
                version,
                dtype: PackedDtype::F32,
                modules: Vec::new(),
                replaced: Vec::new(),
                token_rows: Vec::new(),
                resized_vocab: None,
                companion: None,
                blob: Arc::new(AlignedBytes::zeroed(0)),
                max_lora_rank: 8,
            }),
            hold: Arc::default(),
        };
        let info = adapter.info.clone();
        match taken {
            Some(index) => adapters[index] = adapter,
            None => adapters.push(adapter),
        }
        Ok(info)
    }

    fn check_pins(&self, adapters: &[MockAdapter], name: &str, pinned: bool) -> Result<(), AdapterError> {
        let others = adapters
            .iter()
            .filter(|adapter| adapter.info.pinned && &*adapter.info.name != name)
            .count();
        if pinned && others >= self.max_pinned {
            return Err(AdapterError::TooManyPinned {
                name: name.into(),
                pinned: others,
                limit: self.max_pinned,
            });
        }
        Ok(())
    }

    fn unknown(adapters: &[MockAdapter], name: &str) -> AdapterError {
        AdapterError::Unknown {
            name: name.into(),
            loaded: adapters.iter().map(|adapter| adapter.info.name.to_string()).collect(),
        }
    }

    fn check(&self, request: &GenerationRequest) -> Result<(), SubmitError> {
        if let Some(Some(error)) = self.submit_errors.lock().pop_front() {
            return Err(error);
        }
        if self.shutting_down.load(Ordering::SeqCst) {
            return Err(SubmitError::ShuttingDown);
        }
        if !*self.healthy.borrow() {
            return Err(SubmitError::Unhealthy(TOLD_TO_FAIL.into()));
        }
        let context_length = self.description.context_length;
        let vocab_size = request.vocab_size(self.description.vocab_size);
        if request.prompt_tokens.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if let Some(&got) = request.prompt_tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(SubmitError::TokenOutOfRange { got, vocab_size });
        }
        if request.prompt_tokens.len() >= context_length {
            return Err(SubmitError::PromptTooLong {
                got: request.prompt_tokens.len(),
                context_length,
            });
        }
        request.sampling.validate(vocab_size)
    }
}

/// A script in progress.
struct Run {
    sender: Option<UnboundedSender<TokenEvent>>,
    stages: Arc<Stages>,
    started: bool,
    script: Script,
    request: Recorded,
    stop_token_ids: Vec<u32>,
    vocab_size: usize,
    output_len: u32,
    room: u32,
    // Dropped at the end, as the real engine does.
    lease: Option<AdapterLease>,
    constraint: Option<Box<dyn Constraint>>,
}

impl Run {
    fn send(&self, event: TokenEvent) {
        if let Some(sender) = &self.sender {
            // A closed channel is a cancelled request: `prune` frees it.
            let _ = sender.send(event);
        }
    }

    fn end(&mut self, event: Option<TokenEvent>) {
        if let Some(event) = event {
            self.send(event);
        }
        self.sender = None;
        self.lease = None;
        self.constraint = None;
    }

    /// Log-probabilities that a test can tell apart: the chosen token has `-0.5`, the k-th alternative `-(k + 1)`.
    fn logprobs(&self, token_id: u32, top_k: u32) -> TokenLogprobs {
        let others = (0..self.vocab_size as u32).filter(|&other| other != token_id);
        let top = std::iter::once((token_id, -0.5)).chain(others.enumerate().map(|(place, other)| (other, -(place as f32 + 2.0))));
        TokenLogprobs {
            token_id,
            logprob: -0.5,
            top: top.take(top_k as usize).collect(),
        }
    }

    fn start(&mut self) {
        self.started = true;
        let mut prompt_logprobs = Vec::new();
        if let Some(params) = self.request.logprobs.prompt {
            let first = (params.start as usize).max(1).min(self.request.prompt_tokens.len());
            prompt_logprobs = self.request.prompt_tokens[first..]
                .iter()
                .map(|&token| self.logprobs(token, params.top_k))
                .collect();
        }
        self.stages.compute(self.script.cached_tokens);
        self.send(TokenEvent::Started {
            cached_tokens: self.script.cached_tokens,
            prompt_logprobs,
        });
    }

    /// Under a constraint: the scripted token if it is allowed, otherwise the lowest allowed one; `None` when nothing may follow.
    fn choose(&mut self, scripted: u32) -> Result<Option<u32>, String> {
        let Some(constraint) = &mut self.constraint else {
            return Ok(Some(scripted));
        };
        let mut mask = vec![u32::MAX; self.vocab_size.div_ceil(32)];
        if !constraint.fill_mask(&mut mask)? {
            return Ok(None);
        }
        let allowed = |token: u32| mask[token as usize / 32] & (1 << (token % 32)) != 0;
        let Some(token) = std::iter::once(scripted).chain(0..self.vocab_size as u32).find(|&token| allowed(token)) else {
            return Err("forbids every token".into());
        };
        constraint.commit(token)?;
        Ok(Some(token))
    }

    fn token(&mut self, scripted: u32) {
        let token_id = match self.choose(scripted) {
            Ok(Some(token)) => token,
            Ok(None) => {
                let reason = FinishReason::ConstraintDone;
                return self.end(Some(TokenEvent::Finished { reason }));
            }
            Err(reason) => return self.end(Some(TokenEvent::Failed(RequestError::Constraint(reason)))),
        };
        let logprobs = self.request.logprobs.output_top_k.map(|top_k| self.logprobs(token_id, top_k));
        self.send(TokenEvent::Token { token_id, logprobs });
        self.output_len += 1;
        if self.stop_token_ids.contains(&token_id) {
            let reason = FinishReason::Stop { token_id };
            self.end(Some(TokenEvent::Finished { reason }));
        } else if self.output_len >= self.room {
            let reason = FinishReason::Length;
            self.end(Some(TokenEvent::Finished { reason }));
        }
    }
}

/// Runs a script up to its next closed gate or its end.
fn advance(run: &Arc<Mutex<Run>>) {
    loop {
        let mut state = run.lock();
        if state.sender.is_none() {
            return;
        }
        if !state.started {
            if let Some(gate) = state.script.before_start.take() {
                drop(state);
                let run = Arc::clone(run);
                return gate.pass(Box::new(move || advance(&run)));
            }
            state.start();
        }
        match state.script.steps.pop_front() {
            Some(Step::Token(token)) => state.token(token),
            Some(Step::Wait(gate)) => {
                drop(state);
                let run = Arc::clone(run);
                return gate.pass(Box::new(move || advance(&run)));
            }
            Some(Step::Finish(reason)) => state.end(Some(TokenEvent::Finished { reason })),
            Some(Step::Fail(error)) => state.end(Some(TokenEvent::Failed(error))),
            None => match state.stop_token_ids.first().copied() {
                Some(eos) => state.token(eos),
                None => state.end(Some(TokenEvent::Finished {
                    reason: FinishReason::Length,
                })),
            },
        }
    }
}

impl InferenceEngine for MockEngine {
    fn describe(&self) -> &EngineDescription {
        &self.description
    }

    fn submit(&self, request: GenerationRequest) -> Result<TokenStream, SubmitError> {
        self.check(&request)?;
        let stages = Arc::new(Stages::begin(&request));
        let vocab_size = request.vocab_size(self.description.vocab_size);
        let recorded = Recorded {
            prompt_tokens: request.prompt_tokens,
            sampling: request.sampling,
            adapter: request.adapter.as_ref().map(|lease| (Arc::clone(lease.name()), lease.version())),
            logprobs: request.logprobs,
            has_constraint: request.constraint.is_some(),
            fairness_key: request.fairness_key,
        };
        let script = self.scripts.lock().pop_front().unwrap_or_else(|| (self.reply)(&recorded));
        let mut stop_token_ids = recorded.sampling.stop_token_ids.clone();
        if !recorded.sampling.ignore_eos {
            stop_token_ids.splice(0..0, self.description.eos_token_ids.iter().copied());
        }
        let context_room = (self.description.context_length - recorded.prompt_tokens.len()) as u32;
        let mut requests = self.requests.lock();
        let (sender, stream) = TokenStream::channel(RequestId(requests.len() as u64), Arc::clone(&stages));
        let run = Arc::new(Mutex::new(Run {
            sender: Some(sender),
            stages,
            started: false,
            script,
            stop_token_ids,
            vocab_size,
            output_len: 0,
            room: recorded.sampling.max_tokens.min(context_room),
            request: recorded.clone(),
            lease: request.adapter,
            constraint: request.constraint,
        }));
        requests.push(Live {
            recorded,
            run: Arc::clone(&run),
        });
        drop(requests);
        // Its batch has room for all.
        run.lock().stages.admit();
        advance(&run);
        Ok(stream)
    }

    fn acquire_adapter<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<AdapterLease, AdapterError>> {
        Box::pin(async move {
            if !self.description.lora_enabled {
                return Err(AdapterError::NotEnabled);
            }
            let gate = self.acquire_gate.lock().clone();
            if let Some(gate) = gate {
                gate.passed().await;
            }
            if let Some(error) = self.acquire_errors.lock().pop_front() {
                return Err(error);
            }
            let mut adapters = self.adapters.lock();
            let Some(index) = adapters.iter().position(|adapter| &*adapter.info.name == name) else {
                return Err(Self::unknown(&adapters, name));
            };
            // The list is in order of use.
            let mut adapter = adapters.remove(index);
            adapter.info.requests_total += 1;
            adapter.info.hits_total += 1;
            adapter.info.last_used = Some(SystemTime::now());
            let guard = LeaseGuard::new(&adapter.hold, None);
            let lease = AdapterLease::counted(Arc::clone(&adapter.info.name), Arc::clone(&adapter.weights), guard);
            adapters.push(adapter);
            Ok(lease)
        })
    }

    fn load_adapter(&self, request: LoadRequest) -> BoxFuture<'_, Result<AdapterInfo, AdapterError>> {
        Box::pin(async move {
            if !self.description.lora_enabled {
                return Err(AdapterError::NotEnabled);
            }
            let gate = self.load_gate.lock().clone();
            if let Some(gate) = gate {
                gate.passed().await;
            }
            if let Some(error) = self.load_errors.lock().pop_front() {
                return Err(error);
            }
            self.register(&request)
        })
    }

    fn acquire_adapters<'a>(&'a self, names: &'a [&'a str]) -> BoxFuture<'a, Result<Vec<AdapterLease>, AdapterError>> {
        Box::pin(async move {
            let mut leases = Vec::with_capacity(names.len());
            for name in names {
                leases.push(self.acquire_adapter(name).await?);
            }
            Ok(leases)
        })
    }

    fn unload_adapter(&self, name: &str, mode: UnloadMode) -> Result<Unloading, AdapterError> {
        self.prune();
        let adapter = {
            let mut adapters = self.adapters.lock();
            let Some(index) = adapters.iter().position(|adapter| &*adapter.info.name == name) else {
                return Err(Self::unknown(&adapters, name));
            };
            adapters.remove(index)
        };
        let unloading = Unloading::new(name, mode, vec![adapter.hold]);
        for live in self.requests.lock().iter() {
            let mut run = live.run.lock();
            if run.lease.as_ref().is_some_and(AdapterLease::is_revoked) {
                let reason = FinishReason::AdapterUnloaded;
                run.end(Some(TokenEvent::Finished { reason }));
            }
        }
        Ok(unloading)
    }

    fn pin_adapter(&self, name: &str, pinned: bool) -> Result<(), AdapterError> {
        let mut adapters = self.adapters.lock();
        let Some(index) = adapters.iter().position(|adapter| &*adapter.info.name == name) else {
            return Err(Self::unknown(&adapters, name));
        };
        self.check_pins(&adapters, name, pinned)?;
        adapters[index].info.pinned = pinned;
        Ok(())
    }

    fn list_adapters(&self) -> Vec<AdapterInfo> {
        self.prune();
        self.adapters.lock().iter().map(MockAdapter::info).collect()
    }

    fn adapter_info(&self, name: &str) -> Option<AdapterInfo> {
        self.prune();
        let adapters = self.adapters.lock();
        adapters.iter().find(|adapter| &*adapter.info.name == name).map(MockAdapter::info)
    }

    fn stats(&self) -> EngineStats {
        let running = self.live_requests();
        let requests = self.requests.lock();
        let mut running_adapters: Vec<Arc<str>> = requests
            .iter()
            .filter(|live| live.run.lock().sender.is_some())
            .filter_map(|live| live.recorded.adapter.as_ref().map(|(name, _)| Arc::clone(name)))
            .collect();
        running_adapters.sort();
        running_adapters.dedup();
        EngineStats {
            healthy: *self.healthy.borrow(),
            running,
            total_blocks: self.description.num_blocks,
            prompt_tokens_total: requests.iter().map(|live| live.recorded.prompt_tokens.len() as u64).sum(),
            output_tokens_total: requests.iter().map(|live| u64::from(live.run.lock().output_len)).sum(),
            finished_total: (requests.len() - running) as u64,
            running_adapters,
            ..EngineStats::default()
        }
    }

    fn flush_cache(&self) -> BoxFuture<'_, bool> {
        Box::pin(async move { self.live_requests() == 0 })
    }

    fn abort_all(&self) {
        for live in self.requests.lock().iter() {
            let reason = FinishReason::Aborted;
            live.run.lock().end(Some(TokenEvent::Finished { reason }));
        }
    }

    fn failed(&self) -> BoxFuture<'_, String> {
        let mut healthy = self.healthy.subscribe();
        Box::pin(async move {
            healthy.wait_for(|healthy| !healthy).await.expect("`self` keeps the sender");
            TOLD_TO_FAIL.to_owned()
        })
    }

    fn shutdown(&self, _timeout: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.shutting_down.store(true, Ordering::SeqCst);
            for live in self.requests.lock().iter() {
                live.run.lock().end(Some(TokenEvent::Failed(RequestError::ShuttingDown)));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompt_tokens: &[u32]) -> GenerationRequest {
        GenerationRequest {
            prompt_tokens: prompt_tokens.to_vec(),
            sampling: SamplingParams::default(),
            adapter: None,
            logprobs: LogprobsParams::default(),
            constraint: None,
            fairness_key: "".into(),
        }
    }

    fn drain(stream: &mut TokenStream) -> Vec<TokenEvent> {
        std::iter::from_fn(|| stream.blocking_next()).collect()
    }

    #[test]
    fn a_request_echoes_its_prompt_and_ends_once() {
        let engine = MockEngine::default();
        let mut stream = engine.submit(request(&[5, 6])).unwrap();
        let tokens: Vec<TokenEvent> = drain(&mut stream);
        let token = |token_id| TokenEvent::Token { token_id, logprobs: None };
        assert_eq!(tokens[1..4], [token(5), token(6), token(0)]);
        assert_eq!(
            tokens[4],
            TokenEvent::Finished {
                reason: FinishReason::Stop { token_id: 0 }
            }
        );
        assert_eq!(tokens.len(), 5);
        assert_eq!(engine.live_requests(), 0);
    }

    #[test]
    fn a_gate_holds_the_rest_and_a_dropped_stream_frees_the_lease() {
        let engine = MockEngine::default();
        engine.add_adapter("sql");
        let gate = Gate::new();
        engine.script_next(Script::tokens([1]).then(Step::Wait(gate.clone())).then_tokens([2]));
        let lease = futures::executor::block_on(engine.acquire_adapter("sql")).unwrap();
        let mut stream = engine
            .submit(GenerationRequest {
                adapter: Some(lease),
                ..request(&[9])
            })
            .unwrap();
        assert!(matches!(stream.blocking_next(), Some(TokenEvent::Started { .. })));
        assert!(matches!(stream.blocking_next(), Some(TokenEvent::Token { token_id: 1, .. })));
        assert_eq!((engine.live_requests(), engine.leases("sql")), (1, 1));
        drop(stream);
        assert_eq!((engine.live_requests(), engine.leases("sql")), (0, 0));
        gate.open();
        assert_eq!(engine.live_requests(), 0);
    }

    #[test]
    fn max_tokens_ends_with_length() {
        let engine = MockEngine::default();
        let sampling = SamplingParams {
            max_tokens: 2,
            ..SamplingParams::default()
        };
        let mut stream = engine
            .submit(GenerationRequest {
                sampling,
                ..request(&[7, 7, 7])
            })
            .unwrap();
        assert_eq!(
            drain(&mut stream).last(),
            Some(&TokenEvent::Finished {
                reason: FinishReason::Length
            })
        );
    }
}
