//! A lane: messages from one worker straight to one of another process, until a third party ends it.
//!
//! The sender writes slots, the receiver says how far it took them, and the *arbiter*, who answers for the receiver's mailbox, may at any moment
//! declare the lane closed: without waiting for the other two, who may be lost in a computation, stopped or dead. Each message that was
//! sent belongs then to exactly one of receiver and arbiter, and all three agree to whom. Each writes its own file only:
//!
//! | offset | bytes    | field      | written by | says                                                                |
//! |-------:|---------:|------------|------------|---------------------------------------------------------------------|
//! |      0 |       16 | magic, version | maker  | that this is a lane's file, complete                                |
//! |    256 |        8 | `verdict`  | arbiter    | open, closing, or closed: from which message on, and how many, are the arbiter's |
//! |    384 |        8 | `taken`    | receiver   | how many messages it has taken                                      |
//! |    512 |  64 x 8  | `releases` | receiver   | positions of messages that it reads no more, in the order of their release |
//! |   4096 | 64 x 128 | slots      | sender     | one descriptor or two                                               |
//!
//! | edge      | release side                          | acquire side                   | carries                                       |
//! |-----------|---------------------------------------|--------------------------------|-----------------------------------------------|
//! | sent      | `try_send`, word 0 of the slot         | `poll`, `close`                | the descriptors, and the blocks they name     |
//! | released  | `release`, a word of `releases`       | `released`                     | the receiver's loads of the slot and of the block are finished |
//! | closed    | `close`, `verdict`                    | `try_send`, `poll`, `closed`   | the arbiter's loads of what it took           |
//!
//! The sender stores its slot, the receiver its claim, and the arbiter its *closing*; each then passes a full fence and looks at what the other two
//! stored (Dekker's way). So of a message and a closing at the same time at least one is seen by the other's author: the arbiter sees the message,
//! or the sender sees the closing and learns from the verdict whether it was counted. The same of a claim and a closing.
//!
//! The sender counts releases, which come in any order, but only of messages that were received, and those are the first ones. So when it uses a slot again,
//! with no more than 64 messages unreleased, the message that was in it was received for good: no claim of it is still to be judged.

#[cfg(not(loom))]
mod file;
#[cfg(all(test, not(loom)))]
mod tests;

use std::fmt;

use crate::descriptor::{BadDescriptor, Descriptor};
use crate::mapping::{SharedLayout, Window};
use crate::ring::Slot;
use crate::sync::{AtomicU64, Ordering, fence};
use crate::watch::Watch;
use crate::width::{host, low_half};

#[cfg(not(loom))]
pub use file::{LaneError, LaneFile, OwnLane, PeerLane};

/// Slots of a lane. Models go round after two.
#[cfg(not(loom))]
const SLOTS: u64 = 64;
#[cfg(loom)]
const SLOTS: u64 = 2;

/// Messages that may be unreleased at a time.
pub const LANE_MESSAGES_MAX: u64 = SLOTS;

/// Words of a line that others do not share.
#[cfg(not(loom))]
const LINE_WORDS: usize = 16;
#[cfg(loom)]
const LINE_WORDS: usize = 1;

/// Looks at a verdict that is being made, before whoever waits for it is told so: the arbiter was stopped in the middle of it.
#[cfg(not(loom))]
const LOOKS_MAX: u32 = 4096;
#[cfg(loom)]
const LOOKS_MAX: u32 = 1;

/// What a participant says about lanes, each part as whichever of the three it is.
#[repr(C, align(128))]
pub(crate) struct Words {
    verdict: [AtomicU64; LINE_WORDS],
    taken: [AtomicU64; LINE_WORDS],
    releases: [AtomicU64; SLOTS as usize],
}

/// One message: the second line is written before the first, and only if there is a second descriptor.
#[repr(C, align(128))]
pub(crate) struct LaneSlot([Slot; 2]);

#[cfg(not(loom))]
const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Words>() == 768 && offset_of!(Words, taken) == 128 && offset_of!(Words, releases) == 256);
    assert!(size_of::<LaneSlot>() == 128 && align_of::<LaneSlot>() == 128);
};

// SAFETY: `repr(C)` of 96 `AtomicU64`: any bits are a value, all of it is atomics, no padding (asserted above).
unsafe impl SharedLayout for Words {}
// SAFETY: two `Slot`s, of which the same holds, and no padding (asserted above).
unsafe impl SharedLayout for LaneSlot {}

/// What the arbiter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Open,
    Closing,
    Closed(Closed),
}

/// Whose the messages of a closed lane are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    /// Messages before this one are the receiver's.
    pub from: u64,
    /// Messages from there on and before this one are the arbiter's. There are no others.
    pub to: u64,
}

impl Verdict {
    const CLOSING: u64 = 1;
    const CLOSED: u64 = 2;

    fn word(closed: Closed) -> u64 {
        closed.from << 10 | (closed.to - closed.from) << 2 | Self::CLOSED
    }

    #[inline(always)]
    fn of(words: &Words) -> Verdict {
        // closed (acquire).
        match words.verdict[0].load(Ordering::Acquire) {
            0 => Verdict::Open,
            Self::CLOSING => Verdict::Closing,
            word => Verdict::Closed(Closed { from: word >> 10, to: (word >> 10) + (word >> 2 & 0xFF) }),
        }
    }

    /// Not `Closing`, if that ends soon.
    fn made(words: &Words) -> Verdict {
        for _ in 0..LOOKS_MAX {
            match Verdict::of(words) {
                Verdict::Closing => std::hint::spin_loop(),
                made => return made,
            }
        }
        Verdict::Closing
    }
}

#[inline]
fn index(position: u64) -> usize {
    host(position & (SLOTS - 1))
}

#[inline]
fn stamp(position: u64) -> u32 {
    low_half(position / SLOTS).wrapping_add(1)
}

impl LaneSlot {
    #[inline(always)]
    fn write(&self, position: u64, first: &Descriptor, second: Option<&Descriptor>) {
        if let Some(second) = second {
            self.0[1].write(stamp(position), second);
        }
        self.0[0].write(stamp(position), first);
    }

    /// The message of this position, if it is there. A second line of an earlier lap is not of it.
    #[inline(always)]
    fn read(&self, position: u64) -> Option<Result<[Option<Descriptor>; 2], BadDescriptor>> {
        let first = self.0[0].head_if(stamp(position))?;
        let second = self.0[1].head_if(stamp(position));
        let read = || Ok([Some(self.0[0].read(first)?), second.map(|second| self.0[1].read(second)).transpose()?]);
        Some(read())
    }

    #[cfg(test)]
    pub(crate) fn blank() -> Self {
        LaneSlot([Slot::blank(), Slot::blank()])
    }
}

/// Why a message was not sent over a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsent {
    /// [`LANE_MESSAGES_MAX`] are unreleased.
    #[error("{LANE_MESSAGES_MAX} messages are unreleased")]
    Full,
    /// The lane is closed, and this message is nobody's.
    #[error("the lane is closed")]
    Closed,
    /// The lane is being closed by somebody who was stopped in the middle of it: [`LaneSender::closed`] will say whether the message at this position
    /// is the arbiter's.
    #[error("the lane is being closed, and it is not known yet whether message {0} counts")]
    Unsure(u64),
}

/// The end that sends. Never blocks, allocates or enters the kernel.
pub struct LaneSender {
    slots: Window<[LaneSlot]>,
    receiver: Window<Words>,
    arbiter: Window<Words>,
    tail: u64,
    released: u64,
}

impl LaneSender {
    pub(crate) fn on(slots: Window<[LaneSlot]>, receiver: Window<Words>, arbiter: Window<Words>) -> Self {
        Self { slots, receiver, arbiter, tail: 0, released: 0 }
    }

    /// Sends a message and says its position: as many were sent before. From then on it is the receiver's or the arbiter's. Nobody is woken.
    ///
    /// # Errors
    /// [`Unsent`].
    #[inline]
    pub fn try_send(&mut self, first: &Descriptor, second: Option<&Descriptor>) -> Result<u64, Unsent> {
        if Verdict::of(&self.arbiter) != Verdict::Open {
            return Err(Unsent::Closed);
        }
        if self.unreleased() >= LANE_MESSAGES_MAX {
            return Err(Unsent::Full);
        }
        let position = self.tail;
        self.slots[index(position)].write(position, first, second);
        self.tail += 1;
        // Our store before our load: see the module.
        fence(Ordering::SeqCst);
        match Verdict::made(&self.arbiter) {
            Verdict::Open => Ok(position),
            Verdict::Closed(Closed { to, .. }) if position < to => Ok(position),
            Verdict::Closed(_) => Err(Unsent::Closed),
            Verdict::Closing => Err(Unsent::Unsure(position)),
        }
    }

    /// Messages that were sent and not [released](LaneSender::released).
    pub fn unreleased(&self) -> u64 {
        self.tail - self.released
    }

    /// Whose the messages are, when the lane is closed.
    pub fn closed(&self) -> Option<Closed> {
        match Verdict::of(&self.arbiter) {
            Verdict::Closed(closed) => Some(closed),
            Verdict::Open | Verdict::Closing => None,
        }
    }

    /// The position of a message that the receiver reads no more, each once; of a receiver that lies, any. Makes room. Looks at a line of the receiver's: not for
    /// every message.
    pub fn released(&mut self) -> Option<u64> {
        let number = self.released;
        // released (acquire).
        let word = self.receiver.releases[index(number)].load(Ordering::Acquire);
        if low_half(word >> 32) != stamp(number) || number >= self.tail {
            return None;
        }
        self.released += 1;
        // It is one of the last 2^32.
        Some(self.tail.wrapping_sub(u64::from(low_half(self.tail).wrapping_sub(low_half(word)))))
    }
}

/// What a look at a lane found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polled {
    /// Nothing now.
    Empty,
    /// A message, which is the receiver's for good.
    Message {
        /// As many came before it.
        position: u64,
        /// What was sent.
        first: Descriptor,
        /// If there was a second.
        second: Option<Descriptor>,
    },
    /// The lane is closed: what comes, comes from the arbiter.
    Closed,
}

/// The end that receives. Never blocks, allocates or enters the kernel.
pub struct LaneReceiver {
    slots: Window<[LaneSlot]>,
    own: Window<Words>,
    arbiter: Window<Words>,
    head: u64,
    /// `head` is claimed, and it is not known yet whether it is ours.
    claimed: bool,
    released: u64,
}

impl LaneReceiver {
    pub(crate) fn on(slots: Window<[LaneSlot]>, own: Window<Words>, arbiter: Window<Words>) -> Self {
        Self { slots, own, arbiter, head: 0, claimed: false, released: 0 }
    }

    /// The message at the head, which stays there; `None`: none, or the lane is closed. What is seen is not received before it was [polled](LaneReceiver::poll).
    ///
    /// # Errors
    /// As `poll`.
    #[inline]
    pub fn peek(&self) -> Result<Option<(Descriptor, Option<Descriptor>)>, BadDescriptor> {
        let Some(message) = self.slots[index(self.head)].read(self.head) else { return Ok(None) };
        let [first, second] = message?;
        Ok(first.filter(|_| Verdict::of(&self.arbiter) == Verdict::Open).map(|first| (first, second)))
    }

    /// Receives the message at the head.
    ///
    /// # Errors
    /// [`BadDescriptor`]: the sender broke the format. The message stays where it is: have the lane closed.
    #[inline]
    pub fn poll(&mut self) -> Result<Polled, BadDescriptor> {
        let Some(message) = self.slots[index(self.head)].read(self.head) else {
            let is_open = Verdict::of(&self.arbiter) == Verdict::Open;
            return Ok(if is_open { Polled::Empty } else { Polled::Closed });
        };
        // Copied before it is claimed, since its slot may be overwritten some time after that.
        let [first, second] = message?;
        let first = first.expect("a message has a first descriptor");
        if !self.claimed {
            self.own.taken[0].store(self.head + 1, Ordering::Relaxed);
            // Our store before our load: see the module.
            fence(Ordering::SeqCst);
            self.claimed = true;
        }
        match Verdict::made(&self.arbiter) {
            Verdict::Closed(Closed { from, .. }) if self.head >= from => return Ok(Polled::Closed),
            // Of one that is stopped in the middle: it is asked again.
            Verdict::Closing => return Ok(Polled::Empty),
            Verdict::Open | Verdict::Closed(_) => {}
        }
        let position = self.head;
        (self.head, self.claimed) = (position + 1, false);
        Ok(Polled::Message { position, first, second })
    }

    /// The block of a message that was received is read no more. Once for each.
    pub fn release(&mut self, position: u64) {
        let word = u64::from(stamp(self.released)) << 32 | u64::from(low_half(position));
        // released (release).
        self.own.releases[index(self.released)].store(word, Ordering::Release);
        self.released += 1;
    }

    /// The word that changes when there is something to [`LaneReceiver::poll`]; that the lane is closed shows elsewhere.
    #[inline(always)]
    pub fn watch(&self) -> Watch<'_> {
        Watch::on(self.slots[index(self.head)].0[0].stamp_word())
    }
}

/// A message that is the arbiter's.
pub type Inherited = Result<(Descriptor, Option<Descriptor>), BadDescriptor>;

/// The third party, who ends a lane. Never blocks or enters the kernel.
pub struct LaneArbiter {
    slots: Window<[LaneSlot]>,
    receiver: Window<Words>,
    own: Window<Words>,
}

impl LaneArbiter {
    pub(crate) fn on(slots: Window<[LaneSlot]>, receiver: Window<Words>, own: Window<Words>) -> Self {
        Self { slots, receiver, own }
    }

    /// Closes the lane. Gives the messages that were sent and not taken, the oldest first, with the position of the first of them: they are the caller's
    /// now, and nobody else will have them. `done` is called with them before the sender may learn that, and so before it uses their blocks again.
    /// A message of a broken format counts as one that was taken.
    pub fn close(self, done: impl FnOnce(u64, &mut Vec<Inherited>)) {
        self.own.verdict[0].store(Verdict::CLOSING, Ordering::Relaxed);
        // Our store before our loads: see the module.
        fence(Ordering::SeqCst);
        // Of a receiver that lies: where it says that it is there is nothing, or what it could have taken.
        let from = self.receiver.taken[0].load(Ordering::Relaxed) & (u64::MAX >> 10);
        let messages =
            (from..from + LANE_MESSAGES_MAX).map_while(|position| self.slots[index(position)].read(position));
        let mut messages: Vec<Inherited> = messages
            .map(|message| message.map(|[first, second]| (first.expect("a message has a first descriptor"), second)))
            .collect();
        let to = from + messages.len() as u64;
        done(from, &mut messages);
        // closed (release).
        self.own.verdict[0].store(Verdict::word(Closed { from, to }), Ordering::Release);
    }
}

macro_rules! debug {
    ($($end:ident: $($field:ident),+);+) => { $(
        impl fmt::Debug for $end {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($end))$(.field(stringify!($field), &self.$field))+.finish_non_exhaustive()
            }
        }
    )+ };
}
debug!(LaneSender: tail, released; LaneReceiver: head, claimed, released);

impl fmt::Debug for LaneArbiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaneArbiter").finish_non_exhaustive()
    }
}

/// All three on the heap, which is where models and sanitizers can see them.
#[cfg(test)]
pub(crate) mod on_heap {
    use super::*;

    pub(crate) struct Lane {
        slots: Window<[LaneSlot]>,
        receiver: Window<Words>,
        arbiter: Window<Words>,
    }

    impl Lane {
        pub(crate) fn new() -> Self {
            let words = || Words {
                verdict: std::array::from_fn(|_| AtomicU64::new(0)),
                taken: std::array::from_fn(|_| AtomicU64::new(0)),
                releases: std::array::from_fn(|_| AtomicU64::new(0)),
            };
            Self {
                slots: Window::slice_on_heap((0..SLOTS).map(|_| LaneSlot::blank()).collect()),
                receiver: Window::on_heap(words()),
                arbiter: Window::on_heap(words()),
            }
        }

        pub(crate) fn ends(&self) -> (LaneSender, LaneReceiver, LaneArbiter) {
            let Self { slots, receiver, arbiter } = self;
            (
                LaneSender::on(slots.clone(), receiver.clone(), arbiter.clone()),
                LaneReceiver::on(slots.clone(), receiver.clone(), arbiter.clone()),
                LaneArbiter::on(slots.clone(), receiver.clone(), arbiter.clone()),
            )
        }

        /// What a hostile receiver can do.
        #[cfg(not(loom))]
        pub(crate) fn claim(&self, taken: u64, release: (u64, u64)) {
            self.receiver.taken[0].store(taken, Ordering::Release);
            self.receiver.releases[index(release.0)].store(release.1, Ordering::Release);
        }

        /// What an arbiter says that is stopped in the middle of closing.
        pub(crate) fn stop_closing(&self) {
            self.arbiter.verdict[0].store(Verdict::CLOSING, Ordering::Release);
        }
    }
}
