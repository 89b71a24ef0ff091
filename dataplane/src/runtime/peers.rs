//! Connections to other processes: dials, hellos and heartbeats, as `controller::peers` decides. Never blocks.
//!
//! What two processes say to each other over a link that is up comes with messages and calls between processes; here are the
//! link and its life.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;

use praas_transport::hello::{HelloError, Initiator, InitiatorConfig, Purpose, ResponderConfig, Session};
use praas_transport::reactor::{Interest, Socket};
use praas_transport::tcp::{Received, Scratch, TcpConfig, Terms, is_connected, on_loopback};
use praas_transport::{Bodies, Header, Limits};

use super::body::{Bytes, Landing, Store};
use super::clients::Carrier;
use super::error::ProcessError;
use crate::client::link::keep_alive;
use crate::clock::{now_ns, unix_s};
use crate::config::{Checks, Congestion, ProcessConfig};
use crate::controller::peers::{Action, Farewell, LinkNumber, Peering, Word};
use crate::wire::{VERSIONS, frame};
use crate::{Credential, Role, Secret};

/// Frames taken from one peer before the next one's turn.
const FRAMES_PER_TURN: usize = 64;
/// Frames that may wait for a peer: a heartbeat is one or two.
const BACKLOG_FRAMES_MAX: usize = 64;
/// No frame between peers has a payload yet.
const LIMITS: Limits = Limits { payload_bytes_max: 0 };
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

/// A process we were told of.
#[derive(Debug)]
struct Target {
    name: String,
    addresses: Vec<SocketAddr>,
    /// Dials so far; each goes to the next address.
    dials: usize,
    /// What the log was told since it was up last: the same is not said again, and no more than so much.
    said: Vec<String>,
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
    name: String,
    incarnation: u64,
    session_id: [u8; 16],
    /// `None` without peers.
    key: Option<Secret>,
    congestion: Congestion,
    checks: Checks,
    targets: Vec<Target>,
    links: HashMap<LinkNumber, Stage>,
    scratch: Scratch<Landing>,
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
        let told = config.peer_addresses()?.into_iter();
        let targets: Vec<_> =
            told.map(|(name, addresses)| Target { name, addresses, dials: 0, said: Vec::new() }).collect();
        let mut seed = process_id;
        seed.iter_mut().zip(hello.incarnation.to_le_bytes()).for_each(|(byte, with)| *byte ^= with);
        Ok(Peers {
            peering: Peering::new(&hello.process, targets.iter().map(|target| &*target.name), seed),
            name: hello.process.clone(),
            incarnation: hello.incarnation,
            session_id: process_id,
            key: hello.key.clone().filter(|_| !targets.is_empty()),
            congestion: config.congestion,
            checks: config.checks,
            targets,
            links: HashMap::new(),
            scratch: Scratch::default(),
            unread: Vec::new(),
            leaving: VecDeque::new(),
            strangers_due_ns: 0,
            admitted: false,
            stopped: false,
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.targets.len()
    }

    /// The process is ready: peers are dialed from now on, as others are let in.
    pub(super) fn admit(&mut self) {
        self.admitted = true;
    }

    /// When [`Peers::tick`] has to be called next.
    pub(super) fn wake_ns(&self) -> u64 {
        if !self.unread.is_empty() {
            return 0;
        }
        let peering_ns = if self.is_on() { self.peering.wake_ns() } else { u64::MAX };
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
        while let Some((link, _)) = self.leaving.pop_front_if(|(_, until_ns)| now >= *until_ns) {
            self.drop_link(link, reactor, store);
        }
    }

    /// Something happened to what is watched by this token.
    pub(super) fn serve(&mut self, now: u64, token: usize, reactor: &mut Carrier, store: &mut Store) {
        self.go_on(now, (token - super::PEERS) as LinkNumber, reactor, store);
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
        let peer = self.targets.iter().position(|target| target.name == session.peer.subject);
        let link = match peer {
            Some(peer) => self.peering.accepted(now, peer, session.peer.incarnation),
            None => {
                if now >= self.strangers_due_ns {
                    self.strangers_due_ns = now + STRANGERS_NS;
                    let name = &session.peer.subject;
                    tracing::warn!("process {name} connected, of which we were not told: give --peer {name}=HOST:PORT");
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

    // ---- what was decided -------------------------------------------------------------------------------------

    fn act(&mut self, now: u64, reactor: &mut Carrier, store: &mut Store) {
        while let Some(action) = self.peering.action() {
            match action {
                Action::Dial { peer, link } => {
                    if let Err(error) = self.dial(peer, link, reactor) {
                        let address = self.targets[peer].address();
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
                    self.targets[peer].said.clear();
                }
                Action::Down { peer, link, loss } => {
                    let name = &self.targets[peer].name;
                    tracing::info!("peer={name} state=down link={link}: {loss}");
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

    fn dial(&mut self, peer: usize, link: LinkNumber, reactor: &mut Carrier) -> io::Result<()> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
        let target = &mut self.targets[peer];
        target.dials += 1;
        let address = target.address();
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
        socket.flush(reactor, &mut drop).map(drop).map_err(|error| error.with_cause())
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
            Some(Stage::Open(socket) | Stage::Leaving(socket)) => socket.close(reactor, store, &mut drop),
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
                if socket.flush(reactor, &mut drop).is_err() || !socket.wants_write() {
                    self.drop_link(link, reactor, store);
                }
                return;
            }
        };
        if let Err(text) = went_on {
            let text = match self.peering.peer_of(link).map(|peer| &self.targets[peer]) {
                Some(target) if !matches!(self.links.get(&link), Some(Stage::Open(_))) => {
                    format!("{}: {text}", target.address())
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
            expect_process: Some(self.targets[peer].name.clone()),
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
        reactor.adopt(stream, token_of(link), LIMITS, config, terms)
    }

    fn read(&mut self, now: u64, link: LinkNumber, reactor: &mut Carrier, store: &mut Store) -> Result<(), String> {
        for _ in 0..FRAMES_PER_TURN {
            // A frame may have ended it.
            let Some(Stage::Open(socket)) = self.links.get_mut(&link) else { return Ok(()) };
            let _ = socket.flush(reactor, &mut drop).map_err(|error| error.with_cause())?;
            let received_bytes = socket.stats().received_bytes;
            let frame = socket.receive(reactor, &mut self.scratch, store).map_err(|error| error.with_cause())?;
            if socket.stats().received_bytes > received_bytes || frame.is_some() {
                self.peering.arrived(now, link);
            }
            let Some(frame) = frame else { return Ok(()) };
            if let Received::Whole(body) = frame.body {
                store.give_back(body);
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

impl Target {
    /// Where the last dial went.
    fn address(&self) -> SocketAddr {
        self.addresses[self.dials.saturating_sub(1) % self.addresses.len()]
    }
}

impl Stage {
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

fn explain(error: &HelloError) -> String {
    match error {
        HelloError::Unproven => "it does not prove that it has our key; give both the same --key-file".into(),
        HelloError::Refused => "it refuses us; give both the same --key-file".into(),
        error => error.to_string(),
    }
}
