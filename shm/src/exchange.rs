//! The exchange line: the law's one exception. A page that exactly two participants can write, where a synchronous call
//! puts request and answer into the same cache line, so that a round trip moves one line instead of two.
//!
//! | word | written by          | content                                                                      |
//! |-----:|---------------------|------------------------------------------------------------------------------|
//! |    0 | caller              | head of the request; its stamp is the sequence                               |
//! |    1 | callee              | head of the reply; its stamp is the sequence it answers, bit 31: closed      |
//! | 2..8 | whose turn it is    | as in a descriptor: `aux` and body                                           |
//!
//! A sequence has 31 bits, starts at 1 and skips 0. The turn is the caller's when the two sequences are equal, else the
//! callee's. Nothing here is believed beyond the one call, and the page goes with the lease: a lying end hurts its own.
//!
//! | edge      | release side                        | acquire side                   | carries                              |
//! |-----------|-------------------------------------|--------------------------------|--------------------------------------|
//! | requested | `ExchangeCaller::submit`, word 0    | `ExchangeCallee::poll`, word 0 | the request's words, and its block   |
//! | replied   | `ExchangeCallee::reply`, word 1     | `ExchangeCaller::poll`, word 1 | the reply's words; the callee's loads of the request are done |
//! | closed    | `ExchangeCallee::close`, word 1     | `ExchangeCaller::poll`, word 1 | every reply there will ever be       |

use std::fmt;

use crate::descriptor::{BadDescriptor, DESCRIPTOR_WORDS, Descriptor};
use crate::mapping::{SharedLayout, Window};
use crate::sync::{AtomicU64, Ordering, Shadow};
use crate::watch::Watch;
use crate::width::low_half;

/// Bytes of an exchange page. Only the first line is used; a page is what the kernel can seal and share.
pub const EXCHANGE_PAGE_BYTES: u64 = 4096;

/// Bit 31 of the reply's stamp.
const CLOSED: u32 = 1 << 31;
const SEQUENCE: u32 = CLOSED - 1;

#[repr(C, align(64))]
pub(crate) struct ExchangeLine {
    words: [AtomicU64; DESCRIPTOR_WORDS],
    shadow: Shadow,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<ExchangeLine>() == 64 && align_of::<ExchangeLine>() == 64);

// SAFETY: `repr(C)` of 8 `AtomicU64`: any bits are a value, all of it is atomics, no padding (asserted above; a
// `Shadow` has no size).
unsafe impl SharedLayout for ExchangeLine {}

impl ExchangeLine {
    #[inline(always)]
    fn write_rest(&self, descriptor: &Descriptor) {
        self.shadow.write();
        descriptor.store_rest(|at, word| self.words[at].store(word, Ordering::Relaxed));
    }

    #[inline(always)]
    fn read(&self, head: u64, sequence: u32) -> Result<Descriptor, BadDescriptor> {
        self.shadow.read();
        Descriptor::decode_with(head, sequence.into(), |at| self.words[at].load(Ordering::Relaxed))
    }
}

/// The sequence after this one: 1, 2, … 2^31 - 1, 1.
#[inline]
const fn next(sequence: u32) -> u32 {
    if sequence == SEQUENCE { 1 } else { sequence + 1 }
}

/// What a caller finds.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum ExchangeReply {
    /// The answer. Its `id` is the sequence.
    Reply(Descriptor),
    /// The callee has gone: the request was not taken and never will be.
    Closed,
}

/// The end that asks.
pub struct ExchangeCaller {
    line: Window<ExchangeLine>,
    sequence: u32,
    busy: bool,
}

impl ExchangeCaller {
    /// Asks. The callee is not woken: ring its bell. An `id` is not carried; both ends see the sequence instead.
    ///
    /// # Panics
    /// If [`ExchangeCaller::busy`]: the callee may be writing to the line at this moment.
    #[inline(always)]
    pub fn submit(&mut self, request: &Descriptor) -> u32 {
        assert!(!self.busy, "exchange request {} is not answered yet", self.sequence);
        self.sequence = next(self.sequence);
        self.busy = true;
        self.line.write_rest(request);
        // requested (release): the other words, and the block they name, become visible before the sequence.
        self.line.words[0].store(request.head_word(self.sequence), Ordering::Release);
        self.sequence
    }

    /// The reply to the request in flight, if it is there. None also if nothing was asked.
    ///
    /// # Errors
    /// [`BadDescriptor`]: the callee broke the format. The call is over.
    #[inline(always)]
    pub fn poll(&mut self) -> Result<Option<ExchangeReply>, BadDescriptor> {
        if !self.busy {
            return Ok(None);
        }
        // replied, closed (acquire).
        let head = self.line.words[1].load(Ordering::Acquire);
        let stamp = low_half(head);
        if stamp & SEQUENCE == self.sequence {
            self.busy = false;
            return self.line.read(head, self.sequence).map(|reply| Some(ExchangeReply::Reply(reply)));
        }
        if stamp & CLOSED != 0 {
            self.busy = false;
            return Ok(Some(ExchangeReply::Closed));
        }
        Ok(None)
    }

    /// The word that changes when there is something to [`ExchangeCaller::poll`].
    #[inline(always)]
    pub fn watch(&self) -> Watch<'_> {
        Watch::on(&self.line.words[1])
    }

    /// Whether [`ExchangeCaller::poll`] would find something. Looks at one word; may be stale at once.
    #[inline(always)]
    pub fn ready(&self) -> bool {
        let stamp = low_half(self.line.words[1].load(Ordering::Acquire));
        self.busy && (stamp & SEQUENCE == self.sequence || stamp & CLOSED != 0)
    }

    /// A request is in flight, possibly abandoned: its end was not polled yet, and the line is the callee's.
    #[inline]
    pub fn busy(&self) -> bool {
        self.busy
    }
}

/// The end that answers.
pub struct ExchangeCallee {
    line: Window<ExchangeLine>,
    /// Of the request taken last.
    taken: u32,
    /// Of the request answered last.
    answered: u32,
    /// Word 1 as we wrote it last.
    head: u64,
    closed: bool,
}

impl ExchangeCallee {
    /// The word that changes when there is something to [`ExchangeCallee::poll`].
    #[inline(always)]
    pub fn watch(&self) -> Watch<'_> {
        Watch::on(&self.line.words[0])
    }

    /// Whether there is a request. Looks at one word; what it says, [`ExchangeCallee::poll`] checks.
    #[inline]
    pub fn ready(&self) -> bool {
        !self.closed && low_half(self.line.words[0].load(Ordering::Relaxed)) != self.taken
    }

    /// The next request, if there is one, and its sequence. After [`ExchangeCallee::close`] there is none.
    ///
    /// # Errors
    /// [`BadDescriptor`]: the caller broke the format. There is nothing to answer; close the exchange.
    #[inline(always)]
    pub fn poll(&mut self) -> Result<Option<(u32, Descriptor)>, BadDescriptor> {
        if self.closed {
            return Ok(None);
        }
        // requested (acquire).
        let head = self.line.words[0].load(Ordering::Acquire);
        let sequence = low_half(head);
        if sequence == self.taken {
            return Ok(None);
        }
        let expected = next(self.answered);
        if self.taken != self.answered || sequence != expected {
            return Err(BadDescriptor::Sequence { found: sequence, expected });
        }
        let request = self.line.read(head, sequence)?;
        self.taken = sequence;
        Ok(Some((sequence, request)))
    }

    /// Answers the request taken last.
    ///
    /// # Panics
    /// If there is none: nothing was taken since the last reply.
    #[inline(always)]
    pub fn reply(&mut self, reply: &Descriptor) {
        assert!(self.taken != self.answered, "there is no exchange request to answer");
        self.answered = self.taken;
        self.line.write_rest(reply);
        let closed = if self.closed { CLOSED } else { 0 };
        self.head = reply.head_word(self.answered | closed);
        // replied (release): the reply's words are visible before its sequence, and our loads of the request are done.
        self.line.words[1].store(self.head, Ordering::Release);
    }

    /// Reads no request again: whatever is not answered and not taken was not taken. The reply written last stays, and a
    /// request taken before may still be answered; close before polling again, not in the middle of a call, if the
    /// caller should see [`ExchangeReply::Closed`] as "never ran".
    pub fn close(&mut self) {
        self.closed = true;
        if self.taken == self.answered {
            self.head |= u64::from(CLOSED);
            // closed (release): an earlier reply stays readable in the same word.
            self.line.words[1].store(self.head, Ordering::Release);
        }
    }
}

impl fmt::Debug for ExchangeCaller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExchangeCaller")
            .field("sequence", &self.sequence)
            .field("busy", &self.busy)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ExchangeCallee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExchangeCallee")
            .field("taken", &self.taken)
            .field("answered", &self.answered)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
impl ExchangeLine {
    pub(crate) fn blank() -> Self {
        Self { words: std::array::from_fn(|_| AtomicU64::new(0)), shadow: Shadow::default() }
    }
}

impl ExchangeCaller {
    pub(crate) fn on(line: Window<ExchangeLine>) -> Self {
        Self { line, sequence: 0, busy: false }
    }
}

impl ExchangeCallee {
    pub(crate) fn on(line: Window<ExchangeLine>) -> Self {
        Self { line, taken: 0, answered: 0, head: 0, closed: false }
    }
}

#[cfg(not(loom))]
mod page {
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;

    use rustix::fs::SealFlags;

    use super::{EXCHANGE_PAGE_BYTES, ExchangeCallee, ExchangeCaller, ExchangeLine};
    use crate::mapping::{Access, Mapping, Window};
    use crate::segment::{AttachError, allocate, inspect, sealed_memfd};

    /// A new exchange page, zeroed, backed by memory, its size sealed. Both ends get this descriptor.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub fn create() -> io::Result<OwnedFd> {
        let page = sealed_memfd("praas-exchange", EXCHANGE_PAGE_BYTES)?;
        allocate(&page, 0, EXCHANGE_PAGE_BYTES)?;
        Ok(page)
    }

    fn attach(page: OwnedFd) -> Result<Window<ExchangeLine>, AttachError> {
        inspect(page.as_fd(), EXCHANGE_PAGE_BYTES, SealFlags::SHRINK | SealFlags::GROW)?;
        // The mapping keeps the memory; the descriptor is not needed any more.
        let mapping = Mapping::map(page.as_fd(), EXCHANGE_PAGE_BYTES, Access::Write).map_err(AttachError::Map)?;
        let mapping = Arc::new(mapping);
        mapping.populate(0, EXCHANGE_PAGE_BYTES);
        Ok(mapping.window(0))
    }

    impl ExchangeCaller {
        /// The asking end of a fresh page.
        ///
        /// # Errors
        /// [`AttachError`]: not such a page, or the kernel did not map it.
        pub fn from_fd(page: OwnedFd) -> Result<Self, AttachError> {
            attach(page).map(Self::on)
        }
    }

    impl ExchangeCallee {
        /// The answering end of a fresh page.
        ///
        /// # Errors
        /// [`AttachError`]: not such a page, or the kernel did not map it.
        pub fn from_fd(page: OwnedFd) -> Result<Self, AttachError> {
            attach(page).map(Self::on)
        }
    }
}

#[cfg(not(loom))]
pub use page::create;

#[cfg(all(test, not(loom)))]
mod tests;
