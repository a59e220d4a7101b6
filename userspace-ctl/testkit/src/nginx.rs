// SPDX-License-Identifier: GPL-2.0

//! nginx as it is installed, over HTTP and HTTPS.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A real nginx; it ends when this is dropped.
#[derive(Debug)]
pub struct Nginx {
    child: Child,
    directory: tempfile::TempDir,
    port: u16,
}

impl Nginx {
    /// Serves a directory on a port of the loopback; `server` are more lines for the server, `listen` options of its port.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(root: &Path, listen: &str, server: &str) -> io::Result<Nginx> {
        let mut why = String::new();
        // nginx wants a number, and the port may be taken between its choice and its use.
        for _ in 0..10 {
            let free = std::net::TcpListener::bind("127.0.0.1:0")?;
            let port = free.local_addr()?.port();
            drop(free);
            match Nginx::try_start(root, port, listen, server)? {
                Ok(nginx) => return Ok(nginx),
                Err(log) => why = log,
            }
        }
        Err(io::Error::other(format!("nginx does not start: {why}")))
    }

    fn try_start(
        root: &Path,
        port: u16,
        listen: &str,
        server: &str,
    ) -> io::Result<Result<Nginx, String>> {
        let directory = tempfile::tempdir()?;
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
        fs::write(&config, text)?;
        let mut command = Command::new("nginx");
        command.arg("-e").arg(directory.path().join("start.log"));
        command.arg("-p").arg(directory.path());
        command.arg("-c").arg(&config);
        let mut child = command.stdout(Stdio::null()).spawn()?;
        loop {
            if child.try_wait()?.is_some() {
                let log = fs::read_to_string(directory.path().join("start.log"));
                return Ok(Err(log.unwrap_or_default()));
            }
            // Written when it listens.
            let pid = fs::read_to_string(directory.path().join("pid"));
            if pid.is_ok_and(|pid| !pid.is_empty()) {
                return Ok(Ok(Nginx {
                    child,
                    directory,
                    port,
                }));
            }
            std::thread::yield_now();
        }
    }

    /// Its port on the loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The lines of the access log.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn log(&self) -> io::Result<Vec<String>> {
        let log = fs::read_to_string(self.directory.path().join("access.log"))?;
        Ok(log.lines().map(str::to_owned).collect())
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A certificate authority made for a test, and a certificate for 127.0.0.1 by it: the directory of `ca.pem`, `server.pem` and
/// `server.key`.
///
/// # Errors
/// If openssl cannot make them.
pub fn authority() -> io::Result<tempfile::TempDir> {
    let directory = tempfile::tempdir()?;
    let openssl = |arguments: &str| -> io::Result<()> {
        let mut command = Command::new("openssl");
        let command = command.args(arguments.split_whitespace());
        let output = command.current_dir(directory.path()).output()?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let errors = String::from_utf8_lossy(&output.stderr);
                Err(io::Error::other(format!("openssl {arguments}: {errors}")))
            }
        }
    };
    fs::write(
        directory.path().join("names"),
        "subjectAltName=IP:127.0.0.1\n",
    )?;
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc";
    openssl(&format!(
        "req -x509 {key} -days 2 -subj /CN=authority -keyout ca.key -out ca.pem"
    ))?;
    openssl(&format!(
        "req {key} -subj /CN=server -keyout server.key -out server.csr"
    ))?;
    openssl(
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -days 2 -extfile names -out server.pem",
    )?;
    Ok(directory)
}
