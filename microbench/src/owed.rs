//! What we owe, in one place: the table, the rows and the report all ask here.
//!
//! Every limit is a ratio inside one run, or a figure that does not depend on the machine's age. A figure missed is
//! reported as missed.

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
    /// p99 in milliseconds, at most.
    P99Milliseconds,
    /// The row's value, at least.
    AtLeast,
    /// The row's value, below.
    Below,
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

/// Everything owed by the invocation experiment.
pub(crate) const TARGETS: [Target; 12] = [
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
        applies: |row| {
            row.experiment == "invocation"
                && (row.path.as_str(), row.ipc.as_str()) == ("remote", "ring")
                && matches!(row.payload_bytes, 64 | 1_048_576)
        },
        what: "remote echo, ring, 64 B and 1 MiB: p50 against a raw TCP round trip in the same wait mode",
        measure: Measure::Ratio,
        limit: 2.0,
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
            Measure::P99Milliseconds => {
                let p99 = row.times.p99_us / 1e3;
                Verdict { owed: format!("p99 <= {limit} ms"), measured: format!("{p99:.2} ms"), met: p99 <= limit }
            }
            Measure::AtLeast => {
                let value = row.value?;
                let show = |value| format!("{} {unit}", crate::table::grouped(value));
                Verdict { owed: format!(">= {}", show(limit)), measured: show(value), met: value >= limit }
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

    #[test]
    fn nothing_is_owed_by_a_floor() {
        assert_eq!(judge(Row { experiment: "floor".into(), ..Row::default() }).verdict, None);
    }
}
