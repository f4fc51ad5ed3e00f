//! `/v2/embed`, Cohere's: vectors in several forms at once.

use axum::extract::{Request, State};
use axum::response::Response;
use quire_engine::pooling::PoolingInfo;
use serde::Serialize;

use crate::error::ApiError;
use crate::generation::{
    EmbedRequest, GenerationService, Limits, PoolingRequest, PoolingText, PoolingTruncation, invalid,
};
use crate::metrics::Endpoint;
use crate::served_models::Task;

use super::answer::json;
use super::ask::json_response;
use super::embeddings::base64;
use super::failure::Failure;
use super::fields::{Fields, Ignored};
use super::receive::{Body, Parsed, receive};

/// What texts are for, and what the prompts of models are called that are for it.
const INPUT_TYPES: [(&str, &[&str]); 4] = [
    ("search_query", &["search_query", "query"]),
    ("search_document", &["search_document", "document", "passage"]),
    ("classification", &["classification"]),
    ("clustering", &["clustering"]),
];

/// A form of vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Float,
    /// A bit for each number, 1 where it is not negative, eight in a byte with the first on top; bytes less 128.
    Binary,
    /// The same bytes as they are.
    Ubinary,
    /// Little-endian f32.
    Base64,
}

impl Form {
    fn of(name: &str) -> Result<Self, ApiError> {
        match name {
            "float" => Ok(Self::Float),
            "binary" => Ok(Self::Binary),
            "ubinary" => Ok(Self::Ubinary),
            "base64" => Ok(Self::Base64),
            "int8" | "uint8" => Err(invalid("embedding_types", "int8 and uint8 are not supported")),
            _ => Err(invalid("embedding_types", "must hold float, binary, ubinary or base64")),
        }
    }
}

struct EmbedBody {
    model: Option<String>,
    texts: Vec<String>,
    /// The names of prompts that would do.
    prompt_names: &'static [&'static str],
    /// The one of them that the model has.
    prompt_name: Option<&'static str>,
    forms: Vec<Form>,
    dimensions: Option<u64>,
    truncation: PoolingTruncation,
    ignored: Ignored,
}

impl Body for EmbedBody {
    const TASK: Task = Task::Embed;

    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        fields.refuse(&["images", "inputs"])?;
        fields.refuse_unless("priority", |raw| raw == "0")?;
        let texts: Option<Vec<String>> = fields.list("texts", limits.max_pooling_texts, "hold strings")?;
        let texts = texts.filter(|texts| !texts.is_empty()).ok_or_else(|| invalid("texts", "is needed"))?;
        let prompt_names: &'static [&'static str] = match fields.string("input_type")? {
            None => &[],
            Some(given) => match INPUT_TYPES.iter().find(|(name, _)| *name == given) {
                Some((_, names)) => names,
                None => {
                    let must = "must be search_query, search_document, classification or clustering";
                    return Err(invalid("input_type", must));
                }
            },
        };
        let forms: Option<Vec<String>> = fields.list("embedding_types", 16, "hold names")?;
        let mut forms = match forms {
            None => vec![Form::Float],
            Some(names) => names.iter().map(|name| Form::of(name)).collect::<Result<_, _>>()?,
        };
        if forms.is_empty() {
            forms.push(Form::Float);
        }
        let dimensions = fields.count("output_dimension")?;
        let max_tokens = fields.count("max_tokens")?;
        let truncation = match (fields.string("truncate")?.as_deref(), max_tokens) {
            (None | Some("END"), None) => PoolingTruncation::Fit,
            (None | Some("END"), Some(tokens)) => PoolingTruncation::Tokens(tokens),
            (Some("NONE"), None) => PoolingTruncation::No,
            (Some("NONE"), Some(_)) => return Err(invalid("max_tokens", "cannot be used where `truncate` is NONE")),
            (Some("START"), _) => return Err(invalid("truncate", "START is not supported; END and NONE are")),
            (Some(_), _) => return Err(invalid("truncate", "must be END or NONE")),
        };
        let model = fields.string("model")?;
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { model, texts, prompt_names, prompt_name: None, forms, dimensions, truncation, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    fn check_pooling(&mut self, pooling: &PoolingInfo) -> Result<(), ApiError> {
        self.prompt_name = self.prompt_names.iter().copied().find(|name| pooling.prompts.contains_key(*name));
        if self.prompt_name.is_none() && !self.prompt_names.is_empty() {
            // The model makes no difference.
            self.ignored.add("input_type");
        }
        check_bits(&self.forms, self.dimensions, pooling.num_dimensions)
    }
}

/// Whether bits of vectors fill whole bytes, where they are asked for.
fn check_bits(forms: &[Form], dimensions: Option<u64>, has: u32) -> Result<(), ApiError> {
    let has_bits = forms.iter().any(|form| matches!(form, Form::Binary | Form::Ubinary));
    match dimensions {
        Some(count) if has_bits && !count.is_multiple_of(8) => {
            Err(invalid("output_dimension", "must be a multiple of 8 for binary embeddings"))
        }
        None if has_bits && !has.is_multiple_of(8) => {
            let must = format_args!(
                "cannot hold binary or ubinary: the model's {has} dimensions are no multiple of 8, which \
                 `output_dimension` can ask for"
            );
            Err(invalid("embedding_types", must))
        }
        _ => Ok(()),
    }
}

#[derive(Default, Serialize)]
struct ByType {
    #[serde(skip_serializing_if = "Option::is_none")]
    float: Option<Vec<Vec<f32>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    binary: Option<Vec<Vec<i8>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ubinary: Option<Vec<Vec<u8>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base64: Option<Vec<String>>,
}

impl ByType {
    fn of(vectors: Vec<Vec<f32>>, forms: &[Form]) -> Self {
        let wants = |form| forms.contains(&form);
        let bits = || vectors.iter().map(|vector| bits(vector));
        Self {
            binary: wants(Form::Binary).then(|| bits().map(signed).collect()),
            ubinary: wants(Form::Ubinary).then(|| bits().collect()),
            base64: wants(Form::Base64).then(|| vectors.iter().map(|vector| base64(vector)).collect()),
            float: wants(Form::Float).then_some(vectors),
        }
    }
}

fn bits(vector: &[f32]) -> Vec<u8> {
    let byte = |numbers: &[f32]| {
        numbers.iter().enumerate().fold(0, |byte, (place, number)| byte | u8::from(*number >= 0.0) << (7 - place))
    };
    vector.chunks(8).map(byte).collect()
}

fn signed(bytes: Vec<u8>) -> Vec<i8> {
    bytes.into_iter().map(|byte| byte.wrapping_sub(128).cast_signed()).collect()
}

/// `POST /v2/embed`
pub(super) async fn embed(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Answer {
        id: String,
        embeddings: ByType,
        texts: Vec<String>,
        meta: Meta,
        response_type: &'static str,
    }
    #[derive(Serialize)]
    struct Meta {
        api_version: ApiVersion,
        billed_units: BilledUnits,
    }
    #[derive(Serialize)]
    struct ApiVersion {
        version: &'static str,
    }
    #[derive(Serialize)]
    struct BilledUnits {
        input_tokens: u64,
    }
    let Parsed { service, id, body, share } = receive::<EmbedBody>(&service, Endpoint::CohereEmbed, request).await?;
    let EmbedBody { model, texts, prompt_names: _, prompt_name, forms, dimensions, truncation, ignored } = body;
    let request_id = id.0.to_string();
    let answer_id = format!("embd-{request_id}");
    let embedded = service
        .embed(EmbedRequest {
            request: PoolingRequest { request_id, endpoint: Endpoint::CohereEmbed, model, truncation, deadline: None },
            inputs: texts.iter().cloned().map(PoolingText::Text).collect(),
            param: "texts",
            add_special_tokens: true,
            dimensions,
            prompt_name: prompt_name.map(str::to_owned),
        })
        .await?;
    drop(share);
    let answer = Answer {
        id: answer_id,
        embeddings: ByType::of(embedded.vectors, &forms),
        texts,
        meta: Meta {
            api_version: ApiVersion { version: "2" },
            billed_units: BilledUnits { input_tokens: embedded.num_tokens },
        },
        response_type: "embeddings_by_type",
    };
    Ok(json_response(json(&answer), &ignored))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_fill_whole_bytes() {
        let refused = |forms: &[Form], dimensions, has| match check_bits(forms, dimensions, has) {
            Err(ApiError::InvalidRequest { param, .. }) => param,
            other => other.map(|()| None).expect("no other refusal"),
        };
        for form in [Form::Binary, Form::Ubinary] {
            assert_eq!(refused(&[Form::Float, form], None, 12).as_deref(), Some("embedding_types"));
            assert_eq!(refused(&[form], Some(9), 16).as_deref(), Some("output_dimension"));
            assert_eq!((refused(&[form], Some(8), 12), refused(&[form], None, 16)), (None, None));
        }
        assert_eq!((refused(&[Form::Float], None, 12), refused(&[Form::Base64], Some(9), 12)), (None, None));
    }

    #[test]
    fn a_bit_is_a_number_that_is_not_negative() {
        let vector = [1.0, -1.0, 0.0, -0.5, -2.0, 3.0, 1.0, 1.0, -1.0, 1.0];
        assert_eq!(bits(&vector), [0b1010_0111, 0b0100_0000]);
        assert_eq!(signed(vec![0, 128, 255]), [-128, 0, 127]);
        let both = ByType::of(vec![vector.to_vec()], &[Form::Ubinary, Form::Base64]);
        assert!(both.float.is_none() && both.binary.is_none() && both.ubinary.is_some() && both.base64.is_some());
    }
}
