//! Payloads in the controller's hands: where the bytes lie, and to whom they go back. Nobody here looks into them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use praas_shm::{Arena, Block, BlockView, Inline};
use praas_transport::Bodies;
use praas_transport::queue::Buffer;
use praas_transport::reactor::Owned;

use crate::controller::{Keep, WorkerId};

/// A payload on its way through the controller.
#[derive(Debug)]
pub(crate) struct Payload {
    pub(crate) bytes: Bytes,
    /// Several arguments in one payload.
    pub(crate) is_args: bool,
    /// An output, or an error's text, whose function still reads its input: the caller's block stays lent.
    pub(crate) keeps: bool,
}

#[derive(Debug)]
pub(crate) enum Bytes {
    /// Up to 40 bytes, carried along.
    Inline(Inline),
    /// A block of the controller's arena: came from TCP, or came back from a worker that echoed it.
    Own(Block),
    /// A block in a worker's segment, lent to us.
    Foreign(Foreign),
    /// Queue channel: on the heap.
    Heap(Heap),
    /// An error's text, on its way to a client.
    Text(String),
    /// A result that is kept for a client that may ask again, or a message whose memory went with its owner.
    Kept(Arc<[u8]>),
    /// Of a parcel, which is kept until its verdict comes, on its way to another process.
    Shared(Arc<Bytes>),
}

impl Keep for Payload {
    fn len_bytes(&self) -> usize {
        self.bytes.as_ref().len()
    }

    /// One copy onto the heap, so that what is kept holds no worker's memory; of such a copy, a reference.
    fn copy(&self) -> Payload {
        let kept = match &self.bytes {
            Bytes::Kept(kept) => Arc::clone(kept),
            bytes => Arc::from(bytes.as_ref()),
        };
        Payload { bytes: Bytes::Kept(kept), is_args: self.is_args, keeps: false }
    }
}

/// A block lent to us by a worker. It is owed a `RELEASE` unless an answer to that worker says as much.
#[derive(Debug)]
pub(crate) struct Foreign {
    pub(crate) giver: WorkerId,
    pub(crate) incarnation: u64,
    pub(crate) view: BlockView,
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Bytes::Inline(inline) => inline.as_slice(),
            Bytes::Own(block) => block,
            Bytes::Foreign(foreign) => &foreign.view,
            Bytes::Heap(heap) => heap.as_ref(),
            Bytes::Text(text) => text.as_bytes(),
            Bytes::Kept(kept) => kept,
            Bytes::Shared(shared) => (**shared).as_ref(),
        }
    }
}

/// A payload on the heap (queue channel), counted for as long as it is here.
#[derive(Debug)]
pub(crate) struct Heap {
    buffer: Buffer,
    counted_bytes: u64,
    quota: Quota,
}

impl Heap {
    /// For a worker, or to be used again: not counted any more.
    pub(crate) fn into_buffer(mut self) -> Buffer {
        std::mem::take(&mut self.buffer)
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        self.quota.taken_bytes.fetch_sub(self.counted_bytes, Ordering::Relaxed);
    }
}

impl AsRef<[u8]> for Heap {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_ref()
    }
}

/// What payloads take of the controller's heap (queue channel), and the most they may: the arena's counterpart.
#[derive(Debug, Clone)]
pub(crate) struct Quota {
    /// Atomic only so that a process may be made on one thread and run on another.
    taken_bytes: Arc<AtomicU64>,
    bytes_max: u64,
}

impl Quota {
    pub(crate) fn new(bytes_max: u64) -> Quota {
        Quota { taken_bytes: Arc::default(), bytes_max }
    }

    /// Memory for a payload to come, if there is room for it.
    fn loan(&self, bytes: usize) -> Option<Heap> {
        let taken_bytes = self.taken_bytes.load(Ordering::Relaxed).checked_add(bytes as u64)?;
        (taken_bytes <= self.bytes_max).then(|| self.count(Buffer::with_len(bytes)))
    }

    /// Counts what is here already, which may be too much: then [`Quota::is_over`].
    pub(crate) fn count(&self, mut buffer: Buffer) -> Heap {
        let taken_bytes = self.taken_bytes.load(Ordering::Relaxed);
        if taken_bytes.saturating_add(buffer.capacity() as u64) > self.bytes_max {
            // Buffers are used again, so that a short payload may lie in a long one: then it is worth a copy.
            buffer = Buffer::from(buffer.as_ref());
        }
        let counted_bytes = buffer.capacity() as u64;
        self.taken_bytes.fetch_add(counted_bytes, Ordering::Relaxed);
        Heap { buffer, counted_bytes, quota: self.clone() }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.taken_bytes.load(Ordering::Relaxed) > self.bytes_max
    }

    pub(crate) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }
}

/// Where a connection receives into: the record itself up to 40 bytes, else the arena (ring) or the heap (queue).
#[derive(Debug)]
pub(crate) enum Landing {
    Small { bytes: [u8; praas_shm::INLINE_BYTES_MAX], len: usize },
    Block(Block),
    Heap(Heap),
}

impl AsRef<[u8]> for Landing {
    fn as_ref(&self) -> &[u8] {
        match self {
            Landing::Small { bytes, len } => &bytes[..*len],
            Landing::Block(block) => block,
            Landing::Heap(heap) => heap.as_ref(),
        }
    }
}

impl AsMut<[u8]> for Landing {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Landing::Small { bytes, len } => &mut bytes[..*len],
            Landing::Block(block) => block,
            Landing::Heap(heap) => heap.buffer.as_mut(),
        }
    }
}

impl From<Landing> for Bytes {
    fn from(landing: Landing) -> Bytes {
        match landing {
            Landing::Small { bytes, len } => {
                Bytes::Inline(Inline::new(&bytes[..len]).expect("a small landing fits a record"))
            }
            Landing::Block(block) => Bytes::Own(block),
            Landing::Heap(heap) => Bytes::Heap(heap),
        }
    }
}

// SAFETY: an inline landing is part of the value; a block is the arena's, which nobody maps elsewhere or frees while the block is
// out; a buffer is the value's own heap. None of them moves while the value does not.
unsafe impl Owned for Landing {}

// SAFETY: inline bytes and texts are the value's own, and what is kept or shared it holds a count of, on the heap; a block is the arena's, a foreign one in a mapping that its view keeps; nobody
// frees one of them before the value goes; only inline bytes move with it, and they are at most 40. What a worker writes meanwhile in memory that it lent is read by the kernel alone.
unsafe impl Owned for Bytes {}

/// The controller's payload memory.
#[derive(Debug)]
pub(crate) struct Store {
    /// Ring channel; without it payloads live on the heap.
    pub(crate) arena: Option<Arena>,
    pub(crate) heap: Quota,
    /// A payload from a client found no room, since somebody last asked.
    pub(crate) was_short: bool,
}

impl Bodies for Store {
    type Body = Landing;

    fn loan(&mut self, bytes: usize) -> Option<Landing> {
        if bytes <= praas_shm::INLINE_BYTES_MAX {
            return Some(Landing::Small { bytes: [0; praas_shm::INLINE_BYTES_MAX], len: bytes });
        }
        match &mut self.arena {
            Some(arena) => arena.loan(bytes).ok().map(Landing::Block),
            None => self.heap.loan(bytes).map(Landing::Heap),
        }
    }

    fn give_back(&mut self, body: Landing) {
        if let (Landing::Block(block), Some(arena)) = (body, &mut self.arena) {
            arena.free(block);
        }
    }

    fn truncate(&mut self, mut body: Landing, bytes: usize) -> Landing {
        if bytes <= praas_shm::INLINE_BYTES_MAX {
            let mut small = [0; praas_shm::INLINE_BYTES_MAX];
            small[..bytes].copy_from_slice(&body.as_ref()[..bytes]);
            self.give_back(body);
            return Landing::Small { bytes: small, len: bytes };
        }
        match &mut body {
            Landing::Small { len, .. } => *len = bytes,
            Landing::Block(block) => block.set_len(bytes),
            Landing::Heap(heap) => heap.buffer.set_len(bytes),
        }
        body
    }
}
