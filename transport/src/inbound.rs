//! The receiving half of a connection: bytes in, frames out, whatever the cuts between reads.
//!
//! Knows `Read`, not sockets, so that tests cut the stream where they like. Where the bytes land:
//!
//! | what arrives                              | reads                      | copied in user space            |
//! |-------------------------------------------|----------------------------|---------------------------------|
//! | one frame, payload <= [`SPARE_BYTES`]      | 1: head to the carry buffer, payload to the spare body | nothing |
//! | one frame, longer payload                 | 1 + as many as the kernel needs, straight into its body | <= [`SPARE_BYTES`] |
//! | many frames at once (the peer pipelines)  | 1 per [`CARRY_BYTES`]      | each payload once               |
//!
//! The spare body is loaned *ahead of* the read, which is how a small payload can be received in place before
//! anybody knows that it comes. The key's length is guessed to be the last one; a wrong guess costs one copy.

#![forbid(unsafe_code)]

use std::io::{self, IoSliceMut, Read};

use crate::frame::{HEADER_BYTES, Header, KEY_BYTES_MAX, Key, Limits};
use crate::tcp::{Bodies, ConnectionError, Frame, Received, Refusal};

/// Length of the body loaned ahead, bytes: the longest payload that is received in place by a single read.
pub(crate) const SPARE_BYTES: usize = 4096;
/// Length of the carry buffer, bytes: a head and its key, and what one read brought beyond the first frame.
pub(crate) const CARRY_BYTES: usize = 16 << 10;
const _: () = assert!(HEADER_BYTES + KEY_BYTES_MAX as usize + SPARE_BYTES <= CARRY_BYTES);

#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct InboundStats {
    pub(crate) bytes: u64,
    pub(crate) reads: u64,
    pub(crate) frames: u64,
    pub(crate) copied_bytes: u64,
    pub(crate) refused_frames: u64,
    pub(crate) discarded_bytes: u64,
}

#[derive(Debug)]
enum State<In> {
    /// The head of a frame is in the carry buffer, in part or not at all.
    Head,
    /// The payload goes to `body`; `filled` of its bytes are there.
    Body { header: Header, key: Key, body: In, filled: usize },
    /// The payload goes nowhere; `left` of its bytes are still to come.
    Discard { header: Header, key: Key, left: u64, why: Refusal },
}

enum Fill {
    Some,
    WouldBlock,
}

#[derive(Debug)]
pub(crate) struct Inbound<In> {
    limits: Limits,
    bytes_per_call_max: u64,
    state: State<In>,
    carry: Box<[u8]>,
    // Unread bytes of the carry buffer. Not empty outside `receive` only while `state` is `Head`,
    // or while whole frames wait in it.
    start: usize,
    end: usize,
    /// Bytes of head and key to read before the payload begins, as known or guessed.
    head_bytes: usize,
    spare: Option<In>,
    /// The peer pipelines: read into the carry buffer only.
    batch: bool,
    frames_since_read: u32,
    drained: bool,
    unfinished: bool,
    ended: bool,
    pub(crate) stats: InboundStats,
}

impl<In: AsRef<[u8]> + AsMut<[u8]>> Inbound<In> {
    pub(crate) fn new(limits: Limits, bytes_per_call_max: u64) -> Self {
        Inbound {
            limits,
            bytes_per_call_max,
            state: State::Head,
            carry: vec![0; CARRY_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            head_bytes: HEADER_BYTES,
            spare: None,
            batch: false,
            frames_since_read: 0,
            drained: false,
            unfinished: false,
            ended: false,
            stats: InboundStats::default(),
        }
    }

    /// The last read came back short: the kernel's buffer was empty a moment ago.
    pub(crate) fn drained(&self) -> bool {
        self.drained && self.start == self.end
    }

    /// The last `receive` stopped because it had done enough for one call.
    pub(crate) fn unfinished(&self) -> bool {
        self.unfinished
    }

    pub(crate) fn receive<B: Bodies<Body = In>>(
        &mut self,
        stream: &mut impl Read,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        self.receive_within(u32::MAX, stream, bodies)
    }

    /// The next frame, from what is here and at most so many reads.
    pub(crate) fn receive_within<B: Bodies<Body = In>>(
        &mut self,
        reads_max: u32,
        stream: &mut impl Read,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        if self.ended {
            return Err(ConnectionError::Closed { mid_frame: self.mid_frame() });
        }
        let result = self.receive_open(reads_max, stream, bodies);
        self.ended = result.is_err();
        result
    }

    fn receive_open<B: Bodies<Body = In>>(
        &mut self,
        reads_max: u32,
        stream: &mut impl Read,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        self.unfinished = false;
        let stop_bytes = self.stats.bytes.saturating_add(self.bytes_per_call_max);
        let mut reads = 0;
        loop {
            if let Some(frame) = self.advance(bodies)? {
                self.frames_since_read += 1;
                self.stats.frames += 1;
                return Ok(Some(frame));
            }
            if self.stats.bytes >= stop_bytes {
                self.unfinished = true;
                return Ok(None);
            }
            if reads == reads_max {
                return Ok(None);
            }
            reads += 1;
            match self.fill(stream, bodies)? {
                Fill::Some => {}
                Fill::WouldBlock => return Ok(None),
            }
        }
    }

    /// Gives back every body still held. Only for a connection that is about to be dropped.
    pub(crate) fn abandon<B: Bodies<Body = In>>(&mut self, bodies: &mut B) {
        self.ended = true;
        if let State::Body { body, .. } = std::mem::replace(&mut self.state, State::Head) {
            bodies.give_back(body);
        }
        if let Some(spare) = self.spare.take() {
            bodies.give_back(spare);
        }
    }

    pub(crate) fn mid_frame(&self) -> bool {
        self.start != self.end || !matches!(self.state, State::Head)
    }

    /// Consumes the carry buffer until a frame is whole or more bytes are needed.
    #[inline]
    fn advance<B: Bodies<Body = In>>(&mut self, bodies: &mut B) -> Result<Option<Frame<In>>, ConnectionError> {
        loop {
            let carried = self.end - self.start;
            match &mut self.state {
                State::Head => {
                    let Some(head) = self.carry[self.start..self.end].first_chunk::<HEADER_BYTES>() else {
                        return Ok(None);
                    };
                    let header = Header::decode(head, &self.limits)?;
                    self.head_bytes = HEADER_BYTES + header.key_len();
                    if carried < self.head_bytes {
                        return Ok(None);
                    }
                    let key = self.take_key(self.start);
                    self.start += self.head_bytes;
                    self.state = open(&self.limits, header, key, bodies);
                }
                State::Body { body, filled, .. } => {
                    let body = body.as_mut();
                    let count = carried.min(body.len() - *filled);
                    if count > 0 {
                        body[*filled..*filled + count].copy_from_slice(&self.carry[self.start..self.start + count]);
                        self.start += count;
                        *filled += count;
                        self.stats.copied_bytes += count as u64;
                    }
                    if *filled < body.len() {
                        return Ok(None);
                    }
                    let State::Body { header, key, body, .. } = std::mem::replace(&mut self.state, State::Head) else {
                        unreachable!("matched above");
                    };
                    return Ok(Some(Frame { header, key, body: Received::Whole(body) }));
                }
                State::Discard { left, .. } => {
                    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(carried);
                    self.start += count;
                    *left -= count as u64;
                    self.stats.discarded_bytes += count as u64;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.stats.refused_frames += 1;
                    let State::Discard { header, key, why, .. } = std::mem::replace(&mut self.state, State::Head)
                    else {
                        unreachable!("matched above");
                    };
                    let body = Received::Refused { bytes: header.payload_bytes, why };
                    return Ok(Some(Frame { header, key, body }));
                }
            }
        }
    }

    /// One read from the stream, to where the next bytes belong. The carry buffer holds at most a partial head.
    #[inline]
    fn fill<B: Bodies<Body = In>>(&mut self, stream: &mut impl Read, bodies: &mut B) -> Result<Fill, ConnectionError> {
        if self.start > 0 {
            self.carry.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.batch && self.frames_since_read < 2 {
            self.batch = false;
        }
        self.frames_since_read = 0;

        match &mut self.state {
            State::Body { body, filled, .. } => {
                let room = &mut body.as_mut()[*filled..];
                let room_bytes = room.len();
                match read(|| stream.read(room))? {
                    None => self.would_block(),
                    Some(count) => {
                        *filled += count;
                        self.account(count, room_bytes)
                    }
                }
            }
            State::Head if !self.batch => {
                if self.spare.is_none() {
                    self.spare = bodies.loan(SPARE_BYTES);
                }
                if self.spare.is_some() { self.fill_in_place(stream, bodies) } else { self.fill_carry(stream) }
            }
            State::Head | State::Discard { .. } => self.fill_carry(stream),
        }
    }

    fn fill_carry(&mut self, stream: &mut impl Read) -> Result<Fill, ConnectionError> {
        let room = &mut self.carry[self.end..];
        let room_bytes = room.len();
        match read(|| stream.read(room))? {
            None => self.would_block(),
            Some(count) => {
                self.end += count;
                self.account(count, room_bytes)
            }
        }
    }

    /// Reads head and key into the carry buffer and what follows into the spare body; when the payload begins
    /// exactly there and fits, the spare body becomes the payload.
    fn fill_in_place<B: Bodies<Body = In>>(
        &mut self,
        stream: &mut impl Read,
        bodies: &mut B,
    ) -> Result<Fill, ConnectionError> {
        let mut spare = self.spare.take().expect("the caller saw a spare body");
        // Exact once the header is here (`advance` saw it), else the last frame's, which is the guess.
        let head_room = self.head_bytes - self.end;
        let room_bytes = head_room + SPARE_BYTES;
        let outcome = {
            let spare = spare.as_mut();
            assert_eq!(spare.len(), SPARE_BYTES, "a loan is as long as it was asked for");
            let mut slices = [IoSliceMut::new(&mut self.carry[self.end..self.head_bytes]), IoSliceMut::new(spare)];
            read(|| stream.read_vectored(&mut slices))
        };
        let count = match outcome {
            Ok(Some(count)) => count,
            Ok(None) => {
                self.spare = Some(spare);
                return self.would_block();
            }
            Err(error) => {
                self.spare = Some(spare);
                return Err(error.into());
            }
        };
        if count <= head_room {
            self.spare = Some(spare);
            self.end += count;
            return self.account(count, room_bytes);
        }
        self.end = self.head_bytes;
        let in_spare = count - head_room;
        let head = self.carry.first_chunk::<HEADER_BYTES>().expect("the carry buffer is longer than a header");
        let header = match Header::decode(head, &self.limits) {
            Ok(header) => header,
            Err(error) => {
                self.spare = Some(spare);
                return Err(error.into());
            }
        };
        let head_is_exact = HEADER_BYTES + header.key_len() == self.head_bytes;
        let fits_limit = header.payload_bytes <= self.limits.payload_bytes_max;
        let payload_bytes = header.payload_len();
        if head_is_exact && fits_limit && (1..=SPARE_BYTES).contains(&payload_bytes) {
            let key = self.take_key(0);
            let filled = in_spare.min(payload_bytes);
            // The next frames' bytes leave before the loan is cut to this payload.
            let rest = &spare.as_ref()[filled..in_spare];
            self.carry[..rest.len()].copy_from_slice(rest);
            self.end = rest.len();
            self.stats.copied_bytes += rest.len() as u64;
            self.batch = !rest.is_empty();
            let body = bodies.truncate(spare, payload_bytes);
            self.state = State::Body { header, key, body, filled };
        } else if head_is_exact && header.payload_bytes > SPARE_BYTES as u64 {
            // All that was read is the beginning of this payload, which is longer than the spare body.
            let key = self.take_key(0);
            self.end = 0;
            self.state = open(&self.limits, header, key, bodies);
            match &mut self.state {
                State::Body { body, filled, .. } => {
                    body.as_mut()[..in_spare].copy_from_slice(&spare.as_ref()[..in_spare]);
                    *filled = in_spare;
                    self.stats.copied_bytes += in_spare as u64;
                }
                State::Discard { left, .. } => {
                    *left -= in_spare as u64;
                    self.stats.discarded_bytes += in_spare as u64;
                }
                State::Head => unreachable!("open never gives it"),
            }
            self.spare = Some(spare);
        } else {
            // The key was guessed wrong, or the payload is empty and these are the next frame's bytes.
            self.carry[self.end..self.end + in_spare].copy_from_slice(&spare.as_ref()[..in_spare]);
            self.end += in_spare;
            self.stats.copied_bytes += in_spare as u64;
            self.spare = Some(spare);
        }
        self.account(count, room_bytes)
    }

    fn take_key(&self, start: usize) -> Key {
        let bytes = &self.carry[start + HEADER_BYTES..start + self.head_bytes];
        Key::new(bytes).expect("decode refuses a key that is too long")
    }

    fn would_block(&mut self) -> Result<Fill, ConnectionError> {
        self.stats.reads += 1;
        self.drained = true;
        Ok(Fill::WouldBlock)
    }

    fn account(&mut self, count: usize, room_bytes: usize) -> Result<Fill, ConnectionError> {
        self.stats.reads += 1;
        self.stats.bytes += count as u64;
        self.drained = count < room_bytes;
        if count == 0 {
            return Err(ConnectionError::Closed { mid_frame: self.mid_frame() });
        }
        Ok(Fill::Some)
    }
}

/// Where a payload goes. The limit comes before the loan: a length that is refused allocates nothing.
fn open<B: Bodies>(limits: &Limits, header: Header, key: Key, bodies: &mut B) -> State<B::Body> {
    let discard = |key, why| State::Discard { header, key, left: header.payload_bytes, why };
    if header.payload_bytes > limits.payload_bytes_max {
        return discard(key, Refusal::TooLarge);
    }
    match bodies.loan(header.payload_len()) {
        None => discard(key, Refusal::NoSpace),
        Some(mut body) => {
            assert_eq!(body.as_mut().len(), header.payload_len(), "a loan is as long as it was asked for");
            State::Body { header, key, body, filled: 0 }
        }
    }
}

/// One read; `None` would block. An interrupted read is done again.
#[inline]
fn read(mut once: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match once() {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::FrameError;

    /// A stream cut where the test wants: each read brings bytes up to the next cut; with `blocks`, the first read
    /// at each cut would block.
    struct Cut<'a> {
        bytes: &'a [u8],
        at: usize,
        cuts: Vec<usize>,
        blocks: bool,
        blocked_at: Option<usize>,
        at_end: End,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum End {
        Blocks,
        Closes,
        Resets,
    }

    impl<'a> Cut<'a> {
        fn new(bytes: &'a [u8], cuts: &[usize], blocks: bool) -> Self {
            let mut cuts = cuts.to_vec();
            cuts.sort_unstable();
            Cut { bytes, at: 0, cuts, blocks, blocked_at: None, at_end: End::Blocks }
        }
    }

    impl Read for Cut<'_> {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            self.read_vectored(&mut [IoSliceMut::new(room)])
        }

        fn read_vectored(&mut self, rooms: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
            if self.at == self.bytes.len() {
                return match self.at_end {
                    End::Blocks => Err(io::ErrorKind::WouldBlock.into()),
                    End::Closes => Ok(0),
                    End::Resets => Err(io::ErrorKind::ConnectionReset.into()),
                };
            }
            if self.blocks && self.cuts.contains(&self.at) && self.blocked_at != Some(self.at) {
                self.blocked_at = Some(self.at);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let until = self.cuts.iter().copied().find(|&cut| cut > self.at).unwrap_or(self.bytes.len());
            let mut read = 0;
            for room in rooms {
                let count = room.len().min(until.min(self.bytes.len()) - self.at);
                room[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
                self.at += count;
                read += count;
            }
            Ok(read)
        }
    }

    /// Counts what is on loan; has no space for payloads of exactly `none_for` bytes.
    #[derive(Default)]
    struct Counted {
        on_loan: usize,
        longest: usize,
        none_for: Option<usize>,
        no_spare: bool,
    }

    impl Bodies for Counted {
        type Body = Vec<u8>;
        fn loan(&mut self, bytes: usize) -> Option<Vec<u8>> {
            if self.none_for == Some(bytes) || (self.no_spare && bytes == SPARE_BYTES) {
                return None;
            }
            self.on_loan += 1;
            self.longest = self.longest.max(bytes);
            Some(vec![0xEE; bytes])
        }
        fn give_back(&mut self, _: Vec<u8>) {
            self.on_loan -= 1;
        }
        fn truncate(&mut self, mut body: Vec<u8>, bytes: usize) -> Vec<u8> {
            body.truncate(bytes);
            body
        }
    }

    fn content(seed: u64, len: usize) -> Vec<u8> {
        (0..len as u64).map(|at| ((seed + at).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
    }

    type Sent = (Vec<u8>, Vec<u8>);

    fn frames(lengths: &[(usize, usize)]) -> (Vec<Sent>, Vec<u8>) {
        let mut stream = Vec::new();
        let mut sent = Vec::new();
        for (call, &(key_bytes, payload_bytes)) in lengths.iter().enumerate() {
            let (key, payload) = (content(call as u64, key_bytes), content(call as u64 + 99, payload_bytes));
            let header = Header {
                call: call as u64,
                key_bytes: u32::try_from(key_bytes).expect("a short key"),
                payload_bytes: payload_bytes as u64,
                ..Header::default()
            };
            stream.extend_from_slice(&header.encode());
            stream.extend_from_slice(&key);
            stream.extend_from_slice(&payload);
            sent.push((key, payload));
        }
        (sent, stream)
    }

    const LIMITS: Limits = Limits { payload_bytes_max: 100_000 };

    /// Receives until the stream blocks at its end; what was refused shows as its length and reason.
    fn receive_all(
        inbound: &mut Inbound<Vec<u8>>,
        stream: &mut Cut<'_>,
        bodies: &mut Counted,
    ) -> Result<Vec<Frame<Vec<u8>>>, ConnectionError> {
        let mut received = Vec::new();
        loop {
            match inbound.receive(stream, bodies)? {
                Some(frame) => received.push(frame),
                None if stream.at < stream.bytes.len() => {}
                None => return Ok(received),
            }
        }
    }

    fn check(lengths: &[(usize, usize)], cuts: &[usize], blocks: bool, mut bodies: Counted) {
        let (sent, bytes) = frames(lengths);
        let mut stream = Cut::new(&bytes, cuts, blocks);
        let mut inbound = Inbound::new(LIMITS, u64::MAX);
        let received = receive_all(&mut inbound, &mut stream, &mut bodies).expect("a good stream");
        assert_eq!(received.len(), sent.len(), "cuts {cuts:?}");
        let mut whole = 0;
        for (call, (frame, (key, payload))) in received.iter().zip(&sent).enumerate() {
            assert_eq!(frame.header.call, call as u64, "cuts {cuts:?}");
            assert_eq!(&*frame.key, &key[..], "cuts {cuts:?}");
            match &frame.body {
                Received::Whole(body) => {
                    whole += 1;
                    assert!(body == payload, "payload of frame {call}, cuts {cuts:?}");
                    assert!(payload.len() as u64 <= LIMITS.payload_bytes_max);
                }
                Received::Refused { bytes, why: Refusal::TooLarge } => {
                    assert_eq!(*bytes, payload.len() as u64);
                    assert!(*bytes > LIMITS.payload_bytes_max);
                }
                Received::Refused { bytes, why: Refusal::NoSpace } => {
                    assert_eq!(*bytes, payload.len() as u64);
                    assert!(bodies.none_for == Some(payload.len()) || bodies.no_spare);
                }
            }
        }
        assert!(bodies.longest as u64 <= LIMITS.payload_bytes_max, "nothing refused was allocated");
        assert!(!inbound.mid_frame());
        inbound.abandon(&mut bodies);
        assert_eq!(bodies.on_loan, whole, "every body is with the test or given back");
        assert_eq!(inbound.stats.bytes, bytes.len() as u64);
    }

    #[test]
    fn r3_n3_a_stream_of_three_frames_cut_at_every_byte() {
        let lengths = [(5, 100), (0, 0), (60, 200)];
        let total = frames(&lengths).1.len();
        for blocks in [false, true] {
            for cut in 0..=total {
                check(&lengths, &[cut], blocks, Counted::default());
            }
        }
        let every_byte: Vec<usize> = (0..total).collect();
        check(&lengths, &every_byte, true, Counted::default());
    }

    #[test]
    fn r3_n3_a_stream_of_three_frames_cut_at_every_two_bytes() {
        let lengths = [(3, 9), (0, 40), (0, 0)];
        let total = frames(&lengths).1.len();
        for first in 0..total {
            for second in first..=total {
                check(&lengths, &[first, second], true, Counted::default());
            }
        }
    }

    #[test]
    fn n3_a_long_frame_between_short_ones_cut_at_every_byte() {
        let lengths = [(0, 8), (7, SPARE_BYTES + 300), (0, SPARE_BYTES), (1024, 1)];
        let total = frames(&lengths).1.len();
        for cut in 0..=total {
            check(&lengths, &[cut], true, Counted::default());
        }
    }

    #[test]
    fn r3_thousands_of_frames_in_one_read() {
        let lengths: Vec<(usize, usize)> = (0..5000).map(|n| (n % 7, n % 50)).collect();
        check(&lengths, &[], false, Counted::default());
    }

    #[test]
    fn p2_a_refused_payload_leaves_the_stream_in_step() {
        let too_large = 100_001;
        for cuts in [&[][..], &[64], &[70], &[8000, 8001], &[100_060, 100_065, 100_070]] {
            let lengths = [(0, 8), (9, too_large), (2, 8), (0, too_large), (0, too_large), (0, 0)];
            check(&lengths, cuts, true, Counted::default());
            let no_space = || Counted { none_for: Some(50_000), ..Counted::default() };
            check(&[(0, 8), (9, 50_000), (2, 8), (0, 50_000), (0, 1)], cuts, true, no_space());
            let no_space = || Counted { none_for: Some(0), no_spare: true, ..Counted::default() };
            check(&[(0, 0), (3, 0), (0, 0), (2, 8)], cuts, false, no_space());
        }
    }

    #[test]
    fn a_small_frame_is_one_read_and_no_copy() {
        let mut bodies = Counted::default();
        let mut inbound = Inbound::new(LIMITS, u64::MAX);
        // The key's length is guessed to be the last one's; a wrong guess costs two copies of the payload.
        for (key_bytes, copied_bytes) in [(0, 0), (6, 206), (6, 0), (6, 0), (0, 194), (0, 0)] {
            let (_, bytes) = frames(&[(key_bytes, 100)]);
            let before = inbound.stats;
            let mut stream = Cut::new(&bytes, &[], false);
            let frame = inbound.receive(&mut stream, &mut bodies).expect("a good stream").expect("a frame");
            assert_eq!(frame.key.len(), key_bytes);
            assert!(inbound.drained() && !inbound.mid_frame());
            assert_eq!(inbound.stats.reads - before.reads, 1);
            assert_eq!(inbound.stats.copied_bytes - before.copied_bytes, copied_bytes, "key of {key_bytes}");
        }
    }

    #[test]
    fn a_long_frame_copies_no_more_than_the_spare_body() {
        let (_, bytes) = frames(&[(0, 90_000)]);
        let mut inbound = Inbound::new(LIMITS, u64::MAX);
        let mut stream = Cut::new(&bytes, &[], false);
        inbound.receive(&mut stream, &mut Counted::default()).expect("a good stream").expect("a frame");
        assert_eq!((inbound.stats.reads, inbound.stats.copied_bytes), (2, SPARE_BYTES as u64));
    }

    #[test]
    fn n5_garbage_closes_before_any_payload_is_loaned() {
        let good = frames(&[(0, 8)]).1;
        for at in [0, 2, 8, 12, 30, 50] {
            let mut bytes = good.clone();
            bytes[at] ^= 0x40;
            for cuts in [&[][..], &[1], &[63], &[64]] {
                let mut bodies = Counted::default();
                let mut inbound = Inbound::new(LIMITS, u64::MAX);
                let mut stream = Cut::new(&bytes, cuts, false);
                let error = receive_all(&mut inbound, &mut stream, &mut bodies).expect_err("garbage");
                assert!(matches!(error, ConnectionError::Frame(_)), "{error}");
                assert_eq!(bodies.longest, SPARE_BYTES, "only the body loaned ahead");
                // Final: what follows is not looked at, however good.
                let mut stream = Cut::new(&good, &[], false);
                let error = receive_all(&mut inbound, &mut stream, &mut bodies).expect_err("still closed");
                assert!(matches!(error, ConnectionError::Closed { .. }));
                inbound.abandon(&mut bodies);
                assert_eq!(bodies.on_loan, 0);
            }
        }
    }

    #[test]
    fn n5_a_length_over_the_ceiling_closes_and_one_under_it_is_refused_without_a_loan() {
        for (claimed, closes) in [(1u64 << 31, false), (1 << 40, false), ((1 << 40) + 1, true), (1 << 63, true)] {
            let header = Header { payload_bytes: claimed, ..Header::default() };
            let bytes = header.encode();
            let mut bodies = Counted::default();
            let mut inbound = Inbound::new(LIMITS, u64::MAX);
            let outcome = inbound.receive(&mut Cut::new(&bytes, &[], false), &mut bodies);
            assert_eq!(matches!(outcome, Err(ConnectionError::Frame(FrameError::PayloadTooLong { .. }))), closes);
            assert_eq!(bodies.longest, SPARE_BYTES);
        }
    }

    #[test]
    fn n4_the_end_at_every_byte_is_told_as_it_was() {
        let lengths = [(5, 100), (0, 5000), (0, 0)];
        let (_, bytes) = frames(&lengths);
        let ends: Vec<usize> = lengths
            .iter()
            .scan(0, |end, (key, payload)| {
                *end += HEADER_BYTES + key + payload;
                Some(*end)
            })
            .collect();
        for at_end in [End::Closes, End::Resets] {
            for length in 0..=bytes.len() {
                let mut bodies = Counted::default();
                let mut inbound = Inbound::new(LIMITS, u64::MAX);
                let mut stream = Cut::new(&bytes[..length], &[], false);
                stream.at_end = at_end;
                let mut whole = 0;
                let error = loop {
                    match inbound.receive(&mut stream, &mut bodies) {
                        Ok(frame) => whole += usize::from(frame.is_some()),
                        Err(error) => break error,
                    }
                };
                assert_eq!(whole, ends.iter().filter(|&&end| end <= length).count());
                let between = length == 0 || ends.contains(&length);
                match error {
                    ConnectionError::Closed { mid_frame } => assert_eq!(mid_frame, !between, "{length}"),
                    ConnectionError::Io(_) => assert!(at_end == End::Resets),
                    ConnectionError::Frame(error) => panic!("{error}"),
                }
                inbound.abandon(&mut bodies);
                assert_eq!(bodies.on_loan, whole);
            }
        }
    }

    #[test]
    fn one_call_reads_no_more_than_it_may() {
        let header = Header { payload_bytes: 1 << 30, ..Header::default() };
        let mut bytes = header.encode().to_vec();
        bytes.resize(1 << 20, 7);
        let mut inbound = Inbound::new(LIMITS, 100_000);
        let mut stream = Cut::new(&bytes, &[], false);
        let mut calls = 0;
        while stream.at < bytes.len() {
            let before = stream.at;
            assert!(inbound.receive(&mut stream, &mut Counted::default()).expect("a good stream").is_none());
            assert!(stream.at - before < 100_000 + CARRY_BYTES);
            assert!(inbound.unfinished() || stream.at == bytes.len());
            calls += 1;
        }
        assert!(calls >= 9, "{calls}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        /// R3, N3: any frames, any cuts, with and without blocking, with and without a spare body.
        #[test]
        fn r3_n3_any_frames_any_cuts(
            lengths in prop::collection::vec(
                (prop_oneof![Just(0), 0..70usize, Just(1024)],
                 prop_oneof![4 => 0..300usize, 1 => 4000..4200usize, 1 => 0..120_000usize]), 1..12),
            cuts in prop::collection::vec(0..100_000usize, 0..40),
            few in prop::collection::vec(0..1000usize, 0..40),
            blocks in any::<bool>(),
            no_spare in any::<bool>(),
        ) {
            let cuts: Vec<usize> = cuts.into_iter().chain(few).collect();
            check(&lengths, &cuts, blocks, Counted { no_spare, ..Counted::default() });
        }
    }
}
