//! A process that we play: it has the key, and says what the test likes.
#![allow(clippy::cast_possible_truncation, reason = "keys are short, and so is what is under way")]

use std::time::Duration;

use praas_dataplane::clock::unix_s;
use praas_dataplane::wire::{VERSIONS, frame};
use praas_dataplane::{Credential, Role, Secret};
use praas_transport::Header;
use praas_transport::hello::{Initiator, InitiatorConfig, Purpose};

use super::nodes::{NAMES, Node, Place};
use super::raw::Raw;
use super::{PATIENCE, wait_until};

/// A process that we play, with the right key.
pub(crate) struct False {
    pub(crate) raw: Raw,
    pub(crate) life: u64,
    /// The last parcel we sent.
    pub(crate) number: u64,
    /// The lowest without a verdict.
    pub(crate) confirmed: u64,
}

impl False {
    /// Connects as the process of this number, to `a`, and is up.
    pub(crate) fn join(place: &Place, node: &Node, who: usize, life: u64) -> False {
        False::join_at(place, node, 0, who, life)
    }

    /// The same, to the process of number `at`.
    pub(crate) fn join_at(place: &Place, node: &Node, at: usize, who: usize, life: u64) -> False {
        let ups = node.said(&format!("peer={} state=up", NAMES[who]));
        let credential =
            Credential::mint(&Secret::new([1; 32]), Role::Process, NAMES[who], unix_s() + 60).expect("a name");
        let config = InitiatorConfig {
            versions: VERSIONS,
            purpose: Purpose::Peer,
            session_id: [9; 16],
            incarnation: life,
            payload_checksums: false,
            expect_process: Some(NAMES[at].into()),
        };
        let mut raw = Raw::connect(place.address(at));
        raw.say_hello(Initiator::new(config, Some(&credential)).expect("random numbers")).expect("it has the key");
        let mut joined = False { raw, life, number: 0, confirmed: 1 };
        assert_eq!(joined.next().0.kind, frame::WELCOME);
        if who < at {
            joined.send(&Header { kind: frame::CONFIRM, ..Header::default() }, &[], &[]);
        } else {
            assert_eq!(joined.next().0.kind, frame::CONFIRM);
        }
        wait_until("it is up", PATIENCE, || node.said(&format!("peer={} state=up", NAMES[who])) > ups);
        joined
    }

    /// Sends a frame as it is, but for our life and the lengths.
    pub(crate) fn send(&mut self, header: &Header, key: &[u8], payload: &[u8]) {
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

    /// Sends the next parcel.
    pub(crate) fn parcel(&mut self, header: &Header, key: &[u8], payload: &[u8]) {
        self.number += 1;
        let (call, behind) = (self.number, (self.number - self.confirmed) as u16);
        self.send(&Header { call, function: behind, ..*header }, key, payload);
    }

    /// The next frame that is no question, without its key.
    pub(crate) fn next(&mut self) -> (Header, Vec<u8>) {
        let (header, _, payload) = self.next_with_key();
        (header, payload)
    }

    /// The next frame that is no question: header, key, payload.
    pub(crate) fn next_with_key(&mut self) -> (Header, Vec<u8>, Vec<u8>) {
        loop {
            let (header, key, payload) = self.raw.receive_with_key();
            match header.kind {
                frame::PING => self.send(&Header { kind: frame::PONG, ..Header::default() }, &[], &[]),
                frame::VERDICT => {
                    self.confirmed = header.call + 1;
                    return (header, key, payload);
                }
                _ => return (header, key, payload),
            }
        }
    }

    /// Whether nothing comes for a moment but questions.
    pub(crate) fn next_is_silence(&mut self) -> bool {
        self.raw.0.set_nonblocking(true).expect("a socket");
        std::thread::sleep(Duration::from_millis(20));
        let came = self.raw.0.peek(&mut [0; 64]);
        self.raw.0.set_nonblocking(false).expect("a socket");
        came.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    pub(crate) fn is_closed(&mut self) -> bool {
        self.raw.is_closed()
    }
}
