//! What a process is told when it starts: one struct, validated once, from a file, from flags or from code.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

use praas_transport::hello::{Secret, SecretError, is_name};
use praas_transport::tcp::on_loopback;
use serde::{Deserialize, Serialize};

use crate::members::{ADDRESSES_MAX, Member, MembersError, State, TABLE_BYTES_MAX, Table};

/// How workers talk to the controller: shared-memory rings (the product) or POSIX queues (the paper's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Ipc {
    /// Single-writer rings in sealed shared memory. Payloads are handed over, never copied.
    #[default]
    Ring,
    /// Two POSIX message queues a worker, header and chunks, as the paper's prototype has it.
    #[serde(rename = "mq")]
    Queue,
}

/// Which reactor carries connections.
pub use praas_transport::reactor::Choice as ReactorChoice;
/// Which congestion control connections use.
pub use praas_transport::tcp::{Congestion, CongestionError};

/// On which connections frames have checks: a tag of each header, made with the key of the hello, and a checksum of key and payload.
/// A connection has them when either end asks, and nobody between the two can ask otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Checks {
    /// Where bytes leave this host. On loopback each header has a checksum, payloads have none.
    #[default]
    Auto,
    /// Everywhere.
    Always,
}

/// A word that knows how to be read and shown.
mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T: FromStr<Err = String>, D: Deserializer<'de>>(reader: D) -> Result<T, D::Error> {
        String::deserialize(reader)?.parse().map_err(serde::de::Error::custom)
    }
}

/// How a participant waits for its next message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum WaitMode {
    /// Spin wherever a core is free for it, and yield between looks after 50 us. An idle process may burn the cores it was given.
    Latency,
    /// Spin for 5 us, then yield between looks up to 100 us, then sleep. An idle process uses no CPU.
    #[default]
    Balanced,
    /// Sleep at once.
    Efficient,
}

/// When another process is connected with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Dial {
    /// When something is sent to it first.
    #[default]
    FirstUse,
    /// As soon as it is told of: the first message need not wait for a connection.
    Start,
}

/// What becomes of messages and calls to a process that is swapped out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum WhenSwapped {
    /// They wait here until it is active again, or their sender's time is over.
    #[default]
    Wait,
    /// They end at once as `Swapped`.
    Refuse,
}

/// Which cores the participants are put on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(try_from = "String", into = "String")]
pub enum Pin {
    /// In `latency` mode one core each, as far as cores go; otherwise the kernel's scheduler decides.
    #[default]
    Auto,
    /// Never pin.
    None,
    /// These cores, handed out in this order: the controller the first, workers the next, and round again.
    Cores(Vec<usize>),
}

macro_rules! names {
    ($type:ty, $what:literal, $($name:literal => $value:pat => $make:expr),+) => {
        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $($value => $name),+ })
            }
        }
        impl std::str::FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok($make),)+
                    _ => Err(format!(concat!("`{}` is not ", $what, ": use one of ", $("`", $name, "` "),+), text)),
                }
            }
        }
    };
}
names!(Ipc, "a channel", "ring" => Ipc::Ring => Ipc::Ring, "mq" => Ipc::Queue => Ipc::Queue);
names!(Checks, "a choice of checks", "auto" => Checks::Auto => Checks::Auto, "always" => Checks::Always => Checks::Always);
names!(Dial, "a time to dial", "first-use" => Dial::FirstUse => Dial::FirstUse, "start" => Dial::Start => Dial::Start);
names!(WhenSwapped, "a choice", "wait" => WhenSwapped::Wait => WhenSwapped::Wait, "refuse" => WhenSwapped::Refuse => WhenSwapped::Refuse);
names!(WaitMode, "a wait mode",
    "latency" => WaitMode::Latency => WaitMode::Latency,
    "balanced" => WaitMode::Balanced => WaitMode::Balanced,
    "efficient" => WaitMode::Efficient => WaitMode::Efficient);

impl std::str::FromStr for Pin {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Pin::Auto),
            "none" => Ok(Pin::None),
            list => list
                .split(',')
                .map(|core| core.trim().parse())
                .collect::<Result<Vec<usize>, _>>()
                .map(Pin::Cores)
                .map_err(|_| format!("`{text}` is not a placement: use `auto`, `none` or cores such as `0,1`")),
        }
    }
}

impl TryFrom<String> for Pin {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::fmt::Display for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Pin::Auto => f.write_str("auto"),
            Pin::None => f.write_str("none"),
            Pin::Cores(cores) => {
                let cores: Vec<String> = cores.iter().map(usize::to_string).collect();
                f.write_str(&cores.join(","))
            }
        }
    }
}

impl From<Pin> for String {
    fn from(pin: Pin) -> String {
        pin.to_string()
    }
}

/// Everything a process can be told. Every field has a default except `worker`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProcessConfig {
    /// Name of this cloud process, 1..=64 bytes of `[A-Za-z0-9._-]`. Default: a random one.
    pub process: String,
    /// The worker program and its arguments.
    pub worker: Vec<String>,
    /// Where clients connect: `ADDRESS:PORT`, `[IPV6]:PORT` or `NAME:PORT`, of which the first address that can be had is taken. Port 0 takes a free one.
    /// Other than loopback only with a key. Default `127.0.0.1:0`.
    pub listen: String,
    /// File with the application key, mode 0600. With a key, connections have to prove that they hold a credential made from it.
    pub key_file: Option<PathBuf>,
    /// The same from an inherited descriptor, which is read to its end.
    pub key_fd: Option<u32>,
    /// With a key: serve loopback connections without one as well. Default false.
    pub plaintext: bool,
    /// Connections that may be in the middle of their hello; one more takes the place of the oldest. Default 1024.
    pub unauthenticated_max: u32,
    /// Other processes, by name: `HOST:PORT` of each, all taken to be active. One connection is kept with each that is told of this one, too. Needs a
    /// key and a name of our own. The first table of members that the control plane sends takes its place. Default: none.
    pub peers: BTreeMap<String, String>,
    /// In place of `peers`: a file with a table of members ([`crate::members::Table`]), with their states. Default: none.
    pub members: Option<PathBuf>,
    /// Most other processes known at a time, deleted ones not among them. Default 1024.
    pub peers_max: u32,
    /// When another process is connected with. Default `first-use`.
    pub dial: Dial,
    /// What becomes of messages and calls to a process that is swapped out. Default `wait`.
    pub when_swapped: WhenSwapped,
    /// Workers kept running, 1..=63. Default 2.
    pub workers: u8,
    /// Most workers ever running, when nested calls need more than `workers`, `workers`..=63. Default 8.
    pub workers_max: u8,
    /// The channel to workers.
    pub ipc: Ipc,
    /// How everybody waits.
    pub wait: WaitMode,
    /// What carries connections: io_uring, epoll, or io_uring where it works and else epoll.
    #[serde(with = "as_text")]
    pub reactor: ReactorChoice,
    /// Congestion control of connections with clients and peers: `auto` (reno on this host, the system's otherwise), `system`, or a
    /// name that the kernel knows. Default `auto`.
    #[serde(with = "as_text")]
    pub congestion: Congestion,
    /// Which connections have tags and checksums. Default `auto`: those that leave this host.
    pub checks: Checks,
    /// Which cores everybody runs on.
    pub pin: Pin,
    /// Whether workers may lease each other and talk without the controller (ring only). Default true.
    pub leases: bool,
    /// Whether the connection of a client that calls one function, one call at a time, is lent to a worker, which then talks to it without us
    /// (ring only). Default false.
    pub lease_connections: bool,
    /// Whether processes of this host and user that are told of each other talk through shared memory (ring only). They can then read all payloads
    /// of each other. Default true.
    pub near: bool,
    /// Largest input or output of a call, bytes, up to 1 GiB. Default 64 MiB.
    pub payload_bytes_max: u64,
    /// Payload memory of each participant, bytes, a multiple of 2 MiB; touched only as used. With queues it bounds what
    /// payloads take of the controller's heap. Default 256 MiB.
    pub arena_bytes: u64,
    /// Memory of all state together, bytes: keys, values and 32 bytes an object, up to 1 TiB. Over rings an object lies in the payload memory of
    /// the worker that wrote it, which bounds it, too; what is copied, moved from a dead worker, or a long key, lies in the controller's, and takes
    /// no more than three fourths of that. Default 1 GiB.
    pub state_bytes_max: u64,
    /// Largest object of the state, bytes, up to 64 GiB; over queues no larger than a payload. Default 1 GiB.
    pub state_object_bytes_max: u64,
    /// Most objects of the state, 1 to 2^24. Default 2^20.
    pub state_objects_max: u32,
    /// Whether everything that one worker leaves for another (state, messages, inputs and outputs of calls) is copied by the controller first, so that
    /// nobody can change what another reads. Workers then do not lease each other, and neither the process nor they can be traced, or leave core
    /// dumps; `root` may look into them all the same, for which there is `worker_uids`. Default false.
    pub isolate: bool,
    /// Run worker `n` as the user and group `worker_uids + n`, without other groups: then workers can neither signal nor trace each other or the process.
    /// Needs root, and a program that those users may run. 1 to 2^31. Default: workers run as the process's user.
    pub worker_uids: Option<u32>,
    /// Messages that may wait in the mailbox, 1 to 2^24. From 64 on the last eighth, of bytes as well, is for senders who have little there: a 64th each.
    /// Default 65 536.
    pub mailbox_messages_max: u32,
    /// Bytes of them, keys and payloads, up to 1 TiB. Default 128 MiB.
    pub mailbox_bytes_max: u64,
    /// Deadline of a call that names none, ms. Default 60 000.
    pub deadline_ms: u64,
    /// Calls waiting for a worker before callers are told `Busy`. Default 4096.
    pub queue_max: u32,
    /// Calls one connection may have in flight before it is told `Busy`. Default 1024.
    pub connection_calls_max: u32,
    /// Connections served at once; more are closed on arrival. Default 1024.
    pub connections_max: u32,
    /// Memory for results of `EffectivelyOnce` calls, kept until their clients have them, bytes, up to 64 GiB. At the bound the
    /// oldest go first, and whoever asks for one of those again is told `Expired`. Default 64 MiB.
    pub results_bytes_max: u64,
    /// How long a worker past its call's deadline may go on before SIGTERM, and again before SIGKILL, ms. Default 100.
    pub grace_ms: u64,
    /// How long running calls may go on after SIGTERM to the process, ms. Default 5000.
    pub drain_ms: u64,
    /// How long a worker may take to register, ms. Default 5000.
    pub start_ms: u64,
    /// Memory of one worker and what it starts, bytes, payloads in its arena included; 0 is no limit. At it the kernel kills the worker (in a
    /// control group) or refuses it memory (elsewhere). Over rings at least `arena_bytes` and 32 MiB, so that payloads are refused before. Default 0: what
    /// a function needs is its own affair, and the container of a process bounds all of it.
    pub worker_memory_max: u64,
    /// Processes and threads of one worker; 0 is no limit. A worker is one of one thread as it starts. Default 0.
    pub worker_processes_max: u32,
    /// Folder for what workers print, which goes to `NAME.log` there, NAME being this process's. Default: our stderr.
    pub worker_log: Option<PathBuf>,
    /// Length of that file at which it is put aside, bytes. Default 16 MiB.
    pub worker_log_bytes_max: u64,
    /// How many of those put aside are kept. Default 4.
    pub worker_log_old_files: u32,
    /// Lines of one worker that are shown a second; what it prints beyond is counted. Default 1000.
    pub worker_log_lines_max: u32,
}

/// What a worker takes of its memory before its function does anything, and some room: beside its arena at the least.
pub(crate) const WORKER_MEMORY_LEAST: u64 = 32 << 20;

impl Default for ProcessConfig {
    fn default() -> Self {
        ProcessConfig {
            process: String::new(),
            worker: Vec::new(),
            listen: "127.0.0.1:0".into(),
            key_file: None,
            key_fd: None,
            plaintext: false,
            unauthenticated_max: 1024,
            peers: BTreeMap::new(),
            members: None,
            peers_max: 1024,
            dial: Dial::default(),
            when_swapped: WhenSwapped::default(),
            workers: 2,
            workers_max: 8,
            ipc: Ipc::default(),
            wait: WaitMode::default(),
            reactor: ReactorChoice::default(),
            congestion: Congestion::default(),
            checks: Checks::default(),
            pin: Pin::default(),
            leases: true,
            lease_connections: false,
            near: true,
            payload_bytes_max: 64 << 20,
            arena_bytes: 256 << 20,
            state_bytes_max: 1 << 30,
            state_object_bytes_max: 1 << 30,
            state_objects_max: 1 << 20,
            isolate: false,
            worker_uids: None,
            mailbox_messages_max: 65_536,
            mailbox_bytes_max: 128 << 20,
            deadline_ms: 60_000,
            queue_max: 4096,
            connection_calls_max: 1024,
            connections_max: 1024,
            results_bytes_max: 64 << 20,
            grace_ms: 100,
            drain_ms: 5000,
            start_ms: 5000,
            worker_memory_max: 0,
            worker_processes_max: 0,
            worker_log: None,
            worker_log_bytes_max: 16 << 20,
            worker_log_old_files: 4,
            worker_log_lines_max: 1000,
        }
    }
}

/// Why a configuration was refused. Nothing was started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {path}: {source}; check the path given to --config")]
    Read {
        /// The path as given.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not what we expect.
    #[error("configuration {path}, line {line}: {text}")]
    Parse {
        /// The path as given.
        path: String,
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        text: String,
    },
    /// A value is out of its range.
    #[error("{field} = {value} is out of range: {range}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be.
        range: &'static str,
    },
    /// A core to pin to is none that we may run on.
    #[error("pin = {pin}: core {core} is not allowed here; allowed are {allowed}; check --pin")]
    Core {
        /// As configured.
        pin: Pin,
        /// The first core that is not allowed.
        core: usize,
        /// Those that are.
        allowed: String,
    },
    /// No worker program was named.
    #[error("no worker program: name one with --worker PROGRAM or `worker = [\"PROGRAM\"]`")]
    NoWorker,
    /// Other machines are served with a key only.
    #[error(
        "listen address {0} is not loopback: give --key-file FILE (`praas key new FILE` makes one), without --plaintext"
    )]
    NotLoopback(SocketAddr),
    /// The listen address is none.
    #[error("listen = `{listen}`: {source}; give HOST:PORT, such as 127.0.0.1:4000 or [::1]:0")]
    Listen {
        /// As configured.
        listen: String,
        /// What the resolver said.
        source: std::io::Error,
    },
    /// The name of a peer is none, or ours.
    #[error("peer `{name}`: {why}")]
    PeerName {
        /// As configured.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The address of a peer is none.
    #[error("peer {name} = `{address}`: {source}; give HOST:PORT, such as 127.0.0.1:4000")]
    PeerAddress {
        /// Its name.
        name: String,
        /// As configured.
        address: String,
        /// What the resolver said.
        source: std::io::Error,
    },
    /// The file with the members cannot be read.
    #[error("cannot read the members {path}: {source}; check the path given to --members")]
    ReadMembers {
        /// The path as given.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// What the file with the members or the list of peers says is no table, or contradicts itself.
    #[error("members from {from}: {error}")]
    Members {
        /// The path as given, or what of the configuration.
        from: String,
        /// What is wrong with it.
        error: MembersError,
    },
    /// Two lists of other processes.
    #[error("both members and peers are given: write the peers into the file that --members names")]
    TwoLists,
    /// Peers prove who they are, and we have nothing to do it with.
    #[error("peers need {0}")]
    PeersNeed(&'static str),
    /// The kernel does not take this congestion control from us.
    #[error("{0}; check --congestion")]
    Congestion(#[from] CongestionError),
    /// Two keys.
    #[error("both key_file and key_fd are given: use one of --key-file and --key-fd")]
    TwoKeys,
    /// Workers on queues have no memory of their own to receive into.
    #[error("lease_connections needs rings: use --ipc ring, or leave --lease-connections out")]
    LentOverQueues,
    /// Only root may start workers as other users.
    #[error(
        "worker_uids needs root, and this process runs as user {user}: start it as root, or leave --worker-uids out"
    )]
    WorkerUids {
        /// Ours.
        user: u32,
    },
    /// There is no key where one should be.
    #[error("application key: {0}")]
    Key(#[from] SecretError),
}

impl ProcessConfig {
    /// Reads a TOML file. Keys it does not know are errors.
    ///
    /// # Errors
    /// `Read` and `Parse`; ranges are checked by [`ProcessConfig::validate`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
        toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: shown,
            line: error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count()),
            text: error.message().replace('\n', " "),
        })
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let range = |ok: bool, field, value: String, range| {
            if ok { Ok(()) } else { Err(ConfigError::Range { field, value, range }) }
        };
        if self.worker.is_empty() {
            return Err(ConfigError::NoWorker);
        }
        if self.key_file.is_some() && self.key_fd.is_some() {
            return Err(ConfigError::TwoKeys);
        }
        if self.lease_connections && self.ipc == Ipc::Queue {
            return Err(ConfigError::LentOverQueues);
        }
        let name_ok =
            self.process.len() <= 64 && self.process.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        range(name_ok, "process", format!("`{}`", self.process), "at most 64 bytes of A-Z a-z 0-9 . _ -")?;
        range(self.peers_max <= 1 << 16, "peers_max", self.peers_max.to_string(), "0 to 65536")?;
        range(
            self.peers.len() <= self.peers_max as usize,
            "peers",
            format!("{} of them", self.peers.len()),
            "at most `peers_max`; see --peers-max",
        )?;
        self.validate_peers()?;
        range((1..=63).contains(&self.workers), "workers", self.workers.to_string(), "1 to 63")?;
        range(
            (self.workers..=63).contains(&self.workers_max),
            "workers_max",
            self.workers_max.to_string(),
            "`workers` to 63",
        )?;
        range(
            (1..=1 << 30).contains(&self.payload_bytes_max),
            "payload_bytes_max",
            self.payload_bytes_max.to_string(),
            "1 byte to 1 GiB",
        )?;
        range(
            self.arena_bytes.is_multiple_of(2 << 20) && (2 << 20..=64 << 30).contains(&self.arena_bytes),
            "arena_bytes",
            self.arena_bytes.to_string(),
            "a multiple of 2 MiB, 2 MiB to 64 GiB",
        )?;
        range(
            (1..=1 << 40).contains(&self.state_bytes_max),
            "state_bytes_max",
            self.state_bytes_max.to_string(),
            "1 byte to 1 TiB",
        )?;
        range(
            (1..=64 << 30).contains(&self.state_object_bytes_max),
            "state_object_bytes_max",
            self.state_object_bytes_max.to_string(),
            "1 byte to 64 GiB",
        )?;
        range(
            (1..=1 << 24).contains(&self.state_objects_max),
            "state_objects_max",
            self.state_objects_max.to_string(),
            "1 to 16777216",
        )?;
        range(
            self.worker_uids.is_none_or(|first| (1..=1 << 31).contains(&first)),
            "worker_uids",
            self.worker_uids.unwrap_or_default().to_string(),
            "1 to 2147483648",
        )?;
        if self.worker_uids.is_some() && !rustix::process::geteuid().is_root() {
            return Err(ConfigError::WorkerUids { user: rustix::process::geteuid().as_raw() });
        }
        range(
            (1..=1 << 24).contains(&self.mailbox_messages_max),
            "mailbox_messages_max",
            self.mailbox_messages_max.to_string(),
            "1 to 16777216",
        )?;
        range(
            (1..=1 << 40).contains(&self.mailbox_bytes_max),
            "mailbox_bytes_max",
            self.mailbox_bytes_max.to_string(),
            "1 byte to 1 TiB",
        )?;
        range(
            (1..=86_400_000).contains(&self.deadline_ms),
            "deadline_ms",
            self.deadline_ms.to_string(),
            "1 ms to a day",
        )?;
        range((1..=1 << 20).contains(&self.queue_max), "queue_max", self.queue_max.to_string(), "1 to 1048576")?;
        range(
            (1..=1 << 16).contains(&self.connection_calls_max),
            "connection_calls_max",
            self.connection_calls_max.to_string(),
            "1 to 65536",
        )?;
        range(
            (1..=1 << 16).contains(&self.connections_max),
            "connections_max",
            self.connections_max.to_string(),
            "1 to 65536",
        )?;
        range(
            self.results_bytes_max <= 64 << 30,
            "results_bytes_max",
            self.results_bytes_max.to_string(),
            "0 to 64 GiB",
        )?;
        range(
            (1..=1 << 12).contains(&self.unauthenticated_max),
            "unauthenticated_max",
            self.unauthenticated_max.to_string(),
            "1 to 4096",
        )?;
        for (field, value) in [("grace_ms", self.grace_ms), ("drain_ms", self.drain_ms), ("start_ms", self.start_ms)] {
            range((1..=600_000).contains(&value), field, value.to_string(), "1 ms to 10 minutes")?;
        }
        self.validate_workers_bounds()
    }

    fn validate_workers_bounds(&self) -> Result<(), ConfigError> {
        let range = |ok: bool, field, value: u64, range| {
            if ok { Ok(()) } else { Err(ConfigError::Range { field, value: value.to_string(), range }) }
        };
        let arena_bytes = if self.ipc == Ipc::Ring { self.arena_bytes } else { 0 };
        let least = arena_bytes + WORKER_MEMORY_LEAST;
        range(
            self.worker_memory_max == 0 || (least..=1 << 46).contains(&self.worker_memory_max),
            "worker_memory_max",
            self.worker_memory_max,
            "0 for none, or at least 32 MiB and, over rings, the bytes of --arena-bytes beside them, up to 64 TiB",
        )?;
        range(
            self.worker_processes_max <= 1 << 22,
            "worker_processes_max",
            self.worker_processes_max.into(),
            "0 for none, or up to 4194304",
        )?;
        range(
            (64 << 10..=1 << 40).contains(&self.worker_log_bytes_max),
            "worker_log_bytes_max",
            self.worker_log_bytes_max,
            "64 KiB to 1 TiB",
        )?;
        range(
            self.worker_log_old_files <= 1000,
            "worker_log_old_files",
            self.worker_log_old_files.into(),
            "0 to 1000",
        )?;
        range(
            (1..=1_000_000).contains(&self.worker_log_lines_max),
            "worker_log_lines_max",
            self.worker_log_lines_max.into(),
            "1 to 1000000",
        )
    }

    /// The addresses that `listen` stands for, in the resolver's order; may ask a name server.
    ///
    /// # Errors
    /// `Listen`; `NotLoopback` when one of them is not, and there is no key or plain text is allowed.
    pub fn listen_addresses(&self) -> Result<Vec<SocketAddr>, ConfigError> {
        let failed = |source| ConfigError::Listen { listen: self.listen.clone(), source };
        let addresses: Vec<SocketAddr> = self.listen.to_socket_addrs().map_err(failed)?.collect();
        let keyed = self.key_file.is_some() || self.key_fd.is_some();
        match addresses.iter().find(|address| !on_loopback(**address)) {
            Some(&outside) if !keyed || self.plaintext => Err(ConfigError::NotLoopback(outside)),
            _ if addresses.is_empty() => Err(failed(std::io::ErrorKind::NotFound.into())),
            _ => Ok(addresses),
        }
    }

    fn validate_peers(&self) -> Result<(), ConfigError> {
        if self.peers.is_empty() && self.members.is_none() {
            return Ok(());
        }
        if !self.peers.is_empty() && self.members.is_some() {
            return Err(ConfigError::TwoLists);
        }
        if self.process.is_empty() {
            return Err(ConfigError::PeersNeed("a name that they know us by: give --process NAME"));
        }
        if self.key_file.is_none() && self.key_fd.is_none() {
            return Err(ConfigError::PeersNeed("a key, the same for all: give --key-file FILE"));
        }
        let bad = self.peers.keys().find_map(|name| match name {
            name if !is_name(name.as_bytes()) => Some((name, "a name is 1 to 64 bytes of A-Z a-z 0-9 . _ -")),
            name if *name == self.process => Some((name, "this is our own name")),
            _ => None,
        });
        match bad {
            Some((name, why)) => Err(ConfigError::PeerName { name: name.clone(), why }),
            None => Ok(()),
        }
    }

    /// The peers and the addresses that each stands for; may ask a name server.
    ///
    /// # Errors
    /// `PeerAddress`.
    pub fn peer_addresses(&self) -> Result<Vec<(String, Vec<SocketAddr>)>, ConfigError> {
        let peers = self.peers.iter().map(|(name, address)| {
            let failed = |source| ConfigError::PeerAddress { name: name.clone(), address: address.clone(), source };
            let addresses: Vec<SocketAddr> = address.to_socket_addrs().map_err(failed)?.collect();
            if addresses.is_empty() {
                Err(failed(std::io::ErrorKind::NotFound.into()))
            } else {
                Ok((name.clone(), addresses))
            }
        });
        peers.collect()
    }

    /// The members that the process starts with, if it is told of any, and where from. Reads a file, or may ask a name server.
    ///
    /// # Errors
    /// `ReadMembers`, `Members`, `PeerAddress`.
    pub(crate) fn first_members(&self) -> Result<Option<(String, Table)>, ConfigError> {
        let (from, table) = match &self.members {
            Some(path) => {
                let shown = path.display().to_string();
                let read = || -> std::io::Result<Vec<u8>> {
                    let mut text = Vec::new();
                    // One byte more than may be is enough to say so.
                    File::open(path)?.take(TABLE_BYTES_MAX as u64 + 1).read_to_end(&mut text)?;
                    Ok(text)
                };
                let text = read().map_err(|source| ConfigError::ReadMembers { path: shown.clone(), source })?;
                (shown, Table::parse(&text))
            }
            None if self.peers.is_empty() => return Ok(None),
            None => {
                let active = |(name, mut addresses): (String, Vec<SocketAddr>)| {
                    addresses.dedup();
                    addresses.truncate(ADDRESSES_MAX);
                    Member { name, state: State::Active, incarnation: None, addresses }
                };
                let members = self.peer_addresses()?.into_iter().map(active).collect();
                // Older than any table that is sent.
                ("peers, in the order of their names from line 3 on".to_owned(), Table::new(0, members))
            }
        };
        match table {
            Ok(table) => Ok(Some((from, table))),
            Err(error) => Err(ConfigError::Members { from, error: error.into() }),
        }
    }

    /// Reads the application key, if one is configured. Once: a pipe is empty after it.
    pub(crate) fn read_key(&self) -> Result<Option<Secret>, ConfigError> {
        let read_fd = |fd: u32| {
            let from = format!("descriptor {fd}");
            // Any but standard input is opened anew by its name, since a number alone is nobody's. No worker inherits it.
            let opened = match fd {
                0 => rustix::stdio::stdin().try_clone_to_owned().map(File::from),
                _ => File::open(format!("/proc/self/fd/{fd}")),
            };
            let mut file = opened.map_err(|source| SecretError::File { what: "open", path: from.clone(), source })?;
            let key = Secret::from_reader(&mut file, &from)?;
            if fd == 0 {
                // Which every worker does.
                let replaced = File::open("/dev/null").and_then(|null| Ok(rustix::stdio::dup2_stdin(null)?));
                replaced.map_err(|source| SecretError::File { what: "close", path: from, source })?;
            }
            Ok(key)
        };
        let key = match (&self.key_file, self.key_fd) {
            (Some(path), _) => Some(Secret::from_file(path)),
            (None, Some(fd)) => Some(read_fd(fd)),
            (None, None) => None,
        };
        Ok(key.transpose()?)
    }

    /// Checks the cores of `pin` against those we may run on (`sched_getaffinity`), in ascending order.
    ///
    /// # Errors
    /// The first core that is not among them.
    pub fn validate_cores(&self, allowed: &[usize]) -> Result<(), ConfigError> {
        let Pin::Cores(cores) = &self.pin else { return Ok(()) };
        match cores.iter().find(|core| !allowed.contains(core)) {
            None => Ok(()),
            Some(&core) => {
                let allowed: Vec<String> = allowed.iter().map(usize::to_string).collect();
                Err(ConfigError::Core { pin: self.pin.clone(), core, allowed: allowed.join(", ") })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> ProcessConfig {
        ProcessConfig { worker: vec!["w".into()], ..ProcessConfig::default() }
    }

    #[test]
    fn connections_are_lent_over_rings_only() {
        let lends = ProcessConfig { lease_connections: true, ..sound() };
        lends.validate().unwrap();
        let error = ProcessConfig { ipc: Ipc::Queue, ..lends }.validate().expect_err("no arena");
        assert!(error.to_string().contains("--ipc ring"), "{error}");
    }

    #[test]
    fn the_defaults_with_a_worker_are_valid() {
        sound().validate().unwrap();
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let file = std::env::temp_dir().join(format!("praas-config-{}.toml", std::process::id()));
        std::fs::write(&file, "workers = 2\nwokers_max = 4\n").unwrap();
        let error = ProcessConfig::from_file(&file).unwrap_err().to_string();
        std::fs::remove_file(&file).unwrap();
        assert!(error.contains("line 2") && error.contains("wokers_max"), "{error}");
        assert!(!error.contains('\n'));
    }

    #[test]
    fn every_range_is_checked() {
        type Spoil = fn(&mut ProcessConfig);
        let refused: [(&str, Spoil); 10] = [
            ("workers", |c| c.workers = 0),
            ("workers_max", |c| c.workers_max = 1),
            ("arena_bytes", |c| c.arena_bytes = 3 << 20),
            ("payload_bytes_max", |c| c.payload_bytes_max = 0),
            ("process", |c| c.process = "a/b".into()),
            ("start_ms", |c| c.start_ms = 0),
            ("worker_memory_max", |c| c.worker_memory_max = c.arena_bytes + (32 << 20) - 1),
            ("worker_processes_max", |c| c.worker_processes_max = u32::MAX),
            ("worker_log_bytes_max", |c| c.worker_log_bytes_max = 4096),
            ("worker_log_lines_max", |c| c.worker_log_lines_max = 0),
        ];
        for (field, spoil) in refused {
            let mut config = sound();
            spoil(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn only_loopback_is_served_without_keys() {
        let refused = |listen: &str, key: bool, plaintext| {
            let key_file = key.then(|| "key".into());
            let config = ProcessConfig { listen: listen.into(), key_file, plaintext, ..sound() };
            config.validate().unwrap();
            matches!(config.listen_addresses(), Err(ConfigError::NotLoopback(_)))
        };
        for outside in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1"] {
            assert!(refused(outside, false, false) && refused(outside, true, true) && refused(outside, false, true));
            assert!(!refused(outside, true, false));
        }
        for inside in ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert!(!refused(inside, false, false) && !refused(inside, true, true));
        }
    }

    #[test]
    fn peers_need_names_a_key_and_addresses() {
        let told = |name: &str, address: &str| ProcessConfig {
            process: "a".into(),
            key_file: Some("key".into()),
            peers: BTreeMap::from([(name.into(), address.into())]),
            ..sound()
        };
        let good = told("b", "127.0.0.1:4000");
        good.validate().unwrap();
        assert_eq!(good.peer_addresses().unwrap(), [("b".to_owned(), vec!["127.0.0.1:4000".parse().unwrap()])]);
        let refused = [
            (told("a", "127.0.0.1:1"), "our own"),
            (told("a b", "127.0.0.1:1"), "1 to 64"),
            (ProcessConfig { process: String::new(), ..good.clone() }, "--process"),
            (ProcessConfig { key_file: None, ..good.clone() }, "--key-file"),
            (ProcessConfig { peers_max: 0, ..good.clone() }, "--peers-max"),
        ];
        for (config, word) in refused {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        for address in ["", "127.0.0.1", "127.0.0.1:x"] {
            let error = told("b", address).peer_addresses().unwrap_err().to_string();
            assert!(error.contains("HOST:PORT"), "{error}");
        }
        let text = toml::to_string(&good).unwrap();
        assert_eq!(toml::from_str::<ProcessConfig>(&text).unwrap(), good);
    }

    #[test]
    fn r4_members_come_from_one_place_and_each_peer_has_an_address_of_its_own() {
        let told = |text: &str| {
            let text = format!("worker = ['w']\nprocess = 'a'\nkey_file = 'key'\n{text}");
            toml::from_str::<ProcessConfig>(&text).unwrap()
        };
        let config = told("dial = 'start'\nwhen_swapped = 'refuse'\npeers = { b = '127.0.0.1:1', c = '127.0.0.1:2' }");
        assert_eq!((config.dial, config.when_swapped), (Dial::Start, WhenSwapped::Refuse));
        let (_, table) = config.first_members().unwrap().expect("two peers");
        let active = |name, port: u16| Member::active(name, SocketAddr::from(([127, 0, 0, 1], port)));
        assert_eq!((table.generation(), table.members()), (0, &[active("b", 1), active("c", 2)][..]));
        let both = told("peers = { b = '127.0.0.1:1' }\nmembers = 'file'");
        assert!(matches!(both.validate(), Err(ConfigError::TwoLists)));
        let shared = told("peers = { b = '127.0.0.1:1', c = '127.0.0.1:1' }").first_members().unwrap_err().to_string();
        assert!(shared.contains("peers, in the order of their names") && shared.contains("where `b` is"), "{shared}");
        let missing = told("members = '/nowhere/members'").first_members().unwrap_err().to_string();
        assert!(missing.contains("cannot read the members /nowhere/members"), "{missing}");
    }

    #[test]
    fn r7_congestion_and_checks_are_chosen_in_a_file_by_the_names_of_their_flags() {
        let told = |text: &str| toml::from_str::<ProcessConfig>(text);
        let config = told("congestion = 'reno'\nchecks = 'always'").unwrap();
        assert_eq!((config.congestion.to_string(), config.checks), ("reno".to_owned(), Checks::Always));
        assert_eq!(told(&toml::to_string(&config).unwrap()).unwrap(), config);
        assert_eq!(told("").unwrap().congestion, Congestion::Auto);
        assert!(told("congestion = 'a b'").unwrap_err().message().contains("`system`"));
        assert!(told("checks = 'never'").is_err());
    }

    #[test]
    fn a_placement_reads_back_as_written() {
        for text in ["auto", "none", "0,1", "3"] {
            assert_eq!(text.parse::<Pin>().unwrap().to_string(), text);
        }
        assert!("0,x".parse::<Pin>().is_err());
    }
}
