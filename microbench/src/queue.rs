//! POSIX message queues, 10 messages of 8192 bytes: the paper's channel, bare.
//!
//! Question  What does a message and its echo cost through two queues, chunked when it is longer than a record?
//! Measures  round trip, not halved. Chunks of up to 8192 bytes and nothing else: no header, no reassembly state.
//! Load      closed loop, one message in flight.
//! Excludes  creating the queues, first touch of the private buffers.
//! Checks    sequence number and last byte of every answer; the first of a block whole.
//! Baseline  of a local invocation over queues, which makes four hops where this makes two: `queue_pair` samples
//!           are two round trips in a row.

use std::io;
use std::os::fd::AsFd;

use anyhow::{Result, anyhow};
use rustix::event::PollFlags;

use crate::end::{End, until_ready};
use crate::placement::Wait;
use crate::raw::MessageQueue;

/// The paper's shape, and the most an unprivileged user may ask for by default.
pub(crate) const RECORDS: u32 = 10;
pub(crate) const RECORD_BYTES: u32 = 8192;

#[derive(Debug)]
pub(crate) struct QueueEnd {
    pub(crate) out: MessageQueue,
    pub(crate) inward: MessageQueue,
    pub(crate) wait: Wait,
    /// `mq_receive` wants room for a whole record, even for the last and shorter one.
    pub(crate) last_record: Box<[u8; RECORD_BYTES as usize]>,
}

impl QueueEnd {
    pub(crate) fn new(out: MessageQueue, inward: MessageQueue, wait: Wait) -> Self {
        Self { out, inward, wait, last_record: Box::new([0; RECORD_BYTES as usize]) }
    }
}

impl End for QueueEnd {
    #[inline]
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        for record in message.chunks(RECORD_BYTES as usize) {
            until_ready(self.wait, self.out.as_fd(), PollFlags::OUT, || self.out.send(record))?;
        }
        Ok(())
    }

    #[inline]
    fn receive(&mut self, message: &mut [u8]) -> io::Result<()> {
        for record in message.chunks_mut(RECORD_BYTES as usize) {
            let whole = record.len() == RECORD_BYTES as usize;
            let room = if whole { &mut *record } else { &mut self.last_record[..] };
            let got = until_ready(self.wait, self.inward.as_fd(), PollFlags::IN, || self.inward.receive(room))?;
            if got != record.len() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a record of {got} B where {} B were due", record.len()),
                ));
            }
            if !whole {
                record.copy_from_slice(&self.last_record[..got]);
            }
        }
        Ok(())
    }
}

/// Creates one queue, or says which limit is in the way.
pub(crate) fn create(wait: Wait) -> Result<MessageQueue> {
    MessageQueue::create(RECORDS, RECORD_BYTES, wait != Wait::Efficient).map_err(|error| {
        let fix = match error.raw_os_error() {
            Some(libc::EMFILE) => "this user's queues are full: end other users of POSIX queues, or raise `ulimit -q`",
            Some(libc::EINVAL) => "raise /proc/sys/fs/mqueue/msg_max to 10 and msgsize_max to 8192",
            Some(libc::ENOSPC) => "raise /proc/sys/fs/mqueue/queues_max",
            Some(libc::ENOSYS) => "this kernel has no POSIX message queues",
            _ => "see mq_open(3)",
        };
        anyhow!("no POSIX queue of {RECORDS} x {RECORD_BYTES} B: {error}; {fix}")
    })
}
