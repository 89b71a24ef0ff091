//! Messages between two processes, beside the published ones.

use anyhow::Result;

use super::{add_point, figure, rows_table};
use crate::page::{Section, Table};
use crate::plot::{self, Kind, Series, Vertical};
use crate::published::{self, HALF, POLLING, Published, ROUND_TRIP};
use crate::row::Row;
use crate::size::Size;
use crate::table::{microseconds, what};

/// Nothing when no messages were measured.
pub(super) fn sections(rows: &[Row]) -> Result<Vec<Section>> {
    let ours: Vec<&Row> = rows.iter().filter(|row| row.experiment == "ipc").collect();
    if ours.is_empty() {
        return Ok(Vec::new());
    }
    // Ours by the p50 of Redis.
    let beside = rows.iter().filter(|row| match row.experiment.as_str() {
        "beside_redis" => row.path == "processes",
        experiment => matches!(experiment, "beside_tcp" | "ipc_flat"),
    });
    let mut series: Vec<Series> = Vec::new();
    for row in &ours {
        let point = (row.payload_bytes as f64, row.times.p50_us);
        add_point(&mut series, format!("{}, {}", what(row), row.wait), Kind::Ours, point);
    }
    for row in &ours {
        if let (Some(floor), Some(p50_us)) = (&row.floor, row.floor_p50_us) {
            let label = format!("floor: {floor}, {}", row.wait);
            let drawn = series.iter().find(|one| one.label == label);
            // Each way has a floor of its own run: one of them is drawn.
            if !drawn.is_some_and(|one| one.points.iter().any(|point| point.0 == row.payload_bytes as f64)) {
                add_point(&mut series, label, Kind::Floor, (row.payload_bytes as f64, p50_us));
            }
        }
    }
    let published = published::ipc();
    for row in published.iter().filter(|row| row.variant == ROUND_TRIP) {
        let point = (row.payload_bytes as f64, row.median_us);
        add_point(&mut series, format!("published: {}", row.system), Kind::Published, point);
    }
    Ok(vec![
        Section {
            heading: "Messages between two processes".to_owned(),
            paragraphs: vec![
                "A message to another process and its answer, as the sender saw it: whole round trips, the published ones, too, of which the \
                 paper reports half. `tcp`: between functions of two processes of ours, over loopback, sent when the mailbox of the other has confirmed it; \
                 `shm`: the same over memory that the two share; \
                 `self`: between two workers of one, over rings. `redis-poll` does as the paper's did: the receiver looks, and pauses for 1, 2, 3 … ms between looks. \
                 `redis-block` is told as soon as there is a message, which is what Redis can do."
                    .to_owned(),
            ],
            figure: Some(figure("ipc", "Message and answer between two processes over message size", |title| {
                plot::over_size(title, Vertical::Time, &series)
            })?),
            table: Some(rows_table(ours.into_iter().chain(beside))),
            ..Section::default()
        },
        Section {
            paragraphs: vec![
                "The published messages. Each process ran on Fargate (one virtual CPU, 2 GB), with a real network between them and to Redis. \
                 Known about them: receivers over Redis and S3 slept for 1, 2, 3 … ms between polls, so 10 B over Redis is mostly sleeping, \
                 as the time spent polling says."
                    .to_owned(),
            ],
            table: Some(published_table(&published)),
            ..Section::default()
        },
    ])
}

/// A line for each published round trip, with its half, which is what the paper reports.
fn published_table(published: &[Published]) -> Table {
    let header = [
        "system",
        "platform",
        "size",
        "count",
        "p50, round trip",
        "p50, half of it: as the paper reports",
        "p50, of it polling",
        "p99",
        "max",
    ];
    let mut table = Table { header: header.map(String::from).to_vec(), rows: Vec::new(), text_columns: 2 };
    for row in published.iter().filter(|row| row.variant == ROUND_TRIP) {
        let same = |other: &&Published| (&other.system, other.payload_bytes) == (&row.system, row.payload_bytes);
        let median_of = |variant: &str| {
            let found = published.iter().filter(same).find(|other| other.variant.starts_with(variant));
            found.map(|other| microseconds(other.median_us)).unwrap_or_default()
        };
        table.rows.push(vec![
            format!("published: {}", row.system),
            row.platform.clone(),
            Size(usize::try_from(row.payload_bytes).unwrap_or(usize::MAX)).to_string(),
            row.count.to_string(),
            microseconds(row.median_us),
            median_of(HALF),
            median_of(POLLING),
            microseconds(row.p99_us),
            microseconds(row.max_us),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Page;
    use crate::recorder::Summary;

    #[test]
    fn b3_messages_stand_beside_the_published_with_their_platform_and_their_flaw() {
        let row = Row {
            experiment: "ipc".into(),
            path: "processes".into(),
            ipc: "redis".into(),
            wait: "efficient".into(),
            op: Some("send_recv".into()),
            via: Some("redis-block".into()),
            payload_bytes: 10,
            times: Summary { count: 100, p50_us: 25.0, ..Summary::default() },
            ..Row::default()
        };
        let page = Page { title: String::new(), sections: sections(&[row.against("tcp", 5.0)]).unwrap() };
        let text = page.markdown();
        for said in [
            "message and answer via redis-block",
            "5.00 x",
            "fargate<->fargate 1vCPU 2GB; redis on EC2",
            "as the paper reports",
            "slept for 1, 2, 3",
            // 10 B over Redis: round trip, half, polling.
            "| 5783 | 2892 | 5117 |",
        ] {
            assert!(text.contains(said), "{said}: {text}");
        }
        assert!(sections(&[]).unwrap().is_empty());
    }
}
