//! The text side of a GGUF file: its tokenizer in the form of `tokenizer.json`, its chat template, its name.
//!
//! One loader serves both forms ([`crate::tokenizer::TextTokenizer`]), so that special tokens and text from users are
//! treated alike. What the metadata does not say clearly is refused: a tokenizer that is nearly right answers wrongly.

mod patterns;

use std::collections::HashMap;
use std::path::Path;

use quire_engine::gguf::{GgufError, Metadata, Scalar, stem};
use serde_json::{Map, Value, json};

use crate::chat_template::ChatTemplate;
use crate::generation::Limits;
use crate::served_model::LoadError;

const FILE: &str = "GGUF metadata";
const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
/// Longest token that is taken apart for its merges, which takes its length squared.
const MAX_TOKEN_BYTES: usize = 1024;
/// Stands for a space in SentencePiece's vocabularies.
const SPACE: &str = "▁";

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The tokens of a file, by id.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<TokenType>,
}

/// A name for the model: `general.name`, or else that of its file, in letters that a name may have.
pub fn model_name(metadata: &Metadata, path: &Path) -> String {
    let plain = |name: &str| {
        let allowed = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let name: String = name.trim().chars().map(allowed).take(128).collect();
        Some(name.trim_matches(['-', '.']).to_owned()).filter(|name| !name.is_empty())
    };
    let own = metadata.text("general.name").ok().flatten().and_then(plain);
    own.or_else(|| plain(&stem(path))).unwrap_or_else(|| "model".to_owned())
}

/// The file's chat template; `None` where it has none.
pub fn chat_template(metadata: &Metadata, limits: &Limits) -> Result<Option<ChatTemplate>, LoadError> {
    let Some(template) = metadata.text(CHAT_TEMPLATE).map_err(refused)? else { return Ok(None) };
    let vocabulary = Vocabulary::read(metadata)?;
    let mut special_tokens = Vec::new();
    for (name, key) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        if let Some((_, text)) = vocabulary.named(metadata, key)? {
            special_tokens.push((name, text.to_owned()));
        }
    }
    ChatTemplate::compile(template, special_tokens, limits).map(Some).map_err(error)
}

/// The tokenizer as `tokenizer.json` has it.
pub fn tokenizer_json(metadata: &Metadata) -> Result<Vec<u8>, LoadError> {
    let vocabulary = Vocabulary::read(metadata)?;
    let parts = match metadata.text(MODEL).map_err(refused)? {
        Some("gpt2") => byte_level(metadata, &vocabulary)?,
        Some("llama") => sentence_piece(metadata, &vocabulary)?,
        Some(other) => {
            return Err(error(format!("{MODEL} {} is not served; gpt2 and llama are", short(other))));
        }
        None => return Err(error(format!("{MODEL} is missing: the file has no tokenizer"))),
    };
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(metadata, &vocabulary, parts.adds_bos)?,
        "decoder": parts.decoder,
        "model": parts.model,
    });
    Ok(json.to_string().into_bytes())
}

/// What differs between kinds of tokenizers.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Where the file does not say.
    adds_bos: bool,
}

/// Byte-level BPE (GPT-2 and what followed it).
fn byte_level(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Parts, LoadError> {
    let pre = patterns::find(metadata.text("tokenizer.ggml.pre").map_err(refused)?).map_err(error)?;
    let merges = metadata.texts(MERGES).map_err(refused)?;
    let merges = merges.ok_or_else(|| error(format!("{MERGES} is missing")))?;
    // The first token may itself start with a space.
    let pair = |merge: &&str| {
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at)?;
        Some(json!([&merge[..at], &merge[at + 1..]]))
    };
    let merges: Option<Vec<Value>> = merges.iter().map(pair).collect();
    let merges = merges.ok_or_else(|| error(format!("{MERGES} has an entry that is not two tokens")))?;
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let mut steps: Vec<Value> = pre.patterns.iter().map(split).collect();
    steps.push(byte_level.clone());
    Ok(Parts {
        normalizer: if pre.composes { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
        decoder: byte_level,
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.takes_whole_words, "vocab": vocabulary.ids()?, "merges": merges,
        }),
        adds_bos: pre.adds_bos,
    })
}

/// BPE of SentencePiece (Kudo and Richardson 2018): the pair whose token has the best score is merged first, so merges
/// follow from the scores.
fn sentence_piece(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Parts, LoadError> {
    let scores = metadata.scalars(SCORES).map_err(refused)?;
    let scores = scores.ok_or_else(|| error(format!("{SCORES} is missing")))?;
    let score = |scalar: &Scalar| match scalar {
        Scalar::Float(score) if !score.is_nan() => Some(*score),
        _ => None,
    };
    let scores: Option<Vec<f64>> = scores.iter().map(score).collect();
    let scores = scores.filter(|scores| scores.len() == vocabulary.tokens.len());
    let scores = scores.ok_or_else(|| error(format!("{SCORES} is not a number for each token")))?;

    let ids = vocabulary.ids()?;
    let (unknown, _) = vocabulary.named(metadata, "unknown")?.unzip();
    let unknown = unknown.unwrap_or(0) as usize;
    let has_bytes = vocabulary.types.contains(&TokenType::Byte);
    let merges: Vec<Value> =
        merges(vocabulary, &scores)?.into_iter().map(|(left, right)| json!([left, right])).collect();

    let adds_space = metadata.flag("tokenizer.ggml.add_space_prefix").map_err(refused)?.unwrap_or(true);
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if adds_space {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE}));
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": vocabulary.tokens[unknown],
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": has_bytes, "ignore_merges": false, "vocab": ids, "merges": merges,
        }),
        adds_bos: true,
    })
}

/// Every pair of tokens that makes a token, best first; pairs that make the same one by their own ids.
fn merges<'a>(vocabulary: &Vocabulary<'a>, scores: &[f64]) -> Result<Vec<(&'a str, &'a str)>, LoadError> {
    let normal = |id: &usize| vocabulary.types[*id] == TokenType::Normal;
    let by_text: HashMap<&str, usize> =
        (0..vocabulary.tokens.len()).filter(normal).map(|id| (vocabulary.tokens[id], id)).collect();
    let mut merges = Vec::new();
    for id in (0..vocabulary.tokens.len()).filter(normal) {
        let token = vocabulary.tokens[id];
        if token.len() > MAX_TOKEN_BYTES {
            return Err(error(format!("token {id} has {} bytes, more than {MAX_TOKEN_BYTES}", token.len())));
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (by_text.get(left), by_text.get(right)) {
                merges.push((id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
    Ok(merges.into_iter().map(|(_, left, right)| (vocabulary.tokens[left], vocabulary.tokens[right])).collect())
}

/// What is put around a text: BOS and EOS, where the file asks for them.
fn post_processor(metadata: &Metadata, vocabulary: &Vocabulary<'_>, adds_bos: bool) -> Result<Value, LoadError> {
    let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
    let mut special_tokens = Map::new();
    for (name, default) in [("bos", adds_bos), ("eos", false)] {
        let asked = metadata.flag(&format!("tokenizer.ggml.add_{name}_token")).map_err(refused)?;
        if !asked.unwrap_or(default) {
            continue;
        }
        let Some((id, text)) = vocabulary.named(metadata, name)? else {
            if asked.is_some() {
                return Err(error(format!("tokenizer.ggml.add_{name}_token asks for a token that no key names")));
            }
            continue;
        };
        let token = json!({"SpecialToken": {"id": text, "type_id": 0}});
        single.insert(if name == "bos" { 0 } else { single.len() }, token);
        special_tokens.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    if special_tokens.is_empty() {
        return Ok(Value::Null);
    }
    let pair = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
    Ok(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special_tokens}))
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, LoadError> {
        let tokens = metadata.texts(TOKENS).map_err(refused)?.unwrap_or_default();
        if tokens.is_empty() {
            return Err(error(format!("{TOKENS} is missing: the file has no tokenizer")));
        }
        let types = match metadata.scalars(TYPES).map_err(refused)? {
            None => vec![TokenType::Normal; tokens.len()],
            Some(numbers) => {
                let types: Option<Vec<TokenType>> = numbers.iter().map(token_type).collect();
                let types = types.filter(|types| types.len() == tokens.len());
                types.ok_or_else(|| error(format!("{TYPES} is not a type from 0 to 6 for each token")))?
            }
        };
        let is_byte = |token: &str| {
            let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
        };
        let bad = (0..tokens.len()).find(|id| types[*id] == TokenType::Byte && !is_byte(tokens[*id]));
        if let Some(id) = bad {
            return Err(error(format!("token {id} is said to be a byte and is {}", short(tokens[id]))));
        }
        Ok(Self { tokens, types })
    }

    /// Ids by text, without tokens that only fill up the vocabulary.
    fn ids(&self) -> Result<Map<String, Value>, LoadError> {
        let mut ids = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if self.types[id] != TokenType::Unused && ids.insert((*token).to_owned(), id.into()).is_some() {
                return Err(error(format!("token {id} is {}, as an earlier one is", short(token))));
            }
        }
        Ok(ids)
    }

    /// The token that `tokenizer.ggml.{name}_token_id` names.
    fn named(&self, metadata: &Metadata, name: &str) -> Result<Option<(u32, &'a str)>, LoadError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = metadata.id(&key).map_err(refused)? else { return Ok(None) };
        match self.tokens.get(id as usize) {
            Some(token) if self.types[id as usize] != TokenType::Unused => Ok(Some((id, token))),
            _ => Err(error(format!("{key} is {id}, which is no token"))),
        }
    }

    /// Tokens that are found in text as they are, before anything else.
    fn added_tokens(&self) -> Vec<Value> {
        let added = |(id, token): (usize, &&str)| {
            let special = match self.types[id] {
                TokenType::Control | TokenType::Unknown => true,
                TokenType::UserDefined => false,
                TokenType::Normal | TokenType::Unused | TokenType::Byte => return None,
            };
            Some(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }))
        };
        self.tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()).filter_map(added).collect()
    }
}

fn token_type(scalar: &Scalar) -> Option<TokenType> {
    match scalar {
        Scalar::Unsigned(0 | 1) => Some(TokenType::Normal),
        Scalar::Unsigned(2) => Some(TokenType::Unknown),
        Scalar::Unsigned(3) => Some(TokenType::Control),
        Scalar::Unsigned(4) => Some(TokenType::UserDefined),
        Scalar::Unsigned(5) => Some(TokenType::Unused),
        Scalar::Unsigned(6) => Some(TokenType::Byte),
        _ => None,
    }
}

fn error(why: String) -> LoadError {
    LoadError { file: FILE, why }
}

fn refused(cause: GgufError) -> LoadError {
    error(cause.to_string())
}

/// A text from the file as it may stand in a message.
fn short(text: &str) -> String {
    let cut: String = text.chars().take(40).collect();
    format!("{cut:?}{}", if cut.len() < text.len() { "..." } else { "" })
}

#[cfg(test)]
mod tests;
