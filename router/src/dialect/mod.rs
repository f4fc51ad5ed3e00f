//! How a model writes tool calls and reasoning, and how its text is taken apart again.
//!
//! A model was trained on one way to write a call. Which one shows in its chat template; an operator can say otherwise. Each
//! dialect is a file: an incremental parser, and the syntax of a call for grammars that enforce one. Parsers look at each byte
//! a bounded number of times, give the same parts however the text is cut, and give text back as it was where it is not a call.
//! Arguments that are JSON are said as they come; a call that was begun and turns out not to be JSON stands as it was written.

mod blocks;
mod deepseek;
mod enforce;
mod harmony;
mod hermes;
mod json_calls;
mod json_stream;
mod llama;
mod mistral;
mod pythonic;
mod qwen_xml;
mod reasoning;
mod scan;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::generation::Tool;
use crate::random::random_u64;

pub(crate) use enforce::{CallRules, Thinking, enforced};
pub(crate) use reasoning::{is_behind_thought, is_in_thought};

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolParserChoice {
    /// As the chat template has it; where it knows no tools, `hermes`, and the tools are described in a system message.
    #[default]
    Auto,
    /// JSON between `<tool_call>` and `</tool_call>`: Hermes, Qwen 2.5 and 3, and many others.
    Hermes,
    /// `{"name": ..., "parameters": ...}` as the whole answer: Llama 3.1 and later.
    Llama3Json,
    /// `[name(argument=value)]` as the whole answer: Llama 3.2 and 4.
    Pythonic,
    /// JSON behind `[TOOL_CALLS]`.
    Mistral,
    /// JSON between DeepSeek V3's own marks.
    DeepseekV3,
    /// `<function=name>` and `<parameter=name>`: Qwen3-Coder.
    Qwen3Coder,
    /// Channels: gpt-oss.
    Harmony,
}

/// How a model marks its reasoning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningParserChoice {
    /// As the chat template has it.
    #[default]
    Auto,
    /// It does not, or it is left in the text.
    None,
    /// Between `<think>` and `</think>`: DeepSeek R1, Qwen3 and others.
    Think,
    /// Channels: gpt-oss.
    Harmony,
}

/// What a model speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialects {
    pub(crate) tools: ToolDialect,
    pub(crate) reasoning: Option<ReasoningDialect>,
    /// Whether the chat template writes tools, calls and results itself.
    pub(crate) template_knows_tools: bool,
}

/// See [`ToolParserChoice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToolDialect {
    Hermes,
    Llama3Json,
    Pythonic,
    Mistral,
    DeepseekV3,
    Qwen3Coder,
    Harmony,
}

/// See [`ReasoningParserChoice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReasoningDialect {
    Think,
    Harmony,
}

impl Dialects {
    /// What the template shows, unless the operator knows better.
    pub(crate) fn detect(template: &str, tools: ToolParserChoice, reasoning: ReasoningParserChoice) -> Self {
        let has = |mark: &str| template.contains(mark);
        let tools = match tools {
            ToolParserChoice::Hermes => ToolDialect::Hermes,
            ToolParserChoice::Llama3Json => ToolDialect::Llama3Json,
            ToolParserChoice::Pythonic => ToolDialect::Pythonic,
            ToolParserChoice::Mistral => ToolDialect::Mistral,
            ToolParserChoice::DeepseekV3 => ToolDialect::DeepseekV3,
            ToolParserChoice::Qwen3Coder => ToolDialect::Qwen3Coder,
            ToolParserChoice::Harmony => ToolDialect::Harmony,
            ToolParserChoice::Auto if has(harmony::CHANNEL) => ToolDialect::Harmony,
            ToolParserChoice::Auto if has(deepseek::CALLS_BEGIN) => ToolDialect::DeepseekV3,
            ToolParserChoice::Auto if has(mistral::MARK) => ToolDialect::Mistral,
            ToolParserChoice::Auto if has(qwen_xml::FUNCTION) => ToolDialect::Qwen3Coder,
            ToolParserChoice::Auto if has(hermes::BEGIN) => ToolDialect::Hermes,
            ToolParserChoice::Auto if has("<|python_start|>") => ToolDialect::Pythonic,
            ToolParserChoice::Auto if has(llama::PYTHON_TAG) || has("\"parameters\"") => ToolDialect::Llama3Json,
            ToolParserChoice::Auto => ToolDialect::Hermes,
        };
        let reasoning = match reasoning {
            ReasoningParserChoice::None => None,
            ReasoningParserChoice::Think => Some(ReasoningDialect::Think),
            ReasoningParserChoice::Harmony => Some(ReasoningDialect::Harmony),
            ReasoningParserChoice::Auto if has(harmony::CHANNEL) => Some(ReasoningDialect::Harmony),
            ReasoningParserChoice::Auto if has(reasoning::END) => Some(ReasoningDialect::Think),
            ReasoningParserChoice::Auto => None,
        };
        Self { tools, reasoning, template_knows_tools: has("tools") }
    }

    /// A new identity for a call, of the form that the dialect's templates take.
    pub(crate) fn call_id(&self) -> String {
        let id = format!("{:016x}", random_u64());
        match self.tools {
            // Mistral's templates take nine letters and digits and nothing else.
            ToolDialect::Mistral => id[..9].to_owned(),
            _ => format!("call_{id}"),
        }
    }

    /// Texts that mark structure in this dialect. Those of them that are special tokens of the model are written for the
    /// parser, and for it alone.
    pub(crate) fn marks(&self) -> Vec<&'static str> {
        let mut marks = match self.tools {
            ToolDialect::Hermes => vec![hermes::BEGIN, hermes::END],
            ToolDialect::Llama3Json => vec![llama::PYTHON_TAG],
            ToolDialect::Pythonic => pythonic::MARKS.to_vec(),
            ToolDialect::Mistral => mistral::MARKS.to_vec(),
            ToolDialect::DeepseekV3 => deepseek::MARKS.to_vec(),
            ToolDialect::Qwen3Coder => vec![hermes::BEGIN, hermes::END],
            ToolDialect::Harmony => harmony::MARKS.to_vec(),
        };
        match self.reasoning {
            Some(ReasoningDialect::Think) => marks.extend([reasoning::BEGIN, reasoning::END]),
            Some(ReasoningDialect::Harmony) => marks.extend(harmony::MARKS),
            None => {}
        }
        marks
    }
}

/// A call as the model wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParsedCall {
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

/// A piece of an answer, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Content(String),
    Reasoning(String),
    /// A whole call.
    Call(ParsedCall),
    /// A call of this name begins; its arguments come in pieces.
    CallBegin(String),
    Arguments(String),
    CallEnd,
}

/// Parts of an answer as they come; neighbours of one kind become one.
#[derive(Default)]
pub(crate) struct Parts(Vec<Part>);

impl Parts {
    pub(crate) fn content(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Content(content)) => content.push_str(text),
            _ => self.0.push(Part::Content(text.to_owned())),
        }
    }

    pub(crate) fn reasoning(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Reasoning(reasoning)) => reasoning.push_str(text),
            _ => self.0.push(Part::Reasoning(text.to_owned())),
        }
    }

    pub(crate) fn call(&mut self, call: ParsedCall) {
        self.0.push(Part::Call(call));
    }

    pub(crate) fn begin_call(&mut self, name: String) {
        self.0.push(Part::CallBegin(name));
    }

    pub(crate) fn arguments(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Arguments(arguments)) => arguments.push_str(text),
            _ => self.0.push(Part::Arguments(text.to_owned())),
        }
    }

    pub(crate) fn end_call(&mut self) {
        self.0.push(Part::CallEnd);
    }

    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Part> + '_ {
        self.0.drain(..)
    }
}

/// Takes one choice's text apart as it comes.
pub(crate) trait TextParser: Send {
    /// The next piece of text, of any length.
    fn push(&mut self, text: &str, parts: &mut Parts);
    /// The text is over: what was held back is said.
    fn finish(&mut self, parts: &mut Parts);
    /// Whether what comes next is reasoning, as far as can be told.
    fn is_reasoning(&self) -> bool {
        false
    }
}

/// The parser of one choice: reasoning first, then calls in what is left.
pub(crate) struct OutputParser {
    reasoning: Option<reasoning::ThinkSplitter>,
    calls: Option<Box<dyn TextParser>>,
}

/// What is to be found in an answer.
#[derive(Clone, Debug)]
pub(crate) struct ParserOptions {
    pub(crate) dialects: Dialects,
    /// Whose calls are looked for; none are where this is empty.
    pub(crate) tools: Arc<[Tool]>,
    /// The prompt ends inside a thought.
    pub(crate) in_thought: bool,
}

impl OutputParser {
    /// `None` where text is all there can be.
    pub(crate) fn new(options: &ParserOptions) -> Option<Self> {
        let ParserOptions { dialects, tools, in_thought } = options;
        let is_harmony =
            dialects.reasoning == Some(ReasoningDialect::Harmony) || dialects.tools == ToolDialect::Harmony;
        let calls: Option<Box<dyn TextParser>> = match dialects.tools {
            _ if is_harmony => Some(Box::new(harmony::Parser::new(*dialects, !tools.is_empty()))),
            _ if tools.is_empty() => None,
            ToolDialect::Hermes => Some(Box::new(hermes::parser())),
            ToolDialect::Llama3Json => Some(Box::new(llama::Parser::default())),
            ToolDialect::Pythonic => Some(Box::new(pythonic::Parser::default())),
            ToolDialect::Mistral => Some(Box::new(mistral::Parser::default())),
            ToolDialect::DeepseekV3 => Some(Box::new(deepseek::parser())),
            ToolDialect::Qwen3Coder => Some(Box::new(qwen_xml::parser(Arc::clone(tools)))),
            ToolDialect::Harmony => None,
        };
        let reasoning = (dialects.reasoning == Some(ReasoningDialect::Think) && !is_harmony)
            .then(|| reasoning::ThinkSplitter::new(*in_thought));
        (reasoning.is_some() || calls.is_some()).then_some(Self { reasoning, calls })
    }

    pub(crate) fn push(&mut self, text: &str, parts: &mut Parts) {
        match &mut self.reasoning {
            None => self.push_content(text, parts),
            Some(splitter) => {
                let mut split = Parts::default();
                splitter.push(text, &mut split);
                self.pass_on(split, parts);
            }
        }
    }

    /// Whether the text so far ends inside a thought.
    pub(crate) fn is_reasoning(&self) -> bool {
        self.reasoning.as_ref().is_some_and(TextParser::is_reasoning)
            || self.calls.as_ref().is_some_and(|calls| calls.is_reasoning())
    }

    pub(crate) fn finish(&mut self, parts: &mut Parts) {
        if let Some(splitter) = &mut self.reasoning {
            let mut split = Parts::default();
            splitter.finish(&mut split);
            self.pass_on(split, parts);
        }
        if let Some(calls) = &mut self.calls {
            calls.finish(parts);
        }
    }

    fn pass_on(&mut self, mut split: Parts, parts: &mut Parts) {
        for part in split.drain() {
            match part {
                Part::Content(text) => self.push_content(&text, parts),
                Part::Reasoning(text) => parts.reasoning(&text),
                // Thoughts are told from content, and nothing else.
                call => parts.0.push(call),
            }
        }
    }

    fn push_content(&mut self, text: &str, parts: &mut Parts) {
        match &mut self.calls {
            Some(calls) => calls.push(text, parts),
            None => parts.content(text),
        }
    }
}
