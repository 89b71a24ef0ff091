//! Asking for a cache line before it is written.
//!
//! A slot that was read by the peer a lap ago lies in both caches, and the first store to it waits until the peer's copy is gone: about
//! as long as the message takes to travel afterwards. Asked for while there is something else to do, that wait is over when the
//! message is ready.

/// Asks for the line of `word`, to be written soon. A hint: nothing changes, nothing is waited for.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn prefetch_for_write<T>(word: &T) {
    // SAFETY: in bounds, unshared, unique: the instruction reads and writes nothing and cannot fault; processors without it
    // take it for a no-op.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) std::ptr::from_ref(word), options(nostack, preserves_flags, readonly));
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn prefetch_for_write<T>(_word: &T) {}
