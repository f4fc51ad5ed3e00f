//! What form an answer must have: the one that was asked for, the calls that must be made, and the thoughts before them.

use std::sync::Arc;

use crate::dialect::{CallRules, ParserOptions, ReasoningDialect, Thinking, enforced};
use crate::error::ApiError;
use crate::grammar::GrammarSource;
use crate::served_model::ServedModel;

use super::choice::AnswerRules;
use super::text::Thought;
use super::{ChatInput, Limits, RequestedFormat, Tool, ToolChoice};

/// What a chat request says of its answer, beside the conversation.
pub(super) struct ChatRules {
    tools: Arc<[Tool]>,
    choice: ToolChoice,
    must_call: bool,
    parallel: bool,
    include_reasoning: bool,
    thinks: bool,
}

impl ChatRules {
    pub(super) fn of(chat: &ChatInput) -> Self {
        Self {
            tools: chat.offered_tools().into(),
            choice: chat.tool_choice.clone(),
            must_call: chat.must_call(),
            parallel: chat.parallel_tool_calls,
            include_reasoning: chat.include_reasoning,
            thinks: chat.enable_thinking != Some(false),
        }
    }

    pub(super) fn into_answer(self, model: &ServedModel, thought: Thought) -> AnswerRules {
        let dialects = *model.dialects();
        AnswerRules {
            marks: dialects.marks().into_iter().filter_map(|mark| model.table().special_id(mark)).collect(),
            parser: ParserOptions { dialects, tools: self.tools, in_thought: thought == Thought::Open },
            include_reasoning: self.include_reasoning,
            parallel_tool_calls: self.parallel,
        }
    }
}

/// The grammar that an answer must obey, if any, and the field that asks for it.
pub(super) fn grammar_of(
    model: &ServedModel,
    limits: &Limits,
    chat: Option<&ChatRules>,
    format: Option<&RequestedFormat>,
    thought: Thought,
) -> Result<Option<(&'static str, GrammarSource)>, ApiError> {
    let Some(chat) = chat else {
        return match format {
            Some(RequestedFormat { param, format }) => {
                let source = GrammarSource::of(format, &limits.grammar).map_err(|error| error.at(param))?;
                Ok(Some((param, source)))
            }
            None => Ok(None),
        };
    };
    let param = match format {
        _ if chat.must_call => "tools",
        Some(format) => format.param,
        None => return Ok(None),
    };
    let named: Vec<Tool>;
    let tools = match &chat.choice {
        ToolChoice::Named(name) => {
            named = chat.tools.iter().filter(|tool| tool.name == *name).cloned().collect();
            &named[..]
        }
        _ => &chat.tools[..],
    };
    let calls = (!tools.is_empty()).then_some(CallRules { tools, parallel: chat.parallel });
    // An answer that must be calls has no other form.
    let format = format.filter(|_| !chat.must_call).map(|requested| &requested.format);
    let thinking = match (model.dialects().reasoning, thought) {
        (Some(ReasoningDialect::Think), Thought::Open) => Thinking::Open,
        (Some(ReasoningDialect::Think), Thought::None) if chat.thinks => Thinking::Optional,
        _ => Thinking::No,
    };
    let source = enforced(model.dialects(), calls, format, thinking, model.table(), &limits.grammar);
    source.map(|source| Some((param, source))).map_err(|error| error.at(param))
}
