//! Calls of other processes that are started and waited for later (conformance P12, P14, R2; faults G3): several in flight, mixed with calls here,
//! called off. Over both channels and both reactors.

mod support;

use std::time::{Duration, Instant};

use praas_dataplane::client::Outgoing;
use praas_dataplane::{Client, ClientConfig};
use support::nodes::{NAMES, Node, Place};
use support::{PATIENCE, Reactor, ask, on_both_reactors, queues, wait_until};

const IPC: [&str; 2] = ["--ipc=ring", "--ipc=mq"];

/// Two that are told of each other and up, with so many workers.
fn pair(place: &Place, reactor: Reactor, ipc: &str, workers: [u8; 2]) -> [(Node, Client); 2] {
    let nodes = [0, 1].map(|who: usize| {
        let told = [(NAMES[1 - who], place.address(1 - who))];
        let args = [format!("--workers={}", workers[who]), format!("--workers-max={}", workers[who])];
        loop {
            let node = place.start_with(reactor, who, &told, &[&args[0], &args[1], ipc, "--plaintext", "--dial=start"]);
            let lacks_queues = || node.said("RLIMIT_MSGQUEUE") > 0;
            wait_until("it is ready", PATIENCE, || node.said("ready process=") == 1 || lacks_queues());
            // A user has few queues, and the workers of the test before may not have let go of theirs.
            if !lacks_queues() {
                break node;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    nodes[0].wait_up("b");
    nodes[1].wait_up("a");
    let mut who = 0..;
    nodes.map(|node| (node, place.client(who.next().expect("two"))))
}

fn on_all(test: impl Fn(Reactor, &str)) {
    for ipc in IPC {
        let _alone = (ipc == IPC[1]).then(queues);
        on_both_reactors(|reactor| test(reactor, ipc));
    }
}

#[test]
fn p12_r2_calls_here_and_there_are_waited_for_together_in_the_order_they_end() {
    on_all(|reactor, ipc| {
        let place = Place::new();
        let mut nodes = pair(&place, reactor, ipc, [2, 2]);
        assert_eq!(ask(&mut nodes[0].1, "wait_any_at", &[b"b"]), "2:b 1: 0:b");
    });
}

#[test]
fn p12_r2_many_calls_are_in_flight_and_one_too_many_is_told() {
    on_all(|reactor, ipc| {
        let place = Place::new();
        let mut nodes = pair(&place, reactor, ipc, [1, 2]);
        // Under the bounds of one connection at the other end, and of what a mailbox and its outbox hold.
        assert_eq!(ask(&mut nodes[0].1, "many_at", &[b"b", b"250"]), "250 ");
        // Ourselves are called as ever.
        assert_eq!(ask(&mut nodes[1].1, "many_at", &[b"b", b"20"]), "20 ");
    });
}

#[test]
fn p12_a_call_that_nobody_waits_for_is_called_off_at_the_other_process() {
    on_all(|reactor, ipc| {
        let place = Place::new();
        let mut nodes = pair(&place, reactor, ipc, [1, 1]);
        let (left, right) = nodes.split_at_mut(1);
        for (then, told) in [("leave", 1), ("cancel", 2), ("die", 3), ("wait", 4)] {
            let config = ClientConfig { deadline: Duration::from_millis(700), ..ClientConfig::default() };
            let mut client = Client::connect(place.address(0), &config).expect("it answers");
            let begun = Instant::now();
            let ended = client.invoke("leave_at", Outgoing::from_args(&[b"b", b"sleep", b"15000", then.as_bytes()]));
            match then {
                "leave" | "cancel" => assert!(ended.is_ok(), "{ended:?}"),
                "die" => assert!(ended.unwrap_err().to_string().contains("worker lost")),
                _ => assert!(ended.unwrap_err().to_string().contains("timeout")),
            }
            // Its one worker is at the call until it is told, and says how often it was. A call that had not begun is not run at all.
            wait_until(&format!("`{then}`"), PATIENCE, || {
                let count: u32 = ask(&mut right[0].1, "cancels", &[]).parse().expect("a number");
                count == told || {
                    // It had not begun: once more, as in the first place.
                    let again = Outgoing::from_args(&[b"b", b"sleep", b"15000", then.as_bytes()]);
                    let _ = client.invoke("leave_at", again);
                    false
                }
            });
            assert!(begun.elapsed() < Duration::from_secs(14), "{:?}", begun.elapsed());
            wait_until("the caller serves again", PATIENCE, || left[0].1.invoke("echo", b"again").is_ok());
        }
    });
}

#[test]
fn g3_calls_in_flight_end_when_the_other_process_dies_and_new_ones_reach_its_next_life() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let mut nodes = pair(&place, reactor, IPC[0], [2, 1]);
        let (left, right) = nodes.split_at_mut(1);
        let waiting: Vec<_> = (0..2)
            .map(|_| left[0].1.submit("leave_at", Outgoing::from_args(&[b"b", b"sleep", b"15000", b"wait"])).unwrap())
            .collect();
        wait_until("they are there", PATIENCE, || {
            let mut client = place.client(1);
            client.submit_within("echo", b"x", Duration::from_millis(50)).and_then(|call| client.wait(call)).is_err()
        });
        right[0].0.kill();
        let told = [(NAMES[0], place.address(0))];
        let again =
            place.start_with(reactor, 1, &told, &["--workers=1", "--workers-max=1", "--plaintext", "--dial=start"]);
        again.wait_up("a");
        for call in waiting {
            let lost = left[0].1.wait(call).unwrap_err().to_string();
            assert!(lost.contains("process lost"), "{lost}");
        }
        left[0].0.wait_up("b");
        assert_eq!(ask(&mut left[0].1, "many_at", &[b"b", b"20"]), "20 ");
    });
}

/// What becomes of a call whose worker, or process, dies with it, by how it was to be delivered.
#[test]
fn p13_r6_calls_are_run_and_sent_again_as_their_delivery_says() {
    const MODES: [&str; 3] = ["at most once", "effectively once", "retry"];
    on_both_reactors(|reactor| {
        let place = Place::new();
        let mut nodes = pair(&place, reactor, IPC[0], [3, 1]);
        let (left, right) = nodes.split_at_mut(1);
        let submit = |client: &mut Client, function: &str, payload: &str, mode: &str| {
            let arguments: [&[u8]; 4] = [b"b", function.as_bytes(), payload.as_bytes(), mode.as_bytes()];
            client.submit("call_at_with", Outgoing::from_args(&arguments)).unwrap()
        };
        for mode in MODES {
            let file = place.folder.join(mode);
            let input = format!("abort once {}", file.display());
            let call = submit(&mut left[0].1, "together", &input, mode);
            match left[0].1.wait(call) {
                Ok(reply) => assert!(mode != MODES[0] && *reply == *input.as_bytes(), "{mode}"),
                Err(error) => assert!(mode == MODES[0] && error.to_string().contains("worker lost"), "{mode}: {error}"),
            }
            assert!(file.exists(), "{mode}: it ran");
        }
        // One runs, the others wait for its worker, when the process is killed.
        let path = place.folder.join("notes");
        let note = |mode: &str| format!("{} {} 300", path.display(), mode.replace(' ', "_"));
        let calls = MODES.map(|mode| submit(&mut left[0].1, "note", &note(mode), mode));
        wait_until("one of them runs", PATIENCE, || std::fs::read(&path).is_ok_and(|notes| !notes.is_empty()));
        // The others have been sent by now: their verdicts came before an answer to what was asked after them.
        std::thread::sleep(Duration::from_millis(50));
        right[0].0.kill();
        let told = [(NAMES[0], place.address(0))];
        let again =
            place.start_with(reactor, 1, &told, &["--workers=1", "--workers-max=1", "--plaintext", "--dial=start"]);
        again.wait_up("a");
        for (call, mode) in calls.into_iter().zip(MODES) {
            match left[0].1.wait(call) {
                Ok(reply) => assert!(mode == MODES[2] && *reply == *note(mode).as_bytes(), "{mode}"),
                Err(error) => {
                    assert!(mode != MODES[2] && error.to_string().contains("process lost"), "{mode}: {error}")
                }
            }
        }
        let notes = std::fs::read_to_string(&path).unwrap();
        assert!(notes.lines().filter(|line| *line == "retry").count() >= 1, "{notes}");
        assert!(notes.lines().filter(|line| *line != "retry").count() <= 2, "{notes}");
    });
}
