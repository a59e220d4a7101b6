// SPDX-License-Identifier: GPL-2.0

//! A neighbour that says that it has all of an image, and then does as it is told.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use pristine_store::peers::wire::{Answer, Ask, Entry, Request, Status, ENTRY_LEN, REQUEST_LEN};
use pristine_store::peers::SECTION;

/// Starts a neighbour on a free port of 127.0.0.1, which lives as long as the program. It has an image of `blocks` blocks,
/// and calls `act` with each request for blocks; the connection ends when that returns false.
///
/// # Errors
/// If no port can be opened.
pub fn fake_peer(
    blocks: u64,
    act: impl Fn(&mut TcpStream, &[Entry]) -> bool + Send + Sync + 'static,
) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let act = Arc::new(act);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let act = Arc::clone(&act);
            // The other side is gone, or has had enough.
            std::thread::spawn(move || serve(stream, blocks, act.as_ref()));
        }
    });
    Ok(address)
}

fn serve(
    mut stream: TcpStream,
    blocks: u64,
    act: &dyn Fn(&mut TcpStream, &[Entry]) -> bool,
) -> io::Result<()> {
    loop {
        let mut header = [0; REQUEST_LEN];
        stream.read_exact(&mut header)?;
        let request = Request::decode(&header).map_err(io::Error::other)?;
        match request.ask {
            Ask::Map { .. } => {
                let sections = blocks.div_ceil(SECTION);
                let bits = vec![0xff; sections.div_ceil(8) as usize];
                let answer = Answer {
                    status: Status::Ok,
                    len: bits.len() as u32,
                    mask: sections,
                };
                stream.write_all(&answer.encode())?;
                stream.write_all(&bits)?;
            }
            Ask::Blocks(count) => {
                let mut entries = Vec::new();
                for _ in 0..count {
                    let mut entry = [0; ENTRY_LEN];
                    stream.read_exact(&mut entry)?;
                    entries.push(Entry::decode(&entry));
                }
                if !act(&mut stream, &entries) {
                    return Ok(());
                }
            }
        }
    }
}
