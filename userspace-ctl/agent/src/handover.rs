// SPDX-License-Identifier: GPL-2.0

//! From the initramfs to the system: mounting its root, and becoming its init.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{openat2, statfs, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{mount, mount_move, unmount, MountFlags, UnmountFlags};

use crate::console::{debug, say};
use crate::failure::{Failure, Kind};
use crate::worker::uptime_ms;

/// Where the system's root is mounted before it becomes `/`.
pub const NEW_ROOT: &str = "/newroot";

/// File systems that `auto` tries, as far as the kernel has them.
const USUAL: [&str; 3] = ["ext4", "xfs", "btrfs"];

/// How often it is looked for the system's first program while others rename files.
const INIT_ATTEMPTS: usize = 1000;

fn fail(what: String) -> Failure {
    Failure::new(Kind::Root, what)
}

/// Mounts the file systems that every program expects. `/dev` first, because the console is there.
///
/// # Errors
///
/// What could not be mounted, all of it; the caller goes on as far as it can.
pub fn mount_basics() -> Result<(), Failure> {
    let nosuid = MountFlags::NOSUID | MountFlags::NOEXEC;
    let table = [
        (
            "devtmpfs",
            "/dev",
            "devtmpfs",
            MountFlags::NOSUID,
            c"mode=0755",
        ),
        ("proc", "/proc", "proc", nosuid | MountFlags::NODEV, c""),
        ("sysfs", "/sys", "sysfs", nosuid | MountFlags::NODEV, c""),
        (
            "tmpfs",
            "/run",
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            c"mode=0755",
        ),
    ];
    let mut wrong = Vec::new();
    for (source, target, kind, flags, data) in table {
        let _ = fs::create_dir_all(target);
        if is_mount_point(Path::new(target)) {
            continue;
        }
        if let Err(e) = mount(source, target, kind, flags, Some(data)) {
            wrong.push(format!("{target}: {e}"));
        }
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(
            Kind::Internal,
            format!("cannot mount {}", wrong.join(", ")),
        )),
    }
}

fn is_mount_point(path: &Path) -> bool {
    let (Ok(here), Ok(above)) = (fs::metadata(path), fs::metadata(path.join(".."))) else {
        return false;
    };
    here.dev() != above.dev()
}

/// Mounts the system's root read-only, as init systems expect it, and looks whether there is a system in it.
///
/// # Errors
///
/// No file system fits, or there is no `init` in it.
pub fn mount_root(
    device: &Path,
    rootfs: Option<&str>,
    flags: &str,
    init: &str,
) -> Result<(), Failure> {
    fs::create_dir_all(NEW_ROOT).map_err(|e| fail(format!("cannot make {NEW_ROOT}: {e}")))?;
    let data =
        std::ffi::CString::new(flags).map_err(|_| fail("pristine.rootflags has a NUL".into()))?;
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let kinds: Vec<&str> = match rootfs {
        Some(kind) => vec![kind],
        None => USUAL
            .into_iter()
            .filter(|k| known.lines().any(|l| l.trim() == *k))
            .collect(),
    };
    let mut tried = Vec::new();
    let mut mounted = false;
    for kind in kinds {
        match mount(
            device,
            NEW_ROOT,
            kind,
            MountFlags::RDONLY,
            Some(data.as_c_str()),
        ) {
            Ok(()) => {
                say(format_args!(
                    "mounted {} ({kind}) {} ms after the kernel's start",
                    device.display(),
                    uptime_ms()
                ));
                mounted = true;
                break;
            }
            Err(e) => tried.push(format!("{kind}: {e}")),
        }
    }
    if !mounted {
        let what = format!(
            "cannot mount the root {}: {}",
            device.display(),
            tried.join(", ")
        );
        return Err(fail(what).advise(
            "is pristine.rootfs right, and its driver in the initramfs? does the image hold a file system?",
        ));
    }
    find_init(Path::new(NEW_ROOT), init).inspect_err(|_| leave_root())
}

/// Whether `init` is in the new root; its symbolic links are followed there, not here.
fn find_init(root: &Path, init: &str) -> Result<(), Failure> {
    let missing = |why: &dyn std::fmt::Display| {
        fail(format!("the root has no {init}: {why}"))
            .advise("is it a system at all? init= names another program")
    };
    let root = File::open(root).map_err(|e| missing(&e))?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let look = || openat2(&root, init, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let mut found = look();
    // A file that is renamed anywhere while a `..` is followed, as the helper does it each second, makes the kernel give up: and
    // where directories come from a store, that takes its time. What was read once is there at the next try.
    for _ in 0..INIT_ATTEMPTS {
        if !matches!(found, Err(Errno::AGAIN)) {
            break;
        }
        found = look();
    }
    let found = found.map_err(|e| missing(&e))?;
    let mode = File::from(found)
        .metadata()
        .map_err(|e| missing(&e))?
        .mode();
    if mode & 0o111 == 0 {
        return Err(missing(&"it is not executable"));
    }
    Ok(())
}

/// Unmounts what [`mount_root`] mounted, if it is.
pub fn leave_root() {
    if is_mount_point(Path::new(NEW_ROOT)) {
        let _ = unmount(NEW_ROOT, UnmountFlags::DETACH);
    }
}

/// Makes the new root `/` and becomes its init. Comes back only with a failure.
pub fn switch(init: &str, arguments: &[String]) -> Failure {
    match switch_root() {
        Ok(()) => {}
        Err(failure) => return failure,
    }
    let error = Command::new(init).args(arguments).exec();
    fail(format!("cannot run {init}: {error}")).advise("init= names another program")
}

fn switch_root() -> Result<(), Failure> {
    let step = |what: &str, result: rustix::io::Result<()>| {
        result.map_err(|e| fail(format!("cannot {what}: {e}")))
    };
    for dir in ["/dev", "/proc", "/sys", "/run"] {
        let to = format!("{NEW_ROOT}{dir}");
        if !Path::new(&to).is_dir() {
            return Err(fail(format!("the root has no directory {dir}")));
        }
        step(&format!("move {dir} to the new root"), mount_move(dir, &to))?;
    }
    empty_initramfs();
    std::env::set_current_dir(NEW_ROOT)
        .map_err(|e| fail(format!("cannot enter {NEW_ROOT}: {e}")))?;
    step("make the new root /", mount_move(".", "/"))?;
    step("enter the new root", rustix::process::chroot("."))?;
    std::env::set_current_dir("/").map_err(|e| fail(format!("cannot enter /: {e}")))
}

/// Frees the memory of the initramfs. If `/` is anything but one, nothing is removed.
fn empty_initramfs() {
    const RAMFS: u64 = 0x8584_58f6;
    const TMPFS: u64 = 0x0102_1994;
    let is_memory = statfs("/").is_ok_and(|s| matches!(u64::try_from(s.f_type), Ok(RAMFS | TMPFS)));
    let Ok(root) = fs::metadata("/") else { return };
    if !is_memory {
        return;
    }
    if let Err(e) = remove_below(Path::new("/"), root.dev()) {
        debug(format_args!("some of the initramfs stays in memory: {e}"));
    }
}

/// Removes what is below `dir` on device `dev`; what is mounted there stays.
fn remove_below(dir: &Path, dev: u64) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.path().symlink_metadata()?;
        if meta.dev() != dev {
            continue;
        }
        if meta.is_dir() {
            let _ = remove_below(&entry.path(), dev);
            let _ = fs::remove_dir(entry.path());
        } else {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{symlink, PermissionsExt};

    /// What the kernel cannot follow while files are renamed, it follows at another try.
    #[test]
    fn init_is_found_while_others_rename_files() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("lib/systemd")).unwrap();
        fs::create_dir_all(root.join("sbin")).unwrap();
        let up = "../sbin/".repeat(40);
        symlink(
            format!("{up}../lib/systemd/systemd"),
            root.join("sbin/init"),
        )
        .unwrap();
        fs::write(root.join("lib/systemd/systemd"), "").unwrap();
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(root.join("lib/systemd/systemd"), mode).unwrap();
        let (one, other) = (root.join("one"), root.join("other"));
        fs::write(&one, "").unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    fs::rename(&one, &other).unwrap();
                    fs::rename(&other, &one).unwrap();
                }
            });
            let found: Vec<_> = (0..500).map(|_| find_init(root, "/sbin/init")).collect();
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(found.iter().all(Result::is_ok), "{found:?}");
        });
    }

    #[test]
    fn init_is_looked_for_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("lib/systemd")).unwrap();
        fs::create_dir_all(root.join("sbin")).unwrap();
        symlink("/lib/systemd/systemd", root.join("sbin/init")).unwrap();
        assert!(find_init(root, "/sbin/init").is_err());
        fs::write(root.join("lib/systemd/systemd"), "").unwrap();
        assert!(find_init(root, "/sbin/init")
            .unwrap_err()
            .what
            .contains("executable"));
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(root.join("lib/systemd/systemd"), mode).unwrap();
        find_init(root, "/sbin/init").unwrap();
    }

    #[test]
    fn removing_stays_on_its_device() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/c"), "").unwrap();
        let dev = fs::metadata(dir.path()).unwrap().dev();
        remove_below(dir.path(), dev + 1).unwrap();
        assert!(dir.path().join("a/b/c").exists());
        remove_below(dir.path(), dev).unwrap();
        assert!(!dir.path().join("a").exists());
    }
}
