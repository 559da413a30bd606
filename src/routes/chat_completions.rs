//! `POST /v1/chat/completions`.

use std::{collections::VecDeque, sync::Arc, time::SystemTime};

use axum::{Json, extract::State, response::IntoResponse, response::Response};
use bytes::Bytes;
use futures::Stream;
use polylora_engine::{AdapterLease, LogprobsParams};

use super::with_adapter_header;
use crate::{
    app::{AppState, Caller, Gateway, unix_seconds},
    chat_template::ChatInput,
    conversation::template_messages,
    error::ApiError,
    extract::ApiJson,
    generation::{Job, MaxTokens, SamplingFields, new_id},
    logprobs::chat_logprobs,
    protocol::{
        StreamOptions, Usage,
        chat::{ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, ChatRequest, ChatResponse, ResponseFormat, ResponseMessage, Role},
    },
    stream::{Completed, DONE, Finish, MergedStream, TextEvent, TextOptions, TextStream, collect, sse_event, sse_response},
};

/// Answers a conversation.
pub async fn chat_completions(State(state): State<AppState>, caller: Caller, ApiJson(request): ApiJson<ChatRequest>) -> Result<Response, ApiError> {
    refuse_unsupported(&request)?;
    let target = state.router(&caller.identity).target(&request.model, request.lora_path.as_deref())?;
    let prompt_tokens = prompt_tokens(&state, &request).await?;
    let lease = state.lease(&caller, &target).await?;
    let envelope = Envelope::new(&state, &request, lease.as_ref(), prompt_tokens.len());
    let streaming = request.stream.unwrap_or(false);
    let options = request.stream_options.clone().unwrap_or_default();
    let job = job(&state, request, prompt_tokens, lease.clone(), &envelope)?;
    let streams = state.start(&caller, vec![job])?;
    let response = if streaming {
        let mut merged = MergedStream::new(streams);
        merged.wait_for_first().await?;
        sse_response(events(ChatStream::new(state, envelope, merged, options)))
    } else {
        whole(&state, &envelope, streams).await?
    };
    Ok(with_adapter_header(response, lease.as_ref()))
}

/// What is known but can't be honoured. Values that ask for what happens anyway pass.
fn refuse_unsupported(request: &ChatRequest) -> Result<(), ApiError> {
    let refuse = |given: bool, param, why| if given { Err(ApiError::unsupported(param, why)) } else { Ok(()) };
    let not_text = request
        .modalities
        .as_ref()
        .is_some_and(|modalities| modalities.iter().any(|modality| modality != "text"));
    refuse(not_text, "modalities", "the model writes text only")?;
    refuse(request.audio.is_some(), "audio", "the model writes text only")?;
    refuse(request.web_search_options.is_some(), "web_search_options", "there is no search here")?;
    refuse(request.functions.is_some(), "functions", "use `tools`")?;
    refuse(request.function_call.is_some(), "function_call", "use `tool_choice`")?;
    refuse(request.store == Some(true), "store", "nothing is stored")?;
    let verbosity = request.verbosity.as_ref().is_some_and(|verbosity| verbosity != "medium");
    refuse(verbosity, "verbosity", "the model has no such setting; ask for it in a message")?;
    let obfuscation = request.stream_options.as_ref().and_then(|options| options.include_obfuscation);
    refuse(obfuscation == Some(true), "stream_options.include_obfuscation", "chunks are not padded")?;
    let formatted = request.response_format.as_ref().is_some_and(|format| *format != ResponseFormat::Text {});
    refuse(formatted, "response_format", "only text is")?;
    refuse(request.regex.is_some(), "regex", "grammars are not built in yet")?;
    refuse(request.ebnf.is_some(), "ebnf", "grammars are not built in yet")?;
    refuse(
        request.tools.is_some() || request.tool_choice.is_some(),
        "tools",
        "tools are not built in yet",
    )?;
    if request.stream_options.is_some() && request.stream != Some(true) {
        return Err(ApiError::invalid("stream_options", "stream_options needs stream to be true"));
    }
    if request.top_logprobs.is_some_and(|top| top > 0) && request.logprobs != Some(true) {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    if request.max_tokens == Some(0) || request.max_completion_tokens == Some(0) {
        return Err(ApiError::invalid(
            "max_completion_tokens",
            "max_completion_tokens must be at least 1, got 0",
        ));
    }
    Ok(())
}

async fn prompt_tokens(state: &Gateway, request: &ChatRequest) -> Result<Vec<u32>, ApiError> {
    let messages = template_messages(&request.messages, state.prompt.templates())?;
    let continues = request.continue_final_message.unwrap_or(false);
    if continues && request.add_generation_prompt == Some(true) {
        return Err(ApiError::invalid(
            "continue_final_message",
            "continue_final_message and add_generation_prompt can't both be true",
        ));
    }
    if continues && request.messages.last().is_some_and(|message| message.role != Role::Assistant) {
        return Err(ApiError::invalid("continue_final_message", "the last message must be the assistant's"));
    }
    let mut kwargs = request.chat_template_kwargs.clone().unwrap_or_default();
    if let Some(effort) = &request.reasoning_effort {
        kwargs.insert("reasoning_effort".to_owned(), effort.as_str().into());
    }
    let text = state.prompt.render_chat(&ChatInput {
        messages: &messages,
        tools: None,
        add_generation_prompt: request.add_generation_prompt.unwrap_or(!continues),
        continue_final_message: continues,
        kwargs: Some(&kwargs),
    })?;
    // The template wrote the special tokens.
    state.prompt.encode(text, false).await
}

fn job(state: &Gateway, request: ChatRequest, prompt_tokens: Vec<u32>, lease: Option<AdapterLease>, envelope: &Envelope) -> Result<Job, ApiError> {
    let max_tokens = request.max_completion_tokens.or(request.max_tokens);
    let fields = SamplingFields {
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        frequency_penalty: request.frequency_penalty,
        presence_penalty: request.presence_penalty,
        repetition_penalty: request.repetition_penalty,
        logit_bias: request.logit_bias,
        min_tokens: request.min_tokens,
        stop_token_ids: request.stop_token_ids,
        ignore_eos: request.ignore_eos,
        seed: request.seed,
    };
    let with_logprobs = request.logprobs.unwrap_or(false);
    let top_logprobs = request.top_logprobs.unwrap_or(0);
    if top_logprobs > state.limits.max_top_logprobs {
        let message = format!("top_logprobs must be at most {}, got {top_logprobs}", state.limits.max_top_logprobs);
        return Err(ApiError::invalid("top_logprobs", message));
    }
    Ok(Job {
        prompt_tokens,
        lease,
        sampling: fields.resolve(state.prompt.sampling_defaults())?,
        max_tokens: max_tokens.map_or(MaxTokens::Room, MaxTokens::Exactly),
        n: request.n.unwrap_or(1),
        text: TextOptions {
            stop: request.stop.map(crate::protocol::OneOrMany::into_vec).unwrap_or_default(),
            keep_stop: request.no_stop_trim.or(request.include_stop_str_in_output).unwrap_or(false),
            skip_special_tokens: request.skip_special_tokens.unwrap_or(true),
            every_token: with_logprobs,
            ..TextOptions::default()
        },
        logprobs: LogprobsParams {
            output_top_k: with_logprobs.then_some(top_logprobs),
            prompt: None,
        },
        grammar: None,
        rid: request.rid.map_or_else(|| Arc::clone(&envelope.id), Arc::from),
    })
}

/// What all chunks of an answer have in common.
struct Envelope {
    id: Arc<str>,
    created: u64,
    model: Arc<str>,
    system_fingerprint: Arc<str>,
    prompt_tokens: u32,
    with_logprobs: bool,
}

impl Envelope {
    fn new(state: &Gateway, request: &ChatRequest, lease: Option<&AdapterLease>, prompt_len: usize) -> Self {
        Self {
            id: new_id("chatcmpl-").into(),
            created: unix_seconds(SystemTime::now()),
            model: request.model.as_str().into(),
            system_fingerprint: format!("fp_{}", state.weight_version(lease)).into(),
            prompt_tokens: prompt_len as u32,
            with_logprobs: request.logprobs.unwrap_or(false),
        }
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
            id: Arc::clone(&self.id),
            object: "chat.completion.chunk".into(),
            created: self.created,
            model: Arc::clone(&self.model),
            system_fingerprint: Arc::clone(&self.system_fingerprint),
            choices,
            usage,
        }
    }
}

async fn whole(state: &Gateway, envelope: &Envelope, streams: Vec<TextStream>) -> Result<Response, ApiError> {
    let completed = collect(streams).await?;
    let mut choices = Vec::with_capacity(completed.len());
    let (mut output_tokens, mut cached_tokens) = (0, 0);
    for (index, output) in completed.into_iter().enumerate() {
        output_tokens += output.tokens.len() as u32;
        cached_tokens = output.cached_tokens.max(cached_tokens);
        choices.push(choice(state, envelope, index as u32, output)?);
    }
    let response = ChatResponse {
        id: Arc::clone(&envelope.id),
        object: "chat.completion".into(),
        created: envelope.created,
        model: Arc::clone(&envelope.model),
        choices,
        usage: Usage::new(envelope.prompt_tokens, output_tokens, cached_tokens, 0),
        system_fingerprint: Arc::clone(&envelope.system_fingerprint),
    };
    Ok(Json(response).into_response())
}

fn choice(state: &Gateway, envelope: &Envelope, index: u32, output: Completed) -> Result<ChatChoice, ApiError> {
    let finish = output.finish.unwrap_or(Finish::Aborted);
    let reason = finish.reason().ok_or_else(ApiError::aborted)?;
    Ok(ChatChoice {
        index,
        logprobs: envelope.with_logprobs.then(|| chat_logprobs(state.prompt.tokenizer(), &output.tokens)),
        message: ResponseMessage {
            role: "assistant".into(),
            content: Some(output.text),
            refusal: None,
            reasoning_content: None,
            tool_calls: None,
        },
        finish_reason: reason.into(),
        matched_stop: finish.matched(),
    })
}

/// Chunks of a streamed answer.
struct ChatStream {
    state: AppState,
    envelope: Envelope,
    merged: Option<MergedStream>,
    options: StreamOptions,
    output_tokens: u32,
    cached_tokens: u32,
    ready: VecDeque<Bytes>,
}

impl ChatStream {
    fn new(state: AppState, envelope: Envelope, merged: MergedStream, options: StreamOptions) -> Self {
        Self {
            state,
            envelope,
            merged: Some(merged),
            options,
            output_tokens: 0,
            cached_tokens: 0,
            ready: VecDeque::new(),
        }
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            match self.merged.as_mut()?.next().await {
                Some((index, event)) => self.event(index as u32, event),
                None => self.done(),
            }
        }
    }

    fn event(&mut self, index: u32, event: TextEvent) {
        match event {
            TextEvent::Started { cached_tokens, .. } => {
                self.cached_tokens = self.cached_tokens.max(cached_tokens);
                let delta = ChatDelta {
                    role: Some("assistant".into()),
                    content: Some(String::new()),
                    ..ChatDelta::default()
                };
                self.push(index, delta, None, None);
            }
            TextEvent::Chunk { text, tokens } => {
                self.output_tokens += tokens.len() as u32;
                let logprobs = self.envelope.with_logprobs.then(|| chat_logprobs(self.state.prompt.tokenizer(), &tokens));
                let nothing_new = text.is_empty()
                    && logprobs
                        .as_ref()
                        .is_none_or(|logprobs| logprobs.content.as_ref().is_none_or(Vec::is_empty));
                if !nothing_new {
                    let delta = ChatDelta {
                        content: Some(text),
                        ..ChatDelta::default()
                    };
                    self.push(index, delta, logprobs, None);
                }
            }
            TextEvent::Finished(finish) if finish.reason().is_some() => self.push(index, ChatDelta::default(), None, Some(&finish)),
            TextEvent::Finished(_) => self.fail(&ApiError::aborted()),
            TextEvent::Failed(error) => self.fail(&error.into()),
        }
    }

    fn push(&mut self, index: u32, delta: ChatDelta, logprobs: Option<crate::protocol::chat::ChatLogprobs>, finish: Option<&Finish>) {
        let choice = ChatChunkChoice {
            index,
            delta,
            logprobs,
            finish_reason: finish.and_then(Finish::reason).map(Into::into),
            matched_stop: finish.and_then(Finish::matched),
        };
        let usage = (self.options.continuous_usage_stats == Some(true)).then(|| self.usage());
        self.ready.push_back(sse_event(&self.envelope.chunk(vec![choice], usage)));
    }

    fn usage(&self) -> Usage {
        Usage::new(self.envelope.prompt_tokens, self.output_tokens, self.cached_tokens, 0)
    }

    /// The status is spent: the error goes out as an event, and nothing after it. The other choices are cancelled.
    fn fail(&mut self, error: &ApiError) {
        self.merged = None;
        self.ready.push_back(sse_event(&error.body()));
    }

    fn done(&mut self) {
        self.merged = None;
        if self.options.include_usage == Some(true) {
            let chunk = self.envelope.chunk(Vec::new(), Some(self.usage()));
            self.ready.push_back(sse_event(&chunk));
        }
        self.ready.push_back(DONE);
    }
}

fn events(stream: ChatStream) -> impl Stream<Item = Bytes> {
    futures::stream::unfold(stream, |mut stream| async move { stream.next().await.map(|event| (event, stream)) })
}
