//! A kernel that runs in ring 3, for hosts whose KVM runs only that natively. Nothing needs it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process;
use crate::progress::Step;
use crate::workspace::Workspace;

/// Names the kernel, an ELF file or one packed by zstd.
const VARIABLE: &str = "TANDEM_RING3_KERNEL";
/// Where it is otherwise, from the repository.
const BESIDE: &str = "../shared/kernel/vmlinux.zst";
/// Mark of a zstd frame.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Puts the kernel among the images if one is provided.
pub(super) fn unpack(workspace: &Workspace) -> Result<()> {
    let Some(provided) = provided(workspace)? else {
        return Ok(());
    };
    let image = workspace.images().join("vmlinux-ring3");
    if is_as_new(&image, &provided) {
        return Ok(());
    }
    let step = Step::begin("unpack ring-3 kernel");
    fs::create_dir_all(workspace.images())?;
    let kernel = fs::read(&provided)
        .with_context(|| format!("cannot read the ring-3 kernel {}", provided.display()))?;
    let draft = image.with_extension("new");
    if kernel.starts_with(&ZSTD) {
        let mut zstd = process::command("zstd", ["--decompress", "--quiet", "--force"]);
        process::quiet(zstd.arg(&provided).arg("-o").arg(&draft))?;
    } else {
        fs::write(&draft, kernel).with_context(|| format!("cannot write {}", draft.display()))?;
    }
    fs::rename(&draft, &image).with_context(|| format!("cannot write {}", image.display()))?;
    step.done("done");
    Ok(())
}

fn provided(workspace: &Workspace) -> Result<Option<PathBuf>> {
    if let Some(named) = env::var_os(VARIABLE).map(PathBuf::from) {
        if !named.is_file() {
            bail!("{VARIABLE} names {}, which is no file", named.display());
        }
        return Ok(Some(named));
    }
    let beside = workspace.file(BESIDE);
    Ok(beside.is_file().then_some(beside))
}

/// Whether `image` is no older than `source`; zstd keeps the time of what it unpacks.
fn is_as_new(image: &Path, source: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified());
    matches!((modified(image), modified(source)), (Ok(image), Ok(source)) if image >= source)
}
