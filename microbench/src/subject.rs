//! The process under test: a `praas-process` of this machine with `praas-bench` as its worker program.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use praas_dataplane::{Client, ClientConfig, Ipc, LaunchConfig, LocalProcess, Pin, WaitMode};

use crate::placement::{Placement, Wait, pin};
use crate::worker::{self, DRIVE, Drive, Driven};

/// Longest time a block of calls may take.
const BLOCK_DEADLINE: Duration = Duration::from_secs(120);

/// A spinning worker keeps its core this long after the last call (`latency`), and the floor needs that core.
const SETTLE: Duration = Duration::from_millis(25);

pub(crate) struct Subject {
    process: LocalProcess,
    wait: Wait,
}

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

impl Subject {
    /// Starts a process and waits until it is ready. `efficient` puts everybody on one core, as its floor is.
    pub(crate) fn start(ipc: Channel, wait: Wait, workers: u8) -> Result<Self> {
        Self::launch(ipc, wait, workers, true, false)
    }

    /// The same, with every local call going through the controller.
    pub(crate) fn start_unleased(ipc: Channel, wait: Wait, workers: u8) -> Result<Self> {
        Self::launch(ipc, wait, workers, false, false)
    }

    /// The same, with nothing of what it says shown: for runs in which workers die by the thousand.
    pub(crate) fn start_quiet(ipc: Channel, wait: Wait, workers: u8) -> Result<Self> {
        Self::launch(ipc, wait, workers, true, true)
    }

    fn launch(ipc: Channel, wait: Wait, workers: u8, leases: bool, quiet: bool) -> Result<Self> {
        // The process decides by the cores it may use: give back those a floor pinned us away from.
        let cores = crate::placement::startup_cores()?;
        pin(&cores)?;
        let program = std::env::current_exe().context("where is praas-bench?")?;
        let Some(program) = program.to_str() else { bail!("the path of praas-bench is not UTF-8") };
        let config = LaunchConfig {
            worker: vec![program.to_owned(), worker::SUBCOMMAND.to_owned()],
            workers,
            args: vec!["--leases".into(), leases.to_string()],
            ipc: match ipc {
                Channel::Ring => Ipc::Ring,
                Channel::Mq => Ipc::Queue,
            },
            wait: mode(wait),
            pin: match wait {
                Wait::Efficient => Pin::Cores(vec![Placement::of(wait, &cores)?.ours]),
                Wait::Latency | Wait::Balanced => Pin::Auto,
            },
            quiet,
            ..LaunchConfig::default()
        };
        let process = LocalProcess::start(&config).context("start praas-process")?;
        Ok(Self { process, wait })
    }

    /// A client that waits as the process does.
    pub(crate) fn client(&self) -> Result<Client> {
        self.connect(mode(self.wait))
    }

    /// A client that blocks and so leaves the cores to the workers.
    pub(crate) fn quiet_client(&self) -> Result<Client> {
        self.connect(WaitMode::Efficient)
    }

    fn connect(&self, wait: WaitMode) -> Result<Client> {
        let config = ClientConfig { wait, deadline: BLOCK_DEADLINE, ..ClientConfig::default() };
        Client::connect(self.process.addr(), &config).context("connect to the process under test")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until nobody of the process spins any more.
    pub(crate) fn settle(&self) {
        if self.wait == Wait::Latency {
            std::thread::sleep(SETTLE);
        }
    }
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
