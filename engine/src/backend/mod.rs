//! What the engine thread sees of a device.

use std::sync::Arc;

use crate::{
    adapter::HostAdapter,
    batch::{AdapterHandle, StepBatch, StepOutput},
    block_pool::BlockMove,
};

pub mod check;
#[doc(hidden)]
pub mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

/// What a backend can hold; fixed once it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// KV blocks, at most: where adapters share their memory, as many as there are without any adapter.
    pub num_blocks: usize,
    /// KV blocks that adapters never take. All of them where each side has memory of its own.
    pub min_blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Bytes of one block's keys and values over all layers, in the dtype that this backend keeps them in.
    pub kv_block_bytes: usize,
    /// Most rows of one step.
    pub max_batch_tokens: usize,
    /// Most bytes of adapters resident at once, by [`Backend::adapter_bytes`].
    pub adapter_bytes: usize,
    /// Bytes that KV blocks and adapters have together, if they share them.
    pub shared_bytes: usize,
    /// Distinct adapters of one step.
    pub max_adapters_per_batch: usize,
}

impl Capacity {
    /// Whether KV blocks and adapters share their memory.
    pub fn is_shared(&self) -> bool {
        self.min_blocks < self.num_blocks
    }

    /// KV blocks that there can be beside so many bytes of adapters. Fewer than `min_blocks`: there can't be so many adapters.
    pub fn blocks_beside(&self, adapter_bytes: usize) -> usize {
        match self.is_shared() {
            false => self.num_blocks,
            true => (self.shared_bytes.saturating_sub(adapter_bytes) / self.kv_block_bytes).min(self.num_blocks),
        }
    }
}

/// A device that failed. The engine ends every request and turns unhealthy.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BackendError {
    /// The device or its driver failed.
    #[error("device: {0}")]
    Device(String),
    /// Not enough memory; names the budget.
    #[error("out of memory: {what} needs {needed_bytes} bytes, {available_bytes} are free")]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Bytes needed.
        needed_bytes: usize,
        /// Bytes free.
        available_bytes: usize,
    },
    /// The batch breaks a rule of [`StepBatch`]: a bug in the engine.
    #[error("bad batch: {0}")]
    BadBatch(String),
}

/// One device, or one tensor-parallel group. One owner, `&mut self`: no locks inside.
pub trait Backend: Send {
    /// What it can hold.
    fn capacity(&self) -> &Capacity;
    /// Bytes that an adapter takes on the device.
    ///
    /// # Errors
    /// `BadBatch` for one that can't be there.
    fn adapter_bytes(&self, adapter: &HostAdapter) -> Result<usize, BackendError> {
        Ok(adapter.bytes())
    }
    /// Moves the border in the memory that KV blocks and adapters share: blocks `0..num_blocks` are the cache's from here on, all bytes
    /// above are for adapters. At first all are the cache's. What the cache holds is moved as `moves` says, after the steps that were
    /// launched before this and before those launched after it; steps in flight keep what they have until they are done. `num_blocks` is
    /// from `min_blocks` to `num_blocks` of the [`Capacity`].
    ///
    /// Gives back where the border is now: lower than asked for when an adapter is in the way that can't be moved yet.
    ///
    /// # Errors
    /// `Device`.
    fn set_kv_blocks(&mut self, num_blocks: usize, moves: &[BlockMove]) -> Result<usize, BackendError> {
        debug_assert!(
            num_blocks == self.capacity().num_blocks && moves.is_empty(),
            "each side has its own memory"
        );
        Ok(num_blocks)
    }
    /// Starts making an adapter usable and returns; `execute` may not name the handle until `poll_upload` says `true`.
    ///
    /// # Errors
    /// `OutOfMemory` when the adapter does not fit in what is free: nothing was taken. That is the sum of the free bytes, unless adapters
    /// that are on their way lie between them.
    fn begin_upload(&mut self, adapter: &Arc<HostAdapter>) -> Result<AdapterHandle, BackendError>;
    /// Whether the adapter is usable. Never blocks.
    ///
    /// # Errors
    /// `Device`.
    fn poll_upload(&mut self, handle: AdapterHandle) -> Result<bool, BackendError>;
    /// Gives an adapter's bytes back; the handle is dead. The caller has no batch in flight that names it.
    fn free_adapter(&mut self, handle: AdapterHandle);
    /// Runs one step and waits for it.
    ///
    /// # Errors
    /// Any; after `Device` the backend is of no further use.
    fn execute(&mut self, batch: &StepBatch) -> Result<StepOutput, BackendError>;
    /// Runs one step, or starts it and returns: then the next may be launched before this one is collected, and its
    /// [`carried_tokens`](StepBatch::carried_tokens) are this one's samples, which the host has not seen. Steps run in the order of their
    /// launches. At most two are launched and not collected; one that has been launched may be dropped with the backend.
    ///
    /// A backend that runs one step at a time leaves this and `collect` as they are.
    ///
    /// # Errors
    /// As `execute`.
    fn launch(&mut self, batch: &StepBatch) -> Result<Launched, BackendError> {
        self.execute(batch).map(Launched::Done)
    }
    /// Whether [`Self::collect`] would not wait. Never blocks.
    ///
    /// # Errors
    /// As `execute`.
    fn is_collectable(&mut self) -> Result<bool, BackendError> {
        Ok(true)
    }
    /// Waits for the oldest step that `launch` said is running.
    ///
    /// # Errors
    /// As `execute`.
    fn collect(&mut self) -> Result<StepOutput, BackendError> {
        Err(BackendError::BadBatch("no step is running".to_owned()))
    }
}

/// What became of a launched step.
#[derive(Debug)]
pub enum Launched {
    /// It is over.
    Done(StepOutput),
    /// It runs; `collect` waits for it.
    Running,
}
