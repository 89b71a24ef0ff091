//! Everything at once, thousands of times faster than life: simulated clients, workers that behave, compute, nest, hang,
//! panic and die at any moment, messages that arrive late. One seed, one history.
//!
//! Checked all along: an action never speaks to or of somebody who is gone; a worker has no more calls than it may; every
//! call is answered exactly once unless its caller went. Checked at the end, when nobody does anything new: nothing is
//! open, every worker is back, no payload was lost.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::*;

/// A splitmix64 generator: small, seeded, ours.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// Controller to worker, in order.
#[derive(Debug)]
enum ToWorker {
    /// `void`: withdrawn as it was being taken.
    Request {
        call: CallKey,
        function: u16,
        payload: Token,
        void: bool,
    },
    /// So many requests that follow run together.
    Batch {
        calls: u16,
    },
    Answer {
        call: u64,
    },
    Cancelled,
    Lease {
        lease: u64,
        callee: WorkerId,
    },
    Serve {
        lease: u64,
        caller: WorkerId,
    },
    Revoke {
        lease: u64,
    },
    Ended {
        lease: u64,
    },
    PeerGone {
        gone: WorkerId,
    },
    /// A client's connection.
    Connection {
        lease: u64,
    },
    Shutdown,
}

/// Worker to controller, in order.
#[derive(Debug)]
enum ToController {
    Reply { call: CallKey, outcome: Reply },
    Void { call: CallKey, payload: Token },
    Nested { call: u64, function: u16, deadline_ns: u64 },
    Taken { lease: u64 },
    Closed { lease: u64 },
    Dropped { lease: u64 },
    Forgotten { gone: WorkerId },
    Overrun { lease: u64 },
    Forwarded { call: u64, function: u16 },
    Returned { lease: u64, panicked: bool },
}

#[derive(Debug, Clone, Copy)]
enum Reply {
    Done,
    Failed,
    Panicked,
}

#[derive(Debug)]
struct Running {
    call: CallKey,
    function: u16,
    payload: Token,
    /// Those that run with it.
    with: VecDeque<(CallKey, Token)>,
    nested_left: u64,
    /// The nested call it waits for.
    waits: Option<u64>,
}

#[derive(Debug, Default)]
struct Worker {
    registered: bool,
    /// Nobody will ever hear of it again: it left by itself or was signalled.
    doomed: Option<Cause>,
    inbox: VecDeque<ToWorker>,
    /// Requests it read while it was inside a function.
    later: VecDeque<ToWorker>,
    outbox: VecDeque<ToController>,
    running: Option<Running>,
    /// Calls of a batch that it is to be sent, and that it waits for; those that it has.
    batch_left: u16,
    batch: Option<u16>,
    gathered: VecDeque<(CallKey, Token)>,
    calling: Option<(u64, WorkerId)>,
    serving: Option<(u64, WorkerId)>,
    /// It is inside a leased call and reads nothing.
    leased_busy: bool,
    /// The connection it has, the call of it that runs, and whether it is to be given back.
    connection: Option<u64>,
    was_lent: bool,
    direct: Option<u64>,
    returning: bool,
    knows: BTreeSet<WorkerId>,
    calls: u64,
}

struct World {
    dice: Dice,
    now_ns: u64,
    bounds: Bounds,
    controller: Controller<Token>,
    ledger: Ledger,
    workers: BTreeMap<WorkerId, Worker>,
    /// Calls of clients that wait for an answer.
    open: BTreeSet<(u64, u64)>,
    gone: BTreeSet<u64>,
    calls: u64,
    answered: u64,
    deaths: u64,
    leases: u64,
    withdrawn: u64,
    /// The client that calls one at a time, by its connection; who has that; what it sent there and nobody read.
    hot: u64,
    lent_to: Option<WorkerId>,
    socket: VecDeque<(u64, u16)>,
    lent: u64,
    kills: bool,
    /// Functions that misbehave do so.
    evil: bool,
    /// Calls of one batch at most, and how long the first waits.
    batching: (u16, u64),
    batches: u64,
}

const FUNCTIONS: u16 = 4;
const TOGETHER: u16 = 3;

impl World {
    fn new(seed: u64) -> World {
        let mut dice = Dice(seed);
        let workers = 1 + dice.below(4) as u8;
        let bounds = Bounds {
            workers,
            workers_max: workers + dice.below(3) as u8,
            queue_max: 1 + dice.below(30) as usize,
            ahead_max: dice.below(5) as usize,
            packs: dice.one_in(2),
            connection_calls_max: 1 + dice.below(20) as u32,
            grace_ns: 100 * MS,
            start_ns: S,
            deadline_ns: 2 * S,
            leases: !dice.one_in(4),
            hot_calls: dice.below(5) as u8,
            results_bytes_max: 20 * (dedupe::CALL_BYTES + 1),
            batch_bytes_max: 1 + dice.below(10) as usize,
        };
        let batching = (1 + dice.below(8) as u16, dice.below(100 * MS));
        World {
            dice,
            now_ns: S,
            controller: Controller::new(bounds.clone()),
            bounds,
            ledger: Ledger::default(),
            workers: BTreeMap::new(),
            open: BTreeSet::new(),
            gone: BTreeSet::new(),
            calls: 0,
            answered: 0,
            deaths: 0,
            leases: 0,
            withdrawn: 0,
            hot: 100,
            lent_to: None,
            socket: VecDeque::new(),
            lent: 0,
            kills: true,
            evil: true,
            batching,
            batches: 0,
        }
    }

    fn worker(&mut self, worker: WorkerId) -> &mut Worker {
        self.workers.get_mut(&worker).unwrap_or_else(|| panic!("an action for worker {worker}, who is not there"))
    }

    fn act(&mut self) {
        let mut loans = Vec::new();
        while let Some(action) = self.controller.next_action() {
            match action {
                Action::Dispatch { worker, call, function, payload, .. } => {
                    let has_max = 1 + self.bounds.ahead_max;
                    let batch_max = usize::from(self.batching.0).min(self.bounds.batch_bytes_max);
                    let seat = self.worker(worker);
                    assert!(seat.registered);
                    let is_request = |message: &&ToWorker| matches!(message, ToWorker::Request { .. });
                    let is_answer = |record: &&ToController| {
                        matches!(record, ToController::Reply { .. } | ToController::Void { .. })
                    };
                    let has = seat.later.len()
                        + seat.inbox.iter().filter(is_request).count()
                        + usize::from(seat.running.is_some())
                        + seat.outbox.iter().filter(is_answer).count();
                    if seat.batch_left > 0 {
                        seat.batch_left -= 1;
                        assert!(function == TOGETHER && has < batch_max, "{worker} was given more than a batch");
                    } else {
                        assert!(has < has_max, "{worker} was given call {has} of at most {has_max}");
                    }
                    seat.inbox.push_back(ToWorker::Request { call, function, payload, void: false });
                }
                Action::Batch { worker, calls, .. } => {
                    self.batches += 1;
                    let seat = self.worker(worker);
                    assert!(seat.running.is_none() && seat.batch_left == 0, "a batch for somebody who is busy");
                    seat.batch_left = calls;
                    seat.inbox.push_back(ToWorker::Batch { calls });
                }
                Action::Join { .. } | Action::Joined { .. } | Action::Unjoin { .. } => {
                    panic!("nobody runs for messages here")
                }
                Action::Withdraw { worker } => self.withdraw(worker),
                Action::Answer { to: Caller::Client { connection, call }, outcome } => {
                    if let Outcome::Done { payload, .. } = outcome {
                        payload.spend();
                    }
                    self.answered += 1;
                    let waited = self.open.remove(&(connection, call));
                    assert!(waited || self.gone.contains(&connection), "{connection}/{call} was answered twice");
                }
                Action::Answer { to: Caller::Worker { worker, call }, outcome } => {
                    if let Outcome::Done { payload, .. } = outcome {
                        payload.spend();
                    }
                    // The dead do not hear it.
                    if let Some(seat) = self.workers.get_mut(&worker) {
                        seat.inbox.push_back(ToWorker::Answer { call });
                    }
                }
                Action::Discard(payload) => drop(payload.spend()),
                Action::TellCancelled { worker, .. } => self.worker(worker).inbox.push_back(ToWorker::Cancelled),
                Action::Spawn { worker } => {
                    assert!(!self.workers.contains_key(&worker), "{worker} was started twice");
                    assert!(
                        self.workers.values().all(|other| !other.knows.contains(&worker)),
                        "its place is still mourned"
                    );
                    if self.dice.one_in(10) {
                        self.controller.died(self.now_ns, worker, Cause::Exited(127), false, Vec::new(), 0);
                    } else {
                        self.workers.insert(worker, Worker::default());
                    }
                }
                Action::Signal { worker, .. } => self.worker(worker).doomed = Some(Cause::Overran),
                Action::Retire { worker } => self.worker(worker).inbox.push_back(ToWorker::Shutdown),
                Action::Grant { lease, caller, callee } => {
                    self.leases += 1;
                    assert!(self.workers.contains_key(&callee), "a lease with a stranger");
                    let seat = self.worker(caller);
                    seat.knows.insert(callee);
                    seat.inbox.push_back(ToWorker::Lease { lease, callee });
                }
                Action::Open { lease, caller, callee, .. } => {
                    assert!(self.workers.contains_key(&caller), "serving a stranger");
                    let seat = self.worker(callee);
                    seat.knows.insert(caller);
                    seat.inbox.push_back(ToWorker::Serve { lease, caller });
                }
                Action::Revoke { lease, callee } => self.worker(callee).inbox.push_back(ToWorker::Revoke { lease }),
                Action::End { lease, caller } => {
                    if let Some(seat) = self.workers.get_mut(&caller) {
                        seat.inbox.push_back(ToWorker::Ended { lease });
                    }
                }
                Action::Lend { lease, connection, worker, .. } => loans.push((lease, connection, worker)),
            }
        }
        for (lease, connection, worker) in loans {
            if !self.controller.may_lend(self.now_ns, lease) {
                continue;
            }
            // The others have too much under way for the model of one that has not.
            if connection != self.hot || self.dice.one_in(4) {
                self.controller.lend_failed(self.now_ns, lease);
                continue;
            }
            assert_eq!(self.lent_to, None, "lent twice");
            self.lent += 1;
            self.lent_to = Some(worker);
            let seat = self.worker(worker);
            seat.was_lent = true;
            seat.inbox.push_back(ToWorker::Connection { lease });
        }
    }

    /// The connection is the controller's again: what waits on it is read.
    fn take_up(&mut self) {
        self.lent_to = None;
        for (call, function) in std::mem::take(&mut self.socket) {
            self.request(call, function);
        }
    }

    fn request(&mut self, call: u64, function: u16) {
        let payload = self.ledger.token();
        let from = Caller::Client { connection: self.hot, call };
        let deadline_ns = self.now_ns + 500 * MS;
        self.controller.request(self.now_ns, Request { from, function, deadline_ns, terms: Terms::default(), payload });
    }

    /// The hot client is gone. It comes back under a new number.
    fn cut(&mut self) {
        let hot = self.hot;
        self.controller.disconnected(hot);
        // What was decided of it and not yet done finds nobody.
        self.gone.insert(hot);
        self.open.retain(|(of, _)| *of != hot);
        self.socket.clear();
        self.lent_to = None;
        self.hot += 1;
    }

    /// The hot client calls, if it waits for nothing.
    fn hot_client(&mut self, with_calls: bool) {
        let hot = self.hot;
        if self.open.iter().any(|(of, _)| *of == hot) {
            if self.dice.one_in(2000) {
                self.cut();
            }
            return;
        }
        if !with_calls {
            return;
        }
        self.calls += 1;
        let call = self.calls;
        self.open.insert((hot, call));
        let function = if self.dice.one_in(150) { SLOW } else { 0 };
        match self.lent_to {
            Some(_) => self.socket.push_back((call, function)),
            None => self.request(call, function),
        }
    }

    /// Takes back what a worker has not begun on; perhaps its first request a moment too late.
    fn withdraw(&mut self, worker: WorkerId) {
        let crossed = self.dice.one_in(3);
        self.withdrawn += 1;
        let has_batch = |seat: &Worker| {
            seat.batch.is_some() || seat.inbox.iter().any(|message| matches!(message, ToWorker::Batch { .. }))
        };
        assert!(!has_batch(self.worker(worker)), "half a batch is taken back");
        let seat = self.worker(worker);
        let mut first = seat.running.is_none() && crossed;
        let mut calls = Vec::new();
        let mut rest = [VecDeque::new(), VecDeque::new()];
        for (from, rest) in [&mut seat.later, &mut seat.inbox].into_iter().zip(&mut rest) {
            for message in std::mem::take(from) {
                match message {
                    ToWorker::Request { call, function, payload, .. } if std::mem::take(&mut first) => {
                        rest.push_back(ToWorker::Request { call, function, payload, void: true });
                    }
                    ToWorker::Request { void: false, call, payload, .. } => calls.push((call, payload)),
                    message => rest.push_back(message),
                }
            }
        }
        let seat = self.worker(worker);
        [seat.later, seat.inbox] = rest;
        self.controller.withdrawn(self.now_ns, worker, calls);
    }

    /// The controller takes one record of a worker.
    fn take(&mut self, worker: WorkerId) -> bool {
        let Some(record) = self.workers.get_mut(&worker).and_then(|seat| seat.outbox.pop_front()) else { return false };
        let now_ns = self.now_ns;
        match record {
            ToController::Reply { call, outcome } => {
                let outcome = match outcome {
                    Reply::Done => Outcome::Done { status: 0, payload: self.ledger.token() },
                    Reply::Failed => Outcome::Failed(CallError::new(Code::Failed, "")),
                    Reply::Panicked => Outcome::Failed(CallError::new(Code::Panicked, "")),
                };
                assert!(self.controller.reply(now_ns, worker, call, outcome).is_ok());
            }
            ToController::Nested { call, function, deadline_ns } => {
                let payload = self.ledger.token();
                let from = Caller::Worker { worker, call };
                self.controller
                    .request(now_ns, Request { from, function, deadline_ns, terms: Terms::default(), payload });
            }
            ToController::Void { call, payload } => {
                self.controller.withdrawn(now_ns, worker, vec![(call, payload)]);
            }
            ToController::Taken { lease } => self.controller.lease_taken(worker, lease, 0).unwrap(),
            ToController::Closed { lease } => self.controller.lease_closed(now_ns, worker, lease).unwrap(),
            ToController::Dropped { lease } => self.controller.lease_dropped(worker, lease),
            ToController::Forgotten { gone } => self.controller.forgotten(now_ns, worker, gone),
            ToController::Overrun { lease } => self.controller.lease_overrun(now_ns, worker, lease),
            ToController::Forwarded { call, function } => {
                if let Some((_, connection, true)) = self.controller.connection_of(worker) {
                    assert_eq!(connection, self.hot);
                    self.request(call, function);
                }
            }
            ToController::Returned { lease, panicked } => {
                self.worker(worker).was_lent = false;
                let returned = self.controller.connection_returned(now_ns, worker, lease, true, panicked);
                if let Some(connection) = returned.expect("it has it") {
                    assert_eq!(connection, self.hot);
                    self.take_up();
                }
            }
        }
        true
    }

    /// Buries a worker as the runtime does: what it published first, then the verdict.
    fn bury(&mut self, worker: WorkerId, cause: Cause) {
        self.deaths += 1;
        while self.take(worker) {}
        if self.dice.one_in(2) {
            self.act();
        }
        let mut seat = self.workers.remove(&worker).expect("it lived");
        if let Some((_, connection, is_there)) = self.controller.connection_of(worker).filter(|_| seat.was_lent) {
            // A connection that it has not, it had not come to.
            let running = seat.direct.take().filter(|_| seat.connection.is_some());
            let in_order = !is_there || !self.dice.one_in(4);
            let now_ns = self.now_ns;
            self.controller.connection_outlived(
                now_ns,
                worker,
                cause,
                in_order,
                running.map(|call| (call, now_ns + S)),
            );
            assert!(!is_there || connection == self.hot);
            if is_there && in_order {
                self.take_up();
            } else if is_there {
                self.cut();
            }
        }
        let started = seat.running.is_some();
        let ran = seat.running.take().into_iter();
        let ran: Vec<_> =
            ran.flat_map(|running| std::iter::once((running.call, running.payload)).chain(running.with)).collect();
        let unread = seat.later.drain(..).chain(seat.inbox.drain(..)).filter_map(|message| match message {
            ToWorker::Request { call, payload, .. } => Some((call, payload)),
            _ => None,
        });
        let requests = ran.into_iter().chain(seat.gathered.drain(..)).chain(unread).collect();
        let mut mourners = 0;
        for (number, other) in &mut self.workers {
            if other.knows.contains(&worker) {
                mourners |= 1 << number;
                other.inbox.push_back(ToWorker::PeerGone { gone: worker });
            }
        }
        self.controller.died(self.now_ns, worker, cause, started, requests, mourners);
    }

    /// One worker does one thing.
    fn work(&mut self, worker: WorkerId) {
        let (evil, now_ns) = (self.evil, self.now_ns);
        let roll = self.dice.next();
        let seat = self.workers.get_mut(&worker).expect("listed");
        if let Some(cause) = seat.doomed {
            return self.bury(worker, cause);
        }
        if !seat.registered {
            if evil && roll.is_multiple_of(8) {
                return self.bury(worker, Cause::Exited(1));
            }
            seat.registered = true;
            let (calls, wait_ns) = self.batching;
            let triggers = [(TOGETHER, Trigger::Batch { calls, wait_ns })];
            self.controller.ready(now_ns, worker, &functions(), &triggers).unwrap();
            return;
        }
        if seat.leased_busy {
            seat.leased_busy = !roll.is_multiple_of(3);
            if evil && roll % 40 == 1 {
                return self.bury(worker, Cause::Killed(11));
            }
            return;
        }
        if let Some(lease) = seat.connection
            && seat.running.is_none()
        {
            let is_there = self.lent_to == Some(worker);
            match (seat.direct, roll % 8) {
                (Some(_), 0) if evil && roll >> 8 & 63 == 0 => return self.bury(worker, Cause::Killed(11)),
                (Some(_), 0..=3) => {}
                (Some(call), _) => {
                    seat.direct = None;
                    let hot = self.hot;
                    let waited = self.open.remove(&(hot, call));
                    assert!(waited || !is_there, "{call} was answered twice");
                    self.answered += 1;
                    if evil && roll >> 8 & 63 == 1 {
                        let seat = self.worker(worker);
                        (seat.connection, seat.returning) = (None, false);
                        seat.outbox.push_back(ToController::Returned { lease, panicked: true });
                        seat.doomed = Some(Cause::Exited(71));
                    }
                    return;
                }
                (None, _) if is_there && !seat.returning && !self.socket.is_empty() => {
                    let (call, function) = self.socket.pop_front().expect("seen above");
                    if function == 0 {
                        seat.direct = Some(call);
                    } else {
                        seat.outbox.push_back(ToController::Forwarded { call, function });
                        seat.returning = true;
                    }
                    return;
                }
                (None, _) if seat.returning || roll % 64 == 8 => {
                    (seat.connection, seat.returning) = (None, false);
                    seat.outbox.push_back(ToController::Returned { lease, panicked: false });
                    return;
                }
                (None, _) => {}
            }
        }
        // Inside a function, with no nested call to wait for: it goes on.
        if let Some(running) = &mut seat.running {
            if running.waits.is_none() {
                match (running.function, roll % 8) {
                    (ABORT, 0) if evil => return self.bury(worker, Cause::Killed(6)),
                    (ABORT, 1) if evil => return self.reply(worker, Reply::Panicked),
                    (SLOW, 0..=5) if evil => {} // hangs, sometimes past its deadline
                    (TOGETHER, 5) if evil && !running.with.is_empty() => {
                        // Answers one of them, and dies.
                        let (next, payload) = running.with.pop_front().expect("not empty");
                        let call = std::mem::replace(&mut running.call, next);
                        std::mem::replace(&mut running.payload, payload).spend();
                        seat.outbox.push_back(ToController::Reply { call, outcome: Reply::Done });
                        return self.bury(worker, Cause::Killed(11));
                    }
                    (_, 0..=3) if running.nested_left > 0 => {
                        running.nested_left -= 1;
                        seat.calls += 1;
                        running.waits = Some(seat.calls);
                        let function = (roll >> 32) as u16 % FUNCTIONS;
                        let deadline_ns = now_ns + 1 + (roll >> 40) % (300 * MS);
                        seat.outbox.push_back(ToController::Nested { call: seat.calls, function, deadline_ns });
                    }
                    (_, 4) => return self.reply(worker, Reply::Failed),
                    _ => return self.reply(worker, Reply::Done),
                }
                return;
            }
            if let (Some((lease, _)), 0) = (seat.calling, roll % 50) {
                seat.outbox.push_back(ToController::Overrun { lease });
            }
        }
        let next = if seat.running.is_none() { seat.later.pop_front() } else { None };
        let Some(message) = next.or_else(|| seat.inbox.pop_front()) else {
            if seat.serving.is_some() && seat.running.is_none() && roll.is_multiple_of(4) {
                seat.leased_busy = true;
            }
            return;
        };
        match message {
            ToWorker::Batch { calls } => {
                assert!(seat.running.is_none() && seat.batch.is_none() && seat.serving.is_none());
                seat.batch = Some(calls);
            }
            ToWorker::Request { call, function, payload, void } if seat.batch.is_some() => {
                assert!(!void && function == TOGETHER);
                seat.gathered.push_back((call, payload));
                if seat.batch == Some(seat.gathered.len() as u16) {
                    seat.batch = None;
                    let mut with = std::mem::take(&mut seat.gathered);
                    let (call, payload) = with.pop_front().expect("at least one");
                    seat.running = Some(Running { call, function, payload, with, nested_left: roll % 4, waits: None });
                }
            }
            request @ ToWorker::Request { .. } if seat.running.is_some() => seat.later.push_back(request),
            ToWorker::Request { call, payload, void: true, .. } => {
                seat.outbox.push_back(ToController::Void { call, payload });
            }
            ToWorker::Request { call, function, payload, .. } => {
                assert!(seat.running.is_none() && seat.serving.is_none(), "a request while it serves a lease");
                assert!(seat.connection.is_none(), "a request while it has a connection");
                let with = VecDeque::new();
                seat.running = Some(Running { call, function, payload, with, nested_left: roll % 4, waits: None });
            }
            ToWorker::Answer { call } => {
                if let Some(running) = seat.running.as_mut().filter(|running| running.waits == Some(call)) {
                    running.waits = None;
                }
            }
            ToWorker::Cancelled => {}
            ToWorker::Lease { lease, callee } => {
                assert!(seat.calling.is_none(), "two leases at once");
                seat.calling = Some((lease, callee));
                seat.outbox.push_back(ToController::Taken { lease });
            }
            ToWorker::Serve { lease, caller } => {
                assert!(seat.serving.is_none() && seat.running.is_none(), "serves two");
                seat.serving = Some((lease, caller));
            }
            ToWorker::Connection { lease } => {
                assert!(seat.running.is_none() && seat.serving.is_none() && seat.connection.is_none());
                seat.connection = Some(lease);
            }
            ToWorker::Revoke { lease } if seat.connection == Some(lease) => seat.returning = true,
            ToWorker::Revoke { lease } => {
                seat.serving.take_if(|(serving, _)| *serving == lease);
                seat.outbox.push_back(ToController::Closed { lease });
            }
            ToWorker::Ended { lease } => {
                seat.calling.take_if(|(calling, _)| *calling == lease);
                seat.outbox.push_back(ToController::Dropped { lease });
            }
            ToWorker::PeerGone { gone } => {
                seat.calling.take_if(|(_, callee)| *callee == gone);
                seat.serving.take_if(|(_, caller)| *caller == gone);
                seat.knows.remove(&gone);
                seat.outbox.push_back(ToController::Forgotten { gone });
            }
            ToWorker::Shutdown => seat.doomed = Some(Cause::Exited(0)),
        }
    }

    fn reply(&mut self, worker: WorkerId, outcome: Reply) {
        let seat = self.worker(worker);
        let running = seat.running.take().expect("it runs");
        running.payload.spend();
        seat.outbox.push_back(ToController::Reply { call: running.call, outcome });
        for (call, payload) in running.with {
            payload.spend();
            seat.outbox.push_back(ToController::Reply { call, outcome });
        }
        if matches!(outcome, Reply::Panicked) {
            seat.doomed = Some(Cause::Exited(71));
        }
    }

    fn client(&mut self) {
        let connection = 1 + self.dice.below(3);
        match self.dice.below(12) {
            0 => {
                if let Some((connection, call)) = self.open.iter().nth(self.dice.below(8) as usize).copied() {
                    self.controller.cancel(connection, call);
                }
            }
            1 if self.dice.one_in(20) => {
                // It goes, and comes back under a new number.
                self.controller.disconnected(connection);
                self.gone.insert(connection);
                self.open.retain(|(of, _)| *of != connection);
                self.gone.remove(&connection);
            }
            _ => {
                self.calls += 1;
                let payload = self.ledger.token();
                let from = Caller::Client { connection, call: self.calls };
                self.open.insert((connection, self.calls));
                let function = self.dice.below(u64::from(FUNCTIONS) + 1) as u16;
                let deadline_ns = self.now_ns + self.dice.below(500 * MS);
                let terms = Terms { idempotent: self.dice.one_in(3), ..Terms::default() };
                self.controller.request(self.now_ns, Request { from, function, deadline_ns, terms, payload });
            }
        }
    }

    fn step(&mut self, with_clients: bool) {
        self.now_ns += self.dice.below(2 * MS);
        if self.dice.one_in(50) {
            self.now_ns = self.now_ns.max(self.controller.wake_ns().min(self.now_ns + S));
        }
        if with_clients && self.dice.one_in(4) {
            self.client();
        }
        if self.dice.one_in(2) {
            self.hot_client(with_clients);
        }
        let alive: Vec<WorkerId> = self.workers.keys().copied().collect();
        for worker in alive {
            if self.dice.one_in(2) && self.workers.contains_key(&worker) {
                self.work(worker);
            }
            if self.kills && self.dice.one_in(300) && self.workers.contains_key(&worker) {
                self.bury(worker, Cause::Killed(9));
            }
            if self.dice.one_in(2) {
                self.take(worker);
            }
        }
        self.controller.tick(self.now_ns);
        let exact = self.workers.iter().fold(0, |mask, (worker, seat)| {
            if seat.running.as_ref().is_some_and(|running| running.waits.is_some()) { mask | 1 << worker } else { mask }
        });
        self.controller.unstick(self.now_ns, self.bounds.leases.then_some(exact));
        self.act();
    }

    fn quiet(&self) -> bool {
        self.workers.values().all(|seat| {
            let has_nothing = seat.inbox.is_empty() && seat.later.is_empty() && seat.outbox.is_empty();
            has_nothing && seat.running.is_none() && seat.gathered.is_empty() && seat.connection.is_none()
        })
    }
}

fn simulate(seed: u64, steps: u32) -> [u64; 6] {
    let mut world = World::new(seed);
    for _ in 0..steps {
        world.step(true);
    }
    // Nobody calls any more, nobody misbehaves: within the longest deadline and back-off all is quiet.
    world.kills = false;
    world.evil = false;
    for _ in 0..40_000 {
        world.step(false);
        let whole = world.controller.ready_count() >= usize::from(world.bounds.workers);
        if world.open.is_empty() && world.controller.calls.is_empty() && world.quiet() && whole {
            break;
        }
    }
    assert!(world.open.is_empty(), "calls without an answer: {:?}", world.open);
    assert!(world.controller.calls.is_empty() && world.controller.queue.is_empty(), "{:?}", world.controller);
    assert!(world.quiet(), "{:?}", world.workers);
    assert!(world.controller.ready_count() >= usize::from(world.bounds.workers), "{:?}", world.controller);
    assert_eq!(world.ledger.lost.get(), 0, "payloads that left in no action");
    assert_eq!(world.controller.staff.nesting(), 0, "nested calls counted and never ended");
    assert!(world.controller.connections.values().all(|open| *open == 0), "{:?}", world.controller.connections);
    assert!(!world.controller.lends(), "{:?}", world.controller);
    assert_eq!(world.controller.batches.waiting(), 0, "{:?}", world.controller);
    [world.answered, world.deaths, world.leases, world.withdrawn, world.lent, world.batches]
}

/// W1 W2 W5 W7 W9 P10 P11 P14 in any order. `PRAAS_SEEDS` runs more of them, `PRAAS_SEED` one.
#[test]
fn w2_whatever_happens_every_call_is_answered_once_and_nothing_stays() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("PRAAS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PRAAS_SEEDS").unwrap_or(150),
    };
    let mut sums = [0; 6];
    for seed in seeds {
        let ran = std::panic::catch_unwind(|| simulate(seed, 4_000));
        let Ok(counts) = ran else { panic!("seed {seed} fails; run it alone with PRAAS_SEED={seed}") };
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    let [answers, deaths, leases, withdrawals, lent, batches] = sums;
    println!(
        "{answers} answers, {deaths} deaths, {leases} leases, {withdrawals} withdrawals, {lent} connections lent, {batches} batches"
    );
    assert!(!sums.contains(&0), "the simulation left something out: {sums:?}");
}
