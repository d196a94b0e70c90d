//! Element types, with their names in safetensors files.

/// Element type of an [`Array`](super::Array) or of a tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Unsigned, 16 bits.
    U16,
    /// Unsigned, 32 bits.
    U32,
    /// Unsigned, 64 bits.
    U64,
    /// Signed, 8 bits.
    I8,
    /// Signed, 16 bits.
    I16,
    /// Signed, 32 bits.
    I32,
    /// Signed, 64 bits.
    I64,
    /// IEEE half precision.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision: MLX has it on the CPU; its files do not.
    F64,
    /// Two singles.
    C64,
}

/// Every type with its size in bytes and its safetensors name.
const TABLE: [(Dtype, usize, &str); 14] = [
    (Dtype::Bool, 1, "BOOL"),
    (Dtype::U8, 1, "U8"),
    (Dtype::U16, 2, "U16"),
    (Dtype::U32, 4, "U32"),
    (Dtype::U64, 8, "U64"),
    (Dtype::I8, 1, "I8"),
    (Dtype::I16, 2, "I16"),
    (Dtype::I32, 4, "I32"),
    (Dtype::I64, 8, "I64"),
    (Dtype::F16, 2, "F16"),
    (Dtype::Bf16, 2, "BF16"),
    (Dtype::F32, 4, "F32"),
    (Dtype::F64, 8, "F64"),
    (Dtype::C64, 8, "C64"),
];

impl Dtype {
    /// Size of one element in bytes.
    pub const fn size(self) -> usize {
        TABLE[self as usize].1
    }

    /// The name that safetensors headers use.
    pub const fn safetensors_name(self) -> &'static str {
        TABLE[self as usize].2
    }

    /// The type that a safetensors header names, if MLX has it.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.2 == name).map(|row| row.0)
    }

    /// True for whole numbers.
    pub const fn is_integer(self) -> bool {
        !matches!(self, Self::Bool | Self::F16 | Self::Bf16 | Self::F32 | Self::F64 | Self::C64)
    }

    /// True for the types that keys and values may have.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_stands_in_the_order_of_the_enum() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, index);
            assert_eq!(Dtype::from_safetensors_name(row.2), Some(row.0));
        }
    }
}
