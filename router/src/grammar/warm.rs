//! What a grammar is told before choices obey it: the automaton that their outputs will need.

use llguidance::Matcher;

use super::Vocabulary;

/// Outputs that a grammar is walked along when it is compiled, and tokens of each.
const NUM_WALKS: usize = 4;
const STEPS_OF_WALK: usize = 64;
/// Steps of building the automaton after which no walk goes on: half of what one mask may take.
const MAX_WALK_COST: u64 = 100_000;

/// The grammar at its beginning with the automaton that some outputs need, so that choices need not build it each for itself,
/// which is most of what their masks cost.
///
/// Which outputs these are depends on grammar and vocabulary alone, and so does every limit that a choice meets later. A walk
/// that meets one is as if it had not been.
pub(super) fn warmed(start: Matcher, vocabulary: &Vocabulary) -> Matcher {
    let mut walker = start.deep_clone();
    match walk(&mut walker, vocabulary) {
        Some(()) => walker,
        None => start,
    }
}

/// Goes along some outputs and back. `None` where a limit was met.
fn walk(walker: &mut Matcher, vocabulary: &Vocabulary) -> Option<()> {
    let mut random: u64 = 0;
    let mut cost = 0;
    for _ in 0..NUM_WALKS {
        for step in 0..STEPS_OF_WALK {
            if walker.is_stopped() {
                break;
            }
            let mask = walker.compute_mask().ok()?;
            cost += walker.last_step_stats().ok()?.lexer_cost;
            if cost > MAX_WALK_COST {
                break;
            }
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let Some(token_id) = vocabulary.step_of_walk(&mask, step, random) else { break };
            walker.consume_token(token_id).ok()?;
        }
        walker.reset().ok()?;
    }
    walker.compute_mask().ok().map(|_| ())
}

#[cfg(test)]
mod tests {
    use quire_engine::ModelSource;

    use super::*;
    use crate::demo;
    use crate::generation::Limits;
    use crate::grammar::{GrammarLimits, GrammarSource, OutputFormat};
    use crate::served_model::TextSide;
    use crate::tokenizer::TextTokenizer;

    const END: u32 = 2;

    fn vocabulary() -> Vocabulary {
        let text = TextSide::load(&ModelSource::Embedded(&demo::MODEL), &Limits::default()).unwrap();
        let tokenizer = TextTokenizer::load(include_bytes!("../../demo/tokenizer.json"), 0).unwrap();
        let limits = GrammarLimits::default().parser_limits();
        Vocabulary::new(tokenizer.table(), text.num_tokens(), &[END], limits).unwrap()
    }

    #[test]
    fn a_grammar_allows_the_same_after_its_walks_and_builds_less() {
        let vocabulary = vocabulary();
        let person = r#"{"type":"object","properties":{"name":{"type":"string","maxLength":30},"age":{"type":"integer"},
            "tags":{"type":"array","items":{"enum":["a","bc"]}}},"required":["name","age","tags"]}"#;
        for format in [
            OutputFormat::JsonSchema(person.into()),
            OutputFormat::JsonObject,
            OutputFormat::Regex("(foo|ba[rz]+)( [0-9]{1,4}){2,9}".into()),
            OutputFormat::Choice(vec!["yes".into(), "no".into()]),
        ] {
            let source = GrammarSource::of(&format, &GrammarLimits::default()).unwrap();
            let mut cold = Matcher::new(vocabulary.factory().create_parser(source.into_grammar()));
            cold.compute_mask().unwrap();
            let mut warm = warmed(cold.deep_clone(), &vocabulary);
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
    fn a_walk_that_meets_a_limit_leaves_no_trace() {
        let mut vocabulary = vocabulary();
        vocabulary.limit(|limits| limits.max_lexer_states = 40);
        let source = GrammarSource::Lark("start: /[a-z]{1,40}( [0-9]{1,40}){0,30}/".to_owned());
        let mut start = Matcher::new(vocabulary.factory().create_parser(source.into_grammar()));
        start.compute_mask().unwrap();
        assert!(walk(&mut start.deep_clone(), &vocabulary).is_none());
        assert!(warmed(start, &vocabulary).compute_mask().is_ok());
    }
}
