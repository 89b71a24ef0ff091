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
        if self.ended {
            return Err(ConnectionError::Closed { mid_frame: self.mid_frame() });
        }
        let result = self.receive_open(stream, bodies);
        self.ended = result.is_err();
        result
    }

    fn receive_open<B: Bodies<Body = In>>(
        &mut self,
        stream: &mut impl Read,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        self.unfinished = false;
        let stop_bytes = self.stats.bytes.saturating_add(self.bytes_per_call_max);
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
