//! Conversations: what was said, by whom, and which tools there are.

use serde_json::Value;

/// One message of a conversation, as the chat template sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
    pub name: Option<String>,
    /// Calls that an assistant made.
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool's message: whose result it is.
    pub tool_call_id: Option<String>,
    /// What an assistant thought before it answered.
    pub reasoning: Option<String>,
}

/// What a call begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallHead {
    pub id: String,
    pub name: String,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

/// Something that a model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// JSON schema of the arguments, an object.
    pub parameters: Value,
}

/// Whether tools are called.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ToolChoice {
    /// They are not, and are not told to the model.
    None,
    /// The model decides.
    #[default]
    Auto,
    /// At least one is.
    Required,
    /// This one is.
    Named(String),
}

/// A conversation and how the chat template is to render it.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatInput {
    pub messages: Vec<ChatMessage>,
    /// Whether the prompt ends with the opening of an assistant's message.
    pub add_generation_prompt: bool,
    /// Whether the last message is left open, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Whether the tokenizer adds its own tokens (BOS) too; most templates write them themselves.
    pub add_special_tokens: bool,
    /// Whether the model is to think first, for templates that read it; `None` leaves it undefined.
    pub enable_thinking: Option<bool>,
    /// How much it is to think (`low`, `medium`, `high` and the like), likewise.
    pub reasoning_effort: Option<String>,
    /// Whether an answer has the reasoning beside the content; it is left out otherwise.
    pub include_reasoning: bool,
    pub tools: Vec<Tool>,
    pub tool_choice: ToolChoice,
    /// Whether an answer may have more than one call.
    pub parallel_tool_calls: bool,
    /// Objects that templates for retrieval write into the prompt.
    pub documents: Vec<Value>,
}

impl Default for ChatInput {
    fn default() -> Self {
        Self {
            messages: Vec::new(),
            add_generation_prompt: true,
            continue_final_message: false,
            add_special_tokens: false,
            enable_thinking: None,
            reasoning_effort: None,
            include_reasoning: true,
            tools: Vec::new(),
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            documents: Vec::new(),
        }
    }
}

impl ChatInput {
    /// The tools that the model is told of.
    pub(crate) fn offered_tools(&self) -> &[Tool] {
        if self.tool_choice == ToolChoice::None { &[] } else { &self.tools }
    }

    /// Whether the answer must be calls of tools.
    pub(crate) fn must_call(&self) -> bool {
        matches!(self.tool_choice, ToolChoice::Required | ToolChoice::Named(_)) && !self.tools.is_empty()
    }
}
