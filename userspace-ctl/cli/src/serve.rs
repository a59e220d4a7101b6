// SPDX-License-Identifier: GPL-2.0

//! `pristine serve`

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::Args;
use pristine_server::{termination, Access, ServeError, Server};
use serde::Serialize;

use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

/// Arguments of `pristine serve`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine serve /srv/store
  pristine serve /srv/store --listen :8080          on all addresses
  pristine serve /srv/store --listen 127.0.0.1:0 --port-file port

Prints the URL once it listens, then serves until SIGTERM or SIGINT, and finishes what is under way. Only objects of \
the store are served; any other path is 404. Clients verify each block, so plain HTTP suffices for integrity, but anyone \
who can reach the port can read the images.

JSON fields (printed once it listens): url, address, port, store.")]
pub struct ServeArgs {
    /// The store's directory
    store: PathBuf,
    /// Address and port; `:PORT` for all addresses, port 0 for any free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080", value_parser = parse_listen)]
    listen: SocketAddr,
    /// Write the port to this file once it listens
    #[arg(long, value_name = "FILE")]
    port_file: Option<PathBuf>,
    /// Write a line to stderr for each answer
    #[arg(long)]
    access_log: bool,
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix(':') {
        let port = port.parse().map_err(|_| "the port must be 0 to 65535")?;
        return Ok(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
    }
    text.parse()
        .map_err(|_| "give ADDRESS:PORT, like 127.0.0.1:8080, [::1]:8080 or :8080".to_owned())
}

#[derive(Serialize)]
struct Report {
    url: String,
    address: String,
    port: u16,
    store: String,
}

/// Serves a store until it is told to stop.
pub fn run(args: &ServeArgs, ui: &Ui) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io("cannot start the server's threads", &error))?;
    runtime.block_on(serve(args, ui))
}

async fn serve(args: &ServeArgs, ui: &Ui) -> Outcome {
    // Before anybody can know that it listens, so that no signal is missed.
    let stop = termination().map_err(|error| Failure::io("cannot catch signals", &error))?;
    let log: Option<fn(&Access)> = args.access_log.then_some(log_access);
    let bound = Server::bind(&args.store, args.listen, log).await;
    let server = bound.map_err(serve_failure)?;
    let address = server.address();
    let report = Report {
        url: url(address),
        address: address.ip().to_string(),
        port: address.port(),
        store: args.store.display().to_string(),
    };
    if let Some(path) = &args.port_file {
        write_port(path, address.port())?;
    }
    ui.result(&report, |out| {
        writeln!(out, "serving {} at {}", report.store, report.url)
    })?;
    server.run(stop).await.map_err(serve_failure)?;
    ui.note("stopped");
    Ok(())
}

fn url(address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        format!("http://localhost:{}/", address.port())
    } else {
        format!("http://{address}/")
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
        access.path,
        access.range.as_deref().unwrap_or("-"),
        access.status,
        access.time.as_secs_f64() * 1000.0,
    );
    // A log that cannot be written must not stop the server.
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
        error => Failure::new(Code::Io, error.to_string()),
    }
}
