//! A folder with a small model that opens, to be changed by a test.

use std::path::{Path, PathBuf};

use iceformer_engine::ModelFiles;

use super::{peak_of, safetensors_of, scratch_folder, tiny_config, tiny_shapes};

const KIB: u64 = 1024;
/// The smallest tokenizer there can be.
pub const TOKENIZER: &str = r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "decoder": {"type": "ByteLevel",
    "add_prefix_space": false, "trim_offsets": false, "use_regex": false}}"#;

/// The folder of a model.
pub struct Folder(pub PathBuf);

impl Folder {
    /// A model that opens.
    pub fn new(name: &str) -> Self {
        let folder = Self(scratch_folder(name));
        folder.put("config.json", tiny_config(64).to_string());
        folder.put("model.safetensors", safetensors_of(&tiny_shapes(64)));
        folder.put("tokenizer.json", TOKENIZER);
        folder
    }

    pub fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.0.join(name)).unwrap();
    }

    pub fn error(&self) -> String {
        error_of(&self.0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// The one short line that says why a folder does not open. Telling takes no large allocation.
pub fn error_of(path: &Path) -> String {
    let (result, peak) = peak_of(|| {
        let files = ModelFiles::open(path).map_err(|error| error.to_string())?;
        files.tokenizer().map_err(|error| error.to_string())?;
        files.chat_template().map_err(|error| error.to_string())?;
        Ok::<_, String>(())
    });
    let message = result.expect_err("the folder was accepted");
    assert!(!message.contains('\n') && message.len() < 400, "not one short line: {message}");
    assert!(peak < 4096 * KIB, "{peak} bytes were allocated: {message}");
    message
}

/// Asserts that all `parts` are in `message`.
pub fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}
