//! Connections from clients: requests in, answers out. Knows frames; knows nothing of workers.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use praas_transport::hello::{Purpose, ResponderConfig, Role};
use praas_transport::reactor::{Interest, Reactor, Socket};
use praas_transport::tcp::{Congestion, Received, Refusal, Scratch, TcpConfig, Terms, on_loopback};
use praas_transport::{Frame, Header, Limits, Moved, Session};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slab::Slab;

use super::body::{Bytes, Landing, Payload, Store};
use super::error::ProcessError;
use super::greeting::{Greeted, Greetings};
use crate::clock::now_ns;
use crate::config::{ConfigError, ProcessConfig};
use crate::controller::{Once, SessionId, Terms as Wishes};
use crate::members::{MembersError, TableError};
use crate::stall::{STALL_NS, Stall};
use crate::wire::{Code, Welcome, frame};

/// Answers that may wait for a client that does not read them; beyond, its requests are not read either.
const UNREAD_MAX: usize = 1024;
/// Requests, and bytes, taken from one connection before the next one's turn.
const FRAMES_PER_TURN: usize = 256;
const BYTES_PER_TURN: u64 = 1 << 20;

/// How long an address that is in use is asked for again.
const BIND_NS: u64 = 500_000_000;
/// Connections that may wait to be accepted: a thousand clients that come at once.
const LISTEN_BACKLOG: i32 = 4096;
/// Whoever's kernel acknowledges nothing for so long, asked again and again, is gone. Found within two looks more: 5 s (N1).
const MUTE: Duration = Duration::from_millis(2500);
/// How often connections are looked at for this, and those that have not said hello for that.
const SWEEP_NS: u64 = 500_000_000;
/// How often the log is told of the same trouble.
const LOG_NS: u64 = 1_000_000_000;

/// What a connection brought.
#[derive(Debug)]
pub(super) enum Event {
    Request {
        connection: u64,
        call: u64,
        function: u16,
        budget_ns: u64,
        terms: Wishes,
        payload: Payload,
    },
    /// There was no room for the payload of a call that may have come before.
    Refused {
        connection: u64,
        call: u64,
        once: Once,
        code: Code,
        text: String,
    },
    Cancel {
        connection: u64,
        call: u64,
    },
    /// The control plane has sent a table of members.
    Members {
        connection: u64,
        call: u64,
        text: Bytes,
    },
    Gone {
        connection: u64,
    },
    /// A payload is with the kernel and can go back to its owner.
    Sent(Bytes),
}

/// Who has said hello.
#[derive(Debug)]
pub(super) enum Came {
    /// A client, its session, and the number that it gave its connection.
    Client { connection: u64, session_id: SessionId, number: u64 },
    /// Another process, which is nobody's client.
    Peer(TcpStream, Session),
}

/// What carries the bytes of all connections.
pub(super) type Carrier = Reactor<Landing, Bytes>;

#[derive(Debug)]
struct Client {
    socket: Socket<Landing, Bytes>,
    /// Its place in the slab below, a count of connections above: found at once, and not taken for a predecessor there.
    id: u64,
    /// Who it is, as its hello proved.
    session: Session,
    /// The peer sends no more once what is there is read.
    closing: bool,
    /// Has requests that were not read because of a bound.
    paused: bool,
    /// In `again`, in `dirty`.
    listed: bool,
    dirty: bool,
    stall: Stall,
    /// Takes none of what waits for it since then, with so many bytes sent at that time.
    deaf: Option<(u64, u64)>,
    /// Bytes sent that are known to have arrived, and whether the last look found its kernel mute.
    arrived_bytes: u64,
    mute: bool,
    /// It took too long; to be closed.
    expired: bool,
    /// A worker reads and writes it.
    lent: bool,
}

#[derive(Debug)]
pub(super) struct Clients {
    listener: TcpListener,
    address: SocketAddr,
    greetings: Greetings,
    open: Slab<Client>,
    scratch: Scratch<Landing>,
    /// To be written; to be looked at again though no event may say so.
    dirty: Vec<usize>,
    again: Vec<usize>,
    accepted: u32,
    connections_max: usize,
    calls_max: usize,
    limits: Limits,
    congestion: Congestion,
    /// Given up for a moment when descriptors run out, to take a connection and close it (X3).
    reserve: Option<std::fs::File>,
    /// Connections wait to be accepted, and no event will say so.
    stuck: bool,
    sweep_ns: u64,
    log_ns: u64,
}

impl Clients {
    /// Takes the first of the addresses that can be had.
    pub(super) fn listen(config: &ProcessConfig, hello: ResponderConfig) -> Result<Clients, ProcessError> {
        config.congestion.check().map_err(ConfigError::from)?;
        let failed = |source| ProcessError::Listen { address: config.listen.clone(), source };
        let mut bound = Err(ErrorKind::AddrNotAvailable.into());
        for address in config.listen_addresses()? {
            bound = bind(address);
            if bound.is_ok() {
                break;
            }
        }
        let listener = bound.map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        // std lets 128 wait to be accepted; the kernel cuts this to net.core.somaxconn. The next one waits a second for its second try.
        rustix::net::listen(&listener, LISTEN_BACKLOG).map_err(|error| failed(error.into()))?;
        let address = listener.local_addr().map_err(failed)?;
        config.congestion.apply(&listener, on_loopback(address)).map_err(failed)?;
        Ok(Clients {
            listener,
            address,
            greetings: Greetings::new(hello, config.unauthenticated_max as usize),
            open: Slab::new(),
            scratch: Scratch::default(),
            dirty: Vec::new(),
            again: Vec::new(),
            accepted: 0,
            connections_max: config.connections_max as usize,
            calls_max: config.connection_calls_max as usize,
            limits: Limits { payload_bytes_max: config.payload_bytes_max },
            congestion: config.congestion,
            reserve: std::fs::File::open("/dev/null").ok(),
            stuck: false,
            sweep_ns: 0,
            log_ns: 0,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The congestion control of the socket that listens, which those that it accepts begin with. Where other hosts are served `auto` gives
    /// connections from this one another.
    pub(super) fn congestion(&self) -> String {
        Congestion::of(&self.listener).unwrap_or_else(|error| {
            tracing::warn!(%error, "the kernel does not say which congestion control is in force");
            "unknown".into()
        })
    }

    /// Lets clients in; until now they waited in the listen queue.
    pub(super) fn admit(&mut self, reactor: &mut Carrier) -> Result<(), ProcessError> {
        let listening = reactor.listen(&self.listener, super::LISTENER);
        listening.map_err(super::system("cannot wait for connections"))
    }

    pub(super) fn accept(&mut self, reactor: &mut Carrier) {
        loop {
            let stream = match reactor.accept(&self.listener, super::LISTENER) {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                // The kernel takes a descriptor before it looks who waits. Asked again when some time has passed.
                Err(_) if !self.somebody_waits() => {
                    self.stuck = true;
                    return;
                }
                Err(error) => {
                    self.complain(|| tracing::warn!(%error, "cannot accept connections; those that come are closed"));
                    // Left alone it would wait for ever: the next edge comes with the next connection.
                    if self.give_up_oldest(reactor) || self.shed() {
                        continue;
                    }
                    self.stuck = true;
                    return;
                }
            };
            if self.open.len() >= self.connections_max {
                let max = self.connections_max;
                self.complain(|| tracing::warn!("{max} connections are open, the most that may; more are closed"));
                continue;
            }
            if self.greetings.is_full() {
                self.give_up_oldest(reactor);
                self.complain(|| tracing::warn!("too many connections wait to say hello; the oldest are closed"));
            }
            let watch = |stream: &TcpStream, number: usize| {
                reactor.watch(stream.as_fd(), super::GREETINGS + number, Interest::Both)
            };
            if let Err(error) = self.greetings.enter(stream, now_ns(), watch) {
                self.complain(|| tracing::warn!(%error, "cannot set up a connection"));
            }
        }
    }

    fn somebody_waits(&self) -> bool {
        let mut listener = [PollFd::new(&self.listener, PollFlags::IN)];
        poll(&mut listener, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    fn give_up_oldest(&mut self, reactor: &mut Carrier) -> bool {
        let Some((number, stream)) = self.greetings.take_oldest() else { return false };
        reactor.unwatch(stream.as_fd(), super::GREETINGS + number);
        true
    }

    /// Goes on with a hello. When it is done the connection becomes a client's, and is welcomed.
    /// Gives who came, unless it is a client without a session.
    pub(super) fn greet(&mut self, number: usize, reactor: &mut Carrier, welcome: &Welcome) -> Option<Came> {
        let (stream, ended) = match self.greetings.advance(number) {
            Greeted::Pending => return None,
            Greeted::Refused(stream, error) => (stream, Err(error)),
            Greeted::Done(stream, session) => (stream, Ok(session)),
        };
        reactor.unwatch(stream.as_fd(), super::GREETINGS + number);
        match ended {
            Err(error) => {
                let peer = stream.peer_addr().ok();
                // Not who it said it was: whoever is refused chooses those words.
                self.complain(|| tracing::warn!(?peer, %error, "a connection was closed before the end of its hello"));
            }
            Ok(session) if session.purpose == Purpose::Peer => return Some(Came::Peer(stream, session)),
            Ok(_) if self.open.len() >= self.connections_max => {
                let max = self.connections_max;
                self.complain(|| tracing::warn!("{max} connections are open, the most that may; more are closed"));
            }
            Ok(session) => {
                let (session_id, number) = (session.peer.session(), session.peer.incarnation);
                match self.enter(stream, session, reactor, welcome) {
                    Ok(connection) => return (number > 0).then_some(Came::Client { connection, session_id, number }),
                    Err(error) => self.complain(|| tracing::warn!(%error, "cannot set up a connection")),
                }
            }
        }
        None
    }

    /// Takes one connection with the reserved descriptor and closes it.
    fn shed(&mut self) -> bool {
        if self.reserve.take().is_none() {
            return false;
        }
        let taken = self.listener.accept().is_ok();
        self.reserve = std::fs::File::open("/dev/null").ok();
        taken
    }

    fn complain(&mut self, log: impl FnOnce()) {
        let now = now_ns();
        if now >= self.log_ns {
            self.log_ns = now + LOG_NS;
            log();
        }
    }

    fn enter(
        &mut self,
        stream: TcpStream,
        session: Session,
        reactor: &mut Carrier,
        welcome: &Welcome,
    ) -> io::Result<u64> {
        // Room for every answer it is owed: their memory is taken already. Whoever leaves too much unread is not read
        // either, and is closed when it stays so (`look_at_the_clock`).
        let config = TcpConfig {
            backlog_frames_max: self.calls_max + 2 * FRAMES_PER_TURN + UNREAD_MAX,
            backlog_bytes_max: u64::MAX,
            read_bytes_per_call_max: BYTES_PER_TURN,
            congestion: self.congestion,
            ..TcpConfig::default()
        };
        let entry = self.open.vacant_entry();
        let index = entry.key();
        let terms = Terms::of(&session, welcome.incarnation);
        crate::client::link::keep_alive(&stream)?;
        let mut socket = reactor.adopt(stream, super::CLIENTS + index, self.limits, config, terms)?;
        self.accepted = self.accepted.wrapping_add(1);
        let id = (u64::from(self.accepted) << 32) | index as u64;
        let body = serde_json::to_string(welcome).expect("our own messages are serialisable");
        let header = Header { kind: frame::WELCOME, aux: u64::from(session.version), ..Header::default() };
        // If it breaks, the event that says so comes.
        let _ = socket.queue(&header, &[], Bytes::Text(body));
        tracing::debug!(connection = id, role = %session.peer.role, subject = session.peer.subject, "connected");
        self.dirty.push(index);
        entry.insert(Client {
            socket,
            id,
            session,
            closing: false,
            paused: false,
            listed: false,
            dirty: true,
            stall: Stall::default(),
            deaf: None,
            arrived_bytes: 0,
            mute: false,
            expired: false,
            lent: false,
        });
        Ok(id)
    }

    /// The peer has closed its side.
    pub(super) fn closing(&mut self, index: usize) {
        if let Some(client) = self.open.get_mut(index) {
            client.closing = true;
        }
    }

    /// Closes a connection at the next look at all of them.
    pub(super) fn close(&mut self, connection: u64) {
        let index = index(connection);
        if let Some(client) = self.open.get_mut(index).filter(|client| client.id == connection) {
            client.expired = true;
            client.list(index, &mut self.again);
        }
    }

    /// Takes a connection out of our hands, if nothing is under way on it: what another holder needs to go on with it, and its socket.
    pub(super) fn lend(&mut self, connection: u64, reactor: &mut Carrier) -> Option<(Terms, io::Result<OwnedFd>)> {
        let index = index(connection);
        let client = self.open.get_mut(index).filter(|client| client.id == connection)?;
        if client.closing || client.paused || client.listed || client.expired || client.lent {
            return None;
        }
        let terms = client.socket.lend(reactor)?;
        client.lent = true;
        client.stall.clear();
        Some((terms, client.socket.fd(reactor).try_clone_to_owned()))
    }

    /// A connection is ours again, from these frames on. False when it cannot be used any more.
    pub(super) fn take_up(&mut self, connection: u64, reactor: &mut Carrier, received: u64, sent: u64) -> bool {
        let index = index(connection);
        let Some(client) = self.open.get_mut(index).filter(|client| client.id == connection) else { return true };
        if !std::mem::take(&mut client.lent) {
            return true;
        }
        // What waited for this goes out with the next flush.
        if !std::mem::replace(&mut client.dirty, true) {
            self.dirty.push(index);
        }
        client.socket.resume(reactor, super::CLIENTS + index, received, sent).is_ok()
    }

    /// The socket of a connection, when its client is on this host.
    pub(super) fn local_fd<'a>(&'a self, index: usize, reactor: &'a Carrier) -> Option<BorrowedFd<'a>> {
        let client = self.open.get(index).filter(|client| on_loopback(client.socket.peer_addr()))?;
        Some(client.socket.fd(reactor))
    }

    /// A long payload is on its way.
    pub(super) fn in_pieces(&self, index: usize) -> bool {
        self.open.get(index).is_some_and(|client| client.socket.in_pieces())
    }

    /// From now on only [`Clients::serve`] finds what comes next from this place: no event need tell of it.
    pub(super) fn heat(&mut self, index: usize, reactor: &mut Carrier) {
        if let Some(client) = self.open.get_mut(index) {
            client.socket.heat(reactor);
        }
    }

    /// Events tell of this place again.
    pub(super) fn cool(&mut self, index: usize, reactor: &mut Carrier) {
        if let Some(client) = self.open.get_mut(index) {
            client.socket.cool(reactor);
        }
    }

    /// How far a connection was moved by whoever held it.
    pub(super) fn moved(&self, connection: u64, reactor: &Carrier) -> Option<Moved> {
        let client = self.open.get(index(connection)).filter(|client| client.id == connection)?;
        client.socket.moved(reactor).ok()
    }

    /// A frame of a connection that a worker has.
    pub(super) fn take_forwarded(
        &mut self,
        connection: u64,
        frame: Frame<Landing>,
        store: &mut Store,
        welcome: &Welcome,
        events: &mut Vec<Event>,
    ) {
        let Some(client) = self.open.get_mut(index(connection)).filter(|client| client.id == connection) else {
            return;
        };
        if let Err(text) = client.take(frame, store, welcome, events) {
            let peer = &*client.session.peer.subject;
            tracing::warn!(connection, peer, text, "connection closed");
            self.close(connection);
        }
    }

    /// Reads what a connection has, writes what it can take. Whether something had come, or a body has left.
    pub(super) fn serve(
        &mut self,
        index: usize,
        readable: bool,
        reactor: &mut Carrier,
        store: &mut Store,
        welcome: &Welcome,
        events: &mut Vec<Event>,
    ) -> bool {
        let Some(client) = self.open.get_mut(index) else { return false };
        if client.lent && !client.expired {
            return false;
        }
        let before_bytes = client.socket.stats().received_bytes;
        let mut alive =
            !client.expired && client.socket.flush(reactor, &mut |bytes| events.push(Event::Sent(bytes))).is_ok();
        if alive && (readable || client.paused) {
            alive = client.read(reactor, &mut self.scratch, store, welcome, events);
        }
        if client.paused {
            client.list(index, &mut self.again);
        }
        if !client.dirty && client.socket.wants_write() {
            client.dirty = true;
            self.dirty.push(index);
        }
        let came = client.socket.stats().received_bytes > before_bytes;
        if !alive {
            let id = client.id;
            self.leave(index, reactor, store, &mut |bytes| events.push(Event::Sent(bytes)));
            events.push(Event::Gone { connection: id });
        }
        came || !events.is_empty()
    }

    fn leave(&mut self, index: usize, reactor: &mut Carrier, store: &mut Store, done: &mut dyn FnMut(Bytes)) {
        let client = self.open.remove(index);
        if client.lent {
            // Whoever has it finds the end of the stream.
            client.socket.shut_down(reactor);
        }
        client.socket.close(reactor, store, done);
    }

    /// Queues an answer. Gives the payload back when nobody is there to take it.
    pub(super) fn answer(
        &mut self,
        connection: u64,
        call: u64,
        code: Code,
        status: i32,
        payload: Payload,
    ) -> Option<Bytes> {
        let index = index(connection);
        let Some(client) = self.open.get_mut(index).filter(|client| client.id == connection) else {
            return Some(payload.bytes);
        };
        let aux = u64::from(payload.is_args);
        let header = Header { kind: frame::REPLY, flags: code as u16, status, call, aux, ..Header::default() };
        let unsent = client.socket.queue(&header, &[], payload.bytes).err().map(|error| {
            // Cannot be: there is room for all it may ask for. Better no connection than one that misses an answer.
            tracing::warn!(connection, "closed: a client does not read its answers");
            client.expired = true;
            client.list(index, &mut self.again);
            error.into_body()
        });
        if !client.dirty {
            client.dirty = true;
            self.dirty.push(index);
        }
        unsent
    }

    /// Says what became of a table of members, to who sent it.
    pub(super) fn answer_members(&mut self, connection: u64, call: u64, taken: &Result<u64, MembersError>) {
        let index = index(connection);
        let Some(client) = self.open.get_mut(index).filter(|client| client.id == connection) else { return };
        client.answer_members(call, taken);
        if !std::mem::replace(&mut client.dirty, true) {
            self.dirty.push(index);
        }
    }

    /// Writes queued answers, and goes on reading where that had to wait. Returns connections that broke.
    pub(super) fn flush(&mut self, reactor: &mut Carrier, store: &mut Store, sent: &mut Vec<Bytes>) -> Vec<u64> {
        let mut gone = Vec::new();
        // Kept, and emptied below: taking it would allocate anew at every answer.
        for at in 0..self.dirty.len() {
            let index = self.dirty[at];
            let Some(client) = self.open.get_mut(index) else { continue };
            client.dirty = false;
            if client.socket.flush(reactor, &mut |bytes| sent.push(bytes)).is_err() {
                gone.push(client.id);
                self.leave(index, reactor, store, &mut |bytes| sent.push(bytes));
            }
        }
        self.dirty.clear();
        gone
    }

    /// Whether a connection has requests that were not read yet.
    pub(super) fn unfinished(&self) -> bool {
        let max = self.limits.payload_bytes_max;
        self.again.iter().any(|index| self.open.get(*index).is_some_and(|client| client.is_ready(max)))
    }

    /// Whether answers wait to be written.
    pub(super) fn unsent(&self) -> bool {
        self.open.iter().any(|(_, client)| client.socket.wants_write())
    }

    /// Connections to look at though no event says so: to go on reading, or to close.
    pub(super) fn paused(&mut self, now: u64, reactor: &mut Carrier, store: &mut Store) -> Vec<usize> {
        let max = self.limits.payload_bytes_max;
        if now >= self.sweep_ns {
            self.sweep_ns = now + SWEEP_NS;
            if std::mem::take(&mut self.stuck) {
                self.accept(reactor);
            }
            let memory_is_short = std::mem::take(&mut store.was_short);
            while let Some((number, stream)) = self.greetings.take_late(now) {
                reactor.unwatch(stream.as_fd(), super::GREETINGS + number);
                self.complain(|| tracing::info!("connections that did not say hello in time are closed"));
            }
            for (index, client) in &mut self.open {
                client.look_at_the_clock(now, max, memory_is_short);
                let may_be_mute =
                    client.socket.stats().sent_bytes > client.arrived_bytes || client.socket.wants_write();
                if may_be_mute || client.lent {
                    client.look_for_its_host(reactor);
                }
                if client.expired {
                    client.list(index, &mut self.again);
                }
            }
        }
        let mut ready = Vec::new();
        self.again.retain(|&index| {
            let Some(client) = self.open.get_mut(index) else { return false };
            let is_ready = client.is_ready(max);
            if is_ready {
                ready.push(index);
            }
            // Whoever stays full stays listed.
            client.listed = client.paused && !is_ready;
            client.listed
        });
        ready
    }

    /// The last flush before the end.
    pub(super) fn goodbye(&mut self, reactor: &mut Carrier) {
        for (_, client) in &mut self.open {
            let _ = client.socket.flush(reactor, &mut drop);
        }
        let _ = reactor.wait(&mut Vec::new(), Some(std::time::Duration::ZERO));
    }
}

/// The place of a connection.
pub(super) fn index(connection: u64) -> usize {
    (connection & 0xffff_ffff) as usize
}

/// A process that was killed a moment ago may still have its address: the kernel takes a ring apart after its owner is gone.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let until_ns = now_ns() + BIND_NS;
    loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && address.port() != 0 && now_ns() < until_ns => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            bound => return bound,
        }
    }
}

impl Client {
    /// Has it looked at again, though no event may say so.
    fn list(&mut self, index: usize, again: &mut Vec<usize>) {
        if !std::mem::replace(&mut self.listed, true) {
            again.push(index);
        }
    }

    /// Whether it has so much unread that its requests have to wait: a thousand answers, or two of the largest.
    fn is_full(&self, payload_bytes_max: u64) -> bool {
        let (frames, bytes) = self.socket.backlog();
        frames >= UNREAD_MAX || bytes > 2 * payload_bytes_max
    }

    /// Whether there is something to do with it that no event tells of.
    fn is_ready(&self, payload_bytes_max: u64) -> bool {
        self.expired || self.paused && !self.is_full(payload_bytes_max)
    }

    /// Finds out whether it takes too long: over a frame that we are ready to read, or to read at all.
    fn look_at_the_clock(&mut self, now: u64, payload_bytes_max: u64, memory_is_short: bool) {
        if self.lent {
            return;
        }
        if self.socket.wants_write() {
            let sent = self.socket.stats().sent_bytes;
            let (since, sent_then) = *self.deaf.get_or_insert((now, sent));
            if sent > sent_then {
                self.deaf = Some((now, sent));
            } else if now > since + STALL_NS && (memory_is_short || self.is_full(payload_bytes_max)) {
                // Little may wait for as long as it likes, while nobody else needs the memory.
                tracing::info!(connection = self.id, "closed: it does not read its answers");
                self.expired = true;
            }
        } else {
            self.deaf = None;
        }
        if !self.socket.mid_frame() || self.paused {
            self.stall.clear();
        } else if self.stall.is_over(now, self.socket.in_pieces(), &self.socket.stats()) {
            tracing::info!(connection = self.id, "closed: it stalls in the middle of a frame");
            self.expired = true;
        }
    }

    /// Finds out whether its host is still there. One that lives and does not read acknowledges that it has no room; for it there
    /// are other bounds. While nothing is under way, keep-alive does this.
    fn look_for_its_host(&mut self, reactor: &Carrier) {
        // What cannot be found out is not held against it.
        let Ok(acknowledged) = self.socket.acknowledged(reactor) else { return };
        if acknowledged.all && !self.socket.wants_write() {
            self.arrived_bytes = self.socket.stats().sent_bytes;
        }
        // Twice in a row: one question may be under way just now.
        let was_mute = std::mem::replace(&mut self.mute, acknowledged.unanswered && acknowledged.last >= MUTE);
        if was_mute && self.mute {
            tracing::info!(connection = self.id, "closed: its host does not answer any more");
            self.expired = true;
        }
    }

    /// False when the connection is of no more use.
    fn read(
        &mut self,
        reactor: &mut Carrier,
        scratch: &mut Scratch<Landing>,
        store: &mut Store,
        welcome: &Welcome,
        events: &mut Vec<Event>,
    ) -> bool {
        self.paused = false;
        let until_bytes = self.socket.stats().received_bytes + BYTES_PER_TURN;
        for _ in 0..FRAMES_PER_TURN {
            if self.socket.stats().received_bytes >= until_bytes {
                break;
            }
            if self.is_full(welcome.payload_bytes_max) {
                self.paused = true;
                return true;
            }
            match self.socket.receive(reactor, scratch, store) {
                Ok(None) => {
                    self.paused = self.socket.unfinished();
                    return true;
                }
                Ok(Some(frame)) => {
                    if let Err(text) = self.take(frame, store, welcome, events) {
                        let peer = &*self.session.peer.subject;
                        tracing::warn!(connection = self.id, peer, text, "connection closed");
                        return false;
                    }
                    // A short read emptied the socket, and what comes later is an event of its own; only a close that
                    // came with the bytes has to be read to be seen.
                    if self.socket.drained() && !self.closing {
                        return true;
                    }
                }
                Err(error) => {
                    if !matches!(error, praas_transport::tcp::ConnectionError::Closed { mid_frame: false }) {
                        tracing::info!(connection = self.id, error = error.with_cause(), "connection lost");
                    }
                    return false;
                }
            }
        }
        self.paused = true;
        true
    }

    /// Says what became of a table of members: its generation is in force, or why it is not.
    fn answer_members(&mut self, call: u64, taken: &Result<u64, MembersError>) {
        let (flags, aux, text) = match taken {
            Ok(generation) => (0, *generation, String::new()),
            Err(error) => (1, 0, serde_json::to_string(error).expect("our own messages are serialisable")),
        };
        let header = Header { kind: frame::MEMBERS_TAKEN, flags, aux, call, ..Header::default() };
        // If it breaks, the event that says so comes.
        let _ = self.socket.queue(&header, &[], Bytes::Text(text));
    }

    fn take(
        &mut self,
        frame: Frame<Landing>,
        store: &mut Store,
        welcome: &Welcome,
        events: &mut Vec<Event>,
    ) -> Result<(), &'static str> {
        use praas_transport::Bodies;
        let Frame { header, body, .. } = frame;
        let connection = self.id;
        match (header.kind, body) {
            (frame::REQUEST, Received::Whole(body)) => {
                let is_args = header.flags & frame::FLAG_ARGS != 0;
                let terms = wishes(&header);
                events.push(Event::Request {
                    connection,
                    call: header.call,
                    function: header.function,
                    budget_ns: header.budget_ns,
                    terms,
                    payload: Payload { bytes: body.into(), is_args, keeps: false },
                });
                Ok(())
            }
            (frame::REQUEST, Received::Refused { bytes, why }) => {
                let (code, text) = match why {
                    Refusal::TooLarge => {
                        let max = welcome.payload_bytes_max;
                        (Code::TooLarge, format!("{bytes} bytes of input, the process allows {max}"))
                    }
                    Refusal::NoSpace => {
                        store.was_short = true;
                        let text = format!("{bytes} bytes of input do not fit the controller's free payload memory");
                        (Code::NoSpace, text)
                    }
                };
                if let Some(once) = wishes(&header).once {
                    events.push(Event::Refused { connection, call: header.call, once, code, text });
                    return Ok(());
                }
                let header = Header { kind: frame::REPLY, flags: code as u16, call: header.call, ..Header::default() };
                let _ = self.socket.queue(&header, &[], Bytes::Text(text));
                Ok(())
            }
            (frame::CANCEL, body) => {
                if let Received::Whole(body) = body {
                    store.give_back(body);
                }
                events.push(Event::Cancel { connection, call: header.call });
                Ok(())
            }
            (frame::MEMBERS, body) => {
                let role = self.session.peer.role;
                let refused = match body {
                    Received::Whole(body) if role == Role::Control => {
                        events.push(Event::Members { connection, call: header.call, text: body.into() });
                        return Ok(());
                    }
                    Received::Whole(body) => {
                        store.give_back(body);
                        MembersError::Role { role: role.to_string() }
                    }
                    Received::Refused { .. } if role != Role::Control => MembersError::Role { role: role.to_string() },
                    Received::Refused { bytes, why: Refusal::TooLarge } => {
                        TableError::TooLong { found_bytes: bytes, max_bytes: welcome.payload_bytes_max }.into()
                    }
                    Received::Refused { bytes, why: Refusal::NoSpace } => {
                        store.was_short = true;
                        MembersError::NoSpace { needs_bytes: bytes }
                    }
                };
                self.answer_members(header.call, &Err(refused));
                Ok(())
            }
            (frame::PING, body) => {
                if let Received::Whole(body) = body {
                    store.give_back(body);
                }
                let header = Header { kind: frame::PONG, ..Header::default() };
                let _ = self.socket.queue(&header, &[], Bytes::Text(String::new()));
                Ok(())
            }
            (_, body) => {
                if let Received::Whole(body) = body {
                    store.give_back(body);
                }
                Err("a frame of unknown kind")
            }
        }
    }
}

/// What a request asks for by its flags.
fn wishes(header: &Header) -> Wishes {
    let has = |flag| header.flags & flag != 0;
    let once = Once { known_below: header.aux, again: has(frame::FLAG_AGAIN) };
    Wishes {
        idempotent: has(frame::FLAG_IDEMPOTENT),
        fire: has(frame::FLAG_FIRE),
        once: has(frame::FLAG_ONCE).then_some(once),
    }
}
