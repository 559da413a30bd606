//! Splits what a model thinks (`<think>…</think>`) from what it answers, in text that comes in pieces.

use crate::{chat_template::ChatTemplates, tokenizer::TextTokenizer};

/// Begins what a model thinks.
pub const OPEN: &str = "<think>";
/// Ends it.
pub const CLOSE: &str = "</think>";

/// Text of the answer, or of the reasoning before it.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// What the model thinks.
    Reasoning(String),
    /// What it answers.
    Answer(String),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct ReasoningSplitter {
    state: State,
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Nothing but whitespace yet: reasoning begins with `<think>`, or there is none.
    Begin,
    /// Reasoning; its first line break is no part of it.
    Thinking { begun: bool },
    /// After `</think>`; line breaks before the answer are no part of it.
    Closed,
    /// The answer.
    Answering,
}

impl ReasoningSplitter {
    /// For an output after `prompt`, if the model reasons at all; a template may have opened the reasoning already.
    pub fn for_prompt(templates: Option<&ChatTemplates>, prompt: &str) -> Option<Self> {
        let reasons = templates.is_some_and(|templates| templates.mentions(CLOSE) || templates.mentions(OPEN));
        reasons.then(|| Self {
            state: if prompt.trim_end().ends_with(OPEN) {
                State::Thinking { begun: false }
            } else {
                State::Begin
            },
            held: String::new(),
        })
    }

    /// Whether what comes next is reasoning.
    pub fn is_thinking(&self) -> bool {
        matches!(self.state, State::Thinking { .. })
    }

    /// Takes text; gives the parts that are certain.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> Option<Part> {
        let held = std::mem::take(&mut self.held);
        match self.state {
            _ if held.is_empty() => None,
            State::Thinking { .. } => Some(Part::Reasoning(held)),
            State::Begin | State::Closed | State::Answering => Some(Part::Answer(held)),
        }
    }

    /// Goes on by one state; false when more text is needed.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.state {
            State::Begin => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.state = State::Thinking { begun: false };
                    return true;
                }
                if OPEN.starts_with(text) {
                    return false;
                }
                self.state = State::Answering;
                true
            }
            State::Thinking { begun: false } => {
                if self.held.is_empty() {
                    return false;
                }
                self.held = self
                    .held
                    .strip_prefix('\n')
                    .map(str::to_owned)
                    .unwrap_or_else(|| std::mem::take(&mut self.held));
                self.state = State::Thinking { begun: true };
                true
            }
            State::Thinking { begun: true } => {
                let (reasoning, closed) = match self.held.find(CLOSE) {
                    Some(index) => (index, true),
                    None => (self.held.len() - open_suffix(&self.held, CLOSE), false),
                };
                let mut rest = self.held.split_off(reasoning);
                let mut reasoning = std::mem::take(&mut self.held);
                if closed {
                    rest.drain(..CLOSE.len());
                    // The line break before the closing tag belongs to the tag.
                    reasoning.truncate(reasoning.strip_suffix('\n').unwrap_or(&reasoning).len());
                    self.state = State::Closed;
                } else if reasoning.ends_with('\n') {
                    reasoning.pop();
                    rest.insert(0, '\n');
                }
                self.held = rest;
                if !reasoning.is_empty() {
                    parts.push(Part::Reasoning(reasoning));
                }
                closed
            }
            State::Closed => {
                self.held = self.held.trim_start_matches('\n').to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.state = State::Answering;
                true
            }
            State::Answering => {
                if !self.held.is_empty() {
                    parts.push(Part::Answer(std::mem::take(&mut self.held)));
                }
                false
            }
        }
    }
}

/// Special tokens that are the tags: they have to show in the text.
pub fn shown_tokens(tokenizer: &TextTokenizer) -> impl Iterator<Item = u32> {
    [OPEN, CLOSE].into_iter().filter_map(|tag| tokenizer.token_to_id(tag))
}

/// How many bytes at the end of `text` may be the beginning of `tag`.
pub fn open_suffix(text: &str, tag: &str) -> usize {
    (1..tag.len())
        .rev()
        .find(|&len| tag.is_char_boundary(len) && text.ends_with(&tag[..len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(prompt: &str, text: &str, step: usize) -> (String, String) {
        let templates = ChatTemplates::new([("default".into(), "<think>".into())].into(), Default::default()).unwrap();
        let mut splitter = ReasoningSplitter::for_prompt(Some(&templates), prompt).unwrap();
        let chars: Vec<char> = text.chars().collect();
        let mut parts: Vec<Part> = Vec::new();
        for piece in chars.chunks(step) {
            parts.extend(splitter.push(&piece.iter().collect::<String>()));
        }
        parts.extend(splitter.finish());
        let mut both = (String::new(), String::new());
        for part in parts {
            match part {
                Part::Reasoning(text) => both.0.push_str(&text),
                Part::Answer(text) => both.1.push_str(&text),
            }
        }
        both
    }

    #[test]
    fn reasoning_and_answer_are_split_whatever_the_pieces() {
        for (prompt, text, reasoning, answer) in [
            ("", "<think>\nhm\n\nso\n</think>\n\nYes", "hm\n\nso", "Yes"),
            ("", "Yes <think>no</think>", "", "Yes <think>no</think>"),
            ("", "\n<think>a</think>b", "a", "b"),
            ("<think>\n", "hm</think>Yes", "hm", "Yes"),
            ("<think>\n\n</think>\n\n", "Yes", "", "Yes"),
            ("", "<think>cut off</thi", "cut off</thi", ""),
            ("", "<thi", "", "<thi"),
            ("", "a < b", "", "a < b"),
        ] {
            for step in [1, 2, 3, 100] {
                assert_eq!(split(prompt, text, step), (reasoning.into(), answer.into()), "{text:?} by {step}");
            }
        }
    }
}
