//! The payload of a small message, by value, in the shape in which the machine moves it cheapest.

use std::fmt;

use crate::pair::Pair;

/// Payload bytes that travel inside a descriptor. Longer ones travel as a block.
pub const INLINE_BYTES_MAX: usize = 40;

/// Words of the longest payload.
pub(crate) const INLINE_WORDS: usize = INLINE_BYTES_MAX / 8;

/// Up to [`INLINE_BYTES_MAX`] bytes by value.
#[derive(Copy, Clone)]
#[repr(C, align(16))]
pub struct Inline {
    /// Bytes 0..40, then the length as the last word.
    pairs: [Pair; 3],
}

impl Inline {
    /// No bytes.
    #[inline]
    pub fn empty() -> Self {
        Self { pairs: [Pair::new(0, 0); 3] }
    }

    /// A copy of `bytes`, or `None` if there are more than [`INLINE_BYTES_MAX`].
    #[inline(always)]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let (whole, rest) = bytes.as_chunks::<8>();
        let word = |at| match whole.get(at) {
            Some(word) => u64::from_le_bytes(*word),
            None if at == whole.len() => rest.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)),
            None => 0,
        };
        let pairs = [Pair::new(word(0), word(1)), Pair::new(word(2), word(3)), Pair::new(word(4), bytes.len() as u64)];
        (bytes.len() <= INLINE_BYTES_MAX).then_some(Self { pairs })
    }

    /// The words in pairs, and with the last of them `word` instead of the length.
    #[inline(always)]
    pub(crate) fn pairs_with(self, word: u64) -> [Pair; 3] {
        let [first, second, third] = self.pairs;
        [first, second, Pair::new(third.low(), word)]
    }

    /// As [`Inline::pairs_with`] gave them, of which `len` bytes are meant; not checked here.
    #[inline(always)]
    pub(crate) fn from_pairs([first, second, third]: [Pair; 3], len: u8) -> Self {
        Self { pairs: [first, second, Pair::new(third.low(), len.into())] }
    }

    /// How many bytes.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, clippy::missing_panics_doc, reason = "at most 40 by construction")]
    pub(crate) fn len(&self) -> u8 {
        self.pairs[2].high() as u8
    }

    /// The bytes.
    #[inline(always)]
    pub fn as_slice(&self) -> &[u8] {
        &zerocopy::IntoBytes::as_bytes(&self.pairs)[..usize::from(self.len())]
    }
}

impl PartialEq for Inline {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Inline {}

impl fmt::Debug for Inline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Inline").field(&self.as_slice()).finish()
    }
}
