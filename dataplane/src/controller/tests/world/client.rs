//! Clients: they call, lose patience, lose connections and come back, as `client/` does. What becomes of a call whose connection is lost its
//! own rules decide.

use std::collections::{BTreeMap, BTreeSet};

use super::checker::Mode;
use super::link::Frame;
use super::*;
use crate::client::Delivery;
use crate::client::delivery::{Fate, after_loss, after_restart};

#[derive(Debug)]
struct Open {
    invocation: u64,
    delivery: Delivery,
    function: u16,
    bytes: usize,
    deadline_ns: u64,
    is_cancelled: bool,
    /// On the connection there is, and on any.
    is_sent: bool,
    was_sent: bool,
}

#[derive(Debug)]
pub(super) struct Client {
    node: NodeId,
    session: SessionId,
    /// Calls and connections made.
    numbers: u64,
    conn: Option<ConnId>,
    is_welcome: bool,
    /// The life of the process that it met last.
    life: u64,
    open: BTreeMap<u64, Open>,
    /// Calls whose results are kept.
    kept: BTreeSet<u64>,
}

impl Client {
    pub(super) fn new(node: NodeId, number: u8) -> Client {
        Client {
            node,
            session: [number + 1; 16],
            numbers: 0,
            conn: None,
            is_welcome: false,
            life: 0,
            open: BTreeMap::new(),
            kept: BTreeSet::new(),
        }
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.open.is_empty()
    }
}

impl World {
    /// Whether the answer to a call of a client may come again.
    pub(super) fn is_kept(&self, client: usize, call: u64) -> bool {
        self.clients[client].kept.contains(&call)
    }

    /// A client does something.
    pub(super) fn client(&mut self, number: usize) {
        self.agenda.events += 1;
        let now_ns = self.agenda.now_ns;
        let overdue: Vec<u64> = self.clients[number]
            .open
            .iter()
            .filter(|(_, open)| open.deadline_ns <= now_ns)
            .map(|(call, _)| *call)
            .collect();
        for call in overdue {
            self.call_ends(number, call, Code::Timeout, None);
            if self.dice.one_in(3) {
                self.send(number, Frame::Cancel { call });
            }
        }
        if self.clients[number].conn.is_none() {
            self.dial_process(number);
        }
        if self.is_busy {
            match self.dice.below(16) {
                0 => {
                    let nth = self.dice.below(4) as usize;
                    if let Some(call) = self.clients[number].open.keys().nth(nth).copied() {
                        self.clients[number].open.get_mut(&call).expect("found above").is_cancelled = true;
                        self.send(number, Frame::Cancel { call });
                    }
                }
                1 if self.dice.one_in(12) => self.hang_up(number),
                _ => self.call(number),
            }
        }
        let longest_ns = if self.dice.one_in(8) { 60 * MS } else { self.plan.calls_ns };
        let pause_ns = self.dice.between(50_000, longest_ns);
        self.agenda.after(pause_ns, Event::Client { client: number });
    }

    fn dial_process(&mut self, number: usize) {
        let client = &mut self.clients[number];
        let node = client.node;
        client.numbers += 1;
        let hello = Frame::Hello { session: client.session, number: client.numbers };
        // Nobody listens: it tries again.
        let Some(process) = self.nodes[node].process.as_ref().filter(|process| process.is_admitted) else { return };
        let ends = [Party::Client(number), Party::Process { node, life: process.life }];
        let conn = self.connect(ends);
        let client = &mut self.clients[number];
        (client.conn, client.is_welcome) = (Some(conn), false);
        self.put(conn, 1, hello);
    }

    /// Sends on the connection there is, if there is one.
    fn send(&mut self, number: usize, frame: Frame) {
        let client = &self.clients[number];
        if let Some(conn) = client.conn.filter(|_| client.is_welcome) {
            self.put(conn, 1, frame);
        }
    }

    fn call(&mut self, number: usize) {
        let (delivery, mode, fires) = match self.dice.below(10) {
            0 => (Delivery::AtMostOnce, Mode::AtMostOnce, true),
            1..5 => (Delivery::AtMostOnce, Mode::AtMostOnce, false),
            5..7 => (Delivery::Retry, Mode::Retry, false),
            _ => (Delivery::EffectivelyOnce, Mode::EffectivelyOnce, false),
        };
        let unknown = u64::from(self.dice.one_in(30));
        let function = self.dice.below(u64::from(FUNCTIONS) + unknown) as u16;
        let deadline_ns = self.agenda.now_ns + self.dice.between(MS, 600 * MS);
        let bytes = self.dice.below(80) as usize;
        let invocation = self.checker.invocation(mode, 0);
        let client = &mut self.clients[number];
        client.numbers += 1;
        let call = client.numbers;
        if fires {
            if client.is_welcome {
                let terms = Terms { fire: true, ..Terms::default() };
                let budget_ns = deadline_ns - self.agenda.now_ns;
                self.send(number, Frame::Request { call, function, budget_ns, terms, name: invocation, bytes });
            }
            return;
        }
        if delivery == Delivery::EffectivelyOnce {
            client.kept.insert(call);
        }
        let open = Open {
            invocation,
            delivery,
            function,
            bytes,
            deadline_ns,
            is_cancelled: false,
            is_sent: false,
            was_sent: false,
        };
        client.open.insert(call, open);
        self.send_calls(number);
    }

    /// Sends the calls that wait for a connection.
    fn send_calls(&mut self, number: usize) {
        if !self.clients[number].is_welcome {
            return;
        }
        let waiting: Vec<u64> =
            self.clients[number].open.iter().filter(|(_, open)| !open.is_sent).map(|(call, _)| *call).collect();
        for call in waiting {
            let client = &mut self.clients[number];
            let is_kept = |open: &Open| open.delivery == Delivery::EffectivelyOnce;
            let known_below = client.open.iter().find(|(_, open)| is_kept(open)).map_or(call, |(call, _)| *call);
            let open = client.open.get_mut(&call).expect("listed above");
            let once = is_kept(open).then_some(Once { known_below, again: open.was_sent });
            let terms = Terms { idempotent: open.delivery != Delivery::AtMostOnce, fire: false, once };
            (open.is_sent, open.was_sent) = (true, true);
            let Open { function, deadline_ns, invocation: name, bytes, .. } = *open;
            let budget_ns = deadline_ns.saturating_sub(self.agenda.now_ns).max(1);
            self.send(number, Frame::Request { call, function, budget_ns, terms, name, bytes });
        }
    }

    pub(super) fn client_hears(&mut self, number: usize, conn: ConnId, frame: Frame) {
        if self.clients[number].conn != Some(conn) {
            return;
        }
        match frame {
            Frame::Welcome { life } => {
                let client = &mut self.clients[number];
                client.is_welcome = true;
                let before = std::mem::replace(&mut client.life, life);
                if before != life && before != 0 {
                    let fates: Vec<(u64, Fate)> = client
                        .open
                        .iter()
                        .map(|(call, open)| (*call, after_restart(open.delivery.flags(), open.was_sent)))
                        .collect();
                    self.decide(number, fates);
                }
                self.send_calls(number);
            }
            Frame::Answer { call, code, name } => {
                self.call_ends(number, call, code, Some(name));
            }
            Frame::End => self.connection_lost(number),
            frame => panic!("a client is told {frame:?}"),
        }
    }

    fn hang_up(&mut self, number: usize) {
        if let Some(conn) = self.clients[number].conn {
            self.close(conn, 0);
            self.connection_lost(number);
        }
    }

    /// The connection of a client breaks; it finds out at once, or the process does not before it comes back.
    pub(super) fn cut_client(&mut self, number: usize) {
        let Some(conn) = self.clients[number].conn else { return };
        let is_noticed = self.dice.one_in(2);
        self.cut(conn, is_noticed);
        self.checker.counts.cuts += 1;
        if !is_noticed {
            self.connection_lost(number);
        }
    }

    fn connection_lost(&mut self, number: usize) {
        let client = &mut self.clients[number];
        (client.conn, client.is_welcome) = (None, false);
        let mut fates = Vec::new();
        for (call, open) in &mut client.open {
            if std::mem::take(&mut open.is_sent) {
                fates.push((*call, after_loss(open.delivery.flags(), true, open.is_cancelled, true)));
            }
        }
        self.decide(number, fates);
    }

    fn decide(&mut self, number: usize, fates: Vec<(u64, Fate)>) {
        for (call, fate) in fates {
            match fate {
                Fate::SendAgain => self.checker.counts.again += 1,
                Fate::Cancelled => self.call_ends(number, call, Code::Cancelled, None),
                Fate::Lost(_) => self.call_ends(number, call, Code::PeerLost, None),
            }
        }
    }

    /// A call ends for its caller. `run`: whose result it is, when it is one.
    fn call_ends(&mut self, number: usize, call: u64, code: Code, run: Option<u64>) {
        let Some(open) = self.clients[number].open.remove(&call) else { return };
        let counts = &mut self.checker.counts;
        counts.answers += 1;
        match code {
            Code::Busy => counts.busy += 1,
            Code::Timeout => counts.timeouts += 1,
            _ => {}
        }
        let is_early = code == Code::Timeout && self.agenda.now_ns < open.deadline_ns;
        assert!(!is_early, "call {call} timed out before its deadline");
        assert!(code != Code::Cancelled || open.is_cancelled, "call {call} was cancelled by nobody");
        if let (Code::Ok, Some(run)) = (code, run) {
            self.checker.result(open.invocation, run);
        }
    }
}
