//! The tensors of an adapter's files: which there are, whose they are, and their values.

use std::{collections::BTreeMap, io, sync::Arc};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

use super::{AdapterError, ModuleId, config::module_path, load::LoraLimits};
use crate::{
    adapter::Projection,
    files::{FileSource, ReadBuffer, ReadBuffers},
};

/// The file that PEFT writes.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Names the files of an adapter that was split.
pub const INDEX_FILE: &str = "adapter_model.safetensors.index.json";
/// Longest index that is parsed.
pub const MAX_INDEX_BYTES: u64 = MAX_HEADER_BYTES;
/// Formats that run code when they are read.
const PICKLE_FILES: [&str; 4] = ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt"];
/// Longest header of a safetensors file that is parsed.
pub const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Components that end a module's path, beside `lora_…`.
const MARKERS: [&str; 4] = ["modules_to_save", "original_module", "base_layer", "token_adapter"];
/// What PEFT puts before the base model's module paths.
const PEFT_PREFIX: &str = "base_model.model.";

/// What a tensor is to its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// `lora_A` `[lora_rank, d_in]`; `lora_embedding_A` `[lora_rank, vocab]`.
    A,
    /// `lora_B` `[d_out, lora_rank]`; `lora_embedding_B` `[hidden, lora_rank]`.
    B,
    /// `lora_B.bias` `[d_out]`.
    BBias,
    /// `lora_magnitude_vector` `[d_out]`.
    Magnitude,
    /// The module's own weight, whole.
    Weight,
    /// The same once more, as PEFT writes it beside `Weight` when it saves the embeddings of a resized vocabulary.
    SavedWeight,
    /// What a saved module was before it was trained, likewise.
    OriginalWeight,
    /// Rows of an embedding or a head `[tokens, hidden]`, trained one by one.
    TokenRows,
    /// The module's own bias.
    Bias,
}

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// Its values.
    pub view: TensorView<'a>,
}

/// The content of an adapter's weight files.
pub struct WeightFiles {
    files: Vec<(String, ReadBuffer)>,
    /// Which file the index says a tensor is in; `None` without an index.
    index: Option<BTreeMap<String, String>>,
}

impl WeightFiles {
    /// Reads the safetensors file, or those that the index names, `max_bytes` together at most.
    ///
    /// # Errors
    /// `BadFile`: missing, too long, or a pickle file.
    pub fn read(source: &FileSource, max_bytes: u64, limits: &LoraLimits) -> Result<Self, AdapterError> {
        if source.contains(WEIGHTS_FILE) {
            let bytes = read_weights(source, WEIGHTS_FILE, max_bytes, limits)?;
            return Ok(Self {
                files: vec![(WEIGHTS_FILE.into(), bytes)],
                index: None,
            });
        }
        if source.contains(INDEX_FILE) {
            return Self::read_shards(source, max_bytes, limits);
        }
        if let Some(file) = PICKLE_FILES.into_iter().find(|file| source.contains(file)) {
            return Err(bad(
                file,
                "pickle files are not read, since reading one can run code; save the adapter with safe_serialization=True",
            ));
        }
        Err(bad(WEIGHTS_FILE, "no such file"))
    }

    /// One file that is in memory already.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut buffer = Arc::<ReadBuffers>::default().take(bytes.len());
        buffer.copy_from_slice(bytes);
        Self {
            files: vec![(WEIGHTS_FILE.into(), buffer)],
            index: None,
        }
    }

    fn read_shards(source: &FileSource, max_bytes: u64, limits: &LoraLimits) -> Result<Self, AdapterError> {
        let index = parse_index(&read_file(source, INDEX_FILE, MAX_INDEX_BYTES)?)?;
        let mut names: Vec<String> = index.values().cloned().collect();
        names.sort();
        names.dedup();
        let mut files = Vec::new();
        let mut left = max_bytes;
        for name in names {
            let bytes = read_weights(source, &name, left, limits)?;
            left -= bytes.len() as u64;
            files.push((name, bytes));
        }
        Ok(Self { files, index: Some(index) })
    }

    /// Every tensor, by module and role.
    ///
    /// # Errors
    /// `BadFile` for a damaged file, a name of unknown form or module, a tensor that is there twice, several adapters in one file, a
    /// tensor that the index and the files don't agree on.
    pub fn tensors(&self, num_layers: usize) -> Result<BTreeMap<(ModuleId, Role), Tensor<'_>>, AdapterError> {
        let mut found = BTreeMap::new();
        let mut adapter_name: Option<String> = None;
        for (file, bytes) in &self.files {
            let header_len = bytes.first_chunk::<8>().map(|len| u64::from_le_bytes(*len));
            if let Some(len) = header_len.filter(|&len| len > MAX_HEADER_BYTES) {
                return Err(bad(file, format!("a header of {len} bytes, at most {MAX_HEADER_BYTES} are read")));
            }
            let tensors = SafeTensors::deserialize(bytes).map_err(|error| bad(file, format!("damaged safetensors file: {error}")))?;
            for (name, view) in tensors.iter() {
                if self
                    .index
                    .as_ref()
                    .is_some_and(|index| index.get(name).is_none_or(|expected| expected != file))
                {
                    return Err(bad(file, format!("tensor {name} is not in this file by {INDEX_FILE}")));
                }
                let parsed = parse_name(name, num_layers).map_err(|reason| bad(file, format!("tensor {name}: {reason}")))?;
                if let Some(own) = parsed.adapter_name {
                    let first = adapter_name.get_or_insert_with(|| own.to_owned());
                    if first != own {
                        return Err(bad(
                            file,
                            format!("tensor {name} belongs to an adapter {own:?}, others to {first:?}; one file holds one adapter"),
                        ));
                    }
                }
                let tensor = Tensor { name: name.to_owned(), view };
                if let Some(other) = found.insert((parsed.id, parsed.role), tensor) {
                    return Err(bad(file, format!("tensors {} and {name} are the same one", other.name)));
                }
            }
        }
        if let Some(index) = &self.index {
            let names: std::collections::BTreeSet<&str> = found.values().map(|tensor| tensor.name.as_str()).collect();
            if let Some((missing, file)) = index.iter().find(|(name, _)| !names.contains(name.as_str())) {
                return Err(bad(file, format!("tensor {missing} is missing, {INDEX_FILE} names it")));
            }
        }
        Ok(found)
    }
}

/// Reads an index: from tensor to file.
///
/// # Errors
/// `BadFile` for what is no index, or names files elsewhere.
pub fn parse_index(bytes: &[u8]) -> Result<BTreeMap<String, String>, AdapterError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| bad(INDEX_FILE, format!("not valid JSON: {error}")))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| bad(INDEX_FILE, "`weight_map`: expected an object from tensor to file"))?;
    let entry = |(tensor, file): (&String, &Value)| match file.as_str().filter(|file| is_shard_name(file)) {
        Some(file) => Ok((tensor.clone(), file.to_owned())),
        None => Err(bad(
            INDEX_FILE,
            format!("`weight_map`: {tensor}: expected the name of a safetensors file, got {file}"),
        )),
    };
    map.iter().map(entry).collect()
}

/// Whether a file of this name can be a part of an adapter that was split.
pub fn is_shard_name(name: &str) -> bool {
    name.len() <= 255 && name.ends_with(".safetensors") && name != WEIGHTS_FILE && !name.contains(['/', '\\', '\0'])
}

struct ParsedName<'a> {
    id: ModuleId,
    role: Role,
    /// The adapter's name inside the tensor's, as in `lora_A.default.weight`.
    adapter_name: Option<&'a str>,
}

/// `base_model.model.model.layers.N.self_attn.q_proj.lora_A[.NAME].weight` and its relatives.
fn parse_name(name: &str, num_layers: usize) -> Result<ParsedName<'_>, String> {
    let path = name
        .strip_prefix(PEFT_PREFIX)
        .ok_or(format!("expected a name that begins with {PEFT_PREFIX}"))?;
    let components: Vec<&str> = path.split('.').collect();
    let is_marker = |component: &&str| component.starts_with("lora_") || MARKERS.contains(component);
    let own = components.iter().position(is_marker).unwrap_or(components.len().saturating_sub(1));
    let (module, rest) = components.split_at(own);
    let (role, adapter_name) = match *rest {
        ["lora_A", "weight"] | ["lora_embedding_A"] => (Role::A, None),
        ["lora_A", adapter, "weight"] | ["lora_embedding_A", adapter] => (Role::A, Some(adapter)),
        ["lora_B", "weight"] | ["lora_embedding_B"] => (Role::B, None),
        ["lora_B", adapter, "weight"] | ["lora_embedding_B", adapter] => (Role::B, Some(adapter)),
        ["lora_B", "bias"] => (Role::BBias, None),
        ["lora_B", adapter, "bias"] => (Role::BBias, Some(adapter)),
        ["lora_magnitude_vector"] | ["lora_magnitude_vector", "weight"] => (Role::Magnitude, None),
        ["lora_magnitude_vector", adapter] | ["lora_magnitude_vector", adapter, "weight"] => (Role::Magnitude, Some(adapter)),
        ["weight"] | ["base_layer", "weight"] | ["token_adapter", "base_layer", "weight"] => (Role::Weight, None),
        ["modules_to_save", "weight"] => (Role::SavedWeight, None),
        ["modules_to_save", adapter, "weight"] => (Role::SavedWeight, Some(adapter)),
        ["original_module", "weight"] => (Role::OriginalWeight, None),
        ["token_adapter", "trainable_tokens_delta"] => (Role::TokenRows, None),
        ["token_adapter", "trainable_tokens_delta", adapter] => (Role::TokenRows, Some(adapter)),
        ["bias"] | ["base_layer", "bias"] => (Role::Bias, None),
        _ => return Err("not a tensor that PEFT saves for LoRA".into()),
    };
    let id = parse_module(module, num_layers)?;
    let is_embedding_form = rest[0].starts_with("lora_embedding_");
    if matches!(role, Role::A | Role::B) && is_embedding_form != (id == ModuleId::EmbedTokens) {
        return Err(format!(
            "`{}` takes {}",
            module_path(id),
            if is_embedding_form {
                "lora_A and lora_B"
            } else {
                "lora_embedding_A and lora_embedding_B"
            }
        ));
    }
    Ok(ParsedName { id, role, adapter_name })
}

fn parse_module(components: &[&str], num_layers: usize) -> Result<ModuleId, String> {
    match components {
        ["model", "embed_tokens"] => Ok(ModuleId::EmbedTokens),
        ["lm_head"] => Ok(ModuleId::LmHead),
        ["model", "layers", layer, parent, module] => {
            let projection = Projection::ALL
                .into_iter()
                .find(|projection| projection.parent() == *parent && projection.module_name() == *module);
            // "03" and "+3" are numbers to `parse` and are no module's name.
            let number = layer.parse::<u16>().ok().filter(|number| number.to_string() == **layer);
            match (projection, number) {
                (Some(projection), Some(layer)) if usize::from(layer) < num_layers => Ok(ModuleId::Layer { layer, projection }),
                (Some(_), Some(layer)) => Err(format!("layer {layer}, the base model has {num_layers}")),
                _ => Err(format!("the base model has no module {}", components.join("."))),
            }
        }
        _ => Err(format!("the base model has no module {}", components.join("."))),
    }
}

/// Reads one file of an adapter.
///
/// # Errors
/// `BadFile` with what the system says, in words.
pub fn read_file(source: &FileSource, name: &str, max_bytes: u64) -> Result<Vec<u8>, AdapterError> {
    source.read(name, max_bytes).map_err(|error| unreadable(name, &error))
}

fn read_weights(source: &FileSource, name: &str, max_bytes: u64, limits: &LoraLimits) -> Result<ReadBuffer, AdapterError> {
    let read = source.read_large(name, max_bytes, limits.pack_threads, &limits.read_buffers);
    read.map_err(|error| unreadable(name, &error))
}

fn unreadable(name: &str, error: &io::Error) -> AdapterError {
    match error.kind() {
        io::ErrorKind::NotFound => bad(name, "no such file"),
        _ => bad(name, error.to_string()),
    }
}

pub(super) fn bad(file: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::BadFile {
        file: file.into(),
        reason: reason.into(),
    }
}

/// A number as it lies in a file.
pub trait Element: Copy {
    /// Bytes of one.
    const BYTES: usize;
    /// Reads one from exactly `BYTES` bytes, little-endian.
    fn decode(bytes: &[u8]) -> f32;
}

impl Element for f32 {
    const BYTES: usize = 4;
    fn decode(bytes: &[u8]) -> f32 {
        Self::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

impl Element for f16 {
    const BYTES: usize = 2;
    fn decode(bytes: &[u8]) -> f32 {
        Self::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

impl Element for bf16 {
    const BYTES: usize = 2;
    fn decode(bytes: &[u8]) -> f32 {
        Self::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

impl Tensor<'_> {
    /// Checks dtype and shape.
    ///
    /// # Errors
    /// `Incompatible` with expected and got.
    pub fn check(&self, shape: &[usize]) -> Result<(), AdapterError> {
        if !matches!(self.view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(AdapterError::Incompatible {
                reason: format!("tensor {}: expected dtype F32, F16 or BF16, got {:?}", self.name, self.view.dtype()),
            });
        }
        if self.view.shape() != shape {
            return Err(AdapterError::Incompatible {
                reason: format!("tensor {}: expected shape {shape:?}, got {:?}", self.name, self.view.shape()),
            });
        }
        Ok(())
    }

    /// All values as f32, in the file's order, each finite. Call `check` first.
    ///
    /// # Errors
    /// `BadFile` naming the tensor and the place.
    pub fn to_f32(&self) -> Result<Vec<f32>, AdapterError> {
        let bytes = self.view.data();
        let values: Vec<f32> = match self.view.dtype() {
            Dtype::F32 => bytes.chunks_exact(4).map(f32::decode).collect(),
            Dtype::F16 => bytes.chunks_exact(2).map(f16::decode).collect(),
            _ => bytes.chunks_exact(2).map(bf16::decode).collect(),
        };
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(index) => Err(self.not_finite(index, values[index])),
        }
    }

    /// Writes row `row` of a `[_, out.len()]` tensor as f32. Call `check` first.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        fn decode<E: Element>(bytes: &[u8], row: usize, out: &mut [f32]) {
            let row_bytes = out.len() * E::BYTES;
            let values = bytes[row * row_bytes..][..row_bytes].chunks_exact(E::BYTES).map(E::decode);
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value);
        }
        match self.view.dtype() {
            Dtype::F32 => decode::<f32>(self.view.data(), row, out),
            Dtype::F16 => decode::<f16>(self.view.data(), row, out),
            _ => decode::<bf16>(self.view.data(), row, out),
        }
    }

    /// The error for a value that isn't a number that can be used.
    pub fn not_finite(&self, index: usize, value: f32) -> AdapterError {
        let columns = self.view.shape().last().copied().unwrap_or(1).max(1);
        AdapterError::Incompatible {
            reason: format!("tensor {}: row {}, column {} is {value}", self.name, index / columns, index % columns),
        }
    }
}
