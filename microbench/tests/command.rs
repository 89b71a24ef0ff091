//! `praas-bench` as its users meet it: a command with rows, a report and exit codes.

use std::path::PathBuf;
use std::process::{Command, Output};

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

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_to_write() {
    for (arguments, expected) in [
        (&["floors", "--sizes", "7"][..], "8 B"),
        (&["floors", "--sizes", "1GB"], "KiB or MiB"),
        (&["invoke", "--via", "pigeon"], "exchange"),
        (&["invoke", "--in-flight", "97"], "2 to 96"),
        (&["invoke", "--in-flight", "1"], "2 to 96"),
        (&[], "floors"),
    ] {
        let done = bench(arguments);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}");
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(text.contains(expected), "{arguments:?}: {text}");
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
