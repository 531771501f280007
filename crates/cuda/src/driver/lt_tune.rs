//! The choice of an algorithm: by the clock, on weights that do not stay in the cache.
//!
//! Owns the measurement. The library's own first choice is made without running anything, and is off by half at the
//! edges of its tables; a decode step's weights come from memory every time, so they do here.

use super::error::{CudaError, Result};
use super::lt_file::KeptPlan;
use super::lt_product::{Algorithm, Library, Product};
use super::lt_shape::{LtOperands, LtOptions, LtOutput, LtShape, LtStorage};
use super::memory::{ALIGNMENT, DevicePtr};
use super::stream::Event;

/// Runs between two events.
const RUNS: usize = 4;
/// Times that is done; the fastest counts, since everything that disturbs makes it slower.
const ROUNDS: usize = 3;
/// Milliseconds from which on one run says enough.
const SLOW: f32 = 50.0;
/// Most copies of a weight that runs rotate over.
const MAX_COPIES: u64 = 16;
/// What operands hold: a small number in bf16, e4m3 and f32. All zeros would cost less power than weights do.
const FILL: u8 = 0x3c;

/// The fastest of at most `most` candidates for a shape; the library's first where there is no room to time them.
pub(super) fn tune(
    library: &Library,
    shape: LtShape,
    options: &LtOptions,
    scratch: (DevicePtr, u64),
    most: usize,
) -> Result<(Product, KeptPlan)> {
    let mut product = Product::new(library, shape, None, options)?;
    let place = Place::new(&shape, scratch);
    let most = if place.is_some() { most } else { 1 };
    let candidates = product.candidates(library, most, options.workspace_bytes)?;
    let mut best: Option<(f32, Algorithm, usize)> = None;
    match place {
        Some(place) if candidates.len() > 1 => {
            library.gpu().fill(scratch.0, FILL, place.bytes)?;
            for &(algorithm, workspace) in &candidates {
                product.choose(algorithm, workspace);
                let milliseconds = time(library, &product, &place, options)?;
                tracing::trace!(%shape, workspace, milliseconds, "matmul candidate");
                if best.is_none_or(|(fastest, ..)| milliseconds < fastest) {
                    best = Some((milliseconds, algorithm, workspace));
                }
            }
        }
        _ => best = candidates.first().map(|&(algorithm, workspace)| (0.0, algorithm, workspace)),
    }
    let Some((milliseconds, algorithm, workspace)) = best else {
        let workspace = options.workspace_bytes as usize;
        return Err(CudaError::NoAlgorithm { shape: shape.to_string(), workspace });
    };
    product.choose(algorithm, workspace);
    tracing::debug!(%shape, candidates = candidates.len(), workspace, milliseconds, "matmul plan");
    let microseconds = f64::from(milliseconds) * 1e3;
    Ok((product, KeptPlan { shape, algorithm, workspace, microseconds }))
}

/// Runs a product once, if its operands have room.
pub(super) fn warm(
    library: &Library,
    product: &Product,
    options: &LtOptions,
    scratch: (DevicePtr, u64),
) -> Result<()> {
    let Some(place) = Place::new(&product.shape(), scratch) else {
        tracing::debug!(shape = %product.shape(), "no room to run a matmul plan before it is needed");
        return Ok(());
    };
    product.run(library, &place.operands(0), (options.workspace, options.workspace_bytes))
}

/// Milliseconds of one run.
fn time(library: &Library, product: &Product, place: &Place, options: &LtOptions) -> Result<f32> {
    let gpu = library.gpu();
    let (start, end) = (Event::timed(gpu)?, Event::timed(gpu)?);
    let workspace = (options.workspace, options.workspace_bytes);
    let mut copy = 0;
    let mut run = || {
        copy += 1;
        product.run(library, &place.operands(copy), workspace)
    };
    let mut timed = |runs: usize| {
        start.record()?;
        for _ in 0..runs {
            run()?;
        }
        end.record()?;
        end.wait()?;
        Ok(end.since(&start)? / runs as f32)
    };
    // The first run loads the algorithm's code.
    if timed(1)? > SLOW {
        return timed(1);
    }
    let mut fastest = f32::INFINITY;
    for _ in 0..ROUNDS {
        fastest = fastest.min(timed(RUNS)?);
    }
    Ok(fastest)
}

/// Where a shape's operands lie in the scratch: all but the weight once, then as many weights as there is room for.
struct Place {
    operands: LtOperands,
    weight_stride: u64,
    copies: u64,
    /// From the scratch's start.
    bytes: u64,
}

impl Place {
    /// None if the scratch is too small for it.
    fn new(shape: &LtShape, scratch: (DevicePtr, u64)) -> Option<Self> {
        let (rows, outputs, inner) =
            (u64::from(shape.rows), u64::from(shape.outputs), u64::from(shape.inner));
        let element = if shape.storage == LtStorage::Bf16 { 2 } else { 1 };
        let result = if shape.output == LtOutput::F32 { 4 } else { 2 };
        let mut used = 0;
        let mut take = |bytes: u64| {
            let at = scratch.0.add(used);
            used += bytes.next_multiple_of(ALIGNMENT);
            at
        };
        let operands = LtOperands {
            x: take(rows * inner * element),
            x_scales: take(rows * 4),
            weight_scales: take(outputs * 4),
            bias: take(outputs * 2),
            y: take(rows * outputs * result),
            weight: take(0),
        };
        let weight_stride = (outputs * inner * element).next_multiple_of(ALIGNMENT);
        let copies = scratch.1.saturating_sub(used) / weight_stride.max(1);
        let copies = copies.min(MAX_COPIES);
        (copies > 0).then(|| Self { operands, weight_stride, copies, bytes: used + copies * weight_stride })
    }

    fn operands(&self, copy: u64) -> LtOperands {
        let weight = self.operands.weight.add(copy % self.copies * self.weight_stride);
        LtOperands { weight, ..self.operands }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn operands_do_not_overlap_and_weights_rotate() {
        let shape = LtShape {
            rows: 80,
            outputs: 24,
            inner: 40,
            storage: LtStorage::Bf16,
            output: LtOutput::F32,
            bias: true,
        };
        let place = Place::new(&shape, (DevicePtr::NULL, 30_000)).unwrap();
        // x 80*40*2, scales 80*4 and 24*4, bias 24*2, y 80*24*4, each up to 256; a weight is 24*40*2.
        assert_eq!(place.operands.weight.address(), 6400 + 512 + 256 + 256 + 7680);
        assert_eq!((place.weight_stride, place.copies), (2048, 7));
        let weights: Vec<u64> = (0..8).map(|copy| place.operands(copy).weight.address()).collect();
        assert_eq!(weights[0], weights[7]);
        assert!(weights.windows(2).all(|w| w[0] != w[1]));
        assert!(weights[6] + 24 * 40 * 2 <= 30_000);
        assert_eq!(place.bytes, 15_104 + 7 * 2048);
        assert!(Place::new(&shape, (DevicePtr::NULL, 16_000)).is_none(), "no room for one weight");
    }
}
