// SPDX-License-Identifier: GPL-2.0

//! Stores that lie, trickle, die and come back.
// A single run of blocks is what is read.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{places, settings, Kernel, Running};
use pristine_helper::helper::Settings;
use pristine_helper::pace::Hydrate;
use pristine_helper::stop::End;
use pristine_store::{HttpOptions, ImageId};
use pristine_testkit::{authority, sample_image, FaultyServer, Nginx, TestStore};

/// An image on two servers, the first of which obeys rules.
struct Lab {
    image: Vec<u8>,
    id: ImageId,
    store: TestStore,
    bad: FaultyServer,
    good: FaultyServer,
}

fn lab(rules: &str) -> Lab {
    let image = sample_image(1, 8);
    let (store, id) = TestStore::with_image(&image).unwrap();
    let bad = FaultyServer::start(&store.root()).unwrap();
    bad.set_rules(rules.parse().unwrap());
    let good = FaultyServer::start(&store.root()).unwrap();
    Lab {
        image,
        id,
        store,
        bad,
        good,
    }
}

impl Lab {
    fn kernel(&self) -> Arc<Kernel> {
        Kernel::new(self.id, &self.image, 0, 12)
    }

    fn one(&self) -> [String; 1] {
        [self.bad.url()]
    }

    fn both(&self) -> [String; 2] {
        [self.bad.url(), self.good.url()]
    }
}

#[test]
fn whatever_one_store_does_the_other_serves() {
    for rules in [
        "packs/:wrong",
        "packs/:short=2000000",
        "packs/:cut=1000",
        "packs/:status=500",
        "packs/:status=404",
        "packs/:status=403",
        "packs/:close",
        "packs/:other-range",
        "packs/:hang",
        ":status=500",
        ":wrong",
        ":close",
        "images/:long=1",
    ] {
        let lab = lab(rules);
        let kernel = lab.kernel();
        let helper = Running::start(&kernel, &lab.both(), settings(Hydrate::Full));
        for block in [0u64, 700, 2000, 1023, 300] {
            kernel.read(block..block + 3);
        }
        assert_eq!(helper.join(), End::Complete, "{rules}");
        kernel.check(&[]);
    }
}

#[test]
fn a_store_that_trickles_is_given_up_for_the_next_and_not_asked_again_by_readers() {
    let lab = lab("packs/:slow=1024");
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.both(), settings(Hydrate::Off));
    let begin = Instant::now();
    kernel.read(0..4);
    let first = begin.elapsed();
    assert!(first < Duration::from_secs(15), "{first:?}");
    // From here on nobody waits for it.
    let begin = Instant::now();
    for n in 1..20 {
        kernel.read(n * 50..n * 50 + 1);
    }
    let rest = begin.elapsed();
    assert!(rest < Duration::from_secs(2), "{rest:?}");
    helper.kill();
    kernel.check(&[]);
}

#[test]
fn a_slow_store_is_used_again_when_it_is_better() {
    let lab = lab("packs/@1-2:hang");
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.both(), settings(Hydrate::Off));
    kernel.read(0..4);
    // The probe in the background finds out.
    let before = lab.bad.requests();
    let until = Instant::now() + Duration::from_secs(10);
    let mut n = 0;
    while lab.bad.requests() < before + 4 {
        assert!(Instant::now() < until, "it was never asked again");
        n += 1;
        kernel.read(n..n + 1);
        kernel.read(n * 37 % 2000..n * 37 % 2000 + 1);
        std::thread::sleep(Duration::from_millis(50));
    }
    helper.terminate();
    kernel.check(&[]);
}

#[test]
fn one_store_that_lies_is_asked_until_it_does_not() {
    let lab = lab("images/@1-2:wrong packs/@1-3:wrong packs/@5:short=2000000 packs/@7-8:close");
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.one(), settings(Hydrate::Full));
    for block in [0u64, 1000, 2000] {
        kernel.read(block..block + 3);
    }
    assert_eq!(helper.join(), End::Complete);
    kernel.check(&[]);
}

#[test]
fn a_store_that_dies_and_comes_back() {
    let lab = lab("");
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.one(), settings(Hydrate::Off));
    kernel.read(0..4);
    lab.bad.set_rules(":close".parse().unwrap());
    let id = kernel.ask(700..704);
    assert_eq!(kernel.wait(id, Duration::from_millis(500)), Err(-1));
    lab.bad.set_rules("".parse().unwrap());
    assert_eq!(kernel.wait(id, Duration::from_secs(10)), Ok(()));
    helper.terminate();
    kernel.check(&[]);
}

#[test]
fn no_request_ends_with_an_error_unless_it_is_told_so() {
    let lab = lab("packs/:status=404");
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.one(), settings(Hydrate::Off));
    let id = kernel.ask(0..1);
    assert_eq!(kernel.wait(id, Duration::from_millis(700)), Err(-1));
    helper.terminate();
    // The next helper has less patience.
    let impatient = Settings {
        give_up: Some(Duration::from_millis(300)),
        ..settings(Hydrate::Off)
    };
    let helper = Running::start(&kernel, &lab.one(), impatient);
    assert_eq!(kernel.wait(id, Duration::from_secs(5)), Err(5));
    lab.bad.set_rules("".parse().unwrap());
    kernel.read(0..1);
    helper.terminate();
    kernel.check(&[]);
}

#[test]
fn a_store_that_is_down_at_the_start_is_waited_for() {
    let lab = lab(":close");
    let kernel = lab.kernel();
    let id = kernel.ask(0..1);
    let helper = Running::start(&kernel, &lab.one(), settings(Hydrate::Idle));
    assert_eq!(kernel.wait(id, Duration::from_millis(500)), Err(-1));
    lab.bad.set_rules("".parse().unwrap());
    assert_eq!(helper.join(), End::Complete);
    assert_eq!(kernel.wait(id, Duration::ZERO), Ok(()));
    kernel.check(&[]);
}

#[test]
fn a_dead_store_does_not_keep_it_from_ending() {
    for rules in ["packs/:hang", "packs/:close", ":hang", "packs/:slow=1024"] {
        let lab = lab(rules);
        let kernel = lab.kernel();
        let helper = Running::start(&kernel, &lab.one(), settings(Hydrate::Full));
        let id = kernel.ask(0..1);
        std::thread::sleep(Duration::from_millis(300));
        let begin = Instant::now();
        assert_eq!(helper.terminate(), End::Asked);
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(6), "{rules}: {took:?}");
        assert_eq!(kernel.wait(id, Duration::ZERO), Err(-1), "it stays");
    }
}

#[test]
fn the_same_image_in_other_packs() {
    let lab = lab("");
    // Another store, which built the image together with another: its packs differ, the image's id does not.
    let other = TestStore::new().unwrap();
    let mut first = sample_image(9, 8);
    first[..1 << 20].copy_from_slice(&lab.image[1 << 20..2 << 20]);
    other.add(&first, "other").unwrap();
    assert_eq!(other.add(&lab.image, "stable").unwrap(), lab.id);
    let server = FaultyServer::start(&other.root()).unwrap();
    lab.bad.set_rules("packs/:status=404".parse().unwrap());
    let urls = [lab.bad.url(), server.url()];
    let kernel = lab.kernel();
    Running::complete(&kernel, &urls, settings(Hydrate::Full), &[0..10]);
    drop(lab.store);
}

#[test]
fn a_store_of_another_image_is_no_help() {
    let lab = lab("");
    let (other, _) = TestStore::with_image(&sample_image(5, 8)).unwrap();
    let server = FaultyServer::start(&other.root()).unwrap();
    let urls = [server.url(), lab.good.url()];
    let kernel = lab.kernel();
    Running::complete(&kernel, &urls, settings(Hydrate::Full), &[0..10]);
}

#[test]
fn an_https_store_with_an_own_authority_is_served_from_and_a_stranger_is_not() {
    let lab = lab("");
    let authority = authority().unwrap();
    let file = |name: &str| authority.path().join(name);
    let server = format!(
        "ssl_certificate {};\nssl_certificate_key {};",
        file("server.pem").display(),
        file("server.key").display()
    );
    let nginx = Nginx::start(&lab.store.root(), " ssl", &server).unwrap();
    let url = format!("https://127.0.0.1:{}", nginx.port());
    let start = |urls: &[String], ca_file| {
        let kernel = lab.kernel();
        let http = HttpOptions {
            ca_file,
            ..HttpOptions::default()
        };
        let helper = Running::start_with(&kernel, urls, settings(Hydrate::Full), places(), http);
        (kernel, helper)
    };
    let (kernel, helper) = start(&[url.clone()], Some(file("ca.pem")));
    kernel.read(700..703);
    assert_eq!(helper.join(), End::Complete);
    kernel.check(&[]);
    let log = nginx.log().unwrap();
    assert!(
        log.iter().any(|line| line.contains(" 206 /packs/")),
        "{log:?}"
    );

    // Nobody knows its authority: not a byte from there, and the next store serves.
    let before = nginx.log().unwrap().len();
    let (kernel, helper) = start(&[url, lab.good.url()], None);
    assert_eq!(helper.join(), End::Complete);
    kernel.check(&[]);
    assert_eq!(nginx.log().unwrap().len(), before);
}

#[test]
fn an_encrypted_image_is_served_and_hydrated() {
    let image = sample_image(1, 8);
    let store = TestStore::new().unwrap();
    let id = store.add_encrypted(&image, "stable").unwrap();
    let good = FaultyServer::start(&store.root()).unwrap();
    for rules in [
        "",
        "packs/:wrong",
        "images/:wrong",
        "keys/:status=500",
        "packs/:close",
    ] {
        let bad = FaultyServer::start(&store.root()).unwrap();
        bad.set_rules(rules.parse().unwrap());
        let kernel = Kernel::new(id, &image, 0, 12);
        let urls = [bad.url(), good.url()];
        let helper = Running::start(&kernel, &urls, settings(Hydrate::Full));
        for block in [0u64, 700, 2000, 1023, 300] {
            kernel.read(block..block + 3);
        }
        assert_eq!(helper.join(), End::Complete, "{rules}");
        kernel.check(&[]);
    }
}
