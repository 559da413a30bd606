//! JSON objects come as objects, names as strings.
//!
//! serde's derived code also takes a list for an object, its values in the order of the fields (`["user", "Hello"]` for a message), and an
//! object with a null for a name (`{"auto": null}`). Neither is in the document. The types that stand in requests are derived with
//! `#[serde(remote = "Self")]`, which leaves the derived code as functions of the type's own, and get the traits here.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Visitor};

use super::{StreamOptions, adapters, chat, generate, responses};

/// Whatever is asked for, an object is read.
struct ObjectOnly<D>(D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for ObjectOnly<D> {
    type Error = D::Error;
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(visitor)
    }
    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct seq tuple
        tuple_struct map struct enum identifier ignored_any
    }
}

/// A variant's name is read from a string.
struct TextOnly<D>(D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for TextOnly<D> {
    type Error = D::Error;
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        struct NameVisitor<V>(V);
        impl<'de, V: Visitor<'de>> Visitor<'de> for NameVisitor<V> {
            type Value = V::Value;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<V::Value, E> {
                self.0.visit_enum(serde::de::value::StrDeserializer::new(name))
            }
        }
        self.0.deserialize_str(NameVisitor(visitor))
    }
    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct seq tuple
        tuple_struct map struct enum identifier ignored_any
    }
}

macro_rules! read_by {
    ($reader:ident: $($kind:ty),* $(,)?) => {
        $(
            // Inside, the function of the type's own that `remote = "Self"` leaves comes before the trait's.
            impl<'de> Deserialize<'de> for $kind {
                fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                    <$kind>::deserialize($reader(deserializer))
                }
            }
            impl Serialize for $kind {
                fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                    <$kind>::serialize(self, serializer)
                }
            }
        )*
    };
}

read_by!(ObjectOnly:
    StreamOptions, chat::ChatMessage, chat::ContentPart, chat::Tool, chat::FunctionDefinition, chat::NamedToolChoice, chat::FunctionName,
    chat::ResponseFormat, chat::JsonSchemaFormat, chat::ToolCall, chat::FunctionCall, generate::NativeSamplingParams, responses::InputItem,
    responses::FunctionTool, responses::NamedFunction, responses::TextSettings, responses::TextFormat, responses::ReasoningSettings,
    adapters::DynamoSource,
);
read_by!(TextOnly: chat::Role, chat::ToolChoiceMode);

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;

    use super::*;

    fn check<T: DeserializeOwned>(good: &str, bad: &[&str]) {
        serde_json::from_str::<T>(good).unwrap_or_else(|error| panic!("{good}: {error}"));
        for json in bad {
            assert!(serde_json::from_str::<T>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn a_list_is_no_object_wherever_it_stands() {
        check::<chat::ChatMessage>(
            r#"{"role": "user", "content": "Hello"}"#,
            &[
                r#"["user", "Hello"]"#,
                r#"{"role": "user", "content": [["text", "Hello"]]}"#,
                r#"{"role": "assistant", "tool_calls": [["call_1", "function", {"name": "f", "arguments": "{}"}]]}"#,
            ],
        );
        check::<chat::ToolChoice>(
            r#"{"type": "function", "function": {"name": "f"}}"#,
            &[r#"["function", {"name": "f"}]"#, r#"{"type": "function", "function": ["f"]}"#],
        );
        // Behind a tag or without one, serde reads from a copy of its own.
        check::<chat::ResponseFormat>(
            r#"{"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}"#,
            &[r#"["text"]"#, r#"{"type": "json_schema", "json_schema": ["n", null, {}]}"#],
        );
        check::<responses::Input>(r#"[{"role": "user", "content": "Hello"}]"#, &[r#"[["message", "user", "Hello"]]"#]);
        check::<responses::TextSettings>(r#"{"format": {"type": "text"}}"#, &["[null]", r#"{"format": ["text"]}"#]);
        check::<responses::ReasoningSettings>("{}", &["[]", r#"["low", null]"#]);
        check::<generate::GenerateRequest>(
            r#"{"text": "Hello", "sampling_params": {"temperature": 0}}"#,
            &[r#"{"text": "Hello", "sampling_params": [[1]]}"#],
        );
    }

    #[test]
    fn a_name_is_a_string() {
        check::<chat::Role>(r#""user""#, &[r#"{"user": null}"#, r#""robot""#, "0"]);
        check::<chat::ToolChoice>(r#""auto""#, &[r#"{"auto": null}"#]);
    }
}
