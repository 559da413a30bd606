//! Wire types: serde and OpenAPI only, no engine types. Requests refuse fields that they don't know, so that nothing is silently
//! ignored; fields that are known but can't be honoured are refused by the routes, with a reason.

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, SeqAccess, Visitor},
};
use serde_json::{Map, Value};
use utoipa::ToSchema;

pub mod adapters;
pub mod aliases;
pub mod chat;
pub mod completions;
pub mod generate;
pub mod models;
pub mod responses;
pub mod server;
mod shape;
pub mod tokenize;

/// One value, or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// As a list.
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

// By hand, so that an error says what is wrong and where; serde's untagged enums say "did not match any variant".
impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrManyVisitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrManyVisitor<T> {
            type Value = OneOrMany<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a value or a list of values")
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
                T::deserialize(Present(de::value::StrDeserializer::new(value))).map(OneOrMany::One)
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Self::Value, E> {
                T::deserialize(Present(de::value::BoolDeserializer::new(value))).map(OneOrMany::One)
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
                T::deserialize(Present(de::value::U64Deserializer::new(value))).map(OneOrMany::One)
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
                T::deserialize(Present(de::value::I64Deserializer::new(value))).map(OneOrMany::One)
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Self::Value, E> {
                T::deserialize(Present(de::value::F64Deserializer::new(value))).map(OneOrMany::One)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(Present(de::value::MapAccessDeserializer::new(map))).map(OneOrMany::One)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(OneOrMany::Many)
            }
        }
        deserializer.deserialize_any(OneOrManyVisitor(std::marker::PhantomData))
    }
}

/// A value that is there: an `Option` of it is `Some`. serde's value deserializers don't say so themselves.
struct Present<D>(D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Present<D> {
    type Error = D::Error;
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_any(visitor)
    }
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        visitor.visit_some(self.0)
    }
    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct seq tuple
        tuple_struct map struct enum identifier ignored_any
    }
}

/// A JSON schema.
#[derive(ToSchema)]
#[schema(value_type = Object)]
pub struct JsonSchemaObject(#[expect(dead_code, reason = "only its schema is used")] Map<String, Value>);

/// A JSON schema: an object, or a string with one.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum JsonSchemaSource {
    /// The schema.
    #[schema(value_type = JsonSchemaObject)]
    Object(Map<String, Value>),
    /// The schema, as JSON in a string.
    #[schema(title = "Text")]
    Text(String),
}

// By hand, as serde's untagged enums say "did not match any variant".
impl<'de> Deserialize<'de> for JsonSchemaSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Object(schema) => Ok(Self::Object(schema)),
            Value::String(text) => Ok(Self::Text(text)),
            other => Err(de::Error::custom(format!(
                "{other}, expected a JSON schema: an object, or a string with one"
            ))),
        }
    }
}

/// What ended a text before its bound.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum MatchedStop {
    /// The id of an end-of-sequence or stop token.
    #[schema(title = "Token")]
    Token(u32),
    /// A stop text.
    #[schema(title = "Text")]
    Text(String),
}

/// A prompt, or several: text or token ids.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Prompts {
    /// One text.
    #[schema(title = "Text")]
    Text(String),
    /// Texts.
    #[schema(title = "Texts")]
    Texts(Vec<String>),
    /// The token ids of one prompt.
    #[schema(title = "Ids")]
    Ids(Vec<u32>),
    /// The token ids of several prompts.
    #[schema(title = "ListsOfIds")]
    ListsOfIds(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptsVisitor;
        impl<'de> Visitor<'de> for PromptsVisitor {
            type Value = Prompts;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string, a list of strings, a list of token ids, or a list of lists of token ids")
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Prompts, E> {
                Ok(Prompts::Text(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
                let Some(first) = seq.next_element()? else {
                    return Ok(Prompts::Texts(Vec::new()));
                };
                fn rest<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(first: T, mut seq: A) -> Result<Vec<T>, A::Error> {
                    let mut all = vec![first];
                    while let Some(next) = seq.next_element()? {
                        all.push(next);
                    }
                    Ok(all)
                }
                match first {
                    Element::Text(first) => rest(first, seq).map(Prompts::Texts),
                    Element::Id(first) => rest(first, seq).map(Prompts::Ids),
                    Element::Ids(first) => rest(first, seq).map(Prompts::ListsOfIds),
                }
            }
        }
        deserializer.deserialize_any(PromptsVisitor)
    }
}

enum Element {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string, a token id, or a list of token ids")
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Element, E> {
                Ok(Element::Text(value.to_owned()))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Element, E> {
                u32::try_from(value)
                    .map(Element::Id)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Element, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(Element::Ids)
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

/// Options of a stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct StreamOptions {
    /// A last chunk carries the usage of the whole request.
    #[serde(default)]
    pub include_usage: Option<bool>,
    /// Every chunk carries the usage so far.
    #[serde(default)]
    pub continuous_usage_stats: Option<bool>,
    /// OpenAI's padding against traffic analysis; `true` is refused.
    #[serde(default)]
    pub include_obfuscation: Option<bool>,
}

/// Tokens counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompt (counted once for `n` choices).
    pub prompt_tokens: u32,
    /// Tokens generated, over all choices, end-of-sequence tokens included.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
    /// Where the prompt tokens came from.
    pub prompt_tokens_details: PromptTokensDetails,
    /// What the generated tokens were.
    pub completion_tokens_details: CompletionTokensDetails,
}

impl Usage {
    /// From counts.
    pub fn new(prompt_tokens: u32, completion_tokens: u32, cached_tokens: u32, reasoning_tokens: u32) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
            completion_tokens_details: CompletionTokensDetails { reasoning_tokens },
        }
    }
}

/// Where the prompt tokens came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Found in the prefix cache.
    pub cached_tokens: u32,
}

/// What the generated tokens were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CompletionTokensDetails {
    /// Spent on reasoning before the answer.
    pub reasoning_tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(json: &str) -> Result<Prompts, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn one_name_or_a_list_with_nulls_is_read() {
        let read = |json: &str| serde_json::from_str::<OneOrMany<Option<String>>>(json).unwrap();
        assert_eq!(read(r#""a""#), OneOrMany::One(Some("a".into())));
        assert_eq!(read(r#"["a", null]"#), OneOrMany::Many(vec![Some("a".into()), None]));
        assert_eq!(serde_json::from_str::<OneOrMany<u32>>("3").unwrap(), OneOrMany::One(3));
    }

    #[test]
    fn all_forms_of_a_prompt_are_read() {
        assert_eq!(prompts(r#""a""#), Ok(Prompts::Text("a".into())));
        assert_eq!(prompts(r#"["a", "b"]"#), Ok(Prompts::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(prompts("[1, 2]"), Ok(Prompts::Ids(vec![1, 2])));
        assert_eq!(prompts("[[1], [2, 3]]"), Ok(Prompts::ListsOfIds(vec![vec![1], vec![2, 3]])));
    }

    #[test]
    fn mixed_and_odd_prompts_are_refused_with_what_is_wrong() {
        for (json, what) in [
            (r#"["a", 1]"#, "integer `1`, expected a string"),
            (r#"[1, "a"]"#, "string \"a\", expected u32"),
            ("[-1]", "integer `-1`"),
            ("[4294967296]", "4294967296"),
            ("true", "boolean `true`, expected a string, a list of strings"),
            ("[null]", "null"),
        ] {
            let error = prompts(json).unwrap_err();
            assert!(error.contains(what), "{json}: {error}");
        }
    }

    #[test]
    fn one_or_many_says_what_is_wrong_inside() {
        let read = |json: &str| serde_json::from_str::<OneOrMany<String>>(json).map_err(|error| error.to_string());
        assert_eq!(read(r#""x""#), Ok(OneOrMany::One("x".into())));
        assert_eq!(read(r#"["x"]"#), Ok(OneOrMany::Many(vec!["x".into()])));
        assert!(read("[1]").unwrap_err().contains("integer `1`, expected a string"));
        assert!(read("1").unwrap_err().contains("integer `1`, expected a string"));
    }
}
