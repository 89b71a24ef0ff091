//! `praas-bench ipc`: a message to another process and its answer, beside a raw TCP round trip.
//!
//! Question  What does it cost two processes on this machine to exchange messages?
//! Measures  in the sender: from sending a message to having its answer, one read of the clock a round trip. The paper reports half of
//!           it; we do not halve: a half was not measured.
//! Load      closed loop, one message in flight; every message and every answer under a key of its own.
//! Excludes  starting, connecting, and some round trips at the start of each turn.
//! Samples   `--repetitions` per run, `--runs` runs, each with a fresh Redis and processes, in turns with a fresh floor. A slow cell stops
//!           at `--run-limit` seconds, with at least 100 samples.
//! Checks    sequence number and last byte of every answer; the first of a block whole.
//! Baseline  a raw TCP round trip of the same size, in the same wait mode, on the same cores; of `shm` one round trip, and of `self` two in a row,
//!           between two plain processes: over cache lines, in `efficient` over futexes. `shm` also stands beside `tcp`, and each size of it beside the
//!           smallest from 64 B on.
//! Ours      `tcp`: two processes with one worker each, told of each other, over loopback. A function in one sends and receives and takes the time,
//!           a function in the other hands each message back as it came. In `latency` and `balanced` each process has a core, which its
//!           controller and its worker share; in `efficient` all are on one. `shm`: the same, over memory that the two share. `self`: the same two functions on two workers of one process, over rings.
//!           A message is written where it is sent from; only its ends are written anew each time, as the floor's.
//! Redis     `redis-poll`: as published, the receiver looks, and pauses for 1, 2, 3, ... ms between looks; most of a small message's time is
//!           such a pause. `redis-block`: the receiver is told. Redis itself sleeps when it has nothing to do, in every wait mode; in
//!           `latency` and `balanced` it may run on all cores, in `efficient` on the one that both ends are on.

use std::fmt;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use praas_dataplane::{Client, Secret};

use crate::channel::{self, Pair};
use crate::end::Block;
use crate::floors::warm_up;
use crate::paired::{self, Measured, Paired};
use crate::placement::{Placement, Wait};
use crate::plan::{Plan, PlanArgs};
use crate::redis::{self, Host, Pace, RedisArgs, RedisPair};
use crate::remote::until_warm;
use crate::row::Row;
use crate::size::{BYTES_MIN, Size};
use crate::subject::{self, Setup, Subject, Told};
use crate::worker::mail::{self, PING, PONG};
use crate::worker::samples_in;

/// How messages travel.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Via {
    /// Two processes, over TCP.
    Tcp,
    /// Two processes, over shared memory.
    Shm,
    /// Two workers of one process, over rings.
    #[value(name = "self")]
    Own,
    /// SET and GET, with pauses of 1, 2, 3, ... ms between looks, as published.
    RedisPoll,
    /// RPUSH and BLPOP.
    RedisBlock,
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Via::Tcp => TCP,
            Via::Shm => SHM,
            Via::Own => "self",
            Via::RedisPoll => "redis-poll",
            Via::RedisBlock => REDIS_BLOCK,
        })
    }
}

/// How rows name the two ways that stand beside each other.
pub(crate) const TCP: &str = "tcp";
pub(crate) const SHM: &str = "shm";
const REDIS_BLOCK: &str = "redis-block";

/// The published sizes, and one cache line.
const SIZES: &str = "10,64,1KiB,100KiB,1MiB,5MiB";
/// From here on `shm` is to take the same time, bytes.
const FLAT_FROM_BYTES: u64 = 64;

#[derive(Args, Debug)]
pub(crate) struct IpcArgs {
    /// How messages travel.
    #[arg(long, value_delimiter = ',', default_value = "tcp,shm,self,redis-block,redis-poll")]
    via: Vec<Via>,
    /// Wait modes.
    #[arg(long, value_delimiter = ',', default_value = "latency,efficient")]
    wait: Vec<Wait>,
    /// Message sizes.
    #[arg(long, value_delimiter = ',', default_value = SIZES)]
    sizes: Vec<Size>,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    redis: RedisArgs,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One way of exchanging messages.
#[derive(Copy, Clone, Debug)]
struct Way {
    via: Via,
    wait: Wait,
    placement: Placement,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "messages via {}, {}", self.via, self.wait)
    }
}

/// Two processes ready to exchange messages, and what carries them. Dropping it ends all that it started.
#[expect(clippy::large_enum_variant, reason = "one a measurement")]
enum Exchange {
    Praas(Box<Praas>),
    Redis { pair: RedisPair, host: Host },
}

impl Exchange {
    /// Starts everything anew; `None` where something is not installed.
    fn open(way: Way, args: &IpcArgs) -> Result<Option<Self>> {
        match way.via {
            Via::Tcp | Via::Shm => Praas::two_processes(way).map(|ours| Some(Self::Praas(Box::new(ours)))),
            Via::Own => Praas::one_process(way).map(|ours| Some(Self::Praas(Box::new(ours)))),
            Via::RedisPoll | Via::RedisBlock => {
                let Some(host) = args.redis.host(way.wait)? else { return Ok(None) };
                let pace = if way.via == Via::RedisPoll { Pace::Poll } else { Pace::Block };
                let pair = RedisPair::open(host.address(), pace, way.wait, way.placement)?;
                Ok(Some(Self::Redis { pair, host }))
            }
        }
    }

    /// Appends the times of so many round trips, after some untimed ones. When it returns, nobody keeps a core busy any more.
    fn round_trips(&mut self, bytes: usize, warm_up: usize, samples: usize, samples_ns: &mut Vec<u64>) -> Result<()> {
        match self {
            Self::Praas(ours) => ours.round_trips(bytes, warm_up, samples, samples_ns),
            Self::Redis { pair, .. } => {
                pair.run(Block { bytes, samples: warm_up, trips_per_sample: 1 }, &mut Vec::new())?;
                pair.run(Block { bytes, samples, trips_per_sample: 1 }, samples_ns)
            }
        }
    }

    /// What rows say of it.
    fn row(&self, way: Way) -> Row {
        let ends = way.placement.to_string();
        let (path, ipc, placement) = match self {
            Self::Praas(ours) if ours.other.is_some() => ("processes", subject::Channel::Ring.name(), ends),
            Self::Praas(_) => ("local", subject::Channel::Ring.name(), ends),
            Self::Redis { host, .. } => ("processes", "redis", host.placement(&ends)),
        };
        Row {
            experiment: "ipc".into(),
            path: path.into(),
            ipc: ipc.into(),
            wait: way.wait.to_string(),
            op: Some("send_recv".into()),
            via: Some(way.via.to_string()),
            placement,
            ..Row::default()
        }
    }
}

/// Processes of ours with the two functions that exchange messages, and a client of each.
struct Praas {
    ping: Client,
    pong: Client,
    /// What each knows the other as; empty in one process.
    names: [&'static str; 2],
    /// Messages so far, so that no key is used twice.
    sequence: u64,
    subject: Subject,
    other: Option<Subject>,
}

impl Praas {
    fn two_processes(way: Way) -> Result<Self> {
        let key = Arc::new(Secret::random()?);
        // Free when we ask; each is told of the other before either listens.
        let free = [TcpListener::bind(("127.0.0.1", 0))?, TcpListener::bind(("127.0.0.1", 0))?];
        let [asks, answers] = [free[0].local_addr()?, free[1].local_addr()?];
        drop(free);
        let start = |name, listen, peer, peer_listen, core| {
            let told = Some(Told { name, listen, peer, peer_listen, key: &key });
            Setup {
                told,
                near: way.via == Via::Shm,
                core: Some(core),
                ..Setup::new(subject::Channel::Ring, way.wait, 1)
            }
            .start()
        };
        let subject = start("asks", asks, "answers", answers, way.placement.ours)?;
        let other = start("answers", answers, "asks", asks, way.placement.theirs)?;
        let (ping, pong) = (subject.quiet_client()?, other.quiet_client()?);
        Ok(Self { ping, pong, names: ["answers", "asks"], sequence: 0, subject, other: Some(other) })
    }

    fn one_process(way: Way) -> Result<Self> {
        let subject = Setup::new(subject::Channel::Ring, way.wait, 2).start()?;
        let (ping, pong) = (subject.quiet_client()?, subject.quiet_client()?);
        Ok(Self { ping, pong, names: ["", ""], sequence: 0, subject, other: None })
    }

    fn round_trips(&mut self, bytes: usize, warm_up: usize, samples: usize, samples_ns: &mut Vec<u64>) -> Result<()> {
        let first = self.sequence;
        self.sequence += (warm_up + samples) as u64;
        let [ping, pong] = self.names.map(|peer| {
            let order = mail::Exchange { peer: peer.to_owned(), bytes, warm_up, samples, first };
            serde_json::to_vec(&order)
        });
        let (ping, pong) = (ping?, pong?);
        let answer = std::thread::scope(|scope| {
            let other = &mut self.pong;
            // Blocks until its last answer is sent.
            let answering = scope.spawn(move || other.invoke(PONG, pong).map(drop));
            let answer = self.ping.invoke(PING, ping).context("the function that asks");
            let answered = answering.join().expect("it does not panic").context("the function that answers");
            answer.and_then(|answer| answered.map(|()| answer))
        })?;
        samples_ns.extend(samples_in(&answer).context("the answer of the function that asks makes no sense")?);
        self.subject.settle();
        Ok(())
    }
}

/// What a way stands on: channel, round trips per sample, and its name in rows.
fn floor_of(way: Way) -> (channel::Channel, u32, &'static str) {
    match (way.via, way.wait) {
        // A line is only ever spun on; who sleeps stands on the price of a sleep and a wake each way.
        (Via::Shm, Wait::Efficient) => (channel::Channel::Futex, 1, "futex"),
        (Via::Shm, _) => (channel::Channel::TwoLines, 1, "two_lines"),
        (Via::Own, Wait::Efficient) => (channel::Channel::Futex, 2, "futex, 2 in a row"),
        (Via::Own, _) => (channel::Channel::TwoLines, 2, "two_lines, 2 in a row"),
        _ => (channel::Channel::Tcp, 1, "tcp"),
    }
}

pub(crate) fn run(args: &IpcArgs) -> Result<()> {
    let plan = args.plan.plan()?;
    let mut ours: Vec<Row> = Vec::new();
    paired::experiment(&args.via, &args.wait, args.json.as_deref(), |via, wait, placement| {
        let way = Way { via, wait, placement };
        let mut measured = measure(way, args, &plan).with_context(|| way.to_string())?;
        if let Measured::Rows(rows) = &mut measured {
            match via {
                Via::Tcp => ours.extend(rows.iter().cloned()),
                Via::Shm => {
                    let beside: Vec<Row> = beside_tcp(rows, &ours).into_iter().chain(flatness(rows)).collect();
                    ours.extend(rows.iter().cloned());
                    rows.extend(beside);
                }
                // Both do all they can.
                Via::RedisBlock => {
                    let both: Vec<Row> = ours.iter().filter_map(|ours| redis::beside(ours, rows)).collect();
                    rows.extend(both);
                }
                Via::Own | Via::RedisPoll => {}
            }
        }
        Ok(measured)
    })
}

/// Messages over shared memory beside the same over TCP, in the same run.
fn beside_tcp(rows: &[Row], before: &[Row]) -> Vec<Row> {
    let beside = rows.iter().filter_map(|row| {
        let is_same = |tcp: &&Row| {
            let of = |row: &Row| (row.wait.clone(), row.payload_bytes);
            tcp.via.as_deref() == Some(TCP) && of(tcp) == of(row)
        };
        let other = before.iter().find(is_same)?;
        let row = Row { experiment: "beside_tcp".into(), distribution: Vec::new(), ..row.clone() };
        Some(row.against(TCP, other.times.p50_us))
    });
    beside.collect()
}

/// Each size beside the smallest of those that are to take the same time.
fn flatness(rows: &[Row]) -> Vec<Row> {
    let from = rows.iter().filter(|row| row.payload_bytes >= FLAT_FROM_BYTES);
    let Some(least) = from.clone().min_by_key(|row| row.payload_bytes) else { return Vec::new() };
    let others = from.filter(|row| row.payload_bytes > least.payload_bytes).map(|row| {
        let row = Row { experiment: "ipc_flat".into(), distribution: Vec::new(), ..row.clone() };
        row.against(&format!("{} B", least.payload_bytes), least.times.p50_us)
    });
    others.collect()
}

/// The rows of a way, a size each.
fn measure(way: Way, args: &IpcArgs, plan: &Plan) -> Result<Measured> {
    let bytes_max = args.sizes.iter().map(|size| size.0).max().unwrap_or(BYTES_MIN);
    let mut cells: Vec<Paired> = Vec::new();
    let (mut common, mut floor_name) = (Row::default(), "");
    for _ in 0..plan.runs {
        let Some(mut exchange) = Exchange::open(way, args)? else { return Ok(Measured::Skipped(redis::NEEDED)) };
        common = exchange.row(way);
        let (channel, trips, name) = floor_of(way);
        floor_name = name;
        let is_line = channel == channel::Channel::TwoLines;
        let floor_wait = if is_line { Wait::Latency } else { way.wait };
        let mut floor = Pair::open(channel, floor_wait, way.placement, bytes_max)?;
        for (at, &Size(bytes)) in args.sizes.iter().enumerate() {
            let floor_bytes = if channel.is_a_word() { BYTES_MIN } else { bytes };
            let floor_ns = warm_up(&mut floor, floor_bytes, trips)?;
            let trip_ns = until_warm(|samples, samples_ns| exchange.round_trips(bytes, 1, samples, samples_ns))?;
            if cells.len() == at {
                cells.push(Paired::new(bytes, trips, trip_ns, floor_ns, plan));
            }
            cells[at].run(&mut floor, |warm_up, samples, samples_ns| {
                exchange.round_trips(bytes, warm_up, samples, samples_ns)
            })?;
        }
    }
    Ok(Measured::Rows(cells.iter().map(|cell| cell.row(common.clone(), floor_name)).collect()))
}
