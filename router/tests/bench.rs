//! `quire bench` through the real binary: against small servers that misbehave, and without any.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Output;

use serde_json::Value;
use support::quire;

const DONE: &str = "data: [DONE]\n\n";
const TOKENS: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"choices\":[{\"text\":\"b\"}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":3}}\n\n";

/// A server that answers its n-th request with `answers[n]`, the last one again and again, and closes.
fn fake_server(answers: Vec<String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for number in 0.. {
            let Ok((stream, _)) = listener.accept() else { return };
            answer(stream, &answers[number.min(answers.len() - 1)]);
        }
    });
    url
}

/// Reads a request to its end, then answers. A client that went away is its own problem.
fn answer(mut stream: TcpStream, answer: &str) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut body_len = 0;
    let mut line = String::new();
    while reader.read_line(&mut line).is_ok_and(|len| len > 2) {
        if let Some(len) = line.to_lowercase().strip_prefix("content-length:") {
            body_len = len.trim().parse().unwrap();
        }
        line.clear();
    }
    let mut body = vec![0; body_len];
    if reader.read_exact(&mut body).is_ok() {
        let _ = stream.write_all(answer.as_bytes());
    }
}

fn stream_of(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{body}")
}

fn status(line: &str, headers: &str) -> String {
    format!("HTTP/1.1 {line}\r\n{headers}content-length: 2\r\nconnection: close\r\n\r\n{{}}")
}

fn bench(args: &[&str]) -> (Output, Value) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let json = file.path().to_str().unwrap();
    let output = quire().arg("bench").args(args).args(["--json", json]).output().unwrap();
    let figures = serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap_or(Value::Null);
    (output, figures)
}

fn load(url: &str, args: &[&str]) -> (Output, Value) {
    bench(&[&["serve", "--url", url, "--model", "m", "--warmup", "0"], args].concat())
}

#[test]
fn each_way_to_fail_is_counted_by_itself() {
    let url = fake_server(vec![
        stream_of(&format!("{TOKENS}{USAGE}{DONE}")),
        status("429 Too Many Requests", "retry-after: 0\r\n"),
        status("429 Too Many Requests", ""),
        status("503 Service Unavailable", "retry-after: 0\r\n"),
        stream_of(TOKENS),
        stream_of(&format!("{TOKENS}{DONE}")),
        stream_of(&format!("{TOKENS}data: {{\"error\":{{\"message\":\"no\"}}}}\n\n{DONE}")),
        String::new(),
    ]);
    let (output, figures) = load(&url, &["--requests", "8"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!((&figures["num_requests"], &figures["num_completed"]), (&8.into(), &1.into()));
    let expected =
        [("429", 2), ("503", 1), ("broken stream", 1), ("no usage", 1), ("error event", 1), ("connection", 1)];
    for (name, count) in expected {
        assert_eq!(figures["failures"][name], count, "{name}: {figures}");
    }
    assert_eq!(figures["refused"]["num_requests"], 2);
    assert_eq!(figures["refused"]["num_with_retry_after"], 1);
    // From usage, though there were two events.
    assert_eq!((&figures["prompt_tokens"], &figures["output_tokens"]), (&5.into(), &3.into()));
}

#[test]
fn it_fails_where_all_requests_fail() {
    let url = fake_server(vec![status("500 Internal Server Error", "")]);
    let (output, figures) = load(&url, &["--requests", "3", "--concurrency", "2"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(figures["failures"]["500"], 3);
    // Nobody listens there.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (output, figures) = load(&format!("http://{closed}"), &["--requests", "2", "--rate", "1000"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(figures["failures"]["connection"], 2);
}

#[test]
fn what_is_asked_for_wrongly_is_refused() {
    for args in [
        &["serve", "--url", "https://127.0.0.1:1"][..],
        &["serve", "--rate", "1", "--concurrency", "2"],
        &["serve", "--rate", "0"],
        &["serve", "--prompt-file", "/nowhere"],
        &["model", "--batch", "0"],
        &["model", "--no-such-flag"],
        &["model", "--scheduler.block-size", "x"],
        &["nothing"],
    ] {
        let (output, _) = bench(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
    }
}

#[test]
fn the_demo_model_has_figures_without_a_server() {
    let (output, figures) = bench(&[
        "model",
        "--prompt",
        "32",
        "--batch",
        "1,3",
        "--depth",
        "0,100,100000",
        "--steps",
        "2",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "4",
        "--engine.num-threads",
        "1",
        "--label",
        "mine",
    ]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let rows = figures["rows"].as_array().unwrap();
    let shape = |row: &Value| (row["kind"].as_str().unwrap().to_owned(), row["batch"].as_u64(), row["depth"].as_u64());
    let shapes: Vec<_> = rows.iter().map(shape).collect();
    let decode = |batch, depth| ("decode".to_owned(), Some(batch), Some(depth));
    let prefill = ("prefill".to_owned(), Some(1), Some(0));
    assert_eq!(shapes, [prefill, decode(1, 0), decode(3, 0), decode(1, 100), decode(3, 100)]);
    for row in rows {
        for name in
            ["tokens_per_second", "milliseconds", "bytes", "gb_per_second", "read_ratio", "gflops", "compute_ratio"]
        {
            assert!(row[name].as_f64().is_some_and(|value| value > 0.0), "{name}: {row}");
        }
    }
    assert_eq!(figures["left_out"], serde_json::json!([[1, 100_000], [3, 100_000]]));
    assert_eq!(
        (&figures["label"], &figures["dtype"], &figures["num_threads"]),
        (&"mine".into(), &"bf16".into(), &1.into())
    );
    // A longer context is more to read, for each sequence.
    let bytes = |index: usize| rows[index]["bytes"].as_u64().unwrap();
    let (one, three) = (bytes(3) - bytes(1), bytes(4) - bytes(2));
    assert_eq!(three, 3 * one);
    assert!(figures["peaks"]["int8_gops"].as_f64().unwrap() > 0.0);
}

#[test]
fn operations_are_measured_at_any_shape() {
    let cpu = ["ops", "--device", "cpu", "--engine.num-threads", "1", "--data-mib", "1", "--milliseconds", "2"];
    let shapes = ["--linear", "64x32,96x32:gate-up", "--formats", "fp8,int8", "--rows", "1,5", "--heads", "4/2x16"];
    let attention = ["--sequences", "2x30,1x5x20", "--blocks", "16", "--cache", "fp8,int8"];
    let (output, figures) = bench(&[&cpu[..], &shapes, &attention].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let rows = figures["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * 2 * 2 + 2 * 2);
    let row =
        |row: &Value| format!("{} {} {} {} {}", row["op"], row["shape"], row["format"], row["batch"], row["context"]);
    assert_eq!(row(&rows[0]), r#""linear" "64x32" "fp8" 1 null"#);
    assert_eq!(row(&rows[7]), r#""linear" "96x32 gate-up" "int8" 5 null"#);
    assert_eq!(row(&rows[8]), r#""attention" "4/2x16, block 16" "fp8" 2 30"#);
    assert!(rows.iter().all(|row| row["microseconds"].as_f64().is_some_and(|time| time > 0.0)));
    for (option, value) in
        [("--linear", "64"), ("--linear", "7x8:gate-up"), ("--heads", "4/3x16"), ("--sequences", "1x9x8")]
    {
        let (output, _) = bench(&["ops", "--device", "cpu", option, value]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}
