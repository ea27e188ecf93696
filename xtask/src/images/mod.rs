//! Guest images: our own freestanding guests and a small Linux, put into `target/images`.

mod guests;
mod linux;

use anyhow::{Result, bail};

use crate::setup::{self, Purpose};
use crate::workspace::Workspace;

/// Name by which the Linux images are asked for.
const LINUX: &str = "linux";

/// Which images to build.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Arguments {
    /// Only these, separated by commas: names of guests, or `linux` for the kernel, the initial
    /// RAM disk and the root image made of Debian packages. All by default.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
}

impl Arguments {
    /// A choice of images by name.
    pub(crate) fn only<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            only: names.into_iter().map(str::to_owned).collect(),
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|chosen| chosen == name)
    }
}

/// Builds the chosen images.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let known = guests::names(workspace)?;
    for name in &arguments.only {
        if name != LINUX && !known.contains(name) {
            bail!(
                "there is no image `{name}`; there are {} and {LINUX}",
                known.join(", ")
            );
        }
    }
    let chosen: Vec<String> = known
        .into_iter()
        .filter(|name| arguments.wants(name))
        .collect();
    if !chosen.is_empty() {
        guests::build(workspace, &chosen)?;
    }
    if arguments.wants(LINUX) {
        setup::prepare(Purpose::Images)?;
        linux::build(workspace)?;
    }
    Ok(())
}
