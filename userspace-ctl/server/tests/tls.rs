// SPDX-License-Identifier: GPL-2.0

//! TLS, certificates of clients, and HTTP/2.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{pattern, put_pack, start, Answer, Running};
use pristine_server::{Settings, TlsFiles};
use pristine_testkit::{noise, sample_image, TestStore};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::TlsConnector;

/// An authority, and what it signs.
struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(directory: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        fs::write(directory.join(name), certificate.pem()).unwrap();
        Authority {
            directory: directory.to_owned(),
            issuer: Issuer::new(params, key),
        }
    }

    /// Signs a certificate for these DNS names and this common name; written to NAME.pem and NAME.key.
    fn sign(&self, file: &str, dns: &[&str], common: &str) {
        let dns: Vec<String> = dns.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(dns).unwrap();
        params.distinguished_name.push(DnType::CommonName, common);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let write = |end: &str, text: String| {
            fs::write(self.directory.join(format!("{file}.{end}")), text).unwrap();
        };
        write("pem", certificate.pem());
        write("key", key.serialize_pem());
    }
}

fn settings(directory: &Path, file: &str, ca: Option<&str>) -> Settings {
    let mut settings = Settings::default();
    settings.tls = Some(TlsFiles {
        certificate: directory.join(format!("{file}.pem")),
        key: directory.join(format!("{file}.key")),
        client_ca: ca.map(|ca| directory.join(ca)),
    });
    settings
}

/// A client that trusts the authority `ca`, and shows a certificate if one is named.
async fn connect(
    running: &Running,
    directory: &Path,
    certificate: Option<&str>,
    alpn: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(directory.join("ca")).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match certificate {
        None => config.with_no_client_auth(),
        Some(name) => {
            let chain = CertificateDer::from_pem_file(directory.join(format!("{name}.pem")));
            let key = PrivateKeyDer::from_pem_file(directory.join(format!("{name}.key")));
            config
                .with_client_auth_cert(vec![chain.unwrap()], key.unwrap())
                .unwrap()
        }
    };
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let stream = TcpStream::connect(running.address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

async fn get(stream: &mut TlsStream<TcpStream>, path: &str) -> std::io::Result<Answer> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(Answer::parse(&answer))
}

/// Speaks HTTP/2; the connection lives as long as the result.
async fn h2<T>(stream: T) -> h2::client::SendRequest<Bytes>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (requests, connection) = h2::client::Builder::new()
        // What goes out before the server has said how many it takes would be refused beyond that.
        .initial_max_send_streams(1)
        .initial_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .handshake(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    requests
}

async fn h2_get(
    requests: &h2::client::SendRequest<Bytes>,
    path: &str,
    range: Option<&str>,
) -> (u16, Vec<u8>) {
    let mut request = http::Request::get(format!("http://localhost{path}"));
    if let Some(range) = range {
        request = request.header("range", range);
    }
    let mut requests = requests.clone().ready().await.unwrap();
    let (response, _) = requests
        .send_request(request.body(()).unwrap(), true)
        .unwrap();
    let response = response.await.unwrap();
    let status = response.status().as_u16();
    let mut body = response.into_body();
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        bytes.extend_from_slice(&data);
        body.flow_control().release_capacity(data.len()).unwrap();
    }
    (status, bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn http_1_and_2_over_tls() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(3_000_000);
    let path = put_pack(&directory.path().join("store"), &bytes);
    Authority::new(directory.path(), "ca").sign("server", &["localhost"], "x");
    let settings = settings(directory.path(), "server", None);
    let running = start(&directory.path().join("store"), settings);

    let mut one = connect(&running, directory.path(), None, "http/1.1")
        .await
        .unwrap();
    assert!(get(&mut one, &path).await.unwrap().body == bytes);

    let two = connect(&running, directory.path(), None, "h2")
        .await
        .unwrap();
    let requests = h2(two).await;
    let all = (0..40).map(|at| {
        let (requests, path, bytes) = (requests.clone(), path.clone(), &bytes);
        async move {
            let first = at * 50_000;
            let range = format!("bytes={first}-{}", first + 999_999);
            let (status, body) = h2_get(&requests, &path, Some(&range)).await;
            assert!(status == 206 && body == bytes[first..first + 1_000_000]);
        }
    });
    let mut tasks = Vec::new();
    for one in all {
        tasks.push(one);
    }
    // More at a time than the server allows; they wait.
    futures(tasks).await;
    assert!(h2_get(&requests, &path, None).await == (200, bytes.clone()));
    assert_eq!(h2_get(&requests, &path, Some("bytes=5-4")).await.0, 416);
    assert_eq!(h2_get(&requests, "/../x", None).await.0, 404);
    assert_eq!(
        h2_get(&requests, "/pristine-store", None).await.1,
        b"pristine-store 1\n"
    );
    drop(requests);
    running.wait_for("connections", |open| open == 0.0);
    assert_eq!(running.metric("requests_total{version=\"2\"}"), 44.0);
}

/// Runs all of them at the same time.
async fn futures<F: std::future::Future<Output = ()>>(all: Vec<F>) {
    let mut all: Vec<_> = all.into_iter().map(Box::pin).collect();
    std::future::poll_fn(|context| {
        all.retain_mut(|one| one.as_mut().poll(context).is_pending());
        match all.is_empty() {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn http_2_without_tls() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(1_000_000);
    let path = put_pack(directory.path(), &bytes);
    let mut settings = Settings::default();
    settings.stall_time = Duration::from_millis(300);
    let mut running = start(directory.path(), settings);
    let stream = TcpStream::connect(running.address).await.unwrap();
    let requests = h2(stream).await;
    assert!(h2_get(&requests, &path, None).await == (200, bytes.clone()));

    // An answer that is not taken ends, and the others of the connection go on.
    let request = http::Request::get(format!("http://localhost{path}"))
        .body(())
        .unwrap();
    let mut sender = requests.clone().ready().await.unwrap();
    let mut untaken = Vec::new();
    for _ in 0..2 {
        let (response, _) = sender.send_request(request.clone(), true).unwrap();
        untaken.push(response.await.unwrap().into_body());
    }
    assert_eq!(h2_get(&requests, "/pristine-store", None).await.0, 200);
    // A window of 1 MiB takes all of one answer, so another 20 are asked for to fill that of the connection.
    for _ in 0..20 {
        let mut sender = sender.clone().ready().await.unwrap();
        let (response, _) = sender.send_request(request.clone(), true).unwrap();
        untaken.push(response.await.unwrap().into_body());
    }
    running.wait_for("refused_total{reason=\"slow\"}", |slow| slow > 0.0);
    running.wait_for("requests_in_flight", |open| open == 0.0);
    drop(untaken);

    // At the end of the server the connection is closed in good order.
    let last = h2_get(&requests, "/pristine-store", None).await;
    assert_eq!(last.0, 200);
    running.ask_to_stop();
    tokio::task::spawn_blocking(move || running.wait().unwrap())
        .await
        .unwrap();
    assert!(requests.ready().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn certificates_of_clients_open_channels() {
    let store = TestStore::new().unwrap();
    store.add(&sample_image(1, 4), "lab").unwrap();
    store.add(&sample_image(2, 4), "kiosk").unwrap();
    let directory = store.root().parent().unwrap().to_owned();
    let ca = Authority::new(&directory, "ca");
    ca.sign("server", &["localhost"], "x");
    ca.sign("dns", &["PC1.example", "other.example"], "ignored");
    ca.sign("common", &[], "pc2");
    ca.sign("nobody", &["pc3.example"], "pc3");
    Authority::new(&directory, "other-ca").sign("forged", &["pc1.example"], "pc2");
    fs::write(
        directory.join("rules"),
        "certificate pc1.example lab\ncertificate pc2 kiosk\nanonymous public\n",
    )
    .unwrap();
    let mut settings = settings(&directory, "server", Some("ca"));
    settings.access = Some(directory.join("rules"));
    let running = start(&store.root(), settings);
    for (certificate, lab, kiosk) in [
        (Some("dns"), 200, 403),
        (Some("common"), 403, 200),
        (Some("nobody"), 403, 403),
        (None, 403, 403),
    ] {
        for (channel, wanted) in [("lab", lab), ("kiosk", kiosk)] {
            let path = format!("/channels/{channel}");
            let mut one = connect(&running, &directory, certificate, "http/1.1")
                .await
                .unwrap();
            let answer = get(&mut one, &path).await.unwrap();
            assert_eq!(answer.status, wanted, "{certificate:?} {channel}");
            let two = connect(&running, &directory, certificate, "h2")
                .await
                .unwrap();
            let requests = h2(two).await;
            assert_eq!(h2_get(&requests, &path, None).await.0, wanted);
        }
    }
    // One that another authority signed is no good, not even as none.
    let forged = match connect(&running, &directory, Some("forged"), "http/1.1").await {
        Ok(mut stream) => get(&mut stream, "/channels/lab").await.err(),
        Err(error) => Some(error),
    };
    assert!(forged.is_some());
    running.wait_for("refused_total{reason=\"tls\"}", |refused| refused == 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn certificates_are_read_again_and_connections_stay() {
    let directory = tempfile::tempdir().unwrap();
    put_pack(&directory.path().join("store"), b"x");
    let ca = Authority::new(directory.path(), "ca");
    ca.sign("first", &["localhost"], "x");
    ca.sign("second", &["localhost"], "x");
    let first = settings(directory.path(), "first", None);
    let second = settings(directory.path(), "second", None);
    let running = start(&directory.path().join("store"), first.clone());
    let shown = |stream: &TlsStream<TcpStream>| {
        let certificates = stream.get_ref().1.peer_certificates().unwrap();
        certificates[0].to_vec()
    };
    let mut old = connect(&running, directory.path(), None, "http/1.1")
        .await
        .unwrap();
    running.handle.reload(second).unwrap();
    let mut new = connect(&running, directory.path(), None, "http/1.1")
        .await
        .unwrap();
    assert_ne!(shown(&old), shown(&new));
    assert_eq!(get(&mut old, "/pristine-store").await.unwrap().status, 200);
    assert_eq!(get(&mut new, "/pristine-store").await.unwrap().status, 200);

    // What is wrong is told, and the last good ones stay.
    fs::write(directory.path().join("first.key"), "no key").unwrap();
    let error = running.handle.reload(first).unwrap_err().to_string();
    assert!(error.contains("first.key"), "{error}");
    let error = running
        .handle
        .reload(Settings::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("TLS"), "{error}");
    ca.sign("third", &["localhost"], "x");
    let mut mixed = settings(directory.path(), "third", None);
    mixed.tls.as_mut().unwrap().key = directory.path().join("second.key");
    assert!(running.handle.reload(mixed).is_err());
    let again = connect(&running, directory.path(), None, "http/1.1")
        .await
        .unwrap();
    assert_eq!(shown(&again), shown(&new));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_no_tls_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    put_pack(&directory.path().join("store"), b"x");
    Authority::new(directory.path(), "ca").sign("server", &["localhost"], "x");
    let mut settings = settings(directory.path(), "server", None);
    settings.header_time = Duration::from_millis(300);
    let running = start(&directory.path().join("store"), settings);
    running.raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    for seed in 0..5 {
        running.raw(&noise(seed, 10_000));
    }
    // A handshake that begins well and does not go on.
    running.raw(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc]);
    running.wait_for("refused_total{reason=\"tls\"}", |refused| refused == 7.0);
    let mut good = connect(&running, directory.path(), None, "http/1.1")
        .await
        .unwrap();
    assert_eq!(get(&mut good, "/pristine-store").await.unwrap().status, 200);
}
