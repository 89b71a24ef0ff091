//! Functions that run for messages.

use super::*;

const TOGETHER: u16 = 3;

/// Workers that run `together` for a message under each of three keys.
fn joining(workers: u8, keys: &[&str]) -> Bench {
    let mut bench = Bench::new(Bounds {
        workers,
        workers_max: workers,
        queue_max: 100,
        ahead_max: 4,
        connection_calls_max: 9,
        ..bounds()
    });
    bench.tick(0);
    let keys = keys.iter().map(|key| key.as_bytes().to_vec()).collect();
    bench.triggers = vec![(TOGETHER, Trigger::Join { keys, one_sender: false, idempotent: false })];
    (1..=workers).for_each(|worker| bench.register(worker));
    assert_eq!(bench.did(), []);
    bench
}

impl Bench {
    fn join(&mut self, run: u64, idempotent: bool) -> Vec<Did> {
        let messages = (0..3).map(|_| self.ledger.token()).collect();
        self.controller.join(self.now_ns, run, TOGETHER, idempotent, messages);
        self.did()
    }
}

/// What a run was given to, and the numbers of its messages.
fn given(did: &[Did], run: u64) -> (WorkerId, Vec<CallKey>) {
    let [Did::Join { worker, calls: 3, run: of }, rest @ ..] = did else { panic!("{did:?}") };
    assert_eq!(*of, run);
    let calls = rest.iter().map(|did| match did {
        Did::Dispatch { worker: to, call, function: TOGETHER } if to == worker => *call,
        other => panic!("{other:?}"),
    });
    (*worker, calls.collect())
}

fn dies_with(bench: &mut Bench, worker: WorkerId, cause: Cause, calls: &[CallKey], started: bool) -> Vec<Did> {
    let requests = calls.iter().map(|call| (*call, bench.ledger.token())).collect();
    bench.controller.died(bench.now_ns, worker, cause, started, requests, 0);
    bench.did().into_iter().filter(|did| matches!(did, Did::Unjoin { .. } | Did::Joined { .. })).collect()
}

const LOST: Did = Did::Joined { run: 1, code: Some(Code::WorkerLost) };
const DONE: Did = Did::Joined { run: 1, code: None };
const BACK: Did = Did::Unjoin { run: 1 };

#[test]
fn a_run_has_one_worker_and_ends_once_for_each_message() {
    let mut bench = joining(1, &["x", "y", "z"]);
    let (worker, calls) = given(&bench.join(1, false), 1);
    assert_eq!(bench.join(2, false), [], "it waits for the worker");
    for call in &calls {
        bench.reply(worker, *call);
    }
    let did = bench.did();
    let ends = did.iter().filter(|did| **did == DONE).count();
    assert_eq!(ends, 3);
    let next: Vec<_> = did.into_iter().filter(|did| matches!(did, Did::Join { .. } | Did::Dispatch { .. })).collect();
    let (_, calls) = given(&next, 2);
    let failed = Outcome::Failed(CallError::new(Code::Failed, "as asked"));
    assert_eq!(bench.controller.reply(bench.now_ns, 1, calls[0], failed).ok(), Some(false), "nobody waits");
    bench.reply(1, calls[1]);
    bench.reply(1, calls[2]);
    let ends: Vec<_> = bench.did().into_iter().filter(|did| matches!(did, Did::Joined { .. })).collect();
    let ended = |code| Did::Joined { run: 2, code };
    assert_eq!(ends, [ended(Some(Code::Failed)), ended(None), ended(None)]);
    assert_eq!(bench.controller.calls_open(), 0);
    // Nobody calls it.
    bench.call(TOGETHER);
    assert_eq!(codes(&bench.did()), [Code::UnknownFunction]);
}

#[test]
fn w1_w2_messages_go_back_unless_the_run_had_begun() {
    let killed = Cause::Killed(9);
    let mut bench = joining(1, &["x", "y", "z"]);
    let again = |bench: &mut Bench| {
        bench.tick(0);
        bench.register(1);
        bench.did();
    };
    let (_, calls) = given(&bench.join(1, false), 1);
    assert_eq!(dies_with(&mut bench, 1, killed, &calls, false), [BACK, BACK, BACK]);
    again(&mut bench);
    let (_, calls) = given(&bench.join(1, false), 1);
    assert_eq!(dies_with(&mut bench, 1, killed, &calls, true), [LOST, LOST, LOST]);
    again(&mut bench);
    let (_, calls) = given(&bench.join(1, true), 1);
    assert_eq!(dies_with(&mut bench, 1, killed, &calls, true), [BACK, BACK, BACK], "it may run again");
    again(&mut bench);
    // The first answer speaks for the run.
    let (_, calls) = given(&bench.join(1, true), 1);
    bench.reply(1, calls[0]);
    assert!(bench.did().contains(&DONE));
    assert_eq!(dies_with(&mut bench, 1, killed, &calls[1..], true), [DONE, DONE]);
    again(&mut bench);
    // One that nobody can give back: all are lost, and none is alone in the mailbox.
    let (_, calls) = given(&bench.join(1, false), 1);
    assert_eq!(dies_with(&mut bench, 1, killed, &calls[1..], false), [LOST, LOST, LOST]);
    assert_eq!(bench.controller.calls_open(), 0);
}

#[test]
fn what_waits_for_a_worker_can_be_had_back_and_a_broken_function_gives_it_back() {
    let mut bench = joining(1, &["x", "y", "z"]);
    let (_, calls) = given(&bench.join(1, false), 1);
    bench.join(2, false);
    bench.join(3, false);
    let back: Vec<_> =
        bench.controller.unjoin_waiting().into_iter().map(|(run, payload)| (run, payload.spend())).collect();
    let mut runs: Vec<_> = back.iter().map(|(run, _)| *run).collect();
    runs.sort_unstable();
    assert_eq!((runs, bench.controller.queue.len()), (vec![2, 2, 2, 3, 3, 3], 0));
    assert!([2, 3].iter().all(|run| back.iter().filter(|(of, _)| of == run).is_sorted()), "in their order: {back:?}");
    let mut ended = dies_with(&mut bench, 1, Cause::Killed(11), &calls, true);
    for _ in 0..4 {
        bench.tick(0);
        bench.register(1);
        let (_, calls) = given(&bench.join(1, false), 1);
        bench.join(2, false);
        ended = dies_with(&mut bench, 1, Cause::Killed(11), &calls, true);
        for (_, payload) in bench.controller.unjoin_waiting() {
            payload.spend();
        }
    }
    assert_eq!(ended, [LOST, LOST, LOST, Did::Unjoin { run: 2 }, Did::Unjoin { run: 2 }, Did::Unjoin { run: 2 }]);
    let until_ns = bench.controller.refuses_joins_until(bench.now_ns, TOGETHER).expect("it is broken");
    assert_eq!(bench.controller.refuses_joins_until(until_ns, TOGETHER), None);
    bench.controller.drain();
    assert_eq!(bench.controller.refuses_joins_until(until_ns, TOGETHER), Some(u64::MAX));
}

#[test]
fn p14_the_time_of_a_run_begins_when_it_has_a_worker() {
    let mut bench = joining(1, &["x", "y", "z"]);
    bench.ask(client(1), SLOW, 1000 * S, false);
    let slow = bench.dispatched();
    bench.join(1, false);
    assert_eq!(bench.tick(bounds().deadline_ns + S), []);
    bench.reply(1, slow);
    let did: Vec<_> = bench.did().into_iter().filter(|did| !matches!(did, Did::Done { .. })).collect();
    given(&did, 1);
    let late = Did::Joined { run: 1, code: Some(Code::Timeout) };
    let did = bench.tick(bounds().deadline_ns);
    assert_eq!(did.iter().filter(|did| **did == late).count(), 3, "{did:?}");
    assert!(bench.tick(bounds().grace_ns).contains(&Did::Signal { worker: 1, signal: Signal::Terminate }));
}

/// Half of what was announced together would run with what came after it.
#[test]
fn a_worker_that_runs_for_one_message_gets_nothing_ahead() {
    let mut bench = joining(1, &["x"]);
    let message = bench.ledger.token();
    bench.controller.join(bench.now_ns, 1, TOGETHER, false, vec![message]);
    assert!(matches!(&bench.did()[..], [Did::Join { calls: 1, .. }, Did::Dispatch { .. }]));
    bench.call(ECHO);
    assert_eq!(bench.did(), []);
}
