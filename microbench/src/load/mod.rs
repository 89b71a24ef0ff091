//! `praas-bench load`: many calls at once, and what happens to their times.
//!
//! Question  How many calls a second does a process answer, and how long does a call take at a part of that?
//! Measures  closed loop: answers per second, and each call from when it was made; open loop: each call from when it was
//!           *due*, so that a generator held up by a slow server omits nothing (`pace.rs`). Not halved.
//! Load      closed: `--in-flight` calls on each of `--connections`, a new one for each answer; open: `--rate`, or
//!           `--rates` as parts of the closed-loop peak of this run, with as many calls in flight as it takes (at most 1000 a
//!           connection, 4000 in all, 64 MiB). One thread makes all calls and takes all answers.
//! Excludes  starting, connecting, a tenth of each point's time to warm up. Processor time and system calls are counted by
//!           others; system calls in a pass of their own.
//!           With half of the peak among the parts, 64 B and one connection, half of the rate that is owed is one more point.
//! Samples   every call; `--runs` runs of `--seconds` each, of fresh processes. Within a run everybody has their turn at a point
//!           before the next point begins, and stands at the same rates: parts of the lowest peak of ours.
//! Checks    length, sequence number and last byte of every answer, and that it answers the call it claims to.
//! Baseline  one call in flight, same run; and the same generator against raw peers: what is left is what ours adds, and
//!           what the generator costs shows there.

mod lanes;
mod pace;

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use indicatif::ProgressBar;
use rustix::time::{ClockId, clock_gettime};

use crate::floors::progress;
use crate::owed::{HALF_OF_OWED_RATE, judge};
use crate::peers::{Kind, Server};
use crate::place::{Network, Place};
use crate::placement::{Placement, Wait, pin, startup_cores};
use crate::recorder::Recorder;
use crate::row::{Load, Row, RowSink};
use crate::size::Size;
use crate::subject::{Channel, Reactor, SETTLE, Setup, Subject, pairs, reactors};
use crate::table;
use crate::usage::{SystemCalls, Tool, Whom, family, processor_seconds};
use lanes::{Lane, Lanes};
use pace::{Arrivals, Outcome, Pace, Schedule, Share, offer, rates_of};

/// Most calls in flight of an open loop: on one connection, in all, and in bytes. A process answers `Busy` above the first
/// two, and keeps payloads in an arena of 256 MiB.
const IN_FLIGHT_MAX: usize = 1000;
const IN_FLIGHT_ALL_MAX: usize = 4000;
const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;

/// Most connections; each needs a descriptor here and one there.
const CONNECTIONS_MAX: u32 = 8_000;

/// The part of each point's time that is not recorded.
const WARM_UP: f64 = 0.1;

/// How long system calls are counted, at most.
const COUNTED_MAX: f64 = 0.2;

/// The part of its own peak at which a tail is owed.
const HALF: Share = Share(0.5);

/// A subject whose peak is this much above the lowest also stands at half of its own.
const OWN_PEAK: f64 = 1.02;

#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    /// Connections, all polled by one thread.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    connections: u32,
    /// Calls in flight on each connection (closed loop); several make a line of throughput over calls in flight.
    #[arg(long, value_delimiter = ',', default_value = "64", value_parser = clap::value_parser!(u32).range(1..=1000))]
    in_flight: Vec<u32>,
    /// Calls per second (open loop).
    #[arg(long, value_name = "CALLS/S", value_delimiter = ',', conflicts_with = "rates", value_parser = rate)]
    rate: Vec<f64>,
    /// The same as parts of the closed-loop peak measured just before, such as 10%,25%,50%,75%,90%.
    #[arg(long, value_name = "SHARES", value_delimiter = ',')]
    rates: Vec<Share>,
    /// How calls of an open loop follow each other.
    #[arg(long, default_value = "poisson")]
    arrivals: Arrivals,
    /// Payload sizes.
    #[arg(long, value_delimiter = ',', default_value = "64")]
    sizes: Vec<Size>,
    /// Wait modes.
    #[arg(long, value_delimiter = ',', default_value = "balanced")]
    wait: Vec<Wait>,
    /// What the process waits with; several take turns, and io_uring is set beside epoll [default: as praas-process
    /// chooses].
    #[arg(long, value_delimiter = ',')]
    reactor: Vec<Reactor>,
    /// Where the two ends stand.
    #[arg(long, default_value = "loopback")]
    place: Place,
    /// Raw peers and runtimes under the same load, to see what the generator costs; `none` leaves them out.
    #[arg(long, value_delimiter = ',', default_value = "epoll", value_parser = peer)]
    peers: Vec<PeerChoice>,
    /// Workers of the process.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=63))]
    workers: u8,
    /// Channel between the process and its workers.
    #[arg(long, default_value = "ring")]
    ipc: Channel,
    /// Length of each point, seconds.
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// Runs, each of fresh processes; the spread between them is reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A peer under load; HTTP without pipelining says nothing about many calls on a connection.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
struct PeerChoice(Option<Kind>);

fn peer(text: &str) -> Result<PeerChoice, String> {
    if text == "none" {
        return Ok(PeerChoice(None));
    }
    let known = || Kind::ALL.into_iter().filter(|kind| !kind.is_http());
    let names: Vec<&str> = known().map(Kind::name).collect();
    let kind = known().find(|kind| kind.name() == text);
    kind.map(|kind| PeerChoice(Some(kind))).ok_or_else(|| format!("none, or some of {}", names.join(", ")))
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1.0..=1e8).contains(rate));
    rate.ok_or_else(|| "1 to 100000000 calls per second".to_owned())
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.05..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "0.05 to 3600 seconds".to_owned())
}

/// Who is under load.
#[derive(Copy, Clone, Debug)]
enum Who {
    Ours(Option<Reactor>),
    Peer(Kind),
}

enum Running {
    Ours(Subject),
    Peer(Server),
}

impl Running {
    fn start(who: Who, args: &LoadArgs, wait: Wait, placement: Placement, network: &Network) -> Result<Self> {
        Ok(match who {
            Who::Ours(reactor) => {
                let connections_max = (args.connections >= 1000).then_some(args.connections + 8);
                let setup = Setup::new(args.ipc, wait, args.workers);
                let setup = Setup { reactor, connections_max, network: Some(network), ..setup };
                Running::Ours(setup.start()?)
            }
            Who::Peer(kind) => Running::Peer(Server::start(kind, wait, placement.theirs, network)?),
        })
    }

    /// Its processes. Workers that have not started yet are missed, so ask when it has served.
    fn pids(&self) -> Result<Vec<u32>> {
        match self {
            Running::Ours(subject) => family(subject.pid()),
            Running::Peer(server) => Ok(vec![server.pid()]),
        }
    }

    fn lanes(&self, connections: u32, bytes: usize, wait: Wait) -> Result<Lanes> {
        let lane = |_| match self {
            Running::Ours(subject) => Lane::ours(subject.client()?),
            Running::Peer(server) => Lane::raw(server.connect(bytes)?, bytes),
        };
        Lanes::new((0..connections).map(lane).collect::<Result<_>>()?, bytes, wait)
    }
}

/// A load, as it was asked for.
#[derive(Copy, Clone, Debug, PartialEq)]
enum Point {
    /// One connection, one call in flight.
    One,
    Closed(u32),
    /// The n-th rate that was asked for.
    Rate(usize),
    /// Half of the subject's own peak, where that is not among the rates.
    OwnHalf,
    /// Half of the rate that is owed.
    OwedHalf,
}

/// What a point gave for one subject, over all runs.
struct Cell {
    point: Point,
    recorder: Recorder,
    /// One of each for every run.
    rates: Vec<f64>,
    due: Vec<f64>,
    of_peak: Vec<f64>,
    server_cpu_us: Vec<f64>,
    client_cpu_us: Vec<f64>,
    p50_ns: Vec<u64>,
    unsent: u64,
    server_calls: Option<f64>,
    client_calls: Option<f64>,
}

impl Cell {
    fn new(point: Point) -> Self {
        Self {
            point,
            recorder: Recorder::new(),
            rates: Vec::new(),
            due: Vec::new(),
            of_peak: Vec::new(),
            server_cpu_us: Vec::new(),
            client_cpu_us: Vec::new(),
            p50_ns: Vec::new(),
            unsent: 0,
            server_calls: None,
            client_calls: None,
        }
    }
}

struct Party {
    who: Who,
    reactor: Option<String>,
    cells: Vec<Cell>,
}

impl Party {
    fn cell(&mut self, point: Point) -> &mut Cell {
        let at = self.cells.iter().position(|cell| cell.point == point).unwrap_or_else(|| {
            self.cells.push(Cell::new(point));
            self.cells.len() - 1
        });
        &mut self.cells[at]
    }
}

pub(crate) fn run(args: &LoadArgs) -> Result<()> {
    let mut sink = RowSink::open(args.json.as_deref())?;
    let reactors = reactors(&args.reactor)?;
    let Some(network) = Network::make(args.place)? else { return Ok(()) };
    let _inside = network.enter()?;
    crate::idle_connections::raise_descriptor_limit()?;
    // A call is due to the microsecond; the default lets a sleeper oversleep by 50.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
    let tool = Tool::find();
    if tool.is_none() {
        eprintln!("skipped: system calls per call: needs perf (with the right to trace) or strace");
    }
    let cores = startup_cores()?;
    let points = 1 + args.in_flight.len() + args.rate.len() + args.rates.len();
    let bar = progress((args.wait.len() * args.sizes.len() * points) as u64 * u64::from(args.runs));
    let mut rows = Vec::new();
    for &wait in &args.wait {
        let placement = match Placement::of(wait, &cores) {
            Ok(placement) => placement,
            Err(error) => {
                bar.suspend(|| eprintln!("skipped: {wait}: {error}"));
                continue;
            }
        };
        for &Size(bytes) in &args.sizes {
            bar.set_message(format!("{wait}, {}", Size(bytes)));
            let mut experiment =
                Experiment { args, reactors: &reactors, wait, placement, network: &network, bytes, tool };
            for row in experiment.run(&bar).with_context(|| format!("{wait}, {}", Size(bytes)))? {
                let row = judge(row);
                sink.write(&row)?;
                rows.push(row);
            }
        }
    }
    bar.finish_and_clear();
    pin(&cores)?;
    if args.json.as_deref().is_none_or(|path| path.as_os_str() != "-") {
        println!("{}", table::render_load(&rows));
    }
    Ok(())
}

/// One wait mode and one size.
struct Experiment<'a> {
    args: &'a LoadArgs,
    reactors: &'a [Option<Reactor>],
    wait: Wait,
    placement: Placement,
    network: &'a Network,
    bytes: usize,
    tool: Option<Tool>,
}

/// A subject that runs, with its connections.
struct Started {
    running: Running,
    pids: Vec<u32>,
    one: Lanes,
    all: Lanes,
    /// Most answers per second of any closed loop.
    peak: f64,
}

impl Experiment<'_> {
    fn run(&mut self, bar: &ProgressBar) -> Result<Vec<Row>> {
        let args = self.args;
        let peers = args.peers.iter().filter_map(|choice| choice.0).filter(|kind| kind.supports(self.wait));
        let parties = self.reactors.iter().copied().map(Who::Ours).chain(peers.map(Who::Peer));
        let mut parties: Vec<Party> = parties.map(|who| Party { who, reactor: None, cells: Vec::new() }).collect();
        for run in 0..args.runs {
            self.one_run(run, &mut parties, bar)?;
        }
        Ok(self.rows(&parties))
    }

    fn one_run(&self, run: u32, parties: &mut [Party], bar: &ProgressBar) -> Result<()> {
        let args = self.args;
        let mut started = Vec::new();
        for party in &mut *parties {
            let running = Running::start(party.who, args, self.wait, self.placement, self.network)?;
            if let Running::Ours(subject) = &running {
                party.reactor = subject.reactor();
            }
            let one = running.lanes(1, self.bytes, self.wait)?;
            let all = running.lanes(args.connections, self.bytes, self.wait)?;
            started.push(Started { running, pids: Vec::new(), one, all, peak: 0.0 });
        }
        // A process under test gave this thread all cores back.
        pin(&[self.placement.ours])?;
        let seconds = args.seconds;

        for (party, started) in parties.iter_mut().zip(&mut started) {
            // The first calls start what is started on demand; then all its processes are there.
            self.offer(&mut started.one, 1, &closed, seconds.min(COUNTED_MAX) / 2.0)?;
            started.pids = started.running.pids()?;
            let rate = self.measure(party, started, Point::One, 1, &closed, seconds)?;
            started.peak = started.peak.max(rate);
            if run == 0 {
                self.count(party, started, Point::One, 1)?;
            }
            self.settle();
        }
        bar.inc(1);
        // One call on one connection was measured already.
        let in_flight = args.in_flight.iter().filter(|&&in_flight| (in_flight, args.connections) != (1, 1));
        for &in_flight in in_flight {
            for (party, started) in parties.iter_mut().zip(&mut started) {
                let point = Point::Closed(in_flight);
                let rate = self.measure(party, started, point, in_flight as usize, &closed, seconds)?;
                started.peak = started.peak.max(rate);
                if run == 0 && Some(&in_flight) == args.in_flight.last() {
                    self.count(party, started, point, in_flight as usize)?;
                }
                self.settle();
            }
            bar.inc(1);
        }

        let is_ours = |party: &Party| matches!(party.who, Who::Ours(_));
        let ours = parties.iter().zip(&started).filter(|(party, _)| is_ours(party));
        let common_peak = ours.map(|(_, started)| started.peak).fold(f64::INFINITY, f64::min);
        ensure!(common_peak > 0.0, "no answer within {seconds} s");
        let rates = if args.rate.is_empty() { rates_of(&args.rates, common_peak) } else { args.rate.clone() };
        let mut loads: Vec<(Point, Option<f64>)> =
            rates.iter().enumerate().map(|(at, &rate)| (Point::Rate(at), Some(rate))).collect();
        if args.rates.contains(&HALF) {
            loads.push((Point::OwnHalf, None));
            if (self.bytes, args.connections) == (64, 1) {
                loads.push((Point::OwedHalf, Some(HALF_OF_OWED_RATE)));
            }
        }
        for (point, rate) in loads {
            for (party, started) in parties.iter_mut().zip(&mut started) {
                let rate = match rate {
                    Some(rate) => rate,
                    None if is_ours(party) && started.peak > common_peak * OWN_PEAK => started.peak * HALF.0,
                    None => continue,
                };
                let room = IN_FLIGHT_MAX.min(IN_FLIGHT_ALL_MAX / args.connections as usize);
                let room = room.min(IN_FLIGHT_BYTES_MAX / (self.bytes * args.connections as usize)).max(1);
                // The same times for everybody, others in each run.
                let seed = u64::from(run) + 1;
                let pace = |end_ns| {
                    let schedule = Schedule::new(rate, args.arrivals, seed, end_ns);
                    Pace::Open { schedule, end_ns }
                };
                self.measure(party, started, point, room, &pace, seconds)?;
                let cell = party.cell(point);
                cell.due.push(rate);
                if started.peak > 0.0 {
                    cell.of_peak.push(rate / started.peak);
                }
                self.settle();
            }
            if matches!(point, Point::Rate(_)) {
                bar.inc(1);
            }
        }
        Ok(())
    }

    /// Offers a load for so long.
    fn offer(&self, lanes: &mut Lanes, in_flight: usize, pace: &dyn Fn(u64) -> Pace, seconds: f64) -> Result<Outcome> {
        let end_ns = u64::try_from(Duration::try_from_secs_f64(seconds)?.as_nanos())?;
        lanes.begin(in_flight);
        // Faulted in now: half a million samples a second is more than anybody reaches here.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most an hour of samples")]
        let samples_ns = vec![0; (seconds.min(4.0) * 5e5) as usize];
        offer(lanes, &mut pace(end_ns), samples_ns)
    }

    /// The same, recorded, after a warm-up; answers per second.
    fn measure(
        &self,
        party: &mut Party,
        started: &mut Started,
        point: Point,
        in_flight: usize,
        pace: &dyn Fn(u64) -> Pace,
        seconds: f64,
    ) -> Result<f64> {
        let describe = || format!("{:?}, {point:?}", party.who);
        let lanes = if point == Point::One { &mut started.one } else { &mut started.all };
        self.offer(lanes, in_flight, pace, seconds * WARM_UP).with_context(describe)?;
        let (server_before, client_before) = (processor_seconds(&started.pids)?, own_seconds());
        let outcome = self.offer(lanes, in_flight, pace, seconds).with_context(describe)?;
        let server = processor_seconds(&started.pids)? - server_before;
        let client = own_seconds() - client_before;
        ensure!(outcome.answers > 0, "no answer within {seconds} s");
        let cell = party.cell(point);
        let per_call_us = |seconds: f64| seconds * 1e6 / outcome.answers as f64;
        cell.server_cpu_us.push(per_call_us(server));
        cell.client_cpu_us.push(per_call_us(client));
        cell.rates.push(outcome.rate());
        cell.unsent += outcome.unsent;
        cell.p50_ns.push(crate::recorder::median(&mut outcome.samples_ns.clone()));
        cell.recorder.add_run(&outcome.samples_ns);
        Ok(outcome.rate())
    }

    /// Counts system calls of a closed loop.
    fn count(&self, party: &mut Party, started: &mut Started, point: Point, in_flight: usize) -> Result<()> {
        let Some(tool) = self.tool else { return Ok(()) };
        let lanes = if point == Point::One { &mut started.one } else { &mut started.all };
        let own_tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        let mut calls = [None; 2];
        for (side, whom) in [Whom::Processes(&started.pids), Whom::Thread(own_tid)].into_iter().enumerate() {
            let counting = match SystemCalls::count(tool, whom) {
                Ok(counting) => counting,
                Err(error) => {
                    eprintln!("skipped: system calls per call: needs the right to count ({error:#})");
                    return Ok(());
                }
            };
            let outcome = self.offer(lanes, in_flight, &closed, self.args.seconds.min(COUNTED_MAX))?;
            calls[side] = Some(counting.end()? as f64 / outcome.samples_ns.len() as f64);
        }
        let cell = party.cell(point);
        [cell.server_calls, cell.client_calls] = calls;
        Ok(())
    }

    fn settle(&self) {
        if self.wait == Wait::Latency {
            std::thread::sleep(SETTLE);
        }
    }

    fn rows(&self, parties: &[Party]) -> Vec<Row> {
        let mut rows = Vec::new();
        for party in parties {
            let one = party.cells.iter().find(|cell| cell.point == Point::One);
            let one_p50_us = one.map(|cell| cell.recorder.summary().p50_us);
            for cell in &party.cells {
                let row = self.row("load", party, cell);
                rows.push(match one_p50_us {
                    Some(p50_us) if cell.point != Point::One => row.against("one in flight", p50_us),
                    _ => row,
                });
            }
        }
        let points: Vec<Point> = parties.iter().flat_map(|party| &party.cells).map(|cell| cell.point).collect();
        // Half of one's own peak is another rate for everybody else.
        for (at, &point) in points.iter().enumerate().filter(|(_, point)| **point != Point::OwnHalf) {
            if points[..at].contains(&point) {
                continue;
            }
            let ours = parties.iter().filter(|party| matches!(party.who, Who::Ours(_)));
            let ours: Vec<(&Party, &Cell)> =
                ours.filter_map(|party| Some((party, party.cells.iter().find(|cell| cell.point == point)?))).collect();
            let p50_us = |cell: &Cell| cell.recorder.summary().p50_us;
            let labels: Vec<_> = ours.iter().map(|(party, cell)| (party.reactor.as_deref(), p50_us(cell))).collect();
            for (one, other, name) in pairs(&labels) {
                let ((party, cell), other) = (ours[one], ours[other].1);
                let runs = cell.p50_ns.iter().zip(&other.p50_ns);
                let ratios = runs.map(|(&mine, &theirs)| mine as f64 / theirs.max(1) as f64).collect();
                rows.push(self.row("reactors", party, cell).in_turns_with(&name, p50_us(other), ratios));
            }
        }
        rows
    }

    fn row(&self, experiment: &str, party: &Party, cell: &Cell) -> Row {
        let (path, ipc) = match party.who {
            Who::Ours(_) => ("remote", self.args.ipc.name()),
            Who::Peer(kind) => ("raw", kind.name()),
        };
        let is_open = matches!(cell.point, Point::Rate(_) | Point::OwnHalf | Point::OwedHalf);
        let load = Load {
            connections: if cell.point == Point::One { 1 } else { self.args.connections },
            kind: if is_open { "open" } else { "closed" }.into(),
            rate_due: middle(&cell.due),
            rate: middle(&cell.rates).unwrap_or_default(),
            of_peak: middle(&cell.of_peak).filter(|_| path == "remote"),
            unsent: cell.unsent,
            server_cpu_us: middle(&cell.server_cpu_us),
            client_cpu_us: middle(&cell.client_cpu_us),
            server_calls: cell.server_calls,
            client_calls: cell.client_calls,
        };
        Row {
            experiment: experiment.into(),
            path: path.into(),
            ipc: ipc.into(),
            wait: self.wait.to_string(),
            payload_bytes: self.bytes as u64,
            times: cell.recorder.summary(),
            reactor: party.reactor.clone(),
            place: Some(self.network.place().to_string()),
            placement: self.placement.to_string(),
            workers: matches!(party.who, Who::Ours(_)).then_some(self.args.workers.into()),
            in_flight: match cell.point {
                Point::One => Some(1),
                Point::Closed(in_flight) => Some(in_flight),
                Point::Rate(_) | Point::OwnHalf | Point::OwedHalf => None,
            },
            load: Some(load),
            ..Row::default()
        }
    }
}

fn closed(end_ns: u64) -> Pace {
    Pace::Closed { end_ns }
}

/// Processor time of this thread so far.
fn own_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The median of one figure per run.
fn middle(figures: &[f64]) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_without_pipelining_are_not_taken_for_loaded_ones() {
        assert_eq!(peer("none"), Ok(PeerChoice(None)));
        assert_eq!(peer("uring"), Ok(PeerChoice(Some(Kind::Uring))));
        assert!(peer("http").unwrap_err().contains("blocking, epoll, uring"));
    }

    #[test]
    fn the_figure_of_a_row_is_the_middle_run() {
        assert_eq!(middle(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(middle(&[]), None);
    }
}
