//! Grammars of answers that must be calls: each call in the dialect's own syntax, its arguments by the tool's schema; and of
//! answers that must have a form behind the model's reasoning.

use serde_json::{Value, json};

use super::{Dialects, ReasoningDialect, ToolDialect, deepseek, harmony, hermes, mistral, qwen_xml, reasoning};
use crate::detokenizer::TokenTable;
use crate::generation::Tool;
use crate::grammar::{ANY_TEXT, GrammarError, GrammarLimits, GrammarSource, OutputFormat, lark_string};

/// Calls that an answer may, or must, consist of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallRules<'t> {
    pub(crate) tools: &'t [Tool],
    /// Whether there may be several.
    pub(crate) parallel: bool,
}

/// Whether the model reasons before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thinking {
    No,
    /// It may open a thought.
    Optional,
    /// The prompt opened one.
    Open,
}

/// The grammar of an answer that is calls, or has a form, or is either where both are given; reasoning may come before.
pub(crate) fn enforced(
    dialects: &Dialects,
    calls: Option<CallRules<'_>>,
    format: Option<&OutputFormat>,
    thinking: Thinking,
    table: &TokenTable,
    limits: &GrammarLimits,
) -> Result<GrammarSource, GrammarError> {
    let is_harmony = dialects.reasoning == Some(ReasoningDialect::Harmony);
    if let (None, Some(format), Thinking::No, false) = (calls, format, thinking, is_harmony) {
        return GrammarSource::of(format, limits);
    }
    let mut builder = Builder { table, limits, rules: String::new(), num_rules: 0 };
    let mut answers = Vec::new();
    if let Some(calls) = calls {
        answers.push(builder.calls(dialects.tools, calls)?);
    }
    if let Some(format) = format {
        let item = GrammarSource::item(format, limits)?;
        answers.push(if is_harmony {
            format!("{} \"final\" {} {item}", builder.mark(harmony::CHANNEL), builder.mark(harmony::MESSAGE))
        } else {
            item
        });
    }
    let answers = answers.join(" | ");
    let before = match thinking {
        _ if is_harmony => {
            let [channel, message, end, start] =
                [harmony::CHANNEL, harmony::MESSAGE, harmony::END, harmony::START].map(|mark| builder.mark(mark));
            format!("({channel} \"analysis\" {message} ANY_TEXT {end} {start} \"assistant\")*")
        }
        Thinking::No => String::new(),
        Thinking::Open => format!("{} /\\n{{0,2}}/", builder.until(reasoning::END)),
        Thinking::Optional => {
            format!("({} {} /\\n{{0,2}}/)?", builder.mark(reasoning::BEGIN), builder.until(reasoning::END))
        }
    };
    let rules = builder.rules;
    Ok(GrammarSource::Lark(format!("start: {before} ({answers})\nANY_TEXT: {ANY_TEXT}\n{rules}")))
}

struct Builder<'t> {
    table: &'t TokenTable,
    limits: &'t GrammarLimits,
    rules: String,
    num_rules: usize,
}

impl Builder<'_> {
    /// A text that marks structure: the model's token where it has one, letters elsewhere.
    fn mark(&self, text: &str) -> String {
        match self.table.special_id(text) {
            Some(id) => format!("<[{id}]>"),
            None => lark_string(text),
        }
    }

    fn rule(&mut self, body: &str, attributes: &str) -> String {
        let name = format!("part_{}", self.num_rules);
        self.num_rules += 1;
        self.rules.push_str(&format!("{name}{attributes}: {body}\n"));
        name
    }

    /// Any text up to a mark and with it.
    fn until(&mut self, mark: &str) -> String {
        let attributes = if self.table.special_id(mark).is_some() { "" } else { "[lazy]" };
        let body = format!("ANY_TEXT {}", self.mark(mark));
        self.rule(&body, attributes)
    }

    fn json(&self, schema: &Value) -> Result<String, GrammarError> {
        GrammarSource::json_item(schema, self.limits)
    }

    fn calls(&mut self, dialect: ToolDialect, rules: CallRules<'_>) -> Result<String, GrammarError> {
        let calls: Vec<String> = rules.tools.iter().map(|tool| self.call(dialect, tool)).collect::<Result<_, _>>()?;
        let call = self.rule(&calls.join(" | "), "");
        let list = |separator: &str| match rules.parallel {
            true => format!("{call} ({} {call})*", lark_string(separator)),
            false => call.clone(),
        };
        Ok(match dialect {
            ToolDialect::Hermes | ToolDialect::Qwen3Coder => list("\n"),
            ToolDialect::Llama3Json => list("; "),
            ToolDialect::Pythonic => format!("\"[\" {} \"]\"", list(", ")),
            ToolDialect::Mistral => format!("{} \"[\" {} \"]\"", self.mark(mistral::MARK), list(", ")),
            ToolDialect::DeepseekV3 => {
                let (begin, end) = (self.mark(deepseek::CALLS_BEGIN), self.mark(deepseek::CALLS_END));
                format!("{begin} {} {end}", list("\n"))
            }
            // A call ends the turn.
            ToolDialect::Harmony => call,
        })
    }

    fn call(&mut self, dialect: ToolDialect, tool: &Tool) -> Result<String, GrammarError> {
        let name = Value::from(tool.name.as_str());
        let parameters = &tool.parameters;
        Ok(match dialect {
            ToolDialect::Hermes => {
                let (begin, end) = (self.mark(hermes::BEGIN), self.mark(hermes::END));
                let head = lark_string(&format!("\n{{\"name\": {name}, \"arguments\": "));
                format!("{begin} {head} {} {} {end}", self.json(parameters)?, lark_string("}\n"))
            }
            ToolDialect::Llama3Json => {
                let head = lark_string(&format!("{{\"name\": {name}, \"parameters\": "));
                format!("{head} {} \"}}\"", self.json(parameters)?)
            }
            ToolDialect::Mistral => {
                let head = lark_string(&format!("{{\"name\": {name}, \"arguments\": "));
                format!("{head} {} \"}}\"", self.json(parameters)?)
            }
            ToolDialect::DeepseekV3 => {
                let [begin, sep, end] =
                    [deepseek::CALL_BEGIN, deepseek::SEP, deepseek::CALL_END].map(|mark| self.mark(mark));
                let head = lark_string(&format!("{}\n```json\n", tool.name));
                format!("{begin} \"function\" {sep} {head} {} {} {end}", self.json(parameters)?, lark_string("\n```"))
            }
            ToolDialect::Harmony => {
                let [channel, constrain, message] =
                    [harmony::CHANNEL, harmony::CONSTRAIN, harmony::MESSAGE].map(|mark| self.mark(mark));
                let head = lark_string(&format!("commentary {}{} ", harmony::FUNCTIONS, tool.name));
                format!("{channel} {head} {constrain} \"json\" {message} {}", self.json(parameters)?)
            }
            ToolDialect::Qwen3Coder => {
                let head = lark_string(&format!("\n<function={}>\n", tool.name));
                let mut call = format!("{} {head}", self.mark(hermes::BEGIN));
                for Parameter { name, schema, is_required } in parameters_of(parameters) {
                    let value = if qwen_xml::is_text(Some(&schema)) {
                        self.until("\n</parameter>\n")
                    } else {
                        format!("{} {}", self.json(&schema)?, lark_string("\n</parameter>\n"))
                    };
                    let parameter = format!("{} {value}", lark_string(&format!("<parameter={name}>\n")));
                    let part = self.rule(&parameter, "");
                    call.push_str(&format!(" {part}{}", if is_required { "" } else { "?" }));
                }
                format!("{call} {} {}", lark_string("</function>\n"), self.mark(hermes::END))
            }
            ToolDialect::Pythonic => {
                // Arguments that may be left out are: commas between what may be there or not would need a rule for each
                // combination.
                let mut arguments = Vec::new();
                for Parameter { name, schema, is_required } in parameters_of(parameters) {
                    if is_required {
                        arguments.push(format!("{} {}", lark_string(&format!("{name}=")), self.json(&schema)?));
                    }
                }
                format!("{} {} \")\"", lark_string(&format!("{}(", tool.name)), arguments.join(" \", \" "))
            }
        })
    }
}

struct Parameter {
    name: String,
    schema: Value,
    is_required: bool,
}

/// The parameters that a tool's schema lists, each with the definitions that its schema may refer to.
fn parameters_of(schema: &Value) -> Vec<Parameter> {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return Vec::new() };
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    properties
        .iter()
        .map(|(name, property)| {
            let mut property = property.clone();
            for definitions in ["$defs", "definitions"] {
                if let (Some(of_all), Value::Object(fields)) = (schema.get(definitions), &mut property) {
                    fields.entry(definitions).or_insert_with(|| of_all.clone());
                }
            }
            if property.is_null() {
                property = json!({});
            }
            Parameter { name: name.clone(), schema: property, is_required: required.contains(&name.as_str()) }
        })
        .collect()
}
