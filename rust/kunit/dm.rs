// SPDX-License-Identifier: GPL-2.0

//! The device-mapper layer, as far as it works without a device.

use kernel::prelude::*;

#[kunit_tests(pristine_dm)]
mod tests {
    use crate::dm::{AtomicWords, BioList, Buffer};
    use kernel::prelude::*;

    #[test]
    fn words_tell_what_changed() -> Result {
        let words = AtomicWords::new(3)?;
        assert_eq!(words.set(1, 0b1100), 0b1100);
        assert_eq!(words.set(1, 0b0110), 0b0010);
        assert_eq!(words.get(1), 0b1110);
        assert_eq!(words.clear(1, 0b0111), 0b0110);
        assert_eq!(words.get(1), 0b1000);
        // Past the end nothing is set and nothing read.
        assert_eq!(words.set(3, 1), 0);
        assert_eq!(words.get(3), 0);
        words.zero();
        assert_eq!(words.get(1), 0);
        Ok(())
    }

    #[test]
    fn buffers_know_their_length() -> Result {
        let mut one = Buffer::new(1)?;
        assert!(one.first().is_ok());
        assert!(one.pair().is_err());
        assert!(one.page(1).is_none());
        assert!(Buffer::new(0)?.first().is_err());
        Ok(())
    }

    #[test]
    fn empty_list_gives_no_bio() {
        let mut list = BioList::new();
        assert!(list.is_empty());
        assert!(list.pop().is_none());
        list.append(BioList::new());
        assert!(list.take().is_empty());
    }
}
