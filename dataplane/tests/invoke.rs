//! The programming model, on both channels (conformance P1-P11, P14).

mod support;

use std::time::{Duration, Instant};

use praas_dataplane::{InvokeError, Ipc, LaunchConfig};
use support::{launch_config, on_both_channels, start, start_with};

#[test]
fn p1_status_and_bytes_come_back_and_a_negative_status_carries_a_text() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start(ipc);
        let reply = client.invoke("status", b"42").unwrap();
        assert_eq!((reply.status(), &*reply), (42, &b"status"[..]));
        let error = client.invoke("fail", b"-7").unwrap_err();
        assert_eq!(error, InvokeError::Failed { status: -7, text: "failed as asked".into() });
    });
}

#[test]
fn p2_empty_and_large_payloads_work_and_larger_ones_are_refused() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start(ipc);
        assert!(client.invoke("empty", b"x").unwrap().is_empty());
        assert!(client.invoke("echo", b"").unwrap().is_empty());
        for bytes in [1, 39, 40, 41, 63, 64, 4095, 4096, 4097, 8112, 8113, 100_000, 4 << 20, 64 << 20] {
            let input: Vec<u8> = (0..bytes).map(|i: usize| (i % 251) as u8).collect();
            let reply = client.invoke("echo", input.clone()).unwrap();
            assert!(*reply == *input, "{bytes} bytes");
        }
        let error = client.invoke("echo", vec![0; (64 << 20) + 1]).unwrap_err();
        assert!(matches!(error, InvokeError::TooLarge { .. }), "{error}");
        let error = client.invoke("large", ((64 << 20) + 1).to_string().as_str()).unwrap_err();
        assert!(matches!(error, InvokeError::Failed { .. }), "{error}");
        let reply = client.invoke("large", (64 << 20).to_string().as_str()).unwrap();
        assert!(reply.len() == 64 << 20 && reply.iter().all(|byte| *byte == 7));
    });
}

#[test]
fn p10_recursion_ends_with_enough_workers_and_with_fewer() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_with(&LaunchConfig { workers: 4, workers_max: if ipc == Ipc::Queue { 4 } else { 6 }, ..launch_config(ipc) });
        assert_eq!(&*client.invoke("power", b"2 3").unwrap(), b"8");
        if ipc == Ipc::Ring {
            assert_eq!(&*client.invoke("power", b"2 4").unwrap(), b"16");
            assert_eq!(&*client.invoke("power", b"3 5").unwrap(), b"243");
        }
        let begun = Instant::now();
        let error = client.invoke("power", b"2 20").unwrap_err();
        assert!(error.to_string().contains("busy"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(20));
    });
}

#[test]
fn leased_calls_of_every_kind_answer_right() {
    let (_process, mut client) = start(Ipc::Ring);
    for mode in ["exchange", "ring", "async", "loan"] {
        for bytes in [0, 8, 40, 41, 5000, 1 << 20] {
            let count = if bytes > 100_000 { 50 } else { 2000 };
            let reply = client.invoke("nested", format!("echo {count} {mode} {bytes}").as_str());
            let reply = reply.unwrap_or_else(|error| panic!("{mode} {bytes}: {error}"));
            assert!(reply.ends_with(b"Some(2)"), "{mode} {bytes}: {}", String::from_utf8_lossy(&reply));
        }
    }
}
