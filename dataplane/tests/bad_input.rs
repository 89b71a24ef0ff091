//! What people, programs and strangers get wrong: command lines, garbage on the port, slow and silent clients, bounds.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use praas_dataplane::wire::frame;
use praas_dataplane::{Client, ClientConfig, InvokeError, Ipc, LaunchConfig, LaunchError, LocalProcess};
use praas_transport::Header;
use praas_transport::frame::{Seal, Transit};
use support::raw::{Raw, initiator};
use support::{
    PATIENCE, connect, content, cpu_seconds, fds, launch_config, memory_kib, on_both_channels, process_program,
    run_process, start_with, start_workers, test_worker, wait_until,
};

/// The process ends with this code and says one line that contains all of these.
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let begun = Instant::now();
    let output = run_process(args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(output.stdout.is_empty(), "{args:?} printed {}", String::from_utf8_lossy(&output.stdout));
    for word in words {
        assert!(said.contains(word), "{args:?}: `{word}` is not in `{said}`");
    }
    let lines = said.trim().lines().count();
    // Of a wrong flag clap explains itself in a few.
    let from_clap = said.contains("For more information");
    assert!(lines == 1 || from_clap && lines <= 6, "{args:?} said {lines} lines: {said}");
    assert!(begun.elapsed() < Duration::from_secs(15));
}

#[test]
fn bad_command_lines_get_one_line_and_the_right_exit_code() {
    let worker = test_worker();
    let folder = std::env::temp_dir().join(format!("praas-bad-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    refused(&[], 2, &["--worker"]);
    refused(&["--config", "/nowhere/praas.toml"], 2, &["/nowhere/praas.toml", "--config"]);
    refused(&["--config", &file("key.toml", "workers = 2\nwokers = 3\n")], 2, &["line 2", "wokers"]);
    refused(&["--config", &file("type.toml", "worker = [\"w\"]\n\nworkers = \"many\"\n")], 2, &["line 3"]);
    refused(&["--config", &file("syntax.toml", "worker = [\n")], 2, &["syntax.toml"]);
    refused(&["--config", &file("binary.toml", "\u{0}\u{1}")], 2, &["binary.toml"]);
    for (flag, value) in [
        ("--workers", "0"),
        ("--workers", "64"),
        ("--workers", "-1"),
        ("--workers-max", "1"),
        ("--ipc", "pigeon"),
        ("--wait", "forever"),
        ("--pin", "none,1"),
        ("--listen", "0.0.0.0:0"),
        ("--listen", "nonsense"),
        ("--listen", "127.0.0.1:99999"),
        ("--arena-bytes", "1000"),
        ("--deadline-ms", "0"),
        ("--queue-max", "0"),
        ("--connection-calls-max", "0"),
        ("--connections-max", "65537"),
        ("--unauthenticated-max", "0"),
        ("--start-ms", "0"),
        ("--process", "a/b"),
    ] {
        refused(&["--worker", &worker, flag, value], 2, &[value]);
    }
    // One of a worker was found out when the worker was started, and the blame was its program's.
    let allowed = praas_shm::child::allowed_cpus();
    let listed: Vec<String> = allowed.iter().map(usize::to_string).collect();
    for cores in ["4096".to_owned(), format!("{},4097", allowed[0])] {
        refused(&["--worker", &worker, "--pin", &cores], 2, &["409", "--pin", &listed.join(", ")]);
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    refused(&["--worker", &worker, "--listen", &address], 5, &[&address, "--listen"]);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn bad_workers_are_told_apart() {
    refused(&["--worker", "/nowhere/worker"], 3, &["/nowhere/worker", "--worker"]);
    refused(&["--worker", "/"], 3, &["--worker"]);
    refused(&["--worker", "/etc/hostname"], 3, &["/etc/hostname"]);
    refused(&["--worker", "/bin/true"], 4, &["/bin/true", "Worker::serve"]);
    refused(&["--worker", "/bin/false"], 4, &["/bin/false", "code 1"]);
    refused(&["--worker", "/bin/sleep", "--worker-arg=1000", "--start-ms", "200"], 4, &["200 ms"]);
    refused(&["--worker", &test_worker(), "--worker-arg=nothing"], 4, &["no function"]);
    let _queues = support::queues();
    for ipc in ["ring", "mq"] {
        refused(&["--worker", "/bin/cat", "--ipc", ipc, "--start-ms", "300"], 4, &["/bin/cat"]);
    }
    // By hand, without a process.
    let output = Command::new(test_worker()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("praas-process --worker"));
}

#[test]
fn m2_the_limit_on_queues_is_named_with_what_is_needed_and_how_to_get_it() {
    // Others' queues count, too.
    let _queues = support::queues();
    // `prlimit` so that root is limited, too.
    let limited = |bytes: &str| {
        let mut command = Command::new("timeout");
        command.args(["20", "prlimit", &format!("--msgqueue={bytes}"), &process_program()]);
        command.args(["--worker", &test_worker(), "--ipc", "mq", "--workers", "4"]);
        command.output().expect("timeout and prlimit run")
    };
    let before = std::fs::read_dir("/dev/mqueue").map(Iterator::count).ok();
    for bytes in ["0", "100000", "400000"] {
        let output = limited(bytes);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.contains("prlimit:") {
            println!("skipped: needs prlimit --msgqueue ({said})");
            return;
        }
        assert_eq!(output.status.code(), Some(6), "{bytes}: {said}");
        assert!(said.contains("RLIMIT_MSGQUEUE") && said.contains(bytes), "{bytes}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    }
    assert_eq!(std::fs::read_dir("/dev/mqueue").map(Iterator::count).ok(), before, "half-created queues");
}

#[test]
fn launching_says_why_not() {
    let config = LaunchConfig { worker: vec!["/nowhere/worker".into()], ..launch_config(Ipc::Ring) };
    let error = LocalProcess::start(&config).unwrap_err();
    assert!(
        matches!(&error, LaunchError::Ended { status, text } if status.code() == Some(3) && text.contains("/nowhere/worker")),
        "{error}"
    );
    let config = LaunchConfig { process_binary: Some("/nowhere/praas-process".into()), ..launch_config(Ipc::Ring) };
    assert!(LocalProcess::start(&config).unwrap_err().to_string().contains("/nowhere/praas-process"));
    let config = LaunchConfig { process_binary: Some("/bin/echo".into()), ..launch_config(Ipc::Ring) };
    assert!(matches!(LocalProcess::start(&config), Err(LaunchError::Strange { .. })));
}

#[test]
fn connecting_says_why_not() {
    let quick = ClientConfig { connect_within: Duration::from_millis(300), ..ClientConfig::default() };
    for (address, words) in [("nonsense", "HOST:PORT"), ("127.0.0.1:1", "listen=")] {
        let error = Client::connect(address, &quick).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    // N13: somebody else's service: silent, talkative, gone.
    for greeting in [
        "",
        "SSH-2.0-OpenSSH_9.7\r\n",
        "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n and more of it",
    ] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stranger = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(greeting.as_bytes());
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let begun = Instant::now();
        let error = Client::connect(address, &quick).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && begun.elapsed() < Duration::from_secs(3), "{error}");
        stranger.join().unwrap();
    }
}

/// The bytes of a connection's first header.
fn first(header: &Header) -> Vec<u8> {
    header.seal(Transit::default(), &mut Seal::default()).to_vec()
}

#[test]
fn n5_n13_garbage_on_the_port_is_closed_and_others_are_served() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &[]);
    let open = fds(process.pid());
    let hello = initiator(None).output().to_vec();
    let changed = |at: usize, bit: u8| {
        let mut hello = hello.clone();
        hello[at] ^= bit;
        hello
    };
    let request_first = Header { kind: frame::REQUEST, payload_bytes: 0, ..Header::default() };
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("http", b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: stranger\r\nAccept: */*\r\n\r\n".to_vec()),
        ("tls", [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 100]].concat()),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 4096]),
        ("noise", content(77, 100_000)),
        ("a flipped bit of what is reserved", changed(7, 1)),
        ("another version", changed(15, 1)),
        ("another hello", changed(4, 2)),
        ("a request first", first(&request_first)),
        ("a hello twice", [&hello[..], &hello[..]].concat()),
    ];
    let mut after_hello = vec![("an unknown kind", first(&Header { kind: 99, ..Header::default() }))];
    after_hello.push(("a hello once more", hello.clone()));
    for bytes in [1 << 41, 1 << 63, u64::MAX] {
        let header = Header { kind: frame::REQUEST, payload_bytes: bytes, ..Header::default() };
        after_hello.push(("an oversize length", first(&header)));
    }
    // What no sender of ours writes, before the hello and after it, with a checksum that fits.
    let request = Header { kind: frame::REQUEST, call: 1, ..Header::default() };
    let forged = |change: &dyn Fn(&mut [u8; 64])| {
        let mut bytes = [0; 64];
        bytes.copy_from_slice(&first(&request));
        change(&mut bytes);
        bytes[8..12].fill(0);
        // Of the header and its number, the first.
        let check = crc32fast::hash(&[&bytes[..], &[0; 8]].concat());
        bytes[8..12].copy_from_slice(&check.to_le_bytes());
        bytes
    };
    let seal = |header: &Header| header.seal(Transit::default(), &mut Seal::default());
    for (what, forged) in [
        ("another magic", forged(&|bytes| bytes[0] = b'Q')),
        ("another layout", forged(&|bytes| bytes[2] += 1)),
        ("pieces of a payload that needs none", forged(&|bytes| bytes[22] = 1)),
        ("a piece of nothing", forged(&|bytes| bytes[22..24].copy_from_slice(&0x8001_u16.to_le_bytes()))),
        ("a stream that does not exist", forged(&|bytes| bytes[22] = 9)),
        ("a key over its limit", forged(&|bytes| bytes[20..22].copy_from_slice(&1025_u16.to_le_bytes()))),
        ("the longest key", forged(&|bytes| bytes[20..22].copy_from_slice(&[0xff; 2]))),
        ("a payload of minus one", forged(&|bytes| bytes[24..32].copy_from_slice(&(-1_i64).to_le_bytes()))),
        ("a payload of 2^63", forged(&|bytes| bytes[31] = 0x80)),
        ("a greeting from a client", seal(&Header { kind: frame::WELCOME, ..request })),
        ("an answer from a client", seal(&Header { kind: frame::REPLY, ..request })),
        ("a kind of zero", seal(&Header { kind: 0, ..request })),
        ("the last kind", seal(&Header { kind: 255, ..request })),
    ] {
        cases.push((what, forged.to_vec()));
        after_hello.push((what, forged.to_vec()));
    }
    let memory = memory_kib(process.pid());
    for (greeted, (what, bytes)) in
        cases.iter().map(|case| (false, case)).chain(after_hello.iter().map(|case| (true, case)))
    {
        let mut raw = if greeted { Raw::greet(process.addr()) } else { Raw::connect(process.addr()) };
        // It may be closed before it has everything.
        let _ = raw.0.write_all(bytes);
        assert!(raw.is_closed(), "{what} was not closed");
        assert_eq!(&*client.invoke("echo", b"beside").unwrap(), b"beside", "beside {what}");
    }
    // Half a header, then the end.
    for cut in [1, 2, 159] {
        let mut raw = Raw::connect(process.addr());
        raw.0.write_all(&hello[..cut]).unwrap();
        raw.0.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(raw.is_closed());
    }
    wait_until("no descriptor stays", PATIENCE, || fds(process.pid()) == open);
    let grown = memory_kib(process.pid()).saturating_sub(memory);
    // Pages that good calls touched beside it are in this; what was claimed is not: the least is a TiB.
    assert!(grown < 8192, "{grown} KiB for garbage");
}

#[test]
fn p2_a_payload_over_the_limit_is_refused_and_the_connection_goes_on() {
    on_both_channels(|ipc| {
        let (process, _client) = start_workers(ipc, 1, &["--payload-bytes-max", "1000000"]);
        let mut raw = Raw::greet(process.addr());
        // A client that does not look at the limit before it sends.
        let request = Header { kind: frame::REQUEST, call: 1, payload_bytes: 1_000_001, ..Header::default() };
        raw.send(&request, &vec![1; 1_000_001]);
        let (header, text) = raw.receive();
        assert_eq!((header.call, header.flags), (1, 5), "TooLarge is code 5");
        assert!(
            String::from_utf8_lossy(&text).contains("1000001") && String::from_utf8_lossy(&text).contains("1000000")
        );
        raw.send(&Header { call: 2, payload_bytes: 2, ..request }, b"ok");
        let (header, bytes) = raw.receive();
        assert_eq!((header.call, header.flags, &*bytes), (2, 0, &b"ok"[..]));
    });
}

#[test]
fn n2_silent_and_slow_strangers_do_not_keep_others_out() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &["--connections-max", "16"]);
    let hello = initiator(None).output().to_vec();
    // Silent ones, and ones that send a byte now and then: more than there are places.
    let mut silent: Vec<Raw> = (0..20).map(|_| Raw::connect(process.addr())).collect();
    let mut sent = 0;
    let begun = Instant::now();
    let quick = ClientConfig { connect_within: Duration::from_millis(500), ..ClientConfig::default() };
    wait_until("somebody with manners is let in", PATIENCE, || {
        for raw in silent.iter_mut().skip(10).filter(|_| sent < 158) {
            let _ = raw.0.write_all(&hello[sent..=sent]);
        }
        sent += 1;
        assert_eq!(&*client.invoke("echo", b"in").unwrap(), b"in", "who is in stays in");
        Client::connect(process.addr(), &quick).is_ok_and(|mut late| late.invoke("echo", b"late").is_ok())
    });
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

#[test]
fn n2_stalled_bodies_do_not_hold_everybodys_memory() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &["--arena-bytes", "67108864"]);
    // Together they claim all there is, and send a little of it.
    let stalled: Vec<Raw> = (0..4)
        .map(|call| {
            let mut raw = Raw::greet(process.addr());
            let request = Header { kind: frame::REQUEST, call, payload_bytes: 30 << 20, ..Header::default() };
            raw.send(&request, &[1; 10_000]);
            raw
        })
        .collect();
    let input = content(9, 40 << 20);
    wait_until("the memory is taken back from those who stall", PATIENCE, || {
        match client.invoke("echo", input.clone()) {
            Ok(reply) => *reply == *input,
            Err(InvokeError::NoSpace { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    });
    drop(stalled);
}

#[test]
fn a8_connections_over_the_limit_are_closed_and_there_is_room_again_later() {
    let config = std::env::temp_dir().join(format!("praas-a8-{}.toml", std::process::id()));
    std::fs::write(&config, "connections_max = 4\n").unwrap();
    let (process, client) = start_workers(Ipc::Ring, 1, &["--config", &config.display().to_string()]);
    std::fs::remove_file(&config).unwrap();
    let mut in_time: Vec<Client> = (0..3).map(|_| connect(&process)).collect();
    let error = Client::connect(process.addr(), &ClientConfig::default()).unwrap_err().to_string();
    assert!(error.contains("connection limit"), "{error}");
    for client in &mut in_time {
        assert_eq!(&*client.invoke("echo", b"in").unwrap(), b"in");
    }
    drop(client);
    wait_until("there is room", PATIENCE, || Client::connect(process.addr(), &ClientConfig::default()).is_ok());
}

#[test]
fn a8_calls_of_a_connection_over_the_limit_are_busy_and_there_is_room_again_later() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &["--connection-calls-max", "3"]);
    client.submit("sleep", b"30000").unwrap();
    let mut raw = Raw::greet(process.addr());
    // A client that does not look at what its welcome allows.
    for call in 0..4 {
        raw.send(&Header { kind: frame::REQUEST, call, payload_bytes: 2, ..Header::default() }, b"ok");
    }
    let (header, text) = raw.receive();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert_eq!((header.call, header.flags), (3, 4), "Busy is code 4: {text}");
    assert!(text.contains("3 calls"), "{text}");
    drop(client);
    for call in 0..3 {
        let (header, bytes) = raw.receive();
        assert_eq!((header.call, header.flags, &*bytes), (call, 0, &b"ok"[..]));
    }
    raw.send(&Header { kind: frame::REQUEST, call: 4, payload_bytes: 2, ..Header::default() }, b"ok");
    assert_eq!(raw.receive().0.flags, 0, "room again");
}

#[test]
fn a8_a_full_queue_answers_busy_and_goes_on() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 1, &["--queue-max", "5"]);
        let calls: Vec<_> = (0..20).map(|_| client.submit("sleep", b"300").unwrap()).collect();
        let (mut slept, mut busy) = (0, 0);
        for call in calls {
            match client.wait(call) {
                Ok(_) => slept += 1,
                Err(InvokeError::Busy { text }) => {
                    assert!(text.contains('5'), "{text}");
                    busy += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert!(slept >= 6 && slept + busy == 20 && busy > 0, "{slept} slept, {busy} busy");
        assert_eq!(&*client.invoke("echo", b"on").unwrap(), b"on");
    });
}

#[test]
fn a8_a_client_that_never_reads_costs_bounded_memory_and_nobody_else_anything() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &["--arena-bytes", "67108864"]);
    let mut deaf = Raw::greet(process.addr());
    deaf.0.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    // 4 GiB of answers to somebody who reads none: he is not read either, sooner or later.
    let body = vec![7; 1 << 20];
    let mut taken = 0_u64;
    for call in 0..4096 {
        let request = Header { kind: frame::REQUEST, call, payload_bytes: 1 << 20, ..Header::default() };
        let head = deaf.seal(&request);
        if deaf.0.write_all(&head).and_then(|()| deaf.0.write_all(&body)).is_err() {
            break;
        }
        taken += 1;
    }
    println!("{taken} MiB were taken from a client that reads nothing");
    assert_eq!(&*client.invoke("echo", b"others").unwrap(), b"others");
    drop(deaf);
    let input = content(5, 20 << 20);
    wait_until("its memory is back", PATIENCE, || {
        client.invoke("echo", input.clone()).is_ok_and(|reply| *reply == *input)
    });
}

/// The third large answer that waited for a client was dropped without a word: its call had no end (G1).
#[test]
fn g1_answers_that_wait_for_a_slow_client_all_arrive() {
    on_both_channels(|ipc| {
        let (process, _client) = start_workers(ipc, 2, &["--payload-bytes-max", "4000000"]);
        let mut slow = Raw::greet(process.addr());
        let mut sender = slow.0.try_clone().unwrap();
        // From beside, because the process stops reading a client who leaves too much unread.
        let mut seal = std::mem::take(&mut slow.1);
        let writer = std::thread::spawn(move || {
            for call in 0..12_u8 {
                let header =
                    Header { kind: frame::REQUEST, call: call.into(), payload_bytes: 4_000_000, ..Header::default() };
                let head = header.seal(Transit::default(), &mut seal);
                sender.write_all(&head).and_then(|()| sender.write_all(&vec![call; 4_000_000])).unwrap();
            }
        });
        // Slowness is the point of this test.
        std::thread::sleep(Duration::from_millis(500));
        let mut answered = Vec::new();
        for _ in 0..12 {
            let (header, body) = slow.receive();
            assert!(header.flags == 0 && body.iter().all(|byte| u64::from(*byte) == header.call), "{ipc}: {header:?}");
            answered.push(header.call);
        }
        writer.join().unwrap();
        answered.sort_unstable();
        assert_eq!(answered, (0..12).collect::<Vec<_>>());
    });
}

#[test]
fn a8_a_client_that_stays_deaf_is_closed() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &["--payload-bytes-max", "1000000"]);
    let mut deaf = Raw::greet(process.addr());
    deaf.0.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let open = fds(process.pid());
    // More than the kernel keeps for a connection, until it is not read any more.
    for call in 0..400 {
        let request = Header { kind: frame::REQUEST, call, payload_bytes: 100_000, ..Header::default() };
        let head = deaf.seal(&request);
        if deaf.0.write_all(&head).and_then(|()| deaf.0.write_all(&[1; 100_000])).is_err() {
            break;
        }
    }
    wait_until("the deaf one is closed", PATIENCE, || {
        assert_eq!(&*client.invoke("echo", b"others").unwrap(), b"others");
        fds(process.pid()) < open
    });
}

#[test]
fn x1_full_payload_memory_is_an_error_and_the_next_call_works() {
    let (_process, mut client) = start_workers(Ipc::Ring, 2, &["--arena-bytes", "8388608"]);
    for _ in 0..3 {
        // In the controller's arena, in the worker's, under a lease.
        let error = client.invoke("echo", content(1, 16 << 20)).unwrap_err();
        assert!(matches!(&error, InvokeError::NoSpace { text } if text.contains("16777216")), "{error}");
        let error = client.invoke("fill", b"1 16777216").unwrap_err();
        assert!(error.to_string().contains("8388608"), "{error}");
        let error = client.invoke("relay", b"fill 1 16777216").unwrap_err();
        assert!(error.to_string().contains("8388608"), "{error}");
        let input = content(2, 3 << 20);
        assert!(*client.invoke("echo", input.clone()).unwrap() == *input);
        client.invoke("nested", b"echo 20 exchange 2000000").unwrap();
    }
}

/// Through queues payloads lie on the heap, which had no bound in bytes: some thousands of calls times the largest payload.
#[test]
fn g8_x1_payloads_through_queues_have_no_more_of_the_heap_than_rings_have_of_the_arena() {
    let _queues = support::queues();
    // Leased workers do without the controller, and its memory.
    let args = ["--arena-bytes", "8388608", "--leases", "false"];
    let (process, mut client) = start_workers(Ipc::Queue, 2, &args);
    let refused =
        |error: &InvokeError, bytes: &str| matches!(error, InvokeError::NoSpace { text } if text.contains(bytes));
    for round in 0..3 {
        // More than all there is: from a client, from a function to a client, from a function to a function and back.
        for (function, input, bytes) in [
            ("echo", content(1, 9_000_000), "9000000"),
            ("large", b"9000000".to_vec(), "9000000"),
            ("relay", b"large 9000000".to_vec(), "9000000"),
            ("nested", b"echo 1 exchange 9000000".to_vec(), "9000000"),
        ] {
            let error = client.invoke(function, input).unwrap_err();
            let text = error.to_string();
            // Told apart: whether it has run, and may be sent again.
            let ran = matches!(&error, InvokeError::Failed { .. });
            assert!(text.contains(bytes), "{function}: {text}");
            assert!(if function == "echo" { refused(&error, bytes) } else { ran }, "{function}: {text}");
        }
        // Inputs that wait for a worker: two of three million bytes each fit.
        let slow: Vec<_> = (0..2).map(|_| client.submit("sleep", b"300").unwrap()).collect();
        let calls: Vec<_> = (0..6).map(|call| client.submit("echo", content(call, 3_000_000)).unwrap()).collect();
        let ended: Vec<_> = calls.into_iter().map(|call| client.wait(call)).collect();
        let echoed = (0..).zip(&ended).filter(|(call, ended)| match ended {
            Ok(reply) => **reply == *content(*call, 3_000_000),
            Err(error) => !refused(error, "3000000"),
        });
        let (echoed, all) = (echoed.count(), ended.len());
        assert!(echoed >= 2 && echoed < all, "round {round}: {echoed} of {all} echoed or failed otherwise");
        for call in slow {
            client.wait(call).unwrap();
        }
    }
    // Outputs that a client does not read.
    let mut deaf = Raw::greet(process.addr());
    for call in 0..20 {
        let request = Header { kind: frame::REQUEST, call, payload_bytes: 3_000_000, ..Header::default() };
        deaf.send(&request, &content(call, 3_000_000));
    }
    wait_until("there is no room", PATIENCE, || client.invoke("large", b"8000000").is_err());
    let codes: Vec<_> = (0..20).map(|_| deaf.receive().0.flags).collect();
    assert!(codes.contains(&0) && codes.iter().all(|code| [0, 1, 6].contains(code)), "{codes:?}");
    assert!(codes.iter().any(|code| *code != 0), "{codes:?}");
    wait_until("there is room again", PATIENCE, || client.invoke("large", b"8000000").is_ok());
}

#[test]
fn x3_few_descriptors_shed_connections_without_spinning_and_recover() {
    let wrapper = std::env::temp_dir().join(format!("praas-x3-{}.sh", std::process::id()));
    std::fs::write(&wrapper, format!("#!/bin/sh\nulimit -n 40\nexec {} \"$@\"\n", process_program())).unwrap();
    std::fs::set_permissions(&wrapper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let config = LaunchConfig { process_binary: Some(wrapper.clone()), ..launch_config(Ipc::Ring) };
    let (process, mut client) = start_with(&config);
    let crowd: Vec<Raw> = (0..60).map(|_| Raw::connect(process.addr())).collect();
    assert_eq!(&*client.invoke("echo", b"in").unwrap(), b"in");
    let (begun, cpu) = (Instant::now(), cpu_seconds(process.pid()));
    wait_until("a second has passed", PATIENCE, || begun.elapsed() > Duration::from_secs(1));
    assert!(cpu_seconds(process.pid()) - cpu < 0.5, "it spins on what it cannot accept");
    assert_eq!(&*client.invoke("echo", b"still").unwrap(), b"still");
    drop(crowd);
    wait_until("there is room again", PATIENCE, || {
        let quick = ClientConfig { connect_within: Duration::from_millis(500), ..ClientConfig::default() };
        Client::connect(process.addr(), &quick).is_ok_and(|mut late| late.invoke("echo", b"late").is_ok())
    });
    std::fs::remove_file(&wrapper).unwrap();
}
