//! The raw channels a floor can stand on, and a pair of processes joined by one.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use serde::{Deserialize, Serialize};

use crate::copy::CopyEnd;
use crate::end::{self, Block, Messages};
use crate::line::{LINES_BYTES, LineEnd, Lines};
use crate::peer::{Order, Peer};
use crate::placement::{Placement, Wait, pin};
use crate::queue::{self, QueueEnd};
use crate::raw::{MessageQueue, SharedPages};
use crate::redis::RedisEnd;
use crate::stream::{self, StreamEnd};
use crate::turn::{EventEnd, FutexTurn, TURN_BYTES};

/// A way for two processes to exchange messages with nothing of ours in between.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum Channel {
    /// Cache-line ping-pong, each end writes its own line.
    TwoLines,
    /// Cache-line ping-pong, both ends write the same line.
    OneLine,
    /// Two eventfds.
    Eventfd,
    /// A futex each way.
    Futex,
    /// Two pipes.
    Pipe,
    /// Unix stream socket.
    UnixStream,
    /// Two POSIX queues, 10 x 8192 B, chunked.
    PosixQueue,
    /// Copy in, flag, copy out, through shared memory.
    SharedCopy,
    /// TCP over loopback, `TCP_NODELAY`, reno.
    Tcp,
}

impl Channel {
    pub(crate) const ALL: [Channel; 9] = [
        Channel::TwoLines,
        Channel::OneLine,
        Channel::Eventfd,
        Channel::Futex,
        Channel::SharedCopy,
        Channel::Pipe,
        Channel::UnixStream,
        Channel::PosixQueue,
        Channel::Tcp,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Channel::TwoLines => "two_lines",
            Channel::OneLine => "one_line",
            Channel::Eventfd => "eventfd",
            Channel::Futex => "futex",
            Channel::Pipe => "pipe",
            Channel::UnixStream => "unix_stream",
            Channel::PosixQueue => "posix_queue",
            Channel::SharedCopy => "shared_copy",
            Channel::Tcp => "tcp",
        }
    }

    /// Carries eight bytes and nothing else: a line, or a turn.
    pub(crate) fn is_a_word(self) -> bool {
        matches!(self, Channel::TwoLines | Channel::OneLine | Channel::Eventfd | Channel::Futex)
    }

    /// Whether this wait mode says something of its own here: a line is only ever spun on, and a futex that is
    /// never slept on is a line.
    pub(crate) fn supports(self, wait: Wait) -> bool {
        match self {
            Channel::TwoLines | Channel::OneLine => wait == Wait::Latency,
            Channel::Futex => wait != Wait::Latency,
            _ => true,
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One end of any channel; matched once per block, so the loops stay concrete.
#[derive(Debug)]
pub(crate) enum AnyEnd {
    Line(LineEnd),
    Event(EventEnd),
    Futex(FutexTurn),
    Stream(StreamEnd),
    Queue(QueueEnd),
    Copy(CopyEnd),
    /// No floor: what a message costs through Redis.
    Redis(RedisEnd),
}

impl AnyEnd {
    /// The asking end, and the descriptors with which the peer joins.
    fn create(channel: Channel, wait: Wait, bytes_max: usize) -> Result<(Self, Vec<OwnedFd>)> {
        let pages_bytes = match channel {
            Channel::TwoLines | Channel::OneLine => LINES_BYTES,
            Channel::Futex => TURN_BYTES,
            Channel::SharedCopy => CopyEnd::pages_bytes(bytes_max),
            Channel::Eventfd => {
                let flags = if wait == Wait::Efficient {
                    EventfdFlags::CLOEXEC
                } else {
                    EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK
                };
                let (out, inward) = (rustix::event::eventfd(0, flags)?, rustix::event::eventfd(0, flags)?);
                let theirs = vec![inward.try_clone()?, out.try_clone()?];
                return Ok((Self::Event(EventEnd { out, inward, wait }), theirs));
            }
            Channel::Pipe => {
                let (our_in, their_out) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                let (their_in, our_out) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                return Ok((Self::Stream(StreamEnd::new(our_out, our_in, wait)?), vec![their_out, their_in]));
            }
            Channel::UnixStream => {
                let (ours, theirs) =
                    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
                return Ok((Self::Stream(StreamEnd::of_socket(ours, wait)?), vec![theirs]));
            }
            Channel::Tcp => {
                let (ours, theirs) = stream::tcp_pair()?;
                return Ok((Self::Stream(StreamEnd::of_socket(ours, wait)?), vec![theirs]));
            }
            Channel::PosixQueue => {
                let (out, inward) = (queue::create(wait)?, queue::create(wait)?);
                let theirs = vec![inward.as_fd().try_clone_to_owned()?, out.as_fd().try_clone_to_owned()?];
                return Ok((Self::Queue(QueueEnd::new(out, inward, wait)), theirs));
            }
        };
        let memfd = rustix::fs::memfd_create("praas-floor", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memfd, pages_bytes as u64)?;
        Ok((Self::over_memory(channel, wait, bytes_max, &memfd, pages_bytes, true)?, vec![memfd]))
    }

    /// The answering end, made of what [`Self::create`] gave away.
    pub(crate) fn join(channel: Channel, wait: Wait, bytes_max: usize, fds: Vec<OwnedFd>) -> Result<Self> {
        let mut fds = fds.into_iter();
        let mut next = || fds.next().context("a descriptor of the floor is missing");
        match channel {
            Channel::TwoLines | Channel::OneLine | Channel::Futex | Channel::SharedCopy => {
                let memfd = next()?;
                let pages_bytes = usize::try_from(rustix::fs::fstat(&memfd)?.st_size)?;
                Self::over_memory(channel, wait, bytes_max, &memfd, pages_bytes, false)
            }
            Channel::Eventfd => Ok(Self::Event(EventEnd { out: next()?, inward: next()?, wait })),
            Channel::Pipe => Ok(Self::Stream(StreamEnd::new(next()?, next()?, wait)?)),
            Channel::UnixStream | Channel::Tcp => Ok(Self::Stream(StreamEnd::of_socket(next()?, wait)?)),
            Channel::PosixQueue => {
                let (out, inward) = (MessageQueue::from_fd(next()?), MessageQueue::from_fd(next()?));
                Ok(Self::Queue(QueueEnd::new(out, inward, wait)))
            }
        }
    }

    fn over_memory(
        channel: Channel,
        wait: Wait,
        bytes_max: usize,
        memfd: &OwnedFd,
        pages_bytes: usize,
        is_asker: bool,
    ) -> Result<Self> {
        let pages = SharedPages::map(memfd.as_fd(), pages_bytes).context("map the floor's memory")?;
        Ok(match channel {
            Channel::TwoLines => Self::Line(LineEnd::new(pages, Lines::TWO, is_asker)),
            Channel::OneLine => Self::Line(LineEnd::new(pages, Lines::ONE, is_asker)),
            Channel::SharedCopy => Self::Copy(CopyEnd::new(FutexTurn::new(pages, wait, is_asker), bytes_max, is_asker)),
            _ => Self::Futex(FutexTurn::new(pages, wait, is_asker)),
        })
    }

    fn ping(
        &mut self,
        messages: &mut Messages,
        block: Block,
        sequence: &mut u64,
        samples_ns: &mut Vec<u64>,
    ) -> Result<()> {
        match self {
            Self::Line(end) => end::ping(end, messages, block, sequence, samples_ns),
            Self::Event(end) => end::ping(end, messages, block, sequence, samples_ns),
            Self::Futex(end) => end::ping(end, messages, block, sequence, samples_ns),
            Self::Stream(end) => end::ping(end, messages, block, sequence, samples_ns),
            Self::Queue(end) => end::ping(end, messages, block, sequence, samples_ns),
            Self::Copy(end) => end::ping(end, messages, block, sequence, samples_ns),
            Self::Redis(end) => end::ping(end, messages, block, sequence, samples_ns),
        }
    }

    pub(crate) fn pong(&mut self, message: &mut Vec<u8>, bytes: usize, rounds: u64) -> io::Result<()> {
        match self {
            Self::Line(end) => end::pong(end, message, bytes, rounds),
            Self::Event(end) => end::pong(end, message, bytes, rounds),
            Self::Futex(end) => end::pong(end, message, bytes, rounds),
            Self::Stream(end) => end::pong(end, message, bytes, rounds),
            Self::Queue(end) => end::pong(end, message, bytes, rounds),
            Self::Copy(end) => end::pong(end, message, bytes, rounds),
            Self::Redis(end) => end::pong(end, message, bytes, rounds),
        }
    }
}

/// This process and a peer, joined by a channel.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) channel: Channel,
    pub(crate) placement: Placement,
    end: AnyEnd,
    peer: Peer,
    messages: Messages,
    sequence: u64,
    bytes_max: usize,
}

impl Pair {
    /// Starts the peer on its core. Messages may be up to `bytes_max` long.
    pub(crate) fn open(channel: Channel, wait: Wait, placement: Placement, bytes_max: usize) -> Result<Self> {
        let describe = || format!("floor {channel}, {wait}");
        let (end, theirs) = AnyEnd::create(channel, wait, bytes_max).with_context(describe)?;
        let join = Order::Join { channel, wait, core: placement.theirs, bytes_max };
        let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
        let peer = Peer::spawn(&join, &fds).with_context(describe)?;
        Ok(Self { channel, placement, end, peer, messages: Messages::default(), sequence: 0, bytes_max })
    }

    /// One block of round trips; appends its samples. Pins the calling thread to the pair's core.
    pub(crate) fn run(&mut self, block: Block, samples_ns: &mut Vec<u64>) -> Result<()> {
        ensure!(block.bytes <= self.bytes_max && block.bytes >= 8, "message of {} B", block.bytes);
        pin(&[self.placement.ours])?;
        self.peer.serve(block.bytes, block.samples as u64 * u64::from(block.trips_per_sample))?;
        self.end
            .ping(&mut self.messages, block, &mut self.sequence, samples_ns)
            .with_context(|| format!("floor {}, {} B", self.channel, block.bytes))?;
        self.peer.expect_done()
    }
}
