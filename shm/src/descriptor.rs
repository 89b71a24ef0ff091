//! The descriptor: 64 bytes, one cache line, that say everything about one message.
//!
//! | word | bits   | field                                                                        |
//! |-----:|--------|------------------------------------------------------------------------------|
//! |    0 | 0..32  | stamp: which lap of the ring wrote it; not part of the message               |
//! |    0 | 32..40 | `kind`                                                                       |
//! |    0 | 40..48 | inline length `0..=40`, or `0xFF`: the body is a block                       |
//! |    0 | 48..64 | `tag`                                                                        |
//! |    1 | all    | `id`                                                                         |
//! |    2 | all    | `aux`                                                                        |
//! | 3..8 | all    | inline: 40 bytes; what lies beyond the inline length is stale and means nothing |
//! |    3 | all    | block: `offset`, bytes from the start of the owner's arena                   |
//! |    4 | all    | block: `len`, bytes                                                          |
//! |    5 | 0..32  | block: `index` in the owner's ledger                                         |
//! |    5 | 32..64 | block: `generation` of that index                                            |
//! |    6 | all    | block: `owner`, `0..64`                                                      |
//! |    7 | all    | block: reserved, zero, checked                                               |
//!
//! Words are little-endian. What `kind`, `tag`, `id` and `aux` mean is for the layer above.

use std::fmt;

use crate::inline::{INLINE_BYTES_MAX, INLINE_WORDS, Inline};
use crate::pair::Pair;
use crate::participant::ParticipantId;
use crate::width::low_half;

/// Words of a descriptor.
pub const DESCRIPTOR_WORDS: usize = 8;

/// The inline length that says "the body is a block".
const BODY_IS_A_BLOCK: u8 = 0xFF;
/// The first word of the body.
const BODY_WORD: usize = 3;

const _: () = assert!(INLINE_WORDS == DESCRIPTOR_WORDS - BODY_WORD);

/// One message between two participants: eight words that were checked, or that we made.
#[derive(Copy, Clone)]
#[repr(C)]
pub struct Descriptor {
    /// Word 0 with a stamp of zero, and the id.
    head: Pair,
    /// The body, and `aux` as the last word.
    body: [Pair; 3],
}

/// The payload of a descriptor.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Body {
    /// Up to [`INLINE_BYTES_MAX`] bytes, here.
    Inline(Inline),
    /// Bytes in somebody's arena.
    Block(BlockRef),
}

/// Where a block lies: a message *about* the owner's ledger, believed by nobody before it is checked.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub struct BlockRef {
    /// Bytes from the start of the owner's arena, a multiple of 64.
    pub offset: u64,
    /// Bytes of payload.
    pub len: u64,
    /// The block's entry in the owner's ledger.
    pub index: u32,
    /// Which use of that entry; an older one is stale.
    pub generation: u32,
    /// Whose arena.
    pub owner: ParticipantId,
}

/// Eight words that are not a descriptor. Small and `Copy`: a hostile peer makes as many as it likes.
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadDescriptor {
    /// Neither an inline length nor the mark of a block.
    #[error("inline length {claimed} is over {INLINE_BYTES_MAX} and is not the mark of a block")]
    InlineLength {
        /// What the word says.
        claimed: u8,
    },
    /// No participant has this number.
    #[error("block owner {claimed} is no participant")]
    Owner {
        /// What the word says.
        claimed: u64,
    },
    /// A reserved word is not zero.
    #[error("reserved word is {found:#x}, not zero")]
    Reserved {
        /// What the word says.
        found: u64,
    },
    /// An exchange line jumped: its next request must carry the next sequence.
    #[error("exchange sequence {found}, expected {expected}")]
    Sequence {
        /// What the word says.
        found: u32,
        /// The only one that may follow.
        expected: u32,
    },
}

impl From<Inline> for Body {
    #[inline(always)]
    fn from(inline: Inline) -> Self {
        Self::Inline(inline)
    }
}

impl From<BlockRef> for Body {
    #[inline(always)]
    fn from(block: BlockRef) -> Self {
        Self::Block(block)
    }
}

impl Descriptor {
    /// A message. What `kind`, `tag`, `id` and `aux` mean belongs to the layer above.
    #[inline(always)]
    pub fn new(kind: u8, tag: u16, id: u64, aux: u64, body: impl Into<Body>) -> Self {
        let (length, body) = match body.into() {
            Body::Inline(inline) => (inline.len(), inline.pairs_with(aux)),
            Body::Block(block) => {
                let identity = u64::from(block.index) | u64::from(block.generation) << 32;
                let owner = u64::from(block.owner.get());
                (BODY_IS_A_BLOCK, [Pair::new(block.offset, block.len), Pair::new(identity, owner), Pair::new(0, aux)])
            }
        };
        Self { head: Pair::new(u64::from(kind) << 32 | u64::from(length) << 40 | u64::from(tag) << 48, id), body }
    }

    /// A message without a body.
    #[inline]
    pub fn bare(kind: u8, tag: u16, id: u64, aux: u64) -> Self {
        Self::new(kind, tag, id, aux, Inline::empty())
    }

    /// What sort of message.
    #[inline(always)]
    pub fn kind(&self) -> u8 {
        self.head.low().to_le_bytes()[4]
    }

    /// A small operand of the kind.
    #[inline(always)]
    pub fn tag(&self) -> u16 {
        let [.., low, high] = self.head.low().to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// Which call, or whatever the kind says.
    #[inline(always)]
    pub fn id(&self) -> u64 {
        self.head.high()
    }

    /// One more operand.
    #[inline(always)]
    pub fn aux(&self) -> u64 {
        self.body[2].high()
    }

    #[inline(always)]
    fn length(&self) -> u8 {
        self.head.low().to_le_bytes()[5]
    }

    /// The payload, if it is here.
    #[inline(always)]
    pub fn inline(&self) -> Option<Inline> {
        let length = self.length();
        (length != BODY_IS_A_BLOCK).then(|| Inline::from_pairs(self.body, length))
    }

    /// The block that is or holds the payload, if there is one. A claim: its owner says whether it exists.
    #[inline]
    pub fn block(&self) -> Option<BlockRef> {
        let [first, second, _] = self.body;
        (self.length() == BODY_IS_A_BLOCK).then(|| BlockRef {
            offset: first.low(),
            len: first.high(),
            index: low_half(second.low()),
            generation: low_half(second.low() >> 32),
            owner: ParticipantId::from_word(second.high()).expect("checked when it was decoded"),
        })
    }

    /// The payload, or where it lies.
    #[inline]
    pub fn body(&self) -> Body {
        match self.block() {
            Some(block) => Body::Block(block),
            None => Body::Inline(Inline::from_pairs(self.body, self.length())),
        }
    }

    /// The same with another `tag`.
    #[must_use]
    pub fn with_tag(self, tag: u16) -> Self {
        Self::new(self.kind(), tag, self.id(), self.aux(), self.body())
    }

    /// The eight words, with a stamp of zero.
    #[inline]
    pub fn encode(&self) -> [u64; DESCRIPTOR_WORDS] {
        let mut words = [0; DESCRIPTOR_WORDS];
        words[0] = self.head_word(0);
        words[1] = self.id();
        self.store_rest(|at, word| words[at] = word);
        words
    }

    /// Checks and copies eight words; the stamp is ignored.
    ///
    /// # Errors
    /// [`BadDescriptor`] names the rule that the words break. Whether a block exists is for its owner to say.
    #[inline]
    pub fn decode(words: &[u64; DESCRIPTOR_WORDS]) -> Result<Self, BadDescriptor> {
        Self::decode_with(words[0], words[1], |at| words[at])
    }

    /// The same as 64 little-endian bytes, for channels that carry bytes.
    pub fn to_bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.encode()) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`Descriptor::to_bytes`] wrote.
    ///
    /// # Errors
    /// As [`Descriptor::decode`].
    pub fn from_bytes(bytes: &[u8; 64]) -> Result<Self, BadDescriptor> {
        let (words, _) = bytes.as_chunks::<8>();
        Self::decode(&std::array::from_fn(|at| u64::from_le_bytes(words[at])))
    }

    /// Word 0: the word that publishes the rest.
    #[inline(always)]
    pub(crate) fn head_word(&self, stamp: u32) -> u64 {
        self.head.low() | u64::from(stamp)
    }

    /// Gives words 2..8 to `store`, those that the body needs and no others.
    #[inline(always)]
    pub(crate) fn store_rest(&self, mut store: impl FnMut(usize, u64)) {
        let [first, second, third] = self.body;
        store(2, self.aux());
        for (at, word) in [first.low(), first.high(), second.low(), second.high(), third.low()].into_iter().enumerate()
        {
            if usize::from(self.length()) > at * 8 {
                store(BODY_WORD + at, word);
            }
        }
    }

    /// Checks words that a peer may change at any time: `load` is asked for each word once.
    #[inline(always)]
    pub(crate) fn decode_with(head: u64, id: u64, mut load: impl FnMut(usize) -> u64) -> Result<Self, BadDescriptor> {
        // All of them, needed or not: they came with the head, in one line.
        let [aux, a, b, c, d, e] = [load(2), load(3), load(4), load(5), load(6), load(7)];
        let head = head & !u64::from(u32::MAX);
        let length = head.to_le_bytes()[5];
        if usize::from(length) > INLINE_BYTES_MAX {
            if length != BODY_IS_A_BLOCK {
                return Err(BadDescriptor::InlineLength { claimed: length });
            }
            if ParticipantId::from_word(d).is_none() {
                return Err(BadDescriptor::Owner { claimed: d });
            }
            if e != 0 {
                return Err(BadDescriptor::Reserved { found: e });
            }
        }
        Ok(Self { head: Pair::new(head, id), body: [Pair::new(a, b), Pair::new(c, d), Pair::new(e, aux)] })
    }
}

impl PartialEq for Descriptor {
    fn eq(&self, other: &Self) -> bool {
        let fields = |of: &Self| (of.kind(), of.tag(), of.id(), of.aux(), of.body());
        fields(self) == fields(other)
    }
}

impl Eq for Descriptor {}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Descriptor")
            .field("kind", &self.kind())
            .field("tag", &self.tag())
            .field("id", &self.id())
            .field("aux", &self.aux())
            .field("body", &self.body())
            .finish()
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests;
