//! Where the logits of a step's sample rows lie, and what adapters do to them. Pure but for the adapters' addresses.
//!
//! The base model's head writes `[rows, vocab]` at the buffer's start, and a row with as many tokens has its logits there. One whose adapter
//! has another vocabulary has them behind those, beside its neighbours under the same adapter, in a width that is a multiple of 8: so has one
//! whose adapter changes a head of a width that is none, since the kernels of deltas want one.

use std::ops::Range;

use half::bf16;
use polylora_kernels::cuda::{
    View,
    own_logits::{LogitsCopy, MAX_ITEM_ROWS, TokenRowsItem},
};

use super::{
    adapters::{Adapters, COLUMNS, Resident},
    plan::{self, LoraWork},
};
use crate::{
    adapter::load::MAX_ADDED_TOKENS,
    batch::{LoraSegment, SampleRow},
    decoder::DecoderConfig,
};

/// Rows of the widest adapter that the buffer takes at once, at least.
const MIN_OWN_ROWS: usize = 8;

/// The buffer that the logits lie in.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogitsBuffer {
    /// Sample rows that are in it at once, at most.
    pub max_rows: usize,
    pub len: usize,
    /// Tokens of the base model.
    pub vocab: usize,
}

impl LogitsBuffer {
    /// Room for `max_rows` rows of the base model's, and for a few of any adapter's that may be loaded.
    pub fn new(config: &DecoderConfig, max_rows: usize) -> Self {
        let vocab = config.vocab_size;
        let buffer = Self { max_rows, len: 0, vocab };
        let widest = (vocab + MAX_ADDED_TOKENS).next_multiple_of(COLUMNS);
        let of_own = buffer.own_start(MIN_OWN_ROWS.min(max_rows)) + MIN_OWN_ROWS * widest;
        Self {
            len: of_own.max(max_rows * vocab),
            ..buffer
        }
    }

    /// Rows that the base model's head computes for `rows`.
    pub fn base_rows(&self, rows: usize) -> usize {
        plan::bucket(rows).min(self.max_rows)
    }

    /// Where the logits begin that are not in the base model's place.
    fn own_start(&self, rows: usize) -> usize {
        (self.base_rows(rows) * self.vocab).next_multiple_of(COLUMNS)
    }

    /// The rows from `first` on that fit together. `widths`: of every row, the logits that it has behind the base model's, or 0.
    fn rows_at_once(&self, widths: &[usize], first: usize) -> Range<usize> {
        let mut own_len = 0;
        let mut end = first;
        while end < widths.len() && end - first < self.max_rows {
            own_len += widths[end];
            if own_len > 0 && self.own_start(end - first + 1) + own_len > self.len {
                break;
            }
            end += 1;
        }
        assert!(end > first, "the buffer takes a row of any adapter that is resident");
        first..end
    }
}

/// Where one row's logits lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogitsPlace {
    pub start: usize,
    pub vocab: usize,
}

impl LogitsPlace {
    pub fn range(self) -> Range<usize> {
        self.start..self.start + self.vocab
    }
}

/// Sample rows whose logits are in memory at once; what lies within counts rows from the first of them.
pub(super) struct HeadChunk<'a> {
    /// Of the step's samples.
    pub rows: Range<usize>,
    /// By row.
    pub places: Vec<LogitsPlace>,
    /// Rows of the base model's head, padded; 0 when no row has anything of it.
    pub base_rows: usize,
    pub own: Vec<OwnHead<'a>>,
    pub copies: Vec<LogitsCopy>,
    pub token_rows: Vec<TokenRowsItem>,
    pub deltas: Vec<HeadDeltas>,
}

/// Rows whose adapter brings a head of its own, `[width, hidden]`.
pub(super) struct OwnHead<'a> {
    pub row_start: usize,
    pub num_rows: usize,
    pub weight: View<'a, bf16>,
    /// Of the first row's logits; the others follow.
    pub logits_start: usize,
    pub width: usize,
}

/// Rows with logits of one width side by side, and the deltas, scales and biases on them. Items count from the first of these rows.
pub(super) struct HeadDeltas {
    pub row_start: usize,
    pub num_rows: usize,
    pub logits_start: usize,
    pub width: usize,
    pub work: LoraWork,
}

/// The work of all sample rows, as many at once as fit.
pub(super) fn chunks<'a>(
    samples: &[SampleRow],
    lora_segments: &[LoraSegment],
    adapters: &'a Adapters,
    config: &DecoderConfig,
    buffer: LogitsBuffer,
) -> Vec<HeadChunk<'a>> {
    let segments = plan::segments_of_samples(lora_segments, samples);
    let mut widths = vec![0; samples.len()];
    for segment in &segments {
        let resident = adapters.get(segment.adapter).expect("the batch was checked");
        let rows = segment.row_start as usize..(segment.row_start + segment.num_rows) as usize;
        widths[rows].fill(own_width(resident, config.vocab_size));
    }
    let mut chunks = Vec::new();
    let mut first = 0;
    while first < samples.len() {
        let rows = buffer.rows_at_once(&widths, first);
        first = rows.end;
        let within = plan::segments_within(&segments, rows.start as u32, rows.len() as u32);
        chunks.push(HeadChunk::new(rows, &within, adapters, config, buffer));
    }
    chunks
}

/// The logits that a row under this adapter has behind the base model's, padding included; 0 if it has them in their place.
fn own_width(resident: &Resident, base_vocab: usize) -> usize {
    let has_deltas = resident.head_rank_tiles > 0 || resident.head_has_output_terms;
    let stays = resident.vocab_size == base_vocab && (base_vocab.is_multiple_of(COLUMNS) || !has_deltas);
    if stays { 0 } else { resident.vocab_size.next_multiple_of(COLUMNS) }
}

impl<'a> HeadChunk<'a> {
    fn new(rows: Range<usize>, segments: &[LoraSegment], adapters: &'a Adapters, config: &DecoderConfig, buffer: LogitsBuffer) -> Self {
        let (num_rows, vocab) = (rows.len(), config.vocab_size);
        let mut chunk = Self {
            rows,
            places: (0..num_rows).map(|row| LogitsPlace { start: row * vocab, vocab }).collect(),
            base_rows: 0,
            own: Vec::new(),
            copies: Vec::new(),
            token_rows: Vec::new(),
            deltas: Vec::new(),
        };
        let mut own_start = buffer.own_start(num_rows);
        let mut in_place = Vec::new();
        for segment in segments {
            let resident = adapters.get(segment.adapter).expect("the batch was checked");
            let width = match own_width(resident, vocab) {
                0 => {
                    in_place.push(*segment);
                    vocab
                }
                width => {
                    chunk.move_rows(segment, own_start, width, resident.vocab_size);
                    let segment_len = segment.num_rows as usize * width;
                    chunk.add_deltas(std::slice::from_ref(segment), own_start, width, adapters, config);
                    own_start += segment_len;
                    width
                }
            };
            chunk.add_weights(segment, width, adapters, config);
        }
        if chunk.own.iter().map(|own| own.num_rows).sum::<usize>() < num_rows {
            chunk.base_rows = buffer.base_rows(num_rows);
        }
        if let Some(first) = in_place.first() {
            chunk.add_deltas(&in_place, first.row_start as usize * vocab, vocab, adapters, config);
        }
        chunk
    }

    /// Gives a segment's rows places of their own.
    fn move_rows(&mut self, segment: &LoraSegment, start: usize, width: usize, vocab: usize) {
        for row in 0..segment.num_rows as usize {
            self.places[segment.row_start as usize + row] = LogitsPlace {
                start: start + row * width,
                vocab,
            };
        }
    }

    /// What takes the place of the base model's head, or of rows of it, and what is kept of it.
    fn add_weights(&mut self, segment: &LoraSegment, width: usize, adapters: &'a Adapters, config: &DecoderConfig) {
        let resident = adapters.get(segment.adapter).expect("the batch was checked");
        let (row_start, num_rows) = (segment.row_start as usize, segment.num_rows as usize);
        let logits_start = self.places[row_start].start;
        let is_moved = logits_start != row_start * config.vocab_size;
        match adapters.replaced_head(resident, config) {
            Some(weight) => self.own.push(OwnHead {
                row_start,
                num_rows,
                weight,
                logits_start,
                width,
            }),
            None if is_moved => self.copies.extend((row_start..row_start + num_rows).map(|row| LogitsCopy {
                from: (row * config.vocab_size) as u64,
                to: self.places[row].start as u64,
                len: config.vocab_size.min(resident.vocab_size) as u32,
                reserved: 0,
            })),
            None => {}
        }
        let Some(own_rows) = adapters.head_rows(resident) else { return };
        let item = |first: usize| TokenRowsItem {
            rows: own_rows.rows,
            token_ids: own_rows.token_ids,
            y_start: (logits_start + first * width) as u64,
            y_stride: width as u32,
            num_tokens: own_rows.len as u32,
            row_start: (row_start + first) as u32,
            num_rows: MAX_ITEM_ROWS.min(num_rows - first) as u32,
        };
        self.token_rows.extend((0..num_rows).step_by(MAX_ITEM_ROWS).map(item));
    }

    /// The deltas, scales and biases of segments whose rows have logits of one width from `logits_start` on: the first row's.
    fn add_deltas(&mut self, segments: &[LoraSegment], logits_start: usize, width: usize, adapters: &Adapters, config: &DecoderConfig) {
        let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
            return;
        };
        let num_rows = last.row_start + last.num_rows - first.row_start;
        let segments = plan::segments_within(segments, first.row_start, num_rows);
        let mut work = LoraWork::new(&segments, adapters, 64, |resident| [resident.head_rank_tiles, 0, 0, 0]);
        for segment in &segments {
            let resident = adapters.get(segment.adapter).expect("the batch was checked");
            if resident.head_has_output_terms {
                let address = adapters.terms_address(resident, config);
                work.output_items.extend(plan::items(segment, address, 64));
            }
        }
        if !work.expand_items.is_empty() || !work.output_items.is_empty() {
            self.deltas.push(HeadDeltas {
                row_start: first.row_start as usize,
                num_rows: num_rows as usize,
                logits_start,
                width,
                work,
            });
        }
    }

    /// The longest copy.
    pub fn max_copy_len(&self) -> usize {
        self.copies.iter().map(|copy| copy.len as usize).max().unwrap_or(0)
    }

    /// The most tokens of an item.
    pub fn max_token_rows(&self) -> usize {
        self.token_rows.iter().map(|item| item.num_tokens as usize).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vocab_size: usize) -> DecoderConfig {
        DecoderConfig {
            vocab_size,
            ..crate::backend::conformance::config()
        }
    }

    #[test]
    fn rows_of_the_base_models_vocabulary_are_as_many_at_once_as_ever() {
        for vocab in [520, 32001, 128_256] {
            let buffer = LogitsBuffer::new(&config(vocab), 256);
            assert!(buffer.len >= 256 * vocab);
            assert_eq!(buffer.rows_at_once(&[0; 300], 0), 0..256);
            assert_eq!(buffer.rows_at_once(&[0; 300], 256), 256..300);
        }
        // Where the base model has as many tokens as a server's usually has, none of it is memory for what may never come.
        assert_eq!(LogitsBuffer::new(&config(128_256), 256).len, 256 * 128_256);
    }

    #[test]
    fn rows_with_logits_of_their_own_fit_beside_the_others() {
        for (vocab, max_rows) in [(520, 256), (50_257, 64), (128_256, 256), (32_000, 1)] {
            let buffer = LogitsBuffer::new(&config(vocab), max_rows);
            let widest = (vocab + MAX_ADDED_TOKENS).next_multiple_of(COLUMNS);
            let mut widths = vec![widest; 400];
            widths.iter_mut().step_by(3).for_each(|width| *width = 0);
            let mut first = 0;
            while first < widths.len() {
                let rows = buffer.rows_at_once(&widths, first);
                assert!(rows.start == first && rows.len() <= max_rows);
                let own: usize = widths[rows.clone()].iter().sum();
                assert!(buffer.base_rows(rows.len()) * vocab + own <= buffer.len, "{rows:?}");
                first = rows.end;
            }
            let at_once = buffer.rows_at_once(&vec![widest; 400], 0).len();
            assert!(at_once >= MIN_OWN_ROWS.min(max_rows), "{at_once} rows of the widest adapter");
        }
    }
}
