//! Chat templates: the Jinja that models are published with, run as Hugging Face's `apply_chat_template` runs it.

use std::collections::BTreeMap;

use minijinja::{Environment, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};
use serde::Serialize;

/// Why a template can't be used, or a conversation not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template is no valid Jinja.
    #[error("chat template {name:?}: {reason}")]
    Syntax {
        /// Its name.
        name: String,
        /// What and where.
        reason: String,
    },
    /// The template refused the conversation, or failed on it.
    #[error("the chat template refused the messages: {0}")]
    Render(String),
    /// `continue_final_message` asks for what the template doesn't give.
    #[error("continue_final_message: the chat template does not show the final message's content as it is")]
    FinalMessageAltered,
}

/// Instructions that one rendering may take, so that no template can keep a thread for ever. A long conversation takes some 100 000.
const MAX_STEPS: u64 = 5_000_000;
/// The template for plain chat.
const DEFAULT: &str = "default";
/// The template that models with several use when tools are given.
const TOOL_USE: &str = "tool_use";

/// Bytes of memory that compiled templates take for each byte of their sources, and whatever these are: 0.5 to 4 were measured for 7 KB.
const MEMORY_FOR_SOURCE: usize = 5;
const MEMORY_FOR_TEMPLATES: usize = 8 << 10;

/// What goes into a template beside the messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SpecialTokens {
    /// `bos_token`, …: names and texts from `tokenizer_config.json`.
    pub by_name: BTreeMap<String, String>,
}

impl SpecialTokens {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}

/// One conversation to be rendered.
#[derive(Debug, Serialize)]
pub struct ChatInput<'a> {
    /// OpenAI's messages.
    pub messages: &'a [serde_json::Value],
    /// OpenAI's tools, if any.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Ends with the header of an assistant's message.
    pub add_generation_prompt: bool,
    /// Ends right after the final message's content, so that the model goes on with it.
    #[serde(skip)]
    pub continue_final_message: bool,
    /// Handed to the template as they are.
    #[serde(skip)]
    pub kwargs: Option<&'a serde_json::Map<String, serde_json::Value>>,
}

/// The templates of one model.
pub struct ChatTemplates {
    environment: Environment<'static>,
    special_tokens: SpecialTokens,
    sources: BTreeMap<String, String>,
}

impl ChatTemplates {
    /// An estimate of what compiled templates take of memory.
    pub fn memory_bytes(sources: &BTreeMap<String, String>) -> usize {
        MEMORY_FOR_TEMPLATES + sources.values().map(|source| MEMORY_FOR_SOURCE * source.len()).sum::<usize>()
    }

    /// Compiles templates by name; at least `default` is wanted.
    ///
    /// # Errors
    /// `Syntax`.
    pub fn new(templates: BTreeMap<String, String>, special_tokens: SpecialTokens) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        // As transformers compiles them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        for (name, source) in &templates {
            environment
                .add_template_owned(name.clone(), without_generation_tags(source))
                .map_err(|error| TemplateError::Syntax {
                    name: name.clone(),
                    reason: describe(&error),
                })?;
        }
        Ok(Self {
            environment,
            special_tokens,
            sources: templates,
        })
    }

    /// Whether the template for plain chat mentions a word: how to tell what a model's template knows.
    pub fn mentions(&self, word: &str) -> bool {
        self.sources.values().any(|source| source.contains(word))
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// `Render` with the template's own words; `FinalMessageAltered`.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, TemplateError> {
        let name = if input.tools.is_some() && self.sources.contains_key(TOOL_USE) {
            TOOL_USE
        } else {
            DEFAULT
        };
        let failed = |error: minijinja::Error| TemplateError::Render(describe(&error));
        let template = self.environment.get_template(name).map_err(failed)?;
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, text) in &self.special_tokens.by_name {
            context.insert(name, Value::from(text.as_str()));
        }
        context.insert("documents", Value::from(()));
        context.insert("messages", Value::from(Serde(input.messages)));
        context.insert("tools", Value::from(Serde(input.tools)));
        context.insert("add_generation_prompt", Value::from(input.add_generation_prompt));
        for (name, value) in input.kwargs.into_iter().flatten() {
            context.insert(name, Value::from(Serde(value)));
        }
        let rendered = template.render(context).map_err(failed)?;
        if input.continue_final_message {
            return up_to_final_message(rendered, input.messages);
        }
        Ok(rendered)
    }
}

/// Cuts what the template wrote after the final message's content.
fn up_to_final_message(mut rendered: String, messages: &[serde_json::Value]) -> Result<String, TemplateError> {
    let content = messages.last().and_then(|message| message["content"].as_str()).unwrap_or_default();
    // Templates trim contents or not; the place is found either way.
    let content = if rendered.contains(content) { content } else { content.trim() };
    match rendered.rfind(content) {
        Some(start) if !content.is_empty() => {
            rendered.truncate(start + content.len());
            Ok(rendered)
        }
        _ => Err(TemplateError::FinalMessageAltered),
    }
}

/// `{% generation %}` marks what training counts; it changes no text, and Jinja doesn't know it.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // After the opening: the `%` of `{%}` is not the closing one's, too.
        let Some(len) = rest[start + 2..].find("%}") else { break };
        let tag = &rest[start..start + len + 4];
        let word = tag[2..tag.len() - 2].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..start]);
        match word {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = &rest[start + len + 4..];
    }
    out.push_str(rest);
    out
}

fn describe(error: &minijinja::Error) -> String {
    let mut text = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    // What `raise_exception` says is the template author's sentence to the user; a place in the template would only blur it.
    if error.kind() != ErrorKind::InvalidOperation
        && let Some(line) = error.line()
    {
        text.push_str(&format!(" (line {line} of the template)"));
    }
    text
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let bad = |reason: String| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {reason}"));
    let format = time::format_description::parse_strftime_borrowed(format).map_err(|error| bad(error.to_string()))?;
    let now = time::OffsetDateTime::now_local().unwrap_or_else(|_| time::OffsetDateTime::now_utc());
    now.format(&format).map_err(|error| bad(error.to_string()))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: what models were trained on, so nothing is escaped for HTML.
fn tojson(value: &Value, indent: Option<Value>, kwargs: minijinja::value::Kwargs) -> Result<String, minijinja::Error> {
    let bad = |error: &dyn std::fmt::Display| minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {error}"));
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<Value>>("indent")?,
    };
    // Python's other options are taken where they say what happens anyway.
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    let _: Option<Value> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let mut json = serde_json::to_value(value).map_err(|error| bad(&error))?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    match indent.filter(|indent| !indent.is_none() && !indent.is_undefined()) {
        Some(indent) => {
            let spaces = " ".repeat(usize::try_from(indent)?.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
    }
    .map_err(|error| bad(&error))?;
    String::from_utf8(out).map_err(|error| bad(&error))
}

/// `, ` and `: ` between things, as Python writes JSON.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    fn templates(template: &str) -> ChatTemplates {
        let special_tokens = SpecialTokens {
            by_name: [("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())].into(),
        };
        ChatTemplates::new([(DEFAULT.to_owned(), template.to_owned())].into(), special_tokens).unwrap()
    }

    fn render(template: &str, messages: &[Json]) -> Result<String, TemplateError> {
        let input = ChatInput {
            messages,
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: None,
        };
        templates(template).render(&input)
    }

    const CHATML: &str = "{{ bos_token }}{% for m in messages %}\n  {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}\n\
        {% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        let rendered = render(CHATML, &[json!({"role": "user", "content": "Hi <&>"})]).unwrap();
        assert_eq!(rendered, "<s><|im_start|>user\nHi <&><|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn what_the_template_raises_reaches_the_user() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert_eq!(error.to_string(), "the chat template refused the messages: roles must alternate");
    }

    #[test]
    fn json_is_python_s() {
        let message = json!({"role": "user", "content": {"b": ["é", 1, 2.0, null, true], "a": "<x>"}});
        assert_eq!(
            render("{{ messages[0].content | tojson }}", std::slice::from_ref(&message)).unwrap(),
            r#"{"b": ["é", 1, 2.0, null, true], "a": "<x>"}"#
        );
        let indented = render("{{ messages[0].content | tojson(indent=2) }}", &[message]).unwrap();
        assert_eq!(
            indented,
            "{\n  \"b\": [\n    \"é\",\n    1,\n    2.0,\n    null,\n    true\n  ],\n  \"a\": \"<x>\"\n}"
        );
    }

    #[test]
    fn python_methods_loop_controls_and_generation_tags_work() {
        let template = "{%- for m in messages %}{% if m.role.startswith('sys') %}{% continue %}{% endif %}\
            {%- generation %}{{ m.content.strip().upper() }}{% endgeneration %}{% endfor %}";
        let messages = [json!({"role": "system", "content": "no"}), json!({"role": "user", "content": " yes "})];
        assert_eq!(render(template, &messages).unwrap(), "YES");
        assert_eq!(render("{{ strftime_now('%Y') | length }}", &[]).unwrap(), "4");
    }

    #[test]
    fn a_final_message_is_continued_where_it_ends() {
        let messages = [
            json!({"role": "user", "content": "Hi"}),
            json!({"role": "assistant", "content": "Sure, "}),
        ];
        let input = |messages| ChatInput {
            messages,
            tools: None,
            add_generation_prompt: false,
            continue_final_message: true,
            kwargs: None,
        };
        let rendered = templates(CHATML).render(&input(&messages)).unwrap();
        assert!(rendered.ends_with("<|im_start|>assistant\nSure, "), "{rendered:?}");
        let error = templates("nothing").render(&input(&messages)).unwrap_err();
        assert!(matches!(error, TemplateError::FinalMessageAltered));
    }

    #[test]
    fn kwargs_tools_and_the_tool_template_are_used() {
        let sources = [(DEFAULT, "{{ mode }}{{ tools is none }}"), (TOOL_USE, "T{{ tools[0].name }}")];
        let templates = ChatTemplates::new(sources.map(|(name, text)| (name.into(), text.into())).into(), SpecialTokens::default()).unwrap();
        let kwargs = json!({"mode": "fast"});
        let mut input = ChatInput {
            messages: &[],
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: kwargs.as_object(),
        };
        assert_eq!(templates.render(&input).unwrap(), "fastTrue");
        let tools = [json!({"name": "f"})];
        input.tools = Some(&tools);
        assert_eq!(templates.render(&input).unwrap(), "Tf");
    }

    #[test]
    fn bad_jinja_is_an_error_with_its_place() {
        let sources = [(DEFAULT.to_owned(), "{% if %}".to_owned())].into();
        let error = ChatTemplates::new(sources, SpecialTokens::default()).err().unwrap().to_string();
        assert!(error.contains("default") && error.contains("line 1"), "{error}");
    }
}
