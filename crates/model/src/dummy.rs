//! Random weights of a model's true shape, for benchmarks and tests without files.
//!
//! Owns the generator. The numbers depend on the seed and the tensor's name alone, so that they are the same
//! whatever the order of loading.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::backend::{HostTensor, Storage};
use crate::error::{ModelError, Result};
use crate::spec::ModelSpec;
use crate::weights::{TensorId, WeightSource, shape};

/// Standard deviation of the weights, as in common initialisations.
const DEVIATION: f32 = 0.02;

/// Makes tensors on demand.
#[derive(Clone, Copy, Debug)]
pub struct DummySource {
    seed: u64,
    storage: Storage,
}

impl DummySource {
    /// Weights of this float type.
    ///
    /// # Errors
    /// Not a float type.
    pub fn new(seed: u64, storage: Storage) -> Result<Self> {
        if !storage.is_float() {
            let why = format!("{} is not a float type", storage.name());
            return Err(ModelError::Option { option: "dtype", why });
        }
        Ok(Self { seed, storage })
    }
}

/// SplitMix64: one addition and a mix, which is enough for weights that nobody trained.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Nearly normal with deviation 1: the sum of four uniform numbers, whose variance is 4 / 12.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: u32 = (0..4).map(|i| (bits >> (16 * i)) as u16).map(u32::from).sum();
        (sum as f32 / 65_536.0 - 2.0) * 3f32.sqrt()
    }
}

/// Writes one value after the other.
fn put(storage: Storage, bytes: &mut [u8], mut next: impl FnMut() -> f32) {
    match storage {
        Storage::F16 => {
            bytes.as_chunks_mut().0.iter_mut().for_each(|b| *b = f16::from_f32(next()).to_le_bytes());
        }
        Storage::Bf16 => {
            bytes.as_chunks_mut().0.iter_mut().for_each(|b| *b = bf16::from_f32(next()).to_le_bytes());
        }
        _ => bytes.as_chunks_mut().0.iter_mut().for_each(|b| *b = next().to_le_bytes()),
    }
}

/// Fills a tensor on all cores. Each run has its own stream, so the number of cores changes nothing.
fn fill(storage: Storage, seed: u64, bytes: &mut [u8]) {
    const RUN: usize = 1 << 18;
    let mut runs: Vec<(u64, &mut [u8])> = (0u64..).zip(bytes.chunks_mut(RUN)).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = runs.len().div_ceil(cores).max(1);
    std::thread::scope(|scope| {
        for part in runs.chunks_mut(share) {
            scope.spawn(move || {
                for (number, run) in part {
                    let mut random = Random(Random(seed.wrapping_add(*number)).next());
                    put(storage, run, || random.normal() * DEVIATION);
                }
            });
        }
    });
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl WeightSource for DummySource {
    fn tensor(&self, spec: &ModelSpec, id: TensorId) -> Result<HostTensor<'_>> {
        let (name, shape) = (format!("{id:?}"), shape(spec, id));
        let count = self.storage.tensor_bytes(&shape).map(|b| b / self.storage.block_bytes());
        let count = count.ok_or_else(|| {
            ModelError::corrupt("dummy weights", format!("tensor `{name}`"), format!("shape {shape:?}"))
        })?;
        let mut bytes = vec![0; count * self.storage.block_bytes()];
        if id.is_norm() {
            put(self.storage, &mut bytes, || 1.0);
        } else {
            fill(self.storage, self.seed ^ hash(&name), &mut bytes);
        }
        Ok(HostTensor { name, shape, storage: self.storage, bytes: Cow::Owned(bytes), scales: None })
    }

    fn has(&self, _spec: &ModelSpec, _id: TensorId) -> bool {
        true
    }

    fn label(&self) -> &str {
        "dummy weights"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_nearly_normal() {
        let mut random = Random(1);
        let values: Vec<f32> = (0..100_000).map(|_| random.normal()).collect();
        let mean = values.iter().sum::<f32>() / 1e5;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        assert!(DummySource::new(0, Storage::Q8_0).is_err());
    }

    #[test]
    fn runs_do_not_repeat_and_tensors_start_alike_whatever_their_length() {
        let (mut long, mut short) = (vec![0; 1 << 20], vec![0; 4_000]);
        fill(Storage::Bf16, 5, &mut long);
        fill(Storage::Bf16, 5, &mut short);
        assert_eq!(long[..4_000], short);
        assert_ne!(long[..4_000], long[1 << 18..][..4_000]);
        let mut ones = [0; 6];
        put(Storage::F16, &mut ones, || 1.0);
        assert_eq!(ones, [0, 0x3c, 0, 0x3c, 0, 0x3c]);
    }
}
