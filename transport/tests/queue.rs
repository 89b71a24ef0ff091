//! Queues between OS processes: this test binary starts itself as the peer.
//! Records, limits of shape and protocol errors are tested in `src/queue.rs`.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use praas_transport::Flush;
use praas_transport::queue::{
    Buffer, Message, Queue, QueueConfig, QueueError, QueueLimit, Receiver, Sender, create, user_bytes,
};

const ROLE: &str = "PRAAS_TRANSPORT_TEST_ROLE";
const QUEUES: &str = "PRAAS_TRANSPORT_TEST_QUEUES";
const BODY_MAX: u64 = 64 << 20;

/// Starts this binary again with a role, and with the given queues: to the child, from the child.
fn child(role: &str, queues: Option<(&OwnedFd, &OwnedFd)>) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["the_other_process", "--exact", "--nocapture"]).env(ROLE, role);
    if let Some((to, from)) = queues {
        for fd in [to, from] {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).expect("a descriptor");
        }
        command.env(QUEUES, format!("{} {}", to.as_raw_fd(), from.as_raw_fd()));
    }
    command
}

/// Ends a child that a failed assertion would leave behind.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The queues of the shape, once the other tests of this user leave room for them.
fn made(config: &QueueConfig) -> (Queue, OwnedFd) {
    let start = Instant::now();
    loop {
        match create(config) {
            Err(QueueError::Limit { limit: QueueLimit::UserBytes, .. })
                if start.elapsed() < Duration::from_secs(30) =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other.expect("a queue"),
        }
    }
}

fn content(len: usize) -> Vec<u8> {
    let pattern: Vec<u8> = (0..=250).collect();
    let mut bytes = pattern.repeat(len.div_ceil(pattern.len()));
    bytes.truncate(len);
    bytes
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Not a test of its own: what the started process does.
#[test]
fn the_other_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    match role.as_str() {
        "echo" => echo(false),
        "echo until half" => echo(true),
        "limited" => limited(),
        "few queues" => few_queues(),
        "few descriptors" => few_descriptors(),
        other => panic!("no role {other}"),
    }
}

fn echo(until_half: bool) {
    let queues = std::env::var(QUEUES).expect("the queues' numbers");
    let (to, from) = queues.split_once(' ').expect("two of them");
    // A new open file each: blocking, as the peer's end is.
    let open = |number: &str| {
        let file = File::options().read(true).write(true).open(format!("/proc/self/fd/{number}"));
        Queue::from_fd(file.expect("inherited").into()).expect("a queue")
    };
    let (mut receiver, mut sender) = (Receiver::new(open(to), BODY_MAX), Sender::new(open(from)));
    while let Some(message) = receiver.receive_until(Duration::ZERO, Some(soon())).expect("a queue") {
        if message.body.is_empty() {
            return;
        }
        let len = message.body.len();
        sender.queue(message).expect("room");
        if until_half && len > 100_000 {
            let _ = sender.flush_until(soon());
        }
        assert_eq!(sender.flush().expect("a queue"), Flush::Done);
        receiver.recycle(sender.take_sent().expect("sent").body);
    }
    panic!("nobody said goodbye");
}

struct Echo {
    sender: Sender,
    receiver: Receiver,
    child: Ended,
}

impl Echo {
    fn start(role: &str) -> Echo {
        let config = QueueConfig { messages: 8, message_bytes: 4096 };
        let ((to, to_peer), (from, from_peer)) = (made(&config), made(&config));
        let child = child(role, Some((&to_peer, &from_peer))).stdout(Stdio::null()).spawn().expect("a process");
        Echo { sender: Sender::new(to), receiver: Receiver::new(from, BODY_MAX), child: Ended(child) }
    }

    /// A full queue there must not stop us from emptying the one back: both sides would wait for ever.
    fn call(&mut self, mark: u8, body: Buffer) -> Message {
        self.sender.queue(Message { head: [mark; 64], body }).expect("room");
        let deadline = soon();
        loop {
            let flushed = self.sender.flush().expect("a queue");
            let wait = if flushed == Flush::Done { deadline } else { Instant::now() + Duration::from_micros(200) };
            if let Some(message) = self.receiver.receive_until(Duration::ZERO, Some(wait)).expect("a queue") {
                return message;
            }
            assert!(Instant::now() < deadline, "no answer");
        }
    }
}

#[test]
fn a_started_process_echoes_through_two_queues() {
    let mut echo = Echo::start("echo");
    for (mark, len) in [(1, 1), (2, 4016), (3, 4017), (4, 100_000), (5, 1)] {
        let answer = echo.call(mark, Buffer::from(&content(len)[..]));
        assert_eq!(answer.head, [mark; 64]);
        assert!(*answer.body == content(len));
        echo.receiver.recycle(answer.body);
    }
    echo.sender.queue(Message { head: [0; 64], body: Buffer::default() }).expect("room");
    assert_eq!(echo.sender.flush_until(soon()).expect("a queue"), Flush::Done);
    assert!(echo.child.0.wait().expect("our child").success());
}

/// P2: 64 MiB through a queue of 8 records of 4 KiB, there and back.
#[test]
fn p2_64_mib_there_and_back() {
    let mut echo = Echo::start("echo");
    let sent = content(64 << 20);
    let answer = echo.call(1, Buffer::from(&sent[..]));
    assert!(*answer.body == sent);
    let stats = echo.receiver.stats();
    assert_eq!(stats.records, (64 << 20) / 4080 + 1);
    assert!(stats.copied_bytes <= 4016, "{stats:?}");
}

/// W1, M5: the peer is killed in the middle of its answer; what follows is not mistaken for the rest of it.
#[test]
fn a_killed_peer_leaves_a_receiver_that_says_so_in_time() {
    let mut echo = Echo::start("echo until half");
    assert_eq!(echo.call(1, Buffer::from(&b"small"[..])).body[..], b"small"[..]);
    echo.sender.queue(Message { head: [2; 64], body: Buffer::from(&content(200_000)[..]) }).expect("room");
    assert_eq!(echo.sender.flush_until(soon()).expect("a queue"), Flush::Done);
    let deadline = soon();
    while echo.receiver.kernel_queue().queued().expect("a queue") < 8 {
        assert!(Instant::now() < deadline, "it never filled the queue");
        std::thread::sleep(Duration::from_millis(1));
    }
    // It stands before the ninth record, and goes on after the kill or not at all.
    echo.child.0.kill().expect("our child");
    echo.child.0.wait().expect("our child");
    assert!(echo.receiver.try_receive().expect("a queue").is_none());
    assert!(echo.receiver.mid_message());
    let start = Instant::now();
    let wait = Some(start + Duration::from_millis(50));
    assert!(echo.receiver.receive_until(Duration::ZERO, wait).expect("a queue").is_none());
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(echo.receiver.mid_message());
    echo.receiver.reset().expect("a queue");
    assert!(!echo.receiver.mid_message());
    assert_eq!(echo.receiver.kernel_queue().queued().expect("a queue"), 0);
}

fn run(role: &str, through: &[&str]) -> Option<String> {
    let mut plain = child(role, None);
    let command = if let [program, arguments @ ..] = through {
        let mut wrapped = Command::new(program);
        wrapped.args(arguments).arg(plain.get_program()).args(plain.get_args()).env(ROLE, role);
        plain = wrapped;
        &mut plain
    } else {
        &mut plain
    };
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || text.contains("skipped:") || text.contains("unshare"), "{text}");
    output.status.success().then_some(text)
}

/// M2: RLIMIT_MSGQUEUE: the limit, what it is, what is needed, what to do; and no half-made queue remains.
#[test]
fn m2_a_low_limit_on_bytes_is_explained() {
    run("limited", &[]).expect("a process of ours");
}

fn limited() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let config = QueueConfig { messages: 4, message_bytes: 512 };
    let need = user_bytes(&config);
    let maximum = getrlimit(Resource::Msgqueue).maximum;
    setrlimit(Resource::Msgqueue, Rlimit { current: Some(need - 1), maximum }).expect("lower is always allowed");
    let error = create(&config).expect_err("one byte short");
    assert!(
        matches!(error, QueueError::Limit { limit: QueueLimit::UserBytes, have, need: asked } if have == need - 1 && asked == need),
        "{error}"
    );
    let text = error.to_string();
    assert!(text.contains("RLIMIT_MSGQUEUE") && text.contains("ulimit -q"), "{text}");
}

/// M2: `fs.mqueue.queues_max` in an IPC namespace of its own, the third queue is one too many.
#[test]
fn m2_too_few_queues_in_the_namespace_is_explained() {
    match run("few queues", &["unshare", "-i"]) {
        Some(text) if !text.contains("skipped:") => {}
        _ => println!("skipped: needs a private IPC namespace (unshare -i) and the right to set queues_max"),
    }
}

fn few_queues() {
    if std::fs::write("/proc/sys/fs/mqueue/queues_max", "2").is_err() {
        println!("skipped: needs the right to set queues_max");
        return;
    }
    let config = QueueConfig { messages: 2, message_bytes: 256 };
    let kept = [made(&config), made(&config)];
    match create(&config) {
        Err(QueueError::Limit { limit: QueueLimit::Queues, have: 2, need: 1 }) => {}
        other => panic!("{other:?}"),
    }
    // The failed one left nothing: with one less there is room for exactly one again.
    let [first, _second] = kept;
    drop(first);
    let again = made(&config);
    assert!(create(&config).is_err());
    drop(again);
}

/// X3: no descriptor left is told from no queue left, though the kernel says EMFILE to both.
#[test]
fn x3_too_few_descriptors_is_explained() {
    run("few descriptors", &[]).expect("a process of ours");
}

fn few_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let lowest_free = File::open("/dev/null").expect("a descriptor").as_raw_fd();
    let lowest_free = u64::try_from(lowest_free).expect("not negative");
    setrlimit(Resource::Nofile, Rlimit { current: Some(lowest_free), maximum }).expect("lower is always allowed");
    let config = QueueConfig { messages: 2, message_bytes: 256 };
    let error = create(&config).expect_err("no descriptor left");
    assert!(matches!(error, QueueError::Limit { limit: QueueLimit::OpenFiles, .. }), "{error}");
    assert!(error.to_string().contains("ulimit -n"), "{error}");
    // One descriptor, but a queue needs two: the half that was made is gone.
    setrlimit(Resource::Nofile, Rlimit { current: Some(lowest_free + 1), maximum }).expect("below the maximum");
    assert!(matches!(create(&config), Err(QueueError::Limit { limit: QueueLimit::OpenFiles, .. })));
}
