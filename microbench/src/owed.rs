//! What we owe, in one place: the table, the rows and the report all ask here.
//!
//! Every limit is a ratio inside one run, or a figure that does not depend on the machine's age. A figure missed is
//! reported as missed.

use crate::peers::{BEST_RAW, RELAY};
use crate::row::Row;

/// One thing owed.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Target {
    /// What the row must be for the limit to apply.
    applies: fn(&Row) -> bool,
    pub(crate) what: &'static str,
    measure: Measure,
    limit: f64,
}

#[derive(Copy, Clone, Debug)]
enum Measure {
    /// p50 over the floor's p50, at most.
    Ratio,
    /// p99 over the same row's p50, at most.
    Tail,
    /// p99 over the floor's p50, at most.
    TailOverFloor,
    /// The floor's p50 over p50, at least.
    TimesFaster,
    /// Answers per second of a load, at least.
    Rate,
    /// p99 in milliseconds, at most.
    P99Milliseconds,
    /// The row's value, at least.
    AtLeast,
    /// The row's value, below.
    Below,
    /// p50 in nanoseconds, at most.
    P50Nanoseconds,
    /// p99 in microseconds, at most.
    P99Microseconds,
}

/// How a row did.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) owed: String,
    pub(crate) measured: String,
    pub(crate) met: bool,
}

fn is_local_ring(row: &Row, via: &str) -> bool {
    row.experiment == "invocation"
        && (row.path.as_str(), row.ipc.as_str(), row.wait.as_str()) == ("local", "ring", "latency")
        && row.via.as_deref() == Some(via)
        && row.touched != Some(false)
}

/// Our call beside a peer whose name begins so.
fn is_beside(row: &Row, peer: &str) -> bool {
    row.experiment == "beside_peer"
        && row.ipc == "ring"
        && row.floor.as_deref().is_some_and(|floor| floor.starts_with(peer))
}

/// A load on our process over one connection with payloads of 64 B.
fn is_load(row: &Row, kind: &str) -> bool {
    row.experiment == "load"
        && row.path == "remote"
        && row.payload_bytes == 64
        && row.load.as_ref().is_some_and(|load| load.kind == kind && load.connections == 1)
}

/// Calls per second of 64 B over one connection, and half of them, at which a tail is owed.
const OWED_RATE: f64 = 250e3;
pub(crate) const HALF_OF_OWED_RATE: f64 = OWED_RATE / 2.0;

fn due(row: &Row) -> Option<f64> {
    row.load.as_ref()?.rate_due
}

fn is_crowd(row: &Row) -> bool {
    row.silent >= Some(10_000)
}

fn of_peak(row: &Row) -> Option<f64> {
    row.load.as_ref()?.of_peak
}

/// State of a process of ours, as a function of it does that to it; nothing else going on.
fn is_state(row: &Row, op: &str) -> bool {
    let alone = row.contended != Some(true) && row.leased != Some(true) && row.isolate.as_deref() != Some("on");
    row.experiment == "state" && row.peer.is_none() && row.op.as_deref() == Some(op) && row.objects.is_none() && alone
}

/// Messages between two processes of ours, beside the same over Redis that tells the receiver.
fn is_beside_redis(row: &Row, op: &str) -> bool {
    row.experiment == "beside_redis" && row.op.as_deref() == Some(op)
}

/// Messages between two processes of ours that share memory.
fn is_shared(row: &Row, experiment: &str) -> bool {
    row.experiment == experiment && row.via.as_deref() == Some(crate::ipc::SHM)
}

/// Everything owed, by experiment.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        applies: |row| is_local_ring(row, "ring") && row.payload_bytes == 8,
        what: "local call over rings, 8 B, latency: p50 against a cache-line ping-pong over two lines",
        measure: Measure::Ratio,
        limit: 1.3,
    },
    Target {
        applies: |row| is_local_ring(row, "exchange") && row.payload_bytes == 8,
        what: "local call over an exchange line, 8 B, latency: p50 against a cache-line ping-pong over one line",
        measure: Measure::Ratio,
        limit: 1.5,
    },
    Target {
        applies: |row| is_local_ring(row, "ring") && row.payload_bytes == 8,
        what: "local call over rings, 8 B, latency: p99 against its own p50",
        measure: Measure::Tail,
        limit: 2.0,
    },
    Target {
        applies: |row| is_local_ring(row, "exchange") && row.payload_bytes == 8,
        what: "local call over an exchange line, 8 B, latency: p99 against its own p50",
        measure: Measure::Tail,
        limit: 2.0,
    },
    Target {
        applies: |row| row.experiment == "handover" && row.payload_bytes == 5 << 20,
        what: "5 MiB handed over untouched: p50 against 64 B in the same run",
        measure: Measure::Ratio,
        limit: 1.1,
    },
    Target {
        applies: |row| {
            row.experiment == "invocation"
                && (row.path.as_str(), row.ipc.as_str()) == ("local", "mq")
                && matches!(row.payload_bytes, 10 | 102_400 | 5_242_880)
        },
        what: "local call over POSIX queues, 10 B, 100 KiB, 5 MiB: p50 against two raw queue round trips",
        measure: Measure::Ratio,
        limit: 1.5,
    },
    Target {
        applies: |row| is_beside(row, BEST_RAW) && row.payload_bytes == 64,
        what: "remote echo, 64 B, one in flight: p50 against the best raw TCP round trip in the same wait mode",
        measure: Measure::Ratio,
        limit: 1.6,
    },
    Target {
        applies: |row| is_beside(row, BEST_RAW) && matches!(row.payload_bytes, 1_048_576 | 5_242_880),
        what: "remote echo, 1 MiB and 5 MiB, one in flight: p50 against the best raw TCP round trip in the same wait mode",
        measure: Measure::Ratio,
        limit: 1.2,
    },
    Target {
        applies: |row| {
            row.experiment == "invocation" && row.via.as_deref() == Some(crate::invoke::LENT) && row.payload_bytes == 64
        },
        what: "remote echo over a lent connection, 64 B, one in flight: p50 against a raw TCP round trip in the same wait mode",
        measure: Measure::Ratio,
        limit: 1.3,
    },
    Target {
        applies: |row| is_beside(row, "http") && row.payload_bytes == 64,
        what: "remote echo, 64 B, one in flight: faster than an echo over axum",
        measure: Measure::TimesFaster,
        limit: 5.0,
    },
    Target {
        applies: |row| is_load(row, "closed") && row.in_flight == Some(64),
        what: "remote echo, 64 B, 64 in flight, one connection: calls per second",
        measure: Measure::Rate,
        limit: OWED_RATE,
    },
    Target {
        applies: |row| {
            is_load(row, "open") && due(row).is_some_and(|due| (due / HALF_OF_OWED_RATE - 1.0).abs() < 0.001)
        },
        what: "remote echo, 64 B, one connection, at 125 000 calls per second: p99 against p50 of one in flight",
        measure: Measure::TailOverFloor,
        limit: 10.0,
    },
    Target {
        applies: |row| {
            is_load(row, "open")
                && of_peak(row).is_some_and(|of_peak| (0.49..0.51).contains(&of_peak))
                && due(row).is_some_and(|due| due < HALF_OF_OWED_RATE * 0.999)
        },
        what: "remote echo, 64 B, one connection, at half of a peak below 250 000 calls per second: p99 against p50 of one in flight",
        measure: Measure::TailOverFloor,
        limit: 10.0,
    },
    Target {
        applies: |row| row.experiment == "checks",
        what: "authentication and checksums (a key, keyed tags, payload checksums), any size: p50 against plain text without",
        measure: Measure::Ratio,
        limit: 1.1,
    },
    Target {
        applies: |row| row.experiment == "reactors",
        what: "io_uring against our epoll, and what `auto` takes against the faster, any size and load: p50 (5 % is what equal ones differ by)",
        measure: Measure::Ratio,
        limit: 1.05,
    },
    Target {
        applies: |row| row.experiment == "connections_idle_memory" && is_crowd(row),
        what: "ten thousand idle connections: memory of the process",
        measure: Measure::Below,
        limit: 4.0,
    },
    Target {
        applies: |row| row.experiment == "connections_idle_busy" && is_crowd(row),
        what: "a busy connection among ten thousand idle ones: p50 against itself without them",
        measure: Measure::Ratio,
        limit: 1.05,
    },
    Target {
        applies: |row| row.experiment == "ipc" && row.via.as_deref() == Some(crate::ipc::TCP),
        what: "message and answer between two processes, any size: p50 against a raw TCP round trip in the same wait mode",
        measure: Measure::Ratio,
        limit: 1.5,
    },
    Target {
        applies: |row| is_shared(row, "ipc") && row.payload_bytes == 64 && row.wait == "latency",
        what: "message and answer between two processes that share memory, 64 B, latency: p50 against a cache-line ping-pong over two lines",
        measure: Measure::Ratio,
        limit: 4.0,
    },
    Target {
        applies: |row| is_shared(row, "ipc_flat") && row.wait == "latency",
        what: "message and answer between two processes that share memory, any size, latency: p50 against 64 B in the same run",
        measure: Measure::Ratio,
        limit: 1.1,
    },
    Target {
        applies: |row| is_shared(row, "beside_tcp"),
        what: "message and answer between two processes that share memory, any size: p50 against the same over TCP",
        measure: Measure::Ratio,
        limit: 1.0,
    },
    Target {
        applies: |row| is_beside_redis(row, "send_recv") && row.payload_bytes == 10,
        what: "message and answer between two processes, 10 B: faster than over Redis that tells the receiver",
        measure: Measure::TimesFaster,
        limit: 5.0,
    },
    Target {
        applies: |row| is_beside_redis(row, "send_recv") && row.payload_bytes == 1 << 20,
        what: "message and answer between two processes, 1 MiB: faster than over Redis that tells the receiver",
        measure: Measure::TimesFaster,
        limit: 3.0,
    },
    Target {
        applies: |row| is_state(row, "get"),
        what: "state get, hot, any size: p50",
        measure: Measure::P50Nanoseconds,
        limit: 200.0,
    },
    Target {
        applies: |row| is_state(row, "get_typed"),
        what: "typed state get, hot, any size: p50",
        measure: Measure::P50Nanoseconds,
        limit: 300.0,
    },
    Target {
        applies: |row| row.experiment == "state" && row.contended == Some(true),
        what: "state get of an object that another worker overwrites at full speed: p99",
        measure: Measure::P99Microseconds,
        limit: 2.0,
    },
    Target {
        applies: |row| is_state(row, "put") && row.payload_bytes == 64 && row.wait == "latency",
        what: "state put, 64 B, latency: p50 against a cache-line ping-pong over two lines",
        measure: Measure::Ratio,
        limit: 3.0,
    },
    Target {
        applies: |row| is_state(row, "put_typed") && row.payload_bytes == 1 << 20,
        what: "typed state put, 1 MiB of `f64`: p50 against one copy of it and a put of 64 B",
        measure: Measure::Ratio,
        limit: 1.2,
    },
    Target {
        applies: |row| is_beside_redis(row, "put") || is_beside_redis(row, "put_in_place"),
        what: "state put, any size: faster than SET of Redis",
        measure: Measure::TimesFaster,
        limit: 10.0,
    },
    Target {
        applies: |row| row.experiment == "state_memory",
        what: "state, objects of 64 B: memory of each besides key and value",
        measure: Measure::Below,
        limit: 200.0,
    },
    Target {
        applies: |row| row.experiment == "state" && row.objects.is_some() && row.ratio_p50.is_some(),
        what: "state get of any of a great many objects: p50 against any of 1000",
        measure: Measure::Ratio,
        limit: 2.0,
    },
    Target {
        applies: |row| row.experiment == "state_versions",
        what: "state, 100 000 versions of one object of 1 KiB (together 100 MB): memory left beside two versions",
        measure: Measure::Below,
        limit: 256.0,
    },
    Target {
        applies: |row| row.experiment == "throughput" && row.ipc == "ring",
        what: "small local calls, pipelined: calls per second",
        measure: Measure::AtLeast,
        limit: 5e6,
    },
    Target {
        applies: |row| row.experiment == "death",
        what: "worker killed to error at the caller: p99",
        measure: Measure::P99Milliseconds,
        limit: 5.0,
    },
    Target {
        applies: |row| row.experiment == "idle_cpu" && row.wait == "balanced",
        what: "idle process, balanced: processor time",
        measure: Measure::Below,
        limit: 0.5,
    },
    Target {
        applies: |row| row.experiment == "idle_cpu" && row.wait == "efficient",
        what: "idle process, efficient: processor time",
        measure: Measure::Below,
        limit: 0.5,
    },
    Target {
        applies: |row| row.experiment == "idle_memory",
        what: "idle process with four workers: resident memory (shared pages counted once)",
        measure: Measure::Below,
        limit: 20.0,
    },
];

/// What is known to limit a figure that misses what is owed.
struct KnownLimit {
    applies: fn(&Row) -> bool,
    /// In words, with what other rows of the same run say of it; `None` when they do not.
    say: fn(&Row, &[Row]) -> Option<String>,
}

const KNOWN_LIMITS: &[KnownLimit] = &[
    KnownLimit {
        applies: |row| is_shared(row, "ipc"),
        say: |row, _| {
            Some(format!(
                "messages of {} B over shared memory, `{}`: a message passes a worker, two controllers and a worker, and so does its answer; a controller and its \
                 worker share a core, which changes hands at least four times on the way, where the two ends of the floor have a core each.",
                row.payload_bytes, row.wait
            ))
        },
    },
    KnownLimit {
        applies: |row| is_shared(row, "ipc_flat"),
        say: |row, _| {
            Some(format!(
                "messages of {} B over shared memory, `{}`: three copies a round trip. Each receiving process makes one, into memory that its own workers \
                 read, and the function that hands a message back has it copied by its controller, as the message was not its own.",
                row.payload_bytes, row.wait
            ))
        },
    },
    KnownLimit {
        applies: |row| row.experiment == "ipc" && row.via.as_deref() == Some(crate::ipc::TCP),
        say: |row, _| {
            Some(format!(
                "messages of {} B, `{}`: `send` returns when the other mailbox has confirmed, so four segments cross where the floor has two, each through \
                 two controllers and to a worker, and the four of them share two cores.",
                row.payload_bytes, row.wait
            ))
        },
    },
    KnownLimit {
        applies: |row| is_beside_redis(row, "put") && row.payload_bytes > 100 << 10,
        say: |row, _| {
            Some(format!(
                "put of {} B: one copy is all it takes, and that is as fast as memory; Redis copies four times over two cores. `put_in_place` takes none.",
                row.payload_bytes
            ))
        },
    },
    KnownLimit {
        applies: |row| is_beside_redis(row, "put"),
        say: |row, _| {
            (row.wait == "efficient").then(|| {
                "put in `efficient`: a sleep and a wake each way on one core, as a SET has (see the floor `futex`)."
                    .to_owned()
            })
        },
    },
    KnownLimit {
        applies: |row| row.experiment == "state" && row.objects.is_some(),
        say: |row, rows| {
            let reads = rows.iter().find(|other| other.experiment == "state_reads" && other.objects == row.objects)?;
            Some(format!(
                "a get of any of a great many objects: index, entry and value are lines that no cache has, in pages of 4 KiB that no TLB has; 1000 objects fit both. Three reads in \
                 a row of as much memory, and nothing else, take {:.0} ns here.",
                reads.floor_p50_us? * 1e3
            ))
        },
    },
    KnownLimit {
        applies: |row| is_beside(row, BEST_RAW) && row.payload_bytes == 64,
        say: |row, rows| {
            let relay = same_load(row, rows).find(|other| other.experiment == "peer" && other.ipc == RELAY)?;
            let beside = |other: &&Row| is_beside(other, RELAY) && other.reactor == row.reactor;
            let ours = same_load(row, rows).find(beside)?;
            Some(format!(
                "64 B, `{}`, {}: three parties take part and not two. The peer `relay`, whose third (on the server's core) does nothing at all, takes {:.2} times the best raw \
                 server; ours takes {:.2} times the relay.",
                row.wait,
                row.reactor.as_deref().unwrap_or("one reactor"),
                relay.ratio_p50?,
                ours.ratio_p50?,
            ))
        },
    },
    KnownLimit {
        applies: |row| is_beside(row, "http"),
        say: |row, rows| {
            let best = same_load(row, rows).find(|other| is_beside(other, BEST_RAW))?;
            Some(format!(
                "`{}` in `{}`: the best raw server, without calls and functions, is {:.1} times faster than it.",
                row.floor.as_deref()?,
                row.wait,
                row.floor_p50_us? / best.floor_p50_us?,
            ))
        },
    },
    KnownLimit {
        applies: |row| is_load(row, "open"),
        say: |_, _| {
            Some(
                "p99 at a given rate: a shared machine takes a core away for milliseconds. Compare with the p99 of the raw server at the same \
                 rate, under *Remote calls under load*."
                    .to_owned(),
            )
        },
    },
    KnownLimit {
        applies: |row| row.experiment == "checks" && row.payload_bytes > 100 << 10,
        say: |_, _| {
            Some(
                "checksums of long payloads: each byte is read four times more, as fast as memory gives it (docs/decisions/0024)."
                    .to_owned(),
            )
        },
    },
];

/// Rows of the same exchange under the same conditions, whoever it is with.
fn same_load<'a>(row: &'a Row, rows: &'a [Row]) -> impl Iterator<Item = &'a Row> {
    rows.iter()
        .filter(|other| (&other.wait, other.payload_bytes, &other.place) == (&row.wait, row.payload_bytes, &row.place))
}

/// What is known to limit this row, one of `rows`.
pub(crate) fn known_limit(row: &Row, rows: &[Row]) -> Option<String> {
    KNOWN_LIMITS.iter().find(|limit| (limit.applies)(row)).and_then(|limit| (limit.say)(row, rows))
}

impl Target {
    /// How this row did, when the target is about it.
    pub(crate) fn judge(&self, row: &Row) -> Option<Verdict> {
        if !(self.applies)(row) {
            return None;
        }
        let limit = self.limit;
        let unit = row.unit.as_deref().unwrap_or("");
        Some(match self.measure {
            Measure::Ratio => {
                let ratio = row.ratio_p50?;
                Verdict { owed: format!("<= {limit} x"), measured: format!("{ratio:.2} x"), met: ratio <= limit }
            }
            Measure::Tail => {
                let ratio = row.times.p99_us / row.times.p50_us;
                Verdict {
                    owed: format!("p99 <= {limit} x p50"),
                    measured: format!("{ratio:.2} x"),
                    met: ratio <= limit,
                }
            }
            Measure::TailOverFloor => {
                let ratio = row.times.p99_us / row.floor_p50_us?;
                let owed = format!("p99 <= {limit} x one in flight");
                Verdict { owed, measured: format!("{ratio:.2} x"), met: ratio <= limit }
            }
            Measure::TimesFaster => {
                let times = 1.0 / row.ratio_p50?;
                Verdict {
                    owed: format!(">= {limit} x faster"),
                    measured: format!("{times:.2} x faster"),
                    met: times >= limit,
                }
            }
            Measure::Rate => {
                let rate = row.load.as_ref()?.rate;
                let show = |rate| format!("{} calls/s", crate::table::grouped(rate));
                Verdict { owed: format!(">= {}", show(limit)), measured: show(rate), met: rate >= limit }
            }
            Measure::P99Milliseconds => {
                let p99 = row.times.p99_us / 1e3;
                Verdict { owed: format!("p99 <= {limit} ms"), measured: format!("{p99:.2} ms"), met: p99 <= limit }
            }
            Measure::AtLeast => {
                let value = row.value?;
                let show = |value| format!("{} {unit}", crate::table::grouped(value));
                Verdict { owed: format!(">= {}", show(limit)), measured: show(value), met: value >= limit }
            }
            Measure::P50Nanoseconds => {
                let p50 = row.times.p50_us * 1e3;
                Verdict { owed: format!("p50 <= {limit} ns"), measured: format!("{p50:.0} ns"), met: p50 <= limit }
            }
            Measure::P99Microseconds => {
                let p99 = row.times.p99_us;
                Verdict { owed: format!("p99 <= {limit} us"), measured: format!("{p99:.2} us"), met: p99 <= limit }
            }
            Measure::Below => {
                let value = row.value?;
                Verdict {
                    owed: format!("< {limit} {unit}"),
                    measured: format!("{value:.2} {unit}"),
                    met: value < limit,
                }
            }
        })
    }
}

/// Writes what is owed, and whether it was met, into the row.
pub(crate) fn judge(mut row: Row) -> Row {
    let verdicts: Vec<Verdict> = TARGETS.iter().filter_map(|target| target.judge(&row)).collect();
    if !verdicts.is_empty() {
        row.owed = Some(verdicts.iter().map(|verdict| verdict.owed.as_str()).collect::<Vec<_>>().join(", "));
        let met = verdicts.iter().all(|verdict| verdict.met);
        row.verdict = Some(if met { "PASS" } else { "MISS" }.to_owned());
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Summary;
    use crate::row::Load;

    fn local(via: &str, p50_us: f64, p99_us: f64, floor_us: f64) -> Row {
        let times = Summary { count: 1, p50_us, p99_us, ..Summary::default() };
        let row = Row {
            experiment: "invocation".into(),
            path: "local".into(),
            ipc: "ring".into(),
            wait: "latency".into(),
            payload_bytes: 8,
            times,
            via: Some(via.into()),
            ..Row::default()
        };
        row.against("floor", floor_us)
    }

    #[test]
    fn a_ratio_above_the_limit_is_a_miss_and_so_is_a_long_tail() {
        assert_eq!(judge(local("ring", 0.36, 0.5, 0.3)).verdict.as_deref(), Some("PASS"));
        assert_eq!(judge(local("ring", 0.40, 0.5, 0.3)).verdict.as_deref(), Some("MISS"));
        assert_eq!(judge(local("ring", 0.36, 0.8, 0.3)).verdict.as_deref(), Some("MISS"));
        assert_eq!(judge(local("exchange", 0.40, 0.5, 0.3)).verdict.as_deref(), Some("PASS"));
    }

    fn verdict(row: Row) -> Option<String> {
        judge(row).verdict
    }

    #[test]
    fn what_remote_calls_owe_depends_on_whom_they_stand_beside() {
        let beside = |peer: &str, payload_bytes, ratio: f64| {
            let times = Summary { count: 1, p50_us: ratio * 10.0, ..Summary::default() };
            let row = Row {
                experiment: "beside_peer".into(),
                path: "remote".into(),
                ipc: "ring".into(),
                payload_bytes,
                times,
                ..Row::default()
            };
            verdict(row.against(peer, 10.0))
        };
        assert_eq!(beside("best_raw_tcp (epoll)", 64, 1.59).as_deref(), Some("PASS"));
        assert_eq!(beside("best_raw_tcp (epoll)", 64, 1.61).as_deref(), Some("MISS"));
        assert_eq!(beside("best_raw_tcp (uring)", 5 << 20, 1.21).as_deref(), Some("MISS"));
        assert_eq!(beside("http_awake", 64, 0.19).as_deref(), Some("PASS"));
        assert_eq!(beside("http", 64, 0.21).as_deref(), Some("MISS"));
        assert_eq!(beside("epoll", 64, 9.0), None, "only the best raw one is a floor");
        assert_eq!(beside("http", 1024, 9.0), None);
    }

    #[test]
    fn what_a_load_owes_is_calls_per_second_closed_and_a_tail_at_half_of_that() {
        let load = |kind: &str, connections, rate, of_peak, p99_us| {
            let rate_due = (kind == "open").then_some(rate);
            let load = Load { connections, kind: kind.into(), rate, rate_due, of_peak, ..Load::default() };
            let times = Summary { count: 1, p50_us: 30.0, p99_us, ..Summary::default() };
            let row = Row {
                experiment: "load".into(),
                path: "remote".into(),
                payload_bytes: 64,
                in_flight: (kind == "closed").then_some(64),
                times,
                load: Some(load),
                ..Row::default()
            };
            verdict(row.against("one in flight", 20.0))
        };
        assert_eq!(load("closed", 1, 251e3, None, 0.0).as_deref(), Some("PASS"));
        assert_eq!(load("closed", 1, 249e3, None, 0.0).as_deref(), Some("MISS"));
        assert_eq!(load("closed", 2, 1.0, None, 0.0), None);
        // At half of what is owed, whatever the peak; at half of the peak where that is lower.
        for (due, of_peak, p99_us, expected) in [
            (125e3, 0.3, 199.0, Some("PASS")),
            (125e3, 0.9, 201.0, Some("MISS")),
            (100e3, 0.5, 199.0, Some("PASS")),
            (100e3, 0.5, 201.0, Some("MISS")),
            (100e3, 0.75, 999.0, None),
            (200e3, 0.5, 999.0, None),
        ] {
            assert_eq!(load("open", 1, due, Some(of_peak), p99_us).as_deref(), expected, "{due} of {of_peak}");
        }
    }

    #[test]
    fn what_checks_cost_is_judged_beside_none_and_a_crowd_from_ten_thousand_on() {
        let checks = |p50_us| {
            let times = Summary { count: 1, p50_us, ..Summary::default() };
            Row { experiment: "checks".into(), times, ..Row::default() }
        };
        assert_eq!(verdict(checks(10.0)), None, "without them nothing is owed");
        assert_eq!(verdict(checks(10.9).against("without checks", 10.0)).as_deref(), Some("PASS"));
        assert_eq!(verdict(checks(11.1).against("without checks", 10.0)).as_deref(), Some("MISS"));
        let crowd = |silent, value| {
            let row = Row { experiment: "connections_idle_memory".into(), silent, ..Row::default() };
            verdict(Row { value: Some(value), unit: Some("KiB each".into()), ..row })
        };
        assert_eq!(crowd(Some(10_000), 3.9).as_deref(), Some("PASS"));
        assert_eq!(crowd(Some(10_000), 4.0).as_deref(), Some("MISS"));
        assert_eq!((crowd(Some(9_999), 9.0), crowd(None, 9.0)), (None, None));
    }

    #[test]
    fn what_state_and_messages_owe_depends_on_who_keeps_them_and_what_else_goes_on() {
        let state = |op: &str, p50_us, p99_us| Row {
            experiment: "state".into(),
            op: Some(op.into()),
            wait: "latency".into(),
            payload_bytes: 64,
            times: Summary { count: 1, p50_us, p99_us, ..Summary::default() },
            ..Row::default()
        };
        assert_eq!(verdict(state("get", 0.2, 9.0)).as_deref(), Some("PASS"));
        assert_eq!(verdict(state("get", 0.201, 9.0)).as_deref(), Some("MISS"));
        assert_eq!(verdict(state("get_typed", 0.3, 9.0)).as_deref(), Some("PASS"));
        let contended = |p99_us| Row { contended: Some(true), ..state("get", 1.0, p99_us) };
        assert_eq!(verdict(contended(1.9)).as_deref(), Some("PASS"));
        assert_eq!(verdict(contended(2.1)).as_deref(), Some("MISS"));
        let put = |p50_us| state("put", p50_us, 9.0).against("two_lines", 0.3);
        assert_eq!(verdict(put(0.89)).as_deref(), Some("PASS"));
        assert_eq!(verdict(put(0.91)).as_deref(), Some("MISS"));
        assert_eq!(verdict(Row { leased: Some(true), ..put(9.0) }), None);
        assert_eq!(verdict(Row { peer: Some("redis".into()), ..put(9.0) }), None);
        let beside = |op: &str, payload_bytes, p50_us| {
            let row = Row { experiment: "beside_redis".into(), payload_bytes, ..state(op, p50_us, 9.0) };
            verdict(row.against("redis", 10.0))
        };
        assert_eq!(beside("put", 1 << 20, 1.0).as_deref(), Some("PASS"));
        assert_eq!(beside("put", 1 << 20, 1.1).as_deref(), Some("MISS"));
        assert_eq!(beside("put_in_place", 1 << 20, 1.1).as_deref(), Some("MISS"));
        assert_eq!(beside("send_recv", 10, 2.1).as_deref(), Some("MISS"));
        assert_eq!(beside("send_recv", 1 << 20, 3.3).as_deref(), Some("PASS"));
        assert_eq!(beside("get", 10, 9.0), None);
    }

    #[test]
    fn nothing_is_owed_by_a_floor() {
        assert_eq!(judge(Row { experiment: "floor".into(), ..Row::default() }).verdict, None);
    }
}
