//! The forward pass of the decoder, for the rows of one step.

use polylora_kernels::cpu::{
    AttentionSequence, AttentionShape, ThreadPool, add_rms_norm, gelu_tanh_mul, gemm, paged_attention, rms_norm, rope, silu_mul, write_kv,
};

use super::{
    LayerKv,
    adapters::{LoraBuffers, Segment, add_layer_deltas},
    model::{Layer, Linear, Model},
};
use crate::{
    adapter::Projection,
    batch::{SampleRow, StepBatch},
    decoder::{Activation, DecoderConfig, RopeTables},
};

/// Rows that one thread takes at least of work that is little for each.
const MIN_ROWS: usize = 8;

/// Logits are computed for as many sample rows at once as fit in this.
const LOGITS_BYTES: usize = 32 << 20;

/// Buffers of a step, made once; `[max_batch_tokens, width]` row-major, of which a step uses the first rows.
pub(super) struct Workspace {
    /// The residual stream, `[hidden]`.
    residual: Vec<f32>,
    /// Input of a block's projections; after a step, the sample rows under the final norm. `[hidden]`
    pub normed: Vec<f32>,
    /// Output of a block, not yet added. `[hidden]`
    block_out: Vec<f32>,
    /// `[q + 2·kv]`
    qkv: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// `[q]`
    attention_out: Vec<f32>,
    /// `[2·intermediate]`
    gate_up: Vec<f32>,
    /// `[intermediate]`
    activated: Vec<f32>,
    /// Logits of the sample rows that are computed at once, `[vocab]`.
    pub logits: Vec<f32>,
    /// Shrunk rows of adapters.
    pub lora: Vec<f32>,
}

impl Workspace {
    pub fn new(config: &DecoderConfig, max_batch_tokens: usize) -> Self {
        let rows = |width: usize| vec![0.0; max_batch_tokens * width];
        let logits_rows = (LOGITS_BYTES / (config.vocab_size * size_of::<f32>()))
            .clamp(16, 256)
            .min(max_batch_tokens);
        Self {
            residual: rows(config.hidden_size),
            normed: rows(config.hidden_size),
            block_out: rows(config.hidden_size),
            qkv: rows(config.q_size() + 2 * config.kv_size()),
            q: rows(config.q_size()),
            k: rows(config.kv_size()),
            v: rows(config.kv_size()),
            attention_out: rows(config.q_size()),
            gate_up: rows(2 * config.intermediate_size),
            activated: rows(config.intermediate_size),
            logits: vec![0.0; logits_rows * config.vocab_size],
            lora: Vec::new(),
        }
    }
}

/// Segments cut to the rows `first .. first + num_rows`, counted from there.
pub(super) fn within<'a>(segments: &[Segment<'a>], first: usize, num_rows: usize) -> Vec<Segment<'a>> {
    let cut = |segment: &Segment<'a>| {
        let start = segment.row_start.max(first);
        let end = (segment.row_start + segment.num_rows).min(first + num_rows);
        (start < end).then(|| Segment {
            row_start: start - first,
            num_rows: end - start,
            ..*segment
        })
    };
    segments.iter().filter_map(cut).collect()
}

/// Segments over the sample rows: row `i` is that of `samples[i]`.
pub(super) fn of_samples<'a>(segments: &[Segment<'a>], samples: &[SampleRow]) -> Vec<Segment<'a>> {
    let place = |segment: &Segment<'a>| {
        let before = |end: usize| samples.partition_point(|sample| (sample.row as usize) < end);
        let (row_start, end) = (before(segment.row_start), before(segment.row_start + segment.num_rows));
        (row_start < end).then(|| Segment {
            row_start,
            num_rows: end - row_start,
            ..*segment
        })
    };
    segments.iter().filter_map(place).collect()
}

/// How many of the rows `first .. num_rows` have logits of one width, counted from `first`, and that width.
pub(super) fn rows_of_one_vocab(segments: &[Segment<'_>], first: usize, num_rows: usize, base_vocab_size: usize) -> (usize, usize) {
    let own = segments.iter().filter(|segment| segment.adapter.vocab_size != base_vocab_size);
    let mut next_own = own.skip_while(|segment| segment.row_start + segment.num_rows <= first);
    match next_own.next() {
        Some(segment) if segment.row_start <= first => (segment.row_start + segment.num_rows - first, segment.adapter.vocab_size),
        Some(segment) => (segment.row_start - first, base_vocab_size),
        None => (num_rows - first, base_vocab_size),
    }
}

/// One step: what it reads, and how its rows lie.
pub(super) struct Forward<'a> {
    config: &'a DecoderConfig,
    pool: &'a ThreadPool,
    model: &'a Model,
    rope: &'a RopeTables,
    attention: &'a AttentionShape,
    batch: &'a StepBatch,
    sequences: Vec<AttentionSequence<'a>>,
    segments: Vec<Segment<'a>>,
}

impl<'a> Forward<'a> {
    pub fn new(
        config: &'a DecoderConfig,
        pool: &'a ThreadPool,
        model: &'a Model,
        rope: &'a RopeTables,
        attention: &'a AttentionShape,
        batch: &'a StepBatch,
        segments: Vec<Segment<'a>>,
    ) -> Self {
        let sequence = |rows: &'a crate::batch::SequenceRows| AttentionSequence {
            row_start: rows.row_start as usize,
            num_rows: rows.num_rows as usize,
            context_len: rows.context_len as usize,
            block_table: &rows.block_table,
        };
        let sequences = batch.sequences.iter().map(sequence).collect();
        Self {
            config,
            pool,
            model,
            rope,
            attention,
            batch,
            sequences,
            segments,
        }
    }

    /// Computes K and V of every row, and for the sample rows what the head reads: `workspace.normed [num_samples, hidden]`.
    pub fn run(&self, kv_cache: &mut [LayerKv], w: &mut Workspace) {
        self.embed(w);
        let (last_layer, layers) = self.model.layers.split_last().expect("a decoder has layers");
        for (layer_idx, layer) in layers.iter().enumerate() {
            self.attention_block(layer_idx, layer, &mut kv_cache[layer_idx], w);
            self.output_and_mlp(layer_idx, layer, self.num_rows(), &self.segments, w);
        }
        // Past the last layer's attention only the sample rows are of any use.
        let last_idx = layers.len();
        self.attention_block(last_idx, last_layer, &mut kv_cache[last_idx], w);
        let num_samples = self.batch.samples.len();
        self.keep_sample_rows(w);
        if num_samples > 0 {
            self.output_and_mlp(last_idx, last_layer, num_samples, &of_samples(&self.segments, &self.batch.samples), w);
            self.add_and_norm(&self.model.final_norm, num_samples, w);
        }
    }

    fn num_rows(&self) -> usize {
        self.batch.token_ids.len()
    }

    fn embed(&self, w: &mut Workspace) {
        let hidden = self.config.hidden_size;
        for (&token_id, out) in self.batch.token_ids.iter().zip(w.residual.chunks_exact_mut(hidden)) {
            self.model.embed(token_id, out);
        }
        for segment in &self.segments {
            for row in segment.row_start..segment.row_start + segment.num_rows {
                let out = &mut w.residual[row * hidden..(row + 1) * hidden];
                segment.adapter.change_embedding(self.batch.token_ids[row], out, &mut w.lora);
            }
        }
    }

    /// Residual stream to `attention_out`, writing K and V on the way.
    fn attention_block(&self, layer_idx: usize, layer: &Layer, kv: &mut LayerKv, w: &mut Workspace) {
        let (config, rows) = (self.config, self.num_rows());
        let (q_size, kv_size) = (config.q_size(), config.kv_size());
        let qkv_size = q_size + 2 * kv_size;
        if layer_idx == 0 {
            let hidden = rows * config.hidden_size;
            rms_norm(&w.residual[..hidden], &layer.input_norm, config.rms_norm_eps, &mut w.normed[..hidden]);
        } else {
            self.add_and_norm(&layer.input_norm, rows, w);
        }
        let projections = [(Projection::Q, 0), (Projection::K, q_size), (Projection::V, q_size + kv_size)];
        self.linear(
            &layer.qkv,
            layer_idx,
            &projections,
            &self.segments,
            &w.normed,
            rows,
            &mut w.qkv,
            &mut w.lora,
        );

        let qkv = &w.qkv[..rows * qkv_size];
        let (q_norm, k_norm) = layer.qk_norm.as_ref().map(|(q, k)| (&q[..], &k[..])).unzip();
        self.split_heads(qkv, 0, q_norm, &mut w.q[..rows * q_size], q_size);
        self.split_heads(qkv, q_size, k_norm, &mut w.k[..rows * kv_size], kv_size);
        for (qkv, v) in qkv.chunks_exact(qkv_size).zip(w.v.chunks_exact_mut(kv_size)) {
            v.copy_from_slice(&qkv[q_size + kv_size..]);
        }
        let (k, v) = (&w.k[..rows * kv_size], &w.v[..rows * kv_size]);
        write_kv(self.attention, k, v, &self.batch.kv_slots, &mut kv.k, &mut kv.v);
        let (q, out) = (&w.q[..rows * q_size], &mut w.attention_out[..rows * q_size]);
        paged_attention(self.pool, self.attention, q, &kv.k, &kv.v, &self.sequences, out);
    }

    /// Columns `first_column ..` of `qkv` as rows of `width` in `out`, normed by head if the model does that, and rotated.
    fn split_heads(&self, qkv: &[f32], first_column: usize, norm: Option<&[f32]>, out: &mut [f32], width: usize) {
        let config = self.config;
        let qkv_size = config.q_size() + 2 * config.kv_size();
        self.pool.for_rows(out, width, MIN_ROWS, |first_row, out| {
            let positions = &self.batch.positions[first_row..first_row + out.len() / width];
            for (qkv, out) in qkv[first_row * qkv_size..].chunks_exact(qkv_size).zip(out.chunks_exact_mut(width)) {
                let heads = &qkv[first_column..first_column + width];
                match norm {
                    Some(weight) => rms_norm(heads, weight, config.rms_norm_eps, out),
                    None => out.copy_from_slice(heads),
                }
            }
            rope(out, width / config.head_dim, config.head_dim, positions, &self.rope.cos, &self.rope.sin);
        });
    }

    /// Moves the residual and attention output of the sample rows to the front.
    fn keep_sample_rows(&self, w: &mut Workspace) {
        let (hidden, q_size) = (self.config.hidden_size, self.config.q_size());
        // Ascending and distinct, so no row is overwritten before it is moved.
        for (idx, sample) in self.batch.samples.iter().enumerate() {
            let row = sample.row as usize;
            w.residual.copy_within(row * hidden..(row + 1) * hidden, idx * hidden);
            w.attention_out.copy_within(row * q_size..(row + 1) * q_size, idx * q_size);
        }
    }

    /// `attention_out` to `block_out`: the output projection, and the MLP.
    fn output_and_mlp(&self, layer_idx: usize, layer: &Layer, rows: usize, segments: &[Segment<'_>], w: &mut Workspace) {
        let ffn = self.config.intermediate_size;
        let o = [(Projection::O, 0)];
        self.linear(&layer.o, layer_idx, &o, segments, &w.attention_out, rows, &mut w.block_out, &mut w.lora);
        self.add_and_norm(&layer.post_attention_norm, rows, w);
        let gate_up = [(Projection::Gate, 0), (Projection::Up, ffn)];
        self.linear(
            &layer.gate_up,
            layer_idx,
            &gate_up,
            segments,
            &w.normed,
            rows,
            &mut w.gate_up,
            &mut w.lora,
        );
        let gate_up = &w.gate_up[..rows * 2 * ffn];
        self.pool.for_rows(&mut w.activated[..rows * ffn], ffn, MIN_ROWS, |first_row, out| {
            let gate_up = &gate_up[first_row * 2 * ffn..][..2 * out.len()];
            match self.config.activation {
                Activation::Silu => silu_mul(gate_up, ffn, out),
                Activation::GeluTanh => gelu_tanh_mul(gate_up, ffn, out),
            }
        });
        let down = [(Projection::Down, 0)];
        self.linear(&layer.down, layer_idx, &down, segments, &w.activated, rows, &mut w.block_out, &mut w.lora);
    }

    /// `residual += block_out; normed = norm(residual)`.
    fn add_and_norm(&self, weight: &[f32], rows: usize, w: &mut Workspace) {
        let len = rows * self.config.hidden_size;
        add_rms_norm(
            &mut w.residual[..len],
            &w.block_out[..len],
            weight,
            self.config.rms_norm_eps,
            &mut w.normed[..len],
        );
    }

    /// `y[rows] = x[rows] · Wᵀ + bias`, and the deltas of the adapters on these projections; `(projection, first column of y)`.
    #[expect(clippy::too_many_arguments, reason = "a matrix product and its adapters: each argument is one operand")]
    fn linear(
        &self,
        linear: &Linear,
        layer_idx: usize,
        projections: &[(Projection, usize)],
        segments: &[Segment<'_>],
        x: &[f32],
        rows: usize,
        y: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let (d_in, d_out) = (linear.weight.k(), linear.weight.n());
        let (x, y) = (&x[..rows * d_in], &mut y[..rows * d_out]);
        gemm(self.pool, x, rows, &linear.weight, linear.bias.as_deref(), y);
        if !segments.is_empty() {
            let buffers = LoraBuffers {
                x,
                d_in,
                y,
                y_stride: d_out,
                scratch,
            };
            add_layer_deltas(self.pool, segments, layer_idx, projections, buffers);
        }
    }
}
