//! What a model writes, as the parts of a message: reasoning, text, calls. Text comes in pieces, parts go out as they are certain.

use crate::{
    generation::new_id,
    protocol::chat::{ChatDelta, FunctionCall, FunctionCallDelta, ResponseMessage, ToolCall, ToolCallDelta},
    reasoning::{Part, ReasoningSplitter},
    tool_calls::{ToolParser, ToolPart},
};

/// One part, or more of one.
#[derive(Clone, Debug, PartialEq)]
pub enum MessagePart {
    /// Text.
    Content(String),
    /// What the model thinks.
    Reasoning(String),
    /// A call begins.
    Call {
        /// Which, from 0.
        index: u32,
        /// A new identity.
        id: String,
        /// The function.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call.
        index: u32,
        /// What is new.
        json: String,
    },
}

/// What becomes of what a model thinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Thoughts {
    /// They go out as they come.
    #[default]
    AsTheyCome,
    /// They go out in one piece, before what follows them.
    InOnePiece,
    /// They are left out.
    LeftOut,
}

/// Reads one output.
#[derive(Clone, Debug, Default)]
pub struct MessageParser {
    reasoning: Option<ReasoningSplitter>,
    thoughts: Thoughts,
    /// Thoughts that wait for their end.
    held_thoughts: String,
    tools: Option<ToolParser>,
    /// Calls after the first are left out.
    single_call: bool,
    reasoning_tokens: u32,
}

impl MessageParser {
    /// Splits off what is asked for; without either, everything is content.
    pub fn new(reasoning: Option<ReasoningSplitter>, tools: Option<ToolParser>, single_call: bool) -> Self {
        Self {
            reasoning,
            thoughts: Thoughts::default(),
            held_thoughts: String::new(),
            tools,
            single_call,
            reasoning_tokens: 0,
        }
    }

    /// The same, with another use of the thoughts.
    #[must_use]
    pub fn with_thoughts(self, thoughts: Thoughts) -> Self {
        Self { thoughts, ..self }
    }

    /// Whether calls are looked for.
    pub fn reads_calls(&self) -> bool {
        self.tools.is_some()
    }

    /// Whether reasoning is looked for.
    pub fn reads_reasoning(&self) -> bool {
        self.reasoning.is_some()
    }

    /// Whether there may be anything but content.
    pub fn reads_parts(&self) -> bool {
        self.tools.is_some() || self.reasoning.is_some()
    }

    /// Takes a whole output, piece by piece with the tokens of each.
    pub fn push_whole(&mut self, pieces: Vec<(String, usize)>) -> Vec<MessagePart> {
        pieces.into_iter().flat_map(|(text, num_tokens)| self.push(text, num_tokens)).collect()
    }

    /// Whether functions were called.
    pub fn has_calls(&self) -> bool {
        self.tools.as_ref().is_some_and(|tools| tools.num_calls() > 0)
    }

    /// Tokens spent on reasoning so far.
    pub fn reasoning_tokens(&self) -> u32 {
        self.reasoning_tokens
    }

    /// Takes text of so many tokens.
    pub fn push(&mut self, text: String, num_tokens: usize) -> Vec<MessagePart> {
        let Some(reasoning) = &mut self.reasoning else {
            return self.answer(text);
        };
        if reasoning.is_thinking() {
            self.reasoning_tokens += num_tokens as u32;
        }
        let parts = reasoning.push(&text);
        parts.into_iter().flat_map(|part| self.part(part)).collect()
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> Vec<MessagePart> {
        let last = self.reasoning.as_mut().and_then(ReasoningSplitter::finish);
        let mut parts: Vec<MessagePart> = last.into_iter().flat_map(|part| self.part(part)).collect();
        parts.extend(self.whole_thoughts());
        if let Some(tools) = &mut self.tools {
            let rest = tools.finish();
            parts.extend(self.tool_parts(rest));
        }
        parts
    }

    fn part(&mut self, part: Part) -> Vec<MessagePart> {
        match part {
            Part::Reasoning(text) => match self.thoughts {
                Thoughts::AsTheyCome => vec![MessagePart::Reasoning(text)],
                Thoughts::InOnePiece => {
                    self.held_thoughts.push_str(&text);
                    Vec::new()
                }
                Thoughts::LeftOut => Vec::new(),
            },
            Part::Answer(text) => {
                let thoughts = self.whole_thoughts();
                let answer = self.answer(text);
                thoughts.into_iter().chain(answer).collect()
            }
        }
    }

    fn whole_thoughts(&mut self) -> Option<MessagePart> {
        let thoughts = std::mem::take(&mut self.held_thoughts);
        (!thoughts.is_empty()).then_some(MessagePart::Reasoning(thoughts))
    }

    fn answer(&mut self, text: String) -> Vec<MessagePart> {
        match &mut self.tools {
            None if text.is_empty() => Vec::new(),
            None => vec![MessagePart::Content(text)],
            Some(tools) => {
                let parts = tools.push(&text);
                self.tool_parts(parts)
            }
        }
    }

    fn tool_parts(&self, parts: Vec<ToolPart>) -> Vec<MessagePart> {
        let wanted = |index: u32| !self.single_call || index == 0;
        let parts = parts.into_iter().filter_map(|part| match part {
            ToolPart::Text(text) => Some(MessagePart::Content(text)),
            ToolPart::Call { index, name } => wanted(index).then(|| MessagePart::Call { index, id: call_id(), name }),
            ToolPart::Arguments { index, json } => wanted(index).then_some(MessagePart::Arguments { index, json }),
        });
        parts.collect()
    }
}

fn call_id() -> String {
    let mut id = new_id("call_");
    id.truncate("call_".len() + 24);
    id
}

/// A whole message of its parts.
pub fn message(parts: Vec<MessagePart>) -> ResponseMessage {
    let mut content = String::new();
    let mut reasoning: Option<String> = None;
    let mut calls: Vec<ToolCall> = Vec::new();
    for part in parts {
        match part {
            MessagePart::Content(text) => content.push_str(&text),
            MessagePart::Reasoning(text) => reasoning.get_or_insert_default().push_str(&text),
            MessagePart::Call { id, name, .. } => calls.push(ToolCall {
                id,
                kind: "function".to_owned(),
                function: FunctionCall {
                    name,
                    arguments: String::new(),
                },
            }),
            MessagePart::Arguments { index, json } => {
                if let Some(call) = calls.get_mut(index as usize) {
                    call.function.arguments.push_str(&json);
                }
            }
        }
    }
    ResponseMessage {
        role: "assistant".into(),
        content: (calls.is_empty() || !content.is_empty()).then_some(content),
        refusal: None,
        reasoning_content: reasoning,
        tool_calls: (!calls.is_empty()).then_some(calls),
    }
}

impl From<MessagePart> for ChatDelta {
    fn from(part: MessagePart) -> Self {
        let call = |index, id: Option<String>, function| ToolCallDelta {
            index,
            kind: id.is_some().then(|| "function".into()),
            id,
            function,
        };
        match part {
            MessagePart::Content(text) => Self {
                content: Some(text),
                ..Self::default()
            },
            MessagePart::Reasoning(text) => Self {
                reasoning_content: Some(text),
                ..Self::default()
            },
            MessagePart::Call { index, id, name } => Self {
                tool_calls: Some(vec![call(
                    index,
                    Some(id),
                    FunctionCallDelta {
                        name: Some(name),
                        arguments: Some(String::new()),
                    },
                )]),
                ..Self::default()
            },
            MessagePart::Arguments { index, json } => Self {
                tool_calls: Some(vec![call(
                    index,
                    None,
                    FunctionCallDelta {
                        name: None,
                        arguments: Some(json),
                    },
                )]),
                ..Self::default()
            },
        }
    }
}
