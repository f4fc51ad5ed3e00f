//! What an answer is made of where a dialect gives each part of it an item of its own: thoughts, texts and calls, in order. And
//! the other way: a conversation that comes in such items.

use crate::chat_template::ChatTemplate;
use crate::generation::{ChatInput, ChatMessage, GenerationEvent, TokenInfo, ToolCall};

use super::fields::Ignored;

/// One item of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item {
    Reasoning(String),
    Text {
        text: String,
        /// Those with log probabilities.
        tokens: Vec<TokenInfo>,
    },
    Call(ToolCall),
}

/// Items of an answer as they come; neighbours of one kind become one.
#[derive(Default)]
pub(super) struct Items {
    items: Vec<Item>,
    /// Of a text that has not begun: half a character, or what could have become a stop string.
    waiting: Vec<TokenInfo>,
}

impl Items {
    /// One event of a choice; those that say nothing change nothing.
    pub(super) fn take(&mut self, event: GenerationEvent) {
        match event {
            GenerationEvent::Delta { text, tokens, .. } => self.text(&text, tokens),
            GenerationEvent::Reasoning { text, .. } => self.reasoning(&text),
            GenerationEvent::ToolCall { call, .. } => self.call(call),
            GenerationEvent::PromptLogprobs { .. }
            | GenerationEvent::ToolCallPiece { .. }
            | GenerationEvent::ChoiceFinished { .. }
            | GenerationEvent::Done { .. }
            | GenerationEvent::Error(_) => {}
        }
    }

    pub(super) fn text(&mut self, new: &str, new_tokens: Vec<TokenInfo>) {
        let new_tokens = new_tokens.into_iter().filter(|info| info.logprobs.is_some());
        match self.items.last_mut() {
            Some(Item::Text { text, tokens }) => {
                text.push_str(new);
                tokens.extend(new_tokens);
            }
            _ => {
                self.waiting.extend(new_tokens);
                if !new.is_empty() {
                    let tokens = std::mem::take(&mut self.waiting);
                    self.items.push(Item::Text { text: new.to_owned(), tokens });
                }
            }
        }
    }

    pub(super) fn reasoning(&mut self, new: &str) {
        self.waiting.clear();
        match self.items.last_mut() {
            Some(Item::Reasoning(text)) => text.push_str(new),
            _ => self.items.push(Item::Reasoning(new.to_owned())),
        }
    }

    pub(super) fn call(&mut self, call: ToolCall) {
        self.waiting.clear();
        self.items.push(Item::Call(call));
    }

    /// The last item is this call, of which only the beginning was known.
    pub(super) fn end_call(&mut self, call: ToolCall) {
        if let Some(last @ Item::Call(_)) = self.items.last_mut() {
            *last = Item::Call(call);
        }
    }

    /// An answer of nothing is a text of nothing.
    pub(super) fn ended(mut self) -> Self {
        if self.items.is_empty() {
            self.items.push(Item::Text { text: String::new(), tokens: std::mem::take(&mut self.waiting) });
        }
        self
    }

    pub(super) fn as_slice(&self) -> &[Item] {
        &self.items
    }

    /// All texts, one after the other.
    pub(super) fn all_text(&self) -> String {
        let texts = self.items.iter().map(|item| match item {
            Item::Text { text, .. } => text.as_str(),
            Item::Reasoning(_) | Item::Call(_) => "",
        });
        texts.collect()
    }

    /// All thoughts.
    pub(super) fn all_reasoning(&self) -> String {
        let thoughts = self.items.iter().map(|item| match item {
            Item::Reasoning(text) => text.as_str(),
            Item::Text { .. } | Item::Call(_) => "",
        });
        thoughts.collect()
    }

    pub(super) fn calls(&self) -> impl Iterator<Item = &ToolCall> {
        self.items.iter().filter_map(|item| match item {
            Item::Call(call) => Some(call),
            Item::Text { .. } | Item::Reasoning(_) => None,
        })
    }

    /// The answer as a conversation goes on from it.
    pub(super) fn message(&self) -> ChatMessage {
        let reasoning = self.all_reasoning();
        ChatMessage {
            role: "assistant".to_owned(),
            content: self.all_text(),
            tool_calls: self.calls().cloned().collect(),
            reasoning: (!reasoning.is_empty()).then_some(reasoning),
            ..ChatMessage::default()
        }
    }
}

/// A conversation that comes in items: what the assistant thought, said and called before anyone answered is one message.
#[derive(Default)]
pub(super) struct Turns(Vec<ChatMessage>);

impl Turns {
    /// The assistant's last message while nothing came behind it and `is_open` says so; else a new one.
    fn assistant(&mut self, is_open: impl Fn(&ChatMessage) -> bool) -> &mut ChatMessage {
        let goes_on = self.0.last().is_some_and(|last| last.role == "assistant" && is_open(last));
        if !goes_on {
            self.0.push(ChatMessage { role: "assistant".to_owned(), ..ChatMessage::default() });
        }
        let last = self.0.len() - 1;
        &mut self.0[last]
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        let has_only_thought = |last: &ChatMessage| last.content.is_empty() && last.tool_calls.is_empty();
        self.assistant(has_only_thought).reasoning.get_or_insert_default().push_str(text);
    }

    pub(super) fn call(&mut self, call: ToolCall) {
        self.assistant(|_| true).tool_calls.push(call);
    }

    pub(super) fn result(&mut self, call_id: String, content: String) {
        let role = "tool".to_owned();
        self.0.push(ChatMessage { role, content, tool_call_id: Some(call_id), ..ChatMessage::default() });
    }

    pub(super) fn message(&mut self, role: String, content: String) {
        if role == "assistant" {
            let is_thought =
                |last: &ChatMessage| last.content.is_empty() && last.tool_calls.is_empty() && last.reasoning.is_some();
            self.assistant(is_thought).content = content;
        } else {
            self.0.push(ChatMessage { role, content, ..ChatMessage::default() });
        }
    }

    pub(super) fn into_messages(self) -> Vec<ChatMessage> {
        self.0
    }
}

/// Names what a request says of the model's thinking, under the dialect's own names, where the model's template does not read it.
pub(super) fn note_unread_thinking(
    input: &ChatInput,
    template: &ChatTemplate,
    switch: &str,
    effort: &str,
    ignored: &mut Ignored,
) {
    // The least effort is a switch too.
    let is_switch = input.reasoning_effort.as_deref() == Some("none") && template.reads_thinking();
    if input.reasoning_effort.is_some() && !template.reads_effort() && !is_switch {
        ignored.add(effort);
    }
    if input.enable_thinking.is_some() && !template.reads_thinking() {
        ignored.add(switch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str) -> ToolCall {
        ToolCall { id: format!("call_{name}"), name: name.to_owned(), arguments: "{}".to_owned() }
    }

    #[test]
    fn neighbours_become_one_and_order_stays() {
        let mut items = Items::default();
        items.reasoning("I ");
        items.reasoning("think");
        items.text("", Vec::new());
        items.text("so", Vec::new());
        items.text(" it is", Vec::new());
        items.call(call("a"));
        items.call(call("b"));
        items.text("!", Vec::new());
        let text = |text: &str| Item::Text { text: text.to_owned(), tokens: Vec::new() };
        let expected = [
            Item::Reasoning("I think".to_owned()),
            text("so it is"),
            Item::Call(call("a")),
            Item::Call(call("b")),
            text("!"),
        ];
        assert_eq!(items.as_slice(), expected);
        let message = items.message();
        assert_eq!((message.content.as_str(), message.reasoning.as_deref()), ("so it is!", Some("I think")));
        assert_eq!(message.tool_calls, [call("a"), call("b")]);
        assert_eq!(Items::default().ended().as_slice(), [text("")]);
    }

    #[test]
    fn a_turn_is_one_message() {
        let mut turns = Turns::default();
        turns.message("user".to_owned(), "Go".to_owned());
        turns.reasoning("hm");
        turns.message("assistant".to_owned(), "Let me look.".to_owned());
        turns.call(call("a"));
        turns.call(call("b"));
        turns.result("call_a".to_owned(), "1".to_owned());
        turns.reasoning("so");
        turns.message("assistant".to_owned(), "One.".to_owned());
        turns.message("assistant".to_owned(), "Two.".to_owned());
        let messages = turns.into_messages();
        let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["user", "assistant", "tool", "assistant", "assistant"]);
        assert_eq!((messages[1].reasoning.as_deref(), messages[1].content.as_str()), (Some("hm"), "Let me look."));
        assert_eq!(messages[1].tool_calls, [call("a"), call("b")]);
        assert_eq!((messages[3].reasoning.as_deref(), messages[3].content.as_str()), (Some("so"), "One."));
        assert_eq!((messages[4].reasoning.as_deref(), messages[4].content.as_str()), (None, "Two."));
    }
}
