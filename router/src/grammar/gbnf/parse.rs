//! From the text of a grammar to its rules. A refusal says where in the text, and repeats nothing of it.

use std::collections::HashMap;

use super::super::{GrammarError, GrammarLimits};
use super::{Expr, Rules};

/// Rules can name each other in a chain as long as there are rules, and compiling recurses over it.
const MAX_RULES: usize = 1024;
/// Repetitions of repetitions of one item.
const MAX_MARKS: usize = 4;

/// Whether a character can be part of a rule's name.
pub(super) fn is_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '-' | '_')
}

/// Reads a grammar.
pub(super) fn parse(text: &str, limits: &GrammarLimits) -> Result<Rules, GrammarError> {
    let mut reader = Reader { text, at: 0, limits, names: HashMap::new(), bodies: Vec::new(), first_use: Vec::new() };
    reader.skip(NewLines::Skipped);
    while reader.peek().is_some() {
        reader.rule()?;
        reader.skip(NewLines::Skipped);
    }
    let Some(root) = reader.names.get("root").copied() else {
        return Err(GrammarError::Invalid { why: "has no rule `root`, which a grammar begins with".to_owned() });
    };
    let mut bodies = Vec::with_capacity(reader.bodies.len());
    for (index, body) in std::mem::take(&mut reader.bodies).into_iter().enumerate() {
        match body {
            Some(body) => bodies.push(body),
            None => return Err(reader.wrong_at(reader.first_use[index], "a rule of this name is not defined")),
        }
    }
    Ok(Rules { bodies, root })
}

/// What is done about the ends of lines.
#[derive(Clone, Copy, PartialEq)]
enum NewLines {
    /// They end a rule.
    Kept,
    Skipped,
}

struct Reader<'t> {
    text: &'t str,
    /// In bytes.
    at: usize,
    limits: &'t GrammarLimits,
    names: HashMap<&'t str, usize>,
    /// `None` while a rule was named and not defined.
    bodies: Vec<Option<Expr>>,
    /// Where each rule was named first.
    first_use: Vec<usize>,
}

impl<'t> Reader<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    /// Takes `mark` where it comes next.
    fn take(&mut self, mark: &str) -> bool {
        let is_next = self.rest().starts_with(mark);
        if is_next {
            self.at += mark.len();
        }
        is_next
    }

    /// White space and comments.
    fn skip(&mut self, new_lines: NewLines) {
        while let Some(character) = self.peek() {
            match character {
                ' ' | '\t' => self.at += 1,
                '\r' | '\n' if new_lines == NewLines::Skipped => self.at += 1,
                '#' => self.at += self.rest().find(['\r', '\n']).unwrap_or(self.rest().len()),
                _ => return,
            }
        }
    }

    fn wrong_at(&self, at: usize, why: &str) -> GrammarError {
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        GrammarError::Invalid { why: format!("cannot be read at line {line}, column {column}: {why}") }
    }

    fn wrong<T>(&self, why: &str) -> Result<T, GrammarError> {
        Err(self.wrong_at(self.at, why))
    }

    fn name(&mut self) -> Result<&'t str, GrammarError> {
        let rest = self.rest();
        let len = rest.find(|character| !is_name(character)).unwrap_or(rest.len());
        if len == 0 {
            return self.wrong("the name of a rule belongs here");
        }
        self.at += len;
        Ok(&rest[..len])
    }

    /// The place of a rule that is named at `at`.
    fn place(&mut self, name: &'t str, at: usize) -> Result<usize, GrammarError> {
        if let Some(index) = self.names.get(name) {
            return Ok(*index);
        }
        if self.bodies.len() == MAX_RULES {
            return Err(GrammarError::TooLarge { what: "the number of its rules", limit: MAX_RULES as u64 });
        }
        let index = self.bodies.len();
        self.names.insert(name, index);
        self.bodies.push(None);
        self.first_use.push(at);
        Ok(index)
    }

    fn rule(&mut self) -> Result<(), GrammarError> {
        let at = self.at;
        let name = self.name()?;
        let index = self.place(name, at)?;
        self.skip(NewLines::Kept);
        if !self.take("::=") {
            return self.wrong("`::=` belongs here");
        }
        if self.bodies[index].is_some() {
            return Err(self.wrong_at(at, "a rule of this name is defined already"));
        }
        self.skip(NewLines::Skipped);
        let body = self.alternatives(0)?;
        self.bodies[index] = Some(body);
        match self.peek() {
            None | Some('\r' | '\n') => Ok(()),
            Some(_) => self.wrong("nothing that a rule is made of"),
        }
    }

    fn alternatives(&mut self, depth: usize) -> Result<Expr, GrammarError> {
        if depth > self.limits.max_depth {
            return Err(GrammarError::TooLarge {
                what: "the nesting of its groups",
                limit: self.limits.max_depth as u64,
            });
        }
        let mut alternatives = vec![self.sequence(depth)?];
        while self.take("|") {
            self.skip(NewLines::Skipped);
            alternatives.push(self.sequence(depth)?);
        }
        Ok(Expr::any(alternatives))
    }

    fn sequence(&mut self, depth: usize) -> Result<Expr, GrammarError> {
        // Inside a group a line may end anywhere.
        let new_lines = if depth > 0 { NewLines::Skipped } else { NewLines::Kept };
        let mut items = Vec::new();
        while let Some(character) = self.peek() {
            let at = self.at;
            let item = match character {
                '"' => self.literal()?,
                '[' => self.class()?,
                '.' => {
                    self.at += 1;
                    Expr::Chars(vec![('\0', char::MAX)])
                }
                '(' => {
                    self.at += 1;
                    self.skip(NewLines::Skipped);
                    let inner = self.alternatives(depth + 1)?;
                    if !self.take(")") {
                        return self.wrong("`)` belongs here");
                    }
                    inner
                }
                '<' | '!' => return self.wrong("tokens cannot be named in a grammar"),
                _ if is_name(character) => {
                    let name = self.name()?;
                    Expr::Rule(self.place(name, at)?)
                }
                _ => break,
            };
            let item = self.repeated(item, new_lines)?;
            items.push(item);
            self.skip(new_lines);
        }
        Ok(Expr::seq(items))
    }

    /// The item with what says how often it comes.
    fn repeated(&mut self, mut item: Expr, new_lines: NewLines) -> Result<Expr, GrammarError> {
        let mut num_marks = 0;
        loop {
            self.skip(new_lines);
            let (least, most) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    self.at += 1;
                    let bounds = self.bounds()?;
                    if self.peek() != Some('}') {
                        return self.wrong("`}` belongs here");
                    }
                    bounds
                }
                _ => return Ok(item),
            };
            self.at += 1;
            num_marks += 1;
            if num_marks > MAX_MARKS {
                return self.wrong("too many repetitions of one item");
            }
            item = Expr::repeat(item, least, most);
        }
    }

    /// `m`, `m,` or `m,n`.
    fn bounds(&mut self) -> Result<(u32, Option<u32>), GrammarError> {
        let least = self.count()?;
        if !self.take(",") {
            return Ok((least, Some(least)));
        }
        self.skip(NewLines::Kept);
        if self.peek() == Some('}') {
            return Ok((least, None));
        }
        let most = self.count()?;
        if most < least {
            return self.wrong("a repetition ends before it begins");
        }
        Ok((least, Some(most)))
    }

    fn count(&mut self) -> Result<u32, GrammarError> {
        self.skip(NewLines::Kept);
        let rest = self.rest();
        let len = rest.find(|character: char| !character.is_ascii_digit()).unwrap_or(rest.len());
        if len == 0 {
            return self.wrong("a whole number belongs here");
        }
        let count = rest[..len].parse::<u32>().ok().filter(|count| u64::from(*count) <= self.limits.max_repeats);
        let Some(count) = count else {
            return Err(GrammarError::TooLarge { what: "a number of repetitions", limit: self.limits.max_repeats });
        };
        self.at += len;
        self.skip(NewLines::Kept);
        Ok(count)
    }

    fn literal(&mut self) -> Result<Expr, GrammarError> {
        let begin = self.at;
        self.at += 1;
        let mut characters = Vec::new();
        while !self.take("\"") {
            match self.peek() {
                None | Some('\r' | '\n') => return Err(self.wrong_at(begin, "a text that does not end")),
                Some(_) => {
                    let character = self.character()?;
                    characters.push(Expr::Chars(vec![(character, character)]));
                }
            }
        }
        Ok(Expr::seq(characters))
    }

    fn class(&mut self) -> Result<Expr, GrammarError> {
        let begin = self.at;
        self.at += 1;
        let is_negated = self.take("^");
        let mut ranges = Vec::new();
        while !self.take("]") {
            match self.peek() {
                None | Some('\r' | '\n') => return Err(self.wrong_at(begin, "a class of characters that does not end")),
                Some(_) => {}
            }
            let first = self.character()?;
            let is_range = self.rest().starts_with('-') && !self.rest().starts_with("-]");
            let last = if is_range {
                self.at += 1;
                self.character()?
            } else {
                first
            };
            if last < first {
                return self.wrong("a range that ends before it begins");
            }
            ranges.push((first, last));
        }
        let ranges = if is_negated { complement(merged(ranges)) } else { merged(ranges) };
        if ranges.is_empty() {
            return Err(self.wrong_at(begin, "a class that no character is in"));
        }
        Ok(Expr::Chars(ranges))
    }

    /// One character, which may be written in another way.
    fn character(&mut self) -> Result<char, GrammarError> {
        let at = self.at;
        let ended = |reader: &Self| reader.wrong_at(at, "a character belongs here");
        let character = self.next().ok_or_else(|| ended(self))?;
        if character != '\\' {
            return Ok(character);
        }
        let digits = match self.next().ok_or_else(|| ended(self))? {
            't' => return Ok('\t'),
            'r' => return Ok('\r'),
            'n' => return Ok('\n'),
            same @ ('\\' | '"' | '[' | ']' | '-' | '^' | '/') => return Ok(same),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => return Err(self.wrong_at(at, "this escape is not known")),
        };
        let code = self.rest().get(..digits).and_then(|code| u32::from_str_radix(code, 16).ok());
        match code.and_then(char::from_u32) {
            Some(character) => {
                self.at += digits;
                Ok(character)
            }
            None => Err(self.wrong_at(at, "this escape is no character")),
        }
    }
}

/// The same characters, in order and apart.
fn merged(mut ranges: Vec<(char, char)>) -> Vec<(char, char)> {
    ranges.sort_unstable();
    let mut apart: Vec<(char, char)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match apart.last_mut() {
            Some((_, end)) if next_char(*end).is_none_or(|next| first <= next) => *end = last.max(*end),
            _ => apart.push((first, last)),
        }
    }
    apart
}

/// All other characters.
fn complement(ranges: Vec<(char, char)>) -> Vec<(char, char)> {
    let mut others = Vec::with_capacity(ranges.len() + 1);
    let mut from = Some('\0');
    for (first, last) in ranges {
        if let (Some(from), Some(to)) = (from, previous_char(first))
            && from <= to
        {
            others.push((from, to));
        }
        from = next_char(last);
    }
    others.extend(from.map(|from| (from, char::MAX)));
    others
}

fn next_char(character: char) -> Option<char> {
    (character..=char::MAX).nth(1)
}

fn previous_char(character: char) -> Option<char> {
    ('\0'..character).next_back()
}
