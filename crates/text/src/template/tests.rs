#![allow(clippy::unwrap_used, clippy::print_stdout)]
use super::*;
use serde_json::json;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

fn special() -> SpecialTokens {
    SpecialTokens { bos: Some("<s>".to_owned()), eos: Some("</s>".to_owned()), ..SpecialTokens::default() }
}

const PLAIN: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}";

fn render_with<'a>(
    source: &str,
    messages: &'a Json,
    change: impl FnOnce(&mut RenderInput<'a>),
) -> Result<String, TemplateError> {
    let template = ChatTemplate::compile(source, special())?;
    static NO_KWARGS: LazyLock<serde_json::Map<String, Json>> = LazyLock::new(serde_json::Map::new);
    let mut input = RenderInput {
        messages,
        tools: None,
        add_generation_prompt: false,
        continue_final_message: false,
        kwargs: &NO_KWARGS,
        now: SystemTime::UNIX_EPOCH,
    };
    change(&mut input);
    template.render(&input)
}

fn render(source: &str, messages: &Json) -> Result<String, TemplateError> {
    render_with(source, messages, |_| {})
}

fn hello() -> Json {
    json!([{"role": "user", "content": "hello"}])
}

/// Renders an expression beside the message that every template must show.
fn eval(expression: &str) -> String {
    let source = format!("{{{{ messages[0].content }}}}|{{{{ {expression} }}}}");
    let text = render(&source, &hello()).unwrap();
    text.strip_prefix("hello|").unwrap().to_owned()
}

#[test]
fn tojson_is_pythons() {
    assert_eq!(
        eval(r#"{"b": [1, 2.0, none, true], "a": "<é'&>"} | tojson"#),
        r#"{"b": [1, 2.0, null, true], "a": "<é'&>"}"#
    );
    assert_eq!(
        eval(r#"{"b": [], "a": {"c": 1, "d": [1, 2]}} | tojson(indent=2)"#),
        "{\n  \"b\": [],\n  \"a\": {\n    \"c\": 1,\n    \"d\": [\n      1,\n      2\n    ]\n  }\n}"
    );
    assert_eq!(
        eval(r#"{"b": "é😀", "a": 1} | tojson(sort_keys=true, ensure_ascii=true, separators=(",", ":"))"#),
        r#"{"a":1,"b":"\u00e9\ud83d\ude00"}"#
    );
    assert_eq!(eval(r#"[{}, [1]] | tojson(indent="\t")"#), "[\n\t{},\n\t[\n\t\t1\n\t]\n]");
    for wrong in ["x | tojson", "1 | tojson(separators=[1])", "1 | tojson(color=1)"] {
        let source = format!("{{{{ messages[0].content }}}}{{{{ {wrong} }}}}");
        assert!(matches!(render(&source, &hello()), Err(TemplateError::Render(_))), "{wrong}");
    }
}

#[test]
fn python_values_and_methods() {
    assert_eq!(eval("none ~ true ~ 1.0"), "NoneTrue1.0");
    assert_eq!(eval("' a,b '.strip().split(',')[::-1] | join('+')"), "b+a");
    assert_eq!(eval("'ab'.startswith('a') and {'k': 1}.get('k') == 1"), "True");
    assert_eq!(eval("namespace(a=1).a"), "1");
    assert_eq!(eval("strftime_now('%d %b %Y')"), "01 Jan 1970");
}

#[test]
fn blocks_are_trimmed_as_in_transformers() {
    let source = "  {% if true %}\n  {{ messages[0].content }}\n  {% endif %}\nend\n";
    assert_eq!(render(source, &hello()).unwrap(), "  hello\nend");
}

#[test]
fn generation_blocks_and_loop_controls() {
    let source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\
                  {% break %}{% endfor %}";
    assert_eq!(render(source, &hello()).unwrap(), "hello");
}

#[test]
fn raise_exception_carries_the_templates_message() {
    let source = "{{ messages[0].content }}{% if messages|length > 5 %}\
                  {{ raise_exception('at most ' ~ 5) }}{% endif %}";
    let messages: Json = (0..6).map(|_| json!({"role": "user", "content": "x"})).collect();
    match render(source, &messages) {
        Err(TemplateError::Raised(message)) => assert_eq!(message, "at most 5"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn key_order_of_tools_is_kept() {
    let tools: Json = serde_json::from_str(r#"[{"z": 1, "a": {"y": 2, "b": 3}}]"#).unwrap();
    let text = render_with("{{ messages[0].content }}{{ tools | tojson }}", &hello(), |input| {
        input.tools = Some(&tools);
    });
    assert_eq!(text.unwrap(), r#"hello[{"z": 1, "a": {"y": 2, "b": 3}}]"#);
}

#[test]
fn kwargs_are_an_allow_list() {
    let source = "{{ messages[0].content }}{{ enable_thinking }}";
    let mut kwargs = serde_json::Map::new();
    kwargs.insert("enable_thinking".to_owned(), json!(false));
    let set = |kwargs: &serde_json::Map<String, Json>| {
        let template = ChatTemplate::compile(source, special()).unwrap();
        template.render(&RenderInput {
            messages: &hello(),
            tools: None,
            add_generation_prompt: false,
            continue_final_message: false,
            kwargs,
            now: SystemTime::UNIX_EPOCH,
        })
    };
    assert_eq!(set(&kwargs).unwrap(), "helloFalse");
    for name in ["chat_template", "tokenize", "conversation", "messages", "bos_token"] {
        let mut kwargs = serde_json::Map::new();
        kwargs.insert(name.to_owned(), json!("x"));
        assert!(matches!(set(&kwargs), Err(TemplateError::KwargNotAllowed { .. })), "{name}");
    }
}

#[test]
fn several_system_messages_are_merged_only_where_the_template_forbids_them() {
    let strict = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}\
        {{ raise_exception('system must be first') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    let messages = json!([
        {"role": "system", "content": "A"},
        {"role": "user", "content": "u"},
        {"role": "developer", "content": [{"type": "text", "text": "B"}]},
        {"role": "user", "content": "v"},
    ]);
    assert_eq!(render(strict, &messages).unwrap(), "[system]A\n\nB[user]u[user]v");
    assert_eq!(render(PLAIN, &messages).unwrap(), "[system]A</s>[user]u</s>[system]B</s>[user]v</s>");
    let silent = "{% if messages[0].role == 'system' %}<{{ messages[0].content }}>{% endif %}\
        {% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}";
    assert_eq!(render(silent, &messages).unwrap(), "<A\n\nB>[user]u[user]v");
}

#[test]
fn a_template_without_system_role_gets_it_in_the_first_user_message() {
    let source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}\
        {% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    let template = ChatTemplate::compile(source, special()).unwrap();
    assert!(!template.caps().system);
    let messages = json!([{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]);
    assert_eq!(render(source, &messages).unwrap(), "[user]S\n\nu");
    let alone = json!([{"role": "system", "content": "S"}]);
    assert_eq!(render(source, &alone).unwrap(), "[user]S");
}

#[test]
fn the_developer_role_is_kept_where_the_template_names_it() {
    let source =
        "{% for m in messages %}{% if m.role == 'developer' %}<dev>{% endif %}{{ m.content }}{% endfor %}";
    let messages = json!([{"role": "developer", "content": "D"}, {"role": "user", "content": "u"}]);
    assert_eq!(render(source, &messages).unwrap(), "<dev>Du");
}

#[test]
fn content_takes_the_form_that_the_template_wants() {
    let parts = json!([{"role": "user", "content": [
        {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(render(PLAIN, &parts).unwrap(), "[user]a\nb</s>");
    let wants_parts = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}";
    let template = ChatTemplate::compile(wants_parts, special()).unwrap();
    assert_eq!(template.caps().content, ContentStyle::Parts);
    assert_eq!(render(wants_parts, &hello()).unwrap(), "<hello>");
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
    assert!(matches!(render(PLAIN, &image), Err(TemplateError::BadMessage { index: 0, .. })));
    let refusal = json!([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]);
    assert_eq!(render(PLAIN, &refusal).unwrap(), "[assistant]no</s>");
}

#[test]
fn arguments_take_the_form_that_the_template_wants() {
    let head =
        "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}:";
    let tail = "{% endfor %}{% endfor %}";
    let as_object = format!("{head}{{{{ c.function.arguments | tojson }}}}{tail}");
    let as_text = format!("{head}{{{{ c.function.arguments }}}}{tail}");
    let call = |arguments: Json| {
        json!([{"role": "assistant", "content": null, "tool_calls": [
        {"function": {"name": "f", "arguments": arguments}}]}])
    };
    for arguments in [json!({"k": 1}), json!("{\"k\": 1}")] {
        assert_eq!(render(&as_object, &call(arguments.clone())).unwrap(), "f:{\"k\": 1}");
        let text = render(&as_text, &call(arguments)).unwrap();
        assert_eq!(text.replace(' ', ""), "f:{\"k\":1}");
    }
    assert_eq!(render(&as_object, &call(json!(""))).unwrap(), "f:{}");
    assert_eq!(render(&as_object, &call(json!("no json"))).unwrap(), "f:\"no json\"");
}

#[test]
fn bad_messages_are_named() {
    for (messages, index) in [
        (json!({}), 0),
        (json!([{"role": "user", "content": "x"}, 3]), 1),
        (json!([{"content": "x"}]), 0),
        (json!([{"role": "user", "content": 3}]), 0),
    ] {
        match render(PLAIN, &messages) {
            Err(TemplateError::BadMessage { index: found, .. }) => assert_eq!(found, index),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_final_message_can_be_continued() {
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}";
    let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": " I am "}]);
    let continued = |source: &str, messages: &Json| {
        render_with(source, messages, |input| input.continue_final_message = true)
    };
    assert_eq!(continued(source, &messages).unwrap(), "[user]x</s>[assistant]I am");
    assert_eq!(continued(PLAIN, &messages).unwrap(), "[user]x</s>[assistant] I am ");
    let empty = json!([{"role": "assistant", "content": " "}]);
    assert!(matches!(continued(PLAIN, &empty), Err(TemplateError::CannotContinue(_))));
    let shouting = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ m.role }}{% endif %}{% endfor %}";
    assert!(continued(shouting, &messages).is_ok());
    let dropping = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
    assert!(matches!(continued(dropping, &messages), Err(TemplateError::CannotContinue(_))));
    let both = render_with(PLAIN, &messages, |input| {
        input.continue_final_message = true;
        input.add_generation_prompt = true;
    });
    assert!(matches!(both, Err(TemplateError::CannotContinue(_))));
}

#[test]
fn a_template_that_shows_no_message_is_a_load_error() {
    assert!(matches!(ChatTemplate::compile("hi", special()), Err(TemplateError::Render(_))));
    assert!(matches!(
        ChatTemplate::compile("{{ raise_exception('never') }}", special()),
        Err(TemplateError::Raised(_))
    ));
    assert!(matches!(ChatTemplate::compile("{% for %}", special()), Err(TemplateError::Syntax(_))));
}

/// All of these must end in an error quickly and without overflowing the stack.
fn bomb(source: &str) -> TemplateError {
    let begin = Instant::now();
    let limits = TemplateLimits { max_source_bytes: 1 << 20, ..TemplateLimits::default() };
    let error = ChatTemplate::compile_with(source, special(), limits).unwrap_err();
    let took = begin.elapsed();
    // A second in a release build; unoptimised test builds on a busy machine get more. A bomb runs for hours.
    assert!(took < Duration::from_secs(30), "{took:?}");
    error
}

#[test]
fn nesting_bombs_do_not_compile() {
    for depth in [6_000, 50_000] {
        for (open, close) in
            [("{{ ", ""), ("{% if x %}", "{% endif %}"), ("{% for x in y %}", "{% endfor %}")]
        {
            let source = if close.is_empty() {
                format!("{{{{ {}1{} }}}}", "(".repeat(depth), ")".repeat(depth))
            } else {
                open.repeat(depth) + &close.repeat(depth)
            };
            if source.len() > 1 << 20 {
                continue;
            }
            assert!(matches!(bomb(&source), TemplateError::Syntax(_)));
        }
    }
    for open in ["[", "{1:", "-", "not ", "f(", "a[", "a if b else "] {
        let source = format!("{{{{ {} }}}}", open.repeat(50_000));
        assert!(matches!(bomb(&source), TemplateError::Syntax(_)), "{open}");
    }
    let source = "x".repeat(129 << 10);
    assert!(matches!(
        ChatTemplate::compile(&source, special()),
        Err(TemplateError::SourceTooLarge { bytes: 132_096, limit: 131_072 })
    ));
}

#[test]
fn long_chains_compile_or_fail_but_never_overflow() {
    // Left-associative chains build deep trees without nesting in the source.
    for link in ["+1", ".a", "|e", "~1", " and 1", "[0]", "()", " is odd", " if a"] {
        let source = format!("{{{{ 1{} }}}}", link.repeat((128 << 10) / link.len() - 4));
        let begin = Instant::now();
        drop(ChatTemplate::compile(&source, special()));
        println!("{link:?}: {:?}", begin.elapsed());
    }
    for (first, link, last) in [("{% if a %}", "{% elif a %}", "{% endif %}"), ("", "{% set a = 1 %}", "")] {
        let source = format!("{first}{}{last}", link.repeat(8_000));
        drop(ChatTemplate::compile(&source, special()));
    }
}

#[test]
fn loop_and_memory_bombs_run_out_of_fuel() {
    let grow = "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
    for source in [
        grow,
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{% for i in range(100000) %}{{ messages | tojson }}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = ns.x + [i] %}{{ ns.x | tojson }}{% endfor %}",
    ] {
        let error = bomb(source);
        assert!(matches!(error, TemplateError::OutOfFuel { .. }), "{source}: {error:?}");
    }
    for source in [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ] {
        bomb(source);
    }
}

#[test]
fn deeply_nested_values_do_not_overflow_the_stack() {
    for inner in ["[ns.x]", "{'a': ns.x}", "(ns.x,)"] {
        let source = format!(
            "{{{{ messages[0].content }}}}{{% set ns = namespace(x=1) %}}{{% for i in range(100000) %}}\
             {{% set ns.x = {inner} %}}{{% endfor %}}"
        );
        drop(ChatTemplate::compile(&source, special()));
        // At request time there is ten times the fuel of a probe.
        let late = source.replace("range(100000)", "range(100000 if messages|length > 8 else 1)");
        let template = ChatTemplate::compile(&late, special()).unwrap();
        let messages: Json = (0..9).map(|_| json!({"role": "user", "content": "x"})).collect();
        drop(template.render(&RenderInput {
            messages: &messages,
            tools: None,
            add_generation_prompt: false,
            continue_final_message: false,
            kwargs: &serde_json::Map::new(),
            now: SystemTime::UNIX_EPOCH,
        }));
    }
}

#[test]
fn the_output_limit_is_enforced() {
    let limits = TemplateLimits { max_output_bytes: 100, ..TemplateLimits::default() };
    let source = "{{ messages[0].content }}";
    let template = ChatTemplate::compile_with(source, special(), limits).unwrap();
    let long = json!([{"role": "user", "content": "x".repeat(101)}]);
    let kwargs = serde_json::Map::new();
    let input = RenderInput {
        messages: &long,
        tools: None,
        add_generation_prompt: false,
        continue_final_message: false,
        kwargs: &kwargs,
        now: SystemTime::UNIX_EPOCH,
    };
    assert!(matches!(template.render(&input), Err(TemplateError::OutputTooLarge { limit: 100 })));
    assert!(format!("{template:?}").contains("caps"));
}
