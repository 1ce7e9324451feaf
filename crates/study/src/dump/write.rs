//! Writes a dump piece by piece: memory holds one piece, however long the text is.

use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::tensor::{Metadata, TensorInfo};
use tempfile::NamedTempFile;

use super::{Description, DumpError, FORMAT, NumberType, PARTS, tensor_name};
use crate::Shape;

/// A dump being written, in a temporary file beside its place until it is whole.
pub struct DumpWriter {
    path: PathBuf,
    file: NamedTempFile,
    shape: Shape,
    numbers: NumberType,
    /// Where the first tensor starts.
    data_start: u64,
    /// Tokens written of each layer.
    written: Vec<usize>,
}

impl DumpWriter {
    /// Starts a dump whose layers, as many as `description.windows`, all have `shape`.
    ///
    /// # Errors
    /// When `path` is a folder, or its folder cannot be written to.
    ///
    /// # Panics
    /// When `shape` has another number of queries than of keys.
    pub fn create(
        path: &Path,
        description: &Description,
        shape: Shape,
        numbers: NumberType,
    ) -> Result<Self, DumpError> {
        assert_eq!(shape.query_tokens, shape.key_tokens, "a dump has a query for each key");
        let layers = description.windows.len();
        let header = header(description, shape, numbers);
        let data_start = 8 + header.len() as u64;
        let start = || {
            if path.is_dir() {
                return Err(std::io::Error::other("is a folder; expected the name of a file"));
            }
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            folder.metadata()?;
            let mut builder = tempfile::Builder::new();
            builder.prefix(".iceformer-dump-");
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt;
                // As any new file: what the user's mask leaves of it.
                builder.permissions(std::fs::Permissions::from_mode(0o666));
            }
            // The error itself names the temporary file, which is not what was asked for; so do those of the wrapper.
            let mut temporary = builder.tempfile_in(folder).map_err(|error| error.kind())?;
            let file = temporary.as_file_mut();
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            file.set_len(data_start + (layers * layer_bytes(shape, numbers)) as u64)?;
            Ok(temporary)
        };
        let file = start().map_err(|error: std::io::Error| problem(path, error))?;
        Ok(Self { path: path.to_owned(), file, shape, numbers, data_start, written: vec![0; layers] })
    }

    /// Writes the next tokens of `layer`: `[tokens, query_heads, key_dim]`, `[tokens, kv_heads, key_dim]`,
    /// `[tokens, kv_heads, value_dim]`.
    ///
    /// # Errors
    /// When the file cannot be written, or a number does not fit the file's type.
    ///
    /// # Panics
    /// When there are more tokens than the dump was made for, or a slice has another length than its shape takes.
    pub fn append(&mut self, layer: usize, queries: &[f32], keys: &[f32], values: &[f32]) -> Result<(), DumpError> {
        let first = self.written[layer];
        let widths = widths(self.shape);
        let tokens = queries.len() / widths[0];
        assert!(first + tokens <= self.shape.key_tokens, "more tokens than the dump was made for");
        let mut tensor = self.data_start + (layer * layer_bytes(self.shape, self.numbers)) as u64;
        for ((part, data), width) in PARTS.into_iter().zip([queries, keys, values]).zip(widths) {
            assert_eq!(data.len(), tokens * width, "{part} of another number of tokens");
            let bytes = self.encode(data).ok_or_else(|| {
                let name = tensor_name(layer, part);
                let told = match data.iter().all(|value| value.is_finite()) {
                    true => format!("{name} holds a number beyond {}; write f32 instead", self.numbers.name()),
                    false => format!(
                        "{name} holds what is not a number; the model's weights are damaged or overflow in this type"
                    ),
                };
                problem(&self.path, told)
            })?;
            let place = tensor + (first * width * self.numbers.bytes()) as u64;
            let file = self.file.as_file_mut();
            file.seek(SeekFrom::Start(place))
                .and_then(|_| file.write_all(&bytes))
                .map_err(|error| problem(&self.path, error))?;
            tensor += (self.shape.key_tokens * width * self.numbers.bytes()) as u64;
        }
        self.written[layer] += tokens;
        Ok(())
    }

    /// Moves the whole dump to its place. Gives its size in bytes.
    ///
    /// # Errors
    /// When the file cannot be written.
    ///
    /// # Panics
    /// When tokens are missing.
    pub fn finish(self) -> Result<u64, DumpError> {
        let whole = self.written.iter().all(|&tokens| tokens == self.shape.key_tokens);
        assert!(whole, "tokens are missing");
        let file = self.file.as_file();
        let bytes = file.sync_all().and_then(|()| file.metadata()).map_err(|error| problem(&self.path, error))?.len();
        self.file.persist(&self.path).map_err(|error| problem(&self.path, error.error))?;
        Ok(bytes)
    }

    /// `None` when a number is not finite in the file's type.
    fn encode(&self, data: &[f32]) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(data.len() * self.numbers.bytes());
        let mut finite = true;
        for &value in data {
            match self.numbers {
                NumberType::F16 => {
                    let value = f16::from_f32(value);
                    finite &= value.is_finite();
                    bytes.extend_from_slice(&value.to_le_bytes());
                }
                NumberType::F32 => {
                    finite &= value.is_finite();
                    bytes.extend_from_slice(&value.to_le_bytes());
                }
            }
        }
        finite.then_some(bytes)
    }
}

fn problem(path: &Path, problem: impl ToString) -> DumpError {
    DumpError { file: path.display().to_string(), problem: problem.to_string() }
}

/// Numbers of one token of each part.
fn widths(shape: Shape) -> [usize; 3] {
    [shape.query_heads * shape.key_dim, shape.kv_heads * shape.key_dim, shape.kv_heads * shape.value_dim]
}

fn layer_bytes(shape: Shape, numbers: NumberType) -> usize {
    shape.key_tokens * widths(shape).iter().sum::<usize>() * numbers.bytes()
}

/// The header as JSON, filled with spaces to a multiple of eight bytes.
fn header(description: &Description, shape: Shape, numbers: NumberType) -> Vec<u8> {
    let window = |window: &Option<usize>| window.map_or("none".to_owned(), |tokens| tokens.to_string());
    let mut windows: Vec<String> = description.windows.iter().map(window).collect();
    if windows.iter().all(|window| *window == windows[0]) {
        windows.truncate(1);
    }
    let metadata = [
        ("format", FORMAT.to_owned()),
        ("scale", description.scale.to_string()),
        ("causal", description.causal.to_string()),
        ("window", windows.join(",")),
        ("source", description.source.clone()),
        ("model", description.model.clone()),
    ];
    let metadata: HashMap<_, _> = metadata.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let heads = [shape.query_heads, shape.kv_heads, shape.kv_heads];
    let dims = [shape.key_dim, shape.key_dim, shape.value_dim];
    let mut tensors = Vec::new();
    let mut start = 0;
    for layer in 0..description.windows.len() {
        for part in 0..PARTS.len() {
            let tensor_shape = vec![shape.key_tokens, heads[part], dims[part]];
            let end = start + tensor_shape.iter().product::<usize>() * numbers.bytes();
            let info = TensorInfo { dtype: numbers.dtype(), shape: tensor_shape, data_offsets: (start, end) };
            tensors.push((tensor_name(layer, PARTS[part]), info));
            start = end;
        }
    }
    let metadata = Metadata::new(Some(metadata), tensors).expect("tensors follow each other");
    let mut header = serde_json::to_vec(&metadata).expect("names and numbers are JSON");
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}
