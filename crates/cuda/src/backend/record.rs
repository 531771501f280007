//! Steps that are recorded before the first one, and replayed.
//!
//! Owns the graphs of each bucket: one up to the outputs' rows, one from there to drawn tokens, because grammars and
//! forbidden words may have to wait between the two. Never: what a step's lists hold, which is uploaded before.

use mirai_model::backend::{Batch, Result, StepShape};

use super::CudaBackend;
use crate::driver::Graph;
use crate::error::{device, driver};
use crate::sampling::Draws;
use crate::steps::write_draws;

/// Both halves of a recorded step.
pub(super) struct Recorded {
    rows: usize,
    forward: Graph,
    finish: Graph,
}

impl Recorded {
    /// Its rows, and the kernels in both halves.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.rows, self.forward.nodes() + self.finish.nodes())
    }
}

/// What the calls of operations are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    /// A step of the engine.
    #[default]
    Step,
    /// A step of padding before the first one, whose results nobody reads.
    Rehearsal,
}

type Half<'a> = &'a mut dyn FnMut(&mut CudaBackend) -> Result<()>;

impl CudaBackend {
    /// Runs a step of padding once, so that whatever is made at first use is there, then records it.
    pub(super) fn record_bucket(
        &mut self,
        shape: StepShape,
        forward: Half<'_>,
        finish: Half<'_>,
    ) -> Result<()> {
        self.mode = Mode::Rehearsal;
        let recorded = self.rehearse(shape.tokens, forward, finish);
        self.mode = Mode::Step;
        let recorded = recorded?;
        let (rows, nodes) = recorded.size();
        tracing::debug!(rows, nodes, "step recorded");
        self.recorded.push(recorded);
        Ok(())
    }

    fn rehearse(&mut self, rows: usize, forward: Half<'_>, finish: Half<'_>) -> Result<Recorded> {
        const NAME: &str = "record";
        let upload = self.device()?.upload;
        let idle = self.builder.idle(upload, rows);
        self.step = idle.ok_or_else(|| device(NAME, format!("{rows} rows are no bucket")))?;
        self.upload_idle()?;
        forward(self)?;
        finish(self)?;
        let gpu = self.gpu.clone();
        gpu.synchronize().map_err(driver(NAME))?;
        let forward = gpu.capture(|| forward(self))?;
        let finish = gpu.capture(|| finish(self))?;
        Ok(Recorded { rows, forward, finish })
    }

    fn upload_idle(&mut self) -> Result<()> {
        const NAME: &str = "record";
        let rings = self.rings.as_mut().ok_or_else(|| device(NAME, "no cache was allocated"))?;
        let piece = rings.step.fill().map_err(driver(NAME))?;
        self.builder.write(&mut self.step, &Batch::default(), &self.slots, piece)?;
        let (layout, outputs) = (self.step.layout(), self.step.outputs);
        write_draws(layout, outputs, &Draws::default(), 0, piece);
        rings.step.send(self.step.upload(), layout.lists.offset).map_err(driver(NAME))
    }

    fn graphs(&self) -> Option<&Recorded> {
        // Buckets are recorded in their order, or not at all.
        let index = self.step.bucket.filter(|_| self.mode == Mode::Step)?;
        self.recorded.get(index).filter(|r| r.rows == self.step.tokens)
    }

    /// Replays the first half of the step in progress, if it was recorded.
    pub(super) fn replay_forward(&self) -> Result<bool> {
        let Some(recorded) = self.graphs() else { return Ok(false) };
        recorded.forward.launch().map_err(driver("run")).map(|()| true)
    }

    /// Replays the second.
    pub(super) fn replay_finish(&self) -> Result<bool> {
        let Some(recorded) = self.graphs() else { return Ok(false) };
        recorded.finish.launch().map_err(driver("sample")).map(|()| true)
    }
}
