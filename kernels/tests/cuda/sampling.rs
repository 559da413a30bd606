//! Sampling: every parameter, alone and with others, over distributions of all kinds, against what may be drawn and how likely.
//!
//! Draws are put into the middle of a token's part of the sum, and what cuts the distribution between two tokens: one token too many or too few
//! moves every token behind it by a whole part. Log-probabilities and vocabularies by row are `own_tokens.rs`'s.

use polylora_kernels::{
    cuda::sampling::{MAX_TOP, SampleEdit, SampleParams, SampleResult, SamplingArgs, flags},
    reference,
};

use crate::support::{Gpu, Rng, gpu};

/// Rows of one launch.
#[derive(Default)]
struct Rows {
    logits: Vec<f32>,
    params: Vec<SampleParams>,
    edits: Vec<SampleEdit>,
    masks: Vec<u32>,
    expected: Vec<usize>,
    what: Vec<String>,
}

impl Rows {
    fn push(&mut self, what: String, params: SampleParams, logits: &[f32], expected: usize) {
        self.params.push(SampleParams {
            flags: params.flags | flags::CHOOSE,
            slot: self.params.len() as u32,
            vocab: logits.len() as u32,
            logits_start: self.logits.len() as u64,
            ..params
        });
        self.logits.extend_from_slice(logits);
        self.expected.push(expected);
        self.what.push(what);
    }

    fn check(&self, gpu: &Gpu) {
        let rows = self.params.len();
        let stream = &gpu.stream;
        let logits = stream.upload(&self.logits).unwrap();
        let params = stream.upload(&self.params).unwrap();
        let (edits, masks) = (stream.upload(&self.edits).unwrap(), stream.upload(&self.masks).unwrap());
        let poison = SampleResult {
            token: 77_777,
            status: 77,
            ..SampleResult::default()
        };
        let results = stream.upload(&vec![poison; rows]).unwrap();
        let (top_ids, chosen) = (
            stream.upload(&vec![0u32; rows * MAX_TOP]).unwrap(),
            stream.upload(&vec![77_777u32; rows]).unwrap(),
        );
        let top_logprobs = stream.upload(&vec![f32::NAN; rows * MAX_TOP]).unwrap();
        let args = SamplingArgs {
            logits: logits.view(),
            params: params.view(),
            edits: edits.view(),
            masks: masks.view(),
            results: results.view(),
            top_ids: top_ids.view(),
            top_logprobs: top_logprobs.view(),
            chosen: chosen.view(),
            rows,
        };
        gpu.kernels.sampling.launch(stream, &args).unwrap();
        let as_they_were = stream.download(logits.view()).unwrap();
        assert!(
            as_they_were.iter().zip(&self.logits).all(|(got, sent)| got.to_bits() == sent.to_bits()),
            "logits"
        );
        let results = stream.download(results.view()).unwrap();
        let chosen = stream.download(chosen.view()).unwrap();
        for (row, what) in self.what.iter().enumerate() {
            let got = (results[row].status, results[row].token as usize, chosen[row] as usize);
            assert_eq!(
                got,
                (0, self.expected[row], self.expected[row]),
                "{what}: status, token, and what the next step reads"
            );
        }
    }
}

/// `temperature`, `top_k`, share of the sum that `top_p` is near, weight that `min_p` is near.
type Setting = (f32, usize, f64, f64);

const SETTINGS: [Setting; 11] = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    // More than a block has threads.
    (1.3, 1500, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (2.0, 0, 0.97, 0.0),
    (1.0, 0, 1.0, 0.3),
    (0.8, 40, 0.8, 0.0),
    (0.8, 40, 0.8, 0.2),
    (1.5, 1500, 0.95, 0.01),
    (1.0, 0, 0.6, 0.4),
];

/// Halfway through the part of the token at which the likeliest reach this share, so that no rounding decides.
fn between_for_top_p(logits: &[f32], (temperature, top_k, share, _): Setting) -> f32 {
    if share >= 1.0 {
        return 1.0;
    }
    let mut weights: Vec<f64> = reference::draw_probabilities(logits, temperature, top_k, 1.0, 0.0)
        .iter()
        .map(|kept| kept.1)
        .collect();
    weights.sort_by(|a, b| b.total_cmp(a));
    let mut cumulated = 0.0;
    for weight in weights {
        if cumulated + weight >= share {
            return (cumulated + weight / 2.0) as f32;
        }
        cumulated += weight;
    }
    share as f32
}

/// Halfway between the two weights that this one lies between.
fn between_for_min_p(logits: &[f32], (temperature, _, _, near): Setting) -> f32 {
    if near == 0.0 {
        return 0.0;
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights = logits.iter().map(|&logit| (f64::from(logit - max) / f64::from(temperature)).exp());
    let (above, below): (Vec<f64>, Vec<f64>) = weights.partition(|weight| *weight >= near);
    let least = above.into_iter().fold(1.0, f64::min);
    let most = below.into_iter().fold(0.0, f64::max);
    ((least + most) / 2.0) as f32
}

/// Few likely tokens over a broad floor; all alike; many equal; one far above all others, of which one can't be.
fn distributions(rng: &mut Rng) -> Vec<(&'static str, Vec<f32>)> {
    let peaked = (0..5003).map(|token| rng.unit() * 2.0 + if token % 331 == 7 { 9.0 + 3.0 * rng.unit() } else { 0.0 });
    let peaked = peaked.collect();
    let flat = (0..5000).map(|_| rng.unit() * 0.05).collect();
    let equal = (0..1100).map(|_| (rng.unit() * 3.0).round()).collect();
    let mut lonely = rng.f32s(37, 1.0);
    lonely[20] = 90.0;
    lonely[5] = f32::NEG_INFINITY;
    vec![
        ("peaked", peaked),
        ("flat", flat),
        ("equal", equal),
        ("lonely", lonely),
        ("two", vec![0.5, 0.25]),
    ]
}

/// Penalties of some tokens, a bias, tokens that may not be, and a mask: what they leave of the logits, and what says so.
fn change(rng: &mut Rng, logits: &[f32], rows: &mut Rows) -> (Vec<f32>, SampleParams) {
    let mut changed = logits.to_vec();
    let (repetition_penalty, frequency_penalty, presence_penalty) = (1.25, 0.375, 0.5);
    let edits_start = rows.edits.len() as u32;
    let likeliest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a token");
    let mut tokens: Vec<usize> = (0..logits.len()).filter(|&token| token != likeliest).collect();
    rng.shuffle(&mut tokens);
    tokens.truncate(logits.len() / 3);
    for (index, token) in tokens.into_iter().enumerate() {
        let (bias, count) = (rng.unit(), index as u32 % 4);
        let is_forbidden = index % 7 == 6;
        rows.edits.push(SampleEdit {
            token: token as u32,
            counts: flags::EDIT_SEEN | count | if is_forbidden { flags::EDIT_FORBIDDEN } else { 0 },
            bias,
            saved: 0.0,
        });
        let penalized = reference::penalize(changed[token], count, repetition_penalty, frequency_penalty, presence_penalty, bias);
        changed[token] = if is_forbidden { f32::NEG_INFINITY } else { penalized };
    }
    let mask_start = rows.masks.len() as u32;
    for first in (0..logits.len()).step_by(32) {
        let mut word = rng.next() as u32 | 1 << (likeliest % 32);
        if first == 0 {
            word |= 1;
        }
        rows.masks.push(word);
        for (bit, logit) in changed[first..].iter_mut().take(32).enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    let params = SampleParams {
        flags: flags::MASKED,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        edits_start,
        num_edits: rows.edits.len() as u32 - edits_start,
        mask_start,
        ..SampleParams::default()
    };
    (changed, params)
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn draws_are_from_what_the_parameters_leave() {
    // A draw of a token this unlikely would be decided by rounding.
    const LEAST: f64 = 1e-5;
    let gpu = gpu();
    let mut rng = Rng(41);
    let mut rows = Rows::default();
    let plain = SampleParams {
        repetition_penalty: 1.0,
        ..SampleParams::default()
    };
    let (mut shortest, mut longest) = (usize::MAX, 0);
    for (name, logits) in distributions(&mut rng) {
        let changed = change(&mut rng, &logits, &mut rows);
        for (how, (left, params)) in [("as they are", (logits.clone(), plain)), ("changed", changed)] {
            let greedy = (0..left.len()).rev().max_by(|&a, &b| left[a].total_cmp(&left[b])).expect("a token");
            rows.push(format!("{name}, {how}, greedy"), SampleParams { top_p: 1.0, ..params }, &logits, greedy);
            for setting in SETTINGS {
                let (temperature, top_k, ..) = setting;
                let (top_p, min_p) = (between_for_top_p(&left, setting), between_for_min_p(&left, setting));
                let kept = reference::draw_probabilities(&left, temperature, top_k, top_p, min_p);
                (shortest, longest) = (shortest.min(kept.len()), longest.max(kept.len()));
                let drawable: Vec<usize> = (0..kept.len()).filter(|&index| kept[index].1 > LEAST).collect();
                let (first, last) = (drawable[0], drawable[drawable.len() - 1]);
                for index in [first, last, drawable[rng.below(drawable.len())]] {
                    let before: f64 = kept[..index].iter().map(|kept| kept.1).sum();
                    let params = SampleParams {
                        u: before + kept[index].1 / 2.0,
                        temperature,
                        top_k: top_k as u32,
                        top_p,
                        min_p,
                        ..params
                    };
                    let what = format!(
                        "{name}, {how}, {setting:?}, top_p {top_p}, min_p {min_p}, {} tokens, u {}",
                        kept.len(),
                        params.u
                    );
                    rows.push(what, params, &logits, kept[index].0);
                }
            }
        }
    }
    assert!(
        shortest == 1 && longest > 4096,
        "{shortest} to {longest} tokens: more than are sorted, too"
    );
    rows.check(&gpu);
}
