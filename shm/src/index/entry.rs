//! An entry of the state index: one cache line that says which object is current under one key.
//!
//! | offset | bytes | field    | content                                                           |
//! |-------:|------:|----------|-------------------------------------------------------------------|
//! |      0 |     8 | `stamp`  | version of the object × 2; odd while the entry is being written     |
//! |      8 |    56 | `words`  | seven words, see [`Words`]                                          |
//!
//! | edge    | release side                    | acquire side                        | carries                              |
//! |---------|---------------------------------|-------------------------------------|--------------------------------------|
//! | written | `write`, the last `stamp`       | `read`, the first `stamp`           | the seven words, and the object       |
//! | writing | `write`, the fence              | `read`, the fence                   | words of a later writing show another stamp |
//! | pinned  | see `pins.rs`                   |                                     |                                      |
//! | moved   | `set_place`                     | `read`, the word                    | the object where it lies now          |

use crate::mapping::SharedLayout;
use crate::pins::{PinId, Pins};
use crate::sync::{AtomicU64, Ordering, fence};

pub(super) const WORDS: usize = 7;
/// The word that says where the object lies: the one that may change under the same stamp.
pub(super) const PLACE: usize = 0;

/// See the module.
#[repr(C, align(64))]
pub(crate) struct Entry {
    stamp: AtomicU64,
    words: [AtomicU64; WORDS],
}

#[cfg(not(loom))]
const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Entry>() == 64 && align_of::<Entry>() == 64);
    assert!(offset_of!(Entry, stamp) == 0 && offset_of!(Entry, words) == 8);
};

// SAFETY: `repr(C)` of 8 `AtomicU64`: any bits are a value, all of it is atomics, no padding (asserted above).
unsafe impl SharedLayout for Entry {}

/// What a reader found.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Seen<T> {
    /// It is what was looked for.
    It(T),
    /// It is something else.
    Other,
    /// It changes at this moment: look again.
    Changing,
}

impl Entry {
    /// The writer alone: from here on `version` is current. `fill` gives each word its value.
    pub(crate) fn write(&self, version: u64, fill: impl IntoIterator<Item = (usize, u64)>) {
        self.stamp.store(version << 1 | 1, Ordering::Relaxed);
        // writing (release fence): the stamp is odd before a word changes.
        fence(Ordering::Release);
        for (at, word) in fill {
            self.words[at].store(word, Ordering::Relaxed);
        }
        // written (release): the words, and the object that they name, are visible before the stamp.
        self.stamp.store(version << 1, Ordering::Release);
    }

    /// The writer alone: the same object lies somewhere else now, too, and what lies in the first place never changes any more.
    pub(crate) fn set_place(&self, place: u64) {
        // moved (release): the object is whole in its new place.
        self.words[PLACE].store(place, Ordering::Release);
    }

    /// The writer's own words.
    pub(crate) fn own(&self) -> (u64, [u64; WORDS]) {
        (self.stamp.load(Ordering::Relaxed) >> 1, std::array::from_fn(|at| self.words[at].load(Ordering::Relaxed)))
    }

    /// A reader: all words of one writing, or `Changing`. They may be old by the time they are looked at.
    #[inline]
    pub(crate) fn read(&self) -> Seen<(u64, [u64; WORDS])> {
        let (stamp, words) = self.load();
        // writing (acquire fence): words of a later writing show another stamp here.
        fence(Ordering::Acquire);
        if stamp & 1 == 0 && self.stamp.load(Ordering::Relaxed) == stamp {
            Seen::It((stamp >> 1, words))
        } else {
            Seen::Changing
        }
    }

    /// A reader: pins the object, if the words are those that `is_it` looks for. From then on it stays as and where it is until it is
    /// unpinned. `Ok(Other)` needs no pin.
    ///
    /// # Errors
    /// All pins are in use.
    #[inline]
    pub(crate) fn pin(
        &self,
        pins: &Pins,
        is_it: impl FnOnce(&[u64; WORDS]) -> bool,
    ) -> Result<Seen<(u64, [u64; WORDS], PinId)>, NoPin> {
        let (stamp, words) = self.load();
        if stamp & 1 != 0 {
            return Ok(Seen::Changing);
        }
        if !is_it(&words) {
            // writing (acquire fence), as in `read`.
            fence(Ordering::Acquire);
            return Ok(if self.stamp.load(Ordering::Relaxed) == stamp { Seen::Other } else { Seen::Changing });
        }
        // pinned: its full fence stands in for the acquire fence of *writing*, too.
        let pin = pins.pin(stamp >> 1).ok_or(NoPin)?;
        if self.stamp.load(Ordering::Relaxed) == stamp {
            Ok(Seen::It((stamp >> 1, words, pin)))
        } else {
            pins.unpin(pin);
            Ok(Seen::Changing)
        }
    }

    #[inline]
    fn load(&self) -> (u64, [u64; WORDS]) {
        // written (acquire).
        let stamp = self.stamp.load(Ordering::Acquire);
        let words = std::array::from_fn(|at| {
            // moved (acquire), for the one word that changes without the stamp.
            self.words[at].load(if at == PLACE { Ordering::Acquire } else { Ordering::Relaxed })
        });
        (stamp, words)
    }

    #[cfg(all(test, loom))]
    pub(crate) fn blank() -> Self {
        Self { stamp: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

/// All pins of the reader are in use.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(crate) struct NoPin;
