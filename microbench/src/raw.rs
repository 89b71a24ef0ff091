//! Memory shared by two processes, POSIX message queues, leaving a network namespace: the `unsafe` of this crate, but for
//! the io_uring peer.
//!
//! Everything here is small on purpose. The floors must stand on the kernel and the processor alone, so
//! they share no code with the crates they are compared with.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::mm::{MapFlags, ProtFlags};

/// A shared, writable mapping of a memfd, held by both ends of a floor.
#[derive(Debug)]
pub(crate) struct SharedPages {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the mapping is plain memory that lives as long as this value; every access goes through atomics,
// or through `copy_in`/`copy_out`, whose callers take turns. In bounds: checked by each method. Unshared: not
// claimed. Unique: this value alone unmaps.
unsafe impl Send for SharedPages {}

impl SharedPages {
    /// Maps the first `len_bytes` of `memfd`, faulted in now so that no sample pays for it.
    pub(crate) fn map(memfd: BorrowedFd<'_>, len_bytes: usize) -> io::Result<Self> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: in bounds: the kernel picks the address, nothing of ours is replaced. Unshared: the peer maps
        // the same file, which is why bytes are reached through atomics or raw copies only. Unique: no Rust
        // reference to the pages exists beyond the atomics handed out below.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len_bytes, ProtFlags::READ | ProtFlags::WRITE, flags, memfd, 0)
        }?;
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned null"))?;
        Ok(Self { start, len_bytes })
    }

    /// The address of `len_bytes` bytes at an offset.
    fn at(&self, offset_bytes: usize, len_bytes: usize) -> *mut u8 {
        assert!(offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= self.len_bytes));
        // SAFETY: in bounds: asserted. Unshared, unique: an address is not an access.
        unsafe { self.start.as_ptr().add(offset_bytes) }
    }

    /// The 64-bit word at a byte offset.
    pub(crate) fn word(&self, offset_bytes: usize) -> &AtomicU64 {
        assert!(offset_bytes.is_multiple_of(8));
        // SAFETY: in bounds and aligned: checked by `at` and asserted, and mmap is page aligned. Unshared: no, hence an atomic.
        // Unique: not needed, `AtomicU64` is shared by design, across processes too.
        unsafe { AtomicU64::from_ptr(self.at(offset_bytes, 8).cast()) }
    }

    /// The 32-bit word at a byte offset, for futexes.
    pub(crate) fn half(&self, offset_bytes: usize) -> &AtomicU32 {
        assert!(offset_bytes.is_multiple_of(4));
        // SAFETY: as in `word`.
        unsafe { AtomicU32::from_ptr(self.at(offset_bytes, 4).cast()) }
    }

    /// Copies `bytes` in at `offset_bytes`. The caller has the turn: the peer does not look until told.
    pub(crate) fn copy_in(&self, offset_bytes: usize, bytes: &[u8]) {
        let pages = self.at(offset_bytes, bytes.len());
        // SAFETY: in bounds: checked by `at`. Unshared now: the two ends alternate, each passes the turn with a release
        // store that the other acquires. Unique: `bytes` is private memory, so the ranges cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), pages, bytes.len()) };
    }

    /// Copies out of `offset_bytes` into `bytes`; same turn-taking as [`Self::copy_in`].
    pub(crate) fn copy_out(&self, offset_bytes: usize, bytes: &mut [u8]) {
        let pages = self.at(offset_bytes, bytes.len());
        // SAFETY: as in `copy_in`; `bytes` is exclusively ours.
        unsafe { std::ptr::copy_nonoverlapping(pages, bytes.as_mut_ptr(), bytes.len()) };
    }
}

impl Drop for SharedPages {
    fn drop(&mut self) {
        // SAFETY: in bounds: exactly what `map` mapped. Unshared/unique: the atomics handed out borrow `self`, so
        // none is alive. Failure would leave the mapping, which is harmless.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

/// Gives the calling thread a network namespace of its own, with nothing in it but a loopback that is down.
pub(crate) fn leave_network() -> io::Result<()> {
    // SAFETY: only the network is left; memory and descriptors stay shared with the other threads, which is what the
    // function is unsafe for.
    Ok(unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?)
}

/// A POSIX message queue that no longer has a name.
#[derive(Debug)]
pub(crate) struct MessageQueue(OwnedFd);

impl MessageQueue {
    /// Creates a queue of `messages` x `message_bytes` and unlinks it at once; both ends share the descriptor.
    pub(crate) fn create(messages: u32, message_bytes: u32, nonblocking: bool) -> io::Result<Self> {
        let name = CString::new(format!("/praas-floor-{:016x}", getrandom::u64().map_err(io::Error::other)?))
            .map_err(io::Error::other)?;
        // SAFETY: in bounds: plain integers, zero is a valid mq_attr. Unshared, unique: a local.
        let mut limits: libc::mq_attr = unsafe { std::mem::zeroed() };
        limits.mq_maxmsg = messages.into();
        limits.mq_msgsize = message_bytes.into();
        let mut flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_CLOEXEC;
        if nonblocking {
            flags |= libc::O_NONBLOCK;
        }
        // SAFETY: in bounds: `name` is NUL terminated and `limits` outlives the call. Unshared, unique: locals.
        let raw = unsafe { libc::mq_open(name.as_ptr(), flags, 0o600 as libc::mode_t, &raw const limits) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: on Linux an mqd_t is a file descriptor, just opened and owned by nobody else.
        let queue = Self(unsafe { OwnedFd::from_raw_fd(raw) });
        // SAFETY: `name` is NUL terminated and outlives the call.
        if unsafe { libc::mq_unlink(name.as_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(queue)
    }

    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    #[inline]
    pub(crate) fn send(&self, message: &[u8]) -> io::Result<()> {
        // SAFETY: in bounds: pointer and length come from one slice. Unshared, unique: read only, for this call.
        let sent = unsafe { libc::mq_send(self.0.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// `room` must hold the queue's message size, or the kernel answers EMSGSIZE.
    #[inline]
    pub(crate) fn receive(&self, room: &mut [u8]) -> io::Result<usize> {
        // SAFETY: in bounds: pointer and length come from one exclusive slice, alive for the call.
        let got =
            unsafe { libc::mq_receive(self.0.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), std::ptr::null_mut()) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }
}

impl AsFd for MessageQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_pages_show_one_mapping_what_the_other_wrote() {
        let memfd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 8192).unwrap();
        let ours = SharedPages::map(memfd.as_fd(), 8192).unwrap();
        let theirs = SharedPages::map(memfd.as_fd(), 8192).unwrap();
        ours.copy_in(4096, b"seen");
        let mut seen = [0; 4];
        theirs.copy_out(4096, &mut seen);
        assert_eq!(&seen, b"seen");
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn shared_pages_refuse_a_word_past_the_end() {
        let memfd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 4096).unwrap();
        SharedPages::map(memfd.as_fd(), 4096).unwrap().word(4096);
    }

    #[test]
    fn a_queue_gives_back_what_it_was_sent_and_says_when_it_is_empty() {
        let queue = match MessageQueue::create(2, 64, true) {
            Ok(queue) => queue,
            Err(error) => return println!("skipped: needs a POSIX message queue ({error})"),
        };
        queue.send(b"one").unwrap();
        let mut room = [0; 64];
        assert_eq!(queue.receive(&mut room).unwrap(), 3);
        assert_eq!(queue.receive(&mut room).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
