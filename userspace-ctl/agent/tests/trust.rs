// SPDX-License-Identifier: GPL-2.0

//! What a channel says counts only if a trusted key signed it; whatever else is there is like no store at all.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pristine_agent::config::{Config, ImageSpec, Offline, Settings, StoreList, StoreSpec};
use pristine_agent::failure::{Failure, Kind};
use pristine_agent::flow::{without_store, Need, Without};
use pristine_agent::master::Master;
use pristine_agent::store_master::{ask, Access, StoreMaster};
use pristine_agent::trust::policy_with;
use pristine_metadata::Run;
use pristine_store::{
    publish, CancelToken, ImageReader, ImageSelector, News, PublishOptions, RetryPolicy, Signer,
    TrustPolicy,
};
use pristine_testkit::{sample_image, FaultyServer, TestStore};
use pristine_trust::{now, Keys, SecretKey};

struct Lab {
    store: TestStore,
    server: FaultyServer,
    /// The images a, b and c.
    images: [[u8; 32]; 3],
    key: Arc<SecretKey>,
}

impl Lab {
    fn new() -> Self {
        let store = TestStore::new().unwrap();
        let add = |seed, name: &str| *store.add(&sample_image(seed, 4), name).unwrap().as_bytes();
        let images = [add(1, "a"), add(20, "b"), add(40, "c")];
        let server = FaultyServer::start(&store.root()).unwrap();
        let key = Arc::new(SecretKey::generate(None).unwrap().0);
        Lab {
            store,
            server,
            images,
            key,
        }
    }

    /// Makes an image the next generation of the channel `stable`.
    fn publish(&self, from: &str, options: PublishOptions) {
        let store = self.store.open().unwrap();
        let selector: ImageSelector = from.parse().unwrap();
        let (retry, cancel) = (RetryPolicy::once(), CancelToken::new());
        let image = ImageReader::open(Arc::clone(&store), &selector, retry, &cancel).unwrap();
        let channel = "stable".parse().unwrap();
        publish(&image, &store, &channel, &options, &|_, _| ()).unwrap();
    }

    fn signed(&self) -> PublishOptions {
        PublishOptions {
            signers: vec![Arc::clone(&self.key) as Arc<dyn Signer>],
            ..PublishOptions::default()
        }
    }

    fn trust(&self) -> TrustPolicy {
        let mut keys = Keys::default();
        keys.add(self.key.public().clone());
        TrustPolicy::with_keys(keys)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.store.root().join(path)
    }

    fn spec(&self) -> StoreList {
        StoreSpec::Http(self.server.url()).into()
    }

    /// Both ways on which a channel's word reaches the machine.
    fn both(
        &self,
        trust: &TrustPolicy,
        allow_older: bool,
        disk: (u64, usize),
    ) -> Result<News, Failure> {
        let image = ImageSpec::Channel("stable".into());
        let disk = (disk.0, &self.images[disk.1]);
        let asked = ask(
            &self.spec(),
            &Access::default(),
            &image,
            trust,
            disk,
            allow_older,
            false,
        )
        .map(|a| a.0);
        let opened = StoreMaster::open(&self.spec(), &Access::default(), &image, trust, 2, 2);
        let opened = opened.and_then(|master| {
            if allow_older {
                master.may_go_back(trust, disk)?;
            }
            Ok(master.generation())
        });
        match (&asked, &opened) {
            (Ok(_), Ok(_)) => {}
            (Err(a), Err(b)) => assert_eq!((a.kind, &a.what), (b.kind, &b.what)),
            (a, b) => panic!("{a:?}, but {b:?}"),
        }
        asked
    }

    /// It is refused for `why`, as if the store did not serve.
    fn refused(&self, trust: &TrustPolicy, allow_older: bool, disk: (u64, usize), why: &str) {
        let failure = self.both(trust, allow_older, disk).unwrap_err();
        assert!(failure.what.contains(why), "{failure}");
        assert_eq!(failure.kind, Kind::Store);
        assert!(failure.advice.contains("signed by a key"));
        for (need, policy, what) in [
            (Need::Update, Offline::Wait, Without::Boot),
            (Need::Serve, Offline::Wait, Without::Boot),
            (Need::Revert, Offline::BootAsIs, Without::Boot),
            (Need::Revert, Offline::Wait, Without::Wait),
            (Need::Fill, Offline::BootAsIs, Without::Fail),
            (Need::Update, Offline::Refuse, Without::Fail),
        ] {
            assert_eq!(without_store(need, policy, failure.kind), what);
        }
    }
}

#[test]
fn a_wrongly_signed_pointer_is_refused() {
    let lab = Lab::new();
    let trust = lab.trust();
    lab.publish("a", PublishOptions::default());
    lab.refused(&trust, false, (1, 0), "it is not signed");
    lab.publish("b", lab.signed());
    assert_eq!(lab.both(&trust, false, (1, 0)), Ok(News::Moved));
    assert_eq!(lab.both(&trust, false, (2, 1)), Ok(News::Current));
    // Another image in the place of the signed one.
    let good = fs::read_to_string(lab.path("channels/stable")).unwrap();
    let hex = |n: usize| pristine_store::ImageId::from_bytes(lab.images[n]).to_string();
    let (body, _) = good.split_once("check ").unwrap();
    let body = body.replacen(&hex(1), &hex(2), 1);
    let mut check = pristine_store::Digest::of(body.as_bytes()).to_string();
    check.truncate(16);
    fs::write(
        lab.path("channels/stable"),
        format!("{body}check {check}\n"),
    )
    .unwrap();
    lab.refused(&trust, false, (1, 0), "signature by key");
    // Without keys nobody would notice.
    let anyone = TrustPolicy::default();
    assert_eq!(lab.both(&anyone, false, (1, 0)), Ok(News::Moved));
    fs::write(lab.path("channels/stable"), good).unwrap();
    let stranger = SecretKey::generate(None).unwrap().0;
    let mut keys = Keys::default();
    keys.add(stranger.public().clone());
    lab.refused(
        &TrustPolicy::with_keys(keys),
        false,
        (1, 0),
        "trusted keys: ",
    );
    // An image that is named by its id needs nobody's signature.
    let id = ImageSpec::Id(lab.images[2]);
    let master = StoreMaster::open(&lab.spec(), &Access::default(), &id, &trust, 2, 1).unwrap();
    assert_eq!(master.id(), lab.images[2]);
}

#[test]
fn a_release_that_expired_is_refused() {
    let lab = Lab::new();
    let expiring = PublishOptions {
        time: Some(now() - 1000),
        expires: Some(now() - 10),
        ..lab.signed()
    };
    lab.publish("a", expiring);
    lab.refused(&lab.trust(), false, (1, 0), "it expired at");
    // A clock that is behind cannot tell.
    let early = TrustPolicy {
        clock: Some(0),
        ..lab.trust()
    };
    assert_eq!(lab.both(&early, false, (1, 0)), Ok(News::Current));
}

#[test]
fn an_old_pointer_that_is_shown_again_is_not_followed() {
    let lab = Lab::new();
    let trust = lab.trust();
    lab.publish("a", lab.signed());
    lab.publish("b", lab.signed());
    let floor = PublishOptions {
        oldest: Some(2),
        ..lab.signed()
    };
    lab.publish("c", floor);
    let replay = |generation: u32| {
        let entry = lab.path(&format!("releases/stable/{generation}"));
        fs::copy(entry, lab.path("channels/stable")).unwrap();
    };
    replay(1);
    assert_eq!(lab.both(&trust, false, (3, 2)), Ok(News::Older(1)));
    // Where older generations are allowed, the release that the disk has says how old.
    lab.refused(&trust, true, (3, 2), "the oldest allowed one is 2");
    assert_eq!(lab.both(&trust, true, (2, 1)), Ok(News::Moved));
    // A new disk knows of none; the settings may.
    let settings = TrustPolicy {
        oldest: 3,
        ..trust.clone()
    };
    lab.refused(&settings, false, (0, 1), "the oldest allowed one is 3");
    replay(2);
    assert_eq!(lab.both(&trust, true, (3, 2)), Ok(News::Moved));
    // The disk followed another channel: there is no such release here.
    assert_eq!(lab.both(&trust, true, (9, 0)), Ok(News::Moved));
}

#[test]
fn keys_come_from_the_settings_and_the_initramfs() {
    let dir = tempfile::tempdir().unwrap();
    let least = "pristine.data=/dev/vda pristine.store=http://x pristine.image=stable";
    let config = |more: &str| -> Config {
        let mut settings = Settings::default();
        settings.add_command_line(&format!("{least} {more}"));
        settings.config().unwrap()
    };
    let key = |_| SecretKey::generate(None).unwrap().0;
    let [a, b] = [0, 1].map(key);
    let count = |config: &Config| {
        let policy = policy_with(config, dir.path());
        policy.map(|policy| policy.keys.iter().count())
    };
    assert_eq!(count(&config("")), Ok(0));
    let none = count(&config("pristine.signed=yes")).unwrap_err();
    assert_eq!(none.kind, Kind::Config);
    let inline = format!("pristine.signed=yes pristine.key={}", a.public().base64());
    assert_eq!(count(&config(&inline)), Ok(1));
    fs::write(dir.path().join("b.pub"), b.public().to_file()).unwrap();
    assert_eq!(count(&config(&inline)), Ok(2));
    let policy = policy_with(&config("pristine.oldest=7"), dir.path()).unwrap();
    assert_eq!((policy.oldest, policy.clock), (7, None));
    // This program is no older than the first release of anything.
    assert!(policy.not_before > 1_600_000_000 && policy.not_before <= now());
    fs::write(dir.path().join("c.pub"), "no key").unwrap();
    let failure = count(&config("")).unwrap_err();
    assert!(
        failure.kind == Kind::Config && failure.what.contains("c.pub"),
        "{failure}"
    );
}

#[test]
fn of_several_stores_one_that_is_right_is_enough() {
    let lab = Lab::new();
    lab.publish("b", lab.signed());
    let trust = lab.trust();
    // One that is down, and one where nobody signed.
    let dead = FaultyServer::start(&lab.store.root()).unwrap().url();
    let liar = Lab::new();
    liar.publish("c", PublishOptions::default());
    let stores = [dead, liar.server.url(), lab.server.url()];
    let list = StoreList {
        stores: stores.map(StoreSpec::Http).to_vec(),
        timeout: Some(Duration::from_secs(1)),
    };
    let image = ImageSpec::Channel("stable".into());
    let disk = (0, &lab.images[0]);
    let (news, traffic) = ask(
        &list,
        &Access::default(),
        &image,
        &trust,
        disk,
        false,
        false,
    )
    .unwrap();
    assert_eq!(news, News::Moved);
    assert!(traffic.requests > 0);
    let mut master = StoreMaster::open(&list, &Access::default(), &image, &trust, 2, 3).unwrap();
    assert_eq!(master.id(), lab.images[1]);
    // Blocks, too: the second one has this image, but lies about what is in it.
    liar.server
        .set_rules("packs/:wrong images/:wrong".parse().unwrap());
    let content = sample_image(20, 4);
    let mut bytes = 0;
    let run = Run { start: 0, end: 64 };
    let mut sink = |block: u64, data: &[u8]| {
        let at = block as usize * 4096;
        assert!(content[at..at + data.len()] == *data, "block {block}");
        bytes += data.len();
        Ok(())
    };
    master.fetch(&[run], &mut sink).unwrap();
    assert_eq!(bytes, 64 * 4096);
    // When all are wrong, it is as with one.
    let list = StoreList {
        stores: list.stores[..2].to_vec(),
        ..list
    };
    let refused = ask(
        &list,
        &Access::default(),
        &image,
        &trust,
        disk,
        false,
        false,
    )
    .unwrap_err();
    assert_eq!(refused.kind, Kind::Store);
}
