// SPDX-License-Identifier: GPL-2.0

//! Transfers over HTTP that break off, objects that change, servers without ranges; and nginx, as it is installed,
//! over HTTP and HTTPS.

// Whole images are single ranges of blocks.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::{http, open, options, Memory};
use pristine_store::{Error, HttpOptions, HttpStore, ImageReader, ObjectName, Store};
use pristine_testkit::{sample_image, FaultyServer, Options, Rules, TestStore};

/// A store with an image of 16 MiB on a server with tags, and its largest pack.
fn tagged() -> (TestStore, FaultyServer, ObjectName, Vec<u8>) {
    let (store, _) = TestStore::with_image(&sample_image(1, 16)).unwrap();
    let tags = Options {
        tags: true,
        ..Options::default()
    };
    let server = FaultyServer::start_with(&store.root(), tags, Rules::default()).unwrap();
    let reader = open(store.open().unwrap(), "stable").unwrap();
    let packs = reader.manifest().frames().packs();
    let pack = packs.iter().max_by_key(|pack| pack.len).unwrap();
    let object = ObjectName::Pack(pack.id);
    let bytes = reader.store().get(&object, pack.len).unwrap();
    (store, server, object, bytes)
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_stopped() {
    let (_store, server, object, bytes) = tagged();
    let len = bytes.len() as u64;
    server.set_rules("packs/@1-3:cut=100000".parse().unwrap());
    let store = http(&server.url());
    assert!(store.get(&object, len).unwrap() == bytes);
    // Each byte once.
    assert_eq!(store.traffic().bytes, len);
    assert_eq!(store.traffic().requests, 4);
    server.set_rules("packs/@1-2:cut=3000".parse().unwrap());
    let store = http(&server.url());
    let range = store.get_range(&object, 5000..25_000).unwrap();
    assert!(range == bytes[5000..25_000]);
    assert_eq!(
        (store.traffic().bytes, store.traffic().requests),
        (20_000, 3)
    );
    // Not for ever.
    server.set_rules("packs/:cut=10".parse().unwrap());
    let error = http(&server.url()).get(&object, len).unwrap_err();
    assert!(matches!(error, Error::Cut { got: 90, .. }), "{error}");
    // A server that only sends whole objects can still be gone on with.
    server.set_rules("packs/@1:cut=100000 packs/@2:ignore-range".parse().unwrap());
    assert!(http(&server.url()).get(&object, len).unwrap() == bytes);
}

#[test]
fn an_object_that_changes_under_the_reader_is_noticed() {
    let (_store, server, object, bytes) = tagged();
    server.set_rules("packs/@1:cut=100000 packs/@2-:long=7".parse().unwrap());
    // What comes is one of both, never a part of each.
    let mut changed = bytes.clone();
    changed.resize(bytes.len() + 7, 0);
    let store = http(&server.url());
    assert!(store.get(&object, 64 << 20).unwrap() == changed);
    server.set_rules("packs/@1:cut=100000 packs/@2-:long=7".parse().unwrap());
    let error = http(&server.url()).get(&object, bytes.len() as u64);
    assert!(matches!(error, Err(Error::TooLarge { .. })));
}

#[test]
fn packs_of_a_server_without_ranges_are_taken_once() {
    let (_store, server, _, _) = tagged();
    server.set_rules(":ignore-range".parse().unwrap());
    let (bytes, stored) = fetch_all(http(&server.url()), &sample_image(1, 16));
    // The first request of each worker may come before it is known.
    assert!(bytes < 3 * stored, "{bytes} of {stored}");
}

/// Fetches everything; gives the bytes that came, and those of the packs.
fn fetch_all(store: Arc<dyn Store>, image: &[u8]) -> (u64, u64) {
    let reader: ImageReader = open(Arc::clone(&store), "stable").unwrap();
    let memory = Memory::new(&reader);
    let all = [0..reader.blocks()];
    reader.fetch(all.clone(), &options(), &memory).unwrap();
    memory.check(image, &all);
    let packs = reader.manifest().frames().packs().iter();
    (store.traffic().bytes, packs.map(|pack| pack.len).sum())
}

/// A real nginx; it ends when this is dropped.
struct Nginx {
    child: Child,
    directory: tempfile::TempDir,
    port: u16,
}

impl Nginx {
    /// Serves a directory; `server` are more lines for the server, `listen` options of its port.
    fn start(root: &Path, listen: &str, server: &str) -> Nginx {
        // nginx wants a number, and the port may be taken between its choice and its use.
        for _ in 0..10 {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = free.local_addr().unwrap().port();
            drop(free);
            if let Some(nginx) = Nginx::try_start(root, port, listen, server) {
                return nginx;
            }
        }
        panic!("nginx does not start");
    }

    fn try_start(root: &Path, port: u16, listen: &str, server: &str) -> Option<Nginx> {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().display();
        let root = root.display();
        let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let temporary = paths.map(|path| format!("{path}_temp_path {base}/{path};\n"));
        let temporary = temporary.concat();
        let text = format!(
            "daemon off; master_process off; pid {base}/pid; error_log {base}/error.log;\n\
             user root;\nevents {{}}\nhttp {{\n{temporary}\
             log_format connections '$connection $request_method $status $uri';\n\
             access_log {base}/access.log connections;\n\
             server {{ listen 127.0.0.1:{port}{listen}; root {root};\n{server}\n}}\n}}\n"
        );
        let config = directory.path().join("nginx.conf");
        fs::write(&config, text).unwrap();
        let mut command = Command::new("nginx");
        let command = command.arg("-e").arg(directory.path().join("start.log"));
        let command = command
            .arg("-p")
            .arg(directory.path())
            .arg("-c")
            .arg(&config);
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        loop {
            if child.try_wait().unwrap().is_some() {
                let log = fs::read_to_string(directory.path().join("start.log"));
                eprintln!("{}", log.unwrap_or_default());
                return None;
            }
            // Written when it listens.
            let pid = fs::read_to_string(directory.path().join("pid"));
            if pid.is_ok_and(|pid| !pid.is_empty()) {
                return Some(Nginx {
                    child,
                    directory,
                    port,
                });
            }
            std::thread::yield_now();
        }
    }

    /// The lines of the access log.
    fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.directory.path().join("access.log")).unwrap();
        log.lines().map(str::to_owned).collect()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn nginx_serves_a_store() {
    let image = sample_image(2, 16);
    let (store, _) = TestStore::with_image(&image).unwrap();
    let nginx = Nginx::start(&store.root(), "", "");
    let url = format!("http://127.0.0.1:{}", nginx.port);
    let (bytes, stored) = fetch_all(http(&url), &image);
    assert!(bytes < stored + (1 << 20), "{bytes} of {stored}");
    let log = nginx.log();
    assert!(log.iter().any(|line| line.contains(" 206 ")), "{log:?}");
    // Connections are used again: there are at most as many as workers, and one more to open the image.
    let connections: BTreeSet<&str> = log
        .iter()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let workers = options().parallel;
    assert!(
        connections.len() <= workers + 1 && log.len() > connections.len(),
        "{log:?}"
    );
}

#[test]
fn nginx_without_ranges() {
    let image = sample_image(3, 16);
    let (store, _) = TestStore::with_image(&image).unwrap();
    let nginx = Nginx::start(&store.root(), "", "max_ranges 0;");
    let url = format!("http://127.0.0.1:{}", nginx.port);
    let (bytes, stored) = fetch_all(http(&url), &image);
    assert!(bytes < 3 * stored, "{bytes} of {stored}");
    assert!(!nginx.log().iter().any(|line| line.contains(" 206 ")));
}

/// A certificate authority made for the test, and a certificate for 127.0.0.1 by it: the files' directory.
fn authority() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let openssl = |arguments: &str| {
        let mut command = Command::new("openssl");
        let command = command.args(arguments.split_whitespace());
        let output = command.current_dir(directory.path()).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments}: {errors}");
    };
    fs::write(
        directory.path().join("names"),
        "subjectAltName=IP:127.0.0.1\n",
    )
    .unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc";
    openssl(&format!(
        "req -x509 {key} -days 2 -subj /CN=authority -keyout ca.key -out ca.pem"
    ));
    openssl(&format!(
        "req {key} -subj /CN=server -keyout server.key -out server.csr"
    ));
    openssl(
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -days 2 -extfile names -out server.pem",
    );
    directory
}

#[test]
fn nginx_with_a_certificate_of_an_own_authority() {
    let image = sample_image(4, 4);
    let (store, _) = TestStore::with_image(&image).unwrap();
    let authority = authority();
    let file = |name: &str| -> PathBuf { authority.path().join(name) };
    let server = format!(
        "ssl_certificate {};\nssl_certificate_key {};",
        file("server.pem").display(),
        file("server.key").display()
    );
    let nginx = Nginx::start(&store.root(), " ssl", &server);
    let url = format!("https://127.0.0.1:{}", nginx.port);
    let with = |ca_file: Option<PathBuf>| {
        let options = HttpOptions {
            ca_file,
            ..HttpOptions::default()
        };
        HttpStore::open(&url, options)
    };
    fetch_all(Arc::new(with(Some(file("ca.pem"))).unwrap()), &image);
    // An authority that the system does not know is nobody.
    let error = open(Arc::new(with(None).unwrap()), "stable").unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().to_lowercase().contains("cert"), "{error}");
    for bad in ["server.key", "missing.pem"] {
        let error = with(Some(file(bad))).unwrap_err();
        assert!(error.to_string().contains(bad), "{error}");
    }
}
