//! The process under test: a `praas-process` of this machine with `praas-bench` as its worker program.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use praas_dataplane::{
    Client, ClientConfig, Credential, Ipc, LaunchConfig, LaunchKey, LocalProcess, Pin, Role, Secret, WaitMode,
};

use crate::keeper::Keeper;
use crate::place::{Network, Place};
use crate::placement::{Placement, Wait, pin};
use crate::worker::{self, DRIVE, Drive, Driven};

/// Longest time a block of calls may take.
const BLOCK_DEADLINE: Duration = Duration::from_secs(120);

/// A spinning worker keeps its core this long after the last call (`latency`), and the floor needs that core.
pub(crate) const SETTLE: Duration = Duration::from_millis(25);

/// The two channels to workers.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Channel {
    /// Shared-memory rings.
    Ring,
    /// POSIX message queues.
    Mq,
}

impl Channel {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Channel::Ring => "ring",
            Channel::Mq => "mq",
        }
    }
}

/// What the process waits with, as asked for; its ready line says what it took.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Reactor {
    /// As the process chooses.
    Auto,
    /// io_uring.
    Uring,
    /// epoll.
    Epoll,
}

impl fmt::Display for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reactor::Auto => "auto",
            Reactor::Uring => "uring",
            Reactor::Epoll => "epoll",
        })
    }
}

/// Whether the connections under test, on loopback, have a key, keyed tags and payload checksums.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Checks {
    /// Plain text, a checksum of each header.
    Off,
    /// A key, `--checks always`.
    On,
}

impl fmt::Display for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Checks::Off => "off",
            Checks::On => "on",
        })
    }
}

/// The reactors to measure, of those asked for: those with which a process starts here. A container may forbid io_uring, which is
/// no reason not to measure the rest.
pub(crate) fn reactors(asked: &[Reactor]) -> Result<Vec<Option<Reactor>>> {
    if asked.is_empty() {
        return Ok(vec![None]);
    }
    let mut found = Vec::new();
    for &reactor in asked {
        let setup = Setup::new(Channel::Ring, Wait::Efficient, 1);
        match (Setup { reactor: Some(reactor), quiet: true, ..setup }.start()) {
            Ok(_) => found.push(Some(reactor)),
            Err(error) => eprintln!("skipped: reactor {reactor}: needs a process that starts with it ({error:#})"),
        }
    }
    ensure!(!found.is_empty(), "no process starts with any reactor asked for");
    Ok(found)
}

/// Which of ours are set beside which, and what that is called: io_uring beside epoll, and the automatic choice beside the faster
/// of those that were asked for by name.
pub(crate) fn pairs(ours: &[(Option<&str>, f64)]) -> Vec<(usize, usize, String)> {
    let named = |name: &str| ours.iter().position(|(reactor, _)| *reactor == Some(name));
    let faster =
        [named("uring"), named("epoll")].into_iter().flatten().min_by(|&a, &b| ours[a].1.total_cmp(&ours[b].1));
    let mut pairs = Vec::new();
    for (at, (reactor, _)) in ours.iter().enumerate() {
        match (reactor, named("epoll"), faster) {
            (Some("uring"), Some(epoll), _) => pairs.push((at, epoll, "reactor epoll".to_owned())),
            (Some(auto), _, Some(faster)) if auto.starts_with(AUTO) => {
                let name = ours[faster].0.unwrap_or_default();
                pairs.push((at, faster, format!("the faster reactor ({name})")));
            }
            _ => {}
        }
    }
    pairs
}

/// How rows begin to name the reactor of a process that chose it.
const AUTO: &str = "auto: ";

/// Which other process this one is told of, and what both are called. The key is both's.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Told<'a> {
    pub(crate) name: &'a str,
    pub(crate) listen: SocketAddr,
    pub(crate) peer: &'a str,
    pub(crate) peer_listen: SocketAddr,
    pub(crate) key: &'a Arc<Secret>,
}

/// What a process under test is started with.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Setup<'a> {
    pub(crate) ipc: Channel,
    pub(crate) wait: Wait,
    pub(crate) workers: u8,
    /// Whether functions may call each other without the controller.
    pub(crate) leases: bool,
    /// Whether hot clients' connections are lent to workers.
    pub(crate) lease_connections: bool,
    /// Shows nothing of what it says: for runs in which workers die by the thousand.
    pub(crate) quiet: bool,
    /// `None` says nothing about it to the process.
    pub(crate) reactor: Option<Reactor>,
    /// `None` leaves it to the process: off on loopback.
    pub(crate) checks: Option<Checks>,
    pub(crate) connections_max: Option<u32>,
    /// `None` is loopback.
    pub(crate) network: Option<&'a Network>,
    /// Another process to exchange messages with. Its clients need no credential then, as without one.
    pub(crate) told: Option<Told<'a>>,
    /// Whether the two share memory.
    pub(crate) near: bool,
    /// The core of everybody in this process. `None`: one for all in `efficient`, else as the process chooses.
    pub(crate) core: Option<usize>,
    /// Whether the controller copies what workers leave for each other. `None` says nothing about it to the process.
    pub(crate) isolate: Option<bool>,
    /// Payload memory of each participant, bytes. `None` leaves it to the process.
    pub(crate) arena_bytes: Option<u64>,
    /// Most objects of the state. `None` leaves it to the process.
    pub(crate) state_objects_max: Option<u32>,
}

impl Setup<'_> {
    pub(crate) fn new(ipc: Channel, wait: Wait, workers: u8) -> Self {
        Self {
            ipc,
            wait,
            workers,
            leases: true,
            lease_connections: false,
            quiet: false,
            reactor: None,
            checks: None,
            connections_max: None,
            network: None,
            told: None,
            near: false,
            core: None,
            isolate: None,
            arena_bytes: None,
            state_objects_max: None,
        }
    }

    /// Starts the process and waits until it is ready. `efficient` puts everybody on one core, as its floor is.
    pub(crate) fn start(&self) -> Result<Subject> {
        // The process decides by the cores it may use: give back those a floor pinned us away from.
        let cores = crate::placement::startup_cores()?;
        pin(&cores)?;
        let program = std::env::current_exe().context("where is praas-bench?")?;
        let Some(program) = program.to_str() else { bail!("the path of praas-bench is not UTF-8") };
        let mut args = vec!["--leases".to_owned(), self.leases.to_string()];
        if self.lease_connections {
            args.push("--lease-connections".to_owned());
        }
        if let Some(reactor) = self.reactor {
            args.extend(["--reactor".to_owned(), reactor.to_string()]);
        }
        if let Some(connections_max) = self.connections_max {
            args.extend(["--connections-max".to_owned(), connections_max.to_string()]);
        }
        if let Some(network) = self.network
            && network.place() == Place::Netns
        {
            args.extend(["--listen".to_owned(), format!("{}:0", network.server_ip())]);
        }
        if self.checks == Some(Checks::On) {
            args.extend(["--checks".to_owned(), "always".to_owned()]);
        }
        if let Some(isolate) = self.isolate {
            args.push(format!("--isolate={isolate}"));
        }
        if let Some(bytes) = self.arena_bytes {
            args.extend(["--arena-bytes".to_owned(), bytes.to_string()]);
        }
        if let Some(objects) = self.state_objects_max {
            args.extend(["--state-objects-max".to_owned(), objects.to_string()]);
        }
        if let Some(told) = self.told {
            args.extend(["--process".to_owned(), told.name.to_owned(), "--plaintext".to_owned()]);
            args.push(format!("--near={}", self.near));
            // The first of two does not find the second one yet, and would say so.
            args.extend([format!("--listen={}", told.listen), "--log=error".to_owned()]);
            args.push(format!("--peer={}={}", told.peer, told.peer_listen));
        }
        // Who listens off loopback serves nobody without a key; one for this run only, known to this process and that one.
        let keyed = self.checks == Some(Checks::On) || self.network.map(Network::place) == Some(Place::Netns);
        let secret = keyed.then(Secret::random).transpose().context("a key for the process under test")?.map(Arc::new);
        let config = LaunchConfig {
            key: secret.as_ref().or(self.told.map(|told| told.key)).cloned().map(LaunchKey::Pipe),
            worker: vec![program.to_owned(), worker::SUBCOMMAND.to_owned()],
            workers: self.workers,
            args,
            ipc: match self.ipc {
                Channel::Ring => Ipc::Ring,
                Channel::Mq => Ipc::Queue,
            },
            wait: mode(self.wait),
            pin: match (self.wait, self.core) {
                (_, Some(core)) => Pin::Cores(vec![core]),
                (Wait::Efficient, None) => Pin::Cores(vec![Placement::of(self.wait, &cores)?.ours]),
                (Wait::Latency | Wait::Balanced, None) => Pin::Auto,
            },
            quiet: self.quiet,
            ..LaunchConfig::default()
        };
        let start = || LocalProcess::start(&config);
        let started = match self.network {
            Some(network) => network.on_server_side(start)?,
            None => start(),
        };
        let process = started.context("start praas-process")?;
        let credential = secret.map(|secret| Credential::mint(&secret, Role::Client, "praas-bench", expiry()));
        let keeper = Keeper::of(process.pid())?;
        let (credential, chose) = (credential.transpose()?, self.reactor == Some(Reactor::Auto));
        Ok(Subject { process, wait: self.wait, credential, chose, _keeper: keeper })
    }
}

pub(crate) struct Subject {
    process: LocalProcess,
    wait: Wait,
    credential: Option<Credential>,
    /// Whether it was left to the process, by name, what to wait with.
    chose: bool,
    // After the process, so that it is told of its end.
    _keeper: Keeper,
}

impl Subject {
    /// A client that waits as the process does.
    pub(crate) fn client(&self) -> Result<Client> {
        self.connect(mode(self.wait))
    }

    /// A client that blocks and so leaves the cores to the workers.
    pub(crate) fn quiet_client(&self) -> Result<Client> {
        self.connect(WaitMode::Efficient)
    }

    /// Where clients connect.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.process.addr()
    }

    fn connect(&self, wait: WaitMode) -> Result<Client> {
        let credential = self.credential.clone();
        let config = ClientConfig { wait, deadline: BLOCK_DEADLINE, credential, ..ClientConfig::default() };
        Client::connect(self.process.addr(), &config).context("connect to the process under test")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What the process waits with, as it says.
    pub(crate) fn reactor(&self) -> Option<String> {
        let reactor = Some(self.process.reactor()).filter(|reactor| !reactor.is_empty())?;
        Some(if self.chose { format!("{AUTO}{reactor}") } else { reactor.to_owned() })
    }

    /// Waits until nobody of the process spins any more.
    pub(crate) fn settle(&self) {
        if self.wait == Wait::Latency {
            std::thread::sleep(SETTLE);
        }
    }
}

/// A day from now: longer than any run.
fn expiry() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() + 86_400
}

/// Runs one block of local calls inside the process.
pub(crate) fn drive(client: &mut Client, order: Drive) -> Result<Driven> {
    let answer = client.invoke(DRIVE, serde_json::to_vec(&order)?).with_context(|| format!("{} B", order.bytes))?;
    Driven::decode(&answer).context("the driving function's answer makes no sense")
}

fn mode(wait: Wait) -> WaitMode {
    match wait {
        Wait::Latency => WaitMode::Latency,
        Wait::Balanced => WaitMode::Balanced,
        Wait::Efficient => WaitMode::Efficient,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_uring_stands_beside_epoll_and_the_automatic_choice_beside_the_faster() {
        let ours = [(Some("auto: uring"), 21.0), (Some("uring"), 22.0), (Some("epoll"), 20.0)];
        let expected = [(0, 2, "the faster reactor (epoll)".to_owned()), (1, 2, "reactor epoll".to_owned())];
        assert_eq!(pairs(&ours), expected);
        assert_eq!(pairs(&ours[..2]), [(0, 1, "the faster reactor (uring)".to_owned())]);
        assert_eq!(pairs(&ours[2..]), []);
        assert_eq!(pairs(&[(None, 1.0)]), []);
    }
}
