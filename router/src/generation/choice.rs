//! One choice on its way from tokens to text.

use std::sync::Arc;

use quire_scheduler::{FinishReason, TokenLogprobs};

use crate::detokenizer::{Detokenizer, SpecialTokenText, Start, StopAllowed, StopMatcher, StopString, TokenTable};
use crate::dialect::{OutputParser, ParsedCall, ParserOptions, Part, Parts};

use super::{CallHead, GenerationEvent, NamedLogprobs, StopCause, TokenInfo, ToolCall};

/// What all choices of a request share.
pub(super) struct ChoiceRules {
    pub(super) table: Arc<TokenTable>,
    pub(super) stops: Arc<[StopString]>,
    pub(super) include_stop: bool,
    pub(super) min_tokens: u32,
    /// Sorted.
    pub(super) stop_token_ids: Vec<u32>,
    /// The model's own among them.
    pub(super) eos_token_ids: Vec<u32>,
    pub(super) special_tokens: SpecialTokenText,
    /// How reasoning and calls are told from text; `None` where all is text.
    pub(super) answer: Option<AnswerRules>,
}

/// What a chat answer is taken apart into.
pub(super) struct AnswerRules {
    pub(super) parser: ParserOptions,
    /// Special tokens that the parser looks for.
    pub(super) marks: Arc<[u32]>,
    pub(super) include_reasoning: bool,
    /// Whether a choice goes on after its first call.
    pub(super) parallel_tool_calls: bool,
}

impl ChoiceRules {
    /// The token with its bytes, and those of the tokens named beside it.
    pub(super) fn info(&self, token_id: u32, logprobs: Option<TokenLogprobs>, num_chars: u32) -> TokenInfo {
        let logprobs = logprobs.map(|values| NamedLogprobs {
            top_bytes: values.top.iter().map(|(id, _)| self.table.bytes(*id)).collect(),
            values,
        });
        TokenInfo { token_id, bytes: self.table.bytes(token_id), num_chars, logprobs }
    }
}

/// One choice of a request.
pub(super) struct Choice {
    index: u32,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    num_tokens: u32,
    finished: bool,
    parser: Option<OutputParser>,
    parts: Parts,
    num_calls: u32,
    /// What has come of a call that is said in pieces.
    open_call: Option<ToolCall>,
    num_reasoning_tokens: u32,
}

impl Choice {
    pub(super) fn new(index: u32, rules: &ChoiceRules) -> Self {
        let mut detokenizer = Detokenizer::new(Arc::clone(&rules.table), Start::BehindPrompt, rules.special_tokens);
        let parser = rules.answer.as_ref().and_then(|answer| OutputParser::new(&answer.parser));
        if let (Some(answer), Some(_)) = (&rules.answer, &parser) {
            detokenizer = detokenizer.showing(Arc::clone(&answer.marks));
        }
        Self {
            index,
            detokenizer,
            stop: StopMatcher::new(Arc::clone(&rules.stops), rules.include_stop),
            num_tokens: 0,
            finished: false,
            parser,
            parts: Parts::default(),
            num_calls: 0,
            open_call: None,
            num_reasoning_tokens: 0,
        }
    }

    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Tokens that were generated and delivered elsewhere: they count, and nothing of them is said again. Text that they
    /// left incomplete (half a character, the beginning of a stop string) comes with the tokens that follow.
    pub(super) fn replay(&mut self, token_ids: &[u32], rules: &ChoiceRules, mut emit: impl FnMut(GenerationEvent)) {
        for token_id in token_ids {
            self.token(*token_id, None, rules, |event| {
                // Where they were the whole output already, that is still to be said.
                if matches!(event, GenerationEvent::ChoiceFinished { .. }) {
                    emit(event);
                }
            });
        }
    }

    pub(super) fn num_tokens(&self) -> u32 {
        self.num_tokens
    }

    /// Of [`Self::num_tokens`], those of reasoning.
    pub(super) fn num_reasoning_tokens(&self) -> u32 {
        self.num_reasoning_tokens
    }

    /// Whether its last event was sent.
    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// A token arrived. What comes after a stop string is dropped.
    pub(super) fn token(
        &mut self,
        token_id: u32,
        logprobs: Option<TokenLogprobs>,
        rules: &ChoiceRules,
        mut emit: impl FnMut(GenerationEvent),
    ) {
        if self.finished {
            return;
        }
        self.num_tokens += 1;
        let mut decoded = String::new();
        // The engine chooses no stop token before `min_tokens`, so one that arrives ends the choice. It is no text.
        if rules.include_stop || rules.stop_token_ids.binary_search(&token_id).is_err() {
            self.detokenizer.push(token_id, &mut decoded);
        }
        let allowed = if self.num_tokens > rules.min_tokens { StopAllowed::Yes } else { StopAllowed::NotYet };
        let mut text = String::new();
        let found = self.stop.push(&decoded, allowed, &mut text);
        let info = rules.info(token_id, logprobs, decoded.chars().count() as u32);
        let is_last = found.is_some();
        self.say(text, vec![info], is_last, rules, &mut emit);
        if let Some(found) = found
            && !self.finished
        {
            let stop = rules.stops.get(found.index).map(|stop| stop.text().to_owned()).unwrap_or_default();
            self.finished = true;
            emit(GenerationEvent::ChoiceFinished { choice_index: self.index, cause: StopCause::StopString(stop) });
        }
    }

    /// New text and the tokens that it came from, taken apart where that is asked for.
    fn say(
        &mut self,
        text: String,
        mut tokens: Vec<TokenInfo>,
        is_last: bool,
        rules: &ChoiceRules,
        emit: &mut impl FnMut(GenerationEvent),
    ) {
        let choice_index = self.index;
        let (Some(parser), Some(answer)) = (&mut self.parser, &rules.answer) else {
            if !(text.is_empty() && tokens.is_empty()) {
                emit(GenerationEvent::Delta { choice_index, text, tokens });
            }
            return;
        };
        let was_reasoning = parser.is_reasoning();
        parser.push(&text, &mut self.parts);
        if was_reasoning || parser.is_reasoning() {
            self.num_reasoning_tokens += tokens.len() as u32;
        }
        self.say_parts(answer, false, &mut tokens, emit);
        if is_last && !self.finished {
            if let Some(parser) = &mut self.parser {
                parser.finish(&mut self.parts);
            }
            self.say_parts(answer, true, &mut tokens, emit);
        }
        if !tokens.is_empty() {
            emit(GenerationEvent::Delta { choice_index, text: String::new(), tokens });
        }
        if self.finished {
            emit(GenerationEvent::ChoiceFinished { choice_index, cause: StopCause::ToolCalls });
        }
    }

    /// Says what the parser made of a text, or of its end.
    fn say_parts(
        &mut self,
        answer: &AnswerRules,
        is_end: bool,
        tokens: &mut Vec<TokenInfo>,
        emit: &mut impl FnMut(GenerationEvent),
    ) {
        let choice_index = self.index;
        for part in self.parts.drain() {
            match part {
                Part::Content(text) => {
                    emit(GenerationEvent::Delta { choice_index, text, tokens: std::mem::take(tokens) });
                }
                Part::Reasoning(text) if answer.include_reasoning => {
                    emit(GenerationEvent::Reasoning { choice_index, text });
                }
                Part::Reasoning(_) => {}
                Part::CallBegin(name) => {
                    let head = CallHead { id: answer.parser.dialects.call_id(), name };
                    let call = ToolCall { id: head.id.clone(), name: head.name.clone(), arguments: String::new() };
                    self.open_call = Some(call);
                    let (call_index, arguments) = (self.num_calls, String::new());
                    emit(GenerationEvent::ToolCallPiece { choice_index, call_index, head: Some(head), arguments });
                }
                Part::Arguments(arguments) => {
                    if let Some(call) = &mut self.open_call {
                        call.arguments.push_str(&arguments);
                    }
                    let call_index = self.num_calls;
                    emit(GenerationEvent::ToolCallPiece { choice_index, call_index, head: None, arguments });
                }
                Part::CallEnd => {
                    let Some(call) = self.open_call.take() else { continue };
                    let call_index = self.num_calls;
                    self.num_calls += 1;
                    // One that the end cut off is not what was asked for: its end is that of the choice.
                    let is_cut_off = is_end && serde_json::from_str::<serde::de::IgnoredAny>(&call.arguments).is_err();
                    emit(GenerationEvent::ToolCall { choice_index, call_index, call, in_pieces: true });
                    if !is_cut_off && !answer.parallel_tool_calls {
                        self.finished = true;
                        break;
                    }
                }
                Part::Call(ParsedCall { name, arguments }) => {
                    let call_index = self.num_calls;
                    self.num_calls += 1;
                    let call = ToolCall { id: answer.parser.dialects.call_id(), name, arguments };
                    emit(GenerationEvent::ToolCall { choice_index, call_index, call, in_pieces: false });
                    if !answer.parallel_tool_calls {
                        // Whatever comes behind it was not asked for.
                        self.finished = true;
                        break;
                    }
                }
            }
        }
    }

    /// The engine ended the choice well.
    pub(super) fn end(&mut self, reason: FinishReason, rules: &ChoiceRules, mut emit: impl FnMut(GenerationEvent)) {
        if self.finished {
            return;
        }
        let mut decoded = String::new();
        self.detokenizer.finish(&mut decoded);
        let mut text = String::new();
        if self.stop.push(&decoded, StopAllowed::Yes, &mut text).is_none() {
            self.stop.finish(&mut text);
        }
        self.say(text, Vec::new(), true, rules, &mut emit);
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let cause = match reason {
            FinishReason::Stop { .. } if self.num_calls > 0 => StopCause::ToolCalls,
            FinishReason::Stop { token_id } if rules.eos_token_ids.contains(&token_id) => StopCause::EndOfSequence,
            FinishReason::Stop { token_id } => StopCause::StopToken(token_id),
            _ => StopCause::Length,
        };
        emit(GenerationEvent::ChoiceFinished { choice_index: self.index, cause });
    }
}
