//! The connection to the process, and the next one when it is lost: connecting, greeting, pausing. Never blocks.
//!
//! ```text
//! Down ──begin──► Connecting ──► Greeting ──► Up
//!  ▲                  │              │         │
//!  └──── pause ───────┴──────────────┴── lost ─┘
//! ```

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use praas_transport::tcp::{Connection, ConnectionError, Received, TcpConfig};
use praas_transport::{Header, Limits};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::alarm::Alarm;
use super::delivery::BackOff;
use super::payload::{OutgoingBytes, Pool};
use super::{ClientConfig, ConnectError};
use crate::config::WaitMode;
use crate::placement::nanoseconds;
use crate::wire::{PROTOCOL_VERSION, Welcome, frame};

pub(super) type Socket = Connection<Vec<u8>, OutgoingBytes>;

/// Bytes that may wait for the socket.
pub(super) const BACKLOG_BYTES_MAX: u64 = 1 << 30;
/// Longest wait inside one read of the socket, in `efficient` mode. Calls that end sooner sleep in `poll`, which can be told.
pub(super) const READ_NS: u64 = 100_000_000;

#[derive(Debug)]
pub(super) enum Phase {
    Up(Socket),
    Connecting { stream: mio::net::TcpStream, until_ns: u64 },
    Greeting { connection: Socket, until_ns: u64 },
    Down { retry_ns: u64 },
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) phase: Phase,
    pub(super) alarm: Alarm,
    addresses: Vec<SocketAddr>,
    /// Attempts so far; each goes to the next address.
    attempts: usize,
    session: [u8; 16],
    /// Of the connection that is being made, in the client's count of calls and connections.
    number: u64,
    /// The process of the first greeting. Nobody else will do.
    process: Option<String>,
    back_off: BackOff,
    /// Why there is no connection, or was none.
    cause: String,
    watches_writes: bool,
    config: ClientConfig,
}

impl Link {
    pub(super) fn new(addresses: Vec<SocketAddr>, session: [u8; 16], config: &ClientConfig) -> Result<Link, io::Error> {
        Ok(Link {
            phase: Phase::Down { retry_ns: 0 },
            alarm: Alarm::new()?,
            addresses,
            attempts: 0,
            session,
            number: 0,
            process: None,
            back_off: BackOff::new(session),
            cause: String::new(),
            watches_writes: false,
            config: config.clone(),
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.addresses[self.attempts.saturating_sub(1) % self.addresses.len()]
    }

    /// Starts to connect to the next address.
    pub(super) fn begin(&mut self, now_ns: u64, number: u64) -> Result<(), ConnectError> {
        self.attempts += 1;
        self.number = number;
        let address = self.address();
        let refused = |source| ConnectError::Refused { address, source };
        let stream = mio::net::TcpStream::connect(address).map_err(refused)?;
        self.alarm.watch(&stream, true, true).map_err(refused)?;
        self.watches_writes = true;
        let until_ns = now_ns.saturating_add(nanoseconds(self.config.connect_within));
        self.phase = Phase::Connecting { stream, until_ns };
        Ok(())
    }

    /// Goes on with what was begun. Gives the greeting when there is a connection.
    pub(super) fn step(&mut self, now_ns: u64, pool: &mut Pool) -> Result<Option<Welcome>, ConnectError> {
        let address = self.address();
        let refused = |source| ConnectError::Refused { address, source };
        if let Phase::Connecting { stream, until_ns } = &self.phase {
            let until_ns = *until_ns;
            if let Some(error) = stream.take_error().map_err(refused)? {
                return Err(refused(error));
            }
            match stream.peer_addr() {
                Ok(peer) if stream.local_addr().is_ok_and(|local| local == peer) => {
                    // A port of the range that clients are given, connected to itself (RFC 9293 3.5, simultaneous open).
                    return Err(refused(io::ErrorKind::ConnectionRefused.into()));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                    return if now_ns >= until_ns { Err(refused(io::ErrorKind::TimedOut.into())) } else { Ok(None) };
                }
                Err(error) => return Err(refused(error)),
            }
            let Phase::Connecting { stream, .. } = std::mem::replace(&mut self.phase, Phase::Down { retry_ns: 0 })
            else {
                unreachable!("seen above");
            };
            keep_alive(&stream).map_err(refused)?;
            let tcp = TcpConfig { backlog_bytes_max: BACKLOG_BYTES_MAX, ..TcpConfig::default() };
            let limits = Limits { payload_bytes_max: 1 << 30 };
            let mut connection = Connection::new(stream, limits, tcp).map_err(refused)?;
            let hello = Header {
                kind: frame::HELLO,
                aux: u64::from(PROTOCOL_VERSION),
                incarnation: self.number,
                ..Header::default()
            };
            let no = |text: &str| ConnectError::NotAProcess { address, text: text.into() };
            let body = OutgoingBytes::Owned(self.session.to_vec());
            connection.send(&hello, &[], body).map_err(|_| no("the connection broke"))?;
            self.phase = Phase::Greeting { connection, until_ns };
        }
        if let Phase::Greeting { connection, until_ns } = &mut self.phase {
            let Some(welcome) = welcomed(connection, address, pool)? else {
                if now_ns >= *until_ns {
                    let ms = self.config.connect_within.as_millis();
                    return Err(ConnectError::NotAProcess { address, text: format!("no greeting within {ms} ms") });
                }
                return Ok(None);
            };
            let expected = self.process.get_or_insert_with(|| welcome.process.clone());
            if *expected != welcome.process {
                let (expected, found) = (expected.clone(), welcome.process);
                return Err(ConnectError::OtherProcess { address, found, expected });
            }
            if self.config.wait == WaitMode::Efficient {
                connection.wait_in_reads(Duration::from_nanos(READ_NS)).map_err(refused)?;
            }
            let Phase::Greeting { connection, .. } = std::mem::replace(&mut self.phase, Phase::Down { retry_ns: 0 })
            else {
                unreachable!("seen above");
            };
            self.phase = Phase::Up(connection);
            self.mind_writes();
            return Ok(Some(welcome));
        }
        Ok(None)
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
            Phase::Connecting { until_ns, .. } | Phase::Greeting { until_ns, .. } => *until_ns,
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

    /// Asks to be told of room in the socket while something waits for it.
    #[inline]
    pub(super) fn mind_writes(&mut self) {
        if let Phase::Up(connection) = &self.phase
            && connection.wants_write() != self.watches_writes
        {
            self.watches_writes = !self.watches_writes;
            self.alarm.watch_for(connection, self.watches_writes);
        }
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

/// What went wrong, with what the system or the frame said.
pub(super) fn cause(error: &ConnectionError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn welcomed(connection: &mut Socket, address: SocketAddr, pool: &mut Pool) -> Result<Option<Welcome>, ConnectError> {
    let no = |text: String| ConnectError::NotAProcess { address, text };
    let _ = connection.flush(&mut drop).map_err(|error| no(cause(&error)))?;
    let received = connection.receive(pool).map_err(|error| match error {
        ConnectionError::Frame(error) => no(error.to_string()),
        _ => no("it closed the connection at once; its connection limit may be reached, or it is no process".into()),
    });
    let Some(frame) = received? else { return Ok(None) };
    if frame.header.kind != frame::WELCOME {
        return Err(no(format!("a frame of kind {}", frame.header.kind)));
    }
    if frame.header.aux != u64::from(PROTOCOL_VERSION) {
        return Err(ConnectError::Version { address, theirs: frame.header.aux, ours: PROTOCOL_VERSION });
    }
    let Received::Whole(body) = frame.body else { return Err(no("a greeting above every limit".into())) };
    serde_json::from_slice(&body).map(Some).map_err(|error| no(error.to_string()))
}
