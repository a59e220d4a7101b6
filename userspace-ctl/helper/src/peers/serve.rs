// SPDX-License-Identifier: GPL-2.0

//! Gives blocks to neighbours.
//!
//! A block is only given to who names its digest, and that must be the digest of what was read; before and after it was
//! read it must be neither dirty nor stale. So what users changed is never sent, not even while they change it, and who
//! cannot read the image's manifest gets nothing. Nothing that a neighbour asks makes this machine fetch anything.
//!
//! Neighbours come last: few are answered at a time, by threads of the lowest priority, not faster than a rate allows; who
//! comes in vain is told so at once, and goes to the store.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use pristine_image::{Digest, BLOCK_SIZE};
use pristine_store::peers::wire::{
    Answer, Ask, Entry, Request, Status, ENTRY_LEN, MAX_BLOCKS, REQUEST_LEN,
};
use pristine_store::peers::SectionMap;

use super::clean::{are_clean, section_map, CleanBlocks, Shape};

/// All of it is locked in memory, and nothing here recurses.
const STACK: usize = 128 << 10;
/// A connection without a request is closed after this time.
const IDLE: Duration = Duration::from_secs(30);
/// A neighbour takes no longer than this to send a request once it began, and to take an answer.
const SLOW: Duration = Duration::from_secs(5);
/// Answers with blocks that are made at a time.
const AT_ONCE: usize = 2;
/// Who comes while these are made waits for this time, and then is told to go elsewhere.
const PATIENCE: Duration = Duration::from_millis(100);
/// A map is made anew no sooner than this.
const MAP_AGE: Duration = Duration::from_secs(1);
/// After a failure to accept.
const PAUSE: Duration = Duration::from_millis(100);

/// How neighbours are served.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Networks that are served.
    pub allowed: Vec<IpNet>,
    /// Bytes per second at most; `None` for no limit.
    pub rate: Option<u64>,
    /// Connections at a time.
    pub connections: usize,
    /// Connections of one address at a time.
    pub of_one: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            allowed: private_networks(),
            rate: Some(32 << 20),
            connections: 16,
            of_one: 4,
        }
    }
}

/// Networks that no packet of the Internet comes from.
pub fn private_networks() -> Vec<IpNet> {
    let net = |address: IpAddr, len| IpNet::new(address, len).ok();
    let v4 = |a, b, len| net(Ipv4Addr::new(a, b, 0, 0).into(), len);
    let v6 = |first, len| net(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0).into(), len);
    let all = [
        v4(10, 0, 8),
        v4(172, 16, 12),
        v4(192, 168, 16),
        v4(169, 254, 16),
        v4(127, 0, 8),
        v6(0xfc00, 7),
        v6(0xfe80, 10),
        net(Ipv6Addr::LOCALHOST.into(), 128),
    ];
    all.into_iter().flatten().collect()
}

/// What was given.
#[derive(Debug, Default)]
pub struct Given {
    /// Blocks sent.
    pub blocks: AtomicU64,
    /// Requests answered with what there was.
    pub answered: AtomicU64,
    /// Requests and connections refused: too many, too fast, not allowed, not understood.
    pub refused: AtomicU64,
    /// The image is known not to be encrypted; before that nothing is given.
    pub plain: AtomicBool,
}

/// What all connections share.
struct Shared {
    device: Box<dyn CleanBlocks>,
    limits: Limits,
    given: Arc<Given>,
    stop: AtomicBool,
    /// Who is connected.
    connected: Mutex<Vec<IpAddr>>,
    /// Answers with blocks that are being made.
    answering: Mutex<usize>,
    answered: Condvar,
    /// When the bytes so far are paid for.
    paid: Mutex<Instant>,
    map: Mutex<Option<Known>>,
}

/// The map as it was made last.
struct Known {
    at: Instant,
    /// What it took to make it.
    cost: Duration,
    of: Shape,
    map: Arc<SectionMap>,
}

/// A server of blocks; it ends when this is dropped.
pub struct PeerServer {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl PeerServer {
    /// Serves the clean blocks of `device` on `address`.
    ///
    /// # Errors
    ///
    /// It cannot listen there, or start a thread.
    pub fn start(
        device: Box<dyn CleanBlocks>,
        address: SocketAddr,
        limits: Limits,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).or_else(|error| match address.ip() {
            // All addresses of a machine without IPv6.
            IpAddr::V6(ip) if ip.is_unspecified() => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port()))
            }
            _ => Err(error),
        })?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            device,
            limits,
            given: Arc::default(),
            stop: AtomicBool::new(false),
            connected: Mutex::default(),
            answering: Mutex::new(0),
            answered: Condvar::new(),
            paid: Mutex::new(Instant::now()),
            map: Mutex::default(),
        });
        let for_thread = Arc::clone(&shared);
        let thread = Builder::new().name("peers".into()).stack_size(STACK);
        thread.spawn(move || for_thread.accept(&listener))?;
        Ok(PeerServer { shared, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What was given.
    pub fn given(&self) -> Arc<Given> {
        Arc::clone(&self.shared.given)
    }
}

impl Drop for PeerServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes who accepts.
        let ip = match self.address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let there = SocketAddr::new(ip, self.address.port());
        drop(TcpStream::connect_timeout(&there, PAUSE));
    }
}

/// A connection that counts, until this is dropped.
struct Connected {
    shared: Arc<Shared>,
    ip: IpAddr,
}

impl Drop for Connected {
    fn drop(&mut self) {
        let connected = self.shared.connected.lock();
        let mut connected = connected.unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = connected.iter().position(|ip| *ip == self.ip) {
            connected.swap_remove(place);
        }
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        // Whatever it costs, the machine's own work comes first; threads that are started here have the same.
        let _ = rustix::process::setpriority_process(None, 19);
        loop {
            let accepted = listener.accept();
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let Ok((stream, from)) = accepted else {
                std::thread::sleep(PAUSE);
                continue;
            };
            let Some(connected) = self.admit(from.ip().to_canonical()) else {
                self.given.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let thread = Builder::new().name("peer".into()).stack_size(STACK);
            // Without a thread the connection is closed.
            drop(thread.spawn(move || connected.shared.serve(stream)));
        }
    }

    fn admit(self: &Arc<Self>, ip: IpAddr) -> Option<Connected> {
        if !self.limits.allowed.iter().any(|net| net.contains(&ip)) {
            return None;
        }
        let connected = self.connected.lock();
        let mut connected = connected.unwrap_or_else(PoisonError::into_inner);
        let of_one = connected.iter().filter(|known| **known == ip).count();
        if connected.len() >= self.limits.connections || of_one >= self.limits.of_one {
            return None;
        }
        connected.push(ip);
        drop(connected);
        Some(Connected {
            shared: Arc::clone(self),
            ip,
        })
    }

    /// Answers one request after the other, until the neighbour has no more.
    fn serve(&self, mut stream: TcpStream) {
        let prepared = stream
            .set_nodelay(true)
            .and_then(|()| stream.set_write_timeout(Some(SLOW)));
        if prepared.is_err() {
            return;
        }
        while !self.stop.load(Ordering::Relaxed) {
            // What is wrong with a connection, the neighbour sees by its end.
            if self.one(&mut stream).is_err() {
                return;
            }
        }
    }

    fn one(&self, stream: &mut TcpStream) -> io::Result<()> {
        let mut header = [0; REQUEST_LEN];
        let (first, rest) = header.split_at_mut(1);
        stream.set_read_timeout(Some(IDLE))?;
        stream.read_exact(first)?;
        let deadline = Instant::now() + SLOW;
        read_until(stream, rest, deadline)?;
        let request = Request::decode(&header).map_err(|error| {
            self.given.refused.fetch_add(1, Ordering::Relaxed);
            io::Error::other(error)
        })?;
        let (answer, data) = match request.ask {
            Ask::Blocks(count) => {
                let mut bytes = vec![0; (count as usize).min(MAX_BLOCKS) * ENTRY_LEN];
                read_until(stream, &mut bytes, deadline)?;
                let entries = entries(&bytes);
                self.blocks(&request, &entries)?
            }
            Ask::Map { first, count } => self.map(&request, first, count)?,
        };
        match answer.status {
            Status::Ok => &self.given.answered,
            Status::Busy | Status::OtherImage => &self.given.refused,
        }
        .fetch_add(1, Ordering::Relaxed);
        let mut bytes = answer.encode().to_vec();
        bytes.extend(data);
        stream.write_all(&bytes)
    }

    /// The device, if it means the image that is asked for.
    fn shape(&self, request: &Request) -> Option<Shape> {
        if !self.given.plain.load(Ordering::Acquire) {
            return None;
        }
        let shape = self.device.shape().ok()?;
        (shape.image == request.image).then_some(shape)
    }

    fn blocks(&self, request: &Request, entries: &[Entry]) -> io::Result<(Answer, Vec<u8>)> {
        let Some(shape) = self.shape(request) else {
            return Ok((Answer::only(Status::OtherImage), Vec::new()));
        };
        let Some(_turn) = self.turn(entries.len()) else {
            return Ok((Answer::only(Status::Busy), Vec::new()));
        };
        let numbers = || entries.iter().map(|entry| entry.block);
        let before = are_clean(self.device.as_ref(), &shape, numbers())?;
        let mut read = Vec::with_capacity(entries.len());
        let mut at = 0;
        while at < entries.len() {
            let run = run_length(&entries[at..], &before[at..]);
            if run == 0 {
                read.push(None);
                at += 1;
                continue;
            }
            let first = entries[at].block;
            // A part of a disk that cannot be read is not given; the others are.
            let data = self
                .device
                .read(first..first + run as u64)
                .unwrap_or_default();
            let mut blocks = data.chunks_exact(BLOCK_SIZE);
            for entry in &entries[at..at + run] {
                let block = blocks
                    .next()
                    .filter(|block| Digest::of(block) == entry.digest);
                read.push(block.map(<[u8]>::to_vec));
            }
            at += run;
        }
        let after = are_clean(self.device.as_ref(), &shape, numbers())?;
        let (mut mask, mut data) = (0u64, Vec::new());
        for (place, (block, clean)) in read.into_iter().zip(after).enumerate() {
            if let Some(block) = block.filter(|_| clean) {
                mask |= 1 << place;
                data.extend(block);
            }
        }
        let blocks = u64::from(mask.count_ones());
        self.given.blocks.fetch_add(blocks, Ordering::Relaxed);
        let answer = Answer {
            status: Status::Ok,
            len: mask.count_ones() * BLOCK_SIZE as u32, // CAST: 4096.
            mask,
        };
        Ok((answer, data))
    }

    /// A turn to send so many blocks; `None` if there is none now.
    fn turn(&self, blocks: usize) -> Option<Turn<'_>> {
        {
            let answering = self
                .answering
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let full = |answering: &mut usize| *answering >= AT_ONCE;
            let waited = self.answered.wait_timeout_while(answering, PATIENCE, full);
            let (mut answering, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return None;
            }
            *answering += 1;
        }
        let turn = Turn(self);
        if let Some(rate) = self.limits.rate {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            // A quarter of a second may be saved up, and is what one comes too early by at most.
            let saved = Duration::from_millis(250);
            if *paid > now + saved {
                return None;
            }
            let bytes = (blocks * BLOCK_SIZE) as f64;
            let cost = Duration::from_secs_f64(bytes / rate.max(1) as f64);
            *paid = (*paid).max(now.checked_sub(saved).unwrap_or(now)) + cost;
        }
        Some(turn)
    }

    fn map(&self, request: &Request, first: u64, count: u32) -> io::Result<(Answer, Vec<u8>)> {
        let Some(shape) = self.shape(request) else {
            return Ok((Answer::only(Status::OtherImage), Vec::new()));
        };
        let map = {
            let mut known = self.map.lock().unwrap_or_else(PoisonError::into_inner);
            match &*known {
                // What took long is done more seldom: it never takes more than a fiftieth of the time.
                Some(known)
                    if known.at.elapsed() < MAP_AGE.max(known.cost * 50) && known.of == shape =>
                {
                    Arc::clone(&known.map)
                }
                _ => {
                    let begin = Instant::now();
                    let map = Arc::new(section_map(self.device.as_ref(), &shape)?);
                    *known = Some(Known {
                        at: Instant::now(),
                        cost: begin.elapsed(),
                        of: shape,
                        map: Arc::clone(&map),
                    });
                    map
                }
            }
        };
        let bits = map.part(first / 8 * 8..first.saturating_add(u64::from(count)));
        let answer = Answer {
            status: Status::Ok,
            len: u32::try_from(bits.len()).unwrap_or(0),
            mask: map.sections(),
        };
        Ok((answer, bits.to_vec()))
    }
}

/// One of the few answers that are made at a time.
struct Turn<'a>(&'a Shared);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let answering = self.0.answering.lock();
        *answering.unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.answered.notify_one();
    }
}

/// How many entries from the first on are blocks in a row, and clean.
fn run_length(entries: &[Entry], clean: &[bool]) -> usize {
    let Some(first) = entries.first().map(|entry| entry.block) else {
        return 0;
    };
    let in_a_row = (first..).zip(entries.iter().zip(clean));
    in_a_row
        .take_while(|(block, (entry, clean))| **clean && entry.block == *block)
        .count()
}

/// The entries that bytes are.
fn entries(bytes: &[u8]) -> Vec<Entry> {
    let chunks = bytes.chunks_exact(ENTRY_LEN);
    chunks
        .filter_map(|c| Some(Entry::decode(c.try_into().ok()?)))
        .collect()
}

/// As `read_exact`, until a point in time.
fn read_until(stream: &mut TcpStream, mut buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => buffer = buffer.get_mut(got..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
