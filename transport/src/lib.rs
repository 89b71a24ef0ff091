#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "one getsockopt and one ioctl that no library wraps, into values of ours")]
mod acknowledged;
mod congestion;
pub mod frame;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod halves;
pub mod hello;
mod inbound;
mod outbound;
#[allow(unsafe_code, reason = "the mq_* calls have no safe wrapper; each is one call on one live slice")]
pub mod queue;
pub mod reactor;
pub mod tcp;

pub use acknowledged::{Acknowledged, Moved, incoming_cpu};
pub use frame::{HEADER_BYTES, Header, KEY_BYTES_MAX, Key, Limits, Seal};
pub use hello::{Credential, Role, Secret, Session};
pub use tcp::{Bodies, Connection, Frame, Received, Scratch, TcpConfig, Terms};

/// What a flush achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Flush {
    /// Everything queued is with the kernel.
    Done,
    /// The kernel takes no more for now: wait until the descriptor is writable and flush again.
    Blocked,
}
