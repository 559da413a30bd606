//! `POST /v1/chat/completions`.

use std::{sync::Arc, time::SystemTime};

use axum::{Json, extract::State, response::IntoResponse, response::Response};
use polylora_engine::{AdapterLease, LogprobsParams};
use serde_json::{Value, json};

use super::with_adapter_header;
use crate::{
    app::{AppState, Caller, Gateway, unix_seconds},
    beside::beside_if,
    chat_template::ChatInput,
    constraint::{GrammarSpec, form_of_answer, guided_schema},
    conversation::template_messages,
    error::ApiError,
    extract::ApiJson,
    generation::{Grammar, Job, MaxTokens, SamplingFields, new_id},
    logprobs::chat_logprobs,
    message_parser::{MessageParser, MessagePart, Thoughts, message},
    protocol::{
        StreamOptions, Usage,
        chat::{ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, ChatMessage, ChatRequest, ChatResponse, Role, Tool, ToolChoice, ToolChoiceMode},
    },
    reasoning::{self, ReasoningSplitter},
    sse::{AnswerWriter, SseEvents, sse_answer},
    stream::{Completed, Finish, MergedStream, OutputToken, TextEvent, TextOptions, TextStream, collect},
    text_side::TextSide,
    tool_calls::{ToolParser, required},
};

/// Answers a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "OpenAI", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, events of `ChatChunk` ended by `[DONE]`.",
            content((ChatResponse = "application/json"), (ChatChunk = "text/event-stream"))),
        crate::openapi::GenerationErrors,
    ),
)]
pub async fn chat_completions(State(state): State<AppState>, caller: Caller, ApiJson(request): ApiJson<ChatRequest>) -> Result<Response, ApiError> {
    let streaming = request.stream.unwrap_or(false);
    let options = request.stream_options.clone().unwrap_or_default();
    let started = start(&state, &caller, request).await?;
    let lease = started.lease;
    let response = if streaming {
        let mut merged = MergedStream::new(started.streams);
        merged.wait_for_first().await?;
        sse_answer(merged, ChatWriter::new(started.envelope, options))
    } else {
        whole(&started.envelope, started.streams).await?
    };
    Ok(with_adapter_header(response, lease.as_ref()))
}

/// A conversation that is being answered.
pub(super) struct Started {
    /// What runs on.
    pub lease: Option<AdapterLease>,
    /// What all parts of the answer have in common.
    pub envelope: Envelope,
    /// One for each choice.
    pub streams: Vec<TextStream>,
}

/// Checks a request and starts it.
pub(super) async fn start(state: &AppState, caller: &Caller, request: ChatRequest) -> Result<Started, ApiError> {
    refuse_unsupported(&request)?;
    let tools = beside_if(caller.is_large, || Tools::read(state, &request)).await?;
    let target = state.router(&caller.identity).target(&request.model, request.lora_path.as_deref())?;
    let users = [request.user.as_deref(), request.safety_identifier.as_deref()];
    let target = state.resolve(caller, target, caller.sticky_key(users, &caller.request_id))?;
    // What the adapter brings may be another template and other tokens.
    let lease = state.lease(caller, &target).await?;
    let text = state.text(lease.as_ref());
    let prompt = text.prompt.rendering(caller.is_large, || prompt_text(&text, &request, &tools)).await?;
    let thoughts = match (request.include_reasoning, request.stream_reasoning) {
        (Some(false), _) => Thoughts::LeftOut,
        (_, Some(false)) => Thoughts::InOnePiece,
        _ => Thoughts::AsTheyCome,
    };
    // What is to be left out has to be told from the rest.
    let separates = request.separate_reasoning.unwrap_or(true) || thoughts == Thoughts::LeftOut;
    let reasoning = separates
        .then(|| ReasoningSplitter::for_prompt(text.prompt.templates(), &prompt))
        .flatten();
    if reasoning.is_some() && thoughts == Thoughts::LeftOut && request.logprobs == Some(true) {
        return Err(ApiError::unsupported(
            "include_reasoning",
            "with logprobs only true is: they would tell what was left out",
        ));
    }
    let grammar = grammar(state, caller, &text, &request, &tools, reasoning.as_ref()).await?;
    let most = max_tokens_field(&request);
    let parser = parser(&text, &tools, reasoning).with_thoughts(thoughts);
    // The template wrote the special tokens.
    let prompt_tokens = text.prompt.encode(prompt, false).await?;
    let envelope = Envelope::new(state, &request, text, parser);
    let envelope = envelope.with_prompt(state, lease.as_ref(), prompt_tokens.len());
    let mut job = job(state, request, prompt_tokens, lease.clone(), &envelope)?;
    job.grammar = grammar;
    let tokenizer = envelope.text.tokenizer();
    if envelope.parser.reads_calls() {
        job.text.shown_tokens = envelope.text.tool_format.shown_tokens(tokenizer);
    }
    if envelope.parser.reads_reasoning() {
        job.text.shown_tokens.extend(reasoning::shown_tokens(tokenizer));
    }
    let started = state.start(caller, vec![job]);
    let streams = started.map_err(|error| error.rename_param("prompt", "messages").rename_param("max_tokens", most))?;
    Ok(Started { lease, envelope, streams })
}

/// Why other priorities than 0 are refused.
pub(super) const PRIORITY: &str = "only 0 is; who is next is decided by tokens served to each adapter and key";

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
    refuse(request.priority.is_some_and(|priority| priority != 0), "priority", PRIORITY)?;
    refuse(request.return_hidden_states == Some(true), "return_hidden_states", "only false is")?;
    let verbosity = request.verbosity.as_ref().is_some_and(|verbosity| verbosity != "medium");
    refuse(verbosity, "verbosity", "the model has no such setting; ask for it in a message")?;
    let obfuscation = request.stream_options.as_ref().and_then(|options| options.include_obfuscation);
    refuse(obfuscation == Some(true), "stream_options.include_obfuscation", "chunks are not padded")?;
    if request.stream_options.is_some() && request.stream != Some(true) {
        return Err(ApiError::invalid("stream_options", "stream_options needs stream to be true"));
    }
    if request.top_logprobs.is_some_and(|top| top > 0) && request.logprobs != Some(true) {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    if request.max_completion_tokens.or(request.max_tokens) == Some(0) {
        let field = max_tokens_field(request);
        return Err(ApiError::invalid(field, format!("{field} must be at least 1, got 0")));
    }
    Ok(())
}

/// Under which name a request says how many tokens it wants at most.
fn max_tokens_field(request: &ChatRequest) -> &'static str {
    match request.max_completion_tokens {
        Some(_) => "max_completion_tokens",
        None => "max_tokens",
    }
}

/// The functions that a request offers, and what the model has to do with them.
struct Tools {
    /// None if the model must not call.
    offered: Vec<Tool>,
    /// The same, as the template gets them.
    rendered: Vec<Value>,
    parallel: bool,
}

impl Tools {
    fn read(state: &Gateway, request: &ChatRequest) -> Result<Self, ApiError> {
        let tools = request.tools.clone().unwrap_or_default();
        let mode = match &request.tool_choice {
            Some(ToolChoice::Mode(mode)) => *mode,
            Some(ToolChoice::Named(named)) if named.kind != "function" => {
                return Err(ApiError::unsupported("tool_choice.type", "only `function` is"));
            }
            _ => ToolChoiceMode::Auto,
        };
        if tools.is_empty() && request.tool_choice.is_some() && mode != ToolChoiceMode::None && request.tool_choice != Some(ToolChoice::Mode(mode)) {
            return Err(ApiError::invalid("tool_choice", "tool_choice is only possible with tools"));
        }
        if tools.is_empty() && mode == ToolChoiceMode::Required {
            return Err(ApiError::invalid("tool_choice", "tool_choice is only possible with tools"));
        }
        if tools.len() > state.limits.max_tools {
            let message = format!("a request may have {} tools, got {}", state.limits.max_tools, tools.len());
            return Err(ApiError::invalid("tools", message));
        }
        let mut names = std::collections::BTreeSet::new();
        for (index, tool) in tools.iter().enumerate() {
            let name = &tool.function.name;
            if tool.kind != "function" {
                return Err(ApiError::unsupported(&format!("tools[{index}].type"), "only `function` is"));
            }
            let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if name.is_empty() || name.len() > 64 || !name.chars().all(valid) {
                let message = format!("a function's name has 1 to 64 letters, digits, `_` or `-`, got {name:?}");
                return Err(ApiError::invalid(format!("tools[{index}].function.name"), message));
            }
            if !names.insert(name) {
                return Err(ApiError::invalid(
                    format!("tools[{index}].function.name"),
                    format!("two functions are named {name:?}"),
                ));
            }
        }
        let offered = if mode == ToolChoiceMode::None { Vec::new() } else { tools };
        Ok(Self {
            rendered: offered.iter().map(|tool| serde_json::to_value(tool).unwrap_or_default()).collect(),
            offered,
            parallel: request.parallel_tool_calls.unwrap_or(true),
        })
    }
}

/// The text of a conversation without tools.
pub(super) fn template_text(
    text: &TextSide,
    messages: &[ChatMessage],
    add_generation_prompt: bool,
    kwargs: Option<&serde_json::Map<String, Value>>,
) -> Result<String, ApiError> {
    text.prompt.render_chat(&ChatInput {
        messages: &template_messages(messages, text.prompt.templates())?,
        tools: None,
        add_generation_prompt,
        continue_final_message: false,
        kwargs,
    })
}

fn prompt_text(text: &TextSide, request: &ChatRequest, tools: &Tools) -> Result<String, ApiError> {
    let mut messages = template_messages(&request.messages, text.prompt.templates())?;
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
    let template_has_tools = text.prompt.templates().is_some_and(|templates| templates.mentions("tools"));
    if !tools.offered.is_empty() && !template_has_tools {
        // A template that drops the tools would leave the model without a word of them.
        messages.insert(0, json!({"role": "system", "content": text.tool_format.instructions(&tools.rendered)}));
    }
    text.prompt.render_chat(&ChatInput {
        messages: &messages,
        tools: (template_has_tools && !tools.offered.is_empty()).then_some(&tools.rendered),
        add_generation_prompt: request.add_generation_prompt.unwrap_or(!continues),
        continue_final_message: continues,
        kwargs: Some(&kwargs),
    })
}

/// What the output has to follow: calls if they are required, or the form that was asked for (or calls, if those are possible too), or
/// the schemas of strict functions where the model calls one. A model that reasons does so first.
async fn grammar(
    state: &Gateway,
    caller: &Caller,
    text: &TextSide,
    request: &ChatRequest,
    tools: &Tools,
    reasoning: Option<&ReasoningSplitter>,
) -> Result<Option<Arc<dyn Grammar>>, ApiError> {
    let asked_for = beside_if(caller.is_large, || grammar_of_answer(text, request, tools)).await?;
    let Some((mut spec, param)) = asked_for else {
        return Ok(None);
    };
    if let Some(reasoning) = reasoning {
        spec = GrammarSpec::AfterReasoning {
            opened: reasoning.is_thinking(),
            answer: Box::new(spec),
        };
    }
    let compiled = text.grammars.compile(spec, param, state.limits.max_grammar_bytes).await;
    compiled.map(Some)
}

fn grammar_of_answer(text: &TextSide, request: &ChatRequest, tools: &Tools) -> Result<Option<(GrammarSpec, &'static str)>, ApiError> {
    let format = form_of_answer(request.response_format.as_ref(), None, request.regex.as_ref(), request.ebnf.as_ref())?;
    let bad_tools = |reason: String| ApiError::invalid_grammar("tools", &reason);
    let required = required(&tools.offered, request.tool_choice.as_ref()).map_err(|reason| ApiError::invalid("tool_choice", reason))?;
    let tokenizer = text.tokenizer();
    let offered: Vec<&Tool> = tools.offered.iter().collect();
    let is_strict = offered.iter().any(|tool| tool.function.strict == Some(true));
    Ok(match (format, required) {
        (None, None) if is_strict => {
            let lark = text.tool_format.free_grammar(&offered, tools.parallel, tokenizer);
            Some((GrammarSpec::Lark(lark.map_err(bad_tools)?), "tools"))
        }
        (_, Some(functions)) => {
            // A choice by name is of one call, be it the only function that is offered.
            let is_named = matches!(request.tool_choice, Some(ToolChoice::Named(_)));
            let lark = text.tool_format.grammar(&functions, tools.parallel && !is_named, tokenizer);
            Some((GrammarSpec::Lark(lark.map_err(bad_tools)?), "tools"))
        }
        (Some((GrammarSpec::JsonSchema(schema), param)), None) if !offered.is_empty() => {
            let calls = text.tool_format.grammar(&offered, tools.parallel, tokenizer).map_err(bad_tools)?;
            let schema: Value = serde_json::from_str(&schema).map_err(|error| bad_tools(error.to_string()))?;
            let schema = guided_schema(schema).map_err(|reason| ApiError::invalid_grammar(param, &reason))?;
            let calls = calls.replacen("start:", "calls:", 1);
            let lark = format!("start: calls | answer\nanswer: %json {schema}\n{calls}");
            Some((GrammarSpec::Lark(lark), param))
        }
        (format, None) => format,
    })
}

fn parser(text: &TextSide, tools: &Tools, reasoning: Option<ReasoningSplitter>) -> MessageParser {
    let names = tools.offered.iter().map(|tool| tool.function.name.clone()).collect();
    let calls = (!tools.offered.is_empty()).then(|| ToolParser::new(text.tool_format, names));
    MessageParser::new(reasoning, calls, !tools.parallel)
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
        sampling: fields.resolve(state.text.prompt.sampling_defaults())?,
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

/// What all parts of an answer have in common.
pub(super) struct Envelope {
    pub id: Arc<str>,
    pub created: u64,
    pub model: Arc<str>,
    pub system_fingerprint: Arc<str>,
    pub prompt_tokens: u32,
    with_logprobs: bool,
    n: u32,
    text: TextSide,
    /// At the beginning of an output.
    pub parser: MessageParser,
}

impl Envelope {
    fn new(state: &Gateway, request: &ChatRequest, text: TextSide, parser: MessageParser) -> Self {
        Self {
            id: new_id("chatcmpl-").into(),
            created: unix_seconds(SystemTime::now()),
            model: request.model.as_str().into(),
            system_fingerprint: "".into(),
            prompt_tokens: 0,
            with_logprobs: request.logprobs.unwrap_or(false),
            // A wild `n` is refused before anything starts.
            n: request.n.unwrap_or(1).min(state.limits.max_n),
            text,
            parser,
        }
    }

    fn with_prompt(self, state: &Gateway, lease: Option<&AdapterLease>, prompt_len: usize) -> Self {
        Self {
            system_fingerprint: format!("fp_{}", state.weight_version(lease)).into(),
            prompt_tokens: prompt_len as u32,
            ..self
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

async fn whole(envelope: &Envelope, streams: Vec<TextStream>) -> Result<Response, ApiError> {
    let completed = collect(streams).await?;
    let mut choices = Vec::with_capacity(completed.len());
    let (mut output_tokens, mut cached_tokens, mut reasoning_tokens) = (0, 0, 0);
    for (index, output) in completed.into_iter().enumerate() {
        output_tokens += output.tokens.len() as u32;
        cached_tokens = output.cached_tokens.max(cached_tokens);
        let mut parser = envelope.parser.clone();
        choices.push(choice(envelope, index as u32, output, &mut parser)?);
        reasoning_tokens += parser.reasoning_tokens();
    }
    let response = ChatResponse {
        id: Arc::clone(&envelope.id),
        object: "chat.completion".into(),
        created: envelope.created,
        model: Arc::clone(&envelope.model),
        choices,
        usage: Usage::new(envelope.prompt_tokens, output_tokens, cached_tokens, reasoning_tokens),
        system_fingerprint: Arc::clone(&envelope.system_fingerprint),
    };
    Ok(Json(response).into_response())
}

/// OpenAI's word for how a choice ended.
fn finish_reason(finish: &Finish, parser: &MessageParser) -> Option<&'static str> {
    match finish.reason() {
        Some("stop") if parser.has_calls() => Some("tool_calls"),
        reason => reason,
    }
}

fn choice(envelope: &Envelope, index: u32, output: Completed, parser: &mut MessageParser) -> Result<ChatChoice, ApiError> {
    let finish = output.finish.unwrap_or(Finish::Aborted);
    let mut parts = parser.push_whole(output.pieces);
    parts.extend(parser.finish());
    let reason = finish_reason(&finish, parser).ok_or_else(|| finish.error())?;
    Ok(ChatChoice {
        index,
        logprobs: envelope.with_logprobs.then(|| chat_logprobs(envelope.text.tokenizer(), &output.tokens)),
        message: message(parts),
        finish_reason: reason.into(),
        matched_stop: finish.matched(),
    })
}

/// Chunks of a streamed answer.
struct ChatWriter {
    envelope: Envelope,
    options: StreamOptions,
    choices: Vec<StreamedChoice>,
    output_tokens: u32,
    cached_tokens: u32,
    events: SseEvents,
}

struct StreamedChoice {
    parser: MessageParser,
    /// Tokens whose log-probabilities wait for a chunk to go with.
    unreported: Vec<OutputToken>,
}

impl ChatWriter {
    fn new(envelope: Envelope, options: StreamOptions) -> Self {
        let choice = || StreamedChoice {
            parser: envelope.parser.clone(),
            unreported: Vec::new(),
        };
        Self {
            choices: (0..envelope.n).map(|_| choice()).collect(),
            envelope,
            options,
            output_tokens: 0,
            cached_tokens: 0,
            events: SseEvents::default(),
        }
    }

    fn push_parts(&mut self, index: usize, parts: Vec<MessagePart>) {
        // A token that adds no text yet still has its log-probability.
        let has_logprobs = self.choices[index].unreported.iter().any(|token| !token.is_stop);
        if parts.is_empty() && has_logprobs && !self.envelope.parser.reads_parts() {
            return self.push_parts(index, vec![MessagePart::Content(String::new())]);
        }
        for part in parts {
            self.push(index, part.into(), None);
        }
    }

    fn push(&mut self, index: usize, delta: ChatDelta, finish: Option<&Finish>) {
        let choice = &mut self.choices[index];
        let tokens = std::mem::take(&mut choice.unreported);
        let has_logprobs = tokens.iter().any(|token| !token.is_stop);
        let choice = ChatChunkChoice {
            index: index as u32,
            delta,
            logprobs: has_logprobs.then(|| chat_logprobs(self.envelope.text.tokenizer(), &tokens)),
            finish_reason: finish.and_then(|finish| finish_reason(finish, &choice.parser)).map(Into::into),
            matched_stop: finish.and_then(Finish::matched),
        };
        let usage = (self.options.continuous_usage_stats == Some(true)).then(|| self.usage());
        self.events.push(&self.envelope.chunk(vec![choice], usage));
    }

    fn usage(&self) -> Usage {
        let reasoning_tokens = self.choices.iter().map(|choice| choice.parser.reasoning_tokens()).sum();
        Usage::new(self.envelope.prompt_tokens, self.output_tokens, self.cached_tokens, reasoning_tokens)
    }

    /// The status is spent: the error goes out as an event, and nothing after it. The other choices are cancelled.
    fn fail(&mut self, error: &ApiError) {
        self.events.push(&error.body());
        self.events.close();
    }
}

impl AnswerWriter for ChatWriter {
    fn events(&mut self) -> &mut SseEvents {
        &mut self.events
    }

    fn event(&mut self, index: usize, event: TextEvent) {
        match event {
            TextEvent::Started { cached_tokens, .. } => {
                self.cached_tokens = self.cached_tokens.max(cached_tokens);
                let delta = ChatDelta {
                    role: Some("assistant".into()),
                    content: Some(String::new()),
                    ..ChatDelta::default()
                };
                self.push(index, delta, None);
            }
            TextEvent::Chunk { text, tokens } => {
                self.output_tokens += tokens.len() as u32;
                let choice = &mut self.choices[index];
                let parts = choice.parser.push(text, tokens.len());
                if self.envelope.with_logprobs {
                    choice.unreported.extend(tokens);
                }
                self.push_parts(index, parts);
            }
            TextEvent::Finished(finish) if finish.reason().is_some() => {
                let rest = self.choices[index].parser.finish();
                self.push_parts(index, rest);
                self.push(index, ChatDelta::default(), Some(&finish));
            }
            TextEvent::Finished(finish) => self.fail(&finish.error()),
            TextEvent::Failed(error) => self.fail(&error.into()),
        }
    }

    fn end(&mut self) {
        if self.options.include_usage == Some(true) {
            let chunk = self.envelope.chunk(Vec::new(), Some(self.usage()));
            self.events.push(&chunk);
        }
        self.events.done();
    }
}
