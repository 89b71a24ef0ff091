//! Two network namespaces with a cable between them that can be pulled, wholly or one way. Needs root and `ip`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// One end: a namespace with an interface `wire`. Removed with all that is in it when it is dropped.
pub(crate) struct End {
    name: String,
    address: Ipv4Addr,
}

/// Both ends.
pub(crate) struct Cable {
    pub(crate) near: End,
    pub(crate) far: End,
}

const PREFIX: &str = "praas-test-";
/// A station that is not there.
const NOBODY: &str = "02:00:00:00:00:99";

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

impl Cable {
    /// `None`, and a line that says so, where that is not allowed.
    pub(crate) fn lay() -> Option<Cable> {
        sweep();
        match Cable::try_lay() {
            Ok(cable) => Some(cable),
            Err(text) => {
                println!("skipped: needs root and ip ({text})");
                None
            }
        }
    }

    fn try_lay() -> Result<Cable, String> {
        let near = End::new(Ipv4Addr::new(10, 213, 7, 1))?;
        let far = End::new(Ipv4Addr::new(10, 213, 7, 2))?;
        let (a, b) = (near.name.as_str(), far.name.as_str());
        ip(&["link", "add", "wire", "netns", a, "type", "veth", "peer", "name", "wire", "netns", b])?;
        for end in [&near, &far] {
            ip(&["-n", &end.name, "addr", "add", &format!("{}/24", end.address), "dev", "wire"])?;
            ip(&["-n", &end.name, "link", "set", "lo", "up"])?;
            ip(&["-n", &end.name, "link", "set", "wire", "up"])?;
        }
        Ok(Cable { near, far })
    }

    /// From now on so much a second passes each way, such as `1mbit`, and half a second of it waits for its turn.
    #[allow(dead_code, reason = "each test binary uses its part")]
    pub(crate) fn slow_down(&self, rate: &str) {
        for end in [&self.near, &self.far] {
            let arguments = ["-n", &end.name, "qdisc", "add", "dev", "wire", "root", "tbf", "rate", rate];
            let output = Command::new("tc").args(arguments).args(["burst", "16kb", "latency", "500ms"]).output();
            let output = output.expect("tc comes with ip");
            assert!(output.status.success(), "tc: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }

    /// Nothing passes either way; neither end is told.
    pub(crate) fn pull(&self) {
        self.near.loses(&self.far);
        self.far.loses(&self.near);
    }

    /// All passes again.
    pub(crate) fn mend(&self) {
        self.near.finds(&self.far);
        self.far.finds(&self.near);
    }
}

impl End {
    fn new(address: Ipv4Addr) -> Result<End, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{PREFIX}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name])?;
        Ok(End { name, address })
    }

    pub(crate) fn address(&self) -> IpAddr {
        self.address.into()
    }

    /// What we send to `other` goes to nobody; what it sends still arrives here.
    pub(crate) fn loses(&self, other: &End) {
        self.neighbour(other, &["lladdr", NOBODY, "nud", "permanent"]);
    }

    /// What we send to `other` arrives again.
    pub(crate) fn finds(&self, other: &End) {
        let output =
            Command::new("ip").args(["netns", "exec", &other.name, "cat", "/sys/class/net/wire/address"]).output();
        let station = String::from_utf8(output.expect("ip runs").stdout).expect("an address");
        self.neighbour(other, &["lladdr", station.trim(), "nud", "permanent"]);
    }

    fn neighbour(&self, other: &End, state: &[&str]) {
        let address = other.address.to_string();
        let command = [&["-n", &self.name, "neigh", "replace", &address, "dev", "wire"], state].concat();
        ip(&command).expect("an end that is there");
    }

    /// Runs `work` in a thread in this namespace; sockets and processes it makes are there, too.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let place = std::fs::File::open(format!("/run/netns/{}", self.name)).expect("an end that is there");
                move_into_link_name_space(std::os::fd::AsFd::as_fd(&place), Some(LinkNameSpaceType::Network))
                    .expect("root may");
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
    }
}

/// Removes namespaces of tests that were killed.
fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = ip(&["netns", "del", &name]);
        }
    }
}
