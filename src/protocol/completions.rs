//! `/v1/completions`.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JsonSchemaSource, MatchedStop, OneOrMany, Prompts, StreamOptions, Usage, chat::ResponseFormat};

/// A request for `/v1/completions`: OpenAI's fields, then the usual extensions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"model": "demo", "prompt": "The capital of France is", "max_tokens": 8}))]
pub struct CompletionRequest {
    /// The served base name, `base:adapter`, or an adapter's name.
    #[schema(example = "demo")]
    pub model: String,
    /// What to go on with.
    pub prompt: Prompts,
    /// How many choices to choose the best from; only the value of `n`.
    #[schema(minimum = 1)]
    pub best_of: Option<u32>,
    /// The answer begins with the prompt.
    pub echo: Option<bool>,
    /// Subtracted from a token's logit for each time that it occurs in the output.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of tokens, by id.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Report the log-probabilities of the tokens and of so many likeliest ones.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<u32>,
    /// Most tokens generated for one choice; 0 only with `echo`.
    #[schema(minimum = 0, default = 16)]
    pub max_tokens: Option<u32>,
    /// How many choices for each prompt.
    #[schema(minimum = 1, default = 1)]
    pub n: Option<u32>,
    /// Subtracted once from the logit of each token that occurs in the output.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub presence_penalty: Option<f32>,
    /// The same seed and request give the same tokens.
    pub seed: Option<i64>,
    /// Generation ends before any of these texts.
    pub stop: Option<OneOrMany<String>>,
    /// Answer as server-sent events.
    pub stream: Option<bool>,
    /// Options of the stream.
    pub stream_options: Option<StreamOptions>,
    /// Refused: no text can be put after the answer.
    pub suffix: Option<String>,
    /// 0 is greedy.
    #[schema(minimum = 0, default = 1)]
    pub temperature: Option<f32>,
    /// Smallest set of likeliest tokens whose probabilities sum to at least this.
    #[schema(exclusive_minimum = 0, maximum = 1, default = 1)]
    pub top_p: Option<f32>,
    /// Whom an alias's choice of an adapter sticks to.
    pub user: Option<String>,

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
    /// Extension. The tokenizer adds its beginning-of-sequence token to texts; the default is yes.
    pub add_special_tokens: Option<bool>,
    /// Extension. An adapter's name, or one for each prompt with null for the base model; one in `model` wins.
    pub lora_path: Option<OneOrMany<Option<String>>>,
    /// Extension. Text, any JSON object, or JSON of a schema.
    pub response_format: Option<ResponseFormat>,
    /// Extension. The output is JSON of this schema: an object, or a string with one.
    pub json_schema: Option<JsonSchemaSource>,
    /// Extension. Only 0, which vLLM's clients send: requests have no priorities.
    #[schema(minimum = 0, maximum = 0)]
    pub priority: Option<i64>,
    /// Extension. Only `false`, which routers add: hidden states are not given out.
    pub return_hidden_states: Option<bool>,
    /// Extension. The output matches this regular expression.
    pub regex: Option<String>,
    /// Extension. The output is derived from this grammar.
    pub ebnf: Option<String>,
    /// Extension. The request's id, for `/abort_request`.
    pub rid: Option<String>,
}

/// An answer of `/v1/completions`, and one event of a streamed one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompletionResponse {
    /// Identity of the answer.
    #[schema(example = "cmpl-0a1b2c3d4e5f60718293a4b5c6d7e8f9")]
    #[schema(value_type = String)]
    pub id: Arc<str>,
    /// `text_completion`.
    #[schema(example = "text_completion")]
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
    /// The choices: prompt by prompt, `n` for each.
    pub choices: Vec<CompletionChoice>,
    /// Tokens counted; in a stream where asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub usage: Option<Usage>,
}

/// One choice, or what is new in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompletionChoice {
    /// Its index.
    pub index: u32,
    /// The text.
    pub text: String,
    /// Log-probabilities, if asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null until the choice has ended.
    #[schema(value_type = Option<String>)]
    pub finish_reason: Option<Cow<'static, str>>,
    /// Extension. The stop token's id or the stop text, if one ended it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub matched_stop: Option<MatchedStop>,
}

/// Log-probabilities, one entry a token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Where each token begins in the text, in characters.
    pub text_offset: Vec<u32>,
    /// Natural log-probabilities; null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// The likeliest tokens and their log-probabilities.
    pub top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
}
