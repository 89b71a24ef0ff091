//! The process at work: carries events to the [`Controller`] and its decisions out. Has the sockets, the segments,
//! the children and the clock; decides nothing about calls.
//!
//! One thread. It polls the workers' rings, executes what the controller wants, and waits on everything at once:
//! sockets, the doorbell, pidfds, control sockets, queues, signals and the next timer.

mod actions;
mod apart;
#[allow(unsafe_code, reason = "promises that bodies stay where they are")]
mod body;
mod clients;
mod error;
mod greeting;
mod hot;
mod joins;
mod lanes;
mod lent;
mod mail;
mod members;
mod near;
mod parcels;
mod peers;
mod printed;
mod records;
mod seat;
mod staffing;
mod state;

use std::collections::HashMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use praas_shm::child::{self, Exit, Spawn};
use praas_shm::{
    BlockRef, Body, Descriptor, Doorbell, Inline, Link, OwnSegment, ParticipantId, PeerSegment, SegmentConfig,
    SegmentFile, handover,
};
use praas_transport::hello::ResponderConfig;
use praas_transport::queue::{Buffer, QueueConfig, Receiver, Sender};
use praas_transport::reactor::{self, Interest, Kind, Reactor};

use crate::clock::{now_ns, unix_ns};
use crate::config::{Checks, Ipc, Pin, ProcessConfig, WaitMode};
use crate::confinement::Confinement;
use crate::controller::connection_lease::HOT_CALLS;
use crate::controller::join::Joins;
use crate::controller::mailbox::Mailbox;
use crate::controller::{
    Action, Bounds, CallError, CallKey, Caller, Cause, Controller, Outcome, Request, Signal, Stale, Terms, Violation,
    WorkerId,
};
use crate::error::answer_did_not_fit;
use crate::payload::BlockKey;
use crate::placement::{Patience, Placement, Yields, quota_cores};
use crate::wire::{self, Code, FromWorker, PROTOCOL_VERSION, ToWorker, WorkerWelcome, record};
use apart::Apart;
use body::{Bytes, Foreign, Heap, Payload, Quota, Store};
use clients::{Came, Carrier, Clients};
pub use error::ProcessError;
use error::system;
use hot::LastCaller;
use lent::Lent;
use parcels::Correspondence;
use peers::Peers;
pub use printed::LogError;
use printed::Printed;
use seat::{Channel, Deaf, Given, Seat};
use state::Objects;

const DOORBELL: usize = 1;
const SIGNALS: usize = 2;
const LISTENER: usize = 3;
/// Worker `n`: its pidfd, control socket, and queues; 0x5000 and 0x6000 what it prints (`printed::TOKENS`).
const PIDFDS: usize = 0x1000;
const CONTROLS: usize = 0x2000;
const QUEUES_IN: usize = 0x3000;
const QUEUES_OUT: usize = 0x4000;
const CLIENTS: usize = 0x10000;
/// Connections before the end of their hello.
const GREETINGS: usize = 0x100_0000;
/// Connections with other processes. Last, and without an end: no token is used twice.
const PEERS: usize = 0x1_0000_0000;
/// What shares memory with other processes: beyond any link's number.
const NEAR: usize = 1 << 56;

/// Slots of each ring. 256 lines of 64 bytes: 16 KiB a pair, and room for every answer a leased caller may wait for,
/// with a quarter unpublished and releases beside them (128 sent each release through the controller).
const RING_SLOTS: u32 = 256;
/// Records that may wait for a worker when one more is forwarded from another: so nobody fills a neighbour's backlog.
const FORWARDED_MAX: usize = 1024;
/// Calls that a worker may have besides the one it runs.
const AHEAD_MAX: usize = 128;
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
    /// What carries the connections.
    pub reactor: Kind,
    /// Why it is that one.
    pub reactor_reason: String,
    /// Congestion control of its connections.
    pub congestion: String,
    /// Other processes it was told of.
    pub peers: usize,
    /// How limits of workers are kept: `cgroup1`, `cgroup2` or `rlimits`; `None` without any.
    pub limits: Option<&'static str>,
}

/// A cloud process: its controller and, as children, its workers. Runs on the thread that calls [`Process::run`].
#[derive(Debug)]
pub struct Process {
    /// First, so that it lets go of the memory below before that goes.
    reactor: Carrier,
    /// Why it is the kind it is.
    reactor_reason: String,
    config: ProcessConfig,
    placement: Placement,
    process_id: [u8; 16],
    incarnation: u64,
    controller: Controller<Payload>,
    seats: Vec<Option<Seat>>,
    seated: Vec<WorkerId>,
    incarnations: u64,
    store: Store,
    shared: Option<Shared>,
    objects: Objects,
    mailbox: Mailbox<Payload>,
    joins: Joins<Payload, CallError>,
    /// When to look for runs of those that can begin.
    joins_due_ns: u64,
    correspondence: Correspondence,
    /// Empty between turns: objects' blocks to be given back, with the life of their owner.
    released: Vec<(u32, BlockRef)>,
    /// Blocks of workers that we lent on to another: whom to tell when that one is done.
    lent_on: HashMap<BlockKey, (Foreign, WorkerId)>,
    /// What the second end of a lease gets, between `Grant` and `Open`: an exchange page, or two queues.
    lease_ends: HashMap<u64, Vec<OwnedFd>>,
    /// Connections that workers have, and when to look at those workers.
    lent: HashMap<WorkerId, Lent>,
    lent_due_ns: u64,
    clients: Clients,
    peers: Peers,
    lanes: lanes::Lanes,
    /// Empty between turns, kept for their memory: what a connection brought, what the kernel has taken.
    arrived: Vec<clients::Event>,
    sent: Vec<Bytes>,
    /// The worker that was last handed a call, and when.
    handed_over: Option<(WorkerId, u64)>,
    /// To the worker that was handed a call; each hand-over is a wait.
    yields: Yields,
    last_caller: Option<LastCaller>,
    apart: Apart,
    signals: std::os::unix::net::UnixStream,
    drain_until_ns: Option<u64>,
    start_error: Option<ProcessError>,
    printed: Printed,
    confinement: Confinement,
    /// When to look again for children that dead workers left to us.
    strays_due_ns: u64,
    announced: bool,
    /// What each client is told; complete when the first worker has named its functions.
    welcome: wire::Welcome,
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
        let allowed_cpus = child::allowed_cpus();
        config.validate_cores(&allowed_cpus)?;
        let mut process_id = [0; 16];
        getrandom::fill(&mut process_id).map_err(|e| system("no random numbers")(std::io::Error::other(e)))?;
        if config.process.is_empty() {
            config.process = process_id[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        }
        let placement = Placement::new(&config.pin, config.wait, &allowed_cpus, quota_cores());
        if let Some(core) = placement.controller() {
            child::pin_current(&[core]).map_err(system("cannot pin the controller; check --pin"))?;
        }
        let (kind, reactor_reason) = reactor::choose(config.reactor)?;
        let mut reactor: Carrier = Reactor::new(kind).map_err(system("no reactor; try --reactor epoll"))?;
        // By the calendar: a process that moves to another host is a later life of itself there, too.
        let incarnation = unix_ns();
        let printed = Printed::new(&config)?;
        let hello = responder(&config, incarnation)?;
        let mut peers = Peers::new(&config, &hello, process_id)?;
        let clients = Clients::listen(&config, hello)?;
        let signals = watch_signals(&mut reactor).map_err(system("cannot watch for signals"))?;
        // Grandchildren that a dead worker leaves behind become ours, so that we can end them.
        child::become_subreaper().map_err(system("cannot become the reaper of workers' children"))?;
        let (shared, arena) = match config.ipc {
            Ipc::Queue => {
                let removed = praas_transport::queue::sweep();
                if removed > 0 {
                    tracing::info!(removed, "removed queues that a killed process of this user had left");
                }
                (None, None)
            }
            Ipc::Ring => {
                let shared = share(&config, process_id, incarnation)?;
                reactor
                    .watch(shared.doorbell.fd(), DOORBELL, Interest::Read)
                    .map_err(system("cannot poll the doorbell"))?;
                let arena = shared.own.arena()?;
                peers.show(ParticipantId::CONTROLLER.get(), incarnation, &shared.file);
                (Some(shared), Some(arena))
            }
        };
        let bounds = Bounds {
            workers: config.workers,
            workers_max: config.workers_max,
            queue_max: config.queue_max as usize,
            // What is in a queue cannot be taken back.
            ahead_max: if config.ipc == Ipc::Ring { AHEAD_MAX } else { 0 },
            packs: !placement.has_more_cores_than(usize::from(config.workers) + 1),
            connection_calls_max: config.connection_calls_max,
            grace_ns: config.grace_ms * 1_000_000,
            start_ns: config.start_ms * 1_000_000,
            deadline_ns: config.deadline_ms * 1_000_000,
            // Under a lease two workers read each other's memory.
            leases: config.leases && !config.isolate,
            hot_calls: if config.lease_connections { HOT_CALLS } else { 0 },
            results_bytes_max: usize::try_from(config.results_bytes_max).unwrap_or(usize::MAX),
            batch_bytes_max: usize::try_from(config.payload_bytes_max).unwrap_or(usize::MAX),
        };
        let lanes = lanes::Lanes::new(&config, &placement);
        Ok(Process {
            reactor,
            reactor_reason,
            _awake: (config.wait == WaitMode::Latency).then(stay_awake).flatten(),
            placement,
            process_id,
            incarnation,
            controller: Controller::new(bounds),
            seats: (0..praas_shm::PARTICIPANTS_MAX).map(|_| None).collect(),
            seated: Vec::new(),
            incarnations: incarnation,
            store: Store { arena, heap: Quota::new(config.arena_bytes), was_short: false },
            shared,
            objects: Objects::new(&config, &identity(process_id, incarnation))?,
            released: Vec::new(),
            mailbox: mail::mailbox(&config),
            joins: Joins::new(Vec::new(), 0),
            joins_due_ns: u64::MAX,
            correspondence: Correspondence::new(incarnation),
            lent_on: HashMap::new(),
            lease_ends: HashMap::new(),
            lent: HashMap::new(),
            lent_due_ns: u64::MAX,
            clients,
            peers,
            lanes,
            arrived: Vec::new(),
            sent: Vec::new(),
            handed_over: None,
            yields: Yields::default(),
            last_caller: None,
            apart: Apart::default(),
            signals,
            drain_until_ns: None,
            start_error: None,
            printed,
            confinement: Confinement::new(&config),
            strays_due_ns: u64::MAX,
            announced: false,
            welcome: wire::Welcome {
                process: config.process.clone(),
                incarnation,
                payload_bytes_max: config.payload_bytes_max,
                calls_max: config.connection_calls_max,
                functions: Vec::new(),
            },
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
        let mut events = Vec::new();
        // Read once a turn, after the wait: a turn is short, and a look at the clock is 2 % of it.
        let mut now = now_ns();
        let mut idle_since_ns = now;
        let mut sockets_wait = false;
        loop {
            let worked = self.poll_workers(now) | self.poll_memory(now);
            self.look_at_lent(now);
            self.controller.tick(now);
            self.unstick(now);
            // Before the actions: what these ask for must not wait for the sleep at the end of the turn.
            for index in self.clients.paused(now, &mut self.reactor, &mut self.store) {
                self.on_client(now, index, true);
            }
            if now >= self.peers.wake_ns() {
                self.peers.tick(now, &mut self.reactor, &mut self.store);
                self.take_peers_in(now);
            }
            if now >= self.correspondence.wake_ns() {
                self.expire_remote_calls(now);
            }
            if now >= self.mailbox.wake_ns() {
                self.expire_receives(now);
            }
            if now >= self.joins_due_ns {
                self.run_joins(now);
            }
            self.act(now);
            if now >= self.objects.due_ns() {
                self.tend_state(now);
            }
            // After the answers: nobody waits for this.
            if now >= self.strays_due_ns {
                let left = self.end_strays() | self.confinement.end_leaving();
                self.strays_due_ns = if left { now + STRAYS_NS } else { u64::MAX };
            }
            if now >= self.printed.due_ns() {
                self.printed.tend(now, &mut self.reactor);
            }
            if let Some(error) = self.start_error.take() {
                return Err(error);
            }
            if !self.announced && self.controller.ready_count() >= usize::from(self.config.workers) {
                self.announced = true;
                self.welcome.functions = self.controller.functions().to_vec();
                self.clients.admit(&mut self.reactor)?;
                self.peers.admit();
                self.say_reactor();
                self.confinement.say();
                if let Some(ready) = ready.take() {
                    ready(&Ready {
                        process: self.config.process.clone(),
                        listen: self.clients.address(),
                        workers: self.controller.ready_count(),
                        reactor: self.reactor.kind(),
                        reactor_reason: self.reactor_reason.clone(),
                        congestion: self.clients.congestion(),
                        peers: self.peers.count(),
                        limits: self.confinement.name(),
                    });
                }
            }
            if self.drained(now) {
                return Ok(());
            }
            if worked {
                idle_since_ns = now;
            }
            // A worker that shares our core has often answered by now, or does when it gets the core. That answer goes out
            // first: 0.3 us sooner than by way of an epoll that finds nothing. Not twice before the sockets have their turn.
            let mut ready = self.rings_ready();
            if !ready && self.handed_over.is_some_and(|(_, at_ns)| at_ns == now) && self.may_yield_to_worker(now) {
                now = self.yields.yield_core(now_ns());
                ready = self.rings_ready();
            }
            sockets_wait = !sockets_wait && ready;
            if sockets_wait {
                now = now_ns();
                continue;
            }
            let found = self.wait(now, idle_since_ns, worked, &mut events)?;
            now = now_ns();
            if found {
                for &event in &events {
                    self.on_event(now, event)?;
                }
            }
            // Counted from here: a turn that sends a long answer is not a turn without work.
            if found || worked {
                idle_since_ns = now;
            }
        }
    }

    /// Once. What is less than there might be (X7) at the level that everybody sees.
    fn say_reactor(&self) {
        let (reactor, reason) = (self.reactor.kind(), &self.reactor_reason);
        if reactor == Kind::Uring || self.config.reactor != reactor::Choice::Auto {
            tracing::info!(%reactor, reason, "reactor");
        } else {
            tracing::warn!(%reactor, reason, "reactor");
        }
    }

    // ---- waiting ----------------------------------------------------------------------------------------------

    /// Waits for something to happen. Whether something did; what `events` has is to be served.
    fn wait(
        &mut self,
        now: u64,
        idle_since_ns: u64,
        worked: bool,
        events: &mut Vec<reactor::Event>,
    ) -> Result<bool, ProcessError> {
        // Whoever has a connection of ours talks to a client, and where cores are few the two want ours.
        let few = !self.placement.has_more_cores_than(self.seated.len() + 1);
        let wanted = self.core_is_wanted() || few && self.controller.lends();
        let patience = if !wanted && self.core_may_be_wanted() {
            self.placement.patience_beside_lease()
        } else if !wanted {
            self.placement.controller_patience()
        } else if self.may_yield_to_worker(now) {
            self.placement.patience_after_hand_over()
        } else {
            Patience::NONE
        };
        let idle_ns = if worked { 0 } else { now.saturating_sub(idle_since_ns) };
        let spin = idle_ns < patience.linger_ns || self.clients.unfinished();
        // What others wait for does not wait for our sleep to end.
        let by_ns = if spin { now } else { u64::MAX };
        self.peers.say_verdicts(now, by_ns, &mut self.reactor, &mut self.store);
        let (mut timeout, mut found) = (Duration::ZERO, false);
        if !spin {
            self.cool();
            let due_ns = self.controller.wake_ns().min(self.drain_until_ns.unwrap_or(u64::MAX)).min(self.strays_due_ns);
            let due_ns = due_ns
                .min(self.peers.wake_ns())
                .min(self.lent_due_ns)
                .min(self.objects.due_ns())
                .min(self.printed.due_ns())
                .min(self.mailbox.wake_ns())
                .min(self.joins_due_ns)
                .min(self.correspondence.wake_ns());
            timeout = Duration::from_nanos(due_ns.saturating_sub(now)).min(SLEEP_MAX);
            // Armed before the last look at the rings: whoever publishes after it sees us asleep and rings.
            if let Some(shared) = &self.shared {
                shared.doorbell.arm();
                self.peers.arm();
                if self.rings_ready() {
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
                || self.controller.has_given_ahead()
                || self.peers.waits_for_room()
            {
                // A full ring has no bell to tell us of room, and a worker with more calls rings once for several answers.
                timeout = timeout.min(Duration::from_millis(1));
            }
        } else if !worked && idle_ns > patience.spin_ns {
            if wanted {
                self.yields.yield_core(now_ns());
            } else {
                rustix::thread::sched_yield();
            }
        }
        if spin && let Some(came) = self.look_at_last_caller(now) {
            found = came;
            // With io_uring a look at everybody costs no system call where there is nothing, and hands in what was asked of the ring.
            if self.reactor.kind() == Kind::Epoll || found && !self.reactor.has_requests() {
                events.clear();
                return Ok(found);
            }
        }
        self.end_looks();
        let waited = self.reactor.wait(events, Some(timeout));
        if let (false, Some(shared)) = (spin, &self.shared) {
            shared.doorbell.disarm();
            self.peers.disarm();
        }
        waited.map_err(system("waiting failed"))?;
        // Released with the next turn's.
        self.reactor.reclaim(&mut self.store, &mut |bytes| self.sent.push(bytes));
        Ok(found || events.iter().any(|event| event.token != DOORBELL))
    }

    fn rings_ready(&self) -> bool {
        self.peers.memory_is_ready() || self.seated.iter().any(|worker| {
            matches!(&self.seats[usize::from(*worker)], Some(Seat { channel: Channel::Ring { link, .. }, .. }) if link.consumer.ready())
        })
    }

    /// Whether a worker that shares our core has something to do: then we do not spin in its way.
    fn core_is_wanted(&self) -> bool {
        let has_something =
            |worker| self.controller.is_busy(worker) && !self.is_waiting(worker) && !self.sleeps_under_lease(worker);
        self.seated.iter().any(|worker| self.shares_core(*worker) && has_something(*worker))
    }

    /// Whether a worker that shares our core may be rung for by another at any moment: then we yield between two looks.
    fn core_may_be_wanted(&self) -> bool {
        self.seated.iter().any(|worker| self.shares_core(*worker) && self.sleeps_under_lease(*worker))
    }

    /// Whether it serves a lease and has nothing to do. What we gave it ourselves it may have been rung for and say so still.
    fn sleeps_under_lease(&self, worker: WorkerId) -> bool {
        self.controller.is_serving(worker) && self.seats[usize::from(worker)].as_ref().is_some_and(Seat::sleeps)
    }

    /// Whether its function waits for a message or for another process.
    fn is_waiting(&self, worker: WorkerId) -> bool {
        self.seats[usize::from(worker)].as_ref().is_some_and(|seat| seat.waits || seat.away > 0 && seat.awaits_calls())
    }

    /// Pinned to our core, or not pinned at all.
    fn shares_core(&self, worker: WorkerId) -> bool {
        let mine = self.placement.controller();
        self.seats[usize::from(worker)].as_ref().is_some_and(|seat| mine.is_none() || seat.cpu == mine)
    }

    /// Whether the core is for the one worker that was handed a call just now, and no other takes a time slice of it.
    fn may_yield_to_worker(&self, now: u64) -> bool {
        let Some((worker, at_ns)) = self.handed_over else { return false };
        self.yields.allowed()
            && now.saturating_sub(at_ns) < Patience::YIELDING.linger_ns
            && self.shares_core(worker)
            && self
                .seated
                .iter()
                .all(|other| (self.controller.is_running(*other) && !self.is_waiting(*other)) == (*other == worker))
    }

    fn on_event(&mut self, now: u64, event: reactor::Event) -> Result<(), ProcessError> {
        let token = event.token;
        match token {
            DOORBELL => {}
            SIGNALS => self.on_signal(now),
            LISTENER => self.clients.accept(&mut self.reactor),
            NEAR.. => {
                self.peers.serve_memory(now, token, &mut self.reactor, &mut self.store);
                self.take_peers_in(now);
            }
            PEERS.. => {
                self.on_peer(now, token);
            }
            GREETINGS.. => match self.clients.greet(token - GREETINGS, &mut self.reactor, &self.welcome) {
                Some(Came::Client { connection, session_id, number }) => {
                    let older = match self.controller.greeted(connection, session_id, number) {
                        Ok(replaced) => replaced,
                        Err(Stale) => Some(connection),
                    };
                    if let Some(older) = older {
                        self.clients.close(older);
                    }
                }
                Some(Came::Peer(stream, session)) => {
                    self.peers.accepted(now, stream, session, &mut self.reactor, &mut self.store);
                    self.take_peers_in(now);
                }
                None => {}
            },
            CLIENTS.. => {
                if event.closing {
                    self.clients.closing(token - CLIENTS);
                }
                self.on_client(now, token - CLIENTS, event.readable);
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
                    printed @ (0x5000 | 0x6000) => {
                        let stream = usize::from(printed == printed::TOKENS[1]);
                        self.printed.on_event(worker, stream, &mut self.reactor);
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
        self.peers.say_verdicts(now, u64::MAX, &mut self.reactor, &mut self.store);
        self.peers.goodbye(&mut self.reactor, &mut self.store);
        self.clients.goodbye(&mut self.reactor);
        true
    }

    // ---- clients ----------------------------------------------------------------------------------------------

    /// Serves a connection. Whether it brought something.
    fn on_client(&mut self, now: u64, index: usize, readable: bool) -> bool {
        let mut arrived = std::mem::take(&mut self.arrived);
        let found =
            self.clients.serve(index, readable, &mut self.reactor, &mut self.store, &self.welcome, &mut arrived);
        let calls = arrived.iter().any(|event| matches!(event, clients::Event::Request { .. }));
        if calls {
            self.warm_up(CLIENTS + index);
        } else {
            self.warm_up_in_pieces(CLIENTS + index);
        }
        self.take_in(now, index, &mut arrived);
        if calls && self.apart.take_due(now) {
            self.keep_apart(index);
        }
        self.arrived = arrived;
        found
    }

    /// Serves a connection with another process. Whether it brought something.
    fn on_peer(&mut self, now: u64, token: usize) -> bool {
        let found = self.peers.serve(now, token, &mut self.reactor, &mut self.store);
        if self.take_peers_in(now) {
            self.warm_up(token);
        } else {
            self.warm_up_in_pieces(token);
        }
        found
    }

    /// What a connection brought.
    fn take_in(&mut self, now: u64, index: usize, arrived: &mut Vec<clients::Event>) {
        if arrived.is_empty() {
            return;
        }
        let default_ns = self.config.deadline_ms * 1_000_000;
        // A turn may begin long before it comes to this (others had the core): a deadline counted from there would end too early.
        let came_ns = now_ns();
        for event in arrived.drain(..) {
            match event {
                clients::Event::Request { connection, call, function, budget_ns, terms, payload } => {
                    let from = Caller::Client { connection, call };
                    self.apart.came(payload.bytes.as_ref().len());
                    let deadline_ns = wire::deadline_ns(came_ns, budget_ns, default_ns);
                    self.controller.request(now, Request { from, function, deadline_ns, terms, payload });
                }
                clients::Event::Refused { connection, call, once, code, text } => {
                    if !self.controller.came_before(connection, call, once) {
                        let payload = Payload { bytes: Bytes::Text(text), is_args: false, keeps: false };
                        self.clients.answer(connection, call, code, 0, payload);
                    }
                }
                clients::Event::Cancel { connection, call } => self.controller.cancel(connection, call),
                clients::Event::Members { connection, call, text } => self.on_members(now, connection, call, text),
                clients::Event::Gone { connection } => {
                    self.forget(index);
                    self.controller.disconnected(connection);
                }
                clients::Event::Sent(bytes) => self.release(bytes),
            }
        }
    }
}

/// What a hello is judged by. The key is read here and lives nowhere else.
fn responder(config: &ProcessConfig, incarnation: u64) -> Result<ResponderConfig, ProcessError> {
    let key = config.read_key()?;
    if key.is_some() || config.isolate {
        child::hide_memory().map_err(system("cannot keep others from our memory"))?;
    }
    Ok(ResponderConfig {
        plaintext: config.plaintext || key.is_none(),
        key,
        process: config.process.clone(),
        incarnation,
        versions: wire::VERSIONS,
        checks_on_loopback: config.checks == Checks::Always,
    })
}

fn owner_died() -> CallError {
    CallError::new(Code::WorkerLost, "the worker that owned the bytes died before they were handed on")
}

/// Of a payload of a worker's that there is no room for (queue channel).
fn no_space(bytes: &Bytes, quota: &Quota) -> String {
    let (bytes, max) = (bytes.as_ref().len(), quota.bytes_max());
    format!("{bytes} bytes do not fit what is free of the {max} bytes of heap that payloads may take")
}

fn spread(outcome: Outcome<Payload>) -> (Code, i32, Payload) {
    match outcome {
        Outcome::Done { status, payload } => (Code::Ok, status, payload),
        Outcome::Failed(CallError { code, status, text, keeps }) => {
            (code, status, Payload { bytes: Bytes::Text(text), is_args: false, keeps })
        }
    }
}

fn same_block(a: &BlockRef, b: &BlockRef) -> bool {
    BlockKey::from(a) == BlockKey::from(b)
}

fn segment_config(config: &ProcessConfig) -> SegmentConfig {
    SegmentConfig { ring_slots: RING_SLOTS, arena_bytes: config.arena_bytes }
}

fn identity(process: [u8; 16], incarnation: u64) -> praas_shm::Identity {
    praas_shm::Identity { participant: ParticipantId::CONTROLLER, incarnation, process }
}

fn share(config: &ProcessConfig, process_id: [u8; 16], incarnation: u64) -> Result<Shared, ProcessError> {
    let file = SegmentFile::create(&segment_config(config))?;
    let identity = identity(process_id, incarnation);
    let own = OwnSegment::map(&file, &identity, &segment_config(config))?;
    file.seal_future_write()?;
    let segment = PeerSegment::attach(&file, &identity, &segment_config(config))
        .map_err(|error| system("cannot map our own segment")(std::io::Error::other(error)))?;
    let eventfd = praas_shm::eventfd().map_err(system("no eventfd"))?;
    let doorbell = own.doorbell(eventfd.try_clone().map_err(system("no eventfd"))?);
    Ok(Shared { file, eventfd, own, segment, doorbell })
}

/// Signals arrive as bytes on a socket, so that nothing happens inside a handler.
fn watch_signals(reactor: &mut Carrier) -> std::io::Result<std::os::unix::net::UnixStream> {
    let (reader, writer) = std::os::unix::net::UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    writer.set_nonblocking(true)?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    reactor.watch(reader.as_fd(), SIGNALS, Interest::Read)?;
    Ok(reader)
}

/// Keeps cores from deep sleep while this process runs, where the system lets us (design §4: wake-ups 95 to 5 us).
fn stay_awake() -> Option<std::fs::File> {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().write(true).open("/dev/cpu_dma_latency").ok()?;
    file.write_all(&0_i32.to_ne_bytes()).ok()?;
    Some(file)
}
