//! Adapter files to [`HostAdapter`]s, checked against the base model.
//!
//! Everything that a file says is either applied as PEFT applies it or an error that names it. Files are read into memory within a
//! bound that follows from the configuration and the base model; nothing in them can do worse than an `Err`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use half::bf16;
use safetensors::{Dtype, tensor::TensorView};

use super::{
    AdapterError, AlignedBytes, BaseWeights, CompanionReader, HostAdapter, HostMemory, ModuleId, PackedDtype, PackedModule, Projection,
    ReplacedWeight, TokenRows, VersionId,
    config::{BiasMode, CONFIG_FILE, MAX_CONFIG_BYTES, PeftConfig, Resolution, ResolvedModule, ResolvedRows, module_path},
    tensors::{Element, MAX_HEADER_BYTES, Role, Tensor, WEIGHTS_FILE, WeightFiles, bad, read_file},
};
use crate::{
    decoder::{DecoderConfig, DecoderTensor, LayerTensor},
    files::{FileSource, ReadBuffers},
    weights::ModelWeights,
};

/// More tokens than this an adapter does not add: what bounds its files in memory, and the logits of its rows.
pub const MAX_ADDED_TOKENS: usize = 1 << 16;

/// What an adapter covers and how: shown by the load answer and by `polylora adapters inspect`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct CoverageReport {
    /// One entry per module: path, rank, effective scaling.
    pub modules: Vec<ModuleCoverage>,
    /// Layers with at least one module, ascending.
    pub layers: Vec<u16>,
    /// Modules that the adapter brings whole.
    pub replaced_modules: Vec<String>,
    /// Modules of which the adapter brings rows for single tokens, and how many.
    pub token_rows: BTreeMap<String, usize>,
    /// Tokens that it has, where they are not as many as the base model's.
    pub resized_vocab: Option<usize>,
    /// Keys of the configuration that have no effect on inference, and entries of its lists that match nothing.
    pub keys_without_effect: Vec<String>,
    /// Tensors that change nothing: copies of the base model's own weights.
    pub tensors_without_effect: Vec<String>,
}

/// One covered module.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ModuleCoverage {
    /// `model.layers.0.self_attn.q_proj`, …
    pub module: String,
    /// Rows of A.
    pub lora_rank: u32,
    /// α as configured for this module.
    pub lora_alpha: f32,
    /// α/r or α/√r.
    pub scaling: f32,
}

/// What a backend can apply beyond A and B. All off unless the backend says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoraFeatures {
    /// Scales and biases on outputs: DoRA, `lora_bias`, `bias`.
    pub output_terms: bool,
    /// Whole embeddings and heads: `modules_to_save`.
    pub replaced_weights: bool,
    /// Embeddings and heads with rows of other tokens than the base model's: a resized vocabulary, `trainable_token_indices`.
    pub own_tokens: bool,
}

/// Opens the base model's weights for the time of one load: kept open, the mapped checkpoint would count as memory.
pub type BaseOpener = Arc<dyn Fn() -> Result<Box<dyn BaseWeights>, AdapterError> + Send + Sync>;

/// Opens the checkpoint that the base model was loaded from.
pub fn checkpoint_opener(files: FileSource, decoder: Arc<DecoderConfig>) -> BaseOpener {
    Arc::new(move || {
        let weights = ModelWeights::open(&files).map_err(|error| AdapterError::Internal {
            reason: format!("the base model's weights can't be read again: {error}"),
        })?;
        let decoder = decoder.clone();
        Ok(Box::new(Checkpoint { weights, decoder }))
    })
}

struct Checkpoint {
    weights: ModelWeights,
    decoder: Arc<DecoderConfig>,
}

impl Checkpoint {
    fn layer_tensor(&self, projection: Projection, is_bias: bool) -> Option<LayerTensor> {
        let (weight, bias) = match projection {
            Projection::Q => (LayerTensor::Q, LayerTensor::QBias),
            Projection::K => (LayerTensor::K, LayerTensor::KBias),
            Projection::V => (LayerTensor::V, LayerTensor::VBias),
            Projection::O => (LayerTensor::O, LayerTensor::OBias),
            Projection::Gate => (LayerTensor::Gate, LayerTensor::GateBias),
            Projection::Up => (LayerTensor::Up, LayerTensor::UpBias),
            Projection::Down => (LayerTensor::Down, LayerTensor::DownBias),
        };
        Some(if is_bias { bias } else { weight }).filter(|tensor| tensor.is_in(&self.decoder))
    }
}

impl BaseWeights for Checkpoint {
    fn read_row(&self, id: ModuleId, row: usize, out: &mut [f32]) {
        let tensor = match id {
            ModuleId::Layer { layer, projection } => {
                let tensor = self.layer_tensor(projection, false).expect("every decoder has its projections");
                DecoderTensor::Layer(layer.into(), tensor)
            }
            ModuleId::LmHead if !self.decoder.tie_word_embeddings => DecoderTensor::LmHead,
            ModuleId::LmHead | ModuleId::EmbedTokens => DecoderTensor::EmbedTokens,
        };
        // The model was loaded from these files. Should they have been replaced since, the loader's `catch_unwind` makes an error of it.
        let tensor = self.weights.tensor(tensor, &self.decoder).expect("the base model has its own tensors");
        tensor.read_row(row, out);
    }

    fn bias(&self, id: ModuleId) -> Option<Vec<f32>> {
        let ModuleId::Layer { layer, projection } = id else { return None };
        let tensor = DecoderTensor::Layer(layer.into(), self.layer_tensor(projection, true)?);
        Some(self.weights.tensor(tensor, &self.decoder).ok()?.to_f32())
    }
}

/// What an adapter must keep to, and what its weights are packed for.
#[derive(Clone)]
pub struct LoraLimits {
    /// Largest rank accepted; `None` accepts every rank.
    pub max_lora_rank: Option<u32>,
    /// Largest rank of a combination, which is the sum of its parts': what the backend's buffers are made for; `None` is any.
    pub max_combined_rank: Option<u32>,
    /// Modules accepted (`q_proj`, …, `embed_tokens`, `lm_head`); `None` accepts all.
    pub target_modules: Option<BTreeSet<String>>,
    /// dtype of the packed weights.
    pub dtype: PackedDtype,
    /// What the backend can apply.
    pub features: LoraFeatures,
    /// Opens the base model's weights, for the adapters that need them. Without it DoRA and trained biases are refused, and saved
    /// copies of base weights are taken on trust.
    pub base: Option<BaseOpener>,
    /// Most bytes that it may take once packed: what a device keeps for adapters. `None` is no bound.
    pub max_packed_bytes: Option<usize>,
    /// Reads what comes with an adapter beside its weights; without it that is passed over.
    pub companion: Option<CompanionReader>,
    /// Where packed weights lie; without it in memory of the system's.
    pub memory: Option<Arc<dyn HostMemory>>,
    /// What files are read into.
    pub read_buffers: Arc<ReadBuffers>,
    /// Most bytes of weight files, whatever the configuration says.
    pub max_file_bytes: u64,
    /// Threads that read and pack one adapter.
    pub pack_threads: usize,
}

impl std::fmt::Debug for LoraLimits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoraLimits")
            .field("max_lora_rank", &self.max_lora_rank)
            .field("target_modules", &self.target_modules)
            .field("dtype", &self.dtype)
            .field("features", &self.features)
            .finish_non_exhaustive()
    }
}

impl LoraLimits {
    /// No limit on rank and modules, no features beyond A and B; a quarter of the cores packs an adapter, eight at most.
    pub fn new(dtype: PackedDtype) -> Self {
        Self {
            max_lora_rank: None,
            max_combined_rank: None,
            target_modules: None,
            dtype,
            features: LoraFeatures::default(),
            base: None,
            companion: None,
            max_packed_bytes: None,
            memory: None,
            read_buffers: Arc::default(),
            max_file_bytes: 32 << 30,
            pack_threads: std::thread::available_parallelism().map_or(2, |cores| (cores.get() / 4).clamp(2, 8)),
        }
    }

    /// Memory for packed weights, with any content.
    pub(super) fn new_blob(&self, bytes: usize) -> AlignedBytes {
        AlignedBytes::of_any_content(bytes, self.memory.as_deref())
    }

    fn check(&self, resolution: &Resolution) -> Result<(), AdapterError> {
        let incompatible = |reason| Err(AdapterError::Incompatible { reason });
        if let Some(allowed) = &self.target_modules
            && let Some(module) = resolution.module_names().into_iter().find(|module| !allowed.contains(*module))
        {
            let allowed = allowed.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            return incompatible(format!(
                "target modules: expected none but {allowed}, got `{module}` (--lora-target-modules allows more)"
            ));
        }
        for module in &resolution.modules {
            if let Some(max) = self.max_lora_rank
                && module.lora_rank > max
            {
                return incompatible(format!(
                    "lora_rank of `{}`: expected at most {max}, got {} (--max-lora-rank allows more)",
                    module_path(module.id),
                    module.lora_rank
                ));
            }
        }
        Ok(())
    }
}

/// Reads `adapter_config.json` alone: what `--max-lora-rank` and `--lora-target-modules` are inferred from.
///
/// # Errors
/// As `load_adapter`.
pub fn inspect_config(files: &FileSource, decoder: &DecoderConfig) -> Result<Resolution, AdapterError> {
    PeftConfig::parse(&read_file(files, CONFIG_FILE, MAX_CONFIG_BYTES)?)?.resolve(decoder)
}

/// Reads, checks and packs an adapter.
///
/// # Errors
/// `BadFile`, `Unsupported`, `Incompatible`: what and where, expected and got.
pub fn load_adapter(files: &FileSource, decoder: &DecoderConfig, limits: &LoraLimits) -> Result<(HostAdapter, CoverageReport), AdapterError> {
    let config = PeftConfig::parse(&read_file(files, CONFIG_FILE, MAX_CONFIG_BYTES)?)?;
    let resolution = config.resolve(decoder)?;
    limits.check(&resolution)?;
    let max_bytes = max_weight_bytes(&resolution, decoder).min(limits.max_file_bytes);
    let weights = WeightFiles::read(files, max_bytes, limits)?;
    let (mut adapter, report) = assemble(&config, &resolution, &weights, decoder, limits)?;
    // Before the companion is read: there may be gigabytes of them.
    drop(weights);
    if let Some(read) = &limits.companion
        && let Some(companion) = read(files, &adapter)?
    {
        let mut hash = blake3::Hasher::new();
        hash.update(b"polylora adapter with files 2");
        hash.update(&adapter.version.0);
        hash.update(&companion.digest());
        adapter.version = VersionId(hash.finalize().into());
        adapter.companion = Some(companion);
    }
    Ok((adapter, report))
}

/// As [`load_adapter`], of an adapter that is in memory: `adapter_config.json` and `adapter_model.safetensors`.
///
/// # Errors
/// As `load_adapter`.
pub fn load_adapter_bytes(
    config: &[u8],
    weights: &[u8],
    decoder: &DecoderConfig,
    limits: &LoraLimits,
) -> Result<(HostAdapter, CoverageReport), AdapterError> {
    let config = PeftConfig::parse(config)?;
    let resolution = config.resolve(decoder)?;
    limits.check(&resolution)?;
    assemble(&config, &resolution, &WeightFiles::from_bytes(weights), decoder, limits)
}

fn assemble(
    config: &PeftConfig,
    resolution: &Resolution,
    weights: &WeightFiles,
    decoder: &DecoderConfig,
    limits: &LoraLimits,
) -> Result<(HostAdapter, CoverageReport), AdapterError> {
    let mut tensors = weights.tensors(decoder.num_layers)?;
    let copies = drop_copies(&mut tensors)?;
    let vocab_size = own_vocab_size(&tensors, resolution, decoder)?;
    let is_resized = vocab_size != decoder.vocab_size;
    if !limits.features.own_tokens {
        if is_resized {
            let reason = format!(
                "it has rows for {vocab_size} tokens, the base model has {}: this backend does not resize the vocabulary",
                decoder.vocab_size
            );
            return Err(unsupported("save_embedding_layers", reason));
        }
        if !resolution.token_rows.is_empty() {
            return Err(unsupported(
                "trainable_token_indices",
                "this backend does not apply rows of single tokens",
            ));
        }
    }
    let mut loader = Loader {
        decoder: &DecoderConfig {
            vocab_size,
            ..decoder.clone()
        },
        base_vocab_size: decoder.vocab_size,
        limits,
        config,
        tensors,
        resized: BTreeMap::new(),
        report: CoverageReport {
            keys_without_effect: resolution.without_effect.clone(),
            tensors_without_effect: copies,
            resized_vocab: is_resized.then_some(vocab_size),
            ..CoverageReport::default()
        },
        pieces: Vec::new(),
        blob_bytes: 0,
        base: None,
    };
    let embeddings = loader.plan_embeddings(resolution)?;
    let modules = loader.plan_modules(resolution)?;
    loader.check_leftovers()?;
    loader.check_packed_bytes()?;
    loader.finish(resolution, modules, embeddings)
}

fn unsupported(key: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::Unsupported {
        key: key.into(),
        reason: reason.into(),
    }
}

/// Takes away what PEFT writes a second time when it saves the embeddings of a resized vocabulary, and says what it took: copies must be
/// equal.
fn drop_copies(tensors: &mut BTreeMap<(ModuleId, Role), Tensor<'_>>) -> Result<Vec<String>, AdapterError> {
    let mut dropped = Vec::new();
    for id in [ModuleId::EmbedTokens, ModuleId::LmHead] {
        if let Some(saved) = tensors.remove(&(id, Role::SavedWeight)) {
            match tensors.get(&(id, Role::Weight)) {
                None => drop(tensors.insert((id, Role::Weight), saved)),
                Some(weight) => {
                    let same = |a: &Tensor<'_>, b: &Tensor<'_>| {
                        a.view.dtype() == b.view.dtype() && a.view.shape() == b.view.shape() && a.view.data() == b.view.data()
                    };
                    if !same(weight, &saved) {
                        let reason = format!("tensors {} and {} are the same one and differ", weight.name, saved.name);
                        return Err(bad(WEIGHTS_FILE, reason));
                    }
                    dropped.push(saved.name);
                }
            }
        }
    }
    Ok(dropped)
}

/// Tokens of an adapter: as many as its embeddings have rows, which PEFT saves when they are not the base model's; where it saves only the
/// rows that were trained, as many as it takes to have them all.
fn own_vocab_size(tensors: &BTreeMap<(ModuleId, Role), Tensor<'_>>, resolution: &Resolution, decoder: &DecoderConfig) -> Result<usize, AdapterError> {
    let mut first: Option<(usize, &str)> = None;
    for id in [ModuleId::EmbedTokens, ModuleId::LmHead] {
        let Some(tensor) = tensors.get(&(id, Role::Weight)) else { continue };
        // What else can be wrong with it is said where it is used.
        let &[rows, hidden] = tensor.view.shape() else { continue };
        if rows == 0 || hidden != decoder.hidden_size {
            continue;
        }
        match first {
            Some((other, name)) if other != rows => {
                return Err(AdapterError::Incompatible {
                    reason: format!("tensor {} has rows for {rows} tokens, {name} for {other}", tensor.name),
                });
            }
            _ => first = Some((rows, &tensor.name)),
        }
    }
    let vocab_size = first.map_or_else(
        || {
            let token_ids = resolution.token_rows.iter().flat_map(|rows| &rows.token_ids);
            token_ids.map(|id| *id as usize + 1).fold(decoder.vocab_size, usize::max)
        },
        |(rows, _)| rows,
    );
    if vocab_size > decoder.vocab_size + MAX_ADDED_TOKENS {
        return Err(AdapterError::Incompatible {
            reason: format!(
                "tokens: expected at most {MAX_ADDED_TOKENS} more than the base model's {}, got {vocab_size}",
                decoder.vocab_size
            ),
        });
    }
    Ok(vocab_size)
}

/// Input and output width of a module.
pub fn module_shape(decoder: &DecoderConfig, id: ModuleId) -> (usize, usize) {
    let q_dim = decoder.num_heads * decoder.head_dim;
    let kv_dim = decoder.num_kv_heads * decoder.head_dim;
    let (hidden, intermediate) = (decoder.hidden_size, decoder.intermediate_size);
    match id {
        ModuleId::Layer { projection, .. } => match projection {
            Projection::Q => (hidden, q_dim),
            Projection::K | Projection::V => (hidden, kv_dim),
            Projection::O => (q_dim, hidden),
            Projection::Gate | Projection::Up => (hidden, intermediate),
            Projection::Down => (intermediate, hidden),
        },
        ModuleId::EmbedTokens => (decoder.vocab_size, hidden),
        ModuleId::LmHead => (hidden, decoder.vocab_size),
    }
}

/// What the files of an honest adapter hold at most, in f32.
fn max_weight_bytes(resolution: &Resolution, decoder: &DecoderConfig) -> u64 {
    let pairs = resolution.modules.iter().fold(0u64, |sum, module| {
        let (d_in, d_out) = module_shape(decoder, module.id);
        let pair = (d_in as u64 + d_out as u64).saturating_mul(u64::from(module.lora_rank));
        sum.saturating_add(pair)
    });
    // Of a resized vocabulary PEFT writes a saved module three times.
    let vocab_size = (decoder.vocab_size + MAX_ADDED_TOKENS) as u64;
    let embeddings = 6 * vocab_size * decoder.hidden_size as u64 + vocab_size * u64::from(resolution.max_lora_rank());
    let vectors = 16 * decoder.num_layers as u64 * (decoder.hidden_size as u64 + decoder.intermediate_size as u64) + 4 * decoder.vocab_size as u64;
    pairs
        .saturating_add(embeddings)
        .saturating_add(vectors)
        .saturating_mul(4)
        .saturating_add(MAX_HEADER_BYTES)
}

fn has_base_bias(decoder: &DecoderConfig, id: ModuleId) -> bool {
    match id {
        ModuleId::Layer { projection, .. } => match projection {
            Projection::Q | Projection::K | Projection::V => decoder.qkv_bias,
            Projection::O => decoder.o_bias,
            Projection::Gate | Projection::Up | Projection::Down => decoder.mlp_bias,
        },
        ModuleId::EmbedTokens | ModuleId::LmHead => false,
    }
}

/// A run of bytes of the blob and where they come from.
struct Piece<'a> {
    offset: usize,
    bytes: usize,
    source: Source<'a>,
}

enum Source<'a> {
    /// Values in the file's order.
    Copy(Tensor<'a>),
    /// `[rows, columns]` in the file, `[columns, rows]` in the blob.
    Transpose(Tensor<'a>, usize, usize),
    /// Worked out at load; always f32.
    Values(Vec<f32>),
    /// Rows from several places, finite in the blob's dtype.
    Rows(Vec<f32>),
}

struct Loader<'a> {
    /// The base model, with the adapter's vocabulary.
    decoder: &'a DecoderConfig,
    base_vocab_size: usize,
    limits: &'a LoraLimits,
    config: &'a PeftConfig,
    /// Those not yet used.
    tensors: BTreeMap<(ModuleId, Role), Tensor<'a>>,
    /// The weights beneath the pairs on embedding and head, where the vocabulary is resized.
    resized: BTreeMap<ModuleId, Tensor<'a>>,
    report: CoverageReport,
    /// Ascending by offset.
    pieces: Vec<Piece<'a>>,
    blob_bytes: usize,
    /// Opened when first needed.
    base: Option<Box<dyn BaseWeights>>,
}

/// The tensors of one pair and where they come from in the file.
struct Pair<'a> {
    a: Source<'a>,
    b_t: Source<'a>,
}

/// Embedding and head as they are planned: the embedding comes first.
#[derive(Default)]
struct Embeddings<'a> {
    /// With its place in the blob.
    whole: Vec<(ModuleId, Tensor<'a>, usize)>,
    /// With their values.
    rows: Vec<(TokenRows, Vec<f32>)>,
    /// What `rows` has of `trainable_token_indices`.
    trained: Vec<(ResolvedRows, Tensor<'a>)>,
}

/// `[d_out]` each; see [`HostAdapter`] for the formula.
struct OutputTerms {
    scale: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

impl<'a> Loader<'a> {
    fn take(&mut self, id: ModuleId, role: Role, form: &str, shape: &[usize]) -> Result<Tensor<'a>, AdapterError> {
        let tensor = self.tensors.remove(&(id, role)).ok_or_else(|| {
            bad(
                WEIGHTS_FILE,
                format!(
                    "tensor base_model.model.{}.{form} is missing, adapter_config.json asks for it",
                    module_path(id)
                ),
            )
        })?;
        tensor.check(shape)?;
        Ok(tensor)
    }

    fn push(&mut self, bytes: usize, source: Source<'a>) -> usize {
        let offset = self.blob_bytes.next_multiple_of(64);
        self.blob_bytes = offset + bytes;
        self.pieces.push(Piece { offset, bytes, source });
        offset
    }

    fn element_bytes(&self) -> usize {
        self.limits.dtype.size_bytes()
    }

    /// Whole weights and rows of them: those of `modules_to_save`, of `trainable_token_indices` and of a resized vocabulary; and copies of
    /// the base's own, which must equal them.
    fn plan_embeddings(&mut self, resolution: &Resolution) -> Result<Embeddings<'a>, AdapterError> {
        let shape = [self.decoder.vocab_size, self.decoder.hidden_size];
        if !resolution.saved.is_empty() && !self.limits.features.replaced_weights {
            return Err(AdapterError::Unsupported {
                key: "modules_to_save".into(),
                reason: format!("it holds `{}`, this backend does not replace weights", module_path(resolution.saved[0])),
            });
        }
        let is_resized = self.decoder.vocab_size != self.base_vocab_size;
        let mut weights: BTreeMap<ModuleId, Tensor<'a>> = BTreeMap::new();
        for &id in &resolution.saved {
            let tensor = self.take(id, Role::Weight, "weight", &shape)?;
            self.report.replaced_modules.push(module_path(id));
            if resolution.saved_head_is_embedding {
                self.report.replaced_modules.push(module_path(ModuleId::LmHead));
                if let Some(head) = self.tensors.remove(&(ModuleId::LmHead, Role::Weight)) {
                    head.check(&shape)?;
                    if head.to_f32()? != tensor.to_f32()? {
                        return Err(AdapterError::Unsupported {
                            key: "ensure_weight_tying".into(),
                            reason: format!("tensor {} differs from {}", head.name, tensor.name),
                        });
                    }
                }
            }
            if resolution.saved_head_is_embedding {
                weights.insert(ModuleId::LmHead, tensor.clone());
            }
            weights.insert(id, tensor);
        }
        for id in [ModuleId::EmbedTokens, ModuleId::LmHead] {
            if let Some(tensor) = self.tensors.remove(&(id, Role::Weight)) {
                tensor.check(&shape)?;
                if is_resized {
                    weights.insert(id, tensor);
                } else {
                    self.check_base_copy(id, &tensor)?;
                }
            }
        }
        if is_resized {
            if self.decoder.tie_word_embeddings && !weights.contains_key(&ModuleId::LmHead) {
                // A tied head is the embedding, or what that was before it was trained.
                let original = self.tensors.remove(&(ModuleId::EmbedTokens, Role::OriginalWeight));
                let is_saved = resolution.saved.contains(&ModuleId::EmbedTokens);
                let tied = if is_saved {
                    original
                } else {
                    weights.get(&ModuleId::EmbedTokens).cloned()
                };
                if let Some(tensor) = tied {
                    tensor.check(&shape)?;
                    weights.insert(ModuleId::LmHead, tensor);
                }
            }
            self.resized = weights.clone();
        }
        for id in [ModuleId::EmbedTokens, ModuleId::LmHead] {
            // What a trained module was before.
            let is_saved = resolution.saved.contains(&id) || resolution.saved_head_is_embedding;
            if let Some(original) = is_saved.then(|| self.tensors.remove(&(id, Role::OriginalWeight))).flatten() {
                self.report.tensors_without_effect.push(original.name);
            }
        }
        let mut planned = Embeddings::default();
        for id in [ModuleId::EmbedTokens, ModuleId::LmHead] {
            let trained = self.take_token_rows(id, resolution, planned.trained.first())?;
            self.plan_embedding(id, weights.remove(&id), trained, &mut planned)?;
        }
        Ok(planned)
    }

    /// The rows of `trainable_token_indices` for a module. `embedding` are those of the embedding, when the head's turn has come: a tied
    /// head has no others, and what a file holds for it must be the same.
    fn take_token_rows(
        &mut self,
        id: ModuleId,
        resolution: &Resolution,
        embedding: Option<&(ResolvedRows, Tensor<'a>)>,
    ) -> Result<Option<(ResolvedRows, Tensor<'a>)>, AdapterError> {
        let Some(rows) = resolution.token_rows.iter().find(|rows| rows.id == id) else {
            return Ok(None);
        };
        if let Some(token) = rows.token_ids.iter().find(|token| **token as usize >= self.decoder.vocab_size) {
            return Err(AdapterError::Incompatible {
                reason: format!(
                    "`trainable_token_indices`: token {token} of `{}`, there are {}",
                    module_path(id),
                    self.decoder.vocab_size
                ),
            });
        }
        let shape = [rows.token_ids.len(), self.decoder.hidden_size];
        let form = "token_adapter.trainable_tokens_delta";
        if !rows.tied_to_embedding {
            return Ok(Some((rows.clone(), self.take(id, Role::TokenRows, form, &shape)?)));
        }
        let (_, tensor) = embedding.ok_or_else(|| AdapterError::Internal {
            reason: "a head is tied to rows of an embedding that has none".into(),
        })?;
        if let Some(own) = self.tensors.remove(&(id, Role::TokenRows)) {
            own.check(&shape)?;
            if own.to_f32()? != tensor.to_f32()? {
                let reason = format!("tensor {} differs from {}, to which it is tied", own.name, tensor.name);
                return Err(unsupported("trainable_token_indices", reason));
            }
            self.report.tensors_without_effect.push(own.name);
        }
        Ok(Some((rows.clone(), tensor.clone())))
    }

    /// Lays out what an adapter brings of one module: all of it, or the rows that the base model does not have. `trained` rows are in place
    /// of those of `weight`.
    fn plan_embedding(
        &mut self,
        id: ModuleId,
        weight: Option<Tensor<'a>>,
        trained: Option<(ResolvedRows, Tensor<'a>)>,
        planned: &mut Embeddings<'a>,
    ) -> Result<(), AdapterError> {
        let (vocab_size, hidden) = (self.decoder.vocab_size, self.decoder.hidden_size);
        let mut rows: BTreeMap<u32, (&Tensor<'a>, usize)> = BTreeMap::new();
        let mut whole = None;
        if let Some(tensor) = &weight {
            match self.rows_beside_base(id, tensor)? {
                Some(own) => rows.extend(own.into_iter().map(|row| (row, (tensor, row as usize)))),
                None => whole = Some(tensor),
            }
        }
        if let Some((resolved, tensor)) = &trained {
            let of_tensor = resolved.token_ids.iter().enumerate();
            rows.extend(of_tensor.map(|(row, token)| (*token, (tensor, row))));
        }
        let num_added = vocab_size.saturating_sub(self.base_vocab_size);
        if whole.is_none() && rows.range(self.base_vocab_size as u32..).count() < num_added {
            return Err(unsupported(
                "save_embedding_layers",
                format!(
                    "the adapter has {vocab_size} tokens, the base model {}, and the files have no rows of `{}` for the others: save it with \
                     `save_embedding_layers=True`",
                    self.base_vocab_size,
                    module_path(id)
                ),
            ));
        }
        if let Some(tensor) = whole {
            let same = planned.whole.iter().find(|(_, other, _)| {
                let is_same = |a: &TensorView<'_>, b: &TensorView<'_>| a.dtype() == b.dtype() && a.data() == b.data();
                is_same(&other.view, &tensor.view)
            });
            let offset_bytes = match same {
                Some((_, _, offset)) => *offset,
                None => self.push(vocab_size * hidden * self.element_bytes(), Source::Copy(tensor.clone())),
            };
            planned.whole.push((id, tensor.clone(), offset_bytes));
            let path = module_path(id);
            if !self.report.replaced_modules.contains(&path) {
                self.report.replaced_modules.push(path);
            }
        }
        if !rows.is_empty() {
            let mut values = vec![0.0; rows.len() * hidden];
            for ((tensor, row), out) in rows.values().zip(values.chunks_exact_mut(hidden)) {
                tensor.read_row(*row, out);
                let is_usable = |value: &f32| match self.limits.dtype {
                    PackedDtype::F32 => value.is_finite(),
                    PackedDtype::Bf16 => bf16::from_f32(*value).is_finite(),
                };
                if let Some(column) = out.iter().position(|value| !is_usable(value)) {
                    return Err(tensor.not_finite(row * hidden + column, out[column]));
                }
            }
            self.report.token_rows.insert(module_path(id), rows.len());
            let token_ids: Vec<u32> = rows.keys().copied().collect();
            let same = planned
                .rows
                .iter()
                .find(|(other, others)| other.token_ids == token_ids && *others == values);
            let offset_bytes = match same {
                Some((other, _)) => other.offset_bytes,
                None => self.push(values.len() * self.element_bytes(), Source::Rows(values.clone())),
            };
            let own = TokenRows { id, token_ids, offset_bytes };
            planned.rows.push((own, values));
        }
        planned.trained.extend(trained);
        Ok(())
    }

    /// The rows of a weight that the base model's has not, where that is few enough to be worth it; `None`: take it whole. After
    /// `resize_token_embeddings` the others are copies, and there may be gigabytes of them.
    fn rows_beside_base(&mut self, id: ModuleId, tensor: &Tensor<'a>) -> Result<Option<Vec<u32>>, AdapterError> {
        /// Of a weight's rows so many at most are kept one by one.
        const WORTH_IT: f64 = 0.25;
        if self.limits.base.is_none() || !self.limits.features.own_tokens {
            return Ok(None);
        }
        let (vocab_size, hidden, base_vocab_size) = (self.decoder.vocab_size, self.decoder.hidden_size, self.base_vocab_size);
        let most = (WORTH_IT * vocab_size as f64) as usize;
        let base = self.base()?;
        let (mut own, mut of_base) = (vec![0.0; hidden], vec![0.0; hidden]);
        let mut rows = Vec::new();
        for row in 0..vocab_size {
            let is_same = row < base_vocab_size && {
                tensor.read_row(row, &mut own);
                base.read_row(id, row, &mut of_base);
                own == of_base
            };
            if !is_same {
                rows.push(narrow(row)?);
            }
            if rows.len() > most {
                return Ok(None);
            }
        }
        Ok(Some(rows))
    }

    /// PEFT saves the base's embedding beside a pair on it, and loads it back over the base's.
    fn check_base_copy(&mut self, id: ModuleId, tensor: &Tensor<'a>) -> Result<(), AdapterError> {
        if self.limits.base.is_none() {
            self.report
                .tensors_without_effect
                .push(format!("{}: taken to equal the base model's, not compared", tensor.name));
            return Ok(());
        }
        let hidden = self.decoder.hidden_size;
        let values = tensor.to_f32()?;
        let mut row = vec![0.0; hidden];
        let base = self.base()?;
        let mut is_rounded = false;
        for (index, saved) in values.chunks_exact(hidden).enumerate() {
            base.read_row(id, index, &mut row);
            // A copy saved in another dtype is the rounded one.
            let rounded = |value: f32| match tensor.view.dtype() {
                Dtype::F16 => half::f16::from_f32(value).to_f32(),
                Dtype::BF16 => bf16::from_f32(value).to_f32(),
                _ => value,
            };
            is_rounded |= saved != row;
            if let Some(column) = (0..hidden).find(|&column| saved[column] != row[column] && saved[column] != rounded(row[column])) {
                return Err(AdapterError::Incompatible {
                    reason: format!(
                        "tensor {} is not a copy of the base model's (row {index}, column {column}: expected {}, got {}); a trained one \
                         must be named in `modules_to_save`",
                        tensor.name, row[column], saved[column]
                    ),
                });
            }
        }
        let note = if is_rounded {
            format!(
                "{}: the base model's rounded to {:?}; the base model's is used",
                tensor.name,
                tensor.view.dtype()
            )
        } else {
            tensor.name.clone()
        };
        self.report.tensors_without_effect.push(note);
        Ok(())
    }

    /// Lays out every module's weights: per layer A of q, k, v, then their Bᵀ, then o, then A of gate and up, and so on.
    fn plan_modules(&mut self, resolution: &Resolution) -> Result<Vec<PackedModule>, AdapterError> {
        self.refuse_output_terms(resolution)?;
        let mut packed = Vec::new();
        let mut rest = resolution.modules.as_slice();
        while let Some(first) = rest.first() {
            let group_len = rest.iter().take_while(|module| group(module.id) == group(first.id)).count();
            let (members, after) = rest.split_at(group_len);
            rest = after;
            let pairs = members.iter().map(|module| self.take_pair(module)).collect::<Result<Vec<_>, _>>()?;
            let mut outputs = Vec::new();
            for (module, pair) in members.iter().zip(&pairs) {
                outputs.push(self.output_terms(module, pair)?);
            }
            let (a_sources, b_sources): (Vec<_>, Vec<_>) = pairs.into_iter().map(|pair| (pair.a, pair.b_t)).unzip();
            let widths: Vec<(usize, usize)> = members.iter().map(|module| module_shape(self.decoder, module.id)).collect();
            let elements = self.element_bytes();
            let mut a_offsets = Vec::new();
            for ((module, source), (d_in, _)) in members.iter().zip(a_sources).zip(&widths) {
                a_offsets.push(self.push(module.lora_rank as usize * d_in * elements, source));
            }
            let mut b_offsets = Vec::new();
            for ((module, source), (_, d_out)) in members.iter().zip(b_sources).zip(&widths) {
                b_offsets.push(self.push(module.lora_rank as usize * d_out * elements, source));
            }
            for (index, (module, OutputTerms { scale, bias })) in members.iter().zip(outputs).enumerate() {
                let (d_in, d_out) = widths[index];
                packed.push(PackedModule {
                    id: module.id,
                    lora_rank: module.lora_rank,
                    d_in: narrow(d_in)?,
                    d_out: narrow(d_out)?,
                    scaling: module.scaling as f32,
                    a_offset_bytes: a_offsets[index],
                    b_t_offset_bytes: b_offsets[index],
                    output_scale_offset_bytes: scale.map(|values| self.push(4 * d_out, Source::Values(values))),
                    output_bias_offset_bytes: bias.map(|values| self.push(4 * d_out, Source::Values(values))),
                });
                self.report.modules.push(ModuleCoverage {
                    module: module_path(module.id),
                    lora_rank: module.lora_rank,
                    lora_alpha: module.lora_alpha as f32,
                    scaling: module.scaling as f32,
                });
            }
        }
        self.plan_bare_biases(resolution, &mut packed)?;
        packed.sort_by_key(|module| module.id);
        Ok(packed)
    }

    fn take_pair(&mut self, module: &ResolvedModule) -> Result<Pair<'a>, AdapterError> {
        let (d_in, d_out) = module_shape(self.decoder, module.id);
        let rank = module.lora_rank as usize;
        if !(module.scaling as f32).is_finite() {
            return Err(AdapterError::Incompatible {
                reason: format!("`{}`: the scaling {} is not a finite f32", module_path(module.id), module.scaling),
            });
        }
        if module.tied_to_embedding {
            return self.take_tied_pair(module, d_in, d_out);
        }
        if module.id == ModuleId::EmbedTokens {
            let a = self.take(module.id, Role::A, "lora_embedding_A", &[rank, d_in])?;
            let b = self.take(module.id, Role::B, "lora_embedding_B", &[d_out, rank])?;
            return Ok(Pair {
                a: Source::Transpose(a, rank, d_in),
                b_t: Source::Transpose(b, d_out, rank),
            });
        }
        let a = self.take(module.id, Role::A, "lora_A.weight", &[rank, d_in])?;
        let b = self.take(module.id, Role::B, "lora_B.weight", &[d_out, rank])?;
        Ok(Pair {
            a: Source::Copy(a),
            b_t: Source::Transpose(b, d_out, rank),
        })
    }

    /// The head's pair under `ensure_weight_tying`: A is the embedding's Bᵀ, B its Aᵀ. The embedding comes before the head in order,
    /// so its pair is planned already; a copy in the file must be the same.
    fn take_tied_pair(&mut self, module: &ResolvedModule, d_in: usize, d_out: usize) -> Result<Pair<'a>, AdapterError> {
        let rank = module.lora_rank as usize;
        let mut sources = self.pieces.iter().rev().filter_map(|piece| match &piece.source {
            Source::Transpose(tensor, rows, columns) if tensor.name.contains("lora_embedding_") => Some((tensor.clone(), *rows, *columns)),
            _ => None,
        });
        // In the order in which they were pushed: A, then B.
        let (Some((b, ..)), Some((a, ..))) = (sources.next(), sources.next()) else {
            return Err(AdapterError::Internal {
                reason: "the embedding's pair was not planned before the head's".into(),
            });
        };
        drop(sources);
        for (role, own, of_embedding, rows, columns) in [(Role::A, "lora_A", &b, d_in, rank), (Role::B, "lora_B", &a, rank, d_out)] {
            let Some(tensor) = self.tensors.remove(&(module.id, role)) else {
                continue;
            };
            tensor.check(&[columns, rows])?;
            let (values, expected) = (tensor.to_f32()?, of_embedding.to_f32()?);
            let differs = (0..rows).any(|row| (0..columns).any(|column| expected[row * columns + column] != values[column * rows + row]));
            if differs {
                return Err(AdapterError::Unsupported {
                    key: "ensure_weight_tying".into(),
                    reason: format!("{own} of the head ({}) is not the transposed {}", tensor.name, of_embedding.name),
                });
            }
        }
        Ok(Pair {
            a: Source::Transpose(b, d_in, rank),
            b_t: Source::Copy(a),
        })
    }

    fn trained_biases(&self, resolution: &Resolution) -> Vec<ModuleId> {
        match self.config.bias {
            BiasMode::None => Vec::new(),
            BiasMode::LoraOnly => resolution
                .modules
                .iter()
                .map(|module| module.id)
                .filter(|&id| has_base_bias(self.decoder, id))
                .collect(),
            BiasMode::All => (0..self.decoder.num_layers as u16)
                .flat_map(|layer| Projection::ALL.map(|projection| ModuleId::Layer { layer, projection }))
                .filter(|&id| has_base_bias(self.decoder, id))
                .collect(),
        }
    }

    fn refuse_output_terms(&mut self, resolution: &Resolution) -> Result<(), AdapterError> {
        let trains_bias = !self.trained_biases(resolution).is_empty();
        if self.config.bias != BiasMode::None && !trains_bias {
            self.report.keys_without_effect.push("bias".into());
        }
        if self.config.lora_bias && resolution.modules.iter().any(|module| module.id == ModuleId::EmbedTokens) {
            return Err(AdapterError::Unsupported {
                key: "lora_bias".into(),
                reason: "PEFT refuses it on embeddings".into(),
            });
        }
        for (key, is_on, needs_base) in [
            ("use_dora", self.config.use_dora, true),
            ("bias", trains_bias, true),
            ("lora_bias", self.config.lora_bias, false),
        ] {
            let missing = if !self.limits.features.output_terms {
                "this backend does not apply it"
            } else if needs_base && self.limits.base.is_none() {
                "the base model's weights are needed to apply it"
            } else {
                continue;
            };
            if is_on {
                return Err(AdapterError::Unsupported {
                    key: key.into(),
                    reason: missing.into(),
                });
            }
        }
        Ok(())
    }

    /// Scale and bias on a module's output; see [`HostAdapter`] for the formula.
    fn output_terms(&mut self, module: &ResolvedModule, pair: &Pair<'a>) -> Result<OutputTerms, AdapterError> {
        let id = module.id;
        let (_, d_out) = module_shape(self.decoder, id);
        let scale = if self.config.use_dora {
            let magnitude = self.take(id, Role::Magnitude, "lora_magnitude_vector", &[d_out])?;
            Some(self.dora_scale(module, pair, &magnitude)?)
        } else {
            None
        };
        let mut bias = None;
        if has_base_bias(self.decoder, id) && (scale.is_some() || self.config.bias != BiasMode::None) {
            let old = self.base_bias(id, d_out)?;
            let new = if self.config.bias == BiasMode::None {
                old.clone()
            } else {
                self.take(id, Role::Bias, "base_layer.bias", &[d_out])?.to_f32()?
            };
            // DoRA scales the product alone, and the base's output that is scaled here has its bias in it.
            let scale_of = |index: usize| scale.as_ref().map_or(1.0, |scale| scale[index]);
            bias = Some((0..d_out).map(|index| new[index] - scale_of(index) * old[index]).collect::<Vec<f32>>());
        }
        if self.config.lora_bias {
            let own = self.take(id, Role::BBias, "lora_B.bias", &[d_out])?.to_f32()?;
            let scaling = module.scaling as f32;
            let sum = bias.get_or_insert_with(|| vec![0.0; d_out]);
            sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += scaling * own);
        }
        Ok(OutputTerms { scale, bias })
    }

    fn base(&mut self) -> Result<&dyn BaseWeights, AdapterError> {
        if self.base.is_none() {
            let open = self.limits.base.as_ref().ok_or_else(|| AdapterError::Internal {
                reason: "output terms were planned without the base model's weights".into(),
            })?;
            self.base = Some(open()?);
        }
        Ok(self.base.as_deref().expect("opened above"))
    }

    fn base_bias(&mut self, id: ModuleId, d_out: usize) -> Result<Vec<f32>, AdapterError> {
        let bias = self.base()?.bias(id).filter(|bias| bias.len() == d_out);
        bias.ok_or_else(|| AdapterError::Internal {
            reason: format!("the base model's bias of `{}` can't be read", module_path(id)),
        })
    }

    /// DoRA's output scale `m / ‖W + scaling·B·A‖` (arXiv:2402.09353, eq. 5), the norm over each output's row. An embedding's norm is
    /// over the vocabulary, one per hidden column, as PEFT has it.
    fn dora_scale(&mut self, module: &ResolvedModule, pair: &Pair<'a>, magnitude: &Tensor<'a>) -> Result<Vec<f32>, AdapterError> {
        let (d_in, d_out) = module_shape(self.decoder, module.id);
        let rank = module.lora_rank as usize;
        let scaling = module.scaling as f32;
        let threads = self.limits.pack_threads;
        let resized = self.resized.get(&module.id).cloned();
        let base = self.base()?;
        let read_row = |row: usize, out: &mut [f32]| match &resized {
            Some(tensor) => tensor.read_row(row, out),
            None => base.read_row(module.id, row, out),
        };
        let magnitude = magnitude.to_f32()?;
        let a = source_values(&pair.a)?;
        let b_t = source_values(&pair.b_t)?;
        let norms = if module.id == ModuleId::EmbedTokens {
            let mut sums = vec![0.0f64; d_out];
            let mut row = vec![0.0; d_out];
            for token in 0..d_in {
                read_row(token, &mut row);
                for k in 0..rank {
                    axpy(scaling * a[token * rank + k], &b_t[k * d_out..(k + 1) * d_out], &mut row);
                }
                sums.iter_mut().zip(&row).for_each(|(sum, value)| *sum += f64::from(*value).powi(2));
            }
            sums.into_iter().map(|sum| sum.sqrt() as f32).collect()
        } else {
            row_norms(threads, d_out, d_in, &|output, row| {
                read_row(output, row);
                for k in 0..rank {
                    axpy(scaling * b_t[k * d_out + output], &a[k * d_in..(k + 1) * d_in], row);
                }
            })
        };
        let scales: Vec<f32> = magnitude.iter().zip(&norms).map(|(magnitude, norm)| magnitude / norm).collect();
        match scales.iter().position(|scale| !scale.is_finite()) {
            None => Ok(scales),
            Some(index) => Err(AdapterError::Incompatible {
                reason: format!(
                    "`{}`: DoRA's scale of output {index} is {} / {}",
                    module_path(module.id),
                    magnitude[index],
                    norms[index]
                ),
            }),
        }
    }

    /// Trained biases of modules without a pair (`bias = "all"`).
    fn plan_bare_biases(&mut self, resolution: &Resolution, packed: &mut Vec<PackedModule>) -> Result<(), AdapterError> {
        let with_pair: BTreeSet<ModuleId> = resolution.modules.iter().map(|module| module.id).collect();
        for id in self.trained_biases(resolution) {
            if with_pair.contains(&id) {
                continue;
            }
            let (d_in, d_out) = module_shape(self.decoder, id);
            let new = self.take(id, Role::Bias, "bias", &[d_out])?.to_f32()?;
            let old = self.base_bias(id, d_out)?;
            let values = new.iter().zip(&old).map(|(new, old)| new - old).collect();
            let offset = self.push(4 * d_out, Source::Values(values));
            packed.push(PackedModule {
                id,
                lora_rank: 0,
                d_in: narrow(d_in)?,
                d_out: narrow(d_out)?,
                scaling: 0.0,
                a_offset_bytes: 0,
                b_t_offset_bytes: 0,
                output_scale_offset_bytes: None,
                output_bias_offset_bytes: Some(offset),
            });
        }
        Ok(())
    }

    /// Whatever was not asked for by the configuration.
    fn check_leftovers(&self) -> Result<(), AdapterError> {
        let Some(((id, role), tensor)) = self.tensors.first_key_value() else {
            return Ok(());
        };
        let count = self.tensors.len();
        let others = if count > 1 {
            format!(" (and {} more)", count - 1)
        } else {
            String::new()
        };
        let why = match role {
            Role::A | Role::B => format!("adapter_config.json puts no pair on `{}`", module_path(*id)),
            Role::BBias => "`lora_bias` is not set".into(),
            Role::Magnitude => "`use_dora` is not set".into(),
            Role::Weight | Role::SavedWeight | Role::OriginalWeight => format!("`{}` is not in `modules_to_save`", module_path(*id)),
            Role::TokenRows => format!("`{}` is not in `trainable_token_indices`", module_path(*id)),
            Role::Bias => format!("the bias of `{}` is not trained by `bias`", module_path(*id)),
        };
        Err(bad(WEIGHTS_FILE, format!("tensor {} would not be used: {why}{others}", tensor.name)))
    }

    fn packed_bytes(&self) -> usize {
        self.blob_bytes.next_multiple_of(64)
    }

    fn check_packed_bytes(&self) -> Result<(), AdapterError> {
        match self.limits.max_packed_bytes {
            Some(max) if self.packed_bytes() > max => Err(AdapterError::Incompatible {
                reason: format!(
                    "bytes of its weights: expected at most {max}, which is what the device has for adapters, got {} (--mem-fraction-static)",
                    self.packed_bytes()
                ),
            }),
            _ => Ok(()),
        }
    }

    fn finish(
        mut self,
        resolution: &Resolution,
        modules: Vec<PackedModule>,
        embeddings: Embeddings<'_>,
    ) -> Result<(HostAdapter, CoverageReport), AdapterError> {
        let whole = embeddings.whole.iter();
        let replaced: Vec<ReplacedWeight> = whole.map(|&(id, _, offset_bytes)| ReplacedWeight { id, offset_bytes }).collect();
        let token_rows: Vec<TokenRows> = embeddings.rows.into_iter().map(|(rows, _)| rows).collect();
        let resized_vocab = (self.decoder.vocab_size != self.base_vocab_size)
            .then(|| narrow(self.decoder.vocab_size))
            .transpose()?;
        let own_tokens = (&token_rows[..], resized_vocab);
        let mut blob = self.limits.new_blob(self.packed_bytes());
        let digests = fill(&self.pieces, blob.as_bytes_mut(), self.limits.dtype, self.limits.pack_threads)?;
        blob.filled();
        let version = version(&modules, &replaced, own_tokens, self.limits.dtype, &self.pieces, &digests);
        let mut layers: Vec<u16> = modules
            .iter()
            .filter_map(|module| match module.id {
                ModuleId::Layer { layer, .. } => Some(layer),
                _ => None,
            })
            .collect();
        layers.dedup();
        self.report.layers = layers;
        let max_lora_rank = resolution.modules.iter().map(|module| module.lora_rank).max().unwrap_or(0);
        let adapter = HostAdapter {
            version,
            dtype: self.limits.dtype,
            modules,
            blob: Arc::new(blob),
            max_lora_rank,
            replaced,
            token_rows,
            resized_vocab,
            companion: None,
        };
        Ok((adapter, self.report))
    }
}

/// The first of the modules whose A's are neighbours in the blob.
pub(super) fn group(id: ModuleId) -> ModuleId {
    match id {
        ModuleId::Layer { layer, projection } => {
            let projection = match projection {
                Projection::Q | Projection::K | Projection::V => Projection::Q,
                Projection::Gate | Projection::Up => Projection::Gate,
                Projection::O | Projection::Down => projection,
            };
            ModuleId::Layer { layer, projection }
        }
        ModuleId::EmbedTokens | ModuleId::LmHead => id,
    }
}

fn narrow(width: usize) -> Result<u32, AdapterError> {
    u32::try_from(width).map_err(|_| AdapterError::Internal {
        reason: format!("a width of {width}"),
    })
}

fn axpy(factor: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

/// The values of a source, in the blob's order.
fn source_values(source: &Source<'_>) -> Result<Vec<f32>, AdapterError> {
    Ok(match source {
        Source::Copy(tensor) => tensor.to_f32()?,
        Source::Values(values) | Source::Rows(values) => values.clone(),
        Source::Transpose(tensor, rows, columns) => {
            let values = tensor.to_f32()?;
            let mut transposed = vec![0.0; values.len()];
            for row in 0..*rows {
                for column in 0..*columns {
                    transposed[column * rows + row] = values[row * columns + column];
                }
            }
            transposed
        }
    })
}

/// ‖row‖ of each of `rows` rows that `read_row` writes, on several threads.
fn row_norms(threads: usize, rows: usize, columns: usize, read_row: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Vec<f32> {
    let mut norms = vec![0.0f32; rows];
    let chunk = rows.div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        for (index, norms) in norms.chunks_mut(chunk).enumerate() {
            scope.spawn(move || {
                let mut row = vec![0.0f32; columns];
                for (offset, norm) in norms.iter_mut().enumerate() {
                    read_row(index * chunk + offset, &mut row);
                    let sum: f64 = row.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
                    *norm = sum.sqrt() as f32;
                }
            });
        }
    });
    norms
}

/// Writes every piece into the blob, and zeros between them, and gives the digest of each.
fn fill(pieces: &[Piece<'_>], blob: &mut [u8], dtype: PackedDtype, threads: usize) -> Result<Vec<[u8; 32]>, AdapterError> {
    let mut rest = blob;
    let mut at = 0;
    let mut jobs = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let (between, from) = rest.split_at_mut(piece.offset - at);
        between.fill(0);
        let (own, after) = from.split_at_mut(piece.bytes);
        at = piece.offset + piece.bytes;
        rest = after;
        jobs.push((piece, own));
    }
    rest.fill(0);
    // Small adapters aren't worth a thread; large ones are cut into runs of about equal bytes.
    const BYTES_WORTH_A_THREAD: usize = 4 << 20;
    let threads = threads.clamp(1, (at / BYTES_WORTH_A_THREAD).max(1));
    let bytes_per_thread = at.div_ceil(threads).max(1);
    let mut runs: Vec<Vec<(&Piece<'_>, &mut [u8])>> = Vec::new();
    let mut filled = usize::MAX;
    for job in jobs {
        if filled >= bytes_per_thread {
            runs.push(Vec::new());
            filled = 0;
        }
        filled += job.0.bytes;
        runs.last_mut().expect("a run was pushed above").push(job);
    }
    let run = |run: Vec<(&Piece<'_>, &mut [u8])>| -> Result<Vec<[u8; 32]>, AdapterError> {
        run.into_iter()
            .map(|(piece, bytes)| {
                write_source(&piece.source, bytes, dtype)?;
                Ok(blake3::hash(bytes).into())
            })
            .collect()
    };
    if runs.len() <= 1 {
        return runs.into_iter().next().map_or(Ok(Vec::new()), run);
    }
    let results: Vec<Result<Vec<[u8; 32]>, AdapterError>> = std::thread::scope(|scope| {
        let handles: Vec<_> = runs.into_iter().map(|jobs| scope.spawn(|| run(jobs))).collect();
        handles
            .into_iter()
            .map(|handle| {
                handle.join().unwrap_or_else(|_| {
                    Err(AdapterError::Internal {
                        reason: "packing panicked".into(),
                    })
                })
            })
            .collect()
    });
    let mut digests = Vec::with_capacity(pieces.len());
    for result in results {
        digests.extend(result?);
    }
    Ok(digests)
}

fn write_source(source: &Source<'_>, bytes: &mut [u8], dtype: PackedDtype) -> Result<(), AdapterError> {
    match (source, dtype) {
        (Source::Rows(values), PackedDtype::Bf16) => {
            let to: &mut [bf16] = bytemuck::cast_slice_mut(bytes);
            to.iter_mut().zip(values).for_each(|(to, value)| *to = bf16::from_f32(*value));
            Ok(())
        }
        (Source::Values(values), _) | (Source::Rows(values), PackedDtype::F32) => {
            bytemuck::cast_slice_mut::<u8, f32>(bytes).copy_from_slice(values);
            Ok(())
        }
        (Source::Copy(tensor) | Source::Transpose(tensor, ..), PackedDtype::F32) => {
            write_tensor::<f32>(tensor, transpose_shape(source), bytemuck::cast_slice_mut(bytes))
        }
        (Source::Copy(tensor) | Source::Transpose(tensor, ..), PackedDtype::Bf16) => {
            write_tensor::<bf16>(tensor, transpose_shape(source), bytemuck::cast_slice_mut(bytes))
        }
    }
}

fn transpose_shape(source: &Source<'_>) -> Option<(usize, usize)> {
    match source {
        Source::Transpose(_, rows, columns) => Some((*rows, *columns)),
        Source::Copy(_) | Source::Values(_) | Source::Rows(_) => None,
    }
}

/// An element of the blob.
pub(super) trait Packed: bytemuck::Pod {
    /// The same in a file.
    const STORED: Dtype;
    fn pack(value: f32) -> Self;
    fn unpack(self) -> f32;
    fn is_usable(self) -> bool;
}

impl Packed for f32 {
    const STORED: Dtype = Dtype::F32;
    fn pack(value: f32) -> Self {
        value
    }
    fn unpack(self) -> f32 {
        self
    }
    fn is_usable(self) -> bool {
        self.is_finite()
    }
}

impl Packed for bf16 {
    const STORED: Dtype = Dtype::BF16;
    fn pack(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn unpack(self) -> f32 {
        self.to_f32()
    }
    fn is_usable(self) -> bool {
        self.is_finite()
    }
}

fn write_tensor<P: Packed>(tensor: &Tensor<'_>, transpose: Option<(usize, usize)>, to: &mut [P]) -> Result<(), AdapterError> {
    match tensor.view.dtype() {
        Dtype::F32 => write_elements::<f32, P>(tensor, transpose, to),
        Dtype::F16 => write_elements::<half::f16, P>(tensor, transpose, to),
        _ => write_elements::<bf16, P>(tensor, transpose, to),
    }
}

fn write_elements<E: Element, P: Packed>(tensor: &Tensor<'_>, transpose: Option<(usize, usize)>, to: &mut [P]) -> Result<(), AdapterError> {
    let from = tensor.view.data();
    let is_stored = tensor.view.dtype() == P::STORED && cfg!(target_endian = "little");
    let usable = match (transpose, is_stored) {
        (None, true) => copy_elements(from, to),
        (None, false) => to.iter_mut().zip(from.chunks_exact(E::BYTES)).fold(true, |usable, (to, from)| {
            *to = P::pack(E::decode(from));
            usable & to.is_usable()
        }),
        (Some(shape), true) => transpose_elements::<E, P>(from, shape, to, bytemuck::pod_read_unaligned),
        (Some(shape), false) => transpose_elements::<E, P>(from, shape, to, |bytes| P::pack(E::decode(bytes))),
    };
    if usable {
        return Ok(());
    }
    // Rare: look again for the place, in the file's order.
    let mut elements = from.chunks_exact(E::BYTES).map(E::decode).enumerate();
    match elements.find(|(_, value)| !P::pack(*value).is_usable()) {
        Some((index, value)) => Err(tensor.not_finite(index, value)),
        None => Ok(()),
    }
}

/// The file's own bytes, looked at while they are in the cache: whether all are usable.
fn copy_elements<P: Packed>(from: &[u8], to: &mut [P]) -> bool {
    const ELEMENTS: usize = 4096;
    let parts = to.chunks_mut(ELEMENTS).zip(from.chunks(ELEMENTS * size_of::<P>()));
    parts.fold(true, |usable, (to, from)| {
        bytemuck::cast_slice_mut(to).copy_from_slice(from);
        to.iter().fold(usable, |usable, element| usable & element.is_usable())
    })
}

/// `[rows, columns]` elements as `[columns, rows]`, by tiles that registers hold: whether all are usable.
fn transpose_elements<E: Element, P: Packed>(from: &[u8], (rows, columns): (usize, usize), to: &mut [P], read: impl Fn(&[u8]) -> P) -> bool {
    const HEIGHT: usize = 16;
    const WIDTH: usize = 8;
    let mut usable = true;
    for row in (0..rows).step_by(HEIGHT) {
        for column in (0..columns).step_by(WIDTH) {
            let from = |y: usize| &from[((row + y) * columns + column) * E::BYTES..];
            let to = &mut to[column * rows + row..];
            let (height, width) = (HEIGHT.min(rows - row), WIDTH.min(columns - column));
            if (height, width) == (HEIGHT, WIDTH) {
                let tile: [[P; WIDTH]; HEIGHT] = std::array::from_fn(|y| {
                    let line = &from(y)[..WIDTH * E::BYTES];
                    std::array::from_fn(|x| read(&line[x * E::BYTES..][..E::BYTES]))
                });
                usable &= tile.as_flattened().iter().fold(true, |usable, element| usable & element.is_usable());
                for x in 0..WIDTH {
                    to[x * rows..][..HEIGHT].copy_from_slice(&tile.map(|line| line[x]));
                }
            } else {
                for y in 0..height {
                    for (x, bytes) in from(y).chunks_exact(E::BYTES).take(width).enumerate() {
                        let element = read(bytes);
                        usable &= element.is_usable();
                        to[x * rows + y] = element;
                    }
                }
            }
        }
    }
    usable
}

/// BLAKE3 over what the adapter does: shapes and scalings of its modules, and a digest of each run of packed weights. File names,
/// adapter names, tensor order, the file's dtype and keys without effect leave it as it is.
fn version(
    modules: &[PackedModule],
    replaced: &[ReplacedWeight],
    (token_rows, resized_vocab): (&[TokenRows], Option<u32>),
    dtype: PackedDtype,
    pieces: &[Piece<'_>],
    digests: &[[u8; 32]],
) -> VersionId {
    use std::fmt::Write;
    let by_offset: BTreeMap<usize, &[u8; 32]> = pieces.iter().map(|piece| piece.offset).zip(digests).collect();
    // The fixed part is hashed as text: unambiguous, and independent of how the structs lie in memory.
    let mut shapes = format!("polylora adapter 2, {} bytes an element\n", dtype.size_bytes());
    let mut offsets = Vec::new();
    for module in modules {
        let _ = writeln!(
            shapes,
            "{} {} {} {} {:08x}",
            module_path(module.id),
            module.lora_rank,
            module.d_in,
            module.d_out,
            module.scaling.to_bits()
        );
        let has_pair = module.lora_rank > 0;
        offsets.extend([
            has_pair.then_some(module.a_offset_bytes),
            has_pair.then_some(module.b_t_offset_bytes),
            module.output_scale_offset_bytes,
            module.output_bias_offset_bytes,
        ]);
    }
    for weight in replaced {
        let _ = writeln!(shapes, "{} replaced", module_path(weight.id));
        offsets.push(Some(weight.offset_bytes));
    }
    for rows in token_rows {
        let _ = writeln!(shapes, "{} rows {:?}", module_path(rows.id), rows.token_ids);
        offsets.push(Some(rows.offset_bytes));
    }
    if let Some(vocab_size) = resized_vocab {
        let _ = writeln!(shapes, "{vocab_size} tokens");
    }
    let mut hash = blake3::Hasher::new();
    hash.update(&(shapes.len() as u64).to_le_bytes());
    hash.update(shapes.as_bytes());
    for offset in offsets {
        match offset.and_then(|offset| by_offset.get(&offset)) {
            Some(digest) => hash.update(&digest[..]),
            None => hash.update(&[0; 32]),
        };
    }
    VersionId(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::adapter::{
        Companion, HostPart,
        tensors::INDEX_FILE,
        testing::{AdapterFiles, FileTensor, limits, source, tensor_name, tiny_decoder},
    };

    fn layer(layer: u16, projection: Projection) -> ModuleId {
        ModuleId::Layer { layer, projection }
    }

    #[test]
    fn packs_what_the_file_holds() {
        let decoder = tiny_decoder();
        let files = AdapterFiles::simple(&decoder, 1);
        let directory = files.write();
        let (adapter, report) = load_adapter(&source(&directory), &decoder, &limits()).unwrap();
        assert_eq!(adapter.modules.len(), 6);
        assert_eq!(report.layers, [0, 1, 2]);
        for module in &adapter.modules {
            assert_eq!((module.lora_rank, module.scaling), (2, 2.0));
            let a = files.tensors[&tensor_name(module.id, "lora_A.weight")].values();
            let b = files.tensors[&tensor_name(module.id, "lora_B.weight")].values();
            assert_eq!(adapter.a_f32(module), a);
            let (rank, d_out) = (module.lora_rank as usize, module.d_out as usize);
            for row in 0..d_out {
                for k in 0..rank {
                    assert_eq!(adapter.b_t_f32(module)[k * d_out + row], b[row * rank + k]);
                }
            }
            assert_eq!((module.a_offset_bytes % 64, module.b_t_offset_bytes % 64), (0, 0));
        }
        assert!(adapter.module(layer(1, Projection::V)).is_some());
        assert!(adapter.module(layer(1, Projection::K)).is_none());
    }

    #[test]
    fn refuses_a_pair_that_is_half_there() {
        let decoder = tiny_decoder();
        let mut files = AdapterFiles::new(&decoder, json!({"target_modules": ["up_proj"]}), 1);
        let name = tensor_name(layer(2, Projection::Up), "lora_B.weight");
        files.tensors.remove(&name).unwrap();
        let directory = files.write();
        let error = load_adapter(&source(&directory), &decoder, &limits()).unwrap_err();
        assert!(error.to_string().contains(&format!("{name} is missing")), "{error}");
    }

    #[test]
    fn version_is_the_contents() {
        let decoder = tiny_decoder();
        let version = |files: &AdapterFiles| load_adapter(&source(&files.write()), &decoder, &limits()).unwrap().0.version;
        let plain = AdapterFiles::simple(&decoder, 1);
        let mut half = plain.clone();
        for tensor in half.tensors.values_mut() {
            *tensor = tensor.cast(Dtype::BF16);
        }
        let mut renamed = plain.clone();
        renamed.tensors = renamed
            .tensors
            .into_iter()
            .map(|(name, tensor)| (name.replace(".weight", ".other.weight"), tensor))
            .collect();
        let same = version(&plain);
        assert_eq!(version(&half), same, "the file's dtype");
        assert_eq!(version(&renamed), same, "the adapter's name in the file");
        assert_eq!(version(&plain.clone().with("lora_dropout", json!(0.5))), same, "a key without effect");
        assert_ne!(version(&plain.clone().with("lora_alpha", json!(5))), same, "another scaling");
        assert_ne!(version(&AdapterFiles::simple(&decoder, 2)), same, "other weights");
        let mut swapped = plain.clone();
        let q = tensor_name(layer(0, Projection::Q), "lora_A.weight");
        let other = tensor_name(layer(1, Projection::Q), "lora_A.weight");
        let (first, second) = (swapped.tensors[&q].clone(), swapped.tensors[&other].clone());
        swapped.tensors.insert(q, second);
        swapped.tensors.insert(other, first);
        assert_ne!(version(&swapped), same, "the same tensors at other places");
    }

    /// Loads, and expects an error that contains every one of `words`.
    #[track_caller]
    fn check_refused(files: &AdapterFiles, decoder: &DecoderConfig, limits: &LoraLimits, words: &[&str]) {
        let directory = files.write();
        let error = load_adapter(&source(&directory), decoder, limits).expect_err("refused").to_string();
        for word in words {
            assert!(error.contains(word), "{error:?} does not contain {word:?}");
        }
    }

    #[test]
    fn every_odd_tensor_is_named() {
        let decoder = tiny_decoder();
        let plain = AdapterFiles::simple(&decoder, 1);
        let q_a = tensor_name(layer(0, Projection::Q), "lora_A.weight");
        let v_b = tensor_name(layer(2, Projection::V), "lora_B.weight");
        let check = |change: &dyn Fn(&mut AdapterFiles), words: &[&str]| {
            let mut files = plain.clone();
            change(&mut files);
            check_refused(&files, &decoder, &limits(), words);
        };
        let rename = |files: &mut AdapterFiles, to: &str| {
            let tensor = files.tensors[&q_a].clone();
            files.tensors.insert(to.to_owned(), tensor);
        };
        // Missing halves and whole pairs: PEFT would leave B at zero.
        check(&|files| drop(files.tensors.remove(&q_a)), &[&q_a, "is missing"]);
        check(&|files| drop(files.tensors.remove(&v_b)), &[&v_b, "is missing"]);
        check(
            &|files| files.tensors.retain(|name, _| !name.contains("v_proj")),
            &["layers.0.self_attn.v_proj.lora_A.weight is missing"],
        );
        check(&|files| files.tensors.clear(), &["is missing"]);
        // Tensors that nothing would use.
        check(
            &|files| rename(files, "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"),
            &["k_proj", "puts no pair on"],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"),
            &["layer 3, the base model has 3"],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight"),
            &["layers.00", "no module"],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"),
            &["no module", "qkv_proj"],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight"),
            &["no module", "mlp.q_proj"],
        );
        check(
            &|files| rename(files, "base_model.model.model.vision.layers.0.self_attn.q_proj.lora_A.weight"),
            &["no module"],
        );
        check(
            &|files| rename(files, "model.layers.0.self_attn.q_proj.lora_A.weight"),
            &["begins with base_model.model."],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.0.self_attn.q_proj.lora_E"),
            &["lora_E", "not a tensor that PEFT saves"],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
            &["not a tensor that PEFT saves"],
        );
        check(&|files| rename(files, "base_model.model."), &["not a tensor that PEFT saves"]);
        check(
            &|files| rename(files, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
            &["`use_dora` is not set"],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"),
            &["`lora_bias` is not set"],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"),
            &["is not trained by `bias`"],
        );
        check(
            &|files| rename(files, "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"),
            &["not in `modules_to_save`"],
        );
        check(
            &|files| rename(files, "base_model.model.model.embed_tokens.lora_A.weight"),
            &["takes lora_embedding_A"],
        );
        check(&|files| rename(files, "base_model.model.lm_head.lora_embedding_A"), &["takes lora_A"]);
        // One tensor twice, two adapters in one file.
        check(&|files| rename(files, &q_a.replace(".weight", ".default.weight")), &["are the same one"]);
        check(
            &|files| {
                for (from, to) in [(&q_a, "one"), (&v_b, "two")] {
                    let tensor = files.tensors.remove(from).unwrap();
                    files.tensors.insert(from.replace(".weight", &format!(".{to}.weight")), tensor);
                }
            },
            &["one file holds one adapter"],
        );
    }

    #[test]
    fn shapes_dtypes_and_values_are_checked() {
        let decoder = tiny_decoder();
        let plain = AdapterFiles::simple(&decoder, 1);
        let q_a = tensor_name(layer(0, Projection::Q), "lora_A.weight");
        let q_b = tensor_name(layer(0, Projection::Q), "lora_B.weight");
        let check = |change: &dyn Fn(&mut AdapterFiles), words: &[&str]| {
            let mut files = plain.clone();
            change(&mut files);
            check_refused(&files, &decoder, &limits(), words);
        };
        check(
            &|files| drop(files.tensors.insert(q_a.clone(), FileTensor::f32(&[2, 9], &[1.0; 18]))),
            &[&q_a, "expected shape [2, 8], got [2, 9]"],
        );
        check(
            &|files| drop(files.tensors.insert(q_a.clone(), FileTensor::f32(&[3, 8], &[1.0; 24]))),
            &[&q_a, "expected shape [2, 8], got [3, 8]"],
        );
        check(
            &|files| drop(files.tensors.insert(q_b.clone(), FileTensor::f32(&[2, 6], &[1.0; 12]))),
            &[&q_b, "expected shape [6, 2], got [2, 6]"],
        );
        check(
            &|files| drop(files.tensors.insert(q_a.clone(), FileTensor::f32(&[16], &[1.0; 16]))),
            &["expected shape [2, 8], got [16]"],
        );
        // What ZeRO-3 leaves when its shards were not gathered.
        check(
            &|files| drop(files.tensors.insert(q_a.clone(), FileTensor::f32(&[0], &[]))),
            &["expected shape [2, 8], got [0]"],
        );
        for (dtype, bytes) in [(Dtype::F64, 8), (Dtype::I8, 1), (Dtype::F8_E4M3, 1), (Dtype::I32, 4)] {
            let tensor = FileTensor {
                dtype,
                shape: vec![2, 8],
                bytes: vec![0; 16 * bytes],
            };
            check(
                &|files| drop(files.tensors.insert(q_a.clone(), tensor.clone())),
                &[&q_a, "expected dtype F32, F16 or BF16, got"],
            );
        }
        for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            for cast in [None, Some(Dtype::F16), Some(Dtype::BF16)] {
                let tensor = |shape: &[usize], at: usize| {
                    let mut values = vec![0.5; shape.iter().product()];
                    values[at] = value;
                    let tensor = FileTensor::f32(shape, &values);
                    cast.map_or(tensor.clone(), |dtype| tensor.cast(dtype))
                };
                check(
                    &|files| drop(files.tensors.insert(q_a.clone(), tensor(&[2, 8], 11))),
                    &[&q_a, "row 1, column 3", shown],
                );
                check(
                    &|files| drop(files.tensors.insert(q_b.clone(), tensor(&[6, 2], 11))),
                    &[&q_b, "row 5, column 1", shown],
                );
            }
        }
        // Finite in the file, but not in what it is packed to.
        let mut files = plain.clone();
        let mut values = vec![0.5; 16];
        values[4] = f32::MAX;
        files.tensors.insert(q_a.clone(), FileTensor::f32(&[2, 8], &values));
        assert!(load_adapter(&source(&files.write()), &decoder, &limits()).is_ok());
        check_refused(&files, &decoder, &LoraLimits::new(PackedDtype::Bf16), &[&q_a, "row 0, column 4"]);
        check_refused(&plain.clone().with("lora_alpha", json!(1e300)), &decoder, &limits(), &["scaling"]);
    }

    #[test]
    fn limits_of_the_server_are_kept() {
        let decoder = tiny_decoder();
        let files = AdapterFiles::new(
            &decoder,
            json!({"r": 2, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5}}),
            1,
        );
        let with = |rank: u32, names: &[&str]| LoraLimits {
            max_lora_rank: Some(rank),
            target_modules: Some(names.iter().map(|name| (*name).to_owned()).collect()),
            ..limits()
        };
        let all = ["q_proj", "down_proj"];
        load_adapter(&source(&files.write()), &decoder, &with(5, &all)).unwrap();
        check_refused(
            &files,
            &decoder,
            &with(4, &all),
            &["incompatible", "down_proj`: expected at most 4, got 5"],
        );
        check_refused(
            &files,
            &decoder,
            &with(5, &["q_proj"]),
            &["incompatible", "expected none but q_proj, got `down_proj`"],
        );
        // Its size is that of its own ranks.
        let bytes = load_adapter(&source(&files.write()), &decoder, &limits()).unwrap().0.bytes();
        let at_most = |max: usize| LoraLimits {
            max_packed_bytes: Some(max),
            ..limits()
        };
        load_adapter(&source(&files.write()), &decoder, &at_most(bytes)).unwrap();
        let expected = format!("expected at most {}", bytes - 1);
        check_refused(
            &files,
            &decoder,
            &at_most(bytes - 1),
            &["incompatible", &expected, &format!("got {bytes}")],
        );
    }

    #[test]
    fn files_that_are_missing_damaged_or_dangerous() {
        let decoder = tiny_decoder();
        let plain = AdapterFiles::simple(&decoder, 1);
        let load = |directory: &tempfile::TempDir| load_adapter(&source(directory), &decoder, &limits()).map(drop);
        #[track_caller]
        fn check(result: Result<(), AdapterError>, words: &[&str]) {
            let error = result.expect_err("refused").to_string();
            for word in words {
                assert!(error.contains(word), "{error:?} does not contain {word:?}");
            }
        }
        let weights = |directory: &tempfile::TempDir| directory.path().join("adapter_model.safetensors");

        check(load(&tempfile::TempDir::new().unwrap()), &["adapter_config.json: no such file"]);
        let directory = plain.write();
        std::fs::remove_file(weights(&directory)).unwrap();
        check(load(&directory), &["adapter_model.safetensors: no such file"]);
        std::fs::write(directory.path().join("adapter_model.bin"), b"\x80\x04").unwrap();
        check(load(&directory), &["adapter_model.bin: pickle files are not read"]);
        // A directory in place of a file.
        let directory = plain.write();
        std::fs::remove_file(weights(&directory)).unwrap();
        std::fs::create_dir(weights(&directory)).unwrap();
        assert!(load(&directory).is_err());

        // Cut off at every length, and grown.
        let directory = plain.write();
        let whole = std::fs::read(weights(&directory)).unwrap();
        for len in (0..whole.len()).step_by(7) {
            std::fs::write(weights(&directory), &whole[..len]).unwrap();
            check(load(&directory), &["adapter_model.safetensors: damaged"]);
        }
        let mut longer = whole.clone();
        longer.extend([0; 64]);
        std::fs::write(weights(&directory), &longer).unwrap();
        check(load(&directory), &["adapter_model.safetensors: damaged"]);
        // A header that says it is huge, and a file that is longer than any honest one.
        let mut header = whole.clone();
        header[..8].copy_from_slice(&(MAX_HEADER_BYTES + 1).to_le_bytes());
        std::fs::write(weights(&directory), &header).unwrap();
        check(load(&directory), &["a header of 16777217 bytes"]);
        std::fs::File::options()
            .write(true)
            .open(weights(&directory))
            .unwrap()
            .set_len(1 << 40)
            .unwrap();
        check(load(&directory), &["adapter_model.safetensors has 1099511627776 bytes, at most"]);
        std::fs::File::create(directory.path().join("adapter_config.json"))
            .unwrap()
            .set_len(1 << 40)
            .unwrap();
        check(load(&directory), &["adapter_config.json has 1099511627776 bytes, at most 1048576"]);
        // A rank that no file could have bounds nothing beyond what is set.
        let huge = plain.clone().with("r", json!(u32::MAX));
        check(load(&huge.write()), &["expected shape [4294967295, 8], got [2, 8]"]);
    }

    #[test]
    fn what_comes_with_an_adapter_is_part_of_its_version() {
        struct Files([u8; 32]);
        impl Companion for Files {
            fn digest(&self) -> [u8; 32] {
                self.0
            }
            fn parts(&self) -> Vec<HostPart> {
                vec![HostPart { id: self.0, bytes: 100 }]
            }
        }
        let decoder = tiny_decoder();
        let limits = LoraLimits {
            companion: Some(Arc::new(|files, adapter| {
                assert_eq!(adapter.modules.len(), 6, "the weights are packed");
                let read = |name: &str| read_file(files, name, 64);
                match files.contains("tokenizer.json") {
                    true => Ok(Some(Arc::new(Files(blake3::hash(&read("tokenizer.json")?).into())))),
                    false => Ok(None),
                }
            })),
            ..limits()
        };
        let load = |tokenizer: Option<&[u8]>| {
            let mut files = AdapterFiles::simple(&decoder, 1);
            files.others.extend(tokenizer.map(|bytes| ("tokenizer.json".to_owned(), bytes.to_vec())));
            load_adapter(&source(&files.write()), &decoder, &limits).unwrap().0
        };
        let (without, one, same, other) = (load(None), load(Some(b"1")), load(Some(b"1")), load(Some(b"2")));
        assert_eq!(one.version, same.version);
        assert!(without.version != one.version && one.version != other.version);
        assert!(without.companion.is_none() && one.companion.is_some());
        let bytes = |adapter: &HostAdapter| adapter.host_parts().iter().map(|part| part.bytes).sum::<usize>() - adapter.bytes();
        assert_eq!((bytes(&without), bytes(&one)), (0, 100));
    }

    fn with_own_tokens() -> LoraLimits {
        LoraLimits {
            features: LoraFeatures {
                replaced_weights: true,
                own_tokens: true,
                ..LoraFeatures::default()
            },
            ..limits()
        }
    }

    /// q and v, and whole embeddings under the names that PEFT gives them when the vocabulary was resized.
    fn resized(decoder: &DecoderConfig, embedding: Option<usize>, head: Option<usize>) -> AdapterFiles {
        let mut files = AdapterFiles::simple(decoder, 1);
        for (id, rows) in [(ModuleId::EmbedTokens, embedding), (ModuleId::LmHead, head)] {
            if let Some(rows) = rows {
                files.add(id, "weight", &[rows, 8], &mut 7);
            }
        }
        files
    }

    #[test]
    fn a_resized_vocabulary_is_the_adapters_own() {
        let decoder = tiny_decoder();
        let tied = DecoderConfig {
            tie_word_embeddings: true,
            ..decoder.clone()
        };
        let load = |files: &AdapterFiles, decoder: &DecoderConfig| load_adapter(&source(&files.write()), decoder, &with_own_tokens());
        let plain = load(&AdapterFiles::simple(&decoder, 1), &decoder).unwrap().0;
        assert_eq!((plain.resized_vocab, plain.vocab_size(11)), (None, 11));
        for rows in [13, 9] {
            let (adapter, report) = load(&resized(&decoder, Some(rows), Some(rows)), &decoder).unwrap();
            assert_eq!((adapter.resized_vocab, report.resized_vocab), (Some(rows as u32), Some(rows)));
            assert_eq!(adapter.vocab_size(11), rows);
            assert_eq!(adapter.replaced.len(), 2);
            assert_ne!(adapter.version, plain.version);
            // A tied head is the embedding, and not kept twice.
            let (adapter, _) = load(&resized(&decoder, Some(rows), None), &tied).unwrap();
            assert_eq!(adapter.replaced[0].offset_bytes, adapter.replaced[1].offset_bytes);
        }
        // With fewer tokens nothing is missing.
        load(&resized(&decoder, Some(9), None), &decoder).unwrap();
        let check = |files: &AdapterFiles, decoder: &DecoderConfig, words: &[&str]| check_refused(files, decoder, &with_own_tokens(), words);
        check(
            &resized(&decoder, Some(13), None),
            &decoder,
            &["save_embedding_layers", "no rows of `lm_head`", "13 tokens", "base model 11"],
        );
        check(
            &resized(&decoder, None, Some(13)),
            &decoder,
            &["save_embedding_layers", "no rows of `model.embed_tokens`"],
        );
        check(
            &resized(&decoder, Some(13), Some(12)),
            &decoder,
            &["lm_head.weight has rows for 12 tokens", "for 13"],
        );
        check(
            &resized(&decoder, Some(11 + MAX_ADDED_TOKENS + 1), None),
            &decoder,
            &["at most 65536 more than the base model's 11"],
        );
        // A trained embedding leaves the head that was tied to it as it was: with new rows that are in no file.
        let saved = resized(&decoder, Some(13), None).with("modules_to_save", json!(["embed_tokens"]));
        check(&saved, &tied, &["save_embedding_layers", "no rows of `lm_head`"]);
        let mut with_original = saved.clone();
        with_original.add(ModuleId::EmbedTokens, "original_module.weight", &[13, 8], &mut 9);
        let (adapter, _) = load(&with_original, &tied).unwrap();
        assert_ne!(adapter.replaced[0].offset_bytes, adapter.replaced[1].offset_bytes);
        // PEFT's second copy is the same or the file is damaged.
        let mut copied = saved.clone().with("modules_to_save", json!(["embed_tokens", "lm_head"]));
        copied.add(ModuleId::LmHead, "weight", &[13, 8], &mut 7);
        let name = tensor_name(ModuleId::EmbedTokens, "modules_to_save.weight");
        copied
            .tensors
            .insert(name.clone(), copied.tensors[&tensor_name(ModuleId::EmbedTokens, "weight")].clone());
        let (_, report) = load(&copied, &decoder).unwrap();
        assert_eq!(report.tensors_without_effect, std::slice::from_ref(&name));
        copied.tensors.get_mut(&name).unwrap().bytes[0] ^= 1;
        check(&copied, &decoder, &[&name, "are the same one and differ"]);
    }

    #[test]
    fn a_backend_without_own_tokens_refuses_them_by_key() {
        let decoder = tiny_decoder();
        let limits = LoraLimits {
            features: LoraFeatures {
                own_tokens: false,
                ..with_own_tokens().features
            },
            ..limits()
        };
        let words = ["`save_embedding_layers` is not supported", "rows for 13 tokens", "base model has 11"];
        check_refused(&resized(&decoder, Some(13), Some(13)), &decoder, &limits, &words);
        let rows = AdapterFiles::simple(&decoder, 1).with("trainable_token_indices", json!([3]));
        check_refused(&rows, &decoder, &limits, &["`trainable_token_indices` is not supported"]);
    }

    #[test]
    fn rows_of_single_tokens_are_checked() {
        let decoder = tiny_decoder();
        let form = "token_adapter.trainable_tokens_delta";
        let files = |indices: serde_json::Value, rows: usize| {
            let mut files = AdapterFiles::simple(&decoder, 1).with("trainable_token_indices", indices);
            files.add(ModuleId::EmbedTokens, form, &[rows, 8], &mut 5);
            files
        };
        let load = |files: &AdapterFiles| load_adapter(&source(&files.write()), &decoder, &with_own_tokens());
        let (adapter, report) = load(&files(json!([7, 3]), 2)).unwrap();
        assert_eq!(
            (&adapter.token_rows[0].token_ids[..], report.token_rows["model.embed_tokens"]),
            (&[3, 7][..], 2)
        );
        let (other, _) = load(&files(json!([8, 3]), 2)).unwrap();
        assert_ne!(adapter.version, other.version, "the same rows for other tokens");
        let check = |files: &AdapterFiles, words: &[&str]| check_refused(files, &decoder, &with_own_tokens(), words);
        check(
            &files(json!([7, 3, 1]), 2),
            &["trainable_tokens_delta", "expected shape [3, 8], got [2, 8]"],
        );
        check(&files(json!(null), 2), &["is not in `trainable_token_indices`"]);
        // New tokens, of which the head has no rows.
        check(&files(json!([11, 12]), 2), &["no rows of `lm_head`", "13 tokens"]);
        check(&files(json!([4_000_000_000u32, 1]), 2), &["at most 65536 more"]);
        let mut nan = files(json!([7, 3]), 2);
        nan.tensors.get_mut(&tensor_name(ModuleId::EmbedTokens, form)).unwrap().bytes[32..36].copy_from_slice(&f32::NAN.to_le_bytes());
        check(&nan, &[form, "row 1, column 0 is NaN"]);
        for (key, value) in [
            ("modules_to_save", json!(["embed_tokens"])),
            ("target_modules", json!(["q_proj", "v_proj", "embed_tokens"])),
        ] {
            check(
                &files(json!([7, 3]), 2).with(key, value),
                &["trainable_token_indices", "`model.embed_tokens`", ", too"],
            );
        }
    }

    #[test]
    fn split_files_are_one_adapter() {
        let decoder = tiny_decoder();
        let plain = AdapterFiles::simple(&decoder, 1);
        let whole = load_adapter(&source(&plain.write()), &decoder, &limits()).unwrap().0;
        let (mut first, mut second) = (plain.clone(), plain.clone());
        first.tensors.retain(|name, _| name.contains("q_proj"));
        second.tensors.retain(|name, _| name.contains("v_proj"));
        let map = |second_file: &str| -> serde_json::Map<String, serde_json::Value> {
            let file_of = |name: &str| if name.contains("q_proj") { "a.safetensors" } else { second_file };
            plain.tensors.keys().map(|name| (name.clone(), json!(file_of(name)))).collect()
        };
        let write = |map: serde_json::Map<String, serde_json::Value>| {
            let directory = plain.write();
            let path = |name: &str| directory.path().join(name);
            std::fs::remove_file(path("adapter_model.safetensors")).unwrap();
            std::fs::write(path("a.safetensors"), first.weights()).unwrap();
            std::fs::write(path("b.safetensors"), second.weights()).unwrap();
            std::fs::write(path(INDEX_FILE), serde_json::to_vec(&json!({"weight_map": map})).unwrap()).unwrap();
            directory
        };
        let load = |map| load_adapter(&source(&write(map)), &decoder, &limits());
        assert_eq!(load(map("b.safetensors")).unwrap().0.version, whole.version);
        let check = |map, words: &str| {
            let error = load(map).expect_err("refused").to_string();
            assert!(error.contains(words), "{error:?} does not contain {words:?}");
        };
        check(map("c.safetensors"), "c.safetensors: no such file");
        check(map("../b.safetensors"), "expected the name of a safetensors file");
        check(map("a.safetensors"), "is missing, adapter_model.safetensors.index.json names it");
        let mut fewer = map("b.safetensors");
        fewer.remove(&tensor_name(layer(0, Projection::V), "lora_A.weight"));
        check(fewer, "is not in this file by");
    }

    #[test]
    fn neighbours_and_order_are_as_described() {
        let mut decoder = tiny_decoder();
        // Rows of A of a multiple of 64 bytes: neighbours touch.
        decoder.hidden_size = 16;
        let files = AdapterFiles::new(
            &decoder,
            json!({"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"],
                   "rank_pattern": {"k_proj": 3}}),
            1,
        );
        let adapter = load_adapter(&source(&files.write()), &decoder, &limits()).unwrap().0;
        assert!(adapter.modules.is_sorted_by_key(|module| module.id));
        for number in 0..3 {
            let module = |projection| adapter.module(layer(number, projection)).unwrap();
            for run in [&[Projection::Q, Projection::K, Projection::V][..], &[Projection::Gate, Projection::Up]] {
                for pair in run.windows(2) {
                    let (first, second) = (module(pair[0]), module(pair[1]));
                    let bytes = 4 * (first.lora_rank * first.d_in) as usize;
                    assert_eq!(second.a_offset_bytes, first.a_offset_bytes + bytes, "{:?}", first.id);
                }
            }
        }
        // Token-major A of the embedding: token t's row is the file's column t.
        let embedding = adapter.module(ModuleId::EmbedTokens).unwrap();
        assert_eq!((embedding.d_in, embedding.d_out), (11, 16));
        let a = files.tensors[&tensor_name(ModuleId::EmbedTokens, "lora_embedding_A")].values();
        for token in 0..11 {
            for k in 0..2 {
                assert_eq!(adapter.a_f32(embedding)[token * 2 + k], a[k * 11 + token]);
            }
        }
        let head = adapter.module(ModuleId::LmHead).unwrap();
        assert_eq!((head.d_in, head.d_out), (16, 11));
    }

    #[test]
    fn matrices_of_any_shape_are_transposed_value_by_value() {
        fn check<P: Packed + PartialEq + std::fmt::Debug>(dtype: Dtype, encode: fn(f32) -> Vec<u8>) {
            for (rows, columns) in [(1, 1), (5, 3), (16, 8), (33, 17), (48, 24), (15, 8), (16, 7)] {
                let value = |row: usize, column: usize| (row as f32 - 3.0 * column as f32) / 8.0;
                let values: Vec<f32> = (0..rows * columns).map(|at| value(at / columns, at % columns)).collect();
                let transposed = |values: &[f32], to: &mut [P]| {
                    let bytes: Vec<u8> = values.iter().flat_map(|value| encode(*value)).collect();
                    let view = TensorView::new(dtype, vec![rows, columns], &bytes).unwrap();
                    write_tensor(&Tensor { name: "b".into(), view }, Some((rows, columns)), to)
                };
                let mut to = vec![P::pack(9.0); rows * columns];
                transposed(&values, &mut to).unwrap();
                let expected: Vec<P> = (0..rows * columns).map(|at| P::pack(value(at % rows, at / rows))).collect();
                assert_eq!(to, expected, "{dtype:?} [{rows}, {columns}]");
                for at in [0, rows * columns / 2, rows * columns - 1] {
                    let mut damaged = values.clone();
                    damaged[at] = f32::NAN;
                    let error = transposed(&damaged, &mut to).unwrap_err().to_string();
                    assert!(
                        error.contains(&format!("row {}, column {} is NaN", at / columns, at % columns)),
                        "{error}"
                    );
                }
            }
        }
        check::<f32>(Dtype::F32, |value| value.to_le_bytes().into());
        check::<bf16>(Dtype::F32, |value| value.to_le_bytes().into());
        check::<f32>(Dtype::F16, |value| half::f16::from_f32(value).to_le_bytes().into());
        check::<bf16>(Dtype::F16, |value| half::f16::from_f32(value).to_le_bytes().into());
        check::<bf16>(Dtype::BF16, |value| bf16::from_f32(value).to_le_bytes().into());
    }

    #[test]
    fn many_threads_pack_what_one_packs() {
        let mut decoder = tiny_decoder();
        decoder.hidden_size = 2048;
        decoder.intermediate_size = 4096;
        let files = AdapterFiles::new(&decoder, json!({"r": 32, "target_modules": "all-linear"}), 1);
        let directory = files.write();
        let pack = |pack_threads| {
            let limits = LoraLimits {
                pack_threads,
                dtype: PackedDtype::Bf16,
                ..limits()
            };
            load_adapter(&source(&directory), &decoder, &limits).unwrap().0
        };
        let (one, many) = (pack(1), pack(4));
        assert!(one.bytes() > 4 << 20);
        assert_eq!(one.version, many.version);
        assert!(one.blob.as_bytes() == many.blob.as_bytes());
    }

    #[test]
    fn a_copy_of_the_base_is_compared() {
        struct Base;
        impl BaseWeights for Base {
            fn read_row(&self, _: ModuleId, row: usize, out: &mut [f32]) {
                out.iter_mut()
                    .enumerate()
                    .for_each(|(column, out)| *out = 0.1 * (row * 8 + column) as f32);
            }
            fn bias(&self, _: ModuleId) -> Option<Vec<f32>> {
                None
            }
        }
        let decoder = tiny_decoder();
        let mut files = AdapterFiles::new(&decoder, json!({"r": 2, "target_modules": ["embed_tokens"]}), 1);
        let name = tensor_name(ModuleId::EmbedTokens, "base_layer.weight");
        let mut values: Vec<f32> = (0..88).map(|at| 0.1 * at as f32).collect();
        let limits = LoraLimits {
            base: Some(Arc::new(|| Ok(Box::new(Base)))),
            ..limits()
        };
        let copy = FileTensor::f32(&[11, 8], &values);
        for tensor in [copy.clone(), copy.cast(Dtype::F16), copy.cast(Dtype::BF16)] {
            files.tensors.insert(name.clone(), tensor.clone());
            let (_, report) = load_adapter(&source(&files.write()), &decoder, &limits).unwrap();
            let [note] = &report.tensors_without_effect[..] else {
                panic!("{report:?}")
            };
            assert!(note.starts_with(&name), "{note}");
            assert_eq!(note.contains("rounded"), tensor.dtype != Dtype::F32, "{note}");
        }
        values[13] += 0.01;
        files.tensors.insert(name.clone(), FileTensor::f32(&[11, 8], &values));
        check_refused(
            &files,
            &decoder,
            &limits,
            &[&name, "row 1, column 5", "must be named in `modules_to_save`"],
        );
        // A vocabulary that grew: then the pair has a column for each token, too.
        files.tensors.insert(name.clone(), FileTensor::f32(&[12, 8], &[0.0; 96]));
        let limits = LoraLimits {
            features: with_own_tokens().features,
            ..limits
        };
        check_refused(&files, &decoder, &limits, &["no rows of `lm_head`", "12 tokens"]);
        files.add(ModuleId::LmHead, "weight", &[12, 8], &mut 3);
        check_refused(&files, &decoder, &limits, &["lora_embedding_A: expected shape [2, 12], got [2, 11]"]);
    }

    #[test]
    fn what_the_backend_cannot_do_is_refused_by_key() {
        let decoder = tiny_decoder();
        for (key, value) in [
            ("use_dora", json!(true)),
            ("lora_bias", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
        ] {
            let files = AdapterFiles::simple(&decoder, 1).with(key, value);
            check_refused(&files, &decoder, &limits(), &[&format!("`{key}` is not supported")]);
        }
        let with_bias = DecoderConfig {
            qkv_bias: true,
            ..decoder.clone()
        };
        for mode in ["all", "lora_only"] {
            let files = AdapterFiles::simple(&decoder, 1).with("bias", json!(mode));
            check_refused(&files, &with_bias, &limits(), &["`bias` is not supported"]);
            // A base without biases has none to train.
            let (_, report) = load_adapter(&source(&files.write()), &decoder, &limits()).unwrap();
            assert!(report.keys_without_effect.contains(&"bias".to_owned()));
        }
    }

    mod fuzz {
        use proptest::prelude::*;

        use super::*;

        fn load_bytes(config: &[u8], weights: &[u8]) -> Result<(), AdapterError> {
            let directory = tempfile::TempDir::new().unwrap();
            std::fs::write(directory.path().join(CONFIG_FILE), config).unwrap();
            std::fs::write(directory.path().join(WEIGHTS_FILE), weights).unwrap();
            load_adapter(&source(&directory), &tiny_decoder(), &limits()).map(drop)
        }

        fn config() -> Vec<u8> {
            serde_json::to_vec(&AdapterFiles::simple(&tiny_decoder(), 1).config).unwrap()
        }

        fn weights() -> Vec<u8> {
            AdapterFiles::simple(&tiny_decoder(), 1).weights()
        }

        proptest! {
            #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

            #[test]
            fn random_bytes_are_refused(config_bytes in prop::collection::vec(any::<u8>(), 0..200), weight_bytes in prop::collection::vec(any::<u8>(), 0..400)) {
                prop_assert!(load_bytes(&config_bytes, &weights()).is_err());
                prop_assert!(load_bytes(&config(), &weight_bytes).is_err());
            }

            #[test]
            fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), in_header in any::<bool>()) {
                let mut bytes = weights();
                let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                let len = if in_header { header } else { bytes.len() };
                for (at, value) in &changes {
                    bytes[at.index(len)] = *value;
                }
                // Whether it is still an adapter depends on what was hit.
                let _ = load_bytes(&config(), &bytes);
                let mut bytes = config();
                for (at, value) in &changes {
                    let len = bytes.len();
                    bytes[at.index(len)] = *value;
                }
                let _ = load_bytes(&bytes, &weights());
            }

            #[test]
            fn changed_configurations_never_panic(
                key in prop::sample::select(vec!["r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
                    "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "use_dora", "init_lora_weights", "ensure_weight_tying"]),
                text in "[a-z_.*()|\\[\\]?+$^0-9{}\\\\]{0,16}",
                number in any::<i64>(),
                shape in 0u8..8,
            ) {
                let value = match shape {
                    0 => json!(text),
                    1 => json!([text]),
                    2 => json!({ text: number }),
                    3 => json!(number),
                    4 => json!([number, number]),
                    5 => json!(number as f64 / 1e3),
                    6 => json!(null),
                    _ => json!(number % 2 == 0),
                };
                let files = AdapterFiles::simple(&tiny_decoder(), 1).with(key, value);
                let _ = load_bytes(&serde_json::to_vec(&files.config).unwrap(), &files.weights());
            }
        }
    }
}
