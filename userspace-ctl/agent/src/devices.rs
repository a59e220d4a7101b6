// SPDX-License-Identifier: GPL-2.0

//! Finding block devices, and waiting for them.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::DeviceSpec;
use crate::console::{debug, say};
use crate::failure::{Failure, Kind};

/// Where sysfs lists block devices, and where their nodes are.
#[derive(Clone, Debug)]
pub struct Places {
    /// `/sys/class/block`.
    pub sys: PathBuf,
    /// `/dev`.
    pub dev: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            sys: "/sys/class/block".into(),
            dev: "/dev".into(),
        }
    }
}

fn names(places: &Places) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(&places.sys)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn uevent(places: &Places, name: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(places.sys.join(name).join("uevent")).ok()?;
    text.lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix('='))
        .map(str::to_owned)
}

/// A disk's serial number: virtio has it in `serial`, NVMe in `device/serial`, SCSI in its page 0x80.
fn serial(places: &Places, name: &str) -> Option<String> {
    let dir = places.sys.join(name);
    for file in ["serial", "device/serial"] {
        if let Ok(text) = fs::read_to_string(dir.join(file)) {
            return Some(text.trim().to_owned());
        }
    }
    let page = fs::read(dir.join("device/vpd_pg80")).ok()?;
    Some(String::from_utf8_lossy(page.get(4..)?).trim().to_owned())
}

/// The device that `spec` means, if it is there.
pub fn find(spec: &DeviceSpec, places: &Places) -> Option<PathBuf> {
    let by = |test: &dyn Fn(&str) -> bool| {
        let name = names(places).into_iter().find(|n| test(n))?;
        Some(places.dev.join(name))
    };
    match spec {
        DeviceSpec::Path(path) => Some(path.clone()),
        DeviceSpec::PartUuid(uuid) => {
            by(&|n| uevent(places, n, "PARTUUID").is_some_and(|u| u.eq_ignore_ascii_case(uuid)))
        }
        DeviceSpec::PartLabel(label) => {
            by(&|n| uevent(places, n, "PARTNAME").is_some_and(|l| l == *label))
        }
        DeviceSpec::Serial(wanted) => by(&|n| serial(places, n).is_some_and(|s| s == *wanted)),
    }
}

/// Whether there is a block device with a size; a file serves too, for who tries things out.
fn usable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() || m.file_type().is_block_device())
        && fs::File::open(path).is_ok()
}

/// Waits until the device that `spec` means is there; `what` is what messages call it.
///
/// # Errors
///
/// It is not after `limit`; the message lists the devices that are there.
pub fn wait(
    spec: &DeviceSpec,
    what: &str,
    limit: Duration,
    places: &Places,
) -> Result<PathBuf, Failure> {
    let begin = Instant::now();
    let mut said = 0;
    loop {
        if let Some(path) = find(spec, places).filter(|p| usable(p)) {
            debug(format_args!("the {what} {spec} is {}", path.display()));
            return Ok(path);
        }
        let waited = begin.elapsed();
        if waited >= limit {
            let there = names(places);
            let there = match there.is_empty() {
                true => "no block device at all; is the driver in the initramfs?".to_string(),
                false => there.join(", "),
            };
            let what = format!("the {what} {spec} did not appear in {} s", limit.as_secs());
            return Err(Failure::new(Kind::Device, what).advise(format_args!(
                "check pristine.data and pristine.metadata; there is: {there}"
            )));
        }
        if waited.as_secs() / 5 >= said && waited.as_secs() >= 1 {
            said = waited.as_secs() / 5 + 1;
            say(format_args!(
                "waiting for the {what} {spec} (for {} s of {})",
                waited.as_secs(),
                limit.as_secs()
            ));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> (tempfile::TempDir, Places) {
        let dir = tempfile::tempdir().unwrap();
        let places = Places {
            sys: dir.path().join("sys"),
            dev: dir.path().join("dev"),
        };
        fs::create_dir_all(&places.dev).unwrap();
        for (name, serial, uevent) in [
            ("vda", "data\n", "DEVNAME=vda\n"),
            ("vda2", "", "PARTN=2\nPARTNAME=my data\nPARTUUID=ABCD-1\n"),
            ("vdb", "meta", ""),
        ] {
            let sys = places.sys.join(name);
            fs::create_dir_all(&sys).unwrap();
            fs::write(sys.join("uevent"), uevent).unwrap();
            if !serial.is_empty() {
                fs::write(sys.join("serial"), serial).unwrap();
            }
            fs::write(places.dev.join(name), "x").unwrap();
        }
        (dir, places)
    }

    #[test]
    fn devices_are_found_by_what_is_known_of_them() {
        let (_dir, places) = places();
        for (spec, name) in [
            ("SERIAL=data", "vda"),
            ("SERIAL=meta", "vdb"),
            ("PARTLABEL=my data", "vda2"),
            ("PARTUUID=abcd-1", "vda2"),
        ] {
            let found = find(&spec.parse().unwrap(), &places);
            assert_eq!(found, Some(places.dev.join(name)), "{spec}");
        }
        assert_eq!(find(&"SERIAL=other".parse().unwrap(), &places), None);
    }

    #[test]
    fn waiting_ends_and_says_what_there_is() {
        let (_dir, places) = places();
        let spec = "SERIAL=other".parse().unwrap();
        let failure = wait(&spec, "data device", Duration::ZERO, &places).unwrap_err();
        assert!(failure.what.contains("SERIAL=other"));
        assert!(failure.advice.contains("vda, vda2, vdb"));
    }
}
