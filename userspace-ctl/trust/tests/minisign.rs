// SPDX-License-Identifier: GPL-2.0

//! The real minisign verifies what is signed here, and we what it signs; with keys of either.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pristine_trust::{LockedKey, Policy, PublicKey, SecretKey, Signature, Signer, Terms};

const TEXT: &[u8] = b"pristine-channel 1\nchannel stable\ngeneration 3\n";

struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        let lab = Lab(tempfile::tempdir().unwrap());
        fs::write(lab.path("text"), TEXT).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Runs minisign, which must be there.
    fn minisign(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = Command::new("minisign")
            .args(arguments)
            .current_dir(self.0.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may be gone before it has read it.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    fn minisign_ok(&self, arguments: &[&str], input: &str) {
        let output = self.minisign(arguments, input);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {errors}");
    }

    fn public(&self, name: &str) -> PublicKey {
        self.read(name).parse().unwrap()
    }
}

fn locked(path: &Path) -> LockedKey {
    LockedKey::parse(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn minisign_verifies_ours() {
    let lab = Lab::new();
    for password in [None, Some("a password with spaces \u{e9}")] {
        let (key, secret) = SecretKey::generate(password).unwrap();
        fs::write(lab.path("our.pub"), key.public().to_file()).unwrap();
        fs::write(lab.path("our.key"), secret).unwrap();
        // As it is used later: read from the file.
        let again = locked(&lab.path("our.key"));
        assert_eq!(again.needs_password(), password.is_some());
        let again = again.unlock(password).unwrap();
        assert_eq!(again.public(), key.public());
        let signature = again.sign(TEXT, "channel stable generation 3").unwrap();
        fs::write(lab.path("text.minisig"), &signature).unwrap();
        lab.minisign_ok(&["-Vm", "text", "-p", "our.pub"], "");
        lab.minisign_ok(&["-Vm", "text", "-P", key.public().base64()], "");
        let output = lab.minisign(&["-VQm", "text", "-p", "our.pub"], "");
        assert_eq!(output.stdout, b"channel stable generation 3\n");
        // And signs with it.
        lab.minisign_ok(
            &["-Sm", "text", "-s", "our.key", "-x", "theirs.minisig"],
            &format!("{}\n", password.unwrap_or_default()),
        );
        let theirs: Signature = lab.read("theirs.minisig").parse().unwrap();
        assert!(theirs.verify(key.public(), TEXT));

        let mut bad = TEXT.to_vec();
        bad[20] ^= 1;
        fs::write(lab.path("bad"), bad).unwrap();
        let output = lab.minisign(&["-Vm", "bad", "-x", "text.minisig", "-p", "our.pub"], "");
        assert!(!output.status.success());
    }
}

#[test]
fn we_verify_minisigns() {
    let lab = Lab::new();
    lab.minisign_ok(&["-GW", "-p", "their.pub", "-s", "their.key"], "");
    let public = lab.public("their.pub");
    // The key's id is shown as minisign shows it.
    assert!(lab.read("their.pub").contains(&public.id().to_string()));
    for (flag, legacy) in [("-Sm", false), ("-Slm", true)] {
        let comment = "generation 3";
        lab.minisign_ok(
            &[flag, "text", "-s", "their.key", "-x", "sig", "-t", comment],
            "",
        );
        let text = lab.read("sig");
        // The first two bytes name the algorithm: `Ed` for legacy signatures, `ED` for those of the hash.
        let line = text.lines().nth(1).unwrap();
        assert_eq!(line.starts_with("RW"), legacy, "{line}");
        let signature: Signature = text.parse().unwrap();
        assert_eq!(signature.key_id(), public.id());
        assert_eq!(signature.trusted_comment(), comment);
        assert!(signature.verify(&public, TEXT));
        assert!(!signature.verify(&public, b"something else"));
        let changed = text.replace(comment, "generation 4");
        assert!(!changed.parse::<Signature>().unwrap().verify(&public, TEXT));
    }
    // We sign with its key, too.
    let key = locked(&lab.path("their.key")).unlock(None).unwrap();
    assert_eq!(key.public(), &public);
    fs::write(lab.path("text.minisig"), key.sign(TEXT, "x").unwrap()).unwrap();
    lab.minisign_ok(&["-Vm", "text", "-p", "their.pub"], "");

    // Such a key has no checksum; damage to it is found all the same.
    let text = lab.read("their.key");
    let (comment, word) = text.trim_end().split_once('\n').unwrap();
    let other = |c: &str| if c == "A" { "B" } else { "A" };
    for at in 84..160 {
        let changed = other(&word[at..=at]);
        let bad = format!("{comment}\n{}{changed}{}\n", &word[..at], &word[at + 1..]);
        let key = LockedKey::parse(&bad).and_then(|key| key.unlock(None));
        assert!(key.is_err(), "{at}");
    }
}

#[test]
fn minisigns_password_is_ours() {
    let lab = Lab::new();
    let arguments = ["-G", "-p", "their.pub", "-s", "their.key"];
    lab.minisign_ok(&arguments, "secret\nsecret\n");
    let key = locked(&lab.path("their.key"));
    assert!(key.needs_password());
    assert!(key.clone().unlock(None).is_err());
    let key = key.unlock(Some("secret")).unwrap();
    let text = key.sign(TEXT, "x").unwrap();
    let mut policy = Policy::default();
    policy.keys.add(lab.public("their.pub"));
    let terms = Terms {
        generation: 3,
        published: 0,
        expires: None,
    };
    policy.check(TEXT, &[text], &terms).unwrap();
}
