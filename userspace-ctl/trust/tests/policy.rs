// SPDX-License-Identifier: GPL-2.0

//! What is trusted and what is not, and what the errors say.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;

use pristine_trust::{
    Keys, KeysError, LockedKey, Policy, PublicKey, SecretKey, SecretKeyError, Signature, Signer,
    Terms, TrustError,
};

const TEXT: &[u8] = b"a release";
const NOW: u64 = 1_795_253_000;

fn key() -> SecretKey {
    SecretKey::generate(None).unwrap().0
}

fn signed(key: &SecretKey) -> String {
    key.sign(TEXT, "a comment").unwrap()
}

fn trusting(keys: &[&SecretKey]) -> Policy {
    let mut policy = Policy {
        clock: Some(NOW),
        ..Policy::default()
    };
    for (number, key) in keys.iter().enumerate() {
        policy
            .keys
            .add(key.public().clone().with_label(format!("k{number}")));
    }
    policy
}

fn terms() -> Terms {
    Terms {
        generation: 5,
        published: NOW - 100,
        expires: None,
    }
}

#[test]
fn any_trusted_key_will_do() {
    let (old, new, other) = (key(), key(), key());
    let both = trusting(&[&old, &new]);
    for key in [&old, &new] {
        let trusted = both.check(TEXT, &[signed(key)], &terms()).unwrap();
        assert_eq!(trusted.signed_by[0].id(), key.public().id());
    }
    // While keys are rotated: signed by both, machines know one.
    let signatures = [signed(&old), signed(&new)];
    for key in [&old, &new] {
        trusting(&[key]).check(TEXT, &signatures, &terms()).unwrap();
    }
    let trusted = both.check(TEXT, &signatures, &terms()).unwrap();
    assert_eq!(trusted.signed_by.len(), 2);
    // A signature twice is one.
    let twice = [signed(&old), signed(&old)];
    let trusted = both.check(TEXT, &twice, &terms()).unwrap();
    assert_eq!(trusted.signed_by.len(), 1);
    // Strangers and damage beside a good signature do no harm.
    let mixed = ["rubbish".to_owned(), signed(&other), signed(&new)];
    both.check(TEXT, &mixed, &terms()).unwrap();
}

#[test]
fn the_others_are_refused_by_name() {
    let (mine, other) = (key(), key());
    let policy = trusting(&[&mine]);
    let check = |signatures: &[String]| policy.check(TEXT, signatures, &terms()).unwrap_err();

    let error = check(&[]);
    assert!(matches!(error, TrustError::Unsigned { .. }));
    assert!(error.to_string().contains("(k0)"), "{error}");

    let error = check(&[signed(&other)]);
    let (mine_id, other_id) = (mine.public().id(), other.public().id());
    assert!(matches!(&error, TrustError::UnknownKey { signed_by, .. } if *signed_by == [other_id]));
    for id in [mine_id, other_id] {
        assert!(error.to_string().contains(&id.to_string()), "{error}");
    }

    let of_another_text = mine.sign(b"another", "a comment").unwrap();
    let error = check(&[of_another_text]);
    assert!(matches!(&error, TrustError::BadSignature { key } if key.contains("k0")));
}

/// A key that claims the id of a trusted one.
#[test]
fn an_id_proves_nothing() {
    let (mine, other) = (key(), key());
    let forged = signed(&other);
    let line = |text: &str, n: usize| text.lines().nth(n).unwrap().to_owned();
    // The first 13 bytes are the algorithm, the id, and three bytes of the signature: 4 base64 digits for each 3 bytes.
    let (good, bad) = (line(&signed(&mine), 1), line(&forged, 1));
    let with_id = forged.replace(&bad, &format!("{}{}", &good[..13], &bad[13..]));
    let signature: Signature = with_id.parse().unwrap();
    assert_eq!(signature.key_id().0[..7], mine.public().id().0[..7]);
    let error = trusting(&[&mine]).check(TEXT, &[with_id], &terms());
    assert!(error.is_err());
    // Two keys of one id, of which one is right.
    let bytes = mine.public().base64();
    let twin: PublicKey = format!("{}{}", &bytes[..14], &other.public().base64()[14..])
        .parse()
        .unwrap();
    let mut keys = Keys::default();
    keys.add(twin);
    keys.add(mine.public().clone());
    let policy = Policy::with_keys(keys);
    policy.check(TEXT, &[signed(&mine)], &terms()).unwrap();
}

#[test]
fn any_flipped_bit_and_any_cut_of_a_signature_is_found() {
    let mine = key();
    let policy = trusting(&[&mine]);
    let text = signed(&mine);
    // The untrusted comment may say anything, and says nothing.
    let start = text.find('\n').unwrap() + 1;
    for at in start * 8..(text.len() - 1) * 8 {
        let mut bytes = text.clone().into_bytes();
        bytes[at / 8] ^= 1 << (at % 8);
        let Ok(bad) = String::from_utf8(bytes) else {
            continue;
        };
        let result = policy.check(TEXT, std::slice::from_ref(&bad), &terms());
        assert!(result.is_err(), "bit {at}: {bad}");
    }
    for end in 0..text.len() - 1 {
        let cut = text[..end].to_owned();
        assert!(policy.check(TEXT, &[cut], &terms()).is_err(), "{end}");
    }
}

#[test]
fn releases_expire_and_clocks_are_wrong() {
    let mine = key();
    let expiring = |published, expires| Terms {
        generation: 5,
        published,
        expires: Some(expires),
    };
    let check = |policy: &Policy, terms: &Terms| policy.check(TEXT, &[signed(&mine)], terms);
    let policy = trusting(&[&mine]);
    let trusted = check(&policy, &expiring(NOW - 10, NOW + 1)).unwrap();
    assert!(!trusted.clock_is_behind);
    let error = check(&policy, &expiring(NOW - 10, NOW)).unwrap_err();
    let (expires, now) = (NOW, NOW);
    assert_eq!(error, TrustError::Expired { expires, now });
    assert_eq!(
        error.to_string(),
        "it expired at 2026-11-21 09:23:20Z, and it is 2026-11-21 09:23:20Z now"
    );

    // The machine believes that it is 1970.
    let early = Policy {
        clock: Some(1000),
        ..policy
    };
    let trusted = check(&early, &expiring(NOW - 10, NOW)).unwrap();
    assert!(trusted.clock_is_behind);
    assert!(check(&early, &expiring(NOW, NOW)).is_err());
    // But it knows that it is later.
    let knows = Policy {
        not_before: NOW + 5,
        ..early
    };
    let error = check(&knows, &expiring(NOW - 10, NOW)).unwrap_err();
    let now = NOW + 5;
    assert_eq!(error, TrustError::Expired { expires, now });
}

#[test]
fn generations_below_the_oldest_are_refused() {
    let mine = key();
    let policy = Policy {
        oldest: 6,
        ..trusting(&[&mine])
    };
    let error = policy.check(TEXT, &[signed(&mine)], &terms()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "it is generation 5, and the oldest allowed one is 6"
    );
    let six = Terms {
        generation: 6,
        ..terms()
    };
    policy.check(TEXT, &[signed(&mine)], &six).unwrap();
}

#[test]
fn without_keys_nobody_need_have_signed() {
    let expired = Terms {
        expires: Some(1),
        ..terms()
    };
    let trusted = Policy::default().check(TEXT, &[], &expired).unwrap();
    assert!(trusted.signed_by.is_empty());
}

#[test]
fn directories_of_keys() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Keys::read_directory(&dir.path().join("none")).unwrap();
    assert!(missing.is_empty());
    let (a, b) = (key(), key());
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write("b.pub", b.public().base64());
    write("a.pub", &a.public().to_file());
    write("again.pub", &a.public().to_file());
    write("README", "not a key");
    write(".hidden.pub", "not a key");
    let keys = Keys::read_directory(dir.path()).unwrap();
    let labels: Vec<_> = keys.iter().filter_map(PublicKey::label).collect();
    assert_eq!(labels, ["a", "b"]);
    write("c.pub", "not a key");
    let error = Keys::read_directory(dir.path()).unwrap_err();
    assert!(matches!(error, KeysError::Key { .. }), "{error}");
    assert!(error.to_string().contains("c.pub"), "{error}");
}

#[test]
fn secret_keys_are_kept() {
    let (key, text) = SecretKey::generate(Some("right")).unwrap();
    assert!(!format!("{key:?}").contains(text.lines().nth(1).unwrap()));
    let locked = LockedKey::parse(&text).unwrap();
    let wrong = locked.clone().unlock(Some("wrong")).unwrap_err();
    assert_eq!(wrong, SecretKeyError::WrongPassword);
    let none = locked.clone().unlock(None).unwrap_err();
    assert_eq!(none, SecretKeyError::NeedsPassword);
    assert_eq!(locked.unlock(Some("right")).unwrap().public(), key.public());
    assert!(SecretKey::generate(Some("")).is_err());
    for bad in [
        "",
        "x\ny\n",
        "untrusted comment: x\n",
        "untrusted comment: x\n!!!\n",
        &key.public().to_file(),
        &text[..text.len() - 40],
    ] {
        let unlocked = LockedKey::parse(bad).and_then(|key| key.unlock(Some("right")));
        assert!(unlocked.is_err(), "{bad}");
    }
    assert!(key.sign(TEXT, "two\nlines").is_err());
}
