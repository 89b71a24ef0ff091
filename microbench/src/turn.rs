//! A turn passed between two processes through shared memory: a futex word, or an eventfd.
//!
//! Question  What does it cost to tell another process "your turn", and be told back?
//! Measures  round trip of an 8-byte sequence number (eventfd: the counter itself), not halved.
//! Load      closed loop, one turn in flight.
//! Excludes  creation, mapping, first touch.
//! Checks    the peer returns the sequence number; every one is compared.
//! Baseline  of the doorbells: what one sleep and one wake cost in each wait mode.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::thread::futex;

use crate::end::{End, until_ready};
use crate::placement::{SPIN_BUDGET, Wait};
use crate::raw::SharedPages;

/// Bytes of shared memory that the turn words occupy; a payload may follow.
pub(crate) const TURN_BYTES: usize = 4096;

/// Byte offsets of one side's words, 256 bytes apart from the other's.
#[derive(Copy, Clone, Debug)]
struct Side {
    /// Futex word: how many turns this side has passed, modulo 2^32.
    passed: usize,
    /// 1 while this side sleeps, or is about to.
    asleep: usize,
    /// The eight bytes that travel with a turn.
    note: usize,
}

const ASKER: Side = Side { passed: 0, note: 8, asleep: 256 };
const ANSWERER: Side = Side { passed: 512, note: 520, asleep: 768 };

/// Passing and awaiting the turn with a futex.
#[derive(Debug)]
pub(crate) struct FutexTurn {
    pub(crate) pages: SharedPages,
    wait: Wait,
    /// The peer is on our core: it gets it while we wait.
    yields: bool,
    mine: Side,
    theirs: Side,
    passed: u32,
    seen: u32,
}

impl FutexTurn {
    pub(crate) fn new(pages: SharedPages, wait: Wait, is_asker: bool) -> Self {
        let (mine, theirs) = if is_asker { (ASKER, ANSWERER) } else { (ANSWERER, ASKER) };
        Self { pages, wait, yields: false, mine, theirs, passed: 0, seen: 0 }
    }

    /// Between two that share a core, and so never spin in each other's way.
    pub(crate) fn sharing_a_core(pages: SharedPages, wait: Wait, is_asker: bool) -> Self {
        let wait = if wait == Wait::Latency { Wait::Balanced } else { wait };
        Self { yields: true, ..Self::new(pages, wait, is_asker) }
    }

    fn note(&self, side: Side) -> &AtomicU64 {
        self.pages.word(side.note)
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.pages.half(offset)
    }

    /// Gives the turn to the peer, and wakes it if it sleeps.
    #[inline]
    pub(crate) fn pass(&mut self) -> io::Result<()> {
        self.passed = self.passed.wrapping_add(1);
        // passed (release): pairs with the acquire in the peer's `await_turn`; note and payload become visible.
        self.word(self.mine.passed).store(self.passed, Ordering::Release);
        if self.wait != Wait::Latency {
            // SeqCst: our store must not be reordered after the load of `asleep`, or both sides miss each other.
            fence(Ordering::SeqCst);
            if self.word(self.theirs.asleep).load(Ordering::Relaxed) == 1 {
                futex::wake(self.word(self.mine.passed), futex::Flags::empty(), 1)?;
            }
        }
        Ok(())
    }

    /// Waits until the peer has passed the turn.
    #[inline]
    pub(crate) fn await_turn(&mut self) -> io::Result<()> {
        let mut spin_ends: Option<Instant> = None;
        loop {
            let passed = self.word(self.theirs.passed).load(Ordering::Acquire);
            if passed != self.seen {
                self.seen = passed;
                return Ok(());
            }
            match self.wait {
                Wait::Latency => std::hint::spin_loop(),
                Wait::Balanced => {
                    let now = Instant::now();
                    if now >= *spin_ends.get_or_insert(now + SPIN_BUDGET) {
                        self.sleep()?;
                        spin_ends = None;
                    } else if self.yields {
                        rustix::thread::sched_yield();
                    }
                }
                Wait::Efficient => self.sleep()?,
            }
        }
    }

    fn sleep(&self) -> io::Result<()> {
        let asleep = self.word(self.mine.asleep);
        asleep.store(1, Ordering::Relaxed);
        // SeqCst: partner of the fence in `pass`. The kernel re-checks the futex word itself.
        fence(Ordering::SeqCst);
        let slept = futex::wait(self.word(self.theirs.passed), futex::Flags::empty(), self.seen, None);
        asleep.store(0, Ordering::Relaxed);
        match slept {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl End for FutexTurn {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let Some(bytes) = message.first_chunk::<8>() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.note(self.mine).store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        self.pass()
    }

    fn receive(&mut self, message: &mut [u8]) -> io::Result<()> {
        self.await_turn()?;
        let Some(bytes) = message.first_chunk_mut::<8>() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        *bytes = self.note(self.theirs).load(Ordering::Relaxed).to_le_bytes();
        Ok(())
    }
}

/// Two eventfds, one each way; the counter is the message.
#[derive(Debug)]
pub(crate) struct EventEnd {
    pub(crate) out: OwnedFd,
    pub(crate) inward: OwnedFd,
    pub(crate) wait: Wait,
}

impl End for EventEnd {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let Some(bytes) = message.first_chunk::<8>() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // eventfd counts in native order and refuses zero as a message; sequence numbers start at one.
        let counter = u64::from_le_bytes(*bytes).to_ne_bytes();
        rustix::io::write(&self.out, &counter)?;
        Ok(())
    }

    fn receive(&mut self, message: &mut [u8]) -> io::Result<()> {
        let mut counter = [0; 8];
        until_ready(self.wait, self.inward.as_fd(), PollFlags::IN, || {
            Ok(rustix::io::read(&self.inward, &mut counter)?)
        })?;
        let Some(bytes) = message.first_chunk_mut::<8>() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        *bytes = u64::from_ne_bytes(counter).to_le_bytes();
        Ok(())
    }
}
