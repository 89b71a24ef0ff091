//! Functions that run when a message is there under each of their keys (trigger *join*; conformance M1, M2, M3, P5; faults W1, W2, G1), over both channels.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use praas_dataplane::client::Outgoing;
use praas_dataplane::{Client, InvokeError, LaunchConfig};
use support::nodes::Place;
use support::{
    PATIENCE, Tally, connect, content, kill_workers, kills, launch_config, on_both_channels, on_both_reactors, seed,
    start_with, start_workers, wait_until,
};

fn send(client: &mut Client, to: &str, key: &str, payload: &[u8]) {
    client.invoke("send", Outgoing::from_args(&[to.as_bytes(), key.as_bytes(), payload])).unwrap();
}

/// The oldest message under a key, once it is there.
fn received(client: &mut Client, key: &str) -> Vec<u8> {
    client.invoke("recv_payload", Outgoing::from_args(&[b"*", key.as_bytes()])).unwrap().to_vec()
}

fn there_is_none(client: &mut Client, key: &str) {
    let reply = client.invoke("recv_for", Outgoing::from_args(&[b"*", key.as_bytes(), b"30"])).unwrap();
    assert_eq!(reply.status(), 1, "{}", String::from_utf8_lossy(&reply));
}

#[test]
fn m1_m3_a_function_runs_with_the_oldest_message_under_each_key() {
    on_both_channels(|ipc| {
        // With one worker, the messages are its own; with two they are mostly another's.
        for workers in [1, 2] {
            let (process, mut client) = start_workers(ipc, workers, &[]);
            let expected = |left: &[u8], right: &[u8]| {
                [format!("{0}:left {0}:right ", client_of(&process)).as_bytes(), left, right].concat()
            };
            for bytes in [[0, 1], [20, 41], [5000, 100_000], [300_000, 3]] {
                let [first, second, third, fourth] = [0, 1, 2, 3].map(|call| content(call, bytes[call as usize % 2]));
                send(&mut client, "", "right", &first);
                send(&mut client, "", "right", &second);
                there_is_none(&mut client, "pair");
                send(&mut client, "", "left", &third);
                assert!(received(&mut client, "pair") == expected(&third, &first), "{bytes:?}");
                send(&mut client, "", "left", &fourth);
                assert!(received(&mut client, "pair") == expected(&fourth, &second), "{bytes:?}");
            }
            let refused = client.invoke("joined", b"x").unwrap_err();
            assert!(
                matches!(&refused, InvokeError::UnknownFunction { text } if text.contains("not called")),
                "{refused}"
            );
        }
    });
}

/// The name of a process that was given none.
fn client_of(process: &praas_dataplane::LocalProcess) -> String {
    let reply = connect(process).invoke("context", b"").unwrap();
    String::from_utf8_lossy(&reply).split(' ').nth(1).unwrap_or_default().to_owned()
}

#[test]
fn m2_a_receive_that_waits_gets_the_message_and_what_is_incomplete_can_be_received() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        let waiting = client.submit("recv_payload", Outgoing::from_args(&[b"*", b"left"])).unwrap();
        // It waits once the other worker has answered a call behind it.
        wait_until("it waits", PATIENCE, || client.invoke("echo", b"x").is_ok());
        std::thread::sleep(Duration::from_millis(20));
        send(&mut client, "", "right", b"1");
        send(&mut client, "", "left", b"2");
        assert_eq!(*client.wait(waiting).unwrap(), *b"2");
        there_is_none(&mut client, "pair");
        assert_eq!(received(&mut client, "right"), b"1", "as any message");
        send(&mut client, "", "left", b"3");
        send(&mut client, "", "right", b"4");
        assert!(received(&mut client, "pair").ends_with(b"34"));
        drop(process);
    });
}

#[test]
fn m1_r2_messages_of_other_processes_count_and_those_of_two_are_not_mixed_when_one_is_wanted() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let nodes = place.start_pair(reactor, &["--workers=2", "--workers-max=2", "--plaintext"]);
        let (mut a, mut b) = (place.client(0), place.client(1));
        send(&mut a, "b", "left", b"1");
        send(&mut b, "", "right", b"2");
        assert_eq!(received(&mut b, "pair"), b"a:left b:right 12");
        send(&mut a, "b", "one x", &[7; 100_000]);
        send(&mut b, "", "one y", b"own");
        there_is_none(&mut b, "pair of one");
        send(&mut a, "b", "one y", b"a's");
        let [of_a, of_b] = [b"a:one x a:one y ".to_vec(), b"b:one x b:one y ".to_vec()];
        assert!(received(&mut b, "pair of one") == [of_a, vec![7; 100_000], b"a's".to_vec()].concat());
        send(&mut b, "", "one x", b"x");
        assert_eq!(received(&mut b, "pair of one"), [&of_b[..], b"xown"].concat());
        // A failure has nobody who waits for it: the log says what is gone.
        send(&mut a, "b", "bad", b"news");
        wait_until("the log", PATIENCE, || nodes[1].said("failed for news") == 1);
        assert_eq!(nodes[1].said("function=\"bad\"") + nodes[1].said("function=bad"), 1);
    });
}

#[test]
fn a_message_waits_in_the_mailbox_whose_bounds_its_sender_is_told() {
    on_both_channels(|ipc| {
        let mut config = LaunchConfig { workers: 1, workers_max: 1, ..launch_config(ipc) };
        config.args.push("--mailbox-messages-max=8".into());
        let tally = Tally::keep(&mut config);
        let (_process, mut client) = start_with(&config);
        // From within one function: its worker is the only one, so that nothing runs meanwhile. One run has been taken out of the mailbox.
        let many = Outgoing::from_args(&[b"", b"tally one", b"0", b"20"]);
        let busy = client.invoke("send_many", many).unwrap_err();
        assert!(busy.to_string().contains("busy"), "{busy}");
        wait_until("all have run", PATIENCE, || tally.runs().len() == 9);
        send(&mut client, "", "tally one", &9_u64.to_le_bytes());
        wait_until("there is room again", PATIENCE, || tally.runs().len() == 10);
        assert!((0..10).all(|number| tally.runs()[&number] == 1));
    });
}

#[test]
fn p5_w7_a_function_that_kills_its_workers_is_refused_for_a_while_and_loses_no_more() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &[]);
        for at in 0..8_u8 {
            // The worker may die of the message before, as it sends this one.
            while client.invoke("send", Outgoing::from_args(&[b"", b"worse", &[at]])).is_err() {}
        }
        // Refused by now, so that it can be received.
        assert!(!received(&mut client, "worse").is_empty());
    });
}

/// Workers are killed all the time. A message that was acknowledged is taken once at most; and by a function that may run again, at least once.
#[test]
fn w1_w2_g1_messages_survive_the_death_of_workers() {
    on_both_channels(|ipc| {
        let mut config = LaunchConfig { workers: 2, workers_max: 2, ..launch_config(ipc) };
        let tally = Tally::keep(&mut config);
        let (process, mut client) = start_with(&config);
        let stop = AtomicBool::new(false);
        let kills = kills() / 3;
        // Even ones for the function that runs once, odd ones for the one that may run again.
        let (mut sent, mut number) = (HashSet::new(), 0_u64);
        let killed = std::thread::scope(|scope| {
            let killer = scope.spawn(|| kill_workers(&process, seed(), kills, &stop));
            while !killer.is_finished() {
                number += 1;
                let payload = Tally::input(number, [0, 50, 9000][number as usize % 3]);
                let mut send = |key: &[u8]| client.invoke("send", Outgoing::from_args(&[b"", key, &payload])).is_ok();
                // Both of a pair, or it is not known what pairs with what: only the first counts.
                let acknowledged = if number.is_multiple_of(2) {
                    send(b"tally one")
                } else {
                    let first = send(b"tally x");
                    while !send(b"tally y") {}
                    first
                };
                if acknowledged {
                    sent.insert(number);
                }
            }
            killer.join().expect("it ends")
        });
        stop.store(true, Ordering::Relaxed);
        assert!(killed >= kills, "{killed} workers killed");
        // What has not enough of the second key gets it.
        for _ in 0..20 {
            while client.invoke("send", Outgoing::from_args(&[b"", b"tally y", b"more"])).is_err() {}
        }
        let again = || sent.iter().filter(|number| !number.is_multiple_of(2));
        wait_until("those that may run again have run", PATIENCE, || {
            let runs = tally.runs();
            again().all(|number| runs.contains_key(number))
        });
        let runs = tally.runs();
        let lost = sent.iter().filter(|number| !runs.contains_key(number)).count();
        println!("{ipc}: {number} messages, {killed} workers killed, {lost} lost");
        assert!(lost as u64 <= killed, "{lost} lost with {killed} workers");
        for (number, runs) in runs {
            assert!(runs == 1 || !number.is_multiple_of(2), "message {number} was taken {runs} times");
        }
    });
}
