//! The ring and the exchange line between two threads on two cores, and on one core without company.
//!
//! Question  What do a descriptor's way through the ring and a call over the exchange line cost, against a bare cache line?
//! Measures  `push_pop`: send and poll in one thread, no transfer between cores: instructions only. `round_trip`: request
//!           and answer, two threads spinning on two cores; not halved. `stream`: descriptors one way, both threads busy.
//! Load      closed loop, one call in flight (`round_trip`); as many as the ring takes (`stream`).
//! Excludes  OS processes (same cache lines, same cost), sleeping, page faults (segments are in use before), blocks' content.
//! Checks    every answer carries the number of its request, every stream arrives in order. A wrong ring cannot be fast.
//! Baseline  `bare_two_lines`, `bare_one_line`: an atomic counter bounced over two lines, or one: what the machine takes.
//! Run       cargo bench -p praas-shm --bench ring

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use praas_shm::{
    Descriptor, ExchangeCallee, ExchangeCaller, ExchangeReply, Identity, Inline, Link, OwnSegment, ParticipantId,
    PeerSegment, SegmentConfig, SegmentFile, child, eventfd, exchange,
};

const CONFIG: SegmentConfig = SegmentConfig { ring_slots: 256, arena_bytes: 2 << 20 };

#[repr(align(128))]
struct Apart<T>(T);

/// As they were before anybody was pinned.
static CORES: LazyLock<Vec<usize>> = LazyLock::new(child::allowed_cpus);

fn linked() -> (Link, Link) {
    let side = |number: u8| {
        let identity = Identity { participant: ParticipantId::new(number).unwrap(), incarnation: 1, process: [0; 16] };
        let file = SegmentFile::create(&CONFIG).unwrap();
        let own = OwnSegment::map(&file, &identity, &CONFIG).unwrap();
        file.seal_future_write().unwrap();
        (own, PeerSegment::attach(&file, &identity, &CONFIG).unwrap())
    };
    let ((a, a_as_peer), (b, b_as_peer)) = (side(0), side(1));
    let link = |own, peer: Arc<PeerSegment>| Link::establish(own, peer, eventfd().unwrap()).unwrap();
    (link(&a, b_as_peer), link(&b, a_as_peer))
}

fn message(id: u64, bytes: usize) -> Descriptor {
    Descriptor::new(1, 0, id, id, Inline::new(&[7; 40][..bytes]).unwrap())
}

/// Runs `partner` on the other core while `measured` runs on this one.
fn beside<R>(partner: impl FnOnce(&AtomicBool) + Send, measured: impl FnOnce() -> R) -> Option<R> {
    let [one, other, ..] = CORES[..] else {
        println!("skipped: needs two cores");
        return None;
    };
    // Far from both stacks: on this one it would share a line with what `measured` writes, and cost 200 ns a round.
    let stop = Box::new(Apart(AtomicBool::new(false)));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            child::pin_current(&[other]).unwrap();
            partner(&stop.0);
        });
        child::pin_current(&[one]).unwrap();
        let result = measured();
        stop.0.store(true, Ordering::Relaxed);
        Some(result)
    })
}

fn bounce(rounds: u64, request: &AtomicU64, reply: &AtomicU64) -> Option<Duration> {
    request.store(0, Ordering::Relaxed);
    reply.store(0, Ordering::Relaxed);
    beside(
        |stop| {
            let mut expected = 1;
            while !stop.load(Ordering::Relaxed) {
                if request.load(Ordering::Acquire) == expected {
                    reply.store(expected + 1, Ordering::Release);
                    expected += 2;
                }
                spin_loop();
            }
        },
        || {
            let start = Instant::now();
            for round in 0..rounds {
                request.store(2 * round + 1, Ordering::Release);
                while reply.load(Ordering::Acquire) != 2 * round + 2 {
                    spin_loop();
                }
            }
            start.elapsed()
        },
    )
}

fn ring_round_trips(rounds: u64, bytes: usize) -> Option<Duration> {
    let (mut a, mut b) = linked();
    beside(
        move |stop| {
            while !stop.load(Ordering::Relaxed) {
                match b.consumer.poll().unwrap() {
                    Some(request) => {
                        b.producer.try_send(&request).unwrap();
                        b.bell.ring();
                    }
                    None => spin_loop(),
                }
            }
        },
        || {
            let start = Instant::now();
            for id in 0..rounds {
                a.producer.try_send(&message(id, bytes)).unwrap();
                a.bell.ring();
                let reply = loop {
                    match a.consumer.poll().unwrap() {
                        Some(reply) => break reply,
                        None => spin_loop(),
                    }
                };
                assert_eq!(reply.id(), id);
            }
            start.elapsed()
        },
    )
}

fn exchange_round_trips(rounds: u64, bytes: usize) -> Option<Duration> {
    let page = exchange::create().unwrap();
    let mut callee = ExchangeCallee::from_fd(page.try_clone().unwrap()).unwrap();
    let mut caller = ExchangeCaller::from_fd(page).unwrap();
    beside(
        move |stop| {
            while !stop.load(Ordering::Relaxed) {
                match callee.poll().unwrap() {
                    Some((_, request)) => callee.reply(&request),
                    None => spin_loop(),
                }
            }
        },
        || {
            let start = Instant::now();
            for id in 0..rounds {
                let sequence = caller.submit(&message(id, bytes));
                let reply = loop {
                    match caller.poll().unwrap() {
                        Some(ExchangeReply::Reply(reply)) => break reply,
                        Some(ExchangeReply::Closed) => panic!("nobody closed"),
                        None => spin_loop(),
                    }
                };
                assert_eq!((reply.id(), reply.aux()), (sequence.into(), id));
            }
            start.elapsed()
        },
    )
}

fn ring_stream(count: u64) -> Option<Duration> {
    let (mut a, mut b) = linked();
    beside(
        move |stop| {
            let mut id = 0;
            while !stop.load(Ordering::Relaxed) {
                if b.producer.try_send(&message(id, 8)).is_ok() {
                    id += 1;
                }
            }
        },
        || {
            let start = Instant::now();
            for id in 0..count {
                let received = loop {
                    match a.consumer.poll().unwrap() {
                        Some(received) => break received,
                        None => spin_loop(),
                    }
                };
                assert_eq!(received.id(), id);
            }
            start.elapsed()
        },
    )
}

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring");
    let (mut a, mut b) = linked();
    for bytes in [0, 8, 40] {
        group.bench_function(format!("push_pop/{bytes}"), |bencher| {
            let mut id = 0;
            bencher.iter(|| {
                id += 1;
                a.producer.try_send(&message(id, bytes)).unwrap();
                let received = b.consumer.poll().unwrap().unwrap();
                assert_eq!(received.id(), id);
            });
        });
    }
    group.bench_function("poll_empty", |bencher| bencher.iter(|| b.consumer.poll().unwrap().is_none()));
    group.bench_function("bell_awake", |bencher| bencher.iter(|| a.bell.ring()));

    let (one, other) = (Apart([AtomicU64::new(0), AtomicU64::new(0)]), Apart([AtomicU64::new(0)]));
    let mut two_cores = |name: &str, run: &dyn Fn(u64) -> Option<Duration>| {
        if run(10).is_some() {
            group.bench_function(name, |bencher| bencher.iter_custom(|rounds| run(rounds).unwrap_or_default()));
        }
    };
    two_cores("round_trip/bare_two_lines", &|rounds| bounce(rounds, &one.0[0], &other.0[0]));
    two_cores("round_trip/bare_one_line", &|rounds| bounce(rounds, &one.0[0], &one.0[1]));
    two_cores("round_trip/ring/8", &|rounds| ring_round_trips(rounds, 8));
    two_cores("round_trip/ring/40", &|rounds| ring_round_trips(rounds, 40));
    two_cores("round_trip/exchange/8", &|rounds| exchange_round_trips(rounds, 8));
    two_cores("round_trip/exchange/40", &|rounds| exchange_round_trips(rounds, 40));
    group.throughput(Throughput::Elements(1));
    if ring_stream(10).is_some() {
        group.bench_function("stream/8", |b| b.iter_custom(|count| ring_stream(count).unwrap_or_default()));
    }
    group.finish();
}

criterion_group! {
    name = all;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(30);
    targets = benches
}
criterion_main!(all);
