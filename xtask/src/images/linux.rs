//! A small Linux guest out of Debian's packages: kernel, initial RAM disk and root image.

mod archive;
mod bzimage;
mod debian;
mod initramfs;
mod manifest;
mod modules;
mod needed;
mod ring3;
mod rootfs;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::progress::Step;
use crate::workspace::Workspace;
use debian::Packages;
use manifest::Manifest;

/// Names a kernel by its dependencies: Debian's cloud kernel of the release.
const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Everything that assembling needs to know about places.
#[derive(Debug)]
struct Places {
    /// Where images go.
    images: PathBuf,
    /// Unpacked packages.
    tree: PathBuf,
    /// Init programs and configuration from the repository.
    templates: PathBuf,
}

/// Makes all files of the Linux guest, unless they are there and made of the same.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    ring3::unpack(workspace)?;
    let step = Step::begin("assemble Linux guest");
    let images = workspace.images();
    let cache = images.join("cache");
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let places = Places {
        tree: cache.join("tree"),
        templates: workspace.file("guest-images/linux"),
        images,
    };
    let manifest = Manifest::at(places.images.join("linux.manifest"));
    let inputs = manifest::templates(&places.templates)?;
    if manifest.holds(&inputs, &places.images) {
        step.done("up to date");
        return Ok(());
    }
    let packages = Packages::new(cache, places.tree.clone());
    assemble(&places, &packages, &step)?;
    packages.clear()?;
    manifest.write(&inputs, &packages.described()?)?;
    step.done(&format!("in {}", places.images.display()));
    Ok(())
}

fn assemble(places: &Places, packages: &Packages, step: &Step) -> Result<()> {
    step.at("download packages");
    packages.clear()?;
    let kernel = packages.dependency_of(KERNEL_META_PACKAGE)?;
    packages.add(&[&kernel])?;
    packages.add(rootfs::PACKAGES)?;
    let libraries = needed::complete(packages, &rootfs::programs(&places.tree))?;
    step.at("unpack kernel");
    let version = kernel.trim_start_matches("linux-image-");
    install_kernel(places, version)?;
    step.at("make initial RAM disk");
    initramfs::make(places, version)?;
    initramfs::make_nfs_modules(places, version)?;
    step.at("make root image");
    rootfs::make(places, &libraries)
}

fn install_kernel(places: &Places, version: &str) -> Result<()> {
    let packed = places.tree.join(format!("boot/vmlinuz-{version}"));
    let image = fs::read(&packed).with_context(|| format!("cannot read {}", packed.display()))?;
    let vmlinux = bzimage::unpack(&image)
        .with_context(|| format!("cannot unpack the kernel in {}", packed.display()))?;
    replace(&places.images.join("bzImage"), &image)?;
    replace(&places.images.join("vmlinux"), &vmlinux)
}

/// Writes a file as a whole or not at all.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let draft = path.with_extension("new");
    fs::write(&draft, content).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, path).with_context(|| format!("cannot write {}", path.display()))
}
