//! Calls that busy workers are given ahead, and how they come back.

use super::*;

/// Two workers who may have two calls more than they run, and no clients' bound in the way.
fn two() -> Bench {
    Bench::ready(Bounds { workers: 2, workers_max: 2, ahead_max: 2, connection_calls_max: 100, ..bounds() })
}

fn dispatches(did: &[Did]) -> Vec<(WorkerId, CallKey)> {
    let dispatch = |did: &Did| if let Did::Dispatch { worker, call, .. } = did { Some((*worker, *call)) } else { None };
    did.iter().filter_map(dispatch).collect()
}

impl Bench {
    /// Calls given by now, as worker and key.
    fn given(&mut self) -> Vec<(WorkerId, CallKey)> {
        let did = self.did();
        let given = dispatches(&did);
        assert_eq!(given.len(), did.len(), "{did:?}");
        given
    }

    fn calls(&mut self, calls: u64, function: u16) {
        for _ in 0..calls {
            self.call(function);
        }
    }

    fn come_back(&mut self, worker: WorkerId, calls: &[CallKey]) {
        let calls = calls.iter().map(|call| (*call, self.ledger.token())).collect();
        self.controller.withdrawn(self.now_ns, worker, calls);
    }
}

#[test]
fn p11_a_busy_worker_has_the_next_calls_already_and_answers_them_in_order() {
    let mut bench = Bench::ready(Bounds { ahead_max: 2, connection_calls_max: 100, ..bounds() });
    let callers: Vec<Caller> = (0..5).map(|_| bench.call(ECHO)).collect();
    let mut given = bench.given();
    assert_eq!(given.len(), 3, "one to run, two ahead, two in the queue");
    for (at, caller) in callers.into_iter().enumerate() {
        bench.reply(1, given[at].1);
        let did = bench.did();
        given.extend(dispatches(&did));
        assert!(did.contains(&Did::Done { to: caller }), "{did:?}");
    }
    assert_eq!(given.len(), 5);
    let mut late = given.clone();
    late.dedup();
    assert_eq!(late, given);
}

#[test]
fn the_order_of_answers_is_the_order_of_calls() {
    let mut bench = Bench::ready(Bounds { ahead_max: 2, ..bounds() });
    bench.call(ECHO);
    bench.call(ECHO);
    let given = bench.given();
    let payload = bench.ledger.token();
    let early = bench.controller.reply(bench.now_ns, 1, given[1].1, Outcome::Done { status: 0, payload });
    let Err((Violation(_), Outcome::Done { payload, .. })) = early else { panic!("{early:?}") };
    payload.spend();
}

#[test]
fn a_worker_with_nothing_to_do_takes_over_what_another_has_not_begun() {
    let mut bench = two();
    bench.calls(6, SLOW);
    let given = bench.given();
    assert_eq!(given.iter().map(|(worker, _)| *worker).collect::<Vec<_>>(), [1, 2, 1, 2, 1, 2]);
    for at in [1, 3] {
        bench.reply(2, given[at].1);
    }
    assert!(!bench.did().contains(&Did::Withdraw { worker: 1 }), "it has one more");
    bench.reply(2, given[5].1);
    let did = bench.did();
    assert_eq!(did.first(), Some(&Did::Withdraw { worker: 1 }), "{did:?}");
    bench.come_back(1, &[given[2].1, given[4].1]);
    let again = bench.given();
    assert_eq!(
        again,
        [(2, given[2].1), (1, given[4].1)],
        "the older one runs now, the other is ahead of whoever has less"
    );
}

#[test]
fn a_worker_that_had_begun_on_nothing_is_employed_like_any_other() {
    let mut bench = two();
    bench.calls(4, ECHO);
    let given = bench.given();
    bench.reply(2, given[1].1);
    bench.reply(2, given[3].1);
    assert!(bench.did().contains(&Did::Withdraw { worker: 1 }));
    bench.come_back(1, &[given[0].1, given[2].1]);
    let mut again = bench.given();
    again.sort_unstable();
    assert_eq!(again, [(1, given[0].1), (2, given[2].1)]);
}

#[test]
fn a_call_that_was_taken_as_it_was_withdrawn_comes_back_by_itself() {
    let mut bench = two();
    bench.calls(4, ECHO);
    let given = bench.given();
    bench.reply(2, given[1].1);
    bench.reply(2, given[3].1);
    bench.did();
    // The controller sees the first one taken; the worker finds it withdrawn.
    bench.come_back(1, &[given[2].1]);
    assert_eq!(bench.given(), [(2, given[2].1)]);
    bench.come_back(1, &[given[0].1]);
    assert_eq!(bench.given(), [(1, given[0].1)]);
}

#[test]
fn p10_a_worker_that_waits_for_a_nested_call_keeps_nobody_waiting() {
    let mut bench = Bench::ready(Bounds { ahead_max: 2, ..bounds() });
    bench.call(SLOW);
    bench.call(ECHO);
    let given = bench.given();
    bench.ask(Caller::Worker { worker: 1, call: 1 }, ECHO, S, false);
    assert_eq!(bench.did(), [Did::Withdraw { worker: 1 }]);
    bench.come_back(1, &[given[1].1]);
    bench.call(ECHO);
    assert_eq!(bench.did(), [], "it gets no more while it waits");
    assert_eq!(bench.controller.queue.len(), 3);
}

#[test]
fn a_nested_call_is_never_given_ahead() {
    let mut bench = two();
    bench.call(SLOW);
    bench.call(SLOW);
    bench.did();
    bench.ask(Caller::Worker { worker: 1, call: 1 }, ECHO, S, false);
    assert_eq!(bench.did(), [], "worker 2 may call worker 1 in turn");
}

#[test]
fn p14_a_call_ahead_that_nobody_wants_any_more_does_not_run() {
    for cancelled in [true, false] {
        let mut bench = Bench::ready(Bounds { ahead_max: 2, ..bounds() });
        bench.call(SLOW);
        bench.ask(client(7), ECHO, S, false);
        let given = bench.given();
        let did = if cancelled {
            bench.controller.cancel(1, 7);
            bench.did()
        } else {
            bench.tick(S)
        };
        assert_eq!(codes(&did), [if cancelled { Code::Cancelled } else { Code::Timeout }]);
        assert!(did.contains(&Did::Withdraw { worker: 1 }), "{did:?}");
        bench.come_back(1, &[given[1].1]);
        assert_eq!(bench.did(), [Did::Discard]);
        bench.reply(1, given[0].1);
        assert_eq!(bench.did(), [Did::Done { to: client(1) }]);
    }
}

#[test]
fn p14_a_call_ahead_that_began_late_is_overdue_like_any_other() {
    let mut bench = Bench::ready(Bounds { ahead_max: 2, ..bounds() });
    bench.call(SLOW);
    bench.ask(client(7), SLOW, S, false);
    let given = bench.given();
    assert_eq!(codes(&bench.tick(S)), [Code::Timeout]);
    // It had begun by then, with the first answer on its way.
    bench.come_back(1, &[]);
    bench.reply(1, given[0].1);
    assert_eq!(bench.did(), [Did::TellCancelled { worker: 1 }, Did::Done { to: client(1) }]);
    bench.tick(0);
    assert_eq!(bench.tick(100 * MS), [Did::Signal { worker: 1, signal: Signal::Terminate }]);
}

#[test]
fn w2_calls_ahead_of_a_dead_worker_start_over_and_it_counts_for_nothing() {
    let mut bench = Bench::ready(Bounds { ahead_max: 2, ..bounds() });
    bench.call(SLOW);
    let second = bench.call(ECHO);
    let given = bench.given();
    // Not yet with the worker when it dies.
    bench.call(ECHO);
    let calls = given.iter().map(|(_, call)| (*call, bench.ledger.token())).collect();
    bench.controller.died(bench.now_ns, 1, Cause::Killed(9), true, calls, 0);
    let did = bench.tick(0);
    assert_eq!(codes(&did), [Code::WorkerLost], "the first had begun: {did:?}");
    bench.register(1);
    let again = bench.given();
    assert_eq!(again.len(), 2);
    assert_eq!(again[0].1, given[1].1);
    assert_eq!(bench.controller.call(given[1].1).expect("it waits").attempts, 0);
    bench.reply(1, again[0].1);
    assert_eq!(bench.did(), [Did::Done { to: second }]);
}

#[test]
fn w7_calls_ahead_of_a_function_that_broke_are_refused_with_those_that_wait() {
    let mut bench = Bench::ready(Bounds { ahead_max: 2, queue_max: 100, connection_calls_max: 100, ..bounds() });
    bench.calls(20, ABORT);
    let (mut lost, mut broken) = (0, 0);
    let mut given = bench.given();
    while !given.is_empty() {
        let calls = given.iter().map(|(_, call)| (*call, bench.ledger.token())).collect();
        bench.controller.died(bench.now_ns, 1, Cause::Exited(3), true, calls, 0);
        let codes = codes(&bench.tick(0));
        lost += codes.iter().filter(|code| **code == Code::WorkerLost).count();
        broken += codes.iter().filter(|code| **code == Code::FunctionBroken).count();
        bench.register(1);
        given = bench.given();
    }
    assert_eq!((lost, broken), (5, 15));
}

/// Two workers who share cores, and a function that is known to be short.
fn packing() -> Bench {
    let mut bench = Bench::ready(Bounds {
        workers: 2,
        workers_max: 2,
        ahead_max: 8,
        packs: true,
        queue_max: 100,
        connection_calls_max: 100,
        ..bounds()
    });
    bench.call(ECHO);
    assert_eq!(bench.given().len(), 1, "nothing is known of it yet");
    bench.now_ns += 1000;
    let first = bench.controller.calls.iter().map(|(index, call)| key(index, call.uses)).next().expect("it runs");
    bench.reply(1, first);
    bench.did();
    bench
}

fn workers(given: &[(WorkerId, CallKey)]) -> Vec<WorkerId> {
    given.iter().map(|(worker, _)| *worker).collect()
}

#[test]
fn short_calls_are_packed_and_long_or_nested_ones_are_not() {
    let mut bench = packing();
    bench.calls(4, ECHO);
    let given = bench.given();
    assert_eq!(workers(&given), [1, 1, 1, 1]);
    for (worker, call) in given {
        bench.reply(worker, call);
    }
    assert!(!bench.did().iter().any(|did| matches!(did, Did::Withdraw { .. })));
    bench.calls(1, ECHO);
    bench.calls(1, SLOW);
    assert_eq!(workers(&bench.given()), [1, 2], "nobody knows that the second is short");

    let mut bench = packing();
    bench.calls(1, ECHO);
    bench.ask(Caller::Worker { worker: 1, call: 1 }, ECHO, S, false);
    assert_eq!(workers(&bench.given()), [1, 2]);

    // Beyond what a worker may have the other is woken.
    let mut bench = packing();
    bench.calls(10, ECHO);
    assert_eq!(workers(&bench.given()), [1, 1, 1, 1, 1, 1, 1, 1, 1, 2]);
}

#[test]
fn packed_calls_wait_a_millisecond_for_one_that_turns_out_long() {
    let mut bench = packing();
    bench.calls(3, ECHO);
    let given = bench.given();
    assert_eq!(bench.tick(MS - 1), [], "worker 1 is at it for all we know");
    assert!(bench.controller.wake_ns() <= bench.now_ns + 1);
    assert_eq!(bench.tick(1), [Did::Withdraw { worker: 1 }]);
    bench.come_back(1, &[given[1].1, given[2].1]);
    let again = bench.given();
    assert_eq!(again, [(2, given[1].1), (2, given[2].1)], "packed with the one that is at it now");
    bench.calls(1, ECHO);
    let more = bench.given();
    assert_eq!(workers(&more), [2]);
    bench.reply(2, given[1].1);
    bench.reply(2, given[2].1);
    bench.reply(2, more[0].1);
    bench.reply(1, given[0].1);
    bench.did();

    // Also when nobody was idle while the calls were given.
    let mut bench = packing();
    bench.calls(1, SLOW);
    bench.calls(3, ECHO);
    let given = bench.given();
    assert_eq!(workers(&given), [1, 2, 1, 2]);
    bench.now_ns += MS / 2;
    bench.reply(1, given[0].1);
    bench.reply(1, given[2].1);
    assert_eq!(bench.did().len(), 2, "it stays packed");
    assert_eq!(bench.tick(MS / 2), [Did::Withdraw { worker: 2 }]);
    bench.come_back(2, &[given[3].1]);
    assert_eq!(bench.given(), [(1, given[3].1)]);
}

#[test]
fn nothing_is_given_ahead_to_one_that_is_late() {
    let mut bench = Bench::ready(Bounds { ahead_max: 2, ..bounds() });
    bench.calls(1, SLOW);
    let given = bench.given();
    bench.tick(MS);
    bench.calls(1, ECHO);
    assert_eq!(bench.did(), []);
    bench.reply(1, given[0].1);
    assert_eq!(dispatches(&bench.did()).len(), 1);
}

#[test]
fn packed_calls_of_a_worker_that_does_not_begin_go_to_another() {
    let mut bench = packing();
    bench.calls(3, ECHO);
    let given = bench.given();
    assert_eq!(workers(&given), [1, 1, 1]);
    assert_eq!(bench.tick(MS), [Did::Withdraw { worker: 1 }]);
    bench.come_back(1, &[given[0].1, given[1].1, given[2].1]);
    assert_eq!(workers(&bench.given()), [2, 2, 2], "they went back to worker 1 each millisecond");
}

#[test]
fn what_is_packed_has_nobody_refused_while_a_worker_is_idle() {
    let mut bench = packing();
    bench.controller.bounds.queue_max = 1;
    bench.calls(3, ECHO);
    assert_eq!(workers(&bench.given()), [1, 1, 2]);
}
