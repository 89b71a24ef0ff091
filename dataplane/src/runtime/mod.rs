//! The process at work: carries events to the [`Controller`] and its decisions out. Has the sockets, the segments,
//! the children and the clock; decides nothing about calls.
//!
//! One thread. It polls the workers' rings, executes what the controller wants, and waits on everything at once:
//! sockets, the doorbell, pidfds, control sockets, queues, signals and the next timer.

mod body;
mod clients;
mod error;
mod seat;

use std::collections::HashMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use praas_shm::child::{self, Exit, Spawn};
use praas_shm::{
    BlockRef, Body, Descriptor, Doorbell, Inline, Link, OwnSegment, ParticipantId, PeerSegment, SegmentConfig,
    SegmentFile, handover,
};
use praas_transport::queue::{Buffer, QueueConfig, Receiver, Sender};

use crate::clock::now_ns;
use crate::config::{Ipc, ProcessConfig, WaitMode};
use crate::controller::{
    Action, Bounds, CallError, Caller, Cause, Controller, Outcome, Request, Signal, Violation, WorkerId,
};
use crate::payload::BlockKey;
use crate::placement::{Patience, Placement, quota_cores};
use crate::wire::{self, Code, FromWorker, PROTOCOL_VERSION, ToWorker, WorkerWelcome, record};
use body::{Bytes, Foreign, Payload, Store};
use clients::Clients;
pub use error::ProcessError;
use error::system;
use seat::{Channel, Deaf, Given, Seat};

const DOORBELL: Token = Token(1);
const SIGNALS: Token = Token(2);
const LISTENER: Token = Token(3);
/// Worker `n`: its pidfd, control socket, and queues.
const PIDFDS: usize = 0x1000;
const CONTROLS: usize = 0x2000;
const QUEUES_IN: usize = 0x3000;
const QUEUES_OUT: usize = 0x4000;
const CLIENTS: usize = 0x10000;

/// Slots of each ring. 256 lines of 64 bytes: 16 KiB a pair, and room for every answer a leased caller may wait for.
const RING_SLOTS: u32 = 256;
/// Records that may wait for a worker when one more is forwarded from another: so nobody fills a neighbour's backlog.
const FORWARDED_MAX: usize = 1024;
/// Pause between two looks for strays: a killed one takes a moment to die.
const STRAYS_NS: u64 = 10_000_000;
/// Records taken from one worker before the next one's turn.
const RECORDS_PER_TURN: usize = 64;
/// Longest sleep: a safety net under every lost wake-up, and often enough to keep an idle process at no measurable CPU.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// What a running process tells about itself.
#[derive(Debug, Clone)]
pub struct Ready {
    /// Its name.
    pub process: String,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Workers that registered.
    pub workers: usize,
}

/// A cloud process: its controller and, as children, its workers. Runs on the thread that calls [`Process::run`].
#[derive(Debug)]
pub struct Process {
    config: ProcessConfig,
    placement: Placement,
    process_id: [u8; 16],
    incarnation: u64,
    poll: Poll,
    controller: Controller<Payload>,
    seats: Vec<Option<Seat>>,
    seated: Vec<WorkerId>,
    incarnations: u64,
    store: Store,
    shared: Option<Shared>,
    /// Blocks of workers that we lent on to another: whom to tell when that one is done.
    lent_on: HashMap<BlockKey, (Foreign, WorkerId)>,
    clients: Clients,
    signals: std::os::unix::net::UnixStream,
    drain_until_ns: Option<u64>,
    start_error: Option<ProcessError>,
    /// When to look again for children that dead workers left to us.
    strays_due_ns: u64,
    announced: bool,
    _awake: Option<std::fs::File>,
}

/// Ring channel: the controller's own segment.
#[derive(Debug)]
struct Shared {
    file: SegmentFile,
    eventfd: OwnedFd,
    own: OwnSegment,
    /// The same memory as others see it, for blocks of ours that workers pass on.
    segment: Arc<PeerSegment>,
    doorbell: Doorbell,
}

impl Process {
    /// Takes the address, the memory and the signals that the process needs. Starts nobody yet.
    ///
    /// # Errors
    /// The configuration's, the address's, the system's.
    pub fn new(mut config: ProcessConfig) -> Result<Process, ProcessError> {
        config.validate()?;
        let mut process_id = [0; 16];
        getrandom::fill(&mut process_id).map_err(|e| system("no random numbers")(std::io::Error::other(e)))?;
        if config.process.is_empty() {
            config.process = process_id[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        }
        let placement = Placement::new(&config.pin, config.wait, &child::allowed_cpus(), quota_cores());
        if let Some(core) = placement.controller() {
            child::pin_current(&[core]).map_err(system("cannot pin the controller; check --pin"))?;
        }
        let poll = Poll::new().map_err(system("no epoll"))?;
        let clients = Clients::listen(&config, poll.registry())?;
        let signals = watch_signals(poll.registry()).map_err(system("cannot watch for signals"))?;
        // Grandchildren that a dead worker leaves behind become ours, so that we can end them.
        child::become_subreaper().map_err(system("cannot become the reaper of workers' children"))?;
        let incarnation = now_ns();
        let (shared, arena) = match config.ipc {
            Ipc::Queue => (None, None),
            Ipc::Ring => {
                let shared = share(&config, process_id, incarnation)?;
                let fd = shared.doorbell.fd().as_raw_fd();
                poll.registry()
                    .register(&mut SourceFd(&fd), DOORBELL, Interest::READABLE)
                    .map_err(system("cannot poll the doorbell"))?;
                let arena = shared.own.arena()?;
                (Some(shared), Some(arena))
            }
        };
        let bounds = Bounds {
            workers: config.workers,
            workers_max: config.workers_max,
            queue_max: config.queue_max as usize,
            connection_calls_max: config.connection_calls_max,
            grace_ns: config.grace_ms * 1_000_000,
            start_ns: config.start_ms * 1_000_000,
            deadline_ns: config.deadline_ms * 1_000_000,
            leases: config.leases && config.ipc == Ipc::Ring,
        };
        Ok(Process {
            _awake: (config.wait == WaitMode::Latency).then(stay_awake).flatten(),
            placement,
            process_id,
            incarnation,
            poll,
            controller: Controller::new(bounds),
            seats: (0..praas_shm::PARTICIPANTS_MAX).map(|_| None).collect(),
            seated: Vec::new(),
            incarnations: incarnation,
            store: Store { arena },
            shared,
            lent_on: HashMap::new(),
            clients,
            signals,
            drain_until_ns: None,
            start_error: None,
            strays_due_ns: u64::MAX,
            announced: false,
            config,
        })
    }

    /// Serves until a signal or an error ends it. Calls `ready` once, when every worker has registered and clients are let in.
    ///
    /// The calling thread must be the one that lives as long as the process: workers die with it.
    ///
    /// # Errors
    /// Workers that cannot be started at all, or a system that refuses to go on.
    pub fn run(mut self, ready: impl FnOnce(&Ready)) -> Result<(), ProcessError> {
        let result = self.serve(ready);
        self.end_workers();
        result
    }

    fn serve(&mut self, ready: impl FnOnce(&Ready)) -> Result<(), ProcessError> {
        let mut ready = Some(ready);
        let mut events = Events::with_capacity(256);
        let mut idle_since_ns = now_ns();
        loop {
            let now = now_ns();
            let worked = self.poll_workers(now);
            if now >= self.strays_due_ns {
                self.strays_due_ns = if self.end_strays() { now + STRAYS_NS } else { u64::MAX };
            }
            self.controller.tick(now);
            self.unstick(now);
            self.act(now);
            if let Some(error) = self.start_error.take() {
                return Err(error);
            }
            if !self.announced && self.controller.ready_count() >= usize::from(self.config.workers) {
                self.announced = true;
                self.clients.admit(self.poll.registry())?;
                if let Some(ready) = ready.take() {
                    ready(&Ready {
                        process: self.config.process.clone(),
                        listen: self.clients.address(),
                        workers: self.controller.ready_count(),
                    });
                }
            }
            for index in self.clients.paused() {
                self.on_client(now, index, true);
            }
            if self.drained(now) {
                return Ok(());
            }
            if worked {
                idle_since_ns = now;
            }
            if self.wait(now, idle_since_ns, worked, &mut events)? {
                let now = now_ns();
                for event in &events {
                    self.on_event(now, event)?;
                }
                idle_since_ns = now;
            }
        }
    }

    // ---- waiting ----------------------------------------------------------------------------------------------

    /// Waits for something to happen. True when `events` has some.
    fn wait(&mut self, now: u64, idle_since_ns: u64, worked: bool, events: &mut Events) -> Result<bool, ProcessError> {
        let patience = if self.core_is_wanted() { Patience::NONE } else { self.placement.controller_patience() };
        let idle_ns = if worked { 0 } else { now.saturating_sub(idle_since_ns) };
        let spin = idle_ns < patience.linger_ns || self.clients.unfinished();
        let mut timeout = Duration::ZERO;
        if !spin {
            let due_ns = self.controller.wake_ns().min(self.drain_until_ns.unwrap_or(u64::MAX)).min(self.strays_due_ns);
            timeout = Duration::from_nanos(due_ns.saturating_sub(now)).min(SLEEP_MAX);
            // Armed before the last look at the rings: whoever publishes after it sees us asleep and rings.
            if let Some(shared) = &self.shared {
                shared.doorbell.arm();
                let ready = self.seated.iter().any(|worker| {
                    matches!(&self.seats[usize::from(*worker)], Some(Seat { channel: Channel::Ring { link, .. }, .. }) if link.consumer.ready())
                });
                if ready {
                    timeout = Duration::ZERO;
                }
            }
            if self.seated.iter().any(|worker| {
                matches!(
                    &self.seats[usize::from(*worker)],
                    Some(Seat { readable: true, channel: Channel::Queue { .. }, .. })
                )
            }) {
                timeout = Duration::ZERO;
            }
            if self
                .seated
                .iter()
                .any(|worker| matches!(&self.seats[usize::from(*worker)], Some(seat) if seat.wants_flush()))
            {
                // A full ring has no bell to tell us of room.
                timeout = timeout.min(Duration::from_millis(1));
            }
        } else if !worked && idle_ns > patience.spin_ns {
            rustix::thread::sched_yield();
        }
        let polled = self.poll.poll(events, Some(timeout));
        if let (false, Some(shared)) = (spin, &self.shared) {
            shared.doorbell.disarm();
        }
        match polled {
            Ok(()) => Ok(events.iter().any(|event| event.token() != DOORBELL)),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(false),
            Err(source) => Err(ProcessError::System { what: "epoll failed", source }),
        }
    }

    /// Whether a worker that shares our core has something to do: then we sleep rather than spin in its way.
    fn core_is_wanted(&self) -> bool {
        let mine = self.placement.controller();
        self.seated.iter().any(|worker| {
            let seat = self.seats[usize::from(*worker)].as_ref();
            seat.is_some_and(|seat| (mine.is_none() || seat.cpu == mine) && self.controller.is_busy(*worker))
        })
    }

    fn on_event(&mut self, now: u64, event: &mio::event::Event) -> Result<(), ProcessError> {
        let token = event.token().0;
        match event.token() {
            DOORBELL => {}
            SIGNALS => self.on_signal(now),
            LISTENER => self.clients.accept(self.poll.registry(), CLIENTS),
            _ if token >= CLIENTS => {
                if event.is_read_closed() {
                    self.clients.closing(token - CLIENTS);
                }
                self.on_client(now, token - CLIENTS, event.is_readable() || event.is_read_closed());
            }
            _ => {
                let worker = WorkerId::try_from(token & 0xfff).expect("tokens hold worker numbers");
                match token & !0xfff {
                    PIDFDS => self.on_death(now, worker),
                    CONTROLS => self.on_control(now, worker)?,
                    QUEUES_IN => {
                        if let Some(seat) = &mut self.seats[usize::from(worker)] {
                            seat.readable = true;
                        }
                    }
                    // Written by the next flush.
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn on_signal(&mut self, now: u64) {
        use std::io::Read;
        let mut bytes = [0; 64];
        let count = self.signals.read(&mut bytes).unwrap_or(0);
        for _ in 0..count {
            if self.drain_until_ns.is_some() {
                // The second signal: no more patience.
                self.drain_until_ns = Some(now);
            } else {
                self.controller.drain();
                self.drain_until_ns = Some(now + self.config.drain_ms * 1_000_000);
            }
        }
    }

    fn drained(&mut self, now: u64) -> bool {
        let Some(until_ns) = self.drain_until_ns else { return false };
        if now < until_ns && (self.controller.calls_open() > 0 || self.clients.unsent()) {
            return false;
        }
        self.clients.goodbye();
        true
    }

    // ---- clients ----------------------------------------------------------------------------------------------

    fn on_client(&mut self, now: u64, index: usize, readable: bool) {
        let default_ns = self.config.deadline_ms * 1_000_000;
        let functions = self.controller.functions().to_vec();
        let welcome = wire::Welcome {
            process: self.config.process.clone(),
            incarnation: self.incarnation,
            payload_bytes_max: self.config.payload_bytes_max,
            calls_max: self.config.connection_calls_max,
            functions,
        };
        let mut requests = Vec::new();
        self.clients.serve(index, readable, &mut self.store, &welcome, &mut requests);
        for event in requests {
            match event {
                clients::Event::Request { connection, call, function, budget_ns, idempotent, payload } => {
                    let budget_ns = if budget_ns == 0 { default_ns } else { budget_ns.min(86_400_000_000_000) };
                    let from = Caller::Client { connection, call };
                    let deadline_ns = now.saturating_add(budget_ns);
                    self.controller.request(now, Request { from, function, deadline_ns, idempotent, payload });
                }
                clients::Event::Cancel { connection, call } => self.controller.cancel(connection, call),
                clients::Event::Gone { connection } => self.controller.disconnected(connection),
                clients::Event::Sent(bytes) => self.release(bytes),
            }
        }
    }

    // ---- workers: records -------------------------------------------------------------------------------------

    /// Takes what workers have published. True when there was something.
    fn poll_workers(&mut self, now: u64) -> bool {
        let mut worked = false;
        for at in 0..self.seated.len() {
            let Some(worker) = self.seated.get(at).copied() else { break };
            worked |= self.poll_worker(now, worker, RECORDS_PER_TURN);
        }
        worked
    }

    fn poll_worker(&mut self, now: u64, worker: WorkerId, records_max: usize) -> bool {
        for taken in 0..records_max {
            let Some(seat) = &mut self.seats[usize::from(worker)] else { return taken > 0 };
            let found = match &mut seat.channel {
                Channel::Mapping { .. } => return false,
                Channel::Ring { link, .. } => match link.consumer.poll() {
                    Ok(None) => return taken > 0,
                    Ok(Some(descriptor)) => Ok((descriptor, None)),
                    Err(_) => Err(Violation("a malformed record")),
                },
                Channel::Queue { .. } if !seat.readable => return taken > 0,
                Channel::Queue { receiver, .. } => match receiver.receive() {
                    Ok(None) => {
                        seat.readable = false;
                        return taken > 0;
                    }
                    Ok(Some(message)) => match Descriptor::from_bytes(&message.head) {
                        Ok(descriptor) => Ok((descriptor, Some(message.body))),
                        Err(_) => Err(Violation("a malformed record")),
                    },
                    Err(_) => Err(Violation("a malformed message")),
                },
            };
            let taken = found.and_then(|(descriptor, heap)| self.on_record(now, worker, descriptor, heap));
            if let Err(violation) = taken {
                self.condemn(worker, Cause::Violation(violation.0));
                return true;
            }
        }
        true
    }

    /// Kills a worker. Whatever it still publishes is dropped with it.
    fn condemn(&mut self, worker: WorkerId, cause: Cause) {
        if let Some(seat) = &mut self.seats[usize::from(worker)]
            && seat.verdict.is_none()
        {
            tracing::warn!(worker, "worker {cause}");
            seat.verdict = Some(cause);
            let _ = seat.child.signal_group(9);
        }
    }

    fn on_record(
        &mut self,
        now: u64,
        worker: WorkerId,
        descriptor: Descriptor,
        heap: Option<Buffer>,
    ) -> Result<(), Violation> {
        if self.seats[usize::from(worker)].as_ref().is_none_or(|seat| seat.verdict.is_some()) {
            return Ok(());
        }
        let Descriptor { kind, tag, id, aux, body } = descriptor;
        let is_args = kind & record::ARGS != 0;
        match kind & record::KIND {
            record::REPLY => self.on_reply(now, worker, &descriptor, heap),
            record::REQUEST => {
                if self.controller.nested_of(worker) >= crate::worker::NESTED_MAX {
                    // Its library keeps to the bound; a flood would take the queue from everybody else.
                    return Err(Violation("more nested calls open than one function may have"));
                }
                let from = Caller::Worker { worker, call: id };
                let Some(bytes) = self.bytes_of(worker, body, heap)? else {
                    self.answer_worker(worker, id, Outcome::Failed(owner_died()));
                    return Ok(());
                };
                let payload = Payload { bytes, is_args, keeps: false };
                let request = Request { from, function: tag, deadline_ns: aux, idempotent: false, payload };
                self.controller.request(now, request);
                Ok(())
            }
            record::RELEASE => self.on_release(worker, tag, body),
            record::TAKEN => self.controller.lease_taken(worker, id, aux),
            record::CLOSED => self.controller.lease_closed(now, worker, id),
            record::DROPPED => {
                self.controller.lease_dropped(worker, id);
                Ok(())
            }
            record::FORGOTTEN => {
                let gone = WorkerId::try_from(tag).ok().filter(|gone| usize::from(*gone) < self.seats.len());
                self.controller.forgotten(now, worker, gone.ok_or(Violation("forgot a participant out of range"))?);
                Ok(())
            }
            record::OVERRUN => {
                self.controller.lease_overrun(now, worker, id);
                Ok(())
            }
            _ => Err(Violation("a record of unknown kind")),
        }
    }

    /// Bytes that a worker gives us: its own block, or somebody else's that it passes on. `None` when their owner has
    /// just died, which the worker cannot know yet.
    fn bytes_of(&self, worker: WorkerId, body: Body, heap: Option<Buffer>) -> Result<Option<Bytes>, Violation> {
        match (body, heap) {
            (_, Some(buffer)) if !buffer.as_ref().is_empty() => Ok(Some(Bytes::Heap(buffer))),
            (Body::Inline(inline), _) => Ok(Some(Bytes::Inline(inline))),
            (Body::Block(block), _) => {
                if block.len > self.config.payload_bytes_max {
                    return Err(Violation("a payload above the process's limit"));
                }
                if block.owner == ParticipantId::CONTROLLER && !self.holds_of_ours(worker, &block) {
                    return Err(Violation("a block of ours that was not lent to it"));
                }
                let Some(segment) = self.segment_of(block.owner) else { return Ok(None) };
                let view = segment.view(&block).map_err(|_| Violation("a block out of bounds"))?;
                let incarnation = self.seats[usize::from(worker)].as_ref().map_or(0, |seat| seat.incarnation);
                Ok(Some(Bytes::Foreign(Foreign { giver: worker, incarnation, view })))
            }
        }
    }

    /// Whether a block of our arena is lent to this worker, or was passed on to it.
    fn holds_of_ours(&self, worker: WorkerId, block: &BlockRef) -> bool {
        let key = BlockKey::from(block);
        let given = self.seats[usize::from(worker)].as_ref().and_then(|seat| seat.given.as_ref());
        let passed = |request: &seat::Request| matches!(request, seat::Request::Foreign(foreign) if BlockKey::from(foreign.view.block()) == key);
        let lent = |arena: &praas_shm::Arena| arena.is_lent(ParticipantId::new(worker).expect("a worker"), block);
        self.store.arena.as_ref().is_some_and(lent)
            || given.is_some_and(|given| passed(&given.request))
            || self.lent_on.get(&key).is_some_and(|(_, holder)| *holder == worker)
    }

    fn segment_of(&self, owner: ParticipantId) -> Option<&Arc<PeerSegment>> {
        if owner == ParticipantId::CONTROLLER {
            // A worker passes on what we lent it.
            return self.shared.as_ref().map(|shared| &shared.segment);
        }
        match self.seats[owner.index()].as_ref().map(|seat| &seat.channel) {
            Some(Channel::Ring { segment, .. }) => Some(segment),
            _ => None,
        }
    }

    fn on_reply(
        &mut self,
        now: u64,
        worker: WorkerId,
        reply: &Descriptor,
        heap: Option<Buffer>,
    ) -> Result<(), Violation> {
        let code = Code::from_wire(reply.tag).ok_or(Violation("an answer with an unknown code"))?;
        let seat = self.seats[usize::from(worker)].as_mut().expect("checked by on_record");
        let given = seat.given.take_if(|given| given.call == reply.id);
        let Some(Given { request, .. }) = given else { return Err(Violation("an answer to a call it was not given")) };
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let keeps = reply.kind & record::KEEPS != 0;
        // The request comes back with the answer: as its body (an echo), or implicitly.
        let (bytes, returned) = match (request, reply.body) {
            (seat::Request::Lent(lent), Body::Block(block)) if same_block(&lent, &block) => {
                let arena = self.store.arena.as_mut().expect("lent from the arena");
                let back = arena.take_back(me, &block);
                (Some(Bytes::Own(back.map_err(|_| Violation("echoed more than it was lent"))?)), None)
            }
            (seat::Request::Foreign(foreign), Body::Block(block)) if same_block(foreign.view.block(), &block) => {
                let echoed = self.bytes_of(foreign.giver, reply.body, None)?;
                (echoed, None)
            }
            (request, body) => {
                let returned = match request {
                    // What the function still reads stays lent until the worker releases it.
                    seat::Request::Lent(_) if keeps => None,
                    seat::Request::Foreign(foreign) if keeps => {
                        self.lent_on.insert(BlockKey::from(foreign.view.block()), (foreign, worker));
                        None
                    }
                    seat::Request::Lent(lent) => {
                        let arena = self.store.arena.as_mut().expect("lent from the arena");
                        let _ = arena.release(me, lent.index, lent.generation);
                        None
                    }
                    seat::Request::Foreign(foreign) => Some(foreign),
                    seat::Request::Heap(Some(buffer)) => {
                        self.recycle(buffer);
                        None
                    }
                    seat::Request::Inline(_) | seat::Request::Heap(None) => None,
                };
                (self.bytes_of(worker, body, heap)?, returned)
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "a status is the low half")]
        let status = (reply.aux as u32).cast_signed();
        let outcome = match bytes {
            None => Outcome::Failed(owner_died()),
            Some(bytes) if code == Code::Ok => {
                Outcome::Done { status, payload: Payload { bytes, is_args: reply.kind & record::ARGS != 0, keeps } }
            }
            Some(bytes) => {
                let text = String::from_utf8_lossy(bytes.as_ref()).into_owned();
                self.release(bytes);
                Outcome::Failed(CallError { code, status, text })
            }
        };
        match self.controller.reply(now, worker, reply.id, outcome) {
            // An answer says by itself that its request's block is free again; without one we say so.
            Ok(answered) => {
                if let Some(foreign) = returned.filter(|_| !answered) {
                    self.release(Bytes::Foreign(foreign));
                }
                Ok(())
            }
            Err((violation, outcome)) => {
                if let Outcome::Done { payload, .. } = outcome {
                    self.release(payload.bytes);
                }
                Err(violation)
            }
        }
    }

    /// A worker is done with a block: one that we lent on to it, or one that another worker gave it under a lease.
    fn on_release(&mut self, worker: WorkerId, giver: u16, body: Body) -> Result<(), Violation> {
        let Body::Block(block) = body else { return Err(Violation("a release without a block")) };
        if giver == 0 {
            let key = BlockKey::from(&block);
            if self.lent_on.get(&key).is_some_and(|(_, holder)| *holder == worker) {
                let (foreign, _) = self.lent_on.remove(&key).expect("looked up above");
                self.release(Bytes::Foreign(foreign));
            } else if let (ParticipantId::CONTROLLER, Some(arena)) = (block.owner, &mut self.store.arena) {
                // One of ours; that it is lent to this worker is the arena's to check.
                let me = ParticipantId::new(worker).expect("workers have participant numbers");
                let _ = arena.release(me, block.index, block.generation);
            }
            return Ok(());
        }
        let giver = WorkerId::try_from(giver).ok().filter(|giver| usize::from(*giver) < self.seats.len());
        let giver = giver.ok_or(Violation("a release to a participant out of range"))?;
        if self.seats[usize::from(giver)].as_ref().is_some_and(|seat| seat.backlog() >= FORWARDED_MAX) {
            return Err(Violation("it releases more blocks than it can have been lent"));
        }
        self.send(giver, Descriptor { kind: record::RELEASE, tag: u16::from(worker), id: 0, aux: 0, body }, None);
        Ok(())
    }

    /// Gives bytes back to whoever they belong to.
    fn release(&mut self, bytes: Bytes) {
        match bytes {
            Bytes::Own(block) => {
                if let Some(arena) = &mut self.store.arena {
                    arena.free(block);
                }
            }
            Bytes::Foreign(Foreign { giver, incarnation, view }) => {
                let alive = self.seats[usize::from(giver)].as_ref().is_some_and(|seat| seat.incarnation == incarnation);
                if alive {
                    let body = Body::Block(*view.block());
                    self.send(giver, Descriptor { kind: record::RELEASE, tag: 0, id: 0, aux: 0, body }, None);
                }
            }
            Bytes::Heap(buffer) => self.recycle(buffer),
            Bytes::Inline(_) | Bytes::Text(_) => {}
        }
    }

    fn recycle(&mut self, buffer: Buffer) {
        for worker in &self.seated {
            if let Some(Seat { channel: Channel::Queue { receiver, .. }, .. }) = &mut self.seats[usize::from(*worker)] {
                receiver.recycle(buffer);
                return;
            }
        }
    }

    fn send(&mut self, worker: WorkerId, descriptor: Descriptor, heap: Option<Buffer>) {
        let Some(seat) = &mut self.seats[usize::from(worker)] else { return };
        if let Err(Deaf) = seat.send(descriptor, heap) {
            self.condemn(worker, Cause::Violation("it does not read its records"));
        }
    }

    fn tell(&mut self, worker: WorkerId, kind: u8, tag: u16, id: u64, aux: u64) {
        self.send(worker, Descriptor { kind, tag, id, aux, body: Body::Inline(Inline::EMPTY) }, None);
    }

    /// Sends a message on the control socket, and a record that says so.
    fn notify(&mut self, worker: WorkerId, message: &ToWorker, fds: &[std::os::fd::BorrowedFd<'_>]) {
        let Some(seat) = &self.seats[usize::from(worker)] else { return };
        let bytes = serde_json::to_vec(message).expect("our own messages are serialisable");
        match handover::send(seat.control.as_fd(), &bytes, fds) {
            Ok(()) => self.tell(worker, record::NOTICE, 0, 0, 0),
            Err(error) => {
                tracing::warn!(worker, %error, "control socket");
                self.condemn(worker, Cause::Violation("it does not read its control socket"));
            }
        }
    }

    // ---- what the controller wants ----------------------------------------------------------------------------

    fn unstick(&mut self, now: u64) {
        let waiting = self.shared.as_ref().map(|_| {
            self.seated.iter().fold(0, |mask, worker| {
                let activity = self.seats[usize::from(*worker)].as_ref().map_or(0, Seat::activity);
                if activity == crate::worker::ACTIVITY_WAITING { mask | 1 << worker } else { mask }
            })
        });
        self.controller.unstick(now, waiting);
    }

    fn act(&mut self, now: u64) {
        while let Some(action) = self.controller.next_action() {
            match action {
                Action::Dispatch { worker, call, function, deadline_ns, payload } => {
                    self.dispatch(worker, call, function, deadline_ns, payload);
                }
                Action::Answer { to: Caller::Client { connection, call }, outcome } => {
                    let (code, status, payload) = spread(outcome);
                    if let Some(unsent) = self.clients.answer(connection, call, code, status, payload) {
                        self.release(unsent);
                    }
                }
                Action::Answer { to: Caller::Worker { worker, call }, outcome } => {
                    self.answer_worker(worker, call, outcome)
                }
                Action::Discard(payload) => self.release(payload.bytes),
                Action::TellCancelled { worker, call } => self.tell(worker, record::CANCEL, 0, call, 0),
                Action::Spawn { worker } => self.spawn(now, worker),
                Action::Signal { worker, signal } => {
                    if let Some(seat) = &mut self.seats[usize::from(worker)] {
                        seat.verdict.get_or_insert(Cause::Overran);
                        let number = if signal == Signal::Kill { 9 } else { 15 };
                        let _ = seat.child.signal_group(number);
                    }
                }
                Action::Retire { worker } => self.tell(worker, record::SHUTDOWN, 0, 0, 0),
                Action::Grant { lease, caller, callee } => self.grant(lease, caller, callee),
                Action::Open { lease, caller, callee, position } => self.open(lease, caller, callee, position),
                Action::Revoke { lease, callee } => self.tell(callee, record::REVOKE, 0, lease, 0),
                Action::End { lease, caller } => {
                    self.clients.leases.remove(&lease);
                    self.tell(caller, record::ENDED, 0, lease, 0);
                }
            }
        }
        let mut sent = Vec::new();
        let gone = self.clients.flush(&mut self.store, &mut sent);
        for bytes in sent {
            self.release(bytes);
        }
        for connection in gone {
            self.controller.disconnected(connection);
        }
        for at in 0..self.seated.len() {
            let worker = self.seated[at];
            let deaf = self.seats[usize::from(worker)]
                .as_mut()
                .is_some_and(|seat| seat.wants_flush() && seat.flush().is_err());
            if deaf {
                self.condemn(worker, Cause::Violation("it does not read its records"));
            }
        }
    }

    fn dispatch(&mut self, worker: WorkerId, call: u64, function: u16, deadline_ns: u64, payload: Payload) {
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let Payload { bytes, is_args, .. } = payload;
        let mut heap = None;
        let request = match bytes {
            Bytes::Inline(inline) => seat::Request::Inline(inline),
            Bytes::Own(block) => {
                let len = block.len();
                let arena = self.store.arena.as_mut().expect("a block of ours comes from the arena");
                seat::Request::Lent(arena.lend(block, len, me))
            }
            Bytes::Foreign(foreign) => {
                self.introduce(worker, foreign.view.block().owner);
                seat::Request::Foreign(foreign)
            }
            Bytes::Heap(buffer) => {
                heap = Some(buffer);
                seat::Request::Heap(None)
            }
            Bytes::Text(_) => unreachable!("texts go to clients"),
        };
        let kind = record::REQUEST | if is_args { record::ARGS } else { 0 };
        let body = Seat::body_of(&request);
        if let Some(seat) = &mut self.seats[usize::from(worker)] {
            seat.given = Some(Given { call, position: None, request, is_args });
        }
        self.send(worker, Descriptor { kind, tag: function, id: call, aux: deadline_ns, body }, heap);
    }

    fn answer_worker(&mut self, worker: WorkerId, call: u64, outcome: Outcome<Payload>) {
        let (code, status, payload) = spread(outcome);
        let Some(incarnation) = self.seats[usize::from(worker)].as_ref().map(|seat| seat.incarnation) else {
            return self.release(payload.bytes);
        };
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let mut heap = None;
        let body = match payload.bytes {
            Bytes::Inline(inline) => Body::Inline(inline),
            // The caller's own block comes back by echo.
            Bytes::Foreign(foreign) if foreign.giver == worker && foreign.incarnation == incarnation => {
                Body::Block(*foreign.view.block())
            }
            Bytes::Foreign(foreign) => {
                let block = *foreign.view.block();
                self.introduce(worker, block.owner);
                self.lent_on.insert(BlockKey::from(&block), (foreign, worker));
                Body::Block(block)
            }
            Bytes::Own(_) => unreachable!("a block of ours goes to clients only"),
            Bytes::Heap(buffer) => {
                heap = Some(buffer);
                Body::Inline(Inline::EMPTY)
            }
            Bytes::Text(text) => match (Inline::new(text.as_bytes()), self.store.arena.is_some()) {
                (Some(inline), _) => Body::Inline(inline),
                (None, false) => {
                    heap = Some(Buffer::from(text.as_bytes()));
                    Body::Inline(Inline::EMPTY)
                }
                (None, true) => self.lend_text(&text, me),
            },
        };
        let keeps = if payload.keeps { record::KEEPS } else { 0 };
        let kind = record::REPLY | keeps | if payload.is_args { record::ARGS } else { 0 };
        let aux = u64::from(status.cast_unsigned());
        self.send(worker, Descriptor { kind, tag: code as u16, id: call, aux, body }, heap);
    }

    /// An error's text for a worker, in our arena while it reads it; cut to what a record holds when there is no room.
    fn lend_text(&mut self, text: &str, to: ParticipantId) -> Body {
        let arena = self.store.arena.as_mut().expect("checked by the caller");
        match arena.loan(text.len()) {
            Ok(mut block) => {
                block.copy_from_slice(text.as_bytes());
                Body::Block(arena.lend(block, text.len(), to))
            }
            Err(_) => Body::Inline(Inline::new(&text.as_bytes()[..praas_shm::INLINE_BYTES_MAX]).expect("cut to fit")),
        }
    }

    /// Makes sure that `worker` can read blocks of `owner`.
    fn introduce(&mut self, worker: WorkerId, owner: ParticipantId) {
        let number = owner.get();
        let known = self.seats[usize::from(worker)].as_ref().is_none_or(|seat| seat.knows & (1 << number) != 0);
        if known || owner == ParticipantId::CONTROLLER || number == worker {
            return;
        }
        let Some(Seat { channel: Channel::Ring { file, eventfd, .. }, incarnation, .. }) = &self.seats[owner.index()]
        else {
            return;
        };
        let eventfd = eventfd.try_clone().map_err(|error| error.to_string());
        let copies = eventfd.and_then(|eventfd| Ok((file.try_clone().map_err(|error| error.to_string())?, eventfd)));
        let message = ToWorker::Peer { participant: number, incarnation: *incarnation };
        match copies {
            Ok((file, eventfd)) => {
                self.notify(worker, &message, &[file.fd(), eventfd.as_fd()]);
                if let Some(seat) = &mut self.seats[usize::from(worker)] {
                    seat.knows |= 1 << number;
                }
            }
            Err(error) => tracing::warn!(worker, %error, "no descriptors to introduce worker {number}"),
        }
    }

    fn lease_patience(&self, mine: WorkerId, theirs: WorkerId) -> Patience {
        let core = |worker: WorkerId| self.seats[usize::from(worker)].as_ref().and_then(|seat| seat.cpu);
        self.placement.patience(core(mine), core(theirs), true, self.seated.len() + 1)
    }

    fn grant(&mut self, lease: u64, caller: WorkerId, callee: WorkerId) {
        let page = match praas_shm::exchange::create() {
            Ok(page) => page,
            Err(error) => {
                // The caller never takes it up; the controller takes it back when somebody else needs the callee.
                tracing::warn!(%error, "no exchange page for a lease");
                return;
            }
        };
        self.introduce(caller, ParticipantId::new(callee).expect("workers have participant numbers"));
        let patience = self.lease_patience(caller, callee);
        self.notify(caller, &ToWorker::Lease { lease, callee, patience }, &[page.as_fd()]);
        self.clients.leases.insert(lease, page);
    }

    fn open(&mut self, lease: u64, caller: WorkerId, callee: WorkerId, position: u64) {
        let Some(page) = self.clients.leases.remove(&lease) else { return };
        self.introduce(callee, ParticipantId::new(caller).expect("workers have participant numbers"));
        let patience = self.lease_patience(callee, caller);
        self.notify(callee, &ToWorker::Serve { lease, caller, position, patience }, &[page.as_fd()]);
    }

    // ---- workers: birth and death -----------------------------------------------------------------------------

    fn program(&self) -> String {
        self.config.worker[0].clone()
    }

    fn spawn(&mut self, now: u64, worker: WorkerId) {
        self.incarnations += 1;
        match self.start(worker) {
            Ok(seat) => {
                let registered = [
                    (seat.pidfd().as_raw_fd(), PIDFDS, Interest::READABLE),
                    (seat.control.as_raw_fd(), CONTROLS, Interest::READABLE),
                ];
                for (fd, base, interest) in registered {
                    let token = Token(base + usize::from(worker));
                    if let Err(error) = self.poll.registry().register(&mut SourceFd(&fd), token, interest) {
                        tracing::error!(worker, %error, "cannot poll a worker");
                    }
                }
                if let Channel::Queue { sender, receiver } = &seat.channel {
                    let queues = [
                        (sender.kernel_queue().fd().as_raw_fd(), QUEUES_OUT, Interest::WRITABLE),
                        (receiver.kernel_queue().fd().as_raw_fd(), QUEUES_IN, Interest::READABLE),
                    ];
                    for (fd, base, interest) in queues {
                        let token = Token(base + usize::from(worker));
                        let _ = self.poll.registry().register(&mut SourceFd(&fd), token, interest);
                    }
                }
                self.seats[usize::from(worker)] = Some(seat);
                self.seated.push(worker);
                self.seated.sort_unstable();
            }
            Err(error) => {
                if self.announced {
                    tracing::error!(worker, %error, "cannot start a worker");
                } else {
                    self.start_error.get_or_insert(error);
                }
                self.controller.died(now, worker, Cause::Exited(127), false, None, 0);
            }
        }
    }

    fn start(&self, worker: WorkerId) -> Result<Seat, ProcessError> {
        let (ours, theirs) = handover::socketpair().map_err(system("no socket for a worker"))?;
        // A worker that does not read must not stop us.
        rustix::io::ioctl_fionbio(&ours, true).map_err(|error| system("no socket for a worker")(error.into()))?;
        let participants = usize::from(self.config.workers) + 1;
        let cpu = self.placement.worker(worker, self.config.workers);
        let incarnation = self.incarnations;
        let welcome = WorkerWelcome {
            version: PROTOCOL_VERSION,
            participant: worker,
            incarnation,
            process_id: self.process_id,
            process: self.config.process.clone(),
            ipc: self.config.ipc,
            patience: self.placement.patience(cpu, self.placement.controller(), false, participants),
            ring_slots: RING_SLOTS,
            arena_bytes: self.config.arena_bytes,
            payload_bytes_max: self.config.payload_bytes_max,
        };
        let greeting =
            serde_json::to_vec(&ToWorker::Welcome(Box::new(welcome))).expect("our own messages are serialisable");
        let channel = match &self.shared {
            Some(shared) => {
                let file = SegmentFile::create(&segment_config(&self.config))?;
                let eventfd = praas_shm::eventfd().map_err(system("no eventfd for a worker"))?;
                handover::send(ours.as_fd(), &greeting, &[file.fd(), eventfd.as_fd(), shared.eventfd.as_fd()])
                    .map_err(system("cannot greet a worker"))?;
                Channel::Mapping { file, eventfd }
            }
            None => {
                let config = QueueConfig::default();
                let (to, to_end) = praas_transport::queue::create(&config)?;
                let (from, from_end) = praas_transport::queue::create(&config)?;
                handover::send(ours.as_fd(), &greeting, &[to_end.as_fd(), from_end.as_fd()])
                    .map_err(system("cannot greet a worker"))?;
                let receiver = Receiver::new(from, self.config.payload_bytes_max);
                Channel::Queue { sender: Box::new(Sender::new(to)), receiver: Box::new(receiver) }
            }
        };
        let args: Vec<OsString> = self.config.worker[1..].iter().map(OsString::from).collect();
        let cpus = cpu.map(|core| [core]);
        let program = &self.config.worker[0];
        let child = Spawn {
            program: Path::new(program),
            args: &args,
            control: theirs.as_fd(),
            cpus: cpus.as_ref().map(|cores| &cores[..]),
        }
        .spawn()
        .map_err(|source| ProcessError::WorkerMissing { program: program.clone(), source })?;
        Ok(Seat::new(incarnation, child, ours, channel, cpu))
    }

    fn on_control(&mut self, now: u64, worker: WorkerId) -> Result<(), ProcessError> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Some(seat) = &self.seats[usize::from(worker)] else { return Ok(()) };
            // Nothing more for now, or closed: then its pidfd says the rest.
            let Ok((bytes @ 1.., _)) = handover::receive(seat.control.as_fd(), &mut buffer) else { return Ok(()) };
            match serde_json::from_slice(&buffer[..bytes]) {
                Ok(FromWorker::Mapped) => self.attach(worker),
                Ok(FromWorker::Ready { version, functions }) => self.register(now, worker, version, &functions),
                Err(_) => self.condemn(worker, Cause::Violation("a malformed control message")),
            }
            if functions_missing(&self.controller, self.announced)
                && self.start_error.is_none()
                && self.controller.ready_count() > 0
            {
                return Err(ProcessError::NoFunctions { program: self.program() });
            }
        }
    }

    /// The worker has mapped its segment: seal it, map it, link, and send ours.
    fn attach(&mut self, worker: WorkerId) {
        let attached = self.try_attach(worker);
        if let Err(error) = attached {
            tracing::warn!(worker, error, "cannot attach a worker's segment");
            self.condemn(worker, Cause::Violation("its segment is not what we gave it"));
        }
    }

    fn try_attach(&mut self, worker: WorkerId) -> Result<(), String> {
        let shared = self.shared.as_ref().ok_or("no segments in queue mode")?;
        let seat = self.seats[usize::from(worker)].as_mut().ok_or("nobody there")?;
        let Channel::Mapping { file, eventfd } = &seat.channel else { return Err("mapped twice".into()) };
        let text = |error: &dyn std::error::Error| error.to_string();
        file.seal_future_write().map_err(|e| text(&e))?;
        let participant = ParticipantId::new(worker).ok_or("participant out of range")?;
        let identity = praas_shm::Identity { participant, incarnation: seat.incarnation, process: self.process_id };
        let segment = PeerSegment::attach(file, &identity, &segment_config(&self.config)).map_err(|e| text(&e))?;
        let bell = eventfd.try_clone().map_err(|e| text(&e))?;
        let link = Link::establish(&shared.own, Arc::clone(&segment), bell).map_err(|e| text(&e))?;
        let message = serde_json::to_vec(&ToWorker::Attached { incarnation: self.incarnation }).expect("serialisable");
        handover::send(seat.control.as_fd(), &message, &[shared.file.fd()]).map_err(|e| text(&e))?;
        let (file, eventfd) = (file.try_clone().map_err(|e| text(&e))?, eventfd.try_clone().map_err(|e| text(&e))?);
        seat.channel = Channel::Ring { file, eventfd, segment, link: Box::new(link) };
        Ok(())
    }

    fn register(&mut self, now: u64, worker: WorkerId, version: u32, functions: &[String]) {
        let channel_ready = !matches!(
            self.seats[usize::from(worker)].as_ref().map(|seat| &seat.channel),
            None | Some(Channel::Mapping { .. })
        );
        let result = if version != PROTOCOL_VERSION {
            Err(Violation("it speaks another version of the protocol: rebuild it"))
        } else if !channel_ready {
            Err(Violation("it registered before it mapped its segment"))
        } else {
            self.controller.ready(now, worker, functions)
        };
        if let Err(Violation(what)) = result {
            self.condemn(worker, Cause::Violation(what));
        }
    }

    /// A worker's pidfd is readable: take what it published, judge its call, tell those who knew it.
    fn on_death(&mut self, now: u64, worker: WorkerId) {
        let Some(seat) = &mut self.seats[usize::from(worker)] else { return };
        let exit = match seat.child.try_reap() {
            Ok(Some(exit)) => exit,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(worker, %error, "cannot reap a worker");
                Exit::Code(0)
            }
        };
        let cause = seat.verdict.unwrap_or(match exit {
            Exit::Code(code) => Cause::Exited(code),
            Exit::Signal(signal) => Cause::Killed(signal),
        });
        // Its children, if it had any, go with it: those of its group now, those that left it when they come to us.
        let _ = seat.child.signal_group(9);
        // Answers it had published before it died count.
        if let Some(seat) = &mut self.seats[usize::from(worker)] {
            seat.readable = true;
        }
        while self.poll_worker(now, worker, RECORDS_PER_TURN) {}
        // What that led to is carried out while its segment can still be handed on; the news of its death comes after.
        self.act(now);
        let Some(mut seat) = self.seats[usize::from(worker)].take() else { return };
        self.seated.retain(|seated| *seated != worker);
        let begun = seat.had_begun();
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let request = seat.given.take().and_then(|given| self.take_request_back(me, given));
        if let Some(arena) = &mut self.store.arena {
            arena.reclaim(me);
        }
        let word = match exit {
            Exit::Signal(signal) => u64::from(signal.unsigned_abs()),
            Exit::Code(code) => 1 << 32 | u64::from(code.cast_unsigned()),
        };
        let mut mourners = 0;
        for other in self.seated.clone() {
            let knew = self.seats[usize::from(other)].as_mut().is_some_and(|seat| {
                let knew = seat.knows & (1 << worker) != 0;
                seat.knows &= !(1 << worker);
                knew
            });
            if knew {
                mourners |= 1 << other;
                self.tell(other, record::PEER_GONE, u16::from(worker), 0, word);
            }
        }
        let held: Vec<_> =
            self.lent_on.iter().filter(|(_, (_, holder))| *holder == worker).map(|(key, _)| *key).collect();
        for key in held {
            let (foreign, _) = self.lent_on.remove(&key).expect("listed above");
            self.release(Bytes::Foreign(foreign));
        }
        if self.announced || exit != Exit::Code(0) {
            tracing::info!(worker, "worker {cause}");
        }
        if !self.announced {
            let how = match exit {
                _ if seat.verdict == Some(Cause::Overran) => format!("did not answer for {} ms", self.config.start_ms),
                _ => cause.to_string(),
            };
            self.start_error.get_or_insert(ProcessError::WorkerSilent { program: self.program(), how });
        }
        self.controller.died(now, worker, cause, begun, request, mourners);
        drop(seat);
        self.strays_due_ns = now;
    }

    /// What a dead worker was given, in our hands again.
    fn take_request_back(&mut self, worker: ParticipantId, given: Given) -> Option<Payload> {
        let bytes = match given.request {
            seat::Request::Inline(inline) => Bytes::Inline(inline),
            seat::Request::Lent(block) => Bytes::Own(self.store.arena.as_mut()?.take_back(worker, &block).ok()?),
            seat::Request::Foreign(foreign) => Bytes::Foreign(foreign),
            seat::Request::Heap(buffer) => Bytes::Heap(buffer?),
        };
        Some(Payload { bytes, is_args: given.is_args, keeps: false })
    }

    /// Ends children of dead workers that left their process group and came to us (W8), and reaps them (W9). True
    /// while there are some.
    fn end_strays(&self) -> bool {
        let known: Vec<i32> = self.seats.iter().flatten().map(|seat| seat.child.pid()).collect();
        let strays = child::stray_children(&known);
        for pid in &strays {
            if let Some(stray) = rustix::process::Pid::from_raw(*pid) {
                let _ = rustix::process::kill_process(stray, rustix::process::Signal::KILL);
                let _ = child::reap_pid(*pid);
            }
        }
        !strays.is_empty()
    }

    fn end_workers(&mut self) {
        for seat in self.seats.iter_mut().flatten() {
            let _ = seat.child.signal_group(9);
        }
        for seat in self.seats.iter_mut().flatten() {
            let _ = seat.child.reap_blocking();
        }
        let until_ns = now_ns() + 10 * STRAYS_NS;
        while self.end_strays() && now_ns() < until_ns {
            std::thread::sleep(Duration::from_nanos(STRAYS_NS / 10));
        }
    }
}

fn owner_died() -> CallError {
    CallError::new(Code::WorkerLost, "the worker that owned the bytes died before they were handed on")
}

fn functions_missing(controller: &Controller<Payload>, announced: bool) -> bool {
    !announced && controller.functions().is_empty()
}

fn spread(outcome: Outcome<Payload>) -> (Code, i32, Payload) {
    match outcome {
        Outcome::Done { status, payload } => (Code::Ok, status, payload),
        Outcome::Failed(CallError { code, status, text }) => {
            (code, status, Payload { bytes: Bytes::Text(text), is_args: false, keeps: false })
        }
    }
}

fn same_block(a: &BlockRef, b: &BlockRef) -> bool {
    BlockKey::from(a) == BlockKey::from(b)
}

fn segment_config(config: &ProcessConfig) -> SegmentConfig {
    SegmentConfig { ring_slots: RING_SLOTS, arena_bytes: config.arena_bytes }
}

fn share(config: &ProcessConfig, process_id: [u8; 16], incarnation: u64) -> Result<Shared, ProcessError> {
    let file = SegmentFile::create(&segment_config(config))?;
    let identity = praas_shm::Identity { participant: ParticipantId::CONTROLLER, incarnation, process: process_id };
    let own = OwnSegment::map(&file, &identity, &segment_config(config))?;
    file.seal_future_write()?;
    let segment = PeerSegment::attach(&file, &identity, &segment_config(config))
        .map_err(|error| system("cannot map our own segment")(std::io::Error::other(error)))?;
    let eventfd = praas_shm::eventfd().map_err(system("no eventfd"))?;
    let doorbell = own.doorbell(eventfd.try_clone().map_err(system("no eventfd"))?);
    Ok(Shared { file, eventfd, own, segment, doorbell })
}

/// Signals arrive as bytes on a socket, so that nothing happens inside a handler.
fn watch_signals(registry: &mio::Registry) -> std::io::Result<std::os::unix::net::UnixStream> {
    let (reader, writer) = std::os::unix::net::UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    writer.set_nonblocking(true)?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    let fd = reader.as_raw_fd();
    registry.register(&mut SourceFd(&fd), SIGNALS, Interest::READABLE)?;
    Ok(reader)
}

/// Keeps cores from deep sleep while this process runs, where the system lets us (design §4: wake-ups 95 to 5 us).
fn stay_awake() -> Option<std::fs::File> {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().write(true).open("/dev/cpu_dma_latency").ok()?;
    file.write_all(&0_i32.to_ne_bytes()).ok()?;
    Some(file)
}
