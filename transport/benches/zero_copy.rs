//! The price of sending without a copy: `SENDMSG_ZC` beside `SENDMSG`.
//!
//! Question  From which length on, if from any, is a zero-copy send cheaper, and does the kernel really send without a copy?
//! Measures  First, the sender's share alone, as before a card that reads the pages by itself: processor time of a send into the queue of a
//!           connection whose peer does not read, notification and taking down included. Nothing is transmitted, so nothing is copied
//!           but by `sendmsg`. Then, for each place, length and request: the time from the request until the peer has all and has said so (p50), the
//!           throughput with eight buffers in turns, and processor time per MiB of that, of the sender's thread and of the process.
//!           `copied` is the share of notifications with `IORING_NOTIF_USAGE_ZC_COPIED`.
//! Load      one connection, one thread at each end. The receiver reads into one buffer of 1 MiB.
//! Excludes  frames, checksums, reactors, and real network cards where there are none: `--to ADDRESS:PORT` sends to a discarding
//!           peer (`--serve ADDRESS:PORT` at the other end) over whatever lies between.
//! Checks    every byte is counted at the other end; a buffer is used again only after its notification.
//! Baseline  `sendmsg`, on the same ring.
//! Run       cargo bench -p praas-transport --bench zero_copy (`-- --queue` for the first part alone)

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, types};

#[allow(dead_code, reason = "what pulls cables is for tests")]
#[path = "../tests/support/namespace.rs"]
mod namespace;

/// `io_uring.h`
const REPORT_USAGE: u16 = 1 << 3;
const COPIED: u32 = 1 << 31;
const BUFFERS: usize = 8;
const LENGTHS: [usize; 8] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20, 5 << 20];
const ROUNDS: usize = 5;
/// Half of it is filled: the kernel counts more than the bytes.
const QUEUE_BYTES: usize = 64 << 20;

#[derive(Clone, Copy, PartialEq)]
enum Request {
    SendMsg,
    SendMsgZc,
}

struct Sender {
    ring: IoUring,
    stream: TcpStream,
    buffers: Vec<Vec<u8>>,
    /// Notifications to come for each buffer.
    owed: [usize; BUFFERS],
    request: Request,
    notified: usize,
    copied: usize,
    done: Option<usize>,
}

/// Processor time of this thread and of the process.
fn cpu() -> [Duration; 2] {
    [rustix::time::ClockId::ThreadCPUTime, rustix::time::ClockId::ProcessCPUTime].map(|clock| {
        let time = rustix::time::clock_gettime(clock);
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("below a second"))
    })
}

impl Sender {
    fn new(stream: TcpStream, bytes: usize, request: Request) -> Sender {
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(64).expect("io_uring");
        let buffers = (0..BUFFERS).map(|at| vec![u8::try_from(at).expect("few") + 1; bytes]).collect();
        Sender { ring, stream, buffers, owed: [0; BUFFERS], request, notified: 0, copied: 0, done: None }
    }

    fn reap(&mut self, wait: usize) {
        self.ring.submit_and_wait(wait).expect("io_uring_enter");
        for entry in self.ring.completion() {
            let buffer = usize::try_from(entry.user_data()).expect("ours");
            if cqueue::notif(entry.flags()) {
                self.owed[buffer] -= 1;
                self.notified += 1;
                self.copied += usize::from(entry.result().cast_unsigned() & COPIED != 0);
                continue;
            }
            self.owed[buffer] += usize::from(cqueue::more(entry.flags()));
            let sent = usize::try_from(entry.result());
            self.done = Some(sent.unwrap_or_else(|_| panic!("{}", std::io::Error::from_raw_os_error(-entry.result()))));
        }
    }

    /// Sends all of a buffer; waits for the results, not for notifications.
    fn send(&mut self, buffer: usize) {
        while self.owed[buffer] > 0 {
            self.reap(1);
        }
        self.send_now(buffer);
    }

    fn send_now(&mut self, buffer: usize) {
        let mut at = 0;
        while at < self.buffers[buffer].len() {
            let rest = &self.buffers[buffer][at..];
            let slice = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
            // SAFETY: a `msghdr` is numbers and pointers, for all of which zero is a value.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = (&raw const slice).cast_mut();
            message.msg_iovlen = 1;
            let (fd, flags) =
                (types::Fd(self.stream.as_raw_fd()), (libc::MSG_NOSIGNAL | libc::MSG_WAITALL).cast_unsigned());
            let entry = match self.request {
                Request::SendMsg => opcode::SendMsg::new(fd, &raw const message).flags(flags).build(),
                Request::SendMsgZc => {
                    opcode::SendMsgZc::new(fd, &raw const message).flags(flags).ioprio(REPORT_USAGE).build()
                }
            };
            // SAFETY: message and slice live until the result, which is waited for below; the buffer is not touched before its
            // notifications, and lives as long as the ring.
            unsafe { self.ring.submission().push(&entry.user_data(buffer as u64)) }.expect("room");
            while self.done.is_none() {
                self.reap(1);
            }
            at += self.done.take().expect("seen above");
        }
    }

    /// Waits until the peer has everything: it answers each `bytes` with one byte.
    fn answered(&mut self, count: usize) {
        self.stream.read_exact(&mut vec![0; count]).expect("an answer");
    }
}

/// The other end: a length, then a byte for each so many.
fn serve(listener: &TcpListener) {
    let mut buffer = vec![0; 1 << 20];
    while let Ok((mut stream, _)) = listener.accept() {
        stream.set_nodelay(true).expect("a socket");
        let mut length = [0; 8];
        if stream.read_exact(&mut length).is_err() {
            return;
        }
        let length = usize::try_from(u64::from_le_bytes(length)).expect("ours");
        if length == 0 {
            return;
        }
        let mut have = 0;
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            have += count;
            let whole = have / length;
            have %= length;
            stream.write_all(&vec![1; whole]).expect("a peer");
        }
    }
}

/// Room for so many bytes, whatever the system's limit.
fn set_room(socket: &impl AsRawFd, option: libc::c_int, bytes: usize) {
    let room = libc::c_int::try_from(bytes).expect("small");
    let room_bytes = libc::socklen_t::try_from(size_of_val(&room)).expect("4");
    // SAFETY: the value is an int, as the option wants it, and outlives the call.
    let set =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const room).cast(), room_bytes) };
    assert_eq!(set, 0, "the caller saw that we are root");
}

/// Processor time of a send that goes no further than the socket's queue, us.
fn queued(length: usize, request: Request) -> f64 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    // A window as a fast network has it: with a small one TCP would cut small packets.
    set_room(&listener, libc::SO_RCVBUFFORCE, 2 << 20);
    let stream = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
    let (_peer, _) = listener.accept().expect("it connected");
    set_room(&stream, libc::SO_SNDBUFFORCE, 2 * QUEUE_BYTES);
    let mut sender = Sender::new(stream, length, request);
    let mut first = Sender::new(sender.stream.try_clone().expect("descriptors"), 64 << 10, Request::SendMsg);
    // Until the window is closed.
    let mut waiting: libc::c_int = 0;
    while waiting < 256 << 10 {
        first.send(0);
        std::thread::sleep(Duration::from_micros(500));
        // SAFETY: the kernel writes an int into `waiting`, which is one.
        let asked = unsafe { libc::ioctl(sender.stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) };
        assert_eq!(asked, 0, "a socket");
    }
    let count = (QUEUE_BYTES / 2 / length).min(2000);
    let before = cpu()[0];
    for at in 0..count {
        // The same buffers again: the bytes do not matter here.
        sender.send_now(at % BUFFERS);
    }
    rustix::net::connect_unspec(&sender.stream).expect("a reset");
    while sender.owed.iter().any(|owed| *owed > 0) {
        sender.reap(1);
    }
    let time = cpu()[0] - before;
    time.as_secs_f64() * 1e6 / f64::from(u32::try_from(count).expect("few"))
}

fn shares() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: needs root, for a queue of {} MiB", QUEUE_BYTES >> 20);
    }
    println!("| into the queue | sendmsg, us | sendmsg_zc, us |");
    println!("|---|---|---|");
    for length in LENGTHS {
        let rounds: Vec<_> = (0..ROUNDS)
            .map(|_| [Request::SendMsg, Request::SendMsgZc].map(|request| queued(length, request)))
            .collect();
        let of = |at: usize| median(rounds.iter().map(|round| round[at]).collect());
        println!("| {} KiB | {:.1} | {:.1} |", length >> 10, of(0), of(1));
    }
    println!();
}

struct Figures {
    p50_us: f64,
    mib_per_s: f64,
    sender_us_per_mib: f64,
    both_us_per_mib: f64,
    copied: f64,
}

#[expect(clippy::cast_precision_loss, reason = "figures")]
fn measure(address: SocketAddr, length: usize, request: Request) -> Figures {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_nodelay(true).expect("a socket");
    let _ = socket2::SockRef::from(&stream).set_tcp_congestion(b"reno");
    stream.write_all(&(length as u64).to_le_bytes()).expect("a peer");
    let mut sender = Sender::new(stream, length, request);
    let count = ((64 << 20) / length).clamp(40, 2000);
    let mut times = Vec::new();
    for at in 0..count + BUFFERS {
        let begun = Instant::now();
        sender.send(at % BUFFERS);
        sender.answered(1);
        times.push(begun.elapsed());
    }
    times.drain(..BUFFERS);
    times.sort_unstable();
    let count = ((512 << 20) / length).min(16_000);
    let (begun, before) = (Instant::now(), cpu());
    for at in 0..count {
        sender.send(at % BUFFERS);
    }
    sender.answered(count);
    let (took, after) = (begun.elapsed(), cpu());
    while sender.owed.iter().any(|owed| *owed > 0) {
        sender.reap(1);
    }
    let mib = (count * length) as f64 / f64::from(1 << 20);
    let per_mib = |at: usize| (after[at] - before[at]).as_secs_f64() * 1e6 / mib;
    Figures {
        p50_us: times[times.len() / 2].as_secs_f64() * 1e6,
        mib_per_s: mib / took.as_secs_f64(),
        sender_us_per_mib: per_mib(0),
        both_us_per_mib: per_mib(1),
        copied: sender.copied as f64 / sender.notified.max(1) as f64,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn table(place: &str, address: SocketAddr) {
    for length in LENGTHS {
        // In turns, so that both see the same neighbours.
        let rounds: Vec<_> = (0..ROUNDS)
            .map(|_| [Request::SendMsg, Request::SendMsgZc].map(|request| measure(address, length, request)))
            .collect();
        let of =
            |at: usize, figure: fn(&Figures) -> f64| median(rounds.iter().map(|round| figure(&round[at])).collect());
        for (at, name) in ["sendmsg", "sendmsg_zc"].into_iter().enumerate() {
            println!(
                "| {place} | {} KiB | {name} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} % |",
                length >> 10,
                of(at, |figures| figures.p50_us),
                of(at, |figures| figures.mib_per_s),
                of(at, |figures| figures.sender_us_per_mib),
                of(at, |figures| figures.both_us_per_mib),
                of(at, |figures| figures.copied * 100.0),
            );
        }
    }
    // The other end goes, too.
    let _ = TcpStream::connect(address).and_then(|mut stream| stream.write_all(&[0; 8]));
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        Some(arguments.get(at + 1)?.parse::<SocketAddr>().expect("an address and a port"))
    };
    if let Some(address) = value("--serve") {
        return serve(&TcpListener::bind(address).expect("a free port"));
    }
    shares();
    if arguments.iter().any(|argument| argument == "--queue") {
        return;
    }
    println!("| place | length | request | p50, us | MiB/s | sender, us/MiB | both ends, us/MiB | copied |");
    println!("|---|---|---|---|---|---|---|---|");
    if let Some(address) = value("--to") {
        return table("network", address);
    }
    let on = |address: IpAddr| TcpListener::bind((address, 0)).expect("a port");
    let listener = on(Ipv4Addr::LOCALHOST.into());
    let address = listener.local_addr().expect("bound");
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&listener));
        table("loopback", address);
    });
    let Some(cable) = namespace::Cable::lay() else { return };
    let listener = cable.far.run(|| on(cable.far.address()));
    let address = listener.local_addr().expect("bound");
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&listener));
        cable.near.run(|| table("veth", address));
    });
}
