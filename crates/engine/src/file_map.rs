//! Bytes of a file, mapped part by part.
//!
//! A model is packed tensor by tensor. Each tensor is mapped when it is asked for and unmapped when its view is dropped,
//! so that the file's pages and the packed weights never stand in memory together for the whole model.

use std::borrow::Cow;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

/// Where the bytes of a model file come from; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct FileSource {
    /// How messages call the file.
    pub(crate) name: String,
    length: u64,
    origin: Origin,
}

#[derive(Clone, Debug)]
enum Origin {
    File(Arc<File>),
    Memory(Arc<Cow<'static, [u8]>>),
}

/// A range of a file's bytes, unmapped when dropped.
#[derive(Debug)]
pub(crate) enum FileBytes {
    Mapped(memmap2::Mmap),
    Memory(Arc<Cow<'static, [u8]>>, Range<usize>),
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes, range) => &bytes[range.clone()],
        }
    }
}

impl FileSource {
    pub(crate) fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Self { name: path.display().to_string(), length: metadata.len(), origin: Origin::File(Arc::new(file)) })
    }

    pub(crate) fn memory(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Self {
        let bytes = bytes.into();
        Self { name: name.into(), length: bytes.len() as u64, origin: Origin::Memory(Arc::new(bytes)) }
    }

    /// Maps `range`, which must lie within the file.
    #[allow(unsafe_code)]
    pub(crate) fn bytes(&self, range: Range<u64>) -> std::io::Result<FileBytes> {
        let outside = || std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the file ends early");
        if range.start > range.end || range.end > self.length {
            return Err(outside());
        }
        let length = usize::try_from(range.end - range.start).map_err(|_| outside())?;
        match &self.origin {
            Origin::Memory(bytes) => {
                let start = range.start as usize;
                Ok(FileBytes::Memory(bytes.clone(), start..start + length))
            }
            // An empty range cannot be mapped.
            Origin::File(_) if length == 0 => Ok(FileBytes::Memory(Arc::new(Cow::Borrowed(&[])), 0..0)),
            Origin::File(file) => {
                // The file may have been cut since it was opened; touching a page behind its end would kill the process.
                if file.metadata()?.len() < range.end {
                    return Err(outside());
                }
                let mut options = memmap2::MmapOptions::new();
                let options = options.offset(range.start).len(length);
                // SAFETY: the map is read-only and private to this process; the range lies within the file. Another
                // process that changes a model file while it is being loaded is outside the threat model
                // (docs/security.md).
                let map = unsafe { options.map(file.as_ref())? };
                #[cfg(unix)]
                map.advise(memmap2::Advice::Sequential).ok();
                Ok(FileBytes::Mapped(map))
            }
        }
    }

    /// Maps the whole file.
    pub(crate) fn all(&self) -> std::io::Result<FileBytes> {
        self.bytes(0..self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_a_file() {
        let path = std::env::temp_dir().join(format!("iceformer-file-map-{}", std::process::id()));
        std::fs::write(&path, b"0123456789").unwrap();
        let source = FileSource::open(&path).unwrap();
        assert_eq!(&*source.bytes(3..7).unwrap(), b"3456");
        assert_eq!(&*source.bytes(10..10).unwrap(), b"");
        assert!(source.bytes(3..11).is_err());
        std::fs::write(&path, b"01234").unwrap();
        assert_eq!(source.bytes(3..7).unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
        std::fs::remove_file(&path).unwrap();
        assert!(FileSource::open(&std::env::temp_dir()).is_err());
    }

    #[test]
    fn ranges_of_memory() {
        let source = FileSource::memory("memory", &b"0123456789"[..]);
        assert_eq!(&*source.bytes(3..7).unwrap(), b"3456");
        assert!(source.bytes(7..11).is_err());
        assert!(source.bytes(u64::MAX..u64::MAX).is_err());
    }
}
