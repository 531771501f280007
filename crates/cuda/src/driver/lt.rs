//! Products of many rows through cublasLt, by plans that are fixed at start.
//!
//! Owns the library's handle, the descriptions of products and their algorithms. An algorithm is chosen once for a
//! shape ([`Lt::tune`]) and kept in a file, so that a restart computes the same bits. Never allocates device memory:
//! the workspace is given to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::error::Result;
use super::lt_file::{PlanFile, PlanKey};
use super::lt_product::{Library, Product};
use super::lt_tune::{tune, warm};
use super::memory::DevicePtr;
use super::stream::Gpu;

/// Time for timing. Shapes beyond it get the library's first choice.
const LIMIT: Duration = Duration::from_secs(60);

/// What operands are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LtStorage {
    /// Both bf16.
    Bf16,
    /// Both e4m3 with one f32 scale each.
    E4m3Tensor,
    /// Both e4m3 with an f32 scale for each row of x and each output. Compute capability 9.0 and above.
    E4m3Row,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LtOutput {
    /// bf16.
    Bf16,
    /// f32, for logits.
    F32,
}

/// A product `y[rows, outputs] = x[rows, inner] * w[outputs, inner]^T + bias`, all contiguous. A plan belongs to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct LtShape {
    /// Rows of a bucket: exactly as many are computed.
    pub rows: u32,
    /// Rows of the weight, a multiple of 8.
    pub outputs: u32,
    /// Columns of both, a multiple of 8, of 16 in e4m3.
    pub inner: u32,
    /// Storage of x and of the weight.
    pub storage: LtStorage,
    /// Storage of y.
    pub output: LtOutput,
    /// Whether a bias is added.
    pub bias: bool,
}

/// Addresses of a product's operands, each on 16 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct LtOperands {
    /// `[rows, inner]`.
    pub x: DevicePtr,
    /// f32 scales of x, for e4m3.
    pub x_scales: DevicePtr,
    /// `[outputs, inner]`.
    pub weight: DevicePtr,
    /// f32 scales of the weight, for e4m3.
    pub weight_scales: DevicePtr,
    /// `[outputs]` bf16, if the shape has a bias.
    pub bias: DevicePtr,
    /// `[rows, outputs]`, written.
    pub y: DevicePtr,
}

/// A plan that [`Lt`] has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LtPlan(usize);

/// How plans are made and kept.
#[derive(Clone, Debug)]
pub struct LtOptions {
    /// Scratch of the products, from the arena.
    pub workspace: DevicePtr,
    /// Its bytes.
    pub workspace_bytes: u64,
    /// Algorithms that are timed for each shape; 1 takes the library's own first.
    pub candidates: usize,
    /// Folder in which plans are kept, a file for each list of shapes; without it they are made at each start.
    pub plan_folder: Option<PathBuf>,
}

impl LtShape {
    /// Products of numbers.
    fn work(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.outputs) * u64::from(self.inner)
    }
}

impl fmt::Display for LtShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, outputs, inner, storage, output, bias } = self;
        let bias = if *bias { " with bias" } else { "" };
        write!(f, "{rows} x {outputs} x {inner} {storage:?} to {output:?}{bias}")
    }
}

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
