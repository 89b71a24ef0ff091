//! Functions that run once for several calls (trigger *batch*; conformance P1, P2, P5, P12, P13, P14; faults W1, W2, G1), over both channels.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use praas_dataplane::client::{CallOptions, Outgoing};
use praas_dataplane::{Client, Delivery, InvokeError, LaunchConfig};
use support::nodes::Place;
use support::{
    PATIENCE, Tally, connect, content, kill_workers, kills, launch_config, on_both_channels, on_both_reactors, seed,
    start_with, start_workers, wait_until,
};

type Outcome = Result<(i32, Vec<u8>), InvokeError>;

/// Calls `together` with each of these at once, and waits for all.
fn together(client: &mut Client, inputs: &[&[u8]]) -> Vec<Outcome> {
    let calls: Vec<_> = inputs.iter().map(|input| client.submit("together", *input).unwrap()).collect();
    calls.into_iter().map(|call| client.wait(call).map(|reply| (reply.status(), reply.to_vec()))).collect()
}

#[test]
fn p12_p2_a_function_runs_once_for_several_calls_and_each_gets_its_own_answer() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 2, &[]);
        for bytes in [[0, 1, 40, 41], [64, 4096, 8192, 8193], [100_000, 1 << 20, 3, 50_000]] {
            let inputs: Vec<Vec<u8>> = (1..).zip(bytes).map(|(call, bytes)| content(call, bytes)).collect();
            let answers = together(&mut client, &inputs.iter().map(Vec::as_slice).collect::<Vec<_>>());
            for (input, answer) in inputs.into_iter().zip(answers) {
                assert_eq!(answer.map(|(status, bytes)| (status, bytes == input)), Ok((4, true)));
            }
        }
        // Fewer than a batch: they wait, and run all the same.
        let two = together(&mut client, &[b"one", b"two"]);
        assert_eq!(two, [Ok((2, b"one".to_vec())), Ok((2, b"two".to_vec()))]);
        assert_eq!(together(&mut client, &[b"alone"]), [Ok((1, b"alone".to_vec()))]);
        // One that fails is alone in that.
        let answers = together(&mut client, &[b"x", b"fail", b"drop", b"nest"]);
        let failed = InvokeError::Failed { status: -7, text: "failed as asked".into() };
        assert_eq!(answers, [Ok((4, b"x".to_vec())), Err(failed), Ok((4, vec![])), Ok((4, b"nest".to_vec()))]);
        // Too few answers, none, and those of others: inputs handed on are read where they lie.
        let answers = together(&mut client, &[b"few", b"1", b"2", b"3"]);
        assert_eq!(answers[0], Ok((4, b"few".to_vec())));
        let text = "the function gave 1 answers to 4 calls, and none to this one";
        assert!(
            answers[1..].iter().all(|answer| *answer == Err(InvokeError::Failed { status: -1, text: text.into() }))
        );
        let all = Err(InvokeError::Failed { status: -9, text: "all failed as asked".into() });
        assert_eq!(together(&mut client, &[b"all fail", b"1", b"2", b"3"]), vec![all; 4]);
        let (long, longer) = (content(1, 5000), content(2, 90_000));
        let answers = together(&mut client, &[b"swap", &long, &longer, b"last"]);
        let expected = [b"last".to_vec(), longer.clone(), long.clone(), b"swap".to_vec()];
        assert!(answers.into_iter().eq(expected.into_iter().map(|bytes| Ok((4, bytes)))));
    });
}

/// Blocks of inputs come back, whether they were echoed, dropped, or passed to another caller.
#[test]
fn p9_inputs_of_batches_take_no_memory_for_good() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &["--arena-bytes=16777216"]);
        let long: Vec<Vec<u8>> = (0..4).map(|call| content(call, 1 << 20)).collect();
        for round in 0..60 {
            let inputs: [&[u8]; 4] = match round % 3 {
                0 => [&long[0], &long[1], &long[2], &long[3]],
                1 => [b"swap", &long[1], &long[2], &long[3]],
                _ => [b"few", &long[1], b"drop", &long[3]],
            };
            let answers = together(&mut client, &inputs);
            assert!(
                answers.iter().all(|answer| match answer {
                    Ok(_) => true,
                    Err(InvokeError::Failed { text, .. }) => text.contains("answers to 4 calls"),
                    Err(_) => false,
                }),
                "round {round}: {answers:?}"
            );
        }
    });
}

#[test]
fn p12_the_longest_batch_runs_at_once_and_a_longer_one_in_two() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &[]);
        let calls: Vec<_> =
            (0..128_u64).map(|call| (call, client.submit("patient", content(call, 700)).unwrap())).collect();
        for (number, call) in calls {
            let reply = client.wait(call).unwrap();
            assert!(reply.status() == 128 && *reply == content(number, 700));
        }
        // Inputs that are too long together are not run together, and nobody waits for the minute.
        let (_process, mut client) = start_workers(ipc, 1, &["--payload-bytes-max=100000"]);
        let calls: Vec<_> = (0..7).map(|call| client.submit("patient", content(call, 30_000)).unwrap()).collect();
        for (number, call) in (0..6).zip(calls) {
            let reply = client.wait(call).unwrap();
            assert!(reply.status() == 3 && *reply == content(number, 30_000));
        }
    });
}

#[test]
fn p12_r2_nested_calls_and_those_of_other_processes_run_in_batches_too() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 2, &[]);
        let reply = client.invoke("call_together", Outgoing::from_args(&[b"8"])).unwrap();
        assert_eq!(String::from_utf8_lossy(&reply), "4 4 4 4 4 4 4 4 1");
    });
    on_both_reactors(|reactor| {
        let place = Place::new();
        let _nodes = place.start_pair(reactor, &["--workers=3", "--workers-max=3", "--plaintext"]);
        let (mut there, mut here) = (place.client(0), place.client(1));
        let calls: Vec<_> = (0..2)
            .map(|_| there.submit("call_at", Outgoing::from_args(&[b"b", b"together", b"from a"])).unwrap())
            .collect();
        std::thread::sleep(Duration::from_millis(5));
        let own: Vec<_> = (0..2).map(|_| here.submit("together", b"sleep 1").unwrap()).collect();
        let statuses = calls.into_iter().map(|call| there.wait(call).unwrap().status());
        let statuses: Vec<_> = statuses.chain(own.into_iter().map(|call| here.wait(call).unwrap().status())).collect();
        // All four, if they came in time.
        assert!(statuses == [4; 4] || statuses.iter().all(|status| (1..4).contains(status)), "{statuses:?}");
    });
}

#[test]
fn p14_who_calls_off_or_leaves_does_not_run_and_the_others_do() {
    on_both_channels(|ipc| {
        let mut config = LaunchConfig { workers: 1, workers_max: 1, ..launch_config(ipc) };
        let tally = Tally::keep(&mut config);
        let (process, mut client) = start_with(&config);
        // At its one worker is another call, so that none of these is begun.
        let busy = client.submit("sleep", b"200").unwrap();
        let mut leaver = connect(&process);
        let calls: Vec<_> =
            (0..4).map(|call| client.submit("tally_together", Tally::input(call, 100)).unwrap()).collect();
        let late = client.submit_within("tally_together", Tally::input(4, 100), Duration::from_millis(50)).unwrap();
        let left = leaver.submit("tally_together", Tally::input(5, 100)).unwrap();
        leaver.submit("tally_together", Tally::input(6, 100)).map(drop).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        client.cancel(calls[1]).unwrap();
        let _ = left;
        drop(leaver);
        assert!(matches!(client.wait(late), Err(InvokeError::Timeout { .. })));
        client.wait(busy).unwrap();
        for (number, call) in (0..).zip(calls) {
            match client.wait(call) {
                Ok(reply) => assert!(number != 1 && *reply == *Tally::input(number, 100)),
                Err(error) => assert!(number == 1 && error == InvokeError::Cancelled, "{number}: {error}"),
            }
        }
        let mut ran: Vec<_> = tally.runs().into_iter().collect();
        ran.sort_unstable();
        assert_eq!(ran, [(0, 1), (2, 1), (3, 1)]);
    });
}

#[test]
fn p5_p13_when_a_run_ends_badly_each_call_ends_as_its_delivery_says() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &[]);
        let file = std::env::temp_dir().join(format!("praas-batch-{}-{ipc}", std::process::id()));
        let input = format!("abort once {}", file.display());
        let modes = [Delivery::Retry, Delivery::AtMostOnce, Delivery::EffectivelyOnce, Delivery::AtMostOnce];
        let calls = modes.map(|delivery| {
            let options = CallOptions { delivery: Some(delivery), ..CallOptions::default() };
            client.submit_with("together", input.as_str(), options).unwrap()
        });
        for (call, delivery) in calls.into_iter().zip(modes) {
            match (client.wait(call), delivery) {
                (Err(InvokeError::WorkerLost { text }), Delivery::AtMostOnce) => assert!(text.contains("may have run")),
                // The two that may run again did so together.
                (Ok(reply), Delivery::Retry | Delivery::EffectivelyOnce) => {
                    assert_eq!((reply.status(), &*reply), (2, input.as_bytes()));
                }
                (outcome, delivery) => panic!("{delivery:?}: {outcome:?}"),
            }
        }
        let _ = std::fs::remove_file(file);
        let panicked = Err(InvokeError::Panicked { text: "panicked as asked".into() });
        assert_eq!(together(&mut client, &[b"panic", b"1", b"2", b"3"]), vec![panicked; 4]);
        assert_eq!(together(&mut client, &[b"1", b"2", b"3", b"4"])[3], Ok((4, b"4".to_vec())));
    });
}

/// Workers are killed all the time: every call has one answer, which is its own; none that may run once ran twice, and those that may run again
/// all have a result.
#[test]
fn w1_w2_g1_calls_of_batches_survive_the_death_of_workers_once_each() {
    on_both_channels(|ipc| {
        let mut config = LaunchConfig { workers: 2, workers_max: 2, ..launch_config(ipc) };
        let tally = Tally::keep(&mut config);
        let (process, mut client) = start_with(&config);
        let stop = AtomicBool::new(false);
        let kills = kills() / 3;
        let (mut calls, mut lost) = (0_u64, 0);
        let killed = std::thread::scope(|scope| {
            let killer = scope.spawn(|| kill_workers(&process, seed(), kills, &stop));
            while !killer.is_finished() {
                let open: Vec<_> = (calls..calls + 60)
                    .map(|call| {
                        let delivery = if call % 2 == 0 { Delivery::AtMostOnce } else { Delivery::EffectivelyOnce };
                        let options = CallOptions { delivery: Some(delivery), ..CallOptions::default() };
                        let input = Tally::input(call, [0, 20, 500, 20_000][call as usize % 4]);
                        (call, input.clone(), client.submit_with("tally_together", input, options).unwrap())
                    })
                    .collect();
                calls += 60;
                for (number, input, call) in open {
                    match client.wait(call) {
                        Ok(reply) => assert!(*reply == *input, "call {number}: another's answer"),
                        // Three workers in a row died with it.
                        Err(InvokeError::WorkerLost { .. }) => lost += 1,
                        Err(error) => panic!("call {number}: {error}"),
                    }
                }
            }
            killer.join().expect("it ends")
        });
        stop.store(true, Ordering::Relaxed);
        wait_until("it serves", PATIENCE, || client.invoke("echo", b"x").is_ok());
        let runs = tally.runs();
        println!("{ipc}: {calls} calls, {lost} lost, {killed} workers killed");
        assert!(killed >= kills, "{killed} workers killed");
        for (call, runs) in runs {
            assert!(runs == 1 || call % 2 == 1, "call {call} may run once, and ran {runs} times");
        }
    });
}
