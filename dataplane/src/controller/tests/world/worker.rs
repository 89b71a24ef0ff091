//! Workers: each runs one little program after another, as its dice fall. It computes, calls, reads and writes state, sends and receives,
//! and now and then hangs, lies, panics or dies.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::checker::Mode;
use super::linear::Deed;
use super::objects::{Blocks, Pin, key_bytes, object_bytes};
use super::process::Told;
use super::*;
use crate::controller::mailbox::Sender;
use crate::controller::peers::PeerNumber;

/// Calls of calls of calls.
const DEPTH_MAX: u8 = 3;
/// Objects that a worker reads at once.
const PINS_MAX: usize = 3;

/// What a worker is told.
#[derive(Debug)]
pub(super) enum ToWorker {
    /// `is_void`: it is withdrawn as it is being taken.
    Request {
        call: CallKey,
        function: u16,
        deadline_ns: u64,
        name: u64,
        is_void: bool,
    },
    Answer {
        call: u64,
        code: Code,
        name: u64,
    },
    Told {
        question: u64,
        code: Code,
        about: Told,
    },
    Cancelled {
        call: CallKey,
    },
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
    /// Over a lease, past the process.
    Direct {
        call: u64,
        code: Code,
        run: u64,
    },
    PeerGone {
        gone: WorkerId,
    },
    Shutdown,
}

/// What a worker publishes.
#[derive(Debug)]
pub(super) enum FromWorker {
    Registered,
    Reply {
        call: CallKey,
        run: u64,
        how: How,
    },
    Void {
        call: CallKey,
    },
    /// `by_ns`: when it ends at the latest, whatever was asked.
    Call {
        call: u64,
        function: u16,
        deadline_ns: u64,
        name: u64,
        bytes: usize,
        by_ns: u64,
    },
    Cancel {
        call: u64,
    },
    Ask {
        question: u64,
        ask: Ask,
    },
    Taken {
        lease: u64,
    },
    Closed {
        lease: u64,
    },
    Dropped {
        lease: u64,
    },
    Overrun {
        lease: u64,
    },
    Forgotten {
        gone: WorkerId,
    },
}

#[derive(Debug, Clone, Copy)]
pub(super) enum How {
    /// The input is the output.
    Echoes,
    Returns {
        bytes: usize,
    },
    Fails,
    Panics,
}

/// A question, of which a worker has one at a time.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ask {
    Send { to: Option<PeerNumber>, key: u8, bytes: usize, deadline_ns: u64 },
    Receive { from: Option<Sender>, key: Option<u8>, deadline_ns: u64 },
    Call { peer: PeerNumber, function: u16, deadline_ns: u64, name: u64, bytes: usize },
    Put { key: u8, expected: u64, block: u32 },
    Delete { key: u8, expected: u64 },
}

/// Who gets the result of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Process(CallKey),
    /// A caller that has a lease on this worker.
    Caller {
        worker: WorkerId,
        born: u64,
        call: u64,
    },
}

/// What a function waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    Answer(u64),
    Question(u64),
    Direct(u64),
    /// Nothing that ever comes.
    Hangs,
    /// Nothing: it computes until then, and reads nothing.
    Computes(u64),
}

#[derive(Debug)]
struct Running {
    of: Of,
    run: u64,
    depth: u8,
    function: u16,
    deadline_ns: u64,
    deeds_left: u64,
    wait: Option<Wait>,
    is_cancelled: bool,
    /// When it gives up the call over a lease that it waits for.
    gives_up_ns: u64,
}

/// A call over a lease that its callee has not begun on.
#[derive(Debug, Clone, Copy)]
struct Direct {
    call: u64,
    invocation: u64,
    function: u16,
    deadline_ns: u64,
}

#[derive(Debug, Default)]
pub(super) struct Worker {
    is_registered: bool,
    /// Its process has ended.
    pub(super) dead: Option<Cause>,
    pub(super) inbox: VecDeque<ToWorker>,
    /// What it read while it was inside a function, and is for when it is not.
    later: VecDeque<ToWorker>,
    pub(super) outbox: VecDeque<FromWorker>,
    running: Option<Running>,
    calls: u64,
    questions: u64,
    /// Nested calls without an answer, and the invocation of each.
    open: BTreeMap<u64, u64>,
    /// What a question about another process calls there.
    remote: Option<u64>,
    pub(super) knows: BTreeSet<WorkerId>,
    calling: Option<(u64, WorkerId)>,
    serving: Option<(u64, WorkerId)>,
    /// Calls to the worker that it has a lease on.
    ring: VecDeque<Direct>,
    /// The message it took last.
    pub(super) received: Option<u64>,
    pub(super) pins: Vec<Pin>,
    pub(super) blocks: Blocks,
    blocks_made: u32,
    /// What it does with the state: since when, under which key.
    deed: Option<(u64, u8, Deed)>,
}

impl Worker {
    /// Whether it says that its function waits.
    pub(super) fn waits(&self) -> bool {
        self.running
            .as_ref()
            .is_some_and(|running| running.wait.is_some_and(|wait| !matches!(wait, Wait::Hangs | Wait::Computes(_))))
    }

    pub(super) fn is_quiet(&self) -> bool {
        let has_nothing =
            self.inbox.is_empty() && self.later.is_empty() && self.outbox.is_empty() && self.ring.is_empty();
        has_nothing && self.running.is_none() && self.open.is_empty() && self.dead.is_none()
    }

    fn requests(&mut self) -> impl Iterator<Item = &mut ToWorker> {
        self.later.iter_mut().chain(&mut self.inbox)
    }

    /// A request was withdrawn as it was being taken.
    pub(super) fn void(&mut self, voided: CallKey) {
        let found = self.requests().find_map(|message| match message {
            ToWorker::Request { call, is_void, .. } if *call == voided => Some(is_void),
            _ => None,
        });
        *found.expect("what it has not begun on it has to read") = true;
    }

    /// Requests that were withdrawn.
    pub(super) fn forget(&mut self, is_it: impl Fn(CallKey) -> bool) {
        for messages in [&mut self.later, &mut self.inbox] {
            messages
                .retain(|message| !matches!(message, ToWorker::Request { call, is_void: false, .. } if is_it(*call)));
        }
    }
}

impl World {
    /// A worker does something in `delay_ns`.
    pub(super) fn step_in(&mut self, node: NodeId, worker: WorkerId, delay_ns: u64) {
        let at_ns = self.agenda.now_ns + delay_ns;
        let process = self.process(node);
        let life = process.life;
        let Some(seat) = process.seats.get_mut(&worker).filter(|seat| at_ns < seat.step_at_ns) else { return };
        seat.step_at_ns = at_ns;
        let born = seat.born;
        self.agenda.at(at_ns, Event::Step { node, life, worker, born });
    }

    fn worker(&mut self, node: NodeId, worker: WorkerId) -> &mut Worker {
        &mut self.process(node).seats.get_mut(&worker).expect("who takes a step is there").worker
    }

    fn running(&mut self, node: NodeId, worker: WorkerId) -> &mut Running {
        self.worker(node, worker).running.as_mut().expect("it is inside a function")
    }

    fn publish(&mut self, node: NodeId, worker: WorkerId, record: FromWorker) {
        self.worker(node, worker).outbox.push_back(record);
        let delay_ns = self.dice.between(200, 20_000);
        self.wake(node, delay_ns);
    }

    pub(super) fn step(&mut self, node: NodeId, worker: WorkerId, born: u64) {
        let now_ns = self.agenda.now_ns;
        let Some(seat) = self.seat(node, worker, born).filter(|seat| seat.step_at_ns == now_ns) else { return };
        seat.step_at_ns = u64::MAX;
        if seat.worker.dead.is_some() {
            return;
        }
        self.agenda.events += 1;
        if !self.worker(node, worker).is_registered {
            if self.is_wild && self.dice.one_in(15) {
                return self.die(node, worker, Cause::Exited(1));
            }
            self.worker(node, worker).is_registered = true;
            return self.publish(node, worker, FromWorker::Registered);
        }
        match self.worker(node, worker).running.as_ref().map(|running| running.wait) {
            Some(None) => self.go_on(node, worker),
            Some(Some(Wait::Hangs)) => return,
            Some(Some(Wait::Computes(until_ns))) if until_ns > now_ns => {
                return self.step_in(node, worker, until_ns - now_ns);
            }
            Some(Some(Wait::Computes(_))) => self.running(node, worker).wait = None,
            Some(Some(wait)) => self.read_or_lose_patience(node, worker, wait),
            None => self.look_around(node, worker),
        }
        let Some(seat) = self.seat(node, worker, born) else { return };
        let is_at_it = match &seat.worker.running {
            Some(running) => running.wait.is_none() || seat.worker.waits() && !seat.worker.inbox.is_empty(),
            None => !seat.worker.inbox.is_empty() || !seat.worker.later.is_empty() || seat.worker.serving.is_some(),
        };
        let pause_ns = match seat.worker.running {
            // Under a lease it looks for calls.
            None if seat.worker.serving.is_some() && seat.worker.inbox.is_empty() => 200_000,
            _ => 0,
        };
        if is_at_it {
            let delay_ns = pause_ns
                + if self.dice.one_in(10) { self.dice.between(MS, 8 * MS) } else { self.dice.between(1_000, 80_000) };
            self.step_in(node, worker, delay_ns);
        }
    }

    /// Inside no function: the next message, or the next call of who has a lease.
    fn look_around(&mut self, node: NodeId, worker: WorkerId) {
        let seat = self.worker(node, worker);
        if let Some(message) = seat.later.pop_front().or_else(|| seat.inbox.pop_front()) {
            return self.read(node, worker, message);
        }
        let Some((lease, caller)) = seat.serving else { return };
        let Some(seat) = self.process(node).seats.get_mut(&caller) else { return };
        if seat.worker.calling != Some((lease, worker)) {
            return;
        }
        let born = seat.born;
        if let Some(Direct { call, invocation, function, deadline_ns }) = seat.worker.ring.pop_front() {
            self.checker.counts.direct += 1;
            let of = Of::Caller { worker: caller, born, call };
            self.begin(node, worker, of, invocation, function, deadline_ns);
        }
    }

    fn begin(&mut self, node: NodeId, worker: WorkerId, of: Of, invocation: u64, function: u16, deadline_ns: u64) {
        let run = self.checker.begins(invocation);
        let depth = self.checker.depth(invocation);
        let deeds_left = if self.is_busy { self.dice.below(6) } else { 0 };
        let running = Running {
            of,
            run,
            depth,
            function,
            deadline_ns,
            deeds_left,
            wait: None,
            is_cancelled: false,
            gives_up_ns: u64::MAX,
        };
        self.say(|| format!("process {node}: worker {worker} begins on {invocation} as run {run}"));
        self.worker(node, worker).running = Some(running);
    }

    fn read_or_lose_patience(&mut self, node: NodeId, worker: WorkerId, wait: Wait) {
        let now_ns = self.agenda.now_ns;
        if let Some(message) = self.worker(node, worker).inbox.pop_front() {
            return self.read(node, worker, message);
        }
        let gives_up_ns = self.running(node, worker).gives_up_ns;
        let (Wait::Direct(call), true) = (wait, gives_up_ns <= now_ns) else { return };
        self.running(node, worker).wait = None;
        let seat = self.worker(node, worker);
        seat.ring.retain(|direct| direct.call != call);
        seat.open.remove(&call);
        if let Some((lease, _)) = seat.calling {
            self.publish(node, worker, FromWorker::Overrun { lease });
        }
    }

    fn read(&mut self, node: NodeId, worker: WorkerId, message: ToWorker) {
        let serves = self.worker(node, worker).serving;
        match message {
            request @ ToWorker::Request { .. } if self.worker(node, worker).running.is_some() => {
                self.worker(node, worker).later.push_back(request);
            }
            ToWorker::Request { call, is_void: true, .. } => self.publish(node, worker, FromWorker::Void { call }),
            ToWorker::Request { call, function, deadline_ns, name, .. } => {
                assert!(serves.is_none(), "a request while it serves a lease");
                self.begun(node, worker, call);
                self.begin(node, worker, Of::Process(call), name, function, deadline_ns);
            }
            ToWorker::Answer { call, code, name } => self.answered(node, worker, call, code, name, Wait::Answer(call)),
            ToWorker::Direct { call, code, run } => self.answered(node, worker, call, code, run, Wait::Direct(call)),
            ToWorker::Told { question, code, about } => self.told(node, worker, question, code, about),
            ToWorker::Cancelled { call } => {
                if let Some(running) = &mut self.worker(node, worker).running {
                    running.is_cancelled |= running.of == Of::Process(call);
                }
            }
            ToWorker::Lease { lease, callee } => {
                let seat = self.worker(node, worker);
                assert!(seat.calling.is_none(), "two leases at once");
                seat.calling = Some((lease, callee));
                self.publish(node, worker, FromWorker::Taken { lease });
            }
            ToWorker::Serve { lease, caller } => {
                let seat = self.worker(node, worker);
                assert!(seat.serving.is_none() && seat.running.is_none(), "serves two");
                seat.serving = Some((lease, caller));
            }
            ToWorker::Revoke { lease } => {
                if serves.is_some_and(|(serving, _)| serving == lease) && self.worker(node, worker).running.is_some() {
                    // When the call is over that it serves.
                    return self.worker(node, worker).later.push_back(message);
                }
                self.worker(node, worker).serving.take_if(|(serving, _)| *serving == lease);
                self.publish(node, worker, FromWorker::Closed { lease });
            }
            ToWorker::Ended { lease } => {
                self.stop_calling(node, worker, |(calling, _)| calling == lease, true);
                self.publish(node, worker, FromWorker::Dropped { lease });
            }
            ToWorker::PeerGone { gone } => {
                self.stop_calling(node, worker, |(_, callee)| callee == gone, false);
                let seat = self.worker(node, worker);
                if serves.is_some_and(|(_, caller)| caller == gone) && seat.running.is_some() {
                    return seat.later.push_back(message);
                }
                seat.serving.take_if(|(_, caller)| *caller == gone);
                seat.knows.remove(&gone);
                self.publish(node, worker, FromWorker::Forgotten { gone });
            }
            ToWorker::Shutdown => self.die(node, worker, Cause::Exited(0)),
        }
    }

    /// A lease is over: what its callee has not begun on goes by the process; what it died with is lost.
    fn stop_calling(
        &mut self,
        node: NodeId,
        worker: WorkerId,
        is_it: impl Fn((u64, WorkerId)) -> bool,
        was_answered: bool,
    ) {
        let seat = self.worker(node, worker);
        if !seat.calling.is_some_and(is_it) {
            return;
        }
        seat.calling = None;
        let left: Vec<Direct> = seat.ring.drain(..).collect();
        let waits = seat.running.as_ref().and_then(|running| running.wait);
        for Direct { call, invocation, function, deadline_ns } in left {
            self.running(node, worker).wait = Some(Wait::Answer(call));
            let record =
                FromWorker::Call { call, function, deadline_ns, name: invocation, bytes: 10, by_ns: deadline_ns };
            self.publish(node, worker, record);
        }
        if let Some(Wait::Direct(call)) = waits
            && self.running(node, worker).wait == waits
        {
            assert!(!was_answered, "lease: call {call} was begun on, and has no answer when the lease ends");
            self.running(node, worker).wait = None;
            self.worker(node, worker).open.remove(&call);
        }
    }

    /// A nested call is answered.
    fn answered(&mut self, node: NodeId, worker: WorkerId, call: u64, code: Code, run: u64, wait: Wait) {
        let seat = self.worker(node, worker);
        if let Some(running) = seat.running.as_mut().filter(|running| running.wait == Some(wait)) {
            running.wait = None;
        }
        let Some(invocation) = seat.open.remove(&call) else {
            assert!(matches!(wait, Wait::Direct(_)), "call {call} of worker {worker} is answered twice");
            return;
        };
        self.checker.counts.nested += 1;
        if code == Code::Ok {
            self.checker.result(invocation, run);
        }
    }

    /// A question is answered.
    fn told(&mut self, node: NodeId, worker: WorkerId, question: u64, code: Code, about: Told) {
        let running = self.running(node, worker);
        assert_eq!(running.wait.take(), Some(Wait::Question(question)), "an answer to what was not asked");
        let seat = self.worker(node, worker);
        let (deed, remote) = (seat.deed.take(), seat.remote.take());
        match (about, remote) {
            (Told::Message(message), _) => self.has_received(node, worker, message),
            (Told::Number(run), Some(invocation)) => {
                self.checker.counts.remote += 1;
                if code == Code::Ok {
                    self.checker.result(invocation, run);
                }
            }
            (Told::Number(number), None) => {
                if code == Code::Conflict {
                    self.checker.counts.conflicts += 1;
                }
                let (asked, key, deed) = deed.expect("it did something with the state");
                let life = self.process(node).life;
                let deed = match (deed, code) {
                    (Deed::Put { expected, value, .. }, Code::Ok) => {
                        Deed::Put { expected, value, said: Some(Ok(number)) }
                    }
                    (Deed::Put { expected, value, .. }, Code::Conflict) => {
                        Deed::Put { expected, value, said: Some(Err(number)) }
                    }
                    (Deed::Delete { expected, .. }, Code::Ok) => Deed::Delete { expected, said: Some(Ok(number != 0)) },
                    (Deed::Delete { expected, .. }, Code::Conflict) => {
                        Deed::Delete { expected, said: Some(Err(number)) }
                    }
                    // There was no room: nothing has changed.
                    _ => return,
                };
                self.checker.did(node, life, key, asked, true, deed);
            }
            (Told::Nothing, _) => {}
        }
    }

    // ---- programs ---------------------------------------------------------------------------------------------

    /// The next deed of a function.
    fn go_on(&mut self, node: NodeId, worker: WorkerId) {
        let (wild, roll) = (self.is_wild, self.dice.below(100));
        let running = self.running(node, worker);
        let (function, depth, is_cancelled) = (running.function, running.depth, running.is_cancelled);
        if wild && function == ABORT {
            match roll {
                0..4 => return self.die(node, worker, Cause::Killed(6)),
                4..8 => return self.finish(node, worker, How::Panics),
                8..10 => {
                    running.wait = Some(Wait::Hangs);
                    return;
                }
                _ => {}
            }
        }
        if wild && function == SLOW && roll < 15 {
            let for_ns = self.dice.between(MS, 700 * MS);
            let until_ns = self.agenda.now_ns + for_ns;
            self.running(node, worker).wait = Some(Wait::Computes(until_ns));
            return self.step_in(node, worker, for_ns);
        }
        let running = self.running(node, worker);
        if running.deeds_left == 0 || is_cancelled && roll < 70 {
            return self.end(node, worker, roll);
        }
        running.deeds_left -= 1;
        let roll = self.dice.below(100);
        match roll {
            0..24 if depth < DEPTH_MAX => self.call_function(node, worker),
            0..24 => {}
            24..36 => self.put_object(node, worker),
            36..40 => self.delete(node, worker),
            40..52 => self.get(node, worker),
            52..68 => self.send_message(node, worker),
            68..84 => self.receive(node, worker),
            84..94 if depth < DEPTH_MAX && self.plan.nodes > 1 => self.call_process(node, worker),
            84..97 => {}
            _ if wild => self.lie(node, worker),
            _ => {}
        }
    }

    /// The function returns, when its calls have ended; or leaves them alone.
    fn end(&mut self, node: NodeId, worker: WorkerId, roll: u64) {
        let seat = self.worker(node, worker);
        if let Some(first) = seat.open.keys().next().copied()
            && roll < 90
        {
            self.running(node, worker).wait = Some(Wait::Answer(first));
            return;
        }
        let how = match roll % 8 {
            0 => How::Fails,
            1..4 => How::Echoes,
            _ => How::Returns { bytes: (roll % 80) as usize },
        };
        self.finish(node, worker, how);
    }

    fn finish(&mut self, node: NodeId, worker: WorkerId, how: How) {
        let running = self.worker(node, worker).running.take().expect("it is inside a function");
        // What it read it holds no longer than it runs.
        for pin in std::mem::take(&mut self.worker(node, worker).pins) {
            self.let_go(node, &pin);
        }
        match running.of {
            Of::Process(call) => self.publish(node, worker, FromWorker::Reply { call, run: running.run, how }),
            Of::Caller { worker: caller, born, call } => {
                let code = match how {
                    How::Echoes | How::Returns { .. } => Code::Ok,
                    How::Fails => Code::Failed,
                    How::Panics => Code::Panicked,
                };
                if let Some(seat) = self.seat(node, caller, born) {
                    seat.worker.inbox.push_back(ToWorker::Direct { call, code, run: running.run });
                    self.step_in(node, caller, 1_000);
                }
            }
        }
        if matches!(how, How::Panics) {
            self.die(node, worker, Cause::Exited(71));
        }
    }

    /// A deadline for what the function does: none of its own, now and then.
    fn until(&mut self, node: NodeId, worker: WorkerId, longest_ns: u64) -> u64 {
        let at_ns = self.agenda.now_ns + self.dice.between(MS, longest_ns);
        let forever = self.dice.one_in(6);
        let running = self.running(node, worker);
        match running.of {
            // Its library sees to it that nothing outlives the call.
            Of::Caller { .. } => at_ns.min(running.deadline_ns),
            Of::Process(_) if forever => u64::MAX,
            Of::Process(_) => at_ns,
        }
    }

    fn call_function(&mut self, node: NodeId, worker: WorkerId) {
        let function = self.dice.below(u64::from(FUNCTIONS)) as u16;
        let deadline_ns = self.until(node, worker, 400 * MS);
        let (waits, direct, cancels) = (!self.dice.one_in(3), !self.dice.one_in(3), self.dice.one_in(4));
        let bytes = self.dice.below(80) as usize;
        let (depth, run_by_ns) = {
            let running = self.running(node, worker);
            (running.depth + 1, running.deadline_ns)
        };
        let by_ns = deadline_ns.min(run_by_ns);
        let name = self.checker.invocation(Mode::AtMostOnce, depth);
        let seat = self.worker(node, worker);
        seat.calls += 1;
        let call = seat.calls;
        seat.open.insert(call, name);
        if let (Some((_, callee)), true, true) = (seat.calling, waits, direct) {
            seat.ring.push_back(Direct { call, invocation: name, function, deadline_ns: by_ns });
            self.running(node, worker).wait = Some(Wait::Direct(call));
            let patience_ns = by_ns.saturating_sub(self.agenda.now_ns);
            self.running(node, worker).gives_up_ns = by_ns;
            self.step_in(node, worker, patience_ns);
            return self.step_in(node, callee, 1_000);
        }
        self.publish(node, worker, FromWorker::Call { call, function, deadline_ns, name, bytes, by_ns });
        if waits {
            self.running(node, worker).wait = Some(Wait::Answer(call));
        } else if cancels {
            self.publish(node, worker, FromWorker::Cancel { call });
        }
    }

    fn ask(&mut self, node: NodeId, worker: WorkerId, ask: Ask, by_ns: u64) {
        let life = self.process(node).life;
        let by_ns = by_ns.min(self.running(node, worker).deadline_ns).max(self.agenda.now_ns);
        let seat = self.worker(node, worker);
        seat.questions += 1;
        let question = seat.questions;
        self.running(node, worker).wait = Some(Wait::Question(question));
        let born = self.born(node, worker);
        self.checker.owe(node, life, Owed::Question { worker, born, question }, by_ns);
        self.publish(node, worker, FromWorker::Ask { question, ask });
    }

    fn send_message(&mut self, node: NodeId, worker: WorkerId) {
        let others = self.plan.nodes - 1;
        let to = if others == 0 || self.dice.one_in(4) { None } else { Some(self.dice.below(others as u64) as usize) };
        let (key, bytes) = (self.dice.below(u64::from(KEYS)) as u8, self.dice.below(90) as usize);
        // The library has a deadline for each.
        let deadline_ns = self.until(node, worker, 300 * MS).min(self.running(node, worker).deadline_ns);
        self.ask(node, worker, Ask::Send { to, key, bytes, deadline_ns }, deadline_ns);
    }

    fn receive(&mut self, node: NodeId, worker: WorkerId) {
        let from = match self.dice.below(4) {
            0 => Some(Sender::Own),
            1 if self.plan.nodes > 1 => Some(Sender::Peer(self.dice.below(self.plan.nodes as u64 - 1) as usize)),
            _ => None,
        };
        let key = if self.dice.one_in(3) { None } else { Some(self.dice.below(u64::from(KEYS)) as u8) };
        let ends_ns = self.running(node, worker).deadline_ns;
        let deadline_ns = if self.dice.one_in(3) { 0 } else { self.until(node, worker, 200 * MS).min(ends_ns) };
        self.ask(node, worker, Ask::Receive { from, key, deadline_ns }, deadline_ns);
    }

    fn call_process(&mut self, node: NodeId, worker: WorkerId) {
        let peer = self.dice.below(self.plan.nodes as u64 - 1) as usize;
        let (function, bytes) = (self.dice.below(u64::from(FUNCTIONS)) as u16, self.dice.below(60) as usize);
        let deadline_ns = self.until(node, worker, 300 * MS).min(self.running(node, worker).deadline_ns);
        let depth = self.running(node, worker).depth + 1;
        let name = self.checker.invocation(Mode::AtMostOnce, depth);
        self.worker(node, worker).remote = Some(name);
        self.ask(node, worker, Ask::Call { peer, function, deadline_ns, name, bytes }, deadline_ns);
    }

    /// What it expects to be current: whatever there is, nothing, or what was read.
    fn expected(&mut self, node: NodeId, key: u8) -> u64 {
        match self.dice.below(4) {
            0 => 0,
            1 | 2 => self.glance(node, key),
            _ => WHATEVER,
        }
    }

    fn put_object(&mut self, node: NodeId, worker: WorkerId) {
        let key = self.dice.below(u64::from(KEYS)) as u8;
        let expected = self.expected(node, key);
        let words = if self.dice.one_in(30) { 200 } else { self.dice.between(1, 12) as usize };
        let asked = self.checker.moment();
        let seat = self.worker(node, worker);
        seat.blocks_made += 1;
        let block = seat.blocks_made;
        // No two are the same, so it says which deed it was.
        let value = asked;
        seat.blocks.insert(block, (block, object_bytes(key, value, words)));
        seat.deed = Some((asked, key, Deed::Put { expected, value, said: None }));
        self.ask(node, worker, Ask::Put { key, expected, block }, self.agenda.now_ns);
    }

    fn delete(&mut self, node: NodeId, worker: WorkerId) {
        let key = self.dice.below(u64::from(KEYS)) as u8;
        let expected = self.expected(node, key);
        let asked = self.checker.moment();
        self.worker(node, worker).deed = Some((asked, key, Deed::Delete { expected, said: None }));
        self.ask(node, worker, Ask::Delete { key, expected }, self.agenda.now_ns);
    }

    fn get(&mut self, node: NodeId, worker: WorkerId) {
        let key = self.dice.below(u64::from(KEYS)) as u8;
        let life = self.process(node).life;
        let asked = self.checker.moment();
        let pin = self.pin_object(node, key);
        let (version, value) = World::value_of(pin.as_ref());
        self.checker.did(node, life, key, asked, true, Deed::Get { version, value });
        let seat = self.worker(node, worker);
        seat.pins.extend(pin);
        if seat.pins.len() > PINS_MAX {
            let pin = seat.pins.remove(0);
            self.let_go(node, &pin);
        }
    }

    /// Says what it may say and what is not so.
    fn lie(&mut self, node: NodeId, worker: WorkerId) {
        self.checker.counts.lies += 1;
        let number = self.dice.below(64);
        let other = 1 + (number % 63) as WorkerId;
        let record = match self.dice.below(8) {
            0 => FromWorker::Overrun { lease: number },
            1 => FromWorker::Cancel { call: number << 40 },
            2 => FromWorker::Dropped { lease: number << 40 },
            3 if !self.worker(node, worker).knows.contains(&other) => FromWorker::Forgotten { gone: other },
            // These are found out, and it is killed for them.
            4 => FromWorker::Taken { lease: 1 << 40 | number },
            5 => FromWorker::Closed { lease: 1 << 40 | number },
            6 => FromWorker::Reply { call: number << 40, run: u64::MAX, how: How::Fails },
            _ => FromWorker::Cancel { call: number },
        };
        self.publish(node, worker, record);
    }

    /// A worker, or its process, is no more.
    pub(super) fn worker_ends(&mut self, node: NodeId, life: u64, worker: &Worker, has_died: bool) {
        if let Some((asked, key, deed)) = worker.deed {
            self.checker.did(node, life, key, asked, false, deed);
        }
        // Those it was killed for telling of are lost, too.
        let unheard = worker.outbox.iter().filter_map(|record| match record {
            FromWorker::Reply { run, .. } => Some(*run),
            _ => None,
        });
        if has_died {
            let runs = worker.running.iter().map(|running| running.run).chain(unheard);
            for run in runs.filter(|run| *run != u64::MAX) {
                self.checker.run_died(run);
            }
        }
    }

    /// The version under a key, without keeping it.
    fn glance(&mut self, node: NodeId, key: u8) -> u64 {
        let objects = &self.process(node).objects;
        objects.state.current(&key_bytes(key), &objects.arena).map_or(0, |(version, ..)| version)
    }
}
