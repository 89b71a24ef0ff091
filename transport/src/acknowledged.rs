//! What the kernel knows of the other end of a TCP connection: whether it still answers.
//!
//! TCP_USER_TIMEOUT would end a connection whose peer lives and does not read, too (tcp(7): it counts a closed window). This tells
//! the two apart.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// How far the other end's kernel has acknowledged what ours has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acknowledged {
    /// All that was written.
    pub all: bool,
    /// Something is on its way: sent, and not acknowledged yet. Not so while the other end's window is closed.
    pub in_flight: bool,
    /// Something was sent again, or a closed window asked about, and nothing came back since.
    pub unanswered: bool,
    /// Since the last acknowledgement.
    pub last: Duration,
}

/// Asks the kernel (tcp(7), TCP_INFO).
///
/// # Errors
/// The system's: no TCP socket, or a kernel before 4.6, which tells less.
pub(crate) fn acknowledged(socket: BorrowedFd<'_>) -> io::Result<Acknowledged> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let room = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).expect("a few hundred bytes");
    let mut len = room;
    // SAFETY: `info` has room for the `len` bytes that the kernel may write; it is ours alone, here and in every other process;
    // the descriptor is borrowed and so open.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut len)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let needed = std::mem::offset_of!(libc::tcp_info, tcpi_notsent_bytes) + size_of::<u32>();
    if (len as usize) < needed {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // SAFETY: zeroed above and then overwritten in part; every field is an integer, for which all bytes are valid.
    let info = unsafe { info.assume_init() };
    Ok(Acknowledged {
        all: info.tcpi_unacked == 0 && info.tcpi_notsent_bytes == 0 && info.tcpi_probes == 0,
        in_flight: info.tcpi_unacked > 0,
        unanswered: info.tcpi_retransmits > 0 || info.tcpi_probes > 0,
        last: Duration::from_millis(info.tcpi_last_ack_recv.into()),
    })
}
