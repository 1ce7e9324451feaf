//! Reads little-endian values and never past the end.

use super::GgufError;

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    pub(super) fn position(&self) -> u64 {
        self.position as u64
    }

    fn remaining(&self) -> u64 {
        (self.bytes.len() - self.position) as u64
    }

    pub(super) fn take(&mut self, length: u64, field: &str) -> Result<&'a [u8], GgufError> {
        if length > self.remaining() {
            return Err(GgufError::Truncated {
                field: field.into(),
                position: self.position(),
                needed: length,
                remaining: self.remaining(),
            });
        }
        // Fits: it is at most the length of a slice.
        let end = self.position + length as usize;
        let taken = &self.bytes[self.position..end];
        self.position = end;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, field)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, field: &str) -> Result<u32, GgufError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &str) -> Result<u64, GgufError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A count of entries of at least `entry_bytes` bytes each, which must fit in the rest of the file.
    pub(super) fn count(&mut self, field: &str, entry_bytes: u64) -> Result<usize, GgufError> {
        let found = self.u64(field)?;
        if found > self.remaining() / entry_bytes {
            return Err(GgufError::Count { field: field.into(), found, remaining: self.remaining() });
        }
        Ok(found as usize)
    }

    /// The bytes of a string, with its length before them.
    pub(super) fn string(&mut self, field: &str) -> Result<&'a [u8], GgufError> {
        let length = self.u64(field)?;
        self.take(length, field)
    }

    /// A key or a tensor's name.
    pub(super) fn name(&mut self, maximum: usize, field: impl Fn() -> String) -> Result<String, GgufError> {
        let length = self.u64(&field())?;
        if !(1..=maximum as u64).contains(&length) {
            return Err(GgufError::NameLength { field: field(), found: length, maximum });
        }
        let bytes = self.take(length, &field())?;
        String::from_utf8(bytes.to_vec()).map_err(|_| GgufError::NotUtf8 { field: field() })
    }
}
