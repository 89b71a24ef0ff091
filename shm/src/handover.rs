//! Handing over file descriptors, on a socket that both ends inherited. Memory files, eventfds and queues cross here;
//! nothing gets a name.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// Descriptors in one message: the kernel's limit (`SCM_MAX_FD`, include/net/scm.h).
pub const FDS_MAX: usize = 253;

/// Two connected sockets that keep messages apart (`SOCK_SEQPACKET`), closed on exec.
///
/// # Errors
/// Out of descriptors or memory.
pub fn socketpair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one message, whole or not at all. Never raises SIGPIPE. Blocks if the socket does.
///
/// # Errors
/// `InvalidInput` for over [`FDS_MAX`] descriptors or no bytes, else what `sendmsg` says: `BrokenPipe`, or once
/// `ConnectionReset`, when the peer has gone.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.is_empty() {
        // It could not be told from the end of the stream.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a message needs at least one byte"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if fds.len() > FDS_MAX || (!fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds))) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more descriptors than one message takes"));
    }
    let sent = loop {
        match rustix::net::sendmsg(socket, &[io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            sent => break sent?,
        }
    };
    if sent != bytes.len() {
        return Err(io::Error::new(io::ErrorKind::WriteZero, "the socket does not keep messages whole"));
    }
    Ok(())
}

/// Receives one message: its length and its descriptors, all closed on exec. `(0, [])` means that the peer has gone.
/// Blocks if the socket does.
///
/// # Errors
/// `InvalidData` if the message did not fit `buffer` or lost descriptors (those that arrived are closed), else what
/// `recvmsg` says.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let parts = &mut [io::IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            // A peer that left without reading what we sent is reported once, ahead of what it sent itself. That is still
            // there, and its end follows.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNRESET) => {}
            message => break message?,
        }
    };
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message lost bytes or descriptors on its way"));
    }
    Ok((message.bytes, fds))
}
