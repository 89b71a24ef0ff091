//! State of a process, put and got by a function that runs in it.
//!
//! Question  What does a function pay for an object that is there, and for one it writes?
//! Measures  inside the function. `get`: get, a look at length, first eight bytes and last, and letting go. `put`: from the call to its return, when every
//!           worker sees the object. `put-in-place`: the same of an object that is written where it stays, of which only the ends are written anew. `get-typed`, `put-typed`: the same of a list of `f64`. Nothing is halved.
//! Load      closed loop, one at a time. `--contended`: while a second worker overwrites the same object at full speed.
//! Excludes  starting; the first reads (they map a segment, and check a type once); for `put` making the value, but for its stamp.
//! Samples   as elsewhere. A get takes about as long as a read of the clock: p50, mean and minimum are those of batches of 16, divided, one read of the
//!           clock a batch; p95, p99, p99.9 and maximum are of single ones, each with a read of the clock in it (`machine.json` says what it
//!           costs).
//! Checks    `get`: length and both ends each time, of an object that another worker wrote. Contended: 64 B are looked at whole, of longer ones both
//!           ends, which must fit each other, and no version comes after a later one. `put`: after each block another worker looks at the last one, whole.
//! Leases    none, unless `--leased`: the function has another worker look at what it wrote, and would hold a lease on that worker from then on. Where that one
//!           shares a core with the controller, a lease is a reason for the controller to sleep between two puts.
//! Baseline  `put` up to 1 KiB, and `put-in-place`: a cache-line ping-pong over two lines (a futex each way in `efficient`); longer ones: one copy of their length, in the
//!           same worker, to two places by turns, as a put must (it does not write over what is current). `put-typed`: such a copy and a put of 64 B. `get` has none: nothing on this machine does the like.

use std::fmt;

use anyhow::{Context, Result, ensure};
use praas_dataplane::Client;

use super::{Op, StateArgs, Way};
use crate::channel::{self, Pair};
use crate::floors::{DISTRIBUTION_BYTES_MAX, warm_up};
use crate::paired::{Measured, Paired, TURNS};
use crate::placement::Wait;
use crate::plan::{Plan, turn_warm_up};
use crate::recorder::{Recorder, Summary};
use crate::remote::until_warm;
use crate::row::Row;
use crate::size::{BYTES_MIN, Size};
use crate::subject::{Channel, Setup, Subject};
use crate::worker::samples_in;
use crate::worker::state::{DRIVE, StateOrder, Timed};

/// One that reads or writes, and one that looks, or writes meanwhile.
const WORKERS: u8 = 2;

/// Gets timed together, for the median.
const BATCH: usize = 16;

/// Of `put`, longer ones stand on a copy.
const LINE_BYTES_MAX: usize = 1 << 10;

/// Shortest value that can show whether it is torn.
const CONTENDED_BYTES_MIN: usize = 16;

/// Longest value for which a worker's default payload memory (256 MiB) has room three times, as overwriting wants.
const SMALL_ARENA_BYTES: usize = 32 << 20;
const LARGE_ARENA_BYTES: u64 = 1 << 30;

/// Whether the controller copies what one worker leaves for another.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Isolate {
    Off,
    On,
}

impl fmt::Display for Isolate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isolate::Off => "off",
            Isolate::On => "on",
        })
    }
}

/// A process with state, and a client that has its function take samples.
pub(super) struct Inside {
    client: Client,
    subject: Subject,
    sequence: u64,
}

impl Inside {
    pub(super) fn start(way: Way, isolate: Option<Isolate>, bytes_max: usize, objects: Option<u32>) -> Result<Self> {
        let setup = Setup {
            leases: way.leased,
            isolate: isolate.map(|isolate| isolate == Isolate::On),
            arena_bytes: (bytes_max > SMALL_ARENA_BYTES).then_some(LARGE_ARENA_BYTES),
            state_objects_max: objects,
            ..Setup::new(Channel::Ring, way.wait, WORKERS)
        };
        let subject = setup.start()?;
        Ok(Self { client: subject.quiet_client()?, subject, sequence: 0 })
    }

    pub(super) fn pid(&self) -> u32 {
        self.subject.pid()
    }

    /// An order with a stamp that no order before it has used.
    pub(super) fn order(
        &mut self,
        timed: Timed,
        bytes: usize,
        warm_up: usize,
        samples: usize,
        batch: usize,
    ) -> StateOrder {
        let sequence = self.sequence + 1;
        self.sequence += ((warm_up + samples) * batch + 1) as u64;
        StateOrder { timed, bytes, warm_up, samples, batch, sequence, first: 0, objects: 0 }
    }

    /// Has an order carried out, and appends its samples.
    pub(super) fn run(&mut self, order: StateOrder, samples_ns: &mut Vec<u64>) -> Result<()> {
        let answer = self
            .client
            .invoke(DRIVE, serde_json::to_vec(&order)?)
            .with_context(|| format!("{:?}, {} B", order.timed, order.bytes))?;
        samples_ns.extend(samples_in(&answer).context("the driving function's answer makes no sense")?);
        Ok(())
    }

    /// The same, until nobody keeps a core busy any more.
    fn take(
        &mut self,
        timed: Timed,
        bytes: usize,
        warm_up: usize,
        samples: usize,
        samples_ns: &mut Vec<u64>,
    ) -> Result<()> {
        let order = self.order(timed, bytes, warm_up, samples, 1);
        self.run(order, samples_ns)?;
        self.subject.settle();
        Ok(())
    }
}

/// Medians of batches, tails of single ones.
#[derive(Debug)]
pub(super) struct Gets {
    batches: Recorder,
    singles: Recorder,
}

impl Gets {
    pub(super) fn new() -> Self {
        Self { batches: Recorder::new(), singles: Recorder::new() }
    }

    /// One run of an order that is made so: `order(warm_up, samples, batch)`.
    pub(super) fn run(
        &mut self,
        inside: &mut Inside,
        plan: &Plan,
        mut order: impl FnMut(&mut Inside, usize, usize, usize) -> StateOrder,
    ) -> Result<()> {
        let sample_ns = until_warm(|samples, samples_ns| {
            let order = order(inside, 1, samples, BATCH);
            inside.run(order, samples_ns)
        })?;
        let (mut batches_ns, mut singles_ns) = (Vec::new(), Vec::new());
        let samples = plan.samples(sample_ns).div_ceil(TURNS);
        for _ in 0..TURNS {
            for (batch, into) in [(BATCH, &mut batches_ns), (1, &mut singles_ns)] {
                let warm_up = turn_warm_up(sample_ns * batch as u64, 5_000);
                let order = order(inside, warm_up, samples.div_ceil(batch).max(TURNS), batch);
                inside.run(order, into)?;
            }
        }
        self.batches.add_run(&batches_ns);
        self.singles.add_run(&singles_ns);
        Ok(())
    }

    pub(super) fn row(&self, bytes: usize, row: Row) -> Row {
        let (batches, singles) = (self.batches.summary(), self.singles.summary());
        let Summary { p95_us, p99_us, p999_us, max_us, .. } = singles;
        Row {
            payload_bytes: bytes as u64,
            times: Summary { count: singles.count, p95_us, p99_us, p999_us, max_us, ..batches },
            distribution: if bytes <= DISTRIBUTION_BYTES_MAX { self.singles.distribution() } else { Vec::new() },
            ..row
        }
    }
}

/// The rows of a way, a size each.
pub(super) fn measure(way: Way, args: &StateArgs, plan: &Plan) -> Result<Measured> {
    let bytes_max = args.sizes.iter().map(|size| size.0).max().unwrap_or(BYTES_MIN);
    if args.contended {
        let fits = args.sizes.iter().all(|size| size.0 >= CONTENDED_BYTES_MIN);
        ensure!(fits, "--contended: values have at least {CONTENDED_BYTES_MIN} B, to show whether they are torn");
    }
    let isolates = if args.isolate.is_empty() { vec![None] } else { args.isolate.iter().copied().map(Some).collect() };
    let mut rows: Vec<Row> = Vec::new();
    for isolate in isolates {
        let common = Row {
            path: "local".into(),
            workers: Some(WORKERS.into()),
            contended: args.contended.then_some(true),
            leased: way.leased.then_some(true),
            isolate: isolate.map(|isolate| isolate.to_string()),
            ..way.row(Channel::Ring.name(), None, way.placement.to_string())
        };
        let measured = match way.op {
            Op::Get | Op::GetTyped => gets(way, args, isolate, bytes_max, plan, &common)?,
            _ => puts(way, args, isolate, bytes_max, plan, &common)?,
        };
        rows.extend(measured);
    }
    let beside = beside_no_isolation(&rows);
    rows.extend(beside);
    Ok(Measured::Rows(rows))
}

/// Rows with isolation beside those without.
fn beside_no_isolation(rows: &[Row]) -> Vec<Row> {
    let with = |isolate: &'static str| rows.iter().filter(move |row| row.isolate.as_deref() == Some(isolate));
    let mut beside = Vec::new();
    for row in with("on") {
        if let Some(without) = with("off").find(|other| other.payload_bytes == row.payload_bytes) {
            let row = Row { experiment: "isolation".into(), distribution: Vec::new(), ..row.clone() };
            beside.push(row.against("without isolation", without.times.p50_us));
        }
    }
    beside
}

fn gets(
    way: Way,
    args: &StateArgs,
    isolate: Option<Isolate>,
    bytes_max: usize,
    plan: &Plan,
    common: &Row,
) -> Result<Vec<Row>> {
    let timed = match (way.op, args.contended) {
        (Op::GetTyped, _) => Timed::GetTyped,
        (_, true) => Timed::GetContended,
        (_, false) => Timed::Get,
    };
    let mut cells: Vec<Gets> = args.sizes.iter().map(|_| Gets::new()).collect();
    for _ in 0..plan.runs {
        let mut inside = Inside::start(way, isolate, bytes_max, None)?;
        for (cell, &Size(bytes)) in cells.iter_mut().zip(&args.sizes) {
            cell.run(&mut inside, plan, |inside, warm_up, samples, batch| {
                inside.order(timed, bytes, warm_up, samples, batch)
            })?;
        }
    }
    Ok(cells.iter().zip(&args.sizes).map(|(cell, size)| cell.row(size.0, common.clone())).collect())
}

/// What a put of so many bytes stands on.
fn floor_name(way: Way, bytes: usize) -> &'static str {
    match (way.op, way.wait) {
        (Op::PutTyped, _) => "memcpy + put of 64 B",
        (Op::Put, _) if bytes > LINE_BYTES_MAX => "memcpy",
        (_, Wait::Efficient) => "futex",
        _ => "two_lines",
    }
}

fn puts(
    way: Way,
    args: &StateArgs,
    isolate: Option<Isolate>,
    bytes_max: usize,
    plan: &Plan,
    common: &Row,
) -> Result<Vec<Row>> {
    let timed = match way.op {
        Op::PutTyped => Timed::PutTyped,
        Op::PutInPlace => Timed::PutInPlace,
        _ => Timed::Put,
    };
    let mut cells: Vec<Paired> = Vec::new();
    for _ in 0..plan.runs {
        let mut inside = Inside::start(way, isolate, bytes_max, None)?;
        // A line is only ever spun on.
        let (channel, wait) = match way.wait {
            Wait::Efficient => (channel::Channel::Futex, way.wait),
            _ => (channel::Channel::TwoLines, Wait::Latency),
        };
        let mut pair = Pair::open(channel, wait, way.placement, BYTES_MIN)?;
        for (at, &Size(bytes)) in args.sizes.iter().enumerate() {
            let name = floor_name(way, bytes);
            let in_worker = name.starts_with("memcpy");
            if cells.len() == at {
                let sample_ns = until_warm(|samples, samples_ns| inside.take(timed, bytes, 1, samples, samples_ns))?;
                let floor_ns = if in_worker {
                    until_warm(|samples, samples_ns| inside.take(Timed::Copy, bytes, 1, samples, samples_ns))?
                } else {
                    warm_up(&mut pair, BYTES_MIN, 1)?
                };
                cells.push(Paired::new(bytes, 1, sample_ns, floor_ns, plan));
            }
            if in_worker {
                let both = std::cell::RefCell::new(&mut inside);
                cells[at].run_beside(
                    |warm_up, samples, samples_ns| {
                        let inside = &mut *both.borrow_mut();
                        let start = samples_ns.len();
                        inside.take(Timed::Copy, bytes, warm_up, samples, samples_ns)?;
                        if way.op == Op::PutTyped {
                            let mut small_ns = Vec::new();
                            inside.take(Timed::Put, 64, warm_up, samples, &mut small_ns)?;
                            samples_ns[start..].iter_mut().zip(small_ns).for_each(|(copy, put)| *copy += put);
                        }
                        Ok(())
                    },
                    |warm_up, samples, samples_ns| both.borrow_mut().take(timed, bytes, warm_up, samples, samples_ns),
                )?;
            } else {
                cells[at].run(&mut pair, |warm_up, samples, samples_ns| {
                    inside.take(timed, bytes, warm_up, samples, samples_ns)
                })?;
            }
        }
    }
    let rows = cells.iter().zip(&args.sizes).map(|(cell, size)| cell.row(common.clone(), floor_name(way, size.0)));
    Ok(rows.collect())
}
