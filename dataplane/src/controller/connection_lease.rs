//! Leased connections: a client that calls one function, one call at a time, talks to a worker without us until somebody else needs
//! the worker, the client does something else, or one of them dies.
//!
//! ```text
//! hot ──Lend──► Lending ──may_lend──► Lent ──revoke──► Revoking ──returned──► gone
//!                  │                   └────────returned, outlived───────────▲
//!                  └── lend_failed, client gone ─────────────────────────────┘
//! ```
//! Nothing is at risk while it is lent: the runtime sees what the worker says of its calls in its segment, and the kernel counts what it moved.

use super::{Action, CallError, Caller, Cause, Controller, Keep, Outcome, State, Terms, Violation, WorkerId};
use crate::numbered::NumberMap;
use crate::wire::BUDGET_MAX_NS;

/// Calls of one function in a row, each alone, each answered, that make a client hot ([`super::Bounds::hot_calls`]). Handing the socket over
/// and back costs as much as some twenty hops.
pub(crate) const HOT_CALLS: u8 = 32;
/// Calls that a hot client makes before it is tried again when something was under way on its connection.
const AGAIN_CALLS: u8 = 4;
/// Longest input or output of a call that may be a hot client's: of longer ones the bytes cost more than the hops.
const HOT_BYTES_MAX: usize = 1 << 20;

/// What one client has done last.
#[derive(Debug, Default)]
struct Heat {
    function: u16,
    /// Calls in a row.
    calls: u8,
    /// The call that is open is one more of them, so far.
    counts: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Lending,
    Lent,
    /// Looked at first then; 0: not yet.
    Revoking {
        looked_at_ns: u64,
    },
}

#[derive(Debug)]
struct Lent {
    connection: u64,
    worker: WorkerId,
    function: u16,
    phase: Phase,
    /// The client is no more.
    gone: bool,
}

/// Connections that are lent, and how hot the others are.
#[derive(Debug, Default)]
pub(super) struct ConnectionLeases {
    heat: NumberMap<Heat>,
    lent: NumberMap<Lent>,
    counts: LeaseCounts,
}

/// Leases of connections so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LeaseCounts {
    pub(crate) granted: u64,
    /// At rest.
    pub(crate) returned: u64,
    /// With something under way, or with the client gone.
    pub(crate) broken: u64,
}

impl ConnectionLeases {
    /// Connections that somebody else has.
    pub(super) fn count(&self) -> usize {
        self.lent.len()
    }

    /// A lease that there is ends: at rest, or with something under way.
    fn end(&mut self, lease: u64, in_order: bool) -> Lent {
        let LeaseCounts { returned, broken, .. } = &mut self.counts;
        *(if in_order { returned } else { broken }) += 1;
        self.lent.remove(&lease).expect("its caller found it")
    }

    fn of(&self, worker: WorkerId) -> Option<(u64, &Lent)> {
        self.lent.iter().find(|(_, lent)| lent.worker == worker).map(|(lease, lent)| (*lease, lent))
    }
}

impl<P: Keep> Controller<P> {
    /// A client calls: what that says about it.
    pub(super) fn warm(&mut self, connection: u64, function: u16, terms: Terms, payload: &P) {
        let alone = self.connections.get(&connection) == Some(&1);
        let plain =
            !terms.fire && terms.once.is_none() && !self.batches.has(function) && payload.len_bytes() <= HOT_BYTES_MAX;
        let heat = self.connection_leases.heat.entry(connection).or_default();
        heat.counts = alone && plain;
        if !heat.counts || heat.function != function {
            (heat.function, heat.calls) = (function, 0);
        }
    }

    /// A client's call was answered by `worker`: perhaps it is hot by now, and `worker` has nothing else to do.
    pub(super) fn consider_lending(&mut self, connection: u64, worker: WorkerId, answered: &Outcome<P>) {
        let is_small = |payload: &P| payload.len_bytes() <= HOT_BYTES_MAX;
        let fine = matches!(answered, Outcome::Done { payload, .. } if is_small(payload));
        let Some(heat) = self.connection_leases.heat.get_mut(&connection) else { return };
        heat.calls = if fine && heat.counts { heat.calls.saturating_add(1) } else { 0 };
        let wanted = heat.calls >= self.bounds.hot_calls
            && !self.draining
            && self.queue.is_empty()
            && self.staff.ahead() == 0
            && matches!(self.staff.state(worker), State::Idle { .. })
            // This one is still counted.
            && self.connections.get(&connection) == Some(&1)
            // A call that its worker forwarded was answered before the connection is back.
            && !self.connection_leases.lent.values().any(|lent| lent.connection == connection);
        if !wanted {
            return;
        }
        heat.calls = 0;
        let function = heat.function;
        self.leases_granted += 1;
        let lease = self.leases_granted;
        let lent = Lent { connection, worker, function, phase: Phase::Lending, gone: false };
        self.connection_leases.lent.insert(lease, lent);
        self.staff.set(worker, State::Connected { lease });
        self.actions.push_back(Action::Lend { lease, connection, worker, function });
    }

    /// Whether a connection may still be lent, now that its answer is on its way. It counts as lent then.
    pub(crate) fn may_lend(&mut self, now_ns: u64, lease: u64) -> bool {
        match self.connection_leases.lent.get_mut(&lease) {
            None => false,
            // Somebody began to wait for the worker meanwhile.
            Some(lent) if lent.gone || !self.queue.is_empty() => {
                self.unlend(now_ns, lease);
                false
            }
            Some(lent) => {
                lent.phase = Phase::Lent;
                self.connection_leases.counts.granted += 1;
                true
            }
        }
    }

    /// Nothing was lent after all.
    fn unlend(&mut self, now_ns: u64, lease: u64) {
        if let Some(lent) = self.connection_leases.lent.remove(&lease) {
            self.employ(now_ns, lent.worker);
        }
    }

    /// Something was under way on the connection: it stays, and is tried again soon.
    pub(crate) fn lend_failed(&mut self, now_ns: u64, lease: u64) {
        let connection = self.connection_leases.lent.get(&lease).map(|lent| lent.connection);
        self.connection_leases.counts.granted -= 1;
        if let Some(heat) = connection.and_then(|connection| self.connection_leases.heat.get_mut(&connection)) {
            heat.calls = self.bounds.hot_calls.saturating_sub(AGAIN_CALLS);
        }
        self.unlend(now_ns, lease);
    }

    /// The connection that a worker has: its lease, its number, and whether the client is still there.
    pub(crate) fn connection_of(&self, worker: WorkerId) -> Option<(u64, u64, bool)> {
        self.connection_leases.of(worker).map(|(lease, lent)| (lease, lent.connection, !lent.gone))
    }

    /// Whether somebody else has connections of ours.
    pub(crate) fn lends(&self) -> bool {
        self.connection_leases.count() > 0
    }

    pub(crate) fn lease_counts(&self) -> LeaseCounts {
        self.connection_leases.counts
    }

    /// Connections whose workers could be had for others, and those that are on their way back.
    pub(super) fn lent_and_returning(&self) -> (Vec<u64>, usize) {
        let nests = |lent: &Lent| self.staff.nested(lent.worker) > 0;
        let all = &self.connection_leases.lent;
        let returning =
            all.values().filter(|lent| matches!(lent.phase, Phase::Revoking { .. }) && !nests(lent)).count();
        let mut lent: Vec<u64> =
            all.iter().filter(|(_, lent)| !matches!(lent.phase, Phase::Revoking { .. })).map(|(id, _)| *id).collect();
        // A function that nests may be waiting for one of the very calls that wait: last.
        lent.sort_unstable_by_key(|id| (nests(&all[id]), *id));
        (lent, returning)
    }

    /// Asks for a connection back.
    pub(super) fn revoke_connection(&mut self, lease: u64) {
        let Some(lent) = self.connection_leases.lent.get_mut(&lease) else { return };
        // Before that nobody has it yet, and whoever wants its worker is a moment too early.
        if lent.phase == Phase::Lent {
            lent.phase = Phase::Revoking { looked_at_ns: 0 };
            self.actions.push_back(Action::Revoke { lease, callee: lent.worker });
        }
    }

    pub(super) fn revoke_connections(&mut self) {
        let (lent, _) = self.lent_and_returning();
        lent.into_iter().for_each(|lease| self.revoke_connection(lease));
    }

    /// A client is gone. Whoever has its connection is to give it up.
    pub(super) fn cool(&mut self, connection: u64) {
        self.connection_leases.heat.remove(&connection);
        let found = self.connection_leases.lent.iter_mut().find(|(_, lent)| lent.connection == connection);
        if let Some((lease, lent)) = found.map(|(lease, lent)| (*lease, lent)) {
            lent.gone = true;
            self.revoke_connection(lease);
        }
    }

    /// A worker gave a connection back: in order, or with something under way. Gives its number, if the client is still there.
    pub(crate) fn connection_returned(
        &mut self,
        now_ns: u64,
        worker: WorkerId,
        lease: u64,
        in_order: bool,
        panicked: bool,
    ) -> Result<Option<u64>, Violation> {
        let Some(lent) = self.connection_leases.lent.get(&lease).filter(|lent| lent.worker == worker) else {
            return Err(Violation("it returned a connection that it does not have"));
        };
        if lent.phase == Phase::Lending {
            return Err(Violation("it returned a connection that it does not have yet"));
        }
        let lent = self.connection_leases.end(lease, in_order);
        self.staff.on_time(worker);
        if panicked {
            self.lost_to(now_ns, usize::from(lent.function));
            self.dismiss(now_ns, worker);
        } else {
            self.circuits[usize::from(lent.function)].worked();
            self.employ(now_ns, worker);
        }
        Ok((!lent.gone).then_some(lent.connection))
    }

    /// What a worker says of its connection: that it runs a call with this deadline, or none; and whether that has been so for a while.
    pub(crate) fn connection_looked_at(
        &mut self,
        now_ns: u64,
        worker: WorkerId,
        runs_until_ns: Option<u64>,
        is_idle: bool,
    ) {
        let found = self.connection_leases.lent.iter_mut().find(|(_, lent)| lent.worker == worker);
        let Some((&lease, lent)) = found else { return };
        // A worker that runs nothing and does not let go either. Whoever stalls in the middle of a frame is cut off long before.
        let keeps = match &mut lent.phase {
            Phase::Revoking { looked_at_ns } => {
                *looked_at_ns = if *looked_at_ns == 0 { now_ns } else { *looked_at_ns };
                now_ns > looked_at_ns.saturating_add(self.bounds.deadline_ns)
            }
            Phase::Lending | Phase::Lent => false,
        };
        match runs_until_ns {
            Some(deadline_ns) if deadline_ns > now_ns && deadline_ns <= now_ns + BUDGET_MAX_NS => {
                self.staff.on_time(worker)
            }
            None if !keeps => self.staff.on_time(worker),
            _ => self.grant_grace(now_ns, worker),
        }
        if is_idle {
            // It has to be earned again.
            self.revoke_connection(lease);
        }
    }

    /// A worker died with a connection. `running` is the call that it ran and had not begun to answer, with its deadline; without it,
    /// and with the connection whole (`in_order`), nothing happened to anybody. To be told before [`Controller::died`].
    pub(crate) fn connection_outlived(
        &mut self,
        now_ns: u64,
        worker: WorkerId,
        cause: Cause,
        in_order: bool,
        running: Option<(u64, u64)>,
    ) {
        let Some((lease, _)) = self.connection_leases.of(worker) else { return };
        let lent = self.connection_leases.end(lease, in_order);
        let Some((call, deadline_ns)) = running else { return };
        let function = usize::from(lent.function);
        if cause.is_the_functions() {
            self.lost_to(now_ns, function);
        }
        if lent.gone || !in_order {
            return;
        }
        let error = if deadline_ns <= now_ns {
            CallError::timed_out_running()
        } else {
            self.worker_lost(cause, function, true)
        };
        let to = Caller::Client { connection: lent.connection, call };
        self.actions.push_back(Action::Answer { to, outcome: Outcome::Failed(error) });
    }

    /// A worker died before it was lent anything.
    pub(super) fn lease_unlent(&mut self, lease: u64) {
        self.connection_leases.lent.remove(&lease);
    }
}
