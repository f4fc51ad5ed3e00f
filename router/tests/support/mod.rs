//! The real binary on free ports, and the least of a client that these tests need.

#![allow(dead_code, reason = "each test file uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Past any honest wait, so that a test fails instead of hanging.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// The binary, with no settings from outside.
pub(crate) fn quire() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quire"));
    command.env_clear().env("HOME", "/nowhere");
    command
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    lines: Receiver<String>,
    pub(crate) log: Vec<String>,
    pub(crate) started: Instant,
    pub(crate) http: SocketAddr,
    pub(crate) grpc: SocketAddr,
}

impl Server {
    /// Starts one with the demo model and waits until it is ready.
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut server = Self::start_loading(args, &[]);
        server.wait_for("\"message\":\"ready\"");
        server
    }

    /// Starts one and waits until it listens.
    pub(crate) fn start_loading(args: &[&str], environment: &[(&str, &str)]) -> Self {
        let started = Instant::now();
        let mut child = quire()
            .args(["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--log.format", "json"])
            .args(args)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(stderr)
                .lines()
                .map_while(Result::ok)
                .take_while(|line| sender.send(line.clone()).is_ok())
                .count()
        });
        let none = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut server = Self { child, lines, log: Vec::new(), started, http: none, grpc: none };
        let address = |line: String, before: &str| {
            let rest = &line[line.find(before).unwrap() + before.len()..];
            rest[..rest.find('"').unwrap()].parse().unwrap()
        };
        server.http = address(server.wait_for("HTTP on http://"), "HTTP on http://");
        server.grpc = address(server.wait_for("gRPC on "), "gRPC on ");
        server
    }

    /// The first log line from here on that holds `text`.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.log.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no log line with {text:?} in:\n{}", self.log.join("\n")),
                Err(RecvTimeoutError::Disconnected) => panic!("it ended without {text:?}:\n{}", self.log.join("\n")),
            }
        }
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.child.id())]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end and gives its status with how long it took.
    pub(crate) fn wait(&mut self) -> (ExitStatus, Duration) {
        let start = Instant::now();
        let status = poll("the process to end", || self.child.try_wait().unwrap());
        self.log.extend(self.lines.iter());
        (status, start.elapsed())
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        request(self.http, &get_text(path))
    }

    /// The same, of a server that may end meanwhile: `None` where it does not answer.
    pub(crate) fn try_get(&self, path: &str) -> Option<Answer> {
        try_request(self.http, &get_text(path)).ok().filter(|answer| answer.status != 0)
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> Answer {
        request(self.http, &post_text(path, body))
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again until there is an answer.
pub(crate) fn poll<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

pub(crate) fn post_text(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: quire\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Opens a connection on which nothing waits for ever.
pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// One request on a connection of its own.
pub(crate) fn request(address: SocketAddr, text: &str) -> Answer {
    try_request(address, text).unwrap()
}

/// The same, where the other side may refuse it.
pub(crate) fn try_request(address: SocketAddr, text: &str) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(text.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(parse(&String::from_utf8_lossy(&answer)))
}

fn get_text(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: quire\r\nconnection: close\r\n\r\n")
}

fn parse(text: &str) -> Answer {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    Answer { status, head: head.to_lowercase(), body: body.to_owned() }
}
