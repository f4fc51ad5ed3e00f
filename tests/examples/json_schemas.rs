//! Asks the demo model for outputs of every schema of a folder laid out like the public JSON Schema test suite, and judges
//! them by another implementation: each is valid, or refused by the keyword at fault, or was cut off by its length.
//!
//! `just schemas FOLDER`; FOLDER is a draft's, `tests/draft2020-12` of the suite. Ends with 1 where an output was not valid.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use quire_tests::Server;
use serde_json::{Value, json};

/// Greedy, then two draws: a small model can lose itself in a string that never ends.
const TRIES: [(f64, i64); 3] = [(0.0, 0), (0.8, 1), (1.2, 2)];
const MAX_TOKENS: u32 = 256;

#[derive(Default)]
struct Counts {
    valid: u32,
    refused: u32,
    cut_off: u32,
    unjudged: u32,
    wrong: Vec<String>,
    /// Refusals by their message.
    reasons: BTreeMap<String, u32>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Some(folder) = std::env::args().nth(1) else {
        eprintln!("which folder? It holds files such as enum.json, each a list of schemas with instances");
        return ExitCode::FAILURE;
    };
    let server = Server::start(&[]).await;
    let mut counts = Counts::default();
    for (name, schema) in schemas(Path::new(&folder)) {
        try_schema(&server, &name, &schema, &mut counts).await;
    }
    let Counts { valid, refused, cut_off, unjudged, wrong, reasons } = counts;
    let total = valid + refused + cut_off + unjudged + wrong.len() as u32;
    for (reason, count) in reasons {
        println!("{count:4}  {reason}");
    }
    println!(
        "{total} schemas: {valid} gave valid output, {refused} were refused, {cut_off} were cut off at {MAX_TOKENS} tokens"
    );
    println!("output: {:.1} %", 100.0 * f64::from(valid) / f64::from(total.max(1)));
    for what in &wrong {
        println!("WRONG {what}");
    }
    if wrong.is_empty() && total > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Every schema of the folder's files, in order, with a name.
fn schemas(folder: &Path) -> Vec<(String, Value)> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    let mut all = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let groups: Vec<Value> =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        for group in groups {
            let name = format!("{file}: {}", group["description"].as_str().unwrap_or_default());
            all.push((name, group["schema"].clone()));
        }
    }
    all
}

async fn try_schema(server: &Server, name: &str, schema: &Value, counts: &mut Counts) {
    for (temperature, seed) in TRIES {
        let body = json!({
            "messages": [{"role": "user", "content": "Give me an example as JSON."}],
            "max_tokens": MAX_TOKENS, "temperature": temperature, "seed": seed,
            "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": schema}}
        });
        let response = server.post("/v1/chat/completions", &body).await;
        let status = response.status();
        let answer: Value = response.json().await.expect("JSON");
        if status == 400 {
            counts.refused += 1;
            let message = answer["error"]["message"].as_str().unwrap_or_default().to_owned();
            *counts.reasons.entry(message).or_default() += 1;

            return;
        }
        if status != 200 {
            counts.wrong.push(format!("{name}: status {status}"));
            return;
        }
        let choice = &answer["choices"][0];
        if choice["finish_reason"] == "stop" {
            let text = choice["message"]["content"].as_str().unwrap_or_default();
            match serde_json::from_str::<Value>(text) {
                Ok(instance) => match jsonschema::validator_for(schema) {
                    Ok(validator) if validator.is_valid(&instance) => counts.valid += 1,
                    Ok(_) => counts.wrong.push(format!("{name}: {schema} does not allow {instance}")),
                    // Of a vocabulary of its own: there is nobody to judge.
                    Err(_) => counts.unjudged += 1,
                },
                Err(error) => counts.wrong.push(format!("{name}: {error}: {text}")),
            }
            return;
        }
    }
    counts.cut_off += 1;
}
