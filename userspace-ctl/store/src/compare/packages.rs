// SPDX-License-Identifier: GPL-2.0

//! Debian packages in an image: their versions from `/var/lib/dpkg/status`, their files from
//! `/var/lib/dpkg/info/*.list`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use pristine_image::fs::ext4::Files;
use pristine_image::fs::FsError;
use pristine_image::ReadAt;

use super::files::{prefetch, FileChange};

const STATUS: &str = "/var/lib/dpkg/status";
const INFO: &str = "/var/lib/dpkg/info/";

/// A package that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageChange {
    /// Its name.
    pub package: String,
    /// Its version in the old image.
    pub old: Option<String>,
    /// Its version in the new image.
    pub new: Option<String>,
    /// Files of it that were added, removed or changed.
    pub files: u64,
    /// Blocks of its files that differ from what was at their places.
    pub blocks: u64,
    /// Blocks of its files whose content the old image does not have.
    pub new_blocks: u64,
}

/// The packages of an image.
pub(super) struct Packages {
    versions: BTreeMap<String, String>,
    /// By path.
    owners: HashMap<String, String>,
}

impl Packages {
    /// The package that a file belongs to.
    pub(super) fn owner(&self, path: &str) -> Option<String> {
        // Packages still say /lib where /usr/lib is.
        let short = path.strip_prefix("/usr");
        let owner = self.owners.get(path).or_else(|| self.owners.get(short?));
        owner.cloned()
    }
}

/// The packages of an image; `None` if it has no dpkg.
pub(super) fn read(files: &Files, disk: &dyn ReadAt) -> Result<Option<Packages>, FsError> {
    let Some(status) = files.find(STATUS) else {
        return Ok(None);
    };
    let lists = files
        .under(INFO)
        .filter(|file| file.path.ends_with(".list"));
    let lists: Vec<_> = lists.collect();
    let mut wanted = lists.clone();
    wanted.push(status);
    prefetch(disk, &wanted)?;
    let text = files.content(disk, status)?;
    let versions = parse_status(&String::from_utf8_lossy(&text));
    let mut owners = HashMap::new();
    for list in lists {
        let name = list.path.trim_start_matches(INFO).trim_end_matches(".list");
        // Packages that can be there for several architectures have one of them in the name.
        let name = name.split(':').next().unwrap_or(name);
        let text = files.content(disk, list)?;
        for path in String::from_utf8_lossy(&text).lines() {
            owners.insert(path.to_owned(), name.to_owned());
        }
    }
    Ok(Some(Packages { versions, owners }))
}

/// Names and versions of what is installed.
fn parse_status(text: &str) -> BTreeMap<String, String> {
    let mut versions = BTreeMap::new();
    for paragraph in text.split("\n\n") {
        let field = |key: &str| {
            let line = paragraph.lines().find_map(|line| line.strip_prefix(key));
            line.map(str::trim)
        };
        let installed = field("Status:").is_some_and(|status| status.ends_with(" installed"));
        if let (Some(name), Some(version), true) = (field("Package:"), field("Version:"), installed)
        {
            versions.insert(name.to_owned(), version.to_owned());
        }
    }
    versions
}

/// Packages whose version or whose files differ.
pub(super) fn differences(
    old: &Packages,
    new: &Packages,
    files: &[FileChange],
) -> Vec<PackageChange> {
    let mut changes: BTreeMap<String, PackageChange> = BTreeMap::new();
    let change = |package: &str| PackageChange {
        package: package.to_owned(),
        old: old.versions.get(package).cloned(),
        new: new.versions.get(package).cloned(),
        files: 0,
        blocks: 0,
        new_blocks: 0,
    };
    let names: BTreeSet<&String> = old.versions.keys().chain(new.versions.keys()).collect();
    for name in names {
        if old.versions.get(name) != new.versions.get(name) {
            changes.insert(name.clone(), change(name));
        }
    }
    for file in files.iter().filter(|file| !file.path.ends_with('/')) {
        let Some(package) = &file.package else {
            continue;
        };
        let moved = file.status == super::FileStatus::Moved;
        if moved && !changes.contains_key(package) {
            continue;
        }
        let entry = changes
            .entry(package.clone())
            .or_insert_with(|| change(package));
        entry.files += u64::from(!moved);
        entry.blocks += file.blocks;
        entry.new_blocks += file.new;
    }
    let mut changes: Vec<_> = changes.into_values().collect();
    changes.sort_by_key(|change| (std::cmp::Reverse(change.new_blocks), change.package.clone()));
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_file_is_read() {
        let text =
            "Package: a\nStatus: install ok installed\nVersion: 1:2-3\nDescription: x\n more\n\n\
                    Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n\
                    Package: b\nArchitecture: all\nStatus: install ok installed\nVersion: 4\n";
        let versions = parse_status(text);
        assert_eq!(versions.len(), 2);
        assert_eq!(
            (versions["a"].as_str(), versions["b"].as_str()),
            ("1:2-3", "4")
        );
    }
}
