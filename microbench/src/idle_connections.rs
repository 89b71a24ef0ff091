//! `praas-bench idle-connections`: what thousands of clients cost that are connected and silent.
//!
//! Question  How much memory does a connection take that only said hello, and does one that is busy notice ten thousand others?
//! Measures  memory of controller and workers, proportional and resident, before the connections and with them, by their number;
//!           round trips of 64 B on one connection, in turns with those of a twin process that has no others.
//! Load      closed loop, one call in flight on the busy connection; nothing on the others.
//! Excludes  memory of the kernel and of our own ends; the time that connecting takes.
//! Samples   `--repetitions` round trips of each in `--runs` runs, for each of which all connections are made anew; a run is many turns
//!           (`twins.rs`), and the ratio the median over them.
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
use crate::recorder::Recorder;
use crate::remote::RemoteCaller;
use crate::row::{Row, RowSink};
use crate::subject::{Channel, Reactor, Setup, Subject, reactors};
use crate::table;
use crate::twins::{TURNS, Turns, take_turns, warm_up};
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
    /// Round trips of the busy connection, and of its twin's, in each run.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    repetitions: u32,
    /// Runs; the silent connections are made anew for each.
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
    let start = || -> Result<_> {
        let subject = setup.start()?;
        let caller = RemoteCaller::new(subject.client()?, true)?;
        Ok((subject, caller))
    };
    // The second is the one with the silent connections.
    let mut twins = [start()?, start()?];
    pin(&[placement.ours])?;
    warm_up(&mut twins, BYTES)?;
    let pids = family(twins[1].0.pid())?;

    let (mut recorders, mut ratios) = ([Recorder::new(), Recorder::new()], Vec::new());
    let mut grown: Option<(Memory, Memory)> = None;
    let mut connecting = Duration::ZERO;
    let samples = (args.repetitions as usize).div_ceil(TURNS);
    for run in 1..=args.runs {
        let before = memory(&pids)?;
        let began = Instant::now();
        let mut silent = connect_all(&twins[1].0, args.connections)?;
        connecting += began.elapsed();
        std::thread::sleep(SETTLED);
        // Memory that the first lot left behind serves the next, so only the first shows what a connection takes.
        let after = memory(&pids)?;
        grown.get_or_insert((before, after));
        let calls_ns = warm_up(&mut twins, BYTES)?;
        let Turns { samples_ns, ratios: of_turns } = take_turns(&mut twins, BYTES, samples, calls_ns)?;
        ratios.extend(of_turns);
        for (recorder, samples_ns) in recorders.iter_mut().zip(&samples_ns) {
            recorder.add_run(samples_ns);
        }
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
        reactor: twins[1].0.reactor(),
        placement: format!("made in {seconds:.1} s"),
        silent: Some(args.connections),
        workers: Some(2),
        ..Row::default()
    };
    let memory_row =
        |experiment: &str, value| Row { value: Some(value), unit: Some("KiB each".into()), ..row(experiment) };
    let [without, with] = recorders.map(|recorder| recorder.summary());
    let busy_row = Row {
        payload_bytes: BYTES as u64,
        times: with,
        placement: placement.to_string(),
        ..row("connections_idle_busy")
    };
    Ok(vec![
        memory_row("connections_idle_memory", each(|memory| memory.proportional_kib)),
        memory_row("connections_idle_memory_resident", each(|memory| memory.resident_kib)),
        busy_row.in_turns_with("without them", without.p50_us, ratios),
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
