//! A worker program whose worker 1 is an attacker (faults.md W11, R1-R3, G4): it speaks the protocol by hand, up to the
//! moment it is called with `evil NAME`, and then does what NAME says. Every other worker is an honest one. What it does to the state
//! stands in `state.rs`, what with messages in `mail.rs`.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod batch;
mod mail;
mod state;

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use praas_dataplane::{Context, Failure, Input, Output, Worker};
use praas_shm::{
    Arena, BlockRef, Body, Descriptor, Identity, Inline, Link, OwnSegment, ParticipantId, PeerSegment, SegmentConfig,
    SegmentFile, child, handover,
};
use praas_transport::queue::{Buffer, Message, Queue, Receiver, Sender};
use serde_json::Value;

const FUNCTIONS: [&str; 12] =
    ["echo", "evil", "pid", "sleep", "put", "get", "overwrite", "keys", "model", "copy", "mail", "together"];

// Kinds of records, as numbers: an attacker has no use for our constants.
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const RELEASE: u8 = 3;
const TAKEN: u8 = 8;
const CLOSED: u8 = 9;
const DROPPED: u8 = 10;
const FORGOTTEN: u8 = 11;
const OVERRUN: u8 = 12;
const BATCH: u8 = 41;

fn main() -> ExitCode {
    let Ok(control) = child::inherited_control() else { return ExitCode::from(2) };
    let mut buffer = vec![0; 64 << 10];
    let (_, bytes) = rustix::net::recv(&control, &mut buffer[..], rustix::net::RecvFlags::PEEK).expect("a greeting");
    let greeting: Value = serde_json::from_slice(&buffer[..bytes]).expect("a greeting");
    if greeting["Welcome"]["participant"] == 1 {
        Evil::register(control).serve();
    }
    // It stays where it is, for `serve` to find.
    let _ = control.into_raw_fd();
    let worker = Worker::new()
        .function("echo", |_, input| Ok(input.into()))
        .function("evil", |_, _| Ok(Output::from(b"honest")))
        .function("pid", |_, _| Ok(std::process::id().to_string().into()))
        .function("sleep", sleep);
    batch::honest(mail::honest(state::honest(worker))).serve()
}

fn sleep(_: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let ms = String::from_utf8_lossy(&input).parse().unwrap_or(0);
    std::thread::sleep(Duration::from_millis(ms));
    Ok(Output::from(b"slept"))
}

enum Wire {
    Ring { link: Box<Link>, _own: OwnSegment, arena: Box<Arena> },
    Queue { sender: Box<Sender>, receiver: Box<Receiver> },
}

struct Evil {
    control: OwnedFd,
    wire: Wire,
    me: ParticipantId,
    /// Over rings: counted from the controller's.
    life: u64,
}

impl Evil {
    fn register(control: OwnedFd) -> Evil {
        let (greeting, mut fds) = receive(&control);
        let welcome = &greeting["Welcome"];
        let number = |name: &str| welcome[name].as_u64().expect("a number");
        let me = ParticipantId::new(number("participant") as u8).expect("a participant");
        let mut process = [0; 16];
        for (byte, value) in process.iter_mut().zip(welcome["process_id"].as_array().expect("bytes")) {
            *byte = value.as_u64().expect("a byte") as u8;
        }
        let mut fd = || fds.next().expect("a descriptor");
        let mut base = 0;
        let wire = if welcome["ipc"] == "ring" {
            let config = SegmentConfig { ring_slots: number("ring_slots") as u32, arena_bytes: number("arena_bytes") };
            let identity = Identity { participant: me, incarnation: number("incarnation"), process };
            let own = OwnSegment::map(&SegmentFile::from_fd(fd()), &identity, &config).expect("our segment");
            drop(own.doorbell(fd()));
            let bell = fd();
            say(&control, &Value::from("Mapped"));
            let (attached, mut fds) = receive(&control);
            let incarnation = attached["Attached"]["incarnation"].as_u64().expect("an incarnation");
            let identity = Identity { participant: ParticipantId::CONTROLLER, incarnation, process };
            let file = SegmentFile::from_fd(fds.next().expect("the controller's segment"));
            let controller = PeerSegment::attach(&file, &identity, &config).expect("the controller's segment");
            let link = Link::establish(&own, Arc::clone(&controller), bell).expect("a link");
            base = incarnation;
            let arena = own.arena().expect("our arena");
            Wire::Ring { link: Box::new(link), _own: own, arena: Box::new(arena) }
        } else {
            let receiver = Receiver::new(Queue::from_fd(fd()).expect("a queue"), 64 << 20);
            let sender = Sender::new(Queue::from_fd(fd()).expect("a queue"));
            Wire::Queue { sender: Box::new(sender), receiver: Box::new(receiver) }
        };
        let ready = serde_json::json!({ "version": 1, "functions": FUNCTIONS, "triggers": batch::triggers() });
        say(&control, &serde_json::json!({ "Ready": ready }));
        let life = number("incarnation") - base;
        Evil { control, wire, me, life }
    }

    /// Sends a record; gives up after a second of a full ring.
    fn send(&mut self, descriptor: Descriptor) {
        self.send_with(descriptor, Buffer::with_len(0));
    }

    /// The same, with a body where it travels in a queue.
    fn send_with(&mut self, descriptor: Descriptor, body: Buffer) {
        match &mut self.wire {
            Wire::Ring { link, .. } => {
                let until = Instant::now() + Duration::from_secs(1);
                while link.producer.try_send(&descriptor).is_err() && Instant::now() < until {
                    link.bell.ring();
                    std::thread::yield_now();
                }
                link.bell.ring();
            }
            Wire::Queue { sender, .. } => {
                let message = Message { head: descriptor.to_bytes(), body };
                let _ = sender.queue(message);
                let _ = sender.flush();
            }
        }
    }

    fn tell(&mut self, kind: u8, tag: u16, id: u64, aux: u64) {
        self.send(Descriptor::new(kind, tag, id, aux, Body::Inline(Inline::empty())));
    }

    fn poll(&mut self) -> Descriptor {
        loop {
            match &mut self.wire {
                Wire::Ring { link, .. } => match link.consumer.poll() {
                    Ok(Some(descriptor)) => return descriptor,
                    _ => std::thread::sleep(Duration::from_micros(200)),
                },
                Wire::Queue { receiver, .. } => {
                    if let Ok(Some(message)) = receiver.receive() {
                        return Descriptor::from_bytes(&message.head).expect("an honest controller");
                    }
                }
            }
        }
    }

    fn serve(mut self) -> ! {
        loop {
            let record = self.poll();
            if record.kind() == BATCH {
                self.attack_batch(&record);
                continue;
            }
            if record.kind() & 0x7f != REQUEST {
                continue;
            }
            if record.tag() > 3 {
                // Those of honest workers: it says who it is, and not too soon, so that the next is given to another.
                std::thread::sleep(Duration::from_millis(3));
                let body = Body::Inline(Inline::new(b"evil").expect("short"));
                self.send(Descriptor::new(REPLY, 1, record.id(), 1, body));
                continue;
            }
            let Body::Inline(inline) = record.body() else {
                // Called with more than a record holds: the attack with the longer echo.
                let Body::Block(block) = record.body() else { unreachable!("inline or block") };
                self.reply(record.id(), Body::Block(BlockRef { len: block.len + 4096, ..block }));
                continue;
            };
            if record.tag() == 2 {
                let pid = std::process::id().to_string();
                self.reply(record.id(), Body::Inline(Inline::new(pid.as_bytes()).expect("short")));
                continue;
            }
            if record.tag() != 1 {
                self.reply(record.id(), record.body());
                continue;
            }
            // Its only honest word: the call has begun, so that it is lost with us and not given to an honest worker.
            if let Wire::Ring { link, .. } = &self.wire {
                link.mark_taken(link.consumer.head());
            }
            let name = String::from_utf8_lossy(inline.as_slice()).into_owned();
            self.attack(&name, record.id());
            self.reply(record.id(), Body::Inline(Inline::new(b"done").expect("short")));
        }
    }

    fn reply(&mut self, id: u64, body: Body) {
        self.send(Descriptor::new(REPLY, 0, id, 0, body));
    }

    fn attack(&mut self, name: &str, call: u64) {
        let block = BlockRef { owner: self.me, index: 0, generation: 0, offset: 0, len: 100 };
        match name {
            "unknown kind" => self.tell(77, 0, call, 0),
            "another reply" => self.reply(call + 1, Body::Inline(Inline::empty())),
            "reply to nobody" => self.reply(u64::MAX, Body::Inline(Inline::empty())),
            "reply twice" => {
                self.reply(call, Body::Inline(Inline::empty()));
                self.reply(call, Body::Inline(Inline::empty()));
            }
            "unknown code" => self.tell(REPLY, 999, call, 0),
            "block far away" => self.reply(call, Body::Block(BlockRef { offset: 1 << 50, ..block })),
            "block overflow" => self.reply(call, Body::Block(BlockRef { offset: !63, len: 128, ..block })),
            "block unaligned" => self.reply(call, Body::Block(BlockRef { offset: 13, ..block })),
            "block too long" => self.reply(call, Body::Block(BlockRef { len: u64::MAX, ..block })),
            "block over the end" => {
                self.reply(call, Body::Block(BlockRef { offset: (256 << 20) - 64, len: 65, ..block }))
            }
            "block of nobody" => {
                let owner = ParticipantId::new(50).expect("below 64");
                self.reply(call, Body::Block(BlockRef { owner, ..block }));
            }
            "block of the controller" => {
                self.reply(call, Body::Block(BlockRef { owner: ParticipantId::CONTROLLER, ..block }));
            }
            "close a stranger's lease" => self.tell(CLOSED, 0, 99, 0),
            "take a lease never granted" => self.tell(TAKEN, 0, 99, 0),
            "forget nobody" => self.tell(FORGOTTEN, 70, 0, 0),
            "release nothing" => self.tell(RELEASE, 0, 0, 0),
            "release to nobody" => self.send(Descriptor::new(RELEASE, 900, 0, 0, Body::Block(block))),
            "talk on the control socket" => {
                let _ = handover::send(self.control.as_fd(), b"{\"gibberish\": [", &[]);
                std::thread::sleep(Duration::from_secs(5));
            }
            "register again" => {
                say(&self.control, &serde_json::json!({ "Ready": { "version": 1, "functions": FUNCTIONS } }));
                std::thread::sleep(Duration::from_secs(5));
            }
            "map again" => {
                say(&self.control, &Value::from("Mapped"));
                std::thread::sleep(Duration::from_secs(5));
            }
            "harmless lies" => {
                for id in 0..2000 {
                    self.tell(DROPPED, 0, id, 0);
                    self.tell(OVERRUN, 0, id, 0);
                    self.tell(FORGOTTEN, (id % 64) as u16, 0, 0);
                    let body = Body::Block(BlockRef { index: id as u32, ..block });
                    self.send(Descriptor::new(RELEASE, 0, id, 0, body));
                }
            }
            "requests that fail" => {
                for id in 0..500 {
                    self.tell(REQUEST, 999, id, u64::MAX);
                    self.tell(REQUEST, 0, id, 1);
                }
            }
            "flood of requests" => {
                for id in 0..20_000 {
                    self.tell(REQUEST, 0, id, u64::MAX);
                }
            }
            "flood of releases" => {
                // In the name of worker 1, to worker 2, who is busy.
                for id in 0..20_000 {
                    self.send(Descriptor::new(RELEASE, 2, id, 0, Body::Block(block)));
                }
            }
            "a lease from far away" => {
                self.tell(REQUEST, 0, 1, u64::MAX);
                let (lease, _) = receive(&self.control);
                let lease =
                    lease["Lease"]["lease"].as_u64().or_else(|| receive(&self.control).0["Lease"]["lease"].as_u64());
                self.tell(TAKEN, 0, lease.expect("a lease"), 1 << 40);
            }
            "deaf on the control socket" => {
                for id in 0..2_000 {
                    self.tell(REQUEST, 0, id, u64::MAX);
                    while self.poll().kind() & 0x7f != REPLY {}
                    for lease in id.saturating_sub(1)..id + 3 {
                        self.tell(DROPPED, 0, lease, 0);
                    }
                }
            }
            "scribble" => scribble(),
            "bell" => {
                let until = Instant::now() + Duration::from_secs(2);
                while Instant::now() < until {
                    if let Wire::Ring { link, .. } = &self.wire {
                        link.bell.ring();
                    }
                }
            }
            _ if name.starts_with("unseen: ") => {
                // The controller is stopped, and finds the crime and our death at once.
                let stat = || std::fs::read_to_string(format!("/proc/{}/stat", std::os::unix::process::parent_id()));
                while !stat().is_ok_and(|stat| stat.contains(") T ")) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                self.attack(&name["unseen: ".len()..], call);
                std::process::exit(0);
            }
            _ if name.starts_with("mail:") => self.attack_mail(name),
            _ => self.attack_state(name),
        }
    }
}

/// Overwrites all of our own segment, again and again, with noise: rings, lines, identity, arena.
fn scribble() {
    let maps = BufReader::new(File::open("/proc/self/maps").expect("our maps")).lines().map_while(Result::ok);
    let ours: Vec<(u64, u64)> = maps
        .filter(|line| line.contains("memfd:") && line.contains(" rw"))
        .filter_map(|line| {
            let (from, to) = line.split_whitespace().next()?.split_once('-')?;
            Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
        })
        .collect();
    assert!(!ours.is_empty(), "no segment of our own");
    let mut memory = std::fs::OpenOptions::new().write(true).open("/proc/self/mem").expect("our memory");
    let mut noise = [0_u8; 4096];
    let mut seed = 1_u64;
    let until = Instant::now() + Duration::from_millis(700);
    while Instant::now() < until {
        for (from, to) in &ours {
            // The head of the segment, where everything but payloads is, and a little of the arena.
            for at in (*from..(*to).min(from + (3 << 20))).step_by(noise.len()) {
                for byte in &mut noise {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // Plausible numbers hurt more than wild ones.
                    *byte = if seed >> 62 == 0 { (seed >> 56) as u8 & 3 } else { (seed >> 56) as u8 };
                }
                if memory.seek(SeekFrom::Start(at)).is_err() || memory.write_all(&noise).is_err() {
                    break;
                }
            }
        }
    }
}

fn receive(control: &OwnedFd) -> (Value, std::vec::IntoIter<OwnedFd>) {
    let mut buffer = vec![0; 64 << 10];
    let (bytes, fds) = handover::receive(control.as_fd(), &mut buffer).expect("the control socket");
    (serde_json::from_slice(&buffer[..bytes]).expect("an honest controller"), fds.into_iter())
}

fn say(control: &OwnedFd, message: &Value) {
    let bytes = serde_json::to_vec(message).expect("JSON");
    let _ = handover::send(control.as_fd(), &bytes, &[]);
}
