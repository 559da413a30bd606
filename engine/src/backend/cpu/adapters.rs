//! Adapters as the CPU backend holds them: the host's own buffer, and where each pair lies in it.

use std::{collections::HashMap, sync::Arc};

use half::bf16;
use polylora_kernels::cpu::{LoraJob, ThreadPool, lora};

use crate::{
    adapter::{HostAdapter, ModuleId, PackedDtype, PackedModule, Projection},
    backend::BackendError,
    batch::{AdapterHandle, LoraSegment},
    decoder::DecoderConfig,
};

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

    pub fn contains(&self, handle: AdapterHandle) -> bool {
        self.resident.contains_key(&handle)
    }

    pub fn insert(&mut self, host: &Arc<HostAdapter>, config: &DecoderConfig) -> Result<AdapterHandle, BackendError> {
        let available_bytes = self.budget_bytes - self.used_bytes;
        if host.bytes() > available_bytes {
            return Err(BackendError::OutOfMemory {
                what: format!("adapter {}", host.version),
                needed_bytes: host.bytes(),
                available_bytes,
            });
        }
        let resident = Resident::new(host, config)?;
        while self.resident.contains_key(&AdapterHandle(self.next_handle)) {
            self.next_handle = self.next_handle.wrapping_add(1);
        }
        let handle = AdapterHandle(self.next_handle);
        // A handle that was freed is not given again soon: a batch that still names it is found out.
        self.next_handle = self.next_handle.wrapping_add(1);
        self.used_bytes += host.bytes();
        self.resident.insert(handle, resident);
        Ok(handle)
    }

    pub fn remove(&mut self, handle: AdapterHandle) {
        if let Some(resident) = self.resident.remove(&handle) {
            self.used_bytes -= resident.host.bytes();
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

impl Resident {
    fn new(host: &Arc<HostAdapter>, config: &DecoderConfig) -> Result<Self, BackendError> {
        let mut resident = Self {
            host: Arc::clone(host),
            projections: vec![[None; Projection::ALL.len()]; config.num_layers],
            embed_tokens: None,
            lm_head: None,
        };
        if let Some(replaced) = host.replaced.first() {
            let reason = format!(
                "adapter {}: {:?}: replaced weights are not applied by this backend",
                host.version, replaced.id
            );
            return Err(BackendError::BadBatch(reason));
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
            if module.output_scale_offset_bytes.is_some() || module.output_bias_offset_bytes.is_some() {
                return bad("scales and biases on outputs are not applied by this backend".to_owned());
            }
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

    /// `out[hidden] += scaling · A[:, token] · Bᵀ` if the adapter changes the embedding.
    pub fn add_embedding_delta(&self, token_id: u32, out: &mut [f32], delta: &mut Vec<f32>) {
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

/// Adds the deltas of the head.
pub(super) fn add_head_deltas(pool: &ThreadPool, segments: &[Segment<'_>], buffers: LoraBuffers<'_>) {
    let pairs = segments.iter().filter_map(|segment| Some((*segment, segment.adapter.lm_head()?, 0)));
    add_deltas(pool, pairs, buffers);
}

fn add_deltas<'a>(pool: &ThreadPool, pairs: impl Iterator<Item = (Segment<'a>, &'a PackedModule, usize)>, buffers: LoraBuffers<'_>) {
    let mut f32_jobs: Vec<LoraJob<'a, f32>> = Vec::new();
    let mut bf16_jobs: Vec<LoraJob<'a, bf16>> = Vec::new();
    for (segment, module, y_offset) in pairs {
        let host: &'a HostAdapter = &segment.adapter.host;
        match host.dtype {
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
