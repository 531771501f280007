//! `cargo xtask kernels`: from `kernels/*.cu` to the fatbin that the binary embeds, without a GPU and without root.
//!
//! Owns the pinned toolkit, the list of architectures, the table of what each kernel uses, and the digest that ties the
//! committed fatbin to its sources. It knows no kernel by name. Everything it fetches stays under `target/`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::shell::{self, root};

/// All five parts are named: left out, some come in a newer version that does not fit.
const TOOLKIT: &str = "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.2";
/// Compiled for, in the notation of `nvcc`: (virtual architecture, real one, the `sm` that `fatbinary` wants).
const ARCHITECTURES: [(&str, &str, &str); 5] = [
    ("compute_80", "sm_80", "80"),
    ("compute_89", "sm_89", "89"),
    ("compute_90a", "sm_90a", "90a"),
    ("compute_100a", "sm_100a", "100a"),
    ("compute_120", "sm_120", "120"),
];
/// Kept as PTX too, for what comes later.
const PTX: &str = "compute_80";
const FLAGS: [&str; 5] = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas=-v"];
const FATBIN: &str = "kernels/mirai.fatbin";
const DIGEST: &str = "kernels/mirai.fatbin.digest";
const TABLE: &str = "kernels/resources.toml";

/// What one kernel uses on one architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    registers: u32,
    /// Bytes stored to local memory because registers ran out.
    spilled: u32,
    /// Bytes of static shared memory.
    shared: u32,
}

/// By architecture, then by kernel.
type Usages = BTreeMap<String, BTreeMap<String, Usage>>;
/// Bytes of each parameter, by kernel.
type Parameters = BTreeMap<String, Vec<u32>>;

/// What is to be done with the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Hold it to the committed table, and write fatbin and digest.
    Build,
    /// Write the table too.
    Update,
    /// Hold it to the committed table, and write nothing: for CI.
    Check,
}

/// Compiles everything for every architecture.
pub(crate) fn run(mode: Mode) -> Result<()> {
    let toolkit = toolkit()?;
    let digest_before = digest()?;
    let out = root().join("target/kernels");
    std::fs::create_dir_all(&out).context("target/kernels")?;
    let source = out.join("all.cu");
    std::fs::write(&source, one_unit(&sources()?)?).context("all.cu")?;
    let (usages, parameters) = compile(&toolkit, &source, &out)?;
    let table = render(&usages, &parameters)?;
    let path = root().join(TABLE);
    if mode == Mode::Update {
        std::fs::write(&path, &table).context(TABLE)?;
    } else {
        let committed = std::fs::read_to_string(&path).context(TABLE)?;
        compare(&committed, &table)?;
    }
    if mode != Mode::Check {
        ensure!(digest()? == digest_before, "the sources changed while they were compiled");
        let size = link(&toolkit, &out)?;
        std::fs::write(root().join(DIGEST), format!("{digest_before}\n")).context(DIGEST)?;
        println!("{FATBIN}: {size} bytes");
    }
    Ok(())
}

/// The sources in the order of their names: kernels, and what they include.
fn sources() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root().join("kernels")).context("kernels/")? {
        let path = entry.context("kernels/")?.path();
        if path.extension().is_some_and(|e| e == "cu" || e == "cuh") {
            found.push(path);
        }
    }
    found.sort();
    ensure!(!found.is_empty(), "no sources in kernels/");
    Ok(found)
}

/// Digest of everything that the fatbin depends on.
pub(crate) fn digest() -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(TOOLKIT);
    hash.update(format!("{ARCHITECTURES:?} {PTX} {FLAGS:?}"));
    for path in sources()? {
        let name = path.file_name().context("a source without a name")?;
        let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
        hash.update(name.as_encoded_bytes());
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(&text);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// One translation unit, so that one module holds every kernel. Each file has a namespace of its own; what they
/// share is included before.
fn one_unit(sources: &[PathBuf]) -> Result<String> {
    let mut text = String::from("// Made by `cargo xtask kernels`.\n");
    let is_header = |path: &&PathBuf| path.extension().is_some_and(|e| e == "cuh");
    for header in sources.iter().filter(is_header) {
        writeln!(text, "#include \"{}\"", header.display())?;
    }
    for kernel in sources.iter().filter(|path| !is_header(path)) {
        let name = kernel.file_stem().and_then(|s| s.to_str()).context("a source without a name")?;
        writeln!(text, "namespace {name}_file {{\n#include \"{}\"\n}}", kernel.display())?;
    }
    Ok(text)
}

// ---- toolkit ----

/// Folder of the toolkit's programs, fetched where it is missing.
fn toolkit() -> Result<PathBuf> {
    let venv = root().join("target/cuda-toolkit/venv");
    if find_programs(&venv).is_none() {
        let python = venv.join("bin/python");
        let text = venv.to_str().context("the workspace's path is not UTF-8")?;
        shell::run("python3", &["-m", "venv", text])?;
        let python = python.to_str().context("the workspace's path is not UTF-8")?;
        shell::run(python, &["-m", "pip", "install", "--quiet", "--disable-pip-version-check", TOOLKIT])?;
    }
    find_programs(&venv).with_context(|| format!("no nvcc in {} after the installation", venv.display()))
}

fn find_programs(venv: &Path) -> Option<PathBuf> {
    let lib = std::fs::read_dir(venv.join("lib")).ok()?;
    lib.filter_map(|entry| Some(entry.ok()?.path().join("site-packages/nvidia/cu13/bin")))
        .find(|bin| bin.join("nvcc").exists())
}

/// Runs to the end; returns what it printed on both streams.
fn run_quietly(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{command:?} ended with {}:\n{text}", output.status);
    }
    Ok(text)
}

/// Compiles for every architecture, two at a time, each by itself so that its report stays in one piece.
fn compile(toolkit: &Path, source: &Path, out: &Path) -> Result<(Usages, Parameters)> {
    let jobs = std::sync::Mutex::new(ARCHITECTURES.to_vec());
    let reports = std::sync::Mutex::new(Usages::new());
    let worker = || -> Result<()> {
        loop {
            let Some((from, real, _)) = jobs.lock().ok().and_then(|mut jobs| jobs.pop()) else {
                return Ok(());
            };
            let start = std::time::Instant::now();
            let mut command = Command::new(toolkit.join("nvcc"));
            command.args(FLAGS).arg("-cubin").arg(format!("-gencode=arch={from},code={real}"));
            command.arg(source).arg("-o").arg(out.join(format!("{real}.cubin")));
            let usage = parse_usage(&run_quietly(&mut command)?)?;
            println!("{real}: {} kernels, {:.0} s", usage.len(), start.elapsed().as_secs_f64());
            if let Ok(mut reports) = reports.lock() {
                reports.insert(real.to_owned(), usage);
            }
        }
    };
    std::thread::scope(|scope| {
        let second = scope.spawn(worker);
        let first = worker();
        first.and(second.join().unwrap_or_else(|_| bail!("a compiling thread panicked")))
    })?;
    let ptx = out.join("all.ptx");
    let mut command = Command::new(toolkit.join("nvcc"));
    command.args(&FLAGS[..4]).arg("-ptx").arg(format!("-arch={PTX}")).arg(source).arg("-o").arg(&ptx);
    run_quietly(&mut command)?;
    let text = std::fs::read_to_string(&ptx).context("all.ptx")?;
    let usages = reports.into_inner().unwrap_or_default();
    let parameters = parse_parameters(&text)?;
    for (architecture, kernels) in &usages {
        ensure!(
            kernels.keys().eq(parameters.keys()),
            "{architecture} has other kernels than the PTX: {:?} against {:?}",
            kernels.keys(),
            parameters.keys()
        );
    }
    Ok((usages, parameters))
}

/// Puts the images into one file; returns its size.
fn link(toolkit: &Path, out: &Path) -> Result<u64> {
    let fatbin = root().join(FATBIN);
    let mut command = Command::new(toolkit.join("fatbinary"));
    command.args(["-64", "--compress-all", "--compress-mode=size", "--create"]).arg(&fatbin);
    for (_, real, sm) in ARCHITECTURES {
        command
            .arg(format!("--image3=kind=elf,sm={sm},file={}", out.join(format!("{real}.cubin")).display()));
    }
    let ptx = PTX.trim_start_matches("compute_");
    command.arg(format!("--image3=kind=ptx,sm={ptx},file={}", out.join("all.ptx").display()));
    run_quietly(&mut command)?;
    Ok(std::fs::metadata(&fatbin).context(FATBIN)?.len())
}

// ---- reports ----

/// Number before a word, as in `16 bytes spill stores`.
fn number_before(line: &str, word: &str) -> Option<u32> {
    let before = &line[..line.find(word)?];
    before.split_whitespace().next_back()?.trim_matches(',').parse().ok()
}

/// Reads what `ptxas -v` says of each kernel.
fn parse_usage(report: &str) -> Result<BTreeMap<String, Usage>> {
    let mut kernels = BTreeMap::new();
    let mut name = None;
    let mut spilled = 0;
    for line in report.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            name = rest.split('\'').next().map(str::to_owned);
        } else if line.contains("spill stores") {
            spilled =
                number_before(line, " bytes spill stores").context("a report of spills without a number")?;
        } else if line.contains("Used ") && line.contains(" registers") {
            let kernel = name.take().with_context(|| format!("registers of no kernel: {line}"))?;
            let registers = number_before(line, " registers").context("a report without registers")?;
            let shared = number_before(line, " bytes smem").unwrap_or(0);
            kernels.insert(kernel, Usage { registers, spilled, shared });
        }
    }
    ensure!(!kernels.is_empty(), "ptxas reported no kernel");
    Ok(kernels)
}

/// Reads the sizes of parameters from PTX: `.entry name(`, then `.param` lines, then `)`.
fn parse_parameters(ptx: &str) -> Result<Parameters> {
    let mut kernels = Parameters::new();
    let mut current: Option<(String, Vec<u32>)> = None;
    for line in ptx.lines().map(str::trim) {
        if let Some(rest) = line.split(".entry ").nth(1) {
            let name = rest.trim_end_matches(['(', ')', ' ']).to_owned();
            current = Some((name, Vec::new()));
        } else if let Some((_, sizes)) = &mut current
            && line.starts_with(".param ")
        {
            sizes.push(parameter_bytes(line)?);
        }
        if line.starts_with(')') || line.ends_with("()") {
            kernels.extend(current.take());
        }
    }
    ensure!(!kernels.is_empty(), "no kernel in the PTX");
    Ok(kernels)
}

/// `.param .align 8 .b8 name[88],` or `.param .u64 .ptr .align 1 name,`.
fn parameter_bytes(line: &str) -> Result<u32> {
    if let Some(count) = line.split('[').nth(1).and_then(|rest| rest.split(']').next()) {
        return count.parse().with_context(|| line.to_owned());
    }
    let types = [("8", 1), ("16", 2), ("32", 4), ("64", 8)];
    let kind = line.split_whitespace().nth(1).context("a parameter without a type")?;
    let bits = kind.trim_start_matches(['.', 'b', 'u', 's', 'f']);
    types.iter().find(|(b, _)| *b == bits).map(|(_, n)| *n).with_context(|| format!("size of `{line}`"))
}

fn render(usages: &Usages, parameters: &Parameters) -> Result<String> {
    let mut text = String::from(
        "# What each kernel uses, as `ptxas` reports it; `cargo xtask kernels --update` writes it, and CI holds every\n\
         # build to it. parameters: bytes of each. Per architecture: [registers, bytes spilled, static shared memory].\n",
    );
    for (kernel, sizes) in parameters {
        writeln!(text, "\n[{kernel}]\nparameters = {sizes:?}")?;
        for (architecture, kernels) in usages {
            let u = kernels.get(kernel).copied().unwrap_or_default();
            writeln!(text, "{architecture} = [{}, {}, {}]", u.registers, u.spilled, u.shared)?;
        }
    }
    Ok(text)
}

/// Fails with the lines that differ.
fn compare(committed: &str, made: &str) -> Result<()> {
    if committed == made {
        return Ok(());
    }
    let name = |text: &str| -> Vec<String> {
        let mut kernel = String::new();
        let mut lines = Vec::new();
        for line in text.lines() {
            if line.starts_with('[') {
                line.clone_into(&mut kernel);
            }
            lines.push(format!("{kernel} {line}"));
        }
        lines
    };
    let (old, new) = (name(committed), name(made));
    let mut difference = String::new();
    for line in old.iter().filter(|l| !new.contains(l)) {
        writeln!(difference, "- {line}")?;
    }
    for line in new.iter().filter(|l| !old.contains(l)) {
        writeln!(difference, "+ {line}")?;
    }
    bail!(
        "kernels use other resources than {TABLE} says (`cargo xtask kernels --update` accepts it):\n{difference}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_fatbin_is_of_these_sources() {
        let committed = std::fs::read_to_string(root().join(DIGEST)).unwrap();
        assert_eq!(committed.trim(), digest().unwrap(), "run `cargo xtask kernels`");
        let fatbin = std::fs::read(root().join(FATBIN)).unwrap();
        assert_eq!(fatbin[..4], 0xba55_ed50_u32.to_le_bytes(), "{FATBIN} is no fatbin");
    }

    #[test]
    fn no_kernel_spills() {
        let table: toml::Table = std::fs::read_to_string(root().join(TABLE)).unwrap().parse().unwrap();
        assert!(table.len() > 20, "only {} kernels", table.len());
        for (kernel, uses) in &table {
            for (architecture, _, _) in ARCHITECTURES.map(|(_, real, sm)| (real, sm, ())) {
                let spilled = uses[architecture][1].as_integer().unwrap();
                assert_eq!(spilled, 0, "{kernel} on {architecture}");
            }
        }
    }

    #[test]
    fn reports_are_read() {
        let report = "ptxas info    : Compiling entry function 'norm' for 'sm_90a'\n\
                      ptxas info    : Function properties for norm\n\
                      \x20   16 bytes stack frame, 40 bytes spill stores, 72 bytes spill loads\n\
                      ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 128 bytes smem\n\
                      ptxas info    : Compiling entry function 'copy' for 'sm_90a'\n\
                      \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                      ptxas info    : Used 12 registers, used 0 barriers\n";
        let kernels = parse_usage(report).unwrap();
        assert_eq!(kernels["norm"], Usage { registers: 64, spilled: 40, shared: 128 });
        assert_eq!(kernels["copy"], Usage { registers: 12, spilled: 0, shared: 0 });
        assert!(parse_usage("nothing").is_err());
    }

    #[test]
    fn parameters_are_read() {
        let ptx = ".visible .entry norm(\n\t.param .align 8 .b8 norm_param_0[72],\n\t.param .u64 .ptr .align 1 norm_param_1,\n\
                   \t.param .u32 norm_param_2\n)\n.maxntid 512\n{\n.visible .entry none()\n{\n";
        let kernels = parse_parameters(ptx).unwrap();
        assert_eq!(kernels["norm"], [72, 8, 4]);
        assert!(kernels["none"].is_empty());
        assert!(parse_parameters("").is_err());
    }

    #[test]
    fn a_difference_names_its_kernel() {
        let table = |registers| format!("[a]\nsm_80 = [1, 0, 0]\n\n[b]\nsm_80 = [{registers}, 0, 0]\n");
        assert!(compare(&table(5), &table(5)).is_ok());
        let error = compare(&table(5), &table(6)).unwrap_err().to_string();
        assert!(
            error.contains("- [b] sm_80 = [5, 0, 0]") && error.contains("+ [b] sm_80 = [6, 0, 0]"),
            "{error}"
        );
        assert!(!error.contains("[a]"), "{error}");
    }

    #[test]
    fn the_unit_has_every_source() {
        let sources = sources().unwrap();
        let unit = one_unit(&sources).unwrap();
        for source in &sources {
            assert_eq!(unit.matches(&format!("\"{}\"", source.display())).count(), 1);
        }
        assert!(unit.find("tile.cuh\"").unwrap() < unit.find("norm.cu\"").unwrap());
    }
}
