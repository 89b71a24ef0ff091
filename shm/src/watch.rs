//! A watch on one word of a peer: what a spinning participant looks at while it waits.
//!
//! Checking whether a whole channel is ready takes a dozen instructions; most looks find that nothing has changed. A watch is
//! one load and one comparison, and what it sees is a hint: look before, watch, then look at the channel itself.

use crate::sync::{AtomicU64, Ordering};

/// One word, and what it was when the watch began.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    word: &'a AtomicU64,
    seen: u64,
}

impl<'a> Watch<'a> {
    #[inline(always)]
    pub(crate) fn on(word: &'a AtomicU64) -> Self {
        Self { word, seen: word.load(Ordering::Relaxed) }
    }

    /// Whether the word is another one now. No edge: the look at the channel that follows has it.
    #[inline(always)]
    pub fn changed(&self) -> bool {
        self.word.load(Ordering::Relaxed) != self.seen
    }
}

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("seen", &self.seen).finish_non_exhaustive()
    }
}
