//! What a process makes can be reached by nobody else, whatever the umask (A6), and nothing that somebody planted is followed, opened or
//! overwritten (A7).
#![allow(clippy::cast_possible_truncation, reason = "modes are cut to their bits")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use praas_dataplane::clock::unix_s;
use praas_dataplane::{Client, ClientConfig, Credential, Ipc, LaunchConfig, LaunchKey, LocalProcess, Role, Secret};
use rustix::fs::SealFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use support::{
    PATIENCE, children, content, launch_config, lives, on_both_channels, process_program, run_process, signal,
    start_with, test_worker, wait_until,
};

/// A folder of ours in the one of everybody's; goes with all that is in it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let folder = std::env::temp_dir().join(format!("praas-permissions-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).expect("a folder");
        Folder(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A program that starts `praas-process` with an umask that takes nothing away, behind `before` if that is not empty.
fn under_umask_0(folder: &Folder, before: &str) -> PathBuf {
    let script = folder.path("start");
    let text = format!("#!/bin/sh\numask 000\nexec {before} {} \"$@\"\n", process_program());
    fs::write(&script, text).expect("a script");
    fs::set_permissions(&script, PermissionsExt::from_mode(0o700)).expect("ours");
    script
}

/// A program that starts `praas-process` as a user without rights; as ours if that is one. `None` where that user cannot run it.
fn as_nobody(folder: &Folder) -> Option<PathBuf> {
    const NOBODY: &str = "setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs";
    if !rustix::process::geteuid().is_root() {
        return Some(under_umask_0(folder, ""));
    }
    let runs = |program: &str| Command::new("sh").arg("-c").arg(format!("exec {NOBODY} test -x {program}")).status();
    let may =
        [process_program(), test_worker()].iter().all(|program| runs(program).is_ok_and(|status| status.success()));
    may.then(|| under_umask_0(folder, NOBODY))
}

/// What a function on each of two workers can have of the process and of the other worker.
fn pried(config: &LaunchConfig) -> Vec<String> {
    let (process, mut client) = start_with(&LaunchConfig { workers: 2, workers_max: 2, ..config.clone() });
    let workers = children(process.pid());
    assert_eq!(workers.len(), 2);
    let mut had = Vec::new();
    for pid in [process.pid(), workers[0], workers[1]] {
        let answer = client.invoke("pry", pid.to_string().as_str()).expect("an answer");
        had.push(String::from_utf8_lossy(&answer).into_owned());
    }
    had
}

/// R6, G4: with `--isolate` no worker gets at the memory or the descriptors of the process or of another, although they run as one user.
#[test]
fn r6_isolated_workers_cannot_reach_into_each_other_or_the_process() {
    on_both_channels(|ipc| {
        let folder = Folder::new(&format!("isolated-{ipc}"));
        let Some(program) = as_nobody(&folder) else {
            return println!("skipped: needs setpriv, and programs that user 65534 may run");
        };
        let mut config = LaunchConfig { process_binary: Some(program), ..launch_config(ipc) };
        let open = pried(&config);
        assert!(
            open.iter().all(|had| had.contains("memory") && had.contains("descriptor")),
            "this shows nothing: {open:?}"
        );
        // What is sealed is sealed, for whoever has it (R5).
        assert!(open.iter().all(|had| !had.contains("written") && !had.contains("cut")), "{open:?}");
        config.args.push("--isolate".into());
        let isolated = pried(&config);
        assert!(isolated.iter().all(|had| had == "signal"), "{isolated:?}");
    });
}

/// R6, G4: workers that are users of their own cannot even signal each other or the process; they serve, die and are replaced as others do.
#[test]
fn r6_workers_with_users_of_their_own_reach_nobody() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: needs root");
    }
    on_both_channels(|ipc| {
        let mut config = launch_config(ipc);
        config.args.push("--worker-uids=70000".into());
        let had = pried(&config);
        assert!(had.iter().all(String::is_empty), "{had:?}");
        let (process, mut client) = start_with(&LaunchConfig { workers: 2, workers_max: 2, ..config });
        let uids = |pid: u32| fs::metadata(format!("/proc/{pid}")).map(|data| (data.uid(), data.gid()));
        let users: BTreeSet<_> = children(process.pid()).into_iter().map(|pid| uids(pid).expect("it lives")).collect();
        assert_eq!(users, BTreeSet::from([(70_001, 70_001), (70_002, 70_002)]));
        assert!(*client.invoke("echo", content(1, 1 << 20)).expect("an answer") == *content(1, 1 << 20));
        client.invoke("leased", b"echo").expect("an answer");
        let victim = children(process.pid())[0];
        signal(victim, 9);
        wait_until("it is replaced", PATIENCE, || {
            let now = children(process.pid());
            !now.contains(&victim) && now.into_iter().filter(|pid| lives(*pid)).count() == 2
        });
        client.invoke("leased", b"echo").expect("an answer");
        let workers = children(process.pid());
        signal(process.pid(), 9);
        wait_until("nobody is left", PATIENCE, || workers.iter().all(|pid| !lives(*pid)));
    });
}

/// Inodes of Unix sockets that have a name, in the file system or abstract.
fn named_sockets() -> BTreeSet<u64> {
    let list = fs::read_to_string("/proc/net/unix").expect("Linux");
    let words = list.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    words.filter(|words| words.len() > 7).filter_map(|words| words[6].parse().ok()).collect()
}

/// What each descriptor of an OS process is, each checked to be of no use to anybody else; how many of each kind.
fn check_descriptors(pid: u32, kinds: &mut BTreeSet<&'static str>) {
    let process = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("not zero");
    let process = pidfd_open(process, PidfdFlags::empty()).expect("it lives");
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("it is ours").flatten() {
        let link = fs::read_link(entry.path()).unwrap_or_default().display().to_string();
        let number = entry.file_name().to_string_lossy().parse().expect("a number");
        // Closed meanwhile, or standard streams, which are those of this test.
        let Ok(fd) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else { continue };
        let stat = rustix::fs::fstat(&fd).expect("a descriptor");
        let mode = stat.st_mode & 0o7777;
        let what = format!("descriptor {number} of {pid}, {link}, mode {mode:04o}");
        if let Some(name) = link.strip_prefix("/memfd:") {
            assert_eq!(mode, 0o600, "{what}");
            let seals = rustix::fs::fcntl_get_seals(&fd).expect("a memory file");
            let mut wanted = SealFlags::SHRINK | SealFlags::GROW;
            // An exchange page is written by both its ends, for as long as they have it.
            if name.starts_with("praas-segment") || name.starts_with("praas-index") {
                wanted |= SealFlags::FUTURE_WRITE | SealFlags::SEAL;
            }
            assert!(seals.contains(wanted), "{what} lacks {:?}", wanted - seals);
            assert_eq!(stat.st_nlink, 0, "{what}");
            kinds.insert("memory");
        } else if link.starts_with("/praas-") {
            assert!(mode == 0o600 && stat.st_nlink == 0 && link.ends_with("(deleted)"), "{what}");
            kinds.insert("queue");
        } else if link.starts_with("socket:") {
            assert!(!named_sockets().contains(&stat.st_ino), "{what} has a name");
            kinds.insert("socket");
        } else if link.starts_with("anon_inode:") {
            kinds.insert("anonymous");
        } else if link.starts_with("pipe:") {
            assert!(mode == 0o600, "{what}");
            kinds.insert("pipe");
        } else {
            assert!(["/dev/null", "/dev/cpu_dma_latency"].contains(&link.as_str()), "{what}: a file");
        }
    }
}

#[test]
fn a6_nothing_that_a_process_has_open_is_open_to_others_under_an_umask_of_0() {
    on_both_channels(|ipc| {
        let folder = Folder::new(&format!("umask-{ipc}"));
        let key = Secret::new([1; 32]);
        let credential = Credential::mint(&key, Role::Client, "a6", unix_s() + 3600).expect("a name");
        let config = LaunchConfig {
            process_binary: Some(under_umask_0(&folder, "")),
            key: Some(LaunchKey::Pipe(Arc::new(key))),
            workers: 2,
            workers_max: 3,
            ..launch_config(ipc)
        };
        let process = LocalProcess::start(&config).expect("it starts");
        let config = ClientConfig { credential: Some(credential), ..ClientConfig::default() };
        let mut client = Client::connect(process.addr(), &config).expect("it listens");
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("it lives");
        assert!(status.lines().any(|line| line == "Umask:\t0000"), "{status}");
        // Payloads in blocks, and a lease, for all there is to be open.
        assert!(*client.invoke("echo", content(1, 3 << 20)).expect("an answer") == *content(1, 3 << 20));
        client.invoke("leased", b"echo").expect("an answer");
        let pids = [&[process.pid()][..], &children(process.pid())].concat();
        assert!(pids.len() >= 3, "{pids:?}");
        if fs::read_dir(format!("/proc/{}/fd", process.pid())).is_err() {
            return println!("skipped: a look into a process with a key: needs CAP_SYS_PTRACE");
        }
        let mut kinds = BTreeSet::new();
        pids.iter().for_each(|pid| check_descriptors(*pid, &mut kinds));
        // The look was no empty one.
        let memory = if ipc == Ipc::Ring { "memory" } else { "queue" };
        assert!(["anonymous", "socket", memory].iter().all(|kind| kinds.contains(kind)), "{ipc}: {kinds:?}");
    });
}

/// What makes a name, or opens a file to write to it, of all that a process and its workers ask of the kernel; and how each ended.
#[test]
fn a6_a7_no_name_is_made_but_a_queues_which_is_private_new_and_gone_at_once() {
    if Command::new("strace").arg("-V").output().is_err() {
        return println!("skipped: needs strace");
    }
    on_both_channels(|ipc| {
        let folder = Folder::new(&format!("names-{ipc}"));
        let trace = folder.path("trace");
        // `mq_open` is of no class of strace's; so are `bind` and `mknod` of Unix sockets and pipes.
        let calls = "%file,mq_open,mq_unlink,bind,fchmod,memfd_create";
        let before = format!("strace -f -qq -s 200 -e trace={calls} -o {}", trace.display());
        let config =
            LaunchConfig { process_binary: Some(under_umask_0(&folder, &before)), workers: 2, ..launch_config(ipc) };
        let (process, mut client) = start_with(&config);
        assert!(*client.invoke("echo", content(1, 1 << 20)).expect("an answer") == *content(1, 1 << 20));
        client.invoke("leased", b"echo").expect("an answer");
        drop(client);
        // strace takes no signal for what it traces, and ends with it.
        signal(children(process.pid())[0], 15);
        assert!(process.stop().expect("it ends").success());
        let trace = fs::read_to_string(trace).expect("strace wrote it");
        let makes =
            ["mkdir", "mknod", "symlink", "link(", "linkat(", "rename", "creat(", "O_CREAT", "O_TMPFILE", "chmod(\""];
        let mut queues = BTreeSet::new();
        let mut memory = 0;
        for line in trace.lines() {
            // `PID call(arguments) = result`
            let call = line.split_once(' ').map_or(line, |(_, call)| call.trim_start());
            let name = || call.split('"').nth(1).unwrap_or_default().to_owned();
            if call.starts_with("mq_open(") && call.contains("O_CREAT") {
                assert!(call.contains("O_EXCL") && call.contains(", 0600,"), "{line}");
                assert!(name().len() > 30, "a name that can be guessed: {line}");
                assert!(queues.insert(name()), "twice: {line}");
            } else if call.starts_with("mq_open(") {
                assert!(queues.contains(&name()), "somebody else's: {line}");
            } else if call.starts_with("mq_unlink(") {
                assert!(queues.remove(&name()), "somebody else's: {line}");
            } else if call.starts_with("bind(") {
                assert!(!call.contains("AF_UNIX"), "{line}");
            } else if call.starts_with("memfd_create(") {
                memory += 1;
            } else if call.starts_with("fchmod(") {
                assert!(call.contains(", 0600"), "{line}");
            } else {
                assert!(!makes.iter().any(|word| call.contains(word)), "a name is made: {line}");
                // What is written to and is not new: /dev/null, /dev/cpu_dma_latency, and files of /proc.
                let writes = call.contains("O_WRONLY") || call.contains("O_RDWR");
                assert!(!writes || name().starts_with("/dev/") || name().starts_with("/proc/"), "{line}");
            }
        }
        assert!(queues.is_empty(), "left behind: {queues:?}");
        let seen = if ipc == Ipc::Ring { memory > 0 } else { trace.contains("mq_unlink") };
        assert!(seen, "this trace shows nothing");
    });
}

/// Somebody else, who shares a folder with us. `None`, and a line that says so, where we may not act for them.
fn somebody_else(path: &Path) -> Option<u32> {
    const NOBODY: u32 = 65_534;
    fs::write(path, b"").expect("a file");
    let ours = chown(path, Some(NOBODY), None).is_ok();
    fs::remove_file(path).expect("ours to remove");
    if !ours {
        println!("skipped: planting files as somebody else: needs root");
    }
    ours.then_some(NOBODY)
}

fn refused(key_file: &Path, words: &[&str]) {
    let begun = Instant::now();
    let output = run_process(&["--worker", &test_worker(), "--key-file", &key_file.display().to_string()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{}: {said}", key_file.display());
    assert!(begun.elapsed() < Duration::from_secs(5), "it waited for what was planted");
    let last = said.lines().last().unwrap_or_default();
    assert!(words.iter().all(|word| last.contains(word)), "{words:?}: {said}");
}

#[test]
fn a7_a_key_that_somebody_planted_is_refused_and_said_what_it_is() {
    let folder = Folder::new("planted");
    let key = folder.path("key");
    Secret::new([1; 32]).write_new(&key).expect("a key");
    // A link of our own to our own key is refused as well: what it says can change between two looks.
    let link = folder.path("link");
    symlink(&key, &link).expect("a link");
    refused(&link, &["link", "not a regular file", "the file itself"]);
    symlink(folder.path("nothing"), folder.path("dangling")).expect("a link");
    refused(&folder.path("dangling"), &["dangling", "not a regular file"]);
    // The opening of a pipe waits for somebody who writes; nobody does.
    let pipe = folder.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).expect("a pipe");
    refused(&pipe, &["pipe", "not a regular file"]);
    refused(&folder.0, &["not a regular file"]);
    let Some(nobody) = somebody_else(&folder.path("probe")) else { return };
    let theirs = folder.path("theirs");
    Secret::new([2; 32]).write_new(&theirs).expect("a key");
    chown(&theirs, Some(nobody), None).expect("root may");
    refused(&theirs, &["theirs", "65534", "chown"]);
    // Another name of their file is still their file.
    fs::hard_link(&theirs, folder.path("hard")).expect("root may");
    refused(&folder.path("hard"), &["hard", "65534", "chown"]);
}

/// While somebody puts one file after the other under the name that we read: what was checked is what is read.
#[test]
fn a7_a_key_file_exchanged_while_it_is_read_is_ours_or_refused() {
    let folder = Folder::new("exchanged");
    let (key, target) = (folder.path("key"), folder.path("target"));
    Secret::new([9; 32]).write_new(&target).expect("a key");
    let (ours, planted) = (Secret::new([1; 32]).to_hex(), Secret::new([2; 32]).to_hex());
    let nobody = somebody_else(&folder.path("probe"));
    let stop = AtomicBool::new(false);
    let (read, refused) = std::thread::scope(|scope| {
        let (folder, key, target, stop, planted, ours) = (&folder, &key, &target, &stop, &planted, &ours);
        scope.spawn(move || {
            let put = |text: &str, mode: u32, owner: Option<u32>| {
                let path = folder.path("next");
                let mut file = fs::File::options().write(true).create_new(true).mode(mode).open(&path).expect("a file");
                std::io::Write::write_all(&mut file, text.as_bytes()).expect("room");
                chown(&path, owner, None).expect("root may, and nobody may to themselves");
                fs::rename(&path, key).expect("ours");
            };
            while !stop.load(Ordering::Relaxed) {
                put(ours, 0o600, None);
                put(planted, 0o644, None);
                put(ours, 0o600, None);
                symlink(target, folder.path("next")).expect("a link");
                fs::rename(folder.path("next"), key).expect("ours");
                if let Some(nobody) = nobody {
                    put(planted, 0o600, Some(nobody));
                }
            }
        });
        let (mut read, mut refused) = (0, 0);
        let begun = Instant::now();
        while (read < 300 || refused < 300) && begun.elapsed() < Duration::from_secs(20) {
            match Secret::from_file(key) {
                Ok(found) => {
                    assert_eq!(*found.to_hex(), **ours, "somebody else's key was taken");
                    read += 1;
                }
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
        (read, refused)
    });
    println!("{read} times our key, {refused} times refused");
    assert!(read >= 300 && refused >= 300);
}

/// And while somebody plants links under the name that we write: their target stays as it was, and what we wrote is private.
#[test]
fn a6_a7_a_key_is_written_to_a_new_private_file_or_not_at_all() {
    let folder = Folder::new("written");
    let (key, victim) = (folder.path("key"), folder.path("victim"));
    fs::write(&victim, b"untouched").expect("a file");
    fs::set_permissions(&victim, PermissionsExt::from_mode(0o644)).expect("ours");
    let secret = Secret::new([1; 32]);
    type Plant = fn(&Path, &Path);
    let plants: [Plant; 4] = [
        |victim, name| symlink(victim, name).expect("a link"),
        |victim, name| symlink(victim.with_file_name("dangling"), name).expect("a link"),
        |victim, name| fs::hard_link(victim, name).expect("a link"),
        |_, name| fs::create_dir(name).expect("a folder"),
    ];
    for plant in plants {
        plant(&victim, &key);
        let error = secret.write_new(&key).expect_err("there is something").to_string();
        assert!(error.contains("cannot make") && error.contains("exists"), "{error}");
        assert!(!folder.path("dangling").exists());
        let _ = fs::remove_file(&key).or_else(|_| fs::remove_dir(&key));
    }
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let (key, victim, stop) = (&key, &victim, &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = symlink(victim, key);
                let _ = fs::remove_file(key);
                // For as long as it takes to make a file, more or less.
                std::thread::sleep(Duration::from_micros(10));
            }
        });
        let written = (0..3000).filter(|_| secret.write_new(key).is_ok()).count();
        stop.store(true, Ordering::Relaxed);
        written
    });
    println!("{written} of 3000 keys were written beside the links");
    assert!((10..2990).contains(&written), "they were not there at the same time: {written}");
    assert_eq!(fs::read(&victim).expect("still there"), b"untouched");
    assert_eq!(fs::metadata(&victim).expect("still there").mode() & 0o7777, 0o644);
}
