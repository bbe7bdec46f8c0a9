//! The file that the page goes to: whole or not at all.
//!
//! The page is written to a temporary file beside it, which is made before the replay, so that a
//! place where nothing can be written is refused before anybody waits.

use std::fs::OpenOptions;
use std::io::{Error, Result, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

/// A page to be; without [`finish`](Self::finish) nothing is left of it.
#[derive(Debug)]
pub(crate) struct PageFile {
    temporary: NamedTempFile,
    target: PathBuf,
}

impl PageFile {
    /// Makes sure that a page can be written there. What is there stays until the page is whole.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let there = match path.metadata() {
            Ok(there) if there.is_dir() => return Err(Error::other("it is a folder")),
            // To be replaced by a file would end a device or a pipe.
            Ok(there) if !there.is_file() => return Err(Error::other("it is there and not a file")),
            Ok(there) => {
                OpenOptions::new().append(true).open(path)?;
                Some(there.permissions())
            }
            Err(_) => None,
        };
        // Through a link to what it names, so that the link stays.
        let target = if there.is_some() { path.canonicalize()? } else { path.to_path_buf() };
        let folder = match target.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        if target.file_name().is_none() {
            return Err(Error::other("it names no file"));
        }
        // The system's words for a folder that is not there name the folder only.
        folder.metadata()?;
        let temporary = new_file().tempfile_in(folder)?;
        if let Some(permissions) = there {
            temporary.as_file().set_permissions(permissions)?;
        }
        Ok(Self { temporary, target })
    }

    /// Writes the page and puts it in its place.
    pub(crate) fn finish(mut self, page: &str) -> Result<()> {
        let named = |error: Error| Error::new(error.kind(), format!("{}: {error}", self.target.display()));
        self.temporary.write_all(page.as_bytes()).map_err(named)?;
        self.temporary.persist(&self.target).map_err(|error| named(error.error))?;
        Ok(())
    }
}

/// Readable by whom a file is that is made in the plain way.
fn new_file() -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(".vattn-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_page_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page.html");
        drop(PageFile::open(&path).unwrap());
        assert_eq!(names(folder.path()), Vec::<String>::new());
        PageFile::open(&path).unwrap().finish("new").unwrap();
        assert_eq!(names(folder.path()), ["page.html"]);
        drop(PageFile::open(&path).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
    }

    #[test]
    fn a_place_where_no_page_can_be_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().to_path_buf(), folder.path().join("no/page.html"), "/dev/null".into()] {
            assert!(PageFile::open(&path).is_err(), "{}", path.display());
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_a_link_and_permissions_stay() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        std::fs::write(&file, "old").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        PageFile::open(&link).unwrap().finish("new").unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "new");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    }
}
