// SPDX-License-Identifier: GPL-2.0

//! `pristine serve`

mod config;

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;
use pristine_server::{
    raise_file_limit, systemd, termination, Access, Handle, Logs, Options, Origin, PeerSettings,
    ServeError, Server, Settings, TlsFiles,
};
use serde::Serialize;
use tokio::signal::unix::{signal, SignalKind};

use crate::exit::{Code, Failure, Outcome};
use crate::image::parse_size;
use crate::ui::Ui;

/// Files that are open besides those of connections.
const OTHER_FILES: u64 = 400;

/// Arguments of `pristine serve`.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = "\
Examples:
  pristine serve /srv/store
  pristine serve /srv/store --listen :8080          on all addresses
  pristine serve /srv/store --listen 127.0.0.1:0 --port-file port
  pristine serve /srv/store --listen :8443 --tls-cert cert.pem --tls-key key.pem --access access
  pristine serve http://master.example:8080 --listen :8080 --cache 2G       a cache of another server
  pristine serve /srv/store --listen :8080 --peers          machines share blocks among themselves
  pristine serve /srv/store --config /etc/pristine/serve.conf

Prints the URL once it listens, then serves until SIGTERM or SIGINT, and finishes what is under way. On SIGHUP it reads \
the configuration file, the access rules and the certificates again, and keeps all connections; if anything is wrong with \
them, it says so and goes on with the old ones. Under systemd it takes its sockets and says when it is ready.

Only objects of the store are served; any other path is 404. Clients verify each block, so plain HTTP suffices for \
integrity, but without --access anyone who can reach the port can read the images.

The access rules have a line for each credential; `pristine token new` writes those of tokens:
  token NAME blake3:HASH CHANNEL...         sent as `Authorization: Bearer TOKEN`
  certificate NAME CHANNEL...               a client certificate with this DNS name, e-mail address or common name
  anonymous CHANNEL...                      for who shows neither
`*` is all channels. Who may read a channel may read exactly the images and packs that its generations are made of.

The configuration file has a line for each option, without the dashes: `listen = :8080`. The command line wins. \
Addresses, the store, --cache and --threads are those of the start, all else can be changed by SIGHUP.

When more answers than --active are to be sent, clients take turns: one with many connections gets no more than one with \
a single one. A client is an IPv4 address or a /64 of IPv6.

With --peers a machine may announce that it has an image, and gets a few others that do; who may read an image may ask. \
What machines send each other is verified like everything else, and does not pass through here.

JSON fields (printed once it listens): url, address, port, store, and metrics if there are any.")]
pub struct ServeArgs {
    /// The store: a directory, or the URL of another store to be a cache of
    store: String,
    /// Address and port; `:PORT` for all addresses, port 0 for any free one; may be repeated [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    listen: Vec<SocketAddr>,
    /// Write the (first) port to this file once it listens
    #[arg(long, value_name = "FILE")]
    port_file: Option<PathBuf>,
    /// Write a line to stderr for each answer
    #[arg(long)]
    access_log: bool,
    /// Serve metrics for Prometheus there, at /metrics
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    metrics: Option<SocketAddr>,
    /// A file with these options, read again on SIGHUP
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Threads that serve [default: one for each CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Memory for what comes from another store
    #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "256M")]
    cache: u64,

    /// Speak TLS with this certificate (PEM, with those between it and the root)
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_key",
        help_heading = "Access"
    )]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_cert",
        help_heading = "Access"
    )]
    tls_key: Option<PathBuf>,
    /// Who signs certificates of clients (PEM)
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_cert",
        help_heading = "Access"
    )]
    tls_client_ca: Option<PathBuf>,
    /// Who may read what; without it everybody may read everything
    #[arg(long, value_name = "FILE", help_heading = "Access")]
    access: Option<PathBuf>,

    /// Connections at a time, on each address
    #[arg(
        long,
        value_name = "N",
        default_value = "4096",
        help_heading = "Limits"
    )]
    connections: NonZeroU32,
    /// Connections at a time of one client
    #[arg(long, value_name = "N", default_value = "256", help_heading = "Limits")]
    client_connections: NonZeroU32,
    /// Requests per second of one client; a few more wait, more than that get 429 [default: no limit]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    client_requests: Option<NonZeroU32>,
    /// Bytes per second to one client; 20M, 500K [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = parse_size, help_heading = "Limits")]
    client_rate: Option<u64>,
    /// Bytes per second to all clients [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = parse_size, help_heading = "Limits")]
    rate: Option<u64>,
    /// Answers that are sent at the same time
    #[arg(long, value_name = "N", default_value = "64", help_heading = "Limits")]
    active: NonZeroU32,
    /// Seconds for a TLS handshake, and for a request once it began
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "10")]
    #[arg(help_heading = "Limits")]
    header_time: Duration,
    /// Seconds that a connection may be without a request
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "60")]
    #[arg(help_heading = "Limits")]
    idle_time: Duration,
    /// Seconds that a client may take nothing of an answer
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "30")]
    #[arg(help_heading = "Limits")]
    stall_time: Duration,
    /// Seconds for answers under way after SIGTERM
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "10")]
    #[arg(help_heading = "Limits")]
    drain_time: Duration,

    /// Introduce machines that have an image (pristine.peers=on) to each other, so that they take blocks from each other
    #[arg(long, help_heading = "Peers")]
    peers: bool,
    /// Seconds that an announcement counts; machines repeat it after a third of this
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "60")]
    #[arg(help_heading = "Peers")]
    peers_lease: Duration,
    /// Announcements at a time, of all machines and images
    #[arg(
        long,
        value_name = "N",
        default_value = "65536",
        help_heading = "Peers"
    )]
    peers_total: NonZeroU32,
    /// A network whose machines may announce others than themselves; may be repeated [default: none]
    #[arg(long, value_name = "NETWORK", help_heading = "Peers")]
    peers_announcers: Vec<IpNet>,
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix(':') {
        let port = port.parse().map_err(|_| "the port must be 0 to 65535")?;
        return Ok(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
    }
    text.parse()
        .map_err(|_| "give ADDRESS:PORT, like 127.0.0.1:8080, [::1]:8080 or :8080".to_owned())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| format!("{text} is not a number of seconds"))?;
    match (0.001..=86_400.0).contains(&seconds) {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err(format!("{text} is not between 0.001 and 86400 seconds")),
    }
}

impl ServeArgs {
    fn settings(&self) -> Settings {
        let tls = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Some(TlsFiles {
                certificate: certificate.clone(),
                key: key.clone(),
                client_ca: self.tls_client_ca.clone(),
            }),
            _ => None,
        };
        let mut settings = Settings::default();
        settings.access = self.access.clone();
        settings.tls = tls;
        settings.connections = self.connections.get() as usize;
        settings.client_connections = self.client_connections.get() as usize;
        settings.client_requests = self.client_requests.map(|n| n.get().into());
        settings.client_bytes = self.client_rate;
        settings.total_bytes = self.rate;
        settings.active = self.active.get() as usize;
        settings.header_time = self.header_time;
        settings.idle_time = self.idle_time;
        settings.stall_time = self.stall_time;
        settings.drain_time = self.drain_time;
        settings.peers = self.peers.then(|| PeerSettings {
            // Whole seconds, as machines are told.
            lease: Duration::from_secs(self.peers_lease.as_secs().max(5)),
            total: self.peers_total.get() as usize,
            announcers: self.peers_announcers.clone(),
            ..PeerSettings::default()
        });
        settings
    }

    fn origin(&self) -> Outcome<Origin> {
        match self.store.split_once("://") {
            None => directory(&self.store),
            Some(("file", path)) => directory(path),
            Some(_) => Ok(Origin::Upstream(pristine_store::open_store(&self.store)?)),
        }
    }
}

/// A directory is served file by file; one with references through them, so that readers need not know of any.
fn directory(path: &str) -> Outcome<Origin> {
    if !Path::new(path).join("references").is_dir() {
        return Ok(Origin::Directory(PathBuf::from(path)));
    }
    let store = crate::image::open(path)?;
    Ok(Origin::Upstream(crate::image::follow(store)))
}

#[derive(Serialize)]
struct Report {
    url: String,
    address: String,
    port: u16,
    store: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<String>,
}

/// Serves a store until it is told to stop.
pub fn run(args: &ServeArgs, ui: &Ui) -> Outcome {
    let args = config::apply(args)?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = args.threads {
        runtime.worker_threads(threads.into());
    }
    let runtime = runtime
        .enable_all()
        // They wait for disks and for other stores.
        .max_blocking_threads(64)
        .build()
        .map_err(|error| Failure::io("cannot start the server's threads", &error))?;
    runtime.block_on(serve(&args, ui))
}

async fn serve(args: &ServeArgs, ui: &Ui) -> Outcome {
    // Before anybody can know that it listens, so that no signal is missed.
    let caught = |error| Failure::io("cannot catch signals", &error);
    let stop = termination().map_err(caught)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(caught)?;
    let files = raise_file_limit();
    let wanted = u64::from(args.connections.get()) + OTHER_FILES;
    if files < wanted {
        ui.warn(format!(
            "only {files} files may be open at a time, so there will be fewer than {} connections; raise it with \
             `ulimit -n` or LimitNOFILE=",
            args.connections
        ));
    }
    let listeners = systemd::listeners()
        .map_err(|error| Failure::io("cannot take the sockets of systemd", &error))?;
    let mut listen = args.listen.clone();
    if listen.is_empty() && listeners.is_empty() {
        listen.push(SocketAddr::from(([127, 0, 0, 1], 8080)));
    }
    let options = Options {
        listen,
        listeners,
        metrics: args.metrics,
        cache: args.cache,
        settings: args.settings(),
        logs: Logs {
            access: args.access_log.then_some(log_access),
            trouble: Some(log_trouble),
        },
        ..Options::default()
    };
    let bound = Server::bind(args.origin()?, options).await;
    let server = bound.map_err(serve_failure)?;
    let scheme = if args.tls_cert.is_some() {
        "https"
    } else {
        "http"
    };
    let urls: Vec<String> = server
        .addresses()
        .iter()
        .map(|at| url(scheme, *at))
        .collect();
    let Some(first) = server.addresses().first() else {
        return Err(Failure::new(
            Code::Usage,
            "there is no address to listen on",
        ));
    };
    let report = Report {
        url: urls.first().cloned().unwrap_or_default(),
        address: first.ip().to_string(),
        port: first.port(),
        store: args.store.clone(),
        metrics: server
            .metrics_address()
            .map(|at| url("http", at) + "metrics"),
    };
    if let Some(path) = &args.port_file {
        write_port(path, first.port())?;
    }
    ui.result(&report, |out| {
        writeln!(out, "serving {} at {}", report.store, urls.join(" and "))?;
        match &report.metrics {
            Some(metrics) => writeln!(out, "metrics at {metrics}"),
            None => Ok(()),
        }
    })?;
    tell(ui, systemd::notify("READY=1"));
    let handle = server.handle();
    let reload = async {
        loop {
            if hangup.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
            tell(ui, systemd::notify_reloading());
            match reload(args, &handle) {
                Ok(()) => ui.note("the configuration was read again"),
                Err(failure) => {
                    ui.failure(&failure);
                    ui.warn("the old configuration stays in use");
                }
            }
            tell(ui, systemd::notify("READY=1"));
        }
    };
    let stopped = async {
        stop.await;
        tell(ui, systemd::notify("STOPPING=1"));
    };
    tokio::select! {
        done = server.run(stopped) => done.map_err(serve_failure)?,
        () = reload => (),
    }
    ui.note("stopped");
    Ok(())
}

fn reload(args: &ServeArgs, handle: &Handle) -> Outcome {
    let args = config::apply(args)?;
    handle.reload(args.settings()).map_err(serve_failure)
}

fn tell(ui: &Ui, told: std::io::Result<()>) {
    if let Err(error) = told {
        ui.warn(format!("cannot tell systemd: {error}"));
    }
}

fn url(scheme: &str, address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        format!("{scheme}://localhost:{}/", address.port())
    } else {
        format!("{scheme}://{address}/")
    }
}

/// Writes the port so that a reader sees all of it or nothing.
fn write_port(path: &Path, port: u16) -> Outcome {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let write =
        fs::write(&temporary, format!("{port}\n")).and_then(|()| fs::rename(&temporary, path));
    write.map_err(|error| Failure::io(format!("cannot write {}", path.display()), &error))
}

fn log_access(access: &Access) {
    let length = access
        .length
        .map_or("-".to_owned(), |length| length.to_string());
    let line = format!(
        "{} {} {} {} {} {length} {:.3}ms\n",
        access.peer,
        access.method,
        access.path.escape_debug(),
        access.range.as_deref().unwrap_or("-").escape_debug(),
        access.status,
        access.time.as_secs_f64() * 1000.0,
    );
    // A log that cannot be written must not stop the server.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

fn log_trouble(text: &str) {
    let line = format!("pristine: warning: {text}\n");
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

fn serve_failure(error: ServeError) -> Failure {
    match error {
        ServeError::Store(error) => error.into(),
        ServeError::Listen { address, error } => {
            let code = match error.kind() {
                std::io::ErrorKind::AddrInUse => Code::Busy,
                std::io::ErrorKind::PermissionDenied => Code::Denied,
                _ => Code::Io,
            };
            Failure::new(code, format!("cannot listen on {address}"))
                .why(error)
                .hint("choose another with --listen ADDR:PORT; port 0 takes any free one")
        }
        error @ ServeError::Rules(_) => Failure::new(Code::Usage, error.to_string())
            .hint("a line is `token NAME blake3:HASH CHANNEL...`; pristine token new writes it"),
        error @ (ServeError::Tls { .. } | ServeError::Settings(_)) => {
            Failure::new(Code::Usage, error.to_string())
        }
        error => Failure::new(Code::Io, error.to_string()),
    }
}
