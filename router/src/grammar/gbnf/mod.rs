//! GBNF, the form in which llama.cpp takes grammars: read within bounds, and written as the compiler reads it.

mod lark;
mod parse;
#[cfg(test)]
mod tests;

pub(super) use lark::to_lark;

/// Whether a grammar is in this form: its first rule is defined by `::=`.
pub(super) fn is_gbnf(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.next().is_some_and(|line| line.trim_start_matches(parse::is_name).trim_start().starts_with("::="))
}

/// A grammar; rules are known by their place.
#[derive(Debug)]
struct Rules {
    bodies: Vec<Expr>,
    root: usize,
}

/// What a rule is made of. Made by [`Expr::seq`] and its like, so that nothing but a whole rule is [`Expr::Empty`].
#[derive(Clone, Debug, PartialEq)]
enum Expr {
    Empty,
    /// One character of these ranges, which are in order and apart.
    Chars(Vec<(char, char)>),
    Seq(Vec<Expr>),
    Any(Vec<Expr>),
    Repeat(Box<Expr>, u32, Option<u32>),
    Rule(usize),
}

impl Expr {
    fn seq(items: Vec<Self>) -> Self {
        let mut items: Vec<Self> = items.into_iter().filter(|item| *item != Self::Empty).collect();
        match items.len() {
            0 => Self::Empty,
            1 => items.remove(0),
            _ => Self::Seq(items),
        }
    }

    fn any(items: Vec<Self>) -> Self {
        let num_items = items.len();
        let mut items: Vec<Self> = items.into_iter().filter(|item| *item != Self::Empty).collect();
        let may_be_empty = items.len() < num_items;
        let any = match items.len() {
            0 => return Self::Empty,
            1 => items.remove(0),
            _ => Self::Any(items),
        };
        if may_be_empty { Self::repeat(any, 0, Some(1)) } else { any }
    }

    fn repeat(item: Self, least: u32, most: Option<u32>) -> Self {
        match (item, most) {
            (Self::Empty, _) | (_, Some(0)) => Self::Empty,
            (item, Some(1)) if least == 1 => item,
            (item, most) => Self::Repeat(Box::new(item), least, most),
        }
    }

    /// Rules that it names. Expressions nest no deeper than the limit that they were read within.
    fn for_each_rule(&self, each: &mut impl FnMut(usize)) {
        match self {
            Self::Rule(index) => each(*index),
            Self::Seq(items) | Self::Any(items) => items.iter().for_each(|item| item.for_each_rule(each)),
            Self::Repeat(item, _, _) => item.for_each_rule(each),
            Self::Empty | Self::Chars(_) => {}
        }
    }
}
