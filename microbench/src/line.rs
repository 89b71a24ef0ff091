//! Cache-line ping-pong: the cheapest answer two cores can give each other.
//!
//! Question  What does one line cost to go to the other core and come back, with no system call and no payload?
//! Measures  round trip of an 8-byte sequence number, not halved; clock read in one process only.
//! Load      closed loop, one message in flight, both ends spinning on two cores.
//! Excludes  mapping and first touch (pre-faulted), wake-ups (nobody sleeps).
//! Checks    the peer returns the sequence number; every one is compared.
//! Baseline  of a leased local invocation: *two lines* for the rings (each end writes its own line, as the law
//!           asks), *one line* for the exchange line (both ends write words of the same line).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::end::End;
use crate::raw::SharedPages;

/// Which word of the shared mapping each side writes, by byte offset.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Lines {
    asker: usize,
    answerer: usize,
}

impl Lines {
    /// A page each, and not at the same offset within it: far from any prefetcher's idea of a neighbour.
    pub(crate) const TWO: Lines = Lines { asker: 0, answerer: 4096 + 256 };
    /// Two words of one 64-byte line.
    pub(crate) const ONE: Lines = Lines { asker: 0, answerer: 8 };
}

/// Bytes both ends map.
pub(crate) const LINES_BYTES: usize = 8192;

#[derive(Debug)]
pub(crate) struct LineEnd {
    pages: SharedPages,
    mine: usize,
    theirs: usize,
    seen: u64,
}

impl LineEnd {
    pub(crate) fn new(pages: SharedPages, lines: Lines, is_asker: bool) -> Self {
        let (mine, theirs) = if is_asker { (lines.asker, lines.answerer) } else { (lines.answerer, lines.asker) };
        Self { pages, mine, theirs, seen: 0 }
    }
}

impl End for LineEnd {
    #[inline]
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let Some(bytes) = message.first_chunk::<8>() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // sent (release): pairs with the acquire in the peer's `receive`.
        self.pages.word(self.mine).store(u64::from_le_bytes(*bytes), Ordering::Release);
        Ok(())
    }

    #[inline]
    fn receive(&mut self, message: &mut [u8]) -> io::Result<()> {
        let Some(bytes) = message.first_chunk_mut::<8>() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.seen = next(self.pages.word(self.theirs), self.seen);
        *bytes = self.seen.to_le_bytes();
        Ok(())
    }
}

/// Spins until the word differs from what was last seen in it.
#[inline]
fn next(word: &AtomicU64, last: u64) -> u64 {
    loop {
        // received (acquire): pairs with the release in the peer's `send`.
        let value = word.load(Ordering::Acquire);
        if value != last {
            return value;
        }
        std::hint::spin_loop();
    }
}
