//! The price of a frame before and after the kernel: seal, open, and a whole frame through both halves.
//!
//! Question  What do the header, its checksum and its checks cost per frame, beside a 7 µs loopback round trip?
//!           And what does a message cost on a POSIX queue against the bare system calls under it?
//! Measures  mean time per call in one thread. `echo_tcp`: a frame there and back between two connections in one
//!           thread, non-blocking sockets, never sleeping: four system calls and the code around them.
//!           `echo_queue`: a message there and back over two queues, likewise; `raw_queue`: the same records by
//!           bare mq calls is what `praas-bench` measures as its floor, not this file.
//! Load      closed loop, one frame in flight. Says nothing about queueing, wake-ups or two cores.
//! Excludes  the network between hosts, sleeping and waking, payload generation, the owner's arena.
//! Checks    opened headers equal the sealed ones; every echo compares length, call number and last byte.
//! Baseline  `crc32_64_bytes`: the checksum alone, computed twice per frame (writer and reader).
//! Run       cargo bench -p praas-transport --bench frame

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use praas_transport::frame::{Seal, Transit};
use praas_transport::queue::{Buffer, Message, Queue, QueueConfig, Receiver, Sender, create};
use praas_transport::tcp::{Connection, HeapBodies, Received, TcpConfig};
use praas_transport::{Flush, Frame, Header, Key, Limits, Scratch, Terms};

fn header() -> Header {
    Header { kind: 3, function: 7, call: 0x1234_5678, budget_ns: 1_000_000, payload_bytes: 64, ..Header::default() }
}

fn frame(criterion: &mut Criterion) {
    let limits = Limits::default();
    let (header, transit) = (header(), Transit::default());
    let bytes = header.seal(transit, &mut Seal::default());
    assert_eq!(Header::open(&bytes, &mut Seal::default(), &limits), Ok((header, transit)));
    let mut group = criterion.benchmark_group("frame");
    group.bench_function("crc32_64_bytes", |bencher| bencher.iter(|| crc32fast::hash(black_box(&bytes))));
    for (name, key) in [("", None), ("_keyed", Some([7; 32]))] {
        let seal = || key.map_or_else(Seal::default, Seal::keyed);
        group.bench_function(format!("seal{name}"), |bencher| {
            bencher.iter_batched_ref(seal, |seal| black_box(&header).seal(transit, seal), BatchSize::SmallInput);
        });
    }
    group.bench_function("open", |bencher| {
        bencher.iter(|| Header::open(black_box(&bytes), &mut Seal::default(), &limits).expect("sealed above"));
    });
    group.bench_function("open_garbage", |bencher| {
        let garbage = [0x55; 64];
        bencher.iter(|| Header::open(black_box(&garbage), &mut Seal::default(), &limits).expect_err("garbage"));
    });
    for len in [0, 16, 1024] {
        let bytes = vec![7; len];
        group.bench_function(format!("key_{len}"), |bencher| bencher.iter(|| Key::new(black_box(&bytes))));
    }
    group.finish();
}

type Heap = Connection<Vec<u8>, Vec<u8>>;

fn connections() -> (Heap, Heap) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let client = std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let server = listener.accept().expect("a connection").0;
    let connection = |stream: std::net::TcpStream| {
        stream.set_nonblocking(true).expect("a socket");
        let stream = mio::net::TcpStream::from_std(stream);
        Connection::new(stream, Limits::default(), TcpConfig::default(), Terms::default()).expect("a connection")
    };
    (connection(client), connection(server))
}

/// Moves one frame from `from` to `to`, both in this thread.
fn pass(from: &mut Heap, to: &mut Heap, header: &Header, body: Vec<u8>) -> (Header, Vec<u8>) {
    from.send(header, b"", body).expect("nothing waits");
    loop {
        let flushed = from.flush(&mut drop).expect("a live peer");
        if let Some(Frame { header, body: Received::Whole(body), .. }) =
            to.receive(&mut Scratch::default(), &mut HeapBodies).expect("a peer")
        {
            assert_eq!(flushed, Flush::Done);
            return (header, body);
        }
    }
}

fn echo_tcp(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("echo_tcp");
    for len in [8, 4096, 65_536, 1 << 20] {
        let (mut client, mut server) = connections();
        let mut call = 0;
        group.bench_function(format!("{len}"), |bencher| {
            bencher.iter_batched(
                || vec![0x5A; len],
                |body| {
                    call += 1;
                    let (header, body) = pass(&mut client, &mut server, &Header { call, ..Header::default() }, body);
                    let (header, body) = pass(&mut server, &mut client, &header, body);
                    assert!(header.call == call && body.len() == len && body.last() == Some(&0x5A));
                    body
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn echo_queue(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("echo_queue");
    for len in [8, 4096, 65_536] {
        let queue = || {
            let (ours, peers) = create(&QueueConfig::default()).expect("room for two queues");
            (Sender::new(ours), Receiver::new(Queue::from_fd(peers).expect("a queue"), 1 << 30))
        };
        let ((mut to, mut to_peer), (mut from, mut from_peer)) = (queue(), queue());
        let mut pass = |forth: bool, message: Message| {
            let (sender, receiver) = if forth { (&mut to, &mut to_peer) } else { (&mut from, &mut from_peer) };
            sender.queue(message).expect("nothing waits");
            loop {
                let flushed = sender.flush().expect("a queue");
                if let Some(message) = receiver.try_receive().expect("a queue") {
                    assert_eq!(flushed, Flush::Done);
                    receiver.recycle(sender.take_sent().expect("sent").body);
                    return message;
                }
            }
        };
        let mut kept = Some(Message { head: [7; 64], body: Buffer::from(&vec![0x5A; len][..]) });
        group.bench_function(format!("{len}"), |bencher| {
            bencher.iter(|| {
                let message = pass(true, kept.take().expect("one in flight"));
                let message = pass(false, message);
                assert!(message.body.len() == len && message.body.last() == Some(&0x5A));
                kept = Some(message);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, frame, echo_tcp, echo_queue);
criterion_main!(benches);
