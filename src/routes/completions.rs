//! `POST /v1/completions`.

use std::{sync::Arc, time::SystemTime};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use polylora_engine::{AdapterLease, LogprobsParams, PromptLogprobsParams, TokenLogprobs};

use super::{chat_completions::PRIORITY, with_adapter_header};
use crate::{
    app::{AppState, Caller, Gateway, unix_seconds},
    beside::beside_if,
    constraint::{GrammarSpec, form_of_answer},
    error::ApiError,
    extract::ApiJson,
    generation::{Grammar, Job, MaxTokens, SamplingFields, new_id},
    logprobs::CompletionLogprobsBuilder,
    prompt::encode_all,
    protocol::{
        OneOrMany, Prompts, StreamOptions, Usage,
        completions::{CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse},
    },
    routing::Target,
    sse::{AnswerWriter, SseEvents, sse_answer},
    stream::{Finish, MergedStream, TextEvent, TextOptions, TextStream, collect},
    text_side::TextSide,
    tokenizer::TextTokenizer,
};

/// Goes on with a text, or with each of several.
#[utoipa::path(
    post, path = "/v1/completions", tag = "OpenAI", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, events of the same form ended by `[DONE]`.",
            content((CompletionResponse = "application/json"), (CompletionResponse = "text/event-stream"))),
        crate::openapi::GenerationErrors,
    ),
)]
pub async fn completions(State(state): State<AppState>, caller: Caller, ApiJson(request): ApiJson<CompletionRequest>) -> Result<Response, ApiError> {
    refuse_unsupported(&request)?;
    let num_prompts = num_prompts(&state, &request)?;
    let targets = targets(&state, &caller, &request, num_prompts)?;
    let leases = state.leases(&caller, &targets).await?;
    let sides: Vec<TextSide> = leases.iter().map(|lease| state.text(lease.as_ref())).collect();
    let prompts = prompts(&caller, &request, &sides).await?;
    let streaming = request.stream.unwrap_or(false);
    let options = request.stream_options.clone().unwrap_or_default();
    let answer = Answer::new(&state, &request, &prompts, &sides, leases.first().and_then(Option::as_ref));
    let form = form_of_answer(
        request.response_format.as_ref(),
        request.json_schema.as_ref(),
        request.regex.as_ref(),
        request.ebnf.as_ref(),
    )?;
    let grammars = match form {
        Some((spec, param)) => compile_for(&sides, spec, param, state.limits.max_grammar_bytes).await?,
        None => vec![None; leases.len()],
    };
    let jobs = jobs(&state, &request, prompts, &leases, &answer.id, grammars)?;
    let streams = state.start(&caller, jobs)?;
    let response = if streaming {
        let mut merged = MergedStream::new(streams);
        merged.wait_for_first().await?;
        let events = SseEvents::default();
        sse_answer(merged, CompletionWriter { answer, options, events })
    } else {
        whole(answer, streams).await?
    };
    // One header can't name several adapters.
    let all_alike = leases
        .windows(2)
        .all(|pair| pair[0].as_ref().map(AdapterLease::name) == pair[1].as_ref().map(AdapterLease::name));
    Ok(with_adapter_header(
        response,
        leases.first().and_then(Option::as_ref).filter(|_| all_alike),
    ))
}

fn refuse_unsupported(request: &CompletionRequest) -> Result<(), ApiError> {
    let refuse = |given: bool, param, why| if given { Err(ApiError::unsupported(param, why)) } else { Ok(()) };
    let n = request.n.unwrap_or(1);
    refuse(
        request.best_of.is_some_and(|best_of| best_of != n),
        "best_of",
        "only the value of n is; choose among n choices yourself",
    )?;
    let suffix = request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty());
    refuse(suffix, "suffix", "the model writes onwards only")?;
    refuse(request.return_hidden_states == Some(true), "return_hidden_states", "only false is")?;
    refuse(request.priority.is_some_and(|priority| priority != 0), "priority", PRIORITY)?;
    let obfuscation = request.stream_options.as_ref().and_then(|options| options.include_obfuscation);
    refuse(obfuscation == Some(true), "stream_options.include_obfuscation", "chunks are not padded")?;
    if request.stream_options.is_some() && request.stream != Some(true) {
        return Err(ApiError::invalid("stream_options", "stream_options needs stream to be true"));
    }
    if request.max_tokens == Some(0) && request.echo != Some(true) {
        return Err(ApiError::invalid("max_tokens", "max_tokens must be at least 1 (0 only with echo), got 0"));
    }
    Ok(())
}

/// A prompt as text (wanted for `echo` only) and as token ids.
struct Prompt {
    echoed: String,
    tokens: Vec<u32>,
}

fn num_prompts(state: &Gateway, request: &CompletionRequest) -> Result<usize, ApiError> {
    let (num_prompts, has_empty) = match &request.prompt {
        Prompts::Text(_) => (1, false),
        Prompts::Texts(texts) => (texts.len(), false),
        Prompts::Ids(ids) => (1, ids.is_empty()),
        Prompts::ListsOfIds(lists) => (lists.len(), lists.iter().any(Vec::is_empty)),
    };
    check_count(state, num_prompts, "prompt")?;
    if has_empty { Err(empty_prompt()) } else { Ok(num_prompts) }
}

fn empty_prompt() -> ApiError {
    ApiError::invalid("prompt", "Prompt cannot be empty")
}

/// The prompts, each as its model reads it.
async fn prompts(caller: &Caller, request: &CompletionRequest, sides: &[TextSide]) -> Result<Vec<Prompt>, ApiError> {
    let echo = request.echo.unwrap_or(false);
    let (texts, ids) = match &request.prompt {
        Prompts::Text(text) => (std::slice::from_ref(text), &[][..]),
        Prompts::Texts(texts) => (&texts[..], &[][..]),
        Prompts::Ids(ids) => (&[][..], std::slice::from_ref(ids)),
        Prompts::ListsOfIds(lists) => (&[][..], &lists[..]),
    };
    let mut prompts = match texts {
        // Nearly always.
        [text] => vec![sides[0].prompt.encode(text.clone(), request.add_special_tokens.unwrap_or(true)).await?],
        _ => {
            let texts: Vec<_> = texts.iter().zip(sides).map(|(text, side)| (&*side.prompt, text.as_str())).collect();
            encode_all(&texts, request.add_special_tokens.unwrap_or(true)).await?
        }
    };
    let mut echoed: Vec<String> = if echo { texts.to_vec() } else { Vec::new() };
    prompts.extend_from_slice(ids);
    if echo {
        let texts = || {
            ids.iter()
                .zip(sides)
                .map(|(tokens, side)| side.tokenizer().decode(tokens, true))
                .collect()
        };
        let texts: Result<Vec<String>, _> = beside_if(caller.is_large, texts).await;
        echoed.extend(texts?);
    }
    echoed.resize(prompts.len(), String::new());
    let prompts: Vec<Prompt> = prompts
        .into_iter()
        .zip(echoed)
        .map(|(tokens, echoed)| Prompt { echoed, tokens })
        .collect();
    if prompts.iter().any(|prompt| prompt.tokens.is_empty()) {
        return Err(empty_prompt());
    }
    Ok(prompts)
}

/// One grammar for each side: the same for those that are the same.
async fn compile_for(sides: &[TextSide], spec: GrammarSpec, param: &str, max_bytes: usize) -> Result<Vec<Option<Arc<dyn Grammar>>>, ApiError> {
    let mut compiled: Vec<(&TextSide, Arc<dyn Grammar>)> = Vec::new();
    let mut grammars = Vec::with_capacity(sides.len());
    for side in sides {
        let known = compiled.iter().find(|(other, _)| Arc::ptr_eq(&other.grammars, &side.grammars));
        let grammar = match known {
            Some((_, grammar)) => Arc::clone(grammar),
            None => {
                let grammar = side.grammars.compile(spec.clone(), param, max_bytes).await?;
                compiled.push((side, Arc::clone(&grammar)));
                grammar
            }
        };
        grammars.push(Some(grammar));
    }
    Ok(grammars)
}

/// Bounds the prompts of one request.
pub(super) fn check_count(state: &Gateway, got: usize, param: &str) -> Result<(), ApiError> {
    let most = state.limits.max_prompts;
    match got {
        0 => Err(ApiError::invalid(param, "Prompt cannot be empty")),
        _ if got > most => Err(ApiError::invalid(param, format!("a request may have {most} prompts, got {got}"))),
        _ => Ok(()),
    }
}

fn targets(state: &Gateway, caller: &Caller, request: &CompletionRequest, num_prompts: usize) -> Result<Vec<Target>, ApiError> {
    let router = state.router(&caller.identity);
    let sticky_key = caller.sticky_key([request.user.as_deref(), None], &caller.request_id);
    let target = |name: Option<&str>| state.resolve(caller, router.target(&request.model, name)?, sticky_key);
    match &request.lora_path {
        Some(OneOrMany::Many(names)) => {
            if names.len() != num_prompts {
                let message = format!("lora_path has {} entries for {num_prompts} prompts", names.len());
                return Err(ApiError::invalid("lora_path", message));
            }
            names.iter().map(|name| target(name.as_deref())).collect()
        }
        one => {
            let name = match one {
                Some(OneOrMany::One(name)) => name.as_deref(),
                _ => None,
            };
            Ok(vec![target(name)?; num_prompts])
        }
    }
}

fn jobs(
    state: &Gateway,
    request: &CompletionRequest,
    prompts: Vec<Prompt>,
    leases: &[Option<AdapterLease>],
    id: &Arc<str>,
    grammars: Vec<Option<Arc<dyn Grammar>>>,
) -> Result<Vec<Job>, ApiError> {
    let fields = SamplingFields {
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        frequency_penalty: request.frequency_penalty,
        presence_penalty: request.presence_penalty,
        repetition_penalty: request.repetition_penalty,
        logit_bias: request.logit_bias.clone(),
        min_tokens: request.min_tokens,
        stop_token_ids: request.stop_token_ids.clone(),
        ignore_eos: request.ignore_eos,
        seed: request.seed,
    };
    let sampling = fields.resolve(state.text.prompt.sampling_defaults())?;
    if let Some(top) = request.logprobs.filter(|&top| top > state.limits.max_top_logprobs) {
        let message = format!("logprobs must be at most {}, got {top}", state.limits.max_top_logprobs);
        return Err(ApiError::invalid("logprobs", message));
    }
    let echo = request.echo.unwrap_or(false);
    let text = TextOptions {
        stop: request.stop.clone().map(OneOrMany::into_vec).unwrap_or_default(),
        keep_stop: request.no_stop_trim.or(request.include_stop_str_in_output).unwrap_or(false),
        skip_special_tokens: request.skip_special_tokens.unwrap_or(true),
        every_token: request.logprobs.is_some(),
        ..TextOptions::default()
    };
    let several = prompts.len() > 1;
    let base_rid = request.rid.as_deref().unwrap_or(id);
    let parts = prompts.into_iter().zip(leases).zip(grammars).enumerate();
    let jobs = parts.map(|(index, ((prompt, lease), grammar))| Job {
        prompt_tokens: prompt.tokens,
        lease: lease.clone(),
        sampling: sampling.clone(),
        max_tokens: request.max_tokens.map_or(MaxTokens::Default(16), MaxTokens::Exactly),
        n: request.n.unwrap_or(1),
        text: text.clone(),
        logprobs: LogprobsParams {
            output_top_k: request.logprobs,
            prompt: request.logprobs.filter(|_| echo).map(|top_k| PromptLogprobsParams { start: 0, top_k }),
        },
        grammar,
        rid: if several {
            format!("{base_rid}_{index}").into()
        } else {
            base_rid.into()
        },
    });
    Ok(jobs.collect())
}

/// What all parts of an answer have in common, and how far each choice is.
struct Answer {
    id: Arc<str>,
    created: u64,
    model: Arc<str>,
    system_fingerprint: Arc<str>,
    with_logprobs: bool,
    prompt_tokens: u32,
    choices: Vec<Choice>,
}

struct Choice {
    tokenizer: Arc<TextTokenizer>,
    /// The echo: its text, and its tokens if their log-probabilities are wanted.
    echoed: String,
    echoed_tokens: Vec<u32>,
    logprobs: CompletionLogprobsBuilder,
    output_tokens: u32,
    cached_tokens: u32,
}

impl Answer {
    fn new(state: &Gateway, request: &CompletionRequest, prompts: &[Prompt], sides: &[TextSide], lease: Option<&AdapterLease>) -> Self {
        let with_logprobs = request.logprobs.is_some();
        let echo = request.echo.unwrap_or(false);
        let n = request.n.unwrap_or(1) as usize;
        // A wild `n` is refused before anything starts.
        let choices = prompts
            .iter()
            .zip(sides)
            .flat_map(|pair| std::iter::repeat_n(pair, n.min(state.limits.max_n as usize)));
        Self {
            id: new_id("cmpl-").into(),
            created: unix_seconds(SystemTime::now()),
            model: request.model.as_str().into(),
            system_fingerprint: format!("fp_{}", state.weight_version(lease)).into(),
            with_logprobs,
            prompt_tokens: prompts.iter().map(|prompt| prompt.tokens.len() as u32).sum(),
            choices: choices
                .map(|(prompt, side)| Choice {
                    tokenizer: Arc::clone(side.tokenizer()),
                    echoed: prompt.echoed.clone(),
                    echoed_tokens: if echo && with_logprobs { prompt.tokens.clone() } else { Vec::new() },
                    logprobs: CompletionLogprobsBuilder::default(),
                    output_tokens: 0,
                    cached_tokens: 0,
                })
                .collect(),
        }
    }

    fn response(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> CompletionResponse {
        CompletionResponse {
            id: Arc::clone(&self.id),
            object: "text_completion".into(),
            created: self.created,
            model: Arc::clone(&self.model),
            system_fingerprint: Arc::clone(&self.system_fingerprint),
            choices,
            usage,
        }
    }

    fn usage(&self) -> Usage {
        let output_tokens = self.choices.iter().map(|choice| choice.output_tokens).sum();
        let cached_tokens = self.choices.iter().map(|choice| choice.cached_tokens).sum::<u32>();
        Usage::new(self.prompt_tokens, output_tokens, cached_tokens.min(self.prompt_tokens), 0)
    }

    /// The echo, once the prompt is computed.
    fn started(&mut self, index: usize, cached: u32, reported: &[TokenLogprobs]) -> (String, Option<CompletionLogprobs>) {
        let choice = &mut self.choices[index];
        choice.cached_tokens = cached;
        let tokens = std::mem::take(&mut choice.echoed_tokens);
        let logprobs = self.with_logprobs.then(|| choice.logprobs.prompt(&choice.tokenizer, &tokens, reported));
        (std::mem::take(&mut choice.echoed), logprobs)
    }

    fn chunk(&mut self, index: usize, tokens: &[crate::stream::OutputToken]) -> Option<CompletionLogprobs> {
        let choice = &mut self.choices[index];
        choice.output_tokens += tokens.len() as u32;
        self.with_logprobs.then(|| choice.logprobs.output(&choice.tokenizer, tokens))
    }
}

fn append(logprobs: &mut Option<CompletionLogprobs>, more: Option<CompletionLogprobs>) {
    let (Some(all), Some(more)) = (logprobs.as_mut(), more) else { return };
    all.text_offset.extend(more.text_offset);
    all.token_logprobs.extend(more.token_logprobs);
    all.tokens.extend(more.tokens);
    if let Some(top) = more.top_logprobs {
        all.top_logprobs.get_or_insert_default().extend(top);
    }
}

async fn whole(mut answer: Answer, streams: Vec<TextStream>) -> Result<Response, ApiError> {
    let mut choices = Vec::new();
    for (index, output) in collect(streams).await?.into_iter().enumerate() {
        let (mut text, mut logprobs) = answer.started(index, output.cached_tokens, &output.prompt_logprobs);
        text.push_str(&output.text());
        append(&mut logprobs, answer.chunk(index, &output.tokens));
        let finish = output.finish.unwrap_or(Finish::Aborted);
        choices.push(CompletionChoice {
            index: index as u32,
            text,
            logprobs,
            finish_reason: Some(finish.reason().ok_or_else(|| finish.error())?.into()),
            matched_stop: finish.matched(),
        });
    }
    let usage = answer.usage();
    Ok(Json(answer.response(choices, Some(usage))).into_response())
}

/// Chunks of a streamed answer.
struct CompletionWriter {
    answer: Answer,
    options: StreamOptions,
    events: SseEvents,
}

impl CompletionWriter {
    fn push_new(&mut self, index: usize, text: String, logprobs: Option<CompletionLogprobs>) {
        let has_tokens = logprobs.as_ref().is_some_and(|logprobs| !logprobs.tokens.is_empty());
        if !text.is_empty() || has_tokens {
            self.push(index, text, logprobs, None);
        }
    }

    fn push(&mut self, index: usize, text: String, logprobs: Option<CompletionLogprobs>, finish: Option<&Finish>) {
        let choice = CompletionChoice {
            index: index as u32,
            text,
            logprobs,
            finish_reason: finish.and_then(Finish::reason).map(Into::into),
            matched_stop: finish.and_then(Finish::matched),
        };
        let usage = (self.options.continuous_usage_stats == Some(true)).then(|| self.answer.usage());
        self.events.push(&self.answer.response(vec![choice], usage));
    }

    /// The status is spent: the error goes out as an event, and nothing after it. The other choices are cancelled.
    fn fail(&mut self, error: &ApiError) {
        self.events.push(&error.body());
        self.events.close();
    }
}

impl AnswerWriter for CompletionWriter {
    fn events(&mut self) -> &mut SseEvents {
        &mut self.events
    }

    fn event(&mut self, index: usize, event: TextEvent) {
        match event {
            TextEvent::Started {
                cached_tokens,
                prompt_logprobs,
            } => {
                let (text, logprobs) = self.answer.started(index, cached_tokens, &prompt_logprobs);
                self.push_new(index, text, logprobs);
            }
            TextEvent::Chunk { text, tokens } => {
                let logprobs = self.answer.chunk(index, &tokens);
                self.push_new(index, text, logprobs);
            }
            TextEvent::Finished(finish) if finish.reason().is_some() => self.push(index, String::new(), None, Some(&finish)),
            TextEvent::Finished(finish) => self.fail(&finish.error()),
            TextEvent::Failed(error) => self.fail(&error.into()),
        }
    }

    fn end(&mut self) {
        if self.options.include_usage == Some(true) {
            let usage = self.answer.usage();
            self.events.push(&self.answer.response(Vec::new(), Some(usage)));
        }
        self.events.done();
    }
}
