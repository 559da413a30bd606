//! Adapters: from PEFT files to weights that a batch can use.
//!
//! `config.rs` reads `adapter_config.json`, `tensors.rs` the weight files; `load.rs` checks both against the base model and packs
//! them; `registry.rs` knows names, versions, leases and the host tier. Device residency is the worker's ([`crate::worker`]).

use std::sync::Arc;

use half::bf16;
use polylora_kernels::cpu::HugeBuffer;

use crate::files::FileSource;

pub mod combine;
pub mod config;
pub mod lease;
pub mod load;
pub mod registry;
pub mod tensors;
#[cfg(test)]
pub(crate) mod testing;

pub use config::{module_path, module_paths};
pub use lease::{AdapterLease, UnloadMode, UnloadReport, Unloading};
pub use load::{CoverageReport, LoraFeatures, LoraLimits, ModuleCoverage, load_adapter};
pub use registry::{AdapterInfo, AdapterRegistry, AdapterState, LoadRequest, RegistryConfig, RegistryStats, ResidentSet};

/// Content identity of an adapter: BLAKE3 over its effective configuration and its tensors. Equal bytes, equal version.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VersionId(pub [u8; 32]);

impl std::fmt::Display for VersionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for VersionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VersionId({self})")
    }
}

/// A projection of a decoder layer that an adapter can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Projection {
    /// `self_attn.q_proj`
    Q,
    /// `self_attn.k_proj`
    K,
    /// `self_attn.v_proj`
    V,
    /// `self_attn.o_proj`
    O,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

impl Projection {
    /// All, in packing order.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The last component of its module path.
    pub fn module_name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// `self_attn` or `mlp`.
    pub fn parent(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }
}

/// A module that an adapter can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ModuleId {
    /// A projection of layer `layer`.
    Layer {
        /// From 0.
        layer: u16,
        /// Which.
        projection: Projection,
    },
    /// The input embedding. `a` is `[lora_rank, vocab]` (column `t` belongs to token `t`), `b_t` is `[lora_rank, hidden]`.
    EmbedTokens,
    /// The output head.
    LmHead,
}

impl ModuleId {
    /// The last component of its module path: what `target_modules` lists call it.
    pub fn module_name(self) -> &'static str {
        match self {
            Self::Layer { projection, .. } => projection.module_name(),
            Self::EmbedTokens => "embed_tokens",
            Self::LmHead => "lm_head",
        }
    }
}

/// dtype of packed adapter weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackedDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
}

impl PackedDtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Where one module's pair lies in [`HostAdapter::blob`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PackedModule {
    /// The module.
    pub id: ModuleId,
    /// Rows of A.
    pub lora_rank: u32,
    /// Input width (the vocabulary for `EmbedTokens`).
    pub d_in: u32,
    /// Output width.
    pub d_out: u32,
    /// α/r or α/√r; multiplies the delta, not folded into the weights.
    pub scaling: f32,
    /// Byte offset of A `[lora_rank, d_in]`, row-major; a multiple of 64. For `EmbedTokens` A is stored token-major, `[vocab, lora_rank]`.
    pub a_offset_bytes: usize,
    /// Byte offset of Bᵀ `[lora_rank, d_out]`, row-major; a multiple of 64.
    pub b_t_offset_bytes: usize,
    /// Byte offset of `[d_out]` f32, whatever the dtype; a multiple of 64. See [`HostAdapter`] for its place in the formula (DoRA).
    pub output_scale_offset_bytes: Option<usize>,
    /// Byte offset of `[d_out]` f32, whatever the dtype; a multiple of 64 (biases that the adapter trained).
    pub output_bias_offset_bytes: Option<usize>,
}

/// A weight that the adapter brings whole, in place of the base model's (`modules_to_save`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplacedWeight {
    /// `EmbedTokens` or `LmHead`.
    pub id: ModuleId,
    /// Byte offset of `[vocab, hidden]`, row-major, in the adapter's dtype; a multiple of 64. Both may name the same bytes. The vocabulary
    /// is the adapter's ([`HostAdapter::resized_vocab`]).
    pub offset_bytes: usize,
}

/// Rows of the embedding or of the head that the adapter brings, in place of those of [`ReplacedWeight`] or of the base model's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRows {
    /// `EmbedTokens` or `LmHead`.
    pub id: ModuleId,
    /// The tokens whose rows they are, ascending; at least one.
    pub token_ids: Vec<u32>,
    /// Byte offset of `[token_ids.len(), hidden]`, row-major, in the adapter's dtype; a multiple of 64. Both may name the same bytes.
    pub offset_bytes: usize,
}

/// Reads the base model's own weights, for what is worked out from them at load: DoRA's norms, trained biases, saved copies.
pub trait BaseWeights: Send + Sync {
    /// Writes row `row` of a module's weight `[d_out, d_in]` as f32; `[vocab, hidden]` for `EmbedTokens` and `LmHead`.
    fn read_row(&self, id: ModuleId, row: usize, out: &mut [f32]);
    /// A module's bias `[d_out]` as f32, if it has one.
    fn bias(&self, id: ModuleId) -> Option<Vec<f32>>;
}

/// What an adapter brings beside its weights that is not the engine's to read: its tokenizer. It is kept with the version and dropped with it.
pub trait Companion: Send + Sync {
    /// Hash of all that it says; part of the adapter's version.
    fn digest(&self) -> [u8; 32];
    /// What it keeps in host memory, beside the weights; parts that several companions share have the same `id` in each.
    fn parts(&self) -> Vec<HostPart>;
}

/// Host memory that one or several adapters keep in use. It counts once, however many they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPart {
    /// Content hash.
    pub id: [u8; 32],
    /// Its size; an estimate where nobody can know it.
    pub bytes: usize,
}

/// Reads an adapter's [`Companion`] from its files, once its weights are packed; `None` where there is none. Called by the threads that load.
pub type CompanionReader = Arc<dyn Fn(&FileSource, &HostAdapter) -> Result<Option<Arc<dyn Companion>>, AdapterError> + Send + Sync>;

/// A validated adapter, packed into one buffer that one copy moves to a device. Immutable.
///
/// A module's output becomes `y ← output_scale ⊙ (y + scaling · (x·Aᵀ)·Bᵀ) + output_bias`, where `y` is the base's output with its
/// bias; most adapters have neither scale (all ones) nor bias (all zeros). A module with a bias alone has `lora_rank` 0.
pub struct HostAdapter {
    /// Content identity.
    pub version: VersionId,
    /// dtype of every weight in `blob`.
    pub dtype: PackedDtype,
    /// Sorted by `id`: layer by layer in [`Projection::ALL`]'s order, then `EmbedTokens`, then `LmHead`.
    /// The A's of q, k, v (and of gate, up) of a layer are neighbours in `blob`.
    pub modules: Vec<PackedModule>,
    /// All weights; 64-byte aligned. Shared with a device that uses host memory.
    pub blob: Arc<AlignedBytes>,
    /// Largest `lora_rank`.
    pub max_lora_rank: u32,
    /// Weights used in place of the base model's; sorted by `id`. A module in here that is in `modules`, too, has its pair on top of it:
    /// only where the vocabulary is resized.
    pub replaced: Vec<ReplacedWeight>,
    /// Rows used in place of the base model's; sorted by `id`. A module in here is not in `modules`, unless the vocabulary is resized.
    pub token_rows: Vec<TokenRows>,
    /// `Some`: requests on this adapter have so many tokens, not as many as the base model's have: they are the widths of `EmbedTokens`
    /// and `LmHead` in `modules`, the rows in `replaced`, and the logits. Where there are more than the base model has, `replaced` or
    /// `token_rows` has the rows of every further one, for the embedding and for the head; where there are fewer, what the base model
    /// has beyond them does not exist.
    pub resized_vocab: Option<u32>,
    /// What else came with it.
    pub companion: Option<Arc<dyn Companion>>,
}

impl std::fmt::Debug for HostAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostAdapter")
            .field("version", &self.version)
            .field("modules", &self.modules.len())
            .field("bytes", &self.bytes())
            .finish()
    }
}

impl HostAdapter {
    /// Bytes of its weights, on the host and on a device alike.
    pub fn bytes(&self) -> usize {
        self.blob.as_bytes().len()
    }

    /// The same weights without what else came with them, for a device that uses host memory: that outlives the host's own hold, and a
    /// tokenizer can be far larger than an adapter.
    pub fn weights_alone(self: &Arc<Self>) -> Arc<Self> {
        match &self.companion {
            None => self.clone(),
            Some(_) => Arc::new(Self {
                companion: None,
                modules: self.modules.clone(),
                blob: self.blob.clone(),
                replaced: self.replaced.clone(),
                token_rows: self.token_rows.clone(),
                ..**self
            }),
        }
    }

    /// All that it keeps in host memory: its weights, and the parts of its companion.
    pub fn host_parts(&self) -> Vec<HostPart> {
        let weights = HostPart {
            id: self.version.0,
            bytes: self.bytes(),
        };
        let mut parts = self.companion.as_ref().map_or_else(Vec::new, |companion| companion.parts());
        parts.push(weights);
        parts
    }

    /// Bytes of those of its [`Self::host_parts`] that are not in host memory yet.
    pub fn missing_bytes(&self, is_there: impl Fn(&[u8; 32]) -> bool) -> usize {
        let parts = self.host_parts();
        parts.iter().filter(|part| !is_there(&part.id)).map(|part| part.bytes).sum()
    }

    /// The pair of a module, if the adapter has one.
    pub fn module(&self, id: ModuleId) -> Option<&PackedModule> {
        self.modules
            .binary_search_by_key(&id, |module| module.id)
            .ok()
            .map(|index| &self.modules[index])
    }

    /// A of a module, as f32. Panics unless `dtype` is `F32`.
    pub fn a_f32(&self, module: &PackedModule) -> &[f32] {
        assert_eq!(self.dtype, PackedDtype::F32, "packed dtype");
        let len = module.lora_rank as usize * module.d_in as usize;
        bytemuck::cast_slice(&self.blob.as_bytes()[module.a_offset_bytes..module.a_offset_bytes + 4 * len])
    }

    /// Bᵀ of a module, as f32. Panics unless `dtype` is `F32`.
    pub fn b_t_f32(&self, module: &PackedModule) -> &[f32] {
        assert_eq!(self.dtype, PackedDtype::F32, "packed dtype");
        let len = module.lora_rank as usize * module.d_out as usize;
        bytemuck::cast_slice(&self.blob.as_bytes()[module.b_t_offset_bytes..module.b_t_offset_bytes + 4 * len])
    }

    /// A of a module, as bf16. Panics unless `dtype` is `Bf16`.
    pub fn a_bf16(&self, module: &PackedModule) -> &[bf16] {
        assert_eq!(self.dtype, PackedDtype::Bf16, "packed dtype");
        let len = module.lora_rank as usize * module.d_in as usize;
        bytemuck::cast_slice(&self.blob.as_bytes()[module.a_offset_bytes..module.a_offset_bytes + 2 * len])
    }

    /// Bᵀ of a module, as bf16. Panics unless `dtype` is `Bf16`.
    pub fn b_t_bf16(&self, module: &PackedModule) -> &[bf16] {
        assert_eq!(self.dtype, PackedDtype::Bf16, "packed dtype");
        let len = module.lora_rank as usize * module.d_out as usize;
        bytemuck::cast_slice(&self.blob.as_bytes()[module.b_t_offset_bytes..module.b_t_offset_bytes + 2 * len])
    }

    /// The scale on a module's output, if it has one.
    pub fn output_scale(&self, module: &PackedModule) -> Option<&[f32]> {
        module.output_scale_offset_bytes.map(|offset| self.f32_at(offset, module.d_out))
    }

    /// The bias on a module's output, if it has one.
    pub fn output_bias(&self, module: &PackedModule) -> Option<&[f32]> {
        module.output_bias_offset_bytes.map(|offset| self.f32_at(offset, module.d_out))
    }

    fn f32_at(&self, offset: usize, len: u32) -> &[f32] {
        bytemuck::cast_slice(&self.blob.as_bytes()[offset..offset + 4 * len as usize])
    }

    /// Tokens of a request on this adapter, over a base model that has `base_vocab_size`.
    pub fn vocab_size(&self, base_vocab_size: usize) -> usize {
        self.resized_vocab.map_or(base_vocab_size, |size| size as usize)
    }

    /// Rows that replace some of a module's, if there are any.
    pub fn token_rows(&self, id: ModuleId) -> Option<&TokenRows> {
        self.token_rows.iter().find(|rows| rows.id == id)
    }

    /// The weight that replaces a module's, if there is one.
    pub fn replaced(&self, id: ModuleId) -> Option<&ReplacedWeight> {
        self.replaced.iter().find(|weight| weight.id == id)
    }
}

/// Memory of a device's own for packed adapters, from which it copies by itself.
pub trait HostMemory: Send + Sync {
    /// So many bytes of any content, at a 64-byte boundary; `None` if there are none.
    fn take(&self, bytes: usize) -> Option<Box<dyn HostRun>>;
}

/// Bytes of [`HostMemory`], given back on drop.
pub trait HostRun: Send + Sync {
    /// All of them.
    fn bytes(&self) -> &[u8];
    /// All of them, to be written.
    fn bytes_mut(&mut self) -> &mut [u8];
    /// Says that they are written now and stay as they are.
    fn filled(&mut self);
    /// Whether the device can copy from them by itself by now.
    fn is_locked(&self) -> bool;
}

/// Bytes at a 64-byte boundary. An adapter is streamed at every step that uses it.
pub struct AlignedBytes(Storage);

enum Storage {
    Own(HugeBuffer<u8>),
    Device(Box<dyn HostRun>),
}

impl AlignedBytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        Self(Storage::Own(HugeBuffer::zeroed(len)))
    }

    /// `len` bytes of any content, in the device's memory if it has any.
    pub fn of_any_content(len: usize, memory: Option<&dyn HostMemory>) -> Self {
        match memory.and_then(|memory| memory.take(len)) {
            Some(run) => Self(Storage::Device(run)),
            None => Self::zeroed(len),
        }
    }

    /// Says that they are written now and stay as they are: the device may do with them what it has to before it can copy from them.
    pub fn filled(&mut self) {
        if let Storage::Device(run) = &mut self.0 {
            run.filled();
        }
    }

    /// Whether the device can copy from them by itself by now.
    pub fn is_locked(&self) -> bool {
        match &self.0 {
            Storage::Own(_) => false,
            Storage::Device(run) => run.is_locked(),
        }
    }

    /// All of them.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Storage::Own(bytes) => bytes,
            Storage::Device(run) => run.bytes(),
        }
    }

    /// All of them, to be written.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Storage::Own(bytes) => bytes,
            Storage::Device(run) => run.bytes_mut(),
        }
    }
}

/// One thing wrong with an adapter or with what was asked of one. The variants are the API's error classes.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum AdapterError {
    /// LoRA is off.
    #[error("LoRA is not enabled. Please set `--enable-lora`")]
    NotEnabled,
    /// No such name.
    #[error("LoRA adapter '{name}' has never been loaded. All loaded adapters: {}", .loaded.join(", "))]
    Unknown {
        /// Asked for.
        name: String,
        /// What there is.
        loaded: Vec<String>,
    },
    /// The name is taken.
    #[error("LoRA adapter '{name}' is already loaded")]
    AlreadyLoaded {
        /// The name.
        name: String,
    },
    /// A name that may not be.
    #[error("adapter name {name:?} {reason}")]
    BadName {
        /// The name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// Does not fit the base model or the server's limits.
    #[error("LoRA adapter is incompatible: {reason}")]
    Incompatible {
        /// Expected and got.
        reason: String,
    },
    /// A key of the configuration that changes the result and is not applied.
    #[error("adapter_config.json: `{key}` is not supported: {reason}")]
    Unsupported {
        /// The key.
        key: String,
        /// What it was and what is possible.
        reason: String,
    },
    /// Files that are missing, damaged or wrong.
    #[error("{file}: {reason}")]
    BadFile {
        /// Which file.
        file: String,
        /// What and where.
        reason: String,
    },
    /// Too many pins.
    #[error(
        "adapter '{name}' cannot be pinned: {pinned} of at most {limit} adapters are pinned (max-loras-per-batch - 1), more would cause starvation of the others"
    )]
    TooManyPinned {
        /// The name.
        name: String,
        /// Pinned now.
        pinned: usize,
        /// At most.
        limit: usize,
    },
    /// The name has another version than the one that was to be replaced.
    #[error("adapter '{name}' has version {got}, not {expected}")]
    VersionConflict {
        /// The name.
        name: String,
        /// The version that the caller expected.
        expected: String,
        /// The version that it has; `none` when it was never read.
        got: String,
    },
    /// Too many loads wait.
    #[error("{waiting} adapter loads wait, at most {limit} may")]
    TooManyLoads {
        /// Waiting now.
        waiting: usize,
        /// At most.
        limit: usize,
    },
    /// A fault of the server's own.
    #[error("loading the adapter failed: {reason}")]
    Internal {
        /// What failed.
        reason: String,
    },
    /// The bytes for adapters in host memory are used, and nothing may leave.
    #[error("no room for {needed_bytes} bytes in host memory: pinned adapters and those in use have {used_bytes} of {limit_bytes}")]
    HostMemoryFull {
        /// To be added.
        needed_bytes: usize,
        /// By what may not leave.
        used_bytes: usize,
        /// At most.
        limit_bytes: usize,
    },
    /// As many combinations as there may be are in use.
    #[error("{in_use} combinations of adapters are in use, at most {limit} may be")]
    TooManyCombinations {
        /// In use now.
        in_use: usize,
        /// At most.
        limit: usize,
    },
    /// More combinations at once than there may ever be.
    #[error("at most {limit} combinations of adapters may be in memory at once, but the request names {got}")]
    TooManySums {
        /// Different ones in the request.
        got: usize,
        /// At most.
        limit: usize,
    },
    /// Adapters that are larger together than host memory for adapters ever is.
    #[error("the request's adapters take {got} bytes of host memory together, at most {limit} are for adapters (--max-loaded-lora-bytes)")]
    TooManyBytes {
        /// Of its adapters, as far as they are known, and its combinations.
        got: usize,
        /// At most.
        limit: usize,
    },
    /// More adapters at once than there may ever be in host memory.
    #[error("at most {limit} adapters may be in memory at once (max-loaded-loras), but the request names {got}")]
    TooManyAdapters {
        /// Different ones in the request.
        got: usize,
        /// At most.
        limit: usize,
    },
    /// `max_loaded_loras` is reached and nothing may leave.
    #[error("no adapter can be evicted: all {loaded} loaded adapters (limit {limit}) are pinned or in use")]
    NothingToEvict {
        /// Loaded now.
        loaded: usize,
        /// At most.
        limit: usize,
    },
}

/// An adapter's weights with the name that they were asked for under.
#[derive(Clone, Debug)]
pub struct ResolvedAdapter {
    /// The name.
    pub name: Arc<str>,
    /// The weights.
    pub weights: Arc<HostAdapter>,
}
