//! A worker's ends of a lane: messages to and from one worker of another process, without either controller (`controller::lane`, `praas_shm::lane`).
//!
//! The controller says what we may do with it (`wire::lane`). What we sent stays ours until the other end has read it, wherever it was received: over the
//! lane, which the other worker says in its file, or by its controller, which had copied it when it closed the lane.

use praas_shm::lane::LANE_MESSAGES_MAX;
use praas_shm::{
    BadDescriptor, Identity, LaneFile, LaneReceiver, LaneSender, OwnLane, PeerLane, Polled, SegmentConfig,
};
use praas_shm::{SegmentFile, Unsent};

use super::*;
use crate::letter::{Content, Letter};
use crate::payload::{Laned, LanedBytes};
use crate::wire::{FromWorker, JoinLane, lane as word};
use crate::worker::messages::{Message, MessageError};

/// Lanes that are over and whose other end still reads something. At the bound there is no new one.
const ENDING_MAX: usize = 4;
/// Blocks of ours that the other end may be done with before we look.
const OUT_KEPT: usize = 2;

/// The lane that we use, and those that are over.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    /// The file for the next one.
    made: Option<(u64, OwnLane)>,
    current: Option<Box<Lane>>,
    ending: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    number: u64,
    /// The process at the other end.
    process: u16,
    /// How long a receive looks at it before the controller is asked.
    patience: Patience,
    sends: bool,
    receives: bool,
    /// What is in it nobody has to read, as far as we will ever know.
    lost: bool,
    sender: LaneSender,
    receiver: Rc<RefCell<LaneReceiver>>,
    segment: Arc<PeerSegment>,
    /// What the messages carry that the other end may still read, by position.
    out: Vec<(u64, Carries)>,
}

#[derive(Debug)]
enum Carries {
    Loan(Rc<Loan>),
    /// Theirs, that goes back.
    Back(Laned),
}

impl From<Carries> for Place<'_> {
    fn from(carries: Carries) -> Self {
        match carries {
            Carries::Loan(loan) => Place::Own(Rc::into_inner(loan).expect("not sent, and so with nobody else")),
            Carries::Back(laned) => Place::Laned(laned),
        }
    }
}

/// What a lane has for a receive.
enum Found {
    Nothing,
    Message {
        bytes: Bytes<'static>,
        key: Inline,
    },
    /// Nothing that the receive can have from it: the controller closes it.
    Other,
}

/// Why a message did not go over a lane.
pub(super) enum NotLaned<'a> {
    /// It is to go the ordinary way.
    Ordinary(Bytes<'a>),
    Failed(MessageError),
}

impl Lane {
    /// Lets go of what the other end reads no more.
    fn settle(&mut self) {
        while let Some(position) = self.sender.released() {
            self.out.retain(|(sent, _)| *sent != position);
        }
        if let (false, Some(closed)) = (self.out.is_empty(), self.sender.closed()) {
            // Their controller copied those.
            self.out.retain(|(sent, _)| *sent < closed.from);
        }
    }

    fn carried(&self, position: u64) -> Option<&Rc<Loan>> {
        self.out.iter().find_map(|(sent, carries)| match carries {
            Carries::Loan(loan) if *sent == position => Some(loan),
            _ => None,
        })
    }

    /// The next message, if its key is the one that is wanted (empty: any).
    fn take(&mut self, wanted: &[u8]) -> Result<Found, BadDescriptor> {
        let mut receiver = self.receiver.borrow_mut();
        let Some((first, second)) = receiver.peek()? else { return Ok(Found::Nothing) };
        // What makes no sense stays where it is, for the controller to say so.
        let Some(letter) = Letter::read(&first, second.as_ref()) else { return Ok(Found::Other) };
        if !wanted.is_empty() && wanted != letter.key.as_slice() {
            return Ok(Found::Other);
        }
        let bytes = match letter.content {
            Content::Inline(_) => None,
            Content::Block(block) => match self.segment.view(&block) {
                Ok(view) => Some(LanedBytes::Theirs(view)),
                Err(_) => return Ok(Found::Other),
            },
            Content::Back { position, .. } => match self.carried(position) {
                Some(loan) => Some(LanedBytes::Ours(Rc::clone(loan))),
                None => return Ok(Found::Other),
            },
        };
        let position = match receiver.poll()? {
            Polled::Message { position, .. } => position,
            Polled::Closed => return Ok(Found::Other),
            Polled::Empty => return Ok(Found::Nothing),
        };
        let bytes = match (bytes, letter.content) {
            (Some(bytes), _) => Place::Laned(Laned::new(bytes, &self.receiver, position)).into(),
            (None, Content::Inline(inline)) => {
                receiver.release(position);
                inline.into()
            }
            (None, _) => unreachable!("only what is inline has no place"),
        };
        Ok(Found::Message { bytes, key: letter.key })
    }
}

impl Session {
    /// The controller wants our file for a lane.
    pub(super) fn make_lane(&mut self, number: u64) -> Result<(), Fatal> {
        self.settle_lanes();
        let file = match LaneFile::create() {
            Ok((file, own)) if self.lanes.current.is_none() && self.lanes.ending.len() < ENDING_MAX => {
                self.lanes.made = Some((number, own));
                Some(file)
            }
            _ => None,
        };
        let word = serde_json::to_vec(&FromWorker::Lane { lane: number }).expect("our own messages are serialisable");
        let fds: Vec<_> = file.iter().map(LaneFile::fd).collect();
        handover::send(self.control.as_fd(), &word, &fds).map_err(|e| fatal("cannot write the control socket", e))
    }

    /// Who is at the other end. A lane that cannot be used is left alone: the controller is asked for everything, and closes it.
    pub(super) fn join_lane(&mut self, join: &JoinLane, files: [OwnedFd; 4]) {
        let Some((number, own)) = self.lanes.made.take().filter(|(number, _)| *number == join.lane) else { return };
        match self.try_join(join, own, files) {
            Ok(lane) => self.lanes.current = Some(Box::new(lane)),
            Err(why) => eprintln!("praas-worker: lane {number} to another process cannot be used: {why}"),
        }
    }

    fn try_join(&self, join: &JoinLane, own: OwnLane, files: [OwnedFd; 4]) -> Result<Lane, String> {
        let [theirs, their_controller, our_controller, segment] = files;
        let attach = |file| PeerLane::attach(&LaneFile::from_fd(file)).map_err(|error| error.to_string());
        let (theirs, their_controller, our_controller) =
            (attach(theirs)?, attach(their_controller)?, attach(our_controller)?);
        let crate::wire::LaneSegment { participant, incarnation, process_id, ring_slots, arena_bytes } = join.segment;
        let participant = ParticipantId::new(participant).ok_or("a participant out of range")?;
        let identity = Identity { participant, incarnation, process: process_id };
        let config = SegmentConfig { ring_slots, arena_bytes };
        let segment = PeerSegment::attach(&SegmentFile::from_fd(segment), &identity, &config);
        Ok(Lane {
            number: join.lane,
            process: join.process,
            patience: join.patience,
            sends: false,
            receives: false,
            lost: false,
            sender: LaneSender::new(&own, &theirs, &their_controller),
            receiver: Rc::new(RefCell::new(LaneReceiver::new(&own, &theirs, &our_controller))),
            segment: segment.map_err(|error| error.to_string())?,
            out: Vec::new(),
        })
    }

    /// The controller says what we may do with a lane.
    pub(super) fn lane_changed(&mut self, number: u64, what: u16) {
        if what & word::OVER != 0 {
            self.lanes.made.take_if(|(made, _)| *made == number);
            if let Some(lane) = self.lanes.current.take_if(|lane| lane.number == number) {
                self.lanes.ending.push(Lane { sends: false, receives: false, lost: what & word::LOST != 0, ..*lane });
            }
        } else if let Some(lane) = self.lanes.current.as_mut().filter(|lane| lane.number == number) {
            lane.sends |= what & word::SENDS != 0;
            lane.receives |= what & word::RECEIVES != 0;
        }
        if what & word::UNREAD != 0 {
            self.lanes.ending.iter_mut().filter(|lane| lane.number == number).for_each(|lane| lane.out.clear());
        }
        self.settle_lanes();
    }

    /// Lets go of what others read no more.
    pub(super) fn settle_lanes(&mut self) {
        if let Some(lane) = &mut self.lanes.current {
            lane.settle();
        }
        self.lanes.ending.retain_mut(|lane| {
            lane.settle();
            !lane.out.is_empty()
        });
    }

    /// Whether what comes from that process comes over a lane.
    pub(super) fn has_lane_from(&self, process: u16) -> bool {
        self.lanes.current.as_ref().is_some_and(|lane| lane.receives && lane.process == process)
    }

    /// Whether others may still read what we sent over a lane that is over.
    #[inline]
    pub(super) fn has_lanes_ending(&self) -> bool {
        !self.lanes.ending.is_empty()
    }

    fn lane(&mut self, number: u64) -> Option<&mut Lane> {
        let Lanes { current, ending, .. } = &mut self.lanes;
        current.as_deref_mut().into_iter().chain(ending).find(|lane| lane.number == number)
    }

    /// Sends a message over the lane to that process, if there is one.
    pub(super) fn send_by_lane<'a>(
        &mut self,
        to: u16,
        key: &[u8],
        bytes: Bytes<'a>,
        deadline_ns: u64,
    ) -> Result<(), NotLaned<'a>> {
        let (Some(lane), Some(key)) = (self.lanes.current.as_mut(), Inline::new(key)) else {
            return Err(NotLaned::Ordinary(bytes));
        };
        if !lane.sends || lane.process != to {
            return Err(NotLaned::Ordinary(bytes));
        }
        // The line that says it is the receiver's to write: not for each message.
        if lane.out.len() >= OUT_KEPT || lane.sender.unreleased() >= LANE_MESSAGES_MAX / 2 {
            lane.settle();
        }
        let Bytes { inline, place } = bytes;
        let ours = |loan: Loan| {
            let block = loan.place().expect("a worker over rings has an arena");
            (Content::Block(block), Some(Carries::Loan(Rc::new(loan))))
        };
        let (content, carries) = match place {
            Place::Here => (Content::Inline(inline), None),
            Place::Own(loan) => ours(loan),
            Place::Laned(laned) if laned.came_by(&lane.receiver).is_some() => {
                let (block, position) = laned.came_by(&lane.receiver).expect("looked at");
                (Content::Back { block, position }, Some(Carries::Back(laned)))
            }
            place => {
                let bytes: Bytes<'a> = place.into();
                let Ok(mut copy) = self.memory.loan(bytes.as_ref().len()) else {
                    return Err(NotLaned::Ordinary(bytes));
                };
                copy.copy_from_slice(bytes.as_ref());
                ours(copy)
            }
        };
        let not_sent = |carries: Option<Carries>| {
            let place = carries.map_or(Place::Here, Place::from);
            NotLaned::Ordinary(Bytes { inline, place })
        };
        let (first, second) = Letter { key, content }.to_descriptors();
        // More than there are messages: the other end releases what it was not sent. The ordinary way closes the lane.
        if lane.out.len() as u64 > LANE_MESSAGES_MAX {
            return Err(not_sent(carries));
        }
        match lane.sender.try_send(&first, second.as_ref()) {
            Ok(position) => {
                lane.out.extend(carries.map(|carries| (position, carries)));
                Ok(())
            }
            Err(Unsent::Full | Unsent::Closed) => Err(not_sent(carries)),
            Err(Unsent::Unsure(position)) => {
                let number = lane.number;
                lane.out.extend(carries.map(|carries| (position, carries)));
                if self.was_taken(number, position, deadline_ns).map_err(NotLaned::Failed)? {
                    return Ok(());
                }
                let carries = self.lane(number).and_then(|lane| {
                    let at = lane.out.iter().position(|(sent, _)| *sent == position)?;
                    Some(lane.out.swap_remove(at).1)
                });
                Err(not_sent(carries))
            }
        }
    }

    /// The other end's controller is in the middle of closing the lane: waits until it has said whether this message is its.
    #[cold]
    fn was_taken(&mut self, number: u64, position: u64, deadline_ns: u64) -> Result<bool, MessageError> {
        loop {
            match self.lane(number) {
                Some(Lane { sender, .. }) if sender.closed().is_some() => {
                    return Ok(sender.closed().is_some_and(|closed| position < closed.to));
                }
                Some(Lane { lost: false, .. }) => {}
                _ => {
                    let text = "the other process was lost as it took the message; it may have had it".to_owned();
                    return Err(MessageError::ProcessLost { text });
                }
            }
            if now_ns() >= deadline_ns {
                let text = "the other process did not say in time that it has it; it may have it yet".to_owned();
                return Err(MessageError::Timeout { text });
            }
            let soon_ns = deadline_ns.min(now_ns() + 1_000_000);
            let waited = self.wait(Patience::NONE, soon_ns, |session| {
                session.controller_ready() || session.lane(number).is_none_or(|lane| lane.sender.closed().is_some())
            });
            waited.map(drop).and_then(|()| self.poll_controller()).unwrap_or_else(|Fatal(text)| die(&text));
        }
    }

    /// The next message of that process, if there is a lane from it and the message comes over that soon enough.
    pub(super) fn receive_by_lane(
        &mut self,
        from: u16,
        wanted: &[u8],
        deadline_ns: u64,
    ) -> Result<Option<Message>, MessageError> {
        let mut since_ns = None;
        loop {
            while self.controller_ready() {
                self.poll_controller().unwrap_or_else(|Fatal(text)| die(&text));
            }
            let Some(lane) = self.lanes.current.as_mut().filter(|lane| lane.receives && lane.process == from) else {
                return Ok(None);
            };
            let receiver = Rc::clone(&lane.receiver);
            let patience = lane.patience;
            let found = {
                let seen = receiver.borrow();
                let word = seen.watch();
                // The look comes after the watch began.
                match seen.peek() {
                    Ok(None) => self.watch(|| word.changed()) || self.controller_ready(),
                    _ => true,
                }
            };
            if found {
                let Some(lane) = self.lanes.current.as_mut() else { continue };
                match lane.take(wanted) {
                    Ok(Found::Nothing) => {}
                    Ok(Found::Message { bytes, key }) => {
                        let from = self.process_name(from)?;
                        let payload_bytes = bytes.as_ref().len();
                        return Ok(Some(Message { bytes, payload_bytes, from, key: key.as_slice().to_vec() }));
                    }
                    Ok(Found::Other) | Err(_) => return Ok(None),
                }
            }
            let now = now_ns();
            let waited_ns = now - *since_ns.get_or_insert(now);
            if now >= deadline_ns || waited_ns >= patience.linger_ns {
                return Ok(None);
            }
            if waited_ns >= patience.spin_ns {
                self.return_or_die();
                rustix::thread::sched_yield();
            }
        }
    }
}
