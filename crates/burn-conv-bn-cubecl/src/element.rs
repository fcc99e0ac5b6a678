use burn_backend::DType;
use burn_backend::cubecl::dtype_to_storage_type;
use burn_cubecl::cubecl::ir::ElemType;

/// Dtype of statistics, sums and per-channel coefficients for data of `dtype`: f64 for f64, f32
/// otherwise.
///
/// ```
/// use burn_backend::DType;
/// use burn_conv_bn_cubecl::accumulator_dtype;
///
/// assert_eq!(accumulator_dtype(DType::BF16), DType::F32);
/// ```
pub fn accumulator_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

pub(crate) fn element_type(dtype: DType) -> ElemType {
    dtype_to_storage_type(dtype)
}

pub(crate) fn accumulator_type(dtype: DType) -> ElemType {
    element_type(accumulator_dtype(dtype))
}
