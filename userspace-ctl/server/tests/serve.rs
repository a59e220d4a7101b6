// SPDX-License-Identifier: GPL-2.0

//! The server as a library: shutdown, and many clients at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pristine_server::{ServeError, Server};
use pristine_store::{Digest, DirStore, ObjectName, PackId, Store};
use tokio::sync::oneshot;

const LEN: usize = 48 << 20;

fn store_with_pack(root: &Path) -> String {
    let store = DirStore::open_or_create(root).unwrap();
    let bytes: Vec<u8> = (0..LEN).map(|at| (at / 4096) as u8).collect();
    let object = ObjectName::Pack(PackId::new(Digest::of(&bytes)));
    store.put(&object, &bytes).unwrap();
    object.path()
}

/// A server in a thread of its own.
struct Running {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), ServeError>>,
}

fn start(root: &Path) -> Running {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    let server = runtime.block_on(Server::bind(root, listen, None)).unwrap();
    let address = server.address();
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::spawn(move || {
        runtime.block_on(server.run(async {
            let _ = stopped.await;
        }))
    });
    Running {
        address,
        stop,
        thread,
    }
}

fn ask(address: SocketAddr, path: &str, more: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    let timeout = Some(Duration::from_secs(30));
    stream.set_read_timeout(timeout).unwrap();
    let request = format!("GET /{path} HTTP/1.1\r\nHost: x\r\n{more}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

#[test]
fn an_answer_under_way_is_finished_and_then_it_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = store_with_pack(directory.path());
    let running = start(directory.path());
    let mut stream = ask(running.address, &path, "");
    let mut some = vec![0; 100_000];
    stream.read_exact(&mut some).unwrap();
    running.stop.send(()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let another = TcpStream::connect(running.address);
    assert!(another.is_err(), "it takes no more clients");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(some.len() + rest.len() > LEN);
    drop(stream);
    running.thread.join().unwrap().unwrap();
}

#[test]
fn a_client_that_does_not_read_cannot_keep_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = store_with_pack(directory.path());
    let running = start(directory.path());
    let stream = ask(running.address, &path, "");
    std::thread::sleep(Duration::from_millis(200));
    let begin = Instant::now();
    running.stop.send(()).unwrap();
    running.thread.join().unwrap().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(25));
    drop(stream);
}

#[test]
fn many_clients_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = store_with_pack(directory.path());
    let running = start(directory.path());
    let address = running.address;
    std::thread::scope(|scope| {
        for client in 0..100 {
            let path = &path;
            scope.spawn(move || {
                let first = client * 4096 * 50;
                let range = format!("Range: bytes={first}-{}\r\n", first + 4095);
                let mut answer = Vec::new();
                ask(address, path, &range).read_to_end(&mut answer).unwrap();
                let body = &answer[answer.len() - 4096..];
                assert!(body.iter().all(|&byte| byte == (client * 50) as u8));
            });
        }
    });
    running.stop.send(()).unwrap();
    running.thread.join().unwrap().unwrap();
}
