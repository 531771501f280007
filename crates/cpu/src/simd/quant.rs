//! GGUF blocks: reading Q8_0 and Q4_K, and quantizing to them at load.
//!
//! Owns: the block formats (as in ggml's `block_q8_0` and `block_q4_K`). Never: the packed layout of the kernels.

use half::f16;

/// Weights of a Q8_0 block.
pub(crate) const Q8_BLOCK: usize = 32;
/// Bytes of a Q8_0 block: one f16 scale and 32 signed bytes.
pub(crate) const Q8_BYTES: usize = 34;
/// Weights of a Q4_K super-block: 8 sub-blocks of 32.
pub(crate) const Q4K_BLOCK: usize = 256;
/// Bytes of a Q4_K super-block: two f16, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.
pub(crate) const Q4K_BYTES: usize = 144;

/// `w[i] = scale * quants[i]`.
#[derive(Clone, Debug)]
pub(crate) struct Q8 {
    /// f16 bits.
    pub(crate) scale: u16,
    pub(crate) quants: [i8; Q8_BLOCK],
}

/// `w[32 j + i] = d * scales[j] * quants[32 j + i] - dmin * mins[j]`.
#[derive(Clone, Debug)]
pub(crate) struct Q4k {
    /// f16 bits.
    pub(crate) d: u16,
    /// f16 bits.
    pub(crate) dmin: u16,
    /// 0..64.
    pub(crate) scales: [u8; 8],
    /// 0..64.
    pub(crate) mins: [u8; 8],
    /// 0..16, in the order of the weights.
    pub(crate) quants: [u8; Q4K_BLOCK],
}

/// Value of f16 bits.
pub(crate) fn half_value(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

impl Q8 {
    /// Reads one block of the file.
    pub(crate) fn read(bytes: &[u8; Q8_BYTES]) -> Self {
        let scale = u16::from_le_bytes([bytes[0], bytes[1]]);
        Self { scale, quants: std::array::from_fn(|i| bytes[2 + i].cast_signed()) }
    }

    /// Symmetric quantization: the largest magnitude becomes 127.
    pub(crate) fn quantize(x: &[f32; Q8_BLOCK]) -> Self {
        let largest = x.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let quants = x.map(|v| (v * inverse).round_ties_even() as i8);
        Self { scale: f16::from_f32(largest / 127.0).to_bits(), quants }
    }
}

impl Q4k {
    /// Reads one super-block of the file.
    pub(crate) fn read(bytes: &[u8; Q4K_BYTES]) -> Self {
        let half = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
        let codes = &bytes[4..16];
        let nibbles = &bytes[16..];
        // Codes 4..8 keep their upper two bits in the upper bits of codes 0..4 and of the minima.
        let code = |j: usize| -> (u8, u8) {
            if j < 4 {
                (codes[j] & 63, codes[j + 4] & 63)
            } else {
                let shared = codes[j + 4];
                ((shared & 15) | ((codes[j - 4] >> 6) << 4), (shared >> 4) | ((codes[j] >> 6) << 4))
            }
        };
        Self {
            d: half(0),
            dmin: half(2),
            scales: std::array::from_fn(|j| code(j).0),
            mins: std::array::from_fn(|j| code(j).1),
            // Every 32 bytes hold two sub-blocks: low nibbles the first, high nibbles the second.
            quants: std::array::from_fn(|i| {
                let byte = nibbles[i / 64 * 32 + i % 32];
                if i % 64 < 32 { byte & 15 } else { byte >> 4 }
            }),
        }
    }

    /// Quantizes 256 weights: per sub-block the line `scale * q - min` with the least squared error among a few
    /// candidates, then 6-bit codes for all scales and minima.
    pub(crate) fn quantize(x: &[f32; Q4K_BLOCK]) -> Self {
        let (subs, _) = x.as_chunks::<32>();
        let lines: [(f32, f32); 8] = std::array::from_fn(|j| fit_line(&subs[j]));
        let d = f16::from_f32(lines.iter().fold(0.0_f32, |m, l| m.max(l.0)) / 63.0);
        let dmin = f16::from_f32(lines.iter().fold(0.0_f32, |m, l| m.max(l.1)) / 63.0);
        let code = |v: f32, unit: f16| -> u8 {
            let unit = unit.to_f32();
            if unit > 0.0 { (v / unit).round_ties_even().clamp(0.0, 63.0) as u8 } else { 0 }
        };
        let scales: [u8; 8] = std::array::from_fn(|j| code(lines[j].0, d));
        let mins: [u8; 8] = std::array::from_fn(|j| code(lines[j].1, dmin));
        let quants = std::array::from_fn(|i| {
            let step = d.to_f32() * f32::from(scales[i / 32]);
            let min = dmin.to_f32() * f32::from(mins[i / 32]);
            if step > 0.0 { ((x[i] + min) / step).round_ties_even().clamp(0.0, 15.0) as u8 } else { 0 }
        });
        Self { d: d.to_bits(), dmin: dmin.to_bits(), scales, mins, quants }
    }

    /// Weight `i` of the super-block.
    pub(crate) fn value(&self, i: usize) -> f32 {
        let (scale, min) = (f32::from(self.scales[i / 32]), f32::from(self.mins[i / 32]));
        half_value(self.d) * scale * f32::from(self.quants[i]) - half_value(self.dmin) * min
    }
}

/// `(scale, min)`, both >= 0, such that `scale * q - min` with q in 0..16 is near `x`.
fn fit_line(x: &[f32; 32]) -> (f32, f32) {
    let low = x.iter().copied().fold(0.0_f32, f32::min);
    let high = x.iter().copied().fold(0.0_f32, f32::max);
    if high <= low {
        return (0.0, 0.0);
    }
    let mut best = ((high - low) / 15.0, -low);
    let mut best_error = squared_error(x, best);
    for step in 0..16 {
        // A narrower or wider grid than the full range, then the least-squares line through its codes.
        let inverse = (13.5 + 0.2 * step as f32) / (high - low);
        let codes = x.map(|v| ((v - low) * inverse).round_ties_even().clamp(0.0, 15.0));
        let n = x.len() as f32;
        let (mut q, mut qq, mut v, mut vq) = (0.0, 0.0, 0.0, 0.0);
        for (&value, &code) in x.iter().zip(&codes) {
            q += code;
            qq += code * code;
            v += value;
            vq += value * code;
        }
        let determinant = n * qq - q * q;
        if determinant <= 0.0 {
            continue;
        }
        let mut line = ((n * vq - q * v) / determinant, -(qq * v - q * vq) / determinant);
        if line.1 < 0.0 {
            line = (vq / qq, 0.0);
        }
        let error = squared_error(x, line);
        if line.0 > 0.0 && error < best_error {
            (best, best_error) = (line, error);
        }
    }
    best
}

/// Squared error of `x` on the grid of `line`.
fn squared_error(x: &[f32; 32], (scale, min): (f32, f32)) -> f32 {
    let inverse = 1.0 / scale;
    x.iter()
        .map(|&v| {
            let code = ((v + min) * inverse).round_ties_even().clamp(0.0, 15.0);
            let error = scale * code - min - v;
            error * error
        })
        .sum()
}
