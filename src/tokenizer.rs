//! Text to token ids and back, over the `tokenizers` crate.
//!
//! Decoding one token at a time is the hot path of every stream. For the two families that serving meets (byte-level BPE, and
//! SentencePiece with byte fallback) a token's text is a fixed string of bytes, so it is looked up in a table; any other decoder
//! goes through [`TextTokenizer::decode`] on a small window.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use tokenizers::{AddedToken, Tokenizer};

/// Bytes of memory that a tokenizer takes for each byte of its tokenizer.json (merges), for each of its tokens (three tables), and for what
/// it remembers of texts. Resident memory of Qwen2.5's, SmolLM2's, DeepSeek's and Anthropic's was 0.73 to 0.95 times this sum.
const MEMORY_FOR_JSON: usize = 3;
const MEMORY_FOR_TOKEN: usize = 200;
const MEMORY_FOR_CACHE: usize = 1 << 20;

/// Tokens that any tokenizer may have: the largest known has a fiftieth of it, and tables are as long as the largest id says.
const MAX_TOKENS: usize = 1 << 24;

/// Why a tokenizer can't be used, or a text not tokenized.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// `tokenizer.json` is not one.
    #[error("tokenizer.json: {0}")]
    BadFile(String),
    /// An added token does not get the id that is said of it.
    #[error("the token {token:?} is to have the id {expected}, the tokenizer has it as {}", .got.map_or_else(|| "none".to_owned(), |got| got.to_string()))]
    Added {
        /// Its text.
        token: String,
        /// The id in the file.
        expected: u32,
        /// The id in the tokenizer.
        got: Option<u32>,
    },
    /// More tokens than there are rows for.
    #[error("it has {token:?} as {id} ({count} in all), and there are rows for {limit} tokens: an adapter with more saves its embeddings, too")]
    TooManyTokens {
        /// The first beyond.
        token: String,
        /// Its id.
        id: u32,
        /// How many are beyond.
        count: usize,
        /// Rows.
        limit: usize,
    },
    /// The text could not be tokenized.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// The ids could not be turned into text.
    #[error("the tokens cannot be decoded: {0}")]
    Decode(String),
}

/// A tokenizer with what serving needs to know of its tokens.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    table: Option<TokenTable>,
    special: Vec<bool>,
    added: Vec<bool>,
    bos: Option<(String, u32)>,
    json_bytes: usize,
}

/// The bytes of every token, end to end.
struct TokenTable {
    bytes: Vec<u8>,
    /// `offsets[id]..offsets[id + 1]`.
    offsets: Vec<u32>,
}

/// How a decoder makes text of a token.
enum Family {
    /// GPT-2's characters that stand for bytes.
    ByteLevel,
    /// `space` stands for a space, `<0xHH>` for a byte if `byte_fallback`.
    SentencePiece { space: char, byte_fallback: bool },
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`. `bos_token` is the text of the beginning-of-sequence token, if the model has one.
    ///
    /// # Errors
    /// `BadFile`.
    pub fn from_bytes(json: &[u8], bos_token: Option<&str>) -> Result<Self, TokenizerError> {
        Self::from_bytes_within(json, bos_token, &BTreeMap::new(), usize::MAX)
    }

    /// The same, with tokens `added` by their ids if the file has not got them, and with ids below `limit`.
    ///
    /// # Errors
    /// `BadFile`; `Added` for one that would get another id, `TooManyTokens`.
    pub fn from_bytes_within(json: &[u8], bos_token: Option<&str>, added: &BTreeMap<u32, AddedToken>, limit: usize) -> Result<Self, TokenizerError> {
        let read = || {
            let tokenizer = Tokenizer::from_bytes(json).map_err(|error| TokenizerError::BadFile(error.to_string()))?;
            Self::from_tokenizer(tokenizer, bos_token, added, limit, json.len())
        };
        without_panic(read).unwrap_or_else(|reason| Err(TokenizerError::BadFile(reason)))
    }

    /// This one with more tokens, or another beginning-of-sequence token.
    ///
    /// # Errors
    /// As [`Self::from_bytes_within`].
    pub fn extended(&self, bos_token: Option<&str>, added: &BTreeMap<u32, AddedToken>, limit: usize) -> Result<Self, TokenizerError> {
        let extend = || Self::from_tokenizer(self.tokenizer.clone(), bos_token, added, limit, self.json_bytes);
        without_panic(extend).unwrap_or_else(|reason| Err(TokenizerError::BadFile(reason)))
    }

    fn from_tokenizer(
        mut tokenizer: Tokenizer,
        bos_token: Option<&str>,
        to_add: &BTreeMap<u32, AddedToken>,
        limit: usize,
        json_bytes: usize,
    ) -> Result<Self, TokenizerError> {
        for (&expected, token) in to_add {
            // In the order of their ids, which are given one after the other, as transformers does it.
            if tokenizer.token_to_id(&token.content) != Some(expected) {
                let add = [token.clone()];
                let is_added = if token.special {
                    tokenizer.add_special_tokens(add)
                } else {
                    tokenizer.add_tokens(add)
                };
                is_added.map_err(|error| TokenizerError::BadFile(error.to_string()))?;
            }
            let got = tokenizer.token_to_id(&token.content);
            if got != Some(expected) {
                let token = token.content.clone();
                return Err(TokenizerError::Added { token, expected, got });
            }
        }
        // A file saved in training may cut or pad; a server may do neither.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| TokenizerError::BadFile(error.to_string()))?;
        let added = tokenizer.get_added_tokens_decoder();
        let vocabulary = tokenizer.get_vocab(true);
        let vocab_size = vocabulary.values().map(|&id| id as usize + 1).max().unwrap_or(0);
        let limit = limit.min(MAX_TOKENS);
        if vocab_size > limit {
            let beyond = vocabulary.iter().filter(|(_, id)| **id as usize >= limit);
            let count = beyond.clone().count();
            let (token, id) = beyond.min_by_key(|(_, id)| **id).expect("the largest id is beyond");
            return Err(TokenizerError::TooManyTokens {
                token: token.clone(),
                id: *id,
                count,
                limit,
            });
        }
        // What it puts around a text is said by id.
        if let Ok(around) = tokenizer.encode_fast("", true)
            && let Some(id) = around.get_ids().iter().find(|id| **id as usize >= vocab_size)
        {
            let reason = format!("its post_processor puts the token {id} around texts, and it has {vocab_size} tokens");
            return Err(TokenizerError::BadFile(reason));
        }
        let mut special = vec![false; vocab_size];
        let mut is_added = vec![false; vocab_size];
        for (&id, token) in &added {
            special[id as usize] = token.special;
            is_added[id as usize] = true;
        }
        let table = family(&tokenizer).map(|family| {
            let mut pieces = vec![None; vocab_size];
            for (token, &id) in &vocabulary {
                pieces[id as usize] = Some(family.piece(token));
            }
            TokenTable::new(&pieces)
        });
        let bos = bos_token.and_then(|token| Some((token.to_owned(), tokenizer.token_to_id(token)?)));
        Ok(Self {
            tokenizer,
            table,
            special,
            added: is_added,
            bos,
            json_bytes,
        })
    }

    /// Token ids of a text. With `add_special_tokens` the tokenizer adds what it adds to a prompt (usually a beginning-of-sequence
    /// token), but not before one that the text already begins with.
    ///
    /// # Errors
    /// `Encode`.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = without_panic(|| self.tokenizer.encode_fast(text, add_special_tokens))
            .and_then(|encoding| encoding.map_err(|error| error.to_string()))
            .map_err(TokenizerError::Encode)?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some((bos_text, bos_id)) = &self.bos
            && text.starts_with(bos_text.as_str())
            && ids.starts_with(&[*bos_id, *bos_id])
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// The text of token ids, as the tokenizer's own decoder has it.
    ///
    /// # Errors
    /// `Decode`.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        without_panic(|| self.tokenizer.decode(ids, skip_special_tokens))
            .and_then(|text| text.map_err(|error| error.to_string()))
            .map_err(TokenizerError::Decode)
    }

    /// An estimate of what it takes of memory: the tables of the `tokenizers` crate, which tell nobody, and the ones here.
    pub fn memory_bytes(&self) -> usize {
        MEMORY_FOR_JSON * self.json_bytes + MEMORY_FOR_TOKEN * self.vocab_size() + MEMORY_FOR_CACHE
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.special.len()
    }

    /// The id of a token by its exact text, special tokens included.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The token as the vocabulary spells it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Every token with its id, in no order.
    pub fn vocabulary(&self) -> impl Iterator<Item = (String, u32)> {
        self.tokenizer.get_vocab(true).into_iter()
    }

    /// Whether a token was added to the vocabulary, which it then is no word of.
    pub fn is_added(&self, id: u32) -> bool {
        self.added.get(id as usize).copied().unwrap_or(false)
    }

    /// A hash of what the tokenizer does, whatever its file looked like.
    pub fn canonical_digest(&self) -> [u8; 32] {
        // What can't be written is like nothing else.
        let text = self.tokenizer.to_string(false).unwrap_or_else(|error| error.to_string());
        blake3::hash(text.as_bytes()).into()
    }

    /// Whether a token is special (a control token that is no text).
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The bytes that a token adds to the text, if they don't depend on its neighbours. Special tokens have the bytes of their
    /// name; ids outside the vocabulary (padding of the logits) have none.
    pub fn fixed_bytes(&self, id: u32) -> Option<&[u8]> {
        let table = self.table.as_ref()?;
        let Some((&start, &end)) = table.offsets.get(id as usize).zip(table.offsets.get(id as usize + 1)) else {
            return Some(&[]);
        };
        Some(&table.bytes[start as usize..end as usize])
    }

    /// The bytes of one token, alone.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.fixed_bytes(id) {
            Some(bytes) => bytes.to_vec(),
            None => self.decode(&[id], false).unwrap_or_default().into_bytes(),
        }
    }

    /// The text of one token, alone; bytes that are no whole character show as U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// Whether every token has [`Self::fixed_bytes`].
    pub fn has_fixed_bytes(&self) -> bool {
        self.table.is_some()
    }
}

/// Calls the library, which panics where a file says what no tokenizer it ever wrote does: then the file is bad, or the text beyond it, and
/// neither the server's start nor a request ends in a panic. Nothing that is kept is changed by the calls.
fn without_panic<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let reason = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason");
        format!("the tokenizer's library gives up on it: {reason}")
    })
}

impl TokenTable {
    fn new(pieces: &[Option<Vec<u8>>]) -> Self {
        let mut table = Self {
            bytes: Vec::with_capacity(pieces.len() * 6),
            offsets: Vec::with_capacity(pieces.len() + 1),
        };
        table.offsets.push(0);
        for piece in pieces {
            table.bytes.extend_from_slice(piece.as_deref().unwrap_or_default());
            table
                .offsets
                .push(u32::try_from(table.bytes.len()).expect("a vocabulary's text is far below 4 GiB"));
        }
        table
    }
}

fn family(tokenizer: &Tokenizer) -> Option<Family> {
    let decoder = serde_json::to_value(tokenizer.get_decoder()?).ok()?;
    match decoder["type"].as_str()? {
        "ByteLevel" => Some(Family::ByteLevel),
        "Metaspace" => Some(Family::SentencePiece {
            space: decoder["replacement"].as_str()?.chars().next()?,
            byte_fallback: false,
        }),
        "Sequence" => {
            let decoders = decoder["decoders"].as_array()?;
            let mut space = ' ';
            let mut byte_fallback = false;
            for decoder in decoders {
                match decoder["type"].as_str()? {
                    "ByteLevel" if decoders.len() == 1 => return Some(Family::ByteLevel),
                    "Replace" if decoder["content"] == " " => {
                        let mut pattern = decoder["pattern"]["String"].as_str()?.chars();
                        space = pattern.next()?;
                        if pattern.next().is_some() {
                            return None;
                        }
                    }
                    "ByteFallback" => byte_fallback = true,
                    // Fuse changes nothing; Strip takes the space off the very beginning of a text, which an output never is.
                    "Fuse" | "Strip" => {}
                    _ => return None,
                }
            }
            Some(Family::SentencePiece { space, byte_fallback })
        }
        _ => None,
    }
}

impl Family {
    fn piece(&self, token: &str) -> Vec<u8> {
        match self {
            // As the decoder has it: a token with a character outside the alphabet stands for itself.
            Self::ByteLevel => token.chars().map(byte_of_char).collect::<Option<_>>().unwrap_or_else(|| token.into()),
            Self::SentencePiece { space, byte_fallback } => {
                let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match byte.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) if *byte_fallback => vec![byte],
                    _ => token.replace(*space, " ").into_bytes(),
                }
            }
        }
    }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 on, in order.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    let itself = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match code {
        0..=0xff if itself(code) => Some(code as u8),
        0x100..0x144 => (0..256).filter(|&byte| !itself(byte)).nth(code as usize - 0x100).map(|byte| byte as u8),
        _ => None,
    }
}

/// Turns token ids into text as they come: never half a character, and nothing lost.
///
/// Bytes that can't become a character show as U+FFFD, as in `String::from_utf8_lossy`.
pub struct Detokenizer {
    tokenizer: Arc<TextTokenizer>,
    skip_special_tokens: bool,
    shown_tokens: Vec<u32>,
    state: DetokenizerState,
}

enum DetokenizerState {
    /// Bytes of a character that is not whole yet.
    Bytes(Vec<u8>),
    /// Tokens from the last piece of text that was given out, and where what was not given out begins.
    Window { ids: Vec<u32>, unread: usize },
}

/// A window is given out, whole characters or not, when so many tokens wait: no character takes more bytes than that.
const MAX_UNREAD_TOKENS: usize = 16;

impl Detokenizer {
    /// At the beginning of an output. `shown_tokens` are text although they are special.
    pub fn new(tokenizer: Arc<TextTokenizer>, skip_special_tokens: bool, shown_tokens: Vec<u32>) -> Self {
        let state = if tokenizer.has_fixed_bytes() {
            DetokenizerState::Bytes(Vec::new())
        } else {
            DetokenizerState::Window { ids: Vec::new(), unread: 0 }
        };
        Self {
            tokenizer,
            skip_special_tokens,
            shown_tokens,
            state,
        }
    }

    /// Takes a token and appends the text that is certain now.
    pub fn push(&mut self, token_id: u32, text: &mut String) {
        if self.skip_special_tokens && self.tokenizer.is_special(token_id) && !self.shown_tokens.contains(&token_id) {
            return;
        }
        match &mut self.state {
            DetokenizerState::Bytes(pending) => {
                let bytes = self.tokenizer.fixed_bytes(token_id).unwrap_or_default();
                if pending.is_empty()
                    && let Ok(whole) = std::str::from_utf8(bytes)
                {
                    return text.push_str(whole);
                }
                pending.extend_from_slice(bytes);
                let rest = push_lossy(pending, text);
                pending.drain(..rest);
            }
            DetokenizerState::Window { ids, unread } => {
                ids.push(token_id);
                let new = window_text(&self.tokenizer, ids, *unread);
                if (new.is_empty() || new.ends_with(char::REPLACEMENT_CHARACTER)) && ids.len() - *unread < MAX_UNREAD_TOKENS {
                    return;
                }
                text.push_str(&new);
                ids.drain(..*unread);
                *unread = ids.len();
            }
        }
    }

    /// Appends what is still held, at the end of an output.
    pub fn finish(&mut self, text: &mut String) {
        match &mut self.state {
            DetokenizerState::Bytes(pending) => {
                text.push_str(&String::from_utf8_lossy(pending));
                pending.clear();
            }
            DetokenizerState::Window { ids, unread } => {
                text.push_str(&window_text(&self.tokenizer, ids, *unread));
                *unread = ids.len();
            }
        }
    }
}

/// What the tokens from `unread` on add to the text of those before.
fn window_text(tokenizer: &TextTokenizer, ids: &[u32], unread: usize) -> String {
    let before = tokenizer.decode(&ids[..unread], false).unwrap_or_default();
    let mut all = tokenizer.decode(ids, false).unwrap_or_default();
    match all.get(before.len()..) {
        Some(_) if all.starts_with(&before) => all.split_off(before.len()),
        // The decoder rewrote what was given out already: nothing sound can be added.
        _ => String::new(),
    }
}

/// Appends the whole characters of `bytes` (U+FFFD for what is none); returns where a character that is not whole yet begins.
fn push_lossy(bytes: &[u8], text: &mut String) -> usize {
    let mut start = 0;
    loop {
        match std::str::from_utf8(&bytes[start..]) {
            Ok(valid) => {
                text.push_str(valid);
                return bytes.len();
            }
            Err(error) => {
                let valid_end = start + error.valid_up_to();
                text.push_str(std::str::from_utf8(&bytes[start..valid_end]).expect("valid_up_to says so"));
                match error.error_len() {
                    None => return valid_end,
                    Some(len) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        start = valid_end + len;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    /// The character that stands for a byte in GPT-2's alphabet.
    fn char_of_byte(byte: u8) -> char {
        (0..0x144).filter_map(char::from_u32).find(|&c| byte_of_char(c) == Some(byte)).unwrap()
    }

    /// The library panics on a file that is cut off, and of another one it believes how long its tables are to be.
    #[test]
    fn files_that_no_library_wrote_are_refused() {
        let json = byte_level_json();
        let read = |json: &str| TextTokenizer::from_bytes(json.as_bytes(), None).map(|_| ()).unwrap_err().to_string();
        let decoder = json.find("\"decoder\"").unwrap();
        let error = read(&json[..decoder + 25]);
        assert!(error.contains("the tokenizer's library gives up on it"), "{error}");
        // Without this every prompt would have a token that is no row of the model's.
        let error = read(&json.replace("\"ids\":[260]", "\"ids\":[262]"));
        assert!(error.contains("puts the token 262 around texts, and it has 262 tokens"), "{error}");
        let error = read(&json.replacen("\"vocab\":{", "\"vocab\":{\"far\":4294967295,", 1));
        assert!(
            error.contains("\"far\" as 4294967295 (1 in all), and there are rows for 16777216"),
            "{error}"
        );
    }

    /// Byte-level BPE: token `i` is byte `i`, then some merges, then special tokens.
    pub(crate) fn byte_level_json() -> String {
        let mut vocab: Vec<String> = (0..=255).map(|byte| char_of_byte(byte).to_string()).collect();
        let mut merges = Vec::new();
        for [left, right] in [["h", "e"], ["l", "l"], ["he", "ll"], ["Ġ", "w"]] {
            merges.push(format!("{left} {right}"));
            vocab.push(format!("{left}{right}"));
        }
        let special = |id: usize, content: &str| serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        serde_json::json!({
            "version": "1.0",
            "added_tokens": [special(260, "<s>"), special(261, "</s>")],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [260], "tokens": ["<s>"]}},
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE",
                "vocab": vocab.iter().enumerate().map(|(id, token)| (token.clone(), id)).collect::<std::collections::BTreeMap<_, _>>(),
                "merges": merges,
            },
        })
        .to_string()
    }

    /// SentencePiece style: `<0x00>`… at 0, then a few words.
    fn sentence_piece_json() -> String {
        let mut vocab: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
        vocab.extend(["▁", "▁Hello", "▁world", "ing", "é", "日本"].map(String::from));
        serde_json::json!({
            "version": "1.0", "added_tokens": [],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            ]},
            "model": {
                "type": "BPE", "byte_fallback": true, "merges": [],
                "vocab": vocab.iter().enumerate().map(|(id, token)| (token.clone(), id)).collect::<std::collections::BTreeMap<_, _>>(),
            },
        })
        .to_string()
    }

    fn word_piece_json() -> String {
        serde_json::json!({
            "version": "1.0", "added_tokens": [], "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
            "model": {"type": "WordPiece", "unk_token": "u", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                "vocab": {"u": 0, "un": 1, "##want": 2, "##ed": 3, "run": 4, "##ning": 5, "é": 6}},
        })
        .to_string()
    }

    fn tokenizer(json: &str) -> Arc<TextTokenizer> {
        Arc::new(TextTokenizer::from_bytes(json.as_bytes(), Some("<s>")).unwrap())
    }

    fn incremental(tokenizer: &Arc<TextTokenizer>, ids: &[u32]) -> (Vec<String>, String) {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), true, Vec::new());
        let mut pieces = Vec::new();
        for &id in ids {
            let mut piece = String::new();
            detokenizer.push(id, &mut piece);
            pieces.push(piece);
        }
        let mut last = String::new();
        detokenizer.finish(&mut last);
        pieces.push(last);
        let all = pieces.concat();
        (pieces, all)
    }

    #[test]
    fn half_a_character_is_held_back() {
        let tokenizer = tokenizer(&byte_level_json());
        let ids: Vec<u32> = "aé".bytes().map(u32::from).collect();
        assert_eq!(incremental(&tokenizer, &ids).0, ["a", "", "é", ""]);
        assert_eq!(
            incremental(&tokenizer, &ids[..2]).0,
            ["a", "", "\u{fffd}"],
            "what is never completed comes at the end"
        );
    }

    #[test]
    fn special_tokens_are_skipped_or_shown() {
        let tokenizer = tokenizer(&byte_level_json());
        let mut shown = String::new();
        let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), false, Vec::new());
        [260, 104, 261].into_iter().for_each(|id| detokenizer.push(id, &mut shown));
        assert_eq!(shown, "<s>h</s>");
        assert_eq!(incremental(&tokenizer, &[260, 104, 261]).1, "h");
    }

    #[test]
    fn the_beginning_token_is_never_doubled() {
        let tokenizer = tokenizer(&byte_level_json());
        assert_eq!(tokenizer.encode("hi", true).unwrap(), [260, 104, 105]);
        assert_eq!(tokenizer.encode("<s>hi", true).unwrap(), [260, 104, 105]);
        assert_eq!(tokenizer.encode("<s>hi", false).unwrap(), [260, 104, 105]);
        assert_eq!(tokenizer.encode("hi", false).unwrap(), [104, 105]);
    }

    #[test]
    fn every_byte_has_its_character() {
        let tokenizer = tokenizer(&byte_level_json());
        for byte in 0..=255u8 {
            assert_eq!(tokenizer.fixed_bytes(u32::from(byte)), Some(&[byte][..]));
        }
        assert_eq!(tokenizer.fixed_bytes(9999), Some(&[][..]), "padding of the logits");
    }

    #[test]
    fn a_leading_space_of_an_output_is_kept() {
        let tokenizer = tokenizer(&sentence_piece_json());
        assert_eq!(incremental(&tokenizer, &[257, 258, 259]).1, " Hello worlding");
    }

    #[test]
    fn a_window_decodes_words_with_their_neighbours() {
        let tokenizer = tokenizer(&word_piece_json());
        assert!(!tokenizer.has_fixed_bytes());
        assert_eq!(
            incremental(&tokenizer, &[1, 2, 3, 4, 5, 6]).0,
            ["un", "want", "ed", " run", "ning", " é", ""]
        );
    }

    static BYTE_LEVEL: LazyLock<Arc<TextTokenizer>> = LazyLock::new(|| tokenizer(&byte_level_json()));
    static SENTENCE_PIECE: LazyLock<Arc<TextTokenizer>> = LazyLock::new(|| tokenizer(&sentence_piece_json()));
    static WORD_PIECE: LazyLock<Arc<TextTokenizer>> = LazyLock::new(|| tokenizer(&word_piece_json()));

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn byte_level_text_is_the_full_decode(ids in prop::collection::vec(0u32..262, 0..64)) {
            let tokenizer = &BYTE_LEVEL;
            let (pieces, all) = incremental(tokenizer, &ids);
            prop_assert_eq!(&all, &tokenizer.decode(&ids, true).unwrap());
            // What was given out before the end had no half characters unless the bytes can't be any.
            if !all.contains('\u{fffd}') {
                let whole = pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER));
                prop_assert!(whole);
            }
        }

        #[test]
        fn real_text_survives_any_split_into_tokens(text in "\\PC{0,20}[\u{fffd}é日😀]{0,3}\\PC{0,10}") {
            let tokenizer = &BYTE_LEVEL;
            let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
            prop_assert_eq!(&incremental(tokenizer, &bytes).1, &text);
            let encoded = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(&incremental(tokenizer, &encoded).1, &text);
        }

        #[test]
        fn sentence_piece_text_survives_byte_fallback(text in "[a-z é日😀▁\u{fffd}]{0,20}") {
            let tokenizer = &SENTENCE_PIECE;
            let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
            prop_assert_eq!(&incremental(tokenizer, &bytes).1, &text);
        }

        #[test]
        fn windowed_text_is_the_full_decode(ids in prop::collection::vec(0u32..7, 0..40)) {
            let tokenizer = &WORD_PIECE;
            prop_assert_eq!(&incremental(tokenizer, &ids).1, &tokenizer.decode(&ids, true).unwrap());
        }
    }
}
