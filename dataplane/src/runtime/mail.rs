//! Messages on their way: from workers and other processes into the mailbox, and out to the functions that wait for them.

use std::sync::Arc;

use praas_shm::KEY_BYTES_MAX;

use super::*;
use crate::controller::mailbox::{Bounds, Delivered, Mailbox, Message, Received, Receiver, Sender, Wanted};
use crate::controller::peers::PeerNumber;
use crate::members::State;
use crate::wire::MailOp;

/// The number that stands for any process.
const ANYBODY: u16 = u16::MAX;
/// Low bits of a question's id: its number. The rest is the process it is about.
const QUESTION_BITS: u32 = 48;

/// What a worker was handed as the answer to a receive, and may die with before it has it.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) question: u64,
    /// Queue channel: how many records our queue had taken at the answer's end.
    pub(super) position: Option<u64>,
    /// It was not asked for yet: see [`Process::offer`].
    pub(super) is_offered: bool,
    message: Message<()>,
    bytes: HandedBytes,
}

/// Where a handed message's bytes are.
#[derive(Debug)]
enum HandedBytes {
    Inline(Inline),
    /// A block of ours that we lent to the worker.
    Lent(BlockRef),
    /// Another worker's, in `lent_on`.
    LentOn(BlockKey),
    /// A block of the worker's own.
    Back(Foreign),
    /// Queue channel: a copy.
    Copy(Arc<[u8]>),
}

/// A question's number, and the process it is about.
fn split(id: u64) -> (u64, u16) {
    let [.., low, high] = id.to_le_bytes();
    (id & ((1 << QUESTION_BITS) - 1), u16::from_le_bytes([low, high]))
}

pub(super) fn number_of(from: Sender) -> u16 {
    match from {
        Sender::Own => 0,
        Sender::Peer(peer) => u16::try_from(peer + 1).unwrap_or(ANYBODY),
    }
}

pub(super) fn mailbox(config: &ProcessConfig) -> Mailbox<Payload> {
    Mailbox::new(Bounds {
        messages_max: config.mailbox_messages_max as usize,
        bytes_max: usize::try_from(config.mailbox_bytes_max).unwrap_or(usize::MAX),
        // A worker waits for one message at a time.
        receivers_max: praas_shm::PARTICIPANTS_MAX,
    })
}

/// A copy of what a dead worker left. It was accepted, and is not lost: where there is no room for it where it belongs, it is kept on the heap.
pub(super) fn outlived(store: &mut Store, bytes: &[u8]) -> Bytes {
    match store.arena.as_mut().and_then(|arena| arena.loan(bytes.len()).ok()) {
        Some(mut block) => {
            block.copy_from_slice(bytes);
            Bytes::Own(block)
        }
        None => Bytes::Kept(Arc::from(bytes)),
    }
}

impl Process {
    /// A worker sends or wants a message, or asks about processes.
    pub(super) fn on_mail(
        &mut self,
        now: u64,
        worker: WorkerId,
        descriptor: &Descriptor,
        heap: Option<Buffer>,
    ) -> Result<(), Violation> {
        let op = MailOp::from_wire(descriptor.tag()).ok_or(Violation("a question about messages that there is not"))?;
        let ((question, number), deadline_ns) = (split(descriptor.id()), descriptor.aux());
        let key_bytes = usize::from(descriptor.tag() >> 4);
        let Some(bytes) = self.bytes_of(worker, descriptor.body(), heap)? else {
            self.answer_text(worker, question, Code::Protocol, "the owner of these bytes has died");
            return Ok(());
        };
        // Before any of it is copied.
        if op != MailOp::Send && bytes.as_ref().len() > KEY_BYTES_MAX {
            return Err(Violation("a key or a name that is longer than any"));
        }
        match op {
            MailOp::Send => {
                return self.on_send(now, worker, question, number, deadline_ns, bytes, key_bytes);
            }
            MailOp::Key => {
                let key = bytes.as_ref().to_vec();
                if key.is_empty() {
                    return Err(Violation("a key of no length that a key may have"));
                }
                if let Some(seat) = &mut self.seats[usize::from(worker)] {
                    seat.key = Some(key);
                }
                // No answer says that it was read.
                self.release(bytes);
                return Ok(());
            }
            MailOp::Receive | MailOp::ReceiveLooked => {
                // A copy, since the worker may still write it.
                let key = bytes.as_ref().to_vec();
                let looked = op == MailOp::ReceiveLooked;
                self.on_receive(now, worker, question, number, deadline_ns, &key, looked);
            }
            MailOp::Resolve => {
                let name = String::from_utf8_lossy(bytes.as_ref()).into_owned();
                match self.process_number(&name) {
                    Some(number) => self.answer_question(
                        worker,
                        question,
                        Code::Ok,
                        number.into(),
                        Body::Inline(Inline::empty()),
                        None,
                    ),
                    None => self.answer_text(worker, question, Code::UnknownProcess, &name),
                }
            }
            MailOp::NameOf => match self.process_name(number).map(str::to_owned) {
                Some(name) => self.answer_text(worker, question, Code::Ok, &name),
                None => self.answer_text(worker, question, Code::UnknownProcess, &format!("#{number}")),
            },
            MailOp::Processes => {
                let names = serde_json::to_string(&self.processes()).expect("names are serialisable");
                self.answer_text(worker, question, Code::Ok, &names);
            }
        }
        // What was only looked at is its owner's again when it has the answer.
        if let Bytes::Heap(heap) = bytes {
            self.recycle(heap.into_buffer());
        }
        Ok(())
    }

    fn process_number(&self, name: &str) -> Option<u16> {
        if name == self.config.process {
            return Some(0);
        }
        self.peers.number_of(name).map(|peer| number_of(Sender::Peer(peer)))
    }

    pub(super) fn process_name(&self, number: u16) -> Option<&str> {
        match number {
            0 => Some(&self.config.process),
            number => self.peers.name_of(usize::from(number) - 1),
        }
    }

    /// Names of processes that are active, ours first, and of those that are swapped out.
    fn processes(&self) -> (Vec<&str>, Vec<&str>) {
        let others = self.peers.names_in(State::Active);
        (std::iter::once(&*self.config.process).chain(others).collect(), self.peers.names_in(State::Swapped).collect())
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one record")]
    fn on_send(
        &mut self,
        now: u64,
        worker: WorkerId,
        question: u64,
        number: u16,
        deadline_ns: u64,
        bytes: Bytes,
        key_bytes: usize,
    ) -> Result<(), Violation> {
        let mut short = [0; praas_shm::INLINE_BYTES_MAX];
        let (key, bytes) = match (&bytes, key_bytes) {
            (_, 0) => {
                let said = self.seats[usize::from(worker)].as_mut().and_then(|seat| seat.key.take());
                (said.ok_or(Violation("a message without a key"))?, bytes)
            }
            (Bytes::Inline(both), 1..) if key_bytes <= both.as_slice().len() => {
                let bytes = both.as_slice().len() - key_bytes;
                short[..bytes].copy_from_slice(&both.as_slice()[..bytes]);
                let payload = Inline::new(&short[..bytes]).expect("shorter than what it is part of");
                (both.as_slice()[bytes..].to_vec(), Bytes::Inline(payload))
            }
            _ => return Err(Violation("a message with its key elsewhere")),
        };
        if self.is_too_much(&bytes) {
            let text = no_space(&bytes, &self.store.heap);
            self.release(bytes);
            self.answer_text(worker, question, Code::NoSpace, &text);
            return Ok(());
        }
        let bytes = match self.keepable(bytes) {
            Ok(bytes) => bytes,
            Err(text) => {
                self.answer_text(worker, question, Code::NoSpace, &text);
                return Ok(());
            }
        };
        let payload = Payload { bytes, is_args: false, keeps: false };
        if self.process_name(number).is_none() {
            self.release(payload.bytes);
            return Err(Violation("a process of no number that it was told"));
        }
        if number == 0 {
            match self.deliver(now, Sender::Own, &key, payload) {
                Ok(()) => self.answer_question(worker, question, Code::Ok, 0, Body::Inline(Inline::empty()), None),
                Err((code, text)) => self.answer_text(worker, question, code, &text),
            }
            return Ok(());
        }
        self.send_to_peer(now, worker, question, usize::from(number) - 1, deadline_ns, key, payload);
        Ok(())
    }

    /// Bytes of a worker that we may have for long, as they may be kept. Of somebody else's block we hold what its owner lent to that worker, and
    /// no longer than it lives: such are copied.
    ///
    /// # Errors
    /// There is no room; they were given back.
    pub(super) fn keepable(&mut self, bytes: Bytes) -> Result<Bytes, String> {
        match &bytes {
            Bytes::Foreign(foreign) if foreign.view.block().owner.get() != foreign.giver => match self.retaken(foreign)
            {
                Some(block) => {
                    self.release(bytes);
                    Ok(Bytes::Own(block))
                }
                None => self.copied(bytes),
            },
            _ => self.apart_from_workers(bytes),
        }
    }

    /// A block of ours that a worker passes on: ours again, as it is. Not one that a call of its was given, which may have to be given to another.
    fn retaken(&mut self, passed: &Foreign) -> Option<praas_shm::Block> {
        let block = *passed.view.block();
        let seat = self.seats[usize::from(passed.giver)].as_ref()?;
        if block.owner != ParticipantId::CONTROLLER || seat.given.iter().any(|given| given.is_given(&block)) {
            return None;
        }
        self.store.arena.as_mut()?.take_back(ParticipantId::new(passed.giver)?, &block).ok()
    }

    /// A message has come. It is in the mailbox then, or on its way to who waited for it.
    ///
    /// # Errors
    /// It is not, and its bytes were given back.
    pub(super) fn deliver(
        &mut self,
        now: u64,
        from: Sender,
        key: &[u8],
        payload: Payload,
    ) -> Result<(), (Code, String)> {
        match self.mailbox.deliver(from, key, payload) {
            Ok(Delivered::Stored) => {
                // What a function may run for is in the mailbox, and with no worker.
                if self.joins.is_empty() {
                    self.offer(now);
                } else {
                    self.join_stored(now, from, key);
                }
                Ok(())
            }
            Ok(Delivered::Handed { to, message }) => {
                self.hand(now, to, message);
                Ok(())
            }
            Err(refused) => {
                self.release(refused.payload.bytes);
                Err((refused.why.code(), refused.why.to_string()))
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one record")]
    fn on_receive(
        &mut self,
        now: u64,
        worker: WorkerId,
        question: u64,
        number: u16,
        deadline_ns: u64,
        key: &[u8],
        looked: bool,
    ) {
        let from = match number {
            ANYBODY => None,
            0 => Some(Sender::Own),
            number => Some(Sender::Peer(usize::from(number) - 1)),
        };
        if let Some(seat) = &mut self.seats[usize::from(worker)] {
            seat.wants_key = key.is_empty();
        }
        self.retract_offers(now);
        let by = Receiver { worker, call: question };
        let wanted = Wanted { from, key: (!key.is_empty()).then_some(key) };
        if self.before_receive(now, worker, wanted, deadline_ns, looked) {
            return self.look_at_lane(worker, question);
        }
        // What it left can be received. More will not come.
        let deleted = match from {
            Some(Sender::Peer(peer)) if self.peers.is_deleted(peer) => self.peers.name_of(peer).map(str::to_owned),
            _ => None,
        };
        let deadline_ns = if deleted.is_some() { 0 } else { deadline_ns };
        match self.mailbox.receive(now, by, wanted, deadline_ns) {
            Received::Message(message) => self.hand(now, by, message),
            Received::Waits => {
                if let Some(seat) = &mut self.seats[usize::from(worker)] {
                    seat.receives = Some(question);
                }
                self.now_waits(worker);
                self.may_go(worker);
            }
            Received::Nothing => match deleted {
                Some(name) => self.answer_text(worker, question, Code::UnknownProcess, &name),
                None => self.answer_text(worker, question, Code::Timeout, ""),
            },
            Received::Refused(refusal) => self.answer_text(worker, question, refusal.code(), &refusal.to_string()),
        }
    }

    /// Offers the only message there is to the worker that was told in this turn that what it sent has arrived: most often it receives the answer
    /// next, and both are here. It saves a question, which on a shared core is two changes of it. Only what fits a record: nothing has
    /// to be given back.
    fn offer(&mut self, now: u64) {
        let Some((worker, question)) = self.correspondence.told_at(now) else { return };
        let (Some(seat), Some(message)) = (&self.seats[usize::from(worker)], self.mailbox.only()) else { return };
        let (Channel::Ring { .. }, Bytes::Inline(inline)) = (&seat.channel, &message.payload.bytes) else { return };
        let Some(both) = Inline::new(&[inline.as_slice(), &message.key].concat()) else { return };
        if seat.handed.is_some() || seat.waits || !self.controller.is_running(worker) {
            return;
        }
        let (inline, number) = (Inline::new(inline.as_slice()).expect("it is one"), question + 1);
        let (from, about) = (message.from, u64::from(number_of(message.from)) | (message.key.len() as u64) << 16);
        if let Sender::Peer(peer) = from
            && self.before_offer(worker, peer)
        {
            return;
        }
        let by = Receiver { worker, call: number };
        let Received::Message(message) = self.mailbox.receive(now, by, Wanted { from: None, key: None }, 0) else {
            return;
        };
        self.send(worker, Descriptor::new(record::OFFER, 0, number, about, Body::Inline(both)), None);
        if let Some(seat) = &mut self.seats[usize::from(worker)] {
            let Message { from, key, number: place, .. } = message;
            let message = Message { from, key, payload: (), number: place };
            let bytes = HandedBytes::Inline(inline);
            seat.handed = Some(Handed { question: number, position: None, is_offered: true, message, bytes });
        }
    }

    /// Somebody asks for a message: what was offered to others and is not accepted is everybody's.
    fn retract_offers(&mut self, now: u64) {
        for at in 0..self.seated.len() {
            let Some(seat) = &mut self.seats[usize::from(self.seated[at])] else { continue };
            let Channel::Ring { link, .. } = &seat.channel else { continue };
            let retracted = |handed: &mut Handed| handed.is_offered && link.retract(handed.question);
            if let Some(offered) = seat.handed.take_if(retracted) {
                self.offer_again(now, offered);
            }
        }
    }

    /// What was offered and not accepted, back in its place.
    pub(super) fn offer_again(&mut self, now: u64, offered: Handed) {
        let (Message { from, key, number, .. }, HandedBytes::Inline(inline)) = (offered.message, offered.bytes) else {
            unreachable!("only what fits a record is offered");
        };
        self.put_back(now, from, key, Payload { bytes: Bytes::Inline(inline), is_args: false, keeps: false }, number);
    }

    /// What a worker waits for comes over its lane.
    pub(super) fn look_at_lane(&mut self, worker: WorkerId, question: u64) {
        let nothing = Body::Inline(Inline::empty());
        self.answer_question(worker, question, Code::Ok, crate::wire::lane::LOOK, nothing, None);
    }

    /// Nobody waits for this call any more: then its function does not wait for a message either.
    pub(super) fn end_receive(&mut self, worker: WorkerId, call: CallKey) {
        let Some(seat) = &self.seats[usize::from(worker)] else { return };
        let (true, Some(question)) = (seat.given.front().is_some_and(|given| given.call == call), seat.receives) else {
            return;
        };
        if self.mailbox.withdraw(Receiver { worker, call: question }) {
            self.answer_text(worker, question, Code::Cancelled, "");
        }
    }

    /// Ends receives whose time is over.
    pub(super) fn expire_receives(&mut self, now: u64) {
        while let Some(Receiver { worker, call }) = self.mailbox.expire(now) {
            self.answer_text(worker, call, Code::Timeout, "");
        }
    }

    /// Ends receives that wait for a process which is not any more.
    pub(super) fn end_receives_from(&mut self, peer: PeerNumber) {
        if !self.peers.is_deleted(peer) {
            return;
        }
        let name = self.peers.name_of(peer).unwrap_or("?").to_owned();
        while let Some(Receiver { worker, call }) = self.mailbox.sender_gone(Sender::Peer(peer)) {
            self.answer_text(worker, call, Code::UnknownProcess, &name);
        }
    }

    /// Gives a message to the worker that waits for it. What cannot be given goes back to its place, and the worker is told.
    pub(super) fn hand(&mut self, now: u64, to: Receiver, message: Message<Payload>) {
        let Message { from, key, mut payload, number } = message;
        let (worker, me) = (to.worker, ParticipantId::new(to.worker).expect("workers have participant numbers"));
        let Some(seat) = &self.seats[usize::from(worker)] else {
            return self.put_back(now, from, key, payload, number);
        };
        let (incarnation, wants_key) = (seat.incarnation, seat.wants_key);
        // First what needs memory of ours: there may be none now, and the message is everybody's until it is given away.
        let long_key = wants_key && key.len() > praas_shm::INLINE_BYTES_MAX;
        let found_room = self.move_to_arena(&mut payload.bytes);
        if let Err(why) = found_room.and_then(|()| if long_key { self.say_key(worker, &key) } else { Ok(()) }) {
            self.answer_text(worker, to.call, Code::NoSpace, &why);
            return self.put_back(now, from, key, payload, number);
        }
        let mut heap = None;
        let (body, bytes) = match payload.bytes {
            Bytes::Inline(inline) => (Body::Inline(inline), HandedBytes::Inline(inline)),
            Bytes::Foreign(foreign) if foreign.giver == worker && foreign.incarnation == incarnation => {
                (Body::Block(*foreign.view.block()), HandedBytes::Back(foreign))
            }
            Bytes::Foreign(foreign) => {
                let block = *foreign.view.block();
                self.introduce(worker, block.owner);
                self.lent_on.insert(BlockKey::from(&block), (foreign, worker));
                (Body::Block(block), HandedBytes::LentOn(BlockKey::from(&block)))
            }
            Bytes::Own(block) => {
                let (bytes, arena) =
                    (block.len(), self.store.arena.as_mut().expect("a block of ours comes from the arena"));
                let lent = arena.lend(block, bytes, me);
                (Body::Block(lent), HandedBytes::Lent(lent))
            }
            Bytes::Heap(buffer) => {
                let copy = Arc::from(buffer.as_ref());
                heap = Some(buffer);
                (Body::Inline(Inline::empty()), HandedBytes::Copy(copy))
            }
            // Over rings it has moved to the arena.
            bytes => {
                let copy: Arc<[u8]> = Arc::from(bytes.as_ref());
                heap = Some(self.store.heap.count(Buffer::from(&copy[..])));
                self.release(bytes);
                (Body::Inline(Inline::empty()), HandedBytes::Copy(copy))
            }
        };
        let about = u64::from(number_of(from));
        let (body, about) = match (body, wants_key) {
            (Body::Inline(inline), true)
                if heap.is_none() && inline.as_slice().len() + key.len() <= praas_shm::INLINE_BYTES_MAX =>
            {
                let both = [inline.as_slice(), &key].concat();
                (Body::Inline(Inline::new(&both).expect("made to fit")), about | (key.len() as u64) << 16)
            }
            (body, true) if !long_key => {
                self.say_key(worker, &key).expect("a short key needs no memory");
                (body, about)
            }
            (body, _) => (body, about),
        };
        if let Some(seat) = &mut self.seats[usize::from(worker)] {
            let message = Message { from, key, payload: (), number };
            seat.handed = Some(Handed { question: to.call, position: None, is_offered: false, message, bytes });
        }
        self.answer_question(worker, to.call, Code::Ok, about, body, heap);
        self.hands_over(now, worker);
    }

    /// What was kept on the heap goes to the arena, where workers can read it; over queues it stays.
    ///
    /// # Errors
    /// There is no room, and nothing has changed.
    fn move_to_arena(&mut self, bytes: &mut Bytes) -> Result<(), String> {
        if let (Bytes::Kept(kept), Some(arena)) = (&*bytes, &mut self.store.arena) {
            let mut block = arena.loan(kept.len()).map_err(|full| full.to_string())?;
            block.copy_from_slice(kept);
            *bytes = Bytes::Own(block);
        }
        Ok(())
    }

    /// The same, and over queues to a buffer: what a worker can be given.
    ///
    /// # Errors
    /// As there.
    pub(super) fn move_to_workers(&mut self, bytes: &mut Bytes) -> Result<(), String> {
        if let (Bytes::Kept(kept), None) = (&*bytes, &self.store.arena) {
            *bytes = Bytes::Heap(self.store.heap.count(Buffer::from(&kept[..])));
        }
        self.move_to_arena(bytes)
    }

    /// Says the key of the message that comes next.
    ///
    /// # Errors
    /// There is no room for it. None is said then, rather than a part of it.
    fn say_key(&mut self, worker: WorkerId, key: &[u8]) -> Result<(), String> {
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let (body, heap) = self.body_of_bytes(key, me);
        if matches!(&body, Body::Inline(inline) if heap.is_none() && inline.as_slice().len() < key.len()) {
            return Err("this process has no payload memory for the key of the message now".into());
        }
        self.send(worker, Descriptor::new(record::KEY_IS, 0, 0, 0, body), heap);
        Ok(())
    }

    pub(super) fn put_back(&mut self, now: u64, from: Sender, key: Arc<[u8]>, payload: Payload, number: u64) {
        if let Sender::Peer(peer) = from {
            // What is in the lane came after it.
            self.close_lane_from(now, peer);
        }
        match self.mailbox.restore(Message { from, key, payload, number }) {
            Some((to, message)) => self.hand(now, to, message),
            None if self.joins.is_empty() => {}
            None => self.joins_due_ns = now,
        }
    }

    /// A worker is dead: a message that it was handed and had not taken goes back to its place, what it sent stays, and what it waited for it
    /// does not any more. Before its memory goes.
    pub(super) fn outlive_mail(&mut self, now: u64, worker: WorkerId, seat: &mut Seat) {
        self.mailbox.worker_died(worker);
        for (run, mut payload) in self.controller.unjoin_waiting() {
            // Now, as it may go to a receive that has begun to wait since.
            if let Bytes::Foreign(Foreign { giver, view, .. }) = &payload.bytes
                && *giver == worker
            {
                payload.bytes = outlived(&mut self.store, view);
            }
            self.on_unjoin(now, run, payload);
        }
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let Process { mailbox, store, .. } = self;
        for payload in mailbox.payloads_mut() {
            if let Bytes::Foreign(Foreign { giver, view, .. }) = &payload.bytes
                && *giver == worker
            {
                payload.bytes = outlived(store, view);
            }
        }
        self.bury_lane(now, worker);
        let Some(handed) = seat.handed.take().filter(|handed| !seat.has_received(handed)) else { return };
        let bytes = match handed.bytes {
            HandedBytes::Inline(inline) => Some(Bytes::Inline(inline)),
            HandedBytes::Lent(block) => {
                self.store.arena.as_mut().and_then(|arena| arena.take_back(me, &block).ok()).map(Bytes::Own)
            }
            HandedBytes::LentOn(key) => self.lent_on.remove(&key).map(|(foreign, _)| Bytes::Foreign(foreign)),
            HandedBytes::Back(foreign) => Some(Bytes::Kept(Arc::from(&foreign.view[..]))),
            HandedBytes::Copy(copy) => Some(Bytes::Kept(copy)),
        };
        let Some(bytes) = bytes else { return };
        let Message { from, key, number, .. } = handed.message;
        self.put_back(now, from, key, Payload { bytes, is_args: false, keeps: false }, number);
    }

    // ---- answers ----------------------------------------------------------------------------------------------

    pub(super) fn answer_text(&mut self, worker: WorkerId, question: u64, code: Code, text: &str) {
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let (body, heap) = self.body_of_bytes(text.as_bytes(), me);
        self.answer_question(worker, question, code, 0, body, heap);
    }

    pub(super) fn answer_question(
        &mut self,
        worker: WorkerId,
        question: u64,
        code: Code,
        aux: u64,
        body: Body,
        heap: Option<Heap>,
    ) {
        let waited = self.seats[usize::from(worker)].as_mut().is_some_and(|seat| {
            seat.receives = None;
            std::mem::take(&mut seat.waits)
        });
        if waited {
            self.controller.waited(worker);
        }
        self.send(worker, Descriptor::new(record::ANSWER, code as u16, question, aux, body), heap);
    }

    /// The function on this worker waits for an answer that may take a while.
    pub(super) fn now_waits(&mut self, worker: WorkerId) {
        if let Some(seat) = &mut self.seats[usize::from(worker)]
            && !std::mem::replace(&mut seat.waits, true)
        {
            self.controller.waits(worker);
        }
    }

    /// Bytes of ours for a worker to read: in the record, in our arena while it reads them, or on the heap. Cut to what a record holds when there
    /// is no room.
    pub(super) fn body_of_bytes(&mut self, bytes: &[u8], to: ParticipantId) -> (Body, Option<Heap>) {
        if let Some(inline) = Inline::new(bytes) {
            return (Body::Inline(inline), None);
        }
        if self.store.arena.is_some() {
            return (self.lend_bytes(bytes, to), None);
        }
        (Body::Inline(Inline::empty()), Some(self.store.heap.count(Buffer::from(bytes))))
    }
}
