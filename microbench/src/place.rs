//! Where the two ends of a connection stand: on loopback, or in two network namespaces joined by a veth pair.
//!
//! The namespaces have no name: they are held by descriptors of this process and by what runs in them. So nothing is left
//! behind, whatever ends us; a name under `/run/netns` would outlive SIGKILL. The one system call with `unsafe` stands in
//! `raw.rs`; the rest is done by `ip`, which must be installed.

use std::fmt;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where the two ends of a connection stand.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Place {
    /// Both on the loopback interface.
    Loopback,
    /// Each in a network namespace of its own, with a veth pair between them (needs root and `ip`).
    Netns,
}

impl Place {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Place::Loopback => "loopback",
            Place::Netns => "netns",
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A network that nobody else has, so any would do; this one is for private use (RFC 1918).
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 213, 77, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 213, 77, 2);

/// Two places that reach each other.
#[derive(Debug)]
pub(crate) struct Network {
    sides: Option<Sides>,
}

#[derive(Debug)]
struct Sides {
    server: OwnedFd,
    client: OwnedFd,
}

impl Network {
    /// `None` when this machine does not let us; the reason was printed.
    pub(crate) fn make(place: Place) -> Result<Option<Self>> {
        if place == Place::Loopback {
            return Ok(Some(Self { sides: None }));
        }
        let has_ip = Command::new("ip").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
        if !rustix::process::geteuid().is_root() || !has_ip {
            eprintln!("skipped: --place netns: needs root and ip");
            return Ok(None);
        }
        let (server, client) = (fresh()?, fresh()?);
        let theirs = format!("/proc/{}/fd/{}", std::process::id(), client.as_raw_fd());
        inside(&server, || {
            ip(&["link", "add", "praas0", "type", "veth", "peer", "name", "praas1", "netns", &theirs])?;
            ip(&["addr", "add", &format!("{SERVER}/30"), "dev", "praas0"])?;
            ip(&["link", "set", "praas0", "up"])
        })??;
        inside(&client, || {
            ip(&["addr", "add", &format!("{CLIENT}/30"), "dev", "praas1"])?;
            ip(&["link", "set", "praas1", "up"])
        })??;
        Ok(Some(Self { sides: Some(Sides { server, client }) }))
    }

    pub(crate) fn place(&self) -> Place {
        if self.sides.is_some() { Place::Netns } else { Place::Loopback }
    }

    /// Where servers listen.
    pub(crate) fn server_ip(&self) -> IpAddr {
        match self.sides {
            Some(_) => SERVER.into(),
            None => Ipv4Addr::LOCALHOST.into(),
        }
    }

    /// Does something where servers stand: what it opens and whom it starts stays there.
    pub(crate) fn on_server_side<T: Send>(&self, what: impl FnOnce() -> T + Send) -> Result<T> {
        match &self.sides {
            Some(sides) => inside(&sides.server, what),
            None => Ok(what()),
        }
    }

    /// Puts the calling thread where clients stand, until the answer is dropped.
    pub(crate) fn enter(&self) -> Result<Inside> {
        let Some(sides) = &self.sides else { return Ok(Inside(None)) };
        let home = current()?;
        move_into(&sides.client)?;
        Ok(Inside(Some(home)))
    }
}

/// The calling thread is on the client's side while this lives.
#[derive(Debug)]
pub(crate) struct Inside(Option<OwnedFd>);

impl Drop for Inside {
    fn drop(&mut self) {
        if let Some(home) = &self.0 {
            // It was ours a moment ago; were it refused now, everything further would be measured in the wrong place.
            move_into(home).expect("back to the network namespace this program was started in");
        }
    }
}

/// A new network namespace with its loopback up, and the congestion control that everything is measured with.
fn fresh() -> Result<OwnedFd> {
    in_thread(|| {
        crate::raw::leave_network().context("a new network namespace")?;
        ip(&["link", "set", "lo", "up"])?;
        // Per namespace, and of the thread that writes.
        std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", crate::stream::CONGESTION_CONTROL)
            .context("choose the congestion control of a namespace")?;
        current()
    })?
}

fn current() -> Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net").context("open our network namespace")?.into())
}

fn move_into(namespace: &OwnedFd) -> Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).context("enter a network namespace")
}

/// Runs something in a namespace, on a thread of its own: a namespace belongs to the thread that entered it.
fn inside<T: Send>(namespace: &OwnedFd, what: impl FnOnce() -> T + Send) -> Result<T> {
    in_thread(|| {
        move_into(namespace)?;
        Ok(what())
    })?
}

fn in_thread<T: Send>(what: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(what).join()).map_err(|_| anyhow!("a helping thread panicked"))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(arguments).stdin(Stdio::null()).output().context("run ip")?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "ip {}: {}", arguments.join(" "), said.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Both sides reach each other and nothing else, and this thread comes home.
    #[test]
    fn two_namespaces_are_joined_and_the_thread_comes_home() {
        let Some(network) = Network::make(Place::Netns).unwrap() else { return };
        let at_home = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let listener = network.on_server_side(|| TcpListener::bind((network.server_ip(), 0))).unwrap().expect("listen");
        let address = listener.local_addr().unwrap();
        {
            let _inside = network.enter().unwrap();
            assert_ne!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), at_home);
            let mut out = TcpStream::connect(address).unwrap();
            let (mut inward, peer) = listener.accept().unwrap();
            assert_eq!(peer.ip(), IpAddr::from(CLIENT));
            out.write_all(b"across").unwrap();
            let mut seen = [0; 6];
            inward.read_exact(&mut seen).unwrap();
            assert_eq!(&seen, b"across");
        }
        assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), at_home);
    }

    #[test]
    fn loopback_needs_nothing() {
        let network = Network::make(Place::Loopback).unwrap().expect("always there");
        assert_eq!((network.place(), network.server_ip()), (Place::Loopback, Ipv4Addr::LOCALHOST.into()));
        assert_eq!(network.on_server_side(|| 7).unwrap(), 7);
        network.enter().unwrap();
    }
}
