//! `cargo xtask image`: container images by one command, with buildah; each with its bill of materials.
//!
//! The recipe is `charts/image/Containerfile`. This owns its arguments, the limit on size, and what is said of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::sbom;
use crate::shell::{self, root};

/// Largest image without CUDA's libraries, unpacked, in bytes.
const MAX_PLAIN: u64 = 100_000_000;
const RECIPE: &str = "charts/image/Containerfile";
/// Where a binary that is already built is taken from.
const PREBUILT: &str = "target/image/mirai";

/// A target of the recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Target {
    /// The server on Debian's C library.
    Mirai,
    /// With a shell.
    MiraiDebug,
    /// With cublasLt and NCCL.
    MiraiCuda,
    /// With these and a shell.
    MiraiCudaDebug,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Mirai => "mirai",
            Self::MiraiDebug => "mirai-debug",
            Self::MiraiCuda => "mirai-cuda",
            Self::MiraiCudaDebug => "mirai-cuda-debug",
        }
    }

    /// Repository and suffix of the tag: `mirai:1a2b3c4-debug`.
    fn tag(self, revision: &str) -> String {
        match self.name().strip_suffix("-debug") {
            Some(repository) => format!("{repository}:{revision}-debug"),
            None => format!("{}:{revision}", self.name()),
        }
    }

    fn cuda(self) -> bool {
        matches!(self, Self::MiraiCuda | Self::MiraiCudaDebug)
    }
}

/// What to build and from what.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which; none means `mirai`.
    targets: Vec<Target>,
    /// An image with the Rust toolchain on Debian, best by digest [default: the recipe's].
    #[arg(long)]
    builder: Option<String>,
    /// A release binary that is already built; the builder then needs no Rust.
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// Builds images into buildah's store, their bills of materials into `target/image`.
pub(crate) fn run(options: &Options) -> Result<()> {
    let revision = shell::output("git", &["rev-parse", "--short=12", "HEAD"])?;
    let targets = if options.targets.is_empty() { &[Target::Mirai][..] } else { &options.targets };
    place_binary(options.binary.as_deref())?;
    for &target in targets {
        build(target, revision.trim(), options.builder.as_deref())?;
    }
    Ok(())
}

fn place_binary(given: Option<&Path>) -> Result<()> {
    let place = root().join(PREBUILT);
    std::fs::create_dir_all(place.parent().context("the root has folders")?)?;
    match given {
        Some(file) => {
            std::fs::copy(file, &place).with_context(|| file.display().to_string())?;
        }
        // Left from another run, it would be taken instead of being built.
        None if place.exists() => std::fs::remove_file(&place)?,
        None => {}
    }
    Ok(())
}

fn build(target: Target, revision: &str, builder: Option<&str>) -> Result<()> {
    let tag = target.tag(revision);
    shell::run("buildah", &arguments(target, revision, builder))?;
    let container = shell::output("buildah", &["from", "--pull-never", &format!("localhost/{tag}")])?;
    let container = container.trim();
    let result = mounted(container, |image| describe(target, &tag, image));
    shell::output("buildah", &["rm", container])?;
    result
}

fn arguments(target: Target, revision: &str, builder: Option<&str>) -> Vec<String> {
    let mut words: Vec<String> =
        ["bud", "--isolation", "chroot", "--timestamp", "0", "--ignorefile", "charts/image/ignore"]
            .map(str::to_owned)
            .to_vec();
    words.extend(["--target".to_owned(), target.name().to_owned()]);
    let arguments = [
        ("VERSION", Some(env!("CARGO_PKG_VERSION"))),
        ("REVISION", Some(revision)),
        ("CUDA", Some(if target.cuda() { "yes" } else { "no" })),
        ("BUILDER", builder),
    ];
    for (name, value) in arguments {
        words.extend(value.into_iter().flat_map(|v| ["--build-arg".to_owned(), format!("{name}={v}")]));
    }
    words.extend(["-t".to_owned(), target.tag(revision), "-f".to_owned(), RECIPE.to_owned(), ".".to_owned()]);
    words
}

/// Calls with the folder under which a container's root is seen.
fn mounted(container: &str, call: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = shell::output("buildah", &["mount", container])?;
    let result = call(Path::new(folder.trim()));
    shell::output("buildah", &["umount", container])?;
    result
}

/// Size, digest of the binary, bill of materials.
fn describe(target: Target, tag: &str, image: &Path) -> Result<()> {
    let size = size_of(image)?;
    let binary = std::fs::read(image.join("usr/bin/mirai")).context("the image has no server")?;
    let digest: String = Sha256::digest(&binary).iter().map(|b| format!("{b:02x}")).collect();
    println!(
        "{tag}: {:.1} MB; binary {:.1} MB, sha256 {digest}",
        megabytes(size),
        megabytes(binary.len() as u64)
    );
    if target.cuda() {
        println!(
            "{tag}: of these {:.1} MB are CUDA's libraries",
            megabytes(size_of(&image.join("usr/lib/cuda"))?)
        );
    } else {
        ensure!(size < MAX_PLAIN, "{tag} has {size} bytes, but at most {MAX_PLAIN} are allowed");
    }
    let bill = root().join(format!("target/image/{}.cdx.json", target.name()));
    std::fs::write(&bill, serde_json::to_string_pretty(&sbom::document(Some(image))?)?)?;
    println!("{}", bill.display());
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Bytes of all plain files below a folder.
fn size_of(folder: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let kind = entry.file_type()?;
        total += if kind.is_dir() { size_of(&entry.path())? } else { 0 };
        total += if kind.is_file() { entry.metadata()?.len() } else { 0 };
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_has_every_target() {
        let recipe = std::fs::read_to_string(root().join(RECIPE)).unwrap();
        for target in [Target::Mirai, Target::MiraiDebug, Target::MiraiCuda, Target::MiraiCudaDebug] {
            assert!(recipe.lines().any(|l| l.ends_with(&format!(" AS {}", target.name()))), "{target:?}");
        }
        assert_eq!(Target::MiraiCudaDebug.tag("1a2b"), "mirai-cuda:1a2b-debug");
        assert_eq!(Target::Mirai.tag("1a2b"), "mirai:1a2b");
    }

    #[test]
    fn arguments_name_what_is_built_from_what() {
        let words = arguments(Target::MiraiCuda, "1a2b", Some("localhost/builder")).join(" ");
        assert!(words.contains("--target mirai-cuda --build-arg VERSION="), "{words}");
        assert!(
            words.contains("CUDA=yes --build-arg BUILDER=localhost/builder -t mirai-cuda:1a2b"),
            "{words}"
        );
        let words = arguments(Target::Mirai, "1a2b", None).join(" ");
        assert!(words.contains("CUDA=no -t mirai:1a2b") && !words.contains("BUILDER"), "{words}");
    }

    #[test]
    fn sizes_are_summed_over_folders() {
        let folder = std::env::temp_dir().join(format!("mirai-image-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("a/b")).unwrap();
        std::fs::write(folder.join("x"), [0; 10]).unwrap();
        std::fs::write(folder.join("a/b/y"), [0; 7]).unwrap();
        assert_eq!(size_of(&folder).unwrap(), 17);
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(size_of(&folder).is_err());
    }
}
