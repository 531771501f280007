//! What a request's energy means outside of the device: at the meter of the site, and in the air.
//!
//! Owns the estimate for requests whose energy was not measured, by the methodology that EcoLogits publishes
//! (<https://ecologits.ai>, "LLM inference"; constants of its version 0.11). Pure: no clock, no files, no rows.
//! [`Footprint`] makes kWh and kgCO2eq of energy, measured or estimated.
//!
//! The method knows a reference server (8 GPUs of 80 GB, 1.2 kW beside them, weights of 16 bits, 64 requests at a
//! time), a regression of a GPU's energy for an output token over the active parameters, and the making of that
//! server spread over three years. It says nothing of this machine: an estimate stands beside a measurement by its
//! name, `estimated`, and is several times as large for a model whose weights are smaller than 16 bits.

pub use crate::export::Footprint;

/// Microjoules of a kilowatt hour.
const MICROJOULES_PER_KWH: f64 = 3.6e12;

/// Requests at a time.
const BATCH: f64 = 64.0;
/// GPU energy of an output token: `A exp(B batch) active + C`, Wh; parameters in billions.
const GPU_ENERGY: [f64; 3] =
    [1.166_527_317_045_191_4e-6, -0.011_205_921_025_579_175, 4.052_928_146_734_005e-5];
/// Seconds of an output token: `A active + B batch + C`.
const LATENCY: [f64; 3] = [6.785_088_094_353_663e-4, 3.119_310_311_688_259e-4, 0.019_473_717_579_473_387];
/// Memory of a model relative to its weights, bytes of a weight, and memory of a GPU in GB.
const MEMORY: [f64; 3] = [1.2, 2.0, 80.0];
/// GPUs of a server, and its power beside them, kW.
const SERVER: (f64, f64) = (8.0, 1.2);
/// Making a server without GPUs, and a GPU, kgCO2eq.
const EMBODIED: (f64, f64) = (5700.0, 273.0);
/// Three years, seconds.
const LIFESPAN: f64 = 3.0 * 365.0 * 24.0 * 3600.0;

/// How large a model is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelSize {
    /// Parameters that a token meets, billions.
    pub active_billions: f64,
    /// All parameters, billions.
    pub total_billions: f64,
}

/// An estimate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Energy of the machines, kWh: the site's overhead left out, as in a measurement.
    pub machine_kwh: f64,
    /// Share of making the hardware, kgCO2eq.
    pub embodied_kgco2eq: f64,
}

impl ModelSize {
    /// GPUs that hold the weights: a power of two.
    fn gpus(&self) -> f64 {
        let [overhead, bytes, gpu] = MEMORY;
        let needed = (overhead * self.total_billions * bytes / gpu).ceil().max(1.0);
        needed.log2().ceil().exp2()
    }

    /// What an answer of `output_tokens` takes that came after `latency` seconds; the published latency is an upper
    /// bound of that.
    #[must_use]
    pub fn estimate(&self, output_tokens: u64, latency: f64) -> Estimate {
        let tokens = output_tokens as f64;
        let [slope, batch, rest] = GPU_ENERGY;
        let gpu_kwh = tokens * (slope * (batch * BATCH).exp() * self.active_billions + rest) / 1e3;
        let [slope, batch, rest] = LATENCY;
        let published = tokens * (slope * self.active_billions + batch * BATCH + rest);
        let seconds = latency.max(0.0).min(published);
        let gpus = self.gpus();
        let (server_gpus, server_kw) = SERVER;
        let server_kwh = seconds / 3600.0 * server_kw * gpus / server_gpus / BATCH;
        let (server, gpu) = EMBODIED;
        Estimate {
            machine_kwh: server_kwh + gpus * gpu_kwh,
            embodied_kgco2eq: seconds / (LIFESPAN * BATCH) * (gpus / server_gpus * server + gpus * gpu),
        }
    }
}

impl Estimate {
    /// Energy of the machines as a row has it.
    #[must_use]
    pub fn microjoules(&self) -> u64 {
        (self.machine_kwh * MICROJOULES_PER_KWH).round() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRANCE: Footprint = Footprint { pue: 1.2, kg_per_kwh: 0.041_44 };

    fn size(active_billions: f64, total_billions: f64) -> ModelSize {
        ModelSize { active_billions, total_billions }
    }

    /// Computed by EcoLogits 0.11.3 with PUE 1.2, WUE 1.8, zone FRA.
    #[test]
    fn estimates_are_those_of_the_published_method() {
        for (active, total, tokens, latency, kwh, kgco2eq) in [
            (5.1, 117.0, 400, 2.9, 9.245_442_119_951_573e-5, 5.719_332_047_841_264e-6),
            (24.0, 24.0, 400, 8.0, 3.226_370_308_340_892e-5, 2.639_091_189_109_799e-6),
            (4.0, 26.0, 100, 1.0, 5.918_082_441_876_042e-6, 4.080_057_530_580_098_6e-7),
        ] {
            let estimate = size(active, total).estimate(tokens, latency);
            let at_site = estimate.machine_kwh * FRANCE.pue;
            let in_air = at_site * FRANCE.kg_per_kwh + estimate.embodied_kgco2eq;
            let off = [at_site / kwh - 1.0, in_air / kgco2eq - 1.0];
            assert!(off.iter().all(|off| off.abs() < 1e-9), "{active} of {total}: {off:?}");
            // Whole microjoules lose nothing that anybody could see.
            let (rounded, _) = FRANCE.impacts(estimate.microjoules());
            assert!((rounded / kwh - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn latency_is_bounded_and_gpus_are_powers_of_two() {
        let model = size(24.0, 24.0);
        let (slow, slower) = (model.estimate(10, 1e6), model.estimate(10, 1e9));
        assert_eq!(slow, slower);
        assert!(model.estimate(10, 0.1).machine_kwh < slow.machine_kwh);
        assert_eq!(model.estimate(0, 5.0), Estimate { machine_kwh: 0.0, embodied_kgco2eq: 0.0 });
        let gpus = [0.001, 33.3, 33.4, 66.7, 100.1, 600.0].map(|total| size(1.0, total).gpus());
        assert_eq!(gpus, [1.0, 1.0, 2.0, 4.0, 4.0, 32.0]);
    }
}
