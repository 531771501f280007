//! The setting `device`: one word, in each layer.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Device {
    /// A GPU where there is one, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU, by its number among those that the process sees.
    Cuda(usize),
}

/// A word that names no device.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no device: auto, cpu, cuda or cuda:N")]
pub(crate) struct NoDevice(String);

impl FromStr for Device {
    type Err = NoDevice;

    fn from_str(text: &str) -> Result<Self, NoDevice> {
        let none = || NoDevice(text.to_owned());
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let number = text.strip_prefix("cuda:").ok_or_else(none)?;
                // `parse` alone would take a sign.
                let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
                digits.then(|| number.parse().ok()).flatten().map(Self::Cuda).ok_or_else(none)
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl TryFrom<String> for Device {
    type Error = NoDevice;

    fn try_from(text: String) -> Result<Self, NoDevice> {
        text.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn words_name_devices() {
        let devices = ["auto", "cpu", "cuda", "cuda:0", "cuda:13"].map(|t| t.parse::<Device>().unwrap());
        let cuda = Device::Cuda;
        assert_eq!(devices, [Device::Auto, Device::Cpu, cuda(0), cuda(0), cuda(13)]);
        for device in devices {
            assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
        }
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "CUDA", "cuda:99999999999999999999"]
        {
            let error = wrong.parse::<Device>().unwrap_err().to_string();
            assert!(error.contains("cuda:N"), "{error}");
        }
    }
}
