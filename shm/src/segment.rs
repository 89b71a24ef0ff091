//! A segment: the memory one participant owns. It alone writes it; everyone else maps it read-only.
//!
//! | part       | offset        | bytes               | content                                                      |
//! |------------|---------------|---------------------|--------------------------------------------------------------|
//! | identity   | 0             | 128                 | see `Header`; the magic is stored last                     |
//! | activity   | 128           | 128                 | a hint for anyone: what the owner is doing                   |
//! | sleep line | 256           | 128                 | whether the owner sleeps (`doorbell.rs`)                     |
//! | connection | 384           | 128                 | where it is with a client's connection (`connection_line.rs`) |
//! | peer lines | 4096          | 64 × 128            | what the owner says about each peer (`peer_line.rs`)         |
//! | pins       | 12288         | 2048                | the objects it reads at this moment (`pins.rs`)              |
//! | rings      | 16384         | 64 × slots × 64     | what the owner sends to each peer (`ring.rs`)                |
//! | arena      | next 2 MiB    | `arena_bytes`       | the owner's blocks (`arena.rs`)                              |
//!
//! The file is sparse: a ring costs memory when a link uses it, the arena as it grows. All of it is taken with
//! `fallocate` before first touch, because a page that a full machine cannot supply is a SIGBUS, and a refused
//! `fallocate` is an error one can report (X1).
//!
//! | edge  | release side             | acquire side                     | carries                       |
//! |-------|--------------------------|----------------------------------|-------------------------------|
//! | ready | `OwnSegment::map` magic  | `PeerSegment::attach` magic      | the identity, once and for all |

use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags};

use crate::arena::Arena;
use crate::connection_line::{ConnectionLine, LentConnection};
use crate::descriptor::BlockRef;
use crate::doorbell::{Doorbell, SleepLine};
use crate::mapping::{Access, Mapping, SharedLayout, Window};
use crate::participant::{PARTICIPANTS_MAX, ParticipantId};
use crate::peer_line::{PEER_LINE_BYTES, PeerLine};
use crate::pins::{PIN_PAGE_BYTES, PinPage, Pins};
use crate::ring::{SLOT_BYTES, Slot};
use crate::size_class::UNIT_BYTES;
use crate::sync::{AtomicU64, Ordering};
use crate::width::host;

/// The first eight bytes of a segment, once its owner has made it: `PRaaSseg`.
const MAGIC: u64 = u64::from_le_bytes(*b"PRaaSseg");
/// Version of everything that stands in a segment. Any change of layout or meaning raises it.
pub const LAYOUT_VERSION: u32 = 3;

const PEERS: u64 = PARTICIPANTS_MAX as u64;
const SLEEP_LINE_OFFSET: u64 = 256;
const CONNECTION_LINE_OFFSET: u64 = 384;
const PEER_LINES_OFFSET: u64 = 4096;
const PINS_OFFSET: u64 = 12288;
const RINGS_OFFSET: u64 = 16384;
const ARENA_STEP_BYTES: u64 = 2 << 20;

const _: () = assert!(PEER_LINES_OFFSET + PEERS * PEER_LINE_BYTES <= PINS_OFFSET);
const _: () = assert!(PINS_OFFSET + PIN_PAGE_BYTES <= RINGS_OFFSET);

/// Who and what a segment is, and the two words its owner addresses to everybody. Little-endian.
///
/// | offset | bytes | field           | written                                                          |
/// |-------:|------:|-----------------|------------------------------------------------------------------|
/// |      0 |     8 | `magic`         | last, release                                                    |
/// |      8 |     8 | `version`       | once: layout version                                             |
/// |     16 |     8 | `participant`   | once: `0..64`                                                    |
/// |     24 |     8 | `incarnation`   | once                                                             |
/// |     32 |    16 | `process`       | once: 16 bytes                                                   |
/// |     48 |     8 | `ring_slots`    | once                                                             |
/// |     56 |     8 | `arena_bytes`   | once                                                             |
/// |     64 |     8 | `arena_offset`  | once                                                             |
/// |     72 |     8 | `segment_bytes` | once                                                             |
/// |     80 |     8 | `nonce`         | once: random, not zero; tells this segment from any other        |
/// |     88 |    40 | reserved        | zero                                                             |
/// |    128 |     8 | `activity`      | any time, by the owner                                           |
/// |    136 |   120 | reserved        | zero                                                             |
/// |    256 |   128 | `sleep`         | any time, by the owner                                           |
/// |    384 |   128 | `connection`    | any time, by the owner                                           |
#[repr(C, align(128))]
struct Header {
    magic: AtomicU64,
    version: AtomicU64,
    participant: AtomicU64,
    incarnation: AtomicU64,
    process: [AtomicU64; 2],
    ring_slots: AtomicU64,
    arena_bytes: AtomicU64,
    arena_offset: AtomicU64,
    segment_bytes: AtomicU64,
    nonce: AtomicU64,
    _reserved: [AtomicU64; 5],
    activity: AtomicU64,
    _reserved_2: [AtomicU64; 15],
    sleep: SleepLine,
    connection: ConnectionLine,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Header>() == 512 && align_of::<Header>() == 128);
    assert!(offset_of!(Header, magic) == 0 && offset_of!(Header, version) == 8);
    assert!(offset_of!(Header, participant) == 16 && offset_of!(Header, incarnation) == 24);
    assert!(offset_of!(Header, process) == 32 && offset_of!(Header, ring_slots) == 48);
    assert!(offset_of!(Header, arena_bytes) == 56 && offset_of!(Header, arena_offset) == 64);
    assert!(offset_of!(Header, segment_bytes) == 72 && offset_of!(Header, nonce) == 80);
    assert!(offset_of!(Header, _reserved) == 88 && offset_of!(Header, activity) == 128);
    assert!(offset_of!(Header, sleep) as u64 == SLEEP_LINE_OFFSET);
    assert!(offset_of!(Header, connection) as u64 == CONNECTION_LINE_OFFSET);
};

// SAFETY: `repr(C)` of `AtomicU64`s only: any bits are a value, all of it is atomics, no padding (asserted above).
unsafe impl SharedLayout for Header {}

/// Sizes of a segment. All participants of a process use the same.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct SegmentConfig {
    /// Slots of the ring to each peer. Power of two, 64..=4096. Default 256.
    pub ring_slots: u32,
    /// Room for payloads, bytes, and the most that may be in use. Multiple of 2 MiB, 2 MiB..=64 GiB. Default 256 MiB.
    /// Memory is taken as it is used.
    pub arena_bytes: u64,
}

impl Default for SegmentConfig {
    fn default() -> Self {
        Self { ring_slots: 256, arena_bytes: 256 << 20 }
    }
}

impl SegmentConfig {
    fn ring_bytes(&self) -> u64 {
        u64::from(self.ring_slots) * SLOT_BYTES
    }

    fn arena_offset(&self) -> u64 {
        (RINGS_OFFSET + PEERS * self.ring_bytes()).next_multiple_of(ARENA_STEP_BYTES)
    }

    /// Bytes of the whole segment: address space, not memory.
    pub fn segment_bytes(&self) -> u64 {
        self.arena_offset() + self.arena_bytes
    }

    fn check(&self) -> Result<(), SegmentError> {
        if !self.ring_slots.is_power_of_two() || !(64..=4096).contains(&self.ring_slots) {
            return Err(SegmentError::RingSlots { given: self.ring_slots });
        }
        let arena = self.arena_bytes;
        if !arena.is_multiple_of(ARENA_STEP_BYTES) || !(ARENA_STEP_BYTES..=64 << 30).contains(&arena) {
            return Err(SegmentError::ArenaBytes { given: arena });
        }
        Ok(())
    }
}

/// Which participant of which process, and which life of it.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub struct Identity {
    /// Whose segment.
    pub participant: ParticipantId,
    /// Which life; a later one has a higher number.
    pub incarnation: u64,
    /// The process, by 128 random bits.
    pub process: [u8; 16],
}

/// Why a segment could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// The configuration is wrong.
    #[error("{given} ring slots: must be a power of two in 64..=4096")]
    RingSlots {
        /// What was configured.
        given: u32,
    },
    /// The configuration is wrong.
    #[error("arena of {given} bytes: must be a multiple of 2 MiB in 2 MiB..=64 GiB")]
    ArenaBytes {
        /// What was configured.
        given: u64,
    },
    /// The kernel gave no memory file, no duplicate of it or no facts about it.
    #[error("cannot make or inspect the memory file: {0}")]
    File(#[source] io::Error),
    /// The file does not belong to this configuration.
    #[error("the file has {found_bytes} bytes, the configuration wants {expected_bytes}")]
    Size {
        /// Bytes of the file.
        found_bytes: u64,
        /// Bytes of the configuration.
        expected_bytes: u64,
    },
    /// A segment has one owner, once.
    #[error("the file is a segment already")]
    AlreadyOwned,
    /// The machine has no memory for it; nothing was touched.
    #[error("no memory for {needed_bytes} bytes: {source}")]
    NoSpace {
        /// What was needed.
        needed_bytes: u64,
        /// What `fallocate` said.
        source: io::Error,
    },
    /// The kernel did not map it.
    #[error("cannot map the segment: {0}{advice}", advice = map_advice(.0))]
    Map(#[source] io::Error),
    /// The kernel did not seal it.
    #[error("cannot seal the segment: {0}")]
    Seal(#[source] io::Error),
    /// The system has no random bytes for the nonce.
    #[error("no random bytes")]
    Random,
    /// There is one of it in a segment, and it was taken before.
    #[error("it was taken before")]
    AlreadyTaken,
}

/// Why a peer's segment was not attached. Nothing was modified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(SegmentError),
    /// The kernel says nothing about the file.
    #[error("cannot inspect the file: {0}")]
    Inspect(#[source] io::Error),
    /// The file can still be cut, grown, or mapped writable by others.
    #[error("the file lacks the seals {missing:#x} (fcntl F_GET_SEALS)")]
    NotSealed {
        /// The missing seals.
        missing: u32,
    },
    /// The file is none of ordinary memory pages: pages of others may be missing when they are touched.
    #[error("the file lies in a file system of type {found:#x} (statfs), not in ordinary memory")]
    OtherMemory {
        /// What it lies in.
        found: u64,
    },
    /// The file has another size than a segment of this configuration, or of an exchange page.
    #[error("the file has {found_bytes} bytes, expected {expected_bytes}")]
    Size {
        /// Bytes of the file.
        found_bytes: u64,
        /// Bytes it should have.
        expected_bytes: u64,
    },
    /// The kernel did not map it.
    #[error("cannot map the file: {0}{advice}", advice = map_advice(.0))]
    Map(#[source] io::Error),
    /// Not a segment, or its owner has not finished.
    #[error("magic {found:#018x} is not a segment's, or its owner has not finished")]
    NotASegment {
        /// What stands there.
        found: u64,
    },
    /// Another build made it.
    #[error("layout version {found}, this build reads {expected}")]
    VersionMismatch {
        /// What stands there.
        found: u64,
        /// What we read.
        expected: u32,
    },
    /// A segment, but not the one we were told to expect: a stale or foreign one.
    #[error("it is {field} {found:#x}, expected {expected:#x}")]
    Stranger {
        /// Which part of the identity differs.
        field: &'static str,
        /// What stands there.
        found: u64,
        /// What was expected.
        expected: u64,
    },
    /// Its sizes are not those of this process.
    #[error("{field} is {found}, expected {expected}")]
    Shape {
        /// Which size differs.
        field: &'static str,
        /// What stands there.
        found: u64,
        /// What was expected.
        expected: u64,
    },
}

/// A block reference from a peer does not name bytes of its arena.
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadBlock {
    /// Another participant's block.
    #[error("the block is {claimed}'s, the segment is {owner}'s")]
    Owner {
        /// Who the reference says.
        claimed: ParticipantId,
        /// Whose segment this is.
        owner: ParticipantId,
    },
    /// Blocks begin on cache lines.
    #[error("offset {offset} is no multiple of 64")]
    Misaligned {
        /// What the reference says.
        offset: u64,
    },
    /// It leaves the arena.
    #[error("{len} bytes at {offset} leave an arena of {arena_bytes}")]
    OutOfBounds {
        /// What the reference says.
        offset: u64,
        /// What the reference says.
        len: u64,
        /// Bytes of the arena.
        arena_bytes: u64,
    },
}

/// Makes `[offset, offset + bytes)` of a file real memory, without touching it.
pub(crate) fn allocate(file: impl AsFd, offset: u64, bytes: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), offset, bytes) {
            Err(rustix::io::Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
}

/// What the number of a failed `mmap` most often means. Source: mmap(2), `ENOMEM`.
fn map_advice(error: &io::Error) -> &'static str {
    if error.raw_os_error() == Some(rustix::io::Errno::NOMEM.raw_os_error()) {
        " (too many mappings, see sysctl vm.max_map_count, or too little address space, see `ulimit -v`)"
    } else {
        ""
    }
}

/// A memory file of `bytes`, sparse, whose size is sealed.
pub(crate) fn sealed_memfd(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Never to be run as a program, which a system may insist on (sysctl vm.memfd_noexec); before Linux 6.3 there is no saying so.
    let file = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        made => made?,
    };
    // Made with 0777 or 0666, whatever the umask: through /proc it can be opened by whoever its mode lets.
    rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::ftruncate(&file, bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// Memory files of ordinary pages (linux/magic.h). Those of huge pages can be sealed, too, and where one is missing a touch is a SIGBUS.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Checks what makes a foreign file safe to map: what it is made of, its size, and that nobody can change it.
pub(crate) fn inspect(file: BorrowedFd<'_>, bytes: u64, seals: SealFlags) -> Result<(), AttachError> {
    let found = rustix::fs::fcntl_get_seals(file).map_err(|error| AttachError::Inspect(error.into()))?;
    let missing = seals - found;
    if !missing.is_empty() {
        return Err(AttachError::NotSealed { missing: missing.bits() });
    }
    let made_of = rustix::fs::fstatfs(file).map_err(|error| AttachError::Inspect(error.into()))?;
    #[allow(
        clippy::cast_sign_loss,
        clippy::unnecessary_cast,
        reason = "of another type on other systems; a magic number has no sign"
    )]
    let found = made_of.f_type as u64;
    if found != TMPFS_MAGIC {
        return Err(AttachError::OtherMemory { found });
    }
    // Seals first: what is sealed has the size that we now read for good.
    let found_bytes = file_bytes(file).map_err(AttachError::Inspect)?;
    if found_bytes != bytes {
        return Err(AttachError::Size { found_bytes, expected_bytes: bytes });
    }
    Ok(())
}

fn file_bytes(file: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = rustix::fs::fstat(file)?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// The memory file of a segment: what crosses from process to process. It has no name and leaves nothing behind.
#[derive(Debug)]
pub struct SegmentFile {
    fd: OwnedFd,
}

impl SegmentFile {
    /// A new file: sparse, of full size, closed on exec, sealed against shrinking and growing.
    ///
    /// # Errors
    /// [`SegmentError`]: a wrong configuration, or no descriptors.
    pub fn create(config: &SegmentConfig) -> Result<Self, SegmentError> {
        config.check()?;
        let fd = sealed_memfd("praas-segment", config.segment_bytes()).map_err(SegmentError::File)?;
        Ok(Self { fd })
    }

    /// A file that somebody handed over. Nothing is believed about it: see [`OwnSegment::map`], [`PeerSegment::attach`].
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// To be handed over.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Another descriptor of the same file.
    ///
    /// # Errors
    /// [`SegmentError::File`]: out of descriptors.
    pub fn try_clone(&self) -> Result<Self, SegmentError> {
        let fd = self.fd.try_clone().map_err(SegmentError::File)?;
        Ok(Self { fd })
    }

    /// From here on nobody can write to it, punch holes in it or map it writable, but through the owner's mapping, which
    /// must therefore exist. To be called before the file is shown to anyone else.
    ///
    /// # Errors
    /// [`SegmentError::Seal`].
    pub fn seal_future_write(&self) -> Result<(), SegmentError> {
        rustix::fs::fcntl_add_seals(&self.fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)
            .map_err(|error| SegmentError::Seal(error.into()))
    }
}

impl From<SegmentFile> for OwnedFd {
    fn from(file: SegmentFile) -> Self {
        file.fd
    }
}

/// My own segment: the only writable mapping of it there is.
pub struct OwnSegment {
    shared: Arc<OwnShared>,
    header: Window<Header>,
}

/// What a link keeps of its own segment.
pub(crate) struct OwnShared {
    pub(crate) identity: Identity,
    pub(crate) nonce: u64,
    config: SegmentConfig,
    mapping: Arc<Mapping>,
    file: OwnedFd,
    /// Bit `p`: there is a live link to participant `p`. Private memory of this process.
    linked: std::sync::atomic::AtomicU64,
    arena_taken: std::sync::atomic::AtomicBool,
    doorbell_taken: std::sync::atomic::AtomicBool,
    pins_taken: std::sync::atomic::AtomicBool,
}

impl OwnSegment {
    /// Maps a fresh file as the segment of `identity`. The magic appears last: whoever sees it sees a whole header.
    ///
    /// The file must be ours: created here, or handed over by the controller for us to own.
    ///
    /// # Errors
    /// [`SegmentError`]; on `NoSpace` nothing was touched.
    pub fn map(file: &SegmentFile, identity: &Identity, config: &SegmentConfig) -> Result<Self, SegmentError> {
        config.check()?;
        let expected_bytes = config.segment_bytes();
        let found_bytes = file_bytes(file.fd()).map_err(SegmentError::File)?;
        if found_bytes != expected_bytes {
            return Err(SegmentError::Size { found_bytes, expected_bytes });
        }
        allocate(file.fd(), 0, RINGS_OFFSET)
            .map_err(|source| SegmentError::NoSpace { needed_bytes: RINGS_OFFSET, source })?;
        let mapping = Mapping::map(file.fd(), expected_bytes, Access::Write).map_err(SegmentError::Map)?;
        let mapping = Arc::new(mapping);
        let header: Window<Header> = mapping.window(0);
        if header.magic.load(Ordering::Relaxed) != 0 {
            return Err(SegmentError::AlreadyOwned);
        }
        // Odd, hence not zero, which means "nobody" in a peer line.
        let nonce = getrandom::u64().map_err(|_| SegmentError::Random)? | 1;
        header.write_identity(identity, config, nonce);
        let shared = OwnShared {
            identity: *identity,
            nonce,
            config: *config,
            mapping,
            file: file.fd.try_clone().map_err(SegmentError::File)?,
            linked: 0.into(),
            arena_taken: false.into(),
            doorbell_taken: false.into(),
            pins_taken: false.into(),
        };
        // ready (release): the identity is visible before the magic.
        header.magic.store(MAGIC, Ordering::Release);
        Ok(Self { shared: Arc::new(shared), header })
    }

    /// Who I am.
    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// The sizes I was made with.
    pub fn config(&self) -> &SegmentConfig {
        &self.shared.config
    }

    /// My blocks.
    ///
    /// # Errors
    /// [`SegmentError::AlreadyTaken`] at the second call: two ledgers of one arena would contradict each other.
    pub fn arena(&self) -> Result<Arena, SegmentError> {
        if self.shared.arena_taken.swap(true, std::sync::atomic::Ordering::Relaxed) {
            return Err(SegmentError::AlreadyTaken);
        }
        let file = self.shared.file.try_clone().map_err(SegmentError::File)?;
        let config = &self.shared.config;
        let mapping = Arc::clone(&self.shared.mapping);
        Ok(Arena::new(mapping, file, config.arena_offset(), config.arena_bytes, self.identity().participant))
    }

    /// Where I sleep. `eventfd` is the one that peers were given.
    ///
    /// # Panics
    /// At the second call: two sleepers on one word would lose wake-ups.
    pub fn doorbell(&self, eventfd: OwnedFd) -> Doorbell {
        let taken = self.shared.doorbell_taken.swap(true, std::sync::atomic::Ordering::Relaxed);
        assert!(!taken, "the doorbell of a segment is taken once");
        Doorbell::new(self.shared.mapping.window(SLEEP_LINE_OFFSET), eventfd)
    }

    /// My pins: what of others' I read.
    ///
    /// # Errors
    /// [`SegmentError::AlreadyTaken`] at the second call.
    pub fn pins(&self) -> Result<Pins, SegmentError> {
        if self.shared.pins_taken.swap(true, std::sync::atomic::Ordering::Relaxed) {
            return Err(SegmentError::AlreadyTaken);
        }
        Ok(Pins::new(self.shared.mapping.window(PINS_OFFSET)))
    }

    /// My own segment as others see it, read-only: for blocks of mine that I have lent and read myself. To be asked for when it is sealed.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn as_peer(&self) -> Result<Arc<PeerSegment>, AttachError> {
        let file = SegmentFile { fd: self.shared.file.try_clone().map_err(AttachError::Inspect)? };
        PeerSegment::attach(&file, self.identity(), self.config())
    }

    /// A hint for whoever looks: what I am doing. Its meaning belongs to the layer above.
    #[inline]
    pub fn set_activity(&self, activity: u64) {
        // No edge: a hint.
        self.header.activity.store(activity, Ordering::Relaxed);
    }

    /// Says where I am with a client's connection. To be said before what it says can be seen otherwise.
    #[inline]
    pub fn say_connection(&self, state: &LentConnection) {
        self.header.connection.say(state);
    }

    pub(crate) fn shared(&self) -> &Arc<OwnShared> {
        &self.shared
    }
}

impl OwnShared {
    /// Marks the link to `peer` as in use; whether it was not before.
    pub(crate) fn claim_link(&self, peer: ParticipantId) -> bool {
        let bit = 1 << peer.get();
        self.linked.fetch_or(bit, std::sync::atomic::Ordering::AcqRel) & bit == 0
    }

    pub(crate) fn free_link(&self, peer: ParticipantId) {
        self.linked.fetch_and(!(1 << peer.get()), std::sync::atomic::Ordering::AcqRel);
    }

    /// Makes the ring to `peer` real and gives it out, with the line about `peer`. Neither is cleared yet.
    pub(crate) fn ring_and_line(&self, peer: ParticipantId) -> io::Result<(Window<[Slot]>, Window<PeerLine>)> {
        let (offset, bytes) = (ring_offset(&self.config, peer), self.config.ring_bytes());
        allocate(&self.file, offset, bytes)?;
        self.mapping.populate(offset, bytes);
        Ok((ring(&self.mapping, &self.config, peer), line(&self.mapping, peer)))
    }
}

impl Header {
    fn write_identity(&self, identity: &Identity, config: &SegmentConfig, nonce: u64) {
        let [low, high] = process_words(&identity.process);
        for (word, value) in [
            (&self.version, u64::from(LAYOUT_VERSION)),
            (&self.participant, u64::from(identity.participant.get())),
            (&self.incarnation, identity.incarnation),
            (&self.process[0], low),
            (&self.process[1], high),
            (&self.ring_slots, u64::from(config.ring_slots)),
            (&self.arena_bytes, config.arena_bytes),
            (&self.arena_offset, config.arena_offset()),
            (&self.segment_bytes, config.segment_bytes()),
            (&self.nonce, nonce),
        ] {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Compares with what must stand here, each word loaded once; returns the nonce.
    fn check(&self, expected: &Identity, config: &SegmentConfig) -> Result<u64, AttachError> {
        // ready (acquire).
        let magic = self.magic.load(Ordering::Acquire);
        if magic != MAGIC {
            return Err(AttachError::NotASegment { found: magic });
        }
        let version = self.version.load(Ordering::Relaxed);
        if version != u64::from(LAYOUT_VERSION) {
            return Err(AttachError::VersionMismatch { found: version, expected: LAYOUT_VERSION });
        }
        let [low, high] = process_words(&expected.process);
        for (field, word, expected) in [
            ("participant", &self.participant, u64::from(expected.participant.get())),
            ("incarnation", &self.incarnation, expected.incarnation),
            ("process (low half)", &self.process[0], low),
            ("process (high half)", &self.process[1], high),
        ] {
            let found = word.load(Ordering::Relaxed);
            if found != expected {
                return Err(AttachError::Stranger { field, found, expected });
            }
        }
        for (field, word, expected) in [
            ("ring_slots", &self.ring_slots, u64::from(config.ring_slots)),
            ("arena_bytes", &self.arena_bytes, config.arena_bytes),
            ("arena_offset", &self.arena_offset, config.arena_offset()),
            ("segment_bytes", &self.segment_bytes, config.segment_bytes()),
        ] {
            let found = word.load(Ordering::Relaxed);
            if found != expected {
                return Err(AttachError::Shape { field, found, expected });
            }
        }
        Ok(self.nonce.load(Ordering::Relaxed))
    }
}

/// Another participant's segment, read-only. `Send + Sync`, held in an `Arc`.
pub struct PeerSegment {
    identity: Identity,
    config: SegmentConfig,
    nonce: u64,
    header: Window<Header>,
    pins: Window<PinPage>,
    mapping: Arc<Mapping>,
}

impl PeerSegment {
    /// Maps a peer's segment, if it is the one expected: sealed for good, of the right size, version, identity and shape.
    ///
    /// # Errors
    /// [`AttachError`] says which check failed.
    pub fn attach(file: &SegmentFile, expected: &Identity, config: &SegmentConfig) -> Result<Arc<Self>, AttachError> {
        config.check().map_err(AttachError::Config)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
        inspect(file.fd(), config.segment_bytes(), seals)?;
        let mapping = Mapping::map(file.fd(), config.segment_bytes(), Access::Read).map_err(AttachError::Map)?;
        let mapping = Arc::new(mapping);
        let header: Window<Header> = mapping.window(0);
        let nonce = header.check(expected, config)?;
        let pins = mapping.window(PINS_OFFSET);
        Ok(Arc::new(Self { identity: *expected, config: *config, nonce, header, pins, mapping }))
    }

    /// Whose it is, as checked when attached.
    #[inline]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What its owner says it is doing. A hint, stale, and a lie if the owner is hostile.
    #[inline]
    pub fn activity(&self) -> u64 {
        // No edge: a hint.
        self.header.activity.load(Ordering::Relaxed)
    }

    /// Where its owner says it is with a client's connection: a claim. `None` if that changes at this moment.
    pub fn connection(&self) -> Option<LentConnection> {
        self.header.connection.said()
    }

    /// Whether its owner reads the object of this version at this moment. A claim. To be asked after
    /// [`fence_before_looking`](crate::pins::fence_before_looking), which comes after the object was replaced.
    pub fn pins(&self, version: u64) -> bool {
        self.pins.holds(version)
    }

    /// Adds the versions of all objects that its owner reads at this moment. A claim, and to be asked for as [`PeerSegment::pins`] is.
    pub fn read_pins(&self, versions: &mut Vec<u64>) {
        self.pins.read(versions);
    }

    /// The bytes of a block that the owner lent us.
    ///
    /// They do not change until we hand the block back: that is the owner's promise, and the one thing about a peer that
    /// is believed here (see *Trust* in the crate documentation).
    ///
    /// # Errors
    /// [`BadBlock`] if the reference does not name bytes of this arena.
    #[inline]
    pub fn bytes(&self, block: &BlockRef) -> Result<&[u8], BadBlock> {
        let start = self.locate(block)?;
        // SAFETY:
        // - in bounds: `locate` checked `[offset, offset + len)` to lie in the arena, which lies in the mapping, whose
        //   file cannot shrink: sealed, checked when attached.
        // - unshared:  the owner writes no lent block; that is its promise, above.
        // - unique:    not needed: a shared slice of a mapping without write permission.
        Ok(unsafe { std::slice::from_raw_parts(start.as_ptr(), host(block.len)) })
    }

    /// As [`PeerSegment::bytes`], but the view keeps the mapping alive and can be sent along.
    ///
    /// # Errors
    /// As [`PeerSegment::bytes`].
    #[inline]
    pub fn view(self: &Arc<Self>, block: &BlockRef) -> Result<BlockView, BadBlock> {
        let start = self.locate(block)?;
        Ok(BlockView { start, block: *block, _segment: Arc::clone(self) })
    }

    pub(crate) fn nonce(&self) -> u64 {
        self.nonce
    }

    pub(crate) fn config(&self) -> &SegmentConfig {
        &self.config
    }

    /// The ring from this peer to `reader`, and this peer's line about `reader`.
    pub(crate) fn ring_and_line(&self, reader: ParticipantId) -> (Window<[Slot]>, Window<PeerLine>) {
        (ring(&self.mapping, &self.config, reader), line(&self.mapping, reader))
    }

    pub(crate) fn sleep_line(&self) -> Window<SleepLine> {
        self.mapping.window(SLEEP_LINE_OFFSET)
    }

    #[inline]
    fn locate(&self, block: &BlockRef) -> Result<NonNull<u8>, BadBlock> {
        let BlockRef { owner, offset, len, .. } = *block;
        if owner != self.identity.participant {
            return Err(BadBlock::Owner { claimed: owner, owner: self.identity.participant });
        }
        if !offset.is_multiple_of(UNIT_BYTES) {
            return Err(BadBlock::Misaligned { offset });
        }
        let arena_bytes = self.config.arena_bytes;
        if offset.checked_add(len).is_none_or(|end| end > arena_bytes) {
            return Err(BadBlock::OutOfBounds { offset, len, arena_bytes });
        }
        // SAFETY: in bounds: `offset <= arena_bytes` (just checked), and the arena ends where the mapping does.
        Ok(unsafe { self.mapping.base().add(host(self.config.arena_offset() + offset)) })
    }
}

/// A block that a peer lent us, readable; keeps its mapping alive.
pub struct BlockView {
    start: NonNull<u8>,
    block: BlockRef,
    _segment: Arc<PeerSegment>,
}

// SAFETY: a view is a `&[u8]` and an `Arc`.
unsafe impl Send for BlockView {}
// SAFETY: as above.
unsafe impl Sync for BlockView {}

impl BlockView {
    /// What to hand back to the owner.
    #[inline]
    pub fn block(&self) -> &BlockRef {
        &self.block
    }
}

impl Deref for BlockView {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: as in `PeerSegment::bytes`; `locate` made `start`, and `_segment` keeps it mapped.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), host(self.block.len)) }
    }
}

fn ring_offset(config: &SegmentConfig, reader: ParticipantId) -> u64 {
    RINGS_OFFSET + u64::from(reader.get()) * config.ring_bytes()
}

fn ring(mapping: &Arc<Mapping>, config: &SegmentConfig, reader: ParticipantId) -> Window<[Slot]> {
    mapping.window_slice(ring_offset(config, reader), config.ring_slots.into())
}

fn line(mapping: &Arc<Mapping>, about: ParticipantId) -> Window<PeerLine> {
    mapping.window(PEER_LINES_OFFSET + u64::from(about.get()) * PEER_LINE_BYTES)
}

/// 16 bytes as two words that stand in memory in the same order.
pub(crate) fn process_words(process: &[u8; 16]) -> [u64; 2] {
    let (words, _) = process.as_chunks::<8>();
    [u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1])]
}

impl fmt::Debug for OwnSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnSegment").field("identity", &self.shared.identity).finish_non_exhaustive()
    }
}

impl fmt::Debug for PeerSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerSegment").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl fmt::Debug for BlockView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockView").field("block", &self.block).finish_non_exhaustive()
    }
}
