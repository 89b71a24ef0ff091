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
    assert!(into.is_empty() || into.as_ptr().addr().is_multiple_of(VALUE_ALIGN), "a value lies at a multiple of 32 bytes");
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
    const { assert!(align_of::<Archived<T>>() <= VALUE_ALIGN, "a value lies at a multiple of 32 bytes") };
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

/// Whether an object is a `T`, checked from its fingerprint to its last byte. `value` begins at a multiple of 32 bytes, as blocks have it; elsewhere it is
/// an error. Allocates nothing. Whoever has checked an object once reads it with [`access_checked`] from then on.
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
/// - No byte of them has changed since, and none changes as long as the result lives.
#[must_use]
pub unsafe fn access_checked<T: StateType>(value: &[u8]) -> &Archived<T> {
    // SAFETY:
    // - in bounds: `check` found the root at the end of `value` and all that it points to inside; the caller vouches that it was called.
    // - unshared:  whoever wrote the bytes does so no more, the caller vouches for that, too.
    // - unique:    not needed: it is read only, and archived types have no interior mutability.
    unsafe { rkyv::access_unchecked::<Archived<T>>(value) }
}
