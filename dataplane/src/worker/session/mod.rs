//! A worker's side of everything: its channel to the controller, its leases, its nested calls.
//!
//! One thread, no locks. What arrives is handled by `poll_controller` (records from the controller), `poll_callee`
//! (answers to our leased calls) and `poll_caller` (requests under a lease we serve); `wait` calls them in turn and
//! decides between spinning and sleeping. Functions are not re-entered: while a nested call is waited for, requests
//! stay where they are.

mod batch;
mod calling;
mod connection;
mod endings;
mod lane;
mod line;
mod mail;
mod payloads;
mod questions;
mod serving;
mod state;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use praas_shm::{
    Bell, BlockRef, Body, Descriptor, Doorbell, ExchangeCallee, ExchangeCaller, ExchangeReply, Inline, Link,
    OwnSegment, ParticipantId, PeerSegment, Take, handover,
};
use praas_transport::queue::{Buffer, Message, Receiver, Sender};

use self::connection::Lent;
use self::lane::Lanes;
use self::line::{End, Line, Waited};
use self::mail::Names;
use self::questions::Questions;
pub(crate) use self::state::{Pinned, SharedState};
use crate::clock::now_ns;
use crate::error::{Failure, InvokeError, answer_did_not_fit};
use crate::payload::{BlockKey, Bytes, Giver, Held, Input, Loan, Memory, Output, Payload, Place, Reply, Store};
use crate::placement::{Patience, Yields};
use crate::wire::{Code, ToWorker, WorkerWelcome, record};
use crate::worker::Lease;

/// Nested calls that one function may have open.
pub(crate) const NESTED_MAX: usize = 1024;
/// Leased calls in flight that leave room in the answering ring for every answer.
const LEASED_MAX: u32 = 96;
/// Slots that answers to leased calls may take, the direct one included.
const ANSWERS_MAX: u32 = LEASED_MAX + 1;
/// Polls between two looks at the clock.
const POLLS_PER_LOOK: u32 = 256;
/// Looks at the words of a lease between two looks at everything else.
const WATCHES_PER_POLL: u32 = 8;
/// Deadline of a wait that the controller ends: past every clock, but not the `u64::MAX` of one that nothing ends.
const UNTIL_TOLD: u64 = u64::MAX - 1;
/// Bit of the number of a call that waits outside the window of nested calls.
const DIRECT: u64 = 1 << 63;
/// `activity` of a worker that waits for a nested call.
pub(crate) const ACTIVITY_WAITING: u64 = 1;
/// How long an answer waits for its bell while there is more to do.
const UNRUNG_NS: u64 = 20_000;
/// Longest text of an error.
const TEXT_BYTES_MAX: usize = 1024;

/// The worker cannot go on; it exits with this text.
#[derive(Debug)]
pub(crate) struct Fatal(pub(crate) String);

pub(crate) fn fatal(what: &str, why: impl std::fmt::Display) -> Fatal {
    Fatal(format!("{what}: {why}"))
}

#[derive(Debug)]
pub(crate) enum Channel {
    Ring { link: Link, own: OwnSegment, doorbell: Doorbell },
    Queue { sender: Sender, receiver: Receiver },
}

#[derive(Debug)]
struct Peer {
    incarnation: u64,
    segment: Arc<PeerSegment>,
    /// Until a link needs it.
    eventfd: Option<OwnedFd>,
    link: Option<Link>,
}

/// A lease we hold: `callee` serves us.
#[derive(Debug)]
struct Calling {
    lease: u64,
    callee: ParticipantId,
    exchange: ExchangeCaller,
    patience: Patience,
    /// Neither end needs a fence at the other's bell: who sleeps raises a barrier for both.
    unfenced: bool,
    /// First position of this lease in our ring to the callee.
    start: u64,
    in_flight: u32,
    /// Told the controller that a call of this lease overran.
    overran: bool,
    /// What the exchange call carried that we no longer wait for; the callee may still read it.
    left: Carried,
}

/// A lease we serve.
#[derive(Debug)]
struct Serving {
    lease: u64,
    caller: ParticipantId,
    exchange: ExchangeCallee,
    patience: Patience,
    unfenced: bool,
}

/// How the lease that an exchange was waiting on came to its end.
#[derive(Debug)]
struct Parted {
    exchange: ExchangeCaller,
    callee: ParticipantId,
    death: Option<Death>,
}

/// A dead callee's last words: what it had begun on, and what it died of.
#[derive(Debug)]
struct Death {
    taken: u64,
    exchange_taken: u32,
    how: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Controller,
    Ring(ParticipantId),
    Exchange(ParticipantId),
    Queue(ParticipantId),
    /// The client whose connection was lent to us.
    Connection,
}

impl Origin {
    /// Who waits for the answer.
    pub(crate) fn participant(self) -> ParticipantId {
        match self {
            Origin::Controller | Origin::Connection => ParticipantId::CONTROLLER,
            Origin::Ring(caller) | Origin::Exchange(caller) | Origin::Queue(caller) => caller,
        }
    }
}

/// A request for one of our functions, as it arrived.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) origin: Origin,
    /// `id` is the controller's key, the caller's number, or the exchange's sequence.
    pub(crate) request: Descriptor,
    /// Of the controller's: where it stands in its ring.
    pub(crate) position: u64,
    /// Queue channel: the input, when the record does not hold it.
    pub(crate) heap: Option<Buffer>,
}

impl Incoming {
    pub(crate) fn none() -> Incoming {
        Incoming { origin: Origin::Controller, request: Descriptor::bare(0, 0, 0, 0), position: 0, heap: None }
    }
}

/// What of ours a call carries until it is answered: a block we lent, or somebody else's that we passed on (kept in `passed`).
#[derive(Debug, Clone, Copy)]
enum Carried {
    Nothing,
    Lent(BlockRef),
    Passed(BlockKey),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Controller,
    Ring {
        position: u64,
    },
    /// To another process, through the controller.
    Away,
}

impl Route {
    /// Under a lease: we keep its deadline, and its answer comes from the callee.
    #[inline(always)]
    fn is_leased(self) -> bool {
        matches!(self, Route::Ring { .. })
    }
}

#[derive(Debug)]
struct NestedCall {
    route: Route,
    carried: Carried,
    deadline_ns: u64,
    outcome: Outcome,
    /// The far end has answered, or is known never to.
    settled: bool,
    /// Somebody holds a handle and may ask for the outcome.
    wanted: bool,
}

#[derive(Debug)]
enum Outcome {
    None,
    /// A reply that was short enough for its record.
    Short(i32, Inline),
    Reply(Reply),
    Failed(Box<InvokeError>),
}

impl From<Result<Reply, InvokeError>> for Outcome {
    fn from(result: Result<Reply, InvokeError>) -> Outcome {
        match result {
            Ok(reply) => Outcome::Reply(reply),
            Err(error) => Outcome::Failed(Box::new(error)),
        }
    }
}

impl Outcome {
    #[inline(always)]
    fn is_none(&self) -> bool {
        matches!(self, Outcome::None)
    }

    #[inline(always)]
    fn take(&mut self) -> Option<Result<Reply, InvokeError>> {
        if let Outcome::Short(status, inline) = *self {
            *self = Outcome::None;
            return Some(Ok(Reply { status, bytes: inline.into() }));
        }
        self.take_other()
    }

    fn take_other(&mut self) -> Option<Result<Reply, InvokeError>> {
        match std::mem::replace(self, Outcome::None) {
            Outcome::None => None,
            Outcome::Short(status, inline) => Some(Ok(Reply { status, bytes: inline.into() })),
            Outcome::Reply(reply) => Some(Ok(reply)),
            Outcome::Failed(error) => Some(Err(*error)),
        }
    }
}

/// Open nested calls, by number: a window that moves on as its oldest calls are settled and collected.
#[derive(Debug, Default)]
struct Nested {
    first: u64,
    next: u64,
    /// A power of two of places, those outside the window idle; a call is written into its place, never moved.
    places: Vec<NestedCall>,
}

impl Nested {
    fn len(&self) -> usize {
        usize::try_from(self.next - self.first).expect("at most NESTED_MAX")
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "reduced to the places there are")]
    fn place(&self, number: u64) -> usize {
        number as usize & self.places.len().wrapping_sub(1)
    }

    #[inline(always)]
    fn get(&mut self, number: u64) -> Option<&mut NestedCall> {
        let place = self.place(number);
        if (self.first..self.next).contains(&number) { self.places.get_mut(place) } else { None }
    }

    fn has_outcome(&self, number: u64) -> bool {
        (self.first..self.next).contains(&number) && !self.places[self.place(number)].outcome.is_none()
    }

    fn calls(&mut self) -> impl Iterator<Item = &mut NestedCall> {
        // Places outside the window are settled and wanted by nobody.
        self.places.iter_mut()
    }

    /// Opens the next call; its number is `next`.
    #[inline(always)]
    fn open(&mut self, route: Route, deadline_ns: u64, carried: Carried) -> u64 {
        if self.len() == self.places.len() {
            self.grow();
        }
        let number = self.next;
        self.next += 1;
        let place = self.place(number);
        let call = &mut self.places[place];
        (call.route, call.carried, call.deadline_ns) = (route, carried, deadline_ns);
        (call.settled, call.wanted) = (false, true);
        number
    }

    #[cold]
    fn grow(&mut self) {
        let mut open = Vec::with_capacity(self.places.len());
        for number in self.first..self.next {
            let place = self.place(number);
            open.push((number, std::mem::replace(&mut self.places[place], NestedCall::idle())));
        }
        let places = (self.places.len() * 2).max(16);
        self.places.resize_with(places, NestedCall::idle);
        for (number, call) in open {
            let place = self.place(number);
            self.places[place] = call;
        }
    }

    fn trim(&mut self) {
        while self.first < self.next {
            let place = self.place(self.first);
            let call = &self.places[place];
            if !call.settled || call.wanted {
                return;
            }
            self.first += 1;
        }
    }
}

impl NestedCall {
    fn idle() -> NestedCall {
        let (route, carried, outcome) = (Route::Controller, Carried::Nothing, Outcome::None);
        NestedCall { route, carried, deadline_ns: 0, outcome, settled: true, wanted: false }
    }
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) welcome: WorkerWelcome,
    pub(crate) me: ParticipantId,
    pub(crate) functions: Vec<String>,
    /// By function, whether its calls are run together; empty when that is so of none.
    batched: Vec<bool>,
    /// The calls that are run together now and have no answer, with the blocks of their inputs.
    pub(crate) batch: VecDeque<(u64, Option<BlockKey>)>,
    pub(crate) memory: Rc<Memory>,
    control: OwnedFd,
    channel: Channel,
    peers: Vec<Option<Peer>>,
    calling: Option<Calling>,
    serving: Option<Serving>,
    /// Ring channel: the state, as far as we read it ourselves.
    state: Option<SharedState>,
    questions: Questions,
    names: Names,
    lanes: Lanes,
    /// The key of the message that comes next, when it does not come with it.
    said_key: Option<Vec<u8>>,
    /// Bytes of the value that was encoded last.
    pub(crate) encoded_bytes: usize,
    /// The client's connection that we serve.
    lent: Option<Box<Lent>>,
    parted: Option<Parted>,
    /// Queue channel: the leases we hold and serve, and the one that ended last with what its callee died of.
    calling_line: Option<Line>,
    serving_line: Option<Line>,
    line_ended: Option<(Line, Option<String>)>,
    nested: Nested,
    /// Other people's blocks that we passed on and are not back.
    passed: Vec<Held>,
    inbox: VecDeque<Incoming>,
    /// Since when answers lie in our ring that the controller was not rung for.
    unrung_ns: Option<u64>,
    revoked: Option<u64>,
    cancelled: u64,
    shutdown: bool,
    exchange_wanted: bool,
    /// Direct calls over rings so far, and the answer to the last one when it was taken while something else was.
    direct_calls: u64,
    direct_reply: Option<Descriptor>,
    /// A direct call waits, and deals with the end of its lease itself.
    awaiting: bool,
    yields: Yields,
}

impl Session {
    pub(crate) fn new(
        welcome: WorkerWelcome,
        me: ParticipantId,
        functions: Vec<String>,
        control: OwnedFd,
        channel: Channel,
        controller: Option<(Arc<PeerSegment>, u64, SharedState)>,
    ) -> Result<Session, Fatal> {
        let arena = match &channel {
            Channel::Ring { own, .. } => Some(RefCell::new(own.arena().map_err(|e| fatal("cannot use the arena", e))?)),
            Channel::Queue { .. } => None,
        };
        let memory = Memory {
            arena,
            returned: RefCell::default(),
            payload_bytes_max: welcome.payload_bytes_max,
            current: Cell::default(),
            batch: RefCell::default(),
            spare: RefCell::default(),
        };
        let mut peers: Vec<Option<Peer>> = (0..praas_shm::PARTICIPANTS_MAX).map(|_| None).collect();
        let mut state = None;
        if let Some((segment, incarnation, shared)) = controller {
            peers[0] = Some(Peer { incarnation, segment, eventfd: None, link: None });
            state = Some(shared);
        }
        Ok(Session {
            welcome,
            me,
            functions,
            batched: Vec::new(),
            batch: VecDeque::new(),
            memory: Rc::new(memory),
            control,
            channel,
            peers,
            calling: None,
            serving: None,
            state,
            questions: Questions::default(),
            names: Names::default(),
            lanes: Lanes::default(),
            said_key: None,
            encoded_bytes: 0,
            lent: None,
            parted: None,
            calling_line: None,
            serving_line: None,
            line_ended: None,
            nested: Nested::default(),
            passed: Vec::new(),
            inbox: VecDeque::new(),
            unrung_ns: None,
            revoked: None,
            cancelled: u64::MAX,
            shutdown: false,
            exchange_wanted: true,
            direct_calls: 0,
            direct_reply: None,
            awaiting: false,
            yields: Yields::default(),
        })
    }

    /// Who serves us, and how the next call would travel there.
    pub(crate) fn leased(&self) -> Option<(ParticipantId, Lease)> {
        let way = if self.exchange_wanted { Lease::Exchange } else { Lease::Ring };
        let direct = self.calling.as_ref().map(|calling| (calling.callee, way));
        direct.or_else(|| self.calling_line.as_ref().map(|line| (line.peer, Lease::Queue)))
    }

    pub(crate) fn prefer_exchange(&mut self, wanted: bool) {
        self.exchange_wanted = wanted;
    }

    // ---- waiting ----------------------------------------------------------------------------------------------

    /// Waits until `ready` or the deadline: spins, then yields, then sleeps, as patience has it. `ready` only looks;
    /// what it sees is taken by the caller, all of it, since what is left behind rings no bell. False at the deadline.
    #[inline(always)]
    fn wait(&mut self, patience: Patience, deadline_ns: u64, ready: impl Fn(&mut Self) -> bool) -> Result<bool, Fatal> {
        if patience.spin_ns > 0 {
            for _ in 0..POLLS_PER_LOOK {
                if ready(self) {
                    return Ok(true);
                }
            }
        }
        self.wait_long(patience, deadline_ns, ready)
    }

    /// Looks closely at what the far end of a lease may change. False after a while, or when the controller speaks.
    #[inline(always)]
    fn watch(&self, changed: impl Fn() -> bool) -> bool {
        for _ in 0..POLLS_PER_LOOK / WATCHES_PER_POLL {
            for _ in 0..WATCHES_PER_POLL {
                if changed() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if self.controller_ready() {
                return false;
            }
        }
        false
    }

    #[cold]
    #[inline(never)]
    fn wait_long(
        &mut self,
        patience: Patience,
        deadline_ns: u64,
        ready: impl Fn(&mut Self) -> bool,
    ) -> Result<bool, Fatal> {
        if let Channel::Queue { receiver, .. } = &mut self.channel
            && let Some(spare) = self.memory.spare.borrow_mut().pop()
        {
            receiver.recycle(spare);
        }
        let nested = deadline_ns != u64::MAX;
        if patience == Patience::NONE && !nested {
            // Nothing to measure: three looks at the clock less between an answer and the next request.
            while !ready(self) {
                self.return_blocks()?;
                self.sleep(deadline_ns, &ready)?;
            }
            return Ok(true);
        }
        let linger_ns = self.linger_ns(patience);
        let mut since_ns = now_ns();
        let in_time = 'waiting: loop {
            self.look_at_queue()?;
            if ready(self) {
                break true;
            }
            let now = now_ns();
            if now >= deadline_ns {
                break false;
            }
            let waited_ns = now.saturating_sub(since_ns);
            if waited_ns < patience.spin_ns {
                for _ in 0..POLLS_PER_LOOK {
                    if ready(self) {
                        break 'waiting true;
                    }
                    std::hint::spin_loop();
                }
                continue;
            }
            if nested {
                self.set_activity(ACTIVITY_WAITING);
            }
            self.return_blocks()?;
            if waited_ns >= linger_ns {
                self.sleep(deadline_ns, &ready)?;
                since_ns = now_ns();
            } else if patience.spin_ns > 0 {
                rustix::thread::sched_yield();
            } else {
                self.yields.yield_core(now);
            }
        };
        if nested {
            self.set_activity(0);
        }
        Ok(in_time)
    }

    /// How long this wait yields. Those that spin first have a core of their own, as far as anybody knows.
    fn linger_ns(&mut self, patience: Patience) -> u64 {
        if patience.spin_ns > 0 || self.yields.allowed() {
            return patience.linger_ns;
        }
        self.yields.count_wait();
        0
    }

    fn sleep(&mut self, deadline_ns: u64, ready: &impl Fn(&mut Self) -> bool) -> Result<(), Fatal> {
        self.settle_lanes();
        self.arm()?;
        if let Channel::Ring { .. } = &self.channel
            && ready(self)
        {
            if let Channel::Ring { doorbell, .. } = &self.channel {
                doorbell.disarm();
            }
            return Ok(());
        }
        // The controller keeps the deadlines of what goes through it: it tells us.
        let left = (deadline_ns < UNTIL_TOLD).then(|| Duration::from_nanos(deadline_ns.saturating_sub(now_ns())));
        match &mut self.channel {
            Channel::Ring { doorbell, .. } => {
                doorbell.sleep(left).map_err(|e| fatal("cannot sleep on the doorbell", e))?;
            }
            Channel::Queue { receiver, .. } => {
                let until = left.map(|left| std::time::Instant::now() + left);
                let spin = Duration::from_nanos(self.welcome.patience.spin_ns);
                if let Some(message) = receiver.receive_until(spin, until).map_err(|e| fatal("queue", e))? {
                    self.take_message(message)?;
                }
            }
        }
        Ok(())
    }

    /// Before the last look of a sleeper: whoever publishes after it sees us asleep and rings.
    fn arm(&self) -> Result<(), Fatal> {
        let Channel::Ring { doorbell, .. } = &self.channel else { return Ok(()) };
        if self.serving.as_ref().is_some_and(|serving| serving.unfenced)
            || self.calling.as_ref().is_some_and(|calling| calling.unfenced)
        {
            return doorbell.arm_for_unfenced().map_err(|e| fatal("cannot raise a memory barrier", e));
        }
        doorbell.arm();
        Ok(())
    }

    #[inline(always)]
    fn controller_ready(&self) -> bool {
        matches!(&self.channel, Channel::Ring { link, .. } if link.consumer.ready())
    }

    #[inline(always)]
    fn ring_ready(&self, from: ParticipantId) -> bool {
        self.linked(from).is_some_and(|link| link.consumer.ready())
    }

    #[inline(always)]
    fn linked(&self, to: ParticipantId) -> Option<&Link> {
        self.peers[to.index()].as_ref().and_then(|peer| peer.link.as_ref())
    }

    /// Whether both ends of a lease leave the fence to whoever sleeps. Those that sleep at once would pay more than they save.
    fn unfenced(&self, patience: Patience) -> bool {
        self.welcome.barriers && patience.spin_ns > 0
    }

    fn set_activity(&self, activity: u64) {
        if let Channel::Ring { own, .. } = &self.channel {
            own.set_activity(activity);
        }
    }

    // ---- the controller ---------------------------------------------------------------------------------------

    /// Answers the controller. With its next request here already the bell waits, for a little while, until there is none: a controller
    /// that shares our core would take it from us for each answer. It looks by itself within a millisecond meanwhile.
    fn answer_controller(&mut self, reply: &Descriptor, body: Option<Buffer>) -> Result<(), Fatal> {
        if let Channel::Ring { link, .. } = &mut self.channel
            && link.consumer.ready()
            && link.producer.try_send(reply).is_ok()
        {
            let now = now_ns();
            if now - *self.unrung_ns.get_or_insert(now) > UNRUNG_NS {
                self.ring_controller();
            }
            return Ok(());
        }
        self.send_controller(reply, body)
    }

    #[inline]
    fn ring_controller(&mut self) {
        self.unrung_ns = None;
        if let Channel::Ring { link, .. } = &self.channel {
            link.bell.ring();
        }
    }

    fn send_controller(&mut self, descriptor: &Descriptor, body: Option<Buffer>) -> Result<(), Fatal> {
        match &mut self.channel {
            Channel::Ring { link, .. } => {
                // The controller always reads; if it is gone, so are we.
                while link.producer.try_send(descriptor).is_err() {
                    link.bell.ring();
                    rustix::thread::sched_yield();
                }
                self.ring_controller();
            }
            Channel::Queue { sender, .. } => {
                let body = body.unwrap_or_else(|| Buffer::with_len(0));
                sender
                    .queue(Message { head: descriptor.to_bytes(), body })
                    .map_err(|_| Fatal("queue to the controller: a message is still on its way".into()))?;
                // Our end blocks: this returns when all of it is with the kernel.
                let _ = sender.flush().map_err(|e| fatal("queue to the controller", e))?;
                while let Some(sent) = sender.take_sent() {
                    self.memory.recycle(sent.body);
                }
            }
        }
        Ok(())
    }

    fn tell_controller(&mut self, kind: u8, tag: u16, id: u64, aux: u64) -> Result<(), Fatal> {
        self.send_controller(&Descriptor::bare(kind, tag, id, aux), None)
    }

    /// Takes one record from the controller, if there is one. Rings only; a queue is read in `sleep` and `look_at_queue`.
    fn poll_controller(&mut self) -> Result<bool, Fatal> {
        let Channel::Ring { link, .. } = &mut self.channel else { return Ok(false) };
        match link.consumer.poll() {
            Ok(None) => Ok(false),
            Ok(Some(descriptor)) => self.take_record(&descriptor, None).map(|()| true),
            Err(bad) => Err(fatal("bad record from the controller", bad)),
        }
    }

    fn take_message(&mut self, message: Message) -> Result<(), Fatal> {
        let descriptor =
            Descriptor::from_bytes(&message.head).map_err(|e| fatal("bad record from the controller", e))?;
        self.take_record(&descriptor, Some(message.body))
    }

    fn take_record(&mut self, descriptor: &Descriptor, heap: Option<Buffer>) -> Result<(), Fatal> {
        let (kind, tag, id, aux) = (descriptor.kind(), descriptor.tag(), descriptor.id(), descriptor.aux());
        let giver = self.giver(ParticipantId::CONTROLLER);
        match kind & record::KIND {
            record::REQUEST | record::BATCH | record::JOIN => {
                let position = match &self.channel {
                    Channel::Ring { link, .. } => link.consumer.head() - 1,
                    Channel::Queue { .. } => 0,
                };
                self.inbox.push_back(Incoming { origin: Origin::Controller, request: *descriptor, position, heap });
            }
            record::REPLY => self.settle(descriptor, giver, heap)?,
            record::RELEASE => self.released(giver_of_release(tag), descriptor.block()),
            record::NOTICE => self.read_control()?,
            record::PEER_GONE => {
                let gone = participant(tag)?;
                let how = Cause::describe(aux);
                self.peer_gone(gone, &how)?;
            }
            record::REVOKE => self.revoked = Some(id),
            record::ENDED => self.lease_ended(id)?,
            record::CANCEL => self.cancelled = id,
            record::SHUTDOWN => self.shutdown = true,
            record::KEY_IS => self.take_key(descriptor, heap)?,
            record::LANE => self.lane_changed(id, tag),
            record::ANSWER | record::MAPPED | record::SETTLED => self.take_state_record(descriptor, heap),
            record::OFFER => self.questions.offer = Some(*descriptor),
            _ => return Err(fatal("record of an unknown kind from the controller", kind)),
        }
        Ok(())
    }

    fn read_control(&mut self) -> Result<(), Fatal> {
        let mut buffer = [0; 4096];
        let (bytes, fds) = handover::receive(self.control.as_fd(), &mut buffer)
            .map_err(|e| fatal("cannot read the control socket", e))?;
        let message =
            serde_json::from_slice(&buffer[..bytes]).map_err(|e| fatal("bad message from the controller", e))?;
        let mut fds = fds.into_iter();
        let mut fd = || fds.next().ok_or(Fatal("a message without its file descriptor".into()));
        match message {
            ToWorker::Peer { participant: number, incarnation } => {
                let segment = super::attach(&self.welcome, number, incarnation, fd()?)?;
                let peer = Peer { incarnation, segment, eventfd: Some(fd()?), link: None };
                self.peers[usize::from(number)] = Some(peer);
            }
            ToWorker::Estate { participant, incarnation } => self.take_estate(participant, incarnation, fd()?)?,
            ToWorker::Lease { lease, callee, patience } if matches!(self.channel, Channel::Queue { .. }) => {
                let callee = participant(u16::from(callee))?;
                let (to, from) = (fd()?, fd()?);
                let line = Line::new(lease, callee, patience, to, from, self.welcome.payload_bytes_max)?;
                self.calling_line = Some(line);
                self.tell_controller(record::TAKEN, 0, lease, 0)?;
            }
            ToWorker::Serve { lease, caller, patience, .. } if matches!(self.channel, Channel::Queue { .. }) => {
                let caller = participant(u16::from(caller))?;
                let (from, to) = (fd()?, fd()?);
                let line = Line::new(lease, caller, patience, to, from, self.welcome.payload_bytes_max)?;
                self.serving_line = Some(line);
            }
            ToWorker::Lease { lease, callee, patience } => {
                let callee = participant(u16::from(callee))?;
                let exchange = ExchangeCaller::from_fd(fd()?).map_err(|e| fatal("cannot map the exchange page", e))?;
                let start = self.link_to(callee)?.producer.tail();
                self.calling = Some(Calling {
                    lease,
                    callee,
                    exchange,
                    patience,
                    unfenced: self.unfenced(patience),
                    start,
                    in_flight: 0,
                    overran: false,
                    left: Carried::Nothing,
                });
                self.tell_controller(record::TAKEN, 0, lease, start)?;
            }
            ToWorker::Serve { lease, caller, position, patience } => {
                let caller = participant(u16::from(caller))?;
                let exchange = ExchangeCallee::from_fd(fd()?).map_err(|e| fatal("cannot map the exchange page", e))?;
                // A position out of range is the caller's lie: its lease is not served, and closed when revoked.
                if self.link_to(caller)?.consumer.skip_to(position).is_ok() {
                    let unfenced = self.unfenced(patience);
                    self.serving = Some(Serving { lease, caller, exchange, patience, unfenced });
                }
            }
            ToWorker::Connection(lent) => {
                let crate::wire::LentConnection { lease, function, patience, deadline_ns, .. } = *lent;
                let socket = fd()?;
                self.take_connection(lease, function, patience, deadline_ns, lent.into_terms(), socket)?;
            }
            ToWorker::MakeLane { lane } => self.make_lane(lane)?,
            ToWorker::JoinLane(join) => {
                let files = [fd()?, fd()?, fd()?, fd()?];
                self.join_lane(&join, files);
            }
            ToWorker::Welcome(_) | ToWorker::Attached { .. } => {
                return Err(Fatal("the controller greeted twice".into()));
            }
        }
        Ok(())
    }

    /// The link to a peer that the controller introduced, made on first use.
    fn link_to(&mut self, to: ParticipantId) -> Result<&mut Link, Fatal> {
        let Channel::Ring { own, .. } = &self.channel else {
            return Err(Fatal("leases need rings".into()));
        };
        let peer = self.peers[to.index()].as_mut().ok_or_else(|| fatal("a lease with a stranger", to))?;
        if peer.link.is_none() {
            let eventfd = peer.eventfd.take().ok_or_else(|| fatal("no doorbell of", to))?;
            let link = Link::establish(own, Arc::clone(&peer.segment), eventfd).map_err(|e| fatal("cannot link", e))?;
            peer.link = Some(link);
        }
        Ok(peer.link.as_mut().expect("made above"))
    }

    #[inline]
    fn link(&mut self, to: ParticipantId) -> &mut Link {
        self.peers[to.index()].as_mut().and_then(|peer| peer.link.as_mut()).expect("a lease has a link")
    }

    fn giver(&self, participant: ParticipantId) -> Giver {
        let incarnation = self.peers[participant.index()].as_ref().map_or(0, |peer| peer.incarnation);
        Giver { participant, incarnation }
    }
}

#[inline(always)]
fn ring(bell: &Bell, unfenced: bool) {
    if unfenced {
        bell.ring_unfenced();
    } else {
        bell.ring();
    }
}

fn same_block(a: &BlockRef, b: &BlockRef) -> bool {
    BlockKey::from(a) == BlockKey::from(b)
}

fn key(held: &Held) -> BlockKey {
    BlockKey::from(&held.block())
}

fn carried_body(body: Body, carried: &Carried) -> Body {
    match carried {
        Carried::Lent(block) => Body::Block(*block),
        _ => body,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a status is the low half")]
fn status(aux: u64) -> i32 {
    (aux as u32).cast_signed()
}

fn lost(how: &str) -> InvokeError {
    InvokeError::WorkerLost { text: format!("the worker that ran the call {how}; it may have run") }
}

fn participant(tag: u16) -> Result<ParticipantId, Fatal> {
    let number = u8::try_from(tag).ok().and_then(ParticipantId::new);
    number.ok_or_else(|| fatal("the controller named a participant out of range", tag))
}

fn giver_of_release(tag: u16) -> Option<ParticipantId> {
    u8::try_from(tag).ok().and_then(ParticipantId::new)
}

/// Causes of death as a word on the wire.
pub(crate) struct Cause;

impl Cause {
    /// `signal` or `1 << 32 | code`.
    pub(crate) fn describe(word: u64) -> String {
        if let Some(limit) = crate::controller::Limit::from_word(word) {
            return limit.to_string();
        }
        let low = word & 0xffff_ffff;
        match word >> 32 {
            0 => format!("was killed by signal {low}"),
            _ => format!("exited with code {low}"),
        }
    }
}

/// Ends this worker: without its controller it has no purpose.
pub(crate) fn die(text: &str) -> ! {
    eprintln!("praas-worker: {text}");
    std::process::exit(crate::exit::WORKER_PROTOCOL);
}
