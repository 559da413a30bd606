//! What PEFT computes in f32 with adapters of every kind (`golden/make_adapters.py`, `golden/make_head64_adapters.py`), and how they are read.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use polylora_engine::{
    AdapterError, FileSource,
    adapter::{
        HostAdapter, PackedDtype,
        load::{CoverageReport, LoraFeatures, LoraLimits, checkpoint_opener, load_adapter},
    },
    backend::conformance::Run,
    batch::AdapterHandle,
    decoder::DecoderConfig,
};

/// One golden file.
#[derive(serde::Deserialize)]
pub struct Golden {
    pub prompt_ids: Vec<u32>,
    pub bases: BTreeMap<String, Answer>,
    pub cases: Vec<Case>,
    pub combinations: Vec<Combination>,
}

#[derive(serde::Deserialize)]
pub struct Case {
    pub name: String,
    pub base: String,
    /// Of its own, where it has tokens of its own.
    pub prompt_ids: Option<Vec<u32>>,
    pub vocab_size: Option<u32>,
    #[serde(flatten)]
    pub answer: Answer,
}

#[derive(serde::Deserialize)]
pub struct Combination {
    pub base: String,
    pub weights: BTreeMap<String, f32>,
    #[serde(flatten)]
    pub answer: Answer,
}

#[derive(serde::Deserialize)]
pub struct Answer {
    pub output_ids: Vec<u32>,
    /// The five likeliest after each prompt token and after each output token but the last.
    pub top_logprobs: Vec<Vec<(u32, f32)>>,
}

/// Those that the GPU can be asked, too.
pub fn head64() -> Golden {
    serde_json::from_str(include_str!("../golden/head64_adapters.json")).unwrap()
}

impl Golden {
    pub fn cases_on<'a>(&'a self, base: &'a str) -> impl Iterator<Item = &'a Case> {
        self.cases.iter().filter(move |case| case.base == base)
    }

    /// What a case was asked, with `top_k` log-probabilities.
    pub fn run(&self, case: &Case, adapter: AdapterHandle, top_k: u32) -> Run {
        case.answer
            .run(case.prompt_ids.as_ref().unwrap_or(&self.prompt_ids), Some(adapter), top_k)
    }
}

impl Answer {
    pub fn run(&self, prompt_ids: &[u32], adapter: Option<AdapterHandle>, top_k: u32) -> Run {
        Run {
            top_k,
            ..Run::greedy(prompt_ids, adapter, self.output_ids.len() as u32)
        }
    }
}

/// A base model of `tests/fixtures`.
pub struct BaseModel {
    pub decoder: Arc<DecoderConfig>,
    pub files: FileSource,
}

impl BaseModel {
    pub fn open(name: &str) -> Self {
        let files = FileSource::Directory(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name));
        let decoder = DecoderConfig::from_json(&files.read("config.json", 1 << 20).unwrap(), None).unwrap();
        Self {
            decoder: Arc::new(decoder),
            files,
        }
    }

    /// An adapter of `golden/adapters`.
    pub fn load(&self, name: &str, dtype: PackedDtype, features: LoraFeatures) -> (HostAdapter, CoverageReport) {
        self.try_load(&adapter_folder(name), dtype, features)
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// An adapter of any folder.
    pub fn try_load(&self, folder: &Path, dtype: PackedDtype, features: LoraFeatures) -> Result<(HostAdapter, CoverageReport), AdapterError> {
        let limits = LoraLimits {
            features,
            base: Some(checkpoint_opener(self.files.clone(), self.decoder.clone())),
            ..LoraLimits::new(dtype)
        };
        load_adapter(&FileSource::Directory(folder.to_owned()), &self.decoder, &limits)
    }
}

/// Where an adapter of `golden/adapters` is.
pub fn adapter_folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapters").join(name)
}
