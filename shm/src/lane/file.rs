//! The file of a participant in lanes: made, sealed, mapped.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::SealFlags;

use super::{LaneArbiter, LaneReceiver, LaneSender, LaneSlot, SLOTS, Words};
use crate::mapping::{Access, Mapping};
use crate::segment::{AttachError, allocate, inspect, sealed_memfd};
use crate::sync::{AtomicU64, Ordering};

/// `PRaaLane`.
const MAGIC: u64 = u64::from_le_bytes(*b"PRaaLane");
const VERSION: u64 = 1;
const WORDS_OFFSET: u64 = 256;
const SLOTS_OFFSET: u64 = 4096;
const FILE_BYTES: u64 = SLOTS_OFFSET + SLOTS * size_of::<LaneSlot>() as u64;

/// Why a lane's file cannot be had or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaneError {
    /// The system does not give us one.
    #[error("no file for a lane: {0}")]
    File(#[source] io::Error),
    /// What we were given is none.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// A participant's file, to be passed to the others. What is in it was written by its maker, and can be by nobody else.
#[derive(Debug)]
pub struct LaneFile {
    fd: OwnedFd,
}

impl LaneFile {
    /// A new file and its maker's view of it. Sealed: it cannot be cut, grown, or mapped for writing again.
    ///
    /// # Errors
    /// What the system says: memory or descriptors are short.
    pub fn create() -> Result<(LaneFile, OwnLane), LaneError> {
        let make = || {
            let fd = sealed_memfd("praas-lane", FILE_BYTES)?;
            allocate(&fd, 0, FILE_BYTES)?;
            let mapping = Arc::new(Mapping::map(fd.as_fd(), FILE_BYTES, Access::Write)?);
            rustix::fs::fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
            Ok((fd, mapping))
        };
        let (fd, mapping) = make().map_err(LaneError::File)?;
        mapping.window::<AtomicU64>(8).store(VERSION, Ordering::Relaxed);
        // The version is visible before the magic.
        mapping.window::<AtomicU64>(0).store(MAGIC, Ordering::Release);
        Ok((LaneFile { fd }, OwnLane { mapping }))
    }

    /// One that was passed to us; looked at by [`PeerLane::attach`].
    pub fn from_fd(fd: OwnedFd) -> LaneFile {
        LaneFile { fd }
    }

    /// To be passed on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// There are none left.
    pub fn try_clone(&self) -> io::Result<LaneFile> {
        Ok(LaneFile { fd: self.fd.try_clone()? })
    }
}

/// My own file, mapped. Of one lane for each of the three parts that it can have.
pub struct OwnLane {
    mapping: Arc<Mapping>,
}

/// Somebody else's, mapped for reading.
pub struct PeerLane {
    mapping: Arc<Mapping>,
}

impl PeerLane {
    /// Maps it, after checking that it is a lane's and that touching it cannot fail.
    ///
    /// # Errors
    /// [`LaneError::Attach`].
    pub fn attach(file: &LaneFile) -> Result<Arc<PeerLane>, LaneError> {
        inspect(file.fd(), FILE_BYTES, SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE)?;
        let mapping = Arc::new(Mapping::map(file.fd(), FILE_BYTES, Access::Read).map_err(AttachError::Map)?);
        let word = |offset| mapping.window::<AtomicU64>(offset).load(Ordering::Acquire);
        if word(0) != MAGIC {
            return Err(AttachError::NotASegment { found: word(0) }.into());
        }
        if word(8) != VERSION {
            let expected = u32::try_from(VERSION).expect("a small number");
            return Err(AttachError::VersionMismatch { found: word(8), expected }.into());
        }
        Ok(Arc::new(PeerLane { mapping }))
    }
}

fn words(mapping: &Arc<Mapping>) -> crate::mapping::Window<Words> {
    mapping.window(WORDS_OFFSET)
}

fn slots(mapping: &Arc<Mapping>) -> crate::mapping::Window<[LaneSlot]> {
    mapping.window_slice(SLOTS_OFFSET, SLOTS)
}

impl LaneSender {
    /// Of a lane in which the owner of `own` has not sent yet.
    pub fn new(own: &OwnLane, receiver: &PeerLane, arbiter: &PeerLane) -> LaneSender {
        Self::on(slots(&own.mapping), words(&receiver.mapping), words(&arbiter.mapping))
    }
}

impl LaneReceiver {
    /// Of a lane in which the owner of `own` has not received yet.
    pub fn new(own: &OwnLane, sender: &PeerLane, arbiter: &PeerLane) -> LaneReceiver {
        Self::on(slots(&sender.mapping), words(&own.mapping), words(&arbiter.mapping))
    }
}

impl LaneArbiter {
    /// Of a lane that the owner of `own` has not closed; of one lane only.
    pub fn new(own: &OwnLane, sender: &PeerLane, receiver: &PeerLane) -> LaneArbiter {
        Self::on(slots(&sender.mapping), words(&receiver.mapping), words(&own.mapping))
    }
}

impl fmt::Debug for OwnLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnLane").finish_non_exhaustive()
    }
}

impl fmt::Debug for PeerLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerLane").finish_non_exhaustive()
    }
}
