//! Who is hot, who gets a connection, and how it comes back.

use super::super::connection_lease::{HOT_CALLS, LeaseCounts};
use super::*;

const HOT: u64 = HOT_CALLS as u64;

fn lends(bounds: Bounds) -> Bench {
    Bench::ready(Bounds { hot_calls: HOT_CALLS, ..bounds })
}

impl Bench {
    /// A call of a connection from its beginning to its end; what else was done.
    fn round(&mut self, connection: u64, function: u16) -> Vec<Did> {
        self.calls += 1;
        self.ask(Caller::Client { connection, call: self.calls }, function, 10 * S, false);
        let did = self.did();
        let worker =
            did.iter().find_map(|did| if let Did::Dispatch { worker, .. } = did { Some(*worker) } else { None });
        self.reply(worker.expect("somebody is idle"), Bench::key(&did));
        self.did()
    }

    /// Makes a connection hot. Its lease, and who has it.
    fn heat(&mut self, connection: u64) -> (u64, WorkerId) {
        for call in 1..HOT {
            assert_eq!(self.round(connection, 0).len(), 1, "call {call} is one of too few");
        }
        let did = self.round(connection, 0);
        let [Did::Lend { lease, connection: of, worker, function: 0 }, Did::Done { .. }] = did[..] else {
            panic!("{did:?}")
        };
        assert_eq!(of, connection);
        assert!(self.controller.may_lend(self.now_ns, lease));
        (lease, worker)
    }

    fn returned(&mut self, worker: WorkerId, lease: u64) -> Result<Option<u64>, Violation> {
        self.controller.connection_returned(self.now_ns, worker, lease, true, false)
    }
}

#[test]
fn r1_a_client_is_hot_when_it_calls_one_function_alone_and_is_answered() {
    let mut bench = lends(Bounds { workers: 2, workers_max: 2, ..bounds() });
    let (lease, worker) = bench.heat(1);
    assert_eq!(bench.controller.connection_of(worker), Some((lease, 1, true)));
    assert_eq!(bench.returned(worker, lease), Ok(Some(1)));
    // Whatever is not so begins anew.
    for what in 0..4 {
        for _ in 1..HOT {
            assert_eq!(bench.round(1, 0).len(), 1);
        }
        match what {
            0 => assert_eq!(bench.round(1, 2).len(), 1, "another function"),
            1 => {
                // Two at once.
                bench.call(0);
                bench.call(0);
                let did = bench.did();
                let calls: Vec<_> = did
                    .iter()
                    .map(|did| {
                        if let Did::Dispatch { worker, call, .. } = did { (*worker, *call) } else { panic!("{did:?}") }
                    })
                    .collect();
                calls.into_iter().for_each(|(worker, call)| bench.reply(worker, call));
                assert_eq!(bench.did().len(), 2);
            }
            2 => {
                bench.call(0);
                let key = bench.dispatched();
                let failed = Outcome::Failed(CallError::new(Code::Failed, ""));
                assert!(bench.controller.reply(bench.now_ns, 1, key, failed).is_ok());
                assert_eq!(bench.did().len(), 1);
            }
            _ => {
                // Nobody waits for it.
                bench.calls += 1;
                let payload = bench.ledger.token();
                let terms = Terms { fire: true, ..Terms::default() };
                let from = Caller::Client { connection: 1, call: bench.calls };
                let deadline_ns = bench.now_ns + S;
                bench.controller.request(bench.now_ns, Request { from, function: 0, deadline_ns, terms, payload });
                let key = bench.dispatched();
                bench.reply(1, key);
                assert_eq!(bench.did(), [Did::Discard]);
            }
        }
        // One less than it takes.
        for _ in 1..HOT {
            assert_eq!(bench.round(1, 0).len(), 1, "case {what}");
        }
        let cold = bench.round(1, 2);
        assert_eq!(cold.len(), 1);
    }
}

#[test]
fn r1_off_nobody_is_hot() {
    let mut bench = Bench::ready(bounds());
    for _ in 0..3 * HOT {
        assert_eq!(bench.round(1, 0).len(), 1);
    }
}

#[test]
fn r1_who_waits_for_a_worker_gets_one_that_has_a_connection() {
    let mut bench = lends(bounds());
    let (lease, worker) = bench.heat(1);
    let other = Caller::Client { connection: 2, call: 1 };
    bench.ask(other, 0, S, false);
    assert_eq!(bench.did(), [Did::Revoke { lease, callee: worker }]);
    bench.ask(Caller::Client { connection: 2, call: 2 }, 0, S, false);
    assert_eq!(bench.did(), [], "one worker is on its way, and there is no other");
    assert_eq!(bench.returned(worker, lease), Ok(Some(1)));
    let key = bench.dispatched();
    bench.reply(worker, key);
    assert!(bench.did().contains(&Did::Done { to: other }));
    assert!(bench.returned(worker, lease).is_err(), "it has none any more");
    let key = bench.controller.staff.state(worker);
    let State::Running { call } = key else { panic!("{key:?}") };
    bench.reply(worker, call);
    bench.did();
}

#[test]
fn r1_a_connection_with_something_under_way_is_tried_again_soon() {
    let mut bench = lends(bounds());
    let (lease, _) = bench.heat(1);
    bench.controller.lend_failed(bench.now_ns, lease);
    assert_eq!(bench.did(), []);
    let lent = (0..HOT).find_map(|_| {
        bench.round(1, 0).iter().find_map(|did| if let Did::Lend { lease, .. } = did { Some(*lease) } else { None })
    });
    let again = lent.expect("within as many calls");
    assert!(bench.calls < HOT + HOT / 2, "sooner than the first time: {} calls", bench.calls);
    // Somebody began to wait before it was handed over.
    bench.ask(Caller::Client { connection: 2, call: 1 }, 0, S, false);
    assert!(!bench.controller.may_lend(bench.now_ns, again));
    let key = bench.dispatched();
    bench.reply(1, key);
    bench.did();
}

#[test]
fn n4_a_client_that_is_gone_frees_its_worker() {
    let mut bench = lends(bounds());
    let (lease, worker) = bench.heat(1);
    bench.controller.disconnected(1);
    assert_eq!(bench.did(), [Did::Revoke { lease, callee: worker }]);
    assert_eq!(bench.returned(worker, lease), Ok(None), "nobody is there to have it back");
    assert_eq!(bench.round(2, 0).len(), 1);
}

#[test]
fn w1_w7_a_death_in_a_lent_call_is_told_and_counted() {
    let mut bench = lends(bounds());
    for loss in 0..5 {
        let (_, worker) = bench.heat(1);
        let running = Some((900 + loss, bench.now_ns + S));
        bench.controller.connection_outlived(bench.now_ns, worker, Cause::Killed(11), true, running);
        bench.controller.died(bench.now_ns, worker, Cause::Killed(11), true, Vec::new(), 0);
        let did = bench.tick(0);
        let to = Caller::Client { connection: 1, call: 900 + loss };
        assert!(
            matches!(&did[..], [Did::Failed { to: told, code: Code::WorkerLost, .. }, Did::Spawn { .. }] if *told == to),
            "{did:?}"
        );
        bench.register(worker);
        // Calls that worked in between forgive.
        if loss == 0 {
            assert!(bench.controller.circuits[0].refuses(bench.now_ns).is_none());
        }
    }
    // At rest, and past its deadline.
    let (_, worker) = bench.heat(1);
    bench.controller.connection_outlived(bench.now_ns, worker, Cause::Killed(9), true, None);
    bench.controller.died(bench.now_ns, worker, Cause::Killed(9), true, Vec::new(), 0);
    assert_eq!(bench.tick(0), [Did::Spawn { worker }]);
    bench.register(worker);
    let (_, worker) = bench.heat(1);
    let running = Some((7, bench.now_ns));
    bench.controller.connection_outlived(bench.now_ns, worker, Cause::Overran, true, running);
    bench.controller.died(bench.now_ns, worker, Cause::Overran, true, Vec::new(), 0);
    assert!(matches!(&bench.tick(0)[..], [Did::Failed { code: Code::Timeout, .. }, Did::Spawn { .. }]));
    assert_eq!(bench.controller.lease_counts(), LeaseCounts { granted: 7, returned: 7, broken: 0 });
}

#[test]
fn w5_a_lent_call_past_its_deadline_is_signalled_and_then_killed() {
    let mut bench = lends(bounds());
    let (_, worker) = bench.heat(1);
    let until = bench.now_ns + S;
    bench.controller.connection_looked_at(bench.now_ns, worker, Some(until), false);
    assert_eq!(bench.tick(S + MS), []);
    bench.controller.connection_looked_at(bench.now_ns, worker, Some(until), false);
    // It came back within its grace.
    bench.controller.connection_looked_at(bench.now_ns, worker, None, false);
    assert_eq!(bench.tick(200 * MS), []);
    bench.controller.connection_looked_at(bench.now_ns, worker, Some(until), false);
    assert_eq!(bench.tick(100 * MS), [Did::Signal { worker, signal: Signal::Terminate }]);
    assert_eq!(bench.tick(100 * MS), [Did::Signal { worker, signal: Signal::Kill }]);
    bench.controller.connection_outlived(bench.now_ns, worker, Cause::Overran, true, None);
    bench.dies(worker, Cause::Overran, true, false);
    bench.tick(0);
    bench.register(worker);
    // One that says it does nothing, and does not let go; and one that says it has a year.
    for lie in [None, Some(u64::MAX)] {
        let (lease, worker) = bench.heat(1);
        bench.ask(Caller::Client { connection: 2, call: 1 }, 0, 3600 * S, false);
        assert_eq!(bench.did(), [Did::Revoke { lease, callee: worker }]);
        bench.controller.connection_looked_at(bench.now_ns, worker, lie, false);
        bench.tick(61 * S);
        bench.controller.connection_looked_at(bench.now_ns, worker, lie, false);
        let did = [bench.tick(100 * MS), bench.tick(100 * MS)].concat();
        assert!(did.contains(&Did::Signal { worker, signal: Signal::Kill }), "{did:?}");
        bench.controller.connection_outlived(bench.now_ns, worker, Cause::Overran, false, None);
        bench.dies(worker, Cause::Overran, true, false);
        bench.tick(0);
        bench.register(worker);
        let key = bench.dispatched();
        bench.reply(worker, key);
        bench.did();
    }
}

#[test]
fn a_drain_takes_connections_back_and_waits_for_them() {
    let mut bench = lends(bounds());
    let (lease, worker) = bench.heat(1);
    bench.controller.drain();
    assert_eq!(bench.did(), [Did::Revoke { lease, callee: worker }]);
    assert_eq!(bench.controller.calls_open(), 1, "what runs there is not known");
    assert_eq!(bench.returned(worker, lease), Ok(Some(1)));
    assert_eq!(bench.controller.calls_open(), 0);
    bench.call(0);
    assert!(matches!(&bench.did()[..], [Did::Discard, Did::Failed { code: Code::Draining, .. }]));
}

#[test]
fn p5_a_panic_gives_the_connection_back_and_the_worker_up() {
    let mut bench = lends(bounds());
    let (lease, worker) = bench.heat(1);
    let returned = bench.controller.connection_returned(bench.now_ns, worker, lease, true, true);
    assert_eq!(returned, Ok(Some(1)));
    bench.call(0);
    assert_eq!(bench.did(), [], "not to a worker that panicked");
    bench.controller.died(bench.now_ns, worker, Cause::Exited(71), true, Vec::new(), 0);
    assert_eq!(bench.tick(0), [Did::Spawn { worker }]);
    bench.register(worker);
    let key = bench.dispatched();
    bench.reply(worker, key);
    bench.did();
}

#[test]
fn r1_a_connection_on_which_nothing_comes_is_asked_back() {
    let mut bench = lends(bounds());
    let (lease, worker) = bench.heat(1);
    bench.controller.connection_looked_at(bench.now_ns, worker, None, false);
    assert_eq!(bench.did(), []);
    bench.controller.connection_looked_at(bench.now_ns, worker, None, true);
    assert_eq!(bench.did(), [Did::Revoke { lease, callee: worker }]);
    bench.controller.connection_looked_at(bench.now_ns, worker, None, true);
    assert_eq!(bench.did(), [], "once");
    assert_eq!(bench.returned(worker, lease), Ok(Some(1)));
}
