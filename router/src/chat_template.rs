//! A model's chat template: from a conversation to the text that the model was trained on.
//!
//! Templates come from the model's directory, never from a client, and are still not trusted: they run with fuel (each
//! instruction and each byte made costs some), a recursion limit and a limit on what they write, and they see nothing
//! but the conversation.

mod dates;
#[cfg(test)]
mod tests;
mod tojson;

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, context};
use quire_engine::ModelSource;
use serde::Deserialize;

use crate::generation::{ChatMessage, Limits};
use crate::served_model::LoadError;

use dates::strftime;
use tojson::to_json;

/// Deepest nesting of macros and loops, and of values in `tojson`.
const MAX_RECURSION: usize = 64;
/// Bytes written for each byte of the conversation, beyond a fixed allowance.
const OUTPUT_FACTOR: usize = 16;
/// Name of the time in a template's variables; not a name that templates use.
const NOW: &str = "__quire_now";

/// Why a conversation could not be rendered. Holds nothing of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template called `raise_exception`, with a sentence of its own.
    #[error("the model's chat template refuses these messages: {0}")]
    Raised(String),
    /// The template called `raise_exception` with a sentence that is not its own text alone.
    #[error("the model's chat template refuses these messages")]
    Refused,
    #[error("the model's chat template takes too many steps or writes too much for these messages")]
    TooExpensive,
    #[error("the model's chat template cannot render these messages")]
    Failed,
}

/// What a template is given beside the messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RenderOptions {
    pub add_generation_prompt: bool,
    pub enable_thinking: Option<bool>,
    pub reasoning_effort: Option<String>,
    /// Functions in OpenAI's shape; none leaves them undefined.
    pub tools: Vec<serde_json::Value>,
    pub documents: Vec<serde_json::Value>,
    /// Seconds since 1970, for templates that write today's date.
    pub now_seconds: u64,
}

/// A template that compiled.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the like, as text.
    special_tokens: Vec<(&'static str, String)>,
    output_bytes: usize,
    source: String,
}

/// The parts of `tokenizer_config.json` that are read here.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<TemplateEntry>,
    #[serde(default)]
    bos_token: Option<TokenEntry>,
    #[serde(default)]
    eos_token: Option<TokenEntry>,
    #[serde(default)]
    unk_token: Option<TokenEntry>,
    #[serde(default)]
    pad_token: Option<TokenEntry>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TemplateEntry {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenEntry {
    Text(String),
    Token { content: String },
}

impl TokenEntry {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

impl TemplateEntry {
    fn into_source(self) -> Option<String> {
        match self {
            Self::One(source) => Some(source),
            Self::Named(named) => {
                let default = named.iter().position(|entry| entry.name == "default").unwrap_or(0);
                named.into_iter().nth(default).map(|entry| entry.template)
            }
        }
    }
}

impl ChatTemplate {
    /// Reads the model's template: `chat_template.jinja`, else `chat_template.json`, else `tokenizer_config.json`.
    /// `None` where the model has none.
    pub fn load(source: &ModelSource, limits: &Limits) -> Result<Option<Self>, LoadError> {
        let config: TokenizerConfig = read_json(source, "tokenizer_config.json")?.unwrap_or_default();
        let special_tokens = [
            ("bos_token", config.bos_token),
            ("eos_token", config.eos_token),
            ("unk_token", config.unk_token),
            ("pad_token", config.pad_token),
        ];
        let special_tokens =
            special_tokens.into_iter().filter_map(|(name, token)| Some((name, token?.into_text()))).collect();

        let (file, template) = if let Some(bytes) = read(source, "chat_template.jinja")? {
            let text = String::from_utf8(bytes.into_owned())
                .map_err(|_| LoadError { file: "chat_template.jinja", why: "it is not UTF-8".into() })?;
            ("chat_template.jinja", Some(text))
        } else if let Some(entry) = read_json::<TokenizerConfig>(source, "chat_template.json")? {
            ("chat_template.json", entry.chat_template.and_then(TemplateEntry::into_source))
        } else {
            ("tokenizer_config.json", config.chat_template.and_then(TemplateEntry::into_source))
        };
        let Some(template) = template else { return Ok(None) };
        Self::compile(&template, special_tokens, limits).map(Some).map_err(|why| LoadError { file, why })
    }

    /// Compiles a template and tries it once. Fails with a sentence on what is wrong with it.
    pub fn compile(
        template: &str,
        special_tokens: Vec<(&'static str, String)>,
        limits: &Limits,
    ) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| describe(&error))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_fuel(Some(limits.template_fuel));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned("chat", without_generation_tags(template))
            .map_err(|error| format!("the chat template does not compile: {}", describe(&error)))?;
        let template = Self {
            environment,
            special_tokens,
            output_bytes: limits.template_output_bytes,
            source: template.to_owned(),
        };
        let hello = ChatMessage { role: "user".into(), content: "Hello".into(), ..ChatMessage::default() };
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        match template.render(&[hello], options) {
            Err(TemplateError::TooExpensive) => {
                Err("the chat template takes too many steps or writes too much for one short message".into())
            }
            // A template may want a system message or alternating roles: what it can render shows with each request.
            _ => Ok(template),
        }
    }

    /// Whether the template mentions a word: a role or a variable that not all templates know.
    pub fn mentions(&self, word: &str) -> bool {
        self.source.contains(word)
    }

    /// Whether a request can say that the model is to think, or not to.
    pub fn reads_thinking(&self) -> bool {
        self.mentions("enable_thinking") || self.mentions("thinking")
    }

    /// Whether a request can say how much the model is to think.
    pub fn reads_effort(&self) -> bool {
        self.mentions("reasoning_effort")
    }

    /// The template as the model brings it.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation.
    pub fn render(&self, messages: &[ChatMessage], options: RenderOptions) -> Result<String, TemplateError> {
        let template = self.environment.get_template("chat").map_err(|_| TemplateError::Failed)?;
        let of_message = |message: &ChatMessage| {
            let calls = message.tool_calls.iter().map(|call| call.name.len() + call.arguments.len()).sum::<usize>();
            message.content.len() + message.role.len() + message.reasoning.as_ref().map_or(0, String::len) + calls
        };
        let beside = options.tools.iter().chain(&options.documents).map(json_bytes).sum::<usize>();
        let input_bytes: usize = messages.iter().map(of_message).sum::<usize>() + beside;
        let mut output = CappedWriter {
            bytes: Vec::new(),
            limit: input_bytes.saturating_mul(OUTPUT_FACTOR).saturating_add(self.output_bytes),
        };
        let messages: Vec<Value> = messages.iter().map(|message| self.value(message)).collect();
        let mut variables: BTreeMap<&str, Value> = BTreeMap::from([
            ("messages", messages.into()),
            ("add_generation_prompt", options.add_generation_prompt.into()),
            ("tools", list_or_none(&options.tools)),
            ("documents", list_or_none(&options.documents)),
            (NOW, options.now_seconds.into()),
        ]);
        if let Some(enable_thinking) = options.enable_thinking {
            variables.insert("enable_thinking", enable_thinking.into());
            variables.insert("thinking", enable_thinking.into());
        }
        if let Some(effort) = options.reasoning_effort {
            variables.insert("reasoning_effort", effort.into());
        }
        variables.extend(self.special_tokens.iter().map(|(name, text)| (*name, text.as_str().into())));
        match template.render_captured_to(Value::from(variables), &mut output) {
            Ok(_) => String::from_utf8(output.bytes).map_err(|_| TemplateError::Failed),
            Err(error) => Err(classify(&error, template.source())),
        }
    }

    fn value(&self, message: &ChatMessage) -> Value {
        // The newer name of the system role, for templates that were written before it.
        let role = match message.role.as_str() {
            "developer" if !self.mentions("developer") => "system",
            role => role,
        };
        let mut fields: BTreeMap<&str, Value> =
            BTreeMap::from([("role", role.into()), ("content", message.content.as_str().into())]);
        if let Some(name) = &message.name {
            fields.insert("name", name.as_str().into());
        }
        if let Some(id) = &message.tool_call_id {
            fields.insert("tool_call_id", id.as_str().into());
        }
        if let Some(reasoning) = &message.reasoning {
            fields.insert("reasoning_content", reasoning.as_str().into());
            fields.insert("reasoning", reasoning.as_str().into());
            fields.insert("thinking", reasoning.as_str().into());
        }
        if !message.tool_calls.is_empty() {
            let calls: Vec<Value> = message
                .tool_calls
                .iter()
                .map(|call| {
                    // Templates write arguments themselves, in the way that the model was trained on.
                    let arguments: serde_json::Value = serde_json::from_str(&call.arguments)
                        .unwrap_or_else(|_| serde_json::Value::from(call.arguments.as_str()));
                    let function = context! { name => &call.name, arguments => Value::from(Serde(arguments)) };
                    context! { id => &call.id, type => "function", function => function }
                })
                .collect();
            fields.insert("tool_calls", calls.into());
        }
        Value::from(fields)
    }
}

fn list_or_none(items: &[serde_json::Value]) -> Value {
    if items.is_empty() { ().into() } else { Value::from(Serde(items)) }
}

fn json_bytes(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(text) => text.len() + 2,
        serde_json::Value::Array(items) => items.iter().map(json_bytes).sum::<usize>() + 2,
        serde_json::Value::Object(fields) => {
            fields.iter().map(|(name, value)| name.len() + 4 + json_bytes(value)).sum::<usize>() + 2
        }
        _ => 8,
    }
}

/// Why a template stopped.
fn classify(error: &Error, source: &str) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref::<Raised>() {
            // Only what the template's author wrote may be repeated: anything else could hold the user's words.
            let own_words = !message.is_empty() && message.len() <= 256 && source.contains(message.as_str());
            return if own_words { TemplateError::Raised(message.clone()) } else { TemplateError::Refused };
        }
        if let Some(error) = current.downcast_ref::<Error>()
            && matches!(error.kind(), ErrorKind::OutOfFuel | ErrorKind::WriteFailure)
        {
            return TemplateError::TooExpensive;
        }
        cause = current.source();
    }
    TemplateError::Failed
}

/// A load error's words: kind and line, and nothing that the template computed.
fn describe(error: &Error) -> String {
    match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("line {line}: {detail}"),
        (Some(detail), None) => detail.to_owned(),
        (None, Some(line)) => format!("line {line}: {}", error.kind()),
        (None, None) => error.kind().to_string(),
    }
}

/// What `raise_exception` was called with.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the template refused")
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "the template refused").with_source(Raised(message)))
}

fn strftime_now(state: &State, format: &str) -> Result<String, Error> {
    let now = state.lookup(NOW).and_then(|now| u64::try_from(now).ok()).unwrap_or(0);
    Ok(strftime(format, now))
}

/// Templates for training mark the assistant's words with `{% generation %}`; to render them it means nothing. It becomes
/// `{% if true %}`, so that the block's own white space rules stay.
fn without_generation_tags(template: &str) -> String {
    let mut text = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find("{%") {
        text.push_str(&rest[..at]);
        let Some(len) = rest[at..].find("%}").map(|end| end + 2) else { break };
        let tag = &rest[at..at + len];
        let inner = tag[2..len - 2].trim_matches(['-', '+']).trim();
        match inner {
            "generation" => text.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => text.push_str(&tag.replace("endgeneration", "endif")),
            _ => text.push_str(tag),
        }
        rest = &rest[at + len..];
    }
    text.push_str(rest);
    text
}

struct CappedWriter {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for CappedWriter {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buffer.len() > self.limit {
            return Err(io::Error::other("the template writes too much"));
        }
        self.bytes.extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn read(source: &ModelSource, file: &'static str) -> Result<Option<std::borrow::Cow<'static, [u8]>>, LoadError> {
    source.read(file).map_err(|cause| LoadError { file, why: cause.to_string() })
}

fn read_json<T: serde::de::DeserializeOwned>(source: &ModelSource, file: &'static str) -> Result<Option<T>, LoadError> {
    match read(source, file)? {
        None => Ok(None),
        Some(bytes) => {
            serde_json::from_slice(&bytes).map(Some).map_err(|cause| LoadError { file, why: cause.to_string() })
        }
    }
}
