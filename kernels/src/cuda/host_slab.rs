//! Host memory that is page-locked part by part, whenever there is time for it: copies from a locked part run in the background at the speed of
//! the bus.
//!
//! The driver holds up every other thread's calls while it locks or unlocks a part (0.15 ms where the pages are there already, far longer where
//! they have to be made first), and its lock is not a fair one: whoever locks beside launches leaves pauses between the parts.

use std::{
    ffi::c_void,
    io,
    ops::Range,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::device::{CudaError, Device, driver};
use crate::cpu::HugeBuffer;
use cudarc::driver::sys;

/// See the module. Its bytes are reached by address: whose they are is its owner's business.
pub struct HostSlab {
    memory: HugeBuffer<u8>,
    is_locked: Box<[AtomicBool]>,
    device: Arc<Device>,
}

impl HostSlab {
    /// So much is locked at a time: a huge page. Parts begin at addresses that are multiples of it; a copy must not cross one.
    pub const PART: usize = 2 << 20;

    /// So many parts, of which none is locked: address space, that takes memory when it is touched.
    ///
    /// # Errors
    /// The system's, if it gives none.
    pub fn new(device: &Arc<Device>, num_parts: usize) -> io::Result<Self> {
        let bytes = num_parts.checked_mul(Self::PART).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            memory: HugeBuffer::reserved(bytes)?,
            is_locked: (0..num_parts).map(|_| AtomicBool::new(false)).collect(),
            device: device.clone(),
        })
    }

    /// How many parts there are.
    pub fn num_parts(&self) -> usize {
        self.is_locked.len()
    }

    /// Its first byte.
    pub fn start(&self) -> NonNull<u8> {
        self.memory.start()
    }

    /// Whether all parts of a range of bytes are locked.
    pub fn is_locked(&self, bytes: &Range<usize>) -> bool {
        let parts = bytes.start / Self::PART..bytes.end.div_ceil(Self::PART);
        self.is_locked[parts].iter().all(|is_locked| is_locked.load(Ordering::Acquire))
    }

    /// Has the system find memory for a part, whoever uses it: locking holds up others for less time then.
    pub fn populate(&self, part: usize) {
        self.memory.populate(Self::bytes_of(part));
    }

    /// Locks a part, whoever uses it; not twice.
    ///
    /// # Errors
    /// The driver's: among others, that the system allows no more.
    pub fn lock(&self, part: usize) -> Result<(), CudaError> {
        if self.is_locked[part].load(Ordering::Acquire) {
            return Ok(());
        }
        self.device.bind()?;
        driver!(cuMemHostRegister_v2(self.address(part), Self::PART, 0))?;
        self.is_locked[part].store(true, Ordering::Release);
        Ok(())
    }

    /// Unlocks a part and gives its memory back to the system.
    ///
    /// # Safety
    /// Nobody uses it, and no copy from it is under way.
    pub unsafe fn discard(&self, part: usize) {
        self.unlock(part);
        // SAFETY: the caller's promise.
        unsafe { self.memory.discard(Self::bytes_of(part)) };
    }

    fn unlock(&self, part: usize) {
        if self.is_locked[part].swap(false, Ordering::AcqRel) {
            // An error here has nobody left to hear it.
            let _ = self.device.bind();
            let _ = driver!(cuMemHostUnregister(self.address(part)));
        }
    }

    fn address(&self, part: usize) -> *mut c_void {
        let start: *mut u8 = self.start().as_ptr();
        start.wrapping_add(part * Self::PART).cast()
    }

    fn bytes_of(part: usize) -> Range<usize> {
        part * Self::PART..(part + 1) * Self::PART
    }
}

impl Drop for HostSlab {
    fn drop(&mut self) {
        (0..self.num_parts()).for_each(|part| self.unlock(part));
    }
}
