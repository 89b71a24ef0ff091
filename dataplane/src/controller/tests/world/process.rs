//! A process: what `runtime/` is around the pure parts, without sockets and memory. Carries events in and decisions out, in the same order.

use std::collections::{BTreeMap, VecDeque};

use super::letters::Letters;
use super::link::Frame;
use super::objects::Objects;
use super::peer::Target;
use super::worker::{Ask, FromWorker, How, ToWorker, Worker};
use super::*;
use crate::controller::mailbox::{self, Mailbox};
use crate::controller::peers::{LinkNumber, Peering};

/// Records taken from one worker before the next one's turn.
const RECORDS_PER_TURN: usize = 8;

/// A call that a worker was given, and whether it has begun on it.
#[derive(Debug)]
struct Given {
    call: CallKey,
    load: Load,
    begun: bool,
}

/// A worker as the process sees it, and the worker.
#[derive(Debug)]
pub(super) struct Seat {
    /// Which life of its process this is: never that of another worker.
    pub(super) born: u64,
    given: VecDeque<Given>,
    pub(super) handed: Option<letters::Handed>,
    /// The receive that waits, and that its function waits for any answer.
    pub(super) receives: Option<u64>,
    waits: bool,
    verdict: Option<Cause>,
    /// When the worker takes its next step.
    pub(super) step_at_ns: u64,
    pub(super) worker: Worker,
}

/// One life of a process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) life: u64,
    pub(super) books: Rc<Books>,
    pub(super) controller: Controller<Load>,
    pub(super) mailbox: Mailbox<Load>,
    pub(super) peering: Peering,
    pub(super) targets: Vec<Target>,
    pub(super) letters: Letters,
    pub(super) objects: Objects,
    pub(super) seats: BTreeMap<WorkerId, Seat>,
    born: u64,
    /// Clients' connections by their numbers, with who has the other end; and back.
    clients: BTreeMap<u64, (ConnId, usize)>,
    numbers: BTreeMap<ConnId, u64>,
    made: u64,
    pub(super) links: BTreeMap<LinkNumber, ConnId>,
    pub(super) link_on: BTreeMap<ConnId, LinkNumber>,
    /// Its workers are ready: others are let in.
    pub(super) is_admitted: bool,
    turn_at_ns: u64,
}

impl World {
    // ---- lives ------------------------------------------------------------------------------------------------

    pub(super) fn start(&mut self, node: NodeId) {
        if self.nodes[node].process.is_some() {
            return;
        }
        self.nodes[node].life += 1;
        let (life, plan) = (self.nodes[node].life, &self.plan);
        self.say(|| format!("process {node} starts, life {life}"));
        let names: Vec<String> = self.peers_of(node).map(name_of).collect();
        let mut seed = [0; 16];
        seed[..8].copy_from_slice(&self.dice.next().to_le_bytes());
        let bounds = mailbox::Bounds {
            messages_max: plan.messages_max,
            bytes_max: plan.message_bytes_max,
            receivers_max: praas_shm::PARTICIPANTS_MAX,
        };
        let mut peering = Peering::new(&name_of(node), seed);
        for name in &names {
            let peer = peering.add(name);
            peering.activate(self.agenda.now_ns, peer, None, true);
            peering.want(peer);
        }
        self.nodes[node].process = Some(Box::new(Process {
            life,
            books: Rc::default(),
            controller: Controller::new(plan.bounds.clone()),
            mailbox: Mailbox::new(bounds),
            peering,
            targets: names.iter().map(|_| Target::new(plan)).collect(),
            letters: Letters::new(life),
            objects: Objects::new(plan),
            seats: BTreeMap::new(),
            born: 0,
            clients: BTreeMap::new(),
            numbers: BTreeMap::new(),
            made: 1 << 32,
            links: BTreeMap::new(),
            link_on: BTreeMap::new(),
            is_admitted: false,
            turn_at_ns: u64::MAX,
        }));
        self.wake(node, 0);
    }

    /// SIGKILL: its workers die with it. `host`: so does the host, and nobody is told.
    pub(super) fn kill(&mut self, node: NodeId, host: bool) {
        let Some(process) = self.nodes[node].process.take() else { return };
        self.say(|| format!("process {node} is killed, life {}", process.life));
        self.checker.counts.kills += 1;
        process.books.close();
        self.checker.process_gone(node, process.life);
        for seat in process.seats.values() {
            self.worker_ends(node, process.life, &seat.worker, false);
        }
        for conn in self.conns_of(Party::Process { node, life: process.life }) {
            self.cut(conn, !host);
        }
    }

    pub(super) fn lives(&self, node: NodeId, life: u64) -> bool {
        self.nodes[node].process.as_ref().is_some_and(|process| process.life == life)
    }

    pub(super) fn process(&mut self, node: NodeId) -> &mut Process {
        self.nodes[node].process.as_mut().expect("an event of a process that is gone is dropped")
    }

    pub(super) fn party(&mut self, node: NodeId) -> Party {
        Party::Process { node, life: self.process(node).life }
    }

    /// A worker, of that life or of none.
    pub(super) fn seat(&mut self, node: NodeId, worker: WorkerId, born: u64) -> Option<&mut Seat> {
        let process = self.nodes[node].process.as_mut()?;
        process.seats.get_mut(&worker).filter(|seat| seat.born == born)
    }

    // ---- turns ------------------------------------------------------------------------------------------------

    /// It has something to do in `delay_ns`.
    pub(super) fn wake(&mut self, node: NodeId, delay_ns: u64) {
        let at_ns = self.agenda.now_ns + delay_ns;
        self.wake_at(node, at_ns);
    }

    fn wake_at(&mut self, node: NodeId, at_ns: u64) {
        let process = self.process(node);
        if at_ns < process.turn_at_ns {
            process.turn_at_ns = at_ns;
            let life = process.life;
            self.agenda.at(at_ns, Event::Turn { node, life });
        }
    }

    /// As `Process::serve` does: what workers have published, what is due, what was decided.
    pub(super) fn turn(&mut self, node: NodeId) {
        let now_ns = self.agenda.now_ns;
        if self.process(node).turn_at_ns != now_ns {
            return;
        }
        self.process(node).turn_at_ns = u64::MAX;
        self.agenda.events += 1;
        let seated: Vec<WorkerId> = self.process(node).seats.keys().copied().collect();
        let mut has_more = false;
        for worker in seated {
            let taken = (0..RECORDS_PER_TURN).take_while(|_| self.take(node, worker)).count();
            has_more |= taken == RECORDS_PER_TURN;
        }
        let is_exact = self.plan.says_activity;
        let process = self.process(node);
        process.controller.tick(now_ns);
        let waiting = process
            .seats
            .iter()
            .filter(|(_, seat)| seat.worker.waits())
            .fold(0, |mask, (worker, _)| mask | 1 << worker);
        process.controller.unstick(now_ns, is_exact.then_some(waiting));
        if !process.is_admitted && process.controller.ready_count() >= usize::from(process.controller.bounds.workers) {
            process.is_admitted = true;
        }
        self.tend_peers(node);
        self.expire_remote_calls(node);
        self.expire_receives(node);
        self.act(node);
        self.tend_objects(node);
        self.check_bounds(node);
        let process = self.process(node);
        let due_ns = process
            .controller
            .wake_ns()
            .min(process.peers_wake_ns())
            .min(process.letters.wake_ns())
            .min(process.mailbox.wake_ns())
            .min(process.objects.due_ns);
        let due_ns = if has_more { now_ns } else { due_ns };
        if due_ns != u64::MAX {
            // A turn takes time, so no two are at the same.
            self.wake_at(node, due_ns.max(now_ns + 1_000));
        }
    }

    /// Everything has its bound (G8).
    fn check_bounds(&mut self, node: NodeId) {
        let plan = self.plan.clone();
        let is_full_look = self.dice.one_in(16);
        let process = self.process(node);
        let controller = &process.controller;
        // What workers had when they died is back in the queue whatever is there.
        let queued = controller.queue.len() + controller.staff.ahead();
        let queue_max = plan.bounds.queue_max + usize::from(plan.bounds.workers_max);
        assert!(queued <= queue_max, "G8: {queued} calls wait, and {queue_max} may");
        let handed = process.seats.values().filter(|seat| seat.handed.is_some()).count();
        let held = process.mailbox.stats();
        // What was handed out may come back when it is full.
        let messages_max = plan.messages_max + process.seats.len() + 1;
        assert!(held.messages <= messages_max, "G8: {held:?}, {handed} are handed out, and {messages_max} may be held");
        for target in &process.targets {
            let ((parcels, bytes), bounds) = (target.outbox.holds(), plan.parcels);
            assert!(
                parcels <= bounds.parcels_max && bytes <= bounds.bytes_max,
                "G8: {parcels} parcels, {bytes} bytes wait"
            );
            assert!(target.inbox.remembers() as u64 <= bounds.window, "G8: {} verdicts", target.inbox.remembers());
        }
        assert!(
            process.letters.open() <= usize::from(plan.bounds.workers_max),
            "G8: {} remote calls",
            process.letters.open()
        );
        assert!(process.objects.state.used_bytes() <= plan.state.bytes_max, "G8: the state is too large");
        if is_full_look {
            for (connection, open) in &controller.connections {
                let open_max = plan.bounds.connection_calls_max;
                assert!(
                    *open <= open_max || connection & PEER != 0,
                    "G8: {open} calls on one connection, and {open_max} may be"
                );
            }
            let (_, _, bytes) = controller.dedupe.kept();
            assert!(bytes <= plan.bounds.results_bytes_max, "G8: {bytes} bytes of results are kept");
        }
    }

    pub(super) fn act(&mut self, node: NodeId) {
        while let Some(action) = self.process(node).controller.next_action() {
            match action {
                Action::Dispatch { worker, call, function, deadline_ns, payload } => {
                    let ahead_max = self.plan.bounds.ahead_max;
                    let seat = self.process(node).seats.get_mut(&worker).expect("a call for somebody who is there");
                    let message = ToWorker::Request { call, function, deadline_ns, name: payload.name, is_void: false };
                    seat.given.push_back(Given { call, load: payload, begun: false });
                    assert!(
                        seat.given.len() <= 1 + ahead_max,
                        "{worker} has {} calls of {}",
                        seat.given.len(),
                        1 + ahead_max
                    );
                    self.tell(node, worker, message);
                }
                Action::Answer { to: Caller::Client { connection, call }, outcome } => {
                    self.answer_client(node, connection, call, outcome);
                }
                Action::Answer { to: Caller::Worker { worker, call }, outcome } => {
                    let (code, load) = spread(outcome);
                    let name = load.map_or(0, Load::spend);
                    // The dead do not hear it.
                    let Some(born) = self.process(node).seats.get(&worker).map(|seat| seat.born) else { continue };
                    let life = self.process(node).life;
                    let paid = self.checker.paid(node, life, Owed::Nested { worker, born, call });
                    assert!(paid, "{call} of worker {worker} is answered, and nobody waits for it");
                    self.tell(node, worker, ToWorker::Answer { call, code, name });
                }
                Action::Discard(load) => drop(load.spend()),
                Action::Withdraw { worker } => self.withdraw(node, worker),
                Action::TellCancelled { worker, call } => {
                    self.tell(node, worker, ToWorker::Cancelled { call });
                    let seat = self.process(node).seats.get(&worker).expect("told above");
                    if seat.given.front().is_some_and(|given| given.call == call) {
                        self.end_receive(node, worker);
                    }
                }
                Action::Spawn { worker } => self.spawn(node, worker),
                Action::Signal { worker, signal } => {
                    let stubborn = signal == Signal::Terminate && self.dice.one_in(3);
                    let seat = self.process(node).seats.get_mut(&worker).expect("a signal for somebody who is there");
                    seat.verdict.get_or_insert(Cause::Overran);
                    if !stubborn {
                        self.die(node, worker, Cause::Killed(15));
                    }
                }
                Action::Retire { worker } => self.tell(node, worker, ToWorker::Shutdown),
                Action::Grant { lease, caller, callee } => {
                    self.introduce(node, caller, callee);
                    self.tell(node, caller, ToWorker::Lease { lease, callee });
                }
                Action::Open { lease, caller, callee, .. } => {
                    self.introduce(node, callee, caller);
                    self.tell(node, callee, ToWorker::Serve { lease, caller });
                }
                Action::Revoke { lease, callee } => self.tell(node, callee, ToWorker::Revoke { lease }),
                Action::End { lease, caller } => self.tell(node, caller, ToWorker::Ended { lease }),
                Action::Lend { .. } => unreachable!("no client is hot here"),
                Action::Batch { .. } | Action::Join { .. } | Action::Joined { .. } | Action::Unjoin { .. } => {
                    unreachable!("each function runs for one call here")
                }
            }
        }
    }

    // ---- workers ----------------------------------------------------------------------------------------------

    /// Sends something to a worker, if there is one.
    pub(super) fn tell(&mut self, node: NodeId, worker: WorkerId, message: ToWorker) {
        let Some(seat) = self.process(node).seats.get_mut(&worker) else { return };
        seat.worker.inbox.push_back(message);
        let delay_ns = self.dice.between(500, 20_000);
        self.step_in(node, worker, delay_ns);
    }

    fn introduce(&mut self, node: NodeId, worker: WorkerId, other: WorkerId) {
        assert!(self.process(node).seats.contains_key(&other), "{worker} is introduced to {other}, who is not there");
        self.process(node).seats.get_mut(&worker).expect("who is introduced is there").worker.knows.insert(other);
    }

    fn spawn(&mut self, node: NodeId, worker: WorkerId) {
        let now_ns = self.agenda.now_ns;
        let fails = self.is_wild && self.dice.one_in(12);
        let process = self.process(node);
        assert!(!process.seats.contains_key(&worker), "{worker} is started twice");
        let is_mourned = process.seats.values().any(|other| other.worker.knows.contains(&worker));
        assert!(!is_mourned, "{worker} is started where the last one is mourned still");
        if fails {
            process.controller.died(now_ns, worker, Cause::Exited(127), false, Vec::new(), 0);
            return self.wake(node, 1_000);
        }
        process.born += 1;
        let seat = Seat {
            born: process.born,
            given: VecDeque::new(),
            handed: None,
            receives: None,
            waits: false,
            verdict: None,
            step_at_ns: u64::MAX,
            worker: Worker::default(),
        };
        process.seats.insert(worker, seat);
        let delay_ns = self.dice.between(MS, 20 * MS);
        self.step_in(node, worker, delay_ns);
    }

    /// Takes back what a worker has not begun on; perhaps its first a moment too late.
    fn withdraw(&mut self, node: NodeId, worker: WorkerId) {
        let (now_ns, crossed) = (self.agenda.now_ns, self.dice.one_in(3));
        let process = self.process(node);
        let Some(seat) = process.seats.get_mut(&worker) else { return };
        let begun = seat.given.iter().filter(|given| given.begun).count();
        let mut unbegun = seat.given.split_off(begun);
        if crossed
            && begun == 0
            && let Some(first) = unbegun.pop_front()
        {
            // The worker finds it withdrawn as it takes it, and says so.
            seat.worker.void(first.call);
            seat.given.push_back(first);
        }
        seat.worker.forget(|call| unbegun.iter().any(|given| given.call == call));
        let calls = unbegun.into_iter().map(|given| (given.call, given.load)).collect();
        process.controller.withdrawn(now_ns, worker, calls);
    }

    /// A worker begins on a call that it was given.
    pub(super) fn begun(&mut self, node: NodeId, worker: WorkerId, call: CallKey) {
        let seat = self.process(node).seats.get_mut(&worker).expect("who begins is there");
        let given = seat.given.iter_mut().find(|given| given.call == call);
        given.expect("what it begins on it was given").begun = true;
    }

    /// Takes one record of a worker. False when there is none.
    fn take(&mut self, node: NodeId, worker: WorkerId) -> bool {
        let now_ns = self.agenda.now_ns;
        let process = self.process(node);
        let Some(seat) = process.seats.get_mut(&worker) else { return false };
        if matches!(seat.verdict, Some(Cause::Violation(_))) {
            return false;
        }
        let Some(record) = seat.worker.outbox.pop_front() else { return false };
        if matches!(record, FromWorker::Reply { .. } | FromWorker::Call { .. } | FromWorker::Ask { .. })
            && let Some(handed) = seat.handed.take()
        {
            // It has gone on since.
            handed.spend();
        }
        let taken = match record {
            FromWorker::Registered => process.controller.ready(now_ns, worker, &functions(), &[]),
            FromWorker::Reply { call, run, how } => self.on_reply(node, worker, call, run, how),
            FromWorker::Call { call, function, deadline_ns, name, bytes, by_ns } => {
                let (born, life) = (seat.born, process.life);
                let payload = Load::new(&process.books, name, bytes, Some((worker, born)));
                let from = Caller::Worker { worker, call };
                let request = Request { from, function, deadline_ns, terms: Terms::default(), payload };
                self.checker.owe(node, life, Owed::Nested { worker, born, call }, by_ns);
                self.process(node).controller.request(now_ns, request);
                Ok(())
            }
            FromWorker::Void { call } => {
                let given = seat.given.pop_front().filter(|given| given.call == call && !given.begun);
                let given = given.expect("it was the first, and had not begun");
                process.controller.withdrawn(now_ns, worker, vec![(call, given.load)]);
                Ok(())
            }
            FromWorker::Cancel { call } => {
                process.controller.cancel_nested(worker, call);
                let (born, life) = (seat.born, process.life);
                self.checker.called_off(node, life, Owed::Nested { worker, born, call }, now_ns);
                Ok(())
            }
            FromWorker::Taken { lease } => process.controller.lease_taken(worker, lease, 0),
            FromWorker::Closed { lease } => process.controller.lease_closed(now_ns, worker, lease),
            FromWorker::Dropped { lease } => {
                process.controller.lease_dropped(worker, lease);
                Ok(())
            }
            FromWorker::Forgotten { gone } => {
                process.controller.forgotten(now_ns, worker, gone);
                Ok(())
            }
            FromWorker::Overrun { lease } => {
                process.controller.lease_overrun(now_ns, worker, lease);
                Ok(())
            }
            FromWorker::Ask { question, ask } => {
                self.on_ask(node, worker, question, ask);
                Ok(())
            }
        };
        if let Err(Violation(what)) = taken {
            self.condemn(node, worker, what);
        }
        true
    }

    fn on_ask(&mut self, node: NodeId, worker: WorkerId, question: u64, ask: Ask) {
        match ask {
            Ask::Send { to, key, bytes, deadline_ns } => {
                self.on_send(node, worker, question, to, key, bytes, deadline_ns)
            }
            Ask::Receive { from, key, deadline_ns } => self.on_receive(node, worker, question, from, key, deadline_ns),
            Ask::Call { peer, function, deadline_ns, name, bytes } => {
                self.call_peer(node, worker, question, peer, function, deadline_ns, name, bytes);
            }
            Ask::Put { .. } | Ask::Delete { .. } => self.on_state(node, worker, question, &ask),
        }
    }

    fn on_reply(&mut self, node: NodeId, worker: WorkerId, call: CallKey, run: u64, how: How) -> Result<(), Violation> {
        let now_ns = self.agenda.now_ns;
        let process = self.process(node);
        let seat = process.seats.get_mut(&worker).expect("who replies is there");
        let is_next = seat.given.front().is_some_and(|given| given.call == call);
        let given = if is_next { seat.given.pop_front() } else { None };
        let Some(Given { mut load, .. }) = given else { return Err(Violation("an answer to a call it was not given")) };
        let outcome = match how {
            How::Echoes => {
                load.name = run;
                Outcome::Done { status: 0, payload: load }
            }
            How::Returns { bytes } => {
                load.spend();
                let payload = Load::new(&process.books, run, bytes, Some((worker, seat.born)));
                Outcome::Done { status: 0, payload }
            }
            How::Fails => {
                load.spend();
                Outcome::Failed(CallError::new(Code::Failed, ""))
            }
            How::Panics => {
                load.spend();
                Outcome::Failed(CallError::new(Code::Panicked, ""))
            }
        };
        match process.controller.reply(now_ns, worker, call, outcome) {
            Ok(_) => Ok(()),
            Err((violation, _)) => panic!("{violation:?}, and it was given the call"),
        }
    }

    /// Kills a worker that broke the protocol. What it still says is dropped.
    fn condemn(&mut self, node: NodeId, worker: WorkerId, what: &'static str) {
        let seat = self.process(node).seats.get_mut(&worker).expect("who speaks is there");
        if seat.verdict.is_none() {
            seat.verdict = Some(Cause::Violation(what));
            self.die(node, worker, Cause::Killed(9));
        }
    }

    /// A worker's process ends. Its own hears of that a little later.
    pub(super) fn die(&mut self, node: NodeId, worker: WorkerId, cause: Cause) {
        let delay_ns = self.dice.between(1_000, 3 * MS);
        let process = self.process(node);
        let life = process.life;
        let Some(seat) = process.seats.get_mut(&worker) else { return };
        let born = seat.born;
        if seat.worker.dead.is_none() {
            seat.worker.dead = Some(cause);
            self.agenda.after(delay_ns, Event::Death { node, life, worker, born });
        }
    }

    /// As `Process::on_death` does: what it published first, then the verdict.
    pub(super) fn bury(&mut self, node: NodeId, worker: WorkerId) {
        let now_ns = self.agenda.now_ns;
        self.agenda.events += 1;
        self.checker.counts.deaths += 1;
        while self.take(node, worker) {}
        self.act(node);
        let life = self.process(node).life;
        let mut seat = self.process(node).seats.remove(&worker).expect("it was there");
        let cause = seat.verdict.or(seat.worker.dead).expect("it is dead");
        self.say(|| format!("process {node}: worker {worker} {cause}"));
        self.worker_ends(node, life, &seat.worker, true);
        self.checker.worker_gone(node, life, seat.born);
        self.outlive_mail(node, worker, &mut seat);
        self.outlive_letters(node, worker, seat.born);
        let has_begun = seat.given.front().is_none_or(|given| given.begun);
        let requests = seat.given.into_iter().map(|given| (given.call, given.load)).collect();
        let mut mourners = 0;
        let seated: Vec<WorkerId> = self.process(node).seats.keys().copied().collect();
        for other in seated {
            if self.process(node).seats[&other].worker.knows.contains(&worker) {
                mourners |= 1 << other;
                self.tell(node, other, ToWorker::PeerGone { gone: worker });
            }
        }
        let process = self.process(node);
        process.controller.died(now_ns, worker, cause, has_begun, requests, mourners);
        process.objects.outlive(now_ns, seat.born, seat.worker.blocks);
        self.wake(node, 1_000);
    }

    // ---- clients ----------------------------------------------------------------------------------------------

    pub(super) fn hear_client(&mut self, node: NodeId, client: usize, conn: ConnId, frame: Frame) {
        let now_ns = self.agenda.now_ns;
        let life = self.process(node).life;
        let number = self.process(node).numbers.get(&conn).copied();
        match (frame, number) {
            (Frame::Hello { session, number }, None) => {
                let process = self.process(node);
                process.made += 1;
                let connection = process.made;
                process.clients.insert(connection, (conn, client));
                process.numbers.insert(conn, connection);
                let older = match process.controller.greeted(connection, session, number) {
                    Ok(replaced) => replaced,
                    Err(Stale) => Some(connection),
                };
                self.put(conn, 0, Frame::Welcome { life });
                if let Some(older) = older {
                    self.close_client(node, older);
                }
            }
            (Frame::Request { call, function, budget_ns, terms, name, bytes }, Some(connection)) => {
                let deadline_ns = now_ns + budget_ns;
                if !terms.fire {
                    self.checker.owe(node, life, Owed::Client { connection, call }, deadline_ns);
                }
                let process = self.process(node);
                let payload = Load::new(&process.books, name, bytes, None);
                let from = Caller::Client { connection, call };
                process.controller.request(now_ns, Request { from, function, deadline_ns, terms, payload });
            }
            (Frame::Cancel { call }, Some(connection)) => {
                self.process(node).controller.cancel(connection, call);
                self.checker.called_off(node, life, Owed::Client { connection, call }, now_ns);
            }
            (Frame::End, Some(connection)) => self.close_client(node, connection),
            (Frame::End, None) => {}
            (frame, _) => panic!("a client says {frame:?} out of turn"),
        }
        let delay_ns = self.dice.between(1_000, 50_000);
        self.wake(node, delay_ns);
    }

    fn close_client(&mut self, node: NodeId, connection: u64) {
        let process = self.process(node);
        let life = process.life;
        let Some((conn, _)) = process.clients.remove(&connection) else { return };
        process.numbers.remove(&conn);
        process.controller.disconnected(connection);
        self.checker.caller_gone(node, life, connection);
        self.close(conn, 1);
    }

    fn answer_client(&mut self, node: NodeId, connection: u64, call: u64, outcome: Outcome<Load>) {
        let life = self.process(node).life;
        let paid = self.checker.paid(node, life, Owed::Client { connection, call });
        if connection & PEER != 0 {
            return self.answer_peer(node, connection, call, outcome, paid);
        }
        let (code, load) = spread(outcome);
        let name = load.map_or(0, Load::spend);
        let Some((conn, client)) = self.process(node).clients.get(&connection).copied() else { return };
        // The client came back, and its call has not yet.
        assert!(paid || self.is_kept(client, call), "call {call} of connection {connection} is answered twice");
        self.put(conn, 0, Frame::Answer { call, code, name });
    }

    // ---- questions --------------------------------------------------------------------------------------------

    /// The answer to a question of a worker.
    pub(super) fn answer(&mut self, node: NodeId, worker: WorkerId, question: u64, code: Code, about: Told) {
        let process = self.process(node);
        let life = process.life;
        let Some(seat) = process.seats.get_mut(&worker) else { return };
        let born = seat.born;
        seat.receives = None;
        if std::mem::take(&mut seat.waits) {
            process.controller.waited(worker);
        }
        let paid = self.checker.paid(node, life, Owed::Question { worker, born, question });
        assert!(paid, "question {question} of worker {worker} is answered, and nobody waits for it");
        self.tell(node, worker, ToWorker::Told { question, code, about });
    }

    /// Its function waits for something that may take a while.
    pub(super) fn now_waits(&mut self, node: NodeId, worker: WorkerId) {
        let process = self.process(node);
        if let Some(seat) = process.seats.get_mut(&worker)
            && !std::mem::replace(&mut seat.waits, true)
        {
            process.controller.waits(worker);
        }
    }

    pub(super) fn born(&mut self, node: NodeId, worker: WorkerId) -> u64 {
        self.process(node).seats.get(&worker).map_or(0, |seat| seat.born)
    }
}

/// What is told in an answer besides its code.
#[derive(Debug, Clone, Copy)]
pub(super) enum Told {
    Nothing,
    Message(u64),
    /// Of a state, or the run of a remote call.
    Number(u64),
}

pub(super) fn spread(outcome: Outcome<Load>) -> (Code, Option<Load>) {
    match outcome {
        Outcome::Done { payload, .. } => (Code::Ok, Some(payload)),
        Outcome::Failed(error) => (error.code, None),
    }
}
