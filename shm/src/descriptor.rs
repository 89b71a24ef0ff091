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

use crate::participant::ParticipantId;
use crate::width::low_half;

/// Payload bytes that travel inside a descriptor. Longer ones travel as a block.
pub const INLINE_BYTES_MAX: usize = 40;

/// Words of a descriptor.
pub const DESCRIPTOR_WORDS: usize = 8;

/// The inline length that says "the body is a block".
const BODY_IS_A_BLOCK: u8 = 0xFF;
/// The first word of the body.
const BODY_WORD: usize = 3;

const _: () = assert!(INLINE_BYTES_MAX == (DESCRIPTOR_WORDS - BODY_WORD) * 8);

/// One message between two participants.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Descriptor {
    /// What sort of message; its meaning belongs to the layer above.
    pub kind: u8,
    /// A small operand of the kind.
    pub tag: u16,
    /// Which call, or whatever the kind says.
    pub id: u64,
    /// One more operand.
    pub aux: u64,
    /// The payload, or where it lies.
    pub body: Body,
}

/// The payload of a descriptor.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Body {
    /// Up to [`INLINE_BYTES_MAX`] bytes, here.
    Inline(Inline),
    /// Bytes in somebody's arena.
    Block(BlockRef),
}

/// Up to [`INLINE_BYTES_MAX`] bytes by value.
// Aligned, or the compiler copies it in odd pieces and every word read back waits for two stores: 25 ns of 40 a message.
#[derive(Copy, Clone)]
#[repr(C, align(8))]
pub struct Inline {
    bytes: [u8; INLINE_BYTES_MAX],
    len: u8,
}

/// Where a block lies: a message *about* the owner's ledger, believed by nobody before it is checked.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub struct BlockRef {
    /// Whose arena.
    pub owner: ParticipantId,
    /// The block's entry in the owner's ledger.
    pub index: u32,
    /// Which use of that entry; an older one is stale.
    pub generation: u32,
    /// Bytes from the start of the owner's arena, a multiple of 64.
    pub offset: u64,
    /// Bytes of payload.
    pub len: u64,
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

impl Inline {
    /// No bytes.
    pub const EMPTY: Self = Self { bytes: [0; INLINE_BYTES_MAX], len: 0 };

    /// A copy of `bytes`, or `None` if there are more than [`INLINE_BYTES_MAX`].
    #[inline]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let len = u8::try_from(bytes.len()).ok()?;
        let mut inline = Self::EMPTY;
        inline.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        inline.len = len;
        Some(inline)
    }

    /// The bytes.
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// How many 8-byte words the bytes touch.
    #[inline]
    const fn words(len: u8) -> usize {
        (len as usize).div_ceil(8)
    }
}

impl PartialEq for Inline {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Inline {}

impl std::fmt::Debug for Inline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Inline").field(&self.as_slice()).finish()
    }
}

impl Descriptor {
    /// A message without a body.
    #[inline]
    pub const fn bare(kind: u8, tag: u16, id: u64, aux: u64) -> Self {
        Self { kind, tag, id, aux, body: Body::Inline(Inline::EMPTY) }
    }

    /// The eight words, with a stamp of zero.
    #[inline]
    pub fn encode(&self) -> [u64; DESCRIPTOR_WORDS] {
        let mut words = [0; DESCRIPTOR_WORDS];
        words[0] = self.head_word(0);
        words[1] = self.id;
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
        let length = match &self.body {
            Body::Inline(inline) => inline.len,
            Body::Block(_) => BODY_IS_A_BLOCK,
        };
        u64::from(stamp) | u64::from(self.kind) << 32 | u64::from(length) << 40 | u64::from(self.tag) << 48
    }

    /// Gives words 2..8 to `store`, those that the body needs and no others.
    #[inline(always)]
    pub(crate) fn store_rest(&self, mut store: impl FnMut(usize, u64)) {
        store(2, self.aux);
        match &self.body {
            Body::Inline(inline) => {
                let (words, _) = inline.bytes.as_chunks::<8>();
                for (at, word) in words.iter().enumerate().take(Inline::words(inline.len)) {
                    store(BODY_WORD + at, u64::from_le_bytes(*word));
                }
            }
            Body::Block(block) => {
                store(3, block.offset);
                store(4, block.len);
                store(5, u64::from(block.index) | u64::from(block.generation) << 32);
                store(6, u64::from(block.owner.get()));
                store(7, 0);
            }
        }
    }

    /// Checks words that a peer may change at any time: `load` is asked for each word once at most, and only for
    /// those that the head says are meant.
    #[inline(always)]
    pub(crate) fn decode_with(head: u64, id: u64, mut load: impl FnMut(usize) -> u64) -> Result<Self, BadDescriptor> {
        let [_, _, _, _, kind, length, tag_low, tag_high] = head.to_le_bytes();
        let tag = u16::from_le_bytes([tag_low, tag_high]);
        let aux = load(2);
        let body = if usize::from(length) <= INLINE_BYTES_MAX {
            let mut inline = Inline { bytes: [0; INLINE_BYTES_MAX], len: length };
            let (chunks, _) = inline.bytes.as_chunks_mut::<8>();
            for (at, chunk) in chunks.iter_mut().enumerate().take(Inline::words(length)) {
                *chunk = load(BODY_WORD + at).to_le_bytes();
            }
            Body::Inline(inline)
        } else if length == BODY_IS_A_BLOCK {
            let (offset, len, identity, owner, reserved) = (load(3), load(4), load(5), load(6), load(7));
            let owner = ParticipantId::from_word(owner).ok_or(BadDescriptor::Owner { claimed: owner })?;
            if reserved != 0 {
                return Err(BadDescriptor::Reserved { found: reserved });
            }
            Body::Block(BlockRef {
                owner,
                index: low_half(identity),
                generation: low_half(identity >> 32),
                offset,
                len,
            })
        } else {
            return Err(BadDescriptor::InlineLength { claimed: length });
        };
        Ok(Self { kind, tag, id, aux, body })
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests;
