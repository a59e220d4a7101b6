// SPDX-License-Identifier: GPL-2.0

//! From compressed frames, in order, to packs and the frame table. Runs in a thread of its own, so that hashing and
//! writing packs overlaps with making frames.

use std::io;
use std::sync::mpsc::Receiver;

use super::BuildError;
use crate::digest::PackId;
use crate::manifest::FrameTable;
use crate::pack::PackWriter;

/// Takes finished packs; implemented by stores.
pub trait PackSink: Send {
    /// Takes a pack. The same pack may come again when a build is repeated.
    ///
    /// # Errors
    /// Any error ends the build.
    fn pack(&mut self, id: &PackId, bytes: &[u8]) -> io::Result<()>;
}

/// A compressed frame.
pub(super) struct FrameBytes {
    pub(super) bytes: Vec<u8>,
    pub(super) blocks: u32,
}

/// What the packer has made.
#[derive(Default)]
pub(super) struct Packed {
    pub(super) table: FrameTable,
    pub(super) bytes: u64,
}

/// Writes packs of at least `target` bytes (the last may be smaller) until the channel ends.
pub(super) fn run(
    frames: Receiver<Vec<FrameBytes>>,
    target: u64,
    sink: &mut dyn PackSink,
) -> Result<Packed, BuildError> {
    let mut packed = Packed::default();
    let mut pack = PackWriter::new();
    for frame in frames.into_iter().flatten() {
        let offset = pack.push(&frame.bytes, frame.blocks)?;
        let len = frame.bytes.len() as u32;
        packed.table.push_frame(offset, len, frame.blocks)?;
        if pack.len() >= target {
            end_pack(std::mem::take(&mut pack), &mut packed, sink)?;
        }
    }
    if !pack.is_empty() {
        end_pack(pack, &mut packed, sink)?;
    }
    Ok(packed)
}

fn end_pack(
    pack: PackWriter,
    packed: &mut Packed,
    sink: &mut dyn PackSink,
) -> Result<(), BuildError> {
    let (id, bytes) = pack.finish();
    sink.pack(&id, &bytes).map_err(BuildError::Sink)?;
    packed.bytes += bytes.len() as u64;
    packed.table.end_pack(id, bytes.len() as u64)?;
    Ok(())
}
