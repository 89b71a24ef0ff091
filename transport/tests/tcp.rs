//! Connections over real sockets on loopback: two ends, two threads, and peers that misbehave.
//! Cuts, garbage and limits are tested on scripted streams in `src/inbound.rs`.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use praas_transport::frame::{Seal, Transit};
use praas_transport::tcp::{Congestion, Connection, ConnectionError, HeapBodies, Received, SendError, TcpConfig};
use praas_transport::{Flush, Frame, Header, Limits, Scratch, Terms};
use rustix::event::{PollFd, PollFlags, poll};

type Heap = Connection<Vec<u8>, Vec<u8>>;

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    (client, listener.accept().expect("a connection").0)
}

fn connection(stream: TcpStream, config: TcpConfig) -> Heap {
    stream.set_nonblocking(true).expect("a socket");
    Connection::new(
        mio::net::TcpStream::from_std(stream),
        Limits { payload_bytes_max: 64 << 20 },
        config,
        Terms::default(),
    )
    .expect("a connection")
}

fn connections() -> (Heap, Heap) {
    let (client, server) = pair();
    (connection(client, TcpConfig::default()), connection(server, TcpConfig::default()))
}

fn sleep(connection: &Heap, flags: PollFlags) {
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::from_borrowed_fd(connection.as_fd(), flags)], Some(&limit)).expect("poll");
    assert!(ready > 0, "nothing happened for 20 s");
}

/// The next frame, sleeping for it, sending what waits meanwhile.
fn next(connection: &mut Heap) -> Result<Frame<Vec<u8>>, ConnectionError> {
    loop {
        if let Some(frame) = connection.receive(&mut Scratch::default(), &mut HeapBodies)? {
            return Ok(frame);
        }
        let mut flags = PollFlags::IN;
        if connection.wants_write() && connection.flush(&mut drop)? == Flush::Blocked {
            flags |= PollFlags::OUT;
        }
        sleep(connection, flags);
    }
}

fn flush(connection: &mut Heap) {
    while connection.flush(&mut drop).expect("a live peer") == Flush::Blocked {
        sleep(connection, PollFlags::OUT);
    }
}

fn call(call: u64) -> Header {
    Header { kind: 1, call, ..Header::default() }
}

/// Bytes that tell their place: a pattern whose length divides no buffer's.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let pattern: Vec<u8> =
        (0..4099).map(|at: u64| ((seed + at).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect();
    let mut bytes = pattern.repeat(len.div_ceil(pattern.len()));
    bytes.truncate(len);
    bytes
}

fn whole(frame: Frame<Vec<u8>>) -> Vec<u8> {
    match frame.body {
        Received::Whole(body) => body,
        refused => panic!("{refused:?}"),
    }
}

#[test]
fn an_echo_of_a_small_frame_is_one_system_call_each_way_and_no_copy() {
    let (mut client, mut server) = connections();
    let echo = std::thread::spawn(move || {
        for _ in 0..1000 {
            let frame = next(&mut server).expect("a frame");
            let (header, key) = (frame.header, frame.key.clone());
            server.send(&header, &key, whole(frame)).expect("room");
            assert!(server.take_sent().is_some());
        }
        server.stats()
    });
    for n in 0..1000 {
        client.send(&call(n), b"key", content(n, 64)).expect("room");
        assert_eq!(client.take_sent().expect("written at once").len(), 64);
        let frame = next(&mut client).expect("a frame");
        assert_eq!((frame.header.call, &*frame.key), (n, &b"key"[..]));
        assert_eq!(whole(frame), content(n, 64));
    }
    for stats in [client.stats(), echo.join().expect("the echo thread")] {
        assert_eq!((stats.received_frames, stats.sent_frames, stats.writes), (1000, 1000, 1000));
        // One read for the frame; at most one more that found nothing, before the sleep.
        assert!(stats.reads <= 2000, "{stats:?}");
        assert!(stats.copied_bytes <= 2 * (64 + 3), "only the first, whose key nobody expected: {stats:?}");
        assert_eq!(stats.received_bytes, 1000 * (64 + 3 + 64));
    }
}

/// P2, M6, N9: both ends send 64 MiB at once, and each receives while it sends.
#[test]
fn p2_m6_n9_both_ends_send_64_mib_at_once() {
    let (client, server) = connections();
    let run = |mut connection: Heap, ours: u64, theirs: u64| {
        connection.send(&call(ours), b"", content(ours, 64 << 20)).expect("one frame may always wait");
        assert!(connection.wants_write());
        let frame = next(&mut connection).expect("a frame");
        assert_eq!(frame.header.call, theirs);
        assert!(whole(frame) == content(theirs, 64 << 20));
        flush(&mut connection);
        let stats = connection.stats();
        assert!(stats.copied_bytes <= 4096, "{stats:?}");
        connection // not dropped before the other end is done
    };
    let other = std::thread::spawn(move || run(server, 2, 1));
    let first = run(client, 1, 2);
    drop((first, other.join().expect("the other end")));
}

/// A socket that blocks for `receive_waiting` blocks for nothing else: not for an empty socket, not for a full one.
#[test]
fn only_waiting_receives_wait() {
    let (mut a, mut b) = connections();
    let longest = Duration::from_millis(50);
    a.wait_in_reads(longest).expect("a socket");
    let before = Instant::now();
    assert!(a.receive(&mut Scratch::default(), &mut HeapBodies).expect("open").is_none());
    assert!(before.elapsed() < longest, "an empty socket is no reason to wait");
    let before = Instant::now();
    assert!(a.receive_waiting(&mut Scratch::default(), &mut HeapBodies).expect("open").is_none());
    assert!(before.elapsed() >= longest - Duration::from_millis(10), "nothing came, and it did not wait");
    b.send(&call(7), b"", content(7, 100)).expect("room");
    let frame = a.receive_waiting(&mut Scratch::default(), &mut HeapBodies).expect("open").expect("sent before");
    assert_eq!((frame.header.call, whole(frame)), (7, content(7, 100)));
    let body = content(8, 64 << 20);
    a.send(&call(8), b"", body.clone()).expect("room");
    assert!(a.wants_write(), "no kernel takes 64 MiB that nobody reads");
    let sender = std::thread::spawn(move || {
        flush(&mut a);
        a
    });
    assert_eq!(whole(next(&mut b).expect("open")), body);
    let mut a = sender.join().expect("no panic");
    drop(b);
    assert!(matches!(
        a.receive_waiting(&mut Scratch::default(), &mut HeapBodies),
        Err(ConnectionError::Closed { mid_frame: false })
    ));
}

/// N2: a peer that sends a byte now and then holds nobody for longer than one wait: the deadline is looked at in between.
#[test]
fn n2_a_dribble_does_not_hold_a_waiting_receive() {
    let (client, mut server) = pair();
    let mut client = connection(client, TcpConfig::default());
    let longest = Duration::from_millis(100);
    client.wait_in_reads(longest).expect("a socket");
    let dribble = std::thread::spawn(move || {
        while server.write(&[0]).is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let mut waits = 0;
    let before = Instant::now();
    while before.elapsed() < 3 * longest {
        // Zeroes are no frame, but before the sixty-fourth nobody can tell.
        assert!(client.receive_waiting(&mut Scratch::default(), &mut HeapBodies).expect("part of a header").is_none());
        waits += 1;
    }
    assert!(waits > 3, "{waits} waits of {longest:?} took {:?}", before.elapsed());
    drop(client);
    dribble.join().expect("no panic");
}

/// N3: a kernel that takes a few KiB at a time, on both sides.
#[test]
fn n3_short_writes_through_small_kernel_buffers() {
    let (client, server) = pair();
    socket2::SockRef::from(&client).set_send_buffer_size(4096).expect("a socket");
    socket2::SockRef::from(&server).set_recv_buffer_size(4096).expect("a socket");
    let mut client = connection(client, TcpConfig::default());
    let mut server = connection(server, TcpConfig::default());
    let lengths = [0, 1, 63, 4095, 4096, 4097, 20_000, 7, 0, 40_000];
    let receiver = std::thread::spawn(move || {
        for (n, &len) in lengths.iter().enumerate() {
            let frame = next(&mut server).expect("a frame");
            assert_eq!((frame.header.call, frame.key.len()), (n as u64, n * 7));
            assert!(whole(frame) == content(n as u64, len));
        }
    });
    let mut sent = 0;
    for (n, &len) in lengths.iter().enumerate() {
        client.send(&call(n as u64), &content(0, n * 7), content(n as u64, len)).expect("room");
    }
    while client.flush(&mut |_| sent += 1).expect("a live peer") == Flush::Blocked {
        sleep(&client, PollFlags::OUT);
    }
    assert_eq!(sent, lengths.len());
    receiver.join().expect("the receiver");
    assert!(client.stats().writes > 10, "some write was cut short: {:?}", client.stats());
}

/// G8: nobody reads; what waits is bounded, the refused body comes back, and all is sent when they read again.
#[test]
fn g8_the_backlog_is_bounded_in_bytes_and_in_frames() {
    let (client, server) = pair();
    let config = TcpConfig { backlog_bytes_max: 1 << 20, backlog_frames_max: 300, ..TcpConfig::default() };
    let mut client = connection(client, config);
    let mut sent = 0u64;
    let refused = loop {
        match client.send(&call(sent), b"", content(sent, 10_000)) {
            Ok(()) => sent += 1,
            Err(SendError::Backlogged(body)) => break body,
            Err(error) => panic!("{error:?}"),
        }
        while client.take_sent().is_some() {}
    };
    assert_eq!(refused, content(sent, 10_000));
    let (frames, bytes) = client.backlog();
    assert!(frames <= 300 && bytes <= 1 << 20, "{frames} frames, {bytes} bytes");
    assert!(bytes > (1 << 20) - 2 * 10_064, "the bound was reached: {bytes}");

    let mut server = connection(server, TcpConfig::default());
    let receiver = std::thread::spawn(move || {
        for n in 0..sent {
            let frame = next(&mut server).expect("a frame");
            assert_eq!(frame.header.call, n);
            assert!(whole(frame) == content(n, 10_000));
        }
    });
    flush(&mut client);
    receiver.join().expect("the receiver");

    // Sent bodies nobody takes are held, and therefore count.
    let (client, _server) = pair();
    let mut client = connection(client, config);
    for n in 0..300 {
        client.send(&call(n), b"", vec![1]).expect("room");
    }
    assert!(matches!(client.send(&call(300), b"", vec![1]), Err(SendError::Backlogged(_))));
    assert_eq!(std::iter::from_fn(|| client.take_sent()).count(), 300);
    client.send(&call(300), b"", vec![1]).expect("room again");
}

#[test]
fn queued_frames_leave_in_one_system_call_and_arrive_in_few() {
    let (mut client, mut server) = connections();
    for n in 0..64 {
        client.queue(&call(n), b"k", content(n, 100)).expect("room");
    }
    assert_eq!((client.stats().writes, client.backlog().0), (0, 64));
    let mut done = 0;
    assert_eq!(client.flush(&mut |_| done += 1).expect("a live peer"), Flush::Done);
    assert_eq!((client.stats().writes, client.stats().sent_frames, done), (1, 64, 64));
    for n in 0..64 {
        assert_eq!(whole(next(&mut server).expect("a frame")), content(n, 100));
    }
    assert!(server.stats().reads <= 4, "{:?}", server.stats());
}

#[test]
fn keys_too_long_are_refused_and_give_the_body_back() {
    let (mut client, _server) = connections();
    let error = client.send(&call(1), &[0; 1025], vec![1, 2]).expect_err("too long");
    assert!(matches!(error, SendError::KeyTooLong(_)));
    assert_eq!(error.into_body(), vec![1, 2]);
    assert!(!client.wants_write());
}

#[test]
fn n4_a_peer_that_closes_mid_frame_is_told_from_one_that_closes_between() {
    for (sent_bytes, mid_frame) in [(0, false), (1, true), (64, true), (70, true), (74, false)] {
        let (client, server) = pair();
        let mut server = connection(server, TcpConfig::default());
        let header = Header { payload_bytes: 10, ..Header::default() };
        let mut bytes = header.seal(Transit::default(), &mut Seal::default()).to_vec();
        bytes.extend_from_slice(&[7; 10]);
        (&client).write_all(&bytes[..sent_bytes]).expect("a live peer");
        drop(client);
        if sent_bytes == 74 {
            assert_eq!(whole(next(&mut server).expect("a frame")), [7; 10]);
        }
        match next(&mut server).expect_err("closed") {
            ConnectionError::Closed { mid_frame: found } => assert_eq!(found, mid_frame, "{sent_bytes}"),
            error => panic!("{error}"),
        }
    }
}

#[test]
fn n4_a_reset_ends_both_directions_and_gives_every_body_back() {
    let (client, server) = pair();
    let mut server = connection(server, TcpConfig::default());
    for n in 0..4 {
        server.send(&call(n), b"", content(n, 4 << 20)).expect("room");
    }
    assert!(server.wants_write());
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("a socket");
    drop(client);
    let start = Instant::now();
    while server.flush(&mut drop).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(10), "the reset was never told");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(server.flush(&mut drop).is_err(), "final");
    assert!(matches!(server.send(&call(9), b"", vec![3]), Err(SendError::Closed(body)) if body == [3]));
    assert!(server.receive(&mut Scratch::default(), &mut HeapBodies).is_err());
    let mut back = 0;
    server.abandon(&mut HeapBodies, &mut |_| back += 1);
    assert!((1..=4).contains(&back), "{back}");
}

/// N13: something else answers on the port.
#[test]
fn n13_another_service_is_refused_at_its_first_bytes() {
    let (client, server) = pair();
    let mut server = connection(server, TcpConfig::default());
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: something-of-sixty-four-bytes-or-more\r\n\r\n";
    (&client).write_all(request).expect("a live peer");
    let error = next(&mut server).expect_err("not ours");
    assert!(matches!(error, ConnectionError::Frame(_)), "{error}");
}

#[test]
fn p2_an_oversize_payload_is_refused_and_the_connection_goes_on() {
    let (client, server) = pair();
    server.set_nonblocking(true).expect("a socket");
    let limits = Limits { payload_bytes_max: 1 << 20 };
    let server = mio::net::TcpStream::from_std(server);
    let mut server: Heap =
        Connection::new(server, limits, TcpConfig::default(), Terms::default()).expect("a connection");
    let mut client = connection(client, TcpConfig::default());
    let sender = std::thread::spawn(move || {
        client.send(&call(1), b"big", vec![1; (8 << 20) + 1]).expect("room");
        client.send(&call(2), b"", vec![2; 10]).expect("room");
        flush(&mut client);
        client.send(&call(3), b"", vec![3; 10]).expect("room");
        flush(&mut client);
        client
    });
    // The short one passes the long one, which is refused before its bytes come.
    assert_eq!(whole(next(&mut server).expect("a frame")), [2; 10]);
    let frame = next(&mut server).expect("a frame");
    assert_eq!((frame.header.call, &*frame.key), (1, &b"big"[..]));
    assert!(matches!(frame.body, Received::Refused { bytes: 8_388_609, .. }));
    assert!(server.stats().discarded_bytes < 8_388_609, "told before all of it came");
    assert_eq!(whole(next(&mut server).expect("a frame")), [3; 10]);
    let stats = server.stats();
    assert_eq!((stats.refused_frames, stats.discarded_bytes), (1, 8_388_609));
    drop(sender.join().expect("the sender"));
}

/// Trap: the system's default may be bbr, which paces loopback.
#[test]
fn r7_loopback_uses_reno_unless_told_otherwise() {
    let (client, server) = connections();
    assert_eq!(client.congestion_control().expect("a socket"), "reno");
    assert_eq!(server.congestion_control().expect("a socket"), "reno");
    let system = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").expect("Linux");
    let (client, _server) = pair();
    let client = connection(client, TcpConfig { congestion: Congestion::System, ..TcpConfig::default() });
    assert_eq!(client.congestion_control().expect("a socket"), system.trim());
    // Other than the system's and than reno, where there is another.
    let available = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").expect("Linux");
    for name in available.split_whitespace() {
        let congestion: Congestion = name.parse().expect("a name");
        if congestion.check().is_err() {
            println!("skipped: {name}: needs CAP_NET_ADMIN");
            continue;
        }
        let (client, server) = pair();
        let connections =
            [client, server].map(|stream| connection(stream, TcpConfig { congestion, ..TcpConfig::default() }));
        assert!(connections.iter().all(|connection| connection.congestion_control().expect("a socket") == name));
    }
    let (client, _server) = pair();
    client.set_nonblocking(true).expect("a socket");
    let no_such = "no-such".parse().expect("a name");
    let config = TcpConfig { congestion: no_such, ..TcpConfig::default() };
    let client = mio::net::TcpStream::from_std(client);
    assert!(Heap::new(client, Limits::default(), config, Terms::default()).is_err());
}

/// The same socket in other hands, as a worker gets it.
fn other_holder(connection: &Heap, terms: Terms) -> Heap {
    let stream = TcpStream::from(connection.as_fd().try_clone_to_owned().expect("a descriptor"));
    let stream = mio::net::TcpStream::from_std(stream);
    Connection::new(stream, Limits::default(), TcpConfig::default(), terms).expect("a connection")
}

/// R6, A3: two holders take turns at one end, and the other end sees one stream: with keyed seals, checksums, and every length around
/// the bounds of reads and pieces.
#[test]
fn r6_two_holders_of_one_connection_are_one_end() {
    let (client, server) = pair();
    let seal = |byte| Seal::keyed([byte; 32]);
    let terms = |send, receive| Terms { send, receive, payload_checksums: true, incarnation: 7, peer_incarnation: 7 };
    let keyed = |stream: TcpStream, terms| {
        stream.set_nonblocking(true).expect("a socket");
        let stream = mio::net::TcpStream::from_std(stream);
        Heap::new(stream, Limits { payload_bytes_max: 4 << 20 }, TcpConfig::default(), terms).expect("a connection")
    };
    let mut client = keyed(client, terms(seal(1), seal(2)));
    let mut lender = keyed(server, terms(seal(2), seal(1)));
    let lengths: Vec<usize> = vec![0, 1, 40, 41, 64, 4095, 4096, 4097, 20_000, 256 << 10, (256 << 10) + 1, 1 << 20];
    let sent = lengths.clone();
    let caller = std::thread::spawn(move || {
        for (call_number, len) in (0_u64..).zip(sent.iter().cycle().take(200)) {
            client.send(&call(call_number), b"key", content(call_number, *len)).expect("room");
            let frame = next(&mut client).expect("a frame");
            assert_eq!((frame.header.call, whole(frame)), (call_number, content(call_number, *len)));
        }
    });
    let echo = |connection: &mut Heap| {
        let frame = next(connection).expect("a frame");
        let (header, key) = (frame.header, frame.key.clone());
        connection.send(&header, &key, whole(frame)).expect("room");
        flush(connection);
        while connection.take_sent().is_some() {}
    };
    let mut served = 0;
    while served < 200 {
        for _ in 0..3.min(200 - served) {
            echo(&mut lender);
            served += 1;
        }
        let before = lender.moved().expect("TCP_INFO");
        let terms = lender.lend().expect("at rest: one call at a time");
        assert!(lender.lend().is_none(), "lent once");
        let mut holder = other_holder(&lender, terms);
        assert_eq!(holder.sequences(), lender.sequences());
        for _ in 0..4.min(200 - served) {
            echo(&mut holder);
            served += 1;
            assert!(lender.receive(&mut Scratch::default(), &mut HeapBodies).expect("not its turn").is_none());
        }
        assert!(holder.is_at_rest());
        let after = lender.moved().expect("TCP_INFO");
        let stats = holder.stats();
        assert_eq!(
            after.read_bytes - before.read_bytes,
            stats.received_bytes,
            "the kernel counts what the holder read"
        );
        assert_eq!(after.written_bytes - before.written_bytes, stats.sent_bytes, "and what it wrote");
        let (received, sent) = holder.sequences();
        lender.resume(received, sent);
    }
    caller.join().expect("no panic");
}

/// R6: what is queued while a connection is lent goes out when it is back, in the order of the stream.
#[test]
fn r6_frames_queued_while_lent_wait_for_the_return() {
    let (mut client, mut lender) = connections();
    let terms = lender.lend().expect("at rest");
    let mut holder = other_holder(&lender, terms);
    lender.send(&call(2), b"", content(2, 100)).expect("room");
    assert_eq!(lender.flush(&mut drop).expect("nothing is written"), Flush::Blocked);
    holder.send(&call(1), b"", content(1, 100)).expect("room");
    let (received, sent) = holder.sequences();
    drop(holder);
    lender.resume(received, sent);
    flush(&mut lender);
    for number in [1, 2] {
        assert_eq!(next(&mut client).expect("in order").header.call, number);
    }
}

/// R6, N3: nothing under way may be left behind: part of a frame read, a frame read and not asked for, a frame not written.
#[test]
fn r6_a_connection_that_is_not_at_rest_is_not_lent() {
    let (mut client, server) = pair();
    let mut server = connection(server, TcpConfig::default());
    let mut seal = Seal::default();
    let mut frame = |payload: usize| {
        let header = Header { payload_bytes: payload as u64, ..Header::default() };
        [&header.seal(Transit::default(), &mut seal)[..], &content(0, payload)].concat()
    };
    let (first, second) = (frame(10), frame(10));
    client.write_all(&[&first[..], &second[..30]].concat()).expect("a socket");
    assert_eq!(whole(next(&mut server).expect("a frame")).len(), 10);
    assert!(server.lend().is_none(), "30 bytes of the next frame were read");
    client.write_all(&second[30..]).expect("a socket");
    assert_eq!(whole(next(&mut server).expect("a frame")).len(), 10);
    server.send(&call(1), b"", content(1, 32 << 20)).expect("one frame may always wait");
    assert!(server.lend().is_none(), "no kernel takes 32 MiB that nobody reads");
}

/// Who has to give a connection back comes to rest after every frame, however many the peer has sent.
#[test]
fn r6_who_reads_no_further_is_at_rest_after_each_frame() {
    let (mut client, mut server) = connections();
    let lengths = [0, 10, 300, 4096, 5000, 1, 0, 70_000, 20];
    for (number, len) in (0..).zip(lengths) {
        client.queue(&call(number), if number % 2 == 0 { b"" } else { b"key" }, content(number, len)).expect("room");
    }
    flush(&mut client);
    std::thread::sleep(Duration::from_millis(20));
    let mut ahead = 0;
    for number in 0..9 {
        assert_eq!(next(&mut server).expect("a frame").header.call, number);
        server.read_no_further();
        ahead += u32::from(!server.is_at_rest());
    }
    assert!(ahead <= 5, "what the first read had brought, and nothing after it: {ahead}");
    assert!(server.is_at_rest());
}
