// SPDX-License-Identifier: GPL-2.0

//! Loading kernel modules with what they depend on, without a program to be installed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::system::{finit_module, uname};

use crate::error::{Error, Result};
use crate::kmsg::Mark;

/// The module of the target, as `/sys/module` has it.
pub const MODULE: &str = "dm_pristine";

/// The kernel decompresses the file itself (MODULE_INIT_COMPRESSED_FILE).
const COMPRESSED: i32 = 4;

/// The release of the running kernel.
pub fn running_kernel() -> String {
    uname().release().to_string_lossy().into_owned()
}

/// Where the modules of the running kernel are installed.
pub fn default_dir() -> PathBuf {
    Path::new("/lib/modules").join(running_kernel())
}

/// Whether a module is loaded or built in.
pub fn is_loaded(name: &str) -> bool {
    Path::new("/sys/module").join(kernel_name(name)).exists()
}

/// A module is `dm-pristine` in file names and `dm_pristine` in the kernel.
fn kernel_name(name: &str) -> String {
    name.replace('-', "_")
}

/// Loads the target's module unless it is loaded: from `from` if that is a file; otherwise by name from the modules
/// directory `from`, by default that of the running kernel.
///
/// # Errors
///
/// [`Error::WrongKernel`] naming both kernels, [`Error::ModuleNotFound`], [`Error::ModuleLoad`].
pub fn load(from: Option<&Path>) -> Result {
    if is_loaded(MODULE) {
        return Ok(());
    }
    match from {
        Some(path) if !path.is_dir() => load_file(path, None),
        dir => load_by_name(MODULE, dir),
    }
}

/// Loads a module by its name and, first, those that it depends on, as `modules.dep` in `dir` has them.
///
/// # Errors
///
/// As [`load`].
pub fn load_by_name(name: &str, dir: Option<&Path>) -> Result {
    if is_loaded(name) {
        return Ok(());
    }
    let dir = dir.map_or_else(default_dir, Path::to_path_buf);
    let listed = fs::read_to_string(dir.join("modules.dep")).unwrap_or_default();
    if let Some(files) = dependencies(&listed, name) {
        for file in files {
            let path = dir.join(&file);
            if !is_loaded(&module_of(&path)) {
                insert(&path)?;
            }
        }
        return Ok(());
    }
    // Not listed: a directory without depmod's lists, such as an initramfs or a build directory.
    let dashed = name.replace('_', "-");
    for base in [name, dashed.as_str()] {
        for suffix in ["ko", "ko.xz", "ko.zst", "ko.gz"] {
            let path = dir.join(format!("{base}.{suffix}"));
            if path.is_file() {
                return load_file(&path, Some(&dir));
            }
        }
    }
    Err(Error::ModuleNotFound {
        name: name.into(),
        dir,
    })
}

/// Loads a module from its file and, first, those that it says it needs.
fn load_file(path: &Path, dir: Option<&Path>) -> Result {
    let info = Info::of(path)?;
    for needed in &info.depends {
        if is_loaded(needed) {
            continue;
        }
        let here = load_by_name(needed, dir);
        match (here, dir) {
            (Ok(()), _) => {}
            // Beside the file there may be nothing; the running kernel's own are elsewhere.
            (Err(_), Some(_)) => load_by_name(needed, None)?,
            (Err(e), None) => return Err(e),
        }
    }
    insert(path)
}

/// The files to insert for `name`, in their order; `None` if the list does not have it.
fn dependencies(listed: &str, name: &str) -> Option<Vec<String>> {
    let wanted = kernel_name(name);
    let line = listed.lines().find(|line| {
        line.split_once(':')
            .is_some_and(|(file, _)| module_of(Path::new(file)) == wanted)
    })?;
    let (file, needs) = line.split_once(':')?;
    // What depends on nothing comes last in modules.dep.
    let mut files: Vec<String> = needs.split_whitespace().rev().map(Into::into).collect();
    files.push(file.into());
    Some(files)
}

/// The kernel's name of the module in a file.
fn module_of(path: &Path) -> String {
    let file = path.file_name().map(|f| f.to_string_lossy().into_owned());
    kernel_name(file.unwrap_or_default().split('.').next().unwrap_or(""))
}

fn insert(path: &Path) -> Result {
    Info::of(path)?.check(path)?;
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let flags = if is_compressed(path) { COMPRESSED } else { 0 };
    let mark = Mark::now();
    match finit_module(&file, c"", flags) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(Errno::PERM) => Err(Error::Denied {
            action: format!("load the kernel module {}", path.display()),
        }),
        Err(e) => Err(Error::ModuleLoad {
            path: path.into(),
            source: io::Error::from(e),
            kernel: mark.since(),
        }),
    }
}

fn is_compressed(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| ["xz", "zst", "gz"].iter().any(|known| e == *known))
}

/// What a module says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
struct Info {
    vermagic: Option<String>,
    depends: Vec<String>,
}

impl Info {
    /// Reads it from the `.modinfo` strings; of a compressed module nothing is known.
    fn of(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
        if is_compressed(path) {
            return Ok(Self::default());
        }
        if !bytes.starts_with(b"\x7fELF") {
            return Err(Error::NotAModule { path: path.into() });
        }
        let field = |key: &str| {
            let needle: Vec<u8> = [b"\0", key.as_bytes(), b"="].concat();
            let at = bytes.windows(needle.len()).position(|w| w == needle)?;
            let value = bytes.get(at + needle.len()..)?;
            let end = value.iter().position(|b| *b == 0)?;
            Some(String::from_utf8_lossy(value.get(..end)?).into_owned())
        };
        Ok(Self {
            vermagic: field("vermagic"),
            depends: field("depends")
                .unwrap_or_default()
                .split(',')
                .filter(|d| !d.is_empty())
                .map(Into::into)
                .collect(),
        })
    }

    /// Refuses a module of another kernel before the kernel does, with both names.
    fn check(&self, path: &Path) -> Result {
        let Some(vermagic) = &self.vermagic else {
            return Ok(());
        };
        let built_for = vermagic.split(' ').next().unwrap_or("").to_owned();
        let running = running_kernel();
        if built_for == running {
            return Ok(());
        }
        Err(Error::WrongKernel {
            path: path.into(),
            built_for,
            running,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first() {
        let listed = "kernel/drivers/md/dm-mod.ko.xz: kernel/drivers/dax/dax.ko.xz\n\
                      kernel/drivers/md/dm-x.ko.xz: kernel/drivers/md/dm-mod.ko.xz kernel/drivers/dax/dax.ko.xz\n\
                      kernel/drivers/dax/dax.ko.xz:\n";
        assert_eq!(
            dependencies(listed, "dm_x").unwrap(),
            [
                "kernel/drivers/dax/dax.ko.xz",
                "kernel/drivers/md/dm-mod.ko.xz",
                "kernel/drivers/md/dm-x.ko.xz"
            ]
        );
        assert_eq!(dependencies(listed, "dax").unwrap().len(), 1);
        assert!(dependencies(listed, "dm").is_none());
    }

    #[test]
    fn a_wrong_kernel_for_the_module_names_both() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dm-pristine.ko");
        fs::write(
            &path,
            b"\x7fELF....\0depends=dm-mod\0vermagic=1.2.3-other SMP preempt \0",
        )
        .unwrap();
        let info = Info::of(&path).unwrap();
        assert_eq!(info.depends, ["dm-mod"]);
        let text = info.check(&path).unwrap_err().to_string();
        assert!(text.contains("1.2.3-other"), "{text}");
        assert!(text.contains(&running_kernel()), "{text}");
        fs::write(&path, b"hello").unwrap();
        assert!(matches!(Info::of(&path), Err(Error::NotAModule { .. })));
    }
}
