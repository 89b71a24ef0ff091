//! Runs every example as its text says, and looks at what it prints.

use std::net::TcpListener;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use praas_dataplane::launch::program_beside_us;
use praas_dataplane::{Ipc, LaunchConfig, LocalProcess};

/// `praas-process` belongs to another package, so cargo builds it for us only when the whole workspace is tested.
fn process_program() -> std::path::PathBuf {
    program_beside_us("praas-process").unwrap_or_else(|| {
        let here = std::env::current_exe().unwrap_or_default();
        panic!(
            "no praas-process in the folder above {}: build it with `cargo build -p praas-dataplane`{}",
            here.display(),
            if cfg!(debug_assertions) { "" } else { ", --release as for this test" },
        )
    })
}

fn start(worker: &str, workers: u8, workers_max: u8) -> LocalProcess {
    let config = LaunchConfig {
        process_binary: Some(process_program()),
        worker: vec![worker.into()],
        workers,
        workers_max,
        ipc: Ipc::Ring,
        ..LaunchConfig::default()
    };
    LocalProcess::start(&config).expect("the process starts")
}

/// Runs a client to its end and returns what it printed.
fn run(client: &str, args: &[&str]) -> String {
    let output = Command::new("timeout").arg("60").arg(client).args(args).output().expect("timeout(1) runs");
    text(&output)
}

fn text(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A child that is killed when the test ends, however it ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn hello_greets_with_the_commands_of_the_readme() {
    // A port that was free a moment ago.
    let address =
        TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").to_string();
    let mut command = Command::new(process_program());
    command.args(["--worker", env!("CARGO_BIN_EXE_hello-worker"), "--listen", &address]);
    // As in a shell with `&`: the client starts before the process listens.
    let _process = Killed(command.stdout(std::process::Stdio::null()).spawn().expect("it starts"));
    assert_eq!(run(env!("CARGO_BIN_EXE_hello-client"), &[&address]), "Hello, world!\n");
}

#[test]
fn hello_worker_and_client_have_thirty_lines_of_code_together() {
    let sources = [include_str!("../hello/worker.rs"), include_str!("../hello/client.rs")];
    let is_code = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with("//");
    let lines: usize = sources.iter().map(|source| source.lines().filter(is_code).count()).sum();
    assert!(lines <= 30, "{lines} lines of code");
}

#[test]
fn p10_power_gives_its_result_with_enough_workers_and_a_refusal_with_fewer() {
    let client = env!("CARGO_BIN_EXE_power-client");
    let enough = start(env!("CARGO_BIN_EXE_power-worker"), 2, 11);
    assert_eq!(run(client, &[&enough.addr().to_string()]), "2^10 = 1024\n");
    drop(enough);
    let few = start(env!("CARGO_BIN_EXE_power-worker"), 2, 4);
    let printed = run(client, &[&few.addr().to_string(), "2", "10"]);
    assert!(printed.contains("2^10 has no result, status -1: ") && printed.contains("busy"), "{printed}");
    assert!(printed.ends_with("2^1 = 2\n"), "{printed}");
    let begun = Instant::now();
    assert_eq!(run(client, &[&few.addr().to_string(), "3", "3"]), "3^3 = 27\n");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn echo_answers_ten_thousand_calls_and_a_large_one() {
    let process = start(env!("CARGO_BIN_EXE_echo-worker"), 2, 2);
    let printed = run(env!("CARGO_BIN_EXE_echo-client"), &[&process.addr().to_string()]);
    assert!(printed.starts_with("10000 calls echoed, up to "), "{printed}");
    assert!(printed.ends_with("1048576 bytes echoed\n"), "{printed}");
}

#[test]
fn p6_matrix_multiplies_right_whatever_the_size_and_the_workers() {
    for workers in [1, 4] {
        let process = start(env!("CARGO_BIN_EXE_matrix-worker"), workers, 4);
        for size in ["1", "2", "3", "5", "64", "200"] {
            let printed = run(env!("CARGO_BIN_EXE_matrix-client"), &[&process.addr().to_string(), size]);
            assert!(printed.starts_with(&format!("{size} x {size}: right, in ")), "{printed}");
        }
    }
}

#[test]
fn s2_notes_are_remembered_by_every_worker_and_heard_of_once() {
    let process = start(env!("CARGO_BIN_EXE_notes-worker"), 3, 3);
    let (client, address) = (env!("CARGO_BIN_EXE_notes-client"), process.addr().to_string());
    let notes: Vec<String> = (0..40).map(|note| format!("note {note:02}")).collect();
    let printed =
        run(client, &[&[address.as_str()][..], &notes.iter().map(String::as_str).collect::<Vec<_>>()].concat());
    let mut kept: Vec<&str> = printed.lines().skip(1).collect();
    assert!(printed.starts_with("40 heard of, and kept:\n"), "{printed}");
    kept.sort_unstable();
    assert_eq!(kept, notes, "written at once by three workers, none lost");
    assert_eq!(run(client, &[&address]).lines().count(), 41, "and still there");
}

#[test]
fn triggers_run_once_for_many_calls_and_when_all_messages_are_there() {
    let process = start(env!("CARGO_BIN_EXE_triggers-worker"), 2, 2);
    let printed = run(env!("CARGO_BIN_EXE_triggers-client"), &[&process.addr().to_string(), "apples", "pears"]);
    let shipped = "shipped: apples for 1 coins\nshipped: pears for 2 coins\n";
    assert_eq!(printed, format!("100 entries, each with a number of its own\n{shipped}"));
}

#[test]
fn event_loop_serves_two_processes_from_one_thread() {
    let processes = [1, 2].map(|workers| start(env!("CARGO_BIN_EXE_echo-worker"), workers, workers));
    let addresses = processes.each_ref().map(|process| process.addr().to_string());
    let printed = run(env!("CARGO_BIN_EXE_event-loop-client"), &[&addresses[0], &addresses[1]]);
    assert!(printed.starts_with("1000 calls at each of 2 addresses, "), "{printed}");
}

/// A client lives in the loops of others.
#[test]
fn tokio_and_tokio_uring_await_calls_of_an_embedded_client() {
    let process = start(env!("CARGO_BIN_EXE_echo-worker"), 2, 2);
    let address = process.addr().to_string();
    let printed = run(env!("CARGO_BIN_EXE_embed-tokio-client"), &[&address]);
    assert_eq!(printed, "1000 calls from 10 tasks of tokio, one connection, one thread\n");
    let output = Command::new("timeout")
        .args(["60", env!("CARGO_BIN_EXE_embed-tokio-uring-client"), &address])
        .output()
        .expect("timeout(1) runs");
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && (said.contains("PermissionDenied") || said.contains("Unsupported")) {
        return println!("skipped: needs io_uring ({said})");
    }
    assert_eq!(text(&output), "1000 calls from 10 tasks of tokio-uring, one connection, one thread\n");
}

#[test]
fn a_worker_started_by_hand_says_who_starts_it() {
    let output = Command::new(env!("CARGO_BIN_EXE_hello-worker")).output().expect("it starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("praas-process --worker"));
}
