//! The verb `keys`.

use std::path::Path;

use super::Style;
use crate::args::KeysVerb;
use crate::failure::Failure;
use crate::keys::{Order, Shown, new_authority, new_host, show};
use crate::output;

/// Does what `verb` says.
pub(super) fn carry_out(verb: &KeysVerb, style: Style) -> Result<(), Failure> {
    match verb {
        KeysVerb::NewCa {
            directory,
            name,
            days,
            replace,
        } => new_authority(&Order {
            directory,
            name,
            days: *days,
            replace: *replace,
        })?,
        KeysVerb::NewHost {
            directory,
            ca,
            name,
            addresses,
            days,
            replace,
        } => {
            let order = Order {
                directory,
                name,
                days: *days,
                replace: *replace,
            };
            new_host(&order, ca, addresses)?;
        }
        KeysVerb::Show { directory } => return print(directory, style),
    }
    let directory = match verb {
        KeysVerb::NewCa { directory, .. }
        | KeysVerb::NewHost { directory, .. }
        | KeysVerb::Show { directory } => directory,
    };
    if style.quiet {
        return Ok(());
    }
    print(directory, style)
}

fn print(directory: &Path, style: Style) -> Result<(), Failure> {
    let all = show(directory)?;
    let printed = if style.json() {
        output::print_json(&all)
    } else {
        let texts: Vec<String> = all.iter().map(text).collect();
        output::print(texts.join("\n"))
    };
    printed.map_err(Failure::host("print the result"))
}

fn text(shown: &Shown) -> String {
    let left = match shown.days_left {
        ..0 => "it has expired".to_owned(),
        days => format!("{days} days left"),
    };
    let signed = match shown.authority == shown.name {
        true => "itself",
        false => &shown.authority,
    };
    let mut text = format!(
        "file       {}\nname       {}\nsigned by  {signed}\n",
        shown.file.display(),
        shown.name
    );
    if !shown.addresses.is_empty() {
        text += &format!("addresses  {}\n", shown.addresses.join(", "));
    }
    text + &format!("valid      {} to {}, {left}\n", shown.from, shown.until)
}
