//! Llama 3.2 and 4: the whole answer is a list of calls in Python, `[name(argument="value"), ...]`.

use serde_json::{Map, Number, Value};

use super::llama::{WholeAnswer, may_begin};
use super::{ParsedCall, Parts, TextParser};

const START: &str = "<|python_start|>";
const END: &str = "<|python_end|>";
pub(super) const MARKS: [&str; 2] = [START, END];
/// Deepest nesting of lists and dictionaries.
const MAX_DEPTH: usize = 64;

/// See the module's text.
#[derive(Default)]
pub(super) struct Parser(WholeAnswer);

impl TextParser for Parser {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        self.0.push(text, |opening| may_begin(opening, "[") || may_begin(opening, START), parts);
    }

    fn finish(&mut self, parts: &mut Parts) {
        let held = self.0.take();
        let body = held.trim();
        let body = body.strip_prefix(START).unwrap_or(body);
        match calls(body.strip_suffix(END).unwrap_or(body)) {
            Some(calls) => calls.into_iter().for_each(|call| parts.call(call)),
            None => parts.content(&held),
        }
    }
}

fn calls(text: &str) -> Option<Vec<ParsedCall>> {
    let mut reader = Reader { rest: text.trim() };
    let mut calls = Vec::new();
    reader.expect('[')?;
    loop {
        calls.push(reader.call()?);
        if !reader.separator(']')? {
            break;
        }
    }
    reader.rest.is_empty().then_some(calls)
}

/// Reads Python's literals from the front of a text.
struct Reader<'t> {
    rest: &'t str,
}

impl Reader<'_> {
    fn expect(&mut self, character: char) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(character)?.trim_start();
        Some(())
    }

    fn accept(&mut self, character: char) -> bool {
        self.expect(character).is_some()
    }

    /// A comma (then more follows, unless it is the last) or the end.
    fn separator(&mut self, end: char) -> Option<bool> {
        let is_separated = self.accept(',');
        if self.accept(end) {
            return Some(false);
        }
        is_separated.then_some(true)
    }

    fn name(&mut self) -> Option<String> {
        let is_part = |character: char| character.is_alphanumeric() || matches!(character, '_' | '.' | '-');
        let end = self.rest.find(|character| !is_part(character)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!name.is_empty()).then(|| name.to_owned())
    }

    fn call(&mut self) -> Option<ParsedCall> {
        let name = self.name()?;
        self.expect('(')?;
        let mut arguments = Map::new();
        if !self.accept(')') {
            loop {
                let argument = self.name()?;
                self.expect('=')?;
                arguments.insert(argument, self.value(1)?);
                if !self.separator(')')? {
                    break;
                }
            }
        }
        Some(ParsedCall { name, arguments: Value::Object(arguments).to_string() })
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        match self.rest.chars().next()? {
            '[' | '(' => {
                let end = if self.rest.starts_with('[') { ']' } else { ')' };
                self.rest = self.rest[1..].trim_start();
                let mut items = Vec::new();
                if !self.accept(end) {
                    loop {
                        items.push(self.value(depth + 1)?);
                        if !self.separator(end)? {
                            break;
                        }
                    }
                }
                Some(Value::Array(items))
            }
            '{' => {
                self.rest = self.rest[1..].trim_start();
                let mut fields = Map::new();
                if !self.accept('}') {
                    loop {
                        let Value::String(key) = self.value(depth + 1)? else { return None };
                        self.expect(':')?;
                        fields.insert(key, self.value(depth + 1)?);
                        if !self.separator('}')? {
                            break;
                        }
                    }
                }
                Some(Value::Object(fields))
            }
            '"' | '\'' => self.string().map(Value::String),
            '0'..='9' | '-' | '+' | '.' => self.number(),
            _ => match self.name()?.as_str() {
                "True" | "true" => Some(Value::Bool(true)),
                "False" | "false" => Some(Value::Bool(false)),
                "None" | "null" => Some(Value::Null),
                _ => None,
            },
        }
    }

    fn number(&mut self) -> Option<Value> {
        let is_part =
            |character: char| character.is_ascii_digit() || matches!(character, '-' | '+' | '.' | 'e' | 'E' | '_');
        let end = self.rest.find(|character| !is_part(character)).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        let text = text.replace('_', "");
        if let Ok(whole) = text.parse::<i64>() {
            return Some(Value::from(whole));
        }
        Number::from_f64(text.parse().ok()?).map(Value::Number)
    }

    fn string(&mut self) -> Option<String> {
        let mut characters = self.rest.char_indices();
        let (_, quote) = characters.next()?;
        let mut text = String::new();
        while let Some((at, character)) = characters.next() {
            match character {
                _ if character == quote => {
                    self.rest = &self.rest[at + 1..];
                    return Some(text);
                }
                '\\' => match characters.next()?.1 {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    '0' => text.push('\0'),
                    kind @ ('x' | 'u' | 'U') => {
                        let len = match kind {
                            'x' => 2,
                            'u' => 4,
                            _ => 8,
                        };
                        let digits: String = characters.by_ref().take(len).map(|(_, digit)| digit).collect();
                        let code = u32::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == len)?;
                        text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
                    }
                    '\n' => {}
                    escaped @ ('\\' | '\'' | '"') => text.push(escaped),
                    other => text.extend(['\\', other]),
                },
                _ => text.push(character),
            }
        }
        None
    }
}
