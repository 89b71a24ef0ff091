//! `praas-bench idle`: what a process costs while nobody calls it.
//!
//! Question  How much processor time and memory does an idle process with its workers take?
//! Measures  user and system time of controller and workers from `/proc/PID/stat`, in ticks of 10 ms, over `--seconds`;
//!           resident and proportional memory from `/proc/PID/smaps_rollup`. Proportional memory counts a page that n
//!           processes share as 1/n each, so its sum is what the machine really holds; the resident sum counts shared pages
//!           once per process and is shown beside it.
//! Excludes  pages users touched: each worker answers one small call first, so that it is whole.
//! Checks    every worker is still there at the end, and a call is answered.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;

use crate::floors::progress;
use crate::owed::judge;
use crate::placement::{Wait, pin, startup_cores};
use crate::row::{Row, RowSink};
use crate::subject::{Channel, Setup};
use crate::table;
use crate::usage::{family, memory, processor_seconds};
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
    let subject = Setup::new(args.ipc, wait, args.workers).start()?;
    let mut client = subject.quiet_client()?;
    for _ in 0..args.workers {
        client.invoke(ECHO, b"are you there?")?;
    }
    std::thread::sleep(SETTLED);
    let pids = family(subject.pid())?;
    ensure!(
        pids.len() == 1 + usize::from(args.workers),
        "{} workers run where {} were asked for",
        pids.len() - 1,
        args.workers
    );

    let (used_before, before) = (processor_seconds(&pids)?, Instant::now());
    std::thread::sleep(Duration::from_secs(args.seconds));
    let (used, elapsed) = (processor_seconds(&pids)? - used_before, before.elapsed());
    let memory = memory(&pids)?;
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
