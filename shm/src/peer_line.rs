//! A peer line: what one participant says about its traffic with one other. It stands in the speaker's segment;
//! the speaker alone writes it, the other side alone cares.
//!
//! | offset | bytes | field             | says                                                              |
//! |-------:|------:|-------------------|-------------------------------------------------------------------|
//! |      0 |     8 | `linked`          | nonce of the peer's segment that this line is about; 0: nobody    |
//! |      8 |     8 | `head`            | slots of the peer's ring that may be overwritten: `[.., head)`    |
//! |     16 |     8 | `taken`           | requests below this position may have run                         |
//! |     24 |     8 | `exchange_taken`  | exchange requests up to this sequence may have run                |
//! |     32 |     8 | `received`        | number of the last question whose answer was taken for good       |
//! |     40 |    24 | reserved          | zero                                                              |
//! |     64 |     8 | `closed_position` | of the lease closed last                                          |
//! |     72 |     8 | `closed_lease`    | its number; 0: none, or being written                             |
//! |     80 |     8 | `cancelled`       | the call cancelled last                                           |
//! |     88 |     8 | `withdrawn`       | requests of ours below this position are void, unless taken       |
//! |     96 |     8 | `retracted`       | what we offered up to this number is void, unless received        |
//! |    104 |    24 | reserved          | zero                                                              |
//!
//! The first half is written at every call and read when something is wrong or a ring looks full; the second is
//! written seldom and read while spinning. Two cache lines keep the writes of the one out of the reads of the other.
//!
//! | edge    | release side                          | acquire side                 | carries                          |
//! |---------|---------------------------------------|------------------------------|----------------------------------|
//! | linked  | `link`                                | `is_about`                   | the zeroed ring and the zeroed line |
//! | drained | `publish_head`                        | `head`                       | our loads of the slots are done  |
//! | taken   | fence in `mark_taken`, then user code | whatever shows its effects   | the mark: who sees an effect sees the mark |
//! | closed  | `close`: fence, then `closed_lease`   | `closed`: lease, then fence  | `closed_position` of that lease  |
//! | told    | `cancel`                              | `cancelled`                  | nothing but the number           |
//!
//! A withdrawal and a mark cross: each side stores its own word, passes a full fence, and reads the other's. So not both
//! miss the other: a request that the withdrawer does not see taken is one that its taker sees withdrawn. A retraction and an acceptance
//! cross in the same way; who accepted and sees it retracted takes its mark away again.

use crate::mapping::SharedLayout;
use crate::sync::{AtomicU64, Ordering, fence};

/// What became of a request that was about to run ([`crate::Link::take`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// It is ours to run.
    Mine,
    /// It was withdrawn: it must not run, and its sender knows that.
    Void,
    /// It was withdrawn at the same moment: it must not run, and its sender has to be told, since it may have seen it taken.
    Crossed,
}

/// See the module.
#[repr(C, align(128))]
pub(crate) struct PeerLine {
    linked: AtomicU64,
    head: AtomicU64,
    taken: AtomicU64,
    exchange_taken: AtomicU64,
    received: AtomicU64,
    _reserved: [AtomicU64; 3],
    closed_position: AtomicU64,
    closed_lease: AtomicU64,
    cancelled: AtomicU64,
    withdrawn: AtomicU64,
    retracted: AtomicU64,
    _reserved_2: [AtomicU64; 3],
}

/// Distance between two peer lines, bytes.
pub(crate) const PEER_LINE_BYTES: u64 = 128;

#[cfg(not(loom))]
const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<PeerLine>() as u64 == PEER_LINE_BYTES && align_of::<PeerLine>() == 128);
    assert!(offset_of!(PeerLine, linked) == 0 && offset_of!(PeerLine, head) == 8);
    assert!(offset_of!(PeerLine, taken) == 16 && offset_of!(PeerLine, exchange_taken) == 24);
    assert!(offset_of!(PeerLine, received) == 32 && offset_of!(PeerLine, _reserved) == 40);
    assert!(offset_of!(PeerLine, closed_position) == 64);
    assert!(offset_of!(PeerLine, closed_lease) == 72 && offset_of!(PeerLine, cancelled) == 80);
    assert!(offset_of!(PeerLine, withdrawn) == 88 && offset_of!(PeerLine, retracted) == 96);
};

// SAFETY: `repr(C)` of 16 `AtomicU64`: any bits are a value, all of it is atomics, no padding (asserted above).
unsafe impl SharedLayout for PeerLine {}

/// The speaker's side.
impl PeerLine {
    /// Forgets whatever was said before, about whomever.
    pub(crate) fn clear(&self) {
        // Not an edge: the peer this was about is gone, and the next one believes nothing before `link`.
        self.linked.store(0, Ordering::Relaxed);
        let said = [&self.head, &self.taken, &self.exchange_taken, &self.received, &self.closed_position];
        for word in said.into_iter().chain([&self.closed_lease, &self.cancelled, &self.withdrawn, &self.retracted]) {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// From here on this line, and the ring that goes with it, are about the segment with this nonce.
    pub(crate) fn link(&self, nonce: u64) {
        // linked (release): the zeroed ring and line are visible before the nonce.
        self.linked.store(nonce, Ordering::Release);
    }

    #[inline]
    pub(crate) fn publish_head(&self, head: u64) {
        // drained (release): our loads of the slots below `head` are done before the peer may overwrite them.
        self.head.store(head, Ordering::Release);
    }

    #[inline]
    pub(crate) fn mark_received(&self, number: u64) {
        self.received.store(number, Ordering::Relaxed);
        // As in `mark_taken`: what user code does with it comes after the mark.
        fence(Ordering::Release);
    }

    /// See [`crate::Link::accept`].
    #[inline]
    pub(crate) fn accept(&self, theirs: &PeerLine, number: u64) -> bool {
        let before = self.received.load(Ordering::Relaxed);
        self.received.store(number, Ordering::Relaxed);
        // crosses `retract`.
        fence(Ordering::SeqCst);
        let is_ours = theirs.retracted() < number;
        if !is_ours {
            self.received.store(before, Ordering::Relaxed);
        }
        is_ours
    }

    #[inline]
    pub(crate) fn mark_taken(&self, position: u64) {
        self.taken.store(position, Ordering::Relaxed);
        // taken (release fence): a release *store* would order what came before it; here the stores that come after,
        // user code's, must stay behind the mark. No instruction on x86.
        fence(Ordering::Release);
    }

    /// See [`crate::Link::take`].
    #[inline]
    pub(crate) fn take(&self, theirs: &PeerLine, position: u64) -> Take {
        if position < theirs.withdrawn() {
            return Take::Void;
        }
        self.mark_taken(position + 1);
        // crosses `withdraw`.
        fence(Ordering::SeqCst);
        if position < theirs.withdrawn() { Take::Crossed } else { Take::Mine }
    }

    #[inline]
    pub(crate) fn mark_exchange_taken(&self, sequence: u32) {
        self.exchange_taken.store(u64::from(sequence), Ordering::Relaxed);
        // taken (release fence): as above.
        fence(Ordering::Release);
    }

    pub(crate) fn close(&self, lease: u64, position: u64) {
        // closed: a reader between two closings must not pair the old lease with the new position, so the lease
        // is taken away first. The fence keeps the position behind that.
        self.closed_lease.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        self.closed_position.store(position, Ordering::Relaxed);
        // closed (release): the position is visible before the lease it belongs to.
        self.closed_lease.store(lease, Ordering::Release);
    }

    pub(crate) fn cancel(&self, call: u64) {
        // told (release).
        self.cancelled.store(call, Ordering::Release);
    }

    pub(crate) fn retract(&self, number: u64) {
        self.retracted.store(number, Ordering::Relaxed);
        // crosses `accept`.
        fence(Ordering::SeqCst);
    }

    pub(crate) fn withdraw(&self, position: u64) {
        self.withdrawn.store(position, Ordering::Relaxed);
        // crosses `take`.
        fence(Ordering::SeqCst);
    }
}

/// The other side. Every value is a claim.
impl PeerLine {
    #[inline]
    pub(crate) fn is_about(&self, nonce: u64) -> bool {
        // linked (acquire).
        self.linked.load(Ordering::Acquire) == nonce
    }

    #[inline]
    pub(crate) fn head(&self) -> u64 {
        // drained (acquire): our stores into the freed slots come after the peer's last loads of them.
        self.head.load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn taken(&self) -> u64 {
        // taken (acquire).
        self.taken.load(Ordering::Acquire)
    }

    pub(crate) fn received(&self) -> u64 {
        // As in `taken`.
        self.received.load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn exchange_taken(&self) -> u64 {
        // taken (acquire).
        self.exchange_taken.load(Ordering::Acquire)
    }

    /// The lease closed last and its position; `(0, 0)` if none, or if it changes at this moment.
    #[inline]
    pub(crate) fn closed(&self) -> (u64, u64) {
        // closed (acquire).
        let lease = self.closed_lease.load(Ordering::Acquire);
        if lease == 0 {
            return (0, 0);
        }
        let position = self.closed_position.load(Ordering::Relaxed);
        // closed: if the position is a later lease's, this fence makes us see that ours was taken away.
        fence(Ordering::Acquire);
        if self.closed_lease.load(Ordering::Relaxed) == lease { (lease, position) } else { (0, 0) }
    }

    #[inline]
    pub(crate) fn cancelled(&self) -> u64 {
        // told (acquire).
        self.cancelled.load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn retracted(&self) -> u64 {
        // As in `withdrawn`.
        self.retracted.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn withdrawn(&self) -> u64 {
        // Nothing comes with it but the number.
        self.withdrawn.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
impl PeerLine {
    pub(crate) fn blank() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            linked: zero(),
            head: zero(),
            taken: zero(),
            exchange_taken: zero(),
            received: zero(),
            _reserved: std::array::from_fn(|_| zero()),
            closed_position: zero(),
            closed_lease: zero(),
            cancelled: zero(),
            withdrawn: zero(),
            retracted: zero(),
            _reserved_2: std::array::from_fn(|_| zero()),
        }
    }
}
