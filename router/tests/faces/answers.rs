//! What is answered, whole and streamed.

use quire_engine::testing::FakeExecutor;
use serde_json::{Value, json};

use crate::harness::{EOS, Server, VOCAB, chat, demo_ids, with};

#[tokio::test]
async fn chat_answers_as_a_whole() {
    let server = Server::saying("Hello there, friend.");
    let answer = server.post("/v1/chat/completions", &with(chat("Hi"), json!({"seed": 7, "max_tokens": 64}))).await;
    assert_eq!(answer.status, 200);
    let body = answer.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "demo");
    assert_eq!(body["seed"], 7);
    assert!(body["system_fingerprint"].as_str().is_some_and(|name| name.starts_with("quire-")));
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Hello there, friend.", "refusal": null}));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], Value::Null);
    assert_eq!(choice["logprobs"], Value::Null);
    let usage = &body["usage"];
    let completion = demo_ids("Hello there, friend.").len() as u64 + 1;
    assert_eq!(usage["completion_tokens"], completion);
    assert_eq!(usage["total_tokens"], usage["prompt_tokens"].as_u64().expect("a count") + completion);
    assert_eq!(answer.header("x-quire-ignored-params"), "");
    server.idle().await;
}

#[tokio::test]
async fn chat_streams_role_text_finish_usage_and_done() {
    let server = Server::saying("Hello there, friend.");
    let body = with(chat("Hi"), json!({"stream": true, "stream_options": {"include_usage": true}, "n": 2}));
    let answer = server.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    let chunks = answer.chunks();
    let (usage, chunks) = chunks.split_last().expect("chunks");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 2 * (demo_ids("Hello there, friend.").len() + 1));
    for index in 0..2 {
        let choices: Vec<&Value> =
            chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index).collect();
        assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": ""}));
        let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(text, "Hello there, friend.");
        let (last, rest) = choices.split_last().expect("choices");
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("stop")));
        assert!(rest.iter().all(|choice| choice["finish_reason"].is_null()));
    }
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["usage"].is_null()));
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["seed"] == chunks[0]["seed"]));
    server.idle().await;
}

#[tokio::test]
async fn streamed_and_whole_answers_are_the_same() {
    let server = Server::new(FakeExecutor::new(VOCAB));
    for extra in
        [json!({}), json!({"stop": ["a", "e "], "n": 3}), json!({"skip_special_tokens": false, "logprobs": true})]
    {
        let body = with(with(chat("Hi"), json!({"seed": 3, "max_tokens": 40, "temperature": 1})), extra);
        let whole = server.post("/v1/chat/completions", &body).await.json();
        let chunks = server.post("/v1/chat/completions", &with(body, json!({"stream": true}))).await.chunks();
        for choice in whole["choices"].as_array().expect("choices") {
            let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == choice["index"];
            let text: String = chunks
                .iter()
                .filter(of_choice)
                .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
                .collect();
            assert_eq!(choice["message"]["content"], text);
            let last = &chunks.iter().rfind(of_choice).expect("a chunk")["choices"][0];
            assert_eq!(
                (&last["finish_reason"], &last["stop_reason"]),
                (&choice["finish_reason"], &choice["stop_reason"])
            );
            let logprobs: Vec<Value> = chunks
                .iter()
                .filter(of_choice)
                .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
                .flatten()
                .cloned()
                .collect();
            assert_eq!(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default(), logprobs);
        }
    }
}

#[tokio::test]
async fn stop_strings_end_the_text_and_the_work() {
    let server = Server::saying("One two three four five six seven eight nine ten eleven twelve");
    let ask = |extra| with(chat("Count"), extra);
    let answer = server.post("/v1/chat/completions", &ask(json!({"stop": "ee fo"}))).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "One two thr");
    assert_eq!(answer["choices"][0]["stop_reason"], "ee fo");
    let included = ask(json!({"stop": ["ee fo", "zzz"], "include_stop_str_in_output": true}));
    let answer = server.post("/v1/chat/completions", &included).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "One two three fo");
    let later = ask(json!({"stop": [" "], "min_tokens": 5}));
    let answer = server.post("/v1/chat/completions", &later).await.json();
    assert!(answer["usage"]["completion_tokens"].as_u64().expect("a count") > 5);
    let token = demo_ids(" two")[0];
    let answer = server.post("/v1/chat/completions", &ask(json!({"stop_token_ids": [token]}))).await.json();
    assert_eq!(answer["choices"][0]["stop_reason"], token);
    let all = ask(json!({"ignore_eos": true, "max_tokens": 30, "skip_special_tokens": false}));
    let answer = server.post("/v1/chat/completions", &all).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(answer["choices"][0]["message"]["content"].as_str().expect("text").ends_with("<|im_end|>"));
    server.idle().await;
}

#[tokio::test]
async fn chat_logprobs_have_openais_shape() {
    let server = Server::saying("Hi");
    let body =
        with(chat("Hi"), json!({"logprobs": true, "top_logprobs": 2, "prompt_logprobs": 1, "return_token_ids": true}));
    let answer = server.post("/v1/chat/completions", &body).await.json();
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().expect("tokens");
    let ids = answer["choices"][0]["token_ids"].as_array().expect("ids");
    assert_eq!(tokens.len(), ids.len());
    assert_eq!(ids.last(), Some(&json!(EOS)));
    for token in tokens {
        assert_eq!(token["top_logprobs"].as_array().expect("a list").len(), 2);
        let bytes: Vec<u8> = serde_json::from_value(token["bytes"].clone()).expect("bytes");
        assert_eq!(String::from_utf8_lossy(&bytes), token["token"].as_str().expect("text"));
        assert_eq!(token["logprob"], -0.5);
    }
    let prompt = answer["prompt_token_ids"].as_array().expect("ids");
    let prompt_logprobs = answer["prompt_logprobs"].as_array().expect("a list");
    assert_eq!(prompt_logprobs.len(), prompt.len());
    assert!(prompt_logprobs[0].is_null());
    for (id, entry) in prompt.iter().zip(prompt_logprobs).skip(1) {
        assert_eq!(entry[id.to_string()]["rank"], 1);
        assert!(entry[id.to_string()]["decoded_token"].is_string());
    }
}

#[tokio::test]
async fn completions_take_every_kind_of_prompt() {
    let server = Server::saying(" ends here");
    for (prompt, num_prompts) in [
        (json!("Once"), 1),
        (json!(["Once", "Twice"]), 2),
        (json!([16, 17, 18]), 1),
        (json!([[16, 17], [18], [19, 20, 21]]), 3),
    ] {
        let body = json!({"prompt": prompt, "n": 2, "best_of": 2, "max_tokens": 20});
        let answer = server.post("/v1/completions", &body).await.json();
        assert_eq!(answer["object"], "text_completion");
        let choices = answer["choices"].as_array().expect("choices");
        assert_eq!(choices.len(), 2 * num_prompts);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!(" ends here")));
        }
        let streamed = server.post("/v1/completions", &with(body, json!({"stream": true}))).await;
        for index in 0..choices.len() {
            let text: String = streamed
                .chunks()
                .iter()
                .map(|chunk| chunk["choices"][0].clone())
                .filter(|choice| choice["index"] == index)
                .filter_map(|choice| choice["text"].as_str().map(str::to_owned))
                .collect();
            assert_eq!(text, " ends here");
        }
    }
    // 16 tokens unless the request says otherwise.
    let endless = Server::new(FakeExecutor::new(VOCAB).next_token(|_, _, _| 100));
    let answer = endless.post("/v1/completions", &json!({"prompt": "x"})).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn completions_echo_and_score() {
    let server = Server::saying(" there");
    let body = json!({"prompt": "Hello you", "echo": true, "logprobs": 2, "max_tokens": 8, "return_token_ids": true});
    let answer = server.post("/v1/completions", &body).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "Hello you there");
    let logprobs = &choice["logprobs"];
    let num_tokens = demo_ids("Hello you").len() + demo_ids(" there").len() + 1;
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().expect("a list").len(), num_tokens, "{list}");
    }
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    let joined: String = logprobs["tokens"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(joined, "Hello you there<|im_end|>");
    assert_eq!(logprobs["text_offset"][0], 0);

    let chunks = server.post("/v1/completions", &with(body, json!({"stream": true}))).await.chunks();
    let of_chunks: Vec<&Value> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["tokens"].as_array()).flatten().collect();
    assert_eq!(json!(of_chunks), logprobs["tokens"]);

    let score = json!({"prompt": "Hello you", "echo": true, "logprobs": 0, "max_tokens": 0});
    let answer = server.post("/v1/completions", &score).await.json();
    assert_eq!(answer["choices"][0]["text"], "Hello you");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len), Some(demo_ids("Hello you").len()));
}

/// Where a token's text starts: special tokens that are left out and halves of characters take no room.
#[tokio::test]
async fn text_offsets_are_characters_of_the_text() {
    let words = "a \u{1f600}b";
    let ids = demo_ids(words);
    let pieces = demo_ids("\u{1f600}");
    assert!(pieces.len() > 1, "the character is several tokens");
    // A special token in the middle, and the end behind.
    let mut said = ids.clone();
    said.insert(1, 1);
    let script = said.clone();
    let executor = FakeExecutor::new(VOCAB)
        .next_token(move |request, _, tokens| script.get(tokens.len() - request.prompt.len()).copied().unwrap_or(EOS));
    let server = Server::new(executor);
    let table = server.service.model().table();
    for echo in ["", "\u{e9}t\u{e9} "] {
        let body = json!({"prompt": if echo.is_empty() { "x" } else { echo }, "echo": !echo.is_empty(), "logprobs": 1, "max_tokens": 40});
        let answer = server.post("/v1/completions", &body).await.json();
        let choice = &answer["choices"][0];
        let text = choice["text"].as_str().expect("text");
        assert_eq!(text, format!("{echo}{words}"));
        let offsets: Vec<usize> = serde_json::from_value(choice["logprobs"]["text_offset"].clone()).expect("offsets");
        // What the tokens so far are as text, whole characters only.
        let mut expected = Vec::new();
        let mut bytes = Vec::new();
        let prompt = if echo.is_empty() { Vec::new() } else { demo_ids(echo) };
        for id in prompt.iter().chain(&said).chain(&[EOS]) {
            let so_far = match std::str::from_utf8(&bytes) {
                Ok(text) => text,
                Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).expect("valid"),
            };
            expected.push(so_far.chars().count());
            if !table.is_special(*id) {
                bytes.extend_from_slice(&table.bytes(*id));
            }
        }
        assert_eq!(offsets, expected, "{choice}");
        let chunks = server.post("/v1/completions", &with(body, json!({"stream": true}))).await.chunks();
        let streamed: Vec<usize> = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array())
            .flatten()
            .map(|offset| offset.as_u64().expect("a count") as usize)
            .collect();
        assert_eq!(streamed, expected);
    }
}
