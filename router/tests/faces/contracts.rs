//! The gRPC contracts of others: what gateways and Triton's clients send, and what they get.

use axum::Router;
use futures::StreamExt;
use quire_engine::testing::FakeExecutor;
use quire_proto::inference as kserve;
use quire_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use quire_proto::smg::grpc::common;
use quire_proto::vllm::grpc::engine as vllm;
use quire_proto::vllm::grpc::engine::generate_response::Response;
use quire_proto::vllm::grpc::engine::vllm_engine_client::VllmEngineClient;
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::harness::{Server, VOCAB, demo_ids};

pub(crate) fn engine(server: &Server) -> VllmEngineClient<Router> {
    VllmEngineClient::with_origin(server.grpc.clone(), "http://quire".parse().expect("an address"))
}

pub(crate) fn inference(server: &Server) -> GrpcInferenceServiceClient<Router> {
    GrpcInferenceServiceClient::with_origin(server.grpc.clone(), "http://quire".parse().expect("an address"))
}

pub(crate) fn generate(stream: bool, sampling: vllm::SamplingParams) -> vllm::GenerateRequest {
    let input_ids = demo_ids("Once upon a time");
    vllm::GenerateRequest {
        request_id: "r-1".to_owned(),
        input: Some(vllm::generate_request::Input::Tokenized(vllm::TokenizedInput { input_ids, ..Default::default() })),
        sampling_params: Some(sampling),
        stream,
        ..Default::default()
    }
}

pub(crate) async fn answers(server: &Server, request: vllm::GenerateRequest) -> Vec<Response> {
    let mut stream = engine(server).generate(request).await.expect("starts").into_inner();
    let mut responses = Vec::new();
    while let Some(message) = stream.message().await.expect("no error") {
        responses.push(message.response.expect("a response"));
    }
    responses
}

#[tokio::test]
async fn an_engines_stream_is_chunks_and_one_end_for_each_choice() {
    let said = "there was a fox who liked to read";
    let server = Server::saying(said);
    let ids = demo_ids(said);
    let sampling = vllm::SamplingParams { n: 2, logprobs: Some(1), prompt_logprobs: Some(0), ..Default::default() };
    let responses = answers(&server, generate(true, sampling.clone())).await;
    for index in 0..2 {
        let chunks: Vec<_> = responses
            .iter()
            .filter_map(|response| match response {
                Response::Chunk(chunk) if chunk.index == index => Some(chunk),
                _ => None,
            })
            .collect();
        let streamed: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.token_ids.clone()).collect();
        let ends: Vec<_> = responses
            .iter()
            .filter_map(|response| match response {
                Response::Complete(end) if end.index == index => Some(end),
                _ => None,
            })
            .collect();
        assert_eq!(ends.len(), 1);
        assert_eq!((&ends[0].output_ids, ends[0].finish_reason.as_str()), (&streamed, "stop"));
        assert!(streamed.starts_with(&ids), "{streamed:?}");
        let logprobs = ends[0].output_logprobs.as_ref().expect("asked for");
        assert_eq!((logprobs.token_ids.len(), logprobs.top_logprobs.len()), (streamed.len(), streamed.len()));
        assert_eq!(chunks.last().expect("chunks").completion_tokens as usize, streamed.len());
        assert_eq!(ends[0].prompt_tokens as usize, demo_ids("Once upon a time").len());
    }
    // The prompt's come with the first chunk alone.
    let with_prompt = |response: &&Response| match response {
        Response::Chunk(chunk) => chunk.input_logprobs.is_some(),
        Response::Complete(end) => end.input_logprobs.is_some(),
    };
    assert_eq!(responses.iter().filter(with_prompt).count(), 1);
    assert!(with_prompt(&&responses[0]));

    // Not streamed: nothing but ends.
    let whole = answers(&server, generate(false, sampling)).await;
    assert_eq!(whole.len(), 2);
    assert!(
        whole.iter().all(|response| matches!(response, Response::Complete(end) if end.output_ids.starts_with(&ids)))
    );
    server.idle().await;
}

#[tokio::test]
async fn an_engine_says_what_matched() {
    let server = Server::saying("one two three four");
    let stop = vllm::SamplingParams { stop: vec!["three".to_owned()], ..Default::default() };
    let token = demo_ids("one two three four")[1];
    let stop_token = vllm::SamplingParams { stop_token_ids: vec![token], ..Default::default() };
    let length = vllm::SamplingParams { max_tokens: Some(1), ..Default::default() };
    for (sampling, reason) in [(stop, "stop"), (stop_token, "stop"), (length, "length")] {
        let answer = answers(&server, generate(false, sampling)).await.remove(0);
        let Response::Complete(end) = answer else { panic!("{answer:?}") };
        assert_eq!(end.finish_reason, reason);
        use vllm::generate_complete::MatchedStop;
        match (end.matched_stop, reason) {
            (Some(MatchedStop::MatchedStopStr(text)), "stop") => assert_eq!(text, "three"),
            (Some(MatchedStop::MatchedTokenId(id)), "stop") => assert_eq!(id, token),
            (None, "length") => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn leaving_and_aborting_end_an_engines_requests() {
    let server = Server::new(FakeExecutor::new(VOCAB).next_token(|_, _, _| 100).on_step(|_| {
        std::thread::sleep(std::time::Duration::from_millis(2));
        Ok(())
    }));
    let endless = || generate(true, vllm::SamplingParams { ignore_eos: true, ..Default::default() });
    let mut stream = engine(&server).generate(endless()).await.expect("starts").into_inner();
    assert!(stream.message().await.expect("no error").is_some());
    drop(stream);
    server.idle().await;

    let mut stream = engine(&server).generate(endless()).await.expect("starts").into_inner();
    assert!(stream.message().await.expect("no error").is_some());
    let ids = vec!["unknown".to_owned(), "r-1".to_owned()];
    engine(&server).abort(vllm::AbortRequest { request_ids: ids }).await.expect("answers");
    let end = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert_eq!(end.expect_err("cancelled").code(), Code::Cancelled);
    server.idle().await;
}

#[tokio::test]
async fn an_engine_says_what_it_is_and_what_it_cannot() {
    let server = Server::saying("x");
    let mut engine = engine(&server);
    let model = engine.get_model_info(vllm::GetModelInfoRequest {}).await.expect("answers").into_inner();
    assert_eq!((model.served_model_name.as_str(), model.vocab_size, model.is_generation), ("demo", VOCAB, true));
    assert!(model.default_sampling_params_json.starts_with('{'));
    let health = engine.health_check(vllm::HealthCheckRequest {}).await.expect("answers").into_inner();
    assert!(health.healthy);
    let info = engine.get_server_info(vllm::GetServerInfoRequest {}).await.expect("answers").into_inner();
    assert_eq!((info.active_requests, info.block_size), (0, 16));
    let loads = engine.get_loads(vllm::GetLoadsRequest::default()).await.expect("answers").into_inner();
    assert_eq!((loads.loads.len(), loads.loads[0].num_running_reqs), (1, 0));
    assert!(loads.loads[0].max_total_num_tokens > 0);
    let wrong = engine.get_loads(vllm::GetLoadsRequest { dp_rank: Some(1), ..Default::default() }).await;
    assert_eq!(wrong.expect_err("one rank").code(), Code::InvalidArgument);

    let embed = engine.embed(vllm::EmbedRequest::default()).await.expect_err("no embedder");
    assert_eq!(embed.code(), Code::Unimplemented);
    assert!(embed.message().contains("embedding"), "{embed:?}");
    let events = engine.subscribe_kv_events(common::SubscribeKvEventsRequest::default()).await.expect_err("none");
    assert_eq!(events.code(), Code::Unimplemented);
    assert!(events.message().contains("scheduler.kv_events"), "{events:?}");
    for (request, field) in [
        (vllm::GenerateRequest::default(), "input"),
        (generate(true, vllm::SamplingParams { n: 9, ..Default::default() }), "n"),
        (generate(true, vllm::SamplingParams { top_p: f32::NAN, ..Default::default() }), "top_p"),
    ] {
        let refused = engine.generate(request).await.expect_err("refused");
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(field), "{refused:?}");
    }
}

/// The archive is what it says, and has the file that a tokenizer is made of.
#[tokio::test]
async fn an_engine_hands_its_tokenizer_out() {
    let server = Server::saying("x");
    let mut stream = engine(&server).get_tokenizer(common::GetTokenizerRequest {}).await.expect("starts").into_inner();
    let (mut archive, mut digests) = (Vec::new(), Vec::new());
    while let Some(piece) = stream.message().await.expect("no error") {
        archive.extend(piece.data);
        digests.push(piece.sha256);
    }
    let digest: String = Sha256::digest(&archive).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digests.pop(), Some(digest));
    assert!(digests.iter().all(String::is_empty));
    assert!(archive.starts_with(b"PK\x03\x04") && archive.windows(14).any(|name| name == b"tokenizer.json"));
}

fn text_input(text: &str) -> kserve::model_infer_request::InferInputTensor {
    kserve::model_infer_request::InferInputTensor {
        name: "text_input".to_owned(),
        datatype: "BYTES".to_owned(),
        shape: vec![1],
        contents: Some(kserve::InferTensorContents { bytes_contents: vec![text.into()], ..Default::default() }),
        ..Default::default()
    }
}

fn infer(id: &str, text: &str) -> kserve::ModelInferRequest {
    kserve::ModelInferRequest {
        model_name: "demo".to_owned(),
        id: id.to_owned(),
        inputs: vec![text_input(text)],
        ..Default::default()
    }
}

fn raw(texts: &[&str]) -> Vec<u8> {
    texts.iter().flat_map(|text| (text.len() as u32).to_le_bytes().into_iter().chain(text.bytes())).collect()
}

fn texts(response: &kserve::ModelInferResponse) -> Vec<String> {
    let contents = response.outputs[0].contents.as_ref().expect("contents");
    contents.bytes_contents.iter().map(|bytes| String::from_utf8(bytes.clone()).expect("UTF-8")).collect()
}

fn is_last(response: &kserve::ModelInferResponse) -> bool {
    response.parameters.contains_key("triton_final_response")
}

#[tokio::test]
async fn text_goes_in_and_comes_out_as_tensors() {
    let server = Server::saying("a fox");
    let mut client = inference(&server);
    let answer = client.model_infer(infer("a", "Hi")).await.expect("answers").into_inner();
    assert_eq!((texts(&answer), answer.id.as_str(), answer.model_name.as_str()), (vec!["a fox".into()], "a", "demo"));
    assert!(answer.parameters.contains_key("seed") && answer.parameters.contains_key("completion_tokens"));

    // Raw, two at once, with their prompts.
    let mut request = infer("b", "");
    request.inputs[0].contents = None;
    request.inputs[0].shape = vec![2, 1];
    request.inputs.push(kserve::model_infer_request::InferInputTensor {
        name: "exclude_input_in_output".to_owned(),
        datatype: "BOOL".to_owned(),
        shape: vec![1],
        ..Default::default()
    });
    request.raw_input_contents = vec![raw(&["Hi ", "Ho "]), vec![0]];
    let answer = client.model_infer(request).await.expect("answers").into_inner();
    assert_eq!(answer.raw_output_contents, [raw(&["Hi a fox", "Ho a fox"])]);
    assert_eq!(answer.outputs[0].shape, [2, 1]);

    for (request, code) in [
        (kserve::ModelInferRequest { model_name: "other".to_owned(), ..infer("c", "Hi") }, Code::NotFound),
        (kserve::ModelInferRequest { model_version: "2".to_owned(), ..infer("c", "Hi") }, Code::InvalidArgument),
        (kserve::ModelInferRequest { inputs: vec![], ..infer("c", "Hi") }, Code::InvalidArgument),
        (kserve::ModelInferRequest { raw_input_contents: vec![vec![9]], ..infer("c", "Hi") }, Code::InvalidArgument),
    ] {
        assert_eq!(client.model_infer(request).await.expect_err("refused").code(), code);
    }
    server.idle().await;
}

#[tokio::test]
async fn each_request_of_a_stream_ends_once() {
    let server = Server::saying("a fox and a crow");
    let requests = futures::stream::iter([
        infer("a", "Hi"),
        kserve::ModelInferRequest { model_name: "other".to_owned(), ..infer("b", "Hi") },
        infer("c", "Ho"),
    ]);
    let responses = inference(&server).model_stream_infer(requests).await.expect("starts").into_inner();
    let responses: Vec<_> = responses.map(|response| response.expect("no status")).collect().await;
    for id in ["a", "b", "c"] {
        let of: Vec<_> = responses
            .iter()
            .filter(|response| response.infer_response.as_ref().is_some_and(|response| response.id == id))
            .collect();
        let inner = |at: usize| of[at].infer_response.as_ref().expect("a response");
        assert_eq!(of.iter().filter(|response| is_last(response.infer_response.as_ref().unwrap())).count(), 1);
        assert!(is_last(inner(of.len() - 1)), "{id}");
        if id == "b" {
            assert!(of.len() == 1 && of[0].error_message.contains("other"), "{of:?}");
        } else {
            let text: String = (0..of.len()).flat_map(|at| texts(inner(at))).collect();
            assert_eq!(text, "a fox and a crow");
            assert!(of.len() > 2, "the text came in {} pieces", of.len());
        }
    }
    server.idle().await;
}

#[tokio::test]
async fn a_stream_may_be_silent_between_its_requests_and_not_within_one() {
    let limits = quire_router::generation::Limits { body_timeout_seconds: 1, ..Default::default() };
    let settings = quire_engine::SchedulerSettings::default();
    let server = Server::with(crate::harness::saying("a fox"), limits, &settings);
    let requests = futures::stream::unfold(0, |count| async move {
        if count > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
        }
        (count < 2).then(|| (infer(&count.to_string(), "Hi"), count + 1))
    });
    let responses = inference(&server).model_stream_infer(requests).await.expect("starts").into_inner();
    let responses: Vec<_> = responses.map(|response| response.expect("no status")).collect().await;
    assert_eq!(responses.iter().filter(|response| is_last(response.infer_response.as_ref().unwrap())).count(), 2);
}

#[tokio::test]
async fn the_server_describes_itself_to_tritons_clients() {
    let server = Server::saying("x");
    let mut client = inference(&server);
    assert!(client.server_live(kserve::ServerLiveRequest {}).await.expect("answers").into_inner().live);
    assert!(client.server_ready(kserve::ServerReadyRequest {}).await.expect("answers").into_inner().ready);
    for (name, version, ready) in [("demo", "", true), ("demo", "1", true), ("demo", "2", false), ("other", "", false)]
    {
        let request = kserve::ModelReadyRequest { name: name.to_owned(), version: version.to_owned() };
        assert_eq!(client.model_ready(request).await.expect("answers").into_inner().ready, ready, "{name} {version}");
    }
    let request = kserve::ModelMetadataRequest { name: "demo".to_owned(), version: String::new() };
    let metadata = client.model_metadata(request).await.expect("answers").into_inner();
    assert_eq!((metadata.inputs[0].name.as_str(), metadata.outputs[0].name.as_str()), ("text_input", "text_output"));
    let request = kserve::ModelConfigRequest { name: "other".to_owned(), version: String::new() };
    assert_eq!(client.model_config(request).await.expect_err("unknown").code(), Code::NotFound);
    let index = client.repository_index(kserve::RepositoryIndexRequest::default()).await.expect("answers").into_inner();
    assert_eq!(index.models[0].state, "READY");
}
