//! Cost of a generated token on its way out: detokenizer alone, with a stop matcher, and both on
//! multi-byte text. The vocabulary is made here (256 bytes and some words), so that the bench needs
//! no file.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mirai_text::{Detokenizer, GgufVocab, StopMatcher, TokenId, Tokenizer};

const TOKENS: usize = 4096;

fn tokenizer() -> Tokenizer {
    let mut tokens: Vec<String> = (0u32..=255).map(|b| format!("<0x{b:02X}>")).collect();
    let mut types = vec![6; 256];
    for n in 0..1000 {
        tokens.push(format!("▁word{n}"));
        types.push(1);
    }
    let vocab = GgufVocab {
        model: "llama".to_owned(),
        scores: Some(vec![0.0; tokens.len()]),
        tokens,
        token_types: Some(types),
        ..GgufVocab::default()
    };
    Tokenizer::from_gguf_vocab(vocab).expect("a valid vocabulary")
}

/// A fixed walk over the words; with `bytes`, every other token is part of a three-byte character.
fn ids(bytes: bool) -> Vec<TokenId> {
    let euro = [0xE2, 0x82, 0xAC];
    (0u32..)
        .map(|i| match (bytes, i % 6) {
            (true, part @ 0..3) => euro[part as usize],
            _ => 256 + i.wrapping_mul(2_654_435_761) % 1000,
        })
        .take(TOKENS)
        .collect()
}

fn run(detokenizer: &mut Detokenizer, mut stops: Option<&mut StopMatcher>, ids: &[TokenId]) -> usize {
    let mut bytes = 0;
    for id in ids {
        let text = detokenizer.push(*id).expect("a known id");
        bytes += match &mut stops {
            Some(stops) => stops.push(text).emit.len(),
            None => text.len(),
        };
    }
    bytes
}

fn detokenize(c: &mut Criterion) {
    let tokenizer = tokenizer();
    let stops: Vec<String> =
        ["</s>", "\n\nUser:", "word99999", "STOP"].iter().map(|s| (*s).to_owned()).collect();
    let mut group = c.benchmark_group("detokenize");
    group.throughput(Throughput::Elements(TOKENS as u64));
    for (name, bytes, with_stops) in [
        ("words", false, false),
        ("words+stops", false, true),
        ("byte tokens", true, false),
        ("byte tokens+stops", true, true),
    ] {
        let ids = ids(bytes);
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || {
                    let detokenizer = Detokenizer::new(&tokenizer, &[], true).expect("no ids");
                    (detokenizer, StopMatcher::new(&stops, false))
                },
                |(detokenizer, matcher)| black_box(run(detokenizer, with_stops.then_some(matcher), &ids)),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, detokenize);
criterion_main!(benches);
