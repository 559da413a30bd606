//! What the engine thread sees of a device.

use std::sync::Arc;

use crate::{
    adapter::HostAdapter,
    batch::{AdapterHandle, StepBatch, StepOutput},
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
    /// KV blocks.
    pub num_blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Bytes of one block's keys and values over all layers, in the dtype that this backend keeps them in.
    pub kv_block_bytes: usize,
    /// Most rows of one step.
    pub max_batch_tokens: usize,
    /// Most bytes of adapters resident at once.
    pub adapter_bytes: usize,
    /// Distinct adapters of one step.
    pub max_adapters_per_batch: usize,
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
    /// Starts making an adapter usable and returns; `execute` may not name the handle until `poll_upload` says `true`.
    ///
    /// # Errors
    /// `OutOfMemory` when the adapter does not fit in what is free: nothing was taken.
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
