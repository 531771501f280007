//! Attention and the delta rule: from projected rows to the cache and back.
//!
//! Owns which kernel serves a layer's heads. Decode rows and prefill rows of one step run in kernels of their own where the
//! head size has tensor-core kernels; everything else runs in the general one. Never: the work lists, which the step's
//! upload has.

use mirai_model::backend::{
    AttentionSpec, DeltaRule, HeadNorms, LatentShape, Norm, Result, Rows, Stored, Visibility,
};

use super::{CudaBackend, expect_width};
use crate::args::{
    AppendArgs, AppendLatentArgs, AppendSharedArgs, AttentionAnyArgs, DecodeArgs, DeltaArgs, HeadNorm,
    KvLayer, PrefillArgs, Rotation,
};
use crate::buffer::{CudaBuffer, CudaRope, CudaVector, head_norm};
use crate::driver::DevicePtr;
use crate::error::device;
use crate::kernels::Kernel;
use crate::kernels_table::{HeadKernels, head_kernels};
use crate::work::WorkClass;

/// Largest heads of the fast append.
const FAST_HEAD: usize = 512;
/// Largest heads of all.
const MOST_HEAD: usize = 1024;
/// Heads that one block of the fast append has.
const HEADS_A_BLOCK: usize = 4;

/// Whose work lists a layer uses.
pub(crate) fn class_of(spec: &AttentionSpec) -> WorkClass {
    WorkClass {
        q_heads: spec.q_heads,
        kv_heads: spec.kv_heads,
        window: spec.window,
        causal: spec.visibility == Visibility::Causal,
    }
}

/// Whether a token's keys lie beside its queries.
fn has_keys(spec: &AttentionSpec) -> bool {
    spec.appends || spec.visibility == Visibility::Whole
}

impl CudaBackend {
    /// The tensor-core kernels of a layer's heads, if there are such for the device.
    pub(crate) fn fast_heads(&self, spec: &AttentionSpec, e4m3: bool) -> Option<HeadKernels> {
        let in_key = spec.key_dim == spec.value_dim || spec.stored == Stored::ValueInKey;
        let kernels = head_kernels(spec.key_dim, spec.value_dim, e4m3).filter(|_| in_key)?;
        let room = |kernel, shared| self.kernels.dynamic_shared_memory(kernel) >= shared;
        let fits =
            room(kernels.decode, kernels.decode_shared) && room(kernels.prefill, kernels.prefill_shared);
        fits.then_some(kernels)
    }

    fn rotation(
        &self,
        operation: &'static str,
        rope: Option<&CudaRope>,
        head_dim: usize,
    ) -> Result<Rotation> {
        let Some(rope) = rope else { return Ok(Rotation::NONE) };
        let r = rope.rotation;
        let last = r.step * (r.rotary / 2 - 1) + r.distance;
        if last as usize >= head_dim {
            let (rotary, distance) = (r.rotary, r.distance);
            let message =
                format!("{rotary} elements in pairs {distance} apart of heads of {head_dim} rotate");
            return Err(device(operation, message));
        }
        Ok(r)
    }

    fn q_k_norms(
        &self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, CudaVector>>,
    ) -> Result<[HeadNorm; 3]> {
        const NAME: &str = "append";
        let Some(norms) = norms else { return Ok([HeadNorm::NONE; 3]) };
        let heads = |count: usize| if norms.across_heads { count } else { 1 };
        let of = |norm: Option<&Norm<CudaVector>>, width| {
            norm.map_or(Ok(HeadNorm::NONE), |norm| head_norm(NAME, norm, width))
        };
        Ok([
            head_norm(NAME, norms.q, heads(spec.q_heads) * spec.key_dim)?,
            of(norms.k, heads(spec.kv_heads) * spec.key_dim)?,
            of(norms.v, spec.value_dim)?,
        ])
    }

    pub(super) fn append_rows(
        &mut self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, CudaVector>>,
        rope: Option<&CudaRope>,
        qkv: &CudaBuffer,
    ) -> Result<()> {
        const NAME: &str = "append";
        let across = norms.as_ref().is_some_and(|n| n.across_heads);
        let [q_norm, k_norm, v_norm] = self.q_k_norms(spec, norms)?;
        let kv_heads = if has_keys(spec) { spec.kv_heads } else { 0 };
        let width = spec.q_heads * spec.key_dim + kv_heads * (spec.key_dim + spec.value_dim);
        let largest = spec.key_dim.max(spec.value_dim);
        if width > qkv.width() || largest > MOST_HEAD {
            let message = format!("rows of {} for {spec:?}, heads up to {MOST_HEAD}", qkv.width());
            return Err(device(NAME, message));
        }
        let append = spec.appends && spec.visibility == Visibility::Causal;
        if append && spec.stored == Stored::ValueInKey {
            let message = "keys and values of their own go where values are in the keys";
            return Err(device(NAME, message));
        }
        let (kv, e4m3) = if append { self.kv_layer(spec)? } else { (KvLayer::NONE, false) };
        let args = AppendArgs {
            qkv: qkv.at,
            positions: self.step.positions(),
            token_rows: self.step.token_rows(),
            rows: self.step.rows_at(),
            kv,
            rotation: self.rotation(NAME, rope, spec.key_dim)?,
            q_norm,
            k_norm,
            v_norm,
            stride: qkv.stride() as i32,
            q_heads: spec.q_heads as i32,
            kv_heads: kv_heads as i32,
            key_dim: spec.key_dim as i32,
            value_dim: spec.value_dim as i32,
            across_heads: i32::from(across),
            append: i32::from(append),
            keep: i32::from(spec.visibility == Visibility::Whole),
        };
        let tokens = self.rows(Rows::Tokens) as u32;
        if largest <= FAST_HEAD && (spec.key_dim | spec.value_dim).is_multiple_of(2) && !across {
            let blocks = (spec.q_heads + 2 * kv_heads).div_ceil(HEADS_A_BLOCK) as u32;
            let kernel = if e4m3 { Kernel::RopeAppendE4m3 } else { Kernel::RopeAppendBf16 };
            return self.launch(kernel, (tokens, blocks, 1), 128, 0, &args);
        }
        let kernel = if e4m3 { Kernel::RopeAppendAnyE4m3 } else { Kernel::RopeAppendAnyBf16 };
        self.launch(kernel, (tokens, 1, 1), 256, 0, &args)
    }

    pub(super) fn append_shared_rows(
        &mut self,
        spec: &AttentionSpec,
        dim: usize,
        norms: HeadNorms<'_, CudaVector>,
        rope: &CudaRope,
        qk: &CudaBuffer,
        q_out: &mut CudaBuffer,
    ) -> Result<()> {
        const NAME: &str = "append_shared";
        let rotary = rope.rotation.rotary as usize;
        let shape = (spec.key_dim, spec.value_dim, spec.stored);
        let width = (spec.q_heads + spec.kv_heads) * dim;
        if shape != (dim + rotary, dim, Stored::ValueInKey) || width > qk.width() || dim > MOST_HEAD {
            let message = format!("heads of {dim} in rows of {}, {rotary} rotated, for {spec:?}", qk.width());
            return Err(device(NAME, message));
        }
        let (Some(k), false) = (norms.k, norms.across_heads) else {
            return Err(device(NAME, "a norm of each key head is needed"));
        };
        q_out.write(NAME, spec.q_heads * spec.key_dim)?;
        let (kv, e4m3) = self.kv_layer(spec)?;
        let args = AppendSharedArgs {
            qk: qk.at,
            q_out: q_out.at,
            positions: self.step.positions(),
            token_rows: self.step.token_rows(),
            rows: self.step.rows_at(),
            kv,
            rotation: self.rotation(NAME, Some(rope), dim)?,
            q_norm: head_norm(NAME, norms.q, dim)?,
            k_norm: head_norm(NAME, k, dim)?,
            v_norm: norms.v.map_or(Ok(HeadNorm::NONE), |v| head_norm(NAME, v, dim))?,
            stride: qk.stride() as i32,
            out_stride: q_out.stride() as i32,
            q_heads: spec.q_heads as i32,
            dim: dim as i32,
        };
        let blocks = (spec.q_heads + spec.kv_heads).div_ceil(HEADS_A_BLOCK) as u32;
        let kernel = if e4m3 { Kernel::AppendSharedE4m3 } else { Kernel::AppendSharedBf16 };
        self.launch(kernel, (self.rows(Rows::Tokens) as u32, blocks, 1), 128, 0, &args)
    }

    pub(super) fn append_latent_rows(
        &mut self,
        spec: &AttentionSpec,
        shape: LatentShape,
        norm: &Norm<CudaVector>,
        rope: &CudaRope,
        (q, kv_rows, q_out): (&CudaBuffer, &CudaBuffer, &CudaBuffer),
    ) -> Result<()> {
        const NAME: &str = "append_latent";
        let (width, head) = (shape.latent + shape.rope, shape.nope + shape.rope);
        expect_width(NAME, kv_rows.width(), width)?;
        expect_width(NAME, q.width(), spec.q_heads * head)?;
        expect_width(NAME, q_out.width(), spec.q_heads * width)?;
        expect_width(NAME, rope.rotation.rotary as usize, shape.rope)?;
        let found = (spec.kv_heads, spec.key_dim, spec.value_dim, spec.stored);
        if found != (1, width, shape.latent, Stored::ValueInKey) || width > MOST_HEAD {
            return Err(device(NAME, format!("{shape:?} for {spec:?}")));
        }
        let (kv, e4m3) = self.kv_layer(spec)?;
        let args = AppendLatentArgs {
            q: q.at,
            kv_rows: kv_rows.at,
            q_out: q_out.at,
            positions: self.step.positions(),
            token_rows: self.step.token_rows(),
            rows: self.step.rows_at(),
            kv,
            rotation: self.rotation(NAME, Some(rope), shape.rope)?,
            norm: head_norm(NAME, norm, shape.latent)?,
            q_stride: q.stride() as i32,
            kv_stride: kv_rows.stride() as i32,
            out_stride: q_out.stride() as i32,
            q_heads: spec.q_heads as i32,
            latent: shape.latent as i32,
            rope: shape.rope as i32,
            nope: shape.nope as i32,
        };
        let blocks = (spec.q_heads + 1).div_ceil(HEADS_A_BLOCK) as u32;
        let kernel = if e4m3 { Kernel::AppendLatentE4m3 } else { Kernel::AppendLatentBf16 };
        self.launch(kernel, (self.rows(Rows::Tokens) as u32, blocks, 1), 128, 0, &args)
    }

    pub(super) fn attend(
        &mut self,
        spec: &AttentionSpec,
        sinks: Option<&CudaVector>,
        q: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const NAME: &str = "attention";
        if spec.q_heads * spec.key_dim > q.width() {
            return Err(device(NAME, format!("rows of {} for {spec:?}", q.width())));
        }
        if let Some(sinks) = sinks {
            expect_width(NAME, sinks.len, spec.q_heads)?;
        }
        out.write(NAME, spec.q_heads * spec.value_dim)?;
        let whole = spec.visibility == Visibility::Whole;
        if whole && !self.step.is_whole() {
            return Err(device(NAME, "a sequence that must be whole is not"));
        }
        let (kv, e4m3) = if whole { (KvLayer::NONE, false) } else { self.kv_layer(spec)? };
        let sinks = sinks.map_or(DevicePtr::NULL, |s| s.single);
        match self.fast_heads(spec, e4m3) {
            Some(kernels) => self.attend_fast(spec, kernels, kv, sinks, (q, out)),
            None => self.attend_any(spec, e4m3, kv, sinks, (q, out)),
        }
    }

    /// Tensor cores: decode rows, then prefill rows.
    fn attend_fast(
        &mut self,
        spec: &AttentionSpec,
        kernels: HeadKernels,
        mut kv: KvLayer,
        sinks: DevicePtr,
        (q, out): (&CudaBuffer, &CudaBuffer),
    ) -> Result<()> {
        let class = class_of(spec);
        let work = self.step.work(class)?;
        // Also where keys lie beside the queries.
        kv.kv_heads = spec.kv_heads as u32;
        let (cap, window) = (spec.soft_cap.unwrap_or(0.0), spec.window.unwrap_or(0));
        let (q_stride, q_heads) = (q.stride() as i32, spec.q_heads as i32);
        let values_are_keys = i32::from(spec.stored == Stored::ValueInKey);
        if work.decodes {
            let args = DecodeArgs {
                q: q.at,
                out: out.at,
                sinks,
                rows: self.step.rows_at(),
                starts: work.starts,
                items: work.items,
                partial: self.workspace.attention,
                counters: self.workspace.counters,
                kv,
                scale: spec.scale,
                cap,
                window,
                q_stride,
                q_heads,
                values_are_keys,
            };
            let grid = (work.grid as u32, 1, 1);
            self.launch(kernels.decode, grid, kernels.decode_threads, kernels.decode_shared, &args)?;
        }
        if work.prefill_items > 0 {
            let args = PrefillArgs {
                q: q.at,
                out: out.at,
                sinks,
                rows: self.step.rows_at(),
                items: work.prefill,
                kv,
                scale: spec.scale,
                cap,
                window,
                q_stride,
                q_heads,
                values_are_keys,
                causal: i32::from(class.causal),
                beside: i32::from(!class.causal),
            };
            let grid = (work.prefill_items as u32, 1, 1);
            self.launch(kernels.prefill, grid, kernels.prefill_threads, kernels.prefill_shared, &args)?;
        }
        Ok(())
    }

    /// Any head: one block a token and head.
    fn attend_any(
        &mut self,
        spec: &AttentionSpec,
        e4m3: bool,
        kv: KvLayer,
        sinks: DevicePtr,
        (q, out): (&CudaBuffer, &CudaBuffer),
    ) -> Result<()> {
        if spec.key_dim.max(spec.value_dim) > MOST_HEAD {
            return Err(device("attention", format!("heads up to {MOST_HEAD}, not {spec:?}")));
        }
        let args = AttentionAnyArgs {
            q: q.at,
            out: out.at,
            sinks,
            positions: self.step.positions(),
            token_rows: self.step.token_rows(),
            rows: self.step.rows_at(),
            kv,
            scale: spec.scale,
            cap: spec.soft_cap.unwrap_or(0.0),
            window: spec.window.unwrap_or(0),
            q_stride: q.stride() as i32,
            out_stride: out.stride() as i32,
            q_heads: spec.q_heads as i32,
            kv_heads: spec.kv_heads as i32,
            key_dim: spec.key_dim as i32,
            value_dim: spec.value_dim as i32,
            value_in_key: i32::from(spec.stored == Stored::ValueInKey),
            whole: i32::from(spec.visibility == Visibility::Whole),
        };
        let kernel = if e4m3 { Kernel::AttentionAnyE4m3 } else { Kernel::AttentionAnyBf16 };
        self.launch(kernel, (self.rows(Rows::Tokens) as u32, spec.q_heads as u32, 1), 256, 0, &args)
    }

    pub(super) fn run_delta_rule(
        &mut self,
        rule: &DeltaRule<'_, CudaVector>,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const NAME: &str = "delta_rule";
        let s = rule.shape;
        expect_width(NAME, x.width(), s.in_width())?;
        expect_width(NAME, rule.conv.len, s.conv_width() * s.taps)?;
        expect_width(NAME, rule.a_log.len, s.v_heads)?;
        expect_width(NAME, rule.dt_bias.len, s.v_heads)?;
        if s.k_dim > 128 || s.v_dim > 128 || s.taps > 8 {
            return Err(device(NAME, format!("heads up to 128 and 8 taps, not {s:?}")));
        }
        out.write(NAME, s.v_heads * s.v_dim)?;
        let (states, slot_stride) = self.states_of(rule)?;
        let args = DeltaArgs {
            x: x.at,
            out: out.at,
            rows: self.step.rows_at(),
            states,
            conv: rule.conv.single,
            a_log: rule.a_log.single,
            dt_bias: rule.dt_bias.single,
            norm: head_norm(NAME, rule.norm, s.v_dim)?,
            slot_stride,
            stride: x.stride() as i32,
            out_stride: out.stride() as i32,
            k_heads: s.k_heads as i32,
            v_heads: s.v_heads as i32,
            k_dim: s.k_dim as i32,
            v_dim: s.v_dim as i32,
            taps: s.taps as i32,
        };
        let rows = self.step.sequences() as u32;
        let threads = (4 * s.v_dim).max(2 * s.k_dim + s.v_dim).next_multiple_of(32) as u32;
        self.launch(Kernel::DeltaRuleBf16, (s.v_heads as u32, rows, 1), threads, 0, &args)?;
        let blocks = s.conv_width().div_ceil(256) as u32;
        self.launch(Kernel::DeltaConvState, (blocks, rows, 1), 256, 0, &args)
    }
}
