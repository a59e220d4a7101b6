// SPDX-License-Identifier: GPL-2.0

//! A disk that records what it is asked: a server for the kernel's nbd driver.
//!
//! Two of them, if data and metadata are on devices of their own; they share the recording. Because it is the disk, it knows the order for certain, whatever is under way at the same time: a write may arrive from
//! the moment that it is asked for, and has arrived for good when it was answered (with FUA) or when a flush was that was
//! asked for after the answer. Answers are held back at random and given out of order, so that there always is
//! something under way.
//!
//! The workload's marks come as datagrams to a socket. A mark is recorded when it is read, so never too early.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::events::{Change, Event};
use crate::Random;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const FUA: u16 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
/// The mark that ends the recording.
const END: &str = "end";

struct Request {
    flags: u16,
    kind: u16,
    cookie: [u8; 8],
    offset: u64,
    len: u32,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..at + N)
        .and_then(|b| b.try_into().ok())
        .unwrap_or([0; N])
}

fn request(from: &mut impl Read) -> io::Result<Request> {
    let mut header = [0; 28];
    from.read_exact(&mut header)?;
    if u32::from_be_bytes(field(&header, 0)) != REQUEST_MAGIC {
        return Err(io::Error::other("this is no nbd request"));
    }
    Ok(Request {
        flags: u16::from_be_bytes(field(&header, 4)),
        kind: u16::from_be_bytes(field(&header, 6)),
        cookie: field(&header, 8),
        offset: u64::from_be_bytes(field(&header, 16)),
        len: u32::from_be_bytes(field(&header, 24)),
    })
}

/// An answer, and when it is due.
struct Answer {
    due: Instant,
    /// The request, if it is one that is recorded.
    id: Option<u64>,
    bytes: Vec<u8>,
}

impl PartialEq for Answer {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}
impl Eq for Answer {}
impl PartialOrd for Answer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Answer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}

/// The recording, shared by the threads.
struct Log(Mutex<BufWriter<File>>);

impl Log {
    fn add(&self, event: &Event) -> io::Result<()> {
        event.write_to(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Gives the answers when they are due.
fn answer(log: &Log, mut to: UnixStream, from: &Receiver<Answer>) -> io::Result<()> {
    let mut waiting = BinaryHeap::new();
    let mut open = true;
    while open || !waiting.is_empty() {
        let next = match waiting.peek() {
            Some(Reverse(Answer { due, .. })) => due.saturating_duration_since(Instant::now()),
            None => Duration::from_secs(3600),
        };
        match from.recv_timeout(next) {
            Ok(new) => waiting.push(Reverse(new)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                open = false;
                thread::sleep(next.min(Duration::from_millis(100)));
            }
        }
        while waiting
            .peek()
            .is_some_and(|Reverse(a)| a.due <= Instant::now())
        {
            let Some(Reverse(due)) = waiting.pop() else {
                break;
            };
            // It is done before anyone hears of it.
            if let Some(id) = due.id {
                log.add(&Event::Done(id))?;
            }
            to.write_all(&due.bytes)?;
        }
    }
    Ok(())
}

fn take_marks(log: &Log, socket: &UnixDatagram) -> io::Result<()> {
    let mut buffer = [0; 256];
    loop {
        let len = socket.recv(&mut buffer)?;
        let text = String::from_utf8_lossy(buffer.get(..len).unwrap_or(&[])).into_owned();
        if text == END {
            return Ok(());
        }
        log.add(&Event::Mark(text))?;
    }
}

/// One disk: where it begins in the recording, what it holds, and who asks.
struct Served<'a> {
    start: u64,
    bytes: &'a mut [u8],
    stream: UnixStream,
}

/// Serves a disk with the content of `before` on standard input until the kernel disconnects; records to `log`. Marks
/// come to the socket `marks`. No answer is held back longer than `hold`. From byte `split` on it is a disk of its own,
/// on standard output.
pub fn serve(
    mut before: Vec<u8>,
    split: Option<usize>,
    log: &Path,
    marks: &Path,
    seed: u64,
    hold: Duration,
) -> Result<(), String> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |e: io::Error| format!("{what}: {e}")
    };
    let at = split.unwrap_or(before.len());
    let (first, second) =
        (before.split_at_mut_checked(at)).ok_or_else(|| format!("the disk has no byte {at}"))?;
    let mut disks = vec![Served {
        start: 0,
        bytes: first,
        stream: (io::stdin().as_fd().try_clone_to_owned())
            .map_err(io("standard input"))?
            .into(),
    }];
    if split.is_some() {
        disks.push(Served {
            start: at as u64,
            bytes: second,
            stream: (io::stdout().as_fd().try_clone_to_owned())
                .map_err(io("standard output"))?
                .into(),
        });
    }
    let file = File::create(log).map_err(io("cannot make the log"))?;
    let log = Log(Mutex::new(BufWriter::with_capacity(1 << 20, file)));
    let socket = UnixDatagram::bind(marks).map_err(io("cannot make the socket for marks"))?;
    let ids = AtomicU64::new(0);
    let served = thread::scope(|scope| {
        let (log, socket, ids) = (&log, &socket, &ids);
        let marker = scope.spawn(move || take_marks(log, socket));
        let mut servers = Vec::new();
        for (disk, seed) in disks.into_iter().zip(seed..) {
            let answers = disk.stream.try_clone()?;
            servers.push(scope.spawn(move || {
                let (sender, receiver) = channel();
                let answerer = scope.spawn(move || answer(log, answers, &receiver));
                let served = take_requests(disk, log, ids, seed, hold, |a| sender.send(a).is_ok());
                drop(sender);
                match answerer.join() {
                    Ok(_) => served,
                    Err(_) => Err(died()),
                }
            }));
        }
        let mut served = Ok(());
        for server in servers {
            served = served.and(server.join().unwrap_or_else(|_| Err(died())));
        }
        UnixDatagram::unbound().and_then(|s| s.send_to(END.as_bytes(), marks))?;
        served.and(marker.join().unwrap_or_else(|_| Err(died())))
    });
    served.map_err(io("serving the disk"))?;
    let mut log = log.0.into_inner().unwrap_or_else(PoisonError::into_inner);
    log.flush().map_err(io("cannot write the log"))
}

fn died() -> io::Error {
    io::Error::other("a thread died")
}

fn take_requests(
    disk: Served<'_>,
    log: &Log,
    ids: &AtomicU64,
    seed: u64,
    hold: Duration,
    send: impl Fn(Answer) -> bool,
) -> io::Result<()> {
    let mut random = Random::new(seed);
    let (start, disk, mut from) = (disk.start, disk.bytes, disk.stream);
    loop {
        let request = match request(&mut from) {
            Ok(request) if request.kind == DISCONNECT => return Ok(()),
            Ok(request) => request,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        let id = ids.fetch_add(1, Ordering::Relaxed) + 1;
        let len = request.len as usize;
        let size = disk.len() as u64;
        let mut error = 0;
        let mut data = Vec::new();
        if request.kind == WRITE {
            data = vec![0; len];
            from.read_exact(&mut data)?;
        }
        let place = usize::try_from(request.offset)
            .ok()
            .and_then(|at| disk.get_mut(at..at.checked_add(len)?));
        let recorded = match (request.kind, place) {
            (FLUSH, _) => Some(Event::Flush {
                id,
                offset: start,
                len: size,
            }),
            (READ, Some(place)) => {
                data = place.to_vec();
                None
            }
            (WRITE | TRIM | WRITE_ZEROES, Some(place)) => {
                let change = if request.kind == WRITE {
                    place.copy_from_slice(&data);
                    Change::Write(std::mem::take(&mut data))
                } else {
                    place.fill(0);
                    Change::Clear(len as u64)
                };
                Some(Event::Write {
                    id,
                    offset: start + request.offset,
                    change,
                    fua: request.flags & FUA != 0,
                })
            }
            (_, Some(_)) => {
                error = EINVAL;
                None
            }
            (_, None) => {
                error = EIO;
                None
            }
        };
        if let Some(event) = &recorded {
            log.add(event)?;
        }
        let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(u32::to_be_bytes(error));
        bytes.extend(request.cookie);
        bytes.extend(data);
        let wait = match random.below(4) {
            0 => u64::try_from(hold.as_micros()).unwrap_or(0),
            1 => 200,
            _ => 0,
        };
        let due = Instant::now() + Duration::from_micros(random.below(wait + 1));
        let id = recorded.is_some().then_some(id);
        if !send(Answer { due, id, bytes }) {
            return Err(io::Error::other("nobody answers any more"));
        }
    }
}
