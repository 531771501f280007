//! How the energy of requests becomes known, and what it means at the site.

use mirai_ledger::impact::{Footprint, ModelSize};
use serde::{Deserialize, Serialize};

/// Energy of requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct EnergyConfig {
    /// Where it comes from.
    pub(crate) method: EnergyMethod,
    /// Energy of the site for each unit of energy of its machines. Default: 1, the machines alone.
    pub(crate) pue: f64,
    /// kgCO2eq of a kWh of the site's electricity, as its supplier or the grid's operator publishes it. With it answers
    /// name their impacts.
    pub(crate) grid_kgco2eq_per_kwh: Option<f64>,
    /// For the estimate: parameters that a token meets, billions. Default: the loaded model's.
    pub(crate) active_parameters: Option<f64>,
    /// For the estimate: all parameters, billions. Default: the loaded model's.
    pub(crate) total_parameters: Option<f64>,
}

impl Default for EnergyConfig {
    fn default() -> Self {
        Self {
            method: EnergyMethod::default(),
            pue: 1.0,
            grid_kgco2eq_per_kwh: None,
            active_parameters: None,
            total_parameters: None,
        }
    }
}

/// Where the energy of requests comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EnergyMethod {
    /// The GPU's counter; the estimate where there is none.
    #[default]
    Auto,
    /// The GPU's counter, or nothing.
    Nvml,
    /// The published formula, whatever the machine could measure.
    Estimated,
    /// Nowhere: rows have no energy.
    None,
}

impl EnergyConfig {
    /// What cannot be, in words.
    pub(crate) fn check(&self) -> Result<(), String> {
        let bounds = [
            ("pue", Some(self.pue), 1.0, 10.0),
            ("grid_kgco2eq_per_kwh", self.grid_kgco2eq_per_kwh, 0.0, 10.0),
            ("active_parameters", self.active_parameters, 1e-6, 1e6),
            ("total_parameters", self.total_parameters, 1e-6, 1e6),
        ];
        for (name, value, least, most) in bounds {
            if let Some(value) = value
                && !(least..=most).contains(&value)
            {
                return Err(format!("energy.{name} is {value}, but must be from {least} to {most}"));
            }
        }
        Ok(())
    }

    /// Whether the GPU's counter is asked.
    pub(crate) fn measures(&self) -> bool {
        matches!(self.method, EnergyMethod::Auto | EnergyMethod::Nvml)
    }

    /// The model that the formula is asked about where nothing was measured; `parameters` are the loaded model's
    /// active ones and all.
    pub(crate) fn estimates(&self, parameters: (u64, u64)) -> Option<ModelSize> {
        matches!(self.method, EnergyMethod::Auto | EnergyMethod::Estimated).then(|| ModelSize {
            active_billions: self.active_parameters.unwrap_or(parameters.0 as f64 / 1e9),
            total_billions: self.total_parameters.unwrap_or(parameters.1 as f64 / 1e9),
        })
    }

    /// What energy means at the site, if answers are to say so.
    pub(crate) fn footprint(&self) -> Option<Footprint> {
        self.grid_kgco2eq_per_kwh.map(|kg_per_kwh| Footprint { pue: self.pue, kg_per_kwh })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(text: &str) -> EnergyConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn methods_say_who_is_asked() {
        for (method, measures, estimates) in
            [("auto", true, true), ("nvml", true, false), ("estimated", false, true), ("none", false, false)]
        {
            let config = read(&format!("method = \"{method}\""));
            assert_eq!((config.measures(), config.estimates((1, 2)).is_some()), (measures, estimates));
        }
        assert!(toml::from_str::<EnergyConfig>("method = \"guess\"").is_err());
        assert!(toml::from_str::<EnergyConfig>("puu = 1.2").is_err());
    }

    #[test]
    fn the_model_s_size_is_its_own_unless_told() {
        let own = EnergyConfig::default().estimates((5_100_000_000, 117_000_000_000)).unwrap();
        assert_eq!((own.active_billions, own.total_billions), (5.1, 117.0));
        let told = read("active_parameters = 3.5").estimates((1, 2_000_000_000)).unwrap();
        assert_eq!((told.active_billions, told.total_billions), (3.5, 2.0));
    }

    #[test]
    fn impossible_numbers_are_named() {
        assert_eq!(EnergyConfig::default().check(), Ok(()));
        let site = read("pue = 1.25\ngrid_kgco2eq_per_kwh = 0.04144");
        assert_eq!(site.check(), Ok(()));
        assert_eq!(site.footprint(), Some(Footprint { pue: 1.25, kg_per_kwh: 0.041_44 }));
        assert_eq!(EnergyConfig::default().footprint(), None);
        for (text, name) in [
            ("pue = 0.9", "energy.pue"),
            ("pue = nan", "energy.pue"),
            ("grid_kgco2eq_per_kwh = -1.0", "energy.grid_kgco2eq_per_kwh"),
            ("active_parameters = 0.0", "energy.active_parameters"),
            ("total_parameters = inf", "energy.total_parameters"),
        ] {
            let error = read(text).check().unwrap_err();
            assert!(error.contains(name), "{error}");
        }
    }
}
