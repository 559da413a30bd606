//! Messages and texts to token ids: what a model directory says about its tokenizer, its chat template and its sampling defaults.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use parking_lot::Mutex;
use polylora_engine::{FileSource, files::SourceStamp};
use serde_json::Value;
use tokenizers::AddedToken;
use tokio::sync::Semaphore;

use crate::{
    beside::beside_if,
    chat_template::{ChatInput, ChatTemplates, SpecialTokens, TemplateError},
    error::ApiError,
    tokenizer::{TextTokenizer, TokenizerError},
};

/// Files of a model directory are read up to this size; the largest `tokenizer.json` known has 33 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;
/// Files whose hashes are remembered, 100 bytes each.
const KNOWN_FILES: usize = 1 << 16;
/// Longer texts are tokenized on a thread that may block: these take a millisecond, in which no stream of the same thread is served.
const BLOCKING_TEXT_BYTES: usize = 4 << 10;

/// Why a model directory's text side can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// A file can't be read.
    #[error("{file}: {error}")]
    Read {
        /// Which.
        file: &'static str,
        /// Why.
        error: std::io::Error,
    },
    /// A file is no JSON.
    #[error("{file}: {error}")]
    Json {
        /// Which.
        file: &'static str,
        /// Why.
        error: serde_json::Error,
    },
    /// See [`TokenizerError`].
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A chat template is no Jinja.
    #[error("{file}: {error}")]
    Template {
        /// Where it stands.
        file: &'static str,
        /// See [`TemplateError`].
        error: TemplateError,
    },
}

impl PromptError {
    /// Which file it is about, and what is wrong with it.
    pub fn file_and_reason(&self) -> (&'static str, String) {
        match self {
            Self::Read { file, error } => (file, error.to_string()),
            Self::Json { file, error } => (file, error.to_string()),
            Self::Tokenizer(TokenizerError::BadFile(reason)) => (TextFiles::TOKENIZER, reason.clone()),
            Self::Tokenizer(error) => (TextFiles::TOKENIZER, error.to_string()),
            Self::Template { file, error } => (file, error.to_string()),
        }
    }
}

/// Sampling settings that a model's `generation_config.json` recommends, used where a request says nothing.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct SamplingDefaults {
    /// See [`polylora_engine::SamplingParams`].
    pub temperature: Option<f32>,
    /// The same.
    pub top_p: Option<f32>,
    /// The same.
    pub top_k: Option<u32>,
    /// The same.
    pub min_p: Option<f32>,
    /// The same.
    pub repetition_penalty: Option<f32>,
}

/// A model's text side.
#[derive(Clone)]
pub struct PromptProcessor {
    tokenizer: Arc<TextTokenizer>,
    templates: Option<Arc<ChatTemplates>>,
    /// Of templates that came with an adapter: what they do is not known, and may take long. One rendering of one at a time.
    foreign: Option<Arc<Semaphore>>,
    defaults: SamplingDefaults,
}

/// What the files beside `tokenizer.json` say in a folder, of a model or of an adapter.
#[derive(Clone, Default)]
pub struct TextFiles {
    /// Chat templates by name.
    pub templates: BTreeMap<String, String>,
    /// The file that each of them stands in.
    pub template_files: BTreeMap<String, &'static str>,
    /// What templates may name.
    pub special_tokens: SpecialTokens,
    /// Tokens that are said to be added, by id.
    pub added: BTreeMap<u32, AddedToken>,
    /// The file that says so.
    pub added_file: Option<&'static str>,
}

/// A token of `added_tokens_decoder`.
#[derive(serde::Deserialize)]
struct SavedToken {
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    normalized: Option<bool>,
}

impl From<SavedToken> for AddedToken {
    fn from(token: SavedToken) -> Self {
        let added = Self::from(token.content, token.special)
            .lstrip(token.lstrip)
            .rstrip(token.rstrip)
            .single_word(token.single_word);
        match token.normalized {
            Some(normalized) => added.normalized(normalized),
            None => added,
        }
    }
}

impl TextFiles {
    /// The tokenizer itself.
    pub const TOKENIZER: &str = "tokenizer.json";
    /// Its settings.
    pub const CONFIG: &str = "tokenizer_config.json";
    const SPECIAL_TOKENS: &str = "special_tokens_map.json";
    const ADDED_TOKENS: &str = "added_tokens.json";
    const TEMPLATE: &str = "chat_template.jinja";
    const TEMPLATE_JSON: &str = "chat_template.json";

    /// Reads `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `chat_template.jinja` and `chat_template.json`; any
    /// may be missing.
    ///
    /// # Errors
    /// `Read`, `Json`.
    pub fn read(files: &FileSource) -> Result<Self, PromptError> {
        let config = read_json(files, Self::CONFIG)?.unwrap_or_default();
        let mut templates = BTreeMap::new();
        let mut template_files = BTreeMap::new();
        let mut found = |file, found: BTreeMap<String, String>| {
            template_files.extend(found.keys().map(|name| (name.clone(), file)));
            templates.extend(found);
        };
        found(Self::CONFIG, templates_of(&config));
        if let Some(json) = read_json(files, Self::TEMPLATE_JSON)? {
            found(Self::TEMPLATE_JSON, templates_of(&json));
        }
        if let Some(bytes) = read(files, Self::TEMPLATE)? {
            found(Self::TEMPLATE, [("default".into(), String::from_utf8_lossy(&bytes).into_owned())].into());
        }
        let mut added = BTreeMap::new();
        let mut added_file = None;
        let wrong = |file: &'static str, error: serde_json::Error| PromptError::Json { file, error };
        if let Some(json) = read_json(files, Self::ADDED_TOKENS)? {
            let by_text: BTreeMap<String, u32> = serde_json::from_value(json).map_err(|error| wrong(Self::ADDED_TOKENS, error))?;
            added.extend(by_text.into_iter().map(|(text, id)| (id, AddedToken::from(text, false))));
            added_file = Some(Self::ADDED_TOKENS);
        }
        if let Some(decoder) = config.get("added_tokens_decoder").filter(|decoder| !decoder.is_null()) {
            let by_id: BTreeMap<u32, SavedToken> = serde_json::from_value(decoder.clone()).map_err(|error| wrong(Self::CONFIG, error))?;
            added.extend(by_id.into_iter().map(|(id, token)| (id, token.into())));
            added_file = Some(Self::CONFIG);
        }
        Ok(Self {
            templates,
            template_files,
            special_tokens: special_tokens(&config, &read_json(files, Self::SPECIAL_TOKENS)?.unwrap_or_default()),
            added,
            added_file,
        })
    }

    /// What is wrong with one of the templates, with the file that it stands in.
    pub fn template_error(&self, error: TemplateError) -> PromptError {
        let file = match &error {
            TemplateError::Syntax { name, .. } => self.template_files.get(name),
            TemplateError::Render(_) | TemplateError::FinalMessageAltered => None,
        };
        PromptError::Template {
            file: file.copied().unwrap_or(Self::CONFIG),
            error,
        }
    }

    /// Whether none of them says anything.
    pub fn is_empty(&self) -> bool {
        self.templates.is_empty() && self.special_tokens.is_empty() && self.added.is_empty()
    }

    /// A hash of what they and `tokenizer.json` say of the tokenizer, for logits over `vocab_size` tokens.
    pub fn tokenizer_digest(&self, tokenizer: Option<&TokenizerFile>, vocab_size: usize) -> [u8; 32] {
        let bos = self.special_tokens.by_name.get("bos_token");
        digest([
            &vocab_size.to_le_bytes(),
            tokenizer.map_or(&[], |file| &file.digest),
            &serde_json::to_vec(&(&self.added, bos)).unwrap_or_default(),
        ])
    }

    /// A hash of all that they say, with that of the tokenizer.
    pub fn digest(&self, tokenizer_digest: &[u8; 32]) -> [u8; 32] {
        let others = serde_json::to_vec(&(&self.templates, &self.special_tokens.by_name)).unwrap_or_default();
        digest([tokenizer_digest, &others])
    }
}

/// A `tokenizer.json`: megabytes of which the hash is enough where it is a copy of one that is in use.
pub struct TokenizerFile {
    /// Hash of its content.
    pub digest: [u8; 32],
    content: Option<Vec<u8>>,
}

impl TokenizerFile {
    fn new(content: Vec<u8>) -> Self {
        Self {
            digest: blake3::hash(&content).into(),
            content: Some(content),
        }
    }

    /// Reads it from a folder, if it is there.
    ///
    /// # Errors
    /// `Read`.
    pub fn read(files: &FileSource) -> Result<Option<Self>, PromptError> {
        Ok(read(files, TextFiles::TOKENIZER)?.map(Self::new))
    }

    /// Its content, which is read now if only its hash was known. `files` is where it is from.
    ///
    /// # Errors
    /// `Read`, also if it is another one now.
    pub fn content(self, files: &FileSource) -> Result<Vec<u8>, PromptError> {
        if let Some(content) = self.content {
            return Ok(content);
        }
        let now = Self::read(files)?.filter(|now| now.digest == self.digest);
        now.and_then(|now| now.content).ok_or_else(|| PromptError::Read {
            file: TextFiles::TOKENIZER,
            error: std::io::Error::other("it was replaced while it was read"),
        })
    }
}

/// Hashes of the tokenizer files that were read, by what tells a file on disk from any other: an adapter that is loaded again costs no
/// reading of its megabytes.
#[derive(Default)]
pub struct TokenizerHashes(Mutex<HashMap<SourceStamp, [u8; 32]>>);

impl TokenizerHashes {
    /// As [`TokenizerFile::read`]; only the hash of a file that was read before and is as it was then.
    ///
    /// # Errors
    /// `Read`.
    pub fn read(&self, files: &FileSource) -> Result<Option<TokenizerFile>, PromptError> {
        let before = files.file_stamp(TextFiles::TOKENIZER);
        if let Some(digest) = before.and_then(|stamp| self.0.lock().get(&stamp).copied()) {
            return Ok(Some(TokenizerFile { digest, content: None }));
        }
        let file = TokenizerFile::read(files)?;
        // One that was written to just now may be written to again in the same tick of the clock.
        if let (Some(stamp), Some(file)) = (before.filter(SourceStamp::is_settled), &file)
            && files.file_stamp(TextFiles::TOKENIZER) == before
        {
            let mut hashes = self.0.lock();
            if hashes.len() >= KNOWN_FILES {
                hashes.clear();
            }
            hashes.insert(stamp, file.digest);
        }
        Ok(file)
    }
}

/// A hash of parts, each with its length.
pub fn digest<const N: usize>(parts: [&[u8]; N]) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    for part in parts {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

impl PromptProcessor {
    /// Reads `tokenizer.json`, `generation_config.json` and what [`TextFiles`] are; all but the first may be missing. `chat_template`, if given,
    /// is used instead of the model's.
    ///
    /// # Errors
    /// See [`PromptError`].
    pub fn from_files(files: &FileSource, chat_template: Option<&str>) -> Result<Self, PromptError> {
        let mut text = TextFiles::read(files)?;
        let json = read(files, TextFiles::TOKENIZER)?.ok_or_else(|| PromptError::Read {
            file: TextFiles::TOKENIZER,
            error: std::io::ErrorKind::NotFound.into(),
        })?;
        let bos = text.special_tokens.by_name.get("bos_token").map(String::as_str);
        let tokenizer = TextTokenizer::from_bytes(&json, bos)?;
        if let Some(given) = chat_template {
            text.templates = [("default".to_owned(), given.to_owned())].into();
            text.template_files = [("default".to_owned(), "--chat-template")].into();
        }
        let compile = || ChatTemplates::new(text.templates.clone(), text.special_tokens.clone());
        let templates = (!text.templates.is_empty()).then(compile).transpose();
        let templates = templates.map_err(|error| text.template_error(error))?;
        let generation_config = read_json(files, "generation_config.json")?.unwrap_or_default();
        Ok(Self::new(tokenizer, templates, sampling_defaults(&generation_config)))
    }

    /// From parts.
    pub fn new(tokenizer: TextTokenizer, templates: Option<ChatTemplates>, defaults: SamplingDefaults) -> Self {
        Self {
            tokenizer: Arc::new(tokenizer),
            templates: templates.map(Arc::new),
            foreign: None,
            defaults,
        }
    }

    /// The same with another tokenizer, or with an adapter's templates.
    pub fn with_own(&self, tokenizer: Option<Arc<TextTokenizer>>, templates: Option<Option<ChatTemplates>>) -> Self {
        Self {
            foreign: templates.is_some().then(|| Arc::new(Semaphore::new(1))),
            tokenizer: tokenizer.unwrap_or_else(|| Arc::clone(&self.tokenizer)),
            templates: match templates {
                Some(own) => own.map(Arc::new),
                None => self.templates.clone(),
            },
            defaults: self.defaults.clone(),
        }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<TextTokenizer> {
        &self.tokenizer
    }

    /// The model's chat templates, if it has any.
    pub fn templates(&self) -> Option<&ChatTemplates> {
        self.templates.as_deref()
    }

    /// What the model recommends.
    pub fn sampling_defaults(&self) -> &SamplingDefaults {
        &self.defaults
    }

    /// Uses `defaults` instead of the model's recommendation.
    pub fn set_sampling_defaults(&mut self, defaults: SamplingDefaults) {
        self.defaults = defaults;
    }

    /// Does work in which conversations are rendered: beside the thread's other tasks if it is `large`, or if the template is an adapter's
    /// own, which may be slow on purpose. One template has one such turn, so that others get theirs.
    pub async fn rendering<T>(&self, large: bool, work: impl FnOnce() -> T) -> T {
        let _turn = match &self.foreign {
            Some(turn) => Some(turn.acquire().await.expect("nobody closes it")),
            None => None,
        };
        beside_if(large || self.foreign.is_some(), work).await
    }

    /// The text that the chat template makes of a conversation. May take long: see [`Self::rendering`].
    ///
    /// # Errors
    /// 400 with the template's reason, or because there is none.
    pub fn render_chat(&self, input: &ChatInput<'_>) -> Result<String, ApiError> {
        let _stage = tracing::debug_span!("render").entered();
        match &self.templates {
            Some(templates) => Ok(templates.render(input)?),
            None => Err(ApiError::invalid(
                "messages",
                "The model has no chat template; use /v1/completions, or start the server with one.",
            )),
        }
    }

    /// Token ids of a text. With `add_special_tokens`, as a prompt of its own; without, as a rendered template, which has them.
    ///
    /// # Errors
    /// 400.
    #[tracing::instrument(name = "tokenize", level = "debug", skip_all, fields(text_bytes = text.len()))]
    pub async fn encode(&self, text: String, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
        if text.len() < BLOCKING_TEXT_BYTES {
            return Ok(self.tokenizer.encode(&text, add_special_tokens)?);
        }
        let tokenizer = Arc::clone(&self.tokenizer);
        let encoded = tokio::task::spawn_blocking(move || tokenizer.encode(&text, add_special_tokens)).await;
        Ok(encoded.map_err(|_| ApiError::internal())??)
    }
}

/// Token ids of several texts, each as its model reads it.
///
/// # Errors
/// 400.
#[tracing::instrument(name = "tokenize", level = "debug", skip_all, fields(texts = texts.len()))]
pub async fn encode_all(texts: &[(&PromptProcessor, &str)], add_special_tokens: bool) -> Result<Vec<Vec<u32>>, ApiError> {
    let bytes: usize = texts.iter().map(|(_, text)| text.len()).sum();
    let encode = || {
        let encoded = texts.iter().map(|(prompt, text)| prompt.tokenizer.encode(text, add_special_tokens));
        encoded.collect::<Result<_, _>>()
    };
    Ok(beside_if(bytes >= BLOCKING_TEXT_BYTES, encode).await?)
}

/// The chat templates of `tokenizer_config.json`; `None` if it has none.
///
/// # Errors
/// `Json`; a template that is no Jinja.
pub fn templates_from_config(tokenizer_config: &[u8]) -> Result<Option<ChatTemplates>, PromptError> {
    let config: Value = serde_json::from_slice(tokenizer_config).map_err(|error| PromptError::Json {
        file: "tokenizer_config.json",
        error,
    })?;
    let sources = templates_of(&config);
    let special_tokens = special_tokens(&config, &Value::Null);
    let compiled = (!sources.is_empty()).then(|| ChatTemplates::new(sources, special_tokens));
    let file = TextFiles::CONFIG;
    compiled.transpose().map_err(|error| PromptError::Template { file, error })
}

fn read(files: &FileSource, name: &'static str) -> Result<Option<Vec<u8>>, PromptError> {
    if !files.contains(name) {
        return Ok(None);
    }
    files
        .read(name, MAX_FILE_BYTES)
        .map(Some)
        .map_err(|error| PromptError::Read { file: name, error })
}

fn read_json(files: &FileSource, name: &'static str) -> Result<Option<Value>, PromptError> {
    read(files, name)?
        .map(|bytes| serde_json::from_slice(&bytes).map_err(|error| PromptError::Json { file: name, error }))
        .transpose()
}

/// `chat_template` is a string, or a list of named ones.
fn templates_of(config: &Value) -> BTreeMap<String, String> {
    match &config["chat_template"] {
        Value::String(template) => [("default".to_owned(), template.clone())].into(),
        Value::Array(named) => named
            .iter()
            .filter_map(|entry| Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned())))
            .collect(),
        _ => BTreeMap::new(),
    }
}

/// A token is a string, or an object with its `content`.
fn special_tokens(config: &Value, map: &Value) -> SpecialTokens {
    const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
    let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    let by_name = NAMES
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), text(&config[name]).or_else(|| text(&map[name]))?)))
        .collect();
    SpecialTokens { by_name }
}

fn sampling_defaults(config: &Value) -> SamplingDefaults {
    let number = |name: &str| config[name].as_f64().map(|value| value as f32);
    // Temperature and its like mean something only to a model that is to be sampled from.
    let samples = config["do_sample"].as_bool().unwrap_or(false);
    let sampled = |name: &str| number(name).filter(|_| samples);
    SamplingDefaults {
        temperature: sampled("temperature"),
        top_p: sampled("top_p"),
        top_k: config["top_k"].as_u64().and_then(|k| u32::try_from(k).ok()).filter(|_| samples),
        min_p: sampled("min_p"),
        repetition_penalty: number("repetition_penalty"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn directory(files: &[(&str, &str)]) -> (tempfile::TempDir, FileSource) {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(directory.path().join(name), content).unwrap();
        }
        let source = FileSource::Directory(directory.path().into());
        (directory, source)
    }

    fn render(processor: &PromptProcessor, tools: Option<&[Value]>) -> String {
        let messages = [json!({"role": "user", "content": "hi"})];
        let input = ChatInput {
            messages: &messages,
            tools,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: None,
        };
        processor.render_chat(&input).unwrap()
    }

    #[test]
    fn a_directory_is_read_as_transformers_reads_it() {
        let tokenizer = crate::tokenizer::tests::byte_level_json();
        let config = json!({
            "bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>", "pad_token": null,
            "chat_template": [
                {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"},
                {"name": "tool_use", "template": "tools"},
            ],
        });
        let generation = json!({"do_sample": true, "temperature": 0.5, "top_k": 20, "repetition_penalty": 1.1});
        let (_directory, files) = directory(&[
            ("tokenizer.json", &tokenizer),
            ("tokenizer_config.json", &config.to_string()),
            ("generation_config.json", &generation.to_string()),
        ]);
        let processor = PromptProcessor::from_files(&files, None).unwrap();
        assert_eq!(render(&processor, None), "<s>hi</s>");
        assert_eq!(render(&processor, Some(&[json!({})])), "tools");
        let rendered = processor.tokenizer().encode("<s>hi</s>", false).unwrap();
        assert_eq!(rendered, [260, 104, 105, 261], "one beginning token");
        assert_eq!(
            *processor.sampling_defaults(),
            SamplingDefaults {
                temperature: Some(0.5),
                top_k: Some(20),
                repetition_penalty: Some(1.1),
                ..SamplingDefaults::default()
            }
        );

        std::fs::write(_directory.path().join("chat_template.jinja"), "from its own file").unwrap();
        assert_eq!(render(&PromptProcessor::from_files(&files, None).unwrap(), None), "from its own file");
        assert_eq!(render(&PromptProcessor::from_files(&files, Some("given")).unwrap(), None), "given");
    }

    #[test]
    fn a_tokenizer_file_is_read_once_until_it_is_another() {
        let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/added-tokens/tokenizer");
        let source = FileSource::Directory(fixture);
        let hashes = TokenizerHashes::default();
        let first = hashes.read(&source).unwrap().unwrap();
        let known = hashes.read(&source).unwrap().unwrap();
        assert!(first.content.is_some() && known.content.is_none());
        assert_eq!(first.digest, known.digest);
        assert_eq!(
            first.content(&source).unwrap(),
            known.content(&source).unwrap(),
            "it is read when it is needed"
        );

        let (directory, source) = directory(&[("tokenizer.json", "one")]);
        let one = hashes.read(&source).unwrap().unwrap();
        assert_eq!(hashes.0.lock().len(), 1, "it may change again in this tick of the clock");
        let stamp = source.file_stamp(TextFiles::TOKENIZER).unwrap();
        hashes.0.lock().insert(stamp, one.digest);
        assert!(hashes.read(&source).unwrap().unwrap().content.is_none());
        let known = hashes.read(&source).unwrap().unwrap();
        std::fs::write(directory.path().join("new"), "two").unwrap();
        std::fs::rename(directory.path().join("new"), directory.path().join("tokenizer.json")).unwrap();
        let two = hashes.read(&source).unwrap().unwrap();
        assert!(two.digest != one.digest && two.content.is_some());
        let error = known.content(&source).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json: it was replaced"), "{error}");
        let memory = FileSource::Memory(
            [polylora_engine::MemoryFile {
                name: "tokenizer.json".into(),
                bytes: b"two".to_vec(),
            }]
            .into(),
        );
        assert_eq!(hashes.read(&memory).unwrap().unwrap().digest, two.digest);
        assert!(hashes.read(&FileSource::Embedded(&[])).unwrap().is_none());
    }

    #[test]
    fn without_do_sample_only_the_penalty_counts() {
        let config = json!({"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.2});
        let expected = SamplingDefaults {
            repetition_penalty: Some(1.2),
            ..SamplingDefaults::default()
        };
        assert_eq!(sampling_defaults(&config), expected);
    }

    #[test]
    fn an_adapter_s_template_holds_up_no_other_task_and_has_one_turn() {
        use std::sync::mpsc;

        use crate::beside::tests::{PATIENCE, one_worker};
        let tokenizer = crate::tokenizer::tests::byte_level_json();
        let (_directory, files) = directory(&[("tokenizer.json", &tokenizer)]);
        let base = PromptProcessor::from_files(&files, None).unwrap();
        let own = ChatTemplates::new([("default".into(), "own".into())].into(), SpecialTokens::default()).unwrap();
        let own = base.with_own(None, Some(Some(own)));
        let runtime = one_worker();
        let (begun, has_begun) = mpsc::channel();
        let (served, is_served) = mpsc::channel();
        let first = {
            let own = own.clone();
            runtime.spawn(async move {
                let render = move || {
                    begun.send(()).unwrap();
                    // Ends when the other task was served, which is on the same, only thread.
                    is_served.recv_timeout(PATIENCE)
                };
                own.rendering(false, render).await
            })
        };
        has_begun.recv_timeout(PATIENCE).unwrap();
        // A second rendering of the same template waits for its turn, and holds nobody up meanwhile.
        let second = {
            let own = own.clone();
            runtime.spawn(async move { own.rendering(false, || "second").await })
        };
        let other = runtime.spawn(async move {
            assert_eq!(base.rendering(false, || "base").await, "base");
            served.send(()).unwrap();
        });
        runtime.block_on(other).unwrap();
        assert_eq!(runtime.block_on(first).unwrap(), Ok(()));
        assert_eq!(runtime.block_on(second).unwrap(), "second");
    }

    #[test]
    fn a_broken_template_is_reported_of_the_file_that_it_stands_in() {
        let tokenizer = crate::tokenizer::tests::byte_level_json();
        let config = json!({"chat_template": "fine"}).to_string();
        let broken = json!({"chat_template": "{% if %}"}).to_string();
        let error = |files: &[(&str, &str)], given| {
            let (_directory, files) = directory(&[files, &[("tokenizer.json", tokenizer.as_str())]].concat());
            PromptProcessor::from_files(&files, given).err().expect("a template is broken")
        };
        for (files, given, file) in [
            (&[("tokenizer_config.json", broken.as_str())][..], None, "tokenizer_config.json"),
            (
                &[("tokenizer_config.json", config.as_str()), ("chat_template.jinja", "{% for %}")],
                None,
                "chat_template.jinja",
            ),
            (
                &[("tokenizer_config.json", config.as_str()), ("chat_template.json", broken.as_str())],
                None,
                "chat_template.json",
            ),
            (&[], Some("{{"), "--chat-template"),
        ] {
            let error = error(files, given);
            assert!(
                matches!(&error, PromptError::Template { file: found, .. } if *found == file),
                "{file}: {error}"
            );
            assert_eq!(error.file_and_reason().0, file);
            assert!(error.to_string().starts_with(&format!("{file}: chat template \"default\": ")), "{error}");
        }
    }

    #[test]
    fn what_is_missing_or_broken_is_named() {
        let (_directory, files) = directory(&[]);
        assert!(
            PromptProcessor::from_files(&files, None)
                .err()
                .unwrap()
                .to_string()
                .contains("tokenizer.json")
        );
        let (_directory, files) = directory(&[("tokenizer.json", "{}"), ("tokenizer_config.json", "{")]);
        assert!(
            PromptProcessor::from_files(&files, None)
                .err()
                .unwrap()
                .to_string()
                .contains("tokenizer_config.json")
        );
    }
}
