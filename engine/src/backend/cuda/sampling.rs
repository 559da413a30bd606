//! Sample rows as the kernel wants them, and what it gives back as [`SampleOutput`]s.

use std::collections::BTreeMap;

use polylora_kernels::cuda::sampling::{MAX_TOP, SampleEdit, SampleParams, SampleResult, flags};

use super::head::LogitsPlace;
use crate::{
    batch::{ChooseToken, SampleFailure, SampleOutput, SampleRow},
    request::TokenLogprobs,
    sampling::{SamplingScratch, sample_row, uniform},
};

/// Rows with their edits and masks.
#[derive(Default)]
pub(super) struct SampleWork {
    pub params: Vec<SampleParams>,
    pub edits: Vec<SampleEdit>,
    pub masks: Vec<u32>,
    pub wants_top: bool,
}

impl SampleWork {
    /// `places`: where each row's logits lie.
    pub fn new<'a>(samples: &[SampleRow], places: impl Iterator<Item = &'a LogitsPlace>) -> Self {
        let mut work = Self::default();
        for (slot, (sample, place)) in samples.iter().zip(places).enumerate() {
            let params = work.row(sample, slot as u32, *place);
            work.wants_top |= params.num_top > 0;
            work.params.push(params);
        }
        work
    }

    fn row(&mut self, sample: &SampleRow, slot: u32, place: LogitsPlace) -> SampleParams {
        let mut params = SampleParams {
            top_p: 1.0,
            repetition_penalty: 1.0,
            slot,
            vocab: place.vocab as u32,
            logits_start: place.start as u64,
            ..SampleParams::default()
        };
        if let Some((token, logprobs)) = sample.prompt_logprob {
            params.flags |= flags::PROMPT_LOGPROB;
            params.prompt_token = token;
            params.num_top = logprobs.top_k;
        }
        let Some(choose) = &sample.choose else { return params };
        params.flags |= flags::CHOOSE;
        params.u = uniform(choose.params.seed, choose.output_position);
        params.temperature = choose.params.temperature;
        params.top_p = choose.params.top_p;
        params.min_p = choose.params.min_p;
        params.top_k = choose.params.top_k;
        params.repetition_penalty = choose.params.repetition_penalty;
        params.frequency_penalty = choose.params.frequency_penalty;
        params.presence_penalty = choose.params.presence_penalty;
        if let Some(top_k) = choose.top_k_logprobs {
            params.flags |= flags::OUTPUT_LOGPROB;
            params.num_top = params.num_top.max(top_k);
        }
        params.edits_start = self.edits.len() as u32;
        self.edits.extend(edits(choose));
        params.num_edits = self.edits.len() as u32 - params.edits_start;
        if let Some(mask) = &choose.mask {
            params.flags |= flags::MASKED;
            params.mask_start = self.masks.len() as u32;
            // What a short mask does not mention is not allowed.
            let words = place.vocab.div_ceil(32);
            self.masks.extend(mask.iter().copied().chain(std::iter::repeat(0)).take(words));
        }
        params
    }
}

/// The tokens whose logits change, each once.
fn edits(choose: &ChooseToken) -> Vec<SampleEdit> {
    let mut edits: BTreeMap<u32, SampleEdit> = BTreeMap::new();
    let mut edit = |token: u32, change: &dyn Fn(&mut SampleEdit)| {
        change(edits.entry(token).or_insert(SampleEdit {
            token,
            ..SampleEdit::default()
        }));
    };
    for count in &choose.token_counts {
        if count.in_output > 0 || count.in_prompt {
            edit(count.token_id, &|edit| {
                edit.counts |= flags::EDIT_SEEN | count.in_output.min(flags::EDIT_COUNT)
            });
        }
    }
    for &(token, bias) in &choose.params.logit_bias {
        edit(token, &|edit| edit.bias += bias);
    }
    for &token in &choose.forbidden {
        edit(token, &|edit| edit.counts |= flags::EDIT_FORBIDDEN);
    }
    edits.into_values().collect()
}

/// The likeliest tokens that one row wants, at most.
pub(super) fn num_top(sample: &SampleRow) -> usize {
    let output = sample.choose.as_ref().and_then(|choose| choose.top_k_logprobs).unwrap_or(0);
    let prompt = sample.prompt_logprob.map_or(0, |(_, logprobs)| logprobs.top_k);
    output.max(prompt) as usize
}

/// Whether the kernel reports fewer likeliest tokens than the row wants: then its logits come to the host.
pub(super) fn needs_logits(sample: &SampleRow) -> bool {
    num_top(sample) > MAX_TOP
}

/// What came of one row.
pub(super) struct RowResult<'a> {
    pub result: SampleResult,
    /// `[MAX_TOP]`, `u32::MAX` past the last.
    pub top_ids: &'a [u32],
    pub top_logprobs: &'a [f32],
    /// The row's logits where [`needs_logits`].
    pub logits: Option<&'a [f32]>,
}

impl RowResult<'_> {
    pub fn output(&self, sample: &SampleRow) -> SampleOutput {
        let mut output = SampleOutput::default();
        match self.result.status {
            0 => {}
            1 => {
                output.failure = Some(SampleFailure::NotFinite);
                return output;
            }
            _ => output.failure = Some(SampleFailure::NothingAllowed),
        }
        if let Some((token_id, params)) = sample.prompt_logprob {
            output.prompt_logprobs = Some(self.logprobs(token_id, self.result.prompt_logprob, params.top_k, sample));
        }
        if let (Some(choose), None) = (&sample.choose, output.failure) {
            let token_id = self.result.token;
            output.token_id = Some(token_id);
            output.logprobs = choose
                .top_k_logprobs
                .map(|top_k| self.logprobs(token_id, self.result.logprob, top_k, sample));
        }
        output
    }

    fn logprobs(&self, token_id: u32, logprob: f32, top_k: u32, sample: &SampleRow) -> TokenLogprobs {
        if let Some(logits) = self.logits {
            let params = crate::request::PromptLogprobsParams { start: 0, top_k };
            let row = SampleRow {
                choose: None,
                prompt_logprob: Some((token_id, params)),
                ..sample.clone()
            };
            return sample_row(logits, &row, &mut SamplingScratch::default())
                .prompt_logprobs
                .expect("the kernel found the same logits finite");
        }
        let top = self.top_ids.iter().copied().zip(self.top_logprobs.iter().copied());
        TokenLogprobs {
            token_id,
            logprob,
            top: top.take(top_k as usize).take_while(|(id, _)| *id != u32::MAX).collect(),
        }
    }
}
