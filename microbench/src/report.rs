//! `praas-bench report`: rows in, a report out.
//!
//! Writes `report.html` (self-contained), `report.md` with its SVG files, CSVs in the published columns,
//! `rows.jsonl` (everything measured) and `machine.json`. No file names a directory of the machine it was made on.

mod ipc;
mod state;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::machine::Machine;
use crate::owed::{self, TARGETS, known_limit};
use crate::page::{Figure, Page, Section, Table};
use crate::plot::{self, Kind, Series, Vertical};
use crate::published::{self, Published};
use crate::row::{self, Row};
use crate::size::Size;
use crate::table::{self, grouped, microseconds, what};

#[derive(Args, Debug)]
pub(crate) struct ReportArgs {
    /// Rows written by `--json` of the other commands.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    rows: Vec<PathBuf>,
    /// Directory to write to; created, and refused when it already holds a report.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A command line the rows came from, to be kept in machine.json; repeat as needed.
    #[arg(long = "command", value_name = "TEXT")]
    commands: Vec<String>,
}

pub(crate) fn run(args: &ReportArgs) -> Result<()> {
    let mut rows = Vec::new();
    for file in &args.rows {
        rows.extend(row::read(file)?);
    }
    ensure!(!rows.is_empty(), "no rows in {} file(s)", args.rows.len());
    let page_file = args.out.join("report.html");
    ensure!(!page_file.exists(), "{} exists already: results are never overwritten", page_file.display());
    fs::create_dir_all(&args.out).with_context(|| format!("create {}", args.out.display()))?;

    let machine = Machine::look(args.commands.clone())?;
    let page = compose(&rows, &machine)?;
    write(&args.out, "report.html", &page.html())?;
    write(&args.out, "report.md", &page.markdown())?;
    for figure in page.figures() {
        write(&args.out, &figure.file, &figure.svg)?;
    }
    write(&args.out, "machine.json", &(serde_json::to_string_pretty(&machine)? + "\n"))?;
    let lines: Vec<String> = rows.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    write(&args.out, "rows.jsonl", &(lines.join("\n") + "\n"))?;
    let platform = machine.platform();
    for (file, is_part) in [
        ("ipc_microbenchmark.csv", (|row| row.experiment == "floor") as fn(&Row) -> bool),
        ("invocations.csv", |row| row.experiment.starts_with("invocation")),
        ("ipc.csv", |row| row.experiment == "ipc"),
        ("state.csv", |row| row.experiment == "state"),
    ] {
        let mut text = published::COLUMNS.to_owned() + "\n";
        for row in rows.iter().filter(|row| is_part(row)) {
            text += &(published::line_of(row, &platform, "rows.jsonl") + "\n");
        }
        write(&args.out, file, &text)?;
    }
    println!("{}", page_file.display());
    Ok(())
}

fn write(directory: &Path, file: &str, text: &str) -> Result<()> {
    let path = directory.join(file);
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

fn compose(rows: &[Row], machine: &Machine) -> Result<Page> {
    let mut sections = vec![introduction(machine), targets(rows)];
    sections.extend(small_call(rows)?);
    sections.extend(local(rows)?);
    sections.extend(remote(rows)?);
    sections.extend(beside(rows)?);
    sections.extend(loads(rows)?);
    sections.extend(ipc::sections(rows)?);
    sections.extend(state::sections(rows)?);
    sections.extend(ratios(rows)?);
    sections.extend(paper_convention(rows));
    sections.extend(floors(rows)?);
    sections.push(every_row(rows));
    sections.push(measured_on(machine));
    Ok(Page { title: "PraaS: invocations, measured".to_owned(), sections })
}

fn introduction(machine: &Machine) -> Section {
    Section {
        paragraphs: vec![
            format!("Measured on {} with {}: {}.", machine.measured_on, machine.rustc, machine.sentence()),
            "**Compare ratios to the floor, never times across machines.** Published values are theirs: another machine, \
             and for remote invocations a real network (0.7 ms round trip) where ours is loopback. They stand here with \
             their platform, as context. Our ratios are inside one run: the floor is measured in turns with the thing \
             that stands on it, and a ratio is the median over those turns (quartiles in brackets), because a shared host \
             changes its pace within seconds. Each run starts a process and a floor of its own."
                .replace("**", ""),
            "All times are round trips as the caller saw them; nothing is halved. One call is in flight unless a row \
             says otherwise (closed loop). Every answer is checked, by sequence number and last byte where the payload \
             is touched. `latency` spins on two cores, `balanced` spins up to a budget and then blocks, `efficient` \
             blocks with everybody on one core."
                .to_owned(),
        ],
        ..Section::default()
    }
}

fn targets(rows: &[Row]) -> Section {
    let mut table = Table {
        header: ["owed", "row", "limit", "measured", ""].map(String::from).to_vec(),
        rows: Vec::new(),
        text_columns: 2,
    };
    let (mut met, mut missed, mut silent) = (0, 0, 0);
    let mut limits = Vec::new();
    for target in TARGETS {
        let mut found = false;
        for row in rows {
            if let Some(verdict) = target.judge(row) {
                found = true;
                *(if verdict.met { &mut met } else { &mut missed }) += 1;
                let word = if verdict.met { "PASS" } else { "MISS" };
                if !verdict.met {
                    limits.extend(known_limit(row, rows).filter(|limit| !limits.contains(limit)));
                }
                let due = row.load.as_ref().and_then(|load| load.rate_due);
                let due = due.map(|due| format!(", {} calls/s due", grouped(due))).unwrap_or_default();
                // The other floors follow from what is owed.
                let beside =
                    row.floor.as_deref().filter(|_| matches!(row.experiment.as_str(), "beside_peer" | "reactors"));
                let beside = beside.map(|floor| format!(" beside {floor}")).unwrap_or_default();
                let name = format!("{}, {}, {}{due}{beside}", what(row), row.wait, size_of(row));
                table.rows.push(vec![target.what.to_owned(), name, verdict.owed, verdict.measured, word.to_owned()]);
            }
        }
        if !found {
            silent += 1;
            table.rows.push(vec![
                target.what.to_owned(),
                String::new(),
                String::new(),
                String::new(),
                "not measured".to_owned(),
            ]);
        }
    }
    let mut count = format!("{met} met, {missed} missed");
    if silent > 0 {
        count += &format!(", {silent} not measured in this run");
    }
    Section {
        heading: "What we owe, and what we measured".to_owned(),
        paragraphs: std::iter::once(format!("{count}. A figure missed is reported as missed."))
            .chain(limits.into_iter().map(|limit| format!("What limits {limit}")))
            .collect(),
        table: Some(table),
        ..Section::default()
    }
}

fn small_call(rows: &[Row]) -> Result<Vec<Section>> {
    let is_small = |row: &&Row| row.payload_bytes <= 10 && row.times.count > 0 && !row.experiment.contains("r100");
    let mut bars: Vec<Series> = Vec::new();
    let mut curves: Vec<Series> = Vec::new();
    let mut seen: Vec<String> = Vec::new();
    for row in rows.iter().filter(is_small) {
        let kind = if row.experiment == "floor" { Kind::Floor } else { Kind::Ours };
        if !matches!(row.experiment.as_str(), "floor" | "invocation") {
            continue;
        }
        let label = format!("{}, {}", what(row), row.wait);
        if seen.contains(&label) {
            continue;
        }
        seen.push(label.clone());
        let spinning_floor =
            kind == Kind::Floor && matches!(row.ipc.as_str(), "two_lines" | "one_line" | "posix_queue" | "tcp");
        if kind == Kind::Ours || spinning_floor {
            bars.push(Series { label: label.clone(), kind, points: vec![(0.0, row.times.p50_us)] });
        }
        if row.wait == "latency" && !row.distribution.is_empty() && (kind == Kind::Ours || spinning_floor) {
            curves.push(Series { label, kind, points: row.distribution.clone() });
        }
    }
    for row in published::invocations().iter().filter(|row| row.payload_bytes == 10) {
        let label = format!("{}, {}", row.system, row.platform);
        bars.push(Series { label, kind: Kind::Published, points: vec![(0.0, row.median_us)] });
    }
    let mut sections = vec![Section {
        heading: "A small call".to_owned(),
        paragraphs: vec![
            "Median round trip of the smallest payload, on a logarithmic axis. Blue: ours. Light: floors of this \
             machine. Grey: published, other machines and a real network; context, not a race."
                .to_owned(),
        ],
        figure: Some(figure("small_call", "Median round trip, 8 or 10 B", |title| plot::bars(title, &bars))?),
        ..Section::default()
    }];
    if !curves.is_empty() {
        curves.sort_by_key(|curve| curve.kind != Kind::Ours);
        sections.push(Section {
            paragraphs: vec![
                "The whole distribution in `latency` mode: a median says nothing about the tail.".to_owned(),
            ],
            figure: Some(figure(
                "small_call_distribution",
                "Distribution of small round trips, latency mode",
                |title| plot::distribution(title, &curves),
            )?),
            ..Section::default()
        });
    }
    Ok(sections)
}

fn local(rows: &[Row]) -> Result<Option<Section>> {
    let ours = invocations(rows, "local");
    if ours.is_empty() {
        return Ok(None);
    }
    let mut series = ours;
    series.extend(floor_series(rows, "latency", &["shared_copy"]));
    series.extend(standing_on(rows, "local"));
    series.extend(published_series(&published::invocations(), &["praas_local_mq"]));
    Ok(Some(Section {
        heading: "Local invocation: a function calls a function of the same process".to_owned(),
        paragraphs: vec![
            "The ring hands a payload over by its offset, so its line stays flat; both ends touch first and last bytes \
             only. Queues copy every byte twice a hop, ours as theirs. The floor of the queue rows is two raw queue \
             round trips in a row, because a call over queues makes four hops."
                .to_owned(),
        ],
        figure: Some(figure("local", "Local invocation over payload size", |title| {
            plot::over_size(title, Vertical::Time, &series)
        })?),
        table: Some(invocation_table(rows, "local")),
        ..Section::default()
    }))
}

fn remote(rows: &[Row]) -> Result<Option<Section>> {
    let ours = invocations(rows, "remote");
    if ours.is_empty() {
        return Ok(None);
    }
    let mut series = ours;
    series.extend(standing_on(rows, "remote"));
    series.extend(published_series(
        &published::invocations(),
        &["praas_remote_mq", "tcp_netperf_TCP_RR", "aws_lambda", "knative"],
    ));
    Ok(Some(Section {
        heading: "Remote invocation: a client calls a function over TCP".to_owned(),
        paragraphs: vec![
            "Ours and its floor cross loopback; the published rows crossed the network of a cloud provider. What \
             compares is the gap between an invocation and the TCP line it stands on."
                .to_owned(),
        ],
        figure: Some(figure("remote", "Remote invocation over payload size", |title| {
            plot::over_size(title, Vertical::Time, &series)
        })?),
        table: Some(invocation_table(rows, "remote")),
        ..Section::default()
    }))
}

/// Our call beside other people's servers, a picture for each wait mode.
fn beside(rows: &[Row]) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    for place in ["loopback", "netns"] {
        for wait in ["latency", "balanced", "efficient"] {
            let is_here = |row: &&Row| row.wait == wait && row.place.as_deref() == Some(place) && row.load.is_none();
            let is_drawn = |row: &Row| row.experiment == "peer" || row.experiment == "beside_peer";
            let mut series: Vec<Series> = Vec::new();
            for row in rows.iter().filter(is_here).filter(|row| is_drawn(row)) {
                let kind = if row.path == "raw" { Kind::Floor } else { Kind::Ours };
                add_point(&mut series, what(row), kind, (row.payload_bytes as f64, row.times.p50_us));
            }
            if series.is_empty() {
                continue;
            }
            series.sort_by_key(|one| one.kind != Kind::Ours);
            let title = format!("Remote echo beside other servers, {wait}, {place}");
            let judged: Vec<Row> = rows.iter().filter(is_here).cloned().map(owed::judge).collect();
            let table = Table {
                header: table::PEERS_HEADER.map(String::from).to_vec(),
                rows: table::peers_cells(&judged),
                text_columns: 2,
            };
            sections.push(Section {
                figure: Some(figure(&format!("beside_{wait}_{place}"), &title, |title| {
                    plot::over_size(title, Vertical::Time, &series)
                })?),
                table: Some(table),
                folded: true,
                ..Section::default()
            });
        }
    }
    if let Some(first) = sections.first_mut() {
        first.heading = "A remote call beside other people's servers".to_owned();
        first.paragraphs.push(
            "One echo in flight, everybody in turns. `blocking`, `epoll` and `uring` are bare sockets, and the fastest of them \
             (`best_raw_tcp`) is what a remote call stands on; `relay` is the plainest of them with a third process that is asked before \
             each answer and does nothing else, as a function would be; `tokio`, `tokio_uring` and `http` (POST over axum, keep-alive) \
             are used as they come, so they sleep when there is nothing to do; those called `awake` spin as `latency` does. \
             A ratio is our time by theirs: below one, ours is the quicker. (That of `relay` by the best raw server is its own.)"
                .to_owned(),
        );
    }
    Ok(sections)
}

/// Latency over load and throughput over calls in flight, for each wait mode, size and place.
fn loads(rows: &[Row]) -> Result<Vec<Section>> {
    let mut groups: Vec<(&str, u64, Option<&str>)> = Vec::new();
    for row in rows.iter().filter(|row| row.load.is_some()) {
        let group = (row.wait.as_str(), row.payload_bytes, row.place.as_deref());
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    let mut sections = Vec::new();
    for (wait, payload_bytes, place) in groups {
        let here: Vec<&Row> = rows
            .iter()
            .filter(|row| (row.wait.as_str(), row.payload_bytes, row.place.as_deref()) == (wait, payload_bytes, place))
            .filter(|row| row.load.is_some())
            .collect();
        let place = place.unwrap_or("loopback");
        let where_ = format!("{wait}, {}, {place}", size_of(here[0]));
        let file = |what: &str| format!("{what}_{wait}_{payload_bytes}_{place}");
        let over = |kind: &str, point: &dyn Fn(&Row) -> Option<(f64, f64)>| {
            let mut series: Vec<Series> = Vec::new();
            for row in here.iter().filter(|row| row.experiment == "load") {
                let of_kind = row.load.as_ref().is_some_and(|load| load.kind == kind);
                if let Some(point) = point(row).filter(|_| of_kind) {
                    let whose = if row.path == "raw" { Kind::Floor } else { Kind::Ours };
                    // Without the calls in flight, which are on the axis.
                    let label = what(&Row { in_flight: None, load: None, ..(*row).clone() });
                    add_point(&mut series, label, whose, point);
                }
            }
            series
        };
        let percentile = |row: &Row, name: &str| match name {
            "p50" => row.times.p50_us,
            "p99" => row.times.p99_us,
            _ => row.times.p999_us,
        };
        let mut figures = Vec::new();
        for (name, file_name) in [("p50", "load_p50"), ("p99", "load_p99"), ("p99.9", "load_p999")] {
            let series = over("open", &|row| Some((row.load.as_ref()?.rate, percentile(row, name))));
            if !series.is_empty() {
                let title = format!("Latency over load, {name}, {where_}");
                figures.push(figure(&file(file_name), &title, |title| plot::over_rate(title, name, &series))?);
            }
        }
        let series = over("closed", &|row| {
            let load = row.load.as_ref()?;
            Some((f64::from(row.in_flight? * load.connections), load.rate))
        });
        if !series.is_empty() {
            let title = format!("Calls per second over calls in flight, {where_}");
            figures.push(figure(&file("load_throughput"), &title, |title| plot::over_in_flight(title, &series))?);
        }
        sections.extend(figures.into_iter().map(|figure| Section { figure: Some(figure), ..Section::default() }));
        let mut table =
            Table { header: table::LOAD_HEADER.map(String::from).to_vec(), rows: Vec::new(), text_columns: 2 };
        table.rows.extend(here.iter().map(|row| table::load_cells(&owed::judge((*row).clone()))));
        sections.push(Section { table: Some(table), folded: true, ..Section::default() });
    }
    if let Some(first) = sections.first_mut() {
        first.heading = "Remote calls under load".to_owned();
        first.paragraphs.push(
            "Latency over load is an open loop: calls are due at random times, at a rate that is a part of the most that ours \
             answered in a closed loop, and each is timed from when it was *due*, so that a stall shows in every call it held \
             up. One thread makes all calls and checks all answers; the same thread against a bare server (`peer`) shows what \
             it costs itself. In the tables, cpu and sys are microseconds of processor time (spinning included) and system calls \
             a call, server / generator."
                .replace('*', ""),
        );
    }
    Ok(sections)
}

fn add_point(series: &mut Vec<Series>, label: String, kind: Kind, point: (f64, f64)) {
    match series.iter_mut().find(|one| one.label == label) {
        Some(one) if one.points.contains(&point) => {}
        Some(one) => one.points.push(point),
        None => series.push(Series { label, kind, points: vec![point] }),
    }
}

fn ratios(rows: &[Row]) -> Result<Option<Section>> {
    let mut series = BTreeMap::<String, Vec<(f64, f64)>>::new();
    for row in rows.iter().filter(|row| row.experiment == "invocation") {
        // A call that copies nothing has no floor at larger sizes: its floor is a line of eight bytes.
        let over_lines =
            row.floor.as_deref().is_some_and(|floor| floor.ends_with("_line") || floor.ends_with("_lines"));
        if let (Some(ratio), false) = (row.ratio_p50, over_lines) {
            series.entry(format!("{}, {}", what(row), row.wait)).or_default().push((row.payload_bytes as f64, ratio));
        }
    }
    if series.is_empty() {
        return Ok(None);
    }
    let mut series: Vec<Series> =
        series.into_iter().map(|(label, points)| Series { label, kind: Kind::Ours, points }).collect();
    for (label, platform, system) in [
        ("praas_local_mq, fargate", "fargate", "praas_local_mq"),
        ("praas_local_mq, docker-on-EC2", "docker-on-EC2", "praas_local_mq"),
        ("praas_remote_mq, EC2 -> fargate", "EC2-client->fargate-1vCPU-2GB", "praas_remote_mq"),
    ] {
        let points = published::invocations()
            .iter()
            .filter(|row| row.system == system && row.platform == platform)
            .filter_map(|row| Some((row.payload_bytes as f64, row.median_us / published::floor_us(row)?)))
            .collect();
        series.push(Series { label: format!("published: {label}"), kind: Kind::Published, points });
    }
    Ok(Some(Section {
        heading: "Ratio to the floor: the comparison that travels".to_owned(),
        paragraphs: vec![
            "An invocation's median divided by the median of what it stands on, turn by turn on the same machine: two queue round \
             trips for a local call over queues, a TCP round trip for a remote one. One means nothing was added. This \
             is the figure to set beside the published one."
                .to_owned(),
        ],
        figure: Some(figure("ratio", "Invocation divided by its floor", |title| {
            plot::over_size(title, Vertical::Ratio, &series)
        })?),
        ..Section::default()
    }))
}

/// R = 100, as published, beside the published rows.
fn paper_convention(rows: &[Row]) -> Option<Section> {
    let mut table = Table {
        header: ["system", "platform", "size", "count", "min", "median", "mean", "p95", "p99", "max"]
            .map(String::from)
            .to_vec(),
        rows: Vec::new(),
        text_columns: 2,
    };
    for row in rows.iter().filter(|row| row.experiment.starts_with("invocation_r100")) {
        let times = &row.times;
        let mut cells = vec![
            format!("{}, {}", what(row), row.wait),
            "this machine".to_owned(),
            size_of(row),
            times.count.to_string(),
        ];
        cells.extend(
            [times.min_us, times.p50_us, times.mean_us, times.p95_us, times.p99_us, times.max_us].map(microseconds),
        );
        table.rows.push(cells);
    }
    if table.rows.is_empty() {
        return None;
    }
    for row in published::invocations() {
        let mut cells = vec![format!("published: {}", row.system), row.platform.clone()];
        cells.extend([Size(usize::try_from(row.payload_bytes).unwrap_or(0)).to_string(), row.count.to_string()]);
        cells.extend([row.min_us, row.median_us, row.mean_us].map(microseconds));
        cells.push(row.p95_us.map(microseconds).unwrap_or_default());
        cells.extend([row.p99_us, row.max_us].map(microseconds));
        table.rows.push(cells);
    }
    Some(Section {
        heading: "The paper's convention: 100 repetitions".to_owned(),
        paragraphs: vec![
            "All 100 repetitions of a fresh process are kept, the cold first one included, as published; the \
             drop-first line leaves it out. Percentiles interpolate, as the published ones do. Known about the \
             published rows: local invocation on one vCPU has a 50 ms tail from its CPU quota, and netperf gives no \
             p95."
                .to_owned(),
        ],
        table: Some(table),
        folded: true,
        ..Section::default()
    })
}

fn floors(rows: &[Row]) -> Result<Vec<Section>> {
    let channels = ["shared_copy", "pipe", "unix_stream", "posix_queue", "tcp"];
    let spinning = floor_series(rows, "latency", &channels);
    let mut blocking = floor_series(rows, "efficient", &channels);
    if spinning.is_empty() && blocking.is_empty() {
        return Ok(Vec::new());
    }
    for platform in ["ec2", "fargate"] {
        for system in ["mq", "uds"] {
            let points = published::ipc_floors()
                .iter()
                .filter(|row| row.platform == platform && row.system == system)
                .map(|row| (row.payload_bytes as f64, row.median_us))
                .collect();
            blocking.push(Series { label: format!("published: {system}, {platform}"), kind: Kind::Published, points });
        }
    }
    let draw = |file: &str, title: &str, series: &[Series]| {
        figure(file, title, |title| plot::over_size(title, Vertical::Time, series))
    };
    Ok(vec![
        Section {
            heading: "Floors: what this machine charges two plain processes".to_owned(),
            paragraphs: vec!["Ping-pong with nothing of ours in between, both ends spinning on two cores.".to_owned()],
            figure: Some(draw("floors_latency", "Floors over message size, spinning on two cores", &spinning)?),
            ..Section::default()
        },
        Section {
            paragraphs: vec![
                "The same, both ends blocking on one core; beside it the published ping-pongs, which blocked. Words \
                 (cache lines, eventfd, futex) carry 8 B and stand in the table."
                    .to_owned(),
            ],
            figure: Some(draw("floors_efficient", "Floors over message size, blocking on one core", &blocking)?),
            table: Some(rows_table(rows.iter().filter(|row| row.experiment == "floor"))),
            folded: true,
            ..Section::default()
        },
    ])
}

fn every_row(rows: &[Row]) -> Section {
    Section {
        heading: "Everything else that was measured".to_owned(),
        paragraphs: vec!["Round trips in µs; `rows.jsonl` holds every row with every field.".to_owned()],
        table: Some(rows_table(
            rows.iter()
                .filter(|row| {
                    !matches!(
                        row.experiment.as_str(),
                        "floor"
                            | "peer"
                            | "beside_peer"
                            | "reactors"
                            | "load"
                            | "ipc"
                            | "beside_tcp"
                            | "ipc_flat"
                            | "state"
                            | "beside_redis"
                            | "isolation"
                            | "state_memory"
                            | "state_reads"
                            | "state_versions"
                    )
                })
                .filter(|row| !row.experiment.contains("r100")),
        )),
        folded: true,
        ..Section::default()
    }
}

fn measured_on(machine: &Machine) -> Section {
    let text = |value: &dyn std::fmt::Display| value.to_string();
    let mitigations: Vec<String> = machine
        .mitigations
        .iter()
        .filter(|(_, state)| state.as_str() != "Not affected")
        .map(|(name, state)| format!("{name}: {state}"))
        .collect();
    let facts = [
        ("processor", machine.cpu_model.clone()),
        ("cores allowed", format!("{:?} of {}", machine.cores_allowed, machine.cores_online)),
        ("threads per core, as shown", text(&machine.threads_per_core)),
        ("cgroup CPU quota", machine.cgroup_cpu_quota.clone()),
        ("governor", machine.governor.clone()),
        ("virtual machine", text(&machine.virtualised)),
        ("memory", format!("{} MiB", machine.memory_mib)),
        ("kernel", machine.kernel.clone()),
        ("mitigations", mitigations.join("; ")),
        ("clock", format!("{}, {:.1} ns a read", machine.clock_source, machine.clock_read_ns)),
        ("POSIX queues", machine.queue_limits.clone()),
        (
            "TCP congestion control",
            format!("{} (default here: {})", machine.tcp_congestion_used, machine.tcp_congestion_default),
        ),
        ("compiler", format!("{}, {}", machine.rustc, machine.build_profile)),
        (
            "revision",
            format!(
                "{}{}",
                machine.git_revision,
                if machine.git_dirty == Some(true) { ", with uncommitted changes" } else { "" }
            ),
        ),
        ("commands", machine.command_lines.iter().map(|line| format!("`{line}`")).collect::<Vec<_>>().join(" ")),
    ];
    let rows = facts.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    Section {
        heading: "Measured on".to_owned(),
        table: Some(Table { header: vec![String::new(), String::new()], rows, text_columns: 2 }),
        ..Section::default()
    }
}

/// One series per way of calling, in the order the rows came.
fn invocations(rows: &[Row], path: &str) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    let is_drawn = |row: &&Row| row.experiment == "invocation" && row.path == path && row.touched != Some(false);
    for row in rows.iter().filter(is_drawn) {
        let label = format!("{}, {}", what(row), row.wait);
        let point = (row.payload_bytes as f64, row.times.p50_us);
        match series.iter_mut().find(|one| one.label == label) {
            Some(one) => one.points.push(point),
            None => series.push(Series { label, kind: Kind::Ours, points: vec![point] }),
        }
    }
    series
}

/// The floors measured in turns with the invocations of a path.
fn standing_on(rows: &[Row], path: &str) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows.iter().filter(|row| row.experiment == "invocation" && row.path == path) {
        let (Some(floor), Some(p50)) = (&row.floor, row.floor_p50_us) else { continue };
        // A line is spun on in every mode: drawn once.
        if floor.contains("_line") && row.wait != "latency" {
            continue;
        }
        let label = format!("floor: {floor}, {}", row.wait);
        let point = (row.payload_bytes as f64, p50);
        match series.iter_mut().find(|one| one.label == label) {
            Some(one) if one.points.iter().any(|known| known.0 == point.0) => {}
            Some(one) => one.points.push(point),
            None => series.push(Series { label, kind: Kind::Floor, points: vec![point] }),
        }
    }
    series
}

fn floor_series(rows: &[Row], wait: &str, channels: &[&str]) -> Vec<Series> {
    channels
        .iter()
        .map(|channel| Series {
            label: format!("floor: {channel}, {wait}"),
            kind: Kind::Floor,
            points: rows
                .iter()
                .filter(|row| row.experiment == "floor" && row.ipc == *channel && row.wait == wait)
                .map(|row| (row.payload_bytes as f64, row.times.p50_us))
                .collect(),
        })
        .filter(|series| !series.points.is_empty())
        .collect()
}

fn published_series(rows: &[Published], systems: &[&str]) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows.iter().filter(|row| systems.contains(&row.system.as_str())) {
        let platform = row.platform.replace("EC2-client->", "EC2 -> ").replace("-cpp-functionURL", "");
        let label = format!("published: {}, {platform}", row.system.replace("_netperf_TCP_RR", ", netperf"));
        let point = (row.payload_bytes as f64, row.median_us);
        match series.iter_mut().find(|one| one.label == label) {
            Some(one) => one.points.push(point),
            None => series.push(Series { label, kind: Kind::Published, points: vec![point] }),
        }
    }
    series
}

fn invocation_table(rows: &[Row], path: &str) -> Table {
    rows_table(rows.iter().filter(|row| row.experiment == "invocation" && row.path == path))
}

fn rows_table<'a>(rows: impl Iterator<Item = &'a Row>) -> Table {
    let header = [
        "what",
        "wait",
        "size",
        "count",
        "p50",
        "p95",
        "p99",
        "p99.9",
        "max",
        "runs ±",
        "floor p50",
        "ratio",
        "owed",
        "",
    ];
    let mut table = Table { header: header.map(String::from).to_vec(), rows: Vec::new(), text_columns: 2 };
    for row in rows {
        let times = &row.times;
        let mut cells = vec![what(row), row.wait.clone(), size_of(row)];
        match (row.value, &row.unit) {
            (Some(value), Some(unit)) => {
                cells.push(String::new());
                cells.push(format!("{} {unit}", grouped(value)));
                cells.extend(std::iter::repeat_n(String::new(), 5));
            }
            _ => {
                cells.push(times.count.to_string());
                cells.extend([times.p50_us, times.p95_us, times.p99_us, times.p999_us, times.max_us].map(microseconds));
                cells.push(format!("{:.0} %", times.run_p50_spread * 100.0));
            }
        }
        cells.push(row.floor_p50_us.map(microseconds).unwrap_or_default());
        cells.push(row.ratio_text());
        let judged = owed::judge(row.clone());
        cells.push(judged.owed.unwrap_or_default());
        cells.push(judged.verdict.unwrap_or_default());
        table.rows.push(cells);
    }
    table
}

fn size_of(row: &Row) -> String {
    Size(usize::try_from(row.payload_bytes).unwrap_or(usize::MAX)).to_string()
}

fn figure(file: &str, title: &str, draw: impl FnOnce(&str) -> Result<String>) -> Result<Figure> {
    Ok(Figure { file: format!("{file}.svg"), alt: title.to_owned(), svg: draw(title)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Summary;
    use crate::row::Load;

    fn rows() -> Vec<Row> {
        let times = |p50_us: f64| Summary {
            count: 100,
            p50_us,
            p99_us: p50_us * 1.5,
            max_us: 9.0,
            runs: 3,
            ..Summary::default()
        };
        let floor = Row {
            experiment: "floor".into(),
            path: "raw".into(),
            ipc: "tcp".into(),
            wait: "latency".into(),
            payload_bytes: 64,
            times: times(8.0),
            ..Row::default()
        };
        let call = Row {
            experiment: "invocation".into(),
            path: "remote".into(),
            ipc: "ring".into(),
            wait: "latency".into(),
            payload_bytes: 64,
            times: times(12.0),
            ..Row::default()
        };
        let paper = Row { experiment: "invocation_r100".into(), ..call.clone() };
        let place = Some("loopback".to_owned());
        let peer = Row { experiment: "peer".into(), ipc: "epoll".into(), place: place.clone(), ..floor.clone() };
        let beside = Row { experiment: "beside_peer".into(), place: place.clone(), ..call.clone() };
        let open = Load {
            connections: 1,
            kind: "open".into(),
            rate_due: Some(1e5),
            rate: 1e5,
            of_peak: Some(0.5),
            ..Load::default()
        };
        let closed = Load { kind: "closed".into(), rate: 2e5, rate_due: None, of_peak: None, ..open.clone() };
        let load = Row { experiment: "load".into(), place, ..call.clone() };
        let pipelined = Row { in_flight: Some(64), load: Some(closed), ..load.clone() };
        let load = Row { load: Some(open), ..load };
        let call = call.against("tcp", 8.0);
        let beside = beside.against("best_raw_tcp (epoll)", 8.0);
        vec![floor, call, paper, peer, beside, pipelined, load.against("one in flight", 12.0)]
    }

    #[test]
    fn b3_a_figure_that_misses_stands_with_what_limits_it() {
        let mut rows = rows();
        let open = rows.last_mut().unwrap();
        open.times.p99_us = 1e6;
        let page = compose(&rows, &Machine::look(vec!["praas-bench".into()]).unwrap()).unwrap().markdown();
        assert_eq!(page.matches("What limits").count(), 1);
        assert!(page.contains("1 met, 2 missed") && page.contains("What limits p99 at a given rate: "), "{page}");
    }

    #[test]
    fn b3_a_report_sets_figures_beside_the_published_and_judges_what_is_owed() {
        let page = compose(&rows(), &Machine::look(vec!["praas-bench".into()]).unwrap()).unwrap();
        let (html, markdown) = (page.html(), page.markdown());
        assert!(
            html.contains("2 met, 1 missed") && html.contains("not measured"),
            "64 in flight are below what is owed"
        );
        assert!(html.contains("published: praas_remote_mq") && html.contains("1.50 x"));
        assert!(!markdown.contains("What limits"), "nothing is known to limit that one");
        for picture in
            ["remote", "beside_latency_loopback", "load_p99_latency_64_loopback", "load_throughput_latency_64_loopback"]
        {
            assert!(markdown.contains(&format!("({picture}.svg)")), "{picture}");
        }
        assert!(page.figures().count() >= 3);
    }
}
