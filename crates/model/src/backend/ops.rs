//! Parameters of operations: shapes and constants of one layer, and views of its weights.

/// What a page holds of each token and kv head of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// A key, and a value of `value_dim` elements beside it: `[K|V][kv_heads][16][...]`.
    KeysAndValues,
    /// One vector that is the key, and whose first `value_dim` elements are the value: latent attention, and layers
    /// whose keys and values are one projection.
    ValueInKey,
}

/// Which keys a query sees, apart from a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    /// Those at or before its own position, from the pages.
    Causal,
    /// All of its sequence, which must lie whole in the step; nothing is stored.
    Whole,
}

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Index of its layer group.
    pub group: usize,
    /// Which of the group's layers it is.
    pub layer_in_group: usize,
    /// Whether this layer writes its keys and values; otherwise it reads those of the layer whose place it names.
    pub appends: bool,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a query and of a stored key.
    pub key_dim: usize,
    /// Elements of a value, and of an output head.
    pub value_dim: usize,
    /// Where values are.
    pub stored: Stored,
    /// Multiplies the scores; usually `1 / sqrt(key_dim)`.
    pub scale: f32,
    /// Which keys are seen.
    pub visibility: Visibility,
    /// A query at `p` sees `p - n + 1 ..= p`.
    pub window: Option<u32>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

/// Which elements of a head make a pair that is rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Element `i` with `i + rotary_dim / 2`.
    Halves,
    /// Element `2 i` with `2 i + 1`.
    Adjacent,
    /// Element `i` with `i + n`, for `i` below `rotary_dim / 2`: as `Halves` of a longer head of which some pairs are not
    /// rotated (Gemma 4).
    Apart(usize),
}

/// Rotary position embedding tables: `[max_context, rotary_dim / 2]` cosines and sines, scaling already applied.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Elements of a head that are rotated: the first ones, unless they pair [`Pairing::Apart`].
    pub rotary_dim: usize,
    /// How they pair.
    pub pairing: Pairing,
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
    /// `[max_context]`: multiplies queries after the rotation; empty where nothing does.
    pub q_scale: Vec<f32>,
}

/// How a feed-forward layer's inner values come from its first projection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// GELU, exact (error function).
    Gelu,
    /// `tanh(x)`; of classification heads.
    Tanh,
    /// gpt-oss: gate limited above, up limited on both sides, `(up + 1) * gate * sigmoid(alpha * gate)`.
    /// Only gated.
    ClampedSwiglu {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Limit of gate and up.
        limit: f32,
    },
    /// xIELU (arXiv 2411.13010): `x > 0: alpha_p x^2 + beta x; else (expm1(min(x, eps)) - x) alpha_n + beta x`.
    /// The alphas are those after softplus (and, for `alpha_n`, plus beta). Only without a gate.
    Xielu {
        /// Of positive values.
        alpha_p: f32,
        /// Of negative values.
        alpha_n: f32,
        /// Linear part.
        beta: f32,
        /// Negative, close to 0.
        eps: f32,
    },
}

/// What a norm divides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root of the mean square.
    Rms,
    /// Standard deviation, after the mean was subtracted.
    Layer,
}

/// A norm's weights: `x / size * (weight + offset) + bias`.
#[derive(Clone, Debug)]
pub struct Norm<V> {
    /// What it divides by.
    pub kind: NormKind,
    /// `[width]`; without one, nothing multiplies.
    pub weight: Option<V>,
    /// `[width]`.
    pub bias: Option<V>,
    /// Added to each weight (1 in some families).
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Norms of queries, keys and values before the rotation.
#[derive(Debug)]
pub struct HeadNorms<'a, V> {
    /// Of queries.
    pub q: &'a Norm<V>,
    /// Of keys; none in a layer that has no keys of its own.
    pub k: Option<&'a Norm<V>>,
    /// Of values.
    pub v: Option<&'a Norm<V>>,
    /// All heads of a token are one vector to the norms of q and k, instead of each its own.
    pub across_heads: bool,
}

impl<V> Clone for HeadNorms<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<V> Copy for HeadNorms<'_, V> {}

/// How hidden rows become logits.
#[derive(Clone, Copy, Debug)]
pub struct LogitsHead<'a, L> {
    /// `[vocab, hidden]`.
    pub weight: &'a L,
    /// Multiplies the logits.
    pub scale: f32,
    /// Logits become `cap * tanh(logit / cap)`.
    pub soft_cap: Option<f32>,
    /// Logits that count; the weight may have padding rows beyond them.
    pub vocab: usize,
}

/// How experts are chosen from the router's logits.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteSpec {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts of each token.
    pub top_k: usize,
    /// How logits become weights.
    pub scoring: Scoring,
    /// Whether the chosen weights are divided by their sum.
    pub normalize: bool,
    /// Multiplies the weights in the end.
    pub scale: f32,
    /// Only experts of some groups may be chosen.
    pub groups: Option<RouteGroups>,
}

/// How router logits become weights. Equal scores: the lowest expert first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts, then the largest.
    Softmax,
    /// The largest logits, then softmax over them.
    SoftmaxOfChosen,
    /// Sigmoid of each; a correction is added for the choice and not for the weight.
    Sigmoid,
}

/// Experts in equal groups of neighbours; a group counts by the sum of its two largest scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteGroups {
    /// Groups.
    pub count: usize,
    /// Groups that experts may be chosen from.
    pub chosen: usize,
}

/// Weights of experts.
pub struct Experts<'a, S, V> {
    /// `[experts][gate | up, hidden]`, or `[experts][up, hidden]` without a gate.
    pub gate_up: &'a S,
    /// `[experts * gate_up rows]`.
    pub gate_up_bias: Option<&'a V>,
    /// Between the two.
    pub activation: Activation,
    /// Width of an expert's inner rows.
    pub intermediate: usize,
    /// `[experts][hidden, intermediate]`.
    pub down: &'a S,
    /// `[experts * hidden]`.
    pub down_bias: Option<&'a V>,
}

/// Where heads lie in the rows of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadView {
    /// First element of the first head in a row.
    pub first: usize,
    /// Elements from a head to the next.
    pub stride: usize,
    /// Elements of a head that are meant.
    pub width: usize,
}

/// Latent attention (multi-head latent attention, arXiv 2405.04434): what is stored of a token is one vector
/// `[latent | rotated key]` for all heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentShape {
    /// Elements of the latent.
    pub latent: usize,
    /// Elements of the rotated part of keys and queries.
    pub rope: usize,
    /// Elements of a query head that are not rotated.
    pub nope: usize,
    /// Elements of a value head.
    pub value: usize,
}

/// Shape of a gated delta net (arXiv 2412.06464) layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    /// Heads of queries and keys.
    pub k_heads: usize,
    /// Heads of values, a multiple of `k_heads`.
    pub v_heads: usize,
    /// Elements of a query or key head.
    pub k_dim: usize,
    /// Elements of a value head.
    pub v_dim: usize,
    /// Taps of the causal convolution over q, k and v.
    pub taps: usize,
}

impl DeltaShape {
    /// Width of `[q | k | v]`, which the convolution runs over.
    #[must_use]
    pub const fn conv_width(&self) -> usize {
        2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim
    }

    /// Width of rows `[q | k | v | z | b | a]`: z gates the output, b the update, a the decay.
    #[must_use]
    pub const fn in_width(&self) -> usize {
        self.conv_width() + self.v_heads * self.v_dim + 2 * self.v_heads
    }

    /// Elements of the convolution's state: the last `taps - 1` rows of `[q | k | v]`, oldest first.
    #[must_use]
    pub const fn conv_elements(&self) -> usize {
        self.conv_width() * (self.taps - 1)
    }

    /// Elements of the recurrent state `[v_heads][k_dim][v_dim]`.
    #[must_use]
    pub const fn state_elements(&self) -> usize {
        self.v_heads * self.k_dim * self.v_dim
    }
}

/// One gated delta net layer's own parameters.
#[derive(Debug)]
pub struct DeltaRule<'a, V> {
    /// Index of its layer group.
    pub group: usize,
    /// Which of the group's layers it is.
    pub layer_in_group: usize,
    /// Shape.
    pub shape: DeltaShape,
    /// `[conv_width, taps]`, oldest tap first; the convolution has no bias, and SiLU after it.
    pub conv: &'a V,
    /// `[v_heads]`: logarithm of the decay rate.
    pub a_log: &'a V,
    /// `[v_heads]`: added to a.
    pub dt_bias: &'a V,
    /// `[v_dim]`: norm of each output head, before it is gated with SiLU of z.
    pub norm: &'a Norm<V>,
}

/// Which row of a sequence stands for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Its first token's.
    First,
    /// Its last token's.
    Last,
    /// The mean of all; the sequence must lie whole in the step.
    Mean,
}
