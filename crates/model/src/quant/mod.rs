//! Weights that files store in few bits: what `quantization_config` says of them, and how their tensors become one
//! [`HostTensor`](crate::backend::HostTensor) with scales.
//!
//! Owns the published formats and their packings. Every exotic order is undone here, once, at load: what leaves is
//! always row-major `[out, in]`. Which weights are quantized is told by the tensors that are there, not by the
//! configuration's lists of exceptions, so the two cannot contradict each other. How activations were to be quantized
//! means nothing to us: products are of wide activations.

mod assemble;
mod packed;
pub mod scaled;

pub use assemble::{Depth, RawTensor, RawTensors, assemble, names_of, widen};

use crate::config::Config;
use crate::error::Result;

/// How a checkpoint's weights are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantized {
    /// e4m3 with a scale for each tensor, row, or block of this many rows and columns.
    Fp8 {
        /// If given; else the scales' shape tells.
        block: Option<(usize, usize)>,
    },
    /// gpt-oss: e2m1 with a power of two for each 32 numbers of a row, experts only.
    Mxfp4,
    /// `compressed-tensors`' packed 4-bit numbers.
    Packed {
        /// Numbers of a row that share a scale; all of a row if none.
        group: Option<usize>,
    },
    /// GPTQ's 4-bit numbers, packed along the input.
    Gptq {
        /// Numbers of a row that share a scale; all of a row if none.
        group: Option<usize>,
        /// Zero points are stored less one (the older of the two forms).
        zeros_less_one: bool,
    },
    /// AWQ's 4-bit numbers, packed along the output in an order of its own.
    Awq {
        /// Numbers of a row that share a scale; all of a row if none.
        group: Option<usize>,
    },
}

impl Quantized {
    /// Name for logs and reports.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Fp8 { block: None } => "fp8",
            Self::Fp8 { block: Some(_) } => "fp8 blocks",
            Self::Mxfp4 => "mxfp4",
            Self::Packed { .. } => "packed int4",
            Self::Gptq { .. } => "gptq int4",
            Self::Awq { .. } => "awq int4",
        }
    }

    /// Reads `quantization_config`.
    ///
    /// # Errors
    /// A method or an option that is not supported, by its field.
    pub fn from_config(config: &Config<'_>) -> Result<Option<Self>> {
        let Some(q) = config.object("quantization_config")? else { return Ok(None) };
        let Some(method) = q.opt_text("quant_method")? else {
            return Err(q.error("quant_method", "is missing"));
        };
        match method {
            "fp8" => {
                let format = q.opt_text("fmt")?.unwrap_or("e4m3");
                if format != "e4m3" {
                    return Err(q.error("fmt", format!("`{format}` is not supported; supported: e4m3")));
                }
                Ok(Some(Self::Fp8 { block: pair(&q, "weight_block_size")? }))
            }
            "mxfp4" => Ok(Some(Self::Mxfp4)),
            "gptq" => {
                four_bits(&q, "bits")?;
                let form = q.opt_text("checkpoint_format")?.unwrap_or("gptq");
                let zeros_less_one = match form {
                    "gptq" => true,
                    "gptq_v2" => false,
                    other => {
                        let why = format!("`{other}` is not supported; supported: gptq, gptq_v2");
                        return Err(q.error("checkpoint_format", why));
                    }
                };
                Ok(Some(Self::Gptq { group: group(&q)?, zeros_less_one }))
            }
            "awq" => {
                four_bits(&q, "bits")?;
                let version = q.opt_text("version")?.unwrap_or("gemm");
                if !version.eq_ignore_ascii_case("gemm") {
                    return Err(q.error("version", format!("`{version}` is not supported; supported: gemm")));
                }
                Ok(Some(Self::Awq { group: group(&q)? }))
            }
            "compressed-tensors" => compressed(&q).map(Some),
            other => {
                let known = "fp8, mxfp4, gptq, awq, compressed-tensors";
                Err(q.error("quant_method", format!("`{other}` is not supported; supported: {known}")))
            }
        }
    }
}

fn four_bits(config: &Config<'_>, field: &str) -> Result<()> {
    match config.opt_whole(field)? {
        Some(4) | None => Ok(()),
        Some(n) => Err(config.error(field, format!("{n} is not supported, expected 4"))),
    }
}

/// `group_size`, where -1 means whole rows.
fn group(config: &Config<'_>) -> Result<Option<usize>> {
    if config.get("group_size").and_then(serde_json::Value::as_i64) == Some(-1) {
        return Ok(None);
    }
    config.opt_count("group_size", 1 << 20)
}

/// A list of two counts.
fn pair(config: &Config<'_>, field: &str) -> Result<Option<(usize, usize)>> {
    let Some(value) = config.get(field) else { return Ok(None) };
    let counts: Option<Vec<usize>> = value
        .as_array()
        .map(|list| list.iter().filter_map(|v| v.as_u64().filter(|n| (1..=1 << 20).contains(n))))
        .map(|counts| counts.map(|n| n as usize).collect());
    match counts.as_deref() {
        Some(&[rows, columns]) if value.as_array().is_some_and(|l| l.len() == 2) => Ok(Some((rows, columns))),
        _ => Err(config.error(field, "expected a list of two whole numbers above 0")),
    }
}

/// `compressed-tensors`: one group of settings for all linears.
fn compressed(config: &Config<'_>) -> Result<Quantized> {
    let format = config.opt_text("format")?.unwrap_or_default().to_owned();
    let groups = config.object("config_groups")?;
    let Some(groups) = groups else { return Err(config.error("config_groups", "is missing")) };
    let mut names = groups.names();
    let (Some(name), None) = (names.next(), names.next()) else {
        return Err(config.error("config_groups", "expected exactly one group of settings"));
    };
    let settings = groups.object(name)?;
    let Some(weights) = settings.as_ref().map(|s| s.object("weights")).transpose()?.flatten() else {
        return Err(groups.error(name, "has no `weights`"));
    };
    let (kind, bits) =
        (weights.opt_text("type")?.unwrap_or("int"), weights.opt_whole("num_bits")?.unwrap_or(8));
    let strategy = weights.opt_text("strategy")?.unwrap_or("tensor");
    match (kind, bits) {
        ("float", 8) => match strategy {
            "tensor" | "channel" => Ok(Quantized::Fp8 { block: None }),
            "block" => Ok(Quantized::Fp8 { block: pair(&weights, "block_structure")? }),
            other => {
                let why = format!("`{other}` is not supported; supported: tensor, channel, block");
                Err(weights.error("strategy", why))
            }
        },
        ("int", 4) if format == "pack-quantized" => {
            match strategy {
                "group" => Ok(Quantized::Packed { group: group(&weights)? }),
                "channel" => Ok(Quantized::Packed { group: None }),
                other => Err(weights
                    .error("strategy", format!("`{other}` is not supported; supported: group, channel"))),
            }
        }
        _ => {
            let what = format!("{bits}-bit {kind} weights in format `{}`", format.escape_default());
            let why =
                format!("{what} are not supported; supported: 8-bit float, 4-bit int in `pack-quantized`");
            Err(config.error("format", why))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(quantization: &Value) -> Result<Option<Quantized>> {
        let config = json!({"quantization_config": quantization});
        Quantized::from_config(&Config::new("config.json", config.as_object().unwrap()))
    }

    #[test]
    fn published_configurations_are_understood() {
        let table = [
            (json!(null), None),
            (json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}), Some(Quantized::Mxfp4)),
            (
                json!({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
                Some(Quantized::Fp8 { block: Some((128, 128)) }),
            ),
            (json!({"quant_method": "fp8"}), Some(Quantized::Fp8 { block: None })),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true, "desc_act": false}),
                Some(Quantized::Gptq { group: Some(128), zeros_less_one: true }),
            ),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"}),
                Some(Quantized::Gptq { group: None, zeros_less_one: false }),
            ),
            (
                json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": true}),
                Some(Quantized::Awq { group: Some(64) }),
            ),
            (
                json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups":
                    {"group_0": {"targets": ["Linear"], "weights":
                        {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}}}}),
                Some(Quantized::Fp8 { block: None }),
            ),
            (
                json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
                    {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}}),
                Some(Quantized::Packed { group: Some(32) }),
            ),
        ];
        for (config, expected) in table {
            assert_eq!(read(&config).unwrap(), expected, "{config}");
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let weights = |w: Value| {
            json!({"quant_method": "compressed-tensors", "format": "int-quantized",
                "config_groups": {"group_0": {"weights": w}}})
        };
        let table = [
            (json!({}), "quant_method"),
            (json!({"quant_method": "bitsandbytes"}), "fp8, mxfp4, gptq, awq, compressed-tensors"),
            (json!({"quant_method": "fp8", "fmt": "e5m2"}), "fmt"),
            (json!({"quant_method": "fp8", "weight_block_size": [128]}), "weight_block_size"),
            (json!({"quant_method": "fp8", "weight_block_size": [0, 1]}), "weight_block_size"),
            (json!({"quant_method": "gptq", "bits": 8}), "bits"),
            (json!({"quant_method": "gptq", "checkpoint_format": "marlin"}), "checkpoint_format"),
            (json!({"quant_method": "awq", "version": "gemv"}), "version"),
            (json!({"quant_method": "compressed-tensors"}), "config_groups"),
            (
                json!({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}),
                "exactly one",
            ),
            (json!({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}), "weights"),
            (weights(json!({"num_bits": 8, "type": "int"})), "8-bit int weights in format `int-quantized`"),
            (weights(json!({"num_bits": 8, "type": "float", "strategy": "token"})), "strategy"),
        ];
        for (config, words) in table {
            let error = read(&config).unwrap_err().to_string();
            assert!(
                error.contains("config.json: field `quantization_config.") && error.contains(words),
                "{error}"
            );
        }
    }
}
