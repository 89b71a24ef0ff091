//! The arena: what a block costs its owner.
//!
//! Question  What do loan, lend and release cost when blocks are recycled, and what does memory cost at first use?
//! Measures  `recycled`: loan, lend, release of one block, by size; no byte of it is touched. `mixed`: the same over a
//!           thousand blocks of many sizes, in random order. `first_use`: loan of fresh memory and a write to each page.
//! Load      one thread, closed loop.
//! Excludes  content (except `first_use`), and the messages that carry references.
//! Checks    each block's reference lies in bounds and each release is accepted; at the end nothing is in use.
//! Baseline  `boxed`: the heap's allocation of the same size, freed at once.
//! Run       cargo bench -p praas-shm --bench arena

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use praas_shm::{Arena, BlockRef, Identity, OwnSegment, ParticipantId, SegmentConfig, SegmentFile};

const ARENA_BYTES: u64 = 256 << 20;

fn arena() -> Arena {
    let config = SegmentConfig { ring_slots: 64, arena_bytes: ARENA_BYTES };
    let file = SegmentFile::create(&config).unwrap();
    let identity = Identity { participant: ParticipantId::CONTROLLER, incarnation: 1, process: [0; 16] };
    OwnSegment::map(&file, &identity, &config).unwrap().arena().unwrap()
}

fn worker() -> ParticipantId {
    ParticipantId::new(1).unwrap()
}

fn lend_one(arena: &mut Arena, bytes: usize) -> BlockRef {
    let block = arena.loan(bytes).unwrap();
    let lent = arena.lend(block, bytes, worker());
    assert!(lent.offset + lent.len <= ARENA_BYTES);
    lent
}

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("arena");
    for bytes in [64, 4096, 1 << 20, 5 << 20] {
        let mut arena = arena();
        group.bench_function(format!("recycled/{bytes}"), |bencher| {
            bencher.iter(|| {
                let lent = lend_one(&mut arena, bytes);
                arena.release(worker(), lent.index, lent.generation).unwrap();
            });
        });
        assert_eq!(arena.stats().used_bytes, 0);
        group.bench_function(format!("boxed/{bytes}"), |bencher| {
            bencher.iter(|| drop(black_box(Vec::<u8>::with_capacity(bytes))));
        });
    }

    let mut arena_of_many = arena();
    let mut noise = 1_u64;
    let mut random = move |below: usize| {
        noise = noise.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        usize::try_from(noise >> 33).unwrap() % below
    };
    let mut lent: Vec<BlockRef> = (0..1000).map(|_| lend_one(&mut arena_of_many, random(20_000))).collect();
    group.bench_function("mixed/1000_blocks", |bencher| {
        bencher.iter(|| {
            let at = random(lent.len());
            let old = lent[at];
            arena_of_many.release(worker(), old.index, old.generation).unwrap();
            lent[at] = lend_one(&mut arena_of_many, random(20_000));
        });
    });
    for old in lent {
        arena_of_many.release(worker(), old.index, old.generation).unwrap();
    }
    assert_eq!(arena_of_many.stats().used_bytes, 0);

    group.throughput(Throughput::Bytes(2 << 20));
    group.bench_function("first_use/2MiB", |bencher| {
        bencher.iter_batched_ref(
            arena,
            |arena| {
                let mut block = arena.loan(2 << 20).unwrap();
                block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
                arena.free(block);
            },
            BatchSize::PerIteration,
        );
    });
    group.bench_function("first_use/2MiB_after_prepare", |bencher| {
        bencher.iter_custom(|rounds| {
            let mut taken = Duration::ZERO;
            for _ in 0..rounds {
                let mut arena = arena();
                arena.prepare(2 << 20).unwrap();
                let start = Instant::now();
                let mut block = arena.loan(2 << 20).unwrap();
                block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
                taken += start.elapsed();
                arena.free(block);
            }
            taken
        });
    });
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
