//! Buffers that the kernel picks from when bytes arrive, so that a connection which waits holds none.
//!
//! | word   | written by | read by | edge                                                                          |
//! |--------|------------|---------|-------------------------------------------------------------------------------|
//! | `tail` | us         | kernel  | release store: the entry before it is whole when the kernel sees the new tail |
//! | entry  | us         | kernel  | by `tail`                                                                     |
//! | buffer | kernel     | us      | by its completion, which names the buffer; ours until it is given back        |

use std::alloc::Layout;
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

/// Length of a buffer, bytes: some hundred small frames, or four of the longest that are received in place.
const BUFFER_BYTES: usize = 16 << 10;
/// Buffers of a reactor. 2 MiB in all, touched only as used.
const BUFFERS: u16 = 128;
/// Pages are not larger than this where io_uring runs.
const PAGE_BYTES: usize = 4096;
const _: () = assert!(BUFFERS.is_power_of_two() && size_of::<BufRingEntry>() == 16);

/// The number under which the kernel knows the buffers of a ring.
pub(super) const GROUP: u16 = 0;

/// A page-aligned run of entries, as the kernel wants it.
#[repr(C, align(4096))]
struct Entries([u8; BUFFERS as usize * 16]);
const _: () = assert!(align_of::<Entries>() == PAGE_BYTES);

pub(super) struct Buffers {
    entries: Box<Entries>,
    /// Buffer `n` starts at `n * BUFFER_BYTES`. Never resized; touched only through pointers while the kernel may write.
    memory: *mut [u8],
    tail: u16,
    /// Buffers that are with the kernel.
    given: u16,
}

// SAFETY: `memory` is owned by this value alone, as a `Box` would own it.
unsafe impl Send for Buffers {}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers").field("given", &self.given).finish()
    }
}

impl Buffers {
    /// Makes the buffers known to the ring. They have to live as long as the ring.
    pub(super) fn register(ring: &IoUring) -> io::Result<Buffers> {
        let memory = zeroed(BUFFERS as usize * BUFFER_BYTES)?;
        let mut buffers = Buffers { entries: Box::new(Entries([0; BUFFERS as usize * 16])), memory, tail: 0, given: 0 };
        let address = std::ptr::from_mut(&mut *buffers.entries).addr() as u64;
        // SAFETY: in bounds: `Entries` has room for BUFFERS entries. Unshared: from here on it is touched through raw pointers
        // only, by `give`. Unique: the box is dropped after the ring (`Uring` says so by the order of its fields).
        unsafe { ring.submitter().register_buf_ring_with_flags(address, BUFFERS, GROUP, 0) }?;
        for number in 0..BUFFERS {
            buffers.give(number);
        }
        Ok(buffers)
    }

    fn start(&self, number: u16) -> *mut u8 {
        // SAFETY: in bounds: numbers are below BUFFERS, checked by the callers.
        unsafe { self.memory.cast::<u8>().add(usize::from(number) * BUFFER_BYTES) }
    }

    /// Hands a buffer to the kernel.
    fn give(&mut self, number: u16) {
        let base = std::ptr::from_mut(&mut *self.entries).cast::<BufRingEntry>();
        let place = usize::from(self.tail & (BUFFERS - 1));
        // SAFETY: in bounds: `place` is below BUFFERS.
        let entry = unsafe { base.add(place) };
        // SAFETY: in bounds, as above. Unshared: the kernel reads entries between its head and `tail`, and
        // there are as many places as buffers, so that this one is not among them. Unique: `&mut self`.
        let entry = unsafe { &mut *entry };
        entry.set_addr(self.start(number).addr() as u64);
        entry.set_len(u32::try_from(BUFFER_BYTES).expect("small"));
        entry.set_bid(number);
        self.tail = self.tail.wrapping_add(1);
        self.given += 1;
        // SAFETY: in bounds: the first entry exists, and its `tail` word is inside it.
        let tail = unsafe { BufRingEntry::tail(base) };
        // SAFETY: in bounds and aligned: a field of a live entry. Shared with the kernel, which only reads it; hence atomic.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        // Release: the entry is whole before the kernel sees it.
        tail.store(self.tail, Ordering::Release);
    }

    /// A completion named this buffer: it is ours until it is given back. None: the kernel named one that it does not have.
    pub(super) fn take(&mut self, number: u16, bytes: usize) -> Option<Filled> {
        if number >= BUFFERS || bytes > BUFFER_BYTES || self.given == 0 {
            return None;
        }
        self.given -= 1;
        Some(Filled { number, from: 0, until: bytes })
    }

    /// What is left of a filled buffer.
    pub(super) fn bytes(&self, filled: &Filled) -> &[u8] {
        let count = filled.until - filled.from;
        // SAFETY: in bounds: `take` checked the length, and `from` never passes `until`.
        let start = unsafe { self.start(filled.number).add(filled.from) };
        // SAFETY: in bounds, as above. Unshared: the kernel writes only into buffers that
        // it was given, and this one was taken and not given back. Unique: it is only read, as long as `self` is borrowed.
        unsafe { std::slice::from_raw_parts(start, count) }
    }

    /// Gives a buffer back to the kernel.
    pub(super) fn give_back(&mut self, filled: Filled) {
        self.give(filled.number);
    }

    /// Whether the kernel has at least one.
    pub(super) fn has_some(&self) -> bool {
        self.given > 0
    }
}

/// As a boxed slice would have it, untouched. An error where there is no memory: who is told of it does without a ring.
fn zeroed(bytes: usize) -> io::Result<*mut [u8]> {
    let layout = Layout::array::<u8>(bytes).expect("far below the largest");
    assert!(layout.size() > 0, "an allocation of nothing is no allocation");
    // SAFETY: in bounds: more than no bytes are asked for, asserted above. Unshared, unique: the memory is new.
    let start = unsafe { std::alloc::alloc_zeroed(layout) };
    if start.is_null() {
        return Err(io::Error::from_raw_os_error(libc::ENOMEM));
    }
    Ok(std::ptr::slice_from_raw_parts_mut(start, bytes))
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: made by `zeroed` with the layout of a boxed slice, and dropped once. The ring is closed: the kernel writes no more.
        drop(unsafe { Box::from_raw(self.memory) });
    }
}

/// A buffer with bytes in it. Dropped without [`Buffers::give_back`], it is lost to its ring.
#[derive(Debug)]
pub(super) struct Filled {
    number: u16,
    from: usize,
    until: usize,
}

impl Filled {
    pub(super) fn len(&self) -> usize {
        self.until - self.from
    }

    /// All but the last `left` bytes have been looked at.
    pub(super) fn keep(&mut self, left: usize) {
        assert!(left <= self.len(), "nobody looks at bytes backwards");
        self.from = self.until - left;
    }
}
