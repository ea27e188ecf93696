//! House rules that a program can check. Each rule is a function from what is in the repository to
//! a list of complaints; each is also held against something that breaks it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod documents;
mod manifests;
mod sources;
mod tree;

use tree::Tree;

/// Fails with all complaints, one per line.
fn expect_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn arrows_point_downwards() {
    expect_none(&manifests::upward_arrows(
        &Tree::of_repository().manifests(),
    ));
}

#[test]
fn every_crate_takes_lints_and_versions_from_the_workspace() {
    expect_none(&manifests::own_ways(&Tree::of_repository().manifests()));
}

#[test]
fn shared_crates_come_in_one_version_and_from_one_place() {
    for lock in Tree::of_repository().lock_files() {
        expect_none(&manifests::lock_complaints(&lock));
    }
}

#[test]
fn sources_keep_the_rules() {
    for file in Tree::of_repository().rust_files() {
        expect_none(&sources::complaints(&file));
    }
}

#[test]
fn the_architecture_names_every_part() {
    let tree = Tree::of_repository();
    expect_none(&documents::unnamed(
        &tree.text("ARCHITECTURE.md"),
        &tree.parts(),
    ));
}

#[test]
fn the_readme_opens_with_the_two_commands() {
    expect_none(&documents::readme_complaints(
        &Tree::of_repository().text("README.md"),
    ));
}
