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
    ///
    /// # Panics
    /// On `cfg`, and so does not compile: what is left out of the type would still count here.
    pub const fn attribute(self, text: &str) -> Shaper {
        match text.as_bytes() {
            [b'r', b'k', b'y', b'v', ..] => self.text(b'A', text),
            [b'c', b'f', b'g', ..] => {
                panic!("no #[cfg] on parts of a stored type: define it twice, with #[cfg] on state_type!")
            }
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
///
/// What cannot be stored does not compile: here a number whose width depends on the machine, then a vector of elements without bytes.
///
/// ```compile_fail,E0277
/// praas_dataplane::state_type! {
///     struct Counter { count: usize }
/// }
/// ```
///
/// ```compile_fail,E0080
/// praas_dataplane::state_type! {
///     struct Nothing;
///     struct Nothings { many: Vec<Nothing> }
/// }
/// # const _: u64 = praas_dataplane::object::fingerprint::<Nothings>();
/// ```
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::fingerprint;

    /// The shape of each definition; the names of types may repeat, each stands in a module of its own.
    macro_rules! shapes {
        ($($name:ident: { $($definition:tt)* })+) => {{
            $(
                #[allow(dead_code, missing_docs, missing_debug_implementations, unused_imports, reason = "only their shapes are looked at")]
                mod $name {
                    use std::collections::*;
                    crate::state_type!($($definition)*);
                }
            )+
            [$((stringify!($name), fingerprint::<$name::Thing>())),+]
        }};
    }

    #[track_caller]
    fn all_differ(shapes: &[(&str, u64)]) {
        for (n, (name, shape)) in shapes.iter().enumerate() {
            assert_ne!(*shape, crate::object::RAW, "{name}");
            for (other_name, other) in &shapes[..n] {
                assert_ne!(shape, other, "{name} and {other_name}");
            }
        }
    }

    #[test]
    fn a_struct_that_changes_has_another_shape() {
        all_differ(&shapes! {
            original: { pub struct Thing { left: u32, right: String } }
            field_renamed: { pub struct Thing { left: u32, right_side: String } }
            type_changed: { pub struct Thing { left: i32, right: String } }
            same_size: { pub struct Thing { left: f32, right: String } }
            added: { pub struct Thing { left: u32, right: String, more: u8 } }
            added_without_bytes: { pub struct Thing { left: u32, right: String, more: () } }
            removed: { pub struct Thing { left: u32 } }
            reordered: { pub struct Thing { right: String, left: u32 } }
            wrapped: { pub struct Thing { left: Option<u32>, right: String } }
            boxed: { pub struct Thing { left: Box<u32>, right: String } }
            array: { pub struct Thing { left: [u32; 1], right: String } }
            longer_array: { pub struct Thing { left: [u32; 2], right: String } }
            tuple: { pub struct Thing(u32, String); }
            tuple_in_tuple: { pub struct Thing((u32, String)); }
            unit: { pub struct Thing; }
            unnamed_empty: { pub struct Thing(); }
            empty: { pub struct Thing {} }
            skipped: { pub struct Thing { left: u32, #[rkyv(with = crate::object::rkyv::with::Skip)] right: String } }
        });
    }

    #[test]
    fn a_nested_struct_that_changes_changes_what_holds_it() {
        all_differ(&shapes! {
            original: { pub struct Thing { inner: Vec<Inner>, b: u8 } struct Inner { a: u8 } }
            field_renamed: { pub struct Thing { inner: Vec<Inner>, b: u8 } struct Inner { c: u8 } }
            field_moved_out: { pub struct Thing { inner: Vec<Inner> } struct Inner { a: u8, b: u8 } }
            type_renamed: { pub struct Thing { inner: Vec<Inside>, b: u8 } struct Inside { a: u8 } }
            two_deep: { pub struct Thing { inner: Vec<Inner>, b: u8 } struct Inner { a: Deep } struct Deep(u8); }
            three_deep: { pub struct Thing { inner: Vec<Inner>, b: u8 } struct Inner { a: Deep } struct Deep(Vec<u8>); }
            other_sequence: { pub struct Thing { inner: VecDeque<Inner>, b: u8 } struct Inner { a: u8 } }
            pairs_left: { pub struct Thing { inner: ((u8, u8), u8) } }
            pairs_right: { pub struct Thing { inner: (u8, (u8, u8)) } }
            pairs_none: { pub struct Thing { inner: (u8, u8, u8) } }
            map: { pub struct Thing { inner: BTreeMap<u8, u16> } }
            map_swapped: { pub struct Thing { inner: BTreeMap<u16, u8> } }
        });
    }

    /// The published hash of types sees none of these but the last.
    #[test]
    fn an_enum_that_changes_has_another_shape() {
        all_differ(&shapes! {
            original: { pub enum Thing { Red, Green { shade: u8 } } }
            renamed: { pub enum Thing { Rot, Green { shade: u8 } } }
            reordered: { pub enum Thing { Green { shade: u8 }, Red } }
            added: { pub enum Thing { Red, Green { shade: u8 }, Blue } }
            removed: { pub enum Thing { Green { shade: u8 } } }
            unnamed: { pub enum Thing { Red, Green(u8) } }
            discriminant: { pub enum Thing { Red, Green } }
            other_discriminant: { pub enum Thing { Red = 1, Green } }
            third_discriminant: { pub enum Thing { Red = 1, Green = 7 } }
            moved_field: { pub enum Thing { Red { shade: u8 }, Green } }
        });
    }

    #[test]
    fn what_does_not_matter_does_not_count() {
        let shapes = shapes! {
            original: { pub struct Thing { left: u32, right: String } }
            documented: {
                /// A thing.
                #[derive(Debug, Clone)]
                #[rkyv(derive(Debug))]
                pub(crate) struct Thing {
                    /// Left of it.
                    pub left: u32,
                    #[allow(dead_code, reason = "an attribute like any")]
                    pub(crate) right: String,
                }
            }
        };
        assert_eq!(shapes[0].1, shapes[1].1);
    }

    /// The numbers themselves: a build that computes others cannot read what is stored. Whoever changes them raises `MAGIC`.
    #[test]
    fn golden_fingerprints() {
        let shapes = shapes! {
            a_struct: { pub struct Thing { left: u32, right: Vec<(f64, String)>, map: BTreeMap<String, [i16; 3]> } }
            an_enum: { #[repr(u8)] pub enum Thing { Red = 3, Green { shade: Option<u8> }, Blue(Box<bool>) } }
        };
        assert_eq!(u64::SHAPE, 11_138_325_277_763_966_997);
        assert_eq!(shapes, [("a_struct", 15_768_132_609_978_558_869), ("an_enum", 11_670_278_565_620_451_323)]);
    }

    #[test]
    fn shapes_are_constants() {
        const SHAPE: u64 = <Vec<Option<String>> as Shape>::SHAPE;
        assert_eq!(SHAPE, Vec::<Option<String>>::SHAPE);
    }
}
