//! The loaded model, as the HTTP surface sees it.
//!
//! Owns names, limits and defaults; it knows no weights and no architecture.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use mirai_engine::{EngineHandle, Event, TokenId};
use mirai_ledger::impact::{Footprint, ModelSize};
use mirai_text::{ChatTemplate, ReasoningFormat, Tokenizer};
use serde::Deserialize;

use crate::task::Task;

/// Everything that loading a model yields. Handed to [`crate::Server`] once.
#[derive(Debug)]
pub struct ServedModel {
    /// Names that clients may ask for; the first is the canonical one. At least one.
    pub names: Vec<String>,
    /// Its exact weights, for the ledger; empty if nobody knows.
    pub revision: String,
    /// How large it is, if the energy of requests is to be estimated where nothing measured it.
    pub estimate: Option<ModelSize>,
    /// What energy means where it runs, if answers are to name their impacts.
    pub footprint: Option<Footprint>,
    /// What it is served for.
    pub task: Task,
    /// Most tokens of prompt and output together.
    pub max_model_len: u32,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Without one, chat is refused.
    pub template: Option<ChatTemplate>,
    /// How the model marks its reasoning in chats; without one, all output is the answer.
    pub reasoning: Option<ReasoningFormat>,
    /// Tokens with which the model ends its output.
    pub eos_token_ids: Vec<TokenId>,
    /// The token that begins a text; what an empty completion prompt becomes.
    pub bos_token_id: Option<TokenId>,
    /// From `generation_config.json`.
    pub generation_defaults: GenerationDefaults,
    /// Width of the logits: token ids in requests are below it.
    pub vocab: u32,
    /// When it was loaded, Unix seconds.
    pub created: u64,
    /// Fill-in-the-middle tokens, if the model was trained with them.
    pub fim: Option<FimTokens>,
    /// The engine.
    pub engine: EngineHandle,
    /// What the engine tells.
    pub events: Receiver<Vec<Event>>,
}

/// Tokens around the parts of a text with a gap, in the order prefix, suffix, middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FimTokens {
    /// Before the text before the gap.
    pub prefix: TokenId,
    /// Before the text after the gap.
    pub suffix: TokenId,
    /// Before what fills the gap.
    pub middle: TokenId,
}

/// Defaults that the model's author recommends, for fields that a request leaves out.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct GenerationDefaults {
    /// See the request's field of the same name; likewise below.
    pub temperature: Option<f64>,
    /// Nucleus.
    pub top_p: Option<f64>,
    /// Most likely tokens kept.
    pub top_k: Option<i64>,
    /// Smallest relative probability kept.
    pub min_p: Option<f64>,
    /// Penalty on repeated tokens.
    pub repetition_penalty: Option<f64>,
    /// Cap on the output where the request names none.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// Reads the contents of a `generation_config.json`; its other fields are ignored.
    ///
    /// # Errors
    /// Malformed JSON, or a field of the wrong type.
    pub fn from_json_bytes(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

/// The part of the model that requests are judged by.
#[derive(Debug)]
pub(crate) struct ModelInfo {
    pub(crate) names: Vec<Arc<str>>,
    pub(crate) revision: String,
    pub(crate) estimate: Option<ModelSize>,
    pub(crate) footprint: Option<Footprint>,
    pub(crate) task: Task,
    pub(crate) max_model_len: u32,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) reasoning: Option<ReasoningFormat>,
    /// Sorted, without repeats.
    pub(crate) eos_token_ids: Vec<TokenId>,
    pub(crate) bos_token_id: Option<TokenId>,
    pub(crate) defaults: GenerationDefaults,
    pub(crate) vocab: u32,
    pub(crate) created: u64,
    pub(crate) fim: Option<FimTokens>,
}

impl ModelInfo {
    /// Microjoules of an answer of which nothing measured the energy, by the published formula.
    pub(crate) fn estimate(&self, output_tokens: u32, took: Duration) -> Option<u64> {
        let size = self.estimate.filter(|_| output_tokens > 0)?;
        Some(size.estimate(output_tokens.into(), took.as_secs_f64()).microjoules())
    }

    /// Splits the model into what requests are judged by, and the engine's two ends.
    pub(crate) fn split(model: ServedModel) -> (Self, EngineHandle, Receiver<Vec<Event>>) {
        let mut eos_token_ids = model.eos_token_ids;
        eos_token_ids.extend(model.reasoning.iter().flat_map(ReasoningFormat::end_token_ids));
        eos_token_ids.retain(|id| *id < model.vocab);
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        // A text of n bytes can have n tokens, hardly ever fewer than n / 64: beyond that it cannot fit.
        let max_text = (model.max_model_len as usize).saturating_mul(64).max(1 << 16);
        let max_text = max_text.min(model.tokenizer.max_input_bytes());
        let info = Self {
            names: model.names.into_iter().map(Arc::from).collect(),
            revision: model.revision,
            estimate: model.estimate,
            footprint: model.footprint,
            // What the engine could never compute is not promised.
            max_model_len: model.max_model_len.min(model.engine.max_prompt_tokens()),
            task: model.task,
            tokenizer: model.tokenizer.with_max_input_bytes(max_text),
            template: model.template,
            reasoning: model.reasoning,
            eos_token_ids,
            bos_token_id: model.bos_token_id,
            defaults: model.generation_defaults,
            vocab: model.vocab,
            created: model.created,
            fim: model.fim,
        };
        (info, model.engine, model.events)
    }

    /// The canonical name.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.names[0]
    }

    /// The served name that equals `wanted`; the canonical one if nothing is wanted.
    pub(crate) fn resolve(&self, wanted: Option<&str>) -> Option<&Arc<str>> {
        match wanted {
            None => self.names.first(),
            Some(wanted) => self.names.iter().find(|name| ***name == *wanted),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn generation_config_is_read_leniently_but_typed() {
        let text = br#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2]}"#;
        let defaults = GenerationDefaults::from_json_bytes(text).unwrap();
        assert_eq!(defaults.temperature, Some(0.6));
        assert_eq!(defaults.top_k, Some(20));
        assert_eq!(defaults.top_p, None);
        assert!(GenerationDefaults::from_json_bytes(br#"{"top_p": "x"}"#).is_err());
    }
}
