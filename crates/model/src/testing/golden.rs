//! Golden files, and the ways of playing a case that must all give its numbers.
//!
//! Owns the files' format and the measure of a difference. Which difference passes is the tests' business.

use std::path::{Path, PathBuf};

use mirai_engine::Executor;
use serde_json::Value;

use super::driver::{Driver, Played, Script};
use crate::pooling::Task;

/// One prompt of a golden file.
#[derive(Clone, Debug)]
pub struct GoldenPrompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Log-probability of each token but the first; empty where the model does not generate.
    pub logprobs: Vec<f32>,
    /// What its pooling head gives; empty where it has none.
    pub vector: Vec<f32>,
}

/// What a golden case is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GoldenTask {
    /// Log-probabilities.
    Generate,
    /// Embeddings.
    Embed,
    /// Logits of a classifier, or of these tokens.
    Rerank(Vec<u32>),
}

/// One folder of golden files.
#[derive(Clone, Debug)]
pub struct GoldenCase {
    /// The folder.
    pub dir: PathBuf,
    /// What its prompts hold.
    pub task: GoldenTask,
    /// Its prompts.
    pub prompts: Vec<GoldenPrompt>,
}

fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().map_or(&[][..], Vec::as_slice);
    list.iter().map(|v| v.as_u64().expect("ids are numbers") as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    let list = value.as_array().map_or(&[][..], Vec::as_slice);
    list.iter().map(|v| v.as_f64().expect("values are numbers") as f32).collect()
}

/// Reads the prompts of a case.
///
/// # Panics
/// The file is not what `golden/make.py` writes.
#[must_use]
pub fn read_golden(case: &Path) -> Vec<GoldenPrompt> {
    GoldenCase::read(case).prompts
}

impl GoldenCase {
    /// Reads `golden.json` of a folder.
    ///
    /// # Panics
    /// The file is not what `golden/make.py` writes.
    #[must_use]
    pub fn read(dir: &Path) -> Self {
        let text = std::fs::read_to_string(dir.join("golden.json")).expect("a case has a golden.json");
        let json: Value = serde_json::from_str(&text).expect("make.py writes JSON");
        let task = match json["task"].as_str() {
            None => GoldenTask::Generate,
            Some("embed") => GoldenTask::Embed,
            Some("rerank") => GoldenTask::Rerank(ids(&json["tokens"])),
            Some(other) => panic!("{}: a task `{other}`", dir.display()),
        };
        let prompt = |p: &Value| GoldenPrompt {
            ids: ids(&p["ids"]),
            logprobs: floats(&p["logprobs"]),
            vector: floats(&p["vector"]),
        };
        let prompts = json["prompts"].as_array().expect("make.py writes prompts");
        Self { dir: dir.to_owned(), task, prompts: prompts.iter().map(prompt).collect() }
    }

    /// What the model must be loaded for.
    #[must_use]
    pub fn load_task(&self) -> Task {
        match &self.task {
            GoldenTask::Rerank(tokens) if tokens.len() == 2 => Task::Rerank { no: tokens[0], yes: tokens[1] },
            _ => Task::Native,
        }
    }

    /// Computes one prompt's numbers in chunks.
    #[must_use]
    pub fn script(&self, prompt: usize, chunk: usize) -> Script {
        let ids = &self.prompts[prompt].ids;
        if self.task == GoldenTask::Generate {
            Script::teacher_forced(ids, chunk)
        } else {
            Script::pooled(ids, chunk)
        }
    }

    /// Largest difference from one prompt's numbers: of log-probabilities, of logits, or of any element of an embedding
    /// of length 1. `skipped` tokens came from a prefix.
    #[must_use]
    pub fn difference(&self, prompt: usize, skipped: usize, played: &Played) -> f32 {
        let expected = &self.prompts[prompt];
        let pooled = || played.pooled.clone().unwrap_or_default();
        match self.task {
            GoldenTask::Generate => {
                largest_difference(&expected.logprobs[skipped..], &played.prompt_logprobs())
            }
            GoldenTask::Embed => largest_difference(&unit(&expected.vector), &unit(&pooled())),
            GoldenTask::Rerank(_) => largest_difference(&expected.vector, &pooled()),
        }
    }

    /// Least cosine between expected and computed embeddings, all prompts whole.
    ///
    /// # Panics
    /// As [`Driver::play`].
    pub fn least_cosine<E: Executor>(&self, driver: &mut Driver<E>) -> f64 {
        let scripts: Vec<_> = (0..self.prompts.len()).map(|p| self.script(p, usize::MAX)).collect();
        let played = driver.play(&scripts);
        let each = self.prompts.iter().zip(&played);
        each.map(|(g, p)| cosine(&g.vector, p.pooled.as_deref().unwrap_or_default())).fold(1.0, f64::min)
    }

    fn chunk<E: Executor>(driver: &Driver<E>, chunk: usize) -> usize {
        if driver.executor.geometry().whole_prompts { usize::MAX } else { chunk }
    }

    /// Plays all prompts side by side, each in chunks of its own size, and returns the largest difference.
    ///
    /// # Panics
    /// As [`Driver::play`].
    pub fn mixed<E: Executor>(&self, driver: &mut Driver<E>, chunks: &[usize]) -> f32 {
        let script = |(p, &chunk): (usize, &usize)| self.script(p, Self::chunk(driver, chunk));
        let scripts: Vec<_> = chunks.iter().enumerate().take(self.prompts.len()).map(script).collect();
        let played = driver.play(&scripts);
        played.iter().enumerate().map(|(p, played)| self.difference(p, 0, played)).fold(0.0, f32::max)
    }

    /// Plays each prompt behind each of its own prefixes of whole blocks, side by side. Without prefixes, as in models
    /// that need whole prompts, this is 0.
    ///
    /// # Panics
    /// As [`Driver::play`].
    pub fn after_prefixes<E: Executor>(&self, driver: &mut Driver<E>, chunk: usize) -> f32 {
        let mut worst = 0f32;
        if driver.executor.geometry().whole_prompts {
            return worst;
        }
        for (p, prompt) in self.prompts.iter().enumerate() {
            let prefixes = driver.prefixes(&prompt.ids);
            assert_eq!(prefixes.len(), (prompt.ids.len() - 1) / mirai_engine::BLOCK_TOKENS);
            let scripts: Vec<_> =
                prefixes.iter().map(|prefix| self.script(p, chunk).after(prefix.clone())).collect();
            for (prefix, played) in prefixes.iter().zip(driver.play(&scripts)) {
                worst = worst.max(self.difference(p, prefix.computed, &played));
            }
        }
        worst
    }

    /// Plays all prompts side by side, each preempted once this many of its tokens are computed.
    ///
    /// # Panics
    /// As [`Driver::play`].
    pub fn preempted<E: Executor>(&self, driver: &mut Driver<E>, chunk: usize, at: &[usize]) -> f32 {
        let chunk = Self::chunk(driver, chunk);
        let script = |(p, &at): (usize, &usize)| self.script(p, chunk).preempted_at(at);
        let scripts: Vec<_> = at.iter().enumerate().take(self.prompts.len()).map(script).collect();
        let played = driver.play(&scripts);
        played.iter().enumerate().map(|(p, played)| self.difference(p, 0, played)).fold(0.0, f32::max)
    }

    /// Draws `draw` tokens after each prompt, undisturbed and preempted on the way, and returns the largest difference
    /// of the log-probabilities of the drawn tokens; infinite where other tokens were drawn.
    ///
    /// # Panics
    /// As [`Driver::play`].
    pub fn drawn_after_preemption<E: Executor>(&self, driver: &mut Driver<E>, draw: usize) -> f32 {
        let scripts = self.prompts.iter().map(|p| Script::greedy(&p.ids, draw, 0));
        let scripts: Vec<_> = scripts.collect();
        let undisturbed = driver.play(&scripts);
        let preempted = scripts.into_iter().enumerate().map(|(p, script)| {
            let at = script.prompt.len() + p + 1;
            Script { chunk: 5, ..script }.preempted_at(at)
        });
        let preempted = driver.play(&preempted.collect::<Vec<_>>());
        let logprobs = |p: &Played| p.drawn.iter().map(|t| t.logprob).collect::<Vec<_>>();
        let each = undisturbed.iter().zip(&preempted).map(|(a, b)| {
            if a.tokens == b.tokens { largest_difference(&logprobs(a), &logprobs(b)) } else { f32::INFINITY }
        });
        each.fold(0.0, f32::max)
    }
}

fn unit(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    vector.iter().map(|v| v / length).collect()
}

/// Largest difference between expected and computed numbers; infinite where lengths differ or a value is not a
/// number.
#[must_use]
pub fn largest_difference(expected: &[f32], got: &[f32]) -> f32 {
    if expected.len() != got.len() {
        return f32::INFINITY;
    }
    let differences = expected.iter().zip(got).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |worst, d| if d.is_nan() { f32::INFINITY } else { worst.max(d) })
}

/// Cosine of the angle between two vectors; not a number where lengths differ.
#[must_use]
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
