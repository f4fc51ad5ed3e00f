//! Fill-in-the-middle: a prompt of what stands before a gap and behind it, written with the model's own tokens.
//!
//! Which tokens those are is found in the vocabulary: each family of code models has its own. The texts between them are
//! plain text, whatever they spell.

use crate::tokenizer::{EncodeError, TextTokenizer};

/// What stands around a gap.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FimInput {
    pub prefix: String,
    pub suffix: String,
    /// What the gap begins with.
    pub middle: String,
    /// Other files of the project.
    pub files: Vec<FimFile>,
    /// The field to blame where the model cannot do it.
    pub param: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct FimFile {
    pub name: String,
    pub text: String,
}

impl FimInput {
    /// Bytes of all its texts.
    pub fn num_bytes(&self) -> usize {
        let files = self.files.iter().map(|file| file.name.len() + file.text.len());
        self.prefix.len() + self.suffix.len() + self.middle.len() + files.sum::<usize>()
    }
}

/// How a family of models spells a gap.
struct Family {
    prefix: &'static str,
    suffix: &'static str,
    /// Without one the suffix comes first and the prefix last, so that the gap follows it.
    middle: Option<&'static str>,
    /// Before the project's name, and before each file's.
    repo: Option<&'static str>,
    file: Option<&'static str>,
    /// What can come where the middle ends, beside the model's end of sequence.
    ends: &'static [&'static str],
}

const FAMILIES: [Family; 6] = [
    // Qwen-Coder, CodeGemma.
    Family {
        prefix: "<|fim_prefix|>",
        suffix: "<|fim_suffix|>",
        middle: Some("<|fim_middle|>"),
        repo: Some("<|repo_name|>"),
        file: Some("<|file_sep|>"),
        ends: &["<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"],
    },
    // StarCoder, Granite.
    Family {
        prefix: "<fim_prefix>",
        suffix: "<fim_suffix>",
        middle: Some("<fim_middle>"),
        repo: Some("<repo_name>"),
        file: Some("<file_sep>"),
        ends: &["<|endoftext|>", "<fim_pad>", "<repo_name>", "<file_sep>"],
    },
    // SantaCoder.
    Family {
        prefix: "<fim-prefix>",
        suffix: "<fim-suffix>",
        middle: Some("<fim-middle>"),
        repo: None,
        file: None,
        ends: &["<|endoftext|>", "<fim-pad>"],
    },
    // CodeLlama.
    Family {
        prefix: "▁<PRE>", suffix: "▁<SUF>", middle: Some("▁<MID>"), repo: None, file: None, ends: &["▁<EOT>"]
    },
    // DeepSeek-Coder.
    Family {
        prefix: "<｜fim▁begin｜>",
        suffix: "<｜fim▁hole｜>",
        middle: Some("<｜fim▁end｜>"),
        repo: None,
        file: None,
        ends: &["<|EOT|>", "<｜end▁of▁sentence｜>"],
    },
    // Codestral.
    Family { prefix: "[PREFIX]", suffix: "[SUFFIX]", middle: None, repo: None, file: None, ends: &[] },
];

/// A model's tokens around a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FimTokens {
    prefix: u32,
    suffix: u32,
    middle: Option<u32>,
    repo: Option<u32>,
    file: Option<u32>,
    ends: Vec<u32>,
}

impl FimTokens {
    /// Those of the first family that the vocabulary has, all of them below `vocab_size`.
    pub fn find(tokenizer: &TextTokenizer, vocab_size: u32) -> Option<Self> {
        let id = |token: &str| tokenizer.token_id(token).filter(|id| *id < vocab_size);
        FAMILIES.iter().find_map(|family| {
            let middle = match family.middle {
                None => None,
                Some(token) => Some(id(token)?),
            };
            Some(Self {
                prefix: id(family.prefix)?,
                suffix: id(family.suffix)?,
                middle,
                repo: family.repo.and_then(id),
                file: family.file.and_then(id),
                ends: family.ends.iter().filter_map(|token| id(token)).collect(),
            })
        })
    }

    /// Tokens that end the middle, beside the model's own end of sequence.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The prompt's tokens. Fails where a text cannot be encoded, or spells one of the tokens that mean something here.
    pub fn encode(&self, input: &FimInput, tokenizer: &TextTokenizer) -> Result<Vec<u32>, EncodeError> {
        let mut ids = tokenizer.prefix().to_vec();
        if !input.files.is_empty() {
            if let Some(repo) = self.repo {
                ids.push(repo);
                self.text("project\n", tokenizer, &mut ids)?;
            }
            for file in &input.files {
                match self.file {
                    Some(token) => {
                        ids.push(token);
                        self.text(&format!("{}\n{}", file.name, file.text), tokenizer, &mut ids)?;
                    }
                    None => self.text(&format!("{}\n{}\n\n", file.name, file.text), tokenizer, &mut ids)?,
                }
            }
            if let Some(token) = self.file {
                ids.push(token);
                self.text("file\n", tokenizer, &mut ids)?;
            }
        }
        match self.middle {
            Some(middle) => {
                ids.push(self.prefix);
                self.text(&input.prefix, tokenizer, &mut ids)?;
                ids.push(self.suffix);
                self.text(&input.suffix, tokenizer, &mut ids)?;
                ids.push(middle);
            }
            None => {
                ids.push(self.suffix);
                self.text(&input.suffix, tokenizer, &mut ids)?;
                ids.push(self.prefix);
                self.text(&input.prefix, tokenizer, &mut ids)?;
            }
        }
        self.text(&input.middle, tokenizer, &mut ids)?;
        Ok(ids)
    }

    fn text(&self, text: &str, tokenizer: &TextTokenizer, ids: &mut Vec<u32>) -> Result<(), EncodeError> {
        let from = ids.len();
        tokenizer.encode_behind_special(text, ids)?;
        // Some vocabularies have these tokens as words like any other.
        if ids[from..].iter().any(|id| self.means_something(*id)) {
            return Err(EncodeError::SpellsSpecialToken);
        }
        Ok(())
    }

    fn means_something(&self, id: u32) -> bool {
        let own = [Some(self.prefix), Some(self.suffix), self.middle, self.repo, self.file];
        own.contains(&Some(id)) || self.ends.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The demo model's tokenizer with these tokens in the place of its own.
    fn tokenizer(tokens: &[&str]) -> (TextTokenizer, u32) {
        let json = crate::demo::MODEL.files.iter().find(|(name, _)| *name == "tokenizer.json").expect("has one").1;
        let json = std::str::from_utf8(json).expect("UTF-8").replace("<|fim_", "<|other_");
        let mut file: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        let first = file["model"]["vocab"].as_object().expect("a vocabulary").len() as u64;
        let added = file["added_tokens"].as_array_mut().expect("a list");
        let first = added.iter().filter_map(|token| token["id"].as_u64()).max().map_or(first, |id| first.max(id + 1));
        for (at, token) in tokens.iter().enumerate() {
            added.push(
                serde_json::json!({"id": first + at as u64, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": at % 2 == 0}),
            );
        }
        let json = serde_json::to_vec(&file).expect("JSON");
        let vocab_size = first as u32 + tokens.len() as u32;
        (TextTokenizer::load(&json, vocab_size).expect("loads"), vocab_size)
    }

    #[test]
    fn every_family_is_found_and_written_in_its_order() {
        for family in &FAMILIES {
            let mut tokens = vec![family.prefix, family.suffix];
            tokens.extend(family.middle);
            let (tokenizer, vocab_size) = tokenizer(&tokens);
            let fim = FimTokens::find(&tokenizer, vocab_size).expect(family.prefix);
            let input = FimInput { prefix: "one".into(), suffix: "two".into(), ..FimInput::default() };
            let ids = fim.encode(&input, &tokenizer).expect("encodes");
            let at = |id: u32| ids.iter().position(|other| *other == id).expect("is there");
            match fim.middle {
                Some(middle) => {
                    assert!(at(fim.prefix) < at(fim.suffix) && at(fim.suffix) < at(middle));
                    assert_eq!(ids.last(), Some(&middle));
                }
                None => assert!(at(fim.suffix) < at(fim.prefix)),
            }
            // A model without the rows for them has none.
            assert_eq!(FimTokens::find(&tokenizer, vocab_size - 1), None);
        }
    }

    #[test]
    fn a_vocabulary_without_them_has_none() {
        let (tokenizer, vocab_size) = tokenizer(&["<|fim_prefix|>"]);
        assert_eq!(FimTokens::find(&tokenizer, vocab_size), None);
    }

    #[test]
    fn users_cannot_write_the_tokens_and_other_files_come_first() {
        let names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"];
        let (tokenizer, vocab_size) = tokenizer(&names);
        let fim = FimTokens::find(&tokenizer, vocab_size).expect("has them");
        for name in names {
            let input = FimInput { prefix: format!("a {name} b"), ..FimInput::default() };
            if let Ok(ids) = fim.encode(&input, &tokenizer) {
                let marks = ids.iter().filter(|id| fim.means_something(**id)).count();
                assert_eq!(marks, 3, "{name} became one of the tokens");
            }
        }
        let file = FimFile { name: "a.rs".into(), text: "fn a() {}".into() };
        let input = FimInput { prefix: "one".into(), files: vec![file], ..FimInput::default() };
        let ids = fim.encode(&input, &tokenizer).expect("encodes");
        let files = ids.iter().filter(|id| Some(**id) == fim.file).count();
        let begin = ids.iter().position(|id| *id == fim.prefix).expect("is there");
        assert_eq!(files, 2);
        assert!(ids[begin..].iter().all(|id| Some(*id) != fim.file));
    }
}
