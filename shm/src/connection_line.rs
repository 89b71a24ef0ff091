//! The connection line: what a worker says about a client connection that it was lent. Written before and after every call, read when the worker
//! has died, and now and then to find a call that runs past its deadline.
//!
//! | offset | bytes | field      | says                                                                      |
//! |-------:|------:|------------|---------------------------------------------------------------------------|
//! |      0 |     8 | `count`    | how often something was said; what was said last is in slot `count % 2`   |
//! |      8 |    56 | `slots[0]` | seven words, see [`LentConnection`]                                       |
//! |     64 |    56 | `slots[1]` | likewise                                                                  |
//! |    120 |     8 | reserved   | zero                                                                      |
//!
//! The slot that `count` names is never written, so that a worker killed between any two stores leaves whole what it said last.
//!
//! | edge | release side         | acquire side         | carries                                  |
//! |------|----------------------|----------------------|------------------------------------------|
//! | said | `say`, `count`       | `said`, first `count` | the seven words of that slot             |
//! | kept | `say`, the fence     | `said`, the fence    | that a slot seen changing shows another `count` |

use crate::mapping::SharedLayout;
use crate::sync::{AtomicU64, Ordering, fence};

const WORDS: usize = 7;

/// See the module.
#[repr(C, align(128))]
pub(crate) struct ConnectionLine {
    count: AtomicU64,
    slots: [[AtomicU64; WORDS]; 2],
    _reserved: AtomicU64,
}

#[cfg(not(loom))]
const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<ConnectionLine>() == 128 && align_of::<ConnectionLine>() == 128);
    assert!(offset_of!(ConnectionLine, count) == 0 && offset_of!(ConnectionLine, slots) == 8);
    assert!(offset_of!(ConnectionLine, _reserved) == 120);
};

// SAFETY: `repr(C)` of 16 `AtomicU64`: any bits are a value, all of it is atomics, no padding (asserted above).
unsafe impl SharedLayout for ConnectionLine {}

/// Where a worker is with a connection: between two frames, or in a call.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct LentConnection {
    /// Which lease; 0: none.
    pub lease: u64,
    /// Frames read, whole ones, counted from the beginning of the connection.
    pub received: u64,
    /// Frames written.
    pub sent: u64,
    /// Bytes read from the socket under this lease.
    pub read_bytes: u64,
    /// Bytes written to it.
    pub written_bytes: u64,
    /// The call that runs.
    pub call: u64,
    /// Its deadline, ns; 0: none runs.
    pub deadline_ns: u64,
}

impl LentConnection {
    fn words(&self) -> [u64; WORDS] {
        [self.lease, self.received, self.sent, self.read_bytes, self.written_bytes, self.call, self.deadline_ns]
    }

    fn from_words([lease, received, sent, read_bytes, written_bytes, call, deadline_ns]: [u64; WORDS]) -> Self {
        LentConnection { lease, received, sent, read_bytes, written_bytes, call, deadline_ns }
    }
}

impl ConnectionLine {
    /// The owner alone says something.
    #[inline]
    pub(crate) fn say(&self, state: &LentConnection) {
        let count = self.count.load(Ordering::Relaxed).wrapping_add(1);
        // kept (release fence): `count` as it is names the other slot before this one changes.
        fence(Ordering::Release);
        for (word, value) in self.slots[usize::from(count % 2 == 1)].iter().zip(state.words()) {
            word.store(value, Ordering::Relaxed);
        }
        // said (release): the words are visible before the count that names them.
        self.count.store(count, Ordering::Release);
    }

    /// What was said last, each word loaded once; `None` if it changes at this moment. A claim.
    pub(crate) fn said(&self) -> Option<LentConnection> {
        // said (acquire).
        let count = self.count.load(Ordering::Acquire);
        let slot = &self.slots[usize::from(count % 2 == 1)];
        let words = std::array::from_fn(|at| slot[at].load(Ordering::Relaxed));
        // kept (acquire fence): words of a later saying show a later count here.
        fence(Ordering::Acquire);
        (self.count.load(Ordering::Relaxed) == count).then(|| LentConnection::from_words(words))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn blank() -> ConnectionLine {
        let zeroes = || std::array::from_fn(|_| AtomicU64::new(0));
        ConnectionLine { count: AtomicU64::new(0), slots: [zeroes(), zeroes()], _reserved: AtomicU64::new(0) }
    }

    fn state(number: u64) -> LentConnection {
        LentConnection::from_words(std::array::from_fn(|at| number * 100 + at as u64))
    }

    /// W2: whatever word the owner died at, what it said before stands.
    #[test]
    fn w2_a_saying_cut_off_at_any_store_leaves_the_one_before() {
        for number in 1..4 {
            for stores in 0..=WORDS {
                let line = blank();
                (1..=number).for_each(|number| line.say(&state(number)));
                // What `say` does, as far as it came.
                let count = line.count.load(Ordering::Relaxed) + 1;
                let slot = &line.slots[usize::from(count % 2 == 1)];
                for (word, value) in slot.iter().zip(state(number + 1).words()).take(stores) {
                    word.store(value, Ordering::Relaxed);
                }
                assert_eq!(line.said(), Some(state(number)), "{stores} words of saying {}", number + 1);
            }
        }
        assert_eq!(blank().said(), Some(LentConnection::default()));
    }

    #[test]
    fn a_reader_sees_one_saying_or_none() {
        let line = blank();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                (1..200_000).for_each(|number| line.say(&state(number)));
                done.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            let mut seen = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let Some(said) = line.said().filter(|said| said.lease > 0) else { continue };
                assert_eq!(said, state(said.lease / 100), "words of one saying");
                assert!(said.lease >= seen, "in order");
                seen = said.lease;
            }
        });
        assert_eq!(line.said(), Some(state(199_999)));
    }
}
