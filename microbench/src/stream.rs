//! Byte streams of the kernel: pipe, Unix stream socket, TCP over loopback.
//!
//! Question  What does a message and its echo cost over each stream, in each wait mode?
//! Measures  round trip of a message of a length both ends know (no header), not halved.
//! Load      closed loop, one message in flight; one connection, kernel's default buffers.
//! Excludes  connecting, first touch of the private buffers.
//! Checks    sequence number and last byte of every answer; the first of a block whole.
//! Baseline  TCP is the floor of a remote invocation. `TCP_NODELAY` is set and the congestion control is reno:
//!           bbr, where it is the default, paces even loopback and would make the floor look worse than it is.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::event::PollFlags;

use crate::end::{End, until_ready};
use crate::placement::Wait;

/// Reads and writes whole messages. A socket is the same file twice, a pipe pair is two files.
#[derive(Debug)]
pub(crate) struct StreamEnd {
    out: File,
    inward: File,
    wait: Wait,
}

impl StreamEnd {
    /// Sets the descriptors' blocking mode to what the wait mode needs; the mode belongs to the open file, so both
    /// ends must ask for the same.
    pub(crate) fn new(out: OwnedFd, inward: OwnedFd, wait: Wait) -> io::Result<Self> {
        let nonblocking = wait != Wait::Efficient;
        rustix::io::ioctl_fionbio(&out, nonblocking)?;
        rustix::io::ioctl_fionbio(&inward, nonblocking)?;
        Ok(Self { out: File::from(out), inward: File::from(inward), wait })
    }

    pub(crate) fn of_socket(socket: OwnedFd, wait: Wait) -> io::Result<Self> {
        let again = socket.try_clone()?;
        Self::new(socket, again, wait)
    }
}

impl End for StreamEnd {
    #[inline]
    fn send(&mut self, mut message: &[u8]) -> io::Result<()> {
        while !message.is_empty() {
            let mut out = &self.out;
            let sent = until_ready(self.wait, self.out.as_fd(), PollFlags::OUT, || out.write(message))?;
            message = &message[sent..];
        }
        Ok(())
    }

    #[inline]
    fn receive(&mut self, message: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < message.len() {
            let mut inward = &self.inward;
            let room = &mut message[filled..];
            let got = until_ready(self.wait, self.inward.as_fd(), PollFlags::IN, || inward.read(room))?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += got;
        }
        Ok(())
    }
}

/// Congestion control of every TCP connection measured here; always available on Linux.
pub(crate) const CONGESTION_CONTROL: &str = "reno";

/// Two ends of one loopback connection.
pub(crate) fn tcp_pair() -> Result<(OwnedFd, OwnedFd)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen on loopback")?;
    let ours = TcpStream::connect(listener.local_addr()?).context("connect over loopback")?;
    let (theirs, _) = listener.accept().context("accept over loopback")?;
    for stream in [&ours, &theirs] {
        stream.set_nodelay(true)?;
        socket2::SockRef::from(stream)
            .set_tcp_congestion(CONGESTION_CONTROL.as_bytes())
            .context("set TCP_CONGESTION to reno")?;
    }
    Ok((ours.into(), theirs.into()))
}
