// SPDX-License-Identifier: GPL-2.0

//! Sockets from systemd, and what it is told: `sd_listen_fds(3)` and `sd_notify(3)`. Without systemd nothing happens.

use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The sockets that systemd opened for this process.
///
/// # Errors
/// One of them is no TCP socket that listens.
pub fn listeners() -> io::Result<Vec<TcpListener>> {
    let mut passed = listenfd::ListenFd::from_env();
    let mut listeners = Vec::new();
    for at in 0..passed.len() {
        listeners.extend(passed.take_tcp_listener(at)?);
    }
    Ok(listeners)
}

/// Tells systemd how this process is: `READY=1`, `STOPPING=1` and so on, one a line.
///
/// # Errors
/// Somebody wants to be told, but cannot be.
pub fn notify(state: &str) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let socket = UnixDatagram::unbound()?;
    socket.send_to_addr(state.as_bytes(), &address(&path)?)?;
    Ok(())
}

/// A path, or a name in the abstract namespace after `@`.
fn address(path: &OsString) -> io::Result<SocketAddr> {
    match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    }
}

/// Says that a reload begins, with the time that systemd wants to know; `READY=1` says that it is done.
///
/// # Errors
/// As [`notify`].
pub fn notify_reloading() -> io::Result<()> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
    notify(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"))
}
