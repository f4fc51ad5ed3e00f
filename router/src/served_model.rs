//! The text side of the served model: its tokenizer, its chat template and its default parameters.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use quire_engine::{ModelInfo, ModelSource};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::chat_template::ChatTemplate;
use crate::detokenizer::TokenTable;
use crate::dialect::{Dialects, ReasoningParserChoice, ToolParserChoice};
use crate::fim::FimTokens;
use crate::generation::Limits;
use crate::gguf;
use crate::grammar::{GrammarLimits, Grammars, Vocabulary};
use crate::tokenizer::TextTokenizer;

/// What a tokenizer is made of, and a conversation's prompt.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// A model's text files cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {why}")]
pub struct LoadError {
    pub file: &'static str,
    pub why: String,
}

/// What `generation_config.json` recommends. A request's own values come first.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct GenerationDefaults {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub typical_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
}

/// The text side of the served model.
pub struct ServedModel {
    name: String,
    info: ModelInfo,
    created: u64,
    fingerprint: String,
    tokenizer: Arc<TextTokenizer>,
    chat_template: Option<Arc<ChatTemplate>>,
    fim: Option<Arc<FimTokens>>,
    defaults: GenerationDefaults,
    source: ModelSource,
    grammars: Arc<Grammars>,
    dialects: Dialects,
}

/// A model's text side, read: what can be had before the engine's side is known.
pub struct TextSide {
    tokenizer: TextTokenizer,
    chat_template: Option<ChatTemplate>,
    defaults: GenerationDefaults,
    source: ModelSource,
    grammar_limits: GrammarLimits,
}

impl TextSide {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` or `.json`, and `generation_config.json`, or
    /// what a GGUF file has in their place. `limits` are the operator's for chat templates.
    pub fn load(source: &ModelSource, limits: &Limits) -> Result<Self, LoadError> {
        let (tokenizer, chat_template) = match source {
            ModelSource::Gguf(path) => {
                let metadata = quire_engine::gguf::read_metadata(path)
                    .map_err(|cause| LoadError { file: "GGUF file", why: cause.to_string() })?;
                let tokenizer = TextTokenizer::load(&gguf::tokenizer_json(&metadata)?, 0).map_err(|error| {
                    LoadError { file: "GGUF metadata", why: format!("the tokenizer: {}", error.why) }
                })?;
                (tokenizer, gguf::chat_template(&metadata, limits)?)
            }
            ModelSource::Directory(_) | ModelSource::Embedded(_) => {
                let file = "tokenizer.json";
                let tokenizer = source
                    .read(file)
                    .map_err(|cause| LoadError { file, why: cause.to_string() })?
                    .ok_or_else(|| LoadError { file, why: "the model has no such file".into() })?;
                (TextTokenizer::load(&tokenizer, 0)?, ChatTemplate::load(source, limits)?)
            }
        };
        let grammar_limits = limits.grammar.clone();
        let (defaults, source) = (read_defaults(source)?, source.clone());
        Ok(Self { tokenizer, chat_template, defaults, source, grammar_limits })
    }
}

impl TextSide {
    /// Tokens of the vocabulary.
    pub(crate) fn num_tokens(&self) -> u32 {
        u32::try_from(self.tokenizer.table().len()).unwrap_or(u32::MAX)
    }

    /// The token whose text this is.
    pub(crate) fn token_id(&self, text: &str) -> Option<u32> {
        let table = self.tokenizer.table();
        (0..self.num_tokens()).find(|id| *table.bytes(*id) == *text.as_bytes())
    }
}

impl ServedModel {
    /// Reads the text files of a model whose engine's side is `info`.
    pub fn load(source: &ModelSource, name: String, info: &ModelInfo) -> Result<Self, LoadError> {
        Ok(Self::new(TextSide::load(source, &Limits::default())?, name, info))
    }

    /// Both sides of a model.
    pub fn new(text: TextSide, name: String, info: &ModelInfo) -> Self {
        let TextSide { mut tokenizer, chat_template, defaults, source, grammar_limits } = text;
        tokenizer.cover(info.vocab_size);
        let parser_limits = grammar_limits.parser_limits();
        let vocabulary = Vocabulary::new(tokenizer.table(), info.vocab_size, &info.eos_token_ids, parser_limits);
        let grammars = Arc::new(Grammars::new(vocabulary.map(Arc::new), grammar_limits));
        let digest: String = info.digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        Self {
            name,
            info: info.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            fingerprint: format!("quire-{}-{digest}", env!("CARGO_PKG_VERSION")),
            fim: FimTokens::find(&tokenizer, info.vocab_size).map(Arc::new),
            tokenizer: Arc::new(tokenizer),
            dialects: Dialects::detect(
                chat_template.as_ref().map_or("", ChatTemplate::source),
                ToolParserChoice::Auto,
                ReasoningParserChoice::Auto,
            ),
            chat_template: chat_template.map(Arc::new),
            defaults,
            source,
            grammars,
        }
    }

    /// With what an operator knows of how the model writes tool calls and reasoning.
    #[must_use]
    pub fn speaking(mut self, tools: ToolParserChoice, reasoning: ReasoningParserChoice) -> Self {
        let template = self.chat_template.as_ref().map_or("", |template| template.source());
        self.dialects = Dialects::detect(template, tools, reasoning);
        self
    }

    /// How it writes tool calls and reasoning.
    pub fn dialects(&self) -> &Dialects {
        &self.dialects
    }

    /// The name clients ask for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The engine's side of the model.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// When it was loaded, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// Same fingerprint, same parameters and seed: same answer, on one kind of device.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub fn tokenizer(&self) -> &Arc<TextTokenizer> {
        &self.tokenizer
    }

    /// Bytes of every token.
    pub fn table(&self) -> &Arc<TokenTable> {
        self.tokenizer.table()
    }

    /// `None` where the model is not made for conversations.
    pub fn chat_template(&self) -> Option<&Arc<ChatTemplate>> {
        self.chat_template.as_ref()
    }

    /// How the model's vocabulary writes a gap between two texts.
    pub fn fim(&self) -> Option<&FimTokens> {
        self.fim.as_deref()
    }

    pub(crate) fn fim_tokens(&self) -> Option<&Arc<FimTokens>> {
        self.fim.as_ref()
    }

    /// The files that another program needs to tokenize like this one, by name. Reads them: for a thread that may wait.
    pub fn tokenizer_files(&self) -> std::io::Result<Vec<(&'static str, Vec<u8>)>> {
        if let ModelSource::Gguf(path) = &self.source {
            let metadata = quire_engine::gguf::read_metadata(path).map_err(std::io::Error::other)?;
            let json = gguf::tokenizer_json(&metadata).map_err(std::io::Error::other)?;
            return Ok(vec![("tokenizer.json", json)]);
        }
        let mut files = Vec::new();
        for name in TOKENIZER_FILES {
            if let Some(bytes) = self.source.read(name)? {
                files.push((name, bytes.into_owned()));
            }
        }
        Ok(files)
    }

    /// `tokenizer_config.json`, where there is one, with the chat template that is used. Reads a file: for a thread that may
    /// wait.
    pub fn tokenizer_config(&self) -> std::io::Result<Map<String, Value>> {
        let bytes = match &self.source {
            ModelSource::Gguf(_) => None,
            source => source.read("tokenizer_config.json")?,
        };
        let mut config = match bytes {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(std::io::Error::other)?,
            None => Map::new(),
        };
        config.entry("tokenizer_class").or_insert_with(|| "PreTrainedTokenizerFast".into());
        config.insert("chat_template".to_owned(), self.chat_template().map(|template| template.source()).into());
        Ok(config)
    }

    /// Compiles grammars over its tokens.
    pub fn grammars(&self) -> &Arc<Grammars> {
        &self.grammars
    }

    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }
}

fn read_defaults(source: &ModelSource) -> Result<GenerationDefaults, LoadError> {
    let file = "generation_config.json";
    let error = |why: String| LoadError { file, why };
    let Some(bytes) = source.read(file).map_err(|cause| error(cause.to_string()))? else {
        return Ok(GenerationDefaults::default());
    };
    let defaults: GenerationDefaults = serde_json::from_slice(&bytes).map_err(|cause| error(cause.to_string()))?;
    defaults.check().map_err(error)?;
    Ok(defaults)
}
