//! One worker as the controller has it before it: its OS process, its channel, the calls it was given.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use praas_shm::child::Child;
use praas_shm::{BlockRef, Body, Descriptor, Inline, LentConnection, Link, PeerSegment, SegmentFile};
use praas_transport::Flush;
use praas_transport::queue::{Buffer, Message, Receiver, Sender};
use praas_transport::reactor::Interest;

use super::body::{Foreign, Heap};
use super::mail::Handed;
use crate::confinement::Group;
use crate::controller::{CallKey, Cause};
use crate::wire::record;

/// Records that may wait for a worker that does not read. It is sent a few requests at a time; the rest are answers to
/// its own calls (at most 1024) and returns of blocks it lent us.
const BACKLOG_MAX: usize = 4096;

/// Texts that a worker may not have read: as many as it may have calls open, one question about the state, and as many again to be sure.
const TEXTS_MAX: usize = 2 * (crate::worker::NESTED_MAX + 2);

#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) incarnation: u64,
    pub(crate) child: Child,
    pub(crate) control: OwnedFd,
    pub(crate) channel: Channel,
    /// Bit `n`: this worker has the segment of worker `n`.
    pub(crate) knows: u64,
    pub(crate) cpu: Option<usize>,
    /// Oldest first: it answers them in this order.
    pub(crate) given: VecDeque<Given>,
    /// Calls of a batch that it is still to be given.
    pub(crate) batch_left: u16,
    backlog: VecDeque<(Descriptor, Option<Heap>)>,
    /// Blocks of objects that are its own again, to be said when there is room. As many as it wrote objects: its own memory bounds them.
    returns: VecDeque<BlockRef>,
    /// The last texts of errors that were lent to it, given back or not.
    texts: VecDeque<BlockRef>,
    /// Ring: something was sent since the bell was last rung.
    unrung: bool,
    /// Queue channel: the kernel said that there is something, and we have not seen the end of it.
    pub(crate) readable: bool,
    /// The key that its next question is about.
    pub(crate) key: Option<Vec<u8>>,
    /// Whether its receive is to be told the key.
    pub(crate) wants_key: bool,
    /// The function on it waits for a message or for another process.
    pub(crate) waits: bool,
    /// Calls of other processes that the function on it has open.
    pub(crate) away: u32,
    /// The question with which it waits for a message.
    pub(crate) receives: Option<u64>,
    /// The message it was handed last.
    pub(crate) handed: Option<Handed>,
    /// Why we killed it, if we did.
    pub(crate) verdict: Option<Cause>,
    /// What binds it.
    pub(crate) group: Option<Group>,
}

#[derive(Debug)]
pub(crate) enum Channel {
    /// Ring: waiting for the worker to map its segment.
    Mapping {
        file: SegmentFile,
        eventfd: OwnedFd,
    },
    Ring {
        file: SegmentFile,
        eventfd: OwnedFd,
        segment: Arc<PeerSegment>,
        link: Box<Link>,
    },
    Queue {
        sender: Box<Sender>,
        receiver: Box<Receiver>,
    },
}

/// A call a worker has been given, and what it was given with it.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) call: CallKey,
    /// Of its record in our ring, once it is there; or how many records our queue had taken at its end.
    pub(crate) position: Option<u64>,
    pub(crate) request: Request,
    pub(crate) is_args: bool,
    /// It runs together with those before and behind it that do, when the worker has all of them.
    pub(crate) in_batch: bool,
}

impl Given {
    /// Whether this block is what it was given.
    pub(crate) fn is_given(&self, block: &BlockRef) -> bool {
        match &self.request {
            Request::Lent(lent) => super::same_block(lent, block),
            Request::Foreign(foreign) | Request::Back(foreign) => super::same_block(foreign.view.block(), block),
            Request::Inline(_) | Request::Heap(_) => false,
        }
    }
}

#[derive(Debug)]
pub(crate) enum Request {
    Inline(Inline),
    /// A block of ours, lent to the worker.
    Lent(BlockRef),
    /// A caller's block, passed on.
    Foreign(Foreign),
    /// A block of the worker's own, back.
    Back(Foreign),
    /// Queue: the buffer, once it is with the kernel. One a worker, and not counted in the quota.
    Heap(Option<Buffer>),
}

/// The worker takes nothing any more; it is to be killed.
#[derive(Debug)]
pub(crate) struct Deaf;

impl Seat {
    pub(crate) fn new(incarnation: u64, child: Child, control: OwnedFd, channel: Channel, cpu: Option<usize>) -> Seat {
        Seat {
            incarnation,
            child,
            control,
            channel,
            knows: 0,
            cpu,
            given: VecDeque::new(),
            batch_left: 0,
            backlog: VecDeque::new(),
            returns: VecDeque::new(),
            texts: VecDeque::new(),
            unrung: false,
            readable: true,
            key: None,
            wants_key: false,
            waits: false,
            away: 0,
            receives: None,
            handed: None,
            verdict: None,
            group: None,
        }
    }

    /// What to wait for, and under which kind of token.
    pub(crate) fn watched(&self) -> Vec<(BorrowedFd<'_>, usize, Interest)> {
        let mut watched = vec![
            (self.pidfd(), super::PIDFDS, Interest::Read),
            (self.control.as_fd(), super::CONTROLS, Interest::Read),
        ];
        if let Channel::Queue { sender, receiver } = &self.channel {
            watched.push((sender.kernel_queue().fd(), super::QUEUES_OUT, Interest::Write));
            watched.push((receiver.kernel_queue().fd(), super::QUEUES_IN, Interest::Read));
        }
        watched
    }

    /// Sends a record, or keeps it until there is room. The worker is told by [`Seat::ring`].
    pub(crate) fn send(&mut self, descriptor: Descriptor, heap: Option<Heap>) -> Result<(), Deaf> {
        if self.backlog.len() >= BACKLOG_MAX {
            return Err(Deaf);
        }
        self.backlog.push_back((descriptor, heap));
        self.flush()
    }

    /// Gives the worker a block of an object back, now or when it has read what it was sent before: somebody else may have deleted thousands
    /// of its objects while it computes.
    pub(crate) fn give_back(&mut self, block: BlockRef) -> Result<(), Deaf> {
        self.returns.push_back(block);
        self.flush()
    }

    /// A text was lent to it. Gives the one that it must have read by now, or never will: to be taken back.
    pub(crate) fn lent_text(&mut self, text: BlockRef) -> Option<BlockRef> {
        self.texts.push_back(text);
        if self.texts.len() > TEXTS_MAX { self.texts.pop_front() } else { None }
    }

    /// Whether an answer to a question still waits here: then it cannot have been waited for.
    pub(crate) fn owes_answer(&self) -> bool {
        self.backlog.iter().any(|(descriptor, _)| descriptor.kind() & record::KIND == record::ANSWER)
    }

    /// Records that wait.
    pub(crate) fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Whether something waits to be sent.
    pub(crate) fn wants_flush(&self) -> bool {
        !self.backlog.is_empty()
            || !self.returns.is_empty()
            || matches!(&self.channel, Channel::Queue { sender, .. } if sender.wants_write())
    }

    /// Sends what waits, as far as there is room.
    pub(crate) fn flush(&mut self) -> Result<(), Deaf> {
        match &mut self.channel {
            Channel::Mapping { .. } => {}
            Channel::Ring { link, .. } => {
                while let Some((descriptor, _)) = self.backlog.front() {
                    let Ok(position) = link.producer.try_send(descriptor) else { break };
                    let call = descriptor.id();
                    if descriptor.kind() & record::KIND == record::REQUEST
                        && let Some(given) = self.given.iter_mut().rfind(|given| given.call == call)
                    {
                        given.position.get_or_insert(position);
                    }
                    self.unrung = true;
                    self.backlog.pop_front();
                }
                while let (true, Some(block)) = (self.backlog.is_empty(), self.returns.front()) {
                    let release = Descriptor::new(record::RELEASE, 0, 0, 0, Body::Block(*block));
                    if link.producer.try_send(&release).is_err() {
                        break;
                    }
                    self.unrung = true;
                    self.returns.pop_front();
                }
            }
            // One message at a time, so that the count of records at its end is its own.
            Channel::Queue { sender, .. } => loop {
                let flushed = sender.flush().map_err(|_| Deaf)?;
                while let Some(message) = sender.take_sent() {
                    // Kept in case the worker dies without having begun; an answer's body is of no more use.
                    let head = Descriptor::from_bytes(&message.head).ok();
                    if let (Some(head), Some(handed)) = (&head, &mut self.handed)
                        && head.kind() & record::KIND == record::ANSWER
                        && head.id() == handed.question
                    {
                        handed.position.get_or_insert(sender.stats().records);
                    }
                    let id = head.map(|descriptor| descriptor.id());
                    if let Some(given) = self.given.iter_mut().find(|given| Some(given.call) == id) {
                        given.position.get_or_insert(sender.stats().records);
                        if let Request::Heap(kept @ None) = &mut given.request {
                            *kept = Some(message.body);
                        }
                    }
                }
                if flushed == Flush::Blocked {
                    break;
                }
                let Some((descriptor, heap)) = self.backlog.pop_front() else { break };
                let body = heap.map_or_else(|| Buffer::with_len(0), Heap::into_buffer);
                sender.queue(Message { head: descriptor.to_bytes(), body }).expect("a flushed sender has room");
            },
        }
        Ok(())
    }

    /// Wakes the worker if something was sent. Once for all that was sent in a turn: a worker that is woken by the first of many
    /// calls is done with it before the second is there, and has to be woken for each.
    pub(crate) fn ring(&mut self) {
        if std::mem::take(&mut self.unrung)
            && let Channel::Ring { link, .. } = &self.channel
        {
            link.bell.ring();
        }
    }

    /// The body of a record to this worker, from what a call was given.
    pub(crate) fn body_of(request: &Request) -> Body {
        match request {
            Request::Inline(inline) => Body::Inline(*inline),
            Request::Lent(block) => Body::Block(*block),
            Request::Foreign(foreign) | Request::Back(foreign) => Body::Block(*foreign.view.block()),
            Request::Heap(_) => Body::Inline(Inline::empty()),
        }
    }

    /// Whether the worker had begun on the first call it has, as far as one can tell from outside.
    pub(crate) fn had_begun(&self) -> bool {
        // Given a call that is no longer here: it was answered, though not as it should be.
        let last = self.given.iter().take_while(|given| given.in_batch).last();
        let Some(given) = last.or(self.given.front()) else { return true };
        match &self.channel {
            Channel::Mapping { .. } => false,
            Channel::Ring { link, .. } => given.position.is_some_and(|position| position < link.peer_taken()),
            // Begun once its last record was read. What still waits behind it, answers for one, says nothing.
            Channel::Queue { sender, .. } => given.position.is_some_and(|end| has_read(sender, end)),
        }
    }

    /// Whether the worker had a message in hand that it was handed, as far as one can tell from outside.
    pub(crate) fn has_received(&self, handed: &Handed) -> bool {
        match &self.channel {
            Channel::Mapping { .. } => false,
            Channel::Ring { link, .. } => link.peer_received() >= handed.question,
            Channel::Queue { sender, .. } => handed.position.is_some_and(|end| has_read(sender, end)),
        }
    }

    /// Over a queue: what was not all sent yet, in our hands again with the calls that it belongs to.
    pub(crate) fn take_unsent(&mut self) {
        let Channel::Queue { sender, .. } = &mut self.channel else { return };
        let begun =
            sender.take_unsent().and_then(|message| Some((Descriptor::from_bytes(&message.head).ok()?, message.body)));
        let waiting = self.backlog.drain(..).filter_map(|(record, heap)| Some((record, heap?.into_buffer())));
        for (record, body) in begun.into_iter().chain(waiting) {
            let is_it =
                |given: &&mut Given| given.call == record.id() && record.kind() & record::KIND == record::REQUEST;
            if let Some(Given { request: Request::Heap(kept @ None), .. }) = self.given.iter_mut().find(is_it) {
                *kept = Some(body);
            }
        }
    }

    /// Takes back what the worker has not begun on, whether it is there already or waits for room. Rings only.
    pub(crate) fn withdraw(&mut self) -> VecDeque<Given> {
        let Channel::Ring { link, .. } = &self.channel else { return VecDeque::new() };
        let taken = link.withdraw();
        let begun = self.given.iter().take_while(|given| given.position.is_some_and(|position| position < taken));
        let unbegun = self.given.split_off(begun.count());
        self.backlog.retain(|(record, _)| {
            record.kind() & record::KIND != record::REQUEST || unbegun.iter().all(|given| given.call != record.id())
        });
        unbegun
    }

    /// The worker found a request void that stood at `position`: takes that back which we saw begun.
    pub(crate) fn take_void(&mut self, call: CallKey, position: u64) -> Option<Given> {
        let is_it = |given: &Given| given.call == call && given.position == Some(position);
        if self.given.front().is_some_and(is_it) { self.given.pop_front() } else { None }
    }

    /// Whether this worker says that it sleeps; rings only. One that was just rung still says so.
    pub(crate) fn sleeps(&self) -> bool {
        matches!(&self.channel, Channel::Ring { link, .. } if link.bell.peer_sleeps())
    }

    /// What this worker says it is doing; rings only.
    pub(crate) fn activity(&self) -> u64 {
        match &self.channel {
            Channel::Ring { segment, .. } => segment.activity(),
            _ => 0,
        }
    }

    /// Whether its function waits for nested calls, as far as it says so; over queues nobody does.
    pub(crate) fn awaits_calls(&self) -> bool {
        !matches!(self.channel, Channel::Ring { .. }) || self.activity() == crate::worker::ACTIVITY_WAITING
    }

    /// Where this worker says it is with a client's connection; `None` while it changes.
    pub(crate) fn connection(&self) -> Option<LentConnection> {
        match &self.channel {
            Channel::Ring { segment, .. } => segment.connection(),
            _ => None,
        }
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.child.pidfd()
    }
}

/// Whether so many records of our queue were read.
fn has_read(sender: &Sender, end: u64) -> bool {
    let queued = sender.kernel_queue().queued().unwrap_or(0);
    sender.stats().records.saturating_sub(u64::from(queued)) >= end
}
