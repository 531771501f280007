//! All 14 real chat templates, against golden texts made by Hugging Face transformers
//! (`tests/golden/make_golden.py`), and through the adaptation of OpenAI's shapes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mirai_text::{ChatTemplate, RenderInput, SpecialTokens, TemplateError};
use serde_json::{Map, Value, json};

use crate::data;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn now() -> SystemTime {
    // 2025-03-09 14:05:06 UTC
    UNIX_EPOCH + Duration::from_secs(1_741_529_106)
}

fn templates() -> Vec<(String, ChatTemplate)> {
    let Some(folder) = data::path("chat-templates") else {
        return Vec::new();
    };
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 14);
    files
        .iter()
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let special = SpecialTokens {
                bos: Some("<BOS>".to_owned()),
                eos: Some("<EOS>".to_owned()),
                ..SpecialTokens::default()
            };
            let source = std::fs::read_to_string(path).unwrap();
            let template = ChatTemplate::compile(&source, special).unwrap_or_else(|e| panic!("{name}: {e}"));
            (name, template)
        })
        .collect()
}

fn read(name: &str) -> Value {
    let text = std::fs::read_to_string(format!("{GOLDEN}/{name}.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn golden_texts_of_transformers() {
    let cases = read("cases");
    let mut compared = 0;
    for (name, template) in templates() {
        let golden = read(&name);
        for (case, input) in cases.as_object().unwrap() {
            let rendered = template.render_verbatim(&RenderInput {
                messages: &input["messages"],
                tools: Some(&input["tools"]).filter(|t| !t.is_null()),
                add_generation_prompt: input["add_generation_prompt"].as_bool().unwrap(),
                continue_final_message: false,
                kwargs: input["kwargs"].as_object().unwrap(),
                now: now(),
            });
            let golden = &golden[case];
            if let Some(expected) = golden["expected"].as_str() {
                let text = rendered.unwrap_or_else(|e| panic!("{name}, {case}: {e}"));
                assert_eq!(text, expected, "{name}, {case}");
                compared += 1;
            } else if let Some(message) = golden["raised"].as_str() {
                let error = rendered.unwrap_err();
                // An error of Jinja itself (a missing attribute) has another text.
                if !message.contains("no attribute") {
                    assert!(
                        matches!(&error, TemplateError::Raised(found) if found == message),
                        "{name}, {case}: {error}"
                    );
                }
                compared += 1;
            } else {
                // A TypeError of Python; minijinja may be more lenient, but never panics.
                assert!(golden["failed"].is_string(), "{name}, {case}");
            }
        }
    }
    assert!(compared == 0 || compared > 120, "{compared}");
}

/// A conversation as an OpenAI client sends it: arguments as text, parts, null content.
fn conversation() -> Value {
    json!([
        {"role": "system", "content": [{"type": "text", "text": "System words."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is the weather?"}]},
        {"role": "assistant", "content": null, "tool_calls": [{
            "id": "abcdefghi", "type": "function",
            "function": {"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "Sunny sky."},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "Thank you."},
    ])
}

fn render(template: &ChatTemplate, messages: &Value, tools: Option<&Value>) -> String {
    template
        .render(&RenderInput {
            messages,
            tools,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: &Map::new(),
            now: now(),
        })
        .unwrap()
}

fn assert_in_order(name: &str, text: &str, words: &[&str]) {
    let mut rest = text;
    for word in words {
        let at = rest.find(word);
        let at = at.unwrap_or_else(|| panic!("{name}: `{word}` is missing or too early in {text}"));
        rest = &rest[at + word.len()..];
    }
}

#[test]
fn every_template_renders_system_user_assistant_and_tool() {
    let tools = read("cases")["tools, first turn"]["tools"].clone();
    for (name, template) in templates() {
        println!("{name}: {:?}", template.caps());
        for tools in [None, Some(&tools)] {
            let text = render(&template, &conversation(), tools);
            let mut words = vec!["What is the weather?"];
            if template.caps().tool_messages {
                words.extend(["get_weather", "Paris", "Sunny sky."]);
            }
            words.extend(["It is sunny.", "Thank you."]);
            assert_in_order(&name, &text, &words);
            assert!(text.contains("System words."), "{name}");
            assert!(!text.contains("None"), "{name}: {text}");
            assert!(!text.contains("\\\"city\\\""), "{name}: arguments were quoted twice");
            if tools.is_some() && template.caps().tools {
                assert!(text.contains("Donne la météo"), "{name}");
            }
        }
    }
}

#[test]
fn tool_calls_are_shown_by_all_but_the_two_templates_without_them() {
    for (name, template) in templates() {
        // Phi 3.5 knows no tools; SmolLM3 copies results, but drops the calls.
        let without = name.starts_with("microsoft-Phi-3.5") || name.contains("SmolLM3");
        assert_eq!(template.caps().tool_messages, !without, "{name}");
    }
}

#[test]
fn every_template_takes_several_system_and_developer_messages() {
    let messages = json!([
        {"role": "system", "content": "First rule."},
        {"role": "developer", "content": "Second rule."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "system", "content": "Third rule."},
        {"role": "user", "content": "Go on."},
    ]);
    for (name, template) in templates() {
        let text = render(&template, &messages, None);
        for rule in ["First rule.", "Second rule.", "Third rule."] {
            assert_eq!(text.matches(rule).count(), 1, "{name}: {rule} in {text}");
        }
        assert_in_order(&name, &text, &["Hello.", "Hi.", "Go on."]);
    }
}

#[test]
fn the_generation_prompt_is_an_addition_at_the_end() {
    let messages = json!([{"role": "user", "content": "Hello."}]);
    for (name, template) in templates() {
        let with = render(&template, &messages, None);
        let without = template
            .render(&RenderInput {
                messages: &messages,
                tools: None,
                add_generation_prompt: false,
                continue_final_message: false,
                kwargs: &Map::new(),
                now: now(),
            })
            .unwrap();
        // Phi 3.5 ends a text without generation prompt by EOS.
        let without = without.trim_end_matches("<EOS>");
        assert!(with.starts_with(without), "{name}");
        // Mistral's templates have no generation prompt.
        if !name.starts_with("mistralai") && !name.starts_with("Mistral") {
            assert!(with.len() > without.len(), "{name}");
        }
    }
}

#[test]
fn the_last_message_can_be_continued_by_most_templates() {
    let messages = json!([
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "I was about to"},
    ]);
    for (name, template) in templates() {
        let text = template
            .render(&RenderInput {
                messages: &messages,
                tools: None,
                add_generation_prompt: false,
                continue_final_message: true,
                kwargs: &Map::new(),
                now: now(),
            })
            .unwrap();
        assert!(text.ends_with("I was about to"), "{name}");
    }
}
