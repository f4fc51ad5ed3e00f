//! Tools for models whose chat template knows none: told in words, in the most common dialect.

use serde_json::Value;

use super::ChatMessage;

/// Writes tools, calls and results into the messages' text.
pub(super) fn write_out(messages: &mut Vec<ChatMessage>, tools: Vec<Value>) {
    for message in messages.iter_mut() {
        for call in std::mem::take(&mut message.tool_calls) {
            let name = Value::from(call.name);
            let separator = if message.content.is_empty() { "" } else { "\n" };
            let arguments = call.arguments;
            message.content.push_str(&format!(
                "{separator}<tool_call>\n{{\"name\": {name}, \"arguments\": {arguments}}}\n</tool_call>"
            ));
        }
        if message.role == "tool" {
            message.role = "user".to_owned();
            message.tool_call_id = None;
            message.content = format!("<tool_response>\n{}\n</tool_response>", message.content);
        }
    }
    if tools.is_empty() {
        return;
    }
    let tools: Vec<String> = tools.iter().map(Value::to_string).collect();
    let words = format!(
        "You may call one or more of these functions, described as JSON within <tools></tools>:\n<tools>\n{}\n</tools>\nTo call \
         one, answer with a JSON object that has its name and its arguments within <tool_call></tool_call>:\n<tool_call>\n\
         {{\"name\": \"...\", \"arguments\": {{...}}}}\n</tool_call>",
        tools.join("\n")
    );
    match messages.first_mut() {
        Some(first) if first.role == "system" || first.role == "developer" => {
            first.content = format!("{}\n\n{words}", first.content);
        }
        _ => {
            let system = ChatMessage { role: "system".to_owned(), content: words, ..ChatMessage::default() };
            messages.insert(0, system);
        }
    }
}
