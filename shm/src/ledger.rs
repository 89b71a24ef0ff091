//! The ledger of an arena: which units are whose. Pure accounting over private memory; it touches no shared byte.
//!
//! The arena `[0, capacity)` is cut, from the left, into blocks without gaps: `[0, frontier)` is blocks, the rest was
//! never used. A block is free, loaned to our own program, or lent to one borrower. Free blocks hang in one LIFO list
//! for each size class, so that the block used last, still in cache, goes out first. Taking and returning a recycled
//! block is a pop and a push: no search, no heap, no system call.

use crate::arena::BadRelease;
use crate::participant::ParticipantId;
use crate::size_class::{self, CLASSES, UNIT_BYTES};

/// End of a list.
const NONE: u32 = u32::MAX;
/// Entries reserved at once, so that the first thousand blocks cause no reallocation.
const ENTRIES_RESERVED: usize = 1024;

const _: () = assert!(CLASSES <= u128::BITS as usize, "the map of non-empty lists is one u128");

#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) enum State {
    /// No block has this index now; it may get a new one.
    Vacant,
    Free,
    /// In our own program's hands, writable.
    Loaned,
    /// Readable by one borrower, writable by nobody.
    Lent {
        holder: ParticipantId,
        bytes: u64,
    },
}

#[derive(Copy, Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) state: State,
    pub(crate) first_unit: u32,
    pub(crate) units: u32,
    /// Grows whenever a borrower's right to this block ends.
    pub(crate) generation: u32,
    next: u32,
}

impl Entry {
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.units) * UNIT_BYTES
    }

    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.first_unit) * UNIT_BYTES
    }
}

#[derive(Debug)]
pub(crate) struct Ledger {
    entries: Vec<Entry>,
    /// Heads of the free lists, by [`size_class::at_most`].
    free: [u32; CLASSES],
    /// Bit `c`: list `c` is not empty.
    free_classes: u128,
    vacant: u32,
    /// First unit never used.
    frontier: u32,
    capacity: u32,
    used_units: u64,
    lent_units: u64,
    high_water_units: u64,
    loaned_blocks: u64,
    lent_blocks: u64,
    /// Something was freed since [`Ledger::merge`] ran last.
    may_merge: bool,
}

impl Ledger {
    pub(crate) fn new(capacity_units: u32) -> Self {
        Self {
            entries: Vec::with_capacity(ENTRIES_RESERVED),
            free: [NONE; CLASSES],
            free_classes: 0,
            vacant: NONE,
            frontier: 0,
            capacity: capacity_units,
            used_units: 0,
            lent_units: 0,
            high_water_units: 0,
            loaned_blocks: 0,
            lent_blocks: 0,
            may_merge: false,
        }
    }

    #[inline]
    pub(crate) fn entry(&self, index: u32) -> Option<&Entry> {
        self.entries.get(index as usize)
    }

    pub(crate) fn capacity_units(&self) -> u32 {
        self.capacity
    }

    pub(crate) fn frontier(&self) -> u32 {
        self.frontier
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_units * UNIT_BYTES
    }

    pub(crate) fn lent_bytes(&self) -> u64 {
        self.lent_units * UNIT_BYTES
    }

    pub(crate) fn high_water_bytes(&self) -> u64 {
        self.high_water_units * UNIT_BYTES
    }

    pub(crate) fn loaned_blocks(&self) -> u64 {
        self.loaned_blocks
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.loaned_blocks + self.lent_blocks
    }

    /// A free block of the class, loaned: the one freed last.
    #[inline]
    pub(crate) fn recycle(&mut self, class: usize) -> Option<u32> {
        let index = self.free[class];
        if index == NONE {
            return None;
        }
        self.unhook_first(class);
        self.loaned(index);
        Some(index)
    }

    /// A new block at the frontier, loaned. The caller has made its bytes real.
    pub(crate) fn extend(&mut self, units: u32) -> Option<u32> {
        if units > self.capacity - self.frontier {
            return None;
        }
        let index = self.cut(self.frontier, units);
        self.frontier += units;
        self.loaned(index);
        Some(index)
    }

    /// Part of a larger free block, loaned; the rest stays free.
    pub(crate) fn split(&mut self, units: u32) -> Option<u32> {
        let above = self.free_classes >> size_class::at_least(units);
        let index = if above != 0 {
            let class = size_class::at_least(units) + above.trailing_zeros() as usize;
            let index = self.free[class];
            self.unhook_first(class);
            index
        } else {
            // The list one class down holds blocks between the two class sizes; one may be just large enough.
            self.unhook_fitting(size_class::at_most(units), units)?
        };
        let whole = self.entries[index as usize];
        if whole.units > units {
            let rest = self.cut(whole.first_unit + units, whole.units - units);
            self.hook(rest);
            self.entries[index as usize].units = units;
        }
        self.loaned(index);
        Some(index)
    }

    /// Joins neighbouring free blocks, and gives a last one back to the frontier. Sorts all free blocks: for when
    /// nothing else is left. Whether anything may have changed since last time.
    pub(crate) fn merge(&mut self) -> bool {
        if !std::mem::take(&mut self.may_merge) {
            return false;
        }
        let mut free: Vec<(u32, u32)> = Vec::new();
        for (entry, index) in self.entries.iter().zip(0..) {
            if entry.state == State::Free {
                free.push((entry.first_unit, index));
            }
        }
        free.sort_unstable();
        self.free = [NONE; CLASSES];
        self.free_classes = 0;
        let mut open: Option<u32> = None;
        for (first_unit, index) in free {
            match open {
                Some(run) if self.end(run) == first_unit => {
                    self.entries[run as usize].units += self.entries[index as usize].units;
                    self.vacate(index);
                }
                _ => {
                    if let Some(run) = open.replace(index) {
                        self.hook(run);
                    }
                }
            }
        }
        if let Some(run) = open {
            if self.end(run) == self.frontier {
                self.frontier = self.entries[run as usize].first_unit;
                self.vacate(run);
            } else {
                self.hook(run);
            }
        }
        self.may_merge = false;
        true
    }

    /// Loaned → free.
    #[inline]
    pub(crate) fn free_loaned(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        assert!(entry.state == State::Loaned, "block {index} is not loaned but {:?}", entry.state);
        self.loaned_blocks -= 1;
        self.release(index);
    }

    /// Loaned → lent.
    #[inline]
    pub(crate) fn lend(&mut self, index: u32, bytes: u64, holder: ParticipantId) -> Entry {
        let entry = &mut self.entries[index as usize];
        assert!(entry.state == State::Loaned, "block {index} is not loaned but {:?}", entry.state);
        entry.state = State::Lent { holder, bytes };
        self.loaned_blocks -= 1;
        self.lent_blocks += 1;
        self.lent_units += u64::from(entry.units);
        *entry
    }

    /// Whether `claimed_holder` holds the block now, and how many bytes it was lent.
    #[inline]
    pub(crate) fn check_lent(
        &self,
        claimed_holder: ParticipantId,
        index: u32,
        generation: u32,
    ) -> Result<u64, BadRelease> {
        let entry = self.entry(index).ok_or(BadRelease::NoSuchBlock { index })?;
        let State::Lent { holder, bytes } = entry.state else {
            return Err(BadRelease::NotLent { index });
        };
        if entry.generation != generation {
            return Err(BadRelease::Stale { index, claimed: generation, current: entry.generation });
        }
        if holder != claimed_holder {
            return Err(BadRelease::OtherHolder { index, claimed: claimed_holder, holder });
        }
        Ok(bytes)
    }

    /// Lent → free. The caller has checked.
    #[inline]
    pub(crate) fn free_lent(&mut self, index: u32) {
        self.unlend(index);
        self.release(index);
    }

    /// Lent → loaned, under a new generation. The caller has checked.
    #[inline]
    pub(crate) fn take_back(&mut self, index: u32) {
        self.unlend(index);
        let entry = &mut self.entries[index as usize];
        entry.generation = entry.generation.wrapping_add(1);
        entry.state = State::Loaned;
        self.loaned_blocks += 1;
    }

    /// Lent → lent to somebody else. The caller has checked.
    pub(crate) fn relend(&mut self, index: u32, to: ParticipantId) {
        if let State::Lent { holder, .. } = &mut self.entries[index as usize].state {
            *holder = to;
        }
    }

    /// Everything lent to `dead` → free. The bytes that are.
    pub(crate) fn reclaim(&mut self, dead: ParticipantId) -> u64 {
        let mut units = 0;
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            if matches!(entry.state, State::Lent { holder, .. } if holder == dead) {
                units += u64::from(entry.units);
                self.free_lent(u32::try_from(index).expect("indices are u32"));
            }
        }
        units * UNIT_BYTES
    }

    #[inline]
    fn unlend(&mut self, index: u32) {
        let entry = &self.entries[index as usize];
        self.lent_units -= u64::from(entry.units);
        self.lent_blocks -= 1;
    }

    /// Anything in use → free.
    #[inline]
    fn release(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        entry.generation = entry.generation.wrapping_add(1);
        self.used_units -= u64::from(entry.units);
        self.may_merge = true;
        self.hook(index);
    }

    #[inline]
    fn loaned(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        entry.state = State::Loaned;
        self.used_units += u64::from(entry.units);
        self.high_water_units = self.high_water_units.max(self.used_units);
        self.loaned_blocks += 1;
    }

    #[inline]
    fn hook(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        let class = size_class::at_most(entry.units);
        entry.state = State::Free;
        entry.next = self.free[class];
        self.free[class] = index;
        self.free_classes |= 1 << class;
    }

    #[inline]
    fn unhook_first(&mut self, class: usize) {
        let next = self.entries[self.free[class] as usize].next;
        self.free[class] = next;
        if next == NONE {
            self.free_classes &= !(1 << class);
        }
    }

    fn unhook_fitting(&mut self, class: usize, units: u32) -> Option<u32> {
        let mut previous = NONE;
        let mut index = self.free[class];
        while index != NONE {
            let entry = self.entries[index as usize];
            if entry.units >= units {
                if previous == NONE {
                    self.unhook_first(class);
                } else {
                    self.entries[previous as usize].next = entry.next;
                }
                return Some(index);
            }
            (previous, index) = (index, entry.next);
        }
        None
    }

    /// A new entry; its state is for the caller to set.
    fn cut(&mut self, first_unit: u32, units: u32) -> u32 {
        if self.vacant != NONE {
            let index = self.vacant;
            let entry = &mut self.entries[index as usize];
            self.vacant = entry.next;
            *entry = Entry { state: State::Vacant, first_unit, units, next: NONE, ..*entry };
            return index;
        }
        let index = u32::try_from(self.entries.len()).expect("fewer blocks than units, which are u32");
        self.entries.push(Entry { state: State::Vacant, first_unit, units, generation: 1, next: NONE });
        index
    }

    fn vacate(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        entry.state = State::Vacant;
        entry.next = self.vacant;
        self.vacant = index;
    }

    fn end(&self, index: u32) -> u32 {
        let entry = &self.entries[index as usize];
        entry.first_unit + entry.units
    }
}

#[cfg(test)]
impl Ledger {
    /// Recomputes from the entries what is kept incrementally.
    pub(crate) fn audit(&self) {
        let mut at = 0;
        let mut blocks: Vec<&Entry> = self.entries.iter().filter(|e| e.state != State::Vacant).collect();
        blocks.sort_by_key(|entry| entry.first_unit);
        for block in &blocks {
            assert_eq!(block.first_unit, at, "blocks lie without gap or overlap");
            at += block.units;
        }
        assert_eq!(at, self.frontier);
        assert!(at <= self.capacity);
        let units = |wanted: fn(&State) -> bool| -> u64 {
            blocks.iter().filter(|e| wanted(&e.state)).map(|e| u64::from(e.units)).sum()
        };
        assert_eq!(self.used_units, units(|state| *state != State::Free));
        assert_eq!(self.lent_units, units(|state| matches!(state, State::Lent { .. })));
        let mut listed = 0;
        for class in 0..CLASSES {
            let mut index = self.free[class];
            assert_eq!(index != NONE, self.free_classes >> class & 1 == 1);
            while index != NONE {
                let entry = &self.entries[index as usize];
                assert!(entry.state == State::Free && size_class::at_most(entry.units) == class);
                listed += 1;
                index = entry.next;
            }
        }
        assert_eq!(listed, blocks.iter().filter(|entry| entry.state == State::Free).count());
    }
}
