//! The forward pass: which kernel is launched when, on which buffers.

use half::bf16;
use polylora_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Kernels, Stream, View,
    activation::Gate,
    attention_decode::{AttentionDecode, AttentionDecodeArgs},
    attention_prefill::{AttentionPrefillArgs, PrefillTile},
    embedding::EmbeddingArgs,
    gemm::{Gemm, GemmArgs, GemmBias, GemmOutput, OwnGemm, Tuned},
    lora::{ExpandInto, ItemRows, Lora, LoraItem, LoraItems, RANK_TILE, ShrinkInput, Shrunk},
    lora_output::{LoraOutput, OutputInto},
    own_logits::{LogitsCopy, TokenRowsItem},
    rms_norm::RmsNormArgs,
    rope_kv::{HeadShape, RopeKvArgs},
};

use super::{
    adapters::{Group, head_descriptor_offset},
    head::{HeadChunk, HeadDeltas, LogitsBuffer, OwnHead},
    model::{Layer, Linear, Model},
    plan::{ForwardPlaces, LoraShape, StepShape},
    staging::{Place, Staging},
};
use crate::decoder::{Activation, DecoderConfig};

/// Parts of the columns that a shrink splits among blocks when rows are few, and when they are many.
const SPLITS_OF_FEW_ROWS: usize = 16;
const SPLITS_OF_MANY_ROWS: usize = 8;
/// Rows from which they are many.
const MANY_ROWS: usize = 512;
/// Places in [`ForwardPlaces::counts`].
const EXPAND_COUNT: usize = 0;
const SHRINK_COUNT: usize = 1;
const COVERING_COUNT: usize = 5;
const OUTPUT_COUNT: usize = 6;
/// Rows that an adapter's own head takes at a time: the most of the kernel that needs no plan for each number of rows.
const OWN_HEAD_ROWS: usize = 32;
/// Blocks of a launch of clusters, for each multiprocessor: about as many as are there at once, since clusters start slower.
const CLUSTERED_BLOCKS_PER_MULTIPROCESSOR: u32 = 4;
/// Blocks of a launch whose blocks stride over their work, for each multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 16;

/// Buffers of a step, made once; `[max_rows, width]` row-major, of which a step uses the first rows. Zero at first: what padded rows hold
/// stays finite.
pub(super) struct Workspace {
    /// The residual stream, `[hidden]`.
    residual: DeviceBuffer<f32>,
    /// Input of a block's projections, `[hidden]`.
    normed: DeviceBuffer<bf16>,
    /// `[q + 2·kv]`
    qkv: DeviceBuffer<bf16>,
    /// `[q]`
    attention_out: DeviceBuffer<bf16>,
    /// `[2·intermediate]`; while o and down are computed, residual rows that are set aside, `[hidden]` f32.
    gate_up: DeviceBuffer<bf16>,
    /// `[intermediate]`
    activated: DeviceBuffer<bf16>,
    /// Between shrink and expand.
    shrunk: DeviceBuffer<bf16>,
    shrunk_partial: DeviceBuffer<f32>,
    shrunk_counters: DeviceBuffer<u32>,
    v_stride: usize,
    /// Of decode attention.
    partial: DeviceBuffer<f32>,
    counters: DeviceBuffer<u32>,
    /// Of the sample rows that are computed at once, as [`LogitsBuffer`] deals it out.
    pub logits: DeviceBuffer<f32>,
    /// Token ids that the last step chose, by sample.
    pub chosen: DeviceBuffer<u32>,
    max_rows: usize,
    pub logits_buffer: LogitsBuffer,
}

/// Sizes that a workspace is made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct WorkspaceSize {
    pub max_rows: usize,
    pub max_logits_rows: usize,
    pub max_lora_rank: usize,
}

impl Workspace {
    pub fn new(stream: &Stream, config: &DecoderConfig, shape: &HeadShape, size: WorkspaceSize) -> Result<Self, CudaError> {
        let WorkspaceSize {
            max_rows,
            max_logits_rows,
            max_lora_rank,
        } = size;
        let v_stride = 3 * max_lora_rank.next_multiple_of(RANK_TILE);
        let logits_buffer = LogitsBuffer::new(config, max_logits_rows);
        let partial_len = |rows: usize| AttentionDecode::partial_len(shape, rows, splits_for(shape, rows, stream.device()));
        Ok(Self {
            residual: DeviceBuffer::zeroed(stream, max_rows * config.hidden_size)?,
            normed: DeviceBuffer::zeroed(stream, max_rows * config.hidden_size)?,
            qkv: DeviceBuffer::zeroed(stream, max_rows * shape.qkv_width())?,
            attention_out: DeviceBuffer::zeroed(stream, max_rows * config.q_size())?,
            gate_up: DeviceBuffer::zeroed(stream, max_rows * 2 * config.intermediate_size.max(config.hidden_size))?,
            activated: DeviceBuffer::zeroed(stream, max_rows * config.intermediate_size)?,
            shrunk: DeviceBuffer::zeroed(stream, max_rows * v_stride)?,
            shrunk_partial: DeviceBuffer::zeroed(stream, shrunk_rows(max_rows) * v_stride)?,
            shrunk_counters: DeviceBuffer::zeroed(stream, max_rows * v_stride / RANK_TILE)?,
            v_stride,
            partial: DeviceBuffer::zeroed(stream, (1..=max_rows).map(partial_len).max().unwrap_or(0))?,
            counters: DeviceBuffer::zeroed(stream, max_rows * shape.num_kv_heads)?,
            logits: DeviceBuffer::zeroed(stream, logits_buffer.len)?,
            chosen: DeviceBuffer::zeroed(stream, max_rows)?,
            max_rows,
            logits_buffer,
        })
    }
}

/// Rows of the shrink's output over all splits, at most.
fn shrunk_rows(max_rows: usize) -> usize {
    let few = max_rows.min(MANY_ROWS) * SPLITS_OF_FEW_ROWS;
    few.max(max_rows * SPLITS_OF_MANY_ROWS)
}

fn splits_for(shape: &HeadShape, rows: usize, device: &Device) -> usize {
    AttentionDecode::splits_for(shape, rows, device.num_multiprocessors())
}

/// What does not change from step to step.
pub(super) struct Forward<'a> {
    pub config: &'a DecoderConfig,
    pub shape: HeadShape,
    pub kernels: &'a Kernels,
    pub model: &'a Model,
    /// `[num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]`.
    pub kv_cache: View<'a, bf16>,
    pub cos_sin: &'a DeviceBuffer<[f32; 2]>,
    pub workspace: &'a Workspace,
    pub stream: &'a Stream,
}

/// The step's metadata on the device.
pub(super) struct StepViews<'a> {
    pub forward: &'a Staging,
    pub places: ForwardPlaces,
    pub block_tables: View<'a, u32>,
    pub prefill_tiles: View<'a, PrefillTile>,
}

impl Forward<'_> {
    /// Enqueues embedding and layers: afterwards the residual stream holds every row's last hidden state.
    pub fn layers(&self, gemm: &mut Gemm, step: &StepShape, views: &StepViews<'_>) -> Result<(), CudaError> {
        let w = self.workspace;
        debug_assert!(step.rows <= w.max_rows);
        self.kernels.embedding.launch(
            self.stream,
            &EmbeddingArgs {
                out: w.residual.view(),
                table: self.model.embedding.view(),
                token_sources: views.forward.view(views.places.token_sources),
                chosen: w.chosen.view(),
                adapters: views.forward.view(views.places.embedding_adapters),
                rows: step.rows,
                hidden: self.config.hidden_size,
            },
        )?;
        if let Some(first) = self.model.layers.first() {
            self.norm(&first.input_norm, step.rows)?;
        }
        for (layer_idx, layer) in self.model.layers.iter().enumerate() {
            self.attention_block(gemm, step, views, layer_idx, layer)?;
            self.mlp_block(gemm, step, views, layer_idx, layer)?;
        }
        Ok(())
    }

    fn attention_block(&self, gemm: &mut Gemm, step: &StepShape, views: &StepViews<'_>, layer_idx: usize, layer: &Layer) -> Result<(), CudaError> {
        let (w, config, rows) = (self.workspace, self.config, step.rows);
        let widths = [config.q_size(), config.kv_size(), config.kv_size()];
        let qkv = bf16_args(&layer.qkv, w.normed.view(), w.qkv.view(), rows);
        self.gemm_and_shrink(gemm, step, views, Group::Qkv, layer_idx, &qkv)?;
        let kv = self.layer_kv(layer_idx);
        let rope = RopeKvArgs {
            shape: self.shape,
            qkv: w.qkv.view(),
            positions: views.forward.view(views.places.positions),
            kv_slots: views.forward.view(views.places.kv_slots),
            cos_sin: self.cos_sin.view(),
            qk_norm: layer.qk_norm.as_ref().map(|(q, k)| (q.view(), k.view())),
            k_cache: kv[0],
            v_cache: kv[1],
            rows,
            eps: config.rms_norm_eps,
        };
        match step.lora {
            Some(lora) if !lora.has_output_terms[Group::Qkv as usize] && Lora::can_rotate(config.head_dim) => {
                let units = max_items(step.rows, lora) * Lora::column_tiles(&widths);
                let work = self.covering_items(step, views, Group::Qkv, layer_idx, units);
                let shrunk = self.shrunk(config.hidden_size, rows);
                self.kernels.lora.launch_expand_rope(self.stream, work, shrunk, &rope)?;
            }
            _ => {
                let y = ExpandInto::Bf16(w.qkv.view());
                self.expand(step, views, Group::Qkv, layer_idx, config.hidden_size, y, &widths)?;
                self.output_terms(step, views, Group::Qkv, layer_idx, OutputInto::Bf16(w.qkv.view()), &widths)?;
                self.kernels.rope_kv.launch(self.stream, &rope)?;
            }
        }
        self.attention(step, views, kv)?;
        self.set_aside(step, views, Group::O, layer_idx)?;
        let o = add_args(&layer.o, w.attention_out.view(), w.residual.view(), rows);
        self.gemm_and_shrink(gemm, step, views, Group::O, layer_idx, &o)?;
        self.expand_and_norm(step, views, Group::O, layer_idx, config.q_size(), Some(&layer.post_attention_norm))
    }

    /// Adds a group's deltas, scales and biases to the residual stream and norms it for the next block, if there is one: in one kernel under few
    /// adapters. Under many, whose B it waits for, two are faster.
    fn expand_and_norm(
        &self,
        step: &StepShape,
        views: &StepViews<'_>,
        group: Group,
        layer: usize,
        d_in: usize,
        norm: Option<&DeviceBuffer<bf16>>,
    ) -> Result<(), CudaError> {
        let (lora, hidden) = (&self.kernels.lora, self.config.hidden_size);
        if let (Some(shape), Some(weight)) = (step.lora, norm)
            && shape.item_rows == ItemRows::UpTo16
            && !shape.has_output_terms[group as usize]
            && lora.can_norm(hidden)
        {
            let units = max_items(step.rows, shape) * Lora::column_tiles(&[hidden]);
            let mut work = self.covering_items(step, views, group, layer, units);
            work.grid = work
                .grid
                .min(CLUSTERED_BLOCKS_PER_MULTIPROCESSOR * self.stream.device().num_multiprocessors());
            return lora.launch_expand_norm(self.stream, work, self.shrunk(d_in, step.rows), &self.norm_args(weight, step.rows));
        }
        let y = ExpandInto::F32(self.workspace.residual.view());
        self.expand(step, views, group, layer, d_in, y, &[hidden])?;
        self.output_terms(step, views, group, layer, self.back_to_residual(), &[hidden])?;
        norm.map_or(Ok(()), |weight| self.norm(weight, step.rows))
    }

    /// K and V of a layer, from that of block 0 on.
    fn layer_kv(&self, layer: usize) -> [View<'_, bf16>; 2] {
        [0, 1].map(|kv| self.kv_cache.slice((2 * layer + kv) * self.shape.block_len()..self.kv_cache.len()))
    }

    fn attention(&self, step: &StepShape, views: &StepViews<'_>, kv: [View<'_, bf16>; 2]) -> Result<(), CudaError> {
        let w = self.workspace;
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        if step.decode_rows > 0 {
            let args = AttentionDecodeArgs {
                shape: self.shape,
                out: w.attention_out.view(),
                q: w.qkv.view(),
                q_stride: self.shape.qkv_width(),
                k_cache: kv[0],
                v_cache: kv[1],
                rows: Some(views.forward.view(views.places.decode_rows)),
                context_lens: views.forward.view(views.places.context_lens),
                block_table_starts: views.forward.view(views.places.block_table_starts),
                block_tables: views.block_tables,
                partial: w.partial.view(),
                counters: w.counters.view(),
                sequences: step.decode_rows,
                max_splits: splits_for(&self.shape, step.decode_rows, self.stream.device()),
                window: self.config.sliding_window,
                scale,
            };
            self.kernels.attention_decode.launch(self.stream, &args)?;
        }
        if step.prefill_tiles > 0 {
            let args = AttentionPrefillArgs {
                shape: self.shape,
                out: w.attention_out.view(),
                q: w.qkv.view(),
                q_stride: self.shape.qkv_width(),
                k_cache: kv[0],
                v_cache: kv[1],
                tiles: views.prefill_tiles,
                block_tables: views.block_tables,
                window: self.config.sliding_window,
                scale,
            };
            self.kernels.attention_prefill.launch(self.stream, &args)?;
        }
        Ok(())
    }

    fn mlp_block(&self, gemm: &mut Gemm, step: &StepShape, views: &StepViews<'_>, layer_idx: usize, layer: &Layer) -> Result<(), CudaError> {
        let (w, config, rows) = (self.workspace, self.config, step.rows);
        let ffn = config.intermediate_size;
        let gate_up = bf16_args(&layer.gate_up, w.normed.view(), w.gate_up.view(), rows);
        // One kernel does both where no deltas come in between and it was measured to be faster.
        let is_activated = step.lora.is_none() && gate_up.bias.is_none() && gemm.launch_gated(self.stream, &self.gated_args(layer, rows))?;
        if !is_activated {
            self.gemm_and_shrink(gemm, step, views, Group::GateUp, layer_idx, &gate_up)?;
            self.add_and_activate(step, views, layer_idx)?;
        }
        self.set_aside(step, views, Group::Down, layer_idx)?;
        let down = add_args(&layer.down, w.activated.view(), w.residual.view(), rows);
        self.gemm_and_shrink(gemm, step, views, Group::Down, layer_idx, &down)?;
        let next = self.model.layers.get(layer_idx + 1).map(|next| &next.input_norm);
        self.expand_and_norm(step, views, Group::Down, layer_idx, ffn, next)
    }

    fn gate(&self) -> Gate {
        match self.config.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        }
    }

    /// Gate, up and activation as one.
    fn gated_args<'v>(&'v self, layer: &'v Layer, rows: usize) -> GemmArgs<'v> {
        let w = self.workspace;
        GemmArgs {
            bias: None,
            y: GemmOutput::Gated(w.activated.view(), self.gate()),
            ..bf16_args(&layer.gate_up, w.normed.view(), w.gate_up.view(), rows)
        }
    }

    /// The activation of what the GEMM of gate and up left.
    fn activate(&self, rows: usize) -> Result<(), CudaError> {
        let (from, to) = self.gate_up_and_activated();
        let ffn = self.config.intermediate_size;
        self.kernels.activation.launch(self.stream, self.gate(), from, to, rows, ffn)
    }

    fn gate_up_and_activated(&self) -> (View<'_, bf16>, View<'_, bf16>) {
        let w = self.workspace;
        let gate_up = w.gate_up.view().first(w.max_rows * 2 * self.config.intermediate_size);
        (gate_up, w.activated.view())
    }

    /// The same with the deltas of gate and up added on the way, if any row has some.
    fn add_and_activate(&self, step: &StepShape, views: &StepViews<'_>, layer: usize) -> Result<(), CudaError> {
        let ffn = self.config.intermediate_size;
        let Some(lora) = step.lora else {
            return self.activate(step.rows);
        };
        let (gate_up, activated) = self.gate_up_and_activated();
        if !lora.is_gated {
            let y = ExpandInto::Bf16(gate_up);
            self.expand(step, views, Group::GateUp, layer, self.config.hidden_size, y, &[ffn, ffn])?;
            self.output_terms(step, views, Group::GateUp, layer, OutputInto::Bf16(gate_up), &[ffn, ffn])?;
            return self.activate(step.rows);
        }
        let units = max_items(step.rows, lora) * Lora::gated_column_tiles(ffn);
        let work = self.covering_items(step, views, Group::GateUp, layer, units);
        let shrunk = self.shrunk(self.config.hidden_size, step.rows);
        let buffers = (gate_up, activated);
        self.kernels
            .lora
            .launch_expand_gated(self.stream, work, shrunk, self.gate(), buffers, ffn)
    }

    /// Enqueues the logits of residual rows `rows` into the workspace, with what adapters have on the head and of it.
    pub fn logits(&self, gemm: &mut Gemm, rows: View<'_, u32>, head: &HeadChunk<'_>, views: &HeadViews<'_>) -> Result<(), CudaError> {
        let (w, config) = (self.workspace, self.config);
        let num_rows = rows.len();
        self.kernels.rms_norm.launch(
            self.stream,
            &RmsNormArgs {
                residual: w.residual.view(),
                x: None,
                weight: self.model.final_norm.view(),
                y: w.normed.view(),
                gather: Some(rows),
                rows: num_rows,
                eps: config.rms_norm_eps,
            },
        )?;
        if head.base_rows > 0 {
            gemm.launch(self.stream, &self.head_args(head.base_rows))?;
        }
        head.own.iter().try_for_each(|own| self.own_head(gemm, own))?;
        let (kernels, logits) = (&self.kernels.own_logits, w.logits.view());
        if !views.copies.is_empty() {
            kernels.launch_copy(self.stream, logits, views.copies, head.max_copy_len())?;
        }
        if !views.token_rows.is_empty() {
            let (x, max_tokens) = (w.normed.view(), head.max_token_rows());
            kernels.launch_token_rows(self.stream, logits, x, config.hidden_size, views.token_rows, max_tokens)?;
        }
        for (deltas, views) in head.deltas.iter().zip(&views.deltas) {
            self.head_deltas(deltas, views)?;
        }
        Ok(())
    }

    /// Enqueues the logits of rows whose adapter brings its own head, over whatever was computed for them.
    fn own_head(&self, gemm: &Gemm, own: &OwnHead<'_>) -> Result<(), CudaError> {
        let (w, hidden) = (self.workspace, self.config.hidden_size);
        for first in (0..own.num_rows).step_by(OWN_HEAD_ROWS) {
            let num_rows = OWN_HEAD_ROWS.min(own.num_rows - first);
            let x = (own.row_start + first) * hidden..(own.row_start + first + num_rows) * hidden;
            let y = own.logits_start + first * own.width..own.logits_start + (first + num_rows) * own.width;
            let args = GemmArgs {
                x: w.normed.view().slice(x),
                w: own.weight,
                bias: None,
                y: GemmOutput::F32(w.logits.view().slice(y)),
                m: num_rows,
                n: own.width,
                k: hidden,
            };
            gemm.launch_own(self.stream, &args, OwnGemm::Skinny)?;
        }
        Ok(())
    }

    /// Enqueues deltas, scales and biases on logits that lie side by side.
    fn head_deltas(&self, deltas: &HeadDeltas, views: &HeadDeltasViews<'_>) -> Result<(), CudaError> {
        let (w, config) = (self.workspace, self.config);
        let HeadDeltasViews {
            counts,
            expand,
            shrink,
            output,
        } = *views;
        let x = w.normed.view().slice(deltas.row_start * config.hidden_size..w.normed.len());
        let y = w.logits.view().slice(deltas.logits_start..w.logits.len());
        let widths = [deltas.width];
        let most = self.most_blocks();
        let work = |items, num_items, grid| LoraItems {
            items,
            num_items,
            rows: ItemRows::UpTo64,
            descriptor_offset: head_descriptor_offset(config),
            grid,
        };
        if !expand.is_empty() {
            let shrunk = self.shrunk(config.hidden_size, deltas.num_rows);
            let shrink_grid = (shrink.len() * shrunk.num_splits) as u32;
            let shrink = work(shrink, counts.slice(1..2), shrink_grid.min(most));
            let input = ShrinkInput {
                x,
                d_in: config.hidden_size,
                is_ready: false,
            };
            self.kernels.lora.launch_shrink(self.stream, shrink, input, shrunk)?;
            let expand_grid = (expand.len() * Lora::column_tiles(&widths)) as u32;
            let expand = work(expand, counts.slice(0..1), expand_grid.min(most));
            self.kernels
                .lora
                .launch_expand(self.stream, expand, shrunk, ExpandInto::F32(y), &widths)?;
        }
        if output.is_empty() {
            return Ok(());
        }
        let output_grid = (output.len() * LoraOutput::column_tiles(&widths)) as u32;
        let output = work(output, counts.slice(2..3), output_grid.min(most));
        self.kernels.lora_output.launch(self.stream, output, OutputInto::F32(y), &widths)
    }

    /// Picks the algorithms of a step with so many rows, by measuring. The buffers are left with any values, the residual with zeros.
    pub fn tune(&self, gemm: &mut Gemm, rows: usize) -> Result<Tuned, CudaError> {
        let mut tuned = Tuned::default();
        let (w, layers) = (self.workspace, &self.model.layers);
        let Some(layer) = layers.first() else { return Ok(tuned) };
        let weights = |of: fn(&Layer) -> View<'_, bf16>| layers.iter().map(of).collect::<Vec<_>>();
        let before = || self.norm(&layer.input_norm, rows);
        let mut tune = |gemm: &mut Gemm, args: &GemmArgs<'_>, weights: &[View<'_, bf16>]| {
            tuned += gemm.tune(self.stream, args, weights, before)?;
            Ok::<_, CudaError>(())
        };
        let qkv = bf16_args(&layer.qkv, w.normed.view(), w.qkv.view(), rows);
        tune(gemm, &qkv, &weights(|layer| layer.qkv.weight.view()))?;
        let o = add_args(&layer.o, w.attention_out.view(), w.residual.view(), rows);
        tune(gemm, &o, &weights(|layer| layer.o.weight.view()))?;
        let gate_up = bf16_args(&layer.gate_up, w.normed.view(), w.gate_up.view(), rows);
        tune(gemm, &gate_up, &weights(|layer| layer.gate_up.weight.view()))?;
        let down = add_args(&layer.down, w.activated.view(), w.residual.view(), rows);
        tune(gemm, &down, &weights(|layer| layer.down.weight.view()))?;
        if rows <= w.logits_buffer.max_rows {
            tune(gemm, &self.head_args(rows), &[self.model.head()])?;
        }
        if gate_up.bias.is_none() {
            let weights = weights(|layer| layer.gate_up.weight.view());
            tuned += gemm.tune_gated(self.stream, &self.gated_args(layer, rows), &weights, before, |gemm, weight| {
                gemm.launch(self.stream, &GemmArgs { w: weight, ..gate_up })?;
                self.activate(rows)
            })?;
        }
        // Sums that were added again and again may have overflowed; padded rows are never written.
        self.stream.fill_bytes(w.residual.view(), 0)?;
        Ok(tuned)
    }

    fn head_args(&self, rows: usize) -> GemmArgs<'_> {
        GemmArgs {
            x: self.workspace.normed.view(),
            w: self.model.head(),
            bias: None,
            y: GemmOutput::F32(self.workspace.logits.view()),
            m: rows,
            n: self.config.vocab_size,
            k: self.config.hidden_size,
        }
    }

    fn norm(&self, weight: &DeviceBuffer<bf16>, rows: usize) -> Result<(), CudaError> {
        self.kernels.rms_norm.launch(self.stream, &self.norm_args(weight, rows))
    }

    fn norm_args<'v>(&'v self, weight: &'v DeviceBuffer<bf16>, rows: usize) -> RmsNormArgs<'v> {
        RmsNormArgs {
            residual: self.workspace.residual.view(),
            x: None,
            weight: weight.view(),
            y: self.workspace.normed.view(),
            gather: None,
            rows,
            eps: self.config.rms_norm_eps,
        }
    }

    /// Enqueues a group's GEMM and, if any row runs under an adapter, `x · Aᵀ` of every adapter's: beside it where it is one of our own.
    fn gemm_and_shrink(
        &self,
        gemm: &mut Gemm,
        step: &StepShape,
        views: &StepViews<'_>,
        group: Group,
        layer: usize,
        args: &GemmArgs<'_>,
    ) -> Result<(), CudaError> {
        let Some(lora) = step.lora else {
            return gemm.launch(self.stream, args);
        };
        let is_ready = gemm.launch_beside(self.stream, args)?;
        let shrunk = self.shrunk(args.k, step.rows);
        // Blocks for rank 16 in every item; higher ranks make them stride.
        let units = max_items(step.rows, lora) * group.num_slices() * shrunk.num_splits;
        let items = views.places.shrink_items;
        let work = self.lora_items(step, views, items, SHRINK_COUNT + group as usize, group.descriptor_offset(layer), units);
        let input = ShrinkInput {
            x: args.x,
            d_in: args.k,
            is_ready,
        };
        self.kernels.lora.launch_shrink(self.stream, work, input, shrunk)
    }

    /// Enqueues the second half: adds every adapter's deltas to `y`.
    #[expect(clippy::too_many_arguments, reason = "a group's shapes, one by one")]
    fn expand(
        &self,
        step: &StepShape,
        views: &StepViews<'_>,
        group: Group,
        layer: usize,
        d_in: usize,
        y: ExpandInto<'_>,
        d_out: &[usize],
    ) -> Result<(), CudaError> {
        let Some(lora) = step.lora else { return Ok(()) };
        let units = max_items(step.rows, lora) * Lora::column_tiles(d_out);
        let items = views.places.expand_items;
        let work = self.lora_items(step, views, items, EXPAND_COUNT, group.descriptor_offset(layer), units);
        self.kernels.lora.launch_expand(self.stream, work, self.shrunk(d_in, step.rows), y, d_out)
    }

    /// Enqueues the scales and biases that adapters have on a group's outputs, if any row runs under one that has.
    fn output_terms(
        &self,
        step: &StepShape,
        views: &StepViews<'_>,
        group: Group,
        layer: usize,
        y: OutputInto<'_>,
        d_out: &[usize],
    ) -> Result<(), CudaError> {
        match self.output_items(step, views, group, layer, d_out) {
            Some(work) => self.kernels.lora_output.launch(self.stream, work, y, d_out),
            None => Ok(()),
        }
    }

    /// Before a projection that is added to the residual stream: moves the rows away whose outputs of this group have scales or biases.
    fn set_aside(&self, step: &StepShape, views: &StepViews<'_>, group: Group, layer: usize) -> Result<(), CudaError> {
        let hidden = self.config.hidden_size;
        let Some(work) = self.output_items(step, views, group, layer, &[hidden]) else {
            return Ok(());
        };
        let (y, saved) = (self.workspace.residual.view(), self.saved_rows());
        self.kernels.lora_output.launch_set_aside(self.stream, work, y, saved, hidden)
    }

    /// What brings them back.
    fn back_to_residual(&self) -> OutputInto<'_> {
        OutputInto::Residual {
            y: self.workspace.residual.view(),
            saved: self.saved_rows(),
        }
    }

    fn saved_rows(&self) -> View<'_, f32> {
        self.workspace.gate_up.view().cast()
    }

    fn output_items<'v>(&self, step: &StepShape, views: &StepViews<'v>, group: Group, layer: usize, d_out: &[usize]) -> Option<LoraItems<'v>> {
        let lora = step.lora.filter(|lora| lora.has_output_terms[group as usize])?;
        let units = step.rows.div_ceil(lora.output_item_rows()) * LoraOutput::column_tiles(d_out);
        let items = views.places.output_items;
        Some(self.lora_items(step, views, items, OUTPUT_COUNT, group.descriptor_offset(layer), units))
    }

    /// Items with their count; `units` of work at most, usually.
    fn lora_items<'v>(
        &self,
        step: &StepShape,
        views: &StepViews<'v>,
        items: Place<LoraItem>,
        count: usize,
        descriptor_offset: u32,
        units: usize,
    ) -> LoraItems<'v> {
        LoraItems {
            items: views.forward.view(items),
            num_items: views.forward.view(views.places.counts).slice(count..count + 1),
            rows: step.lora.map_or(ItemRows::UpTo8, |lora| lora.item_rows),
            descriptor_offset,
            grid: (units as u32).min(self.most_blocks()),
        }
    }

    /// Items over every row, with and without adapters.
    fn covering_items<'v>(&self, step: &StepShape, views: &StepViews<'v>, group: Group, layer: usize, units: usize) -> LoraItems<'v> {
        let items = views.places.covering_items;
        self.lora_items(step, views, items, COVERING_COUNT, group.descriptor_offset(layer), units)
    }

    fn shrunk(&self, d_in: usize, rows: usize) -> Shrunk<'_> {
        let max_splits = if rows > MANY_ROWS { SPLITS_OF_MANY_ROWS } else { SPLITS_OF_FEW_ROWS };
        Shrunk {
            v: self.workspace.shrunk.view(),
            partial: self.workspace.shrunk_partial.view(),
            counters: self.workspace.shrunk_counters.view(),
            num_splits: Lora::num_splits(d_in, max_splits),
            rows,
            v_stride: self.workspace.v_stride,
        }
    }

    fn most_blocks(&self) -> u32 {
        BLOCKS_PER_MULTIPROCESSOR * self.stream.device().num_multiprocessors()
    }
}

/// A [`HeadChunk`]'s lists on the device.
pub(super) struct HeadViews<'a> {
    pub copies: View<'a, LogitsCopy>,
    pub token_rows: View<'a, TokenRowsItem>,
    pub deltas: Vec<HeadDeltasViews<'a>>,
}

/// A [`HeadDeltas`]' items on the device; `counts` are those of the expand, of the shrink, and of scales and biases.
pub(super) struct HeadDeltasViews<'a> {
    pub counts: View<'a, u32>,
    pub expand: View<'a, LoraItem>,
    pub shrink: View<'a, LoraItem>,
    pub output: View<'a, LoraItem>,
}

/// Items of a step with so many rows, usually: one a row when decoding, else of 64 rows.
fn max_items(rows: usize, lora: LoraShape) -> usize {
    match lora.item_rows {
        ItemRows::UpTo16 => 2 * rows.div_ceil(16),
        ItemRows::UpTo64 => rows.div_ceil(64) + 64.min(rows),
        ItemRows::UpTo8 | ItemRows::Naive => rows,
    }
}

fn bf16_args<'a>(linear: &'a Linear<bf16>, x: View<'a, bf16>, y: View<'a, bf16>, rows: usize) -> GemmArgs<'a> {
    GemmArgs {
        x,
        w: linear.weight.view(),
        bias: linear.bias.as_ref().map(|bias| GemmBias::Bf16(bias.view())),
        y: GemmOutput::Bf16(y),
        m: rows,
        n: linear.n,
        k: linear.k,
    }
}

fn add_args<'a>(linear: &'a Linear<f32>, x: View<'a, bf16>, y: View<'a, f32>, rows: usize) -> GemmArgs<'a> {
    GemmArgs {
        x,
        w: linear.weight.view(),
        bias: linear.bias.as_ref().map(|bias| GemmBias::F32(bias.view())),
        y: GemmOutput::AddF32(y),
        m: rows,
        n: linear.n,
        k: linear.k,
    }
}
