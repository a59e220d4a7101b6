// SPDX-License-Identifier: GPL-2.0

//! A kernel in memory, which checks what a helper may and must not do.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pristine_helper::channel::{
    Attached, Channel, Content, Left, Refused, Request, Result, MAX_FETCH,
};
use pristine_helper::helper::{Helper, Places, Settings};
use pristine_helper::pace::{Hydrate, Load};
use pristine_helper::source::{Backoff, Source};
use pristine_helper::stop::{End, Stop};
use pristine_helper::trace::Recorder;
use pristine_store::peers::Neighbours;
use pristine_store::sealed::{Identities, Keyring};
use pristine_store::{HttpOptions, ImageId, RetryPolicy};
use pristine_testkit::TEST_IDENTITY;

#[derive(Default)]
struct Inner {
    stale: Vec<bool>,
    dirty: Vec<bool>,
    disk: Vec<u8>,
    waiting: VecDeque<Request>,
    handed: HashMap<u64, Request>,
    ended: HashMap<u64, std::result::Result<(), u32>>,
    next_id: u64,
    epoch: u64,
    attached: bool,
    suspended: bool,
    gone: bool,
    /// Offered blocks in the order in which they were taken.
    order: Vec<Range<u64>>,
    /// Offered blocks, and how many of them were not stale.
    offered: u64,
    in_vain: u64,
    violations: Vec<String>,
}

/// A managed device.
pub struct Kernel {
    inner: Mutex<Inner>,
    changed: Condvar,
    content: Vec<u8>,
    shift: u32,
    image: ImageId,
}

/// A helper's channel to it.
pub struct FakeChannel {
    kernel: Arc<Kernel>,
    epoch: u64,
}

impl Kernel {
    /// A device with `content` as its master, all stale. Beyond the end of `content` come `more` zero bytes.
    pub fn new(image: ImageId, content: &[u8], more: usize, shift: u32) -> Arc<Self> {
        let mut content = content.to_vec();
        content.resize(content.len() + more, 0);
        let blocks = content.len() >> shift;
        assert_eq!(blocks << shift, content.len());
        Arc::new(Kernel {
            inner: Mutex::new(Inner {
                stale: vec![true; blocks],
                dirty: vec![false; blocks],
                disk: vec![0xee; content.len()],
                ..Inner::default()
            }),
            changed: Condvar::new(),
            content,
            shift,
            image,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    pub fn attach(self: &Arc<Self>) -> FakeChannel {
        let mut inner = self.lock();
        inner.epoch += 1;
        inner.attached = true;
        // As with TAKE_OVER: what was handed out waits for the new one.
        let handed: Vec<Request> = inner.handed.drain().map(|(_, r)| r).collect();
        inner.waiting.extend(handed);
        let epoch = inner.epoch;
        drop(inner);
        self.changed.notify_all();
        FakeChannel {
            kernel: Arc::clone(self),
            epoch,
        }
    }

    fn bytes(&self, blocks: Range<u64>) -> Range<usize> {
        (blocks.start as usize) << self.shift..(blocks.end as usize) << self.shift
    }

    /// Makes a request, as a read of stale blocks does.
    pub fn ask(&self, blocks: Range<u64>) -> u64 {
        let mut inner = self.lock();
        inner.next_id += 1;
        let id = inner.next_id;
        inner.waiting.push_back(Request {
            id,
            first: blocks.start,
            blocks: (blocks.end - blocks.start) as u32,
            flags: 0,
            generation: 7,
        });
        self.changed.notify_all();
        id
    }

    /// Waits for a request's end; an errno, or -1 if the time is over.
    pub fn wait(&self, id: u64, time: Duration) -> std::result::Result<(), i32> {
        let until = Instant::now() + time;
        let mut inner = self.lock();
        loop {
            if let Some(result) = inner.ended.get(&id) {
                return result.map_err(|e| e as i32);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(-1);
            }
            inner = self.changed.wait_timeout(inner, left).unwrap().0;
        }
    }

    /// Reads blocks, and checks them.
    pub fn read(&self, blocks: Range<u64>) {
        self.try_read(blocks.clone(), Duration::from_secs(60))
            .unwrap_or_else(|e| panic!("read of {blocks:?}: {e}"));
    }

    pub fn try_read(&self, blocks: Range<u64>, time: Duration) -> std::result::Result<(), i32> {
        let stale: Vec<u64> = {
            let inner = self.lock();
            blocks
                .clone()
                .filter(|b| inner.stale[*b as usize])
                .collect()
        };
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in stale {
            match runs.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        let ids: Vec<u64> = runs.into_iter().map(|run| self.ask(run)).collect();
        for id in ids {
            self.wait(id, time)?;
        }
        let inner = self.lock();
        let bytes = self.bytes(blocks);
        assert!(
            inner.disk[bytes.clone()] == self.content[bytes],
            "wrong content"
        );
        Ok(())
    }

    /// A write of a whole block: it is not stale any more, and has another content than the master.
    pub fn write(&self, block: u64) {
        let mut inner = self.lock();
        inner.stale[block as usize] = false;
        inner.dirty[block as usize] = true;
        let bytes = self.bytes(block..block + 1);
        inner.disk[bytes].fill(0x77);
    }

    /// Words of the map of blocks that are neither dirty nor stale.
    pub fn clean(&self, first_word: u64, words: u64) -> Vec<u64> {
        let inner = self.lock();
        let clean: Vec<bool> = inner
            .stale
            .iter()
            .zip(&inner.dirty)
            .map(|(s, d)| !s && !d)
            .collect();
        let all = clean.chunks(64).map(|chunk| {
            let bits = chunk.iter().enumerate();
            bits.fold(0u64, |word, (n, clean)| word | u64::from(*clean) << n)
        });
        all.skip(first_word as usize).take(words as usize).collect()
    }

    /// What is on the disk in image blocks.
    pub fn disk(&self, blocks: Range<u64>) -> Vec<u8> {
        let bytes = blocks.start as usize * 4096..blocks.end as usize * 4096;
        self.lock().disk[bytes].to_vec()
    }

    pub fn image(&self) -> ImageId {
        self.image
    }

    pub fn shift(&self) -> u32 {
        self.shift
    }

    pub fn suspend(&self, on: bool) {
        self.lock().suspended = on;
        self.changed.notify_all();
    }

    pub fn remove(&self) {
        self.lock().gone = true;
        self.changed.notify_all();
    }

    pub fn blocks(&self) -> u64 {
        self.lock().stale.len() as u64
    }

    pub fn stale_blocks(&self) -> u64 {
        self.lock().stale.iter().filter(|s| **s).count() as u64
    }

    /// Marks only these as stale; the others hold what they must.
    pub fn only_stale(&self, blocks: &[Range<u64>]) {
        let mut inner = self.lock();
        inner.disk.copy_from_slice(&self.content);
        inner.stale.fill(false);
        for block in blocks.iter().cloned().flatten() {
            inner.stale[block as usize] = true;
            let bytes = self.bytes(block..block + 1);
            inner.disk[bytes].fill(0xee);
        }
    }

    /// Requests that were made.
    pub fn requests(&self) -> u64 {
        self.lock().next_id
    }

    pub fn stale_in(&self, blocks: Range<u64>) -> usize {
        let inner = self.lock();
        blocks.filter(|b| inner.stale[*b as usize]).count()
    }

    /// What was offered and taken, in order.
    pub fn order(&self) -> Vec<Range<u64>> {
        self.lock().order.clone()
    }

    /// Offered blocks, and those of them that were not stale.
    pub fn offered(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.offered, inner.in_vain)
    }

    /// Checks that no helper did what it must not, and that whatever is not stale is right (except for `written`).
    pub fn check(&self, written: &[u64]) {
        let inner = self.lock();
        assert!(inner.violations.is_empty(), "{:?}", inner.violations);
        for (block, stale) in inner.stale.iter().enumerate() {
            let bytes = self.bytes(block as u64..block as u64 + 1);
            if *stale {
                continue;
            }
            if written.contains(&(block as u64)) {
                assert!(
                    inner.disk[bytes].iter().all(|b| *b == 0x77),
                    "block {block}"
                );
            } else {
                assert!(
                    inner.disk[bytes.clone()] == self.content[bytes],
                    "block {block}"
                );
            }
        }
    }

    /// Stores content in those blocks that are stale; how many that were.
    fn store(&self, inner: &mut Inner, blocks: Range<u64>, content: Content<'_>) -> u64 {
        let bytes = self.bytes(blocks.clone());
        let zeroes = vec![0; bytes.len()];
        let data = match content {
            Content::Data(data) => data,
            Content::Zeroes => &zeroes,
        };
        if data.len() != bytes.len() || data != &self.content[bytes] {
            inner.violations.push(format!("wrong bytes for {blocks:?}"));
            return 0;
        }
        let size = 1usize << self.shift;
        let mut taken = 0;
        for (block, content) in blocks.zip(data.chunks(size)) {
            if inner.stale[block as usize] {
                inner.stale[block as usize] = false;
                inner.disk[block as usize * size..][..size].copy_from_slice(content);
                taken += 1;
            }
        }
        taken
    }
}

impl FakeChannel {
    fn lock(&self) -> Result<MutexGuard<'_, Inner>> {
        let inner = self.kernel.lock();
        if inner.gone {
            return Err(Refused::Gone);
        }
        if inner.epoch != self.epoch {
            return Err(Refused::TakenOver);
        }
        Ok(inner)
    }

    fn running(&self) -> Result<MutexGuard<'_, Inner>> {
        let inner = self.lock()?;
        match inner.suspended {
            true => Err(Refused::Suspended),
            false => Ok(inner),
        }
    }

    fn end(&self, id: u64, content: std::result::Result<Content<'_>, u32>) -> Result {
        let mut inner = self.running()?;
        let Some(request) = inner.handed.remove(&id) else {
            if !inner.ended.contains_key(&id) {
                inner
                    .violations
                    .push(format!("request {id} was never made"));
            } else {
                inner
                    .violations
                    .push(format!("request {id} was answered twice"));
            }
            return Err(Refused::NoRequest);
        };
        let run = request.first..request.first + u64::from(request.blocks);
        let result = match content {
            Ok(content) => {
                self.kernel.store(&mut inner, run, content);
                Ok(())
            }
            Err(error) => Err(error),
        };
        inner.ended.insert(id, result);
        self.kernel.changed.notify_all();
        Ok(())
    }
}

impl Drop for FakeChannel {
    fn drop(&mut self) {
        let mut inner = self.kernel.lock();
        if inner.epoch == self.epoch {
            inner.attached = false;
            let handed: Vec<Request> = inner.handed.drain().map(|(_, r)| r).collect();
            inner.waiting.extend(handed);
        }
    }
}

impl Channel for FakeChannel {
    fn attached(&self) -> Attached {
        Attached {
            blocks: self.kernel.blocks(),
            block_shift: self.kernel.shift,
            image: *self.kernel.image.as_bytes(),
            generation: 7,
            meta_uuid: [1; 16],
        }
    }

    fn next(&self, most: u32, wait: Duration) -> Result<Vec<Request>> {
        let until = Instant::now() + wait;
        loop {
            let mut inner = self.lock()?;
            if !inner.suspended && !inner.waiting.is_empty() {
                let count = inner.waiting.len().min(most as usize);
                let requests: Vec<Request> = inner.waiting.drain(..count).collect();
                for request in &requests {
                    inner.handed.insert(request.id, *request);
                }
                return Ok(requests);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Vec::new());
            }
            drop(self.kernel.changed.wait_timeout(inner, left).unwrap());
        }
    }

    fn answer(&self, request: u64, content: Content<'_>) -> Result {
        self.end(request, Ok(content))
    }

    fn fail(&self, request: u64, error: u32) -> Result {
        self.end(request, Err(error))
    }

    fn hydrate(&self, first: u64, blocks: u64, content: Content<'_>) -> Result<u64> {
        let mut inner = self.running()?;
        let end = first + blocks;
        let large = matches!(content, Content::Data(d) if d.len() as u64 > MAX_FETCH);
        if blocks == 0 || end > inner.stale.len() as u64 || large {
            inner
                .violations
                .push(format!("a bad offer: {first}+{blocks}"));
            return Ok(0);
        }
        let taken = self.kernel.store(&mut inner, first..end, content);
        inner.offered += blocks;
        inner.in_vain += blocks - taken;
        inner.order.push(first..end);
        self.kernel.changed.notify_all();
        Ok(taken)
    }

    fn stale(&self, first_word: u64, words: u64) -> Result<Vec<u64>> {
        let inner = self.lock()?;
        let all = inner.stale.chunks(64).map(|chunk| {
            let bits = chunk.iter().enumerate();
            bits.fold(0u64, |word, (n, stale)| word | u64::from(*stale) << n)
        });
        Ok(all.skip(first_word as usize).take(words as usize).collect())
    }

    fn left(&self) -> Result<Left> {
        let inner = self.lock()?;
        Ok(Left {
            stale: inner.stale.iter().filter(|s| **s).count() as u64,
            open: (inner.waiting.len() + inner.handed.len()) as u64,
        })
    }
}

/// Quick settings.
pub fn settings(hydrate: Hydrate) -> Settings {
    let quick = RetryPolicy {
        attempts: u32::MAX,
        first_delay: Duration::from_millis(5),
        max_delay: Duration::from_millis(100),
    };
    Settings {
        hydrate,
        wait: Duration::from_millis(50),
        tick: Duration::from_millis(50),
        grace: Duration::from_millis(500),
        backoff: Backoff {
            network: quick,
            corrupt: quick,
        },
        ..Settings::default()
    }
}

pub fn places() -> Places {
    Places {
        device: "test".to_owned(),
        state: None,
        trace: None,
        load: Load::none(),
        given: None,
    }
}

/// The identity that a machine has; images that are not encrypted are read with it as well.
fn keyring() -> Arc<Keyring> {
    let identities: Identities = TEST_IDENTITY.parse().unwrap();
    Arc::new(Keyring::new(identities.0))
}

/// A helper in a thread.
pub struct Running {
    pub stop: Arc<Stop>,
    pub recorder: Arc<Recorder>,
    thread: Option<std::thread::JoinHandle<End>>,
}

impl Running {
    pub fn start(kernel: &Arc<Kernel>, urls: &[String], settings: Settings) -> Self {
        Running::start_in(kernel, urls, settings, places())
    }

    /// One that hydrates a device, on which these blocks are read meanwhile, and ends by itself; all is as it must be then.
    pub fn complete(
        kernel: &Arc<Kernel>,
        urls: &[String],
        settings: Settings,
        reads: &[Range<u64>],
    ) {
        let helper = Running::start(kernel, urls, settings);
        for blocks in reads {
            kernel.read(blocks.clone());
        }
        assert_eq!(helper.join(), End::Complete);
        assert_eq!(kernel.stale_blocks(), 0);
        kernel.check(&[]);
    }

    pub fn start_in(
        kernel: &Arc<Kernel>,
        urls: &[String],
        settings: Settings,
        places: Places,
    ) -> Self {
        Running::start_with(kernel, urls, settings, places, HttpOptions::default())
    }

    pub fn start_with(
        kernel: &Arc<Kernel>,
        urls: &[String],
        settings: Settings,
        places: Places,
        http: HttpOptions,
    ) -> Self {
        Running::start_as(kernel, urls, settings, places, http, None)
    }

    pub fn start_among(
        kernel: &Arc<Kernel>,
        urls: &[String],
        settings: Settings,
        places: Places,
        neighbours: Option<Arc<Neighbours>>,
    ) -> Self {
        let http = HttpOptions::default();
        Running::start_as(kernel, urls, settings, places, http, neighbours)
    }

    fn start_as(
        kernel: &Arc<Kernel>,
        urls: &[String],
        settings: Settings,
        places: Places,
        http: HttpOptions,
        neighbours: Option<Arc<Neighbours>>,
    ) -> Self {
        let stop = Arc::new(Stop::default());
        let recorder = Arc::new(Recorder::new(Duration::from_secs(600)));
        let options = HttpOptions {
            connect_timeout: Duration::from_secs(2),
            read_timeout: Duration::from_millis(400),
            cancel: stop.token().clone(),
            ..http
        };
        let sources: Vec<Source> = urls
            .iter()
            .map(|url| Source::new(url, options.clone(), Some(keyring())).unwrap())
            .collect();
        let channel = kernel.attach();
        let (for_thread, recording) = (Arc::clone(&stop), Arc::clone(&recorder));
        let thread = std::thread::spawn(move || {
            let helper =
                Helper::new(&channel, sources, settings, places, for_thread, recording).unwrap();
            match neighbours {
                Some(neighbours) => helper.with_neighbours(neighbours).run(),
                None => helper.run(),
            }
        });
        Running {
            stop,
            recorder,
            thread: Some(thread),
        }
    }

    /// Waits for its end.
    pub fn join(mut self) -> End {
        self.thread.take().unwrap().join().unwrap()
    }

    /// Ends it as SIGTERM does.
    pub fn terminate(self) -> End {
        self.stop.end(End::Asked);
        self.join()
    }

    /// Ends it as abruptly as a thread can be.
    pub fn kill(self) {
        self.stop.cancel();
        self.stop.end(End::Asked);
        self.join();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        self.stop.end(End::Asked);
    }
}
