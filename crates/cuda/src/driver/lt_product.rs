//! One product of cublasLt: its description and its algorithm.
//!
//! Owns the library's objects. cublasLt counts columns first, so `y[rows, outputs] = x w^T` in rows is
//! `y^T = w x^T` to it: A is the weight, transposed, B is x, and C and D are y, all with their row length as leading
//! dimension.

use std::ffi::{CStr, c_void};

use cudarc::cublaslt::sys::{
    self as lt, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulPreferenceAttributes_t as Preference, cudaDataType_t as Type,
};

use super::error::{CudaError, Result};
use super::lt_shape::{LtOperands, LtOptions, LtOutput, LtShape, LtStorage};
use super::memory::DevicePtr;
use super::stream::Gpu;

/// The library's file, as people look for it.
const LIBRARY: &str = "libcublasLt.so.13";
/// Every function of it that is called: the bindings panic where one is missing.
const SYMBOLS: [&str; 15] = [
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtGetVersion",
    "cublasLtGetStatusName",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoCheck",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];
/// Bytes that all operands start on a multiple of.
const ALIGNMENT: u32 = 16;
/// `CUBLAS_OP_N` and `CUBLAS_OP_T`.
const PLAIN: u32 = 0;
const TRANSPOSED: u32 = 1;
/// Split sums are added in f32 in a buffer of their own (`CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`): always in the same
/// order, and not rounded to bf16 between.
const REDUCTIONS: u32 = 2;

/// An algorithm as the library keeps it; only to be given back to the same version of it.
pub(super) type Algorithm = [u64; 8];

/// The library's handle.
pub(super) struct Library {
    gpu: Gpu,
    handle: lt::cublasLtHandle_t,
}

impl Library {
    pub(super) fn open(gpu: &Gpu) -> Result<Self> {
        // SAFETY: runs the library's initialisers, which is what loading it means.
        if !unsafe { lt::is_culib_present() } {
            return Err(CudaError::NoLibrary { library: LIBRARY });
        }
        // SAFETY: the library is there, so it does not panic.
        let found = unsafe { lt::culib() };
        for symbol in SYMBOLS {
            // SAFETY: the symbol is looked up, not called.
            if unsafe { found.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err() {
                return Err(CudaError::NoSymbol { library: LIBRARY, symbol });
            }
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for one handle; a context is current.
        checked(unsafe { lt::cublasLtCreate(&raw mut handle) }, "create", &"a handle")?;
        Ok(Self { gpu: gpu.clone(), handle })
    }

    /// Its version, e.g. 130001.
    pub(super) fn version(&self) -> u64 {
        // SAFETY: takes nothing.
        unsafe { lt::cublasLtGetVersion() as u64 }
    }

    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made in `open`, destroyed once.
        unsafe { lt::cublasLtDestroy(self.handle) };
    }
}

fn checked(status: lt::cublasStatus_t, operation: &'static str, about: &dyn std::fmt::Display) -> Result<()> {
    if status == lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // SAFETY: takes a status; the string is static in the library.
    let name = unsafe { lt::cublasLtGetStatusName(status) };
    let name = if name.is_null() {
        "unknown".to_owned()
    } else {
        // SAFETY: a string that ends in zero.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    };
    Err(CudaError::Lt { operation, shape: about.to_string(), status: status as u32, name })
}

/// A description of a matrix.
struct Layout(lt::cublasLtMatrixLayout_t);

impl Layout {
    /// `rows` vectors of `width` elements, one behind the other.
    fn new(element: Type, rows: u32, width: u32, shape: &LtShape) -> Result<Self> {
        let mut layout = std::ptr::null_mut();
        // SAFETY: a place for one layout.
        let status = unsafe {
            lt::cublasLtMatrixLayoutCreate(&raw mut layout, element, width.into(), rows.into(), width.into())
        };
        checked(status, "describe a matrix", shape).map(|()| Self(layout))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe { lt::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// A description of a product.
struct Description(lt::cublasLtMatmulDesc_t);

impl Description {
    fn new(shape: &LtShape) -> Result<Self> {
        let mut description = std::ptr::null_mut();
        let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: a place for one description.
        let status = unsafe { lt::cublasLtMatmulDescCreate(&raw mut description, compute, Type::CUDA_R_32F) };
        checked(status, "describe a product", shape)?;
        let description = Self(description);
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED, shape)?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, PLAIN, shape)?;
        if shape.bias {
            let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue, shape)?;
            let element = Type::CUDA_R_16BF as u32;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, element, shape)?;
        }
        if shape.storage == LtStorage::E4m3Row {
            let mode = lt::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as u32;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode, shape)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode, shape)?;
        }
        // Some algorithms depend on where pointers are, so that there must be some before one is asked for.
        description.point(shape, &LtOperands::default())?;
        Ok(description)
    }

    fn set<T: Copy>(&self, attribute: Attribute, value: T, shape: &LtShape) -> Result<()> {
        // SAFETY: the library copies as many bytes as the value has; it checks that number.
        let status = unsafe {
            lt::cublasLtMatmulDescSetAttribute(
                self.0,
                attribute,
                std::ptr::from_ref(&value).cast::<c_void>(),
                size_of::<T>(),
            )
        };
        checked(status, "describe a product", shape)
    }

    /// Addresses that belong to the description. The library copies them when a product is issued.
    fn point(&self, shape: &LtShape, operands: &LtOperands) -> Result<()> {
        if shape.bias {
            self.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, operands.bias.address(), shape)?;
        }
        if shape.storage != LtStorage::Bf16 {
            let weight = operands.weight_scales.address();
            self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, weight, shape)?;
            self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, operands.x_scales.address(), shape)?;
        }
        Ok(())
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe { lt::cublasLtMatmulDescDestroy(self.0) };
    }
}

/// What an algorithm is wanted for.
struct Wish(lt::cublasLtMatmulPreference_t);

impl Wish {
    fn new(shape: &LtShape, workspace: u64) -> Result<Self> {
        let mut preference = std::ptr::null_mut();
        // SAFETY: a place for one preference.
        let status = unsafe { lt::cublasLtMatmulPreferenceCreate(&raw mut preference) };
        checked(status, "describe a wish", shape)?;
        let wish = Self(preference);
        wish.set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace, shape)?;
        wish.set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, REDUCTIONS, shape)?;
        for operand in [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            wish.set(operand, ALIGNMENT, shape)?;
        }
        Ok(wish)
    }

    fn set<T: Copy>(&self, attribute: Preference, value: T, shape: &LtShape) -> Result<()> {
        // SAFETY: as in `Description::set`.
        let status = unsafe {
            lt::cublasLtMatmulPreferenceSetAttribute(
                self.0,
                attribute,
                std::ptr::from_ref(&value).cast::<c_void>(),
                size_of::<T>(),
            )
        };
        checked(status, "describe a wish", shape)
    }
}

impl Drop for Wish {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe { lt::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

/// A product with its algorithm.
pub(super) struct Product {
    shape: LtShape,
    description: Description,
    weight: Layout,
    x: Layout,
    y: Layout,
    algorithm: lt::cublasLtMatmulAlgo_t,
    workspace: usize,
}

impl Product {
    /// With a given algorithm and its bytes of workspace, or with the library's first.
    pub(super) fn new(
        library: &Library,
        shape: LtShape,
        chosen: Option<(Algorithm, usize)>,
        options: &LtOptions,
    ) -> Result<Self> {
        let operand = match shape.storage {
            LtStorage::Bf16 => Type::CUDA_R_16BF,
            LtStorage::E4m3Tensor | LtStorage::E4m3Row => Type::CUDA_R_8F_E4M3,
        };
        let result = match shape.output {
            LtOutput::Bf16 => Type::CUDA_R_16BF,
            LtOutput::F32 => Type::CUDA_R_32F,
        };
        let mut product = Self {
            shape,
            description: Description::new(&shape)?,
            weight: Layout::new(operand, shape.outputs, shape.inner, &shape)?,
            x: Layout::new(operand, shape.rows, shape.inner, &shape)?,
            y: Layout::new(result, shape.rows, shape.outputs, &shape)?,
            algorithm: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace: 0,
        };
        match chosen {
            Some(chosen) => product.accept(library, chosen, options)?,
            None => {
                let first = product.candidates(library, 1, options.workspace_bytes)?;
                let none = CudaError::NoAlgorithm {
                    shape: shape.to_string(),
                    workspace: options.workspace_bytes as usize,
                };
                let (algorithm, workspace) = first.first().copied().ok_or(none)?;
                product.choose(algorithm, workspace);
            }
        }
        Ok(product)
    }

    pub(super) const fn shape(&self) -> LtShape {
        self.shape
    }

    /// What its code depends on, as far as one can see.
    pub(super) const fn code(&self) -> (Algorithm, LtStorage, LtOutput, bool) {
        (self.algorithm.data, self.shape.storage, self.shape.output, self.shape.bias)
    }

    pub(super) const fn choose(&mut self, algorithm: Algorithm, workspace: usize) {
        self.algorithm.data = algorithm;
        self.workspace = workspace;
    }

    /// Takes an algorithm if the library can run it in the workspace that there is.
    fn accept(&mut self, library: &Library, chosen: (Algorithm, usize), options: &LtOptions) -> Result<()> {
        self.choose(chosen.0, chosen.1);
        // SAFETY: all fields are numbers or may be zero, the status 0 being success.
        let mut result: lt::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: objects that live, a place for one result.
        let status = unsafe {
            lt::cublasLtMatmulAlgoCheck(
                library.handle,
                self.description.0,
                self.weight.0,
                self.x.0,
                self.y.0,
                self.y.0,
                &raw const self.algorithm,
                &raw mut result,
            )
        };
        checked(status, "check an algorithm", &self.shape)?;
        let there = options.workspace_bytes as usize;
        if result.workspaceSize > chosen.1 || chosen.1 > there {
            return Err(CudaError::Room {
                what: "matmul workspace",
                bytes: result.workspaceSize,
                room: there,
            });
        }
        Ok(())
    }

    /// Algorithms that the library thinks fit, its best first, with their bytes of workspace.
    pub(super) fn candidates(
        &self,
        library: &Library,
        most: usize,
        workspace: u64,
    ) -> Result<Vec<(Algorithm, usize)>> {
        let wish = Wish::new(&self.shape, workspace)?;
        // SAFETY: as in `accept`.
        let empty: lt::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut results = vec![empty; most.max(1)];
        let mut found = 0;
        // SAFETY: objects that live, and as many places as are said.
        let status = unsafe {
            lt::cublasLtMatmulAlgoGetHeuristic(
                library.handle,
                self.description.0,
                self.weight.0,
                self.x.0,
                self.y.0,
                self.y.0,
                wish.0,
                results.len() as i32,
                results.as_mut_ptr(),
                &raw mut found,
            )
        };
        // "Not supported" is an empty list: the caller says what it was for.
        if status == lt::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        checked(status, "ask for algorithms", &self.shape)?;
        results.truncate(usize::try_from(found).unwrap_or(0));
        let success = lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        let good = results.iter().filter(|r| r.state == success && r.workspaceSize as u64 <= workspace);
        Ok(good.map(|r| (r.algo.data, r.workspaceSize)).collect())
    }

    /// Computes it behind all that was issued.
    pub(super) fn run(
        &self,
        library: &Library,
        operands: &LtOperands,
        workspace: (DevicePtr, u64),
    ) -> Result<()> {
        self.description.point(&self.shape, operands)?;
        let (one, zero) = (1.0f32, 0.0f32);
        let at = |pointer: DevicePtr| pointer.address() as *mut c_void;
        // SAFETY: objects that live; the factors are read before the call returns; addresses are the device's, and a
        // wrong one fails there.
        let status = unsafe {
            lt::cublasLtMatmul(
                library.handle,
                self.description.0,
                (&raw const one).cast(),
                at(operands.weight),
                self.weight.0,
                at(operands.x),
                self.x.0,
                (&raw const zero).cast(),
                at(operands.y),
                self.y.0,
                at(operands.y),
                self.y.0,
                &raw const self.algorithm,
                at(workspace.0),
                self.workspace,
                library.gpu.stream().cast(),
            )
        };
        checked(status, "compute", &self.shape)
    }
}
