//! From an output format to the text that is compiled.

use std::sync::Arc;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Value, json};

use super::gbnf;
use super::rewrite::rewrite;
use super::schema::{at_fault, check_schema, parse_schema};
use super::{GrammarError, GrammarLimits, OutputFormat, StructuralTag};

/// What a grammar is compiled from. Equal sources give equal grammars.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum GrammarSource {
    JsonSchema(Value),
    Lark(String),
}

/// Rules can call each other in a chain as long as there are rules, and compiling recurses over it.
const MAX_LARK_LINES: usize = 1024;
/// Free text that ends where a structure begins.
pub(crate) const ANY_TEXT: &str = "/(.|\\n)*/";

impl GrammarSource {
    /// Fails where the format is too large, or is none.
    pub(crate) fn of(format: &OutputFormat, limits: &GrammarLimits) -> Result<Self, GrammarError> {
        Ok(match format {
            OutputFormat::JsonObject => Self::JsonSchema(json!({"type": "object"})),
            OutputFormat::JsonSchema(text) => Self::JsonSchema(parse_schema(text, limits)?),
            OutputFormat::Regex(regex) => {
                check_regex(regex, limits)?;
                if regex.is_empty() {
                    return Err(GrammarError::Invalid { why: "is empty".to_owned() });
                }
                Self::Lark(format!("start: /{}/", llguidance::regex_to_lark(regex, "")))
            }
            OutputFormat::Choice(choices) => {
                if choices.is_empty() {
                    return Err(GrammarError::Invalid { why: "must not be empty".to_owned() });
                }
                check_len(choices.iter().map(|choice| choice.len() + 1).sum(), limits)?;
                if choices.len() > limits.max_nodes {
                    return Err(GrammarError::TooLarge {
                        what: "the number of choices",
                        limit: limits.max_nodes as u64,
                    });
                }
                let choices: Vec<String> = choices.iter().map(|choice| lark_string(choice)).collect();
                Self::Lark(format!("start: {}", choices.join(" | ")))
            }
            OutputFormat::Gbnf(grammar) => {
                check_len(grammar.len(), limits)?;
                Self::Lark(gbnf::to_lark(grammar, limits)?)
            }
            OutputFormat::Lark(grammar) if gbnf::is_gbnf(grammar) => {
                return Self::of(&OutputFormat::Gbnf(Arc::clone(grammar)), limits);
            }
            OutputFormat::Lark(grammar) => {
                check_len(grammar.len(), limits)?;
                check_nesting(grammar, limits)?;
                if grammar.lines().count() > MAX_LARK_LINES {
                    return Err(GrammarError::TooLarge {
                        what: "the number of its lines",
                        limit: MAX_LARK_LINES as u64,
                    });
                }
                // Options of the compiler are not the caller's: one of them lets go of what it cannot enforce.
                for keyword in ["x-guidance", "%llguidance"] {
                    if grammar.contains(keyword) {
                        return Err(GrammarError::Unsupported { keyword: keyword.to_owned(), why: "" });
                    }
                }
                Self::Lark(grammar.to_string())
            }
            OutputFormat::StructuralTag(tag) => Self::Lark(structural_tag(tag, limits)?),
        })
    }

    /// The format as an item of a rule in a larger grammar.
    pub(crate) fn item(format: &OutputFormat, limits: &GrammarLimits) -> Result<String, GrammarError> {
        Ok(match (format, Self::of(format, limits)?) {
            (_, Self::JsonSchema(schema)) => format!("%json {}", with_options(schema)),
            (OutputFormat::Lark(_) | OutputFormat::Gbnf(_) | OutputFormat::StructuralTag(_), Self::Lark(text)) => {
                format!("%lark {{\n{text}\n}}")
            }
            (_, Self::Lark(text)) => format!("({})", text.trim_start_matches("start: ")),
        })
    }

    /// The JSON that a schema allows, likewise.
    pub(crate) fn json_item(schema: &Value, limits: &GrammarLimits) -> Result<String, GrammarError> {
        check_schema(schema, limits)?;
        Ok(format!("%json {}", with_options(rewrite(schema.clone()))))
    }

    pub(super) fn into_grammar(self) -> TopLevelGrammar {
        TopLevelGrammar::from_grammar(match self {
            Self::JsonSchema(schema) => GrammarWithLexer::from_json_schema(with_options(schema)),
            Self::Lark(text) => GrammarWithLexer::from_lark(text),
        })
    }

    /// What a refusal that names nothing of the grammar can be about, in words to be put behind it.
    pub(super) fn at_fault(&self) -> String {
        match self {
            Self::JsonSchema(schema) => at_fault(schema),
            Self::Lark(_) => String::new(),
        }
    }

    /// What equal grammars have in common.
    pub(super) fn key(&self) -> String {
        match self {
            // Keys of objects stay in the order of the request: properties are generated in it.
            Self::JsonSchema(schema) => format!("json {schema}"),
            Self::Lark(text) => format!("lark {text}"),
        }
    }
}

/// How JSON is written: as most models write it, with at most a line break and some spaces where it may have any. Small
/// models fall into endless white space otherwise.
fn with_options(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Object(fields) => Value::Object(fields),
        // `true` and `false` are schemas too; options need an object.
        boolean => json!({"allOf": [boolean]}),
    };
    schema["x-guidance"] = json!({"whitespace_pattern": "[ \\n\\t]{1,16}", "lenient": false, "coerce_one_of": false});
    schema
}

/// Fails where a regular expression is too long or too deep.
pub(super) fn check_regex(regex: &str, limits: &GrammarLimits) -> Result<(), GrammarError> {
    if regex.len() > limits.max_regex_bytes {
        return Err(GrammarError::TooLarge {
            what: "the bytes of a regular expression",
            limit: limits.max_regex_bytes as u64,
        });
    }
    check_nesting(regex, limits)
}

/// Counts brackets of all kinds, those inside strings and classes too: more than there are, never fewer.
fn check_nesting(text: &str, limits: &GrammarLimits) -> Result<(), GrammarError> {
    let mut depth: usize = 0;
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > limits.max_depth {
            return Err(GrammarError::TooLarge { what: "the nesting of its groups", limit: limits.max_depth as u64 });
        }
    }
    Ok(())
}

fn check_len(bytes: usize, limits: &GrammarLimits) -> Result<(), GrammarError> {
    if bytes > limits.max_bytes {
        return Err(GrammarError::TooLarge { what: "its bytes", limit: limits.max_bytes as u64 });
    }
    Ok(())
}

/// A text as a terminal of Lark.
pub(crate) fn lark_string(text: &str) -> String {
    // The escapes of JSON are those of Lark.
    Value::from(text).to_string()
}

fn structural_tag(tag: &StructuralTag, limits: &GrammarLimits) -> Result<String, GrammarError> {
    let invalid = |why: &str| Err(GrammarError::Invalid { why: why.to_owned() });
    if tag.structures.is_empty() || tag.triggers.is_empty() {
        return invalid("needs at least one structure and one trigger");
    }
    if tag.triggers.iter().any(String::is_empty) {
        return invalid("must not have an empty trigger");
    }
    let texts =
        tag.structures.iter().map(|structure| structure.begin.len() + structure.schema.len() + structure.end.len());
    check_len(texts.sum::<usize>() + tag.triggers.iter().map(String::len).sum::<usize>(), limits)?;
    let mut rules = String::new();
    let mut parts = Vec::new();
    for (index, trigger) in tag.triggers.iter().enumerate() {
        let mut alternatives = Vec::new();
        for structure in &tag.structures {
            let Some(rest) = structure.begin.strip_prefix(trigger.as_str()) else { continue };
            let schema = with_options(parse_schema(&structure.schema, limits)?);
            let rest = if rest.is_empty() { String::new() } else { lark_string(rest) };
            let end = if structure.end.is_empty() { String::new() } else { lark_string(&structure.end) };
            alternatives.push(format!("{rest} %json {schema} {end}"));
        }
        if alternatives.is_empty() {
            return invalid("has a trigger that no structure begins with");
        }
        rules.push_str(&format!("trigger_{index}[lazy]: ANY_TEXT {}\n", lark_string(trigger)));
        rules.push_str(&format!("tag_{index}: trigger_{index} ({})\n", alternatives.join(" | ")));
        parts.push(format!("tag_{index}"));
    }
    let has_trigger = |begin: &str| tag.triggers.iter().any(|trigger| begin.starts_with(trigger.as_str()));
    if tag.structures.iter().any(|structure| !has_trigger(&structure.begin)) {
        return invalid("has a structure that begins with none of the triggers");
    }
    Ok(format!("start: ({})* rest\nrest: ANY_TEXT\nANY_TEXT: {ANY_TEXT}\n{rules}", parts.join(" | ")))
}
