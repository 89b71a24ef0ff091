//! A `redis-server` of our own: on a free port of loopback, with nothing persistent, gone when we are.
//!
//! It never takes the default port and never talks to a Redis that it did not start: what answers must have the pid of our child.
//! Its answers are paced by the system's default congestion control, which may be bbr and hold long ones back even on loopback; it has no
//! setting for that, so we take its listening socket (`pidfd_getfd`) and set the one that everybody is measured with here.

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::client::Connection;
use crate::keeper::Keeper;
use crate::placement::{Wait, pin};
use crate::stream::CONGESTION_CONTROL;

/// Name of the program, looked up in PATH.
const PROGRAM: &str = "redis-server";

/// The port of a Redis that somebody else runs.
const DEFAULT_PORT: u16 = 6379;

/// How long a new server may take to answer; seen: 20 ms.
const START_MAX: Duration = Duration::from_secs(10);

/// Pause between two looks at a server that starts.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// How often to try, each time on another port: somebody may take a free port between our look and the server's.
const ATTEMPTS: usize = 3;

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    address: SocketAddr,
    // After the child has ended, so that the keeper is told of its end.
    _keeper: Keeper,
}

impl Server {
    /// Starts one that runs on `cores` and waits until it answers; `None` when the program is not installed.
    ///
    /// Leaves the calling thread on `cores`.
    ///
    /// # Errors
    /// It does not start or does not answer; with what it said.
    pub(crate) fn start(cores: &[usize]) -> Result<Option<Self>> {
        pin(cores)?;
        let mut failed = None;
        for _ in 0..ATTEMPTS {
            match Self::start_on(free_port()?) {
                Ok(started) => return Ok(started),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.context("no attempt")?).with_context(|| format!("{PROGRAM} does not start, tried {ATTEMPTS} times"))
    }

    fn start_on(port: u16) -> Result<Option<Self>> {
        let folder = std::env::temp_dir().join(format!("praas-bench-redis-{:016x}", getrandom::u64()?));
        DirBuilder::new().mode(0o700).create(&folder).context("a folder for redis-server")?;
        let mut command = Command::new(PROGRAM);
        command
            .args(["--port", &port.to_string(), "--bind", &Ipv4Addr::LOCALHOST.to_string()])
            .args(["--save", "", "--appendonly", "no", "--daemonize", "no", "--loglevel", "warning"])
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let started = match command.spawn() {
            Ok(child) => Self::await_answer(child, port).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("start {PROGRAM}")),
        };
        // The server has it as its working folder and writes nothing; once it has no name, nothing can stay behind, however we end.
        fs::remove_dir_all(&folder).context("remove the folder of redis-server")?;
        started
    }

    fn await_answer(mut child: Child, port: u16) -> Result<Self> {
        let keeper = match Keeper::of(child.id()) {
            Ok(keeper) => keeper,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        let said = child.stdout.take();
        // From here on, dropping it ends it.
        let mut server = Self { child, address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)), _keeper: keeper };
        if let Err(error) = server.until_it_answers() {
            drop(server);
            let mut text = String::new();
            if let Some(mut said) = said {
                let _ = said.read_to_string(&mut text);
            }
            return Err(error.context(format!("{PROGRAM} on port {port}: {}", text.trim())));
        }
        // Where that is not allowed, figures say less in favour of Redis: said, and no reason not to measure.
        if let Err(error) = server.set_congestion_control() {
            eprintln!(
                "note: redis-server answers under this system's congestion control, not {CONGESTION_CONTROL}: {error:#}"
            );
        }
        Ok(server)
    }

    fn until_it_answers(&mut self) -> Result<()> {
        let until = Instant::now() + START_MAX;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("ended before it answered ({status})");
            }
            let asked =
                Connection::open(self.address, Wait::Efficient).and_then(|mut connection| connection.server_pid());
            match asked {
                Ok(pid) if pid == self.child.id() => return Ok(()),
                Ok(pid) => bail!("pid {pid} answers there, and not ours, {}", self.child.id()),
                Err(error) => {
                    ensure!(Instant::now() < until, "no answer within {} s: {error}", START_MAX.as_secs());
                    std::thread::sleep(LOOK_AGAIN);
                }
            }
        }
    }

    /// Sets it on the listening socket, whose connections inherit it: those from now on.
    fn set_congestion_control(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a pid")?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let mut found = false;
        for entry in fs::read_dir(format!("/proc/{}/fd", self.child.id()))? {
            let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let Ok(theirs) = pidfd_getfd(process.as_fd(), number, PidfdGetfdFlags::empty()) else { continue };
            found |= set_on_listener(&theirs)?;
        }
        ensure!(found, "its listening socket was not found");
        Ok(())
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether it was one.
fn set_on_listener(theirs: &OwnedFd) -> io::Result<bool> {
    let socket = socket2::SockRef::from(theirs);
    // Anything but a socket answers with an error.
    if !matches!(socket.is_listener(), Ok(true)) {
        return Ok(false);
    }
    socket.set_tcp_congestion(CONGESTION_CONTROL.as_bytes())?;
    Ok(true)
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a free port on loopback")?;
    let port = listener.local_addr()?.port();
    ensure!(
        port != DEFAULT_PORT,
        "the system gave port {DEFAULT_PORT}, which belongs to somebody else's Redis: try again"
    );
    Ok(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_answers_on_a_port_of_its_own_and_is_gone_afterwards() {
        let cores = crate::placement::startup_cores().unwrap();
        let Some(server) = Server::start(&cores).unwrap() else { return println!("skipped: needs redis-server") };
        let (address, pid) = (server.address(), server.child.id());
        assert!(address.ip().is_loopback() && address.port() != DEFAULT_PORT);
        let folder = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
        assert!(!folder.exists(), "{}", folder.display());
        drop(server);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    /// A raw round trip and one over Redis must be paced alike.
    #[test]
    fn its_answers_are_paced_as_everybody_elses() {
        let cores = crate::placement::startup_cores().unwrap();
        let Some(server) = Server::start(&cores).unwrap() else { return println!("skipped: needs redis-server") };
        if let Err(error) = server.set_congestion_control() {
            return println!("skipped: needs the right to a child's sockets ({error:#})");
        }
        let connection = Connection::open(server.address(), Wait::Efficient).unwrap();
        let pid = Pid::from_raw(server.child.id().cast_signed()).unwrap();
        let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let ours = connection.local_addr().unwrap();
        let accepted = || {
            fs::read_dir(format!("/proc/{}/fd", server.child.id())).unwrap().find_map(|entry| {
                let number = entry.unwrap().file_name().to_str()?.parse().ok()?;
                let theirs = pidfd_getfd(process.as_fd(), number, PidfdGetfdFlags::empty()).ok()?;
                let socket = socket2::SockRef::from(&theirs);
                let peer = socket.peer_addr().ok()?.as_socket()?;
                (peer == ours).then(|| socket.tcp_congestion().unwrap())
            })
        };
        let until = Instant::now() + START_MAX;
        let name = loop {
            match accepted() {
                Some(name) => break name,
                None => assert!(Instant::now() < until, "never accepted"),
            }
        };
        assert!(name.starts_with(CONGESTION_CONTROL.as_bytes()), "{}", String::from_utf8_lossy(&name));
    }
}
