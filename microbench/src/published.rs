//! The paper's figures, as published: facts of another machine and another network, always shown with their
//! platform.

use crate::row::Row;

/// One published row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Published {
    pub(crate) system: String,
    pub(crate) platform: String,
    pub(crate) payload_bytes: u64,
    pub(crate) count: u64,
    pub(crate) min_us: f64,
    pub(crate) median_us: f64,
    pub(crate) mean_us: f64,
    /// Not published for every system.
    pub(crate) p95_us: Option<f64>,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
}

/// The columns of every published table, and of those we write.
pub(crate) const COLUMNS: &str = "experiment,system,platform,direction_or_variant,payload_bytes,count,min_us,median_us,mean_us,p95_us,p99_us,max_us,source_file";

const INVOCATIONS: &str = include_str!("../../results/paper/invocations.csv");
const IPC_FLOORS: &str = include_str!("../../results/paper/ipc_microbenchmark.csv");

/// Invocations: local and remote of the prototype, Lambda, Knative, and the TCP round trip beside them.
pub(crate) fn invocations() -> Vec<Published> {
    parse(INVOCATIONS)
}

/// Ping-pong of two plain processes: POSIX queue and Unix stream socket.
pub(crate) fn ipc_floors() -> Vec<Published> {
    parse(IPC_FLOORS)
}

/// The published floor a published row stands on: two queue round trips of the same platform for a local
/// invocation, the TCP round trip for a remote one.
pub(crate) fn floor_us(row: &Published) -> Option<f64> {
    match row.system.as_str() {
        "praas_local_mq" => {
            let platform = if row.platform.contains("EC2") { "ec2" } else { "fargate" };
            let queue = ipc_floors().into_iter().find(|floor| {
                floor.system == "mq" && floor.platform == platform && floor.payload_bytes == row.payload_bytes
            })?;
            Some(2.0 * queue.median_us)
        }
        "praas_remote_mq" => {
            let tcp = invocations()
                .into_iter()
                .find(|floor| floor.system.starts_with("tcp_netperf") && floor.payload_bytes == row.payload_bytes)?;
            Some(tcp.median_us)
        }
        _ => None,
    }
}

fn parse(text: &str) -> Vec<Published> {
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(COLUMNS), "a published table has other columns");
    lines
        .map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            let number = |column: usize| cells[column].parse::<f64>().unwrap_or(f64::NAN);
            Published {
                system: cells[1].to_owned(),
                platform: cells[2].to_owned(),
                payload_bytes: cells[4].parse().unwrap_or(0),
                count: cells[5].parse().unwrap_or(0),
                min_us: number(6),
                median_us: number(7),
                mean_us: number(8),
                p95_us: cells[9].parse().ok(),
                p99_us: number(10),
                max_us: number(11),
            }
        })
        .collect()
}

/// One of our rows in the published columns.
pub(crate) fn line_of(row: &Row, platform: &str, source_file: &str) -> String {
    let (experiment, system) = match row.experiment.as_str() {
        "floor" => ("ipc_microbenchmark", row.ipc.clone()),
        _ => ("invocations", format!("praas_rust_{}_{}", row.path, row.ipc)),
    };
    let mut variant = match row.experiment.as_str() {
        "floor" => "pingpong_roundtrip".to_owned(),
        _ => "roundtrip_echo".to_owned(),
    };
    match row.experiment.as_str() {
        "invocation_r100" => variant += ";R=100",
        "invocation_r100_drop_first" => variant += ";R=100;first_dropped",
        _ => {}
    }
    variant += &format!(";wait={}", row.wait);
    if let Some(via) = &row.via {
        variant += &format!(";via={via}");
    }
    if row.touched == Some(false) {
        variant += ";untouched";
    }
    let times = &row.times;
    format!(
        "{experiment},{system},{platform},{variant},{},{},{:.3},{:.3},{:.3},{:.3},{:.3},{:.3},{source_file}",
        row.payload_bytes,
        times.count,
        times.min_us,
        times.p50_us,
        times.mean_us,
        times.p95_us,
        times.p99_us,
        times.max_us
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_rows_are_read_as_published() {
        let rows = invocations();
        assert_eq!(rows.len(), 35);
        let remote = rows.iter().find(|row| row.system == "praas_remote_mq" && row.payload_bytes == 10).unwrap();
        assert_eq!((remote.median_us, remote.count), (793.37, 100));
        let tcp = rows.iter().find(|row| row.system.starts_with("tcp_netperf")).unwrap();
        assert_eq!(tcp.p95_us, None);
    }

    /// 73.32 / (2 x 13.062): the 2.8 x the paper's own queues pay.
    #[test]
    fn published_ratios_stand_on_published_floors() {
        let local = invocations().into_iter().find(|row| row.platform == "fargate" && row.payload_bytes == 10).unwrap();
        let ratio = local.median_us / floor_us(&local).unwrap();
        assert!((ratio - 2.81).abs() < 0.01, "{ratio}");
    }

    #[test]
    fn our_rows_have_as_many_columns_as_the_published_ones() {
        let line = line_of(&Row::default(), "here", "rows.jsonl");
        assert_eq!(line.split(',').count(), COLUMNS.split(',').count());
    }
}
