//! Conversions between shared words and host sizes. The crate is for 64-bit little-endian machines; asserted here, once.

const _: () = assert!(
    cfg!(target_pointer_width = "64") && cfg!(target_endian = "little"),
    "segments are laid out for 64-bit little-endian machines"
);

/// A shared 64-bit quantity as a host size. Lossless by the assertion above.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "pointers are 64 bits wide, asserted above")]
pub(crate) const fn host(quantity: u64) -> usize {
    quantity as usize
}

/// The low half of a word: a stamp, a sequence or an index.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
pub(crate) const fn low_half(word: u64) -> u32 {
    word as u32
}
