//! Two words that are stored and moved as one.
//!
//! Compilers move a structure 16 bytes at a time. A 16-byte load that follows smaller stores to the same bytes cannot be
//! forwarded from them and waits until they have reached the cache, 5 to 10 ns each time. A call and its answer had a
//! dozen such waits: 0.11 of 0.41 µs. So the words of a message are joined in registers and kept in pairs, and what
//! holds pairs is a plain structure: in an enum the compiler moves every piece that any variant has by itself.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128i as Word128, _mm_cvtsi128_si64, _mm_set_epi64x, _mm_unpackhi_epi64};

/// Two words that are stored and moved as one. Little-endian, as `width.rs` asserts.
#[derive(Copy, Clone, zerocopy::IntoBytes, zerocopy::Immutable)]
#[repr(transparent)]
pub(crate) struct Pair(Word128);

#[cfg(target_arch = "x86_64")]
impl Pair {
    #[inline(always)]
    pub(crate) fn new(low: u64, high: u64) -> Self {
        // SAFETY: the instruction is SSE2, a part of every x86-64; it touches no memory.
        Self(unsafe { _mm_set_epi64x(high.cast_signed(), low.cast_signed()) })
    }

    #[inline(always)]
    pub(crate) fn low(self) -> u64 {
        // SAFETY: as in `new`.
        unsafe { _mm_cvtsi128_si64(self.0) }.cast_unsigned()
    }

    #[inline(always)]
    pub(crate) fn high(self) -> u64 {
        // SAFETY: as in `new`.
        let high = unsafe { _mm_unpackhi_epi64(self.0, self.0) };
        Self(high).low()
    }
}

#[cfg(not(target_arch = "x86_64"))]
type Word128 = u128;

#[cfg(not(target_arch = "x86_64"))]
impl Pair {
    #[inline(always)]
    pub(crate) fn new(low: u64, high: u64) -> Self {
        Self(u128::from(low) | u128::from(high) << 64)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
    pub(crate) fn low(self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the high half is what is asked for")]
    pub(crate) fn high(self) -> u64 {
        (self.0 >> 64) as u64
    }
}
