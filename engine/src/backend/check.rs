//! The rules of a [`StepBatch`], checked: a batch that breaks one is a bug in the engine and must not reach a kernel.

use super::{BackendError, Capacity};
use crate::batch::{AdapterHandle, LoraSegment, StepBatch};

/// What a batch is checked against beside [`Capacity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelLimits {
    /// Tokens of the base model.
    pub vocab_size: usize,
    /// Positions in the rotary tables.
    pub max_positions: usize,
    /// KV blocks that there are now.
    pub num_blocks: usize,
}

/// Checks a batch; the cost is a few comparisons a row. `vocab_of` gives the number of tokens that rows under an adapter may have, `None`
/// for one that is not ready.
///
/// # Errors
/// `BadBatch` with the rule that is broken and where.
pub fn check_batch(
    batch: &StepBatch,
    capacity: &Capacity,
    limits: ModelLimits,
    vocab_of: impl Fn(AdapterHandle) -> Option<usize>,
) -> Result<(), BackendError> {
    let num_rows = batch.token_ids.len();
    ensure(num_rows <= capacity.max_batch_tokens, || {
        format!("{num_rows} rows, at most {} fit", capacity.max_batch_tokens)
    })?;
    ensure(batch.positions.len() == num_rows && batch.kv_slots.len() == num_rows, || {
        format!(
            "{num_rows} token ids, {} positions, {} kv_slots",
            batch.positions.len(),
            batch.kv_slots.len()
        )
    })?;
    check_sequences(batch, capacity, limits)?;
    check_segments(batch, capacity, |handle| vocab_of(handle).is_some())?;
    let mut vocab = RowVocab {
        segments: &batch.lora_segments,
        vocab_of: &vocab_of,
        base: limits.vocab_size,
    };
    for (row, &token_id) in batch.token_ids.iter().enumerate() {
        let vocab_size = vocab.of_row(row);
        ensure((token_id as usize) < vocab_size, || {
            format!("row {row}: token id {token_id}, vocabulary of {vocab_size}")
        })?;
    }
    vocab.segments = &batch.lora_segments;
    check_samples(batch, vocab)
}

/// The vocabularies of rows that are asked for in ascending order.
struct RowVocab<'a, F> {
    /// Those that do not end before the last row asked for; checked.
    segments: &'a [LoraSegment],
    vocab_of: &'a F,
    base: usize,
}

impl<F: Fn(AdapterHandle) -> Option<usize>> RowVocab<'_, F> {
    fn of_row(&mut self, row: usize) -> usize {
        while let Some((first, rest)) = self.segments.split_first() {
            if row < first.row_start as usize {
                break;
            }
            if row < (first.row_start + first.num_rows) as usize {
                return (self.vocab_of)(first.adapter).unwrap_or(self.base);
            }
            self.segments = rest;
        }
        self.base
    }
}

fn check_sequences(batch: &StepBatch, capacity: &Capacity, limits: ModelLimits) -> Result<(), BackendError> {
    let mut next_row = 0;
    for sequence in &batch.sequences {
        let id = sequence.request_id.0;
        let (start, rows, context_len) = (sequence.row_start as usize, sequence.num_rows as usize, sequence.context_len as usize);
        ensure(start == next_row && rows >= 1, || {
            format!("request {id}: rows {start} + {rows}, expected at least one from row {next_row} on")
        })?;
        next_row = start + rows;
        ensure(next_row <= batch.token_ids.len(), || {
            format!("request {id}: rows end at {next_row}, the batch has {}", batch.token_ids.len())
        })?;
        ensure(rows <= context_len && context_len <= limits.max_positions, || {
            format!(
                "request {id}: context_len {context_len} with {rows} rows, at most {} positions",
                limits.max_positions
            )
        })?;
        let needed_blocks = context_len.div_ceil(capacity.block_size);
        ensure(needed_blocks <= sequence.block_table.len(), || {
            format!("request {id}: {} blocks for context_len {context_len}", sequence.block_table.len())
        })?;
        let table = &sequence.block_table[..needed_blocks];
        if let Some(block) = table.iter().find(|&&block| block as usize >= limits.num_blocks) {
            return bad(format!("request {id}: block {block} of {}", limits.num_blocks));
        }
        for row in start..next_row {
            let position = context_len - rows + (row - start);
            let slot = table[position / capacity.block_size] as usize * capacity.block_size + position % capacity.block_size;
            ensure(batch.positions[row] as usize == position && batch.kv_slots[row] as usize == slot, || {
                format!(
                    "request {id}, row {row}: position {} and kv_slot {}, expected {position} and {slot}",
                    batch.positions[row], batch.kv_slots[row]
                )
            })?;
        }
    }
    ensure(next_row == batch.token_ids.len(), || {
        format!("sequences cover {next_row} of {} rows", batch.token_ids.len())
    })
}

fn check_segments(batch: &StepBatch, capacity: &Capacity, is_ready: impl Fn(AdapterHandle) -> bool) -> Result<(), BackendError> {
    let mut end = 0;
    let mut handles: Vec<AdapterHandle> = Vec::with_capacity(batch.lora_segments.len());
    for segment in &batch.lora_segments {
        let (start, rows) = (segment.row_start as usize, segment.num_rows as usize);
        ensure(start >= end && rows >= 1 && start + rows <= batch.token_ids.len(), || {
            format!(
                "segment of adapter {}: rows {start} + {rows}, expected ascending from {end} to {}",
                segment.adapter.0,
                batch.token_ids.len()
            )
        })?;
        end = start + rows;
        ensure(is_ready(segment.adapter), || format!("adapter handle {} is not ready", segment.adapter.0))?;
        handles.push(segment.adapter);
    }
    handles.sort_unstable();
    handles.dedup();
    ensure(handles.len() <= capacity.max_adapters_per_batch, || {
        format!("{} distinct adapters, at most {}", handles.len(), capacity.max_adapters_per_batch)
    })
}

fn check_samples(batch: &StepBatch, mut vocab: RowVocab<'_, impl Fn(AdapterHandle) -> Option<usize>>) -> Result<(), BackendError> {
    let mut next_row = 0;
    for sample in &batch.samples {
        let row = sample.row as usize;
        ensure(row >= next_row && row < batch.token_ids.len(), || {
            format!("sample row {row}, expected ascending from {next_row} below {}", batch.token_ids.len())
        })?;
        next_row = row + 1;
        if let Some((token_id, _)) = sample.prompt_logprob {
            let vocab_size = vocab.of_row(row);
            ensure((token_id as usize) < vocab_size, || {
                format!("sample row {row}: prompt token id {token_id}, vocabulary of {vocab_size}")
            })?;
        }
    }
    Ok(())
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<(), BackendError> {
    if holds { Ok(()) } else { bad(message()) }
}

fn bad(message: String) -> Result<(), BackendError> {
    Err(BackendError::BadBatch(message))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        batch::{SampleRow, SequenceRows},
        request::RequestId,
    };

    /// A decode row at position 5 (blocks 7, 2 of 4) and a chunk of 3 at positions 0 to 2 (block 1) under an adapter.
    fn batch() -> StepBatch {
        StepBatch {
            token_ids: vec![3, 8, 5, 6],
            positions: vec![5, 0, 1, 2],
            kv_slots: vec![2 * 4 + 1, 4, 5, 6],
            sequences: vec![
                SequenceRows {
                    request_id: RequestId(1),
                    row_start: 0,
                    num_rows: 1,
                    context_len: 6,
                    block_table: Arc::from([7, 2]),
                },
                SequenceRows {
                    request_id: RequestId(2),
                    row_start: 1,
                    num_rows: 3,
                    context_len: 3,
                    block_table: Arc::from([1]),
                },
            ],
            carried_tokens: vec![],
            lora_segments: vec![LoraSegment {
                adapter: AdapterHandle(9),
                row_start: 1,
                num_rows: 3,
            }],
            samples: [0, 3]
                .map(|row| SampleRow {
                    row,
                    request_id: RequestId(1),
                    choose: None,
                    prompt_logprob: None,
                })
                .to_vec(),
        }
    }

    fn check(change: impl FnOnce(&mut StepBatch)) -> Result<(), String> {
        let capacity = Capacity {
            num_blocks: 8,
            min_blocks: 8,
            block_size: 4,
            kv_block_bytes: 0,
            shared_bytes: 0,
            max_batch_tokens: 4,
            adapter_bytes: 0,
            max_adapters_per_batch: 1,
        };
        let mut batch = batch();
        change(&mut batch);
        let limits = ModelLimits {
            vocab_size: 7,
            max_positions: 20,
            num_blocks: 8,
        };
        // Adapter 9 has tokens of its own, 7 and 8.
        let vocab_of = |handle: AdapterHandle| (handle.0 >= 9).then_some(if handle.0 == 9 { 9 } else { 7 });
        check_batch(&batch, &capacity, limits, vocab_of).map_err(|error| error.to_string())
    }

    #[test]
    fn each_rule_is_checked() {
        check(|_| {}).unwrap();
        let broken = |change: fn(&mut StepBatch), part: &str| {
            let message = check(change).unwrap_err();
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        };
        broken(|batch| batch.token_ids[0] = 7, "row 0: token id 7, vocabulary of 7");
        broken(|batch| batch.token_ids[2] = 9, "row 2: token id 9, vocabulary of 9");
        broken(|batch| batch.lora_segments.clear(), "row 1: token id 8, vocabulary of 7");
        let params = crate::request::PromptLogprobsParams { start: 0, top_k: 1 };
        check(|batch| batch.samples[1].prompt_logprob = Some((8, params))).unwrap();
        broken(
            |batch| batch.samples[0].prompt_logprob = Some((8, crate::request::PromptLogprobsParams { start: 0, top_k: 1 })),
            "sample row 0: prompt token id 8, vocabulary of 7",
        );
        broken(|batch| batch.token_ids.push(1), "5 rows, at most 4");
        broken(|batch| batch.positions.truncate(3), "3 positions");
        broken(|batch| batch.positions[1] = 1, "row 1: position 1 and kv_slot 4, expected 0 and 4");
        broken(|batch| batch.kv_slots[0] = 29, "row 0: position 5 and kv_slot 29, expected 5 and 9");
        broken(|batch| batch.sequences[0].block_table = Arc::from([7, 8]), "block 8 of 8");
        broken(|batch| batch.sequences[0].block_table = Arc::from([7]), "1 blocks for context_len 6");
        broken(|batch| batch.sequences[1].context_len = 2, "context_len 2 with 3 rows");
        broken(|batch| batch.sequences[0].context_len = 21, "context_len 21");
        broken(|batch| batch.sequences[1].row_start = 2, "rows 2 + 3");
        broken(|batch| batch.sequences.truncate(1), "cover 1 of 4");
        broken(|batch| batch.sequences[1].num_rows = 0, "rows 1 + 0");
        broken(|batch| batch.lora_segments[0].num_rows = 4, "rows 1 + 4");
        broken(|batch| batch.lora_segments[0].adapter = AdapterHandle(1), "handle 1 is not ready");
        broken(|batch| batch.lora_segments.push(batch.lora_segments[0]), "ascending from 4");
        broken(
            |batch| {
                batch.lora_segments[0].num_rows = 1;
                batch.lora_segments.push(LoraSegment {
                    adapter: AdapterHandle(10),
                    row_start: 2,
                    num_rows: 1,
                });
            },
            "2 distinct adapters, at most 1",
        );
        broken(|batch| batch.samples[1].row = 0, "sample row 0, expected ascending from 1");
        broken(|batch| batch.samples[1].row = 4, "sample row 4");
    }
}
