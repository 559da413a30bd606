//! Everything that reads bytes from outside, one function each. The targets in `fuzz/` call these, and so does `tests/fuzz.rs`, on the
//! seeds and on damaged copies of them, wherever `cargo test` runs.
//!
//! None may panic, whatever the bytes are, nor hold what it promises to hold and does not.

use std::sync::{Arc, LazyLock};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{
        Request, StatusCode,
        header::{CONTENT_LENGTH, CONTENT_TYPE},
    },
};
use polylora_engine::{
    FileSource,
    adapter::{
        CompanionReader, HostAdapter, LoraLimits, PackedDtype,
        combine::parse_expression,
        config::PeftConfig,
        load::{load_adapter, load_adapter_bytes},
        tensors::{INDEX_FILE, is_shard_name, parse_index},
    },
    decoder::{DecoderConfig, DecoderTensor},
    files::{FileBytes, MemoryFile},
    weights::ModelWeights,
};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::{
    aliases::{AliasDefinition, Aliases, Names, TargetDefinition},
    app::{Gateway, app},
    auth::{Auth, SourcePolicy, parse_keys},
    chat_template::ChatInput,
    config::{LoraPath, parse_settings},
    demo, gbnf,
    hub::HubId,
    message_parser::{MessageParser, MessagePart},
    prompt::{PromptProcessor, templates_from_config},
    reasoning::ReasoningSplitter,
    routing::{ServedModel, Target},
    state_dir::{parse_state, state_bytes, with_head},
    text_side::BaseText,
    tokenizer::Detokenizer,
    tool_calls::{ToolFormat, ToolParser},
};

/// A target: its name, which its seeds' folder has too, and its function.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[FuzzTarget] = &[
    ("adapter", adapter),
    ("adapter_config", adapter_config),
    ("aliases", aliases),
    ("chat_completions", chat_completions),
    ("chat_template", chat_template),
    ("checkpoint", checkpoint),
    ("completions", completions),
    ("detokenizer", detokenizer),
    ("generate", generate),
    ("grammar", grammar),
    ("index", index),
    ("keys_file", keys_file),
    ("model_config", model_config),
    ("names", names),
    ("native_adapters", native_adapters),
    ("output_parsers", output_parsers),
    ("push", push),
    ("request_head", request_head),
    ("responses", responses),
    ("settings_file", settings_file),
    ("state_file", state_file),
    ("tokenize", tokenize),
    ("tokenizer", tokenizer),
];

fn demo_file(name: &str) -> &'static [u8] {
    let file = demo::BASE.iter().find(|file| file.name == name);
    file.expect("the demo has its files").bytes
}

/// A decoder so small that a checkpoint and adapters of it are a few kilobytes: what the seeds are.
static DECODER: LazyLock<DecoderConfig> = LazyLock::new(|| {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "eos_token_id": 2,
    });
    DecoderConfig::from_json(config.to_string().as_bytes(), None).expect("a valid configuration")
});

/// `adapter_config.json`, and what it means for a model.
pub fn adapter_config(data: &[u8]) {
    if let Ok(config) = PeftConfig::parse(data)
        && let Ok(resolution) = config.resolve(&DECODER)
    {
        assert!(!resolution.modules.is_empty(), "an adapter that changes nothing is refused");
        assert!(resolution.max_lora_rank() > 0);
    }
}

/// `adapter_config.json`, a zero byte, `adapter_model.safetensors`.
pub fn adapter(data: &[u8]) {
    let Some(end) = data.iter().position(|byte| *byte == 0) else { return };
    let (config, weights) = (&data[..end], &data[end + 1..]);
    for dtype in [PackedDtype::F32, PackedDtype::Bf16] {
        // A configuration alone may ask for gigabytes: of a file that holds them, which this is not.
        if let Ok((adapter, report)) = load_adapter_bytes(config, weights, &DECODER, &LoraLimits::new(dtype)) {
            assert_eq!(adapter.modules.len(), report.modules.len());
            assert!(adapter.bytes() <= 2 * weights.len() + 256 * adapter.modules.len() + 64);
        }
    }
}

/// The index of a checkpoint or an adapter that was split, a zero byte, and the one file that it may name, `a.safetensors`.
pub fn index(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let (index, weights) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    if let Ok(files) = parse_index(index) {
        assert!(files.values().all(|file| is_shard_name(file)), "a file outside the folder");
    }
    let file = |name: &str, bytes: &[u8]| MemoryFile {
        name: name.to_owned(),
        bytes: bytes.to_vec(),
    };
    let files = FileSource::Memory([file("model.safetensors.index.json", index), file("a.safetensors", weights)].into());
    if let Ok(weights) = ModelWeights::open(&files) {
        // Whatever it is, it is compared with what the model needs.
        let _ = weights.check(&DECODER);
    }
    let config = br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#;
    let files = FileSource::Memory(
        [
            file("adapter_config.json", config),
            file(INDEX_FILE, index),
            file("a.safetensors", weights),
        ]
        .into(),
    );
    if let Ok((adapter, report)) = load_adapter(&files, &DECODER, &LoraLimits::new(PackedDtype::F32)) {
        assert_eq!(adapter.modules.len(), report.modules.len());
    }
}

/// `config.json` and `generation_config.json`.
pub fn model_config(data: &[u8]) {
    if let Ok(config) = DecoderConfig::from_json(data, None) {
        assert!(config.num_layers > 0 && config.vocab_size > 0 && config.hidden_size > 0);
    }
    // Its result is looked at by nobody: it must not panic.
    let _ = DecoderConfig::from_json(demo_file("config.json"), Some(data));
}

/// `model.safetensors`.
pub fn checkpoint(data: &[u8]) {
    let files = vec![("model.safetensors".to_owned(), FileBytes::Owned(data.to_vec()))];
    let Ok(weights) = ModelWeights::from_files(files) else { return };
    if weights.check(&DECODER).is_err() {
        return;
    }
    for tensor in DecoderTensor::all(&DECODER) {
        let tensor = weights.tensor(tensor, &DECODER).expect("it was checked");
        let mut row = vec![0.0; tensor.row_len()];
        tensor.read_row(0, &mut row);
    }
}

/// `tokenizer_config.json` with its chat template.
pub fn chat_template(data: &[u8]) {
    let Ok(Some(templates)) = templates_from_config(data) else { return };
    let messages = [json!({"role": "system", "content": "s"}), json!({"role": "user", "content": "u"})];
    let tools = [json!({"type": "function", "function": {"name": "f"}})];
    for tools in [None, Some(&tools[..])] {
        // A template may refuse a conversation.
        let _ = templates.render(&ChatInput {
            messages: &messages,
            tools,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: None,
        });
    }
}

/// The files that [`tokenizer`] takes, in their order; whichever is empty is not there.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The demo's text side, which adapters' files are compared with, and an adapter of the demo's that changes one projection.
static BESIDE_BASE: LazyLock<(CompanionReader, HostAdapter)> = LazyLock::new(|| {
    let base = FileSource::Embedded(demo::BASE);
    let decoder = DecoderConfig::from_json(demo_file("config.json"), None).expect("the demo's files are valid");
    let adapter = demo::ADAPTERS.iter().find(|adapter| adapter.name == "json").expect("the demo has it");
    let limits = LoraLimits::new(PackedDtype::F32);
    let (adapter, _) = load_adapter(&FileSource::Embedded(adapter.files), &decoder, &limits).expect("the demo's files are valid");
    let text = BaseText::new(&base, None, demo::prompt_processor(), Arc::default()).expect("the demo's files are valid");
    (Arc::new(text).reader(&decoder), adapter)
});

/// Lets the panics of the tokenizer's library pass: libFuzzer's hook ends the process at any panic, also at one that is made an error.
static LIBRARY_MAY_PANIC: LazyLock<()> = LazyLock::new(|| {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let is_the_librarys = panic.location().is_some_and(|place| place.file().contains("/tokenizers-"));
        if !is_the_librarys {
            hook(panic);
        }
    }));
});

/// The tokenizer's files of a model and of an adapter, a zero byte between one and the next.
pub fn tokenizer(data: &[u8]) {
    LazyLock::force(&LIBRARY_MAY_PANIC);
    let given = TOKENIZER_FILES
        .into_iter()
        .zip(data.split(|byte| *byte == 0))
        .filter(|(_, bytes)| !bytes.is_empty());
    let files: Vec<MemoryFile> = given
        .map(|(name, bytes)| MemoryFile {
            name: name.to_owned(),
            bytes: bytes.to_vec(),
        })
        .collect();
    let files = FileSource::Memory(files.into());
    let (reader, adapter) = &*BESIDE_BASE;
    // Beside an adapter they may be anything: what is wrong is said when it is loaded.
    let _ = reader(&files, adapter);
    let Ok(prompt) = PromptProcessor::from_files(&files, None) else { return };
    let tokenizer = prompt.tokenizer();
    // A text may have no tokens in this vocabulary.
    if let Ok(ids) = tokenizer.encode("The capital of Chile is \u{1f600} <|im_end|>", true) {
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()), "{ids:?}");
        let mut text = String::new();
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), false, Vec::new());
        ids.iter().for_each(|id| detokenizer.push(*id, &mut text));
        detokenizer.finish(&mut text);
    }
}

/// What `--state-dir` keeps; with a checksum of its own, too, so that what stands behind it is read.
pub fn state_file(data: &[u8]) {
    // Damaged files are refused, whatever they are.
    let _ = parse_state(data);
    let Ok(changes) = parse_state(&with_head(data)) else { return };
    assert_eq!(
        parse_state(&state_bytes(&changes)),
        Ok(changes.clone()),
        "what is written is what is read"
    );
    let aliases = Aliases::default();
    for definition in changes.aliases.values() {
        if aliases.set(definition, &SomeNames).is_ok() {
            assert!(definition.targets.iter().all(|target| SomeNames.is_adapter(&target.adapter)));
        }
    }
}

/// A base model and its adapters.
struct SomeNames;

impl Names for SomeNames {
    fn base_names(&self) -> &[String] {
        &GATEWAY.served.names
    }

    fn is_adapter(&self, name: &str) -> bool {
        name == "sql" || name == "json"
    }
}

/// The file of `--config`.
pub fn settings_file(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = parse_settings(text);
    }
}

/// The file of `--api-keys-file`.
pub fn keys_file(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(keys) = parse_keys(text)
    {
        let is_empty = keys.is_empty();
        let auth = Auth::new(None, None, keys);
        assert_eq!(auth.is_enabled(), !is_empty);
        assert!(is_empty || auth.authenticate(Some("Bearer not a key")).is_err());
    }
}

/// `model`, `lora_path`, Hub ids.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let served = ServedModel {
        names: vec!["demo:1b".into(), "demo".into(), "org/model".into()],
        path: "mock".into(),
    };
    match served.route(text, |name| name == "sql" || name == "a:b") {
        Some(Target::Base) => assert!(served.names.iter().any(|name| name == text), "{text:?} became the base model"),
        Some(Target::Adapter(name)) => assert!(name == "sql" || name == "a:b"),
        None => {}
    }
    if let Ok(id) = text.parse::<HubId>() {
        let parts = [id.org(), id.revision()];
        assert!(
            parts.iter().all(|part| !part.split('/').any(|part| part == "..")),
            "{text:?} leaves the cache"
        );
    }
    let _ = text.parse::<LoraPath>();
    if let Ok(Some(parts)) = parse_expression(text, 4) {
        assert!((1..=4).contains(&parts.len()) && parts.iter().all(|part| part.weight.is_finite() && !part.name.is_empty()));
        assert!(parts.is_sorted_by(|a, b| a.name < b.name), "{parts:?}");
    }
    // The alias of a sum is replaced, and what comes of it is a sum again.
    if let Ok(resolved) = ALIASES.resolve(text, "somebody", &SomeNames)
        && let Ok(Some(parts)) = parse_expression(&resolved, usize::MAX)
    {
        assert!(parts.iter().all(|part| part.name != "either"), "{text:?} became {resolved:?}");
    }
}

/// An alias of two adapters.
static ALIASES: LazyLock<Aliases> = LazyLock::new(|| {
    let aliases = Aliases::default();
    let target = |adapter: &str| TargetDefinition {
        adapter: adapter.to_owned(),
        weight: 1.0,
    };
    let definition = AliasDefinition {
        name: "either".to_owned(),
        targets: vec![target("sql"), target("json")],
    };
    aliases.set(&definition, &SomeNames).expect("both are adapters");
    aliases
});

/// What a model says, read for reasoning and for calls; the first byte chooses how it comes in pieces. Where calls
/// have no tag, only functions that exist are called.
pub fn output_parsers(data: &[u8]) {
    let Some((seed, text)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let templates = templates_from_config(br#"{"chat_template": "<think></think>"}"#).expect("valid");
    for format in [ToolFormat::Hermes, ToolFormat::Llama3, ToolFormat::Mistral] {
        for pieces in [vec![&*text], pieces(&text, usize::from(*seed))] {
            let reasoning = ReasoningSplitter::for_prompt(templates.as_ref(), "");
            let mut parser = MessageParser::new(reasoning, Some(ToolParser::new(format, vec!["f".into(), "g".into()])), false);
            let mut parts: Vec<MessagePart> = pieces.into_iter().flat_map(|piece| parser.push(piece.to_owned(), 1)).collect();
            parts.extend(parser.finish());
            let message = crate::message_parser::message(parts);
            let mut names = message.tool_calls.iter().flatten().map(|call| call.function.name.as_str());
            assert!(format != ToolFormat::Llama3 || names.all(|name| name == "f" || name == "g"), "{text:?}");
        }
    }
}

/// Cuts a text into pieces of one to `most` characters.
fn pieces(text: &str, most: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    let mut len = 0;
    while !rest.is_empty() {
        len = len % most.clamp(1, 7) + 1;
        let end = rest.char_indices().nth(len).map_or(rest.len(), |(end, _)| end);
        let (piece, after) = rest.split_at(end);
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// Token ids, two bytes each, as text that comes token by token.
pub fn detokenizer(data: &[u8]) {
    let tokenizer = GATEWAY.text.tokenizer();
    for skip_special_tokens in [false, true] {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip_special_tokens, Vec::new());
        let mut text = String::new();
        for id in data.as_chunks::<2>().0 {
            let before = text.len();
            detokenizer.push(u32::from(u16::from_le_bytes(*id)), &mut text);
            assert!(text.len() >= before, "what was given out stays");
        }
        detokenizer.finish(&mut text);
    }
}

/// GBNF, and the constraints of a request: the first byte says which.
pub fn grammar(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let constraint = match kind % 4 {
        0 => {
            let _ = gbnf::to_lark(text);
            return;
        }
        1 => json!({"regex": text}),
        2 => json!({"json_schema": text}),
        _ => json!({"ebnf": text}),
    };
    let body = json!({"text": "x", "sampling_params": constraint});
    post("/generate", body.to_string().as_bytes());
}

/// The body of `POST /generate`.
pub fn generate(data: &[u8]) {
    post("/generate", data);
}

/// The body of `POST /v1/completions`.
pub fn completions(data: &[u8]) {
    post("/v1/completions", data);
}

/// The body of `POST /v1/chat/completions`.
pub fn chat_completions(data: &[u8]) {
    post("/v1/chat/completions", data);
}

/// The body of `POST /v1/responses`.
pub fn responses(data: &[u8]) {
    post("/v1/responses", data);
}

/// The bodies of the routes that load and unload.
pub fn native_adapters(data: &[u8]) {
    for path in [
        "/load_lora_adapter",
        "/unload_lora_adapter",
        "/pin_lora_adapter",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/loras",
    ] {
        post(path, data);
    }
}

/// The body of `PUT /v1/aliases/{name}`.
pub fn aliases(data: &[u8]) {
    send(request("PUT", "/v1/aliases/support").header(CONTENT_TYPE, "application/json"), data);
    send(request("DELETE", "/v1/aliases/support"), b"");
}

/// The bodies of `POST /tokenize`, `/detokenize` and `/abort_request`.
pub fn tokenize(data: &[u8]) {
    for path in ["/tokenize", "/detokenize", "/abort_request"] {
        post(path, data);
    }
}

/// The body of a push: a form whose boundary is `B`. The first byte says whether its length is given, and whether it comes in one piece.
pub fn push(data: &[u8]) {
    let Some((kind, form)) = data.split_first() else { return };
    let mut push = request("POST", "/v1/adapters/pushed").header(CONTENT_TYPE, "multipart/form-data; boundary=B");
    if kind % 2 == 1 {
        push = push.header(CONTENT_LENGTH, form.len());
    }
    let most = [usize::MAX, 1, 7, 100][usize::from(kind / 2 % 4)];
    let pieces: Vec<std::io::Result<Vec<u8>>> = form.chunks(most).map(|piece| Ok(piece.to_vec())).collect();
    let used = GATEWAY.pushed.used_bytes();
    let (status, _) = answer(push.body(Body::from_stream(futures::stream::iter(pieces))).expect("a valid request"));
    if status != StatusCode::OK {
        assert_eq!(
            GATEWAY.pushed.used_bytes(),
            used,
            "a push that was answered {status} has left something behind"
        );
        return;
    }
    let unload = request("DELETE", "/v1/adapters/pushed").body(Body::empty());
    assert_eq!(answer(unload.expect("a valid request")).0, StatusCode::OK);
    assert_eq!(GATEWAY.pushed.used_bytes(), 0, "what was unloaded is still there");
}

/// A method and a URL, then header lines.
pub fn request_head(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.lines();
    let Some((method, url)) = lines.next().and_then(|line| line.split_once(' ')) else {
        return;
    };
    let mut head = request(method, url);
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        head = head.header(name.trim(), value.trim());
    }
    // What is no method, no URL or no header never comes so far.
    if let Ok(request) = head.body(Body::empty()) {
        answer(request);
    }
}

/// The gateway over a mock engine with the demo's tokenizer; no folder and no Hub may be read.
static GATEWAY: LazyLock<Arc<Gateway>> = LazyLock::new(|| {
    let engine = demo::mock_engine().describe(|description| description.context_length = 512).build();
    ["sql", "json"].into_iter().for_each(|name| engine.add_adapter(name));
    let policy = SourcePolicy::new(&[], &[], false).expect("nothing is a valid policy");
    Arc::new(demo::gateway(Arc::new(engine), policy))
});
static ROUTER: LazyLock<Router> = LazyLock::new(|| app(Arc::clone(&GATEWAY)));
static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("the system gives a runtime")
});

fn request(method: &str, url: &str) -> axum::http::request::Builder {
    Request::builder().method(method).uri(url)
}

fn post(path: &str, body: &[u8]) {
    send(request("POST", path).header(CONTENT_TYPE, "application/json"), body);
}

fn send(request: axum::http::request::Builder, body: &[u8]) {
    answer(request.body(Body::from(body.to_vec())).expect("a valid request"));
}

/// Sends a request, and reads the answer to its end: no request is the server's fault.
fn answer(request: Request<Body>) -> (StatusCode, Vec<u8>) {
    let what = format!("{} {}", request.method(), request.uri());
    let needs_no_json = request.method() == "HEAD";
    let (status, answer) = RUNTIME.block_on(async {
        let response = ROUTER.clone().oneshot(request).await.expect("the router answers");
        let status = response.status();
        (status, to_bytes(response.into_body(), usize::MAX).await.expect("the answer has an end"))
    });
    let text = String::from_utf8_lossy(&answer);
    assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{what}: {text}");
    if status.is_client_error() && !needs_no_json {
        let is_json = serde_json::from_slice::<Value>(&answer).is_ok_and(|answer| answer.is_object());
        assert!(is_json, "{what}: {status} is answered with {text:?}");
    }
    (status, answer.into())
}
