//! One thread, io_uring as its authors recommend it: one issuer, task work deferred to the wait, and for each connection one
//! chain in flight, *send what is whole, then receive*, so that a message costs one `io_uring_enter`.
//!
//! A buffer is named in the ring from submission to completion and touched by nobody meanwhile: [`Connection`] says
//! when. The process ends with its ring, so none is freed under the kernel's hands.
#![allow(unsafe_code)]

use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use anyhow::{Context, Result};
use io_uring::squeue::{Entry, Flags};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, types};

use super::linger;
use super::stage::{LENGTH_BYTES, WrongLength, sizes};
use crate::placement::Wait;

/// Requests that can wait to be submitted, and answers that can wait to be read.
const ENTRIES: u32 = 1024;

/// What an answer belongs to: the listener, or a connection, with the lowest bit for its send.
const LISTENER: u64 = u64::MAX;

/// A receive that surely finds nothing at once goes to wait without looking (`IORING_RECVSEND_POLL_FIRST`).
const POLL_FIRST: u16 = 1;

struct Connection {
    stream: OwnedFd,
    /// 0 until the length is known.
    message_bytes: usize,
    /// One is received into, the other is sent from; they change places with each chain. While a chain is in flight both are
    /// the kernel's: neither is read, written, moved or freed.
    receiving: Vec<u8>,
    sending: Vec<u8>,
    filled: usize,
}

pub(super) fn serve(wait: Wait, listener: &TcpListener) -> Result<()> {
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_cqsize(4 * ENTRIES);
    let mut ring = builder.build(ENTRIES).context("set up io_uring (SINGLE_ISSUER, DEFER_TASKRUN)")?;
    push(&mut ring, &accept(listener))?;
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let linger = linger(wait);
    let mut last = Instant::now();
    loop {
        let looks_on = !linger.is_zero() && last.elapsed() < linger;
        if !looks_on {
            ring.submit_and_wait(1).context("io_uring_enter")?;
        } else if !ring.submission().is_empty() || ring.submission().taskrun() {
            // With DEFER_TASKRUN completions appear in a wait only; one for nothing returns at once.
            enter(&mut ring)?;
        }
        let mut found = false;
        while let Some(answer) = completed(&mut ring) {
            found = true;
            if answer.user_data() == LISTENER {
                let stream = u32::try_from(answer.result()).ok().context("accept")?;
                // SAFETY: the kernel just gave us this descriptor; nobody else has it.
                let stream = unsafe { OwnedFd::from_raw_fd(stream.cast_signed()) };
                let at = connections.iter().position(Option::is_none).unwrap_or(connections.len());
                if at == connections.len() {
                    connections.push(None);
                }
                chain(&mut ring, at, connections[at].insert(Connection::new(stream)), 0)?;
                if !cqueue::more(answer.flags()) {
                    push(&mut ring, &accept(listener))?;
                }
                continue;
            }
            let at = usize::try_from(answer.user_data() >> 1)?;
            let slot = connections.get_mut(at).context("an answer for no connection")?;
            let is_send = answer.user_data() & 1 == 1;
            if is_send {
                // Successful ones are silent; the receive behind a failed one is cancelled and ends the connection.
                continue;
            }
            let Some(connection) = slot else { continue };
            let Ok(got @ 1..) = usize::try_from(answer.result()) else {
                // Closed, or cancelled behind a send that failed.
                *slot = None;
                continue;
            };
            match connection.received(got) {
                Ok(whole_bytes) => chain(&mut ring, at, connection, whole_bytes)?,
                Err(_) => *slot = None,
            }
        }
        if found && !linger.is_zero() {
            last = Instant::now();
        }
    }
}

impl Connection {
    fn new(stream: OwnedFd) -> Self {
        Self { stream, message_bytes: 0, receiving: vec![0; LENGTH_BYTES], sending: Vec::new(), filled: 0 }
    }

    /// So many bytes came; how many of [`Self::sending`] are to be returned now.
    fn received(&mut self, bytes: usize) -> Result<usize, WrongLength> {
        self.filled += bytes;
        if self.message_bytes == 0 {
            if let Some(length) = self.receiving[..self.filled].first_chunk::<LENGTH_BYTES>() {
                let (message_bytes, room_bytes) = sizes(*length)?;
                self.message_bytes = message_bytes;
                (self.receiving, self.sending) = (vec![0; room_bytes], vec![0; room_bytes]);
                self.filled = 0;
            }
            return Ok(0);
        }
        let whole_bytes = self.filled / self.message_bytes * self.message_bytes;
        if whole_bytes > 0 {
            let rest = whole_bytes..self.filled;
            self.filled = rest.len();
            self.sending[..rest.len()].copy_from_slice(&self.receiving[rest]);
            std::mem::swap(&mut self.sending, &mut self.receiving);
        }
        Ok(whole_bytes)
    }
}

/// Queues the chain of a connection: send what is whole, then receive what follows.
fn chain(ring: &mut IoUring, at: usize, connection: &mut Connection, whole_bytes: usize) -> Result<()> {
    let stream = types::Fd(connection.stream.as_raw_fd());
    let user_data = (at as u64) << 1;
    if whole_bytes > 0 {
        let whole = &connection.sending[..whole_bytes];
        let send = opcode::Send::new(stream, whole.as_ptr(), u32::try_from(whole.len())?);
        let send = send.flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL).build();
        push(ring, &send.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS).user_data(user_data | 1))?;
    }
    let wants_all = connection.receiving.len() == connection.message_bytes;
    let free = &mut connection.receiving[connection.filled..];
    let mut receive = opcode::Recv::new(stream, free.as_mut_ptr(), u32::try_from(free.len())?).ioprio(POLL_FIRST);
    if wants_all {
        receive = receive.flags(libc::MSG_WAITALL);
    }
    push(ring, &receive.build().user_data(user_data))
}

fn completed(ring: &mut IoUring) -> Option<cqueue::Entry> {
    ring.completion().next()
}

/// Submits what waits and lets completions appear, without waiting for any: `submit` alone would leave the second half of a
/// chain, and what came in meanwhile, for another call.
fn enter(ring: &mut IoUring) -> Result<()> {
    let waiting = u32::try_from(ring.submission().len())?;
    // SAFETY: no argument is given, and no more entries are announced than were pushed.
    unsafe { ring.submitter().enter::<libc::sigset_t>(waiting, 0, EnterFlags::GETEVENTS.bits(), None) }
        .context("io_uring_enter")?;
    Ok(())
}

fn accept(listener: &TcpListener) -> Entry {
    opcode::AcceptMulti::new(types::Fd(listener.as_raw_fd())).build().user_data(LISTENER)
}

fn push(ring: &mut IoUring, entry: &Entry) -> Result<()> {
    // SAFETY: in bounds: an entry names part of a room of its connection, with that part's length. Unshared and unique: until
    // its completion nobody in this process reaches either room, and the connection that owns them is not dropped.
    while unsafe { ring.submission().push(entry) }.is_err() {
        ring.submit().context("io_uring_enter")?;
    }
    Ok(())
}
