//! `config.json`: read without trust. Both forms are understood, that of transformers 4 (`rope_theta`, `rope_scaling`,
//! `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`). Keys that name code (`auto_map`) have no
//! meaning here.

use std::ops::RangeInclusive;

use quire_kernels::DType;
use quire_kernels::kv_layout::MAX_HEAD_DIM;
use quire_kernels::ops::rope_kv_write::AttentionShape;
use serde_json::{Map, Value};

use super::ARCHITECTURES;
use super::rope::{self, Rope};
use crate::error::EngineError;

/// What an architecture adds to the shared decoder.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Facts {
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub o_bias: bool,
    /// Biases of gate, up and down.
    pub mlp_bias: bool,
    /// Names, within a layer, of the per-head norms of queries and keys.
    pub qk_norm: Option<[&'static str; 2]>,
    /// Per layer: how many tokens a token sees, itself included; `None` is all before it.
    pub windows: Vec<Option<u32>>,
}

/// A model's sizes, every one of them within bounds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModelConfig {
    pub architecture: &'static str,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f32,
    pub tie_word_embeddings: bool,
    pub rope: Rope,
    /// What the files' weights are said to be stored as.
    pub dtype: Option<DType>,
    pub eos_token_ids: Vec<u32>,
    pub facts: Facts,
}

impl ModelConfig {
    /// Reads and checks `config.json`.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, EngineError> {
        let root = parse_object("config.json", json)?;
        let fields = Fields { object: &root, prefix: "" };
        // A decoder with another head, or whose answers to a question are its classes.
        let architecture = fields.architecture()?.replace("ForSequenceClassification", "ForCausalLM");
        let (family, facts_of) = *ARCHITECTURES
            .iter()
            .find(|(name, ..)| *name == architecture || architecture == model_type_of(name))
            .ok_or_else(|| unsupported("architectures", unknown_architecture(&architecture)))?;
        if let Some(quantization) = fields.object("quantization_config")? {
            let method = quantization.string("quant_method")?.unwrap_or("unnamed");
            let format = quantization.string("format")?;
            // Which weights are of 8-bit floats, and what their scales are for, the tensors say themselves.
            if !matches!((method, format), ("fp8", _) | ("compressed-tensors", Some("float-quantized"))) {
                let method = format.map_or(method.to_owned(), |format| format!("{method} ({format})"));
                let why = format!(
                    "weights quantized by {method} are not served; fp8, and float-quantized of compressed-tensors, are"
                );
                return Err(unsupported("quantization_config", why));
            }
        }

        let hidden_size = fields.size("hidden_size", 1..=1 << 16)?;
        let intermediate_size = fields.size("intermediate_size", 1..=1 << 20)?;
        let num_layers = fields.size("num_hidden_layers", 1..=1024)?;
        let num_heads = fields.size("num_attention_heads", 1..=1024)?;
        let vocab_size = fields.size("vocab_size", 1..=1 << 22)?;
        let max_position_embeddings = fields.size("max_position_embeddings", 1..=1 << 24)?;
        let shape = Shape { hidden_size, num_layers, num_heads };
        let facts = facts_of(&fields, &shape)?;
        check_heads(&facts, &shape)?;
        match fields.string("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => {}
            other => return Err(unsupported("hidden_act", format!("{other} is not served, silu is"))),
        }
        let rms_norm_eps = fields.number("rms_norm_eps", 1e-6)?;
        if !(rms_norm_eps > 0.0 && rms_norm_eps <= 1.0) {
            return Err(unsupported("rms_norm_eps", format!("{rms_norm_eps} is not between 0 and 1")));
        }
        let rope = rope::parse(&fields, facts.head_dim, max_position_embeddings as u32)?;

        Ok(Self {
            architecture: family,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            vocab_size,
            rms_norm_eps: rms_norm_eps as f32,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            rope,
            dtype: fields.dtype()?,
            eos_token_ids: token_ids(fields.get("eos_token_id")),
            facts,
        })
    }

    /// Heads of every attention layer.
    pub(crate) fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            num_heads: self.num_heads,
            num_kv_heads: self.facts.num_kv_heads,
            head_dim: self.facts.head_dim,
        }
    }

    /// Windows no shorter than `max_model_len` see everything: they become none.
    pub(crate) fn drop_long_windows(&mut self, max_model_len: u32) {
        for window in &mut self.facts.windows {
            *window = window.filter(|window| *window < max_model_len);
        }
    }

    /// Layers in groups of one window: the kind of each group, in order of first appearance.
    pub(crate) fn kv_groups(&self) -> Vec<Option<u32>> {
        let mut groups = Vec::new();
        for window in &self.facts.windows {
            if !groups.contains(window) {
                groups.push(*window);
            }
        }
        groups
    }
}

/// The end-of-sequence tokens that `generation_config.json` names; an unreadable file names none.
pub(crate) fn generation_eos(json: &[u8]) -> Result<Vec<u32>, EngineError> {
    let root = parse_object("generation_config.json", json)?;
    Ok(token_ids(root.get("eos_token_id")))
}

/// Sizes that an architecture's facts depend on.
pub(crate) struct Shape {
    pub hidden_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
}

impl Shape {
    /// `head_dim` where the file does not give one.
    pub(crate) fn default_head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }
}

/// A JSON object whose fields are asked for by name; `null` is absent.
pub(crate) struct Fields<'a> {
    pub(crate) object: &'a Map<String, Value>,
    /// Where the object stands in the file, for messages.
    pub(crate) prefix: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there and `null`, which can differ from absent.
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.object.get(name).is_some_and(Value::is_null)
    }

    pub(crate) fn error(&self, name: &str, why: impl Into<String>) -> EngineError {
        unsupported(&format!("{}{name}", self.prefix), why)
    }

    /// A count that must be given.
    pub(crate) fn size(&self, name: &str, bounds: RangeInclusive<usize>) -> Result<usize, EngineError> {
        self.optional_size(name, bounds)?.ok_or_else(|| self.error(name, "is missing"))
    }

    pub(crate) fn optional_size(
        &self,
        name: &str,
        bounds: RangeInclusive<usize>,
    ) -> Result<Option<usize>, EngineError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().and_then(|count| usize::try_from(count).ok()) {
            Some(count) if bounds.contains(&count) => Ok(Some(count)),
            _ => Err(self.error(
                name,
                format!("{} is not a whole number from {} to {}", short(value), bounds.start(), bounds.end()),
            )),
        }
    }

    /// `num_key_value_heads`. In the models' own code a key that is absent has the default of the architecture, and one that
    /// is `null` means a head for every head of the queries.
    pub(crate) fn num_kv_heads(&self, shape: &Shape, default: usize) -> Result<usize, EngineError> {
        let name = "num_key_value_heads";
        let default = if self.is_null(name) { shape.num_heads } else { default };
        Ok(self.optional_size(name, 1..=1024)?.unwrap_or(default))
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, EngineError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.error(name, format!("{} is not true or false", short(other)))),
        }
    }

    pub(crate) fn optional_number(&self, name: &str) -> Result<Option<f64>, EngineError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.error(name, format!("{} is not a number", short(value)))),
        }
    }

    pub(crate) fn number(&self, name: &str, default: f64) -> Result<f64, EngineError> {
        Ok(self.optional_number(name)?.unwrap_or(default))
    }

    pub(crate) fn string(&self, name: &str) -> Result<Option<&'a str>, EngineError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.error(name, format!("{} is not a string", short(other)))),
        }
    }

    pub(crate) fn object(&self, name: &'static str) -> Result<Option<Fields<'a>>, EngineError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields { object, prefix: prefix_of(name) })),
            Some(other) => Err(self.error(name, format!("{} is not an object", short(other)))),
        }
    }

    /// `layer_types` of newer files; `None` where the file has none.
    pub(crate) fn layer_types(&self, num_layers: usize) -> Result<Option<Vec<LayerType>>, EngineError> {
        let Some(value) = self.get("layer_types") else { return Ok(None) };
        let list = value.as_array().ok_or_else(|| self.error("layer_types", "is not a list"))?;
        if list.len() != num_layers {
            return Err(self.error("layer_types", format!("{} entries for {num_layers} layers", list.len())));
        }
        let kind = |value: &Value| match value.as_str() {
            Some("full_attention") => Ok(LayerType::Full),
            Some("sliding_attention") => Ok(LayerType::Sliding),
            _ => Err(self.error("layer_types", format!("{} is not served", short(value)))),
        };
        list.iter().map(kind).collect::<Result<_, _>>().map(Some)
    }

    /// The first of `architectures`, or else `model_type`.
    pub(crate) fn architecture(&self) -> Result<String, EngineError> {
        match self.get("architectures") {
            None => {
                let model_type = self.string("model_type")?.ok_or_else(|| self.error("architectures", "is missing"))?;
                Ok(model_type.to_owned())
            }
            Some(value) => match value.as_array().and_then(|list| list.first()).and_then(Value::as_str) {
                Some(name) => Ok(name.to_owned()),
                None => Err(self.error("architectures", "is not a list of names")),
            },
        }
    }

    /// `dtype`, or `torch_dtype` of the older form.
    pub(super) fn dtype(&self) -> Result<Option<DType>, EngineError> {
        let name = if self.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        match self.string(name)? {
            None => Ok(None),
            Some("float32") => Ok(Some(DType::F32)),
            Some("bfloat16") => Ok(Some(DType::Bf16)),
            Some("float16") => Ok(Some(DType::F16)),
            Some(other) => Err(self.error(name, format!("{other} is not served: float32, bfloat16 and float16 are"))),
        }
    }
}

/// How far a layer's tokens see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerType {
    Full,
    Sliding,
}

impl LayerType {
    /// The layer's window, where the model's is `window`.
    pub(crate) fn window(self, window: Option<u32>) -> Option<u32> {
        match self {
            Self::Full => None,
            Self::Sliding => window,
        }
    }
}

pub(crate) fn unsupported(field: &str, why: impl Into<String>) -> EngineError {
    EngineError::Unsupported { field: field.to_owned(), why: why.into() }
}

fn prefix_of(name: &'static str) -> &'static str {
    match name {
        "rope_parameters" => "rope_parameters.",
        "rope_scaling" => "rope_scaling.",
        _ => "",
    }
}

pub(crate) fn parse_object(file: &str, json: &[u8]) -> Result<Map<String, Value>, EngineError> {
    match serde_json::from_slice(json) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(EngineError::ModelFile { file: file.to_owned(), why: "is not a JSON object".to_owned() }),
        Err(error) => Err(EngineError::ModelFile { file: file.to_owned(), why: error.to_string() }),
    }
}

/// `llama` for `LlamaForCausalLM`.
fn model_type_of(architecture: &str) -> String {
    architecture.trim_end_matches("ForCausalLM").to_lowercase()
}

fn unknown_architecture(name: &str) -> String {
    let served: Vec<&str> = ARCHITECTURES.iter().map(|(name, ..)| *name).collect();
    format!("{} is not served; {} are", short(&Value::from(name)), served.join(", "))
}

fn check_heads(facts: &Facts, shape: &Shape) -> Result<(), EngineError> {
    let Facts { head_dim, num_kv_heads, .. } = *facts;
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        return Err(unsupported("head_dim", format!("{head_dim} is not an even number from 2 to {MAX_HEAD_DIM}")));
    }
    if num_kv_heads == 0 || !shape.num_heads.is_multiple_of(num_kv_heads) {
        let why = format!("{} heads do not share {num_kv_heads} evenly", shape.num_heads);
        return Err(unsupported("num_key_value_heads", why));
    }
    if facts.windows.len() != shape.num_layers || facts.windows.contains(&Some(0)) {
        return Err(unsupported("sliding_window", "is not a window for each layer"));
    }
    Ok(())
}

/// One id or a list of ids; anything else is none.
fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A value as it may stand in a message: never a wall of text from the file.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 256,
            "auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": true, "eos_token_id": [2, 7],
        })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = base();
        config[key] = value;
        config
    }

    fn parse(config: &Value) -> Result<ModelConfig, EngineError> {
        ModelConfig::parse(config.to_string().as_bytes())
    }

    #[test]
    fn reads_the_sizes() {
        let config = parse(&base()).unwrap();
        assert_eq!(config.architecture, "LlamaForCausalLM");
        assert_eq!(config.attention_shape(), AttentionShape { num_heads: 4, num_kv_heads: 2, head_dim: 16 });
        assert_eq!(config.eos_token_ids, [2, 7]);
        assert_eq!(config.kv_groups(), [None]);
        assert_eq!(config.dtype, None);
        assert_eq!(parse(&with("dtype", json!("bfloat16"))).unwrap().dtype, Some(DType::Bf16));
        assert_eq!(parse(&with("torch_dtype", json!("float16"))).unwrap().dtype, Some(DType::F16));
    }

    #[test]
    fn names_what_is_served() {
        let error = parse(&with("architectures", json!(["GPT2LMHeadModel"]))).unwrap_err().to_string();
        for name in
            ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
        {
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn refuses_every_field_that_is_out_of_bounds() {
        let cases = [
            ("hidden_size", json!(0)),
            ("hidden_size", json!(-64)),
            ("hidden_size", json!(64.5)),
            ("hidden_size", json!(u64::MAX)),
            ("hidden_size", json!("64")),
            ("hidden_size", json!(null)),
            ("intermediate_size", json!(0)),
            ("num_hidden_layers", json!(0)),
            ("num_hidden_layers", json!(4_000_000_000u64)),
            ("num_attention_heads", json!(0)),
            ("num_attention_heads", json!(64)),
            ("num_key_value_heads", json!(0)),
            ("num_key_value_heads", json!(3)),
            ("num_key_value_heads", json!(8)),
            ("head_dim", json!(0)),
            ("head_dim", json!(15)),
            ("head_dim", json!(1 << 20)),
            ("vocab_size", json!(0)),
            ("max_position_embeddings", json!(0)),
            ("rms_norm_eps", json!(-1.0)),
            ("rms_norm_eps", json!("small")),
            ("hidden_act", json!("gelu")),
            ("dtype", json!("float8_e4m3fn")),
            ("tie_word_embeddings", json!("yes")),
            ("rope_theta", json!(0)),
            ("rope_theta", json!("1e4")),
            ("rope_scaling", json!({"rope_type": "longrope", "factor": 2.0})),
            ("rope_scaling", json!({"rope_type": "linear", "factor": -2.0})),
            ("rope_scaling", json!({"rope_type": "linear"})),
            ("rope_scaling", json!([1])),
            ("rope_parameters", json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": -1.0})),
            ("rope_parameters", json!({"rope_type": "default", "partial_rotary_factor": 0.5})),
            ("rope_parameters", json!({"full_attention": {"rope_type": "default"}})),
            ("partial_rotary_factor", json!(0.5)),
            ("architectures", json!([])),
            ("architectures", json!("LlamaForCausalLM")),
            ("quantization_config", json!({"quant_method": "gptq", "bits": 4})),
            ("quantization_config", json!({"quant_method": "compressed-tensors", "format": "pack-quantized"})),
            ("quantization_config", json!({"quant_method": "compressed-tensors"})),
        ];
        for (key, value) in cases {
            let result = parse(&with(key, value.clone()));
            assert!(matches!(result, Err(EngineError::Unsupported { .. })), "{key} = {value}: {result:?}");
        }
        for bytes in [&b""[..], b"[]", b"{", b"{\"hidden_size\": NaN}", "[".repeat(100_000).as_bytes()] {
            assert!(matches!(ModelConfig::parse(bytes), Err(EngineError::ModelFile { .. })));
        }
    }

    #[test]
    fn weights_of_8_bit_floats_are_known() {
        for quantization in [
            json!({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
            json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}),
        ] {
            parse(&with("quantization_config", quantization)).unwrap();
        }
    }

    #[test]
    fn a_null_number_of_kv_heads_is_not_an_absent_one() {
        for (architecture, absent) in
            [("LlamaForCausalLM", 64), ("MistralForCausalLM", 8), ("Qwen2ForCausalLM", 32), ("Qwen3ForCausalLM", 32)]
        {
            let mut config = with("num_attention_heads", json!(64));
            config["head_dim"] = json!(16);
            config["architectures"] = json!([architecture]);
            config["num_key_value_heads"] = Value::Null;
            assert_eq!(parse(&config).unwrap().facts.num_kv_heads, 64, "{architecture}");
            config.as_object_mut().unwrap().remove("num_key_value_heads");
            assert_eq!(parse(&config).unwrap().facts.num_kv_heads, absent, "{architecture}");
        }
    }

    #[test]
    fn windows_follow_the_architecture() {
        let mistral = |value: Value| {
            let mut config = with("sliding_window", value);
            config["architectures"] = json!(["MistralForCausalLM"]);
            parse(&config).unwrap().facts.windows
        };
        assert_eq!(mistral(json!(24)), [Some(24), Some(24)]);
        assert_eq!(mistral(Value::Null), [None, None]);

        let mut qwen = with("sliding_window", json!(16));
        qwen["architectures"] = json!(["Qwen2ForCausalLM"]);
        qwen["max_window_layers"] = json!(1);
        assert_eq!(parse(&qwen).unwrap().facts.windows, [None, None], "off unless use_sliding_window");
        qwen["use_sliding_window"] = json!(true);
        let config = parse(&qwen).unwrap();
        assert_eq!(config.facts.windows, [None, Some(16)]);
        assert_eq!(config.kv_groups(), [None, Some(16)]);
        qwen["layer_types"] = json!(["sliding_attention", "full_attention"]);
        assert_eq!(parse(&qwen).unwrap().facts.windows, [Some(16), None]);
        qwen["layer_types"] = json!(["linear_attention", "full_attention"]);
        assert!(parse(&qwen).is_err());
    }

    #[test]
    fn eos_ids_come_as_one_or_many() {
        assert_eq!(generation_eos(br#"{"eos_token_id": 3}"#).unwrap(), [3]);
        assert_eq!(generation_eos(br#"{"eos_token_id": [3, 4]}"#).unwrap(), [3, 4]);
        assert!(generation_eos(br#"{"eos_token_id": null}"#).unwrap().is_empty());
    }
}
