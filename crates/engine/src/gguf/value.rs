//! Values of the metadata.

use std::collections::BTreeMap;

use super::GgufError;
use super::reader::Reader;
use crate::text::quoted;

/// A value of the metadata. Numbers of all widths are kept in the widest type of their kind.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    /// Bytes that are no UTF-8 were replaced.
    String(String),
    Strings(Vec<String>),
    /// Elements of 32-bit or wider numbers, as the file has them; the bytes of other arrays stay unread.
    Integers(Vec<i32>),
    Floats(Vec<f32>),
    /// An array of another element type: how many elements.
    OtherArray(usize),
}

/// Value types of the format.
mod kind {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const STRING: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}

impl Value {
    pub(super) fn read(reader: &mut Reader<'_>, key: &str) -> Result<Self, GgufError> {
        let type_id = reader.u32(key)?;
        Ok(match type_id {
            kind::U8 => Self::Unsigned(u64::from(reader.array::<1>(key)?[0])),
            kind::I8 => Self::Signed(i64::from(i8::from_le_bytes(reader.array(key)?))),
            kind::U16 => Self::Unsigned(u64::from(u16::from_le_bytes(reader.array(key)?))),
            kind::I16 => Self::Signed(i64::from(i16::from_le_bytes(reader.array(key)?))),
            kind::U32 => Self::Unsigned(u64::from(reader.u32(key)?)),
            kind::I32 => Self::Signed(i64::from(i32::from_le_bytes(reader.array(key)?))),
            kind::F32 => Self::Float(f64::from(f32::from_le_bytes(reader.array(key)?))),
            kind::BOOL => match reader.array::<1>(key)?[0] {
                0 => Self::Bool(false),
                1 => Self::Bool(true),
                found => return Err(GgufError::Boolean { field: key.into(), found }),
            },
            kind::STRING => Self::String(String::from_utf8_lossy(reader.string(key)?).into_owned()),
            kind::ARRAY => Self::read_array(reader, key)?,
            kind::U64 => Self::Unsigned(reader.u64(key)?),
            kind::I64 => Self::Signed(i64::from_le_bytes(reader.array(key)?)),
            kind::F64 => Self::Float(f64::from_le_bytes(reader.array(key)?)),
            found => return Err(GgufError::ValueType { field: key.into(), found }),
        })
    }

    fn read_array(reader: &mut Reader<'_>, key: &str) -> Result<Self, GgufError> {
        let element = reader.u32(key)?;
        let element_bytes = match element {
            kind::U8 | kind::I8 | kind::BOOL => 1,
            kind::U16 | kind::I16 => 2,
            kind::U32 | kind::I32 | kind::F32 => 4,
            kind::U64 | kind::I64 | kind::F64 | kind::STRING => 8,
            kind::ARRAY => return Err(GgufError::NestedArray { field: key.into() }),
            found => return Err(GgufError::ValueType { field: key.into(), found }),
        };
        let count = reader.count(key, element_bytes)?;
        if element == kind::STRING {
            let mut strings = Vec::with_capacity(count);
            for _ in 0..count {
                let bytes = reader.string(key)?;
                let text = std::str::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { field: key.into() })?;
                strings.push(text.to_owned());
            }
            return Ok(Self::Strings(strings));
        }
        // Cannot overflow: the count was held against the bytes that are left.
        let bytes = reader.take(count as u64 * element_bytes, key)?;
        let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
        Ok(match element {
            kind::F32 => Self::Floats(words.map(f32::from_le_bytes).collect()),
            kind::I32 | kind::U32 => Self::Integers(words.map(i32::from_le_bytes).collect()),
            _ => Self::OtherArray(count),
        })
    }

    fn type_name(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "a whole number",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a boolean",
            Self::String(_) => "a string",
            Self::Strings(_) => "an array of strings",
            Self::Integers(_) => "an array of 32-bit whole numbers",
            Self::Floats(_) => "an array of floats",
            Self::OtherArray(_) => "an array of another type",
        }
    }

    /// The value in a few words, for `inspect`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Unsigned(value) => value.to_string(),
            Self::Signed(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Bool(value) => value.to_string(),
            Self::String(text) => quoted(text),
            Self::Strings(strings) => format!("{} strings", strings.len()),
            Self::Integers(numbers) => format!("{} whole numbers", numbers.len()),
            Self::Floats(numbers) => format!("{} floats", numbers.len()),
            Self::OtherArray(count) => format!("{count} values"),
        }
    }
}

/// The metadata of a file, by key. Every look-up gives `None` for a missing key and an error for one of another type.
#[derive(Debug, Default)]
pub(crate) struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    pub(super) fn new(values: BTreeMap<String, Value>) -> Self {
        Self(values)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| GgufError::WrongType {
            field: key.into(),
            found: value.type_name(),
            expected,
        })
    }

    pub(crate) fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "a whole number below 2^32", |value| match value {
            Value::Unsigned(value) => u32::try_from(*value).ok(),
            Value::Signed(value) => u32::try_from(*value).ok(),
            _ => None,
        })
    }

    pub(crate) fn usize(&self, key: &str) -> Result<Option<usize>, GgufError> {
        self.typed(key, "a whole number", |value| match value {
            Value::Unsigned(value) => usize::try_from(*value).ok(),
            Value::Signed(value) => usize::try_from(*value).ok(),
            _ => None,
        })
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a float", |value| match value {
            Value::Float(value) => Some(*value),
            _ => None,
        })
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Strings(strings) => Some(strings.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn integers(&self, key: &str) -> Result<Option<&[i32]>, GgufError> {
        self.typed(key, "an array of 32-bit whole numbers", |value| match value {
            Value::Integers(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        self.typed(key, "an array of floats", |value| match value {
            Value::Floats(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }
}
