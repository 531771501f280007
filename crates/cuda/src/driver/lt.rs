//! Products of many rows through cublasLt, by plans that are fixed at start.
//!
//! Owns the library's handle, the descriptions of products and their algorithms. An algorithm is chosen once for a
//! shape ([`Lt::tune`]) and kept in a file, so that a restart computes the same bits. Never allocates device memory:
//! the workspace is given to it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::error::Result;
use super::lt_file::{PlanFile, PlanKey};
use super::lt_product::{Library, Product};
use super::lt_shape::{LtOperands, LtOptions, LtShape};
use super::lt_tune::{tune, warm};
use super::memory::DevicePtr;
use super::stream::Gpu;

/// Time for timing. Shapes beyond it get the library's first choice.
const LIMIT: Duration = Duration::from_secs(60);

/// A plan that [`Lt`] has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LtPlan(usize);

/// cublasLt with its plans.
pub struct Lt {
    library: Library,
    options: LtOptions,
    plans: BTreeMap<LtShape, usize>,
    products: Vec<Product>,
}

impl Lt {
    /// Loads the library.
    ///
    /// # Errors
    /// [`CudaError::NoLibrary`](super::error::CudaError::NoLibrary); the library's.
    pub fn new(gpu: &Gpu, options: LtOptions) -> Result<Self> {
        Ok(Self { library: Library::open(gpu)?, options, plans: BTreeMap::new(), products: Vec::new() })
    }

    /// Makes the plans of all shapes: from the file if it fits, else timed on `scratch`, whose content is lost, and
    /// written to the file. Weights rotate through the scratch, so it should be larger than twice the second-level
    /// cache; a shape whose operands it cannot hold is not timed.
    ///
    /// # Errors
    /// A shape without an algorithm; the library's. A file that cannot be written is a warning.
    pub fn tune(&mut self, shapes: &[LtShape], scratch: (DevicePtr, u64)) -> Result<()> {
        let shapes: Vec<LtShape> = shapes.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let key = PlanKey::new(&self.library, &self.options, &shapes);
        let file = self.options.plan_folder.as_ref().map(|folder| folder.join(key.file_name()));
        let kept = file.as_deref().and_then(|file| PlanFile::read(file, &key, &shapes));
        if let Some(kept) = kept.filter(|kept| self.take(kept)) {
            tracing::info!(plans = kept.plans.len(), "matmul plans taken from their file");
            return self.warm(scratch);
        }
        let started = std::time::Instant::now();
        let mut made = PlanFile::new(key);
        let mut untimed = 0;
        for &shape in &shapes {
            let late = started.elapsed() > LIMIT;
            let most = if late { 1 } else { self.options.candidates };
            let (product, plan) = tune(&self.library, shape, &self.options, scratch, most)?;
            untimed += usize::from(plan.microseconds == 0.0);
            self.insert(product);
            made.plans.push(plan);
        }
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(plans = shapes.len(), untimed, seconds, "matmul plans made");
        if let Some(file) = file
            && let Err(error) = made.write(&file)
        {
            let file = file.display();
            tracing::warn!(%file, %error, "matmul plans not kept: the next start may choose others");
        }
        self.warm(scratch)
    }

    /// Runs each algorithm once, on the smallest shape that has it: the first run loads its code, which must not happen
    /// while it is recorded.
    fn warm(&self, scratch: (DevicePtr, u64)) -> Result<()> {
        let mut smallest = BTreeMap::new();
        for product in &self.products {
            let best = smallest.entry(product.code()).or_insert(product);
            if product.shape().work() < best.shape().work() {
                *best = product;
            }
        }
        for product in smallest.into_values() {
            warm(&self.library, product, &self.options, scratch)?;
        }
        self.library.gpu().synchronize()
    }

    /// Takes the plans of a file; whether the library accepts all of them.
    fn take(&mut self, kept: &PlanFile) -> bool {
        let products = kept.plans.iter().map(|plan| {
            Product::new(&self.library, plan.shape, Some((plan.algorithm, plan.workspace)), &self.options)
        });
        let Ok(products) = products.collect::<Result<Vec<_>>>() else {
            tracing::info!("matmul plans are made anew: the library refuses one of those that were kept");
            return false;
        };
        for product in products {
            self.insert(product);
        }
        true
    }

    fn insert(&mut self, product: Product) {
        self.plans.insert(product.shape(), self.products.len());
        self.products.push(product);
    }

    /// The plan of a shape that was among those of [`Self::tune`].
    pub fn plan(&self, shape: &LtShape) -> Option<LtPlan> {
        self.plans.get(shape).copied().map(LtPlan)
    }

    /// Computes a product behind all that was issued. May be captured.
    ///
    /// # Errors
    /// The library's.
    pub fn run(&self, plan: LtPlan, operands: &LtOperands) -> Result<()> {
        let workspace = (self.options.workspace, self.options.workspace_bytes);
        self.products[plan.0].run(&self.library, operands, workspace)
    }
}
