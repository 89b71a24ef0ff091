//! The client library: connect, call, many calls in flight, wait, cancel, reconnect. No thread is started.
//!
//! | file          | what it owns                                                             |
//! |---------------|--------------------------------------------------------------------------|
//! | `mod.rs`      | the calls in flight, from `submit` to their end                          |
//! | `delivery.rs` | what becomes of a call without its connection; pauses; heartbeats (pure) |
//! | `link.rs`     | the connection and its successors                                        |
//! | `alarm.rs`    | the one descriptor to poll                                               |
//! | `payload.rs`  | inputs, answers and their buffers                                        |
//! | `members.rs`  | tables of members, sent to a process                                     |

mod alarm;
pub(crate) mod delivery;
pub(crate) mod link;
mod members;
mod payload;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use praas_transport::hello::{Credential, Session, Versions};
use praas_transport::tcp::{Connection, ConnectionError, Received, Scratch, SendError};
use praas_transport::{Frame, Header};

use crate::clock::now_ns;
use crate::config::{Checks, Congestion, CongestionError, WaitMode};
use crate::controller::WINDOW_CALLS;
use crate::error::InvokeError;
use crate::numbered::NumberMap;
use crate::placement::nanoseconds;
use crate::wire::{Code, Welcome, frame};
use delivery::{Beat, Fate, Pulse, after_loss, after_restart};
pub use delivery::{CallOptions, Delivery};
use link::{BACKLOG_BYTES_MAX, Link, Phase, READ_NS, Socket};
pub use members::{Members, UpdateError};
pub use payload::{ClientReply, Outgoing};
use payload::{OutgoingBytes, Pool};

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// How `invoke` and `wait` wait: `latency` hands its core over once (`invoke`), looks at the socket for 4 us (one call in flight), then looks
    /// and yields in turns; `balanced` does so for 100 us (longer for a long input) and then sleeps; `efficient` sleeps. Default `balanced`.
    pub wait: WaitMode,
    /// Deadline of each call, at most a day. Default 60 s.
    pub deadline: Duration,
    /// How long connecting and the greeting may take, each time. Default 5 s.
    pub connect_within: Duration,
    /// What may happen to a call whose connection or worker is lost. Default [`Delivery::AtMostOnce`].
    pub delivery: Delivery,
    /// Whether a lost connection is made again while calls wait for it, until their deadlines. Without it every call ends as
    /// `ConnectionLost` and the client is of no more use. Default true.
    pub reconnect: bool,
    /// What proves who we are (`praas token` makes one). Without it only processes on loopback that do not ask for one can be called, and
    /// nothing proves who answers. Default none.
    pub credential: Option<Credential>,
    /// The name of the process that has to answer: with a credential any other is refused. Default: whichever does, and from then
    /// on no other.
    pub expect_process: Option<String>,
    /// Congestion control of our side of the connection. Default `auto`: reno on this host, the system's otherwise.
    pub congestion: Congestion,
    /// Whether frames have keyed tags and payload checksums on loopback, too; elsewhere they always do. Default `auto`: when the process
    /// wants it.
    pub checks: Checks,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig {
            wait: WaitMode::Balanced,
            deadline: Duration::from_secs(60),
            connect_within: Duration::from_secs(5),
            delivery: Delivery::default(),
            reconnect: true,
            credential: None,
            expect_process: None,
            congestion: Congestion::default(),
            checks: Checks::default(),
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
        "{address} refused our credential (of another key, expired, or not of a role that may do this: it does not say which, nor whether it has a key at all); make a new one with `praas token`"
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
    #[error(
        "process `{found}` answers at {address}, not `{expected}`: the address may have a new owner, or the process was restarted without its name (`--process`)"
    )]
    OtherProcess {
        /// Where we tried.
        address: SocketAddr,
        /// [`ClientConfig::expect_process`], or who answered first.
        expected: String,
        /// Its name.
        found: String,
    },
    /// The kernel does not take our [`ClientConfig::congestion`].
    #[error("{0}; check ClientConfig::congestion")]
    Congestion(#[from] CongestionError),
    /// The system gives no random numbers.
    #[error("no random numbers: {0}")]
    NoRandom(io::Error),
    /// The system gives no descriptors.
    #[error("no descriptors for a client: {0}; check `ulimit -n`")]
    NoDescriptors(io::Error),
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

/// A function of the process. Stays right when the process is restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteFunction(u16);

/// Names a function of the connected process: its name, or what [`Client::function`] gave for it.
pub trait RemoteCallee {
    /// Its number at this client.
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

/// The functions we were ever told of, and their ids at the process as it is now.
#[derive(Debug, Default)]
struct Functions {
    numbers: HashMap<String, u16>,
    ids: Vec<Option<u16>>,
}

impl Functions {
    /// What a greeting names. Numbers that were handed out stay.
    fn learn(&mut self, names: &[String]) {
        self.ids.fill(None);
        for (id, name) in (0..).zip(names) {
            let next = u16::try_from(self.ids.len()).unwrap_or(u16::MAX);
            let number = *self.numbers.entry(name.clone()).or_insert(next);
            if usize::from(number) == self.ids.len() {
                self.ids.push(None);
            }
            if let Some(known) = self.ids.get_mut(usize::from(number)) {
                *known = Some(id);
            }
        }
    }
}

/// A call that waits for its answer.
#[derive(Debug)]
struct Waiting {
    /// When the process ends it; [`GRACE_NS`] later we do.
    deadline_ns: u64,
    function: u16,
    flags: u16,
    /// The present connection has it; else it waits in the outbox.
    sent: bool,
    /// A byte of it may have left on an earlier connection.
    again: bool,
    cancelled: bool,
    /// Its input, when it may be sent again.
    kept: Option<OutgoingBytes>,
}

#[derive(Debug)]
enum Open {
    Waiting(Waiting),
    Done(Result<ClientReply, InvokeError>),
}

impl Open {
    fn waiting(&mut self) -> Option<&mut Waiting> {
        match self {
            Open::Waiting(waiting) => Some(waiting),
            Open::Done(_) => None,
        }
    }
}

/// A request that waits for a connection.
#[derive(Debug)]
struct Letter {
    call: u64,
    function: u16,
    flags: u16,
    deadline_ns: u64,
    body: OutgoingBytes,
}

/// [`Connection::receive`] or [`Connection::receive_waiting`].
type Receive = fn(&mut Socket, &mut Scratch<Vec<u8>>, &mut Pool) -> Result<Option<Frame<Vec<u8>>>, ConnectionError>;

/// A client of one process: its connection, made again when it is lost, and the calls in flight.
///
/// One thread uses it at a time. To drive it from an event loop of your own, poll [`Client::as_fd`] for reading and call
/// [`Client::poll`] or [`Client::drain`] when it is readable: nothing else is needed, for writing, time or reconnecting. It is
/// the same descriptor as long as the client lives. Call until there is nothing more: answers that were read
/// wait for the next call, not for the descriptor.
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
    link: Link,
    pool: Pool,
    welcome: Welcome,
    functions: Functions,
    config: ClientConfig,
    open: NumberMap<Open>,
    done: VecDeque<u64>,
    /// Requests that wait for a connection, in the order of their numbers.
    outbox: VecDeque<Letter>,
    outbox_bytes: u64,
    /// `EffectivelyOnce` calls, oldest first; those at the front may have their answers.
    once: VecDeque<u64>,
    /// Numbers calls and connections.
    next_number: u64,
    beat: Beat,
    last_submit_ns: u64,
    linger_ns: u64,
    is_corked: bool,
    lost: Option<String>,
}

/// How long past its deadline a call's answer is still waited for: the process answers timeouts itself. With what it takes us to
/// notice, a call ends within 100 ms of its deadline (G1).
const GRACE_NS: u64 = 50_000_000;
/// Polling before sleeping in `balanced` mode (see `placement`), and what a long input adds to it: no answer comes before the process has
/// read it, at 4 bytes/ns, and one that comes just after the 100 us would wake a core that has just gone to sleep.
const BALANCED_LINGER_NS: u64 = 100_000;
const BYTES_PER_LINGER_NS: u64 = 4;
const BALANCED_LINGER_NS_MAX: u64 = 1_000_000;
/// With one call in flight the socket is looked at without a yield for so long: what a controller takes to send a small function's answer.
/// A yield after each look gave the core to a worker that was done, while the answer came (docs/decisions/0027).
const LOOK_NS: u64 = 4_000;
/// Frames taken before the clock is looked at: a process that sends without end holds nobody past a deadline.
const FRAMES_PER_LOOK: usize = 64;
/// Requests that wait for the next look at answers, bytes, before they are sent without it.
const CORKED_BYTES_MAX: u64 = 16 << 10;
/// Before a call after a rest this long we look whether the connection is still there: a call written to a dead one may have
/// run, for all we know.
const REST_NS: u64 = 100_000_000;

/// A connection to a process that has greeted.
struct Opened {
    link: Link,
    pool: Pool,
    welcome: Welcome,
    /// Of the connection, in the count of calls and connections.
    number: u64,
}

/// Connects to a process, as [`Client::connect`] has it.
fn open(address: String, config: &ClientConfig) -> Result<Opened, ConnectError> {
    config.congestion.check()?;
    let resolved = address.to_socket_addrs().map(Vec::from_iter).and_then(|addresses| match addresses.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::NotFound, "it resolves to nothing")),
        false => Ok(addresses),
    });
    let resolved = resolved.map_err(|source| ConnectError::Address { address: address.clone(), source })?;
    let mut session_id = [0; 16];
    getrandom::fill(&mut session_id).map_err(|error| ConnectError::NoRandom(io::Error::other(error)))?;
    let addresses = resolved.len() as u64;
    let mut link = Link::new(resolved, session_id, config).map_err(ConnectError::NoDescriptors)?;
    let mut pool = Pool::default();
    let until_ns = now_ns().saturating_add(nanoseconds(config.connect_within));
    let (mut attempted, mut stranger, mut welcomed) = (Vec::new(), None, None);
    // Connections are numbered from 1: 0 says that there is no session.
    let mut number = 0;
    while welcomed.is_none() && number < addresses {
        number += 1;
        let left_ns = until_ns.saturating_sub(now_ns()) / (addresses - number + 1);
        match open_once(&mut link, &mut pool, left_ns, number) {
            Ok(welcome) => welcomed = Some(welcome),
            Err(ConnectError::Refused { attempts: Attempts(attempts), .. }) => attempted.extend(attempts),
            // Another service, at the port that ours has at another address.
            Err(error @ ConnectError::NotAProcess { .. }) => stranger = Some(error),
            Err(error) => return Err(error),
        }
    }
    let welcome = match (welcomed, stranger) {
        (Some(welcome), _) => welcome,
        (None, Some(stranger)) => return Err(stranger),
        (None, None) => return Err(ConnectError::Refused { address, attempts: Attempts(attempted) }),
    };
    Ok(Opened { link, pool, welcome, number })
}

fn open_once(link: &mut Link, pool: &mut Pool, within_ns: u64, number: u64) -> Result<Welcome, ConnectError> {
    link.begin(now_ns(), within_ns, number)?;
    loop {
        let now = now_ns();
        if let Some(welcome) = link.step(now, pool)? {
            return Ok(welcome);
        }
        link.sleep(Duration::from_nanos(link.due_ns().saturating_sub(now)));
    }
}

impl Client {
    /// Connects, proves itself if it has a credential, and greets. A name is resolved once; its addresses are tried in turn, each for its
    /// share of the time, until a process answers at one, and again when the connection is lost.
    ///
    /// # Errors
    /// [`ConnectError`]. Nothing stays behind.
    pub fn connect(address: impl ToString, config: &ClientConfig) -> Result<Client, ConnectError> {
        let Opened { link, pool, welcome, number } = open(address.to_string(), config)?;
        let mut functions = Functions::default();
        functions.learn(&welcome.functions);
        Ok(Client {
            link,
            pool,
            welcome,
            functions,
            config: config.clone(),
            open: NumberMap::default(),
            done: VecDeque::new(),
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            once: VecDeque::new(),
            next_number: number + 1,
            beat: Beat::default(),
            last_submit_ns: now_ns(),
            linger_ns: BALANCED_LINGER_NS,
            is_corked: false,
            lost: None,
        })
    }

    /// What the process told about itself, when we last connected.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// What the last hello agreed on, and who the process proved to be.
    ///
    /// # Panics
    /// Never: there is no client without a hello.
    #[must_use]
    pub fn session(&self) -> &Session {
        self.link.session.as_ref().expect("a client has said hello")
    }

    /// Looks a function up.
    ///
    /// # Errors
    /// `UnknownFunction`, naming those there are.
    pub fn function(&self, name: &str) -> Result<RemoteFunction, InvokeError> {
        let number = self.functions.numbers.get(name).copied().map(RemoteFunction);
        number.ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> InvokeError {
        let text = format!("`{name}`; process {} has {}", self.welcome.process, self.welcome.functions.join(", "));
        InvokeError::UnknownFunction { text }
    }

    /// The id that a function has at the process now.
    #[inline]
    fn id_of(&self, function: u16) -> Result<u16, InvokeError> {
        match self.functions.ids.get(usize::from(function)) {
            Some(Some(id)) => Ok(*id),
            _ => {
                let name = self.functions.numbers.iter().find(|(_, number)| **number == function);
                Err(self.unknown(name.map_or("of another client", |(name, _)| name)))
            }
        }
    }

    /// Calls a function and waits for its answer.
    ///
    /// # Errors
    /// Every way a call can fail. The client can be used again after all of them; after `ConnectionLost` only if it reconnects.
    pub fn invoke(
        &mut self,
        callee: impl RemoteCallee,
        input: impl Into<Outgoing>,
    ) -> Result<ClientReply, InvokeError> {
        let call = self.submit(callee, input)?;
        // A worker may be waiting for this very core. It gets it before the first look, which would find nothing: no answer takes less.
        self.wait_for(call, self.config.wait != WaitMode::Efficient)
    }

    /// Starts a call as configured. Writes to the socket, does not block; without a connection it waits for one.
    ///
    /// # Errors
    /// `UnknownFunction`, `TooLarge` (nothing was sent), `Busy` at the process's limit of calls in flight, `ConnectionLost` when the
    /// client does not reconnect.
    pub fn submit(&mut self, callee: impl RemoteCallee, input: impl Into<Outgoing>) -> Result<CallHandle, InvokeError> {
        self.submit_with(callee, input, CallOptions::default())
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
        self.submit_with(callee, input, CallOptions { deadline: Some(deadline), ..CallOptions::default() })
    }

    /// Starts a call with options of its own.
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub fn submit_with(
        &mut self,
        callee: impl RemoteCallee,
        input: impl Into<Outgoing>,
        options: CallOptions,
    ) -> Result<CallHandle, InvokeError> {
        let delivery = options.delivery.unwrap_or(self.config.delivery);
        let now = now_ns();
        let mut letter = self.letter(now, callee, input.into(), options.deadline, delivery.flags())?;
        let waiting = self.in_flight();
        if waiting >= self.welcome.calls_max as usize {
            let text = format!("{waiting} calls are in flight on this connection, the most it may have; wait for some");
            return Err(InvokeError::Busy { text });
        }
        if delivery == Delivery::EffectivelyOnce && letter.call - self.known_below(letter.call) >= WINDOW_CALLS {
            let text = format!("an effectively-once call waits since {WINDOW_CALLS} calls ago; wait for it");
            return Err(InvokeError::Busy { text });
        }
        let Letter { call, function, flags, deadline_ns, .. } = letter;
        let mut kept = None;
        if delivery != Delivery::AtMostOnce {
            let (first, second) = letter.body.split();
            letter.body = first;
            kept = Some(second);
        }
        let state = Waiting { deadline_ns, function, flags, sent: true, again: false, cancelled: false, kept };
        let sent = self.post(now, letter)?;
        self.open.insert(call, Open::Waiting(Waiting { sent, ..state }));
        if delivery == Delivery::EffectivelyOnce {
            self.once.push_back(call);
        }
        if let Phase::Up(connection) = &self.link.phase {
            let mut by_ns = deadline_ns.saturating_add(GRACE_NS);
            if waiting == 0 {
                by_ns = by_ns.min(self.beat.begin(now, connection.stats().received_bytes));
            }
            self.link.alarm.by(by_ns, now);
        } else {
            self.broken(now);
        }
        Ok(CallHandle(call))
    }

    /// Has a function run and wants no answer. Waits for no acknowledgement but the socket's: whether it arrived, ran or
    /// failed nobody says. What has not left when the connection is lost, or finds the process at one of its bounds, is lost.
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub fn fire(&mut self, callee: impl RemoteCallee, input: impl Into<Outgoing>) -> Result<(), InvokeError> {
        let now = now_ns();
        let flags = frame::FLAG_FIRE | self.config.delivery.flags() & frame::FLAG_IDEMPOTENT;
        let letter = self.letter(now, callee, input.into(), None, flags)?;
        self.post(now, letter)?;
        if !matches!(self.link.phase, Phase::Up(_)) {
            self.broken(now);
        }
        Ok(())
    }

    /// Holds requests from now until [`Client::flush`], so that all that are submitted in between leave in one system call: 64 calls of
    /// 64 B in flight went from 218 to 348 thousand a second. More than 16 KiB are not held, and whoever asks for an answer sends what is.
    /// What is fired is held, too, and lost with a client that is dropped before.
    pub fn cork(&mut self) {
        self.is_corked = true;
    }

    /// Ends [`Client::cork`] and writes what it held, as far as the socket takes it; the rest leaves as there is room. Does not block.
    pub fn flush(&mut self) {
        self.is_corked = false;
        self.write();
    }

    fn letter(
        &mut self,
        now: u64,
        callee: impl RemoteCallee,
        input: Outgoing,
        deadline: Option<Duration>,
        flags: u16,
    ) -> Result<Letter, InvokeError> {
        let RemoteFunction(function) = callee.find(self)?;
        let Outgoing { bytes: body, is_args } = input;
        if now - self.last_submit_ns > REST_NS {
            while self.progress() {}
        }
        self.last_submit_ns = now;
        if let Some(text) = &self.lost {
            return Err(InvokeError::ConnectionLost { text: text.clone() });
        }
        let (input_bytes, max) = (body.as_ref().len() as u64, self.welcome.payload_bytes_max);
        if input_bytes > max {
            let text = format!("{input_bytes} bytes of input, process {} allows {max}", self.welcome.process);
            return Err(InvokeError::TooLarge { text });
        }
        self.linger_ns = (BALANCED_LINGER_NS + input_bytes / BYTES_PER_LINGER_NS).min(BALANCED_LINGER_NS_MAX);
        let budget_ns = nanoseconds(deadline.unwrap_or(self.config.deadline)).max(1);
        let flags = flags | if is_args { frame::FLAG_ARGS } else { 0 };
        let call = self.next_number;
        self.next_number += 1;
        Ok(Letter { call, function, flags, deadline_ns: now.saturating_add(budget_ns), body })
    }

    /// Sends a request, or puts it where it waits for a connection. Whether it was sent.
    fn post(&mut self, now: u64, letter: Letter) -> Result<bool, InvokeError> {
        let letter = if self.outbox.is_empty() && matches!(self.link.phase, Phase::Up(_)) {
            match self.send(now, letter, false)? {
                Posted::Sent => return Ok(true),
                Posted::Backlogged(_) => {
                    let text = "the process reads more slowly than we send; wait for some calls".into();
                    return Err(InvokeError::Busy { text });
                }
                Posted::Broken(letter) => {
                    self.lose("the connection broke while sending".into());
                    if let Some(text) = &self.lost {
                        return Err(InvokeError::ConnectionLost { text: format!("{text}; the call was not sent") });
                    }
                    letter
                }
            }
        } else {
            letter
        };
        let bytes = letter.body.as_ref().len() as u64;
        let full = self.outbox_bytes + bytes > BACKLOG_BYTES_MAX || self.outbox.len() >= OUTBOX_MAX;
        if full && !self.outbox.is_empty() {
            let trouble = self.link.trouble().unwrap_or_default();
            let text = format!("{} calls wait for a connection; {trouble}", self.outbox.len());
            return Err(InvokeError::Busy { text });
        }
        self.outbox_bytes += bytes;
        self.outbox.push_back(letter);
        Ok(false)
    }

    /// Writes a request to the connection there is.
    #[inline]
    fn send(&mut self, now: u64, letter: Letter, again: bool) -> Result<Posted, InvokeError> {
        let Letter { call, function: number, mut flags, deadline_ns, body } = letter;
        let function = self.id_of(number)?;
        let mut aux = 0;
        if flags & frame::FLAG_ONCE != 0 {
            aux = self.known_below(call);
            flags |= if again { frame::FLAG_AGAIN } else { 0 };
        }
        let budget_ns = deadline_ns.saturating_sub(now).max(1);
        let header = Header { kind: frame::REQUEST, function, call, budget_ns, flags, aux, ..Header::default() };
        let letter = |body| Letter { call, function: number, flags: flags & !frame::FLAG_AGAIN, deadline_ns, body };
        let Phase::Up(connection) = &mut self.link.phase else { return Ok(Posted::Broken(letter(body))) };
        // Whoever has answers to take will ask for them, and then all that was submitted meanwhile leaves in one system call.
        let held = self.is_corked || !self.done.is_empty() && flags & frame::FLAG_FIRE == 0;
        let held = held && connection.backlog().1 + body.as_ref().len() as u64 <= CORKED_BYTES_MAX;
        let queued = if held || connection.wants_write() {
            connection.queue(&header, &[], body)
        } else {
            connection.send(&header, &[], body)
        };
        match queued {
            Ok(()) if held => Ok(Posted::Sent),
            Ok(()) => {
                self.collect_sent();
                // A long input is only queued so far.
                self.write();
                Ok(Posted::Sent)
            }
            Err(SendError::Backlogged(body)) => Ok(Posted::Backlogged(letter(body))),
            Err(error) => Ok(Posted::Broken(letter(error.into_body()))),
        }
    }

    /// Writes what waits, as far as the kernel takes it. A connection that breaks here is found out by the next read.
    fn write(&mut self) {
        let Phase::Up(connection) = &mut self.link.phase else { return };
        if connection.wants_write() {
            let pool = self.pool.clone();
            let _ = connection.flush(&mut |sent| pool.take_back(sent));
        }
        self.link.mind_writes();
    }

    fn collect_sent(&mut self) {
        let Phase::Up(connection) = &mut self.link.phase else { return };
        while let Some(sent) = connection.take_sent() {
            self.pool.take_back(sent);
        }
    }

    /// The oldest `EffectivelyOnce` call without an answer, or `call`: the process need not remember those below.
    fn known_below(&mut self, call: u64) -> u64 {
        while let Some(oldest) = self.once.front()
            && !matches!(self.open.get(oldest), Some(Open::Waiting(_)))
        {
            self.once.pop_front();
        }
        self.once.front().map_or(call, |oldest| (*oldest).min(call))
    }

    /// Sends what waited for a connection, as far as there is room.
    fn send_outbox(&mut self) {
        let now = now_ns();
        while let Some(letter) = self.outbox.pop_front() {
            self.outbox_bytes -= letter.body.as_ref().len() as u64;
            let (call, is_fired) = (letter.call, letter.flags & frame::FLAG_FIRE != 0);
            let state = self.open.get_mut(&call).and_then(Open::waiting);
            // It has ended meanwhile.
            let unwanted = if is_fired { letter.deadline_ns <= now } else { state.is_none() };
            if unwanted {
                self.pool.take_back(letter.body);
                continue;
            }
            let again = state.is_some_and(|state| state.again);
            match self.send(now, letter, again) {
                Ok(Posted::Sent) => {
                    if let Some(state) = self.open.get_mut(&call).and_then(Open::waiting) {
                        state.sent = true;
                    }
                }
                Ok(Posted::Backlogged(letter)) => return self.put_back(letter),
                Ok(Posted::Broken(letter)) => {
                    self.put_back(letter);
                    self.lose("the connection broke while sending".into());
                    return;
                }
                Err(error) => self.end(call, Err(error)),
            }
        }
    }

    /// Drops what nobody waits for any more.
    fn clear_outbox(&mut self, now: u64) {
        let open = &self.open;
        self.outbox.retain(|letter| {
            let wanted = if letter.flags & frame::FLAG_FIRE != 0 {
                letter.deadline_ns > now
            } else {
                matches!(open.get(&letter.call), Some(Open::Waiting(_)))
            };
            if !wanted {
                self.outbox_bytes -= letter.body.as_ref().len() as u64;
            }
            wanted
        });
    }

    fn put_back(&mut self, letter: Letter) {
        self.outbox_bytes += letter.body.as_ref().len() as u64;
        self.outbox.push_front(letter);
    }

    /// A call ends, if it has not.
    fn end(&mut self, call: u64, result: Result<ClientReply, InvokeError>) {
        if let Some(open @ Open::Waiting(_)) = self.open.get_mut(&call) {
            let state = std::mem::replace(open, Open::Done(result));
            if let Open::Waiting(Waiting { kept: Some(kept), .. }) = state {
                self.pool.take_back(kept);
            }
            self.done.push_back(call);
        }
    }

    /// The connection is lost: every call in flight ends, or waits for the next.
    fn lose(&mut self, text: String) {
        let now = now_ns();
        let Some(mut connection) = self.link.lose(now, &text) else { return };
        let reconnects = self.config.reconnect;
        let (mut letters, mut ended) = (Vec::new(), Vec::new());
        for (call, open) in &mut self.open {
            let Some(state) = open.waiting() else { continue };
            if !state.sent && reconnects {
                continue;
            }
            let unwritten = if state.sent { connection.withdraw(frame::REQUEST, *call) } else { None };
            let written = state.sent && unwritten.is_none();
            match after_loss(state.flags, written, state.cancelled, reconnects) {
                Fate::SendAgain => {
                    let body = unwritten.unwrap_or_else(|| {
                        let kept = state.kept.take().expect("the input of a call that may be sent again is kept");
                        let (body, kept) = kept.split();
                        state.kept = Some(kept);
                        body
                    });
                    state.again |= written;
                    state.sent = false;
                    let Waiting { function, flags, deadline_ns, .. } = *state;
                    letters.push(Letter { call: *call, function, flags, deadline_ns, body });
                }
                Fate::Cancelled => ended.push((*call, InvokeError::Cancelled)),
                Fate::Lost(what) => {
                    ended.push((*call, InvokeError::ConnectionLost { text: format!("{text}; {what}") }));
                }
            }
        }
        for (call, error) in ended {
            self.end(call, Err(error));
        }
        // What is in the outbox came after all that was sent.
        letters.sort_unstable_by_key(|letter| letter.call);
        for letter in letters.into_iter().rev() {
            self.put_back(letter);
        }
        let pool = self.pool.clone();
        connection.abandon(&mut self.pool, &mut |sent| pool.take_back(sent));
        if !reconnects {
            self.outbox.clear();
            self.outbox_bytes = 0;
            self.lost = Some(text);
        }
        self.broken(now);
    }

    /// There is no connection: goes on making one, and sees to it that the clock does.
    fn broken(&mut self, now: u64) {
        while self.reconnect() {}
        if self.wants_connection() && !matches!(self.link.phase, Phase::Up(_)) {
            let deadlines = self.open.values_mut().filter_map(Open::waiting).map(|state| state.deadline_ns + GRACE_NS);
            self.link.alarm.by(deadlines.min().unwrap_or(u64::MAX).min(self.link.due_ns()), now);
        }
    }

    fn wants_connection(&self) -> bool {
        self.lost.is_none() && (self.in_flight() > 0 || !self.outbox.is_empty())
    }

    /// Goes on with the next connection. False when there is nothing to do for it now.
    fn reconnect(&mut self) -> bool {
        if !self.wants_connection() {
            return false;
        }
        let now = now_ns();
        let stepped = match &self.link.phase {
            Phase::Up(_) => return false,
            Phase::Down { retry_ns } if now < *retry_ns => return false,
            Phase::Down { .. } => {
                let number = self.next_number;
                self.next_number += 1;
                let within_ns = nanoseconds(self.config.connect_within);
                self.link.begin(now, within_ns, number).map(|()| None)
            }
            Phase::Connecting { .. } | Phase::Hello { .. } | Phase::Welcome { .. } => {
                match self.link.step(now, &mut self.pool) {
                    Ok(None) => return false,
                    stepped => stepped,
                }
            }
        };
        match stepped {
            Ok(None) => {}
            Ok(Some(welcome)) => self.welcomed(now, welcome),
            Err(error) => {
                self.link.fail(now, &error);
                self.link.alarm.by(self.link.due_ns(), now);
            }
        }
        true
    }

    /// There is a connection again.
    fn welcomed(&mut self, now: u64, welcome: Welcome) {
        if welcome.incarnation != self.welcome.incarnation {
            let mut ended = Vec::new();
            for (call, open) in &mut self.open {
                if let Some(state) = open.waiting()
                    && let Fate::Lost(text) = after_restart(state.flags, state.again)
                {
                    ended.push((*call, InvokeError::ConnectionLost { text: text.into() }));
                }
            }
            for (call, error) in ended {
                self.end(call, Err(error));
            }
        }
        self.functions.learn(&welcome.functions);
        self.welcome = welcome;
        if let Phase::Up(connection) = &self.link.phase {
            let by_ns = self.beat.begin(now, connection.stats().received_bytes);
            self.link.alarm.by(by_ns, now);
        }
        self.send_outbox();
    }

    /// Takes what has arrived and sends what waits, without blocking. False when there was nothing.
    fn progress(&mut self) -> bool {
        self.progress_with(Connection::receive)
    }

    fn progress_with(&mut self, receive: Receive) -> bool {
        let Phase::Up(connection) = &mut self.link.phase else { return self.reconnect() };
        if connection.wants_write() {
            let pool = self.pool.clone();
            let flushed = connection.flush(&mut |sent| pool.take_back(sent));
            if let Err(error) = flushed {
                self.lose(error.with_cause());
                return true;
            }
            self.link.mind_writes();
        }
        if !self.outbox.is_empty() {
            self.send_outbox();
        }
        let Phase::Up(connection) = &mut self.link.phase else { return true };
        match receive(connection, &mut self.link.scratch, &mut self.pool) {
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
                self.lose(error.with_cause());
                true
            }
        }
    }

    fn take(&mut self, frame: Frame<Vec<u8>>) -> Result<(), String> {
        let Frame { header, body, .. } = frame;
        let bytes = match body {
            Received::Whole(bytes) => bytes,
            Received::Refused { bytes, .. } => {
                return Err(format!("the process sent {bytes} bytes, above every limit"));
            }
        };
        let reply = self.pool.reply(header.status, bytes);
        match header.kind {
            frame::REPLY => {}
            // That it came is all it says.
            frame::PONG => return Ok(()),
            kind => return Err(format!("the process sent a frame of kind {kind}")),
        }
        // An answer to a call that was cancelled or timed out here finds nobody.
        let Some(open @ Open::Waiting(_)) = self.open.get_mut(&header.call) else { return Ok(()) };
        let result = match Code::from_wire(header.flags) {
            Some(Code::Ok) => Ok(reply),
            Some(code) => Err(InvokeError::from_wire(code, header.status, &reply)),
            None => Err(InvokeError::Protocol { text: format!("answer with unknown code {}", header.flags) }),
        };
        let state = std::mem::replace(open, Open::Done(result));
        if let Open::Waiting(Waiting { kept: Some(kept), .. }) = state {
            self.pool.take_back(kept);
        }
        self.done.push_back(header.call);
        Ok(())
    }

    /// Waits for one call. Answers to other calls are kept until they are asked for.
    ///
    /// # Errors
    /// Every way a call can fail; `Protocol` for a handle that was waited for before.
    pub fn wait(&mut self, call: CallHandle) -> Result<ClientReply, InvokeError> {
        self.wait_for(call, false)
    }

    fn wait_for(&mut self, call: CallHandle, mut yields_first: bool) -> Result<ClientReply, InvokeError> {
        let CallHandle(number) = call;
        let (mut since_ns, mut frames) = (0, 0);
        loop {
            match self.open.get(&number) {
                Some(Open::Waiting(_)) if std::mem::take(&mut yields_first) => {
                    // What was held until now leaves first.
                    self.write();
                    rustix::thread::sched_yield();
                }
                Some(Open::Waiting(_)) => {}
                Some(Open::Done(_)) => {
                    // Whoever waited for this one may not come back for those that held requests up.
                    self.write();
                    return self.finish(number);
                }
                None => return Err(InvokeError::Protocol { text: format!("call {number} is not in flight here") }),
            }
            // No call's deadline comes before the alarm.
            if self.config.wait == WaitMode::Efficient
                && let Phase::Up(connection) = &self.link.phase
                && !connection.wants_write()
                && self.outbox.is_empty()
            {
                let left_ns = self.link.alarm.due_ns().saturating_sub(now_ns());
                if left_ns >= READ_NS {
                    self.progress_with(Connection::receive_waiting);
                    continue;
                }
                if connection.drained() {
                    // The last read emptied the socket: a look before sleeping would find nothing.
                    self.link.sleep(Duration::from_nanos(left_ns));
                }
            }
            if frames < FRAMES_PER_LOOK && self.progress() {
                (since_ns, frames) = (0, frames + 1);
                continue;
            }
            frames = 0;
            let now = now_ns();
            let due_ns = self.link.alarm.due_ns();
            if now >= due_ns {
                self.tick(now);
                continue;
            }
            if since_ns == 0 {
                since_ns = now;
            }
            let waited_ns = now - since_ns;
            match self.config.wait {
                WaitMode::Latency | WaitMode::Balanced if waited_ns < LOOK_NS && self.open.len() == 1 => {}
                WaitMode::Latency => rustix::thread::sched_yield(),
                WaitMode::Balanced if waited_ns < self.linger_ns => rustix::thread::sched_yield(),
                WaitMode::Balanced | WaitMode::Efficient => self.link.sleep(Duration::from_nanos(due_ns - now)),
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

    /// Whichever call is done next, without blocking; `None` when none is. Meant for event loops.
    pub fn poll(&mut self) -> Option<(CallHandle, Result<ClientReply, InvokeError>)> {
        // What is done is handed out before more is read.
        if self.done.is_empty() {
            // A read that came back short has brought all there is: another would find nothing.
            let mut frames = 0;
            while (self.done.is_empty() || !self.link.is_drained()) && frames < FRAMES_PER_LOOK && self.progress() {
                frames += 1;
            }
            if (self.done.is_empty() || frames == FRAMES_PER_LOOK) && self.link.alarm.due_ns() != u64::MAX {
                let now = now_ns();
                if now >= self.link.alarm.due_ns() {
                    self.tick(now);
                }
            }
        }
        let number = *self.done.front()?;
        let ended = self.finish(number);
        if self.done.is_empty() {
            // Nobody has to come back for an answer: what was held until then leaves now.
            self.write();
        }
        Some((CallHandle(number), ended))
    }

    /// Hands every call that is done to `take`, without blocking. Gives their number.
    pub fn drain(&mut self, take: &mut impl FnMut(CallHandle, Result<ClientReply, InvokeError>)) -> usize {
        let mut drained = 0;
        while let Some((call, result)) = self.poll() {
            take(call, result);
            drained += 1;
        }
        drained
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
            if self.config.wait == WaitMode::Latency {
                rustix::thread::sched_yield();
            } else {
                let left_ns = self.link.alarm.due_ns().saturating_sub(now_ns());
                self.link.sleep(Duration::from_nanos(left_ns));
            }
        }
    }

    /// Time passes: deadlines, heartbeats, the next attempt to connect. Afterwards nothing is due.
    fn tick(&mut self, now: u64) {
        let mut due = Vec::new();
        let mut next_ns = u64::MAX;
        for (call, open) in &mut self.open {
            if let Some(state) = open.waiting() {
                let until_ns = state.deadline_ns.saturating_add(GRACE_NS);
                if until_ns <= now {
                    due.push((*call, !state.sent && !state.again));
                } else {
                    next_ns = next_ns.min(until_ns);
                }
            }
        }
        if !due.is_empty() {
            let trouble = self.link.trouble();
            for (call, unsent) in due {
                let what = if unsent { "; it was not sent" } else { "" };
                let text = match &trouble {
                    Some(trouble) => format!("no answer arrived within the deadline; {trouble}{what}"),
                    None => format!("no answer arrived within the deadline{what}"),
                };
                self.end(call, Err(InvokeError::Timeout { text }));
            }
        }
        if !self.outbox.is_empty() {
            self.clear_outbox(now);
        }
        while self.reconnect() {}
        if self.in_flight() > 0 && matches!(self.link.phase, Phase::Up(_)) {
            next_ns = next_ns.min(self.look_at_the_beat(now));
        }
        if self.wants_connection() {
            next_ns = next_ns.min(self.link.due_ns());
        }
        self.link.alarm.set(next_ns.max(now + 1));
    }

    /// Finds out whether the process is still there. Gives the time to look again.
    fn look_at_the_beat(&mut self, now: u64) -> u64 {
        let Phase::Up(connection) = &mut self.link.phase else { return u64::MAX };
        match self.beat.look(now, connection.stats().received_bytes) {
            Pulse::Fine { next_ns } => next_ns,
            Pulse::Ask { next_ns } => {
                let header = Header { kind: frame::PING, ..Header::default() };
                // A failure is found by whoever reads next; a backlog means that there is enough to answer already.
                let _ = connection.send(&header, &[], OutgoingBytes::EMPTY);
                self.collect_sent();
                self.link.mind_writes();
                next_ns
            }
            Pulse::Lost { .. } if is_taking(connection) => self.beat.begin(now, connection.stats().received_bytes),
            Pulse::Lost { silent_ms } => {
                self.lose(format!("the process is silent since {silent_ms} ms"));
                u64::MAX
            }
        }
    }

    /// Tells the process that nobody waits for the call any more. Waiting for it gives `Cancelled`, or its result if that was quicker.
    ///
    /// # Errors
    /// `Busy` when the process reads more slowly than we send; `Protocol` for a handle that is not in flight.
    pub fn cancel(&mut self, call: CallHandle) -> Result<(), InvokeError> {
        let state = match self.open.get_mut(&call.0) {
            Some(Open::Waiting(state)) => state,
            Some(Open::Done(_)) => return Ok(()),
            None => return Err(InvokeError::Protocol { text: format!("call {} is not in flight here", call.0) }),
        };
        let Phase::Up(connection) = &mut self.link.phase else {
            self.end(call.0, Err(InvokeError::Cancelled));
            return Ok(());
        };
        let withdrawn = if state.sent { connection.withdraw(frame::REQUEST, call.0) } else { None };
        if !state.sent || withdrawn.is_some() {
            // Nobody there knows of it.
            if let Some(body) = withdrawn {
                self.pool.take_back(body);
            }
            self.end(call.0, Err(InvokeError::Cancelled));
            return Ok(());
        }
        let header = Header { kind: frame::CANCEL, call: call.0, ..Header::default() };
        match connection.send(&header, &[], OutgoingBytes::EMPTY) {
            Err(SendError::Backlogged(_)) => {
                let text = "the process reads more slowly than we send; wait for some calls".into();
                return Err(InvokeError::Busy { text });
            }
            Ok(()) => {
                state.cancelled = true;
                self.collect_sent();
                self.link.mind_writes();
            }
            Err(_) => {
                state.cancelled = true;
                self.lose("the connection broke while sending".into());
            }
        }
        Ok(())
    }

    /// Calls that have no answer yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.open.len() - self.done.len()
    }

    /// Whether there is a connection now. Without one, the next call makes it, or ends as its delivery says.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self.link.phase, Phase::Up(_))
    }
}

/// Requests that may wait for a connection, besides calls in flight: those that nobody waits for.
const OUTBOX_MAX: usize = 1 << 16;

/// Whether the other side is taking a long input over a slow line: then our question waits behind it. One that is stopped takes what
/// fits its socket, and then nothing.
fn is_taking(connection: &Socket) -> bool {
    let taking = |acknowledged: praas_transport::Acknowledged| {
        acknowledged.in_flight && acknowledged.last < Duration::from_secs(2)
    };
    connection.acknowledged().is_ok_and(taking)
}

/// What became of a request.
#[derive(Debug)]
enum Posted {
    Sent,
    Backlogged(Letter),
    Broken(Letter),
}

impl AsFd for Client {
    /// Readable when [`Client::poll`] has something to do. The same for the life of the client.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.fd()
    }
}
