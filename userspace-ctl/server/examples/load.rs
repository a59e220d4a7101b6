// SPDX-License-Identifier: GPL-2.0

//! Load for a server of a store, for `make bench-serve`: so many clients, each with connections of its own, fetch the packs of a
//! store over and over for some seconds. Prints throughput and latencies as JSON.
//!
//! What arrives is counted and dropped in the kernel (MSG_TRUNC), so that this program costs little beside the server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A measurement that fails has no result.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{recv, RecvFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;

const USAGE: &str = "usage: load ADDR:PORT STORE packs|ranges|frames CLIENTS SECONDS";

/// Bytes of a range, as a client that fetches a whole image asks for them.
const RANGE: u64 = 2 << 20;
/// About a frame, as a client that reads a few blocks asks for it.
const FRAME: u64 = 64 << 10;

struct Plan {
    address: SocketAddr,
    packs: Vec<(String, u64)>,
    part: Option<u64>,
    random: bool,
    end: Instant,
}

#[derive(Default)]
struct Counted {
    bytes: u64,
    times: Vec<u32>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, store, mode, clients, seconds] = &arguments[..] else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    let (part, random) = match mode.as_str() {
        "packs" => (None, false),
        "ranges" => (Some(RANGE), false),
        "frames" => (Some(FRAME), true),
        _ => panic!("{USAGE}"),
    };
    let clients: usize = clients.parse().expect(USAGE);
    let seconds: u64 = seconds.parse().expect(USAGE);
    let packs = packs(Path::new(store)).expect("a store");
    assert!(!packs.is_empty(), "the store has no packs");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let begin = Instant::now();
    let plan = Arc::new(Plan {
        address: address.parse().expect(USAGE),
        packs,
        part,
        random,
        end: begin + Duration::from_secs(seconds),
    });
    let all = runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..clients {
            tasks.spawn(client(Arc::clone(&plan), number as u64));
        }
        let mut all = Counted::default();
        while let Some(counted) = tasks.join_next().await {
            let counted = counted.expect("a client").expect("a connection");
            all.bytes += counted.bytes;
            all.times.extend(counted.times);
        }
        all
    });
    let time = begin.elapsed().as_secs_f64();
    let mut times = all.times;
    times.sort_unstable();
    let at = |share: f64| {
        let index = (times.len() as f64 * share) as usize;
        f64::from(times[index.min(times.len() - 1)]) / 1000.0
    };
    println!(
        "{{\"bytes\": {}, \"mibs\": {:.1}, \"requests\": {}, \"p50_ms\": {:.3}, \"p99_ms\": {:.3}, \"max_ms\": {:.3}}}",
        all.bytes,
        all.bytes as f64 / time / f64::from(1 << 20),
        times.len(),
        at(0.5),
        at(0.99),
        at(1.0),
    );
}

/// The packs of a store and their lengths.
fn packs(store: &Path) -> io::Result<Vec<(String, u64)>> {
    let mut packs = Vec::new();
    for directory in fs::read_dir(store.join("packs"))? {
        for file in fs::read_dir(directory?.path())? {
            let file = file?;
            let path = file.path();
            let name = path.strip_prefix(store).map_err(io::Error::other)?;
            packs.push((format!("/{}", name.display()), file.metadata()?.len()));
        }
    }
    packs.sort();
    Ok(packs)
}

async fn client(plan: Arc<Plan>, number: u64) -> io::Result<Counted> {
    let mut stream = TcpStream::connect(plan.address).await?;
    stream.set_nodelay(true)?;
    let mut sink = vec![0; 1 << 20];
    let mut head = Vec::with_capacity(1024);
    let mut counted = Counted::default();
    let mut random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    // All begin at different places: the page cache has all of it, and no two are in step.
    let mut pack = number as usize * 7;
    let mut at = 0;
    while Instant::now() < plan.end {
        let (path, len) = &plan.packs[pack % plan.packs.len()];
        let range = match plan.part {
            None => {
                pack += 1;
                None
            }
            Some(part) if plan.random => {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                pack = random as usize >> 20;
                let first = random % len.saturating_sub(part).max(1);
                Some((first, (first + part).min(*len)))
            }
            Some(part) => {
                let range = (at, (at + part).min(*len));
                at = range.1;
                if at == *len {
                    (pack, at) = (pack + 1, 0);
                }
                Some(range)
            }
        };
        let field = range.map_or(String::new(), |(first, end)| {
            format!("Range: bytes={first}-{}\r\n", end - 1)
        });
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nAccept-Encoding: identity\r\n{field}\r\n",
            plan.address
        );
        let begin = Instant::now();
        stream.write_all(request.as_bytes()).await?;
        let left = read_head(&mut stream, &mut head).await?;
        counted.bytes += left.0 + left.1;
        skip(&stream, left.0, &mut sink).await?;
        counted.times.push(begin.elapsed().as_micros() as u32);
    }
    Ok(counted)
}

/// Reads an answer's header; how much of the body is to come, and how much came with it.
async fn read_head(stream: &mut TcpStream, head: &mut Vec<u8>) -> io::Result<(u64, u64)> {
    head.clear();
    let end = loop {
        // Little, so that the body stays in the kernel.
        let mut some = [0; 512];
        let got = stream.read(&mut some).await?;
        assert!(got > 0, "the server closed the connection");
        head.extend(&some[..got]);
        if let Some(end) = head.windows(4).position(|end| end == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let text = std::str::from_utf8(&head[..end]).map_err(io::Error::other)?;
    let ok = text.starts_with("HTTP/1.1 200 ") || text.starts_with("HTTP/1.1 206 ");
    assert!(ok, "{text}");
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length").then_some(value)
    });
    let length: u64 = length.and_then(|length| length.parse().ok()).expect(text);
    let came = (head.len() - end) as u64;
    Ok((length - came, came))
}

/// Takes that many bytes without looking at them.
async fn skip(stream: &TcpStream, mut left: u64, sink: &mut [u8]) -> io::Result<()> {
    while left > 0 {
        let len = left.min(sink.len() as u64) as usize;
        let got = stream.try_io(Interest::READABLE, || {
            Ok(recv(stream, &mut sink[..len], RecvFlags::TRUNC)?.1)
        });
        match got {
            Ok(0) => panic!("the server closed the connection"),
            Ok(got) => left -= got as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
