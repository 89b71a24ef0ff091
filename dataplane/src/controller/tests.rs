//! The controller on a virtual clock: every rule by hand, then everything at once at random.
//!
//! Payloads are [`Token`]s that tell a [`Ledger`] when they are lost: one that is dropped anywhere but in the hands of
//! whoever got it from an action is a leak.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

use std::cell::Cell;
use std::rc::Rc;

use super::*;

mod ahead;
mod batch;
mod connection_lease;
mod join;
mod once;
mod simulation;
mod world;

const MS: u64 = 1_000_000;
const S: u64 = 1_000 * MS;
const ECHO: u16 = 0;
const ABORT: u16 = 1;
const SLOW: u16 = 2;

#[derive(Debug, Default, Clone)]
struct Ledger {
    made: Rc<Cell<u64>>,
    lost: Rc<Cell<u64>>,
}

#[derive(Debug)]
struct Token {
    number: u64,
    ledger: Ledger,
    spent: bool,
}

impl Ledger {
    fn token(&self) -> Token {
        self.made.set(self.made.get() + 1);
        Token { number: self.made.get(), ledger: self.clone(), spent: false }
    }
}

impl Token {
    fn spend(mut self) -> u64 {
        self.spent = true;
        self.number
    }
}

impl Keep for Token {
    fn len_bytes(&self) -> usize {
        1
    }

    /// A copy is nobody's loss.
    fn copy(&self) -> Token {
        Token { number: self.number, ledger: self.ledger.clone(), spent: true }
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if !self.spent {
            self.ledger.lost.set(self.ledger.lost.get() + 1);
        }
    }
}

fn bounds() -> Bounds {
    Bounds {
        workers: 1,
        workers_max: 1,
        queue_max: 4,
        ahead_max: 0,
        packs: false,
        connection_calls_max: 3,
        grace_ns: 100 * MS,
        start_ns: 5 * S,
        deadline_ns: 60 * S,
        leases: true,
        hot_calls: 0,
        results_bytes_max: 1 << 20,
        batch_bytes_max: 1 << 20,
    }
}

fn functions() -> Vec<String> {
    ["echo", "abort", "slow", "together"].map(str::to_owned).to_vec()
}

/// A controller, the hand that turns its clock, and what it has decided.
struct Bench {
    controller: Controller<Token>,
    ledger: Ledger,
    now_ns: u64,
    calls: u64,
    /// What workers register besides functions.
    triggers: Vec<(u16, Trigger)>,
}

/// An action without its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Did {
    Dispatch { worker: WorkerId, call: CallKey, function: u16 },
    Batch { worker: WorkerId, calls: u16 },
    Join { worker: WorkerId, calls: u16, run: u64 },
    Joined { run: u64, code: Option<Code> },
    Unjoin { run: u64 },
    Done { to: Caller },
    Failed { to: Caller, code: Code, text: String },
    Discard,
    Withdraw { worker: WorkerId },
    TellCancelled { worker: WorkerId },
    Spawn { worker: WorkerId },
    Signal { worker: WorkerId, signal: Signal },
    Retire { worker: WorkerId },
    Grant { lease: u64, caller: WorkerId, callee: WorkerId },
    Open { lease: u64, caller: WorkerId, callee: WorkerId, position: u64 },
    Revoke { lease: u64, callee: WorkerId },
    End { lease: u64, caller: WorkerId },
    Lend { lease: u64, connection: u64, worker: WorkerId, function: u16 },
}

impl Bench {
    fn new(bounds: Bounds) -> Bench {
        Bench { controller: Controller::new(bounds), ledger: Ledger::default(), now_ns: S, calls: 0, triggers: vec![] }
    }

    /// With `workers` started and ready.
    fn ready(bounds: Bounds) -> Bench {
        let workers = bounds.workers;
        let mut bench = Bench::new(bounds);
        let spawned = bench.tick(0);
        assert_eq!(spawned, (1..=workers).map(|worker| Did::Spawn { worker }).collect::<Vec<_>>());
        for worker in 1..=workers {
            bench.register(worker);
        }
        assert_eq!(bench.did(), []);
        bench
    }

    fn register(&mut self, worker: WorkerId) {
        self.controller.ready(self.now_ns, worker, &functions(), &self.triggers).unwrap();
    }

    fn did(&mut self) -> Vec<Did> {
        std::iter::from_fn(|| self.controller.next_action())
            .map(|action| match action {
                Action::Dispatch { worker, call, function, payload, .. } => {
                    payload.spend();
                    Did::Dispatch { worker, call, function }
                }
                Action::Batch { worker, calls, .. } => Did::Batch { worker, calls },
                Action::Join { worker, calls, run, .. } => Did::Join { worker, calls, run },
                Action::Joined { run, failure } => Did::Joined { run, code: failure.map(|failure| failure.code) },
                Action::Unjoin { run, payload } => {
                    payload.spend();
                    Did::Unjoin { run }
                }
                Action::Answer { to, outcome: Outcome::Done { payload, .. } } => {
                    payload.spend();
                    Did::Done { to }
                }
                Action::Answer { to, outcome: Outcome::Failed(error) } => {
                    Did::Failed { to, code: error.code, text: error.text }
                }
                Action::Discard(payload) => {
                    payload.spend();
                    Did::Discard
                }
                Action::Withdraw { worker } => Did::Withdraw { worker },
                Action::TellCancelled { worker, .. } => Did::TellCancelled { worker },
                Action::Spawn { worker } => Did::Spawn { worker },
                Action::Signal { worker, signal } => Did::Signal { worker, signal },
                Action::Retire { worker } => Did::Retire { worker },
                Action::Grant { lease, caller, callee } => Did::Grant { lease, caller, callee },
                Action::Open { lease, caller, callee, position } => Did::Open { lease, caller, callee, position },
                Action::Revoke { lease, callee } => Did::Revoke { lease, callee },
                Action::End { lease, caller } => Did::End { lease, caller },
                Action::Lend { lease, connection, worker, function } => {
                    Did::Lend { lease, connection, worker, function }
                }
            })
            .collect()
    }

    fn tick(&mut self, later_ns: u64) -> Vec<Did> {
        self.now_ns += later_ns;
        self.controller.tick(self.now_ns);
        self.did()
    }

    fn ask(&mut self, from: Caller, function: u16, deadline_ns: u64, idempotent: bool) {
        let payload = self.ledger.token();
        let deadline_ns = self.now_ns + deadline_ns;
        let terms = Terms { idempotent, ..Terms::default() };
        self.controller.request(self.now_ns, Request { from, function, deadline_ns, terms, payload });
    }

    /// A call of connection 1, with a deadline of ten seconds.
    fn call(&mut self, function: u16) -> Caller {
        self.calls += 1;
        let from = Caller::Client { connection: 1, call: self.calls };
        self.ask(from, function, 10 * S, false);
        from
    }

    fn reply(&mut self, worker: WorkerId, call: CallKey) {
        let payload = self.ledger.token();
        let replied = self.controller.reply(self.now_ns, worker, call, Outcome::Done { status: 0, payload });
        assert!(replied.is_ok());
    }

    fn dies(&mut self, worker: WorkerId, cause: Cause, started: bool, has_request: bool) {
        let first = match self.controller.staff.state(worker) {
            State::Running { call } if has_request => Some((call, self.ledger.token())),
            _ => None,
        };
        self.controller.died(self.now_ns, worker, cause, started, first.into_iter().collect(), 0);
    }

    fn key(did: &[Did]) -> CallKey {
        did.iter()
            .find_map(|did| if let Did::Dispatch { call, .. } = did { Some(*call) } else { None })
            .expect("a dispatch")
    }

    fn dispatched(&mut self) -> CallKey {
        let did = self.did();
        Bench::key(&did)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What waits inside the controller is dropped with it and is no loss of anybody's.
        let lost = self.ledger.lost.get();
        if !std::thread::panicking() {
            assert_eq!(lost, 0, "payloads that left in no action");
        }
    }
}

fn client(call: u64) -> Caller {
    Caller::Client { connection: 1, call }
}

fn codes(did: &[Did]) -> Vec<Code> {
    did.iter().filter_map(|did| if let Did::Failed { code, .. } = did { Some(*code) } else { None }).collect()
}

// ---- admission, order, answers --------------------------------------------------------------------------------

#[test]
fn p11_one_worker_takes_queued_calls_in_the_order_submitted() {
    let mut bench = Bench::ready(Bounds { connection_calls_max: 10, ..bounds() });
    let callers: Vec<Caller> = (0..4).map(|_| bench.call(ECHO)).collect();
    for caller in callers {
        let key = bench.dispatched();
        bench.reply(1, key);
        // The next dispatch comes before the answer or after it; the answer is the oldest caller's.
        let place = bench.controller.actions.iter().position(|action| matches!(action, Action::Answer { .. })).unwrap();
        match bench.controller.actions.remove(place) {
            Some(Action::Answer { to, outcome: Outcome::Done { payload, .. } }) => {
                payload.spend();
                assert_eq!(to, caller);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((bench.did(), bench.controller.calls_open()), (vec![], 0));
}

#[test]
fn p11_two_workers_take_two_calls_at_once() {
    let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, connection_calls_max: 10, ..bounds() });
    for _ in 0..4 {
        bench.call(ECHO);
    }
    let did = bench.did();
    let workers: Vec<_> =
        did.iter().map(|did| if let Did::Dispatch { worker, .. } = did { *worker } else { 0 }).collect();
    assert_eq!(workers, [1, 2]);
}

#[test]
fn a8_a_connection_and_the_queue_are_bounded_and_both_recover() {
    let mut bench = Bench::ready(bounds());
    for _ in 0..4 {
        bench.call(ECHO);
    }
    let did = bench.did();
    let key = Bench::key(&did);
    assert_eq!(codes(&did), [Code::Busy], "the fourth call of a connection that may have three");
    // Two queued of this connection; another fills the queue.
    for call in 1..=3 {
        bench.ask(Caller::Client { connection: 2, call }, ECHO, 10 * S, false);
    }
    let did = bench.did();
    assert_eq!(codes(&did), [Code::Busy], "four may wait");
    bench.reply(1, key);
    bench.did();
    bench.call(ECHO);
    assert_eq!(codes(&bench.did()), [], "room again");
}

#[test]
fn p4_an_unknown_function_and_a_past_deadline_are_refused_at_once() {
    let mut bench = Bench::ready(bounds());
    bench.call(77);
    let did = bench.did();
    assert!(
        matches!(&did[..], [Did::Discard, Did::Failed { code: Code::UnknownFunction, text, .. }] if text.contains("77"))
    );
    bench.ask(client(9), ECHO, 0, false);
    assert_eq!(codes(&bench.did()), [Code::Timeout]);
    // Neither counts against the connection.
    for _ in 0..3 {
        bench.call(ECHO);
    }
    assert_eq!(codes(&bench.did()), []);
}

#[test]
fn w11_answers_nobody_asked_for_are_violations() {
    let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
    bench.call(ECHO);
    let key = bench.dispatched();
    let mut lie = |worker, key| {
        let payload = bench.ledger.token();
        match bench.controller.reply(bench.now_ns, worker, key, Outcome::Done { status: 0, payload }) {
            Err((_, Outcome::Done { payload, .. })) => {
                payload.spend();
                true
            }
            _ => false,
        }
    };
    assert!(lie(2, key), "another worker's call");
    assert!(lie(1, key + 1), "no call at all");
    assert!(lie(1, key ^ 1 << 32), "an earlier use of the place");
    bench.reply(1, key);
    assert!(matches!(&bench.did()[..], [Did::Done { .. }]));
    let payload = bench.ledger.token();
    let twice = bench.controller.reply(bench.now_ns, 1, key, Outcome::Done { status: 0, payload });
    let Err((_, Outcome::Done { payload, .. })) = twice else { panic!("answered twice") };
    payload.spend();
}

// ---- deadlines and cancelling ---------------------------------------------------------------------------------

#[test]
fn p14_a_deadline_while_queued_frees_the_place_and_harms_nobody() {
    let mut bench = Bench::ready(bounds());
    bench.ask(client(1), SLOW, 10 * S, false);
    bench.ask(client(2), ECHO, S, false);
    let key = bench.dispatched();
    assert!(bench.controller.wake_ns() <= bench.now_ns + S);
    assert_eq!(bench.tick(S - 1), []);
    let did = bench.tick(1);
    assert!(
        matches!(&did[..], [Did::Discard, Did::Failed { to, code: Code::Timeout, text }] if *to == client(2) && text.contains("before a worker")),
        "{did:?}"
    );
    bench.reply(1, key);
    assert_eq!(bench.did(), [Did::Done { to: client(1) }]);
}

#[test]
fn p14_w5_a_deadline_while_running_tells_the_function_then_ends_its_worker() {
    let mut bench = Bench::ready(bounds());
    bench.ask(client(1), SLOW, S, false);
    let key = bench.dispatched();
    let did = bench.tick(S);
    assert!(matches!(&did[..], [Did::TellCancelled { worker: 1 }, Did::Failed { code: Code::Timeout, .. }]), "{did:?}");
    assert_eq!(bench.tick(100 * MS - 1), []);
    assert_eq!(bench.tick(1), [Did::Signal { worker: 1, signal: Signal::Terminate }]);
    assert_eq!(bench.tick(100 * MS), [Did::Signal { worker: 1, signal: Signal::Kill }]);
    bench.dies(1, Cause::Overran, true, true);
    assert_eq!(bench.tick(0), [Did::Discard, Did::Spawn { worker: 1 }], "answered once, replaced");
    let _ = key;
}

#[test]
fn p14_a_function_that_comes_back_within_the_grace_keeps_its_worker() {
    let mut bench = Bench::ready(bounds());
    bench.ask(client(1), SLOW, S, false);
    let key = bench.dispatched();
    bench.tick(S);
    bench.now_ns += 50 * MS;
    bench.reply(1, key);
    assert_eq!(bench.did(), [Did::Discard], "its late answer is nobody's");
    assert_eq!(bench.tick(10 * S), []);
    bench.call(ECHO);
    assert!(matches!(bench.did()[..], [Did::Dispatch { worker: 1, .. }]));
}

/// A function that is told of its deadline returns at once, and its answer overtook the timer.
#[test]
fn p14_an_answer_at_the_deadline_is_late_even_when_the_timer_has_not_fired() {
    let mut bench = Bench::ready(bounds());
    bench.ask(client(1), SLOW, S, false);
    let key = bench.dispatched();
    bench.now_ns += S;
    bench.reply(1, key);
    let did = bench.did();
    assert!(matches!(did[..], [Did::Discard, Did::Failed { code: Code::Timeout, .. }]), "{did:?}");
    assert_eq!((bench.tick(S), bench.controller.calls_open()), (vec![], 0));
}

#[test]
fn p12_cancel_ends_a_queued_call_and_tells_a_running_one() {
    let mut bench = Bench::ready(bounds());
    bench.ask(client(1), SLOW, 10 * S, false);
    bench.ask(client(2), ECHO, 10 * S, false);
    let key = bench.dispatched();
    bench.controller.cancel(1, 2);
    assert!(matches!(&bench.did()[..], [Did::Discard, Did::Failed { code: Code::Cancelled, .. }]));
    bench.controller.cancel(1, 1);
    bench.controller.cancel(1, 1);
    bench.controller.cancel(1, 99);
    let did = bench.did();
    assert!(
        matches!(&did[..], [Did::TellCancelled { worker: 1 }, Did::Failed { code: Code::Cancelled, .. }]),
        "{did:?}"
    );
    bench.reply(1, key);
    assert_eq!(bench.did(), [Did::Discard]);
    assert_eq!(bench.controller.calls_open(), 0);
}

#[test]
fn a_connection_that_goes_takes_its_calls_along() {
    let mut bench = Bench::ready(bounds());
    bench.ask(client(1), SLOW, 10 * S, false);
    bench.ask(client(2), ECHO, 10 * S, false);
    let key = bench.dispatched();
    bench.controller.disconnected(1);
    let did = bench.did();
    assert!(
        did.contains(&Did::Discard) && did.contains(&Did::TellCancelled { worker: 1 }) && did.len() == 2,
        "{did:?}"
    );
    bench.reply(1, key);
    assert_eq!((bench.did(), bench.controller.calls_open()), (vec![Did::Discard], 0));
}

// ---- deaths ---------------------------------------------------------------------------------------------------

#[test]
fn w2_a_call_that_never_began_starts_over_in_any_mode() {
    for idempotent in [false, true] {
        let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
        bench.ask(client(1), ECHO, 10 * S, idempotent);
        bench.did();
        bench.dies(1, Cause::Killed(9), false, true);
        let did = bench.did();
        assert!(matches!(did[..], [Did::Dispatch { worker: 2, .. }]), "{did:?}");
        bench.reply(2, Bench::key(&did));
        assert_eq!(bench.did(), [Did::Done { to: client(1) }]);
    }
}

#[test]
fn w2_a_call_that_may_have_run_is_lost_unless_it_may_run_twice() {
    for idempotent in [false, true] {
        let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
        bench.ask(client(1), ECHO, 10 * S, idempotent);
        bench.did();
        bench.dies(1, Cause::Killed(11), true, true);
        let did = bench.did();
        if idempotent {
            assert!(matches!(did[..], [Did::Dispatch { worker: 2, .. }]), "{did:?}");
        } else {
            assert!(
                matches!(&did[..], [Did::Discard, Did::Failed { code: Code::WorkerLost, text, .. }]
                    if text.contains("signal 11") && text.contains("may have run") && text.contains("echo")),
                "{did:?}"
            );
        }
    }
}

#[test]
fn w2_a_call_that_went_back_is_the_next_to_run() {
    let mut bench = Bench::ready(Bounds { connection_calls_max: 9, ..bounds() });
    bench.call(SLOW);
    bench.call(ECHO);
    bench.did();
    bench.dies(1, Cause::Killed(9), false, true);
    assert_eq!(bench.tick(0), [Did::Spawn { worker: 1 }]);
    bench.register(1);
    assert!(matches!(bench.did()[..], [Did::Dispatch { function: SLOW, .. }]));
}

#[test]
fn w2_a_poisonous_call_is_given_up_after_four_workers() {
    let mut bench = Bench::ready(bounds());
    bench.ask(client(1), ECHO, 10 * S, true);
    for _ in 0..4 {
        assert!(matches!(bench.did()[..], [Did::Dispatch { .. }]));
        bench.dies(1, Cause::Killed(9), true, true);
        if bench.controller.calls_open() > 0 {
            bench.tick(0);
            bench.register(1);
        }
    }
    let did = bench.did();
    assert!(matches!(did[..], [Did::Discard, Did::Failed { code: Code::WorkerLost, .. }]), "{did:?}");
}

#[test]
fn w2_a_call_whose_input_died_with_the_worker_is_answered() {
    let mut bench = Bench::ready(bounds());
    bench.ask(client(1), ECHO, 10 * S, true);
    bench.did();
    bench.dies(1, Cause::Killed(9), false, false);
    assert_eq!(codes(&bench.did()), [Code::WorkerLost]);
    assert_eq!(bench.controller.calls_open(), 0);
}

/// A worker answers, is given the next call, and dies before that call was sent: `died` judged it without its payload,
/// its caller was told `WorkerLost` of a call nobody had seen, and the payload went to the dead.
#[test]
fn w2_a_call_decided_but_not_sent_when_its_worker_died_starts_over() {
    let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
    bench.ask(client(1), ECHO, 10 * S, false);
    let first = bench.dispatched();
    bench.ask(client(2), SLOW, 10 * S, false);
    let second = bench.dispatched();
    bench.ask(client(3), ECHO, 10 * S, false);
    bench.reply(1, first);
    bench.dies(1, Cause::Killed(9), true, false);
    assert_eq!(bench.did(), [Did::Done { to: client(1) }]);
    bench.reply(2, second);
    let did = bench.did();
    assert!(did.contains(&Did::Done { to: client(2) }) && Bench::key(&did) != 0, "{did:?}");
    bench.reply(2, Bench::key(&did));
    assert_eq!(bench.did(), [Did::Done { to: client(3) }]);
}

#[test]
fn w2_the_dead_worker_s_own_calls_are_nobody_s() {
    let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
    bench.call(SLOW);
    bench.did();
    let nested = Caller::Worker { worker: 1, call: 7 };
    bench.ask(nested, SLOW, 10 * S, false);
    let inner = bench.dispatched();
    bench.ask(Caller::Worker { worker: 1, call: 8 }, ECHO, 10 * S, false);
    bench.dies(1, Cause::Exited(3), true, true);
    let did = bench.did();
    assert!(did.contains(&Did::TellCancelled { worker: 2 }), "{did:?}");
    assert!(matches!(did.last(), Some(Did::Failed { to, code: Code::WorkerLost, .. }) if *to == client(1)), "{did:?}");
    bench.reply(2, inner);
    assert_eq!(bench.did(), [Did::Discard]);
}

#[test]
fn w7_a_function_that_kills_five_in_a_row_is_refused_with_all_its_waiting_calls() {
    let mut bench = Bench::ready(Bounds { queue_max: 100, connection_calls_max: 100, ..bounds() });
    for _ in 0..20 {
        bench.call(ABORT);
    }
    bench.ask(client(99), ECHO, 10 * S, false);
    let mut deaths = 0;
    let mut refused = 0;
    for _ in 0..30 {
        let did = bench.tick(0);
        refused += codes(&did).iter().filter(|code| **code == Code::FunctionBroken).count();
        for did in did {
            match did {
                Did::Spawn { worker } => bench.register(worker),
                Did::Dispatch { worker, function: ABORT, .. } => {
                    deaths += 1;
                    bench.dies(worker, Cause::Killed(6), true, true);
                }
                Did::Dispatch { worker, call, function: ECHO } => bench.reply(worker, call),
                _ => {}
            }
        }
    }
    assert_eq!((deaths, refused, bench.controller.calls_open()), (5, 15, 0), "the others keep being served");
    bench.call(ABORT);
    assert_eq!(codes(&bench.did()), [Code::FunctionBroken]);
    bench.tick(S);
    bench.call(ABORT);
    assert!(matches!(bench.did()[..], [Did::Dispatch { function: ABORT, .. }]), "tried again after a second");
}

#[test]
fn w7_kills_from_outside_do_not_break_a_function() {
    let mut bench = Bench::ready(bounds());
    for _ in 0..20 {
        bench.call(ECHO);
        bench.did();
        bench.dies(1, Cause::Killed(9), true, true);
        bench.tick(0);
        bench.register(1);
    }
    bench.call(ECHO);
    assert!(matches!(bench.did()[..], [Did::Dispatch { .. }]));
}

#[test]
fn p5_a_panicked_function_s_worker_gets_no_more_calls_and_is_replaced() {
    let mut bench = Bench::ready(bounds());
    bench.call(ABORT);
    let key = bench.dispatched();
    bench.call(ECHO);
    let panicked = Outcome::Failed(CallError::new(Code::Panicked, "ouch"));
    assert!(bench.controller.reply(bench.now_ns, 1, key, panicked).is_ok());
    assert_eq!(codes(&bench.did()), [Code::Panicked]);
    assert_eq!(bench.tick(0), [], "the place is taken until it has left");
    bench.dies(1, Cause::Exited(71), false, false);
    assert_eq!(bench.tick(0), [Did::Spawn { worker: 1 }]);
    bench.register(1);
    assert!(matches!(bench.did()[..], [Did::Dispatch { function: ECHO, .. }]));
}

// ---- staff ----------------------------------------------------------------------------------------------------

/// `checked_shl` drops bits: after the 57th failure in a row there was no pause at all.
#[test]
fn w7_the_pause_between_failing_starts_grows_to_five_seconds_and_stays() {
    let mut bench = Bench::new(bounds());
    let mut last_ns = 0;
    for failures in 1..=80 {
        assert_eq!(bench.tick(0), [Did::Spawn { worker: 1 }], "start {failures}");
        bench.dies(1, Cause::Exited(1), false, false);
        assert_eq!(bench.controller.failed_starts(), failures);
        assert_eq!(bench.tick(0), []);
        let pause_ns = bench.controller.wake_ns() - bench.now_ns;
        assert!(pause_ns >= last_ns && pause_ns <= 5 * S, "{pause_ns} ns after {failures}");
        last_ns = pause_ns;
        assert_eq!(bench.tick(pause_ns - 1), []);
        bench.now_ns += 1;
    }
    assert_eq!(last_ns, 5 * S);
    assert_eq!(bench.tick(0), [Did::Spawn { worker: 1 }]);
    bench.register(1);
    assert_eq!(bench.controller.failed_starts(), 0);
}

#[test]
fn a_worker_that_does_not_register_in_time_is_killed() {
    let mut bench = Bench::new(bounds());
    bench.tick(0);
    assert_eq!(bench.tick(5 * S - 1), []);
    assert_eq!(bench.tick(1), [Did::Signal { worker: 1, signal: Signal::Kill }]);
}

#[test]
fn a_worker_with_other_functions_is_refused() {
    let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
    assert!(bench.controller.ready(bench.now_ns, 1, &functions(), &[]).is_err(), "twice");
    bench.dies(2, Cause::Exited(0), false, false);
    bench.tick(0);
    assert!(bench.controller.ready(bench.now_ns, 2, &["other".to_owned()], &[]).is_err());
}

#[test]
fn p10_everybody_waiting_brings_more_workers_and_then_busy_never_a_hang() {
    let mut bench = Bench::ready(Bounds { workers_max: 2, ..bounds() });
    bench.ask(client(1), SLOW, 10 * S, false);
    let first = bench.dispatched();
    bench.ask(Caller::Worker { worker: 1, call: 1 }, SLOW, 10 * S, false);
    bench.controller.unstick(bench.now_ns, Some(0));
    assert_eq!(bench.did(), [], "it computes");
    bench.controller.unstick(bench.now_ns, Some(1 << 1));
    assert_eq!(bench.did(), [Did::Spawn { worker: 2 }]);
    bench.register(2);
    let second = bench.dispatched();
    bench.ask(Caller::Worker { worker: 2, call: 1 }, SLOW, 10 * S, false);
    let waiting = Some(1 << 1 | 1 << 2);
    bench.controller.unstick(bench.now_ns, waiting);
    assert_eq!(bench.did(), [], "it may just have looked away");
    bench.now_ns += 20 * MS;
    bench.controller.unstick(bench.now_ns, waiting);
    let did = bench.did();
    assert!(
        matches!(&did[..], [Did::Discard, Did::Failed { to: Caller::Worker { worker: 2, .. }, code: Code::Busy, text }] if text.contains('2')),
        "{did:?}"
    );
    bench.reply(2, second);
    bench.reply(1, first);
    assert_eq!(bench.controller.calls_open(), 0);
    bench.did();
}

#[test]
fn a_worker_beyond_the_wanted_number_is_retired_after_ten_idle_seconds() {
    let mut bench = Bench::ready(Bounds { workers_max: 2, leases: false, ..bounds() });
    bench.ask(client(1), SLOW, 60 * S, false);
    let first = bench.dispatched();
    bench.ask(Caller::Worker { worker: 1, call: 1 }, ECHO, 60 * S, false);
    bench.controller.unstick(bench.now_ns, None);
    assert_eq!(bench.did(), [Did::Spawn { worker: 2 }]);
    bench.register(2);
    let second = bench.dispatched();
    bench.reply(2, second);
    bench.reply(1, first);
    bench.did();
    assert_eq!(bench.tick(10 * S - 1), []);
    assert!(bench.controller.wake_ns() <= bench.now_ns + 1);
    assert_eq!(bench.tick(1), [Did::Retire { worker: 2 }]);
    assert_eq!(bench.tick(100 * MS), [Did::Signal { worker: 2, signal: Signal::Terminate }], "it does not go");
    bench.dies(2, Cause::Exited(0), false, false);
    assert_eq!(bench.tick(60 * S), []);
}

#[test]
fn c2_draining_refuses_new_calls_serves_old_ones_and_replaces_whom_they_need() {
    let mut bench = Bench::ready(bounds());
    bench.call(SLOW);
    let key = bench.dispatched();
    bench.call(ECHO);
    bench.controller.drain();
    bench.call(ECHO);
    assert_eq!(codes(&bench.did()), [Code::Draining]);
    assert_eq!(bench.controller.calls_open(), 2);
    bench.dies(1, Cause::Killed(9), true, true);
    let did = bench.tick(0);
    assert!(codes(&did) == [Code::WorkerLost] && did.contains(&Did::Spawn { worker: 1 }), "{did:?}");
    bench.register(1);
    let second = bench.dispatched();
    bench.reply(1, second);
    bench.did();
    assert_eq!(bench.controller.calls_open(), 0);
    bench.dies(1, Cause::Killed(9), false, false);
    assert_eq!(bench.tick(S), [], "nobody waits: nobody is started");
    let _ = key;
}

/// A worker's word was taken for it: a nested call could outlive the invocation it was made for, by centuries.
#[test]
fn p14_a_nested_call_ends_with_the_invocation_it_serves() {
    let mut bench = Bench::ready(Bounds { workers: 3, workers_max: 3, leases: false, ..bounds() });
    bench.ask(client(1), SLOW, S, false);
    let outer = bench.dispatched();
    for (call, deadline_ns) in [(1, 500 * MS), (2, u64::MAX - bench.now_ns)] {
        bench.ask(Caller::Worker { worker: 1, call }, SLOW, deadline_ns, false);
    }
    bench.did();
    let timeouts = |did: Vec<Did>| -> Vec<Caller> {
        did.iter()
            .filter_map(|did| if let Did::Failed { to, code: Code::Timeout, .. } = did { Some(*to) } else { None })
            .collect()
    };
    assert_eq!(timeouts(bench.tick(500 * MS)), [Caller::Worker { worker: 1, call: 1 }], "an earlier one stays");
    let mut ended = timeouts(bench.tick(500 * MS));
    ended.sort_by_key(|caller| matches!(caller, Caller::Worker { .. }));
    assert_eq!(ended, [client(1), Caller::Worker { worker: 1, call: 2 }]);
    // It had its chance: nothing new is begun for an invocation that is over.
    bench.ask(Caller::Worker { worker: 1, call: 3 }, ECHO, S, false);
    assert_eq!(timeouts(bench.did()), [Caller::Worker { worker: 1, call: 3 }]);
    bench.reply(1, outer);
    bench.did();
}

#[test]
fn p14_w11_nested_calls_end_with_the_lease_s_caller_and_without_an_invocation_at_the_default() {
    // Worker 2 serves a lease of worker 1, whose invocation has ten seconds.
    let (mut bench, outer, _) = opened();
    bench.ask(Caller::Worker { worker: 2, call: 1 }, ECHO, 1000 * S, false);
    assert_eq!(codes(&bench.tick(10 * S - 1)), []);
    assert_eq!(codes(&bench.tick(1)), [Code::Timeout, Code::Timeout]);
    // Nobody has given either of them anything now: only a liar asks.
    bench.reply(1, outer);
    bench.did();
    bench.ask(Caller::Worker { worker: 2, call: 2 }, ECHO, 1000 * S, false);
    let inner = bench.dispatched();
    assert_eq!(bench.controller.calls[place(inner)].deadline_ns, bench.now_ns + bounds().deadline_ns);
    // The answer leases worker 1 to worker 2, which is leased to worker 1.
    bench.reply(1, inner);
    assert!(bench.did().iter().any(|did| matches!(did, Did::Grant { caller: 2, callee: 1, .. })));
    bench.ask(Caller::Worker { worker: 1, call: 3 }, ECHO, 1000 * S, false);
    assert_eq!(codes(&bench.tick(bounds().deadline_ns)), [Code::Timeout]);
}

// ---- leases ---------------------------------------------------------------------------------------------------

/// Worker 1 has called worker 2 once and holds a lease on it that it was told of.
fn leased() -> (Bench, CallKey, u64) {
    let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
    bench.call(SLOW);
    let outer = bench.dispatched();
    bench.ask(Caller::Worker { worker: 1, call: 1 }, ECHO, 10 * S, false);
    let inner = bench.dispatched();
    bench.reply(2, inner);
    let did = bench.did();
    let lease = did.iter().find_map(|did| match did {
        Did::Grant { lease, caller: 1, callee: 2 } => Some(*lease),
        _ => None,
    });
    (bench, outer, lease.expect("granted"))
}

fn opened() -> (Bench, CallKey, u64) {
    let (mut bench, outer, lease) = leased();
    bench.controller.lease_taken(1, lease, 5).unwrap();
    assert_eq!(bench.did(), [Did::Open { lease, caller: 1, callee: 2, position: 5 }]);
    (bench, outer, lease)
}

#[test]
fn a_lease_is_granted_opened_revoked_closed_ended_and_dropped() {
    let (mut bench, outer, lease) = opened();
    bench.call(ECHO);
    assert_eq!(bench.did(), [Did::Revoke { lease, callee: 2 }]);
    bench.controller.lease_closed(bench.now_ns, 2, lease).unwrap();
    let did = bench.did();
    assert_eq!(did[0], Did::End { lease, caller: 1 });
    let third = Bench::key(&did);
    // Not leased again before its caller knows that it is over.
    bench.reply(2, third);
    bench.did();
    bench.ask(Caller::Worker { worker: 1, call: 2 }, ECHO, 10 * S, false);
    let fourth = bench.dispatched();
    bench.reply(2, fourth);
    assert!(!bench.did().iter().any(|did| matches!(did, Did::Grant { .. })));
    bench.controller.lease_dropped(1, lease);
    bench.ask(Caller::Worker { worker: 1, call: 3 }, ECHO, 10 * S, false);
    let fifth = bench.dispatched();
    bench.reply(2, fifth);
    assert!(bench.did().iter().any(|did| matches!(did, Did::Grant { .. })));
    bench.reply(1, outer);
    bench.did();
}

/// A leased callee may have made a nested call, returned without waiting for it, and lie idle under its lease; nobody but its worker
/// knows. Once it was left alone for its nested call, and what was queued waited for the end of the lease's caller.
#[test]
fn p14_a_callee_that_nests_is_taken_back_when_nobody_else_is_left() {
    let (mut bench, _, lease) = opened();
    bench.ask(Caller::Worker { worker: 2, call: 1 }, ECHO, 10 * S, false);
    assert_eq!(bench.did(), [Did::Revoke { lease, callee: 2 }]);
    bench.controller.lease_closed(bench.now_ns, 2, lease).unwrap();
    bench.call(ECHO);
    let did = bench.did();
    assert_eq!(did[0], Did::End { lease, caller: 1 });
    bench.reply(2, Bench::key(&did));
    assert!(bench.did().iter().any(|did| matches!(did, Did::Dispatch { worker: 2, .. })));
}

#[test]
fn a_lease_that_was_not_taken_up_is_taken_back_without_asking() {
    let (mut bench, _, lease) = leased();
    bench.call(ECHO);
    let did = bench.did();
    assert!(matches!(did[..], [Did::End { caller: 1, .. }, Did::Dispatch { worker: 2, .. }]), "{did:?}");
    // The caller's acceptance crosses the end and changes nothing.
    bench.controller.lease_taken(1, lease, 0).unwrap();
    bench.controller.lease_dropped(1, lease);
    assert_eq!(bench.did(), []);
}

#[test]
fn no_lease_while_calls_wait() {
    let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
    bench.call(SLOW);
    bench.did();
    bench.ask(Caller::Worker { worker: 1, call: 1 }, ECHO, 10 * S, false);
    let inner = bench.dispatched();
    bench.call(ECHO);
    bench.reply(2, inner);
    assert!(!bench.did().iter().any(|did| matches!(did, Did::Grant { .. })));
}

#[test]
fn w11_lies_about_leases_are_violations_or_change_nothing() {
    let (mut bench, _, lease) = opened();
    assert!(bench.controller.lease_taken(1, lease + 1, 0).is_err(), "never granted");
    assert!(bench.controller.lease_taken(2, lease, 0).is_ok(), "not its own: as if it came late");
    assert!(bench.controller.lease_closed(bench.now_ns, 2, lease).is_err(), "not revoked");
    assert!(bench.controller.lease_closed(bench.now_ns, 1, lease).is_err(), "not the callee");
    assert!(bench.controller.lease_closed(bench.now_ns, 1, lease + 1).is_err(), "never granted");
    bench.controller.lease_dropped(1, lease);
    bench.controller.lease_dropped(2, lease);
    bench.controller.lease_overrun(bench.now_ns, 2, lease);
    assert_eq!(bench.did(), []);
    bench.call(ECHO);
    assert_eq!(bench.did(), [Did::Revoke { lease, callee: 2 }], "it is still there");
}

#[test]
fn a_callee_s_death_ends_its_lease_in_every_phase() {
    for phase in 0..3 {
        let (mut bench, outer, lease) = if phase == 0 { leased() } else { opened() };
        if phase == 2 {
            bench.call(ECHO);
            assert_eq!(bench.did(), [Did::Revoke { lease, callee: 2 }]);
        }
        bench.controller.died(bench.now_ns, 2, Cause::Killed(9), false, Vec::new(), 1 << 1);
        let did = bench.did();
        assert_eq!(
            did.contains(&Did::End { lease, caller: 1 }),
            phase == 0,
            "an unopened lease has a page to throw away"
        );
        // Its place is not used again before worker 1 has forgotten it: another one is.
        assert_eq!(bench.tick(0), [Did::Spawn { worker: 3 }]);
        bench.dies(3, Cause::Exited(1), false, false);
        bench.now_ns += S;
        // What crosses on the way changes nothing.
        bench.controller.lease_taken(1, lease, 0).unwrap();
        bench.controller.lease_dropped(1, lease);
        bench.controller.forgotten(bench.now_ns, 1, 2);
        assert_eq!(bench.tick(0), [Did::Spawn { worker: 2 }]);
        bench.register(2);
        bench.reply(1, outer);
        bench.did();
        assert_eq!(bench.controller.ready_count(), 2);
    }
}

#[test]
fn a_caller_s_death_frees_its_callee_in_every_phase_once_it_has_forgotten() {
    for phase in 0..4 {
        let (mut bench, _, lease) = if phase == 0 { leased() } else { opened() };
        if phase >= 2 {
            bench.ask(Caller::Client { connection: 2, call: 1 }, ECHO, 10 * S, false);
            assert_eq!(bench.did(), [Did::Revoke { lease, callee: 2 }]);
        }
        if phase == 3 {
            bench.controller.lease_closed(bench.now_ns, 2, lease).unwrap();
            let key = bench.dispatched();
            bench.reply(2, key);
            bench.did();
        }
        let knew = if phase == 0 { 0 } else { 1 << 2 };
        bench.controller.died(bench.now_ns, 1, Cause::Killed(9), true, Vec::new(), knew);
        let did = bench.did();
        assert_eq!(codes(&did), [Code::WorkerLost], "its own call");
        bench.ask(Caller::Client { connection: 3, call: 1 }, ECHO, 10 * S, false);
        let free = matches!(bench.did()[..], [Did::Dispatch { worker: 2, .. }]);
        assert_eq!(free, phase == 0 || phase == 3, "phase {phase}");
        if phase == 2 {
            // Its farewell to the lease crosses the death.
            bench.controller.lease_closed(bench.now_ns, 2, lease).unwrap();
            assert_eq!(bench.did(), [], "it has not let go of the dead yet");
        }
        bench.controller.forgotten(bench.now_ns, 2, 1);
        let did = bench.did();
        assert_eq!(did.iter().any(|did| matches!(did, Did::Dispatch { worker: 2, .. })), !free, "{did:?}");
        assert!(bench.tick(0).contains(&Did::Spawn { worker: 1 }));
    }
}

/// The page of a lease that nobody took up stayed with the runtime when an end of it died, one descriptor each time.
#[test]
fn a_lease_granted_to_the_dead_is_never_carried_out() {
    let mut bench = Bench::ready(Bounds { workers: 2, workers_max: 2, ..bounds() });
    bench.call(SLOW);
    bench.did();
    bench.ask(Caller::Worker { worker: 1, call: 1 }, ECHO, 10 * S, false);
    let inner = bench.dispatched();
    // Its answer is taken while it is being buried.
    bench.reply(2, inner);
    bench.dies(2, Cause::Killed(9), true, false);
    let did = bench.did();
    assert!(!did.iter().any(|did| matches!(did, Did::Grant { .. })), "{did:?}");
    assert!(did.contains(&Did::Done { to: Caller::Worker { worker: 1, call: 1 } }), "what it finished is delivered");
}

#[test]
fn a_lease_opened_by_the_dead_is_never_carried_out_and_its_callee_is_free() {
    let (mut bench, _, lease) = leased();
    bench.controller.lease_taken(1, lease, 9).unwrap();
    bench.dies(1, Cause::Killed(9), true, true);
    let did = bench.did();
    assert!(!did.iter().any(|did| matches!(did, Did::Open { .. })), "{did:?}");
    bench.call(ECHO);
    assert!(matches!(bench.did()[..], [Did::Dispatch { worker: 2, .. }]));
}

#[test]
fn w5_a_leased_call_that_overruns_gets_its_callee_the_grace_and_then_the_signal() {
    let (mut bench, _, lease) = opened();
    bench.controller.lease_overrun(bench.now_ns, 1, lease);
    assert_eq!(bench.did(), [Did::Revoke { lease, callee: 2 }]);
    assert_eq!(bench.tick(100 * MS), [Did::Signal { worker: 2, signal: Signal::Terminate }]);
    assert_eq!(bench.tick(100 * MS), [Did::Signal { worker: 2, signal: Signal::Kill }]);
    // Another one comes back in time and lives.
    let (mut bench, _, lease) = opened();
    bench.controller.lease_overrun(bench.now_ns, 1, lease);
    bench.controller.lease_closed(bench.now_ns, 2, lease).unwrap();
    bench.did();
    assert_eq!(bench.tick(S), []);
}

#[test]
fn revocations_are_as_many_as_calls_that_wait() {
    let mut bench = Bench::ready(Bounds { workers: 4, workers_max: 4, connection_calls_max: 9, ..bounds() });
    bench.call(SLOW);
    bench.call(SLOW);
    bench.did();
    for caller in [1, 2] {
        bench.ask(Caller::Worker { worker: caller, call: 1 }, ECHO, 10 * S, false);
        let inner = bench.dispatched();
        bench.reply(caller + 2, inner);
        let grants = bench.did();
        let Some(Did::Grant { lease, .. }) = grants.iter().find(|did| matches!(did, Did::Grant { .. })) else {
            panic!("{grants:?}")
        };
        bench.controller.lease_taken(caller, *lease, 0).unwrap();
        bench.did();
    }
    bench.call(ECHO);
    assert!(matches!(bench.did()[..], [Did::Revoke { lease: 1, callee: 3 }]));
    bench.call(ECHO);
    assert!(matches!(bench.did()[..], [Did::Revoke { lease: 2, callee: 4 }]));
    bench.call(ECHO);
    assert_eq!(bench.did(), [], "there is nobody left to take back");
}
