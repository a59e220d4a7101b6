// SPDX-License-Identifier: GPL-2.0

//! What the tests of formats share.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pristine_image::{BuildOptions, PackId, PackSink};
use pristine_store::{CancelToken, RetryPolicy};
use pristine_transfer::{Content, OpenOptions, Opened, Result, Watch};

/// A temporary directory.
pub struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Self {
        Lab {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.path(name), content).unwrap();
    }

    /// Runs a shell script in the directory; it must succeed.
    pub fn sh(&self, script: &str) {
        run(self.directory.path(), &["sh", "-ec", script]);
    }

    pub fn open(&self, name: &str) -> Result<Opened> {
        open(self, name, |_| ())
    }

    /// All bytes of a disk, read at odd places.
    pub fn content(&self, opened: Opened) -> Vec<u8> {
        read_disk(opened).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Opens a file of the lab, or a URL.
pub fn open(lab: &Lab, name: &str, set: impl FnOnce(&mut OpenOptions<'_>)) -> Result<Opened> {
    let mut options = options(lab);
    set(&mut options);
    let location = match name.contains("://") {
        true => name.to_owned(),
        false => lab.path(name).display().to_string(),
    };
    pristine_transfer::open(&location, &options)
}

pub fn options(lab: &Lab) -> OpenOptions<'_> {
    OpenOptions {
        temporary: lab.directory.path(),
        max_size: None,
        format: None,
        follow_backing: false,
        chunk_store: None,
        platform: None,
        oci_name: None,
        by_range: false,
        retry: RetryPolicy::once(),
        watch: watch(),
    }
}

pub fn watch() -> Watch<'static> {
    Watch {
        progress: &|_, _, _| (),
        cancel: CancelToken::new(),
    }
}

/// Reads a disk the way a build does, and in other ways: each byte by two reads.
pub fn read_disk(opened: Opened) -> std::result::Result<Vec<u8>, String> {
    let Content::Disk(source) = opened.content else {
        panic!("not a disk");
    };
    let len = source.len() as usize;
    let mut whole = vec![0; len];
    let mut at = 0;
    for step in [1usize, 511, 4096, 70_000, 1 << 20].iter().cycle() {
        let end = (at + step).min(len);
        let read = source.input().read_at(at as u64, &mut whole[at..end]);
        read.map_err(|error| error.to_string())?;
        at = end;
        if at == len {
            break;
        }
    }
    assert!(source.input().read_at(len as u64, &mut [0]).is_err());
    for start in (0..len).step_by(1 << 20) {
        let end = (start + (1 << 20)).min(len);
        if source.input().is_hole(start as u64..end as u64) {
            assert!(
                whole[start..end].iter().all(|&byte| byte == 0),
                "a hole that is none"
            );
        }
    }
    Ok(whole)
}

/// A disk with content, zeros, and content.
pub fn noise_disk(len: usize) -> Vec<u8> {
    let mut disk = pristine_testkit::noise(5, len / 3);
    disk.resize(len / 2, 0);
    let text = b"all work and no play makes a dull disk\n";
    disk.extend(text.iter().cycle().take(len / 4));
    disk.extend(pristine_testkit::noise(9, len - disk.len() - 5000));
    disk.resize(len, 0);
    disk
}

/// Runs a program that must succeed.
pub fn run(directory: &Path, args: &[&str]) {
    let output = Command::new(args[0])
        .args(&args[1..])
        .current_dir(directory)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", args[0]));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
}

/// Takes packs nowhere.
pub struct Nowhere;

impl PackSink for Nowhere {
    fn pack(&mut self, _: &PackId, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
}

/// Opens and reads a disk in its entirety; any error as text.
pub fn try_read(lab: &Lab, name: &str) -> std::result::Result<Vec<u8>, String> {
    let opened = lab.open(name).map_err(|error| error.to_string())?;
    match opened.content {
        Content::Disk(_) => read_disk(opened),
        _ => Err("it was taken for another format".to_owned()),
    }
}

/// Cuts and flips a file at many places. It must be refused, never read as something else; a flip may go unnoticed
/// only where a format has no checks (then `always` is not set), and nothing may panic or take for ever.
pub fn assert_damage_is_told(lab: &Lab, name: &str, always: bool) {
    let good = fs::read(lab.path(name)).unwrap();
    let expected = try_read(lab, name).unwrap();
    let len = good.len();
    let mut places: Vec<usize> = (0..48.min(len)).collect();
    places.extend(len.saturating_sub(64)..len);
    places.extend((48..len.saturating_sub(64)).step_by((len / 20).max(1)));
    for &at in &places {
        if at >= 6 {
            lab.write("damaged", &good[..at]);
            let cut = try_read(lab, "damaged");
            assert!(
                cut.is_err() || (!always && cut != Ok(good.clone())),
                "{name} cut at {at}"
            );
        }
        let mut flipped = good.clone();
        flipped[at] ^= 1 << (at % 8);
        lab.write("damaged", &flipped);
        match try_read(lab, "damaged") {
            Err(_) => {}
            // Another magic makes it another format: then the bytes are what they are.
            Ok(bytes) if bytes == flipped => assert!(at < 10, "{name} flipped at {at}"),
            Ok(bytes) => assert!(!always || bytes == expected, "{name} flipped at {at}"),
        }
    }
}

/// Options for small, quick builds.
pub fn build_options() -> BuildOptions {
    BuildOptions {
        level: 1,
        pack_target: 1 << 20,
        ..BuildOptions::default()
    }
}
