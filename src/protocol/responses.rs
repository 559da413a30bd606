//! `/v1/responses`, stateless.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    JsonSchemaObject,
    chat::{MessageContent, Role, ToolChoiceMode},
};

/// A request for `/v1/responses`. Nothing is stored: the whole conversation is in `input`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"model": "demo:sql", "input": "List 3 countries and their capitals."}))]
pub struct ResponsesRequest {
    /// The served base name, `base:adapter`, or an adapter's name.
    pub model: String,
    /// What the user says, or all items so far.
    pub input: Input,
    /// Instructions, before everything else.
    pub instructions: Option<String>,
    /// Most tokens generated.
    #[schema(minimum = 1)]
    pub max_output_tokens: Option<u32>,
    /// 0 is greedy.
    #[schema(minimum = 0, default = 1)]
    pub temperature: Option<f32>,
    /// Smallest set of likeliest tokens whose probabilities sum to at least this.
    #[schema(exclusive_minimum = 0, maximum = 1, default = 1)]
    pub top_p: Option<f32>,
    /// Functions that the model may call.
    pub tools: Option<Vec<FunctionTool>>,
    /// Whether it may, must, or must not, or which one it must call.
    pub tool_choice: Option<ResponsesToolChoice>,
    /// Whether one answer may call several functions.
    pub parallel_tool_calls: Option<bool>,
    /// The form of the text.
    pub text: Option<TextSettings>,
    /// Settings of the reasoning.
    pub reasoning: Option<ReasoningSettings>,
    /// Answer as server-sent events.
    pub stream: Option<bool>,
    /// Not interpreted.
    #[schema(value_type = Option<Object>)]
    pub stream_options: Option<Map<String, Value>>,
    /// Nothing is stored, whatever this says (its default elsewhere is `true`); the answer says so by `store: false`.
    pub store: Option<bool>,
    /// Refused: nothing is stored.
    pub previous_response_id: Option<String>,
    /// Refused: nothing is stored.
    #[schema(value_type = Option<Object>)]
    pub conversation: Option<Value>,
    /// Refused unless false.
    pub background: Option<bool>,
    /// Only `disabled`.
    pub truncation: Option<String>,
    /// Only an empty list.
    pub include: Option<Vec<String>>,
    /// Comes back in the answer.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Whom an alias's choice of an adapter sticks to.
    pub user: Option<String>,
    /// Whom an alias's choice of an adapter sticks to, if there is no `user`.
    pub safety_identifier: Option<String>,
    /// Not interpreted: prefixes are cached whatever the key.
    pub prompt_cache_key: Option<String>,
    /// Not interpreted: there is one tier.
    pub service_tier: Option<String>,
    /// Extension. The same seed and request give the same tokens.
    pub seed: Option<i64>,
    /// Extension. An adapter's name; one in `model` wins.
    pub lora_path: Option<String>,
    /// Extension. Only the `top_k` likeliest tokens; 0 and -1 are all.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Extension. Tokens with at least `min_p` times the likeliest one's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Extension. Divides positive and multiplies negative logits of tokens that occur in prompt or output.
    #[schema(exclusive_minimum = 0, maximum = 2)]
    pub repetition_penalty: Option<f32>,
    /// Extension. Only 0, which routers add: requests have no priorities.
    #[schema(minimum = 0, maximum = 0)]
    pub priority: Option<i64>,
}

/// What the user says, or all items so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of items")]
pub enum Input {
    /// What the user says.
    #[schema(title = "Text")]
    Text(String),
    /// All items so far.
    #[schema(title = "Items")]
    Items(Vec<InputItem>),
}

/// An item of a conversation. `type` says which of the other fields count; without it, it is a message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct InputItem {
    /// `message`, `function_call`, `function_call_output` or `reasoning`; others are refused.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Of a message: who speaks.
    pub role: Option<Role>,
    /// Of a message: what is said. Parts have type `input_text`, `output_text` or `refusal`.
    pub content: Option<MessageContent>,
    /// Of a call and its output: which call.
    pub call_id: Option<String>,
    /// Of a call: the function.
    pub name: Option<String>,
    /// Of a call: its arguments, JSON in a string.
    pub arguments: Option<String>,
    /// Of a call's output: what the function gave.
    pub output: Option<MessageContent>,
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct FunctionTool {
    /// `function`; other tools are refused.
    #[serde(rename = "type")]
    #[schema(example = "function")]
    pub kind: String,
    /// Its name: letters, digits, `_`, `-`, `.`.
    #[schema(example = "get_weather", pattern = "^[a-zA-Z0-9_.-]{1,64}$")]
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// A JSON schema of its arguments, an object.
    #[schema(value_type = Option<JsonSchemaObject>)]
    pub parameters: Option<Map<String, Value>>,
    /// Arguments follow the schema: where a call is required, and with `tool_choice: auto` once one begins.
    pub strict: Option<bool>,
}

/// Whether the model may, must, or must not call functions, or which it must call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected `none`, `auto`, `required` or an object that names a function")]
pub enum ResponsesToolChoice {
    /// `none`, `auto` or `required`.
    Mode(ToolChoiceMode),
    /// This function.
    Named(NamedFunction),
}

/// The one function that the model must call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct NamedFunction {
    /// `function`.
    #[serde(rename = "type")]
    #[schema(example = "function")]
    pub kind: String,
    /// Which.
    pub name: String,
}

/// The form of the text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct TextSettings {
    /// Text, any JSON object, or JSON of a schema.
    pub format: Option<TextFormat>,
    /// Only `medium`, which is what every answer has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verbosity: Option<String>,
}

/// What form the text has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum TextFormat {
    /// Text.
    #[schema(title = "PlainTextFormat")]
    Text {},
    /// A JSON object.
    #[schema(title = "JsonObjectTextFormat")]
    JsonObject {},
    /// JSON that a schema describes.
    #[schema(title = "JsonSchemaTextFormat")]
    JsonSchema {
        /// Its name.
        name: Option<String>,
        /// What it is for.
        description: Option<String>,
        /// The schema.
        #[schema(value_type = JsonSchemaObject)]
        schema: Map<String, Value>,
        /// Always followed here, whatever this says.
        strict: Option<bool>,
    },
}

/// Settings of the reasoning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct ReasoningSettings {
    /// Handed to the chat template.
    pub effort: Option<String>,
    /// Only null or `auto`: reasoning is given as it is.
    pub summary: Option<String>,
}

/// An answer of `/v1/responses`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResponseObject {
    /// Identity of the answer.
    #[schema(example = "resp_0a1b2c3d4e5f60718293a4b5c6d7e8f9")]
    pub id: String,
    /// `response`.
    #[schema(example = "response")]
    pub object: String,
    /// Unix time.
    pub created_at: u64,
    /// `in_progress`, `completed`, `incomplete` or `failed`.
    #[schema(example = "completed")]
    pub status: String,
    /// What failed, if it did.
    pub error: Option<ResponseError>,
    /// Why it is incomplete, if it is.
    pub incomplete_details: Option<IncompleteDetails>,
    /// As asked for.
    pub instructions: Option<String>,
    /// As asked for.
    pub max_output_tokens: Option<u32>,
    /// The model as it was asked for.
    pub model: String,
    /// What was generated.
    pub output: Vec<OutputItem>,
    /// As asked for.
    pub parallel_tool_calls: bool,
    /// Always null.
    pub previous_response_id: Option<String>,
    /// As asked for.
    pub reasoning: ReasoningSettings,
    /// Always false.
    pub store: bool,
    /// As asked for.
    pub temperature: Option<f32>,
    /// As asked for.
    pub text: TextSettings,
    /// As asked for.
    pub tool_choice: ResponsesToolChoice,
    /// As asked for.
    pub tools: Vec<FunctionTool>,
    /// As asked for.
    pub top_p: Option<f32>,
    /// Always `disabled`.
    pub truncation: String,
    /// Tokens counted, once it has ended.
    pub usage: Option<ResponsesUsage>,
    /// As asked for.
    pub metadata: BTreeMap<String, String>,
}

/// What failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResponseError {
    /// For a program.
    pub code: String,
    /// For a human.
    pub message: String,
}

/// Why an answer is incomplete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct IncompleteDetails {
    /// `max_output_tokens`.
    pub reason: String,
}

/// Tokens counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResponsesUsage {
    /// Of the prompt.
    pub input_tokens: u32,
    /// Where they came from.
    pub input_tokens_details: InputTokensDetails,
    /// Generated.
    pub output_tokens: u32,
    /// What they were.
    pub output_tokens_details: OutputTokensDetails,
    /// Both.
    pub total_tokens: u32,
}

/// Where the prompt tokens came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InputTokensDetails {
    /// Found in the prefix cache.
    pub cached_tokens: u32,
}

/// What the generated tokens were.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OutputTokensDetails {
    /// Spent on reasoning.
    pub reasoning_tokens: u32,
}

/// A generated item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    /// What the model thought.
    #[schema(title = "ReasoningItem")]
    Reasoning {
        /// Identity.
        id: String,
        /// Always empty.
        summary: Vec<Value>,
        /// The text.
        content: Vec<OutputContent>,
        /// `in_progress`, `completed` or `incomplete`.
        status: String,
    },
    /// What it says.
    #[schema(title = "MessageItem")]
    Message {
        /// Identity.
        id: String,
        /// `in_progress`, `completed` or `incomplete`.
        status: String,
        /// `assistant`.
        role: String,
        /// The text.
        content: Vec<OutputContent>,
    },
    /// A function that it calls.
    #[schema(title = "FunctionCallItem")]
    FunctionCall {
        /// Identity of the item.
        id: String,
        /// `in_progress`, `completed` or `incomplete`.
        status: String,
        /// Identity of the call.
        call_id: String,
        /// The function.
        name: String,
        /// Its arguments, JSON in a string.
        arguments: String,
    },
}

/// Text of an item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputContent {
    /// What is said.
    #[schema(title = "OutputTextContent")]
    OutputText {
        /// The text.
        text: String,
        /// Always empty.
        annotations: Vec<Value>,
        /// Always empty.
        logprobs: Vec<Value>,
    },
    /// What is thought.
    #[schema(title = "ReasoningTextContent")]
    ReasoningText {
        /// The text.
        text: String,
    },
}

/// One event of a streamed answer; `type` says which of OpenAI's events it is, and so its other fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResponseEvent {
    /// `response.created`, `response.output_text.delta`, `response.completed`, …
    #[serde(rename = "type")]
    #[schema(example = "response.output_text.delta")]
    pub kind: String,
    /// 0, 1, 2, …
    pub sequence_number: u32,
    /// What the event tells.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub fields: Map<String, Value>,
}
