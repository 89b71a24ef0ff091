//! The sending half of a connection: frames in, bytes out, however little the kernel takes at a time.
//!
//! Knows `Write`, not sockets. A frame is written from where it lies: its 64 bytes, its key and its body are
//! three slices of one `writev`; nothing is gathered in user space.
//!
//! Frames begin in the order they were given, short ones before the next piece of a long one: a body over [`PIECE_BYTES`]
//! is opened at once and follows piece by piece, in turns with others of its kind. What is begun stands in `line`, in the order
//! of the wire, with its number in the stream in its header.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::ops::Range;

use crate::Flush;
use crate::frame::{
    HEADER_BYTES, Header, KEY_BYTES_MAX, Key, PAYLOAD_CEILING_BYTES, PIECE_BYTES, STREAMS_MAX, Seal, Transit, crc32_of,
};
use crate::tcp::{ConnectionError, SendError};

/// Frames written by one `writev`. Three slices each; Linux takes 1024 slices, 192 already cover 16 KiB of heads.
pub(crate) const FRAMES_PER_WRITE_MAX: usize = 64;
/// Bytes begun by one write while the kernel takes all of each: a call of 1 MiB takes 1.11 times a raw round trip so, and 1.20 in
/// four writes. A short frame that comes once such a line is begun waits for its end.
const LINE_BYTES_MAX: u64 = 4 * PIECE_BYTES;
/// The same once it does not, until nothing is left to write: all that a short frame finds in its way then, with one piece. And with
/// checksums, so always between hosts: what was read for them is still in the cache when the kernel copies it, and the peer has something to
/// check meanwhile.
const SHORT_LINE_BYTES_MAX: u64 = PIECE_BYTES;
const PIECE_LEN: usize = 256 << 10;
const _: () = assert!(PIECE_LEN as u64 == PIECE_BYTES);
/// Short frames that may begin one after another while a piece waits.
const SHORTS_PER_PIECE_MAX: usize = 64;

/// Shortest body that may stay with the kernel after it is written (a zero-copy send), bytes. At 8 KiB it costs what a copy costs, at
/// 32 KiB half: 3 of 6 us, which pays for the second completion (`docs/decisions/0018`).
pub(crate) const SHARED_BYTES_MIN: usize = 32 << 10;

#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct OutboundStats {
    pub(crate) bytes: u64,
    pub(crate) writes: u64,
    pub(crate) frames: u64,
}

/// A frame that waits for its turn.
#[derive(Debug)]
struct Waiting<Out> {
    header: Header,
    key: Key,
    body: Out,
}

/// A body that leaves in pieces.
#[derive(Debug)]
struct Stream<Out> {
    header: Header,
    body: Out,
    /// Bytes of it in `line` or beyond.
    begun: usize,
    number: u16,
}

/// Bytes in the order of the wire.
#[derive(Debug)]
struct Begun<Out> {
    head: [u8; HEADER_BYTES],
    key: Key,
    load: Load<Out>,
}

#[derive(Debug)]
enum Load<Out> {
    Body(Out),
    /// Opens a stream: nothing follows.
    Nothing,
    /// A piece of the stream of this number.
    Piece {
        number: u16,
        range: Range<usize>,
    },
}

/// A body that is written whole, and that the kernel may read again.
#[derive(Debug)]
struct Held<Out> {
    body: Out,
    /// Until this share and all before it have ended.
    until: u64,
}

/// What is under way, apart from what waits: the part that a write looks at.
#[derive(Debug)]
struct Wire<Out> {
    line: VecDeque<Begun<Out>>,
    /// Bytes of all of `line`.
    line_bytes: u64,
    /// The kernel was not given, or did not take, all of the line since the last time there was nothing to write.
    is_cut: bool,
    /// Bytes of the first of `line` that the kernel already has.
    written: usize,
    /// Bodies that leave in pieces, until their last byte is with the kernel.
    streams: Vec<Stream<Out>>,
}

#[derive(Debug)]
pub(crate) struct Outbound<Out> {
    seal: Seal,
    payload_checksums: bool,
    incarnation: u64,
    frames_max: usize,
    bytes_max: u64,
    /// Frames that go in one piece.
    short: VecDeque<Waiting<Out>>,
    /// Frames whose body goes in pieces, not opened yet.
    long: VecDeque<Waiting<Out>>,
    wire: Wire<Out>,
    /// The stream whose turn it is, by its place.
    turn: usize,
    shorts_in_a_row: usize,
    /// Frames that are not with the kernel, all of them, and their bytes.
    frames: usize,
    unsent_bytes: u64,
    sent: VecDeque<Out>,
    /// Sends whose bodies stay with the kernel: how many began, and up to which all ended.
    shares_begun: u64,
    shares_ended: u64,
    /// In the order in which they were written, and so of `until`.
    held: VecDeque<Held<Out>>,
    held_bytes: u64,
    broken: bool,
    pub(crate) stats: OutboundStats,
}

impl<Out: AsRef<[u8]>> Wire<Out> {
    fn body(&self, number: u16) -> &[u8] {
        let stream = self.streams.iter().find(|stream| stream.number == number);
        stream.expect("a stream stays until its last piece is written").body.as_ref()
    }

    /// The bytes of one entry of `line`.
    fn slices<'a>(&'a self, begun: &'a Begun<Out>) -> [&'a [u8]; 3] {
        let load = match &begun.load {
            Load::Body(body) => body.as_ref(),
            Load::Nothing => &[],
            Load::Piece { number, range } => &self.body(*number)[range.clone()],
        };
        [&begun.head, begun.key.as_slice(), load]
    }

    fn push(&mut self, begun: Begun<Out>) {
        self.line_bytes += self.slices(&begun).iter().map(|slice| slice.len() as u64).sum::<u64>();
        self.line.push_back(begun);
    }

    /// The bytes to write next, into `slices`; gives how many of them are used.
    fn next<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut used = 0;
        let mut skip = self.written;
        for begun in self.line.iter().take(slices.len() / 3) {
            for piece in self.slices(begun) {
                // Only the first frame is partly written; what is left of `skip` ends inside it.
                let piece_skip = skip.min(piece.len());
                skip -= piece_skip;
                if piece_skip < piece.len() {
                    slices[used] = IoSlice::new(&piece[piece_skip..]);
                    used += 1;
                }
            }
        }
        used
    }

    /// The first of `line`, once it is written whole.
    fn pop_written(&mut self) -> Option<Begun<Out>> {
        let first_bytes = self.slices(self.line.front()?).iter().map(|slice| slice.len()).sum::<usize>();
        if self.written < first_bytes {
            return None;
        }
        self.written -= first_bytes;
        self.line_bytes -= first_bytes as u64;
        self.line.pop_front()
    }
}

impl<Out: AsRef<[u8]>> Outbound<Out> {
    pub(crate) fn new(
        frames_max: usize,
        bytes_max: u64,
        seal: Seal,
        payload_checksums: bool,
        incarnation: u64,
    ) -> Self {
        Outbound {
            seal,
            payload_checksums,
            incarnation,
            frames_max,
            bytes_max,
            short: VecDeque::new(),
            long: VecDeque::new(),
            wire: Wire { line: VecDeque::new(), line_bytes: 0, is_cut: false, written: 0, streams: Vec::new() },
            turn: 0,
            shorts_in_a_row: 0,
            frames: 0,
            unsent_bytes: 0,
            sent: VecDeque::new(),
            shares_begun: 0,
            shares_ended: 0,
            held: VecDeque::new(),
            held_bytes: 0,
            broken: false,
            stats: OutboundStats::default(),
        }
    }

    /// Nothing is left to write.
    pub(crate) fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Bytes that are left to write.
    pub(crate) fn unsent_bytes(&self) -> u64 {
        self.unsent_bytes
    }

    /// Frames and bytes that wait for the kernel: to be taken, or to be let go of.
    pub(crate) fn backlog(&self) -> (usize, u64) {
        (self.frames + self.held.len(), self.unsent_bytes + self.held_bytes)
    }

    /// A payload in pieces waits or is under way: what is sent now passes it.
    pub(crate) fn sends_pieces(&self) -> bool {
        !self.wire.streams.is_empty() || !self.long.is_empty()
    }

    pub(crate) fn take_sent(&mut self) -> Option<Out> {
        self.sent.pop_front()
    }

    /// Nothing waits to be written, nothing written is the kernel's to read, and nothing failed.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.backlog().0 == 0 && !self.broken
    }

    /// The seal as it is between two frames.
    pub(crate) fn seal_state(&self) -> &Seal {
        &self.seal
    }

    /// Goes on with the frame of this number: those before it were written by somebody else. What was queued since is not sealed yet.
    pub(crate) fn resume(&mut self, sequence: u64) {
        debug_assert!(self.wire.line.is_empty(), "nothing is begun while somebody else writes");
        self.seal = std::mem::take(&mut self.seal).at(sequence);
    }

    /// What goes with every frame: whether it has a checksum, and whose it is.
    pub(crate) fn marks(&self) -> (bool, u64) {
        (self.payload_checksums, self.incarnation)
    }

    #[inline]
    pub(crate) fn send(
        &mut self,
        stream: Option<&mut dyn Write>,
        header: &Header,
        key: &[u8],
        body: Out,
    ) -> Result<(), SendError<Out>> {
        let body_bytes = body.as_ref().len() as u64;
        if key.len() > KEY_BYTES_MAX as usize {
            return Err(SendError::KeyTooLong(body));
        }
        if body_bytes > PAYLOAD_CEILING_BYTES {
            return Err(SendError::PayloadTooLong(body));
        }
        if self.broken {
            return Err(SendError::Closed(body));
        }
        let frame_bytes = (HEADER_BYTES + key.len()) as u64 + body_bytes;
        let (frames, bytes) = self.backlog();
        let full = frames > 0 && bytes + frame_bytes > self.bytes_max;
        if full || frames + self.sent.len() >= self.frames_max {
            return Err(SendError::Backlogged(body));
        }
        #[expect(clippy::cast_possible_truncation, reason = "checked above to be at most KEY_BYTES_MAX")]
        let key_bytes = key.len() as u32;
        let header = Header { key_bytes, payload_bytes: body_bytes, incarnation: self.incarnation, ..*header };
        let owned = |key| Key::new(key).expect("its length was checked above");
        let is_long = body_bytes > PIECE_BYTES;
        let mut written = 0;
        match stream {
            Some(stream) if self.frames == 0 && !is_long => {
                let head = self.seal(&header, 0, key, body.as_ref());
                let slices = [IoSlice::new(&head), IoSlice::new(key), IoSlice::new(body.as_ref())];
                match write(stream, &slices, &mut self.stats) {
                    Ok(count) => written = count,
                    Err(_) => {
                        // Said once, here; `receive` and `flush` fail from now on as well.
                        self.broken = true;
                        return Err(SendError::Closed(body));
                    }
                }
                if written as u64 == frame_bytes {
                    self.stats.frames += 1;
                    self.sent.push_back(body);
                    return Ok(());
                }
                self.wire.push(Begun { head, key: owned(key), load: Load::Body(body) });
                self.wire.written = written;
            }
            _ => {
                let queue = if is_long { &mut self.long } else { &mut self.short };
                queue.push_back(Waiting { header, key: owned(key), body });
            }
        }
        self.frames += 1;
        self.unsent_bytes += frame_bytes - written as u64;
        Ok(())
    }

    /// Takes a frame back of which nothing is written yet: its body.
    pub(crate) fn withdraw(&mut self, kind: u8, call: u64) -> Option<Out> {
        for queue in [&mut self.short, &mut self.long] {
            let found = queue.iter().position(|waiting| waiting.header.kind == kind && waiting.header.call == call);
            if let Some(Waiting { header, body, .. }) = found.and_then(|at| queue.remove(at)) {
                self.frames -= 1;
                self.unsent_bytes -= (HEADER_BYTES + header.key_len()) as u64 + header.payload_bytes;
                return Some(body);
            }
        }
        None
    }

    #[inline]
    fn seal(&mut self, header: &Header, stream: u16, key: &[u8], payload: &[u8]) -> [u8; HEADER_BYTES] {
        let payload_crc32 = if self.payload_checksums { crc32_of(&[key, payload]).finalize() } else { 0 };
        header.seal(Transit { stream, payload_crc32 }, &mut self.seal)
    }

    /// Begins what has its turn, up to what one write takes.
    fn top_up(&mut self) {
        let short = self.wire.is_cut || self.payload_checksums;
        let bytes_max = if short { SHORT_LINE_BYTES_MAX } else { LINE_BYTES_MAX };
        while self.wire.line.len() < FRAMES_PER_WRITE_MAX && self.wire.line_bytes < bytes_max {
            let piece_waits = self.wire.streams.iter().any(|stream| stream.begun < stream.body.as_ref().len());
            if (self.shorts_in_a_row < SHORTS_PER_PIECE_MAX || !piece_waits)
                && let Some(Waiting { header, key, body }) = self.short.pop_front()
            {
                self.shorts_in_a_row += 1;
                let head = self.seal(&header, 0, &key, body.as_ref());
                self.wire.push(Begun { head, key, load: Load::Body(body) });
            } else if self.wire.streams.len() < usize::from(STREAMS_MAX)
                && let Some(Waiting { header, key, body }) = self.long.pop_front()
            {
                let is_free = |number: &u16| self.wire.streams.iter().all(|stream| stream.number != *number);
                let number = (1..=STREAMS_MAX).find(is_free).expect("fewer are open than there are");
                let head = self.seal(&header, number, &key, &[]);
                self.wire.push(Begun { head, key, load: Load::Nothing });
                self.wire.streams.push(Stream { header, body, begun: 0, number });
            } else if piece_waits {
                self.shorts_in_a_row = 0;
                self.begin_piece();
            } else {
                return;
            }
        }
    }

    /// The next piece of the stream whose turn it is.
    fn begin_piece(&mut self) {
        let places = self.wire.streams.len();
        let waits = |at: &usize| {
            let stream = &self.wire.streams[*at];
            stream.begun < stream.body.as_ref().len()
        };
        let at = (self.turn..self.turn + places).map(|at| at % places).find(waits).expect("the caller saw one");
        self.turn = at + 1;
        let stream = &mut self.wire.streams[at];
        let payload = stream.body.as_ref();
        let end = payload.len().min(stream.begun + PIECE_LEN);
        let range = stream.begun..end;
        stream.begun = end;
        let payload_crc32 = if self.payload_checksums { crc32fast::hash(&payload[range.clone()]) } else { 0 };
        let header = Header {
            kind: stream.header.kind,
            call: stream.header.call,
            incarnation: self.incarnation,
            payload_bytes: range.len() as u64,
            ..Header::default()
        };
        let number = stream.number;
        let head = header.seal(Transit { stream: number | Transit::PIECE, payload_crc32 }, &mut self.seal);
        self.unsent_bytes += HEADER_BYTES as u64;
        self.wire.push(Begun { head, key: Key::EMPTY, load: Load::Piece { number, range } });
    }

    pub(crate) fn flush(
        &mut self,
        stream: &mut dyn Write,
        done: &mut dyn FnMut(Out),
    ) -> Result<Flush, ConnectionError> {
        self.give_sent(done);
        if self.broken {
            return Err(ConnectionError::Closed { mid_frame: self.wire.written > 0 });
        }
        while self.frames > 0 {
            self.top_up();
            let count = match self.write_some(stream) {
                Ok(count) => count,
                Err(error) => {
                    self.broken = true;
                    return Err(error.into());
                }
            };
            if count == 0 {
                // It had room for all of the last write, and has none now.
                self.wire.is_cut = true;
                return Ok(Flush::Blocked);
            }
            self.account(count, done);
        }
        Ok(Flush::Done)
    }

    fn give_sent(&mut self, done: &mut dyn FnMut(Out)) {
        while let Some(body) = self.sent.pop_front() {
            done(body);
        }
    }

    /// The kernel has taken so many bytes of the line.
    fn account(&mut self, count: usize, done: &mut dyn FnMut(Out)) {
        self.wire.written += count;
        self.unsent_bytes -= count as u64;
        while let Some(begun) = self.wire.pop_written() {
            let body = match begun.load {
                Load::Body(body) => body,
                Load::Nothing => continue,
                Load::Piece { number, range } => {
                    let at = self.wire.streams.iter().position(|stream| stream.number == number);
                    let at = at.expect("a stream stays until its last piece is written");
                    if range.end < self.wire.streams[at].body.as_ref().len() {
                        continue;
                    }
                    self.wire.streams.remove(at).body
                }
            };
            self.stats.frames += 1;
            self.frames -= 1;
            let bytes = body.as_ref().len();
            if self.shares_ended < self.shares_begun && bytes >= SHARED_BYTES_MIN {
                // Which of the shares are of this body is not worth knowing: a peer acknowledges in order.
                self.held_bytes += bytes as u64;
                self.held.push_back(Held { body, until: self.shares_begun });
            } else {
                done(body);
            }
        }
        self.wire.is_cut = self.frames > 0 && (self.wire.is_cut || !self.wire.line.is_empty());
    }

    /// The next write leaves a body of at least [`SHARED_BYTES_MIN`] with the kernel; it is the share of this number, one more than
    /// the last.
    pub(crate) fn share(&mut self, number: u64) {
        assert_eq!(number, self.shares_begun + 1, "shares are counted");
        self.shares_begun = number;
    }

    /// Up to this share all have ended.
    pub(crate) fn end_shares(&mut self, ended: u64, done: &mut dyn FnMut(Out)) {
        assert!(ended <= self.shares_begun, "{ended} of {} shares", self.shares_begun);
        self.shares_ended = ended;
        while let Some(held) = self.held.pop_front_if(|held| held.until <= ended) {
            self.held_bytes -= held.body.as_ref().len() as u64;
            done(held.body);
        }
    }

    fn write_some(&mut self, stream: &mut dyn Write) -> io::Result<usize> {
        // One frame is the usual case, and clearing room for 64 of them (3 KiB) costs more than writing its three slices.
        if self.wire.line.len() == 1 {
            self.write_frames::<3>(stream)
        } else {
            self.write_frames::<{ 3 * FRAMES_PER_WRITE_MAX }>(stream)
        }
    }

    fn write_frames<const SLICES: usize>(&mut self, stream: &mut dyn Write) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let used = self.wire.next(&mut slices);
        write(stream, &slices[..used], &mut self.stats)
    }

    /// What an owner writes by itself: the slices, which stay where they are until [`Outbound::wrote`].
    pub(crate) fn prepare<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.top_up();
        self.wire.next(slices)
    }

    /// The kernel took so many bytes of what [`Outbound::prepare`] gave.
    pub(crate) fn wrote(&mut self, count: usize, done: &mut dyn FnMut(Out)) {
        self.stats.writes += 1;
        self.stats.bytes += count as u64;
        self.account(count, done);
    }

    /// Nothing can be written any more.
    pub(crate) fn fail(&mut self) {
        self.broken = true;
    }

    /// Hands out every body still held: sent, half sent or waiting. Only before the connection is dropped, and when the kernel has let
    /// go of all.
    pub(crate) fn abandon(&mut self, done: &mut dyn FnMut(Out)) {
        self.broken = true;
        self.give_sent(done);
        self.end_shares(self.shares_begun, done);
        for begun in self.wire.line.drain(..) {
            if let Load::Body(body) = begun.load {
                done(body);
            }
        }
        self.wire.streams.drain(..).for_each(|stream| done(stream.body));
        self.short.drain(..).chain(self.long.drain(..)).for_each(|waiting| done(waiting.body));
        self.wire.written = 0;
        self.wire.line_bytes = 0;
        self.frames = 0;
        self.unsent_bytes = 0;
    }
}

/// One `writev`: how many bytes the kernel took, 0 when it takes none for now.
#[inline]
fn write(stream: &mut dyn Write, slices: &[IoSlice<'_>], stats: &mut OutboundStats) -> io::Result<usize> {
    loop {
        stats.writes += 1;
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                stats.bytes += count as u64;
                return Ok(count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(frames_max: usize, bytes_max: u64) -> Outbound<Vec<u8>> {
        Outbound::new(frames_max, bytes_max, Seal::default(), false, 0)
    }

    /// A kernel that takes at most `most` bytes a call, and nothing at every other call if `blocks`.
    struct Miser {
        taken: Vec<u8>,
        most: usize,
        blocks: bool,
        calls: u32,
    }

    impl Write for Miser {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.write_vectored(&[IoSlice::new(bytes)])
        }

        fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
            self.calls += 1;
            if self.blocks && self.calls % 2 == 1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let all: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).take(self.most).collect();
            self.taken.extend_from_slice(&all);
            Ok(all.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const LENGTHS: [(usize, usize); 5] = [(5, 100), (0, 0), (60, 2), (0, 300), (1, 0)];

    fn header(call: usize) -> Header {
        Header { call: call as u64, ..Header::default() }
    }

    fn expected() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut seal = Seal::default();
        for (call, (key, payload)) in LENGTHS.into_iter().enumerate() {
            let key_bytes = u32::try_from(key).expect("a short key");
            let header = Header { key_bytes, payload_bytes: payload as u64, ..header(call) };
            bytes.extend_from_slice(&header.seal(Transit::default(), &mut seal));
            bytes.resize(bytes.len() + key, 1);
            bytes.resize(bytes.len() + payload, 2);
        }
        bytes
    }

    #[test]
    fn n3_short_writes_of_every_length_give_the_same_bytes() {
        let expected = expected();
        for most in 1..=expected.len() {
            for (blocks, at_once) in [(false, false), (false, true), (true, false), (true, true)] {
                let mut kernel = Miser { taken: Vec::new(), most, blocks, calls: 0 };
                let mut outbound = plain(100, 1 << 20);
                let mut done = Vec::new();
                for (call, (key, payload)) in LENGTHS.into_iter().enumerate() {
                    let stream = if at_once { Some(&mut kernel as &mut dyn Write) } else { None };
                    outbound.send(stream, &header(call), &vec![1; key], vec![2; payload]).expect("room");
                }
                while outbound.flush(&mut kernel, &mut |body| done.push(body.len())).expect("a kernel") != Flush::Done {
                }
                assert!(kernel.taken == expected, "at most {most}, blocks {blocks}, at once {at_once}");
                assert_eq!(done, LENGTHS.map(|(_, payload)| payload), "each body comes back once, in order");
                assert_eq!(outbound.backlog(), (0, 0));
                assert_eq!((outbound.stats.bytes, outbound.stats.frames), (expected.len() as u64, 5));
            }
        }
    }

    /// R1: a long body goes in as few writes as may be while the kernel takes all of them, and piece by piece once it does not, so that a short
    /// frame finds no more than a piece in its way.
    #[test]
    fn r1_a_kernel_that_takes_all_has_four_pieces_at_once_and_one_that_does_not_has_one() {
        let lines = |payload_checksums, most| {
            let mut outbound = Outbound::new(10, 1 << 30, Seal::default(), payload_checksums, 0);
            outbound.send(None, &header(0), b"", vec![1; 6 * PIECE_LEN]).expect("room");
            let (mut lines, mut written) = (Vec::new(), Vec::new());
            while !outbound.is_empty() {
                let mut slices = [IoSlice::new(&[]); 3 * FRAMES_PER_WRITE_MAX];
                let used = outbound.prepare(&mut slices);
                let bytes = slices[..used].iter().flat_map(|slice| slice.iter().copied()).take(most);
                let before = written.len();
                written.extend(bytes);
                let count = written.len() - before;
                lines.push(outbound.wire.line.iter().filter(|begun| matches!(begun.load, Load::Piece { .. })).count());
                outbound.wrote(count, &mut drop);
            }
            (lines, written)
        };
        let (whole, expected) = lines(false, usize::MAX);
        assert_eq!(whole, [4, 2]);
        let (cut, found) = lines(false, PIECE_LEN / 2);
        assert!(found == expected, "the same bytes");
        // The first line was begun before anybody knew. Once it is gone, one piece at a time.
        assert_eq!((cut[0], cut.iter().skip(7).max()), (4, Some(&1)), "{cut:?}");
        // Cut once, and never again.
        assert_eq!(
            lines(false, 3 * PIECE_LEN).0,
            [4, 2, 1, 1],
            "one write that was cut is believed until all is written"
        );
        // A write that finds no room at all after one that had it is a cut, too.
        let mut outbound = plain(10, 1 << 30);
        outbound.send(None, &header(0), b"", vec![1; 12 * PIECE_LEN]).expect("room");
        let mut kernel = Miser { taken: Vec::new(), most: usize::MAX, blocks: true, calls: 1 };
        for pieces in [4, 1] {
            assert_eq!(outbound.flush(&mut kernel, &mut drop).expect("a kernel"), Flush::Blocked);
            assert_eq!(outbound.wire.line.len(), pieces, "begun before it blocked");
        }
        let (checked, _) = lines(true, usize::MAX);
        assert_eq!(checked, [1; 6], "what was hashed is still in the cache when it is copied");
    }

    /// What was written without a copy is its owner's again when the kernel says so, not when it is written.
    #[test]
    fn n4_a_shared_body_comes_back_once_and_not_before_its_share_ends() {
        let (mut outbound, mut back) = (plain(3, 1 << 20), Vec::new());
        let long = |first| [vec![first], vec![0; SHARED_BYTES_MIN]].concat();
        let write = |outbound: &mut Outbound<Vec<u8>>, share: u64, back: &mut Vec<u8>| {
            let mut slices = [IoSlice::new(&[]); 3 * FRAMES_PER_WRITE_MAX];
            let used = outbound.prepare(&mut slices);
            let count = slices[..used].iter().map(|slice| slice.len()).sum();
            if share > 0 {
                outbound.share(share);
            }
            outbound.wrote(count, &mut |body: Vec<u8>| back.push(body[0]));
        };
        outbound.send(None, &header(0), b"", long(0)).expect("room");
        outbound.send(None, &header(1), b"", vec![1]).expect("room");
        write(&mut outbound, 1, &mut back);
        assert_eq!(back, [1], "what is short was copied");
        outbound.send(None, &header(2), b"", long(2)).expect("room");
        write(&mut outbound, 2, &mut back);
        assert!(outbound.is_empty());
        assert_eq!(outbound.backlog(), (2, 2 * (SHARED_BYTES_MIN as u64 + 1)), "the memory is not back");
        // Written with a copy, but perhaps begun as a share.
        outbound.send(None, &header(3), b"", long(3)).expect("room");
        assert!(
            matches!(outbound.send(None, &header(4), b"", vec![4]), Err(SendError::Backlogged(_))),
            "held is bounded"
        );
        write(&mut outbound, 0, &mut back);
        assert_eq!(back, [1]);
        let mut give = |ended, outbound: &mut Outbound<Vec<u8>>| {
            outbound.end_shares(ended, &mut |body| back.push(body[0]));
            back.clone()
        };
        assert_eq!(give(0, &mut outbound), [1]);
        assert_eq!(give(1, &mut outbound), [1, 0]);
        assert_eq!(give(2, &mut outbound), [1, 0, 2, 3]);
        assert_eq!(outbound.backlog(), (0, 0));
        outbound.send(None, &header(5), b"", long(5)).expect("room");
        write(&mut outbound, 3, &mut back);
        outbound.abandon(&mut |body| back.push(body[0]));
        assert_eq!(back, [1, 0, 2, 3, 5]);
    }

    #[test]
    fn n4_a_kernel_that_fails_gives_every_body_back() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut outbound = plain(100, 1 << 20);
        outbound.send(None, &header(0), b"", vec![0]).expect("room");
        outbound.send(None, &header(1), b"", vec![1]).expect("room");
        assert!(matches!(outbound.flush(&mut Broken, &mut drop), Err(ConnectionError::Io(_))));
        assert!(matches!(outbound.send(None, &header(2), b"", vec![2]), Err(SendError::Closed(body)) if body == [2]));
        let mut back = Vec::new();
        outbound.abandon(&mut |body| back.push(body));
        assert_eq!(back, [[0], [1]]);
    }
}
