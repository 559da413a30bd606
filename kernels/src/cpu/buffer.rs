//! Memory in cache lines, and in huge pages where it is large and read once a step.
//!
//! A decode step reads every weight once. With 4 KiB pages it spends a third of the memory's bandwidth on page walks; so what is large
//! and stays lies in mappings that ask for huge pages.

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit, Pod, Zeroable};
use memmap2::{MmapMut, MmapOptions};

/// One cache line, one AVX-512 register.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

const LINE: usize = size_of::<Line>();
const HUGE_PAGE: usize = 2 << 20;

/// Scratch memory in cache lines, seen as any plain type.
#[derive(Default)]
pub(super) struct AlignedBuffer {
    lines: Vec<Line>,
}

impl AlignedBuffer {
    /// Grows to at least `bytes`; what it held is lost.
    pub(super) fn reserve(&mut self, bytes: usize) {
        let lines = bytes.div_ceil(LINE);
        if self.lines.len() < lines {
            self.lines = bytemuck::zeroed_vec(lines.next_power_of_two());
        }
    }

    /// The first `len` of `T`.
    pub(super) fn prefix_mut<T: NoUninit + AnyBitPattern>(&mut self, len: usize) -> &mut [T] {
        let lines = (len * size_of::<T>()).div_ceil(LINE);
        &mut bytemuck::cast_slice_mut::<Line, T>(&mut self.lines[..lines])[..len]
    }
}

/// Zeroed memory of its own, in huge pages where the system has them. Pages take memory when they are first touched.
struct Mapping {
    /// Unmaps when dropped; its bytes are reached through `start` only.
    map: MmapMut,
    /// Of `start` in `map`.
    offset: usize,
    /// Aligned to a huge page if the mapping is that large.
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory that the value owns; its users, `HugeBuffer` and `Region`, reach disjoint parts by the rules of `&` and `&mut`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(bytes: usize, options: &MmapOptions) -> io::Result<Self> {
        let bytes = bytes.max(1).next_multiple_of(LINE);
        let alignment = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let mut map = options.clone().len(bytes + alignment).map_anon()?;
        let offset = match alignment {
            0 => 0,
            _ => map.as_ptr().align_offset(alignment),
        };
        let start = NonNull::from(&mut map[offset..][..bytes]).cast();
        let mapping = Self { map, offset, start, bytes };
        #[cfg(target_os = "linux")]
        if alignment > 0 {
            // Without huge pages it is slower, not wrong.
            let _ = mapping.advise(memmap2::Advice::HugePage, 0..bytes);
        }
        Ok(mapping)
    }

    #[cfg(target_os = "linux")]
    fn advise(&self, advice: memmap2::Advice, bytes: Range<usize>) -> io::Result<()> {
        assert!(bytes.end <= self.bytes, "{bytes:?} of {} bytes", self.bytes);
        self.map.advise_range(advice, self.offset + bytes.start, bytes.len())
    }
}

/// A long-lived array of zeroed memory, in huge pages if it is large: for KV caches and whatever else is streamed every step.
pub struct HugeBuffer<T> {
    mapping: Mapping,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Pod> HugeBuffer<T> {
    /// `len` zeros. Memory is taken page by page as it is first touched. Panics if the system has none left.
    pub fn zeroed(len: usize) -> Self {
        Self::with(len, &MmapOptions::new()).unwrap_or_else(|error| panic!("no memory for {len} elements: {error}"))
    }

    /// The same of which the system need not have all: whoever uses more than there is gets what it does to processes then.
    ///
    /// # Errors
    /// The system's, if it gives no such address space.
    pub fn reserved(len: usize) -> io::Result<Self> {
        Self::with(len, MmapOptions::new().no_reserve_swap())
    }

    fn with(len: usize, options: &MmapOptions) -> io::Result<Self> {
        assert!(align_of::<T>() <= LINE, "elements fit a cache line's alignment");
        let bytes = len.checked_mul(size_of::<T>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            mapping: Mapping::new(bytes, options)?,
            len,
            element: std::marker::PhantomData,
        })
    }

    /// Where it begins: at a huge page if it is as long as one.
    pub fn start(&self) -> NonNull<T> {
        self.mapping.start.cast()
    }

    /// Has the system find memory for a range of bytes now, not at the first touch. What is there stays; a system that can't waits for the touch.
    pub fn populate(&self, bytes: Range<usize>) {
        #[cfg(target_os = "linux")]
        let _ = self.mapping.advise(memmap2::Advice::PopulateWrite, bytes);
        #[cfg(not(target_os = "linux"))]
        let _ = bytes;
    }

    /// Gives the memory of whole pages back to the system; they are zeros afterwards.
    ///
    /// # Safety
    /// Nobody has a reference to these bytes.
    pub unsafe fn discard(&self, bytes: Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            let offset = self.mapping.offset + bytes.start;
            // SAFETY: what was there is nobody's, and zeros are a value of any `Pod`.
            let _ = unsafe {
                self.mapping
                    .map
                    .unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, bytes.len())
            };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = bytes;
    }
}

impl<T: Pod> Deref for HugeBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `len` elements, zeroed by the system, aligned to a cache line, and is this buffer's alone.
        unsafe { std::slice::from_raw_parts(self.mapping.start.cast().as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for HugeBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start.cast().as_ptr(), self.len) }
    }
}

/// Hands out regions of shared mappings: matrices smaller than a huge page lie together in one.
#[derive(Default)]
pub(super) struct Arena {
    current: Option<Arc<Mapping>>,
    used_bytes: usize,
}

impl Arena {
    /// Mappings are this large at least; what is never handed out is never touched.
    const MAPPING_BYTES: usize = 64 << 20;

    /// Zeroed memory of at least `bytes`.
    pub(super) fn take(&mut self, bytes: usize) -> Region {
        let bytes = bytes.next_multiple_of(LINE);
        let mapping = match &self.current {
            Some(mapping) if self.used_bytes + bytes <= mapping.bytes => Arc::clone(mapping),
            _ => {
                self.used_bytes = 0;
                let bytes = bytes.max(Self::MAPPING_BYTES);
                let mapping = Mapping::new(bytes, &MmapOptions::new()).unwrap_or_else(|error| panic!("no memory for {bytes} bytes: {error}"));
                Arc::clone(self.current.insert(Arc::new(mapping)))
            }
        };
        let start = self.used_bytes;
        self.used_bytes += bytes;
        Region { mapping, start, bytes }
    }
}

/// A part of a mapping that nobody else has: [`Arena::take`] never gives it twice.
pub(super) struct Region {
    mapping: Arc<Mapping>,
    start: usize,
    bytes: usize,
}

impl Region {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of it; the size of `T` must divide the region's.
    pub(super) fn as_slice<T: AnyBitPattern>(&self) -> &[T] {
        // SAFETY: inside the mapping, initialised by the system, aligned to a cache line, and shared as `&self` is.
        let bytes = unsafe { std::slice::from_raw_parts(self.mapping.start.add(self.start).as_ptr(), self.bytes) };
        bytemuck::cast_slice(bytes)
    }

    /// All of it; the size of `T` must divide the region's.
    pub(super) fn as_mut_slice<T: NoUninit + AnyBitPattern>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; no other region overlaps this one, so `&mut self` is the only way to it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.mapping.start.add(self.start).as_ptr(), self.bytes) };
        bytemuck::cast_slice_mut(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zeroed_and_disjoint() {
        let mut arena = Arena::default();
        let mut regions: Vec<Region> = [100, 64, 3 << 20, 80 << 20, 1].map(|bytes| arena.take(bytes)).into();
        for (idx, region) in regions.iter_mut().enumerate() {
            assert!(region.as_slice::<u64>().iter().all(|&value| value == 0));
            region.as_mut_slice::<u64>().fill(idx as u64 + 1);
        }
        drop(arena);
        for (idx, region) in regions.iter().enumerate() {
            assert!(region.as_slice::<u64>().iter().all(|&value| value == idx as u64 + 1));
            assert!(region.as_slice::<u64>().as_ptr().addr().is_multiple_of(LINE));
        }
    }

    #[test]
    fn memory_can_be_had_before_it_is_touched_and_given_back() {
        let mut buffer = HugeBuffer::<u8>::zeroed(2 * HUGE_PAGE);
        buffer.fill(7);
        buffer.populate(0..2 * HUGE_PAGE);
        assert!(buffer.iter().all(|&value| value == 7));
        // SAFETY: the reference that `iter` made has gone.
        unsafe { buffer.discard(HUGE_PAGE..2 * HUGE_PAGE) };
        assert!(buffer[..HUGE_PAGE].iter().all(|&value| value == 7));
        #[cfg(target_os = "linux")]
        assert!(buffer[HUGE_PAGE..].iter().all(|&value| value == 0));
    }

    #[test]
    fn huge_buffers_are_zeroed_arrays() {
        for len in [0, 1, 1000, (2 << 20) + 3] {
            let mut buffer = HugeBuffer::<f32>::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&value| value == 0.0));
            buffer.iter_mut().enumerate().for_each(|(idx, value)| *value = idx as f32);
            assert!(buffer.iter().enumerate().all(|(idx, &value)| value == idx as f32));
        }
    }
}
