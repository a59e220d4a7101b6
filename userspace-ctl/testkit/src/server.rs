// SPDX-License-Identifier: GPL-2.0

//! The server: a thread for each connection, files from a directory, faults by rule.

use std::io::{self, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::http::{read_request, Request};
use crate::rules::{Fault, Rules};

/// How to start a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen; port 0 for any.
    pub listen: SocketAddr,
    /// A file with rules, read again whenever its text changes; it replaces those that were set.
    pub control: Option<PathBuf>,
    /// Write a line to stderr for each request.
    pub log: bool,
    /// Give each object an `ETag`, made from its content, and honour `If-Range`.
    pub tags: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            control: None,
            log: false,
            tags: false,
        }
    }
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    options: Options,
    rules: Mutex<Arc<Rules>>,
    control_text: Mutex<String>,
    requests: AtomicU64,
    stop: AtomicBool,
}

/// A running server; it stops when this is dropped.
#[derive(Debug)]
pub struct FaultyServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<std::thread::JoinHandle<()>>,
}

impl FaultyServer {
    /// Serves `root` on a free port of 127.0.0.1, without faults.
    ///
    /// # Errors
    /// If no port can be opened.
    pub fn start(root: &Path) -> io::Result<Self> {
        FaultyServer::start_with(root, Options::default(), Rules::default())
    }

    /// Serves `root` as told.
    ///
    /// # Errors
    /// If the port cannot be opened.
    pub fn start_with(root: &Path, options: Options, rules: Rules) -> io::Result<Self> {
        let listener = TcpListener::bind(options.listen)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            options,
            rules: Mutex::new(Arc::new(rules)),
            control_text: Mutex::new(String::new()),
            requests: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let for_acceptor = Arc::clone(&shared);
        let acceptor = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if for_acceptor.stop.load(Ordering::Relaxed) {
                    break;
                }
                let shared = Arc::clone(&for_acceptor);
                // Threads end with their connections; a test does not wait for them.
                std::thread::spawn(move || {
                    let _ = shared.connection(&stream);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        Ok(FaultyServer {
            address,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of the store.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Replaces the rules; their counts begin anew.
    pub fn set_rules(&self, rules: Rules) {
        let current = self.shared.rules.lock();
        *current.unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// Requests seen.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Serves until the process ends.
    pub fn wait(mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Drop for FaultyServer {
    fn drop(&mut self) {
        let Some(acceptor) = self.acceptor.take() else {
            return;
        };
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the acceptor, so that the port is closed when this returns.
        let _ = TcpStream::connect(self.address);
        let _ = acceptor.join();
    }
}

impl Shared {
    fn connection(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream);
        while let Some(request) = read_request(&mut reader)? {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            self.requests.fetch_add(1, Ordering::Relaxed);
            let fault = self.rules().fault(&request.path);
            if self.options.log {
                eprintln!("{} {:?} {fault:?}", request.path, request.range);
            }
            if !self.answer(stream, &request, fault)? || !request.keep_alive {
                break;
            }
        }
        Ok(())
    }

    fn rules(&self) -> Arc<Rules> {
        if let Some(path) = &self.options.control {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let mut last = self
                .control_text
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if *last != text {
                match text.parse() {
                    Ok(rules) => {
                        let mut current = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
                        *current = Arc::new(rules);
                    }
                    Err(error) => eprintln!("{}: {error}", path.display()),
                }
                *last = text;
            }
        }
        let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&rules)
    }

    /// Sends an answer; returns whether the connection goes on.
    fn answer(&self, mut stream: &TcpStream, request: &Request, fault: Fault) -> io::Result<bool> {
        match fault {
            Fault::Close => return Ok(false),
            Fault::Hang => {
                std::thread::sleep(Duration::from_secs(60));
                return Ok(false);
            }
            Fault::Delay(time) => std::thread::sleep(time),
            Fault::Status(status) => {
                let text = format!("HTTP/1.1 {status} Fault\r\nContent-Length: 6\r\n\r\nfault\n");
                stream.write_all(text.as_bytes())?;
                return Ok(true);
            }
            _ => (),
        }
        let hidden = request
            .path
            .split('/')
            .any(|part| part.starts_with('.') || part.is_empty());
        let file = match hidden {
            true => None,
            false => std::fs::read(self.root.join(&request.path)).ok(),
        };
        let Some(mut body) = file else {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            return Ok(true);
        };
        match fault {
            Fault::Short(by) => body.truncate(body.len().saturating_sub(by as usize)),
            Fault::Long(by) => body.resize(body.len() + by as usize, 0),
            _ => (),
        }
        let total = body.len() as u64;
        let tag = format!("\"{}\"", pristine_image::Digest::of(&body));
        let same = request
            .if_range
            .as_ref()
            .is_none_or(|wanted| *wanted == tag);
        let mut header = String::from("HTTP/1.1 200 OK\r\n");
        let range = request
            .range
            .filter(|_| same && fault != Fault::IgnoreRange);
        if let Some((mut first, last)) = range {
            let end = last.map_or(total, |last| last.saturating_add(1).min(total));
            if first >= end {
                let text = format!(
                    "HTTP/1.1 416 Range\r\nContent-Range: bytes */{total}\r\nContent-Length: 0\r\n\r\n"
                );
                stream.write_all(text.as_bytes())?;
                return Ok(true);
            }
            if fault == Fault::OtherRange {
                first = if first > 0 { first - 1 } else { 1.min(end - 1) };
            }
            body = body[first as usize..end as usize].to_vec();
            let range = format!("Content-Range: bytes {first}-{}/{total}\r\n", end - 1);
            header = format!("HTTP/1.1 206 Partial Content\r\n{range}");
        }
        if fault == Fault::Wrong {
            body.iter_mut().step_by(4096).for_each(|byte| *byte ^= 0x55);
        }
        if self.options.tags {
            header.push_str(&format!("ETag: {tag}\r\n"));
        }
        header.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
        stream.write_all(header.as_bytes())?;
        if request.head {
            return Ok(true);
        }
        match fault {
            Fault::Cut(after) => {
                let end = body.len().min(after as usize);
                stream.write_all(&body[..end])?;
                Ok(false)
            }
            Fault::Slow(rate) => {
                for piece in body.chunks((rate / 10).max(1) as usize) {
                    stream.write_all(piece)?;
                    std::thread::sleep(Duration::from_millis(100));
                }
                Ok(true)
            }
            _ => {
                stream.write_all(&body)?;
                Ok(true)
            }
        }
    }
}
