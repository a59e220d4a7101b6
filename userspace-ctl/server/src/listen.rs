// SPDX-License-Identifier: GPL-2.0

//! Listening, accepting, and ending in good order.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pristine_store::Store;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::connection::{self, Stop};
use crate::error::ServeError;
use crate::http1;
use crate::metrics::{Metrics, Refusal};
use crate::settings::Settings;
use crate::shared::{Live, Logs, Shared};
use crate::source::{Dir, Source, Upstream};

/// Connections to the metrics at a time.
const METRICS_CONNECTIONS: usize = 16;
/// When no connection can be accepted, for want of memory or files, it is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What is served.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A store in a directory.
    Directory(PathBuf),
    /// Another store, which the server is a cache of.
    Upstream(Arc<dyn Store>),
}

/// How to serve it.
#[derive(Debug)]
pub struct Options {
    /// Addresses to listen on; port 0 for any free one.
    pub listen: Vec<SocketAddr>,
    /// Sockets that listen already.
    pub listeners: Vec<std::net::TcpListener>,
    /// Where Prometheus finds `/metrics`, in plain HTTP and for everybody who can reach it.
    pub metrics: Option<SocketAddr>,
    /// Bytes of memory for what comes from another store. Default 256 MiB.
    pub cache: u64,
    /// Bytes of memory for what is on its way to clients, where the kernel does not send by itself (TLS, HTTP/2, a
    /// cache). Default 64 MiB.
    pub buffers: u64,
    /// What can be changed later.
    pub settings: Settings,
    /// Who is told what happens.
    pub logs: Logs,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            listen: Vec::new(),
            listeners: Vec::new(),
            metrics: None,
            cache: 256 << 20,
            buffers: 64 << 20,
            settings: Settings::default(),
            logs: Logs::default(),
        }
    }
}

/// A server that listens.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
    metrics: Option<(TcpListener, SocketAddr)>,
    shared: Arc<Shared>,
}

/// Changes a server while it runs.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Takes new settings into use, and reads the rules and certificates that they name. Connections stay; requests that
    /// come after this see the new ones.
    ///
    /// # Errors
    /// Something is wrong with them; then nothing changes.
    pub fn reload(&self, settings: Settings) -> Result<(), ServeError> {
        self.0.reload(settings)
    }

    /// What was counted, in Prometheus' text format.
    pub fn metrics(&self) -> String {
        self.0.metrics_text()
    }
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServeError> {
    let fail = |error| ServeError::Listen { address, error };
    let mut listener = TcpListener::bind(address).await;
    if listener.is_err() && address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        // All addresses of a machine without IPv6.
        let all = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port());
        listener = TcpListener::bind(all).await.or(listener);
    }
    let listener = listener.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    Ok((listener, address))
}

impl Server {
    /// Opens what is to be served, and listens.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn bind(origin: Origin, options: Options) -> Result<Self, ServeError> {
        let metrics = Arc::new(Metrics::default());
        let source = match origin {
            Origin::Directory(root) => Source::Dir(Arc::new(Dir::new(&root)?)),
            Origin::Upstream(store) => {
                let upstream = Upstream::new(store, options.cache, Arc::clone(&metrics));
                Source::Upstream(Arc::new(upstream))
            }
        };
        let live = Live::read(options.settings)?;
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for listener in options.listeners {
            let listener = listener
                .set_nonblocking(true)
                .and_then(|()| TcpListener::from_std(listener))
                .map_err(ServeError::Serve)?;
            addresses.push(listener.local_addr().map_err(ServeError::Serve)?);
            listeners.push(listener);
        }
        for address in options.listen {
            let (listener, address) = listen(address).await?;
            listeners.push(listener);
            addresses.push(address);
        }
        let for_metrics = match options.metrics {
            Some(address) => Some(listen(address).await?),
            None => None,
        };
        let shared = Shared::new(source, live, metrics, options.buffers, options.logs);
        Ok(Server {
            listeners,
            addresses,
            metrics: for_metrics,
            shared: Arc::new(shared),
        })
    }

    /// The addresses that it listens on.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Where its metrics are.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(|(_, address)| *address)
    }

    /// To change it while it runs.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    /// Serves until `shutdown` is done, and then finishes what is under way.
    ///
    /// # Errors
    /// [`ServeError::Serve`].
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), ServeError> {
        let (ask, asked) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for listener in self.listeners {
            let shared = Arc::clone(&self.shared);
            tasks.spawn(accept(shared, listener, Stop(asked.clone())));
        }
        if let Some((listener, _)) = self.metrics {
            let shared = Arc::clone(&self.shared);
            tasks.spawn(accept_metrics(shared, listener, Stop(asked.clone())));
        }
        shutdown.await;
        // The tasks hold receivers.
        let _ = ask.send(true);
        while let Some(done) = tasks.join_next().await {
            done.map_err(|error| ServeError::Serve(io::Error::other(error)))?;
        }
        Ok(())
    }
}

/// Accepts connections until it is asked to stop, and waits for them to end, but not for ever.
async fn accept(shared: Arc<Shared>, listener: TcpListener, mut stop: Stop) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.asked() => break,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, peer)) = accepted else {
            // A client that has gone already, or no room for one more.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let live = shared.live();
        if connections.len() >= live.settings.connections {
            shared.metrics.refused(Refusal::Connections);
            connection::refuse(&stream, live.tls.is_some());
            continue;
        }
        let shared = Arc::clone(&shared);
        connections.spawn(connection::serve(shared, stream, peer, stop.clone()));
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    // Those that are left are dropped with the set.
    let _ = timeout(shared.live().settings.drain_time, all).await;
}

async fn accept_metrics(shared: Arc<Shared>, listener: TcpListener, mut stop: Stop) {
    let mut connections: JoinSet<()> = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.asked() => return,
            accepted = listener.accept(), if connections.len() < METRICS_CONNECTIONS => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let (shared, stop) = (Arc::clone(&shared), stop.clone());
                connections.spawn(metrics(shared, stream, stop));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn metrics(shared: Arc<Shared>, stream: TcpStream, stop: Stop) {
    http1::serve_text(&shared, stream, stop, |path| {
        (path == "/metrics").then(|| shared.metrics_text())
    })
    .await;
}
