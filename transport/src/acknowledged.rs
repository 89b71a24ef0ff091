//! What the kernel knows of the other end of a TCP connection: whether it still answers.
//!
//! TCP_USER_TIMEOUT would end a connection whose peer lives and does not read, too (tcp(7): it counts a closed window). This tells
//! the two apart. And how far its stream was read and written by whoever held it, which no holder can misstate.

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

/// How much of a stream was read and written by its holders, in bytes from some beginning: differences mean something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Taken from the kernel.
    pub read_bytes: u64,
    /// Given to the kernel.
    pub written_bytes: u64,
}

/// The core on which the last bytes of a connection arrived: of a sender on this host, its own (`SO_INCOMING_CPU` of socket(7)).
///
/// # Errors
/// The system's.
pub fn incoming_cpu(socket: BorrowedFd<'_>) -> io::Result<usize> {
    socket2::SockRef::from(&socket).cpu_affinity()
}

/// Asks the kernel how far a stream was moved: what arrived less what waits to be read (SIOCINQ), and what was acknowledged with what waits to
/// be (SIOCOUTQ). For a socket that nobody moves just now. Of a peer that closed, its FIN counts as a byte read.
///
/// # Errors
/// The system's, and `Interrupted` when more arrived at each of several looks.
pub(crate) fn moved(socket: BorrowedFd<'_>) -> io::Result<Moved> {
    let look = || -> io::Result<_> {
        let info = info(socket)?;
        Ok((info.tcpi_bytes_received, info.tcpi_bytes_acked))
    };
    // Bytes may arrive, and be acknowledged, between two questions.
    for _ in 0..LOOKS_MAX {
        let before = look()?;
        let (unread, unacknowledged) = (waiting(socket, libc::TIOCINQ)?, waiting(socket, libc::TIOCOUTQ)?);
        if look()? == before {
            let (received, acknowledged) = before;
            let moved = (received.checked_sub(unread), acknowledged.checked_add(unacknowledged));
            if let (Some(read_bytes), Some(written_bytes)) = moved {
                return Ok(Moved { read_bytes, written_bytes });
            }
        }
    }
    Err(io::ErrorKind::Interrupted.into())
}

const LOOKS_MAX: u32 = 16;

/// Bytes that wait in one direction (tcp(7), SIOCINQ and SIOCOUTQ).
fn waiting(socket: BorrowedFd<'_>, which: libc::Ioctl) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests write one `int`, which `bytes` is; it is ours alone; the descriptor is borrowed and so open.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), which, &raw mut bytes) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(bytes).unwrap_or(0))
}

/// Asks the kernel (tcp(7), TCP_INFO).
///
/// # Errors
/// The system's: no TCP socket, or a kernel before 4.6, which tells less.
pub(crate) fn acknowledged(socket: BorrowedFd<'_>) -> io::Result<Acknowledged> {
    let info = info(socket)?;
    Ok(Acknowledged {
        all: info.tcpi_unacked == 0 && info.tcpi_notsent_bytes == 0 && info.tcpi_probes == 0,
        in_flight: info.tcpi_unacked > 0,
        unanswered: info.tcpi_retransmits > 0 || info.tcpi_probes > 0,
        last: Duration::from_millis(info.tcpi_last_ack_recv.into()),
    })
}

fn info(socket: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
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
    Ok(unsafe { info.assume_init() })
}
