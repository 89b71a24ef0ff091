//! The ring: descriptors from one participant to one other, one cache line each.
//!
//! The ring stands in the producer's segment; the consumer maps it read-only and says how far it got in a line of
//! its own segment (`peer_line.rs`). So each word has one writer, and a dead or hostile end cannot break the other.
//!
//! A slot carries its own lap: the low half of word 0 is `lap + 1`, where `lap = position / slots`. A consumer that
//! spins reads that one word of the one line it waits for; when it changes, the same transfer brought the message.
//! The producer learns how far the consumer is only when the ring looks full.
//!
//! | edge      | release side                      | acquire side                  | carries                                |
//! |-----------|-----------------------------------|-------------------------------|----------------------------------------|
//! | published | `Producer::try_send`, word 0      | `Consumer::poll`, word 0      | words 1..8 of the slot, and the block they name |
//! | drained   | `Consumer::publish`, `head`       | `Producer::refresh`, `head`   | the consumer's loads of the slots are finished |
//! | linked    | `PeerLine::link`                  | `PeerLine::is_about`          | the peer's ring and line are ours, not a predecessor's |
//!
//! Positions are `u64` and never wrap in a life; the stamp is their lap's low half and does wrap. That is exact: a slot
//! can only hold this lap's stamp or the one before it.

use std::fmt;

use crate::descriptor::{BadDescriptor, DESCRIPTOR_WORDS, Descriptor};
use crate::mapping::{SharedLayout, Window};
use crate::peer_line::PeerLine;
use crate::prefetch::prefetch_for_write;
use crate::sync::{AtomicU64, Ordering, Shadow};
use crate::watch::Watch;
use crate::width::{host, low_half};

/// Bytes of a slot: one cache line.
#[cfg(not(loom))]
pub(crate) const SLOT_BYTES: u64 = 64;

/// One descriptor in shared memory.
#[repr(C, align(64))]
pub(crate) struct Slot {
    words: [AtomicU64; DESCRIPTOR_WORDS],
    shadow: Shadow,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Slot>() as u64 == SLOT_BYTES && align_of::<Slot>() == 64);

// SAFETY: `repr(C)` of 8 `AtomicU64`: any bits are a value, all of it is atomics, no padding (asserted above; a
// `Shadow` has no size).
unsafe impl SharedLayout for Slot {}

impl Slot {
    /// Back to "never written". The reader of the ring believes it after the *linked* edge.
    pub(crate) fn clear(&self) {
        self.shadow.write();
        for word in &self.words {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Never written.
    #[cfg(test)]
    pub(crate) fn blank() -> Self {
        Slot { words: std::array::from_fn(|_| AtomicU64::new(0)), shadow: Shadow::default() }
    }

    /// The word that a write changes last.
    #[inline(always)]
    pub(crate) fn stamp_word(&self) -> &AtomicU64 {
        &self.words[0]
    }

    #[inline(always)]
    pub(crate) fn write(&self, stamp: u32, descriptor: &Descriptor) {
        self.shadow.write();
        self.words[1].store(descriptor.id(), Ordering::Relaxed);
        descriptor.store_rest(|at, word| self.words[at].store(word, Ordering::Relaxed));
        // published (release): the other words, and the block they name, become visible before the stamp.
        self.words[0].store(descriptor.head_word(stamp), Ordering::Release);
    }

    /// Word 0, if it carries this stamp.
    #[inline(always)]
    pub(crate) fn head_if(&self, stamp: u32) -> Option<u64> {
        // published (acquire).
        let head = self.words[0].load(Ordering::Acquire);
        (low_half(head) == stamp).then_some(head)
    }

    #[inline(always)]
    pub(crate) fn read(&self, head: u64) -> Result<Descriptor, BadDescriptor> {
        self.shadow.read();
        let id = self.words[1].load(Ordering::Relaxed);
        Descriptor::decode_with(head, id, |at| self.words[at].load(Ordering::Relaxed))
    }
}

/// The ring has no free slot, or its consumer claims nonsense. An answer, not a failure.
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[error("the ring is full")]
pub struct Full;

/// A consumer cannot go there.
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[error("position {asked} is outside [{head}, {head} + {slots}]")]
pub struct BadPosition {
    /// Where to.
    pub asked: u64,
    /// Where the consumer is.
    pub head: u64,
    /// Slots of the ring.
    pub slots: u64,
}

/// How many slots, and where a position falls.
#[derive(Copy, Clone, Debug)]
struct Shape {
    slots: u64,
    lap_shift: u32,
}

impl Shape {
    fn of(slots: &[Slot]) -> Self {
        let slots = slots.len() as u64;
        assert!(slots.is_power_of_two(), "a ring has a power of two slots, not {slots}");
        Self { slots, lap_shift: slots.trailing_zeros() }
    }

    #[inline]
    fn index(self, position: u64) -> usize {
        host(position & (self.slots - 1))
    }

    #[inline]
    fn stamp(self, position: u64) -> u32 {
        low_half(position >> self.lap_shift).wrapping_add(1)
    }
}

/// The line in which the peer speaks about us, and whether it does so yet.
///
/// Before the peer has linked to *this* segment, its line and its ring may still be about a predecessor of ours.
struct PeerClaims {
    line: Window<PeerLine>,
    nonce: u64,
    is_about_us: bool,
}

impl PeerClaims {
    #[inline]
    fn open(&mut self) -> bool {
        if !self.is_about_us {
            self.is_about_us = self.line.is_about(self.nonce);
        }
        self.is_about_us
    }
}

/// The writing end. Never blocks, allocates or enters the kernel.
pub struct Producer {
    slots: Window<[Slot]>,
    shape: Shape,
    tail: u64,
    /// The peer's head when we last looked; stale, and safe to be.
    head_seen: u64,
    peer: PeerClaims,
    peer_head_invalid: bool,
}

impl Producer {
    pub(crate) fn new(slots: Window<[Slot]>, their_line: Window<PeerLine>, nonce: u64) -> Self {
        let shape = Shape::of(&slots);
        let peer = PeerClaims { line: their_line, nonce, is_about_us: false };
        Self { slots, shape, tail: 0, head_seen: 0, peer, peer_head_invalid: false }
    }

    /// Publishes one descriptor and says at which position. The peer is not woken: ring its bell.
    ///
    /// # Errors
    /// [`Full`] while the consumer is a whole ring behind, or lies about where it is.
    #[inline(always)]
    pub fn try_send(&mut self, descriptor: &Descriptor) -> Result<u64, Full> {
        if self.tail.wrapping_sub(self.head_seen) >= self.shape.slots && !self.refresh() {
            return Err(Full);
        }
        let position = self.tail;
        self.slots[self.shape.index(position)].write(self.shape.stamp(position), descriptor);
        self.tail = position.wrapping_add(1);
        Ok(position)
    }

    /// Says that a descriptor will be sent soon, so that its slot is at hand by then. Worth it when there is something to do in between.
    #[inline(always)]
    pub fn prefetch_slot(&self) {
        prefetch_for_write(&self.slots[self.shape.index(self.tail)]);
    }

    /// Slots that can be filled now. Looks at the consumer's line: not for every message.
    pub fn free_slots(&mut self) -> u32 {
        self.refresh();
        low_half(self.shape.slots - self.tail.wrapping_sub(self.head_seen))
    }

    /// Position of the next descriptor: as many were ever sent.
    #[inline]
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// The peer has claimed a head outside `[tail - slots, tail]` or behind an earlier one: a protocol violation.
    #[inline]
    pub fn peer_head_invalid(&self) -> bool {
        self.peer_head_invalid
    }

    /// What was sent at `position`, read again from our own slot, unless it was never sent or is overwritten.
    pub fn sent(&self, position: u64) -> Option<Descriptor> {
        let age = self.tail.wrapping_sub(position);
        if age == 0 || age > self.shape.slots {
            return None;
        }
        let slot = &self.slots[self.shape.index(position)];
        slot.read(slot.head_if(self.shape.stamp(position))?).ok()
    }

    /// Looks how far the consumer is; whether there is room now.
    #[cold]
    fn refresh(&mut self) -> bool {
        if self.peer.open() {
            let head = self.peer.line.head();
            // Its head may move between where we saw it and our tail, and nowhere else.
            let in_flight = self.tail.wrapping_sub(head);
            if in_flight <= self.tail.wrapping_sub(self.head_seen) {
                self.head_seen = head;
            } else {
                self.peer_head_invalid = true;
            }
        }
        self.tail.wrapping_sub(self.head_seen) < self.shape.slots
    }
}

/// The reading end. Never blocks, allocates or enters the kernel.
pub struct Consumer {
    slots: Window<[Slot]>,
    shape: Shape,
    head: u64,
    /// The head that the producer can see; at most a quarter of the ring behind.
    head_published: u64,
    our_line: Window<PeerLine>,
    peer: PeerClaims,
}

impl Consumer {
    pub(crate) fn new(
        slots: Window<[Slot]>,
        our_line: Window<PeerLine>,
        their_line: Window<PeerLine>,
        nonce: u64,
    ) -> Self {
        let shape = Shape::of(&slots);
        let peer = PeerClaims { line: their_line, nonce, is_about_us: false };
        Self { slots, shape, head: 0, head_published: 0, our_line, peer }
    }

    /// The next descriptor, if there is one. Copies it: its slot may be overwritten afterwards.
    ///
    /// # Errors
    /// [`BadDescriptor`]: the producer broke the format. The slot is skipped, so that polling on ends.
    #[inline(always)]
    pub fn poll(&mut self) -> Result<Option<Descriptor>, BadDescriptor> {
        if !self.peer.open() {
            return Ok(None);
        }
        let slot = &self.slots[self.shape.index(self.head)];
        let Some(head) = slot.head_if(self.shape.stamp(self.head)) else {
            return Ok(None);
        };
        let descriptor = slot.read(head);
        self.head = self.head.wrapping_add(1);
        if self.head.wrapping_sub(self.head_published) >= self.shape.slots / 4 {
            self.publish();
        }
        descriptor.map(Some)
    }

    /// The word that changes when there is something to [`Consumer::poll`].
    #[inline(always)]
    pub fn watch(&self) -> Watch<'_> {
        Watch::on(&self.slots[self.shape.index(self.head)].words[0])
    }

    /// Whether [`Consumer::poll`] would find something. Looks at the stamp only; may be stale at once.
    #[inline]
    pub fn ready(&self) -> bool {
        let slot = &self.slots[self.shape.index(self.head)];
        slot.head_if(self.shape.stamp(self.head)).is_some()
            && (self.peer.is_about_us || self.peer.line.is_about(self.peer.nonce))
    }

    /// Tells the producer how far we are, now instead of at the next quarter of the ring.
    #[inline]
    pub fn publish(&mut self) {
        if self.head != self.head_published {
            self.our_line.publish_head(self.head);
            self.head_published = self.head;
        }
    }

    /// Position of the next descriptor to read.
    #[inline]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Passes over everything before `position` without reading it.
    ///
    /// # Errors
    /// [`BadPosition`] if that is behind us or more than a ring ahead; nothing has moved.
    pub fn skip_to(&mut self, position: u64) -> Result<(), BadPosition> {
        if position.wrapping_sub(self.head) > self.shape.slots {
            return Err(BadPosition { asked: position, head: self.head, slots: self.shape.slots });
        }
        self.head = position;
        self.publish();
        Ok(())
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("slots", &self.shape.slots)
            .field("tail", &self.tail)
            .field("head_seen", &self.head_seen)
            .field("peer_head_invalid", &self.peer_head_invalid)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("slots", &self.shape.slots)
            .field("head", &self.head)
            .field("head_published", &self.head_published)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;

/// Both ends of a ring on the heap, which is where models and sanitizers can see it.
#[cfg(test)]
pub(crate) mod on_heap {
    use super::*;

    const NONCE: u64 = 77;

    pub(crate) struct Ring {
        pub(crate) slots: Window<[Slot]>,
        /// The consumer's line about the producer, and the other way round.
        pub(crate) consumer_line: Window<PeerLine>,
        pub(crate) producer_line: Window<PeerLine>,
    }

    impl Ring {
        pub(crate) fn new(slots: usize) -> Self {
            let ring = Self {
                slots: Window::slice_on_heap((0..slots).map(|_| Slot::blank()).collect()),
                consumer_line: Window::on_heap(PeerLine::blank()),
                producer_line: Window::on_heap(PeerLine::blank()),
            };
            ring.consumer_line.link(NONCE);
            ring.producer_line.link(NONCE);
            ring
        }

        #[cfg(loom)]
        pub(crate) fn relink(&self) {
            self.producer_line.link(NONCE);
        }

        pub(crate) fn producer(&self) -> Producer {
            Producer::new(self.slots.clone(), self.consumer_line.clone(), NONCE)
        }

        pub(crate) fn consumer(&self) -> Consumer {
            let (ours, theirs) = (self.consumer_line.clone(), self.producer_line.clone());
            Consumer::new(self.slots.clone(), ours, theirs, NONCE)
        }

        /// Both ends as they stand after `position` descriptors were sent and read.
        pub(crate) fn after(&self, position: u64) -> (Producer, Consumer) {
            let (mut producer, mut consumer) = (self.producer(), self.consumer());
            let shape = producer.shape;
            for age in 1..=shape.slots {
                let before = position.wrapping_sub(age);
                let word = u64::from(shape.stamp(before));
                self.slots[shape.index(before)].words[0].store(word, Ordering::Relaxed);
            }
            (producer.tail, producer.head_seen) = (position, position);
            (consumer.head, consumer.head_published) = (position, position);
            self.consumer_line.publish_head(position);
            (producer, consumer)
        }

        /// What a hostile producer can do: any word of any slot.
        pub(crate) fn scribble(&self, slot: usize, word: usize, value: u64) {
            self.slots[slot].words[word].store(value, Ordering::Relaxed);
        }
    }
}
