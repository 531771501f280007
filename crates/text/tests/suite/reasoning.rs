//! Reasoning apart from the answer: whatever the chunking nothing is lost and no marker leaks.

use std::sync::LazyLock;

use mirai_text::{
    Detokenizer, Part, REASONING_NAMES, ReasoningError, ReasoningFormat, ReasoningParser, TokenId, Tokenizer,
};
use proptest::prelude::*;
use serde_json::{Map, json};

/// Tokens of one byte, and behind them `special` and `plain` ones of the given names.
pub(crate) fn tokenizer(special: &[&str], plain: &[&str]) -> Tokenizer {
    let mut vocab = Map::new();
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 256;
    for byte in 0..=255u8 {
        let c = if printable(byte) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap()
        };
        vocab.insert(c.to_string(), json!(byte));
    }
    let names = special.iter().map(|n| (n, true)).chain(plain.iter().map(|n| (n, false)));
    let mut added = Vec::new();
    for (id, (name, special)) in (256..).zip(names) {
        added.push(
            json!({"id": id, "content": name, "special": special, "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false}),
        );
    }
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": vocab, "merges": []},
    });
    Tokenizer::from_json_bytes(file.to_string().as_bytes()).unwrap()
}

#[derive(Debug, Default, PartialEq, Eq, Clone)]
pub(crate) struct Split {
    pub(crate) reasoning: String,
    pub(crate) content: String,
    pub(crate) tokens: u32,
}

impl Split {
    pub(crate) fn of(reasoning: &str, content: &str) -> (String, String) {
        (reasoning.to_owned(), content.to_owned())
    }

    pub(crate) fn texts(self) -> (String, String) {
        (self.reasoning, self.content)
    }
}

/// All tokens through a parser, which is what a server does.
pub(crate) fn split(tokenizer: &Tokenizer, format: &ReasoningFormat, prompt: &str, ids: &[TokenId]) -> Split {
    let detokenizer = Detokenizer::new(tokenizer, &[], true).unwrap();
    let mut parser = ReasoningParser::new(format, format.start(prompt, None), detokenizer);
    let mut out = Split::default();
    let mut texts = [String::new(), String::new()];
    let mut add = |part: Part, text: &str| {
        assert!(!text.is_empty(), "nothing is no text");
        texts[usize::from(part == Part::Content)].push_str(text);
    };
    let mut tokens = 0;
    for id in ids {
        parser.push(*id, &mut add);
        assert!(parser.reasoning_tokens() >= tokens);
        tokens = parser.reasoning_tokens();
    }
    parser.finish(&mut add);
    out.tokens = parser.reasoning_tokens();
    [out.reasoning, out.content] = texts;
    out
}

pub(crate) fn encoded(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
    tokenizer.encode(text, false, true).unwrap()
}

pub(crate) const HARMONY: &[&str] =
    &["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"];

#[test]
fn a_model_is_known_by_its_template_and_its_tokens() {
    let detect = |template: &str, special: &[&str], plain: &[&str]| {
        ReasoningFormat::detect(Some(template), &tokenizer(special, plain)).map(|format| format.name())
    };
    assert_eq!(detect("", HARMONY, &[]), Some("openai_gptoss"));
    assert_eq!(detect("", &["<|channel>", "<channel|>"], &[]), Some("gemma4"));
    assert_eq!(detect("", &["<|inner_prefix|>", "<|inner_suffix|>"], &[]), Some("apertus"));
    assert_eq!(detect("", &["[THINK]", "[/THINK]"], &[]), Some("mistral"));
    assert_eq!(detect("", &[], &["<think>", "</think>"]), Some("think"));
    assert_eq!(detect("{{ '<think>\n\n</think>' }}", &[], &[]), Some("think"));
    assert_eq!(detect("say Here is my thought process: and Here is my response:", &[], &[]), Some("granite"));
    assert_eq!(detect("[THINK] and [/THINK] are text", &[], &[]), None);
    assert_eq!(detect("{{ messages }}", &["<|start|>", "<|end|>"], &[]), None);
    assert_eq!(ReasoningFormat::detect(None, &tokenizer(&[], &[])).map(|f| f.name()), None);
    let tekken = crate::tekken::tokenizer();
    assert_eq!(ReasoningFormat::detect(None, &tekken).unwrap().name(), "mistral");
}

#[test]
fn formats_have_names_and_aliases() {
    let bytes = tokenizer(&[], &[]);
    for name in REASONING_NAMES.iter().filter(|name| **name != "openai_gptoss") {
        assert_eq!(ReasoningFormat::named(name, &bytes).unwrap().name(), *name);
    }
    assert_eq!(ReasoningFormat::named("deepseek_r1", &bytes).unwrap().name(), "think");
    let error = ReasoningFormat::named("openai_gptoss", &bytes).unwrap_err();
    assert_eq!(error, ReasoningError::MissingToken { format: "openai_gptoss", token: "<|start|>" });
    let error = ReasoningFormat::named("thinker", &bytes).unwrap_err().to_string();
    assert!(error.contains("thinker") && error.contains("openai_gptoss, gemma4"), "{error}");
    let harmony = ReasoningFormat::named("harmony", &tokenizer(HARMONY, &[])).unwrap();
    assert_eq!(harmony.end_token_ids(), [260, 261]);
    assert!(ReasoningFormat::named("qwen3", &bytes).unwrap().end_token_ids().is_empty());
}

#[test]
fn what_the_prompt_opened_is_reasoning_from_the_first_token() {
    for plain in [&[][..], &["<think>", "</think>"]] {
        let tokenizer = tokenizer(&[], plain);
        let format = ReasoningFormat::named("think", &tokenizer).unwrap();
        let run =
            |prompt: &str, text: &str| split(&tokenizer, &format, prompt, &encoded(&tokenizer, text)).texts();
        let assistant = "<|im_start|>assistant\n";
        assert_eq!(run(assistant, "<think>\nhm\n</think>\n\nHi."), Split::of("\nhm\n", "\n\nHi."));
        assert_eq!(run(assistant, "Hi <think>."), Split::of("", "Hi <think>."), "an answer may name it");
        assert_eq!(run(assistant, "\n <think>hm"), Split::of("hm", "\n "));
        assert_eq!(run(assistant, "a</think>b"), Split::of("", "a</think>b"), "nothing was open");
        let open = "<|im_start|>assistant\n<think>\n";
        assert_eq!(run(open, "hm</think>Hi</think>"), Split::of("hm", "Hi</think>"));
        assert_eq!(run(open, "\n<think>hm<think></think>Hi"), Split::of("\nhm<think>", "Hi"), "an echo");
        assert_eq!(run(open, "cut off"), Split::of("cut off", ""));
        assert_eq!(run(open, "</think>"), Split::of("", ""));
        let closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n";
        assert_eq!(run(closed, "Hi <think>x</think>"), Split::of("", "Hi <think>x</think>"));
        // What a user wrote opens nothing.
        let asked = "<|im_start|>user\nWhat is <think><|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(run(asked, "A tag."), Split::of("", "A tag."));
        // A continued message is read itself.
        let start = |message: &str| format.start("ignored <think>", Some(message));
        assert_eq!(start("<think>so"), format.start("<think>", None));
        assert_eq!(start("<think>so</think>And"), format.start("</think>", None));
        assert_eq!(start("And"), format.start("</think>", None));
        assert_eq!(start(" "), format.start(assistant, None));
    }
}

#[test]
fn tokens_are_counted_without_markers() {
    let tokenizer = tokenizer(&["<|channel>", "<channel|>", "<eos>"], &["<think>", "</think>"]);
    let count = |name: &str, prompt: &str, text: &str| {
        let format = ReasoningFormat::named(name, &tokenizer).unwrap();
        split(&tokenizer, &format, prompt, &encoded(&tokenizer, text)).tokens
    };
    assert_eq!(count("think", "", "<think>abc</think>defg"), 3);
    assert_eq!(count("think", "<think>", "abc</think>defg"), 3);
    assert_eq!(count("think", "", "abc"), 0);
    assert_eq!(count("think", "", "<think>é😀"), 6, "bytes of a character are tokens too");
    assert_eq!(count("gemma4", "", "<|channel>thought\nabc<channel|>defg"), 3, "a label is none");
    assert_eq!(count("gemma4", "", "<|channel>thoughts<channel|>"), 8);
    // Without tokens for the markers, their letters are tokens that count as neither part.
    assert_eq!(count("mistral", "", "[THINK]abc[/THINK]defg"), 3);
    assert_eq!(count("mistral", "", "[THINK]a[/THIN"), 7, "half a marker is text");
    assert_eq!(count("granite", "", "Here's my thought process: a.Here is my response: b"), 3);
}

#[test]
fn sections_of_control_tokens_may_come_anywhere_and_again() {
    let tokenizer = tokenizer(&["[THINK]", "[/THINK]", "<|channel>", "<channel|>"], &[]);
    let run = |name: &str, text: &str| {
        let format = ReasoningFormat::named(name, &tokenizer).unwrap();
        split(&tokenizer, &format, "[INST]x[/INST]", &encoded(&tokenizer, text)).texts()
    };
    assert_eq!(run("mistral", "Well, [THINK]a[/THINK]b[THINK]c[/THINK]d"), Split::of("ac", "Well, bd"));
    assert_eq!(run("mistral", "a[/THINK]b"), Split::of("", "ab"), "a stray control token has no text");
    assert_eq!(run("gemma4", "<|channel>thought\nhm<channel|>Hi"), Split::of("hm", "Hi"));
    assert_eq!(run("gemma4", "<|channel>thou<channel|>Hi"), Split::of("thou", "Hi"), "half a label is text");
    assert_eq!(run("gemma4", "<|channel>thou"), Split::of("thou", ""));
    assert_eq!(run("gemma4", "<|channel>thought\nthought\n<channel|>"), Split::of("thought\n", ""));
    assert_eq!(run("gemma4", "<|channel>thoughtful"), Split::of("thoughtful", ""));
}

#[test]
fn an_unfinished_character_before_a_marker_is_shown_as_such() {
    let tokenizer = tokenizer(&[], &["<think>", "</think>"]);
    let format = ReasoningFormat::named("think", &tokenizer).unwrap();
    let ids = [256, 0xC3, 257, 0xC3, 0xA9, 999_999, u32::from(b'.')];
    let out = split(&tokenizer, &format, "", &ids);
    assert_eq!((out.tokens, out.texts()), (1, Split::of("\u{FFFD}", "é.")));
}

/// Text out of which markers, halves of markers and ordinary text come up often.
fn pieces() -> impl Strategy<Value = Vec<&'static str>> {
    let words = [
        "<think>",
        "</think>",
        "<thi",
        "nk>",
        "</",
        "think>",
        "<",
        ">",
        "a",
        "é",
        "😀",
        "\n",
        " ",
        "[THINK]",
        "[/THINK]",
        "[/TH",
        "INK]",
        "Here's my thought process:",
        "Here is my response:",
        "Here is my ",
    ];
    proptest::collection::vec(proptest::sample::select(words.to_vec()), 0..14)
}

/// The definition, read off, on a whole text with markers as text.
fn oracle(text: &str, start: &str, end: &str, repeats: bool, open: bool) -> (String, String) {
    let (mut reasoning, mut content) = (String::new(), String::new());
    let (mut rest, mut inside, mut first) = (text, open, true);
    loop {
        if inside {
            // An echo of the marker at the beginning.
            while let Some(after) = rest.trim_start().strip_prefix(start) {
                reasoning.push_str(&rest[..rest.len() - rest.trim_start().len()]);
                rest = after;
            }
            first = false;
            let Some((before, after)) = rest.split_once(end) else {
                reasoning.push_str(rest);
                return (reasoning, content);
            };
            reasoning.push_str(before);
            (rest, inside) = (after, false);
        } else {
            let found = rest.split_once(start);
            let found = found.filter(|(before, _)| repeats || (first && before.trim().is_empty()));
            let Some((before, after)) = found else {
                content.push_str(rest);
                return (reasoning, content);
            };
            content.push_str(before);
            (rest, inside, first) = (after, true, false);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]
    /// Markers as text, one byte a token: the hardest chunking; and the same text in tokens of several characters,
    /// and with markers that are tokens.
    #[test]
    fn nothing_is_lost_and_no_marker_leaks(pieces in pieces(), open: bool, mistral: bool) {
        let text = pieces.concat();
        let (name, start, end) =
            if mistral { ("mistral", "[THINK]", "[/THINK]") } else { ("think", "<think>", "</think>") };
        let expected = oracle(&text, start, end, mistral, open);
        let prompt = if open { start } else { "" };
        static ALL: LazyLock<[Tokenizer; 4]> = LazyLock::new(|| [
            tokenizer(&[], &[]),
            tokenizer(&[], &["<thi", "nk>", "</", "[/TH", "INK]", "a<", "😀"]),
            tokenizer(&[], &["<think>", "</think>"]),
            tokenizer(&[], &["[THINK]", "[/THINK]"]),
        ]);
        for tokenizer in &*ALL {
            let format = ReasoningFormat::named(name, tokenizer).unwrap();
            let ids = encoded(tokenizer, &text);
            let out = split(tokenizer, &format, prompt, &ids);
            // A vocabulary that has the marker spells every occurrence with it, so both readings agree, but for a
            // stray one in an answer: there the token is text, as the characters are.
            prop_assert_eq!(&(out.reasoning.clone(), out.content.clone()), &expected, "{:?}", text);
            prop_assert!(out.tokens as usize <= ids.len());
            prop_assert_eq!(out.tokens == 0, out.reasoning.is_empty());
        }
    }
}

#[test]
fn harmony_reads_channels_from_token_ids() {
    let tokenizer = tokenizer(HARMONY, &[]);
    let format = ReasoningFormat::named("openai_gptoss", &tokenizer).unwrap();
    let run = |text: &str| {
        split(
            &tokenizer,
            &format,
            "<|start|>user<|message|>x<|end|><|start|>assistant",
            &encoded(&tokenizer, text),
        )
    };
    let out = run(
        "<|channel|>analysis<|message|>hm é<|end|><|start|>assistant<|channel|>final<|message|>Hi <b>.<|return|>",
    );
    assert_eq!((out.tokens, out.texts()), (5, Split::of("hm é", "Hi <b>.")));
    // A preamble is meant for the reader; messages of one part are lines of their own.
    let out = run(
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>\
         <|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
    );
    assert_eq!((out.tokens, out.texts()), (2, Split::of("a\nb", "Let me see.\nYes.")));
    // A call that nobody asked for is not silenced.
    let out = run(" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{\"a\":1}<|call|>");
    assert_eq!((out.tokens, out.texts()), (0, Split::of("", "{\"a\":1}")));
    let out = run("<|channel|>analysis to=python code<|message|>1+1<|call|>");
    assert_eq!((out.tokens, out.texts()), (3, Split::of("1+1", "")));
}

#[test]
fn harmony_survives_models_that_forget_it() {
    let tokenizer = tokenizer(HARMONY, &[]);
    let format = ReasoningFormat::named("openai_gptoss", &tokenizer).unwrap();
    let run =
        |prompt: &str, text: &str| split(&tokenizer, &format, prompt, &encoded(&tokenizer, text)).texts();
    let assistant = "<|start|>assistant";
    assert_eq!(run(assistant, "Hello"), Split::of("", "Hello"), "no header at all");
    assert_eq!(run(assistant, "<|message|>Hello"), Split::of("", "Hello"), "no channel");
    assert_eq!(run(assistant, "<|channel|>odd<|message|>Hello"), Split::of("", "Hello"));
    let long = "word ".repeat(100);
    assert_eq!(run(assistant, &long), Split::of("", &long), "too long for a header");
    assert_eq!(run(assistant, "<|channel|>anal"), Split::of("", ""), "a header that was cut off");
    let twice = "<|channel|>final<|message|>a<|channel|>analysis<|message|>b<|message|>c<|constrain|>d";
    assert_eq!(run(assistant, twice), Split::of("bcd", "a"), "no end between two messages");
    assert_eq!(run(assistant, "<|channel|>final<|message|>a<|end|>b"), Split::of("", "a\nb"));
    let spelled = encoded(&tokenizer, "<|channel|>final<|message|>");
    let text = tokenizer.encode("the token <|end|> ends", false, false).unwrap();
    let ids = [spelled, text].concat();
    assert_eq!(
        split(&tokenizer, &format, assistant, &ids).texts(),
        Split::of("", "the token <|end|> ends"),
        "spelled out it is text"
    );
    // A message of the assistant that is to be continued.
    let open = "<|start|>assistant<|channel|>final<|message|>I was";
    assert_eq!(run(open, " there<|return|>"), Split::of("", " there"));
    let open = "<|start|>assistant<|channel|>analysis<|message|>I was";
    assert_eq!(run(open, " there<|end|>"), Split::of(" there", ""));
    assert_eq!(
        run("<|start|>user<|message|>x<|end|>", "<|start|>assistant<|channel|>final<|message|>y"),
        Split::of("", "y")
    );
    let part = [0xC3];
    let ids = [encoded(&tokenizer, "<|channel|>final<|message|>"), part.to_vec()].concat();
    assert_eq!(split(&tokenizer, &format, assistant, &ids).texts(), Split::of("", "\u{FFFD}"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn harmony_joins_the_messages_of_each_part(
        messages in proptest::collection::vec((0usize..4, "[a-cé ]{0,6}"), 0..6), noise in proptest::collection::vec(0u32..264, 0..40),
    ) {
        static ONCE: LazyLock<Tokenizer> = LazyLock::new(|| tokenizer(HARMONY, &[]));
        let format = ReasoningFormat::named("openai_gptoss", &ONCE).unwrap();
        let channels = ["analysis", "final", "commentary", "commentary to=functions.f <|constrain|>json"];
        let written: Vec<String> = messages
            .iter()
            .map(|(channel, text)| format!("<|channel|>{}<|message|>{text}<|end|>", channels[*channel]))
            .collect();
        let joined = |reasoning: bool| {
            let of_part = messages.iter().filter(|(channel, text)| (*channel == 0) == reasoning && !text.is_empty());
            of_part.map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("\n")
        };
        let out = split(&ONCE, &format, "<|start|>assistant", &encoded(&ONCE, &written.join("<|start|>assistant")));
        let thought: usize = messages.iter().filter(|m| m.0 == 0).map(|m| m.1.len()).sum();
        prop_assert_eq!((out.tokens as usize, out.texts()), (thought, (joined(true), joined(false))));
        // Any ids at all: no panic, no more reasoning than tokens.
        let out = split(&ONCE, &format, "<|start|>assistant", &noise);
        prop_assert!(out.tokens as usize <= noise.len());
    }
}
