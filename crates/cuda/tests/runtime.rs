//! The runtime below the backend, on the emulated driver: memory, copies, launches, graphs, faults, products, figures.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use mirai_cuda::{
    Arena, CudaError, DevicePtr, Event, Gpu, Kernel, Kernels, Loader, Lt, LtOperands, LtOptions, LtOutput,
    LtShape, LtStorage, OpenError, Part, ReadBack, Telemetry, UploadRing,
};
use support::{is_sanitized, on_emulated_driver, on_libraries, without_driver};

mirai_cuda::kernel_args! {
    struct Add { x: DevicePtr, y: DevicePtr, width: i32, scale: f32 }
}

/// Elements of a row in these tests.
const WIDTH: usize = 64;
/// Its bytes, in bf16.
const ROW: usize = 2 * WIDTH;

struct Machine {
    gpu: Gpu,
    arena: Arena,
    kernels: Kernels,
}

impl Machine {
    fn new() -> Self {
        let gpu = Gpu::open(0).unwrap();
        let arena = Arena::new(&gpu, 64 << 20).unwrap();
        let kernels = Kernels::load(&gpu).unwrap();
        Self { gpu, arena, kernels }
    }

    fn take(&mut self, bytes: usize) -> DevicePtr {
        self.arena.take(Part::Activations, bytes as u64).unwrap()
    }

    /// `x += y`, one row.
    fn add(&self, x: DevicePtr, y: DevicePtr) -> mirai_cuda::Result<()> {
        let args = Add { x, y, width: WIDTH as i32, scale: 1.0 };
        self.kernels.launch(&self.gpu, Kernel::AddBf16, (1, 1, 1), 32, 0, &args)
    }

    fn row(&self, at: DevicePtr) -> Vec<f32> {
        let mut bytes = [0; ROW];
        self.gpu.download_now(&mut bytes, at).unwrap();
        widen(&bytes)
    }
}

/// A row of one number, in bf16.
fn row(value: f32) -> Vec<u8> {
    half::bf16::from_f32(value).to_le_bytes().repeat(WIDTH)
}

fn widen(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

#[test]
fn without_a_driver_the_library_is_named() {
    without_driver("without_a_driver_the_library_is_named", || {
        // A machine with a driver of its own finds it in its system's folders.
        if let Err(error) = Gpu::probe() {
            assert_eq!(error, OpenError::NoLibrary { library: "libcuda.so.1" });
            assert_eq!(error.to_string(), "no CUDA driver: libcuda.so.1 could not be loaded");
            assert_eq!(Gpu::open(0).unwrap_err(), error);
        }
    });
}

#[test]
fn a_device_is_known_before_it_is_opened() {
    on_emulated_driver("a_device_is_known_before_it_is_opened", &[], || {
        let devices = Gpu::probe().unwrap();
        let facts = Gpu::look(0).unwrap();
        assert_eq!((facts.capability, facts.multiprocessors), ((9, 0), 132));
        assert_eq!((facts.shared_memory, facts.multiprocessor_shared_memory), (227 << 10, 228 << 10));
        assert!(facts.memory > 0 && facts.l2 > 0 && facts.driver >= 13_000);
        assert!(!facts.name.is_empty() && facts.bus.contains(':'), "{facts:?}");
        let error = Gpu::open(devices).unwrap_err();
        assert_eq!(error, OpenError::NoSuchDevice { ordinal: devices, devices });
        let gpu = Gpu::open(0).unwrap();
        assert_eq!(gpu.facts(), &facts);
        let before = gpu.memory().unwrap();
        let arena = Arena::new(&gpu, 8 << 20).unwrap();
        assert!(gpu.memory().unwrap().free <= before.free - (8 << 20));
        drop(arena);
        assert_eq!(gpu.memory().unwrap(), before);
    });
}

#[test]
fn a_driver_without_devices_says_so() {
    let variables = [("MIRAI_EMU_FAIL", "cuInit:1:100")];
    on_emulated_driver("a_driver_without_devices_says_so", &variables, || {
        assert_eq!(Gpu::probe(), Err(OpenError::NoDevice));
    });
}

#[test]
fn an_old_driver_says_how_old() {
    let variables = [("MIRAI_EMU_DRIVER_VERSION", "12090")];
    on_emulated_driver("an_old_driver_says_how_old", &variables, || {
        let error = Gpu::open(0).unwrap_err();
        assert_eq!(error, OpenError::TooOld { found: 12_090, needed: 13_000 });
        assert!(error.to_string().contains("supports CUDA 12.9, but 13.0 is needed"), "{error}");
    });
}

#[test]
fn the_arena_is_one_allocation_and_ends() {
    on_emulated_driver("the_arena_is_one_allocation_and_ends", &[], || {
        let gpu = Gpu::open(0).unwrap();
        // A driver that watches memory has gaps between regions.
        let gap = if is_sanitized() { 256 } else { 0 };
        let (all, left) = (4096 + 3 * gap, 3328 + gap);
        let mut arena = Arena::new(&gpu, all).unwrap();
        assert_eq!(arena.rounding(), 256 + gap);
        let first = arena.take(Part::Weights, 1).unwrap();
        let second = arena.take(Part::Cache, 257).unwrap();
        assert_eq!((second.address() - first.address(), first.address() % 256), (256 + gap, 0));
        let parts = (arena.part(Part::Weights), arena.part(Part::Cache));
        assert_eq!((parts, arena.left()), ((256 + gap, 512 + gap), left));
        assert_eq!(arena.rest(), (first.add(768 + 2 * gap), left));
        let error = arena.take(Part::Workspace, 3329).unwrap_err();
        assert_eq!(error, CudaError::Arena { part: "workspace", wanted: 3329, left, arena: all });
        assert!(matches!(arena.take(Part::Weights, u64::MAX), Err(CudaError::Arena { .. })));
        arena.take(Part::Workspace, 3328).unwrap();
        assert_eq!(arena.left(), 0);
        let Err(error) = Arena::new(&gpu, 1 << 50) else { panic!("allocated") };
        let CudaError::Driver { operation, driver, .. } = &error else { panic!("{error}") };
        assert_eq!((driver.code, driver.name.as_str()), (2, "CUDA_ERROR_OUT_OF_MEMORY"));
        assert!(operation.contains("1125899906842624 bytes") && !error.is_fatal(), "{error}");
    });
}

/// Steps that overlap as far as the rings allow: the host fills the next upload and reads the previous result while
/// the device is behind.
fn overlapped_steps() {
    let mut machine = Machine::new();
    let (x, y, sum) = (machine.take(ROW), machine.take(ROW), machine.take(ROW));
    machine.gpu.upload_now(y, &row(0.5)).unwrap();
    machine.gpu.fill(sum, 0, ROW as u64).unwrap();
    let mut up = UploadRing::new(&machine.gpu, ROW, 2).unwrap();
    let mut down = ReadBack::new(&machine.gpu, ROW, 2).unwrap();
    let mut behind = None;
    let mut expected = 0.0;
    for step in 0..12u8 {
        up.fill().unwrap().copy_from_slice(&row(f32::from(step)));
        up.send(x, ROW).unwrap();
        machine.add(x, y).unwrap();
        machine.add(sum, x).unwrap();
        let ticket = down.start(sum, ROW).unwrap();
        if let Some((ticket, sum)) = behind.replace((ticket, expected + f32::from(step) + 0.5)) {
            assert_eq!(widen(down.wait(ticket).unwrap()), [sum; WIDTH], "before step {step}");
            assert!(down.is_done(ticket).unwrap());
        }
        expected += f32::from(step) + 0.5;
    }
    let (last, sum) = behind.unwrap();
    assert_eq!(widen(down.wait(last).unwrap()), [sum; WIDTH]);
    // Two pieces: a third copy takes the place of the first.
    let (old, _) = (down.start(x, ROW).unwrap(), down.start(x, ROW).unwrap());
    down.start(x, ROW).unwrap();
    assert!(matches!(down.wait(old), Err(CudaError::Room { what: "read-backs", .. })));
    assert!(matches!(up.send(x, ROW + 1), Err(CudaError::Room { what: "upload", .. })));
    assert!(matches!(down.start(x, ROW + 1), Err(CudaError::Room { what: "read-back", .. })));
}

#[test]
fn steps_overlap() {
    on_emulated_driver("steps_overlap", &[], overlapped_steps);
}

#[test]
fn steps_overlap_when_the_device_is_as_late_as_it_can_be() {
    let name = "steps_overlap_when_the_device_is_as_late_as_it_can_be";
    on_emulated_driver(name, &[("MIRAI_EMU_LAZY", "1")], overlapped_steps);
}

#[test]
fn weights_of_several_pieces_arrive_whole() {
    let name = "weights_of_several_pieces_arrive_whole";
    on_emulated_driver(name, &[("MIRAI_EMU_LAZY", "1")], || {
        let gpu = Gpu::open(0).unwrap();
        let bytes: Vec<u8> = (0..40_000_003u32).map(|i| (i % 251) as u8).collect();
        let mut arena = Arena::new(&gpu, 48 << 20).unwrap();
        let at = arena.take(Part::Weights, bytes.len() as u64).unwrap();
        let mut loader = Loader::new(&gpu).unwrap();
        loader.upload(at, &bytes).unwrap();
        loader.upload(at, &[]).unwrap();
        loader.upload(at.add(1), &[7]).unwrap();
        drop(loader);
        let mut back = vec![0; bytes.len()];
        gpu.download_now(&mut back, at).unwrap();
        assert_eq!((back[0], back[1]), (bytes[0], 7));
        assert!(back[2..] == bytes[2..]);
    });
}

/// Recorded once, replayed on what is there then.
fn replayed() {
    let mut machine = Machine::new();
    let (x, y) = (machine.take(ROW), machine.take(ROW));
    machine.gpu.upload_now(x, &row(1.0)).unwrap();
    machine.gpu.upload_now(y, &row(2.0)).unwrap();
    let graph = machine
        .gpu
        .capture(|| {
            machine.add(x, y)?;
            machine.gpu.copy(y, x, ROW as u64)
        })
        .unwrap();
    assert_eq!(graph.nodes(), 2);
    assert_eq!(machine.row(x), [1.0; WIDTH], "recorded, not run");
    for expected in [3.0, 6.0, 12.0] {
        graph.launch().unwrap();
        assert_eq!(machine.row(x), [expected; WIDTH]);
    }
    machine.gpu.upload_now(y, &row(-12.0)).unwrap();
    graph.launch().unwrap();
    assert_eq!(machine.row(x), [0.0; WIDTH]);
    // What fails while it is recorded leaves the stream as it was.
    let failed = machine.gpu.capture(|| {
        machine.add(x, y)?;
        Err(CudaError::NoLibrary { library: "none" })
    });
    assert_eq!(failed.err(), Some(CudaError::NoLibrary { library: "none" }));
    let waited = machine.gpu.capture(|| machine.gpu.synchronize());
    assert!(matches!(waited, Err(CudaError::Driver { .. })), "waiting is not recorded");
    machine.gpu.upload_now(y, &row(5.0)).unwrap();
    machine.add(x, y).unwrap();
    assert_eq!(machine.row(x), [5.0; WIDTH]);
}

#[test]
fn what_was_recorded_is_replayed() {
    on_emulated_driver("what_was_recorded_is_replayed", &[], replayed);
}

#[test]
fn what_was_recorded_is_replayed_late() {
    on_emulated_driver("what_was_recorded_is_replayed_late", &[("MIRAI_EMU_LAZY", "1")], replayed);
}

#[test]
fn a_launch_that_cannot_be_says_which_and_why() {
    on_emulated_driver("a_launch_that_cannot_be_says_which_and_why", &[], || {
        let mut machine = Machine::new();
        let x = machine.take(ROW);
        let args = Add { x, y: x, width: 0, scale: 1.0 };
        let launch = |block, shared| {
            machine.kernels.launch(&machine.gpu, Kernel::AddBf16, (3, 2, 1), block, shared, &args)
        };
        let most = machine.kernels.dynamic_shared_memory(Kernel::AddBf16);
        let error = launch(32, most + 1).unwrap_err();
        let CudaError::Launch { kernel, grid, block, shared, driver, .. } = &error else { panic!("{error}") };
        assert_eq!((*kernel, *grid, *block, *shared), ("add_bf16", (3, 2, 1), 32, most + 1));
        assert!(driver.name.starts_with("CUDA_ERROR_"), "{error}");
        assert!(error.to_string().starts_with("launch of add_bf16, grid 3x2x1, 32 threads"), "{error}");
        launch(32, most).unwrap();
        assert!(machine.kernels.overlaps(Kernel::AddBf16), "its code is for 9.0");
        let mirror = machine.kernels.launch(&machine.gpu, Kernel::ZeroPages, (1, 1, 1), 32, 0, &args);
        assert!(matches!(mirror, Err(CudaError::Arguments { kernel: "zero_pages", .. })), "{mirror:?}");
        let nothing = machine.kernels.launch(&machine.gpu, Kernel::AddBf16, (0, 1, 1), 32, 0, &args);
        assert_eq!(nothing, Ok(()), "no blocks, no launch");
        machine.gpu.synchronize().unwrap();
    });
}

#[test]
fn a_lost_context_is_told_apart() {
    let variables = [("MIRAI_EMU_FAIL", "cuLaunchKernelEx:2:700")];
    on_emulated_driver("a_lost_context_is_told_apart", &variables, || {
        let mut machine = Machine::new();
        let (x, y) = (machine.take(ROW), machine.take(ROW));
        machine.gpu.fill(x, 0, ROW as u64).unwrap();
        machine.add(x, y).unwrap();
        let error = machine.add(x, y).unwrap_err();
        assert!(error.is_fatal(), "{error}");
        assert!(error.to_string().ends_with("CUDA_ERROR_ILLEGAL_ADDRESS (700)"), "{error}");
        let after = machine.gpu.synchronize().unwrap_err();
        assert!(after.is_fatal() && after.to_string().starts_with("synchronize on stream 0x"), "{after}");
    });
}

#[test]
fn a_device_that_cannot_load_the_code_says_so() {
    let variables = [("MIRAI_EMU_FAIL", "cuModuleLoadData:1:209")];
    on_emulated_driver("a_device_that_cannot_load_the_code_says_so", &variables, || {
        let gpu = Gpu::open(0).unwrap();
        let Err(error) = Kernels::load(&gpu) else { panic!("loaded") };
        assert!(error.to_string().contains("load the device code"), "{error}");
        assert!(error.to_string().contains("CUDA_ERROR_NO_BINARY_FOR_GPU (209)"), "{error}");
    });
}

#[test]
fn events_know_when() {
    on_emulated_driver("events_know_when", &[], || {
        let mut machine = Machine::new();
        let (x, y) = (machine.take(ROW), machine.take(ROW));
        machine.gpu.fill(x, 0, ROW as u64).unwrap();
        let (start, end) = (Event::timed(&machine.gpu).unwrap(), Event::timed(&machine.gpu).unwrap());
        start.record().unwrap();
        machine.add(x, y).unwrap();
        end.record().unwrap();
        end.wait().unwrap();
        assert!(start.is_done().unwrap() && end.is_done().unwrap());
        assert!(end.since(&start).unwrap() >= 0.0);
        let untimed = Event::new(&machine.gpu).unwrap();
        untimed.wait().unwrap();
        assert!(untimed.since(&start).is_err(), "it has no time");
    });
}

/// Numbers that bf16 and e4m3 hold exactly.
fn small(index: usize) -> f32 {
    [0.0, 0.5, -1.0, 1.5, -0.25, 2.0, 0.125][index % 7]
}

/// e4m3 of those numbers.
fn e4m3(value: f32) -> u8 {
    let codes =
        [(0.0, 0x00), (0.125, 0x20), (0.25, 0x28), (0.5, 0x30), (1.0, 0x38), (1.5, 0x3c), (2.0, 0x40)];
    let (_, code) = codes.into_iter().find(|&(v, _)| v == value.abs()).unwrap();
    if value < 0.0 { code | 0x80 } else { code }
}

/// A product with its operands on the device, and what should come of it.
struct Case {
    shape: LtShape,
    operands: LtOperands,
    expected: Vec<f32>,
}

impl Case {
    fn new(gpu: &Gpu, arena: &mut Arena, shape: LtShape) -> Self {
        let (rows, outputs, inner) = (shape.rows as usize, shape.outputs as usize, shape.inner as usize);
        let x: Vec<f32> = (0..rows * inner).map(|i| small(i * 5 + i / inner)).collect();
        let weight: Vec<f32> = (0..outputs * inner).map(|i| small(i * 3 + i / inner)).collect();
        let bias: Vec<f32> = (0..outputs).map(|i| if shape.bias { small(i) } else { 0.0 }).collect();
        let per_row = shape.storage == LtStorage::E4m3Row;
        let scale = |i: usize| match shape.storage {
            LtStorage::Bf16 => 1.0,
            LtStorage::E4m3Tensor => 0.5,
            LtStorage::E4m3Row => 0.25 * (1 + i % 3) as f32,
        };
        let mut put = |bytes: Vec<u8>| {
            let at = arena.take(Part::Weights, bytes.len().max(1) as u64).unwrap();
            gpu.upload_now(at, &bytes).unwrap();
            at
        };
        let bf16 =
            |values: &[f32]| values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let stored = |values: &[f32]| match shape.storage {
            LtStorage::Bf16 => bf16(values),
            LtStorage::E4m3Tensor | LtStorage::E4m3Row => values.iter().map(|&v| e4m3(v)).collect(),
        };
        let scales = |n: usize| -> Vec<u8> {
            (0..if per_row { n } else { 1 }).flat_map(|i| scale(i).to_le_bytes()).collect()
        };
        let element = if shape.output == LtOutput::F32 { 4 } else { 2 };
        let operands = LtOperands {
            x: put(stored(&x)),
            x_scales: put(scales(rows)),
            weight: put(stored(&weight)),
            weight_scales: put(scales(outputs)),
            bias: put(bf16(&bias)),
            y: put(vec![0xff; rows * outputs * element]),
        };
        let mut expected = Vec::with_capacity(rows * outputs);
        for r in 0..rows {
            for o in 0..outputs {
                let products = (0..inner).map(|i| x[r * inner + i] * weight[o * inner + i]);
                expected.push(products.sum::<f32>() * scale(r) * scale(o) + bias[o]);
            }
        }
        Self { shape, operands, expected }
    }

    fn check(&self, gpu: &Gpu) {
        let element = if self.shape.output == LtOutput::F32 { 4 } else { 2 };
        let mut bytes = vec![0; self.expected.len() * element];
        gpu.download_now(&mut bytes, self.operands.y).unwrap();
        let y = match self.shape.output {
            LtOutput::Bf16 => widen(&bytes),
            LtOutput::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
        };
        for (at, (y, expected)) in y.iter().zip(&self.expected).enumerate() {
            let near = (y - expected).abs() <= 0.01 * expected.abs().max(0.5);
            assert!(near, "{}: element {at} is {y}, should be {expected}", self.shape);
        }
    }
}

fn shapes() -> Vec<LtShape> {
    let shape =
        |rows, outputs, storage, output, bias| LtShape { rows, outputs, inner: 48, storage, output, bias };
    vec![
        shape(72, 24, LtStorage::Bf16, LtOutput::Bf16, false),
        shape(72, 24, LtStorage::Bf16, LtOutput::Bf16, true),
        shape(80, 40, LtStorage::Bf16, LtOutput::F32, false),
        shape(96, 32, LtStorage::E4m3Tensor, LtOutput::Bf16, false),
        shape(96, 32, LtStorage::E4m3Row, LtOutput::Bf16, true),
    ]
}

#[test]
fn products_are_planned_kept_and_right() {
    on_emulated_driver("products_are_planned_kept_and_right", &[], || {
        let gpu = Gpu::open(0).unwrap();
        let mut arena = Arena::new(&gpu, 16 << 20).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let options = LtOptions {
            workspace: arena.take(Part::Workspace, 1 << 20).unwrap(),
            workspace_bytes: 1 << 20,
            candidates: 4,
            plan_folder: Some(folder.path().join("plans")),
        };
        let cases: Vec<Case> = shapes().into_iter().map(|s| Case::new(&gpu, &mut arena, s)).collect();
        let files = || -> Vec<(std::path::PathBuf, String)> {
            let read = std::fs::read_dir(folder.path().join("plans")).unwrap();
            let files = read.map(|f| f.unwrap().path());
            files.map(|f| (f.clone(), std::fs::read_to_string(f).unwrap())).collect()
        };
        let mut kept = Vec::new();
        for round in 0..3 {
            let mut lt = Lt::new(&gpu, options.clone()).unwrap();
            assert_eq!(lt.plan(&cases[0].shape), None);
            lt.tune(&shapes(), arena.rest()).unwrap();
            for case in &cases {
                gpu.fill(case.operands.y, 0xff, case.expected.len() as u64).unwrap();
                lt.run(lt.plan(&case.shape).unwrap(), &case.operands).unwrap();
                case.check(&gpu);
            }
            match round {
                0 => kept = files(),
                // The second start takes the file; the third finds it spoilt and makes it anew.
                1 => {
                    assert_eq!(files(), kept, "written again");
                    std::fs::write(&kept[0].0, "{}").unwrap();
                }
                _ => assert!(files()[0].1.contains("\"algorithm\""), "not made anew"),
            }
            assert_eq!(files().len(), 1);
        }
        assert!(kept[0].1.contains("\"device\"") && kept[0].1.contains("\"digest\""), "{}", kept[0].1);
    });
}

#[test]
fn a_product_is_recorded_with_the_rest() {
    on_emulated_driver("a_product_is_recorded_with_the_rest", &[("MIRAI_EMU_LAZY", "1")], || {
        let gpu = Gpu::open(0).unwrap();
        let mut arena = Arena::new(&gpu, 16 << 20).unwrap();
        let workspace_bytes = 1 << 20;
        let workspace = arena.take(Part::Workspace, workspace_bytes).unwrap();
        let options = LtOptions { workspace, workspace_bytes, candidates: 4, plan_folder: None };
        let mut lt = Lt::new(&gpu, options).unwrap();
        let case = Case::new(&gpu, &mut arena, shapes()[0]);
        lt.tune(&[case.shape], arena.rest()).unwrap();
        let plan = lt.plan(&case.shape).unwrap();
        let graph = gpu.capture(|| lt.run(plan, &case.operands)).unwrap();
        graph.launch().unwrap();
        case.check(&gpu);
        // Without room for timing there are plans all the same.
        lt.tune(&shapes(), (arena.rest().0, 64)).unwrap();
        assert!(shapes().iter().all(|shape| lt.plan(shape).is_some()));
    });
}

#[test]
fn without_cublaslt_the_error_says_so() {
    let name = "without_cublaslt_the_error_says_so";
    on_libraries(name, &["libcuda.so.1"], || {
        let gpu = Gpu::open(0).unwrap();
        let options =
            LtOptions { workspace: DevicePtr::NULL, workspace_bytes: 0, candidates: 1, plan_folder: None };
        // A machine may have the real one in its system's folders.
        if let Err(error) = Lt::new(&gpu, options) {
            assert_eq!(error, CudaError::NoLibrary { library: "libcublasLt.so.13" });
        }
    });
}

#[test]
fn the_device_tells_its_figures() {
    on_emulated_driver("the_device_tells_its_figures", &[], || {
        let gpu = Gpu::open(0).unwrap();
        let telemetry = Telemetry::open(&gpu.facts().bus).unwrap();
        let first = telemetry.read();
        assert!(first.energy_joules.is_some() && first.power_watts.is_some(), "{first:?}");
        assert!(first.sm_clock_mhz.is_some() && first.memory_clock_mhz.is_some(), "{first:?}");
        assert!(first.memory_used.unwrap() <= first.memory_total.unwrap());
        assert_eq!(first.xid, None);
        let second = telemetry.read();
        assert!(second.energy_joules >= first.energy_joules);
        let microjoules = telemetry.energy_microjoules().unwrap();
        assert!(microjoules as f64 / 1e6 >= second.energy_joules.unwrap());
        assert!(Telemetry::open("no such bus").is_none());
    });
}

#[test]
fn without_nvml_there_are_no_figures() {
    without_driver("without_nvml_there_are_no_figures", || {
        if Gpu::probe().is_err() {
            assert!(Telemetry::open("0000:01:00.0").is_none());
        }
    });
}
