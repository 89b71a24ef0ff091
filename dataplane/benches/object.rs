//! State objects: what it costs to write a value into the block where it stays, to check it, and to read it.
//!
//! Question  Is a typed object as cheap to write as a copy of its bytes, and what does the one check of a reader cost?
//! Measures  `encode`: a value into memory that is written again and again. `sum`: the checksum that its header needs besides. `check`: what a
//!           reader does once for each version. `access`: what it does from then on, and reads one field near the end.
//! Values    `small`: 64 bytes of numbers. `mixed`: 100 strings of 80 bytes and 1000 f64, 17 KB. `long`: f64 of 1 MiB. `points`: structs of three
//!           f64, of 1 MiB, which are copied as a whole. `padded`: structs with padding, of 1 MiB, which are not.
//! Load      one thread, closed loop; memory is warm.
//! Excludes  the block, the index, the message.
//! Checks    each encoded value is checked and its field compared before it is measured.
//! Baseline  `memcpy`: as many bytes, from a buffer of their own to the same memory. `long` and `points` are to stay within 1.1 of it, in one run.
//! Run       cargo bench -p praas-dataplane --bench object

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use praas_dataplane::object::rkyv::util::AlignedVec;
use praas_dataplane::object::{self, Archived, Header, StateType};
use praas_dataplane::state_type;

const MIB: usize = 1 << 20;

state_type! {
    #[derive(Clone, Copy)]
    struct Small {
        words: [u64; 7],
        last: f64,
    }

    struct Mixed {
        names: Vec<String>,
        numbers: Vec<f64>,
    }

    struct Long {
        numbers: Vec<f64>,
    }

    #[derive(Clone, Copy)]
    struct Point {
        x: f64,
        y: f64,
        z: f64,
    }

    struct Points {
        points: Vec<Point>,
    }

    #[derive(Clone, Copy)]
    struct Padded {
        x: f64,
        y: f64,
        kind: u8,
    }

    struct PaddedOnes {
        points: Vec<Padded>,
    }
}

/// One value through everything; `last` reads the field that is compared.
fn one<T: StateType>(c: &mut Criterion, name: &str, value: &T, last: fn(&Archived<T>) -> f64) {
    let mut memory = AlignedVec::<64>::new();
    memory.resize(2 * MIB, 1);
    let bytes = object::encode(value, &mut memory).unwrap();

    let mut group = c.benchmark_group(name);
    group.bench_function("encode", |bencher| {
        bencher.iter(|| object::encode(black_box(value), black_box(&mut memory[..])).unwrap());
    });
    let source: Vec<u8> = memory[..bytes].to_vec();
    group.bench_function("memcpy", |bencher| {
        bencher.iter(|| black_box(&mut memory[..bytes]).copy_from_slice(black_box(&source)));
    });

    let value = &memory[..bytes];
    let header = Header::typed::<T>(1, value);
    assert_eq!(last(object::access::<T>(&header, value).unwrap()).to_bits(), 42.5_f64.to_bits(), "the last field");
    group.bench_function("sum", |bencher| bencher.iter(|| object::checksum(black_box(value))));
    group.bench_function("check", |bencher| {
        bencher.iter(|| object::check::<T>(black_box(&header), black_box(value)).unwrap());
    });
    group.bench_function("access", |bencher| {
        bencher.iter(|| {
            // SAFETY:
            // - in bounds, unshared: `access` above has checked these bytes as a `T`, and nobody writes while `value` borrows them.
            // - unique:  read only.
            last(unsafe { object::access_checked::<T>(black_box(value)) })
        });
    });
    group.finish();
}

fn numbers(count: usize) -> Vec<f64> {
    let mut numbers: Vec<f64> = (0..u32::try_from(count).unwrap()).map(f64::from).collect();
    *numbers.last_mut().unwrap() = 42.5;
    numbers
}

fn benches(c: &mut Criterion) {
    one(c, "small", &Small { words: [7; 7], last: 42.5 }, |small| small.last.to_native());

    let names =
        (0..100).map(|n| format!("a string of some 60 to 100 bytes, number {n}, {}", "x".repeat(n % 40))).collect();
    one(c, "mixed", &Mixed { names, numbers: numbers(1000) }, |mixed| mixed.numbers[999].to_native());

    one(c, "long", &Long { numbers: numbers(MIB / 8) }, |long| long.numbers[MIB / 8 - 1].to_native());

    let points = vec![Point { x: 1.0, y: 2.0, z: 42.5 }; MIB / 24];
    one(c, "points", &Points { points }, |points| points.points[MIB / 24 - 1].z.to_native());

    let padded = vec![Padded { x: 1.0, y: 42.5, kind: 3 }; MIB / 24];
    one(c, "padded", &PaddedOnes { points: padded }, |padded| padded.points[MIB / 24 - 1].y.to_native());
}

criterion_group!(object_benches, benches);
criterion_main!(object_benches);
