//! `/v1/chat/completions`.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{JsonSchemaObject, MatchedStop, OneOrMany, StreamOptions, Usage};

/// A request for `/v1/chat/completions`: OpenAI's fields, then the usual extensions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"model": "demo:sql", "messages": [{"role": "user", "content": "List 3 countries and their capitals."}]}))]
pub struct ChatRequest {
    /// The served base name, `base:adapter`, or an adapter's name.
    #[schema(example = "demo:sql")]
    pub model: String,
    /// The conversation.
    #[schema(min_items = 1)]
    pub messages: Vec<ChatMessage>,
    /// Subtracted from a token's logit for each time that it occurs in the output.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of tokens, by id.
    #[schema(example = json!({"50256": -100}))]
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Report the log-probabilities of output tokens.
    pub logprobs: Option<bool>,
    /// How many likeliest tokens to report at each position; needs `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<u32>,
    /// The old name of `max_completion_tokens`.
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// Most tokens generated for one choice; as many as the context allows unless given.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// How many choices.
    #[schema(minimum = 1, default = 1)]
    pub n: Option<u32>,
    /// Subtracted once from the logit of each token that occurs in the output.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub presence_penalty: Option<f32>,
    /// Text, any JSON object, or JSON of a schema.
    pub response_format: Option<ResponseFormat>,
    /// The same seed and request give the same tokens.
    pub seed: Option<i64>,
    /// Generation ends before any of these texts.
    pub stop: Option<OneOrMany<String>>,
    /// Answer as server-sent events.
    pub stream: Option<bool>,
    /// Options of the stream.
    pub stream_options: Option<StreamOptions>,
    /// 0 is greedy.
    #[schema(minimum = 0, default = 1)]
    pub temperature: Option<f32>,
    /// Smallest set of likeliest tokens whose probabilities sum to at least this.
    #[schema(exclusive_minimum = 0, maximum = 1, default = 1)]
    pub top_p: Option<f32>,
    /// Functions that the model may call.
    pub tools: Option<Vec<Tool>>,
    /// Whether it may, must, or must not, or which one it must call.
    pub tool_choice: Option<ToolChoice>,
    /// Whether one answer may call several functions.
    pub parallel_tool_calls: Option<bool>,
    /// Handed to the chat template.
    #[schema(example = "low")]
    pub reasoning_effort: Option<String>,
    /// Whom an alias's choice of an adapter sticks to.
    pub user: Option<String>,
    /// Not interpreted.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Whom an alias's choice of an adapter sticks to, if there is no `user`.
    pub safety_identifier: Option<String>,
    /// Not interpreted: prefixes are cached whatever the key.
    pub prompt_cache_key: Option<String>,
    /// Not interpreted.
    pub prompt_cache_retention: Option<String>,
    /// Not interpreted: there is one tier.
    pub service_tier: Option<String>,
    /// Nothing is stored; `true` is refused.
    pub store: Option<bool>,
    /// A guess at the output. It changes speed only, elsewhere; not used.
    #[schema(value_type = Option<Object>)]
    pub prediction: Option<Value>,
    /// Only `["text"]`.
    pub modalities: Option<Vec<String>>,
    /// Refused.
    #[schema(value_type = Option<Object>)]
    pub audio: Option<Value>,
    /// Refused.
    #[schema(value_type = Option<Object>)]
    pub web_search_options: Option<Value>,
    /// Refused, unless `medium`, which is what every answer has.
    pub verbosity: Option<String>,
    /// Refused: use `tools`.
    #[schema(value_type = Option<Vec<Object>>)]
    pub functions: Option<Value>,
    /// Refused: use `tool_choice`.
    #[schema(value_type = Option<Object>)]
    pub function_call: Option<Value>,

    /// Extension. Only the `top_k` likeliest tokens; 0 and -1 are all.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Extension. Tokens with at least `min_p` times the likeliest one's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Extension. Divides positive and multiplies negative logits of tokens that occur in prompt or output.
    #[schema(exclusive_minimum = 0, maximum = 2)]
    pub repetition_penalty: Option<f32>,
    /// Extension. No end before so many tokens.
    #[schema(minimum = 0)]
    pub min_tokens: Option<u32>,
    /// Extension. The model's end-of-sequence tokens don't end generation.
    pub ignore_eos: Option<bool>,
    /// Extension. Generation ends with any of these tokens.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Extension. The text that stopped generation stays in the answer.
    pub no_stop_trim: Option<bool>,
    /// Extension. vLLM's name of `no_stop_trim`.
    pub include_stop_str_in_output: Option<bool>,
    /// Extension. Special tokens are left out of the text; the default is yes.
    pub skip_special_tokens: Option<bool>,
    /// Extension. An adapter's name; one in `model` wins.
    pub lora_path: Option<String>,
    /// Extension. Handed to the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Extension. End the prompt with the header of an assistant's message; the default is yes.
    pub add_generation_prompt: Option<bool>,
    /// Extension. Go on with the last message, which must be the assistant's.
    pub continue_final_message: Option<bool>,
    /// Extension. Put the model's reasoning into `reasoning_content`; the default is yes.
    pub separate_reasoning: Option<bool>,
    /// Extension. Stream reasoning as it comes; the default is yes, else it is sent in one piece before the answer.
    pub stream_reasoning: Option<bool>,
    /// Extension. Give the model's reasoning out; the default is yes, else it is left out of the answer.
    pub include_reasoning: Option<bool>,
    /// Extension. Only 0, which vLLM's clients send: requests have no priorities.
    #[schema(minimum = 0, maximum = 0)]
    pub priority: Option<i64>,
    /// Extension. Only `false`, which routers add: hidden states are not given out.
    pub return_hidden_states: Option<bool>,
    /// Extension. The output matches this regular expression.
    pub regex: Option<String>,
    /// Extension. The output is derived from this grammar (EBNF, in Lark's or GBNF's notation).
    pub ebnf: Option<String>,
    /// Extension. The request's id, for `/abort_request`.
    pub rid: Option<String>,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// Instructions, under their newer name.
    Developer,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// A function's result.
    Tool,
}

/// One message of a conversation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: Option<MessageContent>,
    /// The speaker's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Functions that the assistant called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Which call a tool's message answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// A refusal that the assistant gave; it stands in for the content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// What the assistant thought, handed to the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The same under another name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// As a response had them; not used.
    #[serde(skip_serializing)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub annotations: Option<Value>,
    /// Refused, unless null.
    #[serde(skip_serializing)]
    #[schema(value_type = Option<Object>)]
    pub audio: Option<Value>,
    /// Refused, unless null: use `tool_calls`.
    #[serde(skip_serializing)]
    #[schema(value_type = Option<Object>)]
    pub function_call: Option<Value>,
}

/// Text, or parts.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum MessageContent {
    /// Text.
    #[schema(title = "Text")]
    Text(String),
    /// Parts; only those of text can be honoured.
    #[schema(title = "Parts")]
    Parts(Vec<ContentPart>),
}

impl<'de> Deserialize<'de> for MessageContent {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> serde::de::Visitor<'de> for ContentVisitor {
            type Value = MessageContent;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string or a list of content parts")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<MessageContent, E> {
                Ok(MessageContent::Text(text.to_owned()))
            }
            fn visit_string<E: serde::de::Error>(self, text: String) -> Result<MessageContent, E> {
                Ok(MessageContent::Text(text))
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, seq: A) -> Result<MessageContent, A::Error> {
                Vec::deserialize(serde::de::value::SeqAccessDeserializer::new(seq)).map(MessageContent::Parts)
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

/// A part of a message. `type` says which of the other fields counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ContentPart {
    /// `text` or `refusal`; `image_url`, `input_audio`, `file` and others are refused.
    #[serde(rename = "type")]
    #[schema(example = "text")]
    pub kind: String,
    /// The text of a `text` part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The text of a `refusal` part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Tool {
    /// `function`.
    #[serde(rename = "type")]
    #[schema(example = "function")]
    pub kind: String,
    /// The function.
    pub function: FunctionDefinition,
}

/// A function's name, purpose and parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct FunctionDefinition {
    /// Its name: letters, digits, `_`, `-`, `.`.
    #[schema(example = "get_weather", pattern = "^[a-zA-Z0-9_.-]{1,64}$")]
    pub name: String,
    /// What it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// A JSON schema of its arguments, an object.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<JsonSchemaObject>)]
    pub parameters: Option<Map<String, Value>>,
    /// Arguments always follow the schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// Whether the model may, must, or must not, or which function it must call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected `none`, `auto`, `required` or an object that names a function")]
pub enum ToolChoice {
    /// `none`, `auto` or `required`.
    Mode(ToolChoiceMode),
    /// This function.
    Named(NamedToolChoice),
}

/// Whether the model may, must, or must not call functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum ToolChoiceMode {
    /// It must not.
    None,
    /// It may.
    Auto,
    /// It must.
    Required,
}

/// The one function that the model must call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct NamedToolChoice {
    /// `function`.
    #[serde(rename = "type")]
    #[schema(example = "function")]
    pub kind: String,
    /// Which.
    pub function: FunctionName,
}

/// A function's name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct FunctionName {
    /// The name.
    pub name: String,
}

/// What form the answer has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    /// Text.
    #[schema(title = "TextResponseFormat")]
    Text {},
    /// A JSON object.
    #[schema(title = "JsonObjectResponseFormat")]
    JsonObject {},
    /// JSON that a schema describes.
    #[schema(title = "JsonSchemaResponseFormat")]
    JsonSchema {
        /// The schema.
        json_schema: JsonSchemaFormat,
    },
}

/// A named JSON schema.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct JsonSchemaFormat {
    /// Its name.
    pub name: Option<String>,
    /// What it is for.
    pub description: Option<String>,
    /// The schema.
    #[schema(value_type = Option<JsonSchemaObject>)]
    pub schema: Option<Map<String, Value>>,
    /// Always followed here, whatever this says.
    pub strict: Option<bool>,
}

/// A call of a function.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ToolCall {
    /// Identity of the call.
    #[schema(example = "call_0a1b2c3d4e5f60718293a4b5")]
    pub id: String,
    /// `function`.
    #[serde(rename = "type", default = "function")]
    #[schema(example = "function")]
    pub kind: String,
    /// What is called.
    pub function: FunctionCall,
}

fn function() -> String {
    "function".to_owned()
}

/// A function's name and arguments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct FunctionCall {
    /// Its name.
    #[schema(example = "get_weather")]
    pub name: String,
    /// Its arguments, JSON in a string.
    #[schema(example = "{\"city\": \"Paris\"}")]
    pub arguments: String,
}

/// An answer of `/v1/chat/completions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatResponse {
    /// Identity of the answer.
    #[schema(example = "chatcmpl-0a1b2c3d4e5f60718293a4b5c6d7e8f9")]
    #[schema(value_type = String)]
    pub id: Arc<str>,
    /// `chat.completion`.
    #[schema(example = "chat.completion")]
    #[schema(value_type = String)]
    pub object: Cow<'static, str>,
    /// Unix time.
    pub created: u64,
    /// The model as it was asked for.
    #[schema(value_type = String)]
    pub model: Arc<str>,
    /// The choices, by index.
    pub choices: Vec<ChatChoice>,
    /// Tokens counted.
    pub usage: Usage,
    /// Identifies the model's and the adapter's weights.
    #[schema(value_type = String)]
    pub system_fingerprint: Arc<str>,
}

/// One choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatChoice {
    /// Its index.
    pub index: u32,
    /// What was generated.
    pub message: ResponseMessage,
    /// Log-probabilities, if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    #[schema(example = "stop")]
    #[schema(value_type = String)]
    pub finish_reason: Cow<'static, str>,
    /// Extension. The stop token's id or the stop text, if one ended it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub matched_stop: Option<MatchedStop>,
}

/// A generated message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResponseMessage {
    /// `assistant`.
    #[schema(example = "assistant")]
    #[schema(value_type = String)]
    pub role: Cow<'static, str>,
    /// The text; null if there are only calls.
    pub content: Option<String>,
    /// Always null.
    pub refusal: Option<String>,
    /// Extension. What the model thought before it answered.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reasoning_content: Option<String>,
    /// Functions called.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tool_calls: Option<Vec<ToolCall>>,
}

/// Log-probabilities of a choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatLogprobs {
    /// One for each token.
    pub content: Option<Vec<TokenLogprob>>,
    /// Always null.
    pub refusal: Option<Vec<TokenLogprob>>,
}

/// A token's log-probability, and the likeliest ones'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TokenLogprob {
    /// Its text.
    pub token: String,
    /// Its natural log-probability; -9999 for impossible.
    pub logprob: f32,
    /// Its bytes in UTF-8.
    pub bytes: Option<Vec<u8>>,
    /// The likeliest tokens, likeliest first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A likely token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Its natural log-probability; -9999 for impossible.
    pub logprob: f32,
    /// Its bytes in UTF-8.
    pub bytes: Option<Vec<u8>>,
}

/// One event of a streamed answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatChunk {
    /// Identity of the answer, the same in all its chunks.
    #[schema(value_type = String)]
    pub id: Arc<str>,
    /// `chat.completion.chunk`.
    #[schema(example = "chat.completion.chunk")]
    #[schema(value_type = String)]
    pub object: Cow<'static, str>,
    /// Unix time.
    pub created: u64,
    /// The model as it was asked for.
    #[schema(value_type = String)]
    pub model: Arc<str>,
    /// Identifies the model's and the adapter's weights.
    #[schema(value_type = String)]
    pub system_fingerprint: Arc<str>,
    /// What is new, at most one; none in the usage chunk.
    pub choices: Vec<ChatChunkChoice>,
    /// Tokens counted, where asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub usage: Option<Usage>,
}

/// What is new in one choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatChunkChoice {
    /// Its index.
    pub index: u32,
    /// What is new.
    pub delta: ChatDelta,
    /// Log-probabilities of the new tokens, if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls` in the last chunk of a choice.
    #[schema(value_type = Option<String>)]
    pub finish_reason: Option<Cow<'static, str>>,
    /// Extension. The stop token's id or the stop text, if one ended it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub matched_stop: Option<MatchedStop>,
}

/// What is new in a message.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatDelta {
    /// `assistant`, in the first.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<String>)]
    pub role: Option<Cow<'static, str>>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub content: Option<String>,
    /// Extension. More of what the model thinks.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reasoning_content: Option<String>,
    /// More of its calls.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tool_calls: Option<Vec<ToolCallDelta>>,
}

/// What is new in a call: the first has id, type and name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ToolCallDelta {
    /// Which call.
    pub index: u32,
    /// Identity of the call.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// `function`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<String>)]
    pub kind: Option<Cow<'static, str>>,
    /// What is new.
    pub function: FunctionCallDelta,
}

/// What is new in a function call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FunctionCallDelta {
    /// The name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// More of the arguments.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub arguments: Option<String>,
}
