//! The doorbell: how a participant sleeps, and how its peers wake it.
//!
//! One word in the sleeper's segment and one eventfd. The word is an *epoch*: odd while the owner sleeps or is about
//! to, even while it is awake, and never the same twice. A peer that has rung in an epoch need not ring again in it, so
//! a burst of messages to a sleeper costs one system call and not one each (R7), although no peer can write the word.
//!
//! | edge   | one side                                             | other side                                          |
//! |--------|------------------------------------------------------|-----------------------------------------------------|
//! | asleep | `arm`: store the epoch, SeqCst fence, re-poll rings   | `ring`: publish the message, SeqCst fence, load epoch |
//!
//! Acquire and release do not do here: each side stores one word and then loads the other's, and both loads may run
//! before both stores, so that the sleeper misses the message and the sender misses the sleeper. A SeqCst fence on each
//! side forbids exactly that. `SeqCst` accesses instead would need the message store itself to be one.
//!
//! A fence also waits until the message has left the store buffer, a whole cache-line transfer, so a stream of messages pays
//! it for each. A sleeper that sleeps seldom takes it over: `arm_for_unfenced` raises the barrier on every core that runs
//! a participant (`membarrier(2)`), and then `ring_unfenced` on the other side is two ordinary instructions.

use std::cell::{Cell, OnceCell};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll};
use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

use crate::mapping::{SharedLayout, Window};
use crate::sync::{AtomicU64, Ordering, fence, light_fence};

/// Where a participant says whether it sleeps. Written by its owner only, read by every peer.
#[repr(C, align(128))]
pub(crate) struct SleepLine {
    epoch: AtomicU64,
    _reserved: [AtomicU64; 15],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<SleepLine>() == 128 && align_of::<SleepLine>() == 128);

// SAFETY: `repr(C)` of 16 `AtomicU64`: any bits are a value, all of it is atomics, no padding (asserted above).
unsafe impl SharedLayout for SleepLine {}

#[cfg(all(test, loom))]
impl SleepLine {
    pub(crate) fn blank() -> Self {
        Self { epoch: AtomicU64::new(0), _reserved: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

/// The sleeper's half of the handshake, without the eventfd: what the model checks.
pub(crate) struct Sleeper {
    line: Window<SleepLine>,
    epoch: Cell<u64>,
}

impl Sleeper {
    pub(crate) fn new(line: Window<SleepLine>) -> Self {
        Self { line, epoch: Cell::new(0) }
    }

    pub(crate) fn arm(&self) {
        // The next odd number: awake at `2n`, asleep at `2n + 1`.
        let epoch = (self.epoch.get() + 1) | 1;
        self.epoch.set(epoch);
        self.line.epoch.store(epoch, Ordering::Relaxed);
        // asleep (SeqCst fence): see the module. The caller polls everything once more after this.
        fence(Ordering::SeqCst);
    }

    pub(crate) fn disarm(&self) {
        let epoch = self.epoch.get();
        if epoch % 2 == 1 {
            self.epoch.set(epoch + 1);
            // No edge: a peer that still sees the old epoch rings once too often or relies on an earlier ring,
            // and the next `arm` has the fence.
            self.line.epoch.store(epoch + 1, Ordering::Relaxed);
        }
    }
}

/// The ringer's half, without the eventfd.
pub(crate) struct Ringer {
    line: Window<SleepLine>,
    /// The epoch in which we rang last.
    rung: Cell<u64>,
}

impl Ringer {
    pub(crate) fn new(line: Window<SleepLine>) -> Self {
        Self { line, rung: Cell::new(0) }
    }

    /// Whether the peer sleeps and has not been rung by us since it lay down.
    #[inline]
    pub(crate) fn must_ring(&self) -> bool {
        // asleep (SeqCst fence): see the module. What we published stands before this.
        fence(Ordering::SeqCst);
        self.sees_sleeper()
    }

    /// The same towards a sleeper that raises the barrier for both.
    #[inline(always)]
    pub(crate) fn must_ring_unfenced(&self) -> bool {
        // asleep (light fence): see the module.
        light_fence();
        self.sees_sleeper()
    }

    /// A hint: what is read may be over by the time it is used.
    #[inline]
    pub(crate) fn peer_sleeps(&self) -> bool {
        self.line.epoch.load(Ordering::Relaxed) % 2 == 1
    }

    #[inline(always)]
    fn sees_sleeper(&self) -> bool {
        let epoch = self.line.epoch.load(Ordering::Relaxed);
        if epoch.is_multiple_of(2) || epoch == self.rung.get() {
            return false;
        }
        self.rung.set(epoch);
        true
    }
}

/// My own doorbell: I sleep here. One per participant.
///
/// To sleep without losing a message: [`arm`](Self::arm), poll everything once more, then [`sleep`](Self::sleep) (or
/// wait for [`fd`](Self::fd) to become readable in a loop of your own and [`drain`](Self::drain) it), or
/// [`disarm`](Self::disarm) if the poll found something.
pub struct Doorbell {
    sleeper: Sleeper,
    eventfd: OwnedFd,
    /// Tells the rings apart that came since the last sleep: an epoll set of the eventfd alone, edge-triggered. Made by
    /// the first sleep; who waits in a loop of their own needs none.
    edges: OnceCell<OwnedFd>,
}

impl Doorbell {
    pub(crate) fn new(line: Window<SleepLine>, eventfd: OwnedFd) -> Self {
        Self { sleeper: Sleeper::new(line), eventfd, edges: OnceCell::new() }
    }

    /// Says "I am about to sleep". Poll everything once more after it.
    pub fn arm(&self) {
        self.sleeper.arm();
    }

    /// As [`arm`](Self::arm), towards peers that [`ring_unfenced`](Bell::ring_unfenced) too. One more system call, and an
    /// interrupt of every core that runs a participant: for those who sleep seldom.
    ///
    /// # Errors
    /// What `membarrier` says; then peers may be missed, and sleeping is not safe.
    pub fn arm_for_unfenced(&self) -> io::Result<()> {
        self.sleeper.arm();
        Ok(membarrier(MembarrierCommand::GlobalExpedited)?)
    }

    /// Says "I am awake": peers stop making system calls for us.
    pub fn disarm(&self) {
        self.sleeper.disarm();
    }

    /// The eventfd, readable when somebody rang. For a poll set of one's own.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    /// Takes the rings off the eventfd, and disarms: peers rely on a sleeper that was rung to be awake.
    pub fn drain(&self) {
        self.disarm();
        let mut count = [0; 8];
        // Would-block is the usual answer when nobody rang.
        let _ = rustix::io::read(&self.eventfd, &mut count);
    }

    /// Sleeps until somebody rings or `timeout` is over (`None`: for ever; else rounded up to milliseconds), then disarms.
    ///
    /// One system call. The eventfd is not read: each ring is an edge of its own, however many were counted before
    /// ([`Bell`] sees to it that the counter never fills). Against `ppoll` and a read to drain, a ping-pong of two processes on
    /// one core takes 3.6 us instead of 4.1.
    ///
    /// # Errors
    /// What `epoll_wait` says, and what making the epoll set does; an interrupting signal is a wake-up, not an error.
    pub fn sleep(&self, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = timeout.map(|duration| Timespec {
            tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: duration.subsec_nanos().into(),
        });
        let edges = match self.edges.get() {
            Some(edges) => edges,
            None => {
                let edges = watch(&self.eventfd)?;
                self.edges.get_or_init(|| edges)
            }
        };
        let slept = epoll::wait(edges, &mut [NO_EVENT; 1][..], timeout.as_ref());
        self.disarm();
        match slept {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

const NO_EVENT: epoll::Event = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };

/// An epoll set that tells the edges of one eventfd. What was rung before is its first.
fn watch(eventfd: &OwnedFd) -> io::Result<OwnedFd> {
    let edges = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&edges, eventfd, epoll::EventData::new_u64(0), flags)?;
    Ok(edges)
}

/// A peer's doorbell: I ring here.
pub struct Bell {
    ringer: Ringer,
    eventfd: OwnedFd,
}

impl Bell {
    pub(crate) fn new(line: Window<SleepLine>, eventfd: OwnedFd) -> Self {
        Self { ringer: Ringer::new(line), eventfd }
    }

    /// Wakes the peer if it sleeps; call after publishing. Whether a system call was made.
    #[inline]
    pub fn ring(&self) -> bool {
        self.ringer.must_ring() && self.write()
    }

    /// As [`ring`](Self::ring), but for who wakes the peer by other means: whether it has to be woken.
    #[must_use]
    pub fn must_ring(&self) -> bool {
        self.ringer.must_ring()
    }

    /// As [`ring`](Self::ring), without a fence: only towards a peer that sleeps with
    /// [`arm_for_unfenced`](Doorbell::arm_for_unfenced), from a process that has [`join_barriers`].
    #[inline(always)]
    pub fn ring_unfenced(&self) -> bool {
        self.ringer.must_ring_unfenced() && self.write()
    }

    /// Whether the peer says that it sleeps, rung or not: it says so until it has run. A hint, and no system call.
    #[inline]
    #[must_use]
    pub fn peer_sleeps(&self) -> bool {
        self.ringer.peer_sleeps()
    }

    #[cold]
    fn write(&self) -> bool {
        let ring = || rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes());
        // Would-block means that the counter is full, which honest ringing does not reach: somebody filled it, and the
        // sleeper takes nothing off. Emptied, it takes our ring. Any other failure means that the peer has no eventfd
        // any more: it is dead, and its pidfd says so.
        if ring() == Err(rustix::io::Errno::AGAIN) {
            let _ = rustix::io::read(&self.eventfd, &mut [0; 8]);
            let _ = ring();
        }
        true
    }
}

/// Whether this machine lets one process raise memory barriers in others.
#[must_use]
pub fn has_barriers() -> bool {
    membarrier_query().contains(MembarrierQuery::GLOBAL_EXPEDITED | MembarrierQuery::REGISTER_GLOBAL_EXPEDITED)
}

/// Lets other processes raise memory barriers here, so that this one may [`Bell::ring_unfenced`]. Once per process.
///
/// # Errors
/// What `membarrier` says: a kernel or a filter without it. Then every ring needs its fence.
pub fn join_barriers() -> io::Result<()> {
    Ok(membarrier(MembarrierCommand::RegisterGlobalExpedited)?)
}

/// A new eventfd for a doorbell: non-blocking, closed on exec.
///
/// # Errors
/// What `eventfd` says: out of descriptors or memory.
pub fn eventfd() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbell").field("epoch", &self.sleeper.epoch.get()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Bell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bell").field("rung", &self.ringer.rung.get()).finish_non_exhaustive()
    }
}
