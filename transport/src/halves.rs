//! Both halves of a connection against each other, without a socket: what one writes the other reads, however it is cut.

#![forbid(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut, Read, Write};

use proptest::prelude::*;

use crate::Flush;
use crate::frame::{FrameError, HEADER_BYTES, Header, Limits, PIECE_BYTES, STREAMS_MAX, Seal};
use crate::inbound::{Inbound, Scratch, Wants};
use crate::outbound::Outbound;
use crate::tcp::{ConnectionError, Frame, HeapBodies, Received};

const PIECE: usize = 256 << 10;
const LIMITS: Limits = Limits { payload_bytes_max: 4 << 20 };
const KEY: [u8; 32] = [9; 32];

fn outbound(key: Option<[u8; 32]>, checksums: bool) -> Outbound<Vec<u8>> {
    Outbound::new(10_000, 1 << 30, key.map_or_else(Seal::default, Seal::keyed), checksums, 5)
}

fn inbound(key: Option<[u8; 32]>, checksums: bool) -> Inbound<Vec<u8>> {
    Inbound::new(LIMITS, u64::MAX, key.map_or_else(Seal::default, Seal::keyed), checksums, 5)
}

/// A wire that takes and gives at most so many bytes at a time.
#[derive(Default)]
struct Pipe {
    bytes: Vec<u8>,
    at: usize,
    most: usize,
    full_at: usize,
}

impl Pipe {
    fn new(most: usize) -> Pipe {
        Pipe { most, full_at: usize::MAX, ..Pipe::default() }
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut left = self.most.min(self.full_at.saturating_sub(self.bytes.len()));
        if left == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let before = self.bytes.len();
        for slice in slices {
            let count = slice.len().min(left);
            self.bytes.extend_from_slice(&slice[..count]);
            left -= count;
        }
        Ok(self.bytes.len() - before)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Pipe {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(room)])
    }

    fn read_vectored(&mut self, rooms: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut read = 0;
        for room in rooms {
            let count = room.len().min(self.bytes.len() - self.at).min(self.most - read);
            room[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
            self.at += count;
            read += count;
        }
        if read == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(read) }
    }
}

fn body(call: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| (call.wrapping_mul(31).wrapping_add(at / 7) % 251) as u8).collect()
}

fn queue(out: &mut Outbound<Vec<u8>>, call: u64, bytes: usize) {
    out.send(None, &Header { kind: 3, call, ..Header::default() }, b"", body(call, bytes)).expect("room");
}

fn flush(out: &mut Outbound<Vec<u8>>, pipe: &mut Pipe) {
    while out.flush(pipe, &mut drop).expect("a pipe") == Flush::Blocked {
        assert!(pipe.bytes.len() < pipe.full_at, "full");
    }
}

fn receive_all(inbound: &mut Inbound<Vec<u8>>, pipe: &mut Pipe) -> Result<Vec<Frame<Vec<u8>>>, ConnectionError> {
    let (mut frames, mut scratch) = (Vec::new(), Scratch::default());
    while let Some(frame) = inbound.receive(pipe, &mut scratch, &mut HeapBodies)? {
        frames.push(frame);
    }
    Ok(frames)
}

/// As a reader that is told where bytes may go before they come: in buffers of its own, or where the body lies.
fn feed_all(
    inbound: &mut Inbound<Vec<u8>>,
    wire: &[u8],
    buffer: usize,
) -> Result<Vec<Frame<Vec<u8>>>, ConnectionError> {
    let (mut frames, mut at) = (Vec::new(), 0);
    while at < wire.len() {
        let left = &wire[at..];
        let most = match inbound.wants() {
            Wants::Room => {
                let room = inbound.room();
                let count = room.len().min(left.len()).min(buffer * 3);
                room[..count].copy_from_slice(&left[..count]);
                at += count;
                frames.extend(inbound.filled(count, &mut HeapBodies)?);
                continue;
            }
            Wants::AtMost(most) => most.min(buffer),
            Wants::Any => buffer,
        };
        let mut input = &left[..most.min(left.len())];
        at += input.len();
        while !input.is_empty() {
            frames.extend(inbound.feed(&mut input, &mut HeapBodies)?);
        }
    }
    Ok(frames)
}

fn check(frames: Vec<Frame<Vec<u8>>>, lengths: &[usize]) {
    let mut seen = vec![false; lengths.len()];
    for Frame { header, body: received, .. } in frames {
        let call = usize::try_from(header.call).expect("small");
        assert!(!std::mem::replace(&mut seen[call], true), "frame {call} came twice");
        match received {
            Received::Whole(bytes) => assert!(bytes == body(header.call, lengths[call]), "frame {call} came changed"),
            Received::Refused { bytes, .. } => {
                assert!(bytes > LIMITS.payload_bytes_max && bytes == lengths[call] as u64);
            }
        }
    }
    assert!(seen.iter().all(|seen| *seen), "a frame is missing: {seen:?}");
}

#[test]
fn a_long_body_goes_in_pieces_and_short_frames_pass_between_them() {
    let (mut out, mut pipe) = (outbound(None, false), Pipe::new(100_000));
    queue(&mut out, 0, 12 * PIECE + 5);
    pipe.full_at = 3 * PIECE;
    assert_eq!(out.flush(&mut pipe, &mut drop).expect("a pipe"), Flush::Blocked);
    queue(&mut out, 1, 100);
    pipe.full_at = usize::MAX;
    flush(&mut out, &mut pipe);
    let frames = receive_all(&mut inbound(None, false), &mut pipe).expect("good frames");
    let order: Vec<u64> = frames.iter().map(|frame| frame.header.call).collect();
    assert_eq!(order, [1, 0], "the short frame was overtaken by nothing but what had begun");
    check(frames, &[12 * PIECE + 5, 100]);
}

/// The issue's: short frames are not starved by long ones, nor long ones by short ones.
#[test]
fn long_bodies_take_turns_and_are_not_starved() {
    let (mut out, mut pipe) = (outbound(None, false), Pipe::new(1 << 20));
    let longs = usize::from(STREAMS_MAX) + 4;
    let mut lengths = vec![PIECE * 3; longs];
    for call in 0..longs as u64 {
        queue(&mut out, call, 3 * PIECE);
    }
    for call in 0..500 {
        queue(&mut out, (longs + call) as u64, 10);
        lengths.push(10);
    }
    flush(&mut out, &mut pipe);
    let frames = receive_all(&mut inbound(None, false), &mut pipe).expect("good frames");
    let place = |call: u64| frames.iter().position(|frame| frame.header.call == call).expect("it came");
    assert!(place(longs as u64) == 0, "the first short one waits for no body");
    assert!(place(0) < place(longs as u64 + 499) || place(longs as u64 + 499) < frames.len() - 1);
    check(frames, &lengths);
}

/// Zero copies, by count: after the first long payload of a connection none is copied, whole or in pieces.
#[test]
fn after_the_first_long_payload_none_is_copied() {
    let (mut out, mut pipe) = (outbound(None, false), Pipe::new(1 << 20));
    let mut inward = inbound(None, false);
    for (round, bytes) in [1 << 20, 1 << 20, 100_000, 4 << 20, PIECE, PIECE + 1].into_iter().enumerate() {
        queue(&mut out, 0, bytes);
        flush(&mut out, &mut pipe);
        check(receive_all(&mut inward, &mut pipe).expect("good frames"), &[bytes]);
        let copied = inward.stats.copied_bytes;
        assert!(copied <= 4096, "{copied} bytes copied, round {round}");
    }
}

#[test]
fn n6_every_flipped_bit_of_a_stream_with_checksums_is_noticed() {
    let lengths = [300, 0, PIECE + 77, 40];
    let (mut out, mut pipe) = (outbound(Some(KEY), true), Pipe::new(1 << 20));
    for (call, bytes) in lengths.into_iter().enumerate() {
        queue(&mut out, call as u64, bytes);
    }
    flush(&mut out, &mut pipe);
    let wire = pipe.bytes;
    let mut state = 1_u64;
    // All bits of the short frames, and some of the long one.
    let short_bits = 0..(3 * HEADER_BYTES + 340) * 8;
    let bits = short_bits.step_by(3).chain((0..200).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 20).expect("64 bits") % (wire.len() * 8)
    }));
    for bit in bits {
        let mut pipe = Pipe { bytes: wire.clone(), ..Pipe::new(1 << 20) };
        pipe.bytes[bit / 8] ^= 1 << (bit % 8);
        let error = receive_all(&mut inbound(Some(KEY), true), &mut pipe).expect_err("a flipped bit");
        assert!(matches!(error, ConnectionError::Frame(_)), "bit {bit}: {error}");
    }
}

/// N6. A bit flipped in a key, the first seed of the fuzzer `stream` to do so, went unnoticed: the header's check covered the header, and the checksum
/// the payload alone, so that a call of `resize` could arrive as one of `resizd`. Nor was a payload checked that is refused.
#[test]
fn n6_a_flipped_bit_of_a_key_or_of_a_refused_payload_is_noticed() {
    for bytes in [0, 9, PIECE + 1, (4 << 20) + 1] {
        let (mut out, mut pipe) = (outbound(Some(KEY), true), Pipe::new(1 << 20));
        let header = Header { kind: 3, ..Header::default() };
        out.send(None, &header, b"resize", body(0, bytes)).expect("room");
        flush(&mut out, &mut pipe);
        let wire = pipe.bytes;
        let after_key = (bytes > 0).then_some(wire.len() - 1);
        for at in (HEADER_BYTES..HEADER_BYTES + 6).chain(after_key) {
            let mut pipe = Pipe { bytes: wire.clone(), ..Pipe::new(1 << 20) };
            pipe.bytes[at] ^= 1;
            let error = receive_all(&mut inbound(Some(KEY), true), &mut pipe).expect_err("a flipped bit");
            let noticed = matches!(error, ConnectionError::Frame(FrameError::PayloadCheck { .. }));
            assert!(noticed, "byte {at} of a payload of {bytes}: {error}");
        }
    }
}

/// A2, N10: frames of another incarnation, of another key, or without one.
#[test]
fn a2_n10_frames_of_somebody_else_are_refused() {
    let write = |mut out: Outbound<Vec<u8>>| {
        let mut pipe = Pipe::new(1 << 20);
        queue(&mut out, 0, 10);
        flush(&mut out, &mut pipe);
        pipe
    };
    let stale = Outbound::new(10, 1 << 20, Seal::keyed(KEY), true, 4);
    let error = receive_all(&mut inbound(Some(KEY), true), &mut write(stale)).expect_err("stale");
    assert!(matches!(error, ConnectionError::Frame(FrameError::Stale { found: 4, expected: 5 })), "{error}");
    for other in [None, Some([8; 32])] {
        let error = receive_all(&mut inbound(Some(KEY), true), &mut write(outbound(other, true)));
        assert!(matches!(error, Err(ConnectionError::Frame(FrameError::Check { .. }))));
    }
}

/// N5: what a stream in pieces may not do.
#[test]
fn n5_pieces_that_break_their_rules_close_the_connection() {
    use crate::frame::Transit;
    let head = |payload_bytes, stream, seal: &mut Seal| {
        let header = Header { payload_bytes, incarnation: 5, ..Header::default() };
        header.seal(Transit { stream, payload_crc32: 0 }, seal)
    };
    let long = 2 * PIECE_BYTES;
    let cases: [(&str, &[(u64, u16)]); 6] = [
        ("a piece of nothing", &[(PIECE_BYTES, 0x8001)]),
        ("opened twice", &[(long, 1), (long, 1)]),
        ("too short for pieces", &[(PIECE_BYTES, 1)]),
        ("a piece too long", &[(long, 1), (PIECE_BYTES + 1, 0x8001)]),
        ("a piece too short", &[(long, 1), (PIECE_BYTES - 1, 0x8001)]),
        ("an empty piece", &[(long, 1), (0, 0x8001)]),
    ];
    for (what, heads) in cases {
        let mut seal = Seal::default();
        let bytes = heads.iter().flat_map(|(bytes, stream)| head(*bytes, *stream, &mut seal)).collect();
        let error = receive_all(&mut inbound(None, false), &mut Pipe { bytes, ..Pipe::new(1 << 20) });
        assert!(matches!(error, Err(ConnectionError::Frame(FrameError::Stream { .. }))), "{what}: {error:?}");
    }
}

#[test]
fn a_frame_that_waits_can_be_withdrawn_and_one_that_has_begun_cannot() {
    let (mut out, mut pipe) = (outbound(None, false), Pipe::new(1 << 20));
    queue(&mut out, 0, 2 * PIECE);
    pipe.full_at = 100;
    assert_eq!(out.flush(&mut pipe, &mut drop).expect("a pipe"), Flush::Blocked);
    queue(&mut out, 1, 10);
    queue(&mut out, 2, 2 * PIECE);
    assert_eq!(out.withdraw(3, 0), None);
    assert_eq!(out.withdraw(4, 1), None, "of another kind");
    assert_eq!(out.withdraw(3, 1), Some(body(1, 10)));
    assert_eq!(out.withdraw(3, 2), Some(body(2, 2 * PIECE)));
    pipe.full_at = usize::MAX;
    flush(&mut out, &mut pipe);
    assert_eq!(out.backlog(), (0, 0));
    check(receive_all(&mut inbound(None, false), &mut pipe).expect("good frames"), &[2 * PIECE]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    /// R3, N3: any frames, through any wire, to both kinds of reader, with and without keys and checksums.
    #[test]
    fn r3_n3_what_one_half_writes_the_other_reads(
        lengths in prop::collection::vec(
            prop_oneof![4 => 0..300usize, 1 => 4000..4200usize, 1 => 0..100_000usize, 1 => PIECE - 1..4 * PIECE,
                        1 => (5 << 20)..(5 << 20) + 2usize], 1..12),
        most in prop_oneof![1000..5000usize, 5000..2_000_000usize],
        buffer in 1..20_000usize,
        secure in any::<bool>(),
    ) {
        let key = secure.then_some(KEY);
        let (mut out, mut pipe) = (outbound(key, secure), Pipe::new(most));
        for (call, bytes) in lengths.iter().enumerate() {
            queue(&mut out, call as u64, *bytes);
        }
        flush(&mut out, &mut pipe);
        check(receive_all(&mut inbound(key, secure), &mut pipe).expect("good frames"), &lengths);
        check(feed_all(&mut inbound(key, secure), &pipe.bytes, buffer.max(100)).expect("good frames"), &lengths);
    }
}
