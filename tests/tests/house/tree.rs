//! The repository as files.

use std::fs;
use std::path::{Path, PathBuf};

use toml::Table;

/// Directories that hold nothing of ours.
const FOREIGN: &[&str] = &["target", ".git", "images", "node_modules"];

/// The files of the repository.
pub(crate) struct Tree {
    root: PathBuf,
}

/// A text file.
pub(crate) struct SourceFile {
    /// Path from the repository's root.
    pub(crate) path: String,
    /// Its text.
    pub(crate) text: String,
}

/// A crate's manifest.
pub(crate) struct Manifest {
    /// Path from the repository's root.
    pub(crate) path: String,
    /// Its content.
    pub(crate) table: Table,
}

/// A crate, or a directory of modules in one.
pub(crate) struct Part {
    /// Path from the repository's root.
    pub(crate) path: String,
}

impl Tree {
    /// The repository that this test was built in.
    pub(crate) fn of_repository() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        Self {
            root: root.canonicalize().expect("the repository exists"),
        }
    }

    /// A file's text; nothing if there is no such file.
    pub(crate) fn text(&self, path: &str) -> String {
        fs::read_to_string(self.root.join(path)).unwrap_or_default()
    }

    /// All Rust files, those of the guests included.
    pub(crate) fn rust_files(&self) -> Vec<SourceFile> {
        self.paths()
            .into_iter()
            .filter(|path| path.ends_with(".rs"))
            .map(|path| SourceFile {
                text: self.text(&path),
                path,
            })
            .collect()
    }

    /// The manifests of the workspace's members.
    pub(crate) fn manifests(&self) -> Vec<Manifest> {
        self.members()
            .into_iter()
            .map(|member| self.manifest(&member))
            .collect()
    }

    /// All workspaces' lock files.
    pub(crate) fn lock_files(&self) -> Vec<Table> {
        [
            "Cargo.lock",
            "fuzz/libfuzzer/Cargo.lock",
            "guest-images/Cargo.lock",
        ]
        .iter()
        .map(|path| self.text(path).parse().expect("a lock file is TOML"))
        .collect()
    }

    /// The members of the workspace and the directories of modules right below them.
    pub(crate) fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        for member in self.members() {
            let source = self.root.join(&member).join("src");
            for entry in fs::read_dir(&source).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    let name = entry.file_name().into_string().expect("names are UTF-8");
                    parts.push(Part {
                        path: format!("{member}/src/{name}"),
                    });
                }
            }
            parts.push(Part { path: member });
        }
        parts
    }

    fn members(&self) -> Vec<String> {
        let root: Table = self
            .text("Cargo.toml")
            .parse()
            .expect("the manifest is TOML");
        root["workspace"]["members"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|member| member.as_str().expect("a path").to_owned())
            .collect()
    }

    fn manifest(&self, member: &str) -> Manifest {
        let path = format!("{member}/Cargo.toml");
        let table = self.text(&path).parse().expect("the manifest is TOML");
        Manifest { path, table }
    }

    /// All files, sorted.
    fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        let mut todo = vec![self.root.clone()];
        while let Some(directory) = todo.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                let path = entry.path();
                let name = entry.file_name();
                if path.is_dir() && !FOREIGN.iter().any(|foreign| name == *foreign) {
                    todo.push(path);
                } else if path.is_file() {
                    let below = path.strip_prefix(&self.root).expect("it is below the root");
                    paths.push(below.to_string_lossy().into_owned());
                }
            }
        }
        paths.sort();
        paths
    }
}
