//! Rules of the source tree that no compiler knows: who may depend on whom, under which
//! licences, and how long a file may be.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::cargo::{command, output, root};

/// For each package of the product, which other packages of the workspace it may use.
/// `docs/architecture.md` says why; packages of the tests are free.
const MAY_USE: &[(&str, &[&str])] = &[
    ("api", &[]),
    ("migration", &[]),
    ("vfio-user", &[]),
    ("device-kit", &["api", "migration"]),
    ("broker", &["api", "migration"]),
    ("cli", &["api", "migration"]),
    ("vmm-core", &["api", "migration", "vfio-user"]),
    ("dev-balloon", &["device-kit", "migration"]),
    ("dev-blk", &["device-kit", "migration"]),
    ("dev-net", &["device-kit", "migration"]),
    ("dev-vfio", &["device-kit", "migration", "vfio-user"]),
    ("packaging", &[]),
];

/// Licences that an Apache-2.0 program can be distributed with.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// A file that is longer is not readable in one sitting.
const LONGEST_FILE: usize = 1000;

/// Checks all rules.
pub fn check() -> Result<()> {
    let ours = metadata(&["--no-deps"])?;
    let all = metadata(&["--locked"])?;
    let broken = [
        broken_dependencies(&ours)?,
        foreign_licences(&all)?,
        long_files()?,
    ]
    .concat();
    if !broken.is_empty() {
        bail!(
            "rules of the source tree are broken:\n  {}",
            broken.join("\n  ")
        );
    }
    println!("rules of the source tree hold");
    Ok(())
}

fn metadata(options: &[&str]) -> Result<Value> {
    let mut cargo = command("cargo", &["metadata", "--format-version=1"]);
    serde_json::from_str(&output(cargo.args(options))?).context("cargo metadata printed no JSON")
}

/// Dependencies that are under none of [`LICENCES`].
fn foreign_licences(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata names no packages")?;
    let refused = |package: &Value| {
        let licence = package["license"].as_str().unwrap_or("none");
        let name = package["name"].as_str().unwrap_or_default();
        (!is_permitted(licence)).then(|| format!("{name} is under {licence}"))
    };
    Ok(packages.iter().filter_map(refused).collect())
}

/// Whether an SPDX expression (or the older form with slashes) leaves us a choice.
fn is_permitted(licence: &str) -> bool {
    let any = |choices: &str| {
        let choices = choices.trim_matches(['(', ')', ' ']).replace('/', " OR ");
        choices
            .split(" OR ")
            .any(|choice| LICENCES.contains(&choice))
    };
    licence.split(" AND ").all(any)
}

fn broken_dependencies(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata names no packages")?;
    let allowed: BTreeMap<_, _> = MAY_USE.iter().copied().collect();
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    let ours: Vec<_> = packages.iter().map(name).collect();
    let mut broken = Vec::new();
    for package in packages {
        let user = name(package);
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        let is_test = user == "xtask" || manifest.contains("/tests/");
        let rule = allowed.get(user.as_str());
        if rule.is_none() && !is_test {
            broken.push(format!(
                "{user} is a new package: say in xtask/src/rules.rs what it may use"
            ));
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = name(dependency);
            // Tests of a package may use the packages of the tests.
            let free = is_test || dependency["kind"] == "dev";
            if ours.contains(&used) && !free && !rule.is_some_and(|r| r.contains(&used.as_str())) {
                broken.push(format!("{user} must not depend on {used}"));
            }
        }
    }
    Ok(broken)
}

fn long_files() -> Result<Vec<String>> {
    let files = output(&mut command(
        "git",
        &[
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "*.rs",
        ],
    ))?;
    let mut broken = Vec::new();
    for file in files.lines() {
        // A file that git knows may be gone from the tree.
        let Ok(text) = fs::read_to_string(root().join(file)) else {
            continue;
        };
        let lines = text.lines().count();
        if lines > LONGEST_FILE {
            broken.push(format!(
                "{file} has {lines} lines, at most {LONGEST_FILE} are readable"
            ));
        }
    }
    Ok(broken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_device_that_uses_the_core_is_named() {
        let package = |name: &str, uses: &[&str]| {
            let dependencies: Vec<_> = uses
                .iter()
                .map(|u| json!({ "name": u, "kind": null }))
                .collect();
            json!({ "name": name, "manifest_path": format!("/w/{name}/Cargo.toml"), "dependencies": dependencies })
        };
        let packages = json!({ "packages": [
            package("vmm-core", &["api", "serde"]), package("api", &[]), package("newcomer", &[]),
            package("dev-blk", &["device-kit", "vmm-core"]), package("device-kit", &["migration"]),
        ]});
        let broken = broken_dependencies(&packages).unwrap();
        assert_eq!(
            broken,
            [
                "newcomer is a new package: say in xtask/src/rules.rs what it may use",
                "dev-blk must not depend on vmm-core",
            ]
        );
    }

    #[test]
    fn licences_are_chosen_and_added_up() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-2.0 OR MIT",
            "(MIT OR GPL-3.0) AND Unicode-3.0",
        ] {
            assert!(is_permitted(good), "{good}");
        }
        for bad in ["GPL-2.0", "MIT AND GPL-3.0", "none", ""] {
            assert!(!is_permitted(bad), "{bad}");
        }
    }

    #[test]
    fn this_tree_keeps_the_rules() {
        check().unwrap();
    }
}
