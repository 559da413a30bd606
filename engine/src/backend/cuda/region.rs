//! The memory that KV blocks and adapters share: blocks from the bottom, each with K and V of all layers, adapters from the top. The border
//! between them moves; the memory does not, so that captured graphs keep their addresses.

use std::{ops::Range, sync::Arc};

use half::bf16;
use polylora_kernels::cuda::{CudaError, DeviceBuffer, Event, Stream, View};

use super::arena::{ALIGNMENT, Arena, Move};
use crate::block_pool::BlockMove;

/// Of [`Region::between`].
const BETWEEN_BYTES: usize = 8 << 20;

/// See the module.
pub(super) struct Region {
    memory: DeviceBuffer<u8>,
    block_bytes: usize,
    /// Where the border is, in blocks from the bottom.
    kv_blocks: usize,
    /// Counted from the top down: its offset 0 is the memory's end.
    arena: Arena,
    /// For moves by less than its length, which would otherwise take very many copies.
    between: DeviceBuffer<u8>,
    /// Bytes that work on the stream may still read or write for whom they were before, and the end of that work.
    left: Range<usize>,
    left_until: Arc<Event>,
}

impl Region {
    /// Of `bytes`, the first `kv_blocks` blocks are the cache's.
    pub fn new(stream: &Stream, bytes: usize, block_bytes: usize, kv_blocks: usize) -> Result<Self, CudaError> {
        let bytes = bytes / ALIGNMENT * ALIGNMENT;
        Ok(Self {
            memory: DeviceBuffer::zeroed(stream, bytes)?,
            block_bytes,
            kv_blocks,
            arena: Arena::new(bytes - kv_blocks * block_bytes),
            between: DeviceBuffer::zeroed(stream, BETWEEN_BYTES)?,
            left: 0..0,
            left_until: Arc::new(Event::new(stream.device(), false)?),
        })
    }

    /// All that may ever be KV blocks, `[_, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]`.
    pub fn kv_cache(&self) -> View<'_, bf16> {
        self.memory.view().first(self.memory.len() / self.block_bytes * self.block_bytes).cast()
    }

    /// Bytes of the memory.
    pub fn view(&self, bytes: Range<usize>) -> View<'_, u8> {
        self.memory.view().slice(bytes)
    }

    pub fn address(&self, offset: usize) -> u64 {
        self.memory.view().address() + offset as u64
    }

    /// Bytes of adapters that there is room for.
    pub fn free_bytes(&self) -> usize {
        self.arena.free_bytes()
    }

    /// The highest gap that is long enough; where it begins.
    pub fn allocate(&mut self, id: u32, bytes: usize) -> Option<usize> {
        let from_top = self.arena.allocate(id, bytes)?;
        Some(self.offset_from_bottom(from_top, bytes.next_multiple_of(ALIGNMENT)))
    }

    pub fn free(&mut self, id: u32) {
        self.arena.free(id);
    }

    /// Moves every run up as far as it goes, in an order in which nothing is overwritten that is still to be moved. `moved` is told each one's
    /// new place; what it enqueues on the stream comes after the move.
    pub fn compact(
        &mut self,
        stream: &Stream,
        may_move: impl Fn(u32) -> bool,
        mut moved: impl FnMut(&Self, u32, usize) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let moves = self.arena.compact(may_move);
        tracing::debug!(moves = moves.len(), "moving adapters to make one free run");
        for &Move { id, from, to, len } in &moves {
            let (from, to) = (self.offset_from_bottom(from, len), self.offset_from_bottom(to, len));
            // A copy must not overlap itself: in pieces as long as the way up, the upper ones first. Where that is short, over a place between.
            let way = to - from;
            let is_short = way < self.between.len();
            let mut end = len;
            while end > 0 {
                let piece = end.saturating_sub(way.max(self.between.len()))..end;
                let at = |offset: usize| self.view(offset + piece.start..offset + piece.end);
                if is_short {
                    let between = self.between.view().first(piece.len());
                    stream.copy_on_device(between, at(from))?;
                    stream.copy_on_device(at(to), between)?;
                } else {
                    stream.copy_on_device(at(to), at(from))?;
                }
                end = piece.start;
            }
            moved(self, id, to)?;
        }
        match moves.is_empty() {
            true => Ok(()),
            false => self.leave(self.kv_blocks * self.block_bytes..self.memory.len(), stream),
        }
    }

    /// Whether adapters have bytes below the end of so many blocks.
    pub fn is_in_the_way(&self, num_blocks: usize) -> bool {
        self.kv_blocks_at_most() < num_blocks
    }

    /// Moves what blocks hold and then the border, as far up as adapters let it. See `Backend::set_kv_blocks`.
    pub fn set_kv_blocks(&mut self, num_blocks: usize, moves: &[BlockMove], stream: &Stream) -> Result<usize, CudaError> {
        let block = |id: u32| {
            let start = id as usize * self.block_bytes;
            self.view(start..start + self.block_bytes)
        };
        for BlockMove { from, to } in moves {
            stream.copy_on_device(block(to.0), block(from.0))?;
        }
        let num_blocks = num_blocks.min(self.kv_blocks_at_most());
        let old = std::mem::replace(&mut self.kv_blocks, num_blocks);
        tracing::debug!(old, num_blocks, moves = moves.len(), "moved the border between KV blocks and adapters");
        self.arena.set_capacity(self.memory.len() - num_blocks * self.block_bytes);
        if num_blocks < old {
            self.leave(num_blocks * self.block_bytes..old * self.block_bytes, stream)?;
        }
        Ok(num_blocks)
    }

    /// What must have passed before another stream writes these bytes, which are a new run's. Work on this stream comes later anyway.
    pub fn wait_before(&self, bytes: Range<usize>) -> Result<Option<Arc<Event>>, CudaError> {
        let was_left = bytes.start < self.left.end && self.left.start < bytes.end;
        Ok((was_left && !self.left_until.is_done()?).then(|| self.left_until.clone()))
    }

    fn kv_blocks_at_most(&self) -> usize {
        (self.memory.len() - self.arena.end()) / self.block_bytes
    }

    /// Notes that what is on the stream now may still use these bytes. Those who wait for what was there before go on waiting for that alone.
    fn leave(&mut self, bytes: Range<usize>, stream: &Stream) -> Result<(), CudaError> {
        self.left = match self.left.is_empty() || self.left_until.is_done()? {
            true => bytes,
            false => self.left.start.min(bytes.start)..self.left.end.max(bytes.end),
        };
        self.left_until = Arc::new(Event::new(stream.device(), false)?);
        self.left_until.record(stream)
    }

    fn offset_from_bottom(&self, from_top: usize, len: usize) -> usize {
        self.memory.len() - from_top - len
    }
}
