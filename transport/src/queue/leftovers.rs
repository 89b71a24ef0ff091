//! Names of queues that nobody will use: a process was killed in the microseconds in which a queue of its has a name. Such a queue
//! counts towards `RLIMIT_MSGQUEUE` of its user until it is removed or the machine is started anew.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::NAME_PREFIX;

/// A name that is older is in nobody's hands: it takes microseconds to open a queue twice. One that is removed too early costs its maker
/// an error and no more, and so there is no lock to be taken.
const OLD: Duration = Duration::from_secs(10);
/// Names looked at: who may make queues may make many.
const NAMES_MAX: usize = 65_536;

/// Removes what killed processes of this user left: queues with names of ours that are older than ten seconds. How many.
///
/// Does not block. Sees nothing where no mqueue file system is mounted on `/dev/mqueue` and this process may not mount one for itself;
/// what cannot be removed stays, as this is nobody's task in particular.
pub fn sweep() -> usize {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    queues().map_or(0, |folder| sweep_folder(folder, now).unwrap_or(0))
}

/// The folder of all queues of this IPC namespace.
fn queues() -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mounted = rustix::fs::openat(CWD, "/dev/mqueue", flags, Mode::empty());
    if let Ok(folder) = mounted
        && rustix::fs::fstatfs(&folder)?.f_type == MQUEUE_MAGIC
    {
        return Ok(folder);
    }
    // A mount that stands nowhere and goes with its descriptor.
    let fs = rustix::mount::fsopen("mqueue", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(fs.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let root = rustix::mount::fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    rustix::fs::openat(&root, ".", flags, Mode::empty())
}

/// Source: statfs(2).
const MQUEUE_MAGIC: rustix::fs::FsWord = 0x1980_0202;

fn sweep_folder(folder: OwnedFd, now: Duration) -> rustix::io::Result<usize> {
    let user = rustix::process::geteuid().as_raw();
    let mut removed = 0;
    for entry in Dir::read_from(&folder)?.take(NAMES_MAX) {
        let entry = entry?;
        let name = entry.file_name();
        if !is_ours(name) {
            continue;
        }
        // It may be gone, or somebody else's.
        let Ok(stat) = rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let is_queue = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let used = Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
        let is_old = now.checked_sub(used).is_some_and(|age| age > OLD);
        if is_queue && stat.st_uid == user && is_old {
            removed += usize::from(rustix::fs::unlinkat(&folder, name, AtFlags::empty()).is_ok());
        }
    }
    Ok(removed)
}

/// Whether a name, without the slash, is one that `create` gives.
fn is_ours(name: &CStr) -> bool {
    let digits = name.to_bytes().strip_prefix(NAME_PREFIX.as_bytes());
    digits.is_some_and(|digits| {
        digits.len() == 32 && digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::super::{QueueConfig, mq_create, mq_open, mq_unlink};
    use super::*;

    /// C3: what a killed process left is removed; what is fresh, named otherwise or another user's stays.
    #[test]
    fn c3_old_names_of_ours_are_removed_and_no_others() {
        let Ok(folder) = queues() else {
            return println!("skipped: needs /dev/mqueue mounted, or the right to mount");
        };
        let digits = format!("{:032x}", std::process::id());
        let named = |prefix: &str| std::ffi::CString::new(format!("/{prefix}{digits}")).expect("no zero byte");
        let [old, fresh, other] = [named("praas-"), named("praas-f"), named("other-")];
        // 32 digits again.
        let fresh = std::ffi::CString::new(&fresh.to_bytes()[..old.to_bytes().len()]).expect("no zero byte");
        let made =
            [&old, &fresh, &other].map(|name| mq_create(name, &QueueConfig { messages: 1, ..QueueConfig::default() }));
        let at = |name: &CStr| CStr::from_bytes_with_nul(&name.to_bytes_with_nul()[1..]).expect("a name").to_owned();
        let stat = |name: &CStr| rustix::fs::statat(&folder, at(name), AtFlags::empty());
        let now = Duration::from_secs(u64::try_from(stat(&old).expect("it was made").st_mtime).expect("after 1970"));
        // Ten seconds on, but the fresh one was used since.
        let later = now + OLD + Duration::from_secs(5);
        let used = rustix::fs::Timespec { tv_sec: later.as_secs().cast_signed(), tv_nsec: 0 };
        let times = rustix::fs::Timestamps { last_access: used, last_modification: used };
        rustix::fs::utimensat(&folder, at(&fresh), &times, AtFlags::empty()).expect("it is ours");
        let dup = || folder.try_clone().expect("a descriptor");
        assert_eq!(sweep_folder(dup(), now), Ok(0), "nothing is old yet");
        assert_eq!(sweep_folder(dup(), later), Ok(1));
        assert!(mq_open(&old).is_err(), "it is still there");
        for name in [&fresh, &other] {
            mq_open(name).expect("it stays");
            mq_unlink(name).expect("it is ours");
        }
        drop(made);
    }

    #[test]
    fn a_name_of_ours_is_a_prefix_and_32_digits() {
        let digits = "0123456789abcdef0123456789abcdef";
        for (name, ours) in [
            (format!("praas-{digits}"), true),
            (format!("praas-{}", &digits[1..]), false),
            (format!("praas-{digits}0"), false),
            (format!("praas_{digits}"), false),
            (format!("praas-{}G", &digits[1..]), false),
            (digits.to_owned(), false),
        ] {
            assert_eq!(is_ours(&std::ffi::CString::new(name.clone()).expect("no zero byte")), ours, "{name}");
        }
    }
}
