//! Connections to other processes: dials, hellos and heartbeats, as `controller::peers` decides. Never blocks.
//!
//! What two processes say to each other over a link that is up comes with messages and calls between processes; here are the
//! link and its life. Who there is to be connected with, `peers/membership.rs` brings.

mod membership;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;

use praas_transport::hello::{HelloError, Initiator, InitiatorConfig, Purpose, ResponderConfig, Session};
use praas_transport::reactor::{Interest, Socket};
use praas_transport::tcp::{self, Frame, Received, Scratch, TcpConfig, Terms, is_connected, on_loopback};
use praas_transport::{Bodies, Header, Limits};

use super::body::{Bytes, Landing, Store};
use super::clients::Carrier;
use super::error::ProcessError;
use super::near::{Nears, Step, Token};
use super::parcels::{Arrival, Kind, LIFE_IS_OVER, Parcel};
use crate::client::link::keep_alive;
use crate::clock::{now_ns, unix_s};
use crate::config::{Checks, Congestion, Dial, ProcessConfig, WhenSwapped};
use crate::controller::membership::Membership;
use crate::controller::peers::{Action, Farewell, LinkNumber, PeerNumber, Peering, Word};
use crate::controller::post::delay::{Delay, NEVER};
use crate::controller::post::{self, Arrived, Bounds, Dispatch, Due, Inbox, Outbox, Ticket, Verdict, WINDOW};
use crate::wire::{BUDGET_MAX_NS, Code, VERSIONS, frame};
use crate::{Credential, Role, Secret};

/// Frames taken from one peer before the next one's turn.
const FRAMES_PER_TURN: usize = 64;
/// Frames that may wait for a peer's connection; the rest waits in its outbox.
const BACKLOG_FRAMES_MAX: usize = 512;
/// Of them, those that are parcels and verdicts: the rest is for what keeps the link.
const BACKLOG_PARCELS_MAX: usize = 256;
/// How long the last words to a peer may take.
const LAST_WORDS_NS: u64 = 500_000_000;
/// How long a credential of ours is good for: it is made for one hello, and clocks differ.
const CREDENTIAL_S: u64 = 86_400;
/// Reasons that the log is told while a peer is not there.
const SAID_MAX: usize = 8;
/// How often the log is told of strangers.
const STRANGERS_NS: u64 = 1_000_000_000;
/// Connections that speak their last words at once.
const LEAVING_MAX: usize = 64;
/// Frames that an end which is gone may have left in the memory that it shared: no more fit there.
const LEFT_BEHIND_MAX: usize = super::near::RING_SLOTS as usize;
/// Longest reason for not sharing memory that is sent or said, bytes.
const REASON_BYTES_MAX: usize = 200;

/// The links and parcels of a member. What it is the membership knows.
#[derive(Debug)]
struct Target {
    name: Arc<str>,
    /// Dials so far; each goes to the next address.
    dials: usize,
    /// What the log was told since it was up last: the same is not said again, and no more than so much.
    said: Vec<String>,
    /// The link that is up.
    up: Option<LinkNumber>,
    outbox: Outbox<Parcel>,
    inbox: Inbox,
    /// When the inbox's verdicts go out.
    delay: Delay,
    /// The life that was up last.
    life: u64,
    /// Memory that was shared with this life broke: it is not tried again.
    near_broke: bool,
    /// The link over which it offered to share memory last.
    offered_over: Option<LinkNumber>,
}

#[derive(Debug)]
enum Stage {
    Connecting(TcpStream),
    Greeting(TcpStream, Box<Initiator>),
    Open(Socket<Landing, Bytes>),
    /// Closed for us, but for its last words.
    Leaving(Socket<Landing, Bytes>),
}

/// All connections to other processes.
#[derive(Debug)]
pub(super) struct Peers {
    peering: Peering,
    membership: Membership,
    name: String,
    incarnation: u64,
    session_id: [u8; 16],
    /// Without it there are no peers.
    key: Option<Secret>,
    dial: Dial,
    when_swapped: WhenSwapped,
    /// Of what waits for each.
    bounds: Bounds,
    congestion: Congestion,
    checks: Checks,
    targets: Vec<Target>,
    links: HashMap<LinkNumber, Stage>,
    /// Shared memory beside links that are up.
    nears: Nears,
    scratch: Scratch<Landing>,
    limits: Limits,
    arrivals: VecDeque<Arrival>,
    /// When an outbox has to be looked at.
    outboxes_due_ns: u64,
    /// When a verdict has to be said.
    verdicts_due_ns: u64,
    /// Links that have more to read than one turn takes.
    unread: Vec<LinkNumber>,
    /// Those that speak their last words, and until when they may.
    leaving: VecDeque<(LinkNumber, u64)>,
    strangers_due_ns: u64,
    admitted: bool,
    stopped: bool,
}

impl Peers {
    /// For the process that answers as `hello` says.
    pub(super) fn new(
        config: &ProcessConfig,
        hello: &ResponderConfig,
        process_id: [u8; 16],
    ) -> Result<Peers, ProcessError> {
        let mut seed = process_id;
        seed.iter_mut().zip(hello.incarnation.to_le_bytes()).for_each(|(byte, with)| *byte ^= with);
        let mut peers = Peers {
            peering: Peering::new(&hello.process, seed),
            membership: Membership::new(&hello.process, hello.incarnation, config.peers_max as usize),
            name: hello.process.clone(),
            incarnation: hello.incarnation,
            session_id: process_id,
            key: hello.key.clone(),
            dial: config.dial,
            when_swapped: config.when_swapped,
            bounds: Bounds {
                parcels_max: config.mailbox_messages_max as usize,
                bytes_max: usize::try_from(config.mailbox_bytes_max).unwrap_or(usize::MAX),
                window: WINDOW,
            },
            congestion: config.congestion,
            checks: config.checks,
            targets: Vec::new(),
            links: HashMap::new(),
            nears: Nears::new(config, process_id, hello.incarnation),
            scratch: Scratch::default(),
            limits: Limits { payload_bytes_max: config.payload_bytes_max },
            arrivals: VecDeque::new(),
            outboxes_due_ns: u64::MAX,
            verdicts_due_ns: NEVER,
            unread: Vec::new(),
            leaving: VecDeque::new(),
            strangers_due_ns: 0,
            admitted: false,
            stopped: false,
        };
        peers.begin(config)?;
        Ok(peers)
    }

    /// The process is ready: peers are dialed from now on, as others are let in.
    pub(super) fn admit(&mut self) {
        self.admitted = true;
    }

    /// When [`Peers::tick`] has to be called next.
    pub(super) fn wake_ns(&self) -> u64 {
        if !self.unread.is_empty() || !self.arrivals.is_empty() {
            return 0;
        }
        let near_ns = self.nears.wake_ns();
        let peering_ns =
            if self.is_on() { self.peering.wake_ns() } else { u64::MAX }.min(self.outboxes_due_ns).min(near_ns);
        self.leaving.front().map_or(peering_ns, |(_, until_ns)| peering_ns.min(*until_ns))
    }

    fn is_on(&self) -> bool {
        self.admitted && !self.stopped && !self.targets.is_empty()
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: u64, reactor: &mut Carrier, store: &mut Store) {
        for link in std::mem::take(&mut self.unread) {
            self.go_on(now, link, reactor, store);
        }
        if self.is_on() {
            self.peering.tick(now);
            self.act(now, reactor, store);
        }
        if now >= self.outboxes_due_ns {
            for peer in 0..self.targets.len() {
                self.targets[peer].outbox.tick(now);
                self.note_ends(peer);
            }
            self.outboxes_due_ns = self.targets.iter().map(|target| target.outbox.wake_ns()).min().unwrap_or(u64::MAX);
        }
        while let Some(link) = self.nears.expire(now, reactor) {
            self.goes_alone(link, "the other end did not come in time");
        }
        while let Some((link, _)) = self.leaving.pop_front_if(|(_, until_ns)| now >= *until_ns) {
            self.drop_link(link, reactor, store);
        }
    }

    /// Something happened to what is watched by this token, or may have. Whether bytes came.
    pub(super) fn serve(&mut self, now: u64, token: usize, reactor: &mut Carrier, store: &mut Store) -> bool {
        let link = link_of(token);
        let received_bytes = self.links.get(&link).map(Stage::received_bytes);
        self.go_on(now, link, reactor, store);
        self.links.get(&link).map(Stage::received_bytes) != received_bytes
    }

    /// From now on only [`Peers::serve`] finds what comes next over this link: no event need tell of it.
    pub(super) fn heat(&mut self, token: usize, reactor: &mut Carrier) {
        if let Some(Stage::Open(socket)) = self.links.get_mut(&link_of(token)) {
            socket.heat(reactor);
        }
    }

    /// Events tell of this link again.
    pub(super) fn cool(&mut self, token: usize, reactor: &mut Carrier) {
        if let Some(Stage::Open(socket)) = self.links.get_mut(&link_of(token)) {
            socket.cool(reactor);
        }
    }

    /// A long payload is on its way over this link.
    pub(super) fn in_pieces(&self, token: usize) -> bool {
        matches!(self.links.get(&link_of(token)), Some(Stage::Open(socket)) if socket.in_pieces())
    }

    /// There is more to read than a turn took.
    pub(super) fn unfinished(&self) -> bool {
        !self.unread.is_empty()
    }

    /// A process has connected to us and proved its name.
    pub(super) fn accepted(
        &mut self,
        now: u64,
        stream: TcpStream,
        session: Session,
        reactor: &mut Carrier,
        store: &mut Store,
    ) {
        // Whoever is here has a key for it: the hello lets nobody be a peer in plain text.
        let peer = self.membership.number_of(&session.peer.subject);
        let link = match peer {
            Some(peer) => self.peering.accepted(now, peer, session.peer.incarnation),
            None => {
                if now >= self.strangers_due_ns {
                    self.strangers_due_ns = now + STRANGERS_NS;
                    let name = &session.peer.subject;
                    tracing::warn!(
                        "process {name} connected, of which we were not told: give --peer {name}=HOST:PORT, or a table of members with it"
                    );
                }
                self.peering.refused(Farewell::Unknown)
            }
        };
        match self.adopt(stream, &session, link, reactor) {
            Ok(socket) => drop(self.links.insert(link, Stage::Open(socket))),
            Err(error) => self.peering.gone(now, link, error.to_string()),
        }
        self.act(now, reactor, store);
    }

    /// Tells everybody that we stop; what follows is `reactor.wait`.
    pub(super) fn goodbye(&mut self, reactor: &mut Carrier, store: &mut Store) {
        self.stopped = true;
        self.peering.stop();
        self.act(now_ns(), reactor, store);
    }

    // ---- parcels ----------------------------------------------------------------------------------------------

    /// What came, and what ended, oldest first.
    pub(super) fn arrival(&mut self) -> Option<Arrival> {
        self.arrivals.pop_front()
    }

    /// Whether all that came was taken.
    pub(super) fn has_no_arrivals(&self) -> bool {
        self.arrivals.is_empty()
    }

    /// Something for a peer, whether it is there or not. [`Peers::pump`] sends it.
    ///
    /// # Errors
    /// Nothing is sent to it as it is now, or too much waits already: the code, why, and the parcel.
    pub(super) fn post(
        &mut self,
        peer: PeerNumber,
        ticket: Ticket,
        parcel: Parcel,
        deadline_ns: u64,
    ) -> Result<(), (Code, String, Parcel)> {
        if let Err((code, text)) = self.may_post(peer, &parcel.kind) {
            return Err((code, text, parcel));
        }
        let sent = self.targets[peer].outbox.send(ticket, parcel, deadline_ns);
        self.peering.want(peer);
        self.outboxes_due_ns = self.outboxes_due_ns.min(deadline_ns);
        sent.map_err(|full| (full.why.code(), full.why.to_string(), full.parcel))
    }

    /// Nobody waits for it any more.
    pub(super) fn cancel(&mut self, peer: PeerNumber, ticket: Ticket) {
        self.targets[peer].outbox.cancel(ticket);
        self.note_ends(peer);
    }

    /// What waits for peers, sent or not, to be replaced by the same in another place.
    pub(super) fn parcels_mut(&mut self) -> impl Iterator<Item = &mut Parcel> {
        self.targets.iter_mut().flat_map(|target| target.outbox.parcels_mut())
    }

    /// The verdict on a parcel that came. [`Peers::say_verdicts`] says it, or [`Peers::pump`] with a parcel of ours.
    pub(super) fn settle(&mut self, now: u64, peer: PeerNumber, due: Due, verdict: Verdict) {
        let Target { inbox, delay, up, .. } = &mut self.targets[peer];
        inbox.settled(due, verdict);
        // It saves a segment. Through shared memory it would save nothing, and who is told later asks for its answer later.
        match up.and_then(|link| self.nears.speaks(link)) {
            Some(true) => delay.settled_apart(),
            _ => delay.settled(now),
        }
        self.verdicts_due_ns = self.verdicts_due_ns.min(delay.due_ns());
    }

    /// Says the verdicts that are due by this time.
    pub(super) fn say_verdicts(&mut self, now: u64, by_ns: u64, reactor: &mut Carrier, store: &mut Store) {
        if self.verdicts_due_ns == NEVER || by_ns < self.verdicts_due_ns {
            return;
        }
        self.verdicts_due_ns = NEVER;
        for peer in 0..self.targets.len() {
            match self.targets[peer].delay.due_ns() {
                NEVER => {}
                due_ns if due_ns <= by_ns => self.pump(now, peer, reactor, store),
                due_ns => self.verdicts_due_ns = self.verdicts_due_ns.min(due_ns),
            }
        }
        self.nears.ring();
    }

    /// Puts on the link what may go there: verdicts, then parcels.
    pub(super) fn pump(&mut self, now: u64, peer: PeerNumber, reactor: &mut Carrier, store: &mut Store) {
        let target = &mut self.targets[peer];
        // Without a link nothing is owed but to the next one.
        let Some(link) = target.up else { return target.delay.said(now, false) };
        let Some(Stage::Open(socket)) = self.links.get_mut(&link) else { return };
        match self.nears.speaks(link) {
            Some(true) => return self.pump_near(now, peer, link, store),
            // The leader is second, and what is under way in pieces goes first: all else would arrive before it.
            Some(false) if self.nears.hears(link) || *self.name > *target.name => {
                if socket.sends_pieces() {
                    return;
                }
                let header = Header { kind: frame::NEAR_GO, ..Header::default() };
                if socket.queue(&header, &[], Bytes::Text(String::new())).is_ok() {
                    self.nears.speak(link);
                    tracing::info!("peer={} link={link} via=memory", target.name);
                    self.flush_link(now, link, reactor, store);
                    return self.pump_near(now, peer, link, store);
                }
            }
            _ => {}
        }
        let (mut queued, mut answers) = (false, false);
        while socket.backlog().0 < BACKLOG_PARCELS_MAX {
            let Some((number, verdict)) = target.inbox.next_verdict() else { break };
            let header = verdict_header(number, verdict);
            queued |= socket.queue(&header, &[], Bytes::Text(String::new())).is_ok();
        }
        // A long payload travels in pieces, between which short frames pass: what is behind it waits, since parcels arrive in order.
        while socket.backlog().0 < BACKLOG_PARCELS_MAX && !socket.sends_pieces() {
            let Some(dispatch) = target.outbox.next_to_send() else { break };
            let (header, parcel) = (parcel_header(now, &dispatch), dispatch.parcel);
            queued |= socket.queue(&header, &parcel.key, Bytes::Shared(Arc::clone(&parcel.bytes))).is_ok();
            answers = true;
        }
        target.delay.said(now, answers);
        if queued {
            self.flush_link(now, link, reactor, store);
        }
    }

    fn flush_link(&mut self, now: u64, link: LinkNumber, reactor: &mut Carrier, store: &mut Store) {
        let Some(Stage::Open(socket)) = self.links.get_mut(&link) else { return };
        let arrivals = &mut self.arrivals;
        let done = &mut |bytes| arrivals.push_back(Arrival::Done(bytes));
        if let Err(error) = socket.flush(reactor, done) {
            self.peering.gone(now, link, error.with_cause());
            self.act(now, reactor, store);
        }
    }

    /// As [`Peers::pump`], over shared memory.
    fn pump_near(&mut self, now: u64, peer: PeerNumber, link: LinkNumber, store: &Store) {
        let Peers { targets, nears, .. } = self;
        let target = &mut targets[peer];
        let mut answers = false;
        while nears.has_room(link) {
            let Some((number, verdict)) = target.inbox.next_verdict() else { break };
            nears.say(link, &verdict_header(number, verdict));
        }
        while nears.has_room(link) {
            let Some(dispatch) = target.outbox.next_to_send() else { break };
            let (header, parcel) = (parcel_header(now, &dispatch), dispatch.parcel);
            nears.send(link, &header, &parcel.key, &parcel.bytes, store);
            answers = true;
        }
        target.delay.said(now, answers);
    }

    /// What an outbox is done with.
    fn note_ends(&mut self, peer: PeerNumber) {
        self.targets[peer].outbox.forsake(Parcel::blank);
        while let Some(action) = self.targets[peer].outbox.action() {
            self.arrivals.push_back(match action {
                post::Action::End { ticket, end } => Arrival::End { ticket, end },
                post::Action::Discard(parcel) => Arrival::Done(Bytes::Shared(parcel.bytes)),
            });
        }
    }

    /// A parcel or a verdict has come over a link.
    fn take_parcel(&mut self, now: u64, link: LinkNumber, frame: Frame<Landing>) -> Result<(), String> {
        let bytes = match frame.body {
            Received::Whole(body) => Ok(body.into()),
            Received::Refused { why: tcp::Refusal::TooLarge, .. } => Err(Code::TooLarge),
            Received::Refused { why: tcp::Refusal::NoSpace, .. } => Err(Code::NoSpace),
        };
        if self.nears.hears(link) {
            self.arrivals.extend(bytes.ok().map(Arrival::Done));
            return Err("it sent a parcel over the link, and shares memory with us".into());
        }
        self.take_in(now, link, &frame.header, frame.key.as_ref().to_vec(), bytes)
    }

    /// The same, whatever carried it.
    fn take_in(
        &mut self,
        now: u64,
        link: LinkNumber,
        header: &Header,
        key: Vec<u8>,
        bytes: Result<Bytes, Code>,
    ) -> Result<(), String> {
        let new = self.judge_parcel(now, link, header);
        match (new, bytes) {
            (Ok(Some((peer, due, kind))), bytes) => {
                self.arrivals.push_back(Arrival::Parcel { peer, due, kind, key, bytes });
                Ok(())
            }
            (new, bytes) => {
                self.arrivals.extend(bytes.ok().map(Arrival::Done));
                new.map(drop)
            }
        }
    }

    /// What the header of a parcel or a verdict says, done or noted; something when it is a parcel that was not here before.
    fn judge_parcel(
        &mut self,
        now: u64,
        link: LinkNumber,
        header: &Header,
    ) -> Result<Option<(PeerNumber, Due, Kind)>, String> {
        let peer = self.peering.peer_of(link).filter(|peer| self.targets[*peer].up == Some(link));
        let peer = peer.ok_or("it sent a parcel before the link was agreed on")?;
        let target = &mut self.targets[peer];
        if header.kind == frame::VERDICT {
            let verdict = match Code::from_wire(header.flags).ok_or("it gave a verdict that there is not")? {
                Code::Ok => Verdict::Stored,
                code => Verdict::Refused(code),
            };
            target.outbox.verdict(header.call, verdict).map_err(|violation| violation.to_string())?;
            self.note_ends(peer);
            return Ok(None);
        }
        let confirmed = header.call.checked_sub(header.function.into()).ok_or("it numbered a parcel below zero")?;
        // Before it has arrived: what has is owed a verdict.
        let kind = kind_of(now, header).ok_or("it sent a parcel of a kind that there is not")?;
        match target.inbox.arrived(header.call, confirmed).map_err(|violation| violation.to_string())? {
            Arrived::Again => Ok(None),
            Arrived::New(due) => Ok(Some((peer, due, kind))),
        }
    }

    // ---- shared memory ----------------------------------------------------------------------------------------

    /// Payloads may lie in this segment of ours.
    pub(super) fn show(&mut self, participant: u8, incarnation: u64, file: &praas_shm::SegmentFile) {
        self.nears.show(participant, incarnation, file);
    }

    /// Its owner is dead, and no parcel has bytes there any more.
    pub(super) fn hide(&mut self, participant: u8) {
        self.nears.hide(participant);
    }

    /// A link is up: the leader offers to share memory beside it, if the other end may be on this host.
    fn offer_memory(&mut self, now: u64, peer: PeerNumber, link: LinkNumber, reactor: &mut Carrier, store: &mut Store) {
        let target = &self.targets[peer];
        let is_here = self.links.get(&link).and_then(Stage::peer_addr).is_some_and(tcp::on_loopback);
        if !self.nears.is_on() || !is_here || *self.name > *target.name {
            return;
        }
        if target.near_broke {
            return self.goes_alone(link, BROKE);
        }
        match self.nears.offer(now, link, peer, reactor) {
            Ok(token) => {
                let aux = self.limits.payload_bytes_max;
                let header = Header { kind: frame::NEAR_OFFER, aux, ..Header::default() };
                self.say_frame(now, link, &header, &token, reactor, store);
            }
            Err(why) => self.goes_alone(link, &why),
        }
    }

    fn say_frame(
        &mut self,
        now: u64,
        link: LinkNumber,
        header: &Header,
        key: &[u8],
        reactor: &mut Carrier,
        store: &mut Store,
    ) {
        let Some(Stage::Open(socket)) = self.links.get_mut(&link) else { return };
        if socket.queue(header, key, Bytes::Text(String::new())).is_ok() {
            self.flush_link(now, link, reactor, store);
        }
    }

    /// Says why a link carries everything itself.
    fn goes_alone(&self, link: LinkNumber, why: &str) {
        let name = self.peering.peer_of(link).map_or("?", |peer| &self.targets[peer].name);
        tracing::info!("peer={name} link={link} via=tcp: no memory is shared: {why}");
    }

    /// A frame about sharing memory.
    fn hear_of_memory(
        &mut self,
        now: u64,
        link: LinkNumber,
        header: &Header,
        key: &[u8],
        reactor: &mut Carrier,
        store: &mut Store,
    ) -> Result<(), String> {
        let peer = self.peering.peer_of(link).filter(|peer| self.targets[*peer].up == Some(link));
        let peer = peer.ok_or("it spoke of shared memory before the link was agreed on")?;
        match header.kind {
            frame::NEAR_OFFER => {
                let token = Token::try_from(key).map_err(|_| "it offered to share memory without a token")?;
                let before = self.targets[peer].offered_over.replace(link);
                if *self.name < *self.targets[peer].name || before == Some(link) {
                    return Err("it offered to share memory, which it is not to do now".into());
                }
                let accepted = if self.targets[peer].near_broke {
                    Err(BROKE.to_owned())
                } else {
                    self.nears.accept(now, link, peer, token, header.aux, reactor)
                };
                if let Err(why) = accepted {
                    self.goes_alone(link, &why);
                    let why = &why.as_bytes()[..why.len().min(REASON_BYTES_MAX)];
                    let header = Header { kind: frame::NEAR_REFUSED, ..Header::default() };
                    self.say_frame(now, link, &header, why, reactor, store);
                }
            }
            frame::NEAR_REFUSED => {
                if self.nears.hears(link) {
                    return Err("it shares memory with us and refuses to".into());
                }
                if self.nears.is_of(link) {
                    let why =
                        String::from_utf8_lossy(&key[..key.len().min(REASON_BYTES_MAX)]).escape_debug().to_string();
                    let arrivals = &mut self.arrivals;
                    self.nears.end(link, reactor, &mut |bytes| arrivals.push_back(Arrival::Done(bytes)));
                    self.goes_alone(link, &format!("the other end says: {why}"));
                }
            }
            _ => {
                if !self.nears.goes(link) {
                    return Err("it speaks by memory that is not shared".into());
                }
                self.pump(now, peer, reactor, store);
            }
        }
        Ok(())
    }

    /// Something happened to what shares memory.
    pub(super) fn serve_memory(&mut self, now: u64, token: usize, reactor: &mut Carrier, store: &mut Store) {
        let arrivals = &mut self.arrivals;
        let done = &mut |bytes| arrivals.push_back(Arrival::Done(bytes));
        let Some((link, step)) = self.nears.serve(token, reactor, done) else { return };
        match step {
            Step::Nothing => {}
            Step::Stands => {
                if let Some(peer) = self.peering.peer_of(link) {
                    self.pump(now, peer, reactor, store);
                }
            }
            Step::Failed(why) => {
                self.goes_alone(link, &why);
                let why = &why.as_bytes()[..why.len().min(REASON_BYTES_MAX)];
                let header = Header { kind: frame::NEAR_REFUSED, ..Header::default() };
                self.say_frame(now, link, &header, why, reactor, store);
            }
            Step::Broken(why) => {
                // What it had published counts; and the link may say better why it is gone.
                let why = self.take_from_memory(now, link, LEFT_BEHIND_MAX, store).err().unwrap_or(why);
                self.go_on(now, link, reactor, store);
                self.memory_broke(now, link, why, reactor, store);
            }
        }
    }

    /// The link goes with the memory beside it.
    fn memory_broke(&mut self, now: u64, link: LinkNumber, why: String, reactor: &mut Carrier, store: &mut Store) {
        let Some(peer) = self.peering.peer_of(link).filter(|peer| self.targets[*peer].up == Some(link)) else { return };
        self.targets[peer].near_broke = true;
        self.peering.gone(now, link, why);
        self.act(now, reactor, store);
    }

    /// Whether somebody has written something into shared memory.
    #[inline]
    pub(super) fn memory_is_ready(&self) -> bool {
        self.nears.is_ready()
    }

    /// Takes what others have written into shared memory, and goes on with what waited for room. Whether there was something.
    pub(super) fn poll_memory(&mut self, now: u64, reactor: &mut Carrier, store: &mut Store) -> bool {
        let (mut found, mut place) = (false, 0);
        while let Some((at, link)) = self.nears.ready_from(place) {
            (found, place) = (true, at + 1);
            match self.take_from_memory(now, link, FRAMES_PER_TURN, store) {
                Ok(()) => {
                    // A verdict may have made room for more.
                    if let Some(peer) = self.peering.peer_of(link) {
                        self.pump(now, peer, reactor, store);
                    }
                }
                Err(why) => self.memory_broke(now, link, why, reactor, store),
            }
        }
        while let Some(peer) = self.nears.flush(store) {
            self.pump(now, peer, reactor, store);
        }
        found
    }

    fn take_from_memory(
        &mut self,
        now: u64,
        link: LinkNumber,
        frames_max: usize,
        store: &mut Store,
    ) -> Result<(), String> {
        for _ in 0..frames_max {
            let Some(super::near::Frame { header, key, bytes }) = self.nears.take(link, store)? else { break };
            self.take_in(now, link, &header, key, bytes)?;
            if header.kind == frame::VERDICT {
                let arrivals = &mut self.arrivals;
                self.nears.settled(link, header.call, &mut |bytes| arrivals.push_back(Arrival::Done(bytes)));
            }
        }
        Ok(())
    }

    /// We are about to sleep: who writes something from here on wakes us. Look once more after it.
    pub(super) fn arm(&self) {
        self.nears.arm();
    }

    /// We are awake.
    pub(super) fn disarm(&self) {
        self.nears.disarm();
    }

    /// Whether something waits for room in shared memory, of which nobody tells us.
    pub(super) fn waits_for_room(&self) -> bool {
        self.nears.waits()
    }

    /// Wakes the processes that were written something.
    pub(super) fn ring(&mut self) {
        self.nears.ring();
    }

    // ---- what was decided -------------------------------------------------------------------------------------

    fn act(&mut self, now: u64, reactor: &mut Carrier, store: &mut Store) {
        while let Some(action) = self.peering.action() {
            match action {
                Action::Dial { peer, link } => {
                    if let Err(error) = self.dial(peer, link, reactor) {
                        let address = self.address_of(peer);
                        self.peering.gone(now, link, format!("{address}: {error}"));
                    }
                }
                Action::Say { link, word } => {
                    if let Err(text) = self.say(link, word, reactor) {
                        self.peering.gone(now, link, text);
                    }
                }
                Action::Close { link } => self.leave(now, link, reactor, store),
                Action::Up { peer, link, incarnation } => {
                    let address = self.links.get(&link).and_then(Stage::peer_addr);
                    let address = address.map_or_else(String::new, |address| format!(" address={address}"));
                    let name = &self.targets[peer].name;
                    tracing::info!("peer={name} state=up incarnation={incarnation} link={link}{address}");
                    self.membership.met(peer, incarnation);
                    let target = &mut self.targets[peer];
                    target.said.clear();
                    if target.life != incarnation {
                        target.near_broke = false;
                        if target.life != 0 {
                            self.arrivals.push_back(Arrival::Over { peer, text: LIFE_IS_OVER });
                        }
                    }
                    (target.life, target.up) = (incarnation, Some(link));
                    target.outbox.up(incarnation);
                    target.inbox.up(incarnation);
                    self.note_ends(peer);
                    self.pump(now, peer, reactor, store);
                    self.offer_memory(now, peer, link, reactor, store);
                }
                Action::Down { peer, link, loss } => {
                    let name = &self.targets[peer].name;
                    tracing::info!("peer={name} state=down link={link}: {loss}");
                    let arrivals = &mut self.arrivals;
                    self.nears.end(link, reactor, &mut |bytes| arrivals.push_back(Arrival::Done(bytes)));
                    let target = &mut self.targets[peer];
                    target.up = None;
                    target.outbox.down();
                    target.inbox.down();
                    self.note_ends(peer);
                }
                Action::Failed { peer, loss } | Action::Refused { peer, loss } => {
                    let said = loss.to_string();
                    let target = &mut self.targets[peer];
                    if target.said.len() < SAID_MAX && !target.said.contains(&said) {
                        tracing::warn!("peer={} state=absent: {said}", target.name);
                        target.said.push(said);
                    }
                }
            }
        }
    }

    /// Where the last dial went.
    fn address_of(&self, peer: PeerNumber) -> SocketAddr {
        let addresses = self.membership.addresses_of(peer);
        addresses[self.targets[peer].dials.saturating_sub(1) % addresses.len()]
    }

    fn dial(&mut self, peer: usize, link: LinkNumber, reactor: &mut Carrier) -> io::Result<()> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
        self.targets[peer].dials += 1;
        let address = self.address_of(peer);
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
        match connect(&socket, &address) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        reactor.watch(socket.as_fd(), token_of(link), Interest::Both)?;
        self.links.insert(link, Stage::Connecting(TcpStream::from(socket)));
        Ok(())
    }

    fn say(&mut self, link: LinkNumber, word: Word, reactor: &mut Carrier) -> Result<(), String> {
        let Some(Stage::Open(socket)) = self.links.get_mut(&link) else { return Ok(()) };
        let (kind, flags) = match word {
            Word::Welcome => (frame::WELCOME, 0),
            Word::Confirm => (frame::CONFIRM, 0),
            Word::Ping => (frame::PING, 0),
            Word::Pong => (frame::PONG, 0),
            Word::Goodbye(farewell) => (frame::GOODBYE, farewell as u16),
        };
        let aux = if word == Word::Welcome { u64::from(VERSIONS.max) } else { 0 };
        let header = Header { kind, flags, aux, ..Header::default() };
        if socket.queue(&header, &[], Bytes::Text(String::new())).is_err() {
            return Err("it does not read what we send".into());
        }
        let arrivals = &mut self.arrivals;
        let done = &mut |bytes| arrivals.push_back(Arrival::Done(bytes));
        socket.flush(reactor, done).map(drop).map_err(|error| error.with_cause())
    }

    /// Closes a link; what was said on it goes out first.
    fn leave(&mut self, now: u64, link: LinkNumber, reactor: &mut Carrier, store: &mut Store) {
        let speaks = matches!(self.links.get(&link), Some(Stage::Open(socket)) if socket.wants_write());
        match self.links.remove(&link) {
            Some(Stage::Open(socket)) if speaks && self.leaving.len() < LEAVING_MAX => {
                self.leaving.push_back((link, now + LAST_WORDS_NS));
                self.links.insert(link, Stage::Leaving(socket));
            }
            Some(stage) => {
                self.links.insert(link, stage);
                self.drop_link(link, reactor, store);
            }
            None => {}
        }
    }

    fn drop_link(&mut self, link: LinkNumber, reactor: &mut Carrier, store: &mut Store) {
        match self.links.remove(&link) {
            Some(Stage::Connecting(stream) | Stage::Greeting(stream, _)) => {
                reactor.unwatch(stream.as_fd(), token_of(link));
            }
            Some(Stage::Open(socket) | Stage::Leaving(socket)) => {
                let arrivals = &mut self.arrivals;
                socket.close(reactor, store, &mut |bytes| arrivals.push_back(Arrival::Done(bytes)));
            }
            None => {}
        }
    }

    // ---- what happened ----------------------------------------------------------------------------------------

    fn go_on(&mut self, now: u64, link: LinkNumber, reactor: &mut Carrier, store: &mut Store) {
        let went_on = match self.links.get_mut(&link) {
            None => return,
            Some(Stage::Connecting(stream)) => match is_connected(stream) {
                Ok(false) => return,
                Ok(true) => self.begin_hello(now, link, reactor),
                Err(error) => Err(error.to_string()),
            },
            Some(Stage::Greeting(..)) => self.greet(now, link, reactor),
            Some(Stage::Open(_)) => self.read(now, link, reactor, store),
            Some(Stage::Leaving(socket)) => {
                let arrivals = &mut self.arrivals;
                let flushed = socket.flush(reactor, &mut |bytes| arrivals.push_back(Arrival::Done(bytes)));
                if flushed.is_err() || !socket.wants_write() {
                    self.drop_link(link, reactor, store);
                }
                return;
            }
        };
        if let Err(text) = went_on {
            let text = match self.peering.peer_of(link) {
                Some(peer) if !matches!(self.links.get(&link), Some(Stage::Open(_))) => {
                    format!("{}: {text}", self.address_of(peer))
                }
                _ => text,
            };
            self.peering.gone(now, link, text);
        }
        self.act(now, reactor, store);
    }

    fn begin_hello(&mut self, now: u64, link: LinkNumber, reactor: &mut Carrier) -> Result<(), String> {
        let Some(Stage::Connecting(stream)) = self.links.remove(&link) else { return Ok(()) };
        let initiator = self.initiator(link, &stream);
        let begun = initiator.as_ref().map(drop).map_err(Clone::clone);
        let stage = match initiator {
            Ok(initiator) => Stage::Greeting(stream, Box::new(initiator)),
            Err(_) => Stage::Connecting(stream),
        };
        self.links.insert(link, stage);
        begun?;
        self.greet(now, link, reactor)
    }

    fn initiator(&self, link: LinkNumber, stream: &TcpStream) -> Result<Initiator, String> {
        let set_up = stream.set_nodelay(true).and_then(|()| stream.peer_addr());
        let address = set_up.map_err(|error| error.to_string())?;
        let (Some(key), Some(peer)) = (&self.key, self.peering.peer_of(link)) else {
            return Err("there is no key".into());
        };
        let expires_unix_s = unix_s() + CREDENTIAL_S;
        let credential = Credential::mint(key, Role::Process, &self.name, expires_unix_s);
        let credential = credential.map_err(|error| error.to_string())?;
        let config = InitiatorConfig {
            versions: VERSIONS,
            purpose: Purpose::Peer,
            session_id: self.session_id,
            incarnation: self.incarnation,
            payload_checksums: self.checks == Checks::Always || !on_loopback(address),
            expect_process: Some(self.targets[peer].name.to_string()),
        };
        Initiator::new(config, Some(&credential)).map_err(|error| error.to_string())
    }

    fn greet(&mut self, now: u64, link: LinkNumber, reactor: &mut Carrier) -> Result<(), String> {
        let Some(Stage::Greeting(stream, initiator)) = self.links.get_mut(&link) else { return Ok(()) };
        let Some(session) = initiator.advance(stream, unix_s()).map_err(|error| explain(&error))? else {
            return Ok(());
        };
        let Some(Stage::Greeting(stream, _)) = self.links.remove(&link) else { return Ok(()) };
        reactor.unwatch(stream.as_fd(), token_of(link));
        let socket = self.adopt(stream, &session, link, reactor).map_err(|error| error.to_string())?;
        self.links.insert(link, Stage::Open(socket));
        self.peering.dialed(now, link, session.peer.incarnation);
        Ok(())
    }

    fn adopt(
        &self,
        stream: TcpStream,
        session: &Session,
        link: LinkNumber,
        reactor: &mut Carrier,
    ) -> io::Result<Socket<Landing, Bytes>> {
        keep_alive(&stream)?;
        let congestion = self.congestion;
        let config = TcpConfig { backlog_frames_max: BACKLOG_FRAMES_MAX, congestion, ..TcpConfig::default() };
        let terms = Terms::of(session, self.incarnation);
        reactor.adopt(stream, token_of(link), self.limits, config, terms)
    }

    fn read(&mut self, now: u64, link: LinkNumber, reactor: &mut Carrier, store: &mut Store) -> Result<(), String> {
        for _ in 0..FRAMES_PER_TURN {
            // A frame may have ended it.
            let Some(Stage::Open(socket)) = self.links.get_mut(&link) else { return Ok(()) };
            let arrivals = &mut self.arrivals;
            let done = &mut |bytes| arrivals.push_back(Arrival::Done(bytes));
            let _ = socket.flush(reactor, done).map_err(|error| error.with_cause())?;
            let received_bytes = socket.stats().received_bytes;
            let frame = match socket.receive(reactor, &mut self.scratch, store) {
                Ok(frame) => frame,
                Err(error) => {
                    self.take_from_memory(now, link, LEFT_BEHIND_MAX, store)?;
                    return Err(error.with_cause());
                }
            };
            if socket.stats().received_bytes > received_bytes || frame.is_some() {
                self.peering.arrived(now, link);
            }
            let Some(frame) = frame else {
                if self.links.get(&link).is_some_and(Stage::unfinished) && !self.unread.contains(&link) {
                    self.unread.push(link);
                }
                // What was written may have made room for more; verdicts that wait go on waiting. One that is due is still here because a
                // long payload was on its way as memory was about to be shared (M6: both ends waited for the other's verdict for ever).
                if let Some(peer) = self.peering.peer_of(link)
                    && !self.targets[peer].delay.waits(now)
                {
                    self.pump(now, peer, reactor, store);
                }
                return Ok(());
            };
            if matches!(frame.header.kind, frame::MESSAGE..=frame::VERDICT) {
                self.take_parcel(now, link, frame)?;
                continue;
            }
            if let Received::Whole(body) = frame.body {
                store.give_back(body);
            }
            if matches!(frame.header.kind, frame::NEAR_OFFER..=frame::NEAR_GO) {
                self.hear_of_memory(now, link, &frame.header, frame.key.as_ref(), reactor, store)?;
                continue;
            }
            // What its ring has was said before.
            if frame.header.kind == frame::GOODBYE {
                self.take_from_memory(now, link, LEFT_BEHIND_MAX, store)?;
            }
            let word = match (frame.header.kind, Farewell::from_wire(frame.header.flags)) {
                (frame::WELCOME, _) => Word::Welcome,
                (frame::CONFIRM, _) => Word::Confirm,
                (frame::PING, _) => Word::Ping,
                (frame::PONG, _) => Word::Pong,
                (frame::GOODBYE, Some(farewell)) => Word::Goodbye(farewell),
                (kind, _) => return Err(format!("it sent a frame of kind {kind} that we do not know")),
            };
            self.peering.heard(now, link, word);
            self.act(now, reactor, store);
        }
        if !self.unread.contains(&link) {
            self.unread.push(link);
        }
        Ok(())
    }
}

/// The frame of a verdict.
fn verdict_header(number: u64, verdict: Verdict) -> Header {
    let code = match verdict {
        Verdict::Stored => Code::Ok,
        Verdict::Refused(code) => code,
    };
    Header { kind: frame::VERDICT, call: number, flags: code as u16, ..Header::default() }
}

/// The frame of a parcel, but for key and payload.
fn parcel_header(now: u64, dispatch: &Dispatch<'_, Parcel>) -> Header {
    let behind = u16::try_from(dispatch.number - dispatch.confirmed).expect("a window is 2^14 at most");
    Header { call: dispatch.number, function: behind, ..header_of(now, &dispatch.parcel.kind) }
}

/// What a frame says besides its bytes; `None`: nothing that there is.
fn kind_of(now: u64, header: &Header) -> Option<Kind> {
    let (call, is_args) = (header.aux, header.flags & frame::FLAG_ARGS != 0);
    Some(match header.kind {
        frame::MESSAGE => Kind::Message,
        frame::CALL => {
            let deadline_ns = now.saturating_add(header.budget_ns.min(BUDGET_MAX_NS));
            let idempotent = header.flags & frame::FLAG_IDEMPOTENT != 0;
            Kind::Call { call, deadline_ns, is_args, idempotent }
        }
        frame::ANSWER => {
            let (code, is_args) = (header.flags & !ANSWER_ARGS, header.flags & ANSWER_ARGS != 0);
            let code = Code::from_wire(code)?;
            // What a function returned with a result is zero or above.
            let status = if code == Code::Ok { header.status.max(0) } else { header.status };
            Kind::Answer { call, code, status, is_args }
        }
        frame::CALL_OFF => Kind::Cancel { call },
        _ => return None,
    })
}

/// Why memory is not shared once more.
const BROKE: &str = "the memory that this life of it shared before broke";

/// Bit of an answer's flags: its body is several arguments.
const ANSWER_ARGS: u16 = 1 << 15;

fn header_of(now: u64, kind: &Kind) -> Header {
    match *kind {
        Kind::Message => Header { kind: frame::MESSAGE, ..Header::default() },
        Kind::Call { call, deadline_ns, is_args, idempotent } => Header {
            kind: frame::CALL,
            aux: call,
            budget_ns: deadline_ns.saturating_sub(now).max(1),
            flags: if is_args { frame::FLAG_ARGS } else { 0 } | if idempotent { frame::FLAG_IDEMPOTENT } else { 0 },
            ..Header::default()
        },
        Kind::Answer { call, code, status, is_args } => Header {
            kind: frame::ANSWER,
            aux: call,
            status,
            flags: code as u16 | if is_args { ANSWER_ARGS } else { 0 },
            ..Header::default()
        },
        Kind::Cancel { call } => Header { kind: frame::CALL_OFF, aux: call, ..Header::default() },
    }
}

impl Target {
    fn new(name: &str, bounds: Bounds) -> Target {
        Target {
            name: name.into(),
            dials: 0,
            said: Vec::new(),
            up: None,
            outbox: Outbox::new(bounds),
            inbox: Inbox::new(WINDOW),
            delay: Delay::new(),
            life: 0,
            near_broke: false,
            offered_over: None,
        }
    }
}

impl Stage {
    /// There is more to read, and no event will say so.
    fn unfinished(&self) -> bool {
        matches!(self, Stage::Open(socket) if socket.unfinished())
    }

    /// Bytes of frames so far.
    fn received_bytes(&self) -> u64 {
        match self {
            Stage::Open(socket) => socket.stats().received_bytes,
            _ => 0,
        }
    }

    fn peer_addr(&self) -> Option<SocketAddr> {
        match self {
            Stage::Connecting(stream) | Stage::Greeting(stream, _) => stream.peer_addr().ok(),
            Stage::Open(socket) | Stage::Leaving(socket) => Some(socket.peer_addr()),
        }
    }
}

/// The token of what carries a link.
fn token_of(link: LinkNumber) -> usize {
    super::PEERS + usize::try_from(link).expect("64 bits")
}

fn link_of(token: usize) -> LinkNumber {
    (token - super::PEERS) as LinkNumber
}

fn explain(error: &HelloError) -> String {
    match error {
        HelloError::Unproven => "it does not prove that it has our key; give both the same --key-file".into(),
        HelloError::Refused => "it refuses us; give both the same --key-file".into(),
        error => error.to_string(),
    }
}
