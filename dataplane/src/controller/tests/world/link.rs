//! Connections: pipes that keep order and, when they break, lose all that is under way from some frame on, each direction from its own.

use std::collections::VecDeque;

use super::load::Kind;
use super::*;
use crate::controller::peers::Word;
use crate::controller::post::Verdict;

pub(super) type ConnId = u64;

/// What one end says to the other.
#[derive(Debug, Clone)]
pub(super) enum Frame {
    // From a client.
    Hello {
        session: SessionId,
        number: u64,
    },
    Request {
        call: u64,
        function: u16,
        budget_ns: u64,
        terms: Terms,
        name: u64,
        bytes: usize,
    },
    Cancel {
        call: u64,
    },
    // To a client.
    Welcome {
        life: u64,
    },
    Answer {
        call: u64,
        code: Code,
        name: u64,
    },
    // Between processes: the hello, then what `peers.rs` and `post.rs` say.
    Greeted {
        life: u64,
    },
    Proof {
        life: u64,
    },
    Word(Word),
    Parcel {
        number: u64,
        confirmed: u64,
        kind: Kind,
        key: Arc<[u8]>,
        name: u64,
        bytes: usize,
    },
    Verdict {
        number: u64,
        verdict: Verdict,
    },
    /// The other end has closed it, or is no more.
    End,
}

/// Who has an end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Party {
    Client(usize),
    Process { node: NodeId, life: u64 },
}

#[derive(Debug, Default)]
struct Pipe {
    frames: VecDeque<Frame>,
    /// When the last of them arrives.
    last_ns: u64,
    /// Nothing goes in any more.
    is_cut: bool,
}

#[derive(Debug)]
pub(super) struct Conn {
    pub(super) ends: [Party; 2],
    /// `[0]` is what goes to the first end.
    pipes: [Pipe; 2],
}

impl World {
    pub(super) fn connect(&mut self, ends: [Party; 2]) -> ConnId {
        self.connections += 1;
        self.conns.insert(self.connections, Conn { ends, pipes: [Pipe::default(), Pipe::default()] });
        self.connections
    }

    /// Which end of a connection somebody has.
    pub(super) fn end_of(&self, conn: ConnId, who: Party) -> Option<usize> {
        self.conns.get(&conn)?.ends.iter().position(|end| *end == who)
    }

    /// How many frames are on their way to an end.
    pub(super) fn backlog(&self, conn: ConnId, to: usize) -> usize {
        self.conns.get(&conn).map_or(0, |conn| conn.pipes[to].frames.len())
    }

    /// Puts a frame on its way.
    pub(super) fn put(&mut self, conn: ConnId, to: usize, frame: Frame) {
        let slow = if self.dice.one_in(20) { 5 * MS } else { 300_000 };
        let at_ns = self.agenda.now_ns + 20_000 + self.dice.below(slow);
        let Some(found) = self.conns.get_mut(&conn) else { return };
        let pipe = &mut found.pipes[to];
        if pipe.is_cut {
            return;
        }
        pipe.last_ns = pipe.last_ns.max(at_ns);
        pipe.frames.push_back(frame);
        self.agenda.at(pipe.last_ns, Event::Arrive { conn, to });
    }

    /// One end closes it. What it said before still arrives; what was said to it does not.
    pub(super) fn close(&mut self, conn: ConnId, by: usize) {
        self.put(conn, 1 - by, Frame::End);
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.pipes.iter_mut().for_each(|pipe| pipe.is_cut = true);
            conn.pipes[by].frames.clear();
        }
        self.drop_when_empty(conn);
    }

    /// It breaks. `is_noticed`: both ends find out, each when what still arrives has arrived; else neither does before it misses something.
    pub(super) fn cut(&mut self, conn: ConnId, is_noticed: bool) {
        for to in [0, 1] {
            let Some(pipe) = self.conns.get_mut(&conn).map(|conn| &mut conn.pipes[to]) else { return };
            if pipe.is_cut {
                continue;
            }
            let keeps = self.dice.below(pipe.frames.len() as u64 + 1) as usize;
            pipe.frames.truncate(keeps);
            if is_noticed {
                self.put(conn, to, Frame::End);
            }
            if let Some(conn) = self.conns.get_mut(&conn) {
                conn.pipes[to].is_cut = true;
            }
        }
    }

    fn drop_when_empty(&mut self, conn: ConnId) {
        if self.conns.get(&conn).is_some_and(|conn| conn.pipes.iter().all(|pipe| pipe.is_cut && pipe.frames.is_empty()))
        {
            self.conns.remove(&conn);
        }
    }

    /// A frame is due at an end.
    pub(super) fn arrive(&mut self, conn: ConnId, to: usize) {
        let Some(found) = self.conns.get_mut(&conn) else { return };
        if let [Party::Process { node: a, .. }, Party::Process { node: b, .. }] = found.ends
            && let Some((between, until_ns)) = self.parted
            && self.agenda.now_ns < until_ns
            && (between == [a, b] || between == [b, a])
        {
            // It is sent again until the network heals.
            return self.agenda.at(until_ns, Event::Arrive { conn, to });
        }
        // Lost when the connection broke.
        let Some(frame) = found.pipes[to].frames.pop_front() else { return };
        let (end, other) = (found.ends[to], found.ends[1 - to]);
        self.agenda.events += 1;
        self.say(|| format!("conn {conn} to {end:?}: {frame:?}"));
        match end {
            Party::Client(client) => self.client_hears(client, conn, frame),
            Party::Process { node, life } if self.lives(node, life) => match other {
                Party::Client(client) => self.hear_client(node, client, conn, frame),
                Party::Process { .. } => self.hear_peer(node, conn, frame),
            },
            Party::Process { .. } => {}
        }
        // What has arrived made room for more.
        if let Party::Process { node, life } = other
            && self.lives(node, life)
            && let Some(peer) = self.peer_on(node, conn)
        {
            self.pump(node, peer);
        }
        self.drop_when_empty(conn);
    }

    /// Connections that some process, or client, has an end of.
    pub(super) fn conns_of(&self, who: Party) -> Vec<ConnId> {
        self.conns.iter().filter(|(_, conn)| conn.ends.contains(&who)).map(|(conn, _)| *conn).collect()
    }
}
