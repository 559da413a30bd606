//! From settings on the wire to running sequences: ranges, defaults and limits that all routes share.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use polylora_engine::{
    AdapterLease, GenerationRequest, LogprobsParams, SamplingParams,
    adapter::{AdapterState, registry::COMBINATION_LABEL},
};

use tracing::Instrument;

use crate::{
    app::{Caller, Gateway},
    auth::{RequestPermit, TokenReservation},
    error::ApiError,
    metrics::BASE_LABEL,
    prompt::SamplingDefaults,
    routing::Target,
    stream::{Held, TextOptions, TextStream},
};

/// Sampling settings as a request has them, under OpenAI's names.
#[derive(Clone, Debug, Default)]
pub struct SamplingFields {
    /// See [`SamplingParams`], as all below.
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// 0 and -1 are all.
    pub top_k: Option<i64>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// In [-2, 2].
    pub frequency_penalty: Option<f32>,
    /// In [-2, 2].
    pub presence_penalty: Option<f32>,
    /// In (0, 2].
    pub repetition_penalty: Option<f32>,
    /// Keys are token ids, as JSON has them: strings.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// At most the most tokens.
    pub min_tokens: Option<u32>,
    /// Token ids.
    pub stop_token_ids: Option<Vec<u32>>,
    /// No end at end-of-sequence tokens.
    pub ignore_eos: Option<bool>,
    /// Random unless given.
    pub seed: Option<i64>,
}

impl SamplingFields {
    /// Settings for the engine: the request's own, then the model's recommendation, then the API's defaults.
    ///
    /// # Errors
    /// 400 for what has no meaning; ranges are the engine's to check.
    pub fn resolve(self, defaults: &SamplingDefaults) -> Result<SamplingParams, ApiError> {
        let top_k = match self.top_k {
            None => defaults.top_k.unwrap_or(0),
            Some(-1 | 0) => 0,
            Some(k) => u32::try_from(k).map_err(|_| ApiError::invalid("top_k", format!("top_k must be at least 1, or 0 or -1 for all, got {k}")))?,
        };
        let logit_bias = self.logit_bias.unwrap_or_default().into_iter();
        let logit_bias = logit_bias.map(|(token, bias)| match token.parse::<u32>() {
            Ok(token) => Ok((token, bias)),
            Err(_) => Err(ApiError::invalid(
                "logit_bias",
                format!("logit_bias must be keyed by token ids, got {token:?}"),
            )),
        });
        Ok(SamplingParams {
            max_tokens: 0,
            min_tokens: self.min_tokens.unwrap_or(0),
            temperature: self.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_k,
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            logit_bias: logit_bias.collect::<Result<_, _>>()?,
            stop_token_ids: self.stop_token_ids.unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            // A negative seed is as good as any other.
            seed: self.seed.map_or_else(random_seed, |seed| seed as u64),
        })
    }
}

/// How many tokens a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxTokens {
    /// As many as fit.
    Room,
    /// The API's default; fewer if not so many fit.
    Default(u32),
    /// So many, or an error if not so many fit.
    Exactly(u32),
}

/// A prompt and everything that its outputs have in common.
pub struct Job {
    /// Token ids.
    pub prompt_tokens: Vec<u32>,
    /// The adapter; `None` is the base model.
    pub lease: Option<AdapterLease>,
    /// Settings; `max_tokens` is set from the field below.
    pub sampling: SamplingParams,
    /// How many tokens.
    pub max_tokens: MaxTokens,
    /// How many outputs.
    pub n: u32,
    /// How tokens become text; `stop_token_ids` and `min_tokens` are set from `sampling`.
    pub text: TextOptions,
    /// Which log-probabilities.
    pub logprobs: LogprobsParams,
    /// Makes a constraint for each output.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// The id that clients know it by.
    pub rid: Arc<str>,
}

/// A compiled grammar: makes the constraint of one output.
pub trait Grammar: Send + Sync {
    /// At the beginning of an output.
    fn constraint(&self) -> Box<dyn polylora_engine::Constraint>;
}

impl Gateway {
    /// The target with the adapters that its aliases choose by `sticky_key`: see [`Caller::sticky_key`].
    ///
    /// # Errors
    /// See [`crate::aliases::Aliases::resolve`].
    pub fn resolve(&self, caller: &Caller, target: Target, sticky_key: &str) -> Result<Target, ApiError> {
        let Target::Adapter(name) = target else {
            caller.runs_on.add(BASE_LABEL);
            return Ok(target);
        };
        let resolved = self.aliases.resolve(&name, sticky_key, &self.router(&caller.identity));
        let resolved = resolved.map_err(|error| ApiError::from(error).for_param("model"))?;
        // Combinations are too many to be told apart; a name may look like one.
        let is_one = !resolved.contains(['+', '*']) || self.engine.adapter_info(&resolved).is_some_and(|info| info.parts.is_empty());
        caller.runs_on.add(if is_one { &resolved } else { COMBINATION_LABEL });
        Ok(Target::Adapter(resolved.into_owned()))
    }

    /// A lease on a target whose aliases are resolved, counted.
    ///
    /// # Errors
    /// See [`crate::routing::Router::lease`].
    #[tracing::instrument(name = "adapter", level = "debug", skip_all)]
    pub async fn lease(&self, caller: &Caller, target: &Target) -> Result<Option<AdapterLease>, ApiError> {
        let state = self.adapter_state(target);
        let lease = self.router(&caller.identity).lease(target).await?;
        self.count_acquired(lease.as_ref(), state);
        Ok(lease)
    }

    fn adapter_state(&self, target: &Target) -> Option<AdapterState> {
        match target {
            Target::Adapter(name) => self.engine.adapter_info(name).map(|info| info.state),
            Target::Base => None,
        }
    }

    /// `state`: where the adapter was before it was leased.
    fn count_acquired(&self, lease: Option<&AdapterLease>, state: Option<AdapterState>) {
        if let (Some(lease), Some(state)) = (lease, state) {
            self.metrics.adapter_acquired(lease.label(), state);
        }
    }

    /// Leases on several targets, in their order: all of them, or none.
    ///
    /// # Errors
    /// As `lease`; 400 for more adapters than there may be in host memory.
    pub async fn leases(&self, caller: &Caller, targets: &[Target]) -> Result<Vec<Option<AdapterLease>>, ApiError> {
        if let [target] = targets {
            return Ok(vec![self.lease(caller, target).await?]);
        }
        let states: Vec<_> = targets.iter().map(|target| self.adapter_state(target)).collect();
        let leasing = self.router(&caller.identity);
        let leases = leasing.leases(targets).instrument(tracing::debug_span!("adapter")).await?;
        for (lease, state) in leases.iter().zip(states) {
            self.count_acquired(lease.as_ref(), state);
        }
        Ok(leases)
    }

    /// Submits every output of every prompt: prompt by prompt, `n` for each. All, or none.
    ///
    /// # Errors
    /// 400 for what doesn't fit or is out of range; 429 by the key's tokens; 503 when the queue is full. Nothing is left running.
    pub fn start(&self, caller: &Caller, jobs: Vec<Job>) -> Result<Vec<TextStream>, ApiError> {
        let jobs = jobs.into_iter().map(|job| self.fit(job)).collect::<Result<Vec<_>, _>>()?;
        let (mut prompt_tokens, mut output_tokens) = (0, 0);
        for job in &jobs {
            prompt_tokens += job.prompt_tokens.len() as u64;
            // Who did not say how much is charged for what is usual: a whole context would shut out every modest limit.
            let reserved = match job.max_tokens {
                MaxTokens::Room => job.sampling.max_tokens.min(1024),
                MaxTokens::Default(_) | MaxTokens::Exactly(_) => job.sampling.max_tokens,
            };
            output_tokens += u64::from(reserved) * u64::from(job.n);
            self.metrics.request_params(job.n, job.sampling.max_tokens);
        }
        let reservation = Arc::new(caller.identity.reserve_tokens(prompt_tokens, output_tokens, Instant::now())?);
        let permit = match &caller.permit {
            Some(permit) => Arc::clone(permit),
            None => Arc::new(caller.identity.admit(Instant::now())?),
        };
        let mut streams = Vec::new();
        for job in jobs {
            self.submit_job(caller, job, &reservation, &permit, &mut streams)?;
        }
        Ok(streams)
    }

    /// Sets how many tokens a job may generate, and checks what the gateway can check.
    fn fit(&self, mut job: Job) -> Result<Job, ApiError> {
        let description = self.engine.describe();
        let prompt_len = job.prompt_tokens.len();
        if prompt_len >= description.context_length {
            return Err(polylora_engine::SubmitError::PromptTooLong {
                got: prompt_len,
                context_length: description.context_length,
            }
            .into());
        }
        let capacity = description.context_length.min(description.min_blocks * description.block_size);
        let room = u32::try_from(capacity.saturating_sub(prompt_len)).unwrap_or(u32::MAX);
        let max_tokens = match job.max_tokens {
            MaxTokens::Room => room,
            MaxTokens::Default(tokens) => tokens.min(room),
            MaxTokens::Exactly(tokens) if tokens <= room => tokens,
            MaxTokens::Exactly(tokens) => {
                let message = format!(
                    "Requested token count exceeds the model's maximum context length of {capacity} tokens. You requested a total of {} tokens: \
                     {prompt_len} tokens from the input and {tokens} tokens for the completion.",
                    prompt_len as u64 + u64::from(tokens),
                );
                return Err(ApiError::context_length(message, "max_tokens"));
            }
        };
        // The engine generates at least one token: it is thrown away.
        job.text.discard_output = max_tokens == 0;
        if !job.sampling.ignore_eos {
            let ends = self.text(job.lease.as_ref()).end_tokens;
            job.sampling.stop_token_ids.extend(ends.iter());
        }
        job.sampling.max_tokens = max_tokens.max(1);
        job.text.min_tokens = job.sampling.min_tokens;
        job.text.stop_token_ids.clone_from(&job.sampling.stop_token_ids);
        if !job.sampling.ignore_eos {
            job.text.stop_token_ids.extend(&description.eos_token_ids);
        }
        if !(1..=self.limits.max_n).contains(&job.n) {
            let message = format!("n must be between 1 and {}, got {}", self.limits.max_n, job.n);
            return Err(ApiError::invalid("n", message));
        }
        self.check_stop(&job.text.stop)?;
        let vocab_size = job
            .lease
            .as_ref()
            .map_or(description.vocab_size, |lease| lease.vocab_size(description.vocab_size));
        job.sampling.validate(vocab_size)?;
        Ok(job)
    }

    fn check_stop(&self, stop: &[String]) -> Result<(), ApiError> {
        if stop.len() > self.limits.max_stop {
            let message = format!("at most {} stop sequences are possible, got {}", self.limits.max_stop, stop.len());
            return Err(ApiError::invalid("stop", message));
        }
        if stop.iter().any(String::is_empty) {
            return Err(ApiError::invalid("stop", "a stop sequence must not be empty"));
        }
        match stop.iter().map(String::len).max() {
            Some(longest) if longest > self.limits.max_stop_bytes => {
                let message = format!("a stop sequence may have {} bytes, got {longest}", self.limits.max_stop_bytes);
                Err(ApiError::invalid("stop", message))
            }
            _ => Ok(()),
        }
    }

    fn submit_job(
        &self,
        caller: &Caller,
        job: Job,
        reservation: &Arc<TokenReservation>,
        permit: &Arc<RequestPermit>,
        streams: &mut Vec<TextStream>,
    ) -> Result<(), ApiError> {
        let text = self.text(job.lease.as_ref());
        for output in 0..job.n {
            let mut sampling = job.sampling.clone();
            // The first output is what `n = 1` gives; the others have streams of their own.
            sampling.seed = if output == 0 {
                sampling.seed
            } else {
                mix(sampling.seed ^ u64::from(output))
            };
            let adapter = job.lease.as_ref().map(|lease| lease.label());
            let running = self.running.enter(Arc::clone(&job.rid), caller.identity.name());
            let tokens = self.engine.submit(GenerationRequest {
                prompt_tokens: job.prompt_tokens.clone(),
                sampling,
                adapter: job.lease.clone(),
                logprobs: job.logprobs.clone(),
                constraint: job.grammar.as_ref().map(|grammar| grammar.constraint()),
                fairness_key: Arc::clone(&caller.fairness_key),
            })?;
            let held = Held {
                // What the engine refuses, as a full queue does, has no sequence that could end.
                metrics: self
                    .metrics
                    .begin_request(adapter.map(|name| &**name), job.prompt_tokens.len(), caller.began()),
                reservation: Arc::clone(reservation),
                permit: Arc::clone(permit),
                running,
            };
            let tokenizer = Arc::clone(text.tokenizer());
            streams.push(TextStream::new(tokens, tokenizer, job.text.clone(), held));
        }
        Ok(())
    }
}

/// A seed that nobody chose: different for every request and every process.
fn random_seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static START: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| uuid::Uuid::new_v4().as_u64_pair().0);
    mix(START.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// SplitMix64's output function (Steele, Lea and Flood, 2014): neighbouring inputs give unrelated outputs.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A new id: `prefix` and 32 hex digits.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", uuid::Uuid::new_v4().simple())
}
