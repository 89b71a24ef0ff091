//! What a table of members does to links and parcels, as `controller::membership` decides.

use super::*;
use crate::config::ConfigError;
use crate::controller::membership::Change;
use crate::members::{MembersError, State, Table};

const STOPPED: &str = "the other process was stopped or deleted; it may have had it";

impl Peers {
    /// Takes in what the configuration tells, if anything. Nobody is dialed before [`Peers::admit`].
    pub(super) fn begin(&mut self, config: &ProcessConfig) -> Result<(), ConfigError> {
        if let Some((from, table)) = config.first_members()? {
            let changes = self.membership.begin(&table).map_err(|error| ConfigError::Members { from, error })?;
            changes.into_iter().for_each(|change| self.enter(now_ns(), change));
        }
        Ok(())
    }

    /// Takes in a table that the control plane has sent, and gives its generation.
    ///
    /// # Errors
    /// It is stale, or contradicts what is known. Nothing has changed.
    pub(in crate::runtime) fn update(
        &mut self,
        now: u64,
        table: &Table,
        reactor: &mut Carrier,
        store: &mut Store,
    ) -> Result<u64, MembersError> {
        let changes = self.membership.update(table)?;
        for change in &changes {
            self.enter(now, *change);
        }
        self.act(now, reactor, store);
        // What was on a link is dropped after the link.
        for Change { peer, to, is_new, .. } in &changes {
            if matches!(to, State::Stopped | State::Deleted) && !is_new {
                self.targets[*peer].outbox.close();
                self.note_ends(*peer);
                self.arrivals.push_back(Arrival::Over { peer: *peer, text: STOPPED });
            }
        }
        let (generation, changes) = (self.membership.generation(), changes.len());
        tracing::info!(
            "members generation={generation} active={} changes={changes}",
            self.names_in(State::Active).count()
        );
        Ok(generation)
    }

    fn enter(&mut self, now: u64, change: Change) {
        let Change { peer, to, is_new, moved, life } = change;
        let name = self.membership.name_of(peer).expect("it has its number from there");
        tracing::debug!("member={name} state={to}");
        if is_new {
            assert_eq!(self.peering.add(name), peer, "both count on");
            self.targets.push(Target::new(name, self.bounds));
        }
        if to != State::Active {
            return self.peering.deactivate(peer, self.membership.least_life_of(peer));
        }
        if moved {
            self.targets[peer].said.clear();
        }
        self.peering.activate(now, peer, life, moved);
        if self.dial == Dial::Start || self.targets[peer].outbox.holds().0 > 0 {
            self.peering.want(peer);
        }
    }

    /// Whether this may be sent to a peer now, or wait for it.
    ///
    /// # Errors
    /// The code, and what its sender is told.
    pub(super) fn may_post(&self, peer: PeerNumber, kind: &Kind) -> Result<(), (Code, String)> {
        let name = || self.name_of(peer).unwrap_or("?");
        // What belongs to a call that was taken is no new business: it waits.
        let is_new = matches!(kind, Kind::Message | Kind::Call { .. });
        match self.membership.state_of(peer) {
            State::Active => Ok(()),
            State::Swapped if self.when_swapped == WhenSwapped::Wait || !is_new => Ok(()),
            State::Swapped => {
                let text =
                    format!("process {} is swapped out, and this one does not wait for it (--when-swapped)", name());
                Err((Code::Swapped, text))
            }
            State::Stopped => Err((Code::PeerLost, format!("process {} has stopped; it was not sent", name()))),
            State::Deleted => Err((Code::UnknownProcess, name().to_owned())),
        }
    }

    // ---- questions --------------------------------------------------------------------------------------------

    /// How many others there are, whatever they are doing.
    pub(in crate::runtime) fn count(&self) -> usize {
        [State::Active, State::Swapped, State::Stopped].map(|state| self.names_in(state).count()).iter().sum()
    }

    /// The number of a process that we ever heard of.
    pub(in crate::runtime) fn number_of(&self, name: &str) -> Option<PeerNumber> {
        self.membership.number_of(name)
    }

    pub(in crate::runtime) fn name_of(&self, peer: PeerNumber) -> Option<&str> {
        self.membership.name_of(peer)
    }

    pub(in crate::runtime) fn names_in(&self, state: State) -> impl Iterator<Item = &str> {
        self.membership.names_in(state)
    }

    /// Nothing more will come from it, under this name. A number that there is not may come from a worker that lies.
    pub(in crate::runtime) fn is_deleted(&self, peer: PeerNumber) -> bool {
        self.name_of(peer).is_some() && self.membership.state_of(peer) == State::Deleted
    }
}
