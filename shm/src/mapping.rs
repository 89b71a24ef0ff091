//! Memory mapped from a file descriptor, and typed windows on it.
//!
//! This is where shared bytes become Rust references, so that the rings, lines and doorbells above it are written
//! in safe code. A [`Window`] is a reference that brings its own lifetime: it keeps alive what it looks at, and
//! costs one pointer to use. It shows only types made of atomics ([`SharedLayout`]), so another OS process changing
//! the words is no undefined behaviour here; plain bytes (payloads) are the business of `arena.rs` and `segment.rs`.

use std::any::Any;
use std::io;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::sync::AtomicU64;
use crate::width::host;

/// What one may do with a mapping.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) enum Access {
    /// Loads only: a store is a segmentation fault, by the page tables and not by courtesy.
    Read,
    /// The owner's view.
    Write,
}

/// Types another OS process may change while we hold a shared reference to them.
///
/// # Safety
/// - every bit pattern is a value of the type;
/// - all of it is atomics, so that no access is a data race;
/// - it has no drop glue and no padding.
pub(crate) unsafe trait SharedLayout: Send + Sync + 'static {}

// SAFETY: an atomic integer: any bits, one atomic, no padding.
unsafe impl SharedLayout for AtomicU64 {}

/// A shared mapping of the first `bytes` of a file. Unmapped when the last holder goes.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: u64,
    access: Access,
}

// SAFETY: the mapping is an address range of this process, not of a thread; what is in it is reached through
// atomics (`Window`) or through guards whose owners answer for uniqueness (`arena.rs`, `segment.rs`).
unsafe impl Send for Mapping {}
// SAFETY: as above; no method of `&Mapping` reads or writes the mapped bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` of `fd` from offset 0, shared. The mapping does not survive a fork (W15).
    ///
    /// # Errors
    /// What `mmap` or `madvise` say. The caller has made sure that the file has `bytes` bytes and cannot shrink:
    /// a touch beyond its end would be a SIGBUS.
    pub(crate) fn map(fd: BorrowedFd<'_>, bytes: u64, access: Access) -> io::Result<Self> {
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY:
        // - in bounds: a null hint lets the kernel choose a free range; it overlaps nothing of ours.
        // - unshared:  nothing refers to the new range yet.
        // - unique:    not claimed: the range is shared by intent and reached through atomics and guards only.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), host(bytes), protection, MapFlags::SHARED, fd, 0) }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::other("mmap returned address zero"))?;
        let mapping = Self { base, bytes, access };
        // SAFETY:
        // - in bounds: exactly the range mapped above.
        // - unshared, unique: advice about fork changes no byte.
        unsafe { rustix::mm::madvise(base.as_ptr().cast(), host(bytes), Advice::LinuxDontFork) }?;
        Ok(mapping)
    }

    /// The address of byte 0. Using it is the caller's argument to make.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Mapped bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Faults in `[offset, offset + bytes)` for writing. Advice: what fails here is faulted in on first touch.
    pub(crate) fn populate(&self, offset: u64, bytes: u64) {
        if self.access != Access::Write || offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return;
        }
        // SAFETY: in bounds: `offset + bytes <= self.bytes`, checked above.
        let start = unsafe { self.base.as_ptr().add(host(offset)) };
        // SAFETY:
        // - in bounds: as above.
        // - unshared, unique: populating changes no byte, it only makes pages present.
        let _ = unsafe { rustix::mm::madvise(start.cast(), host(bytes), Advice::LinuxPopulateWrite) };
    }

    /// A window on one `T` at `offset`.
    ///
    /// # Panics
    /// If `T` does not lie within the mapping or is misaligned: offsets are our own constants.
    pub(crate) fn window<T: SharedLayout>(self: &Arc<Self>, offset: u64) -> Window<T> {
        Window { target: self.locate::<T>(offset, 1), _keeper: Arc::clone(self) as Keeper }
    }

    /// A window on `count` of `T` from `offset`.
    ///
    /// # Panics
    /// As [`Mapping::window`].
    pub(crate) fn window_slice<T: SharedLayout>(self: &Arc<Self>, offset: u64, count: u64) -> Window<[T]> {
        let first = self.locate::<T>(offset, count);
        Window { target: NonNull::slice_from_raw_parts(first, host(count)), _keeper: Arc::clone(self) as Keeper }
    }

    fn locate<T>(&self, offset: u64, count: u64) -> NonNull<T> {
        let bytes = (size_of::<T>() as u64).checked_mul(count).expect("a window's size fits 64 bits");
        let end = offset.checked_add(bytes).expect("a window's end fits 64 bits");
        assert!(end <= self.bytes, "window [{offset}, {end}) leaves a mapping of {} bytes", self.bytes);
        assert!(offset.is_multiple_of(align_of::<T>() as u64), "offset {offset} is misaligned");
        // SAFETY: in bounds: `offset <= end <= self.bytes`, asserted above.
        unsafe { self.base.add(host(offset)) }.cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY:
        // - in bounds: the range that `map` got from the kernel, unmapped nowhere else.
        // - unshared, unique: every window and guard keeps the mapping alive, so none is left.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), host(self.bytes)) };
    }
}

type Keeper = Arc<dyn Any + Send + Sync>;

/// A shared reference that keeps alive what it looks at: a mapping, or in tests and models the heap.
pub(crate) struct Window<T: ?Sized> {
    target: NonNull<T>,
    _keeper: Keeper,
}

// SAFETY: a window is a `&T` and an `Arc`; both may move to another thread when `T` is `Sync`.
unsafe impl<T: ?Sized + Sync> Send for Window<T> {}
// SAFETY: as above; it gives out `&T` only.
unsafe impl<T: ?Sized + Sync> Sync for Window<T> {}

impl<T: ?Sized> Deref for Window<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY:
        // - in bounds: `locate` checked the range and the alignment; `on_heap` took it from a live allocation.
        // - unshared:  not needed: `SharedLayout` is atomics only.
        // - unique:    not needed: a shared reference. `_keeper` outlives it.
        unsafe { self.target.as_ref() }
    }
}

impl<T: ?Sized> Clone for Window<T> {
    fn clone(&self) -> Self {
        Self { target: self.target, _keeper: Arc::clone(&self._keeper) }
    }
}

#[cfg(test)]
impl<T: SharedLayout> Window<T> {
    /// A window on a heap value, for models and sanitizers, which cannot see into a mapping.
    pub(crate) fn on_heap(value: T) -> Self {
        let keeper = Arc::new(value);
        Self { target: NonNull::from(&*keeper), _keeper: keeper }
    }
}

#[cfg(test)]
impl<T: SharedLayout> Window<[T]> {
    /// A window on a heap slice.
    pub(crate) fn slice_on_heap(values: Box<[T]>) -> Self {
        let keeper = Arc::new(values);
        Self { target: NonNull::from(&**keeper), _keeper: keeper }
    }
}

impl<T: ?Sized> std::fmt::Debug for Window<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window").finish_non_exhaustive()
    }
}
