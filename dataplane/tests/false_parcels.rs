//! A process that has the key and breaks the protocol of parcels, or tells others what it should not (faults N5, A8; G4, G8): its link is closed,
//! and everybody else is served.
#![allow(clippy::cast_possible_truncation, reason = "numbers of functions and codes are small")]

mod support;

use std::time::{Duration, Instant};

use praas_dataplane::client::Outgoing;
use praas_dataplane::wire::{Code, frame};
use praas_dataplane::{Client, ClientConfig};
use praas_transport::Header;
use support::false_peer::False;
use support::nodes::{NAMES, Node, Place};
use support::{PATIENCE, Reactor, ask, memory_kib, on_both_reactors, wait_until};

const SMALL: [&str; 7] = [
    // Those that share memory: see `near.rs`.
    "--near=false",
    "--workers=2",
    "--workers-max=2",
    "--plaintext",
    "--arena-bytes=8388608",
    "--payload-bytes-max=1048576",
    "--mailbox-bytes-max=4194304",
];

fn start(place: &Place, reactor: Reactor, told: &[usize]) -> (Node, Client) {
    let told: Vec<_> = told.iter().map(|who| (NAMES[*who], place.address(*who))).collect();
    let node = place.start_with(reactor, 0, &told, &SMALL);
    node.wait_ready();
    (node, place.client(0))
}

fn message() -> Header {
    Header { kind: frame::MESSAGE, ..Header::default() }
}

/// N5: a parcel that was none took the process with it (its number was never settled, and the next one's verdict was another's), or its memory.
#[test]
fn n5_g8_parcels_that_are_none_close_their_link_and_cost_nothing() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = start(&place, reactor, &[1, 2]);
        let mut other = False::join(&place, &node, 2, 5);
        let body = vec![7; 500_000];
        let at = |kind: u8, call: u64, function: u16| Header { kind, call, function, ..Header::default() };
        let bad: Vec<(&str, Header)> = vec![
            ("number 0", at(frame::MESSAGE, 0, 0)),
            ("number 2 first", at(frame::MESSAGE, 2, 0)),
            ("a number far away", at(frame::MESSAGE, u64::MAX, 0)),
            ("below zero", at(frame::CALL, 1, 2)),
            ("one before it that there is not", at(frame::CALL, 2, 1)),
            ("an answer with a code that there is not", Header { flags: 999, ..at(frame::ANSWER, 1, 0) }),
            ("a verdict on nothing", at(frame::VERDICT, 1, 0)),
            ("a verdict on the last number", at(frame::VERDICT, u64::MAX, 0)),
            ("a verdict that there is not", Header { flags: 999, ..at(frame::VERDICT, 1, 0) }),
        ];
        for round in 0..4 {
            for (name, header) in &bad {
                // Of the same life each time: what one link did to the numbers is there on the next.
                let mut evil = False::join(&place, &node, 1, 9);
                let downs = node.said("peer=b state=down");
                evil.send(header, b"k", &body);
                assert!(evil.is_closed(), "{name}");
                wait_until(name, PATIENCE, || node.said("peer=b state=down") == downs + 1);
                other.parcel(&message(), b"k", b"v");
                assert_eq!(other.next().0.kind, frame::VERDICT, "{name}, {round}");
                assert_eq!(ask(&mut client, "recv", &[b"c", b"k"]), "c k v", "{name}");
            }
        }
        // The numbers are where they were, and so is the memory.
        let mut good = False::join(&place, &node, 1, 9);
        good.parcel(&message(), b"k", &body);
        assert_eq!((good.next().0.kind, ask(&mut client, "recv", &[b"b", b"k"]).len()), (frame::VERDICT, 500_004));
        assert_eq!(client.invoke("echo", vec![1; 1 << 20]).expect("there is room").len(), 1 << 20);
    });
}

/// The next call that comes, with its number among calls; it gets a verdict.
fn take_call(peer: &mut False) -> u64 {
    let (call, _) = peer.next();
    assert_eq!(call.kind, frame::CALL);
    peer.send(&Header { kind: frame::VERDICT, call: call.call, ..Header::default() }, &[], &[]);
    call.aux
}

fn answer(call: u64) -> Header {
    Header { kind: frame::ANSWER, aux: call, ..Header::default() }
}

/// Calls are numbered for all processes together, and any of them could answer a call to any other.
#[test]
fn g4_an_answer_counts_from_the_process_that_was_called_only() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = start(&place, reactor, &[1, 2]);
        let (mut b, mut c) = (False::join(&place, &node, 1, 5), False::join(&place, &node, 2, 5));
        let waiting = client.submit("call_at", Outgoing::from_args(&[b"c", b"f", b"x"])).unwrap();
        let call = take_call(&mut c);
        for number in [call, call - 1, call + 1, 0, u64::MAX] {
            b.parcel(&answer(number), &[], b"false");
            assert_eq!(b.next().0.kind, frame::VERDICT);
            b.parcel(&Header { kind: frame::CALL_OFF, aux: number, ..Header::default() }, &[], &[]);
            assert_eq!(b.next().0.kind, frame::VERDICT);
        }
        c.parcel(&answer(call), &[], b"true");
        assert_eq!(&*client.wait(waiting).unwrap(), b"true");
        // A second answer is nobody's.
        c.parcel(&answer(call), &[], b"again");
        assert_eq!((c.next().0.kind, c.next().0.kind), (frame::VERDICT, frame::VERDICT));
    });
}

/// An answer to a call of an earlier life, sent when the next one was there, was taken for the answer to that one's call of the same number.
#[test]
fn g3_calls_of_two_lives_have_different_numbers() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let mut calls = Vec::new();
        for life in [5, 6] {
            let (node, mut client) = start(&place, reactor, &[1]);
            let mut b = False::join(&place, &node, 1, life);
            let waiting = client.submit("call_at", Outgoing::from_args(&[b"b", b"f", b"x"])).unwrap();
            let call = take_call(&mut b);
            for earlier in &calls {
                b.parcel(&answer(*earlier), &[], b"false");
            }
            b.parcel(&answer(call), &[], b"true");
            assert_eq!(&*client.wait(waiting).unwrap(), b"true");
            calls.push(call);
        }
    });
}

/// `invoke_at` said `PeerLost` only of calls that were on their way: one that was taken waited for its deadline.
#[test]
fn g1_a_call_ends_with_the_life_that_has_it() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = start(&place, reactor, &[1, 2]);
        let (mut b, mut c) = (False::join(&place, &node, 1, 5), False::join(&place, &node, 2, 5));
        let to_b = client.submit("call_at", Outgoing::from_args(&[b"b", b"f", b"x"])).unwrap();
        take_call(&mut b);
        let to_c = client.submit("call_at", Outgoing::from_args(&[b"c", b"f", b"x"])).unwrap();
        let call = take_call(&mut c);
        let begun = Instant::now();
        let mut again = False::join(&place, &node, 1, 6);
        let lost = client.wait(to_b).unwrap_err();
        assert!(lost.to_string().contains("was started anew"), "{lost}");
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        c.parcel(&answer(call), &[], b"true");
        assert_eq!(&*client.wait(to_c).unwrap(), b"true", "not its");
        assert!(again.next_is_silence(), "and not sent again");
    });
}

/// An answer that found no room was refused, and its call waited for its deadline.
#[test]
fn g1_an_answer_that_is_too_long_or_finds_no_room_ends_its_call() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = start(&place, reactor, &[1]);
        let mut b = False::join(&place, &node, 1, 5);
        let begun = Instant::now();
        let waiting = client.submit("call_at", Outgoing::from_args(&[b"b", b"f", b"x"])).unwrap();
        let call = take_call(&mut b);
        b.parcel(&answer(call), &[], &vec![1; (1 << 20) + 1]);
        let error = client.wait(waiting).unwrap_err();
        assert!(error.to_string().contains("its answer did not fit: it is more than this process takes"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let (verdict, _) = b.next();
        assert_eq!((verdict.kind, Code::from_wire(verdict.flags)), (frame::VERDICT, Some(Code::TooLarge)));
    });
}

/// A8, N9: as many parcels as may be under way, of every kind, with the largest numbers and the same ones, and none of the answers read.
#[test]
fn a8_n9_a_process_that_floods_and_never_reads_stops_nobody() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = start(&place, reactor, &[1, 2]);
        let (mut b, mut c) = (False::join(&place, &node, 1, 5), False::join(&place, &node, 2, 5));
        let before_kib = memory_kib(node.pid());
        let call = |aux: u64| Header { kind: frame::CALL, aux, budget_ns: 5_000_000_000, ..Header::default() };
        let flood = std::thread::spawn(move || {
            let body = vec![7; 1000];
            for round in 0..16_000_u64 {
                match round % 8 {
                    0 | 1 => b.parcel(&message(), b"flood", &body),
                    2 => b.parcel(&message(), b"", &body),
                    3 => b.parcel(&call(u64::MAX - round % 3), b"echo", &body),
                    4 => b.parcel(&call(round % 3), b"nothing", &body),
                    5 => b.parcel(&call(1 << 62), &[b'f'; 1024], &body),
                    6 => b.parcel(&Header { kind: frame::CALL_OFF, aux: u64::MAX, ..Header::default() }, b"k", &body),
                    _ => b.parcel(&answer(round), b"k", &body),
                }
            }
            b
        });
        let (mut most_kib, mut longest, mut round) = (0, Duration::ZERO, 0);
        let flooded = loop {
            let begun = Instant::now();
            c.parcel(&call(round), b"echo", &round.to_le_bytes());
            let (mut answered, mut settled) = (false, false);
            while !(answered && settled) {
                let (header, body) = c.next();
                settled |= header.kind == frame::VERDICT;
                if header.kind == frame::ANSWER {
                    assert_eq!((header.aux, &*body), (round, &round.to_le_bytes()[..]));
                    let verdict = Header { kind: frame::VERDICT, call: header.call, ..Header::default() };
                    c.send(&verdict, &[], &[]);
                    answered = true;
                }
            }
            assert_eq!(&*client.invoke("echo", b"here").unwrap(), b"here");
            longest = longest.max(begun.elapsed());
            most_kib = most_kib.max(memory_kib(node.pid()));
            round += 1;
            if flood.is_finished() && round > 100 {
                break flood.join().unwrap();
            }
        };
        println!("{round} calls beside it, {longest:?} at most, {before_kib} to {most_kib} KiB");
        // Mailbox and payload memory are 12 MiB, and a few hundred bytes go with each of 16 000.
        assert!(most_kib < before_kib + 40_000, "{before_kib} to {most_kib} KiB");
        assert!(longest < Duration::from_secs(2), "{longest:?}");
        assert_eq!((node.said("peer=b state=down"), node.said("peer=c state=down")), (0, 0));
        // One more than may be under way.
        let mut b = flooded;
        for _ in 0..400 {
            b.parcel(&message(), b"flood", b"more");
        }
        wait_until("its link is closed", PATIENCE, || node.said("peer=b state=down") == 1);
        assert_eq!(node.said("may be on their way"), 1, "and that is said once");
    });
}

/// What was sent and given up stayed in its sender's memory until the process it was for came back, which may be never.
#[test]
fn g8_what_was_given_up_takes_no_memory_while_its_process_is_away() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = start(&place, reactor, &[1]);
        let config = ClientConfig { deadline: Duration::from_millis(150), ..ClientConfig::default() };
        let mut impatient = Client::connect(place.address(0), &config).unwrap();
        // Five times what may wait for a process.
        for round in 0..20 {
            let b = False::join(&place, &node, 1, 5);
            let gone = impatient.invoke("send_loan", Outgoing::from_args(&[b"b", b"k", b"1000000", b"1"])).unwrap_err();
            assert!(gone.to_string().contains("timeout"), "round {round}: {gone}");
            drop(b);
            wait_until("it is away", PATIENCE, || node.said("peer=b state=down") == round + 1);
        }
        // The numbers come, and nothing with them.
        let mut b = False::join(&place, &node, 1, 5);
        let sending = client.submit("send", Outgoing::from_args(&[b"b", b"k", b"new"])).unwrap();
        let mut kinds = Vec::new();
        while kinds.last() != Some(&frame::MESSAGE) {
            let (parcel, _) = b.next();
            b.send(&Header { kind: frame::VERDICT, call: parcel.call, ..Header::default() }, &[], &[]);
            kinds.push(parcel.kind);
        }
        client.wait(sending).unwrap();
        assert_eq!(kinds, [&[frame::CALL_OFF; 20][..], &[frame::MESSAGE]].concat());
    });
}

/// W2: what a worker that died had called went on for nobody, and what it had sent kept all of its memory.
#[test]
fn w2_a_worker_that_dies_calls_off_what_it_called_and_what_it_sent_arrives() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = start(&place, reactor, &[1]);
        let mut b = False::join(&place, &node, 1, 5);
        let calling = client.submit("call_at", Outgoing::from_args(&[b"b", b"f", b"x"])).unwrap();
        let call = take_call(&mut b);
        let sending = client.submit("send_loan", Outgoing::from_args(&[b"b", b"k", b"100000", b"7"])).unwrap();
        let (sent, body) = b.next();
        assert_eq!((sent.kind, body), (frame::MESSAGE, vec![7; 100_000]));
        support::children(node.pid()).into_iter().for_each(|pid| support::signal(pid, 9));
        for lost in [calling, sending] {
            client.wait(lost).unwrap_err();
        }
        let (off, _) = b.next();
        assert_eq!((off.kind, off.aux), (frame::CALL_OFF, call));
        // On the next link, from the lowest number without a verdict.
        drop(b);
        wait_until("it is away", PATIENCE, || node.said("peer=b state=down") == 1);
        let mut b = False::join(&place, &node, 1, 5);
        let (sent, body) = b.next();
        assert_eq!((sent.kind, body), (frame::MESSAGE, vec![7; 100_000]));
        assert_eq!(b.next().0.kind, frame::CALL_OFF);
    });
}
