//! Which reactor a process runs on: the one asked for, or the best that works here, and that it says so (R7, X7).

mod support;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use praas_dataplane::{Client, ClientConfig};
use support::refusal::without_io_uring;
use support::{has_flag, process_program, signal, test_worker};

/// A process started by hand, to see all it says.
struct Started {
    child: Child,
    ready: String,
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Started {
    fn with(args: &[&str]) -> Started {
        let mut command = Command::new(process_program());
        command.args(["--worker", &test_worker(), "--workers", "1", "--log", "info"]).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let mut ready = String::new();
        let _ = BufReader::new(child.stdout.take().expect("piped")).read_line(&mut ready);
        Started { child, ready }
    }

    fn value(&self, key: &str) -> &str {
        let mut values = self.ready.split_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        values.next().unwrap_or_default()
    }

    fn serves(&self) {
        let mut client = Client::connect(self.value("listen"), &ClientConfig::default()).expect("it listens");
        for bytes in [0, 100, 1 << 20] {
            let input = support::content(1, bytes);
            assert!(*client.invoke("echo", input.clone()).expect("an answer") == *input);
        }
    }

    /// Ends it; returns its exit code and what it said on stderr.
    fn end(mut self) -> (Option<i32>, String) {
        signal(self.child.id(), 15);
        let mut said = String::new();
        let _ = self.child.stderr.take().expect("piped").read_to_string(&mut said);
        (self.child.wait().expect("it ends").code(), said)
    }
}

/// Errnos with which kernels and sandboxes refuse.
const REFUSALS: [(i32, &str); 2] = [(libc::EPERM, "EPERM"), (libc::ENOSYS, "ENOSYS")];

/// Without this the other tests here would show nothing.
#[test]
fn x7_the_filter_refuses_io_uring() {
    for (errno, _) in REFUSALS {
        let error = without_io_uring(errno, || {
            // SAFETY: the kernel reads no memory for a null pointer, it returns EFAULT; no memory of ours is in play.
            let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null_mut::<u8>()) };
            assert_eq!(ring, -1);
            std::io::Error::last_os_error().raw_os_error()
        });
        assert_eq!(error, Some(errno));
    }
}

#[test]
fn x7_where_io_uring_is_refused_a_process_serves_on_epoll_and_says_why() {
    if !has_flag("--reactor") {
        return;
    }
    for (errno, name) in REFUSALS {
        for args in [&[][..], &["--reactor", "auto"]] {
            let process = without_io_uring(errno, || Started::with(args));
            assert_eq!(process.value("reactor"), "epoll", "{name}: {}", process.ready);
            process.serves();
            let (code, said) = process.end();
            assert_eq!(code, Some(0), "{said}");
            let text = std::io::Error::from_raw_os_error(errno).to_string();
            let text = text.split(" (").next().unwrap();
            let lines: Vec<_> = said.lines().filter(|line| line.contains("io_uring")).collect();
            assert!(lines.len() == 1 && lines[0].contains(text), "{name}, once, with `{text}`: {said}");
        }
    }
}

#[test]
fn x7_io_uring_asked_for_and_refused_is_an_error_that_says_what_to_do() {
    if !has_flag("--reactor") {
        return;
    }
    for (errno, name) in REFUSALS {
        let process = without_io_uring(errno, || Started::with(&["--reactor", "uring"]));
        assert_eq!(process.ready, "", "{name}");
        let (code, said) = process.end();
        assert!(code.is_some_and(|code| code != 0), "{name}: {code:?} {said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains("io_uring") && last.contains("--reactor"), "{name}: {said}");
    }
}

#[test]
fn r7_the_reactor_in_use_is_printed() {
    if !has_flag("--reactor") {
        return;
    }
    let best = {
        let process = Started::with(&[]);
        process.serves();
        process.value("reactor").to_owned()
    };
    assert!(["uring", "epoll"].contains(&best.as_str()), "{best}");
    let mut reactors = vec!["epoll"];
    if best == "uring" {
        reactors.push("uring");
    } else {
        println!("skipped: needs io_uring");
    }
    for reactor in reactors {
        let process = Started::with(&["--reactor", reactor]);
        assert_eq!(process.value("reactor"), reactor, "{}", process.ready);
        process.serves();
        assert_eq!(process.end().0, Some(0));
    }
}
