//! The five messages of a hello, as they lie on the wire. Little-endian, fixed sizes, version 1.

#![forbid(unsafe_code)]

use core::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::secret::{NAME_BYTES_MAX, is_name};

/// First four bytes of every message. A frame begins with `PR`, and its version where `A` stands here: none is taken for the other.
pub(super) const MAGIC: [u8; 4] = *b"PRAH";
/// Version of the layouts below.
pub const HELLO_VERSION: u8 = 1;

/// What a message is.
pub(super) mod kind {
    pub(in super::super) const HELLO: u8 = 1;
    pub(in super::super) const CHALLENGE: u8 = 2;
    pub(in super::super) const PROOF: u8 = 3;
    pub(in super::super) const REFUSED: u8 = 4;
    pub(in super::super) const REFUSED_VERSION: u8 = 5;
}

/// How both ends prove themselves.
pub(super) mod suite {
    /// Not at all: the hashes below have a key that everybody knows, and find accidents only.
    pub(in super::super) const PLAIN: u8 = 0;
    /// BLAKE3 keyed hashes over everything said, under the possession key of the initiator's credential.
    pub(in super::super) const BLAKE3: u8 = 1;
}

/// Bit of `features`: payloads carry a checksum. It holds when either end asks for it.
pub(super) const PAYLOAD_CHECKSUMS: u32 = 1;

/// Starts every message.
///
/// | offset | bytes | field           | meaning                            |
/// |-------:|------:|-----------------|------------------------------------|
/// |      0 |     4 | `magic`         | `PRAH`                             |
/// |      4 |     1 | `hello_version` | [`HELLO_VERSION`]                  |
/// |      5 |     1 | `kind`          | hello, challenge, proof, refused…  |
/// |      6 |     1 | `suite`         | 0 unkeyed, 1 BLAKE3                |
/// |      7 |     1 | `_reserved`     | zero                               |
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Head {
    pub(super) magic: [u8; 4],
    pub(super) hello_version: u8,
    pub(super) kind: u8,
    pub(super) suite: u8,
    _reserved: u8,
}

impl Head {
    pub(super) fn new(kind: u8, suite: u8) -> Head {
        Head { magic: MAGIC, hello_version: HELLO_VERSION, kind, suite, _reserved: 0 }
    }
}

/// A name in a fixed place: its length, then its bytes, then zeros.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct Name {
    length: u8,
    _reserved: [u8; 7],
    bytes: [u8; NAME_BYTES_MAX],
}

impl Name {
    pub(super) const NONE: Name = Name { length: 0, _reserved: [0; 7], bytes: [0; NAME_BYTES_MAX] };

    /// # Panics
    /// When it is over 64 bytes.
    pub(super) fn new(name: &str) -> Name {
        let mut bytes = [0; NAME_BYTES_MAX];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Name { length: u8::try_from(name.len()).expect("a name is at most 64 bytes"), bytes, ..Name::NONE }
    }

    /// The name, if it is one and nothing stands around it.
    pub(super) fn get(&self) -> Option<&str> {
        let (name, rest) = self.bytes.split_at_checked(usize::from(self.length))?;
        let sound = is_name(name) && self.is_clean() && rest.iter().all(|byte| *byte == 0);
        sound.then(|| str::from_utf8(name).expect("a name is ASCII"))
    }

    pub(super) fn is_none(&self) -> bool {
        self.as_bytes().iter().all(|byte| *byte == 0)
    }

    fn is_clean(&self) -> bool {
        self._reserved == [0; 7]
    }
}

/// Initiator to responder, first: who I am, what I want, which versions I speak.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct HelloMessage {
    pub(super) head: Head,
    pub(super) version_min: U32,
    pub(super) version_max: U32,
    /// Those the initiator asks for. Unknown ones are not answered, so they do not hold.
    pub(super) features: U32,
    pub(super) role: u8,
    pub(super) purpose: u8,
    pub(super) _reserved: [u8; 2],
    pub(super) nonce: [u8; 32],
    pub(super) session_id: [u8; 16],
    pub(super) incarnation: U64,
    pub(super) expires_unix_s: U64,
    pub(super) subject: Name,
}

/// Responder to initiator: who I am, what holds, and that I know your key.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct ChallengeMessage {
    pub(super) head: Head,
    pub(super) version: U32,
    /// Those that hold.
    pub(super) features: U32,
    pub(super) nonce: [u8; 32],
    pub(super) incarnation: U64,
    pub(super) process: Name,
    pub(super) proof: [u8; 32],
}

/// Initiator to responder: I know it, too.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct ProofMessage {
    pub(super) head: Head,
    pub(super) proof: [u8; 32],
}

/// Responder to initiator, last. Of `REFUSED` everything after the head is zero, whatever the cause.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RefusedMessage {
    pub(super) head: Head,
    pub(super) version_min: U32,
    pub(super) version_max: U32,
}

pub(super) const HELLO_BYTES: usize = size_of::<HelloMessage>();
pub(super) const CHALLENGE_BYTES: usize = size_of::<ChallengeMessage>();
pub(super) const PROOF_BYTES: usize = size_of::<ProofMessage>();
pub(super) const REFUSED_BYTES: usize = size_of::<RefusedMessage>();
/// Of a challenge, what its own proof covers.
pub(super) const CHALLENGE_SAID_BYTES: usize = offset_of!(ChallengeMessage, proof);

const _: () = assert!(HELLO_BYTES == 160 && CHALLENGE_BYTES == 160 && PROOF_BYTES == 40 && REFUSED_BYTES == 16);
const _: () = assert!(offset_of!(HelloMessage, version_min) == 8 && offset_of!(HelloMessage, features) == 16);
const _: () = assert!(offset_of!(HelloMessage, role) == 20 && offset_of!(HelloMessage, nonce) == 24);
const _: () = assert!(offset_of!(HelloMessage, session_id) == 56 && offset_of!(HelloMessage, incarnation) == 72);
const _: () = assert!(offset_of!(HelloMessage, expires_unix_s) == 80 && offset_of!(HelloMessage, subject) == 88);
const _: () = assert!(offset_of!(ChallengeMessage, version) == 8 && offset_of!(ChallengeMessage, features) == 12);
const _: () = assert!(offset_of!(ChallengeMessage, nonce) == 16 && offset_of!(ChallengeMessage, incarnation) == 48);
const _: () = assert!(offset_of!(ChallengeMessage, process) == 56 && CHALLENGE_SAID_BYTES == 128);
