//! The demo model out of a GGUF file: the same answers, bit for bit, under the name that the file has.

mod support;

use std::path::Path;

use quire_engine::ModelSource;
use quire_engine::testing::gguf::{GgufWriter, TensorFormat, gguf_twins};
use serde_json::{Value, json};
use support::{Server, quire};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/demo");

/// The demo model with its own weights, tokenizer and chat template.
fn demo() -> GgufWriter {
    let read = |name: &str| std::fs::read(Path::new(DEMO).join(name)).expect("the demo model is here");
    let config: Value = serde_json::from_slice(&read("tokenizer_config.json")).expect("JSON");
    let mut file = gguf_twins(&ModelSource::Directory(DEMO.into()), |_, _| TensorFormat::Bf16).file;
    file.byte_level_tokenizer(&read("tokenizer.json"), "qwen2");
    file.text("tokenizer.chat_template", config["chat_template"].as_str().expect("a template"));
    file.text("general.name", "Demo in one file");
    file
}

fn answer(server: &Server, path: &str, mut body: Value) -> Value {
    body["temperature"] = json!(0.0);
    body["seed"] = json!(7);
    let answer = server.post(path, &body.to_string());
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer: Value = serde_json::from_str(&answer.body).expect("JSON");
    json!([answer["choices"], answer["usage"]])
}

#[test]
fn a_file_answers_as_the_directory_does() {
    let temp = tempfile::tempdir().expect("a folder");
    let path = temp.path().join("model.gguf");
    demo().write(&path);
    let dtype = ["--dtype", "bf16", "--kv-cache-memory", "16777216"];
    let arguments = |model: &str| -> Vec<String> { std::iter::once(model).chain(dtype).map(str::to_owned).collect() };
    let start = |model: &str| {
        let arguments = arguments(model);
        Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (file, directory) = (start(path.to_str().expect("a plain path")), start(DEMO));

    let models: Value = serde_json::from_str(&file.get("/v1/models").body).expect("JSON");
    assert_eq!(models["data"][0]["id"], "Demo-in-one-file");
    for question in ["What is 2 + 2?", "Tell me a story about a cat.", "Who are you? <|im_end|>"] {
        let chat = json!({"messages": [{"role": "user", "content": question}], "max_tokens": 40});
        let path = "/v1/chat/completions";
        assert_eq!(answer(&file, path, chat.clone()), answer(&directory, path, chat), "{question}");
    }
    // Ends where the file says that a text ends.
    let hello = answer(
        &file,
        "/v1/chat/completions",
        json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400}),
    );
    assert_eq!(hello[0][0]["finish_reason"], "stop", "{hello}");
}

#[test]
fn a_file_that_cannot_be_served_says_why() {
    let temp = tempfile::tempdir().expect("a folder");
    let path = temp.path().join("model.gguf");
    let cases: [(Vec<u8>, &str); 3] = [
        (b"not a model".to_vec(), "is no GGUF file"),
        (demo().bytes()[..100_000].to_vec(), "model.gguf: tensor"),
        (GgufWriter::default().text("general.architecture", "rwkv7").bytes(), "is not served; llama, qwen2"),
    ];
    for (bytes, expected) in cases {
        std::fs::write(&path, bytes).expect("written");
        let output = quire()
            .args(["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"])
            .arg(&path)
            .output()
            .expect("it runs");
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(log.contains(expected), "{expected}: {log}");
    }
}
