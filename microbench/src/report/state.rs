//! State, beside the published state: values put and got, and the reduction.

use anyhow::Result;

use super::{add_point, figure, rows_table};
use crate::page::{Section, Table};
use crate::plot::{self, Kind, Series, Vertical};
use crate::published::{self, Published};
use crate::row::Row;
use crate::size::Size;
use crate::table::{microseconds, what};

/// Systems with a published reduction.
const PUBLISHED: [&str; 3] = ["praas_state", "redis", "s3"];

/// Nothing when no state was measured.
pub(super) fn sections(rows: &[Row]) -> Result<Vec<Section>> {
    let of_state: Vec<&Row> = rows.iter().filter(|row| row.experiment == "state" && row.objects.is_none()).collect();
    let (reductions, values): (Vec<&Row>, Vec<&Row>) = of_state.into_iter().partition(|row| row.invocations.is_some());
    let mut sections = Vec::new();
    let beside_redis = |row: &&Row| row.experiment == "beside_redis" && row.path != "processes";
    let beside = rows.iter().filter(|row| row.experiment == "isolation" || beside_redis(row));
    let (beside_reductions, beside): (Vec<&Row>, Vec<&Row>) = beside.partition(|row| row.invocations.is_some());
    if !values.is_empty() {
        sections.extend(of_values(&values, &beside)?);
    }
    sections.extend(of_a_crowd(rows));
    if !reductions.is_empty() {
        sections.extend(of_reductions(&reductions, &beside_reductions)?);
    }
    Ok(sections)
}

/// A great many objects.
fn of_a_crowd(rows: &[Row]) -> Option<Section> {
    let is_of_it = |row: &&Row| {
        matches!(row.experiment.as_str(), "state_memory" | "state_versions" | "state_reads")
            || row.experiment == "state" && row.objects.is_some()
    };
    let of_it: Vec<&Row> = rows.iter().filter(is_of_it).collect();
    (!of_it.is_empty()).then(|| Section {
        heading: "State: a great many objects".to_owned(),
        paragraphs: vec![
            "Objects of 64 B under keys of 8 B: memory of controller and workers (shared pages counted once) for each besides its key and its \
             value; a get of any of them at random beside one of any of 1000; and what 100 000 versions of one object leave behind."
                .to_owned(),
        ],
        table: Some(rows_table(of_it.into_iter())),
        ..Section::default()
    })
}

fn of_values(rows: &[&Row], beside: &[&Row]) -> Result<Vec<Section>> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let point = (row.payload_bytes as f64, row.times.p50_us);
        add_point(&mut series, format!("{}, {}", what(row), row.wait), Kind::Ours, point);
    }
    let published = published::storage();
    for row in &published {
        // A logarithmic axis begins above nothing: 1 B is on it.
        let point = (row.payload_bytes as f64, row.median_us);
        add_point(&mut series, format!("published: {}, get", row.system), Kind::Published, point);
    }
    let header = ["system", "platform", "size", "count", "min", "p50", "mean", "p95", "p99", "max"];
    let mut table = Table { header: header.map(String::from).to_vec(), rows: Vec::new(), text_columns: 2 };
    for row in published {
        let mut cells = vec![format!("published: {}, {}", row.system, row.variant), row.platform.clone()];
        cells.extend([
            Size(usize::try_from(row.payload_bytes).unwrap_or(usize::MAX)).to_string(),
            row.count.to_string(),
        ]);
        cells.extend([row.min_us, row.median_us, row.mean_us].map(microseconds));
        cells.push(row.p95_us.map(microseconds).unwrap_or_default());
        cells.extend([row.p99_us, row.max_us].map(microseconds));
        table.rows.push(cells);
    }
    Ok(vec![
        Section {
            heading: "State: a value put, a value got".to_owned(),
            paragraphs: vec![
                "State of a process of ours: inside a function of it, which is who reads state. A get is p50 of 16 in a row, p99 and more of single ones \
                 with a read of the clock in each; a put stands on a cache-line ping-pong over two lines, a long one on a copy of its length."
                    .to_owned(),
                "State in Redis: one client, one value at a time. The floor is a raw TCP echo of the same size: it carries its bytes both ways, a value \
                 goes one way, so long values may take less than their floor. Lines with `redis` as their floor set ours beside it."
                    .to_owned(),
            ],
            figure: Some(figure("state_values", "A value put or got, over its size", |title| {
                plot::over_size(title, Vertical::Time, &series)
            })?),
            table: Some(rows_table(rows.iter().chain(beside).copied())),
            ..Section::default()
        },
        Section {
            paragraphs: vec![
                "The published storage (Table 1): one GET of an object put before, from a Lambda function in Python over a real network."
                    .to_owned(),
            ],
            table: Some(table),
            folded: true,
            ..Section::default()
        },
    ])
}

fn of_reductions(rows: &[&Row], beside: &[&Row]) -> Result<Vec<Section>> {
    let published = published::state();
    // One picture: as many invocations in a row as were measured at most.
    let most = rows.iter().filter_map(|row| row.invocations).max();
    let mut series: Vec<Series> = Vec::new();
    for row in rows.iter().filter(|row| row.invocations == most) {
        let bytes = row.payload_bytes as f64;
        add_point(&mut series, column(row), Kind::Ours, (bytes, row.times.p50_us));
        if let Some(p50_us) = row.floor_p50_us {
            add_point(
                &mut series,
                format!("floor: tcp, {}, of {}", row.wait, keeper(row)),
                Kind::Floor,
                (bytes, p50_us),
            );
        }
    }
    for row in published.iter().filter(|row| row.reduction().map(|(invocations, _)| invocations) == most) {
        let point = (row.payload_bytes as f64, row.median_us);
        add_point(&mut series, format!("published: {}", row.system), Kind::Published, point);
    }
    let title = format!("Reduction of {} vectors over their size", most.unwrap_or(0));
    let drawn = figure("state_reduction", &title, |title| plot::over_size(title, Vertical::Time, &series))?;
    Ok(vec![
        Section {
            heading: "State: the reduction".to_owned(),
            paragraphs: vec![
                "N invocations in a row, each adding a vector of E 64-bit numbers to the accumulator that is the state; a sample is all N, \
                 p50 in µs, with its ratio to the floor: as many raw TCP round trips of a vector. The result is checked after each sample."
                    .to_owned(),
                "Published: a client on EC2, a process on Fargate (one virtual CPU, 2 GB), Redis on EC2, a real network between all of them. \
                 Known about it: the published function compared bytes with elements and zeroed its accumulator each time; ours adds."
                    .to_owned(),
            ],
            figure: Some(drawn),
            table: Some(reduction_table(rows, &published)),
            ..Section::default()
        },
        Section {
            paragraphs: vec!["The measured cells in full:".to_owned()],
            table: Some(rows_table(rows.iter().chain(beside).copied())),
            folded: true,
            ..Section::default()
        },
    ])
}

/// p50 in µs and its ratio to the floor.
fn with_ratio(row: &Row) -> String {
    let ratio = row.ratio_p50.map(|ratio| format!(", {ratio:.2} x")).unwrap_or_default();
    microseconds(row.times.p50_us) + &ratio
}

fn keeper(row: &Row) -> &str {
    row.peer.as_deref().unwrap_or("praas")
}

fn column(row: &Row) -> String {
    format!("state in {}, {}", keeper(row), row.wait)
}

/// A line for each N and E, a column for each of ours and for each published system: p50 of all N in µs, and for ours the ratio to the floor.
fn reduction_table(rows: &[&Row], published: &[Published]) -> Table {
    let mut columns: Vec<String> = Vec::new();
    let mut cells: Vec<(u32, u64)> = Vec::new();
    for row in rows {
        let label = column(row);
        if !columns.contains(&label) {
            columns.push(label);
        }
        let cell = (row.invocations.unwrap_or(0), row.payload_bytes / 8);
        if !cells.contains(&cell) {
            cells.push(cell);
        }
    }
    cells.sort_unstable_by_key(|&(invocations, elements)| (elements, invocations));
    let mut header = vec!["E".to_owned(), "N".to_owned()];
    header.extend(columns.iter().cloned());
    header.extend(PUBLISHED.map(|system| {
        let platform = published.iter().find(|row| row.system == system).map_or("", |row| &row.platform);
        format!("published: {system}, {platform}")
    }));
    let line = |&(invocations, elements): &(u32, u64)| {
        let mut line = vec![elements.to_string(), invocations.to_string()];
        for label in &columns {
            let of_cell = |row: &&&Row| {
                (row.invocations, row.payload_bytes / 8) == (Some(invocations), elements) && &column(row) == label
            };
            let found = rows.iter().find(of_cell);
            line.push(found.map(|row| with_ratio(row)).unwrap_or_default());
        }
        for system in PUBLISHED {
            let of_cell = |row: &&Published| {
                row.system == system
                    && row.reduction().is_some_and(|(n, e)| (n, u64::from(e)) == (invocations, elements))
            };
            let found = published.iter().find(of_cell);
            line.push(found.map(|row| microseconds(row.median_us)).unwrap_or_default());
        }
        line
    };
    Table { header, rows: cells.iter().map(line).collect(), text_columns: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Page;
    use crate::recorder::Summary;

    fn row(op: &str, payload_bytes: u64, invocations: Option<u32>) -> Row {
        let row = Row {
            experiment: "state".into(),
            path: "remote".into(),
            ipc: "redis".into(),
            wait: "efficient".into(),
            op: Some(op.into()),
            peer: Some("redis".into()),
            payload_bytes,
            invocations,
            times: Summary { count: 100, p50_us: 250.0, ..Summary::default() },
            ..Row::default()
        };
        row.against("tcp", 50.0)
    }

    #[test]
    fn b3_state_stands_beside_the_published_with_its_platform_and_its_flaws() {
        let rows = [row("get", 1024, None), row("reduce", 80, Some(10)), row("reduce", 800_000, Some(10))];
        let text = Page { title: String::new(), sections: sections(&rows).unwrap() }.markdown();
        for said in [
            "state get, redis",
            "lambda-2GB-python3.10+redis7.4-on-EC2",
            "published: praas_state, EC2-client->fargate-1vCPU-2GB",
            "compared bytes with elements and zeroed its accumulator",
            // N = 10, E = 10: ours, and the three published medians.
            "| 250.0, 5.00 x | 7494 | 15425 | 230968 |",
            "(state_reduction.svg)",
        ] {
            assert!(text.contains(said), "{said}: {text}");
        }
        assert!(sections(&[]).unwrap().is_empty());
    }
}
