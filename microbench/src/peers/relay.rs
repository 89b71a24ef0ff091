//! A server with a third party behind it: each message is announced to another process through shared memory, and returned once that one
//! has said so. Nothing is looked at, queued, checked or counted: what a call costs merely because it passes three.
//!
//! The third is on the server's core, since three cannot each have one of two. (Ours is on the client's in most of `latency` and `balanced`, where
//! that is the better place: this is no lower bound.) Each hands the core to the other: by yielding for up to
//! [`SPIN_BUDGET`](crate::placement::SPIN_BUDGET) in `latency` and `balanced`, then and in `efficient` by a futex.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::event::PollFlags;
use rustix::fs::MemfdFlags;

use super::linger;
use super::stage::Stage;
use crate::end::until_ready_within;
use crate::peer::{Order, Peer};
use crate::placement::Wait;
use crate::raw::SharedPages;
use crate::turn::{FutexTurn, TURN_BYTES};

/// What it is called in rows.
pub(crate) const RELAY: &str = "relay";

/// One connection after another: a client has one for each size.
pub(super) fn serve(wait: Wait, core: usize, listener: &TcpListener) -> Result<()> {
    let memfd = rustix::fs::memfd_create("praas-relay", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memfd, TURN_BYTES as u64)?;
    let _third = Peer::spawn(&Order::Work { wait, core }, &[memfd.as_fd()])?;
    let mut turn = turn(&memfd, wait, true)?;
    loop {
        let (stream, _) = listener.accept().context("accept")?;
        stream.set_nonblocking(wait != Wait::Efficient)?;
        // A client that goes away is how a connection ends; the client notices anything else by itself.
        let _ = serve_one(wait, &mut turn, &stream);
    }
}

fn serve_one(wait: Wait, turn: &mut FutexTurn, mut stream: &TcpStream) -> std::io::Result<()> {
    let mut stage = Stage::new();
    let budget = Some(linger(wait));
    loop {
        let got = until_ready_within(budget, stream.as_fd(), PollFlags::IN, || stream.read(stage.room()))?;
        if got == 0 {
            return Ok(());
        }
        stage.received(got)?;
        let whole_bytes = stage.whole_bytes();
        if whole_bytes > 0 {
            turn.pass()?;
            turn.await_turn()?;
        }
        let mut rest = stage.whole();
        while !rest.is_empty() {
            let sent = until_ready_within(budget, stream.as_fd(), PollFlags::OUT, || stream.write(rest))?;
            rest = &rest[sent..];
        }
        stage.returned(whole_bytes);
    }
}

/// The third party: passes the turn back, for ever.
pub(crate) fn work(wait: Wait, memfd: &OwnedFd) -> Result<()> {
    let mut turn = turn(memfd, wait, false)?;
    loop {
        turn.await_turn()?;
        turn.pass()?;
    }
}

fn turn(memfd: &OwnedFd, wait: Wait, is_asker: bool) -> Result<FutexTurn> {
    let pages = SharedPages::map(memfd.as_fd(), TURN_BYTES).context("map the relay's memory")?;
    Ok(FutexTurn::sharing_a_core(pages, wait, is_asker))
}
