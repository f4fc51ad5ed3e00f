//! Rerankers that are decoders: the model reads a question and a document and is asked for "yes" or "no"; how likely it says
//! "yes" rather than "no" is the score (Qwen3-Reranker, Zhang et al. 2025).
//!
//! Their `config.json` is that of the chat model which they were made of. What tells them apart is the template that they were
//! trained with in their tokenizer's files, or `classifier_from_token` in `config.json`, the name that vLLM gave it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::error::EngineError;
use crate::models::config::{Fields, parse_object, unsupported};
use crate::models::labels::Labels;
use crate::source::ModelSource;
use crate::weights::{read_bounded, read_config};

/// In `config.json`: the two answers, the one for a low score first.
const ANSWERS: &str = "classifier_from_token";
const QWEN3_ANSWERS: [&str; 2] = ["no", "yes"];
/// In a chat template: what Qwen3's rerankers are told.
const QWEN3_TASK: &str = "Judge whether the Document meets the requirements";
const TEMPLATES: [&str; 3] = ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"];
/// Vocabularies of some hundred thousand tokens with their merges take some ten MiB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// How a pair of texts is put to a model that judges them. `head` and `tail` hold special tokens, the texts none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairPrompt {
    pub head: &'static str,
    /// Between `head` and the first text.
    pub lead: &'static str,
    /// Between the texts.
    pub between: &'static str,
    pub tail: &'static str,
}

const QWEN3_PROMPT: PairPrompt = PairPrompt {
    head: "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct \
           provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n",
    lead: "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: ",
    between: "\n<Document>: ",
    tail: "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
};

/// A model that judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judge {
    /// Tokens of "no" and "yes".
    pub answers: [u32; 2],
    pub prompt: PairPrompt,
}

/// The labels of a decoder with a classification head, by its `config.json`.
pub(super) fn decoder_labels(source: &ModelSource) -> Result<Option<Labels>, EngineError> {
    let Some(json) = read_config(source, "config.json")? else { return Ok(None) };
    let root = parse_object("config.json", &json)?;
    let fields = Fields { object: &root, prefix: "" };
    // Files without an architecture are none of a decoder.
    let named = fields.get("architectures").is_some() && fields.architecture()?.ends_with("ForSequenceClassification");
    (named && fields.get(ANSWERS).is_none()).then(|| Labels::read(&fields)).transpose()
}

/// Whether a model's files say that it judges.
pub(crate) fn judges(source: &ModelSource) -> Result<bool, EngineError> {
    if let Some(json) = read_config(source, "config.json")?
        && let Some(answers) = parse_object("config.json", &json)?.get(ANSWERS)
    {
        let named: Vec<&str> = answers.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if named != QWEN3_ANSWERS {
            return Err(unsupported(ANSWERS, "must be [\"no\", \"yes\"], which is served"));
        }
        return Ok(true);
    }
    // One that was given a head answers with it.
    Ok(is_told_to_judge(source)? && decoder_labels(source)?.is_none())
}

/// How pairs are put to a decoder with a head, which was made of one that judges.
pub(super) fn pair_prompt(source: &ModelSource) -> Result<Option<PairPrompt>, EngineError> {
    Ok(is_told_to_judge(source)?.then_some(QWEN3_PROMPT))
}

fn is_told_to_judge(source: &ModelSource) -> Result<bool, EngineError> {
    for name in TEMPLATES {
        if let Some(text) = read_config(source, name)?
            && text.windows(QWEN3_TASK.len()).any(|part| part == QWEN3_TASK.as_bytes())
        {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Judge {
    /// `None` of a model that does not judge.
    pub(crate) fn read(source: &ModelSource) -> Result<Option<Self>, EngineError> {
        if !judges(source)? {
            return Ok(None);
        }
        /// Nothing else of the file is kept.
        #[derive(Deserialize)]
        struct Tokenizer {
            model: Vocabulary,
        }
        #[derive(Deserialize)]
        struct Vocabulary {
            vocab: BTreeMap<String, u32>,
        }
        let refuse = |why: &str| EngineError::ModelFile { file: "tokenizer.json".to_owned(), why: why.to_owned() };
        let json = read_bounded(source, "tokenizer.json", MAX_TOKENIZER_BYTES)?.ok_or_else(|| refuse("is missing"))?;
        let Tokenizer { model: Vocabulary { vocab } } =
            serde_json::from_slice(&json).map_err(|_| refuse("has no vocabulary of byte pairs"))?;
        let [Some(no), Some(yes)] = QWEN3_ANSWERS.map(|answer| vocab.get(answer).copied()) else {
            return Err(refuse("has no tokens \"no\" and \"yes\", which a reranker answers with"));
        };
        Ok(Some(Self { answers: [no, yes], prompt: QWEN3_PROMPT }))
    }

    /// How likely "yes" is, of both answers alone.
    pub(crate) fn score(no: f32, yes: f32) -> f32 {
        (1.0 / (1.0 + (f64::from(no) - f64::from(yes)).exp())) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(files: &[(&str, &str)]) -> Result<Option<Judge>, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        Judge::read(&ModelSource::Directory(folder.path().to_owned())).map_err(|error| error.to_string())
    }

    const VOCABULARY: (&str, &str) = ("tokenizer.json", r#"{"model": {"vocab": {"no": 4, "yes": 9, "x": 1}}}"#);

    #[test]
    fn files_say_who_judges_and_with_which_tokens() {
        let told = ("config.json", r#"{"classifier_from_token": ["no", "yes"]}"#);
        let template = ("chat_template.jinja", "{{ 'Judge whether the Document meets the requirements' }}");
        for by in [told, template] {
            assert_eq!(files(&[by, VOCABULARY]).unwrap().map(|judge| judge.answers), Some([4, 9]));
        }
        assert_eq!(files(&[("config.json", "{}"), VOCABULARY]), Ok(None));
        let with_head = ("config.json", r#"{"architectures": ["Qwen3ForSequenceClassification"]}"#);
        assert_eq!(files(&[with_head, template, VOCABULARY]), Ok(None));
        for wrong in [
            &[("config.json", r#"{"classifier_from_token": ["0", "1"]}"#), VOCABULARY][..],
            &[("config.json", r#"{"classifier_from_token": "yes"}"#), VOCABULARY],
            &[told],
            &[told, ("tokenizer.json", r#"{"model": {"vocab": {"no": 4}}}"#)],
            &[told, ("tokenizer.json", r#"{"model": {"vocab": [["no", -1.5]]}}"#)],
        ] {
            assert!(files(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_score_is_the_share_of_yes() {
        assert_eq!(Judge::score(2.5, 2.5), 0.5);
        assert_eq!((Judge::score(-1000.0, 1000.0), Judge::score(1000.0, -1000.0)), (1.0, 0.0));
        assert!((Judge::score(0.0, 1.0) - 0.731_058_6).abs() < 1e-6);
    }
}
