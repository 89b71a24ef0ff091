//! Calls that are collected, so that their function runs once for several of them (trigger *batch*). Decides; has no clock and never looks into a
//! payload.
//!
//! ```text
//! first call ──► collecting ──calls, wait or bytes──► closed ──a worker is free──► taken
//!                    ▲                                   └── its worker died before it began, or may run it again: in front
//!                    └── one call more
//! ```
//! A batch that is closed takes no more calls, however long it waits for a worker. A call that nobody waits for any more is taken out as long as
//! its batch was not taken.

use std::collections::BTreeMap;

use super::CallKey;
use crate::numbered::NumberMap;

/// Calls of one batch at most: they and their answers fit a ring of 256 records, with as much room for what passes beside them.
pub(crate) const CALLS_MAX: u16 = 128;
/// Longest time that the first call of a batch may be made to wait for others: an hour.
pub(crate) const WAIT_MAX_NS: u64 = 3_600_000_000_000;

/// When the calls of a function that were collected are a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Batching {
    /// With so many, 1 to [`CALLS_MAX`].
    pub(crate) calls: u16,
    /// So long after the first has come, whatever has come since; up to [`WAIT_MAX_NS`].
    pub(crate) wait_ns: u64,
}

/// Names a closed batch: a number that no call has.
pub(super) type BatchKey = CallKey;

/// Bit of the number of a batch, which no call's number has.
const BATCH: u64 = 1 << 63;

/// Whether this is a batch, and no call.
pub(super) fn is_batch(key: CallKey) -> bool {
    key & BATCH != 0
}

/// What a function runs for, if not for one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Together {
    Calls(Batching),
    Messages,
}

#[derive(Debug)]
struct Collecting {
    /// With the bytes of their inputs.
    calls: Vec<(CallKey, usize)>,
    bytes: usize,
    due_ns: u64,
}

#[derive(Debug)]
struct Closed {
    function: u16,
    calls: Vec<CallKey>,
}

/// The batches of a process that no worker has yet.
#[derive(Debug)]
pub(super) struct Batches {
    /// By function; none at all when none is called in batches.
    triggers: Vec<Option<Together>>,
    /// Inputs of one batch together, but of a call that has more alone: what a worker is given at once is bounded as one payload is.
    bytes_max: usize,
    /// By function.
    collecting: BTreeMap<u16, Collecting>,
    closed: NumberMap<Closed>,
    made: u64,
    waiting: usize,
}

impl Batches {
    /// No function is called in batches.
    pub(super) fn new(bytes_max: usize) -> Batches {
        Batches {
            triggers: Vec::new(),
            bytes_max,
            collecting: BTreeMap::new(),
            closed: NumberMap::default(),
            made: 0,
            waiting: 0,
        }
    }

    /// From now on calls of this function are collected. To be said before the first one.
    pub(super) fn collect(&mut self, function: u16, batching: Batching) {
        self.set(function, Together::Calls(batching));
    }

    /// This function is not called: what it runs for is put here as one batch at a time.
    pub(super) fn reserve(&mut self, function: u16) {
        self.set(function, Together::Messages);
    }

    fn set(&mut self, function: u16, together: Together) {
        let at = usize::from(function);
        if self.triggers.len() <= at {
            self.triggers.resize(at + 1, None);
        }
        self.triggers[at] = Some(together);
    }

    /// Whether this function runs for several calls, or messages, at once.
    pub(super) fn has(&self, function: u16) -> bool {
        self.triggers.get(usize::from(function)).is_some_and(Option::is_some)
    }

    /// Whether it runs for messages and is not called.
    pub(super) fn is_reserved(&self, function: u16) -> bool {
        self.triggers.get(usize::from(function)) == Some(&Some(Together::Messages))
    }

    /// The functions that run for messages.
    pub(super) fn reserved(&self) -> Vec<u16> {
        let all = (0..).zip(&self.triggers);
        all.filter(|(_, trigger)| **trigger == Some(Together::Messages)).map(|(function, _)| function).collect()
    }

    /// Calls that wait here.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// A call has come. Gives the batches that are closed now: the one before, if this call was too much for it, and its own, if that is full.
    pub(super) fn add(
        &mut self,
        now_ns: u64,
        function: u16,
        call: CallKey,
        bytes: usize,
    ) -> impl Iterator<Item = BatchKey> + use<> {
        let Some(Together::Calls(Batching { calls, wait_ns })) = self.triggers[usize::from(function)] else {
            unreachable!("whoever admits calls asks with `has` and `is_reserved` before");
        };
        let is_too_much = |batch: &Collecting| batch.bytes.saturating_add(bytes) > self.bytes_max;
        let before = if self.collecting.get(&function).is_some_and(is_too_much) { self.close(function) } else { None };
        let due_ns = now_ns.saturating_add(wait_ns);
        let batch =
            self.collecting.entry(function).or_insert_with(|| Collecting { calls: Vec::new(), bytes: 0, due_ns });
        batch.calls.push((call, bytes));
        batch.bytes = batch.bytes.saturating_add(bytes);
        self.waiting += 1;
        let full = batch.calls.len() >= usize::from(calls);
        let own = if full { self.close(function) } else { None };
        before.into_iter().chain(own)
    }

    /// Time passes. Closes a batch whose time has come; to be called until there is none.
    pub(super) fn expire(&mut self, now_ns: u64) -> Option<BatchKey> {
        let due = self.collecting.iter().find(|(_, batch)| batch.due_ns <= now_ns);
        let function = due.map(|(function, _)| *function)?;
        self.close(function)
    }

    /// When [`Batches::expire`] has to be called next, ns.
    pub(super) fn due_ns(&self) -> u64 {
        self.collecting.values().map(|batch| batch.due_ns).min().unwrap_or(u64::MAX)
    }

    /// No more calls will come: nobody is made to wait for others.
    pub(super) fn hasten(&mut self) {
        self.collecting.values_mut().for_each(|batch| batch.due_ns = 0);
    }

    /// Nobody waits for this call any more. Gives the closed batch that has none left, and is gone.
    pub(super) fn remove(&mut self, function: u16, call: CallKey) -> Option<BatchKey> {
        if let Some(batch) = self.collecting.get_mut(&function)
            && let Some(at) = batch.calls.iter().position(|(other, _)| *other == call)
        {
            let (_, bytes) = batch.calls.remove(at);
            batch.bytes -= bytes;
            self.waiting -= 1;
            if batch.calls.is_empty() {
                self.collecting.remove(&function);
            }
            return None;
        }
        let of_function = self.closed.iter_mut().filter(|(_, batch)| batch.function == function);
        for (key, batch) in of_function {
            if let Some(at) = batch.calls.iter().position(|other| *other == call) {
                let key = *key;
                batch.calls.remove(at);
                self.waiting -= 1;
                let emptied = batch.calls.is_empty();
                return emptied.then(|| self.closed.remove(&key)).flatten().map(|_| key);
            }
        }
        None
    }

    /// A worker gets a batch: its function, and its calls in the order they came.
    pub(super) fn take(&mut self, key: BatchKey) -> (u16, Vec<CallKey>) {
        let Closed { function, calls } = self.closed.remove(&key).expect("a batch in the queue is here");
        self.waiting -= calls.len();
        (function, calls)
    }

    /// Calls that were taken and run again, in the order they came: a batch again. Or what a function that is not called runs for.
    pub(super) fn put_back(&mut self, function: u16, calls: Vec<CallKey>) -> BatchKey {
        self.waiting += calls.len();
        self.made += 1;
        let key = BATCH | self.made;
        self.closed.insert(key, Closed { function, calls });
        key
    }

    /// The calls of a closed batch.
    pub(super) fn calls(&self, key: BatchKey) -> &[CallKey] {
        self.closed.get(&key).map_or(&[], |batch| &batch.calls)
    }

    /// The function of a closed batch.
    pub(super) fn function(&self, key: BatchKey) -> Option<u16> {
        self.closed.get(&key).map(|batch| batch.function)
    }

    /// All calls of a function that wait here.
    pub(super) fn of(&self, function: u16) -> Vec<CallKey> {
        let closed = self.closed.values().filter(|batch| batch.function == function).flat_map(|batch| &batch.calls);
        let collecting = self.collecting.get(&function).into_iter().flat_map(|batch| &batch.calls);
        closed.copied().chain(collecting.map(|(call, _)| *call)).collect()
    }

    fn close(&mut self, function: u16) -> Option<BatchKey> {
        let Collecting { calls, .. } = self.collecting.remove(&function)?;
        self.waiting -= calls.len();
        Some(self.put_back(function, calls.into_iter().map(|(call, _)| call).collect()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn batches(calls: u16, wait_ns: u64) -> Batches {
        let mut batches = Batches::new(100);
        batches.collect(3, Batching { calls, wait_ns });
        batches
    }

    #[test]
    fn a_batch_is_closed_by_its_number_its_time_or_its_bytes() {
        let mut batches = batches(3, 10 * MS);
        assert!(batches.has(3) && !batches.has(2) && !batches.has(4));
        assert_eq!(batches.add(0, 3, 1, 10).count() + batches.add(MS, 3, 2, 10).count(), 0);
        let full: Vec<_> = batches.add(2 * MS, 3, 3, 10).collect();
        assert_eq!((full.len(), batches.calls(full[0]), batches.due_ns()), (1, &[1, 2, 3][..], u64::MAX));
        assert_eq!(batches.add(5 * MS, 3, 4, 10).count(), 0);
        assert_eq!((batches.expire(14 * MS), batches.due_ns()), (None, 15 * MS));
        let late = batches.expire(15 * MS).expect("its time has come");
        assert_eq!((batches.take(late), batches.waiting()), ((3, vec![4]), 3));
        // The second is too much for the first, and the third fills a batch of its own.
        assert_eq!(batches.add(20 * MS, 3, 5, 60).count(), 0);
        let before: Vec<_> = batches.add(20 * MS, 3, 6, 60).collect();
        assert_eq!((before.len(), batches.calls(before[0])), (1, &[5][..]));
        assert_eq!(batches.add(20 * MS, 3, 7, 500).count(), 1, "one alone may be as long as it is");
        let mut all = batches.of(3);
        all.sort_unstable();
        assert_eq!(all, [1, 2, 3, 5, 6, 7]);
    }

    #[test]
    fn what_is_called_off_leaves_no_empty_batch_and_nobody_waits_longer_for_it() {
        let mut batches = batches(2, 10 * MS);
        assert_eq!(batches.add(0, 3, 1, 0).count(), 0);
        assert_eq!((batches.remove(3, 1), batches.due_ns()), (None, u64::MAX));
        let closed: Vec<_> =
            [2, 3].into_iter().flat_map(|call| batches.add(MS, 3, call, 0).collect::<Vec<_>>()).collect();
        assert_eq!((batches.remove(3, 2), batches.remove(3, 9)), (None, None));
        assert_eq!((batches.remove(3, 3), batches.waiting()), (Some(closed[0]), 0));
        assert_eq!(batches.calls(closed[0]), [0; 0]);
    }

    /// What the oracle knows of a call.
    #[derive(Debug, Clone, Copy)]
    struct Known {
        call: CallKey,
        bytes: usize,
    }

    /// The calls that no closed batch has, in the order they came, and since when there is one.
    #[derive(Debug, Default)]
    struct Open {
        calls: Vec<Known>,
        begun_ns: u64,
    }

    impl Open {
        fn came(&mut self, now_ns: u64, known: Known) {
            if self.calls.is_empty() {
                self.begun_ns = now_ns;
            }
            self.calls.push(known);
        }

        /// A batch is closed, before a call of `next_bytes` if that made it so: its calls are all there are, not too many, not too late, and for a reason.
        fn closed(&mut self, now_ns: u64, batching: Batching, has: &[CallKey], next_bytes: usize) {
            let of = std::mem::take(&mut self.calls);
            assert_eq!(
                of.iter().map(|known| known.call).collect::<Vec<_>>(),
                has,
                "all of them, in the order they came"
            );
            let (most, bytes) = (usize::from(batching.calls), of.iter().map(|known| known.bytes).sum::<usize>());
            assert!((1..=most).contains(&has.len()) && (bytes <= 100 || has.len() == 1));
            let due_ns = self.begun_ns + batching.wait_ns;
            assert!(now_ns <= due_ns, "closed at {now_ns}, due at {due_ns}");
            assert!(has.len() == most || now_ns == due_ns || bytes + next_bytes > 100, "closed for nothing");
        }
    }

    proptest! {
        /// Against a list of the calls that wait, in the order they came.
        #[test]
        fn nobody_is_lost_doubled_or_late_and_no_batch_is_too_large(
            (calls, wait_ns) in (1..6_u16, 0..20_u64),
            steps in prop::collection::vec((0..10_u8, 0..64_usize, 0..8_u64), 1..200),
        ) {
            let batching = Batching { calls, wait_ns };
            let mut batches = batches(calls, wait_ns);
            let (mut open, mut closed) = (Open::default(), Vec::<(BatchKey, Vec<CallKey>)>::new());
            let (mut now_ns, mut made) = (0, 0);
            for (step, number, pause_ns) in steps {
                match step {
                    0..=4 => {
                        made += 1;
                        let known = Known { call: made, bytes: number };
                        let (mut is_in, mut next_bytes) = (false, number);
                        for key in batches.add(now_ns, 3, made, number).collect::<Vec<_>>() {
                            let has = batches.calls(key).to_vec();
                            if has.contains(&made) {
                                open.came(now_ns, known);
                                (is_in, next_bytes) = (true, 0);
                            }
                            open.closed(now_ns, batching, &has, next_bytes);
                            closed.push((key, has));
                        }
                        if !is_in {
                            open.came(now_ns, known);
                        }
                    }
                    5 | 6 => {
                        // Time passes, and each timer fires when it is due.
                        let until_ns = now_ns + pause_ns;
                        while batches.due_ns() <= until_ns {
                            now_ns = now_ns.max(batches.due_ns());
                            let key = batches.expire(now_ns).expect("it is due");
                            let has = batches.calls(key).to_vec();
                            open.closed(now_ns, batching, &has, 0);
                            closed.push((key, has));
                        }
                        now_ns = until_ns;
                    }
                    7 if !open.calls.is_empty() => {
                        let known = open.calls.remove(number % open.calls.len());
                        prop_assert_eq!(batches.remove(3, known.call), None);
                    }
                    8 if !closed.is_empty() => {
                        let at = number % closed.len();
                        let (key, of) = &mut closed[at];
                        let call = of.remove(number % of.len());
                        prop_assert_eq!(batches.remove(3, call), of.is_empty().then_some(*key));
                        if of.is_empty() {
                            closed.remove(at);
                        }
                    }
                    9 if !closed.is_empty() => {
                        let (key, of) = closed.remove(number % closed.len());
                        prop_assert_eq!(batches.take(key), (3, of.clone()));
                        if pause_ns == 0 {
                            // Its worker died before it began.
                            let again = batches.put_back(3, of.clone());
                            prop_assert!(is_batch(again) && again != key);
                            closed.push((again, of));
                        }
                    }
                    _ => {}
                }
                let mut all: Vec<_> = open.calls.iter().map(|known| known.call).collect();
                all.extend(closed.iter().flat_map(|(_, of)| of));
                prop_assert_eq!(batches.waiting(), all.len());
                let mut of = batches.of(3);
                all.sort_unstable();
                of.sort_unstable();
                prop_assert_eq!(of, all);
            }
            batches.hasten();
            let last = batches.expire(now_ns).map_or(Vec::new(), |key| batches.calls(key).to_vec());
            prop_assert_eq!(last, open.calls.iter().map(|known| known.call).collect::<Vec<_>>());
            prop_assert_eq!(batches.expire(u64::MAX), None);
        }
    }
}
