// SPDX-License-Identifier: GPL-2.0

//! A directory with file systems in it, and what is done with them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use pristine_image::fs::{Ranges, Survey};
use pristine_image::{build, BuildOptions, Manifest, Source};

use crate::common::{noise, read_image, Packs};

/// Stands in what was deleted, and must not be in an image.
pub const SECRET: &[u8] = b"the secret that was deleted long ago";

pub struct Lab(tempfile::TempDir);

impl Lab {
    pub fn new() -> Self {
        Lab(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a line of shell in the directory; it must succeed. Returns its output.
    pub fn run(&self, line: &str) -> String {
        let (status, text) = self.try_run(line);
        assert!(status, "{line}: {text}");
        text
    }

    pub fn try_run(&self, line: &str) -> (bool, String) {
        let output = Command::new("/bin/bash")
            .args(["-c", line])
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("LC_ALL", "C")
            .current_dir(self.0.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text + &errors)
    }

    /// A tree with files of many sizes, a deep directory, links, and one secret.
    pub fn tree(&self) {
        let tree = self.path("tree");
        fs::create_dir_all(tree.join("a/b/c/d")).unwrap();
        for n in 0..60u64 {
            let size = 37 * n * n * n / 30 + n;
            fs::write(tree.join(format!("a/file{n}")), noise(n, size as usize)).unwrap();
        }
        fs::write(tree.join("a/b/c/d/large"), noise(99, 9 << 20)).unwrap();
        fs::write(tree.join("etc"), "words\n").unwrap();
        std::os::unix::fs::symlink("a/b", tree.join("link")).unwrap();
        let secret: Vec<u8> = SECRET.iter().copied().cycle().take(700_000).collect();
        fs::write(tree.join("secret"), secret).unwrap();
    }

    pub fn sparse(&self, name: &str, size: u64) {
        File::create(self.path(name))
            .unwrap()
            .set_len(size)
            .unwrap();
    }

    pub fn holds_secret(&self, name: &str) -> bool {
        let secret = String::from_utf8_lossy(SECRET);
        self.try_run(&format!("grep -qF '{secret}' {name}")).0
    }

    pub fn survey(&self, name: &str) -> Survey {
        let source = Source::open(&self.path(name)).unwrap();
        source.zero_free().unwrap().1
    }

    /// Builds an image of `from` with zeros where it is free, and writes it to `to`.
    pub fn rebuild(&self, from: &str, to: &str) -> Survey {
        let source = Source::open(&self.path(from)).unwrap();
        let (source, survey) = source.zero_free().unwrap();
        let mut packs = Packs::default();
        let cancel = AtomicBool::new(false);
        let options = BuildOptions {
            level: 1,
            ..BuildOptions::default()
        };
        let built = build(&source, &options, &mut packs, &|_| (), &cancel).unwrap();
        let manifest = Manifest::parse(&built.manifest, None).unwrap();
        let image = read_image(&manifest, &built.manifest, &packs);
        // Nothing but what is free has changed, and that is all zero.
        let before = fs::read(self.path(from)).unwrap();
        let len = before.len() as u64;
        for used in survey.free.complement(0..len).iter() {
            let range = used.start as usize..used.end as usize;
            assert!(
                image[range.clone()] == before[range],
                "{used:?} has changed"
            );
        }
        let zeros = vec![0; 1 << 16];
        for free in survey.free.iter() {
            let range = free.start as usize..free.end as usize;
            assert!(
                image[range]
                    .chunks(zeros.len())
                    .all(|c| *c == zeros[..c.len()]),
                "{free:?}"
            );
        }
        fs::write(self.path(to), image).unwrap();
        survey
    }

    /// Fills ranges with what no file system would survive.
    pub fn fill(&self, name: &str, ranges: &Ranges) {
        let file = File::options().write(true).open(self.path(name)).unwrap();
        for range in ranges.iter() {
            let garbage: Vec<u8> = SECRET.iter().copied().cycle().take(1 << 16).collect();
            let mut at = range.start;
            while at < range.end {
                let len = (range.end - at).min(garbage.len() as u64);
                file.write_all_at(&garbage[..len as usize], at).unwrap();
                at += len;
            }
        }
    }
}
