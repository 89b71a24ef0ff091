//! The corpus of `transport/fuzz`, and changes of it: what the fuzzers do, a little of it each time, with the usual compiler.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use super::{frames, hello, mix, stream};

/// Every file of a target's corpus, then so many changes of them.
fn replay(target: &str, run: fn(&[u8]), changes: u64) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    paths.sort();
    let corpus: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).expect("a readable file")).collect();
    assert!(corpus.len() >= 10, "{} files in {}", corpus.len(), folder.display());
    for (path, input) in paths.iter().zip(&corpus) {
        attempt(run, input, &path.display().to_string());
    }
    for seed in 0..changes {
        attempt(run, &change(&corpus, seed), &format!("{target}, seed {seed}"));
    }
}

/// Says which input it was: the panic says what is wrong with it.
fn attempt(run: fn(&[u8]), input: &[u8], what: &str) {
    let run = std::panic::catch_unwind(|| run(input));
    assert!(run.is_ok(), "{what}: {}", input.escape_ascii());
}

/// A few bytes of one input changed, or taken out, or put in from another.
fn change(corpus: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut state = mix(seed);
    let mut below = |end: usize| {
        state = mix(state);
        usize::try_from(state % end.max(1) as u64).expect("small")
    };
    let mut input = corpus[below(corpus.len())].clone();
    for _ in 0..=below(4) {
        let at = below(input.len());
        let until = (at + 1 + below(16)).min(input.len());
        match below(4) {
            0 if !input.is_empty() => input[at] ^= 1 << below(8),
            1 if !input.is_empty() => input[at] = u8::try_from(below(256)).expect("a byte"),
            2 => drop(input.drain(at.min(until)..until)),
            _ => {
                let other = &corpus[below(corpus.len())];
                let from = below(other.len());
                let piece = &other[from..(from + 1 + below(80)).min(other.len())];
                drop(input.splice(at..at, piece.iter().copied()));
            }
        }
    }
    input
}

#[test]
fn n5_r3_the_corpus_of_streams_of_frames_and_changes_of_it() {
    replay("frames", frames, 2_000);
}

#[test]
fn r3_n3_n6_the_corpus_of_frames_sent_and_changes_of_it() {
    replay("stream", stream, 1_000);
}

#[test]
fn a1_r5_the_corpus_of_hellos_and_changes_of_it() {
    replay("hello", hello, 4_000);
}
