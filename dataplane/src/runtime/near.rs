//! Shared memory between two processes of one host and one user, beside the link that joins them. Never blocks.
//!
//! The link stays what it is: it proves who is who, keeps the heartbeats, and carries everything while this does not stand. The leader of the two
//! (`controller::peers`) offers, once the link is up:
//!
//! | step | over | leader | follower |
//! |---|---|---|---|
//! | 1 | link | listens at a Unix socket without a place in the file system; `NEAR_OFFER`: its name and a secret | |
//! | 2 | socket | | connects, if that end is its own user's; the secret, and its near segment |
//! | 3 | socket | if it is its own user's and knows the secret: its near segment | |
//! | 4 | link | | maps that; `NEAR_GO`: from here on it speaks by its ring |
//! | 5 | link | `NEAR_GO`: so does it | |
//!
//! `NEAR_GO` is a frame among the others, and who reads it looks at the ring from then on: so nothing overtakes. A step that fails is said in the log
//! (`NEAR_REFUSED` tells the other end), and the link goes on. When it stands, the link and this live and die together, and the rules for a
//! lost link hold (`controller::post`).
//!
//! A near segment is a segment as workers have them, of which one ring, the sleep line and the arena are used. Payloads stay where they are: in a worker's
//! segment, or the controller's, which the other end maps when the first of them comes; it reads them once, into its own arena, and its verdict says
//! that it has. What lies in no segment, and keys longer than a record, are copied into the near segment first.
//!
//! Nobody waits on a descriptor that the other end made: the flags of one are shared, and a write to it could be made to block. Who is asleep is woken by
//! a byte on its own end of the socket.

mod frames;
pub(super) mod lane;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use praas_shm::{
    Arena, BlockRef, Body, Descriptor, Doorbell, Identity, Inline, Link, OwnSegment, PARTICIPANTS_MAX, ParticipantId,
    PeerSegment, SegmentConfig, SegmentFile, handover,
};
use praas_transport::reactor::Interest;
use praas_transport::{Bodies, Header};
use rustix::net::{SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use self::frames::{Key, Record, STAGE};
use self::lane::{Hand, LaneNews};
use super::body::{Bytes, Store};
use super::clients::Carrier;
use crate::config::{Ipc, ProcessConfig};
use crate::controller::peers::{LinkNumber, PeerNumber};
use crate::wire::{Code, LaneSegment};

/// How long the steps may take together.
const MEET_NS: u64 = 2_000_000_000;
/// Processes that we share memory with at a time: each is looked at in every turn. The others are talked to over their links.
const NEARS_MAX: usize = 64;
/// Slots of the ring each way.
pub(super) const RING_SLOTS: u32 = 256;
/// Connections that have not said yet who they are.
const CALLERS_MAX: usize = 4;
/// Messages on the socket that are read at once: a bell each time we slept, and our segments. Who sends more does not mean to talk.
const MESSAGES_MAX: usize = 256;
/// Longest message on the socket, bytes.
const MESSAGE_BYTES_MAX: usize = 512;
/// The arena's unit of growth, bytes.
const ARENA_STEP_BYTES: u64 = 2 << 20;
/// Tokens of one near: its listener, and those who call there; its socket.
const TOKENS: usize = 8;
const LISTENER: usize = 0;
const SOCKET: usize = 1;
const CALLERS: usize = 2;

/// Whose near segment is whose: participants, to each other.
const LEADER: u8 = 0;
const FOLLOWER: u8 = 1;
/// Longest payload that any process may be configured to take, bytes.
const PAYLOAD_BYTES_MAX: u64 = 1 << 30;
/// Wakes the other end.
const RING: &[u8] = b"!";

/// What an offer says: 16 bytes of the socket's name, and 16 that only who was told knows.
pub(super) type Token = [u8; 32];

/// On the socket.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    /// The first each way; comes with the near segment.
    Hello { secret: [u8; 16], incarnation: u64, payload_bytes_max: u64 },
    /// Blocks of this segment may come, under this number; comes with it. One that is larger than 0 and was not there before.
    Segment { number: u16, participant: u8, incarnation: u64, process: [u8; 16], ring_slots: u32, arena_bytes: u64 },
    /// One end of a lane; comes with its worker's file, its controller's, and the worker's segment.
    Lane { number: u64, segment: LaneSegment },
}

/// A segment of this process that payloads lie in.
#[derive(Debug)]
struct Shown {
    incarnation: u64,
    file: SegmentFile,
}

/// What came over shared memory.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) header: Header,
    pub(super) key: Vec<u8>,
    pub(super) bytes: Result<Bytes, Code>,
}

/// What came.
#[derive(Debug)]
pub(super) enum Came {
    Frame(Frame),
    Lane(LaneNews),
}

/// What became of the steps.
#[derive(Debug)]
pub(super) enum Step {
    Nothing,
    /// Both ends have both segments: say `NEAR_GO` when it is our turn.
    Stands,
    /// The link goes on alone.
    Failed(String),
    /// The link is to be closed.
    Broken(String),
}

#[derive(Debug)]
enum Stage {
    /// Leader: until somebody comes who knows the secret.
    Offered {
        listener: OwnedFd,
        callers: [Option<OwnedFd>; CALLERS_MAX],
        said: bool,
    },
    /// Follower: until the leader's segment comes.
    Answered {
        socket: OwnedFd,
        own: OwnSegment,
    },
    Stands(Box<Stands>),
    /// The link is gone, and the other end may still read what it was shown: until it closes the socket.
    Ending {
        socket: OwnedFd,
        loans: VecDeque<Loan>,
    },
}

#[derive(Debug)]
struct Near {
    link: LinkNumber,
    peer: PeerNumber,
    token: Token,
    /// When the steps must be over.
    until_ns: u64,
    /// The other end speaks by its ring from here on.
    hears: bool,
    /// So do we.
    speaks: bool,
    stage: Stage,
}

/// Both ends have both segments.
#[derive(Debug)]
struct Stands {
    socket: OwnedFd,
    link: Link,
    /// Only its line is used.
    doorbell: Doorbell,
    arena: Arena,
    them: ParticipantId,
    /// Records for which the ring has no room.
    backlog: VecDeque<Descriptor>,
    /// A frame for which our arena has no room until some verdicts have come.
    held: Option<(Header, Arc<[u8]>, Arc<Bytes>)>,
    /// What was lent, by parcel.
    loans: VecDeque<Loan>,
    /// Numbers of our segments, by participant, with the life they were shown in.
    shown: Vec<Option<(u64, u16)>>,
    numbers: u16,
    /// Segments of theirs, by number.
    theirs: Vec<(u16, Arc<PeerSegment>)>,
    /// Files of lanes, until a record speaks of them.
    hands: Vec<(u64, Hand)>,
    /// The first half of a frame.
    half: Option<(Header, Vec<u8>)>,
    unrung: bool,
}

/// What a parcel needs until its verdict.
#[derive(Debug)]
struct Loan {
    parcel: u64,
    bytes: Arc<Bytes>,
    staged: [Option<BlockRef>; 2],
}

/// Shared memory with other processes.
#[derive(Debug)]
pub(super) struct Nears {
    /// `None`: with nobody.
    process: Option<[u8; 16]>,
    incarnation: u64,
    payload_bytes_max: u64,
    /// Of this process's segments.
    segment_config: SegmentConfig,
    segments: Vec<Option<Shown>>,
    nears: Vec<Near>,
}

impl Nears {
    /// For the process of this number and life. Nothing is shared yet.
    pub(super) fn new(config: &ProcessConfig, process: [u8; 16], incarnation: u64) -> Nears {
        let is_on = config.near && config.ipc == Ipc::Ring;
        Nears {
            process: is_on.then_some(process),
            incarnation,
            payload_bytes_max: config.payload_bytes_max,
            segment_config: super::segment_config(config),
            segments: (0..PARTICIPANTS_MAX).map(|_| None).collect(),
            nears: Vec::new(),
        }
    }

    /// Whether memory is shared with anybody who can.
    pub(super) fn is_on(&self) -> bool {
        self.process.is_some()
    }

    // ---- whose memory ------------------------------------------------------------------------------------------

    /// Payloads may lie in this segment.
    pub(super) fn show(&mut self, participant: u8, incarnation: u64, file: &SegmentFile) {
        if !self.is_on() {
            return;
        }
        match file.try_clone() {
            Ok(file) => self.segments[usize::from(participant)] = Some(Shown { incarnation, file }),
            // What lies there is copied.
            Err(error) => tracing::warn!(participant, %error, "no descriptors to show a segment to other processes"),
        }
    }

    /// Its owner is dead, and nothing that lies there is sent any more.
    pub(super) fn hide(&mut self, participant: u8) {
        if self.segments[usize::from(participant)].take().is_none() {
            return;
        }
        for near in &mut self.nears {
            // The memory is there as long as the other end maps it, and nobody writes it any more: no need for ours to keep it, all of it for each
            // parcel.
            near.stage.loans_mut().for_each(|loan| loan.outlive(participant));
            if let Stage::Stands(stands) = &mut near.stage
                && let Some((_, number)) = stands.shown[usize::from(participant)].take()
            {
                stands.put(frames::forget(number));
            }
        }
    }

    // ---- the steps ---------------------------------------------------------------------------------------------

    /// Step 1, the leader's: what to offer.
    ///
    /// # Errors
    /// Why there is nothing to offer.
    pub(super) fn offer(
        &mut self,
        now: u64,
        link: LinkNumber,
        peer: PeerNumber,
        reactor: &mut Carrier,
    ) -> Result<Token, String> {
        self.check_room(peer)?;
        let mut token = [0; 32];
        getrandom::fill(&mut token).map_err(|error| error.to_string())?;
        let listener = listen(&token).map_err(|error| format!("no Unix socket: {error}"))?;
        let watched = reactor.watch(listener.as_fd(), token_of(link, LISTENER), Interest::Read);
        watched.map_err(|error| error.to_string())?;
        let stage = Stage::Offered { listener, callers: [const { None }; CALLERS_MAX], said: false };
        self.begin(now, link, peer, token, stage);
        Ok(token)
    }

    /// Step 2, the follower's.
    ///
    /// # Errors
    /// Why the offer is not accepted.
    pub(super) fn accept(
        &mut self,
        now: u64,
        link: LinkNumber,
        peer: PeerNumber,
        token: Token,
        their_payload_bytes_max: u64,
        reactor: &mut Carrier,
    ) -> Result<(), String> {
        self.check_room(peer)?;
        let socket = connect(&token).map_err(|error| format!("its Unix socket cannot be reached: {error}"))?;
        check_user(socket.as_fd())?;
        let own = self.hand_over(socket.as_fd(), &token, FOLLOWER, their_payload_bytes_max)?;
        let watched = reactor.watch(socket.as_fd(), token_of(link, SOCKET), Interest::Read);
        watched.map_err(|error| error.to_string())?;
        self.begin(now, link, peer, token, Stage::Answered { socket, own });
        Ok(())
    }

    /// Whether one more may share memory with us: not one that still holds what it was shown over an earlier link.
    fn check_room(&self, peer: PeerNumber) -> Result<(), String> {
        if !self.is_on() {
            return Err("it is switched off here".into());
        }
        if self.nears.iter().any(|near| near.peer == peer) {
            return Err("what an earlier link shared is not given up yet".into());
        }
        if self.nears.len() >= NEARS_MAX {
            return Err(format!("{NEARS_MAX} processes share memory with this one already, and no more may"));
        }
        Ok(())
    }

    fn begin(&mut self, now: u64, link: LinkNumber, peer: PeerNumber, token: Token, stage: Stage) {
        self.nears.push(Near { link, peer, token, until_ns: now + MEET_NS, hears: false, speaks: false, stage });
    }

    /// Makes our near segment, and gives it to the other end.
    fn hand_over(
        &self,
        socket: BorrowedFd<'_>,
        token: &Token,
        me: u8,
        their_payload_bytes_max: u64,
    ) -> Result<OwnSegment, String> {
        let config = self.shape(their_payload_bytes_max);
        let identity =
            Identity { participant: participant(me), incarnation: self.incarnation, process: half(token, 0) };
        let file = SegmentFile::create(&config).map_err(|error| error.to_string())?;
        let own = OwnSegment::map(&file, &identity, &config).map_err(|error| error.to_string())?;
        file.seal_future_write().map_err(|error| error.to_string())?;
        let (incarnation, payload_bytes_max) = (self.incarnation, self.payload_bytes_max);
        let word = Word::Hello { secret: half(token, 1), incarnation, payload_bytes_max };
        say(socket, &word, &[file.fd()]).map_err(|error| error.to_string())?;
        Ok(own)
    }

    /// Of both near segments: the longest payload of either end fits, with its key.
    fn shape(&self, their_payload_bytes_max: u64) -> SegmentConfig {
        let payload_bytes_max = self.payload_bytes_max.max(their_payload_bytes_max.min(PAYLOAD_BYTES_MAX));
        SegmentConfig {
            ring_slots: RING_SLOTS,
            arena_bytes: (payload_bytes_max + ARENA_STEP_BYTES).next_multiple_of(ARENA_STEP_BYTES),
        }
    }

    /// When [`Nears::expire`] has to be called next.
    pub(super) fn wake_ns(&self) -> u64 {
        self.nears.iter().map(Near::due_ns).min().unwrap_or(u64::MAX)
    }

    /// The next link whose other end did not come in time: it goes on alone.
    pub(super) fn expire(&mut self, now: u64, reactor: &mut Carrier) -> Option<LinkNumber> {
        let at = self.nears.iter().position(|near| near.due_ns() <= now)?;
        Some(self.forget(at, reactor).link)
    }

    /// Something happened at the listener or the socket of this token. Bytes that nobody needs any more are `done` with.
    pub(super) fn serve(
        &mut self,
        token: usize,
        reactor: &mut Carrier,
        done: &mut impl FnMut(Bytes),
    ) -> Option<(LinkNumber, Step)> {
        let link = ((token - super::NEAR) / TOKENS) as LinkNumber;
        let at = self.nears.iter().position(|near| near.link == link)?;
        let Near { hears, speaks, stage, .. } = &mut self.nears[at];
        let is_used = *hears || *speaks;
        let step = match stage {
            Stage::Offered { .. } => self.meet(at, reactor),
            Stage::Answered { .. } => self.complete(at, reactor),
            Stage::Stands(stands) => match stands.read_socket() {
                Ok(()) => Step::Nothing,
                Err(text) if is_used => Step::Broken(text),
                // The follower was late, and gave up before anything was said by it.
                Err(text) => {
                    self.forget(at, reactor);
                    Step::Failed(text)
                }
            },
            Stage::Ending { socket, .. } => {
                if is_closed(socket.as_fd()) {
                    let near = self.forget(at, reactor);
                    near.stage.give_back(done);
                }
                Step::Nothing
            }
        };
        Some((link, step))
    }

    /// Step 3: somebody is at the listener.
    fn meet(&mut self, at: usize, reactor: &mut Carrier) -> Step {
        let Near { link, token, stage: Stage::Offered { listener, callers, said }, .. } = &mut self.nears[at] else {
            return Step::Nothing;
        };
        let (link, mut sent_away, mut found) = (*link, None, None);
        for _ in 0..NEARS_MAX {
            let Some(caller) = accept(listener.as_fd()) else { break };
            match (check_user(caller.as_fd()), callers.iter().position(Option::is_none)) {
                (Ok(()), Some(free)) => {
                    // Whoever cannot be watched says the rest in time, or never.
                    let _ = reactor.watch(caller.as_fd(), token_of(link, CALLERS + free), Interest::Read);
                    callers[free] = Some(caller);
                }
                (Ok(()), None) => sent_away = Some("there are others that have not said who they are".to_owned()),
                (Err(text), _) => sent_away = Some(text),
            }
        }
        for (number, slot) in callers.iter_mut().enumerate() {
            let Some(heard) = slot.as_ref().and_then(|caller| hear(caller.as_fd(), token)) else { continue };
            let caller = slot.take().expect("looked at above");
            reactor.unwatch(caller.as_fd(), token_of(link, CALLERS + number));
            match heard {
                Ok(heard) => found = Some((caller, heard)),
                Err(text) => sent_away = Some(text),
            }
        }
        if let Some(text) = sent_away
            && !std::mem::replace(said, true)
        {
            tracing::warn!("somebody who is not the one for link {link} came for its memory and was sent away: {text}");
        }
        let Some((socket, heard)) = found else { return Step::Nothing };
        let Near { peer, token, .. } = self.forget(at, reactor);
        let own = self.hand_over(socket.as_fd(), &token, LEADER, heard.payload_bytes_max);
        let made = own.and_then(|own| Stands::new(own, socket, &token, FOLLOWER, heard));
        self.stand(link, peer, token, made, reactor)
    }

    /// Step 4: the leader has answered.
    fn complete(&mut self, at: usize, reactor: &mut Carrier) -> Step {
        let Near { token, stage: Stage::Answered { socket, .. }, .. } = &self.nears[at] else { return Step::Nothing };
        let Some(heard) = hear(socket.as_fd(), token) else { return Step::Nothing };
        let near = self.forget(at, reactor);
        let Stage::Answered { socket, own } = near.stage else { unreachable!("looked at above") };
        let made = heard.and_then(|heard| Stands::new(own, socket, &near.token, LEADER, heard));
        self.stand(near.link, near.peer, near.token, made, reactor)
    }

    fn stand(
        &mut self,
        link: LinkNumber,
        peer: PeerNumber,
        token: Token,
        made: Result<Stands, String>,
        reactor: &mut Carrier,
    ) -> Step {
        let watched = made.and_then(|stands| {
            let watched = reactor.watch(stands.socket.as_fd(), token_of(link, SOCKET), Interest::Read);
            watched.map(|()| stands).map_err(|error| error.to_string())
        });
        match watched {
            Ok(stands) => {
                let stage = Stage::Stands(Box::new(stands));
                self.nears.push(Near { link, peer, token, until_ns: u64::MAX, hears: false, speaks: false, stage });
                Step::Stands
            }
            Err(text) => Step::Failed(text),
        }
    }

    /// Stops watching it, and takes it out.
    fn forget(&mut self, at: usize, reactor: &mut Carrier) -> Near {
        let near = self.nears.swap_remove(at);
        match &near.stage {
            Stage::Offered { listener, callers, .. } => {
                reactor.unwatch(listener.as_fd(), token_of(near.link, LISTENER));
                for (number, caller) in callers.iter().enumerate() {
                    if let Some(caller) = caller {
                        reactor.unwatch(caller.as_fd(), token_of(near.link, CALLERS + number));
                    }
                }
            }
            Stage::Answered { socket, .. } | Stage::Ending { socket, .. } => {
                reactor.unwatch(socket.as_fd(), token_of(near.link, SOCKET));
            }
            Stage::Stands(stands) => reactor.unwatch(stands.socket.as_fd(), token_of(near.link, SOCKET)),
        }
        near
    }

    /// The other end says `NEAR_GO`: what it says next stands in its ring. Whether that is news.
    pub(super) fn goes(&mut self, link: LinkNumber) -> bool {
        let near = self.nears.iter_mut().find(|near| near.link == link);
        near.is_some_and(|near| matches!(near.stage, Stage::Stands(_)) && !std::mem::replace(&mut near.hears, true))
    }

    /// The other end does not want it, or the link is gone. What it may still read stays until it closes the socket.
    pub(super) fn end(&mut self, link: LinkNumber, reactor: &mut Carrier, done: &mut impl FnMut(Bytes)) {
        let Some(at) = self.nears.iter().position(|near| near.link == link) else { return };
        if matches!(self.nears[at].stage, Stage::Ending { .. }) {
            return;
        }
        let Near { peer, token, stage, .. } = self.forget(at, reactor);
        let Stage::Stands(stands) = stage else { return };
        let Stands { socket, held, loans, .. } = *stands;
        if let Some((.., bytes)) = held {
            done(Bytes::Shared(bytes));
        }
        // It reads the end of ours when it is through with what it had begun, and closes then.
        let still_read = !loans.is_empty() && rustix::net::shutdown(&socket, rustix::net::Shutdown::Write).is_ok();
        let stage = Stage::Ending { socket, loans };
        let Stage::Ending { socket, .. } = &stage else { unreachable!("made above") };
        if !still_read || is_closed(socket.as_fd()) {
            return stage.give_back(done);
        }
        match reactor.watch(socket.as_fd(), token_of(link, SOCKET), Interest::Read) {
            Ok(()) => {
                self.nears.push(Near { link, peer, token, until_ns: u64::MAX, hears: false, speaks: false, stage })
            }
            Err(error) => {
                tracing::warn!(%error, "what another process may still read is not given back");
                std::mem::forget(stage);
            }
        }
    }

    // ---- frames ------------------------------------------------------------------------------------------------

    /// Whether it stands, and if so whether we speak by it already.
    #[inline]
    pub(super) fn speaks(&self, link: LinkNumber) -> Option<bool> {
        let near = self.nears.iter().find(|near| near.link == link)?;
        matches!(near.stage, Stage::Stands(_)).then_some(near.speaks)
    }

    /// Whether the other end speaks by it.
    pub(super) fn hears(&self, link: LinkNumber) -> bool {
        self.nears.iter().any(|near| near.link == link && near.hears)
    }

    /// We said `NEAR_GO`.
    pub(super) fn speak(&mut self, link: LinkNumber) {
        if let Some(near) = self.nears.iter_mut().find(|near| near.link == link) {
            near.speaks = true;
        }
    }

    /// Whether there is room for one more frame.
    pub(super) fn has_room(&self, link: LinkNumber) -> bool {
        self.stands(link).is_some_and(|stands| stands.backlog.is_empty() && stands.held.is_none())
    }

    /// Whether there is any of this link, finished or not.
    pub(super) fn is_of(&self, link: LinkNumber) -> bool {
        self.nears.iter().any(|near| near.link == link)
    }

    /// Sends a frame with nothing but a header. There was room for it.
    pub(super) fn say(&mut self, link: LinkNumber, header: &Header) {
        if let Some(stands) = self.stands_mut(link) {
            let (record, _) = frames::records(header, Key::Short(&[]), STAGE, Body::Inline(Inline::empty()));
            stands.put(record);
        }
    }

    /// Sends a frame. There was room for it.
    pub(super) fn send(
        &mut self,
        link: LinkNumber,
        header: &Header,
        key: &Arc<[u8]>,
        bytes: &Arc<Bytes>,
        store: &Store,
    ) {
        let Nears { process, segment_config, segments, nears, .. } = self;
        let Some(Near { stage: Stage::Stands(stands), .. }) = nears.iter_mut().find(|near| near.link == link) else {
            return;
        };
        let showing = Showing { process: process.unwrap_or_default(), segment_config, segments, store };
        stands.send(header, key, bytes, &showing);
    }

    /// Sends what waited for room. Whether there is room now, and was none before.
    pub(super) fn flush(&mut self, store: &Store) -> Option<PeerNumber> {
        let Nears { process, segment_config, segments, nears, .. } = self;
        let showing = Showing { process: process.unwrap_or_default(), segment_config, segments, store };
        nears.iter_mut().find_map(|near| match &mut near.stage {
            Stage::Stands(stands) if stands.waits() => stands.flush(&showing).then_some(near.peer),
            _ => None,
        })
    }

    /// A verdict on this parcel was read: its bytes are read no more.
    pub(super) fn settled(&mut self, link: LinkNumber, parcel: u64, done: &mut impl FnMut(Bytes)) {
        let Some(stands) = self.stands_mut(link) else { return };
        while let Some(loan) = stands.loans.pop_front_if(|loan| loan.parcel <= parcel) {
            for block in loan.staged.into_iter().flatten() {
                stands.arena.release(stands.them, block.index, block.generation).expect("staged by us, and lent since");
            }
            done(Bytes::Shared(loan.bytes));
        }
    }

    /// The links with something to read.
    #[inline]
    pub(super) fn is_ready(&self) -> bool {
        self.nears.iter().any(|near| near.is_ready())
    }

    /// One of them, from this place on.
    pub(super) fn ready_from(&self, place: usize) -> Option<(usize, LinkNumber)> {
        let found = self.nears.get(place..)?.iter().position(Near::is_ready)?;
        Some((place + found, self.nears[place + found].link))
    }

    /// The next frame that came over this one.
    ///
    /// # Errors
    /// What came is none; the link is to be closed.
    pub(super) fn take(&mut self, link: LinkNumber, store: &mut Store) -> Result<Option<Came>, String> {
        let payload_bytes_max = self.payload_bytes_max;
        match self.nears.iter_mut().find(|near| near.link == link) {
            Some(Near { hears: true, stage: Stage::Stands(stands), .. }) => stands.take(payload_bytes_max, store),
            _ => Ok(None),
        }
    }

    // ---- sleeping ----------------------------------------------------------------------------------------------

    /// Says that we are about to sleep. Look at [`Nears::is_ready`] after it.
    pub(super) fn arm(&self) {
        self.nears.iter().filter_map(Near::as_stands).for_each(|stands| stands.doorbell.arm());
    }

    pub(super) fn disarm(&self) {
        self.nears.iter().filter_map(Near::as_stands).for_each(|stands| stands.doorbell.disarm());
    }

    /// Whether records wait for room in a ring, of which nobody tells us.
    pub(super) fn waits(&self) -> bool {
        self.nears.iter().filter_map(Near::as_stands).any(|stands| !stands.backlog.is_empty())
    }

    /// Wakes those that were sent something and sleep.
    pub(super) fn ring(&mut self) {
        for near in &mut self.nears {
            if let Stage::Stands(stands) = &mut near.stage
                && std::mem::take(&mut stands.unrung)
                && stands.link.bell.must_ring()
            {
                let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
                // Full: it has enough to wake up for. Closed: the socket's end is news by itself.
                let _ = rustix::net::send(&stands.socket, RING, flags);
            }
        }
    }

    fn stands(&self, link: LinkNumber) -> Option<&Stands> {
        self.nears.iter().find(|near| near.link == link)?.as_stands()
    }

    fn stands_mut(&mut self, link: LinkNumber) -> Option<&mut Stands> {
        match &mut self.nears.iter_mut().find(|near| near.link == link)?.stage {
            Stage::Stands(stands) => Some(stands),
            _ => None,
        }
    }
}

impl Near {
    fn due_ns(&self) -> u64 {
        match self.stage {
            Stage::Offered { .. } | Stage::Answered { .. } => self.until_ns,
            Stage::Stands(_) | Stage::Ending { .. } => u64::MAX,
        }
    }

    #[inline]
    fn as_stands(&self) -> Option<&Stands> {
        match &self.stage {
            Stage::Stands(stands) => Some(stands),
            _ => None,
        }
    }

    #[inline]
    fn is_ready(&self) -> bool {
        self.hears && self.as_stands().is_some_and(|stands| stands.link.consumer.ready())
    }
}

impl Loan {
    /// The bytes of a dead worker need nothing of us.
    fn outlive(&mut self, worker: u8) {
        if matches!(&*self.bytes, Bytes::Foreign(foreign) if foreign.giver == worker) {
            self.bytes = Arc::new(Bytes::Inline(Inline::empty()));
        }
    }
}

impl Stage {
    fn loans_mut(&mut self) -> impl Iterator<Item = &mut Loan> {
        let loans = match self {
            Stage::Stands(stands) => Some(&mut stands.loans),
            Stage::Ending { loans, .. } => Some(loans),
            Stage::Offered { .. } | Stage::Answered { .. } => None,
        };
        loans.into_iter().flatten()
    }

    fn give_back(self, done: &mut impl FnMut(Bytes)) {
        if let Stage::Ending { loans, .. } = self {
            loans.into_iter().for_each(|loan| done(Bytes::Shared(loan.bytes)));
        }
    }
}

/// What payloads lie in.
struct Showing<'a> {
    process: [u8; 16],
    segment_config: &'a SegmentConfig,
    segments: &'a [Option<Shown>],
    store: &'a Store,
}

impl Stands {
    fn new(own: OwnSegment, socket: OwnedFd, token: &Token, them: u8, heard: Heard) -> Result<Stands, String> {
        let them = participant(them);
        let identity = Identity { participant: them, incarnation: heard.incarnation, process: half(token, 0) };
        let peer = PeerSegment::attach(&heard.file, &identity, own.config()).map_err(|error| error.to_string())?;
        let copy = || socket.try_clone().map_err(|error| error.to_string());
        let doorbell = own.doorbell(copy()?);
        let arena = own.arena().map_err(|error| error.to_string())?;
        let link = Link::establish(&own, peer, copy()?).map_err(|error| error.to_string())?;
        Ok(Stands {
            socket,
            link,
            doorbell,
            arena,
            them,
            backlog: VecDeque::new(),
            held: None,
            loans: VecDeque::new(),
            shown: vec![None; PARTICIPANTS_MAX],
            numbers: STAGE,
            theirs: Vec::new(),
            hands: Vec::new(),
            half: None,
            unrung: false,
        })
    }

    // ---- out ---------------------------------------------------------------------------------------------------

    fn put(&mut self, record: Descriptor) {
        if !self.backlog.is_empty() || self.link.producer.try_send(&record).is_err() {
            self.backlog.push_back(record);
        }
        self.unrung = true;
    }

    fn waits(&self) -> bool {
        !self.backlog.is_empty() || self.held.is_some()
    }

    /// Whether nothing waits any more.
    fn flush(&mut self, showing: &Showing<'_>) -> bool {
        while let Some(record) = self.backlog.front() {
            if self.link.producer.try_send(record).is_err() {
                return false;
            }
            self.unrung = true;
            self.backlog.pop_front();
        }
        if let Some((header, key, bytes)) = self.held.take() {
            self.send(&header, &key, &bytes, showing);
        }
        !self.waits()
    }

    fn send(&mut self, header: &Header, key: &Arc<[u8]>, bytes: &Arc<Bytes>, showing: &Showing<'_>) {
        let long_key = Inline::new(key).is_none();
        let place = self.place_of(bytes, showing);
        let staged_key = if long_key { self.stage(key) } else { None };
        let staged = if place.is_none() { self.stage((**bytes).as_ref()) } else { None };
        if long_key && staged_key.is_none() || place.is_none() && staged.is_none() {
            for block in [staged_key, staged].into_iter().flatten() {
                self.arena.release(self.them, block.index, block.generation).expect("staged a moment ago");
            }
            // It is as long as the longest of all: when it is empty again there is room.
            self.held = Some((*header, Arc::clone(key), Arc::clone(bytes)));
            return;
        }
        let (segment, payload) = place.unwrap_or_else(|| (STAGE, Body::Block(staged.expect("checked above"))));
        let key = staged_key.map_or(Key::Short(key), Key::Staged);
        let is_lent = matches!(payload, Body::Block(_)) || staged_key.is_some();
        let (head, rest) = frames::records(header, key, segment, payload);
        self.put(head);
        if let Some(rest) = rest {
            self.put(rest);
        }
        if is_lent {
            self.loans.push_back(Loan { parcel: header.call, bytes: Arc::clone(bytes), staged: [staged_key, staged] });
        }
    }

    /// Where bytes lie that the other end can read there; it is shown the segment.
    fn place_of(&mut self, bytes: &Bytes, showing: &Showing<'_>) -> Option<(u16, Body)> {
        let block = match bytes {
            Bytes::Inline(inline) => return Some((STAGE, Body::Inline(*inline))),
            Bytes::Own(block) => showing.store.arena.as_ref()?.place_of(block),
            Bytes::Foreign(foreign) => {
                let owner = foreign.view.block().owner;
                let shown = showing.segments[owner.index()].as_ref()?;
                if foreign.giver != owner.get() || shown.incarnation != foreign.incarnation {
                    return None;
                }
                *foreign.view.block()
            }
            bytes => return Inline::new(bytes.as_ref()).map(|inline| (STAGE, Body::Inline(inline))),
        };
        Some((self.show(block.owner, showing)?, Body::Block(block)))
    }

    /// The number of a segment of ours, with which the other end has it.
    fn show(&mut self, owner: ParticipantId, showing: &Showing<'_>) -> Option<u16> {
        let Shown { incarnation, file } = showing.segments[owner.index()].as_ref()?;
        if let Some((life, number)) = self.shown[owner.index()]
            && life == *incarnation
        {
            return Some(number);
        }
        let number = self.numbers.checked_add(1)?;
        let word = Word::Segment {
            number,
            participant: owner.get(),
            incarnation: *incarnation,
            process: showing.process,
            ring_slots: showing.segment_config.ring_slots,
            arena_bytes: showing.segment_config.arena_bytes,
        };
        // A socket that is full, or no descriptors: it is copied this time.
        say(self.socket.as_fd(), &word, &[file.fd()]).ok()?;
        self.numbers = number;
        self.shown[owner.index()] = Some((*incarnation, number));
        Some(number)
    }

    /// A copy where the other end can read it.
    fn stage(&mut self, bytes: &[u8]) -> Option<BlockRef> {
        let mut block = self.arena.loan(bytes.len()).ok()?;
        block.copy_from_slice(bytes);
        Some(self.arena.lend(block, bytes.len(), self.them))
    }

    // ---- in ----------------------------------------------------------------------------------------------------

    fn take(&mut self, payload_bytes_max: u64, store: &mut Store) -> Result<Option<Came>, String> {
        // Not for ever, if only records come that are no frames.
        for _ in 0..RING_SLOTS {
            let Some(record) = self.link.consumer.poll().map_err(|error| error.to_string())? else { break };
            if let (Some(word), None) = (lane::read(&record), &self.half) {
                return self.take_lane(word, record.id()).map(|news| Some(Came::Lane(news)));
            }
            match (frames::read(&record)?, self.half.take()) {
                (Record::Alone { header, key, payload }, None) => {
                    return Ok(Some(Came::Frame(Frame { header, key, bytes: Ok(Bytes::Inline(payload)) })));
                }
                (Record::Head { header, key }, None) => {
                    let key = match key {
                        Body::Inline(key) => key.as_slice().to_vec(),
                        Body::Block(block) => self.bytes_of(STAGE, &block)?.to_vec(),
                    };
                    self.half = Some((header, key));
                }
                (Record::Rest { aux, budget_ns, segment, payload }, Some((header, key))) => {
                    let bytes = match payload {
                        Body::Inline(inline) => Ok(Bytes::Inline(inline)),
                        Body::Block(block) if block.len > payload_bytes_max => Err(Code::TooLarge),
                        Body::Block(block) => copied(self.bytes_of(segment, &block)?, store),
                    };
                    let header = Header { aux, budget_ns, ..header };
                    return Ok(Some(Came::Frame(Frame { header, key, bytes })));
                }
                (Record::Forget { segment }, None) => self.theirs.retain(|(number, _)| *number != segment),
                _ => return Err("it sent half a frame".into()),
            }
        }
        // Now, not at the next quarter of the ring: it may wait for room, and we may sleep.
        self.link.consumer.publish();
        if self.link.producer.peer_head_invalid() {
            return Err("it claims to have read what was not sent".into());
        }
        Ok(None)
    }

    /// Bytes of theirs. They do not change before our verdict; if they do, that is between their workers and them.
    fn bytes_of(&mut self, segment: u16, block: &BlockRef) -> Result<&[u8], String> {
        if segment != STAGE && !self.theirs.iter().any(|(number, _)| *number == segment) {
            // It was said on the socket before the record was written.
            self.read_socket()?;
        }
        let segment = match segment {
            STAGE => self.link.peer(),
            number => {
                let found = self.theirs.iter().find(|(theirs, _)| *theirs == number);
                &found.ok_or("it sent a block of a segment that it has not shown")?.1
            }
        };
        segment.bytes(block).map_err(|error| error.to_string())
    }

    /// Reads what the socket has: bells, and segments.
    fn read_socket(&mut self) -> Result<(), String> {
        let mut buffer = [0; MESSAGE_BYTES_MAX];
        for _ in 0..MESSAGES_MAX {
            match handover::receive(self.socket.as_fd(), &mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.to_string()),
                Ok((0, _)) => return Err("it closed the memory that it shared".into()),
                Ok((bytes, _)) if buffer[..bytes] == *RING => {}
                Ok((bytes, fds)) => self.take_segment(&buffer[..bytes], fds)?,
            }
        }
        Err("it rings without end".into())
    }

    fn take_segment(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), String> {
        let (number, participant, incarnation, process, ring_slots, arena_bytes) = match serde_json::from_slice(bytes) {
            Ok(Word::Segment { number, participant, incarnation, process, ring_slots, arena_bytes }) => {
                (number, participant, incarnation, process, ring_slots, arena_bytes)
            }
            Ok(Word::Lane { number, segment }) => return self.take_hand(number, segment, fds),
            _ => return Err(NOT_A_WORD.into()),
        };
        let [file] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| NOT_A_WORD)?;
        let participant = ParticipantId::new(participant).ok_or(NOT_A_WORD)?;
        if number == STAGE || self.theirs.len() >= PARTICIPANTS_MAX || self.theirs.iter().any(|(had, _)| *had == number)
        {
            return Err("it shows more segments than it has".into());
        }
        let identity = Identity { participant, incarnation, process };
        let config = SegmentConfig { ring_slots, arena_bytes };
        let segment = PeerSegment::attach(&SegmentFile::from_fd(file), &identity, &config);
        self.theirs.push((number, segment.map_err(|error| error.to_string())?));
        Ok(())
    }
}

const NOT_A_WORD: &str = "it said something on the socket that we do not know";

/// Into our memory, where our workers can read it and no other process can write it.
fn copied(bytes: &[u8], store: &mut Store) -> Result<Bytes, Code> {
    let mut landing = store.loan(bytes.len()).ok_or(Code::NoSpace)?;
    landing.as_mut().copy_from_slice(bytes);
    Ok(landing.into())
}

/// What the first message of the other end brought.
#[derive(Debug)]
struct Heard {
    incarnation: u64,
    payload_bytes_max: u64,
    file: SegmentFile,
}

/// `None`: nothing yet.
fn hear(socket: BorrowedFd<'_>, token: &Token) -> Option<Result<Heard, String>> {
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    let (bytes, mut fds) = match handover::receive(socket, &mut buffer) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
        Err(error) => return Some(Err(error.to_string())),
        Ok((0, _)) => return Some(Err("it closed the socket".into())),
        Ok(received) => received,
    };
    Some(match (serde_json::from_slice(&buffer[..bytes]), fds.pop(), fds.is_empty()) {
        (Ok(Word::Hello { secret, incarnation, payload_bytes_max }), Some(file), true) => {
            if is_same(&secret, &half(token, 1)) {
                Ok(Heard { incarnation, payload_bytes_max, file: SegmentFile::from_fd(file) })
            } else {
                Err("it does not know the secret".into())
            }
        }
        _ => Err(NOT_A_WORD.into()),
    })
}

fn say(socket: BorrowedFd<'_>, word: &Word, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(word).expect("our own words are serialisable");
    handover::send(socket, &bytes, files)
}

/// Compares in the same time, whatever they are.
fn is_same(a: &[u8; 16], b: &[u8; 16]) -> bool {
    u128::from_ne_bytes(*a) ^ u128::from_ne_bytes(*b) == 0
}

fn half(token: &Token, which: usize) -> [u8; 16] {
    token.as_chunks().0[which]
}

fn participant(number: u8) -> ParticipantId {
    ParticipantId::new(number).expect("two small numbers")
}

fn token_of(link: LinkNumber, what: usize) -> usize {
    super::NEAR + usize::try_from(link).expect("64 bits") * TOKENS + what
}

// ---- sockets ---------------------------------------------------------------------------------------------------

fn address(token: &Token) -> io::Result<SocketAddrUnix> {
    let name: String = half(token, 0).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(SocketAddrUnix::new_abstract_name(format!("praas-{name}").as_bytes())?)
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(rustix::net::AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

fn listen(token: &Token) -> io::Result<OwnedFd> {
    let listener = socket()?;
    rustix::net::bind(&listener, &address(token)?)?;
    rustix::net::listen(&listener, i32::try_from(CALLERS_MAX).expect("a small number"))?;
    Ok(listener)
}

fn connect(token: &Token) -> io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::connect(&socket, &address(token)?)?;
    Ok(socket)
}

fn accept(listener: BorrowedFd<'_>) -> Option<OwnedFd> {
    rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC).ok()
}

/// The kernel's word for it (SO_PEERCRED, unix(7)).
fn check_user(socket: BorrowedFd<'_>) -> Result<(), String> {
    let (ours, credentials) = (rustix::process::geteuid(), rustix::net::sockopt::socket_peercred(socket));
    let theirs = credentials.map_err(|error| error.to_string())?.uid;
    if theirs == ours {
        return Ok(());
    }
    Err(format!("it is user {}'s, and we are user {}", theirs.as_raw(), ours.as_raw()))
}

/// Whether the other end has closed the socket; what it said last is of no more use.
fn is_closed(socket: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    for _ in 0..MESSAGES_MAX {
        match handover::receive(socket, &mut buffer) {
            Ok((1.., _)) => {}
            Ok((0, _)) => return true,
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        }
    }
    false
}
