//! How families spell their tensors in safetensors files, and how what is stored becomes what is wanted.
//!
//! Owns names; `cut` owns what is taken of a stored tensor, `decoder` the spellings that most families share. Names are
//! tried in order, so that a family's table may list several spellings. Reads no file: see [`crate::safetensors`].

mod cut;
mod decoder;

pub use cut::{Cut, Run};
pub use decoder::{decoder, decoder_layer, gpt_oss_layer};

use crate::quant::Quantized;
use crate::spec::ModelSpec;
use crate::weights::{Part, TensorId};

/// How one family spells its tensors.
#[derive(Debug)]
pub struct Naming {
    /// What may come before every name, tried in order: wrappers and base models add or drop some.
    pub prefixes: &'static [&'static str],
    /// What comes before a layer's number, after the prefix.
    pub layers: &'static str,
    /// Spellings of a tensor that is not of a layer.
    pub model: fn(&ModelSpec, TensorId) -> Vec<Stored>,
    /// Spellings of a layer's tensor, after `{layers}{number}.`.
    pub layer: fn(&ModelSpec, usize, Part) -> Vec<Stored>,
}

/// What a configuration tells of the files beside it.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoint {
    /// How tensors are called.
    pub naming: &'static Naming,
    /// How weights are quantized, if they are.
    pub quantized: Option<Quantized>,
    /// Layers after the last that are stored and only draft tokens; we do not run them.
    pub draft_layers: usize,
}

/// Beginnings of names that belong to what we do not run: other modalities and draft heads.
const IGNORED: &[&str] = &[
    "vision_tower.",
    "model.vision_tower.",
    "vision_model.",
    "visual.",
    "model.visual.",
    "vision_encoder.",
    "multi_modal_projector.",
    "model.multi_modal_projector.",
    "audio_tower.",
    "model.audio_tower.",
    "embed_vision.",
    "model.embed_vision.",
    "embed_audio.",
    "model.embed_audio.",
    "mtp.",
    "model.mtp.",
    "pooler.",
    "roberta.pooler.",
];

/// Buffers that older exports store.
const BUFFERS: &[&str] =
    &["rotary_emb.inv_freq", ".attn.bias", ".act_fn.beta", ".act_fn.eps", "embeddings.position_ids"];

impl Naming {
    /// Decoders in the spelling of Llama.
    pub const DECODER: Self = Self {
        prefixes: &["model.", "model.language_model.", "language_model.model.", "language_model.", ""],
        layers: "layers.",
        model: decoder,
        layer: decoder_layer,
    };

    /// Prefix of a file's names: the first under which there is a layer 0. `has` tells whether some name starts so.
    #[must_use]
    pub fn prefix(&self, has: impl Fn(&str) -> bool) -> &'static str {
        let found = self.prefixes.iter().find(|prefix| has(&format!("{prefix}{}0.", self.layers)));
        found.or(self.prefixes.first()).copied().unwrap_or_default()
    }

    /// Spellings of a tensor under this prefix, by full name.
    #[must_use]
    pub fn spell(&self, prefix: &str, spec: &ModelSpec, id: TensorId) -> Vec<Stored> {
        let (start, mut all) = match id {
            TensorId::Layer(i, part) => (format!("{prefix}{}{i}.", self.layers), (self.layer)(spec, i, part)),
            id => (prefix.to_owned(), (self.model)(spec, id)),
        };
        for stored in &mut all {
            if !stored.top {
                stored.name.insert_str(0, &start);
            }
        }
        all
    }

    /// The number of a tensor's layer, if its name has the form of one.
    #[must_use]
    pub fn layer_number(&self, prefix: &str, name: &str) -> Option<usize> {
        name.strip_prefix(prefix)?.strip_prefix(self.layers)?.split('.').next()?.parse().ok()
    }

    /// Whether the tensor belongs to a part of a checkpoint that is never run.
    #[must_use]
    pub fn is_ignored(name: &str) -> bool {
        IGNORED.iter().any(|start| name.starts_with(start)) || BUFFERS.iter().any(|end| name.ends_with(end))
    }
}

/// A spelling of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// Whether the name is whole; else the prefix and the layer come before it.
    pub top: bool,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// What of it is wanted.
    pub cut: Cut,
    /// Whether this spelling is one of quantized weights alone.
    pub packed: bool,
}

impl Stored {
    /// A tensor as it is wanted.
    #[must_use]
    pub fn whole(name: impl Into<String>, shape: Vec<usize>) -> Self {
        Self { name: name.into(), top: false, shape, cut: Cut::Whole, packed: false }
    }

    /// Rows of a tensor.
    #[must_use]
    pub fn rows(name: impl Into<String>, shape: Vec<usize>, rows: Vec<Run>) -> Self {
        Self { cut: Cut::Rows(rows), ..Self::whole(name, shape) }
    }

    /// Under its whole name.
    #[must_use]
    pub fn at_top(self) -> Self {
        Self { top: true, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_is_that_of_layer_0() {
        let prefix =
            |names: &[&str]| Naming::DECODER.prefix(|start| names.iter().any(|n| n.starts_with(start)));
        assert_eq!(prefix(&["lm_head.weight", "model.layers.0.x"]), "model.");
        assert_eq!(prefix(&["language_model.model.layers.0.x", "model.y"]), "language_model.model.");
        assert_eq!(prefix(&["layers.0.x"]), "");
        assert_eq!(prefix(&[]), "model.");
        assert_eq!(Naming::DECODER.layer_number("model.", "model.layers.12.x"), Some(12));
        assert_eq!(Naming::DECODER.layer_number("model.", "model.norm.weight"), None);
        assert!(Naming::is_ignored("model.visual.blocks.0.x") && !Naming::is_ignored("model.layers.0.x"));
    }
}
