//! Any value in any field.

use std::time::Duration;

use quire_engine::SchedulerSettings;
use quire_engine::testing::{FakeExecutor, Gate};
use quire_router::generation::Limits;
use serde_json::Value;

use crate::harness::{Server, VOCAB, post};

const REQUEST_FIELDS: &str = include_str!("../../../tests/fixtures/request_fields.txt");

/// Small numbers that look random and are the same every time.
struct Draws(u64);

impl Draws {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit
    }
}

#[tokio::test]
async fn any_value_in_any_field_is_answered_or_refused() {
    // The same list that the end-to-end tests go through, and a name that is none.
    let mut fields_of_requests: Vec<&str> = REQUEST_FIELDS.lines().collect();
    fields_of_requests.push("\u{0}");
    let scalars = [
        "null",
        "true",
        "false",
        "0",
        "-0",
        "-0.0",
        "1",
        "2",
        "8",
        "-1",
        "0.5",
        "1.0",
        "1e308",
        "1e999",
        "-1e-320",
        "2147483648",
        "4294967295",
        "4294967296",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551616",
        "\"\"",
        "\"1\"",
        "\"none\"",
        "\"text\"",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"<|im_end|>\"",
        "\"<0x-1>\"",
        "\"\u{1f600}\"",
        "\"left\"",
        "\"user\"",
        "[]",
        "{}",
        "[[]]",
        "[{}]",
        "[1,2,3]",
        "[\"a\",\"b\"]",
        "[1,\"a\"]",
        "[[1],[2]]",
        "[null]",
        "{\"type\":\"text\"}",
        "{\"1\":1}",
        "{\"a\":null}",
        "{\"role\":\"user\",\"content\":\"x\"}",
        "[{\"role\":\"user\",\"content\":\"x\"}]",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"<|im_\"}]}]",
        "{\"include_usage\":true}",
        "NaN",
        "[1,2",
        "\"",
    ];
    let gate = Gate::closed();
    gate.open();
    let server = Server::with(FakeExecutor::new(VOCAB).gated(&gate), Limits::default(), &SchedulerSettings::default());
    let mut draws = Draws(1);
    let value = |draws: &mut Draws| -> String {
        let scalar = scalars[draws.below(scalars.len())];
        match draws.below(12) {
            0 => format!("[{scalar},{}]", scalars[draws.below(scalars.len())]),
            1 => format!("{{\"type\":{scalar}}}"),
            2 => format!("{}{scalar}{}", "[".repeat(60), "]".repeat(60)),
            3 => format!("[{}]", [scalar; 30].join(",")),
            _ => scalar.to_owned(),
        }
    };
    let mut num_served = 0;
    for round in 0..6000 {
        let (path, base) = match round % 8 {
            0..4 => ("/v1/chat/completions", "\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"max_tokens\":3"),
            4..7 => ("/v1/completions", "\"prompt\":\"Hi\",\"max_tokens\":3"),
            _ => (["/tokenize", "/detokenize"][draws.below(2)], "\"x\":1"),
        };
        let mut fields: Vec<String> = Vec::new();
        let mut names: Vec<&str> = Vec::new();
        for _ in 0..draws.below(4) {
            let name = fields_of_requests[draws.below(fields_of_requests.len())];
            if !names.contains(&name) {
                names.push(name);
                fields.push(format!("{}:{}", Value::from(name), value(&mut draws)));
            }
        }
        // The base's own fields may be replaced.
        for field in base.split_inclusive("],").flat_map(|part| part.split(",\"max")) {
            let field = field.trim_end_matches(',');
            let field = if let Some(rest) = field.strip_prefix("_tokens") {
                format!("\"max_tokens{rest}")
            } else {
                field.to_owned()
            };
            if !names.iter().any(|name| field.starts_with(&format!("\"{name}\""))) {
                fields.push(field);
            }
        }
        let body = format!("{{{}}}", fields.join(","));
        let answer = tokio::time::timeout(Duration::from_secs(20), server.send(post(path, body.clone())))
            .await
            .unwrap_or_else(|_| panic!("no answer to {path} {body}"));
        let fine = answer.status == 200 || answer.status.is_client_error();
        assert!(fine, "{path} {body}: {} {:?}", answer.status, answer.body);
        num_served += u32::from(answer.status == 200);
        if answer.status != 200 {
            let error = &answer.json()["error"];
            assert!(error["message"].is_string() && error["type"].is_string(), "{body}: {error}");
        } else if answer.header("content-type").starts_with("text/event-stream") {
            assert_eq!(answer.events().last().map(String::as_str), Some("[DONE]"), "{body}");
        }
    }
    assert!(
        (1000..5000).contains(&num_served),
        "{num_served} of the bodies were served: the test draws too few good or bad ones"
    );
    server.idle().await;
}
