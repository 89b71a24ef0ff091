//! Two OS processes: what the law promises must hold against another address space, and against `kill -9`.
//!
//! The other process is this test binary, started by `Spawn` itself with the name of a part to play. A part is an ignored
//! test: it returns at once when nobody started it as a child.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use praas_shm::child::{self, Child, Exit, Spawn};
use praas_shm::{
    AttachError, BadBlock, Body, Descriptor, Doorbell, ExchangeCallee, ExchangeCaller, ExchangeReply, Identity, Inline,
    LAYOUT_VERSION, Link, OwnSegment, ParticipantId, PeerSegment, SegmentConfig, SegmentFile, eventfd, exchange,
    handover,
};

const CONFIG: SegmentConfig = SegmentConfig { ring_slots: 64, arena_bytes: 64 << 20 };
const PATIENCE: Duration = Duration::from_secs(20);

fn identity(number: u8) -> Identity {
    Identity { participant: ParticipantId::new(number).unwrap(), incarnation: 3, process: [9; 16] }
}

fn start(part: &str, cpus: Option<&[usize]>) -> (Child, OwnedFd) {
    let (ours, theirs) = handover::socketpair().unwrap();
    let args: Vec<OsString> =
        ["--exact", part, "--ignored", "--nocapture", "--test-threads=1"].iter().map(OsString::from).collect();
    let program = std::env::current_exe().unwrap();
    let child = Spawn { cpus, ..Spawn::new(&program, &args, theirs.as_fd()) }.spawn().unwrap();
    (child, ours)
}

/// The control socket of a part, if somebody started us to play it.
fn part() -> Option<OwnedFd> {
    let control = child::inherited_control().ok();
    if control.is_none() {
        println!("skipped: needs a parent that starts it as a child");
    }
    control
}

/// Controller and worker 1, linked, in two OS processes. The controller's half.
struct Controller {
    child: Child,
    control: OwnedFd,
    own: OwnSegment,
    link: Link,
    worker_file: SegmentFile,
    bell: Doorbell,
}

impl Controller {
    fn start(part: &str) -> Self {
        let (child, control) = start(part, None);
        let (own_file, worker_file) = (SegmentFile::create(&CONFIG).unwrap(), SegmentFile::create(&CONFIG).unwrap());
        let own = OwnSegment::map(&own_file, &identity(0), &CONFIG).unwrap();
        own_file.seal_future_write().unwrap();
        let (our_eventfd, their_eventfd) = (eventfd().unwrap(), eventfd().unwrap());
        let fds = [worker_file.fd(), their_eventfd.as_fd(), own_file.fd(), our_eventfd.as_fd()];
        handover::send(control.as_fd(), b"start", &fds).unwrap();
        expect(&control, b"mapped");
        worker_file.seal_future_write().unwrap();
        let peer = PeerSegment::attach(&worker_file, &identity(1), &CONFIG).unwrap();
        let link = Link::establish(&own, peer, their_eventfd).unwrap();
        handover::send(control.as_fd(), b"sealed", &[]).unwrap();
        let bell = own.doorbell(our_eventfd);
        Self { child, control, own, link, worker_file, bell }
    }

    fn receive(&mut self) -> Descriptor {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(descriptor) = self.link.consumer.poll().unwrap() {
                return descriptor;
            }
            assert!(Instant::now() < deadline, "no answer; the child: {:?}", self.child.try_reap());
            self.bell.arm();
            if self.link.consumer.ready() {
                self.bell.disarm();
                continue;
            }
            self.bell.sleep(Some(Duration::from_millis(100))).unwrap();
        }
    }

    fn ask(&mut self, descriptor: &Descriptor) -> Descriptor {
        self.link.producer.try_send(descriptor).unwrap();
        self.link.bell.ring();
        self.receive()
    }
}

/// The worker's half.
struct Worker {
    own: OwnSegment,
    link: Link,
    bell: Doorbell,
    control: OwnedFd,
    /// Kept for the attacks.
    own_file: SegmentFile,
    controller_file: SegmentFile,
}

impl Worker {
    fn join(control: OwnedFd) -> Self {
        let mut buffer = [0; 16];
        let (_, fds) = handover::receive(control.as_fd(), &mut buffer).unwrap();
        let [own_file, own_eventfd, controller_file, controller_eventfd]: [OwnedFd; 4] = fds.try_into().unwrap();
        let (own_file, controller_file) = (SegmentFile::from_fd(own_file), SegmentFile::from_fd(controller_file));
        let own = OwnSegment::map(&own_file, &identity(1), &CONFIG).unwrap();
        handover::send(control.as_fd(), b"mapped", &[]).unwrap();
        expect(&control, b"sealed");
        let peer = PeerSegment::attach(&controller_file, &identity(0), &CONFIG).unwrap();
        let link = Link::establish(&own, peer, controller_eventfd).unwrap();
        let bell = own.doorbell(own_eventfd);
        Self { own, link, bell, control, own_file, controller_file }
    }

    fn receive(&mut self) -> Descriptor {
        loop {
            if let Some(descriptor) = self.link.consumer.poll().unwrap() {
                return descriptor;
            }
            self.bell.arm();
            if self.link.consumer.ready() {
                self.bell.disarm();
                continue;
            }
            self.bell.sleep(None).unwrap();
        }
    }

    fn send(&mut self, descriptor: &Descriptor) {
        while self.link.producer.try_send(descriptor).is_err() {
            std::thread::yield_now();
        }
        self.link.bell.ring();
    }
}

fn expect(control: &OwnedFd, wanted: &[u8]) -> Vec<OwnedFd> {
    let mut buffer = [0; 64];
    let (bytes, fds) = handover::receive(control.as_fd(), &mut buffer).unwrap();
    assert_eq!(&buffer[..bytes], wanted, "on the control socket");
    fds
}

fn numbered(id: u64) -> Descriptor {
    Descriptor::bare(1, 0, id, !id)
}

fn carrying(id: u64, body: impl Into<Body>) -> Descriptor {
    Descriptor::new(1, 0, id, !id, body)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} takes too long");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
#[ignore = "a part that children play"]
fn part_echo() {
    let Some(control) = part() else { return };
    let mut worker = Worker::join(control);
    loop {
        let request = worker.receive();
        worker.link.mark_taken(worker.link.consumer.head());
        worker.send(&request);
    }
}

#[test]
fn a_descriptor_and_a_block_make_a_round_trip_between_processes() {
    let mut controller = Controller::start("part_echo");
    let mut arena = controller.own.arena().unwrap();
    for id in 0..1000 {
        assert_eq!(controller.ask(&numbered(id)), numbered(id));
    }
    assert_eq!(controller.link.peer_taken(), 1000);
    let mut block = arena.loan(5 << 20).unwrap();
    block.fill(0x5A);
    let lent = arena.lend(block, 5 << 20, identity(1).participant);
    let echoed = controller.ask(&carrying(1, lent));
    let Body::Block(back) = echoed.body() else { panic!("an echo of a block is a block") };
    let block = arena.take_back(identity(1).participant, &back).unwrap();
    assert!(block.iter().all(|&byte| byte == 0x5A));
}

/// Every way to change a sealed segment that is not the owner's mapping; each must fail, with `EPERM`.
fn attacks(file: &SegmentFile) -> Vec<(&'static str, io::Error)> {
    use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate};
    let fd = file.fd();
    let bytes = CONFIG.segment_bytes();
    let plain = std::fs::File::from(fd.try_clone_to_owned().unwrap());
    let reopened = std::fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .and_then(|file| file.write_at(b"x", 0));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let results: Vec<(&'static str, io::Result<()>)> = vec![
        ("shrink", ftruncate(fd, 4096).map_err(Into::into)),
        ("grow", ftruncate(fd, bytes + 4096).map_err(Into::into)),
        ("punch a hole", fallocate(fd, punch, 0, 4096).map_err(Into::into)),
        ("write", plain.write_at(b"x", 0).map(drop)),
        ("write through another descriptor", reopened.map(drop)),
        ("grow by fallocate", fallocate(fd, FallocateFlags::empty(), bytes, 4096).map_err(Into::into)),
        ("seal writing", fcntl_add_seals(fd, SealFlags::WRITE).map_err(Into::into)),
        ("map writable", map(fd.as_raw_fd(), true).map(drop)),
        ("map read-only, then ask for more", map(fd.as_raw_fd(), false).and_then(make_writable)),
    ];
    results
        .into_iter()
        .map(|(attack, result)| match result {
            Err(error) => (attack, error),
            Ok(()) => panic!("the segment let somebody {attack}"),
        })
        .collect()
}

fn map(fd: i32, writable: bool) -> io::Result<*mut libc::c_void> {
    let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: a new mapping at an address that the kernel chooses; nothing refers to it.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, fd, 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address) }
}

fn make_writable(address: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: the mapping made above; nothing refers to it.
    let failed = unsafe { libc::mprotect(address, 4096, libc::PROT_READ | libc::PROT_WRITE) } != 0;
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[test]
#[ignore = "a part that children play"]
fn part_evil() {
    let Some(control) = part() else { return };
    let mut worker = Worker::join(control);
    for file in [&worker.own_file, &worker.controller_file] {
        for (attack, error) in attacks(file) {
            let refused = [Some(libc::EPERM), Some(libc::EACCES)].contains(&error.raw_os_error());
            assert!(refused, "{attack}: {error}");
        }
    }
    worker.own.set_activity(6);
    worker.send(&numbered(6));
    worker.receive();
}

/// R5: neither its own sealed segment nor a peer's can a worker cut, punch, rewrite or map anew; the owner writes on.
#[test]
fn r5_a_sealed_segment_refuses_every_change() {
    let mut controller = Controller::start("part_evil");
    assert_eq!(controller.receive(), numbered(6));
    assert_eq!(controller.link.peer().activity(), 6);
    for (attack, error) in attacks(&controller.worker_file) {
        assert!([Some(libc::EPERM), Some(libc::EACCES)].contains(&error.raw_os_error()), "{attack}: {error}");
    }
    controller.link.producer.try_send(&numbered(0)).unwrap();
    controller.link.bell.ring();
    assert_eq!(controller.child.reap_blocking().unwrap(), Exit::Code(0), "the part's own assertions");
}

#[test]
#[ignore = "a part that children play"]
fn part_flood() {
    let Some(control) = part() else { return };
    let mut worker = Worker::join(control);
    let mut arena = worker.own.arena().unwrap();
    for id in 0.. {
        if id % 3 == 0 {
            // A block whose every byte is its number, so that a torn one would show.
            while let Some(release) = worker.link.consumer.poll().unwrap() {
                let [index, generation] = [release.id(), release.aux()].map(|word| u32::try_from(word).unwrap());
                arena.release(identity(0).participant, index, generation).unwrap();
            }
            let Ok(mut block) = arena.loan(40_000) else { continue };
            block.fill(u8::try_from(id % 251).unwrap());
            let lent = arena.lend(block, 40_000, identity(0).participant);
            worker.send(&carrying(id, lent));
        } else {
            let text = id.to_le_bytes().repeat(5);
            worker.send(&carrying(id, Inline::new(&text).unwrap()));
        }
    }
}

/// W2, W3: killed at a random instruction of a flood, the worker leaves a segment in which every published message is
/// whole, and nothing that the controller does afterwards hangs or fails.
#[test]
fn w2_a_worker_killed_while_writing_leaves_only_whole_messages() {
    let rounds = 25;
    let mut noise = 0x2545_F491_4F6C_DD1D_u64;
    let mut total = 0;
    for _ in 0..rounds {
        let mut controller = Controller::start("part_flood");
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        let until = Instant::now() + Duration::from_micros(1000 + noise % 5000);
        let mut expected = None;
        let mut check = |link: &mut Link| -> bool {
            let Some(descriptor) = link.consumer.poll().expect("a torn descriptor") else { return false };
            let id = descriptor.id();
            assert_eq!(descriptor.aux(), !id);
            // Ids of blocks that found no space are left out.
            assert!(expected.is_none_or(|expected| id >= expected), "{id} comes after {expected:?}");
            expected = Some(id + 1);
            match descriptor.body() {
                Body::Inline(inline) => assert_eq!(inline.as_slice(), id.to_le_bytes().repeat(5)),
                Body::Block(block) => {
                    let value = u8::try_from(id % 251).unwrap();
                    assert!(link.peer().bytes(&block).unwrap().iter().all(|&byte| byte == value), "a torn block");
                    let release = Descriptor::bare(2, 0, block.index.into(), block.generation.into());
                    let _ = link.producer.try_send(&release);
                }
            }
            total += 1;
            true
        };
        while Instant::now() < until {
            check(&mut controller.link);
        }
        controller.child.signal(libc::SIGKILL).unwrap();
        assert_eq!(controller.child.reap_blocking().unwrap(), Exit::Signal(libc::SIGKILL));
        let drained = std::iter::from_fn(|| check(&mut controller.link).then_some(())).count();
        assert!(drained <= 64, "at most a ring is left");
        assert!(!controller.link.producer.peer_head_invalid());
    }
    assert!(total > rounds, "the floods were read at all: {total}");
}

#[test]
#[ignore = "a part that children play"]
fn part_exchange() {
    let Some(control) = part() else { return };
    let [page]: [OwnedFd; 1] = expect(&control, b"page").try_into().unwrap();
    let mut callee = ExchangeCallee::from_fd(page).unwrap();
    for _ in 0..1000 {
        let request = loop {
            match callee.poll().unwrap() {
                Some((_, request)) => break request,
                None => std::thread::yield_now(),
            }
        };
        callee.reply(&Descriptor::bare(2, 0, 0, !request.aux()));
    }
    callee.close();
}

#[test]
fn an_exchange_page_serves_two_processes_and_closes() {
    let (mut child, control) = start("part_exchange", None);
    let page = exchange::create().unwrap();
    handover::send(control.as_fd(), b"page", &[page.as_fd()]).unwrap();
    let mut caller = ExchangeCaller::from_fd(page).unwrap();
    for call in 0..=1000_u64 {
        caller.submit(&Descriptor::bare(1, 0, 0, call));
        let deadline = Instant::now() + PATIENCE;
        let reply = loop {
            match caller.poll().unwrap() {
                Some(reply) => break reply,
                None => std::thread::yield_now(),
            }
            assert!(Instant::now() < deadline);
        };
        match reply {
            ExchangeReply::Reply(reply) => assert!(reply.aux() == !call && call < 1000),
            ExchangeReply::Closed => assert_eq!(call, 1000, "closed after a thousand calls"),
        }
    }
    assert_eq!(child.reap_blocking().unwrap(), Exit::Code(0));
    let loose = rustix::fs::memfd_create("loose", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    assert!(matches!(ExchangeCaller::from_fd(loose), Err(AttachError::NotSealed { .. })));
}

/// R11, R12: a segment is attached if it is the one expected, in every field, and otherwise not.
#[test]
fn r11_r12_only_the_expected_segment_is_attached() {
    let file = SegmentFile::create(&CONFIG).unwrap();
    let attach = |identity: &Identity| PeerSegment::attach(&file, identity, &CONFIG);
    assert!(matches!(attach(&identity(1)), Err(AttachError::NotSealed { .. })), "nobody has mapped it yet");
    let _own = OwnSegment::map(&file, &identity(1), &CONFIG).unwrap();
    assert!(matches!(attach(&identity(1)), Err(AttachError::NotSealed { .. })), "others could still map it writable");
    file.seal_future_write().unwrap();
    attach(&identity(1)).unwrap();
    for (field, stranger) in [
        ("participant", identity(2)),
        ("incarnation", Identity { incarnation: 4, ..identity(1) }),
        ("process (low half)", Identity { process: [8; 16], ..identity(1) }),
        ("process (high half)", Identity { process: [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 0], ..identity(1) }),
    ] {
        let refused = attach(&stranger).unwrap_err();
        assert!(matches!(refused, AttachError::Stranger { field: found, .. } if found == field), "{refused}");
    }
    for other in [SegmentConfig { ring_slots: 128, ..CONFIG }, SegmentConfig { arena_bytes: 66 << 20, ..CONFIG }] {
        let refused = PeerSegment::attach(&file, &identity(1), &other).unwrap_err();
        assert!(matches!(refused, AttachError::Size { .. } | AttachError::Shape { .. }), "{refused}");
    }
    // A file of the right size and seals that no owner has finished, or that another build has made.
    for (word, wanted) in [(0, "magic"), (u64::from(LAYOUT_VERSION) + 1, "version")] {
        let file = SegmentFile::create(&CONFIG).unwrap();
        let plain = std::fs::File::from(file.fd().try_clone_to_owned().unwrap());
        if word != 0 {
            plain.write_at(b"PRaaSseg", 0).unwrap();
            plain.write_at(&word.to_le_bytes(), 8).unwrap();
        }
        file.seal_future_write().unwrap();
        let refused = PeerSegment::attach(&file, &identity(1), &CONFIG).unwrap_err();
        assert!(matches!(refused, AttachError::NotASegment { .. } | AttachError::VersionMismatch { .. }));
        assert!(refused.to_string().contains(wanted), "{refused}");
    }
}

/// R1: no reference, however it is put together, makes a view outside the arena.
#[test]
fn r1_a_view_never_leaves_the_arena() {
    let file = SegmentFile::create(&CONFIG).unwrap();
    let _own = OwnSegment::map(&file, &identity(1), &CONFIG).unwrap();
    file.seal_future_write().unwrap();
    let peer: Arc<PeerSegment> = PeerSegment::attach(&file, &identity(1), &CONFIG).unwrap();
    let arena = CONFIG.arena_bytes;
    let true_block =
        praas_shm::BlockRef { owner: identity(1).participant, index: 0, generation: 0, offset: 0, len: arena };
    assert_eq!(peer.view(&true_block).unwrap().len() as u64, arena);
    let edges: Vec<u64> = (0..64)
        .flat_map(|bit| [1_u64 << bit, (1 << bit) - 1, u64::MAX - (1 << bit)])
        .chain([arena, arena - 1, arena - 64, arena + 64, u64::MAX, u64::MAX - 63])
        .collect();
    for &offset in &edges {
        for &len in &edges {
            let inside = u128::from(offset) + u128::from(len) <= u128::from(arena) && offset % 64 == 0;
            let block = praas_shm::BlockRef { offset, len, ..true_block };
            assert_eq!(peer.bytes(&block).is_ok(), inside, "{offset:#x} + {len:#x}");
        }
    }
    let foreign = praas_shm::BlockRef { owner: identity(2).participant, ..true_block };
    assert!(matches!(peer.bytes(&foreign), Err(BadBlock::Owner { .. })));
}

#[test]
#[ignore = "a part that children play"]
fn part_parent() {
    let Some(control) = part() else { return };
    child::become_subreaper().unwrap();
    let (grandchild, _kept) = start("part_sleeper", None);
    handover::send(control.as_fd(), &grandchild.pid().to_le_bytes(), &[grandchild.pidfd()]).unwrap();
    std::thread::sleep(PATIENCE);
}

#[test]
#[ignore = "a part that children play"]
fn part_sleeper() {
    if part().is_some() {
        std::thread::sleep(PATIENCE * 10);
    }
}

fn readable_within(fd: &OwnedFd, limit: Duration) -> bool {
    let mut polled = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
    rustix::event::poll(&mut polled, Some(&limit)).unwrap() == 1
}

/// C1, G5: when the parent is killed, its children die with it, at once, and without its help.
#[test]
fn c1_children_die_when_their_parent_is_killed() {
    for _ in 0..5 {
        let (mut parent, control) = start("part_parent", None);
        let mut pid = [0; 4];
        let (_, mut fds) = handover::receive(control.as_fd(), &mut pid).unwrap();
        let grandchild = fds.remove(0);
        assert!(!readable_within(&grandchild, Duration::ZERO), "the grandchild lives");
        parent.signal(libc::SIGKILL).unwrap();
        assert!(readable_within(&grandchild, Duration::from_millis(100)), "G5: gone within 100 ms");
        assert_eq!(parent.reap_blocking().unwrap(), Exit::Signal(libc::SIGKILL));
    }
}

/// PDEATHSIG fires when the *thread* that forked ends: the reason why `Spawn` asks for a thread that lives for ever.
#[test]
fn a_child_dies_with_the_thread_that_spawned_it() {
    let (mut child, _control) = std::thread::spawn(|| start("part_sleeper", None)).join().unwrap();
    assert_eq!(child.reap_blocking().unwrap(), Exit::Signal(libc::SIGKILL));
}

#[test]
#[ignore = "a part that children play"]
fn part_forker() {
    let Some(control) = part() else { return };
    // User code that forks behind our back and then dies: `sh` keeps the group, and the standard error of its parent.
    let shell = std::process::Command::new("/bin/sh").args(["-c", "sleep 100"]).spawn().unwrap();
    handover::send(control.as_fd(), &shell.id().to_le_bytes(), &[]).unwrap();
    std::process::abort();
}

/// W8, W9: what a worker forked goes with it, and nothing stays a zombie.
#[test]
fn w8_what_a_child_forked_is_killed_with_its_group() {
    child::become_subreaper().unwrap();
    let (mut child, control) = start("part_forker", None);
    let mut pid = [0; 4];
    handover::receive(control.as_fd(), &mut pid).unwrap();
    let shell = i32::from_le_bytes(pid);
    let exit = child.reap_blocking().unwrap();
    assert_eq!(exit, Exit::Signal(libc::SIGABRT), "W4: the cause is known");
    assert_eq!(child.try_reap().unwrap(), Some(exit), "asking again gives the same answer");
    assert_eq!(child.signal_group(libc::SIGKILL).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    // The shell is an orphan now, and we are its reaper.
    wait_until("the shell's end", || {
        child::reap_pid(shell).is_ok_and(|exit| exit == Some(Exit::Signal(libc::SIGKILL)))
    });
    assert!(!child::stray_children(&[]).contains(&shell));
}

#[test]
#[ignore = "a part that children play"]
fn part_report() {
    let Some(control) = part() else { return };
    let mut fds: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    fds.sort_unstable();
    let group = rustix::process::getpgid(None).unwrap() == rustix::process::getpid();
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("?").trim().to_owned();
    let facts = format!("{fds:?} {:?} {group} {} {}", child::allowed_cpus(), field("SigBlk:"), field("ShdPnd:"));
    handover::send(control.as_fd(), facts.as_bytes(), &[]).unwrap();
}

/// What a child finds: four descriptors (and the one that lists them), its core, its own group, no blocked signal.
#[test]
fn a_child_starts_with_nothing_but_what_it_was_given() {
    let _extra = [eventfd().unwrap(), eventfd().unwrap()];
    let cpu = child::allowed_cpus()[0];
    let (mut child, control) = start("part_report", Some(&[cpu]));
    let mut facts = [0; 256];
    let (bytes, _) = handover::receive(control.as_fd(), &mut facts).unwrap();
    let facts = String::from_utf8_lossy(&facts[..bytes]).into_owned();
    let expected = format!("[0, 1, 2, 3, 4] [{cpu}] true 0000000000000000 0000000000000000");
    assert_eq!(facts, expected);
    assert_eq!(child.reap_blocking().unwrap(), Exit::Code(0));
}

#[test]
fn a_program_that_cannot_start_is_an_error_with_a_number() {
    let (_ours, theirs) = handover::socketpair().unwrap();
    let attempt = |program: &str, cpus: Option<&[usize]>| {
        Spawn { cpus, ..Spawn::new(Path::new(program), &[], theirs.as_fd()) }.spawn().map(drop)
    };
    assert_eq!(attempt("/nowhere/nothing", None).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    assert_eq!(attempt("/proc/self/status", None).unwrap_err().raw_os_error(), Some(libc::EACCES));
    assert_eq!(attempt("/bin/sh", Some(&[1023])).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    assert_eq!(attempt("/bin/sh", Some(&[1 << 20])).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(attempt("/bin/\0sh", None).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

/// A child that was killed by its group at once lived on: it was not in the group yet. Whoever then waited for its end waited for ever.
#[test]
fn a_child_is_in_its_group_before_its_exec() {
    for _ in 0..50 {
        let (_ours, theirs) = handover::socketpair().unwrap();
        let args = ["-c", "sleep 20"].map(OsString::from);
        let mut child = Spawn::new(Path::new("/bin/sh"), &args, theirs.as_fd()).begin().unwrap();
        child.signal_group(9).unwrap();
        assert_eq!(child.reap_blocking().unwrap(), Exit::Signal(9));
        assert!(child.exec_error().is_none(), "it was killed, whether before its exec or after");
    }
}

/// What a child is bound by is in force before its program runs, and its output is where it was told to be.
#[test]
fn a_child_starts_within_its_bounds() {
    let (_ours, theirs) = handover::socketpair().unwrap();
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let script = "ulimit -Hd; ulimit -d; cat /proc/self/oom_score_adj >&2";
    let args = ["-c", script].map(OsString::from);
    let bounds = child::Bounds { data_bytes_max: Some(64 << 20), oom_score_adj: Some(777), ..child::Bounds::default() };
    let output = Some([write.as_fd(), write.as_fd()]);
    let spawn = Spawn { output, bounds, ..Spawn::new(Path::new("/bin/sh"), &args, theirs.as_fd()) };
    let mut child = spawn.spawn().unwrap();
    drop(write);
    let said = io::read_to_string(std::fs::File::from(read)).unwrap();
    assert_eq!(said, "65536\n65536\n777\n");
    assert_eq!(child.reap_blocking().unwrap(), Exit::Code(0));
    // A group that nobody can enter is an error with a number.
    let null = std::fs::File::open("/dev/null").unwrap();
    let groups = [null.as_fd()];
    let bounds = child::Bounds { groups: &groups, ..child::Bounds::default() };
    let error = Spawn { bounds, ..Spawn::new(Path::new("/bin/sh"), &args, theirs.as_fd()) }.spawn().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
}

#[test]
fn dropping_a_child_ends_it() {
    let (child, control) = start("part_sleeper", None);
    let pid = child.pid();
    drop(child);
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "W9: neither running nor a zombie");
    let (bytes, fds) = handover::receive(control.as_fd(), &mut [0; 8]).unwrap();
    assert_eq!((bytes, fds.len()), (0, 0), "the end of the other side is a message of nothing");
}

#[test]
fn handing_over_is_whole_or_an_error() {
    let (one, other) = handover::socketpair().unwrap();
    let file = eventfd().unwrap();
    let fds = vec![file.as_fd(); handover::FDS_MAX];
    handover::send(one.as_fd(), b"many", &fds).unwrap();
    assert_eq!(expect(&other, b"many").len(), handover::FDS_MAX);
    handover::send(one.as_fd(), b"0123456789", &[]).unwrap();
    let error = handover::receive(other.as_fd(), &mut [0; 4]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let too_many = vec![file.as_fd(); handover::FDS_MAX + 1];
    assert!(handover::send(one.as_fd(), b"x", &too_many).is_err());
    assert!(handover::send(one.as_fd(), b"", &[]).is_err());
    drop(other);
    // Another test's child may hold a copy between its fork and its exec.
    wait_until("the end of the other side", || {
        let error = handover::send(one.as_fd(), b"x", &[]).err();
        error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    });
}

/// A worker that dies with mail unread has its own last words heard, and then its end, and not an error instead.
#[test]
fn the_last_words_of_a_peer_that_left_mail_unread_are_received() {
    let (one, other) = handover::socketpair().unwrap();
    handover::send(other.as_fd(), b"last words", &[]).unwrap();
    handover::send(one.as_fd(), b"never read", &[]).unwrap();
    drop(other);
    expect(&one, b"last words");
    expect(&one, b"");
}

#[test]
#[ignore = "a part that children play"]
fn part_full_disk() {
    let Some(control) = part() else { return };
    let say = |text: &str| handover::send(control.as_fd(), text.as_bytes(), &[]).unwrap();
    // A name space of our own, so that the mount goes with us.
    // SAFETY: a system call without memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWUSER) } != 0 {
        return say("skipped: needs user and mount name spaces");
    }
    // SAFETY: null-terminated literals.
    let mounted =
        unsafe { libc::mount(c"none".as_ptr(), c"/tmp".as_ptr(), c"tmpfs".as_ptr(), 0, c"size=3m".as_ptr().cast()) };
    if mounted != 0 {
        return say("skipped: needs to mount a tmpfs");
    }
    let open = |name: &str| {
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(name).unwrap();
        file.set_len(CONFIG.segment_bytes()).unwrap();
        file
    };
    let file = SegmentFile::from_fd(open("/tmp/segment").into());
    let own = OwnSegment::map(&file, &identity(0), &CONFIG).unwrap();
    let mut arena = own.arena().unwrap();
    let mut blocks = Vec::new();
    let refused = loop {
        match arena.loan(100_000) {
            Ok(mut block) => {
                block.fill(1);
                blocks.push(block);
            }
            Err(refused) => break refused,
        }
    };
    assert!(refused.free_bytes > refused.needed_bytes, "the quota is far, the machine is full: {refused}");
    assert!(blocks.len() > 20, "{} blocks of 100 kB in 3 MiB", blocks.len());
    // What is there goes on working.
    arena.free(blocks.pop().unwrap());
    arena.loan(100_000).unwrap().fill(2);
    // Now fill the rest: a new segment is refused before it is touched.
    let mut rest = std::fs::File::create("/tmp/rest").unwrap();
    while rest.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    let full = SegmentFile::from_fd(open("/tmp/another").into());
    let refused = OwnSegment::map(&full, &identity(2), &CONFIG).unwrap_err();
    assert!(matches!(refused, praas_shm::SegmentError::NoSpace { .. }), "{refused}");
    say("done");
}

/// X1: on a file system of 3 MiB an arena of 64 MiB says `NoSpace`; nobody sees a SIGBUS.
#[test]
fn x1_a_full_file_system_is_an_error_and_not_a_sigbus() {
    let (mut child, control) = start("part_full_disk", None);
    let mut answer = [0; 64];
    let (bytes, _) = handover::receive(control.as_fd(), &mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..bytes]).into_owned();
    if answer.starts_with("skipped") {
        println!("{answer}");
        return;
    }
    assert_eq!((answer.as_str(), child.reap_blocking().unwrap()), ("done", Exit::Code(0)));
}

#[test]
#[ignore = "a part that children play"]
fn part_stranger() {
    let Some(control) = part() else { return };
    let worker = Worker::join(control);
    // SAFETY: the child of the fork only tries to read an address and leaves.
    let forked = unsafe { libc::fork() };
    if forked == 0 {
        // W15: what a function forks has none of our memory: this is a segmentation fault.
        let activity = worker.link.peer().activity();
        // SAFETY: leaves at once.
        unsafe { libc::_exit(i32::from(activity == 0) + 1) };
    }
    let mut status = 0;
    // SAFETY: a local.
    unsafe { libc::waitpid(forked, &raw mut status, 0) };
    let text = if libc::WIFSIGNALED(status) { "gone" } else { "mapped" };
    handover::send(worker.control.as_fd(), text.as_bytes(), &[]).unwrap();
}

/// W15: a function that forks has a child without our mappings; it can answer nobody in our name.
#[test]
fn w15_a_forked_function_has_no_segment() {
    let controller = Controller::start("part_stranger");
    expect(&controller.control, b"gone");
}

/// Nothing has a name: no file in `/dev/shm` is ours.
#[test]
fn g5_segments_have_no_names() {
    let _controller = Controller::start("part_echo");
    let mut maps = String::new();
    std::fs::File::open("/proc/self/maps").unwrap().read_to_string(&mut maps).unwrap();
    let ours: Vec<&str> = maps.lines().filter(|line| line.contains("praas-segment")).collect();
    assert!(ours.len() >= 2, "one of our own and one of the worker's: {ours:?}");
    assert!(ours.iter().all(|line| line.ends_with("/memfd:praas-segment (deleted)")), "{ours:?}");
    assert!(!maps.contains(" /dev/shm/"), "{maps}");
}
