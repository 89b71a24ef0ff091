//! Processes that talk to each other (conformance M1, M5, M6, R2; faults N4, N8, N9): messages and calls both ways, over both reactors.
//!
//! `PRAAS_SEED` sets the seed.

#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::time::{Duration, Instant};

use praas_dataplane::client::Outgoing;
use praas_dataplane::{Client, ClientConfig, InvokeError};
use support::nodes::{NAMES, Node, Place};
use support::relay::Relay;
use support::{PATIENCE, Reactor, ask, on_both_reactors, wait_until};

const ARGS: [&str; 3] = ["--workers=2", "--workers-max=2", "--plaintext"];
/// Where connections are held or cut on their way, all has to go by them.
const BY_TCP: [&str; 4] = ["--workers=2", "--workers-max=2", "--plaintext", "--near=false"];

/// Over both reactors, and with shared memory and without.
fn over_all_carriers(test: impl Fn(Reactor, &str)) {
    for near in ["--near=true", "--near=false"] {
        println!("{near}");
        on_both_reactors(|reactor| test(reactor, near));
    }
}

fn start(place: &Place, reactor: Reactor, who: usize, count: usize, args: &[&str]) -> Node {
    let others = (0..count).filter(|other| *other != who);
    let told: Vec<_> = others.map(|other| (NAMES[other], place.address(other))).collect();
    let node = place.start_with(reactor, who, &told, &[&ARGS[..], args].concat());
    node.wait_ready();
    node
}

fn impatient(place: &Place, who: usize, ms: u64) -> Client {
    let config = ClientConfig { deadline: Duration::from_millis(ms), ..ClientConfig::default() };
    Client::connect(place.address(who), &config).expect("it answers")
}

/// So many, that are told of each other and ready. They are joined when they have something to say.
fn joined(place: &Place, reactor: Reactor, count: usize, args: &[&str]) -> Vec<(Node, Client)> {
    let nodes: Vec<Node> = (0..count).map(|who| start(place, reactor, who, count, args)).collect();
    nodes.into_iter().enumerate().map(|(who, node)| (node, place.client(who))).collect()
}

#[test]
fn m1_m3_messages_reach_another_process_in_order_with_their_sender() {
    over_all_carriers(|reactor, near| {
        let place = Place::new();
        let mut nodes = joined(&place, reactor, 3, &[near]);
        ask(&mut nodes[0].1, "send", &[b"b", b"k", b"from a"]);
        ask(&mut nodes[2].1, "send", &[b"b", b"k", b"from c"]);
        ask(&mut nodes[1].1, "send", &[b"", b"k", b"own"]);
        assert_eq!(ask(&mut nodes[1].1, "recv", &[b"c", b"k"]), "c k from c");
        assert_eq!(ask(&mut nodes[1].1, "recv", &[b"", b"k"]), "b k own");
        assert_eq!(ask(&mut nodes[1].1, "recv", &[b"*", b""]), "a k from a");
        ask(&mut nodes[0].1, "send_many", &[b"b", b"m", b"0", b"300"]);
        ask(&mut nodes[2].1, "send_many", &[b"b", b"m", b"1000", b"300"]);
        for (from, first) in [(b"c", 1000_u64), (b"a", 0)] {
            for at in first..first + 300 {
                let reply = nodes[1].1.invoke("recv_payload", Outgoing::from_args(&[from, b"m"])).unwrap();
                assert_eq!(*reply, at.to_le_bytes());
            }
        }
        // There and back, with payloads that travel in a record, in a block, and in pieces.
        for (count, bytes) in [("50", "0"), ("50", "40"), ("50", "5000"), ("5", "3000000")] {
            let (left, right) = nodes.split_at_mut(1);
            let pong = right[0].1.submit("pong", Outgoing::from_args(&[b"a", b"ping", count.as_bytes()])).unwrap();
            ask(&mut left[0].1, "ping", &[b"b", count.as_bytes(), bytes.as_bytes()]);
            right[0].1.wait(pong).unwrap();
        }
    });
}

/// G3, W2: an answer that comes together with the news that its question has arrived is offered to the function that asked. When that does not
/// receive it, another does, at once or when the worker is dead; and nobody does twice.
#[test]
fn g3_w2_an_offered_message_that_is_left_is_received_by_another() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let mut nodes = joined(&place, reactor, 2, &["--wait=latency"]);
        let (left, right) = nodes.split_at_mut(1);
        let ((node, asks), (_, answers)) = (&mut left[0], &mut right[0]);
        for kills in [false, true, true, false] {
            let pong = answers.submit("pong", Outgoing::from_args(&[b"a", b"ping", b"41"])).unwrap();
            let leaves = asks.submit("ping_and_leave", Outgoing::from_args(&[b"b", b"40", b"2000"])).unwrap();
            answers.wait(pong).unwrap();
            if kills {
                let workers = support::children(node.pid());
                workers.iter().for_each(|pid| support::signal(*pid, 9));
                assert!(matches!(asks.wait(leaves).unwrap_err(), InvokeError::WorkerLost { .. }));
                wait_until("they are replaced", PATIENCE, || {
                    let now = support::children(node.pid());
                    now.len() == workers.len() && now.iter().all(|pid| !workers.contains(pid))
                });
                assert_eq!(ask(asks, "recv", &[b"b", b"pong"]), "b pong last");
            } else {
                assert_eq!(ask(asks, "recv_for", &[b"b", b"pong", b"1000"]), "b pong last", "while the other sleeps");
                assert!(asks.wait(leaves).unwrap().is_empty(), "it was received");
            }
            assert_eq!(ask(asks, "recv_for", &[b"*", b"", b"0"]), "", "twice");
        }
    });
}

#[test]
fn m1_a_broadcast_reaches_everybody_that_is_there() {
    over_all_carriers(|reactor, near| {
        let place = Place::new();
        let mut nodes = joined(&place, reactor, 3, &[near, "--mailbox-messages-max=1"]);
        assert_eq!(ask(&mut nodes[0].1, "broadcast", &[b"news", b"hello"]), "b c, missed ");
        assert_eq!(ask(&mut nodes[2].1, "recv", &[b"*", b""]), "a news hello");
        // One has not received it, and has no room for more.
        let again = ask(&mut nodes[0].1, "broadcast", &[b"news", b"again"]);
        assert!(again.starts_with("c, missed b busy"), "{again}");
    });
}

#[test]
fn m6_two_processes_send_each_other_64_mib_at_the_same_time() {
    over_all_carriers(|reactor, near| {
        let place = Place::new();
        let mut nodes = joined(&place, reactor, 2, &[near]);
        let bytes = (64 << 20).to_string();
        let (left, right) = nodes.split_at_mut(1);
        let there = left[0].1.submit("send_loan", Outgoing::from_args(&[b"b", b"k", bytes.as_bytes(), b"1"])).unwrap();
        let back = right[0].1.submit("send_loan", Outgoing::from_args(&[b"a", b"k", bytes.as_bytes(), b"2"])).unwrap();
        left[0].1.wait(there).unwrap();
        right[0].1.wait(back).unwrap();
        for ((_, client), (from, byte)) in nodes.iter_mut().zip([(b"b", 2), (b"a", 1)]) {
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[from, b"k"])).unwrap();
            assert!(reply.len() == 64 << 20 && reply.iter().all(|found| *found == byte));
        }
    });
}

#[test]
fn m5_dead_and_full_processes_are_errors_and_nothing_is_lost_on_the_way() {
    over_all_carriers(|reactor, near| {
        let place = Place::new();
        let mut nodes = joined(&place, reactor, 2, &[near, "--mailbox-messages-max=2"]);
        for _ in 0..2 {
            ask(&mut nodes[0].1, "send", &[b"b", b"k", b"v"]);
        }
        let full = nodes[0].1.invoke("send", Outgoing::from_args(&[b"b", b"k", b"v"])).unwrap_err().to_string();
        assert!(full.contains("busy"), "{full}");
        let unknown = nodes[0].1.invoke("send", Outgoing::from_args(&[b"z", b"k", b"v"])).unwrap_err().to_string();
        assert!(unknown.contains("unknown process `z`"), "{unknown}");
        nodes[1].0.kill();
        let begun = Instant::now();
        let gone =
            impatient(&place, 0, 700).invoke("send", Outgoing::from_args(&[b"b", b"k", b"v"])).unwrap_err().to_string();
        assert!(gone.contains("was not there in time; it was not sent") || gone.contains("timeout"), "{gone}");
        assert!(begun.elapsed() < Duration::from_secs(3));
        // A later life of it has an empty mailbox, and takes messages again.
        let _again = start(&place, reactor, 1, 2, &[near, "--mailbox-messages-max=2"]);
        ask(&mut nodes[0].1, "send", &[b"b", b"k", b"new"]);
        assert_eq!(ask(&mut place.client(1), "recv", &[b"*", b""]), "a k new");
    });
}

#[test]
fn r2_calls_go_both_ways_at_once_with_the_same_numbers() {
    over_all_carriers(|reactor, near| {
        let place = Place::new();
        let mut nodes = joined(&place, reactor, 2, &[near]);
        assert_eq!(ask(&mut nodes[0].1, "call_at", &[b"b", b"echo", b"hello"]), "hello");
        assert_eq!(ask(&mut nodes[0].1, "call_at", &[b"a", b"echo", b"here"]), "here", "ourselves, on another worker");
        assert_eq!(ask(&mut nodes[0].1, "call_at", &[b"", b"echo", b"here"]), "here", "SELF, too");
        // Names that nobody can have are errors, and no breach of the protocol for which a worker is killed.
        let names: [(&[u8], &[u8], &str); 3] = [
            (b"b", b"", "functions have names"),
            (b"b", &[b'f'; 1025], "functions have names"),
            (&[b'p'; 1025], b"echo", "unknown process"),
        ];
        for (process, function, what) in names {
            let error = nodes[0].1.invoke("call_at", Outgoing::from_args(&[process, function, b"x"])).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        }
        let reply = nodes[1].1.invoke("call_at", Outgoing::from_args(&[b"a", b"status", b"7"])).unwrap();
        assert_eq!((reply.status(), &*reply), (7, &b"status"[..]));
        for (function, what) in [("fail", "failed as asked"), ("nothing", "no function"), ("panic", "panicked")] {
            let error =
                nodes[0].1.invoke("call_at", Outgoing::from_args(&[b"b", function.as_bytes(), b"-3"])).unwrap_err();
            assert!(error.to_string().contains(what), "{function}: {error}");
        }
        let mut calls = Vec::new();
        for round in 0..200_u32 {
            for (who, (_, client)) in nodes.iter_mut().enumerate() {
                let payload = vec![round as u8; [3, 50, 5000, 400_000][round as usize % 4]];
                let other = [b"b", b"a"][who];
                let call = client.submit("call_at", Outgoing::from_args(&[other, b"echo", &payload])).unwrap();
                calls.push((who, call, payload));
            }
            // One at a time each way: more would leave no worker for those of the other.
            for (who, call, payload) in calls.drain(..) {
                assert!(*nodes[who].1.wait(call).unwrap() == *payload, "round {round}");
            }
        }
    });
}

/// P10: functions of two processes that wait for each other, more than there are workers: some are told `Busy`, none hangs.
#[test]
fn p10_calls_both_ways_with_too_few_workers_are_answered_or_told_busy() {
    over_all_carriers(|reactor, near| {
        let place = Place::new();
        let mut nodes = joined(&place, reactor, 2, &[near]);
        let mut calls = Vec::new();
        for _ in 0..20 {
            for (who, (_, client)) in nodes.iter_mut().enumerate() {
                let other = [b"b", b"a"][who];
                calls.push((who, client.submit("call_at", Outgoing::from_args(&[other, b"echo", b"x"])).unwrap()));
            }
        }
        let (mut right, begun) = (0, Instant::now());
        for (who, call) in calls {
            match nodes[who].1.wait(call) {
                Ok(reply) => right += u32::from(*reply == *b"x"),
                Err(error) => assert!(error.to_string().contains("busy"), "{error}"),
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        println!("{right} of 40 answered within {:?}", begun.elapsed());
        assert_eq!(ask(&mut nodes[0].1, "call_at", &[b"b", b"echo", b"again"]), "again");
    });
}

#[test]
fn p14_a_call_to_a_process_that_hangs_or_dies_ends_in_time() {
    over_all_carriers(|reactor, near| {
        let place = Place::new();
        let mut nodes = joined(&place, reactor, 2, &[near]);
        nodes[0].1 = impatient(&place, 0, 500);
        let begun = Instant::now();
        let late = nodes[0].1.invoke("call_at", Outgoing::from_args(&[b"b", b"hang", b""])).unwrap_err();
        assert!(late.to_string().contains("timeout"), "{late}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        let call = nodes[0].1.submit("call_at", Outgoing::from_args(&[b"b", b"sleep", b"300"])).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        nodes[1].0.kill();
        let lost = nodes[0].1.wait(call).unwrap_err();
        assert!(matches!(lost, InvokeError::Failed { .. } | InvokeError::Timeout { .. }), "{lost}");
    });
}

/// N4, N8, G3: the connection breaks again and again while messages go both ways. Each is received once, in order.
#[test]
fn g3_n4_n8_messages_survive_broken_connections_once_and_in_order() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        // Whoever dials whom, it goes by one of these.
        let relays = [Relay::to(place.address(0)), Relay::to(place.address(1))];
        let through = |who: usize| {
            let told = [(NAMES[1 - who], relays[1 - who].address)];
            let node = place.start_with(reactor, who, &told, &[&BY_TCP[..], &["--dial=start"]].concat());
            node.wait_ready();
            (node, place.client(who))
        };
        let (mut a, mut b) = (through(0), through(1));
        a.0.wait_up("b");
        b.0.wait_up("a");
        let (a, b) = (&mut a, &mut b);
        let (mut count, mut dice) = (0_u64, support::Dice(support::seed()));
        let connections = || relays[0].connections() + relays[1].connections();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|threads| {
            let (stop, relays) = (&stop, &relays);
            threads.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // In the middle of a frame as well as between two.
                    for relay in relays {
                        relay.cut_after(dice.below(3000) as i64);
                    }
                    std::thread::sleep(Duration::from_millis(20 + dice.below(60)));
                }
                for relay in relays {
                    relay.cut_after(-1);
                }
            });
            // As fast as it goes, and until it broke often enough.
            let begun = Instant::now();
            while count < 400 || connections() < 20 && begun.elapsed() < PATIENCE {
                let text = count.to_string();
                count += 100;
                let there =
                    a.1.submit("send_many", Outgoing::from_args(&[b"b", b"k", text.as_bytes(), b"100"])).unwrap();
                let back =
                    b.1.submit("send_many", Outgoing::from_args(&[b"a", b"k", text.as_bytes(), b"100"])).unwrap();
                a.1.wait(there).unwrap();
                b.1.wait(back).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        println!("{} connections, {count} messages each way", connections());
        assert!(connections() >= 20, "it broke: {}", connections());
        for (node, from) in [(a, b"b"), (b, b"a")] {
            for at in 0..count {
                let reply = node.1.invoke("recv_payload", Outgoing::from_args(&[from, b"k"])).unwrap();
                assert_eq!(*reply, at.to_le_bytes());
            }
            let more = node.1.invoke("recv_for", Outgoing::from_args(&[b"*", b"", b"0"])).unwrap();
            assert_eq!(more.status(), 1, "and no more");
        }
    });
}

#[test]
fn a_message_waits_for_a_process_that_is_not_there_yet() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let _first = start(&place, reactor, 0, 2, &[]);
        let mut client = place.client(0);
        let sending = client.submit("send", Outgoing::from_args(&[b"b", b"k", b"early"])).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let _second = start(&place, reactor, 1, 2, &[]);
        client.wait(sending).unwrap();
        assert_eq!(ask(&mut place.client(1), "recv", &[b"*", b""]), "a k early");
        wait_until("nothing is left over", PATIENCE, || ask(&mut client, "active", &[b""]) == "a b");
    });
}

/// Two that reach each other by relays only.
fn relayed(place: &Place, reactor: Reactor, args: &[&str]) -> ([Relay; 2], [(Node, Client); 2]) {
    let relays = [Relay::to(place.address(0)), Relay::to(place.address(1))];
    let through = |who: usize| {
        let told = [(NAMES[1 - who], relays[1 - who].address)];
        let node = place.start_with(reactor, who, &told, args);
        node.wait_ready();
        (node, place.client(who))
    };
    let nodes = [through(0), through(1)];
    nodes[0].0.wait_up("b");
    nodes[1].0.wait_up("a");
    (relays, nodes)
}

/// G3, N9: a sender that was told `Timeout` had its memory back while the message was on its way, and wrote the next one over it.
#[test]
fn g3_n9_a_message_that_was_given_up_arrives_as_it_was_sent() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let args = ["--workers=1", "--workers-max=1", "--plaintext", "--near=false", "--dial=start"];
        let (relays, mut nodes) = relayed(&place, reactor, &args);
        relays.iter().for_each(Relay::hold);
        let bytes = (16 << 20).to_string();
        let arguments =
            |to: &'static [u8], byte: &'static [u8]| Outgoing::from_args(&[to, b"k", bytes.as_bytes(), byte]);
        let gone = impatient(&place, 0, 400).invoke("send_loan", arguments(b"b", b"1")).unwrap_err();
        assert!(gone.to_string().contains("timeout"), "{gone}");
        // Memory of the same size, by the same worker.
        for _ in 0..2 {
            nodes[0].1.invoke("send_loan", arguments(b"", b"2")).unwrap();
        }
        relays.iter().for_each(Relay::release);
        let reply = nodes[1].1.invoke("recv_payload", Outgoing::from_args(&[b"a", b"k"])).unwrap();
        let wrong = reply.iter().filter(|byte| **byte != 1).count();
        assert_eq!((reply.len(), wrong), (16 << 20, 0));
    });
}
