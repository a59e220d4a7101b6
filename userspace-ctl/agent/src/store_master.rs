// SPDX-License-Identifier: GPL-2.0

//! The master image in a store.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::{
    channel as channel_of_ends, sync_channel, RecvTimeoutError, Sender, SyncSender,
};
use std::sync::Arc;
use std::time::Duration;

use pristine_metadata::Run;
use pristine_store::peers::Neighbours;
use pristine_store::update::{Before, Local, Update, UpdateOptions};
use pristine_store::{
    may_go_back, modified, news, open_store_with, BlockSink, CancelToken, ChannelName, Error,
    ErrorKind, FetchOptions, Found, HttpOptions, ImageId, ImageReader, ImageSelector, Keyring,
    Mirrors, News, ObjectName, RetryPolicy, SealedStore, SignedRelease, Store, Token, TrustPolicy,
};

use crate::config::{ImageSpec, StoreList};
use crate::console::warn;
use crate::failure::{Failure, Kind};
use crate::master::{BlockDigest, Master, Sink, Traffic};
use crate::trust::warn_of_clock;

/// An image in a store. Its manifest is read and verified when something is asked of it: an update by a delta does
/// without.
pub struct StoreMaster {
    found: Found,
    /// As the release says, or the manifest.
    size: u64,
    reader: Option<ImageReader>,
    update: Option<Update>,
    store: Arc<dyn Store>,
    retry: RetryPolicy,
    parallel: usize,
    /// Whether blocks are taken from neighbours, too.
    peers: bool,
    /// These, once something was fetched, and what ends the thread that looks after them.
    near: Option<(Arc<Neighbours>, Sender<()>)>,
}

/// What opens a store to this machine.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// For its server.
    pub token: Option<Token>,
    /// The file with the identity that opens encrypted images; `None` for the one that is there by default, if any.
    pub identity: Option<PathBuf>,
}

/// What a store's failure means for the machine.
pub fn failure(error: Error) -> Failure {
    let advice = match error.kind() {
        ErrorKind::Network => {
            "is the server up, and pristine.store right? is the network configured (pristine.ip)?"
        }
        ErrorKind::NotFound => {
            "is pristine.image right? `pristine image list STORE` shows what there is"
        }
        ErrorKind::Damaged => {
            "the store is damaged, or something on the way changes what it serves; \
             `pristine image verify` checks it"
        }
        ErrorKind::Untrusted => {
            "publish it signed by a key that this machine knows, and not expired (pristine image publish --key); \
             pristine.image=ID takes an image without a signature"
        }
        ErrorKind::NoKey => {
            "put an identity that opens it into the initramfs (/etc/pristine/identity, pristine.identity), or let this \
             machine's open it, too: `pristine image rewrap STORE --encrypt-to age1...`"
        }
        ErrorKind::Unsupported => "use a newer pristine-agent",
        ErrorKind::Usage => {
            return Failure::new(Kind::Config, error)
                .advise("check pristine.store and pristine.identity")
        }
        _ => "look at the server's log",
    };
    Failure::new(Kind::Store, error).advise(advice)
}

/// Whether `image` is the image `id` of generation `generation` that a disk holds, which costs one small request. With an
/// image asked for by its id there is nothing to ask, but with `must_serve` it is made sure that the store has it.
/// Also says what it cost.
///
/// # Errors
///
/// The store does not serve, or has no such channel or image.
pub fn ask(
    store: &StoreList,
    access: &Access,
    image: &ImageSpec,
    trust: &TrustPolicy,
    disk: (u64, &[u8; 32]),
    allow_older: bool,
    must_serve: bool,
) -> Result<(News, Traffic), Failure> {
    let retry = RetryPolicy {
        attempts: 2,
        ..RetryPolicy::default()
    };
    let worth = |e: &Error| e.is_transient() || e.is_corruption();
    let cancel = CancelToken::new();
    let name = match image {
        ImageSpec::Id(id) if id != disk.1 => return Ok((News::Moved, Traffic::default())),
        ImageSpec::Id(_) if !must_serve => return Ok((News::Current, Traffic::default())),
        ImageSpec::Id(id) => {
            let store = open_spec(store, access)?;
            let id = ImageId::from_bytes(*id);
            let object = ObjectName::Manifest(id);
            let size = retry.run(&cancel, worth, || store.size(&object));
            return match size.map_err(failure)? {
                Some(_) => Ok((News::Current, traffic_of(store.as_ref()))),
                None => Err(failure(Error::NotFound {
                    location: store.location().to_owned(),
                    object: object.to_string(),
                })),
            };
        }
        ImageSpec::Channel(name) => name,
    };
    let channel = channel(name)?;
    let store = open_spec(store, access)?;
    let read = || store.read_pointer(&channel);
    loop {
        let Some((signed, _)) = retry.run(&cancel, worth, read).map_err(failure)? else {
            return Err(failure(Error::NotFound {
                location: store.location().to_owned(),
                object: format!("channel {name}"),
            }));
        };
        let release = signed.release();
        let trusted = match signed.check(trust, store.location()) {
            Ok(trusted) => trusted,
            Err(error) if store.was_wrong(&error) => continue,
            Err(error) => return Err(failure(error)),
        };
        if trusted.clock_is_behind {
            warn_of_clock(release);
        }
        if allow_older {
            let allowed = may_go_back(store.as_ref(), &channel, trust, disk, release);
            allowed.map_err(failure)?;
        }
        let here = (release.generation, release.image.as_bytes());
        let news = news(here, disk, allow_older);
        return Ok((news, traffic_of(store.as_ref())));
    }
}

/// Without an answer for so long, another store is asked.
const SEVERAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the stores; with several, one that cannot be opened is left out as long as another one can.
fn open_spec(list: &StoreList, access: &Access) -> Result<Arc<dyn Store>, Failure> {
    let several = list.stores.len() > 1;
    let mut options = HttpOptions {
        token: access.token.clone(),
        ..HttpOptions::default()
    };
    if let Some(timeout) = list.timeout.or(several.then_some(SEVERAL_TIMEOUT)) {
        options.connect_timeout = options.connect_timeout.min(timeout);
        options.read_timeout = timeout;
    }
    let mut stores = Vec::new();
    let mut wrong = None;
    for store in &list.stores {
        match open_store_with(&store.to_string(), options.clone()) {
            Ok(store) => stores.push(store),
            Err(error) => {
                if several {
                    warn(format_args!("{error}; trying the next store"));
                }
                wrong.get_or_insert(error);
            }
        }
    }
    let store: Arc<dyn Store> = match (stores.len(), stores.pop(), wrong) {
        (1, Some(only), _) => only,
        (_, Some(last), _) => {
            stores.push(last);
            let told = |_: &str, error: &Error| warn(format_args!("{error}; trying another store"));
            Arc::new(Mirrors::new(stores, Arc::new(told)))
        }
        (_, None, Some(error)) => return Err(failure(error)),
        (_, None, None) => return Err(Failure::new(Kind::Config, "no store is given")),
    };
    let given: Vec<PathBuf> = access.identity.iter().cloned().collect();
    Ok(match Keyring::configured(&given).map_err(failure)? {
        Some(keyring) => Arc::new(SealedStore::new(store, Arc::new(keyring))),
        None => store,
    })
}

fn traffic_of(store: &dyn Store) -> Traffic {
    let traffic = store.traffic();
    Traffic {
        requests: traffic.requests,
        bytes: traffic.bytes,
    }
}

fn channel(name: &str) -> Result<ChannelName, Failure> {
    name.parse()
        .map_err(|e| Failure::new(Kind::Config, format!("pristine.image={name}: {e}")))
}

/// Looks after neighbours in a thread, until the result is dropped. What that thread waits for then, nobody else does.
fn look_after(neighbours: Arc<Neighbours>, store: Arc<dyn Store>) -> Sender<()> {
    let (end, ended) = channel_of_ends();
    std::thread::spawn(move || {
        let stores = [store];
        loop {
            neighbours.look_after(&stores);
            let waited = ended.recv_timeout(Duration::from_millis(500));
            if waited != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    });
    end
}

impl StoreMaster {
    /// Lets blocks be taken from neighbours, too, whom the store's server knows.
    pub fn with_peers(mut self, on: bool) -> Self {
        self.peers = on;
        self
    }

    /// Opens the image. Each request is tried `attempts` times.
    ///
    /// # Errors
    ///
    /// The store does not serve it, or there is no such image.
    pub fn open(
        store: &StoreList,
        access: &Access,
        image: &ImageSpec,
        trust: &TrustPolicy,
        parallel: usize,
        attempts: u32,
    ) -> Result<Self, Failure> {
        let selector = match image {
            ImageSpec::Id(id) => ImageSelector::Id(ImageId::from_bytes(*id)),
            ImageSpec::Channel(name) => ImageSelector::Channel(channel(name)?),
        };
        let retry = RetryPolicy {
            attempts,
            ..RetryPolicy::default()
        };
        let store = open_spec(store, access)?;
        let cancel = CancelToken::new();
        let found =
            Found::look_up(store.as_ref(), &selector, trust, retry, &cancel).map_err(failure)?;
        if let Some(signed) = found
            .release
            .as_ref()
            .filter(|_| found.trusted.clock_is_behind)
        {
            warn_of_clock(signed.release());
        }
        let mut master = Self {
            size: found.release.as_ref().map_or(0, |r| r.release().size),
            found,
            reader: None,
            update: None,
            store,
            retry,
            parallel,
            peers: false,
            near: None,
        };
        // An image that is asked for by its id tells its size in its manifest.
        if master.size == 0 {
            master.size = master.reader()?.size();
        }
        Ok(master)
    }

    /// Whom to ask before the store, if that is wanted: the same ones for each batch, so that what is known of them stays known.
    fn neighbours(&mut self) -> Result<Option<Arc<Neighbours>>, Failure> {
        // Content of an encrypted image does not go over the network in clear.
        if !self.peers || self.reader()?.is_encrypted() {
            return Ok(None);
        }
        let near = self.near.get_or_insert_with(|| {
            let known = Arc::new(Neighbours::new(self.found.image, None));
            let end = look_after(Arc::clone(&known), Arc::clone(&self.store));
            (known, end)
        });
        Ok(Some(Arc::clone(&near.0)))
    }

    fn reader(&mut self) -> Result<&ImageReader, Failure> {
        if self.reader.is_none() {
            let (store, found) = (self.store.clone(), self.found.clone());
            let cancel = CancelToken::new();
            let reader = ImageReader::open_found(store, found, self.retry, &cancel);
            self.reader = Some(reader.map_err(failure)?);
        }
        let reader = self.reader.as_ref();
        reader.ok_or_else(|| Failure::new(Kind::Internal, "the image was not opened"))
    }
}

impl StoreMaster {
    /// Whether a disk of this generation and image may go back to what the channel names.
    ///
    /// # Errors
    ///
    /// It may not, or the store does not serve.
    pub fn may_go_back(&self, trust: &TrustPolicy, disk: (u64, &[u8; 32])) -> Result<(), Failure> {
        let Some(release) = self.found.release.as_ref().map(SignedRelease::release) else {
            return Ok(());
        };
        let channel = &release.channel;
        may_go_back(self.store.as_ref(), channel, trust, disk, release).map_err(failure)
    }
}

/// Sends blocks from the reader's threads to the one that writes. The channel is bounded, and so is memory.
struct Funnel(SyncSender<(u64, Vec<u8>)>);

impl BlockSink for Funnel {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        self.0
            .send((first, data.to_vec()))
            .map_err(|_| io::Error::other("the writer has stopped"))
    }

    fn zeros(&self, blocks: Range<u64>) -> io::Result<()> {
        // Zero blocks are never asked for.
        Err(io::Error::other(format!(
            "blocks {blocks:?} are zero against their digests"
        )))
    }
}

impl Master for StoreMaster {
    fn id(&self) -> [u8; 32] {
        *self.found.image.as_bytes()
    }

    fn generation(&self) -> u64 {
        let release = self.found.release.as_ref();
        release.map_or(0, |signed| signed.release().generation)
    }

    fn bytes(&self) -> u64 {
        self.size
    }

    fn digests(&mut self, run: Run) -> Result<Vec<BlockDigest>, Failure> {
        let reader = self.reader()?;
        (run.start..run.end)
            .map(|block| match reader.block(block) {
                Ok(Some(b)) => Ok(*b.digest.as_bytes()),
                Ok(None) => Err(Failure::new(
                    Kind::Internal,
                    format!("the image has no block {block}"),
                )),
                Err(e) => Err(failure(e)),
            })
            .collect()
    }

    fn fetch(&mut self, runs: &[Run], sink: &mut Sink<'_>) -> Result<(), Failure> {
        let neighbours = self.neighbours()?;
        let options = FetchOptions {
            parallel: self.parallel,
            retry: self.retry,
            neighbours,
            ..FetchOptions::default()
        };
        let (sender, receiver) = sync_channel(self.parallel);
        let reader = self.reader()?;
        std::thread::scope(|scope| {
            let fetching = scope.spawn(move || {
                let wanted = runs.iter().map(|r| r.start..r.end);
                // The sender goes with the funnel when the fetch ends, and that ends the loop below.
                reader.fetch(wanted, &options, &Funnel(sender))
            });
            let mut written = Ok(());
            for (first, data) in &receiver {
                written = sink(first, &data);
                if written.is_err() {
                    break;
                }
            }
            drop(receiver);
            let fetched = fetching
                .join()
                .map_err(|_| Failure::new(Kind::Internal, "a thread that fetched blocks died"))?;
            // What the writer says is the cause if it failed; the reader only saw it stop.
            written?;
            fetched.map(|_| ()).map_err(failure)
        })
    }

    fn differing_from(&mut self, other: &[u8; 32]) -> Result<Option<Vec<Run>>, Failure> {
        let (retry, cancel) = (self.retry, CancelToken::new());
        let old = ImageId::from_bytes(*other);
        let modified = modified(old, self.reader()?, retry, &cancel).map_err(failure)?;
        let as_run = |blocks: Range<u64>| Run {
            start: blocks.start,
            end: blocks.end,
        };
        Ok(modified.map(|runs| runs.into_iter().map(as_run).collect()))
    }

    fn plan_update(&mut self, other: &[u8; 32]) -> Result<Option<Vec<Run>>, Failure> {
        let before = Before::Image(ImageId::from_bytes(*other));
        let (reader, cancel) = (self.reader.take(), CancelToken::new());
        let update = Update::plan(
            &self.store,
            &before,
            self.found.image,
            reader,
            self.retry,
            &cancel,
        );
        let Some(update) = update.map_err(failure)? else {
            return Ok(None);
        };
        if update.size() != self.size {
            let what = format!(
                "{} says {} bytes, the image has {}",
                self.store.location(),
                self.size,
                update.size()
            );
            return Err(Failure::new(Kind::Store, what).advise("publish the image again"));
        }
        let changed = update.changed_pages();
        let runs = changed.into_iter().map(|r| Run {
            start: r.start,
            end: r.end,
        });
        let runs = runs.collect();
        self.update = Some(update);
        Ok(Some(runs))
    }

    fn update(&mut self, disk: &mut dyn Local) -> Result<(), Failure> {
        let Some(update) = self.update.take() else {
            return Ok(());
        };
        let options = UpdateOptions {
            parallel: self.parallel,
            retry: self.retry,
            ..UpdateOptions::default()
        };
        let updated = update.apply_local(disk, &options, &mut |_, _| ());
        self.reader = update.into_reader();
        updated.map(|_| ()).map_err(failure)
    }

    fn traffic(&self) -> Traffic {
        traffic_of(self.store.as_ref())
    }
}
