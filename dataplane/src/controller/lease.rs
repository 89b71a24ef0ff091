//! Leases: worker A may call worker B without us until B is needed elsewhere or one of them dies.
//!
//! ```text
//! offer ──Grant──► Granted ──taken──Open──► Open ──revoke──► Revoking ──closed──End──► Ended ──dropped──► gone
//!                     └────────────── revoke ──End──────────────────────────────────────▲
//! ```
//! The caller is told first: it prepares its ring and says from which position on it will use it; only then is the
//! callee told to serve. Until `Open` the callee knows nothing, so a lease its caller never took up is taken back
//! without asking anybody. A pair is not leased again before its caller has acknowledged the end of the last lease.

use super::{Action, Controller, Keep, State, Violation, WorkerId};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Granted,
    Open,
    Revoking,
    Ended,
}

#[derive(Debug)]
pub(super) struct Lease {
    pub(super) caller: WorkerId,
    pub(super) callee: WorkerId,
    phase: Phase,
}

impl<P: Keep> Controller<P> {
    /// `callee` just answered a nested call of `caller` and nobody else needs it: the next call can go directly.
    pub(super) fn offer_lease(&mut self, caller: WorkerId, callee: WorkerId) {
        let wanted = self.bounds.leases
            && self.queue.is_empty()
            && self.staff.ahead() == 0
            && matches!(self.staff.state(callee), State::Idle { .. })
            && matches!(
                self.staff.state(caller),
                State::Running { .. } | State::Serving { .. } | State::Connected { .. }
            )
            && !self.leases.values().any(|lease| lease.caller == caller);
        if !wanted {
            return;
        }
        self.leases_granted += 1;
        let lease = self.leases_granted;
        self.leases.insert(lease, Lease { caller, callee, phase: Phase::Granted });
        self.staff.set(callee, State::Serving { lease });
        self.actions.push_back(Action::Grant { lease, caller, callee });
    }

    /// Grants no more leases.
    pub(crate) fn forbid_leases(&mut self) {
        self.bounds.leases = false;
    }

    /// Who waits for a worker of `waiting` under a lease, with those of `waiting`: a leased callee that nests runs a call
    /// of its caller.
    pub(super) fn waiting_with_leases(&self, mut waiting: u64) -> u64 {
        loop {
            let callers = self.leases.values().filter(|lease| {
                matches!(lease.phase, Phase::Open | Phase::Revoking) && waiting & (1 << lease.callee) != 0
            });
            let more = callers.fold(waiting, |mask, lease| mask | 1 << lease.caller);
            if more == waiting {
                return waiting;
            }
            waiting = more;
        }
    }

    /// Calls wait: takes leased workers back, as many as there are calls to serve.
    pub(super) fn make_room(&mut self, now_ns: u64) {
        // A callee that nests may be waiting for one of these very calls: it is nobody who is on the way, and is taken back last. It is
        // taken back all the same: it may have returned and left its nested calls alone.
        let nests = |lease: &Lease| self.staff.nested(lease.callee) > 0;
        let on_their_way = self.leases.values().filter(|lease| lease.phase == Phase::Revoking && !nests(lease)).count();
        // Of clients' connections first: their next call comes to us and no function has to start over.
        let (connections, returning) = self.lent_and_returning();
        let mut connections = connections.into_iter();
        for _ in on_their_way + returning..self.queue.len() {
            if let Some(lease) = connections.next() {
                self.revoke_connection(lease);
                continue;
            }
            let leased = self.leases.iter().filter(|(_, lease)| matches!(lease.phase, Phase::Granted | Phase::Open));
            let first = leased.min_by_key(|(id, lease)| (self.staff.nested(lease.callee) > 0, **id));
            let Some(id) = first.map(|(id, _)| *id) else { break };
            self.revoke(now_ns, id);
        }
        self.wake_by(now_ns + super::LOOK_NS);
    }

    fn revoke(&mut self, now_ns: u64, id: u64) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        let (caller, callee) = (lease.caller, lease.callee);
        match lease.phase {
            Phase::Granted => {
                lease.phase = Phase::Ended;
                self.actions.push_back(Action::End { lease: id, caller });
                self.employ(now_ns, callee);
            }
            Phase::Open => {
                lease.phase = Phase::Revoking;
                self.actions.push_back(Action::Revoke { lease: id, callee });
            }
            Phase::Revoking | Phase::Ended => {}
        }
    }

    /// The caller is ready to call from `position` of its ring on.
    pub(crate) fn lease_taken(&mut self, caller: WorkerId, id: u64, position: u64) -> Result<(), Violation> {
        let Some(lease) = self.leases.get_mut(&id).filter(|lease| lease.caller == caller) else {
            // The callee died meanwhile; the caller has been told.
            return if id <= self.leases_granted { Ok(()) } else { Err(Violation("a lease that was never granted")) };
        };
        if lease.phase == Phase::Granted {
            lease.phase = Phase::Open;
            self.actions.push_back(Action::Open { lease: id, caller, callee: lease.callee, position });
        }
        Ok(())
    }

    /// The callee has stopped accepting.
    pub(crate) fn lease_closed(&mut self, now_ns: u64, callee: WorkerId, id: u64) -> Result<(), Violation> {
        let Some(lease) = self.leases.get_mut(&id) else {
            return if id <= self.leases_granted { Ok(()) } else { Err(Violation("a lease that was never granted")) };
        };
        if lease.callee != callee || lease.phase != Phase::Revoking {
            return Err(Violation("closed a lease that was not revoked"));
        }
        lease.phase = Phase::Ended;
        self.actions.push_back(Action::End { lease: id, caller: lease.caller });
        self.staff.on_time(callee);
        self.employ(now_ns, callee);
        Ok(())
    }

    /// The caller knows that it is over.
    pub(crate) fn lease_dropped(&mut self, caller: WorkerId, id: u64) {
        if self.leases.get(&id).is_some_and(|lease| lease.caller == caller && lease.phase == Phase::Ended) {
            self.leases.remove(&id);
        }
    }

    /// A leased call ran past its deadline: whoever serves the lease has a grace to come back, then it is killed.
    pub(crate) fn lease_overrun(&mut self, now_ns: u64, caller: WorkerId, id: u64) {
        let Some(callee) = self.leases.get(&id).filter(|lease| lease.caller == caller).map(|lease| lease.callee) else {
            return;
        };
        self.revoke(now_ns, id);
        if self.staff.state(callee) == (State::Serving { lease: id }) {
            self.grant_grace(now_ns, callee);
        }
    }

    /// The callee was never told to serve: as if its caller had not taken the lease up yet.
    pub(super) fn lease_unopened(&mut self, id: u64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.phase = Phase::Granted;
        }
    }

    /// Whether some worker has a lease on another.
    pub(crate) fn has_leases(&self) -> bool {
        !self.leases.is_empty()
    }

    /// `dead` was one end of leases. Its callers learn of it as of any death; its callees are watched until they let go.
    pub(super) fn leases_of_the_dead(&mut self, now_ns: u64, dead: WorkerId) {
        let touched: Vec<u64> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.caller == dead || lease.callee == dead)
            .map(|(id, _)| *id)
            .collect();
        for id in touched {
            let lease = self.leases.remove(&id).expect("listed above");
            if lease.phase == Phase::Granted {
                // What was made for the callee's end is of no more use.
                self.actions.push_back(Action::End { lease: id, caller: lease.caller });
            }
            if lease.caller != dead || lease.phase == Phase::Ended {
                continue;
            }
            if lease.phase == Phase::Granted {
                self.employ(now_ns, lease.callee);
            } else {
                self.staff.set(lease.callee, State::Mourning { of: dead });
                self.staff.overdue(lease.callee, now_ns + self.bounds.deadline_ns);
            }
        }
    }
}
