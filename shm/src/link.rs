//! A link: my half of talking to one peer. A ring each way, a line each way, and the peer's bell.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::doorbell::Bell;
use crate::mapping::Window;
use crate::participant::ParticipantId;
use crate::peer_line::{PeerLine, Take};
use crate::ring::{Consumer, Producer};
use crate::segment::{OwnSegment, OwnShared, PeerSegment};
use crate::width::low_half;

/// Why there is no link. Nothing the peer can see has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// Nobody talks to itself through shared memory.
    #[error("{0} cannot be linked with itself")]
    Oneself(ParticipantId),
    /// The segments belong to different processes.
    #[error("{0} belongs to another process")]
    OtherProcess(ParticipantId),
    /// The segments have different sizes.
    #[error("{0}'s segment has another configuration")]
    OtherShape(ParticipantId),
    /// One link per peer at a time: a ring has one producer.
    #[error("there is a live link to {0}")]
    AlreadyLinked(ParticipantId),
    /// The machine has no memory for the ring; nothing was touched.
    #[error("no memory for the ring")]
    NoSpace(#[source] io::Error),
}

/// My half of talking to one peer. One thread uses it; it may move.
///
/// Each side establishes its half when it likes. What is sent before the other half stands waits in the ring; what an
/// earlier participant of the same number left behind is never seen, because both ring and line count only once the
/// peer has linked to exactly this segment.
///
/// Establishing again with the *same* two segments needs both halves to be dropped first.
pub struct Link {
    /// What I send.
    pub producer: Producer,
    /// What the peer sends.
    pub consumer: Consumer,
    /// The peer's bell: ring it after sending.
    pub bell: Bell,
    ours: Window<PeerLine>,
    theirs: Window<PeerLine>,
    nonce: u64,
    theirs_is_about_us: Cell<bool>,
    peer: Arc<PeerSegment>,
    _claim: Claim,
}

impl Link {
    /// Makes my ring to the peer and my line about it, both zeroed, and only then shows them to it.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn establish(own: &OwnSegment, peer: Arc<PeerSegment>, peer_eventfd: OwnedFd) -> Result<Self, LinkError> {
        let (me, them) = (own.identity(), *peer.identity());
        if me.participant == them.participant {
            return Err(LinkError::Oneself(me.participant));
        }
        if me.process != them.process {
            return Err(LinkError::OtherProcess(them.participant));
        }
        if own.config() != peer.config() {
            return Err(LinkError::OtherShape(them.participant));
        }
        let claim = Claim::take(own.shared(), them.participant)?;
        let (ring_out, ours) = own.shared().ring_and_line(them.participant).map_err(LinkError::NoSpace)?;
        let (ring_in, theirs) = peer.ring_and_line(me.participant);
        ours.clear();
        for slot in ring_out.iter() {
            slot.clear();
        }
        let nonce = own.shared().nonce;
        let link = Self {
            producer: Producer::new(ring_out, theirs.clone(), nonce),
            consumer: Consumer::new(ring_in, ours.clone(), theirs.clone(), nonce),
            bell: Bell::new(peer.sleep_line(), peer_eventfd),
            ours,
            theirs,
            nonce,
            theirs_is_about_us: Cell::new(false),
            peer,
            _claim: claim,
        };
        link.ours.link(link.peer.nonce());
        Ok(link)
    }

    /// The peer's segment.
    #[inline]
    pub fn peer(&self) -> &Arc<PeerSegment> {
        &self.peer
    }

    /// Whether the peer has established its half. Once true, always true.
    #[inline]
    pub fn is_mutual(&self) -> bool {
        if !self.theirs_is_about_us.get() {
            self.theirs_is_about_us.set(self.theirs.is_about(self.nonce));
        }
        self.theirs_is_about_us.get()
    }

    /// Requests of the peer below `position` may have run. To be said *before* user code is entered.
    #[inline]
    pub fn mark_taken(&self, position: u64) {
        self.ours.mark_taken(position);
    }

    /// Takes the peer's request at `position` to run it, unless the peer has withdrawn it. To be called, in the order of the
    /// positions, *before* user code is entered.
    #[inline]
    pub fn take(&self, position: u64) -> Take {
        self.ours.take(&self.theirs, position)
    }

    /// Takes back every request sent so far that the peer has not taken. Gives the first position that it did not take: requests
    /// there and later never run; one below may have run, or comes back as [`Take::Crossed`].
    #[must_use]
    pub fn withdraw(&self) -> u64 {
        self.ours.withdraw(self.producer.tail());
        self.peer_taken()
    }

    /// Exchange requests of the peer up to `sequence` may have run. To be said before user code is entered.
    #[inline]
    pub fn mark_exchange_taken(&self, sequence: u32) {
        self.ours.mark_exchange_taken(sequence);
    }

    /// Descriptors of this lease at `position` and later are not taken and never will be. A lease is not 0.
    pub fn close(&self, lease: u64, position: u64) {
        self.ours.close(lease, position);
    }

    /// The peer need not go on with this call.
    pub fn cancel(&self, call: u64) {
        self.ours.cancel(call);
    }

    /// The peer's [`Link::mark_taken`]; 0 if it has said nothing. A claim, like the four below.
    #[inline]
    pub fn peer_taken(&self) -> u64 {
        if self.is_mutual() { self.theirs.taken() } else { 0 }
    }

    /// From here on the answer to a question of ours with this number, and all before, is taken for good: it is not to be given to anybody else.
    #[inline]
    pub fn mark_received(&self, number: u64) {
        self.ours.mark_received(number);
    }

    /// Takes what the peer offered under this number, as [`Link::mark_received`] says it, unless the peer has retracted it. False: it must not be
    /// used, and what we say we received is what it was.
    #[inline]
    #[must_use]
    pub fn accept(&self, number: u64) -> bool {
        self.ours.accept(&self.theirs, number)
    }

    /// Takes back what was offered to the peer under this number. True: it did not accept it, and never will. False: it has, or finds at this
    /// moment that it cannot; its [`Link::peer_received`] tells which, once something else that it did afterwards is seen.
    #[must_use]
    pub fn retract(&self, number: u64) -> bool {
        self.ours.retract(number);
        self.peer_received() < number
    }

    /// The peer's [`Link::mark_received`]; 0 if it has said nothing.
    pub fn peer_received(&self) -> u64 {
        if self.is_mutual() { self.theirs.received() } else { 0 }
    }

    /// The peer's [`Link::mark_exchange_taken`]; 0 if it has said nothing.
    #[inline]
    pub fn peer_exchange_taken(&self) -> u32 {
        if self.is_mutual() { low_half(self.theirs.exchange_taken()) } else { 0 }
    }

    /// The peer's last [`Link::close`]: lease and position; `(0, 0)` if there was none, or if it changes at this moment.
    #[inline]
    pub fn peer_closed(&self) -> (u64, u64) {
        if self.is_mutual() { self.theirs.closed() } else { (0, 0) }
    }

    /// The peer's last [`Link::cancel`]; 0 if there was none.
    #[inline]
    pub fn peer_cancelled(&self) -> u64 {
        if self.is_mutual() { self.theirs.cancelled() } else { 0 }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("peer", self.peer.identity())
            .field("producer", &self.producer)
            .field("consumer", &self.consumer)
            .finish_non_exhaustive()
    }
}

/// The right to be the one link to a peer.
struct Claim {
    own: Arc<OwnShared>,
    peer: ParticipantId,
}

impl Claim {
    fn take(own: &Arc<OwnShared>, peer: ParticipantId) -> Result<Self, LinkError> {
        if !own.claim_link(peer) {
            return Err(LinkError::AlreadyLinked(peer));
        }
        Ok(Self { own: Arc::clone(own), peer })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.own.free_link(self.peer);
    }
}
