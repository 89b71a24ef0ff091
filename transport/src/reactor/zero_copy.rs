//! Which sends leave their bytes where they lie until the network card has read them, and which of those it still reads.
//!
//! A zero-copy send has two ends: its result, when the next may follow, and its notification, when the peer has acknowledged
//! everything and the pages are ours again. In between the owner of a body must not have it back.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use crate::outbound::SHARED_BYTES_MIN;

/// Heads, keys and short bodies before a long one that are copied to go with it, bytes: two heads, the longest key, some room.
pub(super) const GATHERED_BYTES_MAX: usize = 2048;

/// Whether long bodies are sent without copying them, where the reactor is io_uring's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZeroCopy {
    /// Off the loopback, where the kernel can, and on each connection until it says that it copied all the same. The default.
    #[default]
    Auto,
    /// On every connection, whatever the kernel says: to test and to measure.
    Always,
    /// On none.
    Never,
}

/// What came of zero-copy sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroCopyStats {
    /// Begun.
    pub begun: u64,
    /// Over, and the kernel had copied the bytes all the same, or sent none of them.
    pub copied: u64,
    /// Refused, and repeated with a copy.
    pub refused: u64,
}

/// What to send next of some slices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// So many, copied by the kernel.
    Copy { slices: usize },
    /// So many gathered by us, and the one after them from where it lies.
    Share { gathered: usize },
}

/// The zero-copy sends of one connection.
#[derive(Debug)]
pub(super) struct Shares {
    choice: ZeroCopy,
    wanted: bool,
    begun: u64,
    /// Numbers of those whose pages the kernel has.
    open: VecDeque<u64>,
}

impl Shares {
    pub(super) fn new(choice: ZeroCopy, kernel_can: bool, on_loopback: bool) -> Shares {
        let wanted = kernel_can
            && match choice {
                ZeroCopy::Auto => !on_loopback,
                ZeroCopy::Always => true,
                ZeroCopy::Never => false,
            };
        Shares { choice, wanted, begun: 0, open: VecDeque::new() }
    }

    /// A long body is sent alone, but for what is short before it.
    pub(super) fn plan(&self, lengths: impl ExactSizeIterator<Item = usize> + Clone) -> Plan {
        let slices = lengths.len();
        if !self.wanted {
            return Plan::Copy { slices };
        }
        match lengths.clone().position(|length| length >= SHARED_BYTES_MIN) {
            None => Plan::Copy { slices },
            Some(at) if lengths.take(at).sum::<usize>() <= GATHERED_BYTES_MAX => Plan::Share { gathered: at },
            Some(at) => Plan::Copy { slices: at },
        }
    }

    /// Whether long bodies are sent without a copy.
    pub(super) fn are_wanted(&self) -> bool {
        self.wanted
    }

    /// The number of a send that begins.
    pub(super) fn begin(&mut self) -> u64 {
        self.begun += 1;
        self.open.push_back(self.begun);
        self.begun
    }

    /// The kernel has let go of a send's pages.
    pub(super) fn end(&mut self, number: u64, copied: bool) {
        self.open.retain(|open| *open != number);
        self.wanted &= !copied || self.choice == ZeroCopy::Always;
    }

    /// The kernel refuses such sends: what it pins may be bounded (RLIMIT_MEMLOCK), or it lacks a part.
    pub(super) fn give_up(&mut self) {
        self.wanted = false;
    }

    /// Up to this number the kernel has let go of all.
    pub(super) fn ended(&self) -> u64 {
        // A network card may be done with a later one first; the front is the earliest that is open all the same.
        self.open.front().map_or(self.begun, |first| first - 1)
    }

    /// The kernel has none of this connection's pages.
    pub(super) fn is_idle(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: usize = SHARED_BYTES_MIN;

    fn plan(shares: &Shares, lengths: &[usize]) -> Plan {
        shares.plan(lengths.iter().copied())
    }

    #[test]
    fn only_long_bodies_off_the_loopback_are_shared_where_the_kernel_can() {
        for (choice, can, loopback, wanted) in [
            (ZeroCopy::Auto, true, false, true),
            (ZeroCopy::Auto, true, true, false),
            (ZeroCopy::Auto, false, false, false),
            (ZeroCopy::Always, true, true, true),
            (ZeroCopy::Always, false, true, false),
            (ZeroCopy::Never, true, false, false),
        ] {
            let shares = Shares::new(choice, can, loopback);
            let expected = if wanted { Plan::Share { gathered: 1 } } else { Plan::Copy { slices: 2 } };
            assert_eq!(plan(&shares, &[64, LONG]), expected, "{choice:?}, {can}, {loopback}");
            assert_eq!(plan(&shares, &[64, LONG - 1]), Plan::Copy { slices: 2 }, "{choice:?}");
        }
    }

    #[test]
    fn what_is_before_a_long_body_goes_with_it_or_first() {
        let shares = Shares::new(ZeroCopy::Auto, true, false);
        assert_eq!(plan(&shares, &[LONG, 64]), Plan::Share { gathered: 0 });
        assert_eq!(plan(&shares, &[64, 1024, 64, LONG, 64, LONG]), Plan::Share { gathered: 3 });
        assert_eq!(plan(&shares, &[64, GATHERED_BYTES_MAX - 64, LONG]), Plan::Share { gathered: 2 });
        assert_eq!(plan(&shares, &[64, GATHERED_BYTES_MAX - 63, LONG]), Plan::Copy { slices: 2 });
        assert_eq!(plan(&shares, &[]), Plan::Copy { slices: 0 });
    }

    #[test]
    fn a_connection_whose_bytes_are_copied_or_refused_gives_up() {
        let mut shares = Shares::new(ZeroCopy::Auto, true, false);
        let (first, second) = (shares.begin(), shares.begin());
        shares.end(first, false);
        assert_eq!(plan(&shares, &[LONG]), Plan::Share { gathered: 0 });
        shares.end(second, true);
        assert_eq!(plan(&shares, &[LONG]), Plan::Copy { slices: 1 });
        let mut shares = Shares::new(ZeroCopy::Always, true, true);
        let number = shares.begin();
        shares.end(number, true);
        assert_eq!(plan(&shares, &[LONG]), Plan::Share { gathered: 0 });
        shares.give_up();
        assert_eq!(plan(&shares, &[LONG]), Plan::Copy { slices: 1 });
    }

    #[test]
    fn notifications_out_of_order_end_nothing_early() {
        let mut shares = Shares::new(ZeroCopy::Auto, true, false);
        assert_eq!((shares.ended(), shares.is_idle()), (0, true));
        for _ in 0..3 {
            shares.begin();
        }
        shares.end(2, false);
        assert_eq!((shares.ended(), shares.is_idle()), (0, false));
        shares.end(1, false);
        assert_eq!(shares.ended(), 2);
        shares.begin();
        shares.end(3, false);
        assert_eq!((shares.ended(), shares.is_idle()), (3, false));
        shares.end(4, false);
        assert_eq!((shares.ended(), shares.is_idle()), (4, true));
    }
}
