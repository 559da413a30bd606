//! Adapters made for tests: a configuration and tensors, written to a folder that is removed with its value.

use std::collections::BTreeMap;

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{ModuleId, PackedDtype, config::PeftConfig, config::module_path, load::LoraLimits, load::module_shape};
use crate::{
    decoder::{Activation, DecoderConfig, RopeScaling},
    files::FileSource,
};

/// A base model with a different width at every place where two could be mistaken for each other.
pub(crate) fn tiny_decoder() -> DecoderConfig {
    DecoderConfig {
        architecture: "LlamaForCausalLM".into(),
        vocab_size: 11,
        hidden_size: 8,
        intermediate_size: 12,
        num_layers: 3,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 3,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        activation: Activation::Silu,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: false,
        sliding_window: None,
        max_position_embeddings: 64,
        eos_token_ids: vec![0],
        bos_token_id: None,
    }
}

pub(crate) fn limits() -> LoraLimits {
    LoraLimits::new(PackedDtype::F32)
}

/// A tensor of a file to be.
#[derive(Clone, Debug)]
pub(crate) struct FileTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl FileTensor {
    pub(crate) fn f32(shape: &[usize], values: &[f32]) -> Self {
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }
    }

    pub(crate) fn values(&self) -> Vec<f32> {
        assert_eq!(self.dtype, Dtype::F32);
        self.bytes
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect()
    }

    /// Rounded to another dtype.
    pub(crate) fn cast(&self, dtype: Dtype) -> Self {
        let bytes = match dtype {
            Dtype::F16 => self.values().iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect(),
            Dtype::BF16 => self
                .values()
                .iter()
                .flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())
                .collect(),
            other => panic!("cast to {other:?}"),
        };
        Self {
            dtype,
            shape: self.shape.clone(),
            bytes,
        }
    }
}

/// Configuration and tensors of an adapter, to be changed before they are written.
#[derive(Clone, Debug)]
pub(crate) struct AdapterFiles {
    pub config: Map<String, Value>,
    pub tensors: BTreeMap<String, FileTensor>,
    pub others: BTreeMap<String, Vec<u8>>,
}

impl AdapterFiles {
    /// What PEFT would save for `config` over `decoder`: every tensor that the configuration asks for, with values that depend on
    /// `seed` and on the place.
    pub(crate) fn new(decoder: &DecoderConfig, config: Value, seed: u32) -> Self {
        let Value::Object(mut object) = config else { panic!("an object") };
        object.entry("peft_type").or_insert(json!("LORA"));
        object.entry("task_type").or_insert(json!("CAUSAL_LM"));
        let parsed = PeftConfig::parse(&serde_json::to_vec(&object).unwrap()).expect("the configuration of a test is good");
        let resolution = parsed.resolve(decoder).expect("the configuration of a test fits the base");
        let mut files = Self {
            config: object,
            tensors: BTreeMap::new(),
            others: BTreeMap::new(),
        };
        let mut next = seed;
        for module in resolution.modules.iter().filter(|module| !module.tied_to_embedding) {
            let (d_in, d_out) = module_shape(decoder, module.id);
            let rank = module.lora_rank as usize;
            let (a, b) = if module.id == ModuleId::EmbedTokens {
                ("lora_embedding_A", "lora_embedding_B")
            } else {
                ("lora_A.weight", "lora_B.weight")
            };
            files.add(module.id, a, &[rank, d_in], &mut next);
            files.add(module.id, b, &[d_out, rank], &mut next);
        }
        files
    }

    /// q and v at rank 2, α 4.
    pub(crate) fn simple(decoder: &DecoderConfig, seed: u32) -> Self {
        Self::new(decoder, json!({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}), seed)
    }

    pub(crate) fn add(&mut self, id: ModuleId, form: &str, shape: &[usize], next: &mut u32) {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| value(next)).collect();
        self.tensors.insert(tensor_name(id, form), FileTensor::f32(shape, &values));
    }

    /// With one key changed.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        self.config.insert(key.into(), value);
        self
    }

    pub(crate) fn weights(&self) -> Vec<u8> {
        let views = self
            .tensors
            .iter()
            .map(|(name, tensor)| (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    pub(crate) fn write(&self) -> TempDir {
        let directory = TempDir::new().unwrap();
        self.write_to(directory.path());
        directory
    }

    pub(crate) fn write_to(&self, directory: &std::path::Path) {
        std::fs::write(directory.join("adapter_config.json"), serde_json::to_vec_pretty(&self.config).unwrap()).unwrap();
        std::fs::write(directory.join("adapter_model.safetensors"), self.weights()).unwrap();
        for (name, bytes) in &self.others {
            std::fs::write(directory.join(name), bytes).unwrap();
        }
    }
}

pub(crate) fn source(directory: &TempDir) -> FileSource {
    FileSource::Directory(directory.path().to_owned())
}

pub(crate) fn tensor_name(id: ModuleId, form: &str) -> String {
    format!("base_model.model.{}.{form}", module_path(id))
}

/// A small number that no other place has; exact in bf16, so that packing loses nothing.
fn value(next: &mut u32) -> f32 {
    *next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    let sign = if *next & (1 << 31) == 0 { 1.0 } else { -1.0 };
    sign * (1.0 + ((*next >> 8) & 0x7f) as f32 / 128.0) / 8.0
}
