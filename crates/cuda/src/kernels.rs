//! The kernels by name, and the device code that has them.
//!
//! Owns the one list of kernels: variants, names and the bytes of each parameter come from it. A test holds it to
//! `kernels/resources.toml`, which the compiler's own report is held to.

/// The device code of all architectures, compressed, as `cargo xtask kernels` writes it.
pub(crate) static FATBIN: &[u8] = include_bytes!("../../../kernels/mirai.fatbin");

macro_rules! kernels {
    ($($variant:ident = $name:literal [$($bytes:literal),*];)+) => {
        /// A kernel. Its file in `kernels/` says what it computes, and what it takes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the names of the kernels")]
        pub enum Kernel { $($variant),+ }

        impl Kernel {
            /// All, in the order of the variants.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its name in the device code.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// As the driver takes it.
            pub(crate) const fn c_name(self) -> &'static std::ffi::CStr {
                const fn terminated(name: &'static str) -> &'static std::ffi::CStr {
                    match std::ffi::CStr::from_bytes_with_nul(name.as_bytes()) {
                        Ok(name) => name,
                        Err(_) => panic!("a name with a zero in it"),
                    }
                }
                match self { $(Self::$variant => const { terminated(concat!($name, "\0")) }),+ }
            }

            /// Bytes of each of its parameters.
            pub const fn parameters(self) -> &'static [usize] {
                match self { $(Self::$variant => &[$($bytes),*]),+ }
            }
        }
    };
}

kernels! {
    ActivateBf16 = "activate_bf16" [40];
    AddBf16 = "add_bf16" [8, 8, 4, 4];
    AddBiasBf16 = "add_bias_bf16" [8, 8, 4];
    AddNormBf16 = "add_norm_bf16" [72, 8];
    AddNormE4m3 = "add_norm_e4m3" [72, 8, 8];
    AddPositionsBf16 = "add_positions_bf16" [40];
    AppendLatentBf16 = "append_latent_bf16" [192];
    AppendLatentE4m3 = "append_latent_e4m3" [192];
    AppendSharedBf16 = "append_shared_bf16" [232];
    AppendSharedE4m3 = "append_shared_e4m3" [232];
    AttentionAnyBf16 = "attention_any_bf16" [136];
    AttentionAnyE4m3 = "attention_any_e4m3" [136];
    AttentionDecodeBf16X128 = "attention_decode_bf16_128" [128];
    AttentionDecodeBf16X256 = "attention_decode_bf16_256" [128];
    AttentionDecodeBf16X512 = "attention_decode_bf16_512" [128];
    AttentionDecodeBf16X576X512 = "attention_decode_bf16_576_512" [128];
    AttentionDecodeBf16X64 = "attention_decode_bf16_64" [128];
    AttentionDecodeBf16X640X512 = "attention_decode_bf16_640_512" [128];
    AttentionDecodeBf16X96 = "attention_decode_bf16_96" [128];
    AttentionDecodeE4m3X128 = "attention_decode_e4m3_128" [128];
    AttentionDecodeE4m3X256 = "attention_decode_e4m3_256" [128];
    AttentionDecodeE4m3X512 = "attention_decode_e4m3_512" [128];
    AttentionDecodeE4m3X576X512 = "attention_decode_e4m3_576_512" [128];
    AttentionDecodeE4m3X64 = "attention_decode_e4m3_64" [128];
    AttentionDecodeE4m3X640X512 = "attention_decode_e4m3_640_512" [128];
    AttentionDecodeE4m3X96 = "attention_decode_e4m3_96" [128];
    AttentionPrefillBf16X128 = "attention_prefill_bf16_128" [112];
    AttentionPrefillBf16X256 = "attention_prefill_bf16_256" [112];
    AttentionPrefillBf16X512 = "attention_prefill_bf16_512" [112];
    AttentionPrefillBf16X576X512 = "attention_prefill_bf16_576_512" [112];
    AttentionPrefillBf16X64 = "attention_prefill_bf16_64" [112];
    AttentionPrefillBf16X640X512 = "attention_prefill_bf16_640_512" [112];
    AttentionPrefillBf16X96 = "attention_prefill_bf16_96" [112];
    AttentionPrefillE4m3X128 = "attention_prefill_e4m3_128" [112];
    AttentionPrefillE4m3X256 = "attention_prefill_e4m3_256" [112];
    AttentionPrefillE4m3X512 = "attention_prefill_e4m3_512" [112];
    AttentionPrefillE4m3X576X512 = "attention_prefill_e4m3_576_512" [112];
    AttentionPrefillE4m3X64 = "attention_prefill_e4m3_64" [112];
    AttentionPrefillE4m3X640X512 = "attention_prefill_e4m3_640_512" [112];
    AttentionPrefillE4m3X96 = "attention_prefill_e4m3_96" [112];
    CopyPages = "copy_pages" [8, 8, 8, 8];
    CountsOpen = "counts_open" [8, 8, 4, 4, 4];
    DeltaConvState = "delta_conv_state" [128];
    DeltaRuleBf16 = "delta_rule_bf16" [128];
    EmbedBf16 = "embed_bf16" [48];
    EmitRows = "emit_rows" [32];
    GateBf16 = "gate_bf16" [32];
    GatherRowsBf16 = "gather_rows_bf16" [8, 8, 8, 4];
    GluBf16 = "glu_bf16" [8, 8, 4, 12];
    GluE4m3 = "glu_e4m3" [8, 8, 8, 4, 4, 12];
    HeadLinearBf16 = "head_linear_bf16" [80];
    MatmulGroupedBf16 = "matmul_grouped_bf16" [168, 8];
    MatmulGroupedE4m3 = "matmul_grouped_e4m3" [168, 8];
    MatmulSkinnyBf16X16 = "matmul_skinny_bf16_16" [168];
    MatmulSkinnyBf16X32 = "matmul_skinny_bf16_32" [168];
    MatmulSkinnyBf16X64 = "matmul_skinny_bf16_64" [168];
    MatmulSkinnyBf16X8 = "matmul_skinny_bf16_8" [168];
    MatmulSkinnyE4m3X16 = "matmul_skinny_e4m3_16" [168];
    MatmulSkinnyE4m3X32 = "matmul_skinny_e4m3_32" [168];
    MatmulSkinnyE4m3X64 = "matmul_skinny_e4m3_64" [168];
    MatmulSkinnyE4m3X8 = "matmul_skinny_e4m3_8" [168];
    MeanOutputsBf16 = "mean_outputs_bf16" [40];
    MoeCombineBf16 = "moe_combine_bf16" [8, 8, 8, 8, 4, 4];
    MoeRoute = "moe_route" [128];
    RopeAppendAnyBf16 = "rope_append_any_bf16" [240];
    RopeAppendAnyE4m3 = "rope_append_any_e4m3" [240];
    RopeAppendBf16 = "rope_append_bf16" [240];
    RopeAppendE4m3 = "rope_append_e4m3" [240];
    SampleDraw = "sample_draw" [104, 4];
    SamplePrepare = "sample_prepare" [104];
    ScaleBf16 = "scale_bf16" [8, 4, 4];
    ZeroPages = "zero_pages" [8, 8, 8];
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_list_is_that_of_the_compiler() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernels/resources.toml");
        let table: toml::Table = toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let compiled: BTreeMap<String, Vec<usize>> = table
            .iter()
            .map(|(name, entry)| {
                let bytes = entry["parameters"].as_array().unwrap();
                (name.clone(), bytes.iter().map(|b| b.as_integer().unwrap() as usize).collect())
            })
            .collect();
        let listed: BTreeMap<String, Vec<usize>> =
            Kernel::ALL.iter().map(|k| (k.name().to_owned(), k.parameters().to_vec())).collect();
        assert_eq!(listed.len(), Kernel::ALL.len(), "a name twice");
        assert_eq!(listed, compiled);
    }

    #[test]
    fn names_for_the_driver_are_the_names() {
        for kernel in Kernel::ALL {
            assert_eq!(kernel.c_name().to_str().unwrap(), kernel.name());
        }
    }

    #[test]
    fn the_device_code_is_a_fatbin() {
        assert_eq!(FATBIN[..4], 0xBA55_ED50u32.to_le_bytes());
    }
}
