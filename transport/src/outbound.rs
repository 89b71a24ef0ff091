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
        let mut slices = [IoSlice::new(&[]); 3 * FRAMES_PER_WRITE_MAX];
        let mut used = 0;
        let mut skip = self.written;
        for frame in self.queue.iter().take(FRAMES_PER_WRITE_MAX) {
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
