//! How keys and values are quantized.

use super::KvTensor;
use crate::array::Array;
use crate::error::{Error, Result};

/// Bits per element that MLX's affine quantization knows.
pub const BITS: [usize; 7] = [1, 2, 3, 4, 5, 6, 8];
/// Elements that share a scale and a bias.
pub const GROUP_SIZES: [usize; 3] = [32, 64, 128];

/// MLX's affine quantization: `bits` per element, a scale and a bias for every `group_size` elements of the last axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    group_size: usize,
    bits: usize,
}

impl Default for Scheme {
    fn default() -> Self {
        Self { group_size: 64, bits: 8 }
    }
}

impl Scheme {
    /// A scheme, for the operation `op`.
    ///
    /// # Errors
    /// [`Error::Value`] if MLX does not know the group size or the number of bits.
    pub fn new(op: &'static str, group_size: usize, bits: usize) -> Result<Self> {
        if !BITS.contains(&bits) {
            return Err(Error::value(op, format!("bits among {BITS:?}"), bits));
        }
        if !GROUP_SIZES.contains(&group_size) {
            return Err(Error::value(op, format!("group_size among {GROUP_SIZES:?}"), group_size));
        }
        Ok(Self { group_size, bits })
    }

    /// Elements that share a scale and a bias.
    pub const fn group_size(&self) -> usize {
        self.group_size
    }

    /// Bits per element.
    pub const fn bits(&self) -> usize {
        self.bits
    }

    /// Checks that both head sizes are whole groups of floats.
    pub(super) fn check(&self, op: &'static str, keys: &Array, values: &Array) -> Result<()> {
        for (name, array) in [("keys", keys), ("values", values)] {
            let head_dim = array.shape().last().copied().unwrap_or(0);
            if !(head_dim as usize).is_multiple_of(self.group_size) {
                let expected = format!("{name} whose head size is a multiple of the group size {}", self.group_size);
                return Err(Error::value(op, expected, format!("{:?}", array.shape())));
            }
            if !array.dtype().is_float() {
                return Err(Error::value(op, format!("{name} of a float type"), array.dtype().safetensors_name()));
            }
        }
        Ok(())
    }

    /// `array`, quantized along its last axis.
    pub(super) fn quantize(&self, array: &Array) -> Result<KvTensor> {
        array.quantize(self.group_size, self.bits).map(KvTensor::Quantized)
    }
}
