//! The connection to the process, and the next one when it is lost: connecting, greeting, pausing. Never blocks.
//!
//! ```text
//! Down ──begin──► Connecting ──► Hello ──► Welcome ──► Up
//!  ▲                  │            │          │         │
//!  └──── pause ───────┴────────────┴──────────┴── lost ─┘
//! ```

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use praas_transport::Limits;
use praas_transport::hello::{HelloError, Initiator, InitiatorConfig, Purpose, Session};
use praas_transport::tcp::{
    Connection, ConnectionError, Received, Scratch, TcpConfig, Terms, is_connected, on_loopback,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::alarm::Alarm;
use super::delivery::BackOff;
use super::payload::{OutgoingBytes, Pool};
use super::{Attempts, ClientConfig, ConnectError};
use crate::clock::unix_s;
use crate::config::{Checks, WaitMode};
use crate::wire::{VERSIONS, Welcome, frame};

pub(super) type Socket = Connection<Vec<u8>, OutgoingBytes>;

/// Bytes that may wait for the socket.
pub(super) const BACKLOG_BYTES_MAX: u64 = 1 << 30;
/// Longest wait inside one read of the socket, in `efficient` mode. Calls that end sooner sleep in `poll`, which can be told.
pub(super) const READ_NS: u64 = 100_000_000;

#[derive(Debug)]
pub(super) enum Phase {
    Up(Socket),
    Connecting { stream: mio::net::TcpStream, until_ns: u64 },
    Hello { stream: mio::net::TcpStream, initiator: Box<Initiator>, until_ns: u64 },
    Welcome { connection: Socket, until_ns: u64 },
    Down { retry_ns: u64 },
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) phase: Phase,
    pub(super) alarm: Alarm,
    addresses: Vec<SocketAddr>,
    /// Attempts so far; each goes to the next address.
    attempts: usize,
    session_id: [u8; 16],
    /// What the last hello agreed on.
    pub(super) session: Option<Session>,
    pub(super) scratch: Scratch<Vec<u8>>,
    /// Of the connection that is being made, in the client's count of calls and connections.
    number: u64,
    /// The process that was asked for, or answered first. Nobody else will do.
    process: Option<String>,
    back_off: BackOff,
    /// Why there is no connection, or was none.
    cause: String,
    watches_writes: bool,
    config: ClientConfig,
}

impl Link {
    pub(super) fn new(
        addresses: Vec<SocketAddr>,
        session_id: [u8; 16],
        config: &ClientConfig,
    ) -> Result<Link, io::Error> {
        Ok(Link {
            phase: Phase::Down { retry_ns: 0 },
            alarm: Alarm::new()?,
            addresses,
            attempts: 0,
            session_id,
            session: None,
            scratch: Scratch::default(),
            number: 0,
            process: config.expect_process.clone(),
            back_off: BackOff::new(session_id),
            cause: String::new(),
            watches_writes: false,
            config: config.clone(),
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.addresses[self.attempts.saturating_sub(1) % self.addresses.len()]
    }

    /// Starts to connect to the next address.
    pub(super) fn begin(&mut self, now_ns: u64, within_ns: u64, number: u64) -> Result<(), ConnectError> {
        self.attempts += 1;
        self.number = number;
        let address = self.address();
        if self.config.credential.is_none() && !on_loopback(address) {
            return Err(ConnectError::KeyWanted { address });
        }
        let refused = |error| refused(address, error);
        let stream = mio::net::TcpStream::connect(address).map_err(refused)?;
        self.alarm.watch(&stream, true, true).map_err(refused)?;
        self.watches_writes = true;
        self.phase = Phase::Connecting { stream, until_ns: now_ns.saturating_add(within_ns) };
        Ok(())
    }

    /// Goes on with what was begun. Gives the greeting when there is a connection.
    pub(super) fn step(&mut self, now_ns: u64, pool: &mut Pool) -> Result<Option<Welcome>, ConnectError> {
        let address = self.address();
        // Whatever fails is over, and is closed on the way out.
        match std::mem::replace(&mut self.phase, Phase::Down { retry_ns: u64::MAX }) {
            Phase::Connecting { stream, until_ns } => {
                let is_connected = is_connected(&stream).map_err(|error| refused(address, error))?;
                if !is_connected && now_ns >= until_ns {
                    return Err(refused(address, io::ErrorKind::TimedOut.into()));
                }
                if !is_connected {
                    self.phase = Phase::Connecting { stream, until_ns };
                    return Ok(None);
                }
                let initiator = self.initiator(address, &stream)?;
                self.phase = Phase::Hello { stream, initiator, until_ns };
                self.step(now_ns, pool)
            }
            Phase::Hello { mut stream, mut initiator, until_ns } => {
                match initiator.advance(&mut stream, unix_s()).map_err(|error| self.not_agreed(address, error))? {
                    Some(session) => {
                        let congestion = self.config.congestion;
                        let tcp =
                            TcpConfig { backlog_bytes_max: BACKLOG_BYTES_MAX, congestion, ..TcpConfig::default() };
                        let limits = Limits { payload_bytes_max: 1 << 30 };
                        let terms = Terms::of(&session, self.number);
                        self.session = Some(session);
                        let connection = Connection::new(stream, limits, tcp, terms);
                        let connection = connection.map_err(|error| refused(address, error))?;
                        self.scratch = Scratch::default();
                        self.alarm.watch_for(&connection, false);
                        self.watches_writes = false;
                        self.phase = Phase::Welcome { connection, until_ns };
                        self.step(now_ns, pool)
                    }
                    None if now_ns >= until_ns => Err(self.too_slow(address)),
                    None => {
                        self.watches_writes = !initiator.output().is_empty();
                        self.alarm.watch_for(&stream, self.watches_writes);
                        self.phase = Phase::Hello { stream, initiator, until_ns };
                        Ok(None)
                    }
                }
            }
            Phase::Welcome { mut connection, until_ns } => match self.welcomed(&mut connection, address, pool)? {
                Some(welcome) => {
                    if self.config.wait == WaitMode::Efficient {
                        let waiting = connection.wait_in_reads(Duration::from_nanos(READ_NS));
                        waiting.map_err(|error| refused(address, error))?;
                    }
                    self.process.get_or_insert_with(|| welcome.process.clone());
                    self.alarm.connected(&connection);
                    self.phase = Phase::Up(connection);
                    self.mind_writes();
                    Ok(Some(welcome))
                }
                None if now_ns >= until_ns => Err(self.too_slow(address)),
                None => {
                    self.phase = Phase::Welcome { connection, until_ns };
                    Ok(None)
                }
            },
            phase => {
                self.phase = phase;
                Ok(None)
            }
        }
    }

    fn initiator(&self, address: SocketAddr, stream: &mio::net::TcpStream) -> Result<Box<Initiator>, ConnectError> {
        let set_up = stream.set_nodelay(true).and_then(|()| keep_alive(stream));
        set_up.map_err(|error| refused(address, error))?;
        let hello = InitiatorConfig {
            versions: VERSIONS,
            purpose: Purpose::Invoke,
            session_id: self.session_id,
            incarnation: self.number,
            payload_checksums: self.config.checks == Checks::Always || !on_loopback(address),
            // Without a key a name proves nothing, but it still finds mistakes.
            expect_process: self.process.clone(),
        };
        let initiator = Initiator::new(hello, self.config.credential.as_ref());
        initiator.map(Box::new).map_err(|error| self.not_agreed(address, error))
    }

    fn not_agreed(&self, address: SocketAddr, error: HelloError) -> ConnectError {
        match error {
            HelloError::Refused if self.config.credential.is_none() => ConnectError::KeyWanted { address },
            HelloError::Refused => ConnectError::CredentialRefused { address },
            HelloError::Unproven => ConnectError::Unproven { address },
            HelloError::OtherProcess { expected, found } => ConnectError::OtherProcess { address, expected, found },
            HelloError::Version { theirs, ours, .. } => ConnectError::Version { address, theirs, ours },
            HelloError::Closed { begun: false } | HelloError::Io(_) => {
                ConnectError::NotAProcess { address, text: CLOSED_AT_ONCE.into() }
            }
            error => ConnectError::NotAProcess { address, text: error.to_string() },
        }
    }

    fn too_slow(&self, address: SocketAddr) -> ConnectError {
        let text = format!("no greeting within {} ms", self.config.connect_within.as_millis());
        ConnectError::NotAProcess { address, text }
    }

    /// The welcome, the first frame, when it is there.
    fn welcomed(
        &mut self,
        connection: &mut Socket,
        address: SocketAddr,
        pool: &mut Pool,
    ) -> Result<Option<Welcome>, ConnectError> {
        let no = |text: String| ConnectError::NotAProcess { address, text };
        let received = connection.receive(&mut self.scratch, pool).map_err(|error| match error {
            // It proved itself before, so it is a process: this is how it says that we did not.
            _ if self.config.credential.is_some() => ConnectError::CredentialRefused { address },
            ConnectionError::Frame(error) => no(error.to_string()),
            _ => no(CLOSED_AT_ONCE.into()),
        });
        let Some(frame) = received? else { return Ok(None) };
        if frame.header.kind != frame::WELCOME {
            return Err(no(format!("a frame of kind {}", frame.header.kind)));
        }
        let Received::Whole(body) = frame.body else { return Err(no("a greeting above every limit".into())) };
        serde_json::from_slice(&body).map(Some).map_err(|error| no(error.to_string()))
    }

    /// An attempt failed: the next one comes after a pause.
    pub(super) fn fail(&mut self, now_ns: u64, error: &ConnectError) {
        self.cause = error.to_string();
        self.phase = Phase::Down { retry_ns: now_ns + self.back_off.next_ns() };
    }

    /// The connection is lost. Gives it back, for what it still holds.
    pub(super) fn lose(&mut self, now_ns: u64, cause: &str) -> Option<Socket> {
        cause.clone_into(&mut self.cause);
        if matches!(&self.phase, Phase::Up(socket) if socket.stats().received_frames > 1) {
            // It brought more than its greeting. A process that falls over each time it is greeted is not asked the faster for it.
            self.back_off.reset();
        }
        let retry_ns = now_ns + self.back_off.next_ns();
        match std::mem::replace(&mut self.phase, Phase::Down { retry_ns }) {
            Phase::Up(socket) => Some(socket),
            _ => None,
        }
    }

    /// When something is to be done without an event, while there is no connection.
    pub(super) fn due_ns(&self) -> u64 {
        match &self.phase {
            Phase::Up(_) => u64::MAX,
            Phase::Connecting { until_ns, .. } | Phase::Hello { until_ns, .. } | Phase::Welcome { until_ns, .. } => {
                *until_ns
            }
            Phase::Down { retry_ns } => *retry_ns,
        }
    }

    /// Why there is no connection now; `None` when there is one.
    pub(super) fn trouble(&self) -> Option<String> {
        let address = self.address();
        match (&self.phase, self.back_off.failures()) {
            (Phase::Up(_), _) => None,
            (_, 0 | 1) => Some(format!("the connection to {address} is lost ({}) and not back", self.cause)),
            (_, failures) => {
                Some(format!("{} attempts to connect again failed, the last because: {}", failures - 1, self.cause))
            }
        }
    }

    /// The last read emptied the socket.
    pub(super) fn is_drained(&self) -> bool {
        matches!(&self.phase, Phase::Up(connection) if connection.drained())
    }

    /// Asks to be told of room in the socket while something waits for it.
    #[inline]
    pub(super) fn mind_writes(&mut self) {
        if let Phase::Up(connection) = &self.phase
            && connection.wants_write() != self.watches_writes
        {
            self.watches_writes = !self.watches_writes;
            if self.alarm.is_polled() {
                self.alarm.watch_for(connection, self.watches_writes);
            }
        }
    }

    /// What becomes readable when there is something to do.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        let socket =
            if let Phase::Up(connection) = &self.phase { Some((connection, self.watches_writes)) } else { None };
        self.alarm.polled(socket);
        self.alarm.as_fd()
    }

    /// Sleeps until there is something to do, or for so long.
    pub(super) fn sleep(&self, longest: Duration) {
        let timeout = Timespec {
            tv_sec: i64::try_from(longest.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(longest.subsec_nanos()),
        };
        let (fd, flags) = match &self.phase {
            // The socket itself: a poll of an epoll looks at each of its members, too.
            Phase::Up(connection) if connection.wants_write() => (connection.as_fd(), PollFlags::IN | PollFlags::OUT),
            Phase::Up(connection) => (connection.as_fd(), PollFlags::IN),
            _ => (self.alarm.as_fd(), PollFlags::IN),
        };
        // Interrupted or not: the caller looks again.
        let _ = poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&timeout));
    }
}

/// Has the kernel ask an idle peer's kernel whether it is there: a host that vanished is noticed within 4 s, and no process woken.
pub(crate) fn keep_alive(socket: impl AsFd) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_tcp_keepidle(&socket, Duration::from_secs(2))?;
    sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(&socket, 2)?;
    Ok(sockopt::set_socket_keepalive(&socket, true)?)
}

const CLOSED_AT_ONCE: &str =
    "it closed the connection at once; its connection limit may be reached, or it is no process";

fn refused(address: SocketAddr, error: io::Error) -> ConnectError {
    ConnectError::Refused { address: address.to_string(), attempts: Attempts(vec![(address, error)]) }
}
