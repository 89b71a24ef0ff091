//! `praas-bench floors`: what this machine charges for a round trip between two processes.
//!
//! Question  What is the least a message and its answer can cost here, by channel, wait mode and size?
//! Measures  round trips of two plain processes with nothing of ours in between; see the channel's own file
//!           (`line`, `turn`, `copy`, `stream`, `queue`) for what exactly is timed.
//! Load      closed loop, one message in flight; `latency` and `balanced` on two cores, `efficient` on one.
//! Samples   `--repetitions` per run after a warm-up of 30 ms, `--runs` runs, interleaved: every cell once, then
//!           every cell again. A slow cell stops at `--run-limit` seconds, with at least 100 samples.
//! Checks    sequence number and last byte of every answer; a wrong one fails the run.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::channel::{Channel, Pair};
use crate::end::Block;
use crate::placement::{Placement, Wait, startup_cores};
use crate::plan::Plan;
use crate::recorder::Recorder;
use crate::remote::until_warm;
use crate::row::{Row, RowSink};
use crate::size::{self, Size};
use crate::table;

/// Bytes of a message on a channel that carries a word.
const WORD_BYTES: usize = 8;

/// Payloads up to this get their distribution written out as well.
pub(crate) const DISTRIBUTION_BYTES_MAX: usize = 64;

#[derive(Args, Debug)]
pub(crate) struct FloorsArgs {
    /// Message sizes; channels that carry a word (lines, eventfd, futex) always use 8 B.
    #[arg(long, value_delimiter = ',', default_value = size::DEFAULT)]
    sizes: Vec<Size>,
    /// Channels to measure [default: all].
    #[arg(long, value_delimiter = ',')]
    channels: Vec<Channel>,
    /// Wait modes to measure [default: all].
    #[arg(long, value_delimiter = ',')]
    wait: Vec<Wait>,
    /// Samples of one run of one cell.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    repetitions: u32,
    /// Runs of each cell; the spread between them is reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Seconds after which a run of a cell has enough samples.
    #[arg(long, default_value_t = 0.5)]
    run_limit: f64,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One cell of the experiment.
struct Cell {
    pair: Pair,
    wait: Wait,
    bytes: usize,
    samples: usize,
    recorder: Recorder,
}

pub(crate) fn run(args: &FloorsArgs) -> Result<()> {
    let plan = Plan {
        repetitions: args.repetitions as usize,
        runs: args.runs as usize,
        run_limit: Duration::try_from_secs_f64(args.run_limit)?,
    };
    let channels = if args.channels.is_empty() { &Channel::ALL[..] } else { &args.channels };
    let waits = if args.wait.is_empty() { &Wait::ALL[..] } else { &args.wait };
    let cores = startup_cores()?;
    let mut sink = RowSink::open(args.json.as_deref())?;
    eprintln!("tcp: TCP_NODELAY, congestion control {}; cores {cores:?}", crate::stream::CONGESTION_CONTROL);

    // Descriptors and queues are limited, so one wait mode of one channel is open at a time; its sizes take turns.
    let groups: Vec<_> = channels
        .iter()
        .flat_map(|&channel| waits.iter().map(move |&wait| (channel, wait)))
        .filter(|&(channel, wait)| channel.supports(wait))
        .collect();
    let bar = progress(groups.len() as u64 * plan.runs as u64);
    let mut rows = Vec::new();
    for (channel, wait) in groups {
        bar.set_message(format!("{channel}, {wait}"));
        let placement = match Placement::of(wait, &cores) {
            Ok(placement) => placement,
            Err(error) => {
                bar.suspend(|| eprintln!("skipped: {channel}, {wait}: {error}"));
                bar.inc(plan.runs as u64);
                continue;
            }
        };
        let sizes = if channel.is_a_word() { vec![Size(WORD_BYTES)] } else { args.sizes.clone() };
        let mut cells = Vec::new();
        for Size(bytes) in sizes {
            let mut pair = Pair::open(channel, wait, placement, bytes)?;
            let sample_ns = warm_up(&mut pair, bytes, 1)?;
            cells.push(Cell { pair, wait, bytes, samples: plan.samples(sample_ns), recorder: Recorder::new() });
            if channel == Channel::PosixQueue {
                // At most nine queues per user: measure and close before the next size.
                measure(&mut cells, plan.runs, &bar, 0)?;
                rows.extend(finish(&mut cells, &mut sink)?);
            }
        }
        if channel == Channel::PosixQueue {
            bar.inc(plan.runs as u64);
        } else {
            measure(&mut cells, plan.runs, &bar, 1)?;
            rows.extend(finish(&mut cells, &mut sink)?);
        }
    }
    bar.finish_and_clear();
    if args.json.as_deref().is_none_or(|path| path.as_os_str() != "-") {
        println!("{}", table::render(&rows));
    }
    Ok(())
}

/// Warms a pair up; returns what a sample takes once warm, in nanoseconds.
pub(crate) fn warm_up(pair: &mut Pair, bytes: usize, trips_per_sample: u32) -> Result<u64> {
    until_warm(|samples, samples_ns| pair.run(Block { bytes, samples, trips_per_sample }, samples_ns))
}

fn measure(cells: &mut [Cell], runs: usize, bar: &ProgressBar, steps_per_run: u64) -> Result<()> {
    let mut samples_ns = Vec::new();
    for _ in 0..runs {
        for cell in cells.iter_mut() {
            samples_ns.clear();
            let block = Block { bytes: cell.bytes, samples: cell.samples, trips_per_sample: 1 };
            cell.pair.run(block, &mut samples_ns)?;
            cell.recorder.add_run(&samples_ns);
        }
        bar.inc(steps_per_run);
    }
    Ok(())
}

fn finish(cells: &mut Vec<Cell>, sink: &mut RowSink) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cell in cells.drain(..) {
        let row = Row {
            experiment: "floor".into(),
            path: "raw".into(),
            ipc: cell.pair.channel.to_string(),
            wait: cell.wait.to_string(),
            payload_bytes: cell.bytes as u64,
            times: cell.recorder.summary(),
            placement: cell.pair.placement.to_string(),
            distribution: if cell.bytes <= DISTRIBUTION_BYTES_MAX { cell.recorder.distribution() } else { Vec::new() },
            ..Row::default()
        };
        sink.write(&row)?;
        rows.push(row);
    }
    Ok(rows)
}

/// A bar on standard error, drawn between runs only (a ticking one would take a core from what is measured), and
/// not at all when nobody watches.
pub(crate) fn progress(steps: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps).with_style(style)
}
