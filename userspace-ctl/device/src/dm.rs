// SPDX-License-Identifier: GPL-2.0

//! Device-mapper devices, by its ioctls.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{symlink, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use pristine_shared::status::Status;
use pristine_shared::superblock::Uuid;
use pristine_shared::table::{Features, Hex, Table};
use rustix::fs::{makedev, mknodat, FileType, Mode, CWD};
use rustix::io::Errno;

use crate::block;
use crate::error::{Error, Result};
use crate::ioctl;
use crate::kmsg::Mark;
use crate::module;

#[path = "dm_raw.rs"]
mod raw;

use raw::{Call, Command};

/// Name of the target.
pub const TARGET: &str = "pristine";
/// What the device-mapper UUIDs of managed devices begin with; the metadata's UUID in hex follows.
pub const UUID_PREFIX: &str = "PRISTINE-";

const CONTROL: &str = "/dev/mapper/control";

/// An open device-mapper.
#[derive(Debug)]
pub struct Dm {
    control: File,
}

/// A device-mapper device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name below `/dev/mapper`.
    pub name: String,
    /// Its device-mapper UUID, often empty.
    pub uuid: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Whether it has a table that is in use.
    pub live: bool,
    /// Whether it is suspended.
    pub suspended: bool,
    /// How often it is open.
    pub open_count: u32,
}

/// One target of a device's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub length: u64,
    /// Its type.
    pub kind: String,
    /// Its status or its parameters.
    pub text: String,
}

/// What a managed device is made of.
#[derive(Clone, Debug)]
pub struct Activation<'a> {
    /// The data device.
    pub data: &'a Path,
    /// The metadata device; `None` for the reserved tail of the data device.
    pub metadata: Option<&'a Path>,
    /// Managed sectors, as the metadata says.
    pub sectors: u64,
    /// Identity of the metadata.
    pub meta_uuid: Uuid,
    /// Features of the table line.
    pub features: Features,
}

/// A managed device that is active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Managed {
    /// The device.
    pub device: Device,
    /// Its length in sectors.
    pub sectors: u64,
    /// The data device as the kernel names it ("254:0").
    pub data: String,
    /// The metadata device as the kernel names it, or `None` for the tail.
    pub metadata: Option<String>,
    /// Its features.
    pub features: Features,
    /// Its status.
    pub status: Status,
}

impl Managed {
    /// Where it is to be opened.
    pub fn path(&self) -> PathBuf {
        node(&self.device.name)
    }
}

fn node(name: &str) -> PathBuf {
    Path::new("/dev/mapper").join(name)
}

/// Checks that device-mapper and udev take `name` as it is.
///
/// # Errors
///
/// [`Error::BadName`].
pub fn check_name(name: &str) -> Result {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > 127 {
        "it is longer than 127 bytes"
    } else if name == "." || name == ".." || name == "control" {
        "it means something else"
    } else if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&b))
    {
        "letters, digits and #+-.:=@_ are allowed"
    } else {
        return Ok(());
    };
    Err(Error::BadName {
        name: name.into(),
        why,
    })
}

impl Dm {
    /// Opens device-mapper, loading its module if that is needed and possible.
    ///
    /// # Errors
    ///
    /// [`Error::NoDeviceMapper`], [`Error::Denied`].
    pub fn open() -> Result<Self> {
        let control = match open_control() {
            Ok(control) => control,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // A refusal is explained by what follows.
                let _ = module::load_by_name("dm_mod", None);
                open_control().map_err(cannot_open)?
            }
            Err(e) => return Err(cannot_open(e)),
        };
        Ok(Self { control })
    }

    fn run(&self, call: Call, action: &'static str) -> Result<Call> {
        let mark = Mark::now();
        let name = call.name.clone();
        call.run(|command, buffer| ioctl::device_mapper(&self.control, command, buffer))
            .map_err(|source| refused(action, name, source, mark))
    }

    /// All device-mapper devices, of any target.
    ///
    /// # Errors
    ///
    /// Those of the kernel.
    pub fn devices(&self) -> Result<Vec<Device>> {
        let answer = self.run(Call::new(Command::ListDevices, ""), "list devices")?;
        let names = answer.names();
        let mut devices = Vec::with_capacity(names.len());
        for name in names {
            match self.device(&name) {
                Ok(device) => devices.push(device),
                // It went away between the two calls.
                Err(Error::NoSuchDevice { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(devices)
    }

    /// A device by its name.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`].
    pub fn device(&self, name: &str) -> Result<Device> {
        check_name(name)?;
        let answer = self.run(Call::new(Command::DevStatus, name), "look at")?;
        Ok(device_of(&answer))
    }

    /// The status lines of a device; `table` asks for the parameters instead.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`], [`Error::BadAnswer`].
    pub fn targets(&self, name: &str, table: bool) -> Result<(Device, Vec<Target>)> {
        check_name(name)?;
        let mut call = Call::new(Command::TableStatus, name);
        // Asking must not wait for a commit.
        call.flags |= raw::NOFLUSH | if table { raw::STATUS_TABLE } else { 0 };
        let answer = self.run(call, "ask for the status of")?;
        let targets = answer.targets().map_err(|what| Error::BadAnswer {
            name: name.into(),
            what: what.into(),
        })?;
        Ok((device_of(&answer), targets))
    }

    /// A managed device by its name.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`], [`Error::NotPristine`], [`Error::BadAnswer`].
    pub fn managed(&self, name: &str) -> Result<Managed> {
        let bad = |what: String| Error::BadAnswer {
            name: name.into(),
            what,
        };
        let (_, table) = self.targets(name, true)?;
        let [table] = table.as_slice() else {
            return Err(Error::NotPristine { name: name.into() });
        };
        if table.kind != TARGET {
            return Err(Error::NotPristine { name: name.into() });
        }
        let line = Table::parse(table.text.split_ascii_whitespace())
            .map_err(|e| bad(format!("table line {:?}: {e}", table.text)))?;
        let (device, status) = self.targets(name, false)?;
        let status = status.first().map_or("", |t| t.text.as_str());
        Ok(Managed {
            device,
            sectors: table.length,
            data: line.data.into(),
            metadata: line.metadata.map(Into::into),
            features: line.features,
            status: status
                .parse()
                .map_err(|e| bad(format!("status line {status:?}: {e}")))?,
        })
    }

    /// All managed devices.
    ///
    /// # Errors
    ///
    /// Those of [`Dm::managed`], except that devices of other targets are left out.
    pub fn all_managed(&self) -> Result<Vec<Managed>> {
        let mut all = Vec::new();
        for device in self.devices()? {
            match self.managed(&device.name) {
                Ok(managed) => all.push(managed),
                Err(Error::NotPristine { .. } | Error::NoSuchDevice { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(all)
    }

    /// Creates the managed device `name`, starts it and makes `/dev/mapper/NAME`.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`], [`Error::Busy`] (the data or metadata device is in use), [`Error::Kernel`] with what the
    /// kernel says. Nothing is left behind then.
    pub fn activate(&self, name: &str, activation: &Activation<'_>) -> Result<Managed> {
        check_name(name)?;
        let data = block::number(activation.data)?;
        let metadata = activation.metadata.map(block::number).transpose()?;
        let data_text = format!("{}:{}", data.0, data.1);
        let metadata_text = metadata.map(|(major, minor)| format!("{major}:{minor}"));
        let line = Table {
            data: &data_text,
            metadata: metadata_text.as_deref(),
            features: activation.features,
        }
        .to_string();
        let uuid = format!("{UUID_PREFIX}{}", Hex(&activation.meta_uuid));
        let mut call = Call::new(Command::DevCreate, name);
        call.uuid = uuid;
        if let Err(e) = self.run(call, "create") {
            return Err(match e {
                // The name is free, so it is the UUID: the same metadata under another name.
                Error::Exists { .. }
                    if matches!(self.device(name), Err(Error::NoSuchDevice { .. })) =>
                {
                    let holder = self.devices().ok().and_then(|d| {
                        d.into_iter()
                            .find(|d| d.uuid.contains(&Hex(&activation.meta_uuid).to_string()))
                    });
                    Error::Exists {
                        name: holder.map_or_else(|| name.into(), |d| d.name),
                    }
                }
                e => e,
            });
        }
        let started = self
            .load(name, activation.sectors, &line)
            .and_then(|()| self.resume(name))
            .and_then(|()| self.managed(name))
            .and_then(|managed| make_node(&managed.device).map(|()| managed));
        if started.is_err() {
            // What went wrong first is what matters.
            let _ = self.remove(name, Duration::from_secs(2));
        }
        started
    }

    /// Grows an active device to `sectors` managed sectors, on a data device that may have become larger. Its features
    /// stay as they are.
    ///
    /// # Errors
    ///
    /// As [`Dm::reload`]; when the device is suspended, its old size is in force on disk.
    pub fn grow(&self, managed: &Managed, sectors: u64) -> Result<Managed> {
        let features = Features {
            grow: true,
            ..managed.features
        };
        self.replace(managed, sectors, features)
    }

    /// Loads the table of a device anew, so that it takes its state from the disk, and resumes it.
    ///
    /// # Errors
    ///
    /// Those of the kernel. What it refuses to load leaves the device as it was. If it fails after that
    /// ([`Error::Suspended`]), the device is suspended; trying again goes on.
    pub fn reload(&self, managed: &Managed) -> Result<Managed> {
        self.replace(managed, managed.sectors, managed.features)
    }

    fn replace(&self, managed: &Managed, sectors: u64, features: Features) -> Result<Managed> {
        let name = managed.device.name.as_str();
        let line = Table {
            data: &managed.data,
            metadata: managed.metadata.as_deref(),
            features,
        }
        .to_string();
        self.load(name, sectors, &line)?;
        if let Err(e) = self.resume(name) {
            if self.device(name).is_ok_and(|device| device.suspended) {
                return Err(Error::Suspended {
                    name: name.into(),
                    source: Box::new(e),
                });
            }
            // It could not even be suspended: the old table goes on.
            let _ = self.run(Call::new(Command::TableClear, name), "clear the table of");
            return Err(e);
        }
        self.managed(name)
    }

    fn load(&self, name: &str, sectors: u64, line: &str) -> Result {
        let mut call = Call::new(Command::TableLoad, name);
        call.set_table(sectors, TARGET, line);
        self.run(call, "load the table of").map(|_| ())
    }

    /// Starts a device that was created or suspended.
    ///
    /// # Errors
    ///
    /// Those of the target: here is where metadata is refused.
    pub fn resume(&self, name: &str) -> Result {
        let mut call = Call::new(Command::DevSuspend, name);
        call.event_nr = raw::UDEV_PRIMARY_SOURCE;
        self.run(call, "start").map(|_| ())
    }

    /// Stops a device: I/O waits, and its state is on disk when this returns.
    ///
    /// # Errors
    ///
    /// Those of the target.
    pub fn suspend(&self, name: &str) -> Result {
        let mut call = Call::new(Command::DevSuspend, name);
        call.flags |= raw::SUSPEND;
        self.run(call, "suspend").map(|_| ())
    }

    /// Sends a message to the device's target; the answer is empty if there is none.
    ///
    /// # Errors
    ///
    /// Those of the target.
    pub fn message(&self, name: &str, text: &str) -> Result<String> {
        let mut call = Call::new(Command::TargetMessage, name);
        call.set_message(text);
        let answer = self.run(call, "send a message to")?;
        Ok(answer.text())
    }

    /// Removes a device and its node. As long as it is busy it is tried again, for `patience`: what looks at new
    /// devices (udev's probes) opens them for a moment.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`], [`Error::NoSuchDevice`].
    pub fn remove(&self, name: &str, patience: Duration) -> Result {
        let device = self.device(name)?;
        let step = Duration::from_millis(50);
        let mut waited = Duration::ZERO;
        loop {
            let mut call = Call::new(Command::DevRemove, name);
            call.event_nr = raw::UDEV_PRIMARY_SOURCE;
            match self.run(call, "remove") {
                Ok(_) => break,
                Err(Error::Busy { .. }) if waited < patience => {
                    thread::sleep(step);
                    waited += step;
                }
                Err(Error::Busy { name, .. }) => {
                    let by = block::user(device.major, device.minor);
                    return Err(Error::Busy { name, by });
                }
                Err(e) => return Err(e),
            }
        }
        remove_node(&device);
        Ok(())
    }
}

fn open_control() -> io::Result<File> {
    File::options().read(true).write(true).open(CONTROL)
}

fn cannot_open(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::PermissionDenied => Error::Denied {
            action: format!("open {CONTROL}"),
        },
        io::ErrorKind::NotFound => Error::NoDeviceMapper {
            reason: format!("{CONTROL} does not exist, and the module dm_mod cannot be loaded"),
        },
        _ => Error::NoDeviceMapper {
            reason: format!("cannot open {CONTROL}: {e}"),
        },
    }
}

fn refused(action: &'static str, name: String, source: io::Error, mark: Mark) -> Error {
    match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NXIO | Errno::NODEV) if action != "start" && !action.starts_with("load") => {
            Error::NoSuchDevice { name }
        }
        Some(Errno::BUSY) if action == "create" => Error::Exists { name },
        Some(Errno::BUSY) if action == "remove" => Error::Busy { name, by: None },
        Some(Errno::ACCESS | Errno::PERM) => Error::Denied {
            action: format!("{action} {name}"),
        },
        _ => Error::Kernel {
            action,
            name,
            source,
            kernel: mark.since(),
        },
    }
}

fn device_of(answer: &Call) -> Device {
    Device {
        name: answer.name.clone(),
        uuid: answer.uuid.clone(),
        major: rustix::fs::major(answer.dev),
        minor: rustix::fs::minor(answer.dev),
        live: answer.flags & raw::ACTIVE_PRESENT != 0,
        suspended: answer.flags & raw::SUSPEND != 0,
        open_count: u32::try_from(answer.open_count).unwrap_or(0),
    }
}

/// Makes `/dev/mapper/NAME` if udev does not: the link that udev would make, or a node where there is no devtmpfs.
fn make_node(device: &Device) -> Result {
    let path = node(&device.name);
    let fail = |source| Error::io("create", &path, source);
    let wanted = makedev(device.major, device.minor);
    // udev may be about to make it: what it makes is the same.
    if fs::metadata(&path).is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == wanted) {
        return Ok(());
    }
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let kernel_name = format!("dm-{}", device.minor);
    let made = if Path::new("/dev").join(&kernel_name).exists() {
        symlink(Path::new("..").join(kernel_name), &path)
    } else {
        mknodat(
            CWD,
            &path,
            FileType::BlockDevice,
            Mode::RUSR | Mode::WUSR,
            wanted,
        )
        .map_err(io::Error::from)
    };
    match made {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(fail(e)),
        _ => Ok(()),
    }
}

/// Takes away the node of a device that is gone, if udev has not.
fn remove_node(device: &Device) {
    let path = node(&device.name);
    let is_ours = match fs::read_link(&path) {
        Ok(to) => to == Path::new("..").join(format!("dm-{}", device.minor)),
        Err(_) => fs::symlink_metadata(&path).is_ok_and(|m| {
            m.file_type().is_block_device() && m.rdev() == makedev(device.major, device.minor)
        }),
    };
    if is_ours {
        let _ = fs::remove_file(&path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_dm_or_udev_would_mangle_are_refused() {
        for good in ["root", "a", "vg-root_1.x", "x=1"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "x".repeat(128);
        for bad in ["", "a/b", "a b", "..", "control", "ü", long.as_str()] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
