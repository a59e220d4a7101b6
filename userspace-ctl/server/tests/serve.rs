// SPDX-License-Identifier: GPL-2.0

//! What is served, and how the server ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{pattern, put_pack, start, Answer};
use pristine_server::Settings;

const LEN: usize = 24 << 20;

#[test]
fn an_answer_under_way_is_finished_and_then_it_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = put_pack(directory.path(), &pattern(LEN));
    let mut running = start(directory.path(), Settings::default());
    let mut stream = running.connect();
    let mut idle = running.connect();
    idle.write_all(b"GET /pristine-store HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut some = [0; 20];
    idle.read_exact(&mut some).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = vec![0; 100_000];
    stream.read_exact(&mut answer).unwrap();
    running.ask_to_stop();
    // It takes no more clients, and those that ask nothing are gone.
    while TcpStream::connect(running.address).is_ok() {
        std::thread::yield_now();
    }
    idle.read_to_end(&mut Vec::new()).unwrap();
    stream.read_to_end(&mut answer).unwrap();
    running.wait().unwrap();
    assert!(Answer::parse(&answer).body == pattern(LEN));
}

#[test]
fn a_client_that_does_not_read_cannot_keep_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = put_pack(directory.path(), &pattern(LEN));
    let mut settings = Settings::default();
    settings.drain_time = Duration::from_millis(300);
    let mut running = start(directory.path(), settings);
    let mut stream = running.connect();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    running.wait_for("sent_bytes_total", |bytes| bytes > 0.0);
    let begin = Instant::now();
    running.ask_to_stop();
    running.wait().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(25));
    drop(stream);
}

#[test]
fn parts_tags_and_conditions() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(200_000);
    let path = put_pack(directory.path(), &bytes);
    let running = start(directory.path(), Settings::default());

    let whole = running.get(&path, "");
    assert_eq!((whole.status, whole.body == bytes), (200, true));
    assert_eq!(whole.field("content-type"), Some("application/zstd"));
    assert_eq!(whole.field("content-length"), Some("200000"));
    assert_eq!(whole.field("accept-ranges"), Some("bytes"));
    assert_eq!(whole.field("content-encoding"), None);
    assert!(whole.field("cache-control").unwrap().contains("immutable"));
    assert!(whole.field("date").unwrap().ends_with(" GMT"));
    let tag = whole.field("etag").unwrap();
    assert!(tag.starts_with('"') && tag.ends_with('"') && tag.len() > 60);

    // Small parts go out with the header, large ones by sendfile.
    for (field, wanted) in [
        ("bytes=0-0", 0..1),
        ("bytes=4096-8191", 4096..8192),
        ("bytes=100-150000", 100..150_001),
        ("bytes=199999-", 199_999..200_000),
        ("bytes=-5", 199_995..200_000),
        ("bytes=150000-99999999999999999999", 150_000..200_000),
    ] {
        let answer = running.get(&path, &format!("Range: {field}\r\n"));
        assert_eq!(answer.status, 206, "{field}");
        assert!(answer.body == bytes[wanted.clone()], "{field}");
        let range = format!("bytes {}-{}/200000", wanted.start, wanted.end - 1);
        assert_eq!(answer.field("content-range"), Some(range.as_str()));
    }
    for field in ["bytes=200000-", "bytes=5-4", "bytes=0-1,3-4", "bytes=x"] {
        let answer = running.get(&path, &format!("Range: {field}\r\n"));
        assert_eq!(answer.status, 416, "{field}");
        assert_eq!(answer.field("content-range"), Some("bytes */200000"));
    }
    let known = running.get(&path, &format!("If-None-Match: \"x\", W/{tag}\r\n"));
    assert_eq!((known.status, known.body.len()), (304, 0));
    assert_eq!(known.field("etag"), Some(tag));
    let other = running.get(&path, "If-Range: \"x\"\r\nRange: bytes=0-1\r\n");
    assert_eq!((other.status, other.body.len()), (200, 200_000));
    let same = running.get(&path, &format!("If-Range: {tag}\r\nRange: bytes=0-1\r\n"));
    assert_eq!((same.status, same.body.len()), (206, 2));

    let head = running.request("HEAD", &path, "");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.field("content-length"), Some("200000"));
    let head = running.request("HEAD", &path, "Range: bytes=1-2\r\n");
    assert_eq!((head.status, head.body.len()), (206, 0));
    let put = running.request("PUT", &path, "");
    assert_eq!((put.status, put.field("allow")), (405, Some("GET, HEAD")));

    let marker = running.get("/pristine-store", "");
    assert_eq!(marker.body, b"pristine-store 1\n");
    assert_eq!(marker.field("cache-control"), Some("no-cache"));
    let tag = marker.field("etag").unwrap();
    let again = running.get("/pristine-store", &format!("If-None-Match: {tag}\r\n"));
    assert_eq!(again.status, 304);
    assert_eq!(running.get("/images/", "").body, b"");
    assert_eq!(running.get("/channels/none", "").status, 404);
}

#[test]
fn requests_follow_one_another_on_a_connection() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(100_000);
    let path = put_pack(directory.path(), &bytes);
    let running = start(directory.path(), Settings::default());
    let mut stream = running.connect();
    // Sent all at once, and answered in order.
    let mut requests = String::new();
    for at in 0..50 {
        let range = format!("bytes={}-{}", at * 1000, at * 1000 + 999);
        requests += &format!("GET {path} HTTP/1.1\r\nHost: x\r\nRange: {range}\r\n\r\n");
    }
    requests += "GET /pristine-store HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(requests.as_bytes()).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    let mut rest = &all[..];
    for at in 0..50 {
        let end = rest.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
        assert!(rest[end..].starts_with(&bytes[at * 1000..at * 1000 + 1000]));
        rest = &rest[end + 1000..];
    }
    assert!(rest.ends_with(b"pristine-store 1\n"));
}

#[test]
fn an_object_that_was_replaced_or_removed_is_not_mixed_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = put_pack(directory.path(), &pattern(100_000));
    let file = directory.path().join(&path[1..]);
    let running = start(directory.path(), Settings::default());
    assert_eq!(running.get(&path, "").status, 200);
    // One that was cut meanwhile ends the connection, rather than sending something else.
    let open = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    open.set_len(50_000).unwrap();
    assert_eq!(running.get(&path, "").body.len(), 50_000);
    // What is no file is nothing, and a pipe does not block.
    let other = put_pack(directory.path(), &pattern(5));
    let other_file = directory.path().join(&other[1..]);
    std::fs::remove_file(&other_file).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(&other_file)
        .status();
    assert!(made.unwrap().success());
    assert_eq!(running.get(&other, "").status, 404);
}

#[test]
fn metrics_tell_what_happened() {
    let directory = tempfile::tempdir().unwrap();
    let path = put_pack(directory.path(), &pattern(100_000));
    let running = start(directory.path(), Settings::default());
    running.get(&path, "");
    running.get(&path, "Range: bytes=0-9\r\n");
    running.get("/nothing", "");
    running.wait_for("connections", |open| open == 0.0);
    let mut stream = TcpStream::connect(running.metrics.unwrap()).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = Answer::parse(&answer);
    let text = String::from_utf8(answer.body).unwrap();
    for line in [
        "pristine_connections_total 3\n",
        "pristine_requests_total{version=\"1\"} 3\n",
        "pristine_responses_total{status=\"2xx\"} 2\n",
        "pristine_responses_total{status=\"4xx\"} 1\n",
        "pristine_sent_bytes_total 100010\n",
        "pristine_cache_hits_total 1\n",
        "pristine_request_seconds_count 3\n",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert_eq!(running.get("/metrics", "").status, 404);
}
