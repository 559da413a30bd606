//! The demo model and its adapters, carried in the binary: what `polylora serve` serves when no model is named.

use std::sync::Arc;

use polylora_engine::{EmbeddedFile, FileSource, InferenceEngine, MockEngine, decoder::DecoderConfig, mock::MockEngineBuilder};

use crate::{
    app::Gateway,
    auth::{AdapterSources, SourcePolicy},
    hub::{Hub, HubConfig},
    prompt::PromptProcessor,
    routing::ServedModel,
};

/// An adapter in the binary; loadable as `demo:NAME`.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedAdapter {
    /// Its name.
    pub name: &'static str,
    /// Its files.
    pub files: &'static [EmbeddedFile],
}

include!(concat!(env!("OUT_DIR"), "/demo.rs"));

/// The demo model's text side.
pub fn prompt_processor() -> PromptProcessor {
    PromptProcessor::from_files(&FileSource::Embedded(BASE), None).expect("the demo's files are valid")
}

/// A mock engine whose tokens are the demo model's, without adapters: the whole gateway can be measured and fuzzed over it.
pub fn mock_engine() -> MockEngineBuilder {
    let json = FileSource::Embedded(BASE).open("config.json").expect("the demo's files are there");
    let config = DecoderConfig::from_json(&json, None).expect("the demo's files are valid");
    MockEngine::builder().describe(|description| {
        description.vocab_size = config.vocab_size;
        description.eos_token_ids = config.eos_token_ids;
        description.context_length = 2048;
    })
}

/// The gateway as it serves the demo, over another engine. Nothing comes from the Hub.
pub fn gateway(engine: Arc<dyn InferenceEngine>, policy: SourcePolicy) -> Gateway {
    let hub = Hub::new(HubConfig {
        endpoint: None,
        cache_dir: "/dev/null/no-cache".into(),
        token: None,
        offline: true,
        progress: false,
    });
    let served = ServedModel {
        names: vec!["demo".to_owned()],
        path: "mock".to_owned(),
    };
    Gateway::new(engine, prompt_processor(), served, Arc::new(AdapterSources::new(hub, policy)))
}
