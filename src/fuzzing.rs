//! Everything that reads bytes from outside, one function each. The targets in `fuzz/` call these, and so does `tests/fuzz.rs`, on the
//! seeds and on damaged copies of them, wherever `cargo test` runs.
//!
//! None may panic, whatever the bytes are, nor hold what it promises to hold and does not.

use std::sync::{Arc, LazyLock};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Request, StatusCode, header::CONTENT_TYPE},
};
use polylora_engine::{
    adapter::{LoraLimits, PackedDtype, config::PeftConfig, load::load_adapter_bytes},
    decoder::{DecoderConfig, DecoderTensor},
    files::FileBytes,
    weights::ModelWeights,
};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::{
    app::{Gateway, app},
    auth::{Auth, SourcePolicy, parse_keys},
    chat_template::ChatInput,
    config::{LoraPath, parse_settings},
    demo, gbnf,
    hub::HubId,
    message_parser::{MessageParser, MessagePart},
    prompt::templates_from_config,
    reasoning::ReasoningSplitter,
    routing::{ServedModel, Target},
    tokenizer::Detokenizer,
    tool_calls::{ToolFormat, ToolParser},
};

/// A target: its name, which its seeds' folder has too, and its function.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[FuzzTarget] = &[
    ("adapter", adapter),
    ("adapter_config", adapter_config),
    ("chat_completions", chat_completions),
    ("chat_template", chat_template),
    ("checkpoint", checkpoint),
    ("completions", completions),
    ("detokenizer", detokenizer),
    ("generate", generate),
    ("grammar", grammar),
    ("keys_file", keys_file),
    ("model_config", model_config),
    ("names", names),
    ("native_adapters", native_adapters),
    ("output_parsers", output_parsers),
    ("responses", responses),
    ("settings_file", settings_file),
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
}

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
    for path in ["/load_lora_adapter", "/unload_lora_adapter", "/pin_lora_adapter", "/v1/load_lora_adapter"] {
        post(path, data);
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

/// Sends a body, and reads the answer to its end: no body is the server's fault.
fn post(path: &str, body: &[u8]) {
    let request = Request::post(path)
        .header(CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_vec()));
    let request = request.expect("a valid request");
    let (status, answer) = RUNTIME.block_on(async {
        let response = ROUTER.clone().oneshot(request).await.expect("the router answers");
        let status = response.status();
        (status, to_bytes(response.into_body(), usize::MAX).await.expect("the answer has an end"))
    });
    let text = String::from_utf8_lossy(&answer);
    assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{path}: {text}");
    if status.is_client_error() {
        let is_json = serde_json::from_slice::<Value>(&answer).is_ok_and(|answer| answer.is_object());
        assert!(is_json, "{path}: {status} is answered with {text:?}");
    }
}
