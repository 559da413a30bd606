//! Rotary position tables.

use super::{DecoderConfig, RopeScaling};

/// Cosines and sines of every position and frequency, `[num_positions, head_dim / 2]` row-major f32 each, with the scaling's
/// attention factor multiplied in.
///
/// Angles are `position · inv_freq` in f32, as transformers computes them: a model has learnt with that rounding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTables {
    /// Positions in the tables.
    pub num_positions: usize,
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

impl RopeTables {
    /// The tables of positions `0..num_positions`.
    pub fn new(config: &DecoderConfig, num_positions: usize) -> Self {
        let (inv_freq, attention_factor) = inverse_frequencies(config);
        let mut cos = Vec::with_capacity(num_positions * inv_freq.len());
        let mut sin = Vec::with_capacity(num_positions * inv_freq.len());
        for position in 0..num_positions {
            for &frequency in &inv_freq {
                let (s, c) = f64::from(position as f32 * frequency).sin_cos();
                cos.push((c * attention_factor) as f32);
                sin.push((s * attention_factor) as f32);
            }
        }
        Self { num_positions, cos, sin }
    }
}

/// `[head_dim / 2]` radians a position, and what cos and sin are multiplied by.
fn inverse_frequencies(config: &DecoderConfig) -> (Vec<f32>, f64) {
    let dim = config.head_dim as f64;
    let base: Vec<f64> = (0..config.head_dim / 2).map(|i| config.rope_theta.powf(-2.0 * i as f64 / dim)).collect();
    let (stretched, attention_factor) = match config.rope_scaling {
        RopeScaling::None => (base, 1.0),
        RopeScaling::Linear { factor } => (base.iter().map(|frequency| frequency / factor).collect(), 1.0),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
        } => {
            let stretch = |frequency: f64| {
                // Rotations over the original context: 1 at `low`, 0 share of the stretched one at `high`.
                let rotations = original * frequency / std::f64::consts::TAU;
                let kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            };
            (base.into_iter().map(stretch).collect(), 1.0)
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
        } => {
            // The dimension whose frequency makes so many rotations over the original context.
            let dimension = |rotations: f64| dim * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * config.rope_theta.ln());
            let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, high) = (low.max(0.0), high.min(dim - 1.0));
            let width = if high == low { 0.001 } else { high - low };
            let stretch = |(i, frequency): (usize, f64)| {
                let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
                divided * frequency / factor + (1.0 - divided) * frequency
            };
            (base.into_iter().enumerate().map(stretch).collect(), attention_factor)
        }
    };
    (stretched.into_iter().map(|frequency| frequency as f32).collect(), attention_factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::Activation;

    fn config(rope_theta: f64, rope_scaling: RopeScaling) -> DecoderConfig {
        DecoderConfig {
            architecture: "LlamaForCausalLM".into(),
            vocab_size: 10,
            hidden_size: 4096,
            intermediate_size: 10,
            num_layers: 1,
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            rms_norm_eps: 1e-5,
            rope_theta,
            rope_scaling,
            activation: Activation::Silu,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tie_word_embeddings: false,
            sliding_window: None,
            max_position_embeddings: 131072,
            eos_token_ids: vec![],
            bos_token_id: None,
        }
    }

    /// Values of `transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS` (5.24.0) at these indices.
    const INDICES: [usize; 8] = [0, 1, 20, 30, 35, 40, 50, 63];

    fn check(config: &DecoderConfig, expected: [f32; 8], expected_factor: f64) {
        let (frequencies, factor) = inverse_frequencies(config);
        assert!((factor - expected_factor).abs() < 1e-12, "{factor}");
        assert_eq!(frequencies.len(), 64);
        for (index, expected) in INDICES.into_iter().zip(expected) {
            let got = frequencies[index];
            assert!((got / expected - 1.0).abs() < 2e-6, "index {index}: expected {expected:e}, got {got:e}");
        }
    }

    #[test]
    fn frequencies_are_those_of_transformers() {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        check(
            &config(500_000.0, llama3),
            [
                1.0,
                8.146172e-1,
                1.656044e-2,
                1.3718937e-3,
                9.556212e-5,
                3.4281024e-5,
                4.4115345e-6,
                3.068926e-7,
            ],
            1.0,
        );
        let yarn = RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.138629436111989,
        };
        check(
            &config(1e6, yarn),
            [
                1.0,
                8.058422e-1,
                1.3335215e-2,
                1.064361e-3,
                2.462584e-4,
                4.445698e-5,
                5.1338125e-6,
                3.1023444e-7,
            ],
            1.138629436111989,
        );
        check(
            &config(1e4, RopeScaling::Linear { factor: 2.5 }),
            [
                0.4,
                3.4638575e-1,
                2.2493651e-2,
                5.334086e-3,
                2.5975266e-3,
                1.2649111e-3,
                2.9995767e-4,
                4.619128e-5,
            ],
            1.0,
        );
    }

    #[test]
    fn tables_are_position_major() {
        let tables = RopeTables::new(&config(1e4, RopeScaling::None), 5);
        assert_eq!((tables.num_positions, tables.cos.len(), tables.sin.len()), (5, 5 * 64, 5 * 64));
        let angle = 3.0 * 1e4f64.powf(-2.0 * 10.0 / 128.0);
        assert!((f64::from(tables.cos[3 * 64 + 10]) - angle.cos()).abs() < 1e-6);
        assert!((f64::from(tables.sin[3 * 64 + 10]) - angle.sin()).abs() < 1e-6);
    }
}
