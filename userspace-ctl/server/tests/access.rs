// SPDX-License-Identifier: GPL-2.0

//! Who may read what, by token.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::{start, Running};
use pristine_server::{Channels, ServeError, Settings, TokenRule};
use pristine_store::{CancelToken, ImageId, ImageReader, ImageSelector, ObjectName, RetryPolicy};
use pristine_testkit::{sample_image, TestStore};

/// The paths of an image's packs.
fn packs(store: &TestStore, image: ImageId) -> Vec<String> {
    let selector = ImageSelector::Id(image);
    let (retry, cancel) = (RetryPolicy::once(), CancelToken::new());
    let reader = ImageReader::open(store.open().unwrap(), &selector, retry, &cancel).unwrap();
    let packs = reader.manifest().frames().packs();
    let paths = packs.iter().map(|pack| ObjectName::Pack(pack.id).path());
    paths.map(|path| format!("/{path}")).collect()
}

fn token(name: &str, token: &str, channels: &[&str]) -> String {
    let some = channels.iter().map(|name| name.parse().unwrap());
    format!(
        "{}\n",
        TokenRule::new(name, token, Channels::Some(some.collect()))
    )
}

fn settings(rules: &Path) -> Settings {
    let mut settings = Settings::default();
    settings.access = Some(rules.to_owned());
    settings
}

fn status(running: &Running, path: &str, token: &str) -> u16 {
    running
        .get(path, &format!("Authorization: Bearer {token}\r\n"))
        .status
}

#[test]
fn a_token_is_good_for_its_channels_and_nothing_else() {
    let store = TestStore::new().unwrap();
    let old = store.add(&sample_image(1, 4), "lab").unwrap();
    let new = store.add(&sample_image(2, 4), "lab").unwrap();
    let other = store.add(&sample_image(3, 4), "kiosk").unwrap();
    let rules = store.root().with_file_name("rules");
    let all = TokenRule::new("admin", "all", Channels::All);
    let text = token("lab", "one", &["lab"]) + &token("kiosk", "two", &["kiosk", "none"]);
    fs::write(&rules, format!("{text}{all}\n")).unwrap();
    let running = start(&store.root(), settings(&rules));

    // Not without, nor with something wrong.
    let answer = running.get("/channels/lab", "");
    assert_eq!(answer.status, 401);
    assert!(answer
        .field("www-authenticate")
        .unwrap()
        .starts_with("Bearer"));
    for wrong in ["", "One", "one two", "x", &"x".repeat(8000)] {
        assert_eq!(status(&running, "/channels/lab", wrong), 401, "{wrong}");
    }
    let basic = "Authorization: Basic b25lOm9uZQ==\r\n";
    assert_eq!(running.get("/channels/lab", basic).status, 401);
    let twice = "Authorization: Bearer x\r\nAuthorization: Bearer one\r\n";
    assert_eq!(running.get("/channels/lab", twice).status, 400);
    assert_eq!(running.get("/nothing", "").status, 401);

    let manifest = |image: ImageId| format!("/{}", ObjectName::Manifest(image).path());
    let mut theirs: Vec<String> = vec!["/channels/lab".into(), "/releases/lab/".into()];
    theirs.extend(["/releases/lab/1".into(), "/releases/lab/2".into()]);
    theirs.extend([manifest(old), manifest(new)]);
    theirs.extend(packs(&store, old).into_iter().chain(packs(&store, new)));
    let mut others: Vec<String> = vec!["/channels/kiosk".into(), "/releases/kiosk/1".into()];
    others.push(manifest(other));
    let shared = packs(&store, other);
    others.extend(shared.into_iter().filter(|pack| !theirs.contains(pack)));
    assert!(theirs.len() > 7 && others.len() > 3);
    for path in &theirs {
        assert_eq!(status(&running, path, "one"), 200, "{path}");
        assert_eq!(status(&running, path, "two"), 403, "{path}");
        assert_eq!(status(&running, path, "all"), 200, "{path}");
    }
    for path in &others {
        assert_eq!(status(&running, path, "one"), 403, "{path}");
        assert_eq!(status(&running, path, "two"), 200, "{path}");
    }
    // Whether there is such a channel is not told, nor what others there are.
    assert_eq!(status(&running, "/channels/unknown", "one"), 403);
    assert_eq!(status(&running, "/channels/none", "two"), 404);
    assert_eq!(status(&running, "/images/", "one"), 403);
    let list = running.get("/channels/", "Authorization: Bearer one\r\n");
    assert_eq!(list.body, b"lab\n");
    assert_eq!(status(&running, "/images/", "all"), 200);
    // What was read with a token is nothing for caches that others use.
    let answer = running.get(&theirs[4], "Authorization: Bearer one\r\n");
    assert!(answer
        .field("cache-control")
        .unwrap()
        .starts_with("private"));

    // A generation that comes later is found when it is asked for.
    let newest = store.add(&sample_image(4, 4), "lab").unwrap();
    let mut found = 0;
    while found != 200 {
        // Not more often than once a second.
        found = status(&running, &manifest(newest), "one");
        assert!(matches!(found, 200 | 403));
        std::thread::yield_now();
    }
}

#[test]
fn rules_are_read_again_and_wrong_ones_change_nothing() {
    let store = TestStore::new().unwrap();
    store.add(&sample_image(1, 4), "lab").unwrap();
    let rules = store.root().with_file_name("rules");
    fs::write(&rules, token("a", "one", &["lab"])).unwrap();
    let running = start(&store.root(), settings(&rules));
    assert_eq!(status(&running, "/channels/lab", "one"), 200);
    fs::write(&rules, token("b", "two", &["lab"]) + "anonymous public\n").unwrap();
    assert_eq!(status(&running, "/channels/lab", "one"), 200);
    running.handle.reload(settings(&rules)).unwrap();
    assert_eq!(status(&running, "/channels/lab", "one"), 401);
    assert_eq!(status(&running, "/channels/lab", "two"), 200);
    assert_eq!(running.get("/channels/lab", "").status, 403);
    fs::write(&rules, "nonsense").unwrap();
    let error = running.handle.reload(settings(&rules)).unwrap_err();
    assert!(matches!(error, ServeError::Rules(_)), "{error}");
    assert!(error.to_string().contains("line 1"), "{error}");
    fs::remove_file(&rules).unwrap();
    assert!(running.handle.reload(settings(&rules)).is_err());
    // Certificates need an authority.
    fs::write(&rules, "certificate pc7 lab").unwrap();
    let error = running.handle.reload(settings(&rules)).unwrap_err();
    assert!(error.to_string().contains("authority"), "{error}");
    assert_eq!(status(&running, "/channels/lab", "two"), 200);
    assert_eq!(running.metric("reloads_total"), 1.0);
}
