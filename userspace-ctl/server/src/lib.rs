// SPDX-License-Identifier: GPL-2.0

//! The HTTP server of a store, behind `pristine serve`.
//!
//! It serves what [`pristine_store`] names and nothing else: a request's path must be that of an object, of a channel's
//! pointer, of the marker, or of one of the lists (`images/`, `channels/`, `releases/<channel>/`). So there are no path tricks, and nothing
//! that a publisher is still writing is ever seen. Objects never change, and say so to caches; pointers are read whole
//! (they are moved by rename), with an ETag of their content.
//!
//! [`Server::bind`] opens the socket, so that its address is known; [`Server::run`] serves until its shutdown future is
//! done, and then finishes the answers that are under way, for at most ten seconds.

mod listing;
mod serve;

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use pristine_store::DirStore;
use tokio::net::TcpListener;

pub use serve::Access;

/// How long answers under way may take once shutdown is asked for.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// What should be served is no store.
    #[error(transparent)]
    Store(#[from] pristine_store::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// Serving ended with an error.
    #[error("cannot go on serving: {0}")]
    Serve(io::Error),
}

/// A server that listens.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: axum::Router,
}

impl Server {
    /// Opens the store in `root` and listens on `address` (port 0 for any free one). `log` gets a record of each answer.
    ///
    /// # Errors
    /// [`ServeError::Store`] and [`ServeError::Listen`].
    pub async fn bind(
        root: &Path,
        address: SocketAddr,
        log: Option<fn(&Access)>,
    ) -> Result<Self, ServeError> {
        let store = DirStore::open(root)?;
        let listen = |error| ServeError::Listen { address, error };
        let mut listener = TcpListener::bind(address).await;
        if listener.is_err() && address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
            // All addresses of a machine without IPv6.
            let all = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port());
            listener = TcpListener::bind(all).await.or(listener);
        }
        let listener = listener.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let app = serve::router(store, log);
        Ok(Server {
            listener,
            address,
            app,
        })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` is done, and then finishes what is under way.
    ///
    /// # Errors
    /// [`ServeError::Serve`].
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ServeError> {
        use axum::serve::ListenerExt;

        let listener = self.listener.tap_io(|stream| {
            // Answers are written whole; waiting to fill packets only adds latency.
            let _ = stream.set_nodelay(true);
        });
        let app = self.app.into_make_service_with_connect_info::<SocketAddr>();
        let (asked, mut was_asked) = tokio::sync::watch::channel(());
        let serve = axum::serve(listener, app).with_graceful_shutdown(async move {
            shutdown.await;
            // The receiver outlives this future.
            let _ = asked.send(());
        });
        let deadline = async move {
            // An error means that the server ended without being asked to.
            if was_asked.changed().await.is_ok() {
                tokio::time::sleep(DRAIN_TIME).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            result = serve => result.map_err(ServeError::Serve),
            () = deadline => Ok(()),
        }
    }
}

/// Done when the process gets SIGTERM or SIGINT.
///
/// # Errors
/// If the signals cannot be caught.
pub fn termination() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{signal, SignalKind};

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
    })
}
