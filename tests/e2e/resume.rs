//! A generation that another server began is continued as if it had not been interrupted.

use quire_proto::quire::v1::stream_event::Event;
use quire_proto::quire::v1::{
    ChoiceFinished, GenerateRequest, OutputParams, Resume, SamplingParams, StoppingParams, Token,
    generate_request::Prompt,
};
use quire_tests::Server;
use tonic::Code;

/// Everything that looks back: penalties, a least length, log probabilities.
fn request(stop: &[&str]) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Text("Once upon a time".to_owned())),
        sampling: Some(SamplingParams {
            temperature: Some(0.9),
            top_p: Some(0.95),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(0.5),
            frequency_penalty: Some(0.25),
            bad_words: vec!["king".to_owned()],
            seed: Some(5),
            ..Default::default()
        }),
        stopping: Some(StoppingParams {
            max_tokens: Some(48),
            min_tokens: Some(12),
            stop: stop.iter().map(|text| (*text).to_owned()).collect(),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        output: Some(OutputParams { logprobs: Some(3), ..Default::default() }),
        ..Default::default()
    }
}

/// What one stream said: the text that came up to each token, all tokens, and the end.
#[derive(Debug, Default, PartialEq)]
struct Said {
    text: String,
    /// Bytes of `text` that were said when so many tokens were.
    lens: Vec<usize>,
    tokens: Vec<Token>,
    finish: Option<ChoiceFinished>,
    completion_tokens: u32,
}

async fn listen(server: &Server, request: GenerateRequest) -> Said {
    let mut stream = server.quire().await.generate_stream(request).await.expect("a stream").into_inner();
    let mut said = Said { lens: vec![0], ..Said::default() };
    while let Some(event) = stream.message().await.expect("no error") {
        match event.event.expect("an event") {
            Event::Delta(delta) => {
                said.text.push_str(&delta.text);
                said.lens.extend(delta.tokens.iter().map(|_| said.text.len()));
                said.tokens.extend(delta.tokens);
            }
            Event::Finished(finish) => said.finish = Some(finish),
            Event::Done(done) => said.completion_tokens = done.usage.expect("usage").completion_tokens,
            Event::Started(_) | Event::PromptLogprobs(_) => {}
            Event::Reasoning(_) | Event::ToolCall(_) => panic!("nobody asked for these"),
        }
    }
    said
}

/// At every cut the rest is what it would have been: the same tokens with the same bits of log probability, the same text,
/// the same end.
async fn check_every_cut(server: &Server, request: GenerateRequest) -> Said {
    let whole = listen(server, request.clone()).await;
    assert!(whole.tokens.len() >= 12, "{whole:?}");
    for cut in 0..=whole.tokens.len() {
        let generated_token_ids = whole.tokens[..cut].iter().map(|token| token.id).collect();
        let resume = Some(Resume { generated_token_ids, choice_offset: 0 });
        let rest = listen(server, GenerateRequest { resume, ..request.clone() }).await;
        assert_eq!(rest.tokens, whole.tokens[cut..], "cut at {cut}");
        // What the last token completed is said with it, or after it.
        let said_before = if cut == whole.tokens.len() { whole.text.len() - rest.text.len() } else { whole.lens[cut] };
        assert_eq!(rest.text, whole.text[said_before..], "cut at {cut}");
        assert_eq!((&rest.finish, rest.completion_tokens), (&whole.finish, whole.completion_tokens), "cut at {cut}");
    }
    whole
}

#[tokio::test]
async fn any_cut_gives_the_same_rest() {
    let server = Server::start(&[]).await;
    let whole = check_every_cut(&server, request(&[])).await;
    assert_eq!(whole.tokens.len(), 48);

    // A stop string of several tokens that appears late: cuts fall before, into and behind it.
    let at = whole.lens[24];
    let at = (at..).find(|at| whole.text.is_char_boundary(*at)).expect("text goes on");
    let stop: String = whole.text[at..].chars().take(12).collect();
    let stopped = check_every_cut(&server, request(&[&stop])).await;
    assert!(stopped.tokens.len() < 48 && !stopped.text.contains(&stop), "{stopped:?}");
}

#[tokio::test]
async fn one_choice_of_several_is_continued() {
    let server = Server::start(&[]).await;
    let mut several = request(&[]);
    several.sampling.as_mut().expect("sampling").n = Some(3);
    let whole = server.quire().await.generate(several).await.expect("an answer").into_inner();
    for choice in &whole.choices {
        let generated_token_ids = choice.tokens[..20].iter().map(|token| token.id).collect();
        let resume = Some(Resume { generated_token_ids, choice_offset: choice.index });
        let rest = server.quire().await.generate(GenerateRequest { resume, ..request(&[]) }).await;
        let rest = rest.expect("an answer").into_inner();
        assert_eq!(rest.choices[0].index, choice.index);
        assert_eq!(rest.choices[0].tokens, choice.tokens[20..]);
    }
}

#[tokio::test]
async fn what_cannot_be_continued_is_refused() {
    let server = Server::start(&[]).await;
    let resume = |ids: Vec<u32>| Some(Resume { generated_token_ids: ids, choice_offset: 0 });
    let refuse = async |change: fn(&mut GenerateRequest), names: &str| {
        let mut asked = GenerateRequest { resume: resume(vec![100; 3]), ..request(&[]) };
        change(&mut asked);
        let status = server.quire().await.generate(asked).await.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(names), "{names}: {status:?}");
    };
    refuse(|asked| asked.sampling.as_mut().expect("sampling").seed = None, "seed").await;
    refuse(|asked| asked.sampling.as_mut().expect("sampling").n = Some(2), "`n`").await;
    refuse(|asked| asked.resume.as_mut().expect("resume").choice_offset = 1000, "choice_offset").await;
    refuse(|asked| asked.resume.as_mut().expect("resume").generated_token_ids = vec![u32::MAX], "generated_token_ids")
        .await;
    refuse(|asked| asked.resume.as_mut().expect("resume").generated_token_ids = vec![100; 49], "generated_token_ids")
        .await;
}
