//! The POSIX queue channel: messages of any size over a kernel queue of small records.
//!
//! It is there to reproduce the paper's channel and to be compared with; the shared-memory ring is the product.
//!
//! A queue is created under a random name that lives for the few microseconds it takes to open it twice, once
//! for each end; after that only the two descriptors know it. A queue has no end-of-file: a peer's death is
//! learnt elsewhere (a pidfd), and [`Receiver::reset`] then drops what it left half said.
//!
//! Little-endian records, at most one queue message each. The first of a message:
//!
//! | offset | bytes | field                                                                              |
//! |-------:|------:|------------------------------------------------------------------------------------|
//! |      0 |    64 | the head, opaque to this file                                                      |
//! |     64 |     8 | bytes of the whole payload                                                         |
//! |     72 |     4 | records of the message, this one included                                          |
//! |     76 |     4 | the message's sequence number on this queue, low half: a stolen message is noticed |
//! |     80 |     … | the payload's first bytes, as many as fit                                          |
//!
//! Every following one:
//!
//! | offset | bytes | field                                         |
//! |-------:|------:|-----------------------------------------------|
//! |      0 |     4 | index of the record in its message, from 1    |
//! |      4 |     4 | records of the message                        |
//! |      8 |     8 | the message's sequence number on this queue   |
//! |     16 |     … | payload, as much as fits                      |
//!
//! A payload is sent and received where it lies: the 16 bytes in front of a chunk are saved, hold the record's
//! header for the length of one system call, and are put back ([`Buffer`] has room in front for the first).

mod leftovers;

use std::collections::VecDeque;
use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

pub use crate::Flush;
pub use leftovers::sweep;

/// What names of queues begin with.
const NAME_PREFIX: &str = "praas-";
/// Bytes of a message's head.
pub const HEAD_BYTES: usize = 64;
/// Bytes in front of the payload in a message's first record.
const FIRST_BYTES: usize = HEAD_BYTES + 16;
/// Bytes in front of the payload in every following record.
const NEXT_BYTES: usize = 16;
/// Shortest queue message worth having: a head and as much payload. A smaller `msgsize` is refused.
const MESSAGE_BYTES_MIN: u32 = 160;
const _: () = assert!(MESSAGE_BYTES_MIN as usize == 2 * FIRST_BYTES);
/// Finished messages and spare buffers kept for reuse; one more is dropped.
const KEPT_MAX: usize = 16;
/// Their memory in all, bytes: two bodies of the default largest size.
const KEPT_BYTES_MAX: usize = 128 << 20;

/// Shape of a queue. Linux lets an unprivileged user have 10 x 8192 bytes at most, and some nine such queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// Records the kernel holds. Default 10, the usual `fs.mqueue.msg_max`.
    pub messages: u32,
    /// Longest record, bytes. Default 8192, the usual `fs.mqueue.msgsize_max`. At least 160.
    pub message_bytes: u32,
}

impl Default for QueueConfig {
    fn default() -> Self {
        QueueConfig { messages: 10, message_bytes: 8192 }
    }
}

/// The limit of the system that a queue ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueLimit {
    /// `RLIMIT_MSGQUEUE`: bytes in all queues of the user.
    UserBytes,
    /// `fs.mqueue.msg_max`: records of one queue.
    Messages,
    /// `fs.mqueue.msgsize_max`: bytes of one record.
    MessageBytes,
    /// `fs.mqueue.queues_max`: queues in the IPC namespace.
    Queues,
    /// `RLIMIT_NOFILE`: descriptors of this process.
    OpenFiles,
}

impl QueueLimit {
    /// The limit as the system names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            QueueLimit::UserBytes => "RLIMIT_MSGQUEUE",
            QueueLimit::Messages => "fs.mqueue.msg_max",
            QueueLimit::MessageBytes => "fs.mqueue.msgsize_max",
            QueueLimit::Queues => "fs.mqueue.queues_max",
            QueueLimit::OpenFiles => "RLIMIT_NOFILE",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn fix(self) -> &'static str {
        match self {
            QueueLimit::UserBytes => "raise it with `ulimit -q`, run fewer workers, or use the ring channel",
            QueueLimit::Messages => "ask for fewer messages, or raise it with sysctl",
            QueueLimit::MessageBytes => "ask for smaller messages, or raise it with sysctl",
            QueueLimit::Queues => "raise it with sysctl, run fewer workers, or use the ring channel",
            QueueLimit::OpenFiles => "raise it with `ulimit -n`, or run fewer workers",
        }
    }
}

/// Why a queue could not be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The system allows no (further) queue of this shape. Nothing was left behind.
    #[error("{} is {have}, a queue needs {need} ({})", .limit.name(), .limit.fix())]
    Limit {
        /// Which limit.
        limit: QueueLimit,
        /// What it allows in all.
        have: u64,
        /// What this queue takes of it.
        need: u64,
    },
    /// What was opened is not what was created: somebody else works under the same name. Refused and closed.
    #[error("the queue is not the one created (owner {uid}, mode {mode:o})")]
    Foreign {
        /// Owner found.
        uid: u32,
        /// Mode found.
        mode: u32,
    },
    /// The kernel has no POSIX queues, or refuses them here.
    #[error("{call} failed")]
    Io {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The peer's records do not make a message; the queue is of no more use before a reset.
    #[error("the peer broke the queue's protocol: {0}")]
    Protocol(#[from] ProtocolError),
}

/// What was wrong with a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// Not as long as its place in the message says.
    #[error("a record of {found_bytes} bytes where {expected_bytes} were due")]
    Length {
        /// Its length.
        found_bytes: u64,
        /// What its header, or the message's first record, asks for.
        expected_bytes: u64,
    },
    /// A message longer than this receiver takes. Refused before anything was allocated.
    #[error("a message of {claimed_bytes} bytes, at most {max_bytes} are taken")]
    TooLong {
        /// As stated in its first record.
        claimed_bytes: u64,
        /// The receiver's bound.
        max_bytes: u64,
    },
    /// The number of records does not follow from the payload's length.
    #[error("{found} records stated, {expected} expected")]
    Total {
        /// As stated.
        found: u32,
        /// As computed.
        expected: u32,
    },
    /// Records were lost, repeated or reordered.
    #[error("record {found} where {expected} was due")]
    Order {
        /// Its index.
        found: u32,
        /// The next one due.
        expected: u32,
    },
    /// Another message's record: messages were lost, or somebody else reads this queue.
    #[error("message {found} where {expected} was due")]
    Sequence {
        /// Its sequence number.
        found: u64,
        /// The one due.
        expected: u64,
    },
    /// An earlier record was refused and nobody has reset the receiver.
    #[error("an earlier record was refused")]
    Poisoned,
}

// ---------------------------------------------------------------------------------------------------------------
// The kernel's queue

/// One end of a kernel queue: its descriptor and its shape. Pollable like a socket.
#[derive(Debug)]
pub struct Queue {
    message_bytes: usize,
    messages: u32,
    nonblocking: bool,
    fd: OwnedFd,
}

/// Creates a queue that nobody else can name: our end, non-blocking, and the peer's, blocking.
///
/// Created with `O_EXCL`, mode 0600, under 128 random bits, opened a second time, compared, unlinked.
///
/// # Errors
/// `Limit` with what the system allows; `Foreign` when the two ends are not the same queue of ours. In every
/// case nothing is left behind.
pub fn create(config: &QueueConfig) -> Result<(Queue, OwnedFd), QueueError> {
    if config.message_bytes < MESSAGE_BYTES_MIN || config.messages == 0 {
        return Err(QueueError::Limit {
            limit: if config.messages == 0 { QueueLimit::Messages } else { QueueLimit::MessageBytes },
            have: u64::from(if config.messages == 0 { 0 } else { config.message_bytes }),
            need: u64::from(if config.messages == 0 { 1 } else { MESSAGE_BYTES_MIN }),
        });
    }
    let mut random = [0u8; 16];
    getrandom::fill(&mut random)
        .map_err(|error| QueueError::Io { call: "getrandom", source: io::Error::other(error) })?;
    let name = CString::new(format!("/{NAME_PREFIX}{:032x}", u128::from_le_bytes(random))).expect("no zero byte in it");
    create_named(&name, config)
}

fn create_named(name: &CString, config: &QueueConfig) -> Result<(Queue, OwnedFd), QueueError> {
    let ours = mq_create(name, config).map_err(|source| explain(source, config))?;
    let peers = mq_open(name);
    // The name goes before anything else can fail.
    let unlinked = mq_unlink(name);
    let peers = peers.map_err(|source| explain(source, config))?;
    unlinked.map_err(|source| QueueError::Io { call: "mq_unlink", source })?;
    same_and_ours(&ours, &peers)?;
    let queue = Queue::from_fd(ours).map_err(|source| QueueError::Io { call: "mq_getattr", source })?;
    Ok((queue, peers))
}

/// Both descriptors are one queue, which belongs to us and to nobody else.
fn same_and_ours(ours: &OwnedFd, peers: &OwnedFd) -> Result<(), QueueError> {
    let stat = |fd| rustix::fs::fstat(fd).map_err(|error| QueueError::Io { call: "fstat", source: error.into() });
    let (ours, peers) = (stat(ours)?, stat(peers)?);
    let mode = peers.st_mode & 0o7777;
    let same = ours.st_dev == peers.st_dev && ours.st_ino == peers.st_ino;
    if !same || peers.st_uid != rustix::process::geteuid().as_raw() || mode != 0o600 {
        return Err(QueueError::Foreign { uid: peers.st_uid, mode });
    }
    Ok(())
}

/// Bytes that a queue of this shape takes of `RLIMIT_MSGQUEUE`. Source: getrlimit(2), `RLIMIT_MSGQUEUE`.
#[must_use]
pub fn user_bytes(config: &QueueConfig) -> u64 {
    /// `sizeof(struct msg_msg)` and `sizeof(struct posix_msg_tree_node)` of a 64-bit kernel.
    const MSG_MSG_BYTES: u64 = 48;
    const TREE_NODE_BYTES: u64 = 48;
    const MQ_PRIO_MAX: u64 = 32_768;
    let messages = u64::from(config.messages);
    messages * MSG_MSG_BYTES + messages.min(MQ_PRIO_MAX) * TREE_NODE_BYTES + messages * u64::from(config.message_bytes)
}

/// Turns the bare number of a failed `mq_open` into the limit behind it.
fn explain(source: io::Error, config: &QueueConfig) -> QueueError {
    let sysctl = |file: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/proc/sys/fs/mqueue/{file}")).ok()?.trim().parse().ok()
    };
    let rlimit = |resource| rustix::process::getrlimit(resource).current.unwrap_or(u64::MAX);
    let limit = |limit, have: u64, need: u64| QueueError::Limit { limit, have, need };
    match source.raw_os_error() {
        Some(libc::EMFILE) => {
            // Two limits share this number. Any other descriptor tells which one it was.
            let flags = rustix::event::EventfdFlags::CLOEXEC;
            match rustix::event::eventfd(0, flags) {
                Err(_) => limit(QueueLimit::OpenFiles, rlimit(rustix::process::Resource::Nofile), 2),
                Ok(_) => {
                    let have = rlimit(rustix::process::Resource::Msgqueue);
                    limit(QueueLimit::UserBytes, have, user_bytes(config))
                }
            }
        }
        Some(libc::ENOSPC) => limit(QueueLimit::Queues, sysctl("queues_max").unwrap_or(0), 1),
        Some(libc::EINVAL) => {
            let (messages, bytes) = (u64::from(config.messages), u64::from(config.message_bytes));
            match (sysctl("msg_max"), sysctl("msgsize_max")) {
                (Some(have), _) if messages > have => limit(QueueLimit::Messages, have, messages),
                (_, Some(have)) if bytes > have => limit(QueueLimit::MessageBytes, have, bytes),
                _ => QueueError::Io { call: "mq_open", source },
            }
        }
        _ => QueueError::Io { call: "mq_open", source },
    }
}

impl Queue {
    /// Takes over one end, ours or one that was passed to us.
    ///
    /// # Errors
    /// `InvalidInput` when it is no queue, or one whose records cannot hold a head.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let attributes = mq_getattr(&fd)?;
        let shape = (usize::try_from(attributes.mq_msgsize), u32::try_from(attributes.mq_maxmsg));
        let (Ok(message_bytes), Ok(messages)) = shape else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if message_bytes < MESSAGE_BYTES_MIN as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let nonblocking = attributes.mq_flags & i64::from(libc::O_NONBLOCK) != 0;
        Ok(Queue { message_bytes, messages, nonblocking, fd })
    }

    /// The descriptor, for a poll.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Longest record, bytes.
    #[must_use]
    pub fn message_bytes(&self) -> usize {
        self.message_bytes
    }

    /// Records the kernel holds.
    #[must_use]
    pub fn messages(&self) -> u32 {
        self.messages
    }

    /// This end never blocks in the kernel.
    #[must_use]
    pub fn is_nonblocking(&self) -> bool {
        self.nonblocking
    }

    /// Records now in the queue. Stale when it returns.
    ///
    /// # Errors
    /// The kernel's.
    pub fn queued(&self) -> io::Result<u32> {
        Ok(u32::try_from(mq_getattr(&self.fd)?.mq_curmsgs).unwrap_or(0))
    }

    /// The largest payload that travels as one record, bytes.
    #[must_use]
    pub fn single_record_bytes(&self) -> usize {
        self.message_bytes - FIRST_BYTES
    }

    /// Records that a payload takes, or `None` when a u32 does not count them.
    fn records(&self, payload_bytes: u64) -> Option<u32> {
        let first = self.single_record_bytes() as u64;
        let next = (self.message_bytes - NEXT_BYTES) as u64;
        u32::try_from(1 + payload_bytes.saturating_sub(first).div_ceil(next)).ok()
    }

    /// Payload bytes of record `index`: where they begin and end.
    fn chunk(&self, index: u32, payload_bytes: usize) -> (usize, usize) {
        let first = self.single_record_bytes();
        let next = self.message_bytes - NEXT_BYTES;
        let end = first + index as usize * next;
        let start = if index == 0 { 0 } else { end - next };
        (start, end.min(payload_bytes))
    }
}

/// How long a call may wait in the kernel.
#[derive(Clone, Copy)]
enum Wait {
    /// As the descriptor says.
    Descriptor,
    /// Not at all, even if the descriptor blocks.
    Never,
}

/// A time long past: a timed call with it takes what is there and never sleeps, on a blocking descriptor too.
static PAST: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 0 };

fn mq_create(name: &CString, config: &QueueConfig) -> io::Result<OwnedFd> {
    let mut attributes = attributes_zeroed();
    attributes.mq_maxmsg = i64::from(config.messages);
    attributes.mq_msgsize = i64::from(config.message_bytes);
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let mode: libc::c_uint = 0o600;
    // SAFETY: in bounds: `name` ends in zero and `attributes` is a whole `mq_attr`, both only read. Unshared and
    // unique: both are ours alone until the call returns, which keeps neither.
    let fd = unsafe { libc::mq_open(name.as_ptr(), flags, mode, &raw const attributes) };
    owned(fd)
}

fn mq_open(name: &CString) -> io::Result<OwnedFd> {
    // SAFETY: in bounds: `name` ends in zero; without O_CREAT no further argument is read. Unshared and unique:
    // the name is ours alone until the call returns, which does not keep it.
    let fd = unsafe { libc::mq_open(name.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    owned(fd)
}

fn owned(fd: libc::mqd_t) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: in bounds: no memory is touched. Unshared and unique: the kernel has just made this descriptor for
    // us (on Linux an mqd_t is one), and nobody else has seen its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn mq_unlink(name: &CString) -> io::Result<()> {
    // SAFETY: in bounds: `name` ends in zero and is only read. Unshared and unique: ours alone until the return.
    let result = unsafe { libc::mq_unlink(name.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn attributes_zeroed() -> libc::mq_attr {
    // SAFETY: in bounds: a value of its own. All zero is a value of `mq_attr`: it is made of integers only.
    // Unshared and unique: nobody else has seen it.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn mq_getattr(fd: &OwnedFd) -> io::Result<libc::mq_attr> {
    let mut attributes = attributes_zeroed();
    // SAFETY: in bounds: the call writes one whole `mq_attr`. Unshared and unique: a local of ours.
    let result = unsafe { libc::mq_getattr(fd.as_raw_fd(), &raw mut attributes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(attributes) }
}

/// One record to the kernel; `false` when there is no room for now.
#[inline]
fn mq_send(queue: &Queue, record: &[u8], wait: Wait) -> io::Result<bool> {
    let timeout = timeout(wait);
    loop {
        // SAFETY: in bounds: the call reads `record.len()` bytes of a live slice and one timespec, or none.
        // Unshared: `record` lies in this process's heap. Unique: it is borrowed, and the kernel keeps a copy.
        let result =
            unsafe { libc::mq_timedsend(queue.fd.as_raw_fd(), record.as_ptr().cast(), record.len(), 0, timeout) };
        if result == 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            error if is_not_now(&error) => return Ok(false),
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error => return Err(error),
        }
    }
}

/// One record from the kernel into `room`, which is at least `message_bytes` long: its length, or `None` when
/// there is none for now.
#[inline]
fn mq_receive(queue: &Queue, room: &mut [u8], wait: Wait) -> io::Result<Option<usize>> {
    let timeout = timeout(wait);
    loop {
        // SAFETY: in bounds: the call writes at most `room.len()` bytes of a live slice and reads one timespec, or
        // none; no priority is asked for. Unshared: `room` lies in this process's heap. Unique: borrowed mutably.
        let result = unsafe {
            libc::mq_timedreceive(
                queue.fd.as_raw_fd(),
                room.as_mut_ptr().cast(),
                room.len(),
                std::ptr::null_mut(),
                timeout,
            )
        };
        if let Ok(count) = usize::try_from(result) {
            return Ok(Some(count));
        }
        match io::Error::last_os_error() {
            error if is_not_now(&error) => return Ok(None),
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error => return Err(error),
        }
    }
}

fn timeout(wait: Wait) -> *const libc::timespec {
    match wait {
        // On a non-blocking descriptor, too: whoever holds another end of it may have made it block.
        Wait::Never => &raw const PAST,
        Wait::Descriptor => std::ptr::null(),
    }
}

fn is_not_now(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ETIMEDOUT))
}

/// Sleeps until the queue is ready or the deadline has passed, on the monotonic clock (the queue's own timed
/// calls follow the wall clock, and a step of it would move our deadlines). `false`: the deadline has passed.
fn sleep(queue: &Queue, flags: PollFlags, deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = match deadline {
            None => None,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(false);
                }
                Some(rustix::event::Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?)
            }
        };
        match poll(&mut [PollFd::new(&queue.fd, flags)], left.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Messages

/// A payload on the heap, with room in front for a record's header and behind for a record's end.
#[derive(Default)]
pub struct Buffer {
    /// `FIRST_BYTES` in front, then the payload, then slack. Empty when the buffer is.
    storage: Vec<u8>,
    len: usize,
}

impl Buffer {
    /// A buffer of `len` zero bytes. Allocates.
    #[must_use]
    pub fn with_len(len: usize) -> Buffer {
        Buffer { storage: vec![0; FIRST_BYTES + len], len }
    }

    /// Cuts the payload, or extends it into the capacity, where it shows what was there before.
    ///
    /// # Panics
    /// When `len` is over the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} bytes do not fit a buffer of {}", self.capacity());
        self.len = len;
    }

    /// The longest payload that fits without another allocation, bytes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.storage.len().saturating_sub(FIRST_BYTES)
    }

    /// A buffer that a receiver can use for any record, and for a payload of `len`.
    fn for_receiving(len: usize, message_bytes: usize) -> Buffer {
        Buffer { storage: vec![0; Self::storage_for_receiving(len, message_bytes)], len: 0 }
    }

    /// The kernel wants room for the longest record, also for the last one, however short it is.
    fn storage_for_receiving(len: usize, message_bytes: usize) -> usize {
        FIRST_BYTES + len + message_bytes
    }

    /// A record's header and payload in one piece, `header` in place of the bytes in front of `start..end`.
    /// What `use_record` sees is valid only inside it; afterwards those bytes are as before.
    #[inline]
    fn with_header<const N: usize, R>(
        &mut self,
        header: &[u8; N],
        start: usize,
        end: usize,
        use_record: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let at = FIRST_BYTES + start - N;
        let saved: [u8; N] = *self.storage[at..].first_chunk().expect("room in front of every chunk");
        self.storage[at..at + N].copy_from_slice(header);
        let result = use_record(&mut self.storage[at..FIRST_BYTES + end]);
        self.storage[at..at + N].copy_from_slice(&saved);
        result
    }
}

impl AsRef<[u8]> for Buffer {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self.storage.get(FIRST_BYTES..FIRST_BYTES + self.len).unwrap_or(&[])
    }
}

impl AsMut<[u8]> for Buffer {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        self.storage.get_mut(FIRST_BYTES..FIRST_BYTES + self.len).unwrap_or(&mut [])
    }
}

impl core::ops::Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.as_ref()
    }
}

impl core::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.as_mut()
    }
}

impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Buffer {
        let mut storage = Vec::with_capacity(FIRST_BYTES + bytes.len());
        storage.resize(FIRST_BYTES, 0);
        storage.extend_from_slice(bytes);
        Buffer { storage, len: bytes.len() }
    }
}

impl core::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Buffer({} of {} bytes)", self.len, self.capacity())
    }
}

/// A head of 64 bytes, opaque here, and a payload.
#[derive(Debug)]
pub struct Message {
    /// The head.
    pub head: [u8; HEAD_BYTES],
    /// The payload.
    pub body: Buffer,
}

/// What one end of a queue did so far. Ever-growing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueStats {
    /// Messages sent, or received.
    pub messages: u64,
    /// Records sent, or received.
    pub records: u64,
    /// System calls, turned away or not, sleeps included.
    pub calls: u64,
    /// Payload bytes moved in user space.
    pub copied_bytes: u64,
    /// Buffers allocated.
    pub allocations: u64,
}

fn first_record_header(head: &[u8; HEAD_BYTES], payload_bytes: u64, records: u32, sequence: u64) -> [u8; FIRST_BYTES] {
    let mut header = [0; FIRST_BYTES];
    header[..HEAD_BYTES].copy_from_slice(head);
    header[HEAD_BYTES..HEAD_BYTES + 8].copy_from_slice(&payload_bytes.to_le_bytes());
    header[HEAD_BYTES + 8..HEAD_BYTES + 12].copy_from_slice(&records.to_le_bytes());
    header[HEAD_BYTES + 12..].copy_from_slice(&low_half(sequence).to_le_bytes());
    header
}

fn next_record_header(index: u32, records: u32, sequence: u64) -> [u8; NEXT_BYTES] {
    let mut header = [0; NEXT_BYTES];
    header[..4].copy_from_slice(&index.to_le_bytes());
    header[4..8].copy_from_slice(&records.to_le_bytes());
    header[8..].copy_from_slice(&sequence.to_le_bytes());
    header
}

/// One more buffer may be kept for reuse.
fn keeps<'a>(kept: impl ExactSizeIterator<Item = &'a Buffer>, more: &Buffer) -> bool {
    kept.len() < KEPT_MAX
        && kept.map(|buffer| buffer.storage.len()).sum::<usize>() + more.storage.len() <= KEPT_BYTES_MAX
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
fn low_half(sequence: u64) -> u32 {
    sequence as u32
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("the caller checked the length"))
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("the caller checked the length"))
}

// ---------------------------------------------------------------------------------------------------------------
// Sending

/// The message was not queued; here it is again. Flush first.
#[derive(Debug, thiserror::Error)]
#[error("the queue's backlog is full")]
pub struct Backlogged(pub Message);

/// The sending end: a bounded backlog of messages in front of the kernel's few records.
#[derive(Debug)]
pub struct Sender {
    messages_max: usize,
    bytes_max: u64,
    backlog: VecDeque<Message>,
    backlog_bytes: u64,
    /// The next record of the first message.
    index: u32,
    sequence: u64,
    sent: VecDeque<Message>,
    stats: QueueStats,
    queue: Queue,
}

impl Sender {
    /// A sender whose backlog holds 1024 messages and 256 MiB: four bodies of the default largest size.
    #[must_use]
    pub fn new(queue: Queue) -> Self {
        Sender::with_backlog(queue, 1024, 256 << 20)
    }

    /// A sender whose backlog holds so many messages and bytes; one message may always wait, however long.
    #[must_use]
    pub fn with_backlog(queue: Queue, messages_max: usize, bytes_max: u64) -> Self {
        Sender {
            messages_max,
            bytes_max,
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            index: 0,
            sequence: 0,
            sent: VecDeque::new(),
            stats: QueueStats::default(),
            queue,
        }
    }

    /// Puts a message behind the others. No system call: `flush` sends.
    ///
    /// # Errors
    /// [`Backlogged`] gives the message back.
    pub fn queue(&mut self, message: Message) -> Result<(), Backlogged> {
        let bytes = message.body.len() as u64;
        let empty = self.backlog.is_empty();
        let countable = self.queue.records(bytes).is_some();
        if !countable
            || (!empty && (self.backlog.len() >= self.messages_max || self.backlog_bytes + bytes > self.bytes_max))
        {
            return Err(Backlogged(message));
        }
        self.backlog_bytes += bytes;
        self.backlog.push_back(message);
        Ok(())
    }

    /// Sends what waits: until the kernel's queue is full if the descriptor is non-blocking (`Blocked`: poll for
    /// writability), else until all is sent, waiting in the kernel.
    ///
    /// # Errors
    /// The kernel's.
    pub fn flush(&mut self) -> Result<Flush, QueueError> {
        self.send_all(Wait::Descriptor)
    }

    /// Sends what waits until the kernel's queue is full, also on a blocking descriptor.
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_flush(&mut self) -> Result<Flush, QueueError> {
        self.send_all(Wait::Never)
    }

    /// Sends what waits, sleeping while the kernel's queue is full, until `deadline` (then `Blocked`).
    ///
    /// # Errors
    /// The kernel's.
    pub fn flush_until(&mut self, deadline: Instant) -> Result<Flush, QueueError> {
        loop {
            if self.send_all(Wait::Never)? == Flush::Done {
                return Ok(Flush::Done);
            }
            self.stats.calls += 1;
            let ready = sleep(&self.queue, PollFlags::OUT, Some(deadline));
            if !ready.map_err(|source| QueueError::Io { call: "ppoll", source })? {
                return Ok(Flush::Blocked);
            }
        }
    }

    fn send_all(&mut self, wait: Wait) -> Result<Flush, QueueError> {
        while let Some(message) = self.backlog.front_mut() {
            let payload_bytes = message.body.len();
            let records = self.queue.records(payload_bytes as u64).expect("checked when it was queued");
            while self.index < records {
                let (start, end) = self.queue.chunk(self.index, payload_bytes);
                let send = |record: &mut [u8]| mq_send(&self.queue, record, wait);
                let taken = if self.index == 0 {
                    let header = first_record_header(&message.head, payload_bytes as u64, records, self.sequence);
                    if message.body.storage.is_empty() {
                        let mut header = header;
                        send(&mut header)
                    } else {
                        message.body.with_header(&header, start, end, send)
                    }
                } else {
                    let header = next_record_header(self.index, records, self.sequence);
                    message.body.with_header(&header, start, end, send)
                };
                self.stats.calls += 1;
                if !taken.map_err(|source| QueueError::Io { call: "mq_timedsend", source })? {
                    return Ok(Flush::Blocked);
                }
                self.stats.records += 1;
                self.index += 1;
            }
            self.index = 0;
            self.sequence += 1;
            self.stats.messages += 1;
            self.backlog_bytes -= payload_bytes as u64;
            let message = self.backlog.pop_front().expect("seen above");
            if keeps(self.sent.iter().map(|sent| &sent.body), &message.body) {
                self.sent.push_back(message);
            }
        }
        Ok(Flush::Done)
    }

    /// A message the kernel has taken whole, for its buffer to be used again. At most 16, of 128 MiB, are kept.
    pub fn take_sent(&mut self) -> Option<Message> {
        self.sent.pop_front()
    }

    /// Takes back the first message that waits, whatever of it the kernel has already. After that the queue is of no use
    /// to its receiver unless both ends are reset.
    pub fn take_unsent(&mut self) -> Option<Message> {
        let message = self.backlog.pop_front()?;
        self.backlog_bytes -= message.body.len() as u64;
        self.index = 0;
        Some(message)
    }

    /// Something waits to be sent.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Messages and payload bytes that wait.
    #[must_use]
    pub fn backlog(&self) -> (usize, u64) {
        (self.backlog.len(), self.backlog_bytes)
    }

    /// Forgets what waits and begins again at the first message, for a peer that does too. The records already
    /// in the kernel are the receiver's to drain.
    pub fn reset(&mut self) {
        self.backlog.clear();
        self.backlog_bytes = 0;
        self.index = 0;
        self.sequence = 0;
    }

    /// The kernel's queue.
    #[must_use]
    pub fn kernel_queue(&self) -> &Queue {
        &self.queue
    }

    /// What this end did so far.
    #[must_use]
    pub fn stats(&self) -> QueueStats {
        self.stats
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Receiving

/// A message of which the first record is here.
#[derive(Debug)]
struct Partial {
    head: [u8; HEAD_BYTES],
    body: Buffer,
    records: u32,
    /// The next record due.
    index: u32,
}

/// The receiving end: puts messages together again, each in the buffer it was received into.
#[derive(Debug)]
pub struct Receiver {
    max_body: u64,
    sequence: u64,
    partial: Option<Partial>,
    spare: Vec<Buffer>,
    poisoned: bool,
    stats: QueueStats,
    queue: Queue,
}

impl Receiver {
    /// A receiver that takes payloads up to `max_body` bytes.
    #[must_use]
    pub fn new(queue: Queue, max_body: u64) -> Self {
        Receiver {
            max_body,
            sequence: 0,
            partial: None,
            spare: Vec::with_capacity(KEPT_MAX),
            poisoned: false,
            stats: QueueStats::default(),
            queue,
        }
    }

    /// The next message. A non-blocking descriptor gives `None` when the rest, or all, of it has not come yet;
    /// what came is kept. A blocking one waits in the kernel.
    ///
    /// # Errors
    /// The kernel's, and `Protocol`, after which every call fails until [`Receiver::reset`].
    #[inline]
    pub fn receive(&mut self) -> Result<Option<Message>, QueueError> {
        self.receive_all(Wait::Descriptor)
    }

    /// The next message that is there at once, also on a blocking descriptor.
    ///
    /// # Errors
    /// As [`Receiver::receive`].
    #[inline]
    pub fn try_receive(&mut self) -> Result<Option<Message>, QueueError> {
        self.receive_all(Wait::Never)
    }

    /// The next message: asks again and again for `spin` (a system call each time), then sleeps until `deadline`,
    /// or without end when there is none. `None`: the deadline has passed.
    ///
    /// Without a deadline a blocking descriptor sleeps inside its one receive call; with one it takes two calls
    /// more, because only `ppoll` knows the monotonic clock (8 B there and back on one core: 2.7 µs against 4.3).
    /// Who is told of timeouts through the queue itself does better without.
    ///
    /// # Errors
    /// As [`Receiver::receive`].
    pub fn receive_until(&mut self, spin: Duration, deadline: Option<Instant>) -> Result<Option<Message>, QueueError> {
        if !spin.is_zero() {
            let spin_end = Instant::now() + spin;
            let spin_end = deadline.map_or(spin_end, |deadline| deadline.min(spin_end));
            loop {
                if let Some(message) = self.receive_all(Wait::Never)? {
                    return Ok(Some(message));
                }
                if Instant::now() >= spin_end {
                    break;
                }
                std::hint::spin_loop();
            }
        }
        if deadline.is_none() && !self.queue.nonblocking {
            // One system call instead of three: the kernel hands the sender's record to the sleeper directly.
            return self.receive_all(Wait::Descriptor);
        }
        loop {
            if let Some(message) = self.receive_all(Wait::Never)? {
                return Ok(Some(message));
            }
            self.stats.calls += 1;
            let ready = sleep(&self.queue, PollFlags::IN, deadline);
            if !ready.map_err(|source| QueueError::Io { call: "ppoll", source })? {
                return Ok(None);
            }
        }
    }

    fn receive_all(&mut self, wait: Wait) -> Result<Option<Message>, QueueError> {
        if self.poisoned {
            return Err(ProtocolError::Poisoned.into());
        }
        let result = self.receive_records(wait);
        self.poisoned |= matches!(result, Err(QueueError::Protocol(_)));
        result
    }

    fn receive_records(&mut self, wait: Wait) -> Result<Option<Message>, QueueError> {
        loop {
            let took = match &mut self.partial {
                None => self.receive_first(wait)?,
                Some(_) => self.receive_next(wait)?,
            };
            if !took {
                return Ok(None);
            }
            if let Some(Partial { head, body, .. }) = self.partial.take_if(|partial| partial.index == partial.records) {
                self.sequence += 1;
                self.stats.messages += 1;
                return Ok(Some(Message { head, body }));
            }
        }
    }

    fn receive_first(&mut self, wait: Wait) -> Result<bool, QueueError> {
        let message_bytes = self.queue.message_bytes;
        let mut body = match self.spare.pop() {
            Some(spare) => spare,
            None => {
                self.stats.allocations += 1;
                Buffer::for_receiving(self.queue.single_record_bytes(), message_bytes)
            }
        };
        self.stats.calls += 1;
        let count = match mq_receive(&self.queue, &mut body.storage, wait) {
            Ok(Some(count)) => count,
            outcome => {
                self.spare.push(body);
                return match outcome {
                    Err(source) => Err(QueueError::Io { call: "mq_timedreceive", source }),
                    Ok(_) => Ok(false),
                };
            }
        };
        self.stats.records += 1;
        let Some(&header) = body.storage[..count].first_chunk::<FIRST_BYTES>() else {
            let (found_bytes, expected_bytes) = (count as u64, FIRST_BYTES as u64);
            return Err(ProtocolError::Length { found_bytes, expected_bytes }.into());
        };
        let payload_bytes = le_u64(&header, HEAD_BYTES);
        let records = le_u32(&header, HEAD_BYTES + 8);
        let sequence = le_u32(&header, HEAD_BYTES + 12);
        if payload_bytes > self.max_body {
            return Err(ProtocolError::TooLong { claimed_bytes: payload_bytes, max_bytes: self.max_body }.into());
        }
        let expected = self.queue.records(payload_bytes).unwrap_or(0);
        if records != expected || expected == 0 {
            return Err(ProtocolError::Total { found: records, expected }.into());
        }
        if sequence != low_half(self.sequence) {
            let (found, expected) = (u64::from(sequence), self.sequence);
            return Err(ProtocolError::Sequence { found, expected }.into());
        }
        let payload_len = usize::try_from(payload_bytes).expect("at most max_body, and usize is 64 bits");
        let (_, first_bytes) = self.queue.chunk(0, payload_len);
        if count != FIRST_BYTES + first_bytes {
            let (found_bytes, expected_bytes) = (count as u64, (FIRST_BYTES + first_bytes) as u64);
            return Err(ProtocolError::Length { found_bytes, expected_bytes }.into());
        }
        if records > 1 && body.storage.len() < Buffer::storage_for_receiving(payload_len, message_bytes) {
            // The length is known only now. A recycled buffer of this size spares the copy and the allocation.
            let mut longer = Buffer::for_receiving(payload_len, message_bytes);
            longer.storage[FIRST_BYTES..FIRST_BYTES + first_bytes].copy_from_slice(&body.storage[FIRST_BYTES..count]);
            self.stats.allocations += 1;
            self.stats.copied_bytes += first_bytes as u64;
            self.spare.push(std::mem::replace(&mut body, longer));
        }
        body.len = payload_len;
        let head = *header.first_chunk().expect("longer than a head");
        self.partial = Some(Partial { head, body, records, index: 1 });
        Ok(true)
    }

    fn receive_next(&mut self, wait: Wait) -> Result<bool, QueueError> {
        let partial = self.partial.as_mut().expect("the caller saw it");
        let (start, end) = self.queue.chunk(partial.index, partial.body.len);
        let at = FIRST_BYTES + start - NEXT_BYTES;
        let storage = &mut partial.body.storage[at..];
        let saved: [u8; NEXT_BYTES] = *storage.first_chunk().expect("room in front of every chunk");
        self.stats.calls += 1;
        let outcome = mq_receive(&self.queue, storage, wait);
        let header: [u8; NEXT_BYTES] = *storage.first_chunk().expect("as above");
        storage[..NEXT_BYTES].copy_from_slice(&saved);
        let count = match outcome {
            Ok(Some(count)) => count,
            Ok(None) => return Ok(false),
            Err(source) => return Err(QueueError::Io { call: "mq_timedreceive", source }),
        };
        self.stats.records += 1;
        let expected = NEXT_BYTES + end - start;
        if count != expected {
            let (found_bytes, expected_bytes) = (count as u64, expected as u64);
            return Err(ProtocolError::Length { found_bytes, expected_bytes }.into());
        }
        let (index, records, sequence) = (le_u32(&header, 0), le_u32(&header, 4), le_u64(&header, 8));
        if index != partial.index {
            return Err(ProtocolError::Order { found: index, expected: partial.index }.into());
        }
        if records != partial.records {
            return Err(ProtocolError::Total { found: records, expected: partial.records }.into());
        }
        if sequence != self.sequence {
            return Err(ProtocolError::Sequence { found: sequence, expected: self.sequence }.into());
        }
        partial.index += 1;
        Ok(true)
    }

    /// Gives a buffer to a later message: then receiving allocates nothing, and copies nothing if it is long
    /// enough. At most 16, of 128 MiB, are kept.
    pub fn recycle(&mut self, mut buffer: Buffer) {
        let usable = buffer.storage.len() >= self.queue.message_bytes;
        if usable && keeps(self.spare.iter(), &buffer) {
            buffer.len = 0;
            self.spare.push(buffer);
        }
    }

    /// A message has begun and is not whole.
    #[must_use]
    pub fn mid_message(&self) -> bool {
        self.partial.is_some()
    }

    /// After a peer's death or a broken protocol: drops what is half received and what is still in the kernel,
    /// and begins again at the first message. Receive until `None` first, not to lose what the peer finished.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reset(&mut self) -> Result<(), QueueError> {
        self.partial = None;
        self.poisoned = false;
        self.sequence = 0;
        let mut room = vec![0; self.queue.message_bytes];
        // A dead peer adds nothing, a living one is not waited for: one queue's worth at most.
        for _ in 0..self.queue.messages {
            let drained = mq_receive(&self.queue, &mut room, Wait::Never);
            if drained.map_err(|source| QueueError::Io { call: "mq_timedreceive", source })?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// The kernel's queue.
    #[must_use]
    pub fn kernel_queue(&self) -> &Queue {
        &self.queue
    }

    /// What this end did so far.
    #[must_use]
    pub fn stats(&self) -> QueueStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    const SMALL: QueueConfig = QueueConfig { messages: 4, message_bytes: 512 };

    /// A queue, once the other tests of this user leave room for it.
    fn made<T>(make: impl Fn() -> Result<T, QueueError>) -> T {
        let start = Instant::now();
        loop {
            match make() {
                Err(QueueError::Limit { limit: QueueLimit::UserBytes, .. })
                    if start.elapsed() < Duration::from_secs(30) =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => return other.expect("a queue"),
            }
        }
    }

    fn name(text: &str) -> CString {
        CString::new(format!("/praas-test-{}-{text}", std::process::id())).expect("no zero byte")
    }

    fn exists(name: &CString) -> bool {
        mq_open(name).is_ok()
    }

    /// Both ends in this process; the second one blocks.
    fn ends(config: &QueueConfig) -> (Queue, Queue) {
        let (ours, peers) = made(|| create(config));
        (ours, Queue::from_fd(peers).expect("a queue"))
    }

    fn message(mark: u8, body: &[u8]) -> Message {
        Message { head: [mark; HEAD_BYTES], body: Buffer::from(body) }
    }

    fn content(len: usize) -> Vec<u8> {
        (0..=250).cycle().take(len).collect()
    }

    #[test]
    fn m3_nothing_named_is_left_and_the_ends_are_one_queue() {
        let name = name("clean");
        let (ours, peers) = made(|| create_named(&name, &SMALL));
        assert!(!exists(&name));
        let peers = Queue::from_fd(peers).expect("a queue");
        assert!(ours.is_nonblocking() && !peers.is_nonblocking());
        assert_eq!((peers.message_bytes(), peers.messages()), (512, 4));
        assert!(mq_send(&ours, b"here", Wait::Never).expect("room"));
        assert_eq!(peers.queued().expect("a queue"), 1);
        let flags = rustix::io::fcntl_getfd(peers.fd()).expect("a descriptor");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn m3_a7_a_foreign_queue_of_the_same_name_is_refused_and_left_alone() {
        let name = name("trap");
        let trap = made(|| mq_create(&name, &SMALL).map_err(|source| explain(source, &SMALL)));
        match create_named(&name, &SMALL) {
            Err(QueueError::Io { call: "mq_open", source }) => {
                assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
            }
            other => panic!("{other:?}"),
        }
        assert!(exists(&name), "not ours to remove");
        mq_unlink(&name).expect("still there");
        drop(trap);
    }

    #[test]
    fn m3_a6_another_queue_or_a_wrong_mode_is_refused() {
        let (first, first_peer) = made(|| create(&SMALL));
        let (second, _second_peer) = made(|| create(&SMALL));
        assert!(same_and_ours(&first.fd, &first_peer).is_ok());
        assert!(matches!(same_and_ours(&second.fd, &first_peer), Err(QueueError::Foreign { .. })));
        rustix::fs::fchmod(&first.fd, rustix::fs::Mode::from_raw_mode(0o644)).expect("our queue");
        match same_and_ours(&first.fd, &first_peer) {
            Err(QueueError::Foreign { mode: 0o644, .. }) => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn m3_records_too_short_for_a_head_are_refused() {
        for bytes in [0, 64, 80, 159] {
            let config = QueueConfig { messages: 4, message_bytes: bytes };
            match create(&config) {
                Err(QueueError::Limit { limit: QueueLimit::MessageBytes, have, need: 160 }) => {
                    assert_eq!(have, u64::from(bytes));
                }
                other => panic!("{other:?}"),
            }
        }
        let name = name("short");
        let short = QueueConfig { messages: 2, message_bytes: 32 };
        let fd = made(|| mq_create(&name, &short).map_err(|source| explain(source, &short)));
        mq_unlink(&name).expect("just made");
        assert_eq!(Queue::from_fd(fd).expect_err("too short").kind(), io::ErrorKind::InvalidInput);
        let no_queue = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd");
        assert!(Queue::from_fd(no_queue).is_err());
    }

    #[test]
    fn m2_shapes_over_the_limits_are_explained() {
        let config = QueueConfig { messages: 1 << 20, message_bytes: 512 };
        match create(&config).expect_err("no system allows this") {
            error @ QueueError::Limit { limit: QueueLimit::Messages, have, need } => {
                assert!(have < need && need == 1 << 20);
                let text = error.to_string();
                assert!(text.contains("fs.mqueue.msg_max") && text.contains("sysctl"), "{text}");
            }
            other => panic!("{other}"),
        }
        let config = QueueConfig { messages: 1, message_bytes: 1 << 30 };
        let error = create(&config).expect_err("no system allows this");
        assert!(matches!(error, QueueError::Limit { limit: QueueLimit::MessageBytes, .. }), "{error}");
    }

    #[test]
    fn golden_bytes_of_the_records() {
        let (ours, peers) = ends(&QueueConfig { messages: 4, message_bytes: 160 });
        let mut sender = Sender::new(ours);
        sender.sequence = 0x0102_0304_0506_0708;
        sender.queue(message(0xAB, &content(80 + 144 + 3))).expect("room");
        assert_eq!(sender.flush().expect("a queue"), Flush::Done);
        assert_eq!(&*sender.take_sent().expect("sent").body, &content(227)[..], "the buffer is as before");
        let mut records = Vec::new();
        let mut room = [0; 160];
        while let Some(count) = mq_receive(&peers, &mut room, Wait::Never).expect("a queue") {
            records.push(room[..count].to_vec());
        }
        let body = content(227);
        let mut first = vec![0xAB; 64];
        first.extend_from_slice(&[227, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 8, 7, 6, 5]);
        first.extend_from_slice(&body[..80]);
        let mut second = vec![1, 0, 0, 0, 3, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1];
        second.extend_from_slice(&body[80..224]);
        let mut third = vec![2, 0, 0, 0, 3, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1];
        third.extend_from_slice(&body[224..]);
        assert_eq!(records, [first, second, third]);
    }

    #[test]
    fn p2_payloads_at_every_record_boundary_come_back() {
        let (ours, peers) = ends(&SMALL);
        let (mut sender, mut receiver) = (Sender::new(ours), Receiver::new(peers, 1 << 20));
        let boundaries = [432, 432 + 496, 432 + 2 * 496, 432 + 40 * 496];
        let lengths = [0, 1].into_iter().chain(boundaries.iter().flat_map(|&at| [at - 1, at, at + 1]));
        for (mark, len) in (1..).zip(lengths) {
            sender.queue(message(mark, &content(len))).expect("room");
            let received = loop {
                let flushed = sender.flush().expect("a queue");
                match receiver.try_receive().expect("a queue") {
                    Some(message) => break message,
                    None => assert_eq!(flushed, Flush::Blocked),
                }
            };
            assert_eq!(received.head, [mark; 64]);
            assert!(*received.body == content(len), "{len}");
            assert_eq!(sender.flush().expect("a queue"), Flush::Done);
            receiver.recycle(received.body);
        }
        assert_eq!(receiver.stats().messages, 14);
        assert!(!receiver.mid_message() && !sender.wants_write());
    }

    #[test]
    fn steady_state_allocates_nothing_and_copies_nothing() {
        let (ours, peers) = ends(&SMALL);
        let (mut sender, mut receiver) = (Sender::new(ours), Receiver::new(peers, 1 << 20));
        let mut round = |body: Buffer| {
            sender.queue(Message { head: [1; 64], body }).expect("room");
            loop {
                let _ = sender.flush().expect("a queue");
                if let Some(message) = receiver.try_receive().expect("a queue") {
                    let _ = sender.flush().expect("a queue");
                    let sent = sender.take_sent().expect("sent").body;
                    receiver.recycle(message.body);
                    return (sent, receiver.stats());
                }
            }
        };
        let (mut body, _) = round(Buffer::from(&content(5000)[..]));
        let mut before = QueueStats::default();
        for warm in [false, true] {
            for _ in 0..10 {
                let (sent, stats) = round(body);
                body = sent;
                if warm {
                    assert_eq!((stats.allocations, stats.copied_bytes), (before.allocations, before.copied_bytes));
                }
                before = stats;
            }
        }
    }

    /// G8, M1: nobody receives; the kernel's queue fills, then ours, and nothing is lost.
    #[test]
    fn m1_a_full_queue_blocks_nobody_and_loses_nothing() {
        let (ours, peers) = ends(&SMALL);
        let (mut sender, mut receiver) = (Sender::with_backlog(ours, 3, 1000), Receiver::new(peers, 1 << 20));
        let mut sent = 0u8;
        let refused = loop {
            let _ = sender.flush().expect("a queue");
            match sender.queue(message(sent, &[sent; 100])) {
                Ok(()) => sent += 1,
                Err(Backlogged(message)) => break message,
            }
        };
        assert_eq!((refused.head[0], &refused.body[..]), (sent, &[sent; 100][..]));
        assert_eq!((sent, sender.backlog()), (7, (3, 300)), "4 in the kernel, 3 with us");
        assert_eq!(sender.flush().expect("a queue"), Flush::Blocked);
        let start = Instant::now();
        let deadline = start + Duration::from_millis(30);
        assert_eq!(sender.flush_until(deadline).expect("a queue"), Flush::Blocked);
        assert!(start.elapsed() >= Duration::from_millis(30));
        for mark in 0..sent {
            let _ = sender.flush().expect("a queue");
            assert_eq!(receiver.try_receive().expect("a queue").expect("a message").head[0], mark);
        }
        assert!(receiver.try_receive().expect("a queue").is_none());

        // By bytes; but one message may always wait, however long.
        sender.queue(message(0, &[0; 5000])).expect("the only one");
        assert!(sender.queue(message(0, &[0; 1])).is_err());
    }

    #[test]
    fn m1_a_nonblocking_queue_can_be_polled() {
        let (ours, peers) = ends(&SMALL);
        let mut poll = mio::Poll::new().expect("epoll");
        let mut events = mio::Events::with_capacity(4);
        let fd = ours.fd().as_raw_fd();
        let interest = mio::Interest::READABLE | mio::Interest::WRITABLE;
        poll.registry().register(&mut mio::unix::SourceFd(&fd), mio::Token(1), interest).expect("epoll takes queues");
        assert!(mq_send(&peers, b"x", Wait::Never).expect("room"));
        poll.poll(&mut events, Some(Duration::from_secs(5))).expect("epoll");
        assert!(events.iter().any(mio::event::Event::is_readable));
        drop(ours);
    }

    #[test]
    fn a_blocking_end_waits_in_the_kernel_or_until_its_deadline() {
        let (ours, peers) = ends(&SMALL);
        let (mut sender, mut receiver) = (Sender::new(ours), Receiver::new(peers, 1 << 20));
        for spin in [Duration::ZERO, Duration::from_millis(2)] {
            let start = Instant::now();
            let deadline = Some(start + Duration::from_millis(30));
            assert!(receiver.receive_until(spin, deadline).expect("a queue").is_none());
            let waited = start.elapsed();
            assert!(waited >= Duration::from_millis(30) && waited < Duration::from_secs(5), "{waited:?}");
        }
        let waiting = std::thread::spawn(move || {
            let first = receiver.receive_until(Duration::ZERO, None).expect("a queue").expect("no deadline");
            let second = receiver.receive().expect("a queue").expect("a blocking end");
            let soon = Some(Instant::now() + Duration::from_secs(20));
            let third = receiver.receive_until(Duration::from_micros(50), soon).expect("a queue").expect("in time");
            [first, second, third].map(|message| (message.head[0], message.body.len()))
        });
        for (mark, len) in [(1, 10), (2, 5000), (3, 600)] {
            std::thread::sleep(Duration::from_millis(20));
            sender.queue(message(mark, &content(len))).expect("room");
            let deadline = Instant::now() + Duration::from_secs(20);
            assert_eq!(sender.flush_until(deadline).expect("a queue"), Flush::Done);
        }
        assert_eq!(waiting.join().expect("the waiting thread"), [(1, 10), (2, 5000), (3, 600)]);
    }

    #[test]
    fn a_peer_that_dies_mid_message_leaves_a_receiver_that_can_be_reset() {
        let (ours, peers) = ends(&SMALL);
        let mut receiver = Receiver::new(ours, 1 << 20);
        let mut dead = Sender::new(Queue::from_fd(peers.fd.try_clone().expect("a descriptor")).expect("a queue"));
        dead.queue(message(1, b"whole")).expect("room");
        dead.queue(message(2, &content(4000))).expect("room");
        assert_eq!(dead.flush_until(Instant::now()).expect("a queue"), Flush::Blocked);
        drop(dead);
        // What it finished is received; what it did not is not.
        assert_eq!(receiver.receive().expect("a queue").expect("a message").head[0], 1);
        assert!(receiver.receive().expect("a queue").is_none());
        assert!(receiver.mid_message());
        receiver.reset().expect("a queue");
        assert!(!receiver.mid_message());
        let mut next = Sender::new(peers);
        next.queue(message(3, &content(1000))).expect("room");
        assert_eq!(next.flush().expect("a queue"), Flush::Done);
        let received = receiver.receive().expect("a queue").expect("a message");
        assert_eq!((received.head[0], &*received.body), (3, &content(1000)[..]));
    }

    /// R1, N5: records a hostile peer might send, each to a fresh receiver: refused by what is wrong with them,
    /// before anything of the claimed size is allocated.
    #[test]
    fn n5_records_that_make_no_message_are_refused() {
        use ProtocolError as P;
        let first = |payload: u64, records: u32, sequence: u64, rest: usize| {
            let mut record = first_record_header(&[0; 64], payload, records, sequence).to_vec();
            record.resize(record.len() + rest, 9);
            record
        };
        let next = |index: u32, records: u32, sequence: u64, rest: usize| {
            let mut record = next_record_header(index, records, sequence).to_vec();
            record.resize(record.len() + rest, 9);
            record
        };
        let begun = || first(1000, 3, 0, 432);
        let cases: Vec<(Vec<Vec<u8>>, P)> = vec![
            (vec![vec![]], P::Length { found_bytes: 0, expected_bytes: 80 }),
            (vec![vec![1; 79]], P::Length { found_bytes: 79, expected_bytes: 80 }),
            (vec![first(10, 1, 0, 9)], P::Length { found_bytes: 89, expected_bytes: 90 }),
            (vec![first(10, 1, 0, 11)], P::Length { found_bytes: 91, expected_bytes: 90 }),
            (vec![first(1 << 20, 2115, 0, 432)], P::TooLong { claimed_bytes: 1 << 20, max_bytes: 100_000 }),
            (vec![first(u64::MAX, 1, 0, 432)], P::TooLong { claimed_bytes: u64::MAX, max_bytes: 100_000 }),
            (vec![first(10, 0, 0, 10)], P::Total { found: 0, expected: 1 }),
            (vec![first(1000, 4, 0, 432)], P::Total { found: 4, expected: 3 }),
            (vec![first(10, 1, 1, 10)], P::Sequence { found: 1, expected: 0 }),
            (vec![begun(), next(2, 3, 0, 72)], P::Length { found_bytes: 88, expected_bytes: 512 }),
            (vec![begun(), next(2, 3, 0, 496)], P::Order { found: 2, expected: 1 }),
            (vec![begun(), next(0, 3, 0, 496)], P::Order { found: 0, expected: 1 }),
            (vec![begun(), next(1, 4, 0, 496)], P::Total { found: 4, expected: 3 }),
            (vec![begun(), next(1, 3, 7, 496)], P::Sequence { found: 7, expected: 0 }),
            (vec![begun(), vec![]], P::Length { found_bytes: 0, expected_bytes: 512 }),
        ];
        let (ours, peers) = ends(&SMALL);
        let mut receiver = Receiver::new(ours, 100_000);
        for (records, expected) in cases {
            for record in &records {
                assert!(mq_send(&peers, record, Wait::Never).expect("a queue"));
            }
            match receiver.receive() {
                Err(QueueError::Protocol(found)) => assert_eq!(found, expected),
                other => panic!("{other:?} instead of {expected:?}"),
            }
            assert!(matches!(receiver.receive(), Err(QueueError::Protocol(P::Poisoned))));
            receiver.reset().expect("a queue");
            assert!(receiver.receive().expect("in step again").is_none());
        }
    }

    /// M5: somebody else with the descriptor takes a message: the next one shows it.
    #[test]
    fn m5_a_stolen_message_is_noticed() {
        let (ours, peers) = ends(&SMALL);
        let mut sender = Sender::new(ours);
        for mark in 0..3 {
            sender.queue(message(mark, &[mark])).expect("room");
        }
        assert_eq!(sender.flush().expect("a queue"), Flush::Done);
        let mut receiver = Receiver::new(peers, 100);
        assert_eq!(receiver.receive().expect("a queue").expect("a message").head[0], 0);
        let mut room = [0; 512];
        assert!(mq_receive(&receiver.queue, &mut room, Wait::Never).expect("a queue").is_some());
        let error = receiver.receive().expect_err("one is missing");
        assert!(matches!(error, QueueError::Protocol(ProtocolError::Sequence { found: 2, expected: 1 })), "{error}");
    }

    #[test]
    fn an_empty_default_buffer_can_be_sent() {
        let (ours, peers) = ends(&SMALL);
        let (mut sender, mut receiver) = (Sender::new(ours), Receiver::new(peers, 0));
        sender.queue(Message { head: [7; 64], body: Buffer::default() }).expect("room");
        assert_eq!(sender.flush().expect("a queue"), Flush::Done);
        let received = receiver.receive().expect("a queue").expect("a message");
        assert_eq!((received.head, received.body.len()), ([7; 64], 0));
    }

    #[test]
    fn a_descriptor_that_was_passed_as_a_number_works() {
        let (ours, peers) = made(|| create(&SMALL));
        let number = peers.into_raw_fd();
        // SAFETY: in bounds: no memory is touched. Unshared and unique: the number was given up one line above.
        let peers = Queue::from_fd(unsafe { OwnedFd::from_raw_fd(number) }).expect("a queue");
        assert!(mq_send(&ours, b"x", Wait::Never).expect("room"));
        assert_eq!(peers.queued().expect("a queue"), 1);
    }
}
