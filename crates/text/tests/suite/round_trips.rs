//! Every real template that marks its reasoning: the prompt that it writes, the output that such a model answers, and
//! the reasoning that a client gives back.

use std::time::SystemTime;

use mirai_text::{ChatTemplate, ReasoningFormat, ReasoningStyle, RenderInput, SpecialTokens};
use serde_json::{Value, json};

use crate::data;
use crate::reasoning::{HARMONY, Split, encoded, split, tokenizer};

/// A real template: file, its special tokens, variables for its reasoning mode, and its vocabulary's markers.
struct Real {
    file: &'static str,
    format: &'static str,
    special: &'static [&'static str],
    plain: &'static [&'static str],
    kwargs: fn() -> Value,
    /// What such a model answers after this prompt.
    output: &'static str,
    style: ReasoningStyle,
}

const THINK: &[&str] = &["<think>", "</think>"];

fn none() -> Value {
    json!({})
}

fn on() -> Value {
    json!({"enable_thinking": true})
}

fn off() -> Value {
    json!({"enable_thinking": false})
}

const FIELD: ReasoningStyle = ReasoningStyle::Field("reasoning_content");

/// The families that mark their reasoning. An output without reasoning stands for a mode that is off.
const REAL: &[Real] = &[
    Real {
        file: "Qwen-Qwen3-0.6B",
        format: "think",
        special: &[],
        plain: THINK,
        kwargs: none,
        output: "<think>T.</think>A.",
        style: FIELD,
    },
    Real {
        file: "Qwen-Qwen3-0.6B",
        format: "think",
        special: &[],
        plain: THINK,
        kwargs: off,
        output: "A.",
        style: FIELD,
    },
    Real {
        file: "Qwen3.5-4B",
        format: "think",
        special: &[],
        plain: THINK,
        kwargs: none,
        output: "T.</think>A.",
        style: FIELD,
    },
    Real {
        file: "Qwen3.5-4B",
        format: "think",
        special: &[],
        plain: THINK,
        kwargs: off,
        output: "A.",
        style: FIELD,
    },
    Real {
        file: "HuggingFaceTB-SmolLM3-3B",
        format: "think",
        special: &[],
        plain: THINK,
        kwargs: none,
        output: "<think>T.</think>A.",
        style: ReasoningStyle::Dropped,
    },
    Real {
        file: "HuggingFaceTB-SmolLM3-3B",
        format: "think",
        special: &[],
        plain: &[],
        kwargs: off,
        output: "A.",
        style: ReasoningStyle::Dropped,
    },
    Real {
        file: "deepseek-ai-DeepSeek-V3.1",
        format: "think",
        special: &[],
        plain: THINK,
        kwargs: on,
        output: "T.</think>A.",
        style: ReasoningStyle::Dropped,
    },
    Real {
        file: "deepseek-ai-DeepSeek-V3.1",
        format: "think",
        special: &[],
        plain: THINK,
        kwargs: none,
        output: "A.",
        style: ReasoningStyle::Dropped,
    },
    Real {
        file: "mistralai-Ministral-3-14B-Reasoning-2512",
        format: "mistral",
        special: &["[THINK]", "[/THINK]"],
        plain: &[],
        kwargs: none,
        output: "[THINK]T.[/THINK]A.",
        style: ReasoningStyle::Part,
    },
    Real {
        file: "google-gemma-4-31B-it",
        format: "gemma4",
        special: &["<|channel>", "<channel|>"],
        plain: &[],
        kwargs: on,
        output: "<|channel>thought\nT.<channel|>A.",
        style: FIELD,
    },
    Real {
        file: "google-gemma-4-31B-it",
        format: "gemma4",
        special: &["<|channel>", "<channel|>"],
        plain: &[],
        kwargs: off,
        output: "A.",
        style: FIELD,
    },
    Real {
        file: "Apertus-8B-Instruct",
        format: "apertus",
        special: &["<|inner_prefix|>", "<|inner_suffix|>"],
        plain: &[],
        kwargs: on,
        output: "<|inner_prefix|>T.<|inner_suffix|>A.",
        style: ReasoningStyle::Dropped,
    },
    Real {
        file: "openai-gpt-oss-120b",
        format: "openai_gptoss",
        special: HARMONY,
        plain: &[],
        kwargs: none,
        output: "<|channel|>analysis<|message|>T.<|end|><|start|>assistant<|channel|>final<|message|>A.<|return|>",
        style: ReasoningStyle::Field("thinking"),
    },
];

fn compiled(file: &str) -> Option<(String, ChatTemplate)> {
    let source = std::fs::read_to_string(data::path(&format!("chat-templates/{file}.jinja"))?).unwrap();
    let special =
        SpecialTokens { bos: Some("<BOS>".into()), eos: Some("<EOS>".into()), ..SpecialTokens::default() };
    let template = ChatTemplate::compile(&source, special).unwrap();
    Some((source, template))
}

fn render(template: &ChatTemplate, messages: &Value, kwargs: &Value) -> String {
    template
        .render(&RenderInput {
            messages,
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: kwargs.as_object().unwrap(),
            now: SystemTime::UNIX_EPOCH,
        })
        .unwrap()
}

#[test]
fn every_family_that_marks_its_reasoning_makes_the_round_trip() {
    for real in REAL {
        let Some((source, template)) = compiled(real.file) else { return };
        let tokenizer = tokenizer(real.special, real.plain);
        let format = ReasoningFormat::detect(Some(&source), &tokenizer).unwrap();
        assert_eq!(format.name(), real.format, "{}", real.file);
        let user = json!({"role": "user", "content": "Q about <think>, [THINK] and <|channel|>?"});
        let prompt = render(&template, &json!([user]), &(real.kwargs)());
        let out = split(&tokenizer, &format, &prompt, &encoded(&tokenizer, real.output));
        let thought = if real.output.contains("T.") { "T." } else { "" };
        assert_eq!(out.clone().texts(), Split::of(thought, "A."), "{} {}", real.file, (real.kwargs)());
        assert_eq!(out.tokens, thought.len() as u32, "{}", real.file);
        // A client gives it back, under either name. No template fails on it, nor shows it twice.
        assert_eq!(template.caps().reasoning, real.style, "{}", real.file);
        for name in ["reasoning", "reasoning_content"] {
            let messages = json!([
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "A.", name: "zqthought"},
                {"role": "user", "content": "And?"},
            ]);
            let text = render(&template, &messages, &(real.kwargs)());
            assert!(text.matches("zqthought").count() <= 1 && text.contains("A."), "{}: {text}", real.file);
            if real.style == ReasoningStyle::Part {
                assert!(text.contains("[THINK]zqthought[/THINK]A."), "{text}");
            }
        }
    }
}

#[test]
fn reasoning_is_kept_in_the_turn_of_a_tool_call_by_templates_that_take_a_field() {
    for real in REAL.iter().filter(|real| matches!(real.style, ReasoningStyle::Field(_))) {
        let Some((_, template)) = compiled(real.file) else { return };
        for content in ["", "I look it up."] {
            let messages = json!([
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": content, "reasoning": "zqthought", "tool_calls": [{
                    "id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": "R"},
            ]);
            let text = render(&template, &messages, &json!({}));
            let both = !content.is_empty() && real.format == "openai_gptoss";
            assert_eq!(text.contains("zqthought"), !both, "{}: {text}", real.file);
            assert!(text.contains(content), "{}", real.file);
        }
    }
}

#[test]
fn only_an_assistants_reasoning_is_passed_on() {
    let template = ChatTemplate::compile(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.reasoning %}({{ m.reasoning }}){% endif %};\
         {% endfor %}",
        SpecialTokens::default(),
    )
    .unwrap();
    assert_eq!(template.caps().reasoning, ReasoningStyle::Field("reasoning"));
    let messages = json!([
        {"role": "user", "content": "a", "reasoning_content": "zq"},
        {"role": "assistant", "content": "b", "reasoning_content": "x", "thinking": "y"},
        {"role": "assistant", "content": "c", "reasoning": ""},
        {"role": "assistant", "content": "d", "reasoning": 5},
    ]);
    assert_eq!(render(&template, &messages, &json!({})), "user:a;assistant:b(x);assistant:c;assistant:d;");
}
