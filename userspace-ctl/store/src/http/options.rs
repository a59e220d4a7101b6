// SPDX-License-Identifier: GPL-2.0

//! How to speak to a web server, and the client that does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::Agent;

#[cfg(feature = "tls")]
use crate::credentials;
use crate::credentials::{ClientFiles, Token};
use crate::error::Result;
use crate::retry::CancelToken;

/// How long to wait for a server.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// For a connection, name resolution included. Default 10 s.
    pub connect_timeout: Duration,
    /// For each next piece of an answer. Default 15 s. A whole answer may take this long plus its length at
    /// 64 KiB/s; whoever fetches asks a slow server for less at once.
    pub read_timeout: Duration,
    /// Connections kept open between requests. Default 16.
    pub connections: usize,
    /// The addresses of the URL's host, at most 16, which is never looked up then: for who must not depend on a
    /// resolver and its files later. Empty, the default: it is looked up for each connection.
    pub addresses: Vec<SocketAddr>,
    /// A file with the certificates (PEM) of the authorities to trust instead of the system's, for `https` and S3.
    pub ca_file: Option<PathBuf>,
    /// Sent with each request, for servers that ask for one. Whoever sees the network sees it, unless it is `https`.
    pub token: Option<Token>,
    /// A client certificate, for `https` servers that ask for one.
    pub client: Option<ClientFiles>,
    /// Ends an answer in the middle, which a slow server may otherwise draw out up to the timeouts.
    pub cancel: CancelToken,
}

impl Default for HttpOptions {
    fn default() -> Self {
        HttpOptions {
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(15),
            connections: 16,
            addresses: Vec::new(),
            ca_file: None,
            token: None,
            client: None,
            cancel: CancelToken::new(),
        }
    }
}

/// Knows the addresses of one host; others (a proxy, a redirect) it looks up.
#[derive(Debug)]
struct Known {
    host: String,
    addresses: Vec<SocketAddr>,
    other: DefaultResolver,
}

impl Resolver for Known {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> std::result::Result<ResolvedSocketAddrs, ureq::Error> {
        if uri.host() != Some(self.host.as_str()) {
            return self.other.resolve(uri, config, timeout);
        }
        let mut found = self.empty();
        for address in self.addresses.iter().take(16) {
            found.push(*address);
        }
        Ok(found)
    }
}

/// The client for a store on `host`.
pub(super) fn agent(host: &str, options: &HttpOptions) -> Result<Agent> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("pristine/", env!("CARGO_PKG_VERSION")))
        .max_redirects(3)
        .timeout_connect(Some(options.connect_timeout))
        .timeout_resolve(Some(options.connect_timeout))
        .timeout_send_request(Some(options.read_timeout))
        .timeout_recv_response(Some(options.read_timeout))
        .timeout_per_read(Some(options.read_timeout))
        .max_idle_connections(options.connections)
        .max_idle_connections_per_host(options.connections);
    #[cfg(feature = "tls")]
    let config = config.tls_config(tls(options)?);
    let config = match options.token.clone() {
        Some(token) => config.middleware(token.middleware()).build(),
        None => config.build(),
    };
    if options.addresses.is_empty() {
        return Ok(config.new_agent());
    }
    let known = Known {
        host: host.to_owned(),
        addresses: options.addresses.clone(),
        other: DefaultResolver::default(),
    };
    Ok(Agent::with_parts(
        config,
        DefaultConnector::default(),
        known,
    ))
}

/// Whom to trust: the given authorities, else the system's (as `SSL_CERT_FILE` says, if it is set).
#[cfg(feature = "tls")]
fn tls(options: &HttpOptions) -> Result<ureq::tls::TlsConfig> {
    use crate::error::Error;
    use ureq::tls::{parse_pem, PemItem, RootCerts, TlsConfig};

    let roots = match &options.ca_file {
        None => RootCerts::PlatformVerifier,
        Some(path) => {
            let what = || format!("cannot read the certificates in {}", path.display());
            let pem = std::fs::read(path).map_err(|error| Error::io(what(), error))?;
            let mut certificates = Vec::new();
            for item in parse_pem(&pem) {
                match item.map_err(|error| Error::io(what(), std::io::Error::other(error)))? {
                    PemItem::Certificate(certificate) => certificates.push(certificate),
                    _ => continue,
                }
            }
            if certificates.is_empty() {
                let none = std::io::Error::other("there is no certificate in it");
                return Err(Error::io(what(), none));
            }
            RootCerts::new_with_certs(&certificates)
        }
    };
    let client = credentials::client_certificate(options)?;
    Ok(TlsConfig::builder()
        .root_certs(roots)
        .client_cert(client)
        .build())
}
