// SPDX-License-Identifier: GPL-2.0

//! What the kernel refuses, for people and for programs.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// Result of this crate.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// What a program decides on; the text of an [`Error`] is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The kernel module is not loaded, or not to be found.
    NoModule,
    /// The kernel, the module and this program do not fit together.
    Unsupported,
    /// No such device or file.
    NotFound,
    /// In use, or active already.
    Busy,
    /// Privileges are missing.
    Denied,
    /// The request makes no sense.
    Usage,
    /// The target found no metadata.
    NotFormatted,
    /// The target found metadata of another device, image or generation.
    Identity,
    /// The target found damaged metadata, or such as needs a check.
    Damaged,
    /// The target found stale blocks.
    Stale,
    /// Anything else that the kernel said no to.
    Io,
}

/// A failure: what was asked, of what, and why it was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/pristine` is not there.
    #[error("the kernel module dm_pristine is not loaded")]
    ModuleNotLoaded,
    /// There is no such module.
    #[error("the kernel module {name} is neither loaded nor found in {}", dir.display())]
    ModuleNotFound {
        /// The module.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// The module was built for another kernel.
    #[error("the kernel module {} was built for kernel {built_for}, this is {running}", path.display())]
    WrongKernel {
        /// The module's file.
        path: PathBuf,
        /// The kernel release it was built for.
        built_for: String,
        /// The release of the running kernel.
        running: String,
    },
    /// The file is no kernel module.
    #[error("{} is not a kernel module", path.display())]
    NotAModule {
        /// The file.
        path: PathBuf,
    },
    /// The module was refused.
    #[error("cannot load the kernel module {}: {source}{}", path.display(), kernel_says(kernel))]
    ModuleLoad {
        /// The module's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What the kernel wrote to its log meanwhile.
        kernel: Option<String>,
    },
    /// The kernel module speaks another version of the ABI.
    #[error("the kernel module does not speak version {0} of the ioctl ABI: it is of another release than this program")]
    AbiVersion(u32),
    /// There is no device-mapper in this kernel, or it is too old.
    #[error("device-mapper is not available: {reason}")]
    NoDeviceMapper {
        /// Why.
        reason: String,
    },
    /// No device of this name.
    #[error("there is no device named {name}")]
    NoSuchDevice {
        /// The name.
        name: String,
    },
    /// The device exists but is of another target.
    #[error("{name} is a device-mapper device, but not a pristine one")]
    NotPristine {
        /// The name.
        name: String,
    },
    /// A device of this name exists.
    #[error("a device named {name} is active already")]
    Exists {
        /// The name.
        name: String,
    },
    /// Somebody has the device open.
    #[error("{name} is in use{}", by.as_ref().map(|b| format!(" by {b}")).unwrap_or_default())]
    Busy {
        /// The device.
        name: String,
        /// Who, if that is known.
        by: Option<String>,
    },
    /// Privileges are missing.
    #[error("not permitted to {action}")]
    Denied {
        /// What was asked.
        action: String,
    },
    /// The kernel refused.
    #[error("cannot {action} {name}: {source}{}", kernel_says(kernel))]
    Kernel {
        /// What was asked.
        action: &'static str,
        /// Of which device.
        name: String,
        /// Why.
        source: io::Error,
        /// What the kernel wrote to its log meanwhile.
        kernel: Option<String>,
    },
    /// A device that was to go on with another table did not.
    #[error("{name} is suspended and does not go on: {source}")]
    Suspended {
        /// The device.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// What the kernel answered is not understood.
    #[error("the kernel's answer about {name} is not understood: {what}")]
    BadAnswer {
        /// The device.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// A name that device-mapper does not take.
    #[error("{name:?} is no name for a device: {why}")]
    BadName {
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// A path that must be a block device is not one.
    #[error("{} is not a block device", path.display())]
    NotABlockDevice {
        /// The path.
        path: PathBuf,
    },
    /// A device or file cannot be worked on.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn kernel_says(lines: &Option<String>) -> String {
    lines
        .as_ref()
        .map(|l| format!(" (the kernel says: {l})"))
        .unwrap_or_default()
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.into(),
            source,
        }
    }

    /// What kind of failure this is.
    pub fn class(&self) -> Class {
        let of = |e: &io::Error| match e.kind() {
            io::ErrorKind::NotFound => Class::NotFound,
            io::ErrorKind::PermissionDenied => Class::Denied,
            io::ErrorKind::ResourceBusy => Class::Busy,
            _ => Class::Io,
        };
        match self {
            Self::ModuleNotLoaded | Self::ModuleNotFound { .. } => Class::NoModule,
            Self::WrongKernel { .. }
            | Self::AbiVersion(_)
            | Self::NoDeviceMapper { .. }
            | Self::BadAnswer { .. } => Class::Unsupported,
            Self::NoSuchDevice { .. } => Class::NotFound,
            Self::Exists { .. } | Self::Busy { .. } => Class::Busy,
            Self::Denied { .. } => Class::Denied,
            Self::BadName { .. }
            | Self::NotABlockDevice { .. }
            | Self::NotPristine { .. }
            | Self::NotAModule { .. } => Class::Usage,
            Self::Kernel { source, .. } => {
                match source.raw_os_error().map(Errno::from_raw_os_error) {
                    // What the target says with; its words are in the kernel's log.
                    Some(Errno::NODATA) => Class::NotFormatted,
                    Some(Errno::MEDIUMTYPE) => Class::Identity,
                    Some(Errno::UCLEAN) => Class::Damaged,
                    Some(Errno::STALE) => Class::Stale,
                    Some(Errno::PROTONOSUPPORT) => Class::Unsupported,
                    _ => of(source),
                }
            }
            Self::ModuleLoad { source, .. } | Self::Io { source, .. } => of(source),
            Self::Suspended { source, .. } => source.class(),
        }
    }

    /// What can be done about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::ModuleNotLoaded => {
                "modprobe dm-pristine, or insmod build/<kernel release>/dm-pristine.ko"
            }
            Self::ModuleNotFound { .. } => "build it for this kernel with: make modules",
            Self::WrongKernel { .. } => {
                "build it for the running kernel with: make modules KREL=$(uname -r)"
            }
            Self::AbiVersion(_) => "install the module and the program of one release",
            Self::NoSuchDevice { .. } => "pristine device list shows the active ones",
            Self::Exists { .. } => {
                "pristine device status NAME shows it; deactivate it first to activate another"
            }
            Self::Busy { .. } => "unmount it first",
            Self::Denied { .. } => "run it as root",
            Self::Suspended { .. } => {
                "the same command again tries again; whoever uses the device waits until then"
            }
            _ => return None,
        })
    }
}
