//! What workers print: whose it is, that it is shown whole or counted, and that it costs the others nothing (faults.md W4, W8, R7, X6, G4).

mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use praas_dataplane::InvokeError;
use support::heard::Heard;
use support::{
    PATIENCE, children, cpu_seconds, fds, lives, memory_kib, on_both_reactors, process_program, run_process, signal,
    test_worker, wait_until,
};

fn say(stream: &str, text: &[u8]) -> Vec<u8> {
    [stream.as_bytes(), b" ", text].concat()
}

/// What a line that is not a worker's begins with is not what a worker can make one of its lines begin with.
fn of_worker<'a>(line: &'a str, pid: u32, stream: &str) -> Option<&'a str> {
    line.strip_prefix("worker 1 pid ")?.strip_prefix(&format!("{pid} {stream}: "))
}

#[test]
fn g4_lines_have_their_worker_and_stream_before_them_and_cannot_be_forged() {
    on_both_reactors(|reactor| {
        let args = reactor.config(praas_dataplane::Ipc::Ring, 1, &[]).args;
        let args: Vec<&str> = args.iter().map(String::as_str).filter(|arg| !arg.starts_with("--log")).collect();
        let process = Heard::start(1, &args);
        let mut client = process.connect();
        let pid = children(process.pid())[0];
        client.invoke("say", say("out", b"one\ntwo\r\n\nthr")).unwrap();
        client.invoke("say", say("err", b"\x1b[2J\x07wiped\rworker 2 pid 1 stdout: forged \xff\n")).unwrap();
        client.invoke("say", say("err", "ERROR\u{85}\u{2028}\u{202e}größe 日本\n".as_bytes())).unwrap();
        client.invoke("say", say("out", b"ee\n")).unwrap();
        client.invoke("say", say("err", &[&[b'x'; 2500][..], b"\nno end"].concat())).unwrap();
        let (status, stdout, said) = process.end();
        assert!(status.success());
        assert_eq!(stdout.len(), 1, "our stdout has the ready line and nothing else: {stdout:?}");
        let of = |stream: &str| said.iter().filter_map(|line| of_worker(line, pid, stream)).collect::<Vec<_>>();
        assert_eq!(of("stdout"), ["one", "two", "", "three"]);
        let err = of("stderr");
        assert_eq!(err[0], "\\x1b[2J\\x07wiped\\x0dworker 2 pid 1 stdout: forged \\xff");
        assert_eq!(err[1], "ERROR\\u{85}\\u{2028}\\u{202e}größe 日本");
        assert_eq!(err[2], format!("{} [and 1540 bytes]", "x".repeat(960)));
        assert_eq!(&err[3..], ["no end"], "a line that was never ended is shown at the end");
        assert_eq!(said.len(), 8, "nothing else was said: {said:?}");
    });
}

/// The panic that explains a death stands in the log before the death, however much the worker had printed.
#[test]
fn w4_the_last_words_of_a_worker_are_shown_before_its_end() {
    let process = Heard::start(1, &["--log=info", "--worker-log-lines-max=10"]);
    let mut client = process.connect();
    let pid = children(process.pid())[0];
    let much: String = (0..500).map(|number| format!("line {number}\n")).collect();
    let error = client.invoke("say", say("abort", format!("{much}last words").as_bytes())).unwrap_err();
    assert!(matches!(&error, InvokeError::WorkerLost { text } if text.contains("signal 6")), "{error}");
    assert!(!error.to_string().contains("last words"), "what a worker prints leaves the process in its log only");
    process.wait_said("worker was killed by signal 6");
    let said = process.said();
    let at =
        |words: &str| said.iter().position(|line| line.ends_with(words)).unwrap_or_else(|| panic!("{words}: {said:?}"));
    let last = at(&format!("worker 1 pid {pid} stderr: last words"));
    // Its place in the log is that of its worker's life.
    assert!(at("line 499") + 1 == last && at("line 437") + 63 == last, "the last of them: {said:?}");
    let death = said.iter().position(|line| line.contains("worker was killed by signal 6")).unwrap();
    assert!(last < death, "{said:?}");
    let shown = said.iter().filter(|line| line.contains("stderr: l")).count();
    let dropped: usize = said.iter().filter_map(|line| dropped_in(line)).sum();
    assert_eq!(shown + dropped, 501, "shown or counted: {said:?}");
    let mut client = process.connect();
    assert_eq!(&*client.invoke("echo", b"next").unwrap(), b"next");
}

fn dropped_in(line: &str) -> Option<usize> {
    line.strip_prefix("worker ")?.split_once(" lines dropped")?.0.rsplit(' ').next()?.parse().ok()
}

#[test]
fn r7_who_prints_without_end_keeps_nobody_from_being_served_and_takes_no_memory() {
    on_both_reactors(|reactor| {
        let args = reactor.config(praas_dataplane::Ipc::Ring, 2, &["--worker-log-lines-max=200"]).args;
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let process = Heard::start(2, &args);
        let (mut client, mut neighbour) = (process.connect(), process.connect());
        neighbour.invoke("echo", b"warm").unwrap();
        let (before_kib, cpu) = (memory_kib(process.pid()), cpu_seconds(process.pid()));
        let flood = client.submit_within("flood", b"", Duration::from_secs(3)).unwrap();
        let (begun, mut calls, mut longest) = (Instant::now(), 0_u32, Duration::ZERO);
        while client.poll().is_none() && begun.elapsed() < PATIENCE {
            let asked = Instant::now();
            assert_eq!(*neighbour.invoke("echo", &calls.to_le_bytes()).unwrap(), calls.to_le_bytes());
            longest = longest.max(asked.elapsed());
            calls += 1;
        }
        let _ = flood;
        let took = begun.elapsed();
        let grown_kib = memory_kib(process.pid()).saturating_sub(before_kib);
        let said = process.said();
        println!(
            "{calls} calls beside it, {longest:?} at most, {grown_kib} KiB more, {:.2} s of CPU in {took:?}, {} lines",
            cpu_seconds(process.pid()) - cpu,
            said.len()
        );
        assert!(calls > 100 && grown_kib < 4096);
        let windows = usize::try_from(took.as_secs()).unwrap() + 2;
        assert!(said.len() <= 201 * windows, "{} lines in {took:?}", said.len());
        let (status, _, said) = process.end();
        assert!(status.success());
        // Every line is shown or counted: the last number is that of the last line.
        let shown = said.iter().filter(|line| line.contains("stdout: flood")).count();
        let dropped: usize = said.iter().filter_map(|line| dropped_in(line)).sum();
        let last =
            said.iter().rev().find_map(|line| line.split_once("stdout: flood ")?.1.split(',').next()?.parse().ok());
        assert!(
            last.is_none_or(|last: usize| shown + dropped > last),
            "{shown} shown, {dropped} dropped, the last {last:?}"
        );
        assert!(dropped > 1000, "{dropped}");
    });
}

/// W8: a child of a worker that keeps its output open, and writes to it, keeps nothing from ending.
#[test]
fn w8_a_grandchild_that_holds_the_output_holds_nobody_up() {
    let process = Heard::start(1, &[]);
    let mut client = process.connect();
    let open = fds(process.pid());
    for session in ["", "setsid"] {
        let child: u32 = String::from_utf8_lossy(&client.invoke("fork", session).unwrap()).parse().unwrap();
        // Not the first of the children, which may be one that is dead and not buried yet.
        let worker = String::from_utf8_lossy(&client.invoke("pid", b"").unwrap()).into_owned();
        signal(worker.split(' ').nth(1).unwrap().parse().unwrap(), 9);
        assert_eq!(&*client.invoke("echo", b"the next one").unwrap(), b"the next one");
        wait_until("it is gone", PATIENCE, || !lives(child));
        client.invoke("say", say("out", session.as_bytes())).unwrap();
    }
    wait_until("descriptors are back", PATIENCE, || fds(process.pid()) == open);
    let child: u32 = String::from_utf8_lossy(&client.invoke("fork", "setsid").unwrap()).parse().unwrap();
    let (status, _, _) = process.end();
    assert!(status.success() && !lives(child));
}

/// Whoever starts a process need not read what it says.
#[test]
fn g4_lines_that_nobody_reads_are_dropped_and_stop_nobody() {
    let mut command = Command::new(process_program());
    command.args(["--worker", &test_worker(), "--workers", "1", "--worker-log-lines-max=1000000", "--reactor=epoll"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut ready = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut ready).unwrap();
    let address = ready.split("listen=").nth(1).unwrap().split(' ').next().unwrap();
    let mut client = praas_dataplane::Client::connect(address, &praas_dataplane::ClientConfig::default()).unwrap();
    let flood = client.submit_within("flood", b"", Duration::from_secs(1)).unwrap();
    let lines: u64 = String::from_utf8_lossy(&client.wait(flood).unwrap()).parse().unwrap();
    assert!(lines > 10_000, "{lines} lines were more than a pipe takes");
    assert_eq!(&*client.invoke("echo", b"still here").unwrap(), b"still here");
    let stderr = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || std::io::read_to_string(stderr).unwrap());
    std::thread::sleep(Duration::from_millis(100));
    client.invoke("say", say("out", b"heard\n")).unwrap();
    signal(child.id(), 15);
    assert!(child.wait().unwrap().success());
    let said = reader.join().unwrap();
    let lost = said.lines().find(|line| line.contains("lines of workers are lost")).unwrap_or_else(|| panic!("{said}"));
    assert!(lost.starts_with("praas-process: ") && said.ends_with("stdout: heard\n"), "{lost}");
    assert!(said.lines().all(|line| line.starts_with("worker 1 pid ") || line == lost), "no line is torn");
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("praas-printed-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn g8_a_folder_of_logs_stays_within_its_bound_and_belongs_to_one_process() {
    let folder = Folder::new("folder");
    let log = format!("--worker-log={}", folder.0.display());
    let bounds = ["--process=p", &log, "--worker-log-bytes-max=65536", "--worker-log-old-files=2"];
    let process = Heard::start(1, &[&bounds[..], &["--worker-log-lines-max=1000000"]].concat());
    let mut client = process.connect();
    let flood = client.submit_within("flood", b"", Duration::from_secs(1)).unwrap();
    client.wait(flood).unwrap();
    let output = run_process(&[&["--worker", &test_worker()][..], &bounds].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(6), "{said}");
    assert!(said.contains("another process writes to it") && said.contains("--worker-log"), "{said}");
    client.invoke("say", say("err", b"the last one\n")).unwrap();
    let (status, _, said) = process.end();
    assert!(status.success() && said.is_empty(), "{said:?}");
    let mut names: Vec<_> =
        std::fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["p.log", "p.log.1", "p.log.2"]);
    let bytes: u64 = names.iter().map(|name| folder.0.join(name).metadata().unwrap().len()).sum();
    assert!((65_536..=3 * 65_536).contains(&bytes), "{bytes}");
    let text = std::fs::read_to_string(folder.0.join("p.log")).unwrap();
    let last = text.lines().last().unwrap();
    assert!(
        last.ends_with("stderr: the last one") && last.starts_with("20") && last.contains("Z worker 1 pid "),
        "{last}"
    );
}

/// A file system of its own for the process, of so many KiB, which goes with it.
fn on_a_small_disk(folder: &std::path::Path, kib: u32) -> Option<Command> {
    let mount = format!("mount -t tmpfs -o size={kib}k,nr_inodes=16 none {}", folder.display());
    let works = Command::new("unshare").args(["-m", "sh", "-c", &mount]).stderr(Stdio::null()).status();
    if !works.is_ok_and(|status| status.success()) {
        println!("skipped: needs root, unshare and mount");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &format!("{mount} && exec \"$0\" \"$@\""), &process_program()]);
    Some(command)
}

#[test]
fn x6_a_full_disk_costs_lines_and_nothing_else() {
    let folder = Folder::new("disk");
    let Some(command) = on_a_small_disk(&folder.0, 512) else { return };
    let log = format!("--worker-log={}", folder.0.display());
    let process = Heard::of(command, 2, &["--process=p", &log, "--worker-log-lines-max=1000000"]);
    let (mut client, mut neighbour) = (process.connect(), process.connect());
    let flood = client.submit_within("flood", b"", Duration::from_secs(2)).unwrap();
    for n in 0..200_u8 {
        assert_eq!(&*neighbour.invoke("echo", &[n]).unwrap(), [n]);
    }
    client.wait(flood).unwrap();
    let told = process.said().iter().filter(|line| line.contains("No space left") && line.contains("dropped")).count();
    assert_eq!(told, 1, "once, where the operator looks: {:?}", process.said());
    // There is room again: what was lost is told of in the log, and lines are whole.
    let inside = format!("/proc/{}/root{}", process.pid(), folder.0.display());
    std::fs::write(format!("{inside}/p.log"), b"").unwrap();
    client.invoke("say", say("out", b"room again\n")).unwrap();
    let text = || std::fs::read_to_string(format!("{inside}/p.log")).unwrap();
    wait_until("the log goes on", PATIENCE, || text().contains("room again"));
    let text = text();
    // The pipe may have held more of the flood.
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    assert!(lines[0].contains("lines of workers are lost"), "{}", lines[0]);
    assert!(lines[1..].iter().all(|line| line.starts_with("20") && line.contains("Z worker 1 pid ")), "none is torn");
    assert!(text.ends_with("stdout: room again\n"), "{}", lines[lines.len() - 1]);
}
