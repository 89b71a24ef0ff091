//! Two kernel facilities that are tried, because no file tells the truth about them.
//!
//! io_uring may be compiled in, allowed by its sysctl, and still be refused by a seccomp filter (Docker 25, containerd 2,
//! Fargate) or break on its first submission; so a ring counts as working when a no-op has completed. Seals may be
//! accepted and mean nothing on an emulated kernel; so a memfd counts as sealed when a new writable map was refused.
//!
//! This is the one file of this crate with `unsafe` in it.
#![allow(unsafe_code)]

use super::facts::{MemfdTrial, UringTrial};
use io_uring::{IoUring, opcode};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;

/// Sets up a ring of four entries, pushes a no-op, waits for it, checks that it is ours.
///
/// The ring is the kind the product would use (`SINGLE_ISSUER | DEFER_TASKRUN`), or else a plain one.
pub(super) fn io_uring() -> UringTrial {
    let deferred = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(4);
    match deferred {
        Ok(ring) => no_op(ring, true),
        Err(_) => match IoUring::new(4) {
            Ok(ring) => no_op(ring, false),
            Err(cause) => failed("io_uring_setup", &cause),
        },
    }
}

fn no_op(mut ring: IoUring, deferred: bool) -> UringTrial {
    const MARK: u64 = 0x7072_6161_735f_6e6f;
    let entry = opcode::Nop::new().build().user_data(MARK);
    // SAFETY:
    // - in bounds: a no-op names no memory, so the kernel reads and writes none on its behalf.
    // - unshared:  the ring was made by our caller and is given to nobody.
    // - unique:    `ring` is held by value; no other OS process has its fd (it is close-on-exec).
    let pushed = unsafe { ring.submission().push(&entry) };
    assert!(pushed.is_ok(), "a fresh ring of four entries has room for one");
    if let Err(cause) = ring.submit_and_wait(1) {
        return failed("io_uring_enter", &cause);
    }
    match ring.completion().next() {
        Some(done) if done.user_data() == MARK && done.result() >= 0 => UringTrial::Works { deferred },
        Some(done) => UringTrial::Failed { step: "completion", errno: -done.result() },
        None => UringTrial::Failed { step: "completion", errno: Errno::NODATA.raw_os_error() },
    }
}

fn failed(step: &'static str, cause: &io::Error) -> UringTrial {
    UringTrial::Failed { step, errno: cause.raw_os_error().unwrap_or(0) }
}

/// One page is enough to see what the seals do.
const PAGE_BYTES: usize = 4096;

/// Walks through the life of a segment: create, seal the size, fill, map, seal against new writers, and then try
/// what a hostile peer would try.
pub(super) fn memfd() -> MemfdTrial {
    walk().map_or_else(|verdict| verdict, |()| MemfdTrial::Works)
}

fn walk() -> Result<(), MemfdTrial> {
    let must = |step| move |errno: Errno| MemfdTrial::Failed { step, errno: errno.raw_os_error() };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // As segments are made.
    let file = match rustix::fs::memfd_create("praas-doctor", flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create("praas-doctor", flags),
        made => made,
    };
    let file = file.map_err(must("memfd_create"))?;
    rustix::fs::ftruncate(&file, PAGE_BYTES as u64).map_err(must("ftruncate"))?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)
        .map_err(must("F_ADD_SEALS (SHRINK, GROW)"))?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, PAGE_BYTES as u64).map_err(must("fallocate"))?;
    let owner = Page::map(file.as_fd()).map_err(must("mmap by the owner"))?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::FUTURE_WRITE | SealFlags::SEAL)
        .map_err(must("F_ADD_SEALS (FUTURE_WRITE, SEAL)"))?;

    let refused = |step, answer: Result<(), Errno>| match answer {
        Err(Errno::PERM) => Ok(()),
        Err(errno) => Err(MemfdTrial::Failed { step, errno: errno.raw_os_error() }),
        Ok(()) => Err(MemfdTrial::NotSealed { step }),
    };
    refused("a new writable map", Page::map(file.as_fd()).map(drop))?;
    refused("truncation", rustix::fs::ftruncate(&file, 0))?;
    refused("write", rustix::io::pwrite(&file, b"x", 0).map(drop))?;

    // The owner's own map, older than the seal, must go on writing; read(2) shows that it is the file it writes.
    owner.store(0x5a);
    let mut byte = [0];
    rustix::io::pread(&file, &mut byte, 0).map_err(must("read back"))?;
    if byte != [0x5a] {
        return Err(MemfdTrial::Failed { step: "a write by the owner after sealing", errno: Errno::IO.raw_os_error() });
    }
    Ok(())
}

/// A writable, shared map of the first page of a file.
struct Page(*mut u8);

impl Page {
    fn map(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        // SAFETY:
        // - in bounds: the kernel chooses the address, so no existing map is replaced; the file holds a whole page.
        // - unshared:  nothing in this OS process refers to the new map until we return it.
        // - unique:    the memfd is ours and close-on-exec; no other OS process has it.
        let address = unsafe {
            rustix::mm::mmap(ptr::null_mut(), PAGE_BYTES, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)
        }?;
        Ok(Self(address.cast()))
    }

    fn store(&self, byte: u8) {
        // SAFETY:
        // - in bounds: the first byte of a page that stays mapped until drop.
        // - unshared:  no reference into the page exists; the file is read through read(2) only.
        // - unique:    no other OS process has the memfd.
        unsafe { self.0.write_volatile(byte) };
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY:
        // - in bounds: exactly the range that `map` made, unmapped once, here.
        // - unshared:  no reference into it was ever handed out.
        // - unique:    the map belongs to this value alone.
        let unmapped = unsafe { rustix::mm::munmap(self.0.cast(), PAGE_BYTES) };
        debug_assert!(unmapped.is_ok(), "unmapping our own page cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memfd_is_sealed_on_any_kernel_we_support() {
        assert_eq!(memfd(), MemfdTrial::Works);
    }

    #[test]
    fn a_ring_either_works_or_names_its_errno() {
        match io_uring() {
            UringTrial::Works { .. } => {}
            UringTrial::Failed { errno, .. } => assert_ne!(errno, 0),
        }
    }
}
