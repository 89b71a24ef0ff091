//! Functions that run for several calls or messages at once: collected, handed to a worker together, and what becomes of them when it dies.
//!
//! A batch waits in the queue as one call would, in the turns of its function. Nobody is given one ahead or under a lease.

use super::batch::{BatchKey, Batching};
use super::join::{KEYS_MAX, RunId};
use super::queue::LaneId;
use super::{Action, Call, CallKey, Controller, Keep, USES, Waiter, WorkerId, batch, key, place};
use crate::wire::Trigger;

/// The turns that the batches of a function take. Connections count up from 2^32, and never so far.
fn batch_lane(function: u16) -> LaneId {
    1 << 61 | u64::from(function)
}

impl<P: Keep> Controller<P> {
    /// How the functions of the first worker are called. False when one cannot be called so.
    pub(super) fn set_triggers(&mut self, triggers: &[(u16, Trigger)]) -> bool {
        for (function, trigger) in triggers {
            if usize::from(*function) >= self.functions.len() || self.batches.has(*function) {
                return false;
            }
            match trigger {
                Trigger::Batch { calls, wait_ns } => {
                    if !(1..=batch::CALLS_MAX).contains(calls) || *wait_ns > batch::WAIT_MAX_NS {
                        return false;
                    }
                    self.batches.collect(*function, Batching { calls: *calls, wait_ns: *wait_ns });
                }
                Trigger::Join { keys, .. } => {
                    let is_key = |key: &Vec<u8>| (1..=praas_shm::KEY_BYTES_MAX).contains(&key.len());
                    let differ = (1..keys.len()).all(|at| !keys[..at].contains(&keys[at]));
                    if !(1..=KEYS_MAX).contains(&keys.len()) || !keys.iter().all(is_key) || !differ {
                        return false;
                    }
                    self.batches.reserve(*function);
                }
            }
        }
        true
    }

    /// Until when a function that runs for messages may not run, ns; `None`: it may now.
    pub(crate) fn refuses_joins_until(&self, now_ns: u64, function: u16) -> Option<u64> {
        if self.draining {
            return Some(u64::MAX);
        }
        let left_ns = self.circuits.get(usize::from(function)).and_then(|circuit| circuit.refuses(now_ns))?;
        Some(now_ns + left_ns)
    }

    /// A function runs for messages, as soon as a worker is free; its time is counted from then. For each of them the end is told by
    /// [`Action::Joined`] or [`Action::Unjoin`], in their order.
    pub(crate) fn join(&mut self, now_ns: u64, run: RunId, function: u16, idempotent: bool, messages: Vec<P>) {
        let of = messages.len();
        let calls = messages.into_iter().map(|payload| {
            self.uses = self.uses.wrapping_add(1) & USES;
            let (from, uses, payload) = (Waiter::Join { run, of }, self.uses, Some(payload));
            let call = Call {
                from,
                function,
                deadline_ns: u64::MAX,
                idempotent,
                attempts: 0,
                uses,
                abandoned: false,
                payload,
            };
            key(self.calls.insert(call), uses)
        });
        let calls = calls.collect();
        let batch = self.batches.put_back(function, calls);
        self.run_batch(now_ns, batch);
    }

    /// Gives all messages back for which no worker was free yet, each with its run: where their bytes lie is about to go.
    pub(crate) fn unjoin_waiting(&mut self) -> Vec<(RunId, P)> {
        let mut back = Vec::new();
        for function in self.batches.reserved() {
            for key in self.batches.of(function) {
                self.take_out(function, key);
                let Call { from, payload, .. } = self.calls.remove(place(key));
                if let (Waiter::Join { run, .. }, Some(payload)) = (from, payload) {
                    back.push((run, payload));
                }
            }
        }
        back
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
        let Some(first) = calls.first().copied() else { return };
        let run = match self.calls[place(first)].from {
            Waiter::Join { run, .. } => Some(run),
            _ => None,
        };
        if run.is_some() {
            let deadline_ns = now_ns.saturating_add(self.bounds.deadline_ns);
            calls.iter().for_each(|call| self.calls[place(*call)].deadline_ns = deadline_ns);
            self.wake_by(deadline_ns);
        }
        let deadline_ns = calls.iter().map(|call| self.calls[place(*call)].deadline_ns).max().unwrap_or(0);
        if run.is_some() || calls.len() > 1 {
            self.staff.give_batch(now_ns, worker, &calls);
        } else {
            let expected_ns = self.expected_ns(function);
            self.staff.give(now_ns, worker, first, expected_ns);
        }
        let count = u16::try_from(calls.len()).expect("a batch is bounded");
        if let Some(run) = run {
            self.actions.push_back(Action::Join { worker, call: first, function, calls: count, deadline_ns, run });
        } else if count > 1 {
            self.actions.push_back(Action::Batch { worker, call: first, function, calls: count, deadline_ns });
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
