// SPDX-License-Identifier: GPL-2.0

//! What checks the shared core against something simpler than itself.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`disk`] | a device in memory, and how a page of it is damaged and made to look good again |
//! | [`image`] | metadata as the formatter and the writers make it, to start from |
//! | [`lines`] | status lines from arbitrary values |
//! | [`memory`] | what the maps of blocks stand on, for one thread |
//! | [`naive`] | recovery once more, from the description of the format alone, slow and obvious |
//! | [`fuzz`] | the fuzz targets: from any bytes to an assertion |
//!
//! The fuzz targets are functions here, so that plain `cargo test` runs the corpus kept in `tests/fuzz/corpus`
//! through them (`tests/corpus.rs`); `tests/fuzz` links them with libFuzzer. The property tests are in `tests/`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod disk;
pub mod fuzz;
pub mod image;
pub mod lines;
pub mod memory;
pub mod naive;

use pristine_shared::geometry::{Geometry, Run};

/// Extents that a log announced and did not settle yet, for sinks of recovery.
#[derive(Clone, Debug, Default)]
pub struct Intents(std::collections::BTreeSet<u64>);

impl Intents {
    /// Notes extents.
    pub fn add(&mut self, extents: Run) {
        self.0.extend(extents.start..extents.end);
    }

    /// Forgets extents.
    pub fn remove(&mut self, extents: Run) {
        self.0.retain(|e| !(extents.start..extents.end).contains(e));
    }

    /// Gives the blocks of those that are left.
    pub fn take(&mut self, geometry: &Geometry) -> Vec<Run> {
        let all = std::mem::take(&mut self.0);
        all.into_iter()
            .map(|e| geometry.blocks_of_extent(e))
            .collect()
    }
}

/// The three functions of a recovery sink that keep [`Intents`] in the field `intents`.
#[macro_export]
macro_rules! sink_intents {
    () => {
        fn intend(&mut self, extents: Run) {
            self.intents.add(extents);
        }

        fn settle(&mut self, extents: Run) {
            self.intents.remove(extents);
        }

        fn conclude(&mut self, geometry: &Geometry) {
            for run in self.intents.take(geometry) {
                self.set(Plane::Dirty, run);
            }
        }
    };
}
