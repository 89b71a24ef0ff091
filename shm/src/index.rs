//! The state index: where the current object of each key lies. The controller alone writes it; every worker reads it, without a
//! message and without a lock.
//!
//! | part    | offset | bytes                | content                                                              |
//! |---------|--------|----------------------|----------------------------------------------------------------------|
//! | header  | 0      | 4096                 | see `Header`; the magic is stored last                               |
//! | slots   | 4096   | 2 × `slots_max` × 8  | two tables in turn: tag of the key in the high half, place of its entry in the low |
//! | entries | next   | `objects_max` × 64   | one cache line an object (`entry.rs`), used from the left             |
//!
//! A table is open addressing by the high bits of the tag, which is half of a keyed hash. An entry never moves, so slots are all that is
//! written when the table grows: into the other of the two tables, which then becomes the current one. A reader that finds nothing
//! makes sure that the table it looked into still is the current one. What the header, the entries and the tables take is allocated
//! as it is used: 64 bytes for an object, and 12 to 40 for slots.
//!
//! Keys of up to 24 bytes stand in the entry, longer ones in the writer's arena, under the same pin as the object.
//!
//! The law holds here as everywhere: a memory file that its owner alone can write, sealed against everybody else. It is a file of its own, next
//! to the controller's segment, so that its size does not have to be that of all segments.
//!
//! | edge    | release side                      | acquire side                    | carries                                   |
//! |---------|-----------------------------------|---------------------------------|-------------------------------------------|
//! | ready   | `IndexWriter::create`, the magic  | `IndexReader::attach`, the magic | the identity                              |
//! | slotted | `set_slot`                        | `IndexReader::find`, the slot   | the entry that the slot names             |
//! | current | `use_table`                       | `IndexReader::find`, the table  | the slots of that table                   |
//!
//! The edges of an entry stand in `entry.rs`, those of a pin in `pins.rs`.

#[cfg_attr(loom, allow(dead_code, reason = "models look at one entry"))]
pub(crate) mod entry;
#[cfg(not(loom))]
mod reader;
#[cfg(all(test, not(loom)))]
mod tests;
#[cfg(not(loom))]
mod writer;

#[cfg(not(loom))]
pub use self::table::*;
#[cfg(not(loom))]
pub use reader::{Found, IndexReader, Listed, PinsInUse};
#[cfg(not(loom))]
pub use writer::{Current, IndexFull, IndexWriter};

#[cfg(not(loom))]
mod table {
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::sync::Arc;

    use super::entry::{Entry, WORDS};
    use crate::descriptor::BlockRef;
    use crate::mapping::{Mapping, SharedLayout, Window};
    use crate::participant::ParticipantId;
    use crate::size_class::UNIT_BYTES;
    use crate::sync::AtomicU64;
    use crate::width::low_half;

    /// The first eight bytes of an index, once it is made: `PRaaSidx`.
    pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"PRaaSidx");
    /// Longest key, bytes.
    pub const KEY_BYTES_MAX: usize = 1024;
    /// Longest key that stands in its entry.
    pub(super) const SHORT_KEY_BYTES: usize = 24;
    /// Words of an entry.
    pub(super) const LENGTHS: usize = 1;
    pub(super) const WRITTEN: usize = 2;
    pub(super) const FIRST: usize = 3;
    pub(super) const KEY: usize = 4;

    const HEADER_BYTES: u64 = 4096;
    pub(super) const SLOTS_MIN: u64 = 512;
    const UNITS_BITS: u32 = 30;
    const LIFE_BITS: u32 = 28;
    const LENGTH_BITS: u32 = 48;

    /// | offset | bytes | field         | written                                                        |
    /// |-------:|------:|---------------|----------------------------------------------------------------|
    /// |      0 |     8 | `magic`       | last, release                                                  |
    /// |      8 |     8 | `version`     | once: layout version                                           |
    /// |     16 |    16 | `process`     | once                                                           |
    /// |     32 |     8 | `incarnation` | once: the controller's                                         |
    /// |     40 |     8 | `objects_max` | once                                                           |
    /// |     48 |     8 | `seed`        | once: of the hash                                              |
    /// |     56 |     8 | reserved      | zero                                                           |
    /// |     64 |     8 | `table`       | count of tables so far × 256, and the logarithm of its slots   |
    /// |     72 |    56 | reserved      | zero                                                           |
    /// |    128 |     8 | `extent`      | entries ever used                                              |
    /// |    136 |     8 | `used_bytes`  | a hint: bytes of all objects                                   |
    /// |    144 |   112 | reserved      | zero                                                           |
    #[repr(C, align(128))]
    pub(super) struct Header {
        pub(super) magic: AtomicU64,
        pub(super) version: AtomicU64,
        pub(super) process: [AtomicU64; 2],
        pub(super) incarnation: AtomicU64,
        pub(super) objects_max: AtomicU64,
        pub(super) seed: AtomicU64,
        _reserved: AtomicU64,
        pub(super) table: AtomicU64,
        _reserved_2: [AtomicU64; 7],
        pub(super) extent: AtomicU64,
        pub(super) used_bytes: AtomicU64,
        _reserved_3: [AtomicU64; 14],
    }

    const _: () = {
        use std::mem::offset_of;
        assert!(size_of::<Header>() == 256 && offset_of!(Header, table) == 64 && offset_of!(Header, extent) == 128);
        assert!(
            offset_of!(Header, process) == 16
                && offset_of!(Header, seed) == 48
                && offset_of!(Header, used_bytes) == 136
        );
        assert!(UNITS_BITS + 6 + LIFE_BITS == u64::BITS && KEY * 8 + 32 == (WORDS + 1) * 8);
    };

    // SAFETY: `repr(C)` of `AtomicU64`s only: any bits are a value, all of it is atomics, no padding (asserted above).
    unsafe impl SharedLayout for Header {}

    /// Sizes of an index.
    #[derive(Copy, Clone, Eq, PartialEq, Debug)]
    pub struct IndexConfig {
        /// Most objects. 1..=2^24. Default 2^20.
        pub objects_max: u32,
    }

    impl Default for IndexConfig {
        fn default() -> Self {
            Self { objects_max: 1 << 20 }
        }
    }

    impl IndexConfig {
        /// Slots of the largest table: half of them are used at most when all objects are there.
        pub(super) fn slots_max(&self) -> u64 {
            (2 * u64::from(self.objects_max)).next_power_of_two().max(SLOTS_MIN)
        }

        pub(super) fn table_offset(&self, number: u64) -> u64 {
            HEADER_BYTES + number % 2 * self.slots_max() * 8
        }

        pub(super) fn entries_offset(&self) -> u64 {
            HEADER_BYTES + 2 * self.slots_max() * 8
        }

        /// Bytes of the whole index: address space, not memory.
        pub fn index_bytes(&self) -> u64 {
            self.entries_offset() + u64::from(self.objects_max) * size_of::<Entry>() as u64
        }
    }

    /// The memory file of an index: to be handed over.
    #[derive(Debug)]
    pub struct IndexFile {
        pub(super) fd: OwnedFd,
    }

    impl IndexFile {
        /// A file that somebody handed over. Nothing is believed about it.
        pub fn from_fd(fd: OwnedFd) -> Self {
            Self { fd }
        }

        /// To be handed over.
        pub fn fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }
    }

    /// The windows on an index that writer and reader share.
    pub(super) struct Windows {
        pub(super) header: Window<Header>,
        pub(super) tables: [Window<[AtomicU64]>; 2],
        pub(super) entries: Window<[Entry]>,
    }

    impl Windows {
        pub(super) fn new(mapping: &Arc<Mapping>, config: &IndexConfig) -> Self {
            Self {
                header: mapping.window(0),
                tables: [0, 1].map(|number| mapping.window_slice(config.table_offset(number), config.slots_max())),
                entries: mapping.window_slice(config.entries_offset(), config.objects_max.into()),
            }
        }
    }

    /// Where an object lies: whose arena, which life of that participant, and where in it.
    #[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
    pub struct Place {
        /// Whose arena.
        pub participant: ParticipantId,
        /// Which life of it, counted from the controller's incarnation; 0 is the controller's own.
        pub life: u32,
        /// Bytes from the start of the arena, a multiple of 64.
        pub offset: u64,
    }

    impl Place {
        /// `None` if the life or the offset is beyond what an entry can hold: 2^28 lives, 64 GiB.
        pub fn new(participant: ParticipantId, life: u64, offset: u64) -> Option<Self> {
            let life = u32::try_from(life).ok().filter(|life| life >> LIFE_BITS == 0)?;
            (offset.is_multiple_of(UNIT_BYTES) && offset / UNIT_BYTES < 1 << UNITS_BITS).then_some(Self {
                participant,
                life,
                offset,
            })
        }

        pub(super) fn word(self) -> u64 {
            (self.offset / UNIT_BYTES)
                | u64::from(self.participant.get()) << UNITS_BITS
                | u64::from(self.life) << (UNITS_BITS + 6)
        }

        pub(super) fn from_word(word: u64) -> Self {
            Self {
                participant: ParticipantId::from_word(word >> UNITS_BITS & 63).expect("six bits"),
                life: low_half(word >> (UNITS_BITS + 6)),
                offset: (word & ((1 << UNITS_BITS) - 1)) * UNIT_BYTES,
            }
        }

        /// The bytes from here on as a block. It has no entry in a ledger: good for looking, not for giving back.
        pub fn block(&self, len: u64) -> BlockRef {
            BlockRef { owner: self.participant, index: u32::MAX, generation: 0, offset: self.offset, len }
        }
    }

    pub(super) fn lengths_word(value_bytes: u64, key_bytes: usize) -> u64 {
        debug_assert!(value_bytes >> LENGTH_BITS == 0 && key_bytes <= KEY_BYTES_MAX);
        value_bytes | (key_bytes as u64) << LENGTH_BITS
    }

    pub(super) fn value_bytes(words: &[u64; WORDS]) -> u64 {
        words[LENGTHS] & ((1 << LENGTH_BITS) - 1)
    }

    /// Zero: the entry is vacant.
    #[inline]
    pub(super) fn key_bytes(words: &[u64; WORDS]) -> u64 {
        words[LENGTHS] >> LENGTH_BITS
    }

    /// The key's three words: itself, or where it lies in the writer's arena.
    pub(super) fn short_key(key: &[u8]) -> Option<[u64; 3]> {
        let mut bytes = [0; SHORT_KEY_BYTES];
        bytes.get_mut(..key.len())?.copy_from_slice(key);
        let (words, _) = bytes.as_chunks::<8>();
        Some(std::array::from_fn(|at| u64::from_le_bytes(words[at])))
    }

    pub(super) fn short_key_bytes(words: &[u64; WORDS]) -> [u8; SHORT_KEY_BYTES] {
        let mut bytes = [0; SHORT_KEY_BYTES];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(&words[KEY..]) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// A key of more than [`SHORT_KEY_BYTES`].
    pub(super) fn long_key(words: &[u64; WORDS]) -> BlockRef {
        BlockRef {
            owner: ParticipantId::CONTROLLER,
            offset: words[KEY],
            len: key_bytes(words),
            index: low_half(words[KEY + 1]),
            generation: low_half(words[KEY + 1] >> 32),
        }
    }

    pub(super) fn long_key_words(block: &BlockRef) -> [u64; 3] {
        [block.offset, u64::from(block.index) | u64::from(block.generation) << 32, 0]
    }

    /// A slot: empty, given up, or the tag of a key and the entry that has it.
    pub(super) const EMPTY: u64 = 0;
    pub(super) const GIVEN_UP: u64 = 1;
    const ENTRY_0: u64 = 2;

    pub(super) fn slot(tag: u32, entry: u32) -> u64 {
        u64::from(tag) << 32 | (u64::from(entry) + ENTRY_0)
    }

    #[inline]
    pub(super) fn slot_tag(slot: u64) -> u32 {
        low_half(slot >> 32)
    }

    #[inline]
    pub(super) fn slot_entry(slot: u64) -> Option<u32> {
        low_half(slot).checked_sub(2)
    }

    /// Half of the keyed hash of a key. The seed is secret, so that nobody outside can choose keys that meet. Source: XXH3, 64 bits.
    #[inline]
    pub(super) fn tag_of(key: &[u8], seed: u64) -> u32 {
        low_half(xxhash_rust::xxh3::xxh3_64_with_seed(key, seed) >> 32)
    }

    /// Where to look for a tag first, in a table of `2^log2` slots.
    #[inline]
    pub(super) fn home(tag: u32, log2: u32) -> u64 {
        u64::from(tag) >> (32 - log2)
    }
}
