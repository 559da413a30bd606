//! `POST /v1/responses`, stateless: the Responses API over the same machinery as `/v1/chat/completions`.

use std::time::SystemTime;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{
    chat_completions::{PRIORITY, Started, start},
    with_adapter_header,
};
use crate::{
    app::{AppState, Caller, unix_seconds},
    beside::beside_if,
    error::ApiError,
    extract::ApiJson,
    generation::new_id,
    message_parser::{MessageParser, MessagePart},
    protocol::{
        chat::{
            ChatMessage, ChatRequest, ContentPart, FunctionCall, FunctionDefinition, FunctionName, JsonSchemaFormat, MessageContent, NamedToolChoice,
            ResponseFormat, Role, Tool, ToolCall, ToolChoice, ToolChoiceMode,
        },
        responses::{
            IncompleteDetails, Input, InputItem, InputTokensDetails, OutputContent, OutputItem, OutputTokensDetails, ResponseError, ResponseEvent,
            ResponseObject, ResponsesRequest, ResponsesToolChoice, ResponsesUsage, TextFormat, TextSettings,
        },
    },
    sse::{AnswerWriter, SseEvents, sse_answer},
    stream::{Finish, MergedStream, TextEvent},
};

/// Answers a conversation.
#[utoipa::path(
    post, path = "/v1/responses", tag = "OpenAI", request_body = ResponsesRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, OpenAI's events, from `response.created` to `response.completed`.",
            content((ResponseObject = "application/json"), (ResponseEvent = "text/event-stream"))),
        crate::openapi::GenerationErrors,
    ),
)]
pub async fn responses(State(state): State<AppState>, caller: Caller, ApiJson(request): ApiJson<ResponsesRequest>) -> Result<Response, ApiError> {
    refuse_unsupported(&request)?;
    let streaming = request.stream.unwrap_or(false);
    let (object, request) = beside_if(caller.is_large, || (object(&request), chat_request(request))).await;
    let started = start(&state, &caller, request?).await;
    let Started { lease, envelope, streams } = started.map_err(own_names)?;
    let mut merged = MergedStream::new(streams);
    merged.wait_for_first().await?;
    let mut answer = Answer {
        object,
        parser: envelope.parser.clone(),
        prompt_tokens: envelope.prompt_tokens,
        output_tokens: 0,
        cached_tokens: 0,
        open: None,
        sequence_number: 0,
        is_streamed: streaming,
        events: SseEvents::default(),
        failure: None,
    };
    let response = if streaming {
        answer.begin();
        sse_answer(merged, answer)
    } else {
        while !answer.events.is_closed()
            && let Some((index, event)) = merged.next().await
        {
            answer.event(index, event);
        }
        match answer.failure {
            Some(error) => return Err(error),
            None => Json(answer.object).into_response(),
        }
    };
    Ok(with_adapter_header(response, lease.as_ref()))
}

/// The chat API's names of fields as this one has them.
fn own_names(error: ApiError) -> ApiError {
    let Some(param) = error.param().map(str::to_owned) else { return error };
    match param.as_str() {
        "messages" => error.with_message(|message| message.replace("messages", "input")).for_param("input"),
        name @ ("max_tokens" | "max_completion_tokens") => {
            let error = error.with_message(|message| message.replace(name, "max_output_tokens"));
            error.for_param("max_output_tokens")
        }
        "response_format" | "response_format.json_schema" => error.for_param("text.format"),
        "reasoning_effort" => error.for_param("reasoning.effort"),
        _ if param.starts_with("tools[") => error.for_param(param.replace(".function", "")),
        _ => error,
    }
}

fn refuse_unsupported(request: &ResponsesRequest) -> Result<(), ApiError> {
    let refuse = |given: bool, param, why| if given { Err(ApiError::unsupported(param, why)) } else { Ok(()) };
    refuse(request.priority.is_some_and(|priority| priority != 0), "priority", PRIORITY)?;
    refuse(
        request.previous_response_id.is_some(),
        "previous_response_id",
        "nothing is stored; send the whole conversation",
    )?;
    refuse(
        request.conversation.is_some(),
        "conversation",
        "nothing is stored; send the whole conversation",
    )?;
    refuse(request.background == Some(true), "background", "the answer comes at once or as a stream")?;
    let truncation = request.truncation.as_ref().is_some_and(|truncation| truncation != "disabled");
    refuse(truncation, "truncation", "a conversation that is too long is an error")?;
    let include = request.include.as_ref().is_some_and(|include| !include.is_empty());
    refuse(include, "include", "there is nothing more to include")?;
    let verbosity = request
        .text
        .as_ref()
        .and_then(|text| text.verbosity.as_ref())
        .is_some_and(|verbosity| verbosity != "medium");
    refuse(verbosity, "text.verbosity", "the model has no such setting; ask for it in a message")?;
    let summary = request
        .reasoning
        .as_ref()
        .and_then(|reasoning| reasoning.summary.as_ref())
        .is_some_and(|summary| summary != "auto");
    refuse(summary, "reasoning.summary", "reasoning is given as it is")
}

/// The same request for the chat API.
fn chat_request(request: ResponsesRequest) -> Result<ChatRequest, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = request.instructions {
        messages.push(message(Role::System, Some(MessageContent::Text(instructions))));
    }
    match request.input {
        Input::Text(text) => messages.push(message(Role::User, Some(MessageContent::Text(text)))),
        Input::Items(items) => {
            for (index, item) in items.into_iter().enumerate() {
                push_item(&mut messages, index, item)?;
            }
        }
    }
    let tools = request.tools.map(|tools| {
        let tools = tools.into_iter().map(|tool| Tool {
            kind: tool.kind,
            function: FunctionDefinition {
                name: tool.name,
                description: tool.description,
                parameters: tool.parameters,
                strict: tool.strict,
            },
        });
        tools.collect()
    });
    let mut chat: ChatRequest = serde_json::from_value(json!({"model": request.model, "messages": []})).map_err(|_| ApiError::internal())?;
    chat.messages = messages;
    chat.max_completion_tokens = request.max_output_tokens;
    chat.temperature = request.temperature;
    chat.top_p = request.top_p;
    chat.seed = request.seed;
    chat.lora_path = request.lora_path;
    chat.top_k = request.top_k;
    chat.min_p = request.min_p;
    chat.repetition_penalty = request.repetition_penalty;
    chat.user = request.user;
    chat.safety_identifier = request.safety_identifier;
    chat.tools = tools;
    chat.tool_choice = request.tool_choice.map(|choice| match choice {
        ResponsesToolChoice::Mode(mode) => ToolChoice::Mode(mode),
        ResponsesToolChoice::Named(named) => ToolChoice::Named(NamedToolChoice {
            kind: named.kind,
            function: FunctionName { name: named.name },
        }),
    });
    chat.parallel_tool_calls = request.parallel_tool_calls;
    chat.reasoning_effort = request.reasoning.and_then(|reasoning| reasoning.effort);
    chat.response_format = request.text.and_then(|text| text.format).map(|format| match format {
        TextFormat::Text {} => ResponseFormat::Text {},
        TextFormat::JsonObject {} => ResponseFormat::JsonObject {},
        TextFormat::JsonSchema {
            name,
            description,
            schema,
            strict,
        } => ResponseFormat::JsonSchema {
            json_schema: JsonSchemaFormat {
                name,
                description,
                schema: Some(schema),
                strict,
            },
        },
    });
    Ok(chat)
}

fn message(role: Role, content: Option<MessageContent>) -> ChatMessage {
    ChatMessage {
        role,
        content,
        name: None,
        tool_calls: None,
        tool_call_id: None,
        refusal: None,
        reasoning_content: None,
        reasoning: None,
        annotations: None,
        audio: None,
        function_call: None,
    }
}

/// The names of parts in this API as the chat API has them.
fn chat_content(content: MessageContent) -> MessageContent {
    match content {
        MessageContent::Parts(parts) => {
            let parts = parts.into_iter().map(|part| ContentPart {
                kind: match part.kind.as_str() {
                    "input_text" | "output_text" => "text".to_owned(),
                    _ => part.kind,
                },
                ..part
            });
            MessageContent::Parts(parts.collect())
        }
        text @ MessageContent::Text(_) => text,
    }
}

/// Here and not where the chat's parts are checked: there the place in the list is another.
fn check_parts(index: usize, content: &MessageContent) -> Result<(), ApiError> {
    let MessageContent::Parts(parts) = content else { return Ok(()) };
    for (part, ContentPart { kind, .. }) in parts.iter().enumerate() {
        if !matches!(kind.as_str(), "input_text" | "output_text" | "text" | "refusal") {
            let param = format!("input[{index}].content[{part}].type");
            return Err(ApiError::unsupported(
                &param,
                &format!("parts of type '{kind}' are not: the model reads text only"),
            ));
        }
    }
    Ok(())
}

fn push_item(messages: &mut Vec<ChatMessage>, index: usize, item: InputItem) -> Result<(), ApiError> {
    let missing = |field: &str| {
        ApiError::invalid(
            format!("input[{index}].{field}"),
            format!("Missing required parameter: 'input[{index}].{field}'."),
        )
    };
    match item.kind.as_deref() {
        None | Some("message") => {
            let role = item.role.ok_or_else(|| missing("role"))?;
            let content = item.content.ok_or_else(|| missing("content"))?;
            check_parts(index, &content)?;
            messages.push(message(role, Some(chat_content(content))));
        }
        Some("function_call") => {
            let call = ToolCall {
                id: item.call_id.ok_or_else(|| missing("call_id"))?,
                kind: "function".to_owned(),
                function: FunctionCall {
                    name: item.name.ok_or_else(|| missing("name"))?,
                    arguments: item.arguments.ok_or_else(|| missing("arguments"))?,
                },
            };
            // What one answer said and called is one message of the chat.
            match messages.last_mut().filter(|last| last.role == Role::Assistant) {
                Some(last) => last.tool_calls.get_or_insert_default().push(call),
                None => messages.push(ChatMessage {
                    tool_calls: Some(vec![call]),
                    ..message(Role::Assistant, None)
                }),
            }
        }
        Some("function_call_output") => messages.push(ChatMessage {
            tool_call_id: Some(item.call_id.ok_or_else(|| missing("call_id"))?),
            ..message(Role::Tool, Some(chat_content(item.output.ok_or_else(|| missing("output"))?)))
        }),
        // What the model thought earlier is no part of the conversation.
        Some("reasoning") => {}
        Some(kind) => {
            let param = format!("input[{index}].type");
            return Err(ApiError::unsupported(&param, &format!("items of type '{kind}' are not")));
        }
    }
    Ok(())
}

fn object(request: &ResponsesRequest) -> ResponseObject {
    let default_format = TextSettings {
        format: Some(TextFormat::Text {}),
        verbosity: None,
    };
    ResponseObject {
        id: new_id("resp_"),
        object: "response".to_owned(),
        created_at: unix_seconds(SystemTime::now()),
        status: "in_progress".to_owned(),
        error: None,
        incomplete_details: None,
        instructions: request.instructions.clone(),
        max_output_tokens: request.max_output_tokens,
        model: request.model.clone(),
        output: Vec::new(),
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        previous_response_id: None,
        reasoning: request.reasoning.clone().unwrap_or_default(),
        store: false,
        temperature: request.temperature,
        text: request.text.clone().filter(|text| text.format.is_some()).unwrap_or(default_format),
        tool_choice: request.tool_choice.clone().unwrap_or(ResponsesToolChoice::Mode(ToolChoiceMode::Auto)),
        tools: request.tools.clone().unwrap_or_default(),
        top_p: request.top_p,
        truncation: "disabled".to_owned(),
        usage: None,
        metadata: request.metadata.clone().unwrap_or_default(),
    }
}

/// An answer in the making, and the events that tell of it.
struct Answer {
    object: ResponseObject,
    parser: MessageParser,
    prompt_tokens: u32,
    output_tokens: u32,
    cached_tokens: u32,
    /// The item that is being written: always the last of `object.output`.
    open: Option<Open>,
    sequence_number: u32,
    /// Whether anybody reads the events.
    is_streamed: bool,
    events: SseEvents,
    failure: Option<ApiError>,
}

#[derive(Clone, Debug, PartialEq)]
enum Open {
    Reasoning,
    Message,
    Call,
}

impl Answer {
    fn begin(&mut self) {
        for kind in ["response.created", "response.in_progress"] {
            self.emit(kind, json!({"response": self.object}));
        }
    }

    fn emit(&mut self, kind: &str, fields: Value) {
        if !self.is_streamed {
            return;
        }
        let fields = match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        let event = ResponseEvent {
            kind: kind.to_owned(),
            sequence_number: self.sequence_number,
            fields,
        };
        self.sequence_number += 1;
        self.events.push_named(kind, &event);
    }

    fn part(&mut self, part: MessagePart) {
        match part {
            MessagePart::Reasoning(text) => self.text(Open::Reasoning, &text),
            MessagePart::Content(text) => self.text(Open::Message, &text),
            MessagePart::Call { id, name, .. } => self.open(
                Open::Call,
                OutputItem::FunctionCall {
                    id: new_id("fc_"),
                    status: "in_progress".to_owned(),
                    call_id: id,
                    name,
                    arguments: String::new(),
                },
            ),
            MessagePart::Arguments { json, .. } => {
                let (output_index, item_id) = self.place();
                if let Some(OutputItem::FunctionCall { arguments, .. }) = self.object.output.last_mut() {
                    arguments.push_str(&json);
                }
                let fields = json!({"item_id": item_id, "output_index": output_index, "delta": json});
                self.emit("response.function_call_arguments.delta", fields);
            }
        }
    }

    fn text(&mut self, kind: Open, new: &str) {
        if new.is_empty() {
            return;
        }
        if self.open.as_ref() != Some(&kind) {
            self.open_text(&kind);
        }
        let (output_index, item_id) = self.place();
        if let Some(OutputItem::Reasoning { content, .. } | OutputItem::Message { content, .. }) = self.object.output.last_mut()
            && let Some(OutputContent::OutputText { text, .. } | OutputContent::ReasoningText { text }) = content.last_mut()
        {
            text.push_str(new);
        }
        let mut fields = json!({"item_id": item_id, "output_index": output_index, "content_index": 0, "delta": new});
        if kind == Open::Message {
            fields["logprobs"] = json!([]);
            self.emit("response.output_text.delta", fields);
        } else {
            self.emit("response.reasoning_text.delta", fields);
        }
    }

    fn open_text(&mut self, kind: &Open) {
        let status = "in_progress".to_owned();
        let (item, part) = if *kind == Open::Message {
            let item = OutputItem::Message {
                id: new_id("msg_"),
                status,
                role: "assistant".to_owned(),
                content: Vec::new(),
            };
            let part = OutputContent::OutputText {
                text: String::new(),
                annotations: Vec::new(),
                logprobs: Vec::new(),
            };
            (item, part)
        } else {
            let item = OutputItem::Reasoning {
                id: new_id("rs_"),
                summary: Vec::new(),
                content: Vec::new(),
                status,
            };
            (item, OutputContent::ReasoningText { text: String::new() })
        };
        self.open(kind.clone(), item);
        let (output_index, item_id) = self.place();
        let fields = json!({"item_id": item_id, "output_index": output_index, "content_index": 0, "part": part});
        self.emit("response.content_part.added", fields);
        if let Some(OutputItem::Reasoning { content, .. } | OutputItem::Message { content, .. }) = self.object.output.last_mut() {
            content.push(part);
        }
    }

    /// Ends the open item and begins another.
    fn open(&mut self, kind: Open, item: OutputItem) {
        self.close("completed");
        self.emit(
            "response.output_item.added",
            json!({"output_index": self.object.output.len(), "item": item}),
        );
        self.object.output.push(item);
        self.open = Some(kind);
    }

    /// Index and id of the open item.
    fn place(&self) -> (usize, String) {
        let id = match self.object.output.last() {
            Some(OutputItem::Reasoning { id, .. } | OutputItem::Message { id, .. } | OutputItem::FunctionCall { id, .. }) => id.clone(),
            None => String::new(),
        };
        (self.object.output.len().saturating_sub(1), id)
    }

    fn close(&mut self, how: &str) {
        if self.open.take().is_none() {
            return;
        }
        let (output_index, item_id) = self.place();
        let Some(item) = self.object.output.last_mut() else { return };
        let mut events = Vec::new();
        match item {
            OutputItem::Reasoning { content, status, .. } | OutputItem::Message { content, status, .. } => {
                how.clone_into(status);
                if let Some(part) = content.last() {
                    let (kind, text) = match part {
                        OutputContent::OutputText { text, .. } => ("response.output_text.done", text),
                        OutputContent::ReasoningText { text } => ("response.reasoning_text.done", text),
                    };
                    let at = json!({"item_id": item_id, "output_index": output_index, "content_index": 0});
                    let mut done = at.clone();
                    done["text"] = json!(text);
                    if kind == "response.output_text.done" {
                        done["logprobs"] = json!([]);
                    }
                    let mut part_done = at;
                    part_done["part"] = json!(part);
                    events.extend([(kind, done), ("response.content_part.done", part_done)]);
                }
            }
            OutputItem::FunctionCall { status, name, arguments, .. } => {
                how.clone_into(status);
                let done = json!({"item_id": item_id, "output_index": output_index, "name": name, "arguments": arguments});
                events.push(("response.function_call_arguments.done", done));
            }
        }
        events.push(("response.output_item.done", json!({"output_index": output_index, "item": item})));
        events.into_iter().for_each(|(kind, fields)| self.emit(kind, fields));
    }

    fn finish(&mut self, finish: &Finish) {
        let incomplete = *finish == Finish::Length;
        let status = if incomplete { "incomplete" } else { "completed" };
        self.close(status);
        status.clone_into(&mut self.object.status);
        self.object.incomplete_details = incomplete.then(|| IncompleteDetails {
            reason: "max_output_tokens".to_owned(),
        });
        self.object.usage = Some(ResponsesUsage {
            input_tokens: self.prompt_tokens,
            input_tokens_details: InputTokensDetails {
                cached_tokens: self.cached_tokens,
            },
            output_tokens: self.output_tokens,
            output_tokens_details: OutputTokensDetails {
                reasoning_tokens: self.parser.reasoning_tokens(),
            },
            total_tokens: self.prompt_tokens + self.output_tokens,
        });
        self.emit(&format!("response.{status}"), json!({"response": self.object}));
        self.events.close();
    }

    /// The status is spent: the answer ends as failed.
    fn fail(&mut self, error: ApiError) {
        let detail = error.body().error;
        "failed".clone_into(&mut self.object.status);
        self.object.error = Some(ResponseError {
            code: detail.code.unwrap_or(detail.kind),
            message: detail.message,
        });
        self.emit("response.failed", json!({"response": self.object}));
        self.events.close();
        self.failure = Some(error);
    }
}

impl AnswerWriter for Answer {
    fn events(&mut self) -> &mut SseEvents {
        &mut self.events
    }

    fn event(&mut self, _: usize, event: TextEvent) {
        match event {
            TextEvent::Started { cached_tokens, .. } => self.cached_tokens = cached_tokens,
            TextEvent::Chunk { text, tokens } => {
                self.output_tokens += tokens.len() as u32;
                let parts = self.parser.push(text, tokens.len());
                parts.into_iter().for_each(|part| self.part(part));
            }
            TextEvent::Finished(finish) if finish.reason().is_some() => {
                let parts = self.parser.finish();
                parts.into_iter().for_each(|part| self.part(part));
                self.finish(&finish);
            }
            TextEvent::Finished(finish) => self.fail(finish.error()),
            TextEvent::Failed(error) => self.fail(error.into()),
        }
    }

    fn end(&mut self) {}
}
