//! Rows for people.

use comfy_table::{Cell, CellAlignment, Table, presets};

use crate::peers::BEST_RAW;
use crate::row::Row;
use crate::size::Size;

/// A table of rows, in the order given. Rows of the paper's convention stand in the report and in the JSON only.
pub(crate) fn render(rows: &[Row]) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|row| !row.experiment.contains("r100")).collect();
    let judged = rows.iter().any(|row| row.floor.is_some() || row.owed.is_some());
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let mut header = vec!["what", "wait", "size", "count", "p50", "p95", "p99", "p99.9", "max", "runs ±"];
    if judged {
        header.extend(["floor", "ratio", "owed"]);
    }
    table.set_header(header);
    for row in rows {
        let size = usize::try_from(row.payload_bytes).unwrap_or(usize::MAX);
        let mut cells = vec![what(row), row.wait.clone(), Size(size).to_string()];
        match (row.value, &row.unit) {
            (Some(value), Some(unit)) => cells.extend([String::new(), format!("{} {unit}", grouped(value))]),
            _ => cells.extend([row.times.count.to_string(), microseconds(row.times.p50_us)]),
        }
        if row.times.count > 0 && row.value.is_none() {
            let times = &row.times;
            cells.extend([times.p95_us, times.p99_us, times.p999_us, times.max_us].map(microseconds));
            cells.push(if times.runs > 1 { format!("{:.0} %", times.run_p50_spread * 100.0) } else { String::new() });
        } else {
            cells.extend(std::iter::repeat_n(String::new(), 5));
        }
        if judged {
            cells.push(match (&row.floor, row.floor_p50_us) {
                (Some(floor), Some(p50)) => format!("{floor} {}", microseconds(p50)),
                _ => String::new(),
            });
            cells.push(row.ratio_text());
            cells.push(match (&row.owed, &row.verdict) {
                (Some(owed), Some(verdict)) => format!("{owed}  {verdict}"),
                _ => String::new(),
            });
        }
        table.add_row(cells.into_iter().enumerate().map(|(column, text)| {
            let number = (2..10).contains(&column) || column == 11;
            Cell::new(text).set_alignment(if number { CellAlignment::Right } else { CellAlignment::Left })
        }));
    }
    format!("{table}\nRound trips in µs, not halved. Compare ratios to the floor, never times across machines.")
}

/// A table of our remote call and of the peers it stands beside.
pub(crate) fn render_peers(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(PEERS_HEADER);
    for cells in peers_cells(rows) {
        table.add_row(cells.into_iter().enumerate().map(|(column, text)| {
            let number = (2..10).contains(&column);
            Cell::new(text).set_alignment(if number { CellAlignment::Right } else { CellAlignment::Left })
        }));
    }
    format!(
        "{table}\nRound trips in µs, not halved. A ratio below one: ours is the quicker. Never compare times across machines."
    )
}

/// The columns of [`peers_cells`].
pub(crate) const PEERS_HEADER: [&str; 12] =
    ["what", "wait", "size", "count", "p50", "p95", "p99", "p99.9", "max", "runs ±", "ours by it", "owed"];

/// A line for each of ours, with its floor, and for each peer, with every one of ours by it.
pub(crate) fn peers_cells(rows: &[Row]) -> Vec<Vec<String>> {
    let is_floored = |row: &Row| row.floor.as_deref().is_some_and(|floor| floor.starts_with(BEST_RAW));
    let mut lines = Vec::new();
    for row in rows {
        let is_peer = row.experiment == "peer";
        if !is_peer && row.experiment != "reactors" && !(row.experiment == "beside_peer" && is_floored(row)) {
            continue;
        }
        let ours: Vec<&Row> = if is_peer {
            let here = |ours: &&Row| {
                (&ours.wait, ours.payload_bytes, &ours.place) == (&row.wait, row.payload_bytes, &row.place)
            };
            let beside = |ours: &&Row| ours.experiment == "beside_peer" && ours.floor.as_deref() == Some(&row.ipc);
            rows.iter().filter(here).filter(beside).collect()
        } else {
            vec![row]
        };
        let joined = |text: &dyn Fn(&Row) -> String| {
            let mut texts: Vec<String> = ours.iter().map(|row| text(row)).filter(|text| !text.is_empty()).collect();
            texts.dedup();
            texts.join("; ")
        };
        let size = usize::try_from(row.payload_bytes).unwrap_or(usize::MAX);
        let times = &row.times;
        let mut cells = vec![what(row), row.wait.clone(), Size(size).to_string(), times.count.to_string()];
        cells.extend([times.p50_us, times.p95_us, times.p99_us, times.p999_us, times.max_us].map(microseconds));
        cells.push(if times.runs > 1 { format!("{:.0} %", times.run_p50_spread * 100.0) } else { String::new() });
        let by_it = joined(&|ours| match (&ours.floor, &ours.reactor) {
            (Some(floor), _) if !is_peer => format!("{floor}: {}", ours.ratio_text()),
            (_, Some(reactor)) => format!("{reactor} {}", ours.ratio_text()),
            _ => ours.ratio_text(),
        });
        cells.push(match &row.floor {
            Some(floor) if is_peer => format!("{by_it}; it by {floor} {}", row.ratio_text()),
            _ => by_it,
        });
        cells.push(joined(&|ours| match (&ours.owed, &ours.verdict) {
            (Some(owed), Some(verdict)) => format!("{owed}  {verdict}"),
            _ => String::new(),
        }));
        lines.push(cells);
    }
    lines
}

/// A table of loads, in the order given.
pub(crate) fn render_load(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(LOAD_HEADER);
    for row in rows {
        table.add_row(load_cells(row).into_iter().enumerate().map(|(column, text)| {
            let number = (2..LOAD_HEADER.len() - 1).contains(&column);
            Cell::new(text).set_alignment(if number { CellAlignment::Right } else { CellAlignment::Left })
        }));
    }
    format!(
        "{table}\nTimes in µs; in an open loop from when a call was due. cpu: µs of processor time a call, spinning included; sys: system calls \
         a call; each of server / generator. ratio: p50 by that of one call in flight."
    )
}

/// The columns of [`load_cells`].
pub(crate) const LOAD_HEADER: [&str; 13] =
    ["what", "wait", "size", "due/s", "calls/s", "p50", "p99", "p99.9", "max", "cpu", "sys", "ratio", "owed"];

/// A load as a line of a table.
pub(crate) fn load_cells(row: &Row) -> Vec<String> {
    let load = row.load.clone().unwrap_or_default();
    let size = usize::try_from(row.payload_bytes).unwrap_or(usize::MAX);
    let times = &row.times;
    let both = |server: Option<f64>, client: Option<f64>| match (server, client) {
        (Some(server), Some(client)) => format!("{server:.1} / {client:.1}"),
        _ => String::new(),
    };
    let due = match (load.rate_due, load.of_peak) {
        (Some(due), Some(of_peak)) => format!("{} ({:.0} %)", grouped(due), of_peak * 100.0),
        (Some(due), None) => grouped(due),
        (None, _) => String::new(),
    };
    let mut rate = grouped(load.rate);
    if load.unsent > 0 {
        rate += &format!(", {} given up", load.unsent);
    }
    let ratio = match (&row.floor, row.experiment.as_str()) {
        (Some(floor), "reactors") => format!("{floor}: {}", row.ratio_text()),
        _ => row.ratio_text(),
    };
    let mut cells = vec![what(row), row.wait.clone(), Size(size).to_string(), due, rate];
    cells.extend([times.p50_us, times.p99_us, times.p999_us, times.max_us].map(microseconds));
    cells.push(both(load.server_cpu_us, load.client_cpu_us));
    cells.push(both(load.server_calls, load.client_calls));
    cells.push(ratio);
    cells.push(match (&row.owed, &row.verdict) {
        (Some(owed), Some(verdict)) => format!("{owed}  {verdict}"),
        _ => String::new(),
    });
    cells
}

/// What a row measured, in a few words.
pub(crate) fn what(row: &Row) -> String {
    let mut text = match (row.experiment.as_str(), row.path.as_str()) {
        ("floor", _) => row.ipc.clone(),
        ("peer", _) | ("load", "raw") => format!("peer {}", row.ipc),
        ("invocation" | "beside_peer" | "load" | "checks", path) => format!("{path} {}", row.ipc),
        ("invocation_r100", path) => format!("{path} {}, R=100", row.ipc),
        ("invocation_r100_drop_first", path) => format!("{path} {}, R=100, first dropped", row.ipc),
        ("ipc" | "beside_tcp" | "ipc_flat", _) => "message and answer".to_owned(),
        ("state" | "isolation" | "state_reads", _) => state(row),
        ("beside_redis", _) if row.path == "processes" => "message and answer".to_owned(),
        ("beside_redis", _) => state(row),
        ("state_memory", _) => "state, memory besides key and value".to_owned(),
        ("state_versions", _) => "state, memory of 100 000 versions beside two".to_owned(),
        (experiment, path) => format!("{experiment} {path} {}", row.ipc),
    };
    if let Some(reactor) = &row.reactor {
        text += &format!(", {reactor}");
    }
    if let Some(checks) = &row.checks {
        text += &format!(", checks {checks}");
    }
    if let Some(silent) = row.silent {
        text += &format!(", {silent} silent connections");
    }
    if row.place.as_deref() == Some("netns") {
        text += ", netns";
    }
    if let Some(via) = &row.via {
        text += &format!(" via {via}");
    }
    if row.touched == Some(false) {
        text += ", untouched";
    }
    if let Some(in_flight) = row.in_flight {
        text += &format!(", {in_flight} in flight");
    }
    if let Some(load) = &row.load
        && load.connections > 1
    {
        text += &format!(" on each of {} connections", load.connections);
    }
    text
}

/// What was done with state, and who keeps it.
fn state(row: &Row) -> String {
    let mut text = format!("state {}", row.op.as_deref().unwrap_or_default());
    if let Some(peer) = &row.peer {
        text += &format!(", {peer}");
    }
    if row.contended == Some(true) {
        text += ", overwritten meanwhile";
    }
    if row.leased == Some(true) {
        text += ", holding a lease";
    }
    if let Some(isolate) = &row.isolate {
        text += &format!(", isolation {isolate}");
    }
    if let Some(objects) = row.objects {
        text += &format!(", any of {objects} objects");
    }
    if let Some(invocations) = row.invocations {
        text += &format!(", {invocations} x {} elements", row.payload_bytes / 8);
    }
    text
}

/// Three figures that matter, whatever the magnitude.
pub(crate) fn microseconds(value: f64) -> String {
    match value {
        v if v >= 1000.0 => format!("{v:.0}"),
        v if v >= 100.0 => format!("{v:.1}"),
        v if v >= 10.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

/// 34,000,000 for large numbers, few decimals for small ones.
pub(crate) fn grouped(value: f64) -> String {
    if value < 1000.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_without_floors_has_no_floor_columns() {
        let row = Row { experiment: "floor".into(), ipc: "tcp".into(), ..Row::default() };
        assert!(!render(std::slice::from_ref(&row)).contains("ratio "));
        assert!(render(&[row.against("two_lines", 1.0)]).contains("two_lines 1.000"));
    }

    #[test]
    fn a_peer_has_one_line_with_each_of_ours_by_it() {
        let row = |experiment: &str, path: &str, ipc: &str, reactor: Option<&str>| Row {
            experiment: experiment.into(),
            path: path.into(),
            ipc: ipc.into(),
            reactor: reactor.map(str::to_owned),
            ..Row::default()
        };
        let mut rows = vec![row("peer", "raw", "epoll", None), row("peer", "raw", "http", None)];
        for reactor in ["uring", "epoll"] {
            for floor in ["best_raw_tcp (epoll)", "epoll", "http"] {
                let ours = row("beside_peer", "remote", "ring", Some(reactor));
                rows.push(Row { ratio_p50: Some(1.5), ..ours.against(floor, 8.0) });
            }
        }
        let lines = peers_cells(&rows);
        assert_eq!(lines.len(), 2 + 2, "two peers, two of ours");
        assert_eq!(lines[0][10], "uring 1.50 x; epoll 1.50 x");
        assert_eq!(lines[2][10], "best_raw_tcp (epoll): 1.50 x");
        assert!(lines.iter().all(|line| line.len() == PEERS_HEADER.len()));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(34_000_000.4), "34,000,000");
        assert_eq!(grouped(0.125), "0.12");
        assert_eq!(microseconds(0.2951), "0.295");
        assert_eq!(microseconds(21_000.0), "21000");
    }
}
