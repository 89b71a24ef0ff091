//! State: named objects that outlive an invocation, the worker that wrote them, and (with swapping) the process.

use std::any::TypeId;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::{Duration, SystemTime};

use praas_shm::Listed;

use super::session::{Pinned, Session};
use crate::error::Failure;
use crate::object::{self, BadObject, HEADER_BYTES, Header, StateType, TypeError};
use crate::payload::Loan;
use crate::wire::Code;
use crate::wire::state::{Fetched, WHATEVER};
use crate::worker::typed::Typed;

/// Why something about the state was not done. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A key has 1 to 1024 bytes.
    #[error("a key of {bytes} bytes: keys have 1 to 1024")]
    KeyLength {
        /// Of the key that was given.
        bytes: usize,
    },
    /// The object is larger than the process allows. Not a byte of it was written.
    #[error("an object of {bytes} bytes, the process allows {max}: see --state-object-bytes-max")]
    TooLarge {
        /// Of the value that was given.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// There is no memory for it: this worker's arena, the process's quota, or the machine's.
    #[error("no space for state: {text}")]
    NoSpace {
        /// What was needed and what is free.
        text: String,
    },
    /// Another version than the expected one is current.
    #[error("{}", conflict(.current))]
    Conflict {
        /// Which; `None`: there is no object.
        current: Option<u64>,
    },
    /// This worker holds as many objects as it can at a time: drop some first.
    #[error("255 objects are held already: drop some first")]
    TooManyHeld,
    /// The object is of another type, or not what its header says.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// What lies there is no object.
    #[error("corrupt object: {0}")]
    Corrupt(#[from] BadObject),
    /// A value that rkyv refuses to write.
    #[error("the value cannot be stored: {text}")]
    Encode {
        /// What it said.
        text: String,
    },
    /// The controller said what it never says.
    #[error("protocol error: {text}")]
    Protocol {
        /// What was wrong.
        text: String,
    },
}

fn conflict(current: &Option<u64>) -> String {
    match current {
        Some(version) => format!("conflict: version {version} is current"),
        None => "conflict: there is no such object".into(),
    }
}

impl StateError {
    pub(crate) fn from_wire(code: Option<Code>, version: u64, text: &[u8]) -> StateError {
        let text = String::from_utf8_lossy(text).into_owned();
        match code {
            Some(Code::Conflict) => StateError::Conflict { current: (version != 0).then_some(version) },
            Some(Code::NoSpace) => StateError::NoSpace { text },
            Some(Code::TooLarge) => StateError::NoSpace { text },
            _ => StateError::Protocol { text },
        }
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Failure::new(-1, error.to_string())
    }
}

/// The state of the process, from inside a function: [`Context::state`](crate::Context::state).
///
/// A key is 1 to 1024 bytes of anything. An object under it is immutable: another takes its place, as a whole. What was read stays as it is for as long
/// as it is held, and its memory comes back when it is let go of. Reading takes no message and no copy (over rings); writing is one
/// message to the controller and back, after which every worker sees it.
#[derive(Debug)]
pub struct State<'a> {
    session: &'a mut Session,
}

impl<'a> State<'a> {
    pub(super) fn new(session: &'a mut Session) -> State<'a> {
        State { session }
    }

    /// The current object of a key, or `None`: missing is not empty. Over rings: no system call, no message, no copy, whatever its size; the
    /// first read of an object of another worker maps that worker's segment. Over queues the object is copied here.
    ///
    /// # Errors
    /// `KeyLength`, `TooManyHeld`.
    #[inline]
    pub fn get(&mut self, key: impl AsRef<[u8]>) -> Result<Option<Object>, StateError> {
        let object = self.session.state_get(checked_key(key.as_ref())?)?;
        Ok(object.map(|kept| Object { kept }))
    }

    /// The current object of a key as a `T`, which must be what was written. Checked once for each version, type and worker; from then on this is
    /// [`State::get`] and a comparison. Only what is touched of the value is read, but for that first check, which reads its
    /// structure: all of a list of structs, none of a plain array.
    ///
    /// # Errors
    /// As `get`, and `Type` when it is raw bytes or of another type, or corrupt.
    #[inline]
    pub fn get_typed<T: StateType + 'static>(&mut self, key: impl AsRef<[u8]>) -> Result<Option<Typed<T>>, StateError> {
        let Some(object) = self.get(key)? else { return Ok(None) };
        let (entry, version) = (object.kept.entry, object.kept.version);
        if entry.is_none_or(|entry| !self.session.was_checked(entry, version, TypeId::of::<T>())) {
            object::check::<T>(&object.header()?, &object)?;
            if let Some(entry) = entry {
                self.session.now_checked(entry, version, TypeId::of::<T>());
            }
        }
        Ok(Some(Typed::of_checked(object)))
    }

    /// Makes bytes the current object of a key: one copy into shared memory. Every worker sees it when this returns. Says which version it is.
    ///
    /// # Errors
    /// `KeyLength`, `TooLarge`, `NoSpace`.
    pub fn put(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<u64, StateError> {
        self.put_as(key.as_ref(), WHATEVER, value.as_ref())
    }

    /// The same, if `expected` is the current version: `None`, if there is no object. Of two who expect the same, one wins.
    ///
    /// # Errors
    /// As `put`, and `Conflict` with the version that is current.
    pub fn put_if(
        &mut self,
        key: impl AsRef<[u8]>,
        expected: Option<u64>,
        value: impl AsRef<[u8]>,
    ) -> Result<u64, StateError> {
        self.put_as(key.as_ref(), expected.unwrap_or(0), value.as_ref())
    }

    fn put_as(&mut self, key: &[u8], expected: u64, value: &[u8]) -> Result<u64, StateError> {
        let mut draft = self.draft(key, value.len())?;
        draft.copy_from_slice(value);
        self.session.state_publish(draft.loan, expected)
    }

    /// Memory for an object of `bytes` bytes, to be written in place and then published: no copy. Its content is arbitrary. Dropped, it goes back.
    ///
    /// # Errors
    /// As `put`.
    pub fn draft(&mut self, key: impl AsRef<[u8]>, bytes: usize) -> Result<Draft, StateError> {
        let loan = self.session.state_draft(key.as_ref(), bytes)?;
        Ok(Draft { loan, value_bytes: bytes })
    }

    /// Makes a draft the current object of its key; see [`State::put`].
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn publish(&mut self, draft: Draft) -> Result<u64, StateError> {
        self.session.state_publish(draft.loan, WHATEVER)
    }

    /// The same, if `expected` is the current version; see [`State::put_if`].
    ///
    /// # Errors
    /// `NoSpace`, `Conflict`.
    pub fn publish_if(&mut self, draft: Draft, expected: Option<u64>) -> Result<u64, StateError> {
        self.session.state_publish(draft.loan, expected.unwrap_or(0))
    }

    /// Makes a value the current object of a key, encoded straight into shared memory.
    ///
    /// # Errors
    /// As `put`, and `Encode`.
    pub fn put_typed<T: StateType>(&mut self, key: impl AsRef<[u8]>, value: &T) -> Result<u64, StateError> {
        let object = self.encode(key.as_ref(), value)?;
        self.session.state_publish(object, WHATEVER)
    }

    /// The same, if `expected` is the current version; see [`State::put_if`].
    ///
    /// # Errors
    /// As `put_if`, and `Encode`.
    pub fn put_typed_if<T: StateType>(
        &mut self,
        key: impl AsRef<[u8]>,
        expected: Option<u64>,
        value: &T,
    ) -> Result<u64, StateError> {
        let object = self.encode(key.as_ref(), value)?;
        self.session.state_publish(object, expected.unwrap_or(0))
    }

    fn encode<T: StateType>(&mut self, key: &[u8], value: &T) -> Result<Loan, StateError> {
        // As long as the last one of this worker: right for whoever writes the same kind of thing again and again.
        let mut value_bytes = self.session.encoded_bytes;
        loop {
            let mut loan = self.session.state_draft(key, value_bytes)?;
            match encode_at(value, &mut loan[HEADER_BYTES..HEADER_BYTES + value_bytes]) {
                // As long as expected, or nearly: then the key moves up behind it.
                Ok(bytes) if bytes >= value_bytes / 4 * 3 => {
                    loan.truncate(HEADER_BYTES + bytes + key.len());
                    loan[HEADER_BYTES + bytes..].copy_from_slice(key);
                    let header = Header::typed::<T>(key.len(), &loan[HEADER_BYTES..HEADER_BYTES + bytes]);
                    loan[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
                    return Ok(loan);
                }
                // Its block would be much too long.
                Ok(bytes) => value_bytes = bytes,
                Err(object::Encode::DoesNotFit { needed_bytes, .. }) => value_bytes = needed_bytes,
                Err(error) => return Err(StateError::Encode { text: error.to_string() }),
            }
            self.session.encoded_bytes = value_bytes;
        }
    }

    /// Takes a key's object away; whether there was one. Who holds it keeps it.
    ///
    /// # Errors
    /// `KeyLength`.
    pub fn delete(&mut self, key: impl AsRef<[u8]>) -> Result<bool, StateError> {
        self.session.state_delete(key.as_ref(), WHATEVER)
    }

    /// The same, if `expected` is the current version.
    ///
    /// # Errors
    /// `KeyLength`, `Conflict`.
    pub fn delete_if(&mut self, key: impl AsRef<[u8]>, expected: u64) -> Result<bool, StateError> {
        self.session.state_delete(key.as_ref(), expected)
    }

    /// All keys, in the order in which they were first written. Not at one moment: what is written meanwhile may or may not be among them. Takes
    /// time and memory for each.
    ///
    /// # Errors
    /// `TooManyHeld`.
    pub fn keys(&mut self) -> Result<Vec<KeyInfo>, StateError> {
        self.session.state_keys()
    }
}

/// Encodes straight into the memory of an object. That of a queue's worker is heap, which may lie anywhere: then by way of memory that does not.
fn encode_at<T: StateType>(value: &T, into: &mut [u8]) -> Result<usize, object::Encode> {
    if into.is_empty() || into.as_ptr().addr().is_multiple_of(object::VALUE_ALIGN) {
        return object::encode(value, into);
    }
    let mut aligned = object::rkyv::util::AlignedVec::<{ object::VALUE_ALIGN }>::with_capacity(into.len());
    aligned.resize(into.len(), 0);
    let bytes = object::encode(value, &mut aligned)?;
    into[..bytes].copy_from_slice(&aligned[..bytes]);
    Ok(bytes)
}

#[inline]
fn checked_key(key: &[u8]) -> Result<&[u8], StateError> {
    if (1..=praas_shm::KEY_BYTES_MAX).contains(&key.len()) {
        Ok(key)
    } else {
        Err(StateError::KeyLength { bytes: key.len() })
    }
}

/// A key, and what is known of its object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    /// The key.
    pub key: Vec<u8>,
    /// Version of the current object.
    pub version: u64,
    /// Bytes of its value.
    pub bytes: u64,
    /// When it was written, us since 1970.
    pub written_us: u64,
}

impl From<Listed> for KeyInfo {
    fn from(listed: Listed) -> KeyInfo {
        let Listed { key, version, value_bytes, written_us, .. } = listed;
        KeyInfo { key, version, bytes: value_bytes, written_us }
    }
}

/// An object that is not current yet: memory of this worker, to be written and then given to [`State::publish`].
#[derive(Debug)]
pub struct Draft {
    loan: Loan,
    value_bytes: usize,
}

impl Deref for Draft {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.loan[HEADER_BYTES..HEADER_BYTES + self.value_bytes]
    }
}

impl DerefMut for Draft {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.loan[HEADER_BYTES..HEADER_BYTES + self.value_bytes]
    }
}

/// The object of a key, as it was when it was read. Reads as a byte slice, 32-byte aligned. Stays as it is while it is held, whatever happens to the key
/// or to the worker that wrote it; a worker may hold 255. May be kept from one invocation to the next.
pub struct Object {
    kept: Kept,
}

/// Where an object is kept.
#[derive(Debug)]
pub(crate) struct Kept {
    place: Place,
    version: u64,
    written_us: u64,
    key_bytes: u64,
    /// Its entry in the index; none over queues.
    entry: Option<u32>,
}

#[derive(Debug)]
enum Place {
    Shared(Pinned),
    Copied(object::rkyv::util::AlignedVec<32>),
}

impl Kept {
    pub(crate) fn shared(object: Pinned, version: u64, written_us: u64, key_bytes: u64, entry: u32) -> Kept {
        Kept { place: Place::Shared(object), version, written_us, key_bytes, entry: Some(entry) }
    }

    pub(crate) fn copied(version: u64, fetched: Fetched<'_>, key_bytes: usize) -> Kept {
        let bytes = fetched.object.len().saturating_sub(key_bytes);
        let mut copy = object::rkyv::util::AlignedVec::<32>::with_capacity(bytes);
        copy.extend_from_slice(&fetched.object[..bytes]);
        Kept {
            place: Place::Copied(copy),
            version,
            written_us: fetched.written_us,
            key_bytes: key_bytes as u64,
            entry: None,
        }
    }

    /// Header and value.
    #[inline]
    fn bytes(&self) -> &[u8] {
        match &self.place {
            Place::Shared(pinned) => pinned.bytes(),
            Place::Copied(copy) => copy,
        }
    }
}

impl Object {
    /// Which object it is: no other of this process has this version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.kept.version
    }

    /// When it was written, by the clock of the process's host.
    #[must_use]
    pub fn written(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(self.kept.written_us)
    }

    fn header(&self) -> Result<Header, StateError> {
        let bytes = self.kept.bytes();
        let (header, value) = bytes.split_first_chunk::<HEADER_BYTES>().expect("an object has a header");
        let header = Header::parse(header, bytes.len() as u64 + self.kept.key_bytes)?;
        // The index knows as well, and is believed more.
        if header.value_bytes() == value.len() as u64 {
            Ok(header)
        } else {
            Err(BadObject::Length {
                value_bytes: header.value_bytes(),
                key_bytes: header.key_bytes(),
                block_bytes: bytes.len() as u64,
            }
            .into())
        }
    }
}

impl Deref for Object {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        &self.kept.bytes()[HEADER_BYTES..]
    }
}

impl AsRef<[u8]> for Object {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("version", &self.kept.version)
            .field("bytes", &self.len())
            .finish_non_exhaustive()
    }
}
