//! The app over a [`MockEngine`] and a byte-level tokenizer: token `i` below 256 is byte `i`, so texts and token ids are one to one.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode},
};
use futures::StreamExt;
use polylora::{
    app::{Gateway, app},
    auth::{AdapterSources, SourcePolicy},
    chat_template::{ChatTemplates, SpecialTokens},
    hub::{Hub, HubConfig},
    prompt::{PromptProcessor, SamplingDefaults},
    routing::ServedModel,
    tokenizer::TextTokenizer,
};
use polylora_engine::{
    MockEngine,
    mock::{MockEngineBuilder, Script},
};
use serde_json::{Value, json};
use tower::ServiceExt;

/// Begins every prompt.
pub const BOS: u32 = 256;
/// Ends every output.
pub const EOS: u32 = 257;
/// Is special, too, and nothing else.
pub const SPECIAL: u32 = 258;
/// The base model's name; with a colon, since real ones have them.
pub const BASE: &str = "demo:1b";

/// `<role>content;` for each message, then `<assistant>`.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %};\
    {%- endfor %}{% if tools %}[tools {{ tools | tojson }}]{% endif %}{% if mood %}[{{ mood }}]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}";

fn tokenizer() -> TextTokenizer {
    // GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 on.
    let itself = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100..;
    let mut vocab = BTreeMap::new();
    for byte in 0..256 {
        let code = if itself(byte) { byte } else { others.next().unwrap() };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte);
    }
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let json = json!({
        "version": "1.0",
        "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>"), special(SPECIAL, "<|x|>")],
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    TextTokenizer::from_bytes(json.to_string().as_bytes(), Some("<s>")).unwrap()
}

/// The byte-level tokenizer with a chat template.
pub fn prompt_processor(template: &str) -> PromptProcessor {
    let special_tokens = SpecialTokens {
        by_name: [("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())].into(),
    };
    let templates = ChatTemplates::new([("default".to_owned(), template.to_owned())].into(), special_tokens).unwrap();
    PromptProcessor::new(tokenizer(), Some(templates), SamplingDefaults::default())
}

/// The app and the engine behind it.
pub struct Server {
    pub engine: Arc<MockEngine>,
    pub router: Router,
}

/// Token ids of a text.
pub fn tokens(text: &str) -> impl Iterator<Item = u32> {
    text.bytes().map(u32::from)
}

/// An output: this text, then the end.
pub fn says(text: &str) -> Script {
    Script::tokens(tokens(text))
}

impl Server {
    /// An engine that says "Hello" to everything, with adapters `sql` and `json`.
    pub fn new() -> Self {
        Self::with(|engine| engine.reply(|_| says("Hello")), |_| {})
    }

    pub fn with(build: impl FnOnce(MockEngineBuilder) -> MockEngineBuilder, change: impl FnOnce(&mut Gateway)) -> Self {
        let builder = MockEngine::builder().describe(|description| {
            description.vocab_size = 320;
            description.context_length = 512;
            description.eos_token_ids = vec![EOS];
        });
        let engine = Arc::new(build(builder).build());
        if engine_has_lora(&engine) {
            ["sql", "json"].into_iter().for_each(|name| engine.add_adapter(name));
        }
        let prompt = prompt_processor(TEMPLATE);
        let hub = Hub::new(HubConfig {
            endpoint: Some("http://127.0.0.1:9".into()),
            cache_dir: std::env::temp_dir().join("polylora-no-such-cache"),
            token: None,
            offline: true,
            progress: false,
        });
        let served = ServedModel {
            names: vec![BASE.into(), "demo".into()],
            path: "mock".into(),
        };
        let sources = Arc::new(AdapterSources::new(hub, SourcePolicy::Any));
        let mut gateway = Gateway::new(Arc::clone(&engine) as _, prompt, served, sources);
        change(&mut gateway);
        Self {
            engine,
            router: app(Arc::new(gateway)),
        }
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        Answer {
            status: response.status(),
            headers: response.headers().clone(),
            body: Some(response.into_body()),
            buffered: String::new(),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_raw(path, body.to_string(), &[]).await
    }

    pub async fn post_raw(&self, path: &str, body: impl Into<Body>, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(body.into()).unwrap()).await
    }
}

fn engine_has_lora(engine: &MockEngine) -> bool {
    polylora_engine::InferenceEngine::describe(engine).lora_enabled
}

/// A response, whole or event by event.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    body: Option<Body>,
    buffered: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub async fn text(&mut self) -> String {
        let body = self.body.take().expect("the body is read once");
        String::from_utf8(axum::body::to_bytes(body, usize::MAX).await.unwrap().to_vec()).unwrap()
    }

    /// The body, after checking the status.
    pub async fn json(&mut self, status: u16) -> Value {
        let text = self.text().await;
        assert_eq!(self.status.as_u16(), status, "{text}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// OpenAI's error, after checking the status and that the body has its four fields.
    pub async fn error(&mut self, status: u16) -> Value {
        let mut body = self.json(status).await;
        let error = body["error"].take();
        let keys: Vec<&str> = error.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(!error["message"].as_str().unwrap().is_empty());
        error
    }

    /// The next event's data; `None` at the end of the body.
    pub async fn event(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.buffered.split_once("\n\n") {
                let data = event
                    .lines()
                    .find_map(|line| line.strip_prefix("data: "))
                    .expect("an event has data")
                    .to_owned();
                self.buffered = rest.to_owned();
                return Some(data);
            }
            let mut stream = self.body.take()?.into_data_stream();
            let piece = stream.next().await?.unwrap();
            self.buffered.push_str(std::str::from_utf8(&piece).unwrap());
            self.body = Some(Body::from_stream(stream));
        }
    }

    pub async fn json_event(&mut self) -> Value {
        let data = self.event().await.expect("another event");
        serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}"))
    }

    /// All events' data, after checking that this is a stream.
    pub async fn events(&mut self) -> Vec<String> {
        assert_eq!(self.status, StatusCode::OK);
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let mut events = Vec::new();
        while let Some(event) = self.event().await {
            events.push(event);
        }
        events
    }

    /// All events but the `[DONE]` that must end them.
    pub async fn json_events(&mut self) -> Vec<Value> {
        let mut events = self.events().await;
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// The content that the chunks of choice `index` add up to.
pub fn streamed_content(chunks: &[Value], index: u64) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let deltas = choices.filter(|choice| choice["index"] == index);
    deltas
        .filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str()))
        .collect()
}
