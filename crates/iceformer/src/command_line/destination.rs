//! Where a file that is written whole goes.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The file that `path` names, links followed: the place to which a finished file may be moved. What stands there is
/// replaced by that, so it must be a file, and no device, pipe or socket.
///
/// # Errors
/// When something else stands there, or a link leads nowhere.
pub fn destination(path: &Path) -> anyhow::Result<PathBuf> {
    match path.canonicalize() {
        Ok(place) => {
            anyhow::ensure!(
                place.is_dir() || place.is_file(),
                "{}: is a device, pipe or socket; expected the name of a file to write",
                path.display()
            );
            Ok(place)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // Links of a process to what it has open, as `/dev/stdout` is one, lead where there is no path.
            anyhow::ensure!(
                path.metadata().is_err(),
                "{}: is a device, pipe or socket; expected the name of a file to write",
                path.display()
            );
            anyhow::ensure!(
                !path.is_symlink(),
                "{}: is a link to what does not exist; expected the name of a file to write",
                path.display()
            );
            Ok(path.to_owned())
        }
        Err(error) => anyhow::bail!("{}: {error}", path.display()),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn links_are_followed_and_what_is_no_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let (file, link, dangling) = (folder.join("file"), folder.join("link"), folder.join("dangling"));
        std::fs::write(&file, "a").unwrap();
        symlink("file", &link).unwrap();
        symlink("nothing", &dangling).unwrap();
        assert_eq!(destination(&file).unwrap(), file);
        assert_eq!(destination(&link).unwrap(), file);
        assert_eq!(destination(&folder.join("new")).unwrap(), folder.join("new"));
        // Told by who writes, in its own words.
        assert_eq!(destination(&folder).unwrap(), folder);
        assert_eq!(destination(&folder.join("missing/new")).unwrap(), folder.join("missing/new"));
        let socket = folder.join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        for (path, what) in [(socket, "device, pipe or socket"), (dangling, "a link to what does not exist")] {
            let error = destination(&path).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()) && error.contains(what), "{error}");
        }
        for device in ["/dev/null", "/dev/stdout"] {
            let is_file = Path::new(device).metadata().is_ok_and(|metadata| metadata.is_file());
            assert_eq!(destination(Path::new(device)).is_ok(), is_file, "{device}");
        }
    }
}
