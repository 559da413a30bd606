//! Adapters as the CPU backend holds them: the host's own buffer, and where each pair lies in it.

use std::{collections::HashMap, sync::Arc};

use half::bf16;
use polylora_kernels::cpu::{LoraJob, PackedMatrix, ThreadPool, WeightDtype, gemm, lora};

use crate::{
    adapter::{HostAdapter, ModuleId, PackedDtype, PackedModule, Projection},
    backend::BackendError,
    batch::{AdapterHandle, LoraSegment},
    decoder::DecoderConfig,
};

/// Rows that one thread takes at least when outputs are scaled.
const MIN_ROWS: usize = 8;

/// The adapters that batches may name, and their bytes against a budget.
pub(super) struct Adapters {
    resident: HashMap<AdapterHandle, Resident>,
    next_handle: u32,
    used_bytes: usize,
    budget_bytes: usize,
}

/// One adapter. Modules are indices into `host.modules`.
pub(super) struct Resident {
    host: Arc<HostAdapter>,
    /// `[num_layers][7]`, in the order of [`Projection::ALL`].
    projections: Vec<[Option<usize>; Projection::ALL.len()]>,
    embed_tokens: Option<usize>,
    lm_head: Option<usize>,
    /// Byte offset of the embedding that is used in place of the base model's.
    replaced_embedding: Option<usize>,
    /// The head that is used in place of the base model's.
    replaced_head: Option<PackedMatrix>,
    /// Rows of the embedding that are used in place of those: an index into `host.token_rows`.
    embedding_rows: Option<usize>,
    /// Rows of the head, likewise, packed: an index, and a logit for each.
    head_rows: Option<(usize, PackedMatrix)>,
    /// Tokens that rows under this adapter may have: their logits' width.
    pub vocab_size: usize,
    /// Of `host` and of what is packed from it.
    bytes: usize,
}

/// Rows of a buffer that run under one adapter.
#[derive(Clone, Copy)]
pub(super) struct Segment<'a> {
    pub adapter: &'a Resident,
    pub row_start: usize,
    pub num_rows: usize,
}

impl Adapters {
    pub fn new(budget_bytes: usize) -> Self {
        Self {
            resident: HashMap::new(),
            next_handle: 0,
            used_bytes: 0,
            budget_bytes,
        }
    }

    /// Tokens of rows under an adapter; `None` for a handle that is not one.
    pub fn vocab_size(&self, handle: AdapterHandle) -> Option<usize> {
        self.resident.get(&handle).map(|resident| resident.vocab_size)
    }

    pub fn insert(&mut self, pool: &ThreadPool, host: &Arc<HostAdapter>, config: &DecoderConfig) -> Result<AdapterHandle, BackendError> {
        let available_bytes = self.budget_bytes - self.used_bytes;
        let needed_bytes = resident_bytes(host, config);
        if needed_bytes > available_bytes {
            return Err(BackendError::OutOfMemory {
                what: format!("adapter {}", host.version),
                needed_bytes,
                available_bytes,
            });
        }
        let resident = Resident::new(pool, &host.weights_alone(), config)?;
        while self.resident.contains_key(&AdapterHandle(self.next_handle)) {
            self.next_handle = self.next_handle.wrapping_add(1);
        }
        let handle = AdapterHandle(self.next_handle);
        // A handle that was freed is not given again soon: a batch that still names it is found out.
        self.next_handle = self.next_handle.wrapping_add(1);
        self.used_bytes += resident.bytes;
        self.resident.insert(handle, resident);
        Ok(handle)
    }

    pub fn remove(&mut self, handle: AdapterHandle) {
        if let Some(resident) = self.resident.remove(&handle) {
            self.used_bytes -= resident.bytes;
        }
    }

    /// The segments of a batch; each handle has been checked.
    pub fn segments(&self, segments: &[LoraSegment]) -> Vec<Segment<'_>> {
        let segment = |segment: &LoraSegment| Segment {
            adapter: &self.resident[&segment.adapter],
            row_start: segment.row_start as usize,
            num_rows: segment.num_rows as usize,
        };
        segments.iter().map(segment).collect()
    }
}

/// Bytes of an adapter here: the host's buffer, and what it has of a head once more, packed for the kernels.
pub(super) fn resident_bytes(host: &HostAdapter, config: &DecoderConfig) -> usize {
    let whole = host.replaced(ModuleId::LmHead).map_or(0, |_| host.vocab_size(config.vocab_size));
    let rows = host.token_rows(ModuleId::LmHead).map_or(0, |rows| rows.token_ids.len());
    host.bytes() + (whole + rows) * config.hidden_size * host.dtype.size_bytes()
}

/// Row `row` of a `[_, out.len()]` matrix of the blob.
fn read_row(host: &HostAdapter, offset_bytes: usize, row: usize, out: &mut [f32]) {
    let row_bytes = out.len() * host.dtype.size_bytes();
    let bytes = &host.blob.as_bytes()[offset_bytes + row * row_bytes..][..row_bytes];
    match host.dtype {
        PackedDtype::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        PackedDtype::Bf16 => {
            let values: &[bf16] = bytemuck::cast_slice(bytes);
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_f32());
        }
    }
}

impl Resident {
    fn new(pool: &ThreadPool, host: &Arc<HostAdapter>, base: &DecoderConfig) -> Result<Self, BackendError> {
        let config = &DecoderConfig {
            vocab_size: host.vocab_size(base.vocab_size),
            ..base.clone()
        };
        let dtype = match host.dtype {
            PackedDtype::F32 => WeightDtype::F32,
            PackedDtype::Bf16 => WeightDtype::Bf16,
        };
        let mut resident = Self {
            host: Arc::clone(host),
            projections: vec![[None; Projection::ALL.len()]; config.num_layers],
            embed_tokens: None,
            lm_head: None,
            replaced_embedding: None,
            replaced_head: None,
            embedding_rows: None,
            head_rows: None,
            vocab_size: config.vocab_size,
            bytes: resident_bytes(host, base),
        };
        for weight in &host.replaced {
            match weight.id {
                ModuleId::EmbedTokens => resident.replaced_embedding = Some(weight.offset_bytes),
                ModuleId::LmHead => {
                    let read = |row: usize, out: &mut [f32]| read_row(host, weight.offset_bytes, row, out);
                    resident.replaced_head = Some(PackedMatrix::pack(pool, config.vocab_size, config.hidden_size, dtype, &read));
                }
                ModuleId::Layer { .. } => {
                    let reason = format!("adapter {}: {:?}: a projection can't be replaced", host.version, weight.id);
                    return Err(BackendError::BadBatch(reason));
                }
            }
        }
        for (index, rows) in host.token_rows.iter().enumerate() {
            match rows.id {
                ModuleId::EmbedTokens => resident.embedding_rows = Some(index),
                _ => {
                    let read = |row: usize, out: &mut [f32]| read_row(host, rows.offset_bytes, row, out);
                    let packed = PackedMatrix::pack(pool, rows.token_ids.len(), config.hidden_size, dtype, &read);
                    resident.head_rows = Some((index, packed));
                }
            }
        }
        for (index, module) in host.modules.iter().enumerate() {
            let bad = |reason: String| Err(BackendError::BadBatch(format!("adapter {}: {:?}: {reason}", host.version, module.id)));
            let place = match module.id {
                ModuleId::EmbedTokens => &mut resident.embed_tokens,
                ModuleId::LmHead => &mut resident.lm_head,
                ModuleId::Layer { layer, projection } => match resident.projections.get_mut(usize::from(layer)) {
                    Some(projections) => &mut projections[projection as usize],
                    None => return bad(format!("the model has {} layers", config.num_layers)),
                },
            };
            *place = Some(index);
            let (d_in, d_out) = module_shape(module.id, config);
            if (module.d_in as usize, module.d_out as usize) != (d_in, d_out) {
                return bad(format!("expected {d_in} to {d_out}, got {} to {}", module.d_in, module.d_out));
            }
        }
        Ok(resident)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Option<&PackedModule> {
        self.projections[layer][projection as usize].map(|index| &self.host.modules[index])
    }

    fn lm_head(&self) -> Option<&PackedModule> {
        self.lm_head.map(|index| &self.host.modules[index])
    }

    /// The embedding of a token under this adapter, from the base model's in `out [hidden]` (anything, for a token that the base model has
    /// not): the adapter's own row, if it has one, then `out ← scale ⊙ (out + scaling · A[:, token] · Bᵀ) + bias`.
    pub fn change_embedding(&self, token_id: u32, out: &mut [f32], delta: &mut Vec<f32>) {
        let own_row = self.embedding_rows.and_then(|index| {
            let rows = &self.host.token_rows[index];
            let row = rows.token_ids.binary_search(&token_id).ok()?;
            Some((rows.offset_bytes, row))
        });
        let whole = self.replaced_embedding.map(|offset_bytes| (offset_bytes, token_id as usize));
        if let Some((offset_bytes, row)) = own_row.or(whole) {
            read_row(&self.host, offset_bytes, row, out);
        }
        let Some(module) = self.embed_tokens.map(|index| &self.host.modules[index]) else {
            return;
        };
        let columns = token_id as usize * module.lora_rank as usize..(token_id as usize + 1) * module.lora_rank as usize;
        delta.clear();
        delta.resize(out.len(), 0.0);
        match self.host.dtype {
            PackedDtype::F32 => {
                let a = self.host.a_f32(module)[columns].iter().copied();
                let rows = self.host.b_t_f32(module).chunks_exact(out.len());
                for (a, row) in a.zip(rows) {
                    delta.iter_mut().zip(row).for_each(|(delta, b)| *delta += a * b);
                }
            }
            PackedDtype::Bf16 => {
                let a = self.host.a_bf16(module)[columns].iter().copied();
                let rows = self.host.b_t_bf16(module).chunks_exact(out.len());
                for (a, row) in a.zip(rows) {
                    delta.iter_mut().zip(row).for_each(|(delta, b)| *delta += a.to_f32() * b.to_f32());
                }
            }
        }
        out.iter_mut().zip(delta).for_each(|(out, delta)| *out += module.scaling * *delta);
        self.apply_output_terms(module, out);
    }

    /// `y ← scale ⊙ y + bias` for the columns of a module in one row, as [`HostAdapter`] has it.
    fn apply_output_terms(&self, module: &PackedModule, y: &mut [f32]) {
        if let Some(scale) = self.host.output_scale(module) {
            y.iter_mut().zip(scale).for_each(|(y, scale)| *y *= scale);
        }
        if let Some(bias) = self.host.output_bias(module) {
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    }
}

/// `(d_in, d_out)` of a module of the decoder.
pub(in crate::backend) fn module_shape(id: ModuleId, config: &DecoderConfig) -> (usize, usize) {
    let hidden = config.hidden_size;
    match id {
        ModuleId::EmbedTokens => (config.vocab_size, hidden),
        ModuleId::LmHead => (hidden, config.vocab_size),
        ModuleId::Layer { projection, .. } => match projection {
            Projection::Q => (hidden, config.q_size()),
            Projection::K | Projection::V => (hidden, config.kv_size()),
            Projection::O => (config.q_size(), hidden),
            Projection::Gate | Projection::Up => (hidden, config.intermediate_size),
            Projection::Down => (config.intermediate_size, hidden),
        },
    }
}

/// What a LoRA product reads and adds to: `x [m, d_in]`, `y [m, y_stride]`.
pub(super) struct LoraBuffers<'a> {
    pub x: &'a [f32],
    pub d_in: usize,
    pub y: &'a mut [f32],
    pub y_stride: usize,
    pub scratch: &'a mut Vec<f32>,
}

/// Adds the deltas of projections of one layer that share their input; `(projection, first column of y)`.
pub(super) fn add_layer_deltas(
    pool: &ThreadPool,
    segments: &[Segment<'_>],
    layer: usize,
    projections: &[(Projection, usize)],
    buffers: LoraBuffers<'_>,
) {
    let pairs = segments.iter().flat_map(|segment| {
        projections
            .iter()
            .filter_map(move |&(projection, y_offset)| Some((*segment, segment.adapter.projection(layer, projection)?, y_offset)))
    });
    add_deltas(pool, pairs, buffers);
}

/// Logits `[rows, vocab]` of rows that all have a vocabulary of `y_stride` tokens: of the base model's head `head` where no segment says
/// otherwise, of the adapter's own rows where it has some, with its deltas.
pub(super) fn head_logits(pool: &ThreadPool, head: &PackedMatrix, segments: &[Segment<'_>], buffers: LoraBuffers<'_>) {
    let LoraBuffers {
        x,
        d_in,
        y,
        y_stride,
        scratch,
    } = buffers;
    if head.n() == y_stride {
        gemm(pool, x, y.len() / y_stride, head, None, y);
    }
    for segment in segments {
        let (adapter, num_rows) = (segment.adapter, segment.num_rows);
        let x = &x[segment.row_start * d_in..(segment.row_start + num_rows) * d_in];
        let y = &mut y[segment.row_start * y_stride..(segment.row_start + num_rows) * y_stride];
        if let Some(head) = &adapter.replaced_head {
            gemm(pool, x, num_rows, head, None, y);
        } else if head.n() != y_stride {
            let shared = product(pool, x, num_rows, head, scratch);
            let width = head.n().min(y_stride);
            for (y, shared) in y.chunks_exact_mut(y_stride).zip(shared.chunks_exact(head.n())) {
                y[..width].copy_from_slice(&shared[..width]);
            }
        }
        if let Some((index, rows)) = &adapter.head_rows {
            let own = product(pool, x, num_rows, rows, scratch);
            let token_ids = &adapter.host.token_rows[*index].token_ids;
            for (y, own) in y.chunks_exact_mut(y_stride).zip(own.chunks_exact(rows.n())) {
                token_ids.iter().zip(own).for_each(|(&token_id, &logit)| y[token_id as usize] = logit);
            }
        }
    }
    let buffers = LoraBuffers {
        x,
        d_in,
        y,
        y_stride,
        scratch,
    };
    let pairs = segments.iter().filter_map(|segment| Some((*segment, segment.adapter.lm_head()?, 0)));
    add_deltas(pool, pairs, buffers);
}

/// `x · Wᵀ`, in a buffer that is used again.
fn product<'a>(pool: &ThreadPool, x: &[f32], num_rows: usize, weight: &PackedMatrix, scratch: &'a mut Vec<f32>) -> &'a [f32] {
    let len = num_rows * weight.n();
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    gemm(pool, x, num_rows, weight, None, &mut scratch[..len]);
    &scratch[..len]
}

fn add_deltas<'a>(pool: &ThreadPool, pairs: impl Iterator<Item = (Segment<'a>, &'a PackedModule, usize)>, buffers: LoraBuffers<'_>) {
    let mut f32_jobs: Vec<LoraJob<'a, f32>> = Vec::new();
    let mut bf16_jobs: Vec<LoraJob<'a, bf16>> = Vec::new();
    let mut with_output_terms = Vec::new();
    for (segment, module, y_offset) in pairs {
        let host: &'a HostAdapter = &segment.adapter.host;
        if module.output_scale_offset_bytes.is_some() || module.output_bias_offset_bytes.is_some() {
            with_output_terms.push((segment, module, y_offset));
        }
        match host.dtype {
            // A bias alone.
            _ if module.lora_rank == 0 => {}
            PackedDtype::F32 => f32_jobs.push(job(segment, module, y_offset, host.a_f32(module), host.b_t_f32(module))),
            PackedDtype::Bf16 => bf16_jobs.push(job(segment, module, y_offset, host.a_bf16(module), host.b_t_bf16(module))),
        }
    }
    let LoraBuffers {
        x,
        d_in,
        y,
        y_stride,
        scratch,
    } = buffers;
    lora(pool, x, d_in, &f32_jobs, y, y_stride, scratch);
    lora(pool, x, d_in, &bf16_jobs, y, y_stride, scratch);
    for (segment, module, y_offset) in with_output_terms {
        let rows = &mut y[segment.row_start * y_stride..(segment.row_start + segment.num_rows) * y_stride];
        pool.for_rows(rows, y_stride, MIN_ROWS, |_, rows| {
            for row in rows.chunks_exact_mut(y_stride) {
                let columns = &mut row[y_offset..y_offset + module.d_out as usize];
                segment.adapter.apply_output_terms(module, columns);
            }
        });
    }
}

fn job<'a, T>(segment: Segment<'_>, module: &PackedModule, y_offset: usize, a: &'a [T], b_t: &'a [T]) -> LoraJob<'a, T> {
    LoraJob {
        row_start: segment.row_start,
        num_rows: segment.num_rows,
        a,
        b_t,
        lora_rank: module.lora_rank as usize,
        d_out: module.d_out as usize,
        y_offset,
        scaling: module.scaling,
    }
}
