//! Parcels between processes: messages, calls and their answers. Each goes by the outbox of one process and the inbox of the other
//! (`controller::post`), so that it arrives once and in order however often the connection between them breaks.
//!
//! A parcel travels as one frame, and so does its verdict. A call is settled when it is in the callee's queue; its answer is a parcel of the other
//! direction. To the controller a process that calls is a client: its connection's number has [`PEER`] set.

use std::sync::Arc;

use super::mail::outlived;
use super::*;
use crate::controller::mailbox::Sender as From;
use crate::controller::peers::PeerNumber;
use crate::controller::post::{Due, End, Ticket, Verdict};
use crate::controller::{Keep, PEER};

/// What a parcel is, and what it says besides its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// Under a key.
    Message,
    /// To a function, whose name is the key.
    Call { call: u64, deadline_ns: u64, is_args: bool, idempotent: bool },
    /// To a call.
    Answer { call: u64, code: Code, status: i32, is_args: bool },
    /// Nobody waits for this call any more.
    Cancel { call: u64 },
}

/// Something for another process. Its bytes are shared with the connection that sends them.
#[derive(Debug)]
pub(super) struct Parcel {
    pub(super) kind: Kind,
    pub(super) key: Arc<[u8]>,
    pub(super) bytes: Arc<Bytes>,
}

impl Parcel {
    /// One that changes nothing: nobody's call has this number.
    pub(super) fn blank() -> Parcel {
        let bytes = Arc::new(Bytes::Inline(Inline::empty()));
        Parcel { kind: Kind::Cancel { call: 0 }, key: Arc::from(&[][..]), bytes }
    }
}

impl Keep for Parcel {
    fn len_bytes(&self) -> usize {
        self.key.len() + (*self.bytes).as_ref().len()
    }

    fn copy(&self) -> Parcel {
        Parcel { kind: self.kind.clone(), key: Arc::clone(&self.key), bytes: Arc::clone(&self.bytes) }
    }
}

/// What a connection with a peer brought.
#[derive(Debug)]
pub(super) enum Arrival {
    /// A parcel that was not here before.
    Parcel { peer: PeerNumber, due: Due, kind: Kind, key: Vec<u8>, bytes: Result<Bytes, Code> },
    /// One of ours has ended.
    End { ticket: Ticket, end: End },
    /// Bytes that are not needed any more.
    Done(Bytes),
    /// A life of the peer is over: what it asked for nobody waits for, and what it had taken nobody answers, for which reason its callers are told.
    Over { peer: PeerNumber, text: &'static str },
    /// A word about a lane.
    Lane { peer: PeerNumber, news: super::near::lane::LaneNews },
    /// The link to this peer is gone, and with it the memory that was shared.
    Down(PeerNumber),
}

/// Who waits for a parcel of ours.
#[derive(Debug, Clone, Copy)]
pub(super) enum Posted {
    /// A worker, for it to be stored.
    Message { worker: WorkerId, incarnation: u64, question: u64 },
    /// A worker, for its answer.
    Call { call: u64 },
    /// Nobody.
    Nobody,
}

/// A call of a worker to another process.
#[derive(Debug)]
pub(super) struct RemoteCall {
    worker: WorkerId,
    incarnation: u64,
    /// Its number with the worker.
    nested: u64,
    peer: PeerNumber,
    ticket: Ticket,
    deadline_ns: u64,
    /// What is sent once more if the life of the peer is over that has it, and how often it may be.
    again: Option<(Parcel, u8)>,
}

/// How often a call is sent to a later life of its process.
const SENDS_AGAIN_MAX: u8 = 3;

/// Calls to other processes, and what was posted.
#[derive(Debug, Default)]
pub(super) struct Correspondence {
    tickets: Ticket,
    posted: crate::numbered::NumberMap<Posted>,
    calls: u64,
    remote: crate::numbered::NumberMap<RemoteCall>,
    /// Deadlines of those, and the calls.
    deadlines: std::collections::BTreeSet<(u64, u64)>,
    /// The worker that was told last that its message has arrived, the number of its question, and when.
    told: Option<(WorkerId, u64, u64)>,
    /// When the log may be told again of answers that found no room.
    loss_due_ns: u64,
}

/// How often the log is told of lost answers.
const LOSSES_NS: u64 = 1_000_000_000;

impl Correspondence {
    /// Of a life of ours. Calls are numbered from it on, as no earlier life came so far: what is still answered to one of those finds none of ours.
    pub(super) fn new(incarnation: u64) -> Correspondence {
        Correspondence { calls: incarnation, ..Correspondence::default() }
    }

    /// When [`Process::expire_remote_calls`] has to be called next.
    pub(super) fn wake_ns(&self) -> u64 {
        self.deadlines.first().map_or(u64::MAX, |(deadline_ns, _)| *deadline_ns)
    }

    /// The worker that was told in this turn that its message has arrived, and the number of its question.
    pub(super) fn told_at(&self, now: u64) -> Option<(WorkerId, u64)> {
        self.told.filter(|(.., at_ns)| *at_ns == now).map(|(worker, question, _)| (worker, question))
    }

    fn end(&mut self, call: u64) -> Option<RemoteCall> {
        let ended = self.remote.remove(&call)?;
        self.deadlines.remove(&(ended.deadline_ns, call));
        Some(ended)
    }

    /// The same, if it is a call to this peer: no other has a say in it.
    fn end_of(&mut self, peer: PeerNumber, call: u64) -> Option<RemoteCall> {
        self.remote.get(&call).is_some_and(|remote| remote.peer == peer).then(|| self.end(call))?
    }

    /// Calls that this peer has in its queue, or runs. Those on their way have a parcel whose end is to come.
    fn taken_by(&self, peer: PeerNumber) -> Vec<u64> {
        let taken = |remote: &RemoteCall| remote.peer == peer && !self.posted.contains_key(&remote.ticket);
        self.remote.iter().filter(|(_, remote)| taken(remote)).map(|(call, _)| *call).collect()
    }
}

impl Process {
    fn post(
        &mut self,
        now: u64,
        peer: PeerNumber,
        parcel: Parcel,
        deadline_ns: u64,
        posted: Posted,
    ) -> Result<Ticket, (Code, String)> {
        self.correspondence.tickets += 1;
        let ticket = self.correspondence.tickets;
        match self.peers.post(peer, ticket, parcel, deadline_ns) {
            Ok(()) => {
                self.correspondence.posted.insert(ticket, posted);
                self.peers.pump(now, peer, &mut self.reactor, &mut self.store);
                Ok(ticket)
            }
            Err((code, text, parcel)) => {
                self.release(Bytes::Shared(parcel.bytes));
                Err((code, text))
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one record")]
    pub(super) fn send_to_peer(
        &mut self,
        now: u64,
        worker: WorkerId,
        question: u64,
        peer: PeerNumber,
        deadline_ns: u64,
        key: Vec<u8>,
        payload: Payload,
    ) {
        let incarnation = self.incarnation_of(worker);
        self.lanes.talks.sends(worker, peer);
        self.now_waits(worker);
        let parcel = Parcel { kind: Kind::Message, key: key.into(), bytes: Arc::new(payload.bytes) };
        let posted = Posted::Message { worker, incarnation, question };
        if let Err((code, text)) = self.post(now, peer, parcel, deadline_ns, posted) {
            self.answer_text(worker, question, code, &text);
        }
        self.take_peers_in(now);
    }

    /// A function calls one of another process.
    pub(super) fn on_call_at(
        &mut self,
        now: u64,
        worker: WorkerId,
        descriptor: &Descriptor,
        heap: Option<Buffer>,
    ) -> Result<(), Violation> {
        let (nested, number) = (descriptor.id(), descriptor.tag());
        if self.controller.nested_of(worker) > crate::worker::NESTED_MAX {
            return Err(Violation("more nested calls open than one function may have"));
        }
        let named = self.seats[usize::from(worker)].as_mut().and_then(|seat| seat.key.take());
        let function = named.ok_or(Violation("a call of another process without the name of its function"))?;
        if number == 0 || self.process_name(number).is_none() {
            return Err(Violation("a process of no number that it was told"));
        }
        let peer = usize::from(number) - 1;
        let Some(bytes) = self.bytes_of(worker, descriptor.body(), heap)? else {
            let CallError { code, text, .. } = owner_died();
            self.reply_text(worker, nested, code, 0, &text);
            return Ok(());
        };
        if self.is_too_much(&bytes) {
            let text = no_space(&bytes, &self.store.heap);
            self.release(bytes);
            self.reply_text(worker, nested, Code::NoSpace, 0, &text);
            return Ok(());
        }
        let bytes = match self.keepable(bytes) {
            Ok(bytes) => bytes,
            Err(text) => {
                self.reply_text(worker, nested, Code::NoSpace, 0, &text);
                return Ok(());
            }
        };
        let deadline_ns = descriptor.aux().min(self.controller.served_until(now, worker));
        self.correspondence.calls += 1;
        let call = self.correspondence.calls;
        let (is_args, idempotent) = (descriptor.kind() & record::ARGS != 0, descriptor.kind() & record::AGAIN != 0);
        let kind = Kind::Call { call, deadline_ns, is_args, idempotent };
        let parcel = Parcel { kind, key: function.into(), bytes: Arc::new(bytes) };
        let any_life = descriptor.kind() & record::KIND == record::CALL_AT_ANY_LIFE;
        let again = any_life.then(|| (parcel.copy(), SENDS_AGAIN_MAX));
        match self.post(now, peer, parcel, deadline_ns, Posted::Call { call }) {
            Ok(ticket) => {
                let incarnation = self.incarnation_of(worker);
                let remote = RemoteCall { worker, incarnation, nested, peer, ticket, deadline_ns, again };
                self.correspondence.remote.insert(call, remote);
                self.correspondence.deadlines.insert((deadline_ns, call));
                if let Some(seat) = &mut self.seats[usize::from(worker)] {
                    seat.away += 1;
                }
                self.controller.waits(worker);
            }
            Err((code, text)) => {
                self.forget_again(again);
                self.reply_text(worker, nested, code, 0, &text);
            }
        }
        self.take_peers_in(now);
        Ok(())
    }

    /// A call is not sent again.
    fn forget_again(&mut self, again: Option<(Parcel, u8)>) {
        if let Some((parcel, _)) = again {
            self.release(Bytes::Shared(parcel.bytes));
        }
    }

    /// The life of a peer is over that had this call, or may have had it: its next life gets it, or it ends.
    fn on_peer_lost(&mut self, now: u64, mut remote: RemoteCall, text: &str) {
        let (worker_lives, in_time) =
            (self.incarnation_of(remote.worker) == remote.incarnation, now < remote.deadline_ns);
        match remote.again.take() {
            Some((mut parcel, left @ 1..)) if worker_lives && in_time => {
                self.correspondence.calls += 1;
                let number = self.correspondence.calls;
                if let Kind::Call { call, .. } = &mut parcel.kind {
                    *call = number;
                }
                let posted = Posted::Call { call: number };
                match self.post(now, remote.peer, parcel.copy(), remote.deadline_ns, posted) {
                    Ok(ticket) => {
                        (remote.ticket, remote.again) = (ticket, Some((parcel, left - 1)));
                        self.correspondence.deadlines.insert((remote.deadline_ns, number));
                        self.correspondence.remote.insert(number, remote);
                    }
                    Err((code, text)) => {
                        self.forget_again(Some((parcel, 0)));
                        self.end_remote(remote, code, 0, &text);
                    }
                }
            }
            again => {
                self.forget_again(again);
                self.end_remote(remote, Code::PeerLost, 0, text);
            }
        }
    }

    /// A worker calls one of its calls off: if it is one to another process, that is told.
    pub(super) fn cancel_away(&mut self, now: u64, worker: WorkerId, nested: u64) {
        if self.seats[usize::from(worker)].as_ref().is_none_or(|seat| seat.away == 0) {
            return;
        }
        let its = (worker, self.incarnation_of(worker), nested);
        let is_it = |remote: &RemoteCall| (remote.worker, remote.incarnation, remote.nested) == its;
        let found = self.correspondence.remote.iter().find(|(_, remote)| is_it(remote)).map(|(call, _)| *call);
        if let Some(remote) = found.and_then(|call| self.call_off(now, call)) {
            self.end_remote(remote, Code::Cancelled, 0, "cancelled by its caller");
        }
    }

    fn incarnation_of(&self, worker: WorkerId) -> u64 {
        self.seats[usize::from(worker)].as_ref().map_or(0, |seat| seat.incarnation)
    }

    /// How a call that came from another process ended.
    pub(super) fn answer_peer(&mut self, now: u64, connection: u64, call: u64, outcome: Outcome<Payload>) {
        let peer = usize::try_from(connection & !PEER).unwrap_or(usize::MAX);
        let (code, status, payload) = spread(outcome);
        let post = |process: &mut Process, code, status, is_args, bytes| {
            let kind = Kind::Answer { call, code, status, is_args };
            let parcel = Parcel { kind, key: Arc::from(&[][..]), bytes: Arc::new(bytes) };
            process.post(now, peer, parcel, u64::MAX, Posted::Nobody).map(drop).map_err(|(_, text)| text)
        };
        let posted = self.keepable(payload.bytes).and_then(|bytes| post(self, code, status, payload.is_args, bytes));
        let Err(why) = posted else { return };
        let text = answer_did_not_fit(why);
        if let Err(text) = post(self, Code::Failed, -1, false, Bytes::Text(text)) {
            let at_ns = &mut self.correspondence.loss_due_ns;
            if now >= *at_ns {
                *at_ns = now + LOSSES_NS;
                tracing::warn!("answers to another process are lost, which finds that at their deadlines: {text}");
            }
        }
    }

    /// Ends calls to other processes whose time is over.
    pub(super) fn expire_remote_calls(&mut self, now: u64) {
        while let Some((deadline_ns, call)) = self.correspondence.deadlines.first().copied()
            && deadline_ns <= now
        {
            let Some(remote) = self.call_off(now, call) else { return };
            let name = self.peers.name_of(remote.peer).unwrap_or("?").to_owned();
            let text = format!("no answer of process {name} came in time; the function may have run");
            self.end_remote(remote, Code::Timeout, 0, &text);
        }
    }

    /// Nobody waits for a call any more: the peer is told.
    fn call_off(&mut self, now: u64, call: u64) -> Option<RemoteCall> {
        let remote = self.correspondence.end(call)?;
        self.peers.cancel(remote.peer, remote.ticket);
        let parcel = Parcel { kind: Kind::Cancel { call }, ..Parcel::blank() };
        // If there is no room for it, the function goes on until its own deadline, which is the same.
        let _ = self.post(now, remote.peer, parcel, now + self.config.deadline_ms * 1_000_000, Posted::Nobody);
        Some(remote)
    }

    /// A worker is dead: what it called in other processes nobody waits for, and what it sent them must not need its memory, of which it
    /// may have left more than that.
    pub(super) fn outlive_parcels(&mut self, now: u64, worker: WorkerId, incarnation: u64) {
        let its = |remote: &RemoteCall| (remote.worker, remote.incarnation) == (worker, incarnation);
        let calls = self.correspondence.remote.iter().filter(|(_, remote)| its(remote));
        for call in calls.map(|(call, _)| *call).collect::<Vec<_>>() {
            if let Some(remote) = self.call_off(now, call) {
                self.forget_again(remote.again);
            }
        }
        let Process { peers, store, .. } = self;
        for parcel in peers.parcels_mut() {
            if let Bytes::Foreign(foreign) = &*parcel.bytes
                && foreign.giver == worker
            {
                parcel.bytes = Arc::new(outlived(store, &foreign.view));
            }
        }
    }

    /// The life of a peer is over that had these calls: nobody will answer them.
    fn end_calls_taken_by(&mut self, now: u64, peer: PeerNumber, text: &str) {
        for call in self.correspondence.taken_by(peer) {
            if let Some(remote) = self.correspondence.end(call) {
                self.on_peer_lost(now, remote, text);
            }
        }
    }

    fn end_remote(&mut self, mut remote: RemoteCall, code: Code, status: i32, text: &str) {
        self.forget_again(remote.again.take());
        if self.comes_home(&remote) {
            self.reply_text(remote.worker, remote.nested, code, status, text);
        }
    }

    /// A call to another process is over. Whether the worker that made it is still there to hear of it.
    fn comes_home(&mut self, remote: &RemoteCall) -> bool {
        let seat = self.seats[usize::from(remote.worker)].as_mut();
        let Some(seat) = seat.filter(|seat| seat.incarnation == remote.incarnation) else { return false };
        seat.away -= 1;
        self.controller.waited(remote.worker);
        true
    }

    /// Ends a call of a worker's with a text.
    fn reply_text(&mut self, worker: WorkerId, nested: u64, code: Code, status: i32, text: &str) {
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let (body, heap) = self.body_of_bytes(text.as_bytes(), me);
        let aux = status.cast_unsigned().into();
        self.send(worker, Descriptor::new(record::REPLY, code as u16, nested, aux, body), heap);
    }

    /// Takes what other processes have written into memory that they share with us. Whether there was something.
    pub(super) fn poll_memory(&mut self, now: u64) -> bool {
        let found = self.peers.poll_memory(now, &mut self.reactor, &mut self.store);
        self.take_peers_in(now);
        found
    }

    /// What connections with other processes brought, and what became of our parcels. Whether there were parcels or verdicts.
    pub(super) fn take_peers_in(&mut self, now: u64) -> bool {
        let mut found = false;
        while let Some(arrival) = self.peers.arrival() {
            found |= matches!(arrival, Arrival::Parcel { .. } | Arrival::End { .. });
            match arrival {
                Arrival::Done(bytes) => self.release(bytes),
                Arrival::End { ticket, end } => self.on_end(now, ticket, end),
                Arrival::Over { peer, text } => {
                    self.controller.disconnected(PEER | peer as u64);
                    self.end_calls_taken_by(now, peer, text);
                    self.end_receives_from(peer);
                    self.forget_lanes(peer);
                }
                Arrival::Lane { peer, news } => self.on_lane_word(now, peer, news),
                Arrival::Down(peer) => self.end_lanes(now, peer),
                Arrival::Parcel { peer, due, kind, key, bytes } => {
                    let verdict = self.on_parcel(now, peer, kind, &key, bytes);
                    self.peers.settle(now, peer, due, verdict);
                }
            }
            if self.peers.has_no_arrivals() {
                self.peers.say_verdicts(now, now, &mut self.reactor, &mut self.store);
            }
        }
        found
    }

    fn on_end(&mut self, now: u64, ticket: Ticket, end: End) {
        let Some(posted) = self.correspondence.posted.remove(&ticket) else { return };
        let (code, text) = match end {
            End::Said(Verdict::Stored) => (Code::Ok, String::new()),
            End::Said(Verdict::Refused(code)) => (code, refused_by_peer(code).to_owned()),
            End::TimedOut { sent: true } | End::Cancelled { sent: true } => {
                (Code::Timeout, "the other process did not say in time that it has it; it may have it yet".into())
            }
            End::TimedOut { sent: false } | End::Cancelled { sent: false } => {
                (Code::Timeout, "the other process was not there in time; it was not sent".into())
            }
            End::Lost => (Code::PeerLost, LIFE_IS_OVER.into()),
            End::Gone { sent: true } => {
                (Code::PeerLost, "the other process was stopped or deleted; it may have had it".into())
            }
            End::Gone { sent: false } => {
                (Code::PeerLost, "the other process was stopped or deleted; it was not sent".into())
            }
        };
        match posted {
            Posted::Message { worker, incarnation, question } if self.incarnation_of(worker) == incarnation => {
                self.answer_text(worker, question, code, &text);
                self.hands_over(now, worker);
                self.correspondence.told = Some((worker, question, now));
            }
            // Now it is in the other's queue: its answer is to come.
            Posted::Call { .. } if code == Code::Ok => {}
            Posted::Call { call } => match self.correspondence.end(call) {
                Some(remote) if end == End::Lost => self.on_peer_lost(now, remote, LIFE_IS_OVER),
                Some(remote) => self.end_remote(remote, code, 0, &text),
                None => {}
            },
            Posted::Message { .. } | Posted::Nobody => {}
        }
    }

    fn on_parcel(&mut self, now: u64, peer: PeerNumber, kind: Kind, key: &[u8], bytes: Result<Bytes, Code>) -> Verdict {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(code) => {
                if let Kind::Answer { call, .. } = kind
                    && let Some(remote) = self.correspondence.end_of(peer, call)
                {
                    // `NoSpace` would say that it has not run.
                    let text = answer_did_not_fit(no_room_here(code));
                    self.end_remote(remote, Code::Failed, -1, &text);
                }
                return Verdict::Refused(code);
            }
        };
        match kind {
            Kind::Message => {
                // What came over a lane came before it.
                self.close_lane_from(now, peer);
                let payload = Payload { bytes, is_args: false, keeps: false };
                match self.deliver(now, From::Peer(peer), key, payload) {
                    Ok(()) => Verdict::Stored,
                    Err((code, _)) => Verdict::Refused(code),
                }
            }
            Kind::Call { call, deadline_ns, is_args, idempotent } => {
                let payload = Payload { bytes, is_args, keeps: false };
                let name = String::from_utf8_lossy(key);
                let function = self.controller.functions().iter().position(|function| *function == name);
                // One that there is not is refused by its number.
                let function = function.and_then(|function| u16::try_from(function).ok()).unwrap_or(u16::MAX);
                let from = Caller::Client { connection: PEER | peer as u64, call };
                let terms = Terms { idempotent, ..Terms::default() };
                self.controller.request(now, Request { from, function, deadline_ns, terms, payload });
                Verdict::Stored
            }
            Kind::Answer { call, code, status, is_args: _ } => {
                match self.correspondence.end_of(peer, call) {
                    Some(mut remote) => {
                        self.forget_again(remote.again.take());
                        if self.comes_home(&remote) {
                            self.hand_answer(now, &remote, code, status, bytes);
                        } else {
                            self.release(bytes);
                        }
                    }
                    None => self.release(bytes),
                }
                Verdict::Stored
            }
            Kind::Cancel { call } => {
                self.controller.cancel(PEER | peer as u64, call);
                Verdict::Stored
            }
        }
    }

    /// The answer of another process, to the worker that waits for it. Received into our memory.
    fn hand_answer(&mut self, now: u64, remote: &RemoteCall, code: Code, status: i32, bytes: Bytes) {
        let me = ParticipantId::new(remote.worker).expect("workers have participant numbers");
        let (body, heap) = match bytes {
            Bytes::Inline(inline) => (Body::Inline(inline), None),
            Bytes::Own(block) => {
                let (bytes, arena) =
                    (block.len(), self.store.arena.as_mut().expect("a block of ours comes from the arena"));
                (Body::Block(arena.lend(block, bytes, me)), None)
            }
            Bytes::Heap(heap) => (Body::Inline(Inline::empty()), Some(heap)),
            bytes => {
                let copy = bytes.as_ref().to_vec();
                self.release(bytes);
                self.body_of_bytes(&copy, me)
            }
        };
        let aux = status.cast_unsigned().into();
        self.send(remote.worker, Descriptor::new(record::REPLY, code as u16, remote.nested, aux, body), heap);
        self.hands_over(now, remote.worker);
    }
}

pub(super) const LIFE_IS_OVER: &str = "the other process was started anew; its earlier life may have had it";

/// Why we did not take what came.
fn no_room_here(code: Code) -> &'static str {
    match code {
        Code::TooLarge => "it is more than this process takes",
        _ => "this process has no payload memory for it now",
    }
}

/// Why another process did not take a parcel, as far as a code can say.
fn refused_by_peer(code: Code) -> &'static str {
    match code {
        Code::Busy => "the other process's mailbox is full; send again when it has received some",
        Code::TooLarge => "it is more than the other process takes",
        Code::NoSpace => "the other process has no payload memory for it now",
        _ => "the other process does not take it",
    }
}
