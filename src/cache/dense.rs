//! Keys and values that are one array each, as some caches store them.

use super::KvTensor;
use crate::array::Array;
use crate::error::{Error, Result};

/// A dense buffer `(B, H, L, D)` that is being assigned.
pub(super) fn checked(op: &'static str, tensor: Option<KvTensor>) -> Result<Option<Array>> {
    match tensor {
        None => Ok(None),
        Some(KvTensor::Dense(array)) if array.shape().len() == 4 => Ok(Some(array)),
        Some(KvTensor::Dense(array)) => Err(Error::value(op, "an array (B, H, L, D)", format!("{:?}", array.shape()))),
        Some(KvTensor::Quantized(_)) => {
            Err(Error::value(op, "one array (B, H, L, D)", "packed words, scales and biases"))
        }
    }
}

/// The part of an `impl KvCache` that hands out and takes fields `keys` and `values`, an `Option<Array>` each.
macro_rules! buffers {
    () => {
        fn keys(&self) -> Option<KvTensor> {
            self.keys.clone().map(KvTensor::Dense)
        }

        fn values(&self) -> Option<KvTensor> {
            self.values.clone().map(KvTensor::Dense)
        }

        fn set_keys(&mut self, keys: Option<KvTensor>) -> Result<()> {
            self.keys = $crate::cache::dense::checked("keys", keys)?;
            Ok(())
        }

        fn set_values(&mut self, values: Option<KvTensor>) -> Result<()> {
            self.values = $crate::cache::dense::checked("values", values)?;
            Ok(())
        }
    };
}

pub(super) use buffers;
