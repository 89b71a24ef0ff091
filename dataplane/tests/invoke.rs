//! The programming model, on both channels (conformance P1-P11, P14).
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::time::{Duration, Instant};

use praas_dataplane::client::Outgoing;
use praas_dataplane::wire::frame;
use praas_dataplane::{InvokeError, Ipc, LaunchConfig};
use praas_transport::Header;
use support::raw::Raw;
use support::{
    PATIENCE, children, connect, content, launch_config, on_both_channels, queues_for, signal, start, start_with,
    start_workers, wait_until,
};

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
        let (_process, mut client) = start_with(&LaunchConfig {
            workers: 4,
            workers_max: if ipc == Ipc::Queue { 4 } else { 6 },
            ..launch_config(ipc)
        });
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
fn p12_functions_wait_for_whichever_call_ends_first_and_call_others_off() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_with(&LaunchConfig { workers: 4, workers_max: 4, ..launch_config(ipc) });
        let text = |reply: &[u8]| String::from_utf8_lossy(reply).into_owned();
        let ended = text(&client.invoke("any", "120 10 60").unwrap());
        assert_eq!(ended, "slept slept slept", "{ipc}");
        drop(process);
        let begun = Instant::now();
        // What was called off has not run: the one that was not is the first that its worker counts, or one of few.
        let (_process, mut client) = start_with(&LaunchConfig { workers: 2, workers_max: 2, ..launch_config(ipc) });
        let counted: u32 = text(&client.invoke("call_off", "30").unwrap()).parse().unwrap();
        let after: u32 = text(&client.invoke("call_off", "1").unwrap()).parse().unwrap();
        assert!(counted <= 2 && after <= 4, "{ipc}: {counted}, {after}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{ipc}");
    });
}

#[test]
fn leased_calls_of_every_kind_answer_right() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start(ipc);
        for mode in ["exchange", "ring", "async", "loan"] {
            for bytes in [0, 8, 40, 41, 5000, 8192, 1 << 20] {
                if (ipc, mode, bytes) == (Ipc::Queue, "loan", 0) {
                    // A queue carries no empty buffer: it comes back as no bytes instead of as no bytes of ours.
                    continue;
                }
                let count = if bytes > 100_000 { 20 } else { 1000 };
                let reply = client.invoke("nested", format!("echo {count} {mode} {bytes}").as_str());
                let reply = reply.unwrap_or_else(|error| panic!("{ipc} {mode} {bytes}: {error}"));
                let (text, leased) = (String::from_utf8_lossy(&reply), mode != "async" || ipc == Ipc::Ring);
                assert!(!leased || text.ends_with("Some(2)"), "{ipc} {mode} {bytes}: {text}");
                assert!(ipc == Ipc::Ring || !leased || text.starts_with("Queue"), "{mode} {bytes}: {text}");
            }
        }
    });
}

/// A leased worker is taken back whenever somebody else needs it, and given again: no call is lost on the way, none runs twice.
#[test]
fn leases_come_and_go_under_calls_of_others() {
    on_both_channels(|ipc| {
        let (process, mut client) = start(ipc);
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| {
                let mut client = connect(&process);
                for (mode, bytes) in [("exchange", 8), ("exchange", 100_000), ("ring", 8), ("loan", 5000)] {
                    let reply = client.invoke("nested", format!("echo 400 {mode} {bytes}").as_str());
                    reply.unwrap_or_else(|error| panic!("{ipc} {mode} {bytes}: {error}"));
                }
            });
            let mut others: u64 = 0;
            while !caller.is_finished() {
                others += 1;
                assert_eq!(&*client.invoke("echo", &others.to_le_bytes()).unwrap(), others.to_le_bytes());
            }
            assert!(others > 10, "{ipc}: others were served {others} times");
            caller.join().unwrap();
        });
    });
}

#[test]
fn p3_an_echo_brings_the_callers_own_block_back_leased_and_through_the_controller() {
    for leases in ["true", "false"] {
        let (_process, mut client) = start_workers(Ipc::Ring, 2, &["--leases", leases]);
        // `loan` fails with "not our own block" unless each answer is the memory that was sent.
        for bytes in [41, 5000, 1 << 20] {
            client.invoke("nested", format!("echo 20 loan {bytes}").as_str()).unwrap();
        }
        // 32 MiB to and fro in 64 MiB of payload memory: copies would not fit for long.
        client.invoke("nested", format!("echo 5 loan {}", 32 << 20).as_str()).unwrap();
    }
}

#[test]
fn p3_a_remote_echo_needs_memory_for_one_copy_only() {
    // 40 MiB in an arena of 64: there is no room for an answer beside the request.
    let (_process, mut client) = start_workers(Ipc::Ring, 1, &["--arena-bytes", "67108864"]);
    let input = content(1, 40 << 20);
    for _ in 0..5 {
        assert!(*client.invoke("echo", input.clone()).unwrap() == *input);
    }
}

#[test]
fn p4_an_unknown_function_is_named_and_the_callers_invocation_goes_on() {
    on_both_channels(|ipc| {
        let (process, mut client) = start(ipc);
        let error = client.invoke("no such function", b"").unwrap_err();
        assert!(
            matches!(&error, InvokeError::UnknownFunction { text } if text.contains("no such function") && text.contains("echo"))
        );
        let reply = client.invoke("unknown", b"").unwrap();
        assert!(String::from_utf8_lossy(&reply).contains("no such function"));
        // A client that makes the number up.
        let mut raw = Raw::greet(process.addr());
        raw.send(
            &Header { kind: frame::REQUEST, function: 9999, call: 5, payload_bytes: 3, ..Header::default() },
            b"abc",
        );
        let (header, text) = raw.receive();
        assert_eq!((header.kind, header.call, header.flags), (frame::REPLY, 5, 3), "UnknownFunction is code 3");
        assert!(String::from_utf8_lossy(&text).contains("9999"));
        assert_eq!(&*client.invoke("echo", b"still here").unwrap(), b"still here");
    });
}

#[test]
fn p5_a_panic_an_abort_and_an_exit_are_told_and_the_next_call_works() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &[]);
        let ways: [(&str, &str, &str); 3] =
            [("panic", "", "panicked as asked"), ("abort", "", "signal 6"), ("exit", "7", "code 7")];
        for (function, input, said) in ways {
            let error = client.invoke(function, input).unwrap_err();
            let right = match &error {
                InvokeError::Panicked { text } => function == "panic" && text.contains(said),
                InvokeError::WorkerLost { text } => {
                    function != "panic" && text.contains(said) && text.contains("may have run")
                }
                _ => false,
            };
            assert!(right, "{function}: {error}");
            assert_eq!(&*client.invoke("echo", b"next").unwrap(), b"next");
        }
    });
}

#[test]
fn p6_several_arguments_arrive_one_by_one() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start(ipc);
        let large = vec![1; 100_000];
        let lists: [&[&[u8]]; 4] = [&[], &[b"one"], &[b"", b"two", b""], &[b"a", &large, b"bcd"]];
        for list in lists {
            let reply = client.invoke("args", Outgoing::from_args(list)).unwrap();
            let lengths = list.iter().map(|arg| arg.len().to_string()).collect::<Vec<_>>().join(" ");
            assert_eq!(String::from_utf8_lossy(&reply), lengths);
        }
        assert_eq!(&*client.invoke("args", b"plain").unwrap(), b"5");
    });
}

#[test]
fn p7_a_workers_memory_is_warm_from_call_to_call() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &[]);
        for count in 1..=20 {
            assert_eq!(String::from_utf8_lossy(&client.invoke("count", b"").unwrap()), count.to_string());
        }
        client.invoke("abort", b"").unwrap_err();
        assert_eq!(&*client.invoke("count", b"").unwrap(), b"1", "a new worker begins anew");
    });
}

#[test]
fn p8_a_function_sees_its_invocation() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 1, &["--process", "p8-test"]);
        let mut ids = std::collections::HashSet::new();
        for _ in 0..5 {
            let call = client.submit_within("context", b"1234", Duration::from_secs(9)).unwrap();
            let text = String::from_utf8_lossy(&client.wait(call).unwrap()).into_owned();
            let words: Vec<&str> = text.split(' ').collect();
            let [id, process_id, function, left_ms, cancelled, active, swapped, bytes] = words[..] else {
                panic!("{text}")
            };
            assert!(ids.insert(id.to_owned()), "invocation {id} twice");
            assert_eq!((process_id, function, cancelled), ("p8-test", "context", "false"));
            assert!((1000..=9000).contains(&left_ms.parse::<u64>().unwrap()), "{left_ms} ms");
            assert_eq!((active, swapped, bytes), ("[\"p8-test\"]", "[]", "4"));
        }
        assert_eq!(process.name(), "p8-test");
    });
}

#[test]
fn p9_scratch_goes_back_when_the_invocation_ends() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &["--arena-bytes", "8388608"]);
        for _ in 0..500 {
            client.invoke("scratch", b"1048576").unwrap();
        }
        // And from invocations that fail.
        let error = client.invoke("scratch", b"67108865").unwrap_err();
        assert!(matches!(error, InvokeError::Failed { .. }), "{error}");
        client.invoke("scratch", b"1048576").unwrap();
        if ipc == Ipc::Ring {
            let error = client.invoke("scratch", b"9000000").unwrap_err();
            assert!(error.to_string().contains("8388608"), "the quota is told: {error}");
            client.invoke("scratch", b"1048576").unwrap();
        }
    });
}

#[test]
fn p11_four_calls_are_answered_in_order_by_one_worker_and_by_two_all() {
    on_both_channels(|ipc| {
        for workers in [1, 2] {
            let (_process, mut client) = start_workers(ipc, workers, &[]);
            let calls: Vec<_> = (0..4).map(|_| client.submit("sleep", b"20").unwrap()).collect();
            let ended: Vec<_> = (0..4)
                .map(|_| {
                    let (call, reply) = client.wait_any().expect("in flight");
                    assert_eq!(&*reply.unwrap(), b"slept");
                    call
                })
                .collect();
            if workers == 1 {
                assert_eq!(ended, calls);
            } else {
                assert!(calls.iter().all(|call| ended.contains(call)));
            }
            assert!(client.wait_any().is_none());
        }
    });
}

#[test]
fn p12_nested_calls_are_started_waited_for_and_left_alone() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 3, &[]);
        client.invoke("nested", b"echo 300 async 100").unwrap();
        client.invoke("nested", b"echo 300 async 5000").unwrap();
        assert_eq!(&*client.invoke("relay", b"relay echo deep").unwrap_or_else(|e| panic!("{e}")), b"deep");
    });
}

#[test]
fn p12_a_cancelled_call_ends_at_once_and_its_function_is_told() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &[]);
        let running = client.submit("sleep", b"20000").unwrap();
        let queued = client.submit("echo", b"never").unwrap();
        let begun = Instant::now();
        client.cancel(queued).unwrap();
        assert_eq!(client.wait(queued).unwrap_err(), InvokeError::Cancelled);
        client.cancel(running).unwrap();
        assert_eq!(client.wait(running).unwrap_err(), InvokeError::Cancelled);
        assert!(matches!(client.cancel(running), Err(InvokeError::Protocol { .. })));
        // The worker is free again because the function came back early; or it was never begun.
        client.invoke("cancels", b"").unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10));
    });
}

#[test]
fn p14_a_deadline_is_kept_the_function_told_and_the_neighbour_undisturbed() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &["--grace-ms", "5000"]);
        let pids = children(process.pid());
        let mut neighbour = connect(&process);
        let deadline = Duration::from_millis(200);
        for _ in 0..3 {
            let begun = Instant::now();
            let call = client.submit_within("sleep", b"30000", deadline).unwrap();
            for n in 0..20_u8 {
                assert_eq!(&*neighbour.invoke("echo", &[n]).unwrap(), [n]);
            }
            let error = client.wait(call).unwrap_err();
            assert!(matches!(error, InvokeError::Timeout { .. }), "{error}");
            // Owed is the deadline + 100 ms; the client itself gives up then. The rest is a busy machine's.
            let took = begun.elapsed();
            assert!(took >= deadline && took < deadline + Duration::from_secs(2), "{took:?}");
        }
        // Each was told and came back within the grace: the same workers are there, and counted three.
        wait_until("three functions were told", PATIENCE, || {
            let calls: Vec<_> = (0..2).map(|_| client.submit("cancels", b"").unwrap()).collect();
            let told = calls
                .into_iter()
                .map(|call| String::from_utf8_lossy(&client.wait(call).unwrap()).parse::<u32>().unwrap());
            told.max() >= Some(1)
        });
        assert_eq!(children(process.pid()), pids);
    });
}

/// It looked at its clock every 50 ms only, and ended a call that much after the bound it promises (G1).
#[test]
fn g1_wait_any_ends_at_its_bound_also_when_the_process_is_silent() {
    let (process, mut client) = start(Ipc::Ring);
    signal(process.pid(), 19);
    // The best of five, because a busy machine may be late, too. Bounds that looks 50 ms apart miss by 45 ms.
    let late = (0..5).map(|_| {
        let begun = Instant::now();
        client.submit_within("echo", b"", Duration::from_millis(5)).unwrap();
        let (_, ended) = client.wait_any().expect("a call is in flight");
        assert!(matches!(ended, Err(InvokeError::Timeout { .. })), "{ended:?}");
        begun.elapsed() - Duration::from_millis(55)
    });
    // Half of the 100 ms for answers on their way, half for a busy machine.
    let late = late.min().expect("five calls");
    assert!(late < Duration::from_millis(20), "{late:?} late");
    signal(process.pid(), 18);
}

#[test]
fn p14_a_nested_deadline_is_the_callers() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 2, &["--grace-ms", "5000"]);
        let call = client.submit_within("relay", b"deadline", Duration::from_secs(3)).unwrap();
        let left: u64 = String::from_utf8_lossy(&client.wait(call).unwrap()).parse().unwrap();
        assert!(left <= 3000, "{left} ms left of 3000");
        let call = client.submit_within("relay", b"sleep 30000", Duration::from_millis(200)).unwrap();
        let error = client.wait(call).unwrap_err();
        assert!(matches!(error, InvokeError::Timeout { .. }), "{error}");
        assert_eq!(&*client.invoke("relay", b"echo again").unwrap(), b"again");
    });
}

#[test]
fn r1_many_clients_at_once_each_get_their_own() {
    on_both_channels(|ipc| {
        let (process, _client) = start_workers(ipc, 2, &[]);
        std::thread::scope(|scope| {
            for number in 0..32_u64 {
                let process = &process;
                scope.spawn(move || {
                    let mut client = connect(process);
                    for call in 0..30 {
                        let bytes = [0, 8, 41, 700, 9000][(number + call) as usize % 5];
                        let input = content(number << 32 | call, bytes);
                        assert!(
                            *client.invoke("echo", input.clone()).unwrap() == *input,
                            "client {number}, call {call}"
                        );
                    }
                });
            }
        });
    });
}

/// The answer of a function that failed and kept its input said through the controller that the input was free. Its
/// caller wrote over it while the function still read it.
#[test]
fn a_function_that_fails_may_keep_its_input_and_its_caller_gets_the_block_back_later() {
    on_both_channels(|ipc| {
        for leases in ["true", "false"] {
            // Room for eighty such blocks: one lost in each round would not last.
            let (_process, mut client) = start_workers(ipc, 2, &["--leases", leases, "--arena-bytes", "8388608"]);
            assert_eq!(&*client.invoke("lend", b"200").unwrap(), b"", "{ipc}, leases {leases}");
        }
    });
}

#[test]
fn r1_a_thousand_calls_in_flight_on_one_connection_and_one_more_is_busy() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 2, &[]);
        let calls: Vec<_> = (0..1024_u64).map(|n| (n, client.submit("echo", content(n, 100)).unwrap())).collect();
        // The client may have taken some answers already; the process may not have more than it allows.
        assert!(client.in_flight() <= 1024);
        // Backwards, so that answers have to find their call.
        for (n, call) in calls.into_iter().rev() {
            assert!(*client.wait(call).unwrap() == *content(n, 100), "call {n}");
        }
        let slow: Vec<_> = (0..1024).map(|_| client.submit("sleep", b"3000").unwrap()).collect();
        let error = client.submit("echo", b"").unwrap_err();
        assert!(matches!(&error, InvokeError::Busy { text } if text.contains("1024")), "{error}");
        for call in slow {
            client.cancel(call).unwrap();
        }
        while let Some((_, ended)) = client.wait_any() {
            assert!(matches!(ended, Ok(_) | Err(InvokeError::Cancelled)), "{ended:?}");
        }
        assert_eq!(&*client.invoke("echo", b"on").unwrap(), b"on");
    });
}

#[test]
fn p10_deep_chains_hand_their_answer_up_whole() {
    on_both_channels(|ipc| {
        // Six levels need seven workers; the answer of the innermost is passed up by each without being its own.
        let (_process, mut client) = start_with(&LaunchConfig { workers: 2, workers_max: 8, ..launch_config(ipc) });
        if ipc == Ipc::Queue && !queues_for(8) {
            println!("skipped: needs RLIMIT_MSGQUEUE for 16 queues");
            return;
        }
        for bytes in [10, 5000, 200_000] {
            let reply = client.invoke("chain", format!("6 {bytes}").as_str()).unwrap();
            assert!(reply.len() == bytes && reply.iter().all(|byte| *byte == 5), "{bytes}");
        }
    });
}
