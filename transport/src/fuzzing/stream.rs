//! Frames from the sending half to the receiving half, and then with one change on their way.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, IoSlice, Write};

use super::{Cuts, End, INCARNATION, Input, KEY, Outcome, Reading, Seen, compare, mix, pattern};
use crate::Flush;
use crate::frame::{HEADER_BYTES, Header, KEY_BYTES_MAX, Limits, Seal};
use crate::outbound::{FRAMES_PER_WRITE_MAX, Outbound};
use crate::tcp::{Refusal, SendError};

const PIECE: usize = 256 << 10;
/// Payloads of the lengths where something changes.
const LONG_BYTES: [usize; 8] = [4096, 4097, 20_000, PIECE, PIECE + 1, PIECE + 77, 2 * PIECE, 600_000];
/// Longest payload that is received, so that some are refused.
const LIMIT: u64 = 2 * PIECE as u64;
const SENT_BYTES_MAX: usize = 1_000_000;
const FRAMES_MAX: u64 = 200;

/// What is sent, and which call's it is, so that it can be told when it comes back.
#[derive(Debug)]
struct Body {
    call: u64,
    bytes: &'static [u8],
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self.bytes
    }
}

/// A kernel that takes at most `budget` more bytes, in pieces.
struct Sink {
    bytes: Vec<u8>,
    budget: usize,
    cuts: Cuts,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let most = self.cuts.next().min(self.budget);
        if most == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut left = most;
        for slice in slices {
            let count = slice.len().min(left);
            self.bytes.extend_from_slice(&slice[..count]);
            left -= count;
        }
        self.budget -= most - left;
        Ok(most - left)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A sender, what was given to it, and what it gave back.
struct Sender {
    outbound: Outbound<Body>,
    frames_max: usize,
    bytes_max: u64,
    waiting: BTreeMap<u64, usize>,
    sent: Vec<Seen>,
    sent_bytes: usize,
    next_call: u64,
}

impl Sender {
    /// A frame that the input describes, written by the call itself if there is a `sink`.
    fn send(&mut self, input: &mut Input<'_>, sink: Option<&mut Sink>) {
        let key_bytes = input.size().min(1025);
        // Few are long: a long one costs most of an execution.
        let payload_bytes = match usize::from(input.byte()) {
            short @ ..248 => short * short / 16,
            long => LONG_BYTES[long - 248],
        };
        if self.next_call == FRAMES_MAX || self.sent_bytes + payload_bytes > SENT_BYTES_MAX {
            return;
        }
        let call = self.next_call;
        let random = mix(call);
        let from = usize::try_from(random % 1_000_000).expect("small");
        let (key, body) = (&pattern()[from..][..key_bytes], &pattern()[from + 1..][..payload_bytes]);
        let header = Header {
            kind: random.to_le_bytes()[0] & 3,
            flags: u16::from(input.byte()),
            function: u16::from(random.to_le_bytes()[1]),
            status: -i32::from(random.to_le_bytes()[2]),
            call,
            budget_ns: random,
            aux: !random,
            ..Header::default()
        };
        let idle = self.outbound.is_empty();
        let sink = sink.map(|sink| sink as &mut dyn Write);
        match self.outbound.send(sink, &header, key, Body { call, bytes: body }) {
            Ok(()) => {}
            Err(SendError::KeyTooLong(back)) => {
                assert!(back.call == call && key_bytes > KEY_BYTES_MAX as usize);
                return;
            }
            Err(SendError::Backlogged(back)) => {
                assert!(back.call == call && !(idle && self.waiting.is_empty()), "an idle sender takes any frame");
                return;
            }
            Err(other) => panic!("{other}"),
        }
        self.next_call += 1;
        self.sent_bytes += payload_bytes;
        assert!(self.waiting.insert(call, body.len()).is_none());
        let key_bytes = u32::try_from(key_bytes).expect("small");
        let payload_bytes = payload_bytes as u64;
        let header = Header { key_bytes, payload_bytes, incarnation: INCARNATION, ..header };
        let body = if payload_bytes > LIMIT { Err(Refusal::TooLarge) } else { Ok(body.to_vec()) };
        self.sent.push(Seen { header, key: key.to_vec(), body });
        let (frames, bytes) = self.outbound.backlog();
        assert!(
            frames <= self.frames_max && (frames <= 1 || bytes <= self.bytes_max),
            "{frames} frames, {bytes} bytes"
        );
    }

    /// What the kernel is done with, each once.
    fn settle(&mut self, step: impl FnOnce(&mut Outbound<Body>, &mut dyn FnMut(Body))) {
        let waiting = &mut self.waiting;
        step(&mut self.outbound, &mut |body| {
            assert_eq!(waiting.remove(&body.call), Some(body.bytes.len()), "a body comes back once, as it was");
        });
    }

    fn flush(&mut self, sink: &mut Sink) {
        sink.cuts.least = 1 + self.sent_bytes / 4096;
        self.settle(|outbound, done| {
            let flush = outbound.flush(sink, done).expect("the sink never fails");
            assert_eq!(flush == Flush::Done, outbound.is_empty());
            assert!(flush == Flush::Done || sink.budget == 0, "blocked by nothing");
        });
    }

    /// As io_uring's reactor writes: it is told what, and says later how much of it was taken.
    fn prepare(&mut self, sink: &mut Sink) {
        self.settle(|outbound, done| {
            while let Some(body) = outbound.take_sent() {
                done(body);
            }
            let mut slices = [IoSlice::new(&[]); 3 * FRAMES_PER_WRITE_MAX];
            let used = outbound.prepare(&mut slices);
            let count = sink.write_vectored(&slices[..used]).unwrap_or(0);
            if count > 0 {
                outbound.wrote(count, done);
            }
        });
    }

    fn withdraw(&mut self, kind: u8, call: u64) {
        let Some(body) = self.outbound.withdraw(kind, call) else { return };
        assert_eq!(body.call, call);
        assert_eq!(self.waiting.remove(&call), Some(body.bytes.len()));
        let before = self.sent.len();
        self.sent.retain(|seen| seen.header.call != call || seen.header.kind != kind);
        assert_eq!(self.sent.len(), before - 1, "what is withdrawn was sent once");
    }
}

/// Writes the frames an input describes, reads them in both ways, and once more with one change.
///
/// # Panics
/// When a frame is lost, doubled or changed, or when a change goes unnoticed although checksums stand against it.
pub fn stream(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.byte();
    let flag = |bit: u8| flags >> bit & 1 == 1;
    let (key, checksums) = (flag(0).then_some(KEY), flag(1));
    let reading = Reading {
        key,
        checksums,
        no_spare: false,
        scarce: false,
        blocks: flag(2),
        short_in_buffers: flag(3),
        unasked: flag(4),
        limits: Limits { payload_bytes_max: LIMIT },
        bytes_per_call_max: u64::MAX,
        reads_max: if flag(5) { 1 } else { u32::MAX },
        cuts: input.cuts(),
    };
    let (frames_max, bytes_max) = [(1000, 1 << 30), (8, 1 << 30), (1000, 5000), (3, 100)][usize::from(flags >> 6)];
    let change = [input.byte(), input.byte(), input.byte(), input.byte()];
    let seal = key.map_or_else(Seal::default, Seal::keyed);
    let mut sender = Sender {
        outbound: Outbound::new(frames_max, bytes_max, seal, checksums, INCARNATION),
        frames_max,
        bytes_max,
        waiting: BTreeMap::new(),
        sent: Vec::new(),
        sent_bytes: 0,
        next_call: 0,
    };
    let mut sink = Sink { bytes: Vec::new(), budget: 0, cuts: input.cuts() };
    while !input.is_empty() {
        let step = input.byte();
        match step & 7 {
            0..=2 => sender.send(&mut input, None),
            3 => sender.send(&mut input, Some(&mut sink)),
            4 | 5 => {
                sink.budget = input.size();
                sender.flush(&mut sink);
            }
            6 => {
                sink.budget = input.size();
                sender.prepare(&mut sink);
            }
            _ => sender.withdraw(step >> 3 & 3, u64::from(input.byte())),
        }
    }
    (sink.budget, sink.cuts.sizes) = (usize::MAX, Vec::new());
    sender.flush(&mut sink);
    assert!(sender.waiting.is_empty() && sender.outbound.backlog() == (0, 0), "all was written and given back");

    let wire = sink.bytes;
    let first = reading.by_feed(&wire);
    for found in reading.by_receive(&wire) {
        compare(&found, &first, "received and fed");
    }
    arrived(&sender.sent, &first);
    if checksums && key.is_some() {
        noticed(&wire, change, &reading, &first);
    }
}

/// All of it, once: short frames in their order, long ones when their last piece came.
fn arrived(sent: &[Seen], (seen, end): &Outcome) {
    assert_eq!(*end, End::Closed { mid_frame: false });
    let is_short = |seen: &&Seen| seen.header.payload_bytes <= PIECE as u64;
    for (found, expected) in seen.iter().filter(is_short).zip(sent.iter().filter(is_short)) {
        assert_eq!(found.header.call, expected.header.call, "short frames keep their order");
    }
    let mut sorted = seen.clone();
    sorted.sort_by_key(|seen| seen.header.call);
    compare(&(sorted, *end), &(sent.to_vec(), *end), "sent and received");
}

/// One change of the stream, which must end it; only what stands whole before it may come out.
fn noticed(wire: &[u8], [what, low, high, shift]: [u8; 4], reading: &Reading, (sent, _): &Outcome) {
    if wire.is_empty() {
        return;
    }
    // Reaches any place of the stream, and its short parts often.
    let place = usize::from(u16::from_le_bytes([low, high])) << (shift & 7);
    let at = place % wire.len();
    let until = (at + 1 + usize::from(what >> 3) * 3).min(wire.len());
    let mut changed = wire.to_vec();
    match what & 7 {
        0..=2 => changed[at] ^= 1 << (what >> 3 & 7),
        3 => changed.truncate(at),
        4 => drop(changed.drain(at..until)),
        5 => drop(changed.splice(at..at, wire[at..until].iter().copied())),
        6 => changed[at..until].reverse(),
        // A header again, whole: the one it is most like.
        _ => drop(changed.splice(at..at, wire[..HEADER_BYTES].iter().copied())),
    }
    if changed == wire {
        return;
    }
    let limits = Limits { payload_bytes_max: u64::MAX };
    let reading = Reading { limits, cuts: reading.cuts.clone(), ..*reading };
    let unchanged = reading.by_feed(wire).0;
    let prefix = wire.starts_with(&changed);
    let [one, other] = reading.by_receive(&changed);
    for (seen, end) in [one, other, reading.by_feed(&changed)] {
        assert!(seen.len() <= unchanged.len() && seen == unchanged[..seen.len()], "a changed frame came out");
        let whole = end == End::Closed { mid_frame: false };
        assert!(!whole || prefix && seen.len() < sent.len(), "a change at {at} went unnoticed");
        assert!(what & 7 > 2 || end == End::Broken, "a flipped bit at {at} went unnoticed");
    }
}
