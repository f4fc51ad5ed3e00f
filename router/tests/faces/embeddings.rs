//! Vectors, scores, and several models in one server: texts come out as transformers has them, each request gets the model
//! that it names.

use quire_engine::testing::FakeExecutor;
use quire_proto::quire::v1 as wire;
use quire_proto::vllm::grpc::engine as vllm;
use quire_proto::vllm::grpc::engine::vllm_engine_client::VllmEngineClient;
use serde_json::{Value, json};
use tonic::Code;

use crate::harness::{Server, VOCAB, chat, expected, saying, with};

const TOLERANCE: f64 = 1e-4;

fn server(pooling: &[&str]) -> Server {
    Server::beside(FakeExecutor::new(VOCAB), pooling)
}

pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

pub(crate) fn assert_near(found: &Value, expected: &Value, what: &str) {
    let (found, expected) = (numbers(found), numbers(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < TOLERANCE, "{what}: {found} for {expected}");
    }
}

#[tokio::test]
async fn texts_become_the_vectors_of_transformers_with_every_kind_of_tokenizer() {
    let names = ["bert-mean", "bert-cls-raw", "xlmr-cls", "qwen3-last"];
    let server = server(&names);
    for name in names {
        let expected = expected(name);
        let texts = expected["texts"].clone();
        let answer = server.post("/v1/embeddings", &json!({"model": name, "input": texts})).await;
        assert_eq!(answer.status, 200, "{name}: {:?}", answer.body);
        let answer = answer.json();
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!(name)));
        let num_tokens: usize =
            expected["token_ids"].as_array().unwrap().iter().map(|ids| ids.as_array().unwrap().len()).sum();
        assert_eq!(answer["usage"]["prompt_tokens"], num_tokens, "{name}");
        for (index, vector) in expected["vectors"].as_array().unwrap().iter().enumerate() {
            let entry = &answer["data"][index];
            assert_eq!((&entry["index"], &entry["object"]), (&json!(index), &json!("embedding")));
            assert_near(&entry["embedding"], vector, name);
        }
        // One text, and the same as tokens.
        for input in [texts[0].clone(), expected["token_ids"][0].clone(), json!([expected["token_ids"][0]])] {
            let one = server.post("/v1/embeddings", &json!({"model": name, "input": input})).await.json();
            assert_eq!(one["data"].as_array().unwrap().len(), 1);
            assert_eq!(one["data"][0]["embedding"], answer["data"][0]["embedding"], "{name}: the same bits alone");
        }
    }
}

#[tokio::test]
async fn numbers_come_as_they_are_asked_for() {
    let server = server(&["bert-mean", "bert-cls-raw"]);
    let ask = async |extra: Value| {
        let body = with(json!({"model": "bert-mean", "input": "seven"}), extra);
        let answer = server.post("/v1/embeddings", &body).await;
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answer.json()["data"][0]["embedding"].clone()
    };
    let whole = numbers(&ask(json!({})).await);
    let encoded = ask(json!({"encoding_format": "base64"})).await;
    assert_eq!(encoded.as_str().unwrap().len(), (whole.len() * 4).div_ceil(3) * 4);
    let short = numbers(&ask(json!({"dimensions": 8})).await);
    assert_eq!(short.len(), 8);
    assert!((short.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5, "as long as it was");
    let direction = whole[0] / whole[1];
    assert!((short[0] / short[1] - direction).abs() < 1e-3 * direction.abs());
    // A prompt of the model's own stands before the text.
    let prompted = ask(json!({"prompt_name": "query"})).await;
    let written = server.post("/v1/embeddings", &json!({"model": "bert-mean", "input": "seven seven"})).await.json();
    assert_eq!(prompted, written["data"][0]["embedding"]);
    // Cut to three tokens: the first of the text between the two that the tokenizer adds.
    let body = json!({"model": "bert-mean", "input": "a b c d e f", "truncate_prompt_tokens": 3});
    let cut = server.post("/v1/embeddings", &body).await.json();
    assert_eq!(cut["usage"]["total_tokens"], 3);
    let alone = server.post("/v1/embeddings", &json!({"model": "bert-mean", "input": "a"})).await.json();
    assert_eq!(cut["data"], alone["data"]);
    // Vectors of any length stay so.
    let raw = server.post("/v1/embeddings", &json!({"model": "bert-cls-raw", "input": "seven"})).await.json();
    let length = numbers(&raw["data"][0]["embedding"]).iter().map(|x| x * x).sum::<f64>();
    assert!((length - 1.0).abs() > 1e-2);
}

#[tokio::test]
async fn what_is_not_served_is_refused_by_name() {
    let server = server(&["bert-mean", "bert-rerank"]);
    let base = || json!({"model": "bert-mean", "input": "seven"});
    for (extra, param) in [
        (json!({"input": ""}), "input[0]"),
        (json!({"input": []}), "input"),
        (json!({"input": [1, "a"]}), "input"),
        (json!({"input": 7}), "input"),
        (json!({"input": [[1_000_000]]}), "input[0]"),
        (json!({"encoding_format": "bytes"}), "encoding_format"),
        (json!({"dimensions": 0}), "dimensions"),
        (json!({"dimensions": 33}), "dimensions"),
        (json!({"truncate_prompt_tokens": 1000}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": -2}), "truncate_prompt_tokens"),
        (json!({"truncation_side": "left"}), "truncation_side"),
        (json!({"prompt_name": "no-such"}), "prompt_name"),
        (json!({"embed_dtype": "float16"}), "embed_dtype"),
        (json!({"endianness": "big"}), "endianness"),
        (json!({"normalize": false}), "normalize"),
        (json!({"priority": 3}), "priority"),
        (json!({"messages": [{"role": "user", "content": "a"}]}), "messages"),
        (json!({"model": "demo"}), "model"),
        (json!({"model": "bert-rerank"}), "model"),
    ] {
        let mut body = with(base(), extra.clone());
        // Text whose tokens are none: the tokenizer's own are left out.
        if param == "input[0]" && extra["input"] == "" {
            body["add_special_tokens"] = json!(false);
        }
        let answer = server.post("/v1/embeddings", &body).await;
        assert_eq!(answer.status, 400, "{extra}: {:?}", answer.body);
        assert_eq!(answer.json()["error"]["param"], param, "{extra}");
    }
    let answer = server.post("/v1/embeddings", &with(base(), json!({"model": "none"}))).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (404, &json!("model_not_found")));
    let long = server.post("/v1/embeddings", &with(base(), json!({"input": "a ".repeat(500)}))).await;
    assert_eq!((long.status.as_u16(), &long.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    // The embedder does not chat, and nothing of it is said in a prompt's place.
    let answer = server.post("/v1/chat/completions", &with(chat("hello"), json!({"model": "bert-mean"}))).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!("model")));
    let unknown = server.post("/v1/embeddings", &with(base(), json!({"no_such_field": 1}))).await;
    assert_eq!(unknown.header("x-quire-ignored-params"), "no_such_field");
}

#[tokio::test]
async fn pairs_get_the_scores_of_transformers_and_documents_an_order() {
    let names = ["bert-rerank", "xlmr-rerank", "qwen3-rerank"];
    let server = server(&names);
    for name in names {
        let expected = expected(name);
        let column = |index: usize| -> Vec<Value> {
            expected["pairs"].as_array().unwrap().iter().map(|pair| pair[index].clone()).collect()
        };
        for path in ["/score", "/v1/score"] {
            let body = json!({"model": name, "text_1": column(0), "text_2": column(1)});
            let answer = server.post(path, &body).await;
            assert_eq!(answer.status, 200, "{name}: {:?}", answer.body);
            let answer = answer.json();
            let scores = answer["data"].as_array().unwrap().iter().map(|entry| entry["score"].clone()).collect();
            assert_near(&Value::Array(scores), &expected["scores"], name);
        }
        let query = &expected["pairs"][0][0];
        let documents = json!([expected["pairs"][0][1], {"text": expected["pairs"][1][1]}, "pages"]);
        for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
            let body = json!({"model": name, "query": query, "documents": documents});
            let answer = server.post(path, &body).await;
            assert_eq!(answer.status, 200, "{name}: {:?}", answer.body);
            let results = answer.json()["results"].as_array().unwrap().clone();
            assert_eq!(results.len(), 3);
            let scores: Vec<f64> = results.iter().map(|result| result["relevance_score"].as_f64().unwrap()).collect();
            assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
            for result in &results {
                let index = result["index"].as_u64().unwrap() as usize;
                if index < 2 {
                    let score = expected["scores"][index].as_f64().unwrap();
                    assert!((result["relevance_score"].as_f64().unwrap() - score).abs() < TOLERANCE, "{name}");
                    assert_eq!(result["document"]["text"], expected["pairs"][index][1]);
                }
            }
            let best = server.post(path, &with(body, json!({"top_n": 1, "return_documents": false}))).await.json();
            assert_eq!(best["results"].as_array().unwrap().len(), 1);
            assert_eq!(best["results"][0]["index"], results[0]["index"]);
            assert_eq!(best["results"][0].get("document"), None);
        }
    }
}

#[tokio::test]
async fn an_embedder_scores_by_the_cosine_of_its_vectors() {
    let server = server(&["bert-mean"]);
    let texts = expected("bert-mean");
    let body = json!({"text_1": texts["texts"][0], "text_2": [texts["texts"][0], texts["texts"][1]]});
    let answer = server.post("/v1/score", &body).await.json();
    let (a, b) = (numbers(&texts["vectors"][0]), numbers(&texts["vectors"][1]));
    let cosine: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
    assert_near(&json!([answer["data"][0]["score"], answer["data"][1]["score"]]), &json!([1.0, cosine]), "cosine");
    assert_eq!(answer["model"], "bert-mean", "the first that scores");
    for (body, param) in [
        (json!({"text_1": "a"}), "text_2"),
        (json!({"text_2": "a"}), "text_1"),
        (json!({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}), "text_1"),
    ] {
        let answer = server.post("/v1/score", &body).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!(param)), "{body}");
    }
    for (extra, param) in [
        (json!({"query": null}), "query"),
        (json!({"documents": null}), "documents"),
        (json!({"documents": []}), "documents"),
        (json!({"documents": [{"title": "a"}]}), "documents[0]"),
        (json!({"rank_fields": ["title"]}), "rank_fields"),
    ] {
        let body = with(json!({"query": "a", "documents": ["b"]}), extra.clone());
        let answer = server.post("/v1/rerank", &body).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!(param)), "{extra}");
    }
}

#[tokio::test]
async fn one_server_holds_a_chat_model_and_others() {
    let server = Server::beside(saying("Hello there"), &["bert-mean", "bert-rerank"]);
    let models = server.get("/v1/models").await.json();
    let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["demo", "bert-mean", "bert-rerank"]);
    assert_eq!(server.get("/v1/models/bert-mean").await.json()["id"], "bert-mean");
    assert_eq!(server.get("/v1/models/none").await.status, 404);
    let tags = server.get("/api/tags").await.json();
    assert_eq!(tags["models"].as_array().unwrap().len(), 3);
    let shown = server.post("/api/show", &json!({"model": "bert-mean:latest"})).await.json();
    assert_eq!(shown["capabilities"], json!(["embedding"]));
    // Named, and not named: the first that can.
    let answer = server.post("/v1/chat/completions", &chat("hello")).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "Hello there");
    for body in [json!({"input": "seven"}), json!({"input": "seven", "model": "bert-mean"})] {
        assert_eq!(server.post("/v1/embeddings", &body).await.json()["model"], "bert-mean");
    }
    // Tokens are those of the model that is named.
    let tokens = server.post("/tokenize", &json!({"model": "bert-mean", "prompt": "seven"})).await.json();
    let ids = tokens["tokens"].as_array().unwrap();
    assert_eq!((&ids[0], &ids[ids.len() - 1]), (&json!(2), &json!(3)), "between its own special tokens");
    let text = server.post("/detokenize", &json!({"model": "bert-mean", "tokens": ids[1..ids.len() - 1]})).await;
    assert_eq!(text.json()["prompt"], "seven");
    server.idle().await;
}

#[tokio::test]
async fn ollamas_clients_get_vectors_and_errors_in_their_shape() {
    let server = server(&["bert-mean"]);
    let texts = expected("bert-mean");
    let body =
        json!({"model": "bert-mean:latest", "input": [texts["texts"][0], texts["texts"][3]], "keep_alive": "5m"});
    let answer = server.post("/api/embed", &body).await.json();
    assert_near(&answer["embeddings"][0], &texts["vectors"][0], "embed");
    assert_near(&answer["embeddings"][1], &texts["vectors"][3], "embed");
    assert!(answer["prompt_eval_count"].as_u64().unwrap() > 2);
    // What is too long is cut unless that is forbidden.
    let long = json!({"model": "bert-mean", "input": "a ".repeat(500)});
    assert_eq!(server.post("/api/embed", &long).await.status, 200);
    let refused = server.post("/api/embed", &with(long, json!({"truncate": false}))).await;
    assert!(refused.status == 400 && refused.json()["error"].is_string());
    assert_eq!(server.post("/api/embed", &json!({"model": "none", "input": "a"})).await.status, 404);
}

#[tokio::test]
async fn a_server_that_drains_takes_no_texts() {
    let server = server(&["bert-mean"]);
    assert_eq!(server.post("/v1/embeddings", &json!({"input": "a"})).await.status, 200);
    server.service.begin_drain();
    let refused = server.post("/v1/embeddings", &json!({"input": "a"})).await;
    assert_eq!(refused.status, 503);
    assert_eq!(server.service.num_inflight(), 0);
}

#[tokio::test]
async fn over_grpc_the_same_bits_come_back() {
    let server = server(&["bert-mean", "bert-rerank"]);
    let texts = expected("bert-mean");
    let text = texts["texts"][0].as_str().unwrap().to_owned();
    let body = json!({"input": text, "encoding_format": "base64"});
    let over_http = server.post("/v1/embeddings", &body).await.json()["data"][0]["embedding"].clone();
    let mut quire = server.quire();
    let asked = wire::EmbedRequest { texts: vec![text.clone()], request_id: "mine".into(), ..Default::default() };
    let answer = quire.embed(asked.clone()).await.expect("answers");
    assert_eq!(answer.metadata().get("quire-request-id").expect("an id"), "mine");
    let answer = answer.into_inner();
    assert_eq!((answer.model.as_str(), answer.embeddings.len()), ("bert-mean", 1));
    let found: Vec<f64> = answer.embeddings[0].values.iter().map(|number| f64::from(*number)).collect();
    assert_near(&json!(found), &texts["vectors"][0], "quire.v1");
    let ids = |index: usize| -> Vec<u32> {
        texts["token_ids"][index].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let tokens = wire::EmbedRequest { token_ids: vec![wire::TokenIds { ids: ids(0) }], ..Default::default() };
    let of_tokens = quire.embed(tokens).await.expect("answers").into_inner();
    assert_eq!(of_tokens.embeddings, answer.embeddings);
    assert_eq!(u64::from(of_tokens.prompt_tokens as u32), ids(0).len() as u64);

    let mut engine = VllmEngineClient::with_origin(server.grpc.clone(), "http://quire".parse().expect("an address"));
    let tokenized = vllm::TokenizedInput { input_ids: ids(0), ..Default::default() };
    let asked_engine = vllm::EmbedRequest { request_id: String::new(), tokenized: Some(tokenized) };
    let of_engine = engine.embed(asked_engine).await.expect("answers").into_inner();
    assert_eq!((&of_engine.embedding, of_engine.embedding_dim), (&answer.embeddings[0].values, 32));
    assert!(over_http.as_str().unwrap().len() > 32 * 4);

    let pairs = expected("bert-rerank");
    let pair = |index: usize| pairs["pairs"][0][index].as_str().unwrap().to_owned();
    let ranked = wire::RerankRequest {
        model: "bert-rerank".into(),
        query: pair(0),
        documents: vec!["pages".into(), pair(1)],
        ..Default::default()
    };
    let results = quire.rerank(ranked.clone()).await.expect("answers").into_inner().results;
    assert!(results[0].relevance_score >= results[1].relevance_score);
    let of_pair = results.iter().find(|result| result.index == 1).expect("both come back");
    assert!((f64::from(of_pair.relevance_score) - pairs["scores"][0].as_f64().unwrap()).abs() < TOLERANCE);
    let best = quire.rerank(wire::RerankRequest { top_n: 1, ..ranked.clone() }).await.expect("answers").into_inner();
    assert_eq!(best.results, results[..1]);

    let models = quire.list_models(wire::ListModelsRequest {}).await.expect("answers").into_inner().models;
    let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    assert_eq!(names, ["demo", "bert-mean", "bert-rerank"]);
    let info = wire::ModelInfoRequest { model: "bert-mean".into() };
    assert_eq!(quire.model_info(info).await.expect("answers").into_inner().architecture, "BertModel");
    for (refused, code) in [
        (wire::EmbedRequest { model: "none".into(), ..asked.clone() }, Code::NotFound),
        (wire::EmbedRequest { model: "demo".into(), ..asked.clone() }, Code::InvalidArgument),
        (wire::EmbedRequest { dimensions: Some(33), ..asked.clone() }, Code::InvalidArgument),
        (wire::EmbedRequest { texts: Vec::new(), ..asked }, Code::InvalidArgument),
    ] {
        assert_eq!(quire.embed(refused).await.expect_err("refused").code(), code);
    }
    let to_demo = wire::RerankRequest { model: "demo".into(), ..ranked };
    assert_eq!(quire.rerank(to_demo).await.expect_err("refused").code(), Code::InvalidArgument);
}

/// KServe's and Triton's clients get the same vectors, as they ask for them.
#[tokio::test]
async fn vectors_go_over_the_open_inference_protocol() {
    use quire_proto::inference as kserve;
    let server = server(&["bert-mean", "bert-rerank"]);
    let expected = expected("bert-mean");
    let texts: Vec<&str> = expected["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let input = kserve::model_infer_request::InferInputTensor {
        name: "text_input".to_owned(),
        datatype: "BYTES".to_owned(),
        shape: vec![texts.len() as i64],
        contents: Some(kserve::InferTensorContents {
            bytes_contents: texts.iter().map(|text| text.as_bytes().to_vec()).collect(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = kserve::ModelInferRequest {
        model_name: "bert-mean".to_owned(),
        id: "v-1".to_owned(),
        inputs: vec![input.clone()],
        ..Default::default()
    };
    let mut client = crate::contracts::inference(&server);
    let answer = client.model_infer(request.clone()).await.expect("answers").into_inner();
    let output = &answer.outputs[0];
    assert_eq!((output.name.as_str(), output.datatype.as_str(), answer.id.as_str()), ("embedding", "FP32", "v-1"));
    assert_eq!(output.shape, [texts.len() as i64, 32]);
    let numbers = output.contents.as_ref().expect("contents").fp32_contents.clone();
    for (vector, found) in expected["vectors"].as_array().unwrap().iter().zip(numbers.chunks(32)) {
        assert_near(&json!(found), vector, "bert-mean");
    }
    // Raw in, raw out: the same bits.
    let raw: Vec<u8> =
        texts.iter().flat_map(|text| (text.len() as u32).to_le_bytes().into_iter().chain(text.bytes())).collect();
    let request_raw = kserve::ModelInferRequest {
        inputs: vec![kserve::model_infer_request::InferInputTensor { contents: None, ..input.clone() }],
        raw_input_contents: vec![raw],
        ..request.clone()
    };
    let answer = client.model_infer(request_raw).await.expect("answers").into_inner();
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    assert_eq!(answer.raw_output_contents, [bytes]);

    let described = kserve::ModelMetadataRequest { name: "bert-mean".to_owned(), version: String::new() };
    let described = client.model_metadata(described).await.expect("answers").into_inner();
    assert_eq!((described.inputs.len(), described.outputs[0].shape.clone()), (1, vec![-1, 32]));
    // What a model is not asked for, its description does not name.
    let described = kserve::ModelMetadataRequest { name: "bert-rerank".to_owned(), version: String::new() };
    let described = client.model_metadata(described).await.expect("answers").into_inner();
    assert!(described.inputs.is_empty() && described.outputs.is_empty(), "{described:?}");
    let parameters = [("temperature".to_owned(), kserve::InferParameter::default())];
    let mut wrong = vec![kserve::ModelInferRequest { model_name: "bert-rerank".to_owned(), ..request.clone() }];
    wrong.push(kserve::ModelInferRequest { parameters: parameters.into(), ..request.clone() });
    wrong.push(kserve::ModelInferRequest { inputs: vec![input.clone(), input], ..request.clone() });
    wrong.push(kserve::ModelInferRequest { model_version: "2".to_owned(), ..request });
    for request in wrong {
        assert_eq!(client.model_infer(request).await.expect_err("refused").code(), Code::InvalidArgument);
    }
}
