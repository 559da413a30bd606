//! What the sampling parameters mean: logits to one token. Every backend gives this answer.
//!
//! In this order, for a row of logits:
//! 1. `repetition_penalty` on every token of prompt or output: positive logits are divided by it, the others multiplied.
//! 2. `frequency_penalty` times the occurrences in the output, and `presence_penalty` once, are subtracted from tokens of the output.
//! 3. `logit_bias` is added.
//! 4. Forbidden tokens, and those that the mask does not allow, get −∞.
//! 5. At temperature 0 the token with the largest logit, the lowest id among equals. Otherwise weights `w = exp((l − max) / temperature)`.
//! 6. `top_k`: the k largest logits stay; among equals the lowest ids.
//! 7. `top_p`: in that same order, the shortest run of tokens whose weights reach `top_p` of the sum of those that are left.
//! 8. `min_p`: tokens with `w < min_p` go (the likeliest token's weight is 1).
//! 9. The token is drawn by inverse CDF in order of id: the first whose cumulated weight exceeds `u` times the sum, `u` from [`uniform`].
//!
//! Log-probabilities are those of the model: log-softmax of the logits as they came.
//!
//! The functions are pure; `scratch` only saves allocations. Nothing sorts the vocabulary: the likeliest few are selected in one pass, and a
//! nucleus of many is cut by summing weights into buckets.

use crate::{
    batch::{ChooseToken, SampleFailure, SampleOutput, SampleRow},
    request::{SamplingParams, TokenLogprobs},
};

/// Buffers that are reused from row to row.
#[derive(Default)]
pub struct SamplingScratch {
    logits: Vec<f32>,
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
    buckets: Vec<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token_id: u32,
    /// A logit, then its weight.
    value: f32,
}

/// All that a sample row asks for, from its logits `[vocab_size]`; the row's own vocabulary is whatever they are over.
pub fn sample_row(logits: &[f32], row: &SampleRow, scratch: &mut SamplingScratch) -> SampleOutput {
    let mut output = SampleOutput::default();
    let max = match max_logit(logits) {
        Some(max) if max > f32::NEG_INFINITY => max,
        _ => {
            output.failure = Some(SampleFailure::NotFinite);
            return output;
        }
    };
    let output_top_k = row.choose.as_ref().and_then(|choose| choose.top_k_logprobs);
    let wants_logprobs = row.prompt_logprob.is_some() || output_top_k.is_some();
    let log_sum_exp = if wants_logprobs { log_sum_exp(logits, max) } else { 0.0 };
    if let Some((token_id, params)) = &row.prompt_logprob {
        output.prompt_logprobs = Some(token_logprobs(logits, log_sum_exp, *token_id, params.top_k as usize, scratch));
    }
    if let Some(choose) = &row.choose {
        match choose_token_below(logits, max, choose, scratch) {
            Ok(token_id) => {
                output.token_id = Some(token_id);
                output.logprobs = output_top_k.map(|top_k| token_logprobs(logits, log_sum_exp, token_id, top_k as usize, scratch));
            }
            Err(failure) => output.failure = Some(failure),
        }
    }
    output
}

/// The next token.
///
/// # Errors
/// `NotFinite` for a NaN or +∞ among the logits; `NothingAllowed` when none is left.
pub fn choose_token(logits: &[f32], choose: &ChooseToken, scratch: &mut SamplingScratch) -> Result<u32, SampleFailure> {
    let max = max_logit(logits).ok_or(SampleFailure::NotFinite)?;
    choose_token_below(logits, max, choose, scratch)
}

fn choose_token_below(logits: &[f32], max: f32, choose: &ChooseToken, scratch: &mut SamplingScratch) -> Result<u32, SampleFailure> {
    let params = &*choose.params;
    // Taken out, so that the rest of the scratch can be borrowed beside it.
    let mut changed = std::mem::take(&mut scratch.logits);
    let result = (|| {
        let (logits, max) = if changes_logits(choose) {
            changed.clear();
            changed.extend_from_slice(logits);
            change_logits(&mut changed, choose);
            (&changed[..], max_logit(&changed).ok_or(SampleFailure::NotFinite)?)
        } else {
            (logits, max)
        };
        if max == f32::NEG_INFINITY {
            return Err(SampleFailure::NothingAllowed);
        }
        Ok(if params.temperature == 0.0 {
            first_equal(logits, max)
        } else {
            draw(logits, max, params, uniform(params.seed, choose.output_position), scratch)
        })
    })();
    scratch.logits = changed;
    result
}

fn changes_logits(choose: &ChooseToken) -> bool {
    !(choose.token_counts.is_empty() && choose.params.logit_bias.is_empty() && choose.forbidden.is_empty() && choose.mask.is_none())
}

/// Steps 1 to 4. Ids outside the vocabulary name nothing and change nothing.
fn change_logits(logits: &mut [f32], choose: &ChooseToken) {
    let params = &*choose.params;
    for count in &choose.token_counts {
        let Some(logit) = logits.get_mut(count.token_id as usize) else {
            continue;
        };
        if count.in_output > 0 || count.in_prompt {
            *logit = if *logit > 0.0 {
                *logit / params.repetition_penalty
            } else {
                *logit * params.repetition_penalty
            };
        }
        if count.in_output > 0 {
            *logit -= params.frequency_penalty * count.in_output as f32 + params.presence_penalty;
        }
    }
    for &(token_id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token_id as usize) {
            *logit += bias;
        }
    }
    for &token_id in &choose.forbidden {
        if let Some(logit) = logits.get_mut(token_id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if let Some(mask) = &choose.mask {
        for (word_idx, logits) in logits.chunks_mut(32).enumerate() {
            match mask.get(word_idx).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => logits.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

/// Steps 6 to 9. `max` is the largest logit, finite.
fn draw(logits: &[f32], max: f32, params: &SamplingParams, u: f64, scratch: &mut SamplingScratch) -> u32 {
    let weight = |logit: f32| exp_nonpositive((logit - max) / params.temperature);
    let top_k = params.top_k as usize;
    let takes_top_k = top_k > 0 && top_k < logits.len();
    if !takes_top_k && params.top_p >= 1.0 {
        scratch.weights.clear();
        scratch.weights.extend(logits.iter().map(|&logit| {
            let weight = weight(logit);
            if weight < params.min_p { 0.0 } else { weight }
        }));
        return draw_from_all(&scratch.weights, u);
    }

    let candidates = &mut scratch.candidates;
    if takes_top_k {
        select_largest(logits, top_k, candidates);
        candidates.iter_mut().for_each(|candidate| candidate.value = weight(candidate.value));
        if params.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.value)).sum();
            if let Some(len) = nucleus_len(candidates, f64::from(params.top_p) * total) {
                candidates.truncate(len);
            }
        }
    } else {
        let total: f64 = logits.chunks(BLOCK).map(|block| lane_sum(block, weight)).sum();
        let target = f64::from(params.top_p) * total;
        // Most nuclei are small.
        select_largest(logits, SMALL_NUCLEUS, candidates);
        candidates.iter_mut().for_each(|candidate| candidate.value = weight(candidate.value));
        // Shorter than the nucleus, too, if `min_p` ends it before.
        let ends_here = candidates.len() < SMALL_NUCLEUS || candidates.last().is_some_and(|last| last.value < params.min_p);
        match nucleus_len(candidates, target) {
            Some(len) => candidates.truncate(len),
            None if ends_here => {}
            None => {
                scratch.weights.clear();
                scratch.weights.extend(logits.iter().map(|&logit| weight(logit)));
                keep_nucleus(logits, max, target, scratch);
                scratch
                    .weights
                    .iter_mut()
                    .filter(|weight| **weight < params.min_p)
                    .for_each(|weight| *weight = 0.0);
                return draw_from_all(&scratch.weights, u);
            }
        }
    }
    // The first candidate stays: its weight is 1.
    candidates.truncate(candidates.partition_point(|candidate| candidate.value >= params.min_p));
    candidates.sort_unstable_by_key(|candidate| candidate.token_id);
    draw_from_candidates(candidates, u)
}

/// A nucleus of at most so many tokens is found by selecting them.
const SMALL_NUCLEUS: usize = 256;

/// Zeroes `scratch.weights` outside the nucleus, without sorting: weights are summed into buckets by logit, and only the bucket in which the
/// sum reaches `target` is put in order.
fn keep_nucleus(logits: &[f32], max: f32, target: f64, scratch: &mut SamplingScratch) {
    // The bits of a positive float ascend with it; these are sign, exponent and 5 bits more of the distance to the largest logit.
    const SHIFT: u32 = 18;
    const NUM_BUCKETS: usize = (f32::INFINITY.to_bits() >> SHIFT) as usize + 1;
    let SamplingScratch {
        weights,
        candidates,
        buckets,
        ..
    } = scratch;
    let bucket_of = |logit: f32| ((max - logit).to_bits() >> SHIFT) as usize;
    buckets.clear();
    buckets.resize(NUM_BUCKETS, 0.0);
    for (&logit, &weight) in logits.iter().zip(&*weights) {
        buckets[bucket_of(logit)] += f64::from(weight);
    }
    let mut cumulated = 0.0;
    let reaches = |mass: &f64| {
        let reaches = cumulated + mass >= target;
        cumulated += if reaches { 0.0 } else { *mass };
        reaches
    };
    // By rounding the whole sum can miss the target: then every token stays.
    let Some(last_bucket) = buckets.iter().position(reaches) else { return };
    candidates.clear();
    for (token, &logit) in logits.iter().enumerate() {
        match bucket_of(logit).cmp(&last_bucket) {
            std::cmp::Ordering::Less => {}
            std::cmp::Ordering::Equal => candidates.push(Candidate {
                token_id: token as u32,
                value: logit,
            }),
            std::cmp::Ordering::Greater => weights[token] = 0.0,
        }
    }
    candidates.sort_unstable_by(likelier_first);
    for candidate in candidates {
        let weight = &mut weights[candidate.token_id as usize];
        if cumulated >= target {
            *weight = 0.0;
        }
        cumulated += f64::from(*weight);
    }
}

/// How many of the likeliest reach `target`; `None` if all together do not.
fn nucleus_len(candidates: &[Candidate], target: f64) -> Option<usize> {
    let mut cumulated = 0.0;
    let reaches = |candidate: &Candidate| {
        cumulated += f64::from(candidate.value);
        cumulated >= target
    };
    candidates.iter().position(reaches).map(|index| index + 1)
}

fn draw_from_candidates(candidates: &[Candidate], u: f64) -> u32 {
    let target = u * candidates.iter().map(|candidate| f64::from(candidate.value)).sum::<f64>();
    let mut cumulated = 0.0;
    let exceeds = |candidate: &&Candidate| {
        cumulated += f64::from(candidate.value);
        cumulated > target
    };
    let chosen = candidates.iter().find(exceeds);
    // Rounding can leave the sum at the target: then the last that has any weight.
    let chosen = chosen.or_else(|| candidates.iter().rev().find(|candidate| candidate.value > 0.0));
    chosen.expect("the likeliest token's weight is 1").token_id
}

/// Weights are summed in blocks, in f32 inside one and in f64 from block to block; a draw finds its block first.
const BLOCK: usize = 256;

fn draw_from_all(weights: &[f32], u: f64) -> u32 {
    let block_sum = |block: &[f32]| lane_sum(block, |weight| weight);
    let target = u * weights.chunks(BLOCK).map(block_sum).sum::<f64>();
    let mut cumulated = 0.0;
    let mut last_weighted = 0;
    for (block_idx, block) in weights.chunks(BLOCK).enumerate() {
        let sum = block_sum(block);
        if cumulated + sum <= target {
            cumulated += sum;
            if let Some(index) = block.iter().rposition(|&weight| weight > 0.0) {
                last_weighted = block_idx * BLOCK + index;
            }
            continue;
        }
        for (index, &weight) in block.iter().enumerate() {
            cumulated += f64::from(weight);
            if weight > 0.0 {
                last_weighted = block_idx * BLOCK + index;
                if cumulated > target {
                    return last_weighted as u32;
                }
            }
        }
        // In f64 the block is a little less than in f32: its last token.
        break;
    }
    last_weighted as u32
}

const LANES: usize = 16;

/// The largest, or `None` if one is NaN or +∞.
fn max_logit(logits: &[f32]) -> Option<f32> {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut finite = [true; LANES];
    let (chunks, tail) = logits.as_chunks::<LANES>();
    let mut take = |lane: usize, logit: f32| {
        // False for NaN, too.
        finite[lane] &= logit <= f32::MAX;
        max[lane] = if logit > max[lane] { logit } else { max[lane] };
    };
    for chunk in chunks {
        for (lane, &logit) in chunk.iter().enumerate() {
            take(lane, logit);
        }
    }
    for (lane, &logit) in tail.iter().enumerate() {
        take(lane, logit);
    }
    finite
        .iter()
        .all(|&finite| finite)
        .then(|| max.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// The lowest id whose logit is `value`.
fn first_equal(logits: &[f32], value: f32) -> u32 {
    let index = logits.iter().position(|&logit| logit == value);
    index.expect("the largest logit is one of them") as u32
}

/// Σ f(v) over a block: f32 lanes, then f64.
fn lane_sum(block: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0f32; LANES];
    let (chunks, tail) = block.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane += f(value);
    }
    lanes.into_iter().map(f64::from).sum()
}

/// Larger logits first, lower ids among equals.
fn likelier_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.value
        .partial_cmp(&a.value)
        .expect("no logit is NaN here")
        .then(a.token_id.cmp(&b.token_id))
}

/// The `k` largest logits above −∞, likeliest first. One pass: a buffer of twice as many is cut back to `k` whenever it is full, and what is
/// not above its k-th is skipped (ids ascend, so an equal that comes later loses anyway).
fn select_largest(logits: &[f32], k: usize, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    if k == 0 {
        return;
    }
    let full = k.saturating_mul(2).max(k.saturating_add(64));
    let mut threshold = f32::NEG_INFINITY;
    for (chunk_idx, chunk) in logits.chunks(LANES).enumerate() {
        if !chunk.iter().fold(false, |any, &logit| any | (logit > threshold)) {
            continue;
        }
        for (lane, &logit) in chunk.iter().enumerate() {
            if logit > threshold {
                let token_id = (chunk_idx * LANES + lane) as u32;
                candidates.push(Candidate { token_id, value: logit });
            }
        }
        if candidates.len() >= full {
            let (_, kth, _) = candidates.select_nth_unstable_by(k - 1, likelier_first);
            threshold = kth.value;
            candidates.truncate(k);
        }
    }
    candidates.sort_unstable_by(likelier_first);
    candidates.truncate(k);
}

/// `ln Σ exp(l)`.
fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let sum: f64 = logits
        .chunks(BLOCK)
        .map(|block| lane_sum(block, |logit| exp_nonpositive(logit - max)))
        .sum();
    f64::from(max) + sum.ln()
}

fn token_logprobs(logits: &[f32], log_sum_exp: f64, token_id: u32, top_k: usize, scratch: &mut SamplingScratch) -> TokenLogprobs {
    let logprob = |logit: f32| (f64::from(logit) - log_sum_exp) as f32;
    select_largest(logits, top_k, &mut scratch.candidates);
    TokenLogprobs {
        token_id,
        logprob: logits.get(token_id as usize).map_or(f32::NEG_INFINITY, |&logit| logprob(logit)),
        top: scratch
            .candidates
            .iter()
            .map(|candidate| (candidate.token_id, logprob(candidate.value)))
            .collect(),
    }
}

/// `exp(x)` for `x ≤ 0`, within 2 ulp; 0 below the least normal number. Without a branch, so that loops over it are vectorized.
fn exp_nonpositive(x: f32) -> f32 {
    const LEAST: f32 = -87.0;
    // Adding it rounds to a whole number, which then stands in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > LEAST { x } else { LEAST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUNDER;
    let whole = shifted - ROUNDER;
    let r = (clamped - whole * LN_2_HIGH) - whole * LN_2_LOW;
    // Minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2] (Cephes, expf).
    let mut polynomial = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        polynomial = polynomial * r + coefficient;
    }
    let fraction = polynomial * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x > LEAST { fraction * power } else { 0.0 }
}

/// The draw of output position `output_position` in `[0, 1)`: the upper 53 bits of the first two words (low, high) of
/// [`philox4x32_10`] with the seed as key (low, high) and the position as the first word of the counter.
pub fn uniform(seed: u64, output_position: u32) -> f64 {
    let [low, high, _, _] = philox4x32_10([output_position, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// The counter-based generator Philox 4×32 of 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
        }
        let product_0 = u64::from(counter[0]) * 0xd251_1f53;
        let product_1 = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [
            (product_1 >> 32) as u32 ^ counter[1] ^ key[0],
            product_1 as u32,
            (product_0 >> 32) as u32 ^ counter[3] ^ key[1],
            product_0 as u32,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        batch::TokenCount,
        request::{PromptLogprobsParams, RequestId},
    };

    fn choose(params: SamplingParams) -> ChooseToken {
        ChooseToken {
            params: Arc::new(params),
            output_position: 0,
            token_counts: vec![],
            forbidden: vec![],
            mask: None,
            top_k_logprobs: None,
        }
    }

    fn greedy() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            ..Default::default()
        }
    }

    fn chosen(logits: &[f32], choose: &ChooseToken) -> Result<u32, SampleFailure> {
        choose_token(logits, choose, &mut SamplingScratch::default())
    }

    #[test]
    fn philox_known_answers() {
        // kat_vectors of Random123.
        let check = |counter, key, expected| assert_eq!(philox4x32_10(counter, key), expected);
        check([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        check(
            [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
            [0xa4093822, 0x299f31d0],
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
        );
        // The words in their places: 53 bits of 0xe169c58d_6627e8d5.
        assert_eq!(uniform(0, 0), (0xe169c58d_6627e8d5u64 >> 11) as f64 / 2f64.powi(53));
    }

    #[test]
    fn exp_is_close() {
        let mut worst = 0f64;
        for step in 0..200_000 {
            let x = -87.0 * step as f32 / 200_000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_nonpositive(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.4e-7, "{worst:e}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-100.0), 0.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_the_largest() {
        let mut logits = vec![0.5; 100];
        (logits[37], logits[91], logits[12]) = (2.0, 2.0, 1.0);
        assert_eq!(chosen(&logits, &choose(greedy())), Ok(37));
        assert_eq!(chosen(&[-3.0, f32::NEG_INFINITY, -2.0], &choose(greedy())), Ok(2));
    }

    #[test]
    fn penalties_bias_and_mask_in_this_order() {
        let count = |token_id, in_output, in_prompt| TokenCount {
            token_id,
            in_output,
            in_prompt,
        };
        let mut logits = vec![4.0, -4.0, 4.0, 4.0, 1.0, 9.0, 8.0, 7.0];
        let choose = ChooseToken {
            token_counts: vec![count(0, 0, true), count(1, 2, false), count(2, 3, true), count(900, 1, true)],
            forbidden: vec![5, 901],
            mask: Some(Arc::from([0b1011_1111u32])),
            ..choose(SamplingParams {
                repetition_penalty: 2.0,
                frequency_penalty: 0.5,
                presence_penalty: 0.25,
                logit_bias: vec![(2, 10.0), (4, -1.5), (902, 1.0)],
                ..greedy()
            })
        };
        change_logits(&mut logits, &choose);
        // 4 / 2; -4 · 2 - 2 · 0.5 - 0.25; 4 / 2 - 3 · 0.5 - 0.25 + 10; untouched; 1 - 1.5; forbidden; masked; untouched.
        let infinite = f32::NEG_INFINITY;
        assert_eq!(logits, [2.0, -9.25, 10.25, 4.0, -0.5, infinite, infinite, 7.0]);
    }

    #[test]
    fn mask_forbids_tokens_past_its_end() {
        let mut logits = vec![1.0; 70];
        logits[69] = 5.0;
        let short = ChooseToken {
            mask: Some(Arc::from([0, 1 << 3])),
            ..choose(greedy())
        };
        assert_eq!(chosen(&logits, &short), Ok(35));
    }

    #[test]
    fn failures_are_values() {
        let logits = [1.0, 2.0, 3.0];
        for params in [
            greedy(),
            SamplingParams::default(),
            SamplingParams {
                top_k: 2,
                top_p: 0.5,
                ..Default::default()
            },
        ] {
            let none = ChooseToken {
                mask: Some(Arc::from([0])),
                ..choose(params.clone())
            };
            assert_eq!(chosen(&logits, &none), Err(SampleFailure::NothingAllowed));
            for bad in [f32::NAN, f32::INFINITY] {
                assert_eq!(chosen(&[1.0, bad, 2.0], &choose(params.clone())), Err(SampleFailure::NotFinite));
            }
        }
        let row = SampleRow {
            row: 0,
            request_id: RequestId(1),
            choose: Some(choose(greedy())),
            prompt_logprob: Some((1, PromptLogprobsParams { start: 0, top_k: 1 })),
        };
        let output = sample_row(&[0.0, f32::NAN], &row, &mut SamplingScratch::default());
        assert_eq!(
            output,
            SampleOutput {
                failure: Some(SampleFailure::NotFinite),
                ..Default::default()
            }
        );
    }

    #[test]
    fn logprobs_are_of_the_raw_distribution() {
        let logits = [1.0, 3.0, 2.0, 3.0, -1.0];
        let choose = ChooseToken {
            forbidden: vec![1, 3],
            top_k_logprobs: Some(3),
            ..choose(greedy())
        };
        let prompt = Some((4, PromptLogprobsParams { start: 0, top_k: 0 }));
        let row = SampleRow {
            row: 0,
            request_id: RequestId(1),
            choose: Some(choose),
            prompt_logprob: prompt,
        };
        let output = sample_row(&logits, &row, &mut SamplingScratch::default());
        let lse = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln() as f32;
        assert_eq!(output.token_id, Some(2), "1 and 3 are forbidden");
        let near = |a: f32, b: f32| assert!((a - b).abs() < 1e-6, "{a} {b}");
        let logprobs = output.logprobs.unwrap();
        assert_eq!(logprobs.token_id, 2);
        near(logprobs.logprob, 2.0 - lse);
        assert_eq!(logprobs.top.iter().map(|top| top.0).collect::<Vec<_>>(), [1, 3, 2]);
        near(logprobs.top[0].1, 3.0 - lse);
        near(logprobs.top[2].1, 2.0 - lse);
        let prompt = output.prompt_logprobs.unwrap();
        assert_eq!((prompt.token_id, prompt.top.len()), (4, 0));
        near(prompt.logprob, -1.0 - lse);
    }

    /// The definition at the head of this file, word by word, in f64 and with full sorts: weights by id, zero where a token is out.
    fn naive_weights(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if params.top_k > 0 {
            order.truncate(params.top_k as usize);
        }
        let weight = |token: usize| (f64::from(logits[token] - max) / f64::from(params.temperature)).exp();
        let total: f64 = order.iter().map(|&token| weight(token)).sum();
        let mut cumulated = 0.0;
        let mut kept = vec![];
        for token in order {
            kept.push(token);
            cumulated += weight(token);
            if params.top_p < 1.0 && cumulated >= f64::from(params.top_p) * total {
                break;
            }
        }
        let mut weights = vec![0.0; logits.len()];
        for token in kept.into_iter().filter(|&token| weight(token) >= f64::from(params.min_p)) {
            weights[token] = weight(token);
        }
        weights
    }

    /// `draw` gives a token that the naive distribution has exactly where its cumulated weights say, for `u` in the middle of each
    /// token's share and close to both ends of it.
    fn check_draws(logits: &[f32], params: &SamplingParams) {
        let max = max_logit(logits).unwrap();
        let weights = naive_weights(logits, params);
        let total: f64 = weights.iter().sum();
        let mut scratch = SamplingScratch::default();
        let mut below = 0.0;
        for (token, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            // Shares of less than a millionth lie within the rounding of the sums around them.
            if *weight > 1e-6 * total {
                for share in [0.1, 0.5, 0.9] {
                    let u = (below + share * weight) / total;
                    let got = draw(logits, max, params, u, &mut scratch);
                    assert_eq!(got as usize, token, "u {u}, {params:?}, logits {logits:?}");
                }
            }
            below += weight;
        }
        let last = draw(logits, max, params, 1.0 - f64::EPSILON / 2.0, &mut scratch) as usize;
        assert!(weights[last] > 0.0, "{last} has no weight, {params:?}");
        let first = draw(logits, max, params, 0.0, &mut scratch) as usize;
        assert_eq!(Some(first), weights.iter().position(|&weight| weight > 0.0));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn draws_follow_the_definition(
            // Whole sixteenths: ties are frequent.
            sixteenths in prop::collection::vec(-60i32..60, 1..700),
            temperature in prop_oneof![Just(1.0f32), 0.3f32..3.0],
            top_k in prop_oneof![Just(0u32), 1u32..800],
            top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
            min_p in prop_oneof![Just(0.0f32), 0.001f32..0.9],
        ) {
            let logits: Vec<f32> = sixteenths.into_iter().map(|value| value as f32 / 16.0).collect();
            let params = SamplingParams { temperature, top_k, top_p, min_p, ..Default::default() };
            // Not within rounding of the boundary of a set, where f32 and f64 may differ.
            let clear = |value: f32| SamplingParams { top_p: (top_p * value).min(1.0), min_p: min_p * value, ..params.clone() };
            let support = |params: &SamplingParams| naive_weights(&logits, params).iter().filter(|weight| **weight > 0.0).count();
            prop_assume!(support(&clear(1.0 - 1e-5)) == support(&params) && support(&clear(1.0 + 1e-5)) == support(&params));
            check_draws(&logits, &params);
        }

        #[test]
        fn selection_is_a_sorts_prefix(values in prop::collection::vec(-20i32..20, 0..900), k in 0usize..300) {
            let logits: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
            let mut sorted: Vec<(u32, f32)> = logits.iter().enumerate().map(|(id, &logit)| (id as u32, logit)).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            sorted.truncate(k);
            let mut candidates = vec![];
            select_largest(&logits, k, &mut candidates);
            let got: Vec<(u32, f32)> = candidates.iter().map(|candidate| (candidate.token_id, candidate.value)).collect();
            prop_assert_eq!(got, sorted);
        }
    }

    #[test]
    fn equal_weights_cut_exactly() {
        let logits = [1.0; 8];
        let params = |top_k, top_p, min_p| SamplingParams {
            top_k,
            top_p,
            min_p,
            ..Default::default()
        };
        // A quarter of eight equals is two of them, the lowest ids; half of the six of top_k is three.
        for (params, expected) in [
            (params(0, 0.25, 0.0), 2),
            (params(6, 0.5, 0.0), 3),
            (params(5, 1.0, 1.0), 5),
            (params(0, 1.0, 1.0), 8),
            (params(0, 1e-9, 0.0), 1),
        ] {
            let last = draw(&logits, 1.0, &params, 1.0 - 1e-12, &mut SamplingScratch::default());
            assert_eq!(last, expected - 1, "{params:?}");
        }
    }

    #[test]
    fn a_flat_nucleus_is_found_whole() {
        // 5000 of 20000 equal tokens.
        let params = SamplingParams {
            top_p: 0.25,
            ..Default::default()
        };
        let last = draw(&[0.0; 20_000], 0.0, &params, 1.0 - 1e-12, &mut SamplingScratch::default());
        assert_eq!(last, 4999);
        // Hundreds of tokens over many buckets, and tokens that can't be.
        let logits: Vec<f32> = (0..2500u32)
            .map(|token| match token.wrapping_mul(2_654_435_761) >> 20 {
                bits if bits % 7 == 0 => f32::NEG_INFINITY,
                bits => bits as f32 / 1024.0,
            })
            .collect();
        for top_p in [0.5, 0.9, 0.99] {
            let params = SamplingParams {
                top_p,
                min_p: 0.05,
                ..Default::default()
            };
            let num_kept = naive_weights(&logits, &params).iter().filter(|weight| **weight > 0.0).count();
            assert!(num_kept > SMALL_NUCLEUS, "{num_kept}");
            check_draws(&logits, &params);
        }
    }

    /// The frequencies over seeds 0..20000 fit the definition: chi-square below the 99.9 % point of its degrees of freedom.
    #[test]
    fn frequencies_fit() {
        let logits: Vec<f32> = (0..12).map(|token| ((token * 7) % 12) as f32 / 4.0).collect();
        const DRAWS: u32 = 20_000;
        // (parameters, 99.9 % point of chi-square with one degree less than tokens that are left)
        for (params, tokens, limit) in [
            (SamplingParams::default(), 12, 31.26),
            (
                SamplingParams {
                    temperature: 0.5,
                    top_k: 5,
                    ..Default::default()
                },
                5,
                18.47,
            ),
            (
                SamplingParams {
                    top_p: 0.8,
                    ..Default::default()
                },
                6,
                20.52,
            ),
            (
                SamplingParams {
                    min_p: 0.3,
                    ..Default::default()
                },
                5,
                18.47,
            ),
        ] {
            let weights = naive_weights(&logits, &params);
            let total: f64 = weights.iter().sum();
            assert_eq!(weights.iter().filter(|weight| **weight > 0.0).count(), tokens, "{params:?}");
            for by_position in [false, true] {
                let mut counts = [0u32; 12];
                for draw in 0..DRAWS {
                    let (seed, output_position) = if by_position { (3, draw) } else { (u64::from(draw), 5) };
                    let choose = ChooseToken {
                        output_position,
                        ..choose(SamplingParams { seed, ..params.clone() })
                    };
                    counts[chosen(&logits, &choose).unwrap() as usize] += 1;
                }
                let mut chi_square = 0.0;
                for (count, weight) in counts.iter().zip(&weights) {
                    if *weight == 0.0 {
                        assert_eq!(*count, 0);
                    } else {
                        let expected = weight / total * f64::from(DRAWS);
                        chi_square += (f64::from(*count) - expected).powi(2) / expected;
                    }
                }
                assert!(chi_square < limit, "chi-square {chi_square}, {params:?}, by position {by_position}");
            }
        }
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let logits: Vec<f32> = (0..1000).map(|token| ((token * 37) % 101) as f32 / 30.0).collect();
        let at = |seed, output_position| {
            let choose = ChooseToken {
                output_position,
                ..choose(SamplingParams { seed, ..Default::default() })
            };
            chosen(&logits, &choose).unwrap()
        };
        let stream = |seed| (0..50).map(|position| at(seed, position)).collect::<Vec<_>>();
        assert_eq!(stream(1), stream(1));
        assert_ne!(stream(1), stream(2));
        assert_ne!(stream(1), stream(1 | 1 << 40), "the high word of the seed counts");
        // The same from a scratch that another row has used.
        let mut scratch = SamplingScratch::default();
        let masked = ChooseToken {
            mask: Some(Arc::from([7])),
            ..choose(SamplingParams {
                top_k: 3,
                ..Default::default()
            })
        };
        choose_token(&[1.0; 5000], &masked, &mut scratch).unwrap();
        let again = choose_token(
            &logits,
            &choose(SamplingParams {
                seed: 9,
                ..Default::default()
            }),
            &mut scratch,
        );
        assert_eq!(again, Ok(at(9, 0)));
    }

    #[test]
    fn tiny_temperatures_are_greedy() {
        let logits = [1.0, 5.0, 5.0, 4.999];
        for seed in 0..50 {
            let params = SamplingParams {
                temperature: f32::MIN_POSITIVE,
                seed,
                ..Default::default()
            };
            assert!([1, 2].contains(&chosen(&logits, &choose(params)).unwrap()));
        }
    }
}
