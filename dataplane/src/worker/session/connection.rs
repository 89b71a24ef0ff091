//! A client's connection that was lent to us: its calls are read, run and answered here, with no hop.
//!
//! Only plain calls of one function are ours. Whatever else the client sends is forwarded to the controller, whole, and the connection given
//! back at the next moment when nothing is under way on it; so it is when the controller asks.
//!
//! What the controller would have to know if we died now stands in our segment (`praas_shm::LentConnection`): said when the function is
//! about to run, and when its answer is written. How many bytes we read and wrote the kernel knows better than we could say it; the
//! controller compares, and closes a connection of which we died with part of a frame.

use std::os::fd::BorrowedFd;

use praas_shm::{INLINE_BYTES_MAX, LentConnection};
use praas_transport::tcp::{Bodies, Connection, ConnectionError, Frame, Received, Refusal, Scratch, TcpConfig, Terms};
use praas_transport::{Flush, Header, Limits};
use rustix::event::{Timespec, epoll};

use super::*;
use crate::stall::{STALL_NS, Stall};
use crate::wire::{self, Forwarded, Return, frame};

/// Looks at the socket between two looks at the clock: 5 us.
const READS_PER_LOOK: u32 = 16;
/// Frames read while a function asks whether it is cancelled. More stay in the kernel.
const AHEAD_MAX: usize = 16;
/// Bytes taken from the socket before the controller's ring is looked at.
const BYTES_PER_TURN: u64 = 1 << 20;

/// What a client's payload is received into: the record itself up to 40 bytes, else our arena.
#[derive(Debug)]
pub(super) enum Landing {
    Small { bytes: [u8; INLINE_BYTES_MAX], len: usize },
    Loan(Loan),
}

impl AsRef<[u8]> for Landing {
    fn as_ref(&self) -> &[u8] {
        match self {
            Landing::Small { bytes, len } => &bytes[..*len],
            Landing::Loan(loan) => loan,
        }
    }
}

impl AsMut<[u8]> for Landing {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Landing::Small { bytes, len } => &mut bytes[..*len],
            Landing::Loan(loan) => loan,
        }
    }
}

#[derive(Debug)]
struct Room(Rc<Memory>);

impl Bodies for Room {
    type Body = Landing;

    fn loan(&mut self, bytes: usize) -> Option<Landing> {
        if bytes <= INLINE_BYTES_MAX {
            return Some(Landing::Small { bytes: [0; INLINE_BYTES_MAX], len: bytes });
        }
        self.0.loan(bytes).ok().map(Landing::Loan)
    }

    fn give_back(&mut self, body: Landing) {
        drop(body);
    }

    fn truncate(&mut self, mut body: Landing, bytes: usize) -> Landing {
        if bytes <= INLINE_BYTES_MAX {
            let mut small = [0; INLINE_BYTES_MAX];
            small[..bytes].copy_from_slice(&body.as_ref()[..bytes]);
            return Landing::Small { bytes: small, len: bytes };
        }
        match &mut body {
            Landing::Small { len, .. } => *len = bytes,
            Landing::Loan(loan) => loan.truncate(bytes),
        }
        body
    }
}

/// The call that runs.
#[derive(Debug)]
struct Running {
    call: u64,
    deadline_ns: u64,
    cancelled: bool,
}

#[derive(Debug)]
pub(super) struct Lent {
    lease: u64,
    function: u16,
    patience: Patience,
    /// Of a call that names no deadline.
    deadline_ns: u64,
    connection: Connection<Landing, Bytes<'static>>,
    scratch: Scratch<Landing>,
    room: Room,
    /// Read while a function asked whether it was cancelled.
    ahead: VecDeque<Frame<Landing>>,
    /// Of the request about to run, when its record does not hold it.
    input: Option<Landing>,
    running: Option<Running>,
    /// To be given back as soon as it is at rest.
    returning: bool,
    /// It is of no more use.
    ended: Option<Return>,
    /// Something may be there to read.
    look: bool,
    /// What a sleep waits for: the edges of the socket and of the doorbell. One system call, and nothing to undo after it.
    waits: OwnedFd,
    /// When something came or left last.
    since_ns: u64,
    stall: Stall,
}

enum Found {
    Nothing,
    Request,
    Other(Frame<Landing>),
    /// Dealt with.
    Something,
}

impl Lent {
    /// The next frame, and whether it is a call of ours: then it is in `incoming`.
    fn read(&mut self, incoming: &mut Incoming) -> Found {
        if self.ended.is_some() {
            return Found::Nothing;
        }
        let frame = match self.ahead.pop_front() {
            Some(frame) => frame,
            None => match self.connection.receive(&mut self.scratch, &mut self.room) {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    self.look = self.connection.unfinished();
                    return Found::Nothing;
                }
                Err(error) => {
                    self.ended = Some(how(&error));
                    return Found::Nothing;
                }
            },
        };
        // Empty a moment ago: what comes next makes the socket readable.
        self.look = !self.connection.drained() || !self.ahead.is_empty();
        let Frame { header, body, .. } = &frame;
        match (header.kind, body) {
            (frame::PING, _) => {
                let pong = Header { kind: frame::PONG, ..Header::default() };
                self.send(&pong, Inline::empty().into());
                Found::Something
            }
            (frame::REQUEST, Received::Whole(_)) if self.is_ours(header) => {
                self.take(frame, incoming);
                Found::Request
            }
            _ => Found::Other(frame),
        }
    }

    /// A plain call of our function with nothing behind it: who sends more than one at a time is served by more than one worker.
    fn is_ours(&self, header: &Header) -> bool {
        let plain = header.flags & !(frame::FLAG_ARGS | frame::FLAG_IDEMPOTENT) == 0;
        plain
            && header.function == self.function
            && !self.returning
            && self.ahead.is_empty()
            && self.connection.is_at_rest()
    }

    fn take(&mut self, frame: Frame<Landing>, incoming: &mut Incoming) {
        let Frame { header, body: Received::Whole(body), .. } = frame else { unreachable!("the caller saw it whole") };
        let deadline_ns = wire::deadline_ns(now_ns(), header.budget_ns, self.deadline_ns);
        let args = if header.flags & frame::FLAG_ARGS == 0 { 0 } else { record::ARGS };
        let (inline, input) = match body {
            Landing::Small { bytes, len } => (Inline::new(&bytes[..len]).expect("it fits a record"), None),
            loan => (Inline::empty(), Some(loan)),
        };
        self.input = input;
        self.running = Some(Running { call: header.call, deadline_ns, cancelled: false });
        incoming.origin = Origin::Connection;
        incoming.request = Descriptor::new(record::REQUEST | args, header.function, header.call, deadline_ns, inline);
        (incoming.position, incoming.heap) = (0, None);
    }

    /// Writes a frame, or what the kernel takes of it.
    fn send(&mut self, header: &Header, body: Bytes<'static>) {
        if self.connection.send(header, &[], body).is_err() {
            self.ended = Some(Return::Lost);
        }
        self.drop_sent();
    }

    fn drop_sent(&mut self) {
        while self.connection.take_sent().is_some() {}
    }

    /// Where we are, as the controller is to find it if we die.
    fn state(&self) -> LentConnection {
        let (received, sent) = self.connection.sequences();
        let stats = self.connection.stats();
        // What is read beyond a frame dies with us, and no count of the kernel's is this one.
        let between = self.ahead.is_empty() && self.connection.is_at_rest();
        let (call, deadline_ns) = self.running.as_ref().map_or((0, 0), |running| (running.call, running.deadline_ns));
        LentConnection {
            lease: self.lease,
            received,
            sent,
            read_bytes: if between { stats.received_bytes } else { u64::MAX },
            written_bytes: stats.sent_bytes,
            call,
            deadline_ns,
        }
    }

    /// Whether it stalls in the middle of a frame.
    fn stalls(&mut self, now: u64) -> bool {
        if !self.connection.mid_frame() {
            self.stall.clear();
            return false;
        }
        self.stall.is_over(now, self.connection.in_pieces(), &self.connection.stats())
    }

    fn begin_return(&mut self) {
        self.returning = true;
        self.connection.read_no_further();
    }
}

fn how(error: &ConnectionError) -> Return {
    match error {
        ConnectionError::Closed { mid_frame: false } => Return::Closed,
        ConnectionError::Frame(_) => Return::NotFrames,
        _ => Return::Lost,
    }
}

impl Session {
    /// The controller lends us a connection.
    pub(super) fn take_connection(
        &mut self,
        lease: u64,
        function: u16,
        patience: Patience,
        deadline_ns: u64,
        terms: Terms,
        socket: OwnedFd,
    ) -> Result<(), Fatal> {
        if terms.send.key().is_some() || terms.receive.key().is_some() {
            // From here on our memory holds the keys of a session, which are no business of others of our user, nor of a core dump.
            praas_shm::child::hide_memory().map_err(|e| fatal("cannot keep others from our memory", e))?;
        }
        let (received, sent) = (terms.receive.sequence(), terms.send.sequence());
        let stream = mio::net::TcpStream::from_std(std::net::TcpStream::from(socket));
        let limits = Limits { payload_bytes_max: self.welcome.payload_bytes_max };
        let config = TcpConfig { read_bytes_per_call_max: BYTES_PER_TURN, ..TcpConfig::default() };
        let connection = match Connection::new(stream, limits, config, terms) {
            Ok(connection) => connection,
            // Reset meanwhile: the controller finds out by itself.
            Err(_) => return self.say_returned(lease, Return::AtRest, received, sent),
        };
        let Channel::Ring { doorbell, .. } = &self.channel else { return Err(Fatal("connections need rings".into())) };
        let waits = watch(doorbell.fd(), connection.as_fd()).map_err(|e| fatal("cannot wait for a connection", e))?;
        let lent = Lent {
            lease,
            function,
            patience,
            deadline_ns,
            connection,
            scratch: Scratch::default(),
            room: Room(Rc::clone(&self.memory)),
            ahead: VecDeque::new(),
            input: None,
            running: None,
            returning: false,
            ended: None,
            look: true,
            waits,
            since_ns: now_ns(),
            stall: Stall::default(),
        };
        self.say_where(&lent);
        self.lent = Some(Box::new(lent));
        Ok(())
    }

    fn say_where(&self, lent: &Lent) {
        if let Channel::Ring { own, .. } = &self.channel {
            own.say_connection(&lent.state());
        }
    }

    /// The next call on the connection that was lent to us. False when there is something else to do first, or the connection is given back.
    pub(super) fn next_on_connection(&mut self, incoming: &mut Incoming) -> Result<bool, Fatal> {
        let Some(mut lent) = self.lent.take() else { return Ok(false) };
        let sleeps = lent.patience == Patience::NONE;
        let mut looks = 0;
        loop {
            // Who sleeps is told by the wait that there is something, and looks then.
            if lent.look || !sleeps {
                match lent.read(incoming) {
                    Found::Nothing => {}
                    Found::Request => {
                        self.say_where(&lent);
                        self.lent = Some(lent);
                        return Ok(true);
                    }
                    Found::Something => {
                        self.write_out(&mut lent)?;
                        lent.since_ns = now_ns();
                        self.say_where(&lent);
                        continue;
                    }
                    Found::Other(frame) => {
                        lent.begin_return();
                        self.forward(frame)?;
                        continue;
                    }
                }
            }
            if lent.ended.is_some() || lent.returning && lent.connection.is_at_rest() {
                return self.give_back(*lent).map(|()| false);
            }
            if self.controller_ready() {
                self.lent = Some(lent);
                return Ok(false);
            }
            looks += 1;
            if !sleeps && looks % READS_PER_LOOK != 0 {
                std::hint::spin_loop();
                continue;
            }
            let now = now_ns();
            if lent.stalls(now) {
                lent.ended = Some(Return::Stalled);
                continue;
            }
            let waited_ns = now.saturating_sub(lent.since_ns);
            if waited_ns < lent.patience.spin_ns {
                continue;
            }
            self.return_blocks()?;
            if waited_ns >= lent.patience.linger_ns || !self.yields.allowed() {
                self.yields.count_wait();
                // Between two frames it is for the controller to say when this has lasted too long: a timer is 3 % of a call.
                let longest_ns = lent.connection.mid_frame().then_some(STALL_NS / 4);
                self.sleep_on(&mut lent, longest_ns)?;
                if lent.returning {
                    lent.look = true;
                }
            } else if lent.patience.spin_ns > 0 {
                rustix::thread::sched_yield();
            } else {
                self.yields.yield_core(now);
                // One look after each yield.
                looks = READS_PER_LOOK - 1;
            }
        }
    }

    /// Sleeps until the socket is ready or the controller rings, at most so long.
    fn sleep_on(&mut self, lent: &mut Lent, longest_ns: Option<u64>) -> Result<(), Fatal> {
        self.arm()?;
        let Channel::Ring { doorbell, .. } = &self.channel else { return Ok(()) };
        if self.controller_ready() {
            doorbell.disarm();
            return Ok(());
        }
        let timeout =
            longest_ns.map(|ns| Timespec { tv_sec: 0, tv_nsec: i64::try_from(ns.min(999_999_999)).unwrap_or(0) });
        let mut events = [NO_EVENT; 2];
        let waited = epoll::wait(&lent.waits, &mut events[..], timeout.as_ref());
        doorbell.disarm();
        match waited {
            Ok(count) => lent.look |= events[..count].iter().any(|event| event.data.u64() == SOCKET),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(fatal("cannot wait for a connection", error)),
        }
        Ok(())
    }

    /// Waits until the kernel has all that is to be written, as long as the client reads, or nobody else needs us.
    fn write_out(&mut self, lent: &mut Lent) -> Result<(), Fatal> {
        if !lent.connection.wants_write() {
            return Ok(());
        }
        let begun_ns = now_ns();
        let (mut since_ns, mut sent) = (begun_ns, 0);
        while lent.ended.is_none() {
            match lent.connection.flush(&mut drop) {
                Ok(Flush::Done) => break,
                Ok(Flush::Blocked) => {}
                Err(_) => {
                    lent.ended = Some(Return::Lost);
                    break;
                }
            }
            let (now, sent_now) = (now_ns(), lent.connection.stats().sent_bytes);
            if sent_now != sent {
                (since_ns, sent) = (now, sent_now);
            }
            if now - since_ns < lent.patience.spin_ns {
                continue;
            }
            // Whether somebody else needs us.
            while self.revoked.is_none() && self.poll_controller()? {}
            if self.revoked.is_some() && now - since_ns > STALL_NS {
                lent.ended = Some(Return::Deaf);
                break;
            }
            self.sleep_on(lent, Some(STALL_NS / 4))?;
        }
        lent.drop_sent();
        Ok(())
    }

    /// Something for the controller, in two records: what it is, and the payload.
    fn forward(&mut self, frame: Frame<Landing>) -> Result<(), Fatal> {
        let Frame { header, body, .. } = frame;
        let (body, refused) = match body {
            Received::Whole(body) => (Some(body), None),
            Received::Refused { bytes, why: Refusal::TooLarge } => (None, Some((Code::TooLarge, bytes))),
            Received::Refused { bytes, why: Refusal::NoSpace } => (None, Some((Code::NoSpace, bytes))),
        };
        let head = Forwarded {
            kind: header.kind,
            flags: header.flags,
            call: header.call,
            aux: header.aux,
            function: header.function,
            budget_ns: header.budget_ns,
            refused,
            has_body: body.is_some(),
        };
        self.send_controller(&head.to_record(), None)?;
        let Some(body) = body else { return Ok(()) };
        let body: Body = match body {
            Landing::Small { bytes, len } => Inline::new(&bytes[..len]).expect("it fits a record").into(),
            Landing::Loan(loan) => self.lend(loan, ParticipantId::CONTROLLER).into(),
        };
        self.send_controller(&Descriptor::new(record::FORWARDED_BODY, 0, header.call, 0, body), None)
    }

    /// Gives the connection back, at rest or broken.
    fn give_back(&mut self, lent: Lent) -> Result<(), Fatal> {
        let how = lent.ended.unwrap_or(Return::AtRest);
        let (received, sent) = lent.connection.sequences();
        let lease = lent.lease;
        drop(lent);
        self.return_blocks()?;
        self.say_returned(lease, how, received, sent)
    }

    fn say_returned(&mut self, lease: u64, how: Return, received: u64, sent: u64) -> Result<(), Fatal> {
        let sent = Inline::new(&sent.to_le_bytes()).expect("eight bytes");
        self.send_controller(&Descriptor::new(record::RETURNED, how as u16, lease, received, sent), None)
    }

    /// The controller wants the connection back. Whether it is here.
    pub(super) fn return_connection(&mut self, lease: u64) -> bool {
        match &mut self.lent {
            Some(lent) if lent.lease == lease => {
                lent.begin_return();
                true
            }
            _ => false,
        }
    }

    /// The input of a call on the connection, when its record does not hold it.
    pub(super) fn connection_input(&mut self, inline: Option<Inline>) -> Bytes<'static> {
        match self.lent.as_mut().and_then(|lent| lent.input.take()) {
            Some(Landing::Loan(loan)) => Place::Own(loan).into(),
            Some(Landing::Small { .. }) | None => inline.unwrap_or_else(Inline::empty).into(),
        }
    }

    /// Answers a call of the connection, and waits until the answer is written.
    pub(super) fn reply_on_connection(
        &mut self,
        call: u64,
        mut code: Code,
        mut status: i32,
        payload: Payload<'_>,
    ) -> Result<(), Fatal> {
        let Some(mut lent) = self.lent.take() else { return Ok(()) };
        let now = now_ns();
        let running = lent.running.take().filter(|running| running.call == call);
        let is_args = payload.is_args;
        let mut bytes = owned(payload.bytes);
        let too_late = match running {
            Some(Running { cancelled: true, .. }) => Some((Code::Cancelled, "cancelled by its caller")),
            Some(Running { deadline_ns, .. }) if now >= deadline_ns => {
                Some((Code::Timeout, "the deadline passed before the function answered"))
            }
            _ => None,
        };
        if let Some((how, text)) = too_late {
            (code, status, bytes) = (how, 0, text.as_bytes().to_vec().into());
        }
        let aux = u64::from(is_args && too_late.is_none());
        let header = Header { kind: frame::REPLY, flags: code as u16, status, call, aux, ..Header::default() };
        lent.send(&header, bytes);
        self.write_out(&mut lent)?;
        lent.since_ns = now;
        self.say_where(&lent);
        self.lent = Some(lent);
        Ok(())
    }

    /// Whether the client no longer waits for this call. Reads ahead to find out.
    pub(super) fn is_cancelled_on_connection(&mut self, call: u64) -> bool {
        let Some(lent) = &mut self.lent else { return true };
        while lent.ended.is_none() && lent.ahead.len() < AHEAD_MAX {
            match lent.connection.receive(&mut lent.scratch, &mut lent.room) {
                Ok(None) => break,
                Ok(Some(frame)) if frame.header.kind == frame::CANCEL && frame.header.call == call => {
                    if let Some(running) = &mut lent.running {
                        running.cancelled = true;
                    }
                }
                Ok(Some(frame)) => lent.ahead.push_back(frame),
                Err(error) => lent.ended = Some(how(&error)),
            }
        }
        lent.ended.is_some() || lent.running.as_ref().is_none_or(|running| running.cancelled)
    }

    /// A function panicked: its answer is written, and the connection goes back before we exit.
    pub(crate) fn give_back_before_exit(&mut self) -> Result<(), Fatal> {
        match self.lent.take() {
            None => Ok(()),
            Some(mut lent) => {
                if lent.connection.is_at_rest() && lent.ahead.is_empty() {
                    lent.ended.get_or_insert(Return::Panicked);
                } else {
                    lent.ended = Some(Return::Lost);
                }
                self.give_back(*lent)
            }
        }
    }
}

const DOORBELL: u64 = 0;
const SOCKET: u64 = 1;
const NO_EVENT: epoll::Event = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };

/// The edges of a doorbell, whose eventfd is never read, and of a socket, of which no more is said until something comes.
fn watch(doorbell: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    use epoll::EventFlags as On;
    let waits = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&waits, doorbell, epoll::EventData::new_u64(DOORBELL), On::IN | On::ET)?;
    epoll::add(&waits, socket, epoll::EventData::new_u64(SOCKET), On::IN | On::OUT | On::RDHUP | On::ET)?;
    Ok(waits)
}

/// Bytes that can wait to be written.
fn owned(bytes: Bytes<'_>) -> Bytes<'static> {
    let Bytes { inline, place } = bytes;
    let place = match place {
        Place::Here => Place::Here,
        Place::Slice(slice) => Place::Vec(slice.to_vec()),
        Place::Vec(vec) => Place::Vec(vec),
        Place::Held(held) => Place::Held(held),
        Place::Laned(laned) => Place::Laned(laned),
        Place::Own(loan) => Place::Own(loan),
        Place::Heap(buffer) => Place::Heap(buffer),
    };
    Bytes { inline, place }
}
