//! The limits that control groups put above an OS process, version 1 and 2, read from files only.
//!
//! A limit may stand on any ancestor, and a container may see only the lower part of its own path, so every level from
//! our group up to the mount point is read and the tightest value wins. Source: `cgroups(7)`,
//! `Documentation/admin-guide/cgroup-v2.rst`, `proc_pid_mountinfo(5)`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Which file holds a limit: under a version 1 controller, and under the unified hierarchy.
#[derive(Debug, Clone, Copy)]
pub struct Knob {
    controller: &'static str,
    v1: fn(&Path, &Path) -> Option<u64>,
    v2: fn(&Path, &Path) -> Option<u64>,
}

/// CPU quota, thousandths of a core.
pub const CPU_MILLICORES: Knob = Knob {
    controller: "cpu",
    v1: |root, group| {
        let quota: i64 = number(root, group.join("cpu.cfs_quota_us"))?;
        let period: u64 = number(root, group.join("cpu.cfs_period_us"))?;
        millicores(u64::try_from(quota).ok()?, period)
    },
    v2: |root, group| {
        let text = text(root, group.join("cpu.max"))?;
        let (quota, period) = text.split_once(' ')?;
        millicores(quota.parse().ok()?, period.parse().ok()?)
    },
};

/// Memory limit, bytes. Version 1 writes "none" as a number just below 2^63, rounded to a page.
pub const MEMORY_BYTES: Knob = Knob {
    controller: "memory",
    v1: |root, group| number(root, group.join("memory.limit_in_bytes")).filter(|&bytes: &u64| bytes < 1 << 62),
    v2: |root, group| number(root, group.join("memory.max")),
};

/// Number of OS processes and threads.
pub const PIDS: Knob = Knob {
    controller: "pids",
    v1: |root, group| number(root, group.join("pids.max")),
    v2: |root, group| number(root, group.join("pids.max")),
};

fn millicores(quota_us: u64, period_us: u64) -> Option<u64> {
    (quota_us * 1000).checked_div(period_us)
}

/// A file of the tree at `root`, without surrounding white space; `None` when it cannot be read.
fn text(root: &Path, file: impl AsRef<Path>) -> Option<String> {
    let file = file.as_ref();
    let text = std::fs::read_to_string(root.join(file.strip_prefix("/").unwrap_or(file))).ok()?;
    Some(text.trim().to_owned())
}

fn number<N: FromStr>(root: &Path, file: impl AsRef<Path>) -> Option<N> {
    text(root, file)?.parse().ok()
}

/// The tightest value of `knob` over our group and its ancestors; `None` when none of them limits it. Reads a handful of
/// files below `root`, which is `/` but in tests.
#[must_use]
pub fn tightest(root: &Path, knob: Knob) -> Option<u64> {
    let mut least: Option<u64> = None;
    for Place { version, mount, group } in places(root, knob.controller)? {
        let read = if version == Version::V2 { knob.v2 } else { knob.v1 };
        for group in group.ancestors().take_while(|group| group.starts_with(&mount)) {
            if let Some(value) = read(root, group) {
                least = Some(least.map_or(value, |least| least.min(value)));
            }
        }
    }
    least
}

/// Of the control groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for each controller.
    V1,
    /// The unified hierarchy.
    V2,
}

/// Where we are in a hierarchy.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) version: Version,
    mount: PathBuf,
    /// The folder of our group.
    pub(crate) group: PathBuf,
}

/// Our places in hierarchies that may have this controller: that of version 1, and the unified one, which has it only if the first is not there.
pub(crate) fn places(root: &Path, controller: &str) -> Option<Vec<Place>> {
    let mounts = text(root, "/proc/self/mountinfo")?;
    let groups = text(root, "/proc/self/cgroup")?;
    let place = |line: &str| {
        // hierarchy-ID:controller-list:path
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let unified = controllers.is_empty();
        if !unified && !controllers.split(',').any(|name| name == controller) {
            return None;
        }
        let mut mounts = mounts.lines().filter_map(Mount::parse);
        let (mount, group) = mounts.find(|mount| mount.carries(unified, controller))?.locate(path);
        Some(Place { version: if unified { Version::V2 } else { Version::V1 }, mount, group })
    };
    Some(groups.lines().filter_map(place).collect())
}

/// The fields of one mountinfo line that matter here.
struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let mut after = after.split(' ');
        Some(Self { root: before.next()?, point: before.next()?, kind: after.next()?, options: after.nth(1)? })
    }

    fn carries(&self, unified: bool, controller: &str) -> bool {
        if unified {
            return self.kind == "cgroup2";
        }
        self.kind == "cgroup" && self.options.split(',').any(|option| option == controller)
    }

    /// The mount point, and our group below it. A path outside the mounted part (a container's view) is the mount
    /// point itself.
    fn locate(&self, path: &str) -> (PathBuf, PathBuf) {
        let point = PathBuf::from(self.point);
        let below = Path::new(path).strip_prefix(self.root).unwrap_or(Path::new(""));
        let group = point.join(below);
        (point, group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A made-up machine in a temporary folder that goes away with it.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("praas-{name}-{}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().expect("a file has a folder")).expect("folder");
                fs::write(path, text).expect("file");
            }
            Self(root)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn version_2_takes_the_tightest_of_all_ancestors() {
        let tree = Tree::new(
            "cgroup-v2",
            &[
                ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"),
                ("proc/self/cgroup", "0::/user/job\n"),
                ("sys/fs/cgroup/user/cpu.max", "150000 100000\n"),
                ("sys/fs/cgroup/user/job/cpu.max", "max 100000\n"),
                ("sys/fs/cgroup/user/memory.max", "max\n"),
                ("sys/fs/cgroup/user/job/memory.max", "1073741824\n"),
                ("sys/fs/cgroup/user/job/pids.max", "max\n"),
            ],
        );
        assert_eq!(tightest(&tree.0, CPU_MILLICORES), Some(1500));
        assert_eq!(tightest(&tree.0, MEMORY_BYTES), Some(1 << 30));
        assert_eq!(tightest(&tree.0, PIDS), None);
    }

    #[test]
    fn version_1_in_a_container_reads_the_mount_point() {
        let tree = Tree::new(
            "cgroup-v1",
            &[
                (
                    "proc/self/mountinfo",
                    "31 23 0:27 /docker/abc /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n\
                     32 23 0:28 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
                ),
                ("proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"),
                ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n"),
                ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ],
        );
        assert_eq!(tightest(&tree.0, CPU_MILLICORES), Some(500));
        assert_eq!(tightest(&tree.0, MEMORY_BYTES), None);
    }

    #[test]
    fn nonsense_is_no_limit() {
        let tree = Tree::new(
            "cgroup-odd",
            &[
                ("proc/self/mountinfo", "short\n30 23 0:26 / /cg rw - cgroup2 cgroup2 rw\n"),
                ("proc/self/cgroup", "0::/\nnot a line\n"),
                ("cg/cpu.max", "100000 0\n"),
                ("cg/pids.max", "many\n"),
            ],
        );
        assert_eq!(tightest(&tree.0, CPU_MILLICORES), None);
        assert_eq!(tightest(&tree.0, PIDS), None);
    }
}
