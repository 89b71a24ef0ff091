//! The sending half of a connection: frames in, bytes out, however little the kernel takes at a time.
//!
//! Knows `Write`, not sockets. A frame is written from where it lies: its 64 bytes, its key and its body are
//! three slices of one `writev`; nothing is gathered in user space.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};

use crate::Flush;
use crate::frame::{HEADER_BYTES, Header, KEY_BYTES_MAX, Key, PAYLOAD_CEILING_BYTES};
use crate::tcp::{ConnectionError, SendError};

/// Frames written by one `writev`. Three slices each; Linux takes 1024 slices, 192 already cover 16 KiB of heads.
const FRAMES_PER_WRITE_MAX: usize = 64;

#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct OutboundStats {
    pub(crate) bytes: u64,
    pub(crate) writes: u64,
    pub(crate) frames: u64,
}

#[derive(Debug)]
struct Pending<Out> {
    head: [u8; HEADER_BYTES],
    key: Key,
    body: Out,
}

impl<Out: AsRef<[u8]>> Pending<Out> {
    fn len(&self) -> usize {
        HEADER_BYTES + self.key.len() + self.body.as_ref().len()
    }
}

#[derive(Debug)]
pub(crate) struct Outbound<Out> {
    frames_max: usize,
    bytes_max: u64,
    queue: VecDeque<Pending<Out>>,
    /// Bytes of the first frame that the kernel already has.
    written: usize,
    /// Bytes of all queued frames, `written` included.
    queued_bytes: u64,
    sent: VecDeque<Out>,
    broken: bool,
    pub(crate) stats: OutboundStats,
}

impl<Out: AsRef<[u8]>> Outbound<Out> {
    pub(crate) fn new(frames_max: usize, bytes_max: u64) -> Self {
        Outbound {
            frames_max,
            bytes_max,
            queue: VecDeque::new(),
            written: 0,
            queued_bytes: 0,
            sent: VecDeque::new(),
            broken: false,
            stats: OutboundStats::default(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Frames and bytes that wait for the kernel.
    pub(crate) fn backlog(&self) -> (usize, u64) {
        (self.queue.len(), self.queued_bytes - self.written as u64)
    }

    pub(crate) fn take_sent(&mut self) -> Option<Out> {
        self.sent.pop_front()
    }

    #[inline]
    pub(crate) fn send(
        &mut self,
        stream: Option<&mut dyn Write>,
        header: &Header,
        key: &[u8],
        body: Out,
    ) -> Result<(), SendError<Out>> {
        let body_bytes = body.as_ref().len();
        if key.len() > KEY_BYTES_MAX as usize {
            return Err(SendError::KeyTooLong(body));
        }
        if body_bytes as u64 > PAYLOAD_CEILING_BYTES {
            return Err(SendError::PayloadTooLong(body));
        }
        if self.broken {
            return Err(SendError::Closed(body));
        }
        let frame_bytes = HEADER_BYTES + key.len() + body_bytes;
        let full = !self.queue.is_empty() && self.queued_bytes + frame_bytes as u64 > self.bytes_max;
        if full || self.queue.len() + self.sent.len() >= self.frames_max {
            return Err(SendError::Backlogged(body));
        }
        #[expect(clippy::cast_possible_truncation, reason = "checked above to be at most KEY_BYTES_MAX")]
        let head = Header { key_bytes: key.len() as u32, payload_bytes: body_bytes as u64, ..*header }.encode();

        let mut written = 0;
        if self.queue.is_empty()
            && let Some(stream) = stream
        {
            let slices = [IoSlice::new(&head), IoSlice::new(key), IoSlice::new(body.as_ref())];
            match write(stream, &slices, &mut self.stats) {
                Ok(count) => written = count,
                Err(_) => {
                    // Said once, here; `receive` and `flush` fail from now on as well.
                    self.broken = true;
                    return Err(SendError::Closed(body));
                }
            }
        }
        if written == frame_bytes {
            self.stats.frames += 1;
            self.sent.push_back(body);
            return Ok(());
        }
        if self.queue.is_empty() {
            self.written = written;
        }
        self.queued_bytes += frame_bytes as u64;
        let key = Key::new(key).expect("its length was checked above");
        self.queue.push_back(Pending { head, key, body });
        Ok(())
    }

    /// Takes a frame back of which nothing is written yet: its body.
    pub(crate) fn withdraw(&mut self, kind: u8, call: u64) -> Option<Out> {
        let begun = usize::from(self.written > 0);
        let at = self.queue.iter().skip(begun).position(|pending| {
            let header = Header::decode(&pending.head, &crate::Limits::default()).expect("written by us");
            header.kind == kind && header.call == call
        })?;
        let pending = self.queue.remove(begun + at)?;
        self.queued_bytes -= pending.len() as u64;
        Some(pending.body)
    }

    pub(crate) fn flush(
        &mut self,
        stream: &mut dyn Write,
        done: &mut dyn FnMut(Out),
    ) -> Result<Flush, ConnectionError> {
        while let Some(body) = self.sent.pop_front() {
            done(body);
        }
        if self.broken {
            return Err(ConnectionError::Closed { mid_frame: self.written > 0 });
        }
        while !self.queue.is_empty() {
            let count = match self.write_some(stream) {
                Ok(count) => count,
                Err(error) => {
                    self.broken = true;
                    return Err(error.into());
                }
            };
            if count == 0 {
                return Ok(Flush::Blocked);
            }
            self.written += count;
            while let Some(first) = self.queue.front()
                && self.written >= first.len()
            {
                let first_bytes = first.len();
                self.written -= first_bytes;
                self.queued_bytes -= first_bytes as u64;
                self.stats.frames += 1;
                let first = self.queue.pop_front().expect("seen above");
                done(first.body);
            }
        }
        Ok(Flush::Done)
    }

    fn write_some(&mut self, stream: &mut dyn Write) -> io::Result<usize> {
        // One frame is the usual case, and clearing room for 64 of them (3 KiB) costs more than writing its three slices.
        if self.queue.len() == 1 {
            self.write_frames::<3>(stream)
        } else {
            self.write_frames::<{ 3 * FRAMES_PER_WRITE_MAX }>(stream)
        }
    }

    fn write_frames<const SLICES: usize>(&mut self, stream: &mut dyn Write) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut used = 0;
        let mut skip = self.written;
        for frame in self.queue.iter().take(SLICES / 3) {
            for piece in [&frame.head[..], frame.key.as_slice(), frame.body.as_ref()] {
                // Only the first frame is partly written; what is left of `skip` ends inside it.
                let piece_skip = skip.min(piece.len());
                skip -= piece_skip;
                if piece_skip < piece.len() {
                    slices[used] = IoSlice::new(&piece[piece_skip..]);
                    used += 1;
                }
            }
        }
        write(stream, &slices[..used], &mut self.stats)
    }

    /// Hands out every body still held: sent, half sent or waiting. Only before the connection is dropped.
    pub(crate) fn abandon(&mut self, done: &mut dyn FnMut(Out)) {
        self.broken = true;
        self.sent.drain(..).for_each(&mut *done);
        self.queue.drain(..).for_each(|pending| done(pending.body));
        self.queued_bytes = 0;
        self.written = 0;
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
        for (call, (key, payload)) in LENGTHS.into_iter().enumerate() {
            let key_bytes = u32::try_from(key).expect("a short key");
            bytes.extend_from_slice(&Header { key_bytes, payload_bytes: payload as u64, ..header(call) }.encode());
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
                let mut outbound = Outbound::new(100, 1 << 20);
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
        let mut outbound = Outbound::new(100, 1 << 20);
        outbound.send(None, &header(0), b"", vec![0]).expect("room");
        outbound.send(None, &header(1), b"", vec![1]).expect("room");
        assert!(matches!(outbound.flush(&mut Broken, &mut drop), Err(ConnectionError::Io(_))));
        assert!(matches!(outbound.send(None, &header(2), b"", vec![2]), Err(SendError::Closed(body)) if body == [2]));
        let mut back = Vec::new();
        outbound.abandon(&mut |body| back.push(body));
        assert_eq!(back, [[0], [1]]);
    }
}
