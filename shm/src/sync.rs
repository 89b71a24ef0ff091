//! The seam between the machine's atomics and loom's, so that the models check the code that ships.
//!
//! Every atomic of this crate comes from here. Under `--cfg loom` their size differs, which is why every layout
//! assertion is gated with `cfg(not(loom))`, and they have no `const` constructor.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};

/// The ringer's side of a barrier that the sleeper raises for both (`membarrier`): it only holds the compiler. loom has no
/// such barrier; a model has the fence that the sleeper's system call amounts to.
#[inline(always)]
pub(crate) fn light_fence() {
    #[cfg(loom)]
    fence(Ordering::SeqCst);
    #[cfg(not(loom))]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
}

/// Stands in a model for words that could as well be plain memory: those that an edge orders and nobody races for.
///
/// Relaxed atomics alone would hide a missing edge from loom, which lets no load see the future. Outside models it has no
/// size and its calls no code.
#[derive(Default)]
pub(crate) struct Shadow {
    #[cfg(loom)]
    accesses: loom::cell::UnsafeCell<()>,
}

// SAFETY: in models, that the accesses are ordered is what loom checks at each of them; elsewhere there is nothing in it.
#[cfg(loom)]
unsafe impl Sync for Shadow {}

impl Shadow {
    #[inline(always)]
    pub(crate) fn read(&self) {
        #[cfg(loom)]
        self.accesses.with(|_| ());
    }

    #[inline(always)]
    pub(crate) fn write(&self) {
        #[cfg(loom)]
        self.accesses.with_mut(|_| ());
    }
}
