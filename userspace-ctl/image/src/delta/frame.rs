// SPDX-License-Identifier: GPL-2.0

//! Unpacking a frame of a delta.

use zstd::zstd_safe::{get_error_name, DCtx};

use super::{MAX_CONTENT_BLOCKS, MAX_REFERENCE_BLOCKS};
use crate::error::FormatError;
use crate::BLOCK_SIZE;

/// Unpacks a frame that must hold exactly `blocks` blocks, against the content of its reference blocks.
///
/// A frame carries zstd's checksum of its content, so that references which are not those that it was made with show
/// here. A frame that yields more than it should is refused before it costs memory.
///
/// # Errors
/// [`FormatError::Invalid`] if it is no frame of that many blocks, or not with these references.
pub fn decode_frame(frame: &[u8], references: &[u8], blocks: u64) -> Result<Vec<u8>, FormatError> {
    let invalid = |why: String| FormatError::invalid("a frame of a delta", why);
    if blocks == 0
        || blocks > MAX_CONTENT_BLOCKS
        || references.len() as u64 > MAX_REFERENCE_BLOCKS * BLOCK_SIZE as u64
    {
        return Err(invalid(format!("it would hold {blocks} blocks")));
    }
    let zstd_says = |code| invalid(format!("zstd says: {}", get_error_name(code)));
    let len = blocks as usize * BLOCK_SIZE;
    let mut data = Vec::with_capacity(len);
    let mut context = DCtx::try_create().ok_or_else(|| invalid("no memory for zstd".to_owned()))?;
    context.ref_prefix(references).map_err(zstd_says)?;
    // Decoded in one go, so the window that a frame asks for costs nothing beyond the two buffers.
    context.decompress(&mut data, frame).map_err(zstd_says)?;
    if data.len() != len {
        let why = format!("it holds {} bytes, not {len}", data.len());
        return Err(invalid(why));
    }
    Ok(data)
}
