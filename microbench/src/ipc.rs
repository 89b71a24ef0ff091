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
//! Baseline  a raw TCP round trip of the same size, in the same wait mode, on the same cores.
//! Redis     `redis-poll`: as published, the receiver looks, and pauses for 1, 2, 3, ... ms between looks; most of a small message's time is
//!           such a pause. `redis-block`: the receiver is told. Redis itself sleeps when it has nothing to do, in every wait mode; in
//!           `latency` and `balanced` it may run on all cores, in `efficient` on the one that both ends are on.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::channel::{self, Pair};
use crate::end::Block;
use crate::floors::warm_up;
use crate::paired::{self, Measured, Paired};
use crate::placement::{Placement, Wait};
use crate::plan::{Plan, PlanArgs};
use crate::redis::{self, Host, Pace, RedisArgs, RedisPair};
use crate::remote::until_warm;
use crate::row::Row;
use crate::size::Size;

/// How messages travel.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Via {
    /// SET and GET, with pauses of 1, 2, 3, ... ms between looks, as published.
    RedisPoll,
    /// RPUSH and BLPOP.
    RedisBlock,
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Via::RedisPoll => "redis-poll",
            Via::RedisBlock => "redis-block",
        })
    }
}

/// The published sizes.
const SIZES: &str = "10,1KiB,100KiB,1MiB,5MiB";

#[derive(Args, Debug)]
pub(crate) struct IpcArgs {
    /// How messages travel.
    #[arg(long, value_delimiter = ',', default_value = "redis-block,redis-poll")]
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
enum Exchange {
    Redis { pair: RedisPair, host: Host },
}

impl Exchange {
    /// Starts everything anew; `None` where something is not installed.
    fn open(way: Way, args: &IpcArgs) -> Result<Option<Self>> {
        match way.via {
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
            Self::Redis { pair, .. } => {
                pair.run(Block { bytes, samples: warm_up, trips_per_sample: 1 }, &mut Vec::new())?;
                pair.run(Block { bytes, samples, trips_per_sample: 1 }, samples_ns)
            }
        }
    }

    /// What rows say of it.
    fn row(&self, way: Way) -> Row {
        let (ipc, placement) = match self {
            Self::Redis { host, .. } => ("redis", host.placement(&way.placement.to_string())),
        };
        Row {
            experiment: "ipc".into(),
            path: "processes".into(),
            ipc: ipc.into(),
            wait: way.wait.to_string(),
            op: Some("send_recv".into()),
            via: Some(way.via.to_string()),
            placement,
            ..Row::default()
        }
    }
}

pub(crate) fn run(args: &IpcArgs) -> Result<()> {
    let plan = args.plan.plan()?;
    paired::experiment(&args.via, &args.wait, args.json.as_deref(), |via, wait, placement| {
        let way = Way { via, wait, placement };
        measure(way, args, &plan).with_context(|| way.to_string())
    })
}

/// The rows of a way, a size each.
fn measure(way: Way, args: &IpcArgs, plan: &Plan) -> Result<Measured> {
    let bytes_max = args.sizes.iter().map(|size| size.0).max().unwrap_or(crate::size::BYTES_MIN);
    let mut cells: Vec<Paired> = Vec::new();
    let mut common = Row::default();
    for _ in 0..plan.runs {
        let Some(mut exchange) = Exchange::open(way, args)? else { return Ok(Measured::Skipped(redis::NEEDED)) };
        common = exchange.row(way);
        let mut floor = Pair::open(channel::Channel::Tcp, way.wait, way.placement, bytes_max)?;
        for (at, &Size(bytes)) in args.sizes.iter().enumerate() {
            let floor_ns = warm_up(&mut floor, bytes, 1)?;
            let trip_ns = until_warm(|samples, samples_ns| exchange.round_trips(bytes, 1, samples, samples_ns))?;
            if cells.len() == at {
                cells.push(Paired::new(bytes, 1, trip_ns, floor_ns, plan));
            }
            cells[at].run(&mut floor, |warm_up, samples, samples_ns| {
                exchange.round_trips(bytes, warm_up, samples, samples_ns)
            })?;
        }
    }
    Ok(Measured::Rows(cells.iter().map(|cell| cell.row(common.clone(), "tcp")).collect()))
}
