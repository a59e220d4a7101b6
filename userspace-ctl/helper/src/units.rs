// SPDX-License-Identifier: GPL-2.0

//! Device blocks and image blocks: the former may be several of the latter.

use std::ops::Range;

use pristine_image::BLOCK_SIZE;

/// The two block sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Units {
    per_block: u64,
}

impl Units {
    /// For a device whose blocks are of `1 << block_shift` bytes; `None` if that is no multiple of the image's.
    pub fn new(block_shift: u32) -> Option<Self> {
        let bytes = 1u64.checked_shl(block_shift)?;
        // CAST: 4096.
        let image = BLOCK_SIZE as u64;
        (bytes >= image).then_some(Self {
            per_block: bytes / image,
        })
    }

    /// Bytes of a device block.
    pub fn bytes(self) -> u64 {
        self.per_block * BLOCK_SIZE as u64 // CAST: 4096.
    }

    /// Image blocks in a device block.
    pub fn per_block(self) -> u64 {
        self.per_block
    }

    /// The image blocks in device blocks.
    pub fn image(self, device: Range<u64>) -> Range<u64> {
        device.start.saturating_mul(self.per_block)..device.end.saturating_mul(self.per_block)
    }

    /// The device blocks that lie in image blocks as a whole or in part, of `blocks` in all.
    pub fn device(self, image: Range<u64>, blocks: u64) -> Range<u64> {
        let end = image.end.div_ceil(self.per_block).min(blocks);
        (image.start / self.per_block).min(end)..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_several() {
        assert_eq!(Units::new(9), None);
        let same = Units::new(12).unwrap();
        assert_eq!((same.image(3..5), same.device(3..5, 4)), (3..5, 3..4));
        let four = Units::new(14).unwrap();
        assert_eq!((four.bytes(), four.per_block()), (16384, 4));
        assert_eq!(four.image(3..5), 12..20);
        assert_eq!(four.device(5..9, 100), 1..3);
        assert_eq!(four.device(500..900, 100), 100..100);
    }
}
