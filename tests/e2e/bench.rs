//! `quire bench serve` against the real server.

use std::process::{Command, Output};

use quire_tests::{Server, binary};
use serde_json::Value;

async fn load(server: &Server, args: &'static [&'static str]) -> (Output, Value) {
    let url = server.http.clone();
    let run = move || {
        let output = Command::new(binary()).args(["bench", "serve", "--url", &url]).args(args).output();
        output.expect("the program runs")
    };
    let output = tokio::task::spawn_blocking(run).await.expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // The last line is the same as JSON.
    let figures = text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null);
    (output, figures)
}

#[tokio::test]
async fn a_load_has_its_figures_and_counts_every_token() {
    let server = Server::start(&[]).await;
    let closed: &[&str] = &[
        "--requests",
        "6",
        "--concurrency",
        "3",
        "--input-tokens",
        "20",
        "--output-tokens",
        "8",
        "--vocab-size",
        "500",
    ];
    let (output, figures) = load(&server, closed).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!((&figures["num_completed"], &figures["concurrency"]), (&6.into(), &3.into()));
    assert_eq!((&figures["prompt_tokens"], &figures["output_tokens"]), (&120.into(), &48.into()));
    assert_eq!(figures["failures"], serde_json::json!({}));
    assert_eq!(figures["model"], "quire-demo");
    for name in ["ttft_ms", "tpot_ms", "itl_ms"] {
        let value = |percent: &str| figures[name][percent].as_f64().expect("a number");
        assert!(value("p50") <= value("p90") && value("p90") <= value("p99") && value("p99") > 0.0, "{figures}");
    }
    // One more for the warm-up.
    assert_eq!(server.metric("quire_generation_tokens_total", &[]).await, 56.0);

    let open: &[&str] = &[
        "--requests",
        "4",
        "--rate",
        "200",
        "--output-tokens",
        "3",
        "--warmup",
        "0",
        "--text",
        "--input-tokens",
        "5",
        "--ttft-ms",
        "100000",
        "--tpot-ms",
        "100000",
    ];
    let (output, figures) = load(&server, open).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!((&figures["num_completed"], &figures["output_tokens"]), (&4.into(), &12.into()));
    assert_eq!(figures["goodput"]["num_requests"], 4);

    // A prompt that the model has no room for.
    let too_long: &[&str] = &["--requests", "2", "--input-tokens", "5000", "--vocab-size", "500"];
    let (output, figures) = load(&server, too_long).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(figures["failures"]["400"], 2);
}
