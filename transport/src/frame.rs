//! The frame: a fixed 64-byte header, then the key, then the payload.
//!
//! A frame means something only to whoever chose `kind`; this file knows lengths and marks. Nothing here
//! allocates, and [`Header::open`] is total: any 64 bytes give a header or a [`FrameError`].
//!
//! A long payload travels in pieces, so that short frames pass between them: the frame that opens it has the whole
//! length, its key and no payload; each piece is a frame of its own that names the same stream.

#![forbid(unsafe_code)]

use core::fmt;
use core::mem::offset_of;

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of an encoded [`Header`].
pub const HEADER_BYTES: usize = 64;
/// Longest key, bytes. The same bound as a state key's, so that a key travels in one piece.
pub const KEY_BYTES_MAX: u32 = 1024;
/// Version of the layout below. A reader refuses every other one.
pub const VERSION: u8 = 1;
/// First two bytes of every frame, `PR`. Two are enough: the header's check tells a stranger apart.
pub const MAGIC: [u8; 2] = *b"PR";
/// Longest payload a frame may claim, bytes, unless [`Limits::payload_bytes_max`] is larger: one TiB.
///
/// A payload over the *limit* is an honest sender's mistake: it is read, discarded and answered. A claim over
/// the *ceiling* is noise or malice: nobody reads a TiB to stay in step, the connection is closed.
pub const PAYLOAD_CEILING_BYTES: u64 = 1 << 40;
/// Longest payload that travels in one frame, bytes; a longer one goes in pieces of this length, the last one shorter.
/// What a short frame waits for at most, once it is the next in line: 30 us of loopback, 200 us of 10 Gbit/s.
pub const PIECE_BYTES: u64 = 256 << 10;
/// Most payloads in pieces under way at a time, one direction of one connection.
pub const STREAMS_MAX: u16 = 8;

/// What a receiver takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest payload received into memory, bytes. Default 64 MiB. A longer one is discarded and reported.
    pub payload_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { payload_bytes_max: 64 << 20 }
    }
}

/// A frame's header, decoded. Integers of the machine; no field has been interpreted beyond the two lengths.
///
/// ```
/// use praas_transport::frame::{Header, Limits, Seal, Transit};
/// let header = Header { kind: 3, call: 7, payload_bytes: 5, ..Header::default() };
/// let (mut writer, mut reader) = (Seal::default(), Seal::default());
/// let bytes = header.seal(Transit::default(), &mut writer);
/// assert_eq!(Header::open(&bytes, &mut reader, &Limits::default()), Ok((header, Transit::default())));
/// assert!(Header::open(&bytes, &mut reader, &Limits::default()).is_err(), "the same bytes again are no second frame");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// What the frame is; the layer above numbers the kinds.
    pub kind: u8,
    /// Bits of the layer above.
    pub flags: u16,
    /// A registered function's small id.
    pub function: u16,
    /// A result's status; negative says failure.
    pub status: i32,
    /// The call this frame belongs to.
    pub call: u64,
    /// Time left to the deadline when the frame was written, ns. 0 says that none was given.
    pub budget_ns: u64,
    /// One more word of the layer above.
    pub aux: u64,
    /// The sender's incarnation, so that a stale sender is refused. Connections fill it in.
    pub incarnation: u64,
    /// Bytes of key that follow the header: at most [`KEY_BYTES_MAX`].
    pub key_bytes: u32,
    /// Bytes of payload that follow the key.
    pub payload_bytes: u64,
}

/// The header on the wire. Little-endian, version 1.
///
/// | offset | bytes | field           | meaning                                                          |
/// |-------:|------:|-----------------|------------------------------------------------------------------|
/// |      0 |     2 | `magic`         | `PR`                                                             |
/// |      2 |     1 | `version`       | [`VERSION`]                                                      |
/// |      3 |     1 | `kind`          |                                                                  |
/// |      4 |     2 | `flags`         |                                                                  |
/// |      6 |     2 | `function`      |                                                                  |
/// |      8 |     4 | `check`         | of the 64 bytes with this field zero, then the frame's number: see [`Seal`] |
/// |     12 |     4 | `payload_crc32` | CRC-32 (IEEE) of key and payload that follow; zero on links without |
/// |     16 |     4 | `status`        |                                                                  |
/// |     20 |     2 | `key_bytes`     | at most [`KEY_BYTES_MAX`]                                        |
/// |     22 |     2 | `stream`        | see [`Transit::stream`]                                          |
/// |     24 |     8 | `payload_bytes` |                                                                  |
/// |     32 |     8 | `call`          |                                                                  |
/// |     40 |     8 | `budget_ns`     |                                                                  |
/// |     48 |     8 | `aux`           |                                                                  |
/// |     56 |     8 | `incarnation`   |                                                                  |
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct WireHeader {
    magic: [u8; 2],
    version: u8,
    kind: u8,
    flags: U16,
    function: U16,
    check: U32,
    payload_crc32: U32,
    status: I32,
    key_bytes: U16,
    stream: U16,
    payload_bytes: U64,
    call: U64,
    budget_ns: U64,
    aux: U64,
    incarnation: U64,
}

const _: () = assert!(size_of::<WireHeader>() == HEADER_BYTES && align_of::<WireHeader>() == 1);
const _: () = assert!(offset_of!(WireHeader, magic) == 0 && offset_of!(WireHeader, version) == 2);
const _: () = assert!(offset_of!(WireHeader, kind) == 3 && offset_of!(WireHeader, flags) == 4);
const _: () = assert!(offset_of!(WireHeader, function) == 6 && offset_of!(WireHeader, check) == 8);
const _: () = assert!(offset_of!(WireHeader, payload_crc32) == 12 && offset_of!(WireHeader, status) == 16);
const _: () = assert!(offset_of!(WireHeader, key_bytes) == 20 && offset_of!(WireHeader, stream) == 22);
const _: () = assert!(offset_of!(WireHeader, payload_bytes) == 24 && offset_of!(WireHeader, call) == 32);
const _: () = assert!(offset_of!(WireHeader, budget_ns) == 40 && offset_of!(WireHeader, aux) == 48);
const _: () = assert!(offset_of!(WireHeader, incarnation) == 56);
const _: () = assert!(KEY_BYTES_MAX <= u16::MAX as u32);
// Lengths on the wire are u64, lengths of slices are usize: from here on the two are taken for the same.
const _: () = assert!(usize::BITS == 64);

/// Why 64 bytes are not the header of a frame. The stream is out of step after this: close it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The stream does not speak our frames.
    #[error("magic {found:#06x} is not a frame's")]
    NotAFrame {
        /// The first two bytes, big-endian, as they read in a dump.
        found: u16,
    },
    /// The sender writes another layout.
    #[error("frame version {found}, this build reads {expected}")]
    Version {
        /// The sender's.
        found: u8,
        /// Ours.
        expected: u8,
    },
    /// The header changed on its way, is not the one whose turn it is, or was never one. Not said: what would have been right.
    #[error("the header's check {found:#010x} is wrong: it was changed, lost, repeated, or written with another key")]
    Check {
        /// As stated in the header.
        found: u32,
    },
    /// The payload changed on its way, or the key before it.
    #[error("the checksum of key and payload is {computed:#010x}, its header says {found:#010x}")]
    PayloadCheck {
        /// As stated in the header.
        found: u32,
        /// As computed from their bytes.
        computed: u32,
    },
    /// The sender is not the one that was greeted.
    #[error("a frame of incarnation {found}, the connection is with {expected}")]
    Stale {
        /// The frame's.
        found: u64,
        /// The peer's, as it said in its hello.
        expected: u64,
    },
    /// A payload in pieces breaks its own rules.
    #[error("stream {stream:#06x}: {what}")]
    Stream {
        /// As stated in the header.
        stream: u16,
        /// Which rule.
        what: &'static str,
    },
    /// A key longer than any key.
    #[error("header claims a key of {claimed_bytes} bytes, at most {max_bytes} are allowed")]
    KeyTooLong {
        /// As stated in the header.
        claimed_bytes: u32,
        /// [`KEY_BYTES_MAX`].
        max_bytes: u32,
    },
    /// A payload so long that staying in step with the stream is not worth reading it.
    #[error("header claims a payload of {claimed_bytes} bytes, no frame is longer than {ceiling_bytes}")]
    PayloadTooLong {
        /// As stated in the header.
        claimed_bytes: u64,
        /// [`PAYLOAD_CEILING_BYTES`], or the receiver's limit where that is larger.
        ceiling_bytes: u64,
    },
}

/// What a header carries besides its meaning: connections write and check it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transit {
    /// 0: the payload follows, all of it. `1..=STREAMS_MAX`: opens a payload that comes in pieces. The same with
    /// [`Transit::PIECE`]: the next piece of it follows.
    pub stream: u16,
    /// CRC-32 of the key and the payload that follow this header, on links that have one.
    pub payload_crc32: u32,
}

impl Transit {
    /// The bit of `stream` that tells a piece from the frame that opened its payload.
    pub const PIECE: u16 = 0x8000;
}

/// Checks headers of one direction of a connection, each with its number in the stream: a header that is changed, left out,
/// repeated or moved does not fit. One end has it to write, the other one to read.
///
/// Without a key the check is a CRC-32: it finds accidents. With one it is the first 32 bits of a BLAKE3 keyed hash, and each wrong
/// guess costs the guesser its connection.
#[derive(Clone, Default)]
pub struct Seal {
    key: Option<[u8; 32]>,
    sequence: u64,
}

impl Seal {
    /// A seal with a key that only the two ends know.
    #[must_use]
    pub fn keyed(key: [u8; 32]) -> Seal {
        Seal { key: Some(key), sequence: 0 }
    }

    /// The next frame's number.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The same from this frame on, for a connection that goes on elsewhere.
    #[must_use]
    pub fn at(self, sequence: u64) -> Seal {
        Seal { sequence, ..self }
    }

    /// The key, for whoever the connection is lent to. A secret.
    #[must_use]
    pub fn key(&self) -> Option<&[u8; 32]> {
        self.key.as_ref()
    }

    /// Of a header whose check field is zero.
    #[inline]
    fn check(&self, header: &[u8; HEADER_BYTES]) -> u32 {
        let mut bytes = [0; HEADER_BYTES + 8];
        bytes[..HEADER_BYTES].copy_from_slice(header);
        bytes[HEADER_BYTES..].copy_from_slice(&self.sequence.to_le_bytes());
        match &self.key {
            None => crc32fast::hash(&bytes),
            Some(key) => {
                let [a, b, c, d, ..] = *blake3::keyed_hash(key, &bytes).as_bytes();
                u32::from_le_bytes([a, b, c, d])
            }
        }
    }
}

/// Says whether there is a key, not which.
impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal").field("keyed", &self.key.is_some()).field("sequence", &self.sequence).finish()
    }
}

/// What [`Transit::payload_crc32`] is of: the key, then the payload.
pub(crate) fn crc32_of(parts: &[&[u8]]) -> crc32fast::Hasher {
    let mut crc32 = crc32fast::Hasher::new();
    parts.iter().for_each(|part| crc32.update(part));
    crc32
}

impl Header {
    /// The 64 bytes of this header as the next one of its direction.
    ///
    /// # Panics
    /// When `key_bytes` is over [`KEY_BYTES_MAX`]: senders check before they come here.
    #[inline]
    #[must_use]
    pub fn seal(&self, transit: Transit, seal: &mut Seal) -> [u8; HEADER_BYTES] {
        assert!(self.key_bytes <= KEY_BYTES_MAX, "a key is checked before its header is sealed");
        #[expect(clippy::cast_possible_truncation, reason = "asserted above to be at most KEY_BYTES_MAX")]
        let key_bytes = self.key_bytes as u16;
        let mut wire = WireHeader {
            magic: MAGIC,
            version: VERSION,
            kind: self.kind,
            flags: U16::new(self.flags),
            function: U16::new(self.function),
            check: U32::ZERO,
            payload_crc32: U32::new(transit.payload_crc32),
            status: I32::new(self.status),
            key_bytes: U16::new(key_bytes),
            stream: U16::new(transit.stream),
            payload_bytes: U64::new(self.payload_bytes),
            call: U64::new(self.call),
            budget_ns: U64::new(self.budget_ns),
            aux: U64::new(self.aux),
            incarnation: U64::new(self.incarnation),
        };
        let bytes: [u8; HEADER_BYTES] = zerocopy::transmute!(wire);
        wire.check = U32::new(seal.check(&bytes));
        seal.sequence += 1;
        zerocopy::transmute!(wire)
    }

    /// Reads a header that should be the next one of its direction. Allocates nothing; every check is done before the caller
    /// can allocate by its lengths.
    ///
    /// A payload over `limits.payload_bytes_max` is *not* an error here: the receiver discards it and says so.
    ///
    /// # Errors
    /// Every [`FrameError`] but those of a payload: the stream cannot be followed any further.
    #[inline]
    pub fn open(bytes: &[u8; HEADER_BYTES], seal: &mut Seal, limits: &Limits) -> Result<(Header, Transit), FrameError> {
        let mut wire: WireHeader = zerocopy::transmute!(*bytes);
        if wire.magic != MAGIC {
            return Err(FrameError::NotAFrame { found: u16::from_be_bytes(wire.magic) });
        }
        // Before the check: another version may keep it elsewhere.
        if wire.version != VERSION {
            return Err(FrameError::Version { found: wire.version, expected: VERSION });
        }
        let found = wire.check.get();
        wire.check = U32::ZERO;
        // Not compared in constant time: who finds one good check by its timing has sent a wrong one first, and lost the connection.
        if found != seal.check(&zerocopy::transmute!(wire)) {
            return Err(FrameError::Check { found });
        }
        seal.sequence += 1;
        let key_bytes = u32::from(wire.key_bytes.get());
        if key_bytes > KEY_BYTES_MAX {
            return Err(FrameError::KeyTooLong { claimed_bytes: key_bytes, max_bytes: KEY_BYTES_MAX });
        }
        let payload_bytes = wire.payload_bytes.get();
        let ceiling_bytes = limits.payload_bytes_max.max(PAYLOAD_CEILING_BYTES);
        if payload_bytes > ceiling_bytes {
            return Err(FrameError::PayloadTooLong { claimed_bytes: payload_bytes, ceiling_bytes });
        }
        let stream = wire.stream.get();
        if stream & !Transit::PIECE > STREAMS_MAX || stream == Transit::PIECE {
            return Err(FrameError::Stream { stream, what: "there is none of this number" });
        }
        let header = Header {
            kind: wire.kind,
            flags: wire.flags.get(),
            function: wire.function.get(),
            status: wire.status.get(),
            call: wire.call.get(),
            budget_ns: wire.budget_ns.get(),
            aux: wire.aux.get(),
            incarnation: wire.incarnation.get(),
            key_bytes,
            payload_bytes,
        };
        Ok((header, Transit { stream, payload_crc32: wire.payload_crc32.get() }))
    }

    /// Bytes of the key that follows.
    #[inline]
    #[must_use]
    pub fn key_len(&self) -> usize {
        self.key_bytes as usize
    }

    /// Bytes of the payload that follows the key.
    #[inline]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "usize is 64 bits, asserted above")]
    pub fn payload_len(&self) -> usize {
        self.payload_bytes as usize
    }
}

/// Keys up to this long live in the [`Key`] itself, bytes: function names and most state keys.
const INLINE_KEY_BYTES: usize = 46;

/// A key: owned bytes, at most [`KEY_BYTES_MAX`]. No heap below 47 bytes.
#[derive(Clone)]
pub struct Key(KeyBytes);

#[derive(Clone)]
enum KeyBytes {
    Inline { len: u8, bytes: [u8; INLINE_KEY_BYTES] },
    Heap(Box<[u8]>),
}

impl Key {
    /// The empty key.
    pub const EMPTY: Key = Key(KeyBytes::Inline { len: 0, bytes: [0; INLINE_KEY_BYTES] });

    /// A copy of `bytes`, or `None` when there are more than [`KEY_BYTES_MAX`].
    #[inline]
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Key> {
        if bytes.is_empty() {
            return Some(Key::EMPTY);
        }
        if bytes.len() > KEY_BYTES_MAX as usize {
            return None;
        }
        Some(Key(match u8::try_from(bytes.len()) {
            Ok(len) if bytes.len() <= INLINE_KEY_BYTES => {
                let mut inline = [0; INLINE_KEY_BYTES];
                inline[..bytes.len()].copy_from_slice(bytes);
                KeyBytes::Inline { len, bytes: inline }
            }
            _ => KeyBytes::Heap(bytes.into()),
        }))
    }

    /// The bytes.
    #[inline]
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        match &self.0 {
            KeyBytes::Inline { len, bytes } => &bytes[..usize::from(*len)],
            KeyBytes::Heap(bytes) => bytes,
        }
    }
}

impl Default for Key {
    fn default() -> Self {
        Key::EMPTY
    }
}

impl core::ops::Deref for Key {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl AsRef<[u8]> for Key {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.as_slice().escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { payload_bytes_max: 1 << 20 };

    fn sample() -> Header {
        Header {
            kind: 0x11,
            flags: 0x2233,
            function: 0x4455,
            status: -2,
            call: 0x6677_8899_aabb_ccdd,
            budget_ns: 0x0102_0304_0506_0708,
            aux: 0x1112_1314_1516_1718,
            incarnation: 0x2122_2324_2526_2728,
            key_bytes: 3,
            payload_bytes: 0x0004_0005,
        }
    }

    /// The first header of a stream.
    fn first(header: Header) -> [u8; HEADER_BYTES] {
        header.seal(Transit::default(), &mut Seal::default())
    }

    fn open(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        Header::open(bytes, &mut Seal::default(), &LIMITS).map(|(header, _)| header)
    }

    fn make_fit(bytes: &mut [u8; HEADER_BYTES]) {
        bytes[8..12].fill(0);
        let check = Seal::default().check(bytes);
        bytes[8..12].copy_from_slice(&check.to_le_bytes());
    }

    /// A header with fields that `seal` would not write, its check made right again.
    fn forged(change: impl FnOnce(&mut [u8; HEADER_BYTES])) -> [u8; HEADER_BYTES] {
        let mut bytes = first(sample());
        change(&mut bytes);
        make_fit(&mut bytes);
        bytes
    }

    #[test]
    fn golden_bytes_of_version_1() {
        let bytes = first(sample());
        #[rustfmt::skip]
        let golden = [
            b'P', b'R', 1, 0x11, 0x33, 0x22, 0x55, 0x44, bytes[8], bytes[9], bytes[10], bytes[11], 0, 0, 0, 0,
            0xfe, 0xff, 0xff, 0xff, 3, 0, 0, 0, 5, 0, 4, 0, 0, 0, 0, 0,
            0xdd, 0xcc, 0xbb, 0xaa, 0x99, 0x88, 0x77, 0x66, 8, 7, 6, 5, 4, 3, 2, 1,
            0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x28, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21,
        ];
        assert_eq!(bytes, golden);
        let checksum = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        assert_eq!(checksum, GOLDEN_CRC32, "{checksum:#010x}");
    }

    /// Computed once by another implementation of the IEEE CRC-32 (Python's zlib) over the bytes above, check zero, and eight
    /// zero bytes of sequence.
    const GOLDEN_CRC32: u32 = 0x98e4_aa07;

    #[test]
    fn n6_every_flip_of_one_or_two_bits_is_noticed() {
        let bytes = first(sample());
        let flip = |bytes: &mut [u8; 64], bit: usize| bytes[bit / 8] ^= 1 << (bit % 8);
        for first in 0..512 {
            let mut one = bytes;
            flip(&mut one, first);
            assert!(open(&one).is_err(), "bit {first}");
            for second in first + 1..512 {
                let mut two = one;
                flip(&mut two, second);
                assert!(open(&two).is_err(), "bits {first} and {second}");
            }
        }
    }

    #[test]
    fn n5_strangers_are_told_by_their_first_bytes() {
        let start_with = |start: &[u8]| {
            let mut bytes = first(sample());
            bytes[..start.len()].copy_from_slice(start);
            open(&bytes)
        };
        assert_eq!(start_with(b"GET / HTTP/1.1"), Err(FrameError::NotAFrame { found: 0x4745 }));
        assert_eq!(start_with(b"PR\x02"), Err(FrameError::Version { found: 2, expected: 1 }));
        assert_eq!(start_with(b"PR\x00"), Err(FrameError::Version { found: 0, expected: 1 }));
        assert!(matches!(start_with(b"PR\x01\x12"), Err(FrameError::Check { .. })));
        assert!(matches!(open(&[0; 64]), Err(FrameError::NotAFrame { found: 0 })));
    }

    #[test]
    fn n5_streams_that_do_not_exist_are_refused_though_the_check_fits() {
        for stream in 0..=u16::MAX {
            let bytes = forged(|bytes| bytes[22..24].copy_from_slice(&stream.to_le_bytes()));
            let known = stream == 0 || (1..=STREAMS_MAX).contains(&(stream & !Transit::PIECE));
            assert_eq!(open(&bytes).is_ok(), known, "{stream:#x}");
        }
    }

    /// A2, N6: repeated, left out, exchanged, or of another key: every one is noticed, and at the first header.
    #[test]
    fn a2_n6_only_the_header_whose_turn_it_is_fits() {
        for key in [None, Some([7; 32])] {
            let mut writer = Seal { key, sequence: 0 };
            let sent: Vec<_> = (0..4).map(|_| sample().seal(Transit::default(), &mut writer)).collect();
            for (at, bytes) in sent.iter().enumerate() {
                for sequence in 0..4 {
                    let mut reader = Seal { key, sequence };
                    let fits = Header::open(bytes, &mut reader, &LIMITS).is_ok();
                    assert_eq!(fits, at as u64 == sequence);
                    assert_eq!(reader.sequence, sequence + u64::from(fits));
                }
                let other_key = key.map_or([1; 32], |_| [8; 32]);
                let mut reader = Seal { key: Some(other_key), sequence: at as u64 };
                assert!(Header::open(bytes, &mut reader, &LIMITS).is_err());
            }
        }
    }

    #[test]
    fn a5_a_seal_does_not_show_its_key() {
        let shown = format!("{:?}", Seal::keyed([0xAB; 32]));
        assert!(!shown.contains("171") && !shown.to_lowercase().contains("ab, ab"), "{shown}");
    }

    #[test]
    fn n5_lengths_at_and_beyond_every_boundary() {
        let payload = |claimed: u64| {
            open(&forged(|bytes| bytes[24..32].copy_from_slice(&claimed.to_le_bytes())))
                .map(|header| header.payload_bytes)
        };
        for fine in [0, 1, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 32, PAYLOAD_CEILING_BYTES] {
            assert_eq!(payload(fine), Ok(fine));
        }
        for claimed_bytes in [PAYLOAD_CEILING_BYTES + 1, 1 << 63, u64::MAX - 63, u64::MAX] {
            let ceiling_bytes = PAYLOAD_CEILING_BYTES;
            assert_eq!(payload(claimed_bytes), Err(FrameError::PayloadTooLong { claimed_bytes, ceiling_bytes }));
        }
        let key = |claimed: u16| {
            open(&forged(|bytes| bytes[20..22].copy_from_slice(&claimed.to_le_bytes()))).map(|header| header.key_bytes)
        };
        assert_eq!((key(0), key(1024)), (Ok(0), Ok(1024)));
        assert_eq!(key(1025), Err(FrameError::KeyTooLong { claimed_bytes: 1025, max_bytes: 1024 }));
        assert_eq!(key(u16::MAX), Err(FrameError::KeyTooLong { claimed_bytes: 65535, max_bytes: 1024 }));
    }

    #[test]
    fn keys_of_every_length_come_back() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1025).collect();
        for len in 0..=1024 {
            assert_eq!(Key::new(&bytes[..len]).expect("a key").as_slice(), &bytes[..len]);
        }
        assert_eq!(Key::new(&bytes), None);
        assert_eq!(format!("{:?}", Key::new(b"a/..\0\n").expect("a key")), r#"b"a/..\x00\n""#);
    }

    proptest! {
        #[test]
        fn open_undoes_seal(
            (kind, flags, function, status) in any::<(u8, u16, u16, i32)>(),
            (call, budget_ns, aux, incarnation) in any::<(u64, u64, u64, u64)>(),
            key_bytes in 0..=KEY_BYTES_MAX,
            payload_bytes in 0..=PAYLOAD_CEILING_BYTES,
        ) {
            let header = Header {
                kind, flags, function, status, call, budget_ns, aux, incarnation, key_bytes, payload_bytes,
            };
            prop_assert_eq!(open(&first(header)), Ok(header));
        }

        /// N5: any bytes, with and without a fitting checksum: an answer, and lengths within their bounds.
        #[test]
        fn n5_open_is_total(mut bytes in any::<[[u8; 32]; 2]>(), fit in any::<bool>()) {
            if fit {
                bytes[0][..3].copy_from_slice(b"PR\x01");
            }
            let mut bytes: [u8; 64] = zerocopy::transmute!(bytes);
            if fit {
                make_fit(&mut bytes);
            }
            if let Ok((header, transit)) = Header::open(&bytes, &mut Seal::default(), &LIMITS) {
                prop_assert!(header.key_bytes <= KEY_BYTES_MAX);
                prop_assert!(header.payload_bytes <= PAYLOAD_CEILING_BYTES);
                prop_assert_eq!(header.seal(transit, &mut Seal::default()), bytes);
            }
        }
    }
}
