//! `(state, arrivals) -> StepBatch`; pure: no I/O, no clock, no device, no tokenizer.
