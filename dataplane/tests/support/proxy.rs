//! A relay between a client and a process that does to their bytes what bad networks do: it splits, delays, stalls, cuts,
//! resets, flips, repeats and swallows. What happens where is given for each connection, so that a seed replays exactly; what
//! happened is kept, and printed when a test fails.
//!
//! One thread serves all connections. It knows no frames: places are counts of bytes.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Dice;

/// From the client to the process, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up = 0,
    Down = 1,
}

/// What is done at one place of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// What follows is sent on so much later.
    Split(Duration),
    /// No more comes this way: its receiver sees the end (FIN).
    Cut,
    /// Both ends are reset (RST).
    Reset,
    /// Nothing more is taken this way, nor its end: the sender finds its window full.
    Stall,
    /// What comes is taken and thrown away, and its end, too: the sender believes it has arrived.
    Swallow,
    /// This bit of the next byte, 0..=7.
    Flip(u8),
    /// So many of the bytes before, once more.
    Repeat(usize),
    /// Bytes that nobody sent.
    Insert(Vec<u8>),
}

/// One way of a connection.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lane {
    /// Bytes go on in pieces of 1 to so many, by dice; 0: as they come.
    pub(crate) piece_max: u64,
    /// Time between one piece and the next; with `piece_max` 0 what comes meanwhile is one piece.
    pub(crate) pause: Duration,
    /// What happens once so many bytes have passed, in ascending order.
    pub(crate) faults: VecDeque<(u64, Fault)>,
}

impl Lane {
    pub(crate) fn with(at: u64, fault: Fault) -> Lane {
        Lane { faults: [(at, fault)].into(), ..Lane::default() }
    }
}

/// Both ways of a connection.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    pub(crate) up: Lane,
    pub(crate) down: Lane,
    /// The relay takes in so little at a time that senders' writes are short.
    pub(crate) narrow: bool,
}

/// What a narrow relay asks the kernel to hold for it, bytes; the kernel doubles it. Below one segment of loopback TCP crawls
/// (80 KB/s with 8 KiB).
const NARROW_BYTES: usize = 64 << 10;

impl Plan {
    pub(crate) fn on(way: Way, at: u64, fault: Fault) -> Plan {
        let lane = Lane::with(at, fault);
        match way {
            Way::Up => Plan { up: lane, ..Plan::default() },
            Way::Down => Plan { down: lane, ..Plan::default() },
        }
    }
}

/// Bytes of each way kept for [`Fault::Repeat`] and [`Proxy::tape`].
const TAPE_BYTES: usize = 64 << 10;
/// Bytes of each way taken before they are sent on.
const HELD_BYTES: usize = 64 << 10;
/// Lines kept of what was done.
const LOG_LINES: usize = 10_000;

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// One bit for each way in which nothing passes just now.
    held: AtomicU8,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    log: VecDeque<String>,
    /// What passed on the last connections that ended: number, tapes, counts.
    tapes: VecDeque<(u64, [Vec<u8>; 2], [u64; 2])>,
    done: u64,
}

/// The relay. Dropping it ends it with all its connections.
pub(crate) struct Proxy {
    address: SocketAddr,
    seed: u64,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// Relays to `upstream`; `plan` says what happens to the connection of that number, from 0.
    pub(crate) fn start(upstream: SocketAddr, seed: u64, plan: impl FnMut(u64) -> Plan + Send + 'static) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("a socket");
        let shared = Arc::new(Shared::default());
        let relay = Relay {
            listener,
            upstream,
            seed,
            plan: Box::new(plan),
            shared: Arc::clone(&shared),
            open: Vec::new(),
            accepted: 0,
        };
        let thread =
            std::thread::Builder::new().name("fault-proxy".into()).spawn(move || relay.run()).expect("a thread");
        Proxy { address, seed, shared, thread: Some(thread) }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.address
    }

    /// From now on nothing passes these ways, until it is told otherwise. Connections that come meanwhile are not taken.
    pub(crate) fn hold(&self, ways: &[Way]) {
        let bits = ways.iter().fold(0, |bits, way| bits | 1 << *way as u8);
        self.shared.held.store(bits, Ordering::Relaxed);
    }

    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.shared.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many faults were done so far.
    pub(crate) fn done(&self) -> u64 {
        self.said().done
    }

    /// What passed each way on a connection that ended (its first bytes, and how many in all), once it has.
    pub(crate) fn tape(&self, number: u64) -> ([Vec<u8>; 2], [u64; 2]) {
        let mut found = None;
        super::wait_until("a relayed connection ends", super::PATIENCE, || {
            found = self
                .said()
                .tapes
                .iter()
                .find(|(at, ..)| *at == number)
                .map(|(_, tapes, passed)| (tapes.clone(), *passed));
            found.is_some()
        });
        found.expect("waited for")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Takes it out of its sleep.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if std::thread::panicking() {
            let said = self.said();
            let mut text = String::new();
            for line in said.log.iter().skip(said.log.len().saturating_sub(40)) {
                let _ = writeln!(text, "  {line}");
            }
            println!("fault-proxy, PRAAS_SEED={}, {} faults, the last of them:\n{text}", self.seed, said.done);
        }
    }
}

struct Relay {
    listener: TcpListener,
    upstream: SocketAddr,
    seed: u64,
    plan: Box<dyn FnMut(u64) -> Plan + Send>,
    shared: Arc<Shared>,
    open: Vec<Pair>,
    accepted: u64,
}

/// A connection: the client's socket and the process's.
struct Pair {
    number: u64,
    ends: [TcpStream; 2],
    ways: [Stream; 2],
}

/// One way of a connection: from `ends[way]` to the other.
struct Stream {
    lane: Lane,
    dice: Dice,
    held: Vec<u8>,
    passed: u64,
    tape: Vec<u8>,
    ready: Instant,
    /// The receiver's buffer was full.
    blocked: bool,
    /// The sender sends no more; the receiver has been told.
    ended: bool,
    told: bool,
    stalled: bool,
    swallows: bool,
}

/// What became of a connection.
enum Fate {
    Goes,
    Ends,
    Resets,
}

impl Relay {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let held = self.shared.held.load(Ordering::Relaxed);
            self.sleep(held);
            if held == 0 && !self.shared.stop.load(Ordering::Relaxed) {
                self.accept();
            }
            let now = Instant::now();
            let mut at = 0;
            while at < self.open.len() {
                match self.open[at].turn(now, held, &self.shared) {
                    Fate::Goes => at += 1,
                    Fate::Ends => self.end(at, false),
                    Fate::Resets => self.end(at, true),
                }
            }
        }
    }

    fn sleep(&self, held: u8) {
        let now = Instant::now();
        // Holding is not an event, so it is looked at now and then.
        let mut longest = Duration::from_millis(20);
        let mut fds = vec![PollFd::new(&self.listener, if held == 0 { PollFlags::IN } else { PollFlags::empty() })];
        for pair in &self.open {
            for end in 0..2 {
                let (from, to) = (&pair.ways[end], &pair.ways[1 - end]);
                let mut wanted = PollFlags::empty();
                if from.wants_read() && held & 1 << end == 0 {
                    wanted |= PollFlags::IN;
                }
                if to.blocked && held & 1 << (1 - end) == 0 {
                    wanted |= PollFlags::OUT;
                }
                if !wanted.is_empty() {
                    fds.push(PollFd::new(&pair.ends[end], wanted));
                }
                if from.has_work() && held & 1 << end == 0 {
                    longest = longest.min(from.ready.saturating_duration_since(now));
                }
            }
        }
        let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: longest.subsec_nanos().into() }));
    }

    fn accept(&mut self) {
        while let Ok((client, _)) = self.listener.accept() {
            let number = self.accepted;
            self.accepted += 1;
            let Ok(process) = TcpStream::connect(self.upstream) else { continue };
            let plan = (self.plan)(number);
            for end in [&client, &process] {
                end.set_nodelay(true).expect("a socket");
                end.set_nonblocking(true).expect("a socket");
                if plan.narrow {
                    rustix::net::sockopt::set_socket_recv_buffer_size(end, NARROW_BYTES).expect("a socket");
                }
            }
            let stream = |lane: Lane, way: u64| Stream {
                lane,
                dice: Dice(self.seed ^ number << 1 ^ way << 63),
                held: Vec::new(),
                passed: 0,
                tape: Vec::new(),
                ready: Instant::now(),
                blocked: false,
                ended: false,
                told: false,
                stalled: false,
                swallows: false,
            };
            let ways = [stream(plan.up, 0), stream(plan.down, 1)];
            self.open.push(Pair { number, ends: [client, process], ways });
        }
    }

    fn end(&mut self, at: usize, reset: bool) {
        let pair = self.open.swap_remove(at);
        let passed = [pair.ways[0].passed, pair.ways[1].passed];
        let mut said = self.shared.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.tapes.push_back((pair.number, pair.ways.map(|way| way.tape), passed));
        if said.tapes.len() > 64 {
            said.tapes.pop_front();
        }
        drop(said);
        if reset {
            for end in &pair.ends {
                let _ = rustix::net::sockopt::set_socket_linger(end.as_fd(), Some(Duration::ZERO));
            }
        }
    }
}

impl Pair {
    fn turn(&mut self, now: Instant, held: u8, shared: &Shared) -> Fate {
        for way in [0, 1] {
            if held & 1 << way != 0 {
                continue;
            }
            let (number, [client, process]) = (self.number, &self.ends);
            let (from, to) = if way == 0 { (client, process) } else { (process, client) };
            let mut log = |at: u64, what: &Fault| {
                let arrow = ["->", "<-"][way];
                let mut said = shared.said.lock().unwrap_or_else(PoisonError::into_inner);
                said.done += 1;
                if said.log.len() == LOG_LINES {
                    said.log.pop_front();
                }
                said.log.push_back(format!("connection {number} {arrow} byte {at}: {what:?}"));
            };
            let fate = self.ways[way].turn(now, from, to, &mut log);
            if matches!(fate, Fate::Resets) {
                return Fate::Resets;
            }
        }
        if self.ways.iter().all(|way| way.told) { Fate::Ends } else { Fate::Goes }
    }
}

impl Stream {
    fn wants_read(&self) -> bool {
        !self.ended && !self.stalled && self.held.len() < HELD_BYTES
    }

    /// Whether there is something to do once `ready` has come.
    fn has_work(&self) -> bool {
        !self.stalled && !self.blocked && !self.held.is_empty()
    }

    fn turn(&mut self, now: Instant, from: &TcpStream, to: &TcpStream, log: &mut dyn FnMut(u64, &Fault)) -> Fate {
        if self.wants_read() {
            let (before, mut piece) = (self.held.len(), [0; 16 << 10]);
            match (&*from).read(&mut piece) {
                Ok(0) => self.ended = true,
                Ok(bytes) => self.held.extend_from_slice(&piece[..bytes]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // A swallowed reset: the other end is not told.
                Err(_) if self.swallows => (self.ended, self.told) = (true, true),
                Err(_) => return Fate::Resets,
            }
            // A pause begins with the first byte that it holds back.
            if before == 0 && !self.held.is_empty() && self.lane.piece_max == 0 {
                self.ready = self.ready.max(now + self.lane.pause);
            }
        }
        loop {
            if self.stalled {
                return Fate::Goes;
            }
            if self.swallows {
                self.held.clear();
                return Fate::Goes;
            }
            let next = self.lane.faults.front().map_or(u64::MAX, |(at, _)| *at);
            if next == self.passed {
                // A change to a byte waits for the byte.
                if self.held.is_empty() && matches!(self.lane.faults[0].1, Fault::Flip(_) | Fault::Split(_)) {
                    break;
                }
                let (at, fault) = self.lane.faults.pop_front().expect("there is one");
                log(at, &fault);
                match fault {
                    Fault::Split(pause) => self.ready = now + pause,
                    Fault::Cut => {
                        (self.ended, self.stalled, self.told) = (true, true, true);
                        self.held.clear();
                        let _ = to.shutdown(Shutdown::Write);
                        let _ = from.shutdown(Shutdown::Read);
                    }
                    Fault::Reset => return Fate::Resets,
                    Fault::Stall => self.stalled = true,
                    Fault::Swallow => self.swallows = true,
                    Fault::Flip(bit) => self.held[0] ^= 1 << bit,
                    Fault::Repeat(bytes) => {
                        let again = self.tape[self.tape.len().saturating_sub(bytes)..].to_vec();
                        self.insert(&again);
                    }
                    Fault::Insert(bytes) => self.insert(&bytes),
                }
                continue;
            }
            if self.held.is_empty() || now < self.ready {
                break;
            }
            let mut bytes = (self.held.len() as u64).min(next - self.passed);
            if self.lane.piece_max > 0 {
                bytes = bytes.min(1 + self.dice.below(self.lane.piece_max));
            }
            let bytes = usize::try_from(bytes).expect("held");
            match (&*to).write(&self.held[..bytes]) {
                Ok(sent) => {
                    let room = TAPE_BYTES.saturating_sub(self.tape.len());
                    self.tape.extend_from_slice(&self.held[..sent.min(room)]);
                    self.held.drain(..sent);
                    self.passed += sent as u64;
                    self.blocked = false;
                    if self.lane.piece_max > 0 || self.held.is_empty() {
                        self.ready = now + self.lane.pause;
                    }
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    self.blocked = true;
                    break;
                }
                Err(_) => return Fate::Resets,
            }
        }
        if self.ended && self.held.is_empty() && !self.told {
            let _ = to.shutdown(Shutdown::Write);
            self.told = true;
        }
        Fate::Goes
    }

    /// Puts bytes before those that wait, which is where the stream is; faults further on stay where they were.
    fn insert(&mut self, bytes: &[u8]) {
        self.held.splice(..0, bytes.iter().copied());
        for (at, _) in &mut self.lane.faults {
            *at += bytes.len() as u64;
        }
    }
}
