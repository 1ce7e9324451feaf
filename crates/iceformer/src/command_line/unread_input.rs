//! Standard input that a command leaves alone, though something is there.

use std::io::Write;

/// Tells that standard input is not read, where it is a pipe or a file that holds something. Nothing is read to find out.
pub fn tell_of_unread_input() {
    if is_given() {
        let _ = writeln!(std::io::stderr(), "warning: standard input is not read; --file - reads it");
    }
}

#[cfg(unix)]
fn is_given() -> bool {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileTypeExt;

    let metadata = std::io::stdin().as_fd().try_clone_to_owned().and_then(|input| File::from(input).metadata());
    metadata.is_ok_and(|metadata| metadata.file_type().is_fifo() || (metadata.is_file() && metadata.len() > 0))
}

#[cfg(not(unix))]
fn is_given() -> bool {
    false
}
