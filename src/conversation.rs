//! OpenAI's messages as chat templates want them: plain text contents, arguments as objects, one name for instructions.

use serde_json::{Value, json};

use crate::{
    chat_template::ChatTemplates,
    error::ApiError,
    protocol::chat::{ChatMessage, ContentPart, MessageContent, Role},
};

/// Messages for a template.
///
/// # Errors
/// 400 naming the message and the part that can't be honoured.
pub fn template_messages(messages: &[ChatMessage], templates: Option<&ChatTemplates>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages must not be empty"));
    }
    // "developer" is the newer name of "system"; templates from before it would drop or garble such a message.
    let knows_developer = templates.is_some_and(|templates| templates.mentions("developer"));
    messages
        .iter()
        .enumerate()
        .map(|(index, message)| template_message(index, message, knows_developer))
        .collect()
}

fn template_message(index: usize, message: &ChatMessage, knows_developer: bool) -> Result<Value, ApiError> {
    for (field, value) in [("audio", &message.audio), ("function_call", &message.function_call)] {
        if value.as_ref().is_some_and(|value| !value.is_null()) {
            return Err(ApiError::unsupported(
                &format!("messages[{index}].{field}"),
                "only text and tool_calls are",
            ));
        }
    }
    let content = match &message.content {
        Some(MessageContent::Text(text)) => text.clone(),
        Some(MessageContent::Parts(parts)) if parts.is_empty() => {
            let param = format!("messages[{index}].content");
            return Err(ApiError::invalid(param.clone(), format!("{param} must not be an empty list")));
        }
        Some(MessageContent::Parts(parts)) => text_of_parts(index, parts)?,
        None => without_content(index, message)?,
    };
    let role = match message.role {
        Role::Developer if !knows_developer => Role::System,
        role => role,
    };
    let mut rendered = json!({"role": role, "content": content});
    if let Some(name) = &message.name {
        rendered["name"] = json!(name);
    }
    if let Some(id) = &message.tool_call_id {
        rendered["tool_call_id"] = json!(id);
    }
    if let Some(reasoning) = message.reasoning_content.as_ref().or(message.reasoning.as_ref()) {
        rendered["reasoning_content"] = json!(reasoning);
    }
    if let Some(calls) = message.tool_calls.as_ref().filter(|calls| !calls.is_empty()) {
        if message.role != Role::Assistant {
            return Err(ApiError::invalid(
                format!("messages[{index}].tool_calls"),
                "only an assistant's message has tool_calls",
            ));
        }
        rendered["tool_calls"] = calls
            .iter()
            .map(|call| {
                // Templates print arguments as JSON: a string would be quoted twice. What is no JSON (a call that was cut off)
                // stays the string that it is.
                let arguments = serde_json::from_str(&call.function.arguments).unwrap_or_else(|_| json!(call.function.arguments));
                json!({"id": call.id, "type": call.kind, "function": {"name": call.function.name, "arguments": arguments}})
            })
            .collect();
    }
    Ok(rendered)
}

/// Only an assistant's message may have no content, if it has something in its place.
fn without_content(index: usize, message: &ChatMessage) -> Result<String, ApiError> {
    let calls = message.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty());
    let thinks = message.reasoning_content.is_some() || message.reasoning.is_some();
    if message.role == Role::Assistant && (calls || thinks || message.refusal.is_some()) {
        return Ok(message.refusal.clone().unwrap_or_default());
    }
    let param = format!("messages[{index}].content");
    Err(ApiError::invalid(param.clone(), format!("Missing required parameter: '{param}'.")))
}

fn text_of_parts(index: usize, parts: &[ContentPart]) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (part_index, part) in parts.iter().enumerate() {
        let param = || format!("messages[{index}].content[{part_index}]");
        let text = match part.kind.as_str() {
            "text" => &part.text,
            "refusal" => &part.refusal,
            kind => {
                let message = format!("{}: parts of type '{kind}' are not supported: the model reads text only", param());
                return Err(ApiError::invalid(format!("{}.type", param()), message));
            }
        };
        match text {
            Some(text) => texts.push(text.as_str()),
            None => {
                return Err(ApiError::invalid(
                    param(),
                    format!("{}: a part of type '{}' needs `{}`", param(), part.kind, part.kind),
                ));
            }
        }
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(json: Value) -> Result<Vec<Value>, ApiError> {
        let messages: Vec<ChatMessage> = serde_json::from_value(json).unwrap();
        template_messages(&messages, None)
    }

    #[test]
    fn messages_become_what_templates_print() {
        let rendered = messages(json!([
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": null, "annotations": [], "audio": null, "refusal": null,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "assistant", "content": null, "refusal": "No."},
        ]));
        assert_eq!(
            Value::from(rendered.unwrap()),
            json!([
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "a\nb", "name": "Ann"},
                {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
                {"role": "tool", "content": "2", "tool_call_id": "c1"},
                {"role": "assistant", "content": "No."},
            ])
        );
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        for message in [
            json!({"role": "user"}),
            json!({"role": "user", "content": null}),
            json!({"role": "user", "content": []}),
            json!({"role": "tool", "tool_call_id": "c1"}),
            json!({"role": "assistant", "content": null, "tool_calls": []}),
        ] {
            let error = messages(json!([{"role": "user", "content": "x"}, message])).unwrap_err();
            assert_eq!(error.param(), Some("messages[1].content"), "{message}");
        }
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
        assert_eq!(messages(image).unwrap_err().param(), Some("messages[0].content[0].type"));
        assert_eq!(messages(json!([])).unwrap_err().param(), Some("messages"));
        let audio = json!([{"role": "assistant", "content": "x", "audio": {"id": "a"}}]);
        assert_eq!(messages(audio).unwrap_err().param(), Some("messages[0].audio"));
    }
}
