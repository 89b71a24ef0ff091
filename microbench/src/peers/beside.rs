//! `praas-bench peers`: our remote call beside the same exchange over other people's servers.
//!
//! Question  What does a remote call cost next to a bare TCP ping-pong, to a runtime's, to HTTP through a gateway?
//! Measures  round trips of an echo as its caller sees it, not halved: ours as `remote.rs` says; raw servers and runtimes
//!           with a client that blocks or spins on its socket; HTTP with a hyper client.
//! Load      closed loop, one call in flight, one connection; cores as in `invoke`.
//! Excludes  starting, connecting, first touch of buffers, and some calls at the start of each turn.
//! Samples   up to `--repetitions` per run, `--runs` runs, each of fresh processes. Everybody has their turn, one after the
//!           other, several times a run, and the one who begins changes; a ratio is the median over those turns.
//! Checks    length, sequence number and last byte of every answer; the first of a block whole.
//! Baseline  `best_raw_tcp`: of `blocking`, `epoll` and `uring`, the one with the smallest median of this size and wait mode.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::ProgressBar;

use super::{Echo, Kind};
use crate::floors::progress;
use crate::owed::judge;
use crate::place::{Network, Place};
use crate::placement::{Placement, Wait, pin, startup_cores};
use crate::plan::{Plan, turn_warm_up};
use crate::recorder::{Recorder, median};
use crate::remote::RemoteCaller;
use crate::row::{Row, RowSink};
use crate::size::Size;
use crate::subject::{Channel, Reactor, Setup, Subject, pairs, reactors};
use crate::table;

/// How often everybody has their turn in a run.
const TURNS: usize = 4;

/// Most calls made, and not recorded, at the start of each turn.
const TURN_WARM_UP_MAX: usize = 2_000;

/// How the fastest raw server is called in rows.
pub(crate) const BEST_RAW: &str = "best_raw_tcp";

#[derive(Args, Debug)]
pub(crate) struct PeersArgs {
    /// Peers to measure [default: all].
    #[arg(long, value_delimiter = ',')]
    peers: Vec<Kind>,
    /// Payload sizes.
    #[arg(long, value_delimiter = ',', default_value = "64,1KiB,100KiB,1MiB,5MiB")]
    sizes: Vec<Size>,
    /// Wait modes.
    #[arg(long, value_delimiter = ',', default_value = "latency,balanced,efficient")]
    wait: Vec<Wait>,
    /// What our process waits with; several take turns, and io_uring is set beside epoll [default: as praas-process
    /// chooses].
    #[arg(long, value_delimiter = ',')]
    reactor: Vec<Reactor>,
    /// Where the two ends stand.
    #[arg(long, default_value = "loopback")]
    place: Place,
    /// Channel between our process and its workers.
    #[arg(long, default_value = "ring")]
    ipc: Channel,
    /// Samples of one run of one cell.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    repetitions: u32,
    /// Runs, each of fresh processes; the spread between them is reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Seconds after which a run of a cell has enough samples.
    #[arg(long, default_value_t = 0.1)]
    run_limit: f64,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Who takes a turn: our process, or a peer. Each with what was measured of it, size by size.
enum Who {
    Ours(Option<Reactor>),
    Peer(Kind),
}

struct Party {
    who: Who,
    /// As the process says, once it was started.
    reactor: Option<String>,
    cells: Vec<Cell>,
}

/// One size of a party.
struct Cell {
    samples: usize,
    call_ns: u64,
    recorder: Recorder,
    /// The median of each turn of every run, in order.
    turn_medians_ns: Vec<u64>,
}

/// A party that runs.
enum Running {
    Ours(Subject, Box<RemoteCaller>),
    Peer(Echo),
}

impl Running {
    fn start(who: &Who, args: &PeersArgs, wait: Wait, placement: Placement, network: &Network) -> Result<Self> {
        match who {
            Who::Ours(reactor) => {
                let setup = Setup { reactor: *reactor, network: Some(network), ..Setup::new(args.ipc, wait, 2) };
                let subject = setup.start()?;
                let caller = Box::new(RemoteCaller::new(subject.client()?, true)?);
                Ok(Running::Ours(subject, caller))
            }
            Who::Peer(kind) => Ok(Running::Peer(Echo::start(*kind, wait, placement, network)?)),
        }
    }

    fn warm_up(&mut self, bytes: usize) -> Result<u64> {
        match self {
            Running::Ours(_, caller) => caller.warm_up(bytes),
            Running::Peer(echo) => echo.warm_up(bytes),
        }
    }

    fn calls(&mut self, bytes: usize, warm_up: usize, samples: usize, samples_ns: &mut Vec<u64>) -> Result<()> {
        match self {
            Running::Ours(_, caller) => caller.calls(bytes, warm_up, samples, samples_ns),
            Running::Peer(echo) => echo.calls(bytes, warm_up, samples, samples_ns),
        }
    }

    fn settle(&self) {
        match self {
            Running::Ours(subject, _) => subject.settle(),
            Running::Peer(echo) => echo.server.settle(),
        }
    }
}

pub(crate) fn run(args: &PeersArgs) -> Result<()> {
    let plan = Plan {
        repetitions: args.repetitions as usize,
        runs: args.runs as usize,
        run_limit: Duration::try_from_secs_f64(args.run_limit)?,
    };
    let mut sink = RowSink::open(args.json.as_deref())?;
    let reactors = reactors(&args.reactor)?;
    let Some(network) = Network::make(args.place)? else { return Ok(()) };
    let _inside = network.enter()?;
    let cores = startup_cores()?;
    let bar = progress(args.wait.len() as u64 * plan.runs as u64);
    let mut rows = Vec::new();
    for &wait in &args.wait {
        bar.set_message(wait.name());
        let placement = match Placement::of(wait, &cores) {
            Ok(placement) => placement,
            Err(error) => {
                bar.suspend(|| eprintln!("skipped: {wait}: {error}"));
                bar.inc(plan.runs as u64);
                continue;
            }
        };
        for row in measure(args, &reactors, wait, placement, &network, &plan, &bar).with_context(|| wait.to_string())? {
            let row = judge(row);
            sink.write(&row)?;
            rows.push(row);
        }
    }
    bar.finish_and_clear();
    pin(&cores)?;
    if args.json.as_deref().is_none_or(|path| path.as_os_str() != "-") {
        println!("{}", table::render_peers(&rows));
    }
    Ok(())
}

fn measure(
    args: &PeersArgs,
    reactors: &[Option<Reactor>],
    wait: Wait,
    placement: Placement,
    network: &Network,
    plan: &Plan,
    bar: &ProgressBar,
) -> Result<Vec<Row>> {
    let kinds = if args.peers.is_empty() { &Kind::ALL[..] } else { &args.peers };
    let parties = reactors.iter().copied().map(Who::Ours);
    let parties = parties.chain(kinds.iter().copied().filter(|kind| kind.supports(wait)).map(Who::Peer));
    let mut parties: Vec<Party> = parties.map(|who| Party { who, reactor: None, cells: Vec::new() }).collect();

    for _ in 0..plan.runs {
        let mut running = Vec::new();
        for party in &mut parties {
            let one = Running::start(&party.who, args, wait, placement, network)?;
            if let Running::Ours(subject, _) = &one {
                party.reactor = subject.reactor();
            }
            running.push(one);
        }
        // A process under test gave this thread all cores back.
        pin(&[placement.ours])?;
        for (at, &Size(bytes)) in args.sizes.iter().enumerate() {
            for (party, running) in parties.iter_mut().zip(&mut running) {
                let call_ns = running.warm_up(bytes)?;
                running.settle();
                if party.cells.len() == at {
                    let samples = plan.samples(call_ns).div_ceil(TURNS);
                    let (recorder, turn_medians_ns) = (Recorder::new(), Vec::new());
                    party.cells.push(Cell { samples, call_ns, recorder, turn_medians_ns });
                }
            }
            let mut samples_ns: Vec<Vec<u64>> = vec![Vec::new(); parties.len()];
            for turn in 0..TURNS {
                for place in 0..parties.len() {
                    let who = (turn + place) % parties.len();
                    let cell = &mut parties[who].cells[at];
                    let first = turn_warm_up(cell.call_ns, TURN_WARM_UP_MAX);
                    let start = samples_ns[who].len();
                    running[who].calls(bytes, first, cell.samples, &mut samples_ns[who])?;
                    running[who].settle();
                    cell.turn_medians_ns.push(median(&mut samples_ns[who][start..]));
                }
            }
            for (party, samples_ns) in parties.iter_mut().zip(&samples_ns) {
                party.cells[at].recorder.add_run(samples_ns);
            }
        }
        bar.inc(1);
    }
    Ok((0..args.sizes.len()).flat_map(|at| rows_of(args, wait, placement, network.place(), &parties, at)).collect())
}

/// The rows of one size: the peers' own, ours beside each of them, and our reactors beside each other.
fn rows_of(args: &PeersArgs, wait: Wait, placement: Placement, place: Place, parties: &[Party], at: usize) -> Vec<Row> {
    let row = |experiment: &str, path: &str, ipc: &str, cell: &Cell| Row {
        experiment: experiment.into(),
        path: path.into(),
        ipc: ipc.into(),
        wait: wait.to_string(),
        payload_bytes: args.sizes[at].0 as u64,
        times: cell.recorder.summary(),
        place: Some(place.to_string()),
        placement: placement.to_string(),
        ..Row::default()
    };
    let beside = |row: Row, cell: &Cell, name: &str, other: &Cell| {
        let turns = cell.turn_medians_ns.iter().zip(&other.turn_medians_ns);
        let ratios = turns.map(|(&ours, &theirs)| ours as f64 / theirs.max(1) as f64).collect();
        row.in_turns_with(name, other.recorder.summary().p50_us, ratios)
    };
    let peers = || {
        parties.iter().filter_map(|party| match party.who {
            Who::Peer(kind) => Some((kind, &party.cells[at])),
            Who::Ours(_) => None,
        })
    };
    let ours = || parties.iter().filter(|party| matches!(party.who, Who::Ours(_)));
    let p50 = |cell: &Cell| cell.recorder.summary().p50_us;
    let raw = peers().filter(|(kind, _)| kind.is_raw());
    let best = raw.min_by(|(_, one), (_, other)| p50(one).total_cmp(&p50(other)));
    let mut rows: Vec<Row> = Vec::new();
    for (kind, cell) in peers() {
        let row = row("peer", "raw", kind.name(), cell);
        rows.push(match best.filter(|_| kind == Kind::Relay) {
            Some((best_kind, best)) => beside(row, cell, &format!("{BEST_RAW} ({best_kind})"), best),
            None => row,
        });
    }
    for party in ours() {
        let cell = &party.cells[at];
        let mine = |experiment: &str| Row {
            reactor: party.reactor.clone(),
            workers: Some(2),
            ..row(experiment, "remote", args.ipc.name(), cell)
        };
        if let Some((kind, best)) = best {
            rows.push(beside(mine("beside_peer"), cell, &format!("{BEST_RAW} ({kind})"), best));
        }
        rows.extend(peers().map(|(kind, peer)| beside(mine("beside_peer"), cell, kind.name(), peer)));
    }
    let ours: Vec<&Party> = ours().collect();
    let labels: Vec<_> = ours.iter().map(|party| (party.reactor.as_deref(), p50(&party.cells[at]))).collect();
    for (one, other, name) in pairs(&labels) {
        let cell = &ours[one].cells[at];
        let row = Row { reactor: ours[one].reactor.clone(), ..row("reactors", "remote", args.ipc.name(), cell) };
        rows.push(beside(row, cell, &name, &ours[other].cells[at]));
    }
    rows
}
