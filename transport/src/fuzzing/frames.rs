//! Any bytes to the receiving half.

#![forbid(unsafe_code)]

use super::{End, INCARNATION, Input, KEY, Outcome, Reading, Seen, check_of, compare, pattern, u16_at, u32_at, u64_at};
use crate::frame::{HEADER_BYTES, Header, KEY_BYTES_MAX, Limits};
use crate::tcp::Refusal;

const LIMITS: [u64; 8] = [0, 1, 100, 4095, 4096, 5000, 300_000, 700_000];
/// Longest stream made from an input: four pieces and some.
const WIRE_BYTES_MAX: usize = 1_200_000;
/// Keys and payloads up to this long stand in the input, longer ones are the pattern's.
const INLINE_BYTES_MAX: usize = 48;
const PIECE_BYTES: u64 = 256 << 10;

/// Reads an input as a stream of frames, in both ways, and compares what comes out with the model.
///
/// # Panics
/// When they differ, when memory is asked for beyond the limits, or when some of it is not given back.
pub fn frames(input: &[u8]) {
    let mut input = Input(input);
    let [flags, ways] = [input.byte(), input.byte()];
    let flag = |bit: u8| flags >> bit & 1 == 1;
    let reading = Reading {
        key: flag(0).then_some(KEY),
        checksums: flag(1),
        no_spare: flag(2),
        scarce: flag(3),
        blocks: flag(4),
        short_in_buffers: flag(5),
        unasked: flag(6),
        limits: Limits { payload_bytes_max: LIMITS[usize::from(ways & 7)] },
        bytes_per_call_max: [u64::MAX, 1, 5000, 100_000][usize::from(ways >> 3 & 3)],
        reads_max: [u32::MAX, 1, 2, 7][usize::from(ways >> 5 & 3)],
        cuts: input.cuts(),
    };
    let flip = (ways >> 7 == 1).then(|| (usize::from(input.byte()) << 8 | usize::from(input.byte()), input.byte()));
    let mut wire = if flag(7) { input.0.to_vec() } else { sealed(input.0, &reading) };
    if let Some((at, bits)) = flip
        && let Some(byte) = wire.get_mut(at)
    {
        *byte ^= bits;
    }

    let expected = model(&wire, &reading);
    for found in reading.by_receive(&wire) {
        compare(&found, &expected, "received");
    }
    compare(&reading.by_feed(&wire), &expected, "fed");
}

/// A stream in which each header is right for its place, whatever it says; what it announces follows.
fn sealed(mut input: &[u8], reading: &Reading) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut number = 0;
    while let Some((head, rest)) = input.split_at_checked(HEADER_BYTES) {
        input = rest;
        let (start, stream) = (wire.len(), u16_at(head, 22));
        wire.extend_from_slice(head);
        let opens = stream != 0 && stream & 0x8000 == 0;
        let payload_bytes = if opens { 0 } else { u64_at(head, 24) };
        let mut after = |bytes: u64| -> bool {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            if bytes <= INLINE_BYTES_MAX {
                wire.extend_from_slice(Input(input).take(bytes));
                input = &input[bytes.min(input.len())..];
            } else if bytes <= WIRE_BYTES_MAX.saturating_sub(wire.len()) {
                wire.extend_from_slice(&pattern()[wire.len()..][..bytes]);
            } else {
                return false;
            }
            true
        };
        let whole = after(u64::from(u16_at(head, 20))) && after(payload_bytes);
        let crc32 = crc32fast::hash(&wire[start + HEADER_BYTES..]);
        let crc32 = if reading.checksums { crc32 } else { u32_at(head, 12) };
        wire[start + 12..][..4].copy_from_slice(&crc32.to_le_bytes());
        let check = check_of(&wire[start..], reading.key, number);
        wire[start + 8..][..4].copy_from_slice(&check.to_le_bytes());
        number += 1;
        if !whole {
            break;
        }
    }
    wire.extend_from_slice(input);
    wire
}

/// A payload that comes in pieces.
struct Open {
    number: u16,
    seen: Seen,
    filled: u64,
}

/// What a stream says: all of it in one slice, read once from its beginning.
fn model(wire: &[u8], reading: &Reading) -> Outcome {
    let (mut seen, mut open) = (Vec::new(), Vec::<Open>::new());
    let (mut at, mut number) = (0, 0);
    let end = loop {
        let Some(head) = wire.get(at..at + HEADER_BYTES) else {
            break End::Closed { mid_frame: at < wire.len() || !open.is_empty() };
        };
        let cut = End::Closed { mid_frame: true };
        let (key_bytes, stream, payload_bytes) = (u16_at(head, 20), u16_at(head, 22), u64_at(head, 24));
        let sound = head[..3] == *b"PR\x01" && u32_at(head, 8) == check_of(head, reading.key, number);
        let lengths = u32::from(key_bytes) <= KEY_BYTES_MAX && payload_bytes <= 1 << 40;
        let streams = stream <= 8 || (0x8001..=0x8008).contains(&stream);
        if !(sound && lengths && streams && u64_at(head, 56) == INCARNATION) {
            break End::Broken;
        }
        number += 1;
        at += HEADER_BYTES;
        let Some(key) = wire.get(at..at + usize::from(key_bytes)) else { break cut };
        at += key.len();
        let header = Header {
            kind: head[3],
            flags: u16_at(head, 4),
            function: u16_at(head, 6),
            status: u32_at(head, 16).cast_signed(),
            call: u64_at(head, 32),
            budget_ns: u64_at(head, 40),
            aux: u64_at(head, 48),
            incarnation: INCARNATION,
            key_bytes: u32::from(key_bytes),
            payload_bytes,
        };
        let refusal = if payload_bytes > reading.limits.payload_bytes_max {
            Some(Refusal::TooLarge)
        } else {
            (!reading.loans().has(payload_bytes)).then_some(Refusal::NoSpace)
        };
        let frame = Seen { header, key: key.to_vec(), body: refusal.map_or(Ok(Vec::new()), Err) };
        let good = |bytes: &[&[u8]]| {
            let mut crc32 = crc32fast::Hasher::new();
            bytes.iter().for_each(|bytes| crc32.update(bytes));
            !reading.checksums || crc32.finalize() == u32_at(head, 12)
        };
        if (1..=8).contains(&stream) {
            if !good(&[key]) {
                break End::Broken;
            }
            let twice = open.iter().any(|open| open.number == stream);
            if twice || payload_bytes <= PIECE_BYTES {
                break End::Broken;
            }
            seen.extend(frame.body.is_err().then(|| frame.clone()));
            open.push(Open { number: stream, seen: frame, filled: 0 });
            continue;
        }
        let place = open.iter().position(|open| open.number == stream & 0x7fff);
        if stream > 8 {
            let left = place.map(|place| open[place].seen.header.payload_bytes - open[place].filled);
            if key_bytes != 0 || left.is_none_or(|left| payload_bytes != left.min(PIECE_BYTES)) {
                break End::Broken;
            }
        }
        let until = usize::try_from(payload_bytes).ok().and_then(|bytes| at.checked_add(bytes));
        let Some(payload) = until.and_then(|until| wire.get(at..until)) else { break cut };
        at += payload.len();
        if !good(&[key, payload]) {
            break End::Broken;
        }
        match place.filter(|_| stream > 8) {
            None => {
                let mut frame = frame;
                if let Ok(body) = &mut frame.body {
                    body.extend_from_slice(payload);
                }
                seen.push(frame);
            }
            Some(place) => {
                let Open { seen: frame, filled, .. } = &mut open[place];
                *filled += payload_bytes;
                let whole = *filled == frame.header.payload_bytes;
                if let Ok(body) = &mut frame.body {
                    body.extend_from_slice(payload);
                }
                if whole {
                    let Open { seen: frame, .. } = open.remove(place);
                    seen.extend(frame.body.is_ok().then_some(frame));
                }
            }
        }
    };
    (seen, end)
}
