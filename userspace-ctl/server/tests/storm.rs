// SPDX-License-Identifier: GPL-2.0

//! Many at once, on one thread of the server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use common::{pattern, put_pack, start, Answer};
use pristine_server::{raise_file_limit, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

/// Connects as client number so and so: each has an address of its own.
async fn connect(server: SocketAddr, client: u16) -> std::io::Result<TcpStream> {
    let [high, low] = client.to_be_bytes();
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((Ipv4Addr::new(127, 1, high, low), 0)))?;
    socket.connect(server).await
}

async fn get(stream: &mut TcpStream, path: &str, first: usize, len: usize) -> Answer {
    let range = format!("bytes={first}-{}", first + len - 1);
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nRange: {range}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    loop {
        let mut some = [0; 8192];
        let got = stream.read(&mut some).await.unwrap();
        assert!(got > 0, "{}", String::from_utf8_lossy(&answer));
        answer.extend(&some[..got]);
        let end = answer.windows(4).position(|end| end == b"\r\n\r\n");
        if end.is_some_and(|end| answer.len() == end + 4 + len) {
            return Answer::parse(&answer);
        }
    }
}

#[tokio::test]
async fn a_thousand_clients_are_connected_and_all_are_served() {
    raise_file_limit();
    let directory = tempfile::tempdir().unwrap();
    let bytes = Arc::new(pattern(4 << 20));
    let path = Arc::new(put_pack(directory.path(), &bytes));
    let running = start(directory.path(), Settings::default());
    let all_there = Arc::new(Barrier::new(1001));
    let mut clients = JoinSet::new();
    for client in 0..1000 {
        let (bytes, path) = (Arc::clone(&bytes), Arc::clone(&path));
        let (all_there, address) = (Arc::clone(&all_there), running.address);
        clients.spawn(async move {
            let mut stream = connect(address, client).await.unwrap();
            all_there.wait().await;
            for turn in 0..3 {
                let first = usize::from(client) * 4096 + turn * 100;
                let answer = get(&mut stream, &path, first, 60_000).await;
                assert_eq!(answer.status, 206);
                assert!(answer.body == bytes[first..first + 60_000]);
            }
            all_there.wait().await;
            all_there.wait().await;
        });
    }
    all_there.wait().await;
    all_there.wait().await;
    assert_eq!(running.metric("connections"), 1000.0);
    all_there.wait().await;
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    assert_eq!(running.metric("responses_total{status=\"2xx\"}"), 3000.0);
    running.wait_for("connections", |open| open == 0.0);
}

#[tokio::test]
async fn two_hundred_machines_start_at_once() {
    raise_file_limit();
    let directory = tempfile::tempdir().unwrap();
    let bytes = Arc::new(pattern(8 << 20));
    let path = Arc::new(put_pack(directory.path(), &bytes));
    let mut settings = Settings::default();
    // So few that most have to wait for their turn.
    settings.active = 4;
    let running = start(directory.path(), settings);
    let start = Arc::new(Barrier::new(200));
    let mut clients = JoinSet::new();
    for client in 0..200 {
        let (bytes, path) = (Arc::clone(&bytes), Arc::clone(&path));
        let (start, address) = (Arc::clone(&start), running.address);
        clients.spawn(async move {
            start.wait().await;
            // All read the same to boot, on a few connections each.
            let mut parts = JoinSet::new();
            for part in 0..4 {
                let (bytes, path) = (Arc::clone(&bytes), Arc::clone(&path));
                parts.spawn(async move {
                    let mut stream = connect(address, client).await.unwrap();
                    let first = part * (2 << 20);
                    let answer = get(&mut stream, &path, first, 500_000).await;
                    assert!(answer.body == bytes[first..first + 500_000]);
                });
            }
            while let Some(done) = parts.join_next().await {
                done.unwrap();
            }
        });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    assert_eq!(running.metric("responses_total{status=\"2xx\"}"), 800.0);
    // The file was opened once, however many came for it.
    assert!(running.metric("cache_misses_total") <= 800.0);
    running.wait_for("answers_waiting", |waiting| waiting == 0.0);
}

#[tokio::test]
async fn more_connections_than_allowed_are_told_so() {
    let directory = tempfile::tempdir().unwrap();
    put_pack(directory.path(), b"x");
    let mut settings = Settings::default();
    settings.connections = 10;
    let running = start(directory.path(), settings);
    let mut kept = Vec::new();
    for client in 0..10 {
        kept.push(connect(running.address, client).await.unwrap());
    }
    running.wait_for("connections", |open| open == 10.0);
    let mut one_more = connect(running.address, 10).await.unwrap();
    let mut answer = Vec::new();
    one_more.read_to_end(&mut answer).await.unwrap();
    assert_eq!(Answer::parse(&answer).status, 503);
    drop(kept.pop());
    running.wait_for("connections", |open| open == 9.0);
    let mut again = connect(running.address, 10).await.unwrap();
    again
        .write_all(b"GET /pristine-store HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut some = [0; 12];
    again.read_exact(&mut some).await.unwrap();
    assert_eq!(&some, b"HTTP/1.1 200");
}
