//! `praas-bench invoke`: invocations of a real process, beside the floor they stand on.
//!
//! Question  What does calling a function cost: from a function of the same process (local), from a client (remote)?
//! Measures  round trip of `echo` as its caller sees it, not halved. Local calls are timed inside the calling function,
//!           remote ones in this process; the clock is read once per call.
//! Load      closed loop, one call in flight; with `--in-flight N` calls per second of N pipelined calls instead.
//! Excludes  starting the process, connecting, and by warm-up the lease of a local callee; `--r100` rows exclude nothing.
//! Samples   `--repetitions` per run, `--runs` runs, each of a fresh process in turns with a fresh floor: floor, calls, floor, calls, ... so that
//!           both see the same weather; the ratio is the median over the turns. A slow cell stops at `--run-limit` seconds, with at least 100 samples.
//! Checks    length, sequence number and last byte of every answer (`--untouched`: length; content after the last).
//!           With `--checks off,on` see `checks.rs` instead.
//! Baseline  local ring: cache-line ping-pong over two lines, via exchange over one; local mq: two raw queue round trips in
//!           a row; remote: a raw TCP round trip; same size, wait mode and cores.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::ProgressBar;

use crate::channel::{self, Pair};
use crate::checks;
use crate::end::Block;
use crate::floors::{DISTRIBUTION_BYTES_MAX, progress, warm_up};
use crate::owed::judge;
use crate::placement::{Placement, Wait, pin, startup_cores};
use crate::plan::{Plan, SAMPLES_MIN, turn_warm_up};
use crate::recorder::{Recorder, interpolated, median};
use crate::remote::{RemoteCaller, until_warm};
use crate::row::{Row, RowSink};
use crate::size::{self, Size};
use crate::subject::{Channel, Checks, Reactor, Setup, Subject, drive, reactors};
use crate::table;
use crate::worker::{Drive, Via};

/// How often a run goes back and forth between its floor and its calls.
const TURNS: usize = 8;

/// Pause before a process with queues starts. Those of the run before still count against the user's quota (RLIMIT_MSGQUEUE, nine of them, of
/// which a run needs eight) for some milliseconds after its last process has ended: seen, 8 ms.
const QUEUES_GONE: Duration = Duration::from_millis(200);

/// Most calls made, and not recorded, at the start of each turn.
const TURN_WARM_UP_MAX: usize = 5_000;

/// How often to ask for more calls, twice as many each time, before giving up on a lease.
const LEASE_ATTEMPTS: usize = 12;

/// Most samples one answer of the driving function carries.
const TURN_SAMPLES_MAX: usize = 1_000_000;

/// Who calls.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Path {
    /// A function of the same process.
    Local,
    /// A client over TCP.
    Remote,
}

#[derive(Args, Debug)]
pub(crate) struct InvokeArgs {
    /// Who calls: a function of the same process, or a client.
    #[arg(long, value_delimiter = ',', default_value = "local,remote")]
    path: Vec<Path>,
    /// Channel between the process and its workers.
    #[arg(long, value_delimiter = ',', default_value = "ring")]
    ipc: Vec<Channel>,
    /// Wait modes.
    #[arg(long, value_delimiter = ',', default_value = "latency")]
    wait: Vec<Wait>,
    /// Payload sizes.
    #[arg(long, value_delimiter = ',', default_value = size::DEFAULT)]
    sizes: Vec<Size>,
    /// Samples of one run of one cell.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    repetitions: u32,
    /// Runs of each cell; the spread between them is reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Seconds after which a run of a cell has enough samples.
    #[arg(long, default_value_t = 0.5)]
    run_limit: f64,
    /// Workers of the process.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=63))]
    workers: u8,
    /// How local calls travel: over what the lease of a worker gives (exchange, ring; queue with `--ipc mq`), or all
    /// through the controller.
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    via: Vec<Via>,
    /// Write and check each payload (the default).
    #[arg(long, conflicts_with = "untouched")]
    touch: bool,
    /// Hand payloads over without writing or reading them, and set them beside 64 B.
    #[arg(long)]
    untouched: bool,
    /// Keep N calls in flight, 2 to 96, and report calls per second (local, payloads up to 40 B).
    #[arg(long, value_name = "N", value_parser = in_flight)]
    in_flight: Option<u32>,
    /// What the process waits with, for remote calls; several take turns [default: as praas-process chooses].
    #[arg(long, value_delimiter = ',')]
    reactor: Vec<Reactor>,
    /// Whether a client's connection is lent to the worker that serves it, for remote calls; several take turns.
    #[arg(long, value_delimiter = ',', default_value = "off")]
    lease: Vec<Lent>,
    /// For remote calls: plain text (off), or a key, keyed tags and payload checksums (on). Both: in turns, one beside the other
    /// instead of a floor [default: plain text].
    #[arg(long, value_delimiter = ',')]
    checks: Vec<Checks>,
    /// Also make the paper's rows: 100 repetitions of a fresh process, all kept, and a line with the first dropped.
    #[arg(long)]
    r100: bool,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Calls that a leased worker has room to answer (`Context::submit`); one more is `Busy`.
const IN_FLIGHT_MAX: u32 = 96;

fn in_flight(text: &str) -> Result<u32, String> {
    let calls = text.parse().ok().filter(|calls| (2..=IN_FLIGHT_MAX).contains(calls));
    calls.ok_or_else(|| format!("a leased worker takes 2 to {IN_FLIGHT_MAX} calls at a time"))
}

/// Whether connections are lent.
#[derive(Copy, Clone, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Lent {
    On,
    Off,
}

/// How rows name calls over a connection that a worker has.
pub(crate) const LENT: &str = "lent connection";

/// One way of calling, on a process started for it.
#[derive(Copy, Clone, Debug)]
struct Way {
    path: Path,
    ipc: Channel,
    wait: Wait,
    via: Via,
    workers: u8,
    touched: bool,
    reactor: Option<Reactor>,
    lent: bool,
    checks: Option<Checks>,
    /// With checks, beside the same without.
    beside_off: bool,
}

impl Way {
    fn setup(self) -> Setup<'static> {
        let setup = Setup::new(self.ipc, self.wait, self.workers);
        let leases = self.via != Via::Controller;
        Setup { leases, lease_connections: self.lent, reactor: self.reactor, checks: self.checks, ..setup }
    }

    fn start(self) -> Result<Subject> {
        if self.ipc == Channel::Mq {
            std::thread::sleep(QUEUES_GONE);
        }
        self.setup().start()
    }
}

/// One size of a way.
struct Cell {
    bytes: usize,
    /// Samples per turn.
    calls: usize,
    floor_samples: usize,
    recorder: Recorder,
    floor: Recorder,
    /// Of each turn: median of the calls by that of the floor just before.
    ratios: Vec<f64>,
    via: Option<String>,
    reactor: Option<String>,
}

impl Cell {
    /// So many samples per turn as the plan wants, and has time for at these costs.
    fn new(bytes: usize, call_ns: u64, floor_ns: u64, plan: &Plan) -> Result<Self> {
        let calls = plan.samples(call_ns).div_ceil(TURNS);
        ensure!(calls <= TURN_SAMPLES_MAX, "at most {} repetitions", TURN_SAMPLES_MAX * TURNS);
        Ok(Self {
            bytes,
            calls,
            floor_samples: plan.samples(floor_ns).div_ceil(TURNS),
            recorder: Recorder::new(),
            floor: Recorder::new(),
            ratios: Vec::new(),
            via: None,
            reactor: None,
        })
    }
}

pub(crate) fn run(args: &InvokeArgs) -> Result<()> {
    let plan = Plan {
        repetitions: args.repetitions as usize,
        runs: args.runs as usize,
        run_limit: Duration::try_from_secs_f64(args.run_limit)?,
    };
    let mut sink = RowSink::open(args.json.as_deref())?;
    let ways = ways(args)?;
    let steps = ways.len() as u64 * (u64::from(args.runs) + u64::from(args.r100));
    let bar = progress(steps);
    let mut rows = Vec::new();
    for way in ways {
        bar.set_message(way.to_string());
        let placement = match Placement::of(way.wait, &startup_cores()?) {
            Ok(placement) => placement,
            Err(error) => {
                bar.suspend(|| eprintln!("skipped: {way}: {error}"));
                continue;
            }
        };
        let measured = match args.in_flight {
            Some(in_flight) => throughput(way, placement, &args.sizes, in_flight, &plan, &bar),
            None if way.beside_off => {
                let row = row_of("checks", way, placement);
                checks::beside(way.setup(), placement, &args.sizes, &plan, &row, &bar)
            }
            None => round_trips(way, placement, &args.sizes, &plan, &bar),
        };
        let mut measured = measured.with_context(|| way.to_string())?;
        if args.r100 && args.in_flight.is_none() && !way.beside_off {
            measured.extend(paper_rows(way, placement, &args.sizes).with_context(|| format!("{way}, R=100"))?);
            bar.inc(1);
        }
        for row in measured {
            let row = judge(row);
            sink.write(&row)?;
            rows.push(row);
        }
    }
    bar.finish_and_clear();
    if args.json.as_deref().is_none_or(|path| path.as_os_str() != "-") {
        println!("{}", table::render(&rows));
    }
    Ok(())
}

/// Every combination that was asked for and means something: only local calls over rings have a choice of way.
fn ways(args: &InvokeArgs) -> Result<Vec<Way>> {
    let remote_reactors = reactors(&args.reactor)?;
    let both = args.checks.contains(&Checks::Off) && args.checks.contains(&Checks::On);
    let mut ways = Vec::new();
    for &path in &args.path {
        for &ipc in &args.ipc {
            let fits = |via: &Via| match via {
                Via::Auto => true,
                Via::Exchange | Via::Ring => path == Path::Local && ipc == Channel::Ring,
                Via::Queue => path == Path::Local && ipc == Channel::Mq,
                Via::Controller => path == Path::Local,
            };
            let mut vias: Vec<Via> = args.via.iter().copied().filter(fits).collect();
            if vias.is_empty() {
                vias.push(Via::Auto);
            }
            // A local call meets no reactor.
            let reactors: Vec<Option<Reactor>> = match path {
                Path::Remote => remote_reactors.clone(),
                Path::Local => vec![None],
            };
            // Nor has it a key.
            let (checks, beside_off) = match path {
                Path::Remote => (args.checks.last().copied(), both),
                Path::Local => (None, false),
            };
            for &wait in &args.wait {
                for &via in &vias {
                    for &reactor in &reactors {
                        for &lease in &args.lease {
                            let lent = lease == Lent::On;
                            if lent && (path, ipc) != (Path::Remote, Channel::Ring) {
                                continue;
                            }
                            let (workers, touched) = (args.workers, !args.untouched);
                            ways.push(Way {
                                path,
                                ipc,
                                wait,
                                via,
                                workers,
                                touched,
                                reactor,
                                lent,
                                checks,
                                beside_off,
                            });
                        }
                    }
                }
            }
        }
    }
    Ok(ways)
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = match self.path {
            Path::Local => "local",
            Path::Remote => "remote",
        };
        write!(f, "{path} {}, {}", self.ipc.name(), self.wait)?;
        if let Some(reactor) = self.reactor {
            write!(f, ", reactor {reactor}")?;
        }
        if self.lent {
            write!(f, ", {LENT}")?;
        }
        match self.checks {
            Some(_) if self.beside_off => f.write_str(", checks off and on")?,
            Some(checks) => write!(f, ", checks {checks}")?,
            None => {}
        }
        match self.via.name() {
            Some(name) => write!(f, ", via {name}"),
            None => Ok(()),
        }
    }
}

/// What a way stands on: channel, round trips per sample, and its name in rows.
fn floor_of(way: Way, reached_via: &str) -> (channel::Channel, u32, &'static str) {
    match (way.path, way.ipc) {
        (Path::Remote, _) => (channel::Channel::Tcp, 1, "tcp"),
        (Path::Local, Channel::Mq) => (channel::Channel::PosixQueue, 2, "posix_queue_twice"),
        // A line is only ever spun on; a call that sleeps stands on the price of a sleep and a wake each way.
        (Path::Local, Channel::Ring) if way.wait == Wait::Efficient => (channel::Channel::Futex, 1, "futex"),
        (Path::Local, Channel::Ring) if reached_via == "exchange" => (channel::Channel::OneLine, 1, "one_line"),
        (Path::Local, Channel::Ring) => (channel::Channel::TwoLines, 1, "two_lines"),
    }
}

fn round_trips(way: Way, placement: Placement, sizes: &[Size], plan: &Plan, bar: &ProgressBar) -> Result<Vec<Row>> {
    let bytes_max = sizes.iter().map(|size| size.0).max().unwrap_or(8);
    let mut cells: Vec<Cell> = Vec::new();
    let mut floor_name = "";
    for _ in 0..plan.runs {
        // Everything anew for each run: where the lines and the threads of a process come to lie is luck, and lasts as long as it lives.
        let subject = way.start()?;
        let mut caller = Caller::new(way, placement, &subject)?;
        let reached_via = caller.reach(&subject, sizes[0].0)?;
        if let Some(wanted) = way.via.name() {
            let reached = reached_via.as_deref().unwrap_or("controller");
            ensure!(reached == wanted, "asked for calls via {wanted}, and they went via {reached}");
        }
        let (channel, trips_per_sample, name) = floor_of(way, reached_via.as_deref().unwrap_or(""));
        ensure!(floor_name.is_empty() || floor_name == name, "the way of calls changed between two runs");
        floor_name = name;
        let floor_bytes = |bytes: usize| if channel.is_a_word() { 8 } else { bytes };
        let spins = matches!(channel, channel::Channel::TwoLines | channel::Channel::OneLine);
        let floor_wait = if spins { Wait::Latency } else { way.wait };
        let mut pair = Pair::open(channel, floor_wait, placement, floor_bytes(bytes_max))?;

        for (at, &Size(bytes)) in sizes.iter().enumerate() {
            subject.settle();
            let floor_ns = warm_up(&mut pair, floor_bytes(bytes), trips_per_sample)?;
            let call_ns = caller.warm_up(bytes)?;
            if cells.len() == at {
                cells.push(Cell::new(bytes, call_ns, floor_ns, plan)?);
            }
            let cell = &mut cells[at];
            cell.reactor = subject.reactor();
            let (mut calls_ns, mut floor_ns) = (Vec::new(), Vec::new());
            for _ in 0..TURNS {
                subject.settle();
                let block = Block { bytes: floor_bytes(bytes), samples: cell.floor_samples, trips_per_sample };
                let floor_start = floor_ns.len();
                pair.run(block, &mut floor_ns)?;
                let first = turn_warm_up(call_ns, TURN_WARM_UP_MAX);
                let (mut samples_ns, via) = caller.calls(bytes, first, cell.calls)?;
                ensure!(cell.via.is_none() || cell.via == via, "the way of calls changed while they were measured");
                cell.via = via;
                calls_ns.extend_from_slice(&samples_ns);
                let floor_median_ns = median(&mut floor_ns[floor_start..]);
                cell.ratios.push(median(&mut samples_ns) as f64 / floor_median_ns.max(1) as f64);
            }
            cell.recorder.add_run(&calls_ns);
            cell.floor.add_run(&floor_ns);
        }
        bar.inc(1);
    }

    let mut rows: Vec<Row> = cells
        .iter()
        .map(|cell| {
            let row = Row {
                payload_bytes: cell.bytes as u64,
                times: cell.recorder.summary(),
                via: cell.via.clone(),
                reactor: cell.reactor.clone().filter(|_| way.path == Path::Remote),
                distribution: if cell.bytes <= DISTRIBUTION_BYTES_MAX {
                    cell.recorder.distribution()
                } else {
                    Vec::new()
                },
                ..row_of("invocation", way, placement)
            };
            row.in_turns_with(floor_name, cell.floor.summary().p50_us, cell.ratios.clone())
        })
        .collect();
    rows.extend(handovers(way, &rows));
    Ok(rows)
}

/// Rows that set larger untouched payloads beside 64 B of the same run: handing over should cost nothing per byte.
fn handovers(way: Way, rows: &[Row]) -> Vec<Row> {
    if way.path != Path::Local || way.ipc != Channel::Ring || way.touched {
        return Vec::new();
    }
    let Some(small) = rows.iter().find(|row| row.payload_bytes == 64) else { return Vec::new() };
    let larger = rows.iter().filter(|row| row.payload_bytes > 64);
    larger
        .map(|row| {
            Row { experiment: "handover".into(), distribution: Vec::new(), ..row.clone() }
                .against("64 B of this run", small.times.p50_us)
        })
        .collect()
}

/// Calls per second with many calls in flight. Times are of whole blocks, so the row has a value instead.
fn throughput(
    way: Way,
    placement: Placement,
    sizes: &[Size],
    in_flight: u32,
    plan: &Plan,
    bar: &ProgressBar,
) -> Result<Vec<Row>> {
    ensure!(way.path == Path::Local, "--in-flight measures local calls: use --path local");
    let subject = way.start()?;
    let mut client = subject.quiet_client()?;
    let mut rows = Vec::new();
    for &Size(bytes) in sizes {
        let mut rates = Vec::new();
        let mut via = None;
        let mut calls = 2_000;
        for run in 0..=plan.runs {
            let order =
                Drive { bytes, warm_up: 1_000, calls, via: Via::Ring, touched: true, in_flight: in_flight as usize };
            let driven = drive(&mut client, order)?;
            let [total_ns] = driven.samples_ns[..] else { bail!("the driving function gave no total") };
            via = Some(driven.via);
            // The first block only tells how many calls fit in a run.
            if run == 0 {
                calls = plan.samples(total_ns / calls as u64).max(SAMPLES_MIN);
                continue;
            }
            rates.push(calls as f64 / (total_ns as f64 / 1e9));
        }
        rates.sort_by(f64::total_cmp);
        let median = rates[rates.len() / 2];
        let mut row = row_of("throughput", way, placement);
        row.payload_bytes = bytes as u64;
        row.via = via;
        row.in_flight = Some(in_flight);
        row.value = Some(median);
        row.unit = Some("calls/s".into());
        row.times.runs = rates.len() as u64;
        row.times.run_p50_spread = (rates[rates.len() - 1] - rates[0]) / median;
        rows.push(row);
    }
    bar.inc(plan.runs as u64);
    Ok(rows)
}

/// R = 100 on a fresh process for each size, the cold first call included; then the same without it.
fn paper_rows(way: Way, placement: Placement, sizes: &[Size]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &Size(bytes) in sizes {
        let subject = way.start()?;
        let mut caller = Caller::new(way, placement, &subject)?;
        let (samples_ns, via) = caller.calls(bytes, 0, SAMPLES_MIN)?;
        for (experiment, samples_ns) in
            [("invocation_r100", &samples_ns[..]), ("invocation_r100_drop_first", &samples_ns[1..])]
        {
            let mut row = row_of(experiment, way, placement);
            row.payload_bytes = bytes as u64;
            row.via.clone_from(&via);
            row.reactor = subject.reactor().filter(|_| way.path == Path::Remote);
            row.times = interpolated(samples_ns);
            rows.push(row);
        }
    }
    Ok(rows)
}

fn row_of(experiment: &str, way: Way, placement: Placement) -> Row {
    let path = if way.path == Path::Local { "local" } else { "remote" };
    Row {
        experiment: experiment.into(),
        path: path.into(),
        ipc: way.ipc.name().into(),
        wait: way.wait.to_string(),
        placement: placement.to_string(),
        workers: Some(way.workers.into()),
        touched: Some(way.touched),
        checks: way.checks.map(|checks| checks.to_string()),
        ..Row::default()
    }
}

/// Makes the calls of a way and times them.
struct Caller {
    way: Way,
    placement: Placement,
    remote: RemoteCaller,
}

impl Caller {
    fn new(way: Way, placement: Placement, subject: &Subject) -> Result<Self> {
        let client = match way.path {
            Path::Local => subject.quiet_client(),
            Path::Remote => subject.client(),
        }?;
        Ok(Self { way, placement, remote: RemoteCaller::new(client, way.touched)? })
    }

    /// Times of `calls` calls after `warm_up` untimed ones, and how local ones travelled.
    fn calls(&mut self, bytes: usize, warm_up: usize, calls: usize) -> Result<(Vec<u64>, Option<String>)> {
        pin(&[self.placement.ours])?;
        if self.way.path == Path::Remote {
            let mut samples_ns = Vec::new();
            self.remote.calls(bytes, warm_up, calls, &mut samples_ns)?;
            return Ok((samples_ns, self.way.lent.then(|| LENT.to_owned())));
        }
        let order = Drive { bytes, warm_up, calls, via: self.way.via, touched: self.way.touched, in_flight: 1 };
        let driven = drive(self.remote.client(), order)?;
        ensure!(driven.samples_ns.len() == calls, "{} of {calls} times came back", driven.samples_ns.len());
        Ok((driven.samples_ns, Some(driven.via)))
    }

    /// Calls until a worker is leased, which takes the controller a while, and says how calls travel then.
    fn reach(&mut self, subject: &Subject, bytes: usize) -> Result<Option<String>> {
        let mut reached_via = None;
        for attempt in 0..LEASE_ATTEMPTS {
            let (_, via) = self.calls(bytes, 0, 1 << attempt)?;
            reached_via = via;
            if !self.way.lent && reached_via.as_deref() != Some("controller") || self.way.via == Via::Controller {
                break;
            }
            subject.settle();
        }
        Ok(reached_via)
    }

    /// Calls until warm; what a call takes then, in nanoseconds.
    fn warm_up(&mut self, bytes: usize) -> Result<u64> {
        until_warm(|calls, samples_ns| {
            *samples_ns = self.calls(bytes, 1, calls)?.0;
            Ok(())
        })
    }
}
