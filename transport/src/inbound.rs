//! The receiving half of a connection: bytes in, frames out, whatever the cuts between reads.
//!
//! Knows `Read`, not sockets, so that tests cut the stream where they like. Where the bytes land:
//!
//! | what arrives                              | reads                      | copied in user space            |
//! |-------------------------------------------|----------------------------|---------------------------------|
//! | one frame, payload <= [`SPARE_BYTES`]      | 1: head to the carry buffer, payload to the spare body | nothing |
//! | a longer payload after a short one        | 1 + as many as the kernel needs, straight into its body | <= [`SPARE_BYTES`] |
//! | a longer payload after another, the first piece | 1 for the head, then straight into its body | nothing |
//! | a piece after a piece                     | its head with the end of the one before, then straight into its body | nothing |
//! | many frames at once (the peer pipelines)  | 1 per [`CARRY_BYTES`]      | each payload once               |
//!
//! The spare body is loaned *ahead of* the read, which is how a small payload can be received in place before
//! anybody knows that it comes. The key's length is guessed to be the last one; a wrong guess costs one copy. After a long
//! payload another is expected: then only the head is read, so that nothing of its body lands elsewhere.
//!
//! A connection with nothing under way holds no buffer: both belong to the reader's [`Scratch`], one for all its connections.

#![forbid(unsafe_code)]

use std::io::{self, IoSliceMut, Read};

use crate::frame::{
    FrameError, HEADER_BYTES, Header, KEY_BYTES_MAX, Key, Limits, PIECE_BYTES, Seal, Transit, crc32_of,
};
use crate::tcp::{Bodies, ConnectionError, Frame, Received, Refusal};

/// Length of the body loaned ahead, bytes: the longest payload that is received in place by a single read.
pub(crate) const SPARE_BYTES: usize = 4096;
/// Length of the carry buffer, bytes: a head and its key, and what one read brought beyond the first frame.
pub(crate) const CARRY_BYTES: usize = 16 << 10;
const _: () = assert!(HEADER_BYTES + KEY_BYTES_MAX as usize + SPARE_BYTES <= CARRY_BYTES);

/// Memory that a reader of connections needs while it reads, and no connection keeps.
#[derive(Debug)]
pub struct Scratch<In> {
    carry: Option<Box<[u8]>>,
    spare: Option<In>,
}

impl<In> Default for Scratch<In> {
    fn default() -> Self {
        Scratch { carry: None, spare: None }
    }
}

impl<In> Scratch<In> {
    fn carry(&mut self) -> Box<[u8]> {
        self.carry.take().unwrap_or_else(|| vec![0; CARRY_BYTES].into_boxed_slice())
    }

    /// Gives back the body loaned ahead. To be called before the owner of bodies goes.
    pub fn abandon<B: Bodies<Body = In>>(&mut self, bodies: &mut B) {
        if let Some(spare) = self.spare.take() {
            bodies.give_back(spare);
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct InboundStats {
    pub(crate) bytes: u64,
    pub(crate) piece_bytes: u64,
    pub(crate) reads: u64,
    pub(crate) frames: u64,
    pub(crate) copied_bytes: u64,
    pub(crate) refused_frames: u64,
    pub(crate) discarded_bytes: u64,
}

#[derive(Debug)]
enum State<In> {
    /// A head is next, or the rest of one.
    Head,
    /// The payload goes to `body`; `filled` of its bytes are there.
    Body { header: Header, key: Key, body: In, filled: usize, payload_crc32: u32 },
    /// A piece goes to the body of a stream, up to byte `until` of it.
    Piece { at: usize, from: usize, until: usize, payload_crc32: u32 },
    /// Bytes go nowhere; `left` of them are still to come. Then a frame is told of, unless it was before.
    Discard { left: u64, crc32: crc32fast::Hasher, payload_crc32: u32, refused: Option<(Header, Key, Refusal)> },
}

/// A payload that comes in pieces.
#[derive(Debug)]
struct Stream<In> {
    number: u16,
    header: Header,
    key: Key,
    /// None: refused, and its owner was told.
    body: Option<In>,
    filled: u64,
}

/// What was read and not looked at yet.
#[derive(Debug)]
struct Carry {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

enum Fill<In> {
    Frame(Frame<In>),
    Some,
    WouldBlock,
}

/// Where the next bytes of the stream should go, for a reader that cannot wait to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wants {
    /// Anywhere: then to [`Inbound::feed`].
    Any,
    /// Anywhere, but not more than this.
    AtMost(usize),
    /// To [`Inbound::room`].
    Room,
}

#[derive(Debug)]
pub(crate) struct Inbound<In> {
    limits: Limits,
    seal: Seal,
    payload_checksums: bool,
    peer_incarnation: u64,
    bytes_per_call_max: u64,
    state: State<In>,
    /// A header whose key is not whole yet.
    head: Option<(Header, Transit)>,
    /// The beginning of what is next: of a header, or of the key after it.
    partial: Vec<u8>,
    streams: Vec<Stream<In>>,
    /// Frames that came with the last one.
    carry: Option<Carry>,
    /// Bytes of the last key: the guess for the next.
    key_guess: usize,
    /// The last payload did not fit the spare body, so that the next one is expected not to.
    long: bool,
    /// Nothing beyond the frame under way is read.
    frugal: bool,
    /// The peer pipelines: read into the carry buffer only.
    batch: bool,
    frames_since_read: u32,
    drained: bool,
    unfinished: bool,
    ended: bool,
    pub(crate) stats: InboundStats,
}

impl<In: AsRef<[u8]> + AsMut<[u8]>> Inbound<In> {
    pub(crate) fn new(
        limits: Limits,
        bytes_per_call_max: u64,
        seal: Seal,
        payload_checksums: bool,
        peer_incarnation: u64,
    ) -> Self {
        Inbound {
            limits,
            seal,
            payload_checksums,
            peer_incarnation,
            bytes_per_call_max,
            state: State::Head,
            head: None,
            partial: Vec::new(),
            streams: Vec::new(),
            carry: None,
            key_guess: 0,
            long: false,
            frugal: false,
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
        self.drained && self.carry.is_none()
    }

    /// Something was read that nobody has looked at.
    #[inline]
    pub(crate) fn carries(&self) -> bool {
        self.carry.is_some()
    }

    /// The last `receive` stopped because it had done enough for one call.
    pub(crate) fn unfinished(&self) -> bool {
        self.unfinished
    }

    pub(crate) fn receive<B: Bodies<Body = In>>(
        &mut self,
        stream: &mut impl Read,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        self.receive_within(u32::MAX, stream, scratch, bodies)
    }

    /// The next frame, from what is here and at most so many reads.
    pub(crate) fn receive_within<B: Bodies<Body = In>>(
        &mut self,
        reads_max: u32,
        stream: &mut impl Read,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        if self.ended {
            return Err(ConnectionError::Closed { mid_frame: self.mid_frame() });
        }
        let result = self.receive_open(reads_max, stream, scratch, bodies);
        self.ended = result.is_err();
        result
    }

    fn receive_open<B: Bodies<Body = In>>(
        &mut self,
        reads_max: u32,
        stream: &mut impl Read,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        self.unfinished = false;
        if let Some(frame) = self.take_carried(scratch, bodies)? {
            return Ok(Some(frame));
        }
        let stop_bytes = self.stats.bytes.saturating_add(self.bytes_per_call_max);
        let mut reads = 0;
        loop {
            if self.stats.bytes >= stop_bytes {
                self.unfinished = true;
                return Ok(None);
            }
            if reads == reads_max {
                return Ok(None);
            }
            reads += 1;
            match self.fill(stream, scratch, bodies)? {
                Fill::Frame(frame) => return Ok(Some(frame)),
                Fill::Some => {}
                Fill::WouldBlock => return Ok(None),
            }
        }
    }

    /// A frame that came with an earlier one.
    #[inline]
    fn take_carried<B: Bodies<Body = In>>(
        &mut self,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        let Some(Carry { bytes, start, end }) = self.carry.take() else { return Ok(None) };
        self.advance_through(bytes, start, end, scratch, bodies)
    }

    /// Consumes `bytes[start..end]` up to the end of a frame. What is left is kept for the next call.
    fn advance_through<B: Bodies<Body = In>>(
        &mut self,
        bytes: Box<[u8]>,
        start: usize,
        end: usize,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        let mut input = &bytes[start..end];
        let advanced = self.advance(&mut input, bodies);
        let left = input.len();
        if left > 0 && advanced.is_ok() {
            self.carry = Some(Carry { bytes, start: end - left, end });
        } else {
            scratch.carry = Some(bytes);
        }
        advanced
    }

    /// Takes bytes that somebody else has read, up to the end of a frame; `input` is what is left of them. Copies payloads.
    pub(crate) fn feed<B: Bodies<Body = In>>(
        &mut self,
        input: &mut &[u8],
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        let result = self.advance(input, bodies);
        self.ended = result.is_err();
        result
    }

    /// So many bytes were fed.
    pub(crate) fn count(&mut self, bytes: usize) {
        self.stats.reads += 1;
        self.stats.bytes += bytes as u64;
    }

    /// Where the next bytes should go.
    pub(crate) fn wants(&self) -> Wants {
        match &self.state {
            State::Body { .. } | State::Piece { .. } => Wants::Room,
            State::Head if self.expects_long() => Wants::AtMost(self.head_left(0)),
            State::Head | State::Discard { .. } => Wants::Any,
        }
    }

    /// The memory that [`Wants::Room`] is about. Stays where it is until [`Inbound::filled`].
    pub(crate) fn room(&mut self) -> &mut [u8] {
        match &mut self.state {
            State::Body { body, filled, .. } => &mut body.as_mut()[*filled..],
            State::Piece { at, until, .. } => {
                let stream = &mut self.streams[*at];
                let from = to_len(stream.filled);
                &mut stream.body.as_mut().expect("refused pieces are discarded").as_mut()[from..*until]
            }
            State::Head | State::Discard { .. } => &mut [],
        }
    }

    /// So many bytes were put into [`Inbound::room`].
    pub(crate) fn filled<B: Bodies<Body = In>>(
        &mut self,
        count: usize,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        self.move_on(count);
        self.count(count);
        let result = self.advance(&mut &[][..], bodies);
        self.ended = result.is_err();
        result
    }

    fn move_on(&mut self, count: usize) {
        match &mut self.state {
            State::Body { filled, .. } => *filled += count,
            State::Piece { at, .. } => {
                self.streams[*at].filled += count as u64;
                self.stats.piece_bytes += count as u64;
            }
            State::Head | State::Discard { .. } => unreachable!("only bodies have room"),
        }
    }

    /// Gives back every body still held. Only for a connection that is about to be dropped.
    pub(crate) fn abandon<B: Bodies<Body = In>>(&mut self, bodies: &mut B) {
        self.ended = true;
        if let State::Body { body, .. } = std::mem::replace(&mut self.state, State::Head) {
            bodies.give_back(body);
        }
        for stream in self.streams.drain(..) {
            if let Some(body) = stream.body {
                bodies.give_back(body);
            }
        }
    }

    pub(crate) fn mid_frame(&self) -> bool {
        self.carry.is_some()
            || self.head.is_some()
            || !self.partial.is_empty()
            || !self.streams.is_empty()
            || !matches!(self.state, State::Head)
    }

    /// A payload in pieces is under way.
    pub(crate) fn in_pieces(&self) -> bool {
        !self.streams.is_empty()
    }

    /// Whether the next payload may be one that the spare body does not hold.
    pub(crate) fn expects_long(&self) -> bool {
        self.long || self.frugal || !self.streams.is_empty()
    }

    /// From here on each read ends where a frame does: what is read before that is the last that was read beyond.
    pub(crate) fn read_no_further(&mut self) {
        self.frugal = true;
    }

    pub(crate) fn peer_incarnation(&self) -> u64 {
        self.peer_incarnation
    }

    /// The seal as it is between two frames.
    pub(crate) fn seal(&self) -> &Seal {
        &self.seal
    }

    /// Goes on with the frame of this number: those before it were read by somebody else.
    pub(crate) fn resume(&mut self, sequence: u64) {
        debug_assert!(!self.mid_frame(), "lent between two frames");
        self.seal = std::mem::take(&mut self.seal).at(sequence);
        (self.long, self.batch, self.key_guess) = (false, false, 0);
    }

    /// Bytes to read before the payload begins, if the next key has so many.
    fn head_left(&self, key_guess: usize) -> usize {
        let whole = match &self.head {
            Some((header, _)) => header.key_len(),
            None => HEADER_BYTES + key_guess,
        };
        // A header of which a part is here may be followed by a key that was not guessed.
        whole - self.partial.len()
    }

    /// Consumes bytes until a frame is whole or more are needed.
    #[inline]
    fn advance<B: Bodies<Body = In>>(
        &mut self,
        input: &mut &[u8],
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        loop {
            let frame = match &mut self.state {
                State::Head => {
                    let Some((header, transit, key)) = self.take_head(input)? else { return Ok(None) };
                    self.begin(header, transit, key, bodies)?
                }
                State::Body { body, filled, .. } => {
                    let body = body.as_mut();
                    let count = input.len().min(body.len() - *filled);
                    body[*filled..*filled + count].copy_from_slice(&input[..count]);
                    *input = &input[count..];
                    *filled += count;
                    self.stats.copied_bytes += count as u64;
                    if *filled < body.len() {
                        return Ok(None);
                    }
                    Some(self.finish_body()?)
                }
                State::Piece { at, until, .. } => {
                    let (at, until) = (*at, *until);
                    let stream = &mut self.streams[at];
                    let from = to_len(stream.filled);
                    let count = input.len().min(until - from);
                    let body = stream.body.as_mut().expect("refused pieces are discarded").as_mut();
                    body[from..from + count].copy_from_slice(&input[..count]);
                    *input = &input[count..];
                    stream.filled += count as u64;
                    self.stats.piece_bytes += count as u64;
                    self.stats.copied_bytes += count as u64;
                    if from + count < until {
                        return Ok(None);
                    }
                    self.finish_piece()?
                }
                State::Discard { left, crc32, payload_crc32, refused } => {
                    let (discarded, rest) = input.split_at(to_len(*left).min(input.len()));
                    let count = discarded.len();
                    *input = rest;
                    *left -= count as u64;
                    self.stats.discarded_bytes += count as u64;
                    if refused.is_none() {
                        // Of a piece: it comes, though nobody keeps it.
                        self.stats.piece_bytes += count as u64;
                    }
                    if self.payload_checksums {
                        crc32.update(discarded);
                    }
                    if *left > 0 {
                        return Ok(None);
                    }
                    if self.payload_checksums {
                        check_crc32(std::mem::take(crc32), *payload_crc32)?;
                    }
                    let refused = refused.take();
                    self.state = State::Head;
                    refused.map(|(header, key, why)| self.refuse(header, key, why))
                }
            };
            if frame.is_some() {
                self.frames_since_read += 1;
                self.stats.frames += 1;
                return Ok(frame);
            }
        }
    }

    /// A header and its key, once both are whole.
    #[inline]
    fn take_head(&mut self, input: &mut &[u8]) -> Result<Option<(Header, Transit, Key)>, FrameError> {
        let (header, transit) = match self.head.take() {
            Some(head) => head,
            None => {
                let Some(bytes) = gather(&mut self.partial, input, HEADER_BYTES) else { return Ok(None) };
                let bytes = bytes.first_chunk().expect("as many were asked for");
                let (header, transit) = Header::open(bytes, &mut self.seal, &self.limits)?;
                self.partial.clear();
                if header.incarnation != self.peer_incarnation {
                    return Err(FrameError::Stale { found: header.incarnation, expected: self.peer_incarnation });
                }
                (header, transit)
            }
        };
        if header.key_bytes == 0 {
            return Ok(Some((header, transit, Key::EMPTY)));
        }
        let Some(key) = gather(&mut self.partial, input, header.key_len()) else {
            self.head = Some((header, transit));
            return Ok(None);
        };
        let key = Key::new(key).expect("open refuses a key that is too long");
        self.partial.clear();
        Ok(Some((header, transit, key)))
    }

    /// Decides where what follows a head goes. A frame comes at once only when it is refused.
    fn begin<B: Bodies<Body = In>>(
        &mut self,
        header: Header,
        transit: Transit,
        key: Key,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, FrameError> {
        let Transit { stream, payload_crc32 } = transit;
        if stream & Transit::PIECE != 0 {
            return self.begin_piece(&header, stream, payload_crc32).map(|()| None);
        }
        self.key_guess = header.key_len();
        if stream == 0 {
            // What the peer does after a payload in pieces is for its next frame to tell.
            self.long = header.payload_bytes > SPARE_BYTES as u64;
            self.state = match self.place(&header, bodies) {
                Ok(body) => State::Body { header, key, body, filled: 0, payload_crc32 },
                Err(why) => State::Discard {
                    left: header.payload_bytes,
                    crc32: crc32_of(&[&key]),
                    payload_crc32,
                    refused: Some((header, key, why)),
                },
            };
            return Ok(None);
        }
        self.check_payload(&[&key], payload_crc32)?;
        let broken = |what| Err(FrameError::Stream { stream, what });
        if self.streams.iter().any(|open| open.number == stream) {
            return broken("opened while it is open");
        }
        if header.payload_bytes <= PIECE_BYTES {
            return broken("a payload that would fit one frame");
        }
        self.long = true;
        let placed = self.place(&header, bodies);
        let refused = placed.as_ref().err().map(|why| self.refuse(header, key.clone(), *why));
        self.streams.push(Stream { number: stream, header, key, body: placed.ok(), filled: 0 });
        Ok(refused)
    }

    fn begin_piece(&mut self, header: &Header, number: u16, payload_crc32: u32) -> Result<(), FrameError> {
        let broken = |what| Err(FrameError::Stream { stream: number, what });
        let Some(at) = self.streams.iter().position(|open| open.number == number & !Transit::PIECE) else {
            return broken("a piece of a payload that was not opened");
        };
        let stream = &mut self.streams[at];
        let left = stream.header.payload_bytes - stream.filled;
        if header.payload_bytes != left.min(PIECE_BYTES) || header.key_bytes != 0 {
            return broken("a piece of another length than its turn");
        }
        if stream.body.is_some() {
            let from = to_len(stream.filled);
            let until = from + header.payload_len();
            self.state = State::Piece { at, from, until, payload_crc32 };
            return Ok(());
        }
        stream.filled += header.payload_bytes;
        if stream.filled == stream.header.payload_bytes {
            self.streams.swap_remove(at);
        }
        let crc32 = crc32fast::Hasher::new();
        self.state = State::Discard { left: header.payload_bytes, crc32, payload_crc32, refused: None };
        Ok(())
    }

    /// Memory for a payload. The limit comes before the loan: a length that is refused allocates nothing.
    fn place<B: Bodies<Body = In>>(&self, header: &Header, bodies: &mut B) -> Result<In, Refusal> {
        if header.payload_bytes > self.limits.payload_bytes_max {
            return Err(Refusal::TooLarge);
        }
        let mut body = bodies.loan(header.payload_len()).ok_or(Refusal::NoSpace)?;
        assert_eq!(body.as_mut().len(), header.payload_len(), "a loan is as long as it was asked for");
        Ok(body)
    }

    fn refuse(&mut self, header: Header, key: Key, why: Refusal) -> Frame<In> {
        self.stats.refused_frames += 1;
        Frame { header, key, body: Received::Refused { bytes: header.payload_bytes, why } }
    }

    fn finish_body(&mut self) -> Result<Frame<In>, FrameError> {
        let State::Body { header, key, body, payload_crc32, .. } = std::mem::replace(&mut self.state, State::Head)
        else {
            unreachable!("the caller saw a body");
        };
        if let Err(error) = self.check_payload(&[&key, body.as_ref()], payload_crc32) {
            // Back to where `abandon` finds it.
            let filled = body.as_ref().len();
            self.state = State::Body { header, key, body, filled, payload_crc32 };
            return Err(error);
        }
        Ok(Frame { header, key, body: Received::Whole(body) })
    }

    fn finish_piece(&mut self) -> Result<Option<Frame<In>>, FrameError> {
        let State::Piece { at, from, until, payload_crc32 } = std::mem::replace(&mut self.state, State::Head) else {
            unreachable!("the caller saw a piece");
        };
        let stream = &self.streams[at];
        let body = stream.body.as_ref().expect("refused pieces are discarded");
        self.check_payload(&[&body.as_ref()[from..until]], payload_crc32)?;
        if stream.filled < stream.header.payload_bytes {
            return Ok(None);
        }
        let Stream { header, key, body, .. } = self.streams.swap_remove(at);
        Ok(Some(Frame { header, key, body: Received::Whole(body.expect("seen above")) }))
    }

    /// Of what follows a header, where payloads have checksums.
    #[inline]
    fn check_payload(&self, parts: &[&[u8]], found: u32) -> Result<(), FrameError> {
        if self.payload_checksums { check_crc32(crc32_of(parts), found) } else { Ok(()) }
    }

    /// One read from the stream, to where the next bytes belong.
    #[inline]
    fn fill<B: Bodies<Body = In>>(
        &mut self,
        stream: &mut impl Read,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Fill<In>, ConnectionError> {
        if self.batch && self.frames_since_read < 2 {
            self.batch = false;
        }
        self.frames_since_read = 0;

        match self.wants() {
            Wants::Room if self.piece_follows() => self.fill_room_and_head(stream, scratch, bodies),
            Wants::Room => {
                let room = self.room();
                let room_bytes = room.len();
                assert!(room_bytes > 0, "a payload that is whole is a frame, and a read of nothing looks like the end");
                let outcome = read(|| stream.read(room));
                let Some(count) = self.account(outcome, room_bytes)? else { return Ok(Fill::WouldBlock) };
                self.move_on(count);
                let frame = self.advance(&mut &[][..], bodies)?;
                Ok(frame.map_or(Fill::Some, Fill::Frame))
            }
            Wants::AtMost(bytes) => self.fill_carry(bytes, stream, scratch, bodies),
            Wants::Any if self.batch || !matches!(self.state, State::Head) => {
                self.fill_carry(CARRY_BYTES, stream, scratch, bodies)
            }
            Wants::Any => {
                let spare = scratch.spare.take().or_else(|| bodies.loan(SPARE_BYTES));
                match spare {
                    Some(spare) => self.fill_in_place(spare, stream, scratch, bodies),
                    None => self.fill_carry(CARRY_BYTES, stream, scratch, bodies),
                }
            }
        }
    }

    /// Whether what comes after the piece under way is, as a rule, the head of the next.
    fn piece_follows(&self) -> bool {
        match &self.state {
            State::Piece { at, until, .. } => !self.frugal && (*until as u64) < self.streams[*at].header.payload_bytes,
            _ => false,
        }
    }

    /// As for [`Wants::Room`], and the head behind it: a system call less a piece.
    fn fill_room_and_head<B: Bodies<Body = In>>(
        &mut self,
        stream: &mut impl Read,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Fill<In>, ConnectionError> {
        let mut carry = scratch.carry();
        let room = self.room();
        let room_bytes = room.len();
        let mut slices = [IoSliceMut::new(room), IoSliceMut::new(&mut carry[..HEADER_BYTES])];
        let outcome = read(|| stream.read_vectored(&mut slices));
        match self.account(outcome, room_bytes + HEADER_BYTES) {
            Ok(Some(count)) => {
                let in_room = count.min(room_bytes);
                self.move_on(in_room);
                let frame = self.advance_through(carry, 0, count - in_room, scratch, bodies)?;
                Ok(frame.map_or(Fill::Some, Fill::Frame))
            }
            nothing => {
                scratch.carry = Some(carry);
                nothing.map(|_| Fill::WouldBlock)
            }
        }
    }

    fn fill_carry<B: Bodies<Body = In>>(
        &mut self,
        bytes_max: usize,
        stream: &mut impl Read,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Fill<In>, ConnectionError> {
        let mut carry = scratch.carry();
        let room = &mut carry[..bytes_max];
        let outcome = read(|| stream.read(room));
        match self.account(outcome, bytes_max) {
            Ok(Some(count)) => {
                let frame = self.advance_through(carry, 0, count, scratch, bodies)?;
                Ok(frame.map_or(Fill::Some, Fill::Frame))
            }
            nothing => {
                scratch.carry = Some(carry);
                nothing.map(|_| Fill::WouldBlock)
            }
        }
    }

    /// Reads the head into the carry buffer and what follows into the spare body; when the payload begins exactly there
    /// and fits, the spare body becomes the payload.
    fn fill_in_place<B: Bodies<Body = In>>(
        &mut self,
        mut spare: In,
        stream: &mut impl Read,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Fill<In>, ConnectionError> {
        let mut carry = scratch.carry();
        let head_room = self.head_left(self.key_guess);
        let room_bytes = head_room + SPARE_BYTES;
        let outcome = {
            let spare = spare.as_mut();
            assert_eq!(spare.len(), SPARE_BYTES, "a loan is as long as it was asked for");
            let mut slices = [IoSliceMut::new(&mut carry[..head_room]), IoSliceMut::new(spare)];
            read(|| stream.read_vectored(&mut slices))
        };
        let count = match self.account(outcome, room_bytes) {
            Ok(Some(count)) => count,
            nothing => {
                scratch.carry = Some(carry);
                scratch.spare = Some(spare);
                return nothing.map(|_| Fill::WouldBlock);
            }
        };
        let mut head = &carry[..count.min(head_room)];
        let in_spare = count - head.len();
        // A short read of a head is the last of it, and one that brought more may be a payload in its place.
        let taken = if in_spare == 0 { Ok(None) } else { self.take_head(&mut head) };
        match taken {
            Ok(None) => {}
            Ok(Some((header, transit, key))) => {
                let fits = header.payload_bytes <= self.limits.payload_bytes_max
                    && (1..=SPARE_BYTES).contains(&header.payload_len());
                if head.is_empty() && transit.stream == 0 && fits {
                    return self.take_in_place(header, transit, key, spare, in_spare, carry, scratch, bodies);
                }
                // The key was guessed wrong, the payload is empty or long, or these are the next frames' bytes.
                match self.begin(header, transit, key, bodies) {
                    Ok(None) => {}
                    Ok(Some(frame)) => {
                        self.stats.frames += 1;
                        let unread = head.len();
                        let (start, end) = join(&mut carry, count - in_spare, unread, &spare.as_ref()[..in_spare]);
                        self.carry = Some(Carry { bytes: carry, start, end });
                        scratch.spare = Some(spare);
                        return Ok(Fill::Frame(frame));
                    }
                    Err(error) => {
                        scratch.spare = Some(spare);
                        return Err(error.into());
                    }
                }
            }
            Err(error) => {
                scratch.spare = Some(spare);
                return Err(error.into());
            }
        }
        let unread = head.len();
        if unread == 0 && in_spare > 0 {
            // All of it is in the spare body: from there to where it belongs.
            let mut input = &spare.as_ref()[..in_spare];
            let advanced = self.advance(&mut input, bodies);
            let left = input.len();
            if left > 0 && advanced.is_ok() {
                self.stats.copied_bytes += left as u64;
                carry[..left].copy_from_slice(input);
                self.carry = Some(Carry { bytes: carry, start: 0, end: left });
            } else {
                scratch.carry = Some(carry);
            }
            scratch.spare = Some(spare);
            return Ok(advanced?.map_or(Fill::Some, Fill::Frame));
        }
        self.stats.copied_bytes += in_spare as u64;
        let (start, end) = join(&mut carry, count - in_spare, unread, &spare.as_ref()[..in_spare]);
        scratch.spare = Some(spare);
        let frame = self.advance_through(carry, start, end, scratch, bodies)?;
        Ok(frame.map_or(Fill::Some, Fill::Frame))
    }

    /// The spare body, whose first bytes are this payload's, becomes the payload.
    #[expect(clippy::too_many_arguments, reason = "all of what one read brought")]
    fn take_in_place<B: Bodies<Body = In>>(
        &mut self,
        header: Header,
        transit: Transit,
        key: Key,
        spare: In,
        in_spare: usize,
        mut carry: Box<[u8]>,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Fill<In>, ConnectionError> {
        let filled = in_spare.min(header.payload_len());
        // The next frames' bytes leave before the loan is cut to this payload.
        let rest = &spare.as_ref()[filled..in_spare];
        let end = rest.len();
        carry[..end].copy_from_slice(rest);
        self.stats.copied_bytes += end as u64;
        self.batch = end > 0;
        self.key_guess = header.key_len();
        self.long = false;
        if end > 0 {
            self.carry = Some(Carry { bytes: carry, start: 0, end });
        } else {
            scratch.carry = Some(carry);
        }
        let body = bodies.truncate(spare, header.payload_len());
        self.state = State::Body { header, key, body, filled, payload_crc32: transit.payload_crc32 };
        if filled < header.payload_len() {
            return Ok(Fill::Some);
        }
        let frame = self.finish_body()?;
        self.frames_since_read += 1;
        self.stats.frames += 1;
        Ok(Fill::Frame(frame))
    }

    /// Counts a read: how many bytes it brought, `None` when there are none for now. One that brought nothing is the end.
    fn account(
        &mut self,
        outcome: io::Result<Option<usize>>,
        room_bytes: usize,
    ) -> Result<Option<usize>, ConnectionError> {
        let count = outcome?;
        self.stats.reads += 1;
        self.stats.bytes += count.unwrap_or(0) as u64;
        self.drained = count.is_none_or(|count| count < room_bytes);
        if count == Some(0) {
            return Err(ConnectionError::Closed { mid_frame: self.mid_frame() });
        }
        Ok(count)
    }
}

fn check_crc32(crc32: crc32fast::Hasher, found: u32) -> Result<(), FrameError> {
    let computed = crc32.finalize();
    if computed == found { Ok(()) } else { Err(FrameError::PayloadCheck { found, computed }) }
}

/// Puts what is left of a head (the last `unread` of the first `head` bytes) and what came after it in one row.
fn join(carry: &mut [u8], head: usize, unread: usize, after: &[u8]) -> (usize, usize) {
    carry[head..head + after.len()].copy_from_slice(after);
    (head - unread, head + after.len())
}

/// `bytes` bytes in a row: from the input where they are whole there, else gathered in `partial`.
#[inline]
fn gather<'a, 'i: 'a>(partial: &'a mut Vec<u8>, input: &mut &'i [u8], bytes: usize) -> Option<&'a [u8]> {
    if partial.is_empty() && input.len() >= bytes {
        let (whole, rest) = input.split_at(bytes);
        *input = rest;
        return Some(whole);
    }
    let count = input.len().min(bytes - partial.len());
    partial.extend_from_slice(&input[..count]);
    *input = &input[count..];
    (partial.len() == bytes).then_some(&partial[..])
}

/// A length that is within a limit, or a bound for one.
fn to_len(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
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
        frames_after(&mut Seal::default(), lengths)
    }

    fn frames_after(seal: &mut Seal, lengths: &[(usize, usize)]) -> (Vec<Sent>, Vec<u8>) {
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
            stream.extend_from_slice(&header.seal(Transit::default(), seal));
            stream.extend_from_slice(&key);
            stream.extend_from_slice(&payload);
            sent.push((key, payload));
        }
        (sent, stream)
    }

    fn plain(limits: Limits, bytes_per_call_max: u64) -> Inbound<Vec<u8>> {
        Inbound::new(limits, bytes_per_call_max, Seal::default(), false, 0)
    }

    const LIMITS: Limits = Limits { payload_bytes_max: 100_000 };

    /// Receives until the stream blocks at its end; what was refused shows as its length and reason.
    fn receive_all(
        inbound: &mut Inbound<Vec<u8>>,
        stream: &mut Cut<'_>,
        bodies: &mut Counted,
    ) -> Result<Vec<Frame<Vec<u8>>>, ConnectionError> {
        let mut scratch = Scratch::default();
        let result = receive_all_with(inbound, stream, &mut scratch, bodies);
        scratch.abandon(bodies);
        result
    }

    fn receive_all_with(
        inbound: &mut Inbound<Vec<u8>>,
        stream: &mut Cut<'_>,
        scratch: &mut Scratch<Vec<u8>>,
        bodies: &mut Counted,
    ) -> Result<Vec<Frame<Vec<u8>>>, ConnectionError> {
        let mut received = Vec::new();
        loop {
            match inbound.receive(stream, scratch, bodies)? {
                Some(frame) => received.push(frame),
                None if stream.at < stream.bytes.len() => {}
                None => return Ok(received),
            }
        }
    }

    fn check(lengths: &[(usize, usize)], cuts: &[usize], blocks: bool, mut bodies: Counted) {
        let (sent, bytes) = frames(lengths);
        let mut stream = Cut::new(&bytes, cuts, blocks);
        let mut inbound = plain(LIMITS, u64::MAX);
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
        let mut inbound = plain(LIMITS, u64::MAX);
        // The key's length is guessed to be the last one's; a wrong guess costs copies of the payload.
        let mut seal = Seal::default();
        for (key_bytes, copied_bytes) in [(0, 0), (6, 100), (6, 0), (6, 0), (0, 194), (0, 0)] {
            let (_, bytes) = frames_after(&mut seal, &[(key_bytes, 100)]);
            let before = inbound.stats;
            let mut stream = Cut::new(&bytes, &[], false);
            let frame = inbound
                .receive(&mut stream, &mut Scratch::default(), &mut bodies)
                .expect("a good stream")
                .expect("a frame");
            assert_eq!(frame.key.len(), key_bytes);
            assert!(inbound.drained() && !inbound.mid_frame());
            assert_eq!(inbound.stats.reads - before.reads, 1);
            assert_eq!(inbound.stats.copied_bytes - before.copied_bytes, copied_bytes, "key of {key_bytes}");
        }
    }

    #[test]
    fn a_long_frame_copies_no_more_than_the_spare_body() {
        let (_, bytes) = frames(&[(0, 90_000)]);
        let mut inbound = plain(LIMITS, u64::MAX);
        let mut stream = Cut::new(&bytes, &[], false);
        inbound
            .receive(&mut stream, &mut Scratch::default(), &mut Counted::default())
            .expect("a good stream")
            .expect("a frame");
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
                let mut inbound = plain(LIMITS, u64::MAX);
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
            let bytes = header.seal(Transit::default(), &mut Seal::default());
            let mut bodies = Counted::default();
            let mut inbound = plain(LIMITS, u64::MAX);
            let outcome = inbound.receive(&mut Cut::new(&bytes, &[], false), &mut Scratch::default(), &mut bodies);
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
                let (mut inbound, mut scratch) = (plain(LIMITS, u64::MAX), Scratch::default());
                let mut stream = Cut::new(&bytes[..length], &[], false);
                stream.at_end = at_end;
                let mut whole = 0;
                let error = loop {
                    match inbound.receive(&mut stream, &mut scratch, &mut bodies) {
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
                scratch.abandon(&mut bodies);
                assert_eq!(bodies.on_loan, whole);
            }
        }
    }

    #[test]
    fn one_call_reads_no_more_than_it_may() {
        let header = Header { payload_bytes: 1 << 30, ..Header::default() };
        let mut bytes = header.seal(Transit::default(), &mut Seal::default()).to_vec();
        bytes.resize(1 << 20, 7);
        let mut inbound = plain(LIMITS, 100_000);
        let mut stream = Cut::new(&bytes, &[], false);
        let mut calls = 0;
        while stream.at < bytes.len() {
            let before = stream.at;
            assert!(
                inbound
                    .receive(&mut stream, &mut Scratch::default(), &mut Counted::default())
                    .expect("a good stream")
                    .is_none()
            );
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
