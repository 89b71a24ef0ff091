//! What the integration tests share: a process with the test worker, a client, and a look at what the system says of them.
#![allow(dead_code, reason = "each test binary uses its part")]

mod dice;
pub(crate) mod false_peer;
pub(crate) mod heard;
#[path = "../../../transport/tests/support/namespace.rs"]
pub(crate) mod namespace;
pub(crate) mod nodes;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod refusal;
pub(crate) mod relay;
pub(crate) mod started;

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub(crate) use dice::{Dice, content};
use praas_dataplane::client::Outgoing;
use praas_dataplane::{Client, ClientConfig, Ipc, LaunchConfig, LaunchError, LocalProcess, WaitMode};

/// The worker with the functions of `tests/worker/main.rs`.
pub(crate) fn test_worker() -> String {
    env!("CARGO_BIN_EXE_praas-test-worker").into()
}

/// The worker that attacks when it is asked to (`tests/evil/main.rs`).
pub(crate) fn evil_worker() -> String {
    env!("CARGO_BIN_EXE_praas-evil-worker").into()
}

pub(crate) fn process_program() -> String {
    env!("CARGO_BIN_EXE_praas-process").into()
}

/// `PRAAS_TEST_REACTOR=uring` or `=epoll` runs every test on that reactor; `PRAAS_TEST_LEASE=1` lends connections of hot clients.
pub(crate) fn launch_config(ipc: Ipc) -> LaunchConfig {
    let mut args = vec!["--log=error".into()];
    args.extend(std::env::var("PRAAS_TEST_REACTOR").ok().map(|reactor| format!("--reactor={reactor}")));
    if ipc == Ipc::Ring && std::env::var_os("PRAAS_TEST_LEASE").is_some() {
        args.push("--lease-connections=true".into());
    }
    LaunchConfig {
        process_binary: Some(process_program().into()),
        worker: vec![test_worker()],
        ipc,
        wait: WaitMode::Balanced,
        args,
        quiet: true,
        ..LaunchConfig::default()
    }
}

/// A way for a process to wait for its sockets, by the arguments that choose it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reactor(&'static [&'static str]);

impl Reactor {
    pub(crate) fn config(self, ipc: Ipc, workers: u8, args: &[&str]) -> LaunchConfig {
        let mut config = LaunchConfig { workers, workers_max: workers, ..launch_config(ipc) };
        config.args.extend(self.0.iter().chain(args).map(|arg| (*arg).to_owned()));
        config
    }

    /// `workers` workers and never more, on rings, with further arguments of `praas-process`.
    pub(crate) fn start(self, workers: u8, args: &[&str]) -> (LocalProcess, Client) {
        start_with(&self.config(Ipc::Ring, workers, args))
    }
}

/// Runs a test on every reactor, or on the one that `PRAAS_TEST_REACTOR` names.
pub(crate) fn on_both_reactors(test: impl Fn(Reactor)) {
    const ALL: &[Reactor] = &[Reactor(&["--reactor=uring"]), Reactor(&["--reactor=epoll"])];
    let all = if std::env::var_os("PRAAS_TEST_REACTOR").is_some() { &[Reactor(&[])] } else { ALL };
    for reactor in all {
        println!("reactor {reactor:?}");
        test(*reactor);
    }
}

/// A number of the environment.
pub(crate) fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// The seed of random tests, `PRAAS_SEED`.
pub(crate) fn seed() -> u64 {
    setting("PRAAS_SEED", 1)
}

/// How many connections the random tests break, `PRAAS_CUTS`.
pub(crate) fn cuts() -> u64 {
    setting("PRAAS_CUTS", 400)
}

/// How many workers the random tests kill on each channel, `PRAAS_KILLS`.
pub(crate) fn kills() -> u64 {
    setting("PRAAS_KILLS", 150)
}

/// Kills random workers until `kills` are dead. Returns how many were.
pub(crate) fn kill_workers(process: &LocalProcess, seed: u64, kills: u64, stop: &AtomicBool) -> u64 {
    let mut dice = Dice(seed);
    let mut killed = 0;
    while killed < kills && !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_micros(dice.below(12_000)));
        let victims: Vec<u32> = children(process.pid()).into_iter().filter(|pid| lives(*pid)).collect();
        if !victims.is_empty() {
            let victim = usize::try_from(dice.below(victims.len() as u64)).expect("below their number");
            signal(victims[victim], 9);
            killed += 1;
        }
    }
    killed
}

/// Calls a function that answers with a text.
pub(crate) fn ask(client: &mut Client, function: &str, arguments: &[&[u8]]) -> String {
    let reply = client.invoke(function, Outgoing::from_args(arguments));
    let reply = reply.unwrap_or_else(|error| panic!("{function}: {error}"));
    String::from_utf8_lossy(&reply).into_owned()
}

pub(crate) fn start(ipc: Ipc) -> (LocalProcess, Client) {
    start_with(&launch_config(ipc))
}

pub(crate) fn start_with(config: &LaunchConfig) -> (LocalProcess, Client) {
    let begun = Instant::now();
    let process = loop {
        match LocalProcess::start(config) {
            Ok(process) => break process,
            // Other tests of this user have the queues just now.
            Err(LaunchError::Ended { text, .. })
                if text.contains("RLIMIT_MSGQUEUE") && begun.elapsed() < Duration::from_secs(30) =>
            {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => panic!("the process does not start: {error}"),
        }
    };
    let client = connect(&process);
    (process, client)
}

/// `workers` workers and never more, with further arguments of `praas-process`.
pub(crate) fn start_workers(ipc: Ipc, workers: u8, args: &[&str]) -> (LocalProcess, Client) {
    let mut config = LaunchConfig { workers, workers_max: workers, ..launch_config(ipc) };
    config.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    start_with(&config)
}

pub(crate) fn connect(process: &LocalProcess) -> Client {
    connect_with(process, &ClientConfig::default())
}

pub(crate) fn connect_with(process: &LocalProcess, config: &ClientConfig) -> Client {
    Client::connect(process.addr(), config).expect("the process answers")
}

/// The right to use queues: a user has few of them (RLIMIT_MSGQUEUE), so that one test at a time does.
pub(crate) fn queues() -> std::sync::MutexGuard<'static, ()> {
    static QUEUES: std::sync::Mutex<()> = std::sync::Mutex::new(());
    QUEUES.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Runs a test on both channels.
pub(crate) fn on_both_channels(test: impl Fn(Ipc)) {
    test(Ipc::Ring);
    let _alone = queues();
    test(Ipc::Queue);
}

/// Looks every millisecond until `look` is content; panics with `what` after `longest`.
pub(crate) fn wait_until(what: &str, longest: Duration, mut look: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !look() {
        assert!(begun.elapsed() < longest, "not within {longest:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Long enough for anything on a busy machine; tests that wait this long fail.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Pids of the children of `pid`, dead ones that nobody reaped included.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// The state letter of a process (`R`, `S`, `T`, `Z`), or `None` when it is gone.
pub(crate) fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Whether the process runs: a zombie does not.
pub(crate) fn lives(pid: u32) -> bool {
    state(pid).is_some_and(|state| state != 'Z')
}

/// File descriptors that a process has open.
pub(crate) fn fds(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Memory that a process holds, its share of what is shared included (PSS), in KiB.
pub(crate) fn memory_kib(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    pss.and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// CPU time a process has used, in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(')').map_or(vec![], |(_, rest)| rest.split_whitespace().collect());
    let ticks: f64 = fields.iter().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
    ticks / 100.0
}

/// Sends a signal by number.
pub(crate) fn signal(pid: u32, signal: i32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("not zero");
    let signal = rustix::process::Signal::from_named_raw(signal).expect("a signal");
    let _ = rustix::process::kill_process(pid, signal);
}

/// Everything that has a name where we could have left one.
pub(crate) fn names() -> Vec<PathBuf> {
    let folders = ["/dev/shm", "/dev/mqueue"];
    let entries = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("praas")).collect()
}

/// Runs `praas-process` with these arguments to its end, or for so long, and returns what it said.
pub(crate) fn run_process(args: &[&str]) -> Output {
    let longest = "20";
    Command::new("timeout").arg(longest).arg(process_program()).args(args).output().expect("timeout runs")
}

/// Whether `praas-process` has this flag; says that it does not.
pub(crate) fn has_flag(flag: &str) -> bool {
    let has = String::from_utf8_lossy(&run_process(&["--help"]).stdout).contains(flag);
    if !has {
        println!("skipped: needs praas-process {flag}");
    }
    has
}

/// What the function `tally` of the test worker has left: how often each call ran.
pub(crate) struct Tally(PathBuf);

impl Tally {
    /// Makes a configuration's worker keep it.
    pub(crate) fn keep(config: &mut LaunchConfig) -> Tally {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("praas-tally-{}-{count}", std::process::id()));
        config.worker.push(format!("tally={}", path.display()));
        Tally(path)
    }

    /// The input of a call of that number.
    pub(crate) fn input(call: u64, bytes: usize) -> Vec<u8> {
        [&call.to_le_bytes(), content(call, bytes).as_slice()].concat()
    }

    /// How often each call ran, once nothing runs any more.
    pub(crate) fn runs(&self) -> HashMap<u64, u64> {
        let bytes = std::fs::read(&self.0).unwrap_or_default();
        assert_eq!(bytes.len() % 8, 0, "numbers are written whole");
        let mut runs = HashMap::new();
        for call in bytes.as_chunks().0 {
            *runs.entry(u64::from_le_bytes(*call)).or_default() += 1;
        }
        runs
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Whether POSIX queues for so many workers fit `RLIMIT_MSGQUEUE` (two of 10 messages of 8192 bytes each).
pub(crate) fn queues_for(workers: u64) -> bool {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Msgqueue).current;
    limit.is_none_or(|bytes| bytes >= workers * 2 * 84_000)
}
