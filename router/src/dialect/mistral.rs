//! Mistral: behind `[TOOL_CALLS]` a list of JSON objects, or `name[ARGS]{...}` once for each call.

use super::scan::{Content, Scanner};
use super::{ParsedCall, Parts, TextParser, json_calls};

pub(super) const MARK: &str = "[TOOL_CALLS]";
const ARGS: &str = "[ARGS]";
pub(super) const MARKS: [&str; 3] = [MARK, ARGS, "[CALL_ID]"];

/// See the module's text. What follows the first mark is calls to its end, or is given back as it was.
#[derive(Default)]
pub(super) struct Parser {
    scanner: Scanner,
    content: Content,
    calls: Option<String>,
}

impl TextParser for Parser {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        if let Some(calls) = &mut self.calls {
            return calls.push_str(text);
        }
        self.scanner.push(text);
        let content = &mut self.content;
        if self.scanner.next(&[MARK], |text| content.push(text, |text| parts.content(text))).is_some() {
            self.calls = Some(self.scanner.take());
        }
    }

    fn finish(&mut self, parts: &mut Parts) {
        match self.calls.take() {
            None => {
                let rest = self.scanner.take();
                self.content.push(&rest, |text| parts.content(text));
            }
            Some(text) => match read(&text) {
                Some(calls) if !calls.is_empty() => {
                    self.content.call();
                    calls.into_iter().for_each(|call| parts.call(call));
                }
                _ => {
                    for text in [MARK, &text] {
                        self.content.push(text, |text| parts.content(text));
                    }
                }
            },
        }
        self.content.finish(|text| parts.content(text));
    }
}

fn read(text: &str) -> Option<Vec<ParsedCall>> {
    if text.trim_start().starts_with(['[', '{']) {
        return json_calls::one_or_list(text);
    }
    text.split(MARK)
        .map(|call| {
            let at = call.find(ARGS).or_else(|| call.find('{'))?;
            let (name, arguments) = call.split_at(at);
            // An identity of its own, in some versions.
            let name = name.split("[CALL_ID]").next().unwrap_or(name).trim();
            let arguments = arguments.strip_prefix(ARGS).unwrap_or(arguments).trim();
            serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(arguments).ok()?;
            (!name.is_empty()).then(|| ParsedCall { name: name.to_owned(), arguments: arguments.to_owned() })
        })
        .collect()
}
