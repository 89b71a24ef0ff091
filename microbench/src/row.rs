//! One result: a row of the human table, and one JSON object a line.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::recorder::Summary;

/// One result. Times are microseconds of a whole round trip; nothing is halved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// `floor`, `invocation`, `invocation_r100`, `invocation_r100_drop_first`, `throughput`, `death`, `idle_*`; `peer` and
    /// `beside_peer` of `peers`; `load`; `reactors` (io_uring beside epoll); `checks` (keys and checksums beside
    /// plain text); `connections_idle_*`; `ipc` (messages between two processes); `state`, `state_memory`, `state_versions`; `isolation` (state with
    /// beside without); `beside_redis` (what is ours beside the same over Redis); `beside_tcp`, `ipc_flat` (messages over shared
    /// memory beside the same over TCP, and beside those of 64 B).
    pub(crate) experiment: String,
    /// `raw` (two plain processes), `local` or `remote`; `processes` of `ipc`, between two of them.
    pub(crate) path: String,
    /// A floor's channel, or the process' `ring` or `mq`; `redis` where no process of ours takes part.
    pub(crate) ipc: String,
    pub(crate) wait: String,
    pub(crate) payload_bytes: u64,
    #[serde(flatten)]
    pub(crate) times: Summary,
    /// The fitting floor, measured in the same run in turns with this.
    pub(crate) floor: Option<String>,
    pub(crate) floor_p50_us: Option<f64>,
    pub(crate) ratio_p50: Option<f64>,
    /// Quartiles of the ratio over the turns of this run, when `ratio_p50` is their median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ratio_quartiles: Option<(f64, f64)>,
    /// `send_recv` of `ipc`; `get`, `put`, `get_typed`, `put_typed` or `reduce` of `state`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) op: Option<String>,
    /// Who keeps the state, when it is not a process of ours: `redis`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) peer: Option<String>,
    /// Whether another worker overwrote the object meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) contended: Option<bool>,
    /// Whether the function that was measured held a lease on another worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) leased: Option<bool>,
    /// `off` or `on`, where it was asked for: the controller copies what workers leave for each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) isolate: Option<String>,
    /// Objects there were, where that is what matters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) objects: Option<u32>,
    /// Invocations in a row that are one sample of a reduction; each carries a vector of `payload_bytes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) invocations: Option<u32>,
    /// `ring`, `exchange` or `controller`: how a local call reached its callee. `lent connection`: of a remote one. `tcp`, `self`,
    /// `redis-poll` or `redis-block`: how a message reached its receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) via: Option<String>,
    /// What the process waited with, as its ready line says: `uring` or `epoll`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reactor: Option<String>,
    /// `off` or `on`, where it was asked for: a key, keyed tags and payload checksums on loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) checks: Option<String>,
    /// Connections that were open and silent meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) silent: Option<u32>,
    /// `loopback` or `netns`, where a client chose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<String>,
    /// How a load was offered and what it cost.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub(crate) load: Option<Load>,
    pub(crate) placement: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) workers: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) in_flight: Option<u32>,
    /// Whether each call wrote and read its payload (first eight bytes and last).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) touched: Option<bool>,
    /// What rows without a time measure, such as calls per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) value: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unit: Option<String>,
    /// The owed limit, when one is owed, and whether it was met.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) owed: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) verdict: Option<String>,
    /// Points (µs, share) of the distribution, for small payloads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) distribution: Vec<(f64, f64)>,
}

/// A load offered by `praas-bench load`: how, and what it cost. Times of an open loop count from when a call was due.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) connections: u32,
    /// `closed` (a new call for each answer) or `open` (calls at a rate of their own).
    #[serde(rename = "loop")]
    pub(crate) kind: String,
    /// Calls per second that were due.
    pub(crate) rate_due: Option<f64>,
    /// Calls per second that were answered.
    pub(crate) rate: f64,
    /// What was due, by the most this very subject answered in a closed loop in this run.
    pub(crate) of_peak: Option<f64>,
    /// Calls that were due and that the generator could not place before it gave up; they count in the times, as late as then.
    pub(crate) unsent: u64,
    /// Processor time of the server (controller and workers) per call, microseconds; includes time spent spinning.
    pub(crate) server_cpu_us: Option<f64>,
    /// The same of the generator's thread.
    pub(crate) client_cpu_us: Option<f64>,
    /// System calls per call, counted in a pass of their own.
    pub(crate) server_calls: Option<f64>,
    pub(crate) client_calls: Option<f64>,
}

impl Row {
    /// Sets the floor and the ratio to it: the median over turns of a turn's median to that of the floor just before it.
    /// A shared host changes its pace within a second, and a median of all samples of one may stand on another pace than that of the other.
    pub(crate) fn in_turns_with(mut self, floor: &str, floor_p50_us: f64, mut ratios: Vec<f64>) -> Self {
        ratios.sort_by(f64::total_cmp);
        let at = |quarter: usize| ratios.get(ratios.len() * quarter / 4).copied();
        self = self.against(floor, floor_p50_us);
        self.ratio_p50 = at(2);
        self.ratio_quartiles = at(1).zip(at(3));
        self
    }

    /// The ratio to the floor and its quartiles, as text.
    pub(crate) fn ratio_text(&self) -> String {
        match (self.ratio_p50, self.ratio_quartiles) {
            (Some(ratio), Some((low, high))) => format!("{ratio:.2} x ({low:.2}-{high:.2})"),
            (Some(ratio), None) => format!("{ratio:.2} x"),
            (None, _) => String::new(),
        }
    }

    /// Sets the floor and the ratio of the medians.
    pub(crate) fn against(mut self, floor: &str, floor_p50_us: f64) -> Self {
        self.floor = Some(floor.to_owned());
        self.floor_p50_us = Some(floor_p50_us);
        self.ratio_p50 = (floor_p50_us > 0.0).then(|| self.times.p50_us / floor_p50_us);
        self.ratio_quartiles = None;
        self
    }
}

/// Where rows go as they come: a file or standard output, one JSON object a line, flushed each.
pub(crate) struct RowSink(Option<Box<dyn Write>>);

impl std::fmt::Debug for RowSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RowSink({})", if self.0.is_some() { "open" } else { "none" })
    }
}

impl RowSink {
    /// `-` is standard output; nothing is nowhere.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        Ok(Self(match path {
            None => None,
            Some(path) if path.as_os_str() == "-" => Some(Box::new(io::stdout())),
            Some(path) => {
                let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
                Some(Box::new(BufWriter::new(file)))
            }
        }))
    }

    pub(crate) fn write(&mut self, row: &Row) -> Result<()> {
        if let Some(out) = &mut self.0 {
            serde_json::to_writer(&mut *out, row)?;
            writeln!(out)?;
            out.flush().context("write a row")?;
        }
        Ok(())
    }
}

/// Reads rows written by [`RowSink`]; blank lines are nothing.
pub(crate) fn read(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| {
            serde_json::from_str(line).with_context(|| format!("{}: line {} is not a row", path.display(), number + 1))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b3_a_row_carries_its_floor_under_the_promised_names_and_comes_back_whole() {
        let row = Row { experiment: "floor".into(), payload_bytes: 8, ..Row::default() }.against("two_lines", 0.29);
        let json = serde_json::to_value(&row).unwrap();
        for name in [
            "experiment",
            "path",
            "ipc",
            "wait",
            "payload_bytes",
            "count",
            "min_us",
            "p50_us",
            "mean_us",
            "p95_us",
            "p99_us",
            "p999_us",
            "max_us",
            "floor",
            "floor_p50_us",
            "ratio_p50",
        ] {
            assert!(json.get(name).is_some(), "{name} is missing");
        }
        assert_eq!(serde_json::from_value::<Row>(json).unwrap(), row);
    }

    #[test]
    fn a_load_lies_flat_in_its_row_and_comes_back_whole() {
        let load = Load { connections: 4, kind: "open".into(), rate_due: Some(5e4), rate: 4.9e4, ..Load::default() };
        let row = Row { experiment: "load".into(), reactor: Some("uring".into()), load: Some(load), ..Row::default() };
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(
            (&json["loop"], &json["connections"], &json["reactor"]),
            (&"open".into(), &4.into(), &"uring".into())
        );
        assert_eq!(serde_json::from_value::<Row>(json).unwrap(), row);
    }
}
