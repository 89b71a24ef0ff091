//! `praas-process`: one cloud process on this machine.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use praas_dataplane::{
    Checks, Congestion, Dial, Ipc, Pin, Process, ProcessConfig, ProcessError, ReactorChoice, WaitMode, WhenSwapped,
};

/// Runs one cloud process: a controller and the workers that run your functions.
///
/// Prints one line on stdout when clients can connect:
///   ready process=NAME listen=ADDRESS workers=N ipc=ring|mq wait=MODE reactor=uring|epoll congestion=NAME [limits=HOW] [peers=N] reason="WHY THAT REACTOR"
/// and serves until SIGTERM, SIGINT or SIGHUP (running calls may finish; a second signal ends at once).
#[derive(Debug, Parser)]
#[command(
    version,
    after_long_help = "\
Examples:
  praas-process --worker target/release/praas-worker
  praas-process --worker ./my-worker --workers 4 --wait latency --listen 127.0.0.1:4000
  praas-process --config process.toml
  praas key new app.key && praas-process --worker ./my-worker --listen 0.0.0.0:4000 --key-file app.key

Exit codes:
  0  ended by SIGTERM, SIGINT or SIGHUP, whether or not running calls finished in time
  2  wrong command line or configuration
  3  the worker program cannot be started
  4  the worker program ends or stays silent before it registers, or registers no function
  5  the listen address cannot be had
  6  the system refuses queues, memory or descriptors; the line says which and what to do (see also `praas doctor`)"
)]
struct Arguments {
    /// A TOML file with any of the settings below; flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The worker program: yours, built with praas-dataplane, or praas-worker
    #[arg(long, value_name = "PROGRAM")]
    worker: Option<String>,
    /// An argument for the worker program; may be repeated
    #[arg(long = "worker-arg", value_name = "ARG", allow_hyphen_values = true)]
    worker_args: Vec<String>,
    /// Name of the process [default: random]
    #[arg(long, value_name = "NAME")]
    process: Option<String>,
    /// Where clients connect: address or name, and port; [::1]:0 and localhost:4000 will do. Other than loopback only with a
    /// key; port 0 takes a free one [default: 127.0.0.1:0]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// File with the application key, mode 0600 (`praas key new FILE` makes one): clients then need a credential (`praas token`)
    #[arg(long, value_name = "FILE", conflicts_with = "key_fd")]
    key_file: Option<PathBuf>,
    /// The application key from an inherited descriptor, read to its end
    #[arg(long, value_name = "N")]
    key_fd: Option<u32>,
    /// With a key: let loopback connections do without one
    #[arg(long)]
    plaintext: bool,
    /// Connections in the middle of their hello; one more takes the place of the oldest [default: 1024]
    #[arg(long, value_name = "N")]
    unauthenticated_max: Option<u32>,
    /// Another process to keep a connection with, which is told of this one, too; needs --process and a key. May be repeated
    #[arg(long = "peer", value_name = "NAME=HOST:PORT", value_parser = parse_peer)]
    peers: Vec<(String, String)>,
    /// In place of --peer: a file with a table of members and their states, as `praas members` sends it
    #[arg(long, value_name = "FILE", conflicts_with = "peers")]
    members: Option<PathBuf>,
    /// Most other processes known at a time [default: 1024]
    #[arg(long, value_name = "N")]
    peers_max: Option<u32>,
    /// When another process is connected with: first-use (when something is sent to it) or start [default: first-use]
    #[arg(long, value_name = "WHEN")]
    dial: Option<Dial>,
    /// Messages and calls to a process that is swapped out: wait (until it is back, or their time is over) or refuse [default: wait]
    #[arg(long, value_name = "WHAT")]
    when_swapped: Option<WhenSwapped>,
    /// Workers kept running, 1 to 63 [default: 2]
    #[arg(long, value_name = "N")]
    workers: Option<u8>,
    /// Most workers when nested calls need more [default: 8]
    #[arg(long, value_name = "N")]
    workers_max: Option<u8>,
    /// Channel to workers: ring (shared memory) or mq (POSIX queues) [default: ring]
    #[arg(long, value_name = "CHANNEL")]
    ipc: Option<Ipc>,
    /// How to wait: latency (spin), balanced (spin, yield, then sleep) or efficient (sleep) [default: balanced]
    #[arg(long, value_name = "MODE")]
    wait: Option<WaitMode>,
    /// What carries connections: auto (io_uring where it works, else epoll), uring or epoll [default: auto]
    #[arg(long, value_name = "REACTOR")]
    reactor: Option<ReactorChoice>,
    /// Congestion control of connections: auto (reno on this host, the system's otherwise), system, or a name that the kernel knows; the
    /// ready line says what listens [default: auto]
    #[arg(long, value_name = "NAME")]
    congestion: Option<Congestion>,
    /// Keyed tags and payload checksums on frames: auto (where connections leave this host) or always [default: auto]
    #[arg(long, value_name = "WHEN")]
    checks: Option<Checks>,
    /// Cores: auto, none, or a list such as 0,1 (controller first, then workers) [default: auto]
    #[arg(long, value_name = "CORES")]
    pin: Option<Pin>,
    /// Whether workers may call each other without the controller [default: true]
    #[arg(long, value_name = "BOOL")]
    leases: Option<bool>,
    /// Whether a client that calls one function, one call at a time, is connected to a worker, with no hop in between (rings only) [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    lease_connections: Option<bool>,
    /// Whether processes of this host and user that are told of each other share memory, and talk through it instead of TCP; each can then read all
    /// payloads of the other (rings only) [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    near: Option<bool>,
    /// Largest input or output, bytes [default: 67108864]
    #[arg(long, value_name = "BYTES")]
    payload_bytes_max: Option<u64>,
    /// Payload memory of each participant (with mq: of the controller), bytes, touched only as used [default: 268435456]
    #[arg(long, value_name = "BYTES")]
    arena_bytes: Option<u64>,
    /// Memory of all state together, bytes [default: 1073741824]
    #[arg(long, value_name = "BYTES")]
    state_bytes_max: Option<u64>,
    /// Largest object of the state, bytes; with rings it also has to fit --arena-bytes [default: 1073741824]
    #[arg(long, value_name = "BYTES")]
    state_object_bytes_max: Option<u64>,
    /// Most objects of the state [default: 1048576]
    #[arg(long, value_name = "N")]
    state_objects_max: Option<u32>,
    /// Whether what one worker leaves for another is copied by the controller, so that nobody can change what another reads; workers then
    /// do not lease each other [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    isolate: Option<bool>,
    /// Run worker N as user and group UID + N, each without other groups; needs root [default: all as the process's user]
    #[arg(long, value_name = "UID")]
    worker_uids: Option<u32>,
    /// Messages that may wait in the mailbox before senders are told Busy [default: 65536]
    #[arg(long, value_name = "N")]
    mailbox_messages_max: Option<u32>,
    /// Bytes of them [default: 134217728]
    #[arg(long, value_name = "BYTES")]
    mailbox_bytes_max: Option<u64>,
    /// Deadline of calls that name none, ms [default: 60000]
    #[arg(long, value_name = "MS")]
    deadline_ms: Option<u64>,
    /// Calls waiting for a worker before callers are told Busy [default: 4096]
    #[arg(long, value_name = "N")]
    queue_max: Option<u32>,
    /// Calls one connection may have in flight before it is told Busy [default: 1024]
    #[arg(long, value_name = "N")]
    connection_calls_max: Option<u32>,
    /// Connections served at once; more are closed on arrival [default: 1024]
    #[arg(long, value_name = "N")]
    connections_max: Option<u32>,
    /// Memory for results of effectively-once calls until their clients have them, bytes [default: 67108864]
    #[arg(long, value_name = "BYTES")]
    results_bytes_max: Option<u64>,
    /// How long a worker past its deadline may go on before SIGTERM, and again before SIGKILL, ms [default: 100]
    #[arg(long, value_name = "MS")]
    grace_ms: Option<u64>,
    /// How long running calls may go on after SIGTERM, ms [default: 5000]
    #[arg(long, value_name = "MS")]
    drain_ms: Option<u64>,
    /// How long a worker may take to register, ms [default: 5000]
    #[arg(long, value_name = "MS")]
    start_ms: Option<u64>,
    /// Memory of one worker and what it starts, bytes, its payload memory included; 0 is no limit. The ready line says how it is kept: in
    /// control groups, or, where none may be made, by limits of each OS process [default: 0]
    #[arg(long, value_name = "BYTES")]
    worker_memory_max: Option<u64>,
    /// Processes and threads of one worker; 0 is no limit [default: 0]
    #[arg(long, value_name = "N")]
    worker_processes_max: Option<u32>,
    /// Folder for what workers print, in NAME.log there [default: stderr]
    #[arg(long, value_name = "DIR")]
    worker_log: Option<PathBuf>,
    /// Length at which that file is put aside, bytes [default: 16777216]
    #[arg(long, value_name = "BYTES")]
    worker_log_bytes_max: Option<u64>,
    /// How many of those put aside are kept [default: 4]
    #[arg(long, value_name = "N")]
    worker_log_old_files: Option<u32>,
    /// Lines of one worker that are shown a second; the rest is counted [default: 1000]
    #[arg(long, value_name = "N")]
    worker_log_lines_max: Option<u32>,
    /// Messages on stderr: error, warn, info or debug
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log: tracing::Level,
}

impl Arguments {
    fn into_config(self) -> Result<ProcessConfig, ProcessError> {
        let mut config = match &self.config {
            Some(path) => ProcessConfig::from_file(path)?,
            None => ProcessConfig::default(),
        };
        if let Some(worker) = self.worker {
            config.worker = vec![worker];
        }
        config.worker.extend(self.worker_args);
        macro_rules! override_with {
            ($($field:ident),+) => { $(if let Some(value) = self.$field { config.$field = value; })+ };
        }
        override_with!(
            process,
            listen,
            unauthenticated_max,
            peers_max,
            dial,
            when_swapped,
            workers,
            workers_max,
            ipc,
            wait,
            reactor,
            congestion,
            checks,
            pin,
            leases,
            lease_connections,
            near,
            payload_bytes_max,
            arena_bytes,
            state_bytes_max,
            state_object_bytes_max,
            state_objects_max,
            isolate,
            mailbox_messages_max,
            mailbox_bytes_max,
            deadline_ms,
            queue_max,
            connection_calls_max,
            connections_max,
            results_bytes_max,
            grace_ms,
            drain_ms,
            start_ms,
            worker_memory_max,
            worker_processes_max,
            worker_log_bytes_max,
            worker_log_old_files,
            worker_log_lines_max
        );
        if self.worker_log.is_some() {
            config.worker_log = self.worker_log;
        }
        config.peers.extend(self.peers);
        config.worker_uids = self.worker_uids.or(config.worker_uids);
        config.members = self.members.or(config.members);
        if self.key_file.is_some() || self.key_fd.is_some() {
            (config.key_file, config.key_fd) = (self.key_file, self.key_fd);
        }
        config.plaintext |= self.plaintext;
        config.workers_max =
            if self.workers_max.is_none() { config.workers_max.max(config.workers) } else { config.workers_max };
        Ok(config)
    }
}

fn parse_peer(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('=').ok_or_else(|| format!("`{text}` is not NAME=HOST:PORT, such as b=127.0.0.1:4000"));
    parts.map(|(name, address)| (name.to_owned(), address.to_owned()))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Colours are for people: a log that programs read has none.
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let log = tracing_subscriber::fmt().with_max_level(arguments.log).with_writer(std::io::stderr).with_target(false);
    log.with_ansi(colours).init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("praas-process: {error}");
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
        }
    }
}

fn run(arguments: Arguments) -> Result<(), ProcessError> {
    let config = arguments.into_config()?;
    let (ipc, wait) = (config.ipc, config.wait);
    Process::new(config)?.run(|ready| {
        use std::io::Write;
        let mut out = std::io::stdout();
        let line = format!(
            "ready process={} listen={} workers={} ipc={ipc} wait={wait} reactor={} congestion={}",
            ready.process, ready.listen, ready.workers, ready.reactor, ready.congestion
        );
        let line = ready.limits.as_ref().map_or(line.clone(), |how| format!("{line} limits={how}"));
        let line = if ready.peers == 0 { line } else { format!("{line} peers={}", ready.peers) };
        let line = format!("{line} reason=\"{}\"", ready.reactor_reason.replace(['"', '\n'], "'"));
        // Nobody reads our stdout: no reason not to serve.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    })
}
