//! One end of a raw channel, and the two loops that make a ping-pong of it.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags};

use crate::placement::{SPIN_BUDGET, Wait};

/// Carries whole messages of a length both ends know. Waiting is the end's business and follows its wait mode.
pub(crate) trait End {
    fn send(&mut self, message: &[u8]) -> io::Result<()>;
    /// Fills all of `message`.
    fn receive(&mut self, message: &mut [u8]) -> io::Result<()>;
}

/// Private buffers of the asking end, kept between blocks so that no sample pays for a page fault.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    question: Vec<u8>,
    answer: Vec<u8>,
}

/// Sends and awaits `samples * trips_per_sample` messages, one in flight, and appends one time per sample.
///
/// The clock is read once per sample: the end of one is the start of the next, so the stamping and checking of a
/// message and one clock read (`machine.json` says what it costs) are part of every sample, here as in `invoke`.
/// Every answer is checked for sequence number and last byte; the first of a block is compared whole.
pub(crate) fn ping<E: End>(
    end: &mut E,
    messages: &mut Messages,
    block: Block,
    sequence: &mut u64,
    samples_ns: &mut Vec<u64>,
) -> Result<()> {
    messages.question.resize(block.bytes, 0xA5);
    messages.answer.resize(block.bytes, 0);
    messages.question.truncate(block.bytes);
    messages.answer.truncate(block.bytes);
    let (question, answer) = (&mut messages.question[..], &mut messages.answer[..]);
    samples_ns.reserve(block.samples);

    let mut before = Instant::now();
    for sample in 0..block.samples {
        for _ in 0..block.trips_per_sample {
            *sequence += 1;
            stamp(question, *sequence);
            end.send(question).context("send")?;
            end.receive(answer).context("receive")?;
            ensure!(
                is_stamped(answer, *sequence),
                "wrong answer: message {sequence} of {} B came back with another sequence number or last byte",
                block.bytes
            );
        }
        let after = Instant::now();
        samples_ns.push(nanoseconds(before, after));
        before = after;
        if sample == 0 {
            ensure!(
                question == answer,
                "wrong answer: the first {} B message of a block came back changed",
                block.bytes
            );
            before = Instant::now();
        }
    }
    Ok(())
}

/// Returns every message to its sender, `rounds` times.
pub(crate) fn pong<E: End>(end: &mut E, message: &mut Vec<u8>, bytes: usize, rounds: u64) -> io::Result<()> {
    message.resize(bytes, 0);
    message.truncate(bytes);
    for _ in 0..rounds {
        end.receive(message)?;
        end.send(message)?;
    }
    Ok(())
}

/// What one call of [`ping`] does.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Block {
    pub(crate) bytes: usize,
    pub(crate) samples: usize,
    /// 2 where the thing compared makes four hops (a local invocation over queues), else 1.
    pub(crate) trips_per_sample: u32,
}

/// Writes the sequence number to the front of a message and its low byte to the end.
#[inline]
pub(crate) fn stamp(message: &mut [u8], sequence: u64) {
    if let Some(front) = message.first_chunk_mut::<8>() {
        *front = sequence.to_le_bytes();
    }
    if message.len() > 8
        && let Some(last) = message.last_mut()
    {
        *last = sequence.to_le_bytes()[0];
    }
}

/// Whether `message` carries this stamp.
#[inline]
pub(crate) fn is_stamped(message: &[u8], sequence: u64) -> bool {
    let bytes = sequence.to_le_bytes();
    match message.first_chunk::<8>() {
        Some(front) if message.len() > 8 => *front == bytes && message.last() == Some(&bytes[0]),
        Some(front) => *front == bytes,
        None => false,
    }
}

pub(crate) fn nanoseconds(before: Instant, after: Instant) -> u64 {
    u64::try_from(after.saturating_duration_since(before).as_nanos()).unwrap_or(u64::MAX)
}

/// Repeats `attempt` on a descriptor until it does not answer "would block", as the wait mode says.
///
/// `latency` and `balanced` expect a non-blocking descriptor, `efficient` a blocking one (the block *is* the
/// attempt).
#[inline]
pub(crate) fn until_ready<T>(
    wait: Wait,
    fd: BorrowedFd<'_>,
    direction: PollFlags,
    attempt: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let spin_budget = if wait == Wait::Latency { None } else { Some(SPIN_BUDGET) };
    until_ready_within(spin_budget, fd, direction, attempt)
}

/// The same with a budget of its own: after so long without success it sleeps; `None` never does.
#[inline]
pub(crate) fn until_ready_within<T>(
    spin_budget: Option<Duration>,
    fd: BorrowedFd<'_>,
    direction: PollFlags,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let mut spin_ends: Option<Instant> = None;
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => match spin_budget {
                None => std::hint::spin_loop(),
                Some(spin_budget) => {
                    let now = Instant::now();
                    if now >= *spin_ends.get_or_insert(now + spin_budget) {
                        rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, direction)], None)?;
                        spin_ends = None;
                    }
                }
            },
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An end whose peer answers at once, wrongly from the nth message on.
    struct Mirror {
        held: Vec<u8>,
        sent: u64,
        wrong_from: u64,
    }

    impl End for Mirror {
        fn send(&mut self, message: &[u8]) -> io::Result<()> {
            self.held = message.to_vec();
            self.sent += 1;
            Ok(())
        }
        fn receive(&mut self, message: &mut [u8]) -> io::Result<()> {
            message.copy_from_slice(&self.held);
            if self.sent >= self.wrong_from {
                *message.last_mut().unwrap() ^= 1;
            }
            Ok(())
        }
    }

    fn run(bytes: usize, wrong_from: u64) -> Result<Vec<u64>> {
        let mut samples = Vec::new();
        let mut end = Mirror { held: Vec::new(), sent: 0, wrong_from };
        let block = Block { bytes, samples: 10, trips_per_sample: 2 };
        ping(&mut end, &mut Messages::default(), block, &mut 0, &mut samples)?;
        Ok(samples)
    }

    /// B2: a benchmark that gets a wrong answer fails.
    #[test]
    fn b2_a_wrong_last_byte_fails_the_run_whatever_the_size() {
        for bytes in [8, 9, 10, 64, 8192] {
            assert_eq!(run(bytes, u64::MAX).unwrap().len(), 10);
            assert!(run(bytes, 13).unwrap_err().to_string().starts_with("wrong answer"));
        }
    }

    #[test]
    fn a_stamp_is_found_only_where_it_was_put() {
        let mut message = [0; 10];
        stamp(&mut message, 0x0102);
        assert!(is_stamped(&message, 0x0102));
        assert!(!is_stamped(&message, 0x0103));
        assert!(!is_stamped(&[0; 4], 0));
    }
}
