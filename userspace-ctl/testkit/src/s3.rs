// SPDX-License-Identifier: GPL-2.0

//! A real service of S3, for tests.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Which service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum S3Kind {
    /// Honours conditional puts of both kinds.
    Conditional,
    /// Honours `If-None-Match`, and ignores `If-Match`.
    NoIfMatch,
}

/// A service with a bucket `images`, what it holds is in memory; it ends when this is dropped. The credentials are
/// any.
#[derive(Debug)]
pub struct S3Service {
    child: Child,
    port: u16,
}

impl S3Service {
    /// Starts one, with `scripts/moto`.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(kind: S3Kind) -> io::Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/moto");
        let mut command = Command::new(script);
        if kind == S3Kind::NoIfMatch {
            command.arg("--debian");
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        let port = line.trim().parse();
        let service = S3Service {
            child,
            port: port.map_err(|_| io::Error::other("scripts/moto does not start"))?,
        };
        service.request("PUT /images HTTP/1.1")?;
        Ok(service)
    }

    /// The location of a store in the bucket.
    pub fn location(&self, prefix: &str) -> String {
        let endpoint = self.endpoint();
        format!("s3://images/{prefix}?endpoint={endpoint}&region=us-east-1")
    }

    /// The URL of the service.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Sends a request without a body that nobody signed; gives the answer.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn request(&self, line: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        let host = format!("Host: 127.0.0.1:{}", self.port);
        let rest = "Content-Length: 0\r\nConnection: close";
        write!(stream, "{line}\r\n{host}\r\n{rest}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for S3Service {
    fn drop(&mut self) {
        // It ends with its input; the wait leaves no zombie.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}
