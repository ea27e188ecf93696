//! Writes the inputs that the targets begin with into the corpus.

use std::fs;
use std::io;

use tandem_fuzz::{TARGETS, seeds};

fn main() -> io::Result<()> {
    for target in &TARGETS {
        let directory = target.corpus();
        fs::create_dir_all(&directory)?;
        for (name, bytes) in seeds::of(target) {
            fs::write(directory.join(name), bytes)?;
        }
    }
    Ok(())
}
