//! `praas-bench` as its users meet it: a command with rows, a report and exit codes.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_praas-bench")).args(arguments).output().expect("praas-bench runs")
}

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("praas-bench-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a scratch folder");
    folder
}

/// B2: real processes, every message checked, one object a line with the promised names.
#[test]
fn b2_floors_write_one_checked_row_per_cell_and_a_report_is_made_of_them() {
    let folder = scratch("report");
    let rows = folder.join("rows.jsonl");
    let rows = rows.to_str().expect("UTF-8");
    let cells = ["--channels", "pipe,unix_stream,shared_copy,tcp,eventfd,futex", "--wait", "efficient"];
    let few = ["--sizes", "10,100KiB", "--repetitions", "50", "--runs", "2", "--json", rows];
    let done = bench(&[&["floors"], &cells[..], &few[..]].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = std::fs::read_to_string(rows).expect("rows");
    assert_eq!(text.lines().count(), 4 * 2 + 2);
    for line in text.lines() {
        let row: serde_json::Value = serde_json::from_str(line).expect("an object a line");
        assert_eq!(row["count"], 100);
        assert!(row["p50_us"].as_f64() > Some(0.0) && row["p999_us"].is_number() && row["ratio_p50"].is_null());
    }

    let out = folder.join("out");
    let report = || bench(&["report", "--rows", rows, "--out", out.to_str().expect("UTF-8")]);
    assert!(report().status.success());
    for file in ["report.html", "report.md", "machine.json", "ipc_microbenchmark.csv", "floors_efficient.svg"] {
        let text = std::fs::read_to_string(out.join(file)).expect(file);
        let here = env!("CARGO_MANIFEST_DIR");
        assert!(
            !text.contains(here) && !text.contains(folder.to_str().expect("UTF-8")),
            "{file} names a folder of ours"
        );
    }
    let again = report();
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("never overwritten"));
    std::fs::remove_dir_all(folder).expect("cleaned up");
}

/// B1, B3: each experiment of `scripts/reproduce`, at toy lengths: processes are started, every answer is checked, each row
/// stands beside its floor, and the rows make a report with the published figures in it.
#[test]
fn b1_b3_every_experiment_runs_and_its_rows_make_a_report_with_floors_and_published_figures() {
    let folder = scratch("experiments");
    let text = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
    let brief = ["--repetitions", "60", "--runs", "1", "--run-limit", "0.2"];
    let experiments: [&[&str]; 6] = [
        &[
            "invoke",
            "--path",
            "local",
            "--ipc",
            "ring",
            "--wait",
            "latency",
            "--via",
            "exchange,ring",
            "--sizes",
            "8,100KiB",
        ],
        &["invoke", "--path", "local", "--ipc", "mq", "--wait", "efficient", "--sizes", "10,100KiB"],
        &["invoke", "--path", "remote", "--ipc", "ring", "--wait", "efficient", "--sizes", "64,100KiB"],
        &["invoke", "--path", "local", "--wait", "latency", "--sizes", "8", "--in-flight", "96"],
        &["death", "--kills", "3"],
        &["idle", "--seconds", "1"],
    ];
    let mut rows = Vec::new();
    for (number, experiment) in experiments.into_iter().enumerate() {
        let file = text(folder.join(format!("{number}.jsonl")));
        let brief = if experiment[0] == "invoke" { &brief[..] } else { &[] };
        let done = bench(&[experiment, brief, &["--json", &file]].concat());
        assert!(done.status.success(), "{experiment:?}: {}", String::from_utf8_lossy(&done.stderr));
        for line in std::fs::read_to_string(&file).expect("rows").lines() {
            let row: serde_json::Value = serde_json::from_str(line).expect("an object a line");
            let timed = experiment[0] == "invoke" && !experiment.contains(&"--in-flight");
            assert!(!timed || row["ratio_p50"].as_f64() > Some(0.0), "no floor beside {line}");
        }
        rows.push(file);
    }
    let out = folder.join("out");
    let mut report = vec!["report", "--out", out.to_str().expect("UTF-8")];
    for file in &rows {
        report.extend(["--rows", file]);
    }
    let done = bench(&report);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let page = std::fs::read_to_string(out.join("report.html")).expect("report.html");
    assert!(
        page.contains("exchange") && page.to_lowercase().contains("published"),
        "own or published figures are missing"
    );
    assert!(page.to_lowercase().contains("fargate"), "the published figures stand without their platform");
    std::fs::remove_dir_all(folder).expect("cleaned up");
}

fn rows_of(arguments: &[&str]) -> (Vec<serde_json::Value>, Output) {
    let done = bench(&[arguments, &["--json", "-"]].concat());
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let rows = text.lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect();
    (rows, done)
}

/// B2, B3: every peer answers, messages long and short, and our call stands beside each of them and the fastest raw one.
#[test]
fn b3_a_remote_call_stands_beside_every_peer_and_the_fastest_raw_one() {
    let brief = ["--repetitions", "40", "--runs", "1", "--run-limit", "0.01"];
    for (wait, sizes, peers) in [("efficient", "64,100KiB", 7), ("latency", "64", 9)] {
        if wait == "latency" && std::thread::available_parallelism().map_or(1, usize::from) < 2 {
            println!("skipped: needs two cores");
            continue;
        }
        let (rows, _) = rows_of(&[&["peers", "--wait", wait, "--sizes", sizes], &brief[..]].concat());
        let of = |experiment: &str| rows.iter().filter(|row| row["experiment"] == experiment).collect::<Vec<_>>();
        let sizes = sizes.split(',').count();
        assert_eq!(of("peer").len(), sizes * peers, "{wait}");
        assert!(of("peer").iter().all(|row| row["count"].as_u64() >= Some(40) && row["p50_us"].as_f64() > Some(0.0)));
        let beside = of("beside_peer");
        assert_eq!(beside.len(), sizes * (peers + 1));
        assert!(beside.iter().all(|row| row["ratio_p50"].as_f64() > Some(0.0) && row["reactor"].is_string()));
        let floors =
            beside.iter().filter(|row| row["floor"].as_str().is_some_and(|floor| floor.starts_with("best_raw_tcp (")));
        assert!(
            floors.clone().count() == sizes && floors.clone().any(|row| row["verdict"].is_string()),
            "64 B is owed"
        );
    }
}

/// B3: a process for each reactor asked for; io_uring stands beside epoll, and what the process chose beside the faster.
#[test]
fn b3_reactors_stand_beside_each_other_in_one_run() {
    let ours = ["peers", "--wait", "efficient", "--sizes", "64", "--peers", "epoll", "--reactor", "auto,uring,epoll"];
    let (rows, done) = rows_of(&[&ours[..], &["--repetitions", "40", "--runs", "1"]].concat());
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let pairs: Vec<_> = rows.iter().filter(|row| row["experiment"] == "reactors").collect();
    let with =
        |reactor: &str| pairs.iter().find(|row| row["reactor"].as_str().is_some_and(|text| text.starts_with(reactor)));
    let auto = with("auto: ").expect("the automatic choice");
    assert!(auto["floor"].as_str().is_some_and(|floor| floor.starts_with("the faster reactor (")), "{auto}");
    if let Some(skipped) = said.lines().find(|line| line.starts_with("skipped: reactor uring")) {
        return println!("{skipped}");
    }
    let uring = with("uring").expect("io_uring");
    assert!(uring["floor"] == "reactor epoll" && uring["verdict"].is_string(), "{uring}");
}

/// B3: plain text and keys with checksums take turns in one run; a local call has neither.
#[test]
fn b3_checks_stand_beside_plain_text_in_one_run() {
    let ours = ["invoke", "--wait", "efficient", "--sizes", "64,300KiB", "--repetitions", "60", "--runs", "1"];
    let (rows, _) = rows_of(&[&ours[..], &["--path", "remote", "--checks", "off,on"]].concat());
    assert_eq!(rows.len(), 2 * 2);
    for pair in rows.chunks(2) {
        assert!(pair.iter().all(|row| row["experiment"] == "checks" && row["count"].as_u64() >= Some(60)), "{pair:?}");
        assert_eq!((&pair[0]["checks"], &pair[1]["checks"]), (&"off".into(), &"on".into()));
        assert!(pair[0]["ratio_p50"].is_null() && pair[0]["verdict"].is_null());
        assert!(pair[1]["ratio_p50"].as_f64() > Some(0.0) && pair[1]["verdict"].is_string());
        assert_eq!(pair[1]["floor"], "without checks");
    }
    let (rows, _) = rows_of(&[&ours[..], &["--path", "local,remote", "--checks", "on"]].concat());
    let checks: Vec<_> = rows.iter().map(|row| (row["path"].as_str(), row["checks"].as_str())).collect();
    let [local, remote] = [(Some("local"), None), (Some("remote"), Some("on"))];
    assert_eq!(checks, [local, local, remote, remote]);
    assert!(rows.iter().all(|row| row["experiment"] == "invocation" && row["ratio_p50"].as_f64() > Some(0.0)));
}

/// B2, B3: a closed and an open loop over several connections, on ours and on a raw peer; the rows tell what was due, what came
/// of it and what it cost, and make pictures.
#[test]
fn b3_a_load_tells_what_was_due_what_came_of_it_and_what_it_cost() {
    let folder = scratch("load");
    let file = folder.join("rows.jsonl");
    let file = file.to_str().expect("UTF-8");
    let load = ["load", "--wait", "efficient", "--connections", "3", "--in-flight", "4", "--rates", "20%,50%"];
    let brief = ["--sizes", "64", "--seconds", "0.1", "--runs", "1", "--peers", "epoll", "--json", file];
    let done = bench(&[&load[..], &brief[..]].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = std::fs::read_to_string(file).expect("rows");
    let rows: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    for path in ["remote", "raw"] {
        let mine: Vec<_> = rows.iter().filter(|row| row["path"] == path).collect();
        let closed: Vec<_> = mine.iter().filter(|row| row["loop"] == "closed").collect();
        let open: Vec<_> = mine.iter().filter(|row| row["loop"] == "open").collect();
        assert_eq!((closed.len(), open.len() >= 2), (2, true), "one in flight and 3 x 4; two rates");
        assert!(closed.iter().all(|row| row["rate"].as_f64() > Some(0.0) && row["client_cpu_us"].as_f64() > Some(0.0)));
        for row in &open {
            let (due, rate) = (row["rate_due"].as_f64().expect("due"), row["rate"].as_f64().expect("rate"));
            let answered = row["count"].as_u64().expect("count") as f64 / 0.1;
            // Arrivals are random: some tens of a few hundred calls more or less.
            assert!(rate > 0.0 && (answered / due - 1.0).abs() < 0.5, "{row}");
            assert_eq!(row["floor"], "one in flight");
        }
    }
    assert!(
        rows.iter()
            .any(|row| row["path"] == "remote" && row["of_peak"].as_f64().is_some_and(|of| (of - 0.5).abs() < 0.01))
    );
    let out = folder.join("out");
    let report = bench(&["report", "--rows", file, "--out", out.to_str().expect("UTF-8")]);
    assert!(report.status.success(), "{}", String::from_utf8_lossy(&report.stderr));
    for picture in ["load_p50", "load_p99", "load_p999", "load_throughput"] {
        let picture = std::fs::read_to_string(out.join(format!("{picture}_efficient_64_loopback.svg"))).expect(picture);
        assert!(picture.contains("peer epoll") && picture.contains("remote ring"));
    }
    std::fs::remove_dir_all(folder).expect("cleaned up");
}

/// Calls between two network namespaces, and nothing of them left behind.
#[test]
fn calls_cross_namespaces_that_are_gone_afterwards() {
    let links = || std::fs::read_to_string("/proc/net/dev").expect("links of this host").lines().count();
    let before = links();
    let arguments =
        ["peers", "--place", "netns", "--wait", "efficient", "--sizes", "64", "--peers", "blocking,uring,http"];
    let done = bench(&[&arguments[..], &["--repetitions", "40", "--runs", "1", "--json", "-"]].concat());
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    if said.contains("skipped: ") {
        return println!("{}", said.lines().find(|line| line.starts_with("skipped: ")).unwrap_or_default());
    }
    assert!(done.status.success(), "{said}");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(text.lines().count() >= 3 && text.lines().all(|line| line.contains("\"place\":\"netns\"")), "{text}");
    assert_eq!(links(), before);
}

/// Silent connections are counted, answer in the end, and stand beside a busy one.
#[test]
fn b3_silent_connections_have_a_price_each_and_a_busy_one_beside_them() {
    let (rows, _) = rows_of(&["idle-connections", "--connections", "50", "--runs", "1", "--repetitions", "200"]);
    assert_eq!(rows.len(), 3);
    assert!(rows[0]["unit"] == "KiB each" && rows[0]["value"].as_f64() >= Some(0.0) && rows[0]["silent"] == 50);
    assert!(rows[2]["floor"] == "without them" && rows[2]["ratio_p50"].as_f64() > Some(0.0));
}

/// Whether `praas-bench` can start a Redis of its own here; says so when not.
fn has_redis() -> bool {
    let found = Command::new("redis-server").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let found = found.is_ok_and(|status| status.success());
    if !found {
        println!("skipped: needs redis-server");
    }
    found
}

/// B2, B3: messages and state over Redis, each row beside its floor, and a report of them beside the published ones.
#[test]
fn b2_b3_messages_and_state_over_redis_are_checked_and_stand_beside_their_floors_and_the_published() {
    if !has_redis() {
        return;
    }
    let folder = scratch("redis");
    let brief = ["--wait", "efficient", "--repetitions", "20", "--runs", "2", "--run-limit", "0.01"];
    let ipc = ["ipc", "--via", "redis-poll,redis-block", "--sizes", "10,100KiB"];
    let (rows, _) = rows_of(&[&ipc[..], &brief[..]].concat());
    assert_eq!(rows.len(), 2 * 2);
    for row in &rows {
        assert!(row["experiment"] == "ipc" && row["op"] == "send_recv" && row["floor"] == "tcp", "{row}");
        assert!(row["count"].as_u64() >= Some(40) && row["ratio_p50"].as_f64() > Some(0.0) && row["runs"] == 2);
        // As published, small messages are mostly pauses; somebody who is told needs none.
        let paused = row["p50_us"].as_f64() >= Some(1000.0);
        assert!(row["payload_bytes"] != 10 || paused == (row["via"] == "redis-poll"), "{row}");
    }
    let state = ["state", "--peer", "redis", "--sizes", "10,100KiB", "--invocations", "1,10", "--elements", "10,1000"];
    let (state, _) = rows_of(&[&state[..], &brief[..]].concat());
    assert_eq!(state.len(), 2 + 2 + 2 * 2);
    for row in &state {
        assert!(
            row["experiment"] == "state" && row["peer"] == "redis" && row["ratio_p50"].as_f64() > Some(0.0),
            "{row}"
        );
    }
    let reductions: Vec<_> = state.iter().filter(|row| row["op"] == "reduce").collect();
    let cells: Vec<_> =
        reductions.iter().map(|row| (row["payload_bytes"].as_u64(), row["invocations"].as_u64())).collect();
    assert_eq!(cells, [(80, 1), (80, 10), (8000, 1), (8000, 10)].map(|(bytes, n)| (Some(bytes), Some(n))));

    let file = folder.join("rows.jsonl");
    let lines: Vec<String> = rows.iter().chain(&state).map(ToString::to_string).collect();
    std::fs::write(&file, lines.join("\n")).expect("rows");
    let out = folder.join("out");
    let done = bench(&["report", "--rows", file.to_str().expect("UTF-8"), "--out", out.to_str().expect("UTF-8")]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let page = std::fs::read_to_string(out.join("report.md")).expect("report.md");
    for said in ["published: praas_put_get", "published: praas_state", "slept for 1, 2, 3", "redis on EC2"] {
        assert!(page.contains(said), "{said}");
    }
    for (file, lines) in [("ipc.csv", 1 + 4), ("state.csv", 1 + 8)] {
        assert_eq!(std::fs::read_to_string(out.join(file)).expect(file).lines().count(), lines, "{file}");
    }
    std::fs::remove_dir_all(folder).expect("cleaned up");
}

/// B2, B3: messages between two processes and inside one, every answer checked, each beside its floor.
#[test]
fn b3_messages_of_ours_go_between_two_processes_and_inside_one() {
    let ours = [
        "ipc",
        "--via",
        "tcp,self",
        "--wait",
        "efficient",
        "--sizes",
        "10,64KiB",
        "--repetitions",
        "50",
        "--runs",
        "1",
    ];
    let (rows, _) = rows_of(&ours);
    let seen: Vec<_> =
        rows.iter().map(|row| (row["via"].as_str(), row["path"].as_str(), row["verdict"].is_string())).collect();
    let [tcp, own] = [(Some("tcp"), Some("processes"), true), (Some("self"), Some("local"), false)];
    assert_eq!(seen, [tcp, tcp, own, own]);
    assert!(rows.iter().all(|row| row["count"].as_u64() >= Some(50) && row["ratio_p50"].as_f64() > Some(0.0)));
}

/// B2, B3: state inside a function, in every way it is measured.
#[test]
fn b3_state_is_measured_inside_a_function() {
    let brief = ["--wait", "efficient", "--repetitions", "400", "--runs", "1", "--run-limit", "0.05"];
    let state = |more: &[&str]| rows_of(&[&["state"], more, &brief[..]].concat()).0;
    let rows = state(&["--sizes", "64,100KiB", "--invocations", "3", "--elements", "10,1000"]);
    let ops: Vec<_> = rows.iter().map(|row| row["op"].as_str().expect("an op")).collect();
    let each = ["get", "put", "put_in_place", "get_typed", "put_typed", "reduce"];
    assert_eq!(ops, each.iter().flat_map(|op| [*op, *op]).collect::<Vec<_>>());
    for row in &rows {
        let has_floor = !row["op"].as_str().is_some_and(|op| op.starts_with("get"));
        assert!(row["count"].as_u64() > Some(0) && row["p50_us"].as_f64() > Some(0.0), "{row}");
        assert_eq!(row["ratio_p50"].as_f64() > Some(0.0), has_floor, "{row}");
    }
    let rows = state(&["--op", "put", "--isolate", "off,on", "--sizes", "64"]);
    let last = rows.last().expect("a row");
    assert!(last["experiment"] == "isolation" && last["floor"] == "without isolation", "{last}");
    let rows = state(&["--contended", "--sizes", "64,4KiB"]);
    assert!(
        rows.len() == 2 && rows.iter().all(|row| row["contended"] == true && row["verdict"].is_string()),
        "{rows:?}"
    );
    let rows = state(&["--objects", "3000"]);
    let experiments: Vec<_> = rows.iter().map(|row| row["experiment"].as_str().expect("a name")).collect();
    assert_eq!(experiments, ["state", "state", "state_reads", "state_memory", "state_versions"]);
    let owed = rows[1..].iter().filter(|row| row["experiment"] != "state_reads");
    assert!(owed.clone().count() == 3 && owed.clone().all(|row| row["verdict"].is_string()), "{rows:?}");
}

/// B3: what is ours stands beside the same over Redis, in one run.
#[test]
fn b3_ours_stands_beside_redis_in_one_run() {
    if !has_redis() {
        return;
    }
    let brief = ["--wait", "efficient", "--repetitions", "50", "--runs", "1", "--run-limit", "0.05"];
    for command in [
        &["ipc", "--via", "tcp,redis-block", "--sizes", "10"][..],
        &["state", "--op", "put", "--beside", "redis", "--sizes", "64"],
    ] {
        let (rows, _) = rows_of(&[command, &brief[..]].concat());
        let last = rows.last().expect("a row");
        assert!(rows.len() == 3 && last["experiment"] == "beside_redis" && last["verdict"].is_string(), "{rows:?}");
    }
}

/// B3: messages over shared memory stand beside a futex round trip, beside the same over TCP, and each size beside 64 B.
#[test]
fn b3_messages_over_shared_memory_stand_beside_tcp_and_their_own_size() {
    let brief = ["--wait", "efficient", "--repetitions", "50", "--runs", "1", "--run-limit", "0.05"];
    let (rows, _) = rows_of(&[&["ipc", "--via", "tcp,shm", "--sizes", "64,100KiB"][..], &brief[..]].concat());
    let found: Vec<_> =
        rows.iter().map(|row| (row["experiment"].as_str(), row["via"].as_str(), row["floor"].as_str())).collect();
    let expected = [
        ("ipc", "tcp", "tcp"),
        ("ipc", "tcp", "tcp"),
        ("ipc", "shm", "futex"),
        ("ipc", "shm", "futex"),
        ("beside_tcp", "shm", "tcp"),
        ("beside_tcp", "shm", "tcp"),
        ("ipc_flat", "shm", "64 B"),
    ];
    assert_eq!(found, expected.map(|(experiment, via, floor)| (Some(experiment), Some(via), Some(floor))));
    assert!(rows[4..6].iter().all(|row| row["verdict"].is_string()), "{rows:?}");
}

#[test]
fn without_redis_what_needs_it_is_skipped_and_says_so() {
    for experiment in [
        &["ipc", "--via", "redis-block,redis-poll", "--wait", "efficient"][..],
        &["state", "--peer", "redis", "--wait", "efficient"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_praas-bench"));
        let done = command.args(experiment).args(["--json", "-"]).env("PATH", "").output().expect("praas-bench runs");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success() && done.stdout.is_empty(), "{said}");
        assert!(
            said.lines().all(|line| line.starts_with("skipped: ") && line.contains("needs redis-server")),
            "{said}"
        );
    }
}

/// A Redis that somebody else runs, for a test.
struct SomebodysRedis {
    server: std::process::Child,
    port: u16,
}

impl SomebodysRedis {
    fn start() -> Self {
        let port =
            std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        let server = command.current_dir(std::env::temp_dir()).stdout(Stdio::null()).spawn().expect("redis-server");
        let redis = Self { server, port };
        let until = Instant::now() + Duration::from_secs(10);
        while redis.ask("PING").is_none() {
            assert!(Instant::now() < until, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        redis
    }

    /// The first line of its answer.
    fn ask(&self, command: &str) -> Option<String> {
        use std::io::{BufRead, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        write!(stream, "{command}\r\n").ok()?;
        let mut line = String::new();
        std::io::BufReader::new(stream).read_line(&mut line).ok()?;
        (!line.is_empty()).then(|| line.trim().to_owned())
    }
}

impl Drop for SomebodysRedis {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[test]
fn somebody_elses_redis_is_used_as_it_is_and_finds_nothing_of_ours_afterwards() {
    if !has_redis() {
        return;
    }
    let redis = SomebodysRedis::start();
    assert_eq!(redis.ask("SET theirs kept").as_deref(), Some("+OK"));
    let there = format!("127.0.0.1:{}", redis.port);
    let brief = ["--wait", "efficient", "--repetitions", "10", "--runs", "1", "--run-limit", "0.01", "--redis", &there];
    let (ipc, _) = rows_of(&[&["ipc", "--via", "redis-block,redis-poll", "--sizes", "10"], &brief[..]].concat());
    let state = ["state", "--peer", "redis", "--sizes", "10", "--invocations", "2", "--elements", "10"];
    let (state, _) = rows_of(&[&state[..], &brief[..]].concat());
    for row in ipc.iter().chain(&state) {
        assert!(row["placement"].as_str().is_some_and(|text| text.ends_with("Redis where it was")), "{row}");
    }
    assert_eq!(redis.ask("DBSIZE").as_deref(), Some(":1"));
    let nowhere = bench(&["ipc", "--via", "redis-block", "--redis", "nowhere"]);
    let said = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert!(nowhere.status.code() == Some(1) && said.contains("write HOST:PORT"), "{said}");
}

/// The pid of the child of a running benchmark that has this name, once there is one.
fn child_named(bench: &std::process::Child, name: &str) -> String {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", bench.id())).unwrap_or_default();
        let named =
            |pid: &&str| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
        if let Some(pid) = children.split_whitespace().find(named) {
            return pid.to_owned();
        }
        assert!(Instant::now() < until, "no {name}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_gone_within(pid: &str, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return true;
        }
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A benchmark of messages that goes on for minutes, once its Redis and its second process are there.
fn long_exchange() -> (std::process::Child, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_praas-bench"));
    command.args(["ipc", "--via", "redis-block", "--wait", "efficient", "--sizes", "10", "--run-limit", "60"]);
    let bench = command.args(["--repetitions", "10000000"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let bench = bench.expect("praas-bench runs");
    let redis = child_named(&bench, "redis-server");
    child_named(&bench, "praas-bench");
    std::thread::sleep(Duration::from_millis(300));
    (bench, redis)
}

#[test]
fn a_benchmark_that_is_killed_leaves_no_redis_behind() {
    if !has_redis() {
        return;
    }
    let (mut bench, redis) = long_exchange();
    bench.kill().expect("SIGKILL");
    bench.wait().expect("it ends");
    assert!(is_gone_within(&redis, Duration::from_secs(10)), "redis-server outlives its benchmark");
}

#[test]
fn a_redis_that_dies_is_an_error_and_no_silence() {
    if !has_redis() {
        return;
    }
    let (bench, redis) = long_exchange();
    assert!(Command::new("kill").args(["-KILL", &redis]).status().expect("kill").success());
    let done = bench.wait_with_output().expect("it ends");
    assert_eq!(done.status.code(), Some(1));
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    // Whichever of the two processes sees it first.
    assert!(said.contains("error: ") && said.to_lowercase().contains("connection"), "{said}");
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_to_write() {
    for (arguments, expected) in [
        (&["floors", "--sizes", "7"][..], "8 B"),
        (&["floors", "--sizes", "1GB"], "KiB or MiB"),
        (&["invoke", "--via", "pigeon"], "exchange"),
        (&["ipc", "--via", "pigeon"], "tcp, shm, self, redis-poll, redis-block"),
        (&["state", "--contended", "--peer", "redis"], "cannot be used with"),
        (&["state", "--objects", "10"], "2000..="),
        (&["state", "--peer", "paper"], "redis"),
        (&["state", "--op", "reduce", "--elements", "0"], "1..="),
        (&["invoke", "--in-flight", "97"], "2 to 96"),
        (&["invoke", "--in-flight", "1"], "2 to 96"),
        (&["invoke", "--reactor", "steam"], "uring"),
        (&["load", "--rates", "0%"], "150%"),
        (&["load", "--rate", "100", "--rates", "50%"], "cannot be used with"),
        (&["load", "--peers", "http"], "blocking, epoll, uring"),
        (&["load", "--connections", "0"], "1..="),
        (&["peers", "--place", "moon"], "netns"),
        (&[], "floors"),
    ] {
        let done = bench(arguments);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}");
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(text.contains(expected), "{arguments:?}: {text}");
    }
}

/// A benchmark that was killed left its process running, and with it the port and the namespace.
#[test]
fn a_benchmark_that_is_killed_leaves_no_process_behind() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_praas-bench"));
    command.args(["load", "--wait", "efficient", "--seconds", "60", "--peers", "none"]);
    let mut bench = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("praas-bench runs");
    let until = Instant::now() + Duration::from_secs(10);
    let under_test = loop {
        assert!(Instant::now() < until, "no process under test");
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", bench.id())).unwrap_or_default();
        let is_process = |pid: &&str| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "praas-process")
        };
        // Its keeper is there once the process serves.
        if children.split_whitespace().count() >= 2
            && let Some(pid) = children.split_whitespace().find(is_process)
        {
            break pid.to_owned();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    std::thread::sleep(Duration::from_millis(100));
    bench.kill().expect("SIGKILL");
    bench.wait().expect("it ends");
    let is_alive = || {
        let stat = std::fs::read_to_string(format!("/proc/{under_test}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    };
    while is_alive() {
        assert!(Instant::now() < until, "the process under test outlives its benchmark");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn rows_that_are_not_there_are_one_clear_line() {
    let done = bench(&["report", "--rows", "no-such-rows.jsonl", "--out", "nowhere"]);
    assert_eq!(done.status.code(), Some(1));
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(text.starts_with("error: read no-such-rows.jsonl") && text.lines().count() == 1, "{text}");
}

/// Started by hand, the hidden halves say so and do nothing.
#[test]
fn the_second_process_of_a_floor_is_not_started_by_hand() {
    let done = bench(&["floor-peer"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("started by praas-bench itself"));
}
