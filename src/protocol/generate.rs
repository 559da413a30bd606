//! `/generate`, SGLang's native route.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JsonSchemaSource, MatchedStop, OneOrMany};

/// A request for `/generate`: one prompt or a batch, as `text` or as `input_ids`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "text": ["List 3 countries and their capitals.", "List 3 countries and their capitals."],
    "sampling_params": {"max_new_tokens": 32, "temperature": 0},
    "lora_path": ["sql", null],
}))]
pub struct GenerateRequest {
    /// One prompt, or several.
    pub text: Option<OneOrMany<String>>,
    /// The token ids of one prompt, or of several.
    pub input_ids: Option<InputIds>,
    /// Settings for all prompts, or one for each.
    #[schema(value_type = Option<SamplingParamsOrList>)]
    pub sampling_params: Option<OneOrMany<NativeSamplingParams>>,
    /// Answer as server-sent events, each with the text so far.
    pub stream: Option<bool>,
    /// Report the log-probabilities of tokens, for all prompts or for each.
    pub return_logprob: Option<OneOrMany<bool>>,
    /// First prompt token whose log-probability is reported; -1 for output tokens only.
    pub logprob_start_len: Option<OneOrMany<i64>>,
    /// How many likeliest tokens to report at each position.
    pub top_logprobs_num: Option<OneOrMany<u32>>,
    /// Write the text of tokens beside their log-probabilities.
    pub return_text_in_logprobs: Option<bool>,
    /// Write the prompt's token ids into the answer.
    pub return_prompt_token_ids: Option<bool>,
    /// An adapter's name for all prompts, or one for each with null for the base model.
    pub lora_path: Option<OneOrMany<Option<String>>>,
    /// The request's id, or one for each prompt.
    pub rid: Option<OneOrMany<String>>,
    /// Not interpreted.
    pub no_logs: Option<bool>,
    /// Not interpreted.
    pub log_metrics: Option<bool>,
    /// The served base name, which routers add; adapters are named by `lora_path`.
    pub model: Option<String>,
    /// Only `false`, which routers add: hidden states are not given out.
    pub return_hidden_states: Option<bool>,
    /// Only `false`, which routers add: requests don't outlive their connection.
    pub background: Option<bool>,
    /// Only `false`, which routers add: answers are text.
    pub return_bytes: Option<bool>,
    /// Only `false`, which routers add: entropies are not given out.
    pub return_entropy: Option<bool>,
}

/// `OneOrMany<NativeSamplingParams>` in the document, where a generic type's parameter would be written out twice.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
enum SamplingParamsOrList {
    /// For all prompts.
    One(Box<NativeSamplingParams>),
    /// One for each.
    #[schema(title = "Many")]
    Many(Vec<NativeSamplingParams>),
}

/// The token ids of one prompt, or of several.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum InputIds {
    /// Of one.
    #[schema(title = "One")]
    One(Vec<u32>),
    /// Of several.
    #[schema(title = "Many")]
    Many(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for InputIds {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use super::Prompts;
        match Prompts::deserialize(deserializer)? {
            Prompts::Ids(ids) => Ok(Self::One(ids)),
            Prompts::ListsOfIds(lists) => Ok(Self::Many(lists)),
            Prompts::Texts(texts) if texts.is_empty() => Ok(Self::One(Vec::new())),
            Prompts::Text(_) | Prompts::Texts(_) => Err(serde::de::Error::custom(
                "expected a list of token ids or a list of lists of token ids, got text (that goes into `text`)",
            )),
        }
    }
}

/// SGLang's sampling settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct NativeSamplingParams {
    /// Most output tokens; null for as many as the context allows.
    #[serde(default, deserialize_with = "null_is_some")]
    #[schema(value_type = Option<u32>, minimum = 0, default = 128)]
    pub max_new_tokens: Option<Option<u32>>,
    /// No end before so many tokens.
    #[schema(minimum = 0, default = 0)]
    pub min_new_tokens: Option<u32>,
    /// 0 is greedy.
    #[schema(minimum = 0, default = 1)]
    pub temperature: Option<f32>,
    /// Smallest set of likeliest tokens whose probabilities sum to at least this.
    #[schema(exclusive_minimum = 0, maximum = 1, default = 1)]
    pub top_p: Option<f32>,
    /// Only the `top_k` likeliest tokens; 0 and -1 are all.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Tokens with at least `min_p` times the likeliest one's probability.
    #[schema(minimum = 0, maximum = 1, default = 0)]
    pub min_p: Option<f32>,
    /// Subtracted from a token's logit for each time that it occurs in the output.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub frequency_penalty: Option<f32>,
    /// Subtracted once from the logit of each token that occurs in the output.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub presence_penalty: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens that occur in prompt or output.
    #[schema(exclusive_minimum = 0, maximum = 2, default = 1)]
    pub repetition_penalty: Option<f32>,
    /// Generation ends before any of these texts.
    pub stop: Option<OneOrMany<String>>,
    /// Generation ends with any of these tokens.
    pub stop_token_ids: Option<Vec<u32>>,
    /// How many outputs for each prompt; equal for all prompts.
    #[schema(minimum = 1, default = 1)]
    pub n: Option<u32>,
    /// The output is JSON of this schema (a string with JSON, or an object).
    pub json_schema: Option<JsonSchemaSource>,
    /// The output matches this regular expression.
    pub regex: Option<String>,
    /// The output is derived from this grammar.
    pub ebnf: Option<String>,
    /// The model's end-of-sequence tokens don't end generation.
    pub ignore_eos: Option<bool>,
    /// The text or token that stopped generation stays in the answer.
    pub no_stop_trim: Option<bool>,
    /// Special tokens are left out of the text; the default is yes.
    pub skip_special_tokens: Option<bool>,
    /// Only `true`, which the tokenizers here always do.
    pub spaces_between_special_tokens: Option<bool>,
    /// Added to the logits of tokens, by id.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed and request give the same tokens.
    pub sampling_seed: Option<i64>,
}

/// An absent field and null differ.
fn null_is_some<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u32>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// One output of `/generate`; a batch, or `n` > 1, answers with a list, prompt by prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GenerateResponse {
    /// Which output, in a stream of several.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub index: Option<u32>,
    /// The text; in a stream, all of it so far.
    pub text: String,
    /// The output's token ids; in a stream, all of them so far.
    pub output_ids: Vec<u32>,
    /// The prompt's token ids, if asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// About this output.
    pub meta_info: MetaInfo,
}

/// One output, or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum GenerateResponses {
    /// Of one prompt.
    One(Box<GenerateResponse>),
    /// Of a batch, or of `n` > 1.
    #[schema(title = "Many")]
    Many(Vec<GenerateResponse>),
}

/// About one output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetaInfo {
    /// The request's id.
    pub id: String,
    /// Null until the end.
    pub finish_reason: Option<NativeFinishReason>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
    /// Seconds since the request came.
    pub e2e_latency: f64,
    /// The adapter that generated this; null for the base model.
    pub lora: Option<String>,
    /// Identifies the model's and the adapter's weights.
    pub weight_version: String,
    /// `[logprob or null, token id, text or null]` of prompt tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<Vec<Vec<LogprobTripleEntry>>>)]
    pub input_token_logprobs: Option<Vec<LogprobTriple>>,
    /// The same of output tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<Vec<Vec<LogprobTripleEntry>>>)]
    pub output_token_logprobs: Option<Vec<LogprobTriple>>,
    /// For each prompt position the likeliest tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<Vec<Option<Vec<Vec<LogprobTripleEntry>>>>>)]
    pub input_top_logprobs: Option<Vec<Option<Vec<LogprobTriple>>>>,
    /// For each output position the likeliest tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<Vec<Option<Vec<Vec<LogprobTripleEntry>>>>>)]
    pub output_top_logprobs: Option<Vec<Option<Vec<LogprobTriple>>>>,
}

/// `[logprob or null, token id, text or null]`.
pub type LogprobTriple = (Option<f32>, u32, Option<String>);

/// An entry of [`LogprobTriple`], in the document. A tuple's own schema ends in `items: false`, which generators of clients can't read.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
enum LogprobTripleEntry {
    /// A log-probability, or a token's id.
    #[schema(title = "Number")]
    Number(f64),
    /// A token's text.
    #[schema(title = "Text")]
    Text(Option<String>),
}

/// Why an output ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum NativeFinishReason {
    /// An end-of-sequence or stop token, a stop text, or a complete grammar.
    #[schema(title = "StopReason")]
    Stop {
        /// The token's id, the text, or null.
        matched: Option<MatchedStop>,
    },
    /// As many tokens as were asked for, or as fit.
    #[schema(title = "LengthReason")]
    Length {
        /// So many.
        length: u32,
    },
    /// Ended by `/abort_request`.
    #[schema(title = "AbortReason")]
    Abort {
        /// What happened.
        message: String,
    },
}
