// SPDX-License-Identifier: GPL-2.0

//! Signed releases: who publishes signs, who reads verifies, and what somebody in between can do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::process::Command;
use std::sync::Arc;

use common::{http, quick};
use pristine_store::{
    history, publish, CancelToken, ChannelName, Digest, Error, ErrorKind, ImageReader,
    ImageSelector, PublishOptions, Published, Result, SignedRelease, Signer, Store, TrustError,
    TrustPolicy,
};
use pristine_testkit::{sample_image, FaultyServer, TestStore};
use pristine_trust::{Keys, SecretKey};

const NOW: u64 = 1_795_253_000;

fn channel(name: &str) -> ChannelName {
    name.parse().unwrap()
}

fn key() -> Arc<SecretKey> {
    Arc::new(SecretKey::generate(None).unwrap().0)
}

fn trusting(keys: &[&Arc<SecretKey>]) -> TrustPolicy {
    let mut trusted = Keys::default();
    keys.iter()
        .for_each(|key| trusted.add(key.public().clone()));
    TrustPolicy {
        clock: Some(NOW),
        ..TrustPolicy::with_keys(trusted)
    }
}

fn options(keys: &[&Arc<SecretKey>]) -> PublishOptions {
    let signer = |key: &&Arc<SecretKey>| Arc::clone(key) as Arc<dyn Signer>;
    PublishOptions {
        time: Some(NOW - 1000),
        signers: keys.iter().map(signer).collect(),
        retry: quick(),
        ..PublishOptions::default()
    }
}

/// A store with two images, which canary and beta are at.
struct Lab {
    store: TestStore,
}

impl Lab {
    fn new() -> Self {
        let (store, _) = TestStore::with_image(&sample_image(1, 4)).unwrap();
        store.add(&sample_image(50, 4), "beta").unwrap();
        Lab { store }
    }

    fn open(&self) -> Arc<dyn Store> {
        self.store.open().unwrap()
    }

    /// Makes `channel` point to what `from` points to.
    fn publish(&self, from: &str, to: &str, options: &PublishOptions) -> Result<Published> {
        let reader = self.reader(from, &TrustPolicy::default())?;
        publish(&reader, &self.open(), &channel(to), options, &|_, _| ())
    }

    fn reader(&self, name: &str, policy: &TrustPolicy) -> Result<ImageReader> {
        reader(self.open(), name, policy)
    }

    fn error(&self, name: &str, policy: &TrustPolicy) -> TrustError {
        untrusted(self.reader(name, policy))
    }

    fn pointer(&self, name: &str) -> String {
        fs::read_to_string(self.store.root().join("channels").join(name)).unwrap()
    }

    /// Replaces the pointer's bytes before `check`, with a `check` that is right.
    fn forge(&self, name: &str, change: impl Fn(String) -> String) {
        let text = self.pointer(name);
        let (body, _) = text.rsplit_once("check ").unwrap();
        let body = change(body.to_owned());
        let mut check = Digest::of(body.as_bytes()).to_string();
        check.truncate(16);
        let path = self.store.root().join("channels").join(name);
        fs::write(path, format!("{body}check {check}\n")).unwrap();
    }
}

fn reader(store: Arc<dyn Store>, name: &str, policy: &TrustPolicy) -> Result<ImageReader> {
    let selector: ImageSelector = name.parse().unwrap();
    ImageReader::open_trusted(store, &selector, policy, quick(), &CancelToken::new())
}

fn untrusted(result: Result<ImageReader>) -> TrustError {
    match result {
        Err(error @ Error::Untrusted { .. }) => {
            assert_eq!(error.kind(), ErrorKind::Untrusted);
            assert!(!error.is_transient() && !error.is_corruption());
            let Error::Untrusted { error, .. } = error else {
                unreachable!()
            };
            error
        }
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("it was trusted"),
    }
}

#[test]
fn what_a_trusted_key_signed_is_read() {
    let lab = Lab::new();
    let (mine, other) = (key(), key());
    lab.publish("stable", "signed", &options(&[&mine])).unwrap();
    let server = FaultyServer::start(&lab.store.root()).unwrap();
    let policy = trusting(&[&other, &mine]);
    for store in [lab.open(), http(&server.url())] {
        let image = reader(store, "signed", &policy).unwrap();
        assert_eq!(image.trusted().signed_by, [mine.public().clone()]);
    }
    assert!(matches!(
        lab.error("signed", &trusting(&[&other])),
        TrustError::UnknownKey { signed_by, .. } if signed_by == [mine.key_id()]
    ));
    assert!(matches!(
        lab.error("stable", &policy),
        TrustError::Unsigned { .. }
    ));
    // Without keys, and by its id, it needs nobody to vouch for it.
    let image = lab.reader("stable", &TrustPolicy::default()).unwrap();
    lab.reader(&image.image().to_string(), &policy).unwrap();
    // In transit it can be damaged like anything else, and is asked for again.
    server.set_rules("channels/@1:wrong".parse().unwrap());
    reader(http(&server.url()), "signed", &policy).unwrap();
}

#[test]
fn keys_are_rotated() {
    let lab = Lab::new();
    let (old, new) = (key(), key());
    let release = lab.publish("stable", "signed", &options(&[&old])).unwrap();
    assert_eq!(release.release.release().generation, 1);
    // The same image with both keys is a new release; again it is none.
    let both = options(&[&old, &new]);
    let release = lab.publish("stable", "signed", &both).unwrap();
    assert_eq!(release.release.release().generation, 2);
    assert!(lab.publish("stable", "signed", &both).unwrap().unchanged);
    for key in [&old, &new] {
        lab.reader("signed", &trusting(&[key])).unwrap();
    }
    // By oversight, nobody signs.
    let error = lab.publish("beta", "signed", &options(&[])).unwrap_err();
    assert!(error.to_string().contains("sign it"), "{error}");
    lab.publish("beta", "signed", &options(&[&new])).unwrap();
    lab.reader("signed", &trusting(&[&new])).unwrap();
    lab.reader("signed", &trusting(&[&old])).unwrap_err();
    let signed = history(lab.open().as_ref(), &channel("signed")).unwrap();
    let count = |entry: &(u64, Result<SignedRelease>)| entry.1.as_ref().unwrap().signatures().len();
    assert_eq!(signed.iter().map(count).collect::<Vec<_>>(), [1, 2, 1]);
}

#[test]
fn nothing_of_a_release_can_be_changed() {
    let lab = Lab::new();
    let mine = key();
    let policy = trusting(&[&mine]);
    let expiring = PublishOptions {
        expires: Some(NOW - 5),
        oldest: Some(1),
        ..options(&[&mine])
    };
    lab.publish("stable", "signed", &expiring).unwrap();
    let good = lab.pointer("signed");
    let path = lab.store.root().join("channels/signed");
    let beta = lab.reader("beta", &TrustPolicy::default()).unwrap().image();
    let image = lab
        .reader("stable", &TrustPolicy::default())
        .unwrap()
        .image();
    let swap = |from: &str, to: &str| {
        let (from, to) = (from.to_owned(), to.to_owned());
        move |text: String| {
            assert!(text.contains(&from), "{from}");
            text.replacen(&from, &to, 1)
        }
    };
    let (image, beta) = (format!("image {image}\n"), format!("image {beta}\n"));
    let expires = format!("expires {}\n", NOW - 5);
    for (from, to) in [
        // Another image, another number, no expiry, more or fewer lines, other ends of lines.
        (image.as_str(), beta.as_str()),
        ("generation 1\n", "generation 2\n"),
        (&expires, ""),
        (&expires, "expires 9999999999\n"),
        ("oldest 1\n", ""),
        ("oldest 1\n", "oldest 1\nlater true\n"),
        ("pristine-channel 1\n", "pristine-channel 0\n"),
    ] {
        lab.forge("signed", swap(from, to));
        let error = lab.error("signed", &policy);
        assert!(matches!(error, TrustError::BadSignature { .. }), "{error}");
        fs::write(&path, &good).unwrap();
    }
    // Without its signature it is not signed, and what nobody touched has expired.
    lab.forge("signed", |text| {
        text[..text.find("untrusted comment").unwrap()].to_owned()
    });
    let error = lab.error("signed", &policy);
    assert!(matches!(error, TrustError::Unsigned { .. }), "{error}");
    fs::write(&path, &good).unwrap();
    let error = lab.error("signed", &policy);
    assert!(matches!(error, TrustError::Expired { .. }), "{error}");
    // Any single bit of it.
    let end = good.rfind("check ").unwrap();
    let comment = good.find("untrusted comment").unwrap();
    let comment = comment..comment + good[comment..].find('\n').unwrap();
    let early = TrustPolicy {
        clock: Some(NOW - 500),
        ..policy.clone()
    };
    lab.reader("signed", &early).unwrap();
    for at in (0..end * 8).filter(|at| !comment.contains(&(at / 8))) {
        let mut bytes = good.clone().into_bytes();
        bytes[at / 8] ^= 1 << (at % 8);
        let Ok(bad) = String::from_utf8(bytes) else {
            continue;
        };
        fs::write(&path, bad).unwrap();
        lab.forge("signed", |text| text);
        let (signed, _) = match lab.open().read_pointer(&channel("signed")) {
            Ok(pointer) => pointer.unwrap(),
            Err(_) => continue,
        };
        let result = signed.check(&early, "here");
        assert!(result.is_err(), "bit {at} of {good}");
    }
}

#[test]
fn nothing_is_accepted_in_the_place_of_something_else() {
    let lab = Lab::new();
    let mine = key();
    let policy = trusting(&[&mine]);
    lab.publish("stable", "one", &options(&[&mine])).unwrap();
    lab.publish("beta", "two", &options(&[&mine])).unwrap();
    let channels = lab.store.root().join("channels");
    // A good release of another channel.
    fs::copy(channels.join("two"), channels.join("one")).unwrap();
    let error = lab.reader("one", &policy).unwrap_err();
    assert!(error.to_string().contains("another channel"), "{error}");
    // An old one of this channel, which was good once: for that there is a floor.
    let release = lab.store.root().join("releases/one/1");
    fs::copy(&release, channels.join("one")).unwrap();
    lab.publish("beta", "one", &options(&[&mine])).unwrap();
    lab.reader("one", &policy).unwrap();
    fs::copy(&release, channels.join("one")).unwrap();
    let floor = TrustPolicy {
        oldest: 2,
        ..policy
    };
    let error = lab.error("one", &floor);
    let (generation, oldest) = (1, 2);
    assert_eq!(error, TrustError::TooOld { generation, oldest });
}

#[test]
fn the_real_minisign_verifies_a_release() {
    let lab = Lab::new();
    let (mine, other) = (key(), key());
    let keys = options(&[&other, &mine]);
    lab.publish("stable", "signed", &keys).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = lab.store.root().join("releases/signed/1");
    // As the format's description says.
    let script = format!(
        "sed '/^untrusted comment: /,$d; /^check /d' {0} >release && \
         sed -n '/^untrusted comment: /,/^check /{{/^check /!p}}' {0} >release.minisig",
        path.display()
    );
    let shell = Command::new("sh")
        .args(["-c", &script])
        .current_dir(dir.path())
        .status();
    assert!(shell.unwrap().success());
    let verify = |key: &SecretKey| {
        let output = Command::new("minisign")
            .args(["-VQm", "release", "-P", key.public().base64()])
            .current_dir(dir.path())
            .output()
            .unwrap();
        (output.status.success(), output.stdout)
    };
    // It looks at the first signature.
    let comment = b"pristine channel signed generation 1\n".to_vec();
    assert_eq!(verify(&other), (true, comment));
    assert!(!verify(&mine).0);
    let signed = pristine_store::read_release(lab.open().as_ref(), &channel("signed"), 1).unwrap();
    fs::write(dir.path().join("release.minisig"), &signed.signatures()[1]).unwrap();
    assert!(verify(&mine).0);
}

#[test]
fn releases_that_make_no_sense_are_not_made() {
    let lab = Lab::new();
    let mine = key();
    for (expires, oldest, text) in [
        (Some(NOW - 1000), None, "expire before it is published"),
        (None, Some(2), "oldest allowed generation"),
    ] {
        let options = PublishOptions {
            expires,
            oldest,
            ..options(&[&mine])
        };
        let error = lab.publish("stable", "signed", &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains(text), "{error}");
    }
    let many = vec![&mine; 9];
    let error = lab.publish("stable", "signed", &options(&many));
    assert!(error.unwrap_err().to_string().contains("at most 8"));
    assert_eq!(lab.open().read_pointer(&channel("signed")).unwrap(), None);
    assert_eq!(lab.open().releases(&channel("signed")).unwrap(), [0; 0]);
}

/// What the real minisign signed, once as it does today and once as it did, stays readable and trusted.
#[test]
fn releases_of_version_1_stay_readable() {
    let bytes = include_bytes!("golden/v1.release");
    let key = include_str!("golden/v1.pub").parse().unwrap();
    let signed = SignedRelease::parse(bytes, &channel("stable"), "golden").unwrap();
    assert_eq!(signed.encode().as_bytes(), bytes);
    let release = signed.release();
    assert_eq!((release.generation, release.size), (3, 2 << 30));
    assert_eq!(release.published, 1_795_253_000);
    assert_eq!(release.expires, Some(1_797_845_000));
    assert_eq!(release.oldest, Some(2));
    assert_eq!(release.image.to_string(), "5c1f".repeat(16));
    assert_eq!(release.parent.unwrap().to_string(), "90ab".repeat(16));
    assert_eq!(release.encode(), signed.text());
    let mut keys = Keys::default();
    keys.add(key);
    let policy = TrustPolicy {
        clock: Some(NOW),
        ..TrustPolicy::with_keys(keys)
    };
    signed.check(&policy, "golden").unwrap();
    for signature in signed.signatures() {
        let mut alone = SignedRelease::unsigned(release.clone());
        alone.add_signature(signature).unwrap();
        alone.check(&policy, "golden").unwrap();
    }
}
