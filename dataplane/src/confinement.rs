//! What keeps a worker, and whatever it starts, within the memory and the number of processes it may take.
//!
//! A control group a worker, where we may make some: below the group that we are in ourselves, `praas-NAME/worker-N-LIFE`, entered by the worker before
//! its program runs. Elsewhere resource limits of each OS process, which is less: see [`Rlimits`]. Version 1 and 2; in version 2 a group with
//! controllers below it must have no members, so that we move to a leaf of our own, if nobody else is in ours.
//!
//! Groups are names that outlive us when we are killed (G5). Whoever has `praas-NAME` locked (`flock(2)` of the folder) lives; the next start in the same
//! place takes away those that nobody has locked, and nothing else. Source: `cgroups(7)`, `admin-guide/cgroup-v1/`, `admin-guide/cgroup-v2.rst`.
//!
//! Who runs as the same user as we do may undo all of it: then a worker is bound as code that errs is, not as somebody that breaks out. With
//! `worker_uids` it cannot.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use praas_shm::child::Exit;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

pub use crate::cgroup::Version;
use crate::cgroup::places;
use crate::config::{Ipc, ProcessConfig};
use crate::controller::Limit;

const MEMORY: &str = "memory";
const PIDS: &str = "pids";
/// Names of our folders begin with it.
const OURS: &str = "praas-";
/// By number: how programs end that get no memory or no thread, and how the kernel ends those that take too much.
const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;
/// Names that are tried when one is taken at the moment it is made.
const NAMES_MAX: usize = 8;
/// How much sooner than us the kernel takes a worker when memory runs out, in thousandths of all memory (`proc_pid_oom_score_adj(5)`).
const OOM_SCORE_ABOVE_US: i16 = 500;
const OOM_SCORE_MAX: i16 = 1000;

/// Bounds of one worker.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// All of it, bytes.
    memory_bytes: Option<u64>,
    /// Without its arena, bytes.
    private_bytes: Option<u64>,
    processes: Option<u32>,
}

/// How workers are bound, and the groups that there are.
#[derive(Debug)]
pub(crate) struct Confinement {
    limits: Limits,
    /// Of dead workers, with somebody in them who has not gone yet. Each was killed, and is on its way. Before what they are in: that goes last.
    leaving: Vec<Group>,
    how: How,
    oom_score_adj: i16,
}

#[derive(Debug)]
enum How {
    Unbounded,
    Groups(Vec<Tree>),
    Rlimits(Rlimits),
}

/// What each OS process of a worker is bound by: private memory (`RLIMIT_DATA`; segments are shared, and their arenas bounded by themselves), and the
/// number of processes and threads of the *user* (`RLIMIT_NPROC`): a worker's own with `worker_uids`; else so many as there were when we started, and the
/// share of every worker. Root is not bound by the second.
#[derive(Debug)]
struct Rlimits {
    user_processes_max: Option<u64>,
    /// Whether that binds nobody.
    is_root: bool,
    /// Why there are no groups.
    reason: String,
}

/// What binds the next worker.
#[derive(Debug)]
pub(crate) struct Bonds {
    pub(crate) group: Option<Group>,
    /// To enter the group by.
    pub(crate) entrances: Vec<OwnedFd>,
    pub(crate) data_bytes_max: Option<u64>,
    pub(crate) user_processes_max: Option<u64>,
    pub(crate) oom_score_adj: i16,
}

/// A worker's group, in each hierarchy that it takes.
#[derive(Debug)]
pub(crate) struct Group {
    folders: Vec<PathBuf>,
}

/// Our folder in a hierarchy.
#[derive(Debug)]
struct Tree {
    version: Version,
    controllers: Vec<&'static str>,
    /// The group that we were started in.
    own: PathBuf,
    folder: PathBuf,
    /// We are in a leaf of the folder, not in `own`.
    moved: bool,
    _lock: OwnedFd,
}

impl Confinement {
    /// Finds out what may be done here, and takes away what earlier lives have left. Some tens of file operations, none without limits.
    pub(crate) fn new(config: &ProcessConfig) -> Confinement {
        let memory_bytes = (config.worker_memory_max > 0).then_some(config.worker_memory_max);
        let arena_bytes = if config.ipc == Ipc::Ring { config.arena_bytes } else { 0 };
        let limits = Limits {
            memory_bytes,
            private_bytes: memory_bytes.map(|bytes| bytes.saturating_sub(arena_bytes)),
            processes: (config.worker_processes_max > 0).then_some(config.worker_processes_max),
        };
        let wanted: Vec<_> = [(MEMORY, limits.memory_bytes.is_some()), (PIDS, limits.processes.is_some())]
            .into_iter()
            .filter_map(|(controller, wanted)| wanted.then_some(controller))
            .collect();
        let how = if wanted.is_empty() {
            How::Unbounded
        } else {
            match trees(&wanted) {
                Ok(trees) => How::Groups(trees),
                Err(reason) => {
                    let user_processes_max = limits.processes.map(u64::from).map(|each| match config.worker_uids {
                        Some(_) => each,
                        None => users_tasks() + each * u64::from(config.workers_max),
                    });
                    let is_root = config.worker_uids.is_none() && rustix::process::geteuid().is_root();
                    How::Rlimits(Rlimits { user_processes_max, is_root, reason })
                }
            }
        };
        let ours = fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|text| text.trim().parse().ok());
        let oom_score_adj = (ours.unwrap_or(0) + OOM_SCORE_ABOVE_US).min(OOM_SCORE_MAX);
        Confinement { limits, leaving: Vec::new(), how, oom_score_adj }
    }

    /// How workers are bound, as the ready line has it; `None` when nobody asked for that.
    pub(crate) fn name(&self) -> Option<&'static str> {
        match &self.how {
            How::Unbounded => None,
            How::Groups(trees) if trees.iter().all(|tree| tree.version == Version::V2) => Some("cgroup2"),
            How::Groups(_) => Some("cgroup1"),
            How::Rlimits(_) => Some("rlimits"),
        }
    }

    /// Says what binds workers, once: what is less than it was meant to be at the level that everybody sees.
    pub(crate) fn say(&self) {
        let Limits { memory_bytes, private_bytes, processes } = self.limits;
        match &self.how {
            How::Unbounded => {}
            How::Groups(trees) => {
                let folders: Vec<_> = trees.iter().map(|tree| tree.folder.display().to_string()).collect();
                tracing::info!(?memory_bytes, ?processes, folders = folders.join(" "), "a control group a worker");
            }
            How::Rlimits(Rlimits { user_processes_max, is_root, reason }) => {
                let unbound = processes.is_some() && *is_root;
                let processes = if unbound { ", of which root may start as many as it likes" } else { "" };
                tracing::warn!(
                    reason,
                    ?private_bytes,
                    ?user_processes_max,
                    "workers are bound by limits of each OS process instead of control groups: private memory, and processes of this user{processes}"
                );
            }
        }
    }

    /// What the next worker is to be bound by.
    ///
    /// # Errors
    /// No group can be made for it: the system's.
    pub(crate) fn bonds(&self, worker: u8, incarnation: u64) -> io::Result<Bonds> {
        let mut bonds = Bonds {
            group: None,
            entrances: Vec::new(),
            data_bytes_max: None,
            user_processes_max: None,
            oom_score_adj: self.oom_score_adj,
        };
        match &self.how {
            How::Unbounded => {}
            How::Groups(trees) => {
                let mut group = Group { folders: Vec::new() };
                let entrances = trees.iter().map(|tree| {
                    let folder = tree.folder.join(format!("worker-{worker}-{incarnation}"));
                    fs::create_dir(&folder)?;
                    group.folders.push(folder.clone());
                    tree.bound(&folder, &self.limits)?;
                    Ok(OwnedFd::from(OpenOptions::new().write(true).open(folder.join("cgroup.procs"))?))
                });
                match entrances.collect::<io::Result<_>>() {
                    Ok(entrances) => bonds.entrances = entrances,
                    Err(error) => {
                        group.end();
                        return Err(error);
                    }
                }
                bonds.group = Some(group);
            }
            How::Rlimits(rlimits) => {
                bonds.data_bytes_max = self.limits.private_bytes;
                bonds.user_processes_max = rlimits.user_processes_max;
            }
        }
        Ok(bonds)
    }

    /// Which limit a worker died of that ended like that, as far as it shows.
    pub(crate) fn limit_of(&self, group: Option<&Group>, exit: Exit) -> Option<Limit> {
        let Limits { memory_bytes, private_bytes, processes } = self.limits;
        match (&self.how, exit) {
            (How::Groups(_), Exit::Signal(SIGKILL)) if group?.counts(&OOM_KILLS) > 0 => {
                memory_bytes.map(|bytes| Limit::Memory { bytes })
            }
            // It was not killed, so that it ended itself; as programs do that get no thread.
            (How::Groups(_), Exit::Code(1..) | Exit::Signal(SIGABRT)) if group?.counts(&REFUSED_FORKS) > 0 => {
                processes.map(|processes_max| Limit::Processes { processes_max })
            }
            (How::Rlimits(_), Exit::Signal(SIGABRT)) => private_bytes.map(|bytes| Limit::Private { bytes }),
            _ => None,
        }
    }

    /// Kills whoever is left in a dead worker's group, and takes it away, now or when they have gone.
    pub(crate) fn bury(&mut self, group: Option<Group>) {
        if let Some(mut group) = group
            && !group.end()
        {
            self.leaving.push(group);
        }
    }

    /// Takes away groups that could not be taken away before. True while there are some.
    pub(crate) fn end_leaving(&mut self) -> bool {
        self.leaving.retain_mut(|group| !group.end());
        !self.leaving.is_empty()
    }
}

/// A number in a group that tells how often something happened: the files it may be in, and its name there.
type Counter = (&'static [&'static str], &'static str);
/// Version 2, and 1 (Linux 4.13).
const OOM_KILLS: Counter = (&["memory.events", "memory.oom_control"], "oom_kill");
const REFUSED_FORKS: Counter = (&["pids.events"], "max");

impl Group {
    fn counts(&self, (files, name): &Counter) -> u64 {
        let paths = self.folders.iter().flat_map(|folder| files.iter().map(|file| folder.join(file)));
        let numbers = paths.filter_map(|path| {
            let text = fs::read_to_string(path).ok()?;
            text.lines().find_map(|line| line.strip_prefix(*name)?.strip_prefix(' ')?.trim().parse::<u64>().ok())
        });
        numbers.sum()
    }

    /// Kills its members and takes it away. Whether it is gone.
    fn end(&mut self) -> bool {
        self.folders.retain(|folder| !end_folder(folder));
        self.folders.is_empty()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A worker that was never started, or a process that ends: nobody comes back for it.
        self.end();
    }
}

/// Kills the members of a group and of those below it, and takes them all away. Whether that is done.
fn end_folder(folder: &Path) -> bool {
    // By the kernel at once (Linux 5.14), or one by one: then who forks meanwhile is found the next time.
    if write(&folder.join("cgroup.kill"), "1").is_err() {
        kill_members(folder);
    }
    for below in fs::read_dir(folder).into_iter().flatten().flatten() {
        if below.file_type().is_ok_and(|kind| kind.is_dir()) {
            end_folder(&below.path());
        }
    }
    match fs::remove_dir(folder) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn kill_members(folder: &Path) {
    let found = members(folder);
    let held: Vec<_> = found
        .into_iter()
        .filter_map(|pid| Some((pid, rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?)))
        .collect();
    // A number may have become another's before we held it; who is a member now is whom we hold, or that one has died since.
    let still = members(folder);
    for (_, pidfd) in held.iter().filter(|(pid, _)| still.contains(pid)) {
        let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    }
}

fn members(folder: &Path) -> Vec<Pid> {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect()
}

/// Writes to a file that is there.
fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

/// A folder of ours in each hierarchy that has one of these controllers.
fn trees(wanted: &[&'static str]) -> Result<Vec<Tree>, String> {
    let mut homes: Vec<(Version, PathBuf, Vec<&'static str>)> = Vec::new();
    for &controller in wanted {
        let (version, own) = home(controller)?;
        match homes.iter_mut().find(|(_, path, _)| *path == own) {
            Some((_, _, controllers)) => controllers.push(controller),
            None => homes.push((version, own, vec![controller])),
        }
    }
    homes.into_iter().map(|(version, own, controllers)| Tree::plant(version, own, controllers)).collect()
}

/// Our group in the hierarchy that has this controller.
fn home(controller: &str) -> Result<(Version, PathBuf), String> {
    let has = |group: &Path| {
        let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
        controllers.split_whitespace().any(|name| name == controller)
    };
    let mut places = places(Path::new("/"), controller).unwrap_or_default().into_iter();
    let place = places.find(|place| place.version == Version::V1 || has(&place.group));
    place
        .map(|place| (place.version, place.group))
        .ok_or_else(|| format!("no control group hierarchy that we see has the {controller} controller"))
}

/// Whether control groups can be made here, by making some and taking them away; of what version they are. Of version 2 the last step is
/// looked at and not made: it would move us.
///
/// # Errors
/// Why not.
pub fn trial() -> Result<Version, String> {
    let mut latest = Version::V1;
    for controller in [MEMORY, PIDS] {
        let (version, own) = home(controller)?;
        match version {
            Version::V1 => drop(Tree::plant(version, own, vec![controller])?),
            Version::V2 => {
                latest = Version::V2;
                let folder = own.join(format!("{OURS}trial-{}", std::process::id()));
                fs::create_dir(&folder).map_err(|error| cannot("make a group in", &own, &error))?;
                let _ = fs::remove_dir(&folder);
                let below = fs::read_to_string(own.join("cgroup.subtree_control")).unwrap_or_default();
                if !below.split_whitespace().any(|name| name == controller) && members(&own).len() > 1 {
                    return Err(not_alone(&own));
                }
            }
        }
    }
    Ok(latest)
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> String {
    format!("cannot {what} {}: {error}", path.display())
}

fn not_alone(own: &Path) -> String {
    format!(
        "others are in the control group {}, which then may have none below it: start praas-process in one of its own, \
         as `systemd-run --scope -p Delegate=yes` does",
        own.display()
    )
}

impl Tree {
    fn plant(version: Version, own: PathBuf, controllers: Vec<&'static str>) -> Result<Tree, String> {
        sweep(&own);
        let (folder, lock) = make_locked(&own).map_err(|error| cannot("make a group in", &own, &error))?;
        let mut tree = Tree { version, controllers, own, folder, moved: false, _lock: lock };
        if version == Version::V2 {
            tree.let_controllers_down()?;
        }
        // What takes the limits is there, or the first worker would find out.
        let trial = tree.folder.join("trial");
        fs::create_dir(&trial).map_err(|error| cannot("make a group in", &tree.folder, &error))?;
        let highest = Limits { memory_bytes: Some(1 << 46), private_bytes: None, processes: Some(1 << 22) };
        let bounded = tree.bound(&trial, &highest).map_err(|error| cannot("set the limits of", &trial, &error));
        let _ = fs::remove_dir(&trial);
        bounded.map(|()| tree)
    }

    /// Version 2: what is below us may have limits. Nobody is in a group above such, so that we step aside into one of our own.
    fn let_controllers_down(&mut self) -> Result<(), String> {
        let each: Vec<_> = self.controllers.iter().map(|controller| format!("+{controller}")).collect();
        let (all, file) = (each.join(" "), "cgroup.subtree_control");
        if let Err(error) = write(&self.own.join(file), &all) {
            if error.raw_os_error() != Some(rustix::io::Errno::BUSY.raw_os_error()) {
                return Err(cannot("let controllers down from", &self.own, &error));
            }
            if members(&self.own).len() > 1 {
                return Err(not_alone(&self.own));
            }
            let leaf = self.folder.join("controller");
            fs::create_dir(&leaf).map_err(|error| cannot("make a group in", &self.folder, &error))?;
            self.moved = true;
            write(&leaf.join("cgroup.procs"), "0").map_err(|error| cannot("enter", &leaf, &error))?;
            write(&self.own.join(file), &all)
                .map_err(|error| cannot("let controllers down from", &self.own, &error))?;
        }
        write(&self.folder.join(file), &all).map_err(|error| cannot("let controllers down from", &self.folder, &error))
    }

    /// Bounds what will be in a group.
    fn bound(&self, folder: &Path, limits: &Limits) -> io::Result<()> {
        let set = |file: &str, value: &str| write(&folder.join(file), value);
        let may = |file: &str, value: &str| match set(file, value) {
            // Kernels without swap accounting, or older ones, have no such file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        };
        for controller in &self.controllers {
            match (*controller, self.version) {
                (MEMORY, version) => {
                    let Some(bytes) = limits.memory_bytes.map(|bytes| bytes.to_string()) else { continue };
                    if version == Version::V2 {
                        set("memory.max", &bytes)?;
                        // Who is out of memory is not to crawl on from a disk.
                        may("memory.swap.max", "0")?;
                        // A worker without what it started, or the other way round, is of no use.
                        may("memory.oom.group", "1")?;
                    } else {
                        set("memory.limit_in_bytes", &bytes)?;
                        may("memory.memsw.limit_in_bytes", &bytes)?;
                    }
                }
                _ => {
                    let Some(processes) = limits.processes else { continue };
                    set("pids.max", &processes.to_string())?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if self.moved {
            let each: Vec<_> = self.controllers.iter().map(|controller| format!("-{controller}")).collect();
            for group in [&self.folder, &self.own] {
                let _ = write(&group.join("cgroup.subtree_control"), &each.join(" "));
            }
            let _ = write(&self.own.join("cgroup.procs"), "0");
            let _ = fs::remove_dir(self.folder.join("controller"));
        }
        // Somebody may be on the way out of it: the next start takes it away then.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// A folder of a name that nobody has, locked before anybody can take it for one that was left.
fn make_locked(own: &Path) -> io::Result<(PathBuf, OwnedFd)> {
    let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
    for _ in 0..NAMES_MAX {
        let mut name = [0; 8];
        getrandom::fill(&mut name).map_err(io::Error::other)?;
        let folder = own.join(format!("{OURS}{:016x}", u64::from_le_bytes(name)));
        fs::create_dir(&folder)?;
        match lock(&folder) {
            // A sweep may have come in between; then it is no more.
            Ok(lock) if folder.is_dir() => return Ok((folder, lock)),
            Ok(_) => {}
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn lock(folder: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

/// Takes away what processes of this user have left that live no more, and ends who is still in there: children of their workers.
fn sweep(own: &Path) {
    for entry in fs::read_dir(own).into_iter().flatten().flatten() {
        let folder = entry.path();
        let is_ours = entry.file_name().to_string_lossy().starts_with(OURS)
            && entry.metadata().is_ok_and(|stat| stat.is_dir() && stat.uid() == rustix::process::geteuid().as_raw());
        if is_ours && let Ok(_lock) = lock(&folder) {
            tracing::info!(folder = %folder.display(), "taking away the control groups of a process that is gone");
            // Who was killed takes a moment to go; what is left then is the next start's.
            for _ in 0..10 {
                if end_folder(&folder) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
}

/// Processes and threads of our user.
fn users_tasks() -> u64 {
    let uid = rustix::process::getuid().as_raw();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().filter(|entry| {
        entry.file_name().to_string_lossy().parse::<u32>().is_ok()
            && entry.metadata().is_ok_and(|stat| stat.uid() == uid)
    });
    processes.map(|entry| fs::read_dir(entry.path().join("task")).map_or(0, |tasks| tasks.count() as u64)).sum()
}
