//! The owned handle of one MLX array, and the operations of mlx-c on it.

use super::{check, current_stream, error_handler, raw};
use crate::error::Result;
use std::ffi::{c_int, c_void};

/// What mlx-c and the bridge call an array: a pointer to a C++ `mlx::core::array` on the heap.
pub(crate) type RawArray = raw::mlx_array;

/// Owns one C++ array object (a reference-counted node of MLX's graph); freed on drop.
pub(crate) struct ArrayHandle(RawArray);

// SAFETY: the C++ object is a shared pointer with an atomic count and may be dropped on any thread. What it points to
// changes only when it is evaluated, which this crate does behind one lock (`vector::EVALUATION`).
unsafe impl Send for ArrayHandle {}

#[cfg(debug_assertions)]
static LIVE: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Handles alive now; 0 in release builds, which do not count.
pub(crate) fn live_handles() -> usize {
    #[cfg(debug_assertions)]
    return LIVE.load(std::sync::atomic::Ordering::SeqCst);
    #[cfg(not(debug_assertions))]
    0
}

/// Memory of an array, from its first element to its last.
pub(crate) struct HostData<'a>(&'a [u8]);

impl HostData<'_> {
    /// `len` bytes from byte `from` on, counted from the first element.
    pub(crate) fn bytes(&self, from: usize, len: usize) -> &[u8] {
        &self.0[from..from + len]
    }
}

/// A unary operation of mlx-c.
type Unary = unsafe extern "C" fn(*mut RawArray, RawArray, raw::mlx_stream) -> c_int;
/// A binary operation of mlx-c.
type Binary = unsafe extern "C" fn(*mut RawArray, RawArray, RawArray, raw::mlx_stream) -> c_int;

impl ArrayHandle {
    /// Takes over an array that mlx-c or the bridge made.
    ///
    /// # Safety
    /// `raw.ctx` points to a heap `mlx::core::array` that nobody else frees.
    pub(crate) unsafe fn own(raw: RawArray) -> Self {
        #[cfg(debug_assertions)]
        LIVE.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Self(raw)
    }

    /// A second handle of the array behind `raw`, which stays its owner's.
    ///
    /// # Safety
    /// `raw.ctx` points to a live `mlx::core::array`.
    pub(crate) unsafe fn share(raw: RawArray) -> Result<Self> {
        error_handler::install();
        let mut copy = RawArray { ctx: std::ptr::null_mut() };
        // SAFETY: an empty out-parameter, and a live source by this function's contract.
        check("copy of an array handle", unsafe { raw::mlx_array_set(&raw mut copy, raw) })?;
        // SAFETY: mlx-c just allocated `copy` for us.
        Ok(unsafe { Self::own(copy) })
    }

    /// Gives the C++ object away; the receiver frees it.
    #[cfg(feature = "python")]
    pub(crate) fn into_raw(self) -> RawArray {
        #[cfg(debug_assertions)]
        LIVE.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
        std::mem::ManuallyDrop::new(self).0
    }

    /// Takes one handle out of the count: it is borrowed and will not be dropped.
    #[cfg(all(feature = "python", debug_assertions))]
    pub(crate) fn uncount() {
        LIVE.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
    }

    /// The name for mlx-c, valid while `self` lives.
    pub(super) fn raw(&self) -> RawArray {
        self.0
    }

    /// Runs `call` with an empty out-parameter; an array that it left there on failure is freed.
    pub(super) fn produced(op: &'static str, call: impl FnOnce(*mut RawArray) -> c_int) -> Result<Self> {
        let mut out = RawArray { ctx: std::ptr::null_mut() };
        let status = call(&raw mut out);
        // SAFETY: mlx-c fills the out-parameter with a heap array of ours, or leaves it null, which free accepts.
        let handle = unsafe { Self::own(out) };
        check(op, status).map(|()| handle)
    }

    pub(crate) fn shape(&self) -> &[i32] {
        // SAFETY: `self` is a live array; MLX never changes a node's shape, and the slice borrows `self`.
        unsafe {
            let len = raw::mlx_array_ndim(self.0);
            if len == 0 { &[] } else { std::slice::from_raw_parts(raw::mlx_array_shape(self.0), len) }
        }
    }

    /// Distance between neighbours of each axis, in elements; known once the array is evaluated.
    pub(crate) fn strides(&self) -> &[usize] {
        // SAFETY: as for `shape`; the caller evaluated the array, after which strides do not change.
        unsafe {
            let len = raw::mlx_array_ndim(self.0);
            if len == 0 { &[] } else { std::slice::from_raw_parts(raw::mlx_array_strides(self.0), len) }
        }
    }

    pub(crate) fn dtype(&self) -> raw::mlx_dtype {
        // SAFETY: `self` is a live array.
        unsafe { raw::mlx_array_dtype(self.0) }
    }

    /// True when the data can be read now.
    pub(crate) fn is_available(&self) -> bool {
        let mut available = false;
        // SAFETY: a live array, and a pointer to a local.
        let status = unsafe { raw::_mlx_array_is_available(&raw mut available, self.0) };
        status == 0 && available
    }

    /// True when computed, or about to be.
    pub(crate) fn is_scheduled(&self) -> bool {
        // SAFETY: a live array.
        unsafe { raw::mlxrs_is_scheduled(self.0) }
    }

    /// Waits for the computation that this mark stands for.
    pub(crate) fn wait(self, op: &'static str) -> Result<()> {
        // SAFETY: a live array without a primitive, so that nothing is evaluated: MLX waits for its event, and no other
        // handle knows the node, whose status that changes.
        check(op, unsafe { raw::mlx_array_eval(self.0) })
    }

    /// The buffer that a chain of updates began with, if it is still there.
    pub(crate) fn scheduled_ancestor(&self) -> Option<Self> {
        error_handler::install();
        // SAFETY: a live array; the result, unless empty, is a heap array made for us.
        unsafe {
            let found = raw::mlxrs_scheduled_ancestor(self.0);
            (!found.ctx.is_null()).then(|| Self::own(found))
        }
    }

    /// Identity of the graph node: equal for two handles of one array.
    pub(crate) fn same_node(&self, other: &Self) -> bool {
        // SAFETY: both are live; the C++ object's first word is its pointer to the shared node.
        unsafe { *self.0.ctx.cast::<*const c_void>() == *other.0.ctx.cast::<*const c_void>() }
    }

    /// Runs `read` with the array's memory on the host; None if a stride is negative, so that no run can be read forward.
    ///
    /// The array must have been evaluated; on CUDA its whole buffer moves to unified memory.
    pub(crate) fn with_host_data<R>(&self, op: &'static str, read: impl FnOnce(HostData<'_>) -> R) -> Result<R> {
        debug_assert!(self.is_available());
        // SAFETY: a live array; mlx-c catches what MLX throws and returns null then.
        let data = unsafe { raw::mlx_array_data_uint8(self.0) };
        if data.is_null() {
            return Err(error_handler::last_error(op));
        }
        let last = self.shape().iter().zip(self.strides()).try_fold(0_usize, |last, (&dim, &stride)| {
            usize::try_from(dim).ok()?.checked_sub(1)?.checked_mul(stride)?.checked_add(last)
        });
        // SAFETY: a live array.
        let item = unsafe { raw::mlx_array_itemsize(self.0) };
        let len = last.and_then(|last| (last + 1).checked_mul(item)).filter(|&len| isize::try_from(len).is_ok());
        let Some(len) = len else {
            return Err(crate::Error::value(
                op,
                "an array with elements and forward strides",
                format!("{:?}", self.strides()),
            ));
        };
        // SAFETY: the first and the last element of the array, and so all that lies between, are in its one buffer,
        // which lives while `self` does; MLX never writes into a buffer that a node other than the writer's holds.
        Ok(read(HostData(unsafe { std::slice::from_raw_parts(data, len) })))
    }

    pub(super) fn unary(&self, op: &'static str, function: Unary) -> Result<Self> {
        let stream = current_stream(op)?;
        // SAFETY: live operand and stream; `produced` owns the result.
        Self::produced(op, |out| unsafe { function(out, self.0, stream) })
    }

    pub(super) fn binary(&self, other: &Self, op: &'static str, function: Binary) -> Result<Self> {
        let stream = current_stream(op)?;
        // SAFETY: live operands and stream; `produced` owns the result.
        Self::produced(op, |out| unsafe { function(out, self.0, other.0, stream) })
    }

    pub(crate) fn slice(&self, start: &[i32], stop: &[i32]) -> Result<Self> {
        let stream = current_stream("slice")?;
        let (n, ones) = (start.len(), ONES);
        debug_assert!(n == stop.len() && n <= ones.len());
        // SAFETY: three arrays of `n` numbers, live operand and stream.
        Self::produced("slice", |out| unsafe {
            raw::mlx_slice(out, self.0, start.as_ptr(), n, stop.as_ptr(), n, ones.as_ptr(), n, stream)
        })
    }

    pub(crate) fn slice_update(&self, update: &Self, start: &[i32], stop: &[i32]) -> Result<Self> {
        let stream = current_stream("slice_update")?;
        let (n, ones) = (start.len(), ONES);
        debug_assert!(n == stop.len() && n <= ones.len());
        // SAFETY: three arrays of `n` numbers, live operands and stream.
        Self::produced("slice_update", |out| unsafe {
            raw::mlx_slice_update(out, self.0, update.0, start.as_ptr(), n, stop.as_ptr(), n, ones.as_ptr(), n, stream)
        })
    }

    pub(crate) fn zeros(shape: &[i32], dtype: raw::mlx_dtype) -> Result<Self> {
        let stream = current_stream("zeros")?;
        // SAFETY: shape of the length that is passed, live stream.
        Self::produced("zeros", |out| unsafe { raw::mlx_zeros(out, shape.as_ptr(), shape.len(), dtype, stream) })
    }

    /// The integers `start .. stop` as int32.
    pub(crate) fn arange(start: f64, stop: f64) -> Result<Self> {
        let stream = current_stream("arange")?;
        // SAFETY: numbers and a live stream.
        Self::produced("arange", |out| unsafe {
            raw::mlx_arange(out, start, stop, 1.0, raw::mlx_dtype_::MLX_INT32, stream)
        })
    }

    pub(crate) fn scalar_i32(value: i32) -> Self {
        error_handler::install();
        // SAFETY: mlx-c allocates a scalar for us.
        unsafe { Self::own(raw::mlx_array_new_int(value)) }
    }

    pub(crate) fn astype(&self, dtype: raw::mlx_dtype) -> Result<Self> {
        let stream = current_stream("astype")?;
        // SAFETY: live operand and stream.
        Self::produced("astype", |out| unsafe { raw::mlx_astype(out, self.0, dtype, stream) })
    }

    pub(crate) fn reshape(&self, shape: &[i32]) -> Result<Self> {
        let stream = current_stream("reshape")?;
        // SAFETY: shape of the length that is passed, live operand and stream.
        Self::produced("reshape", |out| unsafe { raw::mlx_reshape(out, self.0, shape.as_ptr(), shape.len(), stream) })
    }

    pub(crate) fn contiguous(&self) -> Result<Self> {
        let stream = current_stream("contiguous")?;
        // SAFETY: live operand and stream.
        Self::produced("contiguous", |out| unsafe { raw::mlx_contiguous(out, self.0, false, stream) })
    }

    pub(crate) fn less(&self, other: &Self) -> Result<Self> {
        self.binary(other, "less", raw::mlx_less)
    }

    pub(crate) fn less_equal(&self, other: &Self) -> Result<Self> {
        self.binary(other, "less_equal", raw::mlx_less_equal)
    }

    pub(crate) fn logical_and(&self, other: &Self) -> Result<Self> {
        self.binary(other, "logical_and", raw::mlx_logical_and)
    }

    pub(crate) fn logical_or(&self, other: &Self) -> Result<Self> {
        self.binary(other, "logical_or", raw::mlx_logical_or)
    }

    pub(crate) fn add(&self, other: &Self) -> Result<Self> {
        self.binary(other, "add", raw::mlx_add)
    }

    pub(crate) fn stop_gradient(&self) -> Result<Self> {
        self.unary("stop_gradient", raw::mlx_stop_gradient)
    }
}

/// Strides of every slice that the crate takes.
const ONES: [i32; 5] = [1; 5];

impl Clone for ArrayHandle {
    fn clone(&self) -> Self {
        // SAFETY: `self` is live. Copying bumps a reference count and allocates 16 bytes, so it cannot fail in a way
        // that a caller could handle.
        unsafe { Self::share(self.0) }.expect("MLX copies an array handle")
    }
}

impl Drop for ArrayHandle {
    fn drop(&mut self) {
        #[cfg(debug_assertions)]
        LIVE.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
        // SAFETY: `self` owns the C++ object and is gone after this.
        unsafe { raw::mlx_array_free(self.0) };
    }
}
