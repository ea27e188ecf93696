//! `tandem store init`: a store where there is none.

use std::path::Path;

use serde_json::json;
use tandem_store::seal::Key;
use tandem_store::{Options, Place, Store};

use crate::failure::Failure;
use crate::output;
use crate::verbs::Style;

/// Makes a store, encrypted by the key in `encrypt` if that is given; tries the storage in any case.
pub(in crate::verbs) fn init(
    place: &Place,
    encrypt: Option<&Path>,
    style: Style,
) -> Result<(), Failure> {
    let found = Store::is_at(place)?;
    let key = match encrypt {
        // A new key is none of a store that is there.
        Some(path) if !found && !path.exists() => Some(Key::create(path)?),
        Some(path) => Some(Key::read(path)?),
        None => None,
    };
    let encrypted = key.is_some();
    let store = Store::open_at(place, Options { key })?;
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&json!({
            "place": place.to_string(),
            "id": store.id(),
            "made": !found,
            "encrypted": encrypted,
        })),
        (false, true) => Ok(()),
        (false, false) => output::print(format!(
            "{}: store {} {}, {}; of those who race for a name one gets it\n",
            store.place(),
            store.id(),
            if found { "is there" } else { "made" },
            if encrypted {
                "encrypted"
            } else {
                "not encrypted"
            },
        )),
    };
    printed.map_err(Failure::host("print the result"))
}
