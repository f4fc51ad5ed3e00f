//! Harness of the end-to-end tests: the program itself, on free ports of the loopback address, with the demo model.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use quire_proto::quire::v1::quire_client::QuireClient;
use serde_json::Value;
use tonic::transport::Channel;

/// How long anything that must happen is waited for. Far more than it takes: passing it is a failure, not a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A running server; killed when dropped.
pub struct Server {
    child: Mutex<Child>,
    /// What the program wrote so far.
    log: Arc<Mutex<String>>,
    /// `http://127.0.0.1:PORT`
    pub http: String,
    /// `http://127.0.0.1:PORT`
    pub grpc: String,
    pub client: reqwest::Client,
}

/// The program beside this test's own binary. `cargo test` of the workspace builds it first.
pub fn binary() -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its own path");
    let path = own.ancestors().nth(2).expect("target/<profile>/deps/<test>").join("quire");
    assert!(path.exists(), "{} is not built: run `cargo build` first", path.display());
    path
}

impl Server {
    /// Starts `quire serve` with these flags and waits until it is ready.
    pub async fn start(flags: &[&str]) -> Self {
        let mut child = Command::new(binary())
            .args(["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"])
            .args(flags)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let log = BufReader::new(child.stderr.take().expect("piped"));
        let (sender, addresses) = mpsc::channel();
        let text = Arc::new(Mutex::new(String::new()));
        let sink = Arc::clone(&text);
        // The log is read to its end, so that the program never blocks on a full pipe.
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                let mut text = sink.lock().expect("nobody panicked");
                text.push_str(&line);
                text.push('\n');
                drop(text);
                for name in ["HTTP on http://", "gRPC on "] {
                    let address = line.split_once(name).map(|(_, rest)| rest);
                    let address = address.and_then(|rest| rest.split(['"', ' ', '\u{1b}']).next());
                    if let Some(address) = address {
                        let _ = sender.send((name, format!("http://{address}")));
                    }
                }
            }
        });
        let mut server = Self {
            child: Mutex::new(child),
            log: text,
            http: String::new(),
            grpc: String::new(),
            client: reqwest::Client::new(),
        };
        while server.http.is_empty() || server.grpc.is_empty() {
            match addresses.recv_timeout(PATIENCE).expect("the program says where it listens") {
                ("gRPC on ", address) => server.grpc = address,
                (_, address) => server.http = address,
            }
        }
        let ready = format!("{}/health/ready", server.http);
        server
            .until("ready", async |server| {
                let ended = server.child.lock().expect("nobody panicked").try_wait().expect("it can be asked");
                assert!(ended.is_none(), "the program ended: {}", server.log());
                server.client.get(&ready).send().await.is_ok_and(|response| response.status() == 200)
            })
            .await;
        server
    }

    /// What the program wrote so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("nobody panicked").clone()
    }

    /// Asks again and again until the answer is yes.
    pub async fn until(&self, what: &str, mut is_so: impl AsyncFnMut(&Self) -> bool) {
        let poll = async {
            while !is_so(self).await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, poll).await.unwrap_or_else(|_| panic!("waited too long: {what}"));
    }

    /// Posts a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let request = self.client.post(format!("{}{path}", self.http)).json(body);
        request.send().await.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Posts a JSON body and expects 200 and a JSON answer.
    pub async fn ask(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let text = response.text().await.expect("a body");
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// A gRPC client of the server.
    pub async fn quire(&self) -> QuireClient<Channel> {
        QuireClient::connect(self.grpc.clone()).await.expect("gRPC answers")
    }

    /// The sum of a metric's samples whose line holds all of `labels`; 0 where there is none.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let response = self.client.get(format!("{}/metrics", self.http)).send().await.expect("metrics answer");
        let text = response.text().await.expect("a body");
        text.lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
            .filter(|line| labels.iter().all(|label| line.contains(label)))
            .map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a number"))
            .sum()
    }

    /// Whether the server is idle and holds no blocks but cached ones.
    pub async fn holds_nothing(&self) -> bool {
        self.metric("quire_requests_running", &[]).await == 0.0
            && self.metric("quire_requests_waiting", &[]).await == 0.0
            && self.metric("quire_kv_blocks", &["state=\"used\""]).await == 0.0
    }

    /// Asks the process to stop, as an orchestrator would.
    pub fn terminate(&self) {
        let sent = Command::new("kill")
            .args(["-TERM", &self.child.lock().expect("nobody panicked").id().to_string()])
            .status();
        assert!(sent.is_ok_and(|status| status.success()), "the process could not be asked to stop");
    }

    /// Waits for the process to end.
    pub async fn exit_status(&self) -> ExitStatus {
        let poll = async {
            loop {
                let ended = self.child.lock().expect("nobody panicked").try_wait();
                match ended.expect("the process can be waited for") {
                    Some(status) => return status,
                    None => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, poll).await.expect("the process ends")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let child = self.child.get_mut().expect("nobody panicked");
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The `data:` lines of a server-sent event stream, the final `[DONE]` included.
pub fn sse_data(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
}
