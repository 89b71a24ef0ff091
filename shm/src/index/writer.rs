//! The writer's end of the state index.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::SealFlags;

use super::entry::WORDS;
use super::table::*;
use crate::arena::Arena;
use crate::descriptor::BlockRef;
use crate::mapping::{Access, Mapping};
use crate::segment::{Identity, LAYOUT_VERSION, SegmentError, allocate, process_words, sealed_memfd};
use crate::sync::Ordering;
use crate::width::host;

/// Entries that are made real memory at once: 64 KiB.
const ENTRIES_STEP: u32 = 1024;

/// The current object of a key, as its entry has it.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Current {
    /// Which object it is: no two have the same version, whatever their key.
    pub version: u64,
    /// Where it lies.
    pub place: Place,
    /// Bytes of its value.
    pub value_bytes: u64,
    /// Bytes of its key.
    pub key_bytes: u64,
    /// When it was written, us since 1970.
    pub written_us: u64,
    /// Version of the first object that this key had.
    pub first: u64,
    /// The block of the writer's arena that holds the key, if it is a long one.
    pub key_block: Option<BlockRef>,
}

/// There is no room for one more key. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexFull {
    /// The index has its most.
    #[error("{objects_max} objects are the most this index holds")]
    Objects {
        /// As configured.
        objects_max: u32,
    },
    /// The machine has no memory for more entries or slots.
    #[error("no memory for {needed_bytes} bytes of the state index: {source}")]
    Memory {
        /// What was needed.
        needed_bytes: u64,
        /// What `fallocate` said.
        source: io::Error,
    },
}

/// The one who may write an index. Its own words are its authority: nobody else can write them.
pub struct IndexWriter {
    windows: Windows,
    config: IndexConfig,
    mapping: Arc<Mapping>,
    file: OwnedFd,
    seed: u64,
    /// Tables so far, and the logarithm of the slots of the current one.
    tables: u64,
    log2: u32,
    /// Real memory of each of the two tables, slots; and entries.
    table_slots: [u64; 2],
    entries_real: u32,
    /// Slots that are not empty.
    used_slots: u64,
    objects: u32,
    extent: u32,
    vacant: Vec<u32>,
}

impl IndexWriter {
    /// A new, empty index of the process and life of `identity`, and its file, sealed: nobody else can ever write it.
    ///
    /// # Errors
    /// [`SegmentError`]; on `NoSpace` nothing was touched.
    ///
    /// # Panics
    /// If `objects_max` is not in 1..=2^24.
    pub fn create(identity: &Identity, config: &IndexConfig) -> Result<(Self, IndexFile), SegmentError> {
        assert!((1..=1 << 24).contains(&config.objects_max), "{} objects: 1 to 2^24", config.objects_max);
        let bytes = config.index_bytes();
        let fd = sealed_memfd("praas-index", bytes).map_err(SegmentError::File)?;
        let first_bytes = config.table_offset(0) + SLOTS_MIN * 8;
        allocate(&fd, 0, first_bytes).map_err(|source| SegmentError::NoSpace { needed_bytes: first_bytes, source })?;
        let mapping = Arc::new(Mapping::map(fd.as_fd(), bytes, Access::Write).map_err(SegmentError::Map)?);
        rustix::fs::fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)
            .map_err(|error| SegmentError::Seal(error.into()))?;
        let windows = Windows::new(&mapping, config);
        let seed = getrandom::u64().map_err(|_| SegmentError::Random)?;
        let [low, high] = process_words(&identity.process);
        let header = &windows.header;
        for (word, value) in [
            (&header.version, u64::from(LAYOUT_VERSION)),
            (&header.process[0], low),
            (&header.process[1], high),
            (&header.incarnation, identity.incarnation),
            (&header.objects_max, config.objects_max.into()),
            (&header.seed, seed),
            (&header.table, SLOTS_MIN.ilog2().into()),
        ] {
            word.store(value, Ordering::Relaxed);
        }
        // ready (release): the header is visible before the magic.
        header.magic.store(MAGIC, Ordering::Release);
        let file = IndexFile { fd: fd.try_clone().map_err(SegmentError::File)? };
        let writer = Self {
            windows,
            config: *config,
            mapping,
            file: fd,
            seed,
            tables: 0,
            log2: SLOTS_MIN.ilog2(),
            table_slots: [SLOTS_MIN, 0],
            entries_real: 0,
            used_slots: 0,
            objects: 0,
            extent: 0,
            vacant: Vec::new(),
        };
        Ok((writer, file))
    }

    /// The file, for looking at.
    #[cfg(test)]
    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Objects that are there.
    pub fn objects(&self) -> u32 {
        self.objects
    }

    /// Entries that were ever used: all objects are among `0..extent`.
    pub fn extent(&self) -> u32 {
        self.extent
    }

    /// Says how many bytes all objects take: a hint for readers.
    pub fn say_used(&self, bytes: u64) {
        // No edge: a hint.
        self.windows.header.used_bytes.store(bytes, Ordering::Relaxed);
    }

    /// The entry of a key. `arena` is the one that long keys lie in.
    pub fn find(&self, key: &[u8], arena: &Arena) -> Option<u32> {
        self.seek(key, arena).map(|(_, entry)| entry)
    }

    /// The current object of an entry; `None` if it has none.
    pub fn current(&self, entry: u32) -> Option<Current> {
        let (version, words) = self.windows.entries.get(entry as usize)?.own();
        let key_bytes = key_bytes(&words);
        (key_bytes > 0).then(|| Current {
            version,
            place: Place::from_word(words[super::entry::PLACE]),
            value_bytes: value_bytes(&words),
            key_bytes,
            written_us: words[WRITTEN],
            first: words[FIRST],
            key_block: (host(key_bytes) > SHORT_KEY_BYTES).then(|| long_key(&words)),
        })
    }

    /// The key of an entry that has an object.
    pub fn key(&self, entry: u32, arena: &Arena) -> Vec<u8> {
        let (_, words) = self.windows.entries[entry as usize].own();
        key_of(&words, arena).map_or_else(Vec::new, <[u8]>::to_vec)
    }

    /// Makes sure that one more key can be inserted.
    ///
    /// # Errors
    /// [`IndexFull`]; nothing has changed then.
    pub fn reserve(&mut self) -> Result<(), IndexFull> {
        if self.vacant.is_empty() {
            if self.extent == self.config.objects_max {
                return Err(IndexFull::Objects { objects_max: self.config.objects_max });
            }
            if self.extent == self.entries_real {
                let real = (self.entries_real + ENTRIES_STEP).min(self.config.objects_max);
                let entry_bytes = size_of::<super::entry::Entry>() as u64;
                let offset = self.config.entries_offset() + u64::from(self.entries_real) * entry_bytes;
                self.make_real(offset, u64::from(real - self.entries_real) * entry_bytes)?;
                self.entries_real = real;
            }
        }
        // A fourth of the slots stays empty, so that a search is short and always ends.
        if (self.used_slots + 1) * 4 > (1 << self.log2) * 3 {
            self.rebuild()?;
        }
        Ok(())
    }

    /// The first object of a key, which is not in the index. `key_block` holds the key in the writer's arena if it is over 24 bytes long.
    ///
    /// # Panics
    /// Without room: see [`IndexWriter::reserve`].
    pub fn insert(
        &mut self,
        key: &[u8],
        key_block: Option<&BlockRef>,
        version: u64,
        place: Place,
        value_bytes: u64,
        written_us: u64,
    ) -> u32 {
        let key_words = key_block.map(long_key_words).or_else(|| short_key(key)).expect("a long key has a block");
        let entry = self.vacant.pop().unwrap_or_else(|| {
            self.extent += 1;
            self.extent - 1
        });
        assert!(entry < self.entries_real, "room for an entry was reserved");
        let [a, b, c] = key_words;
        let words: [u64; WORDS] = [place.word(), lengths_word(value_bytes, key.len()), written_us, version, a, b, c];
        self.windows.entries[entry as usize].write(version, words.into_iter().enumerate());
        self.windows.header.extent.store(self.extent.into(), Ordering::Relaxed);
        let tag = tag_of(key, self.seed);
        let at = self.free_slot(tag);
        let table = self.table();
        if table[at].load(Ordering::Relaxed) == EMPTY {
            self.used_slots += 1;
        }
        // slotted (release): the entry is whole before its slot is there.
        self.table()[at].store(slot(tag, entry), Ordering::Release);
        self.objects += 1;
        entry
    }

    /// Another object for a key that has one.
    pub fn replace(&mut self, entry: u32, version: u64, place: Place, value_bytes: u64, written_us: u64) {
        let entry = &self.windows.entries[entry as usize];
        let (_, words) = entry.own();
        let lengths = lengths_word(value_bytes, host(key_bytes(&words)));
        entry.write(version, [(super::entry::PLACE, place.word()), (LENGTHS, lengths), (WRITTEN, written_us)]);
    }

    /// The same object has been copied to another place. Its first one must not change while anybody may have it mapped.
    pub fn relocate(&mut self, entry: u32, place: Place) {
        self.windows.entries[entry as usize].set_place(place.word());
    }

    /// The key of this entry has no object any more, from `version` on.
    pub fn remove(&mut self, entry: u32, version: u64, arena: &Arena) {
        let key = self.key(entry, arena);
        let found = self.seek(&key, arena);
        let (at, _) = found.filter(|(_, found)| *found == entry).expect("an object has a slot");
        self.windows.entries[entry as usize].write(version, (0..WORDS).map(|at| (at, 0)));
        self.table()[at].store(GIVEN_UP, Ordering::Release);
        self.vacant.push(entry);
        self.objects -= 1;
    }

    fn table(&self) -> &[crate::sync::AtomicU64] {
        &self.windows.tables[host(self.tables % 2)][..1 << self.log2]
    }

    /// The slot and the entry of a key.
    fn seek(&self, key: &[u8], arena: &Arena) -> Option<(usize, u32)> {
        let tag = tag_of(key, self.seed);
        let table = self.table();
        for at in probes(tag, self.log2) {
            let slot = table[at].load(Ordering::Relaxed);
            if slot == EMPTY {
                return None;
            }
            if let Some(entry) = slot_entry(slot).filter(|_| slot_tag(slot) == tag) {
                let (_, words) = self.windows.entries[entry as usize].own();
                if key_of(&words, arena) == Some(key) {
                    return Some((at, entry));
                }
            }
        }
        None
    }

    fn free_slot(&self, tag: u32) -> usize {
        let table = self.table();
        let free = |at: &usize| matches!(table[*at].load(Ordering::Relaxed), EMPTY | GIVEN_UP);
        probes(tag, self.log2).find(free).expect("a fourth of the slots is empty")
    }

    /// Writes the slots in use into the other table, of such a size that at most half of it is used, and makes it the current one. Its
    /// cost is one store an object, once in as many inserts: 4 ms at half a million objects, most of it fresh memory.
    fn rebuild(&mut self) -> Result<(), IndexFull> {
        let wanted = (2 * u64::from(self.objects + 1)).next_power_of_two();
        let slots = wanted.clamp(SLOTS_MIN, self.config.slots_max());
        let (number, log2) = (self.tables + 1, slots.ilog2());
        let real = self.table_slots[host(number % 2)];
        if slots > real {
            self.make_real(self.config.table_offset(number) + real * 8, (slots - real) * 8)?;
            self.table_slots[host(number % 2)] = slots;
        }
        let table = &self.windows.tables[host(number % 2)][..host(slots)];
        // Readers of the table before last may still look into it. They find it changing, or empty, and then that it is not the current one.
        for slot in table {
            slot.store(EMPTY, Ordering::Relaxed);
        }
        for slot in self.table() {
            let slot = slot.load(Ordering::Relaxed);
            if slot_entry(slot).is_some() {
                let free = |at: &usize| table[*at].load(Ordering::Relaxed) == EMPTY;
                let at = probes(slot_tag(slot), log2).find(free).expect("half of the slots are empty");
                // slotted (release), for readers who look into it already.
                table[at].store(slot, Ordering::Release);
            }
        }
        (self.tables, self.log2, self.used_slots) = (number, log2, self.objects.into());
        // current (release): the slots are there before the table is the current one.
        self.windows.header.table.store(number << 8 | u64::from(log2), Ordering::Release);
        Ok(())
    }

    fn make_real(&self, offset: u64, bytes: u64) -> Result<(), IndexFull> {
        allocate(&self.file, offset, bytes).map_err(|source| IndexFull::Memory { needed_bytes: bytes, source })?;
        self.mapping.populate(offset, bytes);
        Ok(())
    }
}

/// Places to look at for a tag, each once.
pub(super) fn probes(tag: u32, log2: u32) -> impl Iterator<Item = usize> {
    let (home, mask) = (home(tag, log2), (1_u64 << log2) - 1);
    (0..=mask).map(move |step| host((home + step) & mask))
}

fn key_of<'a>(words: &'a [u64; WORDS], arena: &'a Arena) -> Option<&'a [u8]> {
    let bytes = host(key_bytes(words));
    if bytes > SHORT_KEY_BYTES {
        return arena.lent_view(&long_key(words)).ok();
    }
    zerocopy::IntoBytes::as_bytes(&words[KEY..]).get(..bytes)
}

impl fmt::Debug for IndexWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IndexWriter")
            .field("objects", &self.objects)
            .field("extent", &self.extent)
            .finish_non_exhaustive()
    }
}
