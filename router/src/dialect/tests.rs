//! Every dialect over one list: what the model wrote, and the parts that it is.

use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn tools() -> Arc<[Tool]> {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}});
    Arc::new([Tool { name: "weather".to_owned(), description: None, parameters }])
}

fn options(tools_dialect: ToolParserChoice, reasoning: ReasoningParserChoice, in_thought: bool) -> ParserOptions {
    ParserOptions { dialects: Dialects::detect("", tools_dialect, reasoning), tools: tools(), in_thought }
}

/// The parts of a text that comes in pieces, neighbours of one kind joined.
fn parse<'t>(options: &ParserOptions, pieces: impl IntoIterator<Item = &'t str>) -> Vec<Part> {
    let mut parser = OutputParser::new(options).expect("there is something to find");
    let mut joined = Parts::default();
    let mut open: Option<ParsedCall> = None;
    let mut join = |parts: &mut Parts| {
        for part in parts.drain() {
            match part {
                Part::Content(text) => joined.content(&text),
                Part::Reasoning(text) => joined.reasoning(&text),
                Part::Call(call) => joined.call(call),
                Part::CallBegin(name) => {
                    assert!(open.is_none(), "one call at a time");
                    open = Some(ParsedCall { name, arguments: String::new() });
                }
                Part::Arguments(text) => open.as_mut().expect("of a call").arguments.push_str(&text),
                Part::CallEnd => joined.call(open.take().expect("a call began")),
            }
        }
    };
    let mut parts = Parts::default();
    for piece in pieces {
        parser.push(piece, &mut parts);
        join(&mut parts);
    }
    parser.finish(&mut parts);
    join(&mut parts);
    assert!(open.is_none(), "every call ends");
    joined.drain().collect()
}

fn content(text: &str) -> Part {
    Part::Content(text.to_owned())
}

fn reasoning(text: &str) -> Part {
    Part::Reasoning(text.to_owned())
}

fn call(name: &str, arguments: Value) -> Part {
    Part::Call(ParsedCall { name: name.to_owned(), arguments: arguments.to_string() })
}

/// Calls with their arguments' white space left out, so that what the model wrote and what is expected compare.
fn compact(parts: Vec<Part>) -> Vec<Part> {
    parts
        .into_iter()
        .map(|part| match part {
            Part::Call(ParsedCall { name, arguments }) => {
                let arguments: Value = serde_json::from_str(&arguments).expect("arguments are JSON");
                Part::Call(ParsedCall { name, arguments: arguments.to_string() })
            }
            other => other,
        })
        .collect()
}

fn cases() -> Vec<(ParserOptions, &'static str, Vec<Part>)> {
    use ReasoningParserChoice as R;
    use ToolParserChoice as T;
    let paris = || call("weather", json!({"city": "Paris"}));
    let rome = || call("weather", json!({"city": "Rome", "days": 2}));
    let plain = |dialect| options(dialect, R::None, false);
    vec![
        (plain(T::Hermes), "Just text.\n", vec![content("Just text.\n")]),
        (
            plain(T::Hermes),
            "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n\
             <tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\", \"days\": 2}}</tool_call>\n",
            vec![content("Let me see."), paris(), rome()],
        ),
        (
            plain(T::Hermes),
            "<tool_call>{\"name\": \"weather\", \"arguments\": \"{\\\"city\\\": \\\"Paris\\\"}\"}",
            vec![paris()],
        ),
        (
            plain(T::Hermes),
            "a <tool_call>{\"name\": }</tool_call> b </tool_call> <tool_cal",
            vec![content("a <tool_call>{\"name\": }</tool_call> b </tool_call> <tool_cal")],
        ),
        (plain(T::Hermes), "<tool_call>[1, 2", vec![content("<tool_call>[1, 2")]),
        // Marks within values are what the values say.
        (
            plain(T::Hermes),
            "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"\\\"</tool_call><tool_call>\"}}\n</tool_call> ok",
            vec![call("weather", json!({"city": "\"</tool_call><tool_call>"})), content(" ok")],
        ),
        (
            plain(T::Hermes),
            "<tool_call>{\"id\": \"</tool_call>\", \"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}, \
             \"why\": \"</tool_call>\"}</tool_call>",
            vec![paris()],
        ),
        // A string without its end goes on to the end of the line.
        (
            plain(T::Hermes),
            "<tool_call>{\"name\": \"weather}\n</tool_call> a <tool_call>{\"name\": \"weather\", \
             \"arguments\": {\"city\": \"Paris\"}}</tool_call>",
            vec![content("<tool_call>{\"name\": \"weather}\n</tool_call> a"), paris()],
        ),
        (plain(T::Llama3Json), "  {\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}\n", vec![paris()]),
        (
            plain(T::Llama3Json),
            "<|python_tag|>{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}; \
             {\"name\": \"weather\", \"parameters\": {\"city\": \"Rome\", \"days\": 2}}",
            vec![paris(), rome()],
        ),
        (plain(T::Llama3Json), "{\"city\": \"Paris\"}", vec![content("{\"city\": \"Paris\"}")]),
        (plain(T::Llama3Json), "It is {\"name\": 1}", vec![content("It is {\"name\": 1}")]),
        (
            plain(T::Pythonic),
            "[weather(city='Paris'), weather(city=\"Rome\", days=2,), f()]",
            vec![paris(), rome(), call("f", json!({}))],
        ),
        (
            plain(T::Pythonic),
            "<|python_start|>[a.b(x=[1, -2.5, True, None], y={'k': \"v\\n\\u00e9\"}, z=())]<|python_end|>",
            vec![call("a.b", json!({"x": [1, -2.5, true, null], "y": {"k": "v\né"}, "z": []}))],
        ),
        (plain(T::Pythonic), "[1, 2, 3]", vec![content("[1, 2, 3]")]),
        (plain(T::Pythonic), "[f(x=open('/etc/passwd'))]", vec![content("[f(x=open('/etc/passwd'))]")]),
        (
            plain(T::Mistral),
            "Well. [TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}, \
             {\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\", \"days\": 2}}]",
            vec![content("Well."), paris(), rome()],
        ),
        (
            plain(T::Mistral),
            "[TOOL_CALLS]weather[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]weather{\"city\": \"Rome\", \"days\": 2}",
            vec![paris(), rome()],
        ),
        (plain(T::Mistral), "[TOOL_CALLS] never mind", vec![content("[TOOL_CALLS] never mind")]),
        (
            plain(T::DeepseekV3),
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Paris\"}\n```\
             <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Rome\", \"days\": 2}\
             <｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            vec![paris(), rome()],
        ),
        (
            plain(T::DeepseekV3),
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n{}<｜tool▁calls▁end｜>",
            vec![content(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n{}<｜tool▁calls▁end｜>",
            )],
        ),
        (
            plain(T::Qwen3Coder),
            "<tool_call>\n<function=weather>\n<parameter=city>\n</tool_call>\n</parameter>\n</function>\n</tool_call>",
            vec![call("weather", json!({"city": "</tool_call>"}))],
        ),
        (
            plain(T::Qwen3Coder),
            "<tool_call><function=a><parameter=x>1</function></tool_call> t <tool_call><function=weather>\
             <parameter=city>Paris</parameter></function></tool_call>",
            vec![content("<tool_call><function=a><parameter=x>1</function></tool_call> t"), paris()],
        ),
        (
            plain(T::DeepseekV3),
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"<｜tool▁calls▁end｜>\"}\
             <｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            vec![call("weather", json!({"city": "<｜tool▁calls▁end｜>"}))],
        ),
        (
            plain(T::Qwen3Coder),
            "Sure.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n\
             </function>\n</tool_call>",
            vec![content("Sure."), rome()],
        ),
        (
            plain(T::Qwen3Coder),
            "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=other>\n[1]\n</parameter>\n</function>\n</tool_call>",
            vec![call("weather", json!({"city": "12", "other": [1]}))],
        ),
        (
            options(T::Hermes, R::Think, false),
            " <think>\nHm.\n\n Yes. \n</think>\n\nHello <think> there",
            vec![reasoning("Hm.\n\n Yes."), content("Hello <think> there")],
        ),
        (
            options(T::Hermes, R::Think, true),
            "Hm.</think><tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}</tool_call>",
            vec![reasoning("Hm."), paris()],
        ),
        (options(T::Hermes, R::Think, false), " \n <thin", vec![content(" \n <thin")]),
        (options(T::Hermes, R::Think, true), "Never done </thin", vec![reasoning("Never done </thin")]),
        (
            options(T::Harmony, R::Harmony, false),
            "<|channel|>analysis<|message|>Hm. <b>\n<|end|><|start|>assistant<|channel|>commentary to=functions.weather \
             <|constrain|>json<|message|>{\"city\": \"Paris\"}<|call|>",
            vec![reasoning("Hm. <b>\n"), paris()],
        ),
        (
            options(T::Harmony, R::Harmony, false),
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!",
            vec![reasoning("Hm."), content("Hi!")],
        ),
        (
            options(T::Harmony, R::Harmony, false),
            "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{\"city\": \"Rome\", \"days\": 2}",
            vec![rome()],
        ),
        (options(T::Harmony, R::Harmony, false), "No channels here", vec![content("No channels here")]),
    ]
}

#[test]
fn each_dialect_is_taken_apart() {
    for (options, text, expected) in cases() {
        assert_eq!(compact(parse(&options, [text])), expected, "{text}");
    }
}

#[test]
fn one_character_at_a_time_gives_the_same() {
    for (options, text, expected) in cases() {
        let pieces: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(compact(parse(&options, pieces.iter().map(String::as_str))), expected, "{text}");
    }
}

/// Texts made of what the dialects look for and what comes close to it.
fn any_text() -> impl Strategy<Value = String> {
    let scraps = [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|start|>",
        "<|call|>",
        "analysis",
        "final",
        "commentary to=functions.f ",
        "<function=weather>",
        "</function>",
        "<parameter=city>",
        "</parameter>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "```json",
        "{\"name\": \"f\", \"arguments\": {}}",
        "{",
        "}",
        "[",
        "]",
        "[f(a=1)]",
        ";",
        "\n",
        " ",
        "x",
        "é",
        "<",
        "</",
        "<|",
        "[TOOL",
        "{\"name\"",
        "{\"name\": \"f\", \"arguments\": {\"a\": \"",
        "\"",
        "\\",
        "<|python_tag|>",
        "\u{1f600}",
    ];
    prop::collection::vec(prop::sample::select(scraps.to_vec()), 0..24).prop_map(|scraps| scraps.concat())
}

fn all_options() -> Vec<ParserOptions> {
    use ReasoningParserChoice as R;
    use ToolParserChoice as T;
    let dialects = [T::Hermes, T::Llama3Json, T::Pythonic, T::Mistral, T::DeepseekV3, T::Qwen3Coder];
    let mut all: Vec<ParserOptions> = dialects.into_iter().map(|dialect| options(dialect, R::None, false)).collect();
    all.extend(dialects.into_iter().map(|dialect| options(dialect, R::Think, dialect == T::Mistral)));
    all.push(options(T::Harmony, R::Harmony, false));
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_cut_gives_the_same_parts(text in any_text(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
        let mut places: Vec<usize> = cuts
            .iter()
            .map(|cut| cut.index(text.len() + 1))
            .filter(|place| text.is_char_boundary(*place))
            .collect();
        places.extend([0, text.len()]);
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect();
        for options in all_options() {
            let whole = parse(&options, [text.as_str()]);
            prop_assert_eq!(&parse(&options, pieces.iter().copied()), &whole, "{:?}", options.dialects);
            // Text without a call is given back, white space around thoughts apart.
            if options.dialects.reasoning.is_none() && !whole.iter().any(|part| matches!(part, Part::Call(_))) {
                let back: Vec<Part> = if text.is_empty() { vec![] } else { vec![content(&text)] };
                prop_assert_eq!(whole, back);
            }
        }
    }
}

#[test]
fn hostile_output_takes_linear_time() {
    let units = [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think",
        "<",
        " ",
        "\n",
        "{",
        "[",
        "[f(a=",
        "[TOOL_CALLS]",
        "<|channel|>",
        "<|message|>",
        "{\"name\": \"f\", \"arguments\": {}}",
        "<tool_call>{}</tool_call>",
        "<function=a><parameter=b>",
        "\\\"",
        "a",
        "<｜tool▁call▁begin｜>",
        "((((",
        "[TOOL_CALLS]f{}",
        "{\"name\": \"f\", \"arguments\": {",
        "; ",
    ];
    // What the repeated part may come behind.
    let openings = [
        "",
        "[TOOL_CALLS]",
        "[TOOL_CALLS]f{",
        "[TOOL_CALLS]f{}",
        "<tool_call>{\"name\": \"f\", ",
        "<tool_call>{\"name\": \"",
        "<tool_call><function=f><parameter=a>",
        "<|python_tag|>",
    ];
    for (options, opening) in all_options().iter().flat_map(|options| openings.map(|opening| (options, opening))) {
        for unit in units {
            let time = |bytes: usize| {
                let text = opening.to_owned() + &unit.repeat(bytes / unit.len());
                // The best of a few, since other work shares the cores.
                let once = |_| {
                    let start = Instant::now();
                    // In pieces of the size of a token.
                    let mut rest = text.as_str();
                    let mut pieces = Vec::new();
                    while !rest.is_empty() {
                        let len = rest.char_indices().nth(5).map_or(rest.len(), |(at, _)| at);
                        let (piece, others) = rest.split_at(len);
                        pieces.push(piece);
                        rest = others;
                    }
                    parse(options, pieces);
                    start.elapsed().as_secs_f64()
                };
                (0..2).map(once).fold(f64::INFINITY, f64::min)
            };
            let (short, long) = (time(1 << 14), time(1 << 16));
            // Four times the text; a quadratic step would take sixteen times as long.
            assert!(
                long < short * 10.0 + 0.02,
                "{:?} {opening:?} {unit:?}: {short} s, then {long} s",
                options.dialects
            );
        }
    }
}

#[test]
fn dialects_show_in_templates() {
    use ReasoningParserChoice as R;
    use ToolParserChoice as T;
    let detect = |template: &str| {
        let Dialects { tools, reasoning, .. } = Dialects::detect(template, T::Auto, R::Auto);
        (tools, reasoning)
    };
    let think = Some(ReasoningDialect::Think);
    assert_eq!(detect("{% if tools %}<tool_call>{% endif %}"), (ToolDialect::Hermes, None));
    assert_eq!(detect("<tool_call> {{ content.split('</think>') }}"), (ToolDialect::Hermes, think));
    assert_eq!(detect("<tool_call><function=x>"), (ToolDialect::Qwen3Coder, None));
    assert_eq!(detect("[AVAILABLE_TOOLS] [TOOL_CALLS]"), (ToolDialect::Mistral, None));
    assert_eq!(detect("<｜tool▁calls▁begin｜> </think>"), (ToolDialect::DeepseekV3, think));
    assert_eq!(detect("<|start|>assistant<|channel|>"), (ToolDialect::Harmony, Some(ReasoningDialect::Harmony)));
    assert_eq!(detect("{\"name\": f, \"parameters\": dictionary}"), (ToolDialect::Llama3Json, None));
    assert_eq!(detect("<|python_start|>"), (ToolDialect::Pythonic, None));
    assert_eq!(detect("<|im_start|>"), (ToolDialect::Hermes, None));
    let told = Dialects::detect("[TOOL_CALLS] </think>", T::Hermes, R::None);
    assert_eq!((told.tools, told.reasoning), (ToolDialect::Hermes, None));
}

/// Of each dialect whose arguments are JSON: a call begins before its arguments are there, and they come as they are written.
#[test]
fn arguments_come_in_pieces() {
    use ReasoningParserChoice as R;
    use ToolParserChoice as T;
    let arguments = r#"{"city": "a } \\\" { b", "days": [1, {"x": 2}]}"#;
    let in_json = format!(r#"{{"id": "7", "name": "weather", "arguments": {arguments}}}"#);
    for (dialect, text) in [
        (T::Hermes, format!("<tool_call>\n{in_json}\n</tool_call>")),
        (T::Llama3Json, in_json.replace("arguments", "parameters")),
        (T::Mistral, format!("[TOOL_CALLS][{in_json}]")),
        (T::Mistral, format!("[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{arguments}")),
        (
            T::DeepseekV3,
            format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"),
        ),
        (T::Harmony, format!("<|channel|>commentary to=functions.weather<|message|>{arguments} <|call|>")),
    ] {
        let options = options(dialect, if dialect == T::Harmony { R::Harmony } else { R::None }, false);
        let mut parser = OutputParser::new(&options).expect("there is something to find");
        let (mut said, mut pieces) = (Vec::new(), 0);
        for character in text.chars() {
            let mut parts = Parts::default();
            parser.push(&character.to_string(), &mut parts);
            for part in parts.drain() {
                pieces += usize::from(matches!(part, Part::Arguments(_)));
                said.push(part);
            }
        }
        let mut parts = Parts::default();
        parser.finish(&mut parts);
        said.extend(parts.drain());
        assert_eq!(said.first(), Some(&Part::CallBegin("weather".to_owned())), "{text}");
        assert_eq!(said.last(), Some(&Part::CallEnd), "{text}");
        assert!(pieces > arguments.len() / 2, "{text}: {pieces} pieces");
        let joined: String = said
            .iter()
            .filter_map(|part| if let Part::Arguments(text) = part { Some(text.as_str()) } else { None })
            .collect();
        assert_eq!(joined, arguments, "{text}");
        // Cut off anywhere within the arguments the call stands as far as it came.
        let cut = text.find("[1,").expect("a list");
        let whole = parse(&options, [&text[..cut]]);
        let Some(Part::Call(call)) = whole.last() else { panic!("{whole:?}") };
        assert_eq!(
            (call.name.as_str(), call.arguments.trim_end()),
            ("weather", arguments[..arguments.find("[1,").unwrap()].trim_end())
        );
    }
}

#[test]
fn what_follows_a_call_and_is_none_is_content() {
    use ToolParserChoice as T;
    let one = r#"{"name": "weather", "arguments": {"days": 1}}"#;
    for (dialect, text, rest) in [
        (T::Hermes, format!("<tool_call>{one} more</tool_call> end"), " more</tool_call> end"),
        (T::Llama3Json, format!("{one} more"), " more"),
        (T::Mistral, format!("[TOOL_CALLS][{one}, 5]"), ", 5]"),
        (T::Mistral, "[TOOL_CALLS]weather{\"days\": 1} more".to_owned(), " more"),
    ] {
        let options = options(dialect, ReasoningParserChoice::None, false);
        let expected = vec![call("weather", json!({"days": 1})), content(rest)];
        assert_eq!(compact(parse(&options, [text.as_str()])), expected, "{text}");
    }
}
