//! Small JSON files beside a model's weights.

use serde_json::Value;

/// A file that may be missing.
#[derive(Clone, Copy)]
pub(crate) struct SideFile<'a> {
    pub bytes: Option<&'a [u8]>,
    /// How messages call it.
    pub file: &'a str,
}

impl SideFile<'_> {
    /// Null where it is missing.
    ///
    /// # Errors
    /// What is wrong, without the file's name.
    pub(crate) fn json(self) -> Result<Value, String> {
        let read = |bytes| serde_json::from_slice(bytes).map_err(|error| format!("not valid JSON: {error}"));
        self.bytes.map_or(Ok(Value::Null), read)
    }
}
