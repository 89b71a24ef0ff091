//! The application key, and the credentials made from it: 32 bytes each that nobody may read who need not.
//!
//! Whoever holds the key can make every credential, so processes and the control plane hold it, and clients hold a credential.

#![forbid(unsafe_code)]

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::str::FromStr;

use rustix::fs::OFlags;
use zeroize::{Zeroize, Zeroizing};

/// Longest name of a process or of a credential's subject, bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest file of a key or a credential that is read, bytes: the longest there can be, and some.
const FILE_BYTES_MAX: usize = 512;
/// Bytes of a key in hexadecimal.
const HEX_BYTES: usize = 64;
/// First line of a credential's file.
const CREDENTIAL_HEAD: &str = "praas-credential 1";

/// Whether `name` may name a process or a subject: 1..=64 bytes of `[A-Za-z0-9._-]`.
#[must_use]
pub fn is_name(name: &[u8]) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
}

/// Why there is no key or credential. Never says a byte of what was read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The file cannot be opened, read, or made.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The path as given.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// A link, a folder, a pipe or a device.
    #[error("{path} is not a regular file: give the path of the file itself")]
    NotAFile {
        /// The path as given.
        path: String,
    },
    /// Somebody else's file: its owner can read it.
    #[error("{path} belongs to user {owner}, and this program runs as {ours}: run `chown {ours} {path}`")]
    NotOurs {
        /// The path as given.
        path: String,
        /// Its owner.
        owner: u32,
        /// Our effective user.
        ours: u32,
    },
    /// Others may read or write it.
    #[error("{path} has mode {mode:04o}, so others can get at it: run `chmod 600 {path}`")]
    Exposed {
        /// The path as given.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// The content is not what it should be.
    #[error("{from} is not {expected}")]
    Format {
        /// Where it was read from.
        from: String,
        /// What should be there.
        expected: &'static str,
    },
    /// The name in a credential may not be one.
    #[error("a subject is 1 to 64 bytes of A-Z a-z 0-9 . _ -")]
    Subject,
    /// The system gives no random numbers.
    #[error("no random numbers: {0}")]
    NoRandom(getrandom::Error),
}

const KEY_FORMAT: &str = "a key: 64 hexadecimal digits and a newline, as `praas key new` writes them";
const CREDENTIAL_FORMAT: &str = "a credential of version 1, as `praas token` writes it";

/// 32 secret bytes. Erased when dropped; compared in constant time only where they prove something; never printed.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// These bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    /// Random bytes from the system.
    ///
    /// # Errors
    /// `NoRandom`.
    pub fn random() -> Result<Secret, SecretError> {
        let mut bytes = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *bytes).map_err(SecretError::NoRandom)?;
        Ok(Secret(*bytes))
    }

    /// Reads a key from a regular file of ours that nobody else may touch. A symbolic link is not followed.
    ///
    /// # Errors
    /// `File`, `NotAFile`, `NotOurs`, `Exposed`, `Format`.
    pub fn from_file(path: &Path) -> Result<Secret, SecretError> {
        let mut file = open_private(path)?;
        Secret::from_reader(&mut file, &path.display().to_string())
    }

    /// Reads a key from an open descriptor: whoever opened it answers for who else can. `from` names it in errors.
    ///
    /// # Errors
    /// `File`, `Format`.
    pub fn from_reader(reader: &mut impl Read, from: &str) -> Result<Secret, SecretError> {
        let text = read_bounded(reader, from)?;
        let hex = text.strip_suffix(b"\n").unwrap_or(&text);
        parse_hex(hex).ok_or_else(|| SecretError::Format { from: from.into(), expected: KEY_FORMAT })
    }

    /// Writes the key to a new file with mode 0600. What is there already stays as it is.
    ///
    /// # Errors
    /// `File`.
    pub fn write_new(&self, path: &Path) -> Result<(), SecretError> {
        let mut text = self.to_hex();
        text.push('\n');
        write_private(path, text.as_bytes())
    }

    /// 64 hexadecimal digits, erased when dropped: what a key's file holds. For handing it on through a pipe.
    #[must_use]
    pub fn to_hex(&self) -> Zeroizing<String> {
        // The whole capacity at once: a string that grows leaves pieces of the key behind.
        let mut hex = Zeroizing::new(String::with_capacity(HEX_BYTES + 1));
        for byte in self.0 {
            write!(hex, "{byte:02x}").expect("a string takes what is written");
        }
        hex
    }

    pub(super) fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What the holder of a credential is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Calls functions.
    Client = 1,
    /// A cloud process: connects to others as their equal.
    Process = 2,
    /// The control plane.
    Control = 3,
}

/// What a connection is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// To call functions.
    Invoke = 1,
    /// To be the connection between two processes.
    Peer = 2,
}

impl Role {
    /// Whether a credential of this role is good for a connection of this purpose.
    #[must_use]
    pub fn may(self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Invoke => true,
            Purpose::Peer => self == Role::Process,
        }
    }

    pub(super) fn from_wire(number: u8) -> Option<Role> {
        [Role::Client, Role::Process, Role::Control].into_iter().find(|role| *role as u8 == number)
    }
}

impl Purpose {
    pub(super) fn from_wire(number: u8) -> Option<Purpose> {
        [Purpose::Invoke, Purpose::Peer].into_iter().find(|purpose| *purpose as u8 == number)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Client => "client",
            Role::Process => "process",
            Role::Control => "control",
        })
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(text: &str) -> Result<Role, String> {
        match text {
            "client" => Ok(Role::Client),
            "process" => Ok(Role::Process),
            "control" => Ok(Role::Control),
            _ => Err(format!("`{text}` is not a role: use `client`, `process` or `control`")),
        }
    }
}

/// Proof of who somebody is: what is said of it, and a key that only those can know who were given it or hold the application's.
#[derive(Debug, Clone)]
pub struct Credential {
    role: Role,
    subject: String,
    expires_unix_s: u64,
    possession: Secret,
}

impl Credential {
    /// Makes a credential. `subject` is 1..=64 bytes of `[A-Za-z0-9._-]`; it is refused from `expires_unix_s` on.
    ///
    /// # Errors
    /// `Subject`.
    pub fn mint(app_key: &Secret, role: Role, subject: &str, expires_unix_s: u64) -> Result<Credential, SecretError> {
        if !is_name(subject.as_bytes()) {
            return Err(SecretError::Subject);
        }
        let possession = possession_key(app_key, role, subject.as_bytes(), expires_unix_s);
        Ok(Credential { role, subject: subject.to_owned(), expires_unix_s, possession })
    }

    /// What its holder is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Who its holder is.
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// When it ends, seconds since 1970.
    #[must_use]
    pub fn expires_unix_s(&self) -> u64 {
        self.expires_unix_s
    }

    pub(super) fn possession(&self) -> &Secret {
        &self.possession
    }

    /// Reads a credential from a regular file of ours that nobody else may touch. A symbolic link is not followed.
    ///
    /// # Errors
    /// `File`, `NotAFile`, `NotOurs`, `Exposed`, `Format`.
    pub fn from_file(path: &Path) -> Result<Credential, SecretError> {
        let from = path.display().to_string();
        let text = read_bounded(&mut open_private(path)?, &from)?;
        Credential::parse(&text).ok_or(SecretError::Format { from, expected: CREDENTIAL_FORMAT })
    }

    /// Writes it to a new file with mode 0600. What is there already stays as it is.
    ///
    /// # Errors
    /// `File`.
    pub fn write_new(&self, path: &Path) -> Result<(), SecretError> {
        let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX));
        let Credential { role, subject, expires_unix_s, possession } = self;
        write!(text, "{CREDENTIAL_HEAD}\nrole {role}\nsubject {subject}\nexpires {expires_unix_s}\nkey ")
            .and_then(|()| writeln!(text, "{}", *possession.to_hex()))
            .expect("a string takes what is written");
        write_private(path, text.as_bytes())
    }

    fn parse(text: &[u8]) -> Option<Credential> {
        let text = str::from_utf8(text).ok()?;
        let mut lines = text.strip_suffix('\n').unwrap_or(text).split('\n');
        let mut value = |key: &str| lines.next()?.strip_prefix(key)?.strip_prefix(' ');
        let version = value("praas-credential")?;
        let (role, subject) = (value("role")?.parse().ok()?, value("subject")?.to_owned());
        let (expires_unix_s, possession) = (value("expires")?.parse().ok()?, parse_hex(value("key")?.as_bytes())?);
        let sound = version == "1" && is_name(subject.as_bytes()) && lines.next().is_none();
        sound.then_some(Credential { role, subject, expires_unix_s, possession })
    }
}

/// The key that goes with what a credential says: with a fixed place for each field, so that no two say the same bytes.
pub(super) fn possession_key(app_key: &Secret, role: Role, subject: &[u8], expires_unix_s: u64) -> Secret {
    let mut padded = [0; NAME_BYTES_MAX];
    padded[..subject.len()].copy_from_slice(subject);
    let length = u8::try_from(subject.len()).expect("a name is at most 64 bytes");
    let mut hasher = blake3::Hasher::new_keyed(app_key.expose());
    hasher.update(b"praas credential, version 1\0");
    hasher.update(&[role as u8, length]).update(&padded).update(&expires_unix_s.to_le_bytes());
    let key = Secret(*hasher.finalize().as_bytes());
    hasher.zeroize();
    key
}

fn parse_hex(hex: &[u8]) -> Option<Secret> {
    let mut key = Zeroizing::new([0; 32]);
    if hex.len() != HEX_BYTES {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    for (byte, pair) in key.iter_mut().zip(hex.as_chunks::<2>().0) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(Secret(*key))
}

/// Opens a file for reading if it is a regular one of ours that nobody else may touch.
fn open_private(path: &Path) -> Result<File, SecretError> {
    let shown = || path.display().to_string();
    // `NONBLOCK`: the opening of a pipe would wait for its writer. The link itself is not what was checked, so it is not followed.
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).expect("flags of open fit its argument");
    let opened = File::options().read(true).custom_flags(flags).open(path);
    let file = match opened {
        Err(source) if source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Err(SecretError::NotAFile { path: shown() });
        }
        opened => opened.map_err(|source| SecretError::File { what: "open", path: shown(), source })?,
    };
    // Of the descriptor, not of the path: that may be another file by now.
    let metadata = file.metadata().map_err(|source| SecretError::File { what: "look at", path: shown(), source })?;
    if !metadata.is_file() {
        return Err(SecretError::NotAFile { path: shown() });
    }
    let ours = rustix::process::geteuid().as_raw();
    if metadata.uid() != ours {
        return Err(SecretError::NotOurs { path: shown(), owner: metadata.uid(), ours });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(SecretError::Exposed { path: shown(), mode });
    }
    Ok(file)
}

/// At most [`FILE_BYTES_MAX`], in memory that is erased.
fn read_bounded(reader: &mut impl Read, from: &str) -> Result<Zeroizing<Vec<u8>>, SecretError> {
    let mut text = Zeroizing::new(vec![0; FILE_BYTES_MAX]);
    let mut filled = 0;
    while filled < text.len() {
        match reader.read(&mut text[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(SecretError::File { what: "read", path: from.into(), source }),
        }
    }
    text.truncate(filled);
    Ok(text)
}

fn write_private(path: &Path, text: &[u8]) -> Result<(), SecretError> {
    let failed = |what| move |source| SecretError::File { what, path: path.display().to_string(), source };
    // `create_new` is O_EXCL, which does not follow a link either.
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(failed("make"))?;
    // A umask takes bits away only: what it left may be too little for ourselves.
    let private = file.set_permissions(PermissionsExt::from_mode(0o600));
    let written = private.and_then(|()| file.write_all(text)).and_then(|()| file.sync_all());
    written.map_err(|source| {
        // Half a key is worse than none, and in the way of the next attempt.
        let _ = std::fs::remove_file(path);
        failed("write")(source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn folder(name: &str) -> std::path::PathBuf {
        let folder = std::env::temp_dir().join(format!("praas-secret-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a5_a_key_reads_back_from_a_file_that_only_its_owner_may_touch() {
        let folder = folder("key");
        let (path, link) = (folder.join("key"), folder.join("link"));
        let key = Secret::random().unwrap();
        key.write_new(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(Secret::from_file(&path).unwrap().expose(), key.expose());
        assert!(key.write_new(&path).unwrap_err().to_string().contains("make"), "nothing is overwritten");

        symlink(&path, &link).unwrap();
        assert!(matches!(Secret::from_file(&link), Err(SecretError::NotAFile { .. })));
        assert!(matches!(Secret::from_file(&folder), Err(SecretError::NotAFile { .. })));
        for mode in [0o644, 0o640, 0o602, 0o610] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let error = Secret::from_file(&path).unwrap_err();
            assert!(matches!(error, SecretError::Exposed { .. }), "{error}");
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn only_64_digits_are_a_key_and_no_error_or_debug_shows_them() {
        let hex = "0123456789abcdef0123456789ABCDEF0123456789abcdef0123456789abcdef";
        for good in [hex.to_owned(), format!("{hex}\n")] {
            let key = Secret::from_reader(&mut good.as_bytes(), "a test").unwrap();
            assert_eq!(key.to_hex().as_str(), hex.to_lowercase());
            assert_eq!(format!("{key:?}"), "Secret(..)");
        }
        let long = hex.repeat(1000);
        for bad in ["", &hex[1..], &format!("{hex}0"), &format!("{hex}\n\n"), &hex.replace('a', "g"), &long] {
            let error = Secret::from_reader(&mut bad.as_bytes(), "a test").unwrap_err().to_string();
            assert!(error.contains("64 hexadecimal digits") && !error.contains("0123456789"), "{error}");
        }
    }

    #[test]
    fn a_credential_reads_back_and_a_spoilt_one_does_not() {
        let folder = folder("credential");
        let path = folder.join("credential");
        let credential = Credential::mint(&Secret::new([7; 32]), Role::Control, "plane-1", 1_800_000_000).unwrap();
        credential.write_new(&path).unwrap();
        let read = Credential::from_file(&path).unwrap();
        assert_eq!((read.role(), read.subject(), read.expires_unix_s()), (Role::Control, "plane-1", 1_800_000_000));
        assert_eq!(read.possession().expose(), credential.possession().expose());
        let hex = credential.possession().to_hex();
        assert!(!format!("{credential:?}").contains(hex.as_str()));

        let text = std::fs::read_to_string(&path).unwrap();
        for cut in 0..text.len() - 1 {
            assert!(Credential::parse(&text.as_bytes()[..cut]).is_none(), "{cut} bytes");
        }
        let spoilt =
            [("1\n", "2\n"), ("control", "root"), ("plane-1", "a/b"), ("1800000000", "soon"), ("key ", "key  ")];
        for (from, to) in spoilt {
            assert!(Credential::parse(text.replacen(from, to, 1).as_bytes()).is_none(), "{to}");
        }
        assert!(Credential::parse(format!("{text}more\n").as_bytes()).is_none());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn every_field_of_a_credential_makes_another_key() {
        let key = |k: u8, role, subject: &str, expires| {
            *Credential::mint(&Secret::new([k; 32]), role, subject, expires).unwrap().possession().expose()
        };
        let keys = [
            key(1, Role::Client, "a", 1),
            key(2, Role::Client, "a", 1),
            key(1, Role::Process, "a", 1),
            key(1, Role::Client, "b", 1),
            key(1, Role::Client, "aa", 1),
            key(1, Role::Client, "a", 2),
        ];
        for (at, one) in keys.iter().enumerate() {
            assert!(keys[at + 1..].iter().all(|other| other != one));
        }
        for subject in ["", "a b", "a/b", "\u{e9}", &"x".repeat(65)] {
            assert!(matches!(
                Credential::mint(&Secret::new([1; 32]), Role::Client, subject, 1),
                Err(SecretError::Subject)
            ));
        }
    }

    #[test]
    fn a3_only_a_process_may_be_a_peer() {
        let may = |role: Role| [Purpose::Invoke, Purpose::Peer].map(|purpose| role.may(purpose));
        assert_eq!([Role::Client, Role::Process, Role::Control].map(may), [[true, false], [true, true], [true, false]]);
    }
}
