//! A worker's side of everything: its channel to the controller, its leases, its nested calls.
//!
//! One thread, no locks. What arrives is handled by `poll_controller` (records from the controller), `poll_callee`
//! (answers to our leased calls) and `poll_caller` (requests under a lease we serve); `wait` calls them in turn and
//! decides between spinning and sleeping. Functions are not re-entered: while a nested call is waited for, requests
//! stay where they are.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use praas_shm::{
    BlockRef, Body, Descriptor, Doorbell, ExchangeCallee, ExchangeCaller, ExchangeReply, Inline, Link, OwnSegment,
    ParticipantId, PeerSegment, handover,
};
use praas_transport::queue::{Buffer, Message, Receiver, Sender};

use crate::clock::now_ns;
use crate::error::InvokeError;
use crate::payload::{BlockKey, Bytes, Giver, Held, Input, Loan, Memory, Payload, Reply, Source, Store};
use crate::placement::Patience;
use crate::wire::{Code, ToWorker, WorkerWelcome, record};

/// Nested calls that one function may have open.
pub(crate) const NESTED_MAX: usize = 1024;
/// Leased calls in flight that leave room in the answering ring for every answer.
const LEASED_MAX: u32 = 96;
/// Slots that answers to leased calls may take, the direct one included.
const ANSWERS_MAX: u32 = LEASED_MAX + 1;
/// Polls between two looks at the clock.
const POLLS_PER_LOOK: u32 = 256;
/// Deadline of a wait that the controller ends: past every clock, but not the `u64::MAX` of one that nothing ends.
const UNTIL_TOLD: u64 = u64::MAX - 1;
/// Bit of the number of a call that waits outside the window of nested calls.
const DIRECT: u64 = 1 << 63;
/// `activity` of a worker that waits for a nested call.
pub(crate) const ACTIVITY_WAITING: u64 = 1;
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
}

/// A request for one of our functions, as it arrived.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) origin: Origin,
    /// `id` is the controller's key, the caller's number, or the exchange's sequence.
    pub(crate) request: Descriptor,
    /// Queue channel: the input, when the record does not hold it.
    pub(crate) heap: Option<Buffer>,
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
    Ring { position: u64 },
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
    fn take(&mut self) -> Option<Result<Reply, InvokeError>> {
        match std::mem::replace(self, Outcome::None) {
            Outcome::None => None,
            Outcome::Reply(reply) => Some(Ok(reply)),
            Outcome::Failed(error) => Some(Err(*error)),
        }
    }
}

/// Open nested calls, by number: a window that moves on as its oldest calls are settled and collected.
#[derive(Debug, Default)]
struct Nested {
    first: u64,
    calls: VecDeque<NestedCall>,
}

impl Nested {
    fn get(&mut self, number: u64) -> Option<&mut NestedCall> {
        let index = number.checked_sub(self.first)?;
        self.calls.get_mut(usize::try_from(index).ok()?)
    }

    fn has_outcome(&self, number: u64) -> bool {
        let index = number.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| self.calls.get(index)).is_some_and(|call| !matches!(call.outcome, Outcome::None))
    }

    fn next(&self) -> u64 {
        self.first + self.calls.len() as u64
    }

    fn trim(&mut self) {
        while self.calls.front().is_some_and(|call| call.settled && !call.wanted) {
            self.calls.pop_front();
            self.first += 1;
        }
    }
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) welcome: WorkerWelcome,
    pub(crate) me: ParticipantId,
    pub(crate) functions: Vec<String>,
    pub(crate) memory: Rc<Memory>,
    control: OwnedFd,
    channel: Channel,
    peers: Vec<Option<Peer>>,
    calling: Option<Calling>,
    serving: Option<Serving>,
    parted: Option<Parted>,
    nested: Nested,
    /// Other people's blocks that we passed on and are not back.
    passed: Vec<Held>,
    inbox: VecDeque<Incoming>,
    revoked: Option<u64>,
    cancelled: u64,
    shutdown: bool,
    exchange_wanted: bool,
    /// Direct calls over rings so far, and the answer to the last one when it was taken while something else was.
    direct_calls: u64,
    direct_reply: Option<Descriptor>,
    /// A direct call waits, and deals with the end of its lease itself.
    awaiting: bool,
}

const NO_HOLD: Inline = Inline::EMPTY;

impl Session {
    pub(crate) fn new(
        welcome: WorkerWelcome,
        me: ParticipantId,
        functions: Vec<String>,
        control: OwnedFd,
        channel: Channel,
        controller: Option<(Arc<PeerSegment>, u64)>,
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
            spare: RefCell::default(),
        };
        let mut peers: Vec<Option<Peer>> = (0..praas_shm::PARTICIPANTS_MAX).map(|_| None).collect();
        peers[0] = controller.map(|(segment, incarnation)| Peer { incarnation, segment, eventfd: None, link: None });
        Ok(Session {
            welcome,
            me,
            functions,
            memory: Rc::new(memory),
            control,
            channel,
            peers,
            calling: None,
            serving: None,
            parted: None,
            nested: Nested::default(),
            passed: Vec::new(),
            inbox: VecDeque::new(),
            revoked: None,
            cancelled: u64::MAX,
            shutdown: false,
            exchange_wanted: true,
            direct_calls: 0,
            direct_reply: None,
            awaiting: false,
        })
    }

    pub(crate) fn leased(&self) -> Option<(ParticipantId, bool)> {
        self.calling.as_ref().map(|calling| (calling.callee, self.exchange_wanted))
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

    #[cold]
    #[inline(never)]
    fn wait_long(
        &mut self,
        patience: Patience,
        deadline_ns: u64,
        ready: impl Fn(&mut Self) -> bool,
    ) -> Result<bool, Fatal> {
        let mut since_ns = now_ns();
        let nested = deadline_ns != u64::MAX;
        loop {
            if ready(self) {
                return Ok(true);
            }
            let now = now_ns();
            if now >= deadline_ns {
                return Ok(false);
            }
            let waited_ns = now.saturating_sub(since_ns);
            if waited_ns < patience.spin_ns {
                for _ in 0..POLLS_PER_LOOK {
                    if ready(self) {
                        return Ok(true);
                    }
                    std::hint::spin_loop();
                }
                continue;
            }
            if nested {
                self.set_activity(ACTIVITY_WAITING);
            }
            self.return_blocks()?;
            if waited_ns < patience.linger_ns {
                rustix::thread::sched_yield();
            } else {
                self.sleep(deadline_ns, &ready)?;
                since_ns = now_ns();
            }
            if nested {
                self.set_activity(0);
            }
        }
    }

    fn sleep(&mut self, deadline_ns: u64, ready: &impl Fn(&mut Self) -> bool) -> Result<(), Fatal> {
        // Armed before the last look: whoever publishes after it sees us asleep and rings.
        if let Channel::Ring { doorbell, .. } = &self.channel {
            doorbell.arm();
            if ready(self) {
                if let Channel::Ring { doorbell, .. } = &self.channel {
                    doorbell.disarm();
                }
                return Ok(());
            }
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
                if let Some(spare) = self.memory.spare.borrow_mut().pop() {
                    receiver.recycle(spare);
                }
                if let Some(message) = receiver.receive_until(spin, until).map_err(|e| fatal("queue", e))? {
                    self.take_message(message)?;
                }
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn controller_ready(&self) -> bool {
        matches!(&self.channel, Channel::Ring { link, .. } if link.consumer.ready())
    }

    #[inline(always)]
    fn ring_ready(&self, from: ParticipantId) -> bool {
        let peer = self.peers[from.index()].as_ref();
        peer.and_then(|peer| peer.link.as_ref()).is_some_and(|link| link.consumer.ready())
    }

    fn set_activity(&self, activity: u64) {
        if let Channel::Ring { own, .. } = &self.channel {
            own.set_activity(activity);
        }
    }

    // ---- the controller ---------------------------------------------------------------------------------------

    fn send_controller(&mut self, descriptor: &Descriptor, body: Option<Buffer>) -> Result<(), Fatal> {
        match &mut self.channel {
            Channel::Ring { link, .. } => {
                // The controller always reads; if it is gone, so are we.
                while link.producer.try_send(descriptor).is_err() {
                    link.bell.ring();
                    rustix::thread::sched_yield();
                }
                link.bell.ring();
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
        self.send_controller(&Descriptor { kind, tag, id, aux, body: Body::Inline(NO_HOLD) }, None)
    }

    /// Takes one record from the controller, if there is one. Rings only; a queue is read in `sleep_and_look`.
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
        let Descriptor { kind, tag, id, aux, .. } = *descriptor;
        let giver = self.giver(ParticipantId::CONTROLLER);
        match kind & record::KIND {
            record::REQUEST => {
                self.inbox.push_back(Incoming { origin: Origin::Controller, request: *descriptor, heap });
            }
            record::REPLY => self.settle(descriptor, giver, heap)?,
            record::RELEASE => self.released(giver_of_release(tag), descriptor.body),
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
            ToWorker::Lease { lease, callee, patience } => {
                let callee = participant(u16::from(callee))?;
                let exchange = ExchangeCaller::from_fd(fd()?).map_err(|e| fatal("cannot map the exchange page", e))?;
                let start = self.link_to(callee)?.producer.tail();
                self.calling = Some(Calling {
                    lease,
                    callee,
                    exchange,
                    patience,
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
                    self.serving = Some(Serving { lease, caller, exchange, patience });
                }
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

    // ---- payloads ---------------------------------------------------------------------------------------------

    /// Makes received bytes readable where they are.
    #[inline(always)]
    fn receive(&self, body: Body, giver: Giver, heap: Option<Buffer>) -> Result<(Bytes, Option<BlockKey>), Fatal> {
        match (body, heap) {
            (_, Some(buffer)) if !buffer.as_ref().is_empty() => Ok((Bytes::Heap(buffer), None)),
            (Body::Inline(inline), _) => Ok((Bytes::Inline(inline), None)),
            (Body::Block(block), _) => {
                let peer = self.peers[block.owner.index()].as_ref();
                let peer = peer.ok_or_else(|| fatal("a block of a stranger", block.owner))?;
                let view = peer.segment.view(&block).map_err(|e| fatal("a block out of bounds", e))?;
                let held = Held::new(view, giver, peer.incarnation, &self.memory);
                Ok((Bytes::Held(held), Some(BlockKey::from(&block))))
            }
        }
    }

    fn lend(&self, loan: Loan, to: ParticipantId) -> BlockRef {
        let Store::Block(block) = loan.into_store() else { unreachable!("a ring's memory is its arena") };
        let arena = self.memory.arena.as_ref().expect("a ring has an arena");
        let bytes = block.len();
        arena.borrow_mut().lend(block, bytes, to)
    }

    /// Readies bytes for `to`: inside the record, as a block of ours, as somebody else's block, or as a heap buffer.
    #[inline(always)]
    fn load(&mut self, source: Source<'_>, to: ParticipantId) -> Result<(Body, Carried, Option<Buffer>), InvokeError> {
        let slice: &[u8] = match &source {
            Source::Slice(slice) => slice,
            Source::Vec(vec) => vec,
            Source::Bytes(Bytes::Inline(inline)) => return Ok((Body::Inline(*inline), Carried::Nothing, None)),
            Source::Bytes(_) => return self.load_bytes(source, to),
        };
        if let Some(inline) = Inline::new(slice) {
            return Ok((Body::Inline(inline), Carried::Nothing, None));
        }
        let mut loan = self.memory.loan(slice.len())?;
        loan.copy_from_slice(slice);
        self.load_bytes(Source::Bytes(Bytes::Own(loan)), to)
    }

    fn load_bytes(
        &mut self,
        source: Source<'_>,
        to: ParticipantId,
    ) -> Result<(Body, Carried, Option<Buffer>), InvokeError> {
        let Source::Bytes(bytes) = source else { unreachable!("slices are loaded by `load`") };
        let empty = Body::Inline(NO_HOLD);
        Ok(match bytes {
            Bytes::Inline(inline) => (Body::Inline(inline), Carried::Nothing, None),
            Bytes::Heap(buffer) => (empty, Carried::Nothing, Some(buffer)),
            Bytes::Own(loan) if self.memory.arena.is_some() => {
                let block = self.lend(loan, to);
                (Body::Block(block), Carried::Lent(block), None)
            }
            Bytes::Own(loan) => match loan.into_store() {
                Store::Heap(buffer) => (empty, Carried::Nothing, Some(buffer)),
                Store::Block(_) => unreachable!("a queue's memory is the heap"),
            },
            Bytes::Held(held) if !self.knows(&held) => {
                let copy = self.copy_of(&held)?;
                return self.load_bytes(Source::Bytes(Bytes::Own(copy)), to);
            }
            Bytes::Held(held) => {
                let block = held.block();
                self.passed.push(held);
                (Body::Block(block), Carried::Passed(BlockKey::from(&block)), None)
            }
        })
    }

    fn take_back(&self, from: ParticipantId, block: &BlockRef) -> Option<Loan> {
        let arena = self.memory.arena.as_ref()?;
        let block = arena.borrow_mut().take_back(from, block).ok()?;
        Some(self.memory.adopt(block))
    }

    /// `from` is done with something of ours, or something that we had passed on.
    fn released(&mut self, from: Option<ParticipantId>, body: Body) {
        let (Some(from), Body::Block(block)) = (from, body) else { return };
        if block.owner == self.me {
            // A peer that releases what it does not hold is refused by the arena and harms nobody.
            let _ = self.memory.arena.as_ref().map(|a| a.borrow_mut().release(from, block.index, block.generation));
        } else {
            drop(self.take_passed(BlockKey::from(&block)));
        }
    }

    /// Ends what a call carried, now that the far end has let go of it.
    fn unload(&mut self, carried: Carried, from: ParticipantId) {
        match carried {
            Carried::Nothing => {}
            Carried::Lent(block) => self.released(Some(from), Body::Block(block)),
            Carried::Passed(block) => drop(self.take_passed(block)),
        }
    }

    fn take_passed(&mut self, block: BlockKey) -> Option<Held> {
        let at = self.passed.iter().position(|held| key(held) == block)?;
        Some(self.passed.swap_remove(at))
    }

    /// As `return_blocks`, where there is no way to say that the controller is gone.
    #[inline(always)]
    fn return_or_die(&mut self) {
        self.return_blocks().unwrap_or_else(|Fatal(text)| die(&text));
    }

    /// Tells givers what we are done with.
    #[inline(always)]
    pub(crate) fn return_blocks(&mut self) -> Result<(), Fatal> {
        if self.memory.returned.borrow().is_empty() {
            return Ok(());
        }
        self.return_all()
    }

    #[cold]
    fn return_all(&mut self) -> Result<(), Fatal> {
        loop {
            let Some((giver, block)) = self.memory.returned.borrow_mut().pop() else { return Ok(()) };
            let known = self.peers[giver.participant.index()].as_ref();
            if known.is_none_or(|peer| peer.incarnation != giver.incarnation) {
                continue; // It died, and its memory with it.
            }
            let mut release = Descriptor { kind: record::RELEASE, tag: 0, id: 0, aux: 0, body: Body::Block(block) };
            let direct = self.calling.as_ref().is_some_and(|calling| calling.callee == giver.participant)
                || self.serving.as_ref().is_some_and(|serving| serving.caller == giver.participant);
            if direct && self.release_directly(giver.participant, &release) {
                continue;
            }
            release.tag = u16::from(giver.participant.get());
            self.send_controller(&release, None)?;
        }
    }

    /// Through the ring, as long as that leaves room for every answer that may be due on it.
    fn release_directly(&mut self, to: ParticipantId, release: &Descriptor) -> bool {
        let link = self.link(to);
        link.producer.free_slots() > ANSWERS_MAX && link.producer.try_send(release).is_ok()
    }

    // ---- serving ----------------------------------------------------------------------------------------------

    /// The next request, from the controller or under a lease; `None` when the worker is to exit.
    #[inline(always)]
    pub(crate) fn next_request(&mut self) -> Result<Option<Incoming>, Fatal> {
        loop {
            if self.serving.is_some()
                && let Some(incoming) = self.poll_caller()?
            {
                return Ok(Some(incoming));
            }
            if let Some(next) = self.next_from_controller()? {
                return Ok(next);
            }
            let patience = self.serving.as_ref().map_or(self.welcome.patience, |serving| serving.patience);
            self.wait(patience, u64::MAX, |session| {
                session
                    .serving
                    .as_ref()
                    .is_some_and(|serving| serving.exchange.ready() || session.ring_ready(serving.caller))
                    || session.controller_ready()
                    || !session.inbox.is_empty()
                    || session.shutdown
            })?;
        }
    }

    /// What the controller has for us: a request, or (`Some(None)`) the end.
    #[inline]
    fn next_from_controller(&mut self) -> Result<Option<Option<Incoming>>, Fatal> {
        while self.inbox.is_empty() && self.poll_controller()? {}
        if let Some(lease) = self.revoked.take() {
            self.close_lease(lease)?;
        }
        if let Some(incoming) = self.inbox.pop_front() {
            return Ok(Some(Some(incoming)));
        }
        Ok(self.shutdown.then_some(None))
    }

    /// A request under the lease we serve.
    #[inline(always)]
    fn poll_caller(&mut self) -> Result<Option<Incoming>, Fatal> {
        let Some(serving) = &mut self.serving else { return Ok(None) };
        let caller = serving.caller;
        match serving.exchange.poll() {
            Ok(None) => {}
            Ok(Some((sequence, request))) => {
                self.link(caller).mark_exchange_taken(sequence);
                return Ok(Some(Incoming { origin: Origin::Exchange(caller), request, heap: None }));
            }
            Err(_) => return self.distrust(caller).map(|()| None),
        }
        loop {
            let link = self.link(caller);
            match link.consumer.poll() {
                Ok(None) => return Ok(None),
                Ok(Some(request)) if request.kind & record::KIND == record::REQUEST => {
                    let head = link.consumer.head();
                    link.mark_taken(head);
                    return Ok(Some(Incoming { origin: Origin::Ring(caller), request, heap: None }));
                }
                Ok(Some(descriptor)) => self.released(Some(caller), descriptor.body),
                Err(_) => return self.distrust(caller).map(|()| None),
            }
        }
    }

    /// The input of a request, readable where it lies, and the name of its block. `None`: the request is not served.
    #[inline(always)]
    pub(crate) fn open(
        &mut self,
        origin: Origin,
        request: &Descriptor,
        heap: Option<Buffer>,
    ) -> Result<Option<(Input, Option<BlockKey>)>, Fatal> {
        let is_args = request.kind & record::ARGS != 0;
        if let (Body::Inline(inline), None) = (request.body, &heap) {
            return Ok(Some((Input { bytes: Bytes::Inline(inline), is_args }, None)));
        }
        let from = match origin {
            Origin::Controller => ParticipantId::CONTROLLER,
            Origin::Ring(caller) | Origin::Exchange(caller) => caller,
        };
        match (self.receive(request.body, self.giver(from), heap), origin) {
            (Ok((bytes, block)), _) => {
                self.memory.serve(block);
                Ok(Some((Input { bytes, is_args }, block)))
            }
            (Err(fatal), Origin::Controller) => Err(fatal),
            (Err(_), Origin::Ring(caller) | Origin::Exchange(caller)) => self.distrust(caller).map(|()| None),
        }
    }

    /// The caller of our lease sent something malformed. We stop listening to it; the lease is closed when revoked.
    #[cold]
    fn distrust(&mut self, caller: ParticipantId) -> Result<(), Fatal> {
        eprintln!("praas-worker {}: malformed request from {caller}; no longer serving its lease", self.me.get());
        if let Some(mut serving) = self.serving.take() {
            serving.exchange.close();
            let link = self.link(caller);
            let head = link.consumer.head();
            link.close(serving.lease, head);
            link.bell.ring();
        }
        Ok(())
    }

    fn close_lease(&mut self, lease: u64) -> Result<(), Fatal> {
        if let Some(mut serving) = self.serving.take_if(|serving| serving.lease == lease) {
            // From here on nothing of this lease is taken: the caller finds it closed and asks the controller again.
            serving.exchange.close();
            let link = self.link(serving.caller);
            link.consumer.publish();
            let head = link.consumer.head();
            link.close(lease, head);
            link.bell.ring();
        }
        self.return_blocks()?;
        self.tell_controller(record::CLOSED, 0, lease, 0)
    }

    /// Marks the controller's request as begun: from here on it may have run.
    #[inline(always)]
    pub(crate) fn begin(&mut self, origin: Origin) {
        if let (Origin::Controller, Channel::Ring { link, .. }) = (origin, &mut self.channel) {
            let head = link.consumer.head();
            link.mark_taken(head);
        }
    }

    /// Answers a request with bytes or with an error's text.
    #[inline]
    pub(crate) fn reply(
        &mut self,
        origin: Origin,
        call: u64,
        block: Option<BlockKey>,
        code: Code,
        status: i32,
        payload: Payload<'_>,
    ) -> Result<(), Fatal> {
        let to = match origin {
            Origin::Controller => ParticipantId::CONTROLLER,
            Origin::Ring(caller) | Origin::Exchange(caller) => caller,
        };
        let bytes = match payload.source {
            // A third party's block: the far end of a lease may not know that third party, so it gets a copy.
            Source::Bytes(Bytes::Held(held)) if to != ParticipantId::CONTROLLER && Some(key(&held)) != block => {
                match self.copy_of(&held) {
                    Ok(loan) => Source::Bytes(Bytes::Own(loan)),
                    Err(error) => return self.reply_error(origin, call, block, &error),
                }
            }
            source => source,
        };
        let (body, carried, heap) = match self.load(bytes, to) {
            Ok(loaded) => loaded,
            Err(error) => return self.reply_error(origin, call, block, &error),
        };
        if let (Carried::Passed(passed), true) =
            (carried, matches!(carried, Carried::Passed(passed) if Some(passed) == block))
        {
            // An echo: the answer says that we have let go.
            if let Some(held) = self.take_passed(passed) {
                held.forget();
            }
        }
        let keeps = if self.memory.served() { record::KEEPS } else { 0 };
        let kind = record::REPLY | keeps | if payload.is_args { record::ARGS } else { 0 };
        let aux = u64::from(status.cast_unsigned());
        let reply = Descriptor { kind, tag: code as u16, id: call, aux, body };
        if origin == Origin::Controller {
            return self.send_controller(&reply, heap);
        }
        self.reply_leased(origin, &reply);
        Ok(())
    }

    /// Answers under a lease. Without the lease nobody waits for the answer any more.
    #[inline(always)]
    pub(crate) fn reply_leased(&mut self, origin: Origin, reply: &Descriptor) {
        let Some(serving) = &mut self.serving else { return };
        let caller = serving.caller;
        if origin == Origin::Exchange(caller) {
            serving.exchange.reply(reply);
            self.link(caller).bell.ring();
        } else if origin == Origin::Ring(caller) {
            let link = self.link(caller);
            // Full cannot be: a caller has fewer calls in flight than the ring has slots. One that lies loses its answer.
            let _ = link.producer.try_send(reply);
            link.bell.ring();
        }
    }

    /// Whether the owner of the bytes still lives, so that others can read them where they are.
    fn knows(&self, held: &Held) -> bool {
        let owner = self.peers[held.block().owner.index()].as_ref();
        owner.is_some_and(|owner| owner.incarnation == held.owner_incarnation())
    }

    fn copy_of(&self, held: &Held) -> Result<Loan, InvokeError> {
        let mut loan = self.memory.loan(held.as_slice().len())?;
        loan.copy_from_slice(held.as_slice());
        Ok(loan)
    }

    #[cold]
    pub(crate) fn reply_error(
        &mut self,
        origin: Origin,
        call: u64,
        block: Option<BlockKey>,
        error: &InvokeError,
    ) -> Result<(), Fatal> {
        let code = match error {
            InvokeError::TooLarge { .. } => Code::TooLarge,
            InvokeError::NoSpace { .. } => Code::NoSpace,
            InvokeError::UnknownFunction { .. } => Code::UnknownFunction,
            InvokeError::Panicked { .. } => Code::Panicked,
            _ => Code::Failed,
        };
        let text = match error {
            InvokeError::Failed { text, .. }
            | InvokeError::Panicked { text }
            | InvokeError::UnknownFunction { text }
            | InvokeError::TooLarge { text }
            | InvokeError::NoSpace { text } => text.clone(),
            other => other.to_string(),
        };
        let text = &text.as_bytes()[..text.len().min(TEXT_BYTES_MAX)];
        let fits = self.memory.arena.is_none() || text.len() <= 40 || self.memory.loan(text.len()).is_ok();
        let text = if fits { text } else { &text[..40] };
        self.reply(origin, call, block, code, error.status(), text.into())
    }

    // ---- calling ----------------------------------------------------------------------------------------------

    /// Calls and waits: directly when a lease is at hand and its way is free, else as `submit` and `collect` would.
    #[inline(always)]
    pub(crate) fn invoke(
        &mut self,
        function: u16,
        deadline_ns: u64,
        payload: Payload<'_>,
    ) -> Result<Reply, InvokeError> {
        self.return_or_die();
        let Some(calling) = &self.calling else { return self.invoke_by_window(function, deadline_ns, payload) };
        let callee = calling.callee;
        let over_exchange = self.exchange_wanted && !calling.exchange.busy();
        if !over_exchange && (self.exchange_wanted || calling.in_flight > 0) {
            return self.invoke_by_window(function, deadline_ns, payload);
        }
        let kind = record::REQUEST | if payload.is_args { record::ARGS } else { 0 };
        let inline = match payload.source {
            Source::Slice(slice) => Inline::new(slice),
            _ => None,
        };
        let (body, carried) = match inline {
            Some(inline) => (Body::Inline(inline), Carried::Nothing),
            None if matches!(payload.source, Source::Bytes(Bytes::Held(_))) => {
                return self.invoke_by_window(function, deadline_ns, payload);
            }
            None => {
                let (body, carried, _) = self.load(payload.source, callee)?;
                (body, carried)
            }
        };
        if over_exchange {
            self.invoke_exchange(Descriptor { kind, tag: function, id: 0, aux: deadline_ns, body }, callee, carried)
        } else {
            self.direct_calls += 1;
            let id = DIRECT | self.direct_calls;
            self.invoke_ring(Descriptor { kind, tag: function, id, aux: deadline_ns, body }, callee, carried)
        }
    }

    #[cold]
    #[inline(never)]
    fn invoke_by_window(
        &mut self,
        function: u16,
        deadline_ns: u64,
        payload: Payload<'_>,
    ) -> Result<Reply, InvokeError> {
        let number = self.submit(function, deadline_ns, payload)?;
        self.collect(number)
    }

    /// Request and answer in one cache line, shared with the callee alone.
    #[inline(always)]
    fn invoke_exchange(
        &mut self,
        request: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        let calling = self.calling.as_ref().expect("checked by the caller");
        let spins = if calling.patience.spin_ns > 0 { POLLS_PER_LOOK } else { 0 };
        if self.ring_ready(callee) {
            // Blocks that the callee kept longer than its answers took; nobody else reads them off its ring.
            self.take_callee();
        }
        let calling = self.calling.as_mut().expect("a lease ends only in `take_controller`");
        let sequence = calling.exchange.submit(&request);
        self.link(callee).bell.ring();
        for _ in 0..spins {
            let calling = self.calling.as_mut().expect("checked by the caller");
            if calling.exchange.ready() {
                if let Ok(Some(ExchangeReply::Reply(reply))) = calling.exchange.poll() {
                    return self.conclude(reply, callee, carried);
                }
                break;
            }
            if self.controller_ready() {
                break;
            }
            std::hint::spin_loop();
        }
        self.await_exchange(sequence, request, callee, carried)
    }

    #[cold]
    #[inline(never)]
    fn await_exchange(
        &mut self,
        sequence: u32,
        request: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        self.parted = None;
        self.awaiting = true;
        let patience = self.calling.as_ref().map_or(self.welcome.patience, |calling| calling.patience);
        loop {
            let waited = self.wait(patience, request.aux, |session| {
                session.calling.as_ref().is_none_or(|calling| calling.exchange.ready()) || session.controller_ready()
            });
            let ready = waited.unwrap_or_else(|Fatal(text)| die(&text));
            if let Some(calling) = &mut self.calling
                && let Ok(Some(ExchangeReply::Reply(reply))) = calling.exchange.poll()
            {
                self.awaiting = false;
                return self.conclude(reply, callee, carried);
            }
            self.take_controller();
            if let Some(mut parted) = self.parted.take() {
                let reply = match parted.exchange.poll() {
                    Ok(Some(ExchangeReply::Reply(reply))) => Some(reply),
                    _ => None,
                };
                let begun = parted.death.as_ref().is_some_and(|death| death.exchange_taken == sequence);
                return self.part(parted, reply, begun, request, carried);
            }
            if !ready {
                self.awaiting = false;
                // The callee may still be at it: the line, and what the call carried, stay its until the lease ends.
                if let Some(calling) = &mut self.calling {
                    calling.left = carried;
                }
                return Err(self.overran());
            }
        }
    }

    /// Request and answer each in the next slot of a ring.
    #[inline(always)]
    fn invoke_ring(
        &mut self,
        request: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        let spins =
            self.calling.as_ref().map_or(0, |calling| if calling.patience.spin_ns > 0 { POLLS_PER_LOOK } else { 0 });
        let link = self.link(callee);
        let Ok(position) = link.producer.try_send(&request) else {
            // Full of what the callee has not read yet: then this call waits its turn with the controller.
            let carried = self.hand_on(carried, callee);
            let body = carried_body(request.body, &carried);
            let number = self.resend(request.kind, request.tag, request.aux, body, carried)?;
            return self.collect(number);
        };
        link.bell.ring();
        for _ in 0..spins {
            let link = self.link(callee);
            if link.consumer.ready() {
                match link.consumer.poll() {
                    Ok(Some(reply)) if reply.id == request.id => return self.conclude(reply, callee, carried),
                    Ok(Some(other)) => self.take_answer(callee, &other).unwrap_or_else(|Fatal(text)| die(&text)),
                    _ => {}
                }
                continue;
            }
            if self.controller_ready() {
                break;
            }
            std::hint::spin_loop();
        }
        self.await_ring(position, request, callee, carried)
    }

    #[cold]
    #[inline(never)]
    fn await_ring(
        &mut self,
        position: u64,
        request: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        self.parted = None;
        self.direct_reply = None;
        self.awaiting = true;
        let patience = self.calling.as_ref().map_or(self.welcome.patience, |calling| calling.patience);
        loop {
            let waited = self.wait(patience, request.aux, |session| {
                session.calling.as_ref().is_none_or(|calling| session.ring_ready(calling.callee))
                    || session.controller_ready()
            });
            let ready = waited.unwrap_or_else(|Fatal(text)| die(&text));
            self.take_callee();
            self.take_controller();
            let reply = self.direct_reply.take_if(|reply| reply.id == request.id);
            if let Some(parted) = self.parted.take() {
                let begun = parted.death.as_ref().is_some_and(|death| position < death.taken);
                return self.part(parted, reply, begun, request, carried);
            }
            if let Some(reply) = reply {
                self.awaiting = false;
                return self.conclude(reply, callee, carried);
            }
            if !ready {
                self.awaiting = false;
                // Its answer, should it come, is nobody's; the block comes back with the end of the lease.
                self.direct_calls += 1;
                if let Some(calling) = &mut self.calling {
                    calling.left = carried;
                }
                return Err(self.overran());
            }
        }
    }

    /// Turns the answer to a direct call into a reply.
    #[inline(always)]
    fn conclude(&mut self, reply: Descriptor, callee: ParticipantId, carried: Carried) -> Result<Reply, InvokeError> {
        match (reply.body, &carried) {
            (Body::Inline(inline), Carried::Nothing) if reply.tag == Code::Ok as u16 => {
                Ok(Reply { status: status(reply.aux), bytes: Bytes::Inline(inline) })
            }
            _ => self.accept(reply, carried, self.giver(callee)),
        }
    }

    /// Takes everything the controller has sent.
    #[inline]
    fn take_controller(&mut self) {
        while self.poll_controller().unwrap_or_else(|Fatal(text)| die(&text)) {}
    }

    /// Takes everything the worker that serves us has sent.
    #[inline]
    fn take_callee(&mut self) {
        while self.poll_callee().unwrap_or_else(|Fatal(text)| die(&text)) {}
    }

    /// The lease ended under a direct call: it was answered just before, or is lost because its callee had begun on it
    /// before it died, or else starts over through the controller.
    #[cold]
    fn part(
        &mut self,
        parted: Parted,
        reply: Option<Descriptor>,
        begun: bool,
        request: Descriptor,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        self.awaiting = false;
        let Parted { callee, death, .. } = parted;
        let starts_over = reply.is_none() && !begun;
        let concluded = reply.map(|reply| self.conclude(reply, callee, carried));
        let carried = if starts_over { self.hand_on(carried, callee) } else { Carried::Nothing };
        if let (Some(_), Some(arena)) = (&death, &self.memory.arena) {
            // Whatever else it had of ours.
            arena.borrow_mut().reclaim(callee);
        }
        match (concluded, death) {
            (Some(result), _) => result,
            (None, Some(death)) if begun => Err(lost(&death.how)),
            (None, _) => {
                let body = carried_body(request.body, &carried);
                let number = self.resend(request.kind, request.tag, request.aux, body, carried)?;
                self.collect(number)
            }
        }
    }

    /// Turns what was lent to a callee into what is lent to the controller. The dead have given everything back.
    fn hand_on(&mut self, carried: Carried, callee: ParticipantId) -> Carried {
        if let (Carried::Lent(block), Some(arena)) = (&carried, &self.memory.arena) {
            let _ = arena.borrow_mut().relend(callee, ParticipantId::CONTROLLER, block.index, block.generation);
        }
        carried
    }

    fn resend(
        &mut self,
        kind: u8,
        function: u16,
        deadline_ns: u64,
        body: Body,
        carried: Carried,
    ) -> Result<u64, InvokeError> {
        let number = self.enter(Route::Controller, deadline_ns, carried);
        let request = Descriptor { kind, tag: function, id: number, aux: deadline_ns, body };
        self.send_controller(&request, None).unwrap_or_else(|Fatal(text)| die(&text));
        Ok(number)
    }

    fn enter(&mut self, route: Route, deadline_ns: u64, carried: Carried) -> u64 {
        let number = self.nested.next();
        let call = NestedCall { route, carried, deadline_ns, outcome: Outcome::None, settled: false, wanted: true };
        self.nested.calls.push_back(call);
        number
    }

    /// Starts a call and returns its number. Under a lease it goes straight into the callee's ring.
    pub(crate) fn submit(&mut self, function: u16, deadline_ns: u64, payload: Payload<'_>) -> Result<u64, InvokeError> {
        self.return_or_die();
        if self.nested.calls.len() >= NESTED_MAX {
            let text = format!("{NESTED_MAX} nested calls are open, the most one function may have; wait for some");
            return Err(InvokeError::Busy { text });
        }
        let kind = record::REQUEST | if payload.is_args { record::ARGS } else { 0 };
        let foreign = matches!(payload.source, Source::Bytes(Bytes::Held(_)));
        let leased = self.calling.as_ref().filter(|_| !foreign).map(|calling| (calling.callee, calling.in_flight));
        let Some((callee, in_flight)) = leased else {
            let (body, carried, heap) = self.load(payload.source, ParticipantId::CONTROLLER)?;
            let number = self.enter(Route::Controller, deadline_ns, carried);
            let request = Descriptor { kind, tag: function, id: number, aux: deadline_ns, body };
            self.send_controller(&request, heap).unwrap_or_else(|Fatal(text)| die(&text));
            return Ok(number);
        };
        if in_flight >= LEASED_MAX {
            let text = format!("{LEASED_MAX} leased calls are in flight, the most a ring holds; wait for some");
            return Err(InvokeError::Busy { text });
        }
        let (body, carried, _) = self.load(payload.source, callee)?;
        let number = self.nested.next();
        let request = Descriptor { kind, tag: function, id: number, aux: deadline_ns, body };
        let link = self.link(callee);
        match link.producer.try_send(&request) {
            Ok(position) => {
                self.calling.as_mut().expect("checked above").in_flight += 1;
                let number = self.enter(Route::Ring { position }, deadline_ns, carried);
                // Rung last: its fence waits for the record to leave the store buffer, which has had time meanwhile.
                self.link(callee).bell.ring();
                Ok(number)
            }
            Err(_) => {
                self.unload(carried, callee);
                Err(InvokeError::Busy { text: "the ring to the leased worker is full; wait for some calls".into() })
            }
        }
    }

    /// Waits for the outcome of a call started with `submit`. Each number is collected once.
    pub(crate) fn collect(&mut self, number: u64) -> Result<Reply, InvokeError> {
        let known = self.nested.get(number).filter(|call| call.wanted);
        let Some(call) = known else {
            return Err(InvokeError::Protocol { text: format!("nested call {number} is not open") });
        };
        let deadline_ns = if call.route == Route::Controller { UNTIL_TOLD } else { call.deadline_ns };
        loop {
            self.take_callee();
            self.take_controller();
            if let Some(outcome) = self.nested.get(number).and_then(|call| call.outcome.take()) {
                self.dismiss(number);
                return outcome;
            }
            let patience = self.calling.as_ref().map_or(self.welcome.patience, |calling| calling.patience);
            let waited = self.wait(patience, deadline_ns, |session| {
                session.calling.as_ref().is_some_and(|calling| session.ring_ready(calling.callee))
                    || session.controller_ready()
                    || session.nested.has_outcome(number)
            });
            if !waited.unwrap_or_else(|Fatal(text)| die(&text)) {
                self.dismiss(number);
                return Err(self.overran());
            }
        }
    }

    /// The outcome if it is there.
    pub(crate) fn try_collect(&mut self, number: u64) -> Option<Result<Reply, InvokeError>> {
        self.take_callee();
        self.take_controller();
        let outcome = self.nested.get(number)?.outcome.take();
        if outcome.is_some() {
            self.dismiss(number);
        }
        outcome
    }

    /// Nobody asks for this call any more.
    fn dismiss(&mut self, number: u64) {
        if let Some(call) = self.nested.get(number) {
            call.wanted = false;
            self.nested.trim();
        }
    }

    /// The function returned: its open calls are nobody's. What they carry comes back with their answers.
    pub(crate) fn dismiss_all(&mut self) {
        if self.nested.calls.is_empty() {
            return;
        }
        for call in &mut self.nested.calls {
            call.wanted = false;
            call.outcome = Outcome::None;
        }
        self.nested.trim();
    }

    #[cold]
    fn overran(&mut self) -> InvokeError {
        if let Some(calling) = self.calling.as_mut().filter(|calling| !calling.overran) {
            calling.overran = true;
            let lease = calling.lease;
            self.tell_controller(record::OVERRUN, 0, lease, 0).unwrap_or_else(|Fatal(text)| die(&text));
        }
        InvokeError::Timeout { text: "the deadline passed during a leased call".into() }
    }

    /// Takes one answer from the ring of the worker that serves us.
    #[inline]
    fn poll_callee(&mut self) -> Result<bool, Fatal> {
        let Some(callee) = self.calling.as_ref().map(|calling| calling.callee) else { return Ok(false) };
        match self.link(callee).consumer.poll() {
            Ok(None) => Ok(false),
            Ok(Some(descriptor)) => {
                self.take_answer(callee, &descriptor)?;
                Ok(true)
            }
            // It can only waste our time: what it owes us ends with the lease or at the deadline.
            Err(_) => Ok(false),
        }
    }

    #[inline]
    fn take_answer(&mut self, callee: ParticipantId, descriptor: &Descriptor) -> Result<(), Fatal> {
        if descriptor.id & DIRECT != 0 && descriptor.kind & record::KIND == record::REPLY {
            if descriptor.id == DIRECT | self.direct_calls {
                self.direct_reply = Some(*descriptor);
            } else {
                // To a call that ran past its deadline: its bytes go back unread.
                drop(self.accept(*descriptor, Carried::Nothing, self.giver(callee)));
            }
            Ok(())
        } else if descriptor.kind & record::KIND == record::REPLY {
            if let Some(calling) = &mut self.calling {
                calling.in_flight = calling.in_flight.saturating_sub(1);
            }
            self.settle(descriptor, self.giver(callee), None)
        } else {
            self.released(Some(callee), descriptor.body);
            Ok(())
        }
    }

    /// An answer to a call of the window.
    fn settle(&mut self, descriptor: &Descriptor, giver: Giver, heap: Option<Buffer>) -> Result<(), Fatal> {
        let from_controller = giver.participant == ParticipantId::CONTROLLER;
        let found = self
            .nested
            .get(descriptor.id)
            .filter(|call| !call.settled && (call.route == Route::Controller) == from_controller);
        let Some(call) = found else {
            return if from_controller { Err(Fatal("an answer to a call that is not open".into())) } else { Ok(()) };
        };
        call.settled = true;
        let (carried, wanted) = (call.carried, call.wanted);
        call.carried = Carried::Nothing;
        if let (Body::Inline(inline), Carried::Nothing, true, None) = (descriptor.body, carried, wanted, &heap)
            && descriptor.tag == Code::Ok as u16
        {
            call.outcome = Outcome::Reply(Reply { status: status(descriptor.aux), bytes: Bytes::Inline(inline) });
            return Ok(());
        }
        let outcome = match heap {
            Some(buffer) if !buffer.as_ref().is_empty() => self.accept_heap(descriptor, buffer),
            _ => self.accept(*descriptor, carried, giver),
        };
        if wanted {
            let call = self.nested.get(descriptor.id).expect("found above");
            call.outcome = outcome.into();
        }
        self.nested.trim();
        Ok(())
    }

    fn accept_heap(&self, descriptor: &Descriptor, buffer: Buffer) -> Result<Reply, InvokeError> {
        let status = status(descriptor.aux);
        match Code::from_wire(descriptor.tag) {
            Some(Code::Ok) => {
                let loan = Loan::of_heap(buffer, &self.memory);
                Ok(Reply { status, bytes: Bytes::Own(loan) })
            }
            Some(code) => Err(InvokeError::from_wire(code, status, buffer.as_ref())),
            None => Err(InvokeError::Protocol { text: format!("answer with unknown code {}", descriptor.tag) }),
        }
    }

    /// Turns an answer into a reply, and brings back what the call carried.
    #[inline]
    fn accept(&mut self, descriptor: Descriptor, carried: Carried, giver: Giver) -> Result<Reply, InvokeError> {
        let status = status(descriptor.aux);
        let bytes = match (descriptor.body, carried) {
            (Body::Inline(inline), Carried::Nothing) => Bytes::Inline(inline),
            (Body::Block(block), Carried::Lent(lent)) if same_block(&block, &lent) => {
                match self.take_back(giver.participant, &block) {
                    Some(loan) => Bytes::Own(loan),
                    None => return Err(InvokeError::Protocol { text: "echoed more than it was lent".into() }),
                }
            }
            (body, carried) => {
                let code = Code::from_wire(descriptor.tag).unwrap_or(Code::Protocol);
                let keeps = descriptor.kind & record::KEEPS != 0;
                match carried {
                    // The worker that ran the call still reads it; a RELEASE follows when it has let go.
                    Carried::Lent(_) | Carried::Passed(_) if keeps || code.leaves_block_lent() => {}
                    // What was passed on came back by echo.
                    Carried::Passed(passed) if matches!(body, Body::Block(block) if BlockKey::from(&block) == passed) => {
                        if let Some(held) = self.take_passed(passed) {
                            return self.finish(descriptor, status, Bytes::Held(held));
                        }
                    }
                    carried => self.unload(carried, giver.participant),
                }
                match self.receive(body, giver, None) {
                    Ok((bytes, _)) => bytes,
                    Err(Fatal(text)) => return Err(InvokeError::Protocol { text }),
                }
            }
        };
        self.finish(descriptor, status, bytes)
    }

    #[inline]
    fn finish(&self, descriptor: Descriptor, status: i32, bytes: Bytes) -> Result<Reply, InvokeError> {
        if descriptor.tag == Code::Ok as u16 {
            return Ok(Reply { status, bytes });
        }
        let reply = Reply { status, bytes };
        match Code::from_wire(descriptor.tag) {
            Some(code) => Err(InvokeError::from_wire(code, status, &reply)),
            None => Err(InvokeError::Protocol { text: format!("answer with unknown code {}", descriptor.tag) }),
        }
    }

    // ---- the ends of leases and peers -------------------------------------------------------------------------

    /// The controller says that our lease is over. What the callee did not take goes through the controller again.
    fn lease_ended(&mut self, lease: u64) -> Result<(), Fatal> {
        if let Some(mut calling) = self.calling.take_if(|calling| calling.lease == lease) {
            if calling.overran {
                // Nobody waits for this answer any more; what it brings and what the call carried go back.
                let left = calling.left;
                match calling.exchange.poll() {
                    Ok(Some(ExchangeReply::Reply(late))) => drop(self.accept(late, left, self.giver(calling.callee))),
                    // Over a ring its answer is below, and the callee is idle: it has let go.
                    _ => self.unload(left, calling.callee),
                }
            }
            while {
                let answer = self.link(calling.callee).consumer.poll();
                match answer {
                    Ok(Some(descriptor)) => {
                        self.take_answer(calling.callee, &descriptor)?;
                        true
                    }
                    Ok(None) | Err(_) => false,
                }
            } {}
            let link = self.link(calling.callee);
            let (closed_lease, position) = link.peer_closed();
            let position = if closed_lease == lease { position.max(calling.start) } else { calling.start };
            let unread: Vec<Descriptor> =
                (position..link.producer.tail()).filter_map(|position| link.producer.sent(position)).collect();
            for descriptor in unread {
                self.bounced(calling.callee, descriptor)?;
            }
            self.parted = Some(Parted { exchange: calling.exchange, callee: calling.callee, death: None });
        }
        self.tell_controller(record::DROPPED, 0, lease, 0)
    }

    /// A record that the callee never took.
    fn bounced(&mut self, callee: ParticipantId, mut descriptor: Descriptor) -> Result<(), Fatal> {
        if descriptor.kind & record::KIND == record::RELEASE {
            descriptor.tag = u16::from(callee.get());
            return self.send_controller(&descriptor, None);
        }
        let Some(call) = self.nested.get(descriptor.id).filter(|call| !call.settled) else { return Ok(()) };
        call.route = Route::Controller;
        if let (Carried::Lent(block), Some(arena)) = (&call.carried, &self.memory.arena) {
            let _ = arena.borrow_mut().relend(callee, ParticipantId::CONTROLLER, block.index, block.generation);
        }
        self.send_controller(&descriptor, None)
    }

    /// A worker died. Its answers are taken first; then whatever it had begun is lost and the rest starts over.
    fn peer_gone(&mut self, gone: ParticipantId, how: &str) -> Result<(), Fatal> {
        if let Some(calling) = self.calling.take_if(|calling| calling.callee == gone) {
            while let Ok(Some(descriptor)) = self.link(gone).consumer.poll() {
                self.take_answer(gone, &descriptor)?;
            }
            let link = self.link(gone);
            let (taken, exchange_taken) = (link.peer_taken(), link.peer_exchange_taken());
            let tail = link.producer.tail();
            let sent: Vec<(u64, Descriptor)> =
                (calling.start..tail).filter_map(|position| Some((position, link.producer.sent(position)?))).collect();
            for (position, descriptor) in sent {
                if position >= taken && descriptor.kind & record::KIND == record::REQUEST {
                    self.bounced(gone, descriptor)?;
                }
            }
            for call in &mut self.nested.calls {
                if matches!(call.route, Route::Ring { .. }) && !call.settled {
                    call.settled = true;
                    call.carried = Carried::Nothing;
                    if call.wanted {
                        call.outcome = Outcome::Failed(Box::new(lost(how)));
                    }
                }
            }
            self.nested.trim();
            let death = Some(Death { taken, exchange_taken, how: how.to_owned() });
            // With a direct call open its block is dealt with first, and the rest then (`part_from`).
            if let (Some(arena), false) = (&self.memory.arena, self.awaiting) {
                arena.borrow_mut().reclaim(gone);
            }
            self.parted = Some(Parted { exchange: calling.exchange, callee: gone, death });
        } else if let Some(arena) = &self.memory.arena {
            arena.borrow_mut().reclaim(gone);
        }
        self.serving.take_if(|serving| serving.caller == gone);
        if let (Some(peer), Channel::Ring { .. }) = (self.peers[gone.index()].take(), &self.channel) {
            drop(peer);
        }
        self.tell_controller(record::FORGOTTEN, u16::from(gone.get()), 0, 0)
    }

    /// Whether the caller of `incoming` no longer waits.
    pub(crate) fn is_cancelled(&mut self, origin: Origin, call: u64) -> bool {
        match origin {
            Origin::Controller => {
                let poll = match &mut self.channel {
                    Channel::Ring { .. } => self.poll_controller().map(drop),
                    Channel::Queue { receiver, .. } => {
                        match receiver.receive_until(Duration::ZERO, Some(std::time::Instant::now())) {
                            Ok(Some(message)) => self.take_message(message),
                            Ok(None) => Ok(()),
                            Err(error) => Err(fatal("queue", error)),
                        }
                    }
                };
                poll.unwrap_or_else(|Fatal(text)| die(&text));
                self.cancelled == call
            }
            Origin::Ring(caller) | Origin::Exchange(caller) => {
                self.serving.as_ref().is_none_or(|serving| serving.caller != caller)
            }
        }
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
