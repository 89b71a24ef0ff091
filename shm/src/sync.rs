//! The seam between the machine's atomics and loom's, so that the models check the code that ships.
//!
//! Every atomic of this crate comes from here. Under `--cfg loom` their size differs, which is why every layout
//! assertion is gated with `cfg(not(loom))`, and they have no `const` constructor.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
