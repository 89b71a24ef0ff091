//! What the fuzzers of `transport/fuzz` call, and the test that replays their corpus: any bytes in, a panic when a promise is broken.
//!
//! A guided fuzzer does not guess a checksum. So the bytes of an input say what to do, and what they say is sealed, or proved, before the
//! product sees it, as an enemy would do who knows the layout and (in `hello`) no key but its own. Each target has a model of what must
//! come out, written from the tables of the layout and sharing no code with what it judges, but for the two hash functions.

#![forbid(unsafe_code)]

mod frames;
mod hello;
mod stream;

#[cfg(test)]
mod tests;

use std::io::{self, IoSliceMut, Read};
use std::sync::OnceLock;

pub use frames::frames;
pub use hello::hello;
pub use stream::stream;

use crate::frame::{HEADER_BYTES, Header, Limits, STREAMS_MAX, Seal};
use crate::inbound::{Inbound, SPARE_BYTES, Scratch, Wants};
use crate::tcp::{Bodies, ConnectionError, Frame, Received, Refusal};

const KEY: [u8; 32] = [9; 32];
const INCARNATION: u64 = 5;
/// What stands for long contents, so that an input of a few bytes can have them. No two places of it look the same.
const PATTERN_BYTES: usize = 2 << 20;

fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let words = (0..PATTERN_BYTES as u64 / 8).map(|at| mix(at).to_le_bytes());
        words.flatten().collect()
    })
}

/// A step of splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// An input that is read from its beginning, and is zeros after its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// At most so many bytes.
    fn take(&mut self, bytes: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte for a size: exact up to 128, then in steps of an eighth, up to 15 MiB.
    fn size(&mut self) -> usize {
        match self.byte() {
            small @ 0..=127 => usize::from(small),
            large => (8 + usize::from(large & 7)) << (4 + usize::from((large - 128) >> 3)),
        }
    }

    /// How long the pieces are in which a stream moves, again from the first after the last.
    fn cuts(&mut self) -> Cuts {
        let count = usize::from(self.byte() % 8);
        Cuts { sizes: (0..count).map(|_| self.size().max(1)).collect(), next: 0, least: 1 }
    }
}

#[derive(Clone)]
struct Cuts {
    sizes: Vec<usize>,
    next: usize,
    least: usize,
}

impl Cuts {
    fn next(&mut self) -> usize {
        let size = self.sizes.get(self.next).copied().unwrap_or(usize::MAX);
        self.next = (self.next + 1) % self.sizes.len().max(1);
        size.max(self.least)
    }

    /// A megabyte byte by byte would show no more than its ends do, and take a second.
    fn for_stream(self, bytes: usize) -> Cuts {
        Cuts { least: 1 + bytes / 4096, ..self }
    }
}

/// A stream that gives its bytes in pieces and then ends. With `blocks`, every second read finds nothing or is interrupted.
struct Cut<'a> {
    bytes: &'a [u8],
    cuts: Cuts,
    blocks: bool,
    reads: u32,
}

impl Read for Cut<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(room)])
    }

    fn read_vectored(&mut self, rooms: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.reads = self.reads.wrapping_add(1);
        match self.reads % 4 {
            1 if self.blocks => return Err(io::ErrorKind::WouldBlock.into()),
            3 if self.blocks => return Err(io::ErrorKind::Interrupted.into()),
            _ => {}
        }
        let mut left = self.cuts.next();
        let mut read = 0;
        for room in rooms {
            let count = room.len().min(left).min(self.bytes.len());
            let (now, later) = self.bytes.split_at(count);
            room[..count].copy_from_slice(now);
            self.bytes = later;
            left -= count;
            read += count;
        }
        Ok(read)
    }
}

/// Memory that is counted, and has a limit, and sometimes none: of a spare body's length, or of every third length beyond it.
struct Loans {
    limits: Limits,
    no_spare: bool,
    scarce: bool,
    count: usize,
    bytes: usize,
    bytes_most: usize,
}

impl Loans {
    fn has(&self, bytes: u64) -> bool {
        let spare = SPARE_BYTES as u64;
        !(self.no_spare && bytes == spare || self.scarce && bytes > spare && bytes % 3 == 1)
    }

    /// It is no longer the connection's.
    fn account(&mut self, body: &[u8]) {
        self.count -= 1;
        self.bytes -= body.len();
    }
}

impl Bodies for Loans {
    type Body = Vec<u8>;

    fn loan(&mut self, bytes: usize) -> Option<Vec<u8>> {
        let within = bytes as u64 <= self.limits.payload_bytes_max || bytes == SPARE_BYTES;
        assert!(within, "{bytes} bytes asked for, the limit is {}", self.limits.payload_bytes_max);
        if !self.has(bytes as u64) {
            return None;
        }
        self.count += 1;
        self.bytes += bytes;
        self.bytes_most = self.bytes_most.max(self.bytes);
        Some(vec![0; bytes])
    }

    fn give_back(&mut self, body: Vec<u8>) {
        self.account(&body);
    }

    fn truncate(&mut self, mut body: Vec<u8>, bytes: usize) -> Vec<u8> {
        self.bytes -= body.len() - bytes;
        body.truncate(bytes);
        body
    }
}

/// A frame as it came out, or should.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Seen {
    header: Header,
    key: Vec<u8>,
    body: Result<Vec<u8>, Refusal>,
}

/// How a stream ended.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum End {
    /// All its bytes were good.
    Closed { mid_frame: bool },
    /// They were not.
    Broken,
}

type Outcome = (Vec<Seen>, End);

/// How a stream is read.
struct Reading {
    key: Option<[u8; 32]>,
    checksums: bool,
    limits: Limits,
    no_spare: bool,
    scarce: bool,
    blocks: bool,
    bytes_per_call_max: u64,
    reads_max: u32,
    /// Reads short bodies as io_uring does: from buffers.
    short_in_buffers: bool,
    /// Bytes come in buffers although the reader would like them in place: as when they were on their way already.
    unasked: bool,
    cuts: Cuts,
}

impl Reading {
    fn seal(&self) -> Seal {
        self.key.map_or_else(Seal::default, Seal::keyed)
    }

    fn inbound(&self) -> Inbound<Vec<u8>> {
        Inbound::new(self.limits, self.bytes_per_call_max, self.seal(), self.checksums, INCARNATION)
    }

    fn loans(&self) -> Loans {
        let Reading { limits, no_spare, scarce, .. } = *self;
        Loans { limits, no_spare, scarce, count: 0, bytes: 0, bytes_most: 0 }
    }

    /// As epoll's reactor does: two connections of one reader, in turns, with one scratch between them.
    fn by_receive(&self, wire: &[u8]) -> [Outcome; 2] {
        let (mut loans, mut scratch) = (self.loans(), Scratch::default());
        let mut outcomes = [None, None];
        let mut ends = [0, 1].map(|next| {
            let next = next.min(self.cuts.sizes.len().saturating_sub(1));
            let cuts = Cuts { next, ..self.cuts.clone() }.for_stream(wire.len());
            (self.inbound(), Cut { bytes: wire, cuts, blocks: self.blocks, reads: 0 }, Vec::new())
        });
        let mut calls = 0;
        while outcomes.iter().any(Option::is_none) {
            calls += 1;
            assert!(calls < 1000 + 16 * wire.len(), "a reader that gets nowhere");
            for ((inbound, stream, seen), outcome) in ends.iter_mut().zip(&mut outcomes) {
                if outcome.is_some() {
                    continue;
                }
                match inbound.receive_within(self.reads_max, stream, &mut scratch, &mut loans) {
                    Ok(None) => {}
                    Ok(Some(frame)) => seen.push(look(frame, &mut loans)),
                    Err(error) => {
                        let again = inbound.receive(stream, &mut scratch, &mut loans);
                        assert!(matches!(again, Err(ConnectionError::Closed { .. })), "an error is final");
                        let stats = inbound.stats;
                        let end = end(&error);
                        if end != End::Broken {
                            assert_eq!(stats.bytes, wire.len() as u64, "all was read");
                            assert_eq!(stats.frames, seen.len() as u64);
                        }
                        inbound.abandon(&mut loans);
                        *outcome = Some((std::mem::take(seen), end));
                    }
                }
            }
        }
        scratch.abandon(&mut loans);
        self.settle(&loans, 2);
        outcomes.map(|outcome| outcome.expect("the loop ends with both"))
    }

    /// As io_uring's reactor does: asked where bytes should go before they come.
    fn by_feed(&self, wire: &[u8]) -> Outcome {
        let (mut loans, mut inbound, mut cuts) =
            (self.loans(), self.inbound(), self.cuts.clone().for_stream(wire.len()));
        let (mut seen, mut left) = (Vec::new(), wire);
        let mut fed = || -> Result<(), ConnectionError> {
            while !left.is_empty() {
                let wants = match inbound.wants() {
                    Wants::Room if self.short_in_buffers && inbound.room().len() < 4096 => {
                        Wants::AtMost(inbound.room().len())
                    }
                    wants => wants,
                };
                let size = cuts.next().min(left.len());
                if wants == Wants::Room && !self.unasked {
                    let room = inbound.room();
                    let count = room.len().min(size);
                    assert!(count > 0, "no room is asked to be filled that is full");
                    room[..count].copy_from_slice(&left[..count]);
                    left = &left[count..];
                    seen.extend(inbound.filled(count, &mut loans)?.map(|frame| look(frame, &mut loans)));
                    continue;
                }
                let most = match wants {
                    Wants::AtMost(most) if !self.unasked => most.min(size),
                    _ => size,
                };
                assert!(most > 0, "nothing is waited for");
                let mut input = &left[..most];
                left = &left[most..];
                while !input.is_empty() {
                    seen.extend(inbound.feed(&mut input, &mut loans)?.map(|frame| look(frame, &mut loans)));
                }
            }
            Ok(())
        };
        let fed = fed();
        let end = fed.map_or_else(|error| end(&error), |()| End::Closed { mid_frame: inbound.mid_frame() });
        inbound.abandon(&mut loans);
        self.settle(&loans, 1);
        (seen, end)
    }

    /// One body under way, and one for each stream, of each connection; and the one loaned ahead.
    fn settle(&self, loans: &Loans, connections: usize) {
        assert_eq!((loans.count, loans.bytes), (0, 0), "every loan is given back");
        let bodies = connections as u64 * (1 + u64::from(STREAMS_MAX));
        let bound = bodies.saturating_mul(self.limits.payload_bytes_max).saturating_add(SPARE_BYTES as u64);
        assert!(loans.bytes_most as u64 <= bound, "{} bytes were on loan, at most {bound} may be", loans.bytes_most);
    }
}

fn look(frame: Frame<Vec<u8>>, loans: &mut Loans) -> Seen {
    let Frame { header, key, body } = frame;
    assert_eq!(key.len(), header.key_len());
    let body = match body {
        Received::Whole(body) => {
            loans.account(&body);
            Ok(body)
        }
        Received::Refused { bytes, why } => {
            assert_eq!(bytes, header.payload_bytes);
            Err(why)
        }
    };
    Seen { header, key: key.to_vec(), body }
}

fn end(error: &ConnectionError) -> End {
    match error {
        ConnectionError::Closed { mid_frame } => End::Closed { mid_frame: *mid_frame },
        ConnectionError::Frame(_) => End::Broken,
        ConnectionError::Io(error) => panic!("no stream here fails: {error}"),
    }
}

/// Fails with what differs, not with megabytes.
fn compare(found: &Outcome, expected: &Outcome, how: &str) {
    for (at, (found, expected)) in found.0.iter().zip(&expected.0).enumerate() {
        assert_eq!(found.header, expected.header, "frame {at}, {how}");
        assert_eq!(found.key, expected.key, "key of frame {at}, {how}");
        assert!(found.body == expected.body, "payload of frame {at}, {how}");
    }
    assert_eq!((found.0.len(), found.1), (expected.0.len(), expected.1), "frames and end, {how}");
}

/// The check of a header, by the words of [`Seal`].
fn check_of(head: &[u8], key: Option<[u8; 32]>, number: u64) -> u32 {
    let mut bytes = [0; HEADER_BYTES + 8];
    bytes[..8].copy_from_slice(&head[..8]);
    bytes[12..HEADER_BYTES].copy_from_slice(&head[12..HEADER_BYTES]);
    bytes[HEADER_BYTES..].copy_from_slice(&number.to_le_bytes());
    match key {
        None => crc32fast::hash(&bytes),
        Some(key) => u32_at(blake3::keyed_hash(&key, &bytes).as_bytes(), 0),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
