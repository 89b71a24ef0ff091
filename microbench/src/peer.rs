//! The other process of a floor: this program again, on another core, told what to do over a socket.
//!
//! Between blocks the peer blocks on that socket, so an idle floor costs nothing and several may be open at once. A peer that
//! serves whoever connects (`peers/`) sleeps by itself when nobody asks.
//! It dies with its parent (PDEATHSIG), and the run ends when it dies early.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};

use crate::channel::{AnyEnd, Channel};
use crate::peers::{self, Kind};
use crate::placement::Wait;
use crate::redis::{Pace, RedisEnd, Side};

/// Name of the hidden subcommand that runs a peer.
pub(crate) const SUBCOMMAND: &str = "floor-peer";

/// Most descriptors a channel gives its peer.
const FDS_MAX: usize = 4;

/// Longest order on the control socket, as JSON.
const ORDER_BYTES_MAX: usize = 1024;

/// What the parent tells the peer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// First, with the channel's descriptors.
    Join { channel: Channel, wait: Wait, core: usize, bytes_max: usize },
    /// First: answer messages that come through Redis, under keys that begin with `name`.
    JoinRedis { redis: SocketAddr, pace: Pace, wait: Wait, core: usize, name: String },
    /// Return `rounds` messages of `bytes`.
    Serve { bytes: usize, rounds: u64 },
    /// First and last, with a listening socket: serve everybody who connects there.
    Echo { kind: Kind, wait: Wait, core: usize },
    /// First and last, with the memory of a relay: pass its turn back.
    Work { wait: Wait, core: usize },
}

/// How long a peer may take to end: it notices at the end of a block.
const END_MAX: Duration = Duration::from_secs(1);

/// A running peer, seen from the parent. Dropping it ends the peer, and waits until its descriptors are closed, so that nothing of it counts
/// against the quota of queues once the next process has paused (`invoke.rs`). By itself that was not enough.
#[derive(Debug)]
pub(crate) struct Peer {
    /// `None` once it is told to end.
    control: Option<OwnedFd>,
    pid: u32,
    ended: Receiver<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.control = None;
        // In the middle of a block, after an error of ours, it ends with us.
        let _ = self.ended.recv_timeout(END_MAX);
    }
}

impl Peer {
    pub(crate) fn spawn(join: &Order, fds: &[BorrowedFd<'_>]) -> Result<Self> {
        let (control, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("socketpair")?;
        let program = std::env::current_exe().context("where is praas-bench?")?;
        let mut child = Command::new(program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .context("start the floor's second process")?;
        let pid = child.id();
        let (end, ended) = std::sync::mpsc::channel();
        // A spinning parent cannot notice a dead peer by itself, so a sleeping thread does.
        std::thread::spawn(move || match child.wait() {
            Ok(status) if status.success() => drop(end),
            ended => {
                eprintln!("error: the floor's second process ended early: {ended:?}");
                std::process::exit(crate::EXIT_FAILED.into());
            }
        });
        let peer = Self { control: Some(control), pid, ended };
        send_order(peer.control(), join, fds)?;
        peer.expect_done().context("the floor's second process did not join")?;
        Ok(peer)
    }

    fn control(&self) -> BorrowedFd<'_> {
        self.control.as_ref().expect("it is told to end when it is dropped").as_fd()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Makes the peer serve; it is polling its end when this returns.
    pub(crate) fn serve(&self, bytes: usize, rounds: u64) -> Result<()> {
        send_order(self.control(), &Order::Serve { bytes, rounds }, &[])?;
        self.expect_done()
    }

    /// Waits for the peer's one-byte acknowledgement: joined, ready to serve, or served.
    pub(crate) fn expect_done(&self) -> Result<()> {
        let mut byte = [0];
        let got = rustix::io::retry_on_intr(|| rustix::io::read(self.control(), &mut byte)).context("peer's answer")?;
        ensure!(got == 1, "the floor's second process hung up");
        Ok(())
    }
}

/// The hidden subcommand: serve until the parent hangs up.
pub(crate) fn run() -> Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    ensure!(rustix::process::getppid() == parent, "the parent is gone already");
    let control = std::io::stdin().as_fd().try_clone_to_owned()?;
    let by_hand = || format!("praas-bench {SUBCOMMAND} is started by praas-bench itself");
    let (order, fds) = receive_order(control.as_fd())?.with_context(by_hand)?;
    let (mut end, bytes_max) = match order {
        Order::Join { channel, wait, core, bytes_max } => {
            crate::placement::pin(&[core])?;
            (AnyEnd::join(channel, wait, bytes_max, fds)?, bytes_max)
        }
        Order::JoinRedis { redis, pace, wait, core, name } => {
            crate::placement::pin(&[core])?;
            (AnyEnd::Redis(RedisEnd::open(redis, wait, pace, Side::Answering, &name)?), 0)
        }
        Order::Echo { kind, wait, core } => {
            crate::placement::pin(&[core])?;
            let listener = fds.into_iter().next().context("no socket to listen on")?;
            acknowledge(&control)?;
            end_with_the_parent(control);
            return peers::serve(kind, wait, core, listener.into());
        }
        Order::Work { wait, core } => {
            crate::placement::pin(&[core])?;
            let memfd = fds.into_iter().next().context("no memory to take turns in")?;
            acknowledge(&control)?;
            end_with_the_parent(control);
            return peers::work(wait, &memfd);
        }
        Order::Serve { .. } => bail!(by_hand()),
    };
    acknowledge(&control)?;
    let mut message = Vec::with_capacity(bytes_max);
    while let Some((order, _)) = receive_order(control.as_fd())? {
        let Order::Serve { bytes, rounds } = order else { bail!("a second order to begin") };
        message.resize(bytes, 0); // faulted in before the parent starts the clock
        acknowledge(&control)?;
        end.pong(&mut message, bytes, rounds)?;
        acknowledge(&control)?;
    }
    Ok(())
}

/// This thread serves; another one sleeps until the parent hangs up.
fn end_with_the_parent(control: OwnedFd) {
    std::thread::spawn(move || {
        let _ = receive_order(control.as_fd());
        std::process::exit(0);
    });
}

fn acknowledge(control: &OwnedFd) -> Result<()> {
    rustix::io::write(control, &[1]).context("acknowledge to the parent")?;
    Ok(())
}

fn send_order(control: BorrowedFd<'_>, order: &Order, fds: &[BorrowedFd<'_>]) -> Result<()> {
    ensure!(fds.len() <= FDS_MAX, "a floor shares at most {FDS_MAX} descriptors");
    let text = serde_json::to_vec(order)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ensure!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "descriptors do not fit");
    }
    rustix::net::sendmsg(control, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL)
        .context("send an order to the floor's second process")?;
    Ok(())
}

/// `None` when the parent hung up.
fn receive_order(control: BorrowedFd<'_>) -> Result<Option<(Order, Vec<OwnedFd>)>> {
    let mut text = [0; ORDER_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(control, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    });
    let got = match received {
        Ok(received) => received.bytes,
        Err(rustix::io::Errno::NOTSOCK) => {
            bail!("praas-bench {SUBCOMMAND} is started by praas-bench itself")
        }
        Err(error) => return Err(error).context("receive an order"),
    };
    if got == 0 {
        return Ok(None);
    }
    let fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    Ok(Some((serde_json::from_slice(&text[..got]).context("order")?, fds)))
}
