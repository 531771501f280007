//! `--simulate`: the server without a model (cargo feature `test-hooks`, never in a release).
//!
//! Owns the wiring of the simulated executor, so that the server alone can be measured and attacked.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mirai_engine::sim::{SimConfig, SimExecutor};
use mirai_engine::{Executor, Geometry, GroupKind};
use mirai_server::{GenerationDefaults, ServedModel, ServerHandle};
use mirai_text::Tokenizer;

use crate::config::Config;
use crate::device::Chosen;
use crate::exit::Failure;
use crate::{demo, device, load};

/// Flags that only this build has.
#[derive(clap::Args, Default, Clone)]
pub(crate) struct HookArgs {
    /// Simulated executor with the demo model's tokenizer.
    #[arg(long, help_heading = "Test hooks")]
    simulate: bool,
    /// Device time of one simulated step, in microseconds.
    #[arg(long, default_value_t = 0, help_heading = "Test hooks")]
    simulate_step_us: u64,
}

/// What stands in for loading.
pub(crate) fn loader(
    args: &HookArgs,
) -> impl FnOnce(&Config, &ServerHandle) -> Result<ServedModel, Failure> + Send + 'static {
    let args = args.clone();
    move |config, server| {
        if args.simulate {
            return simulated(config, Duration::from_micros(args.simulate_step_us));
        }
        load::load(config, device::choose(config)?, server)
    }
}

fn simulated(config: &Config, step_time: Duration) -> Result<ServedModel, Failure> {
    let demo = demo::model().ok_or_else(|| Failure::usage("--simulate needs the demo model's tokenizer"))?;
    let tokenizer = Tokenizer::from_json_bytes(demo.tokenizer).map_err(Failure::model)?;
    let context = 32_768;
    let slots = config.engine.max_num_seqs;
    let geometry = Geometry {
        groups: vec![GroupKind::Full],
        blocks: slots.saturating_mul(256).saturating_add(1),
        slots,
        snapshots: 0,
        max_step_tokens: load::step_tokens(config, Chosen::Cpu),
        max_context: context,
        vocab: tokenizer.vocab_size() as u32,
        generates: true,
        pools: false,
        whole_prompts: false,
    };
    let vocab = geometry.vocab;
    let make = move || -> Result<Box<dyn Executor>, mirai_engine::BoxError> {
        Ok(Box::new(SimExecutor::new(SimConfig { step_time, ..SimConfig::new(geometry) })))
    };
    let engine = load::engine_config(config, Chosen::Cpu);
    let (engine, events) = mirai_engine::start(engine, make).map_err(Failure::run)?;
    Ok(ServedModel {
        names: vec!["simulated".to_owned()],
        revision: String::new(),
        estimate: None,
        footprint: config.energy.footprint(),
        max_model_len: context,
        tokenizer,
        template: None,
        task: mirai_server::Task::default(),
        reasoning: None,
        eos_token_ids: Vec::new(),
        bos_token_id: None,
        generation_defaults: GenerationDefaults::default(),
        vocab,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        fim: None,
        engine,
        events,
    })
}
