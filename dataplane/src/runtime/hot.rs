//! The connection that brought something last, a client's or another process's. Most often it is the next one, too, so that it is looked at for
//! itself; and while we are awake and it calls again and again it is *hot*: read by system calls of its own. A ring brings many connections in one system call, and one 1.5 us later.

use super::*;

/// Looks at the last caller for one at everything: a read that finds nothing, or the next call, instead of a wait and a read. 0.4 of
/// the 10 us of a call.
const LOOKS_PER_POLL: u32 = 16;
/// Reads that brought requests of one connection, without a sleep or another caller between, from which on it is hot.
const READS_TO_HEAT: u32 = 16;

#[derive(Debug)]
pub(super) struct LastCaller {
    /// As the reactor knows the connection.
    token: usize,
    /// Since we slept, or another called.
    reads: u32,
    is_hot: bool,
    /// Since everybody was looked at.
    looks: u32,
}

impl Process {
    /// This connection brought requests.
    pub(super) fn warm_up(&mut self, token: usize) {
        if let Some(last) = self.last_caller.as_mut().filter(|last| last.token == token) {
            last.reads = last.reads.saturating_add(1);
            if last.reads >= READS_TO_HEAT {
                self.heat();
            }
            return;
        }
        self.cool();
        self.last_caller = Some(LastCaller { token, reads: 1, is_hot: false, looks: 0 });
    }

    /// This connection brought a part of a payload. Another is on its way: worth reading without the ring at once.
    pub(super) fn warm_up_in_pieces(&mut self, token: usize) {
        let in_pieces = || match token {
            PEERS.. => self.peers.in_pieces(token),
            _ => self.clients.in_pieces(token - CLIENTS),
        };
        if self.last_caller.as_ref().is_some_and(|last| last.token == token) && in_pieces() {
            self.heat();
        }
    }

    /// The last caller is hot from now on, if we are awake enough for that.
    fn heat(&mut self) {
        if let Some(last) = self.last_caller.as_mut().filter(|last| !last.is_hot)
            && self.placement.controller_patience() != Patience::NONE
        {
            last.is_hot = true;
            match last.token {
                PEERS.. => self.peers.heat(last.token, &mut self.reactor),
                token => self.clients.heat(token - CLIENTS, &mut self.reactor),
            }
        }
    }

    /// The reactor tells of everybody again.
    pub(super) fn cool(&mut self) {
        if let Some(last) = &mut self.last_caller {
            last.reads = 0;
            if std::mem::take(&mut last.is_hot) {
                match last.token {
                    PEERS.. => self.peers.cool(last.token, &mut self.reactor),
                    token => self.clients.cool(token - CLIENTS, &mut self.reactor),
                }
            }
        }
    }

    /// This connection of a client is gone, or somebody else's.
    pub(super) fn forget(&mut self, index: usize) {
        self.last_caller.take_if(|last| last.token == CLIENTS + index);
    }

    /// Everybody is looked at now.
    pub(super) fn end_looks(&mut self) {
        if let Some(last) = &mut self.last_caller {
            last.looks = 0;
        }
    }

    /// Looks at the last caller alone. Whether something had come; `None` when it is everybody's turn.
    pub(super) fn look_at_last_caller(&mut self, now: u64) -> Option<bool> {
        let last = self.last_caller.as_mut()?;
        if last.looks >= LOOKS_PER_POLL || !(last.is_hot || self.reactor.kind() == Kind::Epoll) {
            return None;
        }
        last.looks += 1;
        let (found, unfinished) = match last.token {
            token @ PEERS.. => (self.on_peer(now, token), self.peers.unfinished()),
            token => (self.on_client(now, token - CLIENTS, true), self.clients.unfinished()),
        };
        if unfinished && let Some(last) = &mut self.last_caller {
            // It brought more than one look takes.
            last.looks = LOOKS_PER_POLL;
        }
        Some(found)
    }
}
