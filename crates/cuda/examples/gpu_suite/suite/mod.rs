//! The parts of the suite, and what is common to them.
//!
//! Owns the options, the device's facts and the rates that floors are computed from. A row is a JSON object whose `row`
//! says what it is.

mod goldens;
mod matmuls;
mod play;
mod shapes;
mod steps;

use std::error::Error;
use std::path::PathBuf;

use mirai_cuda::{CudaBackend, CudaOptions, Gpu, MemoryOptions};
use mirai_model::floor::Ceilings;
use serde_json::{Value, json};

/// How the program is called.
pub(crate) const USAGE: &str = "\
usage: gpu_suite goldens --golden DIR [--case NAME]... [--expect oracle|file] [--list]
       gpu_suite matmuls [--ceilings FILE]
       gpu_suite steps --shape NAME [--ceilings FILE]
       gpu_suite steps --list
       gpu_suite bound --shape NAME --batch N --prompt TOKENS --answer TOKENS [--ceilings FILE]
each with --tiny for sizes that an emulated device can do";

pub(crate) type Failure = Box<dyn Error>;
/// Takes a result.
pub(crate) type Emit<'a> = dyn FnMut(Value) + 'a;

/// Rates of an H200 as others have measured them: where none were measured here.
const ASSUMED: Ceilings = Ceilings { bytes: 4.3e12, bf16: 790e12, e4m3: 1580e12 };
/// Above this share of a physical limit, the measurement is wrong and not the device fast.
pub(crate) const IMPOSSIBLE: f64 = 1.03;

/// Which part is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Goldens,
    Matmuls,
    Steps,
    Bound,
}

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) part: Part,
    /// Sizes for an emulated device.
    pub(crate) tiny: bool,
    /// Only name what there is.
    pub(crate) list: bool,
    /// Folder of golden cases.
    pub(crate) golden: PathBuf,
    /// Those of it that are run; all if none is named.
    pub(crate) cases: Vec<String>,
    /// Whether a case is held to the numbers in its file, or to the f64 oracle on the weights as rounded for the device.
    pub(crate) expect_file: bool,
    /// Model of `steps`.
    pub(crate) shape: String,
    /// Measured rates.
    pub(crate) ceilings: Option<PathBuf>,
    /// Of `bound`: sequences at once, tokens of each prompt and of each answer.
    pub(crate) load: [usize; 3],
}

impl Options {
    /// Reads the command line.
    pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut arguments = arguments;
        let part = match arguments.next().as_deref() {
            Some("goldens") => Part::Goldens,
            Some("matmuls") => Part::Matmuls,
            Some("steps") => Part::Steps,
            Some("bound") => Part::Bound,
            other => return Err(format!("no part `{}`", other.unwrap_or_default())),
        };
        let mut options = Self {
            part,
            tiny: false,
            list: false,
            golden: PathBuf::new(),
            cases: Vec::new(),
            expect_file: false,
            shape: String::new(),
            ceilings: None,
            load: [1; 3],
        };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--tiny" => options.tiny = true,
                "--list" => options.list = true,
                "--golden" => options.golden = value()?.into(),
                "--case" => options.cases.push(value()?),
                "--shape" => options.shape = value()?,
                "--ceilings" => options.ceilings = Some(value()?.into()),
                "--batch" => options.load[0] = count(&value()?)?,
                "--prompt" => options.load[1] = count(&value()?)?,
                "--answer" => options.load[2] = count(&value()?)?,
                "--expect" => {
                    options.expect_file = match value()?.as_str() {
                        "file" => true,
                        "oracle" => false,
                        other => return Err(format!("--expect {other}: expected `oracle` or `file`")),
                    }
                }
                other => return Err(format!("no option `{other}`")),
            }
        }
        Ok(options)
    }

    /// The rates that floors are computed from, and whether they were measured here.
    pub(crate) fn rates(&self) -> Result<(Ceilings, bool), Failure> {
        let Some(file) = &self.ceilings else { return Ok((ASSUMED, false)) };
        let json: Value = serde_json::from_slice(&std::fs::read(file)?)?;
        let rate = |name: &str| {
            let value = json["ceilings"][name].as_f64().filter(|rate| *rate > 0.0);
            value.ok_or_else(|| format!("{}: no rate `{name}`", file.display()))
        };
        Ok((Ceilings { bytes: rate("bytes")?, bf16: rate("bf16")?, e4m3: rate("e4m3")? }, true))
    }
}

/// Runs one part.
pub(crate) fn run(options: &Options, emit: &mut Emit<'_>) -> Result<(), Failure> {
    if !options.list && options.part != Part::Bound {
        emit(facts()?);
    }
    match options.part {
        Part::Goldens => goldens::run(options, emit),
        Part::Matmuls => matmuls::run(options, emit),
        Part::Steps => steps::run(options, emit),
        Part::Bound => steps::bound(options, emit),
    }
}

fn count(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..1 << 20).contains(n))
        .ok_or_else(|| format!("{text}: expected 1 to 1048575"))
}

fn facts() -> Result<Value, Failure> {
    let facts = Gpu::look(0)?;
    Ok(json!({
        "row": "facts", "device": facts.name, "capability": [facts.capability.0, facts.capability.1],
        "multiprocessors": facts.multiprocessors, "memory_bytes": facts.memory, "l2_bytes": facts.l2,
        "driver": facts.driver,
    }))
}

/// A backend that takes at most so many bytes of the device.
pub(crate) fn backend(most: u64, options: CudaOptions) -> Result<CudaBackend, Failure> {
    let gpu = Gpu::open(0)?;
    let share = (most as f64 / gpu.facts().memory as f64).min(0.95);
    let memory = MemoryOptions { utilization: share, cache: None };
    Ok(CudaBackend::new(gpu, CudaOptions { memory, ..options })?)
}

/// The middle, the tenth and the ninetieth percentile.
pub(crate) fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let last = sorted.len().saturating_sub(1) as f64;
        sorted.get((last * share).round() as usize).copied().unwrap_or(f64::NAN)
    };
    (at(0.5), at(0.1), at(0.9))
}
