// SPDX-License-Identifier: GPL-2.0

//! A connection that HTTP/1.1 is spoken on: how bytes and parts of objects are sent over it.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustix::fs::sendfile;
use rustix::net::{send, SendFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::pace::{Pace, Patience};
use crate::source::{Content, OpenFile, PIECE};

/// Parts up to this go out with the header, in one system call; larger ones by `sendfile`, which copies nothing.
const TOGETHER: u64 = 32 << 10;
/// How long a turn is kept while the client's window is full.
const KEEP_TURN: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(crate) enum Link {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Link {
    /// Reads some bytes to the end of `buffer`; 0 at the end of the connection.
    pub(crate) async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Link::Plain(stream) => stream.read_buf(buffer).await,
            Link::Tls(stream) => stream.read_buf(buffer).await,
        }
    }

    async fn write_some(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Link::Plain(stream) => stream.write_vectored(bytes).await,
            Link::Tls(stream) => stream.write_vectored(bytes).await,
        }
    }

    /// Sends two pieces of memory, one after the other.
    pub(crate) async fn write(
        &mut self,
        first: &[u8],
        second: &[u8],
        patience: &mut Patience,
    ) -> io::Result<()> {
        let mut slices = [IoSlice::new(first), IoSlice::new(second)];
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            let written = patience.wait(self.write_some(left)).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            patience.took(written as u64);
            IoSlice::advance_slices(&mut left, written);
        }
        if let Link::Tls(stream) = self {
            patience.wait(stream.flush()).await?;
        }
        Ok(())
    }

    /// Sends a header, and a part of an object after it.
    pub(crate) async fn send(
        &mut self,
        header: &[u8],
        content: &Content,
        range: Range<u64>,
        pace: &Pace,
        patience: &mut Patience,
    ) -> io::Result<()> {
        if let (Link::Plain(stream), Content::File(file)) = (&mut *self, content) {
            if range.end - range.start > TOGETHER {
                send_header(stream, header, patience).await?;
                return send_file(stream, file, range, pace, patience).await;
            }
        }
        let mut header = header;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + pace.most());
            let mut turn = pace.turn(end - at).await;
            while at < end {
                let piece = pace
                    .shared()
                    .memory
                    .read(content, at..end.min(at + PIECE))
                    .await?;
                let bytes = piece.as_ref();
                {
                    let write = self.write(header, bytes, patience);
                    let mut write = std::pin::pin!(write);
                    // As with sendfile: the turn is not for waiting.
                    if let Ok(done) = tokio::time::timeout(KEEP_TURN, write.as_mut()).await {
                        done?;
                    } else {
                        turn = None;
                        write.await?;
                    }
                }
                header = &[];
                at += bytes.len() as u64;
                pace.sent(bytes.len() as u64);
                if turn.is_none() && at < end {
                    turn = Some(pace.again().await);
                }
            }
        }
        Ok(())
    }

    /// Closes it so that the client gets what was sent last: a connection that is closed while the client still sends
    /// would be reset. For a moment, and not many bytes.
    pub(crate) async fn close(mut self) {
        let linger = async {
            match &mut self {
                Link::Plain(stream) => stream.shutdown().await?,
                Link::Tls(stream) => stream.shutdown().await?,
            }
            let mut rest = BytesMut::with_capacity(4096);
            for _ in 0..16 {
                rest.clear();
                if self.read(&mut rest).await? == 0 {
                    break;
                }
            }
            Ok::<_, io::Error>(())
        };
        // Whether the client is still there is its own business.
        let _ = tokio::time::timeout(Duration::from_secs(1), linger).await;
    }
}

/// Sends a header that more follows, so that both share packets.
async fn send_header(
    stream: &TcpStream,
    mut header: &[u8],
    patience: &mut Patience,
) -> io::Result<()> {
    let flags = SendFlags::MORE | SendFlags::NOSIGNAL;
    while !header.is_empty() {
        let sent = stream.try_io(Interest::WRITABLE, || Ok(send(stream, header, flags)?));
        match sent {
            Ok(sent) => header = header.get(sent..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                patience.wait(stream.writable()).await?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Lets the kernel send a part of a file.
async fn send_file(
    stream: &TcpStream,
    file: &Arc<OpenFile>,
    range: Range<u64>,
    pace: &Pace,
    patience: &mut Patience,
) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + pace.most());
        let mut turn = pace.turn(end - at).await;
        OpenFile::warm(file, at..end).await?;
        while at < end {
            let count = usize::try_from(end - at).unwrap_or(usize::MAX);
            let sent = stream.try_io(Interest::WRITABLE, || {
                let mut offset = at;
                Ok(sendfile(stream, &file.file, Some(&mut offset), count)?)
            });
            match sent {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(sent) => {
                    at += sent as u64;
                    patience.took(sent as u64);
                    pace.sent(sent as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(kept) = turn.take() {
                        let soon = tokio::time::timeout(KEEP_TURN, stream.writable()).await;
                        if let Ok(ready) = soon {
                            ready?;
                            turn = Some(kept);
                            continue;
                        }
                    }
                    patience.wait(stream.writable()).await?;
                    turn = Some(pace.again().await);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}
