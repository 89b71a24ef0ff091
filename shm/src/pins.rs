//! Pins: which immutable objects a participant reads at this moment. Written by the reader in its own segment, read by the
//! writer before it frees one.
//!
//! | offset | bytes    | field    | says                                                      |
//! |-------:|---------:|----------|-----------------------------------------------------------|
//! |      0 |        8 | `extent` | pins at and above this place are free: nobody need look    |
//! |      8 | 255 × 8  | `pins`   | the version of an object that is being read; 0: free       |
//!
//! | edge     | release side                    | acquire side                       | carries                                    |
//! |----------|---------------------------------|------------------------------------|--------------------------------------------|
//! | pinned   | `pin`: stores, then a full fence | `fence_before_looking`, `is_pinned` | who does not see the pin is seen replaced  |
//! | unpinned | `unpin`                         | `is_pinned`                        | that the reader's loads are finished       |
//!
//! *Pinned* is a hazard pointer (Michael 2004): the reader stores its pin, passes a full fence and looks whether the object is
//! still the current one; the writer replaces the object, passes a full fence and looks at the pins. Not both can miss the other.

use std::cell::Cell;

use crate::mapping::{SharedLayout, Window};
use crate::sync::{AtomicU64, Ordering, fence};

/// Objects that one participant may read at a time.
pub const PINS_MAX: usize = 255;
const WORDS: usize = PINS_MAX.div_ceil(64);

/// See the module.
#[repr(C, align(128))]
pub(crate) struct PinPage {
    extent: AtomicU64,
    pins: [AtomicU64; PINS_MAX],
}

/// Bytes of the page of pins.
pub(crate) const PIN_PAGE_BYTES: u64 = 2048;

#[cfg(not(loom))]
const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<PinPage>() as u64 == PIN_PAGE_BYTES && align_of::<PinPage>() == 128);
    assert!(offset_of!(PinPage, extent) == 0 && offset_of!(PinPage, pins) == 8);
};

// SAFETY: `repr(C)` of 256 `AtomicU64`: any bits are a value, all of it is atomics, no padding (asserted above).
unsafe impl SharedLayout for PinPage {}

impl PinPage {
    /// Whether its owner reads this version. A claim: who lies keeps memory from its owner, or reads what changes.
    pub(crate) fn holds(&self, version: u64) -> bool {
        // unpinned (acquire), here and below: a pin seen gone was given up after the last load under it.
        let extent = usize::try_from(self.extent.load(Ordering::Acquire)).unwrap_or(PINS_MAX).min(PINS_MAX);
        self.pins[..extent].iter().any(|pin| pin.load(Ordering::Acquire) == version)
    }

    /// Adds all versions that its owner reads, each word looked at once: however fast a liar changes them, no more than [`PINS_MAX`].
    #[cfg_attr(loom, allow(dead_code, reason = "models look at single pins"))]
    pub(crate) fn read(&self, versions: &mut Vec<u64>) {
        // unpinned (acquire), as in `holds`.
        let extent = usize::try_from(self.extent.load(Ordering::Acquire)).unwrap_or(PINS_MAX).min(PINS_MAX);
        versions
            .extend(self.pins[..extent].iter().map(|pin| pin.load(Ordering::Acquire)).filter(|version| *version != 0));
    }

    #[cfg(test)]
    pub(crate) fn blank() -> Self {
        Self { extent: AtomicU64::new(0), pins: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

/// To be passed between replacing an object and looking whether somebody still reads what it was: see the module.
pub fn fence_before_looking() {
    fence(Ordering::SeqCst);
}

/// A place among the pins, in use.
#[derive(Debug, Eq, PartialEq)]
pub struct PinId(u8);

/// My own pins. One thread uses them.
pub struct Pins {
    page: Window<PinPage>,
    /// Bit `p` of word `p / 64`: the place is in use. Private memory.
    used: Cell<[u64; WORDS]>,
}

impl Pins {
    pub(crate) fn new(page: Window<PinPage>) -> Self {
        Self { page, used: Cell::default() }
    }

    /// Says that `version` is being read; the caller then looks whether it still is the current one, and unpins it if not.
    /// `None`: all [`PINS_MAX`] are in use.
    #[inline]
    pub(crate) fn pin(&self, version: u64) -> Option<PinId> {
        let mut used = self.used.get();
        let word = used.iter().position(|word| *word != u64::MAX)?;
        let place = word * 64 + used[word].trailing_ones() as usize;
        let pin = self.page.pins.get(place)?;
        used[word] |= 1 << (place % 64);
        self.used.set(used);
        pin.store(version, Ordering::Relaxed);
        if place as u64 >= self.page.extent.load(Ordering::Relaxed) {
            self.page.extent.store(place as u64 + 1, Ordering::Relaxed);
        }
        // pinned: SeqCst, because a store of ours must be visible before a later load, which nothing less orders.
        fence(Ordering::SeqCst);
        u8::try_from(place).ok().map(PinId)
    }

    /// The reader is done.
    #[inline]
    pub fn unpin(&self, pin: PinId) {
        let place = usize::from(pin.0);
        let mut used = self.used.get();
        used[place / 64] &= !(1 << (place % 64));
        self.used.set(used);
        // unpinned (release): our loads of the object are done.
        self.page.pins[place].store(0, Ordering::Release);
        if self.page.extent.load(Ordering::Relaxed) == place as u64 + 1 {
            let top = used.iter().rposition(|word| *word != 0);
            let extent = top.map_or(0, |word| (word as u64 + 1) * 64 - u64::from(used[word].leading_zeros()));
            // unpinned (release), for who does not look at the pin any more.
            self.page.extent.store(extent, Ordering::Release);
        }
    }

    /// Pins in use.
    pub fn count(&self) -> usize {
        self.used.get().iter().map(|word| word.count_ones() as usize).sum()
    }
}

impl std::fmt::Debug for Pins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pins").field("count", &self.count()).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn g8_pins_are_bounded_and_a_freed_place_is_used_again() {
        let page = Window::on_heap(PinPage::blank());
        let pins = Pins::new(page.clone());
        let mut held: Vec<PinId> =
            (1..=PINS_MAX as u64).map(|version| pins.pin(version).expect("a free place")).collect();
        assert_eq!(pins.pin(999), None);
        assert!(!page.holds(999) && (1..=PINS_MAX as u64).all(|version| page.holds(version)));
        pins.unpin(held.swap_remove(100));
        assert!(!page.holds(101));
        held.push(pins.pin(999).expect("one is free"));
        assert!(page.holds(999));
        for pin in held {
            pins.unpin(pin);
        }
        assert_eq!((pins.count(), page.extent.load(Ordering::Relaxed)), (0, 0));
        assert!(!page.holds(1));
    }

    /// R1: what a reader says of its extent is not believed beyond the page.
    #[test]
    fn r1_an_extent_beyond_the_page_reads_nothing_outside() {
        let page = PinPage::blank();
        page.extent.store(u64::MAX, Ordering::Relaxed);
        page.pins[PINS_MAX - 1].store(7, Ordering::Relaxed);
        assert!(page.holds(7) && !page.holds(8));
        let mut versions = vec![1];
        page.read(&mut versions);
        assert_eq!(versions, [1, 7]);
    }
}
