//! Reasoning in chats: split off in streams and whole answers alike, counted, and no business of stop strings.

use std::sync::Arc;

use mirai_server::ServedModel;
use mirai_server::api::chat::{ChatChunk, ChatResponse};
use mirai_text::{ChatTemplate, ReasoningFormat, SpecialTokens};
use serde_json::{Value, json};

use crate::client::post;
use crate::support::*;

const CHAT: &str = "/v1/chat/completions";
const THINK: &[&str] = &["<think>", "</think>"];
const HARMONY: &[&str] =
    &["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"];

/// Opens the reasoning, closes it, or leaves it to the model; shows earlier reasoning.
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\
    {% if enable_thinking is defined %}{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}\
    {% endif %}";
const HARMONY_TEMPLATE: &str = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}\
    {% if add_generation_prompt %}<|start|>assistant{% endif %}";

fn template(model: &mut ServedModel, source: &str) {
    model.template = Some(ChatTemplate::compile(source, SpecialTokens::default()).unwrap());
    model.reasoning = ReasoningFormat::detect(Some(source), &model.tokenizer);
    assert!(model.reasoning.is_some());
}

/// A server whose model always writes `script`, and then ends.
async fn scripted(script: &str, tokens: &'static [&'static str]) -> TestServer {
    let script = tokenizer(tokens).encode(script, false, true).unwrap();
    let setup: fn(&mut ServedModel) = if tokens == HARMONY {
        |model| template(model, HARMONY_TEMPLATE)
    } else {
        |model| template(model, TEMPLATE)
    };
    let draw = Arc::new(move |draw: &mirai_engine::sim::Draw<'_>| {
        script.get(draw.output.len()).copied().unwrap_or(EOS)
    });
    TestServer::start(Options { tokens, draw, setup, ..Options::default() }).await
}

/// What a client sees of one choice.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    reasoning: Option<String>,
    content: Option<String>,
    finish: Option<String>,
    stop: Value,
    reasoning_tokens: u64,
    completion_tokens: u64,
}

async fn whole(server: &TestServer, body: &Value) -> Seen {
    let answer = post(server.address, CHAT, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let typed: ChatResponse = serde_json::from_slice(&answer.body).unwrap();
    let choice = typed.choices[0].clone();
    assert_eq!(choice.message.reasoning, choice.message.reasoning_content, "one text under two names");
    Seen {
        reasoning: choice.message.reasoning,
        content: choice.message.content,
        finish: choice.finish_reason,
        stop: choice.stop_reason.unwrap_or_default(),
        reasoning_tokens: typed.usage.completion_tokens_details.reasoning_tokens,
        completion_tokens: typed.usage.completion_tokens,
    }
}

async fn streamed(server: &TestServer, body: &Value) -> Seen {
    let mut body = body.clone();
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let mut seen = Seen {
        reasoning: None,
        content: None,
        finish: None,
        stop: Value::Null,
        reasoning_tokens: 0,
        completion_tokens: 0,
    };
    for event in post(server.address, CHAT, &body).await.events() {
        let chunk: ChatChunk =
            serde_json::from_value(event.clone()).unwrap_or_else(|e| panic!("{e}: {event}"));
        let usage = chunk.usage.unwrap();
        assert!(
            usage.completion_tokens_details.reasoning_tokens >= seen.reasoning_tokens,
            "counts only grow"
        );
        seen.reasoning_tokens = usage.completion_tokens_details.reasoning_tokens;
        seen.completion_tokens = usage.completion_tokens;
        let Some(choice) = chunk.choices.first().filter(|choice| choice.index == 0) else { continue };
        assert_eq!(choice.delta.reasoning, choice.delta.reasoning_content);
        for (text, more) in
            [(&mut seen.reasoning, &choice.delta.reasoning), (&mut seen.content, &choice.delta.content)]
        {
            if let Some(more) = more.as_ref().filter(|more| !more.is_empty()) {
                text.get_or_insert_default().push_str(more);
            }
        }
        if choice.finish_reason.is_some() {
            seen.finish.clone_from(&choice.finish_reason);
            seen.stop = choice.stop_reason.clone().unwrap_or_default();
        }
    }
    seen
}

/// Both ways, which must say the same.
async fn ask(server: &TestServer, more: &Value) -> Seen {
    let mut body = chat("q", &json!({"max_tokens": 200}));
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    let mut seen = whole(server, &body).await;
    let stream = streamed(server, &body).await;
    let empty = seen.content.as_deref() == Some("");
    assert_eq!(Seen { content: seen.content.clone().filter(|_| !empty), ..seen.clone() }, stream, "{more}");
    seen.content = seen.content.take().filter(|_| !empty);
    seen
}

fn texts(seen: &Seen) -> (Option<&str>, Option<&str>) {
    (seen.reasoning.as_deref(), seen.content.as_deref())
}

#[tokio::test(flavor = "multi_thread")]
async fn reasoning_is_apart_in_both_ways_of_answering() {
    for tokens in [&[][..], THINK] {
        let server = scripted("<think>I \"see\" 😀\n</think>\n\nHi <think>!", tokens).await;
        let seen = ask(&server, &json!({})).await;
        // A marker that is a control token has no text where it is none.
        let content = if tokens.is_empty() { "\n\nHi <think>!" } else { "\n\nHi !" };
        assert_eq!(texts(&seen), (Some("I \"see\" 😀\n"), Some(content)));
        assert_eq!(seen.finish.as_deref(), Some("stop"));
        assert_eq!(seen.reasoning_tokens, "I \"see\" 😀\n".len() as u64, "one token is one byte");
        let hidden = ask(&server, &json!({"include_reasoning": false})).await;
        assert_eq!(texts(&hidden), (None, Some(content)));
        assert_eq!(
            (hidden.reasoning_tokens, hidden.completion_tokens),
            (seen.reasoning_tokens, seen.completion_tokens)
        );
        let both = ask(&server, &json!({"n": 3})).await;
        assert_eq!(both.reasoning_tokens, 3 * seen.reasoning_tokens);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_prompt_says_what_the_first_token_belongs_to() {
    let server = scripted("hm</think>Hi", THINK).await;
    let kwargs = |on: bool| json!({"chat_template_kwargs": {"enable_thinking": on}});
    let open = ask(&server, &kwargs(true)).await;
    assert_eq!((texts(&open), open.reasoning_tokens), ((Some("hm"), Some("Hi")), 2));
    let closed = ask(&server, &kwargs(false)).await;
    assert_eq!((texts(&closed), closed.reasoning_tokens), ((None, Some("hmHi")), 0));
    let cut =
        ask(&server, &json!({"chat_template_kwargs": {"enable_thinking": true}, "max_tokens": 1})).await;
    assert_eq!((texts(&cut), cut.finish.as_deref()), ((Some("h"), None), Some("length")));
    // A message that is to be continued, in the midst of its reasoning.
    let body = json!({
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>so "}],
        "continue_final_message": true, "add_generation_prompt": false, "max_tokens": 9,
    });
    assert_eq!(texts(&whole(&server, &body).await), (Some("hm"), Some("Hi")));
    // A question about the marker opens nothing.
    let seen = whole(&server, &chat("what is <think>", &json!({}))).await;
    assert_eq!(texts(&seen), (None, Some("hmHi")));
    let body = completion(&json!("a<think>"), &json!({"max_tokens": 9, "skip_special_tokens": false}));
    let raw = post(server.address, "/v1/completions", &body).await.json();
    assert_eq!(raw["choices"][0]["text"], "hm</think>Hi");
    assert_eq!(raw["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_count_in_the_answer_only() {
    let server = scripted("<think>STOP and go</think>Now STOP here", &[]).await;
    let seen = ask(&server, &json!({"stop": ["STOP"]})).await;
    assert_eq!(texts(&seen), (Some("STOP and go"), Some("Now ")));
    assert_eq!((seen.finish.as_deref(), &seen.stop), (Some("stop"), &json!("STOP")));
    assert_eq!(seen.completion_tokens, "<think>STOP and go</think>Now STOP".len() as u64);
    let seen = ask(&server, &json!({"stop": ["STOP"], "include_stop_str_in_output": true})).await;
    assert_eq!(texts(&seen), (Some("STOP and go"), Some("Now STOP")));
    // Two letters of it lie on each side of the marker.
    let seen = ask(&server, &json!({"stop": ["goNow"]})).await;
    assert_eq!(texts(&seen), (Some("STOP and go"), Some("Now STOP here")));
    let seen = ask(&server, &json!({"stop": ["STOP"], "min_tokens": 35})).await;
    assert_eq!(texts(&seen), (Some("STOP and go"), Some("Now STOP here")), "nor before `min_tokens`");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_and_ids_are_those_of_every_token() {
    let server = scripted("<think>ab</think>cd", THINK).await;
    let more = json!({"logprobs": true, "return_token_ids": true, "max_tokens": 50});
    let mut body = chat("q", &more);
    let answer: ChatResponse = serde_json::from_slice(&post(server.address, CHAT, &body).await.body).unwrap();
    let choice = &answer.choices[0];
    let names: Vec<String> =
        choice.logprobs.clone().unwrap().content.into_iter().map(|entry| entry.token).collect();
    assert_eq!(names, ["<think>", "a", "b", "</think>", "c", "d", "<|im_end|>"]);
    assert_eq!(choice.token_ids.as_deref(), Some(&[259, 97, 98, 260, 99, 100, EOS][..]));
    body["stream"] = json!(true);
    let events = post(server.address, CHAT, &body).await.events();
    let streamed: Vec<&str> =
        events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"][0]["token"].as_str()).collect();
    assert_eq!(streamed, names);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn harmony_is_split_by_its_channels_and_ends_at_its_own_tokens() {
    let script = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.\
        <|end|><|start|>assistant<|channel|>final<|message|>Hi.";
    for end in ["<|return|>and on", "<|call|>and on"] {
        let server = scripted(&format!("{script}{end}"), HARMONY).await;
        let seen = ask(&server, &json!({})).await;
        assert_eq!(texts(&seen), (Some("hm"), Some("Wait.\nHi.")));
        assert_eq!((seen.finish.as_deref(), &seen.stop), (Some("stop"), &Value::Null), "the model's own end");
        assert_eq!(seen.reasoning_tokens, 2);
        let seen = ask(&server, &json!({"stop": ["hm", "Hi"]})).await;
        assert_eq!((texts(&seen), &seen.stop), ((Some("hm"), Some("Wait.\n")), &json!("Hi")));
        server.stop().await;
    }
    // A call that nobody asked for, and a model that forgets the format, are heard.
    for (script, expected) in [
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", "{}"),
        ("Hello there", "Hello there"),
    ] {
        let server = scripted(script, HARMONY).await;
        assert_eq!(texts(&ask(&server, &json!({})).await), (None, Some(expected)));
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn earlier_reasoning_reaches_the_template_under_either_name() {
    let server = scripted("x", &[]).await;
    let count = async |assistant: Value| {
        let mut assistant = assistant;
        assistant["role"] = json!("assistant");
        assistant["content"] = json!("A");
        let messages = json!([{"role": "user", "content": "q"}, assistant, {"role": "user", "content": "r"}]);
        let tokens = post(server.address, "/tokenize", &json!({"messages": messages})).await.json();
        tokens["count"].as_u64().unwrap()
    };
    let without = count(json!({})).await;
    let with = without + "<think>so</think>".len() as u64;
    assert_eq!(count(json!({"reasoning": "so"})).await, with);
    assert_eq!(count(json!({"reasoning_content": "so"})).await, with);
    assert_eq!(count(json!({"reasoning": "so", "reasoning_content": "so"})).await, with);
    assert_eq!(count(json!({"reasoning": null, "reasoning_content": null})).await, without);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_marks_answers_as_ever() {
    let server = TestServer::plain().await;
    let answer = post(server.address, CHAT, &chat("q", &json!({}))).await.json();
    let message = answer["choices"][0]["message"].as_object().unwrap();
    assert_eq!(message["reasoning"], Value::Null);
    assert_eq!(message["reasoning_content"], Value::Null);
    assert!(message["content"].is_string());
    server.stop().await;
}
