//! Rules as the compiler reads them.
//!
//! The compiler cuts text into the longest terminals that it finds, which a grammar over characters knows nothing of. So a
//! grammar without recursion becomes one terminal, which is all there is to find; and in a grammar with recursion every terminal
//! is one character, of which none is longer than another. Either way exactly the texts of the grammar are allowed.

use std::fmt::Write as _;

use super::super::{GrammarError, GrammarLimits};
use super::parse::parse;
use super::{Expr, Rules};

/// Translates a grammar. Fails where it is none, naming the place in its text, or is too large.
pub(in super::super) fn to_lark(text: &str, limits: &GrammarLimits) -> Result<String, GrammarError> {
    let rules = parse(text, limits)?;
    let writer = Writer { is_regular: is_regular(&rules) };
    let mut lark = format!("start: {}\n", writer.name(rules.root));
    for index in reachable(&rules) {
        let _ = write!(lark, "{}: ", writer.name(index));
        writer.expr(&rules.bodies[index], &mut lark);
        lark.push('\n');
    }
    Ok(lark)
}

/// Rules that the root leads to, each once.
fn reachable(rules: &Rules) -> Vec<usize> {
    let mut is_found = vec![false; rules.bodies.len()];
    let (mut found, mut next) = (vec![rules.root], 0);
    is_found[rules.root] = true;
    while let Some(index) = found.get(next).copied() {
        next += 1;
        rules.bodies[index].for_each_rule(&mut |named| {
            if !std::mem::replace(&mut is_found[named], true) {
                found.push(named);
            }
        });
    }
    found
}

/// Whether no rule that the root leads to leads to itself: they can be put in an order in which each names earlier ones alone.
fn is_regular(rules: &Rules) -> bool {
    let reachable = reachable(rules);
    let mut num_open = vec![0usize; rules.bodies.len()];
    let mut named_by: Vec<Vec<usize>> = vec![Vec::new(); rules.bodies.len()];
    for index in &reachable {
        rules.bodies[*index].for_each_rule(&mut |named| {
            num_open[*index] += 1;
            named_by[named].push(*index);
        });
    }
    let mut done: Vec<usize> = reachable.iter().copied().filter(|index| num_open[*index] == 0).collect();
    let mut num_done = 0;
    while let Some(index) = done.pop() {
        num_done += 1;
        for namer in &named_by[index] {
            num_open[*namer] -= 1;
            if num_open[*namer] == 0 {
                done.push(*namer);
            }
        }
    }
    num_done == reachable.len()
}

struct Writer {
    is_regular: bool,
}

impl Writer {
    /// Terminals have names in upper case.
    fn name(&self, index: usize) -> String {
        if self.is_regular { format!("R{index}") } else { format!("r{index}") }
    }

    fn expr(&self, expr: &Expr, out: &mut String) {
        match expr {
            Expr::Empty => out.push_str("\"\""),
            Expr::Chars(ranges) => chars(ranges, out),
            Expr::Rule(index) => out.push_str(&self.name(*index)),
            Expr::Seq(items) => self.joined(items, " ", out),
            Expr::Any(items) => self.joined(items, " | ", out),
            Expr::Repeat(item, least, most) => {
                out.push('(');
                self.expr(item, out);
                out.push(')');
                // Writing to a string cannot fail.
                let _ = match (least, most) {
                    (0, None) => write!(out, "*"),
                    (1, None) => write!(out, "+"),
                    (0, Some(1)) => write!(out, "?"),
                    (least, None) => write!(out, "{{{least},}}"),
                    (least, Some(most)) => write!(out, "{{{least},{most}}}"),
                };
            }
        }
    }

    fn joined(&self, items: &[Expr], between: &str, out: &mut String) {
        out.push('(');
        for (index, item) in items.iter().enumerate() {
            out.push_str(if index > 0 { between } else { "" });
            self.expr(item, out);
        }
        out.push(')');
    }
}

/// A class as a regular expression, each character by its number.
fn chars(ranges: &[(char, char)], out: &mut String) {
    out.push_str("/[");
    for (first, last) in ranges {
        let _ = write!(out, "\\x{{{:X}}}-\\x{{{:X}}}", u32::from(*first), u32::from(*last));
    }
    out.push_str("]/");
}
