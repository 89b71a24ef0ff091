//! Calls of functions that are run in batches: collected, handed to a worker together, and what becomes of them when it dies.
//!
//! A batch waits in the queue as one call would, in the turns of its function. Nobody is given one ahead or under a lease.

use super::batch::{BatchKey, Batching};
use super::queue::LaneId;
use super::{Action, CallKey, Controller, Keep, WorkerId, batch, place};
use crate::wire::Trigger;

/// The turns that the batches of a function take. Connections count up from 2^32, and never so far.
fn batch_lane(function: u16) -> LaneId {
    1 << 61 | u64::from(function)
}

impl<P: Keep> Controller<P> {
    /// How the functions of the first worker are called. False when one cannot be called so.
    pub(super) fn set_triggers(&mut self, triggers: &[(u16, Trigger)]) -> bool {
        for (function, trigger) in triggers {
            let Trigger::Batch { calls, wait_ns } = *trigger;
            let is_fine = (1..=batch::CALLS_MAX).contains(&calls) && wait_ns <= batch::WAIT_MAX_NS;
            if !is_fine || usize::from(*function) >= self.functions.len() || self.batches.has(*function) {
                return false;
            }
            self.batches.collect(*function, Batching { calls, wait_ns });
        }
        true
    }

    /// A call that was admitted waits for others.
    pub(super) fn collect(&mut self, now_ns: u64, function: u16, key: CallKey, bytes: usize) {
        for batch in self.batches.add(now_ns, function, key, bytes) {
            self.run_batch(now_ns, batch);
        }
        self.wake_by(self.batches.due_ns());
    }

    /// Time passes: those that have waited long enough are run.
    pub(super) fn close_batches(&mut self, now_ns: u64) {
        while let Some(batch) = self.batches.expire(now_ns) {
            self.run_batch(now_ns, batch);
        }
        self.wake_by(self.batches.due_ns());
    }

    fn run_batch(&mut self, now_ns: u64, batch: BatchKey) {
        match self.staff.idle() {
            Some(worker) if self.queue.is_empty() => self.dispatch_batch(now_ns, worker, batch),
            _ => {
                let function = self.batches.function(batch).expect("closed just now");
                self.queue.push(batch_lane(function), batch);
                self.make_room(now_ns);
                self.give_ahead(now_ns);
            }
        }
    }

    pub(super) fn dispatch_batch(&mut self, now_ns: u64, worker: WorkerId, batch: BatchKey) {
        let (function, calls) = self.batches.take(batch);
        let deadline_ns = calls.iter().map(|call| self.calls[place(*call)].deadline_ns).max().unwrap_or(0);
        self.staff.give_batch(now_ns, worker, &calls);
        if let ([first, _, ..], Ok(count)) = (&calls[..], u16::try_from(calls.len())) {
            self.actions.push_back(Action::Batch { worker, call: *first, function, calls: count, deadline_ns });
        }
        for key in calls {
            let call = self.call(key).expect("a call in a batch is known");
            let payload = call.payload.take().expect("a call that waits has its payload");
            let deadline_ns = call.deadline_ns;
            self.actions.push_back(Action::Dispatch { worker, call: key, function, deadline_ns, payload });
        }
    }

    /// Calls that their worker did not begin on, or that run again, in the order they came: a batch, before all others of the function.
    pub(super) fn batch_again(&mut self, function: u16, calls: Vec<CallKey>) {
        let batch = self.batches.put_back(function, calls);
        self.queue.push_first(batch_lane(function), batch);
    }

    /// Nobody waits for a call any more that no worker has.
    pub(super) fn take_out(&mut self, function: u16, key: CallKey) {
        if let Some(emptied) = self.batches.remove(function, key) {
            self.queue.remove(batch_lane(function), emptied);
        }
    }

    /// One call of the batch that a worker runs is nobody's any more. The function is told when that is so of all.
    pub(super) fn tell_if_all_abandoned(&mut self, worker: WorkerId) {
        let Some(first) = self.staff.runs(worker) else { return };
        let mut all = std::iter::once(first).chain(self.staff.batch(worker));
        if all.all(|call| self.calls.get(place(call)).is_none_or(|call| call.abandoned)) {
            self.actions.push_back(Action::TellCancelled { worker, call: first });
        }
    }
}
