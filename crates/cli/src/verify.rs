//! `mirai verify`: what a model is and what it needs, from its headers, and whether `mirai serve` would take it.
//!
//! Owns the two forms of the report. What is in it is [`mirai_model::inspect`]'s; what its texts are taken for is
//! said by the same code that serves them.

use std::fmt::Write as _;
use std::io::Write as _;

use mirai_engine::GroupKind;
use mirai_hub::StoreOptions;
use mirai_model::ModelSource;
use mirai_model::inspect::{Inspection, inspect};
use mirai_model::pooling::Task;
use mirai_model::texts::Texts;
use serde_json::{Value, json};

use crate::args::VerifyArgs;
use crate::config::ModelConfig;
use crate::exit::Failure;
use crate::load::{named_source, understood};

pub(crate) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let store = StoreOptions { allow_missing_weights: true, ..StoreOptions::from_env() };
    let source = named_source(&args.model, &store)?.source;
    let mut seen = inspect(&source, Task::Native).map_err(Failure::model)?;
    seen.faults.extend(text_fault(&source, &seen).err());
    let text = if args.json { format!("{:#}\n", to_json(&seen)) } else { to_text(&seen) };
    std::io::stdout().lock().write_all(text.as_bytes()).map_err(Failure::run)?;
    match seen.faults.len() {
        0 => Ok(()),
        1 => Err(Failure::model(format!("{} cannot be loaded: {}", args.model, seen.faults[0]))),
        n => Err(Failure::model(format!("{} cannot be loaded: {n} faults", args.model))),
    }
}

/// Says what `serve`, as it is by default, would say of the model's texts.
fn text_fault(source: &ModelSource, seen: &Inspection) -> Result<(), String> {
    let texts = Texts::read(source).map_err(|e| e.to_string())?;
    texts.eos_ids(&seen.spec).map_err(|e| e.to_string())?;
    let parser = ModelConfig::default().reasoning_parser;
    let understood = understood(&seen.spec, seen.pooling.as_ref(), texts, &parser);
    understood.map(drop).map_err(|failure| failure.to_string())
}

fn kind(kind: GroupKind) -> String {
    match kind {
        GroupKind::Full => "full".to_owned(),
        GroupKind::Window(n) => format!("window of {n}"),
        GroupKind::Recurrent => "recurrent".to_owned(),
    }
}

fn to_json(seen: &Inspection) -> Value {
    let group = |g: &mirai_model::inspect::Group| {
        json!({"keeps": kind(g.kind), "layers": g.layers, "bytes_per_token": g.token_bytes,
            "bytes_per_sequence": g.state_bytes})
    };
    json!({
        "architecture": seen.spec.architecture,
        "task": seen.task(),
        "layers": seen.spec.layers.len(),
        "hidden_size": seen.spec.hidden,
        "vocab_size": seen.spec.vocab,
        "max_model_len": seen.spec.context,
        "parameters": seen.spec.parameters(),
        "active_parameters": seen.spec.active_parameters(),
        "quantization": seen.quantized.as_ref().map(mirai_model::quant::Quantized::name),
        "file_bytes": seen.stored,
        "cpu_weight_bytes": seen.cpu_bytes,
        "kv_cache_dtype": "bf16",
        "kv_bytes_per_token": seen.token_bytes(),
        "state_bytes_per_sequence": seen.state_bytes(),
        "cache_groups": seen.groups.iter().map(group).collect::<Vec<_>>(),
        "features": seen.features(),
        "tokenizer": seen.tokenizer,
        "chat_template": seen.chat_template,
        "unused_tensors": seen.unused.names,
        "tensors_of_other_parts": seen.unused.ignored,
        "ignored_fields": seen.spec.ignored_fields,
        "faults": seen.faults,
    })
}

fn to_text(seen: &Inspection) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{name:<24}{value}");
    };
    row("architecture", format!("{}, to {}", seen.spec.architecture, seen.task()));
    let (all, active) = (seen.spec.parameters(), seen.spec.active_parameters());
    let active = if active == all { String::new() } else { format!(", {} of them active", count(active)) };
    row("parameters", format!("{}{active}", count(all)));
    let (layers, hidden, vocab) = (seen.spec.layers.len(), seen.spec.hidden, seen.spec.vocab);
    row("shape", format!("{layers} layers, hidden {hidden}, vocabulary {vocab}"));
    row("context", format!("{} tokens", seen.spec.context));
    let stored: Vec<String> = seen.stored.iter().map(|(name, n)| format!("{} {name}", bytes(*n))).collect();
    row("weights in the files", list(&stored));
    if let Some(quantized) = &seen.quantized {
        row("quantization", quantized.name().to_owned());
    }
    if seen.cpu_bytes > 0 {
        row("weights on the CPU", bytes(seen.cpu_bytes));
    }
    row("KV cache", format!("{} a token in bf16, all layers counted", bytes(seen.token_bytes() as u64)));
    for g in &seen.groups {
        let each = match g.kind {
            GroupKind::Recurrent => format!("{} a sequence", bytes(g.state_bytes as u64)),
            _ => format!("{} a token", bytes(g.token_bytes as u64)),
        };
        row("", format!("{} layers, {}: {each}", g.layers, kind(g.kind)));
    }
    row("features", list(&seen.features()));
    row("tokenizer", list(&seen.tokenizer));
    row("chat template", if seen.chat_template { "yes" } else { "none: chat is refused" }.to_owned());
    if seen.unused.ignored > 0 {
        row("not run", format!("{} tensors of other modalities, drafts or buffers", seen.unused.ignored));
    }
    if !seen.unused.names.is_empty() {
        row("unused tensors", list(&seen.unused.names));
    }
    if !seen.spec.ignored_fields.is_empty() {
        row("fields without meaning", list(&seen.spec.ignored_fields));
    }
    for fault in &seen.faults {
        row("refused", fault.clone());
    }
    out
}

/// The first ones of a list.
fn list<T: AsRef<str>>(items: &[T]) -> String {
    const SHOWN: usize = 12;
    if items.is_empty() {
        return "none".to_owned();
    }
    let shown: Vec<&str> = items.iter().take(SHOWN).map(AsRef::as_ref).collect();
    let more = items.len().saturating_sub(SHOWN);
    shown.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
}

fn count(n: u64) -> String {
    match n {
        0..1_000_000 => n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} million", n as f64 / 1e6),
        _ => format!("{:.2} billion", n as f64 / 1e9),
    }
}

fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = "bytes";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "bytes" { format!("{n} bytes") } else { format!("{value:.2} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(
            (count(4_000_512), count(116_829_156_672)),
            ("4.0 million".into(), "116.83 billion".into())
        );
        assert_eq!(
            (bytes(512), bytes(72 << 10), bytes(3 << 30)),
            ("512 bytes".into(), "72.00 KiB".into(), "3.00 GiB".into())
        );
        assert_eq!(list::<String>(&[]), "none");
        assert!(list(&["a"; 14]).ends_with(" and 2 more"));
    }
}
