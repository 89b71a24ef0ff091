//! Values to bytes and back, through rkyv: written straight into the memory where they stay, read where they lie.

use core::fmt;
use core::num::NonZeroUsize;
use std::error::Error;

use rkyv::api::access_with_context;
use rkyv::api::serialize_using;
use rkyv::bytecheck::CheckBytes;
use rkyv::primitive::{ArchivedF64, ArchivedI128, ArchivedIsize, ArchivedU32, ArchivedUsize};
use rkyv::rancor::{Source, Strategy, Trace};
use rkyv::ser::allocator::ArenaHandle;
use rkyv::ser::{Positional, Serializer, Writer};
use rkyv::util::with_arena;
use rkyv::validation::Validator;
use rkyv::validation::archive::ArchiveValidator;
use rkyv::{Archive, Archived, Serialize};

use super::{Header, RAW, Shape, Shaper, VALUE_ALIGN, checksum};

/// Longest value that [`encode`] writes, bytes: offsets in it have 32 bits and a sign.
pub const ENCODED_BYTES_MAX: usize = i32::MAX as usize;

/// How many pointers deep a value may be. A check goes down by calling itself; 256 levels take some tens of KiB of stack.
const DEPTH_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// rkyv's format, as far as features choose it: a program that builds rkyv with others has other fingerprints. The asserts see to it that the words are true.
const FORMAT: &str = "rkyv 0.8, offsets of 32 bits, little-endian, aligned";
const _: () = assert!(size_of::<ArchivedUsize>() == 4 && size_of::<ArchivedIsize>() == 4);
const _: () = assert!(align_of::<ArchivedF64>() == 8 && align_of::<ArchivedI128>() == 16);
const _: () = assert!(u32::from_ne_bytes([1, 2, 3, 4]) == ArchivedU32::from_native(0x0403_0201).to_native());
const _: () = assert!(cfg!(target_endian = "little"), "COPY_OPTIMIZATION and `from_native` are the identity");

/// A type whose values can be state objects: one that [`state_type!`](crate::state_type) defines, or any that has what it gives.
pub trait StateType:
    Shape + Archive<Archived: for<'a> CheckBytes<Checker<'a>>> + for<'a> Serialize<Encoder<'a>>
{
}

impl<T> StateType for T where
    T: Shape + Archive<Archived: for<'a> CheckBytes<Checker<'a>>> + for<'a> Serialize<Encoder<'a>>
{
}

/// What a value writes itself into. Without shared pointers, which would need a map.
pub type Encoder<'a> = Strategy<Serializer<Slot<'a>, ArenaHandle<'a>, ()>, Refusal>;
/// What a value's bytes are checked with. Without shared pointers, too.
pub type Checker<'a> = Strategy<Validator<ArchiveValidator<'a>, ()>, Refusal>;

/// What an object's header says of its type: never [`RAW`]. The same in every build from the same definition.
#[must_use]
pub const fn fingerprint<T: Shape>() -> u64 {
    let (bytes, align) = (size_of::<Archived<T>>(), align_of::<Archived<T>>());
    assert!(align <= VALUE_ALIGN, "a value lies at a multiple of 32 bytes, its type asks for more");
    let print = Shaper::new("format", FORMAT).field("", T::SHAPE).number(bytes as i128).number(align as i128).finish();
    if print == RAW { 1 } else { print }
}

/// Why a value was not encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Encode {
    /// The memory is too short. It was overwritten; encode once more into a larger one.
    #[error("the value needs {needed_bytes} bytes, there are {given_bytes}")]
    DoesNotFit {
        /// What the same value takes, exactly.
        needed_bytes: usize,
        /// What there was.
        given_bytes: usize,
    },
    /// No memory is large enough.
    #[error("the value needs more than {ENCODED_BYTES_MAX} bytes: store it as several objects")]
    TooLong,
    /// The type's own serialisation failed, for example a text above 1 GiB.
    #[error("the value cannot be stored: {text}")]
    Refused {
        /// What it said.
        text: Box<str>,
    },
}

/// Why the bytes of an object are not read as a `T`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TypeError {
    /// It was written as something else, or the type's definition has changed since.
    #[error("{}", wrong_type(*.found, *.wanted, .wanted_name))]
    WrongType {
        /// What the object is ([`fingerprint`]), or [`RAW`].
        found: u64,
        /// The fingerprint of the type asked for.
        wanted: u64,
        /// Its name.
        wanted_name: &'static str,
    },
    /// It is of this type and is damaged. Write it again, or take an older image.
    #[error("the object is damaged: {what}")]
    Corrupt {
        /// What was found.
        what: Corruption,
    },
}

/// What is wrong with the bytes of an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// Truncated, or with bytes of something else.
    #[error("its header says {header_bytes} bytes, {value_bytes} are there")]
    Length {
        /// What the header says.
        header_bytes: u64,
        /// What there is.
        value_bytes: u64,
    },
    /// Its bytes have changed.
    #[error("its header says checksum {header_sum:#010x}, its {value_bytes} bytes have {value_sum:#010x}")]
    Checksum {
        /// What the header says.
        header_sum: u32,
        /// What the bytes have.
        value_sum: u32,
        /// How many there are.
        value_bytes: u64,
    },
    /// The checksum is right and the bytes are no value of the type: not written by [`encode`], or deeper than 256 levels.
    #[error("its {value_bytes} bytes have the right checksum and are no such value: {text}")]
    Structure {
        /// How many there are.
        value_bytes: u64,
        /// What was found first.
        text: Box<str>,
    },
}

fn wrong_type(found: u64, wanted: u64, wanted_name: &str) -> String {
    if found == RAW {
        return format!("the object is raw bytes, not a {wanted_name}: read it as bytes, or write it as that type");
    }
    format!(
        "the object was written as another type ({found:#018x}) than {wanted_name} ({wanted:#018x}), or as an earlier definition of \
         it: read it as what it is, or write it again"
    )
}

/// rkyv's errors, of which we keep the first line. Addresses are left out: a text may travel to a client.
#[derive(Debug)]
pub struct Refusal(Box<str>);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Refusal {}

impl Trace for Refusal {
    fn trace<R: fmt::Debug + fmt::Display + Send + Sync + 'static>(self, _: R) -> Self {
        self
    }
}

impl Source for Refusal {
    #[cold]
    fn new<T: Error + Send + Sync + 'static>(source: T) -> Self {
        let text = source.to_string();
        let words = text.split_whitespace().map(|word| if word.starts_with("0x") { "…" } else { word });
        Refusal(words.collect::<Vec<_>>().join(" ").into())
    }
}

/// Memory that takes what fits and counts all.
#[derive(Debug)]
pub struct Slot<'a> {
    into: &'a mut [u8],
    position: usize,
}

impl Positional for Slot<'_> {
    #[inline(always)]
    fn pos(&self) -> usize {
        self.position
    }
}

impl Writer<Refusal> for Slot<'_> {
    #[inline(always)]
    fn write(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let end = self.position + bytes.len();
        if let Some(room) = self.into.get_mut(self.position..end) {
            room.copy_from_slice(bytes);
        }
        self.position = end;
        if end > ENCODED_BYTES_MAX { Err(Refusal::new(Encode::TooLong)) } else { Ok(()) }
    }
}

/// Writes `value` into the beginning of `into` and returns how many bytes it takes. Every one of these bytes is written, padding as zero; the rest
/// is left as it is. No copy is made on the way, and nothing allocated but what rkyv notes of the elements of a vector that hold
/// pointers themselves, in memory that the thread keeps for the next time.
///
/// Plain numbers, arrays of them, and structs of these that rkyv lays out as the compiler does are copied a whole vector at a time. That
/// holds for structs without parameters, without padding (neither between fields nor at the end) and without `#[rkyv(with)]`, and not for enums,
/// `Option` and tuples: vectors of such are written element by element.
///
/// # Errors
/// [`Encode::DoesNotFit`] says what it needs; `&mut []` asks for that alone. [`Encode::TooLong`] above [`ENCODED_BYTES_MAX`], [`Encode::Refused`]
/// when the type itself fails.
///
/// # Panics
/// When `into` is not empty and does not begin at a multiple of 32 bytes.
pub fn encode<T: StateType>(value: &T, into: &mut [u8]) -> Result<usize, Encode> {
    const { assert!(align_of::<Archived<T>>() <= VALUE_ALIGN, "a value lies at a multiple of 32 bytes") };
    assert!(
        into.is_empty() || into.as_ptr().addr().is_multiple_of(VALUE_ALIGN),
        "a value lies at a multiple of 32 bytes"
    );
    // A longer piece of memory is of no use: what lies past the limit could not be found.
    let given_bytes = into.len().min(ENCODED_BYTES_MAX);
    let (written, needed_bytes) = with_arena(|arena| {
        let slot = Slot { into: &mut into[..given_bytes], position: 0 };
        let mut serializer = Serializer::new(slot, arena.acquire(), ());
        let written = serialize_using(value, &mut serializer);
        (written, serializer.writer.position)
    });
    match written {
        Ok(_) if needed_bytes <= given_bytes => Ok(needed_bytes),
        Ok(_) => Err(Encode::DoesNotFit { needed_bytes, given_bytes }),
        Err(_) if needed_bytes > ENCODED_BYTES_MAX => Err(Encode::TooLong),
        Err(Refusal(text)) => Err(Encode::Refused { text }),
    }
}

/// The value of an object, where it lies, once everything about it is checked.
///
/// # Errors
/// As [`check`].
pub fn access<'v, T: StateType>(header: &Header, value: &'v [u8]) -> Result<&'v Archived<T>, TypeError> {
    let (found, wanted) = (header.fingerprint, const { fingerprint::<T>() });
    if found != wanted {
        return Err(TypeError::WrongType { found, wanted, wanted_name: core::any::type_name::<T>() });
    }
    let value_bytes = value.len() as u64;
    if header.value_bytes != value_bytes {
        let what = Corruption::Length { header_bytes: header.value_bytes, value_bytes };
        return Err(TypeError::Corrupt { what });
    }
    let (header_sum, value_sum) = (header.checksum, checksum(value));
    if header_sum != value_sum {
        return Err(TypeError::Corrupt { what: Corruption::Checksum { header_sum, value_sum, value_bytes } });
    }
    let mut context = Validator::new(ArchiveValidator::with_max_depth(value, Some(DEPTH_MAX)), ());
    access_with_context::<Archived<T>, _, Refusal>(value, &mut context).map_err(|Refusal(text)| {
        let what = Corruption::Structure { value_bytes, text };
        TypeError::Corrupt { what }
    })
}

/// Whether an object is a `T`, checked from its fingerprint to its last byte. `value` begins at a multiple of 32 bytes, as blocks have it; where a
/// `T` cannot lie is an error. Allocates nothing. Whoever has checked an object once reads it with [`access_checked`] from then on.
///
/// # Errors
/// [`TypeError::WrongType`] before anything else is looked at, then [`TypeError::Corrupt`]: length, checksum, structure, in this order.
/// Whatever the bytes are, they lead to no panic and no undefined behaviour.
pub fn check<T: StateType>(header: &Header, value: &[u8]) -> Result<(), TypeError> {
    access::<T>(header, value).map(drop)
}

/// The value of an object that was checked before: no more than the addition of where its root lies.
///
/// # Safety
/// - [`check`] or [`access`] has succeeded for this `T` and these very bytes, at this address, or at another that is a multiple of 32.
/// - For this `T` itself (`TypeId`), not for one with the same fingerprint: [`Shape`] can be written by hand, safely and wrongly.
/// - No byte of them has changed since, and none changes as long as the result lives.
#[must_use]
pub unsafe fn access_checked<T: StateType>(value: &[u8]) -> &Archived<T> {
    // SAFETY:
    // - in bounds: `check` found the root at the end of `value` and all that it points to inside; the caller vouches that it was called.
    // - unshared:  whoever wrote the bytes does so no more, the caller vouches for that, too.
    // - unique:    not needed: it is read only, and archived types have no interior mutability.
    unsafe { rkyv::access_unchecked::<Archived<T>>(value) }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};
    use std::time::Duration;

    use proptest::prelude::{Just, any, prop_assert_eq, prop_oneof, proptest};
    use proptest::strategy::Strategy as Values;
    use rkyv::api::high::HighDeserializer;
    use rkyv::util::AlignedVec;

    use super::*;
    use crate::object::HEADER_BYTES;
    use crate::state_type;

    state_type! {
        #[derive(Debug, Clone, PartialEq)]
        struct Everything {
            name: String,
            short: String,
            numbers: Vec<f64>,
            nested: Vec<Vec<Point>>,
            kinds: Vec<Kind>,
            maybe: Option<Box<Point>>,
            nothing: Option<String>,
            outcome: Result<u16, String>,
            map: BTreeMap<String, Vec<u8>>,
            set: BTreeSet<u32>,
            queue: VecDeque<char>,
            tuple: (bool, i128, [u8; 5]),
            took: Duration,
            unit: Unit,
            wrapped: Wrapped,
        }

        #[derive(Debug, Clone, Copy, PartialEq)]
        struct Point {
            x: f64,
            y: f64,
        }

        #[derive(Debug, Clone, PartialEq)]
        enum Kind {
            Plain,
            Named { name: String, weight: u64 },
            Pair(Point, Option<i8>),
        }

        #[derive(Debug, Clone, Copy, PartialEq)]
        struct Unit;

        #[derive(Debug, Clone, PartialEq)]
        struct Wrapped(Vec<(u8, u64)>);
    }

    fn everything(map_entries: u32) -> Everything {
        Everything {
            name: "a name that is too long to lie in the pointer's place".into(),
            short: "short".into(),
            numbers: (0..100).map(f64::from).collect(),
            nested: vec![vec![], vec![Point { x: 1.0, y: -2.0 }; 3], vec![Point { x: f64::INFINITY, y: 0.0 }]],
            kinds: vec![
                Kind::Plain,
                Kind::Named { name: "näme 名前".into(), weight: u64::MAX },
                Kind::Pair(Point { x: 0.5, y: 0.25 }, Some(-1)),
            ],
            maybe: Some(Box::new(Point { x: 9.0, y: 8.0 })),
            nothing: None,
            outcome: Err("none".into()),
            map: (0..map_entries).map(|n| (format!("key {n}"), vec![7; n as usize % 5])).collect(),
            set: (0..map_entries).collect(),
            queue: "vwxyz".chars().collect(),
            tuple: (true, i128::MIN, *b"array"),
            took: Duration::new(3, 999_999_999),
            unit: Unit,
            wrapped: Wrapped(vec![(1, 2), (3, 4)]),
        }
    }

    /// The value's bytes at a multiple of 64, all of `0xEE` before they were written.
    fn encoded<T: StateType>(value: &T) -> AlignedVec<64> {
        let needed_bytes = match encode(value, &mut []) {
            Err(Encode::DoesNotFit { needed_bytes, given_bytes: 0 }) => needed_bytes,
            other => other.unwrap(),
        };
        let mut memory = AlignedVec::<64>::new();
        memory.resize(needed_bytes, 0xEE);
        assert_eq!(encode(value, &mut memory), Ok(needed_bytes));
        memory
    }

    fn owned<T: StateType>(archived: &Archived<T>) -> T
    where
        Archived<T>: rkyv::Deserialize<T, HighDeserializer<rkyv::rancor::Error>>,
    {
        rkyv::deserialize(archived).unwrap()
    }

    /// A value and a header that has its checksum, as long as they agree.
    fn summed<T: StateType>(value: &[u8]) -> Header {
        Header::typed::<T>(1, value)
    }

    #[test]
    fn what_is_written_is_read() {
        // A map of 5 entries is one node, one of 500 has several levels.
        for entries in [0, 1, 5, 500] {
            let value = everything(entries);
            let memory = encoded(&value);
            let header = Header::parse(&summed::<Everything>(&memory).to_bytes(), 33 + memory.len() as u64).unwrap();
            let found = access::<Everything>(&header, &memory).unwrap();
            assert_eq!(owned::<Everything>(found), value);
            assert_eq!(found.map.len(), entries as usize);
            assert_eq!(found.map.iter().count(), entries as usize);
            check::<Everything>(&header, &memory).unwrap();
            // SAFETY:
            // - in bounds, unshared: checked one line above, and `memory` is not changed again.
            // - unique:  read only.
            let again = unsafe { access_checked::<Everything>(&memory) };
            assert_eq!(owned::<Everything>(again), value);
        }
    }

    #[test]
    fn values_without_bytes_and_plain_values_are_objects_too() {
        let nothing = encoded(&());
        assert!(nothing.is_empty());
        check::<()>(&summed::<()>(&nothing), &nothing).unwrap();
        let number = encoded(&7_u64);
        assert_eq!(access::<u64>(&summed::<u64>(&number), &number).unwrap().to_native(), 7);
        assert_eq!(&number[..], 7_u64.to_le_bytes());
        let text = encoded(&"text".to_string());
        assert_eq!(access::<String>(&summed::<String>(&text), &text).unwrap().as_str(), "text");
    }

    #[test]
    fn an_object_of_another_type_is_refused() {
        let memory = encoded(&Point { x: 1.0, y: 2.0 });
        let header = summed::<Point>(&memory);
        let refused = check::<Wrapped>(&header, &memory).unwrap_err();
        let (found, wanted) = (fingerprint::<Point>(), fingerprint::<Wrapped>());
        assert!(matches!(refused, TypeError::WrongType { found: f, wanted: w, .. } if (f, w) == (found, wanted)));
        assert!(refused.to_string().contains("Wrapped"), "{refused}");

        let raw = Header::raw(1, memory.len());
        let refused = check::<Point>(&raw, &memory).unwrap_err();
        assert!(matches!(refused, TypeError::WrongType { found: RAW, .. }));
        assert!(refused.to_string().contains("is raw bytes, not a "), "{refused}");
    }

    #[test]
    fn an_object_of_an_earlier_definition_is_refused() {
        mod earlier {
            crate::state_type! {
                pub(super) struct Account {
                    pub(super) owner: String,
                    pub(super) cents: i64,
                }
            }
        }
        mod later {
            crate::state_type! {
                pub(super) struct Account {
                    pub(super) owner: String,
                    pub(super) micros: i64,
                }
            }
        }
        let memory = encoded(&earlier::Account { owner: "alice".into(), cents: 100 });
        let header = summed::<earlier::Account>(&memory);
        let account = access::<earlier::Account>(&header, &memory).unwrap();
        assert_eq!((account.owner.as_str(), account.cents.to_native()), ("alice", 100));
        // The bytes alone would be read without complaint, a hundred times too small or ten thousand too large.
        let reread = summed::<later::Account>(&memory);
        assert_eq!(access::<later::Account>(&reread, &memory).unwrap().micros.to_native(), 100);
        assert!(matches!(check::<later::Account>(&header, &memory), Err(TypeError::WrongType { .. })));
    }

    #[test]
    fn every_truncation_is_refused() {
        let memory = encoded(&everything(5));
        let header = summed::<Everything>(&memory);
        for bytes in 0..memory.len() {
            let refused = check::<Everything>(&header, &memory[..bytes]);
            let what = Corruption::Length { header_bytes: memory.len() as u64, value_bytes: bytes as u64 };
            assert_eq!(refused, Err(TypeError::Corrupt { what }));
            // And with a header that agrees: the structure is all that is left. It may fit by accident, it may not panic.
            if let Ok(found) = access::<Everything>(&summed::<Everything>(&memory[..bytes]), &memory[..bytes]) {
                owned::<Everything>(found);
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let value = everything(5);
        let mut memory = encoded(&value);
        let header = summed::<Everything>(&memory);
        let block_bytes = (HEADER_BYTES + memory.len() + 1) as u64;
        for bit in 0..memory.len() * 8 {
            memory[bit / 8] ^= 1 << (bit % 8);
            let refused = check::<Everything>(&header, &memory);
            assert!(matches!(refused, Err(TypeError::Corrupt { what: Corruption::Checksum { .. } })), "bit {bit}");
            // With the checksum of the flipped bytes the structure decides. Whatever it takes can be read to the end.
            if let Ok(found) = access::<Everything>(&summed::<Everything>(&memory), &memory) {
                let _ = format!("{:?}", owned::<Everything>(found));
            }
            memory[bit / 8] ^= 1 << (bit % 8);
        }
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = header.to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(header) = Header::parse(&bytes, block_bytes) {
                check::<Everything>(&header, &memory).unwrap_err();
            }
        }
        check::<Everything>(&header, &memory).unwrap();
    }

    #[test]
    fn bytes_that_nobody_encoded_are_refused_with_a_reason_and_no_address() {
        let memory = encoded(&everything(5));
        let mut forged = memory.clone();
        let root = forged.len() - size_of::<Archived<Everything>>();
        // Far out of the object: the offset of a long text, in the second word of the root.
        forged[root..root + 16].fill(0xBF);
        let refused = check::<Everything>(&summed::<Everything>(&forged), &forged).unwrap_err();
        assert!(matches!(refused, TypeError::Corrupt { what: Corruption::Structure { .. } }), "{refused:?}");
        let text = refused.to_string();
        assert!(!text.contains("0x") && !text.contains('\n'), "{text}");
    }

    #[test]
    fn a_value_deeper_than_256_levels_is_refused() {
        #[derive(Archive, Serialize)]
        #[rkyv(serialize_bounds(__S: Writer), bytecheck(bounds(__C: rkyv::validation::ArchiveContext, __C::Error: Source)))]
        struct Nest(#[rkyv(omit_bounds)] Option<Box<Nest>>);
        impl Shape for Nest {
            const SHAPE: u64 = Shaper::new("recursive", "Nest").finish();
        }
        let deep = |levels| (0..levels).fold(Nest(None), |inner, _| Nest(Some(Box::new(inner))));
        let memory = encoded(&deep(200));
        check::<Nest>(&summed::<Nest>(&memory), &memory).unwrap();
        let memory = encoded(&deep(300));
        let refused = check::<Nest>(&summed::<Nest>(&memory), &memory).unwrap_err();
        assert!(matches!(refused, TypeError::Corrupt { what: Corruption::Structure { .. } }), "{refused:?}");
    }

    #[test]
    fn a_value_lies_at_a_multiple_of_32_bytes() {
        let value = everything(5);
        let bytes = encoded(&value).len();
        let mut memory = AlignedVec::<64>::new();
        memory.resize(bytes + 64, 0);
        for at in [0, 32, 64] {
            encode(&value, &mut memory[at..]).unwrap();
            check::<Everything>(&summed::<Everything>(&memory[at..at + bytes]), &memory[at..at + bytes]).unwrap();
        }
        for at in [1, 4, 8, 15] {
            memory.copy_within(64..64 + 32, at);
            assert!(std::panic::catch_unwind(|| encode(&value, &mut memory.clone()[at..])).is_err());
            let misplaced = &memory[at..at + bytes];
            let refused = check::<Everything>(&summed::<Everything>(misplaced), misplaced).unwrap_err();
            assert!(matches!(refused, TypeError::Corrupt { what: Corruption::Structure { .. } }), "{refused:?}");
        }
    }

    #[test]
    fn what_does_not_fit_says_exactly_what_it_needs() {
        let value = everything(7);
        let needed_bytes = encoded(&value).len();
        let mut memory = AlignedVec::<64>::new();
        memory.resize(needed_bytes + 100, 0xEE);
        for given_bytes in 0..needed_bytes {
            let refused = encode(&value, &mut memory[..given_bytes]);
            assert_eq!(refused, Err(Encode::DoesNotFit { needed_bytes, given_bytes }));
            assert!(memory[given_bytes..].iter().all(|byte| *byte == 0xEE), "written past {given_bytes}");
        }
        assert_eq!(encode(&value, &mut memory[..needed_bytes]), Ok(needed_bytes));
        assert_eq!(encode(&value, &mut memory), Ok(needed_bytes));
        assert!(memory[needed_bytes..].iter().all(|byte| *byte == 0xEE), "what is left over is left alone");
    }

    #[test]
    fn all_of_an_object_is_written_whatever_lay_there() {
        let value = everything(20);
        let clean = encoded(&value);
        for filler in [0, 0xFF] {
            let mut memory = AlignedVec::<64>::new();
            memory.resize(clean.len(), filler);
            encode(&value, &mut memory).unwrap();
            assert_eq!(&memory[..], &clean[..], "the same value has the same bytes");
        }
    }

    #[test]
    fn a_value_without_an_end_is_refused() {
        // 3 GiB that nobody touches: zeroed memory, and an encoder that only counts.
        let zeros = vec![0_u8; 3 << 30];
        assert_eq!(encode(&zeros, &mut []), Err(Encode::TooLong));
        assert_eq!(
            encode(&vec![0_u8; 1 << 30], &mut []),
            Err(Encode::DoesNotFit { needed_bytes: (1 << 30) + 8, given_bytes: 0 })
        );
    }

    /// How often memory was asked for is not seen here; that there was one write of all numbers is.
    #[test]
    fn a_vector_of_plain_values_is_written_at_once() {
        struct Counting(usize, Vec<usize>);
        impl Positional for Counting {
            fn pos(&self) -> usize {
                self.0
            }
        }
        impl Writer<Refusal> for Counting {
            fn write(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
                self.0 += bytes.len();
                self.1.push(bytes.len());
                Ok(())
            }
        }
        let writes = |value: &dyn Fn(&mut Serializer<Counting, ArenaHandle<'_>, ()>)| {
            with_arena(|arena| {
                let mut serializer = Serializer::new(Counting(0, vec![]), arena.acquire(), ());
                value(&mut serializer);
                serializer.writer.1
            })
        };
        const MIB: usize = 1 << 20;
        let numbers = vec![0.5_f64; MIB / 8];
        let points = vec![Point { x: 0.0, y: 0.0 }; MIB / 16];
        let written = writes(&|serializer| _ = serialize_using::<_, Refusal>(&numbers, serializer).unwrap());
        assert_eq!(written.iter().filter(|bytes| **bytes > 0).collect::<Vec<_>>(), [&MIB, &8]);
        let written = writes(&|serializer| _ = serialize_using::<_, Refusal>(&points, serializer).unwrap());
        assert_eq!(written.iter().filter(|bytes| **bytes > 0).collect::<Vec<_>>(), [&MIB, &8]);
        let memory = encoded(&numbers);
        assert_eq!(memory.len(), MIB + 8);
        let header = summed::<Vec<f64>>(&memory);
        assert_eq!(owned::<Vec<f64>>(access::<Vec<f64>>(&header, &memory).unwrap()), numbers);
    }

    fn point() -> impl Values<Value = Point> {
        (any::<i32>(), any::<i32>()).prop_map(|(x, y)| Point { x: x.into(), y: y.into() })
    }

    fn kind() -> impl Values<Value = Kind> {
        prop_oneof![
            Just(Kind::Plain),
            (".{0,20}", any::<u64>()).prop_map(|(name, weight)| Kind::Named { name, weight }),
            (point(), any::<Option<i8>>()).prop_map(|(point, number)| Kind::Pair(point, number)),
        ]
    }

    proptest! {
        #[test]
        fn any_value_comes_back(
            name in ".{0,40}", numbers in proptest::collection::vec(any::<i64>(), 0..50),
            kinds in proptest::collection::vec(kind(), 0..20), maybe in proptest::option::of(point()),
            map in proptest::collection::btree_map(".{0,12}", proptest::collection::vec(any::<u8>(), 0..9), 0..80),
        ) {
            let value = Everything {
                name, kinds, map, maybe: maybe.map(Box::new),
                numbers: numbers.iter().map(|n| *n as f64).collect(),
                ..everything(3)
            };
            let memory = encoded(&value);
            let found = access::<Everything>(&summed::<Everything>(&memory), &memory);
            prop_assert_eq!(owned::<Everything>(found.unwrap()), value);
        }

        /// The checksum agrees, so the check of the structure is all that stands between these bytes and their reader.
        #[test]
        fn any_bytes_are_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
            let mut memory = AlignedVec::<64>::new();
            memory.extend_from_slice(&bytes);
            read_to_the_end(&memory);
        }

        /// The same, and closer to the truth: a real object with a few bytes overwritten.
        #[test]
        fn a_damaged_object_is_a_value_or_an_error(
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6), entries in 0..80_u32,
            near_the_root in any::<bool>(), cut in 0..40_usize,
        ) {
            let mut memory = encoded(&everything(entries));
            memory.resize(memory.len() - if cut < 20 { 0 } else { cut }, 0);
            let from = if near_the_root { memory.len() - 260 } else { 0 };
            for (at, byte) in damage {
                let at = from + at.index(memory.len() - from);
                memory[at] = byte;
            }
            read_to_the_end(&memory);
        }
    }

    /// Checks bytes as several types; what passes is read to its last byte, in both ways.
    fn read_to_the_end(memory: &[u8]) {
        if let Ok(found) = access::<Everything>(&summed::<Everything>(memory), memory) {
            let _ = format!("{:?}", owned::<Everything>(found));
            // SAFETY:
            // - in bounds, unshared: `access` has just succeeded, and `memory` is borrowed.
            // - unique:  read only.
            let again = unsafe { access_checked::<Everything>(memory) };
            for (key, value) in again.map.iter() {
                let _ = format!("{key}{value:?}{}", again.map.contains_key(key));
            }
        }
        if let Ok(found) = access::<Wrapped>(&summed::<Wrapped>(memory), memory) {
            let _ = owned::<Wrapped>(found);
        }
        if let Ok(found) = access::<BTreeMap<u8, Kind>>(&summed::<BTreeMap<u8, Kind>>(memory), memory) {
            let _ = owned::<BTreeMap<u8, Kind>>(found);
        }
        if let Ok(found) = access::<Vec<Option<String>>>(&summed::<Vec<Option<String>>>(memory), memory) {
            let _ = owned::<Vec<Option<String>>>(found);
        }
        let _ = access::<char>(&summed::<char>(memory), memory);
    }
}
