//! Lanes: shared memory over which a worker of ours and one of another process exchange messages directly, for as long as nobody else has a say in them.
//!
//! Two lanes make a conversation, one each way. We are the arbiter of the one that comes to us: as long as it is open, what is in it counts as being in
//! our mailbox, behind nothing else of that process. So we close it, and take what is in it, *before* we take in a message that came another way, and before
//! anybody but its receiver receives from that process.
//!
//! | step | leader | follower |
//! |---|---|---|
//! | 1 | finds the conversation hot; has its worker make a file | |
//! | 2 | `Ask`, with that file, its own, and the worker's memory | if it is warm here, too: has its worker make a file |
//! | 3 | | `Join`, with the same of its own |
//! | 4 | each, when its worker waits for a message and every parcel to the other end has its verdict: `Go`, and tells the worker that it may send over it | |
//! | 5 | each, when it has the other's `Go` and nothing of that process in its mailbox: tells the worker that messages come over it | |
//!
//! Either end may say `Over` at any time, and does when it closes its lane; the other then closes its own. What a dead worker had been sent nobody reads any
//! more, and so it says that, too.

use std::collections::VecDeque;

use praas_shm::{LaneArbiter, LaneFile, OwnLane, PeerLane};

use super::mail::{number_of, outlived};
use super::near::lane::{Hand, LaneNews, LaneWord};
use super::*;
use crate::controller::lane::Talks;
use crate::controller::mailbox::{Receiver, Sender, Wanted};
use crate::controller::peers::PeerNumber;
use crate::letter::{Content, Letter};
use crate::placement::Patience;
use crate::wire::{JoinLane, LaneSegment, lane as word};

/// Conversations at a time.
const CONVERSATIONS_MAX: usize = 16;
/// Conversations that are over, of which a worker may still read something when it dies.
const PAST_MAX: usize = 64;

/// The conversations of our workers that have lanes, or are about to.
#[derive(Debug)]
pub(super) struct Lanes {
    is_on: bool,
    pub(super) talks: Talks,
    conversations: Vec<Conversation>,
    past: VecDeque<Whose>,
    lanes: u64,
}

/// Who has a lane with whom.
#[derive(Debug, Clone, Copy)]
struct Whose {
    /// Among our workers.
    lane: u64,
    /// Between the two processes: the leader's.
    number: u64,
    peer: PeerNumber,
    worker: WorkerId,
    incarnation: u64,
}

#[derive(Debug)]
struct Conversation {
    whose: Whose,
    /// Of the worker's channel, as others see it.
    memory: Arc<PeerSegment>,
    patience: Patience,
    own: OwnLane,
    own_file: LaneFile,
    /// The worker's end, when it has made its file.
    ours: Option<(Hand, Arc<PeerLane>)>,
    theirs: Option<Theirs>,
    /// Once both ends are there.
    arbiter: Option<LaneArbiter>,
    /// The worker has the files of all.
    is_joined: bool,
    /// Said, and heard, that a worker sends over its lane.
    goes: bool,
    heard: bool,
}

/// The other end.
#[derive(Debug)]
struct Theirs {
    hand: Hand,
    worker: Arc<PeerLane>,
    memory: Arc<PeerSegment>,
}

impl Theirs {
    fn attach(hand: Hand) -> Result<Theirs, String> {
        let worker = PeerLane::attach(&hand.worker).map_err(|error| error.to_string())?;
        let LaneSegment { participant, incarnation, process_id: process, ring_slots, arena_bytes } = hand.segment;
        let participant = ParticipantId::new(participant).ok_or("a participant out of range")?;
        let identity = praas_shm::Identity { participant, incarnation, process };
        let memory = PeerSegment::attach(&hand.memory, &identity, &SegmentConfig { ring_slots, arena_bytes });
        Ok(Theirs { worker, memory: memory.map_err(|error| error.to_string())?, hand })
    }
}

impl Conversation {
    /// Has both ends: from here on the other's worker may come to send over it.
    fn arbitrate(&mut self) {
        if let (Some((_, ours)), Some(theirs)) = (&self.ours, &self.theirs) {
            self.arbiter = Some(LaneArbiter::new(&self.own, &theirs.worker, ours));
        }
    }
}

/// How a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// By us.
    Ours,
    /// By us, as our worker is dead.
    OurDeath,
    /// By the other end.
    Theirs,
    /// By the other end, as its worker is dead.
    TheirDeath,
    /// There is no other end any more.
    Lost,
}

impl Lanes {
    /// None yet.
    pub(super) fn new(config: &ProcessConfig, placement: &Placement) -> Lanes {
        // Somebody has to look at a lane: nobody is woken. With `--isolate` workers do not read each other's memory.
        let spins = placement.patience(None, None, true, 2).spin_ns > 0;
        let is_on = config.near && config.ipc == Ipc::Ring && !config.isolate && spins;
        Lanes { is_on, talks: Talks::default(), conversations: Vec::new(), past: VecDeque::new(), lanes: 0 }
    }

    fn of(&mut self, peer: PeerNumber, number: u64) -> Option<usize> {
        self.conversations.iter().position(|it| (it.whose.peer, it.whose.number) == (peer, number))
    }

    fn of_peer(&self, peer: PeerNumber) -> Option<usize> {
        self.conversations.iter().position(|it| it.whose.peer == peer)
    }

    fn of_worker(&self, worker: WorkerId) -> Option<usize> {
        self.conversations.iter().position(|it| it.whose.worker == worker)
    }

    /// Whether this is between two that have a lane, or soon may.
    fn are_joined(&self, worker: WorkerId, peer: PeerNumber) -> bool {
        self.conversations.iter().any(|it| (it.whose.worker, it.whose.peer) == (worker, peer))
    }

    fn has_room(&self, peer: PeerNumber, worker: WorkerId) -> bool {
        self.conversations.len() < CONVERSATIONS_MAX && self.of_peer(peer).is_none() && self.of_worker(worker).is_none()
    }
}

impl Process {
    /// A worker is about to receive. Whether what it wants comes over its lane, where it is to look; lanes that must not be open meanwhile are closed.
    pub(super) fn before_receive(
        &mut self,
        now: u64,
        worker: WorkerId,
        wanted: Wanted<'_>,
        deadline_ns: u64,
        looked: bool,
    ) -> bool {
        let from = match wanted.from {
            _ if !self.lanes.is_on => return false,
            Some(Sender::Own) => return false,
            // Of a worker that lies.
            Some(Sender::Peer(peer)) if self.peers.name_of(peer).is_none() => return false,
            Some(Sender::Peer(peer)) => Some(peer),
            None => None,
        };
        self.lanes.talks.receives(worker, from);
        if let Some(peer) = from
            && self.is_to_have_lane(worker, peer)
        {
            self.begin_lane(worker, peer, None);
        }
        for at in (0..self.lanes.conversations.len()).rev() {
            let it = &self.lanes.conversations[at];
            let peer = it.whose.peer;
            if it.arbiter.is_none() || from.is_some_and(|from| from != peer) {
                continue;
            }
            if it.whose.worker != worker || from.is_none() {
                self.close_lane(now, at, Ending::Ours);
                continue;
            }
            // It sends nothing while it asks, whether or not its answer is here already.
            self.may_go(worker);
            match self.lanes.conversations[at].heard {
                // Who does not wait would not wait for the other end's word either.
                false if deadline_ns <= now => self.close_lane(now, at, Ending::Ours),
                false => {}
                true if looked => self.close_lane(now, at, Ending::Ours),
                // Older than what comes over the lane.
                true if self.mailbox.has(wanted) => {}
                true if self.mailbox.has_of(Sender::Peer(peer)) => self.close_lane(now, at, Ending::Ours),
                true => {
                    self.permit(at, word::RECEIVES);
                    return true;
                }
            }
        }
        false
    }

    /// Whether we are to begin a lane between the two, which takes a receive that is asked for. Not where functions run for messages: those have to be in
    /// the mailbox.
    fn is_to_have_lane(&self, worker: WorkerId, peer: PeerNumber) -> bool {
        self.lanes.is_on
            && self.lanes.talks.is_hot(worker, peer)
            && self.lanes.has_room(peer, worker)
            && self.peers.leads(peer)
            && self.peers.may_have_lanes(peer)
            && self.joins.is_empty()
    }

    /// A worker is about to be offered a message of that process, and will not ask. Whether it is better that it does: for the sake of a lane.
    pub(super) fn before_offer(&mut self, worker: WorkerId, peer: PeerNumber) -> bool {
        if self.lanes.are_joined(worker, peer) || self.is_to_have_lane(worker, peer) {
            return true;
        }
        self.lanes.talks.receives(worker, Some(peer));
        false
    }

    /// Worker and process have a conversation that is worth a lane.
    fn begin_lane(&mut self, worker: WorkerId, peer: PeerNumber, asked: Option<(u64, Theirs)>) -> bool {
        let Some(Seat { channel: Channel::Ring { segment, .. }, incarnation, cpu, .. }) =
            &self.seats[usize::from(worker)]
        else {
            return false;
        };
        let Ok((own_file, own)) = LaneFile::create() else { return false };
        self.lanes.lanes += 1;
        let lane = self.lanes.lanes;
        let (number, theirs) = asked.map_or((lane, None), |(number, theirs)| (number, Some(theirs)));
        let whose = Whose { lane, number, peer, worker, incarnation: *incarnation };
        self.lanes.conversations.push(Conversation {
            whose,
            memory: Arc::clone(segment),
            patience: self.placement.patience(*cpu, None, true, 2),
            own,
            own_file,
            ours: None,
            theirs,
            arbiter: None,
            is_joined: false,
            goes: false,
            heard: false,
        });
        self.notify(worker, &ToWorker::MakeLane { lane }, &[]);
        true
    }

    /// A worker has made its file for a lane, or could not.
    pub(super) fn on_lane_file(&mut self, now: u64, worker: WorkerId, lane: u64, fds: Vec<OwnedFd>) {
        let found = self.lanes.conversations.iter().position(|it| (it.whose.lane, it.whose.worker) == (lane, worker));
        let Some(at) = found.filter(|at| self.lanes.conversations[*at].ours.is_none()) else { return };
        if !self.offer_end(at, fds) {
            self.close_lane(now, at, Ending::Ours);
        }
    }

    fn offer_end(&mut self, at: usize, fds: Vec<OwnedFd>) -> bool {
        let it = &mut self.lanes.conversations[at];
        let Some(Seat { channel: Channel::Ring { file, .. }, .. }) = &self.seats[usize::from(it.whose.worker)] else {
            return false;
        };
        let Ok([worker]) = <[OwnedFd; 1]>::try_from(fds).map(|fds| fds.map(LaneFile::from_fd)) else { return false };
        let (Ok(ours), Ok(controller), Ok(memory)) =
            (PeerLane::attach(&worker), it.own_file.try_clone(), file.try_clone())
        else {
            return false;
        };
        let SegmentConfig { ring_slots, arena_bytes } = segment_config(&self.config);
        let segment = LaneSegment {
            participant: it.whose.worker,
            incarnation: it.whose.incarnation,
            process_id: self.process_id,
            ring_slots,
            arena_bytes,
        };
        let word = if it.theirs.is_some() { LaneWord::Join } else { LaneWord::Ask };
        let hand = Hand { worker, controller, memory, segment };
        // Before the other end can know of it.
        let (hand, _) = it.ours.insert((hand, ours));
        if !self.peers.say_lane(it.whose.peer, word, it.whose.number, Some(hand)) {
            return false;
        }
        it.arbitrate();
        true
    }

    /// The other end says something about a lane.
    pub(super) fn on_lane_word(&mut self, now: u64, peer: PeerNumber, news: LaneNews) {
        let LaneNews { word, number, hand } = news;
        match (word, self.lanes.of(peer, number)) {
            (LaneWord::Ask, None) => {
                if !self.accept_lane(peer, number, hand) {
                    self.peers.say_lane(peer, LaneWord::Over { dead: false }, number, None);
                }
            }
            (LaneWord::Join, Some(at)) if self.lanes.conversations[at].theirs.is_none() => {
                match hand.ok_or_else(|| "no files".to_owned()).and_then(Theirs::attach) {
                    Ok(theirs) if self.lanes.conversations[at].ours.is_some() => {
                        let it = &mut self.lanes.conversations[at];
                        it.theirs = Some(theirs);
                        it.arbitrate();
                        if self.waits_for(at).is_some() {
                            self.may_go(self.lanes.conversations[at].whose.worker);
                        }
                    }
                    joined => {
                        let why = joined.err().unwrap_or_else(|| "it was not asked".to_owned());
                        tracing::warn!(
                            "a lane from process {} is no lane: {why}",
                            self.peers.name_of(peer).unwrap_or("?")
                        );
                        self.close_lane(now, at, Ending::Ours);
                    }
                }
            }
            (LaneWord::Go, Some(at)) if self.lanes.conversations[at].arbiter.is_some() => self.hear_go(now, at),
            (LaneWord::Over { dead }, Some(at)) => {
                self.close_lane(now, at, if dead { Ending::TheirDeath } else { Ending::Theirs });
            }
            (LaneWord::Over { dead: true }, None) => {
                let past = self.lanes.past.iter().position(|whose| (whose.peer, whose.number) == (peer, number));
                if let Some(whose) = past.and_then(|at| self.lanes.past.remove(at)) {
                    self.say_over(&whose, word::UNREAD);
                }
            }
            // To what is over at our end; or the other end does not keep to the steps, and has no lane for it.
            _ => {}
        }
    }

    /// The leader wants a lane. Whether we do, too.
    fn accept_lane(&mut self, peer: PeerNumber, number: u64, hand: Option<Hand>) -> bool {
        let Some(worker) = self.lanes.talks.warm(peer) else { return false };
        if !self.lanes.is_on
            || !self.joins.is_empty()
            || self.peers.leads(peer)
            || !self.peers.may_have_lanes(peer)
            || !self.lanes.has_room(peer, worker)
        {
            return false;
        }
        match hand.ok_or_else(|| "no files".to_owned()).and_then(Theirs::attach) {
            Ok(theirs) => self.begin_lane(worker, peer, Some((number, theirs))),
            Err(why) => {
                tracing::warn!("a lane from process {} is no lane: {why}", self.peers.name_of(peer).unwrap_or("?"));
                false
            }
        }
    }

    /// The question with which the worker waits for a message of that process.
    fn waits_for(&self, at: usize) -> Option<u64> {
        let whose = &self.lanes.conversations[at].whose;
        let call = self.seats[usize::from(whose.worker)].as_ref()?.receives?;
        let by = Receiver { worker: whose.worker, call };
        self.mailbox.waits_from(by, Sender::Peer(whose.peer)).then_some(call)
    }

    /// A worker waits for a message, and so sends nothing: what it sends next may go over its lane, if all before has arrived.
    pub(super) fn may_go(&mut self, worker: WorkerId) {
        let Some(at) = self.lanes.of_worker(worker) else { return };
        let it = &self.lanes.conversations[at];
        let (peer, number) = (it.whose.peer, it.whose.number);
        if it.arbiter.is_none() || it.goes || !self.peers.is_settled(peer) {
            return;
        }
        if self.peers.say_lane(peer, LaneWord::Go, number, None) {
            self.lanes.conversations[at].goes = true;
            self.permit(at, word::SENDS);
        }
    }

    /// The other worker sends over its lane: what came another way is here already.
    fn hear_go(&mut self, now: u64, at: usize) {
        let it = &mut self.lanes.conversations[at];
        it.heard = true;
        let Whose { peer, worker, .. } = it.whose;
        let from = Sender::Peer(peer);
        let waits = self.waits_for(at);
        if self.mailbox.others_wait(from, waits.map(|call| Receiver { worker, call }))
            || waits.is_some() && self.mailbox.has_of(from)
        {
            return self.close_lane(now, at, Ending::Ours);
        }
        if let Some(call) = waits {
            self.may_go(worker);
            self.permit(at, word::RECEIVES);
            self.mailbox.withdraw(Receiver { worker, call });
            self.look_at_lane(worker, call);
        }
    }

    /// Tells the worker what it may do.
    fn permit(&mut self, at: usize, what: u16) {
        let it = &mut self.lanes.conversations[at];
        let (worker, lane) = (it.whose.worker, it.whose.lane);
        if !std::mem::replace(&mut it.is_joined, true)
            && let Some(theirs) = &it.theirs
        {
            let join = JoinLane {
                lane,
                process: number_of(Sender::Peer(it.whose.peer)),
                segment: theirs.hand.segment.clone(),
                patience: it.patience,
            };
            let files = [&theirs.hand.worker, &theirs.hand.controller].map(LaneFile::try_clone);
            let ours = it.own_file.try_clone();
            let memory = theirs.hand.memory.try_clone();
            // Without descriptors it does not know the lane, and asks for everything.
            if let ([Ok(theirs), Ok(controller)], Ok(ours), Ok(memory)) = (files, ours, memory) {
                let join = ToWorker::JoinLane(Box::new(join));
                self.notify(worker, &join, &[theirs.fd(), controller.fd(), ours.fd(), memory.fd()]);
            }
        }
        self.tell(worker, record::LANE, what, lane, 0);
    }

    fn say_over(&mut self, whose: &Whose, what: u16) {
        if self.seats[usize::from(whose.worker)].as_ref().is_some_and(|seat| seat.incarnation == whose.incarnation) {
            self.tell(whose.worker, record::LANE, what, whose.lane, 0);
        }
    }

    /// A message of that process came another way than over the lane.
    pub(super) fn close_lane_from(&mut self, now: u64, peer: PeerNumber) {
        if let Some(at) = self.lanes.of_peer(peer)
            && self.lanes.conversations[at].heard
        {
            self.close_lane(now, at, Ending::Ours);
        }
    }

    /// Ends a conversation. What was sent to us over its lane and not received is in the mailbox then.
    fn close_lane(&mut self, now: u64, at: usize, ending: Ending) {
        let Conversation { whose, memory, theirs, arbiter, .. } = self.lanes.conversations.swap_remove(at);
        let (mut received, mut inherited) = (0, Vec::new());
        if let (Some(arbiter), Some(theirs)) = (arbiter, &theirs) {
            let (store, payload_bytes_max) = (&mut self.store, self.config.payload_bytes_max);
            arbiter.close(|from, messages| {
                received = from;
                for message in messages.drain(..) {
                    let read = message.ok().and_then(|(first, second)| Letter::read(&first, second.as_ref()));
                    let copied = read.and_then(|letter| {
                        let bytes = match &letter.content {
                            Content::Inline(inline) => return Some((letter.key, Bytes::Inline(*inline))),
                            Content::Block(block) => theirs.memory.bytes(block).ok()?,
                            Content::Back { block, .. } => memory.bytes(block).ok()?,
                        };
                        let fits = bytes.len() as u64 <= payload_bytes_max;
                        fits.then(|| (letter.key, outlived(store, bytes)))
                    });
                    match copied {
                        Some(message) => inherited.push(message),
                        None => tracing::warn!(
                            "what a worker of another process sent over a lane is no message: it is lost"
                        ),
                    }
                }
            });
        }
        self.lanes.talks.closed(whose.peer, received);
        tracing::debug!(
            worker = whose.worker,
            received,
            inherited = inherited.len(),
            "lane {} is over: {ending:?}",
            whose.lane
        );
        let dead = ending == Ending::OurDeath;
        if matches!(ending, Ending::Ours | Ending::OurDeath) {
            self.peers.say_lane(whose.peer, LaneWord::Over { dead }, whose.number, None);
        }
        let what = match ending {
            Ending::Ours | Ending::OurDeath | Ending::Theirs => word::OVER,
            Ending::TheirDeath => word::OVER | word::UNREAD,
            Ending::Lost => word::OVER | word::LOST,
        };
        self.say_over(&whose, what);
        if !matches!(ending, Ending::OurDeath | Ending::TheirDeath) {
            if self.lanes.past.len() == PAST_MAX {
                self.lanes.past.pop_front();
            }
            self.lanes.past.push_back(whose);
        }
        for (key, bytes) in inherited {
            let payload = Payload { bytes, is_args: false, keeps: false };
            if let Some((to, message)) = self.mailbox.inherit(Sender::Peer(whose.peer), key.as_slice(), payload) {
                self.hand(now, to, message);
            }
        }
    }

    /// A worker is dead: what is in the lane to it is the mailbox's, and what it had received nobody reads any more.
    pub(super) fn bury_lane(&mut self, now: u64, worker: WorkerId) {
        if let Some(at) = self.lanes.of_worker(worker) {
            self.close_lane(now, at, Ending::OurDeath);
        }
        let Process { lanes, peers, .. } = self;
        lanes.past.retain(|whose| {
            let dead = whose.worker == worker;
            if dead {
                peers.say_lane(whose.peer, LaneWord::Over { dead }, whose.number, None);
            }
            !dead
        });
    }

    /// The link to that process is gone.
    pub(super) fn end_lanes(&mut self, now: u64, peer: PeerNumber) {
        if let Some(at) = self.lanes.of_peer(peer) {
            self.close_lane(now, at, Ending::Lost);
        }
    }

    /// That life of a process is over: nobody reads anything of ours there.
    pub(super) fn forget_lanes(&mut self, peer: PeerNumber) {
        let past = std::mem::take(&mut self.lanes.past);
        for whose in past {
            if whose.peer == peer {
                self.say_over(&whose, word::UNREAD);
            } else {
                self.lanes.past.push_back(whose);
            }
        }
    }
}
