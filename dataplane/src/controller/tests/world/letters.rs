//! Messages and calls between functions and processes, as `runtime/mail.rs` and `runtime/parcels.rs` carry them.

use std::collections::{BTreeMap, BTreeSet};

use super::load::{Kind, Parcel};
use super::process::{Seat, Told, spread};
use super::*;
use crate::controller::mailbox::{Delivered, Message, Received, Receiver, Sender, Wanted};
use crate::controller::peers::PeerNumber;
use crate::controller::post::{End, Ticket, Verdict};

/// What a worker was handed as the answer to a receive, and may die with.
#[derive(Debug)]
pub(super) struct Handed {
    message: Message<Load>,
}

impl Handed {
    /// It is the worker's.
    pub(super) fn spend(self) {
        self.message.payload.spend();
    }
}

/// Who waits for a parcel.
#[derive(Debug, Clone, Copy)]
enum Posted {
    Message { worker: WorkerId, born: u64, question: u64, message: u64 },
    Call { call: u64 },
    Nobody,
}

#[derive(Debug, Clone, Copy)]
struct Remote {
    worker: WorkerId,
    born: u64,
    question: u64,
    peer: PeerNumber,
    ticket: Ticket,
    deadline_ns: u64,
}

#[derive(Debug, Default)]
pub(super) struct Letters {
    tickets: Ticket,
    posted: BTreeMap<Ticket, Posted>,
    calls: u64,
    remote: BTreeMap<u64, Remote>,
    deadlines: BTreeSet<(u64, u64)>,
}

impl Letters {
    pub(super) fn new(life: u64) -> Letters {
        Letters { calls: life << 32, ..Letters::default() }
    }

    pub(super) fn wake_ns(&self) -> u64 {
        self.deadlines.first().map_or(u64::MAX, |(deadline_ns, _)| *deadline_ns)
    }

    /// Calls to other processes.
    pub(super) fn open(&self) -> usize {
        self.remote.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.posted.is_empty() && self.remote.is_empty() && self.deadlines.is_empty()
    }

    fn end(&mut self, call: u64) -> Option<Remote> {
        let ended = self.remote.remove(&call)?;
        self.deadlines.remove(&(ended.deadline_ns, call));
        Some(ended)
    }
}

impl World {
    // ---- messages ---------------------------------------------------------------------------------------------

    /// `to`: a peer, or the process itself.
    #[expect(clippy::too_many_arguments, reason = "the fields of one record")]
    pub(super) fn on_send(
        &mut self,
        node: NodeId,
        worker: WorkerId,
        question: u64,
        to: Option<PeerNumber>,
        key: u8,
        bytes: usize,
        deadline_ns: u64,
    ) {
        let born = self.born(node, worker);
        let target = to.map_or(node, |peer| self.node_of(node, peer));
        let message = self.checker.message(node, target, key);
        let load = Load::new(&self.process(node).books, message, bytes, Some((worker, born)));
        let Some(peer) = to else {
            let code = match self.deliver(node, Sender::Own, &[key], load) {
                Ok(()) => {
                    self.checker.acked(message);
                    Code::Ok
                }
                Err(code) => {
                    self.checker.refused(message);
                    code
                }
            };
            return self.answer(node, worker, question, code, Told::Nothing);
        };
        self.now_waits(node, worker);
        let parcel = Parcel { kind: Kind::Message, key: Arc::from([key]), load };
        let posted = Posted::Message { worker, born, question, message };
        if let Err(code) = self.post(node, peer, parcel, deadline_ns, posted) {
            self.checker.refused(message);
            self.answer(node, worker, question, code, Told::Nothing);
        }
    }

    /// A message has come.
    fn deliver(&mut self, node: NodeId, from: Sender, key: &[u8], load: Load) -> Result<(), Code> {
        let message = load.name;
        let life = self.process(node).life;
        match self.process(node).mailbox.deliver(from, key, load) {
            Ok(Delivered::Stored) => self.checker.arrived(message, node, life),
            Ok(Delivered::Handed { to, message: handed }) => {
                self.checker.arrived(message, node, life);
                self.hand(node, to.worker, to.call, handed);
            }
            Err(refused) => {
                refused.payload.spend();
                self.checker.counts.refused += 1;
                return Err(refused.why.code());
            }
        }
        Ok(())
    }

    pub(super) fn on_receive(
        &mut self,
        node: NodeId,
        worker: WorkerId,
        question: u64,
        from: Option<Sender>,
        key: Option<u8>,
        deadline_ns: u64,
    ) {
        let now_ns = self.agenda.now_ns;
        let by = Receiver { worker, call: question };
        let key = key.map(|key| [key]);
        let wanted = Wanted { from, key: key.as_ref().map(|key| &key[..]) };
        let process = self.process(node);
        match process.mailbox.receive(now_ns, by, wanted, deadline_ns) {
            Received::Message(message) => self.hand(node, worker, question, message),
            Received::Waits => {
                process.seats.get_mut(&worker).expect("who asks is there").receives = Some(question);
                self.now_waits(node, worker);
            }
            Received::Nothing => self.answer(node, worker, question, Code::Timeout, Told::Nothing),
            Received::Refused(refusal) => self.answer(node, worker, question, refusal.code(), Told::Nothing),
        }
    }

    /// Gives a message to the worker that waits for it.
    fn hand(&mut self, node: NodeId, worker: WorkerId, question: u64, message: Message<Load>) {
        let name = message.payload.name;
        let has_room = !self.is_wild || !self.dice.one_in(30);
        let process = self.process(node);
        let life = process.life;
        if !has_room {
            // Its bytes found no room where the worker could read them.
            self.answer(node, worker, question, Code::NoSpace, Told::Nothing);
            return self.put_back(node, message);
        }
        let seat = process.seats.get_mut(&worker).expect("who receives is there");
        if let Some(before) = seat.handed.replace(Handed { message }) {
            before.message.payload.spend();
        }
        self.checker.handed(name, life);
        self.answer(node, worker, question, Code::Ok, Told::Message(name));
    }

    fn put_back(&mut self, node: NodeId, message: Message<Load>) {
        self.checker.counts.put_back += 1;
        if let Some((to, message)) = self.process(node).mailbox.restore(message) {
            self.hand(node, to.worker, to.call, message);
        }
    }

    /// The worker has the message that it was handed: nobody else gets it.
    pub(super) fn has_received(&mut self, node: NodeId, worker: WorkerId, message: u64) {
        self.checker.received(message);
        self.process(node).seats.get_mut(&worker).expect("who receives is there").worker.received = Some(message);
    }

    /// The invocation is over that the function on this worker ran: then it does not wait for a message either.
    pub(super) fn end_receive(&mut self, node: NodeId, worker: WorkerId) {
        let process = self.process(node);
        let Some(question) = process.seats.get(&worker).and_then(|seat| seat.receives) else { return };
        if process.mailbox.withdraw(Receiver { worker, call: question }) {
            self.answer(node, worker, question, Code::Cancelled, Told::Nothing);
        }
    }

    pub(super) fn expire_receives(&mut self, node: NodeId) {
        let now_ns = self.agenda.now_ns;
        while let Some(receiver) = self.process(node).mailbox.expire(now_ns) {
            self.answer(node, receiver.worker, receiver.call, Code::Timeout, Told::Nothing);
        }
    }

    /// A worker is dead: what it was handed and had not taken goes back, what it sent needs its memory no more.
    pub(super) fn outlive_mail(&mut self, node: NodeId, worker: WorkerId, seat: &mut Seat) {
        let process = self.process(node);
        process.mailbox.worker_died(worker);
        for load in process.mailbox.payloads_mut() {
            load.owner = load.owner.filter(|owner| *owner != (worker, seat.born));
        }
        let mine = process.mailbox.iter().filter(|message| message.payload.owner == Some((worker, seat.born))).count();
        assert_eq!(mine, 0, "messages that lie in the memory of a worker that is dead");
        let Some(Handed { mut message }) = seat.handed.take() else { return };
        if seat.worker.received == Some(message.payload.name) {
            message.payload.spend();
        } else {
            message.payload.owner = None;
            self.put_back(node, message);
        }
    }

    // ---- parcels ----------------------------------------------------------------------------------------------

    fn post(
        &mut self,
        node: NodeId,
        peer: PeerNumber,
        parcel: Parcel,
        deadline_ns: u64,
        posted: Posted,
    ) -> Result<Ticket, Code> {
        let process = self.process(node);
        process.letters.tickets += 1;
        let ticket = process.letters.tickets;
        match process.targets[peer].outbox.send(ticket, parcel, deadline_ns) {
            Ok(()) => {
                process.letters.posted.insert(ticket, posted);
                self.pump(node, peer);
                Ok(ticket)
            }
            Err(full) => {
                full.parcel.load.spend();
                self.checker.counts.refused += 1;
                Err(full.why.code())
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one record")]
    pub(super) fn call_peer(
        &mut self,
        node: NodeId,
        worker: WorkerId,
        question: u64,
        peer: PeerNumber,
        function: u16,
        deadline_ns: u64,
        name: u64,
        bytes: usize,
    ) {
        let born = self.born(node, worker);
        self.now_waits(node, worker);
        let process = self.process(node);
        process.letters.calls += 1;
        let call = process.letters.calls;
        let load = Load::new(&process.books, name, bytes, Some((worker, born)));
        let kind = Kind::Call { call, function, deadline_ns };
        let parcel = Parcel { kind, key: Arc::from([b'f']), load };
        match self.post(node, peer, parcel, deadline_ns, Posted::Call { call }) {
            Ok(ticket) => {
                let letters = &mut self.process(node).letters;
                letters.remote.insert(call, Remote { worker, born, question, peer, ticket, deadline_ns });
                letters.deadlines.insert((deadline_ns, call));
            }
            Err(code) => self.answer(node, worker, question, code, Told::Nothing),
        }
    }

    /// How a call of another process ended.
    pub(super) fn answer_peer(
        &mut self,
        node: NodeId,
        connection: u64,
        call: u64,
        outcome: Outcome<Load>,
        is_awaited: bool,
    ) {
        assert!(is_awaited, "call {call} of a peer is answered twice");
        let peer = (connection & !PEER) as usize;
        let (code, load) = spread(outcome);
        let mut load = load.unwrap_or_else(|| Load::new(&self.process(node).books, 0, 0, None));
        load.owner = None;
        let parcel = Parcel { kind: Kind::Answer { call, code }, key: Arc::from([]), load };
        if self.post(node, peer, parcel, u64::MAX, Posted::Nobody).is_err() {
            let load = Load::new(&self.process(node).books, 0, 0, None);
            let parcel = Parcel { kind: Kind::Answer { call, code: Code::Failed }, key: Arc::from([]), load };
            // If there is no room for that either, the caller finds out at its deadline.
            let _ = self.post(node, peer, parcel, u64::MAX, Posted::Nobody);
        }
    }

    pub(super) fn expire_remote_calls(&mut self, node: NodeId) {
        let now_ns = self.agenda.now_ns;
        while let Some((deadline_ns, call)) = self.process(node).letters.deadlines.first().copied()
            && deadline_ns <= now_ns
        {
            let remote = self.call_off(node, call).expect("what has a deadline is open");
            self.end_remote(node, &remote, Code::Timeout, 0);
        }
    }

    /// Nobody waits for a call any more: the peer is told.
    fn call_off(&mut self, node: NodeId, call: u64) -> Option<Remote> {
        let now_ns = self.agenda.now_ns;
        let process = self.process(node);
        let remote = process.letters.end(call)?;
        process.targets[remote.peer].outbox.cancel(remote.ticket);
        self.note_ends(node, remote.peer);
        let load = Load::new(&self.process(node).books, 0, 0, None);
        let parcel = Parcel { kind: Kind::Cancel { call }, key: Arc::from([]), load };
        let _ = self.post(node, remote.peer, parcel, now_ns + S, Posted::Nobody);
        Some(remote)
    }

    pub(super) fn outlive_letters(&mut self, node: NodeId, worker: WorkerId, born: u64) {
        let remote = &self.process(node).letters.remote;
        let its: Vec<u64> = remote.iter().filter(|(_, remote)| remote.born == born).map(|(call, _)| *call).collect();
        for call in its {
            self.call_off(node, call);
        }
        for target in &mut self.process(node).targets {
            for parcel in target.outbox.parcels_mut() {
                parcel.load.owner = parcel.load.owner.filter(|owner| *owner != (worker, born));
            }
            let left = target.outbox.parcels_mut().filter(|parcel| parcel.load.owner == Some((worker, born))).count();
            assert_eq!(left, 0, "parcels that lie in the memory of a worker that is dead");
        }
    }

    /// The peer lives anew: nobody waits for what its earlier life called, and nobody answers what that had of ours.
    pub(super) fn reborn(&mut self, node: NodeId, peer: PeerNumber) {
        let process = self.process(node);
        let (life, connection) = (process.life, PEER | peer as u64);
        process.controller.disconnected(connection);
        self.checker.caller_gone(node, life, connection);
        let Letters { remote, posted, .. } = &self.process(node).letters;
        let is_taken = |remote: &Remote| remote.peer == peer && !posted.contains_key(&remote.ticket);
        let taken: Vec<u64> = remote.iter().filter(|(_, remote)| is_taken(remote)).map(|(call, _)| *call).collect();
        for call in taken {
            let remote = self.process(node).letters.end(call).expect("listed above");
            self.checker.counts.lost += 1;
            self.end_remote(node, &remote, Code::PeerLost, 0);
        }
    }

    fn end_remote(&mut self, node: NodeId, remote: &Remote, code: Code, run: u64) {
        if self.born(node, remote.worker) == remote.born {
            self.answer(node, remote.worker, remote.question, code, Told::Number(run));
        }
    }

    /// A parcel of ours is over for who sent it.
    pub(super) fn on_end(&mut self, node: NodeId, ticket: Ticket, end: End) {
        let posted = self.process(node).letters.posted.remove(&ticket).expect("a ticket ends once");
        let code = match end {
            End::Said(Verdict::Stored) => Code::Ok,
            End::Said(Verdict::Refused(code)) => code,
            End::TimedOut { .. } | End::Cancelled { .. } => Code::Timeout,
            End::Lost => Code::PeerLost,
            End::Gone { .. } => unreachable!("nobody is stopped for good here"),
        };
        match posted {
            Posted::Message { worker, born, question, message } => {
                match end {
                    End::Said(Verdict::Stored) => self.checker.acked(message),
                    End::Said(Verdict::Refused(_)) | End::TimedOut { sent: false } => self.checker.refused(message),
                    End::Lost | End::Gone { .. } => self.checker.counts.lost += 1,
                    End::TimedOut { sent: true } | End::Cancelled { .. } => {}
                }
                if self.born(node, worker) == born {
                    self.answer(node, worker, question, code, Told::Nothing);
                }
            }
            Posted::Call { .. } if code == Code::Ok => {}
            Posted::Call { call } => {
                if let Some(remote) = self.process(node).letters.end(call) {
                    self.end_remote(node, &remote, code, 0);
                }
            }
            Posted::Nobody => {}
        }
    }

    /// A parcel has come that was not here before.
    pub(super) fn on_parcel(
        &mut self,
        node: NodeId,
        peer: PeerNumber,
        kind: Kind,
        key: &[u8],
        name: u64,
        bytes: usize,
    ) -> Verdict {
        let now_ns = self.agenda.now_ns;
        let life = self.process(node).life;
        let connection = PEER | peer as u64;
        if self.is_wild && self.dice.one_in(40) {
            // There was no memory to receive it to.
            if let Kind::Answer { call, .. } = kind
                && let Some(remote) = self.remote_of(node, peer, call)
            {
                self.end_remote(node, &remote, Code::Failed, 0);
            }
            return Verdict::Refused(Code::NoSpace);
        }
        let load = Load::new(&self.process(node).books, name, bytes, None);
        match kind {
            Kind::Message => match self.deliver(node, Sender::Peer(peer), key, load) {
                Ok(()) => Verdict::Stored,
                Err(code) => Verdict::Refused(code),
            },
            Kind::Call { call, function, deadline_ns } => {
                self.checker.owe(node, life, Owed::Client { connection, call }, deadline_ns);
                let from = Caller::Client { connection, call };
                let request = Request { from, function, deadline_ns, terms: Terms::default(), payload: load };
                self.process(node).controller.request(now_ns, request);
                Verdict::Stored
            }
            Kind::Answer { call, code } => {
                load.spend();
                if let Some(remote) = self.remote_of(node, peer, call) {
                    self.end_remote(node, &remote, code, name);
                }
                Verdict::Stored
            }
            Kind::Cancel { call } => {
                load.spend();
                self.process(node).controller.cancel(connection, call);
                self.checker.called_off(node, life, Owed::Client { connection, call }, now_ns);
                Verdict::Stored
            }
        }
    }

    fn remote_of(&mut self, node: NodeId, peer: PeerNumber, call: u64) -> Option<Remote> {
        let letters = &mut self.process(node).letters;
        letters.remote.get(&call).is_some_and(|remote| remote.peer == peer).then(|| letters.end(call))?
    }
}
