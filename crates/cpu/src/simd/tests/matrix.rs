//! Reading GGUF blocks, quantizing, packing and reading rows back.

use super::super::quant::{Q4K_BLOCK, Q4k, Q8, half_value};
use super::super::{Isa, MatrixError, PackedMatrix, Storage};
use super::Rng;
use half::{bf16, f16};

#[test]
fn rows_come_back_as_they_went_in() {
    let mut rng = Rng(31);
    let (n, k) = (37, 9);
    let data = rng.normals(n * k);
    let halves: Vec<f16> = data.iter().map(|&v| f16::from_f32(v)).collect();
    let brains: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
    let isa = Isa::detect();
    let f32s = PackedMatrix::from_f32(&data, n, k, isa).unwrap();
    let f16s = PackedMatrix::from_f16(&halves, n, k, isa).unwrap();
    let bf16s = PackedMatrix::from_bf16(&brains, n, k, isa).unwrap();
    let mut row = vec![0.0; k];
    for i in 0..n {
        let at = i * k..(i + 1) * k;
        f32s.row(i, &mut row);
        assert_eq!(row, data[at.clone()]);
        f16s.row(i, &mut row);
        assert_eq!(row, halves[at.clone()].iter().map(|v| v.to_f32()).collect::<Vec<_>>());
        bf16s.row(i, &mut row);
        assert_eq!(row, brains[at].iter().map(|v| v.to_f32()).collect::<Vec<_>>());
    }
    // Two panels of 32 columns; an odd k of bfloat16 takes a whole pair.
    assert_eq!((f32s.bytes(), f16s.bytes(), bf16s.bytes()), (64 * 9 * 4, 64 * 9 * 2, 64 * 10 * 2));
    assert_eq!(format!("{f32s:?}"), format!("PackedMatrix(37 x 9, F32, {isa:?})"));
    assert_eq!(f32s.isa(), isa);
}

#[test]
fn q8_0_blocks_are_read_as_the_file_has_them() {
    let mut rng = Rng(32);
    let (n, k) = (35, 64);
    let mut bytes = Vec::new();
    let mut want = Vec::new();
    for _ in 0..n * k / 32 {
        let scale = f16::from_f32(rng.normal());
        bytes.extend(scale.to_le_bytes());
        for _ in 0..32 {
            let q = rng.next() as i8;
            bytes.push(q.cast_unsigned());
            want.push(scale.to_f32() * f32::from(q));
        }
    }
    let matrix = PackedMatrix::from_q8_0(&bytes, n, k, Isa::detect()).unwrap();
    let mut row = vec![0.0; k];
    for i in 0..n {
        matrix.row(i, &mut row);
        assert_eq!(row, want[i * k..(i + 1) * k], "row {i}");
    }
    assert_eq!(matrix.bytes(), 2 * 2 * 32 * 34);
}

/// Encodes a super-block by the format's own description, independent of the reader.
fn encode_q4k(d: f16, dmin: f16, scales: [u8; 8], mins: [u8; 8], quants: &[u8; Q4K_BLOCK]) -> Vec<u8> {
    let mut bytes = [d.to_le_bytes(), dmin.to_le_bytes()].concat();
    let mut codes = [0_u8; 12];
    for j in 0..4 {
        codes[j] = scales[j] | ((scales[j + 4] >> 4) << 6);
        codes[j + 4] = mins[j] | ((mins[j + 4] >> 4) << 6);
        codes[j + 8] = (scales[j + 4] & 15) | ((mins[j + 4] & 15) << 4);
    }
    bytes.extend(codes);
    for pair in quants.chunks(64) {
        bytes.extend((0..32).map(|i| pair[i] | (pair[i + 32] << 4)));
    }
    bytes
}

#[test]
fn q4_k_blocks_are_read_as_the_file_has_them() {
    let mut rng = Rng(33);
    let (n, k) = (34, 512);
    let mut bytes = Vec::new();
    let mut want = Vec::new();
    for _ in 0..n * k / Q4K_BLOCK {
        let (d, dmin) = (f16::from_f32(rng.normal()), f16::from_f32(rng.normal()));
        let scales: [u8; 8] = std::array::from_fn(|_| rng.below(64) as u8);
        let mins: [u8; 8] = std::array::from_fn(|_| rng.below(64) as u8);
        let quants: [u8; Q4K_BLOCK] = std::array::from_fn(|_| rng.below(16) as u8);
        bytes.extend(encode_q4k(d, dmin, scales, mins, &quants));
        want.extend((0..Q4K_BLOCK).map(|i| {
            let j = i / 32;
            d.to_f32() * f32::from(scales[j]) * f32::from(quants[i]) - dmin.to_f32() * f32::from(mins[j])
        }));
    }
    let matrix = PackedMatrix::from_q4_k(&bytes, n, k, Isa::detect()).unwrap();
    let mut row = vec![0.0; k];
    for i in 0..n {
        matrix.row(i, &mut row);
        assert_eq!(row, want[i * k..(i + 1) * k], "row {i}");
    }
}

#[test]
fn quantizing_is_as_good_as_the_format_allows() {
    let mut rng = Rng(34);
    for round in 0..200 {
        let x: [f32; 32] = std::array::from_fn(|_| rng.normal());
        let block = Q8::quantize(&x);
        let largest = x.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        for (v, q) in x.iter().zip(block.quants) {
            let error = (half_value(block.scale) * f32::from(q) - v).abs();
            // Half a step, and the scale's own rounding to 11 bits.
            assert!(error <= largest / 127.0 * 0.5 + largest / 2048.0, "round {round}: {v} off by {error}");
        }
        let x: [f32; Q4K_BLOCK] = std::array::from_fn(|_| rng.normal());
        let block = Q4k::quantize(&x);
        let square: f32 = (0..Q4K_BLOCK).map(|i| (block.value(i) - x[i]).powi(2)).sum();
        // A plain min-max grid over a range of about 4.2 would have 4.2 / 15 / sqrt(12) = 0.081.
        let rms = (square / Q4K_BLOCK as f32).sqrt();
        assert!(rms < 0.085, "round {round}: rms error {rms}");
    }
}

#[test]
fn quantizing_flat_and_one_sided_blocks() {
    let zero = Q4k::quantize(&[0.0; Q4K_BLOCK]);
    assert!((0..Q4K_BLOCK).all(|i| zero.value(i) == 0.0));
    assert_eq!(Q8::quantize(&[0.0; 32]).quants, [0; 32]);
    for sign in [1.0_f32, -1.0] {
        let x: [f32; Q4K_BLOCK] = std::array::from_fn(|i| sign * (1.0 + (i % 7) as f32 / 10.0));
        let block = Q4k::quantize(&x);
        for (i, v) in x.iter().enumerate() {
            assert!((block.value(i) - v).abs() < 0.08, "{v} became {}", block.value(i));
        }
    }
}

#[test]
fn wrong_shapes_are_named() {
    let isa = Isa::Portable;
    let error = |r: Result<PackedMatrix, MatrixError>| r.unwrap_err().to_string();
    assert_eq!(
        error(PackedMatrix::from_f32(&[0.0; 5], 2, 3, isa)),
        "a F32 weight of 2 x 3 takes 6 elements, the data have 5"
    );
    assert_eq!(
        error(PackedMatrix::from_q8_0(&[0; 67], 1, 64, isa)),
        "a Q8_0 weight of 1 x 64 takes 68 bytes, the data have 67"
    );
    assert_eq!(
        error(PackedMatrix::quantize_q4_k(&[0.0; 576], 1, 576, isa)),
        "Q4K has blocks of 256 weights, and k = 576 is no multiple of it"
    );
    assert_eq!(
        PackedMatrix::quantize_q8_0(&[0.0; 33], 1, 33, isa).unwrap_err(),
        MatrixError::Blocks { storage: Storage::Q8_0, block: 32, k: 33 }
    );
    assert_eq!(error(PackedMatrix::from_bf16(&[], 0, 3, isa)), "a weight of 0 x 3 has no elements");
}

#[test]
#[should_panic(expected = "row 2 of a weight with 2 rows")]
fn a_row_beyond_the_last_is_named() {
    PackedMatrix::from_f32(&[0.0; 6], 2, 3, Isa::Portable).unwrap().row(2, &mut [0.0; 3]);
}
