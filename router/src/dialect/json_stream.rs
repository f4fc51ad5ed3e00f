//! Calls written as JSON, taken apart as they come: once a call's name is known and its arguments begin, both are said, and the
//! arguments go on in pieces. What cannot be read before that is given back; what was begun stands as the model wrote it.

use super::blocks::Block;
use super::scan::Content;
use super::{Parts, json_calls};

/// Finds the end of a JSON object in text that comes in pieces, by its brackets and strings alone.
#[derive(Default)]
pub(super) struct ObjectEnd {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    /// A string holds what no string of JSON does.
    is_broken: bool,
}

impl ObjectEnd {
    /// Inside an object whose first bracket has gone by.
    fn inside() -> Self {
        Self { depth: 1, ..Self::default() }
    }

    /// Whether a string is open that may go on. A line that breaks within one says that its end was forgotten.
    pub(super) fn is_in_string(&self) -> bool {
        self.in_string && !self.is_broken
    }

    /// Cuts `text` behind the bracket that closes the object, where it is there.
    pub(super) fn cut<'t>(&mut self, text: &'t str) -> (&'t str, Option<&'t str>) {
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.in_string => self.is_escaped = true,
                b'"' => self.in_string = !self.in_string,
                0..b' ' if self.in_string => self.is_broken = true,
                b'{' | b'[' if !self.in_string => self.depth += 1,
                b'}' | b']' if !self.in_string => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        let (object, rest) = text.split_at(at + 1);
                        return (object, Some(rest));
                    }
                }
                _ => {}
            }
        }
        (text, None)
    }
}

/// White space of more bytes is no part of a call: what looks for its end looks at so many bytes at most, again and again.
const MAX_SPACE: usize = 256;

/// What stands behind white space.
pub(super) enum Behind {
    /// Nothing yet.
    Unknown,
    /// This character, at this byte.
    First(usize, char),
    /// More white space than calls have.
    Space,
}

/// Looks behind the white space at the beginning of `text`.
pub(super) fn behind_space(text: &str) -> Behind {
    for (at, character) in text.char_indices() {
        if at >= MAX_SPACE {
            return Behind::Space;
        }
        if !character.is_whitespace() {
            return Behind::First(at, character);
        }
    }
    if text.len() >= MAX_SPACE { Behind::Space } else { Behind::Unknown }
}

/// Whether an object of JSON begins here, white space before it left out; `None` until enough has come.
pub(super) fn opens_object(text: &str) -> Option<bool> {
    match behind_space(text) {
        Behind::Unknown => None,
        Behind::First(at, '{') => match behind_space(&text[at + 1..]) {
            Behind::Unknown => None,
            Behind::First(_, first) => Some(matches!(first, '"' | '}')),
            Behind::Space => Some(false),
        },
        Behind::First(..) | Behind::Space => Some(false),
    }
}

/// Reads objects with a name and arguments: one, several with commas or semicolons between them, or a list of them.
#[derive(Default)]
pub(super) struct JsonCalls {
    state: State,
    /// What has come since the last call.
    raw: String,
    in_list: bool,
    pub(super) num_calls: usize,
}

#[derive(Default)]
enum State {
    /// Before an object.
    #[default]
    Between,
    /// In an object whose arguments have not begun.
    Head(Head),
    Arguments(ObjectEnd),
    /// Behind the arguments.
    Tail(ObjectEnd),
}

/// What is known of an object so far. Each byte is looked at once.
#[derive(Default)]
struct Head {
    /// Where in the raw text the object begins, and what was not looked at yet.
    start: usize,
    at: usize,
    /// Brackets that are open within the object.
    depth: usize,
    /// Where the open string begins.
    string: Option<usize>,
    is_escaped: bool,
    /// See [`ObjectEnd`].
    is_broken: bool,
    place: Place,
    key: String,
    name: Option<String>,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    #[default]
    Key,
    Value,
    Behind,
}

enum Seen {
    /// The arguments begin at this byte.
    Arguments(usize),
    /// The object ends before this one.
    End(usize),
}

impl Head {
    fn look(&mut self, raw: &str) -> Option<Seen> {
        let bytes = raw.as_bytes();
        while let Some(&byte) = bytes.get(self.at) {
            let at = self.at;
            self.at += 1;
            if let Some(start) = self.string {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    0..b' ' => self.is_broken = true,
                    b'"' => {
                        self.string = None;
                        if self.depth == 0 {
                            self.end_string(&raw[start..=at]);
                        }
                    }
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.string = Some(at),
                b'{' if self.depth == 0
                    && self.place == Place::Value
                    && matches!(self.key.as_str(), "arguments" | "parameters")
                    && self.name.is_some() =>
                {
                    return Some(Seen::Arguments(at));
                }
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth == 0 => return Some(Seen::End(at + 1)),
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        self.place = Place::Behind;
                    }
                }
                b':' if self.depth == 0 => self.place = Place::Value,
                b',' if self.depth == 0 => self.place = Place::Key,
                _ => {}
            }
        }
        None
    }

    /// A string of the object itself is whole, quotes included.
    fn end_string(&mut self, string: &str) {
        match self.place {
            Place::Key => self.key = string[1..string.len() - 1].to_owned(),
            Place::Value if self.key == "name" => {
                self.name = serde_json::from_str(string).ok().filter(|name: &String| !name.is_empty());
            }
            Place::Value | Place::Behind => {}
        }
        self.place = Place::Behind;
    }
}

impl JsonCalls {
    /// Takes text in. What cannot be read comes back, with all behind it: nothing is read any more then.
    pub(super) fn push(&mut self, text: &str, parts: &mut Parts) -> Option<String> {
        let mut text = text;
        loop {
            match &mut self.state {
                State::Between => {
                    let begins =
                        |character: char| !(character.is_whitespace() || matches!(character, '[' | ']' | ',' | ';'));
                    let Some(at) = text.find(begins) else {
                        self.raw.push_str(text);
                        return None;
                    };
                    let (before, rest) = text.split_at(at);
                    self.raw.push_str(before);
                    if !rest.starts_with('{') || !self.may_begin() {
                        return Some(std::mem::take(&mut self.raw) + rest);
                    }
                    let start = self.raw.len();
                    self.raw.push('{');
                    self.state = State::Head(Head { start, at: start + 1, ..Head::default() });
                    text = &rest[1..];
                }
                State::Head(head) => {
                    self.raw.push_str(text);
                    match head.look(&self.raw)? {
                        Seen::Arguments(at) => {
                            parts.begin_call(head.name.take().unwrap_or_default());
                            self.num_calls += 1;
                            let rest = self.raw.split_off(at);
                            self.raw.clear();
                            self.state = State::Arguments(ObjectEnd::default());
                            // The rest is looked at again, but only that of this piece of text.
                            return self.push(&rest, parts);
                        }
                        Seen::End(at) => {
                            let Some(call) = json_calls::one(&self.raw[head.start..at]) else {
                                return Some(std::mem::take(&mut self.raw));
                            };
                            parts.call(call);
                            self.num_calls += 1;
                            let rest = self.raw.split_off(at);
                            self.raw.clear();
                            self.state = State::Between;
                            return self.push(&rest, parts);
                        }
                    }
                }
                State::Arguments(end) => {
                    let (piece, rest) = end.cut(text);
                    parts.arguments(piece);
                    text = rest?;
                    parts.end_call();
                    self.state = State::Tail(ObjectEnd::inside());
                }
                State::Tail(end) => {
                    let (piece, rest) = end.cut(text);
                    self.raw.push_str(piece);
                    text = rest?;
                    if serde_json::from_str::<serde::de::IgnoredAny>(&format!("{{\"\":0{}", self.raw)).is_err() {
                        return Some(std::mem::take(&mut self.raw) + text);
                    }
                    self.raw.clear();
                    self.state = State::Between;
                }
            }
        }
    }

    fn is_in_string(&self) -> bool {
        match &self.state {
            State::Between => false,
            State::Head(head) => head.string.is_some() && !head.is_broken,
            State::Arguments(end) | State::Tail(end) => end.is_in_string(),
        }
    }

    /// Whether an object may begin behind what came since the last one.
    fn may_begin(&mut self) -> bool {
        let between: String = self.raw.split_whitespace().collect();
        match (self.num_calls, between.as_str()) {
            (0, "") => true,
            (0, "[") => {
                self.in_list = true;
                true
            }
            (0, _) => false,
            (_, separator) => {
                separator == if self.in_list { "," } else { ";" } || (!self.in_list && separator.is_empty())
            }
        }
    }

    /// The text is over. What was not read comes back.
    pub(super) fn finish(&mut self, parts: &mut Parts) -> Option<String> {
        let raw = std::mem::take(&mut self.raw);
        match std::mem::take(&mut self.state) {
            // It was cut off.
            State::Arguments(_) => parts.end_call(),
            State::Between | State::Tail(_) if self.num_calls > 0 => {
                let is_end = raw.chars().all(|character| character.is_whitespace() || matches!(character, ']' | ';'));
                return (!is_end).then_some(raw);
            }
            State::Between | State::Head(_) | State::Tail(_) => return Some(raw),
        }
        None
    }
}

/// A stretch of text between marks that is calls, or is given back.
pub(super) struct CallBlock {
    /// What it began with.
    begin: String,
    /// `None` once something could not be read: the rest is content.
    calls: Option<JsonCalls>,
}

impl CallBlock {
    pub(super) fn new(begin: String) -> Self {
        Self { begin, calls: Some(JsonCalls::default()) }
    }

    fn give_back(&mut self, unread: &str, content: &mut Content, parts: &mut Parts) {
        for text in [&std::mem::take(&mut self.begin), unread] {
            content.push(text, |text| parts.content(text));
        }
    }
}

impl Block for CallBlock {
    fn push(&mut self, text: &str, content: &mut Content, parts: &mut Parts) {
        let Some(calls) = &mut self.calls else { return content.push(text, |text| parts.content(text)) };
        let before = calls.num_calls;
        let unread = calls.push(text, parts);
        if calls.num_calls > before {
            content.call();
            self.begin.clear();
        }
        if let Some(unread) = unread {
            self.calls = None;
            self.give_back(&unread, content, parts);
        }
    }

    fn is_in_value(&mut self) -> bool {
        self.calls.as_ref().is_some_and(JsonCalls::is_in_string)
    }

    fn end(mut self, end: &str, content: &mut Content, parts: &mut Parts) {
        let unread = match &mut self.calls {
            Some(calls) => calls.finish(parts),
            None => Some(String::new()),
        };
        if let Some(unread) = unread {
            self.give_back(&unread, content, parts);
            content.push(end, |text| parts.content(text));
        }
    }
}
