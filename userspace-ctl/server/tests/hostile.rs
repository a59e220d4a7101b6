// SPDX-License-Identifier: GPL-2.0

//! Clients that mean no good, or do not know better.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use common::{pattern, put_pack, start, Answer, Running};
use pristine_server::Settings;
use pristine_testkit::noise;

fn served() -> (tempfile::TempDir, Running, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = put_pack(directory.path(), &pattern(300_000));
    let mut settings = Settings::default();
    settings.header_time = Duration::from_millis(500);
    settings.stall_time = Duration::from_millis(500);
    let running = start(directory.path(), settings);
    (directory, running, path)
}

/// It still serves, and nothing is left over.
fn all_is_well(running: &Running) {
    assert_eq!(running.get("/pristine-store", "").status, 200);
    running.wait_for("connections", |open| open == 0.0);
    assert_eq!(running.metric("requests_in_flight"), 0.0);
}

#[test]
fn what_is_no_http_is_refused() {
    let (_directory, running, _) = served();
    let long = "a".repeat(20_000);
    for (request, status) in [
        ("\0\0\0\0\r\n\r\n".to_owned(), 400),
        ("hello\r\n\r\n".to_owned(), 400),
        ("\r\n\r\n\r\n\r\n".to_owned(), 400),
        ("GET\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/9.9\r\nHost: x\r\n\r\n".to_owned(), 505),
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\nHost: x\n\n\r\n\r\n".to_owned(), 400),
        (format!("GET /{long} HTTP/1.1\r\nHost: x\r\n\r\n"), 431),
        (
            format!("GET / HTTP/1.1\r\nHost: x\r\nX: {long}\r\n\r\n"),
            431,
        ),
        (
            format!(
                "GET / HTTP/1.1\r\nHost: x\r\n{}\r\n",
                "A: b\r\n".repeat(1000)
            ),
            431,
        ),
        (long, 431),
    ] {
        let answer = Answer::parse(&running.raw(request.as_bytes()));
        let start: String = request.chars().take(60).collect();
        assert_eq!(answer.status, status, "{start:?}");
        assert_eq!(answer.field("connection"), Some("close"));
    }
    // TLS where there is none, and bytes without any sense or end.
    for seed in 0..8 {
        running.raw(&noise(seed, 100_000));
    }
    let mut hello = vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc];
    hello.extend(noise(1, 508));
    running.raw(&hello);
    all_is_well(&running);
}

#[test]
fn nothing_is_smuggled() {
    let (_directory, running, path) = served();
    let inner = "GET /pristine-store HTTP/1.1\r\nHost: x\r\n\r\n";
    for (fields, status) in [
        (format!("Content-Length: {}", inner.len()), 413),
        ("Content-Length: 0\r\nContent-Length: 44".to_owned(), 413),
        ("Content-Length: 44\r\nContent-Length: 0".to_owned(), 413),
        ("Content-Length: 0, 44".to_owned(), 413),
        (
            "Content-Length: 0\r\nTransfer-Encoding: chunked".to_owned(),
            400,
        ),
        ("Transfer-Encoding: chunked".to_owned(), 400),
        ("Transfer-Encoding: identity".to_owned(), 400),
        ("Transfer-Encoding : chunked".to_owned(), 400),
        ("X: y\r\n Transfer-Encoding: chunked".to_owned(), 400),
        ("X: y\nTransfer-Encoding: chunked".to_owned(), 400),
        ("X: y\r\r\nZ: z".to_owned(), 400),
        ("Host: y".to_owned(), 400),
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n{inner}");
        let answer = running.raw(request.as_bytes());
        let text = String::from_utf8_lossy(&answer);
        // One answer, and the connection is closed: what follows is not taken for a request.
        assert_eq!(Answer::parse(&answer).status, status, "{fields:?}");
        assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{fields:?}: {text}");
    }
    all_is_well(&running);
}

#[test]
fn there_is_no_way_out_of_the_store() {
    let (directory, running, path) = served();
    std::fs::write(directory.path().join("secret"), "secret").unwrap();
    std::fs::write(directory.path().join("packs/secret"), "secret").unwrap();
    let name = path.rsplit('/').next().unwrap();
    let two = &name[..2];
    for path in [
        "/secret".to_owned(),
        "/packs/secret".to_owned(),
        "/../secret".to_owned(),
        "/packs/../secret".to_owned(),
        "/packs/%2e%2e/secret".to_owned(),
        "/packs/..%2fsecret".to_owned(),
        "/packs/..%252fsecret".to_owned(),
        "/packs/..\\secret".to_owned(),
        "/./pristine-store".to_owned(),
        "//pristine-store".to_owned(),
        "/pristine-store/".to_owned(),
        "/pristine-store%00".to_owned(),
        "/%70ristine-store".to_owned(),
        "/.lock".to_owned(),
        "/.tmp/".to_owned(),
        "/pins/".to_owned(),
        "/leases/x".to_owned(),
        "/channels/%2e".to_owned(),
        format!("/packs//{name}"),
        format!("/packs/{two}/./{name}"),
        format!("/packs/{two}/../{two}/{name}"),
        format!("/packs/{two}/{}", name.to_uppercase()),
        format!("/packs/{two}/{name}/"),
        "pristine-store".to_owned(),
        "*".to_owned(),
        "/".to_owned(),
    ] {
        let answer = running
            .raw(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes());
        let answer = Answer::parse(&answer);
        assert!(matches!(answer.status, 404 | 400), "{path}: {answer:?}");
        assert!(
            !answer.body.windows(6).any(|text| text == b"secret"),
            "{path}"
        );
    }
    // As a proxy is asked, and with a query: the path counts.
    assert_eq!(running.get("http://other/pristine-store", "").status, 200);
    assert_eq!(running.get("/pristine-store?x=../..", "").status, 200);
    all_is_well(&running);
}

#[test]
fn who_trickles_is_given_up_and_others_are_served() {
    let (_directory, running, path) = served();
    // Some begin a request and do not go on; some send a byte now and then; some ask and do not read.
    let mut slow: Vec<_> = (0..60).map(|_| running.connect()).collect();
    for (at, stream) in slow.iter_mut().enumerate() {
        let request = match at % 3 {
            0 => "GET / HT".to_owned(),
            1 => "GET / HTTP/1.1\r\nX: ".to_owned(),
            _ => format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(100),
        };
        stream.write_all(request.as_bytes()).unwrap();
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut trickling: Vec<_> = slow.iter().map(|s| s.try_clone().unwrap()).collect();
        let stop = &stop;
        scope.spawn(move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for stream in trickling.iter_mut().skip(1).step_by(3) {
                    let _ = stream.write_all(b"a");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        for _ in 0..50 {
            assert_eq!(
                running.get(&path, "Range: bytes=0-99999\r\n").body.len(),
                100_000
            );
        }
        running.wait_for("refused_total{reason=\"slow\"}", |slow| slow >= 60.0);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    for mut stream in slow {
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    all_is_well(&running);
}

#[test]
fn clients_that_leave_leave_nothing() {
    let (_directory, running, path) = served();
    for at in 0..100 {
        let mut stream = running.connect();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        let part = &request.as_bytes()[..request.len().min(at * 2)];
        stream.write_all(part).unwrap();
        if at % 2 == 0 {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        drop(stream);
    }
    all_is_well(&running);
}

#[test]
fn limits_of_a_client_hold() {
    let directory = tempfile::tempdir().unwrap();
    let path = put_pack(directory.path(), &pattern(300_000));
    let mut settings = Settings::default();
    settings.client_connections = 3;
    settings.client_requests = Some(2);
    let running = start(directory.path(), settings.clone());
    let kept: Vec<_> = (0..3).map(|_| running.connect()).collect();
    running.wait_for("connections", |open| open == 3.0);
    let answer = Answer::parse(&running.raw(b""));
    assert_eq!(
        (answer.status, answer.field("retry-after")),
        (503, Some("1"))
    );
    drop(kept);
    running.wait_for("connections", |open| open == 0.0);
    // Two at once, some wait, and then it is enough. All at once on three connections.
    let request = "GET /pristine-store HTTP/1.1\r\nHost: x\r\n\r\n".repeat(40);
    let mut streams: Vec<_> = (0..3).map(|_| running.connect()).collect();
    for stream in &mut streams {
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    }
    // A request waits on its connection, so the three together never owe much: none is refused, all are slowed.
    running.wait_for("responses_total{status=\"2xx\"}", |done| done >= 4.0);
    drop(streams);

    // The new limit counts at once, also on connections that are open.
    settings.client_requests = None;
    settings.client_bytes = Some(10 << 20);
    running.handle.reload(settings).unwrap();
    // Those that waited have gone; until then they count.
    running.wait_for("connections", |open| open == 0.0);
    let answer = running.get(&path, "");
    assert!(answer.body == pattern(300_000));
}
