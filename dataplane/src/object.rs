//! State objects: raw bytes, or a value of a type that a reader finds in them without taking them apart.
//!
//! A type is made storable by writing it inside [`state_type!`](crate::state_type). A crate that does so needs no dependency but
//! this one:
//!
//! ```toml
//! [dependencies]
//! praas-dataplane = { … }
//! ```
//!
//! ```
//! # #![forbid(unsafe_code)]
//! use praas_dataplane::object::{self, Header, TypeError, rkyv};
//! use praas_dataplane::state_type;
//!
//! state_type! {
//!     #[derive(Debug, PartialEq)]
//!     pub struct Model {
//!         name: String,
//!         layers: Vec<Layer>,
//!         trained: Option<Kind>,
//!     }
//!
//!     #[derive(Debug, PartialEq)]
//!     pub struct Layer {
//!         weights: Vec<f64>,
//!     }
//!
//!     #[derive(Debug, PartialEq)]
//!     pub enum Kind {
//!         Online,
//!         Batch { epochs: u32 },
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let layers = vec![Layer { weights: vec![0.5; 1000] }];
//! let model = Model { name: "digits".into(), layers, trained: Some(Kind::Batch { epochs: 3 }) };
//!
//! // Written where it stays: here a heap buffer, in a process a block of shared memory.
//! let mut memory = rkyv::util::AlignedVec::<64>::new();
//! memory.resize(10_000, 0);
//! let value_bytes = object::encode(&model, &mut memory)?;
//! let header = Header::typed::<Model>(1, &memory[..value_bytes]);
//!
//! // Read where it lies. Its fields are those of the type, numbers are little-endian (`to_native`).
//! let found = object::access::<Model>(&header, &memory[..value_bytes])?;
//! assert_eq!(found.name.as_str(), "digits");
//! assert_eq!(found.layers[0].weights[999].to_native(), 0.5);
//!
//! // Or taken out, as a value of one's own.
//! let copy: Model = rkyv::deserialize::<Model, rkyv::rancor::Error>(found)?;
//! assert_eq!(copy, model);
//!
//! // As another type it is an error.
//! let wrong = object::access::<Layer>(&header, &memory[..value_bytes]);
//! assert!(matches!(wrong, Err(TypeError::WrongType { .. })));
//! # Ok(())
//! # }
//! ```
//!
//! # What may be stored
//!
//! Structs and enums of numbers of a fixed width, `bool`, `char`, `String`, `Duration`, and of `Vec`, `VecDeque`, `Option`, `Result`, `Box`, `BTreeMap`,
//! `BTreeSet`, arrays and tuples of what may be stored. Not `usize` and `isize`, which have another width elsewhere; not `Rc`, `Arc` and hash maps,
//! whose check allocates. An object is at most 2 GiB ([`ENCODED_BYTES_MAX`]).
//!
//! # What is checked
//!
//! An object says in its header which type it is: a fingerprint of all names and types in it ([`Shape`]), down to the last, and of the layout
//! that rkyv gives them. A reader built from another definition gets [`TypeError::WrongType`], whatever has changed: a type, a field or a variant
//! renamed, added, removed, moved or of another type. Then a checksum is compared ([`checksum`]), and then the structure of all of it is
//! checked, each offset, length, variant and text: no bytes whatsoever lead to undefined behaviour.

mod shape;
#[allow(unsafe_code, reason = "reads what was checked before without checking it again")]
mod typed;

use core::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use rkyv;
pub use rkyv::Archived;
pub use shape::{Shape, Shaper};
#[doc(hidden)]
pub use typed::{Checker, Encoder};
pub use typed::{
    Corruption, ENCODED_BYTES_MAX, Encode, StateType, TypeError, access, access_checked, check, encode, fingerprint,
};

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = 32;
/// Longest key, bytes. The shortest is one.
pub const KEY_BYTES_MAX: u16 = 1024;
const _: () = assert!(KEY_BYTES_MAX as usize == praas_shm::KEY_BYTES_MAX, "a key is as long as the index takes");
/// Alignment of a value. Blocks start at multiples of 64, the header takes 32.
pub const VALUE_ALIGN: usize = 32;
/// First four bytes of every object: `PSO` and the version of the layout.
pub const MAGIC: [u8; 4] = *b"PSO1";
/// The fingerprint of raw bytes; no type has it.
pub const RAW: u64 = 0;

/// Values up to this length are summed whole.
const SUMMED_WHOLE_BYTES: usize = 64 << 10;
/// Of longer ones, this much at each end.
const SUMMED_END_BYTES: usize = 32 << 10;

/// Bytes of an object in its block: header, then value, then key.
#[must_use]
pub const fn object_bytes(value_bytes: usize, key_bytes: usize) -> usize {
    // A slice has at most isize::MAX bytes.
    HEADER_BYTES + value_bytes + key_bytes
}

/// What stands in front of an object, decoded. The value follows it, then the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    key_bytes: u16,
    value_bytes: u64,
    fingerprint: u64,
    checksum: u32,
}

/// The header as it lies in memory. Little-endian.
///
/// | offset | bytes | field         | meaning                                               |
/// |-------:|------:|---------------|-------------------------------------------------------|
/// |      0 |     4 | `magic`       | [`MAGIC`]                                             |
/// |      4 |     2 | `key_bytes`   | 1 ..= [`KEY_BYTES_MAX`]                               |
/// |      6 |     2 | `flags`       | zero                                                  |
/// |      8 |     8 | `value_bytes` |                                                       |
/// |     16 |     8 | `fingerprint` | of the value's type; [`RAW`]: bytes                   |
/// |     24 |     4 | `checksum`    | [`checksum`] of the value; zero for raw bytes         |
/// |     28 |     4 | `_reserved`   | zero                                                  |
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Words {
    magic: [u8; 4],
    key_bytes: U16,
    flags: U16,
    value_bytes: U64,
    fingerprint: U64,
    checksum: U32,
    _reserved: U32,
}

const _: () = assert!(size_of::<Words>() == HEADER_BYTES && align_of::<Words>() == 1);
const _: () = assert!(offset_of!(Words, magic) == 0 && offset_of!(Words, key_bytes) == 4);
const _: () = assert!(offset_of!(Words, flags) == 6 && offset_of!(Words, value_bytes) == 8);
const _: () = assert!(offset_of!(Words, fingerprint) == 16 && offset_of!(Words, checksum) == 24);
const _: () = assert!(offset_of!(Words, _reserved) == 28);
const _: () = assert!(HEADER_BYTES.is_multiple_of(VALUE_ALIGN));
// Lengths in memory are u64, lengths of slices are usize: from here on the two are taken for the same.
const _: () = assert!(usize::BITS == 64);

/// Why a block holds no object. Whoever wrote it did not go through this crate, or the bytes were damaged on their way here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadObject {
    /// Not an object, or one of another version of the layout.
    #[error("an object starts with 0x314f5350 (PSO1), this block with {found:#010x}")]
    Format {
        /// The first four bytes.
        found: u32,
    },
    /// A key is 1 to 1024 bytes.
    #[error("the object claims a key of {key_bytes} bytes, keys have 1 to {KEY_BYTES_MAX}")]
    KeyLength {
        /// What the header says.
        key_bytes: u16,
    },
    /// The two lengths and the header's own are not the block's.
    #[error(
        "the object claims a value of {value_bytes} bytes and a key of {key_bytes}; with {HEADER_BYTES} bytes of header that \
         is not the {block_bytes} bytes of its block"
    )]
    Length {
        /// What the header says.
        value_bytes: u64,
        /// What the header says.
        key_bytes: u16,
        /// What there is.
        block_bytes: u64,
    },
    /// A newer crate may know these flags, this one does not.
    #[error("the object has flags {found:#06x}, this build knows none: read it with the build that wrote it")]
    Flags {
        /// What stands where zero should.
        found: u16,
    },
    /// A newer crate may have a use for this word, this one has none.
    #[error("the object's last word is {found:#010x} instead of zero: read it with the build that wrote it")]
    Reserved {
        /// What stands where zero should.
        found: u32,
    },
    /// Raw bytes have no checksum.
    #[error("the object is raw bytes and has a checksum, {found:#010x}: its header is damaged")]
    RawChecksum {
        /// What stands where zero should.
        found: u32,
    },
}

impl Header {
    /// Of an object of raw bytes.
    ///
    /// # Panics
    /// When `key_bytes` is not in 1 ..= [`KEY_BYTES_MAX`].
    #[must_use]
    pub fn raw(key_bytes: usize, value_bytes: usize) -> Header {
        Header { key_bytes: key_length(key_bytes), value_bytes: value_bytes as u64, fingerprint: RAW, checksum: 0 }
    }

    /// Of an object whose value is what [`encode`] has written for a `T`. Reads the value to sum it, 128 KiB at most.
    ///
    /// # Panics
    /// When `key_bytes` is not in 1 ..= [`KEY_BYTES_MAX`].
    #[must_use]
    pub fn typed<T: StateType>(key_bytes: usize, value: &[u8]) -> Header {
        Header {
            key_bytes: key_length(key_bytes),
            value_bytes: value.len() as u64,
            fingerprint: const { fingerprint::<T>() },
            checksum: checksum(value),
        }
    }

    /// The header in front of an object whose block has `block_bytes` bytes. `bytes` are a copy, so that nobody changes what was checked.
    ///
    /// # Errors
    /// One [`BadObject`] for each word that cannot be. Whether the value is what the header says it is, [`check`] finds out.
    pub fn parse(bytes: &[u8; HEADER_BYTES], block_bytes: u64) -> Result<Header, BadObject> {
        let words: Words = zerocopy::transmute!(*bytes);
        if words.magic != MAGIC {
            return Err(BadObject::Format { found: u32::from_le_bytes(words.magic) });
        }
        let header = Header {
            key_bytes: words.key_bytes.get(),
            value_bytes: words.value_bytes.get(),
            fingerprint: words.fingerprint.get(),
            checksum: words.checksum.get(),
        };
        let Header { key_bytes, value_bytes, .. } = header;
        if key_bytes == 0 || key_bytes > KEY_BYTES_MAX {
            return Err(BadObject::KeyLength { key_bytes });
        }
        if value_bytes.checked_add(HEADER_BYTES as u64 + u64::from(key_bytes)) != Some(block_bytes) {
            return Err(BadObject::Length { value_bytes, key_bytes, block_bytes });
        }
        if words.flags != 0 {
            return Err(BadObject::Flags { found: words.flags.get() });
        }
        if words._reserved != 0 {
            return Err(BadObject::Reserved { found: words._reserved.get() });
        }
        if header.fingerprint == RAW && header.checksum != 0 {
            return Err(BadObject::RawChecksum { found: header.checksum });
        }
        Ok(header)
    }

    /// As it lies in memory.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(Words {
            magic: MAGIC,
            key_bytes: self.key_bytes.into(),
            flags: U16::ZERO,
            value_bytes: self.value_bytes.into(),
            fingerprint: self.fingerprint.into(),
            checksum: self.checksum.into(),
            _reserved: U32::ZERO,
        })
    }

    /// Bytes of the key, 1 ..= [`KEY_BYTES_MAX`].
    #[must_use]
    pub fn key_bytes(&self) -> u16 {
        self.key_bytes
    }

    /// Bytes of the value.
    #[must_use]
    pub fn value_bytes(&self) -> u64 {
        self.value_bytes
    }

    /// Of the value's type ([`fingerprint`]), or [`RAW`].
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

fn key_length(key_bytes: usize) -> u16 {
    let length = u16::try_from(key_bytes).ok().filter(|bytes| (1..=KEY_BYTES_MAX).contains(bytes));
    length.unwrap_or_else(|| panic!("a key of {key_bytes} bytes: they have 1 to {KEY_BYTES_MAX}"))
}

/// The checksum of a value, CRC-32 (IEEE): of all of it up to 64 KiB; of a longer one of its first 32 KiB, its last 32 KiB and its
/// length as eight bytes, so that its cost has a bound.
///
/// The structure of *all* of a value is checked beside it. What neither sees is a bit flipped in the middle of a long plain array: of an object
/// in shared memory nobody can write there, and an image on storage has a checksum of its own.
#[must_use]
pub fn checksum(value: &[u8]) -> u32 {
    if value.len() <= SUMMED_WHOLE_BYTES {
        return crc32fast::hash(value);
    }
    let mut sum = crc32fast::Hasher::new();
    sum.update(&value[..SUMMED_END_BYTES]);
    sum.update(&value[value.len() - SUMMED_END_BYTES..]);
    sum.update(&(value.len() as u64).to_le_bytes());
    sum.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: Header = Header {
        key_bytes: 0x0203,
        value_bytes: 0x0405_0607,
        fingerprint: 0x1122_3344_5566_7788,
        checksum: 0xAABB_CCDD,
    };
    const BLOCK_BYTES: u64 = 32 + 0x0203 + 0x0405_0607;

    #[test]
    fn golden_bytes_of_layout_1() {
        let golden = [
            0x50, 0x53, 0x4F, 0x31, 0x03, 0x02, 0x00, 0x00, 0x07, 0x06, 0x05, 0x04, 0x00, 0x00, 0x00, 0x00, //
            0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xDD, 0xCC, 0xBB, 0xAA, 0x00, 0x00, 0x00, 0x00,
        ];
        assert_eq!(HEADER.to_bytes(), golden);
        assert_eq!(Header::parse(&golden, BLOCK_BYTES), Ok(HEADER));
    }

    #[test]
    fn a_flipped_bit_of_the_header_is_found_in_itself_or_changes_what_is_checked_next() {
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = HEADER.to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match (bit / 8, Header::parse(&bytes, BLOCK_BYTES)) {
                (0..4, Err(BadObject::Format { .. }))
                | (4..6, Err(BadObject::KeyLength { .. } | BadObject::Length { .. }))
                | (6..8, Err(BadObject::Flags { .. }))
                | (8..16, Err(BadObject::Length { .. }))
                | (28..32, Err(BadObject::Reserved { .. })) => {}
                (16..28, Ok(header)) => assert_ne!(header, HEADER),
                (_, other) => panic!("bit {bit}: {other:?}"),
            }
        }
    }

    #[test]
    fn lengths_that_overflow_are_refused() {
        for value_bytes in [u64::MAX, u64::MAX - 32, u64::MAX - 32 - 0x0203, u64::MAX - 32 - 0x0203 + 1] {
            let bytes = Header { value_bytes, ..HEADER }.to_bytes();
            for block_bytes in [0, 31, 32, BLOCK_BYTES] {
                let refused = Header::parse(&bytes, block_bytes);
                assert_eq!(refused, Err(BadObject::Length { value_bytes, key_bytes: 0x0203, block_bytes }));
            }
        }
    }

    #[test]
    fn keys_have_1_to_1024_bytes() {
        for (key_bytes, fits) in [(0, false), (1, true), (1024, true), (1025, false), (u16::MAX, false)] {
            let bytes = Header { key_bytes, value_bytes: 0, ..HEADER }.to_bytes();
            let parsed = Header::parse(&bytes, 32 + u64::from(key_bytes));
            assert_eq!(parsed.is_ok(), fits, "{parsed:?}");
        }
        assert_eq!(Header::raw(1024, 7).to_bytes().len() + 7 + 1024, object_bytes(7, 1024));
        assert!(std::panic::catch_unwind(|| Header::raw(0, 7)).is_err());
        assert!(std::panic::catch_unwind(|| Header::raw(65537, 7)).is_err());
    }

    #[test]
    fn raw_bytes_have_no_checksum() {
        let mut bytes = Header::raw(3, 5).to_bytes();
        assert_eq!(Header::parse(&bytes, 40), Ok(Header::raw(3, 5)));
        bytes[24] = 1;
        assert_eq!(Header::parse(&bytes, 40), Err(BadObject::RawChecksum { found: 1 }));
    }

    #[test]
    fn a_checksum_covers_both_ends_and_the_length() {
        let mut value = vec![7; 200_000];
        let whole = checksum(&value);
        assert_ne!(whole, checksum(&value[..199_999]), "the length counts");
        for (at, counts) in
            [(0, true), (32_767, true), (32_768, false), (167_231, false), (167_232, true), (199_999, true)]
        {
            value[at] ^= 1;
            assert_eq!(checksum(&value) != whole, counts, "byte {at}");
            value[at] ^= 1;
        }
        let short = checksum(&value[..SUMMED_WHOLE_BYTES]);
        value[40_000] ^= 1;
        assert_ne!(short, checksum(&value[..SUMMED_WHOLE_BYTES]));
        assert_eq!(checksum(b"123456789"), 0xCBF4_3926, "the check value of CRC-32 (IEEE)");
    }

    proptest! {
        #[test]
        fn any_32_bytes_are_a_header_or_an_error(
            words in proptest::array::uniform4(any::<u64>()), magic in any::<bool>(), block_bytes in 0..5000_u64,
        ) {
            let mut bytes: [u8; 32] = zerocopy::transmute!(words);
            if magic {
                bytes[..4].copy_from_slice(&MAGIC);
            }
            if let Ok(header) = Header::parse(&bytes, block_bytes) {
                prop_assert_eq!(header.to_bytes(), bytes);
            }
        }

        #[test]
        fn what_is_written_is_read(
            key_bytes in 1..=1024_u16, value_bytes in 0..u64::MAX / 2, fingerprint in 1..u64::MAX, checksum in any::<u32>(),
        ) {
            let header = Header { key_bytes, value_bytes, fingerprint, checksum };
            prop_assert_eq!(Header::parse(&header.to_bytes(), 32 + value_bytes + u64::from(key_bytes)), Ok(header));
        }
    }
}
