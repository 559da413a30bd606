//! Norms, rotary embedding and gated activations: one pass over the rows each.
//!
//! They run on the calling thread; [`ThreadPool::for_rows`](super::ThreadPool::for_rows) spreads many rows.
//! A row's bits don't depend on the rows beside it.

use super::simd::{Isa, Simd, dispatch, exp};

/// `out = x / sqrt(mean(x²) + eps) · weight`, for each row of `weight.len()`. Panics if a length disagrees.
///
/// Reference: [`reference::rms_norm`](crate::reference::rms_norm).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    rms_norm_with(Isa::detect(), x, weight, eps, out);
}

fn rms_norm_with(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(
        !weight.is_empty() && x.len().is_multiple_of(weight.len()),
        "x is rows of {}, not {} long",
        weight.len(),
        x.len()
    );
    assert_eq!(x.len(), out.len(), "out is as long as x");
    rms_norm_rows(isa, x, weight, eps, out);
}

#[inline(always)]
fn rms_norm_body<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        normalise(s, x, weight, eps, out);
    }
}
dispatch!(fn rms_norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body);

/// `residual += x; out = rms_norm(residual)`: what stands between two blocks of a decoder. Panics if a length disagrees.
pub fn add_rms_norm(residual: &mut [f32], x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(
        !weight.is_empty() && x.len().is_multiple_of(weight.len()),
        "x is rows of {}, not {} long",
        weight.len(),
        x.len()
    );
    assert_eq!(x.len(), residual.len(), "residual is as long as x");
    assert_eq!(x.len(), out.len(), "out is as long as x");
    add_rms_norm_rows(Isa::detect(), residual, x, weight, eps, out);
}

#[inline(always)]
fn add_rms_norm_body<S: Simd>(s: S, residual: &mut [f32], x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let len = weight.len();
    for ((residual, x), out) in residual.chunks_exact_mut(len).zip(x.chunks_exact(len)).zip(out.chunks_exact_mut(len)) {
        for (residual, x) in residual.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
            s.store_partial(residual, s.add(s.load_partial(residual), s.load_partial(x)));
        }
        normalise(s, residual, weight, eps, out);
    }
}
dispatch!(fn add_rms_norm_rows(residual: &mut [f32], x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = add_rms_norm_body);

#[inline(always)]
fn normalise<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // Four accumulators hide the latency; they and the lanes are added in a fixed order.
    let mut sums = [s.splat(0.0); 4];
    for x in x.chunks(4 * S::LANES) {
        for (x, sum) in x.chunks(S::LANES).zip(&mut sums) {
            let x = s.load_partial(x);
            *sum = s.fma(x, x, *sum);
        }
    }
    let sum = s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
    let scale = s.splat(1.0 / (sum / x.len() as f32 + eps).sqrt());
    for ((x, weight), out) in x.chunks(S::LANES).zip(weight.chunks(S::LANES)).zip(out.chunks_mut(S::LANES)) {
        s.store_partial(out, s.mul(s.mul(s.load_partial(x), scale), s.load_partial(weight)));
    }
}

/// Rotary embedding in place, in the NeoX layout: element `i` of a head's first half turns with element `i` of its second half.
///
/// `x [m, num_heads · head_dim]`, `positions [m]`, `cos` and `sin` `[max_positions, head_dim / 2]`.
/// Panics if a length disagrees, `head_dim` is odd or a position is past the tables. Reference: [`reference::rope`](crate::reference::rope).
pub fn rope(x: &mut [f32], num_heads: usize, head_dim: usize, positions: &[u32], cos: &[f32], sin: &[f32]) {
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "head_dim {head_dim} has no halves");
    assert_eq!(
        x.len(),
        positions.len() * num_heads * head_dim,
        "x is [m, num_heads * head_dim] = [{}, {}]",
        positions.len(),
        num_heads * head_dim
    );
    assert_eq!(cos.len(), sin.len(), "cos and sin are one shape");
    rope_rows(Isa::detect(), x, num_heads, head_dim, positions, cos, sin);
}

#[inline(always)]
fn rope_body<S: Simd>(s: S, x: &mut [f32], num_heads: usize, head_dim: usize, positions: &[u32], cos: &[f32], sin: &[f32]) {
    let half = head_dim / 2;
    for (row, &position) in x.chunks_exact_mut(num_heads * head_dim).zip(positions) {
        let start = position as usize * half;
        assert!(
            start + half <= cos.len(),
            "position {position} is past the {} of the rotary tables",
            cos.len() / half
        );
        let (cos, sin) = (&cos[start..][..half], &sin[start..][..half]);
        for head in row.chunks_exact_mut(head_dim) {
            let (first, second) = head.split_at_mut(half);
            let halves = first.chunks_mut(S::LANES).zip(second.chunks_mut(S::LANES));
            for ((first, second), (cos, sin)) in halves.zip(cos.chunks(S::LANES).zip(sin.chunks(S::LANES))) {
                let (a, b) = (s.load_partial(first), s.load_partial(second));
                let (cos, sin) = (s.load_partial(cos), s.load_partial(sin));
                s.store_partial(first, s.sub(s.mul(a, cos), s.mul(b, sin)));
                s.store_partial(second, s.add(s.mul(b, cos), s.mul(a, sin)));
            }
        }
    }
}
dispatch!(fn rope_rows(x: &mut [f32], num_heads: usize, head_dim: usize, positions: &[u32], cos: &[f32], sin: &[f32]) = rope_body);

/// `out = silu(gate) · up`, `silu(g) = g / (1 + e^-g)`. `gate_up [m, 2 · ffn]`, the gate first; `out [m, ffn]`. Panics if a length disagrees.
///
/// Reference: [`reference::silu_mul`](crate::reference::silu_mul).
pub fn silu_mul(gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    check_gated(gate_up, ffn, out);
    silu_mul_rows(Isa::detect(), gate_up, ffn, out);
}

#[inline(always)]
fn silu_mul_body<S: Simd>(s: S, gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    gated(s, gate_up, ffn, out, |gate| gate);
}
dispatch!(fn silu_mul_rows(gate_up: &[f32], ffn: usize, out: &mut [f32]) = silu_mul_body);

/// `out = gelu(gate) · up` with the tanh form, `gelu(g) = g/2 · (1 + tanh(√(2/π) · (g + 0.044715 g³)))`; shapes as in [`silu_mul`].
///
/// Reference: [`reference::gelu_tanh_mul`](crate::reference::gelu_tanh_mul).
pub fn gelu_tanh_mul(gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    check_gated(gate_up, ffn, out);
    gelu_tanh_mul_rows(Isa::detect(), gate_up, ffn, out);
}

#[inline(always)]
fn gelu_tanh_mul_body<S: Simd>(s: S, gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    // (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), with 2u = 2 √(2/π) · (g + 0.044715 g³).
    gated(s, gate_up, ffn, out, |gate| {
        let cubic = s.fma(s.mul(gate, gate), s.splat(0.044_715), s.splat(1.0));
        s.mul(s.mul(gate, s.splat(1.595_769)), cubic)
    });
}
dispatch!(fn gelu_tanh_mul_rows(gate_up: &[f32], ffn: usize, out: &mut [f32]) = gelu_tanh_mul_body);

fn check_gated(gate_up: &[f32], ffn: usize, out: &[f32]) {
    assert!(ffn > 0 && out.len().is_multiple_of(ffn), "out is rows of {ffn}, not {} long", out.len());
    assert_eq!(
        gate_up.len(),
        2 * out.len(),
        "gate_up is [m, 2 * ffn] = [{}, {}]",
        out.len() / ffn,
        2 * ffn
    );
}

/// `out = gate · sigmoid(argument(gate)) · up`.
#[inline(always)]
fn gated<S: Simd>(s: S, gate_up: &[f32], ffn: usize, out: &mut [f32], argument: impl Fn(S::Vector) -> S::Vector) {
    for (gate_up, out) in gate_up.chunks_exact(2 * ffn).zip(out.chunks_exact_mut(ffn)) {
        let (gate, up) = gate_up.split_at(ffn);
        for ((gate, up), out) in gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(out.chunks_mut(S::LANES)) {
            let (gate, up) = (s.load_partial(gate), s.load_partial(up));
            let denominator = s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), argument(gate))));
            s.store_partial(out, s.mul(s.div(gate, denominator), up));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_data::{assert_close, random};
    use crate::reference;

    #[test]
    fn norms_agree_with_the_reference() {
        for (m, d) in [(1, 1), (3, 7), (2, 64), (5, 576), (1, 4097)] {
            let (x, weight, residual) = (random(m * d, 1), random(d, 2), random(m * d, 3));
            let expected = reference::rms_norm(&x, &weight, 1e-5);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; m * d];
                rms_norm_with(isa, &x, &weight, 1e-5, &mut out);
                assert_close(&out, &expected, 2e-6, &format!("{isa:?} [{m}, {d}]"));
                let (mut got_residual, mut out) = (residual.clone(), vec![f32::NAN; m * d]);
                add_rms_norm_rows(isa, &mut got_residual, &x, &weight, 1e-5, &mut out);
                let sum: Vec<f32> = residual.iter().zip(&x).map(|(residual, x)| residual + x).collect();
                assert_eq!(got_residual, sum);
                assert_close(&out, &reference::rms_norm(&sum, &weight, 1e-5), 2e-6, &format!("{isa:?} add [{m}, {d}]"));
            }
        }
    }

    #[test]
    fn rope_agrees_with_the_reference() {
        for (num_heads, head_dim) in [(1, 2), (9, 64), (3, 10), (2, 96), (1, 128)] {
            let positions = [0, 1, 17, 511, 3];
            let angles = |f: fn(f64) -> f64| -> Vec<f32> {
                let angle = |position: usize, i: usize| position as f64 * 10_000_f64.powf(-2.0 * i as f64 / head_dim as f64);
                (0..512)
                    .flat_map(|position| (0..head_dim / 2).map(move |i| (position, i)))
                    .map(|(position, i)| f(angle(position, i)) as f32)
                    .collect()
            };
            let (cos, sin) = (angles(f64::cos), angles(f64::sin));
            let x = random(positions.len() * num_heads * head_dim, 4);
            let expected = reference::rope(&x, num_heads, head_dim, &positions, &cos, &sin);
            for isa in Isa::available() {
                let mut got = x.clone();
                rope_rows(isa, &mut got, num_heads, head_dim, &positions, &cos, &sin);
                assert_close(&got, &expected, 1e-6, &format!("{isa:?} {num_heads} x {head_dim}"));
            }
        }
    }

    #[test]
    fn gated_activations_agree_with_the_reference() {
        for (m, ffn) in [(2, 3), (3, 17), (2, 64), (2, 1536)] {
            let gate_up: Vec<f32> = random(m * 2 * ffn, 5).iter().map(|value| value * 12.0).collect();
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; m * ffn];
                silu_mul_rows(isa, &gate_up, ffn, &mut out);
                assert_close(&out, &reference::silu_mul(&gate_up, ffn), 1e-4, &format!("{isa:?} silu [{m}, {ffn}]"));
                gelu_tanh_mul_rows(isa, &gate_up, ffn, &mut out);
                assert_close(
                    &out,
                    &reference::gelu_tanh_mul(&gate_up, ffn),
                    1e-4,
                    &format!("{isa:?} gelu [{m}, {ffn}]"),
                );
            }
        }
    }

    #[test]
    fn saturated_gates_pass_or_stop() {
        let mut out = [f32::NAN; 4];
        silu_mul(&[200.0, -200.0, 1e30, -1e30, 1.0, 1.0, 1.0, 1.0], 4, &mut out);
        assert_eq!((out[0], out[2]), (200.0, 1e30));
        assert!(out[1].abs() < 1e-30 && out[3].abs() < 1e-6, "{out:?}");
        let mut nan = [0.0];
        silu_mul(&[f32::NAN, 1.0], 1, &mut nan);
        assert!(nan[0].is_nan());
    }

    #[test]
    #[should_panic(expected = "position 9 is past the 4 of the rotary tables")]
    fn a_position_past_the_tables_is_refused() {
        rope(&mut [0.0; 4], 1, 4, &[9], &[0.0; 8], &[0.0; 8]);
    }
}
