//! The workers: how many there are, what each is doing, what follows when one dies.

use std::collections::VecDeque;

use crate::wire::Trigger;

use super::{Action, CallError, CallKey, Code, Controller, Keep, Outcome, Signal, Violation, Waiter, WorkerId, place};

/// A worker beyond `workers` that has had nothing to do for this long is retired.
pub(super) const SURPLUS_IDLE_NS: u64 = 10_000_000_000;
/// Pause before a worker that never registered is started again: doubles from the first to the longest.
const BACK_OFF_NS: u64 = 10_000_000;
const BACK_OFF_MAX_NS: u64 = 5_000_000_000;

/// What a place for a worker is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum State {
    /// Nobody here. Not to be used again before `mourners` have forgotten the last one.
    #[default]
    Vacant,
    Starting {
        since_ns: u64,
    },
    Idle {
        since_ns: u64,
    },
    Running {
        call: CallKey,
    },
    /// Callee of a lease.
    Serving {
        lease: u64,
    },
    /// Has a client's connection.
    Connected {
        lease: u64,
    },
    /// Callee of a lease whose caller died; back when it has forgotten it.
    Mourning {
        of: WorkerId,
    },
    /// On its way out.
    Dying,
}

/// Why a worker died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    Exited(i32),
    Killed(i32),
    /// We killed it because it broke the protocol.
    Violation(&'static str),
    /// We killed it because it ran past a deadline.
    Overran,
    /// It took more than it may.
    Exceeded(Limit),
}

/// What a worker may not take more of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Memory, in a control group: the kernel killed it, or somebody it had started.
    Memory { bytes: u64 },
    /// Private memory, by `RLIMIT_DATA`: it was refused some, and aborted. It may have had another reason: this one does not show.
    Private { bytes: u64 },
    /// Processes and threads: it was refused one, and ended.
    Processes { processes_max: u32 },
}

impl Limit {
    /// In one word, for workers that called the dead one: what, in the highest byte, and how much.
    pub(crate) fn word(self) -> u64 {
        let (what, much) = match self {
            Limit::Memory { bytes } => (1, bytes),
            Limit::Private { bytes } => (2, bytes),
            Limit::Processes { processes_max } => (3, processes_max.into()),
        };
        what << 56 | much.min((1 << 56) - 1)
    }

    /// Of such a word.
    pub(crate) fn from_word(word: u64) -> Option<Limit> {
        let much = word & ((1 << 56) - 1);
        match word >> 56 {
            1 => Some(Limit::Memory { bytes: much }),
            2 => Some(Limit::Private { bytes: much }),
            3 => u32::try_from(much).ok().map(|processes_max| Limit::Processes { processes_max }),
            _ => None,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Limit::Memory { bytes } => write!(
                f,
                "was killed by the kernel for lack of memory, of which it may take {bytes} bytes (--worker-memory-max)"
            ),
            Limit::Private { bytes } => write!(
                f,
                "aborted, as a program does that gets no memory: {bytes} bytes of its own are the most (--worker-memory-max)"
            ),
            Limit::Processes { processes_max } => write!(
                f,
                "ended after it was refused more than {processes_max} processes and threads (--worker-processes-max)"
            ),
        }
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cause::Exited(code) => write!(f, "exited with code {code}"),
            Cause::Killed(signal) => write!(f, "was killed by signal {signal}"),
            Cause::Violation(what) => write!(f, "was killed for breaking the protocol: {what}"),
            Cause::Overran => f.write_str("was killed for running past its deadline"),
            Cause::Exceeded(limit) => limit.fmt(f),
        }
    }
}

impl Cause {
    /// SIGKILL comes from outside (an operator, a machine short of memory); everything else is the function's doing.
    pub(super) fn is_the_functions(self) -> bool {
        const SIGKILL: i32 = 9;
        const SIGTERM: i32 = 15;
        !matches!(self, Cause::Killed(SIGKILL | SIGTERM) | Cause::Overran)
    }
}

/// When a worker runs a call it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Now,
    Later,
    /// Now, in one run with others that have no answer either.
    Together,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Post {
    state: State,
    /// Calls it has besides the one it runs, the next one first, and how long each is expected to take.
    ahead: VecDeque<(CallKey, u64)>,
    /// Those that it runs together with that one, in the order in which it answers them. It has none ahead then.
    batch: VecDeque<CallKey>,
    /// What it has is one batch, and is not taken back in parts.
    is_sealed: bool,
    /// How long the one it runs is expected to take, and all those ahead, ns.
    pub(super) runs_ns: u64,
    ahead_ns: u64,
    /// When it last began on a call, as far as we can tell.
    pub(super) began_ns: u64,
    /// They are being taken back.
    asked_back: bool,
    /// Bit `n`: worker `n` still holds on to this place's last worker.
    mourners: u64,
    /// Nested calls of this worker that we have not answered.
    nested: u32,
    /// When to do something about a worker past its deadline, and whether it was asked nicely before.
    overdue: Option<(u64, bool)>,
}

impl Post {
    /// What the longest of its calls is expected to take.
    pub(super) fn longest_ns(&self) -> u64 {
        self.ahead.iter().fold(self.runs_ns, |longest, (_, expected_ns)| longest.max(*expected_ns))
    }
}

#[derive(Debug)]
pub(super) struct Staff {
    posts: Vec<Post>,
    /// Bit `n`: worker `n` is in this state, or has calls ahead.
    idle: u64,
    running: u64,
    laden: u64,
    failures: u32,
    hire_after_ns: u64,
}

impl Staff {
    pub(super) fn new() -> Self {
        Staff { posts: vec![Post::default(); 64], idle: 0, running: 0, laden: 0, failures: 0, hire_after_ns: 0 }
    }

    pub(super) fn state(&self, worker: WorkerId) -> State {
        self.posts[usize::from(worker)].state
    }

    pub(super) fn set(&mut self, worker: WorkerId, state: State) {
        self.posts[usize::from(worker)].state = state;
        let bit = 1 << worker;
        let mark = |mask: &mut u64, is: bool| *mask = if is { *mask | bit } else { *mask & !bit };
        mark(&mut self.idle, matches!(state, State::Idle { .. }));
        mark(&mut self.running, matches!(state, State::Running { .. }));
    }

    /// A worker gets a call that is expected to take so long: to run it now, or behind those it has.
    pub(super) fn give(&mut self, now_ns: u64, worker: WorkerId, call: CallKey, expected_ns: u64) {
        let runs = matches!(self.state(worker), State::Running { .. });
        let post = &mut self.posts[usize::from(worker)];
        if runs {
            post.ahead.push_back((call, expected_ns));
            post.ahead_ns += expected_ns;
            self.laden |= 1 << worker;
        } else {
            (post.runs_ns, post.began_ns) = (expected_ns, now_ns);
            self.set(worker, State::Running { call });
        }
    }

    /// A worker that does nothing gets calls to run together.
    pub(super) fn give_batch(&mut self, now_ns: u64, worker: WorkerId, calls: &[CallKey]) {
        let [first, rest @ ..] = calls else { return };
        self.give(now_ns, worker, *first, 0);
        let post = &mut self.posts[usize::from(worker)];
        post.batch.extend(rest);
        post.is_sealed = true;
    }

    /// Those that a worker runs besides the one that it answers next.
    pub(super) fn batch(&self, worker: WorkerId) -> impl Iterator<Item = CallKey> {
        self.posts[usize::from(worker)].batch.iter().copied()
    }

    /// The call that a worker runs, or of those that it runs the one that it answers next.
    pub(super) fn runs(&self, worker: WorkerId) -> Option<CallKey> {
        match self.state(worker) {
            State::Running { call } => Some(call),
            _ => None,
        }
    }

    /// A worker has answered one call of those it runs. Whether there is one more that it is to answer now.
    pub(super) fn next_of_batch(&mut self, worker: WorkerId) -> bool {
        let post = &mut self.posts[usize::from(worker)];
        let next = post.batch.pop_front();
        match next {
            Some(call) => post.state = State::Running { call },
            None => post.is_sealed = false,
        }
        next.is_some()
    }

    /// How long a worker took for the call that it is done with now.
    pub(super) fn took_ns(&mut self, now_ns: u64, worker: WorkerId) -> u64 {
        let began_ns = std::mem::replace(&mut self.posts[usize::from(worker)].began_ns, now_ns);
        now_ns.saturating_sub(began_ns)
    }

    /// A worker is done with its call. The next one that it has.
    pub(super) fn go_on(&mut self, worker: WorkerId) -> Option<CallKey> {
        let post = &mut self.posts[usize::from(worker)];
        let (call, expected_ns) = post.ahead.pop_front()?;
        (post.runs_ns, post.ahead_ns) = (expected_ns, post.ahead_ns - expected_ns);
        // What it is now, it was: no mask changes.
        post.state = State::Running { call };
        self.look_what_is_ahead(worker);
        Some(call)
    }

    fn look_what_is_ahead(&mut self, worker: WorkerId) {
        if self.posts[usize::from(worker)].ahead.is_empty() {
            self.laden &= !(1 << worker);
        }
    }

    /// A worker does not have this call any more. Whether it was its only one: then it is to be employed.
    pub(super) fn take_from(&mut self, worker: WorkerId, call: CallKey) -> bool {
        if self.state(worker) == (State::Running { call }) {
            return self.go_on(worker).is_none();
        }
        let post = &mut self.posts[usize::from(worker)];
        post.ahead.retain(|(had, _)| *had != call);
        post.ahead_ns = post.ahead.iter().map(|(_, expected_ns)| expected_ns).sum();
        self.look_what_is_ahead(worker);
        false
    }

    /// Whether a worker has calls ahead that are not on their way back. They are then.
    pub(super) fn ask_back(&mut self, worker: WorkerId) -> bool {
        let post = &mut self.posts[usize::from(worker)];
        !post.ahead.is_empty() && !std::mem::replace(&mut post.asked_back, true)
    }

    pub(super) fn asked(&mut self, worker: WorkerId) {
        self.posts[usize::from(worker)].asked_back = false;
    }

    /// The worker to be given one more call than it runs, if any may: of those that have less than `ahead_max` more and are expected to
    /// be through with all of it in `load_ns`, the one with fewest.
    pub(super) fn least_laden(
        &self,
        ahead_max: usize,
        load_ns: u64,
        suits: impl Fn(&Post) -> bool,
    ) -> Option<WorkerId> {
        let may = |post: &Post| {
            let is_at_hand = !post.is_sealed && post.nested == 0 && post.overdue.is_none() && !post.asked_back;
            is_at_hand && post.ahead.len() < ahead_max && post.runs_ns.saturating_add(post.ahead_ns) <= load_ns
        };
        let found = bits(self.running).map(|worker| (worker, &self.posts[usize::from(worker)]));
        found
            .filter(|(_, post)| may(post) && suits(post))
            .min_by_key(|(_, post)| post.ahead.len())
            .map(|(worker, _)| worker)
    }

    /// Workers that have calls ahead.
    pub(super) fn laden(&self) -> impl Iterator<Item = WorkerId> + use<> {
        bits(self.laden)
    }

    /// Calls that wait with workers.
    pub(super) fn ahead(&self) -> usize {
        self.laden().map(|worker| self.posts[usize::from(worker)].ahead.len()).sum()
    }

    /// Of the workers that have calls ahead and suit, the one with most.
    pub(super) fn most_laden(&self, suits: impl Fn(&Post) -> bool) -> Option<WorkerId> {
        let post = |worker: &WorkerId| &self.posts[usize::from(*worker)];
        self.laden().filter(|worker| suits(post(worker))).max_by_key(|worker| post(worker).ahead.len())
    }

    /// When a worker last began on a call, as far as we can tell.
    pub(super) fn began_ns(&self, worker: WorkerId) -> u64 {
        self.posts[usize::from(worker)].began_ns
    }

    /// The place of a dead worker, free when `mourners` have let go.
    fn bury(&mut self, worker: WorkerId, mourners: u64) {
        self.set(worker, State::Vacant);
        self.laden &= !(1 << worker);
        self.posts[usize::from(worker)] = Post { mourners, ..Post::default() };
    }

    pub(super) fn places(&self) -> usize {
        self.posts.len()
    }

    fn numbered(&self) -> impl Iterator<Item = (WorkerId, &Post)> {
        (0..).zip(&self.posts).skip(1)
    }

    pub(super) fn idle(&self) -> Option<WorkerId> {
        bits(self.idle).next()
    }

    /// Who has a call, and whether it runs it.
    pub(super) fn holder(&self, call: CallKey) -> Option<(WorkerId, Turn)> {
        bits(self.running).find_map(|worker| {
            let post = &self.posts[usize::from(worker)];
            let now = post.state == State::Running { call };
            let later = || post.ahead.iter().any(|(ahead, _)| *ahead == call);
            if post.batch.contains(&call) || now && !post.batch.is_empty() {
                return Some((worker, Turn::Together));
            }
            (now || later()).then_some((worker, if now { Turn::Now } else { Turn::Later }))
        })
    }

    /// Workers that are here or coming.
    pub(super) fn count(&self) -> usize {
        self.posts.iter().filter(|post| !matches!(post.state, State::Vacant | State::Dying)).count()
    }

    pub(super) fn surplus(&self, workers: u8) -> bool {
        self.count() > usize::from(workers)
    }

    /// Whether every worker waits, with nobody on the way who could help.
    pub(super) fn all_waiting(&self, waiting: u64) -> bool {
        self.numbered().all(|(worker, post)| match post.state {
            State::Vacant => true,
            State::Starting { .. } | State::Idle { .. } | State::Dying => false,
            State::Running { .. } | State::Serving { .. } | State::Connected { .. } | State::Mourning { .. } => {
                waiting & (1 << worker) != 0
            }
        })
    }

    pub(super) fn nesting(&self) -> u64 {
        self.numbered().filter(|(_, post)| post.nested > 0).fold(0, |mask, (worker, _)| mask | 1 << worker)
    }

    pub(super) fn nested(&self, worker: WorkerId) -> usize {
        self.posts[usize::from(worker)].nested as usize
    }

    pub(super) fn nested_began(&mut self, worker: WorkerId) {
        self.posts[usize::from(worker)].nested += 1;
    }

    pub(super) fn nested_ended(&mut self, worker: WorkerId) {
        let nested = &mut self.posts[usize::from(worker)].nested;
        *nested = nested.saturating_sub(1);
    }

    pub(super) fn overdue(&mut self, worker: WorkerId, act_at_ns: u64) {
        self.posts[usize::from(worker)].overdue.get_or_insert((act_at_ns, false));
    }

    pub(super) fn on_time(&mut self, worker: WorkerId) {
        self.posts[usize::from(worker)].overdue = None;
    }
}

/// Numbers of the bits that are set, from the lowest on.
fn bits(mask: u64) -> impl Iterator<Item = WorkerId> {
    let mut left = mask;
    std::iter::from_fn(move || {
        let bit = WorkerId::try_from(left.trailing_zeros()).ok().filter(|_| left != 0)?;
        left &= left - 1;
        Some(bit)
    })
}

impl<P: Keep> Controller<P> {
    /// Starts one worker if a place is free and the last failure is long enough ago.
    pub(super) fn hire(&mut self, now_ns: u64) -> bool {
        if now_ns < self.staff.hire_after_ns {
            self.wake_by(self.staff.hire_after_ns);
            return false;
        }
        let vacant = self.staff.numbered().find(|(_, post)| post.state == State::Vacant && post.mourners == 0);
        let Some(worker) = vacant.map(|(worker, _)| worker) else { return false };
        self.staff.set(worker, State::Starting { since_ns: now_ns });
        self.wake_by(now_ns + self.bounds.start_ns);
        self.actions.push_back(Action::Spawn { worker });
        true
    }

    /// A worker registered. Its functions must be those of the first.
    pub(crate) fn ready(
        &mut self,
        now_ns: u64,
        worker: WorkerId,
        functions: &[String],
        triggers: &[(u16, Trigger)],
    ) -> Result<(), Violation> {
        if !matches!(self.staff.state(worker), State::Starting { .. }) {
            return Err(Violation("registered twice"));
        }
        if self.functions.is_empty() {
            self.functions = functions.to_vec();
            self.circuits.resize_with(functions.len(), Default::default);
            self.paces.resize_with(functions.len(), Default::default);
            if !self.set_triggers(triggers) {
                return Err(Violation("registered a trigger that there is not, or for a function that there is not"));
            }
            self.triggers = triggers.to_vec();
        } else if self.functions != functions || self.triggers != triggers {
            return Err(Violation("registered other functions than the workers before it; was its program replaced?"));
        }
        self.staff.failures = 0;
        self.staff.on_time(worker);
        self.employ(now_ns, worker);
        Ok(())
    }

    /// Nested calls of a worker that have no answer yet.
    pub(crate) fn nested_of(&self, worker: WorkerId) -> usize {
        self.staff.nested(worker)
    }

    /// Workers that can be given work or are at it.
    pub(crate) fn ready_count(&self) -> usize {
        let ready = |state| !matches!(state, State::Vacant | State::Starting { .. } | State::Dying);
        self.staff.posts.iter().filter(|post| ready(post.state)).count()
    }

    /// Starts that failed in a row.
    #[cfg(test)]
    pub(crate) fn failed_starts(&self) -> u32 {
        self.staff.failures
    }

    /// Whether the worker is on its own core's busy list: given a call or serving a lease.
    pub(crate) fn is_busy(&self, worker: WorkerId) -> bool {
        !matches!(self.staff.state(worker), State::Vacant | State::Starting { .. } | State::Idle { .. } | State::Dying)
    }

    /// Whether a worker has a lease to serve, and nothing else from here.
    pub(crate) fn is_serving(&self, worker: WorkerId) -> bool {
        matches!(self.staff.state(worker), State::Serving { .. })
    }

    /// Whether a worker runs a call that it was given here.
    pub(crate) fn is_running(&self, worker: WorkerId) -> bool {
        matches!(self.staff.state(worker), State::Running { .. })
    }

    /// A worker is dead, and everything it published before has been taken in. `started` tells whether it had begun
    /// on the first call it had, `requests` gives the payloads back of those it had, `mourners` are the workers who knew it.
    pub(crate) fn died(
        &mut self,
        now_ns: u64,
        worker: WorkerId,
        cause: Cause,
        started: bool,
        mut requests: Vec<(CallKey, P)>,
        mourners: u64,
    ) {
        let state = self.staff.state(worker);
        let runs: Vec<CallKey> = self.staff.runs(worker).into_iter().chain(self.staff.batch(worker)).collect();
        // A request it was about to be given is one it never saw.
        let unsent = self.recall(worker);
        let started = started && !unsent.iter().any(|(call, _)| state == State::Running { call: *call });
        requests.extend(unsent);
        self.staff.bury(worker, mourners);
        if let State::Starting { .. } = state {
            self.staff.failures = self.staff.failures.saturating_add(1);
            let doublings = (self.staff.failures - 1).min(32);
            let back_off = (BACK_OFF_NS << doublings).min(BACK_OFF_MAX_NS);
            self.staff.hire_after_ns = now_ns + back_off;
        }
        for post in &mut self.staff.posts {
            // The dead forget at once.
            post.mourners &= !(1 << worker);
        }
        self.abandon_all(|from| matches!(from, Waiter::Worker { worker: of, .. } if of == worker));
        let mut request_of = |runs: &CallKey| {
            let at = requests.iter().position(|(call, _)| call == runs)?;
            Some(requests.remove(at).1)
        };
        let ran: Vec<_> = runs.iter().map(|call| (*call, request_of(call))).collect();
        // Behind those: what it cannot have begun on.
        self.requeue(now_ns, requests);
        self.judge(now_ns, ran, cause, started);
        self.distribute(now_ns);
        self.leases_of_the_dead(now_ns, worker);
        let forgotten: Vec<WorkerId> = self
            .staff
            .numbered()
            .filter(|(mourner, post)| post.state == (State::Mourning { of: worker }) && mourners & (1 << mourner) == 0)
            .map(|(mourner, _)| mourner)
            .collect();
        for mourner in forgotten {
            self.employ(now_ns, mourner);
        }
        self.wake_by(now_ns);
    }

    /// Takes back what was decided about a worker that died before anybody did it. Gives the requests among it.
    fn recall(&mut self, dead: WorkerId) -> Vec<(CallKey, P)> {
        let mut requests = Vec::new();
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::Dispatch { worker, call, payload, .. } if worker == dead => requests.push((call, payload)),
                Action::TellCancelled { worker, .. }
                | Action::Batch { worker, .. }
                | Action::Join { worker, .. }
                | Action::Withdraw { worker }
                | Action::Signal { worker, .. }
                | Action::Retire { worker }
                    if worker == dead => {}
                Action::Revoke { callee, .. } if callee == dead => {}
                Action::Lend { lease, worker, .. } if worker == dead => self.lease_unlent(lease),
                Action::Grant { caller, callee, .. } if caller == dead || callee == dead => {}
                Action::Open { lease, caller, callee, .. } if caller == dead || callee == dead => {
                    self.lease_unopened(lease);
                }
                action => self.actions.push_back(action),
            }
        }
        requests
    }

    /// The verdict on the calls a dead worker ran, one or a batch (faults.md): never started means nothing happened.
    fn judge(&mut self, now_ns: u64, ran: Vec<(CallKey, Option<P>)>, cause: Cause, started: bool) {
        let function = ran.iter().find_map(|(key, _)| Some(self.calls.get(place(*key))?.function));
        let Some(function) = function.map(usize::from) else { return };
        if let Some((key, _)) = ran.first()
            && let Waiter::Join { run, of } = self.calls[place(*key)].from
        {
            return self.judge_join(now_ns, run, of, ran, cause, started);
        }
        let mut may_again = true;
        if started && cause.is_the_functions() {
            self.lost_to(now_ns, function);
            may_again = self.circuits[function].refuses(now_ns).is_none();
        }
        let mut together = Vec::new();
        for (key, request) in ran {
            if self.judge_one(key, cause, started, may_again, request) {
                together.push(key);
            }
        }
        if let (Ok(function), false) = (u16::try_from(function), together.is_empty()) {
            self.batch_again(function, together);
        }
    }

    /// The same of messages: back to the mailbox with those that were not begun on, or may run again. Whoever answered for the first had done with all.
    fn judge_join(
        &mut self,
        now_ns: u64,
        run: super::join::RunId,
        of: usize,
        ran: Vec<(CallKey, Option<P>)>,
        cause: Cause,
        started: bool,
    ) {
        let was_done = ran.len() < of;
        // All of them or none: one may have been on its way to the worker, in parts.
        let is_whole = ran.iter().all(|(_, request)| request.is_some());
        let mut function = None;
        for (key, request) in ran {
            let call = self.calls.remove(place(key));
            function = Some(usize::from(call.function));
            let again = is_whole && !was_done && !call.abandoned && (!started || call.idempotent);
            match request {
                Some(payload) if again => self.actions.push_back(Action::Unjoin { run, payload }),
                request => {
                    self.actions.extend(request.map(Action::Discard));
                    if !call.abandoned {
                        let lost = || self.worker_lost(cause, usize::from(call.function), started);
                        let failure = if was_done { None } else { Some(lost()) };
                        self.actions.push_back(Action::Joined { run, failure });
                    }
                }
            }
        }
        if let Some(function) = function.filter(|_| started && cause.is_the_functions()) {
            self.lost_to(now_ns, function);
        }
    }

    /// Whether the call is to be run again in a batch.
    fn judge_one(&mut self, key: CallKey, cause: Cause, started: bool, may_again: bool, request: Option<P>) -> bool {
        let Some(call) = self.call(key) else { return false };
        call.attempts += 1;
        let may_again = may_again && call.attempts <= super::ATTEMPTS_MAX && (!started || call.idempotent);
        let again = may_again && !call.abandoned;
        let (from, function, abandoned) = (call.from, usize::from(call.function), call.abandoned);
        match request {
            Some(payload) if again => {
                let is_batched = u16::try_from(function).is_ok_and(|function| self.batches.has(function));
                self.call(key).expect("looked up above").payload = Some(payload);
                if !is_batched {
                    self.queue.push_first(super::lane_of(from), key);
                }
                return is_batched;
            }
            request => {
                self.calls.remove(place(key));
                if let Some(payload) = request {
                    self.actions.push_back(Action::Discard(payload));
                }
                if !abandoned {
                    self.answer(from, Outcome::Failed(self.worker_lost(cause, function, started)));
                }
            }
        }
        false
    }

    /// How a call ends whose worker died with it.
    pub(super) fn worker_lost(&self, cause: Cause, function: usize, started: bool) -> CallError {
        let what = if started { "may have run" } else { "did not run" };
        CallError::new(Code::WorkerLost, format!("its worker {cause}; `{}` {what}", self.functions[function]))
    }

    /// A worker has a grace to come back, or to exit; then it is killed.
    pub(super) fn grant_grace(&mut self, now_ns: u64, worker: WorkerId) {
        self.staff.overdue(worker, now_ns + self.bounds.grace_ns);
        self.wake_by(now_ns + self.bounds.grace_ns);
    }

    /// A worker exits by itself, and is replaced.
    pub(super) fn dismiss(&mut self, now_ns: u64, worker: WorkerId) {
        self.staff.set(worker, State::Dying);
        self.grant_grace(now_ns, worker);
    }

    /// Worker `by` has let go of everything that bound it to the last worker in the place of `gone`.
    pub(crate) fn forgotten(&mut self, now_ns: u64, by: WorkerId, gone: WorkerId) {
        self.staff.posts[usize::from(gone)].mourners &= !(1 << by);
        if self.staff.state(by) == (State::Mourning { of: gone }) {
            self.staff.on_time(by);
            self.employ(now_ns, by);
        }
        self.wake_by(now_ns);
    }

    /// Replaces the missing, retires the superfluous, deals with the overdue.
    pub(super) fn mind_staff(&mut self, now_ns: u64) {
        let mut due = Vec::new();
        for (worker, post) in (0..).zip(&mut self.staff.posts).skip(1) {
            if let State::Starting { since_ns } = post.state {
                post.overdue.get_or_insert((since_ns + self.bounds.start_ns, true));
            }
            if let Some((at_ns, warned)) = post.overdue
                && at_ns <= now_ns
            {
                let signal = if warned { Signal::Kill } else { Signal::Terminate };
                due.push(Action::Signal { worker, signal });
                post.overdue = Some((now_ns + self.bounds.grace_ns, true));
            }
        }
        self.actions.extend(due);
        let next = self.staff.posts.iter().filter_map(|post| post.overdue).map(|(at_ns, _)| at_ns).min();
        self.wake_by(next.unwrap_or(u64::MAX));
        // While draining, only calls that wait are worth a new worker.
        let wanted = !self.draining || !self.queue.is_empty();
        while wanted && self.staff.count() < usize::from(self.bounds.workers) && self.hire(now_ns) {}
        if self.staff.surplus(self.bounds.workers) {
            let longest = self.staff.numbered().filter_map(|(worker, post)| match post.state {
                State::Idle { since_ns } => Some((since_ns + SURPLUS_IDLE_NS, worker)),
                _ => None,
            });
            match longest.max_by_key(|(_, worker)| *worker) {
                Some((at_ns, worker)) if at_ns <= now_ns => {
                    self.dismiss(now_ns, worker);
                    self.actions.push_back(Action::Retire { worker });
                }
                Some((at_ns, _)) => self.wake_by(at_ns),
                None => {}
            }
        }
    }
}
