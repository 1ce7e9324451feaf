//! Models of one GGUF file or of several (`NAME-00001-of-00004.gguf`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{GgufError, Header};
use crate::file_map::FileSource;
use crate::text::quoted;
use crate::weights::{Layout, StoredTensor, TensorTable};

/// A model's header and the tensors of all its files.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) header: Header,
    pub(crate) table: TensorTable,
}

/// Opens a file, and the others of its set. The error goes with the name of the file that it is about.
pub(crate) fn open(source: FileSource, path: Option<&Path>) -> Result<Opened, (String, GgufError)> {
    let name = source.name.clone();
    let here = |error| (name.clone(), error);
    let header = parse(&source)?;
    let count = header.metadata.u32("split.count").map_err(here)?.unwrap_or(0);
    let others = match (count, path) {
        (0 | 1, _) => Vec::new(),
        (_, None) => {
            return Err(here(GgufError::Split("split.count: a split model cannot be read from memory".into())));
        }
        (count, Some(path)) => {
            let number = header.metadata.u32("split.no").map_err(here)?.unwrap_or(0);
            other_files(path, number, count).map_err(here)?
        }
    };

    let mut table = TensorTable { layout: Layout::Gguf, sources: Vec::new(), tensors: BTreeMap::new() };
    add(&mut table, source, &header)?;
    for (index, path) in others.iter().enumerate() {
        let source = FileSource::open(path).map_err(|error| {
            here(GgufError::Split(format!("split file {} cannot be opened: {error}", path.display())))
        })?;
        let part = parse(&source)?;
        let at = |error| (source.name.clone(), error);
        let number = part.metadata.u32("split.no").map_err(at)?;
        if number != Some(index as u32 + 1) {
            return Err(at(GgufError::Split(format!("split.no is {number:?}; expected {}", index + 1))));
        }
        add(&mut table, source.clone(), &part)?;
    }
    let stated = header.metadata.usize("split.tensors.count").map_err(here)?;
    if let Some(stated) = stated.filter(|&stated| count > 1 && stated != table.tensors.len()) {
        let found = table.tensors.len();
        return Err(here(GgufError::Split(format!("split.tensors.count is {stated}; the files hold {found} tensors"))));
    }
    Ok(Opened { header, table })
}

fn parse(source: &FileSource) -> Result<Header, (String, GgufError)> {
    let at = |error| (source.name.clone(), error);
    let bytes = source.all().map_err(|error| at(GgufError::Read(error.to_string())))?;
    Header::parse(&bytes).map_err(at)
}

fn add(table: &mut TensorTable, source: FileSource, header: &Header) -> Result<(), (String, GgufError)> {
    for tensor in &header.tensors {
        let stored = StoredTensor {
            source: table.sources.len(),
            type_name: tensor.kind.name,
            stored: tensor.kind.stored,
            shape: tensor.shape.clone(),
            start: tensor.start,
            bytes: tensor.bytes,
        };
        if table.tensors.insert(tensor.name.clone(), stored).is_some() {
            return Err((source.name, GgufError::DuplicateTensor(tensor.name.clone())));
        }
    }
    table.sources.push(source);
    Ok(())
}

/// The paths of the second and later files, from the path of the first.
fn other_files(path: &Path, number: u32, count: u32) -> Result<Vec<PathBuf>, GgufError> {
    if number != 0 {
        return Err(GgufError::Split(format!(
            "split.no is {number}: this is a later file of a split model; open its first file, whose name ends in \
             -00001-of-{count:05}.gguf"
        )));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // Five digits, so the number of files is bounded by the name.
    let Some(prefix) = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")).filter(|_| count <= 99_999) else {
        return Err(GgufError::Split(format!(
            "split.count is {count}, but the file name {} does not end in -00001-of-{count:05}.gguf",
            quoted(name)
        )));
    };
    Ok((2..=count).map(|part| path.with_file_name(format!("{prefix}-{part:05}-of-{count:05}.gguf"))).collect())
}
