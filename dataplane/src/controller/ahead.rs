//! Calls that a busy worker is given already, so that the next one is there when it finishes: without them a worker
//! waits for us after each call, and we wait for it.
//!
//! Such a call waits as those in the queue do: it is taken back, unless it has begun, as soon as another worker has
//! nothing to do, its own worker waits for a nested call, runs late or panics, or nobody wants it any more. So a call is never
//! held up behind a long one that another worker could have overtaken. What has been given is out of the turns that callers
//! take, so a worker is given no more than it is expected to be through with in a moment. Only clients' calls are given ahead: a
//! nested one could come to wait for its own caller.
//!
//! Where workers share cores, short calls are *packed*: a worker that is at it gets them although another has nothing to do, which
//! would have to be woken and then take the core from all others for longer than the calls last. Those are taken back when the worker
//! has not answered for a millisecond, and not before.

use super::staff::Post;
use super::{Action, CallKey, Controller, Keep, Outcome, Waiter, WorkerId, is_batch, lane_of, place};

/// Work that a worker may have, the call that it runs included. Longer functions lose little by waiting for us: 3 us a call.
const LOAD_NS: u64 = 100_000;
/// What a function is expected to take of which no call has come back.
pub(super) const UNKNOWN_NS: u64 = LOAD_NS / 2;
/// What is packed: calls shorter than waking another worker, which takes 2.5 us at best (design section 4) and 5 to 10 with both changes of the core.
const SHORT_NS: u64 = 10_000;
/// Work that is packed with one worker before another is woken for it.
const PACKED_NS: u64 = 200_000;
/// A worker that has not answered for so long is not at short calls: it gets no more, and what was packed is taken back.
const LATE_NS: u64 = 1_000_000;

/// Whether a worker has answered, or was given its first call, a moment ago.
fn is_at_it(post: &Post, now_ns: u64) -> bool {
    post.began_ns > now_ns.saturating_sub(LATE_NS)
}

impl<P: Keep> Controller<P> {
    /// Hands calls that wait to workers that are busy.
    pub(super) fn give_ahead(&mut self, now_ns: u64) {
        while let Some(key) = self.queue.next() {
            if is_batch(key) || matches!(self.calls[place(key)].from, Waiter::Worker { .. }) {
                return;
            }
            let may = |post: &Post| is_at_it(post, now_ns);
            let Some(worker) = self.staff.least_laden(self.bounds.ahead_max, LOAD_NS, may) else { return };
            self.queue.pop();
            self.dispatch(now_ns, worker, key);
        }
    }

    /// The worker to give a call to at once: one that is at short calls, or one that has nothing to do.
    pub(super) fn next_worker(&mut self, now_ns: u64, key: CallKey) -> Option<WorkerId> {
        let idle = self.staff.idle()?;
        if is_batch(key) {
            return Some(idle);
        }
        let call = &self.calls[place(key)];
        let is_short = |ns: u64| ns <= SHORT_NS;
        let has_room = self.queue.len() + self.staff.ahead() < self.bounds.queue_max;
        let may_wait = self.bounds.packs && has_room && !matches!(call.from, Waiter::Worker { .. });
        if !may_wait || !is_short(self.expected_ns(call.function)) {
            return Some(idle);
        }
        let may = |post: &Post| is_at_it(post, now_ns) && is_short(post.runs_ns);
        let Some(busy) = self.staff.least_laden(self.bounds.ahead_max, PACKED_NS, may) else { return Some(idle) };
        self.wake_by(now_ns + LATE_NS);
        Some(busy)
    }

    /// Takes calls that were packed from a worker that turns out to be at a long one.
    pub(super) fn look_at_packed(&mut self, now_ns: u64) {
        if !self.bounds.packs || self.staff.idle().is_none() {
            return;
        }
        for worker in self.staff.laden() {
            let late_ns = self.staff.began_ns(worker) + LATE_NS;
            if late_ns <= now_ns {
                self.withdraw(worker);
            } else {
                self.wake_by(late_ns);
            }
        }
    }

    /// Whether a worker has more than one call: it rings once for several answers.
    pub(crate) fn has_given_ahead(&self) -> bool {
        self.staff.ahead() > 0
    }

    /// Somebody has nothing to do: takes calls from the worker that has most ahead, unless they are packed. Whether there is one.
    pub(super) fn relieve(&mut self, now_ns: u64) -> bool {
        let is_packed = |post: &Post| self.bounds.packs && post.longest_ns() <= SHORT_NS && is_at_it(post, now_ns);
        let worker = self.staff.most_laden(|post| !is_packed(post));
        if let Some(worker) = worker {
            self.withdraw(worker);
        }
        self.look_at_packed(now_ns);
        worker.is_some()
    }

    pub(super) fn withdraw(&mut self, worker: WorkerId) {
        if self.staff.ask_back(worker) {
            self.actions.push_back(Action::Withdraw { worker });
        }
    }

    pub(super) fn withdraw_all(&mut self) {
        self.staff.laden().for_each(|worker| self.withdraw(worker));
    }

    /// Calls that a worker had not begun on are back, in the order it was given them: those asked of it
    /// ([`Action::Withdraw`]), perhaps none, or one that it found withdrawn itself.
    pub(crate) fn withdrawn(&mut self, now_ns: u64, worker: WorkerId, calls: Vec<(CallKey, P)>) {
        let has_none = calls.iter().fold(false, |none, (key, _)| none | self.staff.take_from(worker, *key));
        self.staff.asked(worker);
        self.requeue(now_ns, calls);
        if has_none {
            // Another first: this one has not even begun, perhaps for want of a core.
            if self.bounds.packs
                && let Some(other) = self.staff.idle()
                && let Some(key) = self.queue.pop()
            {
                self.dispatch(now_ns, other, key);
            }
            self.staff.on_time(worker);
            self.employ(now_ns, worker);
        }
        self.distribute(now_ns);
    }

    /// Calls are back in the queue.
    pub(super) fn distribute(&mut self, now_ns: u64) {
        self.hand_out(now_ns);
        if !self.queue.is_empty() {
            self.make_room(now_ns);
            self.give_ahead(now_ns);
        }
    }

    /// Puts calls back to where they were, except those that nobody wants any more or that would be refused by now.
    pub(super) fn requeue(&mut self, now_ns: u64, calls: Vec<(CallKey, P)>) {
        for (key, payload) in calls.into_iter().rev() {
            let known = self.call(key).map(|call| (call.from, usize::from(call.function), call.abandoned));
            let refused = known.filter(|(_, function, _)| self.circuits[*function].refuses(now_ns).is_some());
            match (known, refused) {
                (Some((from, _, false)), None) => {
                    self.call(key).expect("looked up above").payload = Some(payload);
                    self.put_first(from, key);
                }
                (_, refused) => {
                    self.actions.push_back(Action::Discard(payload));
                    if known.is_some() {
                        self.calls.remove(place(key));
                    }
                    if let Some((from, function, false)) = refused {
                        self.answer(from, Outcome::Failed(self.broken(now_ns, function)));
                    }
                }
            }
        }
    }

    /// A call is back in the queue, before all others of its caller.
    pub(super) fn put_first(&mut self, from: Waiter, key: CallKey) {
        let function = self.calls[place(key)].function;
        if self.batches.has(function) {
            self.batch_again(function, vec![key]);
        } else {
            self.queue.push_first(lane_of(from), key);
        }
    }

    /// A worker goes on with a call that it was given ahead.
    pub(super) fn begins(&mut self, now_ns: u64, worker: WorkerId, key: CallKey) {
        let Some(call) = self.calls.get(place(key)) else { return };
        let late = call.deadline_ns <= now_ns;
        if call.abandoned {
            // It was begun on as it was being taken back.
            self.actions.push_back(Action::TellCancelled { worker, call: key });
        }
        if late {
            // Its timer has fired already.
            self.wake_by(now_ns);
        }
    }
}
