//! The state of the process: which object is current under each key, who owns its bytes, and when they may go. Decides; has no clock and
//! no socket, and touches no byte of a value but to copy it where that is asked for.
//!
//! Objects are immutable. Each has a version that no other object of this process ever had, so that `put_if` cannot be fooled
//! by one that was deleted and written anew. A worker writes an object into a block of its own arena and lends it to us; it stays
//! there, read in place by everybody, until another takes its place and nobody has it pinned. Then it goes back to its owner.
//!
//! | an object's bytes lie | life | freed by |
//! |---|---|---|
//! | in a worker's arena | the worker's | a release to that worker |
//! | in our arena: copied (`--isolate`, queues), or adopted | 0 | us |
//! | in the segment of a worker that died | that worker's, an *orphan* | nobody: the segment goes when its last orphan does |
//!
//! Orphans are copied into our arena one after the other ([`State::next_orphan`]), while everybody reads on.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use praas_shm::{Arena, Block, BlockRef, Current, IndexWriter, KEY_BYTES_MAX, ParticipantId, Place};

use crate::object::HEADER_BYTES;
use crate::wire::state::WHATEVER;

#[cfg(test)]
mod tests;

/// Entries looked at for an orphan before somebody else has a turn.
const LOOKS_PER_TURN: u32 = 4096;
/// Lives that may leave orphans behind at once: each keeps a whole segment from going.
const ESTATES_MAX: usize = 64;
/// The same, while there is no room to move the orphans to, so that they will stay.
const STUCK_ESTATES_MAX: usize = 8;

/// Bounds of the state, bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) bytes_max: u64,
    pub(crate) object_bytes_max: u64,
    /// Of our arena, for objects and keys: what is over is left for payloads, so that a full state stops no call.
    pub(crate) own_bytes_max: u64,
}

/// Where the bytes of a new object are.
pub(crate) enum Source<'a> {
    /// In a block that its owner lends us for good.
    Lent { life: u32, block: BlockRef },
    /// To be copied into our arena.
    Copied(&'a [u8]),
}

/// An object to be written.
pub(crate) struct Put<'a> {
    pub(crate) key: &'a [u8],
    /// Version that must be current: 0, that there must be none; or [`WHATEVER`].
    pub(crate) expected: u64,
    pub(crate) value_bytes: u64,
    /// us since 1970.
    pub(crate) now_us: u64,
    pub(crate) source: Source<'a>,
}

/// Why nothing was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Another version is current; 0: there is none.
    Conflict {
        current: u64,
    },
    TooLarge(String),
    NoSpace(String),
    /// It is not what our library would ask for.
    Malformed(&'static str),
}

/// A block in somebody's hands.
#[derive(Debug, Clone, Copy)]
struct Held {
    life: u32,
    block: BlockRef,
}

/// Bytes that were current, and may still be read.
#[derive(Debug, Clone, Copy)]
struct Retired {
    entry: u32,
    version: u64,
    object: Held,
    /// In our arena.
    key: Option<BlockRef>,
}

/// An object of a worker that died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Orphan {
    entry: u32,
    version: u64,
    pub(crate) life: u32,
    pub(crate) block: BlockRef,
}

/// What is read from the index for who cannot read it.
#[derive(Debug)]
pub(crate) struct Looked<'a> {
    pub(crate) version: u64,
    pub(crate) written_us: u64,
    /// The whole object: header, value, key.
    pub(crate) bytes: &'a [u8],
}

#[derive(Debug)]
pub(crate) struct State {
    index: IndexWriter,
    bounds: Bounds,
    /// By entry: index and generation of the object's block in its owner's ledger.
    ledgers: Vec<(u32, u32)>,
    versions: u64,
    used_bytes: u64,
    /// What objects and keys take of our arena, current or not.
    own_bytes: u64,
    written_us: u64,
    retired: VecDeque<Retired>,
    /// Current objects of each life but our own.
    objects: BTreeMap<u32, u64>,
    /// Lives that are over and have objects, and where to look for the next of them.
    estates: Vec<u32>,
    /// The last orphan that was found could not be moved.
    is_stuck: bool,
    cursor: u32,
}

impl State {
    pub(crate) fn new(index: IndexWriter, bounds: Bounds) -> State {
        State {
            index,
            bounds,
            ledgers: Vec::new(),
            versions: 0,
            used_bytes: 0,
            own_bytes: 0,
            written_us: 0,
            retired: VecDeque::new(),
            objects: BTreeMap::new(),
            estates: Vec::new(),
            is_stuck: false,
            cursor: 0,
        }
    }

    /// Writes an object, and says which version it is. `arena` is ours.
    pub(crate) fn put(&mut self, put: &Put<'_>, arena: &mut Arena) -> Result<u64, Refused> {
        if !(1..=KEY_BYTES_MAX).contains(&put.key.len()) {
            return Err(Refused::Malformed("a key of no length that a key may have"));
        }
        if put.value_bytes > self.bounds.object_bytes_max {
            let text = format!("{} bytes, an object may have {}", put.value_bytes, self.bounds.object_bytes_max);
            return Err(Refused::TooLarge(text));
        }
        let bytes = HEADER_BYTES as u64 + put.value_bytes + put.key.len() as u64;
        let entry = self.index.find(put.key, arena);
        let current = entry.and_then(|entry| self.index.current(entry));
        let version = current.map_or(0, |current| current.version);
        if put.expected != WHATEVER && put.expected != version {
            return Err(Refused::Conflict { current: version });
        }
        let replaced_bytes = current.map_or(0, |current| object_bytes(&current));
        let used_bytes = self.used_bytes - replaced_bytes + bytes;
        if used_bytes > self.bounds.bytes_max {
            let free = self.bounds.bytes_max.saturating_sub(self.used_bytes);
            let max = self.bounds.bytes_max;
            let text = format!(
                "{bytes} bytes more, and {free} of the {max} that all state may take are free; delete some, or see --state-bytes-max"
            );
            return Err(Refused::NoSpace(text));
        }
        let key_block = match entry {
            Some(_) => None,
            None => {
                self.index.reserve().map_err(|full| Refused::NoSpace(full.to_string()))?;
                // What is longer than an entry holds.
                let long = put.key.len() > 24;
                long.then(|| self.keep(put.key, arena)).transpose()?
            }
        };
        let estates_max = if self.is_stuck { STUCK_ESTATES_MAX } else { ESTATES_MAX };
        let held = match put.source {
            Source::Lent { life, block } if self.estates.len() < estates_max => Ok(Held { life, block }),
            Source::Lent { .. } => Err(Refused::NoSpace(format!(
                "objects of {estates_max} workers that died are still to be moved, and there is no memory to move them to"
            ))),
            Source::Copied(bytes) => self.keep(bytes, arena).map(|block| Held { life: 0, block }),
        };
        let placed = held.and_then(|held| {
            let place = Place::new(held.block.owner, held.life.into(), held.block.offset);
            place
                .map(|place| (held, place))
                .ok_or_else(|| Refused::NoSpace("more lives than an entry can tell apart".into()))
        });
        let (held, place) = match placed {
            Ok(placed) => placed,
            Err(refused) => {
                if let Some(block) = key_block {
                    self.free(block, arena);
                }
                return Err(refused);
            }
        };
        self.versions += 1;
        // By the calendar, which may be set back: then it stands still.
        self.written_us = self.written_us.max(put.now_us);
        let entry = match (entry, current) {
            (Some(entry), Some(current)) => {
                self.retire(entry, &current, None);
                self.index.replace(entry, self.versions, place, put.value_bytes, self.written_us);
                entry
            }
            _ => self.index.insert(put.key, key_block.as_ref(), self.versions, place, put.value_bytes, self.written_us),
        };
        let at = entry as usize;
        if self.ledgers.len() <= at {
            self.ledgers.resize(at + 1, (0, 0));
        }
        self.ledgers[at] = (held.block.index, held.block.generation);
        if held.life != 0 {
            *self.objects.entry(held.life).or_default() += 1;
        }
        self.use_bytes(used_bytes);
        Ok(self.versions)
    }

    /// Deletes an object; whether there was one.
    pub(crate) fn delete(&mut self, key: &[u8], expected: u64, arena: &mut Arena) -> Result<bool, Refused> {
        let entry = self.index.find(key, arena);
        let Some((entry, current)) = entry.and_then(|entry| Some((entry, self.index.current(entry)?))) else {
            return if matches!(expected, WHATEVER | 0) { Ok(false) } else { Err(Refused::Conflict { current: 0 }) };
        };
        if expected != WHATEVER && expected != current.version {
            return Err(Refused::Conflict { current: current.version });
        }
        self.versions += 1;
        self.index.remove(entry, self.versions, arena);
        self.retire(entry, &current, current.key_block);
        self.use_bytes(self.used_bytes - object_bytes(&current));
        Ok(true)
    }

    /// An object that lies in our arena, for a worker that cannot read it there.
    pub(crate) fn look<'a>(&self, key: &[u8], arena: &'a Arena) -> Option<Looked<'a>> {
        let entry = self.index.find(key, arena)?;
        let current = self.index.current(entry)?;
        let bytes = arena.lent_view(&self.held(entry, &current).block).ok()?;
        Some(Looked { version: current.version, written_us: current.written_us, bytes })
    }

    /// All keys with what is known of their objects, in the order in which they were first written.
    pub(crate) fn keys(&self, arena: &Arena) -> Vec<praas_shm::Listed> {
        let mut listed: Vec<_> = (0..self.index.extent())
            .filter_map(|entry| {
                let Current { version, value_bytes, written_us, first, .. } = self.index.current(entry)?;
                Some(praas_shm::Listed { key: self.index.key(entry, arena), version, value_bytes, written_us, first })
            })
            .collect();
        listed.sort_unstable_by_key(|listed| listed.first);
        listed
    }

    /// Whether something waits for its readers.
    pub(crate) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Lets go of what nobody reads: `is_read` is asked for a version, after a fence. A long key stays as long as any version of its
    /// entry that was current before is read. Blocks of workers go to `release`, with the life they
    /// belong to; ours are freed.
    pub(crate) fn sweep(
        &mut self,
        arena: &mut Arena,
        is_read: impl Fn(u64) -> bool,
        mut release: impl FnMut(u32, BlockRef),
    ) {
        // Entries of which something older is read: whoever has that pinned may be comparing the key.
        let mut held = BTreeSet::new();
        for _ in 0..self.retired.len() {
            let Some(retired) = self.retired.pop_front() else { return };
            if is_read(retired.version) || retired.key.is_some() && held.contains(&retired.entry) {
                held.insert(retired.entry);
                self.retired.push_back(retired);
                continue;
            }
            if let Some(block) = retired.key {
                self.free(block, arena);
            }
            match retired.object {
                Held { life: 0, block } => self.free(block, arena),
                Held { life, block } => release(life, block),
            }
        }
    }

    /// A life of a worker is over. Whether it leaves objects behind: then its segment is to be kept until [`State::is_settled`].
    pub(crate) fn ended(&mut self, life: u32) -> bool {
        let orphans = self.objects.contains_key(&life);
        if orphans {
            self.estates.push(life);
            self.cursor = 0;
        }
        orphans
    }

    /// Whether nothing of an ended life is current any more.
    pub(crate) fn is_settled(&self, life: u32) -> bool {
        !self.estates.contains(&life)
    }

    /// Whether there are orphans, found or not.
    pub(crate) fn has_orphans(&self) -> bool {
        !self.estates.is_empty()
    }

    /// The next orphan, to be copied and then given to [`State::adopt`]. `None`: none was found within a turn's looks.
    pub(crate) fn next_orphan(&mut self) -> Option<Orphan> {
        for _ in 0..LOOKS_PER_TURN.min(self.index.extent()) {
            if self.cursor >= self.index.extent() {
                self.cursor = 0;
            }
            let entry = self.cursor;
            self.cursor += 1;
            let Some(current) = self.index.current(entry) else { continue };
            if self.estates.contains(&current.place.life) {
                let held = self.held(entry, &current);
                return Some(Orphan { entry, version: current.version, life: held.life, block: held.block });
            }
        }
        None
    }

    /// Whether an orphan still is what is current.
    pub(crate) fn is_current(&self, orphan: &Orphan) -> bool {
        self.index.current(orphan.entry).is_some_and(|current| current.version == orphan.version)
    }

    /// An orphan has been copied into this block, which [`State::loan_for`] gave, and from here on lies there. If it is not current any more, the
    /// block is free again.
    pub(crate) fn adopt(&mut self, orphan: &Orphan, copy: Block, arena: &mut Arena) {
        let bytes = copy.len();
        let block = arena.lend(copy, bytes, ParticipantId::CONTROLLER);
        let place = Place::new(block.owner, 0, block.offset);
        let (true, Some(place)) = (self.is_current(orphan), place) else { return self.free(block, arena) };
        self.index.relocate(orphan.entry, place);
        self.ledgers[orphan.entry as usize] = (block.index, block.generation);
        self.count_out(orphan.life);
    }

    /// Memory of ours for an object or a key, within what state may take of it.
    fn loan(&mut self, bytes: usize, arena: &mut Arena) -> Result<Block, Refused> {
        let (before, max) = (arena.stats().used_bytes, self.bounds.own_bytes_max);
        if self.own_bytes.saturating_add(bytes as u64) > max {
            let free = max.saturating_sub(self.own_bytes);
            let text = format!(
                "{bytes} bytes, and {free} of the {max} that state may take of the controller's arena are free; see --arena-bytes"
            );
            return Err(Refused::NoSpace(text));
        }
        let block = arena.loan(bytes).map_err(|full| Refused::NoSpace(full.to_string()))?;
        self.own_bytes += arena.stats().used_bytes - before;
        Ok(block)
    }

    /// Memory for the copy of an orphan; remembers whether there was some.
    pub(crate) fn loan_for(&mut self, orphan: &Orphan, arena: &mut Arena) -> Option<Block> {
        let bytes = usize::try_from(orphan.block.len).ok()?;
        let copy = self.loan(bytes, arena).ok();
        self.is_stuck = copy.is_none();
        copy
    }

    /// Gives back what [`State::loan_for`] gave.
    pub(crate) fn give_up(&mut self, block: Block, arena: &mut Arena) {
        let before = arena.stats().used_bytes;
        arena.free(block);
        self.own_bytes -= before - arena.stats().used_bytes;
    }

    /// What is current under a key: its version, the life that its bytes belong to, and where they lie.
    #[cfg(test)]
    pub(crate) fn current(&self, key: &[u8], arena: &Arena) -> Option<(u64, u32, BlockRef)> {
        let entry = self.index.find(key, arena)?;
        let current = self.index.current(entry)?;
        let Held { life, block } = self.held(entry, &current);
        Some((current.version, life, block))
    }

    /// Bytes of all current objects.
    #[cfg(test)]
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Copies bytes into a block of ours that we lend ourselves.
    fn keep(&mut self, bytes: &[u8], arena: &mut Arena) -> Result<BlockRef, Refused> {
        let mut block = self.loan(bytes.len(), arena)?;
        block.copy_from_slice(bytes);
        Ok(arena.lend(block, bytes.len(), ParticipantId::CONTROLLER))
    }

    fn free(&mut self, block: BlockRef, arena: &mut Arena) {
        let before = arena.stats().used_bytes;
        arena
            .release(ParticipantId::CONTROLLER, block.index, block.generation)
            .expect("lent to ourselves, and released once");
        self.own_bytes -= before - arena.stats().used_bytes;
    }

    fn use_bytes(&mut self, bytes: u64) {
        self.used_bytes = bytes;
        self.index.say_used(bytes);
    }

    fn held(&self, entry: u32, current: &Current) -> Held {
        let (index, generation) = self.ledgers[entry as usize];
        let Place { participant: owner, life, offset } = current.place;
        Held { life, block: BlockRef { owner, index, generation, offset, len: object_bytes(current) } }
    }

    fn retire(&mut self, entry: u32, current: &Current, key: Option<BlockRef>) {
        let object = self.held(entry, current);
        self.retired.push_back(Retired { entry, version: current.version, object, key });
        if object.life != 0 {
            self.count_out(object.life);
        }
    }

    fn count_out(&mut self, life: u32) {
        let Some(count) = self.objects.get_mut(&life) else { return };
        *count -= 1;
        if *count == 0 {
            self.objects.remove(&life);
            self.is_stuck &= !self.estates.contains(&life);
            self.estates.retain(|estate| *estate != life);
        }
    }
}

fn object_bytes(current: &Current) -> u64 {
    HEADER_BYTES as u64 + current.value_bytes + current.key_bytes
}
