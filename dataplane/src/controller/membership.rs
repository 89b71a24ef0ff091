//! Which other processes there are, by the last table that we were told. Decides; has no clock and no socket.
//!
//! A name gets a number when we first hear of it, and keeps it as long as this process lives, deleted or not: workers, mailbox and calls
//! know processes by their numbers, and none is ever taken for another. So the names that one life of ours can hear of are bounded, and
//! at the bound a table is refused.
//!
//! | from | to | what becomes of what is sent to it |
//! |---|---|---|
//! | any | active | goes there |
//! | any | swapped | waits, or is refused at once, as the policy says; what had waited waits on |
//! | any | stopped, deleted | ends as an error, and so does what had waited; that life is over for good |
//! | | not in the table | as deleted |

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;

use super::peers::PeerNumber;
use crate::members::{MEMBERS_MAX, MembersError, State, Table};

/// What became of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) peer: PeerNumber,
    pub(crate) to: State,
    /// We had never heard of it. New ones get the next numbers, in this order.
    pub(crate) is_new: bool,
    /// It has other addresses, or is of a later life than any we knew.
    pub(crate) moved: bool,
    /// Which life of it that is, if we were told.
    pub(crate) life: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    name: String,
    state: State,
    addresses: Vec<SocketAddr>,
    /// The latest life that we met or were told of; 0: none.
    life: u64,
    /// That life is over.
    is_over: bool,
}

impl Known {
    /// The earliest life that it may have now.
    fn least(&self) -> u64 {
        self.life.saturating_add(u64::from(self.is_over && self.life > 0))
    }

    fn enter(&mut self, state: State) {
        self.is_over |= matches!(state, State::Stopped | State::Deleted);
        self.state = state;
    }
}

/// The other processes of an application, as this one was told last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Membership {
    own_name: String,
    own_life: u64,
    members_max: usize,
    names_max: usize,
    generation: u64,
    /// By number.
    known: Vec<Known>,
    numbers: HashMap<String, PeerNumber>,
}

impl Membership {
    /// Nobody but ourselves, before any table. `members_max`: of others that are not deleted, at a time.
    pub(crate) fn new(own_name: &str, own_life: u64, members_max: usize) -> Membership {
        Membership {
            own_name: own_name.to_owned(),
            own_life,
            members_max,
            names_max: MEMBERS_MAX,
            generation: 0,
            known: Vec::new(),
            numbers: HashMap::new(),
        }
    }

    /// What we start with, of whichever generation.
    ///
    /// # Errors
    /// As [`Membership::update`], but `Stale`.
    pub(crate) fn begin(&mut self, table: &Table) -> Result<Vec<Change>, MembersError> {
        self.check(table)?;
        Ok(self.apply(table))
    }

    /// Takes a table in place of the one before. What has changed, new ones in the order of their numbers.
    ///
    /// # Errors
    /// It is not newer, or contradicts what is known. Nothing has changed.
    pub(crate) fn update(&mut self, table: &Table) -> Result<Vec<Change>, MembersError> {
        let (found, known) = (table.generation(), self.generation);
        if found <= known {
            return Err(MembersError::Stale { found, known });
        }
        self.begin(table)
    }

    fn check(&self, table: &Table) -> Result<(), MembersError> {
        let (mut others, mut new) = (0, 0);
        for (line, member) in table.lines() {
            let name = &member.name;
            if *name == self.own_name {
                if member.state != State::Active {
                    return Err(MembersError::OwnState { line, name: name.clone(), state: member.state });
                }
                let own = self.own_life;
                if let Some(found) = member.incarnation.filter(|found| *found != own) {
                    return Err(MembersError::OwnLife { line, name: name.clone(), found, own });
                }
                continue;
            }
            others += usize::from(member.state != State::Deleted);
            let Some(known) = self.number_of(name).map(|number| &self.known[number]) else {
                new += usize::from(member.state != State::Deleted);
                continue;
            };
            // Whoever numbers tables may not know yet of a later life that we have met, and that is no contradiction where it was. But an earlier life
            // is not somewhere else, one that is over is nowhere, and that one has stopped says nothing of the next.
            let is_elsewhere = !member.addresses.is_empty() && member.addresses != known.addresses;
            let least = match member.state {
                State::Active | State::Swapped if known.is_over => known.least(),
                State::Active | State::Swapped if is_elsewhere => known.life,
                State::Stopped => known.life,
                _ => 0,
            };
            if let Some(found) = member.incarnation.filter(|found| *found < least) {
                return Err(MembersError::Life { line, name: name.clone(), found, least });
            }
        }
        let (found, max) = (others, self.members_max);
        if found > max {
            return Err(MembersError::TooMany { found, max });
        }
        let (known, max) = (self.known.len(), self.names_max);
        if known + new > max {
            return Err(MembersError::Names { known, new, max });
        }
        Ok(())
    }

    fn apply(&mut self, table: &Table) -> Vec<Change> {
        self.generation = table.generation();
        let mut changes = Vec::new();
        let mut is_listed = vec![false; self.known.len()];
        for member in table.members() {
            if member.name == self.own_name {
                continue;
            }
            let (peer, is_new) = match self.number_of(&member.name) {
                Some(peer) => (peer, false),
                // Of whom nobody here ever heard, nobody asks.
                None if member.state == State::Deleted => continue,
                None => (self.learn(&member.name), true),
            };
            if let Some(listed) = is_listed.get_mut(peer) {
                *listed = true;
            }
            let known = &mut self.known[peer];
            let is_later = member.incarnation.is_some_and(|life| life > known.life);
            let is_elsewhere = !member.addresses.is_empty() && member.addresses != known.addresses;
            if is_later {
                (known.life, known.is_over) = (member.incarnation.unwrap_or(known.life), false);
            }
            if is_elsewhere {
                known.addresses.clone_from(&member.addresses);
            }
            let moved = is_later || is_elsewhere;
            if is_new || moved || known.state != member.state {
                known.enter(member.state);
                changes.push(Change { peer, to: member.state, is_new, moved, life: member.incarnation });
            }
        }
        for (peer, known) in self.known[..is_listed.len()].iter_mut().enumerate() {
            if !is_listed[peer] && known.state != State::Deleted {
                known.enter(State::Deleted);
                changes.push(Change { peer, to: State::Deleted, is_new: false, moved: false, life: None });
            }
        }
        changes
    }

    fn learn(&mut self, name: &str) -> PeerNumber {
        let peer = self.known.len();
        let (name, addresses) = (name.to_owned(), Vec::new());
        self.numbers.insert(name.clone(), peer);
        self.known.push(Known { name, state: State::Deleted, addresses, life: 0, is_over: false });
        peer
    }

    /// A life of a member has proved itself to us.
    pub(crate) fn met(&mut self, peer: PeerNumber, life: u64) {
        let known = &mut self.known[peer];
        if life > known.life {
            (known.life, known.is_over) = (life, false);
        }
    }

    // ---- questions --------------------------------------------------------------------------------------------

    /// Of the table in force; 0 before the first.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The number of a process that we have heard of, deleted or not.
    pub(crate) fn number_of(&self, name: &str) -> Option<PeerNumber> {
        self.numbers.get(name).copied()
    }

    /// The name of a number that was given.
    pub(crate) fn name_of(&self, peer: PeerNumber) -> Option<&str> {
        self.known.get(peer).map(|known| &*known.name)
    }

    /// What a number that was given stands for is doing.
    pub(crate) fn state_of(&self, peer: PeerNumber) -> State {
        self.known[peer].state
    }

    /// Where to dial a member; not empty while it is active.
    pub(crate) fn addresses_of(&self, peer: PeerNumber) -> &[SocketAddr] {
        &self.known[peer].addresses
    }

    /// The earliest life of a member that is to be let in; 0: any.
    pub(crate) fn least_life_of(&self, peer: PeerNumber) -> u64 {
        self.known[peer].least()
    }

    /// Those in this state, in the order in which we heard of them.
    pub(crate) fn names_in(&self, state: State) -> impl Iterator<Item = &str> {
        self.known.iter().filter(move |known| known.state == state).map(|known| &*known.name)
    }
}
