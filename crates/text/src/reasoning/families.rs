//! The table of families: what marks reasoning in each, and how a model is recognised.
//!
//! Owns names and markers, and nothing that moves.

use crate::Tokenizer;

/// Markers of a section, each in the ways that models write it; the first is the usual one.
#[derive(Debug)]
pub(super) struct Markers {
    pub(super) start: &'static [&'static str],
    pub(super) end: &'static [&'static str],
}

#[derive(Debug)]
pub(super) enum Shape {
    /// Text between a start and an end marker.
    Sections {
        markers: Markers,
        /// A name that the model writes right after the start marker and that is no part of the reasoning.
        label: &'static str,
        /// Whether reasoning may begin anywhere and again, because its markers are control tokens that never are
        /// text. Otherwise it comes once, first, and later markers are text: an answer may quote them.
        repeats: bool,
    },
    /// OpenAI's messages with channels.
    Harmony,
}

#[derive(Debug)]
pub(super) struct Family {
    pub(super) name: &'static str,
    /// Other names of it: vLLM's parsers whose models mark their reasoning in this way.
    aliases: &'static [&'static str],
    pub(super) shape: Shape,
}

/// Names of all formats.
pub const REASONING_NAMES: &[&str] = &["openai_gptoss", "gemma4", "apertus", "mistral", "granite", "think"];

/// In the order in which a model is held against them.
const FAMILIES: &[Family] = &[
    Family { name: "openai_gptoss", aliases: &["gpt_oss", "harmony"], shape: Shape::Harmony },
    Family {
        name: "gemma4",
        aliases: &[],
        shape: Shape::Sections {
            markers: Markers { start: &["<|channel>"], end: &["<channel|>"] },
            label: "thought\n",
            repeats: true,
        },
    },
    Family {
        name: "apertus",
        aliases: &[],
        shape: Shape::Sections {
            markers: Markers { start: &["<|inner_prefix|>"], end: &["<|inner_suffix|>"] },
            label: "",
            repeats: true,
        },
    },
    Family {
        name: "mistral",
        aliases: &["magistral"],
        shape: Shape::Sections {
            markers: Markers { start: &["[THINK]"], end: &["[/THINK]"] },
            label: "",
            repeats: true,
        },
    },
    Family {
        name: "granite",
        aliases: &[],
        shape: Shape::Sections {
            markers: Markers {
                start: &["Here is my thought process:", "Here's my thought process:"],
                end: &["Here is my response:", "Here's my response:"],
            },
            label: "",
            repeats: false,
        },
    },
    Family {
        name: "think",
        aliases: &["qwen3", "deepseek_r1", "deepseek_v3", "glm45", "smollm3", "holo2", "nemotron_v3"],
        shape: Shape::Sections {
            markers: Markers { start: &["<think>"], end: &["</think>"] },
            label: "",
            repeats: false,
        },
    },
];

/// The family of that name.
pub(super) fn find(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name || family.aliases.contains(&name))
}

/// The first family whose markers the model has.
///
/// Families with control tokens are known by these tokens; the template need not name them (Mistral's leaves
/// that to the system prompt). Markers that may also be plain text are known by either: a vocabulary that spells
/// `<think>` in pieces still belongs to a model that thinks, if its template says so.
pub(super) fn detect(template: &str, tokenizer: &Tokenizer) -> Option<&'static Family> {
    let has = |token: &str| tokenizer.token_to_id(token).is_some();
    FAMILIES.iter().find(|family| match &family.shape {
        Shape::Harmony => super::harmony::NEEDED.iter().all(|token| has(token)),
        Shape::Sections { markers, repeats, .. } => {
            let tokens = has(markers.start[0]) && has(markers.end[0]);
            tokens || (!repeats && template.contains(markers.end[0]))
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_table_and_none_is_taken_twice() {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        assert_eq!(names, REASONING_NAMES);
        let mut all: Vec<&str> = FAMILIES.iter().flat_map(|f| f.aliases).copied().chain(names).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(!all.contains(&"auto") && !all.contains(&"none"), "these two are the caller's words");
        assert_eq!(find("qwen3").unwrap().name, "think");
        assert!(find("qwen4").is_none());
    }

    #[test]
    fn every_marker_is_a_text_and_no_start_contains_an_end() {
        for family in FAMILIES {
            let Shape::Sections { markers, .. } = &family.shape else { continue };
            for start in markers.start {
                for end in markers.end {
                    assert!(!start.is_empty() && !end.is_empty());
                    assert!(!start.contains(end) && !end.contains(start), "{}", family.name);
                }
            }
        }
    }
}
