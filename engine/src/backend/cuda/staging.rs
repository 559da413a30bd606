//! A step's metadata: written on the host, copied in one go, read by the kernels.

use std::{marker::PhantomData, ops::Range, sync::Arc};

use bytemuck::Pod;
use polylora_kernels::cuda::{CudaError, Device, DeviceBuffer, Event, PinnedBuffer, Stream, View};

/// Each array begins at a multiple of this.
const ALIGNMENT: usize = 16;

/// Where an array lies in the metadata.
#[derive(Debug)]
pub(super) struct Place<T> {
    offset: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T> Clone for Place<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Place<T> {}

/// Deals out places, one after another.
#[derive(Debug, Default)]
pub(super) struct Layout {
    bytes: usize,
}

impl Layout {
    pub fn place<T>(&mut self, len: usize) -> Place<T> {
        let offset = self.bytes.next_multiple_of(ALIGNMENT);
        self.bytes = offset + len * size_of::<T>();
        Place {
            offset,
            len,
            element: PhantomData,
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Metadata of one kind: one device buffer, whose content is that of the step that runs, and a ring of pinned ones, each of which is a
/// step's until that step's copy is done.
pub(super) struct Staging {
    device_buffer: DeviceBuffer<u8>,
    ring: Vec<(PinnedBuffer<u8>, Event)>,
    turn: usize,
    device: Arc<Device>,
}

impl Staging {
    pub fn new(device: &Arc<Device>, bytes: usize, depth: usize) -> Result<Self, CudaError> {
        let bytes = bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        let stage = |_| Ok((PinnedBuffer::zeroed(device, bytes)?, Event::new(device, false)?));
        Ok(Self {
            device_buffer: DeviceBuffer::uninit(device, bytes)?,
            ring: (0..depth).map(stage).collect::<Result<_, CudaError>>()?,
            turn: 0,
            device: device.clone(),
        })
    }

    /// The next step's host side. Waits for the copy of the step that had it before, which is long done.
    pub fn begin(&mut self) -> Result<StageWriter<'_>, CudaError> {
        self.turn = (self.turn + 1) % self.ring.len();
        let (buffer, copied) = &mut self.ring[self.turn];
        copied.synchronize()?;
        Ok(StageWriter { bytes: buffer })
    }

    /// Makes room for `bytes`. The stream must have run out.
    pub fn grow(&mut self, bytes: usize) -> Result<(), CudaError> {
        if bytes > self.device_buffer.len() {
            *self = Self::new(&self.device, bytes.next_power_of_two(), self.ring.len())?;
        }
        Ok(())
    }

    pub fn capacity(&self) -> usize {
        self.device_buffer.len()
    }

    /// Enqueues the copy of the first `bytes`.
    pub fn copy(&self, stream: &Stream, bytes: usize) -> Result<(), CudaError> {
        let (buffer, copied) = &self.ring[self.turn];
        stream.copy_to_device(self.device_buffer.view().first(bytes), &buffer[..bytes])?;
        copied.record(stream)
    }

    /// An array on the device.
    pub fn view<T: Pod>(&self, place: Place<T>) -> View<'_, T> {
        self.device_buffer.view().slice(place.range()).cast()
    }
}

impl<T> Place<T> {
    fn range(self) -> Range<usize> {
        self.offset..self.offset + self.len * size_of::<T>()
    }
}

/// The host side of a step's metadata.
pub(super) struct StageWriter<'a> {
    bytes: &'a mut [u8],
}

impl StageWriter<'_> {
    pub fn array<T: Pod>(&mut self, place: Place<T>) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.bytes[place.range()])
    }

    /// Writes the array's beginning and fills its rest.
    pub fn write<T: Pod>(&mut self, place: Place<T>, values: &[T], rest: T) {
        let (head, tail) = self.array(place).split_at_mut(values.len());
        head.copy_from_slice(values);
        tail.fill(rest);
    }
}
