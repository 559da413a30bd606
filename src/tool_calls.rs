//! Calls of functions in what a model writes: Hermes' (Qwen's), Llama 3's and Mistral's notations, read as the text comes, and
//! written as grammars where a call is required.

use serde_json::{Value, json};

use crate::{
    chat_template::ChatTemplates,
    constraint::guided_schema,
    protocol::chat::{NamedToolChoice, Tool, ToolChoice, ToolChoiceMode},
    reasoning::open_suffix,
    tokenizer::TextTokenizer,
};

/// How a model writes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`, one for each call.
    Hermes,
    /// `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`; several with `;` between.
    Llama3,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}`.
    Mistral,
}

const HERMES_OPEN: &str = "<tool_call>";
const HERMES_CLOSE: &str = "</tool_call>";
const MISTRAL_OPEN: &str = "[TOOL_CALLS]";
const MISTRAL_ARGUMENTS: &str = "[ARGS]";
const LLAMA_OPEN: &str = "<|python_tag|>";

impl ToolFormat {
    /// The notation that a model's chat template teaches it.
    pub fn of(templates: Option<&ChatTemplates>) -> Self {
        let mentions = |word: &str| templates.is_some_and(|templates| templates.mentions(word));
        if mentions(MISTRAL_OPEN) {
            Self::Mistral
        } else if mentions(HERMES_OPEN) {
            Self::Hermes
        } else if mentions(LLAMA_OPEN) || mentions("\"parameters\":") {
            Self::Llama3
        } else {
            Self::Hermes
        }
    }

    /// Special tokens that are part of the notation: they have to show in the text.
    pub fn shown_tokens(self, tokenizer: &TextTokenizer) -> Vec<u32> {
        let tags: &[&str] = match self {
            Self::Hermes => &[HERMES_OPEN, HERMES_CLOSE],
            Self::Llama3 => &[LLAMA_OPEN],
            Self::Mistral => &[MISTRAL_OPEN, MISTRAL_ARGUMENTS],
        };
        tags.iter().filter_map(|tag| tokenizer.token_to_id(tag)).collect()
    }

    /// Tools told in words, for a model whose template has no place for them.
    pub fn instructions(self, tools: &[Value]) -> String {
        let list: String = tools.iter().map(|tool| format!("{tool}\n")).collect();
        let example = match self {
            Self::Hermes => "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>",
            Self::Llama3 => "{\"name\": <function-name>, \"parameters\": <args-json-object>}",
            Self::Mistral => "[TOOL_CALLS][{\"name\": <function-name>, \"arguments\": <args-json-object>}]",
        };
        format!("You may call these functions:\n{list}To call one, write:\n{example}")
    }

    /// A Lark grammar of one call, or of one or more if `parallel`, of these functions.
    ///
    /// # Errors
    /// A schema that is none.
    pub fn grammar(self, tools: &[&Tool], parallel: bool, tokenizer: &TextTokenizer) -> Result<String, String> {
        let call = self.call("call", tokenizer);
        let more = |separator: &str| if parallel { format!(" ({separator} {call})*") } else { String::new() };
        let start = match self {
            Self::Hermes => format!("{call}{}", more(r#""\n""#)),
            Self::Llama3 => format!("{call}{}", more(r#""; ""#)),
            Self::Mistral => format!("{} \"[\" {call}{} \"]\"", tag(MISTRAL_OPEN, tokenizer), more(r#"", ""#)),
        };
        Ok(format!("start: {start}\n{}", self.rules(tools)?))
    }

    /// A Lark grammar of any text in which calls, where the model begins one, are calls of these functions. Those that are `strict` get
    /// arguments that follow their schema, the others any object.
    ///
    /// # Errors
    /// A schema that is none.
    pub fn free_grammar(self, tools: &[&Tool], parallel: bool, tokenizer: &TextTokenizer) -> Result<String, String> {
        let lenient: Vec<Tool> = tools.iter().map(|&tool| lenient_unless_strict(tool)).collect();
        let lenient: Vec<&Tool> = lenient.iter().collect();
        let rules = self.rules(&lenient)?;
        let repeat = if parallel { "*" } else { "?" };
        let call = self.call("call", tokenizer);
        let (start, text) = match self {
            Self::Hermes => {
                let (to_call, text) = up_to(HERMES_OPEN, tokenizer);
                let call = call.strip_prefix(&tag(HERMES_OPEN, tokenizer)).unwrap_or(&call);
                (format!("(to_call {call}){repeat} TEXT?"), format!("{to_call}\n{text}"))
            }
            Self::Mistral => {
                let (to_call, text) = up_to(MISTRAL_OPEN, tokenizer);
                let more = if parallel { format!(" (\", \" {call})*") } else { String::new() };
                let calls = format!("\"[\" {call}{more} \"]\"");
                // The newer notation: a name, then its arguments.
                let named = lenient.iter().enumerate().map(|(index, tool)| {
                    let name = Value::from(tool.function.name.as_str());
                    format!("{name} {}? arguments_{index}", tag(MISTRAL_ARGUMENTS, tokenizer))
                });
                let named = named.collect::<Vec<_>>().join(" | ");
                let more = if parallel {
                    format!(" ({} named)*", tag(MISTRAL_OPEN, tokenizer))
                } else {
                    String::new()
                };
                (
                    format!("(to_call ({calls} | named{more}))? TEXT?"),
                    format!("named: {named}\n{to_call}\n{text}"),
                )
            }
            Self::Llama3 => {
                let more = if parallel { format!(" (\"; \" {call})*") } else { String::new() };
                // Calls stand at the beginning; any other JSON may be an answer.
                let names = tools
                    .iter()
                    .map(|tool| tool.function.name.replace('.', "\\."))
                    .collect::<Vec<_>>()
                    .join("|");
                let begun = format!(r#"\s*\{{\s*"(type|function|name"\s*:\s*"({names}))"(.|\n)*"#);
                let text = format!("TEXT: /(.|\\n)+/ & ~/{begun}/");
                (format!("{}? {call}{more} | TEXT?", tag(LLAMA_OPEN, tokenizer)), text)
            }
        };
        Ok(format!("start: {start}\n{text}\n{rules}"))
    }

    /// One call, whose object is the rule `object`.
    fn call(self, object: &str, tokenizer: &TextTokenizer) -> String {
        match self {
            Self::Hermes => {
                let (open, close) = (tag(HERMES_OPEN, tokenizer), tag(HERMES_CLOSE, tokenizer));
                format!(r#"{open} "\n" {object} "\n" {close}"#)
            }
            Self::Llama3 | Self::Mistral => object.to_owned(),
        }
    }

    /// `call`: the object of a call of any of these functions; `arguments_0` and so on: their arguments.
    fn rules(self, tools: &[&Tool]) -> Result<String, String> {
        let quoted = |text: &str| Value::from(text).to_string();
        let key = if self == Self::Llama3 { "parameters" } else { "arguments" };
        let mut rules = String::new();
        for (index, tool) in tools.iter().enumerate() {
            let head = quoted(&format!("{{\"name\": {}, \"{key}\": ", quoted(&tool.function.name)));
            rules.push_str(&format!("call_{index}: {head} arguments_{index} \"}}\"\n"));
            let schema = tool.function.parameters.clone().map(Value::Object);
            let schema = schema.unwrap_or_else(|| json!({"type": "object", "properties": {}, "additionalProperties": false}));
            rules.push_str(&format!("arguments_{index}: %json {}\n", guided_schema(schema)?));
        }
        let any = (0..tools.len()).map(|index| format!("call_{index}")).collect::<Vec<_>>().join(" | ");
        rules.push_str(&format!("call: {any}\n"));
        Ok(rules)
    }
}

/// A function that is not `strict` promises nothing of its arguments, but that they are an object.
fn lenient_unless_strict(tool: &Tool) -> Tool {
    let mut tool = tool.clone();
    if tool.function.strict != Some(true) {
        tool.function.parameters = json!({"type": "object"}).as_object().cloned();
    }
    tool
}

/// A tag in Lark: the special token, where the model has one for it, or the text.
pub fn tag(text: &str, tokenizer: &TextTokenizer) -> String {
    match tokenizer.token_to_id(text) {
        Some(id) if tokenizer.is_special(id) => format!("<[{id}]>"),
        _ => Value::from(text).to_string(),
    }
}

/// The rule `to_call`, any text up to the first `tag` and that itself; the terminal `TEXT`, any text without it.
fn up_to(text: &str, tokenizer: &TextTokenizer) -> (String, String) {
    let tag = tag(text, tokenizer);
    if tag.starts_with('<') {
        return (format!("to_call: TEXT? {tag}"), r"TEXT: /(.|\n)+/".to_owned());
    }
    let pattern: String = text
        .chars()
        .flat_map(|c| matches!(c, '[' | ']').then_some('\\').into_iter().chain([c]))
        .collect();
    (
        format!(r"to_call[lazy]: /(.|\n)*{pattern}/"),
        format!(r"TEXT: /(.|\n)+/ & ~/(.|\n)*{pattern}(.|\n)*/"),
    )
}

/// Which functions must be called, if any must.
///
/// # Errors
/// A named function that is not among the tools.
pub fn required<'a>(tools: &'a [Tool], choice: Option<&ToolChoice>) -> Result<Option<Vec<&'a Tool>>, String> {
    match choice {
        None | Some(ToolChoice::Mode(ToolChoiceMode::Auto | ToolChoiceMode::None)) => Ok(None),
        Some(ToolChoice::Mode(ToolChoiceMode::Required)) => Ok(Some(tools.iter().collect())),
        Some(ToolChoice::Named(NamedToolChoice { function, .. })) => {
            let named = tools.iter().find(|tool| tool.function.name == function.name);
            named
                .map(|tool| Some(vec![tool]))
                .ok_or_else(|| format!("tool_choice names '{}', which is not among the tools", function.name))
        }
    }
}

/// What the text turns out to be.
#[derive(Clone, Debug, PartialEq)]
pub enum ToolPart {
    /// Text beside the calls.
    Text(String),
    /// A call begins.
    Call {
        /// Which, from 0.
        index: u32,
        /// The function.
        name: String,
    },
    /// More of a call's arguments, JSON.
    Arguments {
        /// Which call.
        index: u32,
        /// What is new.
        json: String,
    },
}

/// Reads calls in text that comes in pieces.
#[derive(Clone, Debug)]
pub struct ToolParser {
    format: ToolFormat,
    names: Vec<String>,
    state: State,
    /// What is not decided yet.
    held: String,
    /// What led to the call that may be beginning: text after all, if it is none.
    opened: String,
    num_calls: u32,
}

#[derive(Clone, Debug)]
enum State {
    /// At the beginning (Llama's calls have no opening tag).
    Begin,
    /// Text; a call may begin with its tag.
    Text,
    /// Where a call's object may begin; `in_list` between the brackets of Mistral's list.
    BeforeCall { in_list: bool },
    /// In a call's object.
    Call { scanner: Box<CallScanner>, raw: String, in_list: bool },
    /// After an object.
    AfterCall { in_list: bool },
}

impl ToolParser {
    /// For functions of these names.
    pub fn new(format: ToolFormat, names: Vec<String>) -> Self {
        Self {
            format,
            names,
            state: State::Begin,
            held: String::new(),
            opened: String::new(),
            num_calls: 0,
        }
    }

    /// How many calls have begun.
    pub fn num_calls(&self) -> u32 {
        self.num_calls
    }

    /// Takes text; gives the parts that are certain.
    pub fn push(&mut self, text: &str) -> Vec<ToolPart> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// What was held back, at the end. A call that has not begun for certain is text.
    pub fn finish(&mut self) -> Vec<ToolPart> {
        let held = std::mem::take(&mut self.held);
        let opened = std::mem::take(&mut self.opened);
        let text = match &self.state {
            // What began after a call is another that was cut off.
            State::Call { .. } | State::BeforeCall { .. } if self.num_calls > 0 => String::new(),
            State::Text | State::AfterCall { .. } if self.num_calls > 0 && self.open_tag().starts_with(held.trim()) => String::new(),
            State::Call { scanner, raw, .. } if !scanner.has_begun() => format!("{opened}{raw}{held}"),
            State::Call { .. } => String::new(),
            State::BeforeCall { in_list: false } => format!("{opened}{held}"),
            // The rest of a closing tag that was cut off.
            State::AfterCall { .. } if HERMES_CLOSE.starts_with(held.trim()) => String::new(),
            State::BeforeCall { in_list: true } | State::Begin | State::Text | State::AfterCall { .. } => held,
        };
        if text.is_empty() || (self.num_calls > 0 && text.trim().is_empty()) {
            return Vec::new();
        }
        vec![ToolPart::Text(text)]
    }

    fn open_tag(&self) -> &'static str {
        match self.format {
            ToolFormat::Hermes => HERMES_OPEN,
            ToolFormat::Llama3 => LLAMA_OPEN,
            ToolFormat::Mistral => MISTRAL_OPEN,
        }
    }

    /// Goes on by one state; false when more text is needed.
    fn step(&mut self, parts: &mut Vec<ToolPart>) -> bool {
        match &mut self.state {
            State::Begin => {
                let text = self.held.trim_start();
                if text.is_empty() {
                    return false;
                }
                let is_call = self.format == ToolFormat::Llama3 && text.starts_with('{');
                self.state = if is_call { State::BeforeCall { in_list: false } } else { State::Text };
                true
            }
            State::Text => self.text(parts),
            State::BeforeCall { in_list } => {
                let in_list = *in_list;
                self.before_call(in_list, parts)
            }
            State::Call { .. } => self.call(parts),
            State::AfterCall { in_list } => {
                let in_list = *in_list;
                self.after_call(in_list)
            }
        }
    }

    fn text(&mut self, parts: &mut Vec<ToolPart>) -> bool {
        let tag = self.open_tag();
        let (end, found) = match self.held.find(tag) {
            Some(index) => (index, true),
            None => (self.held.len() - open_suffix(&self.held, tag), false),
        };
        // White space before a call belongs to the notation.
        let certain = self.held[..end].trim_end().len();
        if certain > 0 {
            parts.push(ToolPart::Text(self.held[..certain].to_owned()));
        }
        self.held.drain(..certain);
        if found {
            self.opened = self.held.drain(..end - certain + tag.len()).collect();
            self.state = State::BeforeCall { in_list: false };
        }
        found
    }

    fn before_call(&mut self, in_list: bool, parts: &mut Vec<ToolPart>) -> bool {
        let skipped = self.held.len() - self.held.trim_start().len();
        let Some(first) = self.held[skipped..].chars().next() else {
            return false;
        };
        self.opened.extend(self.held.drain(..skipped));
        match first {
            '{' => self.begin_call(CallScanner::object(self.format == ToolFormat::Llama3), in_list),
            '[' if self.format == ToolFormat::Mistral && !in_list => {
                self.opened.push(self.held.remove(0));
                self.state = State::BeforeCall { in_list: true };
            }
            ',' if in_list => {
                self.held.remove(0);
            }
            ']' if in_list => {
                self.held.remove(0);
                self.state = State::Text;
            }
            _ if self.format == ToolFormat::Mistral && !in_list => {
                // The newer notation: a name, then its arguments.
                let Some(brace) = self.held.find('{') else { return false };
                let name = self.held[..brace].trim().trim_end_matches(MISTRAL_ARGUMENTS).trim().to_owned();
                self.held.drain(..brace);
                self.begin_call(CallScanner::arguments(name), false);
            }
            _ => {
                parts.push(ToolPart::Text(std::mem::take(&mut self.opened)));
                self.state = State::Text;
            }
        }
        true
    }

    fn begin_call(&mut self, scanner: CallScanner, in_list: bool) {
        self.state = State::Call {
            scanner: Box::new(scanner),
            raw: String::new(),
            in_list,
        };
    }

    fn call(&mut self, parts: &mut Vec<ToolPart>) -> bool {
        let State::Call { scanner, raw, in_list } = &mut self.state else {
            return false;
        };
        let in_list = *in_list;
        let consumed = scanner.push(&self.held);
        raw.push_str(&self.held[..consumed]);
        self.held.drain(..consumed);
        // Any JSON with a name might be an answer where calls have no tag: only the functions that exist are calls.
        let unknown = self.format == ToolFormat::Llama3 && scanner.name.as_ref().is_some_and(|name| !self.names.contains(name));
        if (scanner.status == Status::Bad || unknown) && !scanner.announced {
            let text = format!("{}{raw}", std::mem::take(&mut self.opened));
            parts.push(ToolPart::Text(text));
            self.state = State::Text;
            return true;
        }
        if let Some(name) = &scanner.name {
            if !scanner.announced {
                scanner.announced = true;
                self.opened.clear();
                self.num_calls += 1;
                let index = self.num_calls - 1;
                parts.push(ToolPart::Call { index, name: name.clone() });
            }
            if !scanner.new_arguments.is_empty() {
                parts.push(ToolPart::Arguments {
                    index: self.num_calls - 1,
                    json: std::mem::take(&mut scanner.new_arguments),
                });
            }
        }
        if scanner.status == Status::More {
            return false;
        }
        self.state = State::AfterCall { in_list };
        true
    }

    fn after_call(&mut self, in_list: bool) -> bool {
        if in_list {
            self.state = State::BeforeCall { in_list };
            return true;
        }
        match self.format {
            ToolFormat::Hermes => {
                let Some(index) = self.held.find(HERMES_CLOSE) else {
                    // The next call may begin without the last having been closed.
                    if self.held.contains(HERMES_OPEN) {
                        self.state = State::Text;
                        return true;
                    }
                    return false;
                };
                self.held.drain(..index + HERMES_CLOSE.len());
                self.state = State::Text;
                true
            }
            ToolFormat::Llama3 => {
                let text = self.held.trim_start_matches([';', ' ', '\n', '\t']);
                let Some(first) = text.chars().next() else { return false };
                self.held = text.to_owned();
                self.state = if first == '{' {
                    State::BeforeCall { in_list: false }
                } else {
                    State::Text
                };
                true
            }
            ToolFormat::Mistral => {
                self.state = State::Text;
                true
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Status {
    More,
    Done,
    Bad,
}

/// Reads one call's object, character by character.
#[derive(Clone, Debug)]
struct CallScanner {
    at: At,
    status: Status,
    /// Objects that are open around the call's keys: 2 in `{"type": "function", "function": {…}}`.
    depth: u32,
    /// An unknown key means that this is no call.
    known_keys_only: bool,
    /// The text of the key or string that is being read, with its escapes.
    string: String,
    escaped: bool,
    key: String,
    name: Option<String>,
    /// Arguments that were not given out.
    new_arguments: String,
    has_arguments: bool,
    announced: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Start,
    Key,
    KeyString,
    Colon,
    Value,
    NameString,
    ArgumentsString,
    /// In the value of an interesting (`is_arguments`) or uninteresting key: open brackets, and whether in a string.
    Json {
        open: u32,
        in_string: bool,
        is_arguments: bool,
    },
    AfterValue,
}

impl CallScanner {
    fn object(known_keys_only: bool) -> Self {
        Self {
            at: At::Start,
            status: Status::More,
            depth: 0,
            known_keys_only,
            string: String::new(),
            escaped: false,
            key: String::new(),
            name: None,
            new_arguments: String::new(),
            has_arguments: false,
            announced: false,
        }
    }

    /// Only the arguments; the name is known.
    fn arguments(name: String) -> Self {
        Self {
            at: At::Value,
            key: "arguments".to_owned(),
            name: Some(name),
            ..Self::object(false)
        }
    }

    fn has_begun(&self) -> bool {
        self.announced
    }

    /// Takes text until the object ends; says how many bytes it took.
    fn push(&mut self, text: &str) -> usize {
        for (index, c) in text.char_indices() {
            self.take(c);
            if self.status != Status::More {
                if self.status == Status::Done && !self.has_arguments {
                    self.new_arguments.push_str("{}");
                }
                if self.status == Status::Done && self.name.is_none() {
                    self.status = Status::Bad;
                }
                return index + c.len_utf8();
            }
        }
        text.len()
    }

    fn take(&mut self, c: char) {
        match self.at {
            At::KeyString | At::NameString | At::ArgumentsString => self.take_in_string(c),
            At::Json {
                open,
                in_string,
                is_arguments,
            } => self.take_json(c, open, in_string, is_arguments),
            _ if c.is_whitespace() => {}
            At::Start if c == '{' => {
                self.depth = 1;
                self.at = At::Key;
            }
            At::Key if c == '"' => {
                self.string.clear();
                self.at = At::KeyString;
            }
            At::Key | At::AfterValue if c == '}' => self.close(),
            At::AfterValue if c == ',' => self.at = At::Key,
            At::Colon if c == ':' => self.at = At::Value,
            At::Value => self.begin_value(c),
            _ => self.status = Status::Bad,
        }
    }

    fn close(&mut self) {
        self.depth -= 1;
        self.at = At::AfterValue;
        if self.depth == 0 {
            self.status = Status::Done;
        }
    }

    fn take_in_string(&mut self, c: char) {
        if self.escaped || c != '"' {
            self.escaped = !self.escaped && c == '\\';
            self.string.push(c);
            return;
        }
        let Ok(text) = serde_json::from_str::<String>(&format!("\"{}\"", self.string)) else {
            self.status = Status::Bad;
            return;
        };
        match self.at {
            At::KeyString => {
                self.key = text;
                self.at = At::Colon;
                let known = ["name", "arguments", "parameters", "function", "type", "id"].contains(&self.key.as_str());
                if self.known_keys_only && !known {
                    self.status = Status::Bad;
                }
            }
            At::NameString => {
                self.name = Some(text);
                self.at = At::AfterValue;
            }
            _ => {
                self.new_arguments.push_str(&text);
                self.has_arguments = true;
                self.at = At::AfterValue;
            }
        }
    }

    fn begin_value(&mut self, c: char) {
        self.string.clear();
        let is_arguments = matches!(self.key.as_str(), "arguments" | "parameters");
        match (self.key.as_str(), c) {
            ("name" | "function", '"') => self.at = At::NameString,
            ("function", '{') => {
                self.depth += 1;
                self.at = At::Key;
            }
            // Some models write the arguments as JSON in a string, as the API has them.
            (_, '"') if is_arguments => self.at = At::ArgumentsString,
            ("name", _) => self.status = Status::Bad,
            _ => {
                self.at = At::Json {
                    open: 0,
                    in_string: false,
                    is_arguments,
                };
                self.has_arguments |= is_arguments;
                self.take_json(c, 0, false, is_arguments);
            }
        }
    }

    fn take_json(&mut self, c: char, mut open: u32, mut in_string: bool, is_arguments: bool) {
        if !in_string && open == 0 && matches!(c, ',' | '}' | ']') {
            // The end of a number, or of null: what follows belongs to the object.
            self.at = At::AfterValue;
            return self.take(c);
        }
        if is_arguments {
            self.new_arguments.push(c);
        }
        let mut ended = false;
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' if in_string => self.escaped = true,
            '"' => {
                in_string = !in_string;
                ended = !in_string && open == 0;
            }
            '{' | '[' if !in_string => open += 1,
            '}' | ']' if !in_string => {
                open -= 1;
                ended = open == 0;
            }
            _ => {}
        }
        self.at = if ended {
            At::AfterValue
        } else {
            At::Json {
                open,
                in_string,
                is_arguments,
            }
        };
        if ended && self.depth == 0 {
            // Arguments alone, without an object around them.
            self.status = Status::Done;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Calls = Vec<(String, String)>;

    fn read(format: ToolFormat, text: &str, step: usize) -> (String, Calls) {
        let mut parser = ToolParser::new(format, vec!["f".into(), "g".into()]);
        let chars: Vec<char> = text.chars().collect();
        let mut parts = Vec::new();
        for piece in chars.chunks(step) {
            parts.extend(parser.push(&piece.iter().collect::<String>()));
        }
        parts.extend(parser.finish());
        let (mut content, mut calls) = (String::new(), Calls::new());
        for part in parts {
            match part {
                ToolPart::Text(text) => content.push_str(&text),
                ToolPart::Call { index, name } => {
                    assert_eq!(index as usize, calls.len());
                    calls.push((name, String::new()));
                }
                ToolPart::Arguments { index, json } => calls[index as usize].1.push_str(&json),
            }
        }
        assert_eq!(parser.num_calls() as usize, calls.len());
        (content, calls)
    }

    fn check(format: ToolFormat, text: &str, content: &str, calls: &[(&str, &str)]) {
        let calls: Calls = calls.iter().map(|&(name, arguments)| (name.into(), arguments.into())).collect();
        for step in [1, 2, 3, 7, 1000] {
            assert_eq!(read(format, text, step), (content.into(), calls.clone()), "{text:?} by {step}");
        }
    }

    #[test]
    fn hermes_calls_are_read() {
        let hermes = ToolFormat::Hermes;
        check(
            hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"}\\\"\"}}\n</tool_call>",
            "",
            &[("f", "{\"x\": \"}\\\"\"}")],
        );
        check(
            hermes,
            "Let me see.\n<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1, {}]}}</tool_call>\n<tool_call>\n{\"arguments\": {}, \"name\": \"g\"}\n</tool_call>",
            "Let me see.",
            &[("f", "{\"a\": [1, {}]}"), ("g", "{}")],
        );
        check(hermes, "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "", &[("f", "{}")]);
        check(
            hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}\n</tool_call>",
            "",
            &[("f", "{\"x\": 1}")],
        );
        check(hermes, "no <tool call", "no <tool call", &[]);
        check(hermes, "a <tool_call> b", "a <tool_call> b", &[]);
        check(hermes, "text  ", "text  ", &[]);
        // Cut off by max_tokens.
        check(hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_", "", &[("f", "{}")]);
        check(
            hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1",
            "",
            &[("f", "{\"x\": 1")],
        );
        check(hermes, "<tool_call>\n{\"na", "<tool_call>\n{\"na", &[]);
        check(hermes, "<tool_call>\n[1]</tool_call>", "<tool_call>\n[1]</tool_call>", &[]);
        // After a call that is whole, what begins is another, of which nothing is known yet.
        for cut in ["\n", "\n<tool_", "\n<tool_call>", "\n<tool_call>\n{\"na", "\n<tool_call>\n{\"name\": \"g"] {
            let text = format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {{}}}}\n</tool_call>{cut}");
            check(hermes, &text, "", &[("f", "{}")]);
        }
    }

    #[test]
    fn llama_calls_are_read() {
        let llama = ToolFormat::Llama3;
        check(llama, "{\"name\": \"f\", \"parameters\": {\"x\": 1}}", "", &[("f", "{\"x\": 1}")]);
        check(
            llama,
            "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {\"y\": null}}",
            "",
            &[("f", "{}"), ("g", "{\"y\": null}")],
        );
        check(
            llama,
            "{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {\"x\": 1}}}",
            "",
            &[("f", "{\"x\": 1}")],
        );
        check(llama, "{\"country\": \"France\"}", "{\"country\": \"France\"}", &[]);
        check(
            llama,
            "{\"name\": \"nobody\", \"parameters\": {}}",
            "{\"name\": \"nobody\", \"parameters\": {}}",
            &[],
        );
        check(llama, "Hello {\"name\": \"f\"}", "Hello {\"name\": \"f\"}", &[]);
    }

    #[test]
    fn mistral_calls_are_read() {
        let mistral = ToolFormat::Mistral;
        check(
            mistral,
            "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            "",
            &[("f", "{\"x\": 1}"), ("g", "{}")],
        );
        check(
            mistral,
            "[TOOL_CALLS]f[ARGS]{\"x\": {\"y\": 2}}[TOOL_CALLS]g{}",
            "",
            &[("f", "{\"x\": {\"y\": 2}}"), ("g", "{}")],
        );
        check(mistral, "Hi [1]", "Hi [1]", &[]);
    }

    #[test]
    fn arguments_are_streamed_as_they_come() {
        let mut parser = ToolParser::new(ToolFormat::Hermes, vec![]);
        let call = |index: u32, name: &str| ToolPart::Call { index, name: name.into() };
        let arguments = |json: &str| ToolPart::Arguments { index: 0, json: json.into() };
        assert_eq!(parser.push("<tool_call>\n{\"name\": \"f\""), [call(0, "f")]);
        assert_eq!(parser.push(", \"arguments\": {\"ci"), [arguments("{\"ci")]);
        assert_eq!(parser.push("ty\": \"Paris\"}}"), [arguments("ty\": \"Paris\"}")]);
        assert_eq!(parser.push("\n</tool_call>"), []);
        assert_eq!(parser.finish(), []);
    }
}
