//! `/pooling` and `/classify`, as vLLM names them: whatever numbers a model makes of a text, and labels.

use axum::extract::{Request, State};
use axum::response::Response;
use quire_engine::pooling::PoolingInfo;
use serde::Serialize;

use crate::error::ApiError;
use crate::generation::{ClassifyRequest, EmbedRequest, GenerationService, Limits, PoolingText, invalid};
use crate::metrics::Endpoint;
use crate::served_models::{Runner, Task};

use super::answer::json;
use super::ask::json_response;
use super::embeddings::{ListAnswer, Numbers, PoolingFields, TextsBody, texts};
use super::failure::Failure;
use super::fields::{Fields, Ignored};
use super::receive::{Body, Parsed, receive};

/// Tasks that vLLM has a name for and that are not served.
const OTHER_TASKS: [&str; 6] = ["token_embed", "token_classify", "embed&token_classify", "plugin", "encode", "score"];

struct PoolingBody {
    texts: TextsBody,
    /// `None` is whatever the model does.
    task: Option<PoolTask>,
    ignored: Ignored,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PoolTask {
    Embed,
    Classify,
}

impl Body for PoolingBody {
    fn task(&self) -> Task {
        match self.task {
            None => Task::Pool,
            Some(PoolTask::Embed) => Task::Embed,
            Some(PoolTask::Classify) => Task::Classify,
        }
    }

    fn model(&self) -> Option<&str> {
        self.texts.common.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let task = match fields.string("task")?.as_deref() {
            None => None,
            Some("embed") => Some(PoolTask::Embed),
            Some("classify") => Some(PoolTask::Classify),
            Some(task) if OTHER_TASKS.contains(&task) => {
                return Err(invalid("task", format_args!("{task} is not supported; embed and classify are")));
            }
            Some(_) => return Err(invalid("task", "must be embed or classify")),
        };
        fields.refuse(&["data"])?;
        let texts = TextsBody::read(&mut fields, limits)?;
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { texts, task, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    fn check_pooling(&mut self, pooling: &PoolingInfo) -> Result<(), ApiError> {
        if pooling.labels.is_empty() {
            return self.texts.check_length(pooling);
        }
        let TextsBody { dimensions, prompt_name, normalize, use_activation, .. } = &self.texts;
        for (param, is_given) in [
            ("dimensions", dimensions.is_some()),
            ("prompt_name", prompt_name.is_some()),
            // Its numbers are probabilities, whose length is what it is.
            ("normalize", normalize.is_some()),
            ("use_activation", *use_activation == Some(false)),
        ] {
            if is_given {
                return Err(invalid(param, "is not supported by a model that classifies"));
            }
        }
        Ok(())
    }
}

/// `POST /pooling`
pub(super) async fn pooling(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Entry {
        index: usize,
        object: &'static str,
        data: Numbers,
    }
    let Parsed { service, id, body, share } = receive::<PoolingBody>(&service, Endpoint::Pooling, request).await?;
    let PoolingBody { texts, task: _, ignored } = body;
    let classifies = matches!(service.runner(), Runner::Pools(engine) if !engine.pooling().labels.is_empty());
    let TextsBody { common, inputs, encoding, dimensions, add_special_tokens, prompt_name, .. } = texts;
    let mut request = common.request(&id.0, Endpoint::Pooling);
    // The one that was found: what it does decides, and not which is the first that does it.
    request.model = Some(service.model().name().to_owned());
    let answer_id = format!("pooling-{}", request.request_id);
    let (model, numbers, num_tokens) = if classifies {
        let asked = ClassifyRequest { request, inputs, param: "input", add_special_tokens };
        let classified = service.classify(asked).await?;
        (classified.model, classified.probs, classified.num_tokens)
    } else {
        let asked = EmbedRequest { request, inputs, param: "input", add_special_tokens, dimensions, prompt_name };
        let embedded = service.embed(asked).await?;
        (embedded.model, embedded.vectors, embedded.num_tokens)
    };
    drop(share);
    let entry = |(index, vector)| Entry { index, object: "pooling", data: Numbers::of(vector, encoding) };
    let answer = ListAnswer::of(answer_id, &model, numbers.into_iter().enumerate().map(entry), num_tokens);
    Ok(json_response(json(&answer), &ignored))
}

struct ClassifyBody {
    common: PoolingFields,
    inputs: Vec<PoolingText>,
    add_special_tokens: bool,
    ignored: Ignored,
}

impl Body for ClassifyBody {
    const TASK: Task = Task::Classify;

    fn model(&self) -> Option<&str> {
        self.common.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let Some(raw) = fields.raw("input") else { return Err(invalid("input", "is needed")) };
        let inputs = texts(raw, "input", limits)?;
        // Logits, and what vectors have.
        for name in ["use_activation", "activation"] {
            fields.refuse_unless(name, |raw| raw == "true")?;
        }
        fields.refuse_unless("encoding_format", |raw| raw == "\"float\"")?;
        fields.refuse(&["dimensions", "prompt_name"])?;
        let common = PoolingFields::read(&mut fields)?;
        let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(true);
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { common, inputs, add_special_tokens, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

/// `POST /classify`
pub(super) async fn classify(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Entry<'a> {
        index: usize,
        label: Option<&'a str>,
        probs: &'a [f32],
        num_classes: usize,
    }
    let Parsed { service, id, body, share } = receive::<ClassifyBody>(&service, Endpoint::Classify, request).await?;
    let ClassifyBody { common, inputs, add_special_tokens, ignored } = body;
    let request = common.request(&id.0, Endpoint::Classify);
    let answer_id = format!("classify-{}", request.request_id);
    let classified = service.classify(ClassifyRequest { request, inputs, param: "input", add_special_tokens }).await?;
    drop(share);
    let entries = classified.probs.iter().enumerate().map(|(index, probs)| Entry {
        index,
        label: classified.label(probs),
        probs,
        num_classes: probs.len(),
    });
    let answer = ListAnswer::of(answer_id, &classified.model, entries, classified.num_tokens);
    Ok(json_response(json(&answer), &ignored))
}
