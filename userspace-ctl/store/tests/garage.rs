// SPDX-License-Identifier: GPL-2.0

//! A store in Garage, a cluster of three nodes of which some are killed while images are read and published.
//!
//! Only with `TEST_LONG=1`: `scripts/garage` builds it, which takes long.

#![cfg(feature = "s3")]
// Whole images are single ranges of blocks.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::RefCell;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::Memory;
use pristine_store::{
    collect, history, open_for_writing, publish, verify, BlockSink, CancelToken, FetchOptions,
    GcOptions, HttpOptions, ImageReader, PublishOptions, Result, RetryPolicy, Store,
};
use pristine_testkit::{sample_image, TestStore};

const KEY: &str = "GK0123456789abcdef01234567";
const SECRET: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// A node; it is killed when this is dropped.
struct Node {
    config: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Node {
    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn start(&mut self, program: &Path) {
        let log = fs::File::create(self.config.with_extension("log")).unwrap();
        let mut command = Command::new(program);
        let command = command.arg("-c").arg(&self.config).arg("server");
        let command = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap());
        self.child = Some(command.stderr(log).spawn().unwrap());
    }

    fn store(&self) -> Arc<dyn Store> {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let location = format!("s3://images/lab?endpoint={endpoint}&region=garage");
        until_it_serves(|| open_for_writing(&location, HttpOptions::default()))
    }
}

struct Cluster {
    program: PathBuf,
    nodes: Vec<Node>,
    _directory: tempfile::TempDir,
}

/// Tries again while the cluster does not serve: nodes that were started again need a moment to find each other.
fn until_it_serves<T>(mut attempt: impl FnMut() -> Result<T>) -> T {
    let begin = Instant::now();
    loop {
        match attempt() {
            Ok(done) => return done,
            Err(error) => assert!(
                error.is_transient() && begin.elapsed() < Duration::from_secs(120),
                "{error}"
            ),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn free_port() -> u16 {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap().port()
}

impl Cluster {
    fn start() -> Cluster {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts");
        let output = Command::new(scripts.join("garage")).output().unwrap();
        assert!(output.status.success(), "scripts/garage fails");
        let program = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        let directory = tempfile::tempdir().unwrap();
        let nodes = (1..=3).map(|number| {
            let base = directory.path().join(number.to_string());
            fs::create_dir(&base).unwrap();
            let (rpc, port, base) = (free_port(), free_port(), base.display());
            let config = directory.path().join(format!("{number}.toml"));
            let text = format!(
                "metadata_dir = \"{base}/meta\"\ndata_dir = \"{base}/data\"\ndb_engine = \"sqlite\"\n\
                 replication_factor = 3\nrpc_bind_addr = \"127.0.0.1:{rpc}\"\n\
                 rpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{SECRET}\"\n\
                 [s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{port}\"\n\
                 root_domain = \".s3.garage\"\n"
            );
            fs::write(&config, text).unwrap();
            let child = None;
            Node {
                config,
                port,
                child,
            }
        });
        let mut cluster = Cluster {
            nodes: nodes.collect(),
            program,
            _directory: directory,
        };
        for node in &mut cluster.nodes {
            node.start(&cluster.program);
        }
        let ids: Vec<String> = (0..3)
            .map(|node| cluster.until(node, &["node", "id", "-q"]).trim().to_owned())
            .collect();
        for (zone, id) in ids.iter().enumerate() {
            if zone > 0 {
                cluster.until(0, &["node", "connect", id]);
            }
            let zone = format!("zone{zone}");
            let id = id.split('@').next().unwrap();
            cluster.until(0, &["layout", "assign", "-z", &zone, "-c", "1G", id]);
        }
        cluster.until(0, &["layout", "apply", "--version", "1"]);
        cluster.until(0, &["bucket", "create", "images"]);
        cluster.until(0, &["key", "import", "--yes", "-n", "test", KEY, SECRET]);
        let allow = [
            "bucket", "allow", "--read", "--write", "--owner", "images", "--key", "test",
        ];
        cluster.until(0, &allow);
        cluster
    }

    /// Runs a command of Garage's until it succeeds: nodes need a moment to find each other.
    fn until(&self, node: usize, arguments: &[&str]) -> String {
        let begin = Instant::now();
        loop {
            let mut command = Command::new(&self.program);
            let command = command
                .arg("-c")
                .arg(&self.nodes[node].config)
                .args(arguments);
            let output = command.output().unwrap();
            if output.status.success() {
                return String::from_utf8(output.stdout).unwrap();
            }
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "{arguments:?}: {errors}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Runs `then` when the first block comes.
struct Watched<'a> {
    memory: &'a Memory,
    then: Mutex<Option<Box<dyn FnOnce() + Send + 'a>>>,
}

impl BlockSink for Watched<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        if let Some(then) = self.then.lock().unwrap().take() {
            then();
        }
        self.memory.blocks(first, data)
    }

    fn zeros(&self, blocks: Range<u64>) -> io::Result<()> {
        self.memory.zeros(blocks)
    }
}

fn opened(store: &Arc<dyn Store>, selector: &str) -> ImageReader {
    let (retry, cancel) = (RetryPolicy::default(), CancelToken::new());
    ImageReader::open(
        Arc::clone(store),
        &selector.parse().unwrap(),
        retry,
        &cancel,
    )
    .unwrap()
}

#[test]
fn nodes_are_killed_during_reads_and_publishing() {
    if std::env::var("TEST_LONG").as_deref() != Ok("1") {
        return;
    }
    std::env::set_var("AWS_ACCESS_KEY_ID", KEY);
    std::env::set_var("AWS_SECRET_ACCESS_KEY", SECRET);
    let mut cluster = Cluster::start();
    let image = |seed| sample_image(seed, 24);
    let sources: Vec<_> = [1, 100, 200]
        .map(|seed| TestStore::with_image(&image(seed)).unwrap())
        .into();
    let reader = |number: usize| opened(&sources[number].0.open().unwrap(), "stable");
    let channel = "stable".parse().unwrap();
    let options = PublishOptions::default();
    let store = cluster.nodes[0].store();
    publish(&reader(0), &store, &channel, &options, &|_, _| ()).unwrap();
    eprintln!("{:?}", store.remarks());

    // A node dies while an image is read: all of it comes.
    let remote = opened(&store, "stable");
    let memory = Memory::new(&remote);
    let mut third = cluster.nodes.pop().unwrap();
    let watched = Watched {
        memory: &memory,
        then: Mutex::new(Some(Box::new(|| third.kill()))),
    };
    let all = [0..remote.blocks()];
    remote
        .fetch(all.clone(), &FetchOptions::default(), &watched)
        .unwrap();
    drop(watched);
    memory.check(&image(1), &all);
    assert!(third.child.is_none());
    third.start(&cluster.program);
    cluster.nodes.push(third);
    cluster.until(2, &["status"]);

    // Another one dies while the next generation is published: it goes through, or goes on.
    let second = RefCell::new(cluster.nodes.remove(1));
    let kill = |done: u64, _: u64| {
        if done > 0 {
            second.borrow_mut().kill();
        }
    };
    until_it_serves(|| publish(&reader(1), &store, &channel, &options, &kill));
    assert!(second.borrow().child.is_none());
    let mut second = second.into_inner();
    second.start(&cluster.program);
    cluster.nodes.insert(1, second);
    cluster.until(1, &["status"]);

    // The very node that is published to dies: what was sent is not sent again through another one.
    let first = RefCell::new(cluster.nodes.remove(0));
    let kill = |done: u64, total: u64| {
        if done > total / 3 {
            first.borrow_mut().kill();
        }
    };
    let error = publish(&reader(2), &store, &channel, &options, &kill).unwrap_err();
    assert!(error.is_transient(), "{error}");
    let store = cluster.nodes[0].store();
    let published = until_it_serves(|| publish(&reader(2), &store, &channel, &options, &|_, _| ()));
    assert!(published.present_objects > 0, "{published:?}");

    // Nothing is lost: each generation is there, and whole.
    let releases = history(store.as_ref(), &channel).unwrap();
    let images: Vec<_> = releases
        .into_iter()
        .map(|(_, r)| r.unwrap().release().image)
        .collect();
    for (_, id) in &sources {
        assert!(images.contains(id));
        let verified = verify(
            &opened(&store, &id.to_string()),
            &CancelToken::new(),
            &|_, _| (),
        );
        let verified = verified.unwrap();
        assert!(verified.is_ok(), "{verified:?}");
    }
    let collected = collect(
        &store,
        &GcOptions {
            keep: 1,
            grace: Duration::ZERO,
            lease: pristine_store::LeaseOptions {
                time: Duration::from_secs(1),
                ..Default::default()
            },
            ..GcOptions::default()
        },
        &|_, _| (),
    );
    assert_eq!(collected.unwrap().kept_images.len(), 1);
}
