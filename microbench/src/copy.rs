//! Shared-memory copy: a message through a shared buffer, copied in by one end and out by the other.
//!
//! Question  What does carrying bytes through shared memory cost when each side keeps its own copy?
//! Measures  round trip: copy in, pass the turn, copy out, copy in, pass it back, copy out. Not halved.
//! Load      closed loop, one message in flight; one buffer each way.
//! Excludes  mapping and first touch (pre-faulted).
//! Checks    sequence number and last byte of every answer; the first of a block whole.
//! Baseline  of channels that copy (pipe, socket, queue): the memory's own price. A hand-over by offset, as ours,
//!           does not copy and can be below it.

use std::io;

use crate::end::End;
use crate::turn::{FutexTurn, TURN_BYTES};

#[derive(Debug)]
pub(crate) struct CopyEnd {
    turn: FutexTurn,
    out_offset: usize,
    in_offset: usize,
}

impl CopyEnd {
    /// Bytes to map for messages of up to `message_bytes_max`.
    pub(crate) fn pages_bytes(message_bytes_max: usize) -> usize {
        TURN_BYTES + 2 * message_bytes_max.next_multiple_of(4096)
    }

    pub(crate) fn new(turn: FutexTurn, message_bytes_max: usize, is_asker: bool) -> Self {
        let (first, second) = (TURN_BYTES, TURN_BYTES + message_bytes_max.next_multiple_of(4096));
        let (out_offset, in_offset) = if is_asker { (first, second) } else { (second, first) };
        Self { turn, out_offset, in_offset }
    }
}

impl End for CopyEnd {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.turn.pages.copy_in(self.out_offset, message);
        self.turn.pass()
    }

    fn receive(&mut self, message: &mut [u8]) -> io::Result<()> {
        self.turn.await_turn()?;
        self.turn.pages.copy_out(self.in_offset, message);
        Ok(())
    }
}
