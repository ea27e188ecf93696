//! Links the guest by the shared layout.

fn main() {
    linkage::emit();
}
