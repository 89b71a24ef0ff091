//! A process that has the key and breaks the protocol of parcels, or tells others what it should not (faults N5, A8; G4, G8): its link is closed,
//! and everybody else is served.
#![allow(clippy::cast_possible_truncation, reason = "numbers of functions and codes are small")]

mod support;



use praas_dataplane::client::Outgoing;
use praas_dataplane::clock::unix_s;
use praas_dataplane::wire::{VERSIONS, frame};
use praas_dataplane::{Client, Credential, Role, Secret};
use praas_transport::Header;
use praas_transport::hello::{Initiator, InitiatorConfig, Purpose};
use support::nodes::{NAMES, Node, Place};
use support::raw::Raw;
use support::{PATIENCE, Reactor, on_both_reactors, wait_until};

const SMALL: [&str; 6] = [
    "--workers=2",
    "--workers-max=2",
    "--plaintext",
    "--arena-bytes=8388608",
    "--payload-bytes-max=1048576",
    "--mailbox-bytes-max=4194304",
];

/// A process that we play, with the right key.
struct False {
    raw: Raw,
    life: u64,
    /// The last parcel we sent.
    number: u64,
}

impl False {
    /// Connects as the process of this number, to `a`, and is up.
    fn join(place: &Place, node: &Node, who: usize, life: u64) -> False {
        let ups = node.said(&format!("peer={} state=up", NAMES[who]));
        let credential =
            Credential::mint(&Secret::new([1; 32]), Role::Process, NAMES[who], unix_s() + 60).expect("a name");
        let config = InitiatorConfig {
            versions: VERSIONS,
            purpose: Purpose::Peer,
            session_id: [9; 16],
            incarnation: life,
            payload_checksums: false,
            expect_process: Some("a".into()),
        };
        let mut raw = Raw::connect(place.address(0));
        raw.say_hello(Initiator::new(config, Some(&credential)).expect("random numbers")).expect("it has the key");
        let mut joined = False { raw, life, number: 0 };
        assert_eq!((joined.next().0.kind, joined.next().0.kind), (frame::WELCOME, frame::CONFIRM));
        wait_until("it is up", PATIENCE, || node.said(&format!("peer={} state=up", NAMES[who])) > ups);
        joined
    }

    /// Sends a frame as it is, but for our life and the lengths.
    fn send(&mut self, header: &Header, key: &[u8], payload: &[u8]) {
        let header = Header {
            incarnation: self.life,
            key_bytes: key.len() as u32,
            payload_bytes: payload.len() as u64,
            ..*header
        };
        // Who was sent away meanwhile finds that by reading.
        let header = self.raw.seal(&header);
        let _ = std::io::Write::write_all(&mut self.raw.0, &[&header[..], key, payload].concat());
    }

    /// Sends the next parcel, all before it confirmed.
    fn parcel(&mut self, header: &Header, key: &[u8], payload: &[u8]) {
        self.number += 1;
        let call = self.number;
        self.send(&Header { call, function: 0, ..*header }, key, payload);
    }

    /// The next frame that is no question, with its key in front of its payload.
    fn next(&mut self) -> (Header, Vec<u8>) {
        loop {
            let (header, mut bytes) = self.raw.receive();
            if header.kind != frame::PING {
                return (header, bytes);
            }
            bytes.clear();
            self.send(&Header { kind: frame::PONG, ..Header::default() }, &[], &[]);
        }
    }

    fn is_closed(&mut self) -> bool {
        self.raw.is_closed()
    }
}

fn start(place: &Place, reactor: Reactor, told: &[usize]) -> (Node, Client) {
    let told: Vec<_> = told.iter().map(|who| (NAMES[*who], place.address(*who))).collect();
    let node = place.start_with(reactor, 0, &told, &SMALL);
    node.wait_ready();
    (node, place.client(0))
}

fn ask(client: &mut Client, function: &str, arguments: &[&[u8]]) -> String {
    let reply = client.invoke(function, Outgoing::from_args(arguments));
    let reply = reply.unwrap_or_else(|error| panic!("{function}: {error}"));
    String::from_utf8_lossy(&reply).into_owned()
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
