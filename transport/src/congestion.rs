//! Which congestion control a socket uses: chosen by name, tried on a socket, and read back from one.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::str::FromStr;

use socket2::{Domain, SockRef, Socket, Type};

/// Longest name, bytes: the kernel's `TCP_CA_NAME_MAX` without the zero that ends it.
const NAME_BYTES_MAX: usize = 15;

/// Which congestion control a connection uses.
///
/// The system's default may be bbr, which paces even loopback: 1 MiB there and back took 627 µs against 287 µs.
///
/// ```
/// use praas_transport::tcp::Congestion;
/// let reno: Congestion = "reno".parse()?;
/// reno.check()?; // every kernel has it, and lets everybody use it
/// let none: Congestion = "no-such".parse()?;
/// assert!(none.check().unwrap_err().to_string().contains("reno"), "the error says which there are");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// Reno, which every process may choose, when both ends are on this host; else the system's. The default.
    #[default]
    Auto,
    /// Whatever the system does.
    System,
    /// This one, everywhere.
    Named(CongestionName),
}

/// The name of a congestion control, as the kernel has it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CongestionName {
    bytes: [u8; NAME_BYTES_MAX],
    length: u8,
}

/// A congestion control that a socket does not take.
#[derive(Debug, thiserror::Error)]
#[error(
    "congestion control `{name}`: {source}; the kernel has {available} here, and lets everybody use {allowed} (`auto` and `system` always work)"
)]
pub struct CongestionError {
    /// The one that was asked for.
    pub name: CongestionName,
    /// What the kernel said: `NotFound` when it has none of that name, `PermissionDenied` when it takes CAP_NET_ADMIN.
    pub source: io::Error,
    /// `tcp_available_congestion_control`: those it has.
    pub available: String,
    /// `tcp_allowed_congestion_control`: of them, those that need no privilege.
    pub allowed: String,
}

impl Congestion {
    /// Whether sockets take it, by trying it on one. Only a name can be refused.
    ///
    /// # Errors
    /// The kernel's, with the names that it has.
    pub fn check(self) -> Result<(), CongestionError> {
        let Congestion::Named(name) = self else { return Ok(()) };
        let socket = |domain| Socket::new(domain, Type::STREAM, None);
        let socket = socket(Domain::IPV4).or_else(|_| socket(Domain::IPV6));
        socket.and_then(|socket| self.apply(&socket, false)).map_err(|source| CongestionError {
            name,
            source,
            available: names("tcp_available_congestion_control"),
            allowed: names("tcp_allowed_congestion_control"),
        })
    }

    /// Sets it on a socket: connected to this host or to another one, or listening for such.
    /// What is accepted has what its listener had.
    ///
    /// # Errors
    /// The kernel's: `NotFound`, `PermissionDenied`.
    pub fn apply(self, socket: &impl AsFd, on_this_host: bool) -> io::Result<()> {
        match self {
            Congestion::Auto if on_this_host => SockRef::from(socket).set_tcp_congestion(b"reno"),
            Congestion::Auto | Congestion::System => Ok(()),
            Congestion::Named(name) => SockRef::from(socket).set_tcp_congestion(name.as_bytes()),
        }
    }

    /// What a socket has, as the kernel names it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(socket: &impl AsFd) -> io::Result<String> {
        let name = SockRef::from(socket).tcp_congestion()?;
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(name).into_owned())
    }
}

/// What the kernel says of itself: names with spaces between them.
fn names(file: &str) -> String {
    match std::fs::read_to_string(format!("/proc/sys/net/ipv4/{file}")) {
        Ok(names) => format!("{} ({file})", names.trim()),
        Err(error) => format!("those of {file}, which cannot be read ({error})"),
    }
}

impl CongestionName {
    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl fmt::Display for CongestionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(str::from_utf8(self.as_bytes()).expect("a name is ASCII"))
    }
}

impl fmt::Debug for CongestionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Congestion::Auto => f.write_str("auto"),
            Congestion::System => f.write_str("system"),
            Congestion::Named(name) => name.fmt(f),
        }
    }
}

impl FromStr for Congestion {
    type Err = String;

    /// `auto`, `system`, or a name; whether the kernel has one of that name, [`Congestion::check`] finds out.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => return Ok(Congestion::Auto),
            "system" => return Ok(Congestion::System),
            _ => {}
        }
        let is_name = (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        let length = u8::try_from(text.len()).ok().filter(|_| is_name).ok_or_else(|| {
            format!("`{text}` is not a congestion control: use `auto`, `system`, or a name of the kernel's, at most {NAME_BYTES_MAX} bytes")
        })?;
        let mut bytes = [0; NAME_BYTES_MAX];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Congestion::Named(CongestionName { bytes, length }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_reads_back_as_written() {
        for text in ["auto", "system", "reno", "bbr", "fifteen-letters"] {
            assert_eq!(text.parse::<Congestion>().unwrap().to_string(), text);
        }
        for text in ["", "sixteen-letters-", "re no", "reno\0", "réno"] {
            assert!(text.parse::<Congestion>().unwrap_err().contains("`system`"), "{text}");
        }
    }

    #[test]
    fn a_name_that_the_kernel_does_not_have_is_refused_with_those_that_it_has() {
        let error = "no-such".parse::<Congestion>().unwrap().check().unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
        let available = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap();
        let said = error.to_string();
        assert!(said.contains("`no-such`") && said.contains(available.trim()), "{said}");
        for name in ["auto", "system", "reno"] {
            name.parse::<Congestion>().unwrap().check().unwrap();
        }
    }
}
