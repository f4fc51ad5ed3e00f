//! Vectors over the open inference protocol: texts in `text_input`, a row of numbers for each in `embedding`.

use std::time::Instant;

use quire_proto::inference as wire;

use crate::error::ApiError;
use crate::generation::{EmbedRequest, Embedded, Limits, PoolingRequest, PoolingText, PoolingTruncation};
use crate::metrics::Endpoint;

use super::invalid;
use super::kserve::{EMPTY_FINAL, TEXT_INPUT, VERSION, is_version, strings, values};

const EMBEDDING: &str = "embedding";

/// Whether numbers go back as raw bytes, and as an answer to what.
pub(in crate::grpc) struct EmbedForm {
    id: String,
    raw: bool,
}

/// The texts of a request.
pub(in crate::grpc) fn embed_request(
    request: wire::ModelInferRequest,
    request_id: String,
    deadline: Option<Instant>,
    limits: &Limits,
) -> Result<(EmbedRequest, EmbedForm), ApiError> {
    let wire::ModelInferRequest { model_name, model_version, id, parameters, inputs, outputs, raw_input_contents } =
        request;
    if !is_version(&model_version) {
        return Err(invalid("model_version", "must be empty or 1"));
    }
    if outputs.iter().any(|output| output.name != EMBEDDING) {
        return Err(invalid("outputs", "may only name embedding"));
    }
    if let Some(name) = parameters.into_keys().find(|name| name != EMPTY_FINAL) {
        return Err(invalid(&name, "is not a parameter of a model that makes embeddings"));
    }
    let [input] = <[_; 1]>::try_from(inputs).map_err(|_| invalid("inputs", "must be text_input alone"))?;
    if input.name != TEXT_INPUT {
        return Err(invalid("inputs", "must be text_input alone"));
    }
    let mut contents = raw_input_contents.into_iter();
    let (first, second) = (contents.next(), contents.next());
    if second.is_some() {
        return Err(invalid("raw_input_contents", "must hold as many entries as `inputs`, or none"));
    }
    let raw = first.is_some();
    let texts = strings(TEXT_INPUT, values(input, first, 0, limits.max_pooling_texts)?)?;
    let request = PoolingRequest {
        request_id,
        endpoint: Endpoint::GrpcModelInfer,
        model: Some(model_name),
        truncation: PoolingTruncation::No,
        deadline,
    };
    let request = EmbedRequest {
        request,
        inputs: texts.into_iter().map(PoolingText::Text).collect(),
        param: TEXT_INPUT,
        add_special_tokens: true,
        dimensions: None,
        prompt_name: None,
    };
    Ok((request, EmbedForm { id, raw }))
}

impl EmbedForm {
    /// Vectors as one tensor, `[texts, numbers]`.
    pub(in crate::grpc) fn answer(self, embedded: Embedded) -> wire::ModelInferResponse {
        let Embedded { model, vectors, num_tokens } = embedded;
        let shape = [vectors.len(), vectors.first().map_or(0, Vec::len)].map(|len| len as i64).to_vec();
        let numbers = vectors.into_iter().flatten();
        let (contents, raw_output_contents) = match self.raw {
            true => (None, vec![numbers.flat_map(f32::to_le_bytes).collect()]),
            false => {
                let fp32_contents = numbers.collect();
                (Some(wire::InferTensorContents { fp32_contents, ..Default::default() }), Vec::new())
            }
        };
        let output = wire::model_infer_response::InferOutputTensor {
            name: EMBEDDING.to_owned(),
            datatype: "FP32".to_owned(),
            shape,
            contents,
            ..Default::default()
        };
        let prompt_tokens = wire::infer_parameter::ParameterChoice::Int64Param(num_tokens as i64);
        let prompt_tokens = wire::InferParameter { parameter_choice: Some(prompt_tokens) };
        wire::ModelInferResponse {
            model_name: model,
            model_version: VERSION.to_owned(),
            id: self.id,
            parameters: [("prompt_tokens".to_owned(), prompt_tokens)].into(),
            outputs: vec![output],
            raw_output_contents,
        }
    }
}

/// Its only output: name, type and shape.
pub(super) fn output(num_dimensions: u32) -> (&'static str, wire::DataType, Vec<i64>) {
    (EMBEDDING, wire::DataType::TypeFp32, vec![-1, num_dimensions.into()])
}
