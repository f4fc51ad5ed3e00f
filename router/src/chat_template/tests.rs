//! What templates can do, and what they cannot.

use std::time::{Duration, Instant};

use super::*;
use crate::generation::ToolCall;

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned(), ..ChatMessage::default() }
}

fn options() -> RenderOptions {
    RenderOptions { add_generation_prompt: true, now_seconds: 1_795_000_000, ..RenderOptions::default() }
}

fn render(template: &str, messages: &[ChatMessage]) -> Result<String, TemplateError> {
    let special_tokens = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    ChatTemplate::compile(template, special_tokens, &Limits::default()).expect("compiles").render(messages, options())
}

#[test]
fn renders_what_models_ship() {
    let check = |template: &str, expected: &str| {
        let messages = [message("system", "Be brief."), message("user", "Hi"), message("assistant", " Yo ")];
        assert_eq!(render(template, &messages).expect("renders"), expected, "{template}");
    };
    check(
        "{% for message in messages %}\n    {%- if true %}\n    {{- '<|' + message['role'] + '|>' }}\n    {%- endif %}\n{{- message.content | trim }}\n  {% endfor %}",
        "<|system|>Be brief.\n<|user|>Hi\n<|assistant|>Yo\n",
    );
    check(
        "{{ bos_token }}{% set ns = namespace(seen=0) %}{% for m in messages[::-1] %}{% set ns.seen = ns.seen + 1 %}\
         {% endfor %}{{ ns.seen }}{% if messages[0]['role'] == 'system' %}{{ messages[0].content.upper() }}{% endif %}",
        "<s>3BE BRIEF.",
    );
    check("{% if tools is not none %}tools{% endif %}{{ 'a b'.split(' ') | length }}", "2");
    check("{% generation %}{{ messages[1].content }}{%- endgeneration -%}\n !", "Hi!");
    check("{{ {'a': [1, 2.5, none, true, '<é\"']} | tojson }}", "{\"a\": [1, 2.5, null, true, \"<é\\\"\"]}");
    check("{{ [1] | tojson(indent=2) }}", "[\n  1\n]");
    check("{% if enable_thinking is defined %}on{% else %}off{% endif %}", "off");
    check("{{ strftime_now('%d %b %Y') }}", "18 Nov 2026");
}

#[test]
fn tools_calls_results_and_documents_are_there_for_templates_that_write_them() {
    let template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for d in documents or [] %}{{ d.title }}{% endfor %}\
        {% for m in messages %}{{ m.role }}:{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.city }})\
        {{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}{{ m.content }};{% endfor %}{{ reasoning_effort }}";
    let template = ChatTemplate::compile(template, Vec::new(), &Limits::default()).expect("compiles");
    let call = ToolCall { id: "1".into(), name: "weather".into(), arguments: "{\"city\": \"Rome\", \"b\": 1}".into() };
    let messages = [
        ChatMessage { tool_calls: vec![call], ..message("assistant", "") },
        ChatMessage { tool_call_id: Some("1".into()), ..message("tool", "sunny") },
    ];
    let options = RenderOptions {
        tools: vec![serde_json::json!({"type": "function", "function": {"name": "weather"}})],
        documents: vec![serde_json::json!({"title": "D", "text": "x"})],
        reasoning_effort: Some("low".into()),
        ..options()
    };
    let expected = "{\"type\": \"function\", \"function\": {\"name\": \"weather\"}}D\
        assistant:weather(Rome){\"city\": \"Rome\", \"b\": 1};tool:1sunny;low";
    assert_eq!(template.render(&messages, options).expect("renders"), expected);
    assert_eq!(template.render(&[message("user", "x")], self::options()).expect("renders"), "user:x;");
}

#[test]
fn a_template_can_refuse_with_its_own_words_only() {
    let own = "{{ raise_exception('Roles must alternate.') }}";
    assert_eq!(render(own, &[]), Err(TemplateError::Raised("Roles must alternate.".into())));
    let theirs = "{{ raise_exception('Not: ' + messages[0].content) }}";
    assert_eq!(render(theirs, &[message("user", "my secret")]), Err(TemplateError::Refused));
    let in_macro = "{% macro m() %}{{ raise_exception('No.') }}{% endmacro %}{{ m() }}";
    assert_eq!(render(in_macro, &[]), Err(TemplateError::Raised("No.".into())));
}

#[test]
fn hostile_templates_are_stopped_in_time() {
    let hostile = [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'a' * 1000000000000 }}",
        "{{ ('a' * 90000000) | length }}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace() %}{% set ns.self = ns %}{{ ns | tojson }}",
        "{{ range(1000000000) | list }}",
        "{{ ('a,' * 1000000).split(',') | join('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa') }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{% for i in range(100000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ self._TemplateReference__context }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('id') }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ];
    for template in hostile {
        let start = Instant::now();
        let rendered = ChatTemplate::compile(template, Vec::new(), &Limits::default()).and_then(|template| {
            template.render(&[message("user", "Hi")], options()).map_err(|error| error.to_string())
        });
        let elapsed = start.elapsed();
        match rendered {
            Err(why) => assert!(!why.contains("0x") && !why.contains("root:"), "{why}"),
            Ok(text) => assert!(text.len() < 2 << 20, "{template}: {} bytes", text.len()),
        }
        // Twice: once when it is loaded, once when it is rendered. Debug builds run on slow machines too.
        assert!(elapsed < Duration::from_millis(1000), "{template}: {elapsed:?}");
    }
}

#[test]
fn output_is_bounded_by_input() {
    let template = "{% for i in range(40) %}{{ messages[0].content }}{% endfor %}";
    let limits = Limits { template_output_bytes: 1000, ..Limits::default() };
    let template = ChatTemplate::compile(template, Vec::new(), &limits).expect("compiles");
    let long = message("user", &"a".repeat(10_000));
    assert_eq!(template.render(&[long], options()), Err(TemplateError::TooExpensive));
    assert!(template.render(&[message("user", "a")], options()).is_ok());
}

#[test]
fn the_newer_name_of_the_system_role_is_for_templates_that_know_it() {
    let messages = [message("developer", "x")];
    assert_eq!(render("{{ messages[0].role }}", &messages), Ok("system".into()));
    assert_eq!(render("{# developer #}{{ messages[0].role }}", &messages), Ok("developer".into()));
}

#[test]
fn generation_tags_are_found_in_every_spelling() {
    assert_eq!(without_generation_tags("a{%-generation-%}b{% endgeneration %}"), "a{%-if true-%}b{% endif %}");
    assert_eq!(without_generation_tags("{% if generation %}{%"), "{% if generation %}{%");
}
