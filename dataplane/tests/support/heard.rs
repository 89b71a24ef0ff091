//! A process started by hand, of which everything that it says is listened to.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use praas_dataplane::{Client, ClientConfig};

use super::{PATIENCE, process_program, signal, test_worker, wait_until};

pub(crate) struct Heard {
    child: Child,
    /// Its first line on stdout.
    pub(crate) ready: String,
    stdout: Arc<Mutex<Vec<String>>>,
    stderr: Arc<Mutex<Vec<String>>>,
}

impl Drop for Heard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.stderr.lock().unwrap();
            let from = log.len().saturating_sub(40);
            eprintln!("---- the last it said:\n{}", log[from..].join("\n"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listen(from: impl std::io::Read + Send + 'static) -> Arc<Mutex<Vec<String>>> {
    let lines: Arc<Mutex<Vec<String>>> = Arc::default();
    let heard = Arc::clone(&lines);
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
            heard.lock().unwrap().push(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned());
            line.clear();
        }
    });
    lines
}

impl Heard {
    /// The test worker, as many times, and never more.
    pub(crate) fn start(workers: u8, args: &[&str]) -> Heard {
        Heard::of(Command::new(process_program()), workers, args)
    }

    /// By a command that starts `praas-process` with what is added to it.
    pub(crate) fn of(mut command: Command, workers: u8, args: &[&str]) -> Heard {
        let workers = workers.to_string();
        command.args(["--worker", &test_worker(), "--workers", &workers, "--workers-max", &workers]);
        let named = std::env::var("PRAAS_TEST_REACTOR").ok().map(|reactor| format!("--reactor={reactor}"));
        let named = named.filter(|_| !args.iter().any(|arg| arg.starts_with("--reactor")));
        // Where io_uring cannot be had, `auto` says so on stderr, which is looked at.
        let all = args.iter().copied().chain(named.as_deref());
        command.args(all.map(|arg| if arg == "--reactor=auto" { "--reactor=epoll" } else { arg }));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let (stdout, stderr) =
            (listen(child.stdout.take().expect("piped")), listen(child.stderr.take().expect("piped")));
        let mut heard = Heard { child, ready: String::new(), stdout, stderr };
        wait_until("it is ready, or has ended", PATIENCE, || {
            !heard.stdout.lock().unwrap().is_empty() || heard.child.try_wait().is_ok_and(|ended| ended.is_some())
        });
        let ready = heard.stdout.lock().unwrap().first().cloned();
        heard.ready = ready.unwrap_or_else(|| panic!("it does not start: {:?}", heard.said()));
        heard
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn value(&self, key: &str) -> Option<&str> {
        self.ready.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.value("listen").expect("a ready line"), &ClientConfig::default()).expect("it listens")
    }

    /// What it said on stderr so far.
    pub(crate) fn said(&self) -> Vec<String> {
        self.stderr.lock().unwrap().clone()
    }

    pub(crate) fn wait_said(&self, words: &str) {
        wait_until(&format!("it says `{words}`"), PATIENCE, || self.said().iter().any(|line| line.contains(words)));
    }

    /// SIGTERM, and how it ended; what it said on stdout, and on stderr.
    pub(crate) fn end(mut self) -> (ExitStatus, Vec<String>, Vec<String>) {
        signal(self.child.id(), 15);
        let status = self.child.wait().expect("it ends");
        // Their last lines are in the pipes: the threads end with them.
        wait_until("the pipes have ended", PATIENCE, || {
            Arc::strong_count(&self.stdout) == 1 && Arc::strong_count(&self.stderr) == 1
        });
        let (stdout, stderr) = (self.stdout.lock().unwrap().clone(), self.said());
        (status, stdout, stderr)
    }

    /// SIGKILL, as a crash.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }
}
