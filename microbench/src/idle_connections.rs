//! `praas-bench idle-connections`: what thousands of clients cost that are connected and silent.
//!
//! Question  How much memory does a connection take that only said hello, and does one that is busy notice ten thousand others?
//! Measures  memory of controller and workers, proportional and resident, before the connections and with them, by their number;
//!           round trips of 64 B on one connection, with the others and without, in turns.
//! Load      closed loop, one call in flight on the busy connection; nothing on the others.
//! Excludes  memory of the kernel and of our own ends; the time that connecting takes.
//! Samples   `--repetitions` round trips a turn; `--runs` turns without and with, for each of which all connections are made anew.
//! Checks    every answer on the busy connection as in `remote.rs`; in the end every silent connection answers a call.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use praas_dataplane::{Client, ClientConfig, WaitMode};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::floors::progress;
use crate::owed::judge;
use crate::placement::{Placement, Wait, pin, startup_cores};
use crate::recorder::{Recorder, median};
use crate::remote::RemoteCaller;
use crate::row::{Row, RowSink};
use crate::subject::{Channel, Reactor, Setup, Subject, reactors};
use crate::table;
use crate::usage::{Memory, family, memory};
use crate::worker::ECHO;

/// Name of the hidden subcommand of a process that holds connections.
pub(crate) const HOLDER: &str = "connection-holder";

/// Connections of one such process: a client has three descriptors, and 10 240 is a usual hard limit.
const HELD_MAX: u32 = 3000;

/// Payload of the busy connection.
const BYTES: usize = 64;

/// Descriptors that everything else needs, ours and the process's.
const SPARE_DESCRIPTORS: u32 = 200;

/// After connections come or go, before anything is measured: both ends have settled.
const SETTLED: Duration = Duration::from_millis(300);

/// Calls made first in each turn, and not recorded.
const WARM_UP: usize = 500;

#[derive(Args, Debug)]
pub(crate) struct IdleConnectionsArgs {
    /// Silent connections.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,
    /// Wait modes.
    #[arg(long, value_delimiter = ',', default_value = "balanced")]
    wait: Vec<Wait>,
    /// What the process waits with [default: as praas-process chooses].
    #[arg(long, value_delimiter = ',')]
    reactor: Vec<Reactor>,
    /// Round trips of the busy connection in each turn.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    repetitions: u32,
    /// Turns without and with the silent connections.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Raises this process's limit of open descriptors to what it may have; children inherit it.
pub(crate) fn raise_descriptor_limit() -> Result<Option<u64>> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .context("raise the limit of descriptors")?;
    Ok(limit.maximum)
}

pub(crate) fn run(args: &IdleConnectionsArgs) -> Result<()> {
    let mut sink = RowSink::open(args.json.as_deref())?;
    let needed = args.connections + SPARE_DESCRIPTORS;
    if let Some(allowed) = raise_descriptor_limit()?
        && allowed < u64::from(needed)
    {
        eprintln!("skipped: needs {needed} descriptors, and the hard limit is {allowed} (ulimit -Hn)");
        return Ok(());
    }
    let reactors = reactors(&args.reactor)?;
    let bar = progress((args.wait.len() * reactors.len()) as u64);
    let mut rows = Vec::new();
    for &wait in &args.wait {
        for &reactor in &reactors {
            bar.set_message(wait.name());
            for row in measure(args, wait, reactor).with_context(|| wait.to_string())? {
                let row = judge(row);
                sink.write(&row)?;
                rows.push(row);
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    pin(&startup_cores()?)?;
    if args.json.as_deref().is_none_or(|path| path.as_os_str() != "-") {
        println!("{}", table::render(&rows));
    }
    Ok(())
}

fn measure(args: &IdleConnectionsArgs, wait: Wait, reactor: Option<Reactor>) -> Result<Vec<Row>> {
    let placement = Placement::of(wait, &startup_cores()?)?;
    let connections_max = Some(args.connections + 8);
    let setup = Setup { reactor, connections_max, ..Setup::new(Channel::Ring, wait, 2) };
    let subject = setup.start()?;
    pin(&[placement.ours])?;
    let mut busy = RemoteCaller::new(subject.client()?, true)?;
    busy.warm_up(BYTES)?;
    let pids = family(subject.pid())?;

    let (mut without, mut with, mut ratios) = (Recorder::new(), Recorder::new(), Vec::new());
    let mut grown: Option<(Memory, Memory)> = None;
    let mut connecting = Duration::ZERO;
    for run in 1..=args.runs {
        let before = memory(&pids)?;
        let mut turn = |recorder: &mut Recorder| -> Result<u64> {
            let mut samples_ns = Vec::new();
            busy.calls(BYTES, WARM_UP, args.repetitions as usize, &mut samples_ns)?;
            recorder.add_run(&samples_ns);
            Ok(median(&mut samples_ns))
        };
        let alone_ns = turn(&mut without)?;
        let began = Instant::now();
        let mut silent = connect_all(&subject, args.connections)?;
        connecting += began.elapsed();
        std::thread::sleep(SETTLED);
        // Memory that the first lot left behind serves the next, so only the first shows what a connection takes.
        let after = memory(&pids)?;
        grown.get_or_insert((before, after));
        let among_ns = turn(&mut with)?;
        ratios.push(among_ns as f64 / alone_ns.max(1) as f64);
        if run == args.runs {
            for holder in &mut silent {
                holder.ask()?;
            }
        }
        drop(silent);
        std::thread::sleep(SETTLED);
    }

    let each = |kib: fn(&Memory) -> u64| {
        let (before, after) = grown.unwrap_or_default();
        kib(&after).saturating_sub(kib(&before)) as f64 / f64::from(args.connections)
    };
    let seconds = connecting.as_secs_f64() / f64::from(args.runs);
    let row = |experiment: &str| Row {
        experiment: experiment.into(),
        path: "remote".into(),
        ipc: Channel::Ring.name().into(),
        wait: wait.to_string(),
        reactor: subject.reactor(),
        placement: format!("made in {seconds:.1} s"),
        silent: Some(args.connections),
        workers: Some(2),
        ..Row::default()
    };
    let memory_row =
        |experiment: &str, value| Row { value: Some(value), unit: Some("KiB each".into()), ..row(experiment) };
    let busy_row = Row {
        payload_bytes: BYTES as u64,
        times: with.summary(),
        placement: placement.to_string(),
        ..row("connections_idle_busy")
    };
    Ok(vec![
        memory_row("connections_idle_memory", each(|memory| memory.proportional_kib)),
        memory_row("connections_idle_memory_resident", each(|memory| memory.resident_kib)),
        busy_row.in_turns_with("without them", without.summary().p50_us, ratios),
    ])
}

/// Connects all of them, from as many processes as it takes: a client has three descriptors, and a process has so many.
fn connect_all(subject: &Subject, connections: u32) -> Result<Vec<Holder>> {
    let address = subject.addr().to_string();
    let mut holders = Vec::new();
    let mut left = connections;
    while left > 0 {
        let share = left.min(HELD_MAX);
        holders.push(Holder::start(&address, share)?);
        left -= share;
    }
    for holder in &mut holders {
        holder.expect("held")?;
    }
    Ok(holders)
}

/// A process of ours that has silent connections, and says so.
struct Holder {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Holder {
    fn start(address: &str, connections: u32) -> Result<Holder> {
        let program = std::env::current_exe().context("where is praas-bench?")?;
        let mut child = Command::new(program)
            .args([HOLDER, address, &connections.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a process that holds connections")?;
        let said = BufReader::new(child.stdout.take().context("no pipe")?);
        Ok(Holder { child, said })
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        ensure!(line.trim() == word, "a process that holds connections said `{}`, not `{word}`", line.trim());
        Ok(())
    }

    /// Has it call once on each connection, and check the answer.
    fn ask(&mut self) -> Result<()> {
        self.child.stdin.as_mut().context("no pipe")?.write_all(b"ask\n")?;
        self.expect("answered")
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // The end of its input is the end of it.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The other side of a [`Holder`]: connects, says so, and calls on each when it is asked to.
pub(crate) fn hold(args: &HolderArgs) -> Result<()> {
    raise_descriptor_limit()?;
    let config = ClientConfig { wait: WaitMode::Efficient, ..ClientConfig::default() };
    let mut clients = Vec::new();
    for number in 0..args.connections {
        let client = Client::connect(&args.address, &config);
        clients.push(client.with_context(|| format!("connection {number} of {}", args.connections))?);
    }
    println!("held");
    for line in std::io::stdin().lines() {
        line?;
        for (number, client) in (0_u64..).zip(&mut clients) {
            let asked = number.to_le_bytes();
            let answer = client.invoke(ECHO, &asked).with_context(|| format!("silent connection {number}"))?;
            ensure!(*answer == asked, "wrong answer on silent connection {number}");
        }
        println!("answered");
    }
    Ok(())
}

#[derive(Args, Debug)]
pub(crate) struct HolderArgs {
    address: String,
    connections: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_descriptors_becomes_what_it_may_be() {
        let allowed = raise_descriptor_limit().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, allowed);
    }
}
