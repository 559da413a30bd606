//! `POST /generate`: SGLang's native route. One call may hold many prompts, each on an adapter of its own.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use polylora_engine::{AdapterLease, LogprobsParams, PromptLogprobsParams, TokenLogprobs};

use super::{completions::check_count, with_adapter_header};
use crate::{
    app::{AppState, Caller, Gateway},
    beside::beside_if,
    constraint::form_of_answer,
    error::{ApiError, NativeError, shown},
    extract::NativeJson,
    generation::{Grammar, Job, MaxTokens, SamplingFields, new_id},
    logprobs::{top_triples, triple},
    prompt::{SamplingDefaults, encode_all},
    protocol::{
        OneOrMany,
        generate::{GenerateRequest, GenerateResponse, GenerateResponses, InputIds, MetaInfo, NativeFinishReason, NativeSamplingParams},
    },
    routing::Target,
    sse::{AnswerWriter, SseEvents, sse_answer, sse_response},
    stream::{Finish, MergedStream, OutputToken, TextEvent, TextOptions, TextStream, collect},
    text_side::TextSide,
    tokenizer::TextTokenizer,
};

/// Generates.
#[utoipa::path(
    post, path = "/generate", tag = "Native", request_body = GenerateRequest,
    responses(
        (status = 200, description = "An output, or a list of them for a batch or `n` > 1; with `stream`, events with the text so far, ended by `[DONE]`.",
            content((GenerateResponses = "application/json"), (GenerateResponse = "text/event-stream"))),
        crate::openapi::NativeGenerationErrors,
    ),
)]
pub async fn generate(
    State(state): State<AppState>,
    caller: Caller,
    NativeJson(request): NativeJson<GenerateRequest>,
) -> Result<Response, NativeError> {
    refuse_unsupported(&state, &request)?;
    let streaming = request.stream.unwrap_or(false);
    let mut batch = beside_if(caller.is_large, || Batch::read(&state, request)).await?;
    let leases = leases(&state, &caller, &batch.prompts).await?;
    batch.encode(&state, &leases).await?;
    let outputs = batch.outputs(&state, &caller, &leases);
    let (is_list, prompt_param, jobs) = (batch.is_list(), batch.param, batch.jobs(&leases)?);
    let streams = state.start(&caller, jobs).map_err(|error| native_names(error, prompt_param))?;
    let response = if streaming {
        let mut merged = MergedStream::new(streams);
        match merged.wait_for_first().await {
            Ok(()) => {}
            // Natively an abort is an outcome, not an error; there is just nothing before it.
            Err(error) if error.status().as_u16() == 499 => return Ok(sse_response(aborted(&outputs, is_list).into())),
            Err(error) => return Err(error.rename_param("model", "lora_path").into()),
        }
        let events = SseEvents::default();
        sse_answer(merged, GenerateWriter { outputs, is_list, events })
    } else {
        whole(outputs, is_list, streams).await?
    };
    let all_alike = leases
        .windows(2)
        .all(|pair| pair[0].as_ref().map(AdapterLease::name) == pair[1].as_ref().map(AdapterLease::name));
    Ok(with_adapter_header(
        response,
        leases.first().and_then(Option::as_ref).filter(|_| all_alike),
    ))
}

fn refuse_unsupported(state: &Gateway, request: &GenerateRequest) -> Result<(), ApiError> {
    for (given, param) in [
        (request.return_hidden_states, "return_hidden_states"),
        (request.background, "background"),
        (request.return_bytes, "return_bytes"),
        (request.return_entropy, "return_entropy"),
    ] {
        if given == Some(true) {
            return Err(ApiError::unsupported(param, "only false is"));
        }
    }
    match &request.model {
        Some(model) if !state.served.names.contains(model) => Err(ApiError::unsupported(
            "model",
            "only the base model's name is; adapters are named by `lora_path`",
        )),
        _ => Ok(()),
    }
}

/// `PUT /generate`: the same.
#[utoipa::path(
    put, path = "/generate", tag = "Native", request_body = GenerateRequest,
    responses(
        (status = 200, description = "An output, or a list of them for a batch or `n` > 1; with `stream`, events with the text so far, ended by `[DONE]`.",
            content((GenerateResponses = "application/json"), (GenerateResponse = "text/event-stream"))),
        crate::openapi::NativeGenerationErrors,
    ),
)]
pub async fn put_generate(state: State<AppState>, caller: Caller, request: NativeJson<GenerateRequest>) -> Result<Response, NativeError> {
    generate(state, caller, request).await
}

/// The adapters of the prompts, by their names. An unknown one is a 404, as everywhere, in SGLang's words.
async fn leases(state: &Gateway, caller: &Caller, prompts: &[PromptPart]) -> Result<Vec<Option<AdapterLease>>, ApiError> {
    let router = state.router(&caller.identity);
    let target = |name: &str| match router.adapter(name, "lora_path") {
        Err(error) if error.status() == axum::http::StatusCode::NOT_FOUND => Err(never_loaded(state, caller, name)),
        result => result,
    };
    let resolved = |prompt: &PromptPart| match prompt.adapter.as_deref() {
        None => state.resolve(caller, Target::Base, ""),
        // This route has no `user`: without a key an alias sticks to the prompt's `rid`.
        Some(name) => state.resolve(caller, target(name)?, caller.sticky_key([None, None], &prompt.rid)),
    };
    let targets = prompts.iter().map(resolved).collect::<Result<Vec<_>, _>>()?;
    let leased = state.leases(caller, &targets).await;
    leased.map_err(|error| error.rename_param("model", "lora_path")).map_err(|error| {
        // One of them was unloaded in between.
        let gone = prompts
            .iter()
            .filter_map(|prompt| prompt.adapter.as_deref())
            .find_map(|name| target(name).err());
        gone.filter(|_| error.status() == axum::http::StatusCode::NOT_FOUND).unwrap_or(error)
    })
}

fn never_loaded(state: &Gateway, caller: &Caller, name: &str) -> ApiError {
    let router = state.router(&caller.identity);
    let (mut loaded, are_all) = router.some_adapters();
    if !are_all {
        loaded.push("and more".into());
    }
    let part = router.missing_part(name);
    let message = format!(
        "Got LoRA adapter that has never been loaded: {}\nAll loaded adapters: {}",
        shown(part.unwrap_or(name)),
        loaded.join(", ")
    );
    ApiError::model_not_found(name, part, "lora_path", &[], true).with_message(|_| message)
}

/// The engine's names of settings as this route has them.
fn native_names(error: ApiError, prompt: &'static str) -> ApiError {
    let native = match error.param() {
        Some("prompt") => prompt,
        Some("max_tokens") => "sampling_params.max_new_tokens",
        Some("min_tokens") => "sampling_params.min_new_tokens",
        Some(
            name @ ("temperature" | "top_p" | "top_k" | "min_p" | "frequency_penalty" | "presence_penalty" | "repetition_penalty" | "logit_bias"
            | "stop" | "stop_token_ids" | "n" | "json_schema" | "regex" | "ebnf"),
        ) => {
            return {
                let param = format!("sampling_params.{name}");
                error.for_param(param)
            };
        }
        _ => return error,
    };
    error
        .with_message(|message| message.replace("min_tokens", "min_new_tokens").replace("max_tokens", "max_new_tokens"))
        .for_param(native)
}

/// The prompts of a request, with lists as long as the batch.
struct Batch {
    prompts: Vec<PromptPart>,
    /// The field that they came in.
    param: &'static str,
    is_batch: bool,
    n: u32,
    return_text: bool,
    return_prompt_token_ids: bool,
}

struct PromptPart {
    /// What is to be tokenized, until it is.
    text: Option<String>,
    tokens: Vec<u32>,
    adapter: Option<String>,
    rid: Arc<str>,
    sampling: NativeSamplingParams,
    /// `logprob_start_len` and `top_logprobs_num`, if log-probabilities are wanted.
    wanted_logprobs: Option<(i64, u32)>,
    /// First prompt token reported, and how many likeliest tokens; `None` for no log-probabilities.
    logprobs: Option<(Option<u32>, u32)>,
    grammar: Option<Arc<dyn Grammar>>,
    side: TextSide,
}

impl Batch {
    fn read(state: &Gateway, request: GenerateRequest) -> Result<Self, ApiError> {
        let (given, is_batch, param) = given_prompts(state, request.text, request.input_ids)?;
        let len = given.len();
        let sampling = spread(request.sampling_params, "sampling_params", len, is_batch)?;
        let adapters = spread(request.lora_path, "lora_path", len, is_batch)?;
        let wanted = spread(request.return_logprob, "return_logprob", len, is_batch)?;
        let starts = spread(request.logprob_start_len, "logprob_start_len", len, is_batch)?;
        let tops = spread(request.top_logprobs_num, "top_logprobs_num", len, is_batch)?;
        let rids = rids(request.rid, len, is_batch)?;
        let n = sampling[0].as_ref().and_then(|sampling| sampling.n).unwrap_or(1);
        let mut prompts = Vec::with_capacity(len);
        let parts = given.into_iter().zip(adapters).zip(rids).zip(sampling).zip(wanted).zip(starts).zip(tops);
        for (((((((text, tokens), adapter), rid), sampling), wanted), start), top) in parts {
            let sampling = sampling.unwrap_or_default();
            if sampling.n.unwrap_or(1) != n {
                return Err(ApiError::invalid("sampling_params.n", "n must be equal for all prompts"));
            }
            prompts.push(PromptPart {
                grammar: None,
                side: state.text.clone(),
                wanted_logprobs: wanted.unwrap_or(false).then(|| (start.unwrap_or(-1), top.unwrap_or(0))),
                logprobs: None,
                text,
                tokens,
                // SGLang takes an empty name for the base model.
                adapter: adapter.flatten().filter(|name| !name.is_empty()),
                rid,
                sampling,
            });
        }
        Ok(Self {
            prompts,
            param,
            is_batch,
            n,
            return_text: request.return_text_in_logprobs.unwrap_or(false),
            return_prompt_token_ids: request.return_prompt_token_ids.unwrap_or(false),
        })
    }

    /// Makes tokens of the texts and constraints of the grammars, each as its model reads it.
    async fn encode(&mut self, state: &Gateway, leases: &[Option<AdapterLease>]) -> Result<(), ApiError> {
        let mut texts = Vec::new();
        let mut places = Vec::new();
        for (place, (prompt, lease)) in self.prompts.iter_mut().zip(leases).enumerate() {
            prompt.side = state.text(lease.as_ref());
            if let Some(text) = prompt.text.take() {
                texts.push((Arc::clone(&prompt.side.prompt), text));
                places.push(place);
            }
        }
        let texts: Vec<_> = texts.iter().map(|(prompt, text)| (&**prompt, text.as_str())).collect();
        for (place, tokens) in places.into_iter().zip(encode_all(&texts, true).await?) {
            self.prompts[place].tokens = tokens;
        }
        for prompt in &mut self.prompts {
            if prompt.tokens.is_empty() {
                return Err(ApiError::invalid(self.param, "Prompt cannot be empty"));
            }
            prompt.logprobs = logprobs(state, &prompt.tokens, prompt.wanted_logprobs)?;
            let compiled = grammar(state, &prompt.side, &prompt.sampling).await;
            prompt.grammar = compiled.map_err(|error| native_names(error, self.param))?;
        }
        Ok(())
    }

    /// Whether the answer is a list.
    fn is_list(&self) -> bool {
        self.is_batch || self.n > 1
    }

    fn outputs(&self, state: &Gateway, caller: &Caller, leases: &[Option<AdapterLease>]) -> Vec<Output> {
        let n = self.n.min(state.limits.max_n) as usize;
        let prompts = self.prompts.iter().zip(leases);
        let outputs = prompts.flat_map(|pair| std::iter::repeat_n(pair, n));
        outputs
            .map(|(prompt, lease)| Output {
                rid: Arc::clone(&prompt.rid),
                tokenizer: Arc::clone(prompt.side.tokenizer()),
                prompt_tokens: prompt.tokens.clone(),
                lora: lease.as_ref().map(|lease| lease.name().to_string()),
                weight_version: state.weight_version(lease.as_ref()),
                logprobs: prompt.logprobs,
                return_text: self.return_text,
                return_prompt_token_ids: self.return_prompt_token_ids,
                arrived: caller.arrived,
                text: String::new(),
                tokens: Vec::new(),
                cached_tokens: 0,
                prompt_logprobs: Vec::new(),
            })
            .collect()
    }

    fn jobs(self, leases: &[Option<AdapterLease>]) -> Result<Vec<Job>, ApiError> {
        let n = self.n;
        let jobs = self.prompts.into_iter().zip(leases).map(|(prompt, lease)| job(prompt, lease.clone(), n));
        let param = self.param;
        jobs.collect::<Result<_, _>>().map_err(|error| native_names(error, param))
    }
}

/// A text, or token ids.
type Given = (Option<String>, Vec<u32>);

fn given_prompts(
    state: &Gateway,
    text: Option<OneOrMany<String>>,
    input_ids: Option<InputIds>,
) -> Result<(Vec<Given>, bool, &'static str), ApiError> {
    let ids = |ids: Vec<u32>| (None, ids);
    let (given, is_batch, param): (Vec<Given>, _, _) = match (text, input_ids) {
        (Some(_), Some(_)) => return Err(ApiError::invalid("input_ids", "Give exactly one of text and input_ids, not both.")),
        (None, None) => return Err(ApiError::invalid("text", "Give exactly one of text and input_ids.")),
        (Some(text), None) => {
            let is_batch = matches!(text, OneOrMany::Many(_));
            let texts = text.into_vec().into_iter();
            (texts.map(|text| (Some(text), Vec::new())).collect(), is_batch, "text")
        }
        (None, Some(InputIds::One(one))) => (vec![ids(one)], false, "input_ids"),
        (None, Some(InputIds::Many(lists))) => (lists.into_iter().map(ids).collect(), true, "input_ids"),
    };
    check_count(state, given.len(), param)?;
    if given.iter().any(|(text, tokens)| text.is_none() && tokens.is_empty()) {
        return Err(ApiError::invalid(param, "Prompt cannot be empty"));
    }
    Ok((given, is_batch, param))
}

/// One value for all prompts, or one for each.
fn spread<T: Clone>(value: Option<OneOrMany<T>>, param: &str, len: usize, is_batch: bool) -> Result<Vec<Option<T>>, ApiError> {
    match value {
        None => Ok(vec![None; len]),
        Some(OneOrMany::One(value)) => Ok(vec![Some(value); len]),
        Some(OneOrMany::Many(_)) if !is_batch => {
            let message = format!("{param} is a list, but there is a single prompt");
            Err(ApiError::invalid(param, message))
        }
        Some(OneOrMany::Many(values)) if values.len() != len => {
            let message = format!("{param} list length ({}) must match batch size ({len})", values.len());
            Err(ApiError::invalid(param, message))
        }
        Some(OneOrMany::Many(values)) => Ok(values.into_iter().map(Some).collect()),
    }
}

fn rids(rid: Option<OneOrMany<String>>, len: usize, is_batch: bool) -> Result<Vec<Arc<str>>, ApiError> {
    // An empty id is no id: nobody could abort by it.
    let rid = rid.filter(|rid| !matches!(rid, OneOrMany::One(rid) if rid.is_empty()));
    let parts = |rid: &str| (0..len).map(|index| format!("{rid}_{index}").into()).collect();
    match rid {
        None if is_batch => Ok(parts(&new_id(""))),
        None => Ok(vec![new_id("").into()]),
        Some(OneOrMany::One(rid)) if is_batch => Ok(parts(&rid)),
        Some(OneOrMany::One(rid)) => Ok(vec![rid.into()]),
        many => {
            let rids = spread(many, "rid", len, is_batch)?;
            let rids: Vec<Arc<str>> = rids.into_iter().flatten().map(Arc::from).collect();
            let distinct: std::collections::BTreeSet<&Arc<str>> = rids.iter().collect();
            if distinct.len() < rids.len() {
                return Err(ApiError::invalid("rid", "the ids of a batch must differ"));
            }
            Ok(rids)
        }
    }
}

async fn grammar(state: &Gateway, side: &TextSide, params: &NativeSamplingParams) -> Result<Option<Arc<dyn Grammar>>, ApiError> {
    match form_of_answer(None, params.json_schema.as_ref(), params.regex.as_ref(), params.ebnf.as_ref())? {
        Some((spec, param)) => side.grammars.compile(spec, param, state.limits.max_grammar_bytes).await.map(Some),
        None => Ok(None),
    }
}

fn logprobs(state: &Gateway, prompt: &[u32], wanted: Option<(i64, u32)>) -> Result<Option<(Option<u32>, u32)>, ApiError> {
    let Some((start, top)) = wanted else { return Ok(None) };
    if top > state.limits.max_top_logprobs {
        let message = format!("top_logprobs_num must be at most {}, got {top}", state.limits.max_top_logprobs);
        return Err(ApiError::invalid("top_logprobs_num", message));
    }
    match start {
        -1 => Ok(Some((None, top))),
        start if start >= 0 && start < prompt.len() as i64 => Ok(Some((Some(start as u32), top))),
        start => {
            let message = format!(
                "logprob_start_len must be -1, or at least 0 and less than the prompt's {} tokens, got {start}",
                prompt.len()
            );
            Err(ApiError::invalid("logprob_start_len", message))
        }
    }
}

fn job(prompt: PromptPart, lease: Option<AdapterLease>, n: u32) -> Result<Job, ApiError> {
    let params = prompt.sampling;
    if params.spaces_between_special_tokens == Some(false) {
        return Err(ApiError::unsupported("spaces_between_special_tokens", "only true is"));
    }
    let fields = SamplingFields {
        temperature: params.temperature,
        top_p: params.top_p,
        top_k: params.top_k,
        min_p: params.min_p,
        frequency_penalty: params.frequency_penalty,
        presence_penalty: params.presence_penalty,
        repetition_penalty: params.repetition_penalty,
        logit_bias: params.logit_bias,
        min_tokens: params.min_new_tokens,
        stop_token_ids: params.stop_token_ids,
        ignore_eos: params.ignore_eos,
        seed: params.sampling_seed,
    };
    Ok(Job {
        prompt_tokens: prompt.tokens,
        lease,
        // As in SGLang, a model's recommendation counts on the OpenAI routes only.
        sampling: fields.resolve(&SamplingDefaults::default())?,
        max_tokens: match params.max_new_tokens {
            None => MaxTokens::Default(128),
            Some(None) => MaxTokens::Room,
            Some(Some(tokens)) => MaxTokens::Exactly(tokens),
        },
        n,
        text: TextOptions {
            stop: params.stop.map(OneOrMany::into_vec).unwrap_or_default(),
            keep_stop: params.no_stop_trim.unwrap_or(false),
            skip_special_tokens: params.skip_special_tokens.unwrap_or(true),
            // Output ids are part of every event.
            every_token: true,
            ..TextOptions::default()
        },
        logprobs: LogprobsParams {
            output_top_k: prompt.logprobs.map(|(_, top)| top),
            prompt: prompt
                .logprobs
                .and_then(|(start, top_k)| start.map(|start| PromptLogprobsParams { start, top_k })),
        },
        grammar: prompt.grammar,
        rid: prompt.rid,
    })
}

/// One output, as far as it is.
struct Output {
    rid: Arc<str>,
    tokenizer: Arc<TextTokenizer>,
    prompt_tokens: Vec<u32>,
    lora: Option<String>,
    weight_version: String,
    logprobs: Option<(Option<u32>, u32)>,
    return_text: bool,
    return_prompt_token_ids: bool,
    arrived: std::time::Instant,
    text: String,
    tokens: Vec<OutputToken>,
    cached_tokens: u32,
    prompt_logprobs: Vec<TokenLogprobs>,
}

impl Output {
    fn response(&self, with_logprobs: bool, index: Option<u32>, finish: Option<&Finish>) -> GenerateResponse {
        let mut meta_info = MetaInfo {
            id: self.rid.to_string(),
            finish_reason: finish.map(|finish| match finish {
                Finish::Length => NativeFinishReason::Length {
                    length: self.tokens.len() as u32,
                },
                Finish::Aborted => NativeFinishReason::Abort {
                    message: "Aborted by request.".to_owned(),
                },
                Finish::AdapterUnloaded => NativeFinishReason::Abort {
                    message: "The adapter was unloaded.".to_owned(),
                },
                stop => NativeFinishReason::Stop { matched: stop.matched() },
            }),
            prompt_tokens: self.prompt_tokens.len() as u32,
            completion_tokens: self.tokens.len() as u32,
            cached_tokens: self.cached_tokens,
            e2e_latency: self.arrived.elapsed().as_secs_f64(),
            lora: self.lora.clone(),
            weight_version: self.weight_version.clone(),
            input_token_logprobs: None,
            output_token_logprobs: None,
            input_top_logprobs: None,
            output_top_logprobs: None,
        };
        if let Some((start, top)) = self.logprobs.filter(|_| with_logprobs) {
            self.write_logprobs(&mut meta_info, start, top);
        }
        GenerateResponse {
            index,
            text: self.text.clone(),
            output_ids: self.tokens.iter().map(|token| token.id).collect(),
            prompt_token_ids: self.return_prompt_token_ids.then(|| self.prompt_tokens.clone()),
            meta_info,
        }
    }

    fn write_logprobs(&self, meta_info: &mut MetaInfo, start: Option<u32>, top: u32) {
        let tokenizer = &*self.tokenizer;
        let known = |token: &OutputToken| token.logprobs.clone().unwrap_or_default();
        let output = self
            .tokens
            .iter()
            .map(|token| triple(tokenizer, token.id, Some(known(token).logprob), self.return_text));
        meta_info.output_token_logprobs = Some(output.collect());
        // The first prompt token follows nothing: it has no log-probability.
        let first = start.map_or(self.prompt_tokens.len(), |start| start as usize);
        let unknown = usize::from(first == 0);
        let reported = |position: usize| position.checked_sub(first + unknown).and_then(|index| self.prompt_logprobs.get(index));
        let positions = first..self.prompt_tokens.len();
        let input = positions.clone().map(|position| {
            let logprob = reported(position).map(|reported| reported.logprob);
            triple(tokenizer, self.prompt_tokens[position], logprob, self.return_text)
        });
        meta_info.input_token_logprobs = Some(input.collect());
        if top > 0 {
            let output = self
                .tokens
                .iter()
                .map(|token| Some(top_triples(tokenizer, &known(token), self.return_text)));
            meta_info.output_top_logprobs = Some(output.collect());
            let input = positions.map(|position| reported(position).map(|reported| top_triples(tokenizer, reported, self.return_text)));
            meta_info.input_top_logprobs = Some(input.collect());
        }
    }
}

async fn whole(outputs: Vec<Output>, is_list: bool, streams: Vec<TextStream>) -> Result<Response, ApiError> {
    let completed = collect(streams)
        .await
        .map_err(|error| ApiError::from(error).rename_param("model", "lora_path"))?;
    let mut responses = outputs.into_iter().zip(completed).map(|(output, completed)| {
        let text = completed.text();
        let finish = completed.finish.unwrap_or(Finish::Aborted);
        let output = Output {
            text,
            tokens: completed.tokens,
            cached_tokens: completed.cached_tokens,
            prompt_logprobs: completed.prompt_logprobs,
            ..output
        };
        output.response(true, None, Some(&finish))
    });
    if is_list {
        return Ok(Json(responses.collect::<Vec<_>>()).into_response());
    }
    let one = responses.next().ok_or_else(ApiError::internal)?;
    Ok(Json(one).into_response())
}

fn aborted(outputs: &[Output], is_list: bool) -> Bytes {
    let mut events = SseEvents::default();
    for (index, output) in outputs.iter().enumerate() {
        let index = is_list.then_some(index as u32);
        events.push(&output.response(false, index, Some(&Finish::Aborted)));
    }
    events.done();
    events.take()
}

/// Events of a streamed answer, each with all of its output so far.
struct GenerateWriter {
    outputs: Vec<Output>,
    is_list: bool,
    events: SseEvents,
}

impl AnswerWriter for GenerateWriter {
    fn events(&mut self) -> &mut SseEvents {
        &mut self.events
    }

    fn event(&mut self, index: usize, event: TextEvent) {
        let output = &mut self.outputs[index];
        let finish = match event {
            TextEvent::Started {
                cached_tokens,
                prompt_logprobs,
            } => {
                output.cached_tokens = cached_tokens;
                output.prompt_logprobs = prompt_logprobs;
                return;
            }
            TextEvent::Chunk { text, tokens } => {
                output.text.push_str(&text);
                output.tokens.extend(tokens);
                None
            }
            TextEvent::Finished(finish) => Some(finish),
            TextEvent::Failed(error) => {
                // The status is spent: the error goes out as an event, and the stream ends.
                self.events.push(&ApiError::from(error).native_body());
                return self.events.done();
            }
        };
        let wire_index = self.is_list.then_some(index as u32);
        self.events.push(&output.response(true, wire_index, finish.as_ref()));
    }

    fn end(&mut self) {
        self.events.done();
    }
}
