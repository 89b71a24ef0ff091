//! The paper's figures, as published: facts of another machine and another network, always shown with their
//! platform.

use crate::row::Row;

/// One published row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Published {
    pub(crate) system: String,
    pub(crate) platform: String,
    /// Direction or variant, in the published words.
    pub(crate) variant: String,
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
const IPC: &str = include_str!("../../results/paper/ipc.csv");
const STATE: &str = include_str!("../../results/paper/state.csv");
const STORAGE: &str = include_str!("../../results/paper/table1_storage.csv");

/// Invocations: local and remote of the prototype, Lambda, Knative, and the TCP round trip beside them.
pub(crate) fn invocations() -> Vec<Published> {
    parse(INVOCATIONS)
}

/// Ping-pong of two plain processes: POSIX queue and Unix stream socket.
pub(crate) fn ipc_floors() -> Vec<Published> {
    parse(IPC_FLOORS)
}

/// Messages between two processes: the prototype's, over Redis and over S3. Several rows for each, by variant.
pub(crate) fn ipc() -> Vec<Published> {
    parse(IPC)
}

/// How the variant begins whose time is the sender's whole round trip, its half as the paper reports it, and what of the whole the sender
/// spent polling.
pub(crate) const ROUND_TRIP: &str = "roundtrip_sender";
pub(crate) const HALF: &str = "one_way=sender_roundtrip/2";
pub(crate) const POLLING: &str = "receive_poll_time_sender";

/// The reduction: N invocations in a row, with state in the prototype, in Redis and in S3.
pub(crate) fn state() -> Vec<Published> {
    parse(STATE)
}

/// Table 1: one GET of an object put before, in Redis, DynamoDB and S3.
pub(crate) fn storage() -> Vec<Published> {
    parse(STORAGE)
}

impl Published {
    /// Invocations in a row and elements of each vector, of a row of [`state`].
    pub(crate) fn reduction(&self) -> Option<(u32, u32)> {
        let mut parts = self.variant.split(';');
        let invocations = parts.next()?.strip_prefix("invocations=")?.parse().ok()?;
        let elements = parts.next()?.strip_prefix("elements=")?.parse().ok()?;
        Some((invocations, elements))
    }
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
                variant: cells[3].to_owned(),
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
        "ipc" => ("ipc", row.via.clone().unwrap_or_default()),
        "state" => ("state", row.peer.clone().unwrap_or_else(|| "praas_rust_state".to_owned())),
        _ => ("invocations", format!("praas_rust_{}_{}", row.path, row.ipc)),
    };
    let mut variant = match row.experiment.as_str() {
        "floor" => "pingpong_roundtrip".to_owned(),
        "ipc" => ROUND_TRIP.to_owned(),
        "state" => match row.invocations {
            Some(invocations) => format!("invocations={invocations};elements={};total_time", row.payload_bytes / 8),
            None => row.op.clone().unwrap_or_default(),
        },
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

    /// What the paper reports of its messages is half of a round trip.
    #[test]
    fn published_messages_are_halves_of_published_round_trips() {
        let rows = ipc();
        let of = |variant: &str| rows.iter().filter(|row| row.variant.starts_with(variant)).collect::<Vec<_>>();
        assert_eq!((of(ROUND_TRIP).len(), of(HALF).len(), of(POLLING).len()), (15, 15, 10));
        for (whole, half) in of(ROUND_TRIP).iter().zip(of(HALF)) {
            assert_eq!((&whole.system, whole.payload_bytes), (&half.system, half.payload_bytes));
            assert!((whole.median_us / half.median_us - 2.0).abs() < 1e-4, "{whole:?}");
        }
    }

    #[test]
    fn published_reductions_are_25_cells_for_each_of_three_systems() {
        let rows = state();
        for system in ["praas_state", "redis", "s3"] {
            let mut cells: Vec<_> =
                rows.iter().filter(|row| row.system == system).filter_map(Published::reduction).collect();
            cells.sort_unstable();
            cells.dedup();
            assert_eq!(cells.len(), 25);
        }
        let of_s3 = storage().into_iter().find(|row| row.system == "s3" && row.payload_bytes == 1024).unwrap();
        assert_eq!(of_s3.median_us, 22_427.0);
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
