//! The client library: connect, call, many calls in flight, wait, cancel. No thread is started.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use praas_transport::hello::{Credential, HelloError, Initiator, InitiatorConfig, Purpose, Session, Versions};
use praas_transport::tcp::{Bodies, Connection, ConnectionError, Received, Scratch, SendError, TcpConfig, Terms};
use praas_transport::{Frame, Header, Limits};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::clock::{now_ns, unix_s};
use crate::config::WaitMode;
use crate::error::InvokeError;
use crate::numbered::NumberMap;
use crate::placement::nanoseconds;
use crate::wire::{Code, VERSIONS, Welcome, args, frame};

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// How `wait` waits: `latency` polls the socket, `balanced` polls for 100 us and then sleeps, `efficient` sleeps. Default `balanced`.
    pub wait: WaitMode,
    /// Deadline of each call, at most a day. Default 60 s.
    pub deadline: Duration,
    /// How long connecting and the greeting may take. Default 5 s.
    pub connect_within: Duration,
    /// Calls may be run twice when a worker is lost: the process sends them again by itself. Default false.
    pub idempotent: bool,
    /// What proves who we are (`praas token` makes one). Without it only processes on loopback that do not ask for one can be called, and
    /// nothing proves who answers. Default none.
    pub credential: Option<Credential>,
    /// The name of the process that has to answer: with a credential any other is refused. Default: whichever does.
    pub expect_process: Option<String>,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig {
            wait: WaitMode::Balanced,
            deadline: Duration::from_secs(60),
            connect_within: Duration::from_secs(5),
            idempotent: false,
            credential: None,
            expect_process: None,
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not one.
    #[error("`{address}` is not an address: {source}; give HOST:PORT as printed by praas-process")]
    Address {
        /// As given.
        address: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Nobody answers there, at none of the addresses of a name.
    #[error("cannot connect to {address}: {attempts}; is the process running, and is this its `listen=` address?")]
    Refused {
        /// As given.
        address: String,
        /// Each address that was tried.
        attempts: Attempts,
    },
    /// Whoever answers is not a process, or closed at once (its connection limit, or not yet ready).
    #[error("{address} does not greet as a process: {text}")]
    NotAProcess {
        /// Where we tried.
        address: SocketAddr,
        /// What came instead.
        text: String,
    },
    /// The process speaks other versions.
    #[error("the process at {address} speaks protocol version {theirs}, this client {ours}: use matching builds")]
    Version {
        /// Where we tried.
        address: SocketAddr,
        /// Its versions.
        theirs: Versions,
        /// Our versions.
        ours: Versions,
    },
    /// The process serves nobody without a credential, or is on another machine, where we say nothing without one.
    #[error(
        "{address} takes connections with a credential only: make one with `praas token`, give it as ClientConfig::credential"
    )]
    KeyWanted {
        /// Where we tried.
        address: SocketAddr,
    },
    /// The process refused our credential.
    #[error(
        "{address} refused our credential (of another key, expired, or not of a role that may do this: it does not say which,          nor whether it has a key at all); make a new one with `praas token`"
    )]
    CredentialRefused {
        /// Where we tried.
        address: SocketAddr,
    },
    /// Whoever answers does not know the key that our credential was made from.
    #[error(
        "{address} does not prove that it knows the key of our credential: it has another key, or it is somebody else's process"
    )]
    Unproven {
        /// Where we tried.
        address: SocketAddr,
    },
    /// A process of ours, but another one.
    #[error("process `{found}` answers at {address}, not `{expected}`: the address may have a new owner")]
    OtherProcess {
        /// Where we tried.
        address: SocketAddr,
        /// [`ClientConfig::expect_process`].
        expected: String,
        /// Its name.
        found: String,
    },
    /// The system gives no random numbers.
    #[error("no random numbers: {0}")]
    NoRandom(io::Error),
}

/// Addresses that were tried in turn, and what the system said of each.
#[derive(Debug)]
pub struct Attempts(pub Vec<(SocketAddr, io::Error)>);

impl fmt::Display for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (address, error)) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{address}: {error}")?;
        }
        Ok(())
    }
}

/// A call in flight on one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallHandle(u64);

/// A function of the process, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteFunction(u16);

/// Names a function of the connected process: its name, or what [`Client::function`] gave for it.
pub trait RemoteCallee {
    /// Its number at this client's process.
    ///
    /// # Errors
    /// `UnknownFunction`.
    fn find(&self, client: &Client) -> Result<RemoteFunction, InvokeError>;
}

impl RemoteCallee for RemoteFunction {
    fn find(&self, _: &Client) -> Result<RemoteFunction, InvokeError> {
        Ok(*self)
    }
}

impl RemoteCallee for &str {
    fn find(&self, client: &Client) -> Result<RemoteFunction, InvokeError> {
        client.function(self)
    }
}

/// An input on its way out.
#[derive(Debug)]
pub struct Outgoing {
    bytes: OutgoingBytes,
    is_args: bool,
}

#[derive(Debug)]
enum OutgoingBytes {
    Owned(Vec<u8>),
    Shared(Arc<[u8]>),
}

impl AsRef<[u8]> for OutgoingBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            OutgoingBytes::Owned(vec) => vec,
            OutgoingBytes::Shared(shared) => shared,
        }
    }
}

impl Outgoing {
    /// Several arguments as one input.
    #[must_use]
    pub fn from_args(arguments: &[&[u8]]) -> Outgoing {
        let mut encoded = vec![0; args::encoded_bytes(arguments)];
        args::encode(arguments, &mut encoded);
        Outgoing { bytes: OutgoingBytes::Owned(encoded), is_args: true }
    }
}

impl From<Vec<u8>> for Outgoing {
    fn from(vec: Vec<u8>) -> Self {
        Outgoing { bytes: OutgoingBytes::Owned(vec), is_args: false }
    }
}

impl From<Arc<[u8]>> for Outgoing {
    fn from(shared: Arc<[u8]>) -> Self {
        Outgoing { bytes: OutgoingBytes::Shared(shared), is_args: false }
    }
}

/// Copies. Hand over a `Vec` or an `Arc<[u8]>` where that matters.
impl From<&[u8]> for Outgoing {
    fn from(slice: &[u8]) -> Self {
        slice.to_vec().into()
    }
}

impl<const N: usize> From<&[u8; N]> for Outgoing {
    fn from(array: &[u8; N]) -> Self {
        array.to_vec().into()
    }
}

impl From<&Vec<u8>> for Outgoing {
    fn from(vec: &Vec<u8>) -> Self {
        vec.clone().into()
    }
}

impl From<&str> for Outgoing {
    fn from(text: &str) -> Self {
        text.as_bytes().to_vec().into()
    }
}

/// Buffers waiting for the next answer, so that a client in steady state allocates nothing.
#[derive(Debug, Clone, Default)]
struct Pool(Arc<Mutex<Vec<Vec<u8>>>>);

/// Buffers kept, and the largest worth keeping.
const POOLED_MAX: usize = 16;
const POOLED_BYTES_MAX: usize = 64 << 20;

impl Pool {
    fn put(&self, buffer: Vec<u8>) {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < POOLED_MAX && (1..=POOLED_BYTES_MAX).contains(&buffer.capacity()) {
            buffers.push(buffer);
        }
    }
}

impl Bodies for Pool {
    type Body = Vec<u8>;

    fn loan(&mut self, bytes: usize) -> Option<Vec<u8>> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The tightest fit, so that a small answer does not sit in the buffer of a large one.
        let fits = buffers.iter().enumerate().filter(|(_, buffer)| buffer.capacity() >= bytes);
        let mut buffer = match fits.min_by_key(|(_, buffer)| buffer.capacity()).map(|(at, _)| at) {
            Some(at) => buffers.swap_remove(at),
            None => Vec::with_capacity(bytes),
        };
        drop(buffers);
        // Only bytes that were never written are zeroed.
        buffer.resize(bytes, 0);
        Some(buffer)
    }

    fn give_back(&mut self, body: Vec<u8>) {
        self.put(body);
    }

    fn truncate(&mut self, mut body: Vec<u8>, bytes: usize) -> Vec<u8> {
        body.truncate(bytes);
        body
    }
}

/// What a function answered. Reads as a byte slice.
pub struct ClientReply {
    status: i32,
    bytes: Vec<u8>,
    pool: Pool,
}

impl ClientReply {
    /// The status the function returned, zero or above.
    #[must_use]
    pub fn status(&self) -> i32 {
        self.status
    }

    /// The bytes, to keep or to send again.
    #[must_use]
    pub fn into_vec(mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

impl Deref for ClientReply {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for ClientReply {
    fn drop(&mut self) {
        self.pool.put(std::mem::take(&mut self.bytes));
    }
}

impl fmt::Debug for ClientReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientReply").field("status", &self.status).field("bytes", &self.bytes.len()).finish()
    }
}

/// [`Connection::receive`] or [`Connection::receive_waiting`].
type Receive = fn(
    &mut Connection<Vec<u8>, OutgoingBytes>,
    &mut Scratch<Vec<u8>>,
    &mut Pool,
) -> Result<Option<Frame<Vec<u8>>>, ConnectionError>;

#[derive(Debug)]
enum Open {
    Waiting { deadline_ns: u64 },
    Done(Result<ClientReply, InvokeError>),
}

/// A connection to a process.
///
/// One thread uses it at a time. To drive it from an event loop of your own, poll [`Client::as_fd`] for reading
/// (and for writing while [`Client::wants_write`]) and call [`Client::poll`].
///
/// ```no_run
/// use praas_dataplane::{Client, ClientConfig};
/// let mut client = Client::connect("127.0.0.1:4000", &ClientConfig::default())?;
/// assert_eq!(&*client.invoke("echo", b"hello")?, b"hello");
/// let calls: Vec<_> = (0..8).map(|n| client.submit("echo", vec![n])).collect::<Result<_, _>>()?;
/// for call in calls {
///     println!("{:?}", client.wait(call)?);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Client {
    connection: Connection<Vec<u8>, OutgoingBytes>,
    scratch: Scratch<Vec<u8>>,
    pool: Pool,
    welcome: Welcome,
    session: Session,
    functions: HashMap<String, u16>,
    config: ClientConfig,
    open: NumberMap<Open>,
    done: VecDeque<u64>,
    next_call: u64,
    lost: Option<String>,
}

/// How long past its deadline a call's answer is still waited for: the process answers timeouts itself.
const DEADLINE_GRACE_NS: u64 = 100_000_000;
/// Polling before sleeping in `balanced` mode (see `placement`).
const BALANCED_LINGER_NS: u64 = 100_000;
/// Longest wait inside one read of the socket, in `efficient` mode. Calls that end sooner sleep in `poll`, which can be told.
const READ_NS: u64 = 100_000_000;
/// Polling without yielding in `latency` mode.
const LATENCY_SPIN_NS: u64 = 1_000_000;

impl Client {
    /// Connects, proves itself if it has a credential, and greets. The addresses of a name are tried in turn, each for its share
    /// of the time, until a process answers at one.
    ///
    /// # Errors
    /// [`ConnectError`]. Nothing stays behind.
    pub fn connect(address: impl ToString, config: &ClientConfig) -> Result<Client, ConnectError> {
        let address = address.to_string();
        let resolved = address.to_socket_addrs().map(Vec::from_iter).and_then(|addresses| match addresses.is_empty() {
            true => Err(io::Error::new(io::ErrorKind::NotFound, "it resolves to nothing")),
            false => Ok(addresses),
        });
        let resolved = resolved.map_err(|source| ConnectError::Address { address: address.clone(), source })?;
        let mut session_id = [0; 16];
        getrandom::fill(&mut session_id).map_err(|error| ConnectError::NoRandom(io::Error::other(error)))?;
        let until_ns = now_ns().saturating_add(nanoseconds(config.connect_within));
        let (mut attempts, mut stranger) = (Vec::new(), None);
        for (at, &candidate) in resolved.iter().enumerate() {
            let left_ns = until_ns.saturating_sub(now_ns()) / (resolved.len() - at) as u64;
            match Client::connect_to(candidate, config, session_id, left_ns) {
                Ok(client) => return Ok(client),
                Err(Failed::Socket(error)) => attempts.push((candidate, error)),
                // Another service, at the port that ours has at another address.
                Err(Failed::Answered(error @ ConnectError::NotAProcess { .. })) => stranger = Some(error),
                Err(Failed::Answered(error)) => return Err(error),
            }
        }
        Err(stranger.unwrap_or(ConnectError::Refused { address, attempts: Attempts(attempts) }))
    }

    fn connect_to(
        address: SocketAddr,
        config: &ClientConfig,
        session_id: [u8; 16],
        within_ns: u64,
    ) -> Result<Client, Failed> {
        let until_ns = now_ns().saturating_add(within_ns);
        let on_loopback = address.ip().to_canonical().is_loopback();
        if config.credential.is_none() && !on_loopback {
            return Err(Failed::Answered(ConnectError::KeyWanted { address }));
        }
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_nanos(within_ns.max(1)))?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let hello = InitiatorConfig {
            versions: VERSIONS,
            purpose: Purpose::Invoke,
            session_id,
            incarnation: 0,
            payload_checksums: !on_loopback,
            // Without a key a name proves nothing, but it still finds mistakes.
            expect_process: config.expect_process.clone(),
        };
        let session = say_hello(&mut stream, address, config, hello, until_ns).map_err(Failed::Answered)?;
        let tcp = TcpConfig { backlog_bytes_max: 1 << 30, ..TcpConfig::default() };
        let limits = Limits { payload_bytes_max: 1 << 30 };
        let mut connection =
            Connection::new(mio::net::TcpStream::from_std(stream), limits, tcp, Terms::of(&session, 0))?;
        let (mut scratch, mut pool) = (Scratch::default(), Pool::default());
        let welcome =
            greet(&mut connection, &mut scratch, &mut pool, address, config, until_ns).map_err(Failed::Answered)?;
        if config.wait == WaitMode::Efficient {
            connection.wait_in_reads(Duration::from_nanos(READ_NS))?;
        }
        let functions = (0..).zip(&welcome.functions).map(|(id, name)| (name.clone(), id)).collect();
        Ok(Client {
            connection,
            scratch,
            pool,
            welcome,
            session,
            functions,
            config: config.clone(),
            open: NumberMap::default(),
            done: VecDeque::new(),
            next_call: 1,
            lost: None,
        })
    }

    /// What the process told about itself.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// What the hello agreed on, and who the process proved to be.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Looks a function up.
    ///
    /// # Errors
    /// `UnknownFunction`, naming those there are.
    pub fn function(&self, name: &str) -> Result<RemoteFunction, InvokeError> {
        self.functions.get(name).copied().map(RemoteFunction).ok_or_else(|| InvokeError::UnknownFunction {
            text: format!("`{name}`; process {} has {}", self.welcome.process, self.welcome.functions.join(", ")),
        })
    }

    /// Calls a function and waits for its answer.
    ///
    /// # Errors
    /// Every way a call can fail. The client can be used again after all of them except `ConnectionLost`.
    pub fn invoke(
        &mut self,
        callee: impl RemoteCallee,
        input: impl Into<Outgoing>,
    ) -> Result<ClientReply, InvokeError> {
        let call = self.submit(callee, input)?;
        self.wait(call)
    }

    /// Starts a call with the configured deadline. Writes to the socket, does not block.
    ///
    /// # Errors
    /// `UnknownFunction`, `TooLarge` (nothing was sent), `Busy` at the process's limit of calls in flight, `ConnectionLost`.
    pub fn submit(&mut self, callee: impl RemoteCallee, input: impl Into<Outgoing>) -> Result<CallHandle, InvokeError> {
        self.submit_within(callee, input, self.config.deadline)
    }

    /// Starts a call that is to end within `deadline`.
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub fn submit_within(
        &mut self,
        callee: impl RemoteCallee,
        input: impl Into<Outgoing>,
        deadline: Duration,
    ) -> Result<CallHandle, InvokeError> {
        let RemoteFunction(function) = callee.find(self)?;
        let Outgoing { bytes, is_args } = input.into();
        self.check_lost()?;
        let (input_bytes, max) = (bytes.as_ref().len() as u64, self.welcome.payload_bytes_max);
        if input_bytes > max {
            let text = format!("{input_bytes} bytes of input, process {} allows {max}", self.welcome.process);
            return Err(InvokeError::TooLarge { text });
        }
        let waiting = self.open.len() - self.done.len();
        if waiting >= self.welcome.calls_max as usize {
            let text = format!("{waiting} calls are in flight on this connection, the most it may have; wait for some");
            return Err(InvokeError::Busy { text });
        }
        let call = self.next_call;
        self.next_call += 1;
        let budget_ns = nanoseconds(deadline).max(1);
        let flags = if is_args { frame::FLAG_ARGS } else { 0 }
            | if self.config.idempotent { frame::FLAG_IDEMPOTENT } else { 0 };
        let header = Header { kind: frame::REQUEST, function, call, budget_ns, flags, ..Header::default() };
        self.send(&header, bytes)?;
        let deadline_ns = now_ns().saturating_add(budget_ns).saturating_add(DEADLINE_GRACE_NS);
        self.open.insert(call, Open::Waiting { deadline_ns });
        Ok(CallHandle(call))
    }

    fn send(&mut self, header: &Header, bytes: OutgoingBytes) -> Result<(), InvokeError> {
        match self.connection.send(header, &[], bytes) {
            Ok(()) => {}
            Err(SendError::Backlogged(_)) => {
                let text = "the process reads more slowly than we send; wait for some calls".into();
                return Err(InvokeError::Busy { text });
            }
            Err(_) => return Err(self.lose("the connection broke while sending".into())),
        }
        self.collect_sent();
        Ok(())
    }

    fn collect_sent(&mut self) {
        while let Some(sent) = self.connection.take_sent() {
            if let OutgoingBytes::Owned(buffer) = sent {
                self.pool.put(buffer);
            }
        }
    }

    fn check_lost(&self) -> Result<(), InvokeError> {
        match &self.lost {
            Some(text) => Err(InvokeError::ConnectionLost { text: text.clone() }),
            None => Ok(()),
        }
    }

    /// Ends every call in flight: its connection is gone.
    fn lose(&mut self, text: String) -> InvokeError {
        let error = InvokeError::ConnectionLost { text: text.clone() };
        for (call, open) in &mut self.open {
            if matches!(open, Open::Waiting { .. }) {
                *open = Open::Done(Err(error.clone()));
                self.done.push_back(*call);
            }
        }
        self.lost = Some(text);
        error
    }

    /// Takes what has arrived and sends what waits, without blocking. False when there was nothing.
    fn progress(&mut self) -> bool {
        self.progress_with(Connection::receive)
    }

    fn progress_with(&mut self, receive: Receive) -> bool {
        if self.lost.is_some() {
            return false;
        }
        if self.connection.wants_write() {
            let pool = self.pool.clone();
            let flushed = self.connection.flush(&mut |sent| {
                if let OutgoingBytes::Owned(buffer) = sent {
                    pool.put(buffer);
                }
            });
            if let Err(error) = flushed {
                self.lose(cause(&error));
                return true;
            }
        }
        match receive(&mut self.connection, &mut self.scratch, &mut self.pool) {
            Ok(None) => false,
            Ok(Some(frame)) => {
                if let Err(text) = self.take(frame) {
                    self.lose(text);
                }
                true
            }
            Err(ConnectionError::Closed { .. }) => {
                self.lose("the process closed the connection".into());
                true
            }
            Err(error) => {
                self.lose(cause(&error));
                true
            }
        }
    }

    fn take(&mut self, frame: Frame<Vec<u8>>) -> Result<(), String> {
        let Frame { header, body, .. } = frame;
        if header.kind != frame::REPLY {
            return Err(format!("the process sent a frame of kind {}", header.kind));
        }
        let bytes = match body {
            Received::Whole(bytes) => bytes,
            Received::Refused { bytes, .. } => {
                return Err(format!("the process sent {bytes} bytes, above every limit"));
            }
        };
        let reply = ClientReply { status: header.status, bytes, pool: self.pool.clone() };
        // An answer to a call that was cancelled or timed out here finds nobody.
        let Some(open @ Open::Waiting { .. }) = self.open.get_mut(&header.call) else { return Ok(()) };
        let result = match Code::from_wire(header.flags) {
            Some(Code::Ok) => Ok(reply),
            Some(code) => Err(InvokeError::from_wire(code, header.status, &reply)),
            None => Err(InvokeError::Protocol { text: format!("answer with unknown code {}", header.flags) }),
        };
        *open = Open::Done(result);
        self.done.push_back(header.call);
        Ok(())
    }

    /// Waits for one call. Answers to other calls are kept until they are asked for.
    ///
    /// # Errors
    /// Every way a call can fail; `Protocol` for a handle that was waited for before.
    pub fn wait(&mut self, call: CallHandle) -> Result<ClientReply, InvokeError> {
        let CallHandle(number) = call;
        let mut since_ns = 0;
        loop {
            let deadline_ns = match self.open.get(&number) {
                Some(Open::Waiting { deadline_ns }) => *deadline_ns,
                Some(Open::Done(_)) => return self.finish(number),
                None => return Err(InvokeError::Protocol { text: format!("call {number} is not in flight here") }),
            };
            if self.config.wait == WaitMode::Efficient && !self.connection.wants_write() && self.lost.is_none() {
                let left_ns = deadline_ns.saturating_sub(now_ns());
                if left_ns >= READ_NS {
                    self.progress_with(Connection::receive_waiting);
                    continue;
                }
                if self.connection.drained() {
                    // The last read emptied the socket: a look before sleeping would find nothing.
                    self.sleep(Duration::from_nanos(left_ns));
                }
            }
            if self.progress() {
                since_ns = 0;
                continue;
            }
            let now = now_ns();
            if now >= deadline_ns {
                self.open.remove(&number);
                let text = "no answer arrived within the deadline".into();
                return Err(InvokeError::Timeout { text });
            }
            if since_ns == 0 {
                since_ns = now;
            }
            let waited_ns = now - since_ns;
            match self.config.wait {
                WaitMode::Latency if waited_ns < LATENCY_SPIN_NS => {}
                WaitMode::Latency => rustix::thread::sched_yield(),
                // From the first: the process may be waiting for this very core, and no answer takes less than two yields.
                WaitMode::Balanced if waited_ns < BALANCED_LINGER_NS => rustix::thread::sched_yield(),
                WaitMode::Balanced | WaitMode::Efficient => self.sleep(Duration::from_nanos(deadline_ns - now)),
            }
        }
    }

    fn finish(&mut self, number: u64) -> Result<ClientReply, InvokeError> {
        if let Some(at) = self.done.iter().position(|done| *done == number) {
            self.done.remove(at);
        }
        match self.open.remove(&number) {
            Some(Open::Done(result)) => result,
            _ => unreachable!("a call that is done is open"),
        }
    }

    fn sleep(&self, longest: Duration) {
        let mut flags = PollFlags::IN;
        if self.connection.wants_write() {
            flags |= PollFlags::OUT;
        }
        let mut fds = [PollFd::new(&self.connection, flags)];
        let timeout = Timespec {
            tv_sec: i64::try_from(longest.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(longest.subsec_nanos()),
        };
        // Interrupted or not: the caller looks again.
        let _ = poll(&mut fds, Some(&timeout));
    }

    /// Whichever call is done next, without blocking; `None` when none is. Meant for event loops.
    pub fn poll(&mut self) -> Option<(CallHandle, Result<ClientReply, InvokeError>)> {
        while self.progress() {}
        if self.done.is_empty() {
            self.time_out();
        }
        let number = *self.done.front()?;
        Some((CallHandle(number), self.finish(number)))
    }

    /// Waits until some call is done; `None` when none is in flight.
    pub fn wait_any(&mut self) -> Option<(CallHandle, Result<ClientReply, InvokeError>)> {
        loop {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            if self.open.is_empty() {
                return None;
            }
            if self.config.wait != WaitMode::Latency {
                let bounds_ns = self.open.values().filter_map(|open| match open {
                    Open::Waiting { deadline_ns } => Some(*deadline_ns),
                    Open::Done(_) => None,
                });
                let first_ns = bounds_ns.min().expect("nothing is done, so all that is open waits");
                self.sleep(Duration::from_nanos(first_ns.saturating_sub(now_ns())));
            }
        }
    }

    fn time_out(&mut self) {
        let now = now_ns();
        for (call, open) in &mut self.open {
            if matches!(open, Open::Waiting { deadline_ns } if *deadline_ns <= now) {
                let text = "no answer arrived within the deadline".into();
                *open = Open::Done(Err(InvokeError::Timeout { text }));
                self.done.push_back(*call);
            }
        }
    }

    /// Tells the process that nobody waits for the call any more. Waiting for it gives `Cancelled`, or its result if that was quicker.
    ///
    /// # Errors
    /// `ConnectionLost`; `Protocol` for a handle that is not in flight.
    pub fn cancel(&mut self, call: CallHandle) -> Result<(), InvokeError> {
        self.check_lost()?;
        match self.open.get(&call.0) {
            Some(Open::Waiting { .. }) => {
                let header = Header { kind: frame::CANCEL, call: call.0, ..Header::default() };
                self.send(&header, OutgoingBytes::Owned(Vec::new()))
            }
            Some(Open::Done(_)) => Ok(()),
            None => Err(InvokeError::Protocol { text: format!("call {} is not in flight here", call.0) }),
        }
    }

    /// Calls that have no answer yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.open.len() - self.done.len()
    }

    /// Whether bytes wait to be sent: then poll for writing, too.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// What went wrong, with what the system or the frame said.
fn cause(error: &ConnectionError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Why one address was no good.
enum Failed {
    /// Nobody answers.
    Socket(io::Error),
    /// Somebody does.
    Answered(ConnectError),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Socket(error)
    }
}

fn say_hello(
    stream: &mut TcpStream,
    address: SocketAddr,
    config: &ClientConfig,
    hello: InitiatorConfig,
    until_ns: u64,
) -> Result<Session, ConnectError> {
    let no = |text: String| ConnectError::NotAProcess { address, text };
    let failed = |error| match error {
        HelloError::Refused if config.credential.is_none() => ConnectError::KeyWanted { address },
        HelloError::Refused => ConnectError::CredentialRefused { address },
        HelloError::Unproven => ConnectError::Unproven { address },
        HelloError::OtherProcess { expected, found } => ConnectError::OtherProcess { address, expected, found },
        HelloError::Version { theirs, ours, .. } => ConnectError::Version { address, theirs, ours },
        HelloError::Closed { begun: false } | HelloError::Io(_) => no(CLOSED_AT_ONCE.into()),
        error => no(error.to_string()),
    };
    let mut initiator = Initiator::new(hello, config.credential.as_ref()).map_err(failed)?;
    loop {
        if let Some(session) = initiator.advance(stream, unix_s()).map_err(failed)? {
            return Ok(session);
        }
        let now = now_ns();
        if now >= until_ns {
            return Err(no(too_slow(config)));
        }
        let flags = if initiator.output().is_empty() { PollFlags::IN } else { PollFlags::OUT };
        let left = Duration::from_nanos(until_ns - now);
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let _ = poll(&mut [PollFd::new(stream, flags)], Some(&timeout));
    }
}

const CLOSED_AT_ONCE: &str =
    "it closed the connection at once; its connection limit may be reached, or it is no process";

fn too_slow(config: &ClientConfig) -> String {
    format!("no greeting within {} ms", config.connect_within.as_millis())
}

/// Waits for the welcome, the first frame.
fn greet(
    connection: &mut Connection<Vec<u8>, OutgoingBytes>,
    scratch: &mut Scratch<Vec<u8>>,
    pool: &mut Pool,
    address: SocketAddr,
    config: &ClientConfig,
    until_ns: u64,
) -> Result<Welcome, ConnectError> {
    let no = |text: String| ConnectError::NotAProcess { address, text };
    let frame = loop {
        let received = connection.receive(scratch, pool).map_err(|error| match error {
            // It proved itself before, so it is a process: this is how it says that we did not.
            _ if config.credential.is_some() => ConnectError::CredentialRefused { address },
            ConnectionError::Frame(error) => no(error.to_string()),
            _ => no(CLOSED_AT_ONCE.into()),
        });
        match received? {
            Some(frame) => break frame,
            None if now_ns() >= until_ns => return Err(no(too_slow(config))),
            None => {}
        }
        let mut fds = [PollFd::new(connection, PollFlags::IN)];
        let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 }));
    };
    if frame.header.kind != frame::WELCOME {
        return Err(no(format!("a frame of kind {}", frame.header.kind)));
    }
    let Received::Whole(body) = frame.body else { return Err(no("a greeting above every limit".into())) };
    serde_json::from_slice(&body).map_err(|error| no(error.to_string()))
}
