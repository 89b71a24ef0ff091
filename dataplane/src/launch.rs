//! Starts a process on this machine, as its own OS process, and ends it again.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use praas_transport::Secret;

use crate::config::{Ipc, Pin, WaitMode};

/// What to start.
#[derive(Debug, Clone)]
pub struct LaunchConfig {
    /// The `praas-process` program; `None` looks beside the running program.
    pub process_binary: Option<PathBuf>,
    /// The worker program and its arguments.
    pub worker: Vec<String>,
    /// Workers kept running.
    pub workers: u8,
    /// Most workers ever running.
    pub workers_max: u8,
    /// The channel to workers.
    pub ipc: Ipc,
    /// How everybody waits.
    pub wait: WaitMode,
    /// Which cores everybody runs on.
    pub pin: Pin,
    /// The application key, so that connections have to be authenticated. Default: none.
    pub key: Option<LaunchKey>,
    /// Further arguments of `praas-process`, as on its command line.
    pub args: Vec<String>,
    /// Where its messages and those of its workers go: to our stderr, or nowhere.
    pub quiet: bool,
}

/// How a process gets its key. Never in its arguments or its environment, where others can read it.
#[derive(Debug, Clone)]
pub enum LaunchKey {
    /// It reads this file, mode 0600.
    File(PathBuf),
    /// Through a pipe that it reads at its start. Its workers cannot find it anywhere then.
    Pipe(Arc<Secret>),
}

impl Default for LaunchConfig {
    fn default() -> Self {
        LaunchConfig {
            process_binary: None,
            worker: Vec::new(),
            workers: 2,
            workers_max: 8,
            ipc: Ipc::default(),
            wait: WaitMode::default(),
            pin: Pin::default(),
            key: None,
            args: Vec::new(),
            quiet: false,
        }
    }
}

/// Why a process was not started. Nothing stays behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// No `praas-process` program.
    #[error("no praas-process beside {beside}; build it with `cargo build --release -p praas-dataplane`")]
    NoBinary {
        /// Where we looked.
        beside: String,
    },
    /// The program could not be started.
    #[error("cannot start {program}: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The process ended before it was ready.
    #[error("praas-process ended ({status}) before it was ready: {text}")]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// The last it said.
        text: String,
    },
    /// What it printed is not a ready line.
    #[error("praas-process printed `{line}` instead of its ready line")]
    Strange {
        /// The line.
        line: String,
    },
}

/// A running process. Dropping it stops it: SIGTERM, then SIGKILL when it does not end within 6 s.
#[derive(Debug)]
pub struct LocalProcess {
    child: Child,
    name: String,
    address: SocketAddr,
    reactor: String,
    reactor_reason: String,
}

/// Looks for one of our programs: beside the running one, or one folder up (where tests and benches of cargo live).
#[must_use]
pub fn program_beside_us(name: &str) -> Option<PathBuf> {
    let here = std::env::current_exe().ok()?;
    let folder = here.parent()?;
    [folder.join(name), folder.parent()?.join(name)].into_iter().find(|path| path.is_file())
}

impl LocalProcess {
    /// Starts a process and waits until it is ready (or says why not).
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn start(config: &LaunchConfig) -> Result<LocalProcess, LaunchError> {
        let program = match &config.process_binary {
            Some(path) => path.clone(),
            None => program_beside_us("praas-process").ok_or_else(|| LaunchError::NoBinary {
                beside: std::env::current_exe()
                    .map_or_else(|_| "this program".into(), |path| path.display().to_string()),
            })?,
        };
        let mut command = Command::new(&program);
        let mut words = config.worker.iter();
        if let Some(worker) = words.next() {
            command.arg("--worker").arg(worker);
        }
        for word in words {
            command.arg(format!("--worker-arg={word}"));
        }
        command
            .arg("--workers")
            .arg(config.workers.to_string())
            .arg("--workers-max")
            .arg(config.workers_max.max(config.workers).to_string())
            .arg("--ipc")
            .arg(config.ipc.to_string())
            .arg("--wait")
            .arg(config.wait.to_string())
            .arg("--pin")
            .arg(config.pin.to_string())
            .args(&config.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let failed = |source| LaunchError::Spawn { program: program.display().to_string(), source };
        match &config.key {
            Some(LaunchKey::File(path)) => {
                command.arg("--key-file").arg(path);
            }
            Some(LaunchKey::Pipe(key)) => {
                let (reader, mut writer) = std::io::pipe().map_err(failed)?;
                // Far less than a pipe takes.
                writer.write_all(key.to_hex().as_bytes()).map_err(failed)?;
                command.arg("--key-fd=0").stdin(reader);
            }
            None => {}
        }
        let spawned = command.spawn();
        // It holds our end of the pipe.
        drop(command);
        let mut child = spawned.map_err(failed)?;
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let said = forward(stderr, config.quiet);
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        let _ = stdout.read_line(&mut line);
        let Some((name, address, reactor, reactor_reason)) = parse_ready(&line) else {
            let ended = line.is_empty();
            if !ended {
                let _ = child.kill();
            }
            let status = child.wait().map_err(failed)?;
            let text = said.join().unwrap_or_default();
            let line = line.trim().to_owned();
            return Err(if ended { LaunchError::Ended { status, text } } else { LaunchError::Strange { line } });
        };
        Ok(LocalProcess { child, name, address, reactor, reactor_reason })
    }

    /// Where clients connect.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// The process's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it waits with, as its ready line says: `epoll`, `uring`; empty when the line does not say.
    #[must_use]
    pub fn reactor(&self) -> &str {
        &self.reactor
    }

    /// Why it waits with that, as its ready line says; empty when the line does not say.
    #[must_use]
    pub fn reactor_reason(&self) -> &str {
        &self.reactor_reason
    }

    /// Pid of the controller; its workers are its children.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks the process to finish (SIGTERM) and waits.
    ///
    /// # Errors
    /// The system's.
    pub fn stop(mut self) -> std::io::Result<ExitStatus> {
        self.end(Duration::from_secs(6))
    }

    /// Kills the controller (SIGKILL), as a crash would.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(mut self) -> std::io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }

    fn end(&mut self, patience: Duration) -> std::io::Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let until = Instant::now() + patience;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.child.kill()?;
        self.child.wait()
    }
}

impl Drop for LocalProcess {
    fn drop(&mut self) {
        let _ = self.end(Duration::from_secs(6));
    }
}

/// Passes stderr on line by line; the thread ends with the last line.
fn forward(stderr: impl Read + Send + 'static, quiet: bool) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut last = String::new();
        copy_lines(&mut BufReader::new(stderr), |line| {
            if !quiet {
                eprintln!("{line}");
            }
            line.clone_into(&mut last);
        });
        last
    })
}

fn copy_lines(from: &mut impl BufRead, mut to: impl FnMut(&str)) {
    let mut line = Vec::new();
    while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
        to(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
}

fn parse_ready(line: &str) -> Option<(String, SocketAddr, String, String)> {
    // The one value with spaces in it is the last.
    let (line, reason) = line.trim_end().split_once(" reason=\"").unwrap_or((line, ""));
    let mut words = line.split_whitespace();
    if words.next() != Some("ready") {
        return None;
    }
    let value = |key: &str| words.clone().find_map(|word| word.strip_prefix(key)).map(str::to_owned);
    let reactor = value("reactor=").unwrap_or_default();
    Some((value("process=")?, value("listen=")?.parse().ok()?, reactor, reason.trim_end_matches('"').to_owned()))
}
