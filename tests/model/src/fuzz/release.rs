// SPDX-License-Identifier: GPL-2.0

//! Releases, their signatures and public keys: a release that minisign signed, and then changed.

use std::sync::OnceLock;

use arbitrary::Arbitrary;
use pristine_store::{ChannelName, Digest, SignedRelease, TrustPolicy};
use pristine_trust::{Keys, PublicKey, Signature};

const GOOD: &str = include_str!("../../../../userspace-ctl/store/tests/golden/v1.release");
const KEY: &str = include_str!("../../../../userspace-ctl/store/tests/golden/v1.pub");
/// Bytes of a release that is not edited any more: several times what one may have.
const MOST: usize = 1 << 16;
/// While the good release has not expired.
const NOW: u64 = 1_795_253_000;

#[derive(Arbitrary, Debug)]
enum Edit<'a> {
    /// Bits of a byte are others.
    Flip { at: u16, bits: u8 },
    /// Nothing follows.
    Cut { at: u16 },
    /// Something more.
    Insert { at: u16, bytes: &'a [u8] },
    /// A line goes.
    Remove { line: u8 },
    /// A line comes a second time, somewhere.
    Copy { line: u8, to: u8 },
    /// A number is another.
    Number { line: u8, number: u64 },
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    edits: Vec<Edit<'a>>,
    good_check: bool,
    key: &'a str,
}

fn apply(edit: &Edit<'_>, bytes: &mut Vec<u8>) {
    let len = bytes.len().max(1);
    let place = |at: u16| usize::from(at) % len;
    let mut lines: Vec<Vec<u8>> = bytes
        .split_inclusive(|byte| *byte == b'\n')
        .map(<[u8]>::to_vec)
        .collect();
    let count = lines.len().max(1);
    match edit {
        Edit::Flip { at, bits } => {
            if let Some(byte) = bytes.get_mut(place(*at)) {
                *byte ^= bits;
            }
            return;
        }
        Edit::Cut { at } => return bytes.truncate(place(*at)),
        Edit::Insert { at, bytes: more } => {
            let at = place(*at).min(bytes.len());
            drop(bytes.splice(at..at, more.iter().copied()));
            return;
        }
        _ if lines.is_empty() => return,
        Edit::Remove { line } => drop(lines.remove(usize::from(*line) % count)),
        Edit::Copy { line, to } => {
            let line = lines[usize::from(*line) % count].clone();
            lines.insert(usize::from(*to) % count, line);
        }
        Edit::Number { line, number } => {
            let line = &mut lines[usize::from(*line) % count];
            if let Some(space) = line.iter().position(|byte| *byte == b' ') {
                line.truncate(space + 1);
                line.extend(format!("{number}\n").bytes());
            }
        }
    }
    *bytes = lines.concat();
}

/// Makes the last line fit what is before it.
fn fix_check(bytes: &mut Vec<u8>) {
    let at = bytes.windows(7).rposition(|window| window == b"\ncheck ");
    bytes.truncate(at.map_or(bytes.len(), |at| at + 1));
    let mut check = Digest::of(bytes).to_string();
    check.truncate(16);
    bytes.extend(format!("check {check}\n").bytes());
}

struct Base {
    policy: TrustPolicy,
    channel: ChannelName,
    signed: SignedRelease,
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let mut keys = Keys::default();
        keys.add(KEY.parse().unwrap());
        let channel = "stable".parse().unwrap();
        let signed = SignedRelease::parse(GOOD.as_bytes(), &channel, "good").unwrap();
        let policy = TrustPolicy {
            clock: Some(NOW),
            ..TrustPolicy::with_keys(keys)
        };
        signed.check(&policy, "good").unwrap();
        Base {
            policy,
            channel,
            signed,
        }
    })
}

pub(super) fn run(data: &[u8]) {
    let base = base();
    if let Some(input) = super::read::<Input<'_>>(data) {
        let mut bytes = GOOD.as_bytes().to_vec();
        for edit in &input.edits {
            // The last line, which has no end, doubles when it is copied behind itself.
            if bytes.len() > MOST {
                break;
            }
            apply(edit, &mut bytes);
        }
        if input.good_check {
            fix_check(&mut bytes);
        }
        release(base, &bytes);
        key(input.key);
    }
    release(base, data);
    if let Ok(text) = std::str::from_utf8(data) {
        key(text);
        // It may say what it likes, and never is one of this text.
        if let Ok(signature) = text.parse::<Signature>() {
            let mut keys = base.policy.keys.iter();
            assert!(!keys.any(|key| signature.verify(key, b"another text")));
        }
    }
}

/// What is read is written as it was, and trusted only if it is what was signed.
fn release(base: &Base, bytes: &[u8]) {
    let Ok(signed) = SignedRelease::parse(bytes, &base.channel, "input") else {
        return;
    };
    assert_eq!(signed.encode().as_bytes(), bytes);
    let release = signed.release();
    assert!(release.generation > 0 && release.oldest.is_none_or(|o| o <= release.generation));
    let again = SignedRelease::unsigned(release.clone());
    let back = SignedRelease::parse(again.encode().as_bytes(), &base.channel, "again").unwrap();
    assert_eq!(back.release(), release);
    let other = "canary".parse().unwrap();
    assert!(SignedRelease::parse(bytes, &other, "input").is_err());
    if signed.check(&base.policy, "input").is_ok() {
        assert_eq!(
            signed.text(),
            base.signed.text(),
            "a forged release is trusted"
        );
    }
}

fn key(text: &str) {
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_file().parse(), Ok(key));
    }
}
