//! The real `praas` binary on the machine that runs the tests: exit codes, the JSON, the table, and a machine made worse.

use serde_json::Value;
use std::process::{Command, Output};

const PRAAS: &str = env!("CARGO_BIN_EXE_praas");

fn run(args: &[&str]) -> Output {
    Command::new(PRAAS).args(args).output().expect("praas starts")
}

/// Runs praas from a shell that first takes something away from it.
fn run_after(shell: &str, args: &str) -> Output {
    Command::new("sh").args(["-c", &format!("{shell} && exec \"$0\" {args}"), PRAAS]).output().expect("sh starts")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn finding<'a>(report: &'a Value, id: &str) -> &'a Value {
    let findings = report["findings"].as_array().expect("a list of findings");
    findings.iter().find(|found| found["id"] == id).expect("the finding")
}

#[test]
fn the_json_has_every_finding_and_the_exit_code_follows_it() {
    let output = run(&["doctor", "--json"]);
    let report = json(&output);
    assert_eq!(report["version"], 1);
    let expected = if report["can_run"] == true { 0 } else { 1 };
    assert_eq!(output.status.code(), Some(expected));
    for id in [
        "kernel",
        "cores",
        "memfd",
        "io_uring",
        "seccomp",
        "queues",
        "dev_shm",
        "memory",
        "memlock",
        "open_files",
        "pids",
        "worker_limits",
        "clock",
        "idle",
        "huge_pages",
        "congestion",
        "host",
    ] {
        let found = finding(&report, id);
        assert!(["ok", "note", "problem"].contains(&found["verdict"].as_str().expect("a word")), "{found}");
        assert!(!found["value"].as_str().expect("text").is_empty(), "{found}");
        assert!(!found["uses"].as_str().expect("text").is_empty(), "{found}");
    }
    let usable = report["facts"]["tcp"]["usable"].as_array().expect("a list of names");
    assert!(usable.contains(&"reno".into()) && report["facts"]["tcp"]["auto_on_loopback"] == "reno");
    let allowed = report["facts"]["cores"]["allowed"].as_array().expect("a list of CPUs");
    assert!(!allowed.is_empty());
}

#[test]
fn the_table_has_no_colours_without_a_terminal() {
    let output = run(&["doctor"]);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.contains("io_uring") && text.contains("The data plane can"), "{text}");
    assert!(!text.contains('\u{1b}'), "escape sequences on a pipe");
}

#[test]
fn a_machine_with_too_few_files_is_refused_with_the_command_that_helps() {
    let output = run_after("ulimit -n 20", "doctor --json");
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let report = json(&output);
    assert_eq!(report["can_run"], false);
    let found = finding(&report, "open_files");
    assert_eq!((&found["value"], &found["verdict"]), (&"20".into(), &"problem".into()));
    assert_eq!(found["change"], "ulimit -n 4096");

    let table = run_after("ulimit -n 20", "doctor");
    assert_eq!(table.status.code(), Some(1));
    let text = String::from_utf8(table.stdout).expect("UTF-8");
    assert!(text.contains("PROBLEM") && text.contains("cannot run on this machine: 1 problem"), "{text}");
}

/// A note with limit and fix, not a problem, because rings still work.
#[test]
fn no_room_for_queues_leaves_rings() {
    let output = run_after(
        "ulimit -q 100000 2>/dev/null || ulimit -S -q 100000 2>/dev/null || prlimit --msgqueue=100000 --pid $$",
        "doctor --json",
    );
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let found = json(&output);
    let found = finding(&found, "queues");
    if found["change"].is_null() {
        println!("skipped: needs a shell or prlimit that can lower RLIMIT_MSGQUEUE");
        return;
    }
    assert_eq!(found["verdict"], "note");
    assert!(found["uses"].as_str().expect("text").contains("RLIMIT_MSGQUEUE"), "{found}");
}

#[test]
fn a_wrong_command_line_is_exit_code_2() {
    for args in [&["doctor", "--jsno"][..], &["dcotor"], &[]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let output = Command::new("sh")
        .args(["-c", "{ \"$0\" doctor --json; echo code $? >&2; } | true", PRAAS])
        .output()
        .expect("sh starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said == "code 0\n" || said == "code 1\n", "{said}");
}

#[test]
fn a_full_disk_is_exit_code_3_with_one_line() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = Command::new(PRAAS).args(["doctor"]).stdout(full).output().expect("praas starts");
    assert_eq!(output.status.code(), Some(3));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// A program of this workspace's, built beside ours; `None`, and a line that says so, where it is not.
fn beside_us(name: &str) -> Option<std::path::PathBuf> {
    let path = std::path::Path::new(PRAAS).with_file_name(name);
    if !path.is_file() {
        println!("skipped: needs {}, which `cargo build --workspace --bins --examples` builds", path.display());
    }
    path.is_file().then_some(path)
}

/// The reactor that a process started like this says it is on.
fn ready_reactor(mut command: Command, worker: &std::path::Path) -> String {
    use std::io::{BufRead, BufReader};
    let command = command.arg("--worker").arg(worker).args(["--workers", "1"]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().expect("it starts");
    let mut ready = String::new();
    let read = BufReader::new(child.stdout.take().expect("piped")).read_line(&mut ready);
    child.kill().and_then(|()| child.wait()).expect("ours to end");
    read.expect("a ready line");
    let reactor = ready.split_whitespace().find_map(|word| word.strip_prefix("reactor="));
    reactor.unwrap_or_else(|| panic!("{ready}")).to_owned()
}

/// What a process takes here is what the doctor says, in the table and in the JSON, with io_uring and where it is refused.
#[test]
fn r7_x7_the_doctor_names_the_reactor_that_a_process_then_uses() {
    let names = ["examples/praas-no-io-uring", "praas-process", "praas-worker"];
    let [Some(filter), Some(process), Some(worker)] = names.map(beside_us) else { return };
    for refusal in [None, Some("EPERM"), Some("ENOSYS")] {
        let command = |program: &std::path::Path| match refusal {
            None => Command::new(program),
            Some(errno) => {
                let mut command = Command::new(&filter);
                command.arg(errno).arg(program);
                command
            }
        };
        let doctor = |args: &[&str]| command(PRAAS.as_ref()).args(args).output().expect("it starts");
        let report = json(&doctor(&["doctor", "--json"]));
        let found = finding(&report, "io_uring");
        let uses = found["uses"].as_str().expect("text");
        let reactor = ready_reactor(command(&process), &worker);
        let (word, verdict) = if reactor == "uring" { ("io_uring", "ok") } else { ("epoll", "note") };
        assert!(
            uses.starts_with(word) && found["verdict"] == verdict,
            "{refusal:?}: a process uses {reactor}; {found}"
        );
        assert!(refusal.is_none() || (reactor == "epoll" && !found["change"].is_null()), "what to change: {found}");
        assert_eq!(report["facts"]["io_uring"]["result"], if reactor == "uring" { "works" } else { "failed" });
        let table = String::from_utf8(doctor(&["doctor"]).stdout).expect("UTF-8");
        let line = table.lines().find(|line| line.contains(" io_uring ")).expect("a line about it");
        assert!(line.contains(word), "{line}");
    }
}
