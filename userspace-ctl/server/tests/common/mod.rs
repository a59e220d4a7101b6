// SPDX-License-Identifier: GPL-2.0

//! A server in a thread of its own, and raw requests to it.
#![allow(dead_code)] // Each test uses some of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use pristine_server::{Handle, Options, Origin, ServeError, Server, Settings};
use pristine_store::{Digest, DirStore, ObjectName, PackId, Store};
use tokio::sync::oneshot;

/// Bytes of which each block of 4096 is different from its neighbours.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at / 4096 * 7 + at % 251) as u8)
        .collect()
}

/// Puts bytes into the store in `root` as a pack, and returns its path.
pub fn put_pack(root: &Path, bytes: &[u8]) -> String {
    let store = DirStore::open_or_create(root).unwrap();
    let object = ObjectName::Pack(PackId::new(Digest::of(bytes)));
    store.put(&object, bytes).unwrap();
    format!("/{}", object.path())
}

pub struct Running {
    pub address: SocketAddr,
    pub metrics: Option<SocketAddr>,
    pub handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

/// Serves a directory with these settings, on one thread.
pub fn start(root: &Path, settings: Settings) -> Running {
    let options = Options {
        settings,
        ..Options::default()
    };
    start_with(Origin::Directory(root.to_owned()), options)
}

pub fn start_with(origin: Origin, mut options: Options) -> Running {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    options.listen = vec!["127.0.0.1:0".parse().unwrap()];
    options.metrics = Some("127.0.0.1:0".parse().unwrap());
    let (stop, stopped) = oneshot::channel();
    let (tell, told) = std::sync::mpsc::channel();
    // In a thread of its own from the beginning: the test may run in a runtime.
    let thread = std::thread::spawn(move || {
        runtime.block_on(async {
            let server = Server::bind(origin, options).await?;
            let address = server.addresses()[0];
            tell.send((address, server.metrics_address(), server.handle()))
                .unwrap();
            let stopped = async {
                let _ = stopped.await;
            };
            server.run(stopped).await
        })
    });
    let (address, metrics, handle) = told.recv().expect("a server that listens");
    Running {
        address,
        metrics,
        handle,
        stop: Some(stop),
        thread: Some(thread),
    }
}

impl Running {
    pub fn ask_to_stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    pub fn wait(&mut self) -> Result<(), ServeError> {
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
    }

    /// Sends bytes on a connection of their own, and returns all that comes back.
    pub fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = self.connect();
        // A server that has heard enough need not hear all.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    }

    pub fn get(&self, path: &str, fields: &str) -> Answer {
        self.request("GET", path, fields)
    }

    pub fn request(&self, method: &str, path: &str, fields: &str) -> Answer {
        let request =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{fields}Connection: close\r\n\r\n");
        Answer::parse(&self.raw(request.as_bytes()))
    }

    /// A counter or gauge, by its name with labels and without `pristine_`.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.handle.metrics();
        let name = format!("pristine_{name} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }

    /// Waits until a counter or gauge is as wanted.
    pub fn wait_for(&self, name: &str, wanted: impl Fn(f64) -> bool) {
        for _ in 0..3000 {
            if wanted(self.metric(name)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{name} is {}", self.metric(name));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|end| end == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("{:?}", String::from_utf8_lossy(bytes)));
        let head = String::from_utf8(bytes[..end + 2].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer {
            status,
            head,
            body: bytes[end + 4..].to_vec(),
        }
    }

    pub fn field(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines
            .find(|(found, _)| *found == name)
            .map(|(_, value)| value)
    }
}
