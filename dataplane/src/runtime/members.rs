//! A table of members, from the connection that it came over to the peers that it is about.

use super::*;
use crate::members::{MembersError, Table};

impl Process {
    /// The control plane has sent a table; its text.
    pub(super) fn on_members(&mut self, now: u64, connection: u64, call: u64, text: Bytes) {
        let read = Table::parse(text.as_ref()).map_err(MembersError::Table);
        self.release(text);
        let taken = read.and_then(|table| self.peers.update(now, &table, &mut self.reactor, &mut self.store));
        if let Err(error) = &taken {
            tracing::warn!("a table of members was refused: {error}");
        }
        // Before the sender hears of it: whoever waits for a process that is gone is told.
        self.take_peers_in(now);
        self.clients.answer_members(connection, call, &taken);
    }
}
