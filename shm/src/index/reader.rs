//! A reader's end of the state index.

use std::fmt;
use std::sync::Arc;

use rustix::fs::SealFlags;

use super::entry::{Entry, NoPin, PLACE, Seen, WORDS};
use super::table::*;
use super::writer::probes;
use crate::mapping::{Access, Mapping};
use crate::pins::{PINS_MAX, PinId, Pins};
use crate::segment::{AttachError, Identity, LAYOUT_VERSION, PeerSegment, inspect, process_words};
use crate::sync::{Ordering, fence};
use crate::width::host;

/// Looks at an entry that is being written before the core is given away: the writer, cut off between two stores, may want it.
const LOOKS_MAX: u32 = 200;

/// All pins are in use: too many objects are held at a time.
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[error("{PINS_MAX} objects are held already: drop some first")]
pub struct PinsInUse;

/// An object, pinned: it stays as it is until [`Pins::unpin`].
#[derive(Debug)]
pub struct Found {
    /// Which object it is.
    pub version: u64,
    /// Where it lies.
    pub place: Place,
    /// Bytes of its value.
    pub value_bytes: u64,
    /// Bytes of its key.
    pub key_bytes: u64,
    /// When it was written, us since 1970.
    pub written_us: u64,
    /// Its entry: the same for all objects of a key as long as it has one.
    pub entry: u32,
    /// To be given back.
    pub pin: PinId,
}

/// A key that has an object, and what is known of that without looking at it.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct Listed {
    /// The key.
    pub key: Vec<u8>,
    /// Which object it has.
    pub version: u64,
    /// Bytes of its value.
    pub value_bytes: u64,
    /// When it was written, us since 1970.
    pub written_us: u64,
    /// Version of the first object that the key had: keys are in the order of these.
    pub first: u64,
}

/// Everybody's view of an index, read-only.
pub struct IndexReader {
    windows: Windows,
    objects_max: u32,
    seed: u64,
    /// Where long keys lie.
    controller: Arc<PeerSegment>,
}

impl IndexReader {
    /// Maps an index, if it is that of the process and life of `controller`, of the right size, and sealed for good.
    ///
    /// # Errors
    /// [`AttachError`] says which check failed.
    pub fn attach(file: &IndexFile, config: &IndexConfig, controller: Arc<PeerSegment>) -> Result<Self, AttachError> {
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
        let bytes = config.index_bytes();
        inspect(file.fd(), bytes, seals)?;
        let mapping = Arc::new(Mapping::map(file.fd(), bytes, Access::Read).map_err(AttachError::Map)?);
        let windows = Windows::new(&mapping, config);
        let header = &windows.header;
        // ready (acquire).
        let magic = header.magic.load(Ordering::Acquire);
        if magic != MAGIC {
            return Err(AttachError::NotASegment { found: magic });
        }
        let version = header.version.load(Ordering::Relaxed);
        if version != u64::from(LAYOUT_VERSION) {
            return Err(AttachError::VersionMismatch { found: version, expected: LAYOUT_VERSION });
        }
        let Identity { incarnation, process, .. } = *controller.identity();
        let [low, high] = process_words(&process);
        for (field, word, expected) in [
            ("process (low half)", &header.process[0], low),
            ("process (high half)", &header.process[1], high),
            ("incarnation", &header.incarnation, incarnation),
            ("objects_max", &header.objects_max, config.objects_max.into()),
        ] {
            let found = word.load(Ordering::Relaxed);
            if found != expected {
                return Err(AttachError::Stranger { field, found, expected });
            }
        }
        let seed = header.seed.load(Ordering::Relaxed);
        Ok(Self { windows, objects_max: config.objects_max, seed, controller })
    }

    /// Bytes that all objects take: a hint, and stale.
    pub fn used_bytes(&self) -> u64 {
        self.windows.header.used_bytes.load(Ordering::Relaxed)
    }

    /// The current object of a key, pinned. No message, no system call, nothing allocated; a key that is being written at this moment
    /// costs another look.
    ///
    /// # Errors
    /// [`PinsInUse`].
    #[inline]
    pub fn get(&self, pins: &Pins, key: &[u8]) -> Result<Option<Found>, PinsInUse> {
        let short = short_key(key);
        let tag = tag_of(key, self.seed);
        loop {
            // current (acquire).
            let current = self.windows.header.table.load(Ordering::Acquire);
            // What the table word says is the writer's, who cannot be lied about: nobody else writes here.
            let log2 = u32::from(current.to_le_bytes()[0]);
            let table = &self.windows.tables[host(current >> 8) % 2];
            for at in probes(tag, log2) {
                // slotted (acquire).
                let slot = table[at].load(Ordering::Acquire);
                if slot == EMPTY {
                    break;
                }
                if slot_tag(slot) != tag {
                    continue;
                }
                let Some(number) = slot_entry(slot) else { continue };
                if let Some(found) = self.look(pins, number, key, short)? {
                    return Ok(Some(found));
                }
            }
            // current: what was missing in a table that is not the current one any more may be in the one that is.
            fence(Ordering::Acquire);
            if self.windows.header.table.load(Ordering::Relaxed) == current {
                return Ok(None);
            }
        }
    }

    /// The object of this entry, if its key is the one.
    #[inline]
    fn look(&self, pins: &Pins, number: u32, key: &[u8], short: Option<[u64; 3]>) -> Result<Option<Found>, PinsInUse> {
        let entry = &self.windows.entries[number as usize];
        let is_it = |words: &[u64; WORDS]| {
            // A long key is compared under the pin.
            key_bytes(words) == key.len() as u64 && short.is_none_or(|short| words[KEY..] == short)
        };
        let (version, words, pin) = match look_until_still(|| entry.pin(pins, is_it).map_err(|NoPin| PinsInUse))? {
            Some(found) => found,
            None => return Ok(None),
        };
        if short.is_none() && !self.controller.bytes(&long_key(&words)).is_ok_and(|long| long == key) {
            pins.unpin(pin);
            return Ok(None);
        }
        Ok(Some(Found {
            version,
            place: Place::from_word(words[PLACE]),
            value_bytes: value_bytes(&words),
            key_bytes: key_bytes(&words),
            written_us: words[WRITTEN],
            entry: number,
            pin,
        }))
    }

    /// All keys that have an object, in the order in which they were first written. Not at one moment: what is written meanwhile may or may
    /// not be there. Takes time and memory for every key.
    ///
    /// # Errors
    /// [`PinsInUse`]: it takes one, now and then.
    pub fn keys(&self, pins: &Pins) -> Result<Vec<Listed>, PinsInUse> {
        let extent = self.windows.header.extent.load(Ordering::Relaxed).min(self.objects_max.into());
        let mut listed = Vec::new();
        for entry in &self.windows.entries[..host(extent)] {
            listed.extend(self.list(pins, entry)?);
        }
        listed.sort_unstable_by_key(|listed| listed.first);
        Ok(listed)
    }

    fn list(&self, pins: &Pins, entry: &Entry) -> Result<Option<Listed>, PinsInUse> {
        let listed = |version, words: &[u64; WORDS], key: &[u8]| Listed {
            key: key.to_vec(),
            version,
            value_bytes: value_bytes(words),
            written_us: words[WRITTEN],
            first: words[FIRST],
        };
        let seen = look_until_still(|| Ok::<_, PinsInUse>(entry.read()))?;
        let Some((version, words)) = seen.filter(|(_, words)| key_bytes(words) > 0) else { return Ok(None) };
        if host(key_bytes(&words)) <= SHORT_KEY_BYTES {
            return Ok(Some(listed(version, &words, &short_key_bytes(&words)[..host(key_bytes(&words))])));
        }
        let is_long = |words: &[u64; WORDS]| host(key_bytes(words)) > SHORT_KEY_BYTES;
        let pinned = look_until_still(|| entry.pin(pins, is_long).map_err(|NoPin| PinsInUse))?;
        let Some((version, words, pin)) = pinned else { return Ok(None) };
        let found = self.controller.bytes(&long_key(&words)).ok().map(|key| listed(version, &words, key));
        pins.unpin(pin);
        Ok(found)
    }
}

/// Looks until nothing changes; `None`: it is something else.
#[inline]
fn look_until_still<T, E>(mut look: impl FnMut() -> Result<Seen<T>, E>) -> Result<Option<T>, E> {
    let mut looks = 0;
    loop {
        match look()? {
            Seen::It(found) => return Ok(Some(found)),
            Seen::Other => return Ok(None),
            Seen::Changing => {}
        }
        looks += 1;
        if looks % LOOKS_MAX == 0 {
            rustix::thread::sched_yield();
        } else {
            std::hint::spin_loop();
        }
    }
}

impl fmt::Debug for IndexReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IndexReader").field("objects_max", &self.objects_max).finish_non_exhaustive()
    }
}
