// SPDX-License-Identifier: GPL-2.0

//! One peer: how it is asked, and how it did.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pristine_image::{Digest, ImageId, BLOCK_SIZE};

use super::map::SectionMap;
use super::neighbours::Wanted;
use super::wire::{Answer, Ask, Entry, Request, Status, WireError, ANSWER_LEN, MAX_SECTIONS};

/// Connections kept open between requests.
const IDLE: usize = 2;
/// Requests to a peer at a time.
const AT_ONCE: usize = 4;
/// A map that is older says too little.
const MAP_COUNTS: Duration = Duration::from_secs(30);
/// A peer that was of no use is left alone for this time at first, twice as long with each failure.
const LEFT_ALONE: Duration = Duration::from_secs(5);
/// At most for this time.
const LONGEST: Duration = Duration::from_secs(300);
/// A peer that sent something else than it was asked for is left alone for this time.
const LIAR: Duration = Duration::from_secs(600);
/// Sections of the largest device that a peer can have: 16 TiB.
const MOST_SECTIONS: u64 = 1 << 22;

/// How long a peer is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// For a whole answer.
    pub answer: Duration,
    /// For all peers together that are asked for the same.
    pub all: Duration,
}

impl Patience {
    /// Somebody waits: a store in the same building would have answered by then.
    pub const DEMAND: Patience = Patience {
        connect: Duration::from_millis(150),
        answer: Duration::from_millis(400),
        all: Duration::from_millis(600),
    };
    /// Nobody does.
    pub const BACKGROUND: Patience = Patience {
        connect: Duration::from_millis(1000),
        answer: Duration::from_millis(3000),
        all: Duration::from_millis(6000),
    };
}

/// Why a peer gave nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("it is busy")]
    Busy,
    #[error("it has another image")]
    OtherImage,
    #[error("what it sent for block {0} is not that block")]
    Wrong(u64),
}

/// How a peer does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    /// Where it is.
    pub address: SocketAddr,
    /// Sections that it has, as far as is known.
    pub sections: u64,
    /// Blocks that came from it and were right.
    pub blocks: u64,
    /// How often it failed: it did not answer in time, closed the connection, spoke another language.
    pub failed: u64,
    /// Blocks that it sent and that were wrong.
    pub wrong: u64,
    /// Whether it is left alone now.
    pub left_alone: bool,
    /// What it failed with last.
    pub error: Option<String>,
}

#[derive(Debug, Default)]
struct Inner {
    idle: Vec<TcpStream>,
    in_flight: usize,
    map: SectionMap,
    map_at: Option<Instant>,
    /// Since it last served.
    failures: u32,
    failed: u64,
    wrong: u64,
    blocks: u64,
    not_before: Option<Instant>,
    error: Option<String>,
}

/// A peer.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    inner: Mutex<Inner>,
}

/// Blocks that came, each what it must be.
#[derive(Clone, Debug, Default)]
pub(super) struct Came {
    pub(super) entries: Vec<Entry>,
    pub(super) data: Vec<u8>,
}

impl Peer {
    pub(super) fn new(address: SocketAddr) -> Self {
        Peer {
            address,
            inner: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> PeerState {
        let inner = self.lock();
        PeerState {
            address: self.address,
            sections: inner.map.count(),
            blocks: inner.blocks,
            failed: inner.failed,
            wrong: inner.wrong,
            left_alone: inner.not_before.is_some_and(|at| at > Instant::now()),
            error: inner.error.clone(),
        }
    }

    /// Whether it failed when it was last asked.
    pub(super) fn fails(&self) -> bool {
        self.lock().failures > 0
    }

    /// How many requests it has to answer, if it has a section and may be asked for more.
    pub(super) fn load(&self, section: u64) -> Option<usize> {
        let inner = self.lock();
        let now = Instant::now();
        let usable = inner.not_before.is_none_or(|at| at <= now)
            && inner.in_flight < AT_ONCE
            && inner.map_at.is_some_and(|at| now - at < MAP_COUNTS)
            && inner.map.has(section);
        usable.then_some(inner.in_flight)
    }

    /// Asks for the map, if what is known of it is older than `age` and the peer is not left alone. Whether it was asked.
    pub(super) fn refresh(&self, image: ImageId, age: Duration) -> bool {
        {
            let inner = self.lock();
            let now = Instant::now();
            let known = inner.map_at.is_some_and(|at| now - at < age);
            if known || inner.not_before.is_some_and(|at| at > now) {
                return false;
            }
        }
        match self.read_map(image) {
            Ok(map) => {
                let mut inner = self.lock();
                inner.map = map;
                inner.map_at = Some(Instant::now());
                inner.failures = 0;
            }
            Err(error) => self.failed(&error),
        }
        true
    }

    fn read_map(&self, image: ImageId) -> Result<SectionMap, PeerError> {
        let mut map = SectionMap::default();
        let mut first = 0;
        loop {
            let ask = Ask::Map {
                first,
                count: MAX_SECTIONS,
            };
            let request = Request { image, ask };
            let (answer, bits) = self.exchange(&request, &[], &Patience::BACKGROUND)?;
            let sections = answer.mask;
            if sections > MOST_SECTIONS {
                return Err(WireError::Number("the size of a device", sections).into());
            }
            if map.sections() != sections {
                // The first answer, or the device has grown meanwhile.
                map = SectionMap::new(sections * super::SECTION);
            }
            map.put(first, &bits);
            first += u64::from(MAX_SECTIONS);
            if first >= sections {
                return Ok(map);
            }
        }
    }

    /// Fetches blocks; what comes is verified. Blocks that it has not are simply not among them.
    pub(super) fn fetch(
        &self,
        image: ImageId,
        wanted: &[Wanted],
        patience: &Patience,
    ) -> Result<Came, PeerError> {
        // CAST: callers ask for at most MAX_BLOCKS.
        let ask = Ask::Blocks(wanted.len() as u32);
        let request = Request { image, ask };
        let result = self.exchange(&request, wanted, patience);
        let (answer, data) = result.inspect_err(|error| self.failed(error))?;
        let there = |(at, _): &(usize, &Entry)| answer.mask >> at & 1 == 1;
        let entries: Vec<Entry> = wanted
            .iter()
            .enumerate()
            .filter(there)
            .map(|e| *e.1)
            .collect();
        for (entry, block) in entries.iter().zip(data.chunks_exact(BLOCK_SIZE)) {
            if Digest::of(block) != entry.digest {
                let error = PeerError::Wrong(entry.block);
                self.failed(&error);
                return Err(error);
            }
        }
        let mut inner = self.lock();
        inner.failures = 0;
        inner.not_before = None;
        inner.blocks += entries.len() as u64;
        Ok(Came { entries, data })
    }

    /// Notes a failure, and leaves it alone for a while.
    fn failed(&self, error: &PeerError) {
        let mut inner = self.lock();
        inner.idle.clear();
        inner.failures = inner.failures.saturating_add(1);
        let doubled = LEFT_ALONE.saturating_mul(1 << (inner.failures - 1).min(10));
        let time = match error {
            // It says so itself, and at once.
            PeerError::Busy => Duration::from_millis(200),
            PeerError::OtherImage | PeerError::Io(_) => doubled.min(LONGEST),
            PeerError::Wire(_) => LIAR,
            PeerError::Wrong(_) => {
                inner.wrong += 1;
                LIAR
            }
        };
        if !matches!(error, PeerError::Busy) {
            inner.failed += 1;
            inner.error = Some(error.to_string());
            inner.map_at = None;
        }
        inner.not_before = Some(Instant::now() + time);
    }

    /// What it said to have of a section was not so; until the next map it is not asked for that.
    pub(super) fn has_not(&self, section: u64) {
        self.lock().map.unset(section);
    }

    /// One request and its answer; status other than [`Status::Ok`] is an error.
    fn exchange(
        &self,
        request: &Request,
        entries: &[Entry],
        patience: &Patience,
    ) -> Result<(Answer, Vec<u8>), PeerError> {
        let mut bytes = request.encode().to_vec();
        for entry in entries {
            bytes.extend(entry.encode());
        }
        let kept = {
            let mut inner = self.lock();
            inner.in_flight += 1;
            inner.idle.pop()
        };
        let deadline = Instant::now() + patience.answer;
        let result = match kept {
            None => self.connect_and_talk(request, &bytes, patience, deadline),
            Some(stream) => match talk(stream, request, &bytes, deadline) {
                // A connection that was kept may have been closed meanwhile.
                Err(PeerError::Io(error)) if !is_timeout(&error) => {
                    self.connect_and_talk(request, &bytes, patience, deadline)
                }
                result => result,
            },
        };
        let mut inner = self.lock();
        inner.in_flight -= 1;
        let (stream, answer, data) = result?;
        if inner.idle.len() < IDLE {
            inner.idle.push(stream);
        }
        match answer.status {
            Status::Ok => Ok((answer, data)),
            Status::Busy => Err(PeerError::Busy),
            Status::OtherImage => Err(PeerError::OtherImage),
        }
    }

    fn connect_and_talk(
        &self,
        request: &Request,
        bytes: &[u8],
        patience: &Patience,
        deadline: Instant,
    ) -> Result<(TcpStream, Answer, Vec<u8>), PeerError> {
        let stream = TcpStream::connect_timeout(&self.address, patience.connect)?;
        stream.set_nodelay(true)?;
        talk(stream, request, bytes, deadline)
    }
}

fn talk(
    mut stream: TcpStream,
    request: &Request,
    bytes: &[u8],
    deadline: Instant,
) -> Result<(TcpStream, Answer, Vec<u8>), PeerError> {
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(bytes)?;
    let mut header = [0; ANSWER_LEN];
    read_until(&mut stream, &mut header, deadline)?;
    let answer = Answer::decode(&header, request.ask)?;
    // It is bounded by what was asked for.
    let mut data = vec![0; answer.len as usize];
    read_until(&mut stream, &mut data, deadline)?;
    Ok((stream, answer, data))
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long")),
        false => Ok(left),
    }
}

/// As `read_exact`, but a peer that trickles does not get more time by that.
fn read_until(stream: &mut TcpStream, mut buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => buffer = buffer.get_mut(got..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) if is_timeout(&error) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}
