//! The controller decides; it reads no clock, opens no socket and never looks into a payload.
//!
//! Events come in as method calls with the time, decisions go out as [`Action`]s in order. A payload `P` passes
//! through by value: whatever enters with a call leaves in exactly one `Dispatch`, `Answer` or `Discard`.
//!
//! | file          | decides                                                        |
//! |---------------|----------------------------------------------------------------|
//! | `mod.rs`      | admission, dispatch, deadlines, answers                        |
//! | `queue.rs`    | whose call is next                                             |
//! | `lease.rs`    | which worker may call which without us                         |
//! | `batch.rs`    | which calls are run together                                   |
//! | `connection_lease.rs` | which client talks to a worker without us              |
//! | `ahead.rs`    | which calls busy workers are given already, and take back      |
//! | `pace.rs`     | how long a function takes                                      |
//! | `staff.rs`    | how many workers run, their deaths, replacement and back-off   |
//! | `circuit.rs`  | which function has killed its workers too often                |
//! | `dedupe.rs`   | which calls came before, and how they ended                    |
//! | `state.rs`     | which object is current under each key, and when its bytes may go |
//! | `peers.rs`    | which connection joins us to each process we were told of      |
//! | `join.rs`     | which messages a function runs for                             |
//! | `mailbox.rs`  | which function gets which message                              |
//! | `post.rs`     | what is sent to a process again, and what came from it before  |

mod ahead;
pub(crate) mod batch;
mod batched;
mod circuit;
pub(crate) mod connection_lease;
mod dedupe;
pub(crate) mod join;
pub(crate) mod lane;
mod lease;
pub(crate) mod mailbox;
pub(crate) mod membership;
mod pace;
pub(crate) mod peers;
pub(crate) mod post;
mod queue;
mod staff;
pub(crate) mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use slab::Slab;

use crate::numbered::NumberMap;
use crate::wire::{Code, Trigger};
use batch::{Batches, is_batch};
use circuit::Circuit;
use connection_lease::ConnectionLeases;
use dedupe::{Dedupe, Seen};
pub(crate) use dedupe::{Keep, Once, SessionId, Stale, WINDOW_CALLS};
use join::RunId;
use lease::Lease;
use pace::Pace;
use queue::{LaneId, Queue};
pub(crate) use staff::{Cause, Limit};
use staff::{Staff, State, Turn};

/// Number of a worker, 1..=63: its participant id.
pub(crate) type WorkerId = u8;

/// A call the controller knows. The low half is a place, the high half how often the place was used.
pub(crate) type CallKey = u64;

/// Who waits for the answer to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caller {
    /// A connection and the call's number on it.
    Client { connection: u64, call: u64 },
    /// A function that called from inside a worker, and the worker's number for the call.
    Worker { worker: WorkerId, call: u64 },
}

/// Who hears how a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiter {
    Client {
        connection: u64,
        call: u64,
    },
    Worker {
        worker: WorkerId,
        call: u64,
    },
    /// Whichever connection the session has by then.
    Session {
        session: u64,
        call: u64,
    },
    /// Nobody: it was fired. Counts for its connection all the same.
    Nobody {
        connection: u64,
    },
    /// Nobody: it is one of so many messages that a function runs for.
    Join {
        run: RunId,
        of: usize,
    },
}

impl Waiter {
    /// A function waits, here or in another process: somebody's worker is not free before this call ends.
    fn is_function(self) -> bool {
        match self {
            Waiter::Worker { .. } => true,
            Waiter::Client { connection, .. } => connection & PEER != 0,
            Waiter::Session { .. } | Waiter::Nobody { .. } | Waiter::Join { .. } => false,
        }
    }
}

/// How a call ends without a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CallError {
    pub(crate) code: Code,
    /// Negative status of a function that failed; 0 for every other code.
    pub(crate) status: i32,
    pub(crate) text: String,
    /// The function that failed still reads its input: the caller's block stays lent.
    pub(crate) keeps: bool,
}

impl CallError {
    pub(crate) fn new(code: Code, text: impl Into<String>) -> Self {
        CallError { code, status: 0, text: text.into(), keeps: false }
    }

    fn timed_out_running() -> Self {
        CallError::new(Code::Timeout, "the deadline passed while the function ran")
    }
}

/// What a call ended with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome<P> {
    Done { status: i32, payload: P },
    Failed(CallError),
}

/// What the runtime has to do, in the order given.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action<P> {
    /// Hand the call to a worker, behind those it has.
    Dispatch { worker: WorkerId, call: CallKey, function: u16, deadline_ns: u64, payload: P },
    /// The next so many calls that are handed to this worker, of which `call` is the first, are one batch: to be run once, by `deadline_ns`.
    Batch { worker: WorkerId, call: CallKey, function: u16, calls: u16, deadline_ns: u64 },
    /// The same of the messages of a run.
    Join { worker: WorkerId, call: CallKey, function: u16, calls: u16, deadline_ns: u64, run: RunId },
    /// The next message of a run is answered for: the function took it, or failed or was lost with it.
    Joined { run: RunId, failure: Option<CallError> },
    /// The next message of a run is back: it did not run, or may run again.
    Unjoin { run: RunId, payload: P },
    /// Tell the caller how it ended.
    Answer { to: Caller, outcome: Outcome<P> },
    /// Nobody wants this payload any more.
    Discard(P),
    /// Take back the calls of a worker that it has not begun on, and give them to [`Controller::withdrawn`].
    Withdraw { worker: WorkerId },
    /// Nobody waits for `call` any more; the function may ask.
    TellCancelled { worker: WorkerId, call: CallKey },
    /// Start a worker in this place.
    Spawn { worker: WorkerId },
    /// Send a signal to the worker's process group.
    Signal { worker: WorkerId, signal: Signal },
    /// Ask an idle worker to exit.
    Retire { worker: WorkerId },
    /// Give the caller its end of a lease.
    Grant { lease: u64, caller: WorkerId, callee: WorkerId },
    /// The caller is ready: give the callee its end.
    Open { lease: u64, caller: WorkerId, callee: WorkerId, position: u64 },
    /// Ask the callee to close.
    Revoke { lease: u64, callee: WorkerId },
    /// Tell the caller that the lease is over.
    End { lease: u64, caller: WorkerId },
    /// Hand a client's connection to a worker, when its answers are written, if [`Controller::may_lend`] says so then.
    Lend { lease: u64, connection: u64, worker: WorkerId, function: u16 },
}

/// Signals the controller sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    Terminate,
    Kill,
}

/// Bounds of the controller; see [`crate::config::ProcessConfig`] for their meaning.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    pub(crate) workers: u8,
    pub(crate) workers_max: u8,
    pub(crate) queue_max: usize,
    /// Calls that a worker may be given besides the one it runs; 0 where they cannot be taken back.
    pub(crate) ahead_max: usize,
    /// Short calls go to a worker that is at it before they wake another: the workers share cores.
    pub(crate) packs: bool,
    pub(crate) connection_calls_max: u32,
    pub(crate) grace_ns: u64,
    pub(crate) start_ns: u64,
    pub(crate) deadline_ns: u64,
    pub(crate) leases: bool,
    /// Calls in a row after which a client's connection is lent to its worker; 0: none is.
    pub(crate) hot_calls: u8,
    /// Results kept for calls that are sent again, bytes.
    pub(crate) results_bytes_max: usize,
    /// Inputs that a function is called with at once, bytes.
    pub(crate) batch_bytes_max: usize,
}

/// What a request asks for besides a function.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Terms {
    /// May be run again when its worker is lost.
    pub(crate) idempotent: bool,
    /// Nobody waits for an answer.
    pub(crate) fire: bool,
    /// To be recognised when it comes again.
    pub(crate) once: Option<Once>,
}

/// A request as it arrives.
#[derive(Debug)]
pub(crate) struct Request<P> {
    pub(crate) from: Caller,
    pub(crate) function: u16,
    /// CLOCK_MONOTONIC.
    pub(crate) deadline_ns: u64,
    pub(crate) terms: Terms,
    pub(crate) payload: P,
}

#[derive(Debug)]
struct Call<P> {
    from: Waiter,
    function: u16,
    deadline_ns: u64,
    idempotent: bool,
    /// Times it was handed to a worker that died.
    attempts: u8,
    uses: u32,
    /// The caller has its answer already; only the worker is still at it.
    abandoned: bool,
    /// Present while queued; a worker has it else.
    payload: Option<P>,
}

/// Bit of a connection's number: it is not a client's, but that of the peer of this number.
pub(crate) const PEER: u64 = 1 << 62;

/// Times a call is handed out again after a worker died with it, so that a poisonous call cannot eat workers for ever.
const ATTEMPTS_MAX: u8 = 3;
/// How often a stuck queue is looked at, and how long everybody must have been waiting before someone is told `Busy`.
const STUCK_NS: u64 = 20_000_000;
const LOOK_NS: u64 = 5_000_000;

/// A worker did what its protocol forbids; it is to be killed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation(pub(crate) &'static str);

#[derive(Debug)]
pub(crate) struct Controller<P> {
    bounds: Bounds,
    functions: Vec<String>,
    /// Of those that are not called one by one.
    triggers: Vec<(u16, Trigger)>,
    circuits: Vec<Circuit>,
    paces: Vec<Pace>,
    calls: Slab<Call<P>>,
    uses: u32,
    queue: Queue,
    batches: Batches,
    connections: NumberMap<u32>,
    dedupe: Dedupe<P>,
    staff: Staff,
    /// By number, so that what follows from a death follows in one order.
    leases: BTreeMap<u64, Lease>,
    leases_granted: u64,
    connection_leases: ConnectionLeases,
    actions: VecDeque<Action<P>>,
    /// No timer is due before this.
    wake_ns: u64,
    stuck_since_ns: Option<u64>,
    draining: bool,
}

impl<P: Keep> Controller<P> {
    pub(crate) fn new(bounds: Bounds) -> Self {
        Controller {
            dedupe: Dedupe::new(bounds.results_bytes_max),
            batches: Batches::new(bounds.batch_bytes_max),
            bounds,
            functions: Vec::new(),
            triggers: Vec::new(),
            circuits: Vec::new(),
            paces: Vec::new(),
            calls: Slab::new(),
            uses: 0,
            queue: Queue::default(),
            connections: NumberMap::default(),
            staff: Staff::new(),
            leases: BTreeMap::new(),
            leases_granted: 0,
            connection_leases: ConnectionLeases::default(),
            actions: VecDeque::new(),
            wake_ns: 0,
            stuck_since_ns: None,
            draining: false,
        }
    }

    /// The next thing to do, oldest first.
    pub(crate) fn next_action(&mut self) -> Option<Action<P>> {
        self.actions.pop_front()
    }

    /// Names of the functions, known once the first worker is ready.
    pub(crate) fn functions(&self) -> &[String] {
        &self.functions
    }

    /// When `tick` has to be called next, CLOCK_MONOTONIC ns.
    pub(crate) fn wake_ns(&self) -> u64 {
        self.wake_ns
    }

    /// Calls that have not ended, and whether anybody is starting: what a drain waits for.
    pub(crate) fn calls_open(&self) -> usize {
        // Of a connection that is lent nobody here knows.
        self.calls.iter().filter(|(_, call)| !call.abandoned).count() + self.connection_leases.count()
    }

    fn wake_by(&mut self, at_ns: u64) {
        self.wake_ns = self.wake_ns.min(at_ns);
    }

    fn call(&mut self, key: CallKey) -> Option<&mut Call<P>> {
        self.calls.get_mut(place(key)).filter(|call| call.uses == uses(key))
    }

    fn answer(&mut self, to: Waiter, outcome: Outcome<P>) {
        let (to, connection) = match to {
            Waiter::Client { connection, call } => (Some(Caller::Client { connection, call }), Some(connection)),
            Waiter::Worker { worker, call } => {
                self.staff.nested_ended(worker);
                (Some(Caller::Worker { worker, call }), None)
            }
            Waiter::Session { session, call } => {
                let connection = self.dedupe.finish(session, call, &outcome);
                self.wake_by(self.dedupe.due_ns());
                (connection.map(|connection| Caller::Client { connection, call }), connection)
            }
            Waiter::Nobody { connection } => (None, Some(connection)),
            Waiter::Join { run, .. } => {
                let failure = if let Outcome::Failed(error) = &outcome { Some(error.clone()) } else { None };
                self.actions.push_back(Action::Joined { run, failure });
                (None, None)
            }
        };
        if let Some(open) = connection.and_then(|connection| self.connections.get_mut(&connection)) {
            *open = open.saturating_sub(1);
        }
        match (to, outcome) {
            (Some(to), outcome) => self.actions.push_back(Action::Answer { to, outcome }),
            (None, Outcome::Done { payload, .. }) => self.actions.push_back(Action::Discard(payload)),
            (None, Outcome::Failed(_)) => {}
        }
    }

    /// A connection says whose it is: `number` is the client's, higher for each of its connections. Gives the connection
    /// that this one takes the place of, which is to be closed.
    ///
    /// # Errors
    /// It is older than the one the session has, and is to be closed itself.
    pub(crate) fn greeted(&mut self, connection: u64, session: SessionId, number: u64) -> Result<Option<u64>, Stale> {
        let (replaced, running) = self.dedupe.greeted(connection, session, number)?;
        if running > 0 {
            *self.connections.entry(connection).or_default() += running;
        }
        Ok(replaced)
    }

    /// Whether a call came before. Then all is done: it is answered when it ends, now if it has, and must not be run.
    pub(crate) fn came_before(&mut self, connection: u64, call: u64, once: Once) -> bool {
        match self.dedupe.look(connection, call, once) {
            Seen::New { .. } => false,
            seen => {
                self.answer_again(connection, call, seen);
                true
            }
        }
    }

    fn answer_again(&mut self, connection: u64, call: u64, seen: Seen<P>) {
        let outcome = match seen {
            Seen::New { .. } | Seen::Running => return,
            Seen::Ended(outcome) => outcome,
            Seen::Forgotten => {
                let text = "how this call ended is not known any more; it may have run";
                Outcome::Failed(CallError::new(Code::Expired, text))
            }
            Seen::Stranger => {
                let text = "a call that is to run once needs a session, and the hello named none";
                Outcome::Failed(CallError::new(Code::Protocol, text))
            }
        };
        self.actions.push_back(Action::Answer { to: Caller::Client { connection, call }, outcome });
    }

    /// A call arrives. It ends in exactly one answer, unless its caller goes away first or wants none.
    pub(crate) fn request(&mut self, now_ns: u64, request: Request<P>) {
        let Request { from, function, mut deadline_ns, terms, payload } = request;
        let (mut waiter, session) = match from {
            Caller::Client { connection, call } => {
                let session = match terms.once.map(|once| self.dedupe.look(connection, call, once)) {
                    None => None,
                    Some(Seen::New { session }) => Some(session),
                    Some(seen) => {
                        self.actions.push_back(Action::Discard(payload));
                        return self.answer_again(connection, call, seen);
                    }
                };
                *self.connections.entry(connection).or_default() += 1;
                if self.bounds.hot_calls > 0 && connection & PEER == 0 {
                    self.warm(connection, function, terms, &payload);
                }
                let fired = terms.fire && session.is_none();
                (if fired { Waiter::Nobody { connection } } else { Waiter::Client { connection, call } }, session)
            }
            Caller::Worker { worker, call } => {
                self.staff.nested_began(worker);
                // It waits now, and so would they.
                self.withdraw(worker);
                deadline_ns = deadline_ns.min(self.served_until(now_ns, worker));
                (Waiter::Worker { worker, call }, None)
            }
        };
        let lane = session.map_or_else(|| lane_of(waiter), session_lane);
        let gives_way = match self.admit(now_ns, waiter, lane, function, deadline_ns) {
            Ok(gives_way) => gives_way,
            Err(error) => {
                self.actions.push_back(Action::Discard(payload));
                self.answer(waiter, Outcome::Failed(error));
                return;
            }
        };
        if let (Some(session), Waiter::Client { call, .. }) = (session, waiter) {
            self.dedupe.begin(session, call);
            waiter = Waiter::Session { session, call };
        }
        self.uses = self.uses.wrapping_add(1) & USES;
        let collected_bytes = self.batches.has(function).then(|| payload.len_bytes());
        let index = self.calls.insert(Call {
            from: waiter,
            function,
            deadline_ns,
            idempotent: terms.idempotent,
            attempts: 0,
            uses: self.uses,
            abandoned: false,
            payload: Some(payload),
        });
        let key = key(index, self.uses);
        self.wake_by(deadline_ns);
        if let Some(bytes) = collected_bytes {
            self.give_way(gives_way);
            return self.collect(now_ns, function, key, bytes);
        }
        match self.next_worker(now_ns, key) {
            Some(worker) if self.queue.is_empty() => self.dispatch(now_ns, worker, key),
            _ => {
                self.give_way(gives_way);
                self.queue.push(lane, key);
                self.make_room(now_ns);
                self.give_ahead(now_ns);
            }
        }
    }

    /// A call of a caller who has more than others makes room for another's.
    fn give_way(&mut self, greedy: Option<CallKey>) {
        if let Some(greedy) = greedy {
            let text = format!(
                "{} calls wait for a worker, the most that may, and more of this caller than of others",
                self.bounds.queue_max
            );
            self.abandon(greedy, Some(CallError::new(Code::Busy, text)));
        }
    }

    /// The deadline of the invocation a worker serves: its nested calls end with it, whatever it asks for. One that
    /// serves nothing we know of gets what a client gets that names no deadline.
    pub(crate) fn served_until(&self, now_ns: u64, worker: WorkerId) -> u64 {
        let (mut serving, by_default) = (worker, now_ns.saturating_add(self.bounds.deadline_ns));
        // Under a lease it works for its caller. Workers that lie may lease each other in a circle.
        for _ in 0..self.staff.places() {
            match self.staff.state(serving) {
                State::Running { call } => {
                    let runs = std::iter::once(call).chain(self.staff.batch(serving));
                    return runs
                        .filter_map(|call| Some(self.calls.get(place(call))?.deadline_ns))
                        .max()
                        .unwrap_or(by_default);
                }
                State::Serving { lease } => match self.leases.get(&lease) {
                    Some(lease) => serving = lease.caller,
                    None => break,
                },
                // Its call came by the connection, with a deadline that it alone knows.
                State::Connected { .. } => return u64::MAX,
                _ => break,
            }
        }
        by_default
    }

    /// Whether a call may wait its turn; in a full queue, which one gives way to it.
    fn admit(
        &self,
        now_ns: u64,
        from: Waiter,
        lane: LaneId,
        function: u16,
        deadline_ns: u64,
    ) -> Result<Option<CallKey>, CallError> {
        let refuse = |code, text: String| Err(CallError::new(code, text));
        if let Waiter::Client { connection, .. } | Waiter::Nobody { connection } = from {
            if self.draining {
                return refuse(Code::Draining, "the process is stopping".into());
            }
            let open = self.connections.get(&connection).copied().unwrap_or(0);
            if open > self.bounds.connection_calls_max {
                let max = self.bounds.connection_calls_max;
                return refuse(
                    Code::Busy,
                    format!("{max} calls of this connection are in flight, the most it may have"),
                );
            }
        }
        let Some(circuit) = self.circuits.get(usize::from(function)) else {
            return refuse(
                Code::UnknownFunction,
                format!("no function has id {function}; this process has {}", self.functions.len()),
            );
        };
        if circuit.refuses(now_ns).is_some() {
            return Err(self.broken(now_ns, usize::from(function)));
        }
        if self.batches.is_reserved(function) {
            let name = &self.functions[usize::from(function)];
            let text = format!("`{name}` is not called: it runs when there is a message under each of its keys");
            return refuse(Code::UnknownFunction, text);
        }
        if deadline_ns <= now_ns {
            return refuse(Code::Timeout, "the deadline had passed when the call arrived".into());
        }
        // Those that are collected wait, whoever has nothing to do.
        let runs_at_once = self.staff.idle().is_some() && !self.batches.has(function);
        let waiting = self.queue.len() + self.staff.ahead() + self.batches.waiting();
        if runs_at_once || waiting < self.bounds.queue_max {
            return Ok(None);
        }
        match self.queue.to_give_way(lane).filter(|greedy| !is_batch(*greedy)) {
            None => refuse(Code::Busy, format!("{} calls wait for a worker, the most that may", self.bounds.queue_max)),
            greedy => Ok(greedy),
        }
    }

    fn broken(&self, now_ns: u64, function: usize) -> CallError {
        let circuit = &self.circuits[function];
        let left_ms = circuit.refuses(now_ns).unwrap_or(0).div_ceil(1_000_000);
        let (name, losses) = (&self.functions[function], circuit.losses());
        let text = format!("`{name}` killed {losses} workers in a row; it is tried again in {left_ms} ms");
        CallError::new(Code::FunctionBroken, text)
    }

    /// A worker died of `function`. When that was once too often, calls of it that wait are refused with those to come.
    fn lost_to(&mut self, now_ns: u64, function: usize) {
        self.circuits[function].lost(now_ns);
        if self.circuits[function].refuses(now_ns).is_none() {
            return;
        }
        let mut waiting: Vec<CallKey> = self.queue.iter().filter(|key| !is_batch(*key)).collect();
        waiting.extend(u16::try_from(function).map(|function| self.batches.of(function)).unwrap_or_default());
        for key in waiting {
            if self.call(key).is_some_and(|call| usize::from(call.function) == function) {
                self.abandon(key, Some(self.broken(now_ns, function)));
            }
        }
        // Those that wait with a worker are refused when they are back.
        self.withdraw_all();
    }

    fn dispatch(&mut self, now_ns: u64, worker: WorkerId, key: CallKey) {
        if is_batch(key) {
            return self.dispatch_batch(now_ns, worker, key);
        }
        let call = self.call(key).expect("a queued call is known");
        let payload = call.payload.take().expect("a queued call has its payload");
        let (function, deadline_ns) = (call.function, call.deadline_ns);
        let expected_ns = self.expected_ns(function);
        self.staff.give(now_ns, worker, key, expected_ns);
        self.actions.push_back(Action::Dispatch { worker, call: key, function, deadline_ns, payload });
    }

    /// How long a call is expected to take.
    fn expected_ns(&self, function: u16) -> u64 {
        self.paces[usize::from(function)].expected_ns().unwrap_or(ahead::UNKNOWN_NS)
    }

    /// A worker has nothing to do: gives it the oldest call that waits.
    fn employ(&mut self, now_ns: u64, worker: WorkerId) {
        self.staff.set(worker, State::Idle { since_ns: now_ns });
        self.stuck_since_ns = None;
        if !self.queue.is_empty() {
            self.hand_out(now_ns);
            self.give_ahead(now_ns);
        } else if !self.relieve(now_ns) && self.staff.surplus(self.bounds.workers) {
            self.wake_by(now_ns + staff::SURPLUS_IDLE_NS);
        }
    }

    /// Gives calls that wait to workers that do nothing, or packs them.
    fn hand_out(&mut self, now_ns: u64) {
        while let Some(key) = self.queue.next()
            && let Some(worker) = self.next_worker(now_ns, key)
        {
            self.queue.pop();
            self.dispatch(now_ns, worker, key);
        }
    }

    /// A worker answered the call it was given. Tells whether somebody still waited. `Err`: it had no such call.
    pub(crate) fn reply(
        &mut self,
        now_ns: u64,
        worker: WorkerId,
        key: CallKey,
        outcome: Outcome<P>,
    ) -> Result<bool, (Violation, Outcome<P>)> {
        if self.staff.state(worker) != (State::Running { call: key }) {
            return Err((Violation("an answer to a call it was not given"), outcome));
        }
        let call = self.calls.remove(place(key));
        let took_ns = self.staff.took_ns(now_ns, worker);
        let is_batched = self.batches.has(call.function);
        if !is_batched {
            self.paces[usize::from(call.function)].answered(took_ns);
        }
        // Late is late, also when the timer has not fired yet.
        let late = !call.abandoned && call.deadline_ns <= now_ns;
        let answered = !call.abandoned && !late;
        let panicked = matches!(&outcome, Outcome::Failed(error) if error.code == Code::Panicked);
        // The last answer of a batch speaks of its function and its worker, as the only one of a call does.
        let is_last = !is_batched || !self.staff.next_of_batch(worker);
        if is_last && panicked {
            self.lost_to(now_ns, usize::from(call.function));
        } else if is_last {
            self.circuits[usize::from(call.function)].worked();
        }
        self.staff.on_time(worker);
        if !is_last {
            // It goes on with the answer to the next.
        } else if panicked {
            self.withdraw(worker);
        } else if let Some(next) = self.staff.go_on(worker) {
            self.begins(now_ns, worker, next);
            self.give_ahead(now_ns);
        } else {
            self.employ(now_ns, worker);
            // Before the answer, so that the caller finds its lease when it wakes and the next call goes directly.
            if let (Waiter::Worker { worker: caller, .. }, true) = (call.from, answered && !is_batched) {
                self.offer_lease(caller, worker);
            }
        }
        if let (Waiter::Client { connection, .. }, true) = (call.from, self.bounds.hot_calls > 0 && answered) {
            self.consider_lending(connection, worker, &outcome);
        }
        match outcome {
            outcome if answered => self.answer(call.from, outcome),
            Outcome::Done { payload, .. } => self.actions.push_back(Action::Discard(payload)),
            Outcome::Failed(_) => {}
        }
        if late {
            let text = "the deadline passed before the function answered";
            self.answer(call.from, Outcome::Failed(CallError::new(Code::Timeout, text)));
        }
        if panicked && is_last {
            // Its memory is in a state the function did not foresee: the worker exits by itself and is replaced.
            self.dismiss(now_ns, worker);
        }
        Ok(answered && !matches!(call.from, Waiter::Join { .. }))
    }

    /// A function no longer waits for a call of its own.
    pub(crate) fn cancel_nested(&mut self, worker: WorkerId, call: u64) {
        self.call_off(|from| from == Waiter::Worker { worker, call });
    }

    /// A client no longer waits for a call.
    pub(crate) fn cancel(&mut self, connection: u64, call: u64) {
        let by_session = self.dedupe.session_of(connection).map(|session| Waiter::Session { session, call });
        let waiters = [Some(Waiter::Client { connection, call }), by_session];
        self.call_off(|from| waiters.contains(&Some(from)));
    }

    fn call_off(&mut self, is_it: impl Fn(Waiter) -> bool) {
        let found = self.calls.iter().find(|(_, open)| is_it(open.from) && !open.abandoned);
        if let Some(key) = found.map(|(index, open)| key(index, open.uses)) {
            self.abandon(key, Some(CallError::new(Code::Cancelled, "cancelled by its caller")));
        }
    }

    /// A connection is gone, and with it everybody who waited on it. Whoever has a session may come back for the answer.
    pub(crate) fn disconnected(&mut self, connection: u64) {
        self.cool(connection);
        self.abandon_all(|from| matches!(from, Waiter::Client { connection: of, .. } if of == connection));
        self.dedupe.disconnected(connection);
        self.wake_by(self.dedupe.due_ns());
        self.connections.remove(&connection);
    }

    fn abandon_all(&mut self, of: impl Fn(Waiter) -> bool) {
        let keys: Vec<CallKey> =
            self.calls.iter().filter(|(_, call)| of(call.from)).map(|(index, call)| key(index, call.uses)).collect();
        for key in keys {
            self.abandon(key, None);
        }
    }

    /// Nobody waits for `key` any more: a queued call is forgotten, a running one goes on unheard until its deadline.
    fn abandon(&mut self, key: CallKey, answer: Option<CallError>) {
        let Some(call) = self.call(key) else { return };
        let (from, function, known) = (call.from, call.function, call.abandoned);
        match call.payload.take() {
            Some(payload) => {
                self.calls.remove(place(key));
                if self.batches.has(function) {
                    self.take_out(function, key);
                } else {
                    self.queue.remove(lane_of(from), key);
                }
                if let Waiter::Join { run, .. } = from {
                    // It is nobody's call that ends here: its message waits on.
                    self.actions.push_back(Action::Unjoin { run, payload });
                    return;
                }
                self.actions.push_back(Action::Discard(payload));
            }
            None => {
                call.abandoned = true;
                match self.staff.holder(key) {
                    Some((worker, Turn::Now)) => self.actions.push_back(Action::TellCancelled { worker, call: key }),
                    Some((worker, Turn::Later)) => self.withdraw(worker),
                    Some((worker, Turn::Together)) => self.tell_if_all_abandoned(worker),
                    None => {}
                }
            }
        }
        if !known {
            match answer {
                Some(error) => self.answer(from, Outcome::Failed(error)),
                None => {
                    if let Waiter::Worker { worker, .. } = from {
                        self.staff.nested_ended(worker);
                    }
                }
            }
        }
    }

    /// Time passes: deadlines, overdue workers, replacements. Cheap before [`Controller::wake_ns`].
    pub(crate) fn tick(&mut self, now_ns: u64) {
        self.dedupe.set_clock(now_ns);
        if now_ns < self.wake_ns {
            return;
        }
        self.wake_ns = self.dedupe.expire(now_ns);
        let due: Vec<CallKey> = self
            .calls
            .iter()
            .filter(|(_, call)| call.deadline_ns <= now_ns)
            .map(|(index, call)| key(index, call.uses))
            .collect();
        for key in due {
            let Some(call) = self.call(key) else { continue };
            let abandoned = call.abandoned;
            let (runs, overdue) = match self.staff.holder(key) {
                Some((worker, Turn::Now)) => (true, Some(worker)),
                // It may go on as long as one of them waits.
                Some((worker, Turn::Together)) => {
                    (true, Some(worker).filter(|_| self.served_until(now_ns, worker) <= now_ns))
                }
                Some((_, Turn::Later)) | None => (false, None),
            };
            if !abandoned {
                let error = if runs {
                    CallError::timed_out_running()
                } else {
                    CallError::new(Code::Timeout, "the deadline passed before a worker was free")
                };
                self.abandon(key, Some(error));
            }
            if let Some(worker) = overdue {
                self.grant_grace(now_ns, worker);
                self.withdraw(worker);
            }
        }
        let next = self.calls.iter().map(|(_, call)| call.deadline_ns).filter(|deadline| *deadline > now_ns).min();
        self.wake_by(next.unwrap_or(u64::MAX));
        self.close_batches(now_ns);
        self.mind_staff(now_ns);
        self.look_at_packed(now_ns);
        if !self.queue.is_empty() {
            self.wake_by(now_ns + LOOK_NS);
        }
    }

    /// The function that runs on this worker waits for a message or another process: what it was given ahead would wait with it.
    pub(crate) fn waits(&mut self, worker: WorkerId) {
        self.staff.nested_began(worker);
        self.withdraw(worker);
    }

    /// It does not any more.
    pub(crate) fn waited(&mut self, worker: WorkerId) {
        self.staff.nested_ended(worker);
    }

    /// Looks for a queue that cannot move because everybody waits for somebody. `waiting` has bit `n` set when
    /// worker `n` says that it waits for a nested call; without it (`None`) whoever has one open counts as waiting.
    pub(crate) fn unstick(&mut self, now_ns: u64, waiting: Option<u64>) {
        if self.queue.is_empty() {
            self.stuck_since_ns = None;
            return;
        }
        self.wake_by(now_ns + LOOK_NS);
        let is_nested = |key: &CallKey| self.calls.get(place(*key)).is_some_and(|call| call.from.is_function());
        let nested = self
            .queue
            .iter()
            .filter_map(|key| {
                if is_batch(key) {
                    self.batches.calls(key).iter().copied().rfind(is_nested)
                } else {
                    Some(key).filter(is_nested)
                }
            })
            .last();
        let waiting = waiting.unwrap_or_else(|| self.waiting_with_leases(self.staff.nesting()));
        if !self.staff.all_waiting(waiting) {
            self.stuck_since_ns = None;
            return;
        }
        if self.staff.count() < usize::from(self.bounds.workers_max) {
            // Now, or when the pause after a failed start is over.
            self.hire(now_ns);
            self.stuck_since_ns = None;
            return;
        }
        // Without one they wait for messages or other processes, which come or do not come by themselves.
        let Some(key) = nested else {
            self.stuck_since_ns = None;
            return;
        };
        let since = *self.stuck_since_ns.get_or_insert(now_ns);
        if now_ns - since >= STUCK_NS {
            let text = format!(
                "all {} workers wait for calls or messages and no more may be started; raise workers_max or nest less deeply",
                self.staff.count()
            );
            self.abandon(key, Some(CallError::new(Code::Busy, text)));
            self.stuck_since_ns = None;
        }
    }

    /// Takes no more calls from clients. What runs goes on.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
        self.batches.hasten();
        self.wake_ns = 0;
        self.revoke_connections();
    }
}

/// Whose turn a call waits for.
fn lane_of(waiter: Waiter) -> LaneId {
    match waiter {
        Waiter::Client { connection, .. } | Waiter::Nobody { connection } => connection,
        Waiter::Session { session, .. } => session_lane(session),
        Waiter::Worker { worker, .. } => u64::from(worker),
        Waiter::Join { .. } => unreachable!("messages wait in the turns of their function"),
    }
}

/// Connections count up from 2^32, sessions from nothing; workers are below 64.
fn session_lane(session: u64) -> LaneId {
    1 << 63 | session
}

/// How often a place may be used before it counts anew: the highest bit of a number says that it is no call's.
const USES: u32 = u32::MAX >> 1;

fn key(index: usize, uses: u32) -> CallKey {
    (u64::from(uses) << 32) | index as u64
}

fn place(key: CallKey) -> usize {
    (key & 0xffff_ffff) as usize
}

fn uses(key: CallKey) -> u32 {
    (key >> 32) as u32
}
