//! Protection of a guest. Empty until the pair is built: it will hold the pure protocol cores and their runtime.
