//! Calls that wait for a worker: in the order they came for each caller, in turns between callers.
//!
//! A caller is a connection, or a worker whose function calls another. Whoever has many calls waiting delays itself.

use std::collections::VecDeque;

use super::CallKey;
use crate::numbered::NumberMap;

/// Whose calls wait in a row: see [`super::lane_of`].
pub(super) type LaneId = u64;

#[derive(Debug, Default)]
pub(super) struct Queue {
    lanes: NumberMap<VecDeque<CallKey>>,
    /// Lanes that have calls, the next one first.
    turns: VecDeque<LaneId>,
    len: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn push(&mut self, lane: LaneId, key: CallKey) {
        let calls = self.lanes.entry(lane).or_default();
        if calls.is_empty() {
            self.turns.push_back(lane);
        }
        calls.push_back(key);
        self.len += 1;
    }

    /// Back to the front: it was here before, and has waited long enough.
    pub(super) fn push_first(&mut self, lane: LaneId, key: CallKey) {
        let calls = self.lanes.entry(lane).or_default();
        if !calls.is_empty() {
            self.turns.retain(|turn| *turn != lane);
        }
        self.turns.push_front(lane);
        calls.push_front(key);
        self.len += 1;
    }

    /// What `pop` would give.
    pub(super) fn next(&self) -> Option<CallKey> {
        self.lanes.get(self.turns.front()?)?.front().copied()
    }

    pub(super) fn pop(&mut self) -> Option<CallKey> {
        let lane = self.turns.pop_front()?;
        let calls = self.lanes.get_mut(&lane).expect("a lane whose turn it is has calls");
        let key = calls.pop_front().expect("a lane whose turn it is has calls");
        if calls.is_empty() {
            self.lanes.remove(&lane);
        } else {
            self.turns.push_back(lane);
        }
        self.len -= 1;
        Some(key)
    }

    pub(super) fn remove(&mut self, lane: LaneId, key: CallKey) {
        let Some(calls) = self.lanes.get_mut(&lane) else { return };
        let Some(at) = calls.iter().position(|queued| *queued == key) else { return };
        calls.remove(at);
        self.len -= 1;
        if calls.is_empty() {
            self.lanes.remove(&lane);
            self.turns.retain(|turn| *turn != lane);
        }
    }

    /// All of them, lane by lane, in the order of the next turns.
    pub(super) fn iter(&self) -> impl Iterator<Item = CallKey> {
        self.turns.iter().flat_map(|lane| self.lanes[lane].iter().copied())
    }

    /// In a queue that is full, whose call gives way to one more of `lane`: the last of the longest lane, unless that would be
    /// this one's own. `None`: `lane` has its share.
    pub(super) fn to_give_way(&self, lane: LaneId) -> Option<CallKey> {
        let mine = self.lanes.get(&lane).map_or(0, VecDeque::len);
        if mine + 1 > self.len / (self.turns.len() + usize::from(mine == 0)) {
            return None;
        }
        let longest = self.lanes.values().max_by_key(|calls| calls.len())?;
        longest.back().copied().filter(|_| longest.len() > mine + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lanes_take_turns_and_each_keeps_its_order() {
        let mut queue = Queue::default();
        for (lane, key) in [(1, 10), (1, 11), (1, 12), (2, 20), (3, 30), (2, 21)] {
            queue.push(lane, key);
        }
        assert_eq!(std::iter::from_fn(|| queue.pop()).collect::<Vec<_>>(), [10, 20, 30, 11, 21, 12]);
        queue.push(1, 1);
        queue.push(2, 2);
        queue.push_first(2, 3);
        assert_eq!(queue.iter().collect::<Vec<_>>(), [3, 2, 1]);
    }

    #[test]
    fn in_a_full_queue_the_greedy_give_way_to_the_modest() {
        let mut queue = Queue::default();
        (0..8).for_each(|key| queue.push(1, key));
        assert_eq!(queue.to_give_way(1), None, "not to themselves");
        assert_eq!(queue.to_give_way(2), Some(7));
        queue.remove(1, 7);
        queue.push(2, 20);
        // Four each is a fair share of eight.
        for key in 21..24 {
            let out = queue.to_give_way(2).expect("below its share");
            queue.remove(1, out);
            queue.push(2, key);
        }
        assert_eq!((queue.to_give_way(2), queue.to_give_way(1), queue.len()), (None, None, 8));
        assert!(queue.to_give_way(3).is_some());
    }

    proptest! {
        /// Against a list of (lane, key): nothing is lost, doubled or out of its lane's order, and nobody waits longer than a round.
        #[test]
        fn a_queue_is_a_list_of_lanes(steps in prop::collection::vec((0..4_u8, 0..5_u64), 1..200)) {
            let (mut queue, mut list) = (Queue::default(), Vec::<(LaneId, CallKey)>::new());
            for (key, (step, lane)) in (0_u64..).zip(steps) {
                match step {
                    0 | 1 => {
                        queue.push(lane, key);
                        list.push((lane, key));
                    }
                    2 => match (queue.next(), queue.pop()) {
                        (next, popped) if next != popped => prop_assert!(false, "{next:?} was shown, {popped:?} came"),
                        (_, None) => prop_assert!(list.is_empty()),
                        (_, Some(popped)) => {
                            let at = list.iter().position(|(_, key)| *key == popped).expect("it was pushed");
                            let (lane, _) = list.remove(at);
                            prop_assert!(list[..at].iter().all(|(of, _)| *of != lane), "first of its lane");
                        }
                    },
                    _ => {
                        if let Some(at) = list.iter().position(|(of, _)| *of == lane) {
                            queue.remove(lane, list.remove(at).1);
                        }
                    }
                }
                prop_assert_eq!(queue.len(), list.len());
                prop_assert_eq!(queue.is_empty(), list.is_empty());
                let mut left: Vec<_> = queue.iter().collect();
                left.sort_unstable();
                let mut keys: Vec<_> = list.iter().map(|(_, key)| *key).collect();
                keys.sort_unstable();
                prop_assert_eq!(left, keys);
            }
        }
    }
}
