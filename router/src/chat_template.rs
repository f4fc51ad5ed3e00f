//! A model's chat template: from a conversation to the text that the model was trained on.
//!
//! Templates come from the model's directory, never from a client, and are still not trusted: they run with fuel (each
//! instruction and each byte made costs some), a recursion limit and a limit on what they write, and they see nothing
//! but the conversation.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, context};
use quire_engine::ModelSource;
use serde::Deserialize;

use crate::generation::{ChatMessage, Limits};
use crate::served_model::LoadError;

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

/// A date in UTC. Knows what chat templates use; other directives stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Civil date from days since 1970 (Hinnant 2014), in the years from 1970 on.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let month_name = MONTHS[(month as usize - 1) % 12];
    let day_name = DAYS[(days % 7) as usize];

    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        // Writing to a string cannot fail.
        let _ = match characters.next() {
            Some('d') => write!(text, "{day:02}"),
            Some('m') => write!(text, "{month:02}"),
            Some('Y') => write!(text, "{year}"),
            Some('y') => write!(text, "{:02}", year % 100),
            Some('b') => write!(text, "{}", &month_name[..3]),
            Some('B') => write!(text, "{month_name}"),
            Some('a') => write!(text, "{}", &day_name[..3]),
            Some('A') => write!(text, "{day_name}"),
            Some('H') => write!(text, "{hour:02}"),
            Some('I') => write!(text, "{:02}", (hour + 11) % 12 + 1),
            Some('p') => write!(text, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('M') => write!(text, "{minute:02}"),
            Some('S') => write!(text, "{second:02}"),
            Some('%') => write!(text, "%"),
            Some(other) => write!(text, "%{other}"),
            None => write!(text, "%"),
        };
    }
    text
}

/// `tojson` as transformers has it: Python's `json.dumps` with `ensure_ascii=False`, and nothing escaped for HTML.
fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted because templates pass them; these are the only values that they can have here.
    let _: (Option<Value>, Option<Value>, Option<Value>) =
        (options.get("ensure_ascii")?, options.get("separators")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let mut text = String::new();
    write_json(state, value, indent.map(|indent| indent.min(16)), 0, &mut text)?;
    Ok(text)
}

fn write_json(
    state: &State,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    text: &mut String,
) -> Result<(), Error> {
    if depth > MAX_RECURSION {
        return Err(Error::new(ErrorKind::InvalidOperation, "the value is nested too deeply"));
    }
    state.consume_fuel(1)?;
    let new_line = |text: &mut String, depth: usize| {
        if let Some(indent) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => {
            let _ = write!(text, "{value}");
        }
        ValueKind::String => push_json_string(value.as_str().unwrap_or_default(), text),
        ValueKind::Map => {
            text.push('{');
            let mut empty = true;
            for key in value.try_iter()? {
                text.push_str(if empty { "" } else { separator });
                empty = false;
                new_line(text, depth + 1);
                match key.as_str() {
                    Some(key) => push_json_string(key, text),
                    None => push_json_string(&key.to_string(), text),
                }
                text.push_str(": ");
                write_json(state, &value.get_item(&key)?, indent, depth + 1, text)?;
            }
            if !empty {
                new_line(text, depth);
            }
            text.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                text.push_str(if empty { "" } else { separator });
                empty = false;
                new_line(text, depth + 1);
                write_json(state, &item, indent, depth + 1, text)?;
            }
            if !empty {
                new_line(text, depth);
            }
            text.push(']');
        }
        _ => return Err(Error::new(ErrorKind::InvalidOperation, "the value has no JSON form")),
    }
    Ok(())
}

fn push_json_string(value: &str, text: &mut String) {
    text.push_str(&serde_json::Value::from(value).to_string());
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::generation::ToolCall;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.to_owned(), content: content.to_owned(), ..ChatMessage::default() }
    }

    fn options() -> RenderOptions {
        RenderOptions { add_generation_prompt: true, now_seconds: 1_795_000_000, ..RenderOptions::default() }
    }

    fn render(template: &str, messages: &[ChatMessage]) -> Result<String, TemplateError> {
        let special_tokens = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
        ChatTemplate::compile(template, special_tokens, &Limits::default())
            .expect("compiles")
            .render(messages, options())
    }

    #[test]
    fn renders_what_models_ship() {
        let check = |template: &str, expected: &str| {
            let messages = [message("system", "Be brief."), message("user", "Hi"), message("assistant", " Yo ")];
            assert_eq!(render(template, &messages).expect("renders"), expected, "{template}");
        };
        check(
            "{% for message in messages %}\n    {%- if true %}\n    {{- '<|' + message['role'] + '|>' }}\n    {%- endif %}\n{{- message.content | trim }}\n  {% endfor %}",
            "<|system|>Be brief.\n<|user|>Hi\n<|assistant|>Yo\n",
        );
        check(
            "{{ bos_token }}{% set ns = namespace(seen=0) %}{% for m in messages[::-1] %}{% set ns.seen = ns.seen + 1 %}\
             {% endfor %}{{ ns.seen }}{% if messages[0]['role'] == 'system' %}{{ messages[0].content.upper() }}{% endif %}",
            "<s>3BE BRIEF.",
        );
        check("{% if tools is not none %}tools{% endif %}{{ 'a b'.split(' ') | length }}", "2");
        check("{% generation %}{{ messages[1].content }}{%- endgeneration -%}\n !", "Hi!");
        check("{{ {'a': [1, 2.5, none, true, '<é\"']} | tojson }}", "{\"a\": [1, 2.5, null, true, \"<é\\\"\"]}");
        check("{{ [1] | tojson(indent=2) }}", "[\n  1\n]");
        check("{% if enable_thinking is defined %}on{% else %}off{% endif %}", "off");
        check("{{ strftime_now('%d %b %Y') }}", "18 Nov 2026");
    }

    #[test]
    fn tools_calls_results_and_documents_are_there_for_templates_that_write_them() {
        let template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for d in documents or [] %}{{ d.title }}{% endfor %}\
            {% for m in messages %}{{ m.role }}:{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.city }})\
            {{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}{{ m.content }};{% endfor %}{{ reasoning_effort }}";
        let template = ChatTemplate::compile(template, Vec::new(), &Limits::default()).expect("compiles");
        let call =
            ToolCall { id: "1".into(), name: "weather".into(), arguments: "{\"city\": \"Rome\", \"b\": 1}".into() };
        let messages = [
            ChatMessage { tool_calls: vec![call], ..message("assistant", "") },
            ChatMessage { tool_call_id: Some("1".into()), ..message("tool", "sunny") },
        ];
        let options = RenderOptions {
            tools: vec![serde_json::json!({"type": "function", "function": {"name": "weather"}})],
            documents: vec![serde_json::json!({"title": "D", "text": "x"})],
            reasoning_effort: Some("low".into()),
            ..options()
        };
        let expected = "{\"type\": \"function\", \"function\": {\"name\": \"weather\"}}D\
            assistant:weather(Rome){\"city\": \"Rome\", \"b\": 1};tool:1sunny;low";
        assert_eq!(template.render(&messages, options).expect("renders"), expected);
        assert_eq!(template.render(&[message("user", "x")], self::options()).expect("renders"), "user:x;");
    }

    #[test]
    fn dates() {
        assert_eq!(
            strftime("%Y-%m-%d %H:%M:%S %a %A %b %B %y %p %I %% %q %", 0),
            "1970-01-01 00:00:00 Thu Thursday Jan January 70 AM 12 % %q %"
        );
        assert_eq!(strftime("%Y-%m-%d %a", 951_782_400), "2000-02-29 Tue");
        assert_eq!(strftime("%Y-%m-%d %H:%M %p", 4_102_444_799), "2099-12-31 23:59 PM");
    }

    #[test]
    fn a_template_can_refuse_with_its_own_words_only() {
        let own = "{{ raise_exception('Roles must alternate.') }}";
        assert_eq!(render(own, &[]), Err(TemplateError::Raised("Roles must alternate.".into())));
        let theirs = "{{ raise_exception('Not: ' + messages[0].content) }}";
        assert_eq!(render(theirs, &[message("user", "my secret")]), Err(TemplateError::Refused));
        let in_macro = "{% macro m() %}{{ raise_exception('No.') }}{% endmacro %}{{ m() }}";
        assert_eq!(render(in_macro, &[]), Err(TemplateError::Raised("No.".into())));
    }

    #[test]
    fn hostile_templates_are_stopped_in_time() {
        let hostile = [
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
            "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "{{ 'a' * 1000000000000 }}",
            "{{ ('a' * 90000000) | length }}",
            "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
            "{% set ns = namespace() %}{% set ns.self = ns %}{{ ns | tojson }}",
            "{{ range(1000000000) | list }}",
            "{{ ('a,' * 1000000).split(',') | join('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa') }}",
            "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
            "{{ 'a' | center(1000000000) }}",
            "{{ '%1000000000d' | format(1) }}",
            "{% for i in range(100000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
            "{{ messages.__class__.__mro__[1].__subclasses__() }}",
            "{{ self._TemplateReference__context }}",
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}{{ os.system('id') }}",
            "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        ];
        for template in hostile {
            let start = Instant::now();
            let rendered = ChatTemplate::compile(template, Vec::new(), &Limits::default()).and_then(|template| {
                template.render(&[message("user", "Hi")], options()).map_err(|error| error.to_string())
            });
            let elapsed = start.elapsed();
            match rendered {
                Err(why) => assert!(!why.contains("0x") && !why.contains("root:"), "{why}"),
                Ok(text) => assert!(text.len() < 2 << 20, "{template}: {} bytes", text.len()),
            }
            // Twice: once when it is loaded, once when it is rendered. Debug builds run on slow machines too.
            assert!(elapsed < Duration::from_millis(1000), "{template}: {elapsed:?}");
        }
    }

    #[test]
    fn output_is_bounded_by_input() {
        let template = "{% for i in range(40) %}{{ messages[0].content }}{% endfor %}";
        let limits = Limits { template_output_bytes: 1000, ..Limits::default() };
        let template = ChatTemplate::compile(template, Vec::new(), &limits).expect("compiles");
        let long = message("user", &"a".repeat(10_000));
        assert_eq!(template.render(&[long], options()), Err(TemplateError::TooExpensive));
        assert!(template.render(&[message("user", "a")], options()).is_ok());
    }

    #[test]
    fn the_newer_name_of_the_system_role_is_for_templates_that_know_it() {
        let messages = [message("developer", "x")];
        assert_eq!(render("{{ messages[0].role }}", &messages), Ok("system".into()));
        assert_eq!(render("{# developer #}{{ messages[0].role }}", &messages), Ok("developer".into()));
    }

    #[test]
    fn generation_tags_are_found_in_every_spelling() {
        assert_eq!(without_generation_tags("a{%-generation-%}b{% endgeneration %}"), "a{%-if true-%}b{% endif %}");
        assert_eq!(without_generation_tags("{% if generation %}{%"), "{% if generation %}{%");
    }
}
