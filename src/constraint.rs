//! Grammars: JSON schemas, regular expressions and EBNF, compiled once and followed token by token, by `llguidance`.
//!
//! The engine asks for a mask of allowed tokens before it chooses each one. That mask is made on a thread of its own as soon as the
//! token before is known, while the device computes: the engine's thread only picks it up.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        mpsc::{self, Receiver, Sender},
    },
};

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv},
};
use parking_lot::Mutex;
use polylora_engine::Constraint;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    error::ApiError,
    generation::Grammar,
    protocol::{JsonSchemaSource, chat::ResponseFormat},
    reasoning,
    tokenizer::TextTokenizer,
    tool_calls::tag,
};

/// Whitespace between JSON's tokens: bounded, or a weak model might write nothing else for ever.
const JSON_WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";
/// Compiled grammars that are kept.
const CACHED_GRAMMARS: usize = 64;

/// Bytes of memory that `llguidance` takes for each token of a vocabulary (389 to 402 were measured for 49,152 to 151,665 tokens), and for a
/// compiled grammar (0.06 to 0.1 MB for schemas of three properties).
const MEMORY_FOR_TOKEN: usize = 400;
const MEMORY_FOR_GRAMMAR: usize = 64 << 10;

/// What an output has to follow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GrammarSpec {
    /// JSON that a schema describes, given as JSON text.
    JsonSchema(String),
    /// A regular expression that the whole output matches.
    Regex(String),
    /// A grammar in llguidance's Lark, or in GBNF (`name ::= …`, from `root`).
    Ebnf(String),
    /// Lark that this server wrote, for tool calls.
    Lark(String),
    /// One of the others, for what follows the model's reasoning.
    AfterReasoning {
        /// The prompt has opened the reasoning; otherwise the model may.
        opened: bool,
        /// What follows.
        answer: Box<GrammarSpec>,
    },
}

impl GrammarSpec {
    /// JSON of a schema.
    pub fn json_schema(schema: &impl Serialize) -> Self {
        Self::JsonSchema(serde_json::to_string(schema).expect("a JSON value has string keys"))
    }

    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::json_schema(&json!({"type": "object"}))
    }

    fn text(&self) -> &str {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Ebnf(text) | Self::Lark(text) => text,
            Self::AfterReasoning { answer, .. } => answer.text(),
        }
    }

    fn compile(&self, tokenizer: &TextTokenizer) -> Result<TopLevelGrammar, String> {
        match self {
            Self::AfterReasoning { opened, answer } => {
                let mut grammar = TopLevelGrammar::from_lark(reasoning_lark(*opened, tokenizer));
                let mut answer = answer.compile(tokenizer)?;
                // The first is the one that the others serve.
                let first = answer.grammars.first_mut().ok_or("a grammar without a beginning")?;
                first.name = Some("answer".to_owned());
                grammar.grammars.append(&mut answer.grammars);
                Ok(grammar)
            }
            Self::JsonSchema(text) => {
                let schema: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
                Ok(TopLevelGrammar::from_json_schema(guided_schema(schema)?))
            }
            Self::Regex(pattern) => Ok(TopLevelGrammar::from_regex(pattern)),
            Self::Ebnf(text) if text.contains("::=") => crate::gbnf::to_lark(text).map(TopLevelGrammar::from_lark),
            Self::Ebnf(text) | Self::Lark(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
        }
    }
}

/// Thoughts, closed, then the grammar `answer`.
fn reasoning_lark(opened: bool, tokenizer: &TextTokenizer) -> String {
    let [open, close] = [reasoning::OPEN, reasoning::CLOSE].map(|text| tag(text, tokenizer));
    let thoughts = if close.starts_with('<') {
        format!("thoughts: THOUGHTS? {close}\nTHOUGHTS: /(.|\\n)+/")
    } else {
        format!("thoughts[lazy]: /(.|\\n)*{}/", reasoning::CLOSE.replace('/', "\\/"))
    };
    // The line breaks are no part of the answer.
    let thoughts = format!("{thoughts}\nGAP: /\\n{{1,2}}/");
    if opened {
        format!("start: thoughts GAP? @answer\n{thoughts}")
    } else {
        format!("start: (GAP? {open} thoughts GAP?)? @answer\n{thoughts}")
    }
}

/// The form that a request asks for, and the field that says so.
///
/// # Errors
/// 400 when there are several, or when a schema is missing.
pub fn form_of_answer(
    response_format: Option<&ResponseFormat>,
    json_schema: Option<&JsonSchemaSource>,
    regex: Option<&String>,
    ebnf: Option<&String>,
) -> Result<Option<(GrammarSpec, &'static str)>, ApiError> {
    let mut forms = Vec::new();
    match response_format {
        None | Some(ResponseFormat::Text {}) => {}
        Some(ResponseFormat::JsonObject {}) => forms.push((GrammarSpec::json_object(), "response_format")),
        Some(ResponseFormat::JsonSchema { json_schema }) => match &json_schema.schema {
            Some(schema) => forms.push((GrammarSpec::json_schema(schema), "response_format")),
            None => {
                let param = "response_format.json_schema.schema";
                return Err(ApiError::invalid(param, format!("Missing required parameter: '{param}'.")));
            }
        },
    }
    match json_schema {
        None => {}
        // SGLang takes the schema as a string.
        Some(JsonSchemaSource::Text(text)) => match serde_json::from_str::<Value>(text) {
            Ok(schema) => forms.push((GrammarSpec::json_schema(&schema), "json_schema")),
            Err(error) => return Err(ApiError::invalid_grammar("json_schema", &error.to_string())),
        },
        Some(JsonSchemaSource::Object(schema)) => forms.push((GrammarSpec::json_schema(schema), "json_schema")),
    }
    forms.extend(regex.map(|pattern| (GrammarSpec::Regex(pattern.clone()), "regex")));
    forms.extend(ebnf.map(|text| (GrammarSpec::Ebnf(text.clone()), "ebnf")));
    if forms.len() > 1 {
        let params: Vec<&str> = forms.iter().map(|(_, param)| *param).collect();
        let message = format!("only one of {} is possible", params.join(" and "));
        return Err(ApiError::invalid(forms[1].1, message));
    }
    Ok(forms.pop())
}

/// A schema with this server's options, and none of the client's: those could make it lenient.
pub fn guided_schema(schema: Value) -> Result<Value, String> {
    match schema {
        Value::Object(mut schema) => {
            schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": JSON_WHITESPACE}));
            Ok(Value::Object(schema))
        }
        Value::Bool(true) => guided_schema(json!({})),
        Value::Bool(false) => Err("the schema `false` allows nothing".to_owned()),
        other => Err(format!("a schema is an object, got {other}")),
    }
}

struct Environment {
    tokenizer: Arc<TextTokenizer>,
    trie: TokTrie,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie
            .tokenize_with_greedy_fallback(bytes, |text| self.tokenizer.encode(text, false).unwrap_or_default())
    }
}

/// Compiles grammars for one tokenizer.
pub struct GrammarCompiler {
    tokenizer: Arc<TextTokenizer>,
    vocab_size: usize,
    eos_token_ids: Vec<u32>,
    /// Made at first use: it looks at the whole vocabulary.
    factory: OnceLock<Result<Arc<ParserFactory>, String>>,
    compiled: Mutex<HashMap<GrammarSpec, Arc<CompiledGrammar>>>,
    masks: Arc<MaskThreads>,
}

impl GrammarCompiler {
    /// For logits of `vocab_size` and outputs that end with any of `eos_token_ids`.
    pub fn new(tokenizer: Arc<TextTokenizer>, vocab_size: usize, eos_token_ids: Vec<u32>) -> Self {
        Self {
            tokenizer,
            vocab_size,
            eos_token_ids,
            factory: OnceLock::new(),
            compiled: Mutex::default(),
            masks: Arc::default(),
        }
    }

    /// An estimate of what it takes of memory once it has been used.
    pub fn memory_bytes(&self) -> usize {
        MEMORY_FOR_TOKEN * self.vocab_size + CACHED_GRAMMARS * MEMORY_FOR_GRAMMAR
    }

    /// Compiles, on a thread that may block; what was compiled lately is at hand.
    ///
    /// # Errors
    /// 400 naming `param`, with the reason.
    #[tracing::instrument(name = "grammar", level = "debug", skip_all)]
    pub async fn compile(self: &Arc<Self>, spec: GrammarSpec, param: &str, max_bytes: usize) -> Result<Arc<dyn Grammar>, ApiError> {
        if spec.text().len() > max_bytes {
            let reason = format!("{} bytes, at most {max_bytes} are possible", spec.text().len());
            return Err(ApiError::invalid_grammar(param, &reason));
        }
        if let Some(grammar) = self.compiled.lock().get(&spec) {
            return Ok(Arc::clone(grammar) as Arc<dyn Grammar>);
        }
        let compiler = Arc::clone(self);
        let compiled = tokio::task::spawn_blocking(move || compiler.compile_now(spec));
        let compiled = compiled.await.map_err(|_| ApiError::internal())?;
        compiled
            .map(|grammar| grammar as Arc<dyn Grammar>)
            .map_err(|reason| ApiError::invalid_grammar(param, &reason))
    }

    fn compile_now(&self, spec: GrammarSpec) -> Result<Arc<CompiledGrammar>, String> {
        let grammar = spec.compile(&self.tokenizer)?;
        let factory = self.factory.get_or_init(|| self.factory()).clone()?;
        let mut matcher = Matcher::new(factory.create_parser(grammar));
        if let Some(reason) = matcher.get_error() {
            return Err(reason);
        }
        if let Some(warning) = matcher.grammar_warnings().first() {
            return Err(warning.clone());
        }
        let compiled = Arc::new(CompiledGrammar {
            matcher,
            masks: Arc::clone(&self.masks),
        });
        let mut cache = self.compiled.lock();
        if cache.len() >= CACHED_GRAMMARS {
            // Clients that send a new schema each time gain nothing from a cleverer choice.
            cache.clear();
        }
        cache.insert(spec, Arc::clone(&compiled));
        Ok(compiled)
    }

    fn factory(&self) -> Result<Arc<ParserFactory>, String> {
        if !self.tokenizer.has_fixed_bytes() {
            return Err("the model's tokenizer has no fixed bytes for its tokens, so grammars are not possible".to_owned());
        }
        // An adapter may have fewer tokens than the base model, whose end tokens these are.
        let ends: Vec<u32> = self.eos_token_ids.iter().copied().filter(|&id| (id as usize) < self.vocab_size).collect();
        let &[eos, ..] = &ends[..] else {
            return Err("the model has no end-of-sequence token, so grammars are not possible".to_owned());
        };
        let words: Vec<Vec<u8>> = (0..self.vocab_size as u32)
            .map(|id| {
                let mut bytes = Vec::new();
                if self.tokenizer.is_special(id) {
                    bytes.push(TokTrie::SPECIAL_TOKEN_MARKER);
                }
                bytes.extend_from_slice(self.tokenizer.fixed_bytes(id).unwrap_or_default());
                bytes
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(self.vocab_size as u32, eos), &words).with_eos_tokens(&ends);
        let environment: TokEnv = Arc::new(Environment {
            tokenizer: Arc::clone(&self.tokenizer),
            trie,
        });
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
        factory.quiet();
        // An error goes to the client: it needs the reason, not the parser's state.
        factory.limits_mut().verbose_errors = false;
        Ok(Arc::new(factory))
    }
}

struct CompiledGrammar {
    matcher: Matcher,
    masks: Arc<MaskThreads>,
}

impl Grammar for CompiledGrammar {
    fn constraint(&self) -> Box<dyn Constraint> {
        let mut constraint = GrammarConstraint {
            state: State::Broken("a bug: no state".to_owned()),
            masks: Arc::clone(&self.masks),
        };
        constraint.begin_mask(self.matcher.deep_clone());
        Box::new(constraint)
    }
}

/// What comes next: the allowed tokens, or nothing any more.
enum Next {
    Mask(SimpleVob),
    Done,
}

enum State {
    /// The mask is being made.
    Computing(Receiver<(Matcher, Result<Next, String>)>),
    /// The mask was given out; the matcher waits for the token.
    Waiting(Box<Matcher>),
    /// The output is complete.
    Done,
    Broken(String),
}

struct GrammarConstraint {
    state: State,
    masks: Arc<MaskThreads>,
}

impl GrammarConstraint {
    fn begin_mask(&mut self, mut matcher: Matcher) {
        let (result, made) = mpsc::channel();
        self.state = State::Computing(made);
        self.masks.run(Box::new(move || {
            let next = next_mask(&mut matcher);
            // A dropped receiver is a request that ended.
            let _ = result.send((matcher, next));
        }));
    }
}

fn next_mask(matcher: &mut Matcher) -> Result<Next, String> {
    if let Some(reason) = matcher.get_error() {
        return Err(reason);
    }
    if matcher.is_stopped() {
        return Ok(Next::Done);
    }
    matcher.compute_mask().map(Next::Mask).map_err(|error| error.to_string())
}

impl Constraint for GrammarConstraint {
    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<bool, String> {
        let (matcher, next) = match &self.state {
            State::Computing(made) => made.recv().map_err(|_| "the mask could not be made".to_owned())?,
            State::Waiting(_) => return Err("a bug: a mask was asked for twice".to_owned()),
            State::Done => return Ok(false),
            State::Broken(reason) => return Err(reason.clone()),
        };
        match next {
            Ok(Next::Mask(allowed)) => {
                self.state = State::Waiting(Box::new(matcher));
                let words = allowed.as_slice();
                for (index, word) in mask.iter_mut().enumerate() {
                    *word &= words.get(index).copied().unwrap_or(0);
                }
                Ok(true)
            }
            Ok(Next::Done) => {
                self.state = State::Done;
                Ok(false)
            }
            Err(reason) => {
                self.state = State::Broken(reason.clone());
                Err(reason)
            }
        }
    }

    fn commit(&mut self, token_id: u32) -> Result<(), String> {
        let state = std::mem::replace(&mut self.state, State::Broken("a bug: no state".to_owned()));
        let State::Waiting(mut matcher) = state else {
            self.state = state;
            return Err("a bug: a token was committed before its mask was asked for".to_owned());
        };
        match matcher.consume_token(token_id) {
            Ok(()) => {
                self.begin_mask(*matcher);
                Ok(())
            }
            Err(error) => {
                self.state = State::Broken(error.to_string());
                Err(error.to_string())
            }
        }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// A few threads that make masks; started at first use, ended with the last grammar.
#[derive(Default)]
struct MaskThreads {
    jobs: OnceLock<Sender<Job>>,
}

impl MaskThreads {
    fn run(&self, job: Job) {
        let jobs = self.jobs.get_or_init(|| {
            let (sender, receiver) = mpsc::channel::<Job>();
            let receiver = Arc::new(Mutex::new(receiver));
            let threads = std::thread::available_parallelism().map_or(1, |threads| (threads.get() / 4).clamp(1, 4));
            for index in 0..threads {
                let receiver = Arc::clone(&receiver);
                let spawned = std::thread::Builder::new().name(format!("grammar-{index}")).spawn(move || {
                    loop {
                        // The lock is held while waiting: one thread waits for a job, the others for the lock.
                        let job = receiver.lock().recv();
                        match job {
                            Ok(job) => job(),
                            Err(_) => break,
                        }
                    }
                });
                if let Err(error) = spawned {
                    tracing::warn!(%error, "a grammar thread could not be started");
                }
            }
            sender
        });
        // Without a thread the job is dropped, and whoever waits for it learns that it can't be made.
        let _ = jobs.send(job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::byte_level_json;

    const EOS: u32 = 261;
    const VOCAB: usize = 300;

    fn compiler() -> Arc<GrammarCompiler> {
        let tokenizer = Arc::new(TextTokenizer::from_bytes(byte_level_json().as_bytes(), Some("<s>")).unwrap());
        Arc::new(GrammarCompiler::new(tokenizer, VOCAB, vec![EOS]))
    }

    async fn compile(spec: GrammarSpec) -> Result<Arc<dyn Grammar>, ApiError> {
        compiler().compile(spec, "response_format", 10_000).await
    }

    fn allowed(constraint: &mut dyn Constraint) -> Option<Vec<u32>> {
        let mut mask = vec![u32::MAX; VOCAB.div_ceil(32)];
        let more = constraint.fill_mask(&mut mask).unwrap();
        let ids = (0..VOCAB as u32).filter(|id| mask[*id as usize / 32] & (1 << (id % 32)) != 0);
        more.then(|| ids.collect())
    }

    /// Whether the grammar takes all of the text, as the tokenizer cuts it, and may end after it.
    fn accepts(grammar: &dyn Grammar, text: &str) -> bool {
        let mut constraint = grammar.constraint();
        for token in compiler().tokenizer.encode(text, false).unwrap() {
            match allowed(constraint.as_mut()) {
                Some(ids) if ids.contains(&token) => constraint.commit(token).unwrap(),
                _ => return false,
            }
        }
        allowed(constraint.as_mut()).is_none_or(|ids| ids.contains(&EOS))
    }

    #[tokio::test]
    async fn json_follows_its_schema() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
            "required": ["a", "b"], "additionalProperties": false});
        let grammar = compile(GrammarSpec::json_schema(&schema)).await.unwrap();
        for (text, expected) in [
            (r#"{"a": 1, "b": "x"}"#, true),
            (r#"{"a":-20,"b":"y"}"#, true),
            ("{\n  \"a\": 1,\n  \"b\": \"x\"\n}", true),
            (r#"{"a": 1}"#, false),
            (r#"{"a": "1", "b": "x"}"#, false),
            (r#"{"a": 1, "b": "z"}"#, false),
            (r#"{"a": 1, "b": "x", "c": 2}"#, false),
            ("", false),
        ] {
            assert_eq!(accepts(grammar.as_ref(), text), expected, "{text}");
        }
        let spaces = format!(r#"{{"a":{} 1, "b": "x"}}"#, " ".repeat(60));
        assert!(!accepts(grammar.as_ref(), &spaces), "whitespace is bounded");
        let object = compile(GrammarSpec::json_object()).await.unwrap();
        assert!(accepts(object.as_ref(), r#"{"any": [1, {"thing": null}]}"#));
        assert!(!accepts(object.as_ref(), "[1]"));
    }

    #[tokio::test]
    async fn regex_lark_and_gbnf_are_followed() {
        let regex = compile(GrammarSpec::Regex("[0-9]{3}-(ab|cd)".into())).await.unwrap();
        assert!(accepts(regex.as_ref(), "123-cd"));
        assert!(!accepts(regex.as_ref(), "12-cd"));
        let lark = compile(GrammarSpec::Ebnf("start: \"yes\" | \"no\" /[!?]/".into())).await.unwrap();
        assert!(accepts(lark.as_ref(), "no?"));
        assert!(!accepts(lark.as_ref(), "yes!"));
        let gbnf = "# an answer\nroot ::= (\"yes\" | \"no\") mark-s?\nmark-s ::= [!?]+ # one or more\n";
        let gbnf = compile(GrammarSpec::Ebnf(gbnf.into())).await.unwrap();
        assert!(accepts(gbnf.as_ref(), "yes?!"));
        assert!(accepts(gbnf.as_ref(), "no"));
        assert!(!accepts(gbnf.as_ref(), "maybe"));
    }

    #[tokio::test]
    async fn a_complete_grammar_ends_the_output() {
        let grammar = compile(GrammarSpec::Regex("ab".into())).await.unwrap();
        let mut constraint = grammar.constraint();
        assert_eq!(allowed(constraint.as_mut()), Some(vec![97]));
        constraint.commit(97).unwrap();
        assert_eq!(allowed(constraint.as_mut()), Some(vec![98]));
        constraint.commit(98).unwrap();
        assert_eq!(allowed(constraint.as_mut()), None);
        assert_eq!(allowed(constraint.as_mut()), None, "and stays so");
    }

    #[tokio::test]
    async fn two_outputs_of_one_grammar_are_independent() {
        let grammar = compile(GrammarSpec::Regex("ab|cd".into())).await.unwrap();
        let (mut one, mut two) = (grammar.constraint(), grammar.constraint());
        allowed(one.as_mut());
        one.commit(97).unwrap();
        assert_eq!(allowed(two.as_mut()), Some(vec![97, 99]));
        assert_eq!(allowed(one.as_mut()), Some(vec![98]));
    }

    #[tokio::test]
    async fn what_cannot_be_compiled_is_a_400_with_the_reason() {
        for (spec, what) in [
            (GrammarSpec::JsonSchema(r#"{"type": "nonsense"}"#.into()), "nonsense"),
            (GrammarSpec::JsonSchema(r#"{"$ref": "http://example.com/x"}"#.into()), "example.com"),
            (GrammarSpec::JsonSchema("false".into()), "allows nothing"),
            (GrammarSpec::JsonSchema("3".into()), "a schema is an object"),
            (GrammarSpec::Regex("[".into()), ""),
            (GrammarSpec::Ebnf("start: nothing".into()), "nothing"),
            (GrammarSpec::Ebnf("root ::= \"open".into()), "open"),
            (GrammarSpec::Regex("a".repeat(20_000)), "20000 bytes"),
        ] {
            let error = compile(spec.clone()).await.err().unwrap_or_else(|| panic!("{spec:?} was compiled"));
            assert_eq!((error.status().as_u16(), error.param()), (400, Some("response_format")), "{spec:?}");
            assert!(error.message().contains(what), "{spec:?}: {}", error.message());
        }
    }
}
