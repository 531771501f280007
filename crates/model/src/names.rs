//! How families spell their tensors in safetensors files, and how what is stored becomes what is wanted.
//!
//! Owns names and cuts. A tensor of ours may be a part of a stored one: rows of a fused projection, every second row,
//! one expert of many. Names are tried in order, so that a family's table may list several spellings.
//! Reads no file: see [`crate::safetensors`].

use std::borrow::Cow;

use crate::backend::HostTensor;
use crate::error::{ModelError, Result};
use crate::quant::{Quantized, widen};
use crate::spec::{Ffn, KvSource, Mixer, ModelSpec, Placement};
use crate::weights::{MlpPart, Part, TensorId, shape};

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

    /// Prefix of a file's names: the first under which there is a layer 0.
    #[must_use]
    pub fn prefix<'n>(&self, names: impl Iterator<Item = &'n str> + Clone) -> &'static str {
        let found = self.prefixes.iter().find(|prefix| {
            let start = format!("{prefix}{}0.", self.layers);
            names.clone().any(|name| name.starts_with(&start))
        });
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

/// `times` runs of `len` rows, the first at `first`, each `stride` after the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First row.
    pub first: usize,
    /// Rows of a run.
    pub len: usize,
    /// Rows from a run's first to the next one's.
    pub stride: usize,
    /// Runs.
    pub times: usize,
}

impl Run {
    /// Rows beside each other.
    #[must_use]
    pub const fn span(first: usize, len: usize) -> Self {
        Self { first, len, stride: len, times: 1 }
    }

    fn rows(self) -> impl Iterator<Item = usize> {
        (0..self.times).flat_map(move |i| {
            let first = self.first + i * self.stride;
            first..first + self.len
        })
    }
}

/// What is taken of a stored tensor, which counts as a matrix: the last dimension is a row (of one number, where a
/// vector is wanted).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All, as it is.
    Whole,
    /// These rows.
    Rows(Vec<Run>),
    /// Some rows, of which some columns, turned: a column becomes a row. Only of plain numbers; others are widened.
    Turned {
        /// Rows.
        rows: Run,
        /// Columns.
        columns: Run,
    },
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

impl Cut {
    /// Takes the part out of the stored tensor; `shape` is that of the part. Rows move whole, so blocks stay intact.
    ///
    /// # Errors
    /// The cut does not lie in the tensor, or its rows cannot be told apart.
    pub fn apply<'a>(&self, tensor: HostTensor<'a>, shape: &[usize]) -> Result<HostTensor<'a>> {
        match self {
            Self::Whole => Ok(HostTensor { shape: shape.to_vec(), ..tensor }),
            Self::Rows(runs) => rows(&tensor, runs, shape),
            Self::Turned { rows, columns } => turned(widen(tensor)?, *rows, *columns, shape),
        }
    }
}

fn impossible(tensor: &HostTensor<'_>, shape: &[usize]) -> ModelError {
    let why = format!("a part of shape {shape:?} cannot be cut out of shape {:?}", tensor.shape);
    ModelError::Convert { tensor: tensor.name.clone(), from: tensor.storage, to: tensor.storage, why }
}

fn rows<'a>(tensor: &HostTensor<'_>, runs: &[Run], shape: &[usize]) -> Result<HostTensor<'a>> {
    let width = if shape.len() == 1 { 1 } else { shape.last().copied().unwrap_or(1) };
    let row = tensor.storage.row_bytes(width).ok_or_else(|| impossible(tensor, shape))?;
    let mut bytes = Vec::with_capacity(shape.iter().take(shape.len().max(2) - 1).product::<usize>() * row);
    for run in runs {
        for i in 0..run.times {
            let first = (run.first + i * run.stride) * row;
            let part = tensor.bytes.get(first..first + run.len * row);
            bytes.extend_from_slice(part.ok_or_else(|| impossible(tensor, shape))?);
        }
    }
    if tensor.storage.tensor_bytes(shape) != Some(bytes.len()) {
        return Err(impossible(tensor, shape));
    }
    let scales = tensor.scales.as_ref().map(|scales| {
        let picked: Vec<usize> = runs.iter().flat_map(|run| run.rows()).collect();
        scales.pick(&picked, width)
    });
    let (name, shape, storage) = (tensor.name.clone(), shape.to_vec(), tensor.storage);
    Ok(HostTensor { name, shape, storage, bytes: Cow::Owned(bytes), scales })
}

fn turned<'a>(tensor: HostTensor<'_>, rows: Run, columns: Run, shape: &[usize]) -> Result<HostTensor<'a>> {
    let width = tensor.shape.last().copied().unwrap_or(1);
    let element = tensor.storage.row_bytes(1).filter(|_| tensor.storage.is_float());
    let element = element.ok_or_else(|| impossible(&tensor, shape))?;
    let mut bytes = Vec::with_capacity(shape.iter().product::<usize>() * element);
    for column in columns.rows() {
        for row in rows.rows() {
            let at = (row * width + column) * element;
            let number = tensor.bytes.get(at..at + element).ok_or_else(|| impossible(&tensor, shape))?;
            bytes.extend_from_slice(number);
        }
    }
    if tensor.storage.tensor_bytes(shape) != Some(bytes.len()) {
        return Err(impossible(&tensor, shape));
    }
    let (name, shape, storage) = (tensor.name, shape.to_vec(), tensor.storage);
    Ok(HostTensor { name, shape, storage, bytes: Cow::Owned(bytes), scales: None })
}

/// Tensors of decoders that are not of a layer.
#[must_use]
pub fn decoder(spec: &ModelSpec, id: TensorId) -> Vec<Stored> {
    let whole = |name: &str| vec![Stored::whole(name, shape(spec, id))];
    match id {
        TensorId::Embedding => whole("embed_tokens.weight"),
        TensorId::FinalNorm => whole("norm.weight"),
        TensorId::FinalNormBias => whole("norm.bias"),
        TensorId::Head => {
            let names = ["lm_head.weight", "language_model.lm_head.weight"];
            names.map(|name| Stored::whole(name, shape(spec, id)).at_top()).into()
        }
        _ => Vec::new(),
    }
}

/// A layer's tensors in the spelling that most decoders share. Families that differ match their own parts first.
#[must_use]
pub fn decoder_layer(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let of = &spec.layers[layer];
    let around = of.placement != Placement::Before;
    let wanted = shape(spec, TensorId::Layer(layer, part));
    let whole = |name: &str| vec![Stored::whole(name, wanted.clone())];
    match part {
        Part::AttentionNorm => whole("input_layernorm.weight"),
        Part::AttentionNormBias => whole("input_layernorm.bias"),
        Part::AttentionPostNorm => whole("post_attention_layernorm.weight"),
        Part::MlpNorm if around => whole("pre_feedforward_layernorm.weight"),
        Part::MlpNorm => whole("post_attention_layernorm.weight"),
        Part::MlpNormBias => whole("post_attention_layernorm.bias"),
        Part::MlpPostNorm => whole("post_feedforward_layernorm.weight"),
        Part::DensePostNorm => whole("post_feedforward_layernorm_1.weight"),
        Part::ExpertsNorm => whole("pre_feedforward_layernorm_2.weight"),
        Part::ExpertsPostNorm => whole("post_feedforward_layernorm_2.weight"),
        Part::OutputScale => whole("layer_scalar"),
        Part::Mlp(_) | Part::XieluP | Part::XieluN => dense(spec, layer, part),
        Part::Expert(expert, part) => expert_names(spec, layer, expert, part),
        Part::Shared(part) => ["mlp.shared_expert", "mlp.shared_experts"]
            .map(|block| Stored::whole(format!("{block}.{}", mlp_name(part)), wanted.clone()))
            .into(),
        Part::SharedGate => whole("mlp.shared_expert_gate.weight"),
        Part::Router => {
            ["mlp.gate.weight", "block_sparse_moe.gate.weight", "mlp.router.weight", "router.proj.weight"]
                .map(|name| Stored::whole(name, wanted.clone()))
                .into()
        }
        Part::RouterBias => whole("mlp.router.bias"),
        Part::RouterNorm => whole("router.scale"),
        Part::ExpertScale => whole("router.per_expert_scale"),
        Part::Correction => whole("mlp.gate.e_score_correction_bias"),
        mixer => mixer_names(spec, layer, mixer, wanted),
    }
}

const fn mlp_name(part: MlpPart) -> &'static str {
    match part {
        MlpPart::Gate => "gate_proj.weight",
        MlpPart::Up => "up_proj.weight",
        MlpPart::Down => "down_proj.weight",
        MlpPart::GateBias => "gate_proj.bias",
        MlpPart::UpBias => "up_proj.bias",
        MlpPart::DownBias => "down_proj.bias",
    }
}

/// The dense block: each projection its own, or gate and up fused, gate first.
fn dense(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let wanted = shape(spec, TensorId::Layer(layer, part));
    let part = match part {
        Part::Mlp(part) => part,
        Part::XieluP => return vec![Stored::whole("mlp.act_fn.alpha_p", wanted)],
        _ => return vec![Stored::whole("mlp.act_fn.alpha_n", wanted)],
    };
    let mut all = vec![Stored::whole(format!("mlp.{}", mlp_name(part)), wanted.clone())];
    let second = match part {
        MlpPart::Gate | MlpPart::GateBias => 0,
        MlpPart::Up | MlpPart::UpBias => 1,
        MlpPart::Down | MlpPart::DownBias => return all,
    };
    let name = if part.is_linear() { "mlp.gate_up_proj.weight" } else { "mlp.gate_up_proj.bias" };
    let rows = wanted[0];
    let mut fused = wanted;
    fused[0] *= 2;
    all.push(Stored::rows(name, fused, vec![Run::span(second * rows, rows)]));
    all
}

/// An expert's projections: each a tensor, as published; or all experts' in one, gate above up.
fn expert_names(spec: &ModelSpec, layer: usize, expert: usize, part: MlpPart) -> Vec<Stored> {
    let wanted = shape(spec, TensorId::Layer(layer, Part::Expert(expert, part)));
    let experts = match &spec.layers[layer].ffn {
        Ffn::Moe(moe) | Ffn::DenseAndMoe(_, moe) => moe.route.experts,
        Ffn::Dense(_) => return Vec::new(),
    };
    let mut all = vec![Stored::whole(format!("mlp.experts.{expert}.{}", mlp_name(part)), wanted.clone())];
    let mixtral = match part {
        MlpPart::Gate => "w1",
        MlpPart::Up => "w3",
        MlpPart::Down => "w2",
        _ => return all,
    };
    let name = format!("block_sparse_moe.experts.{expert}.{mixtral}.weight");
    all.push(Stored::whole(name, wanted.clone()));
    let (rows, width) = (wanted[0], wanted[1]);
    let (name, per_expert, first) = match part {
        MlpPart::Down => ("down_proj", rows, 0),
        MlpPart::Gate => ("gate_up_proj", 2 * rows, 0),
        _ => ("gate_up_proj", 2 * rows, rows),
    };
    for block in ["mlp.experts", "experts"] {
        let fused = vec![experts, per_expert, width];
        let run = Run::span(expert * per_expert + first, rows);
        all.push(Stored::rows(format!("{block}.{name}"), fused, vec![run]));
    }
    all
}

fn mixer_names(spec: &ModelSpec, layer: usize, part: Part, wanted: Vec<usize>) -> Vec<Stored> {
    match &spec.layers[layer].mixer {
        Mixer::Attention(_) => attention(spec, layer, part, wanted),
        Mixer::Latent(l) => {
            let s = &l.shape;
            let fused = vec![l.heads * (s.nope + s.value), s.latent];
            let head = |head| head * (s.nope + s.value);
            let name = match part {
                Part::QDown => "self_attn.q_a_proj.weight",
                Part::QDownBias => "self_attn.q_a_proj.bias",
                Part::QDownNorm => "self_attn.q_a_layernorm.weight",
                Part::QUp if l.q_rank.is_some() => "self_attn.q_b_proj.weight",
                Part::QUp => "self_attn.q_proj.weight",
                Part::KvDown => "self_attn.kv_a_proj_with_mqa.weight",
                Part::KvDownBias => "self_attn.kv_a_proj_with_mqa.bias",
                Part::KvNorm => "self_attn.kv_a_layernorm.weight",
                Part::O => "self_attn.o_proj.weight",
                Part::OBias => "self_attn.o_proj.bias",
                Part::Absorb(h) => {
                    let (rows, columns) = (Run::span(head(h), s.nope), Run::span(0, s.latent));
                    let whole = Stored::whole("self_attn.kv_b_proj.weight", fused);
                    return vec![Stored { cut: Cut::Turned { rows, columns }, ..whole }];
                }
                Part::Expand(h) => {
                    let rows = vec![Run::span(head(h) + s.nope, s.value)];
                    return vec![Stored::rows("self_attn.kv_b_proj.weight", fused, rows)];
                }
                _ => return Vec::new(),
            };
            vec![Stored::whole(name, wanted)]
        }
        Mixer::Delta(_) => delta(spec, layer, part, wanted),
    }
}

/// Grouped attention: each projection its own, or `[q | k | v]` fused. With a gate, the stored projection of queries
/// has a gate's rows after each head's.
fn attention(spec: &ModelSpec, layer: usize, part: Part, wanted: Vec<usize>) -> Vec<Stored> {
    let Mixer::Attention(a) = &spec.layers[layer].mixer else { return Vec::new() };
    let whole = |name: &str| vec![Stored::whole(name, wanted.clone())];
    let (letter, first, bias) = match part {
        Part::Q | Part::AttentionGate if a.gated => {
            let first = if part == Part::Q { 0 } else { a.head_dim };
            let run = Run { first, len: a.head_dim, stride: 2 * a.head_dim, times: a.q_heads };
            let fused = vec![2 * a.q_width(), spec.hidden];
            return vec![Stored::rows("self_attn.q_proj.weight", fused, vec![run])];
        }
        Part::Q => ('q', 0, false),
        Part::QBias => ('q', 0, true),
        Part::K => ('k', a.q_width(), false),
        Part::KBias => ('k', a.q_width(), true),
        Part::V => ('v', a.q_width() + a.kv_width(), false),
        Part::VBias => ('v', a.q_width() + a.kv_width(), true),
        Part::O => return whole("self_attn.o_proj.weight"),
        Part::OBias => return whole("self_attn.o_proj.bias"),
        Part::QNorm => return whole("self_attn.q_norm.weight"),
        Part::KNorm => return whole("self_attn.k_norm.weight"),
        Part::Sinks => return whole("self_attn.sinks"),
        _ => return Vec::new(),
    };
    let kind = if bias { "bias" } else { "weight" };
    let mut all = whole(&format!("self_attn.{letter}_proj.{kind}"));
    if a.kv == KvSource::Own && !a.gated {
        let rows = wanted[0];
        let mut fused = wanted;
        fused[0] = a.q_width() + 2 * a.kv_width();
        all.push(Stored::rows(format!("self_attn.qkv_proj.{kind}"), fused, vec![Run::span(first, rows)]));
    }
    all
}

/// Delta nets: `[q | k | v]`, z, b and a apart; or grouped by key heads, `[q | k | v | z]` and `[b | a]` of each.
fn delta(spec: &ModelSpec, layer: usize, part: Part, wanted: Vec<usize>) -> Vec<Stored> {
    let Mixer::Delta(d) = &spec.layers[layer].mixer else { return Vec::new() };
    let s = &d.shape;
    let per_key = s.v_heads / s.k_heads.max(1);
    let values = per_key * s.v_dim;
    let group = 2 * s.k_dim + 2 * values;
    let run = |first, len| Run { first, len, stride: group, times: s.k_heads };
    let qkvz = |runs| {
        let fused = vec![s.k_heads * group, spec.hidden];
        Stored::rows("linear_attn.in_proj_qkvz.weight", fused, runs)
    };
    let ba = |first| {
        let run = Run { first, len: per_key, stride: 2 * per_key, times: s.k_heads };
        Stored::rows("linear_attn.in_proj_ba.weight", vec![2 * s.v_heads, spec.hidden], vec![run])
    };
    let whole = |name: &str| Stored::whole(format!("linear_attn.{name}"), wanted.clone());
    match part {
        Part::DeltaQkv => {
            let runs = vec![run(0, s.k_dim), run(s.k_dim, s.k_dim), run(2 * s.k_dim, values)];
            vec![whole("in_proj_qkv.weight"), qkvz(runs)]
        }
        Part::DeltaZ => vec![whole("in_proj_z.weight"), qkvz(vec![run(2 * s.k_dim + values, values)])],
        Part::DeltaB => vec![whole("in_proj_b.weight"), ba(0)],
        Part::DeltaA => vec![whole("in_proj_a.weight"), ba(per_key)],
        Part::DeltaConv => {
            let conv = Stored::whole("linear_attn.conv1d.weight", vec![s.conv_width(), 1, s.taps]);
            vec![conv]
        }
        Part::DeltaALog => vec![whole("A_log")],
        Part::DeltaDtBias => vec![whole("dt_bias")],
        Part::DeltaNorm => vec![whole("norm.weight")],
        Part::DeltaOut => vec![whole("out_proj.weight")],
        _ => Vec::new(),
    }
}

/// gpt-oss: experts' matrices are stored `[in, out]` where they are plain numbers, and `[out, in]` in few bits; gate and
/// up alternate, gate first.
#[must_use]
pub fn gpt_oss_layer(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let Part::Expert(expert, part) = part else { return decoder_layer(spec, layer, part) };
    let wanted = shape(spec, TensorId::Layer(layer, Part::Expert(expert, part)));
    let Ffn::Moe(moe) = &spec.layers[layer].ffn else { return Vec::new() };
    let experts = moe.route.experts;
    let out = wanted[0];
    let (name, first, step) = match part {
        MlpPart::Gate | MlpPart::GateBias => ("mlp.experts.gate_up_proj", 0, 2),
        MlpPart::Up | MlpPart::UpBias => ("mlp.experts.gate_up_proj", 1, 2),
        MlpPart::Down | MlpPart::DownBias => ("mlp.experts.down_proj", 0, 1),
    };
    let every = |first| Run { first, len: 1, stride: step, times: out };
    let rows = vec![every(expert * step * out + first)];
    if !part.is_linear() {
        return vec![Stored::rows(format!("{name}_bias"), vec![experts, step * out], rows)];
    }
    let inputs = wanted[1];
    let packed = Stored { packed: true, ..Stored::rows(name, vec![experts, step * out, inputs], rows) };
    let cut = Cut::Turned { rows: Run::span(expert * inputs, inputs), columns: every(first) };
    let plain = Stored { cut, ..Stored::whole(name, vec![experts, inputs, step * out]) };
    vec![packed, plain]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::backend::Storage;

    fn matrix(shape: &[usize]) -> HostTensor<'static> {
        let n: usize = shape.iter().product();
        let bytes = (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect();
        HostTensor {
            name: "t".into(),
            shape: shape.to_vec(),
            storage: Storage::F32,
            bytes: Cow::Owned(bytes),
            scales: None,
        }
    }

    fn cut(cut: &Cut, of: &[usize], shape: &[usize]) -> Vec<f32> {
        let part = cut.apply(matrix(of), shape).unwrap();
        assert_eq!(part.shape, shape);
        part.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    #[test]
    fn rows_alternate_lie_in_spans_and_stand_alone() {
        let span = Cut::Rows(vec![Run::span(1, 2)]);
        assert_eq!(cut(&span, &[4, 2], &[2, 2]), [2.0, 3.0, 4.0, 5.0]);
        let second = Cut::Rows(vec![Run { first: 1, len: 1, stride: 2, times: 2 }]);
        assert_eq!(cut(&second, &[4, 2], &[2, 2]), [2.0, 3.0, 6.0, 7.0]);
        assert_eq!(cut(&second, &[2, 2], &[2]), [1.0, 3.0], "a vector's rows are numbers");
        let grouped = Cut::Rows(vec![Run { first: 0, len: 2, stride: 3, times: 2 }, Run::span(2, 1)]);
        assert_eq!(cut(&grouped, &[6, 1], &[5, 1]), [0.0, 1.0, 3.0, 4.0, 2.0]);
    }

    #[test]
    fn turned_matrices_of_a_stack() {
        // Two matrices of 3 x 4; of the second, every other column.
        let turned =
            Cut::Turned { rows: Run::span(3, 3), columns: Run { first: 1, len: 1, stride: 2, times: 2 } };
        assert_eq!(cut(&turned, &[2, 3, 4], &[2, 3]), [13.0, 17.0, 21.0, 15.0, 19.0, 23.0]);
    }

    #[test]
    fn cuts_beyond_the_tensor_are_errors() {
        let beyond = Cut::Rows(vec![Run::span(3, 2)]);
        let e = beyond.apply(matrix(&[4, 2]), &[2, 2]).unwrap_err();
        assert!(e.to_string().contains("[2, 2] cannot be cut out of shape [4, 2]"), "{e}");
        assert!(Cut::Rows(vec![Run::span(0, 1)]).apply(matrix(&[4, 2]), &[2, 2]).is_err(), "too few rows");
        let turned = Cut::Turned { rows: Run::span(4, 1), columns: Run::span(0, 2) };
        assert!(turned.apply(matrix(&[4, 2]), &[2, 1]).is_err());
        let mut blocks = matrix(&[4, 2]);
        blocks.storage = Storage::Q8_0;
        assert!(Cut::Rows(vec![Run::span(0, 1)]).apply(blocks, &[1, 2]).is_err(), "half a block");
    }

    #[test]
    fn the_prefix_is_that_of_layer_0() {
        let prefix = |names: &[&'static str]| Naming::DECODER.prefix(names.iter().copied());
        assert_eq!(prefix(&["lm_head.weight", "model.layers.0.x"]), "model.");
        assert_eq!(prefix(&["language_model.model.layers.0.x", "model.y"]), "language_model.model.");
        assert_eq!(prefix(&["layers.0.x"]), "");
        assert_eq!(prefix(&[]), "model.");
        assert_eq!(Naming::DECODER.layer_number("model.", "model.layers.12.x"), Some(12));
        assert_eq!(Naming::DECODER.layer_number("model.", "model.norm.weight"), None);
        assert!(Naming::is_ignored("model.visual.blocks.0.x") && !Naming::is_ignored("model.layers.0.x"));
    }
}
