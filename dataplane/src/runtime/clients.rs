//! Connections from clients: hello, requests in, answers out. Knows frames; knows nothing of workers.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use mio::net::TcpListener;
use mio::{Interest, Registry, Token};
use praas_transport::tcp::{Connection, Received, Refusal, TcpConfig};
use praas_transport::{Frame, Header, Limits};
use slab::Slab;

use super::body::{Bytes, Landing, Payload, Store};
use super::error::ProcessError;
use crate::clock::now_ns;
use crate::config::ProcessConfig;
use crate::controller::{Once, SessionId, Terms};
use crate::wire::{Code, PROTOCOL_VERSION, Welcome, frame};

/// Answers that may wait for a client that does not read them; beyond, its requests are not read either.
const UNREAD_MAX: usize = 1024;
/// Requests taken from one connection before the next one's turn.
const FRAMES_PER_TURN: usize = 256;

/// How long a connection may take to say hello.
const HELLO_NS: u64 = 2_000_000_000;
/// Whoever is in the middle of a frame sends at least so much in this time, or holds memory for nothing (N2).
const STALL_NS: u64 = 2_000_000_000;
const STALL_BYTES: u64 = 128 << 10;
/// Whoever's kernel acknowledges nothing for so long, asked again and again, is gone. Found within two looks more: 5 s (N1).
const MUTE: Duration = Duration::from_millis(2500);
/// How often connections are looked at for those.
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
        terms: Terms,
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
    /// Says whose it is.
    Greeted {
        connection: u64,
        session: SessionId,
        number: u64,
    },
    Cancel {
        connection: u64,
        call: u64,
    },
    Gone {
        connection: u64,
    },
    /// A payload is with the kernel and can go back to its owner.
    Sent(Bytes),
}

#[derive(Debug)]
struct Client {
    connection: Connection<Landing, Bytes>,
    /// Its place in the slab below, a count of connections above: found at once, and not taken for a predecessor there.
    id: u64,
    greeted: bool,
    /// The peer sends no more once what is there is read.
    closing: bool,
    /// Has requests that were not read because of a bound.
    paused: bool,
    dirty: bool,
    accepted_ns: u64,
    /// In the middle of a frame since then, with so many frames and bytes received at that time.
    mid_frame: Option<(u64, u64, u64)>,
    /// Has more unread than it should since then, with so many bytes sent at that time.
    deaf: Option<(u64, u64)>,
    /// Bytes sent that are known to have arrived, and whether the last look found its kernel mute.
    arrived_bytes: u64,
    mute: bool,
    /// It took too long; to be closed.
    expired: bool,
}

#[derive(Debug)]
pub(super) struct Clients {
    listener: TcpListener,
    address: SocketAddr,
    open: Slab<Client>,
    dirty: Vec<usize>,
    accepted: u32,
    connections_max: usize,
    calls_max: usize,
    limits: Limits,
    /// Given up for a moment when descriptors run out, to take a connection and close it (X3).
    reserve: Option<std::fs::File>,
    sweep_ns: u64,
    log_ns: u64,
}

impl Clients {
    pub(super) fn listen(config: &ProcessConfig, _registry: &Registry) -> Result<Clients, ProcessError> {
        let failed = |source| ProcessError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Clients {
            listener,
            address,
            open: Slab::new(),
            dirty: Vec::new(),
            accepted: 0,
            connections_max: config.connections_max as usize,
            calls_max: config.connection_calls_max as usize,
            limits: Limits { payload_bytes_max: config.payload_bytes_max },
            reserve: std::fs::File::open("/dev/null").ok(),
            sweep_ns: 0,
            log_ns: 0,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets clients in; until now they waited in the listen queue.
    pub(super) fn admit(&mut self, registry: &Registry) -> Result<(), ProcessError> {
        let registered = registry.register(&mut self.listener, super::LISTENER, Interest::READABLE);
        registered.map_err(super::system("cannot poll the listener"))
    }

    pub(super) fn accept(&mut self, registry: &Registry, base: usize) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    self.complain(|| tracing::warn!(%error, "cannot accept connections; those that come are closed"));
                    // Left alone it would wait for ever: the next edge comes with the next connection.
                    if self.shed() {
                        continue;
                    }
                    return;
                }
            };
            if self.open.len() >= self.connections_max {
                let max = self.connections_max;
                self.complain(|| tracing::warn!("{max} connections are open, the most that may; more are closed"));
                continue;
            }
            if let Err(error) = self.enter(stream, registry, base) {
                tracing::warn!(%error, "cannot set up a connection");
            }
        }
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

    fn enter(&mut self, stream: mio::net::TcpStream, registry: &Registry, base: usize) -> io::Result<()> {
        // Room for every answer it is owed: their memory is taken already. Whoever leaves too much unread is not read
        // either, and is closed when it stays so (`look_at_the_clock`).
        let config = TcpConfig {
            backlog_frames_max: self.calls_max + 2 * FRAMES_PER_TURN + UNREAD_MAX,
            backlog_bytes_max: u64::MAX,
            ..TcpConfig::default()
        };
        crate::client::link::keep_alive(&stream)?;
        let mut connection = Connection::new(stream, self.limits, config)?;
        let entry = self.open.vacant_entry();
        let token = Token(base + entry.key());
        registry.register(connection.source(), token, Interest::READABLE | Interest::WRITABLE)?;
        self.accepted = self.accepted.wrapping_add(1);
        let id = (u64::from(self.accepted) << 32) | entry.key() as u64;
        entry.insert(Client {
            connection,
            id,
            greeted: false,
            closing: false,
            paused: false,
            dirty: false,
            accepted_ns: now_ns(),
            mid_frame: None,
            deaf: None,
            arrived_bytes: 0,
            mute: false,
            expired: false,
        });
        Ok(())
    }

    /// The peer has closed its side.
    pub(super) fn closing(&mut self, index: usize) {
        if let Some(client) = self.open.get_mut(index) {
            client.closing = true;
        }
    }

    /// Closes a connection at the next look at all of them.
    pub(super) fn close(&mut self, connection: u64) {
        let index = (connection & 0xffff_ffff) as usize;
        if let Some(client) = self.open.get_mut(index).filter(|client| client.id == connection) {
            client.expired = true;
        }
    }

    /// Reads what a connection has, writes what it can take.
    pub(super) fn serve(
        &mut self,
        index: usize,
        readable: bool,
        store: &mut Store,
        welcome: &Welcome,
        events: &mut Vec<Event>,
    ) {
        let Some(client) = self.open.get_mut(index) else { return };
        let mut alive =
            !client.expired && client.connection.flush(&mut |bytes| events.push(Event::Sent(bytes))).is_ok();
        if alive && (readable || client.paused) {
            alive = client.read(store, welcome, events);
        }
        if !client.dirty && client.connection.wants_write() {
            client.dirty = true;
            self.dirty.push(index);
        }
        if !alive {
            let id = client.id;
            self.leave(index, store, &mut |bytes| events.push(Event::Sent(bytes)));
            events.push(Event::Gone { connection: id });
        }
    }

    fn leave(&mut self, index: usize, store: &mut Store, done: &mut dyn FnMut(Bytes)) {
        let mut client = self.open.remove(index);
        client.connection.abandon(store, done);
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
        let index = (connection & 0xffff_ffff) as usize;
        let Some(client) = self.open.get_mut(index).filter(|client| client.id == connection) else {
            return Some(payload.bytes);
        };
        let aux = u64::from(payload.is_args);
        let header = Header { kind: frame::REPLY, flags: code as u16, status, call, aux, ..Header::default() };
        let unsent = client.connection.queue(&header, &[], payload.bytes).err().map(|error| {
            // Cannot be: there is room for all it may ask for. Better no connection than one that misses an answer.
            tracing::warn!(connection, "closed: a client does not read its answers");
            client.expired = true;
            error.into_body()
        });
        if !client.dirty {
            client.dirty = true;
            self.dirty.push(index);
        }
        unsent
    }

    /// Writes queued answers, and goes on reading where that had to wait. Returns connections that broke.
    pub(super) fn flush(&mut self, store: &mut Store, sent: &mut Vec<Bytes>) -> Vec<u64> {
        let mut gone = Vec::new();
        // Kept, and emptied below: taking it would allocate anew at every answer.
        for at in 0..self.dirty.len() {
            let index = self.dirty[at];
            let Some(client) = self.open.get_mut(index) else { continue };
            client.dirty = false;
            if client.connection.flush(&mut |bytes| sent.push(bytes)).is_err() {
                gone.push(client.id);
                self.leave(index, store, &mut |bytes| sent.push(bytes));
            }
        }
        self.dirty.clear();
        gone
    }

    /// Whether a connection has requests that were not read yet.
    pub(super) fn unfinished(&self) -> bool {
        let max = self.limits.payload_bytes_max;
        self.open.iter().any(|(_, client)| client.paused && !client.is_full(max))
    }

    /// Whether answers wait to be written.
    pub(super) fn unsent(&self) -> bool {
        self.open.iter().any(|(_, client)| client.connection.wants_write())
    }

    /// Connections to look at though no event says so: to go on reading, or to close.
    pub(super) fn paused(&mut self, now: u64) -> Vec<usize> {
        let max = self.limits.payload_bytes_max;
        if now >= self.sweep_ns {
            self.sweep_ns = now + SWEEP_NS;
            for (_, client) in &mut self.open {
                client.look_at_the_clock(now, max);
            }
        }
        let ready = |client: &Client| client.expired || client.paused && !client.is_full(max);
        self.open.iter().filter(|(_, client)| ready(client)).map(|(index, _)| index).collect()
    }

    /// The last flush before the end.
    pub(super) fn goodbye(&mut self) {
        for (_, client) in &mut self.open {
            let _ = client.connection.flush(&mut drop);
        }
    }
}

impl Client {
    /// Whether it has so much unread that its requests have to wait: a thousand answers, or two of the largest.
    fn is_full(&self, payload_bytes_max: u64) -> bool {
        let (frames, bytes) = self.connection.backlog();
        frames >= UNREAD_MAX || bytes > 2 * payload_bytes_max
    }

    /// Finds out whether it takes too long: to say hello, over a frame that we are ready to read, or to read at all.
    fn look_at_the_clock(&mut self, now: u64, payload_bytes_max: u64) {
        if self.is_full(payload_bytes_max) {
            let sent = self.connection.stats().sent_bytes;
            let (since, sent_then) = *self.deaf.get_or_insert((now, sent));
            if sent > sent_then {
                self.deaf = Some((now, sent));
            } else if now > since + STALL_NS {
                tracing::info!(connection = self.id, "closed: it does not read its answers");
                self.expired = true;
            }
        } else {
            self.deaf = None;
        }
        if self.connection.stats().sent_bytes > self.arrived_bytes {
            self.look_for_its_host();
        }
        if !self.greeted {
            self.expired = now > self.accepted_ns + HELLO_NS;
            return;
        }
        if !self.connection.mid_frame() || self.paused {
            self.mid_frame = None;
            return;
        }
        let stats = self.connection.stats();
        let (frames, bytes) = (stats.received_frames, stats.received_bytes);
        let (since, frames_then, bytes_then) = *self.mid_frame.get_or_insert((now, frames, bytes));
        if frames > frames_then || bytes >= bytes_then + STALL_BYTES {
            self.mid_frame = Some((now, frames, bytes));
        } else if now > since + STALL_NS {
            tracing::info!(connection = self.id, "closed: it stalls in the middle of a frame");
            self.expired = true;
        }
    }

    /// Finds out whether its host is still there. One that lives and does not read acknowledges that it has no room; for it there
    /// are other bounds. While nothing is under way, keep-alive does this.
    fn look_for_its_host(&mut self) {
        // What cannot be found out is not held against it.
        let Ok(acknowledged) = self.connection.acknowledged() else { return };
        if acknowledged.all && !self.connection.wants_write() {
            self.arrived_bytes = self.connection.stats().sent_bytes;
        }
        // Twice in a row: one question may be under way just now.
        let was_mute = std::mem::replace(&mut self.mute, acknowledged.unanswered && acknowledged.last >= MUTE);
        if was_mute && self.mute {
            tracing::info!(connection = self.id, "closed: its host does not answer any more");
            self.expired = true;
        }
    }

    /// False when the connection is of no more use.
    fn read(&mut self, store: &mut Store, welcome: &Welcome, events: &mut Vec<Event>) -> bool {
        self.paused = false;
        for _ in 0..FRAMES_PER_TURN {
            if self.is_full(welcome.payload_bytes_max) {
                self.paused = true;
                return true;
            }
            match self.connection.receive(store) {
                Ok(None) => {
                    self.paused = self.connection.unfinished();
                    return true;
                }
                Ok(Some(frame)) => {
                    if let Err(text) = self.take(frame, store, welcome, events) {
                        tracing::warn!(connection = self.id, text, "connection closed");
                        return false;
                    }
                    // A short read emptied the socket, and what comes later is an event of its own; only a close that
                    // came with the bytes has to be read to be seen.
                    if self.connection.drained() && !self.closing {
                        return true;
                    }
                }
                Err(error) => {
                    if !matches!(error, praas_transport::tcp::ConnectionError::Closed { mid_frame: false }) {
                        tracing::info!(connection = self.id, %error, "connection lost");
                    }
                    return false;
                }
            }
        }
        self.paused = true;
        true
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
        if !self.greeted {
            let session = match &body {
                Received::Whole(body) if header.kind == frame::HELLO => SessionId::try_from(body.as_ref()).ok(),
                _ => None,
            };
            if let Received::Whole(body) = body {
                store.give_back(body);
            }
            if header.kind != frame::HELLO || header.payload_bytes != 0 && session.is_none() {
                return Err("the first frame is not a hello");
            }
            if let Some(session) = session {
                events.push(Event::Greeted { connection, session, number: header.incarnation });
            }
            self.greeted = true;
            let body = serde_json::to_string(welcome).expect("our own messages are serialisable");
            let header = Header { kind: frame::WELCOME, aux: u64::from(PROTOCOL_VERSION), ..Header::default() };
            let _ = self.connection.send(&header, &[], Bytes::Text(body));
            // A client of another version reads our version in the welcome, and the connection ends here.
            return if header_version(&frame.header) == PROTOCOL_VERSION {
                Ok(())
            } else {
                Err("another version of the protocol")
            };
        }
        match (header.kind, body) {
            (frame::REQUEST, Received::Whole(body)) => {
                let is_args = header.flags & frame::FLAG_ARGS != 0;
                events.push(Event::Request {
                    connection,
                    call: header.call,
                    function: header.function,
                    budget_ns: header.budget_ns,
                    terms: terms(&header),
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
                    Refusal::NoSpace => (
                        Code::NoSpace,
                        format!("{bytes} bytes of input do not fit the controller's free payload memory"),
                    ),
                };
                if let Some(once) = terms(&header).once {
                    events.push(Event::Refused { connection, call: header.call, once, code, text });
                    return Ok(());
                }
                let header = Header { kind: frame::REPLY, flags: code as u16, call: header.call, ..Header::default() };
                let _ = self.connection.send(&header, &[], Bytes::Text(text));
                Ok(())
            }
            (frame::CANCEL, body) => {
                if let Received::Whole(body) = body {
                    store.give_back(body);
                }
                events.push(Event::Cancel { connection, call: header.call });
                Ok(())
            }
            (frame::PING, body) => {
                if let Received::Whole(body) = body {
                    store.give_back(body);
                }
                let header = Header { kind: frame::PONG, ..Header::default() };
                let _ = self.connection.send(&header, &[], Bytes::Text(String::new()));
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
fn terms(header: &Header) -> Terms {
    let has = |flag| header.flags & flag != 0;
    let once = Once { known_below: header.aux, again: has(frame::FLAG_AGAIN) };
    Terms {
        idempotent: has(frame::FLAG_IDEMPOTENT),
        fire: has(frame::FLAG_FIRE),
        once: has(frame::FLAG_ONCE).then_some(once),
    }
}

fn header_version(header: &Header) -> u32 {
    u32::try_from(header.aux).unwrap_or(u32::MAX)
}
