//! Bodies of Ollama's dialect.

use std::collections::VecDeque;

use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::fim::FimInput;
use crate::generation::{ChatInput, ChatMessage, GenerationParams, Input, Limits, invalid};
use crate::http::fields::{Fields, Ignored, raw_list};
use crate::http::format::schema_or_json;
use crate::http::receive::Body;
use crate::http::tools::{calls, tools};
use crate::served_model::ServedModel;
use crate::served_models::Task;

/// Options that say how a machine runs a model, which is the operator's to say here: named as ignored.
const MACHINE: [&str; 9] =
    ["num_gpu", "main_gpu", "num_thread", "num_batch", "num_keep", "numa", "low_vram", "use_mmap", "use_mlock"];

/// Ollama's clients may put a tag behind a name; there is one of each model.
pub(super) fn without_tag(name: String) -> String {
    name.strip_suffix(":latest").map_or(name.clone(), str::to_owned)
}

/// What a request asks of the model.
pub(super) struct Wanted {
    pub(super) model: Option<String>,
    /// `None` asks for the model to be loaded, which it is.
    pub(super) input: Option<Input>,
    pub(super) params: GenerationParams,
    pub(super) num_ctx: Option<u64>,
    pub(super) stream: bool,
    pub(super) ignored: Ignored,
}

pub(super) struct ChatBody(pub(super) Wanted);
pub(super) struct GenerateBody(pub(super) Wanted);

pub(super) struct ShowBody {
    pub(super) model: String,
    pub(super) ignored: Ignored,
}

impl Wanted {
    fn note_unread(&mut self, model: &ServedModel) {
        let (Some(template), Some(Input::Chat(input))) = (model.chat_template(), &self.input) else { return };
        let reads_degree = input.reasoning_effort.is_some() && template.reads_effort();
        if input.enable_thinking.is_some() && !template.reads_thinking() && !reads_degree {
            self.ignored.add("think");
        }
    }
}

/// The fields of both that are not their own.
fn wanted(fields: &mut Fields<'_>, limits: &Limits, mut ignored: Ignored) -> Result<Wanted, ApiError> {
    fields.refuse(&["logprobs", "top_logprobs"])?;
    let mut params = GenerationParams::default();
    let mut num_ctx = None;
    if let Some(raw) = fields.raw("options") {
        let mut options = Fields::of_value(raw, "options")?;
        params = GenerationParams {
            // -1 and -2 are "until the end".
            max_tokens: match options.integer("num_predict")? {
                None | Some(-2 | -1) => None,
                Some(count) => Some(
                    u64::try_from(count).map_err(|_| invalid("options.num_predict", "must be at least 1, or -1"))?,
                ),
            },
            temperature: options.number("temperature")?,
            top_k: options.integer("top_k")?,
            top_p: options.number("top_p")?,
            min_p: options.number("min_p")?,
            typical_p: options.number("typical_p")?,
            repetition_penalty: options.number("repeat_penalty")?,
            presence_penalty: options.number("presence_penalty")?,
            frequency_penalty: options.number("frequency_penalty")?,
            seed: options.integer("seed")?,
            stop: options.strings("stop", limits.max_stop)?,
            ..GenerationParams::default()
        };
        num_ctx = options.count("num_ctx")?;
        options.refuse_unless("mirostat", |raw| raw == "0")?;
        options.refuse_unless("tfs_z", |raw| raw.parse() == Ok(1.0))?;
        // Penalties look at all that was said.
        options.refuse_unless("repeat_last_n", |raw| raw == "-1")?;
        options.refuse_unless("penalize_newline", |raw| raw == "true")?;
        let mut unknown = Ignored::default();
        options.note_ignored(&mut unknown);
        let is_machines = |name: &str| MACHINE.iter().any(|option| name == format!("options.{option}"));
        unknown.for_each(|name| {
            // Its effects are nobody's but the machine's: not something to refuse under `strict`.
            if !is_machines(name) {
                ignored.add(name);
            }
        });
    }
    if let Some(raw) = fields.raw("format") {
        params.format = schema_or_json(raw, "format")?;
    }
    // A served model stays.
    if fields
        .raw("keep_alive")
        .is_some_and(|raw| !raw.get().starts_with(['"', '-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']))
    {
        return Err(invalid("keep_alive", "must be a time in words, or a number of seconds"));
    }
    let model = fields.string("model")?.map(without_tag);
    let stream = fields.bool("stream")?.unwrap_or(true);
    fields.note_ignored(&mut ignored);
    Ok(Wanted { model, input: None, params, num_ctx, stream, ignored })
}

/// Whether the model is to think, or how much.
fn think(fields: &mut Fields<'_>, input: &mut ChatInput) -> Result<(), ApiError> {
    match fields.raw("think").map(RawValue::get) {
        None => {}
        Some("true") => input.enable_thinking = Some(true),
        Some("false") => input.enable_thinking = Some(false),
        Some("\"low\"" | "\"medium\"" | "\"high\"") => {
            // A template that knows no degrees is told to think.
            input.enable_thinking = Some(true);
            input.reasoning_effort = fields.string("think")?;
        }
        Some(_) => return Err(invalid("think", "must be true, false, `low`, `medium` or `high`")),
    }
    Ok(())
}

impl Body for ChatBody {
    fn model(&self) -> Option<&str> {
        self.0.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        let mut input = ChatInput::default();
        think(&mut fields, &mut input)?;
        tools(&mut fields, limits, &mut ignored, &mut input)?;
        if let Some(raw) = fields.raw("messages") {
            let raw = raw_list(raw, "messages", limits.max_messages)?.into_iter().enumerate();
            input.messages = raw.map(|(index, raw)| message(raw, index, &mut ignored)).collect::<Result<_, _>>()?;
        }
        name_calls(&mut input.messages);
        let mut wanted = wanted(&mut fields, limits, ignored)?;
        if !input.messages.is_empty() {
            wanted.input = Some(Input::Chat(input));
        }
        Ok(Self(wanted))
    }

    fn ignored(&self) -> &Ignored {
        &self.0.ignored
    }

    fn note_unread(&mut self, model: &ServedModel) {
        self.0.note_unread(model);
    }
}

fn message(raw: &RawValue, index: usize, ignored: &mut Ignored) -> Result<ChatMessage, ApiError> {
    let path = format!("messages[{index}]");
    let mut fields = Fields::of_value(raw, &path)?;
    fields.refuse(&["images"])?;
    let Some(role) = fields.string("role")? else { return Err(invalid(&fields.name("role"), "is needed")) };
    let message = ChatMessage {
        role,
        content: fields.string("content")?.unwrap_or_default(),
        name: fields.string("tool_name")?,
        tool_calls: calls(&mut fields)?,
        tool_call_id: fields.string("tool_call_id")?,
        reasoning: fields.string("thinking")?,
    };
    let mut unknown = Ignored::default();
    fields.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("messages[].{name}")));
    Ok(message)
}

/// Gives calls and results that came without an identity one, the same for the same conversation: a result belongs to the first
/// call of its tool that has none yet, or to the first of all. Nine letters and digits, which the strictest templates want.
fn name_calls(messages: &mut [ChatMessage]) {
    let mut num_named = 0u32;
    let mut open: VecDeque<(String, String)> = VecDeque::new();
    let mut new_id = || {
        num_named += 1;
        format!("call{num_named:05}")
    };
    for message in messages {
        for call in &mut message.tool_calls {
            if call.id.is_empty() {
                call.id = new_id();
            }
            open.push_back((call.name.clone(), call.id.clone()));
        }
        if message.role == "tool" {
            let known = message.tool_call_id.as_ref();
            let at = open
                .iter()
                .position(|(name, id)| known.map_or(message.name.as_ref() == Some(name), |known| known == id))
                .or((known.is_none() && !open.is_empty()).then_some(0));
            let id = at.and_then(|at| open.remove(at)).map(|(_, id)| id);
            message.tool_call_id.get_or_insert_with(|| id.unwrap_or_else(&mut new_id));
        }
    }
}

impl Body for GenerateBody {
    fn model(&self) -> Option<&str> {
        self.0.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        fields.refuse(&["images", "template", "context"])?;
        let prompt = fields.string("prompt")?.unwrap_or_default();
        let suffix = fields.string("suffix")?.unwrap_or_default();
        let system = fields.string("system")?.unwrap_or_default();
        let raw = fields.bool("raw")?.unwrap_or(false);
        let mut input = ChatInput::default();
        think(&mut fields, &mut input)?;
        let mut wanted = wanted(&mut fields, limits, Ignored::default())?;
        wanted.input = if !suffix.is_empty() {
            if !system.is_empty() {
                return Err(invalid("system", "cannot be used together with `suffix`"));
            }
            Some(Input::Fim(FimInput { prefix: prompt, suffix, param: "suffix", ..FimInput::default() }))
        } else if prompt.is_empty() {
            None
        } else if raw {
            Some(Input::Text { text: prompt, add_special_tokens: true })
        } else {
            let say = |role: &str, content| ChatMessage { role: role.to_owned(), content, ..ChatMessage::default() };
            if !system.is_empty() {
                input.messages.push(say("system", system));
            }
            input.messages.push(say("user", prompt));
            Some(Input::Chat(input))
        };
        Ok(Self(wanted))
    }

    fn ignored(&self) -> &Ignored {
        &self.0.ignored
    }

    fn note_unread(&mut self, model: &ServedModel) {
        self.0.note_unread(model);
    }
}

impl Body for ShowBody {
    const TASK: Task = Task::Any;

    fn model(&self) -> Option<&str> {
        Some(&self.model)
    }

    fn parse(body: &[u8], _: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let model = match fields.string("model")? {
            Some(model) => Some(model),
            None => fields.string("name")?,
        };
        let Some(model) = model.map(without_tag) else { return Err(invalid("model", "is needed")) };
        let _ = (fields.raw("verbose"), fields.raw("name"));
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { model, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::ToolCall;

    #[test]
    fn results_without_an_identity_find_their_calls() {
        let call =
            |name: &str, id: &str| ToolCall { id: id.to_owned(), name: name.to_owned(), arguments: "{}".to_owned() };
        let result = |name: Option<&str>, id: Option<&str>| ChatMessage {
            role: "tool".to_owned(),
            name: name.map(str::to_owned),
            tool_call_id: id.map(str::to_owned),
            ..ChatMessage::default()
        };
        let calls = vec![call("a", ""), call("b", "mine"), call("a", ""), call("c", "")];
        let mut messages = vec![
            ChatMessage { role: "assistant".to_owned(), tool_calls: calls, ..ChatMessage::default() },
            result(Some("b"), None),
            result(Some("a"), None),
            result(None, Some("call00003")),
            result(None, None),
            result(Some("d"), None),
        ];
        name_calls(&mut messages);
        let ids: Vec<&str> = messages[0].tool_calls.iter().map(|call| call.id.as_str()).collect();
        assert_eq!(ids, ["call00001", "mine", "call00002", "call00003"]);
        let answered: Vec<_> = messages[1..].iter().map(|message| message.tool_call_id.as_deref()).collect();
        assert_eq!(answered, ["mine", "call00001", "call00003", "call00002", "call00004"].map(Some));
    }
}
