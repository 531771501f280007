//! Attention kernels by head size.
//!
//! Owns their threads and shared memory, as `kernels/README.md` lists them.

use crate::kernels::Kernel;

/// Tensor-core attention for one head size and element of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadKernels {
    pub(crate) decode: Kernel,
    pub(crate) decode_threads: u32,
    pub(crate) decode_shared: u32,
    pub(crate) prefill: Kernel,
    pub(crate) prefill_threads: u32,
    pub(crate) prefill_shared: u32,
}

/// Kernels for keys of `key` elements and values of `value`, if there are such. Where they differ, the value is the start of
/// the key.
pub(crate) fn head_kernels(key: usize, value: usize, e4m3: bool) -> Option<HeadKernels> {
    use Kernel as K;
    let size = match (key, value) {
        (_, _) if key == value => key,
        // No head size of its own is so large.
        (576 | 640, 512) => key,
        _ => return None,
    };
    let (decode, decode_shared, prefill, prefill_shared) = match (size, e4m3) {
        (64, false) => (K::AttentionDecodeBf16X64, 57_600, K::AttentionPrefillBf16X64, 46_080),
        (96, false) => (K::AttentionDecodeBf16X96, 83_200, K::AttentionPrefillBf16X96, 66_560),
        (128, false) => (K::AttentionDecodeBf16X128, 73_984, K::AttentionPrefillBf16X128, 87_040),
        (256, false) => (K::AttentionDecodeBf16X256, 143_616, K::AttentionPrefillBf16X256, 101_376),
        (512, false) => (K::AttentionDecodeBf16X512, 149_760, K::AttentionPrefillBf16X512, 133_120),
        (64, true) => (K::AttentionDecodeE4m3X64, 45_312, K::AttentionPrefillE4m3X64, 44_032),
        (96, true) => (K::AttentionDecodeE4m3X96, 66_816, K::AttentionPrefillE4m3X96, 64_512),
        (128, true) => (K::AttentionDecodeE4m3X128, 71_936, K::AttentionPrefillE4m3X128, 84_992),
        (256, true) => (K::AttentionDecodeE4m3X256, 141_568, K::AttentionPrefillE4m3X256, 100_352),
        (512, true) => (K::AttentionDecodeE4m3X512, 148_736, K::AttentionPrefillE4m3X512, 132_608),
        (576, false) if value == 512 => {
            (K::AttentionDecodeBf16X576X512, 93_440, K::AttentionPrefillBf16X576X512, 112_128)
        }
        (640, false) if value == 512 => {
            (K::AttentionDecodeBf16X640X512, 103_680, K::AttentionPrefillBf16X640X512, 124_416)
        }
        (576, true) if value == 512 => {
            (K::AttentionDecodeE4m3X576X512, 92_928, K::AttentionPrefillE4m3X576X512, 111_872)
        }
        (640, true) if value == 512 => {
            (K::AttentionDecodeE4m3X640X512, 103_168, K::AttentionPrefillE4m3X640X512, 124_160)
        }
        _ => return None,
    };
    let prefill_threads = if size >= 512 { 256 } else { 128 };
    Some(HeadKernels { decode, decode_threads: 128, decode_shared, prefill, prefill_threads, prefill_shared })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_their_own_kernels() {
        for e4m3 in [false, true] {
            for dim in [64, 96, 128, 256, 512] {
                let name = if e4m3 { "e4m3" } else { "bf16" };
                let found = head_kernels(dim, dim, e4m3).map(|k| (k.decode.name(), k.prefill.name()));
                let want =
                    [format!("attention_decode_{name}_{dim}"), format!("attention_prefill_{name}_{dim}")];
                assert_eq!(found, Some((&*want[0], &*want[1])));
            }
            let name = if e4m3 { "e4m3" } else { "bf16" };
            for key in [576, 640] {
                let found = head_kernels(key, 512, e4m3).map(|k| (k.decode.name(), k.prefill_threads));
                assert_eq!(found, Some((&*format!("attention_decode_{name}_{key}_512"), 256)));
            }
            assert_eq!((head_kernels(80, 80, e4m3), head_kernels(576, 576, e4m3)), (None, None));
            assert_eq!(head_kernels(128, 64, e4m3), None);
        }
    }
}
