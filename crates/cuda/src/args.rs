//! What kernels take, field by field as in `kernels/`.
//!
//! Owns the mirrors. [`Kernels::launch`](crate::Kernels::launch) holds the bytes of each parameter to the compiled kernel's.

use crate::driver::DevicePtr;
use crate::{device_struct, kernel_args};

device_struct! {
    /// `KvLayer`: where one layer's keys and values lie.
    pub(crate) struct KvLayer {
        pub(crate) pages: DevicePtr,
        pub(crate) tables: DevicePtr,
        pub(crate) scales: DevicePtr,
        pub(crate) page_bytes: u64,
        pub(crate) table_len: u32,
        pub(crate) kv_heads: u32,
    }
}

impl KvLayer {
    /// Of a layer that reads no pages.
    pub(crate) const NONE: Self = Self {
        pages: DevicePtr::NULL,
        tables: DevicePtr::NULL,
        scales: DevicePtr::NULL,
        page_bytes: 0,
        table_len: 0,
        kv_heads: 0,
    };
}

device_struct! {
    /// `Rotation`.
    pub(crate) struct Rotation {
        pub(crate) cos: DevicePtr,
        pub(crate) sin: DevicePtr,
        pub(crate) q_scale: DevicePtr,
        pub(crate) rotary: i32,
        pub(crate) step: i32,
        pub(crate) distance: i32,
    }
}

impl Rotation {
    /// Nothing is rotated.
    pub(crate) const NONE: Self = Self {
        cos: DevicePtr::NULL,
        sin: DevicePtr::NULL,
        q_scale: DevicePtr::NULL,
        rotary: 0,
        step: 1,
        distance: 0,
    };
}

device_struct! {
    /// `HeadNorm`.
    pub(crate) struct HeadNorm {
        pub(crate) weight: DevicePtr,
        pub(crate) bias: DevicePtr,
        pub(crate) offset: f32,
        pub(crate) eps: f32,
        /// 0: none, 1: root of the mean square, 2: standard deviation.
        pub(crate) kind: i32,
    }
}

impl HeadNorm {
    /// No norm.
    pub(crate) const NONE: Self =
        Self { weight: DevicePtr::NULL, bias: DevicePtr::NULL, offset: 0.0, eps: 0.0, kind: 0 };
}

device_struct! {
    /// `GateSpec`.
    pub(crate) struct GateSpec {
        pub(crate) kind: i32,
        pub(crate) limit: f32,
        pub(crate) alpha: f32,
    }
}

device_struct! {
    pub(crate) struct EmbedArgs {
        pub(crate) table: DevicePtr,
        pub(crate) ids: DevicePtr,
        pub(crate) last_drawn: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) table_rows: u32,
        pub(crate) table_stride: i32,
        pub(crate) width: i32,
        pub(crate) scale: f32,
    }
}

device_struct! {
    pub(crate) struct PositionsArgs {
        pub(crate) table: DevicePtr,
        pub(crate) positions: DevicePtr,
        pub(crate) x: DevicePtr,
        pub(crate) table_rows: u32,
        pub(crate) offset: u32,
        pub(crate) table_stride: i32,
        pub(crate) width: i32,
    }
}

kernel_args! {
    pub(crate) struct GatherArgs {
        pub(crate) x: DevicePtr,
        pub(crate) outputs: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) width: i32,
    }
}

device_struct! {
    pub(crate) struct NormArgs {
        pub(crate) residual: DevicePtr,
        pub(crate) x: DevicePtr,
        pub(crate) post_weight: DevicePtr,
        pub(crate) weight: DevicePtr,
        pub(crate) bias: DevicePtr,
        pub(crate) x_scale: f32,
        pub(crate) offset: f32,
        pub(crate) post_offset: f32,
        pub(crate) eps: f32,
        pub(crate) width: i32,
        pub(crate) layer: i32,
        pub(crate) group: i32,
    }
}

kernel_args! {
    pub(crate) struct AddNormArgs {
        pub(crate) norm: NormArgs,
        pub(crate) out: DevicePtr,
    }
}

kernel_args! {
    pub(crate) struct AddArgs {
        pub(crate) x: DevicePtr,
        pub(crate) y: DevicePtr,
        pub(crate) width: i32,
        pub(crate) scale: f32,
    }
}

kernel_args! {
    pub(crate) struct ScaleArgs {
        pub(crate) x: DevicePtr,
        pub(crate) width: i32,
        pub(crate) factor: f32,
    }
}

device_struct! {
    pub(crate) struct GateArgs {
        pub(crate) gates: DevicePtr,
        pub(crate) x: DevicePtr,
        pub(crate) gates_stride: i32,
        pub(crate) at: i32,
        pub(crate) width: i32,
        pub(crate) one: i32,
    }
}

kernel_args! {
    pub(crate) struct GluArgs {
        pub(crate) x: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) width: i32,
        pub(crate) gate: GateSpec,
    }
}

device_struct! {
    pub(crate) struct ActivateArgs {
        pub(crate) x: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) width: i32,
        pub(crate) kind: i32,
        pub(crate) alpha_p: f32,
        pub(crate) alpha_n: f32,
        pub(crate) beta: f32,
        pub(crate) eps: f32,
    }
}

device_struct! {
    pub(crate) struct MatmulArgs {
        pub(crate) weight: DevicePtr,
        pub(crate) scales: DevicePtr,
        pub(crate) x: DevicePtr,
        pub(crate) bias: DevicePtr,
        pub(crate) y: DevicePtr,
        pub(crate) partial: DevicePtr,
        pub(crate) counters: DevicePtr,
        pub(crate) experts: DevicePtr,
        pub(crate) offsets: DevicePtr,
        pub(crate) pairs: DevicePtr,
        pub(crate) weight_stride: u64,
        pub(crate) scale_stride: u32,
        pub(crate) bias_stride: u32,
        pub(crate) x_stride: i32,
        pub(crate) y_stride: i32,
        pub(crate) x_head: i32,
        pub(crate) y_head: i32,
        pub(crate) rows: i32,
        pub(crate) inner: i32,
        pub(crate) out: i32,
        pub(crate) scale_rows: i32,
        pub(crate) scale_blocks: i32,
        pub(crate) top_k: i32,
        pub(crate) gather: i32,
        pub(crate) single_out: i32,
        pub(crate) gated: i32,
        pub(crate) scale: f32,
        pub(crate) cap: f32,
        pub(crate) gate: GateSpec,
    }
}

kernel_args! {
    pub(crate) struct GroupedArgs {
        pub(crate) matmul: MatmulArgs,
        /// Null: one weight.
        pub(crate) tiles: DevicePtr,
    }
}

device_struct! {
    pub(crate) struct AppendArgs {
        pub(crate) qkv: DevicePtr,
        pub(crate) positions: DevicePtr,
        pub(crate) token_rows: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) kv: KvLayer,
        pub(crate) rotation: Rotation,
        pub(crate) q_norm: HeadNorm,
        pub(crate) k_norm: HeadNorm,
        pub(crate) v_norm: HeadNorm,
        pub(crate) stride: i32,
        pub(crate) q_heads: i32,
        pub(crate) kv_heads: i32,
        pub(crate) key_dim: i32,
        pub(crate) value_dim: i32,
        pub(crate) across_heads: i32,
        pub(crate) append: i32,
        pub(crate) keep: i32,
    }
}

device_struct! {
    pub(crate) struct AppendSharedArgs {
        pub(crate) qk: DevicePtr,
        pub(crate) q_out: DevicePtr,
        pub(crate) positions: DevicePtr,
        pub(crate) token_rows: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) kv: KvLayer,
        pub(crate) rotation: Rotation,
        pub(crate) q_norm: HeadNorm,
        pub(crate) k_norm: HeadNorm,
        pub(crate) v_norm: HeadNorm,
        pub(crate) stride: i32,
        pub(crate) out_stride: i32,
        pub(crate) q_heads: i32,
        pub(crate) dim: i32,
    }
}

device_struct! {
    pub(crate) struct AppendLatentArgs {
        pub(crate) q: DevicePtr,
        pub(crate) kv_rows: DevicePtr,
        pub(crate) q_out: DevicePtr,
        pub(crate) positions: DevicePtr,
        pub(crate) token_rows: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) kv: KvLayer,
        pub(crate) rotation: Rotation,
        pub(crate) norm: HeadNorm,
        pub(crate) q_stride: i32,
        pub(crate) kv_stride: i32,
        pub(crate) out_stride: i32,
        pub(crate) q_heads: i32,
        pub(crate) latent: i32,
        pub(crate) rope: i32,
        pub(crate) nope: i32,
    }
}

device_struct! {
    pub(crate) struct HeadLinearArgs {
        pub(crate) weight: DevicePtr,
        pub(crate) x: DevicePtr,
        pub(crate) y: DevicePtr,
        pub(crate) weight_stride: u64,
        pub(crate) in_stride: i32,
        pub(crate) rows: i32,
        pub(crate) inner: i32,
        pub(crate) out: i32,
        pub(crate) width: i32,
        pub(crate) x_stride: i32,
        pub(crate) x_first: i32,
        pub(crate) x_head: i32,
        pub(crate) y_stride: i32,
        pub(crate) y_first: i32,
        pub(crate) y_head: i32,
    }
}

device_struct! {
    pub(crate) struct DecodeArgs {
        pub(crate) q: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) sinks: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) starts: DevicePtr,
        pub(crate) items: DevicePtr,
        pub(crate) partial: DevicePtr,
        pub(crate) counters: DevicePtr,
        pub(crate) kv: KvLayer,
        pub(crate) scale: f32,
        pub(crate) cap: f32,
        pub(crate) window: u32,
        pub(crate) q_stride: i32,
        pub(crate) q_heads: i32,
        pub(crate) values_are_keys: i32,
    }
}

device_struct! {
    pub(crate) struct PrefillArgs {
        pub(crate) q: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) sinks: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) items: DevicePtr,
        pub(crate) kv: KvLayer,
        pub(crate) scale: f32,
        pub(crate) cap: f32,
        pub(crate) window: u32,
        pub(crate) q_stride: i32,
        pub(crate) q_heads: i32,
        pub(crate) values_are_keys: i32,
        pub(crate) causal: i32,
        pub(crate) beside: i32,
    }
}

device_struct! {
    pub(crate) struct AttentionAnyArgs {
        pub(crate) q: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) sinks: DevicePtr,
        pub(crate) positions: DevicePtr,
        pub(crate) token_rows: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) kv: KvLayer,
        pub(crate) scale: f32,
        pub(crate) cap: f32,
        pub(crate) window: u32,
        pub(crate) q_stride: i32,
        pub(crate) out_stride: i32,
        pub(crate) q_heads: i32,
        pub(crate) kv_heads: i32,
        pub(crate) key_dim: i32,
        pub(crate) value_dim: i32,
        pub(crate) value_in_key: i32,
        pub(crate) whole: i32,
    }
}

device_struct! {
    pub(crate) struct DeltaArgs {
        pub(crate) x: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) states: DevicePtr,
        pub(crate) conv: DevicePtr,
        pub(crate) a_log: DevicePtr,
        pub(crate) dt_bias: DevicePtr,
        pub(crate) norm: HeadNorm,
        pub(crate) slot_stride: u64,
        pub(crate) stride: i32,
        pub(crate) out_stride: i32,
        pub(crate) k_heads: i32,
        pub(crate) v_heads: i32,
        pub(crate) k_dim: i32,
        pub(crate) v_dim: i32,
        pub(crate) taps: i32,
    }
}

device_struct! {
    pub(crate) struct RouteArgs {
        pub(crate) logits: DevicePtr,
        pub(crate) correction: DevicePtr,
        pub(crate) expert_scale: DevicePtr,
        pub(crate) chosen: DevicePtr,
        pub(crate) weights: DevicePtr,
        pub(crate) places: DevicePtr,
        pub(crate) pairs: DevicePtr,
        pub(crate) offsets: DevicePtr,
        pub(crate) active: DevicePtr,
        pub(crate) tiles: DevicePtr,
        pub(crate) counter: DevicePtr,
        pub(crate) tokens: i32,
        pub(crate) experts: i32,
        pub(crate) stride: i32,
        pub(crate) shared: i32,
        pub(crate) top_k: i32,
        pub(crate) groups: i32,
        pub(crate) groups_kept: i32,
        pub(crate) sigmoid: i32,
        pub(crate) normalize: i32,
        pub(crate) scale: f32,
    }
}

kernel_args! {
    pub(crate) struct CombineArgs {
        pub(crate) y: DevicePtr,
        pub(crate) weights: DevicePtr,
        pub(crate) places: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) slots: i32,
        pub(crate) width: i32,
    }
}

device_struct! {
    pub(crate) struct MeanArgs {
        pub(crate) x: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) output_rows: DevicePtr,
        pub(crate) width: i32,
    }
}

device_struct! {
    pub(crate) struct EmitArgs {
        pub(crate) x: DevicePtr,
        pub(crate) out: DevicePtr,
        pub(crate) finite: DevicePtr,
        pub(crate) width: i32,
    }
}

device_struct! {
    pub(crate) struct SampleArgs {
        pub(crate) logits: DevicePtr,
        pub(crate) raw: DevicePtr,
        pub(crate) rows: DevicePtr,
        pub(crate) edits: DevicePtr,
        pub(crate) masks: DevicePtr,
        pub(crate) counts: DevicePtr,
        pub(crate) chunks: DevicePtr,
        pub(crate) results: DevicePtr,
        pub(crate) tops: DevicePtr,
        pub(crate) last_drawn: DevicePtr,
        pub(crate) vocab: u32,
        pub(crate) stride: u32,
        pub(crate) max_top: u32,
        pub(crate) scale: f32,
        pub(crate) cap: f32,
    }
}

kernel_args! {
    pub(crate) struct DrawArgs {
        pub(crate) sample: SampleArgs,
        /// Chunks of ids that the first kernel left sums of.
        pub(crate) chunks: u32,
    }
}

kernel_args! {
    pub(crate) struct CountsArgs {
        pub(crate) counts: DevicePtr,
        pub(crate) tokens: DevicePtr,
        pub(crate) prompt: u32,
        pub(crate) output: u32,
        pub(crate) vocab: u32,
    }
}

kernel_args! {
    pub(crate) struct CopyPagesArgs {
        pub(crate) pool: DevicePtr,
        pub(crate) from: DevicePtr,
        pub(crate) to: DevicePtr,
        pub(crate) bytes: u64,
    }
}
