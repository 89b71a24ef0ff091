//! `praas-bench idle`: what a process costs while nobody calls it.
//!
//! Question  How much processor time and memory does an idle process with its workers take?
//! Measures  user and system time of controller and workers from `/proc/PID/stat`, in ticks of 10 ms, over `--seconds`;
//!           resident and proportional memory from `/proc/PID/smaps_rollup`. Proportional memory counts a page that n
//!           processes share as 1/n each, so its sum is what the machine really holds; the resident sum counts shared pages
//!           once per process and is shown beside it.
//! Excludes  pages users touched: each worker answers one small call first, so that it is whole.
//! Checks    every worker is still there at the end, and a call is answered.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::floors::progress;
use crate::owed::judge;
use crate::placement::{Wait, pin, startup_cores};
use crate::row::{Row, RowSink};
use crate::subject::{Channel, Subject};
use crate::table;
use crate::worker::ECHO;

/// After the last call, before the count begins: spinning budgets run out, memory settles.
const SETTLED: Duration = Duration::from_millis(500);

#[derive(Args, Debug)]
pub(crate) struct IdleArgs {
    /// Wait modes.
    #[arg(long, value_delimiter = ',', default_value = "balanced,efficient")]
    wait: Vec<Wait>,
    /// Channel between the process and its workers.
    #[arg(long, default_value = "ring")]
    ipc: Channel,
    /// Workers of the process.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=63))]
    workers: u8,
    /// How long to watch.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Memory of a process in KiB.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
struct Memory {
    resident_kib: u64,
    proportional_kib: u64,
}

pub(crate) fn run(args: &IdleArgs) -> Result<()> {
    let mut sink = RowSink::open(args.json.as_deref())?;
    let bar = progress(args.wait.len() as u64);
    let mut rows = Vec::new();
    for &wait in &args.wait {
        bar.set_message(wait.name());
        for row in watch(args, wait)? {
            let row = judge(row);
            sink.write(&row)?;
            rows.push(row);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if args.json.as_deref().is_none_or(|path| path.as_os_str() != "-") {
        println!("{}", table::render(&rows));
    }
    Ok(())
}

fn watch(args: &IdleArgs, wait: Wait) -> Result<Vec<Row>> {
    let subject = Subject::start(args.ipc, wait, args.workers)?;
    let mut client = subject.quiet_client()?;
    for _ in 0..args.workers {
        client.invoke(ECHO, b"are you there?")?;
    }
    std::thread::sleep(SETTLED);
    let mut pids = vec![subject.pid()];
    pids.extend(children(subject.pid())?);
    ensure!(
        pids.len() == 1 + usize::from(args.workers),
        "{} workers run where {} were asked for",
        pids.len() - 1,
        args.workers
    );

    let (ticks_before, before) = (ticks(&pids)?, Instant::now());
    std::thread::sleep(Duration::from_secs(args.seconds));
    let (ticks_after, elapsed) = (ticks(&pids)?, before.elapsed());
    let used = (ticks_after - ticks_before) as f64 / ticks_per_second();
    let mut memory = Memory::default();
    for &pid in &pids {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read a worker's memory")?;
        let one = parse_rollup(&rollup).context("a worker's memory makes no sense")?;
        memory.resident_kib += one.resident_kib;
        memory.proportional_kib += one.proportional_kib;
    }
    ensure!(*client.invoke(ECHO, b"still there?")? == *b"still there?", "wrong answer after the idle time");
    pin(&startup_cores()?)?;

    let row = |experiment: &str, value: f64, unit: &str| Row {
        experiment: experiment.into(),
        path: "process".into(),
        ipc: args.ipc.name().into(),
        wait: wait.to_string(),
        placement: format!("over {} s", args.seconds),
        workers: Some(args.workers.into()),
        value: Some(value),
        unit: Some(unit.into()),
        ..Row::default()
    };
    Ok(vec![
        row("idle_cpu", used / elapsed.as_secs_f64() * 100.0, "% of a core"),
        row("idle_memory", memory.proportional_kib as f64 / 1024.0, "MiB"),
        row("idle_memory_resident_sum", memory.resident_kib as f64 / 1024.0, "MiB"),
    ])
}

/// Child processes of every thread of a process.
fn children(pid: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).context("is the process still there?")?.flatten() {
        let text = fs::read_to_string(task.path().join("children")).context("list workers")?;
        found.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(found)
}

fn ticks(pids: &[u32]) -> Result<u64> {
    pids.iter()
        .map(|pid| {
            let stat =
                fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
            parse_ticks(&stat).with_context(|| format!("/proc/{pid}/stat makes no sense"))
        })
        .sum()
}

/// User plus system time, fields 14 and 15 of proc_pid_stat(5). The name in field 2 may hold anything, brackets too.
fn parse_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

fn parse_rollup(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    Some(Memory { resident_kib: field("Rss:")?, proportional_kib: field("Pss:")? })
}

fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_a_name_with_brackets() {
        let stat = "7 (a) b) S 1 7 7 0 -1 0 1 2 3 4 150 25 0 0 20 0 1 0 5 6 7";
        assert_eq!(parse_ticks(stat), Some(175));
        assert_eq!(parse_ticks("nonsense"), None);
    }

    #[test]
    fn memory_is_read_with_and_without_sharing() {
        let text = "0000-1111 ---p [rollup]\nRss:    2048 kB\nPss:     512 kB\nPss_Dirty: 1 kB\n";
        assert_eq!(parse_rollup(text), Some(Memory { resident_kib: 2048, proportional_kib: 512 }));
    }
}
