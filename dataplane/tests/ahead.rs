//! Calls that a busy worker has already (controller/ahead.rs): nobody waits for it longer than for another, none runs twice.

mod support;

use std::collections::{HashSet, VecDeque};

use praas_dataplane::{Client, InvokeError, Ipc};
use support::{
    Dice, PATIENCE, Tally, children, launch_config, lives, seed, setting, signal, start_with, start_workers, wait_until,
};

/// Lets the process find out that the function is a short one.
fn practise(client: &mut Client, function: &str, input: &[u8]) {
    for _ in 0..5 {
        let calls: Vec<_> = (0..64).map(|_| client.submit(function, input).unwrap()).collect();
        calls.into_iter().for_each(|call| drop(client.wait(call).unwrap()));
    }
}

/// Calls that were given to the worker behind a long one stayed there, while the other worker had nothing to do.
#[test]
fn p11_calls_behind_a_long_one_are_taken_over_by_a_worker_that_has_nothing_to_do() {
    let (_process, mut client) = start_workers(Ipc::Ring, 2, &[]);
    for round in 0..5 {
        practise(&mut client, "sleep", b"0");
        let before: Vec<_> = (0..round * 3).map(|_| client.submit("sleep", b"0").unwrap()).collect();
        let long = client.submit("sleep", b"1500").unwrap();
        let behind = (0..100).map(|_| client.submit("sleep", b"0").unwrap());
        let mut short: HashSet<_> = behind.chain(before).collect();
        while !short.is_empty() {
            let (call, answer) = client.wait_any().expect("calls are open");
            answer.unwrap();
            assert!(short.remove(&call), "round {round}: the long call ended before {} short ones", short.len());
        }
        client.cancel(long).unwrap();
        assert!(client.wait(long).is_err());
    }
}

/// A caller that has many calls waiting delayed one that has one by all of them.
#[test]
fn g8_whoever_has_many_calls_with_a_worker_delays_others_by_a_moment_only() {
    let (process, mut greedy) = start_workers(Ipc::Ring, 1, &[]);
    let mut modest = support::connect(&process);
    // 5 ms each: known to be long, they wait their turn here.
    practise(&mut greedy, "sleep", b"0");
    (0..4).for_each(|_| drop(greedy.invoke("sleep", b"5").unwrap()));
    let calls = 60;
    for _ in 0..calls {
        greedy.submit("sleep", b"5").unwrap();
    }
    modest.invoke("echo", b"me").unwrap();
    let mut done = 0;
    while let Some((_, answer)) = greedy.poll() {
        answer.unwrap();
        done += 1;
    }
    assert!(done < calls / 4, "{done} of {calls} calls went before the only one of another caller");
    while let Some((_, answer)) = greedy.wait_any() {
        answer.unwrap();
    }
}

/// Withdrawn while they are being taken, given to another, and their workers killed meanwhile.
#[test]
fn w2_g2_calls_ahead_run_at_most_once_whatever_dies() {
    let kills = setting("PRAAS_KILLS", 150);
    let mut config = launch_config(Ipc::Ring);
    (config.workers, config.workers_max) = (3, 3);
    let tally = Tally::keep(&mut config);
    let (process, mut client) = start_with(&config);
    let mut dice = Dice(seed());
    let (mut in_flight, mut call, mut right, mut lost, mut killed) = (VecDeque::new(), 0_u64, 0, 0, 0);
    let mut told_lost = Vec::new();
    while killed < kills || !in_flight.is_empty() {
        while in_flight.len() < 64 && killed < kills {
            call += 1;
            let handle = match dice.below(40) {
                0 => client.submit("sleep", b"2").unwrap(),
                _ => client.submit("tally", Tally::input(call, 10)).unwrap(),
            };
            in_flight.push_back((call, handle));
        }
        if killed < kills && dice.below(60) == 0 {
            let victims: Vec<u32> = children(process.pid()).into_iter().filter(|pid| lives(*pid)).collect();
            if let Some(victim) = victims.get(usize::try_from(dice.below(victims.len().max(1) as u64)).unwrap()) {
                signal(*victim, 9);
                killed += 1;
            }
        }
        let (call, handle) = in_flight.pop_front().expect("filled above");
        match client.wait(handle) {
            Ok(reply) => {
                assert!(*reply == *b"slept" || *reply == *Tally::input(call, 10), "call {call} got another's answer");
                right += 1;
            }
            Err(InvokeError::WorkerLost { text }) => {
                if text.contains("did not run") {
                    told_lost.push(call);
                }
                lost += 1;
            }
            Err(error) => panic!("call {call}: {error}"),
        }
    }
    let runs = tally.runs();
    assert!(runs.values().all(|runs| *runs == 1), "a call ran twice");
    assert!(told_lost.iter().all(|call| !runs.contains_key(call)), "a call that `did not run` did");
    assert!(right > kills && lost <= 2 * kills, "{right} right answers, {lost} lost of {kills} kills");
    wait_until("all workers are back", PATIENCE, || {
        children(process.pid()).into_iter().filter(|pid| lives(*pid)).count() == 3
    });
}
