//! Echo servers over TCP, as others would write them, and the clients that measure them: what our remote call stands beside.
//!
//! | peer          | is                                                                          |
//! |---------------|-----------------------------------------------------------------------------|
//! | `blocking`    | a thread a connection, `read` and `write`                                   |
//! | `epoll`       | one thread, epoll through mio, `read` and `write`                           |
//! | `uring`       | one thread, io_uring, `SINGLE_ISSUER` and `DEFER_TASKRUN`                   |
//! | `relay`       | `blocking`, and a third process on its core that is asked before each answer |
//! | `tokio`       | one thread, tokio as it comes                                               |
//! | `tokio_awake` | the same, kept from sleeping by a task that yields                          |
//! | `tokio_uring` | one thread, tokio-uring as it comes                                         |
//! | `http`        | one thread, `POST /echo` of axum over tokio as it comes, keep-alive         |
//! | `http_awake`  | the same, kept from sleeping, client and server                             |
//!
//! The first three are *raw*: nothing between them and the kernel; the fastest of them is the floor of a remote call. `relay` is what
//! that floor becomes when a call passes three parties, as ours do.
//!
//! Messages: a connection begins with their length (8 bytes); from then on a server returns each message when all of it is
//! there, as a function would, not byte by byte as it comes. HTTP needs no such beginning.
//! Waiting: `latency` looks without sleeping for 10 ms after the last message, `balanced` for 100 µs, `efficient` not at
//! all; then the server sleeps, so that it costs nothing while another one has its turn. Runtimes as they come sleep
//! whenever they find nothing, in every mode: that is how they are used. Where they must be compared in `latency` there is
//! an `_awake` one; tokio-uring submits only when it is about to sleep and so cannot be kept awake.

mod awake;
mod beside;
mod blocking;
mod epoll;
mod http;
mod relay;
mod stage;
mod tokio;
mod tokio_uring;
mod uring;

use std::fmt;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub(crate) use beside::{BEST_RAW, PeersArgs, run};
pub(crate) use relay::{RELAY, work};

use crate::end::{self, Block, Messages};
use crate::peer::{Order, Peer};
use crate::place::Network;
use crate::placement::{Placement, SPIN_BUDGET, Wait, pin};
use crate::remote::until_warm;
use crate::stream::{CONGESTION_CONTROL, StreamEnd};
use crate::subject::SETTLE;
use http::HttpCaller;

/// How long a server looks on without sleeping in `latency`: less than everybody else is given to settle.
const LATENCY_LINGER: Duration = Duration::from_millis(10);
const _: () = assert!(LATENCY_LINGER.as_millis() < SETTLE.as_millis());

/// A way to write an echo server.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// A thread a connection, `read` and `write`.
    Blocking,
    /// One thread, epoll through mio.
    Epoll,
    /// One thread, io_uring.
    Uring,
    /// Blocking, with a third process that is asked before each answer.
    Relay,
    /// One thread, tokio as it comes.
    Tokio,
    /// One thread, tokio kept from sleeping.
    TokioAwake,
    /// One thread, tokio-uring as it comes.
    TokioUring,
    /// `POST /echo` of axum over tokio as it comes.
    Http,
    /// The same, kept from sleeping.
    HttpAwake,
}

impl Kind {
    pub(crate) const ALL: [Kind; 9] = [
        Kind::Blocking,
        Kind::Epoll,
        Kind::Uring,
        Kind::Relay,
        Kind::Tokio,
        Kind::TokioAwake,
        Kind::TokioUring,
        Kind::Http,
        Kind::HttpAwake,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Blocking => "blocking",
            Kind::Epoll => "epoll",
            Kind::Uring => "uring",
            Kind::Relay => RELAY,
            Kind::Tokio => "tokio",
            Kind::TokioAwake => "tokio_awake",
            Kind::TokioUring => "tokio_uring",
            Kind::Http => "http",
            Kind::HttpAwake => "http_awake",
        }
    }

    /// Nothing between it and the kernel.
    pub(crate) fn is_raw(self) -> bool {
        matches!(self, Kind::Blocking | Kind::Epoll | Kind::Uring)
    }

    pub(crate) fn is_http(self) -> bool {
        matches!(self, Kind::Http | Kind::HttpAwake)
    }

    /// Whether it waits in a way of its own in this mode: who is kept awake belongs to `latency`.
    pub(crate) fn supports(self, wait: Wait) -> bool {
        !matches!(self, Kind::TokioAwake | Kind::HttpAwake) || wait == Wait::Latency
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How long a server that finds nothing to do looks on before it sleeps.
fn linger(wait: Wait) -> Duration {
    match wait {
        Wait::Latency => LATENCY_LINGER,
        Wait::Balanced => SPIN_BUDGET,
        Wait::Efficient => Duration::ZERO,
    }
}

/// The second process: serves everybody who connects, until the parent hangs up.
pub(crate) fn serve(kind: Kind, wait: Wait, core: usize, listener: TcpListener) -> Result<()> {
    match kind {
        Kind::Blocking => blocking::serve(wait, &listener),
        Kind::Epoll => epoll::serve(wait, listener),
        Kind::Uring => uring::serve(wait, &listener),
        Kind::Relay => relay::serve(wait, core, &listener),
        Kind::Tokio => tokio::serve(None, listener),
        Kind::TokioAwake => tokio::serve(Some(linger(wait)), listener),
        Kind::TokioUring => tokio_uring::serve(listener),
        Kind::Http => http::serve(None, listener),
        Kind::HttpAwake => http::serve(Some(linger(wait)), listener),
    }
}

/// A running server, seen from the parent. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) kind: Kind,
    wait: Wait,
    address: SocketAddr,
    peer: Peer,
}

impl Server {
    /// Starts it on a core, on the server side of a network.
    pub(crate) fn start(kind: Kind, wait: Wait, core: usize, network: &Network) -> Result<Self> {
        let describe = || format!("peer {kind}, {wait}");
        let listen = || TcpListener::bind((network.server_ip(), 0));
        let listener = network.on_server_side(listen)?.context("listen for a peer").with_context(describe)?;
        // Who is accepted inherits both.
        socket2::SockRef::from(&listener).set_tcp_nodelay(true)?;
        socket2::SockRef::from(&listener).set_tcp_congestion(CONGESTION_CONTROL.as_bytes())?;
        let address = listener.local_addr()?;
        let peer = Peer::spawn(&Order::Echo { kind, wait, core }, &[listener.as_fd()]).with_context(describe)?;
        Ok(Self { kind, wait, address, peer })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.peer.pid()
    }

    /// A connection that the server takes for one of messages this long.
    pub(crate) fn connect(&self, bytes: usize) -> Result<TcpStream> {
        use std::io::Write;
        let mut stream = TcpStream::connect(self.address).with_context(|| format!("connect to peer {}", self.kind))?;
        stream.set_nodelay(true)?;
        socket2::SockRef::from(&stream).set_tcp_congestion(CONGESTION_CONTROL.as_bytes())?;
        if !self.kind.is_http() {
            stream.write_all(&(bytes as u64).to_le_bytes())?;
        }
        Ok(stream)
    }

    /// Waits until it sleeps, if it is one that spins.
    pub(crate) fn settle(&self) {
        let spins = self.kind.is_raw() || self.kind == Kind::Relay || !self.kind.supports(Wait::Balanced);
        if spins && self.wait == Wait::Latency {
            std::thread::sleep(SETTLE);
        }
    }
}

/// A server, and the client that asks it one thing at a time.
pub(crate) struct Echo {
    pub(crate) server: Server,
    placement: Placement,
    caller: Option<(usize, Caller)>,
    messages: Messages,
    sequence: u64,
}

enum Caller {
    /// As the raw floors do: blocks or spins on a socket of its own.
    Stream(StreamEnd),
    Http(HttpCaller),
}

impl Echo {
    pub(crate) fn start(kind: Kind, wait: Wait, placement: Placement, network: &Network) -> Result<Self> {
        let server = Server::start(kind, wait, placement.theirs, network)?;
        Ok(Self { server, placement, caller: None, messages: Messages::default(), sequence: 0 })
    }

    /// Times so many round trips, after some that are not.
    pub(crate) fn calls(
        &mut self,
        bytes: usize,
        warm_up: usize,
        samples: usize,
        samples_ns: &mut Vec<u64>,
    ) -> Result<()> {
        pin(&[self.placement.ours])?;
        let server = &self.server;
        let caller = match &mut self.caller {
            Some((for_bytes, caller)) if *for_bytes == bytes => caller,
            caller => {
                let stream = server.connect(bytes)?;
                let new = if server.kind.is_http() {
                    let linger = (server.kind == Kind::HttpAwake).then(|| linger(server.wait));
                    Caller::Http(HttpCaller::connect(stream, linger)?)
                } else {
                    Caller::Stream(StreamEnd::of_socket(stream.into(), server.wait)?)
                };
                &mut caller.insert((bytes, new)).1
            }
        };
        let start = samples_ns.len();
        for (samples, kept) in [(warm_up, false), (samples, true)] {
            let block = Block { bytes, samples, trips_per_sample: 1 };
            match caller {
                Caller::Stream(end) => end::ping(end, &mut self.messages, block, &mut self.sequence, samples_ns),
                Caller::Http(caller) => caller.ping(block, &mut self.sequence, samples_ns),
            }
            .with_context(|| format!("peer {}, {bytes} B", server.kind))?;
            if !kept {
                samples_ns.truncate(start);
            }
        }
        Ok(())
    }

    /// Calls until warm; what a call takes then, in nanoseconds.
    pub(crate) fn warm_up(&mut self, bytes: usize) -> Result<u64> {
        until_warm(|samples, samples_ns| self.calls(bytes, 1, samples, samples_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_latency_knows_runtimes_that_are_kept_awake() {
        let known = |wait| Kind::ALL.into_iter().filter(|kind| kind.supports(wait)).count();
        assert_eq!((known(Wait::Latency), known(Wait::Balanced), known(Wait::Efficient)), (9, 7, 7));
        assert!(linger(Wait::Latency) < SETTLE);
    }
}
