//! Opens a dump: everything is checked before a layer is read, and layers are read one at a time.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::{Description, DumpError, FORMAT, PARTS, tensor_name};
use crate::{Inputs, Shape};

/// Longest header that safetensors allows.
const MAXIMUM_HEADER: u64 = 100_000_000;
/// More layers than any model has.
const MAXIMUM_LAYERS: usize = 4096;

/// A dump on disk.
#[derive(Debug)]
pub struct Dump {
    name: String,
    file: File,
    data_start: u64,
    description: Description,
    layers: Vec<StoredLayer>,
}

#[derive(Debug)]
struct StoredLayer {
    shape: Shape,
    /// Queries, keys, values.
    tensors: [TensorInfo; 3],
}

/// One layer of a dump.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Queries, keys and values.
    pub inputs: Inputs,
    /// Their shape; there is a query for each key.
    pub shape: Shape,
    /// Factor on the logits.
    pub scale: f32,
    /// Whether a query sees no key behind its position.
    pub causal: bool,
    /// Tokens that a query sees back, where not all.
    pub window: Option<usize>,
}

impl Dump {
    /// Opens the dump at `path` and checks its header.
    ///
    /// # Errors
    /// When the file cannot be read, is no safetensors file, or is no dump: a tensor or a field of the metadata is
    /// missing or of another shape or type than it must have.
    pub fn open(path: &Path) -> Result<Self, DumpError> {
        let name = path.display().to_string();
        let problem = |problem: String| DumpError { file: name.clone(), problem };
        let file = File::open(path).map_err(|error| problem(error.to_string()))?;
        let (data_start, metadata) = read_header(&file).map_err(problem)?;
        let (layers, description) = check(&metadata).map_err(problem)?;
        Ok(Self { name, file, data_start, description, layers })
    }

    /// Path of the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the metadata says.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Number of layers, at least one.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Shape of a layer.
    ///
    /// # Panics
    /// When there are fewer layers.
    pub fn shape(&self, layer: usize) -> Shape {
        self.layers[layer].shape
    }

    /// Reads one layer.
    ///
    /// # Errors
    /// When the file cannot be read or holds a number that is not finite.
    ///
    /// # Panics
    /// When there are fewer layers.
    pub fn read(&self, layer: usize) -> Result<Layer, DumpError> {
        let stored = &self.layers[layer];
        let read = |part: usize| {
            let problem = |problem: String| DumpError { file: self.name.clone(), problem };
            let data = self.read_tensor(&stored.tensors[part]).map_err(|error| problem(error.to_string()))?;
            match data.iter().position(|value| !value.is_finite()) {
                None => Ok(data),
                Some(place) => {
                    let tensor = tensor_name(layer, PARTS[part]);
                    Err(problem(format!("{tensor} holds {} at place {place}; expected finite numbers", data[place])))
                }
            }
        };
        Ok(Layer {
            inputs: Inputs { queries: read(0)?, keys: read(1)?, values: read(2)? },
            shape: stored.shape,
            scale: self.description.scale,
            causal: self.description.causal,
            window: self.description.windows[layer],
        })
    }

    fn read_tensor(&self, tensor: &TensorInfo) -> std::io::Result<Vec<f32>> {
        let (start, end) = tensor.data_offsets;
        let mut bytes = vec![0; end - start];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.data_start + start as u64))?;
        file.read_exact(&mut bytes)?;
        let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        Ok(match tensor.dtype {
            Dtype::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
            Dtype::BF16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
            _ => bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect(),
        })
    }
}

/// Where the data starts, and the header, whose tensors fill the file from there to its end without a gap.
fn read_header(mut file: &File) -> Result<(u64, Metadata), String> {
    let is_file = file.metadata().map_err(|error| error.to_string())?;
    if !is_file.is_file() {
        return Err("not a regular file".into());
    }
    let file_length = is_file.len();
    if file_length < 8 {
        return Err("the file is too short for a safetensors header".into());
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| error.to_string())?;
    let length = u64::from_le_bytes(length);
    if length > MAXIMUM_HEADER {
        return Err("not a safetensors file: the header length is beyond what the format allows (100 MB)".into());
    }
    if length > file_length - 8 {
        return Err("the header is longer than the file; the file ends early".into());
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|error| error.to_string())?;
    // This is where the library checks that offsets follow each other and fit shapes and types.
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| format!("the header is not valid: {}", shown(&error.to_string())))?;
    let data_start = 8 + length;
    if data_start.checked_add(metadata.data_len() as u64) != Some(file_length) {
        return Err("the tensors do not end where the file ends; it was cut or has bytes behind them".into());
    }
    Ok((data_start, metadata))
}

fn check(metadata: &Metadata) -> Result<(Vec<StoredLayer>, Description), String> {
    let fields = metadata.metadata().as_ref().ok_or("the file has no metadata; this is no dump of attention inputs")?;
    let format = field(fields, "format")?;
    if format != FORMAT {
        return Err(format!("metadata format is {}; expected \"{FORMAT}\"", shown(format)));
    }
    let mut layers = Vec::new();
    while let Some(queries) = metadata.info(&tensor_name(layers.len(), PARTS[0])) {
        if layers.len() == MAXIMUM_LAYERS {
            return Err(format!("more than {MAXIMUM_LAYERS} layers"));
        }
        layers.push(check_layer(metadata, layers.len(), queries)?);
    }
    if layers.is_empty() {
        return Err(format!("tensor {} is missing", tensor_name(0, PARTS[0])));
    }
    let count = metadata.tensors().len();
    if count != PARTS.len() * layers.len() {
        return Err(format!(
            "{count} tensors; expected layer.L.queries, .keys and .values for L from 0 to {}",
            layers.len() - 1
        ));
    }
    let scale = field(fields, "scale")?;
    let scale = scale.parse().ok().filter(|scale: &f32| scale.is_finite() && *scale > 0.0);
    let causal = match field(fields, "causal")? {
        "true" => true,
        "false" => false,
        other => return Err(format!("metadata causal is {}; expected \"true\" or \"false\"", shown(other))),
    };
    let description = Description {
        scale: scale
            .ok_or_else(|| format!("metadata scale is {}; expected a number above 0", shown(&fields["scale"])))?,
        causal,
        windows: windows(field(fields, "window")?, layers.len())?,
        source: field(fields, "source")?.to_owned(),
        model: field(fields, "model")?.to_owned(),
    };
    Ok((layers, description))
}

fn check_layer(metadata: &Metadata, layer: usize, queries: &TensorInfo) -> Result<StoredLayer, String> {
    let name = |part: usize| tensor_name(layer, PARTS[part]);
    let tensor = |part: usize| metadata.info(&name(part)).ok_or_else(|| format!("tensor {} is missing", name(part)));
    let tensors = [queries.clone(), tensor(1)?.clone(), tensor(2)?.clone()];
    let mut shapes = [[0; 3]; 3];
    for (part, tensor) in tensors.iter().enumerate() {
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(format!("{} is of type {}; expected F32, F16 or BF16", name(part), tensor.dtype));
        }
        shapes[part] = <[usize; 3]>::try_from(tensor.shape.as_slice())
            .ok()
            .filter(|shape| shape.iter().all(|&length| length > 0))
            .ok_or_else(|| {
                format!("{} has shape {:?}; expected [tokens, heads, width], none of them 0", name(part), tensor.shape)
            })?;
    }
    let [[tokens, query_heads, key_dim], [key_tokens, kv_heads, width], [value_tokens, value_heads, value_dim]] =
        shapes;
    if key_tokens != tokens || width != key_dim {
        return Err(format!("{} has shape {:?}; expected [{tokens}, heads, {key_dim}]", name(1), shapes[1]));
    }
    if value_tokens != tokens || value_heads != kv_heads {
        return Err(format!("{} has shape {:?}; expected [{tokens}, {kv_heads}, width]", name(2), shapes[2]));
    }
    if !query_heads.is_multiple_of(kv_heads) {
        return Err(format!("{} has {query_heads} heads, no multiple of the {kv_heads} key/value heads", name(0)));
    }
    let shape = Shape { query_tokens: tokens, key_tokens, query_heads, kv_heads, key_dim, value_dim };
    Ok(StoredLayer { shape, tensors })
}

fn field<'a>(fields: &'a HashMap<String, String>, name: &str) -> Result<&'a str, String> {
    fields.get(name).map(String::as_str).ok_or_else(|| format!("metadata {name} is missing"))
}

fn windows(text: &str, layers: usize) -> Result<Vec<Option<usize>>, String> {
    let expected =
        || format!("metadata window is {}; expected \"none\" or tokens, once or for each layer", shown(text));
    let window = |text: &str| match text {
        "none" => Ok(None),
        tokens => tokens.parse().ok().filter(|&tokens| tokens > 0).map(Some).ok_or_else(expected),
    };
    let windows = text.split(',').map(window).collect::<Result<Vec<_>, _>>()?;
    match windows.len() {
        1 => Ok(vec![windows[0]; layers]),
        count if count == layers => Ok(windows),
        _ => Err(expected()),
    }
}

/// Text from a file in quotes, with what cannot be shown escaped, shortened to about 80 characters.
fn shown(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut escaped = text.chars().flat_map(char::escape_debug);
    let start: String = escaped.by_ref().take(SHOWN).collect();
    let end = if escaped.next().is_some() { "…" } else { "" };
    format!("\"{start}{end}\"")
}
