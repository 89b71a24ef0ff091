//! Unsafe code stands in the files that are named for it and in no other, so that a reviewer knows where to look.

use std::fs;
use std::path::{Path, PathBuf};

/// The files, by path from the root of the repository. Adding one is a decision.
const NAMED: &[&str] = &[
    "control/src/doctor/trial.rs",
    "dataplane/src/object/typed.rs",
    "dataplane/src/runtime/body.rs",
    "dataplane/src/worker/typed.rs",
    "microbench/src/peers/uring.rs",
    "microbench/src/raw.rs",
    "shm/src/arena.rs",
    "shm/src/child.rs",
    "shm/src/doorbell.rs",
    "shm/src/exchange.rs",
    "shm/src/index.rs",
    "shm/src/index/entry.rs",
    "shm/src/mapping.rs",
    "shm/src/pair.rs",
    "shm/src/connection_line.rs",
    "shm/src/peer_line.rs",
    "shm/src/pins.rs",
    "shm/src/prefetch.rs",
    "shm/src/ring.rs",
    "shm/src/segment.rs",
    "shm/src/sync.rs",
    "transport/src/acknowledged.rs",
    "transport/src/queue.rs",
    "transport/src/reactor/buffers.rs",
    "transport/src/reactor/uring.rs",
];

/// Folders of product code; tests may do what an attacker or a kernel would do.
const SOURCES: &[&str] =
    &["shm/src", "transport/src", "dataplane/src", "control/src", "microbench/src", "examples/src"];

/// Whether a line opens unsafe code. Lints and comments only talk about it.
fn opens_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    ["unsafe {", "unsafe fn ", "unsafe impl", "unsafe extern", "unsafe trait ", "unsafe(no_mangle"]
        .iter()
        .any(|opening| code.contains(opening))
}

/// Product code of a file: what stands before its test module.
fn without_tests(text: &str) -> &str {
    let tests = ["\n#[cfg(test)]\nmod ", "\n#[cfg(test)]\n#[path"].iter().filter_map(|start| text.find(start)).min();
    &text[..tests.unwrap_or(text.len())]
}

/// Files that hold nothing but tests or models.
fn is_test(path: &Path) -> bool {
    path.ends_with("tests.rs") || path.ends_with("models.rs") || path.to_string_lossy().ends_with("_tests.rs")
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.map(|entry| entry.expect("a readable folder").path()) {
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test(&path) {
            found.push(path);
        }
    }
}

#[test]
fn unsafe_code_stands_in_named_files_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut files = Vec::new();
    for folder in SOURCES {
        rust_files(&root.join(folder), &mut files);
    }
    assert!(files.len() > 20, "the sources were found: {}", files.len());
    let strangers: Vec<String> = files
        .iter()
        .filter(|file| {
            let text = fs::read_to_string(file).expect("UTF-8");
            without_tests(&text).lines().any(opens_unsafe)
        })
        .map(|file| file.strip_prefix(root).expect("below the root").display().to_string())
        .filter(|file| !NAMED.contains(&file.as_str()))
        .collect();
    assert!(strangers.is_empty(), "unsafe code outside the files named for it: {strangers:?}");
}

#[test]
fn unsafe_code_is_seen_where_it_is_and_not_where_it_is_talked_about() {
    for line in ["let x = unsafe { *p };", "unsafe impl Send for X {}", "pub unsafe fn f() {}"] {
        assert!(opens_unsafe(line), "{line}");
    }
    for line in ["#![deny(unsafe_code)]", "// unsafe { is discussed }", "#![forbid(unsafe_op_in_unsafe_fn)]"] {
        assert!(!opens_unsafe(line), "{line}");
    }
    assert_eq!(without_tests("a\n#[cfg(test)]\nuse b;\nc\n#[cfg(test)]\nmod tests {}").lines().count(), 4);
}
