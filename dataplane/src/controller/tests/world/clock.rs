//! Chance and time: everything that happens follows from one seed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Event;

/// A splitmix64 generator.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(super) fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    /// From `low` on, below `high`.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }
}

struct Entry {
    /// When, and as which of those that happen then.
    at: Reverse<(u64, u64)>,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// What is to happen, and the clock that goes from one event to the next.
pub(super) struct Agenda {
    pub(super) now_ns: u64,
    entries: BinaryHeap<Entry>,
    made: u64,
    /// Those that happened: that were not for somebody who is gone, or about something that was done before.
    pub(super) events: u64,
}

impl Agenda {
    pub(super) fn new(now_ns: u64) -> Agenda {
        Agenda { now_ns, entries: BinaryHeap::new(), made: 0, events: 0 }
    }

    /// Not before now.
    pub(super) fn at(&mut self, at_ns: u64, event: Event) {
        self.made += 1;
        self.entries.push(Entry { at: Reverse((at_ns.max(self.now_ns), self.made)), event });
    }

    pub(super) fn after(&mut self, delay_ns: u64, event: Event) {
        self.at(self.now_ns + delay_ns, event);
    }

    /// Goes on to the next event.
    pub(super) fn next(&mut self) -> Option<Event> {
        let Entry { at: Reverse((at_ns, _)), event } = self.entries.pop()?;
        self.now_ns = at_ns;
        Some(event)
    }
}
