//! Outputs that must have a form, over both faces. The engine here would say anything: what comes out is the form's doing.

use std::time::{Duration, Instant};

use quire_engine::testing::FakeExecutor;
use quire_proto::quire::v1 as wire;
use serde_json::{Value, json};
use tonic::Code;

use crate::harness::{EOS, Server, VOCAB, chat, saying, with};

/// An engine that draws any token, and rarely the end.
fn babbling() -> Server {
    Server::new(FakeExecutor::new(VOCAB))
}

fn schema(schema: Value) -> Value {
    json!({"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}})
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("text")
}

/// One form, as either face asks for it, and what every complete output of it is.
struct Case {
    http: Value,
    grpc: wire::output_format::Form,
    holds: fn(&str) -> bool,
}

fn cases() -> Vec<Case> {
    use wire::output_format::Form;
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2}
        },
        "required": ["name", "age", "pets"],
        "additionalProperties": false
    });
    let is_person = |text: &str| {
        let Ok(value) = serde_json::from_str::<Value>(text) else { return false };
        let pets = value["pets"]
            .as_array()
            .is_some_and(|pets| pets.len() <= 2 && pets.iter().all(|pet| pet == "cat" || pet == "dog"));
        pets && value["name"].as_str().is_some_and(|name| name.chars().count() <= 8)
            && value["age"].as_u64().is_some_and(|age| age <= 150)
            && value.as_object().is_some_and(|fields| fields.len() == 3)
    };
    let lark = "start: \"<\" inner \">\"\ninner: /[a-c]{1,3}/ | start";
    let gbnf = "root ::= \"<\" inner \">\"\ninner ::= [a-c]{1,3} | root";
    let is_nested = |text: &str| {
        let inner = text.trim_start_matches('<').trim_end_matches('>');
        let depth = text.len() - text.trim_start_matches('<').len();
        depth > 0
            && text.len() == inner.len() + 2 * depth
            && (1..=3).contains(&inner.len())
            && inner.bytes().all(|byte| (b'a'..=b'c').contains(&byte))
    };
    let tag = json!({
        "type": "structural_tag", "triggers": ["<n="],
        "structures": [{"begin": "<n=", "schema": {"type": "integer", "minimum": 1, "maximum": 9}, "end": ">"}]
    });
    vec![
        Case { http: schema(person.clone()), grpc: Form::JsonSchema(person.to_string()), holds: is_person },
        Case {
            http: json!({"structured_outputs": {"json": person.to_string()}}),
            grpc: Form::JsonSchema(person.to_string()),
            holds: is_person,
        },
        Case {
            http: json!({"structured_outputs": {"regex": "[0-9]{3}-[0-9]{4}"}}),
            grpc: Form::Regex("[0-9]{3}-[0-9]{4}".to_owned()),
            holds: |text| {
                text.len() == 8
                    && text.bytes().enumerate().all(|(i, b)| if i == 3 { b == b'-' } else { b.is_ascii_digit() })
            },
        },
        Case {
            http: json!({"structured_outputs": {"choice": ["yes", "no", "a \"quoted\"\nline"]}}),
            grpc: Form::Choices(wire::Choices {
                choices: vec!["yes".to_owned(), "no".to_owned(), "a \"quoted\"\nline".to_owned()],
            }),
            holds: |text| ["yes", "no", "a \"quoted\"\nline"].contains(&text),
        },
        Case {
            http: json!({"structured_outputs": {"grammar": lark}}),
            grpc: Form::Lark(lark.to_owned()),
            holds: is_nested,
        },
        Case {
            http: json!({"structured_outputs": {"grammar": gbnf}}),
            grpc: Form::Lark(gbnf.to_owned()),
            holds: is_nested,
        },
        Case {
            http: json!({"response_format": tag}),
            grpc: Form::StructuralTag(wire::StructuralTag {
                triggers: vec!["<n=".to_owned()],
                structures: vec![wire::TagStructure {
                    begin: "<n=".to_owned(),
                    schema: Some(json!({"type": "integer", "minimum": 1, "maximum": 9}).to_string()),
                    end: ">".to_owned(),
                }],
            }),
            holds: |text| {
                text.split("<n=").skip(1).all(|rest| {
                    let mut rest = rest.trim_start().bytes();
                    rest.next().is_some_and(|digit| (b'1'..=b'9').contains(&digit))
                })
            },
        },
    ]
}

#[tokio::test]
async fn every_complete_output_has_its_form_over_both_faces() {
    let server = babbling();
    let mut num_complete = 0;
    for (index, Case { http, grpc, holds }) in cases().into_iter().enumerate() {
        for seed in 0..4 {
            let common = json!({"seed": seed, "temperature": 1.0, "max_tokens": 300, "n": 2, "return_token_ids": true});
            let body = with(with(chat("Go"), common), http.clone());
            let answer = server.post("/v1/chat/completions", &body).await;
            assert_eq!(answer.status, 200, "{:?}", answer.body);
            let answer = answer.json();
            let mut texts = Vec::new();
            for choice in answer["choices"].as_array().expect("choices") {
                let text = choice["message"]["content"].as_str().expect("text").to_owned();
                if choice["finish_reason"] == "stop" {
                    num_complete += 1;
                    assert!(holds(&text), "case {index}: {text:?}");
                }
                texts.push(text);
            }
            let request = wire::ChatRequest {
                messages: vec![wire::ChatMessage {
                    role: "user".to_owned(),
                    content: "Go".to_owned(),
                    ..Default::default()
                }],
                sampling: Some(wire::SamplingParams {
                    seed: Some(seed),
                    temperature: Some(1.0),
                    n: Some(2),
                    ..Default::default()
                }),
                stopping: Some(wire::StoppingParams { max_tokens: Some(300), ..Default::default() }),
                format: Some(wire::OutputFormat { form: Some(grpc.clone()) }),
                ..Default::default()
            };
            let response = server.quire().chat(request).await.expect("answers").into_inner();
            let same: Vec<String> = response.choices.into_iter().map(|choice| choice.text).collect();
            assert_eq!(same, texts, "case {index}");
        }
    }
    assert!(num_complete >= 20, "only {num_complete} outputs were complete");
}

#[tokio::test]
async fn a_model_that_obeys_is_not_disturbed() {
    let text = "{\"answer\": [1, 2, \"three\"]}";
    let server = Server::saying(text);
    for format in [json!({"response_format": {"type": "json_object"}}), schema(json!(true))] {
        let answer = server.post("/v1/chat/completions", &with(chat("Go"), format.clone())).await.json();
        assert_eq!(content(&answer), text);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let streamed = with(with(chat("Go"), format), json!({"stream": true, "logprobs": true}));
        let chunks = server.post("/v1/chat/completions", &streamed).await.chunks();
        let joined: String =
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(joined, text);
    }
    // The other endpoint has the same.
    let body = json!({"prompt": "Go", "max_tokens": 50, "structured_outputs": {"json_object": true}});
    let answer = server.post("/v1/completions", &body).await.json();
    assert_eq!(answer["choices"][0]["text"], text);
}

#[tokio::test]
async fn forms_compose_with_what_else_ends_or_bounds_an_output() {
    let server = Server::saying("[1, 2, 3]");
    let list = schema(json!({"type": "array", "items": {"type": "integer"}}));
    let ask =
        async |extra: Value| server.post("/v1/chat/completions", &with(with(chat("Go"), list.clone()), extra)).await;
    let cut = ask(json!({"max_tokens": 2})).await.json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert!("[1, 2, 3]".starts_with(content(&cut)));
    let stopped = ask(json!({"stop": "2"})).await.json();
    assert_eq!((content(&stopped), &stopped["choices"][0]["stop_reason"]), ("[1, ", &json!("2")));
    // A complete output ends: the form decides, not `min_tokens`.
    let choice = json!({"structured_outputs": {"choice": ["yes"]}, "min_tokens": 30, "max_tokens": 40});
    let answer = server.post("/v1/chat/completions", &with(chat("Go"), choice)).await.json();
    assert_eq!((content(&answer), &answer["choices"][0]["finish_reason"]), ("yes", &json!("stop")));
    // Nothing is left to choose: an error, and never text that does not have the form.
    let nothing = json!({"structured_outputs": {"choice": ["yes"]}, "allowed_token_ids": [EOS]});
    let refused = server.post("/v1/chat/completions", &with(chat("Go"), nothing)).await;
    assert_eq!((refused.status.as_u16(), &refused.json()["error"]["code"]), (400, &json!("nothing_allowed")));
    let tokens = |text: &str| crate::harness::demo_ids(text);
    let resume = |generated: Vec<u32>| wire::GenerateRequest {
        prompt: Some(wire::generate_request::Prompt::Text("Go".to_owned())),
        sampling: Some(wire::SamplingParams { seed: Some(1), ..Default::default() }),
        format: Some(wire::OutputFormat { form: Some(wire::output_format::Form::Regex("[0-9]+ apples".to_owned())) }),
        resume: Some(wire::Resume { generated_token_ids: generated, choice_offset: 0 }),
        ..Default::default()
    };
    // What another server generated is followed first; where it does not have the form there is no way on.
    let done = server.quire().generate(resume(tokens("12 app"))).await.expect("goes on").into_inner();
    assert_eq!(done.choices[0].text, "les");
    let refused = server.quire().generate(resume(tokens("pears"))).await.expect_err("does not have the form");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    server.idle().await;
}

#[tokio::test]
async fn refusals_name_the_field_and_the_keyword() {
    let server = Server::saying("x");
    let deep = (0..80).fold(json!({"type": "integer"}), |inner, _| json!({"type": "array", "items": inner}));
    for (extra, param, says) in [
        (json!({"guided_json": {"type": "object"}}), "guided_json", "structured_outputs"),
        (json!({"guided_regex": "a"}), "guided_regex", "structured_outputs"),
        (json!({"response_format": {"type": "yaml"}}), "response_format.type", "json_schema"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema", "needed"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
            "response_format.json_schema.schema",
            "needed",
        ),
        (schema(json!([1])), "response_format", "object"),
        (schema(json!({"type": "string", "not": {"pattern": "a"}})), "response_format", "`not`"),
        (schema(json!({"if": {"pattern": "a"}, "then": {"maxLength": 2}})), "response_format", "`if`"),
        (schema(json!({"type": "array", "uniqueItems": true})), "response_format", "`uniqueItems`"),
        (schema(json!({"type": "string", "format": "no-such-format"})), "response_format", "`format`"),
        (schema(json!({"$ref": "http://example.com/schema"})), "response_format", "`$ref`"),
        (schema(json!({"type": "string", "maxLength": 1e9})), "response_format", "`maxLength`"),
        (schema(json!({"type": "string", "pattern": "(a"})), "response_format", "`pattern`"),
        (schema(json!({"type": "string", "minLength": 5, "maxLength": 2})), "response_format", "nothing"),
        (schema(json!({"type": "object", "x-guidance": {"lenient": true}})), "response_format", "x-guidance"),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs", "regular expression"),
        (json!({"structured_outputs": {"regex": ""}}), "structured_outputs", "empty"),
        (json!({"structured_outputs": {"choice": []}}), "structured_outputs", "empty"),
        (json!({"structured_outputs": {"choice": [1]}}), "structured_outputs.choice", "strings"),
        (json!({"structured_outputs": {"json": "not JSON"}}), "structured_outputs", "JSON"),
        (
            json!({"structured_outputs": {"grammar": "root ::= \"x\"\nx := root"}}),
            "structured_outputs",
            "line 2, column 3",
        ),
        (json!({"structured_outputs": {"grammar": "start: nobody"}}), "structured_outputs", "not well formed"),
        (json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}), "structured_outputs", "one form"),
        (
            json!({"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}}),
            "structured_outputs.whitespace_pattern",
            "not supported",
        ),
        (
            json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
            "structured_outputs",
            "one form",
        ),
        (
            json!({"response_format": {"type": "structural_tag", "triggers": ["<"], "structures": [{"begin": "x", "schema": {}, "end": ""}]}}),
            "response_format",
            "trigger",
        ),
    ] {
        let answer = server.post("/v1/chat/completions", &with(chat("Go"), extra.clone())).await;
        assert_eq!(answer.status, 400, "{extra}: {:?}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{extra}: {error}");
        assert!(error["message"].as_str().expect("words").contains(says), "{extra}: {error}");
    }
    // Deeper than a body may nest; over gRPC, where a schema is text, deeper than a schema may.
    let answer = server.post("/v1/chat/completions", &with(chat("Go"), schema(deep.clone()))).await;
    assert_eq!(answer.status, 400);
    let request = wire::GenerateRequest {
        prompt: Some(wire::generate_request::Prompt::Text("Go".to_owned())),
        format: Some(wire::OutputFormat { form: Some(wire::output_format::Form::JsonSchema(deep.to_string())) }),
        ..Default::default()
    };
    let refused = server.quire().generate(request).await.expect_err("too deep");
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("depth"), "{refused:?}");
}

/// Schemas and grammars that are made to cost much.
fn hostile() -> Vec<Value> {
    let mut all = Vec::new();
    let regex = |regex: String| json!({"structured_outputs": {"regex": regex}});
    let lark = |grammar: String| json!({"structured_outputs": {"grammar": grammar}});
    for size in [10, 100, 1000, 10_000, 60_000] {
        all.push(schema(json!({"enum": (0..size).map(|i| format!("value {i}")).collect::<Vec<_>>()})));
        all.push(schema(json!({"type": "string", "minLength": size, "maxLength": size})));
        all.push(schema(json!({"type": "array", "minItems": size, "maxItems": size, "items": {"type": "integer"}})));
        all.push(schema(json!({"type": "string", "pattern": format!("^(a|b|ab){{{size}}}$")})));
        all.push(regex(format!("(a|aa){{{size}}}b")));
        all.push(regex(format!("(x{{{size}}}){{{size}}}")));
        all.push(regex(format!("((a{{0,{size}}})*)*")));
        all.push(lark(format!("start: A{{{size}}}\nA: /[a-z]+/")));
        all.push(regex("(".repeat(size)));
        all.push(regex(format!("{}a{}", "(".repeat(size), ")*".repeat(size))));
        all.push(regex("(a|b|c)?".repeat(size)));
        all.push(regex("[^a]".repeat(size)));
        all.push(lark(format!("start: {}", "\"a\" | ".repeat(size) + "\"b\"")));
        all.push(lark(format!("start: {} \"a\" {}", "(".repeat(size), ")?".repeat(size))));
        let rules: String = (0..size.min(4000)).map(|i| format!("r{i}: r{} r{} | \"x\"\n", i + 1, i + 1)).collect();
        all.push(lark(format!("start: r0\n{rules}r{}: \"y\"", size.min(4000))));
        let wide: serde_json::Map<String, Value> =
            (0..size.min(15_000)).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
        all.push(schema(json!({"type": "object", "properties": wide})));
        all.push(schema(json!({"anyOf": (0..size.min(5000)).map(|i| json!({"type": "object", "properties": {"k": {"const": i}}, "required": ["k"]})).collect::<Vec<_>>()})));
        all.push(schema(json!({"allOf": (0..size.min(8000)).map(|i| json!({"minimum": i})).collect::<Vec<_>>()})));
        all.push(schema(json!({"oneOf": (0..size.min(5000)).map(|i| json!({"type": "string", "pattern": format!("^a{{{i}}}")})).collect::<Vec<_>>()})));
        all.push(
            json!({"structured_outputs": {"choice": (0..size).map(|i| "a".repeat(i % 100) + "b").collect::<Vec<_>>()}}),
        );
    }
    for evil in [
        "(a+)+$",
        "(a+)+",
        "(a*)*b",
        "([a-zA-Z]+)*c",
        "(a|a)*d",
        "(a|a?)+e",
        "(.*)*f",
        "(.*a){20}",
        "(.*a){200}",
        "(?:(?:a?){30}){30}a{30}",
        "[\u{0}-\u{10ffff}]{1000}",
        "(\\w+\\s?)+!",
        "^(([a-z])+.)+[A-Z]([a-z])+$",
        "a{1,100000}",
        "(a{1,1000}){1,1000}",
        "((((a{9}){9}){9}){9}){9}",
        ".{30000}",
        "(a?){5000}a{5000}",
        "\\p{L}{500}",
        "(?i)[a-z]{3000}",
        "(?=a)b",
        "(?<!a)b",
        "(a)\\1",
        "\\b\\B",
        "[[:alpha:]]{999}",
        "(ab|a|b|ba){64}(ab|a|b|ba){64}",
        "(.*[0-9].*[a-z].*[A-Z].*){8}",
        "x*".repeat(500).as_str(),
        "a**",
        "{1,2}",
        "[z-a]",
        "\\",
        "\u{0}",
    ] {
        all.push(regex(evil.to_owned()));
        all.push(schema(json!({"type": "string", "pattern": evil})));
    }
    // Chains of references, which whoever follows them by recursion goes down.
    for keyword in ["allOf", "anyOf", "oneOf"] {
        for size in [100, 4000] {
            let link = |i: usize| json!({keyword: [{"$ref": format!("#/$defs/d{}", i + 1)}]});
            let mut chain: serde_json::Map<String, Value> = (0..size).map(|i| (format!("d{i}"), link(i))).collect();
            chain.insert(format!("d{size}"), json!({"type": "integer"}));
            all.push(schema(json!({"$ref": "#/$defs/d0", "$defs": chain})));
        }
    }
    for size in [100, 5000] {
        let link = |i: usize| json!({"$ref": format!("#/$defs/d{}", i + 1)});
        let mut chain: serde_json::Map<String, Value> = (0..size).map(|i| (format!("d{i}"), link(i))).collect();
        chain.insert(format!("d{size}"), json!({"type": "integer"}));
        all.push(schema(json!({"$ref": "#/$defs/d0", "$defs": chain})));
        let link = |i: usize| json!({"type": "object", "properties": {"n": {"$ref": format!("#/$defs/d{}", i + 1)}}, "required": ["n"]});
        let mut chain: serde_json::Map<String, Value> = (0..size / 2).map(|i| (format!("d{i}"), link(i))).collect();
        chain.insert(format!("d{}", size / 2), json!({"type": "integer"}));
        all.push(schema(json!({"$ref": "#/$defs/d0", "$defs": chain})));
    }
    for cycle in [
        json!({"$ref": "#"}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        json!({"allOf": [{"$ref": "#"}]}),
        json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}),
        json!({"type": "array", "items": {"$ref": "#"}}),
        json!({"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
        json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        json!({"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1}),
        json!({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}),
        json!({"$ref": "#/$defs/none"}),
        json!({"$ref": "file:///etc/passwd"}),
        json!({"$ref": "http://127.0.0.1:1/x"}),
        json!({"$id": "http://x/", "$ref": "y"}),
        json!({"$dynamicRef": "#a", "$dynamicAnchor": "a"}),
        json!({"multipleOf": 1e-300, "type": "number"}),
        json!({"type": "integer", "minimum": -1e308, "maximum": 1e308}),
        json!({"type": "integer", "multipleOf": 7919, "minimum": 0, "maximum": 9007199254740991u64}),
        json!({"type": "integer", "multipleOf": 999999937, "minimum": 0}),
        json!({"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.1000000001}),
        json!({"type": "string", "format": "uuid", "pattern": "^z"}),
        json!({"type": 5}),
        json!({"type": ["string", "string", "null", "what"]}),
        json!({"required": "a"}),
        json!({"properties": [1]}),
        json!({"enum": []}),
        json!({"enum": "x"}),
        json!({"const": {"a": [[[[[[[[1]]]]]]]]}}),
        json!({"minLength": -1}),
        json!({"items": 7}),
        json!({"additionalProperties": false, "required": ["a"], "type": "object"}),
        json!({"patternProperties": {"(a+)+$": {"type": "integer"}, "^(b*)*": {}}}),
        json!({"patternProperties": {"a": {}, "b": {}, "c": {}, ".*": {}}, "additionalProperties": false}),
        json!({"dependentRequired": {"a": ["b"]}}),
        json!({"contains": {"type": "integer"}, "maxContains": 1000000}),
        json!({"unevaluatedProperties": false, "allOf": [{"$ref": "#"}]}),
    ] {
        all.push(schema(cycle));
    }
    for grammar in [
        "start: start",
        "start: start start | \"a\"",
        "start: a\na: b\nb: a",
        "start: (start)* \"x\"",
        "start: \"\"",
        "start: (\"\")*",
        "start: /a/ start? start? start?",
        "start: A\nA: A",
        "start: A\nA: B\nB: A",
        "%import x",
        "%json {",
        "start: %json {\"type\": \"object\"",
        "start: <|im_end|>",
        "start: <[0-3071]>*",
        "start: \"a\"{1,100000}",
        "start: (\"a\"{1,300}){1,300}",
        "start[max_tokens=0]: \"a\"",
        "start[lazy]: /(.|\\n)*/",
        "start: @1",
        "start:",
        "",
        ":::",
        "start: x::y",
        "%llguidance {\"no_forcing\": true}\nstart: \"a\"",
        "start: /(/",
        "start: /[/",
        "start: \"unterminated",
        "%ignore /.*/\nstart: \"a\"",
        "%ignore //\nstart: \"a\"",
        "start: %regex {\"substring_chars\": \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}",
    ] {
        all.push(lark(grammar.to_owned()));
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_forms_end_in_time_and_in_a_clean_answer() {
    let server = babbling();
    let hostile = hostile();
    assert!(hostile.len() >= 200, "{}", hostile.len());
    let (mut refused, mut slowest) = (0, (Duration::ZERO, String::new()));
    for extra in &hostile {
        let body = with(with(chat("Go"), json!({"max_tokens": 3, "seed": 1})), extra.clone());
        let began = Instant::now();
        let answer = server.post("/v1/chat/completions", &body).await;
        let elapsed = began.elapsed();
        let text = extra.to_string();
        let short: String = text.chars().take(160).collect();
        assert!(answer.status == 200 || answer.status == 400, "{short}: {} {:?}", answer.status, answer.body);
        if answer.status == 400 {
            refused += 1;
            let error = answer.json()["error"].to_string();
            assert!(error.len() < 512 && !error.contains("0x") && !error.contains('\\'), "{short}: {error}");
        }
        if elapsed > slowest.0 {
            slowest = (elapsed, short);
        }
    }
    println!("{} forms, {refused} refused, the slowest took {:?}: {}", hostile.len(), slowest.0, slowest.1);
    // The budget is 200 ms and two may follow one another; other tests share the cores.
    assert!(slowest.0 < Duration::from_secs(3), "{slowest:?}");
    // A good one after all the bad ones, and the other way round.
    for _ in 0..2 {
        let good = with(chat("Go"), json!({"structured_outputs": {"choice": ["fine"]}}));
        assert_eq!(content(&server.post("/v1/chat/completions", &good).await.json()), "fine");
        let bad = with(chat("Go"), json!({"structured_outputs": {"regex": "("}}));
        assert_eq!(server.post("/v1/chat/completions", &bad).await.status, 400);
    }
    server.idle().await;
}

#[tokio::test]
async fn the_end_of_the_sequence_is_no_part_of_a_form() {
    // The engine ends at once: the form does not let it.
    let server = Server::new(saying(""));
    let body = with(chat("Go"), json!({"structured_outputs": {"regex": "[ab]{4}"}, "max_tokens": 20}));
    let answer = server.post("/v1/chat/completions", &body).await.json();
    assert_eq!((content(&answer).len(), &answer["choices"][0]["finish_reason"]), (4, &json!("stop")));
}
