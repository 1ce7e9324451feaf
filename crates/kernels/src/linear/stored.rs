//! How files hold weights: as they are computed, or in a format that is written anew.

use std::borrow::Cow;

use super::{RecodedType, WeightType};

/// A file format of weights that can be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoredType {
    /// The file holds what is computed.
    Computed(WeightType),
    /// The file holds what another type is made of.
    Recoded(RecodedType),
}

impl StoredType {
    /// Lower-case name of the type in the files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Computed(kind) => kind.name(),
            Self::Recoded(kind) => kind.name(),
        }
    }

    /// Weights in one block of the file format; a row is a whole number of blocks.
    pub fn block_weights(self) -> usize {
        match self {
            Self::Computed(kind) => kind.block_weights(),
            Self::Recoded(kind) => kind.block_weights(),
        }
    }

    /// Bytes of one block of the file format.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Computed(kind) => kind.block_bytes(),
            Self::Recoded(kind) => kind.block_bytes(),
        }
    }

    /// The type that the weights are computed as.
    pub fn weight_type(self) -> WeightType {
        match self {
            Self::Computed(kind) => kind,
            Self::Recoded(kind) => kind.weight_type(),
        }
    }

    /// The bytes of a row of the file in the format of [`weight_type`](Self::weight_type).
    pub fn row(self, bytes: &[u8]) -> Cow<'_, [u8]> {
        match self {
            Self::Computed(_) => Cow::Borrowed(bytes),
            Self::Recoded(kind) => Cow::Owned(kind.recode(bytes)),
        }
    }
}
