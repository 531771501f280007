//! Philox4x32-10: random numbers as a pure function of a key and a counter.
//!
//! Owns the generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). It keeps no state:
//! what a sequence draws at a position cannot depend on what ran beside it, nor on how often it was preempted.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// Four random words for a counter under a key.
pub(crate) fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter;
    let mut k = key;
    for round in 0..ROUNDS {
        if round > 0 {
            k = [k[0].wrapping_add(KEY_STEPS[0]), k[1].wrapping_add(KEY_STEPS[1])];
        }
        let (hi0, lo0) = wide_mul(MULTIPLIERS[0], c[0]);
        let (hi1, lo1) = wide_mul(MULTIPLIERS[1], c[2]);
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0];
    }
    c
}

/// High and low word of a product.
fn wide_mul(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

/// The number in `[0, 1)` that a choice of a request draws with at a position: 53 random bits.
pub(crate) fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    let words = philox4x32_10([position, choice, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(words[0]) << 32 | u64::from(words[1])) >> 11;
    bits as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of the authors' `Random123` library, `kat_vectors`.
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32_10(counter, key), want, "counter {counter:x?}, key {key:x?}");
        }
    }

    #[test]
    fn uniform_depends_on_seed_choice_and_position_alone() {
        let base = uniform(7, 1, 5);
        assert!((0.0..1.0).contains(&base));
        assert_eq!(base.to_bits(), uniform(7, 1, 5).to_bits());
        for other in [uniform(8, 1, 5), uniform(7 | 1 << 40, 1, 5), uniform(7, 2, 5), uniform(7, 1, 6)] {
            assert_ne!(base.to_bits(), other.to_bits());
        }
    }

    #[test]
    fn uniform_is_even() {
        const BINS: usize = 64;
        const DRAWS: u32 = 64_000;
        let mut bins = [0f64; BINS];
        for position in 0..DRAWS {
            bins[(uniform(42, 0, position) * BINS as f64) as usize] += 1.0;
        }
        let expected = f64::from(DRAWS) / BINS as f64;
        let chi2: f64 = bins.iter().map(|b| (b - expected).powi(2) / expected).sum();
        // 63 degrees of freedom: 63 +- 11.2; five standard deviations.
        assert!((10.0..120.0).contains(&chi2), "chi-square {chi2} for seed 42");
    }
}
