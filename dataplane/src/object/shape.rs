//! The shape of a type: one number for all names and types in it, a constant.
//!
//! Own code, because what there is does not hold: the hash that `type_hash` 0.3 derives leaves out the names and the order of an enum's
//! variants, puts no boundary between a nested struct and what follows it (so a field may move from one to the other unseen),
//! depends on the width of pointers, and does not end for a recursive type. Here each thing is hashed with its kind and its length in front,
//! a nested type as its own finished number, and the compiler does it all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::{NonZeroI8, NonZeroI16, NonZeroI32, NonZeroI64, NonZeroI128};
use std::num::{NonZeroU8, NonZeroU16, NonZeroU32, NonZeroU64, NonZeroU128};
use std::time::Duration;

use rkyv::Archive;

/// A type that objects can be made of. Written by [`state_type!`](crate::state_type), or by hand for what that cannot express: a
/// generic type, or a recursive one, whose shape cannot be computed from itself.
///
/// ```
/// use praas_dataplane::object::{Shape, Shaper, rkyv};
///
/// #[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
/// #[rkyv(crate = rkyv)]
/// struct Pair<T> {
///     left: T,
///     right: T,
/// }
///
/// impl<T: Shape> Shape for Pair<T> {
///     const SHAPE: u64 = Shaper::new("struct", "Pair").field("left", T::SHAPE).field("right", T::SHAPE).finish();
/// }
/// ```
pub trait Shape: Archive {
    /// Says of what the type is made. The same in every build and process; another as soon as the definition changes.
    const SHAPE: u64;
}

/// Computes a [`Shape::SHAPE`]: FNV-1a over all it is told, mixed at the end. Not against malice: two types made on purpose to have
/// the same shape still meet the check of the structure.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct Shaper(u64);

impl Shaper {
    /// Starts with what it is (`struct`, `enum`, …) and its name.
    pub const fn new(kind: &str, name: &str) -> Shaper {
        Shaper(0xCBF2_9CE4_8422_2325).text(b'K', kind).text(b'N', name)
    }

    /// One field more: its name, empty for one without, and its type's shape.
    pub const fn field(self, name: &str, shape: u64) -> Shaper {
        self.text(b'F', name).bytes(&shape.to_le_bytes())
    }

    /// One variant more. Fields that follow are its own.
    pub const fn variant(self, name: &str) -> Shaper {
        self.text(b'V', name)
    }

    /// A number that counts: an array's length, a variant's discriminant.
    pub const fn number(self, number: i128) -> Shaper {
        self.bytes(b"#").bytes(&number.to_le_bytes())
    }

    /// An attribute of the field or variant before. Those of rkyv count, as they can change the layout; others do not, and spaces never.
    pub const fn attribute(self, text: &str) -> Shaper {
        match text.as_bytes() {
            [b'r', b'k', b'y', b'v', ..] => self.text(b'A', text),
            _ => self,
        }
    }

    /// The shape.
    pub const fn finish(self) -> u64 {
        // FNV leaves the last bytes in the low bits. Two multiplications with shifts between spread them (the finaliser of MurmurHash3).
        let mut hash = self.0;
        hash = (hash ^ (hash >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
        hash = (hash ^ (hash >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
        hash ^ (hash >> 33)
    }

    /// What it is, the text without spaces, and its length: so that no two sequences of texts run into the same bytes.
    const fn text(mut self, what: u8, text: &str) -> Shaper {
        self = self.bytes(&[what]);
        let bytes = text.as_bytes();
        let (mut at, mut length) = (0, 0_u64);
        while at < bytes.len() {
            if !bytes[at].is_ascii_whitespace() {
                self = self.bytes(&[bytes[at]]);
                length += 1;
            }
            at += 1;
        }
        self.bytes(&length.to_le_bytes())
    }

    const fn bytes(mut self, bytes: &[u8]) -> Shaper {
        let mut at = 0;
        while at < bytes.len() {
            self.0 = (self.0 ^ bytes[at] as u64).wrapping_mul(0x0000_0100_0000_01B3);
            at += 1;
        }
        self
    }
}

macro_rules! plain {
    ($($type:ty),+ $(,)?) => {$(
        impl Shape for $type {
            const SHAPE: u64 = Shaper::new("plain", stringify!($type)).finish();
        }
    )+};
}
plain!(bool, char, f32, f64, String, Duration, ());
plain!(u8, u16, u32, u64, u128, i8, i16, i32, i64, i128);
plain!(NonZeroU8, NonZeroU16, NonZeroU32, NonZeroU64, NonZeroU128);
plain!(NonZeroI8, NonZeroI16, NonZeroI32, NonZeroI64, NonZeroI128);

impl<T: Shape> Shape for Option<T> {
    const SHAPE: u64 = Shaper::new("std", "Option").field("", T::SHAPE).finish();
}
impl<T: Shape> Shape for Box<T> {
    const SHAPE: u64 = Shaper::new("std", "Box").field("", T::SHAPE).finish();
}
impl<T: Shape, E: Shape> Shape for Result<T, E> {
    const SHAPE: u64 = Shaper::new("std", "Result").field("", T::SHAPE).field("", E::SHAPE).finish();
}
impl<T: Shape, const N: usize> Shape for [T; N] {
    const SHAPE: u64 = Shaper::new("std", "array").field("", T::SHAPE).number(N as i128).finish();
}
impl<K: Shape + Ord, V: Shape> Shape for BTreeMap<K, V>
where
    BTreeMap<K, V>: Archive,
{
    const SHAPE: u64 = Shaper::new("std", "BTreeMap").field("", K::SHAPE).field("", V::SHAPE).finish();
}
impl<T: Shape + Ord> Shape for BTreeSet<T>
where
    BTreeSet<T>: Archive,
{
    const SHAPE: u64 = Shaper::new("std", "BTreeSet").field("", T::SHAPE).finish();
}
impl<T: Shape> Shape for Vec<T> {
    const SHAPE: u64 = Shaper::new("std", "Vec").field("", element::<T>()).finish();
}
impl<T: Shape> Shape for VecDeque<T> {
    const SHAPE: u64 = Shaper::new("std", "VecDeque").field("", element::<T>()).finish();
}

/// Of elements without bytes there may be any number in no bytes at all: a length of 32 bits would be cut, and a check would
/// count to whatever a damaged length says.
const fn element<T: Shape>() -> u64 {
    assert!(size_of::<T::Archived>() > 0, "elements of a stored vector have at least one byte");
    T::SHAPE
}

macro_rules! tuples {
    ($(($($name:ident)+))+) => {$(
        impl<$($name: Shape),+> Shape for ($($name,)+) {
            const SHAPE: u64 = Shaper::new("std", "tuple")$(.field("", $name::SHAPE))+.finish();
        }
    )+};
}
tuples! {
    (A) (A B) (A B C) (A B C D) (A B C D E) (A B C D E F) (A B C D E F G) (A B C D E F G H)
    (A B C D E F G H I) (A B C D E F G H I J) (A B C D E F G H I J K) (A B C D E F G H I J K L)
}

/// Defines types whose values can be state objects: structs and enums as they are always written, one after the other.
///
/// Each gets rkyv's `Archive`, `Serialize` and `Deserialize` and a [`Shape`](crate::object::Shape). Beside a `struct Grid` stands the
/// `struct ArchivedGrid` that a reader gets. Attributes work as always, also rkyv's, whose `#[rkyv(derive(Debug))]` and `#[rkyv(compare(PartialEq))]` give
/// the archived type a `Debug` and a `PartialEq` with its original. Types with parameters and recursive types are written by hand:
/// see [`Shape`](crate::object::Shape).
#[macro_export]
macro_rules! state_type {
    () => {};
    (
        $(#[$attribute:meta])*
        $visible:vis struct $name:ident {
            $($(#[$field_attribute:meta])* $field_visible:vis $field:ident: $type:ty),* $(,)?
        }
        $($rest:tt)*
    ) => {
        #[derive($crate::object::rkyv::Archive, $crate::object::rkyv::Serialize, $crate::object::rkyv::Deserialize)]
        #[rkyv(crate = $crate::object::rkyv)]
        $(#[$attribute])*
        $visible struct $name {
            $($(#[$field_attribute])* $field_visible $field: $type,)*
        }
        impl $crate::object::Shape for $name {
            const SHAPE: u64 = $crate::object::Shaper::new("struct", stringify!($name))
                $(.field(stringify!($field), <$type as $crate::object::Shape>::SHAPE)
                $(.attribute(stringify!($field_attribute)))*)*
                .finish();
        }
        $crate::state_type!($($rest)*);
    };
    (
        $(#[$attribute:meta])*
        $visible:vis struct $name:ident(
            $($(#[$field_attribute:meta])* $field_visible:vis $type:ty),* $(,)?
        );
        $($rest:tt)*
    ) => {
        #[derive($crate::object::rkyv::Archive, $crate::object::rkyv::Serialize, $crate::object::rkyv::Deserialize)]
        #[rkyv(crate = $crate::object::rkyv)]
        $(#[$attribute])*
        $visible struct $name($($(#[$field_attribute])* $field_visible $type,)*);
        impl $crate::object::Shape for $name {
            const SHAPE: u64 = $crate::object::Shaper::new("tuple struct", stringify!($name))
                $(.field("", <$type as $crate::object::Shape>::SHAPE)
                $(.attribute(stringify!($field_attribute)))*)*
                .finish();
        }
        $crate::state_type!($($rest)*);
    };
    (
        $(#[$attribute:meta])*
        $visible:vis struct $name:ident;
        $($rest:tt)*
    ) => {
        #[derive($crate::object::rkyv::Archive, $crate::object::rkyv::Serialize, $crate::object::rkyv::Deserialize)]
        #[rkyv(crate = $crate::object::rkyv)]
        $(#[$attribute])*
        $visible struct $name;
        impl $crate::object::Shape for $name {
            const SHAPE: u64 = $crate::object::Shaper::new("unit struct", stringify!($name)).finish();
        }
        $crate::state_type!($($rest)*);
    };
    (
        $(#[$attribute:meta])*
        $visible:vis enum $name:ident {
            $(
                $(#[$variant_attribute:meta])*
                $variant:ident
                $({ $($(#[$field_attribute:meta])* $field:ident: $type:ty),* $(,)? })?
                $(( $($(#[$place_attribute:meta])* $place:ty),* $(,)? ))?
                $(= $discriminant:expr)?
            ),+ $(,)?
        }
        $($rest:tt)*
    ) => {
        #[derive($crate::object::rkyv::Archive, $crate::object::rkyv::Serialize, $crate::object::rkyv::Deserialize)]
        #[rkyv(crate = $crate::object::rkyv)]
        $(#[$attribute])*
        $visible enum $name {
            $(
                $(#[$variant_attribute])*
                $variant
                $({ $($(#[$field_attribute])* $field: $type,)* })?
                $(( $($(#[$place_attribute])* $place,)* ))?
                $(= $discriminant)?,
            )+
        }
        impl $crate::object::Shape for $name {
            const SHAPE: u64 = $crate::object::Shaper::new("enum", stringify!($name))
                $(
                    .variant(stringify!($variant))
                    $(.attribute(stringify!($variant_attribute)))*
                    $($(.field(stringify!($field), <$type as $crate::object::Shape>::SHAPE)
                    $(.attribute(stringify!($field_attribute)))*)*)?
                    $($(.field("", <$place as $crate::object::Shape>::SHAPE)
                    $(.attribute(stringify!($place_attribute)))*)*)?
                    $(.number($discriminant as i128))?
                )+
                .finish();
        }
        $crate::state_type!($($rest)*);
    };
}
