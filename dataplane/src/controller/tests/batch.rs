//! Functions that run once for several calls.

use super::*;

const TOGETHER: u16 = 3;

/// Workers that run `together` for up to three calls, or for those that came within ten milliseconds.
fn batching(bounds: Bounds) -> Bench {
    let workers = bounds.workers;
    let mut bench = Bench::new(bounds);
    bench.tick(0);
    bench.triggers = vec![(TOGETHER, Trigger::Batch { calls: 3, wait_ns: 10 * MS })];
    (1..=workers).for_each(|worker| bench.register(worker));
    assert_eq!(bench.did(), []);
    bench
}

fn wide(workers: u8) -> Bounds {
    Bounds { workers, workers_max: workers, queue_max: 100, connection_calls_max: 100, ..bounds() }
}

/// The batches that were handed out: to whom, and which calls.
fn batches(did: &[Did]) -> Vec<(WorkerId, Vec<CallKey>)> {
    let mut found: Vec<(WorkerId, Vec<CallKey>)> = Vec::new();
    let mut left = 0;
    for did in did {
        match did {
            Did::Batch { worker, calls } => {
                assert_eq!(left, 0, "the calls of the one before come first");
                (left, _) = (*calls, found.push((*worker, Vec::new())));
            }
            Did::Dispatch { worker, call, .. } if left > 0 => {
                let (to, calls) = found.last_mut().expect("announced");
                assert_eq!(to, worker);
                calls.push(*call);
                left -= 1;
            }
            Did::Dispatch { worker, call, function: TOGETHER } => found.push((*worker, vec![*call])),
            _ => {}
        }
    }
    found
}

fn ended(did: &[Did]) -> Vec<(Caller, Option<Code>)> {
    let end = |did: &Did| match did {
        Did::Done { to } => Some((*to, None)),
        Did::Failed { to, code, .. } => Some((*to, Some(*code))),
        _ => None,
    };
    did.iter().filter_map(end).collect()
}

impl Bench {
    fn dies_with(&mut self, worker: WorkerId, calls: &[CallKey], started: bool) {
        let requests = calls.iter().map(|call| (*call, self.ledger.token())).collect();
        self.controller.died(self.now_ns, worker, Cause::Killed(11), started, requests, 0);
    }
}

#[test]
fn a_batch_runs_when_it_is_full_or_has_waited_and_each_caller_gets_its_own_answer() {
    let mut bench = batching(wide(2));
    let callers: Vec<_> = (0..4).map(|_| bench.call(TOGETHER)).collect();
    let runs = batches(&bench.did());
    assert_eq!((runs.len(), runs[0].0, runs[0].1.len()), (1, 1, 3), "{runs:?}");
    assert_eq!(bench.tick(10 * MS - 1), []);
    let late = batches(&bench.tick(1));
    assert_eq!((late.len(), late[0].0, late[0].1.len()), (1, 2, 1), "{late:?}");
    for (call, caller) in runs[0].1.iter().chain(&late[0].1).zip(&callers) {
        let worker = if caller == &callers[3] { 2 } else { 1 };
        bench.reply(worker, *call);
        assert_eq!(ended(&bench.did()), [(*caller, None)]);
    }
    assert_eq!((bench.controller.calls_open(), bench.controller.batches.waiting()), (0, 0));
    // Others do not wait for each other.
    bench.call(ECHO);
    assert!(matches!(&bench.did()[..], [Did::Dispatch { worker: 1, .. }]));
}

#[test]
fn whoever_does_not_wait_any_more_is_taken_out_before_the_run_and_unheard_after_it() {
    let mut bench = batching(wide(1));
    let _ = bench.call(TOGETHER);
    bench.ask(Caller::Client { connection: 1, call: 50 }, TOGETHER, 5 * MS, false);
    bench.ask(Caller::Client { connection: 2, call: 1 }, TOGETHER, S, false);
    // Full, and at work: those to come wait for the worker.
    let runs = batches(&bench.did());
    for call in 60..63 {
        bench.ask(client(call), TOGETHER, S, false);
    }
    bench.controller.cancel(1, 60);
    assert_eq!(ended(&bench.did()), [(client(60), Some(Code::Cancelled))]);
    assert_eq!(ended(&bench.tick(5 * MS)), [(client(50), Some(Code::Timeout))], "in the middle of the run");
    bench.controller.disconnected(2);
    assert_eq!(bench.did(), [], "the first still waits: the function is not told");
    bench.controller.cancel(1, 1);
    let did = bench.did();
    assert!(did.contains(&Did::TellCancelled { worker: 1 }), "nobody waits for any of them: {did:?}");
    for call in &runs[0].1 {
        bench.reply(1, *call);
    }
    let did = bench.did();
    assert_eq!(ended(&did), []);
    let next = batches(&did);
    assert_eq!(next[0].1.len(), 2, "without the one that was called off: {did:?}");
    bench.controller.cancel(1, 61);
    bench.did();
    bench.reply(1, next[0].1[0]);
    bench.reply(1, next[0].1[1]);
    assert_eq!(ended(&bench.did()), [(client(62), None)]);
    assert_eq!(bench.controller.calls_open(), 0);
}

#[test]
fn p14_a_run_may_go_on_as_long_as_one_of_its_callers_waits() {
    let mut bench = batching(wide(1));
    for (call, deadline_ns) in [(1, 20 * MS), (2, 40 * MS), (3, 30 * MS)] {
        bench.ask(client(call), TOGETHER, deadline_ns, false);
    }
    bench.did();
    bench.tick(30 * MS);
    assert!(!bench.tick(9 * MS + bounds().grace_ns / 20).iter().any(|did| matches!(did, Did::Signal { .. })));
    bench.tick(MS);
    let did = bench.tick(bounds().grace_ns);
    assert!(did.contains(&Did::Signal { worker: 1, signal: Signal::Terminate }), "{did:?}");
}

#[test]
fn w1_w2_a_worker_that_dies_ends_each_call_of_its_batch_as_its_own_delivery_says() {
    let mut bench = batching(wide(2));
    for (call, idempotent) in [(1, true), (2, false), (3, true)] {
        bench.ask(client(call), TOGETHER, S, idempotent);
    }
    let (_, calls) = batches(&bench.did()).remove(0);
    // It never had all of them: nothing has run, and another worker gets the same.
    bench.dies_with(1, &calls, false);
    let did = bench.did();
    assert_eq!((ended(&did), batches(&did)), (vec![], vec![(2, calls.clone())]));
    // It answered the first, and died with the others.
    bench.reply(2, calls[0]);
    assert_eq!(ended(&bench.did()), [(client(1), None)]);
    bench.dies_with(2, &calls[1..], true);
    let did = bench.tick(0);
    assert_eq!(ended(&did), [(client(2), Some(Code::WorkerLost))]);
    bench.register(1);
    assert_eq!(batches(&bench.did()), [(1, vec![calls[2]])], "the one that may run again");
    bench.reply(1, calls[2]);
    assert_eq!(ended(&bench.did()), [(client(3), None)]);
}

#[test]
fn w7_a_batch_that_panics_or_kills_is_one_loss_and_its_worker_leaves_after_the_last_answer() {
    let mut bench = batching(Bounds { workers_max: 1, ..wide(1) });
    for round in 0..5 {
        for _ in 0..3 {
            bench.call(TOGETHER);
        }
        let (_, calls) = batches(&bench.did()).remove(0);
        for call in &calls {
            assert!(!matches!(bench.controller.staff.state(1), State::Dying), "round {round}");
            let panicked = Outcome::Failed(CallError::new(Code::Panicked, ""));
            assert!(bench.controller.reply(bench.now_ns, 1, *call, panicked).is_ok());
        }
        assert_eq!(codes(&bench.did()), [Code::Panicked; 3]);
        assert!(matches!(bench.controller.staff.state(1), State::Dying));
        bench.controller.died(bench.now_ns, 1, Cause::Exited(71), true, Vec::new(), 0);
        bench.tick(0);
        bench.register(1);
        assert_eq!(bench.controller.circuits[3].losses(), round + 1);
    }
    bench.call(TOGETHER);
    assert_eq!(codes(&bench.did()), [Code::FunctionBroken]);
}

#[test]
fn a8_calls_that_are_collected_are_bounded_and_nested_ones_never_hang() {
    let mut bench = batching(Bounds { queue_max: 2, ..wide(1) });
    bench.call(TOGETHER);
    bench.call(TOGETHER);
    bench.call(TOGETHER);
    assert_eq!(codes(&bench.did()), [Code::Busy], "with a worker that has nothing to do");
    let (_, calls) = batches(&bench.tick(10 * MS)).remove(0);
    // Its function calls itself: that waits for others, then for a worker, and there is none to come.
    bench.ask(Caller::Worker { worker: 1, call: 1 }, TOGETHER, S, false);
    bench.tick(10 * MS);
    bench.controller.unstick(bench.now_ns, Some(2));
    bench.now_ns += 30 * MS;
    bench.controller.unstick(bench.now_ns, Some(2));
    assert_eq!(ended(&bench.did()), [(Caller::Worker { worker: 1, call: 1 }, Some(Code::Busy))]);
    calls.iter().for_each(|call| bench.reply(1, *call));
    assert_eq!(ended(&bench.did()).len(), 2);
}

#[test]
fn c2_a_process_that_drains_makes_nobody_wait_for_calls_that_do_not_come() {
    let mut bench = batching(wide(1));
    bench.call(TOGETHER);
    assert_eq!(bench.did(), []);
    bench.controller.drain();
    let (_, calls) = batches(&bench.tick(0)).remove(0);
    bench.reply(1, calls[0]);
    assert_eq!((ended(&bench.did()).len(), bench.controller.calls_open()), (1, 0));
}

#[test]
fn triggers_that_cannot_be_are_refused_and_all_workers_have_the_same() {
    let trigger = |calls, wait_ns| Trigger::Batch { calls, wait_ns };
    for triggers in [
        vec![(4, trigger(3, 0))],
        vec![(3, trigger(0, 0))],
        vec![(3, trigger(129, 0))],
        vec![(3, trigger(3, u64::MAX))],
        vec![(3, trigger(3, 0)), (3, trigger(2, 0))],
    ] {
        let mut bench = Bench::new(bounds());
        bench.tick(0);
        assert!(bench.controller.ready(bench.now_ns, 1, &functions(), &triggers).is_err(), "{triggers:?}");
    }
    let mut bench = batching(wide(1));
    bench.dies(1, Cause::Killed(9), false, false);
    bench.tick(0);
    assert!(bench.controller.ready(bench.now_ns, 1, &functions(), &[]).is_err(), "another program");
}
