//! What workers print: their standard output and error, from pipes of ours to the log, each line with the worker's number before it.
//!
//! Whoever prints costs the others nothing that counts. A stream is read a piece at a time, a few streams a turn, and is not looked at for a
//! millisecond after each piece: until then nobody is told of it either, so that a flood wakes us a thousand times a second at most, and waits in
//! its pipe for the rest. Lines beyond the allowance of their worker are counted. The log drops what it has no room for.

mod lines;
mod log;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::PipeFlags;

use self::lines::{Allowance, ESCAPED_BYTES_MAX, LINE_BYTES_MAX, Splitter, write_escaped};
use self::log::Log;
pub use self::log::LogError;
use super::{Carrier, Interest, WorkerId};
use crate::config::ProcessConfig;

/// Tokens of the first stream's pipes, and then the second's.
pub(super) const TOKENS: [usize; 2] = [0x5000, 0x6000];
const NAMES: [&str; 2] = ["stdout", "stderr"];

/// Read from a stream at a time.
const PIECE_BYTES: usize = 16 << 10;
/// Streams that are read in one turn.
const PIECES_PER_TURN: usize = 4;
/// Between two pieces of a stream.
const REST_NS: u64 = 1_000_000;
/// Read from a stream whose worker is dead: what a pipe may hold without privilege (`fs.pipe-max-size`). What its children go on writing is nobody's.
const LAST_BYTES_MAX: usize = 1 << 20;
/// Lines that are shown of a worker's last second, whatever it printed before.
const LAST_LINES: usize = 64;

/// The longest that stands beside a line: `worker 63 pid 4194304 stdout: `, how many bytes are missing, and the time.
const BESIDE_BYTES: usize = 128;
const _: () = assert!(ESCAPED_BYTES_MAX * LINE_BYTES_MAX + BESIDE_BYTES <= 4096, "a line fits PIPE_BUF");

#[derive(Debug)]
pub(super) struct Printed {
    log: Log,
    lines_max: u32,
    /// By number.
    authors: Vec<Option<Author>>,
    piece: Box<[u8]>,
    due_ns: u64,
    /// Where the next turn begins, so that a few do not keep the others from being read.
    next: usize,
}

/// Who prints.
#[derive(Debug)]
struct Author {
    worker: WorkerId,
    pid: i32,
    streams: [Option<Stream>; 2],
    allowance: Allowance,
    /// The last of those lines that the allowance has dropped, by stream, each with the bytes that are missing: shown if it dies now.
    last: VecDeque<(usize, Vec<u8>, u64)>,
}

#[derive(Debug)]
struct Stream {
    pipe: OwnedFd,
    splitter: Splitter,
    /// When to look at it. `u64::MAX`: when there is something, which an event tells.
    due_ns: u64,
}

/// Both ends of a worker's streams.
#[derive(Debug)]
pub(super) struct Pipes {
    ours: [OwnedFd; 2],
    pub(super) theirs: [OwnedFd; 2],
}

impl Pipes {
    /// Ours do not block; theirs do, as a program expects of its output.
    pub(super) fn new() -> io::Result<Pipes> {
        let pipe = || -> io::Result<_> {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&read, true)?;
            Ok((read, write))
        };
        let ((out, out_theirs), (err, err_theirs)) = (pipe()?, pipe()?);
        Ok(Pipes { ours: [out, err], theirs: [out_theirs, err_theirs] })
    }
}

impl Printed {
    pub(super) fn new(config: &ProcessConfig) -> Result<Printed, LogError> {
        Ok(Printed {
            log: Log::new(config)?,
            lines_max: config.worker_log_lines_max,
            authors: (0..praas_shm::PARTICIPANTS_MAX).map(|_| None).collect(),
            piece: vec![0; PIECE_BYTES].into(),
            due_ns: u64::MAX,
            next: 0,
        })
    }

    /// When [`Printed::tend`] has something to do.
    pub(super) fn due_ns(&self) -> u64 {
        self.due_ns
    }

    /// A worker was started and prints into these. The ends that it has are closed.
    pub(super) fn begin(&mut self, worker: WorkerId, pid: i32, pipes: Pipes) {
        let streams = pipes.ours.map(|pipe| Some(Stream { pipe, splitter: Splitter::default(), due_ns: 0 }));
        let allowance = Allowance::new(self.lines_max);
        self.authors[usize::from(worker)] = Some(Author { worker, pid, streams, allowance, last: VecDeque::new() });
        self.due_ns = 0;
    }

    /// A stream has something, or has ended.
    pub(super) fn on_event(&mut self, worker: WorkerId, stream: usize, reactor: &mut Carrier) {
        let author = self.authors[usize::from(worker)].as_mut();
        // It may be of an earlier worker, or of one that is being looked at anyway.
        let Some(found) = author.and_then(|author| author.streams[stream].as_mut()) else { return };
        if found.due_ns == u64::MAX {
            reactor.unwatch(found.pipe.as_fd(), TOKENS[stream] + usize::from(worker));
            (found.due_ns, self.due_ns) = (0, 0);
        }
    }

    /// Reads a piece of each stream that is due, of a few of them, and tells of lines that were dropped.
    pub(super) fn tend(&mut self, now_ns: u64, reactor: &mut Carrier) {
        let Printed { log, authors, piece, .. } = self;
        let (mut due_ns, mut pieces, count) = (u64::MAX, 0, authors.len());
        let begin = self.next;
        for at in (begin..begin + count).map(|at| at % count) {
            let Some(author) = &mut authors[at] else { continue };
            for (stream, token) in TOKENS.into_iter().enumerate() {
                let Some(Stream { pipe, due_ns: at_ns, .. }) = &mut author.streams[stream] else { continue };
                if *at_ns <= now_ns && pieces < PIECES_PER_TURN {
                    (pieces, self.next) = (pieces + 1, (at + 1) % count);
                    match rustix::io::read(&*pipe, &mut piece[..]) {
                        Ok(bytes @ 1..) => {
                            *at_ns = now_ns + REST_NS;
                            author.read(stream, &piece[..bytes], |author, line, beyond| {
                                author.show(now_ns, log, stream, line, beyond);
                            });
                        }
                        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                            let token = token + usize::from(author.worker);
                            *at_ns = match reactor.watch(pipe.as_fd(), token, Interest::Read) {
                                Ok(()) => u64::MAX,
                                // For lack of memory: looked at now and then instead.
                                Err(_) => now_ns + 100 * REST_NS,
                            };
                        }
                        Ok(0) | Err(_) => author.close(now_ns, log, stream),
                    }
                }
                due_ns = due_ns.min(author.streams[stream].as_ref().map_or(u64::MAX, |stream| stream.due_ns));
            }
            if author.allowance.due_ns() <= now_ns {
                author.tell_dropped(log, 0);
            }
            due_ns = due_ns.min(author.allowance.due_ns());
        }
        self.due_ns = due_ns;
    }

    /// A worker is dead: what it printed last is shown, and who else holds its pipes writes into nothing.
    pub(super) fn end(&mut self, now_ns: u64, worker: WorkerId, reactor: &mut Carrier) {
        let Some(mut author) = self.authors[usize::from(worker)].take() else { return };
        for (stream, token) in TOKENS.into_iter().enumerate() {
            let Some(Stream { pipe, due_ns, .. }) = &author.streams[stream] else { continue };
            if *due_ns == u64::MAX {
                reactor.unwatch(pipe.as_fd(), token + usize::from(worker));
            }
            let mut left = LAST_BYTES_MAX;
            while let Some(Stream { pipe, .. }) = &author.streams[stream]
                && let Ok(bytes @ 1..) = rustix::io::read(pipe, &mut self.piece[..PIECE_BYTES.min(left)])
            {
                left -= bytes;
                author.read(stream, &self.piece[..bytes], |author, line, beyond| {
                    author.show(now_ns, &mut self.log, stream, line, beyond);
                });
            }
            author.close(now_ns, &mut self.log, stream);
        }
        let last = std::mem::take(&mut author.last);
        author.tell_dropped(&mut self.log, last.len() as u64);
        for (stream, line, beyond) in last {
            author.write(&mut self.log, stream, &line, beyond);
        }
    }
}

impl Author {
    /// Takes what a stream brought, a line at a time.
    fn read(&mut self, stream: usize, bytes: &[u8], mut line: impl FnMut(&mut Author, &[u8], u64)) {
        let Some(mut splitter) = self.streams[stream].as_mut().map(|stream| std::mem::take(&mut stream.splitter))
        else {
            return;
        };
        splitter.take(bytes, |text, beyond| line(self, text, beyond));
        if let Some(stream) = &mut self.streams[stream] {
            stream.splitter = splitter;
        }
    }

    /// Nothing more comes of a stream: its last line needs no end.
    fn close(&mut self, now_ns: u64, log: &mut Log, stream: usize) {
        if let Some(mut closed) = self.streams[stream].take() {
            closed.splitter.finish(|line, beyond| self.show(now_ns, log, stream, line, beyond));
        }
    }

    /// Shows a line if there may be one more.
    fn show(&mut self, now_ns: u64, log: &mut Log, stream: usize, line: &[u8], beyond: u64) {
        if self.allowance.due_ns() <= now_ns {
            self.tell_dropped(log, 0);
        }
        if self.allowance.take(now_ns) {
            return self.write(log, stream, line, beyond);
        }
        let first = if self.last.len() < LAST_LINES { None } else { self.last.pop_front() };
        let mut kept = first.map_or_else(Vec::new, |(_, kept, _)| kept);
        kept.clear();
        kept.extend_from_slice(line);
        self.last.push_back((stream, kept, beyond));
    }

    fn write(&self, log: &mut Log, stream: usize, line: &[u8], beyond: u64) {
        use std::fmt::Write;
        log.line(|text| {
            let _ = write!(text, "worker {} pid {} {}: ", self.worker, self.pid, NAMES[stream]);
            write_escaped(text, line);
            if beyond > 0 {
                let _ = write!(text, " [and {beyond} bytes]");
            }
        });
    }

    /// Tells how many lines were dropped; not of those that are shown after all.
    fn tell_dropped(&mut self, log: &mut Log, shown: u64) {
        use std::fmt::Write;
        self.last.clear();
        let (dropped, lines_max) = (self.allowance.take_dropped() - shown, self.allowance.lines_max());
        if dropped > 0 {
            log.line(|text| {
                let _ = write!(
                    text,
                    "worker {} pid {}: {dropped} lines dropped, more than {lines_max} a second (--worker-log-lines-max)",
                    self.worker, self.pid
                );
            });
        }
    }
}
