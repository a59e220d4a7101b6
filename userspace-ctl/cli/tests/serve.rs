// SPDX-License-Identifier: GPL-2.0

//! `pristine serve` and `pristine token` as programs: signals, systemd, tokens from end to end, and memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{keys, Lab, BUSY, DENIED, IO, NOT_FOUND, OK, USAGE};
use serde_json::Value;

/// A directory with a store that has an image on the channels `lab` and `kiosk`.
fn with_store() -> Lab {
    let lab = Lab::with_disk(16 << 20);
    for args in [
        "image build disk.img -o store --channel lab",
        "image publish store store --image lab --channel kiosk",
    ] {
        lab.text(&args.split(' ').collect::<Vec<_>>());
    }
    lab
}

struct Served {
    child: Child,
    /// What it printed once it listened.
    report: String,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Served {
    fn start(lab: &Lab, args: &[&str]) -> Self {
        let args = [&["serve", "store", "--listen", "127.0.0.1:0"], args].concat();
        Served::spawn(lab.command(&args), 1)
    }

    /// Starts it, and waits for so many lines.
    fn spawn(mut command: Command, lines: usize) -> Self {
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut report = String::new();
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        for _ in 0..lines {
            assert_ne!(reader.read_line(&mut report).unwrap(), 0, "{report}");
        }
        Served {
            report,
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child,
        }
    }

    fn url(&self) -> &str {
        let line = self.report.lines().next().unwrap();
        line.split_once(" at ").unwrap().1
    }

    fn address(&self) -> std::net::SocketAddr {
        let address = self.url().strip_prefix("http://").unwrap();
        address.trim_end_matches('/').parse().unwrap()
    }

    fn status(&self, path: &str, token: &str) -> u16 {
        let mut stream = TcpStream::connect(self.address()).unwrap();
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().parse().unwrap()
    }

    fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        let kill = Command::new("kill").args([signal, &id]).status().unwrap();
        assert!(kill.success());
    }

    /// Reads what it says up to a line with these words.
    fn says(&mut self, words: &str) {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            assert_ne!(
                self.stderr.read_line(&mut line).unwrap(),
                0,
                "it never said {words:?}"
            );
        }
    }

    /// The most memory that it ever had, in KiB.
    fn peak(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_served_store_is_read_by_url() {
    let lab = with_store();
    let built = lab.json(&["image", "show", "store", "lab"]);
    let served = lab.serve("store", &["--port-file", "port"]);
    assert_eq!(keys(&served.report), ["address", "port", "store", "url"]);
    let port = served.report["port"].as_u64().unwrap();
    let written = fs::read_to_string(lab.path("port")).unwrap();
    assert_eq!(written, format!("{port}\n"));
    let raw = |request: &str| {
        let address = format!("127.0.0.1:{port}");
        let mut stream = TcpStream::connect(address).unwrap();
        let request = format!("{request}\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let list = lab.json(&["image", "list", &served.url]);
    assert_eq!(list["images"][0]["image"], built["image"]);
    assert_eq!(
        lab.json(&["image", "verify", &served.url, "lab"])["ok"],
        true
    );
    let copied = lab.json(&[
        "image",
        "publish",
        &served.url,
        "copy",
        "--image",
        "lab",
        "--channel",
        "mirror",
    ]);
    assert_eq!(copied["image"], built["image"]);
    assert_eq!(lab.json(&["image", "verify", "copy"])["ok"], true);

    // Nothing but what a store has.
    for path in [
        "/",
        "/.lock",
        "/.tmp/",
        "/../disk.img",
        "/channels/..%2f.lock",
        "//etc/passwd",
        "/images",
    ] {
        let answer = raw(&format!("GET {path} HTTP/1.1"));
        assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
    }
    assert!(raw("PUT /channels/lab HTTP/1.1").starts_with("HTTP/1.1 405"));
    let manifest = format!("/images/{}.manifest", built["image"].as_str().unwrap());
    let answer = raw(&format!("HEAD {manifest} HTTP/1.1"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(
        answer.contains(&format!("content-length: {}", built["manifest_bytes"])),
        "{answer}"
    );
    assert!(
        answer.contains("immutable") && answer.contains("etag: "),
        "{answer}"
    );
    let answer = raw(&format!("GET {manifest} HTTP/1.1\r\nRange: bytes=1-6"));
    assert!(
        answer.starts_with("HTTP/1.1 206") && answer.ends_with("PRISTM"),
        "{answer}"
    );
    let answer = raw(&format!(
        "GET {manifest} HTTP/1.1\r\nRange: bytes=99999999-"
    ));
    assert!(answer.starts_with("HTTP/1.1 416"), "{answer}");
    let tag = format!("\"{}\"", built["image"].as_str().unwrap());
    let answer = raw(&format!("GET {manifest} HTTP/1.1\r\nIf-None-Match: {tag}"));
    assert!(answer.starts_with("HTTP/1.1 304"), "{answer}");

    // The port is taken; then it is free again.
    let listen = format!("127.0.0.1:{port}");
    lab.fails(
        &["serve", "store", "--listen", &listen],
        BUSY,
        "cannot listen",
    );
    assert_eq!(served.stop("-TERM"), OK);
    lab.fails(
        &["image", "list", &format!("http://{listen}")],
        IO,
        "cannot reach",
    );
    assert_eq!(lab.serve("store", &[]).stop("-INT"), OK);
    lab.fails(&["serve", "nowhere"], NOT_FOUND, "nowhere");
}

#[test]
fn tokens_from_making_one_to_reading_an_image() {
    let lab = with_store();
    let new = |args: &[&str]| {
        let made = lab.text(&[&["--json", "token", "new", "--access", "rules"], args].concat());
        let made: Value = serde_json::from_str(&made).unwrap();
        made["token"].as_str().unwrap().to_owned()
    };
    let token = new(&["machines", "--channel", "lab"]);
    assert_eq!(token.len(), 64);
    assert!(!fs::read_to_string(lab.path("rules"))
        .unwrap()
        .contains(&token));
    let mut served = Served::start(&lab, &["--access", "rules", "--access-log"]);
    let url = served.url().to_owned();

    lab.fails(&["image", "verify", &url, "lab"], DENIED, "401");
    fs::write(lab.path("token"), format!("{token}\n")).unwrap();
    lab.text(&["image", "verify", &url, "lab", "--token-file", "token"]);
    let mut by_environment = lab.command(&["image", "verify", &url, "lab"]);
    assert!(by_environment
        .env("PRISTINE_TOKEN", &token)
        .output()
        .unwrap()
        .status
        .success());
    lab.fails(
        &["image", "verify", &url, "kiosk", "--token-file", "token"],
        DENIED,
        "403",
    );
    lab.fails(
        &["image", "verify", &url, "lab", "--token-file", "no"],
        USAGE,
        "cannot use no",
    );
    // A token is never in a log.
    served.says("/channels/lab");

    // Another one is good after a reload, and the removed one no longer is.
    let other = new(&["kiosks", "--channel", "kiosk"]);
    assert_eq!(served.status("/channels/kiosk", &other), 401);
    lab.text(&["token", "remove", "machines", "--access", "rules"]);
    served.signal("-HUP");
    served.says("read again");
    assert_eq!(served.status("/channels/kiosk", &other), 200);
    assert_eq!(served.status("/channels/lab", &token), 401);
    let list = lab.text(&["token", "list", "--access", "rules"]);
    assert!(
        list.contains("kiosks") && !list.contains("machines"),
        "{list}"
    );

    // Rules that make no sense change nothing.
    let rules = fs::read_to_string(lab.path("rules")).unwrap();
    fs::write(lab.path("rules"), format!("{rules}nonsense\n")).unwrap();
    served.signal("-HUP");
    served.says("line 2");
    served.says("old configuration");
    assert_eq!(served.status("/channels/kiosk", &other), 200);

    lab.fails(&["token", "list", "--access", "rules"], USAGE, "line 2");
    lab.fails(
        &["token", "list", "--access", "nowhere"],
        NOT_FOUND,
        "nowhere",
    );
    fs::write(lab.path("rules"), rules).unwrap();
    lab.fails(
        &["token", "remove", "nobody", "--access", "rules"],
        NOT_FOUND,
        "nobody",
    );
    lab.fails(
        &["token", "new", "x", "--access", "rules"],
        USAGE,
        "--channel",
    );
    lab.fails(
        &["token", "new", "x y", "--access", "rules", "--all-channels"],
        USAGE,
        "one word",
    );
    lab.text(&[
        "token",
        "new",
        "x",
        "--access",
        "dry",
        "--all-channels",
        "--dry-run",
    ]);
    assert!(!lab.path("dry").exists());
    lab.fails(&["serve", "store", "--access", "nowhere"], USAGE, "nowhere");
    lab.fails(&["serve", "store", "--tls-cert", "x"], USAGE, "--tls-key");
    let tls = [
        "serve",
        "store",
        "--tls-cert",
        "disk.img",
        "--tls-key",
        "disk.img",
    ];
    lab.fails(&tls, USAGE, "disk.img");
}

#[test]
fn a_configuration_is_read_again_and_connections_stay() {
    let lab = with_store();
    fs::write(
        lab.path("conf"),
        "listen = 127.0.0.1:0\nmetrics = 127.0.0.1:0\n",
    )
    .unwrap();
    let mut served = Served::spawn(lab.command(&["serve", "store", "--config", "conf"]), 2);
    assert!(served.report.ends_with("/metrics\n"));
    let mut kept = TcpStream::connect(served.address()).unwrap();
    let ask = |stream: &mut TcpStream| {
        stream
            .write_all(b"GET /channels/lab HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).unwrap();
        String::from_utf8_lossy(&start).into_owned()
    };
    assert_eq!(ask(&mut kept), "HTTP/1.1 200");
    fs::write(lab.path("rules"), "anonymous kiosk\n").unwrap();
    fs::write(lab.path("conf"), "access = rules\nclient-rate = 1M\n").unwrap();
    served.signal("-HUP");
    served.says("read again");
    // The rest of the answer before, and then by the new rules.
    kept.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut rest = [0; 4096];
    let got = kept.read(&mut rest).unwrap();
    assert!(got > 0);
    assert_eq!(ask(&mut kept), "HTTP/1.1 403");
    fs::write(lab.path("conf"), "colour = red\n").unwrap();
    served.signal("-HUP");
    served.says("no such option");
    lab.fails(
        &["serve", "store", "--config", "conf"],
        USAGE,
        "conf, line 1",
    );
    served.signal("-TERM");
    assert_eq!(served.child.wait().unwrap().code(), Some(0));
}

#[test]
fn systemd_gives_the_socket_and_is_told() {
    let lab = with_store();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let told = UnixDatagram::bind(lab.path("notify")).unwrap();
    told.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    // The shell puts the socket where systemd does, and sets LISTEN_PID to what the server will be.
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg("LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\" 3<&0 </dev/null")
        .arg("sh")
        .arg(env!("CARGO_BIN_EXE_pristine"))
        .args(["serve", "store"])
        .current_dir(lab.directory())
        .env("NOTIFY_SOCKET", lab.path("notify"))
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
    let mut served = Served::spawn(command, 1);
    assert_eq!(served.address(), address);
    let receive = || {
        let mut text = [0; 200];
        let len = told.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..len]).into_owned()
    };
    assert_eq!(receive(), "READY=1");
    assert_eq!(served.status("/pristine-store", ""), 200);
    served.signal("-HUP");
    assert!(receive().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(receive(), "READY=1");
    served.signal("-TERM");
    assert_eq!(receive(), "STOPPING=1");
    assert_eq!(served.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_thousand_clients_that_do_not_read_cost_little_memory() {
    let lab = with_store();
    let limits = ["--threads", "1", "--client-connections", "2000"];
    let served = Served::start(&lab, &limits);
    let pack = first_pack(&lab.path("store"));
    let before = served.peak();
    let request = format!("GET {pack} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(20);
    let mut clients = Vec::new();
    for _ in 0..1000 {
        let mut stream = TcpStream::connect(served.address()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        clients.push(stream);
    }
    // It answers others meanwhile.
    for _ in 0..20 {
        assert_eq!(served.status("/pristine-store", ""), 200);
    }
    let more = served.peak() - before;
    assert!(more < 32 << 10, "{more} KiB for a thousand clients");
    drop(clients);
}

fn first_pack(store: &Path) -> String {
    let directory = fs::read_dir(store.join("packs"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let file = fs::read_dir(directory)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    format!("/{}", file.strip_prefix(store).unwrap().display())
}

#[test]
fn machines_are_introduced_if_that_is_wanted() {
    let lab = with_store();
    let shown = lab.json(&["image", "show", "store", "lab"]);
    let image = shown["image"].as_str().unwrap();
    let request = |served: &Served, method: &str, path: &str| {
        let mut stream = TcpStream::connect(served.address()).unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status: u16 = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    };
    let list = format!("/peers/{image}");
    let mine = format!("/peers/{image}/7117");
    let another = format!("/peers/{image}/10.1.2.3:7117");
    let quiet = Served::start(&lab, &[]);
    assert_eq!(request(&quiet, "GET", &list).0, 404);
    assert_eq!(request(&quiet, "PUT", &mine).0, 405);

    let served = Served::start(
        &lab,
        &["--peers", "--peers-lease", "90", "--peers-total", "2"],
    );
    assert_eq!(request(&served, "PUT", &mine).0, 200);
    // Who announces others must be allowed to.
    assert_eq!(request(&served, "PUT", &another).0, 403);
    let (status, text) = request(&served, "GET", &list);
    assert_eq!(
        (status, text.as_str()),
        (200, "lease 90\npeer 127.0.0.1:7117\n")
    );
    assert_eq!(request(&served, "DELETE", &mine).0, 204);
    assert_eq!(request(&served, "GET", &list).1, "lease 90\n");

    let args = [
        "--peers",
        "--peers-announcers",
        "127.0.0.0/8",
        "--peers-total",
        "2",
    ];
    let served = Served::start(&lab, &args);
    assert_eq!(request(&served, "PUT", &another).0, 200);
    assert_eq!(request(&served, "PUT", &mine).0, 200);
    let third = format!("/peers/{image}/10.1.2.4:7117");
    assert_eq!(request(&served, "PUT", &third).0, 503);
    let wrong = [
        "serve",
        "store",
        "--peers",
        "--peers-announcers",
        "somewhere",
    ];
    lab.fails(&wrong, USAGE, "somewhere");
}
