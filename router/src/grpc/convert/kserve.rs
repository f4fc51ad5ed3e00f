//! The open inference protocol and our types: tensors of text, and sampling fields wherever that protocol puts them.

use std::collections::BTreeMap;

use quire_engine::pooling::PoolingTask;
use quire_proto::inference as wire;
use quire_proto::inference::infer_parameter::ParameterChoice;
use quire_proto::inference::model_infer_request::InferInputTensor;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::generation::{GenerationParams, Limits, StopCause, Usage};
use crate::http::sampling_of_json;
use crate::served_model::ServedModel;
use crate::served_models::{Runner, Served, ServedModels};

use super::{invalid, kserve_embed};

/// The one version of a model.
pub(super) const VERSION: &str = "1";
/// Who computes, where the protocol asks for a platform or a backend.
const PLATFORM: &str = "quire";

pub(super) const TEXT_INPUT: &str = "text_input";
const TEXT_OUTPUT: &str = "text_output";
const SAMPLING: &str = "sampling_parameters";
const STREAM: &str = "stream";
const EXCLUDE_INPUT: &str = "exclude_input_in_output";
/// A parameter of Triton's client library: every request's last response has this one in any case.
pub(super) const EMPTY_FINAL: &str = "triton_enable_empty_final_response";
const FINAL: &str = "triton_final_response";

/// A request that was understood.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::grpc) struct Infer {
    pub(in crate::grpc) texts: Vec<String>,
    pub(in crate::grpc) params: GenerationParams,
    pub(in crate::grpc) form: Form,
}

/// How its answer looks.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::grpc) struct Form {
    model: String,
    id: String,
    shape: Vec<i64>,
    raw: bool,
    /// Whether the text begins with the prompt.
    pub(in crate::grpc) with_prompt: bool,
}

/// Whether a model goes by this name and version.
pub(in crate::grpc) fn is_version(version: &str) -> bool {
    matches!(version, "" | VERSION)
}

/// The texts and parameters of a request.
pub(in crate::grpc) fn infer(request: wire::ModelInferRequest, limits: &Limits) -> Result<Infer, ApiError> {
    let wire::ModelInferRequest { model_name, model_version, id, parameters, inputs, outputs, raw_input_contents } =
        request;
    if !is_version(&model_version) {
        return Err(invalid("model_version", "must be empty or 1"));
    }
    if outputs.iter().any(|output| output.name != TEXT_OUTPUT) {
        return Err(invalid("outputs", "may only name text_output"));
    }
    let raw = !raw_input_contents.is_empty();
    if raw && raw_input_contents.len() != inputs.len() {
        return Err(invalid("raw_input_contents", "must hold as many entries as `inputs`, or none"));
    }
    let mut contents = raw_input_contents.into_iter();
    let (mut texts, mut shape, mut with_prompt) = (None, Vec::new(), false);
    let mut sampling = Fields::default();
    for (index, input) in inputs.into_iter().enumerate() {
        let name = input.name.clone();
        let dims = input.shape.clone();
        let values = values(input, contents.next(), index, limits.max_prompts)?;
        match name.as_str() {
            TEXT_INPUT if texts.is_some() => return Err(invalid(TEXT_INPUT, "must be given once")),
            TEXT_INPUT => {
                texts = Some(strings(TEXT_INPUT, values)?);
                shape = dims;
            }
            SAMPLING => {
                let json = strings(SAMPLING, vec![single(SAMPLING, values)?])?.remove(0);
                let Ok(Value::Object(fields)) = serde_json::from_str(&json) else {
                    return Err(invalid(SAMPLING, "must be a JSON object"));
                };
                for (name, value) in fields {
                    sampling.add(name, value)?;
                }
            }
            STREAM => drop(flag(STREAM, values)?),
            EXCLUDE_INPUT => with_prompt = !flag(EXCLUDE_INPUT, values)?,
            // Several stop strings are a list, anything else is one value.
            "stop" | "bad_words" | "stop_token_ids" => sampling.add(name, Value::Array(values))?,
            _ => sampling.add(name.clone(), single(&format!("inputs[{index}]"), values)?)?,
        }
    }
    for (name, parameter) in parameters {
        if name == EMPTY_FINAL {
            continue;
        }
        let value = match parameter.parameter_choice {
            Some(ParameterChoice::BoolParam(value)) => value.into(),
            Some(ParameterChoice::Int64Param(value)) => value.into(),
            Some(ParameterChoice::Uint64Param(value)) => value.into(),
            Some(ParameterChoice::DoubleParam(value)) => value.into(),
            Some(ParameterChoice::StringParam(value)) => value.into(),
            None => return Err(invalid("parameters", "must have values")),
        };
        sampling.add(name, value)?;
    }
    let texts: Vec<String> = texts.ok_or_else(|| invalid(TEXT_INPUT, "is needed"))?;
    let json = serde_json::to_vec(&sampling.0).unwrap_or_default();
    let params = sampling_of_json(&json, limits)?;
    for (param, is_asked) in [
        ("n", params.n.is_some_and(|n| n != 1)),
        ("logprobs", params.logprobs.is_some()),
        ("prompt_logprobs", params.prompt_logprobs.is_some()),
    ] {
        if is_asked {
            return Err(invalid(param, "is not supported over this contract"));
        }
    }
    Ok(Infer { texts, params, form: Form { model: model_name, id, shape, raw, with_prompt } })
}

/// Sampling fields by name, each once.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl Fields {
    fn add(&mut self, name: String, value: Value) -> Result<(), ApiError> {
        if self.0.contains_key(&name) {
            return Err(invalid("parameters", "and `inputs` must not name a field twice"));
        }
        self.0.insert(name, value);
        Ok(())
    }
}

fn single(name: &str, mut values: Vec<Value>) -> Result<Value, ApiError> {
    match values.pop() {
        Some(value) if values.is_empty() => Ok(value),
        _ => Err(invalid(name, "must have one element")),
    }
}

fn flag(name: &str, values: Vec<Value>) -> Result<bool, ApiError> {
    single(name, values)?.as_bool().ok_or_else(|| invalid(name, "must be of type BOOL"))
}

pub(super) fn strings(name: &str, values: Vec<Value>) -> Result<Vec<String>, ApiError> {
    let text = |value| match value {
        Value::String(text) => Ok(text),
        _ => Err(invalid(name, "must be of type BYTES")),
    };
    values.into_iter().map(text).collect()
}

/// A tensor's elements. Their number is bounded before any is read.
pub(super) fn values(
    tensor: InferInputTensor,
    raw: Option<Vec<u8>>,
    index: usize,
    max_elements: usize,
) -> Result<Vec<Value>, ApiError> {
    let InferInputTensor { name: _, datatype, shape, parameters, contents } = tensor;
    let param = format!("inputs[{index}]");
    if !parameters.is_empty() {
        // Shared memory and the like.
        return Err(invalid(&param, "has parameters, which are not supported"));
    }
    let count = shape.iter().try_fold(1usize, |count, dim| count.checked_mul(usize::try_from(*dim).ok()?));
    let Some(count) = count.filter(|count| (1..=max_elements).contains(count)) else {
        return Err(invalid(&param, &format!("must have a shape of 1 to {max_elements} elements")));
    };
    let values = match raw {
        Some(bytes) => of_raw(&datatype, &bytes),
        None => of_contents(&datatype, contents.unwrap_or_default()),
    };
    match values {
        Some(values) if values.len() == count => Ok(values),
        Some(_) => Err(invalid(&param, "must hold as many elements as its shape says")),
        None => {
            Err(invalid(&param, "must hold whole elements of BOOL, INT32, INT64, UINT32, UINT64, FP32, FP64 or BYTES"))
        }
    }
}

/// `None` where the type is not known, or a text not UTF-8.
fn of_contents(datatype: &str, contents: wire::InferTensorContents) -> Option<Vec<Value>> {
    fn all<T: Into<Value>>(values: Vec<T>) -> Option<Vec<Value>> {
        Some(values.into_iter().map(Into::into).collect())
    }
    match datatype {
        "BOOL" => all(contents.bool_contents),
        "INT32" => all(contents.int_contents),
        "INT64" => all(contents.int64_contents),
        "UINT32" => all(contents.uint_contents),
        "UINT64" => all(contents.uint64_contents),
        "FP32" => all(contents.fp32_contents.into_iter().map(short_float).collect()),
        "FP64" => all(contents.fp64_contents),
        "BYTES" => {
            contents.bytes_contents.into_iter().map(|bytes| String::from_utf8(bytes).ok().map(Value::from)).collect()
        }
        _ => None,
    }
}

fn of_raw(datatype: &str, bytes: &[u8]) -> Option<Vec<Value>> {
    fn numbers<const N: usize, T: Into<Value>>(bytes: &[u8], read: fn([u8; N]) -> T) -> Option<Vec<Value>> {
        let chunks = bytes.chunks_exact(N);
        chunks
            .remainder()
            .is_empty()
            .then(|| chunks.filter_map(|chunk| Some(read(chunk.try_into().ok()?).into())).collect())
    }
    match datatype {
        "BOOL" => numbers(bytes, |[byte]: [u8; 1]| byte != 0),
        "INT32" => numbers(bytes, i32::from_le_bytes),
        "INT64" => numbers(bytes, i64::from_le_bytes),
        "UINT32" => numbers(bytes, u32::from_le_bytes),
        "UINT64" => numbers(bytes, u64::from_le_bytes),
        "FP32" => numbers(bytes, |bytes| short_float(f32::from_le_bytes(bytes))),
        "FP64" => numbers(bytes, f64::from_le_bytes),
        "BYTES" => {
            let (mut rest, mut values) = (bytes, Vec::new());
            while let Some((length, behind)) = rest.split_first_chunk::<4>() {
                let (element, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize)?;
                values.push(std::str::from_utf8(element).ok()?.into());
                rest = behind;
            }
            rest.is_empty().then_some(values)
        }
        _ => None,
    }
}

/// 0.1f32 is meant as 0.1 and not as 0.10000000149: the shortest number that reads back as the same float.
fn short_float(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| value.into())
}

impl Form {
    /// A response with these texts.
    fn response(
        &self,
        texts: Vec<String>,
        parameters: BTreeMap<String, wire::InferParameter>,
    ) -> wire::ModelInferResponse {
        let mut output = wire::model_infer_response::InferOutputTensor {
            name: TEXT_OUTPUT.to_owned(),
            datatype: "BYTES".to_owned(),
            shape: self.shape.clone(),
            ..Default::default()
        };
        let mut raw_output_contents = Vec::new();
        if self.raw {
            let mut raw = Vec::new();
            for text in texts {
                // A text has at most some bytes for each token of the model's length.
                raw.extend((text.len() as u32).to_le_bytes());
                raw.extend(text.as_bytes());
            }
            raw_output_contents.push(raw);
        } else {
            let bytes_contents = texts.into_iter().map(String::into_bytes).collect();
            output.contents = Some(wire::InferTensorContents { bytes_contents, ..Default::default() });
        }
        wire::ModelInferResponse {
            model_name: self.model.clone(),
            model_version: VERSION.to_owned(),
            id: self.id.clone(),
            parameters,
            outputs: vec![output],
            raw_output_contents,
        }
    }

    /// The answer to a unary call.
    pub(in crate::grpc) fn whole(
        &self,
        texts: Vec<String>,
        causes: &[StopCause],
        seed: i64,
        usage: Usage,
    ) -> wire::ModelInferResponse {
        self.response(texts, ending(causes, seed, usage))
    }

    /// A piece of a streamed answer.
    pub(in crate::grpc) fn piece(&self, text: String) -> wire::ModelStreamInferResponse {
        let response = self.response(vec![text], BTreeMap::new());
        wire::ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) }
    }

    /// Its last response.
    pub(in crate::grpc) fn last(&self, cause: &StopCause, seed: i64, usage: Usage) -> wire::ModelStreamInferResponse {
        let mut parameters = ending(std::slice::from_ref(cause), seed, usage);
        parameters.insert(FINAL.to_owned(), parameter(ParameterChoice::BoolParam(true)));
        let response = self.response(vec![String::new()], parameters);
        wire::ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) }
    }
}

/// The last response of a request that failed.
pub(in crate::grpc) fn failed(id: String, error: &ApiError) -> wire::ModelStreamInferResponse {
    let mut parameters = BTreeMap::new();
    parameters.insert(FINAL.to_owned(), parameter(ParameterChoice::BoolParam(true)));
    let response = wire::ModelInferResponse { id, parameters, ..Default::default() };
    wire::ModelStreamInferResponse { error_message: error.to_string(), infer_response: Some(response) }
}

fn parameter(choice: ParameterChoice) -> wire::InferParameter {
    wire::InferParameter { parameter_choice: Some(choice) }
}

fn ending(causes: &[StopCause], seed: i64, usage: Usage) -> BTreeMap<String, wire::InferParameter> {
    let reason = |cause: &StopCause| if matches!(cause, StopCause::Length) { "length" } else { "stop" };
    let reasons = causes.iter().map(reason).collect::<Vec<_>>().join(",");
    let number = |number: u32| ParameterChoice::Int64Param(number.into());
    [
        ("finish_reason", ParameterChoice::StringParam(reasons)),
        ("seed", ParameterChoice::Int64Param(seed)),
        ("prompt_tokens", number(usage.prompt_tokens)),
        ("completion_tokens", number(usage.completion_tokens)),
        ("cached_tokens", number(usage.cached_tokens)),
    ]
    .into_iter()
    .map(|(name, choice)| (name.to_owned(), parameter(choice)))
    .collect()
}

/// What the server is.
pub(in crate::grpc) fn server_metadata() -> wire::ServerMetadataResponse {
    wire::ServerMetadataResponse {
        name: PLATFORM.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extensions: ["model_configuration", "model_repository", "parameters", "binary_tensor_data"]
            .map(str::to_owned)
            .to_vec(),
    }
}

/// Inputs and outputs: name, type, whether it is text for each prompt, whether it may be left out.
const INPUTS: [(&str, wire::DataType, bool, bool); 4] = [
    (TEXT_INPUT, wire::DataType::TypeString, true, false),
    (SAMPLING, wire::DataType::TypeString, false, true),
    (STREAM, wire::DataType::TypeBool, false, true),
    (EXCLUDE_INPUT, wire::DataType::TypeBool, false, true),
];

fn dims(of_each_prompt: bool) -> Vec<i64> {
    vec![if of_each_prompt { -1 } else { 1 }]
}

/// The inputs of a model, and its output, where there is one: name, type and shape.
type Tensors =
    (&'static [(&'static str, wire::DataType, bool, bool)], Option<(&'static str, wire::DataType, Vec<i64>)>);

fn tensors(runner: &Runner) -> Tensors {
    match runner {
        Runner::Generates(_) => (&INPUTS, Some((TEXT_OUTPUT, wire::DataType::TypeString, dims(true)))),
        // A reranker takes pairs of texts, which this contract has no form for.
        Runner::Pools(engine) if engine.pooling().task != PoolingTask::Embed => (&[], None),
        // Of texts alone.
        Runner::Pools(engine) => (&INPUTS[..1], Some(kserve_embed::output(engine.pooling().num_dimensions))),
    }
}

pub(in crate::grpc) fn model_metadata(model: &ServedModel, runner: &Runner) -> wire::ModelMetadataResponse {
    use wire::model_metadata_response::TensorMetadata;
    let tensor = |name: &str, kind, shape| TensorMetadata {
        name: name.to_owned(),
        datatype: match kind {
            wire::DataType::TypeBool => "BOOL",
            wire::DataType::TypeFp32 => "FP32",
            wire::DataType::TypeString | wire::DataType::TypeInvalid => "BYTES",
        }
        .to_owned(),
        shape,
    };
    let (inputs, output) = tensors(runner);
    wire::ModelMetadataResponse {
        name: model.name().to_owned(),
        versions: vec![VERSION.to_owned()],
        platform: PLATFORM.to_owned(),
        inputs: inputs.iter().map(|&(name, kind, each, _)| tensor(name, kind, dims(each))).collect(),
        outputs: output.into_iter().map(|(name, kind, shape)| tensor(name, kind, shape)).collect(),
    }
}

pub(in crate::grpc) fn model_config(model: &ServedModel, runner: &Runner) -> wire::ModelConfigResponse {
    let input = |&(name, kind, of_each_prompt, optional): &(&str, wire::DataType, bool, bool)| wire::ModelInput {
        name: name.to_owned(),
        data_type: kind.into(),
        dims: dims(of_each_prompt),
        optional,
    };
    let (inputs, output) = tensors(runner);
    let output =
        output.map(|(name, kind, dims)| wire::ModelOutput { name: name.to_owned(), data_type: kind.into(), dims });
    let config = wire::ModelConfig {
        name: model.name().to_owned(),
        platform: PLATFORM.to_owned(),
        // Batches are the server's business: a request has no dimension for them.
        max_batch_size: 0,
        input: inputs.iter().map(input).collect(),
        output: output.into_iter().collect(),
        backend: PLATFORM.to_owned(),
        model_transaction_policy: Some(wire::ModelTransactionPolicy {
            decoupled: matches!(runner, Runner::Generates(_)),
        }),
    };
    wire::ModelConfigResponse { config: Some(config) }
}

/// All models; `ready` is why the server does not take requests, if so.
pub(in crate::grpc) fn index(models: &ServedModels, not_ready: Option<&str>) -> wire::RepositoryIndexResponse {
    let entry = |served: &Served| wire::repository_index_response::ModelIndex {
        name: served.model.name().to_owned(),
        version: VERSION.to_owned(),
        state: if not_ready.is_none() { "READY" } else { "UNAVAILABLE" }.to_owned(),
        reason: not_ready.unwrap_or_default().to_owned(),
    };
    wire::RepositoryIndexResponse { models: models.iter().map(entry).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str, text: &str) -> InferInputTensor {
        let contents = wire::InferTensorContents { bytes_contents: vec![text.into()], ..Default::default() };
        let datatype = "BYTES".to_owned();
        InferInputTensor {
            name: name.to_owned(),
            datatype,
            shape: vec![1],
            contents: Some(contents),
            ..Default::default()
        }
    }

    fn read(inputs: Vec<InferInputTensor>) -> Result<Infer, ApiError> {
        infer(wire::ModelInferRequest { inputs, ..Default::default() }, &Limits::default())
    }

    #[test]
    fn sampling_fields_are_read_wherever_they_stand() {
        let sampling = text(SAMPLING, "{\"temperature\": 0.5, \"stop\": [\"a\"]}");
        let contents = wire::InferTensorContents { int_contents: vec![7], ..Default::default() };
        let max_tokens = InferInputTensor {
            name: "max_tokens".to_owned(),
            datatype: "INT32".to_owned(),
            shape: vec![1, 1],
            contents: Some(contents),
            ..Default::default()
        };
        let parameters = [("top_p".to_owned(), parameter(ParameterChoice::DoubleParam(0.25)))].into_iter().collect();
        let request = wire::ModelInferRequest {
            inputs: vec![text(TEXT_INPUT, "Hi"), sampling, max_tokens],
            parameters,
            ..Default::default()
        };
        let infer = infer(request, &Limits::default()).expect("fine");
        let params = &infer.params;
        assert_eq!((params.temperature, params.top_p, params.max_tokens), (Some(0.5), Some(0.25), Some(7)));
        assert_eq!((infer.texts, params.stop.clone()), (vec!["Hi".to_owned()], vec!["a".to_owned()]));
    }

    #[test]
    fn raw_contents_are_read_to_their_last_byte() {
        assert_eq!(of_raw("BYTES", &[1, 0, 0, 0, b'a', 0, 0, 0, 0]), Some(vec!["a".into(), "".into()]));
        for broken in [&[1, 0, 0][..], &[1, 0, 0, 0], &[0xff, 0xff, 0xff, 0xff, 1], &[1, 0, 0, 0, 0xff]] {
            assert_eq!(of_raw("BYTES", broken), None, "{broken:?}");
        }
        assert_eq!(of_raw("FP32", &0.1f32.to_le_bytes()), Some(vec![0.1.into()]));
        assert_eq!(of_raw("INT64", &[0; 7]), None);
        assert_eq!(of_raw("FP16", &[0; 2]), None);
    }

    #[test]
    fn hostile_tensors_are_refused_by_name() {
        let param = |inputs| read(inputs).unwrap_err().param().unwrap_or_default().to_owned();
        assert_eq!(param(vec![]), TEXT_INPUT);
        assert_eq!(param(vec![text("text_input", "a"), text("text_input", "a")]), TEXT_INPUT);
        for shape in [vec![-1], vec![0], vec![i64::MAX, i64::MAX], vec![1 << 40], vec![2]] {
            assert_eq!(param(vec![InferInputTensor { shape, ..text(TEXT_INPUT, "a") }]), "inputs[0]");
        }
        assert_eq!(param(vec![text(TEXT_INPUT, "a"), text(SAMPLING, "[]")]), SAMPLING);
        assert_eq!(param(vec![text(TEXT_INPUT, "a"), text("surprise", "[]")]), "surprise");
        assert_eq!(param(vec![text(TEXT_INPUT, "a"), text(SAMPLING, "{\"n\":2}")]), "n");
    }
}
