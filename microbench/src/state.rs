//! `praas-bench state`: state kept by a process of ours, or by somebody else, and the paper's reduction over it.
//!
//! Values in a process of ours: see `state/inside.rs`; a great many of them: `state/crowd.rs`. Here is the rest.
//!
//! Question  What does it cost to keep state: a value put, a value got, an accumulator that functions add to?
//! Measures  `put`, `get` of Redis: in a client, from asking to having the answer. `reduce`: in a client, N invocations in a row of a function of a
//!           real process, each with a vector of E 64-bit numbers, which the function adds to the accumulator that is the state; a sample is
//!           all N. One read of the clock a sample; nothing is halved.
//! Load      closed loop, one command or invocation at a time, one connection each.
//! Excludes  starting, connecting, some samples at the start of each turn; of a reduction making the vector and looking at the result.
//! Samples   `--repetitions` per run, `--runs` runs, each with everything anew, in turns with a fresh floor. A slow cell stops at
//!           `--run-limit` seconds, with at least 100 samples (fewer when fewer repetitions are asked for).
//! Checks    `get`: sequence number and last byte of each value, into memory that had others; the first of a block whole. `put`: each is
//!           confirmed, and the last of a block is read back whole. `reduce`: first and last element in each answer; the whole accumulator
//!           after each sample. The published function compared bytes with elements and zeroed its accumulator each time; this one adds.
//! Baseline  a raw TCP round trip of the same size in the same wait mode, for `reduce` N of them in a row. An echo carries its bytes both
//!           ways, a value put or got goes one way: long ones may take less than their floor.
//! Ours      `reduce`: the function reads the accumulator where it lies and writes the sum into the memory of the next one.
//! Redis     GET and SET of a client, SET beside `put-in-place`, too: that client writes only the ends of its value anew, as well; of `reduce` GET, add, SET inside the function, which has a connection of its own. Redis sleeps when
//!           it has nothing to do, in every wait mode. A reduction has four parties (client, controller, worker, Redis): where there are
//!           fewer cores, `latency` measures how often a tick takes one from a spinner; look at `efficient`.

mod crowd;
mod inside;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use praas_dataplane::Client;
use praas_dataplane::client::RemoteFunction;

use crate::channel::{self, Pair};
use crate::end::{is_stamped, nanoseconds, stamp};
use crate::floors::warm_up;
use crate::paired::{self, Measured, Paired};
use crate::placement::{Placement, Wait, pin};
use crate::plan::{Plan, PlanArgs};
use crate::redis::{self, Connection, Host, RedisArgs, ReduceOrder, unique_key};
use crate::remote::until_warm;
use crate::row::Row;
use crate::size::{BYTES_MAX, BYTES_MIN, Size};
use crate::subject::{Channel, Setup, Subject};
use crate::worker::REDUCE_REDIS;
use crate::worker::state::{REDUCE, TAKE, reduce_input};

/// Sizes of values: the published ones of messages.
const SIZES: &str = "10,1KiB,100KiB,1MiB,5MiB";

/// Workers of the process: invocations come one after the other.
const WORKERS: u8 = 1;

/// Most invocations in a row.
const INVOCATIONS_MAX: i64 = 10_000;

/// Who keeps the state.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Peer {
    /// Redis on this machine.
    Redis,
}

/// What is done with it.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Op {
    /// Reads a value.
    Get,
    /// Writes a value, over the one before.
    Put,
    /// Writes a value where it stays, over the one before: no copy.
    PutInPlace,
    /// Reads a list of `f64`.
    GetTyped,
    /// Writes one.
    PutTyped,
    /// N invocations in a row, each adding a vector of E numbers to an accumulator.
    Reduce,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Get => "get",
            Op::Put => "put",
            Op::PutInPlace => "put_in_place",
            Op::GetTyped => "get_typed",
            Op::PutTyped => "put_typed",
            Op::Reduce => "reduce",
        })
    }
}

#[derive(Args, Debug)]
pub(crate) struct StateArgs {
    /// Who keeps the state [default: a process of ours].
    #[arg(long)]
    peer: Option<Peer>,
    /// Also measure this one, and set ours beside it: what a function does in our process beside what a client does there.
    #[arg(long, conflicts_with_all = ["peer", "contended", "objects"])]
    beside: Option<Peer>,
    /// What is done with it [default: get, put and reduce; of ours also put-in-place, get-typed and put-typed].
    #[arg(long, value_delimiter = ',')]
    op: Vec<Op>,
    /// For get: while another worker overwrites the object at full speed.
    #[arg(long, conflicts_with_all = ["peer", "objects"])]
    contended: bool,
    /// For get and put: let the controller copy what workers leave for each other (on), or not. Both: one beside the other.
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["peer", "objects"])]
    isolate: Vec<inside::Isolate>,
    /// For get and put: by a function that holds a lease on another worker.
    #[arg(long, conflicts_with_all = ["peer", "isolate"])]
    leased: bool,
    /// Instead: put so many objects of 64 B, and measure the memory of each, a get of any of them, and the memory of 100 000 versions of one.
    #[arg(long, value_name = "N", conflicts_with = "peer", value_parser = clap::value_parser!(u32).range(2_000..=16_000_000))]
    objects: Option<u32>,
    /// Wait modes.
    #[arg(long, value_delimiter = ',', default_value = "latency,efficient")]
    wait: Vec<Wait>,
    /// Sizes of values, for get and put.
    #[arg(long, value_delimiter = ',', default_value = SIZES)]
    sizes: Vec<Size>,
    /// Invocations in a row, for reduce.
    #[arg(long, value_delimiter = ',', default_value = "1,10,25,50,100",
          value_parser = clap::value_parser!(u32).range(1..=INVOCATIONS_MAX))]
    invocations: Vec<u32>,
    /// 64-bit numbers in the vector that each of them adds.
    #[arg(long, value_delimiter = ',', default_value = "10,100,1000,10000,100000",
          value_parser = clap::value_parser!(u32).range(1..=(BYTES_MAX / 8) as i64))]
    elements: Vec<u32>,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    redis: RedisArgs,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One thing that is done, in one wait mode.
#[derive(Copy, Clone, Debug)]
struct Way {
    peer: Option<Peer>,
    op: Op,
    wait: Wait,
    placement: Placement,
    /// Whether the function that puts may hold a lease on the worker that looks.
    leased: bool,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = match self.peer {
            Some(Peer::Redis) => "Redis",
            None => "a process",
        };
        write!(f, "state in {peer}, {}, {}", self.op, self.wait)
    }
}

/// One cell: how many bytes go in, and how often in a row.
#[derive(Copy, Clone, Debug)]
struct Shape {
    bytes: usize,
    /// 1 of `get` and `put`.
    invocations: u32,
}

impl Way {
    fn shapes(self, args: &StateArgs) -> Vec<Shape> {
        match self.op {
            Op::Get | Op::Put | Op::PutInPlace | Op::GetTyped | Op::PutTyped => {
                args.sizes.iter().map(|size| Shape { bytes: size.0, invocations: 1 }).collect()
            }
            Op::Reduce => {
                let of = |&elements: &u32| {
                    let bytes = elements as usize * 8;
                    args.invocations.iter().map(move |&invocations| Shape { bytes, invocations })
                };
                args.elements.iter().flat_map(of).collect()
            }
        }
    }

    /// What all rows of it say.
    fn row(self, ipc: &str, peer: Option<Peer>, placement: String) -> Row {
        Row {
            experiment: "state".into(),
            path: "remote".into(),
            ipc: ipc.into(),
            wait: self.wait.to_string(),
            op: Some(self.op.to_string()),
            peer: peer.map(|Peer::Redis| "redis".to_owned()),
            placement,
            ..Row::default()
        }
    }

    /// The same of a store.
    fn row_of(self, store: &Store) -> Row {
        let ends = self.placement.to_string();
        match store {
            Store::Redis { host, .. } => self.row("redis", self.peer, host.placement(&ends)),
            Store::Function { host, .. } => {
                let placement = host.as_ref().map_or(ends.clone(), |host| host.placement(&ends));
                Row { workers: Some(WORKERS.into()), ..self.row(Channel::Ring.name(), self.peer, placement) }
            }
        }
    }
}

/// Who keeps the state, and who asks for it. Dropping it ends all that it started; fields end in their order.
enum Store {
    /// A client of Redis: `get` and `put`.
    Redis { values: Values, host: Host },
    /// A client of a process whose function keeps its state there, or, with a host, in Redis: `reduce`.
    Function { reduction: Box<Reduction>, subject: Subject, host: Option<Host> },
}

impl Store {
    /// Starts everything anew; `None` where something is not installed.
    fn start(way: Way, redis: &RedisArgs) -> Result<Option<Self>> {
        let host = match way.peer {
            None => None,
            Some(Peer::Redis) => match redis.host(way.wait)? {
                None => return Ok(None),
                host => host,
            },
        };
        let host = match (way.op, host) {
            (Op::Get | Op::Put | Op::PutInPlace, Some(host)) => {
                return Ok(Some(Self::Redis { values: Values::new(&host, way.wait)?, host }));
            }
            (_, host) => host,
        };
        if way.op != Op::Reduce {
            bail!("Redis has no {}: it knows nothing of types", way.op);
        }
        let subject = Setup::new(Channel::Ring, way.wait, WORKERS).start()?;
        let reduction = Reduction::new(host.as_ref(), &subject, way.wait)?.into();
        Ok(Some(Self::Function { reduction, subject, host }))
    }

    /// Appends the times of so many samples, after some untimed ones. When it returns, nobody keeps a core busy any more.
    fn samples(
        &mut self,
        way: Way,
        shape: Shape,
        warm_up: usize,
        samples: usize,
        samples_ns: &mut Vec<u64>,
    ) -> Result<()> {
        pin(&[way.placement.ours])?;
        match self {
            Self::Redis { values, .. } if way.op == Op::Get => values.get(shape.bytes, warm_up, samples, samples_ns),
            Self::Redis { values, .. } => values.put(shape.bytes, warm_up, samples, samples_ns),
            Self::Function { reduction, subject, .. } => {
                reduction.run(shape, warm_up, samples, samples_ns)?;
                subject.settle();
                Ok(())
            }
        }
    }
}

/// A client of Redis with one value.
struct Values {
    redis: Connection,
    key: String,
    value: Vec<u8>,
    /// Where it is read to.
    room: Vec<u8>,
    sequence: u64,
}

impl Values {
    fn new(host: &Host, wait: Wait) -> Result<Self> {
        let redis = Connection::open(host.address(), wait)
            .with_context(|| format!("connect to Redis at {}", host.address()))?;
        Ok(Self { redis, key: unique_key()?, value: Vec::new(), room: Vec::new(), sequence: 0 })
    }

    fn resize(&mut self, bytes: usize) {
        self.value.clear();
        self.value.resize(bytes, 0xA5);
        self.room.clear();
        self.room.resize(bytes, 0);
    }

    fn put(&mut self, bytes: usize, warm_up: usize, samples: usize, samples_ns: &mut Vec<u64>) -> Result<()> {
        self.resize(bytes);
        let mut before = Instant::now();
        for sample in 0..warm_up + samples {
            self.sequence += 1;
            stamp(&mut self.value, self.sequence);
            self.redis.set(&self.key, &self.value)?;
            let after = Instant::now();
            if sample >= warm_up {
                samples_ns.push(nanoseconds(before, after));
            }
            before = after;
        }
        let got = self.redis.get(&self.key, &mut self.room)?;
        ensure!(
            got == Some(bytes) && self.room == self.value,
            "wrong answer: the last of {} values of {bytes} B is not what was put",
            warm_up + samples
        );
        self.forget()
    }

    fn get(&mut self, bytes: usize, warm_up: usize, samples: usize, samples_ns: &mut Vec<u64>) -> Result<()> {
        self.resize(bytes);
        self.sequence += 1;
        stamp(&mut self.value, self.sequence);
        self.redis.set(&self.key, &self.value)?;
        let mut before = Instant::now();
        for sample in 0..warm_up + samples {
            // The stamp that is found must have come with this answer.
            stamp(&mut self.room, 0);
            let got = self.redis.get(&self.key, &mut self.room)?;
            ensure!(
                got == Some(bytes) && is_stamped(&self.room, self.sequence),
                "wrong answer: a value of {bytes} B came back as {got:?} B or with another stamp"
            );
            let after = Instant::now();
            if sample >= warm_up {
                samples_ns.push(nanoseconds(before, after));
            }
            before = after;
            if sample == 0 {
                ensure!(self.room == self.value, "wrong answer: the first value of {bytes} B came back changed");
                before = Instant::now();
            }
        }
        self.forget()
    }

    /// Leaves nothing in a Redis that may not be ours.
    fn forget(&mut self) -> Result<()> {
        self.redis.delete(&self.key)?;
        Ok(())
    }
}

/// A client that has vectors added up by a function.
struct Reduction {
    client: Client,
    add: RemoteFunction,
    /// Of the state in Redis: what the function is told, and a connection to look at the result.
    redis: Option<(ReduceOrder, Connection)>,
    name: String,
    reductions: u64,
}

impl Reduction {
    /// With a host the function keeps its state there, else in its own process.
    fn new(host: Option<&Host>, subject: &Subject, wait: Wait) -> Result<Self> {
        let client = subject.client()?;
        let redis = host.map(|host| {
            let connection = Connection::open(host.address(), Wait::Efficient)
                .with_context(|| format!("connect to Redis at {}", host.address()))?;
            anyhow::Ok((ReduceOrder { redis: host.address(), wait, key: String::new() }, connection))
        });
        let redis = redis.transpose()?;
        let add = client.function(if redis.is_some() { REDUCE_REDIS } else { REDUCE })?;
        Ok(Self { client, add, redis, name: unique_key()?, reductions: 0 })
    }

    /// What the function is called with.
    fn input(&mut self, key: &str, vector: &[i64]) -> Result<Arc<[u8]>> {
        Ok(match &mut self.redis {
            Some((order, _)) => {
                key.clone_into(&mut order.key);
                order.with_vector(vector)?.into()
            }
            None => reduce_input(key.as_bytes(), vector).into(),
        })
    }

    /// Reads the accumulator and takes it away.
    fn take(&mut self, key: &str, sum: &mut [u8]) -> Result<Option<usize>> {
        if let Some((_, redis)) = &mut self.redis {
            let got = redis.get(key, sum)?;
            redis.delete(key)?;
            return Ok(got);
        }
        let found = self.client.invoke(TAKE, key.as_bytes())?;
        if let Some(sum) = sum.get_mut(..found.len()) {
            sum.copy_from_slice(&found);
        }
        Ok(Some(found.len()))
    }

    fn run(&mut self, shape: Shape, warm_up: usize, samples: usize, samples_ns: &mut Vec<u64>) -> Result<()> {
        for sample in 0..warm_up + samples {
            let time_ns = self.once(shape)?;
            if sample >= warm_up {
                samples_ns.push(time_ns);
            }
        }
        Ok(())
    }

    /// One reduction, from an accumulator that is not there yet; how long it took, ns.
    fn once(&mut self, shape: Shape) -> Result<u64> {
        self.reductions += 1;
        let key = format!("{}:{}", self.name, self.reductions);
        let vector = vector(shape.bytes / 8, self.reductions);
        let (first, last) = (vector[0], vector[vector.len() - 1]);
        let input = self.input(&key, &vector)?;
        let before = Instant::now();
        for added in 1..=i64::from(shape.invocations) {
            let answer = self.client.invoke(self.add, Arc::clone(&input))?;
            let expected = [first * added, last * added].map(i64::to_le_bytes).concat();
            ensure!(
                *answer == *expected,
                "wrong answer: after {added} vectors of {} B first or last element are not their sum",
                shape.bytes
            );
        }
        let time_ns = nanoseconds(before, Instant::now());
        let mut sum = vec![0; shape.bytes];
        let got = self.take(&key, &mut sum)?;
        let times = i64::from(shape.invocations);
        let is_sum =
            sum.as_chunks::<8>().0.iter().zip(&vector).all(|(sum, one)| i64::from_le_bytes(*sum) == one * times);
        ensure!(
            got == Some(shape.bytes) && is_sum,
            "wrong result: the accumulator of {} B is not {times} times the vector",
            shape.bytes
        );
        Ok(time_ns)
    }
}

/// Another one for each reduction, of small numbers of both signs.
fn vector(elements: usize, reduction: u64) -> Vec<i64> {
    let mut number = reduction;
    let mut next = || {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        number.cast_signed() >> 32
    };
    (0..elements).map(|_| next()).collect()
}

pub(crate) fn run(args: &StateArgs) -> Result<()> {
    let plan = args.plan.plan()?;
    let typed: &[Op] = if args.peer.is_none() { &[Op::PutInPlace, Op::GetTyped, Op::PutTyped] } else { &[] };
    let mut ops = args.op.clone();
    if ops.is_empty() {
        ops = [&[Op::Get, Op::Put], typed, &[Op::Reduce]].concat();
    }
    if args.contended || args.objects.is_some() {
        ops = vec![Op::Get];
    }
    paired::experiment(&ops, &args.wait, args.json.as_deref(), |op, wait, placement| {
        let way = Way { peer: args.peer, op, wait, placement, leased: args.leased };
        let measured = match (args.objects, way.op) {
            (Some(objects), _) => crowd::measure(way, objects, &plan),
            (None, Op::Get | Op::Put | Op::PutInPlace | Op::GetTyped | Op::PutTyped) if way.peer.is_none() => {
                inside::measure(way, args, &plan)
            }
            _ => measure(way, args, &plan),
        };
        let ours = measured.with_context(|| way.to_string())?;
        let has_peer = !matches!(op, Op::GetTyped | Op::PutTyped);
        match (ours, args.beside) {
            (Measured::Rows(ours), Some(peer)) if has_peer => {
                let theirs = Way { peer: Some(peer), ..way };
                beside(ours, measure(theirs, args, &plan).with_context(|| theirs.to_string())?)
            }
            (ours, _) => Ok(ours),
        }
    })
}

/// The rows of ours and theirs, and ours beside theirs of the same shape; where there is no other, ours.
fn beside(mut ours: Vec<Row>, theirs: Measured) -> Result<Measured> {
    let theirs = match theirs {
        Measured::Rows(theirs) => theirs,
        Measured::Skipped(why) => {
            eprintln!("skipped: Redis beside ours: {why}");
            return Ok(Measured::Rows(ours));
        }
    };
    let mut both = Vec::new();
    for row in ours.iter().filter(|row| row.experiment == "state") {
        both.extend(redis::beside(row, &theirs));
    }
    ours.extend(theirs);
    ours.extend(both);
    Ok(Measured::Rows(ours))
}

/// The rows of a way, a shape each.
fn measure(way: Way, args: &StateArgs, plan: &Plan) -> Result<Measured> {
    let shapes = way.shapes(args);
    let bytes_max = shapes.iter().map(|shape| shape.bytes).max().unwrap_or(BYTES_MIN);
    let mut cells: Vec<Paired> = Vec::new();
    let mut common = Row::default();
    for _ in 0..plan.runs {
        let Some(mut store) = Store::start(way, &args.redis)? else { return Ok(Measured::Skipped(redis::NEEDED)) };
        common = way.row_of(&store);
        let mut floor = Pair::open(channel::Channel::Tcp, way.wait, way.placement, bytes_max)?;
        for (at, &shape) in shapes.iter().enumerate() {
            if cells.len() == at {
                // What one trip takes is what N take, by N.
                let floor_ns = warm_up(&mut floor, shape.bytes, 1)? * u64::from(shape.invocations);
                let sample_ns = until_warm(|samples, samples_ns| store.samples(way, shape, 1, samples, samples_ns))?;
                cells.push(Paired::new(shape.bytes, shape.invocations, sample_ns, floor_ns, plan));
            }
            cells[at].run(&mut floor, |warm_up, samples, samples_ns| {
                store.samples(way, shape, warm_up, samples, samples_ns)
            })?;
        }
    }
    let rows = cells.iter().zip(&shapes).map(|(cell, shape)| {
        let row = cell.row(common.clone(), &floor_name(*shape));
        Row { invocations: (way.op == Op::Reduce).then_some(shape.invocations), ..row }
    });
    Ok(Measured::Rows(rows.collect()))
}

fn floor_name(shape: Shape) -> String {
    match shape.invocations {
        1 => "tcp".to_owned(),
        invocations => format!("tcp, {invocations} in a row"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// A client of something that answers so, one answer a command.
    fn values(answers: Vec<&'static [u8]>) -> Values {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for answer in answers {
                let _ = stream.read(&mut [0; 4096]).unwrap();
                stream.write_all(answer).unwrap();
            }
        });
        let redis = Connection::open(address, Wait::Efficient).unwrap();
        Values { redis, key: "k".into(), value: Vec::new(), room: Vec::new(), sequence: 0 }
    }

    /// B2: a value that is not the one that was put fails the run.
    #[test]
    fn b2_a_wrong_value_fails_the_run_whether_it_was_put_or_got() {
        let right: &[u8] = b"$10\r\n\x01\0\0\0\0\0\0\0\xA5\x01\r\n";
        let mut samples_ns = Vec::new();
        values(vec![b"+OK\r\n", right, b":1\r\n"]).get(10, 0, 1, &mut samples_ns).unwrap();
        values(vec![b"+OK\r\n", right, b":1\r\n"]).put(10, 0, 1, &mut samples_ns).unwrap();
        assert_eq!(samples_ns.len(), 2);
        for wrong in [
            &b"$10\r\n\x02\0\0\0\0\0\0\0\xA5\x01\r\n"[..],
            b"$10\r\n\x01\0\0\0\0\0\0\0\xA4\x01\r\n",
            b"$9\r\n\x01\0\0\0\0\0\0\0\x01\r\n",
            b"$-1\r\n",
        ] {
            let answers = || vec![&b"+OK\r\n"[..], wrong];
            for failed in [
                values(answers()).get(10, 0, 1, &mut samples_ns).unwrap_err(),
                values(answers()).put(10, 0, 1, &mut samples_ns).unwrap_err(),
            ] {
                assert!(failed.to_string().starts_with("wrong answer"), "{failed}");
            }
        }
    }

    #[test]
    fn vectors_differ_and_their_sums_do_not_overflow() {
        let [one, two] = [1, 2].map(|reduction| vector(1000, reduction));
        assert!(one.iter().zip(&two).filter(|(one, two)| one == two).count() < 10);
        assert!(one.iter().any(|&number| number < 0) && one.iter().any(|&number| number > 0));
        assert!(one.iter().all(|number| number.checked_mul(INVOCATIONS_MAX).is_some()));
    }
}
