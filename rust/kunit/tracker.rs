// SPDX-License-Identifier: GPL-2.0

//! The fast path's two facts (see `target::tracker`).

use kernel::prelude::*;

#[kunit_tests(pristine_tracker)]
mod tests {
    use crate::shared::geometry::{Geometry, Run};
    use crate::target::Tracker;
    use kernel::prelude::*;

    /// 64 MiB: 16384 blocks, 64 extents of 256 blocks.
    fn tracker() -> Result<Tracker> {
        Tracker::new(Geometry::new(64 << 11, 12, 20).map_err(|_| EINVAL)?)
    }

    fn run(start: u64, end: u64) -> Run {
        Run { start, end }
    }

    #[test]
    fn write_ahead_cold_extent_is_not_admitted() -> Result {
        let t = tracker()?;
        assert!(!t.admit(run(5, 6)));
        assert_eq!(t.dirty_count(), 0);
        assert_eq!(t.dirty_word(0), 0);
        Ok(())
    }

    #[test]
    fn hot_extent_is_admitted_and_dirty() -> Result {
        let t = tracker()?;
        t.heat(0);
        assert!(t.admit(run(5, 7)));
        assert!(t.admit(run(5, 7)));
        assert_eq!(t.dirty_word(0), 0x60);
        assert_eq!(t.dirty_count(), 2);
        Ok(())
    }

    #[test]
    fn write_ahead_cold_again_admits_only_dirty_blocks() -> Result {
        let t = tracker()?;
        t.heat(1);
        assert!(t.admit(run(256, 260)));
        t.cool(1);
        assert!(t.admit(run(256, 260)));
        assert!(!t.admit(run(256, 261)));
        assert_eq!(t.dirty_count(), 4);
        Ok(())
    }

    #[test]
    fn write_over_two_extents_needs_both() -> Result {
        let t = tracker()?;
        t.heat(0);
        assert!(!t.admit(run(250, 260)));
        // Nothing is marked by a write that must wait.
        assert_eq!(t.dirty_count(), 0);
        t.heat(1);
        assert!(t.admit(run(250, 260)));
        assert_eq!(t.dirty_count(), 10);
        Ok(())
    }

    #[test]
    fn long_discard_over_dirty_and_hot_extents() -> Result {
        let t = tracker()?;
        t.recover(run(0, 256));
        for extent in 1..64 {
            t.heat(extent);
        }
        assert!(t.admit(run(0, 16384)));
        assert_eq!(t.dirty_count(), 16384);
        Ok(())
    }

    #[test]
    fn changed_pages_are_kept_for_each_area() -> Result {
        let t = tracker()?;
        t.heat(3);
        assert_eq!(t.take_changed(0, 0), 1);
        assert_eq!(t.take_changed(0, 0), 0);
        assert_eq!(t.take_changed(1, 0), 1);
        t.mark_all_changed(0);
        assert_eq!(t.take_changed(0, 0), 1);
        assert_eq!(t.take_changed(1, 0), 0);
        Ok(())
    }

    #[test]
    fn used_is_asked_once() -> Result {
        let t = tracker()?;
        t.heat(2);
        assert!(t.take_used(2));
        assert!(!t.take_used(2));
        assert!(t.admit(run(512, 513)));
        assert!(t.is_used(2));
        Ok(())
    }

    #[test]
    fn memory_of_a_tebibyte_is_at_most_33_mib() -> Result {
        let t = Tracker::new(Geometry::new(1 << 31, 12, 20).map_err(|_| EINVAL)?)?;
        assert!(t.bytes() <= 33 << 20);
        Ok(())
    }
}
