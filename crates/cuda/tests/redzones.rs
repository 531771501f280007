//! Redzones between the regions of the arena: on an emulated driver with AddressSanitizer, whoever touches one ends the
//! process. On another driver there are none, and these tests say nothing.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use mirai_cuda::{Arena, DevicePtr, Gpu, Kernel, Kernels, Part};
use support::{ends_on_sanitized_driver, on_emulated_driver};

mirai_cuda::kernel_args! {
    struct Add { x: DevicePtr, y: DevicePtr, width: i32, scale: f32 }
}

/// Elements of a row, and its bytes.
const WIDTH: usize = 64;
const ROW: usize = 2 * WIDTH;

/// `x += y`, one row, where the region of x is too small for it by some bytes.
fn add_to_region_without(missing: usize) {
    let gpu = Gpu::open(0).unwrap();
    let mut arena = Arena::new(&gpu, 1 << 20).unwrap();
    let kernels = Kernels::load(&gpu).unwrap();
    let mut take = |bytes: usize| arena.take(Part::Activations, bytes as u64).unwrap();
    let (x, y) = (take(ROW - missing), take(ROW));
    let args = Add { x, y, width: WIDTH as i32, scale: 1.0 };
    kernels.launch(&gpu, Kernel::AddBf16, (1, 1, 1), 32, 0, &args).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn a_kernel_that_writes_a_little_behind_its_region_is_caught() {
    const NAME: &str = "a_kernel_that_writes_a_little_behind_its_region_is_caught";
    let Some(said) = ends_on_sanitized_driver(NAME, || add_to_region_without(16)) else { return };
    assert!(said.contains("AddressSanitizer: use-after-poison"), "{said}");
}

#[test]
fn a_kernel_that_has_no_region_at_all_is_caught() {
    const NAME: &str = "a_kernel_that_has_no_region_at_all_is_caught";
    let Some(said) = ends_on_sanitized_driver(NAME, || add_to_region_without(ROW)) else { return };
    assert!(said.contains("AddressSanitizer: use-after-poison"), "{said}");
}

#[test]
fn a_kernel_that_stays_in_its_region_is_not() {
    on_emulated_driver("a_kernel_that_stays_in_its_region_is_not", &[], || add_to_region_without(0));
}
