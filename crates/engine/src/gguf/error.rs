//! What can be wrong with a GGUF file.

use crate::text::{quoted, shown};

/// What is wrong with a GGUF file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GgufError {
    /// The first bytes are not `GGUF`.
    #[error("magic: the file does not start with \"GGUF\"; it is no GGUF file")]
    Magic,
    /// The file is for big-endian machines.
    #[error("version: the file is big-endian; convert it to little-endian (gguf-convert-endian)")]
    BigEndian,
    /// A version that is not read.
    #[error("version: {0} is not supported; expected 2 or 3")]
    Version(u32),
    /// The file ends within its header.
    #[error("{}: the file ends early; {needed} bytes needed at byte {position}, {remaining} are left", shown(.field))]
    Truncated {
        /// What was being read.
        field: String,
        /// Where, in bytes.
        position: u64,
        /// Bytes needed.
        needed: u64,
        /// Bytes left.
        remaining: u64,
    },
    /// A count is larger than the rest of the file can hold.
    #[error("{}: {found} entries cannot fit in the {remaining} bytes that are left", shown(.field))]
    Count {
        /// What is counted.
        field: String,
        /// The count in the file.
        found: u64,
        /// Bytes left.
        remaining: u64,
    },
    /// A name or key is too long or empty.
    #[error("{}: length {found}; expected 1 to {maximum} bytes", shown(.field))]
    NameLength {
        /// Which name.
        field: String,
        /// Length in the file.
        found: u64,
        /// Longest length read.
        maximum: usize,
    },
    /// A string is no UTF-8.
    #[error("{}: not UTF-8", shown(.field))]
    NotUtf8 {
        /// Which string.
        field: String,
    },
    /// A value is of a type that the format does not know.
    #[error("{}: value type {found} is unknown", shown(.field))]
    ValueType {
        /// Key of the value.
        field: String,
        /// Type in the file.
        found: u32,
    },
    /// An array of arrays.
    #[error("{}: an array of arrays is not supported", shown(.field))]
    NestedArray {
        /// Key of the array.
        field: String,
    },
    /// A boolean is neither 0 nor 1.
    #[error("{}: a boolean is {found}; expected 0 or 1", shown(.field))]
    Boolean {
        /// Key of the value.
        field: String,
        /// Byte in the file.
        found: u8,
    },
    /// A key stands twice in the metadata.
    #[error("key {} stands twice", quoted(.0))]
    DuplicateKey(String),
    /// A tensor stands twice.
    #[error("tensor {} stands twice", quoted(.0))]
    DuplicateTensor(String),
    /// A value has another type than it should.
    #[error("{} is {found}; expected {expected}", shown(.field))]
    WrongType {
        /// Key of the value.
        field: String,
        /// Type in the file.
        found: &'static str,
        /// Type expected.
        expected: &'static str,
    },
    /// The alignment is no power of two or too large.
    #[error("general.alignment is {found}; expected a power of two up to {maximum}")]
    Alignment {
        /// Alignment in the file.
        found: u32,
        /// Largest alignment accepted.
        maximum: u64,
    },
    /// A tensor has no or too many dimensions.
    #[error("tensor {}: {found} dimensions; expected 1 to 4", quoted(.tensor))]
    Dimensions {
        /// Name of the tensor.
        tensor: String,
        /// Number of dimensions in the file.
        found: u32,
    },
    /// A dimension of a tensor is zero.
    #[error("tensor {}: a dimension is zero", quoted(.0))]
    EmptyTensor(String),
    /// A tensor is of a type that the format does not know.
    #[error("tensor {}: type {found} is unknown", quoted(.tensor))]
    UnknownTensorType {
        /// Name of the tensor.
        tensor: String,
        /// Type in the file.
        found: u32,
    },
    /// The rows of a tensor are no whole number of blocks.
    #[error("tensor {}: a row of {row} weights is no whole number of {kind} blocks of {block}", quoted(.tensor))]
    RowLength {
        /// Name of the tensor.
        tensor: String,
        /// Length of a row.
        row: u64,
        /// Name of the type.
        kind: &'static str,
        /// Weights in a block.
        block: u64,
    },
    /// The number of bytes of a tensor overflows.
    #[error("tensor {}: shape {shape:?} is too large", quoted(.tensor))]
    ShapeOverflow {
        /// Name of the tensor.
        tensor: String,
        /// Shape in the file's order.
        shape: Vec<u64>,
    },
    /// A tensor's offset is no multiple of the alignment.
    #[error("tensor {}: offset {offset} is no multiple of the alignment {alignment}", quoted(.tensor))]
    Misaligned {
        /// Name of the tensor.
        tensor: String,
        /// Offset in the file.
        offset: u64,
        /// Alignment of the file.
        alignment: u64,
    },
    /// A tensor does not lie within the file.
    #[error(
        "tensor {}: offset {offset} and {bytes} bytes reach beyond the {available} bytes of data; the file was cut or \
         is malformed",
        quoted(.tensor)
    )]
    OutsideFile {
        /// Name of the tensor.
        tensor: String,
        /// Offset in the file.
        offset: u64,
        /// Size of the tensor.
        bytes: u64,
        /// Bytes behind the header.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {} and {} overlap", quoted(.first), quoted(.second))]
    Overlap {
        /// Name of one.
        first: String,
        /// Name of the other.
        second: String,
    },
    /// The files of a split model do not belong together.
    #[error("{0}")]
    Split(String),
    /// A file cannot be read.
    #[error("{0}")]
    Read(String),
}
