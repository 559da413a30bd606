//! Model files to tensors: safetensors, one file or several, mapped; or random weights of the same shapes.
//!
//! A tensor is looked up by [`DecoderTensor`], which says its name and its shape; what is in the file is compared with that.

use std::{borrow::Cow, collections::HashMap};

use half::{bf16, f16};

use crate::{
    decoder::{DecoderConfig, DecoderTensor},
    files::{FileBytes, FileSource},
};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// An index of a 100-layer model is a few hundred kilobytes.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// dtype of a tensor in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `float32`, `float16`, `bfloat16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// A checkpoint that is damaged or is not one of this decoder.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// Could not be opened.
    #[error("{file}: {error}")]
    Io {
        /// Which file.
        file: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// Neither a single file nor an index.
    #[error("no weights: neither {SINGLE_FILE} nor {INDEX_FILE} exists (pickle files are not read)")]
    NoWeights,
    /// Not the format that its name says.
    #[error("{file}: {reason}")]
    BadFile {
        /// Which file.
        file: String,
        /// What and where.
        reason: String,
    },
    /// A tensor that the decoder needs.
    #[error("tensor {name} is missing, expected shape {shape:?}")]
    Missing {
        /// Its name.
        name: String,
        /// The shape that it should have.
        shape: Vec<usize>,
    },
    /// A tensor that does not fit `config.json`.
    #[error("tensor {name} in {file}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Which file.
        file: String,
        /// By `config.json`.
        expected: Vec<usize>,
        /// In the file.
        got: Vec<usize>,
    },
    /// A dtype that is not read.
    #[error("tensor {name} in {file}: expected dtype F32, F16 or BF16, got {got}")]
    Dtype {
        /// Its name.
        name: String,
        /// Which file.
        file: String,
        /// In the file.
        got: String,
    },
    /// Weights that the decoder has no place for: ignoring them would change the result.
    #[error("tensor {name} in {file} has no place in a {architecture} of this config.json")]
    Unexpected {
        /// Its name.
        name: String,
        /// Which file.
        file: String,
        /// The decoder.
        architecture: String,
    },
}

/// The weights of one model.
pub struct ModelWeights {
    source: Source,
}

enum Source {
    Files {
        files: Vec<(String, FileBytes)>,
        tensors: HashMap<String, FileTensor>,
    },
    Random {
        seed: u64,
        dtype: Dtype,
    },
}

struct FileTensor {
    file_idx: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    /// Bytes of the file.
    range: std::ops::Range<usize>,
}

impl ModelWeights {
    /// Maps `model.safetensors`, or the files that `model.safetensors.index.json` names, and reads their headers.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub fn open(source: &FileSource) -> Result<Self, WeightsError> {
        let names = if source.contains(SINGLE_FILE) {
            vec![SINGLE_FILE.to_owned()]
        } else if source.contains(INDEX_FILE) {
            files_of_index(source)?
        } else {
            return Err(WeightsError::NoWeights);
        };
        let open = |name: String| match source.open(&name) {
            Ok(bytes) => Ok((name, bytes)),
            Err(error) => Err(WeightsError::Io { file: name, error }),
        };
        Self::from_files(names.into_iter().map(open).collect::<Result<_, _>>()?)
    }

    /// The tensors of safetensors files, given by name and content. Reads their headers.
    ///
    /// # Errors
    /// `BadFile`: damaged, or a tensor is in two of them.
    pub fn from_files(files: Vec<(String, FileBytes)>) -> Result<Self, WeightsError> {
        let mut tensors = HashMap::new();
        for (file_idx, (name, bytes)) in files.iter().enumerate() {
            let bad = |reason: String| WeightsError::BadFile { file: name.clone(), reason };
            let (header_len, metadata) =
                safetensors::SafeTensors::read_metadata(bytes).map_err(|error| bad(format!("not a safetensors file: {error}")))?;
            // The length of the header stands before it, in 8 bytes.
            let data_start = header_len + size_of::<u64>();
            for (tensor, info) in metadata.tensors() {
                let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
                if range.end > bytes.len() {
                    return Err(bad(format!("tensor {tensor} ends at byte {}, the file at {}", range.end, bytes.len())));
                }
                let entry = FileTensor {
                    file_idx,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    range,
                };
                if tensors.insert(tensor.clone(), entry).is_some() {
                    return Err(bad(format!("tensor {tensor} is in another file, too")));
                }
            }
        }
        Ok(Self {
            source: Source::Files { files, tensors },
        })
    }

    /// Weights drawn from `seed`, for benchmarks and tests of a shape: every tensor of every configuration is there. Matrices are
    /// uniform with the variance `1 / in`, norms are near 1, biases near 0. Made when read; nothing is kept.
    pub fn random(seed: u64, dtype: Dtype) -> Self {
        Self {
            source: Source::Random { seed, dtype },
        }
    }

    /// A tensor of the decoder, its shape checked against the configuration.
    ///
    /// # Errors
    /// `Missing`, `Shape`, `Dtype`.
    pub fn tensor(&self, tensor: DecoderTensor, config: &DecoderConfig) -> Result<Tensor<'_>, WeightsError> {
        let (name, shape) = (tensor.name(), tensor.shape(config));
        let (dtype, data) = match &self.source {
            Source::Random { seed, dtype } => (*dtype, Data::Random(RandomTensor::new(*seed, &name, &shape))),
            Source::Files { files, tensors } => {
                let Some(found) = tensors.get(&name) else {
                    return Err(WeightsError::Missing { name, shape });
                };
                let (file, bytes) = &files[found.file_idx];
                if found.shape != shape {
                    return Err(WeightsError::Shape {
                        name,
                        file: file.clone(),
                        expected: shape,
                        got: found.shape.clone(),
                    });
                }
                let dtype = match found.dtype {
                    safetensors::Dtype::F32 => Dtype::F32,
                    safetensors::Dtype::F16 => Dtype::F16,
                    safetensors::Dtype::BF16 => Dtype::Bf16,
                    other => {
                        return Err(WeightsError::Dtype {
                            name,
                            file: file.clone(),
                            got: format!("{other:?}"),
                        });
                    }
                };
                // `read_metadata` has checked that the range is as long as dtype and shape say.
                let data = Data::File {
                    bytes: &bytes[found.range.clone()],
                    file: bytes,
                };
                (dtype, data)
            }
        };
        Ok(Tensor { name, dtype, shape, data })
    }

    /// Checks that every tensor of the decoder is there as it should be, and that no weight is there that it has no place for.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self, config: &DecoderConfig) -> Result<(), WeightsError> {
        let wanted = DecoderTensor::all(config);
        for &tensor in &wanted {
            self.tensor(tensor, config)?;
        }
        let Source::Files { files, tensors } = &self.source else { return Ok(()) };
        let wanted: std::collections::HashSet<String> = wanted.into_iter().map(DecoderTensor::name).collect();
        // Tables that old checkpoints carry and every reader computes; the head of a tied model, which is the embedding.
        let ignored = |name: &str| name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == DecoderTensor::LmHead.name());
        let mut unexpected: Vec<&String> = tensors.keys().filter(|name| !wanted.contains(*name) && !ignored(name)).collect();
        unexpected.sort();
        match unexpected.first() {
            None => Ok(()),
            Some(name) => Err(WeightsError::Unexpected {
                name: (*name).clone(),
                file: files[tensors[*name].file_idx].0.clone(),
                architecture: config.architecture.clone(),
            }),
        }
    }

    /// The dtype that the checkpoint is stored in: that of the embedding.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn dtype(&self, config: &DecoderConfig) -> Result<Dtype, WeightsError> {
        Ok(self.tensor(DecoderTensor::EmbedTokens, config)?.dtype)
    }
}

/// The distinct files of an index, in order of name.
fn files_of_index(source: &FileSource) -> Result<Vec<String>, WeightsError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let file = || INDEX_FILE.to_owned();
    let bytes = source
        .read(INDEX_FILE, MAX_INDEX_BYTES)
        .map_err(|error| WeightsError::Io { file: file(), error })?;
    let bad = |reason: String| WeightsError::BadFile { file: file(), reason };
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
    let names: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
    match names.iter().find(|name| name.contains(['/', '\\']) || !name.ends_with(".safetensors")) {
        Some(name) => Err(bad(format!("expected the name of a .safetensors file beside it, got {name:?}"))),
        None if names.is_empty() => Err(bad("`weight_map` is empty".to_owned())),
        None => Ok(names.into_iter().collect()),
    }
}

/// One tensor, row-major.
pub struct Tensor<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Data<'a>,
}

enum Data<'a> {
    File { bytes: &'a [u8], file: &'a FileBytes },
    Random(RandomTensor),
}

impl Tensor<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is stored in.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its shape, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements of a row: the innermost dimension.
    pub fn row_len(&self) -> usize {
        *self.shape.last().expect("no decoder tensor is a scalar")
    }

    /// Its elements, little-endian, as they are stored.
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match &self.data {
            Data::File { bytes, file } => {
                file.was_read(bytes.len());
                Cow::Borrowed(bytes)
            }
            Data::Random(random) => {
                let mut values = vec![0.0; self.shape.iter().product()];
                random.fill(0, &mut values);
                Cow::Owned(match self.dtype {
                    Dtype::F32 => values.into_iter().flat_map(f32::to_le_bytes).collect(),
                    Dtype::F16 => values.into_iter().flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
                    Dtype::Bf16 => values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
                })
            }
        }
    }

    /// Row `row` widened to f32. Panics unless `out` is a row long and the tensor has that row.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let len = self.row_len();
        assert_eq!(out.len(), len, "length of a row of {}", self.name);
        match &self.data {
            Data::File { bytes, file } => {
                let row_bytes = len * self.dtype.size_bytes();
                widen(self.dtype, &bytes[row * row_bytes..(row + 1) * row_bytes], out);
                file.was_read(row_bytes);
            }
            Data::Random(random) => {
                random.fill((row * len) as u64, out);
                // The same values that `bytes` gives.
                match self.dtype {
                    Dtype::F32 => {}
                    Dtype::F16 => out.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
                    Dtype::Bf16 => out.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
                }
            }
        }
    }

    /// The tensor as candle's, in the dtype that it is stored in, on the CPU.
    ///
    /// # Errors
    /// candle's, when memory is short.
    pub fn to_candle(&self) -> candle_core::Result<candle_core::Tensor> {
        let dtype = match self.dtype {
            Dtype::F32 => candle_core::DType::F32,
            Dtype::F16 => candle_core::DType::F16,
            Dtype::Bf16 => candle_core::DType::BF16,
        };
        candle_core::Tensor::from_raw_buffer(&self.bytes(), dtype, &self.shape, &candle_core::Device::Cpu)
    }

    /// All of it, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        self.to_candle()
            .and_then(|tensor| tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1())
            .expect("dtype, shape and length were compared when the file was opened, and candle widens each of the three dtypes")
    }
}

/// Little-endian elements to f32; a file need not align them.
fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::F16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        Dtype::Bf16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
    }
}

/// A tensor whose element `i` is a function of `(seed, name, i)`.
struct RandomTensor {
    key: u64,
    mean: f32,
    /// Half the width of the uniform distribution.
    amplitude: f32,
}

impl RandomTensor {
    fn new(seed: u64, name: &str, shape: &[usize]) -> Self {
        // FNV-1a.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let (mean, deviation) = match shape {
            [_, d_in] => (0.0, (1.0 / *d_in as f32).sqrt()),
            _ if name.ends_with("bias") => (0.0, 0.05),
            _ => (1.0, 0.05),
        };
        Self {
            key: mix(seed ^ mix(hash)),
            mean,
            amplitude: deviation * 3f32.sqrt(),
        }
    }

    fn fill(&self, start: u64, out: &mut [f32]) {
        for (i, value) in out.iter_mut().enumerate() {
            let bits = mix(self.key.wrapping_add((start + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            // 24 bits: exact in f32, in [-1, 1).
            let unit = (bits >> 40) as f32 * (2.0 / (1 << 24) as f32) - 1.0;
            *value = self.mean + self.amplitude * unit;
        }
    }
}

/// The finalizer of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::tensor::TensorView;

    use super::*;
    use crate::decoder::LayerTensor;

    fn config() -> DecoderConfig {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 6, "hidden_size": 4, "intermediate_size": 10, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8, "tie_word_embeddings": true
        });
        DecoderConfig::from_json(json.to_string().as_bytes(), None).unwrap()
    }

    type Entries = Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)>;

    /// Every tensor of the decoder, in f32.
    fn entries(config: &DecoderConfig) -> Entries {
        let random = ModelWeights::random(1, Dtype::F32);
        let entry = |tensor: DecoderTensor| {
            let bytes = random.tensor(tensor, config).unwrap().bytes().into_owned();
            (tensor.name(), safetensors::Dtype::F32, tensor.shape(config), bytes)
        };
        DecoderTensor::all(config).into_iter().map(entry).collect()
    }

    fn write(path: &Path, entries: &Entries) {
        let views = entries
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn open(directory: &Path) -> Result<ModelWeights, WeightsError> {
        ModelWeights::open(&FileSource::Directory(directory.to_owned()))
    }

    fn check(entries: &Entries) -> Result<(), WeightsError> {
        let directory = tempfile::tempdir().unwrap();
        write(&directory.path().join(SINGLE_FILE), entries);
        open(directory.path())?.check(&config())
    }

    #[test]
    fn reads_each_dtype() {
        let values = [0.5f32, -1.25, 3.0, 65504.0, 0.0, -0.0078125];
        let bytes_of = |dtype| -> Vec<u8> {
            match dtype {
                safetensors::Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
                safetensors::Dtype::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
            }
        };
        for (dtype, expected) in [
            (safetensors::Dtype::F32, Dtype::F32),
            (safetensors::Dtype::F16, Dtype::F16),
            (safetensors::Dtype::BF16, Dtype::Bf16),
        ] {
            let mut entries = entries(&config());
            entries[0].1 = dtype;
            entries[0].3 = [bytes_of(dtype), bytes_of(dtype), bytes_of(dtype), bytes_of(dtype)].concat();
            let directory = tempfile::tempdir().unwrap();
            write(&directory.path().join(SINGLE_FILE), &entries);
            let weights = open(directory.path()).unwrap();
            weights.check(&config()).unwrap();
            let tensor = weights.tensor(DecoderTensor::EmbedTokens, &config()).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape(), tensor.row_len()), (expected, &[6, 4][..], 4));
            let mut row = [0.0; 4];
            tensor.read_row(1, &mut row);
            let large = if expected == Dtype::Bf16 { 65536.0 } else { 65504.0 };
            assert_eq!(row, [0.0, -0.0078125, 0.5, -1.25], "elements 4 to 7 of values that repeat every 6");
            assert_eq!(tensor.to_f32()[3], large);
        }
    }

    #[test]
    fn reads_sharded_files_as_one() {
        let all = entries(&config());
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = all.split_at(7);
        write(&directory.path().join("a.safetensors"), &first.to_vec());
        write(&directory.path().join("b.safetensors"), &second.to_vec());
        let index = |map: serde_json::Value| {
            let json = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
            std::fs::write(directory.path().join(INDEX_FILE), json).unwrap();
        };
        let file = |i| if i < 7 { "a.safetensors" } else { "b.safetensors" };
        index(
            all.iter()
                .enumerate()
                .map(|(i, entry)| (entry.0.clone(), serde_json::Value::from(file(i))))
                .collect(),
        );
        let weights = open(directory.path()).unwrap();
        weights.check(&config()).unwrap();
        for (tensor, entry) in DecoderTensor::all(&config()).into_iter().zip(&all) {
            assert_eq!(weights.tensor(tensor, &config()).unwrap().bytes(), entry.3);
        }
        index(serde_json::json!({"x": "../a.safetensors"}));
        let message = open(directory.path()).err().unwrap().to_string();
        assert!(message.contains("../a.safetensors"), "{message}");
        index(serde_json::json!({"x": "c.safetensors"}));
        assert!(matches!(open(directory.path()), Err(WeightsError::Io { file, .. }) if file == "c.safetensors"));
    }

    #[test]
    fn refuses_by_tensor_expected_and_got() {
        let all = entries(&config());
        check(&all).unwrap();
        let position = |name: &str| all.iter().position(|entry| entry.0 == name).unwrap();
        let down = position("model.layers.1.mlp.down_proj.weight");

        let mut missing = all.clone();
        missing.remove(down);
        let message = check(&missing).unwrap_err().to_string();
        assert_eq!(message, "tensor model.layers.1.mlp.down_proj.weight is missing, expected shape [4, 10]");

        let mut turned = all.clone();
        turned[down].2 = vec![10, 4];
        let message = check(&turned).unwrap_err().to_string();
        assert!(
            message.contains("down_proj") && message.contains("[4, 10]") && message.contains("[10, 4]"),
            "{message}"
        );

        let mut wide = all.clone();
        (wide[down].1, wide[down].3) = (safetensors::Dtype::F64, vec![0; 8 * 40]);
        let message = check(&wide).unwrap_err().to_string();
        assert!(message.contains("down_proj") && message.contains("F64"), "{message}");

        let mut more = all.clone();
        more.push((
            "model.layers.0.self_attn.q_proj.bias".into(),
            safetensors::Dtype::F32,
            vec![4],
            vec![0; 16],
        ));
        assert!(matches!(check(&more), Err(WeightsError::Unexpected { name, .. }) if name.ends_with("q_proj.bias")));

        let mut harmless = all.clone();
        harmless.push((
            "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
            safetensors::Dtype::F32,
            vec![1],
            vec![0; 4],
        ));
        harmless.push(("lm_head.weight".into(), safetensors::Dtype::F32, vec![6, 4], vec![0; 96]));
        check(&harmless).unwrap();
    }

    #[test]
    fn damaged_files_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(open(directory.path()), Err(WeightsError::NoWeights)));
        let path = directory.path().join(SINGLE_FILE);
        write(&path, &entries(&config()));
        let good = std::fs::read(&path).unwrap();
        for len in [0, 4, 8, 100, good.len() - 1] {
            std::fs::write(&path, &good[..len]).unwrap();
            assert!(matches!(open(directory.path()), Err(WeightsError::BadFile { .. })), "{len} bytes");
        }
        let mut huge_header = good.clone();
        huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&path, huge_header).unwrap();
        assert!(matches!(open(directory.path()), Err(WeightsError::BadFile { .. })));
    }

    #[test]
    fn random_rows_are_what_bytes_hold() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let weights = ModelWeights::random(7, dtype);
            let tensor = weights.tensor(DecoderTensor::Layer(1, LayerTensor::Gate), &config()).unwrap();
            let mut widened = vec![0.0; 40];
            widen(dtype, &tensor.bytes(), &mut widened);
            assert_eq!(tensor.to_f32(), widened);
            let mean_square = widened.iter().map(|value| value * value).sum::<f32>() / 40.0;
            assert!((0.1..0.4).contains(&mean_square), "variance 1/4 expected, got {mean_square}");
            let other = weights.tensor(DecoderTensor::Layer(1, LayerTensor::Up), &config()).unwrap().to_f32();
            assert_ne!(widened, other);
        }
    }
}
