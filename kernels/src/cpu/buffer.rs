//! Memory aligned to cache lines.

use bytemuck::{AnyBitPattern, NoUninit, Pod, Zeroable};

/// One cache line, one AVX-512 register.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Zeroed memory in cache lines, seen as any plain type.
#[derive(Default)]
pub(super) struct AlignedBuffer {
    lines: Vec<Line>,
}

impl AlignedBuffer {
    /// At least `bytes` zeroed bytes.
    pub(super) fn zeroed(bytes: usize) -> Self {
        Self {
            lines: bytemuck::zeroed_vec(bytes.div_ceil(size_of::<Line>())),
        }
    }

    /// Grows to at least `bytes`; what it held is lost.
    pub(super) fn reserve(&mut self, bytes: usize) {
        if self.bytes() < bytes {
            *self = Self::zeroed(bytes.next_power_of_two());
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// All of it as `T`; its size must divide the buffer's.
    pub(super) fn as_slice<T: AnyBitPattern>(&self) -> &[T] {
        bytemuck::cast_slice(&self.lines)
    }

    /// The first `len` of `T`.
    pub(super) fn prefix_mut<T: NoUninit + AnyBitPattern>(&mut self, len: usize) -> &mut [T] {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        &mut bytemuck::cast_slice_mut::<Line, T>(&mut self.lines[..lines])[..len]
    }
}
