//! The arena: blocks for payloads, in a segment only its owner writes.
//!
//! Nothing here is lock-free, because nothing is shared: the ledger of who holds what is in the owner's heap, where no
//! peer can reach it. What peers say about blocks arrives as messages and is checked against it.
//!
//! A block is *loaned* (ours to write), then *lent* (one borrower's to read, nobody's to write), then free again by
//! `release`, `take_back` or `reclaim`. Each end of a lending makes a new generation, so a late or repeated release of an
//! earlier lending is refused.
//!
//! Memory grows to the right by `fallocate`, before first touch: a full machine is then a [`NoSpace`], never a SIGBUS (X1).

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::descriptor::BlockRef;
use crate::ledger::{Ledger, State};
use crate::mapping::Mapping;
use crate::participant::ParticipantId;
use crate::segment::allocate;
use crate::size_class::{self, UNIT_BYTES};
use crate::width::host;

/// Growth step, bytes: a `fallocate` and its page faults are paid once for so many.
const GROWTH_BYTES: u64 = 2 << 20;

/// The arena cannot hold this block now: its quota is used up, too cut up, or the machine is out of memory.
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[error("no space for {needed_bytes} bytes: {free_bytes} of {quota_bytes} are free")]
pub struct NoSpace {
    /// What was asked for, bytes.
    pub needed_bytes: u64,
    /// What is not in use, bytes; it may lie in pieces, or not be backed by memory.
    pub free_bytes: u64,
    /// The quota, bytes.
    pub quota_bytes: u64,
}

/// What a peer says about a block is not so. Nothing has changed.
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadRelease {
    /// The ledger has no such index.
    #[error("there is no block {index}")]
    NoSuchBlock {
        /// What was claimed.
        index: u32,
    },
    /// Nobody borrows it.
    #[error("block {index} is lent to nobody")]
    NotLent {
        /// What was claimed.
        index: u32,
    },
    /// It was lent, but that lending has ended.
    #[error("block {index}: generation {claimed} is over, {current} is current")]
    Stale {
        /// The block.
        index: u32,
        /// The lending that was meant.
        claimed: u32,
        /// The lending there is.
        current: u32,
    },
    /// Somebody else borrows it.
    #[error("block {index} is held by {holder}, not by {claimed}")]
    OtherHolder {
        /// The block.
        index: u32,
        /// Who speaks.
        claimed: ParticipantId,
        /// Who holds it.
        holder: ParticipantId,
    },
    /// The block lies elsewhere, or is another participant's.
    #[error("block {index} does not lie at offset {offset} of {owner}'s arena")]
    Place {
        /// The block.
        index: u32,
        /// Whose arena was claimed.
        owner: ParticipantId,
        /// Where it was claimed to be.
        offset: u64,
    },
    /// More bytes than were lent.
    #[error("block {index}: {claimed} bytes claimed, {lent} were lent")]
    Length {
        /// The block.
        index: u32,
        /// What was claimed.
        claimed: u64,
        /// What was lent.
        lent: u64,
    },
}

/// How an arena stands.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct ArenaStats {
    /// The most that may be in use, bytes.
    pub quota_bytes: u64,
    /// In use, loaned or lent, rounded up to blocks, bytes.
    pub used_bytes: u64,
    /// Of these, in borrowers' hands, bytes.
    pub lent_bytes: u64,
    /// The most that was ever in use, bytes.
    pub high_water_bytes: u64,
    /// Backed by memory, in use or not, bytes.
    pub committed_bytes: u64,
    /// Blocks in use.
    pub blocks: u64,
}

/// The owner's end of an arena. Ordinary single-threaded code; `Send`.
pub struct Arena {
    ledger: Ledger,
    owner: ParticipantId,
    /// Where the arena begins in the segment, bytes.
    segment_offset: u64,
    /// How much of it is backed by memory, bytes.
    committed_bytes: u64,
    base: NonNull<u8>,
    segment: OwnedFd,
    mapping: Arc<Mapping>,
}

// SAFETY: `base` points into `mapping`, which belongs to no thread; `&mut Arena` is the only way to hand out blocks.
unsafe impl Send for Arena {}
// SAFETY: `&Arena` reads the ledger and lent blocks, which nobody writes.
unsafe impl Sync for Arena {}

impl Arena {
    pub(crate) fn new(
        mapping: Arc<Mapping>,
        segment: OwnedFd,
        segment_offset: u64,
        bytes: u64,
        owner: ParticipantId,
    ) -> Self {
        let end = segment_offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= mapping.bytes()), "the arena leaves its segment");
        let units = u32::try_from(bytes / UNIT_BYTES).expect("64 GiB are 2^30 units");
        // SAFETY: in bounds: `segment_offset + bytes <= mapping.bytes()`, asserted above.
        let base = unsafe { mapping.base().add(host(segment_offset)) };
        Self { ledger: Ledger::new(units), owner, segment_offset, committed_bytes: 0, base, segment, mapping }
    }

    /// A block of at least `len` bytes, ours to write; what is in it is left over from its last use.
    ///
    /// A recycled block costs a pop: no system call, no heap. A first use may allocate pages.
    ///
    /// # Errors
    /// [`NoSpace`]. Blocks that others hold may come back: ask again after the next releases.
    #[inline]
    pub fn loan(&mut self, len: usize) -> Result<Block, NoSpace> {
        let Some(units) = size_class::units_for(len) else {
            return Err(self.no_space(len));
        };
        let index = match self.ledger.recycle(size_class::at_least(units)) {
            Some(index) => index,
            None => self.find(units).ok_or_else(|| self.no_space(len))?,
        };
        Ok(self.block(index, len))
    }

    /// Gives a loaned block back.
    ///
    /// # Panics
    /// If the block is another arena's.
    #[inline]
    pub fn free(&mut self, block: Block) {
        self.assert_ours(&block);
        self.ledger.free_loaned(block.index);
    }

    /// Hands the first `len` bytes to a borrower. From here on nobody writes them, we neither.
    ///
    /// # Panics
    /// If `len` is over the block's length, or the block is another arena's.
    #[inline]
    pub fn lend(&mut self, block: Block, len: usize, to: ParticipantId) -> BlockRef {
        self.assert_ours(&block);
        assert!(len <= block.len, "{len} bytes of a block of {}", block.len);
        let entry = self.ledger.lend(block.index, len as u64, to);
        BlockRef {
            owner: self.owner,
            index: block.index,
            generation: entry.generation,
            offset: entry.offset(),
            len: len as u64,
        }
    }

    /// Where the bytes of a loaned block lie, for somebody who reads them before we free it or write it again. It cannot give this back: it was
    /// not lent.
    ///
    /// # Panics
    /// If the block is another arena's.
    #[must_use]
    pub fn place_of(&self, block: &Block) -> BlockRef {
        self.assert_ours(block);
        let entry = self.ledger.entry(block.index).expect("asserted to be ours");
        BlockRef {
            owner: self.owner,
            index: block.index,
            generation: entry.generation,
            offset: entry.offset(),
            len: block.len as u64,
        }
    }

    /// A borrower is done with a block: it is free.
    ///
    /// # Errors
    /// [`BadRelease`] if `from` does not hold it.
    #[inline]
    pub fn release(&mut self, from: ParticipantId, index: u32, generation: u32) -> Result<(), BadRelease> {
        self.ledger.check_lent(from, index, generation)?;
        self.ledger.free_lent(index);
        Ok(())
    }

    /// A borrower hands a block back with its content (an echo): ours to write again, `block.len` bytes long.
    ///
    /// # Errors
    /// [`BadRelease`] if `from` does not hold it, or claims another place or more bytes than were lent.
    #[inline]
    pub fn take_back(&mut self, from: ParticipantId, block: &BlockRef) -> Result<Block, BadRelease> {
        self.check(from, block)?;
        self.ledger.take_back(block.index);
        Ok(self.block(block.index, host(block.len)))
    }

    /// A borrower passed a block on: from now on `to` holds it.
    ///
    /// # Errors
    /// [`BadRelease`] if `from` does not hold it.
    pub fn relend(
        &mut self,
        from: ParticipantId,
        to: ParticipantId,
        index: u32,
        generation: u32,
    ) -> Result<(), BadRelease> {
        self.ledger.check_lent(from, index, generation)?;
        self.ledger.relend(index, to);
        Ok(())
    }

    /// The bytes of a block that we have lent, whoever holds it.
    ///
    /// # Errors
    /// [`BadRelease`] if there is no such lending.
    pub fn lent_view(&self, block: &BlockRef) -> Result<&[u8], BadRelease> {
        let holder = match self.ledger.entry(block.index).map(|entry| entry.state) {
            Some(State::Lent { holder, .. }) => holder,
            Some(_) => return Err(BadRelease::NotLent { index: block.index }),
            None => return Err(BadRelease::NoSuchBlock { index: block.index }),
        };
        self.check(holder, block)?;
        // SAFETY: in bounds: `check` found `block.offset` to be the entry's, which lies in the arena.
        let start = unsafe { self.base.add(host(block.offset)) };
        // SAFETY:
        // - in bounds: `block.len` is no more than was lent, which is no more than the entry's units.
        // - unshared:  the block is lent: read by its borrower, written by nobody.
        // - unique:    not needed. Ending the lending takes `&mut self`, which this borrow excludes.
        Ok(unsafe { std::slice::from_raw_parts(start.as_ptr(), host(block.len)) })
    }

    /// Whether `holder` holds this block, and it is no longer than was lent.
    #[must_use]
    pub fn is_lent(&self, holder: ParticipantId, block: &BlockRef) -> bool {
        self.check(holder, block).is_ok()
    }

    /// Frees all that a dead borrower held, and says how many bytes that is.
    pub fn reclaim(&mut self, dead: ParticipantId) -> usize {
        host(self.ledger.reclaim(dead))
    }

    /// Makes the first `bytes` of the arena real and present now, so that later loans do not pay for it.
    ///
    /// # Errors
    /// [`NoSpace`] if the quota or the machine has not so much.
    pub fn prepare(&mut self, bytes: u64) -> Result<(), NoSpace> {
        let needed = u32::try_from(bytes.div_ceil(UNIT_BYTES)).ok();
        match needed {
            Some(units) if units <= self.ledger.capacity_units() && self.commit(units) => Ok(()),
            _ => Err(self.no_space(host(bytes))),
        }
    }

    /// How the arena stands.
    pub fn stats(&self) -> ArenaStats {
        ArenaStats {
            quota_bytes: self.quota_bytes(),
            used_bytes: self.ledger.used_bytes(),
            lent_bytes: self.ledger.lent_bytes(),
            high_water_bytes: self.ledger.high_water_bytes(),
            committed_bytes: self.committed_bytes,
            blocks: self.ledger.blocks(),
        }
    }

    fn quota_bytes(&self) -> u64 {
        u64::from(self.ledger.capacity_units()) * UNIT_BYTES
    }

    /// Memory for a block that no free list has at hand.
    #[cold]
    fn find(&mut self, units: u32) -> Option<u32> {
        let rounded = size_class::size(size_class::at_least(units));
        self.extend(rounded)
            .or_else(|| self.ledger.split(rounded))
            .or_else(|| self.ledger.split(units))
            .or_else(|| self.extend(units))
            .or_else(|| {
                if !self.ledger.merge() {
                    return None;
                }
                self.extend(rounded)
                    .or_else(|| self.ledger.split(rounded))
                    .or_else(|| self.ledger.split(units))
                    .or_else(|| self.extend(units))
            })
    }

    fn extend(&mut self, units: u32) -> Option<u32> {
        let end = self.ledger.frontier().checked_add(units)?;
        if end > self.ledger.capacity_units() || !self.commit(end) {
            return None;
        }
        self.ledger.extend(units)
    }

    /// Makes `[0, end_units)` real memory, in steps; exactly that much when a whole step is not to be had.
    fn commit(&mut self, end_units: u32) -> bool {
        let end = u64::from(end_units) * UNIT_BYTES;
        if end <= self.committed_bytes {
            return true;
        }
        let start = self.committed_bytes;
        for goal in [end.next_multiple_of(GROWTH_BYTES).min(self.quota_bytes()), end.next_multiple_of(4096)] {
            if allocate(&self.segment, self.segment_offset + start, goal - start).is_ok() {
                // One call instead of a fault for each page: 2 MiB ready in 0.71 ms instead of 0.76 (benches/arena.rs).
                self.mapping.populate(self.segment_offset + start, goal - start);
                self.committed_bytes = goal;
                return true;
            }
        }
        false
    }

    #[cold]
    fn no_space(&self, needed: usize) -> NoSpace {
        let quota_bytes = self.quota_bytes();
        NoSpace { needed_bytes: needed as u64, free_bytes: quota_bytes - self.ledger.used_bytes(), quota_bytes }
    }

    #[inline]
    fn check(&self, from: ParticipantId, block: &BlockRef) -> Result<(), BadRelease> {
        let lent = self.ledger.check_lent(from, block.index, block.generation)?;
        let offset = self.ledger.entry(block.index).map(crate::ledger::Entry::offset);
        if block.owner != self.owner || offset != Some(block.offset) {
            return Err(BadRelease::Place { index: block.index, owner: block.owner, offset: block.offset });
        }
        if block.len > lent {
            return Err(BadRelease::Length { index: block.index, claimed: block.len, lent });
        }
        Ok(())
    }

    #[inline]
    fn block(&self, index: u32, len: usize) -> Block {
        let entry = self.ledger.entry(index).expect("the ledger just gave this index");
        // SAFETY: in bounds: the ledger cuts `[0, capacity)`, which is the arena, and `base` is its start.
        let start = unsafe { self.base.add(host(entry.offset())) };
        Block { start, len, capacity: host(entry.bytes()), index }
    }

    #[inline]
    fn assert_ours(&self, block: &Block) {
        let entry = self.ledger.entry(block.index);
        let ours =
            entry.is_some_and(|entry| self.base.as_ptr().wrapping_add(host(entry.offset())) == block.start.as_ptr());
        assert!(ours, "block {} is another arena's", block.index);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // A `Block` carries no reference count, so that loans cost nothing per message: whoever still holds one keeps
        // the mapping for the rest of this OS process's life.
        if self.ledger.loaned_blocks() > 0 {
            std::mem::forget(Arc::clone(&self.mapping));
        }
    }
}

/// A loaned block: bytes of our own arena, ours alone to write until lent or freed.
///
/// Dropping it without [`Arena::free`] leaves it loaned.
pub struct Block {
    start: NonNull<u8>,
    len: usize,
    capacity: usize,
    index: u32,
}

// SAFETY: a block is the only handle to its bytes, in a mapping that outlives it (see `Drop for Arena`).
unsafe impl Send for Block {}
// SAFETY: `&Block` gives `&[u8]` only.
unsafe impl Sync for Block {}

impl Block {
    /// Bytes it could hold; [`Deref`] shows those that were asked for.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Shows `len` bytes from now on.
    ///
    /// # Panics
    /// If that is over [`Block::capacity`].
    #[inline]
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity, "{len} bytes in a block of {}", self.capacity);
        self.len = len;
    }
}

impl Deref for Block {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY:
        // - in bounds: `len <= capacity`, which is the ledger entry's extent within the arena.
        // - unshared:  a loaned block was announced to nobody, or taken back from its only borrower.
        // - unique:    the ledger gives out an index once; here by ownership of `self`, across processes because the
        //   segment is sealed and no other process maps it writable.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Block {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; and unique here by `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("index", &self.index)
            .field("len", &self.len)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("owner", &self.owner).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
