// SPDX-License-Identifier: GPL-2.0

//! Compressed streams: .xz, .zst and .gz, by their first bytes.

use std::io::{self, BufReader, Read};

use flate2::read::MultiGzDecoder;
use liblzma::read::XzDecoder;
use liblzma::stream::{Stream, CONCATENATED};

use crate::error::{Error, Result};
use crate::input::Input;
use crate::xz;

/// The largest window of a zstd frame, as a power of two: 1 GiB, as much as for .xz.
const ZSTD_WINDOW_LOG: u32 = 30;

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// .xz
    Xz,
    /// .zst
    Zstd,
    /// .gz
    Gzip,
}

impl Compression {
    /// By a file's first bytes (4 at least).
    pub fn detect(head: &[u8]) -> Option<Self> {
        if head.starts_with(xz::MAGIC) {
            return Some(Compression::Xz);
        }
        if head.starts_with(&[0x1f, 0x8b, 8]) {
            return Some(Compression::Gzip);
        }
        let magic = head.first_chunk().map(|first| u32::from_le_bytes(*first))?;
        // A file may begin with a skippable frame; but zstd is the only one to know what those are.
        let zstd = magic == 0xfd2f_b528 || (0x184d_2a50..=0x184d_2a5f).contains(&magic);
        zstd.then_some(Compression::Zstd)
    }

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Xz => "xz",
            Compression::Zstd => "zstd",
            Compression::Gzip => "gzip",
        }
    }

    /// A reader of what an input unpacks to, from the first byte to the last.
    pub(crate) fn unpack(self, input: &Input) -> Result<Unpack> {
        let source = input.sequential();
        let inner: Box<dyn Read> = match self {
            Compression::Xz => {
                let stream = Stream::new_stream_decoder(xz::MEMORY_LIMIT, CONCATENATED)
                    .map_err(|error| xz::lzma_error(input.name.clone(), &error))?;
                Box::new(XzDecoder::new_stream(BufReader::new(source), stream))
            }
            Compression::Gzip => Box::new(MultiGzDecoder::new(BufReader::new(source))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::Decoder::new(source)
                    .map_err(|error| Error::io("set up zstd", error))?;
                decoder
                    .window_log_max(ZSTD_WINDOW_LOG)
                    .map_err(|error| Error::io("set up zstd", error))?;
                Box::new(decoder)
            }
        };
        Ok(Unpack {
            name: input.name.clone(),
            compression: self,
            inner,
        })
    }
}

/// Reads what a compressed input unpacks to.
pub(crate) struct Unpack {
    name: String,
    compression: Compression,
    inner: Box<dyn Read>,
}

impl Read for Unpack {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| self.explain(error))
    }
}

impl Unpack {
    /// What the decoders say is about the data, unless it is an error of the input below, or of the system.
    fn explain(&self, error: io::Error) -> io::Error {
        let ours = error.get_ref().is_some_and(|inner| inner.is::<Error>());
        if ours || error.raw_os_error().is_some() {
            return error;
        }
        if let Some(lzma) = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>())
        {
            return xz::lzma_error(self.name.clone(), lzma).into();
        }
        let why = match error.kind() {
            io::ErrorKind::UnexpectedEof => "it is cut".to_owned(),
            _ => format!("{} says: {error}", self.compression.name()),
        };
        Error::damaged(self.name.clone(), why).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressions_are_known_by_their_first_bytes() {
        let zst = zstd::bulk::compress(b"content", 1).unwrap();
        assert_eq!(Compression::detect(&zst), Some(Compression::Zstd));
        assert_eq!(
            Compression::detect(b"\xfd7zXZ\0\0\x04"),
            Some(Compression::Xz)
        );
        assert_eq!(
            Compression::detect(b"\x1f\x8b\x08\0"),
            Some(Compression::Gzip)
        );
        for other in [&b""[..], b"\xfd", b"QFI\xfb", &[0; 64]] {
            assert_eq!(Compression::detect(other), None);
        }
    }
}
