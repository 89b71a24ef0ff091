//! Calls that are sent again: each rule by hand, then anything in any order against a model that remembers everything.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const ANNA: SessionId = [1; 16];
const BERT: SessionId = [2; 16];

fn terms(known_below: u64, again: bool) -> Terms {
    Terms { idempotent: true, fire: false, once: Some(Once { known_below, again }) }
}

impl Bench {
    fn ask_once(&mut self, connection: u64, call: u64, known_below: u64, again: bool) {
        let payload = self.ledger.token();
        let from = Caller::Client { connection, call };
        let deadline_ns = self.now_ns + 10 * S;
        let request = Request { from, function: ECHO, deadline_ns, terms: terms(known_below, again), payload };
        self.controller.request(self.now_ns, request);
    }

    /// Runs a call from request to answer.
    fn run_once(&mut self, connection: u64, call: u64) {
        self.ask_once(connection, call, 0, false);
        let key = self.dispatched();
        self.reply(1, key);
        assert_eq!(self.did(), [Did::Done { to: Caller::Client { connection, call } }]);
    }
}

#[test]
fn g2_p13_a_call_sent_again_gets_the_stored_result_and_does_not_run_twice() {
    let mut bench = Bench::ready(bounds());
    assert_eq!(bench.controller.greeted(7, ANNA, 1), Ok(None));
    bench.run_once(7, 2);
    bench.controller.disconnected(7);
    assert_eq!(bench.controller.greeted(8, ANNA, 3), Ok(None));
    for _ in 0..3 {
        bench.ask_once(8, 2, 0, true);
        assert_eq!(bench.did(), [Did::Discard, Did::Done { to: Caller::Client { connection: 8, call: 2 } }]);
    }
    assert_eq!(bench.controller.connections.get(&8), None, "an answer given again is no call in flight");
}

#[test]
fn p13_the_same_number_of_two_sessions_is_two_calls() {
    let mut bench = Bench::ready(bounds());
    bench.controller.greeted(7, ANNA, 1).unwrap();
    bench.controller.greeted(8, BERT, 1).unwrap();
    bench.run_once(7, 2);
    bench.run_once(8, 2);
}

#[test]
fn r6_a_running_call_is_answered_on_the_connection_that_took_over() {
    let mut bench = Bench::ready(bounds());
    bench.controller.greeted(7, ANNA, 1).unwrap();
    bench.ask_once(7, 2, 0, false);
    let key = bench.dispatched();
    // The new one comes before we see the end of the old one.
    assert_eq!(bench.controller.greeted(8, ANNA, 3), Ok(Some(7)));
    bench.ask_once(8, 2, 0, true);
    assert_eq!(bench.did(), [Did::Discard]);
    bench.controller.disconnected(7);
    assert_eq!(bench.did(), [], "the function goes on");
    assert_eq!(bench.controller.connections[&8], 1);
    bench.reply(1, key);
    assert_eq!(bench.did(), [Did::Done { to: Caller::Client { connection: 8, call: 2 } }]);
    assert_eq!(bench.controller.connections[&8], 0);
}

#[test]
fn n8_an_answer_that_nobody_was_there_for_is_kept() {
    let mut bench = Bench::ready(bounds());
    bench.controller.greeted(7, ANNA, 1).unwrap();
    bench.ask_once(7, 2, 0, false);
    let key = bench.dispatched();
    bench.controller.disconnected(7);
    bench.reply(1, key);
    assert_eq!(bench.did(), [Did::Discard], "its copy is kept");
    bench.controller.greeted(8, ANNA, 3).unwrap();
    bench.ask_once(8, 2, 0, true);
    assert_eq!(bench.did(), [Did::Discard, Did::Done { to: Caller::Client { connection: 8, call: 2 } }]);
}

#[test]
fn n10_a_connection_that_comes_late_does_not_take_over() {
    let mut bench = Bench::ready(bounds());
    bench.controller.greeted(8, ANNA, 3).unwrap();
    assert_eq!(bench.controller.greeted(7, ANNA, 1), Err(Stale));
    assert_eq!(bench.controller.greeted(9, ANNA, 3), Err(Stale));
    bench.ask_once(7, 2, 0, true);
    assert_eq!(codes(&bench.did()), [Code::Protocol], "it has no session");
    bench.controller.disconnected(7);
    bench.run_once(8, 4);
}

#[test]
fn g2_errors_are_kept_too_and_refusals_are_not() {
    let mut bench = Bench::ready(Bounds { queue_max: 1, connection_calls_max: 10, ..bounds() });
    bench.controller.greeted(7, ANNA, 1).unwrap();
    bench.ask_once(7, 2, 0, false);
    let key = bench.dispatched();
    bench.ask_once(7, 3, 0, false);
    bench.ask_once(7, 4, 0, false);
    assert_eq!(codes(&bench.did()), [Code::Busy]);
    let failed = Outcome::Failed(CallError::new(Code::Failed, "as asked"));
    assert!(bench.controller.reply(bench.now_ns, 1, key, failed).is_ok());
    assert_eq!(codes(&bench.did()), [Code::Failed]);
    bench.ask_once(7, 2, 0, true);
    assert_eq!(codes(&bench.did()), [Code::Failed], "as it ended");
    bench.ask_once(7, 4, 0, true);
    assert_eq!(codes(&bench.did()), [], "it had not run: now it waits");
    assert_eq!(bench.controller.queue.len(), 1);
}

/// Calls of a session were admitted by their connection's lane and then put into the session's, which gave nobody's place: a
/// full queue grew by every one of them.
#[test]
fn g8_calls_that_are_to_run_once_do_not_overfill_the_queue() {
    let mut bench = Bench::ready(Bounds { queue_max: 4, connection_calls_max: 100, ..bounds() });
    bench.controller.greeted(7, ANNA, 1).unwrap();
    let mut refused = 0;
    for call in 2..22 {
        bench.ask_once(7, call, 0, false);
        refused += codes(&bench.did()).iter().filter(|code| **code == Code::Busy).count();
        assert!(bench.controller.queue.len() <= 4, "{} wait", bench.controller.queue.len());
    }
    assert_eq!(refused + 4 + bench.controller.staff.count(), 20);
}

#[test]
fn g2_what_was_forgotten_is_refused_and_not_run() {
    let mut bench = Bench::ready(bounds());
    bench.controller.greeted(7, ANNA, 1).unwrap();
    bench.run_once(7, 2);
    bench.tick(61 * S);
    bench.ask_once(7, 2, 0, true);
    assert_eq!(codes(&bench.did()), [Code::Expired], "its result is too old");
    bench.run_once(7, 3);
    bench.ask_once(7, 4, 4, false);
    bench.dispatched();
    bench.ask_once(7, 3, 4, true);
    assert_eq!(codes(&bench.did()), [Code::Expired], "the client said that it has the answer");
    // A session that was away too long is not known any more, nor what it sent.
    let mut bench = Bench::ready(bounds());
    bench.controller.greeted(7, ANNA, 1).unwrap();
    bench.run_once(7, 2);
    bench.controller.disconnected(7);
    bench.tick(61 * S);
    assert_eq!(bench.controller.dedupe.kept(), (0, 0, 0));
    bench.controller.greeted(8, ANNA, 5).unwrap();
    bench.ask_once(8, 2, 0, true);
    assert_eq!(codes(&bench.did()), [Code::Expired]);
    bench.ask_once(8, 3, 0, false);
    bench.dispatched();
}

#[test]
fn g2_a_call_that_is_out_of_the_window_is_refused() {
    let mut bench = Bench::ready(bounds());
    bench.controller.greeted(7, ANNA, 1).unwrap();
    for call in [2, 3, 2 + WINDOW_CALLS] {
        bench.run_once(7, call);
    }
    bench.ask_once(7, 2, 0, true);
    assert_eq!(codes(&bench.did()), [Code::Expired]);
    bench.ask_once(7, 3, 0, true);
    assert_eq!(bench.did(), [Did::Discard, Did::Done { to: Caller::Client { connection: 7, call: 3 } }]);
    // Never seen, but out of the window as well.
    bench.ask_once(7, 1, 0, false);
    assert_eq!(codes(&bench.did()), [Code::Expired]);
}

#[test]
fn a8_g8_results_stay_within_their_bytes_and_the_oldest_go_first() {
    let max = 10 * (dedupe::CALL_BYTES + 1);
    let mut bench = Bench::ready(Bounds { results_bytes_max: max, ..bounds() });
    bench.controller.greeted(7, ANNA, 1).unwrap();
    for call in 2..1000 {
        bench.run_once(7, call);
        let (_, calls, bytes) = bench.controller.dedupe.kept();
        assert!(bytes <= max && calls <= 10, "{calls} results of {bytes} bytes");
    }
    bench.ask_once(7, 989, 0, true);
    assert_eq!(codes(&bench.did()), [Code::Expired]);
    bench.ask_once(7, 990, 0, true);
    assert_eq!(bench.did(), [Did::Discard, Did::Done { to: Caller::Client { connection: 7, call: 990 } }]);
    // What the client has is given up at once.
    bench.ask_once(7, 1000, 1000, false);
    bench.dispatched();
    assert_eq!(bench.controller.dedupe.kept(), (1, 0, 0));
}

#[test]
fn a8_sessions_without_a_connection_are_bounded() {
    let mut bench = Bench::ready(bounds());
    let [known, unknown] = dedupe::AWAY_MAX;
    for at in 1..known as u64 + 100 {
        let mut session = [0; 16];
        session[..8].copy_from_slice(&at.to_le_bytes());
        bench.controller.greeted(at, session, 1).unwrap();
        bench.controller.disconnected(at);
    }
    assert_eq!(bench.controller.dedupe.kept().0, unknown);
    // Those who come and go without such a call push nobody out who made one.
    bench.controller.greeted(0, ANNA, 1).unwrap();
    bench.run_once(0, 2);
    bench.controller.disconnected(0);
    for at in 1..known as u64 + 100 {
        let mut session = [1; 16];
        session[..8].copy_from_slice(&at.to_le_bytes());
        bench.controller.greeted(at, session, 1).unwrap();
        bench.controller.disconnected(at);
    }
    assert_eq!(bench.controller.dedupe.kept().0, unknown + 1);
    bench.controller.greeted(0, ANNA, 3).unwrap();
    bench.ask_once(0, 2, 0, true);
    assert_eq!(bench.did(), [Did::Discard, Did::Done { to: Caller::Client { connection: 0, call: 2 } }]);
}

#[test]
fn n4_a_call_that_never_arrived_is_run_when_it_comes_again() {
    let mut bench = Bench::ready(bounds());
    bench.controller.greeted(7, ANNA, 1).unwrap();
    bench.controller.disconnected(7);
    bench.controller.greeted(8, ANNA, 4).unwrap();
    for call in [2, 3] {
        bench.ask_once(8, call, 2, true);
        let key = bench.dispatched();
        bench.reply(1, key);
        bench.did();
    }
}

#[test]
fn r6_a_fired_call_is_run_and_never_answered_and_outlives_its_connection() {
    let mut bench = Bench::ready(bounds());
    let fire = |bench: &mut Bench, function| {
        let payload = bench.ledger.token();
        let from = Caller::Client { connection: 7, call: 1 };
        let terms = Terms { fire: true, ..Terms::default() };
        let deadline_ns = bench.now_ns + S;
        bench.controller.request(bench.now_ns, Request { from, function, deadline_ns, terms, payload });
    };
    fire(&mut bench, ECHO);
    let key = bench.dispatched();
    fire(&mut bench, 77);
    assert_eq!(bench.did(), [Did::Discard], "there is no such function, and nobody to tell");
    bench.controller.disconnected(7);
    assert_eq!(bench.did(), [], "the function goes on");
    bench.reply(1, key);
    assert_eq!(bench.did(), [Did::Discard]);
    assert_eq!(bench.controller.calls_open(), 0);
}

// ---- anything in any order --------------------------------------------------------------------------------------

#[derive(Debug, Clone)]
enum Step {
    /// The session sends a new call.
    Call {
        session: usize,
    },
    /// It sends one of its calls again.
    Again {
        session: usize,
        which: prop::sample::Index,
    },
    /// It loses its connection.
    Leave {
        session: usize,
    },
    /// It has another connection; the process sees an old one end before or after.
    Reconnect {
        session: usize,
        seen_late: bool,
    },
    /// It says that it has every answer below this call.
    Know {
        session: usize,
        which: prop::sample::Index,
    },
    /// A worker answers.
    Reply {
        fails: bool,
    },
    /// A worker dies with its call.
    Die {
        started: bool,
    },
    Wait {
        ms: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let which = any::<prop::sample::Index>;
    prop_oneof![
        6 => (0..2_usize).prop_map(|session| Step::Call { session }),
        5 => (0..2_usize, which()).prop_map(|(session, which)| Step::Again { session, which }),
        1 => (0..2_usize).prop_map(|session| Step::Leave { session }),
        2 => (0..2_usize, any::<bool>()).prop_map(|(session, seen_late)| Step::Reconnect { session, seen_late }),
        1 => (0..2_usize, which()).prop_map(|(session, which)| Step::Know { session, which }),
        6 => any::<bool>().prop_map(|fails| Step::Reply { fails }),
        1 => any::<bool>().prop_map(|started| Step::Die { started }),
        1 => prop_oneof![Just(1), Just(500), Just(70_000)].prop_map(|ms| Step::Wait { ms }),
    ]
}

/// How a call stands, as somebody sees it who forgets nothing.
#[derive(Debug, Default, Clone)]
struct Known {
    /// Times it began, but for those that a death undid.
    runs: u32,
    /// The number of the result, or the error.
    ended: Option<Result<u64, Code>>,
    /// It was said that nobody knows; then it must not run any more.
    forgotten: bool,
}

#[derive(Debug)]
struct Peer {
    name: SessionId,
    connection: Option<u64>,
    next: u64,
    known_below: u64,
    calls: BTreeMap<u64, Known>,
}

struct Model {
    bench: Bench,
    peers: Vec<Peer>,
    connections: u64,
    /// Whom the worker runs.
    running: Option<(CallKey, usize, u64)>,
    /// Payload's number to session and call.
    payloads: BTreeMap<u64, (usize, u64)>,
    late: Vec<u64>,
}

impl Model {
    fn new() -> Model {
        let bounds = Bounds {
            queue_max: 6,
            connection_calls_max: 5,
            results_bytes_max: 8 * (dedupe::CALL_BYTES + 1),
            ..bounds()
        };
        let mut model = Model {
            bench: Bench::ready(bounds),
            peers: Vec::new(),
            connections: 2,
            running: None,
            payloads: BTreeMap::new(),
            late: Vec::new(),
        };
        for (at, name) in [ANNA, BERT].into_iter().enumerate() {
            let connection = at as u64 + 1;
            model.bench.controller.greeted(connection, name, 1).unwrap();
            model.peers.push(Peer {
                name,
                connection: Some(connection),
                next: 2,
                known_below: 2,
                calls: BTreeMap::new(),
            });
        }
        model
    }

    fn send(&mut self, session: usize, call: u64, again: bool) {
        let peer = &self.peers[session];
        let Some(connection) = peer.connection else { return };
        let payload = self.bench.ledger.token();
        self.payloads.insert(payload.number, (session, call));
        let from = Caller::Client { connection, call };
        let (now_ns, terms) = (self.bench.now_ns, terms(peer.known_below, again));
        self.bench
            .controller
            .request(now_ns, Request { from, function: ECHO, deadline_ns: now_ns + S, terms, payload });
        self.act(Some((session, call)));
    }

    /// Carries out what was decided, and checks it. `asked` was sent just now.
    fn act(&mut self, asked: Option<(usize, u64)>) {
        while let Some(action) = self.bench.controller.next_action() {
            match action {
                Action::Dispatch { call: key, payload, .. } => {
                    let (session, call) = self.payloads[&payload.number];
                    let known = self.peers[session].calls.get_mut(&call).expect("a call that was made");
                    payload.spend();
                    known.runs += 1;
                    assert_eq!((known.runs, &known.ended), (1, &None), "{call} of {session} runs twice");
                    assert!(!known.forgotten, "{call} of {session} runs although nobody knows whether it did");
                    assert!(self.running.replace((key, session, call)).is_none());
                }
                Action::Answer { to: Caller::Client { connection, call }, outcome } => {
                    let session = self.peers.iter().position(|peer| peer.connection == Some(connection));
                    let session = session.expect("only the connection that a session has now is answered");
                    let known = self.peers[session].calls.get_mut(&call).expect("a call that was made");
                    let result = match outcome {
                        Outcome::Done { payload, .. } => Ok(payload.spend()),
                        Outcome::Failed(error) => Err(error.code),
                    };
                    match (result, &known.ended) {
                        // Refused before it ran.
                        (Err(Code::Busy), ended) => assert_eq!((known.runs, ended), (0, &None)),
                        (Err(Code::Expired), _) => {
                            assert!(asked == Some((session, call)), "nobody asked");
                            // Of what runs, only past its deadline: then it has ended already.
                            if let Some((key, of, run)) = self.running
                                && (of, run) == (session, call)
                            {
                                assert!(self.bench.controller.call(key).is_some_and(|call| call.abandoned));
                            }
                            known.forgotten = true;
                        }
                        (result, Some(ended)) => assert_eq!(result, *ended, "another answer than the first"),
                        (result, None) => known.ended = Some(result),
                    }
                }
                Action::Discard(payload) => drop(payload.spend()),
                Action::Spawn { worker } => self.bench.register(worker),
                Action::TellCancelled { .. } | Action::Signal { .. } => {}
                action => panic!("{action:?}"),
            }
        }
        self.bench.controller.dedupe.kept();
    }

    fn end_of_run(&mut self, result: Result<u64, Code>) {
        if let Some((_, session, call)) = self.running.take() {
            // Its deadline may have been quicker.
            self.peers[session].calls.get_mut(&call).expect("it ran").ended.get_or_insert(result);
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Call { session } => {
                let peer = &mut self.peers[session];
                let call = peer.next;
                peer.next += 1;
                peer.calls.insert(call, Known::default());
                self.send(session, call, false);
            }
            Step::Again { session, which } => {
                let peer = &self.peers[session];
                let calls: Vec<u64> = peer.calls.range(peer.known_below..).map(|(call, _)| *call).collect();
                if !calls.is_empty() {
                    self.send(session, *which.get(&calls), true);
                }
            }
            Step::Reconnect { session, seen_late } => {
                self.connections += 1;
                let connection = self.connections;
                let peer = &mut self.peers[session];
                let old = peer.connection.replace(connection);
                let number = peer.next;
                peer.next += 1;
                if let (Some(old), false) = (old, seen_late) {
                    self.bench.controller.disconnected(old);
                }
                let replaced = self.bench.controller.greeted(connection, peer.name, number).unwrap();
                assert_eq!(replaced, old.filter(|_| seen_late));
                self.late.extend(replaced);
                self.act(None);
            }
            Step::Leave { session } => {
                if let Some(connection) = self.peers[session].connection.take() {
                    self.bench.controller.disconnected(connection);
                }
            }
            Step::Know { session, which } => {
                // What it says it knows it must know.
                let peer = &mut self.peers[session];
                let open = peer.calls.range(peer.known_below..).find(|(_, known)| known.ended.is_none());
                let most = open.map_or(peer.next, |(call, _)| *call);
                let span = usize::try_from(most - peer.known_below).unwrap_or(0) + 1;
                peer.known_below += which.index(span) as u64;
            }
            Step::Reply { fails } => {
                let Some((key, ..)) = self.running else { return };
                let payload = self.bench.ledger.token();
                let (outcome, result) = if fails {
                    payload.spend();
                    (Outcome::Failed(CallError::new(Code::Failed, "")), Err(Code::Failed))
                } else {
                    let number = payload.number;
                    (Outcome::Done { status: 0, payload }, Ok(number))
                };
                let deadline_passed = !matches!(
                    self.bench.controller.call(key),
                    Some(call) if !call.abandoned && call.deadline_ns > self.bench.now_ns
                );
                self.end_of_run(if deadline_passed { Err(Code::Timeout) } else { result });
                assert!(self.bench.controller.reply(self.bench.now_ns, 1, key, outcome).is_ok());
                self.act(None);
            }
            Step::Die { started } => {
                let Some((key, session, call)) = self.running.take() else { return };
                let known = self.peers[session].calls.get_mut(&call).expect("it ran");
                known.runs = 0;
                let request = self.bench.ledger.token();
                self.payloads.insert(request.number, (session, call));
                self.bench.controller.died(self.bench.now_ns, 1, Cause::Killed(9), started, vec![(key, request)], 0);
            }
            Step::Wait { ms } => {
                self.bench.now_ns += ms * MS;
            }
        }
        self.bench.controller.tick(self.bench.now_ns);
        self.act(None);
        for old in std::mem::take(&mut self.late) {
            self.bench.controller.disconnected(old);
        }
        self.act(None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// No call runs twice; each retry gets the result of the one run, or hears that nobody knows, and then it never runs.
    #[test]
    fn g2_whatever_is_sent_again_runs_once_and_has_one_answer(steps in prop::collection::vec(step(), 1..120)) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
        }
        // In the end everybody has an answer: nothing is remembered of them but their results.
        for _ in 0..20 {
            model.step(Step::Reply { fails: false });
        }
        for peer in &mut model.peers {
            if let Some(connection) = peer.connection.take() {
                model.bench.controller.disconnected(connection);
            }
        }
        model.step(Step::Wait { ms: 200_000 });
        model.step(Step::Wait { ms: 200_000 });
        prop_assert_eq!(model.bench.controller.dedupe.kept(), (0, 0, 0));
        prop_assert_eq!(model.bench.controller.calls_open(), 0);
    }
}
