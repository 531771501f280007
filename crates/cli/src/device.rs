//! Which device computes, and whether the settings go with it.
//!
//! Owns the choice and its one line in the log. It looks at devices and opens none: that is for the engine's thread.

use std::ffi::OsString;
use std::path::PathBuf;

use mirai_cuda::{CudaOptions, Gpu, MemoryOptions, OpenError};

use crate::config::{Config, Device, KvCacheDtype, Quantization};
use crate::exit::Failure;

/// Share of a GPU's memory unless the configuration says otherwise: the rest is for what the driver and other
/// processes take later.
const DEFAULT_UTILIZATION: f64 = 0.9;

/// What will compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// The processor.
    Cpu,
    /// A GPU, by its number.
    Cuda(usize),
}

/// Settings that contradict each other, whatever the machine has.
pub(crate) fn check(config: &Config) -> Result<(), Failure> {
    let share = config.engine.gpu_memory_utilization;
    if let Some(share) = share
        && !(share > 0.0 && share <= 1.0)
    {
        return Err(Failure::usage(format!(
            "engine.gpu_memory_utilization is {share}, but must be above 0 and at most 1"
        )));
    }
    match config.model.device {
        Device::Auto => Ok(()),
        Device::Cpu => match gpu_setting(config).or(share.map(|_| "--gpu-memory-utilization")) {
            Some(setting) => Err(Failure::usage(format!("{setting} is for a GPU, but --device is cpu"))),
            None => Ok(()),
        },
        device @ Device::Cuda(_) => match cpu_setting(config) {
            Some(setting) => Err(Failure::usage(format!(
                "{setting} is for the CPU, but --device is {device} (there it is fp8)"
            ))),
            None => Ok(()),
        },
    }
}

/// The setting, if there is one, that only a GPU can follow.
fn gpu_setting(config: &Config) -> Option<&'static str> {
    if config.model.quantization == Some(Quantization::Fp8) {
        return Some("--quantization fp8");
    }
    (config.engine.kv_cache_dtype == KvCacheDtype::Fp8).then_some("--kv-cache-dtype fp8")
}

/// The setting, if there is one, that only the CPU follows.
fn cpu_setting(config: &Config) -> Option<&'static str> {
    match config.model.quantization {
        Some(Quantization::Q8_0) => Some("--quantization q8_0"),
        Some(Quantization::Q4K) => Some("--quantization q4_k"),
        Some(Quantization::Fp8) | None => None,
    }
}

/// Chooses, before anything is bound or loaded, and says so in one line.
pub(crate) fn choose(config: &Config) -> Result<Chosen, Failure> {
    decide(config, |ordinal| Gpu::look(ordinal).map(|facts| facts.name))
}

/// As [`choose`]; `look` says the name of a GPU, or why there is none.
fn decide(config: &Config, look: impl Fn(usize) -> Result<String, OpenError>) -> Result<Chosen, Failure> {
    match config.model.device {
        Device::Cpu => {
            tracing::info!("device: cpu");
            Ok(Chosen::Cpu)
        }
        device @ Device::Cuda(ordinal) => {
            let name = look(ordinal).map_err(|e| Failure::environment(format!("--device {device}: {e}")))?;
            tracing::info!("device: {device} ({name})");
            Ok(Chosen::Cuda(ordinal))
        }
        Device::Auto => match (look(0), cpu_setting(config), gpu_setting(config)) {
            (Ok(name), Some(setting), _) => {
                tracing::info!("device: cpu ({setting} is for it; there is also a GPU, {name})");
                Ok(Chosen::Cpu)
            }
            (Ok(name), None, _) => {
                tracing::info!("device: cuda:0 ({name})");
                Ok(Chosen::Cuda(0))
            }
            (Err(error), _, None) => {
                tracing::info!("device: cpu ({error})");
                Ok(Chosen::Cpu)
            }
            (Err(error), _, Some(setting)) => {
                Err(Failure::environment(format!("{setting} is for a GPU: {error}")))
            }
        },
    }
}

/// What the CUDA backend is told.
pub(crate) fn cuda_options(config: &Config) -> CudaOptions {
    let engine = &config.engine;
    CudaOptions {
        memory: MemoryOptions {
            utilization: engine.gpu_memory_utilization.unwrap_or(DEFAULT_UTILIZATION),
            cache: engine.kv_cache_memory_bytes,
        },
        batch_invariant: engine.batch_invariant,
        matmul_candidates: engine.matmul_candidates,
        plan_folder: engine.plan_folder.clone().or_else(|| cache_folder(|name| std::env::var_os(name))),
        ..CudaOptions::default()
    }
}

/// `mirai` in the user's cache folder, by the XDG rules: a relative path does not count.
fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    caches.map(|folder| folder.join("mirai"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NO_DRIVER: OpenError = OpenError::NoLibrary { library: "libcuda.so.1" };

    fn config(device: Device) -> Config {
        let mut config = Config::default();
        config.model.device = device;
        config
    }

    fn with_gpu(ordinal: usize) -> Result<String, OpenError> {
        if ordinal < 2 {
            Ok("a GPU".to_owned())
        } else {
            Err(OpenError::NoSuchDevice { ordinal, devices: 2 })
        }
    }

    #[test]
    fn auto_takes_the_gpu_where_there_is_one() {
        let auto = config(Device::Auto);
        assert_eq!(decide(&auto, with_gpu).unwrap(), Chosen::Cuda(0));
        assert_eq!(decide(&auto, |_| Err(NO_DRIVER)).unwrap(), Chosen::Cpu);
        assert_eq!(decide(&config(Device::Cpu), with_gpu).unwrap(), Chosen::Cpu);
        assert_eq!(decide(&config(Device::Cuda(1)), with_gpu).unwrap(), Chosen::Cuda(1));
    }

    #[test]
    fn a_gpu_that_was_asked_for_and_is_not_there_is_the_machines_fault() {
        let error = decide(&config(Device::Cuda(0)), |_| Err(NO_DRIVER)).unwrap_err();
        assert!(matches!(&error, Failure::Environment(_)), "{error:?}");
        assert!(error.to_string().contains("--device cuda:0: no CUDA driver: libcuda.so.1"), "{error}");
        let error = decide(&config(Device::Cuda(2)), with_gpu).unwrap_err().to_string();
        assert!(error.contains("no CUDA device 2: there are 2"), "{error}");
    }

    #[test]
    fn settings_of_one_device_do_not_go_with_the_other() {
        let mut fp8 = config(Device::Cpu);
        fp8.model.quantization = Some(Quantization::Fp8);
        let mut cache = config(Device::Cpu);
        cache.engine.kv_cache_dtype = KvCacheDtype::Fp8;
        let mut share = config(Device::Cpu);
        share.engine.gpu_memory_utilization = Some(0.5);
        let mut blocks = config(Device::Cuda(0));
        blocks.model.quantization = Some(Quantization::Q4K);
        let cases = [
            (&fp8, "--quantization fp8 is for a GPU"),
            (&cache, "--kv-cache-dtype fp8 is for a GPU"),
            (&share, "--gpu-memory-utilization is for a GPU"),
            (&blocks, "--quantization q4_k is for the CPU"),
        ];
        for (config, message) in cases {
            let error = check(config).unwrap_err();
            assert!(matches!(&error, Failure::Usage(_)), "{error:?}");
            assert!(error.to_string().contains(message), "{error}");
        }
        for device in [Device::Auto, Device::Cpu, Device::Cuda(0)] {
            check(&config(device)).unwrap();
        }
    }

    #[test]
    fn auto_follows_the_settings_or_says_why_not() {
        let mut auto = config(Device::Auto);
        auto.engine.kv_cache_dtype = KvCacheDtype::Fp8;
        check(&auto).unwrap();
        assert_eq!(decide(&auto, with_gpu).unwrap(), Chosen::Cuda(0));
        let error = decide(&auto, |_| Err(NO_DRIVER)).unwrap_err();
        assert!(matches!(&error, Failure::Environment(_)), "{error:?}");
        assert!(error.to_string().contains("--kv-cache-dtype fp8 is for a GPU: no CUDA driver"), "{error}");
        let mut blocks = config(Device::Auto);
        blocks.model.quantization = Some(Quantization::Q8_0);
        assert_eq!(decide(&blocks, with_gpu).unwrap(), Chosen::Cpu);
    }

    #[test]
    fn the_share_of_memory_is_a_share() {
        for (share, good) in [(0.5, true), (1.0, true), (0.0, false), (1.01, false), (f64::NAN, false)] {
            let mut config = config(Device::Auto);
            config.engine.gpu_memory_utilization = Some(share);
            assert_eq!(check(&config).is_ok(), good, "{share}");
            assert!(cuda_options(&config).memory.utilization.total_cmp(&share).is_eq());
        }
        let default = cuda_options(&config(Device::Auto)).memory;
        assert_eq!(default, MemoryOptions { utilization: 0.9, cache: None });
    }

    #[test]
    fn plans_are_kept_where_caches_are() {
        let with = |variables: &'static [(&str, &str)]| {
            cache_folder(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
        };
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[("HOME", "/h")]), Some("/h/.cache/mirai".into()));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]), Some("/c/mirai".into()));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "c")]), Some("/h/.cache/mirai".into()));
        let mut told = config(Device::Auto);
        told.engine.plan_folder = Some("plans".into());
        assert_eq!(cuda_options(&told).plan_folder, Some("plans".into()));
    }
}
