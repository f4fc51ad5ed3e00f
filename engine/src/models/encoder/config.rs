//! `config.json` of an encoder: read without trust, like a decoder's.

use quire_kernels::DType;
use quire_kernels::kv_layout::MAX_HEAD_DIM;
use quire_kernels::ops::activation::ActivationKind;

use crate::error::EngineError;
use crate::models::config::{Fields, parse_object, unsupported};
use crate::models::labels::Labels;

/// Which family's names and positions a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// Devlin et al. 2018: positions from 0.
    Bert,
    /// Conneau et al. 2019: positions from behind the padding token's id.
    XlmRoberta,
}

/// What is computed of the last layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// Hidden states.
    None,
    /// A number for each label, of a text or a pair of texts.
    Labels,
}

/// Every encoder that is served, by the name that `config.json` has for it.
const ARCHITECTURES: [(&str, Family, Head); 4] = [
    ("BertModel", Family::Bert, Head::None),
    ("BertForSequenceClassification", Family::Bert, Head::Labels),
    ("XLMRobertaModel", Family::XlmRoberta, Head::None),
    ("XLMRobertaForSequenceClassification", Family::XlmRoberta, Head::Labels),
];

/// An encoder's sizes, every one of them within bounds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EncoderConfig {
    pub architecture: &'static str,
    pub family: Family,
    /// Of a model with a classification head.
    pub labels: Option<Labels>,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub vocab_size: usize,
    /// Rows of the table of positions.
    pub num_positions: usize,
    /// Row of the first token.
    pub first_position: usize,
    pub num_token_types: usize,
    pub layer_norm_eps: f32,
    pub activation: ActivationKind,
    pub dtype: Option<DType>,
}

/// The architecture that `config.json` names, where it is an encoder's.
pub(crate) fn encoder_architecture(json: &[u8]) -> Result<Option<&'static str>, EngineError> {
    Ok(find(json)?.map(|(name, ..)| name))
}

fn find(json: &[u8]) -> Result<Option<(&'static str, Family, Head)>, EngineError> {
    let root = parse_object("config.json", json)?;
    let fields = Fields { object: &root, prefix: "" };
    let architecture = fields.architecture()?;
    let is_meant = |name: &str| match architecture.as_str() {
        "bert" => name == "BertModel",
        "xlm-roberta" => name == "XLMRobertaModel",
        named => name == named,
    };
    Ok(ARCHITECTURES.into_iter().find(|(name, ..)| is_meant(name)))
}

impl EncoderConfig {
    /// Reads and checks `config.json`.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, EngineError> {
        let (architecture, family, head) = find(json)?.ok_or_else(|| {
            let names: Vec<&str> = ARCHITECTURES.iter().map(|(name, ..)| *name).collect();
            unsupported("architectures", format!("is no encoder; {} are served", names.join(", ")))
        })?;
        let root = parse_object("config.json", json)?;
        let fields = Fields { object: &root, prefix: "" };
        for (field, why) in [
            ("is_decoder", "an encoder that sees one way only is not served"),
            ("add_cross_attention", "is not served"),
        ] {
            if fields.flag(field, false)? {
                return Err(unsupported(field, why));
            }
        }
        match fields.string("position_embedding_type")?.unwrap_or("absolute") {
            "absolute" => {}
            other => return Err(unsupported("position_embedding_type", format!("{other} is not served, absolute is"))),
        }
        let hidden_size = fields.size("hidden_size", 1..=1 << 16)?;
        let num_heads = fields.size("num_attention_heads", 1..=1024)?;
        if !hidden_size.is_multiple_of(num_heads) || hidden_size / num_heads > MAX_HEAD_DIM {
            let why = format!("{num_heads} heads do not share {hidden_size} numbers, at most {MAX_HEAD_DIM} each");
            return Err(unsupported("num_attention_heads", why));
        }
        let num_positions = fields.size("max_position_embeddings", 1..=1 << 20)?;
        let first_position = match family {
            Family::Bert => 0,
            Family::XlmRoberta => 1 + fields.optional_size("pad_token_id", 0..=1 << 20)?.unwrap_or(1),
        };
        if first_position >= num_positions {
            return Err(unsupported("pad_token_id", format!("leaves none of {num_positions} positions")));
        }
        let layer_norm_eps = fields.number("layer_norm_eps", 1e-12)?;
        // Some files have a squared epsilon, which is 0 in f32 and harmless.
        if !(0.0..=1.0).contains(&layer_norm_eps) {
            return Err(unsupported("layer_norm_eps", format!("{layer_norm_eps} is not between 0 and 1")));
        }
        let activation = match fields.string("hidden_act")?.unwrap_or("gelu") {
            "gelu" => ActivationKind::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => ActivationKind::GeluTanh,
            "relu" => ActivationKind::Relu,
            other => return Err(unsupported("hidden_act", format!("{other} is not served; gelu, gelu_new, relu are"))),
        };
        let labels = match head {
            Head::None => None,
            Head::Labels => Some(Labels::read(&fields)?),
        };
        Ok(Self {
            architecture,
            family,
            labels,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", 1..=1 << 20)?,
            num_layers: fields.size("num_hidden_layers", 1..=1024)?,
            num_heads,
            vocab_size: fields.size("vocab_size", 1..=1 << 22)?,
            num_positions,
            first_position,
            num_token_types: fields.optional_size("type_vocab_size", 1..=1024)?.unwrap_or(2),
            layer_norm_eps: layer_norm_eps as f32,
            activation,
            dtype: fields.dtype()?,
        })
    }

    /// Most tokens of a sequence.
    pub(crate) fn max_len(&self) -> usize {
        self.num_positions - self.first_position
    }

    /// 0 of a model without a classification head.
    pub(crate) fn num_labels(&self) -> usize {
        self.labels.as_ref().map_or(0, |labels| labels.names.len())
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn base() -> Value {
        json!({
            "architectures": ["XLMRobertaForSequenceClassification"], "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160, "max_position_embeddings": 66,
            "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "id2label": {"0": "LABEL_0"},
        })
    }

    #[test]
    fn reads_the_sizes() {
        let config = EncoderConfig::parse(base().to_string().as_bytes()).unwrap();
        assert_eq!((config.max_len(), config.first_position, config.head_dim()), (64, 2, 8));
        assert_eq!(config.labels.map(|labels| labels.names), Some(vec!["LABEL_0".to_owned()]));
        let mut bare = base();
        bare["architectures"] = json!(["BertModel"]);
        let config = EncoderConfig::parse(bare.to_string().as_bytes()).unwrap();
        assert_eq!((config.max_len(), config.labels), (66, None));
    }

    #[test]
    fn refuses_what_it_would_compute_otherwise() {
        for (key, value) in [
            ("architectures", json!(["BertForMaskedLM"])),
            ("hidden_size", json!(0)),
            ("num_attention_heads", json!(5)),
            ("position_embedding_type", json!("relative_key")),
            ("is_decoder", json!(true)),
            ("hidden_act", json!("silu")),
            ("layer_norm_eps", json!(-1)),
            ("id2label", json!({"0": "a", "2": "b"})),
            ("max_position_embeddings", json!(2)),
            ("type_vocab_size", json!(0)),
            ("sentence_transformers", json!({"activation_fn": "evil.Code"})),
        ] {
            let mut config = base();
            config[key] = value.clone();
            let result = EncoderConfig::parse(config.to_string().as_bytes());
            assert!(matches!(result, Err(EngineError::Unsupported { .. })), "{key} = {value}: {result:?}");
        }
    }
}
