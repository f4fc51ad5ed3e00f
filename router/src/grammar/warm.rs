//! What a grammar is told before choices obey it: the automaton that their outputs will need.

use std::panic::{AssertUnwindSafe, catch_unwind};

use llguidance::{Matcher, TokenParser};

use super::Vocabulary;

/// Outputs that a grammar is walked along when it is compiled, and tokens of each.
const NUM_WALKS: usize = 4;
const STEPS_OF_WALK: usize = 64;
/// After so much work, in units of some 50 ns, no walk goes on.
const MAX_WALK_COST: u64 = 100_000;
/// Nodes of the tree of tokens that are looked at in a unit.
const NODES_PER_UNIT: u64 = 16;

/// A grammar at its beginning.
pub(super) struct Start {
    pub(super) matcher: Matcher,
    /// About what its automaton takes.
    pub(super) num_bytes: usize,
}

/// The grammar with the automaton that some outputs need, so that choices need not build it each for itself, which is most of
/// what their masks cost. `parser` is that of `matcher`, as it was made.
///
/// Which outputs these are depends on grammar and vocabulary alone, and so does every limit that a choice meets later. Walks
/// that meet one, or take half of the states that a choice may have, are as if they had not been.
pub(super) fn warmed(matcher: Matcher, parser: TokenParser, vocabulary: &Vocabulary) -> Start {
    let walk = move || {
        let mut walker = parser;
        let num_bytes = walk(&mut walker, vocabulary)?;
        let mut matcher = Matcher::new(Ok(walker));
        matcher.compute_mask().ok()?;
        Some(Start { matcher, num_bytes })
    };
    // A bug that shows on a walk is no reason to refuse the grammar.
    catch_unwind(AssertUnwindSafe(walk)).ok().flatten().unwrap_or(Start { matcher, num_bytes: 0 })
}

/// Goes along some outputs and back. Returns the bytes of the automaton that is there then; `None` where a limit was met.
fn walk(walker: &mut TokenParser, vocabulary: &Vocabulary) -> Option<usize> {
    if walker.is_fresh() {
        walker.start_without_prompt();
    }
    let mut random: u64 = 0;
    let mut cost = 0;
    for _ in 0..NUM_WALKS {
        for step in 0..STEPS_OF_WALK {
            if walker.stopped() || cost > MAX_WALK_COST {
                break;
            }
            let mask = walker.compute_mask().ok()?;
            let stats = walker.last_step_stats();
            cost += stats.lexer_cost + stats.all_items as u64 + stats.trie_nodes_walked as u64 / NODES_PER_UNIT;
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let Some(token_id) = vocabulary.step_of_walk(&mask, step, random) else { break };
            walker.consume_token(token_id).ok()?;
            walker.check_stop().ok()?;
        }
        walker.reset().ok()?;
    }
    let automaton = walker.parser.lexer_stats();
    (automaton.num_states <= vocabulary.max_automaton_states() / 2).then_some(automaton.num_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::{GrammarLimits, GrammarSource, OutputFormat};

    #[test]
    fn a_grammar_allows_the_same_after_its_walks_and_builds_less() {
        let vocabulary = Vocabulary::of_demo();
        let person = r#"{"type":"object","properties":{"name":{"type":"string","maxLength":30},"age":{"type":"integer"},
            "tags":{"type":"array","items":{"enum":["a","bc"]}}},"required":["name","age","tags"]}"#;
        for format in [
            OutputFormat::JsonSchema(person.into()),
            OutputFormat::JsonObject,
            OutputFormat::Regex("(foo|ba[rz]+)( [0-9]{1,4}){2,9}".into()),
            OutputFormat::Choice(vec!["yes".into(), "no".into()]),
        ] {
            let source = GrammarSource::of(&format, &GrammarLimits::default()).unwrap();
            let parser = vocabulary.factory().create_parser(source.into_grammar()).unwrap();
            let mut cold = Matcher::new(Ok(parser.deep_clone()));
            cold.compute_mask().unwrap();
            let Start { matcher: mut warm, num_bytes } = warmed(cold.deep_clone(), parser, &vocabulary);
            assert!(num_bytes > 0, "{format:?}");
            let (mut random, mut costs) = (3_u64, [0, 0]);
            for step in 0..64 {
                assert_eq!(cold.is_stopped(), warm.is_stopped(), "{format:?} {step}");
                if cold.is_stopped() {
                    break;
                }
                let mask = cold.compute_mask().unwrap();
                assert_eq!(mask, warm.compute_mask().unwrap(), "{format:?} {step}");
                costs[0] += cold.last_step_stats().unwrap().lexer_cost;
                costs[1] += warm.last_step_stats().unwrap().lexer_cost;
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(9);
                let Some(token_id) = vocabulary.step_of_walk(&mask, step + 1, random) else { break };
                cold.consume_token(token_id).unwrap();
                warm.consume_token(token_id).unwrap();
            }
            assert!(costs[1] <= costs[0] / 2, "{format:?}: {costs:?}");
        }
    }

    #[test]
    fn walks_that_meet_a_limit_leave_no_trace() {
        let mut vocabulary = Vocabulary::of_demo();
        let start = |vocabulary: &Vocabulary| {
            let source = GrammarSource::Lark("start: /[a-z]{1,40}( [0-9]{1,40}){0,30}/".to_owned());
            let parser = vocabulary.factory().create_parser(source.into_grammar()).unwrap();
            let mut matcher = Matcher::new(Ok(parser.deep_clone()));
            matcher.compute_mask().unwrap();
            (matcher, parser)
        };
        let (_, mut walker) = start(&vocabulary);
        assert!(walk(&mut walker, &vocabulary).is_some());
        let num_states = walker.parser.lexer_stats().num_states;
        // Fewer than the walks need; and enough for them, but not for as many again.
        for max_states in [num_states / 2, num_states + num_states / 2] {
            vocabulary.limit(|limits| limits.max_lexer_states = max_states);
            let (matcher, parser) = start(&vocabulary);
            assert!(walk(&mut parser.deep_clone(), &vocabulary).is_none(), "{max_states}");
            let mut start = warmed(matcher, parser, &vocabulary);
            assert!(start.matcher.compute_mask().is_ok() && start.num_bytes == 0, "{max_states}");
        }
    }
}
