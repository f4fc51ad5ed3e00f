//! `/pooling`, `/classify` and Cohere's `/v2/embed`: the numbers of transformers under other servers' names.

use quire_engine::testing::FakeExecutor;
use quire_proto::quire::v1 as wire;
use serde_json::{Value, json};
use tonic::Code;

use crate::embeddings::{assert_near, numbers};
use crate::harness::{Server, VOCAB, expected, post, with};

fn server(pooling: &[&str]) -> Server {
    Server::beside(FakeExecutor::new(VOCAB), pooling)
}

const CLASSIFIERS: [&str; 3] = ["bert-classify", "xlmr-classify", "qwen3-classify"];

#[tokio::test]
async fn texts_get_the_labels_of_transformers() {
    let server = server(&CLASSIFIERS);
    for name in CLASSIFIERS {
        let expected = expected(name);
        let labels = expected["labels"].as_array().unwrap();
        let answer = server.post("/classify", &json!({"model": name, "input": expected["texts"]})).await;
        assert_eq!(answer.status, 200, "{name}: {:?}", answer.body);
        let answer = answer.json();
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!(name)));
        assert!(answer["id"].as_str().unwrap().starts_with("classify-") && answer["created"].is_u64());
        let num_tokens: usize =
            expected["token_ids"].as_array().unwrap().iter().map(|ids| ids.as_array().unwrap().len()).sum();
        assert_eq!(answer["usage"]["prompt_tokens"], num_tokens, "{name}");
        for (index, probs) in expected["probs"].as_array().unwrap().iter().enumerate() {
            let entry = &answer["data"][index];
            assert_eq!((&entry["index"], &entry["num_classes"]), (&json!(index), &json!(labels.len())));
            assert_near(&entry["probs"], probs, name);
            let probs = numbers(probs);
            let best = (0..probs.len()).max_by(|a, b| probs[*a].total_cmp(&probs[*b])).unwrap();
            assert_eq!(entry["label"], labels[best], "{name}");
        }
        // One text, and the same as tokens; and what pools whatever it is says the same.
        for input in [expected["texts"][0].clone(), expected["token_ids"][0].clone()] {
            let one = server.post("/classify", &json!({"model": name, "input": input})).await.json();
            assert_eq!(one["data"], json!([answer["data"][0]]), "{name}: the same bits alone");
            for task in [json!(null), json!("classify")] {
                let pooled =
                    server.post("/pooling", &json!({"model": name, "input": input, "task": task})).await.json();
                assert_eq!(pooled["data"][0]["data"], answer["data"][0]["probs"], "{name}");
            }
        }
    }
}

#[tokio::test]
async fn a_reranker_with_a_head_has_one_label() {
    let server = server(&["bert-rerank"]);
    let answer = server.post("/classify", &json!({"input": ["seven", "the cat"]})).await;
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    let answer = answer.json();
    assert_eq!(answer["model"], "bert-rerank", "the first that classifies");
    for entry in answer["data"].as_array().unwrap() {
        assert_eq!((&entry["label"], &entry["num_classes"]), (&json!("LABEL_0"), &json!(1)));
        let probs = numbers(&entry["probs"]);
        assert!(probs.len() == 1 && (0.0..=1.0).contains(&probs[0]), "{probs:?}");
    }
}

#[tokio::test]
async fn pooling_is_what_the_model_does() {
    let server = server(&["bert-mean", "bert-classify"]);
    let texts = expected("bert-mean")["texts"].clone();
    let embedded = server.post("/v1/embeddings", &json!({"model": "bert-mean", "input": texts})).await.json();
    for body in [
        json!({"model": "bert-mean", "input": texts}),
        json!({"input": texts}),
        json!({"input": texts, "task": "embed", "normalize": true, "user": "me"}),
        json!({"model": "bert-mean", "input": expected("bert-mean")["token_ids"]}),
    ] {
        let pooled = server.post("/pooling", &body).await;
        assert_eq!(pooled.status, 200, "{:?}", pooled.body);
        assert!(!pooled.headers.contains_key("x-quire-ignored-params"));
        let pooled = pooled.json();
        assert!(pooled["id"].as_str().unwrap().starts_with("pooling-"));
        assert_eq!((&pooled["model"], &pooled["usage"]), (&embedded["model"], &embedded["usage"]));
        for (index, entry) in pooled["data"].as_array().unwrap().iter().enumerate() {
            assert_eq!((&entry["index"], &entry["object"]), (&json!(index), &json!("pooling")));
            assert_eq!(entry["data"], embedded["data"][index]["embedding"]);
        }
    }
    for extra in [json!({"encoding_format": "base64"}), json!({"dimensions": 8}), json!({"truncate_prompt_tokens": 3})]
    {
        let body = with(json!({"model": "bert-mean", "input": "a b c d e"}), extra);
        let [pooled, embedded] = [server.post("/pooling", &body).await, server.post("/v1/embeddings", &body).await];
        assert_eq!(pooled.json()["data"][0]["data"], embedded.json()["data"][0]["embedding"], "{body}");
    }
    // Whichever classifies, where that is asked for.
    let classified = server.post("/pooling", &json!({"input": "seven", "task": "classify"})).await.json();
    assert_eq!(classified["model"], "bert-classify");
}

#[tokio::test]
async fn what_is_not_served_is_refused_by_name() {
    let server = server(&["bert-mean", "bert-classify", "qwen3-rerank"]);
    for (path, body, param) in [
        ("/pooling", json!({"model": "bert-mean"}), "input"),
        ("/pooling", json!({"input": "a", "task": "token_embed"}), "task"),
        ("/pooling", json!({"input": "a", "task": "embed&token_classify"}), "task"),
        ("/pooling", json!({"input": "a", "task": "sing"}), "task"),
        ("/pooling", json!({"input": "a", "data": {"path": "x"}}), "data"),
        ("/pooling", json!({"input": "a", "encoding_format": "bytes"}), "encoding_format"),
        ("/pooling", json!({"input": "a", "embed_dtype": "float16"}), "embed_dtype"),
        ("/pooling", json!({"input": "a", "endianness": "big"}), "endianness"),
        ("/pooling", json!({"input": "a", "padding": "max_length"}), "padding"),
        ("/pooling", json!({"input": "a", "use_activation": false}), "use_activation"),
        ("/pooling", json!({"input": "a", "normalize": false, "use_activation": true}), "normalize"),
        ("/pooling", json!({"input": "a", "normalize": true, "use_activation": false}), "use_activation"),
        ("/v1/embeddings", json!({"input": "a", "use_activation": false}), "use_activation"),
        ("/pooling", json!({"input": "a", "dimensions": 33}), "dimensions"),
        ("/pooling", json!({"messages": [{"role": "user", "content": "a"}], "input": "a"}), "messages"),
        ("/pooling", json!({"model": "bert-classify", "input": "a", "dimensions": 2}), "dimensions"),
        ("/pooling", json!({"model": "bert-classify", "input": "a", "use_activation": false}), "use_activation"),
        ("/pooling", json!({"model": "bert-classify", "input": "a", "normalize": false}), "normalize"),
        ("/pooling", json!({"model": "bert-classify", "input": "a", "normalize": true}), "normalize"),
        ("/pooling", json!({"model": "bert-classify", "input": "a", "task": "embed"}), "model"),
        ("/pooling", json!({"model": "bert-mean", "input": "a", "task": "classify"}), "model"),
        ("/pooling", json!({"model": "qwen3-rerank", "input": "a"}), "model"),
        ("/pooling", json!({"model": "demo", "input": "a"}), "model"),
        ("/classify", json!({"model": "bert-classify"}), "input"),
        ("/classify", json!({"input": []}), "input"),
        ("/classify", json!({"input": [[1_000_000]]}), "input[0]"),
        ("/classify", json!({"input": "a", "use_activation": false}), "use_activation"),
        ("/classify", json!({"input": "a", "dimensions": 2}), "dimensions"),
        ("/classify", json!({"input": "a", "messages": [{"role": "user", "content": "a"}]}), "messages"),
        ("/classify", json!({"input": "a", "priority": 2}), "priority"),
        ("/classify", json!({"model": "bert-mean", "input": "a"}), "model"),
        ("/classify", json!({"model": "qwen3-rerank", "input": "a"}), "model"),
        ("/classify", json!({"model": "demo", "input": "a"}), "model"),
        // What tells labels apart scores no pairs.
        ("/score", json!({"model": "bert-classify", "text_1": "a", "text_2": "b"}), "model"),
        ("/rerank", json!({"model": "bert-classify", "query": "a", "documents": ["b"]}), "model"),
        ("/v1/embeddings", json!({"model": "bert-classify", "input": "a"}), "model"),
        ("/v2/embed", json!({"model": "bert-mean"}), "texts"),
        ("/v2/embed", json!({"texts": []}), "texts"),
        ("/v2/embed", json!({"texts": ["a"], "images": ["x"]}), "images"),
        ("/v2/embed", json!({"texts": ["a"], "inputs": [{"content": []}]}), "inputs"),
        ("/v2/embed", json!({"texts": ["a"], "input_type": "image"}), "input_type"),
        ("/v2/embed", json!({"texts": ["a"], "embedding_types": ["int8"]}), "embedding_types"),
        ("/v2/embed", json!({"texts": ["a"], "output_dimension": 33}), "output_dimension"),
        ("/v2/embed", json!({"texts": ["a"], "max_tokens": 0}), "max_tokens"),
        ("/v2/embed", json!({"texts": ["a"], "max_tokens": 100_000}), "max_tokens"),
        (
            "/v2/embed",
            json!({"texts": ["a"], "output_dimension": 9, "embedding_types": ["binary"]}),
            "output_dimension",
        ),
        ("/v2/embed", json!({"texts": ["a"], "truncate": "START"}), "truncate"),
        ("/v2/embed", json!({"texts": ["a"], "truncate": "NONE", "max_tokens": 4}), "max_tokens"),
        ("/v2/embed", json!({"texts": ["a"], "model": "bert-classify"}), "model"),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{path} {body}: {:?}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{path} {body}: {:?}", answer.body);
        let message = error["message"].as_str().unwrap();
        // No other route's fields are named, and no numbers that only they take.
        assert!(path != "/v2/embed" || !(message.contains("-1") || message.contains("truncate_prompt")), "{message}");
    }
    let unknown = server.post("/classify", &json!({"input": "a", "no_such_field": 1})).await;
    assert_eq!((unknown.status.as_u16(), unknown.header("x-quire-ignored-params")), (200, "no_such_field"));
    let none = server.post("/classify", &json!({"model": "none", "input": "a"})).await;
    assert_eq!((none.status.as_u16(), &none.json()["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn cohere_s_form_has_the_same_vectors() {
    let server = server(&["bert-mean", "qwen3-last"]);
    let texts = json!(["The cat sat on the mat.", "Seven"]);
    let embedded = server.post("/v1/embeddings", &json!({"model": "bert-mean", "input": texts})).await.json();
    let body = json!({
        "model": "bert-mean", "texts": texts, "input_type": "search_document",
        "embedding_types": ["float", "binary", "ubinary", "base64"],
    });
    let answer = server.post("/v2/embed", &body).await;
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    // The model has a prompt for queries alone.
    assert_eq!(answer.header("x-quire-ignored-params"), "input_type");
    let answer = answer.json();
    assert_eq!((&answer["texts"], &answer["response_type"]), (&texts, &json!("embeddings_by_type")));
    assert_eq!(answer["meta"]["billed_units"]["input_tokens"], embedded["usage"]["prompt_tokens"]);
    for index in 0..2 {
        let vector = &embedded["data"][index]["embedding"];
        let forms = &answer["embeddings"];
        assert_eq!(&forms["float"][index], vector);
        let [signed, unsigned] = ["binary", "ubinary"].map(|form| numbers(&forms[form][index]));
        assert_eq!(signed.len(), 32 / 8);
        assert!(signed.iter().zip(&unsigned).all(|(signed, unsigned)| signed + 128.0 == *unsigned));
        let first_bit = numbers(vector)[0] >= 0.0;
        assert_eq!(unsigned[0] >= 128.0, first_bit);
        assert_eq!(forms["base64"][index].as_str().unwrap().len(), (32 * 4_usize).div_ceil(3) * 4);
    }
    let query = json!({"model": "bert-mean", "texts": ["seven"], "input_type": "search_query", "output_dimension": 8});
    let found = server.post("/v2/embed", &query).await;
    // A strict request is not served where what it says makes no difference.
    let strict = |body: &Value| {
        let mut request = post("/v2/embed", body.to_string());
        request.headers_mut().insert("x-quire-strict", "true".parse().expect("a value"));
        request
    };
    let refused = server.send(strict(&body)).await;
    assert_eq!((refused.status.as_u16(), &refused.json()["error"]["param"]), (400, &json!("input_type")));
    assert_eq!(server.send(strict(&query)).await.status, 200);
    assert!(!found.headers.contains_key("x-quire-ignored-params"));
    let prompted = json!({"model": "bert-mean", "input": "seven", "prompt_name": "query", "dimensions": 8});
    let prompted = server.post("/v1/embeddings", &prompted).await.json();
    let embeddings = found.json()["embeddings"].clone();
    assert_eq!(embeddings["float"][0], prompted["data"][0]["embedding"]);
    assert_eq!(embeddings.as_object().unwrap().len(), 1, "what was not asked for is not there");
    // Longer texts are cut, unless that is not wanted.
    let long = json!({"model": "bert-mean", "texts": ["a ".repeat(500)]});
    assert_eq!(server.post("/v2/embed", &long).await.status, 200);
    let refused = server.post("/v2/embed", &with(long, json!({"truncate": "NONE"}))).await;
    let error = &refused.json()["error"];
    assert_eq!((refused.status.as_u16(), &error["code"]), (400, &json!("context_length_exceeded")));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("`truncate`: END") && !message.contains("truncate_prompt_tokens"), "{message}");
    let cut: Value = json!({"model": "bert-mean", "texts": ["a b c d e f"], "max_tokens": 3});
    assert_eq!(server.post("/v2/embed", &cut).await.json()["meta"]["billed_units"]["input_tokens"], 3);
}

#[tokio::test]
async fn over_grpc_the_same_labels_come_back() {
    let server = server(&["bert-mean", "bert-classify"]);
    let texts = expected("bert-classify");
    let over_http = server.post("/classify", &json!({"input": texts["texts"]})).await.json();
    let mut quire = server.quire();
    let asked = wire::ClassifyRequest {
        texts: texts["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect(),
        request_id: "mine".into(),
        ..Default::default()
    };
    let answer = quire.classify(asked.clone()).await.expect("answers");
    assert_eq!(answer.metadata().get("quire-request-id").expect("an id"), "mine");
    let answer = answer.into_inner();
    assert_eq!((answer.model.as_str(), json!(answer.labels)), ("bert-classify", texts["labels"].clone()));
    assert_eq!(json!(answer.prompt_tokens), over_http["usage"]["prompt_tokens"]);
    for (found, entry) in answer.classifications.iter().zip(over_http["data"].as_array().unwrap()) {
        let probs: Vec<f32> = numbers(&entry["probs"]).into_iter().map(|number| number as f32).collect();
        assert_eq!((json!(found.label), &found.probabilities), (entry["label"].clone(), &probs));
    }
    let ids = texts["token_ids"][1].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let tokens = wire::ClassifyRequest { token_ids: vec![wire::TokenIds { ids }], ..Default::default() };
    let of_tokens = quire.classify(tokens.clone()).await.expect("answers").into_inner();
    assert_eq!(of_tokens.classifications, answer.classifications[1..2]);
    for (refused, code) in [
        (wire::ClassifyRequest { model: "none".into(), ..asked.clone() }, Code::NotFound),
        (wire::ClassifyRequest { model: "bert-mean".into(), ..asked.clone() }, Code::InvalidArgument),
        (wire::ClassifyRequest { texts: Vec::new(), ..asked.clone() }, Code::InvalidArgument),
        (wire::ClassifyRequest { token_ids: tokens.token_ids, ..asked }, Code::InvalidArgument),
    ] {
        assert_eq!(quire.classify(refused).await.expect_err("refused").code(), code);
    }
}
