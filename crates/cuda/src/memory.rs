//! Device memory while a model is loaded: the arena, the budget that it was taken under, and copies to it.
//!
//! Owns all three together, so that what does not fit is told with the table. Never decides what memory is for.

use mirai_model::backend::{BackendError, Result};

use crate::budget::{Budget, BudgetError, CacheNeed};
use crate::driver::{Arena, DevicePtr, Gpu, Loader, Part};
use crate::error::driver;
use crate::options::CudaOptions;

/// The arena under its budget.
pub(crate) struct Memory {
    arena: Arena,
    budget: Budget,
    /// With what the workspace and the cache are going to take.
    planned: Option<Budget>,
    /// None once loading is over.
    loader: Option<Loader>,
}

fn over(error: &BudgetError) -> BackendError {
    BackendError::Device { operation: "allocate", message: error.to_string() }
}

impl Memory {
    /// Takes the arena.
    pub(crate) fn new(gpu: &Gpu, options: &CudaOptions) -> Result<Self> {
        let free = gpu.memory().map_err(driver("memory"))?;
        let budget = Budget::new(free, options.memory);
        let arena = Arena::new(gpu, budget.arena()).map_err(driver("arena"))?;
        let loader = Some(Loader::new(gpu).map_err(driver("load"))?);
        Ok(Self { arena, budget, planned: None, loader })
    }

    /// A region whose content is whatever was there.
    pub(crate) fn take(&mut self, part: Part, bytes: u64) -> Result<DevicePtr> {
        // What is no number of bytes is refused by the arena.
        self.budget.add(part, self.arena.taken(bytes).unwrap_or(0)).map_err(|e| over(&e))?;
        self.arena.take(part, bytes).map_err(driver("allocate"))
    }

    /// A region with these bytes.
    pub(crate) fn put(&mut self, part: Part, chunks: &[impl AsRef<[u8]>]) -> Result<DevicePtr> {
        let bytes: usize = chunks.iter().map(|chunk| chunk.as_ref().len()).sum();
        let at = self.take(part, bytes as u64)?;
        let mut to = at;
        for chunk in chunks {
            self.write(to, chunk.as_ref())?;
            to = to.add(chunk.as_ref().len() as u64);
        }
        Ok(at)
    }

    /// Copies to a region that was taken before.
    pub(crate) fn write(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<()> {
        let Some(loader) = &mut self.loader else {
            return Err(crate::error::device("load", "loading is over"));
        };
        loader.upload(to, bytes).map_err(driver("load"))
    }

    /// Bytes for a cache of this shape, once `fixed` bytes of workspace were taken.
    pub(crate) fn cache_room(&mut self, fixed: u64, need: CacheNeed) -> Result<u64> {
        // Asked of a copy: everything is added when it is taken.
        let mut budget = self.budget.clone();
        budget.add(Part::Workspace, fixed).map_err(|e| over(&e))?;
        let bytes = budget.cache(need).map_err(|e| over(&e))?;
        self.planned = Some(budget);
        Ok(bytes)
    }

    /// How memory is divided, as far as it is known.
    pub(crate) fn table(&self) -> String {
        self.planned.as_ref().unwrap_or(&self.budget).to_string()
    }

    /// Most bytes that a region takes beside its own.
    pub(crate) fn rounding(&self) -> u64 {
        self.arena.rounding()
    }

    /// Memory for scratch until the next region is taken.
    pub(crate) fn rest(&self) -> (DevicePtr, u64) {
        self.arena.rest()
    }

    /// Ends loading and says how memory was divided.
    pub(crate) fn finish(&mut self) -> String {
        (self.loader, self.planned) = (None, None);
        self.table()
    }
}
