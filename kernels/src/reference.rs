//! Each operation on the CPU, plainly, summed in f64: what tests compare with. Row-major f32 in and out; nothing here is fast.

/// `y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias[n])`.
pub fn gemm(x: &[f32], m: usize, w: &[f32], n: usize, k: usize, bias: Option<&[f32]>) -> Vec<f32> {
    assert_eq!((x.len(), w.len()), (m * k, n * k));
    let mut y = Vec::with_capacity(m * n);
    for x in x.chunks_exact(k) {
        for (column, w) in w.chunks_exact(k).enumerate() {
            y.push((dot(x, w) + bias.map_or(0.0, |bias| f64::from(bias[column]))) as f32);
        }
    }
    y
}

/// First half of the LoRA product for the rows of one segment: `v[rows, lora_rank] = x[rows, d_in] · a[lora_rank, d_in]ᵀ`.
pub fn lora_shrink(x: &[f32], d_in: usize, a: &[f32], lora_rank: usize) -> Vec<f32> {
    gemm(x, x.len() / d_in, a, lora_rank, d_in, None)
}

/// Second half: `y[rows, y_offset .. y_offset + d_out] += scaling · v[rows, lora_rank] · b[d_out, lora_rank]ᵀ`, with `y` in rows of `y_stride`.
#[expect(clippy::too_many_arguments, reason = "plain shapes")]
pub fn lora_expand(v: &[f32], lora_rank: usize, b: &[f32], d_out: usize, scaling: f32, y: &mut [f32], y_stride: usize, y_offset: usize) {
    assert_eq!(b.len(), d_out * lora_rank);
    for (v, y) in v.chunks_exact(lora_rank).zip(y.chunks_exact_mut(y_stride)) {
        for (y, b) in y[y_offset..][..d_out].iter_mut().zip(b.chunks_exact(lora_rank)) {
            *y = (f64::from(*y) + f64::from(scaling) * dot(v, b)) as f32;
        }
    }
}

/// Causal attention of one sequence: `q [rows, num_heads, head_dim]` are the last rows of a context whose
/// `k`, `v` are `[context_len, num_kv_heads, head_dim]`; the output has q's shape. A row sees the last `window` positions up to its own.
#[expect(clippy::too_many_arguments, reason = "plain shapes")]
pub fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    scale: f32,
    window: Option<usize>,
) -> Vec<f32> {
    let num_rows = q.len() / (num_heads * head_dim);
    let context_len = k.len() / (num_kv_heads * head_dim);
    let group = num_heads / num_kv_heads;
    let mut out = Vec::with_capacity(q.len());
    for (vector, q) in q.chunks_exact(head_dim).enumerate() {
        let (row, kv_head) = (vector / num_heads, vector % num_heads / group);
        let end = context_len - num_rows + row + 1;
        let visible = window.map_or(0, |window| end.saturating_sub(window))..end;
        let at = |position: usize| (position * num_kv_heads + kv_head) * head_dim;
        let scores: Vec<f64> = visible
            .clone()
            .map(|position| f64::from(scale) * dot(q, &k[at(position)..][..head_dim]))
            .collect();
        let weights = softmax(&scores);
        for element in 0..head_dim {
            let sum: f64 = visible
                .clone()
                .zip(&weights)
                .map(|(position, weight)| weight * f64::from(v[at(position) + element]))
                .sum();
            out.push(sum as f32);
        }
    }
    out
}

/// `y ← scale ⊙ y + bias` on `width` columns from `y_offset` of each row of `y [m, y_stride]`; without a scale ones, without a bias zeros.
pub fn lora_output(y: &mut [f32], y_stride: usize, y_offset: usize, width: usize, scale: Option<&[f32]>, bias: Option<&[f32]>) {
    for row in y.chunks_exact_mut(y_stride) {
        for (column, value) in row[y_offset..y_offset + width].iter_mut().enumerate() {
            let scale = scale.map_or(1.0, |scale| f64::from(scale[column]));
            let bias = bias.map_or(0.0, |bias| f64::from(bias[column]));
            *value = (scale * f64::from(*value) + bias) as f32;
        }
    }
}

/// `y[rows, y_stride]` at the columns `token_ids` becomes `x[rows, hidden] · rows[token_ids.len(), hidden]ᵀ`; the others stay.
pub fn token_row_logits(x: &[f32], hidden: usize, rows: &[f32], token_ids: &[u32], y: &mut [f32], y_stride: usize) {
    let logits = gemm(x, x.len() / hidden, rows, token_ids.len(), hidden, None);
    for (y, logits) in y.chunks_exact_mut(y_stride).zip(logits.chunks_exact(token_ids.len())) {
        token_ids.iter().zip(logits).for_each(|(&token, &logit)| y[token as usize] = logit);
    }
}

/// `x / sqrt(mean(x²) + eps) · weight` for each row of `weight.len()`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(weight.len()) {
        let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
        out.extend(
            x.iter()
                .zip(weight)
                .map(|(x, weight)| (f64::from(*x) * scale * f64::from(*weight)) as f32),
        );
    }
    out
}

/// Rotary embedding, NeoX layout: `x [m, num_heads, head_dim]`, `cos`, `sin` `[max_positions, head_dim / 2]`.
pub fn rope(x: &[f32], num_heads: usize, head_dim: usize, positions: &[u32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
    let half = head_dim / 2;
    let mut out = x.to_vec();
    for (vector, head) in out.chunks_exact_mut(head_dim).enumerate() {
        let position = positions[vector / num_heads] as usize;
        for i in 0..half {
            let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
            let (cos, sin) = (f64::from(cos[position * half + i]), f64::from(sin[position * half + i]));
            head[i] = (a * cos - b * sin) as f32;
            head[i + half] = (b * cos + a * sin) as f32;
        }
    }
    out
}

/// `silu(gate) · up` with `gate_up [m, 2 · ffn]`, the gate first.
pub fn silu_mul(gate_up: &[f32], ffn: usize) -> Vec<f32> {
    gated(gate_up, ffn, |gate| gate / (1.0 + (-gate).exp()))
}

/// `gelu(gate) · up` in the tanh form, with `gate_up [m, 2 · ffn]`, the gate first.
pub fn gelu_tanh_mul(gate_up: &[f32], ffn: usize) -> Vec<f32> {
    gated(gate_up, ffn, |gate| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
        0.5 * gate * (1.0 + inner.tanh())
    })
}

/// `e^x / Σ e^x`.
pub fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|exp| exp / sum).collect()
}

/// A logit after penalties and bias, for a token that is in the prompt or was put out `count` times: positive ones are divided by the repetition
/// penalty, others multiplied; then frequency and presence are taken off tokens of the output, and the bias is added.
pub fn penalize(logit: f32, count: u32, repetition: f32, frequency: f32, presence: f32, bias: f32) -> f32 {
    let repeated = if logit > 0.0 { logit / repetition } else { logit * repetition };
    let of_output = if count > 0 { frequency * count as f32 + presence } else { 0.0 };
    repeated - of_output + bias
}

/// What sampling may draw from `logits`, and how likely, by token. Of the tokens in order of their logits, then of their ids: the first `top_k`
/// (0: all); of these the shortest run whose weights `exp((l − max) / temperature)` reach `top_p` of their sum; of these the ones that weigh
/// `min_p` at least. A nucleus is arXiv:1904.09751's, min-p is arXiv:2407.01082's.
pub fn draw_probabilities(logits: &[f32], temperature: f32, top_k: usize, top_p: f32, min_p: f32) -> Vec<(usize, f64)> {
    let mut kept: Vec<(usize, f64)> = logits.iter().map(|&logit| f64::from(logit)).enumerate().collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let max = kept[0].1;
    kept.iter_mut()
        .for_each(|(_, value)| *value = ((*value - max) / f64::from(temperature)).exp());
    if top_k > 0 {
        kept.truncate(top_k);
    }
    let sum = |kept: &[(usize, f64)]| kept.iter().map(|(_, weight)| weight).sum::<f64>();
    if top_p < 1.0 {
        let target = f64::from(top_p) * sum(&kept);
        let mut cumulated = 0.0;
        let reaches = |(_, weight): &(usize, f64)| {
            cumulated += weight;
            cumulated >= target
        };
        let len = kept.iter().position(reaches).map_or(kept.len(), |last| last + 1);
        kept.truncate(len);
    }
    kept.retain(|&(_, weight)| weight > 0.0 && weight >= f64::from(min_p));
    let total = sum(&kept);
    kept.iter_mut().for_each(|(_, weight)| *weight /= total);
    kept.sort_by_key(|&(token, _)| token);
    kept
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn gated(gate_up: &[f32], ffn: usize, activation: impl Fn(f64) -> f64) -> Vec<f32> {
    let rows = gate_up.chunks_exact(2 * ffn).map(|row| row.split_at(ffn));
    rows.flat_map(|(gate, up)| gate.iter().zip(up))
        .map(|(gate, up)| (activation(f64::from(*gate)) * f64::from(*up)) as f32)
        .collect()
}
