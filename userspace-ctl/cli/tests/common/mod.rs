// SPDX-License-Identifier: GPL-2.0

//! What the tests of the command share: a directory in which it runs, and a server.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

// Exit codes, as `pristine --help` lists them.
pub const OK: i32 = 0;
pub const USAGE: i32 = 2;
pub const NOT_FOUND: i32 = 3;
pub const DAMAGED: i32 = 4;
pub const IO: i32 = 6;
pub const BUSY: i32 = 7;
pub const UNSUPPORTED: i32 = 8;
pub const DENIED: i32 = 9;
pub const EXISTS: i32 = 11;
pub const UNTRUSTED: i32 = 15;
pub const NO_KEY: i32 = 16;

/// The words of a command line without spaces in them.
pub fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// Bytes in all files below a directory.
pub fn bytes_of(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).unwrap();
    let sizes = entries.map(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => bytes_of(&path),
            false => path.metadata().unwrap().len(),
        }
    });
    sizes.sum()
}

/// A temporary directory, in which commands are run.
pub struct Lab(tempfile::TempDir);

impl Lab {
    pub fn new() -> Self {
        Lab(tempfile::tempdir().unwrap())
    }

    /// With a disk image `disk.img`: a quarter of it noise, then 16 blocks of that again, then zeros.
    pub fn with_disk(bytes: usize) -> Self {
        let lab = Lab::new();
        let mut disk = pristine_testkit::noise(1, bytes / 4);
        disk.extend_from_within(..64 << 10);
        disk.resize(bytes, 0);
        fs::write(lab.path("disk.img"), disk).unwrap();
        lab
    }

    pub fn directory(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Any program, without input, and without what the environment says to `pristine`.
    pub fn program(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(self.0.path())
            .stdin(Stdio::null());
        for name in [
            "PRISTINE_IDENTITY",
            "PRISTINE_KEY_PASSWORD",
            "PRISTINE_TOKEN",
            "PRISTINE_TOKEN_FILE",
            "SOURCE_DATE_EPOCH",
        ] {
            command.env_remove(name);
        }
        command
    }

    pub fn command(&self, args: &[&str]) -> Command {
        self.program(env!("CARGO_BIN_EXE_pristine"), args)
    }

    /// Runs a command, in a session of its own: without a terminal that could be asked.
    pub fn run(&self, args: &[&str]) -> Output {
        let args = [&["--wait", env!("CARGO_BIN_EXE_pristine")], args].concat();
        self.program("setsid", &args).output().unwrap()
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(OK), "{args:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must succeed, and parses its JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.text(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap()
    }

    /// Runs a command that must fail with a code, a message on stderr that holds `says`, and nothing on stdout; with
    /// `--json` the error is JSON, unless the command line itself is what is wrong.
    pub fn fails(&self, args: &[&str], code: i32, says: &str) {
        let output = self.run(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        assert!(errors.contains(says), "{args:?}: {errors}");
        assert!(output.stdout.is_empty(), "{args:?}");
        if code != USAGE {
            let output = self.run(&[args, &["--json"]].concat());
            let error: Value = serde_json::from_slice(&output.stderr).unwrap();
            assert!(error["error"]["what"].is_string(), "{error}");
            assert!(error["error"]["code"].is_string(), "{error}");
        }
    }

    /// Runs a line of shell that must succeed.
    pub fn sh(&self, line: &str) {
        let status = self.program("sh", &["-ec", line]).status();
        assert!(status.unwrap().success(), "{line}");
    }

    /// Serves a store until what is returned is dropped.
    pub fn serve(&self, store: &str, args: &[&str]) -> Server {
        let args = [&["serve", store, "--listen", "127.0.0.1:0", "--json"], args].concat();
        let child = self.command(&args).stdout(Stdio::piped()).spawn().unwrap();
        // From here on it is ended with the test, however that goes.
        let mut server = Server {
            child,
            report: Value::Null,
            url: String::new(),
        };
        // The report comes once the port is open.
        let mut reader = BufReader::new(server.child.stdout.take().unwrap());
        let mut text = String::new();
        while !text.ends_with("}\n") {
            assert_ne!(reader.read_line(&mut text).unwrap(), 0, "{text}");
        }
        server.report = serde_json::from_str(&text).unwrap();
        let url = server.report["url"].as_str().unwrap();
        server.url = url.trim_end_matches('/').to_owned();
        server
    }
}

/// `pristine serve`, killed when this is dropped.
pub struct Server {
    child: Child,
    /// What it printed when it was ready.
    pub report: Value,
    pub url: String,
}

impl Server {
    /// Sends it a signal, and returns its exit code.
    pub fn stop(mut self, signal: &str) -> i32 {
        let id = self.child.id().to_string();
        let kill = Command::new("kill").args([signal, &id]).status().unwrap();
        assert!(kill.success());
        self.child.wait().unwrap().code().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The names in a JSON object, sorted.
pub fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}
