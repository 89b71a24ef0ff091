//! Reads and writes that the kernel does by itself: the io_uring reactor.
//!
//! One ring of one thread (SINGLE_ISSUER, DEFER_TASKRUN: completions come only when we ask, so nobody interrupts). Requests are
//! written to memory and go to the kernel with the next wait, all in one system call, which also brings what is done.
//!
//! | what                              | how                                                              | copied          |
//! |-----------------------------------|------------------------------------------------------------------|-----------------|
//! | short frames, an idle connection  | one multishot receive into buffers that the kernel picks          | payload, once   |
//! | the head of a long frame          | one receive of just its bytes, likewise                           | nothing         |
//! | a long payload, a piece           | one receive straight into its body (an arena block), waiting for all of it | nothing |
//! | a hot connection                  | nothing: its owner, who is awake, reads it by system calls        | as with epoll (`inbound`) |
//! | frames out                        | one sendmsg of all that waits, from where it lies                 | nothing         |
//! | a long payload, off the loopback  | one zero-copy sendmsg, where that saves something (`zero_copy`)   | what is short   |
//! | a listener                        | one multishot accept                                              |                 |
//! | any other descriptor              | one multishot poll                                                |                 |
//!
//! Memory that the kernel may touch belongs to [`Halves`], which are boxed, untouched while a request is under way, and outlive it: a
//! connection that is closed earlier leaves them in its slot until the last completion has come.
//!
//! The requests of a socket name it by its slot in the ring's own file table ("direct descriptor"), where that table has room.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, IoSlice};
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use slab::Slab;

use super::buffers::{Buffers, Filled, GROUP};
use super::zero_copy::{GATHERED_BYTES_MAX, Plan, Shares, ZeroCopy, ZeroCopyStats};
use super::{Event, Interest, NoUring};
use crate::Flush;
use crate::frame::{Header, Limits};
use crate::inbound::{Inbound, Wants};
use crate::outbound::{FRAMES_PER_WRITE_MAX, Outbound, SHARED_BYTES_MIN};
use crate::tcp::{
    self, AtOnce, Bodies, Connection, ConnectionError, Frame, Scratch, SendError, Stats, TcpConfig, Terms,
};

/// Bytes that stay where they are.
///
/// # Safety
/// As long as a value is neither moved, nor borrowed mutably, nor dropped, `as_ref` and `as_mut` show the same memory, and
/// nobody but the value's owner frees it or (for `as_mut`) touches it. Where `as_ref` shows 4096 bytes or more, it shows the same
/// memory also after the value was moved.
pub unsafe trait Owned: AsRef<[u8]> {}

// SAFETY: a vector owns its heap memory, and only methods on a mutable borrow move it.
unsafe impl Owned for Vec<u8> {}

/// Requests written before a system call is needed to make room.
const SUBMISSIONS: u32 = 512;
/// Completions that the kernel keeps in the ring; more wait in the kernel and cost it memory, not us answers.
const COMPLETIONS: u32 = 4096;
/// Files in the ring's table. A connection beyond is named by its descriptor.
const FILES_MAX: u32 = 16 << 10;
/// Shortest rest of a payload that is worth a receive of its own, bytes.
const DIRECT_BYTES_MIN: usize = 4096;
/// Longest part of a payload that one receive waits for, bytes: until it is there, nobody sees that anything comes.
const IN_PLACE_BYTES_MAX: usize = 128 << 10;
/// From here on a body stays where it is when its value moves ([`Owned`]).
const _: () = assert!(SHARED_BYTES_MIN >= 4096);
/// How long a peer may keep the memory of a closed connection (what it does not acknowledge is sent again from there). Whoever wants
/// to be heard to the end closes when nothing waits.
const LAST_WORDS: Duration = Duration::from_secs(5);
static LAST_WORDS_TIMESPEC: types::Timespec = types::Timespec::new().sec(LAST_WORDS.as_secs());
/// `IORING_SEND_ZC_REPORT_USAGE` and `IORING_NOTIF_USAGE_ZC_COPIED` of io_uring.h (6.2).
const REPORT_USAGE: u16 = 1 << 3;
const USAGE_COPIED: u32 = 1 << 31;
/// Longest backlog that is written by a system call of its own, bytes.
const DIRECT_SEND_BYTES_MAX: u64 = 16 << 10;
/// The same of a connection whose owner is awake for it.
const HOT_SEND_BYTES_MAX: u64 = 8 << 20;
/// How often the kernel is asked whether a cancelled receive is over. It is by the second, as a rule.
const CANCEL_LOOKS: u32 = 4;
/// Buffers that may be full of one connection's bytes before they are copied out, so that it does not take those of others.
const ARRIVED_MAX: usize = 8;

/// What a completion is about: the low byte of its user data; above it, the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Op {
    Poll = 1,
    Accept = 2,
    Receive = 3,
    Send = 4,
    /// A cancellation: what it cancelled says so itself.
    Cancel = 5,
    Probe = 6,
    /// A zero-copy send, by its place in `shares`.
    Share = 7,
    /// A closed connection's time is over.
    LastWords = 8,
}

impl Op {
    const ALL: [Op; 8] = [Op::Poll, Op::Accept, Op::Receive, Op::Send, Op::Cancel, Op::Probe, Op::Share, Op::LastWords];

    fn of(self, slot: usize) -> u64 {
        (slot as u64) << 8 | self as u64
    }

    fn read(user_data: u64) -> Option<(Op, usize)> {
        let op = Op::ALL.into_iter().find(|op| u64::from(*op as u8) == user_data & 0xff)?;
        Some((op, usize::try_from(user_data >> 8).ok()?))
    }
}

/// Both directions of a connection, where the kernel finds their bodies.
struct Halves<In, Out> {
    inbound: Inbound<In>,
    outbound: Outbound<Out>,
}

/// What a sendmsg points to.
struct Flight {
    slices: [libc::iovec; 3 * FRAMES_PER_WRITE_MAX],
    message: libc::msghdr,
    /// What goes before a body that is sent without a copy.
    gathered: [u8; GATHERED_BYTES_MAX],
}

/// A zero-copy send, until its result and its notification have come, in whichever order.
struct Share {
    slot: usize,
    /// Of its connection.
    number: u64,
    flight: Box<Flight>,
    result_due: bool,
    notification_due: bool,
    copied: bool,
}

enum Sending {
    Copied(Box<Flight>),
    /// By its place in `shares`.
    Shared(usize),
}

/// Received and not looked at.
#[derive(Debug)]
enum Arrived {
    /// In a buffer of the ring.
    Buffer(Filled),
    /// Copied out of them.
    Copied { bytes: Vec<u8>, from: usize },
    /// Where the body lies: so many bytes.
    InPlace(usize),
    /// The end: 0, or an error number.
    End(i32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    No,
    /// Into buffers, until it is cancelled.
    Multishot {
        cancelled: bool,
    },
    /// Once, into a buffer.
    Once,
    /// Once, into the body.
    InPlace,
}

struct SocketSlot<In, Out> {
    token: usize,
    fd: OwnedFd,
    /// In the ring's file table.
    fixed: bool,
    arrived: VecDeque<Arrived>,
    receiving: Receiving,
    sending: Option<Sending>,
    sent: Option<i32>,
    shares: Shares,
    /// There were no buffers; to be tried again when there are.
    starved: bool,
    /// In the list of those to be told of.
    told: bool,
    /// Of a connection that is closed: what the kernel may still touch.
    grave: Option<Box<Halves<In, Out>>>,
    closed: Option<Instant>,
}

/// A request for a socket, which is named by its place in the ring's file table (its slot), or by its descriptor.
macro_rules! request {
    ($socket:expr, $slot:expr, |$name:ident| $entry:expr) => {
        match u32::try_from($slot) {
            Ok(place) if $socket.fixed => {
                let $name = types::Fixed(place);
                $entry
            }
            _ => {
                let $name = types::Fd($socket.fd.as_raw_fd());
                $entry
            }
        }
    };
}

enum Slot<In, Out> {
    Watch { token: usize, fd: RawFd, events: u32, closed: bool },
    Listener { token: usize, fd: RawFd, accepted: VecDeque<io::Result<OwnedFd>>, accepting: bool, told: bool },
    Socket(SocketSlot<In, Out>),
}

pub(crate) struct Uring<In, Out> {
    // First: closed before the memory it writes to is freed.
    ring: IoUring,
    /// Dropped when the kernel is known to be done with them.
    buffers: ManuallyDrop<Buffers>,
    enabled: bool,
    slots: Slab<Slot<In, Out>>,
    /// Of watched descriptors and listeners, by token.
    by_token: HashMap<usize, usize>,
    /// Slots with news that were not told.
    news: Vec<usize>,
    starved: Vec<usize>,
    files: u32,
    #[allow(clippy::vec_box, reason = "a flight is moved in and out while it is pointed to")]
    flights: Vec<Box<Flight>>,
    shares: Slab<Share>,
    can_share: bool,
    pub(crate) zero_copy: ZeroCopy,
    pub(crate) zero_copy_stats: ZeroCopyStats,
    buried: Vec<Box<Halves<In, Out>>>,
}

impl<In, Out> fmt::Debug for Uring<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring").field("slots", &self.slots.len()).field("buffers", &self.buffers).finish()
    }
}

/// A ring with everything that we use, or what is missing.
fn build() -> Result<(IoUring, Buffers), NoUring> {
    let failed = |what| move |source| NoUring { what, source };
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_r_disabled()
        .setup_submit_all()
        .setup_cqsize(COMPLETIONS)
        .dontfork()
        .build(SUBMISSIONS)
        .map_err(failed("io_uring_setup"))?;
    if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
        return Err(failed("io_uring_setup")(io::Error::from_raw_os_error(libc::EINVAL)));
    }
    let buffers = Buffers::register(&ring).map_err(failed("registering buffers"))?;
    Ok((ring, buffers))
}

pub(crate) fn probe() -> Result<(), NoUring> {
    let failed = |what| move |source| NoUring { what, source };
    let (mut ring, mut buffers) = build()?;
    ring.submitter().register_enable_rings().map_err(failed("enabling the ring"))?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed("a socket pair"))?;
    io::Write::write_all(&mut &theirs, b"x").map_err(failed("a socket pair"))?;
    let nop = opcode::Nop::new().build().user_data(Op::Probe.of(0));
    let receive = opcode::RecvMulti::new(types::Fd(ours.as_raw_fd()), GROUP).build().user_data(Op::Receive.of(0));
    for entry in [nop, receive] {
        // SAFETY: neither request points to memory of ours but the registered buffers, which outlive the ring; `ours` is open until
        // the ring is closed at the end of this function.
        unsafe { ring.submission().push(&entry) }.expect("a new ring has room for two");
    }
    ring.submitter().submit_and_wait(2).map_err(failed("io_uring_enter"))?;
    for entry in ring.completion() {
        let what = if entry.user_data() == Op::Probe.of(0) { "a no-op" } else { "a multishot receive" };
        if entry.result() < 0 {
            return Err(failed(what)(io::Error::from_raw_os_error(-entry.result())));
        }
        if let Some(number) = cqueue::buffer_select(entry.flags()) {
            let arrived = buffers.take(number, 1).expect("a buffer of ours");
            assert_eq!(buffers.bytes(&arrived), b"x", "what was sent is what is received");
        }
    }
    drop(ring);
    Ok(())
}

impl<In: Owned + AsMut<[u8]>, Out: Owned> Uring<In, Out> {
    pub(crate) fn new() -> Result<Self, NoUring> {
        let (ring, buffers) = build()?;
        // As many as the process may have open; fewer, or none, costs some nanoseconds a request.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let mut files = u32::try_from(limit.unwrap_or(u64::MAX)).unwrap_or(u32::MAX).min(FILES_MAX);
        if ring.submitter().register_files_sparse(files).is_err() {
            files = 0;
        }
        let mut known = Probe::new();
        let can_share =
            ring.submitter().register_probe(&mut known).is_ok() && known.is_supported(opcode::SendMsgZc::CODE);
        Ok(Uring {
            ring,
            buffers: ManuallyDrop::new(buffers),
            enabled: false,
            slots: Slab::new(),
            by_token: HashMap::new(),
            news: Vec::new(),
            starved: Vec::new(),
            files,
            flights: Vec::new(),
            shares: Slab::new(),
            can_share,
            zero_copy: ZeroCopy::default(),
            zero_copy_stats: ZeroCopyStats::default(),
            buried: Vec::new(),
        })
    }

    /// Writes a request; it goes to the kernel with the next wait.
    ///
    /// # Safety
    /// Whatever the request points to is neither moved, nor freed, nor touched until its last completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: by the caller.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full: the kernel takes what is there. It may refuse (EBUSY, completions wait), then those are read first.
            self.enable();
            if self.ring.submitter().submit().is_err() {
                self.reap();
            }
        }
    }

    /// The ring belongs to the thread that does this: the first that waits.
    fn enable(&mut self) {
        if !std::mem::replace(&mut self.enabled, true) {
            self.ring.submitter().register_enable_rings().expect("a ring of ours, not enabled yet");
        }
    }

    // ---- what is waited for -----------------------------------------------------------------------------------

    pub(crate) fn watch(&mut self, fd: BorrowedFd<'_>, token: usize, interest: Interest) {
        let events = match interest {
            Interest::Read => libc::POLLIN,
            Interest::Write => libc::POLLOUT,
            Interest::Both => libc::POLLIN | libc::POLLOUT,
        };
        let events = u32::from(events.cast_unsigned());
        let slot = self.slots.insert(Slot::Watch { token, fd: fd.as_raw_fd(), events, closed: false });
        self.by_token.insert(token, slot);
        self.poll(slot, fd.as_raw_fd(), events);
    }

    fn poll(&mut self, slot: usize, fd: RawFd, events: u32) {
        let entry = opcode::PollAdd::new(types::Fd(fd), events).multi(true).build().user_data(Op::Poll.of(slot));
        // SAFETY: a poll points to nothing; the kernel holds the file while it polls.
        unsafe { self.push(&entry) };
    }

    pub(crate) fn unwatch(&mut self, token: usize) {
        let Some(slot) = self.by_token.remove(&token) else { return };
        if let Some(Slot::Watch { closed, .. }) = self.slots.get_mut(slot) {
            *closed = true;
            self.cancel(Op::Poll, slot);
        }
    }

    fn cancel(&mut self, op: Op, slot: usize) {
        let entry = opcode::AsyncCancel::new(op.of(slot)).build().user_data(Op::Cancel.of(slot));
        // SAFETY: a cancellation points to nothing.
        unsafe { self.push(&entry) };
    }

    pub(crate) fn listen(&mut self, listener: &TcpListener, token: usize) {
        let fd = listener.as_raw_fd();
        let accepted = VecDeque::new();
        let slot = self.slots.insert(Slot::Listener { token, fd, accepted, accepting: false, told: false });
        self.by_token.insert(token, slot);
        self.accept_more(slot);
    }

    /// Has the kernel accept, if it does not.
    fn accept_more(&mut self, slot: usize) {
        let Some(Slot::Listener { fd, accepting, .. }) = self.slots.get_mut(slot) else { return };
        let fd = *fd;
        if std::mem::replace(accepting, true) {
            return;
        }
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let entry = opcode::AcceptMulti::new(types::Fd(fd)).flags(flags).build().user_data(Op::Accept.of(slot));
        // SAFETY: an accept without an address points to nothing.
        unsafe { self.push(&entry) };
    }

    pub(crate) fn accept(&mut self, token: usize) -> io::Result<Option<TcpStream>> {
        let Some(&slot) = self.by_token.get(&token) else { return Ok(None) };
        let Some(Slot::Listener { accepted, .. }) = self.slots.get_mut(slot) else { return Ok(None) };
        match accepted.pop_front() {
            // After an error the next call asks again: not before somebody has done something about it.
            Some(accepted) => accepted.map(|fd| Some(TcpStream::from(fd))),
            None => {
                self.accept_more(slot);
                Ok(None)
            }
        }
    }

    pub(crate) fn adopt(
        &mut self,
        stream: TcpStream,
        token: usize,
        limits: Limits,
        config: TcpConfig,
        terms: Terms,
    ) -> io::Result<Socket<In, Out>> {
        let stream = mio::net::TcpStream::from_std(stream);
        let local = stream.local_addr()?.ip();
        let (stream, inbound, outbound, peer_addr) = Connection::new(stream, limits, config, terms)?.into_parts();
        let on_loopback = tcp::on_loopback(peer_addr) || peer_addr.ip() == local;
        let fd = OwnedFd::from(stream);
        let raw = fd.as_raw_fd();
        let slot = self.slots.insert(Slot::Socket(SocketSlot {
            token,
            fd,
            fixed: false,
            arrived: VecDeque::new(),
            receiving: Receiving::No,
            sending: None,
            sent: None,
            shares: Shares::new(self.zero_copy, self.can_share, on_loopback),
            starved: false,
            told: false,
            grave: None,
            closed: None,
        }));
        if let Some(at) = u32::try_from(slot).ok().filter(|at| *at < self.files) {
            let fixed = self.ring.submitter().register_files_update(at, &[raw]).is_ok();
            self.socket(slot).fixed = fixed;
        }
        let halves = ManuallyDrop::new(Box::new(Halves { inbound, outbound }));
        let mut socket = Socket { slot, halves, peer_addr, lent: false, heat: Heat::Cold };
        socket.arm(self);
        Ok(socket)
    }

    fn socket(&mut self, slot: usize) -> &mut SocketSlot<In, Out> {
        match self.slots.get_mut(slot) {
            Some(Slot::Socket(socket)) => socket,
            _ => unreachable!("a socket's slot is its own until it is closed"),
        }
    }

    // ---- waiting ----------------------------------------------------------------------------------------------

    pub(crate) fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
        // Buffers may have come back since: whoever found none is told before we sleep.
        self.feed_the_starved();
        self.tell(events);
        let waits = events.is_empty() && timeout != Some(Duration::ZERO);
        self.enable();
        if !waits {
            let submission = self.ring.submission();
            let idle = submission.is_empty() && !submission.taskrun() && !submission.cq_overflow();
            drop(submission);
            if idle && self.ring.completion().is_empty() {
                return Ok(());
            }
        }
        let entered = if waits {
            let timespec = timeout.map(types::Timespec::from);
            let mut args = types::SubmitArgs::new();
            if let Some(timespec) = &timespec {
                args = args.timespec(timespec);
            }
            self.ring.submitter().submit_with_args(1, &args)
        } else {
            self.enter()
        };
        if let Err(error) = entered
            && !matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY))
        {
            return Err(error);
        }
        self.reap();
        self.feed_the_starved();
        self.tell(events);
        Ok(())
    }

    /// Requests are written that the kernel has not been told of.
    pub(crate) fn has_requests(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Hands in what is written and takes what is done, without waiting.
    fn enter(&mut self) -> io::Result<usize> {
        const GETEVENTS: u32 = 1;
        let count = u32::try_from(self.ring.submission().len()).expect("at most SUBMISSIONS");
        // SAFETY: no argument is passed; the requests were pushed under `push`'s conditions.
        unsafe { self.ring.submitter().enter::<libc::sigset_t>(count, 0, GETEVENTS, None) }
    }

    fn tell(&mut self, events: &mut Vec<Event>) {
        for slot in self.news.drain(..) {
            match self.slots.get_mut(slot) {
                Some(Slot::Socket(socket)) if socket.grave.is_none() => {
                    socket.told = false;
                    let closing = matches!(socket.arrived.back(), Some(Arrived::End(_)));
                    events.push(Event { token: socket.token, readable: true, closing });
                }
                Some(Slot::Listener { token, told, .. }) => {
                    *told = false;
                    events.push(Event { token: *token, readable: true, closing: false });
                }
                Some(Slot::Watch { token, closed: false, .. }) => {
                    events.push(Event { token: *token, readable: true, closing: false });
                }
                _ => {}
            }
        }
    }

    fn reap(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else { return };
            let Some((op, slot)) = Op::read(entry.user_data()) else { continue };
            let (result, more) = (entry.result(), cqueue::more(entry.flags()));
            match op {
                Op::Poll => self.polled(slot, more),
                Op::Accept => self.accepted(slot, result, more),
                Op::Receive => self.received(slot, result, more, cqueue::buffer_select(entry.flags())),
                Op::Send => self.sent(slot, result),
                Op::Share => self.shared(slot, &entry),
                Op::LastWords => self.end_last_words(slot),
                Op::Cancel | Op::Probe => {}
            }
        }
    }

    fn polled(&mut self, slot: usize, more: bool) {
        let Some(Slot::Watch { fd, events, closed, .. }) = self.slots.get(slot) else { return };
        let (fd, events, closed) = (*fd, *events, *closed);
        if closed {
            if !more {
                self.slots.remove(slot);
            }
            return;
        }
        if !more {
            self.poll(slot, fd, events);
        }
        self.news.push(slot);
    }

    fn accepted(&mut self, slot: usize, result: i32, more: bool) {
        let Some(Slot::Listener { accepted, accepting, told, .. }) = self.slots.get_mut(slot) else { return };
        *accepting = more;
        accepted.push_back(if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            // SAFETY: the kernel made this descriptor for us a moment ago, and nobody else knows it.
            Ok(unsafe { OwnedFd::from_raw_fd(result) })
        });
        if !std::mem::replace(told, true) {
            self.news.push(slot);
        }
    }

    fn received(&mut self, slot: usize, result: i32, more: bool, buffer: Option<u16>) {
        let arrived = buffer.and_then(|number| {
            let filled = self.buffers.take(number, usize::try_from(result).unwrap_or(0))?;
            Some(Arrived::Buffer(filled))
        });
        let Some(Slot::Socket(socket)) = self.slots.get_mut(slot) else { return };
        let in_place = socket.receiving == Receiving::InPlace;
        if !more {
            socket.receiving = Receiving::No;
        }
        if socket.grave.is_some() {
            if let Some(Arrived::Buffer(filled)) = arrived {
                self.buffers.give_back(filled);
            }
            return self.bury(slot);
        }
        let arrived = match (arrived, result) {
            (Some(arrived), 1..) => arrived,
            (Some(Arrived::Buffer(filled)), _) => {
                // A buffer came back unused.
                self.buffers.give_back(filled);
                Arrived::End(result)
            }
            (_, _) if result == -libc::ENOBUFS => {
                socket.starved = true;
                self.starved.push(slot);
                return;
            }
            // Cancelled: told as well, so that the next receive is asked for.
            (_, _) if result == -libc::ECANCELED => return self.tell_of(slot),
            (_, 1..) if in_place => Arrived::InPlace(usize::try_from(result).expect("positive")),
            _ => Arrived::End(result.min(0)),
        };
        socket.arrived.push_back(arrived);
        if socket.arrived.len() > ARRIVED_MAX && matches!(socket.receiving, Receiving::Multishot { .. }) {
            self.copy_out(slot);
        }
        self.tell_of(slot);
    }

    /// Somebody does not take what arrives for him: no more of it, and the buffers are for others.
    fn copy_out(&mut self, slot: usize) {
        let Some(Slot::Socket(socket)) = self.slots.get_mut(slot) else { return };
        let (mut bytes, mut from) = (Vec::new(), 0);
        let mut rest = VecDeque::new();
        for arrived in socket.arrived.drain(..) {
            match arrived {
                Arrived::Buffer(filled) => {
                    bytes.extend_from_slice(self.buffers.bytes(&filled));
                    self.buffers.give_back(filled);
                }
                Arrived::Copied { bytes: earlier, from: at } if bytes.is_empty() => (bytes, from) = (earlier, at),
                Arrived::Copied { bytes: earlier, from: at } => bytes.extend_from_slice(&earlier[at..]),
                other => rest.push_back(other),
            }
        }
        rest.push_front(Arrived::Copied { bytes, from });
        socket.arrived = rest;
        self.end_multishot(slot);
    }

    /// No more buffers for a socket, once the kernel has heard of it.
    fn end_multishot(&mut self, slot: usize) {
        let receiving = &mut self.socket(slot).receiving;
        if *receiving == (Receiving::Multishot { cancelled: false }) {
            *receiving = Receiving::Multishot { cancelled: true };
            self.cancel(Op::Receive, slot);
        }
    }

    fn tell_of(&mut self, slot: usize) {
        if !std::mem::replace(&mut self.socket(slot).told, true) {
            self.news.push(slot);
        }
    }

    fn sent(&mut self, slot: usize, result: i32) {
        let Some(Slot::Socket(socket)) = self.slots.get_mut(slot) else { return };
        if let Some(Sending::Copied(flight)) = socket.sending.take() {
            self.flights.push(flight);
        }
        socket.sent = Some(result);
        if socket.grave.is_some() { self.bury(slot) } else { self.tell_of(slot) }
    }

    /// One of the two ends of a zero-copy send.
    fn shared(&mut self, at: usize, entry: &cqueue::Entry) {
        let Some(share) = self.shares.get_mut(at) else { return };
        let (slot, number) = (share.slot, share.number);
        let is_result = !cqueue::notif(entry.flags());
        if is_result {
            share.result_due = false;
            share.notification_due &= cqueue::more(entry.flags());
        } else {
            share.notification_due = false;
            share.copied = entry.result().cast_unsigned() & USAGE_COPIED != 0;
        }
        let copied = share.copied;
        let over = !share.result_due && !share.notification_due;
        if over {
            self.flights.push(self.shares.remove(at).flight);
            self.zero_copy_stats.copied += u64::from(copied);
        }
        let Some(Slot::Socket(socket)) = self.slots.get_mut(slot) else { return };
        if over {
            socket.shares.end(number, copied);
        }
        if !is_result {
            return if socket.grave.is_some() { self.bury(slot) } else { self.tell_of(slot) };
        }
        let refusals = [libc::EINVAL, libc::EOPNOTSUPP, libc::ENOBUFS, libc::ENOMEM];
        if refusals.contains(&-entry.result()) {
            // Nothing of it left: sent again, with a copy.
            socket.shares.give_up();
            self.zero_copy_stats.refused += 1;
            return self.sent(slot, 0);
        }
        self.sent(slot, entry.result());
    }

    /// A peer that does not acknowledge what it was sent keeps the memory no longer: the connection is reset.
    fn end_last_words(&mut self, slot: usize) {
        // The slot may be another's by now, who closed later.
        if let Some(Slot::Socket(socket)) = self.slots.get(slot)
            && socket.closed.is_some_and(|closed| closed.elapsed() >= LAST_WORDS)
        {
            let _ = rustix::net::connect_unspec(&socket.fd);
        }
    }

    /// Those that found no buffer are told to look again, when there are some.
    fn feed_the_starved(&mut self) {
        if self.starved.is_empty() {
            return;
        }
        if !self.buffers.has_some() {
            // All are full of what somebody does not look at.
            for slot in 0..self.slots.capacity() {
                if matches!(self.slots.get(slot), Some(Slot::Socket(socket)) if !socket.arrived.is_empty()) {
                    self.copy_out(slot);
                }
            }
        }
        if !self.buffers.has_some() {
            return;
        }
        for slot in std::mem::take(&mut self.starved) {
            if let Some(Slot::Socket(socket)) = self.slots.get_mut(slot)
                && std::mem::take(&mut socket.starved)
                && socket.grave.is_none()
            {
                self.tell_of(slot);
            }
        }
    }

    /// Lets go of a closed socket once the kernel has.
    fn bury(&mut self, slot: usize) {
        let Some(Slot::Socket(socket)) = self.slots.get_mut(slot) else { return };
        let idle = socket.receiving == Receiving::No && socket.sending.is_none() && socket.shares.is_idle();
        if socket.grave.is_none() || !idle {
            return;
        }
        if socket.fixed {
            let at = u32::try_from(slot).expect("the table's places are u32");
            // It would keep the file open. An error leaves it to the next socket of this slot, which takes the place.
            let _ = self.ring.submitter().register_files_update(at, &[-1]);
        }
        let Slot::Socket(socket) = self.slots.remove(slot) else { unreachable!("seen above") };
        self.buried.extend(socket.grave);
    }

    pub(crate) fn reclaim<B: Bodies<Body = In>>(&mut self, bodies: &mut B, done: &mut dyn FnMut(Out)) {
        for mut halves in self.buried.drain(..) {
            halves.inbound.abandon(bodies);
            halves.outbound.abandon(done);
        }
    }
}

impl<In, Out> Drop for Uring<In, Out> {
    /// Waits until the kernel has let go of all memory, a moment; memory that it does not let go of is leaked.
    fn drop(&mut self) {
        if self.enabled && !self.shares.is_empty() {
            // What the kernel does not know of yet would be begun by the wait for notifications, after everything is cancelled.
            let _ = self.ring.submitter().submit();
        }
        for (_, slot) in &mut self.slots {
            if let Slot::Socket(socket) = slot {
                // Sends that wait for room end at once.
                let _ = rustix::net::shutdown(&socket.fd, rustix::net::Shutdown::Both);
            }
        }
        let all = types::CancelBuilder::any();
        let cancelled = match self.enabled {
            true => self.ring.submitter().register_sync_cancel(Some(types::Timespec::new().sec(1)), all),
            false => Ok(()),
        };
        let gone = match cancelled {
            Ok(()) => true,
            Err(error) => error.raw_os_error() == Some(libc::ENOENT),
        };
        let gone = gone && self.reset_shares();
        if gone {
            // SAFETY: once, here; nobody uses them after this.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        } else {
            // Sockets are leaked with what they send from and receive into.
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(std::mem::take(&mut self.shares));
        }
    }
}

impl<In, Out> Uring<In, Out> {
    /// Resets connections whose peers have not acknowledged what is sent from our memory, and waits for the notifications. False: some
    /// did not come.
    fn reset_shares(&mut self) -> bool {
        if !self.enabled || self.shares.is_empty() {
            return true;
        }
        if !self.ring.submission().is_empty() {
            return false;
        }
        for (_, slot) in &self.slots {
            if let Slot::Socket(socket) = slot
                && !socket.shares.is_idle()
            {
                let _ = rustix::net::connect_unspec(&socket.fd);
            }
        }
        let begun = Instant::now();
        while !self.shares.is_empty() && begun.elapsed() < Duration::from_secs(1) {
            let timespec = types::Timespec::from(Duration::from_millis(20));
            let _ = self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec));
            for entry in self.ring.completion() {
                // What was cancelled has its result, so that nothing but notifications is due.
                if let Some((Op::Share, at)) = Op::read(entry.user_data())
                    && !cqueue::more(entry.flags())
                {
                    self.shares.try_remove(at);
                }
            }
        }
        self.shares.is_empty()
    }
}

/// A connection of this reactor.
pub(crate) struct Socket<In, Out> {
    slot: usize,
    /// Leaked when a socket is dropped and not closed: the kernel may be at them.
    halves: ManuallyDrop<Box<Halves<In, Out>>>,
    peer_addr: SocketAddr,
    /// Somebody else reads and writes it.
    lent: bool,
    heat: Heat,
}

/// Who reads a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heat {
    /// The kernel, for the ring.
    Cold,
    /// The kernel, until what it was asked for is over; then its owner.
    Warm,
    /// Its owner, by system calls. Nothing is received for the ring.
    Hot,
}

impl<In, Out> fmt::Debug for Socket<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("slot", &self.slot).field("peer_addr", &self.peer_addr).finish()
    }
}

impl<In: Owned + AsMut<[u8]>, Out: Owned> Socket<In, Out> {
    pub(crate) fn receive<B: Bodies<Body = In>>(
        &mut self,
        uring: &mut Uring<In, Out>,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        if self.lent {
            return Ok(None);
        }
        loop {
            let socket = uring.socket(self.slot);
            let inbound = &mut self.halves.inbound;
            // What was read directly comes before what the ring receives after it.
            if inbound.carries()
                && let Some(frame) = inbound.receive_within(0, &mut AtOnce(socket.fd.as_fd()), scratch, bodies)?
            {
                return Ok(Some(frame));
            }
            let Some(arrived) = socket.arrived.pop_front() else {
                if self.heat == Heat::Cold || socket.receiving != Receiving::No {
                    self.arm(uring);
                    return Ok(None);
                }
                self.heat = Heat::Hot;
                return inbound.receive(&mut AtOnce(socket.fd.as_fd()), scratch, bodies);
            };
            let frame = match arrived {
                Arrived::Buffer(mut filled) => {
                    let mut input = uring.buffers.bytes(&filled);
                    let frame = inbound.feed(&mut input, bodies);
                    let left = input.len();
                    inbound.count(filled.len() - left);
                    filled.keep(left);
                    if left > 0 && frame.is_ok() {
                        uring.socket(self.slot).arrived.push_front(Arrived::Buffer(filled));
                    } else {
                        uring.buffers.give_back(filled);
                    }
                    frame?
                }
                Arrived::Copied { bytes, from } => {
                    let mut input = &bytes[from..];
                    let frame = inbound.feed(&mut input, bodies)?;
                    let left = input.len();
                    inbound.count(bytes.len() - from - left);
                    if left > 0 {
                        let from = bytes.len() - left;
                        uring.socket(self.slot).arrived.push_front(Arrived::Copied { bytes, from });
                    }
                    frame
                }
                Arrived::InPlace(count) => inbound.filled(count, bodies)?,
                Arrived::End(0) => return Err(ConnectionError::Closed { mid_frame: inbound.mid_frame() }),
                Arrived::End(error) => return Err(io::Error::from_raw_os_error(-error).into()),
            };
            if frame.is_some() {
                return Ok(frame);
            }
        }
    }

    /// From now on [`Socket::receive`] reads the socket itself, and no event need tell that there is something. For an owner who looks again
    /// and again, until [`Socket::cool`].
    pub(crate) fn heat(&mut self, uring: &mut Uring<In, Out>) {
        if self.lent || self.heat != Heat::Cold {
            return;
        }
        self.heat = Heat::Warm;
        uring.end_multishot(self.slot);
    }

    /// The kernel receives again, and events tell of it.
    pub(crate) fn cool(&mut self, uring: &mut Uring<In, Out>) {
        if std::mem::replace(&mut self.heat, Heat::Cold) != Heat::Cold && !self.lent {
            self.arm(uring);
        }
    }

    /// Has the kernel receive what is wanted next, if it does not yet.
    fn arm(&mut self, uring: &mut Uring<In, Out>) {
        let slot = self.slot;
        let socket = uring.socket(slot);
        // What a receive under way points to is left alone.
        let may_look = matches!(socket.receiving, Receiving::No | Receiving::Multishot { cancelled: false });
        // What has come and was not taken decides what is wanted next, so it is taken first: `receive` comes back here.
        if socket.starved || !may_look || !socket.arrived.is_empty() || self.halves.inbound.carries() {
            return;
        }
        let wants = match self.halves.inbound.wants() {
            Wants::Room if self.halves.inbound.room().len() < DIRECT_BYTES_MIN => {
                Wants::AtMost(self.halves.inbound.room().len())
            }
            wants => wants,
        };
        if socket.receiving != Receiving::No {
            // Buffers for what is short; what may be long is asked for by itself.
            let may_be_long = match wants {
                Wants::Any => false,
                Wants::AtMost(_) => self.halves.inbound.expects_long(),
                Wants::Room => true,
            };
            if may_be_long {
                uring.end_multishot(slot);
            }
            return;
        }
        let (receiving, entry) = match wants {
            Wants::Any => {
                let entry = request!(socket, slot, |name| opcode::RecvMulti::new(name, GROUP).build());
                (Receiving::Multishot { cancelled: false }, entry)
            }
            Wants::AtMost(bytes) => {
                let (nowhere, bytes) = (std::ptr::null_mut(), u32::try_from(bytes).unwrap_or(u32::MAX));
                let entry =
                    request!(socket, slot, |name| opcode::Recv::new(name, nowhere, bytes).buf_group(GROUP).build());
                (Receiving::Once, entry.flags(squeue::Flags::BUFFER_SELECT))
            }
            Wants::Room => {
                let room = self.halves.inbound.room();
                let bytes = u32::try_from(room.len().min(IN_PLACE_BYTES_MAX)).expect("far below");
                let room = room.as_mut_ptr();
                let entry = request!(socket, slot, |name| opcode::Recv::new(name, room, bytes)
                    .flags(libc::MSG_WAITALL)
                    .build());
                (Receiving::InPlace, entry)
            }
        };
        socket.receiving = receiving;
        // SAFETY: `Room` points into a body that `halves` own; it is `Owned`, so that its bytes stay where they are, and `inbound` is
        // not touched before the completion: nothing is arrived or carried now (seen above), so that `receive` finds nothing to feed it
        // with, and reads nothing itself while `receiving`.
        // `close` hands the halves to the slot until then. The other two point to nothing; the buffers live as long as the ring.
        unsafe { uring.push(&entry.user_data(Op::Receive.of(slot))) };
    }

    pub(crate) fn queue(&mut self, header: &Header, key: &[u8], body: Out) -> Result<(), SendError<Out>> {
        // Of a request under way, only `line` and `streams` are pointed to, which `prepare` alone adds to.
        self.halves.outbound.send(None, header, key, body)
    }

    pub(crate) fn flush(
        &mut self,
        uring: &mut Uring<In, Out>,
        done: &mut dyn FnMut(Out),
    ) -> Result<Flush, ConnectionError> {
        if self.lent {
            return Ok(if self.halves.outbound.is_empty() { Flush::Done } else { Flush::Blocked });
        }
        let socket = uring.socket(self.slot);
        let outbound = &mut self.halves.outbound;
        // Also while a send is under way: it points to none of what has ended.
        outbound.end_shares(socket.shares.ended(), done);
        if socket.sending.is_some() {
            return Ok(Flush::Blocked);
        }
        match socket.sent.take() {
            None => {}
            Some(count @ 0..) => outbound.wrote(usize::try_from(count).expect("not negative"), done),
            Some(error) => {
                outbound.fail();
                return Err(io::Error::from_raw_os_error(-error).into());
            }
        }
        // What one system call sends now is not worth a request: its completion would come as an event of its own. More goes by
        // itself, beside whatever we do meanwhile.
        let is_hot = self.heat == Heat::Hot && !socket.shares.are_wanted();
        let direct_bytes_max = if is_hot { HOT_SEND_BYTES_MAX } else { DIRECT_SEND_BYTES_MAX };
        if !outbound.is_empty() && outbound.unsent_bytes() <= direct_bytes_max {
            let fd = uring.socket(self.slot).fd.as_fd();
            let _ = outbound.flush(&mut AtOnce(fd), done)?;
        }
        if outbound.is_empty() {
            return Ok(if outbound.backlog().0 == 0 { Flush::Done } else { Flush::Blocked });
        }
        let mut flight = uring.flights.pop().unwrap_or_else(Flight::new);
        let mut slices = [IoSlice::new(&[]); 3 * FRAMES_PER_WRITE_MAX];
        let used = outbound.prepare(&mut slices);
        let socket = uring.socket(self.slot);
        let plan = socket.shares.plan(slices[..used].iter().map(|slice| slice.len()));
        match plan {
            Plan::Copy { slices: count } => flight.point_to(&slices[..count]),
            Plan::Share { gathered } => flight.gather(&slices[..gathered], &slices[gathered]),
        }
        let message = std::ptr::from_ref(&flight.message);
        // Not WAITALL: each part that leaves is progress, which somebody may be waiting to see.
        let flags = libc::MSG_NOSIGNAL.cast_unsigned();
        let entry = if matches!(plan, Plan::Copy { .. }) {
            let entry = request!(socket, self.slot, |name| opcode::SendMsg::new(name, message).flags(flags).build());
            socket.sending = Some(Sending::Copied(flight));
            entry.user_data(Op::Send.of(self.slot))
        } else {
            let (slot, number) = (self.slot, socket.shares.begin());
            let entry = request!(socket, slot, |name| opcode::SendMsgZc::new(name, message)
                .flags(flags)
                .ioprio(REPORT_USAGE)
                .build());
            outbound.share(number);
            uring.zero_copy_stats.begun += 1;
            let share = Share { slot, number, flight, result_due: true, notification_due: true, copied: false };
            let at = uring.shares.insert(share);
            uring.socket(slot).sending = Some(Sending::Shared(at));
            entry.user_data(Op::Share.of(at))
        };
        // SAFETY: the message, its slices and what is gathered are in the flight, a box that the slot keeps until the completion, or
        // `shares` until both completions; they point to heads, keys and bodies in `halves`, which are `Owned`, boxed, and not
        // changed before the result (see `queue`; `prepare` and `wrote` are not called while `sending`). After the result of a
        // share the kernel reads what was gathered, and one body, which is long, so that it may be moved, and which `outbound` keeps
        // until the share has ended. `close` hands the halves to the slot until all this is over.
        unsafe { uring.push(&entry) };
        Ok(Flush::Blocked)
    }

    pub(crate) fn close<B: Bodies<Body = In>>(
        mut self,
        uring: &mut Uring<In, Out>,
        bodies: &mut B,
        done: &mut dyn FnMut(Out),
    ) {
        let slot = self.slot;
        for arrived in std::mem::take(&mut uring.socket(slot).arrived) {
            if let Arrived::Buffer(filled) = arrived {
                uring.buffers.give_back(filled);
            }
        }
        let socket = uring.socket(slot);
        let receiving = socket.receiving;
        let sending = socket.sending.as_ref().map(|sending| match sending {
            Sending::Copied(_) => (Op::Send, slot),
            Sending::Shared(at) => (Op::Share, *at),
        });
        let shares = !socket.shares.is_idle();
        socket.closed = Some(Instant::now());
        // SAFETY: taken once: `self` is gone after this, and nobody drops what is in a `ManuallyDrop`.
        socket.grave = Some(unsafe { ManuallyDrop::take(&mut self.halves) });
        // The peer hears of it now, whenever the kernel lets go.
        let _ = rustix::net::shutdown(&socket.fd, rustix::net::Shutdown::Both);
        if receiving != Receiving::No {
            uring.cancel(Op::Receive, slot);
        }
        if let Some((op, at)) = sending {
            uring.cancel(op, at);
        }
        if shares {
            let entry = opcode::Timeout::new(&raw const LAST_WORDS_TIMESPEC).build().user_data(Op::LastWords.of(slot));
            // SAFETY: the time is a static.
            unsafe { uring.push(&entry) };
        }
        uring.bury(slot);
        uring.reclaim(bodies, done);
    }

    /// As [`Connection::lend`]. Ends the receive that waits for the next frame; what came before it ended is not taken, and keeps the
    /// connection here.
    pub(crate) fn lend(&mut self, uring: &mut Uring<In, Out>) -> Option<Terms> {
        let Halves { inbound, outbound } = &**self.halves;
        if self.lent || inbound.mid_frame() || !outbound.is_at_rest() {
            return None;
        }
        let slot = self.slot;
        let socket = uring.socket(slot);
        if socket.sending.is_some() || socket.sent.is_some() || !socket.arrived.is_empty() {
            return None;
        }
        match socket.receiving {
            Receiving::No => {}
            Receiving::Multishot { cancelled: false } => uring.end_multishot(slot),
            Receiving::Multishot { cancelled: true } => {}
            Receiving::Once | Receiving::InPlace => uring.cancel(Op::Receive, slot),
        }
        for _ in 0..CANCEL_LOOKS {
            if uring.socket(slot).receiving == Receiving::No {
                break;
            }
            uring.enable();
            uring.enter().ok()?;
            uring.reap();
        }
        let socket = uring.socket(slot);
        // What is not over by now ends by an event, which asks for the next receive.
        if socket.receiving != Receiving::No || !socket.arrived.is_empty() {
            return None;
        }
        (self.lent, self.heat) = (true, Heat::Cold);
        Some(tcp::terms_of(&self.halves.inbound, &self.halves.outbound))
    }

    pub(crate) fn resume(&mut self, uring: &mut Uring<In, Out>, received: u64, sent: u64) {
        if std::mem::take(&mut self.lent) {
            self.halves.inbound.resume(received);
            self.halves.outbound.resume(sent);
            self.arm(uring);
        }
    }

    pub(crate) fn fd<'a>(&self, uring: &'a Uring<In, Out>) -> BorrowedFd<'a> {
        match uring.slots.get(self.slot) {
            Some(Slot::Socket(socket)) => socket.fd.as_fd(),
            _ => unreachable!("a socket's slot is its own until it is closed"),
        }
    }

    pub(crate) fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    pub(crate) fn backlog(&self) -> (usize, u64) {
        self.halves.outbound.backlog()
    }

    pub(crate) fn sends_pieces(&self) -> bool {
        self.halves.outbound.sends_pieces()
    }

    pub(crate) fn mid_frame(&self) -> bool {
        self.halves.inbound.mid_frame()
    }

    pub(crate) fn in_pieces(&self) -> bool {
        self.halves.inbound.in_pieces()
    }

    pub(crate) fn unfinished(&self) -> bool {
        self.heat == Heat::Hot && self.halves.inbound.unfinished()
    }

    /// False while the ring receives: a look then costs no system call, and has the kernel receive again.
    pub(crate) fn drained(&self) -> bool {
        self.heat == Heat::Hot && self.halves.inbound.drained()
    }

    pub(crate) fn stats(&self) -> Stats {
        tcp::stats(&self.halves.inbound, &self.halves.outbound)
    }
}

impl Flight {
    fn new() -> Box<Flight> {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: a `msghdr` is numbers and pointers, for all of which zero is a value: no name, no slices, no control data.
        let message = unsafe { std::mem::zeroed() };
        let gathered = [0; GATHERED_BYTES_MAX];
        Box::new(Flight { slices: [nothing; 3 * FRAMES_PER_WRITE_MAX], message, gathered })
    }

    /// Sends these, from where they lie.
    fn point_to(&mut self, slices: &[IoSlice<'_>]) {
        for (place, slice) in self.slices.iter_mut().zip(slices) {
            *place = libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() };
        }
        self.message.msg_iov = self.slices.as_mut_ptr();
        self.message.msg_iovlen = slices.len();
    }

    /// Sends a copy of some slices that are short, and then a body from where it lies.
    fn gather(&mut self, short: &[IoSlice<'_>], body: &IoSlice<'_>) {
        let mut used = 0;
        for slice in short {
            self.gathered[used..used + slice.len()].copy_from_slice(slice);
            used += slice.len();
        }
        let base = self.gathered.as_mut_ptr().cast();
        let count = usize::from(used > 0);
        self.slices[0] = libc::iovec { iov_base: base, iov_len: used };
        self.slices[count] = libc::iovec { iov_base: body.as_ptr().cast_mut().cast(), iov_len: body.len() };
        self.message.msg_iov = self.slices.as_mut_ptr();
        self.message.msg_iovlen = count + 1;
    }
}

// SAFETY: the pointers in a flight are of the socket whose slot has it, and go where it goes. Nobody else follows them.
unsafe impl Send for Flight {}
