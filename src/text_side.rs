//! A model's side of text: its tokenizer, its chat template, how it writes calls, what ends its outputs. The base model has one. An adapter
//! that brings tokenizer files that say something else has one of its own, which lives as long as the adapter's version.
//!
//! Most adapters bring a copy of the base model's files. One that says the same is not kept: the adapter then shares the base model's side.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, OnceLock, Weak},
};

use parking_lot::Mutex;
use polylora_engine::{
    AdapterError, AdapterLease, FileSource,
    adapter::{Companion, CompanionReader, HostAdapter, HostPart, ModuleId},
    decoder::DecoderConfig,
};

use crate::{
    chat_template::ChatTemplates,
    constraint::GrammarCompiler,
    prompt::{self, PromptError, PromptProcessor, TextFiles, TokenizerFile, TokenizerHashes},
    tokenizer::{TextTokenizer, TokenizerError},
    tool_calls::ToolFormat,
};

/// Contents that are remembered as the base model's in another spelling.
const KNOWN_COPIES: usize = 1024;
/// Tokens that an error names.
const NAMED_TOKENS: usize = 5;

/// How a request's text becomes tokens, and its tokens text.
#[derive(Clone)]
pub struct TextSide {
    /// Makes prompts; has the tokenizer.
    pub prompt: Arc<PromptProcessor>,
    /// Compiles grammars for that tokenizer.
    pub grammars: Arc<GrammarCompiler>,
    /// How calls of functions are written; by default what the chat template teaches.
    pub tool_format: ToolFormat,
    /// Tokens that end an output beside the base model's.
    pub end_tokens: Arc<[u32]>,
}

impl TextSide {
    /// Of a model whose logits are over `vocab_size` tokens, and whose outputs end with any of `eos_token_ids`.
    pub fn new(prompt: PromptProcessor, vocab_size: usize, eos_token_ids: Vec<u32>) -> Self {
        Self {
            grammars: Arc::new(GrammarCompiler::new(Arc::clone(prompt.tokenizer()), vocab_size, eos_token_ids)),
            tool_format: ToolFormat::of(prompt.templates()),
            prompt: Arc::new(prompt),
            end_tokens: Arc::from([]),
        }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<TextTokenizer> {
        self.prompt.tokenizer()
    }
}

/// A side that adapters keep alive.
struct OwnSide {
    digest: [u8; 32],
    side: TextSide,
    /// `None`: it has the base model's.
    tokenizer: Option<Arc<OwnTokenizer>>,
    parts: Vec<HostPart>,
}

/// A tokenizer that is not the base model's.
struct OwnTokenizer {
    tokenizer: Arc<TextTokenizer>,
    /// Ids of words that are other words of the base model's, ascending.
    other_words: Vec<u32>,
}

impl Companion for OwnSide {
    fn digest(&self) -> [u8; 32] {
        self.digest
    }

    fn parts(&self) -> Vec<HostPart> {
        self.parts.clone()
    }
}

/// What is alike in many adapters, by a hash of what it was made from, for as long as anybody holds it.
struct Shared<T>(Mutex<HashMap<[u8; 32], Weak<T>>>);

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Shared<T> {
    fn len(&self) -> usize {
        self.0.lock().values().filter(|shared| shared.strong_count() > 0).count()
    }

    fn find(&self, digest: &[u8; 32]) -> Option<Arc<T>> {
        self.0.lock().get(digest)?.upgrade()
    }

    /// The one that is there already, if two came at once.
    fn insert(&self, digest: [u8; 32], new: T) -> Arc<T> {
        let mut shared = self.0.lock();
        shared.retain(|_, shared| shared.strong_count() > 0);
        if let Some(there) = shared.get(&digest).and_then(Weak::upgrade) {
            return there;
        }
        let new = Arc::new(new);
        shared.insert(digest, Arc::downgrade(&new));
        new
    }
}

/// The sides of adapters that have their own, by content. Whoever holds such an adapter finds its side here. Tokenizers and what is made for
/// grammars are large: adapters that differ in their templates alone share them.
#[derive(Default)]
pub struct OwnSides {
    sides: Shared<OwnSide>,
    tokenizers: Shared<OwnTokenizer>,
    grammars: Shared<GrammarCompiler>,
}

impl OwnSides {
    /// The side of an adapter; `None`: the base model's.
    pub fn of(&self, lease: &AdapterLease) -> Option<TextSide> {
        let own = self.sides.find(&lease.weights().companion.as_ref()?.digest());
        own.map(|own| own.side.clone())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sides.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What adapters' tokenizer files are compared with, and completed from.
pub struct BaseText {
    prompt: PromptProcessor,
    files: TextFiles,
    /// The templates that the base model answers with: those of the files, unless the operator gave another.
    templates: BTreeMap<String, String>,
    tokenizer_digest: [u8; 32],
    canonical_digest: OnceLock<[u8; 32]>,
    known_copies: Mutex<HashSet<[u8; 32]>>,
    hashes: TokenizerHashes,
    own: Arc<OwnSides>,
}

impl BaseText {
    /// Of the folder that the base model's tokenizer is read from, and of the chat template that was given instead of the model's own, if one
    /// was. `prompt` is what came of both.
    ///
    /// # Errors
    /// See [`PromptError`].
    pub fn new(files: &FileSource, chat_template: Option<&str>, prompt: PromptProcessor, own: Arc<OwnSides>) -> Result<Self, PromptError> {
        let tokenizer = TokenizerFile::read(files)?;
        let files = TextFiles::read(files)?;
        let given = chat_template.map(|given| BTreeMap::from([("default".to_owned(), given.to_owned())]));
        Ok(Self {
            prompt,
            templates: given.unwrap_or_else(|| files.templates.clone()),
            tokenizer_digest: tokenizer.map_or_else(Default::default, |file| file.digest),
            files,
            canonical_digest: OnceLock::new(),
            known_copies: Mutex::default(),
            hashes: TokenizerHashes::default(),
            own,
        })
    }

    /// Reads the tokenizer files of adapters for a base model of this shape, on the threads that load adapters.
    pub fn reader(self: Arc<Self>, decoder: &DecoderConfig) -> CompanionReader {
        let (vocab_size, eos_token_ids) = (decoder.vocab_size, decoder.eos_token_ids.clone());
        Arc::new(move |files, adapter| {
            let read = self.read(files, adapter, vocab_size, &eos_token_ids)?;
            Ok(read.map(|own| own as Arc<dyn Companion>))
        })
    }

    /// `None`: the adapter brings nothing that the base model has not.
    fn read(
        &self,
        source: &FileSource,
        adapter: &HostAdapter,
        base_vocab_size: usize,
        eos_token_ids: &[u32],
    ) -> Result<Option<Arc<OwnSide>>, AdapterError> {
        let files = TextFiles::read(source).map_err(bad_file)?;
        let tokenizer_file = self.hashes.read(source).map_err(bad_file)?;
        if files.is_empty() && tokenizer_file.is_none() {
            return Ok(None);
        }
        let vocab_size = adapter.vocab_size(base_vocab_size);
        let check = |own: Option<&OwnTokenizer>| own.map_or(Ok(()), |own| own.check(self.prompt.tokenizer(), adapter));
        let tokenizer_digest = files.tokenizer_digest(tokenizer_file.as_ref(), vocab_size);
        let digest = files.digest(&tokenizer_digest);
        if let Some(own) = self.own.sides.find(&digest) {
            check(own.tokenizer.as_deref())?;
            return Ok(Some(own));
        }
        let tokenizer = self.tokenizer(source, &files, tokenizer_file, tokenizer_digest, vocab_size)?;
        check(tokenizer.as_deref())?;
        let has_own_template = !files.templates.is_empty() && files.templates != self.files.templates;
        let sources = if has_own_template { &files.templates } else { &self.templates };
        let mut special_tokens = self.files.special_tokens.clone();
        special_tokens.by_name.extend(files.special_tokens.by_name.clone());
        let shows = |name: &String| sources.values().any(|source| source.contains(name.as_str()));
        let differs = |name: &str| special_tokens.by_name.get(name) != self.files.special_tokens.by_name.get(name);
        let shows_others = special_tokens.by_name.keys().any(|name| differs(name) && shows(name));
        let used = tokenizer.as_ref().map_or(self.prompt.tokenizer(), |own| &own.tokenizer);
        let is_known = |text: &String| used.token_to_id(text);
        let mut end_tokens = Vec::new();
        if differs("eos_token")
            && let Some(text) = special_tokens.by_name.get("eos_token")
        {
            let id = is_known(text).ok_or_else(|| unsupported_token("eos_token", text))?;
            if !eos_token_ids.contains(&id) {
                end_tokens.push(id);
            }
        }
        if tokenizer.is_none() && !has_own_template && !shows_others && end_tokens.is_empty() {
            return Ok(None);
        }
        let mut parts = Vec::new();
        if let Some(own) = &tokenizer {
            parts.push(HostPart {
                id: tokenizer_digest,
                bytes: own.tokenizer.memory_bytes() + size_of_val(&own.other_words[..]),
            });
        }
        let templates = if has_own_template || shows_others {
            parts.push(HostPart {
                id: digest,
                bytes: ChatTemplates::memory_bytes(sources),
            });
            let compiled = (!sources.is_empty()).then(|| ChatTemplates::new(sources.clone(), special_tokens.clone()));
            Some(compiled.transpose().map_err(|error| bad_file(files.template_error(error)))?)
        } else {
            None
        };
        let ends: Vec<u32> = eos_token_ids.iter().copied().chain(end_tokens.iter().copied()).collect();
        let of_tokenizer = tokenizer.as_ref().map_or(&[][..], |_| &tokenizer_digest[..]);
        let end_bytes: Vec<u8> = ends.iter().flat_map(|id| id.to_le_bytes()).collect();
        let key = prompt::digest([of_tokenizer, &vocab_size.to_le_bytes(), &end_bytes]);
        let grammars = self.own.grammars.find(&key);
        let grammars = grammars.unwrap_or_else(|| self.own.grammars.insert(key, GrammarCompiler::new(Arc::clone(used), vocab_size, ends)));
        parts.push(HostPart {
            id: key,
            bytes: grammars.memory_bytes(),
        });
        let prompt = self.prompt.with_own(tokenizer.as_ref().map(|own| Arc::clone(&own.tokenizer)), templates);
        let side = TextSide {
            tool_format: ToolFormat::of(prompt.templates()),
            prompt: Arc::new(prompt),
            grammars,
            end_tokens: end_tokens.into(),
        };
        let own = OwnSide {
            digest,
            side,
            tokenizer,
            parts,
        };
        Ok(Some(self.own.sides.insert(digest, own)))
    }

    /// The tokenizer that the files make, if it is another than the base model's.
    fn tokenizer(
        &self,
        source: &FileSource,
        files: &TextFiles,
        file: Option<TokenizerFile>,
        digest: [u8; 32],
        vocab_size: usize,
    ) -> Result<Option<Arc<OwnTokenizer>>, AdapterError> {
        let base = self.prompt.tokenizer();
        let bos = files
            .special_tokens
            .by_name
            .get("bos_token")
            .or_else(|| self.files.special_tokens.by_name.get("bos_token"));
        let has_other_bos = bos != self.files.special_tokens.by_name.get("bos_token");
        // It need not be read again.
        let other_file = file.filter(|file| file.digest != self.tokenizer_digest);
        let adds = |tokenizer: &TextTokenizer| files.added.iter().any(|(id, token)| tokenizer.token_to_id(&token.content) != Some(*id));
        if other_file.is_none() && !adds(base) && !has_other_bos {
            return Ok(None);
        }
        if self.known_copies.lock().contains(&digest) {
            return Ok(None);
        }
        if let Some(own) = self.own.tokenizers.find(&digest) {
            return Ok(Some(own));
        }
        let failed = |error: TokenizerError| match error {
            TokenizerError::Added { .. } => AdapterError::BadFile {
                file: files.added_file.unwrap_or(TextFiles::TOKENIZER).into(),
                reason: error.to_string(),
            },
            other => bad_file(other.into()),
        };
        let bos = bos.map(String::as_str);
        let own = match other_file {
            Some(file) => {
                let json = file.content(source).map_err(bad_file)?;
                TextTokenizer::from_bytes_within(&json, bos, &files.added, vocab_size).map_err(failed)?
            }
            None => base.extended(bos, &files.added, vocab_size).map_err(failed)?,
        };
        if let Some(text) = bos.filter(|text| has_other_bos && own.token_to_id(text).is_none()) {
            return Err(unsupported_token("bos_token", text));
        }
        // Written by another version of the library, the same tokenizer is other bytes.
        let is_same = !has_other_bos && own.canonical_digest() == *self.canonical_digest.get_or_init(|| base.canonical_digest());
        if is_same {
            let mut known = self.known_copies.lock();
            if known.len() >= KNOWN_COPIES {
                known.clear();
            }
            known.insert(digest);
            return Ok(None);
        }
        let own = OwnTokenizer {
            other_words: other_words(&own, base),
            tokenizer: Arc::new(own),
        };
        Ok(Some(self.own.tokenizers.insert(digest, own)))
    }
}

fn bad_file(error: PromptError) -> AdapterError {
    let (file, reason) = error.file_and_reason();
    AdapterError::BadFile { file: file.into(), reason }
}

fn unsupported_token(name: &str, text: &str) -> AdapterError {
    AdapterError::BadFile {
        file: TextFiles::CONFIG.into(),
        reason: format!("`{name}` is {text:?}, which the tokenizer has not"),
    }
}

/// Ids of words of the base model's vocabulary that are other words in an adapter's. Harmless is what a fine-tuning adds or renames among
/// the added tokens (padding, reserved names), and what it leaves out.
fn other_words(own: &TextTokenizer, base: &TextTokenizer) -> Vec<u32> {
    let is_other = |token: &str, id: u32| base.id_to_token(id).is_some_and(|of_base| of_base != token) && !(own.is_added(id) && base.is_added(id));
    let mut ids: Vec<u32> = own.vocabulary().filter(|(token, id)| is_other(token, *id)).map(|(_, id)| id).collect();
    ids.sort_unstable();
    ids
}

impl OwnTokenizer {
    /// Checks that a word of the base model's vocabulary stays that word, unless the adapter has trained its row.
    fn check(&self, base: &TextTokenizer, adapter: &HostAdapter) -> Result<(), AdapterError> {
        let embeddings = ModuleId::EmbedTokens;
        if adapter.replaced(embeddings).is_some() || adapter.module(embeddings).is_some() {
            return Ok(());
        }
        let trained = adapter.token_rows(embeddings).map_or(&[][..], |rows| &rows.token_ids);
        let untrained = self.other_words.iter().filter(|id| trained.binary_search(id).is_err());
        let count = untrained.clone().count();
        if count == 0 {
            return Ok(());
        }
        let text = |tokenizer: &TextTokenizer, id| tokenizer.id_to_token(id).unwrap_or_default();
        let name = |&id: &u32| format!("{id} is {:?}, the base model's is {:?}", text(&self.tokenizer, id), text(base, id));
        let named: Vec<String> = untrained.take(NAMED_TOKENS).map(name).collect();
        Err(AdapterError::BadFile {
            file: TextFiles::TOKENIZER.into(),
            reason: format!(
                "token {} ({count} in all): the tokenizer is another model's, and the adapter did not train these rows",
                named.join("; ")
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use polylora_engine::adapter::{LoraFeatures, LoraLimits, PackedDtype, load_adapter};
    use serde_json::{Value, json};

    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
    }

    fn tokenizer_folder() -> PathBuf {
        root().join("tests/fixtures/added-tokens/tokenizer")
    }

    /// The base model's side, with what loads adapters for it.
    struct Base {
        decoder: DecoderConfig,
        text: Arc<BaseText>,
        own: Arc<OwnSides>,
    }

    impl Base {
        fn new(chat_template: Option<&str>) -> Self {
            let files = FileSource::Directory(tokenizer_folder());
            let own = Arc::new(OwnSides::default());
            let prompt = PromptProcessor::from_files(&files, chat_template).unwrap();
            let config = std::fs::read(root().join("tests/fixtures/tiny-llama3/config.json")).unwrap();
            Self {
                decoder: DecoderConfig::from_json(&config, None).unwrap(),
                text: Arc::new(BaseText::new(&files, chat_template, prompt, Arc::clone(&own)).unwrap()),
                own,
            }
        }

        /// An adapter of the repository with other files beside it.
        fn try_load(&self, adapter: &str, files: &[(&str, Vec<u8>)]) -> Result<AdapterLease, AdapterError> {
            let folder = tempfile::tempdir().unwrap();
            for name in ["adapter_config.json", "adapter_model.safetensors"] {
                std::fs::copy(root().join(adapter).join(name), folder.path().join(name)).unwrap();
            }
            for (name, bytes) in files {
                std::fs::write(folder.path().join(name), bytes).unwrap();
            }
            let limits = LoraLimits {
                features: LoraFeatures {
                    output_terms: true,
                    replaced_weights: true,
                    own_tokens: true,
                },
                companion: Some(Arc::clone(&self.text).reader(&self.decoder)),
                ..LoraLimits::new(PackedDtype::F32)
            };
            let (adapter, _) = load_adapter(&FileSource::Directory(folder.path().to_owned()), &self.decoder, &limits)?;
            Ok(AdapterLease::detached("a".into(), Arc::new(adapter), None))
        }

        fn side(&self, adapter: &str, files: &[(&str, Vec<u8>)]) -> Option<(AdapterLease, TextSide)> {
            let lease = self.try_load(adapter, files).unwrap();
            self.own.of(&lease).map(|side| (lease, side))
        }

        #[track_caller]
        fn refused(&self, adapter: &str, files: &[(&str, Vec<u8>)], words: &[&str]) {
            let error = self.try_load(adapter, files).expect_err("refused").to_string();
            for word in words {
                assert!(error.contains(word), "{error:?} does not contain {word:?}");
            }
        }
    }

    /// It leaves the embedding as it is.
    const PLAIN: &str = "engine/tests/golden/adapters/plain_f16";
    const OWN: &str = "tests/fixtures/added-tokens/adapter";
    /// Every row of the embedding is its own, and there are 261.
    const SAVED: &str = "engine/tests/golden/adapters/tokens_saved";
    /// 259 tokens.
    const RESIZED: &str = "engine/tests/golden/adapters/tokens_untrained_rows";

    fn files_of(folder: &Path) -> Vec<(&'static str, Vec<u8>)> {
        let names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
        names.map(|name| (name, std::fs::read(folder.join(name)).unwrap())).to_vec()
    }

    fn changed(change: impl FnOnce(&mut Value)) -> Vec<(&'static str, Vec<u8>)> {
        let mut json: Value = serde_json::from_slice(&files_of(&tokenizer_folder())[0].1).unwrap();
        change(&mut json);
        vec![("tokenizer.json", serde_json::to_vec(&json).unwrap())]
    }

    #[test]
    fn copies_of_the_base_models_files_cost_nothing() {
        let base = Base::new(None);
        let plain = base.try_load(PLAIN, &[]).unwrap();
        let copies = files_of(&tokenizer_folder());
        for files in [
            &copies[..],
            &copies[..1],
            &copies[1..],
            &changed(|_| {}),
            &changed(|json| json["padding"] = json!(null)),
        ] {
            let copy = base.try_load(PLAIN, files).unwrap();
            assert!(copy.weights().companion.is_none() && base.own.is_empty());
            assert_eq!(copy.version(), plain.version());
        }
        assert_eq!(base.text.known_copies.lock().len(), 1, "both other spellings say the same");
    }

    #[test]
    fn equal_files_are_one_side_which_goes_with_the_last_adapter() {
        let base = Base::new(None);
        let files = files_of(&root().join(OWN));
        let (first, side) = base.side(OWN, &files).unwrap();
        let (second, same) = base.side(OWN, &files).unwrap();
        assert_eq!(first.version(), second.version());
        assert!(Arc::ptr_eq(side.tokenizer(), same.tokenizer()) && Arc::ptr_eq(&side.grammars, &same.grammars));
        assert_eq!(side.tokenizer().encode("red <tool>", false).unwrap(), [258, 220, 256]);
        assert_eq!(*side.end_tokens, [257]);
        // The same files for other rows are another side: its grammars are over as many tokens as the rows.
        let (other, _) = base.side(SAVED, &files).unwrap();
        assert_eq!(base.own.len(), 2);
        drop((first, other));
        assert_eq!(base.own.len(), 1);
        drop(second);
        assert!(base.own.is_empty(), "streams may go on with the tokenizer, nobody finds it");
    }

    #[test]
    fn adapters_that_differ_in_their_templates_alone_share_the_tokenizer() {
        let base = Base::new(None);
        let mut files = files_of(&root().join(OWN));
        let (first, side) = base.side(OWN, &files).unwrap();
        files[2].1 = b"another: {{ messages[0].content }}".to_vec();
        let (second, other) = base.side(OWN, &files).unwrap();
        assert_ne!(first.version(), second.version());
        assert!(!Arc::ptr_eq(&side.prompt, &other.prompt));
        assert!(Arc::ptr_eq(side.tokenizer(), other.tokenizer()) && Arc::ptr_eq(&side.grammars, &other.grammars));
        drop((first, side, second, other));
        assert_eq!((base.own.len(), base.own.tokenizers.len(), base.own.grammars.len()), (0, 0, 0));
    }

    #[test]
    fn what_adapters_share_counts_once() {
        let base = Base::new(None);
        let parts = |lease: &AdapterLease| -> BTreeMap<[u8; 32], usize> {
            let companion = lease.weights().companion.as_ref().unwrap();
            companion.parts().iter().map(|part| (part.id, part.bytes)).collect()
        };
        let mut files = files_of(&root().join(OWN));
        let (first, _) = base.side(OWN, &files).unwrap();
        files[2].1 = b"another: {{ messages[0].content }}".to_vec();
        let (second, _) = base.side(OWN, &files).unwrap();
        let (one, other) = (parts(&first), parts(&second));
        assert_eq!((one.len(), other.len()), (3, 3), "a tokenizer, what its grammars need, a template");
        let shared: Vec<_> = one.keys().filter(|id| other.contains_key(*id)).collect();
        assert_eq!(shared.len(), 2, "all but the template");
        assert!(one.values().sum::<usize>() > 2 * files[0].1.len(), "more than the file");
        // One with the base model's tokenizer takes none of its own.
        let (third, _) = base.side(PLAIN, &files[2..]).unwrap();
        assert_eq!(parts(&third).len(), 2);
        assert!(parts(&third).keys().all(|id| !one.contains_key(id)));
    }

    #[test]
    fn a_template_alone_shares_the_tokenizer() {
        let template = |text: &str| vec![("chat_template.jinja", text.as_bytes().to_vec())];
        for given in [None, Some("given")] {
            let base = Base::new(given);
            let (_lease, side) = base.side(PLAIN, &template("own {{ eos_token }}")).unwrap();
            assert!(Arc::ptr_eq(side.tokenizer(), base.text.prompt.tokenizer()));
            assert!(side.prompt.templates().unwrap().mentions("own"));
            // What the model itself says is no opinion of the adapter's.
            let copy = files_of(&tokenizer_folder()).split_off(2);
            assert!(base.side(PLAIN, &copy).is_none());
            // Other special tokens show in the template that is in effect.
            let special = vec![("special_tokens_map.json", br#"{"eos_token": "<s>"}"#.to_vec())];
            let (_lease, side) = base.side(PLAIN, &special).unwrap();
            assert_eq!(side.prompt.templates().unwrap().mentions("given"), given.is_some());
            assert_eq!(*side.end_tokens, [0]);
        }
        let base = Base::new(None);
        base.refused(PLAIN, &template("{% if %}"), &["chat template"]);
        let json = vec![("chat_template.json", br#"{"chat_template": "from json"}"#.to_vec())];
        assert!(base.side(PLAIN, &json).unwrap().1.prompt.templates().unwrap().mentions("from json"));
    }

    #[test]
    fn added_tokens_alone_are_added_to_the_base_models() {
        let base = Base::new(None);
        let added = |json: Value| vec![("added_tokens.json", json.to_string().into_bytes())];
        let (_lease, side) = base.side(RESIZED, &added(json!({"<b>": 257, "<a>": 256}))).unwrap();
        assert_eq!(side.tokenizer().encode("<b><a>", false).unwrap(), [257, 256]);
        let config = json!({"added_tokens_decoder": {"256": {"content": "<x>", "special": true}, "0": {"content": "<s>"}}});
        let (_lease, side) = base.side(RESIZED, &[("tokenizer_config.json", config.to_string().into_bytes())]).unwrap();
        assert!(side.tokenizer().is_special(256) && side.tokenizer().is_added(256));
        // In the base model's vocabulary already.
        assert!(base.side(PLAIN, &added(json!({"<s>": 0}))).is_none());
        base.refused(
            RESIZED,
            &added(json!({"<b>": 258})),
            &["added_tokens.json", "\"<b>\"", "the id 258", "has it as 256"],
        );
        base.refused(PLAIN, &added(json!({"<a>": 256})), &["\"<a>\" as 256", "rows for 256 tokens"]);
        base.refused(PLAIN, &added(json!({"<s>": 1})), &["added_tokens.json", "the id 1", "has it as 0"]);
        base.refused(PLAIN, &added(json!(["<s>"])), &["added_tokens.json"]);
    }

    #[test]
    fn a_tokenizer_of_another_model_is_refused_unless_its_rows_were_trained() {
        let base = Base::new(None);
        let swapped = changed(|json| {
            let vocab = json["model"]["vocab"].as_object_mut().unwrap();
            for (token, id) in vocab.iter_mut() {
                *id = match token.as_str() {
                    "a" => json!(67),
                    "b" => json!(66),
                    _ => continue,
                };
            }
        });
        base.refused(PLAIN, &swapped, &["tokenizer.json", "66 is \"b\", the base model's is \"a\"", "2 in all"]);
        assert!(base.side(SAVED, &swapped).is_some());
        // A huge id is no reason to make a huge table.
        let huge = changed(|json| json["model"]["vocab"]["zz"] = json!(4_000_000_000u32));
        base.refused(PLAIN, &huge, &["tokenizer.json", "\"zz\" as 4000000000"]);
        // A control token under another name is none.
        let renamed = changed(|json| {
            json["added_tokens"][0]["content"] = json!("<begin>");
            let vocab = json["model"]["vocab"].as_object_mut().unwrap();
            let id = vocab.remove("<s>").unwrap();
            vocab.insert("<begin>".into(), id);
        });
        assert_eq!(base.side(PLAIN, &renamed).unwrap().1.tokenizer().token_to_id("<begin>"), Some(0));
        let end = |token: &str| vec![("tokenizer_config.json", json!({"eos_token": token}).to_string().into_bytes())];
        base.refused(PLAIN, &end("<none>"), &["tokenizer_config.json", "`eos_token` is \"<none>\""]);
    }
}
