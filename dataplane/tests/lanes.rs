//! Lanes: two workers of two processes that talk again and again (conformance M1, M3, M5; G3, G4, G8, W2): each message is received once and in order, whoever
//! else sends and receives what they do, and whoever dies.
#![allow(clippy::cast_possible_truncation, reason = "numbers are cut to what a record holds on purpose")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use praas_dataplane::Client;
use praas_dataplane::client::Outgoing;

use support::nodes::{NAMES, Node, Place};
use support::{Dice, PATIENCE, Reactor, on_both_reactors, wait_until};

fn start(place: &Place, reactor: Reactor, who: usize, more: &[&str]) -> (Node, Client) {
    let args = [
        &[
            "--dial=start",
            "--workers=3",
            "--workers-max=3",
            "--plaintext",
            "--arena-bytes=67108864",
            "--payload-bytes-max=1048576",
        ],
        more,
    ];
    let node = place.start_with(reactor, who, &[(NAMES[1 - who], place.address(1 - who))], &args.concat());
    node.wait_ready();
    (node, place.client(who))
}

fn wait_shared(node: &Node) {
    wait_until("they share memory", PATIENCE, || node.said("via=memory") > 0);
}

/// Files of lanes that the workers of a process have mapped.
fn lanes(node: &Node) -> usize {
    let children = format!("/proc/{0}/task/{0}/children", node.pid());
    let children = std::fs::read_to_string(children).unwrap_or_default();
    let maps =
        children.split_whitespace().map(|pid| std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default());
    maps.map(|maps| maps.lines().filter(|line| line.contains("praas-lane")).count()).sum()
}

fn args(all: &[&str]) -> Outgoing {
    let all: Vec<&[u8]> = all.iter().map(|arg| arg.as_bytes()).collect();
    Outgoing::from_args(&all)
}

/// M1: a conversation gets a lane, and keeps it, in messages of every size; without shared memory, in `efficient` and with `--isolate` it gets none.
#[test]
fn m1_a_conversation_has_a_lane_of_its_own() {
    on_both_reactors(|reactor| {
        for (more, expected) in [
            (&["--wait=latency"][..], true),
            (&["--wait=balanced"], true),
            (&["--wait=efficient"], false),
            (&["--wait=latency", "--isolate=true"], false),
            (&["--wait=latency", "--near=false"], false),
        ] {
            let place = Place::new();
            let ((a, mut from_a), (b, mut from_b)) = (start(&place, reactor, 0, more), start(&place, reactor, 1, more));
            a.wait_up("b");
            b.wait_up("a");
            if !more.contains(&"--near=false") {
                wait_shared(&a);
                wait_shared(&b);
            }
            for bytes in ["8", "64", "5000", "300000"] {
                let pong = from_b.submit("pong", args(&["a", "ping", "400"])).unwrap();
                from_a.invoke("ping", args(&["b", "400", bytes])).unwrap();
                from_b.wait(pong).unwrap();
            }
            let found = lanes(&a) > 0 && lanes(&b) > 0;
            assert_eq!(found, expected && std::thread::available_parallelism().unwrap().get() > 1, "{more:?}");
        }
    });
}

/// What workers wrote.
#[derive(Default)]
struct Notes {
    /// By key, author and number: how often.
    sent: BTreeMap<(String, u64, u64), usize>,
    got: BTreeMap<(String, u64, u64), usize>,
}

impl Notes {
    fn read(folder: &Path, in_order: bool) -> Notes {
        let mut notes = Notes::default();
        for file in std::fs::read_dir(folder).unwrap().filter_map(Result::ok) {
            if !file.file_name().to_string_lossy().starts_with("notes") {
                continue;
            }
            let mut last: BTreeMap<u64, u64> = BTreeMap::new();
            for line in std::fs::read_to_string(file.path()).unwrap().lines() {
                let words: Vec<&str> = line.split(' ').collect();
                let [what, key, author, number] = words[..] else { panic!("{line}") };
                let (author, number): (u64, u64) = (author.parse().unwrap(), number.parse().unwrap());
                let all = if what == "sent" { &mut notes.sent } else { &mut notes.got };
                *all.entry((key.to_owned(), author, number)).or_default() += 1;
                if in_order && what == "got" && key == "m" {
                    let before = last.insert(author, number);
                    assert!(
                        before.is_none_or(|before| before < number),
                        "{line} after {before:?} in {:?}",
                        file.file_name()
                    );
                }
            }
        }
        notes
    }

    /// What is left in a mailbox counts as received.
    fn drain(&mut self, client: &mut Client, from: &str) {
        for key in ["m", "back"] {
            loop {
                let reply = client.invoke("recv_for", args(&[from, key, "0"])).unwrap();
                if reply.status() == 1 {
                    break;
                }
                let at = from.len() + key.len() + 2;
                let word = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().unwrap());
                *self.got.entry((key.to_owned(), word(at), word(at + 8))).or_default() += 1;
            }
        }
    }
}

/// M1, M3, G4: a conversation, and others who send and receive the same in between, in every way that there is: each message is received once, and what one
/// worker receives of another is in the order of sending.
#[test]
fn m1_m3_g4_messages_over_and_beside_a_lane_arrive_once_and_in_order() {
    on_both_reactors(|reactor| {
        for seed in 0..4_u64 {
            let place = Place::new();
            let more = &["--wait=latency"][..];
            let ((a, mut from_a), (b, mut from_b)) = (start(&place, reactor, 0, more), start(&place, reactor, 1, more));
            wait_shared(&a);
            wait_shared(&b);
            let mut calls = Vec::new();
            for (process, tag) in [(0, 1), (1, 2), (0, 3), (1, 4)] {
                let notes = place.folder.join(format!("notes{tag}")).display().to_string();
                let odd = [0, 1, 5, 30][seed as usize] * u64::from(tag <= 2) + 50 * u64::from(tag > 2);
                let count = if tag <= 2 { 3000 } else { 3 * seed * seed };
                let [tag, count, odd, seed] = [tag, count, odd, seed * 10 + tag].map(|number: u64| number.to_string());
                let client = if process == 0 { &mut from_a } else { &mut from_b };
                let call =
                    client.submit("mix", args(&[NAMES[1 - process], &tag, "0", &count, &seed, &odd, &notes])).unwrap();
                calls.push((process, call));
            }
            if seed == 0 {
                wait_until("two who do nothing else have a lane", PATIENCE, || lanes(&a) > 0 && lanes(&b) > 0);
            }
            for (process, call) in calls {
                let client = if process == 0 { &mut from_a } else { &mut from_b };
                client.wait(call).unwrap_or_else(|error| panic!("seed {seed}: {error}; {:#?}", a.log.lock().unwrap()));
            }
            let mut notes = Notes::read(&place.folder, true);
            notes.drain(&mut from_a, "b");
            notes.drain(&mut from_b, "a");
            assert_eq!(notes.sent, notes.got, "seed {seed}");
        }
    });
}

/// G3, G8, W2: the same, and workers of both are killed in between: nothing is received twice, and what is missing is at most what the dead had in hand.
#[test]
fn g3_g8_w2_a_lane_outlives_no_worker_and_loses_nothing() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let more = &["--wait=latency"][..];
        let ((a, mut from_a), (b, mut from_b)) = (start(&place, reactor, 0, more), start(&place, reactor, 1, more));
        wait_shared(&a);
        wait_shared(&b);
        let mut dice = Dice(7);
        let mut kills = 0;
        for round in 0..30_u64 {
            let first = (round * 100_000).to_string();
            let path = |tag: u64| place.folder.join(format!("notes{tag}.{round}")).display().to_string();
            let seed = dice.below(1000).to_string();
            let order = |peer: &'static str, tag: u64| {
                let (tag, path) = (tag.to_string(), path(tag));
                args(&[peer, &tag, &first, "400", &seed, "2", &path])
            };
            let one = from_a.submit("mix", order("b", 1)).unwrap();
            let two = from_b.submit("mix", order("a", 2)).unwrap();
            std::thread::sleep(Duration::from_micros(500 + dice.below(15_000)));
            let node = if dice.below(2) == 0 { &a } else { &b };
            let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", node.pid())).unwrap();
            let children: Vec<i32> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
            for pid in &children {
                let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
                if maps.contains("praas-lane") {
                    let pid = rustix::process::Pid::from_raw(*pid).unwrap();
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    kills += 1;
                }
            }
            let _ = (from_a.wait(one), from_b.wait(two));
        }
        let mut notes = Notes::read(&place.folder, false);
        notes.drain(&mut from_a, "b");
        notes.drain(&mut from_b, "a");
        let twice: Vec<_> = notes.got.iter().filter(|(_, times)| **times > 1).collect();
        assert!(twice.is_empty(), "{twice:?}");
        let missing: BTreeSet<_> = notes.sent.keys().filter(|message| !notes.got.contains_key(*message)).collect();
        println!("{kills} kills, {} messages, {} missing", notes.sent.len(), missing.len());
        assert!(missing.len() <= kills, "{kills} kills, and {missing:?}");
        assert!(kills > 0, "somebody was killed in a conversation");
    });
}
