//! Matrix products through cuBLASLt. A product's layouts and algorithm are found once, when a plan is loaded.
//!
//! cuBLASLt counts in columns, so a row-major matrix is its transpose there: `y = a b` is computed as `y^T = b^T a^T`.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::call::{Mat, Product, Start, Tensor};
use crate::device::DType;

/// Bytes of memory that algorithms may use.
pub(super) const WORKSPACE: usize = 32 << 20;

/// The library's handle, and algorithms that were found before.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    tf32: bool,
    algorithms: HashMap<String, sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: the handle may be used from any thread; all use is under the device's lock.
unsafe impl Send for Blas {}

/// A product that is ready to run.
pub(super) struct Planned {
    description: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    base: sys::cublasLtMatrixLayout_t,
    pointers: [u64; 4],
    beta: f32,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptors are plain memory of the library, owned by this value.
unsafe impl Send for Planned {}

impl Drop for Planned {
    fn drop(&mut self) {
        // SAFETY: made by `plan`, destroyed once.
        unsafe {
            for layout in [self.a, self.b, self.y, self.base] {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.description);
        }
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::I32 => sys::cudaDataType::CUDA_R_32I,
        DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

/// # Safety
/// `layout` is a layout.
unsafe fn set_layout<T>(
    layout: sys::cublasLtMatrixLayout_t,
    attribute: sys::cublasLtMatrixLayoutAttribute_t,
    value: T,
) -> Result<(), CublasError> {
    // SAFETY: the caller's promise; the value outlives the call.
    unsafe { result::set_matrix_layout_attribute(layout, attribute, (&raw const value).cast(), size_of::<T>()) }
}

/// The layout of a row-major tensor, of which `batches` lie below each other, as the column-major matrix that it is.
fn layout(tensor: &Tensor, batches: usize) -> Result<sys::cublasLtMatrixLayout_t, CublasError> {
    let rows = tensor.rows / batches;
    let step = tensor.stride.max(tensor.cols);
    let layout = result::create_matrix_layout(data_type(tensor.dtype), tensor.cols as u64, rows as u64, step as i64)?;
    if batches > 1 {
        use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
        // SAFETY: the layout was made above.
        unsafe {
            set_layout(layout, Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, batches as i32)?;
            let offset = (rows * tensor.stride) as i64;
            set_layout(layout, Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, offset)?;
        }
    }
    Ok(layout)
}

impl Blas {
    /// Opens the library. With `tf32`, products of `f32` round their inputs to ten bits of mantissa.
    ///
    /// # Errors
    /// In words, if it is not there.
    pub(super) fn new(tf32: bool) -> Result<Self, String> {
        // SAFETY: opens a library of NVIDIA's, whose initialisation has no requirements.
        let present = || unsafe { sys::is_culib_present() };
        if !super::compile::find("cublasLt", present) {
            return Err("cuBLASLt (libcublasLt.so) is not on the library path: install the CUDA toolkit".into());
        }
        let handle = result::create_handle().map_err(|e| format!("cuBLASLt does not start: {e}"))?;
        Ok(Self { handle, tf32, algorithms: HashMap::new() })
    }

    /// Finds the layouts and the algorithm of a product; `address` is where a tensor lies.
    ///
    /// # Errors
    /// In words, if the library has no algorithm for it.
    pub(super) fn plan(&mut self, product: &Product, address: impl Fn(&Tensor) -> u64) -> Result<Planned, String> {
        self.try_plan(product, address).map_err(|e| format!("cuBLASLt has no algorithm for {product:?}: {e}"))
    }

    fn try_plan(&mut self, product: &Product, address: impl Fn(&Tensor) -> u64) -> Result<Planned, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Product { a, b, y, start, batches, bf16 } = product;
        let compute = match (bf16, self.tf32) {
            _ if a.tensor.dtype == DType::Bf16 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            (true, _) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_16BF,
            (false, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            (false, false) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let description = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        // CUBLAS_OP_T and CUBLAS_OP_N
        let operation = |m: &Mat| i32::from(m.transposed);
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: the description was made above, and the value outlives the call.
            unsafe { result::set_matmul_desc_attribute(description, attribute, value, size) }
        };
        let (left, right) = (operation(b), operation(a));
        let size = size_of::<i32>();
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const left).cast(), size)?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const right).cast(), size)?;
        if let Start::Bias(bias) = start {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            let pointer = address(bias);
            let size = size_of::<sys::cublasLtEpilogue_t>();
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, (&raw const epilogue).cast(), size)?;
            set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, (&raw const pointer).cast(), 8)?;
        }
        let base = if let Start::Add(base) = start { base } else { y };
        let pointers = [address(&b.tensor), address(&a.tensor), address(base), address(y)];
        let mut planned = Planned {
            description,
            a: layout(&b.tensor, *batches)?,
            b: layout(&a.tensor, *batches)?,
            base: layout(base, *batches)?,
            y: layout(y, *batches)?,
            pointers,
            beta: if matches!(start, Start::Add(_)) { 1.0 } else { 0.0 },
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let alignments = pointers.map(|p| 1u32 << p.trailing_zeros().min(8));
        let shape = |t: &Tensor| (t.rows, t.cols, t.stride, t.dtype);
        let form = (bf16, a.transposed, b.transposed, batches, matches!(start, Start::Bias(_)), planned.beta);
        let sizes = (shape(&a.tensor), shape(&b.tensor), shape(base), shape(y));
        let key = format!("{form:?} {sizes:?} {alignments:?}");
        planned.algorithm = match self.algorithms.get(&key) {
            Some(algorithm) => *algorithm,
            None => {
                let found = self.search(&planned, alignments)?;
                self.algorithms.insert(key, found);
                found
            }
        };
        Ok(planned)
    }

    fn search(&self, planned: &Planned, alignments: [u32; 4]) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref()?;
        let attributes = [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        // SAFETY: the preference was made above and is destroyed here; values outlive the calls; the layouts are live.
        unsafe {
            let workspace = WORKSPACE;
            let mut done = result::set_matmul_pref_attribute(
                preference,
                Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            );
            for (attribute, bytes) in attributes.into_iter().zip(&alignments) {
                let set = result::set_matmul_pref_attribute(preference, attribute, (&raw const *bytes).cast(), 4);
                done = done.and(set);
            }
            let found = done.and_then(|()| {
                result::get_matmul_algo_heuristic(
                    self.handle,
                    planned.description,
                    planned.a,
                    planned.b,
                    planned.base,
                    planned.y,
                    preference,
                )
            });
            let _ = result::destroy_matmul_pref(preference);
            found.map(|f| f.algo)
        }
    }

    /// Puts the product on a stream.
    ///
    /// # Safety
    /// The addresses that the product was planned with are valid, and `workspace` has [`WORKSPACE`] bytes.
    pub(super) unsafe fn run(
        &self,
        planned: &Planned,
        workspace: u64,
        stream: cudarc::driver::sys::CUstream,
    ) -> Result<(), CublasError> {
        let alpha = 1.0f32;
        let [a, b, base, y] = planned.pointers.map(|p| p as *mut c_void);
        // SAFETY: the caller's promise; alpha and beta are read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                planned.description,
                (&raw const alpha).cast(),
                (&raw const planned.beta).cast(),
                a,
                planned.a,
                b,
                planned.b,
                base,
                planned.base,
                y,
                planned.y,
                &raw const planned.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
    }
}
