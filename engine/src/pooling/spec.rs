//! What sentence-transformers writes beside a model: how hidden states become one vector, and what stands before a text.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::judge::PairPrompt;
use crate::error::EngineError;
use crate::models::config::{parse_object, unsupported};
use crate::source::ModelSource;
use crate::weights::read_config;

const MODULES: &str = "modules.json";
const PROMPTS: &str = "config_sentence_transformers.json";
const LENGTHS: &str = "sentence_bert_config.json";
/// Most modules, and prompts, of a model.
const MAX_MODULES: usize = 16;
const MAX_PROMPTS: usize = 256;

/// What a model answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolingTask {
    /// A vector of a text.
    Embed,
    /// A score of a pair of texts; of a model with a classification head also that of one text.
    Score,
    /// A number for each of several labels.
    Classify,
}

impl PoolingTask {
    /// Of an encoder, or a decoder with a head, that has so many labels.
    pub(crate) fn of_labels(num_labels: usize) -> Self {
        match num_labels {
            0 => Self::Embed,
            1 => Self::Score,
            _ => Self::Classify,
        }
    }
}

/// How hidden states become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    First,
    /// The last token's.
    Last,
}

/// What callers need to know of a model that pools.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolingInfo {
    pub task: PoolingTask,
    /// Numbers of a vector; 1 of a score; as many as there are labels.
    pub num_dimensions: u32,
    /// Whether vectors have length 1.
    pub is_normalized: bool,
    /// What can stand before a text, by name.
    pub prompts: BTreeMap<String, String>,
    /// What stands before a text where a request names nothing.
    pub default_prompt: Option<String>,
    /// How pairs are put to a model that is no cross-encoder.
    pub pair_prompt: Option<PairPrompt>,
    /// Names of what a model with a classification head tells apart; empty of others.
    pub labels: Arc<[String]>,
}

/// What the files say.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spec {
    pub pooling: Pooling,
    pub normalize: bool,
    pub max_len: Option<u32>,
    pub prompts: BTreeMap<String, String>,
    pub default_prompt: Option<String>,
}

impl Spec {
    /// Whether the files describe a pipeline of sentence-transformers.
    pub(crate) fn is_described(source: &ModelSource) -> Result<bool, EngineError> {
        Ok(read_config(source, MODULES)?.is_some())
    }

    /// Of a decoder that judges or classifies: whatever else the files describe is about how another program asks it.
    pub(crate) fn bare() -> Self {
        let pooling = Pooling::Last;
        Self { pooling, normalize: false, max_len: None, prompts: BTreeMap::new(), default_prompt: None }
    }

    /// Reads the files. A model without `modules.json` gets `fallback` and vectors of length 1.
    pub(crate) fn read(source: &ModelSource, fallback: Pooling) -> Result<Self, EngineError> {
        let mut spec =
            Self { pooling: fallback, normalize: true, max_len: None, prompts: BTreeMap::new(), default_prompt: None };
        if let Some(json) = read_config(source, MODULES)? {
            spec.read_modules(source, &json)?;
        }
        if let Some(json) = read_config(source, LENGTHS)? {
            let root = parse_object(LENGTHS, &json)?;
            if root.get("do_lower_case").and_then(Value::as_bool) == Some(true) {
                return Err(refused(LENGTHS, "do_lower_case is not served: the tokenizer must do it"));
            }
            spec.max_len = root.get("max_seq_length").and_then(Value::as_u64).and_then(|len| u32::try_from(len).ok());
        }
        if let Some(json) = read_config(source, PROMPTS)? {
            spec.read_prompts(&parse_object(PROMPTS, &json)?)?;
        }
        Ok(spec)
    }

    fn read_modules(&mut self, source: &ModelSource, json: &[u8]) -> Result<(), EngineError> {
        let modules: Vec<Map<String, Value>> =
            serde_json::from_slice(json).map_err(|error| refused(MODULES, &error.to_string()))?;
        if modules.len() > MAX_MODULES {
            return Err(refused(MODULES, "has too many modules"));
        }
        self.normalize = false;
        let mut pooled = false;
        for (index, module) in modules.iter().enumerate() {
            let text = |field: &str| module.get(field).and_then(Value::as_str).unwrap_or_default();
            // A name of code, of which only the last part is a kind; nothing of it is run.
            match text("type").rsplit('.').next().unwrap_or_default() {
                "Transformer" if index == 0 && text("path").is_empty() => {}
                "Pooling" if index > 0 && !pooled => {
                    self.pooling = read_pooling(source, text("path"))?;
                    pooled = true;
                }
                "Normalize" if pooled => self.normalize = true,
                other => {
                    let kind: String = other.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
                    let why = format!("module {index}, {kind}, is not served: Transformer, Pooling and Normalize are");
                    return Err(refused(MODULES, &why));
                }
            }
        }
        if pooled { Ok(()) } else { Err(refused(MODULES, "has no pooling")) }
    }

    fn read_prompts(&mut self, root: &Map<String, Value>) -> Result<(), EngineError> {
        if let Some(prompts) = root.get("prompts").and_then(Value::as_object) {
            if prompts.len() > MAX_PROMPTS {
                return Err(refused(PROMPTS, "has too many prompts"));
            }
            let texts = prompts.iter().filter_map(|(name, text)| Some((name.clone(), text.as_str()?.to_owned())));
            self.prompts = texts.collect();
        }
        if let Some(name) = root.get("default_prompt_name").and_then(Value::as_str) {
            let text = self.prompts.get(name).ok_or_else(|| refused(PROMPTS, "default_prompt_name is not a prompt"))?;
            self.default_prompt = Some(text.clone());
        }
        Ok(())
    }
}

/// `1_Pooling/config.json`, in its older form of a flag for each kind or its newer one of a name.
fn read_pooling(source: &ModelSource, folder: &str) -> Result<Pooling, EngineError> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if folder.is_empty() || folder.len() > 64 || !folder.bytes().all(is_plain) {
        return Err(refused(MODULES, "names a folder that is not a plain one"));
    }
    let file = format!("{folder}/config.json");
    let json = read_config(source, &file)?.ok_or_else(|| refused(&file, "is missing"))?;
    let root = parse_object(&file, &json)?;
    if root.get("include_prompt").and_then(Value::as_bool) == Some(false) {
        return Err(unsupported("include_prompt", "vectors without their prompt's tokens are not served"));
    }
    let flags = root.iter().filter(|(name, value)| name.starts_with("pooling_mode_") && **value == Value::Bool(true));
    let mut named: Vec<&str> = flags.filter_map(|(name, _)| name.strip_prefix("pooling_mode_")).collect();
    named.extend(root.get("pooling_mode").and_then(Value::as_str));
    match named[..] {
        ["mean_tokens" | "mean"] => Ok(Pooling::Mean),
        ["cls_token" | "cls"] => Ok(Pooling::First),
        ["lasttoken"] => Ok(Pooling::Last),
        _ => Err(refused(&file, "must ask for one of mean, cls and lasttoken, which are served")),
    }
}

fn refused(file: &str, why: &str) -> EngineError {
    EngineError::ModelFile { file: file.to_owned(), why: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, &str)]) -> Result<Spec, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        Spec::read(&ModelSource::Directory(folder.path().to_owned()), Pooling::Mean).map_err(|error| error.to_string())
    }

    const MODULES_JSON: &str = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#;

    #[test]
    fn reads_pooling_prompts_and_length() {
        let spec = read(&[
            (MODULES, MODULES_JSON),
            ("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#),
            (LENGTHS, r#"{"max_seq_length": 256, "do_lower_case": false}"#),
            (PROMPTS, r#"{"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "query"}"#),
        ])
        .unwrap();
        assert_eq!((spec.pooling, spec.normalize, spec.max_len), (Pooling::First, false, Some(256)));
        assert_eq!((spec.prompts.len(), spec.default_prompt.as_deref()), (2, Some("find: ")));
        let named = read(&[(MODULES, MODULES_JSON), ("1_Pooling/config.json", r#"{"pooling_mode": "lasttoken"}"#)]);
        assert_eq!(named.unwrap().pooling, Pooling::Last);
        let bare = read(&[]).unwrap();
        assert_eq!((bare.pooling, bare.normalize), (Pooling::Mean, true));
    }

    #[test]
    fn what_would_be_another_vector_is_refused() {
        let dense = MODULES_JSON.replace("models.Pooling", "models.Dense");
        let climbing = MODULES_JSON.replace("1_Pooling", "../1_Pooling");
        let mean = r#"{"pooling_mode_mean_tokens": true}"#;
        for (modules, pooling) in [
            (dense.as_str(), mean),
            (&climbing, mean),
            ("{}", mean),
            ("[]", mean),
            (MODULES_JSON, r#"{"pooling_mode_max_tokens": true}"#),
            (MODULES_JSON, r#"{"pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": true}"#),
            (MODULES_JSON, r#"{"pooling_mode_mean_tokens": true, "include_prompt": false}"#),
            (MODULES_JSON, "{}"),
        ] {
            let result = read(&[(MODULES, modules), ("1_Pooling/config.json", pooling)]);
            assert!(result.is_err(), "{modules} {pooling}");
        }
        assert!(read(&[(LENGTHS, r#"{"do_lower_case": true}"#)]).is_err());
        assert!(read(&[(PROMPTS, r#"{"prompts": {}, "default_prompt_name": "query"}"#)]).is_err());
    }
}
