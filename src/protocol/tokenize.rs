//! `/tokenize` and `/detokenize`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat::ChatMessage;

/// A request for `/tokenize`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"prompt": "The capital of France is"}))]
pub struct TokenizeRequest {
    /// The served base name, `base:adapter`, or an adapter's name; all have the same tokenizer.
    pub model: Option<String>,
    /// The text.
    pub prompt: Option<String>,
    /// Another name of `prompt`.
    pub text: Option<String>,
    /// A conversation, instead of a text.
    pub messages: Option<Vec<ChatMessage>>,
    /// The tokenizer adds its beginning-of-sequence token; the default is yes for a text, no for a conversation.
    pub add_special_tokens: Option<bool>,
    /// A conversation ends with the header of an assistant's message; the default is yes.
    pub add_generation_prompt: Option<bool>,
    /// Handed to the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Write the tokens as the vocabulary spells them, too.
    pub return_token_strs: Option<bool>,
}

/// Token ids.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// Most tokens of prompt and output together.
    pub max_model_len: usize,
    /// The ids.
    pub tokens: Vec<u32>,
    /// As the vocabulary spells them, if asked for.
    pub token_strs: Option<Vec<String>>,
}

/// A request for `/detokenize`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"tokens": [1, 2, 3]}))]
pub struct DetokenizeRequest {
    /// The served base name, `base:adapter`, or an adapter's name; all have the same tokenizer.
    pub model: Option<String>,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Leave out special tokens; the default is no.
    pub skip_special_tokens: Option<bool>,
}

/// Text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DetokenizeResponse {
    /// The text, under vLLM's name.
    pub prompt: String,
    /// The text, under SGLang's name.
    pub text: String,
}
