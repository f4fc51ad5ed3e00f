//! What a file's metadata says of the model, in the words of `config.json`: one parser checks both.

use serde_json::{Map, Value, json};

use super::error::{GgufError, quoted};
use super::metadata::{Metadata, Scalar};

/// Architectures that are served, as the files name them, with the name in `config.json`.
const ARCHITECTURES: [(&str, &str); 3] =
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")];
/// Keys of a mixture of experts: without them the model would be another one.
const EXPERTS: &str = "expert_count";
/// The only version of the block formats' layout that is read.
const QUANTIZATION_VERSION: u64 = 2;

/// Keys whose tokens end a generation.
const END_TOKENS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// What tensors' names and the order of their rows depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadCounts {
    pub num_heads: usize,
    pub num_kv_heads: usize,
}

/// `general.architecture`, where it is served.
pub(crate) fn architecture(metadata: &Metadata) -> Result<&'static str, GgufError> {
    let key = "general.architecture";
    let name = metadata.text(key)?.ok_or_else(|| fault(key, "is missing"))?;
    match ARCHITECTURES.iter().find(|(served, _)| *served == name) {
        Some((served, _)) => Ok(served),
        None => {
            let served: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
            Err(fault(key, &format!("{} is not served; {} are", quoted(name), served.join(", "))))
        }
    }
}

/// `config.json` of the same model. `has_tensor` answers by the file's own names.
pub(crate) fn config_json(metadata: &Metadata, has_tensor: &dyn Fn(&str) -> bool) -> Result<Value, GgufError> {
    let keys = Keys { metadata, architecture: architecture(metadata)? };
    if let Some(version) = metadata.unsigned("general.quantization_version")?
        && version != QUANTIZATION_VERSION
    {
        return Err(fault("general.quantization_version", "is not 2, the only one that is read"));
    }
    if keys.unsigned(EXPERTS)?.is_some_and(|count| count > 0) {
        return Err(keys.fault(EXPERTS, "mixtures of experts are not served"));
    }

    let mut config = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            config.insert(name.to_owned(), value);
        }
    };
    let size = |name: &str| Ok(keys.unsigned(name)?.map(Value::from));
    let heads = keys.uniform("attention.head_count")?;
    let head_dim = keys.unsigned("attention.key_length")?;
    if keys.unsigned("attention.value_length")? != head_dim {
        return Err(keys.fault("attention.value_length", "differs from attention.key_length, which is not served"));
    }
    set("hidden_size", size("embedding_length")?);
    set("intermediate_size", keys.uniform("feed_forward_length")?.map(Value::from));
    set("num_hidden_layers", size("block_count")?);
    set("num_attention_heads", heads.map(Value::from));
    set("num_key_value_heads", keys.uniform("attention.head_count_kv")?.or(heads).map(Value::from));
    set("max_position_embeddings", size("context_length")?);
    set("head_dim", head_dim.or_else(|| keys.whole_head()).map(Value::from));
    set("rms_norm_eps", keys.float("attention.layer_norm_rms_epsilon")?.map(Value::from));
    set("rope_theta", keys.float("rope.freq_base")?.map(Value::from));
    set("rope_scaling", rope_scaling(&keys)?);
    let vocab_size = match keys.unsigned("vocab_size")? {
        Some(size) => Some(size),
        None => metadata.array_len("tokenizer.ggml.tokens")?.map(|len| len as u64),
    };
    set("vocab_size", vocab_size.map(Value::from));
    set("tie_word_embeddings", Some((!has_tensor("output.weight")).into()));
    set("attention_bias", Some(has_tensor("blk.0.attn_q.bias").into()));
    set("mlp_bias", Some(has_tensor("blk.0.ffn_gate.bias").into()));
    let mut end_tokens = Vec::new();
    for key in END_TOKENS {
        end_tokens.extend(metadata.id(key)?.filter(|id| !end_tokens.contains(id)));
    }
    set("eos_token_id", Some(json!(end_tokens)));

    let window = keys.unsigned("attention.sliding_window")?.filter(|window| *window > 0);
    if keys.has("attention.sliding_window_pattern") {
        return Err(keys.fault("attention.sliding_window_pattern", "is not served"));
    }
    let mut name = ARCHITECTURES.iter().find(|(served, _)| *served == keys.architecture).map(|(_, name)| *name);
    if let Some(window) = window {
        set("sliding_window", Some(window.into()));
        if keys.architecture == "llama" {
            name = Some("MistralForCausalLM");
        } else {
            set("use_sliding_window", Some(true.into()));
            set("max_window_layers", Some(0.into()));
        }
    }
    set("architectures", Some(json!([name])));

    let rotated = keys.unsigned("rope.dimension_count")?;
    if rotated.is_some() && rotated != head_dim.or_else(|| keys.whole_head()) {
        return Err(keys.fault("rope.dimension_count", "is not the size of a head: only whole heads are rotated here"));
    }
    Ok(Value::Object(config))
}

/// Heads of the attention, for whoever must know them before the configuration is parsed.
pub(crate) fn head_counts(metadata: &Metadata) -> Result<HeadCounts, GgufError> {
    let keys = Keys { metadata, architecture: architecture(metadata)? };
    let count = |number: Option<u64>| number.and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
    let heads = keys.uniform("attention.head_count")?;
    Ok(HeadCounts { num_heads: count(heads), num_kv_heads: count(keys.uniform("attention.head_count_kv")?.or(heads)) })
}

/// Whether rows of queries and keys are stored with the halves of each head interleaved: files of the `llama` family are
/// made for a rotary embedding of neighbours.
pub(crate) fn has_interleaved_heads(metadata: &Metadata) -> Result<bool, GgufError> {
    Ok(architecture(metadata)? == "llama")
}

/// `rope_scaling`, where the rotary embedding is scaled by keys. Factors in a tensor are another matter.
fn rope_scaling(keys: &Keys<'_>) -> Result<Option<Value>, GgufError> {
    let kind = match keys.text("rope.scaling.type")? {
        Some(kind) => kind,
        // The older form had one key and one kind.
        None if keys.has("rope.scale_linear") => "linear",
        None => return Ok(None),
    };
    if kind == "none" {
        return Ok(None);
    }
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    if kind == "linear" && matches!(factor, None | Some(0.0 | 1.0)) {
        return Ok(None);
    }
    let mut scaling = Map::new();
    scaling.insert("rope_type".to_owned(), kind.into());
    let mut set = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            scaling.insert(name.to_owned(), value.into());
        }
    };
    set("factor", factor);
    set("beta_fast", keys.float("rope.scaling.yarn_beta_fast")?);
    set("beta_slow", keys.float("rope.scaling.yarn_beta_slow")?);
    for key in ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"] {
        if let Some(scale) = keys.float(key)?
            && scale != 1.0
        {
            // The files have it as a multiple of what the factor alone would give.
            let own = 1.0 + 0.1 * factor.unwrap_or(1.0).max(1.0).ln();
            set("attention_factor", Some(scale * own));
        }
    }
    for (key, neutral) in [("rope.scaling.yarn_ext_factor", 1.0), ("rope.scaling.yarn_log_multiplier", 0.0)] {
        if keys.float(key)?.is_some_and(|value| value != neutral) {
            return Err(keys.fault(key, &format!("is not {neutral}, which is not served")));
        }
    }
    if let Some(len) = keys.unsigned("rope.scaling.original_context_length")? {
        scaling.insert("original_max_position_embeddings".to_owned(), len.into());
    }
    Ok(Some(Value::Object(scaling)))
}

/// The keys of one architecture.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn fault(&self, name: &str, why: &str) -> GgufError {
        fault(&self.key(name), why)
    }

    fn has(&self, name: &str) -> bool {
        self.metadata.contains(&self.key(name))
    }

    fn unsigned(&self, name: &str) -> Result<Option<u64>, GgufError> {
        self.metadata.unsigned(&self.key(name))
    }

    fn float(&self, name: &str) -> Result<Option<f64>, GgufError> {
        self.metadata.float(&self.key(name))
    }

    fn text(&self, name: &str) -> Result<Option<&str>, GgufError> {
        self.metadata.text(&self.key(name))
    }

    /// One number for all layers, also where it is written once for each.
    fn uniform(&self, name: &str) -> Result<Option<u64>, GgufError> {
        let key = self.key(name);
        if self.metadata.array_len(&key).is_err() {
            return self.metadata.unsigned(&key);
        }
        let Some(numbers) = self.metadata.scalars(&key)? else { return Ok(None) };
        match numbers.first() {
            Some(first @ Scalar::Unsigned(number)) if numbers.iter().all(|other| other == first) => Ok(Some(*number)),
            _ => Err(fault(&key, "differs between layers, which is not served")),
        }
    }

    /// The size of a head where no key gives it.
    fn whole_head(&self) -> Option<u64> {
        let heads = self.uniform("attention.head_count").ok()??;
        self.unsigned("embedding_length").ok()??.checked_div(heads)
    }
}

fn fault(key: &str, why: &str) -> GgufError {
    GgufError::Metadata { key: key.to_owned(), why: why.to_owned() }
}
